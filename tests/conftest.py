"""What several test files need."""

from pathlib import Path

import pytest
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, BlipImageProcessorPil

from models.text import word_tokenizer

WORDS = ("a", "red", "blue", "green", "circle", "square")


@pytest.fixture(scope="session")
def itm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BLIP-2 image-text matching model for 32 x 32 pictures, its processor beside it."""
    folder = tmp_path_factory.mktemp("itm")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = 8
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    reader = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "use_qformer_text_input": True}
    config = Blip2Config(
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.1},
        qformer_config={**small, **reader, "initializer_range": 0.1},
        text_config={"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 8},
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blip2ForImageTextRetrieval(config)
        torch.nn.init.normal_(model.query_tokens, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder

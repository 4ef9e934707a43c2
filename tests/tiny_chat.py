"""Untrained chat models that see pictures, small enough for tests: a LLaVA and a Qwen2-VL."""

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.text import word_tokenizer

WORDS = (
    "user assistant : is there a red blue ring cross which what colour better image 1 2 ? answer with or only . in few "
    "words the letter of one option b c yes Yes Ġyes no No A B C Ġ1"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LIMIT = 160
"""Tokens that the models read."""


def template(picture: str) -> str:
    """A chat template in which a picture is the text `picture`."""
    return (
        "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
        "{% if part.type == 'image' %}" + picture + "{% else %} {{ part.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Pictures are scaled to 16 x 16 pixels and read as 4 tokens."""
    tokenizer = _tokenizer("<image>")
    vision = CLIPVisionConfig(**TEXT, image_size=16, patch_size=8)
    text = LlamaConfig(**TEXT, **_ids(tokenizer), max_position_embeddings=LIMIT)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    pictures = LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=False)
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template("<image>"),
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)
    return _noisy(LlavaForConditionalGeneration, config), processor


class PictureProcessor(Qwen2VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Pictures keep their size; every 8 x 8 pixels are one token."""
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = _tokenizer(*special)
    image, video, start, end = tokenizer.convert_tokens_to_ids(special)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, **_ids(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": LIMIT}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, patch_size=4)
    processor = PictureProcessor(pictures, tokenizer, template("<|vision_start|><|image_pad|><|vision_end|>"))
    return _noisy(Qwen2VLForConditionalGeneration, config), processor


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(WORDS.split(), extra=special)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("pad", "bos", "eos")
    return {"vocab_size": len(tokenizer), **{f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in names}}


def _noisy(kind: type[PreTrainedModel], config) -> PreTrainedModel:
    """With weights large enough for every input to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()

"""What several test files need."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
)

from judges.qformer import small_config
from judges.shapes.grammar import vocabulary
from judges.shapes.questions import question_vocabulary
from models.pretrain import new_generator
from models.text import word_tokenizer

WORDS = ("a", "red", "blue", "green", "circle", "square")


def pytest_collection_finish() -> None:
    """What was imported lives to the end: training collects garbage, and would look at all of it every time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of the embedded world that was never trained, yet paints more than grey."""
    folder = tmp_path_factory.mktemp("generator")
    generator = new_generator(vocabulary(), size=32, width=32, depth=2, text_depth=1, max_tokens=12, seed=0)
    random = torch.Generator().manual_seed(1)
    for module in (generator.transformer, generator.codec):
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    generator.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained BLIP-2s of the embedded world's vocabulary: `vqa` answers questions, `itm` matches texts."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = word_tokenizer([*vocabulary(), *question_vocabulary()], extra=["<image>"])
    tokenizer.model_max_length = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in (("vqa", Blip2ForConditionalGeneration), ("itm", Blip2ForImageTextRetrieval)):
            config = small_config(tokenizer, size=32, patch=8, width=32, queries=4, with_text=name == "itm")
            model = kind(config)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
            model.save_pretrained(folder / name)
            tokenizer.model_max_length = 16 if name == "itm" else 64
            tokenizer.save_pretrained(folder / name)
            pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
            pictures.save_pretrained(folder / name)
    (folder / "vqa" / "judge.json").write_text('{"questions": "shapes"}')
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a test file live."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config_at(folder: Path, generator_folder: Path, judge_folder: Path) -> Callable[..., Path]:
    """Writes the settings of a tiny run of a given name, with changes by section."""

    def write(name: str, **changes: dict) -> Path:
        settings = _tiny(name, folder, generator_folder, judge_folder)
        for section, values in changes.items():
            settings[section].update(values)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def _tiny(name: str, folder: Path, generator: Path, judge: Path) -> dict:
    return {
        "name": name,
        "out": str(folder),
        "prompts": {"type": "shapes"},
        "generator": {"checkpoint": str(generator)},
        "sample": {"prompts": 18, "images_per_prompt": 3, "foreign": 1, "steps": 2, "shard": 20},
        "judge": {
            "type": "questions",
            "model": {"type": "blip2", "checkpoint": str(judge / "vqa")},
            "questions": {"type": "shapes"},
            "shard": 20,
        },
        "prefer": {"min_gap": 0.0, "heldout": 0.3},
        "reward": {
            "backbone": {"type": "qformer", "checkpoint": str(judge / "itm")},
            "epochs": 2,
            "batch": 8,
            "learning_rate": 1e-3,
            "save_steps": 2,
        },
        "finetune": {
            "iterations": 4,
            "groups": 2,
            "group_size": 3,
            "steps": 3,
            "kept_images": 4,
            "save_every": 2,
            "watch": {"every": 4, "prompts": 50},
            "algorithm": {"type": "grpo", "last_start": 1},
        },
        "evaluate": {"images": 12, "steps": 2, "shard": 10},
        "report": {"examples_per_skill": 1},
    }

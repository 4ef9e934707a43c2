"""Every stage runs on a pipeline of diffusers, by the configs that are there for it."""

from pathlib import Path

import pytest
import torch

import pipeline
from models.lora import WEIGHTS
from pipeline.config import Config
from pipeline.settings import load
from tests.tiny_pipelines import FAMILIES

CONFIGS = Path(__file__).parent.parent / "configs" / "tiny"


@pytest.mark.parametrize(("name", "family"), [("sd35", "sd3"), ("sdxl", "sdxl")])
def test_a_whole_run_on_a_tiny_pipeline(name, family, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent.parent)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[family].build().save_pretrained(tmp_path / "base")
    moved = [f"generator.checkpoint={tmp_path / 'base'}", f"out={tmp_path}"]
    numbers = pipeline.run(CONFIGS / f"{name}.yaml", *moved, "finetune.iterations=2", "finetune.watch.every=2")
    run = tmp_path / load(Config, CONFIGS / f"{name}.yaml").name
    assert numbers["generator"]["tuned"]["images"] == 24
    assert numbers["generator"]["tuned"]["reward"] != numbers["generator"]["base"]["reward"]
    assert (run / "finetune" / "lora" / WEIGHTS).is_file()
    assert (run / "report" / "index.html").is_file()

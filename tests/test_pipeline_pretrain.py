"""`pretrain` leaves checkpoints that the loaders read, with their recipe and quality, and goes on where it was."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from judges import load_judge
from judges.shapes.grammar import parse, sample_prompt
from judges.shapes.oracle import follows
from judges.shapes.render import render, scene_of
from models import load_generator, sample
from models.codec import to_images, to_pixels
from models.paths import Parametrisation
from pipeline.settings import load
from pipeline.stages.flow import captions_of
from pipeline.stages.pretrain import PretrainConfig, pretrain, repainted
from rewards.backbones import QFormerReward

JOBS = {
    "generator": {
        "codec_steps": 2,
        "decoder_steps": 2,
        "pictures": 8,
        "width": 32,
        "depth": 1,
        "batch": 4,
        "clean_steps": 1,
        "noisy_steps": 1,
        "compile": False,
    },
    "judge": {"width": 32, "queries": 2, "batch": 4, "vision_steps": 2, "matching_steps": 2, "answering_steps": 2},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")

    def run(kind, name="", **changes):
        name = name or kind
        path = folder / f"{name}.yaml"
        job = {"type": kind, **JOBS[kind], **changes}
        settings = {"name": name, "out": str(folder / "runs"), "publish": str(folder / name), "job": job}
        path.write_text(yaml.safe_dump(settings))
        pretrain(load(PretrainConfig, path))
        return folder / name

    return run


def test_a_generator_is_published_with_its_recipe_and_quality(published):
    folder = published("generator")
    image = next(iter(sample(load_generator(folder), ["a red ring"], [0], steps=2)))
    assert image.shape == (32, 32, 3)
    quality = json.loads((folder / "quality.json").read_text())
    assert 0 <= quality["gold"] <= 1
    assert yaml.safe_load((folder / "pretrain.yaml").read_text())["clean_steps"] == 1


def test_a_generator_of_diffusion_keeps_what_it_predicts_and_on_which_path(published):
    objective = {"path": "vp", "prediction": "eps", "times": "uniform", "weight": "min-snr"}
    generator = load_generator(published("generator", "diffusion", objective=objective, unconditional=0.5))
    assert generator.parametrisation == Parametrisation("vp", "eps")
    image = next(iter(sample(generator, ["a red ring"], [0], steps=2)))
    assert image.shape == (32, 32, 3)


def test_a_judge_is_published_in_both_forms_and_a_second_call_trains_no_further(published):
    folder = published("judge")
    image = np.zeros((32, 32, 3), np.uint8)
    verdict = load_judge(folder / "vqa").score([image], ["a red ring above a blue cross"])[0]
    assert len(verdict.evidence) == 5
    model = QFormerReward.from_checkpoint(folder / "itm")
    tokens = model.tokens(["a red ring above a blue cross"])
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (1, 16)
    assert model.network.config.num_query_tokens == 2
    before = (folder / "vqa" / "model.safetensors").read_bytes()
    assert (published("judge") / "vqa" / "model.safetensors").read_bytes() == before


def test_by_the_papers_recipe_the_language_model_stays_as_it_had_read(published):
    paper = {"first_stage": "paper", "language": "frozen", "reading_steps": 2}
    short, long = (
        load_file(published("judge", f"paper-{steps}", answering_steps=steps, **paper) / "vqa" / "model.safetensors")
        for steps in (1, 3)
    )
    still = {name for name in short if torch.equal(short[name], long[name])}
    assert still == {name for name in short if name.startswith(("vision_model.", "language_model."))}


def test_only_the_share_asked_for_is_repainted_and_stays_a_picture():
    codec = load_generator("models/checkpoints/shapes").codec
    rng = random.Random(0)
    prompts = [sample_prompt(rng, "train") for _ in range(40)]
    pixels = to_pixels(render([scene_of(prompt, rng, lattice=True) for prompt in prompts]))
    found = repainted(codec, pixels, 0.5, 0)
    assert torch.equal(found[20:], pixels[20:])
    assert torch.equal(found, repainted(codec, pixels, 0.5, 0))
    assert torch.equal(to_pixels(to_images(found)), found)
    assert 0 < (found[:20] - pixels[:20]).abs().mean() < 0.05
    right = [follows(image, prompt) for image, prompt in zip(to_images(found[:20]), prompts, strict=False)]
    assert np.mean(right) > 0.8


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_captions_are_true_or_false_in_the_share_asked_for(noise, share, lattice):
    rng = random.Random(0)
    prompts = [sample_prompt(rng, "train") for _ in range(60)]
    images = render([scene_of(prompt, rng, lattice) for prompt in prompts])
    told = captions_of(prompts, noise, rng)
    assert np.mean([follows(image, parse(text)) for image, text in zip(images, told, strict=True)]) == share
    assert {parse(text).split for text in told} == {"train"}

"""`pretrain` leaves checkpoints that the loaders read, with their recipe and quality, and goes on where it was."""

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from judges import load_judge
from judges.shapes.grammar import SKILLS, parse, sample_prompt
from judges.shapes.oracle import follows
from judges.shapes.render import render, scene_of
from models import load_generator, sample
from models.codec import Identity, load_codec, new_vae, same_codec, to_images, to_pixels
from models.paths import Parametrisation
from pipeline.progress import Progress
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages import pretrain as stage
from pipeline.stages.flow import captions_of, gallery_of, measured
from pipeline.stages.pretrain import GeneratorJob, PretrainConfig, judge_quality, pretrain, repainted
from rewards.backbones import QFormerReward

JOBS = {
    "generator": {
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

MEANING = {"codec_steps": 2, "decoder_steps": 2}
"""Of the codec that a generator has by default."""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")

    def run(kind, name="", **changes):
        name = name or kind
        path = folder / f"{name}.yaml"
        codec = MEANING if kind == "generator" and "codec" not in changes else {}
        job = {"type": kind, **JOBS[kind], **codec, **changes}
        settings = {"name": name, "out": str(folder / "runs"), "publish": str(folder / name), "job": job}
        path.write_text(yaml.safe_dump(settings))
        with pytest.MonkeyPatch.context() as patch:  # a quality that nobody reads needs no thousand pictures
            patch.setattr(stage, "measured", partial(measured, images=12))
            patch.setattr(stage, "judge_quality", partial(judge_quality, pictures=20))
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


def test_a_generator_is_published_on_a_vae_of_its_own_and_a_second_call_trains_no_further(published):
    codec = {"type": "vae", "channels": 3, "widths": [8, 8], "steps": 2, "batch": 4}
    folder = published("generator", "vae", codec=codec)
    generator = load_generator(folder)
    assert generator.latent_shape == (3, 16, 16)
    assert next(iter(sample(generator, ["a red ring"], [0], steps=2))).shape == (32, 32, 3)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "codec")
    assert theirs.config.scaling_factor != 1
    new = new_vae(3, (8, 8), 0).autoencoder
    assert any(not torch.equal(*both) for both in zip(theirs.parameters(), new.parameters(), strict=True))
    (weights,) = (folder / "codec").glob("*.safetensors")
    before = weights.read_bytes()
    assert (published("generator", "vae", codec=codec) / "codec" / weights.name).read_bytes() == before


def test_a_generator_is_published_on_pixels(published):
    generator = load_generator(published("generator", "identity", codec={"type": "identity"}))
    assert isinstance(generator.codec, Identity)
    assert generator.latent_shape == (3, 32, 32)
    assert next(iter(sample(generator, ["a red ring"], [0], steps=2))).shape == (32, 32, 3)


def test_a_generator_is_published_on_a_codec_that_is_there(published, tmp_path):
    new_vae(2, (8, 8, 8), 1).save_pretrained(tmp_path / "vae")
    generator = load_generator(published("generator", "folder", codec={"type": "folder", "path": str(tmp_path)}))
    assert generator.latent_shape == (2, 8, 8)
    assert same_codec(generator.codec, load_codec(tmp_path / "vae"))
    assert next(iter(sample(generator, ["a red ring"], [0], steps=2))).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {"type": "folder", "path": "nowhere"}}, r"job\.codec\.path: nowhere: holds no codec"),
        (
            {"codec": {"type": "folder", "path": "judges/checkpoints/shapes/vqa"}},
            r"job\.codec\.path: codec: .*known here",
        ),
        ({"codec": {"type": "vqgan"}}, r"job\.codec\.type: unknown vqgan; .*vae"),
        ({"codec": {"type": "vae", "widths": [8, 12]}}, "widths: 12 is no multiple of 8"),
        ({"codec": {"type": "vae", "widths": [8] * 7}}, "codec: its cells are of 64 pixels a side"),
        ({"weights": {"positions": 1}}, r"job\.weights: positions is no skill; they are single_object, "),
        ({"codec": {"type": "vae"}, "meaning": 0.2}, "meaning: is of the codec of type meaning, not of vae"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_trained(published, changes, message):
    with pytest.raises(SettingsError, match=message):
        published("generator", "wrong", **changes)


def test_a_codec_without_its_weights_is_one_line(published, tmp_path):
    new_vae(2, (8, 8), 0).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"job: .*holds no weights"):
        published("generator", "weightless", codec={"type": "folder", "path": str(tmp_path)})


def test_the_published_recipe_of_the_shipped_generator_can_be_read():
    recipe = yaml.safe_load(Path("models/checkpoints/shapes/pretrain.yaml").read_text(encoding="utf-8"))
    job = GeneratorJob.model_validate({name: value for name, value in recipe.items() if name != "seed"})
    assert job.codec.type == "meaning"
    assert job.codec_steps == recipe["codec_steps"]


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


def test_pictures_to_learn_from_are_of_skills_by_weight():
    codec = load_generator("models/checkpoints/shapes").codec
    even = gallery_of(codec, 600, 0, Progress()).prompts
    assert {prompt.skill for prompt in even} == set(SKILLS)
    weighted = Counter(p.skill for p in gallery_of(codec, 600, 0, Progress(), {"position": 3, "counting": 1}).prompts)
    assert set(weighted) == {"position", "counting"}
    assert weighted["position"] / 600 == pytest.approx(0.75, abs=0.06)


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

"""The verb `invert` finds a picture's noise, shows how near it comes, and what the tuned model makes of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from models import load_generator, lora, sample
from models.adapters.base import DiffusersGenerator
from models.inversion import Inversion, Inverted
from pipeline import forecast
from pipeline.cli import app
from pipeline.config import Config
from pipeline.runner import states
from pipeline.settings import UserError, load
from pipeline.stages import STAGES
from pipeline.store import Artifact
from pipeline.verbs import invert as verb
from pipeline.verbs.invert import invert, psnr, sheet
from tests.tiny_pipelines import FAMILIES

PROMPT = "a red ring"


@pytest.fixture(scope="module")
def picture(folder, generator_folder):
    """Painted by the generator itself, so that its noise is known to exist."""
    (image,) = sample(load_generator(generator_folder), [PROMPT], [7], steps=4)
    Image.fromarray(image).save(folder / "ring.png")
    return folder / "ring.png"


def test_without_a_tuned_model_original_and_reconstruction_are_shown(config_at, picture, generator_folder):
    path, settings = config_at("inverted"), ["invert.steps=4", "invert.iterations=8"]
    result = CliRunner().invoke(app, ["invert", str(path), *settings, "--image", str(picture), "--prompt", PROMPT])
    assert result.exit_code == 0, result.output
    assert "holds no result of finetune for these settings" in result.output
    out = path.parent / "inverted" / "invert" / "ring"
    found = json.loads((out / "invert.json").read_text())
    assert (found["method"], found["steps"], found["tuned"], found["tuned_psnr"]) == ("fixed-point", 4, False, None)
    latents = load_file(out / "latents.safetensors")
    assert set(latents) == {"first"}
    generator = load_generator(generator_folder)
    assert latents["first"].shape == generator.latent_shape

    # The noise paints what the figures are about.
    cond, x = generator.encode([PROMPT]), latents["first"][None]
    for t, s in zip([1.0, 0.75, 0.5, 0.25], [0.75, 0.5, 0.25, 0.0], strict=True):
        x = x + (s - t) * generator.predict(x, t, cond)
    again, original = generator.decode(x.detach())[0], np.asarray(Image.open(picture))
    assert found["psnr"] == pytest.approx(psnr(original, again), abs=0.5)
    shown = np.asarray(Image.open(out / "invert.png"))
    side = 256
    assert np.array_equal(shown[8 : 8 + side : 8, 8 : 8 + side : 8], original)
    assert shown.shape[1] == 2 * side + 3 * 8


def test_the_tuned_model_paints_from_the_same_noise(config_at, folder, picture, generator_folder):
    tuned = load_generator(generator_folder)
    lora.attach(tuned.transformer, tuned.lora_targets, 4, 8.0, seed=0)
    random = torch.Generator().manual_seed(0)
    for parameter in tuned.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    config = load(Config, config_at("with-tuned"), ["invert.method=bdia", "invert.steps=5"])
    artifact = Artifact(folder / "with-tuned" / "finetune")
    (state,) = [state for state in states(config, STAGES, folder / "with-tuned") if state.stage.name == "finetune"]
    artifact.begin(state.fingerprint)
    artifact.write_folder(config.finetune.kept_folder, lambda to: lora.save(tuned.transformer, to))
    artifact.finish({})
    found = invert(config, picture, PROMPT, folder / "out")
    # BDIA loses nothing but what the codec loses.
    assert found.psnr == pytest.approx(found.codec_psnr, abs=0.5)
    latents = load_file(folder / "out" / "latents.safetensors")
    pair = Inverted(latents["first"][None], latents["second"][None])
    again = load_generator(generator_folder, artifact.folder / config.finetune.kept_folder)
    cond = again.encode([PROMPT])
    with torch.no_grad():
        x = Inversion("bdia").paint(lambda x, t: again.predict(x, t, cond), pair, again.times(5, 1.0))
    original = np.asarray(Image.open(picture))
    assert found.tuned
    assert found.tuned_psnr == pytest.approx(psnr(original, again.decode(x)[0]), abs=0.1)
    assert abs(found.tuned_psnr - found.psnr) > 0.2
    assert Image.open(folder / "out" / "invert.png").width == 3 * 256 + 4 * 8

    # Of other settings, or damaged, it is not shown as the tuned model.
    other = load(Config, config_at("with-tuned"), ["invert.method=bdia", "invert.steps=5", "seed=1"])
    assert not invert(other, picture, PROMPT, folder / "other").tuned
    next((artifact.folder / config.finetune.kept_folder).iterdir()).write_bytes(b"torn")
    assert not invert(config, picture, PROMPT, folder / "torn").tuned


def test_base_and_tuned_are_one_after_another_on_the_device(config_at, folder, picture, monkeypatch, tmp_path_factory):
    told = {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 32, "max_tokens": 12}
    config = load(Config, config_at("one-at-a-time", generator=told), ["invert.method=ddim", "invert.steps=2"])
    base = config.generator.build("cpu")
    lora.attach(base.transformer, base.lora_targets, 2, 4.0, seed=0)
    lora.save(base.transformer, folder / "adapter", base.lora_prefix)
    monkeypatch.setattr(verb, "_learned", lambda config: folder / "adapter")
    moved, to = [], DiffusersGenerator.to

    def watched(generator, device):
        moved.append((id(generator.transformer), str(device)))
        return to(generator, device)

    monkeypatch.setattr(DiffusersGenerator, "to", watched)
    assert invert(config, picture, PROMPT, folder / "one-at-a-time").tuned_psnr is not None
    (first, _), (left, place), (second, _) = moved
    assert (left, place) == (first, "cpu")
    assert second != first


def test_an_inversion_that_does_not_fit_is_refused(config_at, picture, tmp_path_factory, monkeypatch):
    told = {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 32, "max_tokens": 12}
    config = load(Config, config_at("too-large", generator=told))
    monkeypatch.setattr(forecast, "device_memory", lambda processes=1: 2**16)
    with pytest.raises(UserError, match=r"memory: invert needs .* GiB a process at least, and there are 0\.00"):
        invert(config, picture, PROMPT)


def test_a_picture_of_another_size_is_fitted(config_at, folder, picture):
    wide = Image.open(picture).resize((64, 64), Image.Resampling.NEAREST)
    wide.crop((-16, 0, 80, 64)).save(folder / "wide.png")
    config = load(Config, config_at("fitted"), ["invert.steps=3"])
    same = invert(config, picture, PROMPT, folder / "same")
    fitted = invert(config, folder / "wide.png", PROMPT, folder / "fitted-out")
    assert fitted.codec_psnr == pytest.approx(same.codec_psnr, abs=3)


def test_what_is_no_picture_is_bad_input(config_at, folder):
    config = load(Config, config_at("bad"))
    (folder / "text.png").write_text("no picture")
    for path, reason in ((folder / "text.png", "no picture in PNG"), (folder / "none.png", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            invert(config, path, PROMPT)
    Image.new("RGB", (32, 32)).save(folder / "black.png")
    with pytest.raises(UserError, match=r"invert: steps: bdia takes two or more"):
        load(Config, config_at("bad"), ["invert.method=bdia", "invert.steps=1"])


def test_psnr_is_in_decibels_and_none_where_nothing_differs():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) is None
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + np.uint8(8)) == pytest.approx(20 * np.log10(255 / 8))


def test_a_large_picture_is_shown_as_it_is():
    image = np.zeros((300, 400, 3), np.uint8)
    assert sheet([(image, ["one"]), (image, ["two", "lines"])]).size[0] == 2 * 400 + 3 * 8

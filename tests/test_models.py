"""The native generator: its codec, its folder, its adapters, and parts that do not fit together."""

import copy

import numpy as np
import pytest
import torch

from models import lora
from models.codec import Codec, codec_loss, to_images, to_pixels
from models.dit import DiT
from models.generator import NativeGenerator, sample
from models.loading import load_generator
from models.pretrain import FLOW_MATCHING, new_generator


@pytest.fixture(scope="module")
def generator():
    found = new_generator(["a", "red", "ring"], size=32, width=32, depth=2, text_depth=1, max_tokens=6, seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in found.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    found.transformer.eval().requires_grad_(False)
    found.text_encoder.eval().requires_grad_(False)
    return found


def test_pictures_and_pixels_invert():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_images(to_pixels(images)), images)


def test_codec_learns_to_invert_itself_with_bounded_latents():
    torch.manual_seed(0)
    codec = Codec(channels=4, width=16)
    pixels = torch.rand(8, 3, 16, 16).round() * 2 - 1
    assert codec.encode(pixels).shape == (8, 4, 4, 4)
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    first = codec_loss(codec, pixels, 0)[0].item()
    for step in range(60):
        optimizer.zero_grad()
        codec_loss(codec, pixels, step)[0].backward()
        optimizer.step()
    after, latents = codec_loss(codec, pixels, 0)
    assert after.item() < 0.7 * first
    assert 0 < (latents - codec.encode(pixels)).std() < 0.25
    assert codec.encode(100 * pixels).abs().max() <= codec.config.bound


def test_generator_saves_and_loads_to_the_bit(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    again = load_generator(tmp_path)
    for image, other in zip(
        sample(generator, ["a red ring"] * 2, [1, 2], steps=3),
        sample(again, ["a red ring"] * 2, [1, 2], steps=3),
        strict=True,
    ):
        assert np.array_equal(image, other)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no generator"):
        NativeGenerator.from_pretrained(tmp_path)


def test_pictures_do_not_depend_on_the_batch(generator):
    prompts, keys = ["a red ring", "a ring", "red"] * 3, list(range(9))
    whole = list(sample(generator, prompts, keys, steps=4, batch=9))
    parts = list(sample(generator, prompts, keys, steps=4, batch=2))
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not np.array_equal(whole[0], whole[3])


def test_a_new_adapter_changes_nothing_and_off_equals_base(generator, tmp_path):
    generator.save_pretrained(tmp_path / "base")
    tuned = load_generator(tmp_path / "base")
    x, t = torch.randn(3, 8, 8, 8), torch.rand(3)
    cond = tuned.encode(["a red ring"] * 3)
    base = tuned.predict(x, t, cond)
    lora.attach(tuned.transformer, tuned.lora_targets, 4, 8.0, seed=0)
    assert torch.allclose(tuned.predict(x, t, cond), base, atol=1e-6)
    trained = [p for p in tuned.transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.1 * torch.randn_like(parameter)
    moved = tuned.predict(x, t, cond)
    assert (moved - base).abs().max() > 1e-3
    with lora.reference(tuned.transformer):
        assert torch.equal(tuned.predict(x, t, cond), base)

    plain = load_generator(tmp_path / "base")
    lora.merge_into(plain.transformer, tuned.transformer)
    assert torch.allclose(plain.predict(x, t, cond), moved, atol=1e-4)

    lora.save(tuned.transformer, tmp_path / "lora")
    loaded = load_generator(tmp_path / "base", tmp_path / "lora")
    assert torch.allclose(loaded.predict(x, t, cond), moved, atol=1e-4)


def test_flow_matching_loss_of_a_new_generator_is_the_variance_of_the_velocity():
    new = new_generator(["a"], size=32, width=32, depth=1, text_depth=1, max_tokens=4, seed=0)
    latents = torch.randn(16, 8, 8, 8)
    expected = 1 + latents.square().mean().item()
    losses = [FLOW_MATCHING.loss(new, latents, ["a"] * 16, 0).item() for _ in range(2)]
    assert losses[0] == pytest.approx(expected, rel=0.03)
    assert losses[0] == losses[1]


def test_pictures_of_another_size_are_one_line(generator):
    with pytest.raises(ValueError, match=r"^images: 40 x 48 pixels, where the generator paints 32 x 32; scale them"):
        generator.latents(np.zeros((2, 48, 40, 3), dtype=np.uint8))


def test_parts_that_do_not_fit_together_are_one_line(generator, tmp_path):
    channels, width = generator.codec.channels, generator.text_encoder.config.hidden_size
    wrong = {
        "codec: its latents have": {"channels": channels + 4, "text_width": width},
        "transformer: it takes text of width 64": {"channels": channels, "text_width": 64},
        "transformer: it is told class labels": {"channels": channels, "classes": 5},
    }
    for said, settings in wrong.items():
        generator.save_pretrained(tmp_path)
        other = DiT(size=8, width=32, depth=1, heads=1, **settings)
        other.save_pretrained(tmp_path / "transformer")
        with pytest.raises(ValueError, match=f"^{said}"):
            load_generator(tmp_path)


def test_an_unknown_key_of_the_parametrisation_is_one_line(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    (tmp_path / "parametrisation.json").write_text('{"path": "vp", "schedule": "linear"}')
    with pytest.raises(ValueError, match=r"^parametrisation.json: unknown schedule; known here: path, prediction"):
        load_generator(tmp_path)


@pytest.mark.parametrize("targets", [("attn.nowhere",), ("qkv", "attn.nowhere")])
def test_a_target_that_is_no_layers_is_one_line(generator, targets):
    with pytest.raises(ValueError, match=r"^attn[.]nowhere ends the name of no layer of MMDiT"):
        lora.attach(copy.deepcopy(generator.transformer), targets, 2, 4.0, seed=0)

"""Paths, samplers, positions, the MM-DiT, the codec and the generator around them."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import apply_rotary_emb

from models import lora
from models.codec import Codec, codec_loss, to_images, to_pixels
from models.generator import NativeGenerator, sample
from models.keys import sample_key
from models.loading import load_generator
from models.mmdit import MMDiT
from models.paths import endpoints, noised, schedule, velocity
from models.positions import axial_rope, grid_ids, rotate
from models.pretrain import FLOW_MATCHING, new_generator
from models.samplers import SAMPLERS, cps, dance, gaussian_kl, keyed_noise, log_prob, ode, sde


@pytest.fixture
def flow():
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 8, 8, generator=random) for _ in range(2))
    return x0, noise


@pytest.fixture(scope="module")
def generator():
    found = new_generator(["a", "red", "ring"], size=32, width=32, depth=2, text_depth=1, max_tokens=6, seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in found.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    found.transformer.eval().requires_grad_(False)
    found.text_encoder.eval().requires_grad_(False)
    return found


def test_the_path_inverts(flow):
    x0, noise = flow
    t = torch.tensor([0.0, 0.3, 0.9, 1.0])
    found_x0, found_noise = endpoints(noised(x0, noise, t), velocity(x0, noise), t)
    assert torch.allclose(found_x0, x0, atol=1e-6)
    assert torch.allclose(found_noise, noise, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_the_one_of_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    assert np.allclose(schedule(7, shift), theirs.sigmas.numpy(), atol=1e-6)


def test_schedule_without_steps_is_an_error():
    with pytest.raises(ValueError, match="steps"):
        schedule(0)


def test_euler_steps_are_those_of_diffusers(flow):
    x, v = flow
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.6, 0.25])
    mine = x
    for i, t in enumerate(theirs.timesteps):
        s = float(theirs.sigmas[i + 1])
        mine = ode(mine, v, float(theirs.sigmas[i]), s).x
        x = theirs.step(v, t, x).prev_sample
    assert torch.allclose(mine, x, atol=1e-5)


@pytest.mark.parametrize("name", ["sde", "dance", "cps"])
@pytest.mark.parametrize("t", [1.0, 0.6])
def test_without_eta_every_sampler_is_the_ode(flow, name, t):
    x0, noise = flow
    x, v = noised(x0, noise, t), velocity(x0, noise)
    expected = ode(x, v, t, 0.4).x
    found = SAMPLERS[name](x, v, t, 0.4, 0.0, torch.randn_like(x))
    assert torch.allclose(found.x, expected, atol=1e-5)
    assert found.std == 0


def test_cps_keeps_the_marginal_exactly_and_the_sdes_in_the_limit():
    """With the true velocity of one datum, x_s must be (1 - s) x0 + s eps with eps standard normal."""
    x0 = torch.full((200_000, 1), 0.7)
    random = torch.Generator().manual_seed(0)
    noise, fresh = (torch.randn(x0.shape, generator=random) for _ in range(2))
    for sampler, t, s in ((cps, 0.9, 0.5), (sde, 0.52, 0.5), (dance, 0.52, 0.5)):
        x = noised(x0, noise, t)
        exact = (x - x0) / t
        x_s = sampler(x, exact, t, s, 0.7, fresh).x
        assert x_s.mean().item() == pytest.approx((1 - s) * 0.7, abs=5e-3)
        assert x_s.std().item() == pytest.approx(s, abs=8e-3)


def test_flow_grpo_step_against_its_formula_written_out(flow):
    x, v = flow
    t, s, eta = 0.8, 0.7, 0.5
    g2 = eta**2 * t / (1 - t)
    score = -(x - (1 - t) * (x - t * v)) / t**2
    drift = v - 0.5 * g2 * score
    found = sde(x, v, t, s, eta, None)
    assert torch.allclose(found.mean, x + drift * (s - t), atol=1e-5)
    assert found.std == pytest.approx(math.sqrt(g2 * (t - s)))


@pytest.mark.parametrize("t", [1.0, 0.8])
def test_dance_step_against_its_formula_written_out(flow, t):
    x, v = flow
    s, eta = 0.7, 0.5
    score = -(x - (1 - t) * (x - t * v)) / t**2
    found = dance(x, v, t, s, eta, None)
    assert torch.allclose(found.mean, x + (v - 0.5 * eta**2 * score) * (s - t), atol=1e-5)
    assert found.std == pytest.approx(eta * math.sqrt(t - s))


def test_log_prob_is_the_gaussian_of_torch_averaged(flow):
    x, mean = flow
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(log_prob(x, mean, 0.3), expected, atol=1e-5)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(x, 0.3), normal(mean, 0.3)).flatten(1).mean(1)
    assert torch.allclose(gaussian_kl(x, mean, 0.3), kl, rtol=1e-5)


def test_noise_belongs_to_its_key():
    together = keyed_noise([1, 2, 3], (2, 4))
    assert torch.equal(together[1], keyed_noise([2], (2, 4))[0])
    assert sample_key(0, "a", 1) != sample_key(0, "a1")


def test_rotation_is_that_of_diffusers_and_keeps_relative_positions():
    ids = grid_ids(3, 5)
    angles = axial_rope(ids, 16)
    x = torch.randn(2, 4, 15, 16, generator=torch.Generator().manual_seed(0))
    full = torch.cat([angles, angles], -1)
    theirs = apply_rotary_emb(x, (full.cos(), full.sin()), use_real_unbind_dim=-2)
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()), theirs, atol=1e-5)
    moved = axial_rope(ids + torch.tensor([4.0, 7.0]), 16)
    q, k = x[:1], x[1:]
    near = rotate(q, angles.cos(), angles.sin()) @ rotate(k, angles.cos(), angles.sin()).transpose(-1, -2)
    far = rotate(q, moved.cos(), moved.sin()) @ rotate(k, moved.cos(), moved.sin()).transpose(-1, -2)
    assert torch.allclose(near, far, atol=1e-4)
    with pytest.raises(ValueError, match="head_dim"):
        axial_rope(ids, 6)


def test_a_new_mmdit_predicts_zero_and_patches_invert():
    model = MMDiT(width=32, depth=1, heads=1, text_width=32)
    x = torch.randn(2, 8, 8, 8)
    assert model(x, torch.rand(2), torch.randn(2, 6, 32)).abs().max() == 0
    model.patch_in = torch.nn.Identity()
    model.patch_out = torch.nn.Identity()
    model.norm_out = torch.nn.Identity()
    model.blocks = torch.nn.ModuleList()
    assert torch.equal(model(x, torch.rand(2), torch.randn(2, 6, 32)), x)


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

"""Codecs of a native generator: what each turns pictures to and back, and that a folder tells which one it holds."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from models import geometry, metering
from models.codec import (
    Codec,
    Identity,
    empty_codec,
    load_codec,
    new_vae,
    same_codec,
    to_pixels,
    vae_loss,
)
from models.generator import sample
from models.loading import load_generator
from models.pretrain import new_generator

WEIGHTS = "diffusion_pytorch_model.safetensors"
CELLS = {"meaning": 4, "identity": 1, "kl": 2, "dc": 4}
SIZES = {"size": 32, "width": 32, "depth": 1, "text_depth": 1, "max_tokens": 4, "seed": 0}


def _kl() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=5,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.3,
    )


def _dc() -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each codec, written by the class that it names."""
    home = tmp_path_factory.mktemp("codecs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"meaning": Codec(width=16), "identity": Identity(), "kl": _kl(), "dc": _dc()}
    for name, codec in made.items():
        codec.save_pretrained(home / name)
    return {name: home / name for name in made}


@pytest.fixture(scope="module")
def pixels():
    return 2 * torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("name", CELLS)
def test_a_codec_is_what_its_folder_names_and_cuts_pictures_into_its_cells(folders, pixels, name, tmp_path):
    codec = load_codec(folders[name])
    assert codec.cell == CELLS[name]
    latents = codec.encode(pixels)
    assert latents.shape == (3, codec.channels, 16 // codec.cell, 24 // codec.cell)
    assert codec.decode(latents).shape == pixels.shape
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    empty = empty_codec(folders[name])
    assert (empty.cell, empty.channels) == (codec.cell, codec.channels)
    assert all(parameter.is_meta for parameter in empty.parameters())
    codec.save_pretrained(tmp_path)
    named = [json.loads((folder / "config.json").read_text())["_class_name"] for folder in (tmp_path, folders[name])]
    assert named[0] == named[1]
    assert same_codec(codec, load_codec(tmp_path))


@pytest.mark.parametrize("name", CELLS)
def test_pictures_and_latents_pass_a_gradient(folders, pixels, name):
    codec = load_codec(folders[name])
    x = pixels.clone().requires_grad_()
    codec.decode(codec.encode(x)).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_identity_gives_every_picture_back(tmp_path):
    generator = new_generator(["a", "ring"], **SIZES, codec=Identity())
    generator.save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "codec").iterdir()] == ["config.json"]
    again = load_generator(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(again.latents(images), to_pixels(images))
    assert np.array_equal(again.decode(again.latents(images)), images)


@torch.no_grad()
def test_latents_of_a_kl_autoencoder_are_its_mean_shifted_and_scaled(folders, pixels):
    codec, theirs = load_codec(folders["kl"]), diffusers.AutoencoderKL.from_pretrained(folders["kl"])
    latents = codec.encode(pixels)
    expected = (theirs.encode(pixels).latent_dist.mean - 0.3) * 1.5
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents), theirs.decode(latents / 1.5 + 0.3).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_latents_of_a_deep_compression_autoencoder_are_scaled(folders, pixels):
    codec, theirs = load_codec(folders["dc"]), diffusers.AutoencoderDC.from_pretrained(folders["dc"])
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents, 0.4 * theirs.encode(pixels).latent, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents), theirs.decode(latents / 0.4).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kl", "dc"])
def test_a_picture_does_not_depend_on_its_batch(folders, pixels, name):
    codec = load_codec(folders[name])
    latents = codec.encode(pixels)
    assert torch.equal(codec.decode(latents)[1:2], codec.decode(latents[1:2]))


@torch.no_grad()
def test_normalised_latents_have_variance_one_and_decode_as_before(pixels):
    codec = new_vae(3, (8, 8), seed=0)
    before = codec.decode(codec.encode(pixels))
    codec.normalise(pixels)
    latents = codec.encode(pixels)
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(codec.decode(latents), before, rtol=0, atol=1e-5)


def test_the_vae_loss_adds_the_divergence_from_the_normal_and_falls(pixels):
    codec = new_vae(2, (8, 16), seed=0)
    posterior = codec.autoencoder.encode(pixels).latent_dist
    divergence = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).mean()
    losses = [vae_loss(codec, pixels, noise_key=0, kl=kl) for kl in (0.0, 1.0)]
    torch.testing.assert_close(losses[1] - losses[0], divergence)
    assert not torch.equal(losses[0], vae_loss(codec, pixels, noise_key=1, kl=0.0))
    optimizer = torch.optim.Adam(codec.parameters(), 1e-2)
    for step in range(20):
        optimizer.zero_grad()
        vae_loss(codec, pixels, step, 1e-3).backward()
        optimizer.step()
    assert vae_loss(codec, pixels, 0, 0.0) < 0.8 * losses[0]


@pytest.mark.parametrize("name", CELLS)
def test_a_generator_on_any_codec_is_saved_loaded_and_paints_pictures_of_its_size(folders, name, tmp_path):
    made = new_generator(["a", "ring"], **SIZES, codec=load_codec(folders[name]))
    made.save_pretrained(tmp_path)
    generator = load_generator(tmp_path)
    assert generator.transformer.config.patch * generator.codec.cell == 8
    assert generator.pixel_shape == (32, 32)
    assert generator.at((16, 48)).pixel_shape == (16, 48)
    with pytest.raises(ValueError, match="resolution: 36 is no multiple of 8"):
        generator.at(36)
    for size, shape in ((generator, (32, 32, 3)), (generator.at((16, 24)), (16, 24, 3))):
        image, other = (next(iter(sample(each, ["a ring"], [0], steps=2))) for each in (size, size))
        assert image.shape == shape
        assert np.array_equal(image, other)
    assert same_codec(load_codec(tmp_path), generator.codec)  # found in the generator's folder
    named = geometry.geometry(str(tmp_path)).codec.build()
    assert geometry.cell(named) == generator.codec.cell
    latent = geometry.latent(named, 2, 16, 24, torch.float32)
    assert latent.shape == (2, *generator.at((16, 24)).latent_shape)
    assert metering.painted(named, {"z": latent}, lambda z: named.decode(z)).bytes >= 0


def test_the_weights_of_a_new_generator_do_not_depend_on_whose_codec_it_is(folders):
    new, given = (new_generator(["a"], **SIZES, codec=codec) for codec in (None, load_codec(folders["meaning"])))
    for mine, its in ((new.transformer, given.transformer), (new.text_encoder, given.text_encoder)):
        assert all(torch.equal(*both) for both in zip(mine.parameters(), its.parameters(), strict=True))


def test_the_codec_of_a_pipeline_is_found(folders, tmp_path):
    shutil.copytree(folders["kl"], tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert same_codec(load_codec(tmp_path), load_codec(folders["kl"]))


def test_codecs_differ_by_kind_settings_and_weights(folders):
    codec = load_codec(folders["kl"])
    scaled, moved = load_codec(folders["kl"]), load_codec(folders["kl"])
    assert same_codec(codec, scaled)
    scaled.autoencoder.register_to_config(scaling_factor=1.6)
    assert not same_codec(codec, scaled)
    next(moved.parameters()).data += 0.1
    assert not same_codec(codec, moved)
    assert not same_codec(codec, load_codec(folders["dc"]))
    assert not same_codec(Identity(), codec)


def _without_config(folder):
    (folder / "config.json").unlink()


def _of_another_class(folder):
    _configured(folder, _class_name="AutoencoderTiny")


def _without_weights(folder):
    (folder / WEIGHTS).unlink()


def _lacking(folder):
    weights = load_file(folder / WEIGHTS)
    weights.pop("decoder.conv_in.bias")
    save_file(weights, folder / WEIGHTS)


def _with_more(folder):
    save_file({**load_file(folder / WEIGHTS), "more": torch.zeros(1)}, folder / WEIGHTS)


def _of_another_shape(folder):
    _configured(folder, latent_channels=7)


def _configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_without_config, FileNotFoundError, "holds no codec"),
        (_of_another_class, ValueError, "^codec: .* is AutoencoderTiny; known here: Codec, Identity, AutoencoderKL"),
        (_without_weights, FileNotFoundError, "holds no weights"),
        (_lacking, ValueError, r"^codec: .* is no AutoencoderKL of its settings; it lacks decoder\.conv_in\.bias"),
        (_with_more, ValueError, "^codec: .* is no AutoencoderKL of its settings; it also has more"),
        (_of_another_shape, ValueError, r"^codec: .*: decoder\.conv_in\.weight is of another shape than"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_or_missing_codec_is_named_in_one_line(folders, tmp_path, spoil, error, message):
    shutil.copytree(folders["kl"], tmp_path / "kl")
    spoil(tmp_path / "kl")
    with pytest.raises(error, match=message) as raised:
        load_codec(tmp_path / "kl")
    assert "\n" not in str(raised.value)


def test_a_codec_of_another_generator_is_refused(folders, tmp_path):
    new_generator(["a"], **SIZES, codec=load_codec(folders["kl"])).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "codec")
    shutil.copytree(folders["dc"], tmp_path / "codec")
    with pytest.raises(ValueError, match=r"^codec: its latents have 4 channels, and the transformer takes 5"):
        load_generator(tmp_path)


def test_widths_and_cells_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="widths: 12 is no multiple of 8"):
        new_vae(4, (8, 12), 0)
    with pytest.raises(ValueError, match="codec: its cells are of 64 pixels a side, of which 32 are no multiple"):
        new_generator(["a"], **SIZES, codec=new_vae(2, (8,) * 7, 0))

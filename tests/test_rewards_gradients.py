"""The reward with a gradient: the values that pictures get, their derivative, and who has none."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil

from judges.shapes.grammar import vocabulary
from models.codec import new_vae, to_images, to_pixels
from models.loading import load_generator
from models.pretrain import new_generator
from models.text import word_tokenizer
from rewards.backbones import LatentReward, QFormerReward
from rewards.backbones.processor import RewardProcessor
from rewards.gradients import Gradient
from rewards.mixture import Mixture, Term, mixture_of
from rewards.reward import ModelReward
from rewards.rules import RuleReward

WORLD = ["a red ring", "a blue cross", "a ring"]


@pytest.fixture(scope="module")
def generator(generator_folder):
    return load_generator(generator_folder)


@pytest.fixture(scope="module")
def rewards(generator_folder, judge_folder):
    return {
        "latent": ModelReward(LatentReward.from_checkpoint(generator_folder), temperature=0.5),
        "qformer": ModelReward(QFormerReward.from_checkpoint(judge_folder / "itm"), temperature=2.0),
    }


@pytest.fixture
def latents(generator):
    return torch.randn(3, *generator.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_decoded_latents_are_rated_as_their_pictures_are(generator, rewards, latents):
    found = Gradient(mixture_of(rewards["qformer"]), generator)(latents, WORLD)
    rated = rewards["qformer"](list(generator.decode(latents)), WORLD).values
    assert np.ptp(rated) > 0.05
    np.testing.assert_allclose(found, rated, atol=0.01)


@torch.no_grad()
def test_a_latent_reward_of_the_same_codec_decodes_nothing_and_of_another_does(generator_folder, rewards, latents):
    generator, reward = load_generator(generator_folder), rewards["latent"]
    direct = reward.model.score_latents(latents, 0.0, generator.encode(WORLD)).mean / 0.5
    torch.testing.assert_close(Gradient(mixture_of(reward), generator)(latents, WORLD), direct)
    generator.codec.decoder[0].bias.data += 0.1
    decoded = Gradient(mixture_of(reward), generator)(latents, WORLD)
    rated = reward(list(generator.decode(latents)), WORLD).values
    np.testing.assert_allclose(decoded, rated, atol=0.02)
    assert (decoded - direct).abs().max() > 0.05


@torch.no_grad()
def test_latents_of_another_scale_are_decoded(tmp_path, latents):
    sizes = {"size": 32, "width": 32, "depth": 1, "text_depth": 1, "max_tokens": 12, "seed": 0}
    new_generator(vocabulary(), **sizes, codec=new_vae(8, (8, 8, 8), 0)).save_pretrained(tmp_path)
    generator, reward = load_generator(tmp_path), ModelReward(LatentReward.from_checkpoint(tmp_path), temperature=0.1)
    direct = Gradient(mixture_of(reward), generator)(latents, WORLD)
    torch.testing.assert_close(direct, reward.model.score_latents(latents, 0.0, generator.encode(WORLD)).mean / 0.1)
    generator.codec.autoencoder.register_to_config(scaling_factor=2.0)
    decoded = Gradient(mixture_of(reward), generator)(latents, WORLD)
    pixels = generator.codec.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, reward.value(reward.model.look(pixels), WORLD))
    assert (decoded - direct).abs().max() > 1e-3


def test_pictures_of_another_size_are_refused(generator, rewards):
    with pytest.raises(ValueError, match=r"reward: .*image: 48 x 32 pixels, the reward model reads 32 x 32"):
        Gradient(mixture_of(rewards["latent"]), generator.at((32, 48)))


@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_its_terms(generator, rewards, latents):
    terms = (Term("one", rewards["latent"], 0.5), Term("other", rewards["qformer"], -3.0))
    one, other = (Gradient(mixture_of(term.reward), generator)(latents, WORLD) for term in terms)
    torch.testing.assert_close(Gradient(Mixture(terms), generator)(latents, WORLD), 0.5 * one - 3 * other)


@pytest.mark.parametrize("name", ["latent", "qformer"])
def test_the_gradient_is_that_of_finite_differences(generator, rewards, latents, name):
    reward = Gradient(mixture_of(rewards[name]), generator)
    x = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, WORLD).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward(latents + step * direction, WORLD).sum() for step in (0.01, -0.01))
    assert float(ahead - behind) / 0.02 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_a_reward_without_a_gradient_is_named(generator, rewards):
    mixture = Mixture((Term("model", rewards["qformer"]), Term("rule edges", RuleReward("edges"))))
    with pytest.raises(ValueError, match="reward: rule edges has no gradient"):
        Gradient(mixture, generator)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}},
        {"size": {"height": 24, "width": 40}, "do_center_crop": False, "resample": 2},
    ],
    ids=["smaller", "larger", "stretched"],
)
def test_values_are_resized_cropped_and_normalised_as_pictures_are(settings):
    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 10, generator=random), (32, 40), mode="bicubic")
    images = to_images(2 * smooth - 1)
    processor = RewardProcessor(word_tokenizer(["a"]), CLIPImageProcessorPil(**settings))
    expected = processor.image_processor(list(images), return_tensors="pt").pixel_values
    found = processor.read(to_pixels(images))
    # CLIP's standard deviations are about a quarter of the range: 0.03 is less than 2 of 256 levels.
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"resample": 0}, "no gradient through its resampling"), ({"do_resize": False}, "fills pictures up to 224 x 224")],
)
def test_an_image_processor_that_does_more_is_refused(settings, message):
    processor = RewardProcessor(word_tokenizer(["a"]), CLIPImageProcessorPil(**settings))
    with pytest.raises(ValueError, match=message):
        processor.read(torch.zeros(1, 3, 32, 32))

"""Every native network is tuned as the shipped one is: on trajectories, with a critic, and on the forward process."""

import pytest
import torch
from accelerate import Accelerator

from judges.shapes.grammar import vocabulary
from models.loading import load_generator
from models.pretrain import new_generator
from pipeline.prompts import ShapesPrompts, draw_key
from pipeline.rl import algorithm_of
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.nft import NFTConfig
from pipeline.rl.ppo import PPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from rewards.backbones.latent import LatentReward
from rewards.reward import Rewards

NETWORKS = {
    "hybrid": ("MMDiT", {"single": 1, "positions": "string", "kv_heads": 1}),
    "linear": ("MMDiT", {"attention": "linear", "positions": "msrope"}),
    "cross-attention": ("DiT", {"conditioning": "cross-attention", "positions": "quaternion"}),
    "adaln": ("DiT", {"conditioning": "adaln", "positions": "learned"}),
    "fused": ("MMDiT", {"fused": True, "positions": "mixed"}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def folder(request, tmp_path_factory):
    """A generator that was never trained, yet paints more than grey."""
    name, choices = NETWORKS[request.param]
    sizes = {"size": 32, "width": 64, "depth": 2, "text_depth": 1, "max_tokens": 12}
    generator = new_generator(vocabulary(), **sizes, seed=0, network=name, choices=choices)
    random = torch.Generator().manual_seed(1)
    for module in (generator.transformer, generator.codec):
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    place = tmp_path_factory.mktemp(request.param)
    generator.save_pretrained(place)
    return place


def brightness(images, prompts):
    return Rewards.of([image.mean() for image in images])


@pytest.mark.parametrize("algorithm", [GRPOConfig(last_start=1), PPOConfig(window=2, last_start=1), NFTConfig()])
def test_an_iteration_moves_the_adapter_and_starts_on_policy(folder, algorithm, tmp_path):
    process_state()
    generator = load_generator(folder)
    settings = TrainerSettings(groups=2, group_size=3, steps=3, learning_rate=1e-3, gradient_checkpointing=True)
    trainer = Trainer(generator, brightness, algorithm_of(algorithm), settings, 0, Accelerator())
    before = [parameter.clone() for parameter in trainer.trained]
    done = trainer.iterate(ShapesPrompts(type="shapes").draw(draw_key(0, 0), 2))
    assert done.reward_std > 0
    assert done.ratio_error is None or done.ratio_error < 1e-4
    assert any(not torch.equal(*both) for both in zip(before, trainer.trained, strict=True))
    trainer.policy.save(tmp_path)
    x = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(2))
    cond = generator.encode(["a red ring", "a blue cross"])
    tuned = load_generator(folder, tmp_path)
    with torch.no_grad():
        assert torch.allclose(tuned.predict(x, 0.5, cond), generator.predict(x, 0.5, cond), atol=1e-4)


def test_a_reward_can_be_read_from_it(folder, tmp_path):
    reward = LatentReward.from_checkpoint(folder)
    stem = reward.parts().stem
    assert reward.transformer.patch_in in stem
    assert reward.transformer.patch_out not in stem
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *reward.generator.latent_shape, generator=random).requires_grad_()
    cond = reward.generator.encode(["a red ring", "a blue cross"])
    scores = reward.score_latents(latents, 0.3, cond).mean
    scores.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert scores[0] != scores[1]

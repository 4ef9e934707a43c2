"""Trains a few iterations of several geometries on as many processes as it is launched on; `python FILE GENERATOR OUT`.

The main process writes to OUT, as JSON, what each geometry's iterations told and the advantages of all pictures.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from models.loading import load_generator
from pipeline.prompts import ShapesPrompts, draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.ddpo import DDPOConfig
from pipeline.rl.dpo import DPOConfig
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.nft import NFTConfig
from pipeline.rl.ppo import PPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from rewards.reward import Rewards

GEOMETRIES: dict[str, tuple[AlgorithmConfig, dict]] = {
    "one group": (GRPOConfig(last_start=1, window=2), {"groups": 1, "group_size": 5}),
    "three groups": (GRPOConfig(last_start=2), {"groups": 3, "group_size": 4, "updates": 2}),
    "four groups": (GRPOConfig(last_start=2), {"groups": 4, "group_size": 3, "updates": 2, "batch": 5}),
    "forward": (NFTConfig(), {"groups": 3, "group_size": 4}),
    "branches": (GRPOConfig(last_start=1, window=2, fans=(2, 2)), {"groups": 3, "group_size": 4}),
    "pairs": (DPOConfig(), {"groups": 3, "group_size": 4}),
    "critic": (PPOConfig(window=2, last_start=1), {"groups": 3, "group_size": 4, "updates": 2}),
    "baselines": (DDPOConfig(least=4), {"groups": 1, "group_size": 5}),
    "whole": (GRPOConfig(last_start=2), {"groups": 3, "group_size": 4, "lora": None, "learning_rate": 1e-4}),
}


def brightness(images, prompts):
    return Rewards.of([image.mean() for image in images])


def trained(folder: str, algorithm: AlgorithmConfig, settings: dict) -> dict[str, list]:
    process_state()
    trainer = Trainer(
        load_generator(folder),
        brightness,
        algorithm_of(algorithm),
        TrainerSettings(**{"steps": 4, **settings}),
        0,
        Accelerator(),
    )
    advantages = []

    def seen(*asked):
        found = type(trainer.algorithm).advantages(trainer.algorithm, *asked)
        advantages.append(found.values.tolist())
        return found

    trainer.algorithm.advantages = seen
    told = []
    for iteration in range(3):
        prompts = ShapesPrompts(type="shapes").draw(draw_key(0, iteration), trainer.settings.groups)
        told.append(trainer.iterate(prompts))
    return {
        "advantages": advantages,
        **{name: [getattr(done, name) for done in told] for name in ("reward_mean", "loss", "kl", "grad_norm")},
        "pictures": [len(done.images) for done in told],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: trained(sys.argv[1], *each) for name, each in GEOMETRIES.items()}
    if process_state().is_main_process:
        Path(sys.argv[2]).write_text(json.dumps(found))

"""Trains on two processes with the frozen weights whole and sharded; `python FILE GENERATOR CONFIG COARSE OUT`.

COARSE is a config with bfloat16 weights. The main process writes to OUT, as JSON, what came of it.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file
from torch import Tensor

from models import adapters, lora
from models.adapters.options import Options
from models.generator import Generator
from models.loading import load_generator
from pipeline.config import Config
from pipeline.doctoring.check import Check
from pipeline.doctoring.learning import same_on_all_processes
from pipeline.doctoring.policy import adapter_off
from pipeline.doctoring.subject import Subject, examined
from pipeline.prompts import ShapesPrompts, draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.looking import painted, wanted
from pipeline.rl.nft import NFTConfig
from pipeline.rl.ppo import PPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import Context, process_state
from pipeline.settings import UserError, load
from pipeline.sharding import shard
from pipeline.stages.finetune import FINETUNE
from pipeline.store import Artifact
from pipeline.verbs.doctor import diagnosed
from rewards.reward import Rewards
from tests.tiny_pipelines import FAMILIES

SHAPES = ShapesPrompts(type="shapes")
RUNS: dict[str, tuple[AlgorithmConfig, dict[str, Any]]] = {
    "kl": (GRPOConfig(last_start=1, kl=0.1), {"batch": 3, "updates": 2}),
    "forward": (NFTConfig(), {"overlap": 2}),
    "critic": (PPOConfig(window=2, last_start=0), {"groups": 2}),
    "uneven": (GRPOConfig(window=2, last_start=0, kl=0.1), {"batch": 2}),
    "redrawn": (GRPOConfig(last_start=1), {"batch": 2, "redraws": 1}),
    "enlarged": (GRPOConfig(last_start=1), {"batch": 2, "enlarge": 1}),
    "low": (GRPOConfig(last_start=1, kl=0.1), {"dtype": "bfloat16", "gradient_checkpointing": True, "groups": 2}),
}
FAMILIES_TRIED = ("flux", "z_image")
"""Whose blocks return views, and which is asked by lists."""
DOCTOR = (same_on_all_processes, adapter_off)


def brightness(images, prompts):
    return Rewards.of([image.mean() for image in images])


def unsigned(images, prompts):
    """On the second process no group has a signal but that of the last prompt."""
    values = [image.mean() for image in images]
    if process_state().process_index:
        values = [value if one == prompts[-1] else 0.0 for value, one in zip(values, prompts, strict=True)]
    return Rewards.of(values)


def trainer_of(folder: str, algorithm: AlgorithmConfig, reward: Callable = brightness, **settings: Any) -> Trainer:
    told = TrainerSettings(
        **{"groups": 4, "group_size": 2, "steps": 3, "learning_rate": 1e-4, "twin": False, **settings}
    )
    return Trainer(load_generator(folder), reward, algorithm_of(algorithm), told, 0, Accelerator(), measured=True)


def others(attempt, count, but):
    return [one for one in SHAPES.draw(draw_key(1, attempt), count + len(but)) if one.id not in but][:count]


def trained(folder: str, name: str, sharded: bool) -> tuple[Trainer, list[list[float]], list[list[int]]]:
    """With what its iterations told, and in how many pieces this process learned from each set of examples."""
    algorithm, settings = RUNS[name]
    reward = unsigned if name in ("uneven", "redrawn") else brightness
    trainer = trainer_of(folder, algorithm, reward, **settings, shard=sharded)
    told, pieces = [], []

    def most(counts):
        pieces.append(list(counts))
        return Trainer.most(trainer, counts)

    trainer.most = most
    for iteration in range(2):
        done = trainer.iterate(SHAPES.draw(draw_key(0, iteration), trainer.settings.groups), others)
        told.append([done.loss, done.kl, done.grad_norm, float(done.groups), float(done.groups_dropped)])
    return trainer, told, pieces


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference on any process."""
    away = [float((a - b).detach().abs().max()) for a, b in zip(some, others, strict=True)]
    return max(gather_object(away))


def run(folder: str, name: str) -> dict[str, Any]:
    (whole, told, _), (sharded, again, pieces) = (trained(folder, name, one) for one in (False, True))
    away = apart(sharded.trained, whole.trained)
    return {"apart": away, "told": told, "again": again, "pieces": gather_object([pieces])}


def local(trainer: Trainer) -> int:
    """Of the frozen weights, how many numbers this process holds."""
    frozen = [weight for weight in trainer.tuned.parameters() if not weight.requires_grad]
    return sum(getattr(weight, "to_local", lambda weight=weight: weight)().numel() for weight in frozen)


def resumed(folder: str, out: Path) -> dict[str, Any]:
    """What is saved half-way, by one process alone, goes on to the bit; and the adapter that is kept is a plain one."""
    algorithm, settings = RUNS["kl"]
    prompts = [SHAPES.draw(draw_key(0, iteration), 4) for iteration in range(2)]
    first, second = (trainer_of(folder, algorithm, **settings, shard=True) for _ in range(2))
    first.iterate(prompts[0])
    if first.accelerator.is_main_process:
        first.save(out / "state")
        first.policy.save(out / "lora")
    first.accelerator.wait_for_everyone()
    second.load(out / "state")
    x = torch.ones(2, *first.generator.latent_shape)
    asked = x, 0.5, first.generator.encode(["a red ring", "a blue cross"])
    with torch.no_grad():
        painted = [first.generator.predict(*asked), load_generator(folder, out / "lora").predict(*asked)]
    for trainer in (first, second):
        trainer.iterate(prompts[1])
    held = [local(first), local(trainer_of(folder, algorithm, **settings))]
    return {"apart": apart(first.trained, second.trained), "kept": apart(*([one] for one in painted)), "held": held}


def looked(folder: str) -> dict[str, Any]:
    """A check of other numbers of pictures on every process."""
    found = []
    for sharded in (False, True):
        trainer = trainer_of(folder, RUNS["kl"][0], batch=2, shard=sharded)
        trainer.iterate(SHAPES.draw(draw_key(0, 0), 4))
        every = wanted(SHAPES, 0, 3, 2, SHAPES.draw(0, 60))
        images, kl = painted(trainer, [one for one in every if one.number % 2 == process_state().process_index], 0, 2)
        found.append([torch.from_numpy(images).float(), torch.tensor(kl)])
    return {"apart": apart(*found), "pictures": gather_object([len(found[0][0])])}


def predicted(family: str) -> float:
    """Velocities, their gradients through two calls, and features, of a network of diffusers."""
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        pipe = FAMILIES[family].build()
        kind = getattr(adapters, adapters.FAMILIES[type(pipe).__name__])
        generator: Generator = kind(pipe, Options(resolution=32, **FAMILIES[family].options))
        network: PeftAdapterMixin = generator.transformer
        lora.attach(network, generator.lora_targets, rank=4, alpha=8, seed=0)
        network.enable_gradient_checkpointing()
        if sharded:
            shard(network, process_state().device)
        cond = generator.encode(["a red ring", "a blue cross"])
        noise = torch.Generator().manual_seed(process_state().process_index)
        x = torch.randn(2, *generator.latent_shape, generator=noise)
        first = generator.predict(x, 0.7, cond)
        generator.predict(x - 0.3 * first, 0.4, cond).square().sum().backward()
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        with torch.no_grad(), lora.reference(network):
            features = generator.features(x, 0.5, cond)
        found.append([first.detach(), features, *gradients])
    return apart(found[1], found[0])


def staged(config: Any, folder: Path) -> list[bool]:
    """The stage itself, with its watch: whether it left what it should."""
    artifact = Artifact(folder / "finetune")
    context = Context(config, artifact, {})
    if context.accelerator.is_main_process:
        artifact.begin("sharded")
    context.accelerator.wait_for_everyone()
    FINETUNE.run(context)
    context.accelerator.wait_for_everyone()
    kept = load_file(artifact.folder / "lora" / lora.WEIGHTS)
    return [artifact.has("checks-00000.parquet"), any(value.any() for name, value in kept.items() if "lora_B" in name)]


def subject_of(config: Any, folder: Path) -> Subject:
    return examined(config, Context(config, Artifact(folder / "none"), {}), lambda line: None)


def found_by(checks: Iterable[Check]) -> dict[str, bool | None]:
    return {check.name: check.ok for check in checks}


def refused(folder: str) -> str:
    try:
        trainer_of(folder, RUNS["kl"][0], groups=3, group_size=3, shard=True)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, path, coarse, out = sys.argv[1:]
    process, config = process_state(), load(Config, path)
    subject, rounded = (subject_of(load(Config, each), Path(each).parent) for each in (path, coarse))
    found: dict[str, Any] = {name: run(folder, name) for name in RUNS}
    found |= {
        "resumed": resumed(folder, Path(out).parent),
        "looked": looked(folder),
        "predicted": {family: predicted(family) for family in FAMILIES_TRIED},
        "staged": staged(config, Path(path).parent),
        "healthy": found_by(check(subject) for check in DOCTOR),
        "coarse": found_by(diagnosed(rounded)),
        "refused": refused(folder),
    }
    if process.is_main_process:
        Path(out).write_text(json.dumps(found))

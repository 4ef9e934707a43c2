"""Training pairs a second of `rewards.train` against the obvious loop, and the memory of a head as large as PickScore.

    OMP_NUM_THREADS=1 python -m benchmarks.rewards [--prompts 30] [--epochs 2] [--repeats 2] [--workers 0] [--cpu-time]
    python -m benchmarks.rewards --memory [--device cuda]

The obvious loop decodes and preprocesses its pictures, tokenises its prompts and runs all towers at every step, in one
process. Both train the same parameters on the same pairs in the same order, evaluate the same held-out pairs after
each epoch, and must end with the same held-out NLL to 1e-3 nats. They take turns, `repeats` times after a warm-up on
few prompts, and the fastest of each counts. `grouped` is the setting of that name, for both. Where the machine is busy
with other things, `--cpu-time` counts the seconds that processors spent on it, those of its workers included.

Memory is what stands (weights, gradients, Adam's moments) and what autograd holds of a batch, counted on tensors
without contents; with a GPU its allocator's peak over two steps stands beside it. Pickscore's head is a CLIP ViT-H/14.
"""

import argparse
import io
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BlipImageProcessorPil, CLIPConfig, CLIPModel

from judges.shapes.grammar import change_one, sample_prompt
from judges.shapes.render import render, scene_of
from models.text import word_tokenizer
from pipeline.progress import quiet_libraries
from pipeline.runner import process_state
from rewards.backbones import (
    ClipReward,
    Frozen,
    Full,
    ImageReward,
    QFormerReward,
    RewardModel,
    Trained,
    checkpointed,
    make_trainable,
)
from rewards.backbones.processor import RewardProcessor
from rewards.batches import Dtype
from rewards.losses import BradleyTerry, Scores
from rewards.preferences import Rule, Scored, pairs
from rewards.train import RewardTraining, step_count, train, training_order

CHECKPOINT = "judges/checkpoints/shapes/itm"
TOLERANCE = 1e-3
BACKBONES = {
    "qformer": lambda: QFormerReward.from_checkpoint(CHECKPOINT),
    "clip": lambda: ClipReward.fresh(CHECKPOINT, 0),
    "imagereward": lambda: ImageReward.fresh(CHECKPOINT, 0),
}


@dataclass(frozen=True)
class Material:
    """Pairs, and their pictures as PNG by prompt id and sample number."""

    pairs: Dataset
    encoded: dict[tuple[str, int], bytes]

    def picture(self, prompt_id: str, sample: int) -> np.ndarray:
        with Image.open(io.BytesIO(self.encoded[prompt_id, sample])) as image:
            return np.asarray(image.convert("RGB"))


def material(prompts: int, siblings: int = 6) -> Material:
    """Renderings of the embedded world, of which every second shows its prompt with one thing changed."""
    rng = random.Random(0)
    scored, encoded = [], {}
    for number in range(prompts):
        prompt = sample_prompt(rng)
        for sample in range(siblings):
            shown = render([scene_of(change_one(prompt, rng) if sample % 2 else prompt, rng)])[0]
            with io.BytesIO() as file:
                Image.fromarray(shown).save(file, "PNG")
                encoded[f"{number:05d}", sample] = file.getvalue()
            margin = rng.gauss(2 - 4 * (sample % 2), 1)
            scored.append(Scored(f"{number:05d}", prompt.text, "", sample, margin, True))
    found = pairs(scored, Rule(min_gap=0), "planted", "1", heldout=0.15, near=0.7)
    return Material(Dataset.from_list([vars(pair) for pair in found]), encoded)


def obvious(model: RewardModel, given: Material, config: RewardTraining) -> float:
    """The held-out NLL after training with everything done anew at every step."""
    make_trainable(model, config.trained, 0)
    rows = {split: [r for r, s in enumerate(given.pairs["split"]) if s == split] for split in ("train", "heldout")}
    steps = step_count(len(rows["train"]), config)
    order = training_order(
        rows["train"], steps * config.batch, config.seed, list(given.pairs["prompt_id"]) if config.grouped else None
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def scored(batch: list[int]) -> tuple[Scores, Scores, Tensor, Tensor]:
        chosen = given.pairs[batch]
        sides = []
        for side in ("sample_a", "sample_b"):
            shown = [given.picture(*key) for key in zip(chosen["prompt_id"], chosen[side], strict=True)]
            sides.append(model.score(model.look(model.pixels(shown)), model.tokens(chosen["prompt"])))
        return *sides, torch.tensor(chosen["label"]), torch.tensor(chosen["weight"])

    nll = 0.0
    for step in range(steps):
        first, second, label, weight = scored(order[step * config.batch : (step + 1) * config.batch])
        optimizer.zero_grad()
        (config.loss(first, second, label, weight) * weight.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // config.epochs) == 0:
            with torch.no_grad():
                parts = [scored(list(part)) for part in _batched(rows["heldout"], config.batch)]
                found = torch.cat([config.loss.nll(a, b, label) for a, b, label, _ in parts])
                nll = float(np.average(found, weights=torch.cat([weight for *_, weight in parts])))
    return nll


def _batched(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Comparison:
    """Training pairs a second, evaluations included, and the held-out NLL in nats that both end with."""

    ours: float
    obvious: float
    nll: float


def cpu_seconds() -> float:
    """Spent so far by this process and by those of its children that have ended."""
    return sum(os.times()[:4])


def compare(kind: str, given: Material, config: RewardTraining, repeats: int, clock: Callable[[], float]) -> Comparison:
    """`rewards.train` against the obvious loop."""
    done = config.epochs * sum(split == "train" for split in given.pairs["split"])
    seconds: dict[str, list[float]] = {"ours": [], "obvious": []}
    nll: dict[str, float] = {}
    for _ in range(repeats):
        for way, times in seconds.items():
            model = BACKBONES[kind]()
            started = clock()
            if way == "ours":
                with tempfile.TemporaryDirectory() as folder:
                    nll[way] = train(model, given.pairs, given.picture, config, Path(folder))["curve"][-1][
                        "heldout_nll"
                    ]
            else:
                nll[way] = obvious(model, given, config)
            times.append(clock() - started)
        assert abs(nll["ours"] - nll["obvious"]) < TOLERANCE, nll
    return Comparison(*(done / min(times) for times in seconds.values()), nll["ours"])


@dataclass(frozen=True)
class Fit:
    """How a large head is trained."""

    name: str
    trained: Trained
    dtype: Dtype
    checkpointing: bool


FITS = (
    Fit("vision tower frozen, its features held", Frozen(), "float32", False),
    Fit("everything", Full(), "float32", False),
    Fit("everything, bfloat16", Full(), "bfloat16", False),
    Fit("everything, bfloat16, gradient checkpointing", Full(), "bfloat16", True),
)


def pickscore() -> ClipReward:
    """A CLIP ViT-H/14 of random weights, with a small vocabulary that its embedding is not."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu"},
        text_config={**text, "projection_dim": 1024, "hidden_act": "gelu"},
        projection_dim=1024,
    )
    tokenizer = word_tokenizer(["a", "red", "ring"])
    tokenizer.model_max_length = 77
    return ClipReward(
        CLIPModel(config), RewardProcessor(tokenizer, BlipImageProcessorPil(size={"height": 224, "width": 224}))
    )


def step(model: ClipReward, fit: Fit, batch: int, device: str) -> Tensor:
    """The loss of one batch of pairs."""
    tokens = {
        name: torch.ones(2 * batch, 77, dtype=torch.long, device=device) for name in ("input_ids", "attention_mask")
    }
    seen = (
        torch.zeros(2 * batch, 1280, device=device)
        if model.caches
        else torch.zeros(2 * batch, 3, 224, 224, device=device)
    )
    with torch.autocast(device, torch.bfloat16, enabled=fit.dtype == "bfloat16"):
        first, second = model(seen, tokens).mean.float().chunk(2)
    return BradleyTerry()(Scores(first), Scores(second), torch.full_like(first, 0.7))


def computed(fit: Fit, batch: int) -> tuple[float, float]:
    """GiB that stand, and that autograd holds of a batch, weights left out."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[id(tensor.untyped_storage())] = tensor
        return tensor

    with FakeTensorMode():
        model = pickscore()
        make_trainable(model, fit.trained, 0)
        weights = {id(parameter.untyped_storage()) for parameter in model.parameters()}
        with checkpointed(model, fit.checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            step(model, fit, batch, "cpu")
        every = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        kept = sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in weights)
        if fit.checkpointing and fit.dtype == "bfloat16":
            kept += 2 * trained  # autocast's copies of the weights, which else are among what autograd holds
    return 4 * (every + 3 * trained) / 2**30, kept / 2**30


def measured(fit: Fit, batch: int) -> float:
    """GiB that the GPU's allocator held at most during two steps, with clipping and AdamW."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = pickscore()
    make_trainable(model, fit.trained, 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)
    with checkpointed(model, fit.checkpointing):
        for _ in range(2):
            step(model, fit, batch, "cuda").backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step, of which the memory is counted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args()
    quiet_libraries()
    process_state()
    if asked.memory:
        table = Table("trained", "stands, GiB", "batch, GiB", "sum, GiB", "measured, GiB")
        for fit in FITS:
            stands, held = computed(fit, asked.batch)
            peak = f"{measured(fit, asked.batch):.1f}" if asked.device == "cuda" else "-"
            table.add_row(fit.name, f"{stands:.1f}", f"{held:.1f}", f"{stands + held:.1f}", peak)
    else:
        given, clock = material(asked.prompts), cpu_seconds if asked.cpu_time else time.perf_counter
        config = RewardTraining(
            epochs=asked.epochs, learning_rate=3e-4, weight_decay=0.0, warmup=0.0, workers=asked.workers
        )
        table = Table("backbone", "order", "pairs/s", "obvious loop", "ratio", "held-out NLL")
        for kind in BACKBONES:
            compare(kind, material(12), replace(config, epochs=1), 1, clock)
            for grouped in (False, True):
                found = compare(kind, given, replace(config, grouped=grouped), asked.repeats, clock)
                speeds = (f"{found.ours:.0f}", f"{found.obvious:.0f}", f"{found.ours / found.obvious:.1f}")
                table.add_row(kind, "grouped" if grouped else "shuffled", *speeds, f"{found.nll:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()

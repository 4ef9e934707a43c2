"""What each backbone and loss of a reward model is worth on the same preferences.

    python -m benchmarks.backbones configs/shapes.yaml [--only latent+thurstone …] [--tune 240] [key.sub=value …]

Every pair trains on the run's own preferences; `--tune` moves the generator by the reward of one pair of each backbone,
for about so many seconds. What was measured stands in `table.json` in the run's folder and is not measured again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import tuning
from pipeline.assessing.assess import VERB
from pipeline.config import Config
from pipeline.loop import run_dir, run_loop
from pipeline.progress import quiet_libraries
from pipeline.settings import load
from pipeline.store import Artifact, atomic_write_text, read_rows
from pipeline.verbs.evaluate_reward import evaluate_reward
from rewards.evaluation import REWARD
from rewards.reward import ModelReward

ITM = "judges/checkpoints/shapes/itm"
VQA = "judges/checkpoints/shapes/vqa"
GENERATOR = "models/checkpoints/shapes"
BACKBONES: dict[str, dict[str, Any]] = {
    "qformer": {"type": "qformer", "checkpoint": ITM},
    "vqa": {
        "type": "vqa",
        "checkpoint": VQA,
        "template": "Question: does this figure show {}? Answer:",
        "length": 20,
    },
    "imagereward": {"type": "imagereward", "checkpoint": ITM, "fresh": True},
    "clip": {"type": "clip", "checkpoint": ITM, "fresh": True},
    "latent": {"type": "latent", "checkpoint": GENERATOR},
    "latent, clean": {"type": "latent", "checkpoint": GENERATOR, "most_noise": 0.0},
}
RATED, ROUNDS = 1024, 4


@dataclass(frozen=True)
class Entry:
    """A row of the table: `reward.*` as given; `tuned` says whether the generator is moved by it."""

    backbone: str
    loss: str
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False

    @property
    def name(self) -> str:
        return f"{self.backbone}+{self.loss}"

    def overrides(self) -> list[str]:
        kind = self.loss.split(",")[0]
        reward = {"backbone": BACKBONES[self.backbone], "loss": {"type": kind, **self.settings}, **self.more}
        return [f"reward.{key}={json.dumps(value)}" for key, value in reward.items()]


HIGHER = {"learning_rate": 1e-3}
TABLE = (
    Entry("qformer", "bradley_terry", tuned=True),
    Entry("vqa", "bradley_terry", tuned=True),
    Entry("imagereward", "bradley_terry", tuned=True),
    Entry("clip", "bradley_terry", more=HIGHER, tuned=True),
    Entry("latent", "thurstone", more=HIGHER, tuned=True),
    Entry("qformer", "bradley_terry, smoothed", {"smoothing": 0.1}),
    Entry("qformer", "rao_kupper", {"reading": "half"}),
    Entry("qformer", "davidson", {"reading": "half"}),
    Entry("qformer", "pointwise", {"temperature": 2.0}),
    Entry("qformer", "bradley_terry, 4 heads", more={"ensemble": {"heads": 4}}),
    Entry("latent", "bradley_terry", more=HIGHER),
    Entry("latent", "thurstone, fidelity", {"objective": "fidelity"}, HIGHER),
    Entry("latent, clean", "bradley_terry", more=HIGHER),
)


def measured(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The reward model of a run on the run's held-out pairs, by the verb evaluate-reward."""
    config = load(Config, path, [*overrides, "evaluate_reward.prompts=0"])
    evaluate_reward(config)
    folder = run_dir(config) / VERB
    told = json.loads((folder / "report.json").read_text())
    lines = {line["task"]: line["accuracy"] for line in told["evaluation"]["lines"] if line["scorer"] == REWARD}
    fit = next(task["calibration"]["before"] for task in told["evaluation"]["tasks"] if task["name"] == "judge")
    return {
        **{task: [lines[task]["value"], *lines[task]["interval"]] for task in ("judge", "gold")},
        **{name: fit[name]["value"] for name in ("nll", "ece")},
        "parameters": told["provenance"]["training"]["trained_parameters"],
    }


def speeds(path: str, overrides: Sequence[str]) -> dict[str, float]:
    """Images a second of each backbone, and of the latent one on latents that need no encoding.

    They take turns, and the best of all counts: a machine's speed changes, and rates of different times tell nothing of
    one another.
    """
    base = load(Config, path, overrides)
    rows = read_rows(Artifact(run_dir(base) / "sample")).select(range(RATED))
    images, prompts = [np.asarray(image) for image in rows["image"]], list(rows["prompt"])
    rated: dict[str, Callable[[], object]] = {}
    for name, backbone in BACKBONES.items():
        config = load(Config, path, [*overrides, f"reward.backbone={json.dumps(backbone)}"])
        reward = ModelReward(config.reward.untrained(0))
        rated[name] = partial(reward.scores, images, prompts)
    rated["latent, of latents"] = _of_latents(reward, images, prompts)
    rounds = [{name: _seconds(rate) for name, rate in rated.items()} for _ in range(ROUNDS)]
    return {name: RATED / min(spent[name] for spent in rounds) for name in rated}


@torch.inference_mode()
def _of_latents(reward: ModelReward, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Callable[[], object]:
    latents, cond = reward.model.look(reward.model.pixels(images)), reward.model.generator.encode(prompts)

    @torch.inference_mode()
    def rate() -> None:
        for rows in torch.arange(RATED).split(reward.batch):
            reward.model.score_latents(latents[rows], 0.25, cond[rows])

    return rate


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def tuned(path: str, overrides: Sequence[str], target: float) -> dict[str, Any]:
    """Gold of the generator, base and tuned for about `target` seconds by the reward that stands in the run."""
    pace = tuning.pace_of(path, overrides)
    config = tuning.tuned(path, overrides, pace.iterations(target), "evaluate")
    found = json.loads(Artifact(run_dir(config) / "evaluate").path("metrics.json").read_text())["generator"]
    gold = {name: found[name]["gold"] for name in ("base", "tuned")}
    iterations = config.finetune.iterations
    return {"iterations": iterations, "seconds": pace.seconds(iterations), **gold}


def show(rows: dict[str, Any], rates: dict[str, float]) -> Table:
    """The table as people read it."""
    names = ("pair", "as the judge", "as gold", "NLL", "ECE", "train CPU s", "images/s", "gold after tuning")
    table = Table(*names)
    for name, row in rows.items():
        judge, right = (f"{100 * v[0]:.1f} ({100 * v[1]:.0f}–{100 * v[2]:.0f})" for v in (row["judge"], row["gold"]))
        end = row.get("tuned")
        shown = f"{100 * end['base']:.1f} → {100 * end['tuned']:.1f}" if end else ""
        fit, cost = (row["nll"], row["ece"]), (row["cpu_seconds"], rates[name.split("+")[0]])
        table.add_row(name, judge, right, *(f"{v:.3f}" for v in fit), *(f"{v:.0f}" for v in cost), shown)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--tune", type=float, default=0.0)
    asked = parser.parse_args()
    quiet_libraries()
    common = ["name=backbones", *asked.overrides]
    base = load(Config, asked.config, common)
    run_loop(base, only=["sample", "judge", "prefer"])
    path = run_dir(base) / "table.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for entry in TABLE:
        row, wanted = rows.get(entry.name, {}), not asked.only or entry.name in asked.only
        tunes = bool(asked.tune) and entry.tuned and "tuned" not in row
        if not wanted or (row and not tunes):
            continue
        overrides = [*common, *entry.overrides()]
        config = load(Config, asked.config, overrides)
        if not row:
            shutil.rmtree(run_dir(config) / "reward", ignore_errors=True)
        started = time.process_time()
        run_loop(config, only=["reward"])
        if not row:
            row = {"cpu_seconds": time.process_time() - started, **measured(asked.config, overrides)}
        if tunes:
            row["tuned"] = tuned(asked.config, overrides, asked.tune)
        rows[entry.name] = row
        atomic_write_text(path, json.dumps(rows, indent=2) + "\n")
    rates = speeds(asked.config, common)
    console = Console(width=160)
    console.print(show(rows, rates))
    console.print(f"latent rewards of latents: {rates['latent, of latents']:,.0f} images/s")


if __name__ == "__main__":
    main()

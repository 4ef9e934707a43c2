"""What each backbone and loss of a reward model is worth on the same preferences.

    python -m benchmarks.backbones configs/shapes.yaml [--only latent+thurstone …] [--tune 240] [key.sub=value …]

Every pair trains on the run's own preferences; `--tune` moves the generator by the reward of one pair of each backbone,
for about so many seconds. What was measured stands in `table.json` in the run's folder and is not measured again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.generator import load_generator
from models.samplers import keyed_noise
from pipeline.assessing.assess import VERB
from pipeline.config import Config
from pipeline.loop import run_dir, run_loop
from pipeline.progress import quiet_libraries
from pipeline.settings import load
from pipeline.store import Artifact, atomic_write_text
from pipeline.verbs.evaluate_reward import evaluate_reward
from rewards import load_reward
from rewards.evaluation import REWARD

ITM = "judges/checkpoints/shapes/itm"
GENERATOR = "models/checkpoints/shapes"
BACKBONES: dict[str, dict[str, Any]] = {
    "qformer": {"type": "qformer", "checkpoint": ITM},
    "imagereward": {"type": "imagereward", "checkpoint": ITM, "fresh": True},
    "clip": {"type": "clip", "checkpoint": ITM, "fresh": True},
    "latent": {"type": "latent", "checkpoint": GENERATOR},
    "latent, clean": {"type": "latent", "checkpoint": GENERATOR, "most_noise": 0.0},
}
TIMING_ITERATIONS = 6
RATED = 1024


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
    cost = json.loads((folder / "cost.json").read_text())
    lines = {line["task"]: line["accuracy"] for line in told["evaluation"]["lines"] if line["scorer"] == REWARD}
    fit = next(task["calibration"]["before"] for task in told["evaluation"]["tasks"] if task["name"] == "judge")
    return {
        **{task: [lines[task]["value"], *lines[task]["interval"]] for task in ("judge", "gold")},
        **{name: fit[name]["value"] for name in ("nll", "ece")},
        "images_per_second": cost["images_per_second"],
        "parameters": told["provenance"]["training"]["trained_parameters"],
    }


def latents_per_second(config: Config) -> float:
    """How fast a latent reward is on latents that need no decoding."""
    reward = load_reward(run_dir(config) / "reward" / "model")
    generator = load_generator(config.generator.checkpoint)
    prompts = [row.text for row in config.prompts.held_out(0, RATED)]
    latents = keyed_noise(list(range(RATED)), generator.latent_shape)
    with torch.inference_mode():
        cond = generator.encode(prompts)
        spent = []
        for _ in range(2):
            started = time.perf_counter()
            for start in range(0, RATED, reward.batch):
                part = slice(start, start + reward.batch)
                reward.model.score_latents(latents[part], 0.25, cond[torch.arange(RATED)[part]])
            spent.append(time.perf_counter() - started)
    return RATED / spent[-1]


def tuned(path: str, overrides: Sequence[str], target: float) -> dict[str, Any]:
    """Gold of the generator, base and tuned for about `target` seconds by the reward that stands in the run."""

    def spent(iterations: int) -> float:
        config = load(Config, path, [*overrides, f"finetune.iterations={iterations}"])
        started = time.perf_counter()
        run_loop(config, only=["finetune"])
        return time.perf_counter() - started

    spent(1)  # compiles
    few, more = spent(2), spent(2 + TIMING_ITERATIONS)
    iterations = max(1, round((target - few) / ((more - few) / TIMING_ITERATIONS)))
    took = spent(iterations)
    config = load(Config, path, [*overrides, f"finetune.iterations={iterations}"])
    run_loop(config, only=["evaluate"])
    found = json.loads(Artifact(run_dir(config) / "evaluate").path("metrics.json").read_text())["generator"]
    return {"iterations": iterations, "seconds": took, **{name: found[name]["gold"] for name in ("base", "tuned")}}


def show(rows: dict[str, Any]) -> Table:
    """The table as people read it."""
    names = ("pair", "as the judge", "as gold", "NLL", "ECE", "train CPU s", "images/s", "gold after tuning")
    table = Table(*names)
    for name, row in rows.items():
        judge, right = (f"{100 * v[0]:.1f} ({100 * v[1]:.0f}–{100 * v[2]:.0f})" for v in (row["judge"], row["gold"]))
        end = row.get("tuned")
        shown = f"{end['base']} → {end['tuned']}" if end else ""
        cells = (
            f"{row['nll']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['images_per_second']:.0f}",
        )
        table.add_row(name, judge, right, *cells, shown)
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
            if entry.backbone.startswith("latent"):
                row["latents_per_second"] = latents_per_second(config)
        if tunes:
            row["tuned"] = tuned(asked.config, overrides, asked.tune)
        rows[entry.name] = row
        atomic_write_text(path, json.dumps(rows, indent=2) + "\n")
    Console(width=160).print(show(rows))


if __name__ == "__main__":
    main()

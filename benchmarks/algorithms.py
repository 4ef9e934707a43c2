"""Which algorithm moves the same generator furthest by the same reward in the same time.

    python -m benchmarks.algorithms CONFIG [--only nft awm …] [--seconds 240] [--seeds 0 1] [key.sub=value …]

All algorithms of one seed share pictures, verdicts, preferences and reward model. The pace of each is measured first,
one after another, and decides how many iterations it gets. Seconds are those of the stage `finetune` itself, without
the checks of the watch between the first and the last; the machine should be idle for all of it. What was measured
stands in `benchmarks/results/algorithms.jsonl` and is not measured again.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.results import Results, digest
from benchmarks.tuning import Pace, pace_of, staged, tuned
from pipeline.config import Config
from pipeline.loop import run_dir
from pipeline.settings import load
from pipeline.store import Artifact, read_rows
from rewards.hacking import distances

_THREE_STEPS = {"type": "grpo", "window": 3, "last_start": 2}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "algorithm": {"type": "grpo", "sampler": "sde", "window": None, "fans": [], "kl": 0.04},
        "twin": False,
        "compile": False,
    },
    "grpo": {"algorithm": _THREE_STEPS},
    "grpo, fast": {"algorithm": {"type": "grpo"}},
    "grpo, mix": {"algorithm": {**_THREE_STEPS, "slide_every": 25}},
    "grpo, branch": {"algorithm": {**_THREE_STEPS, "fans": [4, 2, 2]}},
    "grpo, guard": {"algorithm": {**_THREE_STEPS, "guard": True, "clip": 2e-6}},
    "dance": {"algorithm": {**_THREE_STEPS, "sampler": "dance", "eta": 0.3}},
    "ppo": {"algorithm": {"type": "ppo", "window": 2}},
    "ddpo": {"algorithm": {"type": "ddpo", "window": 2}},
    "nft": {"algorithm": {"type": "nft", "draws": 1}, "learning_rate": 1e-4},
    "awm": {"algorithm": {"type": "awm", "draws": 1}},
    "dpo, online": {"algorithm": {"type": "dpo"}, "learning_rate": 3e-4},
    "dpo, offline": {"algorithm": {"type": "dpo", "source": "preferences", "beta": 200}, "learning_rate": 3e-4},
    "d3po": {"algorithm": {"type": "d3po"}},
    "raft": {"algorithm": {"type": "raft", "best": 2}, "learning_rate": 3e-4},
    "supervised": {"algorithm": {"type": "raft", "source": "preferences"}, "learning_rate": 3e-4},
    "draft": {"algorithm": {"type": "draft"}},
    "refl": {"algorithm": {"type": "refl"}},
}
"""Settings of `finetune`; the rest is the config's."""

SHARED = ("sample", "judge", "prefer", "reward")
RISES = (0.1, 0.2, 0.3)
KEPT = 96
"""Pictures of each iteration on which gold is measured."""
START, SMOOTHED = 2 * KEPT, 5 * KEPT
"""Pictures whose mean is where gold began, and over which it is averaged from then on."""


def measured(path: str, overrides: list[str], iterations: int) -> dict[str, Any]:
    """What so many iterations of fine-tuning did, and how long they took."""
    config = tuned(path, overrides, iterations, "evaluate")
    pace = Pace.of(config)
    folder = run_dir(config)
    found = json.loads(Artifact(folder / "evaluate").path("metrics.json").read_text())["generator"]
    course = read_rows(Artifact(folder / "evaluate"), "curves.parquet")
    checks = read_rows(Artifact(folder / "finetune"), "checks-*.parquet")
    at = np.array(checks["iteration"])
    last = checks.select(np.flatnonzero(at == at.max()))
    return {
        "iterations": len(course),
        "seconds": pace.seconds(len(course)),
        "images": int(sum(course["images"])),
        "gold": [found[model]["gold"] for model in ("base", "tuned")],
        "reward": [found[model]["reward"] for model in ("base", "tuned")],
        "kl": last[0]["kl"],
        "diversity": float(np.mean(distances([np.asarray(image) for image in last["image"]], last["prompt_id"]))),
        "rises": [_reached(course["gold"], course["images"][0], rise, pace) for rise in RISES],
        "kept": json.loads(Artifact(folder / "finetune").path("signals.json").read_text())["kept"],
    }


def _reached(gold: list[float], images: int, rise: float, pace: Pace) -> float | None:
    """The second at which gold of the rollouts, of so many images each, is so far above where it began; None where it
    never is.

    Both are of the algorithm's own rollouts, so the noise that its sampler adds counts neither for it nor against it.
    """
    began, smoothed = (math.ceil(pictures / min(KEPT, images)) for pictures in (START, SMOOTHED))
    if len(gold) < smoothed:
        return None
    smooth = np.convolve(gold, np.full(smoothed, 1 / smoothed), mode="valid")
    there = np.flatnonzero(smooth >= np.mean(gold[:began]) + rise)
    return pace.seconds(int(there[0]) + smoothed) if len(there) else None


def show(budget: str, rows: dict[str, list[dict[str, Any]]]) -> Table:
    """A row an algorithm: means over its seeds, each tuned for about so long."""
    rises = ("to +10", "+20", "+30 points")
    table = Table(f"{budget} of", "seeds", "took", "gold", "reward", "KL", "diversity", "images", *rises, box=MARKDOWN)
    for name, found in rows.items():
        numbers = ("seconds", "gold", "reward", "kl", "images")
        mean = {key: np.mean([one[key] for one in found], axis=0) for key in numbers}
        spread = np.std([one["gold"][1] for one in found])
        reached = [
            f"{np.mean(times):.0f} s" if None not in times else "–"
            for times in zip(*(one["rises"] for one in found), strict=True)
        ]
        table.add_row(
            name,
            str(len(found)),
            f"{mean['seconds']:.0f} s",
            f"{100 * mean['gold'][0]:.1f} → {100 * mean['gold'][1]:.1f} ± {100 * spread:.1f} %",
            f"{mean['reward'][0]:.2f} → {mean['reward'][1]:.2f}",
            f"{mean['kl']:.2f}",
            f"{np.mean([one['diversity'] for one in found]):.3f}",
            f"{mean['images']:,.0f}",
            *reached,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    asked = parser.parse_args()
    results = Results("algorithms")

    def key(name: str, **more: Any) -> dict[str, Any]:
        """Of all settings of a row but its seed and iterations: another default of the config's may not touch it."""
        settings = load(Config, asked.config, [*asked.overrides, *_settings(name), "seed=0", "finetune.iterations=1"])
        told = {"overrides": asked.overrides, "algorithm": name, "settings": ALGORITHMS[name]}
        return {"config": digest(settings), **told, **more}

    paces = {}
    for name in asked.only:
        if not (found := results.find(**key(name))):
            found = asdict(pace_of(asked.config, _begun(asked.config, asked.overrides, 0, name)))
            results.add(found, **key(name))
        paces[name] = Pace(**found)
    for seed in asked.seeds:
        for name in asked.only:
            of_row = key(name, seconds=asked.seconds, seed=seed)
            if not results.find(**of_row):
                overrides = _begun(asked.config, asked.overrides, seed, name)
                results.add(measured(asked.config, overrides, paces[name].iterations(asked.seconds)), **of_row)
    rows = {
        name: [results.find(**key(name, seconds=asked.seconds, seed=seed)) for seed in asked.seeds]
        for name in asked.only
    }
    Console(width=180).print(show(f"{asked.seconds:g} s", rows))


def _begun(path: str, overrides: list[str], seed: int, name: str) -> list[str]:
    """Put what all algorithms of a seed begin with into a folder of nothing else; the overrides that name it."""
    common = (*overrides, f"seed={seed}")
    chosen = [*common, f"name=algorithms-{seed}-{name.replace(', ', '-')}", *_settings(name)]
    base, target = _base(path, (*common, f"name=algorithms-{seed}")), run_dir(load(Config, path, chosen))
    shutil.rmtree(target, ignore_errors=True)
    for stage in SHARED:
        shutil.copytree(base / stage, target / stage)
    return chosen


def _settings(name: str) -> list[str]:
    """The overrides that make an algorithm's row of a run."""
    settings = {"kept_images": KEPT, **ALGORITHMS[name]}
    return [f"finetune.{key}={json.dumps(value)}" for key, value in settings.items()]


@cache
def _base(path: str, overrides: tuple[str, ...]) -> Path:
    """Where what all algorithms of a seed begin with stands."""
    return run_dir(staged(path, overrides, *SHARED))


if __name__ == "__main__":
    main()

"""Watches fine-tuning for signs that its reward is hacked: warns, stops it, and goes back.

Every so many iterations the moving average of the adapter, which is what would be kept, paints the same prompts from
the same noise. Each process paints its share, and each decides from all of them. A check that is done is written down,
its JSON last, and a run that was cut off reads it instead of doing it again.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from accelerate.utils import gather_object
from PIL import Image

from judges.base import Judge, Unavailable
from pipeline.prompts import PromptRow
from pipeline.rl.checks import Check, Seen, checked, from_json, retained, to_json
from pipeline.rl.grids import grid
from pipeline.rl.looking import Sight, Wanted, painted, seen, wanted
from pipeline.rl.settings import WatchSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import Context
from pipeline.stages.sample import columns
from pipeline.store import atomic_write_text
from rewards.metrics.intervals import LEAST_PROMPTS

CHECKS = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        "kl": datasets.Value("float32"),
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "reward": datasets.Value("float32"),
        "judge": datasets.Value("float32"),
        "image": datasets.Image(),
    }
)

_KEPT = datasets.Features({**CHECKS, "held_out": datasets.Value("bool")})


class Watch:
    """Looks at the policy of `trainer` where it is `due`, and knows whether training is to stop.

    Args:
        judge: whom to ask for what the reward is not trained on; nobody where it is None.
        drawn: the prompts that training draws, in order.
    """

    def __init__(
        self,
        context: Context,
        settings: WatchSettings,
        trainer: Trainer,
        judge: Judge | None,
        drawn: Iterable[PromptRow],
    ):
        self.context, self.settings, self.trainer, self.judge = context, settings, trainer, judge
        config = context.config
        self.wanted = wanted(config.prompts, config.seed, settings.prompts, settings.images, drawn)
        self.checks = [from_json(json.loads(path.read_text())) for path in sorted(self._folder.glob("check-*.json"))]
        self.base = self._read_base() if self.checks else []
        self.base_seen = self._seen(self.base, 0.0) if self.base else None

    @property
    def stopped(self) -> bool:
        return bool(self.checks) and self.checks[-1].action == "stop"

    @property
    def due(self) -> bool:
        """Whether a check is to be done where the trainer stands, and was not yet."""
        done = self.trainer.done
        here = done % self.settings.every == 0 or done == self.trainer.settings.iterations
        return here and all(check.iteration != done for check in self.checks)

    def check(self) -> None:
        """Look, decide, write down and tell. Every process must call it, its trainer's checkpoint being of this moment.

        Raises:
            Interrupted: the judge cannot be reached; the same command goes on from here.
        """
        started = time.monotonic()
        sights, kl = self._look()
        found = self._seen(sights, kl)
        if self.base_seen is None:
            self.base, self.base_seen = sights, found
        settings, done = self.settings, self.trainer.done
        check = checked(done, found, self.base_seen, self.checks, settings.patience, settings.stop_on)
        self._tell(check)
        self.checks.append(check)
        if self.context.accelerator.is_main_process:
            self._write_down(check, sights)
        took = time.monotonic() - started
        self.context.event("check", iteration=done, action=check.action, alarms=check.alarms, seconds=took)

    def rate_again(self) -> None:
        """Rate the base model's pictures by the reward, which has changed, for the checks to come."""
        texts = [sight.wanted.prompt.text for sight in self.base]
        values = self.trainer.reward([sight.image for sight in self.base], texts).values
        self.base = [replace(sight, reward=value) for sight, value in zip(self.base, values.tolist(), strict=True)]
        self.base_seen = self._seen(self.base, 0.0)

    @property
    def kept(self) -> int:
        """The iteration whose adapter is kept, if training ends here."""
        back = self.checks[-1].roll_back_to if self.stopped else None
        return self.trainer.done if back is None else back

    def write(self) -> None:
        """Commit what the checks saw and said."""
        artifact = self.context.artifact
        parts = [pyarrow.parquet.read_table(path) for path in sorted(self._folder.glob("check-*.parquet"))]
        rows = pyarrow.concat_tables(parts)
        rows = datasets.Dataset(rows.filter(rows["held_out"])).remove_columns("held_out")
        artifact.write("checks-00000.parquet", rows.to_parquet)
        told = {"checks": [to_json(check) for check in self.checks], "stopped": self.stopped, "kept": self.kept}
        artifact.write_text("signals.json", json.dumps(told, indent=2, allow_nan=False) + "\n")

    def copy_kept(self, folder: Path) -> None:
        """Put the adapter to which a stopped run goes back into `folder`."""
        shutil.copytree(self._adapter(self.kept), folder, dirs_exist_ok=True)

    @property
    def _folder(self) -> Path:
        return self.context.artifact.resume

    def _adapter(self, iteration: int) -> Path:
        return self._folder / f"adapter-{iteration:05d}"

    def _seen(self, sights: Sequence[Sight], kl: float) -> Seen:
        return seen(sights, kl, self.judge is not None)

    def _look(self) -> tuple[list[Sight], float]:
        """The pictures of all processes in the order of `wanted`, and the KL in nats."""
        process = self.context.accelerator
        # Siblings stay together: a judge that compares compares them with one another.
        places = [
            place
            for place, one in enumerate(self.wanted)
            if one.number % process.num_processes == process.process_index
        ]
        mine = [self.wanted[place] for place in places]
        images, kl = painted(self.trainer, mine, self.context.config.seed, self.settings.images)
        judged = self._judged(mine, images)
        rewards = self.trainer.reward(list(images), [one.prompt.text for one in mine]).values
        sights = map(Sight, mine, images, rewards.tolist(), np.array(judged, dtype=np.float32).tolist())
        found = sorted(gather_object(list(zip(places, sights, strict=True))), key=itemgetter(0))
        return [sight for _, sight in found], float(np.mean(gather_object(kl)))

    def _judged(self, mine: Sequence[Wanted], images: np.ndarray) -> list[float]:
        """The judge's margins of pictures of held-out prompts, which come first; NaN elsewhere."""
        held = [one.prompt.text for one in mine if one.held_out] if self.judge else []
        margins: list[float] = []
        if held:
            try:
                verdicts = self.judge.score(list(images[: len(held)]), held)
                margins = [verdict.margin if verdict.valid else math.nan for verdict in verdicts]
            except Unavailable as error:
                self.context.ask_to_stop(f"judge: {error}")
        self.context.check_stop()
        return margins + [math.nan] * (len(mine) - len(margins))

    def _tell(self, check: Check) -> None:
        """One line where something is new."""
        last = self.checks[-1] if self.checks else None
        if last is None and (least := len({one.prompt.id for one in self.wanted if one.held_out})) < LEAST_PROMPTS:
            self.context.log(
                f"finetune.watch: only {least} prompts are held out, and thresholds take {LEAST_PROMPTS}: nothing will "
                "raise an alarm; add lines to prompts.eval"
            )
        if check.action == "stop":
            self.context.log(
                f"finetune: stopped at iteration {check.iteration}, the reward looks hacked: {_alarms(check)}, "
                f"{self.settings.patience} checks running; the adapter of iteration {check.roll_back_to} is kept"
            )
        elif set(check.alarms) - set(last.alarms if last else ()):
            self.context.log(
                f"finetune: iteration {check.iteration}: beyond what the base model shows: {_alarms(check)}"
            )

    def _write_down(self, check: Check, sights: Sequence[Sight]) -> None:
        """The rows, a grid, the adapter, and last the JSON that says that they stand; then drop useless adapters."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{check.iteration:05d}"
        rows = [
            {
                "iteration": check.iteration,
                "kl": check.kl,
                **columns(sight.wanted.prompt),
                "sample": sight.wanted.sample,
                "reward": _known(sight.reward),
                "judge": _known(sight.judge),
                "image": Image.fromarray(sight.image),
                "held_out": sight.wanted.held_out,
            }
            for sight in sights
        ]
        datasets.Dataset.from_list(rows, features=_KEPT).to_parquet(self._folder / f"check-{name}.parquet")
        if check.iteration:
            self.context.artifact.write(f"grids/{name}.png", grid(self.base, sights).save)
        if self.settings.stop_on:
            folder = self._adapter(check.iteration)
            shutil.rmtree(folder, ignore_errors=True)
            with self.trainer.averaged():
                self.trainer.policy.save(folder)
        atomic_write_text(self._folder / f"check-{name}.json", json.dumps(to_json(check), allow_nan=False))
        needed = {self._adapter(iteration) for iteration in retained(self.checks, self.settings.patience)}
        for folder in self._folder.glob("adapter-*"):
            if folder not in needed:
                shutil.rmtree(folder)

    def _read_base(self) -> list[Sight]:
        rows = datasets.Dataset(pyarrow.parquet.read_table(self._folder / "check-00000.parquet"))
        return [
            Sight(one, np.asarray(row["image"]), *(math.nan if row[n] is None else row[n] for n in ("reward", "judge")))
            for one, row in zip(self.wanted, rows, strict=True)
        ]


def _alarms(check: Check) -> str:
    told = [signal for signal in check.signals if signal.name in check.alarms]
    return ", ".join(f"{one.name} {one.value:.3g} (above {one.threshold:.3g})" for one in told)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Keeps the reward model abreast of the policy, as in iterated RLHF (2204.05862, section 4.5).

A reward model is right where its pictures came from, and the policy leaves that place. Every so many iterations the
policy as it is then paints training prompts from keyed noise, the run's judge scores the pictures, the rule of `prefer`
makes pairs of them, and the reward model, from its current weights, is trained on these and on a share of the run's old
pairs. Its held-out numbers, on fresh and on old pairs, before and after, are kept.

Each refresh is three artifacts in the space of `finetune`, made by the functions of the stages they are named after, so
that it is cut off and goes on as these do. Nothing but the policy's weights decides it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import datasets
import numpy as np

from judges.base import Judge
from models.generator import Generator
from models.keys import sample_key
from pipeline.mixing import ModelTerm
from pipeline.pictures import Pictures, pictures_of
from pipeline.prompts import draw_key
from pipeline.rl.settings import RefreshSettings
from pipeline.runner import Context
from pipeline.stages import prefer, reward, sample
from pipeline.stages.judge import judge_pictures
from pipeline.store import Artifact, fingerprint, read_rows
from rewards.backbones import RewardModel, load_model
from rewards.metrics import pairwise_accuracy
from rewards.reward import ModelReward

FOLDER, NUMBERS = "reward", "refreshes.json"
"""What is kept of the refreshes: the last model, and the numbers of all."""

_FIRST = 1_000_000
"""The number of a fresh picture among its siblings is at least this, so that no old one has it."""


class Refresh:
    """Refreshes the rewards `learned`, terms and what was built of them, to where a run stands.

    Args:
        iterations: of the whole run; after the last there is no refresh.
        judge: gives whom to ask, when first needed.
    """

    def __init__(
        self,
        context: Context,
        settings: RefreshSettings,
        generator: Generator,
        learned: Sequence[tuple[ModelTerm, ModelReward]],
        iterations: int,
        judge: Callable[[], Judge],
    ):
        self.context, self.settings, self.generator = context, settings, generator
        self.learned, self.iterations, self.judge = learned, iterations, judge
        self.loaded = 0

    def due(self, done: int) -> bool:
        """Whether another reward model belongs to the iteration after `done`."""
        return self._latest(done) != self.loaded

    def bring_up(self, done: int) -> None:
        """Make the reward model of this moment, the generator being that of `done` iterations, or load it.

        Raises:
            Interrupted: a signal was seen, or the judge cannot be reached; the same command goes on from here.
        """
        at = self._latest(done)
        if not self._complete(at):
            assert at == done, f"the policy of iteration {at} is gone"
            self._refresh(at)
        source = self._source(at)
        weights = load_model(source.folder / "model").state_dict()
        for term, rated in self.learned:
            # In place: what was compiled stays so.
            rated.model.load_state_dict(weights)
            rated.temperature = term.temperature_of(source) or term.temperature_of(self.context.inputs["reward"])
        self.loaded = at

    def write(self) -> None:
        """Commit the last model and the numbers of all refreshes; nothing where there was none."""
        artifact = self.context.artifact
        told = [json.loads(self._at(at, "reward").path("heldout.json").read_text()) for at in self._all(self.loaded)]
        source = self._source(self.loaded)
        if told:
            artifact.write_text(NUMBERS, json.dumps(told, indent=2) + "\n")
            model = source.folder / "model"
            artifact.write_folder(FOLDER, lambda folder: shutil.copytree(model, folder, dirs_exist_ok=True))

    def _latest(self, done: int) -> int:
        return min(done, self.iterations - 1) // self.settings.every * self.settings.every

    def _all(self, last: int) -> Iterable[int]:
        return range(self.settings.every, last + 1, self.settings.every)

    def _at(self, at: int, name: str) -> Artifact:
        return Artifact(self.context.artifact.resume / f"refresh-{at:05d}" / name)

    def _complete(self, at: int) -> bool:
        return self._at(at, "reward").complete(self._fingerprint(at))

    def _fingerprint(self, at: int) -> str:
        return fingerprint({"finetune": self.context.artifact.fingerprint, "refresh": at})

    def _source(self, at: int) -> Artifact:
        """The latest reward model up to iteration `at`: the run's own, until a refresh has made another."""
        made = [self._at(one, "reward") for one in self._all(at)]
        return next((found for found in reversed(made) if found.has("metrics.json")), self.context.inputs["reward"])

    def _refresh(self, at: int) -> None:
        self.context.log(f"finetune: iteration {at}: refreshing the reward model")
        painted = self._made(at, "sample", {}, lambda inner: self._paint(inner, at))
        judged = self._made(at, "judge", {"sample": painted}, lambda inner: judge_pictures(inner, self.judge()))
        self._made(at, "reward", {"sample": painted, "judge": judged}, lambda inner: self._learn(inner, at))

    def _made(self, at: int, name: str, inputs: Mapping[str, Artifact], run: Callable[[Context], None]) -> Artifact:
        """An artifact of the refresh, made by `run` if it does not stand yet."""
        artifact, process = self._at(at, name), self.context.accelerator
        if not artifact.complete(self._fingerprint(at)):
            if process.is_main_process:
                artifact.begin(self._fingerprint(at))
            process.wait_for_everyone()
            run(replace(self.context, artifact=artifact, inputs=inputs))
            process.wait_for_everyone()
            if process.is_main_process:
                artifact.finish({})
            process.wait_for_everyone()
        return artifact

    def _paint(self, inner: Context, at: int) -> None:
        config = inner.config
        prompts = config.prompts.draw(draw_key(config.seed, "refresh", at), self.settings.prompts)
        wanted = [(prompt, _FIRST + k, prompt.text) for prompt in prompts for k in range(self.settings.images)]
        sample.paint(inner, self.generator, wanted, "refresh", at)

    def _learn(self, inner: Context, at: int) -> None:
        inputs, main = self.context.inputs, inner.accelerator.is_main_process
        fresh = [asdict(pair) for pair in prefer.judge_prefers(inner)]
        told: dict[str, Any] = {"iteration": at, "fresh_pairs": len(fresh)}
        if {pair["split"] for pair in fresh} != {"train", "heldout"}:
            inner.log(f"finetune: {len(fresh)} fresh pairs do not fill both splits; the reward model stays as it is")
        else:
            old = replayed(read_rows(inputs["prefer"]).to_list(), fresh, self.settings.replay, inner.config.seed, at)
            shown = _Both(pictures_of(inputs), Pictures(read_rows(inner.inputs["sample"])))
            model = load_model(self._source(at - self.settings.every).folder / "model").to(inner.accelerator.device)
            before = _accuracies(model, fresh, old, shown)
            table = datasets.Dataset.from_list(fresh + old, features=prefer.FEATURES)
            reward.learn(inner, model, table, shown, self.settings.epochs)
            after = _accuracies(model, fresh, old, shown)
            told |= {"old_pairs": len(old), "heldout_accuracy": {"before": before, "after": after}}
        if main:
            inner.artifact.write_text("heldout.json", json.dumps(told, indent=2) + "\n")


def replayed(
    old: Sequence[dict[str, Any]], fresh: Sequence[dict[str, Any]], share: float, seed: int, at: int
) -> list[dict[str, Any]]:
    """As many of the `old` pairs as make them `share` of the pairs of either split, drawn without repetition."""
    found = []
    for split in ("train", "heldout"):
        rows = [pair for pair in old if pair["split"] == split]
        new = sum(pair["split"] == split for pair in fresh)
        rng = np.random.default_rng(sample_key(seed, "replay", at, split))
        chosen = rng.choice(len(rows), min(len(rows), round(new * share / (1 - share))), replace=False)
        found += [rows[row] for row in sorted(chosen)]
    return found


class _Both:
    """The pictures of old and of fresh pairs."""

    def __init__(self, old: Pictures, fresh: Pictures):
        self.old, self.fresh = old, fresh

    def __call__(self, prompt_id: str, sample: int) -> np.ndarray:
        return (self.fresh if sample >= _FIRST else self.old)(prompt_id, sample)


def _accuracies(
    model: RewardModel, fresh: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]], shown: _Both
) -> dict[str, float | None]:
    """Of held-out pairs; None where there are none."""
    rated = ModelReward(model)
    found: dict[str, float | None] = {}
    for name, rows in (("fresh", fresh), ("old", old)):
        pairs = [pair for pair in rows if pair["split"] == "heldout"]
        texts = [pair["prompt"] for pair in pairs]
        first, second = (
            rated([shown(pair["prompt_id"], pair[side]) for pair in pairs], texts).values
            for side in ("sample_a", "sample_b")
        )
        accuracy = pairwise_accuracy(first, second, [pair["label"] for pair in pairs])
        found[name] = accuracy if np.isfinite(accuracy) else None
    return found

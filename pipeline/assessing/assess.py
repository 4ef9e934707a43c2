"""Computes what the verb `evaluate-reward` tells of a reward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import rewards
from judges.base import Judge
from pipeline.assessing import material as sources
from pipeline.assessing import pressure, scoring, trials
from pipeline.assessing.assessment import Assessment, Measured, Provenance
from pipeline.assessing.material import Material
from pipeline.assessing.pressure import Pressure
from pipeline.assessing.settings import EvaluateRewardConfig
from pipeline.assessing.trials import Cost
from pipeline.judging import told
from pipeline.launch import Servers
from pipeline.loop import run_dir
from pipeline.progress import Progress
from pipeline.store import Artifact, fingerprint, hash_path
from rewards.evaluation import BASELINE, BEFORE, Evaluation, Pictures
from rewards.losses import PairLoss
from rewards.metrics.intervals import LEAST_PROMPTS
from rewards.reward import ModelReward

VERB = "evaluate-reward"
_COUNTED = 10
"""So far prompts are taken to count; those of the embedded world to 4."""


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        config: None where a table brings its own scores.
        inputs: the artifacts of the run that stand.
        model, loss: the run's; no model where the scores are those of a table.
    """

    config: Any
    settings: EvaluateRewardConfig
    material: Material
    inputs: Mapping[str, Artifact]
    model: ModelReward | None
    loss: PairLoss
    device: str
    progress: Progress

    @property
    def embedded(self) -> bool:
        return self.config is not None and self.config.prompts.type == "shapes"

    @contextmanager
    def judge(self) -> Iterator[Judge]:
        with Servers(run_dir(self.config), VERB, self.progress.say):
            yield self.config.judge.build(self.device)


def scored_pictures(job: Job) -> Pictures:
    """The pictures with all that the model, its rivals and the judge say of them.

    Raises:
        UserError: the model does not read pictures of this size.
        judges.base.Unavailable: the judge is asked, and nobody answers.
    """
    shown, rivals = job.material.pictures, _rivals(job)
    asked = job.config is not None and job.settings.judge and job.material.task == "people"
    judge, reward = (np.array([getattr(picture, name) for picture in shown]) for name in ("judge", "score"))
    sigma, read = np.full(len(shown), np.nan), tuple(picture.prompt for picture in shown)
    passes = (job.model is not None) + len(rivals) + asked
    scores = {}
    with job.progress.track(len(shown) * passes, "images", VERB) as advance:
        if job.model:
            own = scoring.scored(job.model, job.material, advance)
            reward, sigma, read = own.reward, own.sigma, own.read
        for name, build in rivals.items():
            scores[name] = scoring.scored(build(), job.material, advance).reward
        if asked:
            with job.judge() as by:
                judge = scoring.judged(by, job.material, advance)
    return Pictures(
        prompt_ids=np.array([picture.prompt_id for picture in shown]),
        prompts=np.array([picture.prompt for picture in shown]),
        skills=np.array([picture.skill for picture in shown]),
        models=np.array([picture.model for picture in shown]),
        read=np.array(read),
        reward=reward,
        sigma=sigma,
        judge=judge,
        gold=np.array([picture.gold for picture in shown]),
        rivals=scores,
    )


def assess(job: Job, pictures: Pictures, evaluation: Evaluation) -> tuple[Assessment, Cost | None]:
    """All that was found, and the cost of the model's scores where there is a model."""
    found = job.material
    effects, invariances, cost = (), (), None
    if job.model:
        drawn = trials.draw(found, pictures.read, job.settings.probed)
        most = sources.MOST if job.embedded else _COUNTED
        effects, invariances = trials.changes(job.model, drawn, most), trials.invariances(job.model, drawn)
        cost = trials.cost(job.model, drawn)
    known = sources.learned(job.inputs)
    choosing, tuning = _pressures(job)
    assessment = Assessment(
        name=job.config.name if job.config else found.source,
        measured=Measured(
            source=found.source,
            pairs=len(found.pairs),
            pictures=len(found.pictures),
            prompts=len(set(pictures.prompt_ids)),
            cut_off=found.cut_off,
            refused=found.refused,
        ),
        evaluation=evaluation,
        shortcuts=trials.looks(pictures.reward, pictures.gold, found),
        effects=effects,
        invariances=invariances,
        choosing=choosing,
        tuning=tuning,
        leakage=sources.leaked(known, found) if known else None,
        provenance=_provenance(job),
        notes=tuple(_notes(job, evaluation, choosing, tuning)),
    )
    return assessment, cost


def _rivals(job: Job) -> dict[str, Callable[[], ModelReward]]:
    """What makes each of the models that stand beside the run's; one at a time is in memory."""
    if job.model is None:
        return {}
    config, baseline = job.config, job.settings.baseline

    def before() -> ModelReward:
        return ModelReward(config.reward.untrained(config.seed).to(job.device))

    def public() -> ModelReward:
        with told("evaluate_reward.baseline"):
            return ModelReward(rewards.ClipReward.from_checkpoint(baseline).to(job.device))

    return {BEFORE: before, **({BASELINE: public} if baseline else {})}


def _pressures(job: Job) -> tuple[Pressure | None, Pressure | None]:
    """What optimising the run's reward does; a table says nothing of that."""
    if job.model is None or not job.material.own:
        return None, None
    if job.embedded:
        return _optimised(job, None)
    if not job.settings.judge:
        return None, None
    with job.judge() as judge:
        return _optimised(job, judge)


def _optimised(job: Job, judge: Judge | None) -> tuple[Pressure | None, Pressure | None]:
    settings, choosing, tuning = job.settings, None, None
    assert job.model
    if settings.prompts:
        with job.progress.track(settings.prompts * settings.images, "images", "best of n") as advance:
            size = (settings.prompts, settings.images)
            choosing = pressure.of_choosing(job.config, *size, job.model, judge, job.device, advance)
    if "finetune" in job.inputs:
        tuning = pressure.of_tuning(job.config, job.inputs["finetune"], judge)
    return choosing, tuning


def _provenance(job: Job) -> Provenance:
    manifest = job.inputs["reward"].manifest if job.model else None
    config = job.config
    return Provenance(
        weights=hash_path(job.inputs["reward"].folder / "model") if job.model else "",
        backbone=config.reward.backbone.model_dump(mode="json") if job.model else {},
        loss=asdict(job.loss),
        parameters=sum(p.numel() for p in job.model.model.parameters()) if job.model else 0,
        training=sources.training(job.inputs["reward"]) if job.model else {},
        judge=job.material.judge,
        template=job.material.template,
        settings=fingerprint(config.model_dump(mode="json", exclude={"out"})) if config else "",
        inputs={name: str(artifact.fingerprint) for name, artifact in job.inputs.items()},
        versions=manifest.versions if manifest else {},
    )


def _notes(job: Job, evaluation: Evaluation, choosing: Pressure | None, tuning: Pressure | None) -> Iterator[str]:
    """What is missing, and why."""
    found = job.material
    for task in evaluation.tasks:
        if task.prompts < LEAST_PROMPTS:
            yield (
                f"No interval on the pairs by {task.name}: {task.prompts} prompts, and it takes {LEAST_PROMPTS}; "
                "take their numbers as hints."
            )
    if found.cut_off:
        yield f"Only the first {len(found.pairs):,} pairs of {found.source} were read (evaluate_reward.pairs)."
    if job.model is None:
        yield "The scores are those of the table; without the model nothing could be tried on it."
    elif found.own:
        yield from _notes_on_pressure(job, choosing, tuning)
    if job.model and not job.settings.baseline:
        yield "No public model stands beside it; name one by evaluate_reward.baseline."
    if "prefer" not in job.inputs:
        yield "What it was trained on is not known here, so leakage could not be looked for."


def _notes_on_pressure(job: Job, choosing: Pressure | None, tuning: Pressure | None) -> Iterator[str]:
    if not job.embedded and not job.settings.judge:
        yield "Optimisation was not followed: there is no gold, and the judge was not asked (evaluate_reward.judge)."
        return
    if not job.embedded:
        yield "There is no gold: the judge, on which the reward was trained, stands for the truth under optimisation."
    if choosing is None:
        yield "The best of n was not tried (evaluate_reward.prompts is 0)."
    if tuning is None:
        yield "No run of fine-tuning stands, so over-optimisation by it could not be followed."
    for name, found in (("Best of n", choosing), ("Fine-tuning", tuning)):
        if found and found.note:
            yield f"{name}: {found.note}."

"""The verb `evaluate-reward`: whether a reward may be believed, for what, and where it is weakest.

    evaluate-reward/report.json    the numbers, field by field those of `pipeline.assessing.assessment.Assessment`
    evaluate-reward/card.md        the same in short, to go with the reward model
    evaluate-reward/index.html     all of it with the pictures, as one page that opens offline
    evaluate-reward/cost.json      images a second and memory on this machine; no part of the artifact

Equal settings, artifacts and tables give equal files, but for the last.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

import rewards
from pipeline.assessing import material as sources
from pipeline.assessing.assess import VERB, Job, assess, scored_pictures
from pipeline.assessing.assessment import as_json
from pipeline.assessing.settings import EvaluateRewardConfig
from pipeline.assessing.trials import Cost
from pipeline.judging import checkpoint_id, told
from pipeline.loop import run_dir
from pipeline.progress import Progress, quiet_libraries
from pipeline.report.words import percent, span
from pipeline.runner import process_state, states
from pipeline.settings import UserError
from pipeline.stages import STAGES
from pipeline.stages.reward import trained_loss
from pipeline.store import Artifact, RunLock, atomic_write_text, fingerprint
from rewards.evaluation import CEILING, Evaluation, evaluate
from rewards.losses import BradleyTerry
from rewards.tables import Table

_WRITTEN = ("report.json", "card.md", "index.html")
_NEEDED = ("sample", "judge", "prefer", "reward")


def evaluate_reward(
    config: Any | None = None,
    table: str | Path | None = None,
    reader: str = "pairs",
    split: str = "test",
    to: str | Path | None = None,
) -> None:
    """Evaluate the reward model of a run, or the scores of a table, and write what was found.

    Args:
        config: of the run, whose model is evaluated; None for the scores that a table brings.
        table: of people's preferences, read by `reader` (see `rewards.readers`); None for the run's held-out pairs.
        split: of a table in several parts.
        to: the folder to write into, instead of one in the run's.

    Raises:
        UserError: there is nothing to evaluate, the table or the model does not suit, or the folder holds something
            else.
        judges.base.Unavailable: the judge is asked, and nobody answers.
    """
    quiet_libraries()
    job, artifact = _job(config, table, reader, split), Artifact(_folder(config, table, to))
    depends = _depends(job)
    if artifact.complete(fingerprint(depends)):
        job.progress.say(f"{artifact.folder}: nothing left to do")
        return
    _check_free(artifact)
    with RunLock(run_dir(config)) if config else contextlib.nullcontext():
        _evaluate(job, artifact, depends)


def _evaluate(job: Job, artifact: Artifact, depends: dict[str, Any]) -> None:
    # matplotlib and jinja take a second to import.
    from pipeline.report.reward import card, render, view

    pictures, labelled = scored_pictures(job), job.material.labelled()
    try:
        evaluation = evaluate(pictures, labelled, job.loss)
    except ValueError as error:
        raise UserError(f"{job.material.source}: {error}") from None
    found, cost = assess(job, pictures, evaluation)
    shown = view(found, job.material, pictures, job.loss, job.settings.shown, job.settings.largest_side)
    numbers = {"conclusion": asdict(shown.conclusion), **as_json(found)}
    artifact.begin(fingerprint(depends))
    artifact.write_text("report.json", json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    artifact.write_text("card.md", card(shown))
    artifact.write_text("index.html", render(shown))
    artifact.finish(depends["inputs"], extra={"verb": VERB, "depends": depends})
    if cost:
        atomic_write_text(artifact.folder / "cost.json", json.dumps(asdict(cost), indent=2) + "\n")
    job.progress.say(shown.conclusion.claim)
    job.progress.say(shown.conclusion.reading)
    _print(evaluation, cost, job.progress)
    for name in _WRITTEN:
        job.progress.say(str(artifact.folder / name))


def _job(config: Any | None, table: str | Path | None, reader: str, split: str) -> Job:
    """Raises UserError where what is needed does not stand or cannot be read."""
    if config is None and table is None:
        raise UserError(
            "evaluate-reward: there is nothing to evaluate; name the CONFIG of a run, or a table by --table"
        )
    settings = config.evaluate_reward if config else EvaluateRewardConfig()
    inputs = _standing(config) if config else {}
    if table is None:
        _require(config, inputs, *(stage.name for stage in STAGES if stage.name in _NEEDED and stage.wanted(config)))
        material = sources.of_run(config, inputs)
    else:
        material = sources.of_table(reader, Table(str(table), split), settings.pairs, settings.most_refused)
        if config is not None:
            _require(config, inputs, "reward")
        elif not material.scored:
            raise UserError(
                f"{material.source}: no score_a and score_b; name the CONFIG of a run whose model gives them"
            )
    device, model, loss = str(process_state().device), None, BradleyTerry()
    if config is not None:
        model, loss = rewards.load_reward(inputs["reward"].folder / "model", device), trained_loss(inputs["reward"])
    return Job(config, settings, material, inputs, model, loss, device, Progress())


def _standing(config: Any) -> dict[str, Artifact]:
    """The complete artifacts of the run, but for its last."""
    folder = run_dir(config)
    found = {entry.stage.name for entry in states(config, STAGES, folder) if entry.state == "reuse"}
    return {name: Artifact(folder / name) for name in (*_NEEDED, "finetune") if name in found}


def _require(config: Any, inputs: Mapping[str, Artifact], *needs: str) -> None:
    for need in needs:
        if need not in inputs:
            raise UserError(
                f"evaluate-reward needs the result of {need}, which is not complete in {run_dir(config)} for these "
                f"settings; run the stage {need} first"
            )


def _folder(config: Any | None, table: str | Path | None, to: str | Path | None) -> Path:
    if to is not None:
        return Path(to)
    if config is None:
        raise UserError("evaluate-reward: name the folder to write into by --to")
    return run_dir(config) / (f"{VERB}-{Path(table).stem}" if table else VERB)


def _check_free(artifact: Artifact) -> None:
    """Raises UserError where something that is no evaluation would be lost."""
    manifest = artifact.manifest
    if manifest and manifest.extra.get("verb") != VERB:
        raise UserError(f"{artifact.folder} holds the result of something else; name another folder by --to")
    artifact.check_free()


def _depends(job: Job) -> dict[str, Any]:
    depends: dict[str, Any] = {
        "version": 1,
        "settings": job.settings.model_dump(mode="json"),
        "table": job.material.digest,
        "inputs": {name: str(artifact.fingerprint) for name, artifact in job.inputs.items()},
    }
    if config := job.config:
        depends |= {"config": config.model_dump(mode="json", exclude={"out"}), "judge": config.judge.depends()}
        depends |= {"generator": config.generator.depends(), "prompts": config.prompts.depends()}
    if job.settings.baseline:
        with told("evaluate_reward.baseline"):
            depends["baseline"] = checkpoint_id(job.settings.baseline)
    return depends


def _print(found: Evaluation, cost: Cost | None, progress: Progress) -> None:
    table = Grid("pairs by", "ordered by", "pairs", "accuracy ± s.e.", "95 % interval", "of drawn")
    for column in table.columns[2:]:
        column.justify = "right"
    for line in found.lines:
        right, error = percent(line.accuracy.value, 1), "" if line.error is None else f" ± {100 * line.error:.1f}"
        shown = ("", "") if line.scorer == CEILING else (right + error, span(line.accuracy.interval))
        counted = f"{line.accuracy.count:,}"
        table.add_row(line.task, line.scorer, counted, *shown, percent(line.drawn.value, 1))
    progress.console.print(table)
    if cost:
        progress.say(
            f"{cost.images_per_second:.3g} images/s in batches of {cost.batch} on {cost.device}, at most "
            f"{cost.peak_bytes / 2**20:,.0f} MiB"
        )

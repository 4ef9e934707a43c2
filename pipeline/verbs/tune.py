"""The verb `tune`: the model of a run's judge is tuned to a person's labels, and it is told whether that helped.

    tune/checkpoint/    the tuned model, for `judge.model.checkpoint`
    tune/adapter/       its adapter alone, in peft's format
    tune/tune.json      agreement with held-out labels before and after, field by field those of `Tuned`

Labels are held out by prompt. Which ones is a function of the prompt alone, so that a prompt stays held out when labels
are added, and when a tuned judge is tuned again. Equal settings, labels and judges give equal files.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

import judges
from judges.audit import failures, margins, unremembered
from judges.base import Judge, Verdict
from judges.questions import QuestionJudge
from models.keys import sample_key
from pipeline.auditing.cases import Case
from pipeline.auditing.examining import judged
from pipeline.auditing.labels import LabelledCases, read_labels
from pipeline.estimates import Accuracy, Estimate, accuracy, rise
from pipeline.judging import QuestionsJudge, told
from pipeline.loop import run_dir
from pipeline.progress import Progress, quiet_libraries
from pipeline.runner import Interrupted, StopFlag, process_state
from pipeline.settings import UserError
from pipeline.store import Artifact, RunLock, fingerprint, hash_path
from rewards.leakage import normalised
from rewards.tables import Refused

if TYPE_CHECKING:
    from judges.tuning import Lesson, Tunable, Tuning

_ROWS = {
    "balanced": "balanced accuracy",
    "plain": "accuracy",
    "follow": "  of pictures that follow",
    "stray": "  of those that do not",
    "auc": "AUC",
}


@dataclass(frozen=True)
class Tuned:
    """What became of a judge.

    Attributes:
        pictures, prompts: of all labels that could be used; `refused` are the others.
        lessons: questions with a known answer that were taught, in so many `steps`.
        before, after: agreement with held-out labels.
        rise: of the balanced accuracy.
        better: whether the interval of the rise lies above 0.
        claim: the same in words.
    """

    labels: str
    pictures: int
    prompts: int
    refused: tuple[Refused, ...]
    lessons: int
    steps: int
    before: Accuracy
    after: Accuracy
    rise: Estimate
    better: bool
    claim: str


def tune(config: Any, labels: str | Path, to: str | Path | None = None) -> None:
    """Tune the judge of a run to a table of labels (see `pipeline.auditing.labels`), into `to` or the run's folder.

    Raises:
        UserError: the judge or the labels do not suit, or the folder holds something else.
        Interrupted: a signal was seen; the same call goes on.
    """
    quiet_libraries()
    settings, progress, table = _tunable(config), Progress(), read_labels(labels)
    taught_on, heldout = split(table, config.tune.heldout)
    artifact = Artifact(to or run_dir(config) / "tune")
    depends = _depends(config, table)
    if artifact.complete(fingerprint(depends)):
        progress.say(f"{artifact.folder}: nothing left to do")
        return
    _check_free(artifact, fingerprint(depends))
    judge = settings.build(str(process_state().device))
    with told("judge.model"):
        judges.tuning.check(unremembered(judge).vqa)
    with RunLock(run_dir(config)):
        lessons = _lessons(judge, taught_on, config.tune.method, table.source, progress)
        before = _judged(judge, heldout, progress)
        artifact.begin(fingerprint(depends))
        teaching = judges.tuning.Tuning(seed=config.seed, **config.tune.model_dump(exclude={"heldout"}))
        _teach(unremembered(judge).vqa, lessons, teaching, settings, artifact, progress)
        model = settings.model.model_copy(update={"checkpoint": str(artifact.folder / "checkpoint")})
        tuned = settings.model_copy(update={"model": model}).build(str(process_state().device))
        after = _judged(tuned, heldout, progress)
        compared = _compared(heldout, before, after)
        found = Tuned(
            labels=table.source,
            pictures=len(table.cases),
            prompts=len({case.prompt for case in table.cases}),
            refused=table.refused,
            lessons=len(lessons),
            steps=judges.tuning.step_count(len(lessons), teaching),
            **compared,
            better=is_better(compared["rise"]),
            claim=claim(compared["rise"], settings.model.checkpoint, model.checkpoint),
        )
        artifact.write_text(
            "tune.json", json.dumps(asdict(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        artifact.finish({}, extra={"verb": "tune", "depends": depends})
    _print(found, progress)
    progress.say(str(artifact.folder / "tune.json"))


def split(table: LabelledCases, share: float) -> tuple[list[Case], list[Case]]:
    """The cases that are taught, and those of the held-out prompts.

    Raises:
        UserError: one part has not both verdicts, or only one prompt.
    """
    cases = [case for case in table.cases if case.truth != 0.5]
    for kind, found in (("no", [c for c in cases if c.truth > 0.5]), ("yes", [c for c in cases if c.truth < 0.5])):
        if len(found) == len(cases):
            raise UserError(f"{table.source}: no verdict is {kind!r}; a judge learns from both, label some more")
    parts: tuple[list[Case], list[Case]] = [], []
    for case in table.cases:
        parts[_is_held_out(case.prompt, share)].append(case)
    for name, part in zip(("left to learn from", "held out"), parts, strict=True):
        verdicts = {case.truth > 0.5 for case in part if case.truth != 0.5}
        if len(verdicts) < 2 or len({case.prompt for case in part}) < 2:
            count = len({case.prompt for case in table.cases})
            raise UserError(
                f"{table.source}: of its {count} prompts too few are {name} to have two of them and both verdicts; "
                "label more prompts, or change tune.heldout"
            )
    return parts


def _is_held_out(prompt: str, share: float) -> bool:
    return sample_key("tune", normalised(prompt)) / 2**63 < share


def _tunable(config: Any) -> QuestionsJudge:
    judge = config.judge
    if judge.type != "questions":
        raise UserError(f"judge.type: a judge of type {judge.type!r} cannot be tuned; tune one of type questions")
    if judge.model.type not in ("blip2", "chat"):
        raise UserError(
            f"judge.model.type: a model of type {judge.model.type!r} cannot be tuned; tune it as blip2 or chat, and "
            "serve the result"
        )
    if config.tune.method == "dpo" and judge.model.type != "chat":
        raise UserError("tune.method: dpo is for models of type chat; tune a BLIP-2 by sft")
    return judge


def _depends(config: Any, table: LabelledCases) -> dict[str, Any]:
    labels = [[case.prompt, case.truth, _picture_id(case.file)] for case in table.cases]
    return {
        "version": 1,
        "seed": config.seed,
        "tune": config.tune.model_dump(mode="json", exclude={"save_steps"}),
        "judge": config.judge.depends(),
        "labels": fingerprint({"labels": labels}),
    }


def _picture_id(file: bytes | Path) -> str:
    return hash_path(file) if isinstance(file, Path) else hashlib.sha256(file).hexdigest()


def _check_free(artifact: Artifact, digest: str) -> None:
    """Raises UserError where another result, or anything else, would be lost."""
    folder = artifact.folder
    if artifact.manifest and artifact.fingerprint != digest:
        raise UserError(
            f"{folder} holds a judge tuned by other settings or labels; name another folder by --to, or delete it"
        )
    artifact.check_free()


def _judged(judge: Judge, cases: Sequence[Case], progress: Progress) -> list[Verdict]:
    with progress.track(len(cases), "verdicts", "judge") as advance:
        found = judged(judge, cases, ([place] for place in range(len(cases))), advance)
    return list(found.values())


def _lessons(
    judge: QuestionJudge, cases: Sequence[Case], method: str, source: str, progress: Progress
) -> "list[Lesson]":
    """What the cases teach, less those that the judge has no verdict on: it could not be fed their questions either.

    Raises:
        UserError: there is no lesson in one of the verdicts.
    """
    verdicts = _judged(judge, cases, progress)
    lessons = [
        judges.tuning.Lesson(case.image, question, target)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.valid
        for question, target in judges.tuning.taught(case.prompt, judge.decompose(case.prompt), case.truth)
        if method == "sft" or target != 0.5
    ]
    if not any(lesson.target < 0.5 for lesson in lessons) or not any(lesson.target > 0.5 for lesson in lessons):
        why = next(iter(failures(verdicts)), "none of its yes/no questions is on the whole prompt")
        raise UserError(f"judge.questions: {source} teaches it nothing: {why}; ask questions of type whole")
    return lessons


def _teach(
    vqa: "Tunable",
    lessons: "Sequence[Lesson]",
    teaching: "Tuning",
    settings: QuestionsJudge,
    artifact: Artifact,
    progress: Progress,
) -> None:
    stop, tuning = StopFlag(), judges.tuning
    steps, done = tuning.step_count(len(lessons), teaching), tuning.steps_done(artifact.resume)
    with stop.listening(), progress.track(steps, "steps", "tune", done) as advance:
        try:
            model = tuning.tune(
                vqa,
                lessons,
                teaching,
                artifact.resume,
                lambda step, steps, loss: advance(1, loss=loss),
                lambda: stop.raised,
            )
        except tuning.Stopped:
            raise Interrupted from None
        except FloatingPointError as error:
            raise UserError(f"tune.learning_rate: {error}") from None

    def write(folder: Path) -> None:
        tuning.save_merged(vqa, model, folder)
        asks = Path(settings.model.checkpoint) / "judge.json"
        if asks.is_file():
            shutil.copy(asks, folder)

    artifact.write_folder("adapter", lambda folder: tuning.save_adapter(model, folder))
    artifact.write_folder("checkpoint", write)


def _compared(cases: Sequence[Case], before: Sequence[Verdict], after: Sequence[Verdict]) -> dict[str, Any]:
    """Agreement before and after, and its rise, by name."""
    truth, prompts = np.array([case.truth for case in cases]), np.array([case.prompt for case in cases])
    first, second = margins(before), margins(after)
    return {
        "before": accuracy(first, truth, prompts),
        "after": accuracy(second, truth, prompts),
        "rise": rise(first, second, truth, prompts),
    }


def is_better(rose: Estimate) -> bool:
    """Whether a rise is more than chance, at 95 %."""
    return rose.interval is not None and rose.interval[0] > 0


def claim(rose: Estimate, untuned: str, tuned: str) -> str:
    """What a rise means for which of two checkpoints to use."""
    if rose.value is None or rose.interval is None:
        return (
            f"Nobody knows whether the tuned judge agrees better: too few verdicts on held-out labels; keep {untuned}"
        )
    low, high = rose.interval
    interval = f"{_points(low)} to {_points(high)}"
    said = f"balanced accuracy on held-out labels changed by {_points(rose.value)} points ({interval})"
    if is_better(rose):
        return f"The tuned judge agrees better: {said}; set judge.model.checkpoint to {tuned}"
    if rose.value > 0:
        return f"The tuned judge may or may not agree better: {said}; label more, and until then keep {untuned}"
    return f"The tuned judge agrees no better: {said}; keep {untuned}"


def _print(tuned: Tuned, progress: Progress) -> None:
    table = Table("held-out labels", "untuned", "tuned")
    for name, title in _ROWS.items():
        table.add_row(title, *(_share(getattr(found, name)) for found in (tuned.before, tuned.after)))
    progress.console.print(table)
    if tuned.refused:
        first = tuned.refused[0]
        progress.say(f"{tuned.labels}: {len(tuned.refused)} rows left out, the first row {first.row}: {first.reason}")
    progress.say(tuned.claim)


def _share(found: Estimate) -> str:
    if found.value is None or found.interval is None:
        return "unknown"
    low, high = found.interval
    return f"{found.value:.1%} ({low:.1%} to {high:.1%})"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0

"""The artifacts of a run as one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.pictures import source_of
from pipeline.report import choices, figures, words
from pipeline.report.choices import Row
from pipeline.report.pages import page
from pipeline.report.pictures import Picture, read_pictures
from pipeline.report.watched import Watched, watched
from pipeline.store import Artifact, Manifest, read_rows
from rewards.metrics.probabilities import Bin

_IMAGE_KEY = ("model", "prompt_id", "sample")
_PAIR_KEY = ("prompt_id", "sample")
_NO_PIXELS = ("model", "prompt_id", "prompt", "skill", "sample", "judge", "judge_valid", "gold")

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Shown:
    """A picture with the oracle's word on it; `gold` is None where that is not known."""

    picture: Picture
    gold: bool | None


@dataclass(frozen=True)
class Example:
    """One prompt, drawn twice from the same noise."""

    prompt_id: str
    prompt: str
    sample: int
    base: Shown
    tuned: Shown


@dataclass(frozen=True)
class Gallery:
    """The examples of one skill."""

    skill: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Duel:
    """Two pictures of one prompt, with P(a better) of the judge and of the reward model."""

    prompt: str
    a: Shown
    b: Shown
    judge: float
    reward: float


@dataclass(frozen=True)
class Misjudged:
    """A picture that judge and gold see differently; `margin` is the judge's logit margin for "yes"."""

    prompt: str
    model: str
    shown: Shown
    margin: float


@dataclass(frozen=True)
class Figures:
    """SVG elements; `skills` is empty where gold is not known, `signals` where nobody watched."""

    skills: str
    progress: str
    steps: str
    reliability: str
    signals: str


@dataclass(frozen=True)
class View:
    """All that the page shows.

    Attributes:
        name: of the run.
        metrics: `evaluate/metrics.json`.
        courses: how each curve of the training went.
        watched: what the watch over it saw; None where there was none.
        versions: for each package its versions, joined; more than one if stages ran with different ones.
        settings: YAML, what the result of each stage depends on.
    """

    name: str
    headline: words.Headline
    metrics: dict[str, Any]
    galleries: tuple[Gallery, ...]
    courses: tuple[str, ...]
    watched: Watched | None
    duels: tuple[Duel, ...]
    judge_lines: tuple[words.JudgeLine, ...]
    misjudged: tuple[Misjudged, ...]
    figures: Figures
    manifests: dict[str, Manifest]
    versions: dict[str, str]
    settings: str


def view(name: str, inputs: Mapping[str, Artifact], examples_per_skill: int, disagreements: int, side: int) -> View:
    """What the page on the run `name` shows.

    Args:
        inputs: the finished artifacts by stage.
        examples_per_skill: prompts shown of each skill.
        disagreements: at most so many each of reward against judge and of judge against gold.
        side: pixels; larger images are shrunk.
    """
    evaluate = inputs["evaluate"]
    metrics = json.loads(evaluate.path("metrics.json").read_text(encoding="utf-8"))
    rows = read_rows(evaluate, columns=_NO_PIXELS).to_list()
    curves = _by_iteration(evaluate, "curves.parquet")
    training = _by_iteration(inputs["finetune"], "curves-*.parquet")
    watch = _watched(inputs["finetune"])
    misjudged = choices.judge_against_gold(rows, disagreements)
    manifests = {stage: _manifest(artifact) for stage, artifact in inputs.items()}
    settings = {stage: manifest.extra["depends"] for stage, manifest in manifests.items()}
    return View(
        name=name,
        headline=words.headline(metrics["generator"], words.paired_change(rows)),
        metrics=metrics,
        galleries=_galleries(evaluate, rows, examples_per_skill, side),
        courses=_courses(curves, training),
        watched=watch,
        duels=_duels(evaluate, source_of(inputs), disagreements, side),
        judge_lines=words.judge_lines(rows),
        misjudged=_misjudged(evaluate, misjudged, side),
        figures=_figures(metrics, curves, training, watch),
        manifests=manifests,
        versions=_versions(manifests),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110),
    )


def render(shown: View) -> str:
    """The page as HTML."""
    return page("page.html.j2", view=shown)


def _galleries(evaluate: Artifact, rows: Sequence[Row], count: int, side: int) -> tuple[Gallery, ...]:
    chosen = {skill: choices.examples(rows, skill, count) for skill in choices.skills(rows)}
    wanted = {_key(row, _IMAGE_KEY) for pairs in chosen.values() for pair in pairs for row in pair}
    pictures = read_pictures(evaluate, _IMAGE_KEY, wanted, side)

    def example(*pair: Row) -> Example:
        first = pair[0]
        base, tuned = (Shown(pictures[_key(row, _IMAGE_KEY)], row["gold"]) for row in pair)
        return Example(first["prompt_id"], first["prompt"], first["sample"], base, tuned)

    return tuple(Gallery(skill, tuple(example(*pair) for pair in pairs)) for skill, pairs in chosen.items())


def _duels(evaluate: Artifact, source: tuple[Artifact, str], count: int, side: int) -> tuple[Duel, ...]:
    pairs = choices.reward_against_judge(read_rows(evaluate, "pairs.parquet").to_list(), count)
    keys = {(pair["prompt_id"], pair[which]) for pair in pairs for which in ("sample_a", "sample_b")}
    pictures = read_pictures(source[0], _PAIR_KEY, keys, side, source[1])

    def shown(pair: Row, which: str) -> Shown:
        return Shown(pictures[pair["prompt_id"], pair[f"sample_{which}"]], pair[f"gold_{which}"])

    return tuple(
        Duel(
            pair["prompt"],
            shown(pair, "a"),
            shown(pair, "b"),
            judge=pair["label"],
            reward=pair["preference"],
        )
        for pair in pairs
    )


def _misjudged(evaluate: Artifact, rows: Sequence[Row], side: int) -> tuple[Misjudged, ...]:
    pictures = read_pictures(evaluate, _IMAGE_KEY, {_key(row, _IMAGE_KEY) for row in rows}, side)
    return tuple(
        Misjudged(row["prompt"], row["model"], Shown(pictures[_key(row, _IMAGE_KEY)], row["gold"]), row["judge"])
        for row in rows
    )


def _courses(curves: Columns, training: Columns) -> tuple[str, ...]:
    told = (
        words.course("mean reward of the rollouts", curves["reward"], "{:.2f}".format),
        words.course("rollouts that follow their prompt", curves["gold"], words.percent),
        words.course("KL from the base", training["kl"], "{:.3g} nats".format),
    )
    return tuple(filter(None, told))


def _watched(finetune: Artifact) -> Watched | None:
    if not finetune.has("signals.json"):
        return None
    return watched(json.loads(finetune.path("signals.json").read_text(encoding="utf-8")))


def _figures(metrics: Mapping[str, Any], curves: Columns, training: Columns, watch: Watched | None) -> Figures:
    bins = [Bin(**point) for point in metrics["reward"]["reliability"]]
    return Figures(
        skills=_skills(metrics["generator"]),
        progress=figures.progress(curves["iteration"], curves["reward"], curves["gold"]),
        steps=figures.steps(training["iteration"], training["kl"], training["grad_norm"]),
        reliability=figures.reliability(bins),
        signals=figures.signals(watch.iterations, watch.shares) if watch else "",
    )


def _skills(generator: Mapping[str, Any]) -> str:
    """The bars of all images and of each skill; "" where gold is not known."""
    if generator["base"]["gold"] is None:
        return ""
    labels = list(generator["base"]["per_skill"])

    def shares(model: Mapping[str, Any]) -> list[figures.Share]:
        entries = [model, *(model["per_skill"][label] for label in labels)]
        return [figures.Share(entry["gold"], *entry["interval"]) for entry in entries]

    named = ["all", *(label.replace("_", " ") for label in labels)]
    return figures.skills(named, shares(generator["base"]), shares(generator["tuned"]))


def _by_iteration(artifact: Artifact, pattern: str) -> Columns:
    """The columns of the curves that match `pattern`, in the order of the iterations."""
    rows = sorted(read_rows(artifact, pattern).to_list(), key=lambda row: row["iteration"])
    return {name: [row[name] for row in rows] for name in rows[0]}


def _key(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)


def _manifest(artifact: Artifact) -> Manifest:
    manifest = artifact.manifest
    assert manifest, f"{artifact.folder} is not finished"
    return manifest


def _versions(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests.values():
        for package, version in manifest.versions.items():
            found.setdefault(package, {})[version] = None
    return {package: ", ".join(versions) for package, versions in found.items()}

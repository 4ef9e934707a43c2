"""An evaluation of a reward as a page and as a card: what was found, and the pictures on which it was found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from pipeline.assessing.assessment import Assessment
from pipeline.assessing.material import Material
from pipeline.assessing.pressure import Pressure
from pipeline.report import figures, reward_words
from pipeline.report.audit_words import Conclusion
from pipeline.report.figures import Course, Dot
from pipeline.report.pages import page
from pipeline.report.pictures import Picture, picture
from pipeline.report.reward_words import CHANGES, conclusion
from pipeline.report.view import Duel, Shown
from rewards.evaluation import Pairs, Pictures, Task, TaskName, gold_pairs, log_odds
from rewards.losses import PairLoss
from rewards.metrics.intervals import Estimate
from rewards.overoptimisation import Fit, Point


@dataclass(frozen=True)
class Plot:
    """An SVG, and what it shows for those who cannot see it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class View:
    """All that page and card show.

    Attributes:
        mistakes: the surest wrong orders, in the eyes of `mistaken_by`: gold, where it is known.
        closest: the pairs that it finds hardest to tell apart.
        torn: where judge and reward differ most; none where these are the mistakes.
        reliability: of each task, before and after temperature.
        changes: what the effects changed, by their names.
    """

    found: Assessment
    conclusion: Conclusion
    mistaken_by: TaskName
    mistakes: tuple[Duel, ...]
    closest: tuple[Duel, ...]
    torn: tuple[Duel, ...]
    reliability: tuple[Plot, ...]
    margins: Plot | None
    choosing: Plot | None
    tuning: Plot | None
    changes: dict[str, str]
    believed: float = reward_words.BELIEVED
    useful: float = reward_words.USEFUL


def view(found: Assessment, material: Material, pictures: Pictures, loss: PairLoss, count: int, side: int) -> View:
    """What page and card show: at most `count` pairs of each kind, pictures of at most `side` pixels."""
    labelled, gold = material.labelled(), gold_pairs(pictures)
    gallery = _Gallery(material, pictures, loss, count, side)
    task, truth = found.evaluation.tasks[0], gold if len(gold) else labelled
    return View(
        found=found,
        conclusion=conclusion(found),
        mistaken_by=truth.task,
        mistakes=gallery.hang(truth, lambda odds, label: np.where(_wrong(odds, label), -np.abs(odds), np.inf)),
        closest=gallery.hang(labelled, lambda odds, label: np.abs(odds)),
        torn=gallery.hang(labelled, _contradiction) if truth is gold else (),
        reliability=tuple(plot for one in found.evaluation.tasks for plot in _reliability(one)),
        margins=_margins(task),
        choosing=_pressed("choosing", found.choosing),
        tuning=_pressed("tuning", found.tuning),
        changes=CHANGES,
    )


def render(shown: View) -> str:
    """The page as HTML."""
    return page("reward.html.j2", view=shown)


def card(shown: View) -> str:
    """The card as Markdown."""
    return page("reward.md.j2", view=shown)


def _wrong(odds: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.isfinite(odds) & (np.sign(odds) * (label - 0.5) < 0)


def _contradiction(odds: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Less for pairs of which label and reward name different winners, the wider apart the less."""
    return np.where(_wrong(odds, label), -np.abs(label - expit(odds)), np.inf)


@dataclass(frozen=True)
class _Gallery:
    material: Material
    pictures: Pictures
    loss: PairLoss
    count: int
    side: int

    def hang(self, pairs: Pairs, rank: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[Duel, ...]:
        """The pairs with the lowest finite rank, one of each prompt."""
        odds = log_odds(self.pictures, pairs, self.loss)
        ranks = np.nan_to_num(rank(odds, pairs.label), nan=np.inf)
        found: dict[str, Duel] = {}
        for row in np.argsort(ranks, kind="stable"):
            prompt = self.pictures.prompt_ids[pairs.first[row]]
            if len(found) == self.count or not np.isfinite(ranks[row]):
                break
            if prompt not in found:
                a, b = (self._shown(int(places[row])) for places in (pairs.first, pairs.second))
                text = str(self.pictures.prompts[pairs.first[row]])
                found[prompt] = Duel(text, a, b, float(pairs.label[row]), float(expit(odds[row])))
        return tuple(found.values())

    def _shown(self, place: int) -> Shown:
        gold = self.pictures.gold[place]
        return Shown(self._picture(place), bool(gold) if np.isfinite(gold) else None)

    def _picture(self, place: int) -> Picture:
        file = self.material.pictures[place].file
        return picture(file if isinstance(file, bytes) else file.read_bytes(), self.side)


def _reliability(task: Task) -> Iterator[Plot]:
    calibration = task.calibration
    for name, fit in (("as they are", calibration.before), ("after temperature", calibration.after)):
        if fit and fit.reliability:
            observed = f"share preferred by {task.name}: {name}"
            svg = figures.reliability(
                fit.reliability, "probability that the reward gave", observed, f"{task.name} {name}"
            )
            yield Plot(svg, f"Predicted against observed preference by {task.name}, probabilities {name}")


def _margins(task: Task) -> Plot | None:
    if len(task.by_margin) < 2:
        return None
    places = [(one.low + one.high) / 2 for one in task.by_margin]
    dots = [_dot(x, one.accuracy) for x, one in zip(places, task.by_margin, strict=True)]
    claimed = [(x, one.claimed) for x, one in zip(places, task.by_margin, strict=True)]
    title = f"pairs ordered as {reward_words.WHO[task.name]}; broken: what the margins claim"
    course = Course(title, [dot for dot in dots if dot], claimed, percent=True)
    svg = figures.courses("margins", "margin between the two rewards, nats", [course])
    return Plot(svg, "Accuracy against the size of the margin")


def _pressed(name: str, pressure: Pressure | None) -> Plot | None:
    if pressure is None or pressure.curves is None:
        return None
    curves, truth = pressure.curves, pressure.truth
    unit = "" if truth == "gold" else ", nats"
    sides: tuple[tuple[str, Callable[[Point], Estimate], Fit, str, bool], ...] = (
        ("gain of the reward", lambda point: point.proxy, curves.proxy, figures.TUNED, False),
        (f"gain of {truth}{unit}", lambda point: point.gold, curves.gold, figures.GOLD, truth == "gold"),
    )
    found = [
        Course(
            title,
            [dot for point in curves.points if (dot := _dot(point.distance, of(point)))],
            _fitted(fit, curves.points[-1].distance),
            colour,
            percent,
        )
        for title, of, fit, colour, percent in sides
    ]
    svg = figures.courses(name, "distance from the base model, √KL", found)
    return Plot(svg, f"Gain of the reward and of {truth} against the distance from the base model")


def _fitted(fit: Fit, farthest: float) -> list[tuple[float, float]]:
    if fit.alpha.value is None or fit.beta.value is None:
        return []
    d = np.linspace(1e-6, farthest, 60)
    bend = d if fit.form == "best_of_n" else np.log(d)
    return list(zip(d.tolist(), (d * (fit.alpha.value - fit.beta.value * bend)).tolist(), strict=True))


def _dot(x: float, found: Estimate) -> Dot | None:
    return None if found.value is None else Dot(x, found.value, *(found.interval or (None, None)))

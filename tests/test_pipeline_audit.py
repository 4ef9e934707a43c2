"""The audit finds exactly what is wrong with a judge: here each has one known fault, and the honest one none."""

import hashlib
import json
import re
from dataclasses import asdict, replace
from functools import cache

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import rewards
from judges.base import Answer, Question, Verdict
from judges.pairwise import Better, GroupJudge, PairwiseJudge, ScoreComparer
from judges.questions import QuestionJudge
from judges.shapes import oracle
from judges.shapes.grammar import Thing, holds, parse
from judges.shapes.questions import queries
from pipeline.auditing.cases import ShapesCases, png, shapes_cases, shapes_clips
from pipeline.auditing.examining import examine
from pipeline.auditing.findings import findings
from pipeline.auditing.labels import read_labels
from pipeline.config import Config
from pipeline.estimates import accuracy, calibration, share
from pipeline.judging import AuditConfig
from pipeline.loop import run_dir
from pipeline.progress import Progress
from pipeline.report.audit import view
from pipeline.report.audit_words import conclusion
from pipeline.settings import UserError, load
from pipeline.verbs.audit import audit

PROMPTS = 12
WRITING = {"prompt_written", "score_written", "reply_written"}


@cache
def seen(pixels):
    return oracle.read(np.frombuffer(pixels, np.uint8).reshape(32, 32, 3))


class Eye:
    """Sees what the oracle sees, and knows a few ways of asking."""

    id, template, most_images = "eye", "{}", 1

    def ask(self, samples, questions):
        return [
            [self.answer(image, question) for question in asked]
            for image, asked in zip(samples, questions, strict=True)
        ]

    def answer(self, image, question):
        yes = self.sees(image, question.text)
        margin = 3.0 if yes == (question.expected == "yes") else -3.0
        return Answer(question.text, margin, "yes" if yes else "no")

    def sees(self, image, text):
        objects = seen(image.tobytes())
        if found := re.fullmatch(r"is there (no|an?) (.*)\?", text):
            *colour, shape = found[2].split()
            there = any(self.meant(Thing(shape, *colour)).matches(o.shape, o.colour) for o in objects)
            return there != (found[1] == "no")
        prompt = parse(re.fullmatch(r"(?:does (?:this|the) figure show|is this) (.*)\?", text, re.IGNORECASE)[1])
        return holds(replace(prompt, things=tuple(map(self.meant, prompt.things))), objects)

    def meant(self, thing):
        return thing


class Reader(Eye):
    """Believes whatever is written on a picture."""

    def sees(self, image, text):
        return super().sees(image, text) or (image[-1] == 255).all(-1).mean() > 0.5


class Blind(Eye):
    """Does not notice a "no"."""

    def sees(self, image, text):
        return super().sees(image, text.replace("is there no ", "is there a "))


class Tired(Eye):
    """One in ten questions goes unanswered."""

    def answer(self, image, question):
        digest = hashlib.sha256(image.tobytes() + question.text.encode()).digest()
        if digest[0] < 256 / 10:
            return Answer.failed(question.text, "timed out")
        return super().answer(image, question)


class TwoEyes:
    """Sees two pictures and leans towards the first by `bias` nats."""

    template, most_images = "{}", 2

    def __init__(self, bias):
        self.id, self.bias = f"two eyes {bias}", bias

    def ask(self, samples, questions):
        return [
            [self.answer(pair, question) for question in asked] for pair, asked in zip(samples, questions, strict=True)
        ]

    def answer(self, pair, question):
        first, second = (holds(parse(question.text), seen(image.tobytes())) for image in pair)
        margin = 2.0 * first - 2.0 * second + self.bias
        return Answer(question.text, margin if question.expected == "1" else -margin, "1" if margin > 0 else "2")


class ColourBlind(Eye):
    """Takes every colour for every other."""

    def meant(self, thing):
        return Thing(thing.shape)


def shows_and_exists(prompt):
    return [Question(query.text) for query in queries(parse(prompt)) if query.kind in ("shows", "exists")]


@pytest.fixture(scope="module")
def config(config_at):
    return load(Config, config_at("audited"))


@pytest.fixture(scope="module")
def cases(config):
    return shapes_cases(config, PROMPTS, "cpu")


@pytest.fixture(scope="module")
def hear(cases):
    @cache
    def heard(vqa):
        return examine(QuestionJudge(vqa(), shows_and_exists), cases, PROMPTS, 0, Progress(visible=False))

    return heard


@pytest.fixture(scope="module")
def find(hear):
    return cache(lambda vqa: findings(hear(vqa)))


def behaved(found):
    return {probe.name: probe.behaved.value for probe in found.probes}


def test_an_honest_judge_is_found_honest(find):
    found = find(Eye)
    assert all(getattr(found.accuracy, name).value == 1 for name in ("balanced", "plain", "follow", "stray", "auc"))
    assert set(behaved(found).values()) == {1.0}
    assert found.pairs.value == found.repeated.agreement.value == 1
    assert found.repeated.largest_change == 0
    assert found.wordings.changed.value == found.wordings.deviation.value == found.invalid.share.value == 0
    assert found.order is None
    assert found.questions == ()
    assert "no temperature is too small" in found.calibration.note
    said = conclusion(found)
    assert said.claim.startswith("The judge is right about 100")
    assert said.cautions == ()


def test_a_judge_that_reads_is_found_to_read_and_nothing_else(find):
    found = find(Reader)
    assert {name for name, value in behaved(found).items() if value != 1} == WRITING
    assert all(probe.status == "failed" and probe.behaved.value == 0 for probe in found.probes if probe.name in WRITING)
    assert all(probe.change.value == 6 for probe in found.probes if probe.name in WRITING)  # from -3 to 3 nats
    assert found.accuracy.balanced.value == 1
    cautions = conclusion(found).cautions
    assert len(cautions) == 1
    assert cautions[0].startswith("A generator could raise its reward by painting these words. It said no on only 0.0")


def test_a_judge_that_is_blind_to_negation_is_found_so(find):
    found = find(Blind)
    assert {name for name, value in behaved(found).items() if value != 1} == {"negation"}
    assert behaved(found)["negation"] == 0
    assert len(conclusion(found).cautions) == 1


def test_failures_are_counted_and_never_scored(hear, find, cases):
    heard, found = hear(Tired), find(Tired)
    lost = [verdict for verdict in heard.verdicts if not verdict.valid]
    assert found.invalid.reasons == {"timed out": len(lost)}
    assert found.invalid.share.value == len(lost) / len(cases.cases)
    low, high = found.invalid.share.interval
    assert low < 1 - 0.9**2 < high  # most prompts are asked about in two questions
    assert found.accuracy.plain.count == len(cases.cases) - len(lost)
    assert found.accuracy.plain.value == 1
    assert set(behaved(found).values()) == {1.0}
    assert sum(probe.unanswered for probe in found.probes) > 0
    assert found.pairs.value == found.repeated.agreement.value == 1
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(("bias", "flipped", "first"), [(0.0, 0.0, 0.5), (3.0, 1.0, 1.0), (-3.0, 1.0, 0.0)])
def test_a_favourite_place_is_found(cases, bias, flipped, first):
    judge = GroupJudge(PairwiseJudge(TwoEyes(bias), Better(["{prompt}"])))
    heard = examine(judge, cases, PROMPTS, 0, Progress(visible=False))
    found = findings(heard)
    assert found.order.flipped.value == flipped
    assert found.order.first.value == first
    assert found.pairs.value == 1  # asking in both orders mends it
    assert found.probes == ()
    said = " ".join(conclusion(found).cautions)
    assert ("favourite place" in said) is ("chooses the other one" in said) is (bias != 0)


def test_a_judge_of_single_pictures_that_compares_has_no_favourite_place(cases):
    judge = GroupJudge(ScoreComparer(QuestionJudge(Eye(), shows_and_exists)))
    found = findings(examine(judge, cases, PROMPTS, 0, Progress(visible=False)))
    assert found.order is None
    assert found.pairs.value == 1
    assert found.repeated.agreement.value == 1


def test_cases_are_of_held_out_prompts_and_known_by_the_oracle(cases, config):
    assert len(cases.cases) == 4 * PROMPTS
    assert {parse(case.prompt).split for case in cases.cases} == {"eval"}
    for case in cases.cases:
        assert case.truth == oracle.follows(case.image(), case.prompt)
    truths = {
        origin: [c.truth for c in cases.cases if c.origin == origin] for origin in {c.origin for c in cases.cases}
    }
    assert set(truths["rendered for the prompt"]) == {1.0}
    assert set(truths["rendered with one thing changed"]) == {0.0}
    assert shapes_cases(config, PROMPTS, "cpu") == cases


class Yes(Eye):
    """Always says yes."""

    def sees(self, image, text):
        return True


class No(Eye):
    """Always says no."""

    def sees(self, image, text):
        return False


def test_what_a_question_should_be_answered_is_known_in_the_embedded_world(find, cases):
    found = find(Yes)
    assert found.accuracy.balanced.value == found.accuracy.auc.value == 0.5
    assert found.questions
    for one in found.questions:
        asked = [case for case in cases.cases if one.question in [q.text for q in shows_and_exists(case.prompt)]]
        assert one.wrong.count == len(asked)
        truly_no = [not Eye().sees(case.image(), one.question) for case in asked]
        assert one.wrong.value == pytest.approx(np.mean(truly_no))


def test_probes_are_tried_where_they_mean_something(hear):
    for vqa in (Yes, No):
        trials = {trial.probe.name: [tried.case.truth for tried in trial.tried] for trial in hear(vqa).trials}
        for name in WRITING:
            assert set(trials[name]) == ({0.0} if vqa is No else set())
        assert set(trials["counting"]) == ({1.0} if vqa is Yes else set())
        assert len(trials["jpeg"]) == PROMPTS


def test_mistakes_of_either_kind_are_shown_as_such(hear, find):
    for vqa in (Yes, No):
        shown = view("run", hear(vqa), find(vqa), 3, 64)
        made, none = (shown.false_yes, shown.false_no) if vqa is Yes else (shown.false_no, shown.false_yes)
        assert none == ()
        assert len(made) == 3
        assert all(any(answer.wrong for answer in mistake.evidence) for mistake in made)
        assert {mistake.said for mistake in made} == {"yes" if vqa is Yes else "no"}
        assert all(mistake.sure == pytest.approx(expit(3)) for mistake in made)
    origins = {mistake.origin for mistake in view("run", hear(No), find(No), 64, 64).false_no}
    assert "rendered for the prompt" in origins
    assert "rendered with one thing changed" not in origins


def test_the_better_of_two_pictures_stands_on_either_side(hear):
    labels = [pair.label for pair in hear(Eye).pairs]
    assert abs(np.mean(labels) - 0.5) < 0.05


@pytest.fixture(scope="module")
def watch(cases, config):
    """A judge's findings on 24 clips, and what the page shows of them."""
    few, clips = ShapesCases(cases.cases[:4]), shapes_clips(config, 12, 4)

    @cache
    def watched(vqa):
        heard = examine(QuestionJudge(vqa(), shows_and_exists), few, 4, 0, Progress(visible=False), clips)
        return findings(heard).clips, view("run", heard, findings(heard), 2, 64).clips

    return watched


def test_clips_are_twins_of_held_out_prompts_broken_in_every_way(config):
    clips = shapes_clips(config, 12, 4)
    assert [all(case.shows) for case in clips] == [True, False] * 12
    assert all(whole.prompt == broken.prompt for whole, broken in zip(clips[::2], clips[1::2], strict=True))
    assert {case.how for case in clips} == {"vanishes", "shape", "colour", "crosses"}
    assert {parse(case.prompt).split for case in clips} == {"eval"}
    assert shapes_clips(config, 12, 4) == clips


def test_an_honest_judge_can_tell_a_broken_clip(watch):
    found, shown = watch(Eye)
    assert found.frames == 4
    assert found.throughout.balanced.value == found.throughout.auc.value == 1
    assert {kind.balanced.value for kind in found.by_how.values()} == {1.0}
    (example,) = shown
    assert (example.said, example.right) == ("no", True)
    assert example.how
    assert not all(follows for _, follows in example.frames)
    assert not any(answer.wrong for answer in example.evidence)


def test_a_judge_that_sees_no_colours_misses_their_change_only(watch):
    found, shown = watch(ColourBlind)
    assert found.throughout.follow.value == 1
    assert {how: kind.stray.value for how, kind in found.by_how.items() if how != "crosses"} == {
        "vanishes": 1.0,
        "shape": 1.0,
        "colour": 0.0,
    }
    assert "an object takes another colour" in {strip.how for strip in shown}
    assert all(strip.said == "yes" and not strip.right and len(strip.frames) == 4 for strip in shown)
    assert all(any(answer.wrong for answer in strip.evidence) for strip in shown)


def test_most_of_the_time_is_less_than_throughout(watch):
    found, shown = watch(Yes)
    assert found.throughout.follow.count == found.throughout.stray.count == 12
    assert found.mostly.follow.count > 12 > found.mostly.stray.count > 0
    assert found.mostly.balanced.value == found.throughout.balanced.value == 0.5
    assert len(shown) == 2
    assert watch(Eye)[0].mostly.follow.value > 0.9


@pytest.fixture
def noisy():
    """Margins of 300 pictures of 100 prompts, more or less right."""
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.3).astype(float)
    prompts = np.repeat([f"prompt {i}" for i in range(100)], 3)
    return (2 * (2 * truth - 1) + rng.normal(0, 2, 300)).round(1), truth, prompts


def test_estimates_are_those_of_the_textbooks(noisy):
    margin, truth, prompts = noisy
    found, calibrated = accuracy(margin, truth, prompts), calibration(margin, truth, prompts)
    assert found.balanced.value == pytest.approx(balanced_accuracy_score(truth, margin > 0))
    assert found.auc.value == pytest.approx(roc_auc_score(truth, margin))
    assert found.plain.value == pytest.approx(np.mean((margin > 0) == truth))
    assert found.balanced.value == pytest.approx((found.follow.value + found.stray.value) / 2)
    assert calibrated.ece.value == pytest.approx(rewards.metrics.ece(expit(margin), truth))
    for estimate in (*vars(found).values(), calibrated.ece, calibrated.temperature):
        assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_copies_of_a_picture_prove_nothing_more(noisy):
    once, often = (
        [*vars(accuracy(*data)).values(), calibration(*data).ece, calibration(*data).temperature]
        for data in (noisy, [np.repeat(column, 5) for column in noisy])
    )
    for one, many in zip(once, often, strict=True):
        np.testing.assert_allclose(one.interval, many.interval, rtol=1e-6)
        assert many.count == 5 * one.count


def test_intervals_hold_what_they_promise():
    """Of judges whose true accuracy and AUC are known, and who share a mood over the pictures of a prompt."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 4)
    true = {"balanced": norm.cdf(1 / np.sqrt(2)), "auc": norm.cdf(1)}
    estimates = {name: [] for name in true}
    for _ in range(30):
        truth = (rng.random(len(prompts)) < 0.4).astype(float)
        margin = 2 * truth - 1 + rng.normal(0, 1, 60)[prompts] + rng.normal(0, 1, len(prompts))
        found = accuracy(margin, truth, prompts)
        for name, made in estimates.items():
            made.append((getattr(found, name).value, *getattr(found, name).interval))
    for name, value in true.items():
        values, low, high = np.array(estimates[name]).T
        assert np.mean((low <= value) & (value <= high)) > 0.85
        assert np.mean(high - low) == pytest.approx(2 * 1.96 * values.std(), rel=0.35)


def test_the_temperature_that_made_the_truth_is_found():
    margin = np.random.default_rng(0).normal(0, 4, 300)
    found = calibration(margin, expit(margin / 2.5), np.arange(300))
    assert found.temperature.value == pytest.approx(2.5, rel=1e-3)
    assert found.scaled_ece.value < 1e-3 < found.ece.value
    reversed_ = calibration(margin, expit(-margin), np.arange(300))
    assert reversed_.temperature.value is None
    assert "do not follow" in reversed_.note


def test_little_evidence_is_called_little():
    right, one = np.ones(40), np.array(["one prompt"] * 40)
    assert share(right, np.arange(40)).interval == rewards.metrics.wilson_interval(40, 40)
    assert share(right, one).interval == rewards.metrics.wilson_interval(1, 1)
    assert share(np.arange(40) % 2, one).interval is None
    nothing = share(np.full(40, np.nan), one)
    assert (nothing.value, nothing.interval, nothing.count) == (None, None, 0)
    found = accuracy(np.array([1.0, -1.0, np.nan]), np.array([1.0, 1.0, 0.0]), np.array(["a", "b", "c"]))
    assert found.balanced.value is found.auc.value is found.stray.value is None
    assert found.plain.value == found.follow.value == 0.5
    torn = accuracy(np.array([1.0, 1.0]), np.array([0.5, 0.9]), np.array(["a", "b"]))
    assert torn.plain.count == 1


class Bright:
    """Says whether a picture is bright; of dark prompts whether it is dark."""

    id, template = "bright", "{}"

    def score(self, images, prompts):
        return [
            Verdict((image.mean() - 128) / 20 * (1 if "bright" in prompt else -1), (), self.id, self.template)
            for image, prompt in zip(images, prompts, strict=True)
        ]


def plain(value, size=(48, 40)):
    return png(np.full((*size, 3), value, np.uint8))


@pytest.fixture
def table(tmp_path):
    """Twelve good rows of labels as JSONL, and bad ones of every kind in between."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "cut.png").write_bytes(png(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))[:200])
    Image.new("I;16", (4, 4)).save(folder / "deep.png")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    rows = []
    for i in range(12):
        bright = i % 2 == 0
        (folder / f"{i}.png").write_bytes(plain(220 if bright else 30))
        verdict = [True, "No", 1, False, 0.9, 0][i] if i < 6 else ("yes" if bright else "no")
        rows.append({"image": f"pictures/{i}.png", "prompt": f"a bright <b>picture</b> {i}", "verdict": verdict})
    good = rows[0]
    bad = [
        good | {"image": "pictures/cut.png"},
        good | {"image": "pictures/deep.png"},
        good | {"image": "pictures/moving.webp"},
        good | {"image": "pictures/missing.png"},
        good | {"image": None},
        good | {"prompt": "  "},
        good | {"verdict": "maybe"},
        good | {"verdict": 1.5},
        good | {"verdict": float("nan")},
        good | {"skill": 3},
        {"image": "pictures/0.png"},
        ["a", "list"],
    ]
    lines = [*map(json.dumps, rows[:6]), *map(json.dumps, bad), "{broken", "", *map(json.dumps, rows[6:])]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_listed_and_good_ones_go_on(table):
    found = read_labels(table)
    assert [case.truth for case in found.cases[:6]] == [1, 0, 1, 0, 0.9, 0]
    assert len(found.cases) == 12
    reasons = {refused.row: refused.reason for refused in found.refused}
    assert list(reasons) == list(range(7, 20))
    wanted = [
        r"cut\.png: is truncated or damaged",
        r"deep\.png: has 16 bits",
        r"moving\.webp: is animated, 2 frames",
        r"image: pictures/missing\.png is not there",
        "image: is missing",
        "prompt: is empty",
        "verdict: 'maybe' is neither yes nor no nor a number from 0 to 1",
        "verdict: 1.5 is neither",
        "verdict: nan is neither",
        "skill: 3 is not text",
        "prompt: is empty",
        "is no row but list",
        "broken JSON",
    ]
    for reason, pattern in zip(reasons.values(), wanted, strict=True):
        assert re.search(pattern, reason), reason


def test_parquet_holds_bytes_structs_or_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(plain(200))
    rows = {"prompt": ["bright", "dark"], "verdict": [1.0, 0.0]}
    images = {
        "bytes": [plain(200), b"no picture"],
        "path": ["a.png", "b.png"],
        "struct": [{"bytes": plain(200), "path": None}, {"bytes": None, "path": "b.png"}],
    }
    for name, column in images.items():
        datasets.Dataset.from_dict({"image": column, **rows}).to_parquet(tmp_path / f"{name}.parquet")
        found = read_labels(tmp_path / f"{name}.parquet")
        assert found.cases[0].image().mean() == 200
        assert [refused.row for refused in found.refused] == [2]


def test_a_table_that_cannot_be_used_is_named(tmp_path, table, config):
    def refusal(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_labels(tmp_path / name)
        return str(error.value)

    assert "tables are read from .parquet, .jsonl, .json, not .csv" in refusal("labels.csv", b"")
    assert "broken Parquet" in refusal("labels.parquet", b"nothing")
    assert "no row can be used; it is empty" in refusal("empty.jsonl", b"")
    bad = b'{"image": "a.png", "prompt": "", "verdict": 1}\n'
    assert "no row can be used; row 1: prompt: is empty" in refusal("bad.jsonl", bad)
    datasets.Dataset.from_dict({"image": ["a"], "text": ["b"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet: no column 'prompt'; it has image, text"):
        read_labels(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file"):
        read_labels(tmp_path / "absent.jsonl")
    files = config.model_copy(update={"prompts": type("Files", (), {"type": "file"})()})
    with pytest.raises(UserError, match=r"prompts\.type: .* audit with a table of human labels"):
        shapes_cases(files, 6, "cpu")


def test_labels_are_audited_into_a_page_that_reaches_for_nothing(table, config):
    labelled = config.model_copy(update={"name": "labelled"})
    found = audit(labelled, table, Bright())
    folder = run_dir(labelled) / "audit"
    numbers, page = json.loads((folder / "audit.json").read_text()), (folder / "index.html").read_text()
    assert found.accuracy.plain.value == 1
    assert numbers["accuracy"]["plain"]["count"] == 12
    assert numbers["material"]["refused"][0] == asdict(found.material.refused[0])
    assert found.material.refused[0].row == 7
    assert found.wordings is found.order is found.clips is None  # such a judge asks no questions
    assert {probe.name for probe in found.probes} >= WRITING
    assert "negation" not in behaved(found)
    assert "13 rows of the table were left out" in page
    assert "&lt;b&gt;picture" in page
    assert "<b>picture" not in page
    assert not re.findall(r"https?:|<script|<link|url\((?!#)", page)
    assert set(re.findall(r'src="([^:"]*:)', page)) == {"data:"}
    assert numbers["conclusion"]["claim"] in page.replace("&#39;", "'")
    audit(labelled, table, Bright())
    assert (folder / "index.html").read_text() == page


def test_the_judge_of_a_run_is_audited_on_the_embedded_world(config):
    found = audit(config.model_copy(update={"audit": AuditConfig(prompts=6, probed=6, clips=4, mistakes=2)}))
    page = (run_dir(config) / "audit" / "index.html").read_text()
    assert found.material.pictures == found.accuracy.plain.count == 24
    assert found.repeated.agreement.value == 1
    assert len(found.by_skill) == 6
    assert len(found.by_origin) == 4
    assert found.clips.throughout.plain.count == 8
    assert 'class="strip"' in page
    assert page.count('class="mistake"') >= 1
    assert 'aria-label="Probability that the judge gave' in page


def test_a_judge_that_never_answers_is_told_from_one_that_says_no(config, cases):
    class Dead:
        id, template = "dead", "{}"

        def score(self, images, prompts):
            return [Verdict(np.nan, (), self.id, self.template, False, "server is down") for _ in prompts]

    heard = examine(Dead(), cases, PROMPTS, 0, Progress(visible=False))
    found = findings(heard)
    assert found.invalid.reasons == {"server is down": len(cases.cases)}
    assert found.accuracy.plain.value is found.pairs.value is found.calibration.ece.value is None
    assert {probe.status for probe in found.probes} == {"untried"}
    said = conclusion(found)
    assert "cannot be told" in said.claim
    assert any("server is down" in caution for caution in said.cautions)

"""The report, made from a small run whose every number is known here."""

import base64
import io
import json
import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest
from PIL import Image

from judges.shapes.grammar import SKILLS, sample_prompt
from judges.shapes.render import render as paint
from judges.shapes.render import scene_of
from pipeline.report import choices, figures, pictures, words
from pipeline.report.view import render, view
from pipeline.report.watched import watched
from pipeline.runner import Context
from pipeline.settings import Section
from pipeline.stages.report import REPORT, ReportConfig
from pipeline.store import Artifact, fingerprint, read_rows, write_rows
from rewards.metrics.probabilities import Bin

IMAGE_ROWS = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "image": datasets.Image(),
    }
)
EVALUATE = datasets.Features(
    {
        "model": datasets.Value("string"),
        **IMAGE_ROWS,
        "judge": datasets.Value("float32"),
        "judge_valid": datasets.Value("bool"),
        "reward": datasets.Value("float32"),
        "gold": datasets.Value("bool"),
    }
)
PAIRS = datasets.Features(
    {
        **{name: datasets.Value("string") for name in ("prompt_id", "prompt", "skill")},
        **{name: datasets.Value("int32") for name in ("sample_a", "sample_b")},
        **{name: datasets.Value("float32") for name in ("label", "reward_a", "reward_b", "preference")},
        **{name: datasets.Value("bool") for name in ("gold_a", "gold_b")},
    }
)
CURVES = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        "reward": datasets.Value("float32"),
        "gold": datasets.Value("float32"),
        "images": datasets.Value("int32"),
    }
)
TRAINING = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        **{
            name: datasets.Value("float32")
            for name in ("reward_mean", "reward_std", "kl", "loss", "grad_norm", "clip_fraction")
        },
        "groups": datasets.Value("int32"),
        "groups_dropped": datasets.Value("int32"),
    }
)
SKILL_PROMPTS = 6
ITERATIONS = 40


class Config(Section):
    name: str = "shapes"
    report: ReportConfig = ReportConfig()


def picture_of(prompt, rng, follows):
    """A painted image that follows `prompt`, or another prompt of its skill."""
    wanted = prompt
    while not follows and wanted.key == prompt.key:
        wanted = sample_prompt(rng, skill=prompt.skill)
    return Image.fromarray(paint([scene_of(wanted, rng)])[0])


def make_prompts(rng):
    return [
        (f"{skill}-{number}", sample_prompt(rng, skill=skill)) for number in range(SKILL_PROMPTS) for skill in SKILLS
    ]


def evaluate_rows(rng, prompts, gold, shares):
    rows = []
    for model, share in shares.items():
        for prompt_id, prompt in prompts:
            # The higher sample comes first: the report must not rely on the order within a prompt.
            for sample in (1, 0):
                right = rng.random() < share
                judged = right if rng.random() < 0.9 else not right
                rows.append(
                    {
                        "model": model,
                        "prompt_id": prompt_id,
                        "prompt": prompt.text,
                        "skill": prompt.skill,
                        "sample": sample,
                        "image": picture_of(prompt, rng, right),
                        "judge": rng.uniform(0.1, 4.0) * (1 if judged else -1),
                        "judge_valid": rng.random() < 0.98,
                        "reward": rng.gauss(1.0 if right else 0.0, 0.5),
                        "gold": right if gold else None,
                    }
                )
    return rows


def pair_rows(rng, rows, gold):
    pairs = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        label = rng.random()
        reward = 4 * (label - 0.5) + rng.gauss(0, 1.5)
        pairs.append(
            {
                **{name: first[name] for name in ("prompt_id", "prompt", "skill")},
                "sample_a": first["sample"],
                "sample_b": second["sample"],
                "label": label,
                "reward_a": reward,
                "reward_b": 0.0,
                "preference": 1 / (1 + np.exp(-reward)),
                "gold_a": rng.random() < 0.5 if gold else None,
                "gold_b": rng.random() < 0.5 if gold else None,
            }
        )
    return pairs


def metrics_of(rows, gold):
    def mean(values):
        return float(np.mean(values))

    def share(mine):
        value = mean([row["gold"] for row in mine]) if gold else None
        interval = [max(0.0, value - 0.05), min(1.0, value + 0.05)] if gold else None
        return {"gold": value, "interval": interval, "images": len(mine)}

    def side(model):
        mine = [row for row in rows if row["model"] == model]
        per_skill = {skill: share([row for row in mine if row["skill"] == skill]) for skill in SKILLS}
        return {
            **share(mine),
            "per_skill": per_skill if gold else None,
            "judge": mean([row["judge"] > 0 for row in mine]),
            "reward": mean([row["reward"] for row in mine]),
        }

    accuracy = {"judge": 0.9, "judge_interval": [0.88, 0.92], "initial_judge": 0.7}
    accuracy |= (
        {"gold": 0.88, "gold_interval": [0.85, 0.91], "initial_gold": 0.71}
        if gold
        else {
            "gold": None,
            "gold_interval": None,
            "initial_gold": None,
        }
    )
    return {
        "generator": {"base": side("base"), "tuned": side("tuned")},
        "reward": {
            "accuracy": accuracy,
            "pairs": 1200,
            "gold_pairs": 600 if gold else 0,
            "nll": 0.31,
            "brier": 0.08,
            "ece": 0.021,
            "reliability": [
                {"predicted": 0.55 + 0.1 * step, "observed": 0.53 + 0.1 * step, "pairs": 40 + 60 * step}
                for step in range(5)
            ],
        },
        "judge": {
            "accuracy": {"gold": 0.93, "interval": [0.91, 0.95]} if gold else {"gold": None, "interval": None},
            "images": len(rows),
        },
    }


def finished(folder, fill=lambda artifact: None):
    artifact = Artifact(folder)
    artifact.begin(folder.name * 8)
    fill(artifact)
    artifact.finish({}, extra={"stage": folder.name, "depends": {folder.name: {"seed": 0, "why": "<b>"}}})
    return artifact


def make_run(folder, gold=True, tuned=0.8, prompt=None, size=32):
    """A finished run directory up to `evaluate`; its inputs by stage."""
    rng = random.Random(0)
    prompts = make_prompts(rng)
    samples = [
        {
            "prompt_id": prompt_id,
            "prompt": meaning.text,
            "skill": meaning.skill,
            "sample": sample,
            "image": picture_of(meaning, rng, rng.random() < 0.5),
        }
        for prompt_id, meaning in prompts
        for sample in range(2)
    ]
    rows = evaluate_rows(rng, prompts, gold, {"base": 0.4, "tuned": tuned})
    pairs = pair_rows(rng, samples, gold)
    for row in rows:
        row["prompt"] = prompt or row["prompt"]
        row["image"] = row["image"].resize((size, size))

    def fill_sample(artifact):
        write_rows(artifact, "shard-00000.parquet", samples[:30], IMAGE_ROWS)
        write_rows(artifact, "shard-00001.parquet", samples[30:], IMAGE_ROWS)

    def fill_finetune(artifact):
        noise = np.random.default_rng(0).normal(size=(3, ITERATIONS))
        curves = [
            dict.fromkeys(TRAINING, 0) | {"iteration": i, "kl": 0.01 * i, "grad_norm": 1 + 0.3 * abs(noise[0, i])}
            for i in range(ITERATIONS)
        ]
        write_rows(artifact, "curves-00000.parquet", curves[:25], TRAINING)
        write_rows(artifact, "curves-00001.parquet", curves[25:], TRAINING)

    def fill_evaluate(artifact):
        noise = np.random.default_rng(1).normal(size=(2, ITERATIONS))
        curves = [
            {
                "iteration": i,
                "reward": 0.1 + 0.02 * i + 0.05 * noise[0, i],
                "gold": 0.4 + 0.01 * i + 0.04 * noise[1, i] if gold and i % 2 == 0 else None,
                "images": 48,
            }
            for i in range(ITERATIONS)
        ]
        artifact.write_text("metrics.json", json.dumps(metrics_of(rows, gold)))
        write_rows(artifact, "shard-00000.parquet", rows[:50], EVALUATE)
        write_rows(artifact, "shard-00001.parquet", rows[50:], EVALUATE)
        write_rows(artifact, "pairs.parquet", pairs, PAIRS)
        write_rows(artifact, "curves.parquet", curves, CURVES)

    fills = {"sample": fill_sample, "finetune": fill_finetune, "evaluate": fill_evaluate}
    return {name: finished(folder / name, fills.get(name, lambda artifact: None)) for name in REPORT.needs}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def shown(inputs):
    return view("shapes", inputs, 4, 8, 384)


@pytest.fixture(scope="module")
def page(shown):
    return render(shown)


@pytest.fixture(scope="module")
def rows(inputs):
    return list(read_rows(inputs["evaluate"]))


def text_of(html):
    plain = re.sub(r"<[^>]*>", " ", html).replace("\xa0", " ").replace("\N{EN DASH}", "-")
    return " ".join(plain.split())


def pixels(picture):
    data = base64.b64decode(picture.uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_stage_writes_the_page_and_nothing_twice(inputs, page, tmp_path):
    artifact = Artifact(tmp_path / "report")
    artifact.begin("digest")
    context = Context(Config(), artifact, inputs)
    REPORT.run(context)
    assert artifact.path("index.html").read_text() == page
    written = artifact.path("index.html").stat().st_mtime_ns
    REPORT.run(context)
    assert artifact.path("index.html").stat().st_mtime_ns == written


def test_the_stage_depends_on_all_that_the_page_shows_besides_its_inputs():
    def digest(**changes):
        return fingerprint(REPORT.depends(Config(**changes)))

    settings = (
        {"name": "other"},
        *({"report": ReportConfig(**{name: 32})} for name in ReportConfig.model_fields),
    )
    assert len({digest(), *(digest(**change) for change in settings)}) == 2 + len(ReportConfig.model_fields)


def test_the_same_work_gives_the_same_bytes(inputs, page, tmp_path):
    again = make_run(tmp_path)
    assert render(view("shapes", again, 4, 8, 384)) == page


def test_the_page_reaches_for_nothing(page):
    own = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", page)
    assert not re.findall(r"https?:|//|@import|<script|<link|<iframe|\son\w+=", own)
    assert {source.partition(",")[0] for source in re.findall(r'(?:src|href)="([^#][^"]*)"', page)} == {
        "data:image/png;base64"
    }
    assert set(re.findall(r"url\((.)", page)) == {"#"}


def test_every_reference_inside_the_page_has_one_target(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(name, "") for name in ids} | {
        ("", name) for name in ids
    }


def test_examples_are_the_same_prompt_and_sample_before_and_after(shown, rows, page):
    by_key = {(row["model"], row["prompt_id"], row["sample"]): row for row in rows}
    assert [gallery.skill for gallery in shown.galleries] == list(SKILLS)
    for gallery in shown.galleries:
        firsts = dict.fromkeys(row["prompt_id"] for row in rows if row["skill"] == gallery.skill)
        assert [example.prompt_id for example in gallery.examples] == list(firsts)[:4]
        for example in gallery.examples:
            assert example.sample == 0
            for model in ("base", "tuned"):
                row = by_key[model, example.prompt_id, 0]
                side = getattr(example, model)
                assert (example.prompt, side.gold) == (row["prompt"], row["gold"])
                assert np.array_equal(pixels(side.picture), np.asarray(row["image"]))
    cards = re.findall(r'<figure class="example" data-prompt="([^"]*)".*?</figure>', page, re.DOTALL)
    assert cards == [example.prompt_id for gallery in shown.galleries for example in gallery.examples]


def test_marks_tell_right_from_wrong(shown, page):
    cards = re.findall(r'<figure class="example".*?</figure>', page, re.DOTALL)
    examples = [example for gallery in shown.galleries for example in gallery.examples]
    marks = [re.findall("[✓✗]", card) for card in cards]
    assert marks == [["✓" if side.gold else "✗" for side in (each.base, each.tuned)] for each in examples]


def test_duels_are_the_strongest_contradictions(shown, inputs):
    pairs = read_rows(inputs["evaluate"], "pairs.parquet").to_list()
    reward = [pair["preference"] for pair in pairs]
    gaps = sorted(
        abs(pair["label"] - p) for pair, p in zip(pairs, reward, strict=True) if (pair["label"] > 0.5) != (p > 0.5)
    )
    assert len(gaps) > 8
    assert [abs(duel.judge - duel.reward) for duel in shown.duels] == pytest.approx(gaps[::-1][:8])
    images = {(row["prompt_id"], row["sample"]): row["image"] for row in read_rows(inputs["sample"])}
    by_label = {pair["label"]: pair for pair in pairs}
    for duel in shown.duels:
        pair = by_label[duel.judge]
        assert duel.prompt == pair["prompt"]
        for side, which in ((duel.a, "a"), (duel.b, "b")):
            image = images[pair["prompt_id"], pair[f"sample_{which}"]]
            assert np.array_equal(pixels(side.picture), np.asarray(image))
            assert side.gold == pair[f"gold_{which}"]


def test_misjudged_are_the_surest_valid_verdicts_against_gold(shown, rows):
    valid = [row for row in rows if row["judge_valid"]]
    wrong = sorted(abs(row["judge"]) for row in valid if (row["judge"] > 0) != row["gold"])
    assert [abs(wrong.margin) for wrong in shown.misjudged] == wrong[::-1][:8]
    assert all((wrong.margin > 0) != wrong.shown.gold for wrong in shown.misjudged)


def test_an_invalid_verdict_is_no_disagreement():
    row = {"judge": 9.0, "judge_valid": False, "gold": False, "model": "base", "prompt_id": "p", "sample": 0}
    assert choices.judge_against_gold([row], 8) == []
    assert choices.judge_against_gold([row | {"judge_valid": True}], 8) == [row | {"judge_valid": True}]
    assert [(line.no, line.silent) for line in words.judge_lines([row])] == [(None, 1), (None, 0)]


def test_the_order_of_disagreements_does_not_depend_on_that_of_the_rows(rows, inputs):
    pairs = read_rows(inputs["evaluate"], "pairs.parquet").to_list()
    tied = [pair | {"label": round(pair["label"]), "preference": 0.525} for pair in pairs]
    sure = [row | {"judge": 1.0} for row in rows]
    assert choices.reward_against_judge(tied, 5) == choices.reward_against_judge(tied[::-1], 5)
    assert choices.judge_against_gold(sure, 5) == choices.judge_against_gold(sure[::-1], 5)


def test_the_numbers_on_the_page_are_those_of_the_metrics(shown, page):
    text = text_of(page)
    base, tuned = shown.metrics["generator"]["base"], shown.metrics["generator"]["tuned"]
    assert f"prompt: {100 * base['gold']:.0f} % → {100 * tuned['gold']:.0f} % (+" in text
    for skill in SKILLS:
        before, after = base["per_skill"][skill], tuned["per_skill"][skill]
        row = f"{skill.replace('_', ' ')} {100 * before['gold']:.1f} % "
        row += f"{100 * before['interval'][0]:.1f}-{100 * before['interval'][1]:.1f} {100 * after['gold']:.1f} %"
        assert row in text
    assert "the judge 70.0 % 90.0 % 88.0-92.0 1,200 gold 71.0 % 88.0 % 85.0-91.0 600" in text
    assert "balanced accuracy is 93.0 % 91.0-95.0 on 144 images" in text


def test_a_world_without_gold_has_a_page_without_gold(tmp_path):
    shown = view("photos", make_run(tmp_path, gold=False), 4, 8, 384)
    page = render(shown)
    assert "in the eyes of the judge" in shown.headline.claim
    assert not shown.misjudged
    assert shown.duels
    assert not re.search(r"[✓✗]|\bNone\b|\bnan\b", text_of(page))
    assert "(gold)" not in page


def test_a_prompt_cannot_become_markup(tmp_path):
    hostile = "<script>alert(1)</script> \"' onerror=x"
    page = render(view("<b>run", make_run(tmp_path, prompt=hostile), 1, 1, 384))
    assert "<script" not in page
    assert "<b>run" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#34;&#39; onerror=x" in page


def test_settings_and_fingerprints_are_on_the_page(page, inputs):
    assert "finetune:\n    seed: 0\n    why: &lt;b&gt;" in page
    for artifact in inputs.values():
        assert artifact.fingerprint in page


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("0000000000", "1111111110", "better"),
        ("1111111110", "0000000000", "worse"),
        ("0101010101", "1010101010", "Chance"),
    ],
)
def test_the_headline_says_what_happened(before, after, verdict):
    rows = [
        {"model": model, "prompt_id": str(place), "sample": 0, "gold": flag == "1"}
        for model, flags in (("base", before), ("tuned", after))
        for place, flag in enumerate(flags)
    ]
    generator = {
        "base": {"gold": before.count("1") / 10, "judge": 0.5, "reward": 0.0},
        "tuned": {"gold": after.count("1") / 10, "judge": 0.9, "reward": 1.0},
    }
    headline = words.headline(generator, words.paired_change(rows))
    assert verdict in headline.reading
    assert ("only the score is better" in headline.reading) == (verdict != "better")
    assert f"{before.count('1')}0\xa0%".lstrip("0") in headline.claim


def test_the_interval_counts_prompts_rather_than_samples():
    def rows(samples):
        return [
            {"model": model, "prompt_id": prompt, "sample": sample, "gold": model == "tuned" and prompt < "3"}
            for model in ("base", "tuned")
            for prompt in "0123456"
            for sample in range(samples)
        ]

    once, often = words.paired_change(rows(1)), words.paired_change(rows(50))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (once.images, once.mended, often.images, often.mended) == (7, 3, 350, 150)
    # Student with 6 degrees of freedom: 2.447 times the deviation sqrt(2/7) over sqrt(7).
    assert once.high - once.low == pytest.approx(2 * 2.447 * (2 / 7) ** 0.5 / 7**0.5, abs=1e-3)


def test_the_interval_lies_around_the_change_of_all_images():
    rows = [
        {"model": model, "prompt_id": prompt, "sample": sample, "gold": model == "tuned" and prompt == "often"}
        for model in ("base", "tuned")
        for prompt, samples in {"often": 90, "a": 5, "b": 5}.items()
        for sample in range(samples)
    ]
    change = words.paired_change(rows)
    assert (change.low + change.high) / 2 == pytest.approx(0.9)
    # Three prompts say little, however many images the first of them has.
    assert change.high - change.low > 0.5


def test_one_prompt_proves_nothing():
    rows = [{"model": m, "prompt_id": "p", "sample": 0, "gold": m == "tuned"} for m in ("base", "tuned")]
    change = words.paired_change(rows)
    assert (change.low, change.high) == (-1, 1)


def test_points_are_those_of_the_percentages_shown():
    assert words.points(0.454, 0.706) == "+26"
    assert words.points(0.706, 0.454) == "\N{MINUS SIGN}26"
    assert words.points(0.5, 0.5) == "0"
    assert words.points(None, 0.5) == words.percent(None)


def test_smoothing_keeps_a_constant_and_fills_gaps():
    values = np.full(90, 3.0)
    values[::2] = np.nan
    assert figures.smooth(values) == pytest.approx(np.full(90, 3.0))
    noise = np.random.default_rng(0).normal(size=300)
    assert figures.smooth(noise).std() < 0.4 * noise.std()
    assert np.isnan(figures.smooth(np.full(5, np.nan))).all()


def test_figures_are_sound_xml_in_the_colours_of_the_page():
    bins = [Bin(0.2, 0.3, 5), Bin(0.8, 0.7, 50)]
    for svg in (
        figures.reliability(bins),
        figures.progress([0], [1.0], [None]),
        figures.steps([0, 1], [0, 1], [1, 2]),
    ):
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        assert root.tag == "svg"
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", svg)) <= {
            "none",
            *(f"var(--{name}, {colour})" for name, colour in re.findall(r"var\(--(\w+), (#\w+)\)", svg)),
        }
    assert "gold" not in figures.progress([0], [1.0], [None])
    assert "gold" in figures.progress([0, 1], [1.0, 2.0], [0.5, None])


def test_large_images_shrink_and_tiny_ones_are_kept_to_the_pixel():
    def encoded(side):
        file = io.BytesIO()
        Image.effect_noise((side, side // 2), 80).convert("RGB").save(file, "PNG")
        return file.getvalue()

    tiny, large = encoded(32), encoded(900)
    kept, shrunk = pictures.picture(tiny, 384), pictures.picture(large, 384)
    assert base64.b64decode(kept.uri.partition(",")[2]) == tiny
    assert (kept.width, kept.height, kept.tiny) == (32, 16, True)
    assert shrunk.uri.startswith("data:image/jpeg;base64,")
    assert (shrunk.width, shrunk.height, shrunk.tiny) == (384, 192, False)
    assert pixels(shrunk).shape == (192, 384, 3)
    assert len(shrunk.uri) < len(large) / 4


def signal(name, value, alarm):
    return {"name": name, "value": value, "threshold": 0.5, "status": "alarm" if alarm else "ok"}


def story_of(stopped):
    """`finetune/signals.json` of a training that was watched at iterations 0, 20 and 40."""
    checks = [
        {
            "iteration": iteration,
            "alarms": ["judge_divergence"] if stopped and iteration else [],
            "signals": [
                signal("judge_divergence", value, stopped and iteration > 0),
                signal("brightness", 0.1, False),
                {"name": "kl_frontier", "value": None, "threshold": None, "status": "unknown"},
            ],
        }
        for iteration, value in ((0, 0.0), (20, 0.7), (40, 0.9))
    ]
    return {"checks": checks, "stopped": stopped, "kept": 20 if stopped else 40}


def test_a_training_that_was_stopped_is_told_at_the_top_and_one_that_was_not_below(shown):
    def page_of(stopped):
        found = watched(story_of(stopped))
        drawn = replace(shown.figures, signals=figures.signals(found.iterations, found.shares))
        return text_of(render(replace(shown, watched=found, figures=drawn)))

    line = "The training was stopped at iteration 40"
    stopped = page_of(True)
    assert stopped.index(line) < stopped.index("Before and after, in numbers")
    assert "judge divergence 0.90 0.50 20, 40" in stopped
    assert "KL frontier - -" in stopped
    calm = page_of(False)
    assert line not in calm
    assert "None of 3 signals went beyond" in calm


def test_a_training_that_nobody_watched_has_no_signs(shown, page):
    assert shown.watched is None
    assert "Signs that the reward was hacked" not in page

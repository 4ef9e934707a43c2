"""GenEval's prompts: the text alone gives the meaning of the published metadata, and the questions ask for it all."""

import json
import random
import re
from pathlib import Path

import pytest

from judges.geneval import CLASSES, SKILLS, Object, decompose, parse, sample_prompt
from judges.questions import checked_graph

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data/geneval.jsonl").read_text().splitlines()]
IRREGULAR = {"people": "person", "knives": "knife", "sheep": "sheep"}
NUMBERS = {"two": 2, "three": 3, "four": 4}
ASKED = {
    "exists": r"Is there an? (.+)\?|Are there any (.+)\?",
    "count": r"Are there exactly (two|three|four) (.+)\?",
    "relation": r"(?:Is|Are) the (.+) (to the left of|to the right of|above|below) the (.+)\?",
    "colour": r"(?:Is|Are) the (.+) (red|orange|yellow|green|blue|purple|pink|brown|black|white)\?",
}


def singular(word):
    candidates = (IRREGULAR.get(word), word, word.removesuffix("s"), word.removesuffix("es"))
    return next(name for name in candidates if name in CLASSES)


def fact(text):
    """What a question asks for, read from its wording by patterns that are not those that wrote it."""
    kind, found = next((kind, found) for kind, pattern in ASKED.items() if (found := re.fullmatch(pattern, text)))
    words = [word for word in found.groups() if word]
    match kind:
        case "exists":
            return kind, singular(words[0])
        case "count":
            return kind, singular(words[1]), NUMBERS[words[0]]
        case "relation":
            return kind, words[0], words[1].removeprefix("to the "), words[2]
    return kind, *words


def facts(row):
    """What the metadata ask for."""
    wanted = {("exists", found["class"]) for found in row["include"]}
    for found in row["include"]:
        if "color" in found:
            wanted.add(("colour", found["class"], found["color"]))
        if "position" in found:
            relation, place = found["position"]
            wanted.add(("relation", found["class"], relation, row["include"][place]["class"]))
    return wanted | {("count", found["class"], found["count"] - 1) for found in row.get("exclude", ())}


def test_the_text_of_every_prompt_gives_its_published_meaning():
    assert len(ROWS) == 553
    for row in ROWS:
        published = tuple(
            Object(f["class"], f["count"], f.get("color"), tuple(f["position"]) if "position" in f else None)
            for f in row["include"]
        )
        assert parse(row["prompt"]) == published
        counted = [{"class": found.name, "count": found.count + 1} for found in published if found.count > 1]
        assert counted == row.get("exclude", [])


def test_every_prompt_is_asked_about_entirely_and_nothing_else_is():
    for row in ROWS:
        questions = decompose(row["prompt"])
        found = [fact(question.text) for question in checked_graph(questions)]
        assert len(found) == len(set(found))
        assert set(found) == facts(row)


def test_existence_comes_first_and_is_the_parent_of_all_that_presumes_it():
    for row in ROWS:
        questions = decompose(row["prompt"])
        found = [fact(question.text) for question in questions]
        kinds = [kind for kind, *_ in found]
        assert kinds == sorted(kinds, key=lambda kind: kind != "exists")
        for question, (kind, *words) in zip(questions, found, strict=True):
            presumed = {"exists": [], "count": words[:1], "colour": words[:1], "relation": words[::2]}[kind]
            assert sorted(found[parent] for parent in question.parents) == sorted(("exists", w) for w in presumed)


def test_classes_are_those_of_the_metadata():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert set(CLASSES) == {found["class"] for row in ROWS for found in row["include"]}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a photo of a bench", {"Is there a bench?": ()}),
        ("a photo of four knifes", {"Are there any knives?": (), "Are there exactly four knives?": (0,)}),
        (
            "a photo of an orange orange and a green skis",
            {
                "Is there an orange?": (),
                "Are there any skis?": (),
                "Is the orange orange?": (0,),
                "Are the skis green?": (1,),
            },
        ),
        (
            "a photo of a dog right of a teddy bear",
            {
                "Is there a teddy bear?": (),
                "Is there a dog?": (),
                "Is the dog to the right of the teddy bear?": (1, 0),
            },
        ),
    ],
)
def test_questions_are_english(text, asked):
    assert {question.text: question.parents for question in decompose(text)} == asked


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "begin with 'a photo of '"),
        ("A photo of a bench", "begin with 'a photo of '"),
        ("a photo of a bensh", "did you mean 'a bench'"),
        ("a photo of a apple", "did you mean 'an apple'"),
        ("a photo of two bus", "did you mean 'two buses'"),
        ("a photo of a dog and two cats", "'two cats' is unknown"),
        ("a photo of a dog and a cat and a cow", "'a cat and a cow' is unknown"),
        ("a photo of qqqq", "it is no object"),
        ("a photo of a red dog and a blue dog", "names 'dog' twice"),
    ],
)
def test_what_the_grammar_does_not_hold_is_an_error_that_helps(text, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        decompose(text)


@pytest.mark.parametrize("skill", SKILLS)
def test_what_is_drawn_is_read_back_and_asks_for_its_skill(skill):
    rng = random.Random(0)
    for _ in range(200):
        meaning = parse(sample_prompt(rng, skill))
        assert len(meaning) == (2 if skill in ("two_object", "position", "color_attribution") else 1)
        assert all((found.colour is not None) == (skill in ("colors", "color_attribution")) for found in meaning)
        assert (meaning[0].count > 1) == (skill == "counting")
        assert (meaning[-1].position is not None) == (skill == "position")

"""Constitutions: strictly read, asked in full or drawn alike for siblings, turned into questions and comparisons."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from judges.base import Answer
from judges.constitution import Constitution, Principle, read_principles, shipped
from judges.pairwise import PairwiseJudge
from judges.questions import QuestionJudge, mean_margin

IMAGE = np.zeros((2, 2, 3), np.uint8)
COUNT = Principle("count", 'As many as in "{prompt}"?', weight=3)
MARKS = Principle("marks", "Is there a watermark?", "no", comparison='Which is cleaner, 1 or 2, of "{prompt}"?')


class Certain:
    """Answers each question with the margin for its text, and remembers the questions."""

    id, template, most_images = "certain", "{}", 2

    def __init__(self, **margins: float):
        self.margins, self.asked = margins, []

    def ask(self, samples, questions):
        self.asked += questions
        return [[Answer(q.text, self.margins.get(q.text.split()[0], 0.0)) for q in asked] for asked in questions]


@pytest.fixture
def file(tmp_path: Path):
    def written(text: str) -> Path:
        (tmp_path / "rules.yaml").write_text(text)
        return tmp_path / "rules.yaml"

    return written


def test_a_principle_asks_about_one_sample_and_about_two():
    asked, compared = COUNT.asked("two {odd} rings"), COUNT.compared("two {odd} rings")
    assert (asked.text, asked.choices, asked.expected) == ('As many as in "two {odd} rings"?', ("yes", "no"), "yes")
    assert (compared.choices, compared.expected, compared.weight) == (("1", "2"), "1", 3)
    assert compared.text == (
        'For which image is "yes" the truer answer to this, image 1 or image 2? As many as in "two {odd} rings"?'
    )
    assert MARKS.asked("x").expected == "no"
    assert MARKS.compared("x").text == 'Which is cleaner, 1 or 2, of "x"?'


def test_all_principles_are_asked_and_their_margins_averaged_by_weight():
    vqa = Certain(As=2.0, Is=-4.0)
    judge = QuestionJudge(vqa, Constitution([COUNT, MARKS]), mean_margin)
    assert judge.score([IMAGE], ["two rings"])[0].margin == pytest.approx((3 * 2.0 - 4.0) / 4)
    assert [question.expected for question in vqa.asked[0]] == ["yes", "no"]


def test_a_pairwise_judge_compares_by_the_wordings():
    vqa = Certain(Which=1.0, For=1.0)
    verdict = PairwiseJudge(vqa, Constitution([COUNT, MARKS]).wordings).compare([IMAGE], [IMAGE], ["two rings"])[0]
    assert verdict.margin == pytest.approx(1.0)
    assert [len(asked) for asked in vqa.asked] == [2, 2]


def test_siblings_are_held_against_the_same_principles_and_prompts_against_different_ones():
    ten = [Principle(f"p{number}", f"{number}?") for number in range(10)]
    prompts = [f"prompt {number}" for number in range(50)]
    drawn = {prompt: Constitution(ten, "drawn", 3, seed=1)(prompt) for prompt in prompts}
    again = {prompt: Constitution(ten, "drawn", 3, seed=1)(prompt) for prompt in reversed(prompts)}
    assert again == drawn
    assert {len({question.text for question in questions}) for questions in drawn.values()} == {3}
    assert len({tuple(q.text for q in questions) for questions in drawn.values()}) > 20
    assert {prompt: Constitution(ten, "drawn", 3, seed=2)(prompt) for prompt in prompts} != drawn
    constitution = Constitution(ten, "drawn", 3, seed=1)
    of = [principle.name for principle in constitution.of("prompt 0")]
    assert [question.text.split()[-1] for question in constitution.wordings("prompt 0")] == [f"{n[1:]}?" for n in of]


def test_principles_are_drawn_as_often_as_they_weigh_and_then_count_alike():
    constitution = Constitution([COUNT, MARKS], "drawn")
    drawn = [constitution(f"prompt {number}") for number in range(4000)]
    share = Counter(question.expected for (question,) in drawn)["yes"] / 4000
    assert share == pytest.approx(3 / 4, abs=0.03)
    assert {question.weight for (question,) in drawn} == {1.0}


def test_drawing_all_is_asking_all():
    ten = [Principle(f"p{number}", f"{number}?") for number in range(10)]
    assert Constitution(ten, "drawn", 10)("a") == Constitution(ten)("a")


def test_a_file_is_read_with_its_defaults_and_a_bare_no_is_an_answer(file):
    path = file("- {name: a, question: 'Is it {prompt}?'}\n- {name: b, question: 'Bad?', expected: no, weight: 2}\n")
    assert read_principles(path) == (Principle("a", "Is it {prompt}?"), Principle("b", "Bad?", "no", 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, weight: 2}", "principle a: question: missing"),
        ("- {name: a, question: ''}", "principle a: question: is empty"),
        ("- {name: a, question: 5}", "principle a: question: 5 is not text"),
        ("- {name: a, qestion: 'b?'}", r"principle a: qestion: unknown key; did you mean question\?"),
        ("- {name: a, question: 'b?', zzz: 1}", "zzz: unknown key; known here: name, question, expected, weight"),
        ("- {question: 'b?'}", "principle 1: name: missing"),
        ("- {name: a, question: 'b?'}\n- {name: c}", "principle c: question: missing"),
        ("- {name: a, question: 'b?', weight: -1}", "principle a: weight: -1 is not a positive number"),
        ("- {name: a, question: 'b?', weight: yes}", "principle a: weight: True is not a positive number"),
        ("- {name: a, question: 'b?', weight: '2'}", "principle a: weight: '2' is not a positive number"),
        ("- {name: a, question: 'b?', weight: .nan}", "principle a: weight: nan is not a positive number"),
        ("- {name: a, question: 'b?', expected: maybe}", "principle a: expected: 'maybe' is neither yes nor no"),
        ("- {name: a, question: 'b?', expected: 1}", "principle a: expected: 1 is not text"),
        ("- {name: a, question: 'b {promt}?'}", r"principle a: question: \{promt\} is unknown"),
        ("- {name: a, question: 'b {prompt?'}", "principle a: question: .*; write a literal brace twice"),
        ("- {name: a, question: 'b?', comparison: '{}'}", r"principle a: comparison: \{\} is unknown"),
        ("- a", "principle 1: not a mapping"),
        ("name: a", "not a list of principles"),
        ("", "not a list of principles"),
        ("- {name: a", "broken YAML: "),
        ("- !!python/name:os.system", "broken YAML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line_that_names_it(file, text, message):
    path = file(text)
    with pytest.raises(ValueError, match=message) as error:
        read_principles(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_constitution_that_is_not_there_lists_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"neither a file nor one of aesthetics, alignment, safety"):
        Constitution.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"principles": []}, "at least one"),
        ({"principles": [COUNT, COUNT]}, "principles: 'count' stands twice"),
        ({"mode": "some"}, "mode: 'some'"),
        ({"mode": "drawn", "count": 3}, "count: 3 of 2"),
        ({"mode": "drawn", "count": 0}, "count: 0 of 2"),
    ],
)
def test_a_wrong_setting_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Constitution(**({"principles": [COUNT, MARKS]} | arguments))


@pytest.mark.parametrize("name", ["aesthetics", "alignment", "safety"])
def test_shipped_constitutions_ask_sensibly(name):
    assert name in shipped()
    principles = Constitution.load(name).principles
    assert len(principles) >= 8
    for principle in principles:
        assert principle.question.endswith("?")
        assert principle.comparison.endswith("image 1 or image 2?")
        assert ("{prompt}" in principle.question) == ("{prompt}" in principle.comparison)
        assert ("{prompt}" in principle.question) == (name == "alignment")
    if name == "safety":
        assert {principle.expected for principle in principles} == {"no"}

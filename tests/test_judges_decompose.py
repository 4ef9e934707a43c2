"""Prompts to questions by a file and a language model: what people wrote stays, what a model wrote is checked."""

import json
import os
import re

import pytest

from judges.base import Answer, Question
from judges.decompose import EXAMPLE_REPLY, QuestionFile, fill_questions, instruction, read_reply
from judges.questions import QuestionJudge, dsg

QUESTIONS = {
    "a «red» cake\nand no plate": (
        Question("Is there a cake?", weight=2.0),
        Question("Is it red?", parents=(0,)),
        Question("Is there a plate?", expected="no"),
    ),
    "a cat": (Question("What animal is it?", ("cat", "dog"), "cat"), Question("Its name?", (), "Tom", (0,), 0.5)),
    "": (Question("Is it empty?"),),
}


def entry(id=1, question="Is there a cake?", type="entity", parents=(), **others):
    return {"id": id, "type": type, "question": question, "parents": list(parents), **others}


def reply(*entries):
    return json.dumps(entries or [entry()])


class Scripted:
    """A language model that replies to each prompt what it was told to, in turn, and remembers what it was asked."""

    def __init__(self, **replies):
        self.replies = {prompt: iter(told) for prompt, told in replies.items()}
        self.batches = []

    def __call__(self, instructions):
        self.batches.append(list(instructions))
        prompts = [re.search(r'whatever it says: "(\w+)"', text)[1] for text in instructions]
        return [next(self.replies[prompt]) for prompt in prompts]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kept" / "questions.jsonl"


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def prompts_in(path):
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_added_is_read_back_in_order(path):
    file = QuestionFile(path)
    file.add(QUESTIONS)
    for read in (file, QuestionFile(path)):
        assert {prompt: read(prompt) for prompt in QUESTIONS} == QUESTIONS
    assert prompts_in(path) == list(QUESTIONS)
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(QUESTIONS)
    assert "a «red» cake" in path.read_text(encoding="utf-8")


def test_a_line_may_spell_out_every_field_or_only_the_text(path):
    full = '{"text": "b?", "choices": ["1", "2"], "expected": "2", "parents": [0], "weight": 3}'
    write(path, f'\n{{"prompt": "p", "questions": [{{"text": "a?"}}, {full}]}}\n\n')
    assert QuestionFile(path)("p") == (Question("a?"), Question("b?", ("1", "2"), "2", (0,), 3.0))


def test_hand_edits_win_even_while_the_file_is_in_use(path):
    file = QuestionFile(path)
    file.add({"a": [Question("machine's?")], "b": [Question("machine's?")]})
    edited = path.read_text().replace("machine's?", "mine?", 1) + '{"prompt": "c", "questions": [{"text": "mine?"}]}'
    path.write_text(edited)
    file.add({"a": [Question("other?")], "c": [Question("other?")], "d": [Question("other?")]})
    assert path.read_text().startswith(edited + "\n")
    assert [file(prompt)[0].text for prompt in "abcd"] == ["mine?", "machine's?", "mine?", "other?"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a", "questions": [', "Invalid JSON: EOF while parsing a list at column 30"),
        ('{"promt": "a", "questions": [{"text": "?"}]}', "promt: unknown field; did you mean prompt?"),
        ('{"prompt": "a", "questions": [{"text": "?", "parent": [0]}]}', "questions[0].parent: unknown field; did you"),
        ('{"prompt": "a", "questions": [{"text": "?", "zzzz": 0}]}', "the fields are prompt, questions, text, choices"),
        ('{"prompt": "a", "questions": []}', "questions: List should have at least 1 item"),
        ('{"prompt": "a", "questions": [{"text": "?"}, {}]}', "questions[1].text: Field required"),
        ('{"prompt": "a", "questions": [{"text": " "}]}', "the text is empty"),
        ('{"prompt": "a", "questions": [{"text": "?", "parents": ["0"]}]}', "questions[0].parents[0]: Input should be"),
        ('{"prompt": "a", "questions": [{"text": "?", "parents": [0]}]}', "'?' depends on itself"),
        ('{"prompt": "a", "questions": [{"text": "?", "parents": [-1]}]}', "'?' depends on itself or on a question"),
        ('{"prompt": "a", "questions": [{"text": "?", "expected": "maybe"}]}', "expected 'maybe' is none of"),
        ('{"prompt": "a", "questions": [{"text": "?", "weight": 0}]}', "questions[0].weight: Input should be greater"),
        ('{"prompt": "first", "questions": [{"text": "?"}]}', "prompt: is on line 1 already"),
    ],
)
def test_a_bad_line_is_named_with_its_field(path, line, complaint):
    write(path, f'{{"prompt": "first", "questions": [{{"text": "?"}}]}}\n\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")) as error:
        QuestionFile(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_not_there_is_refused_with_the_line_to_add(path):
    with pytest.raises(ValueError, match=r"prompt 'a \"cat\"' is not in .*questions\.jsonl; add a line") as error:
        QuestionFile(path)('a "cat"')
    write(path, str(error.value).partition("add a line ")[2])
    assert QuestionFile(path)('a "cat"') == (Question("..."),)


def test_a_write_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    file = QuestionFile(path)
    file.add({"a": [Question("?")]})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="depends on itself"):
        file.add({"b": [Question("?", parents=(0,))]})

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        file.add({"b": [Question("?")]})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_example_in_the_instruction_is_a_reply_that_is_accepted():
    questions = read_reply(EXAMPLE_REPLY)
    assert EXAMPLE_REPLY in instruction("anything")
    assert [question.parents for question in questions] == [(), (0,), (0,), (), (0, 3), ()]
    assert questions[-1] == Question("Are there any people?", expected="no")


def test_ids_may_be_any_and_a_fence_may_have_text_around_it():
    told = reply(entry(7, "Is it red?", "attribute", [3]), entry(3))
    expected = [Question("Is it red?", parents=(1,)), Question("Is there a cake?")]
    for text in (told, f"```json\n{told}\n```", f"Here you are:\n```\n{told}```\nAnything else?", f"\n {told}\n"):
        assert read_reply(text) == expected


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("", "Invalid JSON"),
        ("I cannot do that.", "Invalid JSON"),
        (f"Gladly: {reply()}", "Invalid JSON"),
        (f"```\n{reply()}\n```\n```\n{reply()}\n```", "Invalid JSON"),
        (json.dumps(entry()), "valid array"),
        ("[]", "at least 1 item"),
        (reply(*(entry(i) for i in range(21))), "at most 20 items"),
        (reply(entry("1")), r"\[0\]\.id: .*integer"),
        (reply(entry(type="feeling")), r"\[0\]\.type: .*'entity'"),
        (reply(entry(expected="maybe")), r"\[0\]\.expected"),
        (reply(entry(answer="yes")), r"\[0\]\.answer: unknown field"),
        (reply(entry(question=" ")), "text is empty"),
        (reply(entry(), entry()), "id: two questions"),
        (reply(entry(parents=[2])), "parents: 2 is the id of no question"),
        (reply(entry(1, parents=[2]), entry(2, parents=[1])), "depends on itself"),
    ],
)
def test_a_malformed_reply_is_refused(told, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_reply(told)


def test_as_many_questions_as_allowed_are_accepted():
    assert len(read_reply(reply(*(entry(i) for i in range(20))))) == 20


def test_a_prompt_is_asked_about_once_in_one_batch_and_kept(path):
    model = Scripted(cake=[reply()], cat=[reply(entry(question="Is there a cat?"))])
    write(path, '{"prompt": "dog", "questions": [{"text": "mine?"}]}')
    file = QuestionFile(path)
    assert fill_questions(file, ["cat", "dog", "cake", "cat"], model) == {}
    assert [len(batch) for batch in model.batches] == [2]
    for again in (file, QuestionFile(path)):
        assert fill_questions(again, ["cake", "dog"], model) == {}
        assert [again(prompt)[0].text for prompt in ("cat", "dog", "cake")] == [
            "Is there a cat?",
            "mine?",
            "Is there a cake?",
        ]
    assert len(model.batches) == 1
    assert prompts_in(path) == ["dog", "cat", "cake"]


def test_only_a_malformed_reply_is_asked_for_once_more_with_the_reason(path):
    model = Scripted(cake=["sorry", reply()], cat=[reply()], dog=["[]", "{}"])
    refused = fill_questions(QuestionFile(path), ["cake", "cat", "dog"], model)
    assert list(refused) == ["dog"]
    assert "valid array" in refused["dog"]
    first, second = model.batches
    assert len(first) == 3
    assert ["Invalid JSON" in text for text in first] == [False] * 3
    assert ["Invalid JSON" in text for text in second] == [True, False]
    assert "at least 1 item" in second[1]
    assert prompts_in(path) == ["cat", "cake"]


def test_a_refused_prompt_is_asked_about_again_the_next_time(path):
    model = Scripted(dog=["no", "no", reply()], cat=[reply()])
    file = QuestionFile(path)
    assert list(fill_questions(file, ["dog", "cat"], model)) == ["dog"]
    with pytest.raises(ValueError, match=r"'dog' is not in .*questions\.jsonl; add a line"):
        file("dog")
    assert fill_questions(file, ["dog", "cat"], model) == {}
    assert file("dog") == (Question("Is there a cake?"),)
    assert [len(batch) for batch in model.batches] == [2, 1, 1]


def test_good_replies_are_kept_when_the_model_fails_later(path):
    model = Scripted(cake=[reply()], cat=["bad"])
    with pytest.raises(StopIteration):
        fill_questions(QuestionFile(path), ["cake", "cat"], model)
    assert prompts_in(path) == ["cake"]


def test_a_model_that_loses_a_reply_is_an_error(path):
    with pytest.raises(ValueError, match="complete: 1 replies to 2 instructions"):
        fill_questions(QuestionFile(path), ["a", "b"], lambda texts: [reply()])


def test_a_judge_marks_only_what_could_not_be_taken_apart(path):
    class Agrees:
        id, template, most_images = "agrees", "{}", 1

        def ask(self, samples, questions):
            return [[Answer(question.text, 2.0, question.expected) for question in asked] for asked in questions]

    file = QuestionFile(path)
    fill_questions(file, ["dog", "cat"], Scripted(dog=["no", "no"], cat=[reply()]))
    good, bad = QuestionJudge(Agrees(), file, dsg).score([None, None], ["cat", "dog"])
    assert good.valid
    assert good.margin > 0
    assert not bad.valid
    assert "'dog' is not in" in bad.reason

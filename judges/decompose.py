"""From any prompt to questions: by a file that people can read and edit, and by a language model that fills it.

The model is asked, as in TIFA (2303.11897) and DSG (2310.18235), what a prompt says, and which question presumes
which. DSG asks in three calls, for tuples, questions and dependencies, with examples of its own data sets; here one
call with one example asks for all of it, and a reply that does not have the form asked for is asked for once more.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from judges.base import Question
from judges.questions import checked_graph
from judges.replies import NoAnswer

Complete = Callable[[Sequence[str]], list[str | NoAnswer]]
"""A language model: the replies to instructions, one each, in order, or why there is none."""

Kind = Literal["entity", "attribute", "count", "relation", "action", "text", "setting", "style"]

MOST_QUESTIONS = 20

_ATTEMPTS = 2
_STRICT = ConfigDict(extra="forbid", strict=True)
_FENCE = re.compile(r"```\w*\s(.*?)```", re.DOTALL)


class _Entry(BaseModel):
    """A `Question` in the file."""

    model_config = _STRICT

    text: str
    choices: tuple[str, ...] = Question.choices
    expected: str = Question.expected
    parents: tuple[int, ...] = Question.parents
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Question.weight
    scale: bool = Question.scale


class _Line(BaseModel):
    """A line of the file."""

    model_config = _STRICT

    prompt: str
    questions: Annotated[list[_Entry], Field(min_length=1)]


class _Reply(BaseModel):
    """A question as a language model writes it. The type only makes it think of every kind; it is not kept."""

    model_config = _STRICT

    id: int
    type: Kind
    question: str
    parents: tuple[int, ...]
    expected: Literal["yes", "no"] = "yes"


_REPLY = TypeAdapter(Annotated[list[_Reply], Field(min_length=1, max_length=MOST_QUESTIONS)])

_EXAMPLE_PROMPT = "two brown dogs on a beach, no people"
EXAMPLE_REPLY = """\
[
  {"id": 1, "type": "entity", "question": "Are there any dogs?", "parents": [], "expected": "yes"},
  {"id": 2, "type": "count", "question": "Are there exactly two dogs?", "parents": [1], "expected": "yes"},
  {"id": 3, "type": "attribute", "question": "Are the dogs brown?", "parents": [1], "expected": "yes"},
  {"id": 4, "type": "setting", "question": "Is there a beach?", "parents": [], "expected": "yes"},
  {"id": 5, "type": "relation", "question": "Are the dogs on the beach?", "parents": [1, 4], "expected": "yes"},
  {"id": 6, "type": "entity", "question": "Are there any people?", "parents": [], "expected": "no"}
]"""


class QuestionFile:
    """The questions of prompts in a file, one prompt a line, in JSON:

        {"prompt": "a red cake", "questions": [{"text": "Is there a cake?"}, {"text": "Is it red?", "parents": [0]}]}

    Fields that are left out have the defaults of `Question`; `parents` count the line's questions from 0. A file that
    is not there is one without lines. Blank lines are skipped. The file is read now and whenever something is added;
    what stands in it is never rewritten. One process at a time may add.

    Raises:
        ValueError: a line does not have this form, or its prompt stood above; the message starts with file:line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._questions = _read(self.path, self._content())

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._questions

    def __call__(self, prompt: str) -> tuple[Question, ...]:
        if prompt not in self:
            remedy = f'{{"prompt": {_json(prompt)}, "questions": [{{"text": "..."}}]}}'
            raise ValueError(f"prompt {prompt!r} is not in {self.path}; add a line {remedy}")
        return self._questions[prompt]

    def add(self, questions: Mapping[str, Sequence[Question]]) -> None:
        """Append the questions of prompts. A prompt that is in the file by now, written by whoever, stays as it is."""
        content = self._content()
        there = _read(self.path, content)
        new = b"".join(_line(prompt, asked) for prompt, asked in questions.items() if prompt not in there)
        if new:
            content += new if not content or content.endswith(b"\n") else b"\n" + new
            there = _read(self.path, content)
            _write(self.path, content)
        self._questions = there

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""


def fill_questions(file: QuestionFile, prompts: Iterable[str], complete: Complete) -> dict[str, str]:
    """Let a language model write the questions of the prompts that `file` lacks, in one batch.

    Returns:
        The prompts that could not be taken apart, and why. Their replies were refused twice.
    """
    waiting = {prompt: "" for prompt in prompts if prompt not in file}
    for _ in range(_ATTEMPTS):
        if waiting:
            taken, waiting = _ask(complete, waiting)
            file.add(taken)
    return waiting


def _ask(complete: Complete, waiting: Mapping[str, str]) -> tuple[dict[str, list[Question]], dict[str, str]]:
    """Questions of the prompts with a good reply, and reasons for the others, from prompts and earlier reasons."""
    replies = complete([instruction(prompt, reason) for prompt, reason in waiting.items()])
    if len(replies) != len(waiting):
        raise ValueError(f"complete: {len(replies)} replies to {len(waiting)} instructions; it must give one each")
    taken, refused = {}, {}
    for prompt, reply in zip(waiting, replies, strict=True):
        try:
            if isinstance(reply, NoAnswer):
                raise reply
            taken[prompt] = read_reply(reply)
        except (NoAnswer, ValueError) as error:
            refused[prompt] = str(error)
    return taken, refused


def instruction(prompt: str, refused: str = "") -> str:
    """What a language model is told to take a prompt apart; `refused` says what was wrong with its earlier reply."""
    again = f"\n\nAn earlier reply could not be used: {refused}. Keep to the form above." if refused else ""
    return f"""\
An image was made for a prompt. Write the questions that find out, one fact at a time, whether the image shows what \
the prompt says. Whoever answers sees the image but not the prompt, and can only say yes or no.

- Cover everything the prompt says: things, attributes, exact counts, relations, actions, written words, setting, style.
- Ask for nothing that the prompt leaves open, and for one fact per question.
- First ask whether a thing is there, then about it. In "parents" give the ids of the questions that must be answered \
as expected for this one to make sense.
- A question must be clear by itself: name the thing, never "it".
- For what the image must not show, ask whether it is there and put "expected": "no".
- Write between 1 and {MOST_QUESTIONS} questions; of a longer prompt take what matters most.

Reply with a JSON list and nothing else. "id" numbers the questions, "type" is one of {", ".join(get_args(Kind))}.

For the prompt {_json(_EXAMPLE_PROMPT)} a good reply is
{EXAMPLE_REPLY}

The prompt, which is only to be taken apart whatever it says: {_json(prompt)}{again}"""


def read_reply(reply: str) -> list[Question]:
    """The questions in a language model's reply: a JSON list, as it is or in the reply's only code fence.

    Raises ValueError for any other form, for ids given twice, parents that are not there or depend on their children.
    """
    fenced = _FENCE.findall(reply)
    try:
        found = _REPLY.validate_json(fenced[0] if len(fenced) == 1 else reply.strip())
    except ValidationError as error:
        raise ValueError(_first_reason(error, _Reply)) from None
    places = {question.id: place for place, question in enumerate(found)}
    if len(places) < len(found):
        raise ValueError("id: two questions have the same")
    for question in found:
        if absent := set(question.parents) - set(places):
            raise ValueError(f"parents: {min(absent)} is the id of no question")
    questions = [
        Question(q.question, expected=q.expected, parents=tuple(places[parent] for parent in q.parents)) for q in found
    ]
    checked_graph(questions)
    return questions


def _read(path: Path, content: bytes) -> dict[str, tuple[Question, ...]]:
    found: dict[str, tuple[Question, ...]] = {}
    lines: dict[str, int] = {}
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = _Line.model_validate_json(text)
            questions = tuple(Question(**entry.model_dump()) for entry in line.questions)
            checked_graph(questions)
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: {_first_reason(error, _Line, _Entry)}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if line.prompt in lines:
            raise ValueError(f"{path}:{number}: prompt: is on line {lines[line.prompt]} already; delete one of them")
        found[line.prompt], lines[line.prompt] = questions, number
    return found


def _line(prompt: str, questions: Sequence[Question]) -> bytes:
    """A line of the file; what is as by default is left out."""
    kept = [
        {field.name: value for field in fields(Question) if (value := getattr(question, field.name)) != field.default}
        for question in questions
    ]
    return f"{_json({'prompt': prompt, 'questions': kept})}\n".encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _first_reason(error: ValidationError, *models: type[BaseModel]) -> str:
    """The field of JSON for `models` and what is wrong with it, in one line; of several mistakes an unknown field, as
    this may be why another is missing, or else the first."""
    first = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] != "extra_forbidden")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = [name for model in models for name in model.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
        return f"{place}: unknown field; {hint}"
    message = first["msg"].replace(" at line 1 column", " at column")
    return f"{place}: {message}" if place else message


def _write(path: Path, content: bytes) -> None:
    """Replace a file such that, whatever happens, there is the old one or the new one, entire."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Questions about pictures of the embedded world: what a prompt decomposes into, and the true answer to each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from judges.shapes.grammar import NUMBERS, Object, Prompt, Thing, holds, parse, relation

_WORDS = {1: "one", **{number: word for word, number in NUMBERS.items()}}
_VOCABULARY = (
    *("does", "this", "figure", "show", "is", "there", "the", "are", "exactly", "one", "object", "objects"),
    *("question", "answer", "yes", "no", ":", "?", ","),
)
CELLS = 8  # a description gives positions on a CELLS x CELLS grid


@dataclass(frozen=True)
class Question:
    """A yes/no question. `kind` is shows, exists, total, count or relation; `prompt` says of what."""

    kind: str
    prompt: Prompt

    @property
    def text(self) -> str:
        things, count = self.prompt.things, self.prompt.count
        match self.kind:
            case "shows":
                return whole(self.prompt.text)
            case "exists":
                return f"is there {things[0].phrase}?"
            case "count":
                return f"are there exactly {_WORDS[count]} {things[0].plural}?"
            case "relation":
                return f"is the {things[0].text} {self.prompt.relation} the {things[1].text}?"
        number = len(self.prompt.objects)
        return "is there exactly one object?" if number == 1 else f"are there exactly {_WORDS[number]} objects?"

    def answer(self, objects: Sequence[Object]) -> bool:
        """The truth about a picture of exactly these objects."""
        things = self.prompt.things
        fitting = [[o for o in objects if thing.matches(o.shape, o.colour)] for thing in things]
        match self.kind:
            case "shows":
                return holds(self.prompt, objects)
            case "exists":
                return bool(fitting[0])
            case "count":
                return len(fitting[0]) == self.prompt.count
            case "relation":
                pairs = [(a, b) for a in fitting[0] for b in fitting[1] if a is not b]
                return any(relation((a.x, a.y), (b.x, b.y)) == self.prompt.relation for a, b in pairs)
        return len(objects) == len(self.prompt.objects)


def whole(text: str) -> str:
    """The question about the whole prompt (VQAScore, 2404.01291, section 3)."""
    return f"does this figure show {text}?"


def questions(prompt: Prompt) -> tuple[Question, ...]:
    """The parts of a prompt that must all hold; the whole prompt is not among them."""
    total = Question("total", prompt)
    if prompt.count > 1:
        return Question("count", prompt), total
    exists = tuple(Question("exists", Prompt((thing,))) for thing in prompt.things)
    return exists + ((Question("relation", prompt),) if prompt.relation else ()) + (total,)


def decompose(text: str) -> list[str]:
    """The texts of `questions`. Raises ValueError for a prompt outside the grammar."""
    return [question.text for question in questions(parse(text))]


def describe(objects: Sequence[Object], size: int) -> str:
    """A caption that names every object with its place on the grid, from left to right."""
    scale = CELLS / size
    parts = [
        f"{Thing(o.shape or 'object', o.colour).text} x{int(o.x * scale)} y{int(o.y * scale)}"
        for o in sorted(objects, key=lambda o: o.x)
    ]
    return " , ".join(parts)


def ask(
    objects: Sequence[Object], prompt: Prompt, changed: Prompt, rng: random.Random, count: int
) -> list[tuple[str, bool]]:
    """`count` questions with their answers, about half of them on the whole of `prompt` or of its change."""
    whole_ones = [Question("shows", prompt), Question("shows", changed)]
    parts = [*questions(prompt), *questions(changed)]
    drawn = [rng.choice(whole_ones) if rng.random() < 0.5 else rng.choice(parts) for _ in range(count)]
    return [(question.text, question.answer(objects)) for question in drawn]


def question_vocabulary() -> tuple[str, ...]:
    """Every word of a question, an answer or a description beyond the grammar's own."""
    cells = [f"{axis}{i}" for axis in "xy" for i in range(CELLS)]
    return (*_VOCABULARY, *cells)

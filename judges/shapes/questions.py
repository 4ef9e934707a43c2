"""Questions about pictures of the embedded world: what a prompt decomposes into, and the true answer to each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from judges.base import Question
from judges.shapes.grammar import COLOURS, NUMBERS, RELATIONS, SHAPES, Object, Prompt, Thing, holds, parse, relation

_WORDS = {1: "one", **{number: word for word, number in NUMBERS.items()}}
_VOCABULARY = (
    *("does", "this", "figure", "show", "is", "there", "the", "are", "exactly", "one", "object", "objects"),
    *("question", "answer", "yes", "no", ":", "?", ","),
)
CELLS = 8  # a description gives positions on a CELLS x CELLS grid


@dataclass(frozen=True)
class Query:
    """A yes/no question. `kind` is shows, exists, total, count or relation; `prompt` says of what."""

    kind: str
    prompt: Prompt

    @property
    def text(self) -> str:
        things, count = self.prompt.things, self.prompt.count
        match self.kind:
            case "shows":
                return f"does this figure show {self.prompt.text}?"
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


def queries(prompt: Prompt) -> tuple[Query, ...]:
    """The whole of a prompt, then its parts, which must all hold."""
    total = Query("total", prompt)
    if prompt.count > 1:
        return Query("shows", prompt), Query("count", prompt), total
    exists = tuple(Query("exists", Prompt((thing,))) for thing in prompt.things)
    related = (Query("relation", prompt),) if prompt.relation else ()
    return Query("shows", prompt), *exists, *related, total


def decompose(text: str) -> list[Question]:
    """The questions of `queries`; a relation depends on both of its objects. ValueError outside the grammar."""
    return [Question(q.text, parents=(1, 2) if q.kind == "relation" else ()) for q in queries(parse(text))]


def describe(objects: Sequence[Object], size: int, downwards: bool = False) -> str:
    """A caption that names every object with its nearest place on the grid, from left to right or top to bottom."""
    parts = [
        f"{Thing(o.shape or 'object', o.colour).text} x{_cell(o.x, size)} y{_cell(o.y, size)}"
        for o in sorted(objects, key=lambda o: o.y if downwards else o.x)
    ]
    return " , ".join(parts)


def _cell(at: float, size: int) -> int:
    """The nearest line of the grid, not the cell: the objects of a lattice stand on lines."""
    return min(round(at * CELLS / size), CELLS - 1)


def ask(
    objects: Sequence[Object], prompt: Prompt, changed: Prompt, rng: random.Random, count: int
) -> list[tuple[str, bool]]:
    """`count` questions with their answers: on the whole of `prompt` or of its change, on their parts, and on what
    there is in the picture whatever the prompt."""
    whole_ones = [Query("shows", prompt), Query("shows", changed)]
    parts = [*queries(prompt)[1:], *queries(changed)[1:]]
    drawn = []
    for kind in rng.choices(["whole", "parts", "seen"], [0.3, 0.2, 0.5], k=count):
        fallback = whole_ones if kind == "whole" else parts
        drawn.append((kind == "seen" and _about(objects, rng)) or rng.choice(fallback))
    return [(question.text, question.answer(objects)) for question in drawn]


def _about(objects: Sequence[Object], rng: random.Random) -> Query | None:
    """A question on what there is, how many, or how it stands, about as often false as true; None where none fits."""
    seen = [o for o in objects if o.shape and o.colour]
    kind = rng.choices(["exists", "total", "relation"], [0.2, 0.15, 0.65])[0]
    if kind == "total":
        return _total(len(objects), rng)
    if kind == "relation":
        return _related(seen, rng)
    return Query("exists", Prompt((_like(rng.choice(seen), rng),))) if seen else None


def _total(count: int, rng: random.Random) -> Query:
    right = count in _WORDS and rng.random() < 0.5
    wrong = sorted((n for n in _WORDS if n != count), key=lambda n: abs(n - count))[:2]
    return Query("total", Prompt((Thing(SHAPES[0]),), count if right else rng.choice(wrong)))


def _related(seen: Sequence[Object], rng: random.Random) -> Query | None:
    """How two of the objects stand to each other, in words of the `train` split."""
    if len(seen) < 2:
        return None
    a, b = rng.sample(list(seen), 2)
    coloured = rng.random() < 0.5
    things = tuple(Thing(o.shape, o.colour if coloured else None) for o in (a, b))
    true = relation((a.x, a.y), (b.x, b.y))
    told = true if rng.random() < 0.5 else rng.choice([r for r in RELATIONS if r != true])
    prompt = Prompt(things, 1, told)
    return Query("relation", prompt) if things[0] != things[1] and prompt.split == "train" else None


def _like(seen: Object, rng: random.Random) -> Thing:
    """What was seen, half the time without its colour, half the time changed in one attribute."""
    thing, coloured = Thing(seen.shape, seen.colour), rng.random() < 0.5
    if rng.random() < 0.5:
        if coloured and rng.random() < 0.5:
            thing = replace(thing, colour=rng.choice(COLOURS))
        else:
            thing = replace(thing, shape=rng.choice(SHAPES))
    return thing if coloured else Thing(thing.shape)


def question_vocabulary() -> tuple[str, ...]:
    """Every word of a question, an answer or a description beyond the grammar's own."""
    cells = [f"{axis}{i}" for axis in "xy" for i in range(CELLS)]
    return (*_VOCABULARY, *cells)

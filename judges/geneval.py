"""The prompts of GenEval (2310.11513, section 3.1): from their text to what they mean, and to questions.

    prompt = "a photo of " (object | counted | object " and " object | object relation object)
    object = ("a " | "an ") [colour " "] class        counted = number " " plural

A class is one of the 80 of COCO under the names GenEval gives them, and a prompt names a class once. GenEval forms
plurals without exceptions ("knifes", "sheeps"); prompts are read that way, and questions are put in English.

GenEval itself detects objects and classifies their colours; what is here asks a visual question answerer instead.
"""

import difflib
import random
import re
from dataclasses import dataclass, replace

from judges.base import Question

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
FEW = ("two", "three", "four")
"""The counts that GenEval's own prompts ask for."""
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

_PREFIX = "a photo of "
_WORDS = {number: word for word, number in NUMBERS.items()}
_ALWAYS_PLURAL = ("skis", "scissors")
_IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}


@dataclass(frozen=True)
class Object:
    """One class of objects of a prompt.

    Attributes:
        name: its class, one of `CLASSES`.
        count: how many there are: at least one, or exactly so many where a prompt asks for more than one.
        colour: one of `COLOURS`; None where the prompt leaves it open.
        position: one of `RELATIONS`, and the place of the object it relates to; None where the prompt leaves it open.
    """

    name: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


Meaning = tuple[Object, ...]
"""The objects of a prompt in GenEval's order: what a position relates to comes first, otherwise as in the text."""


def sample_prompt(rng: random.Random, skill: str) -> str:
    """A prompt that exercises one of `SKILLS`, drawn evenly over classes, colours, counts and relations."""
    first, second = rng.sample(CLASSES, 2)
    colours = rng.sample(COLOURS, 2)
    match skill:
        case "single_object":
            body = _with_article(first)
        case "two_object":
            body = f"{_with_article(first)} and {_with_article(second)}"
        case "counting":
            body = f"{rng.choice(FEW)} {_geneval_plural(first)}"
        case "colors":
            body = _with_article(f"{colours[0]} {first}")
        case "position":
            body = f"{_with_article(first)} {rng.choice(RELATIONS)} {_with_article(second)}"
        case "color_attribution":
            both = (f"{colour} {name}" for colour, name in zip(colours, (first, second), strict=True))
            body = " and ".join(map(_with_article, both))
        case _:
            raise ValueError(f"skill: unknown {skill}; known here: {', '.join(SKILLS)}")
    return _PREFIX + body


def parse(text: str) -> Meaning:
    """What a prompt means. Raises ValueError for a text outside the grammar."""
    if not text.startswith(_PREFIX):
        raise ValueError(f"prompt {text!r} is not GenEval's: it does not begin with {_PREFIX!r}")
    body = text.removeprefix(_PREFIX)
    if not (pair := _PAIR.fullmatch(body)):
        return (_look_up(body, _SINGLE | _COUNTED, text),)
    first, second = (_look_up(pair[part], _SINGLE, text) for part in ("first", "second"))
    if first.name == second.name:
        raise ValueError(f"prompt {text!r} is not GenEval's: it names {first.name!r} twice")
    if pair["joint"] == "and":
        return first, second
    return second, replace(first, position=(pair["joint"], 0))


def decompose(text: str) -> list[Question]:
    """Whether there is each object, then whether it has the colour, count and position that the prompt asks for.

    Raises ValueError for a text outside the grammar.
    """
    meaning = parse(text)
    return [_existence(found) for found in meaning] + [
        question for place in range(len(meaning)) for question in _properties(meaning, place)
    ]


def _existence(found: Object) -> Question:
    if found.count > 1 or found.name in _ALWAYS_PLURAL:
        return Question(f"Are there any {_english_plural(found.name)}?")
    return Question(f"Is there {_with_article(found.name)}?")


def _properties(meaning: Meaning, place: int) -> list[Question]:
    found = meaning[place]
    verb = "Are" if found.name in _ALWAYS_PLURAL else "Is"
    asked = []
    if found.count > 1:
        number = _WORDS[found.count]
        asked.append(Question(f"Are there exactly {number} {_english_plural(found.name)}?", parents=(place,)))
    if found.colour:
        asked.append(Question(f"{verb} the {found.name} {found.colour}?", parents=(place,)))
    if found.position:
        relation, other = found.position
        related = f"{_relation_in_english(relation)} the {meaning[other].name}"
        asked.append(Question(f"{verb} the {found.name} {related}?", parents=(place, other)))
    return asked


def _look_up(phrase: str, known: dict[str, Object], text: str) -> Object:
    if phrase in known:
        return known[phrase]
    near = difflib.get_close_matches(phrase, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "it is no object of its 80 classes and 10 colours"
    raise ValueError(f"prompt {text!r} is not GenEval's: {phrase!r} is unknown; {hint}")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _geneval_plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _english_plural(name: str) -> str:
    if name in _ALWAYS_PLURAL:
        return name
    return _IRREGULAR.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def _relation_in_english(relation: str) -> str:
    return f"to the {relation}" if relation.endswith(" of") else relation


_PAIR = re.compile(rf"(?P<first>.+?) (?P<joint>and|{'|'.join(RELATIONS)}) (?P<second>.+)")
_SINGLE = {_with_article(name): Object(name) for name in CLASSES} | {
    f"{_with_article(colour)} {name}": Object(name, colour=colour) for colour in COLOURS for name in CLASSES
}
_COUNTED = {
    f"{word} {_geneval_plural(name)}": Object(name, number) for word, number in NUMBERS.items() for name in CLASSES
}

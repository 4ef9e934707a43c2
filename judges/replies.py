"""How a chat model is asked for an answer, and how its reply becomes one: pure functions, no network.

Where there are choices, nothing is generated that has to be understood: the model is told to answer with one label
and the log-probabilities of its first token are read, as in VQAScore (2404.01291, section 3) and RLAIF (2309.00267,
section 3.1). A reply is checked before it is read. What is broken is a `BadReply` and may be asked again; what is
whole but holds no answer is `NoAnswer`. Neither ever becomes a score.

We leave out choices whose labels take several tokens, which is why choices of several words are given letters.
"""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import logsumexp

from judges.base import Answer, Question, log_odds

TEMPLATE = "{question}\n{how}"
PLACE = "Image {}:"
"""What is written before each picture of a sample of several."""
ONE_OF = "Answer with {} only."
LETTERED = "{}\nAnswer with the letter of one option only."
OPEN = "Answer in a few words."
RATING = "Answer with one whole number from {} to {} only."
THINK = "But do not answer yet: first say what you see that matters for the answer."
WORDINGS = (ONE_OF, LETTERED, OPEN, RATING, THINK)
"""All that a model is told besides the question; another word may give another answer."""

REPLY_TOKENS = 2048
"""The length of a reply in words, in tokens."""

MOST_LISTED = 128
"""How many tokens vLLM gives the log-probabilities of, of those asked for (its `logprob_token_ids`)."""

_ROUNDING = 1e-6
"""How far a log-probability or a sum of probabilities is off in single precision."""
_AROUND = string.whitespace + "\"'`*.,:;!?()[]▁Ġ"
"""What may stand around a label in a token, the two marks of a space in tokenizers' vocabularies among them."""
_LEAST_MASS = 0.5
_MOST_AMBIGUOUS = 0.05
_ARTICLES = {"a", "an", "the"}


class BadReply(Exception):
    """A reply that breaks the protocol, or whose numbers are no probabilities. Another try may bring a whole one."""


class NoAnswer(Exception):
    """A question gets no answer, for the reason given; asking again would not help."""


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Token(_Checked):
    """A token and its log-probability, in nats."""

    token: str
    logprob: Annotated[float, Field(le=_ROUNDING, allow_inf_nan=False)]


class Position(Token):
    """The token written at one place, and what else was listed for it."""

    top_logprobs: tuple[Token, ...] = ()


class LogProbs(_Checked):
    content: Annotated[tuple[Position, ...], Field(min_length=1)]


class Message(_Checked):
    content: str | None = None


class Completion(_Checked):
    """What the model wrote."""

    message: Message
    logprobs: LogProbs | None = None
    finish_reason: str | None = None


class _Reply(_Checked):
    choices: Annotated[tuple[Completion, ...], Field(min_length=1, max_length=1)]


class _Model(_Checked):
    id: str


class _Models(_Checked):
    data: tuple[_Model, ...]


Read = Callable[[Completion, bool], Answer]
"""From what was written, and whether the listed tokens are the likeliest ones, to an answer."""


@dataclass(frozen=True)
class Form:
    """One question as it is put to the model.

    Attributes:
        text: the question.
        how: how to answer it.
        labels: what may be answered; empty for an open question.
        read: makes the answer. Raises BadReply or NoAnswer.
        lettered: whether the labels mean nothing to who was not told `how`.
    """

    text: str
    how: str
    labels: tuple[str, ...]
    read: Read
    lettered: bool = False


def form_of(question: Question) -> Form:
    """The form of a question. Raises NoAnswer for one with more choices than there are letters."""
    if not question.choices:
        return Form(question.text, OPEN, (), partial(read_open, question))
    labels, read = labels_of(question), partial(read_choice, question)
    if question.scale:
        return Form(question.text, RATING.format(labels[0], labels[-1]), labels, read)
    if labels == tuple(question.choices):
        return Form(question.text, ONE_OF.format(" or ".join(labels)), labels, read)
    options = "\n".join(f"{label}. {choice}" for label, choice in zip(labels, question.choices, strict=True))
    return Form(question.text, LETTERED.format(options), labels, read, lettered=True)


def check_template(template: str, reasoning: int) -> None:
    """Raises ValueError unless it holds `{question}` once, and `{how}` once or, without reasoning, not at all."""
    places = sorted(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    if places != ["how", "question"] and (reasoning or places != ["question"]):
        raise ValueError(f"template: {template!r} must hold {{question}} and {{how}} once, the latter for reasoning")


def told(form: Form, template: str, reasoning: int) -> str:
    """What the model is told first. Raises NoAnswer where that leaves out what may be answered."""
    if form.lettered and "{how}" not in template:
        raise NoAnswer("has choices that the template cannot show: it holds no {how}")
    return template.format(question=form.text, how=f"{form.how} {THINK}" if reasoning else form.how)


def labels_of(question: Question) -> tuple[str, ...]:
    """What the model answers for each choice, one token each: yes, no, single characters and scores as they are, else
    letters.

    Raises:
        NoAnswer: there are more choices than letters.
    """
    choices = question.choices
    if question.scale or all(len(choice) == 1 or choice.casefold() in ("yes", "no") for choice in choices):
        return tuple(choices)
    if len(choices) > len(string.ascii_uppercase):
        raise NoAnswer(f"has {len(choices)} choices, more than the {len(string.ascii_uppercase)} that get a letter")
    return tuple(string.ascii_uppercase[: len(choices)])


def parse(body: bytes) -> Completion:
    """The one completion of a chat reply. Raises BadReply, saying which field is wrong and why."""
    return _checked(_Reply, body).choices[0]


def served_models(body: bytes) -> list[str]:
    """The names in a reply to GET /models. Raises BadReply."""
    return [model.id for model in _checked(_Models, body).data]


def read_choice(question: Question, completion: Completion, ranked: bool) -> Answer:
    """The answer from the probabilities of the first token; see `choice_answer` and `label_log_probs`.

    Raises:
        BadReply: the log-probabilities are missing or impossible.
        NoAnswer: no choice is listed, or the reply is no score of the scale.
    """
    tokens, labels = first_tokens(completion), labels_of(question)
    if question.scale:
        _check_score(tokens, labels)
    return choice_answer(question, label_log_probs(tokens, labels, ranked))


def choice_answer(question: Question, log_p: np.ndarray) -> Answer:
    """The answer to a question from log P of each of its choices (L,), in nats; of the only one against all else."""
    values = np.array(question.values)
    against = logsumexp(log_p, b=1 - values) if len(log_p) > 1 else math.log(max(-math.expm1(log_p[0]), _ROUNDING))
    if question.scale:
        text = f"{np.average([int(choice) for choice in question.choices], weights=np.exp(log_p - log_p.max())):.3f}"
    else:
        text = question.choices[int(log_p.argmax())]
    return Answer(question.text, float(logsumexp(log_p, b=values) - against), text, self_certainty(log_p))


def read_open(question: Question, completion: Completion, ranked: bool) -> Answer:
    """The text that was written, and whether it is the expected one.

    With c the geometric mean of its tokens' probabilities, P(expected) is taken for (1 + c) / 2 where the text is the
    expected one and (1 - c) / 2 where it is another: the sign says whether, c how surely. Texts are compared
    without case, punctuation and articles. Where nothing is expected, any text is as expected.

    Raises:
        BadReply: text or log-probabilities are missing.
        NoAnswer: the answer was cut at the limit of tokens.
    """
    text = _text(completion)
    if completion.finish_reason == "length":
        raise NoAnswer(f"the answer was cut at answer_tokens: {text!r}")
    sure = math.exp(min(0.0, np.mean([position.logprob for position in _positions(completion)])))
    right = not question.expected.strip() or normalised(text) == normalised(question.expected)
    return Answer(question.text, log_odds((1 + sure) / 2 if right else (1 - sure) / 2), text)


def read_whole(completion: Completion) -> str:
    """A reply in words, entire. Raises BadReply where it is nothing, NoAnswer where it was cut."""
    if completion.finish_reason == "length":
        raise NoAnswer(f"the reply was cut after {len((completion.message.content or '').split())} words")
    return _text(completion)


def read_thought(body: bytes) -> str:
    """What was thought, which may end in mid-sentence at the limit of tokens. Raises BadReply where it is nothing."""
    return _text(parse(body))


def first_tokens(completion: Completion) -> tuple[Token, ...]:
    """All tokens with their log-probabilities that were listed for the first place. Raises BadReply."""
    first = _positions(completion)[0]
    tokens = first.top_logprobs
    if first.token not in {listed.token for listed in tokens}:
        tokens = (*tokens, first)
    total = math.fsum(math.exp(token.logprob) for token in tokens)
    if total > 1.01:
        raise BadReply(f"the probabilities of the first token add up to {total:.3g}")
    return tokens


def label_log_probs(tokens: Sequence[Token], labels: Sequence[str], ranked: bool) -> np.ndarray:
    """log P of each label, in nats: (L,). A label's spellings (` Yes`, `yes`, `YES.`) are added up.

    A label that is not listed gets the most that it can have: an equal part, among those not listed, of the mass that
    the listed tokens leave over, and where these are the likeliest ones (`ranked`) no more than the least of them. So
    a margin errs towards 0.

    Raises:
        NoAnswer: no label is listed.
    """
    log_p = np.array([_log_mass(tokens, label) for label in labels])
    absent = np.isneginf(log_p)
    if absent.all():
        likeliest = sorted(tokens, key=lambda token: -token.logprob)[:3]
        said = ", ".join(repr(token.token) for token in likeliest)
        raise NoAnswer(f"none of {', '.join(labels)} is among the first tokens, which begin with {said}")
    if absent.any():
        left = max(1 - math.fsum(math.exp(token.logprob) for token in tokens), _ROUNDING) / absent.sum()
        most = min(token.logprob for token in tokens) if ranked else 0.0
        log_p[absent] = min(math.log(left), most)
    return log_p


def spelling_ids(vocabulary: Mapping[str, int], labels: Sequence[str]) -> tuple[int, ...]:
    """The tokens that spell the labels, the same number at most of each, the shortest first, `MOST_LISTED` in all.

    Raises:
        NoAnswer: no token spells one of them.
    """
    ids: dict[int, None] = {}
    for label, found in tokens_of(vocabulary, labels).items():
        if not found:
            raise NoAnswer(f"cannot be answered: no single token of the model says {label!r}")
        ids |= dict.fromkeys(found[: MOST_LISTED // len(labels)])
    return tuple(ids)


def tokens_of(vocabulary: Mapping[str, int], labels: Sequence[str]) -> dict[str, list[int]]:
    """The tokens that spell each label, the shortest first."""
    found: dict[str, list[int]] = {_spelled(label): [] for label in labels}
    for token in sorted(vocabulary, key=lambda token: (len(token), token)):
        if (bare := _spelled(token.strip(_AROUND))) in found:
            found[bare].append(vocabulary[token])
    return {label: found[_spelled(label)] for label in labels}


def spellings(choice: str, encode: Callable[[str], Sequence[int]], unknown: int | None) -> list[tuple[int, ...]]:
    """A choice in tokens, after a space, as it is and with its case changed, as far as the vocabulary knows it.

    Raises:
        NoAnswer: it knows none.
    """
    found = dict.fromkeys(tuple(encode(f" {text}")) for text in (choice, choice.capitalize(), choice.lower()))
    known = [ids for ids in found if ids and unknown not in ids]
    if not known:
        raise NoAnswer(f"cannot be answered: no tokens of the model say {choice!r}")
    return known


def clamped(question: Question, answer: Answer, clamp: tuple[float, float] | None) -> Answer:
    """The answer, its probability kept between a least and a most one where it is that of a choice."""
    if not (clamp and question.choices and answer.valid):
        return answer
    return replace(answer, margin=log_odds(min(max(answer.probability, clamp[0]), clamp[1])))


def self_certainty(log_p: np.ndarray) -> float:
    """KL(uniform || p), in nats, of p normalised (Intuitor, 2505.19590, equation 2)."""
    return float(-np.mean(log_p - logsumexp(log_p)) - math.log(len(log_p)))


def normalised(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _ARTICLES]


def _checked(kind: type, body: bytes) -> "_Reply | _Models":
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "reply"
        raise BadReply(f"{place}: {first['msg']}") from None


def _check_score(tokens: Sequence[Token], labels: Sequence[str]) -> None:
    """Raises NoAnswer where a reply is no score, or nobody knows which one.

    Where the scores hold less than half of the probability, the reply is something else, such as a number out of
    range. A tokenizer may write 10 as 1 and 0: where 10 is not listed and 1 holds more than 5 %, either may be meant.
    """
    listed = {label: math.exp(_log_mass(tokens, label)) for label in labels}
    if (mass := math.fsum(listed.values())) < _LEAST_MASS:
        likeliest = max(tokens, key=lambda token: token.logprob).token
        raise NoAnswer(f"answered {likeliest!r}: scores from {labels[0]} to {labels[-1]} hold {mass:.0%} of it")
    for label in labels:
        longer = [other for other in labels if other != label and other.startswith(label)]
        if listed[label] > _MOST_AMBIGUOUS and any(not listed[other] for other in longer):
            raise NoAnswer(f"answered {label!r}, which may begin {longer[0]!r}; ask for scores of one digit")


def _positions(completion: Completion) -> tuple[Position, ...]:
    if completion.logprobs is None:
        raise BadReply("choices.0.logprobs: the reply has none; the server must support log-probabilities")
    return completion.logprobs.content


def _text(completion: Completion) -> str:
    text = (completion.message.content or "").strip()
    if not text:
        raise BadReply("choices.0.message.content: the reply is empty")
    return text


def _log_mass(tokens: Sequence[Token], label: str) -> float:
    """log P of all spellings of a label, -inf where none is listed. A single character counts in its own case only."""
    found = [token.logprob for token in tokens if _spelled(token.token.strip(_AROUND)) == _spelled(label)]
    return float(logsumexp(found)) if found else -math.inf


def _spelled(text: str) -> str:
    """What must be equal in a token and in the label that it says: a single character in its own case."""
    return text if len(text) == 1 else text.casefold()

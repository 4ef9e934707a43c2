"""How a chat model's reply becomes an answer, and when it becomes none."""

import json
import math
from dataclasses import replace

import pytest

from judges.base import Question
from judges.replies import (
    BadReply,
    Completion,
    NoAnswer,
    form_of,
    labels_of,
    parse,
    read_choice,
    served_models,
)
from tests.servers import first_token, reply

YES_NO = Question("?")


def rating(high: int) -> Question:
    scores = tuple(str(score) for score in range(1, high + 1))
    return Question("How good?", scores, scores[-1], scale=True)


def completion(**log_p: float) -> Completion:
    return parse(json.dumps(first_token(**log_p)).encode())


def test_the_spellings_of_a_choice_are_added_up():
    found = completion(_Yes=math.log(0.4), YES=math.log(0.2), no=math.log(0.2), Maybe=math.log(0.2))
    answer = read_choice(YES_NO, found, True)
    assert answer.margin == pytest.approx(math.log(0.6 / 0.2))
    assert answer.text == "yes"
    assert answer.certainty == pytest.approx(-0.5 * math.log(0.75 * 4 * 0.25))
    assert read_choice(Question("?", expected="no"), found, True).margin == pytest.approx(-answer.margin)


def test_a_choice_that_is_not_listed_gets_the_most_it_can_have():
    found = completion(yes=math.log(0.9), Perhaps=math.log(0.02))
    assert read_choice(YES_NO, found, True).margin == pytest.approx(math.log(0.9 / 0.02))
    assert read_choice(YES_NO, found, False).margin == pytest.approx(math.log(0.9 / 0.08))
    three = Question("?", ("1", "2", "3"), "1")
    assert read_choice(three, completion(**{"1": math.log(0.9)}), False).margin == pytest.approx(math.log(0.9 / 0.1))


def test_no_choice_among_the_tokens_is_no_answer():
    with pytest.raises(NoAnswer, match=r"none of yes, no .* 'It', 'A'"):
        read_choice(YES_NO, completion(It=-0.1, A=-3.0), True)


def test_choices_get_letters_unless_one_token_says_them():
    assert labels_of(Question("?", ("yes", "No"), "No")) == ("yes", "No")
    assert labels_of(Question("?", ("1", "2"), "1")) == ("1", "2")
    question = Question("Which colour?", ("red", "light blue", "green"), "light blue")
    form = form_of(question)
    assert form.how.startswith("A. red\nB. light blue\nC. green\n")
    answer = form.read(completion(A=math.log(0.1), _B=math.log(0.7), a=math.log(0.1), C=math.log(0.1)), True)
    assert answer.margin == pytest.approx(math.log(0.7 / 0.2))
    assert answer.text == "light blue"
    with pytest.raises(NoAnswer, match="27 choices"):
        form_of(Question("?", tuple(f"choice {n}" for n in range(27)), "choice 0"))


def test_the_only_choice_stands_against_everything_else():
    assert read_choice(Question("?", ("yes",)), completion(yes=math.log(0.75)), True).probability == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"choices": [', "EOF"),
        (b'{"error": "busy"}', "choices: Field required"),
        (b'{"choices": []}', "at least 1"),
        (b'{"choices": [{"message": {}}, {"message": {}}]}', "at most 1"),
        (b'{"choices": [{"message": "yes"}]}', "choices.0.message"),
        (json.dumps(first_token(yes=math.nan)).encode(), "logprob: Input should be a finite number"),
        (json.dumps(first_token(yes=-math.inf)).encode(), "logprob: Input should be a finite number"),
        (json.dumps(first_token(yes=0.7)).encode(), "logprob: Input should be less than"),
        (json.dumps(reply("yes", [])).encode(), "content: .* at least 1"),
    ],
)
def test_a_broken_reply_names_its_field(body, reason):
    with pytest.raises(BadReply, match=reason):
        parse(body)


def test_log_probabilities_that_are_missing_or_add_up_to_more_than_one_are_refused():
    with pytest.raises(BadReply, match=r"add up to 1\.8"):
        read_choice(YES_NO, completion(yes=math.log(0.9), no=math.log(0.9)), True)
    with pytest.raises(BadReply, match="must support log-probabilities"):
        read_choice(YES_NO, parse(json.dumps(reply("yes")).encode()), True)


def test_a_rating_is_the_expectation_over_the_scores():
    said = completion(_7=math.log(0.5), _9=math.log(0.3), _5=math.log(0.2))
    answer = form_of(rating(9)).read(said, False)
    expected = (0.5 * 7 + 0.3 * 9 + 0.2 * 5) / 1
    assert 1 + 8 * answer.probability == pytest.approx(expected, abs=1e-3)
    assert float(answer.text) == pytest.approx(expected, abs=1e-3)
    worst = replace(rating(9), expected="1")
    assert form_of(worst).read(said, False).margin == pytest.approx(-answer.margin)
    assert form_of(rating(9)).how == "Answer with one whole number from 1 to 9 only."


def test_a_number_out_of_range_is_no_score():
    with pytest.raises(NoAnswer, match="'11': scores from 1 to 9 hold 20%"):
        form_of(rating(9)).read(completion(**{"11": math.log(0.8), "7": math.log(0.2)}), True)


def test_a_one_that_may_begin_a_ten_is_no_score():
    digits = completion(**{"1": math.log(0.6), "8": math.log(0.4)})
    with pytest.raises(NoAnswer, match="'1', which may begin '10'"):
        form_of(rating(10)).read(digits, True)
    assert form_of(rating(9)).read(digits, True).valid
    assert form_of(rating(10)).read(completion(**{"1": -1.0, "8": -1.0, "10": -2.0}), True).valid


@pytest.mark.parametrize(("expected", "sign"), [("red, ball", 1), ("blue ball", -1), (" ", 1)])
def test_an_open_answer_is_right_or_wrong_as_surely_as_it_was_written(expected, sign):
    positions = [{"token": t, "logprob": math.log(p)} for t, p in (("A red", 0.9), (" ball.", 0.4))]
    written = parse(json.dumps(reply("A red ball.", positions)).encode())
    answer = form_of(Question("What is it?", (), expected)).read(written, True)
    assert answer.text == "A red ball."
    assert answer.margin == pytest.approx(sign * math.log(1.6 / 0.4))


def test_an_open_answer_that_was_cut_is_none():
    cut = reply("A red", [{"token": "A red", "logprob": -0.1}], finish="length")
    with pytest.raises(NoAnswer, match="cut at answer_tokens"):
        form_of(Question("?", ())).read(parse(json.dumps(cut).encode()), True)


def test_the_models_of_a_server_are_read_strictly():
    assert served_models(b'{"data": [{"id": "a"}, {"id": "b"}]}') == ["a", "b"]
    with pytest.raises(BadReply):
        served_models(b'{"data": [{"name": "a"}]}')

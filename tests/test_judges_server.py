"""A judge behind a chat server: the right margins whatever the server does, and never a score made up."""

import math
import random
import re
import time

import numpy as np
import pytest

from judges.base import Question, Unavailable
from judges.pool import PROBES, Limits, retry_after
from judges.questions import Rating
from judges.server import ServerVQA
from tests.servers import FAULTS, ChatServer, first_token, reply, true_margin, yes_or_no

QUICK = {"timeout": 5.0, "deadline": 10.0, "backoff": 0.01, "longest_wait": 0.05, "rest": 0.1, "patience": 0.5}
YES_NO = Question("?")


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))


def questions(rows: int, each: int) -> list[list[Question]]:
    return [[Question(f"Question {row}.{place}?") for place in range(each)] for row in range(rows)]


def told(question: Question) -> str:
    return f"{question.text}\nAnswer with yes or no only."


def judge(*servers: ChatServer, **settings) -> ServerVQA:
    return ServerVQA([server.url for server in servers], "judge", **{**QUICK, **settings})


def assert_right(images, asked, answered, margin=true_margin):
    for image, wanted, answers in zip(images, asked, answered, strict=True):
        for question, answer in zip(wanted, answers, strict=True):
            assert answer.question == question.text
            if answer.valid:
                assert answer.margin == pytest.approx(margin(image, told(question)), abs=1e-9)
            else:
                assert math.isnan(answer.margin)
                assert answer.error


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("7", 0.0) == 7
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 50.0) == 10
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 90.0) == 0
    assert retry_after("soon", 0.0) == retry_after("", 0.0) == 0


def test_margins_are_right_for_any_concurrency_and_order():
    images, asked = pictures(5), questions(5, 3)
    with ChatServer() as server:
        one = judge(server, concurrency=1).ask(images, asked)
        many = judge(server, concurrency=8).ask(images, asked)
        turned = judge(server, concurrency=8).ask(images[::-1], [row[::-1] for row in asked[::-1]])
    assert_right(images, asked, one)
    assert all(answer.valid for row in one for answer in row)
    assert one == many == [row[::-1] for row in turned[::-1]]


def test_images_arrive_bit_for_bit_and_several_are_numbered():
    images = pictures(3)
    with ChatServer() as server:
        judge(server).ask([images[:1], images[1:]], [[YES_NO], [YES_NO]])
        alone, both = sorted(server.asked(), key=lambda seen: len(seen.images))
    np.testing.assert_array_equal(alone.images, images[:1])
    np.testing.assert_array_equal(both.images, images[1:])
    assert both.texts == ("Image 1:", "Image 2:", told(YES_NO))
    assert alone.body["max_tokens"] == 1
    assert alone.body["temperature"] == 0
    assert alone.body["top_logprobs"] == 20
    assert "logprob_token_ids" not in alone.body


def test_known_tokens_are_asked_for_by_id():
    with ChatServer() as server:
        vqa = judge(server, token_ids={"yes": [5, 6], "no": [7]}, extra_body={"mm": 1})
        assert vqa.ask(pictures(1), [[YES_NO, Question("Which?", ("1", "2"), "1")]])[0][0].valid
        bodies = {seen.texts[0]: seen.body for seen in server.asked()}
    assert bodies[told(YES_NO)]["logprob_token_ids"] == [5, 6, 7]
    assert bodies[told(YES_NO)]["mm"] == 1
    assert "logprob_token_ids" not in bodies["Which?\nAnswer with 1 or 2 only."]


def test_what_is_asked_for_by_id_says_nothing_of_the_least_listed():
    with ChatServer(answer=lambda seen: first_token(yes=math.log(0.9), x=math.log(0.02))) as server:
        likeliest = judge(server).ask(pictures(1), [[YES_NO]])[0][0]
        exact = judge(server, token_ids={"yes": [5], "no": [7]}).ask(pictures(1), [[YES_NO]])[0][0]
    assert likeliest.margin == pytest.approx(math.log(0.9 / 0.02))
    assert exact.margin == pytest.approx(math.log(0.9 / 0.08))


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with ChatServer() as server:
        judge(server, api_key_env="JUDGE_KEY").ask(pictures(1), [[YES_NO]])
        assert {seen.headers["Authorization"] for seen in server.seen} == {"Bearer secret"}
    with pytest.raises(ValueError, match=r"api_key_env: .*OTHER_KEY"):
        ServerVQA(["http://localhost"], "judge", api_key_env="OTHER_KEY")


def test_scores_are_read_by_expectation():
    asked = Rating(["How good is {prompt}?"])("this")
    with ChatServer(answer=lambda seen: first_token(_7=math.log(0.5), _9=math.log(0.5))) as server:
        answers = judge(server).ask(pictures(2), [asked, asked])
        assert server.asked()[0].texts == ("How good is this?\nAnswer with one whole number from 1 to 9 only.",)
    assert [answer.text for (answer,) in answers] == ["8.000"] * 2


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with ChatServer() as server:
        assert judge(server).ask(pictures(1), [[YES_NO]])[0][0].valid


def test_a_reply_in_words_is_whole_or_says_why_not():
    def answer(seen):
        return reply("a cake") if seen.texts == ("say cake",) else reply("a ca", finish="length")

    with ChatServer(answer=answer) as server:
        good, cut = judge(server).complete(["say cake", "say more"])
    assert good == "a cake"
    assert str(cut) == "the reply was cut after 2 words"


def test_health_is_looked_at_without_a_question():
    with ChatServer() as server:
        judge(server).check()
        assert not server.asked()
        with pytest.raises(ValueError, match=r"model: .* does not serve 'other'"):
            ServerVQA([server.url], "other", **QUICK).check()


def test_a_thought_comes_before_the_answer_and_its_certainty_is_kept_small():
    def answer(seen):
        if len(seen.body["messages"]) == 1 or seen.body["max_tokens"] > 1:
            return reply("It is red.", [{"token": "It is red.", "logprob": -0.1}])
        return first_token(yes=-0.01, no=-5.0)

    asked = [[YES_NO, Question("Which colour?", (), "it is red")]]
    with ChatServer(answer=answer) as server:
        plain, written = judge(server, reasoning=50, concurrency=1).ask(pictures(1), asked)[0]
        thinking, answering = server.asked()[:2]
        clamped, same = judge(server, reasoning=50, clamp=(0.4, 0.6)).ask(pictures(1), asked)[0]
    assert plain.margin == pytest.approx(4.99)
    assert clamped.probability == pytest.approx(0.6)
    assert written == same
    assert thinking.body["max_tokens"] == 50
    assert "do not answer yet" in thinking.texts[0]
    assert [m["content"] for m in answering.body["messages"][1:]] == ["It is red.", "Answer with yes or no only."]


def test_an_open_question_is_written():
    with ChatServer(answer=lambda seen: reply("Red.", [{"token": "Red.", "logprob": -0.5}])) as server:
        answer = judge(server).ask(pictures(1), [[Question("Which colour?", (), "red")]])[0][0]
    assert answer.text == "Red."
    assert answer.margin > 0


def test_ids_differ_where_answers_may():
    def id_of(**settings):
        return ServerVQA(["http://localhost/v1"], "judge", **settings).id

    same = id_of()
    assert same.startswith("server(judge, ")
    assert same == id_of(concurrency=3, most_characters=50, timeout=1)
    different = [
        {"template": "{question} {how}"},
        {"reasoning": 9},
        {"token_ids": {"yes": [1]}},
        {"extra_body": {"a": 1}},
    ]
    assert len({same, *(id_of(**settings) for settings in different)}) == 5


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"urls": "http://localhost"}, "urls"),
        ({"urls": ["localhost:8000"]}, "urls"),
        ({"template": "{how}"}, "template"),
        ({"template": "{question} {who}"}, "template"),
        ({"template": "{question}", "reasoning": 5}, "template"),
        ({"clamp": (0.4, 0.6)}, "clamp"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": -1.0}, "timeout"),
    ],
)
def test_settings_out_of_range_are_named(settings, field):
    with pytest.raises(ValueError, match=field):
        ServerVQA(**{"urls": ["http://localhost/v1"], "model": "judge", **settings})


def test_with_three_calls_in_ten_failing_no_row_is_lost_and_no_score_made_up():
    def plan(text, tried):
        draw = random.Random(f"{text} {tried}")
        return draw.choice(FAULTS) if draw.random() < 0.3 else ""

    images, asked = pictures(70), questions(70, 3)
    with ChatServer(plan=plan) as server:
        answered = judge(server, retries=2, timeout=0.5, deadline=30.0).ask(images, asked)
        failed = {
            fault for text, tries in server.tries.items() for tried in range(tries) if (fault := plan(text, tried))
        }
    assert_right(images, asked, answered)
    assert failed == set(FAULTS)
    doomed = [all(plan(told(question), tried) for tried in range(3)) for row in asked for question in row]
    flat = [answer for row in answered for answer in row]
    assert 1 <= sum(doomed) <= sum(not answer.valid for answer in flat) < 30
    for hopeless, answer in zip(doomed, flat, strict=True):
        assert not (hopeless and answer.valid)
        assert answer.valid or "no answer in 3 tries; last: http" in answer.error


@pytest.mark.parametrize("fault", FAULTS)
def test_one_question_that_always_fails_says_why_and_the_others_do_not_mind(fault):
    images, asked = pictures(3), questions(3, 2)
    with ChatServer(plan=lambda text, tried: fault if text == told(asked[1][0]) else "") as server:
        answered = judge(server, retries=1, timeout=0.8 if fault == "hang" else 5.0, failures=1).ask(images, asked)
        assert server.tries[told(asked[1][0])] == 2
    assert_right(images, asked, answered)
    assert [answer.valid for row in answered for answer in row] == [True, True, False, True, True, True]
    reason = {
        "hang": "no reply within 0.8 s",
        "reset": "ReadError",
        "429": "Error code: 429",
        "500": "Error code: 500",
        "truncated": "bad reply: .*EOF",
        "schema": "bad reply: choices.0.logprobs.content: Field required",
        "nan": "bad reply: choices.0.logprobs.content.0.top_logprobs.0.logprob: Input should be a finite number",
        "range": "bad reply: .*less than or equal",
        "duplicate": "bad reply: choices: .* at most 1 item",
    }[fault]
    assert re.search(f"^no answer in 2 tries; last: http.*{reason}", answered[1][0].error)


def test_what_is_refused_is_not_asked_again():
    with ChatServer(plan=lambda text, tried: "400") as server:
        answer = judge(server).ask(pictures(1), [[YES_NO]])[0][0]
        assert len(server.asked()) == 1
    assert "Error code: 400" in answer.error


def test_the_server_says_how_long_to_wait():
    with ChatServer(plan=lambda text, tried: "" if tried else "429") as server:
        server.retry_after = "1"
        assert judge(server).ask(pictures(1), [[YES_NO]])[0][0].valid
        first, second = server.asked()
    assert second.time - first.time >= 1


def test_all_tries_of_a_question_share_one_deadline():
    with ChatServer(plan=lambda text, tried: "500") as server:
        start = time.monotonic()
        answer = judge(server, deadline=0.5, retries=1000, failures=10**6).ask(pictures(1), [[YES_NO]])[0][0]
    assert time.monotonic() - start < 3
    assert "no answer within 0.5 s; last: http" in answer.error


def test_a_server_that_only_fails_is_left_alone_and_another_takes_over():
    images, asked = pictures(10), questions(10, 3)
    with ChatServer(plan=lambda text, tried: "500") as sick, ChatServer() as well:
        answered = judge(sick, well, failures=3, concurrency=2, rest=60.0).ask(images, asked)
        assert 3 <= len(sick.asked()) <= 4
        assert len(well.asked()) == 30
    assert_right(images, asked, answered)
    assert all(answer.valid for row in answered for answer in row)


def test_calls_go_to_the_server_with_the_fewest_of_them():
    def slowly(seen):
        time.sleep(0.2)
        return yes_or_no(seen)

    with ChatServer(answer=slowly) as slow, ChatServer() as quick:
        judge(slow, quick, concurrency=4).ask(pictures(10), questions(10, 4))
        assert 2 <= len(slow.asked()) <= 15


def test_a_failed_call_is_tried_elsewhere():
    with ChatServer(plan=lambda text, tried: "500") as sick, ChatServer() as well:
        answered = judge(sick, well, retries=1, concurrency=1, failures=10**6).ask(pictures(5), questions(5, 2))
        assert len(sick.asked()) == 10
    assert all(answer.valid for row in answered for answer in row)


@pytest.mark.parametrize("fault", ["500", "429"])
def test_only_failures_in_a_row_make_a_server_rest_and_being_busy_is_none(fault):
    most = {"500": 2, "429": 1}[fault]
    with ChatServer(plan=lambda text, tried: "" if tried else fault) as server:
        answered = judge(server, failures=most, concurrency=1, rest=60.0).ask(pictures(5), questions(5, 1))
    assert all(answer.valid for row in answered for answer in row)


def test_a_server_that_replies_with_errors_is_there():
    with ChatServer(plan=lambda text, tried: "500") as server:
        answered = judge(server, retries=0, concurrency=2, failures=10**6).ask(pictures(8), questions(8, 1))
    assert all("Error code: 500" in answer.error for row in answered for answer in row)


def test_a_rested_server_is_asked_again():
    class Recovering(ChatServer):
        def look(self, *request):
            self.down = 1 <= len(self.seen) < 9
            return super().look(*request)

    images, asked = pictures(4), questions(4, 2)
    with Recovering() as server:
        answered = judge(server, failures=2, concurrency=2, patience=5.0).ask(images, asked)
    assert_right(images, asked, answered)
    assert all(answer.valid for row in answered for answer in row)


def test_one_server_down_from_the_start_is_borne():
    with ChatServer() as gone, ChatServer() as well:
        gone.down = True
        answered = judge(gone, well).ask(pictures(2), questions(2, 2))
    assert_right(pictures(2), questions(2, 2), answered)
    assert all(answer.valid for row in answered for answer in row)


def test_nobody_there_is_unavailable_at_once():
    with ChatServer() as server:
        pass
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"no judge can be reached: http://.*All connection attempts failed"):
        judge(server).ask(pictures(1), [[YES_NO]])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("rows", "alive_for", "concurrency"), [(30, 6, 1), (30, 6, 16), (1, 1, 1)])
def test_a_server_that_goes_down_makes_the_judge_unavailable(rows, alive_for, concurrency):
    class Dying(ChatServer):
        def look(self, *request):
            self.down = len(self.seen) >= alive_for
            return super().look(*request)

    start = time.monotonic()
    with Dying() as server, pytest.raises(Unavailable):
        judge(server, concurrency=concurrency).ask(pictures(rows), questions(rows, 1))
    assert time.monotonic() - start < 5


def test_a_server_that_hangs_but_calls_itself_well_is_unavailable_after_one_round():
    with ChatServer(plan=lambda text, tried: "hang") as server, pytest.raises(Unavailable, match="raise timeout"):
        judge(server, concurrency=2, timeout=0.1, retries=0).ask(pictures(50), questions(50, 1))
    assert len(server.asked()) < 10


def test_a_server_of_another_model_is_named():
    with (
        ChatServer(model="other") as server,
        pytest.raises(ValueError, match="does not serve 'judge', it serves other"),
    ):
        judge(server).ask(pictures(1), [[YES_NO]])


def test_an_address_that_is_not_the_servers_is_named():
    class Elsewhere(ChatServer):
        def look(self, *request):
            return super().look(*request)[0], "400"

    with Elsewhere() as server, pytest.raises(ValueError, match=r"urls: .*400.*end in /v1"):
        judge(server).ask(pictures(1), [[YES_NO]])


def test_a_bad_row_fails_with_its_reason_and_good_rows_go_on():
    images = pictures(4)
    samples = [images[0], images[1:], images[1].astype(np.uint16), images[0]]
    asked = [[Question("x" * 200)], [YES_NO], [YES_NO], [YES_NO]]
    with ChatServer() as server:
        answered = judge(server, most_characters=100, most_images=2).ask(samples, asked)
        assert len(server.asked()) == 1
    long, many, deep, good = (row[0] for row in answered)
    assert long.error == "makes 228 characters with its instructions, most_characters is 100"
    assert many.error == "the sample has 3 pictures, most_images is 2"
    assert deep.error == "the picture is uint16 (8, 8, 3), not uint8 (H, W, 3)"
    assert good.valid


def test_choices_that_the_template_does_not_show_are_not_asked():
    with ChatServer() as server:
        vqa = judge(server, template="Question: {question} Answer:")
        letters, plain = vqa.ask(pictures(1), [[Question("?", ("red", "blue"), "red"), Question("{is it}?")]])[0]
        assert [seen.texts for seen in server.asked()] == [("Question: {is it}? Answer:",)]
    assert "no {how}" in letters.error
    assert plain.valid


def test_nothing_asked_calls_nobody():
    assert ServerVQA(["http://127.0.0.1:9/v1"], "judge").ask(pictures(2), [[], []]) == [[], []]
    with pytest.raises(ValueError, match="questions: there are lists for 1"):
        ServerVQA(["http://127.0.0.1:9/v1"], "judge").ask(pictures(2), [[YES_NO]])


def test_with_the_defaults_a_server_that_is_down_ends_a_call_within_a_minute():
    limits = Limits()
    waits = sum(limits.backoff * 2**tried for tried in range(PROBES - 1)) + (PROBES - 1) * limits.backoff
    assert limits.deadline + PROBES * limits.probe + waits < 60
    assert limits.patience < limits.deadline

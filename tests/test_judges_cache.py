"""The cache: the answers of the model behind it, nothing asked twice, safe among processes and after damage."""

import contextlib
import json
import logging
import math
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from judges.base import Answer, Question
from judges.cache import CachedVQA

HOME = Path(__file__).parent.parent
RED, BLUE = Question("is it red?"), Question("is it blue?")


class Eye:
    """Margin: the mean of the first picture, and the length of the question. Notes what it was asked."""

    most_images = 2

    def __init__(self, id: str = "eye", template: str = "{}"):
        self.id, self.template = id, template
        self.calls: list[list[list[str]]] = []

    def ask(self, samples, questions):
        self.calls.append([[q.text for q in asked] for asked in questions])
        return [
            [self.answer(sample, question) for question in asked]
            for sample, asked in zip(samples, questions, strict=True)
        ]

    def answer(self, sample, question):
        return Answer(question.text, float(np.mean(sample[0])) / 7 + len(question.text), "yes", 0.1)


class Blinking(Eye):
    """Fails at each question the first time."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def answer(self, sample, question):
        if question.text in self.seen:
            return super().answer(sample, question)
        self.seen.add(question.text)
        return Answer.failed(question.text, "timed out")


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))


def test_the_second_run_makes_no_call_and_answers_alike(tmp_path, images):
    questions = [[RED, BLUE], [RED], [], [BLUE]]
    first = CachedVQA(Eye(), tmp_path / "cache.sqlite")
    answers = first.ask(images, questions)
    assert answers == Eye().ask(images, questions)
    second = CachedVQA(Eye(), tmp_path / "cache.sqlite")
    assert second.ask(images, questions) == answers
    assert second.vqa.calls == []


def test_only_what_is_missing_is_asked_each_distinct_thing_once_in_one_call(tmp_path, images):
    eye = Eye()
    cached = CachedVQA(eye, tmp_path / "cache.sqlite")
    cached.ask(images[:1], [[RED]])
    same = images[1].copy()
    answers = cached.ask([images[0], images[1], same], [[RED, BLUE], [RED, RED], [BLUE, RED]])
    assert eye.calls[1:] == [[[BLUE.text], [RED.text, BLUE.text]]]
    assert answers == Eye().ask([images[0], images[1], same], [[RED, BLUE], [RED, RED], [BLUE, RED]])


def test_whatever_changes_the_answer_changes_the_key(tmp_path, images):
    path, image = tmp_path / "cache.sqlite", images[0]
    CachedVQA(Eye(), path).ask([image], [[RED]])
    unlike = [
        (Eye(id="other eye"), image, RED),
        (Eye(template="Q: {}"), image, RED),
        (Eye(), image, BLUE),
        (Eye(), image, Question(RED.text, expected="no")),
        (Eye(), image, Question(RED.text, choices=("yes", "no", "unsure"))),
        (Eye(), image.reshape(4, 16, 3), RED),
        (Eye(), [image, image], RED),
        (Eye(), image + 1, RED),
    ]
    for number, (eye, sample, question) in enumerate(unlike):
        CachedVQA(eye, path).ask([sample], [[question]])
        assert len(eye.calls) == 1, f"case {number} was taken for another"
    like = [(image.copy(), RED), ([image], RED), (np.asfortranarray(image), RED), (image, Question(RED.text, weight=3))]
    for sample, question in like:
        eye = Eye()
        CachedVQA(eye, path).ask([sample], [[question]])
        assert eye.calls == []


def test_a_failure_is_not_kept(tmp_path, images):
    path, eye = tmp_path / "cache.sqlite", Blinking()
    assert CachedVQA(eye, path).ask(images[:1], [[RED]])[0][0].error == "timed out"
    assert CachedVQA(eye, path).ask(images[:1], [[RED]])[0][0].valid
    CachedVQA(eye, path).ask(images[:1], [[RED]])
    assert len(eye.calls) == 2


@pytest.mark.parametrize("margin", [1e-300, -0.0, 3, np.float32(0.1)])
def test_an_answer_comes_back_to_the_bit(margin, tmp_path, images):
    eye = Eye()
    eye.answer = lambda sample, question: Answer(question.text, margin, "\ud800\0 naïve")
    for _ in range(2):
        (answer,) = CachedVQA(eye, tmp_path / "cache.sqlite").ask(images[:1], [[RED]])[0]
        assert np.float64(answer.margin).tobytes() == np.float64(margin).tobytes()
        assert (answer.question, answer.text) == (RED.text, "\ud800\0 naïve")
        assert math.isnan(answer.certainty)
    assert len(eye.calls) == 1


WRITER = """
import sys
import numpy as np
from judges.base import Answer, Question
from judges.cache import CachedVQA

class Eye:
    id, template, most_images = "eye", "{}", 1
    def ask(self, samples, questions):
        return [[Answer(q.text, float(s[0, 0, 0])) for q in asked] for s, asked in zip(samples, questions)]

print("ready", flush=True)
sys.stdin.readline()
cached = CachedVQA(Eye(), sys.argv[1])
for number in range(100):
    shared, own = (np.full((1, 1, 3), number, np.uint8), np.full((1, 2, 3), number, np.uint8))
    answers = cached.ask([shared, own], [[Question("shared?")], [Question(f"of {sys.argv[2]}?")]])
    assert [a.margin for (a,) in answers] == [number, number]
"""


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "new" / "cache.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": HOME, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        kept = [json.loads(answer) for (answer,) in database.execute("SELECT answer FROM answers")]
    assert Counter(answer["question"] for answer in kept) == {"of a?": 100, "of b?": 100, "shared?": 100}


def overwrite_head(path: Path) -> None:
    path.write_bytes(b"this was a database" + path.read_bytes()[19:])


def overwrite_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


@pytest.mark.parametrize("damage", [overwrite_head, overwrite_pages, truncate])
@pytest.mark.parametrize("opened", [False, True], ids=["before it is opened", "while it is open"])
def test_a_damaged_file_is_set_aside_and_begun_anew(damage, opened, tmp_path, images, caplog):
    path, questions = tmp_path / "cache.sqlite", [[RED, BLUE]] * 4
    cached = CachedVQA(Eye(), path)
    expected = cached.ask(images, questions)
    damage(path)
    broken = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        cached = cached if opened else CachedVQA(Eye(), path)
        assert cached.ask(images, questions) == expected
        assert CachedVQA(Eye(), path).ask(images, questions) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cache.sqlite.damaged-1" in caplog.text
    assert (tmp_path / "cache.sqlite.damaged-1").read_bytes() == broken
    again = CachedVQA(Eye(), path)
    assert again.ask(images, questions) == expected
    assert again.vqa.calls == []


@pytest.mark.parametrize("length", [1, 40, 2000])
def test_no_damage_anywhere_ends_a_run_or_changes_an_answer(length, tmp_path, images):
    path, random = tmp_path / "cache.sqlite", np.random.default_rng(0)
    many = [[Question(f"{number}?" + "x" * 400) for number in range(20)]] * 4
    expected = CachedVQA(Eye(), path).ask(images, many)
    whole = path.read_bytes()
    for start in random.integers(100, len(whole), 10):
        path.write_bytes(whole[:start] + random.bytes(length) + whole[start + length :])
        assert CachedVQA(Eye(), path).ask(images, many) == expected


def test_a_cache_deleted_meanwhile_is_begun_anew(tmp_path, images):
    cached = CachedVQA(Eye(), tmp_path / "cache.sqlite")
    expected = cached.ask(images[:1], [[RED]])
    cached._store.path.unlink()
    assert cached.ask(images[:1], [[RED]]) == expected


def test_the_database_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "theirs.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE treasures (name)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"theirs\.sqlite is an SQLite database of something else"):
        CachedVQA(Eye(), path)
    assert path.read_bytes() == before


def test_at_rest_the_cache_is_one_file_and_its_lock(tmp_path, images):
    CachedVQA(Eye(), tmp_path / "cache.sqlite").ask(images, [[RED]] * 4)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["cache.sqlite", "cache.sqlite.lock"]

"""DSG: what is published can be read, and its scores agree with people as much as the paper's authors found."""

import csv
from itertools import groupby, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from judges.base import Answer, Question
from judges.questions import checked_graph, dsg
from tests.dsg import read_answers, read_graphs, score

MODELS = ("pali17b", "instructblip")
GRAPH_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
ANSWER_COLUMNS = ("t2i_model", "item_id", "question_id", "dependency_id", "question", "answer")


@pytest.fixture(scope="module")
def tifa160(tmp_path_factory):
    """Each model's answers as read from a file like the published one, and the mean human rating of each picture."""
    rows = pq.read_table(Path(__file__).parent / "data/dsg_tifa160.parquet").to_pylist()
    folder = tmp_path_factory.mktemp("dsg")
    answered = {}
    for model in MODELS:
        told = [[row[column] for column in ANSWER_COLUMNS[:-1]] + [row[model]] for row in rows]
        answered[model] = read_answers(write(folder / f"{model}.csv", ANSWER_COLUMNS, told))
    return answered, {(row["t2i_model"], row["item_id"]): row["human"] for row in rows}


def write(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def graph(folder, *dependencies):
    rows = [("a", "a prompt", i, dependency, f"Question {i}?") for i, dependency in enumerate(dependencies, 1)]
    return read_graphs(write(folder / "graphs.csv", GRAPH_COLUMNS, rows))["a"].questions


def answers(*said):
    return [Answer("", {"yes": 1.0, "no": -1.0}[word]) for word in said]


@pytest.mark.parametrize(
    ("model", "dependencies", "expected"),
    [
        ("pali17b", True, 0.566),
        ("pali17b", False, 0.566),
        ("instructblip", True, 0.435),
        ("instructblip", False, 0.429),
    ],
)
def test_agreement_with_people(tifa160, model, dependencies, expected):
    answered, human = tifa160
    assert len(answered[model]) == 795
    scores = [score(a.questions, a.answers, dependencies) for a in answered[model]]
    rank = spearmanr(scores, [human[a.generator, a.item] for a in answered[model]]).statistic
    assert rank == pytest.approx(expected, abs=0.0006)


@pytest.mark.parametrize("model", MODELS)
def test_dependencies_only_ever_lower_a_score(tifa160, model):
    scores = [
        [score(a.questions, a.answers, dependencies) for dependencies in (True, False)] for a in tifa160[0][model]
    ]
    assert all(dependent <= free for dependent, free in scores)
    assert any(dependent < free for dependent, free in scores)


@pytest.mark.parametrize("model", MODELS)
def test_margins_rank_pictures_of_graphs_of_one_size_as_scores_do(tifa160, model):
    def size(answered):
        return len(answered.questions)

    for _, group in groupby(sorted(tifa160[0][model], key=size), key=size):
        pictures = [(a.questions, a.answers) for a in group]
        margins = [dsg(*picture) for picture in pictures]
        scores = [score(*picture) for picture in pictures]
        order = sorted(range(len(pictures)), key=scores.__getitem__)
        for worse, better in pairwise(order):
            if scores[worse] == scores[better]:
                assert margins[worse] == margins[better]
            else:
                assert margins[worse] < margins[better]


def test_what_is_neither_yes_nor_no_is_a_failure_and_counts_for_nothing(tifa160):
    for model, failed in (("pali17b", 14), ("instructblip", 22)):
        said = [answer for answered in tifa160[0][model] for answer in answered.answers]
        assert sum(not answer.valid for answer in said) == failed
        assert all(answer.text in ("yes", "no") for answer in said if answer.valid)
    question = [Question("Is there a dog?")]
    assert score(question, [Answer.failed("Is there a dog?", "neither yes nor no: 'maybe'")]) == 0


def test_scores_by_hand():
    chain = [Question("dog?"), Question("brown?", parents=(0,)), Question("dark?", parents=(1,)), Question("cat?")]
    said = answers("no", "yes", "yes", "yes")
    assert score(chain, said, dependencies=False) == 3 / 4
    assert score(chain, said) == 2 / 4
    assert score(chain, answers("yes", "yes", "no", "yes")) == 3 / 4


@pytest.mark.parametrize(
    ("dependencies", "parents"),
    [
        (("0", "1", "1,2"), [(), (0,), (0, 1)]),
        (("0", "0", "2 , 1, 1"), [(), (), (1, 0)]),
        (("0", "1, outside", "air"), [(), (0,), ()]),
        (("0", "0,1", ""), [(), (0,), ()]),
        (("0", "1,2", "9"), [(), (0,), ()]),
        (("2", "0"), [(1,), ()]),
        (("3", "3", "1,2"), [(), (), (0, 1)]),
        (("2", "3", "1"), [(1,), (), (0,)]),
    ],
)
def test_dependencies_that_make_no_sense_are_dropped(tmp_path, dependencies, parents):
    questions = graph(tmp_path, *dependencies)
    assert [question.parents for question in questions] == parents
    checked_graph(questions)


def test_graphs_keep_their_prompts_and_what_has_no_question_is_left_out(tmp_path):
    rows = [
        ("b", "a dog", "1", "0", "Is there a dog?"),
        ("a", "two, cats", "1", "0", " "),
        ("a", "two, cats", "2", "1", " Are there cats? "),
        ("a", "two, cats", "3", "2", "Are there two?"),
        ("a", "two, cats", "3", "3", "Do they sleep?"),
    ]
    graphs = read_graphs(write(tmp_path / "graphs.csv", GRAPH_COLUMNS, rows))
    assert [(found.item, found.prompt) for found in graphs.values()] == [("b", "a dog"), ("a", "two, cats")]
    assert [(q.text, q.parents) for q in graphs["a"].questions] == [
        ("Are there cats?", ()),
        ("Are there two?", (0,)),
        ("Do they sleep?", (1,)),
    ]


def test_answers_stay_with_their_questions(tmp_path):
    rows = [
        ("sd", "a", "1", "0", "", "yes"),
        ("sd", "a", "2", "0", "Is there a dog?", "no"),
        ("vq", "a", "1", "0", "Is there a dog?", "yes"),
        ("sd", "a", "3", "2", "Is it brown?", "yes"),
    ]
    first, second = read_answers(write(tmp_path / "answers.csv", ANSWER_COLUMNS, rows))
    assert (first.generator, first.item, second.generator) == ("sd", "a", "vq")
    assert [(a.question, a.text, a.margin > 0) for a in first.answers] == [
        ("Is there a dog?", "no", False),
        ("Is it brown?", "yes", True),
    ]
    assert [question.text for question in first.questions] == [answer.question for answer in first.answers]
    assert first.questions[1].parents == (0,)


def test_a_file_that_cannot_be_read_is_named_with_what_it_lacks(tmp_path):
    path = write(tmp_path / "bad.csv", GRAPH_COLUMNS[:-1], [])
    with pytest.raises(ValueError, match=r"bad\.csv: no column question_natural_language"):
        read_graphs(path)
    with pytest.raises(ValueError, match=r"short\.csv:2: no dependency, question_natural_language"):
        read_graphs(write(tmp_path / "short.csv", GRAPH_COLUMNS, [("a", "a dog", "1")]))

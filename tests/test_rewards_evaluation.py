"""What is computed of a reward, on pictures whose truth, scores and labels are planted."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm

from rewards.evaluation import CEILING, REWARD, Pairs, Pictures, evaluate, gold_pairs, log_odds
from rewards.losses import BradleyTerry, Gaussian, RaoKupper, Scores
from rewards.metrics import standard_error
from rewards.metrics.intervals import resample

PROMPTS, SIBLINGS = 80, 4


def planted(prompts=PROMPTS, noise=1.0, **changes):
    """Pictures of which every other follows its prompt; the reward is gold and noise, the judge gold itself."""
    rng = np.random.default_rng(0)
    count = prompts * SIBLINGS
    gold = np.arange(count) % 2.0
    ids = np.repeat([f"p{k:03}" for k in range(prompts)], SIBLINGS)
    reward = gold + noise * rng.normal(size=count)
    texts = np.array([f"{'no' if k % 2 else 'a'} prompt {k // SIBLINGS}" for k in range(count)])
    found = {
        "prompt_ids": ids,
        "prompts": np.repeat(texts[::SIBLINGS], SIBLINGS),
        "skills": np.repeat(np.where(np.arange(prompts) % 2, "odd", "even"), SIBLINGS),
        "models": np.where(gold == 1, "good", "bad"),
        "read": np.repeat(texts[::SIBLINGS], SIBLINGS),
        "reward": reward,
        "sigma": np.full(count, np.nan),
        "judge": 4 * gold - 2,
        "gold": gold,
        "rivals": {"before training": rng.normal(size=count)},
    }
    return Pictures(**{**found, **changes})


def first_two(pictures, label=None):
    """The first two pictures of each prompt as pairs, of which the second is better."""
    first = np.arange(0, len(pictures.prompt_ids), SIBLINGS)
    return Pairs("judge", first, first + 1, np.full(len(first), 0.2) if label is None else label)


def lines(found):
    return {(line.task, line.scorer): line for line in found.lines}


def test_gold_is_asked_about_every_pair_that_it_tells_apart():
    pairs = gold_pairs(planted(prompts=3))
    assert len(pairs) == 3 * 4  # two that follow against two that do not
    pictures = planted(prompts=3)
    assert (pictures.prompt_ids[pairs.first] == pictures.prompt_ids[pairs.second]).all()
    np.testing.assert_array_equal(pairs.label, pictures.gold[pairs.first])
    assert 0 < pairs.label.mean() < 1  # neither side is always the better one
    assert len(gold_pairs(planted(gold=np.full(PROMPTS * SIBLINGS, np.nan)))) == 0


def test_a_reward_that_is_gold_is_right_and_leads_by_what_the_others_miss():
    pictures = planted(noise=0)
    found = evaluate(pictures, first_two(pictures), BradleyTerry())
    assert [task.name for task in found.tasks] == ["gold", "judge"]
    table = lines(found)
    assert table["gold", REWARD].accuracy.value == table["gold", "judge"].accuracy.value == 1
    assert found.tasks[0].ranking.best_of_4.value == found.tasks[0].ranking.kendall.value == pytest.approx(1)
    assert table["gold", "judge"].lead.value == 0
    rival = table["gold", "before training"]
    assert rival.lead.value == pytest.approx(1 - rival.accuracy.value)
    assert abs(table["gold", "random"].accuracy.value - 0.5) < 0.1
    assert ("judge", "judge") not in table  # its labels are the task
    painters = {painter.model: painter for painter in found.painters}
    assert (painters["good"].by_label.value, painters["bad"].by_reward.value) == (1, 0)


def test_soft_labels_have_a_ceiling_that_one_who_knows_them_reaches():
    pictures = planted()
    label = np.random.default_rng(1).uniform(0, 1, PROMPTS)
    knowing = np.zeros(PROMPTS * SIBLINGS)
    knowing[::SIBLINGS] = label - 0.5
    found = lines(evaluate(planted(reward=knowing), first_two(pictures, label), BradleyTerry()))
    ceiling = found["judge", CEILING].drawn.value
    assert ceiling == pytest.approx(np.maximum(label, 1 - label).mean())
    assert found["judge", REWARD].drawn.value == pytest.approx(ceiling)
    turned = lines(evaluate(planted(reward=-knowing), first_two(pictures, label), BradleyTerry()))
    assert turned["judge", REWARD].drawn.value == pytest.approx(1 - ceiling)
    assert turned["judge", REWARD].accuracy.value == 0


def test_gold_of_few_prompts_gives_way_to_labels_of_many():
    known = np.where(np.arange(PROMPTS * SIBLINGS) < 10 * SIBLINGS, planted().gold, np.nan)
    found = evaluate(planted(gold=known), first_two(planted()), BradleyTerry())
    assert [task.name for task in found.tasks] == ["judge", "gold"]
    assert found.line.task == found.labelled.name == "judge"
    assert lines(found)["gold", REWARD].error is None
    assert found.tasks[1].agreement.imagereward.note == "no interval: 10 prompts, and it takes 50"


def test_pictures_without_a_reward_are_left_out_everywhere():
    pictures = planted(noise=0)
    pictures.reward[::SIBLINGS] = np.nan
    with pytest.raises(ValueError, match=r"^label: no pair with two scores has a better picture"):
        evaluate(planted(noise=0, reward=pictures.reward, gold=pictures.sigma), first_two(pictures), BradleyTerry())
    found = evaluate(pictures, first_two(pictures), BradleyTerry())
    assert [task.name for task in found.tasks] == ["gold"]
    assert found.line.accuracy.count == 2 * PROMPTS


def test_slices_are_of_what_differs():
    pictures = planted()
    found = evaluate(pictures, first_two(pictures), BradleyTerry())
    columns = {line.column for line in found.slices if line.task == "gold"}
    assert columns == {"skill"}  # all prompts are of one length, read whole, and of either model
    read = pictures.read.copy()
    read[: 2 * SIBLINGS] = "a"
    cut = evaluate(planted(read=read), first_two(pictures), BradleyTerry())
    counts = {
        line.value: line.accuracy.count for line in cut.slices if (line.task, line.column) == ("gold", "prompt read")
    }
    assert counts == {"cut": 8, "whole": 4 * PROMPTS - 8}


def test_log_odds_are_those_of_the_loss():
    pictures = planted()
    pairs = first_two(pictures)
    margin = pictures.reward[pairs.first] - pictures.reward[pairs.second]
    np.testing.assert_allclose(log_odds(pictures, pairs, BradleyTerry()), margin, atol=1e-6)
    sigma = np.full(PROMPTS * SIBLINGS, 0.7)
    loss = Gaussian(min_std=1e-6)
    unsure = log_odds(planted(sigma=sigma), pairs, loss)
    np.testing.assert_allclose(expit(unsure), norm.cdf(margin / np.hypot(0.7, 0.7)), atol=1e-6)
    tied = RaoKupper(tie=0.5)
    a, b = (Scores(torch.tensor(pictures.reward[places])) for places in (pairs.first, pairs.second))
    np.testing.assert_allclose(expit(log_odds(pictures, pairs, tied)), tied.probability(a, b), atol=1e-9)


def test_sigma_is_weighed_where_there_is_one():
    rng = np.random.default_rng(2)
    sigma = rng.choice([0.1, 5.0], PROMPTS * SIBLINGS)
    pictures = planted(sigma=sigma)
    pictures.reward[:] = pictures.gold + sigma * rng.normal(size=len(sigma))
    found = evaluate(pictures, first_two(pictures), Gaussian())
    assert found.tasks[0].uncertainty.auc.interval[0] > 0.5
    assert evaluate(planted(), first_two(pictures), BradleyTerry()).tasks[0].uncertainty is None


def test_the_standard_error_is_the_deviation_of_the_bootstrap():
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(100), 5)
    values = rng.normal(size=100)[prompts] + rng.normal(size=500)
    sums = np.bincount(prompts, values)
    means = resample(lambda drawn: drawn @ sums / 500, 100)
    assert standard_error(values, prompts) == pytest.approx(means.std(), rel=0.05)
    alone = standard_error(values, np.arange(500))
    assert alone == pytest.approx(values.std(ddof=1) / np.sqrt(500))
    assert standard_error(values[:200], prompts[:200]) is None

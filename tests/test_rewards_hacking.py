import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from rewards.hacking import (
    Action,
    Measured,
    Signal,
    act,
    distances,
    diversity_loss,
    frontier,
    heldout_gap,
    judge_disagreement,
    judge_divergence,
    kl_frontier,
    pixel_shifts,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def seen(rng: np.random.Generator, prompts: int = 80, siblings: int = 4, rise: float = 0.0) -> Measured:
    """A reward on images of prompts of unlike difficulty."""
    names = np.repeat(np.arange(prompts), siblings)
    return Measured(rise + rng.normal(size=prompts)[names] + rng.normal(size=len(names)), names)


def both(rng: np.random.Generator, reward: float = 0.0, judge: float = 0.0, noise: float = 0.5):
    """Reward and judge on the same images."""
    found = seen(rng)
    said = Measured(found.values + judge + noise * rng.normal(size=len(found.values)), found.prompts)
    return Measured(found.values + reward, found.prompts), said


def alarm(name: str, status: str = "alarm") -> Signal:
    return Signal(name, 1.0, 0.5, status)


def test_a_gap_is_a_rise_on_the_rollouts_alone(rng):
    base, base_heldout = seen(rng), seen(rng, rise=-2)
    even = heldout_gap(seen(rng, rise=3), seen(rng, rise=1), base, base_heldout)
    assert even.status == "ok"
    learned_by_heart = heldout_gap(seen(rng, rise=3), seen(rng, rise=-2), base, base_heldout)
    assert learned_by_heart.status == "alarm"
    assert learned_by_heart.value == pytest.approx(3, abs=0.7)


def test_reward_and_judge_may_rise_together_and_not_apart(rng):
    base = both(rng)
    assert judge_divergence(*both(rng, 2, 2), *base).status == "ok"
    assert judge_divergence(*both(rng, 2, 0), *base).status == "alarm"
    assert judge_divergence(*both(rng, 0, 2), *base).status == "ok"


def test_an_honest_reward_that_errs_is_not_blamed_for_the_judges_regression(rng):
    """The best of many pictures by such a reward are better by the judge too, but not by as much."""

    def pictures(best_of: int) -> tuple[Measured, Measured]:
        judge = rng.normal(size=(80, 8, best_of))
        reward = judge + 0.7 * rng.normal(size=judge.shape)
        best = reward.argmax(axis=2)[..., None]
        prompts = np.repeat(np.arange(80), 8)
        return tuple(Measured(np.take_along_axis(one, best, 2).ravel(), prompts) for one in (reward, judge))

    base, chosen = pictures(1), pictures(16)
    rises = [
        (best.values.mean() - one.values.mean()) / one.values.std() for best, one in zip(chosen, base, strict=True)
    ]
    found = judge_divergence(*chosen, *base)
    assert rises[0] - rises[1] > 2 * found.threshold
    assert found.status == "ok"


def test_a_reward_that_never_knew_the_judge_is_not_excused(rng):
    base, tuned = ((seen(rng, rise=rise), seen(rng)) for rise in (0, 3))
    assert judge_divergence(*tuned, *base).status == "alarm"


def test_disagreement_about_siblings_is_heard(rng):
    base = both(rng)
    assert judge_disagreement(*both(rng), *base).status == "ok"
    found = judge_disagreement(*both(rng, noise=2), *base)
    assert found.status == "alarm"
    assert 0 < found.threshold < found.value


def test_disagreement_at_the_base_is_what_the_correlation_leaves(rng):
    reward, judge = both(rng)
    by_prompt = [
        one.values.reshape(80, 4) - one.values.reshape(80, 4).mean(1, keepdims=True) for one in (reward, judge)
    ]
    correlation = np.corrcoef(*(values.ravel() for values in by_prompt))[0, 1]
    assert judge_disagreement(reward, judge, reward, judge).value == pytest.approx(1 - correlation)


def test_siblings_that_become_equally_good_are_no_disagreement(rng):
    base, (reward, judge) = both(rng), both(rng)
    difficulty = np.repeat(reward.means, 4)
    alike = Measured(difficulty + 0.2 * (reward.values - difficulty), reward.prompts)
    said = Measured(alike.values + (judge.values - reward.values), judge.prompts)
    assert np.corrcoef(alike.values - difficulty, said.values - difficulty)[0, 1] < 0.6
    assert judge_disagreement(alike, said, *base).status == "ok"
    flat = Measured(difficulty, judge.prompts)
    assert judge_disagreement(reward, flat, *base).status == "alarm"  # the judge sees nothing in what is rewarded
    constant = Measured(np.zeros_like(difficulty), judge.prompts)
    assert judge_disagreement(reward, judge, base[0], constant).status == "unknown"


def test_a_verdict_that_failed_is_left_out(rng):
    base = both(rng)
    reward, judge = both(rng, 2, 2)
    said = np.where(np.arange(len(judge.values)) % 5, judge.values, math.nan)
    for signal in (judge_divergence, judge_disagreement):
        found = signal(reward, Measured(said, judge.prompts), *base)
        assert found.status == "ok"
        assert math.isfinite(found.value)


def test_distance_is_that_of_all_pairs(rng):
    images, prompts = rng.normal(size=(20, 3, 5)), np.repeat([1, 2, 3], [8, 11, 1])
    found = distances(images, prompts)
    for place, name in enumerate((1, 2)):
        every = pdist(images[prompts == name].reshape(-1, 15))
        assert found[place] == pytest.approx(math.sqrt((every**2).mean() / 15))
    assert len(found) == 2


def test_siblings_that_grow_alike_raise_the_alarm(rng):
    prompts = np.repeat(np.arange(60), 4)
    base, tuned = rng.normal(size=(2, 240, 10))
    assert diversity_loss(tuned, prompts, base, prompts).status == "ok"
    found = diversity_loss(0.7 * tuned, prompts, base, prompts)
    assert (found.status, found.value) == ("alarm", pytest.approx(0.3, abs=0.05))
    assert diversity_loss(base[:1], prompts[:1], base, prompts).status == "unknown"


def test_pixels_may_shift_neither_way(rng):
    prompts = np.repeat(np.arange(60), 4)
    base, tuned = rng.normal(size=(2, 240, 3))
    base[:, 2] = tuned[:, 2] = 0.001024  # its mean is off by rounding
    tuned += [-1.0, 0.0, 0.0]
    found = {one.name: one.status for one in pixel_shifts(tuned, prompts, base, prompts, ["dark", "calm", "size"])}
    assert found == {"dark": "alarm", "calm": "ok"}


def test_a_run_that_pays_more_for_less_has_left_the_frontier(rng):
    base = seen(rng)
    kl = [0.0, 1.0, 2.0, 4.0]
    assert kl_frontier(kl, [0, 1, 2, 3], 80, base).status == "ok"
    assert kl_frontier(kl, [0, 1, 2, 1.9], 80, base).status == "ok"
    fallen = kl_frontier(kl, [0, 1, 2, 0.5], 80, base)
    assert (fallen.status, fallen.value) == ("alarm", 1.5)
    assert kl_frontier([0.0, 5.0, 1.0], [0, 9, 1], 80, base).status == "ok"
    assert kl_frontier([0.0], [0], 80, base).status == "unknown"
    assert kl_frontier([0.0, 0.1, 0.5, 1.0], [0, 2, np.nan, 0.5], 80, base).status == "alarm"
    assert kl_frontier([0.0, 0.1, 0.5, 1.0], [0, 2, 1, np.nan], 80, base).status == "unknown"
    assert frontier([4, 1, 2, 3, 2], [5, 1, 3, 2, 2]).tolist() == [1, 2, 0]


def test_few_prompts_of_the_base_model_say_nothing(rng):
    few, many = seen(rng, 49), seen(rng, 50)
    hacked = seen(rng, 20, rise=9)
    assert heldout_gap(hacked, many, few, many).status == "unknown"
    assert heldout_gap(hacked, many, many, many).status == "alarm"


def test_the_base_model_itself_seldom_raises_an_alarm(rng):
    """Thresholds allow for how few prompts a check has, and for how few the base model was seen on."""
    alarms = 0
    for _ in range(30):
        base, base_heldout = seen(rng, 50), seen(rng, 50)
        signals = (
            heldout_gap(seen(rng, 12), seen(rng, 50), base, base_heldout),
            judge_divergence(*both(rng), *both(rng)),
            kl_frontier([0, 1, 2], [seen(rng, 50).means.mean() for _ in range(3)], 50, base),
        )
        alarms += sum(signal.status == "alarm" for signal in signals)
    assert alarms <= 4


def test_one_alarm_warns_and_one_that_lasts_stops():
    quiet, loud, other = [alarm("heldout_gap", "ok")], [alarm("heldout_gap")], [alarm("diversity_loss")]
    assert act([quiet]) == Action("go_on", (), None)
    assert act([loud, quiet]) == Action("go_on", (), None)
    assert act([quiet, loud]) == Action("warn", ("heldout_gap",), None)
    assert act([quiet, other, loud]) == Action("warn", ("heldout_gap",), None)
    assert act([quiet, loud, loud]) == Action("stop", ("heldout_gap",), 0)
    assert act([quiet, other, loud, loud]) == Action("stop", ("heldout_gap",), 1)
    assert act([loud, loud]) == Action("stop", ("heldout_gap",), None)
    assert act([[alarm("heldout_gap", "unknown")]] * 3).kind == "go_on"
    assert act([loud], patience=1).kind == "stop"


def test_pixels_alone_stop_no_run():
    shifted = [alarm("saturation")]
    assert act([shifted] * 4) == Action("warn", ("saturation",), None)
    assert act([shifted] * 4, stopping=["saturation"]).kind == "stop"

"""The check of the reward: it says the same of a picture whenever it is asked, and whatever else it is asked about."""

import numpy as np

import rewards
from judges.ensemble import Ensemble
from judges.pairwise import GroupJudge
from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Subject

REWARD = "reward of a picture"


def repeatable(subject: Subject) -> Check:
    """Asked again, in another order, and of each picture alone, or of each group where siblings are compared."""
    images = list(subject.rolled(subject.prompts).images)
    siblings = len(images) // len(subject.prompts)
    texts = [prompt.text for prompt in subject.prompts for _ in range(siblings)]
    size = siblings if any(_compares(term.reward) for term in subject.reward.terms) else 1
    starts = range(0, len(images), size)

    def rated(rows: np.ndarray) -> np.ndarray:
        """(B, M), in the order of all pictures."""
        found = np.empty((len(images), len(subject.reward.terms)), dtype=np.float32)
        found[rows] = subject.reward.each([images[row] for row in rows], [texts[row] for row in rows])
        return found

    whole = rated(np.arange(len(images)))
    again = [rated(np.arange(len(images))), rated(np.concatenate([np.arange(i, i + size) for i in reversed(starts)]))]
    again.append(np.concatenate([subject.reward.each(images[i : i + size], texts[i : i + size]) for i in starts]))
    if any(not np.array_equal(np.isnan(whole), np.isnan(other)) for other in again):
        worst = np.inf
    else:
        worst = max(float(np.nanmax(np.abs(whole - other), initial=0.0)) for other in again)
    return Check.at_most(
        REWARD,
        worst,
        1e-3,
        "it depends on chance or on the batch: fix the judge's seed and temperature, and pad every batch to one length",
        "largest difference between asking at once, again, in another order and "
        + ("group by group" if size > 1 else "one by one"),
    )


def _compares(reward: "rewards.Reward") -> bool:
    """Whether a judge in it compares siblings with one another."""
    judges = [reward.judge] if isinstance(reward, rewards.JudgeReward) else []
    members = [one for judge in judges for one in (judge.judges if isinstance(judge, Ensemble) else (judge,))]
    return any(isinstance(member, GroupJudge) for member in members)

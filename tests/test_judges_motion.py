"""Clips keep to their prompt, or leave it where they say, and the oracle sees it too."""

import random

import numpy as np
import pytest

from judges.shapes.grammar import SKILLS, parse, sample_prompt
from judges.shapes.motion import breaks, broken, drifting, shown
from judges.shapes.oracle import follows
from judges.shapes.render import SIZE, apart, related, render

FRAMES = 8


def distinct(scene):
    return apart([(item.x, item.y) for item in scene], [item.radius for item in scene])


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [sample_prompt(rng, skill=skill) for skill in SKILLS for _ in range(6)]


def test_objects_drift_and_the_prompt_stays_true(prompts):
    rng = random.Random(1)
    for prompt in prompts:
        clip = drifting(prompt, rng, FRAMES)
        assert shown(prompt, clip) == (True,) * FRAMES
        assert all(follows(image, prompt) for image in render(clip))
        assert all(distinct(scene) and related(prompt.relation, [(i.x, i.y) for i in scene]) for scene in clip)
        assert len({image.tobytes() for image in render(clip)}) > FRAMES // 2
        for scene in clip:
            assert all(i.radius < i.x < SIZE - i.radius and i.radius < i.y < SIZE - i.radius for i in scene)
        assert {tuple((i.shape, i.colour, i.radius) for i in scene) for scene in clip} == {
            tuple((i.shape, i.colour, i.radius) for i in clip[0])
        }


def test_paths_are_smooth():
    rng = random.Random(2)
    for _ in range(20):
        (start,), *_ = clip = drifting(parse("a ring"), rng, 30)
        x, y = np.array([(item.x, item.y) for (item,) in clip]).T
        way = np.hypot(x[-1] - start.x, y[-1] - start.y)
        steps = np.hypot(np.diff(x), np.diff(y))
        assert steps.sum() == pytest.approx(way)  # straight
        assert steps.max() < 2 * way / len(steps)
        assert np.abs(np.diff(steps)).max() < 0.15 * steps.max()


@pytest.mark.parametrize("how", ["vanishes", "shape", "colour", "crosses"])
def test_a_broken_clip_follows_at_first_and_from_some_frame_on_no_more(prompts, how):
    rng = random.Random(3)
    starts = []
    for prompt in (prompt for prompt in prompts if how in breaks(prompt)):
        clip = broken(prompt, rng, FRAMES, how)
        shows, images = shown(prompt, clip), render(clip)
        starts.append(sum(shows))
        assert shows == (True,) * starts[-1] + (False,) * (FRAMES - starts[-1])
        assert follows(images[0], prompt)
        assert not follows(images[-1], prompt)
        assert all(map(distinct, clip))
        before, after = ({(item.shape, item.colour, item.radius) for item in scene} for scene in (clip[0], clip[-1]))
        assert len(before - after) == (how != "crosses")
        assert len(after - before) == (how in ("shape", "colour"))
    assert len(set(starts)) > 1


def test_the_oracle_sees_when_it_breaks(prompts):
    rng = random.Random(4)
    for prompt in prompts:
        for how in breaks(prompt)[:2]:
            clip = broken(prompt, rng, FRAMES, how)
            assert tuple(follows(image, prompt) for image in render(clip)) == shown(prompt, clip)


def test_what_a_prompt_leaves_open_cannot_break_it():
    assert breaks(parse("a ring")) == ("vanishes", "shape")
    assert breaks(parse("a red ring above a blue cross")) == ("vanishes", "shape", "colour", "crosses")
    with pytest.raises(ValueError, match="can be broken by vanishes, shape, not by 'colour'"):
        broken(parse("two rings"), random.Random(0), FRAMES, "colour")


def test_equal_chance_gives_equal_clips():
    prompt = parse("four red rings")
    first, second = (broken(prompt, random.Random(5), FRAMES, "vanishes") for _ in range(2))
    assert first == second

"""The embedded world: prompts, pictures and the oracle invert each other."""

import random

import numpy as np
import pytest

from judges.shapes.flaws import clean, flawed, patch_targets
from judges.shapes.grammar import (
    SHAPES,
    SKILLS,
    Prompt,
    Thing,
    all_prompts,
    change_one,
    holds,
    parse,
    sample_prompt,
    vocabulary,
)
from judges.shapes.lessons import answering_batch, matching_batch, retell
from judges.shapes.oracle import follows, read
from judges.shapes.questions import Query, decompose, describe, queries, question_vocabulary
from judges.shapes.render import SIZE, Item, render, scene_of


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(7)
    prompts = [sample_prompt(rng, skill=SKILLS[i % len(SKILLS)]) for i in range(2000)]
    scenes = [scene_of(prompt, rng) for prompt in prompts]
    return prompts, scenes, render(scenes)


@pytest.fixture(scope="module")
def seen(drawn):
    """What the oracle sees in each picture."""
    *_, images = drawn
    return [read(image) for image in images]


def test_oracle_accepts_renderings_of_their_own_prompt(drawn, seen):
    prompts, _, images = drawn
    accepted = [holds(prompt, things) for prompt, things in zip(prompts, seen, strict=True)]
    assert np.mean(accepted) >= 0.999
    assert [follows(image, p) for image, p in zip(images[:200], prompts, strict=False)] == accepted[:200]


def test_oracle_rejects_a_prompt_with_one_attribute_changed(drawn, seen):
    prompts, _, images = drawn
    rng = random.Random(8)
    changed = [change_one(prompt, rng) for prompt in prompts]
    accepted = [holds(prompt, things) for prompt, things in zip(changed, seen, strict=True)]
    assert np.mean(accepted) <= 0.001
    assert [follows(image, p) for image, p in zip(images[:200], changed, strict=False)] == accepted[:200]


def test_oracle_reads_back_what_was_painted(drawn):
    _, scenes, images = drawn
    for scene, image in zip(scenes[:200], images, strict=False):
        seen = sorted((s.shape, s.colour, round(s.x / 2), round(s.y / 2)) for s in read(image))
        assert [s[:2] for s in seen] == sorted((item.shape, item.colour) for item in scene)


def test_oracle_sees_nothing_on_an_empty_canvas_and_cannot_read_a_blob():
    assert read(render([()])[0]) == ()
    canvas = render([()])[0].copy()
    canvas[4:7, 2:30] = (230, 30, 36)
    assert [s.shape for s in read(canvas)] == [None]


def test_an_extra_object_breaks_every_prompt():
    scene = (Item("ring", "red", 8, 8, 5), Item("ring", "red", 24, 24, 5))
    image = render([scene])[0]
    assert follows(image, "two red rings")
    assert not follows(image, "a red ring")


def test_text_and_meaning_convert_without_loss():
    prompts = [p for skill in SKILLS for p in all_prompts(skill)]
    assert len(prompts) == len({p.text for p in prompts}) >= 10_000
    rng = random.Random(0)
    for prompt in rng.sample(prompts, 500):
        assert parse(prompt.text) == prompt
        assert prompt.skill in SKILLS
        assert set(prompt.text.split()) <= set(vocabulary())


@pytest.mark.parametrize("text", ["", "a dog", "two ring", "a red", "a ring above", "five rings", "a ring and a ring"])
def test_what_the_grammar_does_not_hold_is_an_error(text):
    with pytest.raises(ValueError, match="not in the grammar"):
        parse(text)


def test_splits_share_no_meaning_and_every_skill_has_both():
    for skill in SKILLS:
        train, held = all_prompts(skill, "train"), all_prompts(skill, "eval")
        assert train
        assert held
        assert not {p.key for p in train} & {p.key for p in held}
    assert parse("a red ring above a blue cross").split == parse("a blue cross below a red ring").split


def test_a_change_is_another_prompt_of_the_grammar():
    rng = random.Random(0)
    for skill in SKILLS:
        for prompt in rng.sample(all_prompts(skill), 5):
            changed = change_one(prompt, rng)
            assert changed.key != prompt.key
            assert changed.skill == skill


def test_decomposed_questions_are_all_true_of_the_right_picture_and_one_is_false_of_a_changed_one(drawn):
    prompts, scenes, _ = drawn
    rng = random.Random(3)
    for prompt, scene in zip(prompts[:300], scenes, strict=False):
        assert all(query.answer(scene) for query in queries(prompt))
        changed = change_one(prompt, rng)
        whole, *parts = queries(changed)
        assert not whole.answer(scene)
        assert not all(query.answer(scene) for query in parts)


def test_questions_are_plain_words_of_the_vocabulary():
    words = {*vocabulary(), *question_vocabulary()}
    asked = decompose("a red ring above a blue cross")
    assert asked[3].parents == (1, 2)
    assert [question.text for question in asked] == [
        "does this figure show a red ring above a blue cross?",
        "is there a red ring?",
        "is there a blue cross?",
        "is the red ring above the blue cross?",
        "are there exactly two objects?",
    ]
    for skill in SKILLS:
        for prompt in all_prompts(skill)[:20]:
            for question in decompose(prompt.text):
                assert set(question.text.replace("?", " ?").split()) <= words


def test_no_question_is_true_of_an_object_beyond_recognition():
    unknown = [Item("ring", None, 8, 8, 5)]
    assert not Query("exists", Prompt((Thing("ring"),))).answer(unknown)
    assert not holds(Prompt((Thing("ring"),)), unknown)


def test_flawed_pictures_agree_with_the_oracle_mostly_and_clean_ones_always(drawn):
    prompts, scenes, images = drawn
    rng = random.Random(5)
    spoilt = [flawed(scene, rng) for scene in scenes[:400]]
    agree = [follows(e.image, p) == holds(p, e.objects) for e, p in zip(spoilt, prompts, strict=False)]
    assert np.mean(agree) > 0.85
    assert 0.3 < np.mean([holds(p, e.objects) for e, p in zip(spoilt, prompts, strict=False)]) < 0.8
    assert all(np.array_equal(clean(s).image, image) for s, image in zip(scenes[:50], images, strict=False))


def test_patch_targets_name_the_object_under_each_patch():
    targets = patch_targets(clean((Item("square", "red", 16, 16, 6),)))
    middle = 3 * 8 + 3
    assert targets.shape[middle] == SHAPES.index("square")
    assert np.allclose(targets.offset[middle], [(16 - 14) / 8] * 2)
    assert np.isnan(targets.offset[0]).all()


def test_lessons_keep_to_the_training_split_and_tell_the_truth():
    batch = matching_batch(random.Random(0), 40)
    assert all(parse(text).split == "train" for told in batch.texts for text in told)
    assert 0.25 < batch.labels.mean() < 0.6
    answers = answering_batch(random.Random(0), 100, 4, "{}")
    assert len(answers.texts) == len(answers.index) == 500
    said = {
        kind: [say for text, say in answers.texts if text.startswith(kind)] for kind in ("does", "is the ", "is there")
    }
    assert all(0.25 < np.mean([say == "yes" for say in found]) < 0.75 for found in said.values())
    shown = [parse(text[len("does this figure show ") : -1]) for text, _ in answers.texts if text.startswith("does")]
    assert all(prompt.split == "train" for prompt in shown)


def test_a_description_gives_the_nearest_line_of_the_grid():
    scene = (Item("ring", "red", 15.9, 4.1, 5), Item("cross", "blue", 8, 27, 5))
    assert describe(scene, SIZE) == "blue cross x2 y7 , red ring x4 y1"
    assert describe(scene, SIZE, downwards=True) == "red ring x4 y1 , blue cross x2 y7"


def test_a_retold_scene_still_holds():
    rng = random.Random(1)
    found = 0
    for _ in range(200):
        scene = scene_of(sample_prompt(rng, "train"), rng)
        if told := retell(scene, rng):
            assert holds(told, scene)
            found += 1
    assert found > 50


def test_scenes_stay_on_the_canvas_and_apart():
    rng = random.Random(2)
    for _ in range(200):
        for item in scene_of(sample_prompt(rng), rng):
            assert item.radius <= item.x <= SIZE - item.radius
            assert item.radius <= item.y <= SIZE - item.radius

"""What the siblings of a prompt are painted from."""

from pipeline.prompts import PromptRow
from pipeline.stages.sample import paintings

PROMPTS = [PromptRow(text, "") for text in ("a red ring", "a red ring and a cross", "four squares", "a blue ring")]


def test_foreign_siblings_are_painted_from_other_prompts_and_come_last():
    for prompt, texts in zip(PROMPTS, paintings(PROMPTS, 5, 2, 0), strict=True):
        assert texts[:3] == [prompt.text] * 3
        assert len(texts) == 5
        assert prompt.text not in texts[3:]


def test_the_most_similar_prompts_are_chosen():
    many = [*PROMPTS, *(PromptRow(f"a red ring and {i} more", "") for i in range(10))]
    near = {text for texts in paintings(many, 30, 29, 0)[:1] for text in texts[1:]}
    assert "four squares" not in near
    assert len(near) > 3


def test_paintings_belong_to_the_prompt_and_the_seed():
    assert paintings(PROMPTS, 4, 3, 0) == paintings(PROMPTS, 4, 3, 0)
    assert paintings(PROMPTS, 4, 3, 0) != paintings(PROMPTS, 4, 3, 1)

"""The matching judge says what transformers' own heads say, picture by picture."""

import numpy as np
import pytest
import torch

from judges.matching import TEMPERATURE, MatchingJudge

PROMPTS = ["a red circle", "a blue square a green circle", "a", "a red square"]


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("head", ["itm", "itc"])
@pytest.mark.parametrize("batch", [1, 3])
def test_margins_are_those_of_the_models_heads(itm_folder, images, head, batch):
    judge = MatchingJudge.from_pretrained(itm_folder, head=head, batch=batch)
    verdicts = judge.score(images, PROMPTS)
    for image, prompt, verdict in zip(images, PROMPTS, verdicts, strict=True):
        inputs = judge.tokenizer(prompt, return_tensors="pt")
        pixels = judge.image_processor([image], return_tensors="pt").pixel_values
        with torch.inference_mode():
            out = judge.model(
                pixel_values=pixels,
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                use_image_text_matching_head=head == "itm",
            ).logits_per_image[0]
        expected = (out[1] - out[0]) if head == "itm" else out[0] / TEMPERATURE
        assert verdict.margin == pytest.approx(expected.item(), abs=1e-5)
        assert verdict.valid


def test_a_prompt_that_is_too_long_has_no_verdict(itm_folder, images):
    judge = MatchingJudge.from_pretrained(itm_folder)
    fine, long = judge.score(images[:2], ["a red circle", "a red circle " * 8])
    assert fine.valid
    assert not long.valid
    assert "8 tokens longer" in long.reason

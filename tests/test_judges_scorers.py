"""Scores are those of transformers' own CLIPModel, pair by pair."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from judges.scorers import ClipJudge
from models.text import word_tokenizer

PROMPTS = ["a red circle", "a blue square a green circle", "a", "a red circle", "a red square"]
LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained CLIP for 16 x 16 pictures and texts of 12 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = word_tokenizer(["a", "red", "blue", "green", "circle", "square", "photo", "depicts"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = {"single": "[BOS] $A [EOS]", "special_tokens": [("[BOS]", bos), ("[EOS]", eos)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**ends)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LIMIT, "bos_token_id": bos, "eos_token_id": eos}
    config = CLIPConfig(
        text_config={**small, **text, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), dtype=np.uint8))


def logits(judge: ClipJudge, image: np.ndarray, text: str) -> float:
    """exp(s) times the cosine, by the model's own forward."""
    told = judge.tokenizer(text, return_tensors="pt")
    pixels = judge.image_processor(image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        return judge.model(told.input_ids, pixels, told.attention_mask).logits_per_image.item()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_preferences_are_the_models_logits(folder, images, batch):
    judge = ClipJudge.from_pretrained(folder, kind="preference", batch=batch)
    verdicts = judge.score(images, PROMPTS)
    expected = [logits(judge, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert [verdict.margin for verdict in verdicts] == pytest.approx(expected, abs=1e-5)
    assert all(verdict.valid for verdict in verdicts)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("batch", [1, 64])
def test_clipscore_is_a_stretched_cosine_from_0_up(folder, images, batch):
    judge = ClipJudge.from_pretrained(folder, batch=batch)
    texts = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    scale = judge.model.logit_scale.exp().item()
    cosines = np.array([logits(judge, image, text) / scale for image, text in zip(images, texts, strict=True)])
    margins = [verdict.margin for verdict in judge.score(images, PROMPTS)]
    assert margins == pytest.approx(2.5 * cosines.clip(0), abs=1e-6)
    plain = ClipJudge.from_pretrained(folder, template="{}")
    assert [v.margin for v in plain.score(images, texts)] == pytest.approx(margins, abs=1e-6)
    judge.model.visual_projection.weight.data *= -1
    assert [v.margin for v in judge.score(images, PROMPTS)] == pytest.approx(2.5 * (-cosines).clip(0), abs=1e-6)
    assert np.abs(cosines).max() > 0.01


def test_each_picture_and_each_text_is_encoded_once(folder, images, monkeypatch):
    judge = ClipJudge.from_pretrained(folder, batch=2)
    seen, told = [], []
    monkeypatch.setattr(judge, "_look", lambda shown, look=judge._look: (seen.extend(shown), look(shown))[1])
    monkeypatch.setattr(judge, "_tell", lambda texts, tell=judge._tell: (told.extend(texts), tell(texts))[1])
    judge.score(images, PROMPTS)
    assert len(seen) == len(images)
    assert told == list(dict.fromkeys(PROMPTS))


def test_a_prompt_that_is_too_long_has_no_verdict(folder, images):
    judge = ClipJudge.from_pretrained(folder, kind="preference")
    long = "a red circle " * 5
    fine, refused, also = judge.score(images[:3], ["a red circle", long, "a"])
    assert fine.valid
    assert also.margin == pytest.approx(logits(judge, images[2], "a"), abs=1e-5)
    assert not refused.valid
    assert f"{15 + 2 - LIMIT} tokens longer" in refused.reason
    assert [v.valid for v in judge.score(images[:1], [long])] == [False]
    assert judge.score(images[:1], ["a " * (LIMIT - 2)])[0].valid
    assert judge.score([], []) == []


def test_numbers_that_are_none_are_no_verdict(folder, images):
    judge = ClipJudge.from_pretrained(folder)
    judge.model.visual_projection.weight.data.fill_(math.nan)
    assert [(v.valid, v.reason) for v in judge.score(images[:1], ["a"])] == [(False, "no finite margin")]


def test_what_is_no_clip_is_refused(folder, itm_folder, tmp_path):
    with pytest.raises(ValueError, match="blip-2 model; a ClipJudge needs a CLIPModel"):
        ClipJudge.from_pretrained(itm_folder)
    with pytest.raises(ValueError, match="kind: 'hps' is none of clipscore, preference"):
        ClipJudge.from_pretrained(folder, kind="hps")
    with pytest.raises(ValueError, match="template: 'a photo'"):
        ClipJudge.from_pretrained(folder, template="a photo")
    model = CLIPModel.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if name != "logit_scale"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks logit_scale"):
        ClipJudge.from_pretrained(tmp_path, processor=folder)


def test_the_processor_may_be_elsewhere(folder, images, tmp_path):
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    settings = {"kind": "preference", "id": "clip"}
    judge, whole = (
        ClipJudge.from_pretrained(tmp_path, processor=folder, **settings),
        ClipJudge.from_pretrained(folder, **settings),
    )
    assert judge.score(images, PROMPTS) == whole.score(images, PROMPTS)
    assert any(verdict.margin for verdict in whole.score(images, PROMPTS))
    with pytest.raises(ValueError, match="one image at a time"):
        judge.score([images[:2]], ["a"])

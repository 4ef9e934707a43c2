import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from rewards.backbones import QFormerReward, RewardProcessor, filled

PROMPTS = ["a red circle", "a blue square", "square", "a green circle a red square"]


@pytest.fixture(scope="module")
def model(itm_folder) -> QFormerReward:
    return QFormerReward.from_itm(itm_folder)


@pytest.fixture(scope="module")
def processor(itm_folder) -> RewardProcessor:
    return RewardProcessor.from_pretrained(itm_folder)


@pytest.fixture(scope="module")
def batch(processor) -> dict[str, torch.Tensor]:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    ids, mask = processor.tokens(PROMPTS)
    return {"pixel_values": processor.pixels(images), "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_untrained_reward_is_the_log_odds_of_image_text_matching(itm_folder, model, batch):
    itm = Blip2ForImageTextRetrieval.from_pretrained(itm_folder)
    logits = itm(**batch, use_image_text_matching_head=True).logits_per_image
    log_odds = logits.log_softmax(dim=1).diff(dim=1)
    assert log_odds.std() > 1e-3
    torch.testing.assert_close(model(**batch).logits, log_odds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_can_be_computed_once(model, batch):
    features = model.encode_images(batch["pixel_values"])
    assert features.shape == (4, 17, 32)
    rewards = model.reward(features, batch["input_ids"], batch["attention_mask"])
    assert rewards.shape == (4,)
    assert torch.equal(model(**batch).logits, rewards.unsqueeze(-1))
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(image_features=features, **tokens).logits, rewards.unsqueeze(-1))


@torch.no_grad()
def test_reward_reads_image_and_prompt(model, batch):
    rewards = model(**batch).logits
    for name in ("pixel_values", "input_ids"):
        assert (model(**{**batch, name: batch[name].flip(0)}).logits != rewards).all()


@torch.no_grad()
def test_padding_is_not_read(model, batch):
    scrambled = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
    torch.testing.assert_close(model(**{**batch, "input_ids": scrambled}).logits, model(**batch).logits)


@torch.no_grad()
def test_saves_and_loads_to_the_bit(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = QFormerReward.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not any(parameter.requires_grad for parameter in loaded.vision_model.parameters())


def test_only_the_vision_tower_is_frozen(model, batch):
    model(**batch).logits.sum().backward()
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("vision_model.")}
    model.zero_grad()


def test_training_mode_draws_nothing(model, batch):
    assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


def test_a_qformer_without_text_is_refused():
    with pytest.raises(ValueError, match="use_qformer_text_input"):
        QFormerReward(Blip2Config())


def test_prompts_are_padded_to_one_length(processor):
    alone, _ = processor.tokens(["square"])
    together, mask = processor.tokens(PROMPTS)
    assert together.shape == (4, 8)
    assert torch.equal(alone[0], together[2])
    assert mask.sum(dim=1).tolist() == [3, 3, 1, 6]


def test_a_prompt_too_long_is_refused(processor):
    with pytest.raises(ValueError, match=r"^prompt: 9 tokens, the reward model reads 8"):
        processor.tokens(["a red circle", "a " * 9])


def test_pixels_are_normalised_and_pil_is_read_alike(processor):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(processor.pixels([image])[0], expected)
    assert torch.equal(processor.pixels([Image.fromarray(image)]), processor.pixels([image]))


def test_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = RewardProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded.tokens(PROMPTS)[0], processor.tokens(PROMPTS)[0])
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()


def test_length_is_the_models_where_the_tokenizer_has_none(itm_folder, tmp_path):
    shutil.copytree(itm_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    assert RewardProcessor.from_pretrained(tmp_path).tokens(["a"])[0].shape == (1, 16 - 4)
    assert RewardProcessor.from_pretrained(tmp_path, length=5).tokens(["a"])[0].shape == (1, 5)


def test_filled_repeats_the_first_row():
    rows = torch.arange(6).view(3, 2)
    assert filled(rows, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert torch.equal(filled(rows, 3), rows)

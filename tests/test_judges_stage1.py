"""The three losses of BLIP-2's first stage see what they may see, and teach."""

import math

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval

from judges.matching import contrastive_features
from judges.stage1 import (
    TEMPERATURE,
    contrastive_loss,
    generation_loss,
    generation_mask,
    hard_negatives,
    similarities,
    stage1_losses,
)
from models.text import word_tokenizer

ENDS = (2, 3)


@pytest.fixture
def model(itm_folder):
    return Blip2ForImageTextRetrieval.from_pretrained(itm_folder).eval()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 10, (6, 5), generator=random)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 5])[:, None]).long()
    return torch.randn(6, 3, 32, 32, generator=random), ids * mask, mask


def test_similarities_are_those_of_transformers(model, batch):
    pixels, ids, mask = batch
    features = model.vision_model(pixel_values=pixels).last_hidden_state
    found = similarities(*contrastive_features(model, features, ids, mask)) * TEMPERATURE
    expected = model(
        pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False
    ).logits_per_image
    torch.testing.assert_close(found, expected)


def test_contrast_without_knowledge_is_the_entropy_of_a_guess_and_falls_to_zero_with_it():
    follows = torch.eye(8, dtype=torch.bool)
    assert contrastive_loss(torch.zeros(8, 8), follows).item() == pytest.approx(math.log(8))
    assert contrastive_loss(1e3 * follows.float(), follows, smoothing=0.0).item() == pytest.approx(0.0)
    twins = follows | follows.roll(1, 0)
    assert contrastive_loss(1e3 * twins.float(), twins, smoothing=0.0).item() == pytest.approx(math.log(2))


def test_negatives_are_wrong_and_mostly_the_most_similar():
    follows = torch.eye(5, dtype=torch.bool)
    follows[0, 1] = True
    similarity = torch.zeros(5, 5)
    similarity[:, 3] = 9.0
    similarity[0, :2] = 99.0
    texts, images = hard_negatives(similarity, follows, torch.Generator().manual_seed(0))
    assert not follows[torch.arange(5), texts].any()
    assert not follows[images, torch.arange(5)].any()
    assert texts[:3].tolist() == [3, 3, 3]
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert hard_negatives(torch.zeros(2, 2), everything, torch.Generator())[0].shape == (2,)


def test_queries_never_see_text_and_text_never_its_future(model, batch):
    pixels, ids, mask = batch
    with torch.inference_mode():
        features = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(6, -1, -1)

        def states(ids):
            return model.qformer(
                query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
                query_length=4,
                attention_mask=generation_mask(4, mask.bool()),
                encoder_hidden_states=features,
            ).last_hidden_state

        alone = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        before, changed = states(ids), ids.clone()
        changed[:, 3] = 5 + (changed[:, 3] == 5).long()
        after = states(changed)
    torch.testing.assert_close(before[:, :4], alone)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[0, 7], after[0, 7])
    assert not torch.allclose(before[0, 8], after[0, 8])


def test_generation_ends_each_text_where_it_ends(model, batch):
    pixels, ids, mask = batch
    features = model.vision_model(pixel_values=pixels).last_hidden_state
    whole = generation_loss(model, features, ids, mask, ENDS)
    rows = [
        generation_loss(model, features[i : i + 1], ids[i : i + 1, :n], mask[i : i + 1, :n], ENDS) * (n + 1)
        for i, n in enumerate(mask.sum(1).tolist())
    ]
    assert whole.item() == pytest.approx((sum(rows) / (mask.sum() + 6)).item(), rel=1e-5)


def test_it_learns_to_match_and_to_tell(model):
    """Four plain pictures and their names: after some steps all three losses are far below a guess."""
    tokenizer = word_tokenizer(["a", "red", "blue", "green", "circle", "square"])
    names = ["red circle", "blue circle", "green square", "red square"]
    ids = tokenizer(names, return_tensors="pt").input_ids
    pixels = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(4, 3, 32, 32).contiguous()
    model.vision_model.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    follows, random = torch.eye(4, dtype=torch.bool), torch.Generator().manual_seed(0)
    first = None
    for _ in range(100):
        losses = stage1_losses(model, pixels, ids, torch.ones_like(ids), follows, ENDS, random)
        first = first or losses
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.itm < 0.5 * first.itm
    assert losses.itg < 0.5 * first.itg
    assert losses.itc < first.itc

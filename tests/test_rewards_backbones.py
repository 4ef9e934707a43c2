"""Every backbone keeps one contract, and gives the number that its paper defines."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)

from judges.base import Question
from judges.blip2 import Blip2VQA
from judges.scorers import ClipJudge
from models.codec import to_pixels
from models.generator import NativeGenerator
from models.paths import noised
from models.text import word_tokenizer
from rewards.backbones import (
    ChatReward,
    ClipReward,
    Frozen,
    Full,
    ImageReward,
    LatentReward,
    Lora,
    QFormerReward,
    RewardModel,
    VQAReward,
    filled,
    load_model,
    make_trainable,
    merge,
)
from rewards.backbones.processor import RewardProcessor
from rewards.backbones.qformer import QFormerNetwork
from rewards.backbones.vqa import VQANetwork
from rewards.losses import Scores
from tests import tiny_chat

PROMPTS = ["a red circle", "a blue square", "square", "a green circle a red square"]
WORLD = ["a red ring", "a blue cross", "a ring", "a red ring above a blue cross"]
ASKED = "Question: does this figure show {}? Answer:"
WORDS = ["a", "red", "blue", "green", "circle", "square"]
LENGTH = 8
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {**SMALL, "image_size": 32, "patch_size": 8}
KINDS = ("qformer", "vqa", "clip", "siglip", "imagereward", "chat", "latent")
OF_WORLD = ("vqa", "chat", "latent")  # read prompts of the embedded world
TRAININGS = (Frozen(), Frozen(share=0.5), Frozen(share=1.0), Lora(rank=2), Full())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """With an end of text, where CLIP reads it."""
    tokenizer = word_tokenizer(WORDS)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = {"single": "[BOS] $A [EOS]", "special_tokens": [("[BOS]", bos), ("[EOS]", eos)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**ends)
    tokenizer.model_max_length = LENGTH
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, itm_folder, judge_folder, generator_folder) -> dict[str, Path]:
    """A checkpoint for each kind, small, untrained, and with weights large enough for every input to matter."""
    home = tmp_path_factory.mktemp("backbones")
    names = ("pad", "bos", "eos")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    text = {**SMALL, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    ).save_pretrained(home / "clip")
    clip = CLIPConfig(text_config=text, vision_config=SEEN, projection_dim=16)
    _noisy(CLIPModel, clip).save_pretrained(home / "clip")
    siglip = SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=SEEN)
    blip = BlipConfig(text_config={**text, "encoder_hidden_size": 32}, vision_config=SEEN, image_text_hidden_size=16)
    for name, kind, config in (
        ("siglip", SiglipModel, siglip),
        ("imagereward", BlipForImageTextRetrieval, blip),
    ):
        _noisy(kind, config).save_pretrained(home / name)
        pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        RewardProcessor(tokenizer, pictures).save_pretrained(home / name)
    tiny_chat.save(*tiny_chat.llava(), home / "chat")
    made = {name: home / name for name in KINDS}
    return made | {"qformer": itm_folder, "vqa": judge_folder / "vqa", "latent": generator_folder}


def _noisy(kind: type[PreTrainedModel], config) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module")
def build(folders) -> Callable[[str], RewardModel]:
    makers = {
        "qformer": QFormerReward.from_checkpoint,
        "vqa": lambda folder: VQAReward.from_checkpoint(folder, template=ASKED),
        "clip": ClipReward.from_checkpoint,
        "siglip": ClipReward.from_checkpoint,
        "imagereward": ImageReward.from_checkpoint,
        "chat": lambda folder: ChatReward.from_checkpoint(folder, template="is there {} ?", size=16, length=64),
        "latent": LatentReward.from_checkpoint,
    }
    return lambda name: makers[name](folders[name])


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


def prompts_of(model: RewardModel) -> list[str]:
    return WORLD if model.kind in OF_WORLD else PROMPTS


def scores(model: RewardModel, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
    return model.reward(model.encode(model.pixels(images)), model.tokens(prompts))


def columns(found: Scores) -> Tensor:
    return torch.stack([column for column in (found.mean, found.log_std) if column is not None])


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_mates(build, kind, images):
    model = build(kind)
    prompts = prompts_of(model)
    whole = columns(scores(model, images, prompts))
    single = [columns(scores(model, [image], [prompt])) for image, prompt in zip(images, prompts, strict=True)]
    torch.testing.assert_close(torch.cat(single, dim=1), whole, atol=1e-5, rtol=0)
    assert whole.shape == (1 + (kind == "chat"), 4)


@torch.no_grad()
def test_image_and_prompt_are_read(build, kind, images):
    model = build(kind)
    prompts = prompts_of(model)
    found = scores(model, images, prompts).mean
    # A score that rounding alone tells from another would pass a test for inequality.
    assert ((scores(model, images[::-1], prompts).mean - found).abs() > 1e-6).all()
    assert ((scores(model, images, prompts[::-1]).mean - found).abs() > 1e-6).all()


@torch.no_grad()
def test_saves_and_loads_to_the_bit(build, kind, images, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    prompts = prompts_of(model)
    assert torch.equal(columns(scores(loaded, images, prompts)), columns(scores(model, images, prompts)))
    with pytest.raises(ValueError, match=rf"^checkpoint: .* holds a {model.kind} reward, not a (clip|latent)"):
        (LatentReward if model.kind == "clip" else ClipReward).from_pretrained(tmp_path)


def test_a_folder_without_a_reward_is_refused(itm_folder):
    with pytest.raises(FileNotFoundError, match="holds no reward model"):
        load_model(itm_folder)


@pytest.mark.parametrize("how", TRAININGS, ids=repr)
def test_gradient_reaches_what_is_trained_and_nothing_else(build, kind, images, how):
    model = build(kind)
    make_trainable(model, how, seed=0)
    found = scores(model, images, prompts_of(model))
    columns(found).sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unread = {name for name in trained if kind == "chat" and ".vision_tower." in name}  # LLaVA's last layer but one
    assert trained - unread <= reached <= trained
    assert {name for name in trained if "lora" in name} == (trained - _top(model) if isinstance(how, Lora) else set())
    assert _top(model) <= trained
    parts = model.parts()
    lowest, stem, tower = (_names(model, part) for part in (parts.layers[:1], parts.stem, parts.tower))
    if how == Frozen():
        assert lowest | stem <= trained
        assert not tower & trained
    elif isinstance(how, Frozen):
        assert not (lowest | stem | tower) & trained
    elif how == Full():
        assert lowest | stem | tower <= trained
    assert model.caches == (kind != "chat" and not tower & trained)


def _names(model: RewardModel, parts: Sequence[nn.Module | nn.Parameter]) -> set[str]:
    inside = {id(p) for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def _top(model: RewardModel) -> set[str]:
    return _names(model, model.parts().top)


def test_a_share_freezes_the_lowest_layers(build):
    model = build("qformer")
    make_trainable(model, Frozen(share=0.5), seed=0)
    lowest, highest = (any(p.requires_grad for p in layer.parameters()) for layer in model.parts().layers)
    assert (lowest, highest) == (False, True)


@torch.no_grad()
def test_adapters_start_at_nothing_and_merge_into_what_they_learned(build, kind, images):
    model = build(kind)
    prompts, names = prompts_of(model), list(model.state_dict())
    before = columns(scores(model, images, prompts))
    make_trainable(model, Lora(rank=2), seed=0)
    torch.testing.assert_close(columns(scores(model, images, prompts)), before, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter += 0.1
    changed = columns(scores(model, images, prompts))
    assert (changed - before).abs().max() > 1e-4
    merge(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(columns(scores(model, images, prompts)), changed, atol=1e-4, rtol=1e-4)


def test_adapters_depend_on_the_seed_alone(build):
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(1)
        model = build("clip")
        make_trainable(model, Lora(rank=2), seed)
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["imagereward", "chat", "latent"])
def test_a_new_head_depends_on_the_seed_alone(folders, name):
    kind = {"imagereward": ImageReward, "chat": ChatReward, "latent": LatentReward}[name]
    heads = [
        torch.cat([p.flatten() for p in kind.from_checkpoint(folders[name], seed=seed).head.parameters()])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_training_mode_draws_nothing(build, kind, images):
    model = build(kind)
    prompts = prompts_of(model)
    assert torch.equal(columns(scores(model.train(), images, prompts)), columns(scores(model.eval(), images, prompts)))


def test_a_prompt_too_long_is_refused(build, kind):
    model = build(kind)
    with pytest.raises(ValueError, match=r"^prompt: \d+ tokens, the reward model reads \d+: '.*a a"):
        model.tokens([prompts_of(model)[0], "a " * 70])


@pytest.mark.parametrize("name", ["qformer", "vqa", "siglip", "imagereward", "latent"])
def test_pictures_of_another_size_are_refused(build, name):
    with pytest.raises(ValueError, match=r"^image: 40 x 24 pixels, the reward model reads 32 x 32$"):
        build(name).pixels([np.zeros((24, 40, 3), np.uint8)])


def test_pil_and_arrays_are_read_alike(build, kind, images):
    model = build(kind)
    assert torch.equal(model.pixels([Image.fromarray(image) for image in images]), model.pixels(images))


@torch.no_grad()
def test_an_untrained_qformer_is_the_log_odds_of_image_text_matching(itm_folder, build, images):
    model = build("qformer")
    itm = Blip2ForImageTextRetrieval.from_pretrained(itm_folder)
    logits = itm(model.pixels(images), **model.tokens(PROMPTS), use_image_text_matching_head=True).logits_per_image
    log_odds = logits.log_softmax(dim=1).diff(dim=1).squeeze(1)
    assert log_odds.std() > 1e-3
    torch.testing.assert_close(scores(model, images, PROMPTS).mean, log_odds, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_untrained_vqa_is_the_log_odds_of_yes(build, folders, images):
    judge = Blip2VQA.from_pretrained(folders["vqa"])
    answers = judge.ask(images, [[Question(f"does this figure show {prompt}?")] for prompt in WORLD])
    margins = torch.tensor([answer.margin for (answer,) in answers])
    assert margins.std() > 1e-3
    torch.testing.assert_close(scores(build("vqa"), images, WORLD).mean, margins, atol=1e-5, rtol=1e-5)


def test_a_vqa_pads_its_question_to_the_length_it_is_told(folders, tmp_path):
    model = VQAReward.from_checkpoint(folders["vqa"], template=ASKED, length=20)
    assert model.tokens(WORLD)["input_ids"].shape == (4, 20)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.template == ASKED
    assert loaded.tokens(WORLD)["input_ids"].shape == (4, 20)


@pytest.mark.parametrize("kind", [VQAReward, ChatReward])
def test_a_template_without_a_place_for_the_prompt_is_refused(folders, kind):
    with pytest.raises(ValueError, match=r"^template: 'is it good\?' must hold \{\} once"):
        kind.from_checkpoint(folders[kind.kind], template="is it good?")


def test_a_vqa_that_cannot_answer_is_refused(judge_folder, folders, tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint: .* lacks language"):
        VQAReward.from_checkpoint(judge_folder / "itm")
    t5 = Blip2Config(text_config={"model_type": "t5"})
    with pytest.raises(ValueError, match=r"^text_config: an encoder-decoder; take a BLIP-2 with a decoder-only"):
        VQANetwork(t5)
    shutil.copytree(folders["vqa"], tmp_path, dirs_exist_ok=True)
    word_tokenizer(["perhaps"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^checkpoint: .* no tokens of the model say 'yes'"):
        VQAReward.from_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["qformer", "vqa"])
@torch.no_grad()
def test_padding_is_not_read(build, images, name):
    model = build(name)
    tokens = model.tokens(prompts_of(model))
    scrambled = {**tokens, "input_ids": torch.where(tokens["attention_mask"].bool(), tokens["input_ids"], 5)}
    features = model.encode(model.pixels(images))
    torch.testing.assert_close(model.reward(features, scrambled).mean, model.reward(features, tokens).mean)


def test_a_qformer_without_text_is_refused():
    with pytest.raises(ValueError, match="use_qformer_text_input"):
        QFormerNetwork(Blip2Config())


@torch.no_grad()
def test_clip_is_exp_s_times_the_cosine(build, folders, images):
    model = build("clip")
    clip = CLIPModel.from_pretrained(folders["clip"])
    logits = clip(**model.tokens(PROMPTS), pixel_values=model.pixels(images)).logits_per_image.diagonal()
    assert logits.std() > 1e-2
    torch.testing.assert_close(scores(model, images, PROMPTS).mean, logits, atol=1e-5, rtol=1e-5)
    judge = ClipJudge.from_pretrained(folders["clip"], kind="preference")
    margins = torch.tensor([verdict.margin for verdict in judge.score(images, PROMPTS)])
    torch.testing.assert_close(scores(model, images, PROMPTS).mean, margins, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_siglip_is_the_same_without_its_bias(build, folders, images):
    model = build("siglip")
    siglip = SiglipModel.from_pretrained(folders["siglip"])
    logits = siglip(**model.tokens(PROMPTS), pixel_values=model.pixels(images)).logits_per_image.diagonal()
    assert siglip.logit_bias.abs() > 1e-3
    torch.testing.assert_close(scores(model, images, PROMPTS).mean, logits - siglip.logit_bias, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_imagereward_is_an_mlp_on_blips_first_token(build, folders, images):
    model = build("imagereward")
    blip = BlipForImageTextRetrieval.from_pretrained(folders["imagereward"])
    token = blip(**model.tokens(PROMPTS), pixel_values=model.pixels(images)).question_embeds[:, 0]
    layers = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    for layer in layers:
        token = token @ layer.weight.T + layer.bias
    assert [layer.out_features for layer in layers] == [1024, 128, 64, 16, 1]
    torch.testing.assert_close(scores(model, images, PROMPTS).mean, token.squeeze(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny_chat.llava, tiny_chat.qwen2_vl])
@torch.no_grad()
def test_a_chat_model_is_read_at_its_last_token(make, images):
    network, processor = make()
    head = nn.Sequential(nn.Linear(32, 2))
    model = ChatReward(network, head, processor, template="is there {} ?", size=16, length=64)
    found = scores(model, images, WORLD)
    for row, (image, prompt) in enumerate(zip(images, WORLD, strict=True)):
        asked = [{"type": "image"}, {"type": "text", "text": f"is there {prompt} ?"}]
        text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
        picture = Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)
        alone = processor(text=[text], images=[picture], return_tensors="pt")
        last = network(**alone, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(torch.stack([found.mean[row], found.log_std[row]]), head(last), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_latents_at_time_0_are_pictures(build, images):
    model = build("latent")
    latents = model.encode(model.pixels(images))
    direct = model.score_latents(latents, 0.0, model.generator.encode(WORLD)).mean
    torch.testing.assert_close(direct, scores(model, images, WORLD).mean, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_time_is_read(build, images):
    model = build("latent")
    latents, cond = model.encode(model.pixels(images)), model.generator.encode(WORLD)
    times = torch.tensor([0.0, 0.3, 0.6, 0.9])
    found = model.score_latents(latents, times, cond)
    assert torch.equal(found.noise, times)
    rows = [slice(row, row + 1) for row in range(4)]
    apart = [model.score_latents(latents[row], times[row].item(), cond[row]).mean for row in rows]
    torch.testing.assert_close(found.mean, torch.cat(apart), atol=1e-5, rtol=0)
    assert (model.score_latents(latents, 0.5, cond).mean - found.mean).abs().min() > 1e-6


def test_gradients_reach_the_latents(build, images):
    model = build("latent")
    latents = model.encode(model.pixels(images)).requires_grad_()
    model.score_latents(latents, 0.5, model.generator.encode(WORLD)).mean.sum().backward()
    assert (latents.grad.flatten(1).norm(dim=1) > 0).all()


def test_training_noise_is_keyed_and_on_the_path(build, images):
    model = build("latent")
    latents, tokens = model.encode(model.pixels(images)), model.tokens(WORLD)
    found, told = model.noised(latents, tokens, [1, 2, 1, 2])
    again, _ = model.noised(latents[:1], {name: value[:1] for name, value in tokens.items()}, [1])
    assert torch.equal(found[:1], again)
    t = told["t"]
    assert torch.equal(t[:2], t[2:])
    assert ((t > 0) & (t < model.most_noise)).all()
    assert t[0] != t[1]
    # What is left when the latents are taken away is the noise, the same for both images of a pair.
    noise = (found - noised(latents, torch.zeros_like(latents), t)) / t[:, None, None, None]
    torch.testing.assert_close(noise[0], noise[2], atol=1e-4, rtol=1e-4)
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_no_more_noise_than_a_time(generator_folder):
    generator = NativeGenerator.from_pretrained(generator_folder)
    with pytest.raises(ValueError, match=r"^most_noise: 1\.5"):
        LatentReward(generator, nn.Sequential(nn.Linear(32, 1)), most_noise=1.5)


@torch.no_grad()
def test_a_fresh_blip_sees_what_the_blip_2_saw(judge_folder, images):
    model = ImageReward.fresh(judge_folder / "itm", seed=0)
    old = QFormerReward.from_checkpoint(judge_folder / "itm")
    torch.testing.assert_close(model.encode(model.pixels(images)), old.encode(old.pixels(images)))
    # Without the image, the text encoder is the Q-Former's text branch.
    tokens = model.tokens(WORLD)
    alone = model.network.text_encoder(**tokens).last_hidden_state
    embedded = old.network.embeddings(input_ids=tokens["input_ids"])
    read = old.network.qformer(query_embeds=embedded, query_length=0, attention_mask=tokens["attention_mask"])
    torch.testing.assert_close(alone, read.last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_fresh_siglip_sees_as_the_blip_2_without_its_class_token(judge_folder, images):
    model = ClipReward.fresh(judge_folder / "itm", seed=0)
    old = QFormerReward.from_checkpoint(judge_folder / "itm")
    tower = old.network.vision_model
    pixels = model.pixels(images)
    hidden = tower.embeddings(pixels)[:, 1:]
    for layer in tower.encoder.layers:
        hidden = layer(hidden)
    torch.testing.assert_close(model.encode(pixels), tower.post_layernorm(hidden), atol=1e-4, rtol=1e-4)
    assert model.network.logit_scale.exp().item() == pytest.approx(10)


@pytest.mark.parametrize("kind", [ClipReward, ImageReward])
def test_a_fresh_model_depends_on_the_seed_alone(judge_folder, kind):
    states = [kind.fresh(judge_folder / "itm", seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("kind", "needed"), [(ClipReward, "CLIPModel"), (ImageReward, "BLIP")])
def test_another_checkpoint_is_refused(itm_folder, kind, needed):
    with pytest.raises(ValueError, match=rf"^checkpoint: .* holds a blip-2 model; .* needs a {needed}"):
        kind.from_checkpoint(itm_folder)


def test_a_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    model = BlipForImageTextRetrieval.from_pretrained(folders["imagereward"])
    state = {name: value for name, value in model.state_dict().items() if "encoder.layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"^checkpoint: .* lacks text_encoder\.encoder\.layer\.1\.output"):
        ImageReward.from_checkpoint(tmp_path)


ENSEMBLES = tuple(kind for kind in KINDS if kind != "chat")


def scored(model: RewardModel, images: Sequence[np.ndarray]) -> Scores:
    return scores(model, images[:4], prompts_of(model))


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_heads_differ_and_the_score_is_their_mean(build, images, kind):
    found = scored(build(kind).with_heads(3, seed=1), images)
    assert found.heads.shape == (4, 3)
    torch.testing.assert_close(found.mean, found.heads.mean(dim=1))
    assert found.heads.std(dim=1).min() > 1e-4
    again, other = (scored(build(kind).with_heads(3, seed=seed), images) for seed in (1, 2))
    assert torch.equal(again.heads, found.heads)
    assert not torch.equal(other.heads, found.heads)
    assert scored(build(kind), images).heads is None


@pytest.mark.parametrize("name", ["qformer", "vqa"])
def test_the_mean_of_a_blip2s_heads_starts_as_the_log_odds_that_image_and_prompt_match(build, images, name):
    whole, several = build(name), build(name).with_heads(4, seed=0)
    torch.testing.assert_close(scored(several, images).mean, scored(whole, images).mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_an_ensemble_is_trained_at_its_heads_and_saved_with_them(build, images, tmp_path, kind):
    model = build(kind).with_heads(3, seed=1)
    make_trainable(model, Frozen(share=1.0), seed=0)
    first, second = scored(model, images).heads[:, 0].sum(), scored(model, images).heads[:, 1].sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (first, second)]
    assert any(a is None or b is None or not torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.head_count == 3
    assert torch.equal(scored(loaded, images).heads, scored(model, images).heads)


def test_a_backbone_without_a_head_of_that_kind_refuses_several(build):
    with pytest.raises(ValueError, match=r"^ensemble: a chat reward takes one head"):
        build("chat").with_heads(2, seed=0)


def test_prompts_are_padded_to_one_length(build):
    model = build("qformer")
    alone, together = model.tokens(["square"]), model.tokens(PROMPTS)
    assert together["input_ids"].shape == (4, LENGTH)
    assert torch.equal(alone["input_ids"][0], together["input_ids"][2])
    assert together["attention_mask"].sum(dim=1).tolist() == [3, 3, 1, 6]


def test_length_is_the_models_where_the_tokenizer_has_none(itm_folder, tmp_path):
    shutil.copytree(itm_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    assert QFormerReward.from_checkpoint(tmp_path).tokens(["a"])["input_ids"].shape == (1, 16 - 4)


def test_pixels_are_normalised(build, images):
    expected = torch.from_numpy(images[0]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(build("qformer").pixels(images[:1])[0], expected)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "chat"])
def test_values_of_pictures_are_read_as_pictures_are(build, images, name):
    model = build(name)
    assert model.differentiable
    torch.testing.assert_close(model.read(to_pixels(np.stack(images))), model.pixels(images), atol=1e-5, rtol=1e-5)


def test_a_chat_model_gives_no_gradient(build):
    assert not build("chat").differentiable


def test_filled_repeats_the_first_row():
    rows = torch.arange(6).view(3, 2)
    assert filled(rows, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert torch.equal(filled(rows, 3), rows)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Frozen(share=1.1), "share"),
        (lambda: Lora(rank=0), "rank"),
        (lambda: Lora(alpha=math.nan), "alpha"),
    ],
)
def test_settings_out_of_range_are_named(make, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        make()

"""Every family of diffusers pipelines paints by our samplers what it paints by its own loop, and learns as ours do.

A family is a line in `tests.tiny_pipelines.FAMILIES`; all tests here are of all families.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.import_utils import is_sentencepiece_available

from models import adapters, lora
from models.adapters.options import Options
from models.generator import Conditioning, Generator
from models.geometry import cell
from models.guidance import Guidance
from models.loading import load_generator, tuned
from models.samplers import keyed_noise, ode
from tests.tiny_pipelines import FAMILIES, Family

PROMPTS = ["a red circle above a blue square", "a green square"]
STEPS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's pipeline in a folder, as it comes from the hub."""
    return family.saved(tmp_path_factory)


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(checkpoint)


def chosen(family: Family, scale: float = 1.0, **options) -> Options:
    return Options(**{"resolution": family.size, "guidance": Guidance(scale), **family.options, **options})


@pytest.fixture(scope="module")
def kept(family: Family, checkpoint: Path) -> Generator:
    """As `load_generator` makes it; others are copies, for that is quicker."""
    return load_generator(checkpoint, options=chosen(family))


@pytest.fixture
def made(family: Family, kept: Generator) -> Callable[..., Generator]:
    """A new generator of the checkpoint, with a guidance scale and other options."""
    return lambda *args, **options: type(kept)(copy.deepcopy(kept.pipe), chosen(family, *args, **options))


@pytest.fixture
def generator(made: Callable[..., Generator]) -> Generator:
    return made()


@torch.no_grad()
def painted(generator: Generator, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """Noise, and the latents to which the flow's ODE leads from it."""
    times, cond = generator.times(STEPS, 1.0), generator.encode(prompts)
    noise = keyed_noise([*range(len(prompts))], generator.latent_shape)
    x = generator.prior_std(times[0]) * noise
    for t, s in pairwise(times):
        x = ode(x, generator.predict(x, t, cond), t, s).x
    return noise, x


def near(found: Tensor, expected: Tensor) -> None:
    """To 1e-5, of the size of the largest where that is above 1."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0.0)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_rollout_is_that_of_the_pipeline(family, made, pipe, guided):
    scale = family.scales[-1 if guided else 0]
    generator = made(scale)
    noise, latents = painted(generator)
    near(latents, family.paint(pipe, PROMPTS, noise, STEPS, scale, "latent"))
    pictures = (255 * family.paint(pipe, PROMPTS, noise, STEPS, scale, "np")).round()
    assert np.abs(generator.decode(latents) - pictures).max() <= 1  # a value half-way is rounded either way


def test_a_time_for_each_row_is_as_good_as_one_for_all(family, made):
    generator = made(family.scales[-1])
    x, cond = keyed_noise([0, 1], generator.latent_shape), generator.encode(PROMPTS)
    times = torch.tensor(generator.times(4, 1.0)[1:3])
    with torch.no_grad():
        together = generator.predict(x, times, cond)
        for row in range(2):
            each = slice(row, row + 1)
            near(together[each], generator.predict(x[each], float(times[row]), cond[each]))


@torch.no_grad()
def test_in_bfloat16_a_network_says_what_it_says_in_float32_but_for_rounding(family, checkpoint, kept):
    coarse = load_generator(checkpoint, options=chosen(family, dtype="bfloat16"))
    assert {weight.dtype for weight in coarse.transformer.parameters()} >= {torch.bfloat16}
    x, cond = keyed_noise([0, 1], kept.latent_shape), kept.encode(PROMPTS)
    found, expected = (one.predict(x, 0.5, cond) for one in (coarse, kept))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_a_shift_comes_on_top_of_the_familys_own(generator):
    own, moved = (np.array(generator.times(5, shift)) for shift in (1.0, 3.0))
    assert (np.diff(own) < 0).all()
    assert own[-1] == moved[-1] == 0
    assert (moved[1:-1] > own[1:-1]).all()
    with pytest.raises(ValueError, match=r"^steps: "):
        generator.times(0, 1.0)


def test_an_adapter_trained_here_is_loaded_by_the_pipeline(family, checkpoint, pipe, generator, tmp_path):
    noise, base = painted(generator)
    random = torch.Generator().manual_seed(1)
    lora.attach(generator.transformer, generator.lora_targets, rank=2, alpha=4.0, seed=0)
    learned = [weight for weight in generator.transformer.parameters() if weight.requires_grad]
    for weight in learned:
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    _, tuned = painted(generator)
    assert (tuned - base).abs().max() > 1e-3
    with lora.reference(generator.transformer):
        near(painted(generator)[1], base)
    lora.save(generator.transformer, tmp_path, generator.lora_prefix)
    near(painted(load_generator(checkpoint, tmp_path, options=chosen(family)))[1], tuned)
    pipe = copy.deepcopy(pipe)
    if family.loads_lora:
        pipe.load_lora_weights(tmp_path)
    else:
        pipe = load_generator(checkpoint, options=chosen(family)).pipe
        pipe.transformer.load_lora_adapter(tmp_path, prefix=generator.lora_prefix, weight_name=lora.WEIGHTS)
    near(family.paint(pipe, PROMPTS, noise, STEPS, 1.0, "latent"), tuned)


def test_a_gradient_reaches_the_adapter_and_the_latents(generator):
    lora.attach(generator.transformer, generator.lora_targets, rank=2, alpha=4.0, seed=0)
    generator.transformer.enable_gradient_checkpointing()
    x = keyed_noise([0, 1], generator.latent_shape).requires_grad_()
    cond = generator.encode(PROMPTS)
    generator.pixels(x - generator.predict(x, 0.5, cond)).square().mean().backward()
    assert x.grad.abs().max() > 0
    learned = {name: w for name, w in generator.transformer.named_parameters() if w.requires_grad}
    assert {name.rpartition("lora_")[2][0] for name in learned} == {"A", "B"}
    # Processes exchange gradients of all that is trained, so nothing may be left out of the graph.
    assert not [name for name, weight in learned.items() if weight.grad is None]
    # The A of a new adapter has a gradient of 0, as its B is 0; so have layers whose output nothing reads.
    reached = [weight.grad.abs().max() > 0 for name, weight in learned.items() if "lora_B" in name]
    assert np.mean(reached) > 0.75


def test_a_picture_is_the_same_however_many_are_decoded_at_a_time(generator):
    latents = keyed_noise([0, 1, 2], generator.latent_shape)
    at_once = generator.decode(latents)
    assert all(np.array_equal(generator.decode(latents, batch), at_once) for batch in (1, 2, 5))


def test_what_the_codec_encodes_is_what_it_decoded(family, generator, monkeypatch):
    """A codec that gives back what it was given shows that scaling, shifting and packing are undone."""
    kept = []

    def decode(z, *_, **__):
        kept.append(z)
        return (torch.zeros(len(z), 3, 1, *family.size) if z.ndim == 5 else torch.zeros(len(z), 3, *family.size),)

    def encode(pixels, *_, **__):
        return SimpleNamespace(latent=kept[0], latent_dist=SimpleNamespace(mode=lambda: kept[0]))

    monkeypatch.setattr(generator.codec, "decode", decode)
    monkeypatch.setattr(generator.codec, "encode", encode)
    latents = keyed_noise([0, 1], generator.latent_shape)
    images = generator.decode(latents)
    near(generator.latents(images), latents)


def test_latents_are_of_pictures_of_its_size(family, generator):
    assert generator.pixel_shape == family.size
    height, width = family.size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = generator.latents(images)
    assert found.shape[1:] == generator.latent_shape
    near(generator.latents(images[1:]), found[1:])
    with pytest.raises(ValueError, match=r"^images: .* scale them"):
        generator.latents(images[:, :-2])


def same(one: Conditioning, other: Conditioning) -> bool:
    assert one.more.keys() == other.more.keys()
    pairs = [(one.tokens, other.tokens), *((one.more[name], other.more[name]) for name in one.more)]
    return all(torch.equal(*pair) for pair in pairs)


def test_a_prompt_is_encoded_alike_in_any_company(made, tmp_path, monkeypatch):
    together = made(cache=str(tmp_path), cached_prompts=1)
    cond = together.encode([*PROMPTS, PROMPTS[0]])
    assert same(cond[:1], cond[2:])
    assert not same(cond[:1], cond[1:2])
    assert same(made().encode(PROMPTS[1:]), cond[1:2])
    later = made(cache=str(tmp_path))
    monkeypatch.setattr(type(later), "encoded", None)  # nobody is asked who has been asked before
    assert same(later.encode(PROMPTS[1:]), cond[1:2])


def test_prompts_are_kept_for_others_and_whatever_the_negative_prompt_is(made, tmp_path):
    made(cache=str(tmp_path)).encode(PROMPTS)
    made(cache=str(tmp_path), negative=PROMPTS[1]).encode(PROMPTS)
    kept = list(tmp_path.iterdir())
    tells = type(made()).__name__ == "SanaGenerator"  # whose negative prompt is encoded in another way
    assert len(kept) == (2 if not tells else 4)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in kept} == {(tmp_path / "plain").stat().st_mode}


def test_features_tell_latents_times_and_prompts_apart(generator):
    x, cond = keyed_noise([0, 0, 0, 1], generator.latent_shape), generator.encode([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2)
    with torch.no_grad():
        found = generator.features(x, torch.tensor([0.5, 0.7, 0.5, 0.5]), cond)
    assert found.shape == (4, 2, generator.feature_width)
    for other in (1, 2, 3):
        assert (found[0] - found[other]).abs().max() > 1e-4
    assert not generator.transformer._forward_hooks


def test_a_resolution_that_the_tokens_do_not_divide_is_one_line(made):
    generator = made()
    assert cell(generator.codec) == generator.cell  # by which a forecast knows it too
    with pytest.raises(ValueError, match=r"^resolution: 17 is no multiple of \d+; take \d+") as told:
        made(resolution=17)
    assert "\n" not in str(told.value)


def test_an_adapter_of_another_network_is_one_line(generator, made, tmp_path):
    lora.attach(generator.transformer, generator.lora_targets, rank=2, alpha=4.0, seed=0)
    lora.save(generator.transformer, tmp_path, "another")
    with pytest.raises(ValueError, match=r"^lora: .* is one of another network: another[.].* fits no layer of"):
        lora.merge(made().transformer, tmp_path, generator.lora_prefix)


def test_what_does_not_suit_the_checkpoint_is_one_line(generator_folder, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline"}))
    with pytest.raises(ValueError, match=r"^checkpoint: .* is a AudioLDMPipeline; supported are .*FluxPipeline, .*"):
        load_generator(tmp_path)
    with pytest.raises(ValueError, match=r"^max_tokens: .* is no pipeline of diffusers"):
        load_generator(generator_folder, options=Options(max_tokens=32))


def test_every_family_is_tested(tmp_path_factory):
    indices = [family.saved(tmp_path_factory) / "model_index.json" for family in FAMILIES.values()]
    assert {json.loads(index.read_text())["_class_name"] for index in indices} == set(adapters.FAMILIES)


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_a_lora_of_the_same_names_and_another_width_is_one_line(family, checkpoint, generator, tmp_path):
    lora.attach(generator.transformer, generator.lora_targets, rank=2, alpha=4.0, seed=0)
    for name, layer in generator.transformer.named_modules():
        if name.endswith("transformer_blocks.0.attn.to_q.lora_A.default"):
            layer.weight = torch.nn.Parameter(torch.zeros(2, 8))
    lora.save(generator.transformer, tmp_path, generator.lora_prefix)
    with pytest.raises(ValueError, match=r"^lora: .*transformer_blocks.0.attn.to_q.lora_A.weight fits no layer"):
        load_generator(checkpoint, tmp_path, options=chosen(family))


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_a_missing_part_is_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "vae")
    with pytest.raises(OSError, match=r"holds no whole pipeline \(no vae/ in it\)"):
        load_generator(tmp_path / "broken")


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_what_a_network_is_not_told_and_has_no_places_for_is_one_line(made):
    with pytest.raises(ValueError, match=r"^embedded_guidance: "):
        made(embedded_guidance=3.5)
    with pytest.raises(ValueError, match=r"^resolution: 64 is above the 32 pixels"):
        made(resolution=64)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_a_distilled_network_hears_its_scale(made):
    latents = [painted(made(embedded_guidance=scale))[1] for scale in (1.0, 6.0)]
    assert (latents[0] - latents[1]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "sd15"], indirect=True)
def test_a_copy_in_float32_asks_in_float32_and_leaves_the_first_as_it_is(family, checkpoint, kept):
    coarse = load_generator(checkpoint, options=chosen(family, dtype="bfloat16"))
    exact, x, cond = coarse.in_float32(), keyed_noise([0, 1], kept.latent_shape), kept.encode(PROMPTS)
    assert (coarse.dtype, exact.dtype, kept.in_float32()) == (torch.bfloat16, torch.float32, kept)
    away = [(one.predict(x, 0.5, cond) - kept.predict(x, 0.5, cond)).abs().max() for one in (exact, coarse)]
    assert 0 < away[0] < away[1]  # by the rounding of its weights alone
    assert exact.frozen == coarse.frozen


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_a_copy_of_shared_weights_takes_none_and_has_an_adapter_of_its_own(generator):
    other = generator.copied(shared=True)
    known = {id(weight) for weight in generator.transformer.parameters()}
    lora.attach(other.transformer, other.lora_targets, rank=2, alpha=4.0, seed=0)
    own = [weight for weight in other.transformer.parameters() if id(weight) not in known]
    assert own
    assert all(weight.requires_grad for weight in own)
    assert not any(isinstance(module, LoraLayer) for module in generator.transformer.modules())
    assert not known & {id(weight) for weight in generator.copied().transformer.parameters()}


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_what_is_idle_waits_in_main_memory(made, offload, monkeypatch):
    generator = made(offload=offload)
    there, idle = torch.device("cpu:0"), "cpu" if offload else "cpu:0"
    places = {}
    for part in generator.frozen:
        monkeypatch.setattr(part, "to", lambda device, part=part: places.update({part: str(device)}))
    monkeypatch.setattr(type(generator), "device", property(lambda self: there))
    seen = []

    def encoded(prompts, asked=generator.encoded):
        seen.append({places[part] for part in generator.text_encoders})
        return asked(prompts)

    monkeypatch.setattr(generator, "encoded", encoded)
    generator.encode([*PROMPTS, *PROMPTS])
    assert seen == [{"cpu:0"}] * 2
    assert {places[part] for part in generator.text_encoders} == {idle}
    latents = keyed_noise([0], generator.latent_shape)
    generator.decode(latents)
    assert places[generator.codec] == idle
    generator.pixels(latents.requires_grad_())
    assert places[generator.codec] == "cpu:0"  # a gradient will come back to it


def test_a_whole_network_takes_the_place_of_the_pipelines(family, checkpoint, kept, made, tmp_path):
    changed = made()
    for weight in changed.transformer.parameters():
        weight.data *= 1.1
    changed.transformer.save_pretrained(tmp_path)
    whole = load_generator(checkpoint, tmp_path, options=chosen(family))
    beside = tuned(kept, tmp_path)
    for found in (whole, beside):
        assert getattr(found.pipe, found.network) is found.transformer
        near(painted(found)[1], painted(changed)[1])
    assert getattr(kept.pipe, kept.network) is kept.transformer is not beside.transformer
    assert beside.pipe.config == kept.pipe.config


def test_the_network_hears_as_many_tokens_as_the_family_says(family, generator):
    if generator.max_tokens is None or isinstance(generator, adapters.SD3Generator):
        return  # CLIP's own number of tokens is not that of the tiny ones
    assert generator.encode(PROMPTS).tokens.shape[1] == type(generator).text_tokens(generator.max_tokens)


def test_published_families_hear_as_many_tokens_as_their_papers_say():
    found = {name: getattr(adapters, name).text_tokens() for name in ("SD3Generator", "SDXLGenerator", "DiTGenerator")}
    assert found == {"SD3Generator": 77 + 256, "SDXLGenerator": 77, "DiTGenerator": 0}


@pytest.mark.parametrize("family", ["sd15", "dit"], indirect=True)
def test_a_length_of_prompts_that_nobody_heeds_is_one_line(made):
    with pytest.raises(ValueError, match=r"^max_tokens: this family's text encoders have one length"):
        made(max_tokens=8)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_codec_that_overflows_in_float16_is_one_line(made):
    generator = made()
    generator.codec.register_to_config(force_upcast=True)
    type(generator)(generator.pipe, replace(generator.options, codec_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"^codec_dtype: this codec overflows in float16"):
        type(generator)(generator.pipe, replace(generator.options, codec_dtype="float16"))


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_a_lora_in_kohyas_names_is_one_of_this_network_and_a_plain_one(generator, checkpoint, family, tmp_path):
    layer = generator.transformer.transformer_blocks[0].attn.to_q
    flat = "lora_unet_transformer_blocks_0_attn_to_q"
    plain = {
        f"{flat}.lora_down.weight": torch.ones(2, layer.in_features),
        f"{flat}.lora_up.weight": torch.full((layer.out_features, 2), 0.1),
        f"{flat}.alpha": torch.tensor(1.0),
    }

    def merged(tensors: dict[str, Tensor]) -> Tensor:
        save_file(tensors, tmp_path / lora.WEIGHTS)
        return load_generator(checkpoint, tmp_path, options=chosen(family)).transformer.transformer_blocks[0].attn.to_q

    near(merged(plain).weight, layer.weight + 0.1)
    with pytest.raises(ValueError, match=r"^lora: .*transformer_blocks.0.attn.to_q.lora_A.weight fits no layer"):
        merged({**plain, f"{flat}.lora_down.weight": torch.ones(2, 8)})
    for others in ({f"{flat}.dora_scale": torch.ones(1)}, {f"{flat}.lora_mid.weight": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match=f"^lora: {flat} has .*, which is no plain LoRA"):
            merged({**plain, **others})
    with pytest.raises(ValueError, match=f"^lora: {flat} has alpha, lora_down.weight, which is no plain LoRA"):
        merged({key: value for key, value in plain.items() if "up" not in key})


@pytest.fixture
def without_sentencepiece(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    is_sentencepiece_available.cache_clear()
    yield
    monkeypatch.undo()
    is_sentencepiece_available.cache_clear()


@pytest.mark.parametrize("family", ["pixart_sigma"], indirect=True)
def test_a_tokenizer_that_wants_sentencepiece_says_so(checkpoint, tmp_path, without_sentencepiece):
    shutil.copytree(checkpoint, tmp_path / "slow")
    tokenizer = tmp_path / "slow" / "tokenizer"
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(b"a model")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    index = tmp_path / "slow" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": ["transformers", "T5Tokenizer"]}))
    with pytest.raises(OSError, match=r"slow: a tokenizer in it has no tokenizer.json; .*`pip install sentencepiece`"):
        load_generator(tmp_path / "slow")

"""DiT and MM-DiT: equal to diffusers' with the same weights, to the paper's table, and to each other where they must.

The language model of deep fusion is here too.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file, save_file

from benchmarks.twins import AS_SD3, dit_twin, mmdit_twin, parallel_twin
from models import geometry, lora, metering
from models.adapters.options import Options
from models.dit import DiT, size_of
from models.generator import NativeGenerator, sample
from models.layers import CrossAttention, Shape, Stream, attend, patched, unpatched
from models.loading import load_generator
from models.mmdit import Block, FusedBlock, MMDiT, ParallelBlock, SingleBlock
from models.networks import load_network
from models.positions import Encoding, Place, positions_of
from models.pretrain import new_generator
from models.text import language_model, memory, reading_loss

SHAPES = Path("models/checkpoints/shapes")
SMALL = {"width": 32, "depth": 2, "heads": 2, "text_width": 12}
"""Of a network on latents of 8 x 8 with 8 channels."""
NETWORKS = {
    "double": (MMDiT, {}),
    "single": (MMDiT, {"single": 2}),
    "hybrid": (MMDiT, {"single": 1, "positions": "msrope"}),
    "parallel": (MMDiT, {"single": 1, "parallel": True, "mlp": "swiglu"}),
    "shared keys": (MMDiT, {"kv_heads": 1, "mlp": "swiglu", "positions": "mixed"}),
    "linear": (MMDiT, {"attention": "linear", "positions": "string", "kv_heads": 1}),
    "adaln-zero": (DiT, {"conditioning": "adaln-zero", "positions": "learned"}),
    "adaln": (DiT, {"conditioning": "adaln", "qk_norm": True}),
    "cross-attention": (DiT, {"conditioning": "cross-attention", "kv_heads": 1, "positions": "quaternion"}),
    "in-context": (DiT, {"conditioning": "in-context", "positions": "axial"}),
    "fused": (MMDiT, {"fused": True, "text_width": 128}),
}


def shaken(module, seed=0, much=0.1):
    """A module none of whose parameters is still 0."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += much * torch.randn(parameter.shape, generator=random)
    return module.eval().requires_grad_(False)


def network(name):
    kind, changes = NETWORKS[name]
    settings = {"channels": 8, "size": 8, "patch": 2, **SMALL, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(kind(**settings))


def inputs(found, rows=2, side=8, seed=3):
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 8, side, side, generator=random)
    text = torch.randn(rows, 5, found.config.text_width, generator=random)
    return latents, torch.rand(rows, generator=random), text


def test_a_dit_with_its_weights_is_that_of_diffusers():
    sizes = {"channels": 4, "size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2}
    ours = shaken(DiT(**sizes, classes=5, time_endpoint=True))
    theirs = dit_twin(ours)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps, labels = torch.tensor([0, 501, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = theirs(latents, steps, labels).sample
        assert torch.allclose(ours(latents, steps / 1000, labels), expected, atol=1e-5)
        assert (expected - theirs(latents, steps, labels.flip(0)).sample).abs().max() > 1e-2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_mmdit_with_its_weights_is_that_of_diffusers(qk_norm):
    sizes = {"channels": 4, "size": 8, "patch": 2, "width": 16, "depth": 3, "heads": 2, "text_width": 12}
    ours = shaken(MMDiT(**sizes, **AS_SD3, qk_norm=qk_norm))
    theirs = mmdit_twin(ours)
    random = torch.Generator().manual_seed(1)
    latents, text = torch.randn(3, 4, 8, 8, generator=random), torch.randn(3, 6, 12, generator=random)
    t = torch.tensor([0.0, 0.4, 1.0])
    with torch.no_grad():
        expected = theirs(latents, text, text.mean(1), 1000 * t).sample
        assert torch.allclose(ours(latents, t, text), expected, atol=1e-5)
        assert (expected - theirs(latents, text.flip(0), text.mean(1), 1000 * t).sample).abs().max() > 1e-3


def test_a_parallel_block_with_its_weights_is_that_of_flux():
    ours = shaken(ParallelBlock(Shape(32, 2, mlp="gelu")))
    random = torch.Generator().manual_seed(1)
    image, text, told = (torch.randn(2, *rest, 32, generator=random) for rest in ([16], [3], []))
    with torch.no_grad():
        expected = torch.cat(parallel_twin(ours)(image, text, told), 1)
        found = ours(torch.cat([text, image], 1), F.silu(told), Encoding())
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found[:, 3:] - image).abs().max() > 1e-2


PAPER = [
    ("DiT-S/8", {}, 0.36, 33),
    ("DiT-S/4", {}, 1.41, 33),
    ("DiT-S/2", {}, 6.06, 33),
    ("DiT-B/8", {}, 1.42, 131),
    ("DiT-B/4", {}, 5.56, 130),
    ("DiT-B/2", {}, 23.01, 130),
    ("DiT-L/8", {}, 5.01, 459),
    ("DiT-L/4", {}, 19.70, 458),
    ("DiT-L/2", {}, 80.71, 458),
    ("DiT-XL/8", {}, 7.39, 676),
    ("DiT-XL/4", {}, 29.05, 675),
    ("DiT-XL/2", {}, 118.64, 675),
    ("DiT-XL/2", {"conditioning": "in-context"}, 119.37, 449),
    ("DiT-XL/2", {"conditioning": "cross-attention"}, 137.62, 598),
    ("DiT-XL/2", {"conditioning": "adaln"}, 118.56, 600),
]


@pytest.mark.parametrize(("name", "changes", "gigaflops", "millions"), PAPER)
def test_sizes_are_those_of_the_papers_table(name, changes, gigaflops, millions):
    """2212.09748, table 4: latents of 32 x 32 x 4, a thousand classes."""
    with torch.device("meta"):
        found = DiT(**size_of(name), classes=1000, **changes)
    assert sum(parameter.numel() for parameter in found.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    cost = metering.painted(found, geometry.asked(found, 1, (32, 32), 0))
    assert cost.flops / 2e9 == pytest.approx(gigaflops, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_time_and_text_are_heard_and_larger_latents_taken(name):
    found = network(name)
    latents, t, text = inputs(found)
    here = found(latents, t, text)
    assert here.shape == latents.shape
    assert (found(latents, t.flip(0), text) - here).abs().max() > 1e-4
    assert (found(latents, t, text.flip(0)) - here).abs().max() > 1e-4
    one = found(latents[:1], t[:1], text[:1])
    assert torch.allclose(one, here[:1], atol=1e-5)
    larger = inputs(found, side=12)
    assert found(*larger).shape == larger[0].shape
    with pytest.raises(ValueError, match="latents: a side of 9 is no multiple of the patch, 2"):
        found(torch.zeros(2, 8, 9, 9), t, text)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_gradients_are_the_same(name):
    latents, t, text = inputs(network(name))
    found = []
    for checkpointed in (False, True):
        model = network(name).train().requires_grad_(True)
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(latents, t, text).square().sum().backward()
        found.append({parameter: value.grad for parameter, value in model.named_parameters()})
    plain, again = found
    assert all(gradient is not None for gradient in plain.values())
    assert all(torch.equal(plain[parameter], again[parameter]) for parameter in plain)


def test_adaln_zero_starts_as_the_identity():
    encoding = Encoding()
    x, y, c = torch.randn(2, 4, 32), torch.randn(2, 3, 32), torch.randn(2, 32)
    for name in ("double", "hybrid", "parallel", "adaln-zero", "fused"):
        kind, changes = NETWORKS[name]
        new = kind(channels=8, size=8, patch=2, **{**SMALL, **changes})
        keys = torch.randn(2, 2, 3, 16)
        for block in new.blocks:
            match block:
                case Block():
                    assert torch.equal(block(x, y, c, encoding)[0], x)
                case FusedBlock():
                    assert torch.equal(block(x, keys, keys, c, encoding), x)
                case SingleBlock() | ParallelBlock():
                    assert torch.equal(block(x, c, encoding), x)
                case _:
                    assert torch.equal(block(x, y, c, encoding), x)
        assert new(*inputs(new)).abs().max() == 0


def test_two_streams_with_the_same_weights_are_one():
    shape = Shape(32, 2)
    single, double = shaken(SingleBlock(shape)), Block(shape, last=False).eval()
    for stream in (double.image, double.text):
        stream.load_state_dict(single.both.state_dict())
    x, y, c = torch.randn(2, 16, 32), torch.randn(2, 3, 32), torch.randn(2, 32)
    positions = positions_of("msrope", Place((4, 4), 32, 2, 16, 1))
    encoding = positions(positions.ids((4, 4), 3))
    image, text = double(x, y, c, encoding)
    assert torch.allclose(single(torch.cat([y, x], 1), c, encoding), torch.cat([text, image], 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_heads_that_share_keys_are_heads_with_equal_keys(kind):
    few, many = Stream(Shape(32, 4, 2, attention=kind)), Stream(Shape(32, 4, attention=kind))
    shaken(few)
    q, k, v = few.qkv.weight.split([32, 16, 16])
    k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
    rest = {name: value for name, value in few.state_dict().items() if not name.startswith("qkv")}
    many.load_state_dict({**rest, "qkv.weight": torch.cat([q, k, v]), "qkv.bias": torch.zeros(96)})
    few.qkv.bias.data.zero_()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    positions = positions_of("axial", Place((4, 4), 32, 2, 8, 1))
    encoding = positions(positions.ids((4, 4)))
    heard = [stream.attention(x, stream.modulated(c), encoding) for stream in (few, many)]
    assert torch.allclose(heard[0], heard[1], atol=1e-5)
    assert (heard[0] - x).abs().max() > 0.1


def test_linear_attention_is_the_quadratic_formula_it_avoids():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=random) for n in (5, 7, 7))
    found = attend("linear", q, k, v, lambda x: x)
    weights = F.relu(q) @ F.relu(k).mT
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    assert torch.allclose(found, expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_softmax_attention_is_its_formula():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=random) for n in (5, 7, 7))
    expected = (q @ k.mT / 8**0.5).softmax(-1) @ v
    assert torch.allclose(attend("softmax", q, k, v, lambda x: x), expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_cross_attention_does_not_depend_on_the_order_of_what_it_hears():
    cross = shaken(CrossAttention(Shape(32, 2, kv_heads=1)))
    x, y = torch.randn(2, 16, 32), torch.randn(2, 5, 32)
    assert torch.allclose(cross(x, y), cross(x, y.flip(1)), atol=1e-5)
    assert (cross(x, y) - cross(x, y.flip(0))).abs().max() > 1e-3


def test_patches_invert():
    latents = torch.randn(2, 3, 6, 8)
    tokens = patched(latents, 2)
    assert tokens.shape == (2, 12, 12)
    assert torch.equal(tokens[0, 1], latents[0, :, :2, 2:4].flatten())
    assert torch.equal(unpatched(tokens, 2, 3), latents)


@pytest.fixture(scope="module")
def reader():
    """An untrained language model of two layers, with two heads of queries on one of keys."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(language_model(10, 32, 2, 2, 1, 6))


def test_a_language_models_memory_is_its_keys_and_values_and_causal(reader):
    ids, mask = torch.tensor([[4, 5, 6, 7], [4, 5, 8, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    rows = memory(reader, ids, mask)
    assert rows.shape == (2, 4, 2 * 2 * 1 * 16)
    assert torch.allclose(rows[0, :2], rows[1, :2], atol=1e-6)
    assert (rows[0, 2] - rows[1, 2]).abs().max() > 1e-3
    cache = reader(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    keys = rows.unflatten(2, (2, 2, 1, 16))[:, :, 1, 0].transpose(1, 2)  # of the second layer
    assert torch.equal(keys, cache.layers[1].keys)


def test_reading_loss_is_the_cross_entropy_of_what_follows(reader):
    ids, mask = torch.tensor([[4, 5, 6], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    logits = reader(input_ids=ids, attention_mask=mask).last_hidden_state @ reader.embed_tokens.weight.T
    told = logits.log_softmax(-1)
    expected = -(told[0, 0, 5] + told[0, 1, 6] + told[1, 0, 5]) / 3
    assert reading_loss(reader, ids, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_fused_block_attends_to_the_language_models_layer_and_to_itself():
    block = shaken(FusedBlock(Shape(32, 2, kv_heads=1)))
    random = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 16, 32, generator=random), torch.randn(2, 32, generator=random)
    keys, values = (torch.randn(2, 1, 3, 16, generator=random) for _ in range(2))
    positions = positions_of("axial", Place((4, 4), 32, 1, 16, 1))
    encoding = positions(positions.ids((4, 4)))
    stream, mods = block.image, block.image.modulated(c)
    q, k, v = stream.attention_in(x, *mods[:2])
    k, v = torch.cat([keys, encoding.turn(k)], 2), torch.cat([values, v], 2)
    heard = (encoding.turn(q) @ k.mT / 4).softmax(-1) @ v
    after = stream.attention_out(x, heard.transpose(1, 2).flatten(2), mods[2])
    assert torch.allclose(block(x, keys, values, c, encoding), stream.mlp(after, *mods[3:]), atol=1e-5)


def test_every_layer_of_the_language_model_is_heard():
    found = network("fused")
    latents, t, text = inputs(found)
    here = found(latents, t, text)
    for layer in range(2):
        changed = text.unflatten(2, (2, 2, 2, -1)).clone()
        changed[:, :, layer] *= 2
        assert (found(latents, t, changed.flatten(2)) - here).abs().max() > 1e-4


GENERATORS = {
    "mmdit": ("MMDiT", {"single": 1, "parallel": True, "positions": "mixed"}),
    "dit": ("DiT", {"conditioning": "cross-attention", "positions": "axial"}),
    "fused": ("MMDiT", {"fused": True, "kv_heads": 1}),
}


@pytest.fixture(scope="module", params=GENERATORS)
def folder(request, tmp_path_factory):
    """A saved generator of each network."""
    name, choices = GENERATORS[request.param]
    sizes = {"size": 32, "width": 64, "depth": 2, "text_depth": 1, "max_tokens": 6}
    found = new_generator(["a", "red", "ring"], **sizes, seed=0, network=name, choices=choices)
    shaken(found.transformer, much=0.05)
    shaken(found.text_encoder, much=0.2)
    place = tmp_path_factory.mktemp(request.param)
    found.save_pretrained(place)
    return place


def test_a_generator_of_any_network_is_loaded_by_its_name(folder):
    generator = load_generator(folder)
    kind = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    assert type(generator.transformer).__name__ == kind
    asked = ["a red ring", "a ring"], [1, 2]
    images = list(sample(generator, *asked, steps=2))
    again = list(sample(NativeGenerator.from_pretrained(folder), *asked, steps=2))
    assert all(np.array_equal(*both) for both in zip(images, again, strict=True))
    apart = list(sample(generator, ["a red ring", "red"], [1, 1], steps=2))
    assert not np.array_equal(*apart)
    cond = generator.encode(["a ring"])
    assert generator.features(torch.zeros(1, *generator.latent_shape), 0.5, cond).shape == (1, 2, 64)


def test_a_generator_paints_larger_pictures_and_stays_as_it_is(folder):
    generator = load_generator(folder)
    larger, wide = generator.at(48), generator.at((32, 48))
    painted, again = (next(iter(sample(one, ["a ring"], [0], steps=1))) for one in (larger, wide))
    assert painted.shape == (48, 48, 3)
    assert again.shape == (32, 48, 3)
    assert generator.latent_shape == (8, 8, 8)
    assert larger.transformer is generator.transformer
    loaded = load_generator(folder, options=Options(resolution=48))
    assert np.array_equal(next(iter(sample(loaded, ["a ring"], [0], steps=1))), painted)
    for resolution in (36, (32, 36)):
        with pytest.raises(ValueError, match="resolution: 36 is no multiple of 8; take 32 or 40"):
            generator.at(resolution)


def test_an_adapter_on_any_network_changes_nothing_at_first_and_merges(folder, tmp_path):
    tuned, plain = load_generator(folder), load_generator(folder)
    cond = tuned.encode(["a red ring"] * 2)
    x, t = torch.randn(2, *tuned.latent_shape), torch.tensor([0.2, 0.9])
    base = tuned.predict(x, t, cond)
    lora.attach(tuned.transformer, tuned.lora_targets, 2, 4.0, seed=0)
    assert torch.allclose(tuned.predict(x, t, cond), base, atol=1e-6)
    for parameter in tuned.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    moved = tuned.predict(x, t, cond)
    assert (moved - base).abs().max() > 1e-3
    lora.merge_into(plain.transformer, tuned.transformer)
    assert torch.allclose(plain.predict(x, t, cond), moved, atol=1e-4)


def test_the_shipped_network_is_the_formula_written_out():
    """Its weights under their names, and no other implementation than torch's own functions."""
    found = load_network(SHAPES / "transformer")
    weights = load_file(next((SHAPES / "transformer").glob("*.safetensors")))
    assert set(found.state_dict()) == set(weights)
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 8, 8, 8, generator=random), torch.randn(2, 12, 96, generator=random)
    t = torch.tensor([0.1, 0.8])

    def dense(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normal(x):
        return F.layer_norm(x, (96,), eps=1e-6)

    rows, columns = torch.arange(4).repeat_interleave(4)[:, None], torch.arange(4).repeat(4)[:, None]
    frequencies = 100.0 ** (-torch.arange(8) / 8)
    angles = torch.cat([rows * frequencies, columns * frequencies], 1)

    def turned(x):
        a, b = x[..., :16], x[..., 16:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def rms(x, name):
        return F.rms_norm(x, (32,), weights[f"{name}.weight"], 1e-6)

    def heads(x, name):
        q, k, v = (each.unflatten(-1, (3, 32)).transpose(1, 2) for each in dense(x, f"{name}.qkv").chunk(3, -1))
        return rms(q, f"{name}.norm_q"), rms(k, f"{name}.norm_k"), v

    x = dense(patched(latents, 2), "patch_in")
    y = dense(text, "text_in")
    time = F.silu(dense(get_timestep_embedding(1000 * t, 96), "time_in.linear_1"))
    c = F.silu(dense(time, "time_in.linear_2") + dense(text.mean(1), "pooled_in"))[:, None]
    for block in range(4):
        name, last = f"blocks.{block}", block == 3
        mx = dense(c, f"{name}.image.modulation").chunk(6, -1)
        my = dense(c, f"{name}.text.modulation").chunk(2 if last else 6, -1)
        qx, kx, vx = heads(normal(x) * (1 + mx[1]) + mx[0], f"{name}.image")
        qy, ky, vy = heads(normal(y) * (1 + my[1]) + my[0], f"{name}.text")
        q, k, v = torch.cat([qy, turned(qx)], 2), torch.cat([ky, turned(kx)], 2), torch.cat([vy, vx], 2)
        heard = ((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

        def after(tokens, heard, mods, name):
            tokens = tokens + mods[2] * dense(heard, f"{name}.out")
            hidden = F.relu(dense(normal(tokens) * (1 + mods[4]) + mods[3], f"{name}.mlp_in")).square()
            return tokens + mods[5] * dense(hidden, f"{name}.mlp_out")

        x = after(x, heard[:, 12:], mx, f"{name}.image")
        if not last:
            y = after(y, heard[:, :12], my, f"{name}.text")
    shift, scale = dense(c, "modulation_out").chunk(2, -1)
    expected = unpatched(dense(normal(x) * (1 + scale) + shift, "patch_out"), 2, 4)
    assert torch.allclose(found(latents, t, text), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (MMDiT, {"width": 33}, "width: 33 is no multiple of the 2 heads"),
        (MMDiT, {"heads": 0}, "heads: 0 is below 1"),
        (MMDiT, {"heads": 4, "kv_heads": 3}, "kv_heads: 4 heads cannot share 3"),
        (MMDiT, {"width": 36, "heads": 6}, "head_dim: 6 is no multiple of 4"),
        (MMDiT, {"patch": 3}, "size: latents of 8 x 8 cannot be cut into patches of 3"),
        (MMDiT, {"single": 3}, "single: 3 of 2 blocks"),
        (MMDiT, {"parallel": True}, "parallel: it is of blocks of a single stream"),
        (MMDiT, {"fused": True, "single": 1}, "single: with deep fusion"),
        (MMDiT, {"fused": True}, "text_width: 12, but 2 layers of 2 keys and values of 16 make 128"),
        (MMDiT, {"attention": "none"}, "attention: unknown none"),
        (MMDiT, {"mlp": "relu"}, "mlp: unknown relu; known here: relu2, gelu, swiglu"),
        (MMDiT, {"mlp_ratio": 0.0}, "mlp_ratio: 0.0"),
        (MMDiT, {"positions": "nowhere"}, "positions: unknown nowhere"),
        (DiT, {"conditioning": "adagn"}, "conditioning: unknown adagn"),
        (DiT, {"classes": 5}, "classes: 5, and text_width: 12; just one of them"),
        (DiT, {"depth": 0}, "depth: 0 is below 1"),
    ],
)
def test_settings_that_cannot_be_are_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"channels": 8, "size": 8, "patch": 2, **SMALL, **changes})


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-S/3", "S/2", "DiT-S"])
def test_sizes_that_are_not_there_are_named(name):
    with pytest.raises(ValueError, match=r"name: unknown size .*DiT-\{S,B,L,XL\}/\{2,4,8\}"):
        size_of(name)


def test_a_checkpoint_of_another_network_is_refused_with_its_keys(folder, tmp_path):
    place = tmp_path / "transformer"
    place.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no network \(no config.json"):
        load_network(place)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    weights = load_file(next((folder / "transformer").glob("*.safetensors")))

    def written(changed=weights, **settings):
        (place / "config.json").write_text(json.dumps({**config, **settings}))
        save_file(changed, place / "diffusion_pytorch_model.safetensors")
        return place

    assert set(load_network(written()).state_dict()) == set(weights)
    with pytest.raises(ValueError, match="network: unknown UNet; known here: DiT, MMDiT"):
        load_network(written(_class_name="UNet"))
    with pytest.raises(ValueError, match=r"it lacks blocks\.[12]\."):
        load_network(written(depth=3, **({"text_width": 3 * 2 * 32} if config.get("fused") else {})))
    with pytest.raises(ValueError, match="it also has further"):
        load_network(written({**weights, "further": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"patch_in\.weight is .*, and .* by the settings"):
        load_network(written({**weights, "patch_in.weight": torch.zeros(3, 2)}))


def test_a_new_mmdit_predicts_zero_and_patches_invert():
    model = MMDiT(width=32, depth=1, heads=1, text_width=32)
    x = torch.randn(2, 8, 8, 8)
    assert model(x, torch.rand(2), torch.randn(2, 6, 32)).abs().max() == 0
    model.patch_in = torch.nn.Identity()
    model.patch_out = torch.nn.Identity()
    model.norm_out = torch.nn.Identity()
    model.blocks = torch.nn.ModuleList()
    assert torch.equal(model(x, torch.rand(2), torch.randn(2, 6, 32)), x)

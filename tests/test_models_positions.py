"""Each kind of positions keeps its promise, and is that of diffusers or transformers where they have it."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_2d_sincos_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.positions import (
    KINDS,
    Place,
    axial_rope,
    canonical_ids,
    cayley,
    hamilton,
    positions_of,
    rotate,
    sincos,
)

TURNS = ("axial", "mixed", "string", "quaternion", "msrope")


def place(grid=(4, 4), **changes):
    """For heads of 24, which two axes and three divide into pairs."""
    return Place(grid, **{"width": 48, "heads": 2, "head_dim": 24, "layers": 2, **changes})


def trained(kind, at):
    """Positions whose parameters are not those they started from."""
    torch.manual_seed(0)
    found = positions_of(kind, at)
    for parameter in found.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return found.requires_grad_(False)


def scores(positions, ids, q, k, layer=1):
    """(B, H, N, N) of queries and keys that stand at `ids`."""
    encoding = positions(ids).layer(layer)
    keys = encoding.turn(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return encoding.turn(q) @ keys.mT


@pytest.fixture
def heads():
    """Four heads of queries on two of keys, of 12 tokens."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 12, 24, generator=random), torch.randn(2, 2, 12, 24, generator=random)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", TURNS)
def test_scores_depend_on_offsets_alone(heads, kind, axes):
    positions = trained(kind, place((4,) * axes))
    random = torch.Generator().manual_seed(2)
    ids = 4 * torch.rand(12, axes, generator=random)
    here = scores(positions, ids, *heads)
    moved = scores(positions, ids + torch.tensor([1.5, -2.0, 0.75])[:axes], *heads)
    assert torch.allclose(moved, here, atol=1e-4)
    for axis in range(axes):
        stretched = ids.clone()
        stretched[:, axis] *= 1.5
        assert (scores(positions, stretched, *heads) - here).abs().max() > 0.1


@pytest.mark.parametrize("kind", TURNS)
def test_a_turn_keeps_lengths(heads, kind):
    positions = trained(kind, place())
    q = heads[0]
    turned = positions(positions.ids((3, 4))).layer(0).turn(q)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-4)
    assert (turned - q).abs().max() > 0.1


@pytest.mark.parametrize("scaling", ["interpolate", "extrapolate"])
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 6), (3, 5), (8, 2)])
def test_the_centre_stays_the_centre_and_both_sides_mirror_each_other(grid, scaling):
    ids = canonical_ids(grid, (4, 4), scaling)
    assert torch.allclose(ids.mean(0), torch.tensor([1.5, 1.5]), atol=1e-6)
    assert torch.allclose(3 - ids.flip(0), ids, atol=1e-6)


def test_on_the_trained_grid_cells_stand_at_their_numbers():
    expected = torch.tensor([[row, column] for row in range(3) for column in range(5)]).float()
    assert torch.equal(canonical_ids((3, 5), (3, 5)), expected)
    assert torch.equal(canonical_ids((3, 5), (3, 5), "extrapolate"), expected)


def test_a_finer_grid_covers_what_the_trained_one_did_and_keeps_proportions():
    ids = canonical_ids((8, 8), (4, 4))
    assert torch.allclose(ids[:, 1].view(8, 8)[0], torch.arange(8) / 2 - 0.25)
    wide = canonical_ids((4, 16), (4, 4)).view(4, 16, 2)
    assert torch.allclose(wide[1, 0, 0] - wide[0, 0, 0], wide[0, 1, 1] - wide[0, 0, 1])
    more = canonical_ids((6, 6), (4, 4), "extrapolate").view(6, 6, 2)
    assert torch.equal(more[1:5, 1:5].reshape(-1, 2), canonical_ids((4, 4), (4, 4)))


def test_the_text_stands_at_the_origin_or_on_the_diagonal_beyond_the_corner():
    ids = positions_of("axial", place()).ids((2, 2), 3)
    assert torch.equal(ids[:3], torch.zeros(3, 2))
    for grid, scaling, corner in (((4, 4), "interpolate", 2), ((8, 8), "interpolate", 2), ((8, 8), "extrapolate", 4)):
        ids = positions_of("msrope", place(scaling=scaling)).ids(grid, 3)
        assert torch.equal(ids[:3], torch.tensor([[corner + n] * 2 for n in range(3)]).float())
        assert torch.allclose(ids[3:].mean(0), torch.tensor([-0.5, -0.5]))
        assert ids[3:].max() < corner


def test_text_positions_of_msrope_are_those_of_rope_in_one_dimension(heads):
    msrope = positions_of("msrope", place(theta=10000.0))
    q, k = heads[0][:, :2], heads[1]
    found = scores(msrope, msrope.ids((4, 4), 12)[:12], q, k)
    pairs = 10000.0 ** (-torch.arange(6) / 6)
    angles = torch.arange(12)[:, None] * torch.cat([pairs, pairs])
    full = torch.cat([angles, angles], -1)[None]
    turned_q, turned_k = apply_rotary_pos_emb(q, k, full.cos(), full.sin())
    assert torch.allclose(found, turned_q @ turned_k.mT, atol=1e-4)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (5, 6), (4, 7)])
def test_msrope_is_that_of_qwen_image(grid):
    """Theirs has a third axis, the frame, whose two pairs come first; the frame of a picture is 0.

    An odd side of theirs reaches half a cell further from where it begins than from where it ends, and ours does not.
    Offsets are the same where that is so of both sides, and half a cell else.
    """
    theirs = QwenEmbedRope(10000, [4, 12, 12], scale_rope=True)
    image, text = theirs([(1, *grid)], device=torch.device("cpu"), max_txt_seq_len=5)
    mine = positions_of("msrope", place(grid, theta=10000.0))
    expected = offsets_of(torch.cat([text, image])[:, 2:])
    ids, odd = mine.ids(grid, 5), torch.tensor([side % 2 for side in grid])
    assert torch.allclose(offsets(mine, ids), expected, atol=1e-4) == (odd[0] == odd[1])
    ids[:5] -= odd[grid.index(max(grid))] / 2
    ids[5:] -= odd / 2
    assert torch.allclose(offsets(mine, ids), expected, atol=1e-4)


def offsets(positions, ids):
    encoding = positions(ids)
    return offsets_of(torch.complex(encoding.cos, encoding.sin))


def offsets_of(turns):
    """(N, N, P) of turns (N, P)."""
    return turns[:, None] * turns.conj()


def test_axial_rope_is_that_of_flux(heads):
    """Flux turns neighbours, and ours are half a head apart."""
    q = heads[0]
    ids = canonical_ids((3, 4), (3, 4))
    cos, sin = FluxPosEmbed(100, [12, 12])(ids)
    neighbours = q.unflatten(-1, (2, -1)).mT.flatten(-2)
    theirs = apply_rotary_emb(neighbours, (cos, sin))
    angles = axial_rope(ids, 24)
    ours = rotate(q, angles.cos(), angles.sin())
    assert torch.allclose(ours.unflatten(-1, (2, -1)).mT.flatten(-2), theirs, atol=1e-5)


def test_axial_rope_of_one_axis_is_that_of_transformers(heads):
    q, k = heads[0][:, :2], heads[1]
    config = LlamaConfig(hidden_size=48, num_attention_heads=2, num_key_value_heads=2, head_dim=24)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(12)[None])
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    angles = axial_rope(torch.arange(12.0)[:, None], 24, theta=10000.0)
    for ours, turned in zip((q, k), theirs, strict=True):
        assert torch.allclose(rotate(ours, angles.cos(), angles.sin()), turned, atol=1e-5)


def test_sines_are_those_of_diffusers():
    theirs = get_2d_sincos_pos_embed(24, (3, 3), base_size=3)
    assert torch.allclose(sincos(canonical_ids((3, 3), (3, 3)), 24), theirs.float(), atol=1e-6)


def test_learned_positions_are_those_of_the_cells_and_linear_between_them():
    positions = trained("learned", place((3, 3)))
    table = positions.table.flatten(1).mT  # (9, W)
    assert torch.allclose(positions(positions.ids((3, 3))).added, table, atol=1e-5)
    between = torch.tensor([[0.0, 0.5], [1.5, 2.0], [1.0, 9.0]])
    expected = torch.stack([(table[0] + table[1]) / 2, (table[5] + table[8]) / 2, table[5]])
    assert torch.allclose(positions(between).added, expected, atol=1e-5)
    solid = trained("learned", place((2, 3, 2)))
    assert torch.allclose(solid(solid.ids((2, 3, 2))).added, solid.table.flatten(1).mT, atol=1e-5)


def test_what_is_added_reaches_the_image_tokens_alone():
    positions = positions_of("sincos", place())
    x = torch.zeros(2, 16, 48)
    found = positions(positions.ids((4, 4), 5)).add(x)
    assert torch.equal(found[0], sincos(canonical_ids((4, 4), (4, 4)), 48))


@pytest.mark.parametrize("axes", [2, 3])
def test_string_starts_as_axial_rope_and_mixed_as_axial_rope_turned(heads, axes):
    at = place((4,) * axes)
    ids = 4 * torch.rand(12, axes, generator=torch.Generator().manual_seed(2))
    axial = positions_of("axial", at)(ids)
    string = positions_of("string", at)(ids).layer(1)
    assert torch.allclose(string.turn(heads[0]), axial.turn(heads[0]), atol=1e-5)
    mixed = positions_of("mixed", at).frequencies
    plain = positions_of("string", at).frequencies
    assert torch.allclose(mixed.norm(dim=-1), plain.norm(dim=-1), atol=1e-5)
    assert (mixed - plain).abs().max() > 0.1
    products = mixed @ mixed.mT
    assert torch.allclose(products, plain @ plain.mT, atol=1e-5)


def test_the_cayley_transform_is_orthogonal():
    found = cayley(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(found @ found.mT, torch.eye(8).expand(3, 8, 8), atol=1e-5)
    assert torch.equal(cayley(torch.zeros(8, 8)), torch.eye(8))


def test_quaternions_turn_as_the_hamilton_product_does(heads):
    positions = trained("quaternion", place())
    ids = 4 * torch.rand(12, 2, generator=torch.Generator().manual_seed(2))
    q, k = heads[0][:, :2], heads[1]
    found = scores(positions, ids, q, k, layer=1)

    def conjugate(x):
        return x * torch.tensor([1.0, -1.0, -1.0, -1.0])

    def power(basis, unit, angle):
        """exp(angle u) with the unit imaginary u = basis unit basis*."""
        u = hamilton(hamilton(basis, unit), conjugate(basis))
        return torch.cat([angle.cos()[..., None], angle.sin()[..., None] * u[..., 1:]], -1)

    left, right = positions.frequencies[1].unbind(1)  # (H, Q, A)
    g, h = (basis / basis.norm(dim=-1, keepdim=True) for basis in positions.bases[1].unbind(1))  # (H, Q, 4)
    i = torch.tensor([0.0, 1.0, 0.0, 0.0])
    a, b = ((ids @ frequencies.mT) for frequencies in (left, right))  # (H, N, Q)

    def turned(x):
        quaternions = x.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].mT  # (B, H, N, Q, 4)
        return hamilton(hamilton(power(g[:, None], i, a), quaternions), power(h[:, None], i, b)).flatten(-2)

    assert torch.allclose(turned(q) @ turned(k).mT, found, atol=1e-4)


def test_hamilton_product_of_the_units():
    one, i, j, k = torch.eye(4)
    assert torch.equal(hamilton(i, j), k)
    assert torch.equal(hamilton(j, i), -k)
    assert torch.equal(hamilton(k, k), -one)


@pytest.mark.parametrize("kind", KINDS)
def test_any_grid_can_be_asked_for_and_gradients_reach_what_is_learned(heads, kind):
    positions = positions_of(kind, place())
    encoding = positions(positions.ids((3, 3), 3)).layer(0)
    q = heads[0].requires_grad_()
    told = encoding.turn(q).square() * torch.arange(24.0)
    (told.sum() + encoding.add(torch.ones(2, 9, 48)).square().sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in positions.parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nowhere", {}, "positions: unknown nowhere"),
        ("axial", {"head_dim": 6}, "head_dim: 6 is no multiple of 4"),
        ("mixed", {"head_dim": 6}, "head_dim: 6"),
        ("msrope", {"grid": (2, 2, 2), "head_dim": 8}, "head_dim: 8 is no multiple of 6"),
        ("quaternion", {"head_dim": 6}, "head_dim: 6 is no multiple of 4, a quaternion"),
        ("sincos", {"width": 6}, "width: 6"),
        ("learned", {"grid": (4,)}, "positions: learned"),
        ("axial", {"scaling": "stretch"}, "scaling: unknown stretch"),
        ("axial", {"theta": 0.0}, "theta: 0.0"),
    ],
)
def test_what_cannot_be_is_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        positions_of(kind, place(**changes))


def test_rotation_is_that_of_diffusers_and_keeps_relative_positions():
    ids = canonical_ids((3, 5), (3, 5))
    angles = axial_rope(ids, 16)
    x = torch.randn(2, 4, 15, 16, generator=torch.Generator().manual_seed(0))
    full = torch.cat([angles, angles], -1)
    theirs = apply_rotary_emb(x, (full.cos(), full.sin()), use_real_unbind_dim=-2)
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()), theirs, atol=1e-5)
    moved = axial_rope(ids + torch.tensor([4.0, 7.0]), 16)
    q, k = x[:1], x[1:]
    near = rotate(q, angles.cos(), angles.sin()) @ rotate(k, angles.cos(), angles.sin()).transpose(-1, -2)
    far = rotate(q, moved.cos(), moved.sin()) @ rotate(k, moved.cos(), moved.sin()).transpose(-1, -2)
    assert torch.allclose(near, far, atol=1e-4)
    with pytest.raises(ValueError, match="head_dim"):
        axial_rope(ids, 6)

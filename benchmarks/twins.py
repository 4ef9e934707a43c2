"""Networks of diffusers with the weights of ours: both must predict the same, and can be timed in turn."""

from collections.abc import Sequence

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from models.dit import DiT
from models.layers import Backbone, Stream
from models.mmdit import MMDiT, ParallelBlock

AS_SD3 = {"positions": "sincos", "mlp": "gelu", "time_width": 256, "time_endpoint": False}
"""What an MM-DiT is told so that SD3's is its twin."""


@torch.no_grad()
def dit_twin(ours: DiT) -> DiTTransformer2DModel:
    """That of a DiT under adaLN-Zero with class labels and `time_endpoint`; it takes whole thousandths of the time."""
    config = ours.config
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        num_layers=config.depth,
        sample_size=config.size,
        patch_size=config.patch,
        num_embeds_ada_norm=config.classes,
        norm_eps=1e-6,
    )
    _ends(ours, theirs.pos_embed.proj, theirs.proj_out_2)
    _copy(ours.modulation_out, theirs.proj_out_1)
    for block, own in zip(theirs.transformer_blocks, (block.image for block in ours.blocks), strict=True):
        _time(ours, block.norm1.emb.timestep_embedder)
        block.norm1.emb.class_embedder.embedding_table.weight.copy_(ours.label_in.weight)
        _copy(own.modulation, block.norm1.linear)
        attention = block.attn1
        _attention(own, [attention.to_q, attention.to_k, attention.to_v], attention.to_out[0])
        _mlp(own, block.ff)
    return theirs.eval()


@torch.no_grad()
def mmdit_twin(ours: MMDiT) -> SD3Transformer2DModel:
    """That of an MM-DiT of two streams made with `AS_SD3`; its pooled text is the mean of the text, (B, W_text).

    SD3 takes the pooled text through two layers, and here through the one that ours has.
    """
    config = ours.config
    theirs = SD3Transformer2DModel(
        sample_size=config.size,
        patch_size=config.patch,
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=config.depth,
        attention_head_dim=config.width // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.text_width,
        pos_embed_max_size=config.size // config.patch,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    theirs.time_text_embed.text_embedder = nn.Linear(config.text_width, config.width)
    _copy(ours.pooled_in, theirs.time_text_embed.text_embedder)
    _ends(ours, theirs.pos_embed.proj, theirs.proj_out)
    _time(ours, theirs.time_text_embed.timestep_embedder)
    _copy(ours.text_in, theirs.context_embedder)
    _swapped(ours.modulation_out, theirs.norm_out.linear)
    for block, own in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        attention = block.attn
        added = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        _attention(own.image, [attention.to_q, attention.to_k, attention.to_v], attention.to_out[0])
        _attention(own.text, added, None if own.last else attention.to_add_out)
        if config.qk_norm:
            _norms(own.image, attention.norm_q, attention.norm_k)
            _norms(own.text, attention.norm_added_q, attention.norm_added_k)
        _copy(own.image.modulation, block.norm1.linear)
        _mlp(own.image, block.ff)
        if own.last:
            _swapped(own.text.modulation, block.norm1_context.linear)
        else:
            _copy(own.text.modulation, block.norm1_context.linear)
            _mlp(own.text, block.ff_context)
    return theirs.eval()


@torch.no_grad()
def parallel_twin(ours: ParallelBlock) -> FluxSingleTransformerBlock:
    """That of a block with GELU by tanh and normalised queries and keys."""
    shape = ours.both.shape
    theirs = FluxSingleTransformerBlock(shape.width, shape.heads, shape.head_dim, shape.mlp_ratio)
    _copy(ours.both.modulation, theirs.norm.linear)
    _attention(ours.both, [theirs.attn.to_q, theirs.attn.to_k, theirs.attn.to_v], None)
    _norms(ours.both, theirs.attn.norm_q, theirs.attn.norm_k)
    _copy(ours.mlp_in, theirs.proj_mlp)
    _copy(ours.out, theirs.proj_out)
    return theirs.eval()


def _set(theirs: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    theirs.weight.copy_(weight)
    theirs.bias.copy_(bias)


def _copy(ours: nn.Linear, theirs: nn.Linear) -> None:
    _set(theirs, ours.weight, ours.bias)


def _swapped(ours: nn.Linear, theirs: nn.Linear) -> None:
    """Where diffusers has the scale before the shift."""
    _set(theirs, torch.cat(ours.weight.chunk(2)[::-1]), torch.cat(ours.bias.chunk(2)[::-1]))


def _attention(ours: Stream, theirs: Sequence[nn.Linear], out: nn.Linear | None) -> None:
    """Queries, keys and values, and what comes of them."""
    for layer, weight, bias in zip(theirs, ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True):
        _set(layer, weight, bias)
    if out is not None:
        _copy(ours.out, out)


def _norms(ours: Stream, q: nn.Module, k: nn.Module) -> None:
    q.weight.copy_(ours.norm_q.weight)
    k.weight.copy_(ours.norm_k.weight)


def _mlp(ours: Stream, theirs: nn.Module) -> None:
    _copy(ours.mlp_in, theirs.net[0].proj)
    _copy(ours.mlp_out, theirs.net[2])


def _time(ours: Backbone, theirs: nn.Module) -> None:
    """diffusers' networks put the cosines first."""
    _set(theirs.linear_1, torch.cat(ours.time_in.linear_1.weight.chunk(2, 1)[::-1], 1), ours.time_in.linear_1.bias)
    _copy(ours.time_in.linear_2, theirs.linear_2)


def _ends(ours: Backbone, conv: nn.Conv2d, out: nn.Linear) -> None:
    """The way in, a convolution, and the way out, whose channels come last."""
    channels, patch = ours.config.channels, ours.config.patch
    conv.weight.copy_(ours.patch_in.weight.view_as(conv.weight))
    conv.bias.copy_(ours.patch_in.bias)
    rows = ours.patch_out.weight.view(channels, patch, patch, -1).permute(1, 2, 0, 3).flatten(0, 2)
    _set(out, rows, ours.patch_out.bias.view(channels, patch, patch).permute(1, 2, 0).flatten())

"""Untrained diffusers pipelines, small enough for tests, and how each of them is asked to paint.

A family is a function that builds its pipeline, and `Family`, which `FAMILIES` lists by the adapter's file.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from models.text import word_tokenizer

if TYPE_CHECKING:
    import pytest

_SAVED: dict[Callable[[], DiffusionPipeline], Path] = {}

WORDS = ["a", "red", "blue", "green", "circle", "square", "left", "of", "above", "and", "the"]
SIZE = (16, 24)
"""Height and width of the pictures, in pixels."""


@dataclass(frozen=True)
class Family:
    """How a family is built and tested.

    Attributes:
        build: an untrained pipeline.
        size: height and width of its pictures, in pixels.
        scales: of classifier-free guidance, for the tests of parity.
        options: of its adapter, beside size and guidance.
        told: what its pipeline is told in a call, beside what every one is.
        guided: the same of a guidance scale.
        into, out_of: latents of ours as those that the pipeline takes, and those it returns as ours.
        loads_lora: whether the pipeline has `load_lora_weights`, rather than its network `load_lora_adapter` alone.
    """

    build: Callable[[], DiffusionPipeline]
    size: tuple[int, int] = SIZE
    scales: tuple[float, ...] = (1.0, 3.0)
    options: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    guided: Callable[[float], Mapping[str, Any]] = lambda scale: {"guidance_scale": scale}
    into: Callable[[Tensor], Tensor] = lambda latents: latents
    out_of: Callable[[Tensor, Tensor], Tensor] = lambda latents, like: latents
    loads_lora: bool = True

    def saved(self, folders: "pytest.TempPathFactory") -> Path:
        """A folder with its pipeline, as it comes from the hub: built once, and for reading alone."""
        if self.build not in _SAVED:
            folder = folders.mktemp(self.build.__name__)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.build().save_pretrained(folder)
            _SAVED[self.build] = folder
        return _SAVED[self.build]

    def paint(
        self, pipe: DiffusionPipeline, prompts: list[str], noise: Tensor, steps: int, scale: float, kind: str
    ) -> Any:
        """By the pipeline's own loop: latents (B, ...) where `kind` is `latent`, pictures (B, H, W, 3) where `np`."""
        pipe.set_progress_bar_config(disable=True)
        height, width = self.size
        found = pipe(
            prompt=list(prompts),  # which some pipelines write into
            latents=self.into(noise),
            num_inference_steps=steps,
            height=height,
            width=width,
            output_type=kind,
            **self.guided(scale),
            **self.told,
        ).images
        return self.out_of(found, noise) if kind == "latent" else found


def nudged(module: nn.Module, seed: int = 0, by: float = 0.05) -> nn.Module:
    """With noise on every weight, in place: what starts at zero then counts."""
    random = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data += by * torch.randn(weight.shape, generator=random)
    return module.eval()


def tokenizer(length: int) -> PreTrainedTokenizerBase:
    """Words between [BOS] and [EOS], up to `length` tokens."""
    found = word_tokenizer(WORDS)
    ends = [(name, found.convert_tokens_to_ids(name)) for name in ("[BOS]", "[EOS]")]
    found.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    found.model_max_length = length
    return found


def clip(length: int, projected: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of width 16, with or without its projection."""
    words = tokenizer(length)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projected or 16,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return nudged((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer(8)),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return nudged(T5EncoderModel(config))


def kl_codec(channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Latents are half as high and wide as pictures."""
    codec = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )
    return nudged(codec)


def _sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=nudged(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_codec(scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(8, projected=16),
        tokenizer=tokenizer(8),
        text_encoder_2=clip(8, projected=24),
        tokenizer_2=tokenizer(8),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(12),
    )


def _flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=nudged(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_codec(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(8),
        tokenizer=tokenizer(8),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(12),
    )


def flux_packed(latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def flux_unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, *like.shape[2:], vae_scale_factor=1)


def ddim(**told: Any) -> DDIMScheduler:
    """That of Stable Diffusion, which stops at the data."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(num_train_timesteps=900, clip_sample=False, **betas, **told)


def unet(text_width: int, **settings: Any) -> UNet2DConditionModel:
    found = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    )
    return nudged(found, by=0.02)


def _sd15() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet(16),
        scheduler=ddim(steps_offset=1),
        vae=kl_codec(scaling_factor=0.5),
        text_encoder=clip(8),
        tokenizer=tokenizer(8),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return StableDiffusionXLPipeline(
        unet=unet(32, projection_class_embeddings_input_dim=6 * 8 + 24, use_linear_projection=True, **sizes),
        scheduler=ddim(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        vae=kl_codec(scaling_factor=0.5),
        text_encoder=clip(8),
        tokenizer=tokenizer(8),
        text_encoder_2=clip(8, projected=24),
        tokenizer_2=tokenizer(8),
        add_watermarker=False,
    )


def _pixart(kind: type[DiffusionPipeline], scheduler: SchedulerMixin, **settings: Any) -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=32,
        **settings,
    )
    return kind(
        transformer=nudged(transformer),
        scheduler=scheduler,
        vae=kl_codec(scaling_factor=0.5),
        text_encoder=t5(),
        tokenizer=tokenizer(12),
    )


def _pixart_alpha() -> DiffusionPipeline:
    """Of the size whose network is told the pictures' size."""
    return _pixart(PixArtAlphaPipeline, ddim(), sample_size=128)


def _pixart_sigma() -> DiffusionPipeline:
    """With a scheduler of the kind that it comes with, whose first order is DDIM."""
    return _pixart(PixArtSigmaPipeline, DPMSolverMultistepScheduler(solver_order=1), sample_size=8)


def _dit() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8
    )
    pipe = DiTPipeline(transformer=nudged(transformer), scheduler=ddim(), vae=kl_codec(scaling_factor=0.5))
    pipe.register_to_config(id2label={"3": "a green square, a square", "7": "a red circle above a blue square"})
    return pipe


class Labelled(Family):
    """Of a pipeline that is told numbers of classes, draws its noise itself, and gives pictures alone."""

    def paint(
        self, pipe: DiffusionPipeline, prompts: list[str], noise: Tensor, steps: int, scale: float, kind: str
    ) -> Any:
        pipe.set_progress_bar_config(disable=True)
        drawn = mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=noise)
        with drawn, mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
            told = pipe.get_label_ids(prompts)
            found = pipe(told, guidance_scale=scale, num_inference_steps=steps, output_type="np").images
        return decode.call_args.args[0] * pipe.vae.config.scaling_factor if kind == "latent" else found


_PIXART = {"max_sequence_length": 12, "use_resolution_binning": False, "clean_caption": False}


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """Words, and a template of chats whose messages are texts or parts with texts."""
    found = word_tokenizer(WORDS)
    found.chat_template = (
        "{% for each in messages %}{{ each.role }} : "
        "{{ each.content if each.content is string else each.content[0].text }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return found


def language_settings(layers: int, **more: Any) -> dict[str, Any]:
    """Of a decoder of width 16; a pipeline may read the states of certain of its `layers`."""
    return {
        "vocab_size": len(chat_tokenizer()),
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **more,
    }


def _flux2_parts(told: bool) -> dict[str, Any]:
    """Of both pipelines of FLUX.2; the network is `told` a guidance scale."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=told,
    )
    codec = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    codec.bn.running_mean.copy_(FLUX2_MEAN)
    codec.bn.running_var.copy_(FLUX2_STD.square() - codec.bn.eps)
    return {
        "transformer": nudged(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": nudged(codec),
        "tokenizer": chat_tokenizer(),
    }


FLUX2_MEAN, FLUX2_STD = torch.linspace(-0.5, 0.5, 16), torch.linspace(0.5, 2.0, 16)
"""Of each channel of the patched latents of FLUX.2's codec."""


def _flux2() -> DiffusionPipeline:
    reader = Mistral3Config(
        text_config=language_settings(30, model_type="mistral", head_dim=8),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    return Flux2Pipeline(text_encoder=nudged(Mistral3ForConditionalGeneration(reader)), **_flux2_parts(told=True))


def _flux2_klein() -> DiffusionPipeline:
    reader = Qwen3ForCausalLM(Qwen3Config(**language_settings(27, head_dim=8)))
    return Flux2KleinPipeline(text_encoder=nudged(reader), **_flux2_parts(told=False))


def flux2_unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


def flux2_patched(cells: Tensor, like: Tensor) -> Tensor:
    """[klein] returns what its codec decodes."""
    patches = torch.nn.functional.pixel_unshuffle(cells, 2)
    return (patches - FLUX2_MEAN[:, None, None]) / FLUX2_STD[:, None, None]


def _qwen_image() -> DiffusionPipeline:
    reader = Qwen2_5_VLConfig(
        text_config=language_settings(2, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    codec = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.9, 0.0],
        latents_std=[2.8, 1.4, 0.5, 1.0],
    )
    return QwenImagePipeline(
        transformer=nudged(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=nudged(codec),
        text_encoder=nudged(Qwen2_5_VLForConditionalGeneration(reader)),
        tokenizer=chat_tokenizer(),
    )


def _z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    return ZImagePipeline(
        transformer=nudged(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_codec(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=nudged(Qwen3Model(Qwen3Config(**language_settings(2, head_dim=8)))),
        tokenizer=chat_tokenizer(),
    )


def _sana() -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    codec = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41,
    )
    return SanaPipeline(
        transformer=nudged(transformer),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=1
        ),
        vae=nudged(codec),
        text_encoder=nudged(Gemma2Model(Gemma2Config(**language_settings(2, head_dim=8)))),
        tokenizer=chat_tokenizer(),
    )


FAMILIES: dict[str, Family] = {
    "dit": Labelled(_dit, size=(16, 16), loads_lora=False),
    "pixart_alpha": Family(_pixart_alpha, options={"max_tokens": 12}, told=_PIXART, loads_lora=False),
    "pixart_sigma": Family(_pixart_sigma, options={"max_tokens": 12}, told=_PIXART, loads_lora=False),
    "sd15": Family(_sd15),
    "sdxl": Family(_sdxl),
    "sd3": Family(_sd3, options={"max_tokens": 12}, told={"max_sequence_length": 12}),
    "flux": Family(
        _flux,
        options={"max_tokens": 12, "embedded_guidance": 2.5},
        told={"max_sequence_length": 12, "guidance_scale": 2.5},
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [""] * 2},
        into=flux_packed,
        out_of=flux_unpacked,
    ),
    "flux2": Family(
        _flux2,
        scales=(1.0,),
        options={"max_tokens": 48, "embedded_guidance": 2.5},
        told={"max_sequence_length": 48, "guidance_scale": 2.5},
        guided=lambda scale: {},
        out_of=flux2_unpacked,
    ),
    "flux2_klein": Family(
        _flux2_klein, options={"max_tokens": 16}, told={"max_sequence_length": 16}, out_of=flux2_patched
    ),
    "qwen_image": Family(
        _qwen_image,
        options={"max_tokens": 24},
        told={"max_sequence_length": 24},
        guided=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [""] * 2},
        into=flux_packed,
        out_of=flux_unpacked,
    ),
    "z_image": Family(
        _z_image,
        options={"max_tokens": 40},
        told={"max_sequence_length": 40},
        guided=lambda scale: {"guidance_scale": scale - 1},
    ),
    "sana": Family(
        _sana,
        size=(32, 64),
        options={"max_tokens": 16},
        told={"max_sequence_length": 16, "use_resolution_binning": False},
    ),
}


if __name__ == "__main__":  # FAMILY FOLDER
    torch.manual_seed(0)
    FAMILIES[sys.argv[1]].build().save_pretrained(sys.argv[2])

"""Our rollout with log-probabilities against the diffusers pipeline loop that others build on: one run, same weights.

    python -m benchmarks.rollout [--prompts 2] [--siblings 24] [--steps 10] [--guidance 4.5] [--compile]
    python -m benchmarks.rollout --wide --prompts 1 --siblings 16 --batch 16 --repeats 1
    python -m benchmarks.rollout --sd35 --prompts 4 --learn-batch 4 --compile

Untrained networks: a tiny SD3; with `--wide` two blocks of Stable Diffusion 3.5 Medium's width in its place; or with
`--sd35` that model at 512 x 512, text encoders included.

- plain: `StableDiffusion3Pipeline`, each sibling from noise of its own, its prompt encoded for it, the adapter beside
  the base weights. It knows no log-probabilities, which others add to it.
- ours: what `finetune` does before the reward: prompts encoded once, siblings parting in a window of stochastic steps,
  the adapter merged into a twin where the weights are float32. The window starts at each step that training would
  choose from, equally often.
- plain, encoded: the plain loop with embeddings of all its prompts that were made before the clock started.

All guide in one batch and decode picture by picture. Prompts are new each time, so no cache helps. The step of
training is that of a window of stochastic steps, and one of all of them, on as many pictures. The fastest of the
repeats counts. Operations are the network's alone (`models.metering`), the matmul rate is measured in the same process.
The peak memory, of a GPU alone, is with the twin there in all ways. It runs on a GPU where there is one, unless
ACCELERATE_USE_CPU=true.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.stages import matmul_rate
from judges.shapes.grammar import vocabulary
from models.adapters.options import Options
from models.adapters.sd3 import SD3Generator
from models.geometry import Part, asked, geometry
from models.guidance import Guidance
from models.metering import painted
from models.samplers import keyed_noise
from models.text import word_tokenizer
from pipeline.compiling import compile_module
from pipeline.progress import quiet_libraries
from pipeline.prompts import PromptRow, ShapesPrompts, draw_key
from pipeline.rl.algorithm import Velocities
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.rollout import Plan, rollout
from pipeline.rl.settings import LoraSettings, TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from rewards.rules import RuleReward

_SCALED = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
"""Of SD3's codec."""

_CLIP = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TINY = {
    "transformer": Part(
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 128,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "text_encoder": Part("CLIPTextModelWithProjection", _CLIP),
    "text_encoder_2": Part("CLIPTextModelWithProjection", _CLIP),
    "text_encoder_3": Part(
        "T5EncoderModel",
        {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
    ),
    "vae": Part(
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
}

_WIDE = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}


@dataclass(frozen=True)
class Size:
    """What is painted by: its networks, pixels along a side, and tokens that CLIP and T5 read."""

    parts: dict[str, Part]
    resolution: int
    clip_tokens: int
    t5_tokens: int
    dtype: str


def size_of(asked: argparse.Namespace) -> Size:
    if asked.sd35:
        return Size(geometry("stabilityai/stable-diffusion-3.5-medium").parts, 512, 77, 256, asked.dtype)
    parts = TINY
    if asked.wide:
        tiny = TINY["transformer"]
        parts = {**TINY, "transformer": replace(tiny, config={**tiny.config, **_WIDE})}
    return Size(parts, 32, 16, 16, asked.dtype)


def untrained(size: Size, guidance: float, device: torch.device) -> SD3Generator:
    """A pipeline of random weights, the same each time, on `device`."""

    def built(name: str, part: Part) -> nn.Module:
        config = {**part.config, **(_SCALED if name == "vae" else {})}
        kind: Any = getattr(diffusers, part.kind, None)
        with torch.device(device):
            if kind is None:
                kind = getattr(transformers, part.kind)
                network = kind(kind.config_class.from_dict(config))
            else:
                network = kind.from_config(config)
        return network.to(getattr(torch, size.dtype))

    def tokenizer(length: int) -> transformers.PreTrainedTokenizerBase:
        found = word_tokenizer(vocabulary())
        found.model_max_length = length
        return found

    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        **{name: built(name, part) for name, part in size.parts.items()},
        tokenizer=tokenizer(size.clip_tokens),
        tokenizer_2=tokenizer(size.clip_tokens),
        tokenizer_3=tokenizer(size.t5_tokens),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    options = Options(
        resolution=size.resolution,
        guidance=Guidance(guidance),
        max_tokens=size.t5_tokens,
        dtype=size.dtype,
        text_dtype=size.dtype,
        codec_dtype=size.dtype,
        offload=False,
    )
    return SD3Generator(pipe, options).to(device)


@dataclass(frozen=True)
class Timing:
    """What took `seconds`, the most memory in use meanwhile where that is known, and the rows that the network was
    asked for."""

    work: str
    seconds: float
    bytes: int | None
    rows: float


class Benchmark:
    """P prompts with K siblings each, by either way, on the same weights."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.size = size_of(asked)
        self.generator = untrained(self.size, asked.guidance, process_state().device)
        config = GRPOConfig(sampler="cps", eta=0.8, window=asked.window, last_start=asked.last_start, kl=0.0)
        config.check(asked.steps, asked.siblings)
        algorithm = GRPO(config)
        settings = TrainerSettings(
            groups=asked.prompts,
            group_size=asked.siblings,
            steps=asked.steps,
            batch=asked.batch,
            dtype=asked.dtype,
            lora=LoraSettings(rank=32, alpha=64),
        )
        reward = RuleReward("brightness")
        self.trainer = Trainer(self.generator, reward, algorithm, settings, 0, Accelerator())
        self.turns = itertools.count()

    @property
    def guided(self) -> int:
        """Rows a picture."""
        return 1 + self.generator.guidance.needs_negative

    @property
    def images(self) -> int:
        return self.asked.prompts * self.asked.siblings

    @property
    def plan(self) -> Plan:
        return self.trainer.algorithm.rollout_plan(0, 0, self.trainer.times, self.asked.siblings)

    def prompts(self) -> list[PromptRow]:
        """That nobody has seen yet."""
        return ShapesPrompts(type="shapes").draw(draw_key(0, "rollout", next(self.turns)), self.asked.prompts)

    def ours(self) -> None:
        """Once for each step at which a window may start."""
        trainer = self.trainer
        for start in range(self.asked.last_start + 1):
            prompts = self.prompts()
            cond = self.generator.encode([prompt.text for prompt in prompts])
            trainer.bring_up()
            plan, ids = replace(self.plan, start=start), [prompt.id for prompt in prompts]
            predict = trainer.predict(trainer.plain)
            rollout(self.generator, predict, cond, ids, (0, start), plan, self.asked.batch)

    def our_rows(self) -> float:
        """Of a rollout, on average: each prompt's shared steps and the first of its window, and then all siblings'."""
        shared = 1 + self.asked.last_start / 2
        each = shared + self.asked.siblings * (self.asked.steps - shared)
        return self.guided * self.asked.prompts * each

    def batches(self) -> list[list[str]]:
        """Of the prompt of each picture, new ones."""
        texts = [prompt.text for prompt in self.prompts() for _ in range(self.asked.siblings)]
        return [texts[first : first + self.asked.batch] for first in range(0, len(texts), self.asked.batch)]

    @functools.cached_property
    @torch.no_grad()
    def encoded(self) -> list[dict[str, torch.Tensor]]:
        """What the pipeline makes of batches of prompts, under the names that it takes it by."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        pipe, length = self.generator.pipe, self.size.t5_tokens
        told = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": self.asked.guidance > 1}
        made = [pipe.encode_prompt(part, **told, max_sequence_length=length) for part in self.batches()]
        return [{name: one for name, one in zip(names, each, strict=True) if one is not None} for each in made]

    def plain(self) -> None:
        self._pipeline([{"prompt": part} for part in self.batches()])

    def plain_encoded(self) -> None:
        self._pipeline(self.encoded)

    @torch.no_grad()
    def _pipeline(self, batches: list[dict[str, Any]]) -> None:
        asked, dtype, device = self.asked, getattr(torch, self.size.dtype), self.generator.device
        mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        for number, told in enumerate(batches):
            first = number * asked.batch
            keys = list(range(first, first + min(asked.batch, self.images - first)))
            noise = keyed_noise(keys, self.generator.latent_shape, device)
            with mixed:
                self.generator.pipe(
                    **told,
                    latents=noise.to(dtype),
                    num_inference_steps=asked.steps,
                    guidance_scale=asked.guidance,
                    height=self.size.resolution,
                    width=self.size.resolution,
                    max_sequence_length=self.size.t5_tokens,
                    output_type="np",
                )

    def learning(self, window: int | None) -> tuple[Callable[[], None], int]:
        """A pass over all stochastic steps of a rollout with its gradient, and the rows that it asks for. Without a
        window all steps but the last are stochastic, and siblings share none of them."""
        trainer, prompts = self.trainer, self.prompts()
        fans = () if window is None else None
        config = trainer.algorithm.config.model_copy(update={"window": window, "fans": fans})
        algorithm = GRPO(config)
        cond = self.generator.encode([prompt.text for prompt in prompts])
        ids, predict = [prompt.id for prompt in prompts], trainer.predict(trainer.plain)
        plan = algorithm.rollout_plan(0, 0, trainer.times, self.asked.siblings)
        rolled = rollout(self.generator, predict, cond, ids, (0,), plan, self.asked.batch)
        random = torch.Generator().manual_seed(0)
        advantages = torch.randn(len(ids), self.asked.siblings, generator=random).to(self.generator.device)
        sets = algorithm.examples(rolled, advantages, ids, (0,))
        tuned = trainer.predict(trainer.tuned)

        def learn() -> None:
            for examples in sets:
                for rows in torch.arange(len(examples), device=cond.device).split(self.asked.learn_batch):
                    piece = examples[rows]
                    v = piece.ask(lambda x, t, prompt: tuned(x, t, cond[prompt]))
                    algorithm.loss(piece, Velocities(v)).total.mean().backward()
            trainer.optimizer.zero_grad()

        return learn, self.guided * sum(map(len, sets))

    def timed(self, work: str, function: Callable[[], None], rows: float, times: int = 1) -> Timing:
        """The fastest of the repeats after one more; the function does its work so many `times`."""
        function()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.asked.repeats):
            self._wait()
            started = time.perf_counter()
            function()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return Timing(work, min(seconds) / times, self._peak(), rows)

    def timings(self) -> list[Timing]:
        starts = self.asked.last_start + 1
        plain_rows = self.guided * self.images * self.asked.steps
        found = [
            self.timed("ours", self.ours, self.our_rows(), starts),
            self.timed("plain pipeline", self.plain, plain_rows),
            self.timed("plain, encoded", self.plain_encoded, plain_rows),
        ]
        if self.asked.compile:
            self.trainer.compiled = compile_module(self.trainer.plain, self.generator.device)
            found.append(self.timed("ours, compiled", self.ours, self.our_rows(), starts))
        return found

    def lessons(self) -> list[Timing]:
        """A backward pass through frozen weights costs what a call does, and these know of no other gradient."""
        found = []
        for work, window in (("training on the window", self.asked.window), ("training on all steps", None)):
            learn, rows = self.learning(window)
            found.append(self.timed(work, learn, 2 * rows))
        return found

    def operations(self) -> int:
        """Of the network, for a row."""
        network = self.size.parts["transformer"].build()
        side = self.generator.latent_shape[-1]
        return painted(network, asked(network, 1, (side, side), self.size.clip_tokens + self.size.t5_tokens)).flops

    @property
    def on_gpu(self) -> bool:
        return self.generator.device.type == "cuda"

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _peak(self) -> int | None:
        """Bytes; of a CPU only what the process ever had is known."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else None


def show(benchmark: Benchmark, found: list[Timing], rate: float, against: list[Timing]) -> Table:
    """A row a timing, and how many times as fast it is as each of what it stands `against`."""
    ratios = [f"of {other.work}" for other in against]
    table = Table("work", "images", "seconds", "images/s", *ratios, "of matmul", *(["peak GiB"] * benchmark.on_gpu))
    operations = benchmark.operations()
    for one in found:
        table.add_row(
            one.work,
            f"{benchmark.images}",
            f"{one.seconds:.2f}",
            f"{benchmark.images / one.seconds:.2f}",
            *(f"{other.seconds / one.seconds:.2f} x" for other in against),
            f"{one.rows * operations / one.seconds / rate:.0%}",
            *([] if one.bytes is None else [f"{one.bytes / 2**30:.2f}"]),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd35", action="store_true", help="Stable Diffusion 3.5 Medium's geometry at 512 x 512")
    parser.add_argument("--wide", action="store_true", help="two blocks as wide as Stable Diffusion 3.5 Medium's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--siblings", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--last-start", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learn-batch", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    on_cpu = process_state().device.type == "cpu"
    asked.dtype = asked.dtype or ("float32" if on_cpu else "bfloat16")
    quiet_libraries()
    benchmark = Benchmark(asked)
    side, device = (8192, benchmark.generator.device.type) if benchmark.on_gpu else (1024, "cpu")
    rate = matmul_rate(side, device=device, dtype=getattr(torch, asked.dtype))
    console = Console(width=140)
    threads = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    console.print(f"matmul: {rate / 1e9:,.0f} GFLOP/s in {asked.dtype}, {threads}")
    painted_by = benchmark.timings()
    console.print(show(benchmark, painted_by, rate, painted_by[1:3]))
    learned = benchmark.lessons()
    console.print(show(benchmark, learned, rate, learned[1:]))


if __name__ == "__main__":
    main()

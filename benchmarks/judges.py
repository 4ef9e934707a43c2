"""Questions a second of the batched BLIP-2 scorer, against one unbatched call per question.

    OMP_NUM_THREADS=1 python -m benchmarks.judges [--geometry embedded|300m|opt-2.7b] [--images 16] [--repeats 3]
        [--device cuda] [--dtype bfloat16]

The unbatched way is a transformers forward for each (picture, question): image processor, tokenizer, vision tower,
Q-Former, language model. Both answer the same questions in turn, `repeats` times after a warm-up, and the fastest of
each counts; their margins must be equal to 1e-4 in fp32. `embedded` is the embedded world's judge; the others have
random weights and the sizes of published parts. One thread keeps other processes out of the ratio.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
)

from judges.base import Question
from judges.blip2 import Blip2VQA, load_blip2
from judges.shapes.grammar import sample_prompt, vocabulary
from judges.shapes.questions import decompose, question_vocabulary
from judges.shapes.render import render, scene_of
from models.text import word_tokenizer
from pipeline.progress import quiet_libraries

EMBEDDED = "judges/checkpoints/shapes/vqa"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Geometry:
    """Sizes of a BLIP-2 that reads 224 x 224 pixels: (layers, width, heads, feed-forward width) of the vision tower and
    of OPT, and the edge of a patch. The Q-Former is BERT-base with 32 queries."""

    vision: tuple[int, int, int, int]
    patch: int
    language: tuple[int, int, int, int]


GEOMETRIES = {
    "300m": Geometry((12, 768, 12, 3072), 16, (12, 768, 12, 3072)),
    "opt-2.7b": Geometry((39, 1408, 16, 6144), 14, (32, 2560, 32, 10240)),
}


@dataclass(frozen=True)
class Comparison:
    """Questions a second of both ways, and by how much, in nats, their margins differ at most and vary."""

    questions: int
    batched: float
    unbatched: float
    difference: float
    spread: float


def built(geometry: Geometry, device: str, dtype: torch.dtype, batch: int) -> Blip2VQA:
    """A BLIP-2 of random weights; with the vision tower's default `initializer_range`, 1e-10, it would see nothing."""
    tokenizer = word_tokenizer([*vocabulary(), *question_vocabulary()], extra=["<image>"])
    layers, width, heads, inner = geometry.vision
    vision = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=geometry.patch,
        initializer_range=0.02,
    )
    depth, state, parts, feed = geometry.language
    language = OPTConfig(
        hidden_size=state,
        word_embed_proj_dim=state,
        ffn_dim=feed,
        num_hidden_layers=depth,
        num_attention_heads=parts,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=width),
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Blip2ForConditionalGeneration(config).to(dtype)
        torch.nn.init.normal_(model.query_tokens, std=0.02)
    return Blip2VQA(model, tokenizer, BlipImageProcessorPil(size={"height": 224, "width": 224}), batch=batch)


def shown(count: int, side: int | None) -> list[np.ndarray]:
    """Pictures of the embedded world, or noise of `side` pixels."""
    if side:
        return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    rng = random.Random(0)
    return list(render([scene_of(sample_prompt(rng), rng) for _ in range(count)]))


def asked(pictures: int, count: int) -> list[list[Question]]:
    """`count` questions about each picture, on prompts of the embedded world."""
    rng, found = random.Random(1), []
    for _ in range(pictures):
        several: list[Question] = []
        while len(several) < count:
            several += decompose(sample_prompt(rng).text)
        found.append([Question(question.text) for question in several[:count]])
    return found


@torch.inference_mode()
def one_by_one(vqa: Blip2VQA, pictures: Sequence[np.ndarray], questions: Sequence[Sequence[Question]]) -> list[float]:
    """The margins, each from a call of its own."""
    model, tokenizer = vqa.model, vqa.tokenizer
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    image_tokens = "<image>" * model.config.num_query_tokens
    margins = []
    for picture, several in zip(pictures, questions, strict=True):
        for question in several:
            text = tokenizer(image_tokens + vqa.template.format(question.text), return_tensors="pt").to(model.device)
            pixels = vqa.image_processor([picture], return_tensors="pt").pixel_values.to(model.device, model.dtype)
            inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
            last = model(pixel_values=pixels, **inputs).logits[0, -1].float().log_softmax(-1)
            margins.append(float(last[yes] - last[no]))
    return margins


def batched(vqa: Blip2VQA, pictures: Sequence[np.ndarray], questions: Sequence[Sequence[Question]]) -> list[float]:
    """The margins by `Blip2VQA.ask`."""
    return [answer.margin for answers in vqa.ask(pictures, questions) for answer in answers]


def seconds(way: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """How long a way takes, and what it answers; the answers are on the CPU, so the device is done."""
    started = time.perf_counter()
    found = way()
    return time.perf_counter() - started, found


def compared(
    vqa: Blip2VQA, pictures: Sequence[np.ndarray], questions: Sequence[Sequence[Question]], repeats: int
) -> Comparison:
    """Both ways in turn, the fastest of each. Raises AssertionError where they disagree in fp32."""
    batched(vqa, pictures[:1], questions[:1]), one_by_one(vqa, pictures[:1], questions[:1])
    runs = [
        [seconds(lambda way=way: way(vqa, pictures, questions)) for way in (batched, one_by_one)]
        for _ in range(repeats)
    ]
    (_, ours), (_, theirs) = runs[0]
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    assert vqa.model.dtype != torch.float32 or difference <= TOLERANCE, f"margins differ by {difference} nats"
    rates = [len(ours) / min(run[way][0] for run in runs) for way in (0, 1)]
    return Comparison(len(ours), *rates, difference, float(np.std(theirs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=["embedded", *GEOMETRIES], default="embedded")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    settings = parser.parse_args()
    quiet_libraries()
    if settings.geometry == "embedded":
        vqa = load_blip2(EMBEDDED, settings.device, batch=settings.batch)
    else:
        dtype = getattr(torch, settings.dtype)
        vqa = built(GEOMETRIES[settings.geometry], settings.device, dtype, settings.batch)
    pictures = shown(settings.images, None if settings.geometry == "embedded" else 512)
    found = compared(vqa, pictures, asked(settings.images, settings.questions), settings.repeats)
    table = Table(
        "model", "parameters", "questions", "batched/s", "one by one/s", "ratio", "largest difference", "spread"
    )
    table.add_row(
        settings.geometry,
        f"{sum(p.numel() for p in vqa.model.parameters()) / 1e6:,.0f} M",
        f"{found.questions} ({settings.questions} a picture)",
        f"{found.batched:.1f}",
        f"{found.unbatched:.1f}",
        f"{found.batched / found.unbatched:.1f}",
        f"{found.difference:.1e}",
        f"{found.spread:.2f}",
    )
    console = Console()
    console.print(f"{settings.dtype} on {settings.device} with {torch.get_num_threads()} threads")
    console.print(table)


if __name__ == "__main__":
    main()

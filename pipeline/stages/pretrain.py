"""Pretraining of the embedded world's generator and judge: what rebuilds the shipped checkpoints.

Not a stage of a run: `python -m pipeline pretrain CONFIG`. Resumable; the finished checkpoint goes to `publish`,
with its settings and the quality measured on held-out prompts beside it.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from judges.base import Question
from judges.blip2 import TEMPLATE, Blip2VQA
from judges.matching import matching_logits
from judges.qformer import (
    DenseHead,
    answering_loss,
    dense_loss,
    inherit,
    matching_loss,
    reading_loss,
    sequences,
    small_config,
)
from judges.shapes.flaws import COLOUR_CLASSES, PATCH, SHAPE_CLASSES, Example, clean, patch_targets
from judges.shapes.grammar import SKILLS, Prompt, change_one, sample_prompt, vocabulary
from judges.shapes.lessons import answering_batch, contrast_batch, matching_batch, vision_examples
from judges.shapes.oracle import gold
from judges.shapes.questions import queries, question_vocabulary
from judges.shapes.render import SIZE, Scene, render, scene_of
from judges.stage1 import stage1_losses
from models.codec import Codec, codec_loss, to_images, to_pixels
from models.generator import NativeGenerator, sample
from models.keys import sample_key
from models.pretrain import Batch, new_generator, pretraining_loss
from models.text import word_tokenizer
from pipeline.compiling import compile_module
from pipeline.progress import Progress, quiet_libraries
from pipeline.settings import Section, dump
from pipeline.store import atomic_write_text
from pipeline.training import Average, hybrid_optimizers, steps_done, train, trapezoid

TEXT_TOKENS = 16
"""To how many tokens a prompt is padded for image-text matching."""


class Optimisation(Section):
    """Muon's learning rate for hidden matrices, AdamW's for the rest, and the moving average of the weights."""

    matrix_lr: float = Field(3e-3, gt=0)
    lr: float = Field(1e-3, gt=0)
    average: float = Field(0.998, ge=0, lt=1)
    save_every: int = Field(100, ge=1)


class GeneratorJob(Section):
    """A codec, then an MM-DiT on its latents of `pictures` renderings.

    In the codec's loss `meaning` weighs how well shape, colour and place are read from the latents linearly; its
    decoder then has `decoder_steps` alone, on less noise, to become crisp. The MM-DiT sees true captions for
    `clean_steps`, and then for `noisy_steps` captions of which a share `noise` has one attribute changed.
    """

    type: Literal["generator"]
    codec_steps: int = Field(3000, ge=1)
    decoder_steps: int = Field(2000, ge=1)
    codec_lr: float = Field(4e-3, gt=0)
    meaning: float = Field(0.1, ge=0)
    pictures: int = Field(60000, ge=1)
    width: int = 96
    depth: int = 4
    text_depth: int = 1
    max_tokens: int = 12
    batch: int = 128
    clean_steps: int = Field(4500, ge=0)
    noisy_steps: int = Field(1500, ge=0)
    noise: float = Field(0.4, ge=0, le=1)
    compile: bool = True
    optimisation: Optimisation = Optimisation()


class JudgeJob(Section):
    """A BLIP-2 in three tasks: vision, matching, answering (see `judges.qformer`).

    A share `repainted` of the pictures is shown as the generator in `painter` would paint it, through its codec.

    Attributes:
        first_stage: `itm`, matching with hard texts made for each picture; or `paper`, contrast, matching and
            generation with the texts of the batch (see `judges.stage1`).
        language: whether the language model is `trained` along with answering, or reads texts alone for `reading_steps`
            and is then `frozen`, as the paper's is.
    """

    type: Literal["judge"]
    painter: str = "models/checkpoints/shapes"
    repainted: float = Field(0.5, ge=0, le=1)
    width: int = 128
    queries: int = 12
    vision_steps: int = Field(600, ge=1)
    matching_steps: int = Field(1200, ge=1)
    answering_steps: int = Field(11500, ge=1)
    first_stage: Literal["itm", "paper"] = "itm"
    language: Literal["trained", "frozen"] = "trained"
    reading_steps: int = Field(600, ge=1)
    batch: int = 64
    questions: int = 4
    length: int = 32
    optimisation: Optimisation = Optimisation()


class PretrainConfig(Section):
    """The root of a `pretrain` file."""

    name: str
    out: str = "runs/pretrain"
    publish: str
    seed: int = 0
    job: Annotated[GeneratorJob | JudgeJob, Field(discriminator="type")]


def pretrain(config: PretrainConfig) -> None:
    """Train, measure and publish."""
    quiet_libraries()
    progress = Progress()
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    job = config.job
    build = _generator if isinstance(job, GeneratorJob) else _judge
    fresh = folder / "checkpoint"
    quality = build(job, config.seed, folder, fresh, progress)
    atomic_write_text(fresh / "quality.json", json.dumps(quality, indent=2) + "\n")
    atomic_write_text(fresh / "pretrain.yaml", f"seed: {config.seed}\n{dump(config.job)}")
    shutil.copytree(fresh, config.publish, dirs_exist_ok=True)
    progress.say(f"{config.publish}: {json.dumps(quality)}")


def _train(
    name: str,
    loss_at: Callable[[int], Tensor],
    modules: Mapping[str, nn.Module],
    steps: int,
    decay: int,
    settings: Optimisation,
    folder: Path,
    progress: Progress,
) -> None:
    """Run one task and leave the averaged weights in `modules`."""
    optimizers = hybrid_optimizers(modules, settings.matrix_lr, settings.lr)
    average = Average(modules, settings.average)
    recent: list[float] = []
    with progress.track(steps, "steps", name, steps_done(folder / name)) as advance:

        def on_step(step: int, loss: float) -> None:
            recent.append(loss)
            advance(1, loss=float(np.mean(recent[-50:])))

        train(
            loss_at,
            modules,
            optimizers,
            steps,
            lambda step: trapezoid(step, steps, 50, decay),
            folder / name,
            average,
            settings.save_every,
            on_step=on_step,
        )
    average.swap()


def captions_of(prompts: Sequence[Prompt], noise: float, rng: random.Random) -> list[str]:
    """The texts of `train` prompts, a share `noise` of them with one attribute changed, within the split: held-out
    prompts are neither shown nor lied about."""
    return [(change_one(p, rng, "train") if rng.random() < noise else p).text for p in prompts]


def _gallery(codec: Codec, pictures: int, seed: int, progress: Progress) -> tuple[list[Prompt], Tensor]:
    """Prompts and the latents of a rendering of each."""
    prompts, latents = [], []
    with progress.track(pictures, "pictures", "gallery", 0) as advance:
        for start in range(0, pictures, 256):
            rng = random.Random(sample_key(seed, "gallery", start))
            drawn = [sample_prompt(rng, "train") for _ in range(min(256, pictures - start))]
            images = render([scene_of(prompt, rng, lattice=True) for prompt in drawn])
            with torch.no_grad():
                latents.append(codec.encode(to_pixels(images)))
            prompts += drawn
            advance(len(drawn))
    return prompts, torch.cat(latents)


def _generator(job: GeneratorJob, seed: int, folder: Path, out: Path, progress: Progress) -> dict:
    generator = new_generator(vocabulary(), SIZE, job.width, job.depth, job.text_depth, job.max_tokens, seed)
    codec = generator.codec
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DenseHead(codec.config.channels, SHAPE_CLASSES, COLOUR_CLASSES)

    def scenes_at(task: str, step: int) -> list[Scene]:
        rng = random.Random(sample_key(seed, task, step))
        return [scene_of(sample_prompt(rng, "train"), rng, lattice=rng.random() < 0.7) for _ in range(64)]

    def codec_at(step: int) -> Tensor:
        images, truths = dense_targets([clean(scene) for scene in scenes_at("codec", step)])
        loss, latents = codec_loss(codec, to_pixels(images), sample_key(seed, "codec noise", step))
        return loss + job.meaning * dense_loss(head, latents.flatten(2).mT, *truths)

    def decoder_at(step: int) -> Tensor:
        pixels = to_pixels(render(scenes_at("decoder", step)))
        return codec_loss(codec, pixels, sample_key(seed, "decoder noise", step), most_noise=0.1)[0]

    slow = job.optimisation.model_copy(update={"lr": job.codec_lr})
    parts = {"codec": codec, "head": head}
    _train("codec", codec_at, parts, job.codec_steps, job.codec_steps // 2, slow, folder, progress)
    codec.encoder.requires_grad_(False)
    decoder = {"decoder": codec.decoder}
    _train("decoder", decoder_at, decoder, job.decoder_steps, job.decoder_steps // 2, slow, folder, progress)
    codec.requires_grad_(False)
    prompts, latents = _gallery(codec, job.pictures, seed, progress)

    def captions_at(step: int) -> Batch:
        rng = random.Random(sample_key(seed, "flow", step))
        chosen = [rng.randrange(job.pictures) for _ in range(job.batch)]
        noise = job.noise if step >= job.clean_steps else 0.0
        return latents[chosen], captions_of([prompts[i] for i in chosen], noise, rng)

    if job.compile:
        compile_module(generator.transformer, generator.device)
    modules = {"transformer": generator.transformer, "text_encoder": generator.text_encoder}
    loss_at = pretraining_loss(generator, captions_at, seed)
    steps = job.clean_steps + job.noisy_steps
    _train("flow", loss_at, modules, steps, job.noisy_steps, job.optimisation, folder, progress)
    generator.save_pretrained(out)
    prompts = [sample_prompt(random.Random(i), "eval", SKILLS[i % len(SKILLS)]) for i in range(510)]
    images = list(sample(NativeGenerator.from_pretrained(out), [p.text for p in prompts], range(510)))
    right = np.array(gold(images, [p.text for p in prompts]))
    per_skill = {skill: float(right[i :: len(SKILLS)].mean()) for i, skill in enumerate(SKILLS)}
    return {"gold": float(right.mean()), "per_skill": per_skill, "images": len(images)}


def _judge(job: JudgeJob, seed: int, folder: Path, out: Path, progress: Progress) -> dict:
    tokenizer = word_tokenizer([*vocabulary(), *question_vocabulary()], extra=["<image>"])
    tokenizer.model_max_length = TEXT_TOKENS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (tokenizer, SIZE, PATCH, job.width)
        matcher = Blip2ForImageTextRetrieval(small_config(*sizes, job.queries, with_text=True))
        model = Blip2ForConditionalGeneration(small_config(*sizes, job.queries, with_text=False))
        head = DenseHead(job.width, SHAPE_CLASSES, COLOUR_CLASSES)
        nn.init.normal_(matcher.query_tokens, std=0.02)
        nn.init.normal_(model.query_tokens, std=0.02)

    codec = Codec.from_pretrained(Path(job.painter) / "codec").eval().requires_grad_(False)

    def rng_at(task: str, step: int) -> random.Random:
        return random.Random(sample_key(seed, task, step))

    def seen(images: np.ndarray, task: str, step: int) -> Tensor:
        return repainted(codec, to_pixels(images), job.repainted, sample_key(seed, task, step, "repainted"))

    def vision_at(step: int) -> Tensor:
        images, truths = dense_targets(vision_examples(rng_at("vision", step), job.batch))
        tokens = matcher.vision_model(pixel_values=seen(images, "vision", step)).last_hidden_state[:, 1:]
        return dense_loss(head, tokens, *truths)

    def matching_at(step: int) -> Tensor:
        batch = matching_batch(rng_at("matching", step), job.batch // 2)
        ids, mask = _padded(tokenizer, [text for told in batch.texts for text in told])
        shape = (*batch.labels.shape, -1)
        return matching_loss(
            matcher,
            seen(batch.images, "matching", step),
            ids.view(shape),
            mask.view(shape),
            torch.from_numpy(batch.labels),
        )

    def stage1_at(step: int) -> Tensor:
        batch = contrast_batch(rng_at("stage1", step), job.batch)
        ids, mask = _padded(tokenizer, batch.texts)
        random = torch.Generator().manual_seed(sample_key(seed, "stage1", step, "negatives"))
        pixels, follows = seen(batch.images, "stage1", step), torch.from_numpy(batch.follows)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return stage1_losses(matcher, pixels, ids, mask, follows, ends, random).total

    def reading_at(step: int) -> Tensor:
        batch = answering_batch(rng_at("reading", step), job.batch // 2, job.questions, TEMPLATE)
        return reading_loss(model, sequences(tokenizer, batch.texts, job.length)[0])

    def answering_at(step: int) -> Tensor:
        batch = answering_batch(rng_at("answering", step), job.batch // 2, job.questions, TEMPLATE)
        ids, target = sequences(tokenizer, batch.texts, job.length)
        return answering_loss(model, seen(batch.images, "answering", step), torch.tensor(batch.index), ids, target)

    def teach(task: str, loss_at: Callable[[int], Tensor], modules: Mapping[str, nn.Module], steps: int) -> None:
        _train(task, loss_at, modules, steps, steps // 3, job.optimisation, folder, progress)

    teach("vision", vision_at, {"vision": matcher.vision_model, "head": head}, job.vision_steps)
    matcher.vision_model.requires_grad_(False)
    first_at = matching_at if job.first_stage == "itm" else stage1_at
    teach("matching", first_at, {"matcher": matcher}, job.matching_steps)
    inherit(model, matcher)
    model.vision_model.requires_grad_(False)
    tokenizer.model_max_length = job.length
    if job.language == "frozen":
        teach("reading", reading_at, {"language": model.language_model}, job.reading_steps)
        model.language_model.requires_grad_(False)
    teach("answering", answering_at, {"model": model}, job.answering_steps)

    pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for part, name in ((model, "vqa"), (matcher, "itm")):
        tokenizer.model_max_length = TEXT_TOKENS if part is matcher else job.length
        for saved in (part, tokenizer, pictures):
            saved.save_pretrained(out / name)
    atomic_write_text(out / "vqa" / "judge.json", '{"questions": "shapes"}\n')
    return judge_quality(out)


def dense_targets(examples: Sequence[Example]) -> tuple[np.ndarray, list[Tensor]]:
    """Pictures, uint8 (B, H, W, 3), and what their patches show: shape and colour (B, N), offset (B, N, 2)."""
    targets = [patch_targets(example) for example in examples]
    truths = [np.stack([getattr(t, name) for t in targets]) for name in ("shape", "colour", "offset")]
    return np.stack([e.image for e in examples]), [torch.from_numpy(t) for t in truths]


def repainted(codec: Codec, pixels: Tensor, share: float, key: int, most_noise: float = 0.3) -> Tensor:
    """`pixels` (B, 3, S, S), the first `share` of them through the codec's latents with up to `most_noise`, rounded to
    the 256 levels of a picture: what is crisp in a rendering is a little off in a painted picture."""
    count = round(share * len(pixels))
    random = torch.Generator().manual_seed(key)
    with torch.no_grad():
        latents = codec.encode(pixels[:count])
        level = most_noise * torch.rand(count, 1, 1, 1, generator=random)
        painted = codec.decode(latents + level * torch.randn(latents.shape, generator=random))
    return torch.cat([to_pixels(to_images(painted)), pixels[count:]])


def _padded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def judge_quality(folder: Path, pictures: int = 1000) -> dict:
    """Share of right answers on renderings of held-out prompts, each asked about its own and a changed prompt."""
    vqa = Blip2VQA.from_pretrained(folder / "vqa")
    matcher = Blip2ForImageTextRetrieval.from_pretrained(folder / "itm").eval()
    rng = random.Random(0)
    told = [sample_prompt(rng, "eval") for _ in range(pictures)]
    examples = [clean(scene_of(prompt, rng)) for prompt in told]
    told = [prompt if rng.random() < 0.5 else change_one(prompt, rng) for prompt in told]
    images = [example.image for example in examples]
    asked = [queries(prompt) for prompt in told]
    truths = [
        [query.answer(example.objects) for query in found] for found, example in zip(asked, examples, strict=True)
    ]
    answers = vqa.ask(images, [[Question(query.text) for query in found] for found in asked])
    right = [[(a.margin > 0) == t for a, t in zip(*row, strict=True)] for row in zip(answers, truths, strict=True)]
    verdicts = [(min(a.margin for a in found) > 0) == truth[0] for found, truth in zip(answers, truths, strict=True)]
    ids, mask = _padded(AutoTokenizer.from_pretrained(folder / "itm"), [prompt.text for prompt in told])
    with torch.inference_mode():
        features = matcher.vision_model(pixel_values=to_pixels(np.stack(images))).last_hidden_state
        logits = matching_logits(matcher, features, ids, mask)
    matched = (logits[:, 1] > logits[:, 0]).numpy() == np.array([truth[0] for truth in truths])
    flat = [r for row in right for r in row]
    return {
        "questions": float(np.mean(flat)),
        "whole_prompt_question": float(np.mean([row[0] for row in right])),
        "verdict": float(np.mean(verdicts)),
        "matching": float(matched.mean()),
        "images": pictures,
        "asked": len(flat),
    }

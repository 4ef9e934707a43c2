"""Pretraining of the embedded world's generator and judge: what rebuilds the shipped checkpoints, and ablations.

Not a stage of a run: `python -m pipeline pretrain CONFIG`. Resumable; the finished checkpoint goes to `publish`,
with its settings and the quality measured on held-out prompts beside it.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.console import Console
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
from judges.shapes.grammar import change_one, sample_prompt, vocabulary
from judges.shapes.lessons import answering_batch, contrast_batch, matching_batch, vision_examples
from judges.shapes.questions import queries, question_vocabulary
from judges.shapes.render import SIZE, render, scene_of
from judges.stage1 import stage1_losses
from models.codec import Autoencoder, Codec, codec_loss, load_codec, to_images, to_pixels
from models.generator import NativeGenerator
from models.keys import sample_key
from models.text import word_tokenizer
from pipeline.judging import told
from pipeline.networks import MMDiTNetwork, NetworkConfig
from pipeline.progress import Progress, quiet_libraries
from pipeline.settings import Section, dump
from pipeline.stages.ablation import AblationJob, ablate, show
from pipeline.stages.codec import CodecConfig, MeaningCodec, VAECodec, scenes_at, teach_vae
from pipeline.stages.flow import FlowConfig, Optimisation, gallery_of, measured, run_task, train_flow
from pipeline.store import atomic_write_text

_OF_MEANING = ("codec_steps", "decoder_steps", "codec_lr", "meaning")
TEXT_TOKENS = 16
"""To how many tokens a prompt is padded for image-text matching."""


class GeneratorJob(FlowConfig):
    """A codec, then a network on its latents.

    In the loss of the codec that carries it `meaning` weighs how well shape, colour and place are read from the latents
    linearly; its decoder then has `decoder_steps` alone, on less noise, to become crisp. Other codecs have settings of
    their own.
    """

    type: Literal["generator"]
    codec: Annotated[CodecConfig, Field(discriminator="type")] = MeaningCodec()
    codec_steps: int = Field(3000, ge=1)
    decoder_steps: int = Field(2000, ge=1)
    codec_lr: float = Field(4e-3, gt=0)
    meaning: float = Field(0.1, ge=0)
    network: Annotated[NetworkConfig, Field(discriminator="type")] = MMDiTNetwork()

    @model_validator(mode="after")
    def _network_can_be_built(self) -> Self:
        self.check(self.network, self.codec.empty())
        return self

    @model_validator(mode="after")
    def _codec_takes_its_settings(self) -> Self:
        for field in _OF_MEANING:
            if self.codec.type != "meaning" and getattr(self, field) != GeneratorJob.model_fields[field].default:
                raise ValueError(f"{field}: is of the codec of type meaning, not of {self.codec.type}; leave it out")
        return self


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
    answering_steps: int = Field(13900, ge=1)
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
    job: Annotated[GeneratorJob | JudgeJob | AblationJob, Field(discriminator="type")]


def pretrain(config: PretrainConfig) -> None:
    """Train, measure and publish."""
    quiet_libraries()
    progress = Progress()
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    job = config.job
    fresh, result = folder / "checkpoint", "quality.json"
    match job:
        case GeneratorJob():
            quality = _generator(job, config.seed, folder, fresh, progress)
        case JudgeJob():
            quality = _judge(job, config.seed, folder, fresh, progress)
        case AblationJob():
            fresh, result = folder / "ablation", "table.json"
            fresh.mkdir(exist_ok=True)
            quality = ablate(job, config.seed, folder, fresh, progress)
            Console(width=120).print(show(quality))
    atomic_write_text(fresh / result, json.dumps(quality, indent=2) + "\n")
    atomic_write_text(fresh / "pretrain.yaml", f"seed: {config.seed}\n{dump(config.job)}")
    shutil.copytree(fresh, config.publish, dirs_exist_ok=True)
    progress.say(config.publish if isinstance(job, AblationJob) else f"{config.publish}: {json.dumps(quality)}")


def _generator(job: GeneratorJob, seed: int, folder: Path, out: Path, progress: Progress) -> dict:
    generator = job.new_generator(job.network, seed, job.codec.build(seed))
    codec = generator.codec
    match job.codec:
        case MeaningCodec():
            _teach_meaning(job, codec, seed, folder, progress)
        case VAECodec():
            teach_vae(job.codec, codec, job.optimisation, seed, folder, progress)
    codec.requires_grad_(False)
    train_flow(job, generator, gallery_of(codec, job.pictures, seed, progress, job.weights), seed, folder, progress)
    generator.save_pretrained(out)
    return measured(NativeGenerator.from_pretrained(out))


def _teach_meaning(job: GeneratorJob, codec: Codec, seed: int, folder: Path, progress: Progress) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DenseHead(codec.config.channels, SHAPE_CLASSES, COLOUR_CLASSES)

    def codec_at(step: int) -> Tensor:
        images, truths = dense_targets([clean(scene) for scene in scenes_at(seed, "codec", step)])
        loss, latents = codec_loss(codec, to_pixels(images), sample_key(seed, "codec noise", step))
        return loss + job.meaning * dense_loss(head, latents.flatten(2).mT, *truths)

    def decoder_at(step: int) -> Tensor:
        pixels = to_pixels(render(scenes_at(seed, "decoder", step)))
        return codec_loss(codec, pixels, sample_key(seed, "decoder noise", step), most_noise=0.1)[0]

    slow = job.optimisation.model_copy(update={"lr": job.codec_lr})
    parts = {"codec": codec, "head": head}
    run_task("codec", codec_at, parts, job.codec_steps, job.codec_steps // 2, slow, folder, progress)
    codec.encoder.requires_grad_(False)
    decoder = {"decoder": codec.decoder}
    run_task("decoder", decoder_at, decoder, job.decoder_steps, job.decoder_steps // 2, slow, folder, progress)


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

    with told("job"):
        codec = load_codec(job.painter)

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
        run_task(task, loss_at, modules, steps, steps // 3, job.optimisation, folder, progress)

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


def repainted(codec: Autoencoder, pixels: Tensor, share: float, key: int, most_noise: float = 0.3) -> Tensor:
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
    related = [
        (query.prompt.relation, r)
        for found, row in zip(asked, right, strict=True)
        for query, r in zip(found, row, strict=True)
        if query.kind == "relation"
    ]
    return {
        "questions": float(np.mean(flat)),
        "whole_prompt_question": float(np.mean([row[0] for row in right])),
        "verdict": float(np.mean(verdicts)),
        "left_or_right": float(np.mean([r for told, r in related if told in ("left of", "right of")])),
        "above_or_below": float(np.mean([r for told, r in related if told in ("above", "below")])),
        "matching": float(matched.mean()),
        "images": pictures,
        "asked": len(flat),
    }

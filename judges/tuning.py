"""Tuning the model of a judge to a person's verdicts: LoRA (2106.09685) by TRL, on a BLIP-2 or a chat model.

A verdict says something about the answers to yes/no questions, and these are taught in one of two ways.

`sft` is the language-modelling loss on the answer, with which BLIP-2 is fine-tuned for visual question answering
(2301.12597, section 4.3). An answer is one token, and its probability is summed over its spellings, as the judge sums
it: what is minimised is the cross-entropy of what the judge reads. Where people disagree, the target is the share of
them that says yes.

`dpo` is Direct Preference Optimization (2305.18290, equation 7), for chat models: of yes and no the one that most
people say is chosen, the other rejected. Where they are torn there is nothing to prefer, and the question is left out.

The image encoder stays as it is and the language model is tuned; for visual question answering the paper has it the
other way round. Dropout is off and the order of the lessons is keyed by seed and epoch, so that a step is a function of
its number, and a resumed training ends where an uninterrupted one does.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from judges.base import Question
from judges.blip2 import Blip2VQA, InstructBlipVQA
from judges.chat import ChatVQA, Talk
from judges.replies import NoAnswer, form_of, spelling_ids, spellings, told

Tunable = Blip2VQA | ChatVQA
OnStep = Callable[[int, int, float], None]

_TARGETS = (
    r".*(qformer\..*attention\.(query|value)|language_projection|language_model\..*\.(q|v|q_proj|v_proj|qkv_proj))"
)
"""The layers that get an adapter: queries and values of the Q-Former and the language model, and what is between them.

As a pattern, which peft writes as it is; names it keeps in a set, in another order each time.
"""
_ANSWERS = ("yes", "no")


class Stopped(Exception):
    """Training stopped because it was asked to. A checkpoint stands; the same call goes on from it."""


@dataclass(frozen=True)
class Tuning:
    """How a judge is tuned: AdamW, gradients clipped to norm 1, a learning rate that falls linearly to 0.

    Attributes:
        rank: of the adapter, whose product is scaled by 2 (`alpha` is twice the rank).
        batch: questions a step.
        beta: of DPO: how strongly it is held to the untuned model.
        save_steps: a checkpoint every so many steps.
    """

    method: Literal["sft", "dpo"]
    rank: int
    epochs: int
    batch: int
    learning_rate: float
    beta: float
    seed: int
    save_steps: int


@dataclass(frozen=True)
class Lesson:
    """A question about a picture, uint8 (H, W, 3), and the probability `target` that the expected answer is right."""

    look: Callable[[], np.ndarray]
    question: Question
    target: float


def taught(prompt: str, questions: Sequence[Question], share: float) -> list[tuple[Question, float]]:
    """What a verdict on a picture says about the judge's questions: each with the probability of its expected answer.

    `share` is that of the people who say that the picture follows the prompt. Then all the expected answers are right.
    One that does not follow lacks nobody knows which part, so that a no answers questions on the whole prompt only:
    all questions, where all hold the prompt word for word, otherwise the first if it does, or the only one there is.
    """
    known = [number for number, question in enumerate(questions) if _is_closed(question)]
    whole = range(_on_the_whole(prompt, questions))
    return [(questions[number], share) for number in known if number in whole or share > 0.5]


def check(vqa: object) -> None:
    """Raises ValueError for a model that cannot be tuned, naming the field of its settings."""
    if not isinstance(vqa, Blip2VQA | ChatVQA) or isinstance(vqa, InstructBlipVQA):
        raise ValueError(f"checkpoint: nobody knows how to tune {type(vqa).__name__}; take a BLIP-2 or a chat model")
    if isinstance(vqa, ChatVQA) and vqa.asking.reasoning:
        raise ValueError("reasoning: answers are taught without thoughts before them; set it to 0")
    if not any(re.fullmatch(_TARGETS, name) for name, _ in vqa.model.named_modules()):
        raise ValueError(f"checkpoint: no layer of a {vqa.model.config.model_type} is known that could be tuned")
    try:
        answer_ids(vqa)
    except NoAnswer as reason:
        raise ValueError(f"checkpoint: {reason}") from None


def tune(
    vqa: Tunable,
    lessons: Sequence[Lesson],
    settings: Tuning,
    folder: Path,
    on_step: OnStep = lambda step, steps, loss: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PeftModel:
    """Teach the model of `vqa`, on the device it is on. It is of no use as it was afterwards.

    Args:
        lessons: on yes/no questions that `vqa` can answer; for `dpo` none of them with the target 0.5.
        folder: for checkpoints alone; where one stands, training goes on from it.
        on_step: called after each step with its number, the number of steps, and the loss in nats.

    Raises:
        Stopped: `should_stop` said so after a step, which is in a checkpoint.
        ValueError: `vqa` cannot be tuned (see `check`), or not by this method.
        FloatingPointError: the loss is no finite number.
    """
    check(vqa)
    if settings.method == "dpo" and not isinstance(vqa, ChatVQA):
        raise ValueError("method: trl's dpo asks for a chat model; tune a BLIP-2 by sft")
    conductor = _Conductor(on_step, should_stop)
    make = {"sft": _answering, "dpo": _preferring}[settings.method]
    shown = Dataset.from_dict({"lesson": _order(len(lessons), settings)})
    with warnings.catch_warnings():
        # peft and trl ask by a name that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        trainer = make(vqa, lessons, shown, settings, folder, conductor)
        trainer.remove_callback(PrinterCallback)
        # It would write the tokenizer's special tokens into the model's config.
        trainer.processing_class = None
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    if conductor.stopped:
        raise Stopped
    return trainer.model


def step_count(lessons: int, settings: Tuning) -> int:
    """Optimiser steps on so many lessons."""
    return settings.epochs * max(1, round(lessons / settings.batch))


def steps_done(folder: Path) -> int:
    """How many steps the checkpoint in `folder` has behind it; 0 where there is none."""
    return int(Path(_last_checkpoint(folder) or "-0").name.rpartition("-")[2])


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in peft's format."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def save_merged(vqa: Tunable, model: PeftModel, folder: Path) -> None:
    """Write the tuned model as a checkpoint of its own, with all that reads pictures and text for it."""
    parts = (vqa.processor,) if isinstance(vqa, ChatVQA) else (vqa.tokenizer, vqa.image_processor)
    for part in (model.merge_and_unload(safe_merge=True), *parts):
        part.save_pretrained(folder)


def blip2_inputs(vqa: Blip2VQA, images: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Tensor]:
    """What transformers' BLIP-2 is fed to answer one question about each image.

    Padded on the left: the first token of the answer comes after the last position.
    """
    config = vqa.model.config
    shown = [config.image_token_index] * config.num_query_tokens
    given = vqa.tokenizer([vqa.template.format(question.text) for question in questions]).input_ids
    inputs = vqa.tokenizer.pad({"input_ids": [shown + ids for ids in given]}, padding_side="left", return_tensors="pt")
    inputs["pixel_values"] = vqa.image_processor(list(images), return_tensors="pt").pixel_values.to(vqa.model.dtype)
    if vqa.seq2seq:
        inputs["decoder_input_ids"] = torch.full((len(given), 1), config.text_config.decoder_start_token_id)
    return dict(inputs)


def chat_inputs(vqa: ChatVQA, images: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Tensor]:
    """What a chat model is fed to answer one question about each image, padded on the left."""
    talks = [_talk(vqa, image, question) for image, question in zip(images, questions, strict=True)]
    return dict(vqa.inputs(talks).to(vqa.model.dtype))


def answer_ids(vqa: Tunable) -> tuple[list[int], list[int]]:
    """The tokens that spell yes, and those that spell no. Raises ValueError where an answer takes several tokens."""
    if isinstance(vqa, ChatVQA):
        listed = spelling_ids(vqa.tokenizer.get_vocab(), _ANSWERS)
        yes = set(spelling_ids(vqa.tokenizer.get_vocab(), _ANSWERS[:1]))
        return [token for token in listed if token in yes], [token for token in listed if token not in yes]

    def encode(text: str) -> Sequence[int]:
        return vqa.tokenizer(text, add_special_tokens=False).input_ids

    found = [spellings(answer, encode, vqa.tokenizer.unk_token_id) for answer in _ANSWERS]
    if any(len(ids) != 1 for several in found for ids in several):
        raise ValueError(
            "checkpoint: its tokenizer writes yes or no in several tokens, and one is taught; take another"
        )
    yes, no = ([ids[0] for ids in several] for several in found)
    return yes, no


def answering_loss(logits: Tensor, target: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """Mean cross-entropy, in nats, of an answer's token: logits (R, V), target (R,) the probability of yes."""
    log_p = logits.float().log_softmax(-1)
    log_yes, log_no = (log_p[:, list(ids)].logsumexp(-1) for ids in (yes, no))
    return -(target * log_yes + (1 - target) * log_no).mean()


class _AnswerTrainer(SFTTrainer):
    """trl's trainer on batches of inputs and the probability of yes."""

    def __init__(self, answers: tuple[list[int], list[int]], **settings: Any):
        super().__init__(**settings)
        self.answers = answers

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        target = inputs.pop("target")
        logits = model.eval()(**inputs, use_cache=False).logits[:, -1]  # eval: without dropout
        return answering_loss(logits, target, *self.answers)


class _PreferenceTrainer(DPOTrainer):
    """trl's trainer without the dropout of functions, which its own switch does not reach."""

    def compute_loss(self, model: nn.Module, *args: Any, **settings: Any) -> Any:
        return super().compute_loss(model.eval(), *args, **settings)


class _Conductor(TrainerCallback):
    """Reports, and stops after a save."""

    def __init__(self, on_step: OnStep, should_stop: Callable[[], bool]):
        self.on_step, self.should_stop, self.stopped = on_step, should_stop, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps and self.should_stop():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate")
        self.on_step(state.global_step, state.max_steps, logs["loss"])


def _answering(
    vqa: Tunable, lessons: Sequence[Lesson], data: Dataset, settings: Tuning, folder: Path, conductor: _Conductor
) -> SFTTrainer:
    feed = chat_inputs if isinstance(vqa, ChatVQA) else blip2_inputs

    def collate(rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        batch = [lessons[row["lesson"]] for row in rows]
        inputs = feed(vqa, [lesson.look() for lesson in batch], [lesson.question for lesson in batch])
        expects_yes = [lesson.question.expected.casefold() == "yes" for lesson in batch]
        target = [one.target if yes else 1 - one.target for one, yes in zip(batch, expects_yes, strict=True)]
        return {**inputs, "target": torch.tensor(target)}

    return _AnswerTrainer(
        answers=answer_ids(vqa),
        model=vqa.model,
        args=_arguments(SFTConfig, settings, folder, vqa, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=collate,
        train_dataset=data,
        processing_class=vqa.tokenizer,
        callbacks=[conductor],
        peft_config=_adapter(settings),
    )


def _preferring(
    vqa: ChatVQA, lessons: Sequence[Lesson], data: Dataset, settings: Tuning, folder: Path, conductor: _Conductor
) -> DPOTrainer:
    def rows(columns: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [_preference(vqa, lessons[number]) for number in columns["lesson"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return _PreferenceTrainer(
        model=vqa.model,
        args=_arguments(DPOConfig, settings, folder, vqa, beta=settings.beta, max_length=None),
        train_dataset=data.with_transform(rows),
        processing_class=vqa.processor,
        callbacks=[conductor],
        peft_config=_adapter(settings),
    )


def _preference(vqa: ChatVQA, lesson: Lesson) -> dict[str, Any]:
    """A row as trl's DPO reads it."""
    question = lesson.question
    other = next(choice for choice in question.choices if choice != question.expected)
    chosen, rejected = (question.expected, other) if lesson.target > 0.5 else (other, question.expected)
    talk = _talk(vqa, lesson.look(), question)
    return {
        "images": list(talk.pictures),
        "prompt": talk.messages(lambda picture: {"type": "image"}),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chat_template_kwargs": dict(vqa.asking.chat_template_kwargs),
    }


def _talk(vqa: ChatVQA, image: np.ndarray, question: Question) -> Talk:
    return Talk([Image.fromarray(image)], (told(form_of(question), vqa.template, 0),))


def _is_closed(question: Question) -> bool:
    return sorted(choice.casefold() for choice in question.choices) == sorted(_ANSWERS)


def _on_the_whole(prompt: str, questions: Sequence[Question]) -> int:
    """How many questions, from the first, are on the whole prompt."""
    words = prompt.casefold().strip(" .!?")
    holding = [words in question.text.casefold() for question in questions]
    return len(questions) if all(holding) or len(questions) == 1 else int(holding[0])


def _order(lessons: int, settings: Tuning) -> list[int]:
    """What is shown in turn, in full batches: epoch after epoch a permutation keyed by seed and epoch."""
    count = step_count(lessons, settings) * settings.batch
    turns = [
        np.random.default_rng([settings.seed, turn]).permutation(lessons) for turn in range(math.ceil(count / lessons))
    ]
    return np.concatenate(turns)[:count].tolist()


def _adapter(settings: Tuning) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=_TARGETS)


def _arguments(kind: type, settings: Tuning, folder: Path, vqa: Tunable, **more: Any) -> Any:
    on_cpu = vqa.model.device.type == "cpu"
    # trl turns checkpointing of activations on; transformers renamed the switch after 5.17.
    switches = ("activation_checkpointing", "gradient_checkpointing")
    known = {field.name for field in fields(kind)}
    return kind(
        **{next(switch for switch in switches if switch in known): False},
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cache=True,  # it is written into the checkpoint's config, for those who generate
        use_cpu=on_cpu,
        bf16=False,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **more,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The latest whole checkpoint; the trainer writes its own state last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None

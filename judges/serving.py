"""A checkpoint behind vLLM's server: what the server is told, and how it is asked to answer as it does in process.

A BLIP-2 has no chat template. It gets one that passes the question through, and the token that texts begin with has to
be asked for in every request.
"""

import json
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from judges.base import TEMPLATE as BLIP2
from judges.chat import chat_processor
from judges.replies import MOST_LISTED, TEMPLATE, NoAnswer, spellings, tokens_of
from judges.vllm_engine import adds_special, is_blip2

PLAIN = Path(__file__).with_name("templates") / "plain.jinja"
LABELS = ("yes", "no", "Yes", "No", *string.digits, *string.ascii_uppercase)
"""What may be answered with one token; see `replies.labels_of`."""


@dataclass(frozen=True)
class Served:
    """A checkpoint as vLLM serves it.

    Attributes:
        arguments: for the server.
        template, token_ids, most_images, extra_body: for `ServerVQA`.
    """

    arguments: tuple[str, ...]
    template: str
    token_ids: dict[str, tuple[int, ...]]
    most_images: int
    extra_body: dict[str, Any] = field(default_factory=dict)


def served(checkpoint: str | Path, most_images: int) -> Served:
    """How a local folder or a hub id is served, for at most so many pictures a question.

    Raises:
        ValueError: vLLM does not run it, or it has no chat template.
    """
    blip2 = is_blip2(checkpoint)
    images = 1 if blip2 else most_images
    arguments = [f"--limit-mm-per-prompt={json.dumps({'image': images})}"]
    if AutoConfig.from_pretrained(checkpoint).dtype == torch.float32:
        arguments.append("--dtype=float32")  # of itself vLLM would halve it
    if blip2:
        arguments.append(f"--chat-template={PLAIN}")
        ids = _words(AutoTokenizer.from_pretrained(checkpoint))
        return Served(tuple(arguments), BLIP2.format("{question}"), ids, images, {"add_special_tokens": True})
    processor = chat_processor(checkpoint)
    found = tokens_of(processor.tokenizer.get_vocab(), LABELS)
    ids = {label: tuple(tokens[:MOST_LISTED]) for label, tokens in found.items() if tokens}
    return Served(tuple(arguments), TEMPLATE, ids, images, {"add_special_tokens": adds_special(processor)})


def _words(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """The tokens that `Blip2VQA` reads for each label, if one is enough."""
    found = {}
    for label in LABELS:
        try:
            spelled = spellings(
                label, lambda text: tokenizer(text, add_special_tokens=False).input_ids, tokenizer.unk_token_id
            )
        except NoAnswer:
            continue
        found[label] = tuple(ids[0] for ids in spelled if len(ids) == 1)
    return {label: tokens for label, tokens in found.items() if tokens}

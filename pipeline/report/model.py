"""The card of an exported model: what it is, what it learned from, how far to believe it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from models.adapters import FAMILIES
from pipeline.judging import is_hub_id
from pipeline.report import words
from pipeline.report.choices import Row
from pipeline.report.pages import page
from pipeline.report.watched import watched

_NO_LOADER = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""Pipelines of networks for which diffusers has no adapters."""


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
        config: of the run.
        pipeline: the class of the diffusers pipeline that was tuned; None for a generator of ours.
        comfyui: whether ComfyUI has this network.
        summary: the run's `summary.json`; None where nothing was measured.
        rows: of `evaluate`, without pictures.
        prompts: of the columns of the sample grid.
        signals: `finetune/signals.json`; None where nobody watched.
        versions: of the packages that tuned it.
    """

    config: Any
    format: str
    pipeline: str | None
    comfyui: bool
    summary: Mapping[str, Any] | None
    rows: Sequence[Row]
    prompts: tuple[str, ...]
    signals: Mapping[str, Any] | None
    versions: Mapping[str, str]

    @property
    def base(self) -> str:
        """The hub id, or the name of a folder without the way to it."""
        return named(self.config.generator.checkpoint)

    @property
    def on_hub(self) -> bool:
        return is_hub_id(self.base)

    @property
    def loads_itself(self) -> bool:
        """Whether the pipeline reads a LoRA."""
        return self.pipeline in FAMILIES and self.pipeline not in _NO_LOADER

    @property
    def unguided(self) -> bool:
        """Whether a guidance of 1 was set, rather than the family's own left."""
        guidance = self.config.generator.guidance
        return guidance is not None and guidance.scale == 1

    @property
    def headline(self) -> words.Headline:
        return words.headline(self.summary["generator"], words.paired_change(self.rows))

    @property
    def watched(self) -> str | None:
        return watched(self.signals).said.replace("this page calls", "this card calls") if self.signals else None

    @property
    def settings(self) -> str:
        """What decided the result, as YAML, folders without the way to them."""
        sections = ("generator", "prompts", "judge", "reward", "finetune")
        chosen = {}
        for name in sections:
            section = getattr(self.config, name)
            changed = section.model_dump(mode="json", exclude_defaults=True)
            chosen[name] = _with_types(section.model_dump(mode="json"), changed)
        return yaml.safe_dump(_without_ways(chosen), sort_keys=False, allow_unicode=True, width=110).rstrip()


def named(checkpoint: str) -> str:
    """A hub id as it is; of a folder or file its last name."""
    return checkpoint if is_hub_id(checkpoint) and not Path(checkpoint).exists() else Path(checkpoint).name


def card(shown: Card) -> str:
    """The card as Markdown, with the head that the hub reads."""
    return page("model.md.j2", view=shown, metrics=shown.summary)


def _with_types(full: Any, changed: Any) -> Any:
    """`changed` with the `type` of each of its sections, default or not."""
    if not isinstance(full, dict) or not isinstance(changed, dict):
        return changed
    return {
        name: _with_types(full[name], changed.get(name, full[name]))
        for name in full
        if name in changed or name == "type"
    }


def _without_ways(value: Any) -> Any:
    match value:
        case dict():
            return {name: _without_ways(each) for name, each in value.items()}
        case list():
            return [_without_ways(each) for each in value]
        case str() if value.startswith(("/", "~", ".")):
            return Path(value).name
    return value

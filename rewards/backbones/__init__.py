"""Reward models: one file a backbone, behind one contract (`base.RewardModel`)."""

from pathlib import Path

from rewards.backbones.base import Parts, RewardModel, filled, saved_settings
from rewards.backbones.chat import ChatReward
from rewards.backbones.clip import ClipReward
from rewards.backbones.imagereward import ImageReward
from rewards.backbones.latent import LatentReward
from rewards.backbones.qformer import QFormerReward
from rewards.backbones.trainable import Frozen, Full, Lora, Trained, checkpointed, make_trainable, merge
from rewards.backbones.vqa import VQAReward

BACKBONES: dict[str, type[RewardModel]] = {
    found.kind: found for found in (QFormerReward, VQAReward, ClipReward, ImageReward, ChatReward, LatentReward)
}

__all__ = [
    "BACKBONES",
    "ChatReward",
    "ClipReward",
    "Frozen",
    "Full",
    "ImageReward",
    "LatentReward",
    "Lora",
    "Parts",
    "QFormerReward",
    "RewardModel",
    "Trained",
    "VQAReward",
    "checkpointed",
    "filled",
    "load_model",
    "make_trainable",
    "merge",
]


def load_model(folder: str | Path) -> RewardModel:
    """The reward model of any backbone that `save_pretrained` wrote. Raises FileNotFoundError where there is none."""
    return BACKBONES[saved_settings(folder)["type"]].from_pretrained(folder)

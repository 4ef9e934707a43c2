"""Reinforcement learning of a generator: an algorithm-blind trainer, and one file per algorithm."""

from pipeline.rl.algorithm import Algorithm
from pipeline.rl.awm import AWM, AWMConfig
from pipeline.rl.d3po import D3PO, D3POConfig
from pipeline.rl.ddpo import DDPO, DDPOConfig
from pipeline.rl.dpo import DPO, DPOConfig
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.nft import NFT, NFTConfig
from pipeline.rl.ppo import PPO, PPOConfig
from pipeline.rl.preferred import Preferences
from pipeline.rl.raft import RAFT, RAFTConfig
from pipeline.rl.refl import DirectReward, DRaFTConfig, ReFLConfig

__all__ = ["AlgorithmConfig", "algorithm_of"]

AlgorithmConfig = (
    GRPOConfig
    | PPOConfig
    | DDPOConfig
    | NFTConfig
    | AWMConfig
    | DPOConfig
    | D3POConfig
    | RAFTConfig
    | ReFLConfig
    | DRaFTConfig
)

_ALGORITHMS = {
    GRPOConfig: GRPO,
    PPOConfig: PPO,
    DDPOConfig: DDPO,
    NFTConfig: NFT,
    AWMConfig: AWM,
    DPOConfig: DPO,
    D3POConfig: D3PO,
    RAFTConfig: RAFT,
    ReFLConfig: DirectReward,
    DRaFTConfig: DirectReward,
}


def algorithm_of(config: AlgorithmConfig, preferences: Preferences | None = None) -> Algorithm:
    """The algorithm that a configuration is of; an off-line one learns from `preferences`."""
    kind = _ALGORITHMS[type(config)]
    return kind(config, preferences) if config.offline else kind(config)

"""Reinforcement learning of a generator: an algorithm-blind trainer, and one file per algorithm."""

from pipeline.rl.algorithm import Algorithm
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.nft import NFT, NFTConfig

__all__ = ["AlgorithmConfig", "algorithm_of"]

AlgorithmConfig = GRPOConfig | NFTConfig

_ALGORITHMS = {GRPOConfig: GRPO, NFTConfig: NFT}


def algorithm_of(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a configuration is of."""
    return _ALGORITHMS[type(config)](config)

"""What is learned: preferences, reward models, and how far to believe them.

Names are imported when they are first used: settings and finished runs do not wait for torch and transformers.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["metrics"],
    submod_attrs={
        "backbones": [
            "BACKBONES",
            "ChatReward",
            "ClipReward",
            "Frozen",
            "Full",
            "ImageReward",
            "LatentReward",
            "Lora",
            "QFormerReward",
            "RewardModel",
            "VQAReward",
            "load_model",
        ],
        "mixture": ["Mixture", "Term", "mixture_of"],
        "normalising": ["Normaliser"],
        "reward": [
            "GoldReward",
            "JudgeReward",
            "ModelReward",
            "Reading",
            "Reward",
            "Rewards",
            "load_reward",
        ],
        "rules": ["RuleReward"],
    },
)

"""What is learned: preferences, reward models, and how far to believe them."""

from rewards.reward import JudgeReward, ModelReward, Reward, Rewards, load_reward

__all__ = ["JudgeReward", "ModelReward", "Reward", "Rewards", "load_reward"]

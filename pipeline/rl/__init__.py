"""Reinforcement learning of a generator: an algorithm-blind trainer, and one file per algorithm."""

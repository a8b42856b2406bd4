"""Reinforcement learning and on-policy distillation: what to roll out, how to score it, how to learn from it."""

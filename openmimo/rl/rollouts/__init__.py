"""Rollouts: problems to samples, in this process, in others, or on Ray."""

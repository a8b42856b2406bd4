"""Evaluation of models that hear and speak."""

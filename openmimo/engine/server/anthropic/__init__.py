"""Anthropic's Messages API: schemas, conversions, errors and routes."""

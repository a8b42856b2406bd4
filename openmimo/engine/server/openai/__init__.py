"""The OpenAI API: schemas, conversions and routes."""

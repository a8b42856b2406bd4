"""Conversations: their template, the parser of replies, training rows."""

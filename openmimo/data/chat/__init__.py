"""Conversations: chat templates, the parser of replies, and training rows."""

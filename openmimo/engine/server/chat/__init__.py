"""Chats in every wire format: the prompt, the constraints on tool calls, and the parts of the reply."""

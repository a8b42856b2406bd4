"""Calls of library functions on model-written text, in killable child processes that are jailed if possible."""

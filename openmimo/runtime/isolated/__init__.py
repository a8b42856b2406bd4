"""Calls of library functions on text that a model wrote: in a killable child process, jailed where a jail holds."""

"""Errors that a user can fix. The command line prints them as one paragraph without a traceback, and exits with 1."""


class UserError(Exception):
    """Invalid user input. The message says what is wrong, where (file, key, line), and how to fix it."""


class ConfigError(UserError):
    """A configuration is unknown, contradictory or impossible."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(UserError):
    """A data source cannot be read, or contains unusable data."""


class DivergedError(UserError):
    """A run cannot continue: its loss, gradients or weights are not finite."""

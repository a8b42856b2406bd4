"""The errors that a user can mend. The command line prints them as one paragraph, without a traceback, and exits 1."""


class UserError(Exception):
    """Something the user gave is wrong. The message names the thing, the place (file, key, line) and the mend."""


class ConfigError(UserError):
    """A configuration is unknown, contradictory or impossible."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(UserError):
    """A data source cannot be read, or holds something that cannot be trained on."""


class DivergedError(UserError):
    """A run cannot go on: its loss, gradients or weights are not finite."""

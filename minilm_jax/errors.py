"""Errors a user can act on: the command line prints their sentence and exits with code 2."""


class UserError(Exception):
    """Something the user can mend: the message names field or file, value and the way out."""


class ConfigError(UserError):
    """A setting is unknown, out of range or does not fit another one."""


class CheckpointError(UserError):
    """A model file or folder is missing, broken or not what it claims to be."""


class RestoreError(CheckpointError):
    """The checkpoint of a run cannot be read, or is not one of this run's state."""


class MissingHeadError(CheckpointError):
    """A model file or folder holds no head of the kind that was asked for."""


class DataError(UserError):
    """Text, a tokenizer or a corpus is missing, broken or does not fit the model."""


def first_line(error: Exception) -> str:
    """Returns what another library's error says, at most 300 characters of its first line.

    The name of its class where it says nothing.
    """
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__

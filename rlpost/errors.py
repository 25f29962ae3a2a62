"""Errors for users, each with the exit code of the command line.

A message is one line: where, what is wrong, and what to do about it.
"""


class RlpostError(Exception):
    """An error for the user: shown as one line without a traceback."""

    exit_code = 1


class UnexpectedError(RlpostError):
    """A bug, with its traceback in a file."""


class OutOfMemoryError(RlpostError):
    """The GPU or the machine is out of memory."""


class RecipeError(RlpostError):
    """The recipe or an override is wrong."""

    exit_code = 2


class DataError(RlpostError):
    """A data source is missing, empty or malformed."""

    exit_code = 3


class ModelError(RlpostError):
    """The model, adapter or tokenizer cannot be loaded or does not fit."""

    exit_code = 4


class DiskError(RlpostError):
    """Something could not be written or read back."""

    exit_code = 5


class RewardError(RlpostError):
    """A user's function failed: a reward, an environment, a loss or an advantage."""

    exit_code = 6


class RunInUseError(RlpostError):
    """Another process is writing to this run directory."""

    exit_code = 7


class EngineError(RlpostError):
    """Generation failed."""

    exit_code = 8


class RankError(RlpostError):
    """Another process of the run has ended or cannot be reached."""

    exit_code = 8


class Interrupted(RlpostError):
    """A signal asked us to stop; a checkpoint was written first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        """By the arguments that it was made with, so that other processes can raise it too."""
        return type(self), (str(self), self.exit_code - 128)


class DivergedError(RlpostError):
    """Training produced numbers that are not finite."""

    exit_code = 9

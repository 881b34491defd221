"""Errors that a person can act on.

Every error that BitGen raises on purpose derives from `BitGenError`. Its message says what was
received and what was expected; `remedy` says what to do. The command line prints both, without a
traceback, and leaves with `exit_code`.
"""

from __future__ import annotations


class BitGenError(Exception):
    """Something failed. The command line prints the message and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n{self.remedy}"


class InputError(BitGenError):
    """What the user gave cannot be used: an option, a path, a file's content."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration value, or a combination of values, that no model or training can have."""


class DatasetError(InputError):
    """A data set that cannot be read, or holds nothing to train on."""


class ImageError(InputError):
    """One file that is not a picture BitGen can decode."""


class ModelFileError(InputError):
    """A run or an artifact that is missing, damaged, foreign, or of a newer format."""


class OutputExistsError(InputError):
    """The output is there already and may not be overwritten without being asked to."""


class DiskFullError(InputError):
    """No room is left where an output was to be written; what was there before is intact."""


class DownloadError(BitGenError):
    """A download did not arrive whole."""


class TrainingError(BitGenError):
    """Training cannot go on (loss not finite, too many images that cannot be read)."""


class Interrupted(BitGenError):
    """A signal asked training to stop; what was learnt is saved."""

    exit_code = 130

"""The one table from an exception to what a person reads and the exit code."""

from __future__ import annotations

from dataclasses import dataclass

from bitgen.errors import BitGenError
from bitgen.files import DISK_FULL

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# Not every system knows quotas.


@dataclass(frozen=True)
class Failure:
    """A message without traceback, what to do about it, and the exit code."""

    message: str
    remedy: str | None
    exit_code: int


def describe_failure(error: BaseException) -> Failure:
    """What to tell a person about `error`."""
    if isinstance(error, BitGenError):
        return Failure(error.message, error.remedy, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure("Interrupted.", None, EXIT_INTERRUPTED)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f" while writing {error.filename}" if error.filename else ""
        return Failure(
            f"The disk is full{place}.", "Make room, then run the command again.", EXIT_BAD_INPUT
        )
    if isinstance(error, OSError) and error.filename is not None:
        return Failure(f"{error.strerror}: {error.filename}", None, EXIT_BAD_INPUT)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(
            "The memory is not enough.",
            "Take a smaller --batch_size (in training with --grad_accumulation) or model.",
            EXIT_FAILED,
        )
    if isinstance(error, RuntimeError) and str(error) == "Numpy is not available":
        return Failure(
            "This torch was built for NumPy 1 and cannot use the NumPy 2 that is installed.",
            'Run: pip install "numpy<2", or install torch 2.3 or later.',
            EXIT_BAD_INPUT,
        )
    first_line = next(iter(str(error).splitlines()), "")
    return Failure(
        f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__,
        "BitGen did not expect this. Run the command again with --debug to see where it happened.",
        EXIT_FAILED,
    )

"""The native backend: the C++ engine on the CPU. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitgen.inference.backend import NativeUnavailable


def open_native(path: Path, device: str, packed: bool, threads: int | None) -> Any:
    raise NativeUnavailable("The native engine is not there.")

"""Which device a name means on this machine, and modules that are on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitgen.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device to use; `auto` takes CUDA, then MPS, then the CPU.

    Raises ConfigError where the named device is not there.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "Device cuda was asked for, but torch sees no CUDA device.",
            remedy="Use --device auto, or install a torch built for CUDA and its driver.",
        )
    if device.type == "mps" and not mps:
        raise ConfigError(
            "Device mps was asked for, but torch sees no Apple GPU.", remedy="Use --device auto."
        )
    return device


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made here have shapes and no numbers (device meta): to assign others, or to count."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Leaves out `torch.nn.init`, for which torch 2.15 would import its compiler on device meta."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)

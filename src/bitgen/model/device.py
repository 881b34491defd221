"""Which device a name means on this machine."""

from __future__ import annotations

import torch

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

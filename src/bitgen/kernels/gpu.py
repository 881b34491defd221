"""Whether the Triton kernels can be used on a device: asked once, by trying, and never assumed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import warnings
from types import ModuleType

import torch

SWITCH = "BITGEN_TRITON"
"""Variable that turns the kernels off where it is 0."""

_OLDEST_CAPABILITY = (8, 0)  # int8 tensor cores as Triton uses them
_OLDEST_TRITON = 3  # the first to join tensors


def triton_release() -> int:
    """Major release of the installed Triton; 0 = there is none."""
    try:
        return int(importlib.metadata.version("triton").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def gpu_kernels(device: torch.device) -> ModuleType | None:
    """`bitgen.kernels.triton_matmul` where its kernels work on `device`; else None.

    None means that packed layers multiply in PyTorch, with the same answers. The first call for a
    CUDA device compiles the kernels and compares what they answer with PyTorch; a kernel that
    fails, or answers anything else, is not used, and a warning says why.
    """
    return None if device.type != "cuda" else _checked_kernels(device)[0]


def describe_gpu_kernels(device: torch.device) -> str:
    """One line for people: what multiplies packed weights on `device`, and why."""
    if device.type != "cuda":
        return f"PyTorch (device {device.type})"
    kernels, reason = _checked_kernels(device)
    return "Triton" if kernels is not None else f"PyTorch ({reason})"


@functools.cache
def _checked_kernels(device: torch.device) -> tuple[ModuleType | None, str]:
    reason = _obstacle(device)
    if reason:
        return None, reason
    try:
        kernels = importlib.import_module("bitgen.kernels.triton_matmul")
        with torch.inference_mode():
            problems: list[str] = kernels.wrong_results(device)
    # Triton needs a C compiler, a driver and a GPU that it knows, and says so by many errors.
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"Triton failed: {type(error).__name__}: {first_line}"
    else:
        if not problems:
            return kernels, ""
        reason = f"Triton answers wrongly: {', '.join(problems)}"
    warnings.warn(
        f"{reason}. Packed layers multiply in PyTorch instead, with the same answers; set"
        f" {SWITCH}=0 to leave Triton out.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


def _obstacle(device: torch.device) -> str:
    """Why it is not even tried; empty if it is."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if triton_release() < _OLDEST_TRITON:
        return f"Triton {_OLDEST_TRITON} or later is not installed"
    if torch.version.hip is not None:
        return "AMD GPUs are not supported"
    if torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return ""

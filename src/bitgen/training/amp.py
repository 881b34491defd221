"""Mixed precision, the same from torch 2.2 to the newest.

`torch.amp` is used first; what it lacks (`GradScaler` before torch 2.3) is taken from
`torch.cuda.amp`. `make test-old-torch` runs this on torch 2.2.
"""

from __future__ import annotations

import contextlib
import platform
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bitgen.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Arm BF16).

    Read from the kernel's own list; systems without one count as no.
    """
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass; the weights that are trained stay float32.

    `auto` takes bfloat16 where the hardware computes it, float16 (with loss scaling) on older
    CUDA devices, else float32. Raises ConfigError for what the device, or this torch on it, cannot
    do.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _cuda_has_bf16() else torch.float16
        if device.type == "cpu" and cpu_has_bf16():
            return torch.bfloat16
        return torch.float32
    dtype = _DTYPES[name]
    if dtype == torch.float16 and device.type != "cuda":
        raise ConfigError(
            f"Precision fp16 needs loss scaling, which only CUDA has; the device is {device.type}.",
            remedy="Use --precision bf16 or fp32.",
        )
    if dtype == torch.bfloat16 and not _has_autocast(device):
        raise ConfigError(
            f"Torch {torch.__version__} has no mixed precision for the device {device.type}.",
            remedy="Use --precision fp32, or a newer torch.",
        )
    return dtype


def _has_autocast(device: torch.device) -> bool:
    try:
        torch.autocast(device.type, enabled=False)
    except RuntimeError:  # MPS before torch 2.5
        return False
    return True


def _cuda_has_bf16() -> bool:
    # is_bf16_supported() also answers yes where bfloat16 is emulated, which is slower than
    # float16; compute capability 8.0 (Ampere) is where the hardware has it.
    return torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The autocast region of a forward pass; does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    context: AbstractContextManager[Any] = torch.amp.autocast(device.type, dtype=dtype)
    return context


def make_grad_scaler(device: torch.device, dtype: torch.dtype) -> Any:
    """A GradScaler, enabled for float16 on CUDA and passing everything through elsewhere."""
    enabled = device.type == "cuda" and dtype == torch.float16
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)

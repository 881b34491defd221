"""What `bitgen info --system` shows: what runs products of packed weights on this machine, and why.

Without torch, whose version is read from its installation: the answer comes at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

from bitgen import __version__
from bitgen.kernels import library

# The first torch whose int8 product (torch._int_mm) works on a CPU.
_TORCH_WITH_INT8 = (2, 4)
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor in words, as far as the system tells."""
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_system() -> dict[str, Any]:
    """Processor, kernels and torch as JSON values."""
    kernels = library.describe()
    torch = _installed_version("torch")
    return {
        "bitgen": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "kernels": dataclasses.asdict(kernels),
        "torch": torch,
        "torch_int8": torch is not None and _version_numbers(torch) >= _TORCH_WITH_INT8,
    }


def system_rows() -> list[tuple[str, str]]:
    """The same for people."""
    found = describe_system()
    kernels = library.describe()
    if kernels.usable:
        product = f"C++, {kernels.kernels} ({kernels.reason})"
    else:
        fallback = "torch._int_mm" if found["torch_int8"] else "float32 products"
        product = f"PyTorch, {fallback}: {kernels.reason}"
    if found["torch"] is None:
        torch = "not installed"
    else:
        int8 = "with" if found["torch_int8"] else "without"
        torch = f"{found['torch']}, {int8} an int8 product of its own on the CPU"
    state = "not built"
    if kernels.built:
        state = f"{kernels.path}" + ("" if kernels.usable else " (not used)")
    rows = [
        ("bitgen", f"{found['bitgen']}, Python {found['python']}, {found['system']}"),
        ("cpu", found["cpu"]),
        ("packed products", product),
        ("library", state),
    ]
    if kernels.usable:
        rows += [
            ("instruction sets", ", ".join(kernels.cpu_features) or "none that a path is for"),
            ("paths that run here", ", ".join(kernels.usable_kernels)),
            ("threads", str(kernels.threads)),
        ]
    return [*rows, ("torch", torch)]


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])

"""Compiling a model's layers by torch.compile: one graph serves all layers that are alike.

Only whole layers in training are compiled. What they are given (lowered masks, rotary tables) is
made outside, so that a graph holds tensor operations alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bitgen.errors import ConfigError

FIRST_TORCH = (2, 5)
"""Before this release a graph holds the weights of its layer: every layer would be compiled."""

_WITHOUT = "Training without --compile needs none of this, and is only slower."


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError, with what to do, where torch.compile cannot work for this device."""
    if torch_version() < FIRST_TORCH:
        raise ConfigError(
            f"Compiling needs torch {'.'.join(map(str, FIRST_TORCH))} or later; this is"
            f" {torch.__version__}.",
            remedy=f"Install a newer torch. {_WITHOUT}",
        )
    if not torch_can_compile():
        raise ConfigError(
            f"torch {torch.__version__} cannot compile with Python {platform.python_version()} on"
            f" {platform.system()}.",
            remedy=_WITHOUT,
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "Compiling for CUDA needs Triton, which is not installed.",
            remedy=f"Install it (pip install triton). {_WITHOUT}",
        )
    compiler = cpp_compiler()
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"Compiling needs a C++ compiler; there is no {compiler}.",
            remedy="Install one (Debian, Ubuntu: apt-get install g++), or name yours in the"
            f" variable CXX. {_WITHOUT}",
        )


def torch_version() -> tuple[int, ...]:
    """Major and minor release of torch."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def torch_can_compile() -> bool:
    """Whether torch.compile knows this Python and this system at all."""
    try:
        torch.compile(lambda x: x)
    except RuntimeError:
        return False
    return True


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile calls."""
    return os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled when it is first called; a call raises ConfigError where that fails."""
    compiled = torch.compile(function)

    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ConfigError(
                f"torch.compile failed: {str(error).strip().splitlines()[0]}", remedy=_WITHOUT
            ) from error

    return call


def mark_sizes_dynamic(tensors: Iterable[torch.Tensor | None], width_last: bool = False) -> None:
    """Say that all sizes but the last may differ from call to call (and the last, unless a width).

    So one graph serves all lengths and batch sizes, whichever come first; a size of one still has a
    graph of its own.
    """
    for tensor in tensors:
        if tensor is not None:
            sizes = range(tensor.dim() - 1 if width_last else tensor.dim())
            torch._dynamo.maybe_mark_dynamic(tensor, list(sizes))

"""The integer products of int8 activations with ternary and with int8 weights.

With ternary weights, sums of at most `127 * K` are exact in int32 and, up to K = 132,104, in
float32 as well; with int8 weights they are in int32, up to K = 132,104. Every path gives the same
integers, so the choice among them changes no result.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def ternary_matmul_reference(x_MK: torch.Tensor, ternary_NK: torch.Tensor) -> torch.Tensor:
    """`x @ T.T` in int64: slow, for tests. int8 `[M, K]`, int8 `[N, K]` -> int64 `[M, N]`."""
    return x_MK.long() @ ternary_NK.long().T


# Torch 2.2 has no way to ask; nothing is compiled there (`bitgen.model.compilation`).
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)


@functools.cache
def _int8_matmul_works() -> bool:
    """Whether this torch multiplies int8 matrices on the CPU (torch 2.2 does not)."""
    try:
        ones = torch.ones(1, 4, dtype=torch.int8)
        return int(torch._int_mm(ones, ones.T)) == 4
    except RuntimeError:
        return False


# Of this processor; None: not measured yet. A variable, since a compiled graph can read no cache.
_is_int8_faster: bool | None = None


def int8_product_is_faster() -> bool:
    """Whether torch multiplies int8 matrices sooner than float32 ones on this CPU; measured once.

    Without instructions for int8 products (x86 before VNNI) torch 2.15 takes some 20 times as long.
    """
    global _is_int8_faster
    if _is_int8_faster is None:
        ones_NK = torch.ones(128, 128, dtype=torch.int8)
        _is_int8_faster = _int8_matmul_works() and _seconds(
            lambda: torch._int_mm(ones_NK, ones_NK.T)
        ) < _seconds(lambda: ones_NK.float() @ ones_NK.float().T)
    return _is_int8_faster


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """The shortest of a few runs: what else the machine does lengthens some of them."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return min(times)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A region in which a product has the dtype of its factors, also inside an autocast region."""
    try:
        context: AbstractContextManager[Any] = torch.autocast(device_type, enabled=False)
    except RuntimeError:  # this torch has no autocast for the device (MPS before torch 2.5)
        return contextlib.nullcontext()
    return context


def ternary_matmul(x_MK: torch.Tensor, ternary_NK: torch.Tensor) -> torch.Tensor:
    """`x @ T.T` by the fastest exact path of this device.

    Args:
        x_MK: int8 `[M, K]`, quantized activations.
        ternary_NK: int8 `[N, K]`, ternary weights.

    Returns:
        float32 `[M, N]`, whole numbers.
    """
    if _takes_int8(x_MK):
        return torch._int_mm(x_MK, ternary_NK.T).float()
    with without_autocast(x_MK.device.type):
        return x_MK.float() @ ternary_NK.float().T


def int8_matmul(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """`x @ W.T` by the fastest exact path of this device.

    Args:
        x_MK: int8 `[M, K]`, quantized activations.
        weight_NK: int8 `[N, K]`.

    Returns:
        float32 `[M, N]`: the int32 sums, each rounded once.
    """
    if _takes_int8(x_MK):
        return torch._int_mm(x_MK, weight_NK.T).float()
    # Float32 holds the sums of half a weight exactly: W = 16 * high + low, low in 0 ... 15.
    x_MK, high_NK, low_NK = x_MK.float(), (weight_NK >> 4).float(), (weight_NK & 15).float()
    with without_autocast(x_MK.device.type):
        return ((x_MK @ high_NK.T).int() * 16 + (x_MK @ low_NK.T).int()).float()


def _takes_int8(x_MK: torch.Tensor) -> bool:
    # Of one column torch 2.14 reads the transposed weights wrongly.
    if x_MK.device.type != "cpu" or x_MK.shape[-1] <= 1:
        return False
    if _is_compiling():  # a graph cannot measure; `BitGenModel.compile_layers` has
        return _is_int8_faster is not False
    return bool(x_MK.numel()) and int8_product_is_faster()

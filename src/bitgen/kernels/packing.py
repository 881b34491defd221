"""Two bits a ternary weight, four weights a byte.

Byte `j` of a row holds the weights `4j .. 4j+3`, the first in the lowest two bits, each stored as
`T + 1` (0, 1, 2). Rows whose width is not a multiple of four end in weights that stand for zero.
"""

from __future__ import annotations

import torch

WEIGHTS_PER_BYTE = 4


def packed_width(width: int) -> int:
    """Bytes that one row of `width` ternary weights takes."""
    return -(-width // WEIGHTS_PER_BYTE)


def pack_ternary(ternary_NK: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[N, K]` in {-1, 0, 1} into uint8 `[N, ceil(K / 4)]`.

    Raises:
        ValueError: a value other than -1, 0, 1, or not two dimensions.
    """
    if ternary_NK.dim() != 2:
        raise ValueError(f"Expected a matrix [N, K], got shape {tuple(ternary_NK.shape)}.")
    if ternary_NK.numel() and (ternary_NK.min() < -1 or ternary_NK.max() > 1):
        raise ValueError("Ternary weights are -1, 0 and 1; got values outside.")
    rows, width = ternary_NK.shape
    codes = torch.ones(
        rows, packed_width(width) * WEIGHTS_PER_BYTE, dtype=torch.uint8, device=ternary_NK.device
    )
    codes[:, :width] = (ternary_NK + 1).to(torch.uint8)
    codes = codes.view(rows, -1, WEIGHTS_PER_BYTE)
    return codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6


def unpack_ternary(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack uint8 `[N, ceil(K / 4)]` into int8 `[N, K]`, the inverse of `pack_ternary`.

    Raises:
        ValueError: the bytes do not fit `width`.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_width(width):
        raise ValueError(
            f"Expected uint8 [N, {packed_width(width)}] for {width} weights a row,"
            f" got {packed.dtype} {tuple(packed.shape)}."
        )
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return codes.view(packed.shape[0], -1)[:, :width].to(torch.int8) - 1

"""Rotary position embedding, rotate-half form (arXiv 2104.09864; as in Llama and BitNet)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RotaryTables(NamedTuple):
    """Cosines and sines for given positions, float32 `[B or 1, 1, S, D]`."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(positions_BS: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Tables for int64 positions `[B or 1, S]`; pair `i` turns by `position / theta^(2i/D)`."""
    # Angles grow with the position and lose digits in float32; MPS has nothing wider.
    dtype = torch.float32 if positions_BS.device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=dtype) / head_dim
    angles = positions_BS[..., None].to(dtype) * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return RotaryTables(angles.cos().float(), angles.sin().float())


def apply_rotary(x_BHSD: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Rotate each pair `(x[i], x[i + D/2])` by its position's angle."""
    first, second = x_BHSD.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BHSD * tables.cos + rotated * tables.sin).to(x_BHSD.dtype)

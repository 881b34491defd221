"""Quantizers of BitNet b1.58 as pure functions.

Weights: `W = s * T`, `T` in {-1, 0, 1}, `s = mean(abs(W))` per tensor (arXiv 2402.17764, eq. 1-3).
Activations: per token int8, `127 / max(abs(x))`, round half to even, clip to [-128, 127]
(2B4T report, arXiv 2504.12285, section 2). Both use the constants of transformers' BitNet.
Embedding and lm head, where they are not float: per row int8, `max(abs(row)) / 127`.
"""

from __future__ import annotations

import torch

SMALLEST_SCALE = 1e-5
"""Lower bound of `mean(abs(W))` and `max(abs(x))`: what is all zeros gets a finite scale."""


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary weights and their scale.

    Args:
        weight_NK: float `[N, K]`.

    Returns:
        `T`, int8 `[N, K]` in {-1, 0, 1}, and `s`, float32 `[]`, with `weight ~ s * T`.
    """
    weight_NK = weight_NK.float()
    scale = weight_NK.abs().mean().clamp(min=SMALLEST_SCALE)
    return (weight_NK / scale).round_().clamp_(-1, 1).to(torch.int8), scale


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 activations, one scale a token.

    Args:
        x: float `[..., K]`.

    Returns:
        `q`, int8 `[..., K]`, and `scale`, float32 `[..., 1]`, with `x ~ q / scale`.
    """
    x = x.float()
    scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
    return (x * scale).round_().clamp_(-128, 127).to(torch.int8), scale


def quantize_rows(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 weights, one scale a row.

    Args:
        weight_NK: float `[N, K]`.

    Returns:
        `q`, int8 `[N, K]` in -127 ... 127, and `scale`, float32 `[N]`, with `weight ~ q * scale`.
    """
    weight_NK = weight_NK.float()
    scale_N = weight_NK.abs().amax(dim=-1).clamp_(min=SMALLEST_SCALE) / 127.0
    quantized_NK = (weight_NK / scale_N[:, None]).round_().clamp_(-127, 127)
    return quantized_NK.to(torch.int8), scale_N

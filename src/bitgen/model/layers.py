"""The parts that the image encoder and the text decoder share.

    x -> RMSNorm -> Attention -> + -> RMSNorm -> FeedForward -> + -> x

This is the block of BitNet b1.58 2B4T, with the parameter names of transformers' `BitNet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitgen.model.attention import Attention
from bitgen.model.cache import LayerCache
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import RotaryTables
from bitgen.model.ternary import linear_group, make_linear

BRANCH_GAIN = 0.1
"""Initial gain of the norm before each branch's last projection. What it scales is what the branch
adds to the residual stream, and quantization does not undo it: with a small one a token's own
embedding is not drowned before training begins (LayerScale, arXiv 2103.17239)."""


def squared_relu_gate_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`relu(gate)^2 * up` (squared ReLU: arXiv 2109.08668)."""
    return torch.relu(gate).square() * up


class _SquaredReluGate(torch.autograd.Function):
    """The reference with its gradient written out, saving the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.relu(gate).square_().mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        positive = torch.relu(gate)
        scaled = gradient * positive
        return (scaled * up).mul_(2), scaled.mul_(positive)


class FeedForward(nn.Module):
    """Squared-ReLU gated feed-forward layer, `[B, S, C] -> [B, S, C]`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, quantization: str, eps: float
    ) -> None:
        super().__init__()
        self.gate_proj = make_linear(hidden_size, intermediate_size, quantization)
        self.up_proj = make_linear(hidden_size, intermediate_size, quantization)
        self.ffn_sub_norm = RMSNorm(intermediate_size, eps, gain=BRANCH_GAIN)
        self.down_proj = make_linear(intermediate_size, hidden_size, quantization)

    def forward(self, x_BSC: torch.Tensor) -> torch.Tensor:
        gate, up = linear_group([self.gate_proj, self.up_proj], x_BSC)
        gated = _SquaredReluGate.apply(gate, up)
        output: torch.Tensor = self.down_proj(self.ffn_sub_norm(gated))
        return output


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        quantization: str,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = Attention(
            hidden_size, num_heads, num_kv_heads, head_dim, quantization, eps, BRANCH_GAIN
        )
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = FeedForward(hidden_size, intermediate_size, quantization, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BSC: torch.Tensor,
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output `[B, S, C]`, and its attention weights `[B, H, S, K]` if asked for."""
        attended, weights = self.self_attn(
            self.input_layernorm(x_BSC), mask, rotary, cache, return_weights
        )
        x_BSC = x_BSC + self.dropout(attended)
        return x_BSC + self.dropout(self.mlp(self.post_attention_layernorm(x_BSC))), weights

"""The parts that the image encoder and the text decoder share.

    x -> RMSNorm -> Attention -> + -> RMSNorm -> FeedForward or experts -> + -> x

This is the block of BitNet b1.58 2B4T, with the parameter names of transformers' `BitNet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitgen.model.attention import Attention, AttentionPlan
from bitgen.model.cache import LayerCache
from bitgen.model.compilation import compile_function, mark_sizes_dynamic
from bitgen.model.experts import MixtureOfExperts, Routing
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import RotaryTables
from bitgen.model.ternary import linear_group, make_linear

_LayerOutput: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None, Routing | None]"

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
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Attributes:
        is_recomputed: in training, keep the layer's input alone and compute the rest once more in
            the backward pass (activation checkpointing, arXiv 1604.06174).
    """

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
        num_experts: int = 1,
        experts_per_token: int = 1,
    ) -> None:
        super().__init__()
        self.is_recomputed = False
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = Attention(
            hidden_size, num_heads, num_kv_heads, head_dim, quantization, eps, BRANCH_GAIN
        )
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        feed_forwards = [
            FeedForward(hidden_size, intermediate_size, quantization, eps)
            for _ in range(num_experts)
        ]
        self.mlp: FeedForward | MixtureOfExperts = (
            feed_forwards[0]
            if num_experts == 1
            else MixtureOfExperts(feed_forwards, hidden_size, experts_per_token)
        )
        self.dropout = nn.Dropout(dropout)
        self._compiled: Callable[..., _LayerOutput] | None = None

    def forward(
        self,
        x_BSC: torch.Tensor,
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
        tokens_T: torch.Tensor | None = None,
    ) -> _LayerOutput:
        """The layer's output `[B, S, C]`, its attention weights `[B, H, S, K]` if asked for, and
        with experts how it routed `tokens_T` (see `MixtureOfExperts`)."""
        inputs: tuple[Any, ...] = (x_BSC, mask, rotary, cache, return_weights, tokens_T)
        if not (self.training and torch.is_grad_enabled()) or cache is not None:
            return self._run(*inputs)
        run = self._run
        if self._compiled is not None and not return_weights:
            plan = self.self_attn.plan(x_BSC, mask)
            mark_sizes_dynamic((x_BSC, *(rotary or ())), width_last=True)
            mark_sizes_dynamic((plan.mask, plan.alive))
            run, inputs = self._compiled, (x_BSC, plan, rotary)
        if self.is_recomputed:
            recomputed: _LayerOutput = checkpoint(run, *inputs, use_reentrant=False)
            return recomputed
        return run(*inputs)

    def compile_training(self) -> None:
        """Compile forward and backward of this layer, at its next call in training.

        Calls without gradient, with a cache or for the weights stay as they are, and so does a
        layer with experts.
        """
        if not isinstance(self.mlp, MixtureOfExperts):
            self._compiled = compile_function(self._run)

    def _run(
        self,
        x_BSC: torch.Tensor,
        mask: AttentionMask | AttentionPlan,
        rotary: RotaryTables | None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
        tokens_T: torch.Tensor | None = None,
    ) -> _LayerOutput:
        attended, weights = self.self_attn(
            self.input_layernorm(x_BSC), mask, rotary, cache, return_weights
        )
        x_BSC = x_BSC + self.dropout(attended)
        normed_BSC, routing = self.post_attention_layernorm(x_BSC), None
        if isinstance(self.mlp, MixtureOfExperts):
            fed_BSC, routing = self.mlp(normed_BSC, tokens_T)
        else:
            fed_BSC = self.mlp(normed_BSC)
        return x_BSC + self.dropout(fed_BSC), weights, routing


def run_layers(
    layers: Iterable[nn.Module],
    x_BSC: torch.Tensor,
    mask: AttentionMask,
    rotary: RotaryTables | None = None,
    caches: Sequence[LayerCache] | None = None,
    return_weights: bool = False,
    tokens_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[Routing, ...]]:
    """One `TransformerLayer` after the other.

    Args:
        layers: in their order.
        x_BSC: input of the first.
        mask: the same for all.
        rotary: the same for all; None = without positions.
        caches: one a layer; None = without.
        return_weights: whether to return `[B, H, S, K]` a layer.
        tokens_T: what experts are to see, the same for all; None = every position.

    Returns:
        Output `[B, S, C]`, the weights of each layer if asked for, the routing of each with
        experts.
    """
    attentions, routings = [], []
    for index, layer in enumerate(layers):
        cache = None if caches is None else caches[index]
        x_BSC, weights, routing = layer(x_BSC, mask, rotary, cache, return_weights, tokens_T)
        if weights is not None:
            attentions.append(weights)
        if routing is not None:
            routings.append(routing)
    return x_BSC, tuple(attentions), tuple(routings)

"""Multi-head attention with grouped queries, for the image encoder and the decoder alike.

Shape letters: B batch, S new positions, K keys (cached and new), C width, H heads, D head width.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.model.cache import LayerCache
from bitgen.model.masks import AttentionMask, ScoresShape, causal_bias
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import RotaryTables, apply_rotary
from bitgen.model.ternary import autocast_dtype, linear_group, make_linear

_LONGEST_WRITTEN_OUT = 384
_MOST_WEIGHTS_WRITTEN_OUT = 2**26  # 128 MiB a layer


class Attention(nn.Module):
    """Attention of BitNet b1.58 2B4T: no biases, `attn_sub_norm` before the output projection.

    A query that may see no key gets zero output and zero weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        quantization: str,
        eps: float,
        branch_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = make_linear(hidden_size, num_heads * head_dim, quantization)
        self.k_proj = make_linear(hidden_size, num_kv_heads * head_dim, quantization)
        self.v_proj = make_linear(hidden_size, num_kv_heads * head_dim, quantization)
        self.attn_sub_norm = RMSNorm(num_heads * head_dim, eps, gain=branch_gain)
        self.o_proj = make_linear(num_heads * head_dim, hidden_size, quantization)

    def forward(
        self,
        x_BSC: torch.Tensor,
        mask: AttentionMask | AttentionPlan,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from the S positions of `x_BSC` to the cached ones and to each other.

        Args:
            x_BSC: normalised input.
            mask: over S queries and all keys; or the plan that `plan` made of it.
            rotary: tables for the S positions; None = without positions.
            cache: filled in place.
            return_weights: whether a mask's weights are returned; a plan says so itself.

        Returns:
            Output `[B, S, C]`, and the weights `[B, H, S, K]` (float32) if asked for.
        """
        batch, length, _ = x_BSC.shape
        q, k, v = linear_group([self.q_proj, self.k_proj, self.v_proj], x_BSC)
        q_BHSD = self._split_heads(q, self.num_heads)
        k_BHKD = self._split_heads(k, self.num_kv_heads)
        v_BHKD = self._split_heads(v, self.num_kv_heads)
        if rotary is not None:
            q_BHSD, k_BHKD = apply_rotary(q_BHSD, rotary), apply_rotary(k_BHKD, rotary)
        if cache is not None:
            k_BHKD, v_BHKD = cache.update(k_BHKD, v_BHKD)
        if isinstance(mask, AttentionPlan):
            attended, weights = attend(q_BHSD, k_BHKD, v_BHKD, mask)
        else:
            attended, weights = masked_attention(q_BHSD, k_BHKD, v_BHKD, mask, return_weights)
        merged = attended.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        return self.o_proj(self.attn_sub_norm(merged)), weights

    def plan(self, x_BSC: torch.Tensor, mask: AttentionMask) -> AttentionPlan:
        """How `forward` would attend, without cache, from the positions of `x_BSC` to each other.

        Raises:
            ValueError: the mask does not fit the shape.
        """
        batch, length, _ = x_BSC.shape
        dtype = autocast_dtype(x_BSC.device.type) or x_BSC.dtype
        shape = (batch, self.num_heads, length, length)
        return plan_attention(mask, shape, dtype, x_BSC.device)

    def _split_heads(self, x_BSC: torch.Tensor, heads: int) -> torch.Tensor:
        return x_BSC.view(*x_BSC.shape[:2], heads, self.head_dim).transpose(1, 2)


def masked_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    mask: AttentionMask,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`softmax(q k^T / sqrt(D) + mask) v` (arXiv 1706.03762, equation 1), a zero row where no key
    may be seen.

    Args:
        q_BHQD: queries.
        k_BGKD: keys of G heads; H is a multiple of G (grouped queries, arXiv 2305.13245).
        v_BGKD: values.
        mask: over Q queries and K keys.
        return_weights: written out, because the fused kernel does not show its weights.

    Returns:
        `[B, H, Q, D]` in the dtype of the values, and the weights `[B, H, Q, K]` (float32, or
        float64 for float64) if asked for. Both paths agree up to rounding.

    Raises:
        ValueError: the mask does not fit the shapes.
    """
    shape = (*q_BHQD.shape[:3], k_BGKD.shape[2])
    plan = plan_attention(mask, shape, q_BHQD.dtype, q_BHQD.device, return_weights)
    return attend(q_BHQD, k_BGKD, v_BGKD, plan)


class AttentionPlan(NamedTuple):
    """How attention over scores of one shape is computed: the same for all layers.

    Attributes:
        path: "fused"; "written out"; "weights", which is written out and returns the weights.
        is_causal: the fused kernel's own flag.
        mask: what the path adds to the scores, or the kernel is given; None = nothing.
        alive: bool `[B, 1, Q, 1]`: the other rows are zeroed afterwards; None = no row is.
    """

    path: str
    is_causal: bool
    mask: torch.Tensor | None
    alive: torch.Tensor | None


def plan_attention(
    mask: AttentionMask,
    shape: ScoresShape,
    dtype: torch.dtype,
    device: torch.device,
    return_weights: bool = False,
) -> AttentionPlan:
    """The plan for scores of `shape` from queries of `dtype`.

    Raises:
        ValueError: the mask does not fit the shape.
    """
    lowered = mask.lower(shape, dtype, device)
    if return_weights or _is_faster_written_out(shape, dtype, device):
        added = causal_bias(*shape[2:], device) if lowered.is_causal else lowered.added
        path = "weights" if return_weights else "written out"
        return AttentionPlan(path, False, added, lowered.alive)
    if lowered.alive is None or _kernel_zeroes_dead_rows(device.type, dtype):
        return AttentionPlan("fused", lowered.is_causal, lowered.mask, None)
    return AttentionPlan("fused", False, lowered.opened, lowered.alive)


def attend(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `masked_attention` returns, by a plan made before; tensor operations alone."""
    num_heads = q_BHQD.shape[1]
    if k_BGKD.shape[1] != num_heads:
        groups = num_heads // k_BGKD.shape[1]
        k_BGKD = k_BGKD.repeat_interleave(groups, dim=1)
        v_BGKD = v_BGKD.repeat_interleave(groups, dim=1)
    weights = None
    if plan.path == "fused":
        attended = F.scaled_dot_product_attention(
            q_BHQD, k_BGKD, v_BGKD, attn_mask=plan.mask, is_causal=plan.is_causal
        )
    else:
        weights_dtype = q_BHQD.dtype
        if plan.path == "weights":
            weights_dtype = torch.promote_types(weights_dtype, torch.float32)
        attended, weights = _written_out(q_BHQD, k_BGKD, v_BGKD, plan.mask, weights_dtype)
    if plan.alive is not None:
        attended = attended.masked_fill(~plan.alive, 0.0)
    if weights is None or plan.path != "weights":
        return attended, None
    return attended, weights if plan.alive is None else weights.masked_fill(~plan.alive, 0.0)


def _is_faster_written_out(shape: ScoresShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether softmax written out takes less time than the kernel, by benchmarks/attention.py.

    So it is in training in bfloat16 on a CPU, up to some length: the kernel's gradient is slow. But
    the weights are then kept for the gradient, which must not take all memory.
    """
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and max(shape[2:]) <= _LONGEST_WRITTEN_OUT
        and math.prod(shape) <= _MOST_WEIGHTS_WRITTEN_OUT
    )


@lru_cache
def _kernel_zeroes_dead_rows(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `scaled_dot_product_attention` gives a row without keys zeros and zero gradients.

    Newer torch does so on a CPU and saves a pass over the output; asked once, by trying. Kernels of
    accelerators are many, so their dead rows are always opened and zeroed.
    """
    if device_type != "cpu":
        return False
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.2
        return False
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        # Hooks of a caller, such as activation checkpointing, must not see what is tried here.
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        for backend, num_queries in itertools.product(backends, (1, 16)):
            qkv = torch.ones(3, 1, 2, 16, 8, dtype=dtype, requires_grad=True)
            query, key, value = qkv[0][:, :, :num_queries], qkv[1], qkv[2]
            allowed = torch.zeros(1, 1, num_queries, 16, dtype=torch.bool)
            additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf)
            for mask in (allowed, additive):
                with sdpa_kernel(backend):
                    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
                (gradient,) = torch.autograd.grad(attended.sum(), qkv)
                if bool((attended != 0).any()) or bool((gradient != 0).any()):
                    return False
    return True


def _written_out(
    q_BHQD: torch.Tensor,
    k_BHKD: torch.Tensor,
    v_BHKD: torch.Tensor,
    added: torch.Tensor | None,
    weights_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step, softmax summed in float32; the reference of the fused path.

    Rows without keys are left opened: the caller zeroes them.
    """
    scores = (q_BHQD * q_BHQD.shape[-1] ** -0.5) @ k_BHKD.transpose(-1, -2)
    if added is not None:
        scores += added
    weights = scores.softmax(dim=-1, dtype=weights_dtype)
    return weights.to(v_BHKD.dtype) @ v_BHKD, weights

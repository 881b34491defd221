"""Multi-head attention with grouped queries, for the image encoder and the decoder alike.

Shape letters: B batch, S new positions, K keys (cached and new), C width, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.model.cache import LayerCache
from bitgen.model.masks import AttentionMask, LoweredMask, mask_value
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import RotaryTables, apply_rotary
from bitgen.model.ternary import linear_group, make_linear

_LONGEST_WRITTEN_OUT = 256


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
        mask: AttentionMask,
        rotary: RotaryTables | None = None,
        cache: LayerCache | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from the S positions of `x_BSC` to the cached ones and to each other.

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
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k_BHKD = k_BHKD.repeat_interleave(groups, dim=1)
            v_BHKD = v_BHKD.repeat_interleave(groups, dim=1)
        lowered = mask.lower(length, k_BHKD.shape[2], q_BHSD.dtype, x_BSC.device)
        weights = None
        if return_weights:
            attended, weights = _attention_with_weights(q_BHSD, k_BHKD, v_BHKD, lowered)
        elif _is_faster_written_out(q_BHSD, k_BHKD):
            attended, _ = _attention_with_weights(q_BHSD, k_BHKD, v_BHKD, lowered)
        else:
            attended = F.scaled_dot_product_attention(
                q_BHSD, k_BHKD, v_BHKD, attn_mask=lowered.mask, is_causal=lowered.is_causal
            )
            if lowered.alive is not None:
                attended = attended * lowered.alive
        merged = attended.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        return self.o_proj(self.attn_sub_norm(merged)), weights

    def _split_heads(self, x_BSC: torch.Tensor, heads: int) -> torch.Tensor:
        return x_BSC.view(*x_BSC.shape[:2], heads, self.head_dim).transpose(1, 2)


def _is_faster_written_out(q_BHSD: torch.Tensor, k_BHKD: torch.Tensor) -> bool:
    """Whether training in bf16 on a CPU takes less time with softmax written out (measured)."""
    return (
        q_BHSD.device.type == "cpu"
        and q_BHSD.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and max(q_BHSD.shape[2], k_BHKD.shape[2]) <= _LONGEST_WRITTEN_OUT
    )


def _attention_with_weights(
    q_BHSD: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, lowered: LoweredMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, softmax in float32; the reference of the fused path."""
    scores = (q_BHSD * q_BHSD.shape[-1] ** -0.5) @ k_BHKD.transpose(-1, -2)
    lowest = mask_value(scores.dtype)
    if lowered.is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, lowest)
    elif lowered.mask is not None and lowered.mask.dtype == torch.bool:
        scores = scores.masked_fill(~lowered.mask, lowest)
    elif lowered.mask is not None:
        scores = (scores + lowered.mask).clamp(min=lowest)
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    if lowered.alive is not None:
        weights = weights * lowered.alive
    return weights.to(v_BHKD.dtype) @ v_BHKD, weights

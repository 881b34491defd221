"""The decoder: the BitNet b1.58 2B4T stack, with parameter names of transformers' `BitNet`."""

from __future__ import annotations

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.cache import AttentionCache
from bitgen.model.layers import TransformerLayer
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import rotary_tables


class TextDecoder(nn.Module):
    """Embedding, n layers and the final norm; `lm_head` shares the embedding's weights."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Tied to the head: logits of half a unit, so that the first loss is that of guessing.
        nn.init.normal_(self.embed_tokens.weight, std=0.5 * config.hidden_size**-0.5)
        self.layers = nn.ModuleList(
            TransformerLayer(
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                intermediate_size=config.intermediate_size,
                quantization=config.quantization,
                eps=config.rms_norm_eps,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSC: torch.Tensor,
        mask: AttentionMask,
        positions_BS: torch.Tensor,
        cache: AttentionCache | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Normalised hidden states `[B, S, C]` and, if asked for, each layer's attention weights.

        Args:
            x_BSC: embedded image and text tokens.
            mask: over S queries and the cached and new keys.
            positions_BS: int64 rotary positions, `[B or 1, S]`.
            cache: filled in place.
            return_weights: whether to return `[B, H, S, K]` a layer.
        """
        rotary = rotary_tables(positions_BS, self.head_dim, self.rope_theta)
        attentions = []
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            x_BSC, weights = layer(x_BSC, mask, rotary, layer_cache, return_weights)
            if weights is not None:
                attentions.append(weights)
        return self.norm(x_BSC), tuple(attentions)

    def lm_head(self, hidden_BLC: torch.Tensor) -> torch.Tensor:
        """Logits `[B, L, V]` over the vocabulary, by the tied embedding."""
        return nn.functional.linear(hidden_BLC, self.embed_tokens.weight)

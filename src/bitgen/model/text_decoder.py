"""The decoder: the BitNet b1.58 2B4T stack, with parameter names of transformers' `BitNet`."""

from __future__ import annotations

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.cache import AttentionCache
from bitgen.model.experts import Routing
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.layers import TransformerLayer, run_layers
from bitgen.model.masks import AttentionMask
from bitgen.model.norm import RMSNorm
from bitgen.model.rope import rotary_tables


class TextDecoder(nn.Module):
    """Embedding, n layers and the final norm; `lm_head` shares the embedding's weights."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.has_experts = config.num_experts > 1
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        # Tied to the head: logits of half a unit, so that the first loss is that of guessing.
        nn.init.normal_(embedding.weight, std=0.5 * config.hidden_size**-0.5)
        self.embed_tokens: nn.Embedding | Int8Embedding = embedding
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
                num_experts=config.num_experts,
                experts_per_token=config.experts_per_token,
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
        valid_BS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[Routing, ...]]:
        """Normalised hidden states `[B, S, C]`, each layer's attention weights if asked for, and
        each layer's routing if there are experts.

        Args:
            x_BSC: embedded image and text tokens.
            mask: over S queries and the cached and new keys.
            positions_BS: int64 rotary positions, `[B or 1, S]`.
            cache: filled in place.
            return_weights: whether to return `[B, H, S, K]` a layer.
            valid_BS: bool `[B or 1, S]`, False where padding stands, which experts do not see;
                None = all are tokens. (`mask` knows it too, but not under every cache.)
        """
        rotary = rotary_tables(positions_BS, self.head_dim, self.rope_theta)
        caches = None if cache is None else cache.layers
        tokens_T = None
        if self.has_experts and valid_BS is not None:
            tokens_T = _flat_positions(valid_BS, len(x_BSC)).to(x_BSC.device)
        x_BSC, attentions, routings = run_layers(
            self.layers, x_BSC, mask, rotary, caches, return_weights, tokens_T
        )
        return self.norm(x_BSC), attentions, routings

    def lm_head(self, hidden: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """Logits `[..., V]` over the vocabulary, or over its first `num_tokens`, of `[..., C]`."""
        if isinstance(self.embed_tokens, Int8Embedding):
            return self.embed_tokens.logits(hidden, num_tokens)
        return nn.functional.linear(hidden, self.embed_tokens.weight[:num_tokens])

    def quantize_embedding(self) -> None:
        """Replace the embedding, and with it the lm head, by its int8 form."""
        if isinstance(self.embed_tokens, nn.Embedding):
            self.embed_tokens = Int8Embedding.from_trained(self.embed_tokens)


def _flat_positions(valid_BS: torch.Tensor, batch: int) -> torch.Tensor:
    """Where `valid_BS` is True among the B * S positions, int64."""
    if len(valid_BS) == 1:
        valid_BS = valid_BS.expand(batch, -1)
    return valid_BS.reshape(-1).nonzero().squeeze(1)

"""Heads that predict further tokens than the next: a training signal, and drafts for decoding.

    state at t, token t+1 -> head 2 -> state for t+2, token t+2 -> head 3 -> state for t+3 ...

Training on several future tokens is arXiv 2404.19737. Each head goes on from the state of the one
before and is told the token in between, as in arXiv 2412.19437 (section 2.2) and arXiv 2402.05109:
a head that does not know which token precedes its own has to guess both, and its drafts do not fit
together. In training that token is the true one, in decoding the drafted one. Heads work on each
position by itself (no attention), so drafting needs no cache.
"""

from __future__ import annotations

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.layers import FeedForward
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear


class FutureTokenHead(nn.Module):
    """One step into the future: `x = W [state; norm(embedding)]`, then `x + FeedForward(norm(x))`.

    The state comes normalised, from the decoder's final norm.
    """

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(width, eps)
        self.merge_proj = make_linear(2 * width, width, config.quantization)
        self.post_merge_layernorm = RMSNorm(width, eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.quantization, eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The next state, not yet normalised, of two `[..., C]`."""
        merged = torch.cat([state, self.embedding_norm(embedding).to(state.dtype)], dim=-1)
        x: torch.Tensor = self.merge_proj(merged).to(state.dtype)
        return x + self.dropout(self.mlp(self.post_merge_layernorm(x)))


class FutureTokenHeads(nn.Module):
    """The heads for tokens t+2 to t+n at position t; none where `predict_tokens` is 1.

    Their states are normalised and read by the decoder's own final norm and tied lm head.
    """

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            FutureTokenHead(config) for _ in range(config.predict_tokens - 1)
        )

    def __len__(self) -> int:
        return len(self.heads)

    def step(
        self, index: int, state: torch.Tensor, embedding: torch.Tensor, norm: nn.Module
    ) -> torch.Tensor:
        """Normalised state `[..., C]` for one token more.

        Args:
            index: which head; 0 predicts t+2.
            state: `[..., C]`, normalised: of the head before, or the decoder's for the first.
            embedding: `[..., C]` of the token that `state` predicts.
            norm: the decoder's final norm.
        """
        normalised: torch.Tensor = norm(self.heads[index](state, embedding))
        return normalised

    def forward(
        self, states_BLC: torch.Tensor, embedding_BLC: torch.Tensor, norm: nn.Module
    ) -> tuple[torch.Tensor, ...]:
        """Each head's normalised states `[B, L, C]`, given the true tokens in between.

        Where a row ends before the tokens in between, zeros stand for them.

        Args:
            states_BLC: the decoder's normalised states of the text positions.
            embedding_BLC: embeddings of the text tokens.
            norm: the decoder's final norm.
        """
        length, found = states_BLC.shape[1], []
        for index in range(len(self)):
            ahead = min(index + 1, length)
            known_BLC = nn.functional.pad(embedding_BLC[:, ahead:], (0, 0, 0, ahead))
            states_BLC = self.step(index, states_BLC, known_BLC, norm)
            found.append(states_BLC)
        return tuple(found)

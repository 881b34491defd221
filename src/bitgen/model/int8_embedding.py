"""The embedding and the lm head, which share their weights, in int8 with one scale a row.

ids [...]    -> row W8 [C] * row scale                                           -> [..., C]
x   [..., C] -> int8 a token -> integer product with W8 [V, C] * row scale / scale -> [..., V]
"""

from __future__ import annotations

import torch
from torch import nn

from bitgen.kernels.matmul import int8_matmul
from bitgen.kernels.packing import pack_int8, unpack_int8
from bitgen.kernels.quantize import quantize_activation, quantize_rows
from bitgen.kernels.tiles import int8_tile_shape


class Int8Embedding(nn.Module):
    """The run-time form of an embedding `[V, C]` that is also the lm head; no gradient.

    Buffers: `tiles` int8 `[ceil(V / 32), ceil(C / 4), 32, 4]` (see `bitgen.kernels.tiles`) and
    `row_scales` float32 `[V]`; both are what an artifact stores. The weights are taken from their
    tiles once, at the first call.
    """

    tiles: torch.Tensor
    row_scales: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shape = int8_tile_shape(num_embeddings, embedding_dim)
        self.register_buffer("tiles", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("row_scales", torch.ones(num_embeddings))
        self._weight_VC: torch.Tensor | None = None

    @classmethod
    def from_trained(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Quantize a trained embedding's weights."""
        quantized_VC, scale_V = quantize_rows(embedding.weight.detach())
        module = cls(*embedding.weight.shape).to(embedding.weight.device)
        module.tiles.copy_(pack_int8(quantized_VC))
        module.row_scales.copy_(scale_V)
        return module

    def quantized(self) -> torch.Tensor:
        """The weights as int8 `[V, C]`."""
        if self._weight_VC is None or self._weight_VC.device != self.tiles.device:
            self._weight_VC = unpack_int8(self.tiles, self.num_embeddings, self.embedding_dim)
        return self._weight_VC

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[..., C]`, float32, of int64 ids `[...]`."""
        rows = nn.functional.embedding(ids, self.quantized())
        return rows.float() * nn.functional.embedding(ids, self.row_scales[:, None])

    def logits(self, hidden: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """Scores `[..., V]` of all rows, or of the first `num_tokens`, for states `[..., C]`."""
        quantized, token_scale = quantize_activation(hidden)
        weight_VC = self.quantized()[:num_tokens]
        sums_MV = int8_matmul(quantized.reshape(-1, self.embedding_dim), weight_VC)
        scores_MV = sums_MV.mul_(self.row_scales[:num_tokens] / token_scale.reshape(-1, 1))
        return scores_MV.view(*hidden.shape[:-1], len(weight_VC)).to(hidden.dtype)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._weight_VC = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

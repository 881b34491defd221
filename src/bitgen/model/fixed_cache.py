"""A cache whose steps are all alike, so that one can be recorded and replayed (a CUDA graph).

A recorded step repeats the same operations on the same memory, with every number that the host gave
them: a shape, an offset, a position. So here the host gives none that changes. Each step attends to
all columns under a mask; which are held, and where the next token goes, is known to the device
alone, and the step itself counts on.

Shapes: B rows, K columns, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitgen.model.cache import AttentionCache, CacheShape, LayerCache, StaticCache
from bitgen.model.masks import AttentionMask


class _FixedLayerCache(LayerCache):
    def __init__(self, shape: CacheShape, max_length: int, column_1: torch.Tensor) -> None:
        super().__init__(shape, max_length)
        self.column_1 = column_1

    def update(
        self, keys_BGSD: torch.Tensor, values_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.column_1, keys_BGSD.to(self.keys.dtype))
        self.values.index_copy_(2, self.column_1, values_BGSD.to(self.values.dtype))
        return self.keys, self.values

    def load(self, other: LayerCache, rows_B: torch.Tensor, length: int) -> None:
        for held, given in ((self.keys, other.keys), (self.values, other.values)):
            held[:, :, :length] = given[:, :, :length].index_select(0, rows_B)
            held[:, :, length:] = 0.0  # a weight of 0 does not undo what is not finite


class FixedCache(AttentionCache):
    """Room for `max_length` columns, filled from a `StaticCache` and then one token a row and step.

    Each token sees all tokens of its row before it, as under a causal or prefix mask behind the
    prefix. Tensors keep their memory for as long as the cache lives.
    """

    def __init__(self, shape: CacheShape, max_length: int) -> None:
        batch, device = shape.batch_size, shape.device
        self._column_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._positions_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._is_held_BK = torch.zeros(batch, max_length, dtype=torch.bool, device=device)
        self.layers: list[_FixedLayerCache] = [
            _FixedLayerCache(shape, max_length, self._column_1) for _ in range(shape.num_layers)
        ]
        self.batch_size, self.max_length, self.device = batch, max_length, device
        self.length = 0

    def load(self, cache: StaticCache, rows_B: torch.Tensor) -> None:
        """Hold what `cache` holds, row `b` that of its row `rows_B[b]`, and nothing else.

        Raises:
            ValueError: another number of rows, or more columns than there is room for.
        """
        if len(rows_B) != self.batch_size or cache.length > self.max_length:
            raise ValueError(
                f"The cache has {self.batch_size} rows of {self.max_length} columns;"
                f" {len(rows_B)} rows of {cache.length} do not fit."
            )
        held_BK = cache.held_columns().index_select(0, rows_B)
        for mine, other in zip(self.layers, cache.layers, strict=True):
            mine.load(other, rows_B, cache.length)
        self._is_held_BK.zero_()
        self._is_held_BK[:, : cache.length] = held_BK
        self._positions_B1.copy_(held_BK.sum(dim=1, keepdim=True))
        self._column_1.fill_(cache.length)
        self.length = cache.length

    def clear(self) -> None:
        """Hold nothing."""
        self._is_held_BK.zero_()
        self._positions_B1.zero_()
        self._column_1.zero_()
        self.length = 0

    def _place(
        self, mask: AttentionMask, valid_BS: torch.Tensor | None, num_new: int
    ) -> tuple[AttentionMask, torch.Tensor]:
        if num_new != 1 or valid_BS is not None or mask.custom_masks or mask.windows:
            raise ValueError(
                "A fixed cache takes one token a row and step, without padding, window or custom"
                " mask. Use a static cache."
            )
        if self.length >= self.max_length:
            raise ValueError(
                f"The cache has room for {self.max_length} positions, and all are held."
                " Allocate a longer one."
            )
        self._is_held_BK.index_fill_(1, self._column_1, True)
        return AttentionMask.custom(self._is_held_BK[:, None, None, :]), self._positions_B1

    def end_step(self, num_new: int) -> None:
        self._column_1 += num_new
        self._positions_B1 += num_new
        self.length += num_new

    def reorder(self, rows_B: torch.Tensor) -> None:
        """As `AttentionCache.reorder`, in place. Raises ValueError for another number of rows."""
        if len(rows_B) != self.batch_size:
            raise ValueError(
                f"A fixed cache keeps its {self.batch_size} rows; it cannot have {len(rows_B)}."
            )
        for layer in self.layers:
            layer.reorder(rows_B, self.length)
        self._is_held_BK.copy_(self._is_held_BK.index_select(0, rows_B))
        self._positions_B1.copy_(self._positions_B1.index_select(0, rows_B))

    def rewind(self, lengths: Sequence[int]) -> None:
        raise ValueError("The rows of a fixed cache grow at one column. Use a static cache.")

"""The key-value cache: preallocated, explicit, the same length for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LayerCache:
    """Keys and values of one layer, `[B, kv heads, max_length, D]`, of which `start` are filled."""

    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0

    def update(
        self, keys_BHSD: torch.Tensor, values_BHSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values behind the old ones; return all that are filled."""
        end = self.start + keys_BHSD.shape[2]
        self.keys[:, :, self.start : end] = keys_BHSD
        self.values[:, :, self.start : end] = values_BHSD
        return self.keys[:, :, :end], self.values[:, :, :end]


class StaticCache:
    """Room for `max_length` positions of every decoder layer, allocated once.

    Rows may hold padding anywhere: `valid` says which positions are tokens, and `next_position`
    which rotary position each row's next token takes.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.layers = [
            LayerCache(
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(num_layers)
        ]
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0
        self.valid_BK = torch.zeros(batch_size, max_length, device=device, dtype=torch.bool)
        self.next_position_B = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.has_padding = False

    def begin_step(self, valid_BS: torch.Tensor | None, batch_size: int, num_new: int) -> None:
        """Make room for `num_new` positions; `valid_BS` (None = all) says which are tokens.

        Raises:
            ValueError: another batch size, or more positions than the cache has room for.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"The cache holds {self.batch_size} rows; the input has {batch_size}.")
        if self.length + num_new > self.max_length:
            raise ValueError(
                f"The cache has room for {self.max_length} positions and holds {self.length};"
                f" {num_new} more do not fit. Allocate a longer one."
            )
        new = slice(self.length, self.length + num_new)
        if valid_BS is None:
            self.valid_BK[:, new] = True
        else:
            self.valid_BK[:, new] = valid_BS
            self.has_padding = True
        for layer in self.layers:
            layer.start = self.length

    def end_step(self, num_new: int, next_position_B: torch.Tensor) -> None:
        """Count the positions of this step as held."""
        self.length += num_new
        self.next_position_B = next_position_B

    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row `b` becomes what row `rows_B[b]` was, as beam search needs it."""
        self.batch_size = len(rows_B)
        for layer in self.layers:
            layer.keys = layer.keys.index_select(0, rows_B)
            layer.values = layer.values.index_select(0, rows_B)
        self.valid_BK = self.valid_BK.index_select(0, rows_B)
        self.next_position_B = self.next_position_B.index_select(0, rows_B)

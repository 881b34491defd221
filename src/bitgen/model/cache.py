"""Key-value caches: preallocated, explicit, the same memory from the first token to the last.

    StaticCache          every token is kept, up to a length: one column a token given
    SlidingWindowCache   the first tokens (attention sinks) and the last ones: one slot a token kept

A cache says where new tokens stand (`begin_step`), takes each layer's new keys and values
(`LayerCache.update`), and counts them when all layers are done (`end_step`): a forward that fails
in between leaves what it holds as it was. Rows of a batch may differ in length: padding has no
position and is never seen.

Shapes: B rows, G key-value heads, S new columns, K keys that a step attends to, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitgen.model.masks import AttentionMask, token_positions
from bitgen.model.rope import RotaryTables, apply_rotary, rotary_tables


@dataclass(frozen=True)
class CacheShape:
    """What a cache is allocated for, all but its length."""

    num_layers: int
    batch_size: int
    num_kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype


class LayerCache(ABC):
    """Keys and values of one layer, `[B, G, columns, D]` each."""

    def __init__(self, shape: CacheShape, num_columns: int) -> None:
        size = (shape.batch_size, shape.num_kv_heads, num_columns, shape.head_dim)
        self.keys = torch.zeros(size, device=shape.device, dtype=shape.dtype)
        self.values = torch.zeros(size, device=shape.device, dtype=shape.dtype)

    @abstractmethod
    def update(
        self, keys_BGSD: torch.Tensor, values_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new keys and values; all that this step attends to, `[B, G, K, D]` each."""

    def reorder(self, rows_B: torch.Tensor, filled: int) -> None:
        """Row `b` becomes what row `rows_B[b]` was; the first `filled` columns count."""
        self.keys = _reordered(self.keys, rows_B, filled)
        self.values = _reordered(self.values, rows_B, filled)


def _reordered(held: torch.Tensor, rows_B: torch.Tensor, filled: int) -> torch.Tensor:
    """Rows of `[B, G, K, D]` chosen anew; in place, and only what is filled, where B stays."""
    if len(rows_B) != len(held):
        return held.index_select(0, rows_B)
    held[:, :, :filled] = held[:, :, :filled].index_select(0, rows_B)
    return held


class AttentionCache(ABC):
    """What the model asks of a cache.

    Attributes:
        layers: one `LayerCache` a decoder layer.
        batch_size: rows B.
        length: columns given so far, padding included.
    """

    layers: Sequence[LayerCache]
    batch_size: int
    length: int

    def begin_step(
        self, mask: AttentionMask, batch_size: int, num_new: int
    ) -> tuple[AttentionMask, torch.Tensor]:
        """Make room for `num_new` columns.

        Args:
            mask: the rules of the whole sequence. Its padding covers the new columns, or all so
                far; without padding all new columns are tokens. A static cache also takes one that
                `at_positions` has placed for the new columns and all columns so far.
            batch_size: rows of the step.
            num_new: columns of the step.

        Returns:
            The mask over the keys that each layer's `update` will return, and the rotary positions
            of the new tokens, int64 `[B or 1, S]`.

        Raises:
            ValueError: another batch size, more tokens than the cache has room for, or a mask
                under which a token would see later ones.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"The cache holds {self.batch_size} rows; the input has {batch_size}.")
        valid_BS = mask.known_padding
        if valid_BS is not None and valid_BS.shape[1] not in (num_new, self.length + num_new):
            raise ValueError(
                f"The padding mask has shape {tuple(valid_BS.shape)}; expected {num_new} columns"
                f" (the new tokens) or {self.length + num_new} (all so far)."
            )
        if valid_BS is not None:
            valid_BS = valid_BS[:, -num_new:]
        return self._place(mask.for_cached_step(self.length, num_new), valid_BS, num_new)

    @abstractmethod
    def _place(
        self, mask: AttentionMask, valid_BS: torch.Tensor | None, num_new: int
    ) -> tuple[AttentionMask, torch.Tensor]: ...

    @abstractmethod
    def end_step(self, num_new: int) -> None:
        """Count the columns of this step as held."""

    @abstractmethod
    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row `b` becomes what row `rows_B[b]` was, as beam search needs it; B may change."""

    @abstractmethod
    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget each row's columns from `lengths[b]` on, as if they had never been given.

        Raises:
            ValueError: not one length a row, more than a row holds, or a cache that has let go of
                what it would have to go back to.
        """


def _check_prefix(
    mask: AttentionMask, before_B: torch.Tensor | int, after_B: torch.Tensor | int
) -> None:
    """Refuse a prefix that this step would cut, given the tokens of each row before and after it.

    On an accelerator the lengths are not read, because that would wait for the device.
    """
    lengths_B = mask.prefix_lengths_B
    if lengths_B is None or lengths_B.device.type != "cpu":
        return
    before = torch.as_tensor(before_B, device="cpu")
    after = torch.as_tensor(after_B, device="cpu")
    reads_prefix = (after > before) & (lengths_B > before)
    if bool((reads_prefix & ((before > 0) | (lengths_B > after))).any()):
        raise ValueError(
            f"The prefix ({lengths_B.tolist()} tokens) must be read in one step, because its"
            f" tokens see each other; this step reads tokens {before.tolist()} to {after.tolist()}."
        )


# Every token ------------------------------------------------------------------------------------


class _StaticLayerCache(LayerCache):
    """Of `max_length` columns `start` are filled.

    Where rows differ in it, `columns_BS` says where each row's new tokens go; `start` is then the
    most.
    """

    def __init__(self, shape: CacheShape, max_length: int) -> None:
        super().__init__(shape, max_length)
        self.start = 0
        self.columns_BS: torch.Tensor | None = None

    def update(
        self, keys_BGSD: torch.Tensor, values_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.start + keys_BGSD.shape[2]
        if self.columns_BS is None:
            self.keys[:, :, self.start : end] = keys_BGSD
            self.values[:, :, self.start : end] = values_BGSD
        else:
            index_BGSD = self.columns_BS[:, None, :, None].expand(keys_BGSD.shape)
            self.keys.scatter_(2, index_BGSD, keys_BGSD.to(self.keys.dtype))
            self.values.scatter_(2, index_BGSD, values_BGSD.to(self.values.dtype))
        return self.keys[:, :, :end], self.values[:, :, :end]


class StaticCache(AttentionCache):
    """Room for `max_length` columns of every decoder layer, allocated once.

    Rows may be rewound to different lengths; each then goes on at its own column, and `length` is
    that of the longest.
    """

    def __init__(self, shape: CacheShape, max_length: int) -> None:
        self.layers: list[_StaticLayerCache] = [
            _StaticLayerCache(shape, max_length) for _ in range(shape.num_layers)
        ]
        self.batch_size, self.max_length = shape.batch_size, max_length
        self.length = 0
        self._valid_BK = torch.ones(
            shape.batch_size, max_length, device=shape.device, dtype=torch.bool
        )
        self._has_padding = False
        # Of each row, where they differ.
        self._lengths: list[int] | None = None

    def _place(
        self, mask: AttentionMask, valid_BS: torch.Tensor | None, num_new: int
    ) -> tuple[AttentionMask, torch.Tensor]:
        start, end = self.length, self.length + num_new
        if end > self.max_length:
            raise ValueError(
                f"The cache has room for {self.max_length} positions and holds {start};"
                f" {num_new} more do not fit. Allocate a longer one."
            )
        device = self._valid_BK.device
        placed_BS = mask.query_positions
        if placed_BS is not None and self._lengths is None:
            # The caller knows where tokens stand, and which columns are padding.
            for layer in self.layers:
                layer.start, layer.columns_BS = start, None
            return mask, placed_BS.to(device)
        self._has_padding = self._has_padding or valid_BS is not None
        if self._lengths is not None:
            return self._place_by_row(self._lengths, mask, valid_BS, num_new)
        self._valid_BK[:, start:end] = True if valid_BS is None else valid_BS.to(device)
        if self._has_padding:
            held_BK = self._valid_BK[:, :end]
            mask = AttentionMask.padding(held_BK) & mask
            counts_BK = held_BK.cumsum(dim=1)
            before_B = counts_BK[:, start - 1] if start else 0
            _check_prefix(mask, before_B, counts_BK[:, -1])
            positions_BS = token_positions(held_BK)[:, start:].clamp(min=0)
        else:
            _check_prefix(mask, start, end)
            positions_BS = torch.arange(start, end, device=device)[None]
        for layer in self.layers:
            layer.start, layer.columns_BS = start, None
        return mask, positions_BS

    def held_columns(self) -> torch.Tensor:
        """Which of the columns given so far hold tokens: bool `[B, length]`, on the device.

        Raises:
            ValueError: rows that were rewound to different lengths.
        """
        if self._lengths is not None:
            raise ValueError(f"The rows have different lengths: {self._lengths}.")
        return self._valid_BK[:, : self.length]

    def _place_by_row(
        self,
        lengths: Sequence[int],
        mask: AttentionMask,
        valid_BS: torch.Tensor | None,
        num_new: int,
    ) -> tuple[AttentionMask, torch.Tensor]:
        if mask.custom_masks:
            raise ValueError(
                "A custom mask is given by columns, and the rows of this cache were rewound to"
                " different ones."
            )
        device = self._valid_BK.device
        lengths_B1 = torch.tensor(lengths, device=device)[:, None]
        columns_BS = lengths_B1 + torch.arange(num_new, device=device)
        # What was rewound, or given in a step that failed, is not held.
        self._valid_BK &= torch.arange(self.max_length, device=device) < lengths_B1
        before_B = self._valid_BK.sum(dim=1)
        new_BS = torch.ones_like(columns_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        self._valid_BK.scatter_(1, columns_BS, new_BS.to(device))
        held_BK = token_positions(self._valid_BK[:, : self.length + num_new])
        new_positions_BS = held_BK.gather(1, columns_BS)
        _check_prefix(mask, before_B, self._valid_BK.sum(dim=1))
        for layer in self.layers:
            layer.start, layer.columns_BS = self.length, columns_BS
        return mask.at_positions(new_positions_BS, held_BK), new_positions_BS.clamp(min=0)

    def end_step(self, num_new: int) -> None:
        self.length += num_new
        if self._lengths is not None:
            self._lengths = [length + num_new for length in self._lengths]

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.batch_size = len(rows_B)
        for layer in self.layers:
            layer.reorder(rows_B, self.length)
        self._valid_BK = self._valid_BK.index_select(0, rows_B)
        if self._lengths is not None:
            self._lengths = [self._lengths[row] for row in rows_B.tolist()]

    def rewind(self, lengths: Sequence[int]) -> None:
        held = self._lengths or [self.length] * self.batch_size
        if len(lengths) != len(held) or not all(
            0 <= new <= old for new, old in zip(lengths, held, strict=True)
        ):
            raise ValueError(f"The rows hold {held} columns; they cannot be cut to {lengths}.")
        self.length = max(lengths, default=0)
        self._lengths = None if min(lengths, default=0) == self.length else list(lengths)


# Sinks and window -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SlidingStep:
    """Where the new tokens of one step go; the same for every layer.

    Attributes:
        slots_BS: slot of each new column, int64 `[B or 1, S]`; the last slot is for what is not
            kept. None where all go to the slots from `start` on.
        start: first slot, where they go side by side.
        filled: slots that are attended to.
        attends_before_writing: new tokens push out keys that earlier new tokens still see, so
            the keys are the slots as they were and the new ones behind them.
        fills_sinks: some sink is written.
        sink_rotary: turns the sinks on, so that they stay within the trained distance.
    """

    slots_BS: torch.Tensor | None
    start: int
    filled: int
    attends_before_writing: bool
    fills_sinks: bool
    sink_rotary: RotaryTables | None


class _SlidingLayerCache(LayerCache):
    """Columns are slots: the sinks, the window's ring, and one for what is dropped."""

    def __init__(self, shape: CacheShape, sinks: int, window: int) -> None:
        super().__init__(shape, sinks + window + 1)
        self.sinks = sinks
        self.sink_keys = self.keys[:, :, :sinks].clone()
        self.step: _SlidingStep | None = None

    def update(
        self, keys_BGSD: torch.Tensor, values_BGSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.step
        assert step is not None
        if step.fills_sinks:
            self.keys[:, :, : self.sinks] = self.sink_keys  # a row may wait while another turns
        if step.attends_before_writing:
            seen_keys = torch.cat([self.keys[:, :, : step.filled], keys_BGSD], dim=2)
            seen_values = torch.cat([self.values[:, :, : step.filled], values_BGSD], dim=2)
        if step.slots_BS is None:
            slots = slice(step.start, step.start + keys_BGSD.shape[2])
            self.keys[:, :, slots] = keys_BGSD
            self.values[:, :, slots] = values_BGSD
        else:
            index_BGSD = step.slots_BS[:, None, :, None].expand(keys_BGSD.shape)
            self.keys.scatter_(2, index_BGSD, keys_BGSD.to(self.keys.dtype))
            self.values.scatter_(2, index_BGSD, values_BGSD.to(self.values.dtype))
        if step.fills_sinks:
            self.sink_keys = self.keys[:, :, : self.sinks].clone()
        if step.attends_before_writing:
            return seen_keys, seen_values
        if step.sink_rotary is not None:
            self.keys[:, :, : self.sinks] = apply_rotary(self.sink_keys, step.sink_rotary)
        return self.keys[:, :, : step.filled], self.values[:, :, : step.filled]

    def reorder(self, rows_B: torch.Tensor, filled: int) -> None:
        super().reorder(rows_B, filled)
        self.sink_keys = self.sink_keys.index_select(0, rows_B)


class SlidingWindowCache(AttentionCache):
    """The first `sinks` tokens of each row and the last `window`: generation without end.

    It answers what a forward without a cache answers under `mask.windowed(window, sinks)`, for as
    long as such a forward has positions. Behind `max_positions` a token still sees its window at
    the true distances, and sink `k` as if it stood itself at the last position that the model was
    made for: no distance grows beyond what was trained (positions within the cache, as arXiv
    2309.17453, section 3.2, has them).
    """

    def __init__(
        self, shape: CacheShape, window: int, sinks: int, max_positions: int, rope_theta: float
    ) -> None:
        """Allocate. Raises ValueError for `window` < 1, `sinks` < 0, or more than `max_positions`
        of both."""
        if window < 1 or sinks < 0 or sinks + window > max_positions:
            raise ValueError(
                f"Needs window >= 1, sinks >= 0 and at most {max_positions} (max_positions) of"
                f" both; got window {window} and {sinks} sinks."
            )
        self.layers: list[_SlidingLayerCache] = [
            _SlidingLayerCache(shape, sinks, window) for _ in range(shape.num_layers)
        ]
        self.batch_size, self.window, self.sinks = shape.batch_size, window, sinks
        self.max_positions = max_positions
        self.length = 0
        self._head_dim, self._rope_theta = shape.head_dim, rope_theta
        # One entry serves all rows until one of them holds padding.
        self._tokens_B = torch.zeros(1, device=shape.device, dtype=torch.long)
        self._tokens_after_B = self._tokens_B
        self._has_padding = False
        self._sinks_are_full = False

    @property
    def capacity(self) -> int:
        """Tokens kept a row."""
        return self.sinks + self.window

    def _place(
        self, mask: AttentionMask, valid_BS: torch.Tensor | None, num_new: int
    ) -> tuple[AttentionMask, torch.Tensor]:
        if mask.custom_masks:
            raise ValueError(
                "A custom mask is given by columns, and a sliding window cache does not keep them."
                " Use a static cache."
            )
        device, end = self._tokens_B.device, self.length + num_new
        before_B = self._tokens_B
        if valid_BS is None:
            new_BS = before_B[:, None] + torch.arange(num_new, device=device)
        else:
            valid_BS = valid_BS.to(device)
            ranks_BS = token_positions(valid_BS)
            new_BS = torch.where(valid_BS, before_B[:, None] + ranks_BS, -1)
        after_B = before_B + (num_new if valid_BS is None else valid_BS.sum(dim=1))
        _check_prefix(mask, before_B, after_B)
        sink_rotary = self._sink_rotary(new_BS) if end > self.max_positions else None
        self._has_padding = self._has_padding or valid_BS is not None
        # Without padding, what a row holds is known without asking the device.
        is_uniform = not self._has_padding
        is_implied = all(w >= self.window and s >= self.sinks for w, s in mask.windows)
        slots_BS, start = None, self.length
        if is_uniform and end <= self.capacity:
            filled, attends_before_writing = end, False
        elif is_uniform and is_implied and num_new == 1:
            filled, attends_before_writing = self.capacity, False
            start = self.sinks + (self.length - self.sinks) % self.window
            mask = AttentionMask.bidirectional()  # exactly the tokens that it may see are held
        else:
            filled, attends_before_writing = self.capacity, num_new > 1
            slots_BS = self._slots(new_BS, after_B)
            held_BK = self._positions_of_slots(before_B if attends_before_writing else after_B)
            if attends_before_writing:
                rows = max(len(held_BK), len(new_BS))
                held_BK = torch.cat([held_BK.expand(rows, -1), new_BS.expand(rows, -1)], dim=1)
            mask = mask.windowed(self.window, self.sinks).at_positions(new_BS, held_BK)
        step = _SlidingStep(
            slots_BS=slots_BS,
            start=start,
            filled=filled,
            attends_before_writing=attends_before_writing,
            fills_sinks=self.sinks > 0 and not self._sinks_are_full,
            sink_rotary=sink_rotary,
        )
        for layer in self.layers:
            layer.step = step
        self._tokens_after_B = after_B
        return mask, new_BS.clamp(min=0)

    def _sink_rotary(self, new_BS: torch.Tensor) -> RotaryTables | None:
        """How far each row's sinks turn on so that no distance passes `max_positions - 1`."""
        beyond_BS = (new_BS - (self.max_positions - 1)).clamp(min=0)
        if beyond_BS.shape[1] > 1 and bool(beyond_BS.any()):
            raise ValueError(
                f"Behind position {self.max_positions} (max_positions) a sliding window cache takes"
                f" one token a step; got {beyond_BS.shape[1]}."
            )
        if not self.sinks:
            return None
        return rotary_tables(beyond_BS[:, -1:], self._head_dim, self._rope_theta)

    def _slots(self, positions_BS: torch.Tensor, after_B: torch.Tensor) -> torch.Tensor:
        """The slot of each token; the last one for padding and for what this step pushes out."""
        ring_BS = self.sinks + (positions_BS - self.sinks) % self.window
        slots_BS = torch.where(positions_BS < self.sinks, positions_BS, ring_BS)
        is_pushed_out = (positions_BS >= self.sinks) & (
            positions_BS < after_B[:, None] - self.window
        )
        return torch.where((positions_BS < 0) | is_pushed_out, self.capacity, slots_BS)

    def _positions_of_slots(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Position of the token in each slot, `[B or 1, K]`, in rows of so many; -1 = none."""
        device = tokens_B.device
        sinks_K = torch.arange(self.sinks, device=device)
        sinks_BK = torch.where(sinks_K < tokens_B[:, None], sinks_K, -1)
        newest_B1 = tokens_B[:, None] - self.sinks - 1  # counted from the first behind the sinks
        age_BK = (newest_B1 - torch.arange(self.window, device=device)) % self.window
        ring_BK = torch.where(newest_B1 >= age_BK, self.sinks + newest_B1 - age_BK, -1)
        return torch.cat([sinks_BK, ring_BK], dim=1)

    def end_step(self, num_new: int) -> None:
        self.length += num_new
        self._tokens_B = self._tokens_after_B
        if not self._sinks_are_full:
            least = self._tokens_B.min() if self._has_padding else self.length
            self._sinks_are_full = int(least) >= self.sinks

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.batch_size = len(rows_B)
        for layer in self.layers:
            layer.reorder(rows_B, self.capacity)
        if len(self._tokens_B) > 1:
            self._tokens_B = self._tokens_B.index_select(0, rows_B)

    def rewind(self, lengths: Sequence[int]) -> None:
        raise ValueError(
            "A sliding window cache has written over what it would go back to. Use a static cache."
        )

"""Attention masks: one type says which query may see which key, in every layer and mode.

A row's tokens are counted 0, 1, 2, ... and padding is not: `p(q)` and `p(k)` are these positions
of a query and a key. An `AttentionMask` is a conjunction of terms over them:

    causal          p(k) <= p(q)
    prefix          p(k) <= p(q), or both inside the row's prefix
    windowed        p(k) > p(q) - window, or k is a sink: p(k) < sinks
    sliding_window  causal and windowed
    padding         neither q nor k is padding
    custom          a given boolean or additive tensor, by columns

So a row answers the same wherever its padding stands. Nothing is materialised before attention
asks for it, and nothing at all where the kernel's own causal flag, or no mask, says the same.
Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FORBIDDING = -1e4
"""An additive entry this low or lower forbids: the weight beside any allowed key is 0 in every
dtype. All usual conventions fall under it: -1e4, -1e9, the dtype's minimum and -inf."""

ScoresShape = tuple[int, int, int, int]
"""(B, H, Q, K) of the attention scores that a mask is for."""


def mask_value(dtype: torch.dtype) -> float:
    """The number that stands for "not allowed" in an additive mask: the dtype's finite minimum.

    Raises:
        ValueError: the dtype is not fp16, bf16, fp32 or fp64.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"An additive mask is fp16, bf16, fp32 or fp64; got {dtype}.")
    return torch.finfo(dtype).min


def token_positions(valid_BK: torch.Tensor) -> torch.Tensor:
    """Position of each token among its row's tokens, int64 `[B, K]`; -1 where padding stands."""
    return torch.where(valid_BK, valid_BK.long().cumsum(dim=1) - 1, -1)


@lru_cache(maxsize=32)
def causal_mask(
    num_queries: int, num_keys: int, query_offset: int, device: torch.device
) -> torch.Tensor:
    """Bool `[Q, K]`, True where `k <= q + query_offset`; kept, because every step asks for it."""
    with torch.inference_mode(False):  # kept tensors must serve training too
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        return allowed.tril(query_offset)


@dataclass(frozen=True)
class LoweredMask:
    """What an attention kernel is given.

    Attributes:
        is_causal: the kernel's own flag says it all; `mask` is None.
        mask: bool, or float to be added, broadcastable to `[B, H, Q, K]`. In a row without any
            allowed key all entries are False, or -inf.
        alive: bool, broadcastable to `[B, H, Q, 1]`: rows with an allowed key; None = all.
    """

    is_causal: bool = False
    mask: torch.Tensor | None = None
    alive: torch.Tensor | None = None

    @cached_property
    def opened(self) -> torch.Tensor | None:
        """`mask` with every dead row opened, for kernels whose softmax would not be finite."""
        if self.mask is None or self.alive is None:
            return self.mask
        with torch.inference_mode(False):
            if self.mask.dtype == torch.bool:
                return self.mask | ~self.alive
            return self.mask.masked_fill(~self.alive, 0.0)

    @cached_property
    def added(self) -> torch.Tensor | None:
        """`opened` as what is added to scores, of which -inf forbids: float, bfloat16 for bool.

        One addition, whose gradient is free; bfloat16 holds both of its numbers exactly.
        """
        if self.opened is None or self.opened.dtype != torch.bool:
            return self.opened
        return _bias_of(self.opened)


def _bias_of(allowed: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        bias = torch.zeros(allowed.shape, dtype=torch.bfloat16, device=allowed.device)
        return bias.masked_fill_(~allowed, -torch.inf)


@lru_cache(maxsize=32)
def causal_bias(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """The causal mask `[Q, K]` as `LoweredMask.added` has it; kept."""
    return _bias_of(causal_mask(num_queries, num_keys, 0, device))


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which query may see which key. Build it by the named constructors and combine with `&`.

    Query 0 stands at key column `query_offset`: for a cached step that is the number of keys that
    the cache held before it.
    """

    is_causal: bool = False
    prefix_lengths_B: torch.Tensor | None = None
    windows: tuple[tuple[int, int], ...] = ()
    valid_BK: torch.Tensor | None = None
    has_padding: bool = False
    custom_masks: tuple[torch.Tensor, ...] = ()
    query_offset: int = 0
    positions: tuple[torch.Tensor, torch.Tensor] | None = None
    _lowered: dict[tuple[object, ...], LoweredMask] = field(default_factory=dict, repr=False)

    @classmethod
    def bidirectional(cls) -> AttentionMask:
        """Every query sees every key."""
        return cls()

    @classmethod
    def causal(cls, query_offset: int = 0) -> AttentionMask:
        """A query sees itself and what stands before it."""
        return cls(is_causal=True, query_offset=query_offset)

    @classmethod
    def prefix(
        cls, lengths: int | Sequence[int] | torch.Tensor, query_offset: int = 0
    ) -> AttentionMask:
        """Both ways inside the first `lengths` tokens (one number, or one a row), causal after.

        The prefix language model of arXiv 1910.10683, figure 4.

        Raises:
            ValueError: a tensor that is not one-dimensional.
        """
        lengths_B = torch.as_tensor(lengths, dtype=torch.long)
        if lengths_B.dim() > 1:
            raise ValueError(f"Prefix lengths are [B] or one number; got {tuple(lengths_B.shape)}.")
        return cls(is_causal=True, prefix_lengths_B=lengths_B.view(-1), query_offset=query_offset)

    @classmethod
    def sliding_window(cls, window: int, sinks: int = 0, query_offset: int = 0) -> AttentionMask:
        """Causal over the last `window` tokens, and the first `sinks` always (arXiv 2309.17453).

        Raises:
            ValueError: `window` below 1 or `sinks` below 0.
        """
        return cls.causal(query_offset).windowed(window, sinks)

    @classmethod
    def padding(cls, valid: torch.Tensor) -> AttentionMask:
        """Keys and queries where `valid` is 0 are padding, on whichever side they stand.

        Args:
            valid: `[B, K]`, bool or 0/1. On an accelerator its values are not read, because that
                would wait for the device: only a mask on the CPU is recognised as all ones.

        Raises:
            ValueError: another number of dimensions.
        """
        if valid.dim() != 2:
            raise ValueError(f"A padding mask is [B, K]; got shape {tuple(valid.shape)}.")
        valid_BK = valid.bool()
        has_padding = valid_BK.device.type != "cpu" or not bool(valid_BK.all())
        return cls(valid_BK=valid_BK, has_padding=has_padding)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | torch.Tensor, num_keys: int, side: str = "right"
    ) -> AttentionMask:
        """Row b holds `lengths[b]` tokens; the rest of its `num_keys` is padding on that side.

        Raises:
            ValueError: lengths that are not one a row, or outside of 0 to `num_keys` (looked at on
                the CPU alone); a side that is neither left nor right.
        """
        lengths_B = torch.as_tensor(lengths, dtype=torch.long)
        if lengths_B.dim() != 1:
            raise ValueError(f"Lengths are [B]; got shape {tuple(lengths_B.shape)}.")
        if lengths_B.device.type == "cpu" and bool(
            ((lengths_B < 0) | (lengths_B > num_keys)).any()
        ):
            raise ValueError(f"Lengths are 0 to {num_keys} (num_keys); got {lengths_B.tolist()}.")
        if side not in ("left", "right"):
            raise ValueError(f"Padding stands left or right; got {side!r}.")
        column_K = torch.arange(num_keys, device=lengths_B.device)
        if side == "left":
            column_K = column_K.flip(0)
        return cls.padding(column_K < lengths_B[:, None])

    @classmethod
    def custom(cls, mask: torch.Tensor) -> AttentionMask:
        """A given mask: bool (True = allowed) or float to be added to the scores.

        Args:
            mask: `[Q, K]`, `[B, Q, K]` or `[B or 1, H or 1, Q, K]`. Added numbers of `FORBIDDING`
                and below forbid.

        Raises:
            ValueError: another number of dimensions or dtype.
        """
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"A mask has 2 to 4 dimensions; got shape {tuple(mask.shape)}.")
        if mask.dtype != torch.bool and mask.dtype not in _FLOATS:
            raise ValueError(f"A mask is boolean or floating; got {mask.dtype}.")
        if mask.dim() < 4:
            mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
        return cls(custom_masks=(mask,))

    @classmethod
    def from_tensor(cls, mask: torch.Tensor, shape: ScoresShape | None = None) -> AttentionMask:
        """The mask that a tensor means: bool, 0/1 in int or float, or additive (zeros and below).

        The values of a tensor that is not boolean are read, which waits for an accelerator.

        Args:
            mask: padding as `[B, K]`, `[B, 1, K]` or `[B, 1, 1, K]`; or `[B, Q, K]`; or
                `[B or 1, H or 1, Q, K]`.
            shape: (B, H, Q, K) that it is for, to refuse another one at once.

        Raises:
            ValueError: shape or values that fit none of these, or more than one.
        """
        if not 2 <= mask.dim() <= 4:
            raise ValueError(
                "Expected a mask [B, K], [B, 1, K], [B, Q, K] or [B, H, Q, K];"
                f" got shape {tuple(mask.shape)}."
            )
        given = tuple(mask.shape)
        mask = _as_bool_or_additive(mask)
        is_padding = mask.shape[1:-1].numel() == 1 and not (
            mask.is_floating_point() and bool(((mask < 0) & (mask > FORBIDDING)).any())
        )
        if is_padding:
            valid_BK = mask.reshape(mask.shape[0], mask.shape[-1])
            read = cls.padding(valid_BK if valid_BK.dtype == torch.bool else valid_BK == 0)
        else:
            read = cls.custom(mask[:, None, None] if mask.dim() == 2 else mask)
        if shape is not None:
            read._check_shapes(shape, given)
        return read

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Allowed where both allow it.

        Raises:
            ValueError: query offsets or padding shapes that differ, or a mask that `at_positions`
                placed already.
        """
        if self.query_offset and other.query_offset and self.query_offset != other.query_offset:
            raise ValueError(f"Query offsets differ: {self.query_offset} and {other.query_offset}.")
        if self.positions is not None or other.positions is not None:
            raise ValueError("Combine masks before at_positions places them.")
        if self.is_causal and other.is_causal:
            lengths_B = _intersect_prefixes(self.prefix_lengths_B, other.prefix_lengths_B)
        else:
            lengths_B = self.prefix_lengths_B if self.is_causal else other.prefix_lengths_B
        if self.valid_BK is None or other.valid_BK is None:
            valid_BK = other.valid_BK if self.valid_BK is None else self.valid_BK
        elif self.valid_BK.shape[1] != other.valid_BK.shape[1]:
            raise ValueError(
                f"Padding masks of shapes {tuple(self.valid_BK.shape)} and"
                f" {tuple(other.valid_BK.shape)} are for other numbers of keys."
            )
        else:
            valid_BK = self.valid_BK & other.valid_BK
        return AttentionMask(
            is_causal=self.is_causal or other.is_causal,
            prefix_lengths_B=lengths_B,
            windows=self.windows + other.windows,
            valid_BK=valid_BK,
            has_padding=self.has_padding or other.has_padding,
            custom_masks=self.custom_masks + other.custom_masks,
            query_offset=self.query_offset or other.query_offset,
        )

    def windowed(self, window: int, sinks: int = 0) -> AttentionMask:
        """The same mask, less the tokens farther back than `window`, the first `sinks` excepted.

        Unlike `& sliding_window`, which is causal, it leaves a prefix its both ways.

        Raises:
            ValueError: `window` below 1 or `sinks` below 0.
        """
        if window < 1 or sinks < 0:
            raise ValueError(f"Needs window >= 1 and sinks >= 0; got {window} and {sinks}.")
        return replace(self, windows=(*self.windows, (window, sinks)), _lowered={})

    @property
    def known_padding(self) -> torch.Tensor | None:
        """Bool `[B, K]`, False where padding stands; None where it is known that there is none."""
        if self.positions is not None:
            key_BK = self.positions[1]
            return (
                None if key_BK.device.type == "cpu" and bool((key_BK >= 0).all()) else key_BK >= 0
            )
        return self.valid_BK if self.has_padding else None

    @property
    def query_positions(self) -> torch.Tensor | None:
        """Int64 `[B or 1, Q]`, 0 for padding, where `at_positions` has placed the queries."""
        return None if self.positions is None else self.positions[0].clamp(min=0)

    def at_offset(self, query_offset: int) -> AttentionMask:
        """The same mask for queries that begin at key column `query_offset`."""
        return replace(self, query_offset=query_offset, _lowered={})

    def for_cached_step(self, query_offset: int, num_queries: int) -> AttentionMask:
        """The part of a whole sequence's mask that a step of `num_queries` new tokens needs.

        Square custom masks over at least all keys so far are cut to their rows and columns.
        Padding is left out: the cache knows it.

        Raises:
            ValueError: a query would have to see tokens that come later than this step.
        """
        if not self.is_causal and not self.custom_masks:
            raise ValueError(
                "A bidirectional mask cannot be used with a cache: a later token changes every"
                " earlier state, so nothing can be kept. Give a causal or prefix mask, or no cache."
            )
        customs = tuple(
            _cut_custom(custom, query_offset, query_offset + num_queries)
            for custom in self.custom_masks
        )
        return replace(
            self,
            query_offset=query_offset,
            custom_masks=customs,
            valid_BK=None,
            has_padding=False,
            _lowered={},
        )

    def at_positions(
        self, query_positions_BQ: torch.Tensor, key_positions_BK: torch.Tensor
    ) -> AttentionMask:
        """The same rules for queries and keys in any order, at the given token positions.

        Args:
            query_positions_BQ: int64 `[B or 1, Q]`, -1 = padding.
            key_positions_BK: int64 `[B or 1, K]`, -1 = padding, or a column that holds nothing.
        """
        return replace(
            self,
            valid_BK=None,
            has_padding=False,
            positions=(query_positions_BQ, key_positions_BK),
            _lowered={},
        )

    def to_bool(
        self, num_queries: int, num_keys: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """True where allowed: bool `[B or 1, H or 1, Q, K]`.

        Raises:
            ValueError: padding or a custom mask does not have this many queries or keys.
        """
        self._check_shapes((-1, -1, num_queries, num_keys))
        device = torch.device(device)
        q, k = self._positions(num_queries, num_keys, device)
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        if self.is_causal:
            if self.positions is None:  # tokens stand in the order of their columns
                causal = causal_mask(num_queries, num_keys, self.query_offset, device)[None, None]
            else:
                causal = k <= q
            if self.prefix_lengths_B is not None:
                lengths = self.prefix_lengths_B.to(device).view(-1, 1, 1, 1)
                causal = causal | ((k < lengths) & (q < lengths))
            allowed = allowed & causal
        for window, sinks in self.windows:
            allowed = allowed & ((k > q - window) | (k < sinks))
        for custom in self.custom_masks:
            custom = custom.to(device)
            allowed = allowed & (custom if custom.dtype == torch.bool else custom > FORBIDDING)
        if self.has_padding or self.positions is not None:
            allowed = allowed & (k >= 0) & (q >= 0)
        return allowed.expand(*allowed.shape[:2], num_queries, num_keys)

    def to_additive(
        self,
        num_queries: int,
        num_keys: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """0 (or a custom mask's own number) where allowed, `mask_value(dtype)` elsewhere.

        Shape `[B or 1, H or 1, Q, K]`. Raises ValueError as `to_bool` and `mask_value` do.
        """
        lowest = mask_value(dtype)
        allowed = self.to_bool(num_queries, num_keys, device)
        additive = torch.zeros(allowed.shape, dtype=dtype, device=device)
        for custom in self.custom_masks:
            if custom.dtype != torch.bool:
                additive = additive + custom.to(device).clamp(min=FORBIDDING).to(dtype)
        return additive.masked_fill(~allowed, lowest)

    def lower(self, shape: ScoresShape, dtype: torch.dtype, device: torch.device) -> LoweredMask:
        """What the kernel is given for scores of this shape; computed once for all layers.

        Raises:
            ValueError: padding, prefix or a custom mask does not fit the shape.
        """
        key = (shape, dtype, device)
        if key not in self._lowered:
            with torch.inference_mode(False):  # a mask made while predicting may be trained with
                self._lowered[key] = self._lower(shape, dtype, device)
        return self._lowered[key]

    def _lower(self, shape: ScoresShape, dtype: torch.dtype, device: torch.device) -> LoweredMask:
        self._check_shapes(shape)
        num_queries, num_keys = shape[2:]
        mask = self._without_idle_terms(num_queries, num_keys)
        if not (
            mask.has_padding or mask.custom_masks or mask.windows or mask.positions is not None
        ):
            if not mask.is_causal:
                return LoweredMask()
            if mask.prefix_lengths_B is None:
                if not mask.query_offset and num_queries == num_keys:
                    return LoweredMask(is_causal=True)
                offset = mask.query_offset
                return LoweredMask(mask=causal_mask(num_queries, num_keys, offset, device))
        allowed = mask.to_bool(num_queries, num_keys, device)
        alive = None
        if mask.custom_masks or mask.positions is not None:
            alive = allowed.any(dim=-1, keepdim=True)
        elif mask.has_padding:
            alive = mask._positions(num_queries, num_keys, device)[0] >= 0  # each sees itself
        if alive is not None and alive.device.type == "cpu" and bool(alive.all()):
            alive = None
        if all(custom.dtype == torch.bool for custom in mask.custom_masks):
            return LoweredMask(mask=allowed, alive=alive)
        additive = mask.to_additive(num_queries, num_keys, dtype, device)
        if alive is not None:
            additive = additive.masked_fill(~alive, -torch.inf)
        return LoweredMask(mask=additive, alive=alive)

    def _without_idle_terms(self, num_queries: int, num_keys: int) -> AttentionMask:
        """The same mask for these numbers, less the terms that forbid (or allow) nothing more."""
        if self.positions is not None:
            return self
        end = self.query_offset + num_queries
        windows = tuple((window, sinks) for window, sinks in self.windows if window < end)
        is_causal, lengths_B = self.is_causal, self.prefix_lengths_B
        if lengths_B is not None and lengths_B.device.type == "cpu":
            if int(lengths_B.min()) >= num_keys:
                is_causal, lengths_B = False, None
            elif int(lengths_B.max()) <= 1:
                lengths_B = None
        if num_queries == 1 and end == num_keys:
            is_causal, lengths_B = False, None  # the last token sees all before it
        return replace(
            self, is_causal=is_causal, prefix_lengths_B=lengths_B, windows=windows, _lowered={}
        )

    def _positions(
        self, num_queries: int, num_keys: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token positions of queries `[B or 1, 1, Q, 1]` and keys `[B or 1, 1, 1, K]`."""
        offset = self.query_offset
        if self.positions is not None:
            query_BQ, key_BK = (positions.to(device) for positions in self.positions)
        else:
            if self.has_padding and self.valid_BK is not None:
                key_BK = token_positions(self.valid_BK.to(device))
            else:
                key_BK = torch.arange(num_keys, device=device)[None]
            query_BQ = key_BK[:, offset : offset + num_queries]
        return query_BQ[:, None, :, None], key_BK[:, None, None, :]

    def _check_shapes(self, shape: ScoresShape, given: tuple[int, ...] | None = None) -> None:
        """Refuse what does not fit (B, H, Q, K); -1 is any. `given` is the shape to speak of."""
        batch, heads, num_queries, num_keys = shape
        if self.positions is None and self.query_offset + num_queries > num_keys:
            raise ValueError(
                f"{num_queries} queries from column {self.query_offset} on do not fit"
                f" {num_keys} keys."
            )
        rows = [self.valid_BK, self.prefix_lengths_B, *(self.positions or ())]
        for tensor in [*rows, *self.custom_masks]:
            if tensor is not None and batch > 0 and tensor.shape[0] not in (1, batch):
                raise ValueError(
                    f"The mask has shape {given or tuple(tensor.shape)}: {tensor.shape[0]} rows;"
                    f" expected {batch} for scores {_words(shape)}."
                )
        if self.valid_BK is not None and self.valid_BK.shape[1] != num_keys:
            raise ValueError(
                f"The padding mask has shape {given or tuple(self.valid_BK.shape)}; expected"
                f" [B, {num_keys}] for scores {_words(shape)}."
            )
        for custom in self.custom_masks:
            _, mask_heads, mask_queries, mask_keys = custom.shape
            if (
                (heads > 0 and mask_heads not in (1, heads))
                or mask_queries not in (1, num_queries)
                or mask_keys != num_keys
            ):
                raise ValueError(
                    f"The mask has shape {given or tuple(custom.shape)}; expected {_words(shape)}."
                )


def _words(shape: ScoresShape) -> str:
    sizes = (name if size < 0 else str(size) for name, size in zip("BHQK", shape, strict=True))
    return f"[{', '.join(sizes)}]"


def _as_bool_or_additive(mask: torch.Tensor) -> torch.Tensor:
    """A tensor's values as `AttentionMask.from_tensor` reads them."""
    if mask.dtype == torch.bool:
        return mask
    ones = mask == 1
    if bool((ones | (mask == 0)).all()):
        if mask.is_floating_point() and not bool(ones.any()):
            raise ValueError(
                "A float mask of zeros alone is ambiguous: additive it allows everything,"
                " as 0/1 it allows nothing. Give a boolean mask."
            )
        return mask.bool()
    if not mask.is_floating_point() or bool((mask > 0).any()) or bool(mask.isnan().any()):
        raise ValueError(
            "A mask holds booleans, 0 and 1, or floats <= 0 to be added to the scores;"
            f" got {mask.dtype} with values from {mask.min()} to {mask.max()}."
        )
    return mask


def _intersect_prefixes(
    first_B: torch.Tensor | None, second_B: torch.Tensor | None
) -> torch.Tensor | None:
    """Where both masks let a prefix see both ways: the shorter of the two; none if one has none."""
    if first_B is None or second_B is None:
        return None
    return torch.minimum(first_B, second_B.to(first_B.device))


def _cut_custom(custom: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Rows `start` to `end` and the columns before `end` of a square mask; others as they are."""
    num_rows, num_columns = custom.shape[-2:]
    if num_rows != num_columns or num_columns < end:
        return custom
    rows = custom[..., start:end, :]
    later = rows[..., end:]
    allowed = later if later.dtype == torch.bool else later > FORBIDDING
    if bool(allowed.any()):
        raise ValueError(
            f"The mask lets queries {start} to {end - 1} see later keys, which the cache does not"
            " hold. Read what sees each other in one step."
        )
    return rows[..., :end]

"""Attention masks: one type says which query may see which key, in every layer and mode.

An `AttentionMask` is a conjunction of terms over query index `q` and key index `k`:

    causal          k <= q
    prefix          k <= q, or both inside the row's prefix
    sliding_window  k > q - window, or k is an attention sink (k < sinks)
    padding         neither q nor k is padding
    custom          a given boolean or additive tensor

Nothing is materialised before attention asks for it, and nothing at all where the kernel's own
causal flag, or no mask, says the same. Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mask_value(dtype: torch.dtype) -> float:
    """The number that stands for "not allowed" in an additive mask: the dtype's finite minimum.

    Raises:
        ValueError: the dtype is not fp16, bf16, fp32 or fp64.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"An additive mask is fp16, bf16, fp32 or fp64; got {dtype}.")
    return torch.finfo(dtype).min


@dataclass(frozen=True)
class LoweredMask:
    """What the attention kernel is given.

    `is_causal` and `mask` never both hold. In `mask` (bool, or float to be added, broadcastable to
    `[B, H, Q, K]`) a row without any allowed key is opened, so that softmax stays finite; `alive`
    (bool, broadcastable to `[B, H, Q, 1]`, None if every row is) says which rows count.
    """

    is_causal: bool = False
    mask: torch.Tensor | None = None
    alive: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which query may see which key. Build it by the named constructors and combine with `&`.

    Query row 0 stands at key index `query_offset`: for a cached step that is the number of keys
    that the cache held before it.
    """

    is_causal: bool = False
    prefix_ends_B: torch.Tensor | None = None
    windows: tuple[tuple[int, int], ...] = ()
    valid_BK: torch.Tensor | None = None
    custom_masks: tuple[torch.Tensor, ...] = ()
    query_offset: int = 0
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
        """Both ways inside the first `lengths` positions (one number, or one a row), causal after.

        Raises:
            ValueError: a tensor that is not one-dimensional.
        """
        ends_B = torch.as_tensor(lengths, dtype=torch.long)
        if ends_B.dim() > 1:
            raise ValueError(f"Prefix lengths are [B] or one number; got {tuple(ends_B.shape)}.")
        return cls(is_causal=True, prefix_ends_B=ends_B.view(-1), query_offset=query_offset)

    @classmethod
    def sliding_window(cls, window: int, sinks: int = 0, query_offset: int = 0) -> AttentionMask:
        """Causal over the last `window` keys, and the first `sinks` keys always (arXiv 2309.17453).

        Raises:
            ValueError: `window` below 1 or `sinks` below 0.
        """
        if window < 1 or sinks < 0:
            raise ValueError(f"Needs window >= 1 and sinks >= 0; got {window} and {sinks}.")
        return cls(is_causal=True, windows=((window, sinks),), query_offset=query_offset)

    @classmethod
    def padding(cls, valid: torch.Tensor) -> AttentionMask:
        """Keys and queries where `valid` is 0 are padding, on whichever side they stand.

        Args:
            valid: `[B, K]`, bool or 0/1.

        Raises:
            ValueError: another number of dimensions.
        """
        if valid.dim() != 2:
            raise ValueError(f"A padding mask is [B, K]; got shape {tuple(valid.shape)}.")
        valid_BK = valid.bool()
        # Reading the values would wait for an accelerator, so only a CPU mask is looked at.
        if valid_BK.device.type == "cpu" and bool(valid_BK.all()):
            return cls()
        return cls(valid_BK=valid_BK)

    @classmethod
    def from_lengths(cls, lengths_B: torch.Tensor, num_keys: int) -> AttentionMask:
        """Right padding: row b holds `lengths_B[b]` tokens and then padding up to `num_keys`."""
        return cls.padding(torch.arange(num_keys, device=lengths_B.device) < lengths_B[:, None])

    @classmethod
    def custom(cls, mask: torch.Tensor) -> AttentionMask:
        """A given mask: bool (True = allowed) or float to be added to the scores.

        Args:
            mask: `[Q, K]`, `[B, Q, K]` or `[B or 1, H or 1, Q, K]`.

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
    def from_tensor(cls, mask: torch.Tensor) -> AttentionMask:
        """The mask that a tensor means: bool, 0/1 in int or float, or additive (zeros and below).

        Args:
            mask: `[B, K]` or `[B, 1, K]` (padding), `[B, Q, K]` or `[B or 1, H or 1, Q, K]`.

        Raises:
            ValueError: shape or values that fit none of these, or more than one.
        """
        if not 2 <= mask.dim() <= 4:
            raise ValueError(
                "Expected a mask [B, K], [B, 1, K], [B, Q, K] or [B, H, Q, K];"
                f" got shape {tuple(mask.shape)}."
            )
        if mask.dtype != torch.bool:
            is_binary = bool(((mask == 0) | (mask == 1)).all())
            if is_binary and mask.is_floating_point() and not bool((mask == 1).any()):
                raise ValueError(
                    "A float mask of zeros alone is ambiguous: additive it allows everything,"
                    " as 0/1 it allows nothing. Give a boolean mask."
                )
            if is_binary:
                mask = mask.bool()
            elif not mask.is_floating_point() or bool((mask > 0).any()) or bool(mask.isnan().any()):
                raise ValueError(
                    "A mask holds booleans, 0 and 1, or numbers <= 0 to be added to the scores;"
                    f" got {mask.dtype} with values from {mask.min()} to {mask.max()}."
                )
        if mask.dim() == 2 or (mask.dim() == 3 and mask.shape[1] == 1):
            valid_BK = mask.reshape(mask.shape[0], mask.shape[-1])
            return cls.padding(valid_BK if valid_BK.dtype == torch.bool else valid_BK == 0)
        return cls.custom(mask)

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Allowed where both allow it.

        Raises:
            ValueError: both have prefixes or query offsets, and these differ.
        """
        if self.query_offset and other.query_offset and self.query_offset != other.query_offset:
            raise ValueError(f"Query offsets differ: {self.query_offset} and {other.query_offset}.")
        if self.is_causal and other.is_causal:
            ends_B = _intersect_prefixes(self.prefix_ends_B, other.prefix_ends_B)
        else:
            ends_B = self.prefix_ends_B if self.is_causal else other.prefix_ends_B
        if self.valid_BK is None or other.valid_BK is None:
            valid_BK = other.valid_BK if self.valid_BK is None else self.valid_BK
        else:
            valid_BK = self.valid_BK & other.valid_BK
        return AttentionMask(
            is_causal=self.is_causal or other.is_causal,
            prefix_ends_B=ends_B,
            windows=self.windows + other.windows,
            valid_BK=valid_BK,
            custom_masks=self.custom_masks + other.custom_masks,
            query_offset=self.query_offset or other.query_offset,
        )

    def at_offset(self, query_offset: int) -> AttentionMask:
        """The same mask for queries that begin at key index `query_offset`."""
        return replace(self, query_offset=query_offset, _lowered={})

    def to_bool(
        self, num_queries: int, num_keys: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """True where allowed: bool `[B or 1, H or 1, Q, K]`. Additive customs allow what is finite.

        Raises:
            ValueError: padding or a custom mask does not have this many queries or keys.
        """
        self._check_shapes(num_queries, num_keys)
        key_K = torch.arange(num_keys, device=device)
        query_Q1 = torch.arange(num_queries, device=device)[:, None] + self.query_offset
        allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
        if self.is_causal:
            causal_QK = key_K <= query_Q1
            if self.prefix_ends_B is not None:
                ends_B11 = self.prefix_ends_B.to(device)[:, None, None]
                causal_QK = causal_QK | ((key_K < ends_B11) & (query_Q1 < ends_B11))
                allowed = allowed & causal_QK[:, None]
            else:
                allowed = allowed & causal_QK
        for window, sinks in self.windows:
            allowed = allowed & ((key_K > query_Q1 - window) | (key_K < sinks))
        if self.valid_BK is not None:
            valid_BK = self.valid_BK.to(device)
            queries_BQ = valid_BK[:, self.query_offset : self.query_offset + num_queries]
            allowed = allowed & valid_BK[:, None, None, :] & queries_BQ[:, None, :, None]
        for custom in self.custom_masks:
            custom = custom.to(device)
            if custom.dtype != torch.bool:
                custom = custom > mask_value(custom.dtype)
            allowed = allowed & custom
        return allowed

    def to_additive(
        self,
        num_queries: int,
        num_keys: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """0 (or a custom mask's own number) where allowed, `mask_value(dtype)` elsewhere."""
        lowest = mask_value(dtype)
        allowed = self.to_bool(num_queries, num_keys, device)
        additive = torch.zeros(allowed.shape, dtype=dtype, device=device)
        for custom in self.custom_masks:
            if custom.dtype != torch.bool:
                additive = additive + custom.to(device).clamp(min=lowest).to(dtype)
        return additive.masked_fill(~allowed, lowest)

    def lower(
        self, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
    ) -> LoweredMask:
        """What the kernel is given for this many queries and keys; computed once for all layers."""
        key = (num_queries, num_keys, dtype, str(device))
        if key not in self._lowered:
            self._lowered[key] = self._lower(num_queries, num_keys, dtype, device)
        return self._lowered[key]

    def _lower(
        self, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
    ) -> LoweredMask:
        self._check_shapes(num_queries, num_keys)
        if self.valid_BK is None and not self.custom_masks and not self.windows:
            if not self.is_causal or (num_queries == 1 and self.query_offset == num_keys - 1):
                return LoweredMask()
            if self.prefix_ends_B is None and not self.query_offset and num_queries == num_keys:
                return LoweredMask(is_causal=True)
        allowed = self.to_bool(num_queries, num_keys, device)
        alive = allowed.any(dim=-1, keepdim=True)
        if any(custom.dtype != torch.bool for custom in self.custom_masks):
            additive = self.to_additive(num_queries, num_keys, dtype, device)
            return LoweredMask(mask=additive.masked_fill(~alive, 0.0), alive=alive)
        return LoweredMask(mask=allowed | ~alive, alive=alive)

    def _check_shapes(self, num_queries: int, num_keys: int) -> None:
        if self.valid_BK is not None and self.valid_BK.shape[1] != num_keys:
            raise ValueError(
                f"The padding mask has shape {tuple(self.valid_BK.shape)}; expected"
                f" [B, {num_keys}] for {num_queries} queries and {num_keys} keys."
            )
        for custom in self.custom_masks:
            if (custom.shape[-2] not in (1, num_queries)) or custom.shape[-1] != num_keys:
                raise ValueError(
                    f"The mask has shape {tuple(custom.shape)}; expected"
                    f" [B, H, {num_queries}, {num_keys}]."
                )


def _intersect_prefixes(
    first_B: torch.Tensor | None, second_B: torch.Tensor | None
) -> torch.Tensor | None:
    """Where both masks let a prefix see both ways: the shorter of the two; none if one has none."""
    if first_B is None or second_B is None:
        return None
    return torch.minimum(first_B, second_B)

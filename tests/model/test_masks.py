"""Attention masks against masks written as loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitgen.model.masks import AttentionMask, mask_value

Rule = Callable[[int, int, int], bool]
"""Whether row b's query at key index q may see key k."""


def by_loops(rule: Rule, batch: int, queries: int, keys: int, offset: int = 0) -> torch.Tensor:
    mask = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for q in range(queries):
            for k in range(keys):
                mask[b, 0, q, k] = rule(b, q + offset, k)
    return mask


def expanded(mask: AttentionMask, batch: int, queries: int, keys: int) -> torch.Tensor:
    return mask.to_bool(queries, keys).expand(batch, -1, -1, -1)


LENGTHS = (5, 3, 0)
PREFIXES = (2, 4, 0)
CASES: dict[str, tuple[AttentionMask, Rule]] = {
    "bidirectional": (AttentionMask.bidirectional(), lambda b, q, k: True),
    "causal": (AttentionMask.causal(), lambda b, q, k: k <= q),
    "prefix of two": (
        AttentionMask.prefix(2),
        lambda b, q, k: k <= q or (q < 2 and k < 2),
    ),
    "prefix a row": (
        AttentionMask.prefix(PREFIXES),
        lambda b, q, k: k <= q or (q < PREFIXES[b] and k < PREFIXES[b]),
    ),
    "window": (AttentionMask.sliding_window(2), lambda b, q, k: q - 2 < k <= q),
    "window with sinks": (
        AttentionMask.sliding_window(2, sinks=1),
        lambda b, q, k: k <= q and (k > q - 2 or k < 1),
    ),
    "lengths": (
        AttentionMask.from_lengths(torch.tensor(LENGTHS), 6),
        lambda b, q, k: q < LENGTHS[b] and k < LENGTHS[b],
    ),
    "causal and lengths": (
        AttentionMask.causal() & AttentionMask.from_lengths(torch.tensor(LENGTHS), 6),
        lambda b, q, k: k <= q < LENGTHS[b] and k < LENGTHS[b],
    ),
    "custom and causal": (
        AttentionMask.custom(torch.eye(6, dtype=torch.bool)) & AttentionMask.causal(),
        lambda b, q, k: q == k,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mask_equals_its_loops(name: str) -> None:
    mask, rule = CASES[name]
    assert torch.equal(expanded(mask, 3, 6, 6), by_loops(rule, 3, 6, 6))


@pytest.mark.parametrize("name", [name for name in CASES if "custom" not in name])
def test_rows_of_a_cached_step_are_the_last_rows_of_the_whole_mask(name: str) -> None:
    mask, _ = CASES[name]
    whole = expanded(mask, 3, 6, 6)
    assert torch.equal(expanded(mask.at_offset(4), 3, 2, 6), whole[:, :, 4:])


def test_nothing_is_materialised_where_the_kernel_can_say_it() -> None:
    def lowered(mask: AttentionMask, queries: int = 4, keys: int = 4) -> tuple[bool, bool]:
        low = mask.lower((2, 1, queries, keys), torch.float32, torch.device("cpu"))
        return low.is_causal, low.mask is not None

    ones = AttentionMask.padding(torch.ones(2, 4))
    assert lowered(AttentionMask.causal()) == (True, False)
    assert lowered(AttentionMask.causal() & ones) == (True, False)
    assert lowered(ones) == (False, False)
    assert lowered(AttentionMask.causal(query_offset=3), queries=1) == (False, False)
    assert lowered(AttentionMask.causal(query_offset=2), queries=2) == (False, True)
    assert lowered(AttentionMask.prefix(2)) == (False, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_mask_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    additive = AttentionMask.causal().to_additive(3, 3, dtype)
    assert additive.isfinite().all()
    assert additive[0, 0, 0, 1] == mask_value(dtype) == torch.finfo(dtype).min
    assert torch.equal(additive == 0, AttentionMask.causal().to_bool(3, 3))


def test_mask_value_refuses_integers() -> None:
    with pytest.raises(ValueError, match="int64"):
        mask_value(torch.int64)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4)])
def test_from_tensor_reads_padding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    mask = AttentionMask.from_tensor(valid.to(dtype).view(shape))
    assert mask.valid_BK is not None and torch.equal(mask.valid_BK, valid.bool())


def test_from_tensor_reads_additive_and_four_dimensional_masks() -> None:
    causal = AttentionMask.causal().to_bool(4, 4)
    for tensor in (causal, causal.long(), AttentionMask.causal().to_additive(4, 4)):
        assert torch.equal(AttentionMask.from_tensor(tensor).to_bool(4, 4), causal)
    additive_padding = torch.tensor([[0.0, 0.0, float("-inf")]])
    valid = AttentionMask.from_tensor(additive_padding).valid_BK
    assert valid is not None and valid.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 4), "ambiguous"),
        (torch.full((2, 4), 3), "got torch.int64"),
        (torch.tensor([[0.0, float("nan")]]), "booleans"),
        (torch.zeros(4), "shape"),
    ],
)
def test_from_tensor_refuses_what_it_cannot_know(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMask.from_tensor(tensor)


def test_a_mask_of_another_shape_is_refused_with_both_shapes() -> None:
    mask = AttentionMask.padding(torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\[B, 5\]"):
        mask.to_bool(5, 5)
    with pytest.raises(ValueError, match=r"4, 4.*5, 5"):
        AttentionMask.custom(torch.ones(4, 4, dtype=torch.bool)).to_bool(5, 5)

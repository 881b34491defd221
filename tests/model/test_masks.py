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
SIDES = {
    "left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool(),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool(),
    "both": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]).bool(),
    "gaps": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]]).bool(),
    "nothing but": torch.zeros(3, 6, dtype=torch.bool),
}
RULES: dict[str, tuple[AttentionMask, Rule]] = {
    "bidirectional": (AttentionMask.bidirectional(), lambda b, q, k: True),
    "causal": (AttentionMask.causal(), lambda b, q, k: k <= q),
    "prefix of two": (
        AttentionMask.prefix(2),
        lambda b, q, k: k <= q or (q < 2 and k < 2),
    ),
    "prefix of all": (AttentionMask.prefix(6), lambda b, q, k: True),
    "prefix of one": (AttentionMask.prefix(1), lambda b, q, k: k <= q),
    "prefix a row": (
        AttentionMask.prefix(PREFIXES),
        lambda b, q, k: k <= q or (q < PREFIXES[b] and k < PREFIXES[b]),
    ),
    "two prefixes": (
        AttentionMask.prefix(4) & AttentionMask.prefix(PREFIXES),
        lambda b, q, k: k <= q or (q < PREFIXES[b] and k < PREFIXES[b]),
    ),
    "prefix and causal": (AttentionMask.prefix(4) & AttentionMask.causal(), lambda b, q, k: k <= q),
    "window": (AttentionMask.sliding_window(2), lambda b, q, k: q - 2 < k <= q),
    "wide window": (AttentionMask.sliding_window(6), lambda b, q, k: k <= q),
    "window with sinks": (
        AttentionMask.sliding_window(2, sinks=1),
        lambda b, q, k: k <= q and (k > q - 2 or k < 1),
    ),
    "windowed prefix": (
        AttentionMask.prefix(4).windowed(2, sinks=1),
        lambda b, q, k: (k <= q or (q < 4 and k < 4)) and (k > q - 2 or k < 1),
    ),
    "two windows": (
        AttentionMask.sliding_window(3) & AttentionMask.sliding_window(2, sinks=1),
        lambda b, q, k: q - 3 < k <= q and (k > q - 2 or k < 1),
    ),
}
CUSTOMS: dict[str, tuple[AttentionMask, Rule]] = {
    "diagonal": (AttentionMask.custom(torch.eye(6).bool()), lambda b, q, k: q == k),
    "a row": (
        AttentionMask.custom(torch.stack([torch.ones(6, 6).tril(-b) > 0 for b in range(3)])),
        lambda b, q, k: k <= q - b,
    ),
    "additive": (
        AttentionMask.custom(torch.ones(6, 6).triu(1) * -1e9),
        lambda b, q, k: k <= q,
    ),
    "with causal": (
        AttentionMask.custom(torch.ones(6, 6).triu() > 0) & AttentionMask.causal(),
        lambda b, q, k: q == k,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_mask_equals_its_loops(name: str) -> None:
    mask, rule = RULES[name]
    assert torch.equal(expanded(mask, 3, 6, 6), by_loops(rule, 3, 6, 6))


@pytest.mark.parametrize("name", CUSTOMS)
def test_custom_mask_equals_its_loops(name: str) -> None:
    mask, rule = CUSTOMS[name]
    assert torch.equal(expanded(mask, 3, 6, 6), by_loops(rule, 3, 6, 6))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", RULES)
def test_rules_count_tokens_wherever_padding_stands(name: str, side: str) -> None:
    mask, rule = RULES[name]
    valid = SIDES[side].tolist()

    def of_tokens(b: int, q: int, k: int) -> bool:
        if not (valid[b][q] and valid[b][k]):
            return False
        return rule(b, sum(valid[b][:q]), sum(valid[b][:k]))

    padded = mask & AttentionMask.padding(SIDES[side])
    assert torch.equal(expanded(padded, 3, 6, 6), by_loops(of_tokens, 3, 6, 6))


def test_lengths_are_padding_on_one_side() -> None:
    right = AttentionMask.from_lengths(torch.tensor(LENGTHS), 6)
    expected = by_loops(lambda b, q, k: q < LENGTHS[b] and k < LENGTHS[b], 3, 6, 6)
    assert torch.equal(expanded(right, 3, 6, 6), expected)
    left = AttentionMask.from_lengths(LENGTHS, 6, side="left")
    expected = by_loops(lambda b, q, k: min(q, k) >= 6 - LENGTHS[b], 3, 6, 6)
    assert torch.equal(expanded(left, 3, 6, 6), expected)
    assert not AttentionMask.from_lengths([6, 6], 6).has_padding


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_cached_step_are_the_last_rows_of_the_whole_mask(
    name: str, side: str | None
) -> None:
    mask = RULES[name][0]
    if side is not None:
        mask = mask & AttentionMask.padding(SIDES[side])
    whole = expanded(mask, 3, 6, 6)
    assert torch.equal(expanded(mask.at_offset(4), 3, 2, 6), whole[:, :, 4:])


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("name", [*RULES, *CUSTOMS])
@pytest.mark.parametrize("step", [(0, 6), (4, 6), (5, 6)])
def test_what_the_kernel_is_given_says_the_same(
    name: str, side: str | None, step: tuple[int, int]
) -> None:
    start, end = step
    mask = {**RULES, **CUSTOMS}[name][0]
    if side is not None:
        mask = mask & AttentionMask.padding(SIDES[side])
    whole = expanded(mask, 3, 6, 6)[:, :, start:end]
    if name in CUSTOMS:
        if start and side is not None:
            return  # a cache joins padding itself, behind for_cached_step
        mask = mask.for_cached_step(start, end - start) if start else mask
    else:
        mask = mask.at_offset(start)
    lowered = mask.lower((3, 2, end - start, 6), torch.float32, torch.device("cpu"))
    if lowered.is_causal:
        assert lowered.mask is None
        seen = torch.ones(end - start, 6).tril().bool()
    elif lowered.mask is None:
        seen = torch.ones(end - start, 6).bool()
    else:
        is_bool = lowered.mask.dtype == torch.bool
        seen = lowered.mask if is_bool else lowered.mask > mask_value(torch.float32)
    assert torch.equal(seen.expand(3, 1, -1, -1), whole)
    alive = whole.any(dim=-1, keepdim=True)
    assert alive.all() if lowered.alive is None else torch.equal(lowered.alive, alive)


def test_additive_numbers_are_kept_added_up_and_held_in_range() -> None:
    bias = torch.tensor([[-1.0, -9e3], [-2.0, -5e4]])
    both = AttentionMask.custom(bias) & AttentionMask.custom(bias[None, None])
    additive = both.to_additive(2, 2, torch.float16)[0, 0]
    assert additive.tolist() == [[-2.0, -18000.0], [-4.0, mask_value(torch.float16)]]
    low = both.lower((1, 1, 2, 2), torch.float16, torch.device("cpu"))
    assert low.mask is not None and low.mask.dtype == torch.float16 and low.alive is None


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
    assert lowered(AttentionMask.prefix(1)) == (True, False)
    assert lowered(AttentionMask.prefix([4, 5])) == (False, False)
    assert lowered(AttentionMask.prefix(2).at_offset(3), queries=1) == (False, False)
    assert lowered(AttentionMask.sliding_window(4)) == (True, False)
    assert lowered(AttentionMask.sliding_window(3)) == (False, True)
    assert lowered(AttentionMask.sliding_window(4).at_offset(3), queries=1) == (False, False)


def test_causal_masks_of_cached_steps_are_kept() -> None:
    def mask_of(queries: int) -> torch.Tensor | None:
        mask = AttentionMask.causal(query_offset=8 - queries)
        return mask.lower((2, 1, queries, 8), torch.float32, torch.device("cpu")).mask

    assert mask_of(3) is mask_of(3) is not mask_of(2)
    mask = AttentionMask.prefix(3)
    assert mask.lower((2, 1, 8, 8), torch.float32, torch.device("cpu")) is mask.lower(
        (2, 1, 8, 8), torch.float32, torch.device("cpu")
    )


def test_a_mask_on_an_accelerator_is_never_read() -> None:
    """A tensor on the meta device has no values: to ask for one raises."""
    ones = torch.ones(2, 4, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        bool(ones.all())
    for padding in (AttentionMask.padding(ones), AttentionMask.from_tensor(ones)):
        assert padding.has_padding  # not known, so taken for padding
        mask = AttentionMask.prefix(torch.ones(2, device="meta")) & padding
        low = mask.lower((2, 1, 4, 4), torch.float32, torch.device("meta"))
        assert low.mask is not None and low.mask.shape == (2, 1, 4, 4)
        assert low.alive is not None and low.alive.shape == (2, 1, 4, 1)
    # Known on the CPU to hold no padding, it costs the device nothing.
    mask = AttentionMask.causal() & AttentionMask.padding(torch.ones(2, 4))
    assert mask.lower((2, 1, 4, 4), torch.float32, torch.device("meta")).is_causal


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
@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4), (2, 1, 1, 4)])
def test_from_tensor_reads_padding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    mask = AttentionMask.from_tensor(valid.to(dtype).view(shape), shape=(2, 3, 4, 4))
    assert mask.valid_BK is not None and torch.equal(mask.valid_BK, valid.bool())


@pytest.mark.parametrize("kind", ["bool", "int", "float", "additive"])
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 1, 4, 4), (2, 1, 4, 4), (2, 3, 4, 4)])
def test_from_tensor_reads_whole_masks(kind: str, shape: tuple[int, ...]) -> None:
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    tensor = {
        "bool": allowed,
        "int": allowed.long(),
        "float": allowed.float(),
        "additive": torch.zeros(shape).masked_fill(~allowed, -torch.inf),
    }[kind]
    expected = allowed[:, None] if len(shape) == 3 else allowed
    mask = AttentionMask.from_tensor(tensor, shape=(2, 3, 4, 4))
    assert torch.equal(mask.to_bool(4, 4), expected)


def test_additive_keys_that_are_more_than_padding_keep_their_numbers() -> None:
    bias = torch.tensor([[0.0, -1.5, -torch.inf]])
    for shape in ((1, 3), (1, 1, 3), (1, 1, 1, 3)):
        mask = AttentionMask.from_tensor(bias.view(shape), shape=(1, 2, 3, 3))
        additive = mask.to_additive(3, 3)
        assert additive[0, 0].tolist() == [[0.0, -1.5, mask_value(torch.float32)]] * 3


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 5), r"\(2, 5\); expected \[B, 4\]"),
        ((3, 4), r"\(3, 4\): 3 rows; expected 2"),
        ((2, 3, 4), r"\(2, 3, 4\); expected \[2, 3, 4, 4\]"),
        ((2, 2, 4, 4), r"\(2, 2, 4, 4\); expected \[2, 3, 4, 4\]"),
        ((3, 1, 4, 4), r"\(3, 1, 4, 4\): 3 rows; expected 2"),
        ((2, 1, 4, 5), r"\(2, 1, 4, 5\); expected \[2, 3, 4, 4\]"),
    ],
)
def test_from_tensor_names_both_shapes(shape: tuple[int, ...], words: str) -> None:
    tensor = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=words):
        AttentionMask.from_tensor(tensor, shape=(2, 3, 4, 4))


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
        (torch.zeros(1, 1, 1, 1, 4), "shape"),
        (torch.tensor([[0.0, 0.5]]), "got torch.float32 with values from 0.0 to 0.5"),
    ],
)
def test_from_tensor_refuses_what_it_cannot_know(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMask.from_tensor(tensor)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AttentionMask.prefix(torch.ones(2, 2)), r"\(2, 2\)"),
        (lambda: AttentionMask.sliding_window(0), "window >= 1"),
        (lambda: AttentionMask.causal().windowed(2, -1), "sinks >= 0"),
        (lambda: AttentionMask.padding(torch.ones(4)), r"\(4,\)"),
        (lambda: AttentionMask.from_lengths([[2]], 4), r"\(1, 1\)"),
        (lambda: AttentionMask.from_lengths([2, 5], 4), r"0 to 4 .*\[2, 5\]"),
        (lambda: AttentionMask.from_lengths([2], 4, side="top"), "'top'"),
        (lambda: AttentionMask.custom(torch.ones(4)), r"\(4,\)"),
        (lambda: AttentionMask.custom(torch.ones(4, 4).long()), "int64"),
        (lambda: AttentionMask.causal(2) & AttentionMask.causal(3), "2 and 3"),
        (
            lambda: AttentionMask.padding(torch.eye(3)) & AttentionMask.padding(torch.eye(4)),
            r"\(3, 3\) and \(4, 4\)",
        ),
        (
            lambda: (
                AttentionMask.causal().at_positions(torch.ones(1, 1), torch.ones(1, 2))
                & AttentionMask.causal()
            ),
            "before at_positions",
        ),
        (lambda: AttentionMask.causal(3).to_bool(2, 4), "do not fit 4 keys"),
    ],
)
def test_what_makes_no_mask_is_refused(make: Callable[[], AttentionMask], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_masks_join_and_keep_their_offset() -> None:
    padding = AttentionMask.padding(torch.tensor([[1, 1, 0]]))
    other = AttentionMask.padding(torch.tensor([[0, 1, 1]]))
    both = (padding & other).valid_BK
    assert both is not None and both.tolist() == [[False, True, False]]
    assert (AttentionMask.causal(2) & padding).query_offset == 2
    assert (padding & AttentionMask.causal(2)).query_offset == 2


def test_queries_and_keys_in_any_order_are_placed_by_their_positions() -> None:
    """Keys as a ring holds them: position 5 has overwritten 2, and one slot is empty."""
    keys = torch.tensor([[0, 4, 5, 3, -1]])
    mask = AttentionMask.sliding_window(2, sinks=1).at_positions(torch.tensor([[5, -1]]), keys)
    assert mask.to_bool(2, 5)[0, 0].tolist() == [[True, True, True, False, False], [False] * 5]


def test_a_mask_of_another_shape_is_refused_with_both_shapes() -> None:
    mask = AttentionMask.padding(torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match=r"\(1, 3\).*\[B, 5\]"):
        mask.to_bool(5, 5)
    with pytest.raises(ValueError, match=r"4, 4.*5, 5"):
        AttentionMask.custom(torch.ones(4, 4, dtype=torch.bool)).to_bool(5, 5)


def test_custom_masks_of_a_step_alone_are_taken_as_they_are() -> None:
    rows = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    step = AttentionMask.custom(rows).for_cached_step(4, 2)
    assert torch.equal(step.to_bool(2, 6)[0, 0], rows)


def test_boolean_and_additive_customs_join() -> None:
    bias = torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf]])
    allowed = torch.tensor([[True, False], [True, True]])
    joined = AttentionMask.custom(bias) & AttentionMask.custom(allowed)
    lowest = mask_value(torch.float32)
    assert joined.to_additive(2, 2)[0, 0].tolist() == [[-1.0, lowest], [-3.0, lowest]]

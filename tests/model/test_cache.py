"""Caches: any chunking, padding and beam order gives what one forward without a cache gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.model.bitgen import BitGenModel
from bitgen.model.cache import SlidingWindowCache, StaticCache
from bitgen.model.masks import AttentionMask

from .small_model import DENSE_AND_EXPERTS

MakeModel = Callable[..., BitGenModel]
LENGTH = 17


def some_ids(batch: int = 3, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_on(side: str, length: int = LENGTH) -> torch.Tensor:
    """Bool [3, L]: rows without, with little and with much padding."""
    valid = torch.ones(3, length, dtype=torch.bool)
    if side == "left":
        valid[1, :2] = valid[2, :7] = False
    elif side == "right":
        valid[1, -2:] = valid[2, -7:] = False
    elif side == "gaps":
        valid[1, 3:5] = valid[2, ::3] = False
    return valid


def read_in_steps(
    model: BitGenModel,
    ids: torch.Tensor,
    valid: torch.Tensor,
    cache: StaticCache | SlidingWindowCache,
    steps: list[int],
    rules: AttentionMask,
) -> torch.Tensor:
    logits, start = [], 0
    for size in steps:
        end = start + size
        mask = rules & AttentionMask.padding(valid[:, start:end])
        logits.append(model(ids[:, start:end], attention_mask=mask, attention_cache=cache).logits)
        start = end
    assert start == ids.shape[1] == cache.length
    return torch.cat(logits, dim=1)


def steps_of(chunk: int) -> list[int]:
    return [min(chunk, LENGTH - start) for start in range(0, LENGTH, chunk)]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 7, LENGTH])
@pytest.mark.parametrize("side", ["none", "left", "right", "gaps"])
@pytest.mark.parametrize("kind", ["static", "window", "window with sinks"])
@DENSE_AND_EXPERTS
def test_steps_of_any_size_equal_one_forward(
    make_model: MakeModel, chunk: int, side: str, kind: str, experts: dict[str, int]
) -> None:
    model, ids, valid = make_model(**experts), some_ids(), padded_on(side)
    rules = AttentionMask.causal()
    whole = rules
    cache: StaticCache | SlidingWindowCache
    if kind == "static":
        cache = model.new_cache(3, LENGTH)
    else:
        sinks = 3 if "sinks" in kind else 0
        cache = model.new_sliding_window_cache(3, window=5, sinks=sinks)
        whole = AttentionMask.sliding_window(5, sinks)
    expected = model(ids, attention_mask=whole & AttentionMask.padding(valid)).logits
    found = read_in_steps(model, ids, valid, cache, steps_of(chunk), rules)
    assert (found - expected).abs()[valid].max() < 2e-5


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_random_steps_padding_and_rules_equal_one_forward(
    make_model: MakeModel, data: st.DataObject
) -> None:
    model = make_model()
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    ids = some_ids(batch, length, seed=data.draw(st.integers(0, 99)))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = torch.tensor([data.draw(bits) for _ in range(batch)])
    steps = []
    while sum(steps) < length:
        steps.append(data.draw(st.integers(1, length - sum(steps))))
    rules = data.draw(
        st.sampled_from(
            [
                AttentionMask.causal(),
                AttentionMask.sliding_window(3, 1),
                AttentionMask.prefix(valid[:, : steps[0]].sum(dim=1)),
                AttentionMask.custom(torch.ones(length, length).tril().bool()),
            ]
        )
    )
    cache: StaticCache | SlidingWindowCache = model.new_cache(batch, length)
    whole = rules
    if data.draw(st.booleans()) and not rules.custom_masks:
        window, sinks = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
        cache = model.new_sliding_window_cache(batch, window, sinks)
        whole = rules.windowed(window, sinks)
    expected = model(ids, attention_mask=whole & AttentionMask.padding(valid)).logits
    found = read_in_steps(model, ids, valid, cache, steps, rules)
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-5, rtol=0)


@torch.no_grad()
@DENSE_AND_EXPERTS
def test_a_picture_and_a_prompt_are_a_prefix_of_a_sliding_window_too(
    make_model: MakeModel, experts: dict[str, int]
) -> None:
    model, ids = make_model(**experts), some_ids()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    sinks = model.num_image_tokens + 1
    prompt = model.build_attention_mask(torch.ones(3, 4), torch.tensor([4, 4, 4]))
    whole = model.build_attention_mask(torch.ones(3, LENGTH), torch.tensor([4, 4, 4]))
    expected = model(ids, images, whole.windowed(6, sinks)).logits
    cache = model.new_sliding_window_cache(3, window=6, sinks=sinks)
    found = [model(ids[:, :4], images, prompt, attention_cache=cache).logits]
    found += [model(ids[:, i : i + 1], attention_cache=cache).logits for i in range(4, LENGTH)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "sliding"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("rows", [[2, 0, 0], [1, 2, 2, 0, 1]])
@DENSE_AND_EXPERTS
def test_reordered_rows_go_on_as_the_chosen_ones(
    make_model: MakeModel, kind: str, side: str, rows: list[int], experts: dict[str, int]
) -> None:
    model, ids, valid = make_model(**experts), some_ids(), padded_on(side)
    cache: StaticCache | SlidingWindowCache = model.new_cache(3, LENGTH)
    rules = AttentionMask.causal()
    if kind == "sliding":
        cache = model.new_sliding_window_cache(3, window=5, sinks=2)
        rules = AttentionMask.sliding_window(5, 2)
    expected = model(ids, attention_mask=rules & AttentionMask.padding(valid)).logits[rows]
    for start, end in ((0, 5), (5, 9)):
        model(ids[:, start:end], attention_mask=valid[:, start:end], attention_cache=cache)
    cache.reorder(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    for index in range(9, LENGTH):
        at = slice(index, index + 1)
        step = model(ids[rows][:, at], attention_cache=cache).logits
        torch.testing.assert_close(step, expected[:, at], atol=2e-5, rtol=1e-5)


def bytes_of(cache: SlidingWindowCache) -> int:
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
@pytest.mark.parametrize("with_padding", [False, True])
@DENSE_AND_EXPERTS
def test_generation_without_end_keeps_memory_sinks_and_sense(
    make_model: MakeModel, with_padding: bool, experts: dict[str, int]
) -> None:
    """Far behind max_positions: the same bytes, the first tokens still there, logits still bounded.

    A stream that repeats with the window's period must come to repeat its logits too: what is seen
    is then always the same tokens at the same distances.
    """
    model = make_model(**experts)
    window, sinks, period = 8, 3, 4
    cache = model.new_sliding_window_cache(2, window, sinks)
    before = bytes_of(cache)
    start = some_ids(batch=2, length=sinks)
    valid = torch.ones(2, sinks, dtype=torch.bool)
    if with_padding:
        valid[1, 0] = False
    model(start, attention_mask=valid, attention_cache=cache)
    stored = cache.layers[0].values[:, :, : sinks - with_padding].clone()
    stream = some_ids(batch=2, length=period, seed=5)
    history = []
    for index in range(4 * model.config.max_positions):
        token = stream[:, index % period][:, None]
        history.append(model(token, attention_cache=cache).logits[:, 0])
    assert bytes_of(cache) == before
    assert torch.equal(cache.layers[0].values[:, :, : sinks - with_padding], stored)
    late = torch.stack(history[-period:])
    torch.testing.assert_close(late, torch.stack(history[-2 * period : -period]), atol=1e-4, rtol=0)
    assert not torch.allclose(late[0], late[1], atol=1e-2)


@torch.no_grad()
def test_a_row_that_waits_keeps_its_sinks_while_another_runs_on(make_model: MakeModel) -> None:
    """One row is fed far behind max_positions; the other gets padding and begins only then."""
    model = make_model()
    ids = some_ids(batch=1, length=12)
    alone = model(ids, attention_mask=AttentionMask.sliding_window(6, 2)).logits
    cache = model.new_sliding_window_cache(2, window=6, sinks=2)
    waiting = torch.tensor([[True], [False]])
    for index in range(80):
        token = torch.full((2, 1), 5 + index % 40)
        model(token, attention_mask=waiting, attention_cache=cache)
    steps = [
        model(ids[:, i : i + 1].expand(2, 1), attention_cache=cache).logits[1] for i in range(12)
    ]
    torch.testing.assert_close(torch.cat(steps), alone[0], atol=2e-5, rtol=1e-5)


# Going back -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_rewound_rows_go_on_as_if_the_rest_had_never_been(
    make_model: MakeModel, data: st.DataObject
) -> None:
    """Each row to its own length, with padding anywhere; the reference reads every row alone."""
    model, batch, room = make_model(), data.draw(st.integers(1, 3)), 24
    cache = model.new_cache(batch, room)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    valid: list[list[bool]] = [[] for _ in range(batch)]
    with_padding = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.integers(0, room - cache.length))
        if size:
            ids = some_ids(batch, size, seed=data.draw(st.integers(0, 99)))
            bits = st.lists(st.booleans(), min_size=size, max_size=size)
            new = [data.draw(bits) if with_padding else [True] * size for _ in range(batch)]
            mask = torch.tensor(new) if with_padding else None
            logits = model(ids, attention_mask=mask, attention_cache=cache).logits
            for row in range(batch):
                tokens[row] += ids[row].tolist()
                valid[row] += new[row]
                mask_1L = torch.tensor([valid[row]])
                alone = model(torch.tensor([tokens[row]]), attention_mask=mask_1L).logits
                kept = torch.tensor(new[row])
                torch.testing.assert_close(
                    logits[row][kept], alone[0, -size:][kept], atol=2e-5, rtol=1e-5
                )
        lengths = [data.draw(st.integers(0, len(row))) for row in tokens]
        cache.rewind(lengths)
        tokens = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        valid = [row[:length] for row, length in zip(valid, lengths, strict=True)]
        assert cache.length == max(lengths)
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(batch)))
            cache.reorder(torch.tensor(order))
            tokens, valid = [tokens[row][:] for row in order], [valid[row][:] for row in order]


@torch.no_grad()
def test_a_rewound_cache_holds_what_a_fresh_one_holds(make_model: MakeModel) -> None:
    model, ids = make_model(), some_ids()
    cache, fresh = model.new_cache(3, LENGTH), model.new_cache(3, LENGTH)
    model(ids[:, :9], attention_cache=cache)
    cache.rewind([4, 4, 4])
    again = model(ids[:, 4:], attention_cache=cache).logits
    model(ids[:, :4], attention_cache=fresh)
    close = {"atol": 2e-5, "rtol": 1e-5}  # four tokens beside five more are summed in another order
    torch.testing.assert_close(again, model(ids[:, 4:], attention_cache=fresh).logits, **close)
    for layer, other in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, **close)
        torch.testing.assert_close(layer.values, other.values, **close)


@torch.no_grad()
def test_rows_of_different_length_refuse_and_survive_what_does_not_fit(
    make_model: MakeModel,
) -> None:
    model, ids = make_model(), some_ids()
    cache = model.new_cache(3, 10)
    model(ids[:, :8], attention_cache=cache)
    for lengths in ([8, 8], [8, 9, 1], [-1, 2, 3]):
        with pytest.raises(ValueError, match=r"hold \[8, 8, 8\] columns; they cannot be cut to"):
            cache.rewind(lengths)
    cache.rewind([3, 7, 5])
    with pytest.raises(ValueError, match=r"hold \[3, 7, 5\] columns"):
        cache.rewind([4, 7, 5])
    with pytest.raises(ValueError, match="room for 10 positions and holds 7; 4 more"):
        model(ids[:, 8:12], attention_cache=cache)
    with pytest.raises(ValueError, match="rewound to different ones"):
        everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        model(
            ids[:, 8:10],
            attention_mask=AttentionMask.custom(everything.tril()),
            attention_cache=cache,
        )
    with pytest.raises(ValueError, match="must be read in one step"):
        model(ids[:, 8:10], attention_mask=AttentionMask.prefix(6), attention_cache=cache)
    found = model(ids[:, 8:10], attention_cache=cache).logits
    for row, length in enumerate((3, 7, 5)):
        whole = torch.cat([ids[row, :length], ids[row, 8:10]])[None]
        torch.testing.assert_close(found[row], model(whole).logits[0, -2:], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="sliding window cache has written over"):
        model.new_sliding_window_cache(3, 4).rewind([0, 0, 0])


# What is refused --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_step_that_does_not_fit_is_refused_and_leaves_the_cache_as_it_was(
    make_model: MakeModel,
) -> None:
    model, ids = make_model(), some_ids()
    expected = model(ids[:, :10]).logits[:, 6:]
    for cache in (model.new_cache(3, 10), model.new_sliding_window_cache(3, 12, 1)):
        model(ids[:, :6], attention_cache=cache)
        with pytest.raises(ValueError, match="3 rows; the input has 2"):
            model(ids[:2, 6:8], attention_cache=cache)
        with pytest.raises(ValueError, match=r"\(3, 3\); expected 2 columns .* or 8"):
            wrong = AttentionMask.causal() & AttentionMask.padding(torch.tensor([[1, 1, 0]] * 3))
            model(ids[:, 6:8], attention_mask=wrong, attention_cache=cache)
        if isinstance(cache, StaticCache):
            with pytest.raises(ValueError, match="room for 10 positions and holds 6; 5 more"):
                model(ids[:, 6:11], attention_cache=cache)
        assert cache.length == 6
        step = model(ids[:, 6:10], attention_cache=cache).logits
        torch.testing.assert_close(step, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_masks_that_no_cache_can_answer_are_refused_with_the_reason(make_model: MakeModel) -> None:
    model, ids = make_model(), some_ids()

    def step(mask: AttentionMask, start: int, end: int, cache: object) -> None:
        model(ids[:, start:end], attention_mask=mask, attention_cache=cache)

    cache = model.new_cache(3, LENGTH)
    with pytest.raises(ValueError, match="later token changes every earlier state"):
        step(AttentionMask.bidirectional(), 0, 4, cache)
    with pytest.raises(ValueError, match=r"prefix \(\[6\] tokens\) must be read in one step"):
        step(AttentionMask.prefix(6), 0, 4, cache)
    step(AttentionMask.prefix(4), 0, 4, cache)
    with pytest.raises(ValueError, match="must be read in one step"):
        step(AttentionMask.prefix(6), 4, 8, cache)
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for mask in (everything, torch.zeros(LENGTH, LENGTH)):
        with pytest.raises(ValueError, match="queries 4 to 7 see later keys"):
            step(AttentionMask.custom(mask), 4, 8, cache)
    step(AttentionMask.custom(everything.tril()), 4, 8, cache)
    sliding = model.new_sliding_window_cache(3, 4)
    with pytest.raises(ValueError, match="Use a static cache"):
        step(AttentionMask.custom(everything.tril()), 0, 4, sliding)
    both_ways = make_model(attention_mode="bidirectional")
    with pytest.raises(ValueError, match="attention_mode is bidirectional"):
        both_ways(ids, attention_cache=both_ways.new_cache(3, LENGTH))


@torch.no_grad()
def test_a_sliding_window_cache_has_limits_of_its_own(make_model: MakeModel) -> None:
    model = make_model()
    most = model.config.max_positions
    for window, sinks in ((0, 1), (4, -1), (most, 1)):
        with pytest.raises(ValueError, match=f"at most {most}"):
            model.new_sliding_window_cache(1, window, sinks)
    for sinks in (0, 2):
        cache = model.new_sliding_window_cache(1, most - sinks, sinks)
        model(some_ids(1, most - 1), attention_cache=cache)
        with pytest.raises(ValueError, match="one token a step; got 2"):
            model(some_ids(1, 2), attention_cache=cache)
        model(some_ids(1, 1), attention_cache=cache)
        model(some_ids(1, 1), attention_cache=cache)
        assert cache.length == most + 1

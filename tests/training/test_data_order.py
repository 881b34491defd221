"""The order of samples: every one once, the same whatever divides it, resumable anywhere."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.training.data_order import (
    WINDOW_UPDATES,
    epoch_order,
    epoch_updates,
    micro_batches,
    remaining_updates,
)

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**66)
ORDER_0_0 = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
ORDER_7_3 = [3, 5, 4, 7, 8, 0, 9, 2, 1, 6]


@st.composite
def epochs(draw: st.DrawFn) -> tuple[int, int, int, np.ndarray | None]:
    """num_samples, seed, epoch, lengths or None; every window count from none to several."""
    num_samples = draw(st.integers(0, 400))
    seed, epoch = draw(SEEDS), draw(st.integers(0, 5))
    lengths = None
    if draw(st.booleans()):
        generator = np.random.default_rng(draw(st.integers(0, 1000)))
        lengths = generator.integers(3, 3 + draw(st.integers(1, 40)), num_samples)
    return num_samples, seed, epoch, lengths


def reference_updates(
    num_samples: int, size: int, seed: int, epoch: int, lengths: np.ndarray
) -> list[frozenset[int]]:
    """The updates of the sorted windows, in the order of their lengths, plainly written."""
    order = epoch_order(num_samples, seed, epoch)
    num_whole = num_samples // size * size
    updates = []
    for start in range(0, num_whole, WINDOW_UPDATES * size):
        window = order[start : min(num_whole, start + WINDOW_UPDATES * size)]
        window = sorted(window, key=lambda sample: lengths[sample])
        updates += [frozenset(window[i : i + size]) for i in range(0, len(window), size)]
    return updates


def test_the_order_of_an_epoch_is_the_one_that_runs_were_trained_with() -> None:
    # As numpy's PCG64 gives it for the words (seed, epoch) since the first release.
    assert epoch_order(10, 0, 0) == np.random.default_rng([0, 0]).permutation(10).tolist()
    assert epoch_order(10, 0, 0) == ORDER_0_0
    assert epoch_order(10, 2**63 + 7, 3) == epoch_order(10, 7, 3) == ORDER_7_3


@given(epochs(), SIZES)
def test_every_sample_is_in_one_update_and_the_short_one_is_last(
    drawn: tuple[int, int, int, np.ndarray | None], size: int
) -> None:
    num_samples, seed, epoch, lengths = drawn
    updates = epoch_updates(num_samples, size, seed, epoch, lengths)
    assert sorted(itertools.chain(*updates)) == list(range(num_samples))
    assert all(len(update) == size for update in updates[:-1])
    assert not updates or 0 < len(updates[-1]) <= size
    assert updates == epoch_updates(num_samples, size, seed, epoch, lengths)
    assert all(type(sample) is int for update in updates for sample in update)


@given(epochs(), SIZES)
def test_without_lengths_an_update_is_a_slice_of_the_order(
    drawn: tuple[int, int, int, np.ndarray | None], size: int
) -> None:
    num_samples, seed, epoch, _ = drawn
    updates = epoch_updates(num_samples, size, seed, epoch)
    assert list(itertools.chain(*updates)) == epoch_order(num_samples, seed, epoch)


@given(epochs(), st.integers(1, 4))
def test_buckets_are_the_sorted_windows_shuffled_within(
    drawn: tuple[int, int, int, np.ndarray | None], size: int
) -> None:
    num_samples, seed, epoch, lengths = drawn
    if lengths is None:
        lengths = np.zeros(num_samples, dtype=int)
    whole = num_samples // size
    updates = [frozenset(u) for u in epoch_updates(num_samples, size, seed, epoch, lengths)]
    expected = reference_updates(num_samples, size, seed, epoch, lengths)
    for start in range(0, whole, WINDOW_UPDATES):
        end = min(whole, start + WINDOW_UPDATES)
        assert set(updates[start:end]) == set(expected[start:end])


def test_lengths_come_in_random_order_and_another_one_each_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 3200)
    first, second = (epoch_updates(3200, 16, 5, epoch, lengths) for epoch in (0, 1))
    assert {frozenset(u) for u in first}.isdisjoint(frozenset(u) for u in second)
    means = [lengths[update].mean() for update in first]
    # A window's updates in the order of their lengths would correlate with their places by 1.
    for start in range(0, len(means), WINDOW_UPDATES):
        window = means[start : start + WINDOW_UPDATES]
        assert abs(np.corrcoef(window, range(len(window)))[0, 1]) < 0.5
    later = [lengths[update].mean() for update in second]
    assert abs(np.corrcoef(means[:WINDOW_UPDATES], later[:WINDOW_UPDATES])[0, 1]) < 0.5
    spread = np.mean([np.ptp(lengths[update]) for update in first])
    plain = np.mean([np.ptp(lengths[u]) for u in epoch_updates(3200, 16, 5, 0)])
    assert spread < 0.1 * plain


def test_a_short_last_update_is_not_made_of_the_longest() -> None:
    lengths = np.arange(1000)
    *_, last = epoch_updates(1000, 64, 0, 0, lengths)
    assert last == sorted(epoch_order(1000, 0, 0)[-(1000 % 64) :])


@given(
    st.lists(st.integers(0, 1000), max_size=120, unique=True),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_processes_share_an_update_without_loss(
    update: list[int], batch_size: int, num_ranks: int
) -> None:
    shares = [micro_batches(update, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert [i for share in shares for batch in share for i in batch] == update
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    # Only the last micro-batch of all may be short, and what comes after it is empty.
    sizes = [len(batch) for share in shares for batch in share if batch]
    assert all(size == batch_size for size in sizes[:-1])
    for share in shares:
        filled = [bool(batch) for batch in share]
        assert filled == sorted(filled, reverse=True)
    if len(update) == batch_size * num_ranks * 2:
        assert all(len(batch) == batch_size for share in shares for batch in share)


@given(epochs(), st.sampled_from([(1, 32), (2, 16), (4, 8), (32, 1)]), st.integers(1, 2))
def test_an_update_is_the_same_however_it_is_divided(
    drawn: tuple[int, int, int, np.ndarray | None], division: tuple[int, int], num_ranks: int
) -> None:
    num_samples, seed, epoch, lengths = drawn
    # Where one process accumulates 2 x accumulation batches, each of two accumulates half.
    updates = epoch_updates(num_samples, 64, seed, epoch, lengths)
    batch_size = division[1]
    joined = [
        [
            sample
            for rank in range(num_ranks)
            for batch in micro_batches(update, batch_size, rank, num_ranks)
            for sample in batch
        ]
        for update in updates
    ]
    assert joined == updates
    steps = 2 * division[0] // num_ranks
    for update in updates:
        if len(update) == 64:
            assert len(micro_batches(update, batch_size, 0, num_ranks)) == steps


@given(epochs(), SIZES, st.data())
def test_going_on_in_the_middle_gives_the_rest_unchanged(
    drawn: tuple[int, int, int, np.ndarray | None], size: int, data: st.DataObject
) -> None:
    num_samples, seed, epoch, lengths = drawn
    updates = epoch_updates(num_samples, size, seed, epoch, lengths)
    made = data.draw(st.integers(0, len(updates)))
    seen = sum(map(len, updates[:made]))
    assert remaining_updates(num_samples, [(size, seen)], seed, epoch, lengths) == updates[made:]


@given(epochs(), st.lists(SIZES, min_size=2, max_size=4), st.integers(0, 2**32))
def test_sizes_may_change_on_the_way_and_no_sample_is_lost_or_seen_twice(
    drawn: tuple[int, int, int, np.ndarray | None], sizes: list[int], choice: int
) -> None:
    num_samples, seed, epoch, lengths = drawn
    chooser = random.Random(choice)
    stretches: list[tuple[int, int]] = []
    seen: list[int] = []
    for size in sizes:
        updates = remaining_updates(num_samples, [*stretches, (size, 0)], seed, epoch, lengths)
        made = updates[: chooser.randint(0, len(updates))]
        seen += itertools.chain(*made)
        stretches.append((size, sum(map(len, made))))
        assert all(len(update) == size for update in updates[:-1])
    rest = remaining_updates(num_samples, stretches, seed, epoch, lengths)
    assert sorted([*seen, *itertools.chain(*rest)]) == list(range(num_samples))


def test_a_position_within_an_update_gives_its_rest() -> None:
    updates = epoch_updates(20, 8, 1, 0)
    assert remaining_updates(20, [(8, 3)], 1, 0) == [updates[0][3:], *updates[1:]]
    assert remaining_updates(20, [(8, 25)], 1, 0) == []


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 lengths for 4 samples"):
        epoch_updates(4, 2, 0, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="at least 1 sample"):
        epoch_updates(4, 0, 0, 0)
    with pytest.raises(ValueError, match="no process 2 of 2"):
        micro_batches([1], 1, 2, 2)

"""Which samples form which update, and which of them each process computes.

    epoch order --sort windows by length--> updates --slices--> micro-batches of each process

What an update holds depends on `samples_per_update` alone (batch size x accumulation x processes),
never on how it is divided: 8 samples accumulated 4 times are the 32 samples of one batch, and two
processes learn from what one would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW_UPDATES = 50
"""Updates whose samples are sorted by length together.

Many, because a sorted window is cut in that many slices and each holds about one length; not the
whole epoch, because in the same slices every epoch the same samples would meet.
"""


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one epoch; the same for the same arguments, everywhere."""
    generator = np.random.default_rng([seed % 2**63, epoch])
    order: list[int] = generator.permutation(num_samples).tolist()
    return order


def epoch_updates(
    num_samples: int,
    samples_per_update: int,
    seed: int,
    epoch: int,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> list[list[int]]:
    """The samples of each update of one epoch: every sample once, the short update last.

    Without `lengths`, the epoch's order is cut into slices. With them (tokens of each sample, by
    its index), windows of `WINDOW_UPDATES` updates are sorted by length before they are cut, and
    the updates of a window are shuffled, so that an update holds samples of similar length and
    little padding, while lengths still come in random order. A short last update holds the last
    samples of the epoch's order, of any length.
    """
    return remaining_updates(num_samples, [(samples_per_update, 0)], seed, epoch, lengths)


def remaining_updates(
    num_samples: int,
    stretches: Sequence[tuple[int, int]],
    seed: int,
    epoch: int,
    lengths: Sequence[int] | np.ndarray | None = None,
) -> list[list[int]]:
    """The updates of an epoch that are still to be made, where some were made already.

    Each stretch is (samples per update, samples seen so), in the order in which they were trained;
    the last one is going on. A training that always had one size has one stretch, and its updates
    are exactly those of `epoch_updates` without the first. Where the size changed on the way
    (another batch size, another number of processes), the samples that no stretch has seen are
    divided anew by the last size: none is left out, none comes twice.

    That is exact as long as `num_samples`, `seed` and `lengths` are those of the stretches. Where
    they are not (other data, another limit of caption tokens, buckets switched on or off), some
    samples of this epoch may come twice and others not at all.
    """
    order = np.array(epoch_order(num_samples, seed, epoch), dtype=np.int64)
    lengths_N = None if lengths is None else np.asarray(lengths)
    if lengths_N is not None and len(lengths_N) != num_samples:
        raise ValueError(f"There are {len(lengths_N)} lengths for {num_samples} samples.")
    *earlier, (samples_per_update, num_seen) = stretches
    for size, count in earlier:
        updates = _cut(order, size, seed, epoch, lengths_N)
        seen = np.concatenate([np.empty(0, np.int64), *updates])[:count]
        order = order[~np.isin(order, seen)]
    updates = _cut(order, samples_per_update, seed, epoch, lengths_N)
    whole, part = divmod(num_seen, samples_per_update)
    left = [update.tolist() for update in updates[whole:]]
    if left:
        left[0] = left[0][part:]
    return [update for update in left if update]


def _cut(
    order: np.ndarray, size: int, seed: int, epoch: int, lengths_N: np.ndarray | None
) -> list[np.ndarray]:
    """Samples in their order to updates of `size`; see `epoch_updates`."""
    if size < 1:
        raise ValueError(f"An update needs at least 1 sample, got {size}.")
    num_whole = len(order) // size
    rows, rest = order[: num_whole * size].reshape(num_whole, size), order[num_whole * size :]
    if lengths_N is not None:
        # Five words: the draws of the samples have three, those of the order two.
        generator = np.random.default_rng([seed % 2**63, epoch, 0, 0, 1])
        windows = [
            _sorted(rows[start : start + WINDOW_UPDATES].reshape(-1), lengths_N).reshape(-1, size)
            for start in range(0, num_whole, WINDOW_UPDATES)
        ]
        rows = np.concatenate([rows[:0], *(w[generator.permutation(len(w))] for w in windows)])
        rest = _sorted(rest, lengths_N)
    return [*rows, rest] if len(rest) else list(rows)


def _sorted(samples: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    # Stable, which makes the order of equal lengths the epoch's, on every machine.
    return samples[np.argsort(lengths_N[samples], kind="stable")]


def micro_batches(
    update: Sequence[int], batch_size: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """What one process computes of an update: slices of `batch_size` samples that lie together.

    All processes together compute every sample once. Each gets the same number of micro-batches,
    because they have to meet at every one; in a short update the last of them are empty for some.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"There is no process {rank} of {num_ranks}.")
    slices = [
        list(update[start : start + batch_size]) for start in range(0, len(update), batch_size)
    ]
    steps = -(-len(slices) // num_ranks)
    own = slices[rank * steps : (rank + 1) * steps]
    return own + [[] for _ in range(steps - len(own))]

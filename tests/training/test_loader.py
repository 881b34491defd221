"""The loader: order, epochs, and workers that live on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitgen.training.loader import BatchLoader


class NumberedSamples:
    """Stands for a TrainingSet: a sample says its index, its epoch and who loaded it."""

    def __init__(self) -> None:
        self._epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return index, self._epoch, os.getpid()

    def collate(self, samples: list[tuple[int, int, int]]) -> torch.Tensor:
        assert samples
        return torch.tensor(samples)


def numbers(batches: Iterator[Any]) -> list[Any]:
    return [batch[:, 0].tolist() for batch in batches]


@pytest.fixture(params=[0, 2])
def loader(request: pytest.FixtureRequest) -> BatchLoader:
    return BatchLoader(NumberedSamples(), request.param, pin_memory=False)  # type: ignore[arg-type]


def test_batches_come_in_order_with_the_draws_of_their_epoch(loader: BatchLoader) -> None:
    batches = [[4, 1], [3], [0, 2, 5]]
    for epoch in (0, 3):
        loaded: list[Any] = list(loader.load(batches, epoch))
        assert numbers(iter(loaded)) == batches
        assert {int(i) for batch in loaded for i in batch[:, 1]} == {epoch}
    assert list(loader.load([], 0)) == []


def test_what_is_left_of_a_list_is_given_up(loader: BatchLoader) -> None:
    first = loader.load([[i] for i in range(20)], 0)
    assert [next(first)[0, 0].item() for _ in range(3)] == [0, 1, 2]  # type: ignore[index]
    assert numbers(loader.load([[7], [8]], 1)) == [[7], [8]]


def test_workers_live_on_and_loading_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    loader = BatchLoader(NumberedSamples(), 2, pin_memory=False)  # type: ignore[arg-type]
    processes = []
    for epoch in range(3):
        loaded: list[Any] = list(loader.load([[i] for i in range(8)], epoch))
        processes.append({int(batch[0, 2]) for batch in loaded})
    assert len(processes[0]) == 2 and os.getpid() not in processes[0]
    assert processes[0] == processes[1] == processes[2]
    assert torch.equal(torch.get_rng_state(), state)
    del loader, loaded
    deadline = time.monotonic() + 20
    while any(is_alive(process) for process in processes[0]):
        assert time.monotonic() < deadline, "the workers outlive their loader"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_leave_the_signals_to_the_training() -> None:
    loader = BatchLoader(NumberedSamples(), 1, pin_memory=False)  # type: ignore[arg-type]
    (before,) = {int(batch[0, 2]) for batch in loader.load([[0]], 0) if batch is not None}  # type: ignore[index]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
        time.sleep(0.1)
    (after,) = {int(batch[0, 2]) for batch in loader.load([[1]], 0) if batch is not None}  # type: ignore[index]
    assert before == after


def test_closing_ends_the_workers_and_loading_starts_new_ones() -> None:
    before = set(multiprocessing.active_children())
    loader = BatchLoader(NumberedSamples(), 2, pin_memory=False)  # type: ignore[arg-type]
    for _ in range(2):
        assert numbers(loader.load([[4], [5]], 0)) == [[4], [5]]
        assert len(set(multiprocessing.active_children()) - before) == 2
        loader.close()
        assert set(multiprocessing.active_children()) <= before
    loader.close()

"""Gradients stay where they are for a whole run, and reach the optimizer only where they exist."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitgen.training.gradients import GradientBuffers


def test_gradients_are_added_up_in_the_same_memory() -> None:
    layer = nn.Linear(3, 2)
    buffers = GradientBuffers(list(layer.parameters()))
    places = [p.grad.data_ptr() for p in layer.parameters() if p.grad is not None]
    for _ in range(3):
        buffers.zero()
        x = torch.randn(8, 3)
        for part in x.split(2):
            layer(part).square().sum().backward()
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        for parameter, gradient in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert [p.grad.data_ptr() for p in layer.parameters() if p.grad is not None] == places


def test_what_no_backward_pass_reached_is_hidden_from_the_optimizer() -> None:
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    parameters = [*used.parameters(), *unused.parameters()]
    buffers = GradientBuffers(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    # Momentum of an earlier update must not move it either.
    unused(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    buffers.zero()
    used(torch.ones(1, 3)).sum().backward()
    with buffers.only_reached():
        assert [p.grad is None for p in parameters] == [False, False, True, True]
        optimizer.step()
    assert all(p.grad is not None for p in parameters)
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert moved == [True, True, False, False]


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h): bytes that the allocator has, and that are in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _malloc_info() -> _MallocInfo:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("glibc has no mallinfo2 (before 2.33)")
    mallinfo2.restype = _MallocInfo
    return mallinfo2()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc's allocator")
def test_accumulated_updates_take_no_memory_after_the_first_ones(
    workshop: Any, events: Any, make_training: Any, tmp_path: Path
) -> None:
    """By glibc's counters: the heap does not grow, and no gradient has moved."""
    training = make_training(
        num_epochs=6, batch_size=4, grad_accumulation=4, captions="all", weights_every=0
    )
    made = workshop.trainer(tmp_path / "run", training, callback=events)
    heap: list[int] = []
    places: list[list[int]] = []

    def look(step: int) -> None:
        gc.collect()
        info = _malloc_info()
        heap.append(info.arena + info.hblkhd)
        places.append([p.grad.data_ptr() for p in made.model.parameters() if p.grad is not None])

    events.on_step_do = look
    made.train()
    assert len(heap) >= 12
    assert all(now == places[0] for now in places) and places[0]
    gradients = sum(p.numel() * 4 for p in made.model.parameters())
    assert max(heap[6:]) - heap[5] < gradients // 2, heap

"""Gradients that stay in the same memory for the whole run.

Backward passes add to `parameter.grad` in place, so that accumulating batches allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


class GradientBuffers:
    """One buffer a parameter, zeroed before each update.

    A parameter that no backward pass of the update has reached is hidden from the optimizer:
    otherwise a gradient of zeros would let it decay, and go on by its momentum.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], allocate: bool = True) -> None:
        """Make the buffers; without `allocate` somebody else does (DistributedDataParallel)."""
        self._parameters = list(parameters)
        self._is_reached = torch.zeros(len(self._parameters), dtype=torch.float64)
        for index, parameter in enumerate(self._parameters):
            if allocate:
                parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(partial(self._reach, index))

    def _reach(self, index: int, parameter: torch.Tensor) -> None:
        self._is_reached[index] = 1.0

    @property
    def reached(self) -> torch.Tensor:
        """float64 `[parameters]`: above 0 where a backward pass has left a gradient since `zero`.

        Processes that share an update add theirs up, in place.
        """
        return self._is_reached

    def zero(self) -> None:
        """Begin an update."""
        self._is_reached.zero_()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    @contextmanager
    def only_reached(self) -> Iterator[None]:
        """Inside, `parameter.grad` is None where nothing has reached the parameter."""
        hidden = [
            (parameter, parameter.grad)
            for parameter, reached in zip(self._parameters, self._is_reached.tolist(), strict=True)
            if not reached
        ]
        for parameter, _ in hidden:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient

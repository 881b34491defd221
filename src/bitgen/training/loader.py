"""Batches loaded by worker processes that outlive epochs and signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from bitgen.training.interrupts import outlive_signals

if TYPE_CHECKING:
    from bitgen.dataset.collate import Batch, Sample
    from bitgen.dataset.samples import TrainingSet


class BatchLoader:
    """Loads one list of batches after the other, by workers that live as long as it does.

    Where processes are not forked (macOS, Windows, Python 3.14), starting a worker takes seconds,
    which a new loader would cost in every epoch.
    """

    def __init__(self, samples: TrainingSet, num_workers: int, pin_memory: bool) -> None:
        """
        Args:
            samples: what is loaded.
            num_workers: processes that load; 0 loads in this one.
            pin_memory: into page-locked memory, from which an accelerator copies faster.
        """
        self._samples, self._num_workers, self._pin_memory = samples, num_workers, pin_memory
        self._batches: list[list[tuple[int, int]]] = []
        self._loader: DataLoader[Any] | None = None

    def load(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[Batch]:
        """Each batch of samples, with the draws of `epoch`, in order.

        One list at a time: loading the next one gives up what is left of the one before.
        """
        self._batches[:] = [[(epoch, index) for index in batch] for batch in batches]
        if self._loader is None:
            self._loader = self._start()
        return iter(self._loader)

    def close(self) -> None:
        """End the workers; loading again starts new ones.

        Left to the garbage collector, which may take their queues first, each would be waited for
        in vain for seconds.
        """
        self._loader = None

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            _SamplesOfAnyEpoch(self._samples),
            batch_sampler=_Held(self._batches),
            collate_fn=self._samples.collate,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=self._pin_memory,
            # Its own generator: starting workers must not advance the one of the training.
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )


class _Held:
    """The batch sampler that `BatchLoader` fills anew for each list of batches."""

    def __init__(self, batches: list[list[tuple[int, int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(list(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


class _SamplesOfAnyEpoch(Dataset["Sample"]):
    """A training set by (epoch, index): workers that live on do not hear of a later `set_epoch`."""

    def __init__(self, samples: TrainingSet) -> None:
        self._samples = samples

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        self._samples.set_epoch(epoch)
        return self._samples[index]

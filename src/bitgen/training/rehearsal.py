"""Updates of a training that is not: on synthetic batches, with real tensors or fake ones.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes, dtypes and lifetimes, but no storage:
an update on them computes nothing and takes no memory, while `StorageTracker` counts what lives.
So a new kind of layer is counted without a formula of its own.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.collate import IGNORED_LABEL, LENGTH_STEP, Batch
from bitgen.dataset.features import FEATURE_DTYPE, caches_features
from bitgen.export.loaded import empty_model
from bitgen.model.bitgen import BitGenModel
from bitgen.training.allocator import LARGEST_IN_HEAP
from bitgen.training.gradients import GradientBuffers
from bitgen.training.objective import Objective
from bitgen.training.optimizer import make_optimizer
from bitgen.training.self_critical import SampledCaptions, lay_out
from bitgen.training.weight_statistics import TernaryStatistics


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a training.

    Attributes:
        rows: samples, each with a picture.
        text_length: tokens of the longest text, its first and last included.
        num_words: different tokens that the captions of one picture hold.
        num_robots: robots in the catalog; 0 without robot tasks.
        robot_length: tokens of the longest robot's text.
    """

    rows: int
    text_length: int
    num_words: int
    num_robots: int = 0
    robot_length: int = 0


class Bytes(NamedTuple):
    """How much, in all, and of it in blocks of the heap and in blocks mapped by themselves."""

    total: int
    heap: int
    mapped: int


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages that operations inside have made and that still live.

    glibc takes blocks up to `LARGEST_IN_HEAP` from the heap, which never shrinks in a training, and
    maps larger ones by themselves: the peaks of both are told apart.

    Attributes:
        live: what lives now.
        at_start: what lived when the peaks were last forgotten.
        peak: most bytes since then; the three need not be of the same moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.at_start = self.peak = Bytes(0, 0, 0)
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.at_start = self.peak = self.live

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors, nor views of them; they must outlive the tracking."""
        for tensor in tensors:
            self._follow_storage(tensor.untyped_storage(), num_bytes=0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.index.Tensor:
            # How many rows a fake tensor has then is read from the index, which is real.
            args = (args[0], _as_numbers(args[1]))
        result = func(*args, **(kwargs or {}))
        self._follow(result)
        return result

    def _follow(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self._follow_storage(storage, storage.nbytes())
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._follow(item)

    def _follow_storage(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        in_heap = num_bytes if num_bytes < LARGEST_IN_HEAP else 0

        def forget(_: object) -> None:
            self._change(-num_bytes, -in_heap)
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self._change(num_bytes, in_heap)

    def _change(self, num_bytes: int, in_heap: int) -> None:
        live, peak = self.live, self.peak
        self.live = live = Bytes(
            live.total + num_bytes, live.heap + in_heap, live.mapped + num_bytes - in_heap
        )
        self.peak = Bytes(
            max(peak.total, live.total), max(peak.heap, live.heap), max(peak.mapped, live.mapped)
        )


def _as_numbers(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with those that are boolean as positions."""
    numbers: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            numbers += index.nonzero().unbind(dim=1)
        else:
            numbers.append(index)
    return numbers


def make_batch(
    config: BitGenConfig, shape: BatchShape, pictures: torch.Tensor | None = None
) -> Batch:
    """A batch of that shape, of random numbers; each row has a picture, a caption and robots.

    `pictures`, uint8 `[B, 3, H, W]`, or features of pictures, `[B, P, E]`, stand for the pictures
    if they are given.
    """
    generator = torch.Generator().manual_seed(0)
    rows, robots = shape.rows, shape.num_robots
    length = -(-shape.text_length // LENGTH_STEP) * LENGTH_STEP

    def tokens(width: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (rows, width), generator=generator)

    input_ids_BL = tokens(length)
    mask_BL = torch.ones(rows, length, dtype=torch.bool)
    mask_BL[0, -1] = False  # rows of a batch differ in length, so that attention has a mask
    labels_BL = input_ids_BL.where(mask_BL, torch.tensor(IGNORED_LABEL))
    labels_BL[:, 0] = IGNORED_LABEL
    if config.attention_mode == "bidirectional":
        labels_BL.fill_(IGNORED_LABEL)
    if pictures is None:
        pixels = picture_shape(config, rows)
        pictures = torch.randint(256, pixels, generator=generator, dtype=torch.uint8)
    return Batch(
        input_ids=input_ids_BL,
        attention_mask=mask_BL,
        labels=labels_BL,
        prefix_lengths=torch.ones(rows, dtype=torch.long),
        images=pictures if pictures.dim() == 4 else None,
        image_features=pictures if pictures.dim() == 3 else None,
        image_mask=torch.ones(rows, dtype=torch.bool),
        robot_labels=torch.randint(2, (rows, robots), generator=generator).float(),
        word_ids=tokens(shape.num_words),
        word_weights=torch.full((rows, shape.num_words), 1 / max(1, shape.num_words)),
        is_plan=torch.zeros(rows, dtype=torch.bool),
        pictures=torch.arange(rows),
    )


def make_captions(batch: Batch, training: TrainingConfig) -> SampledCaptions | None:
    """What self-critical training would draw for a batch of `make_batch`: its own captions."""
    if training.objective != "self_critical":
        return None
    rows, num_captions = len(batch.input_ids), training.num_sampled_captions
    return lay_out(
        batch,
        torch.ones(rows, dtype=torch.bool),
        [[row[1:].tolist()] * num_captions for row in batch.input_ids],
        np.random.default_rng(0).random((rows, num_captions)),
        with_references=training.cross_entropy_weight > 0,
        bos_id=0,
        pad_id=0,
    )


def picture_shape(config: BitGenConfig, rows: int) -> tuple[int, int, int, int]:
    """Of a batch's pictures, `[B, 3, H, W]`."""
    return rows, 3, config.image_size, config.image_size


def empty_pictures(model: BitGenModel, training: TrainingConfig, rows: int) -> torch.Tensor:
    """Of a batch's pictures, or of their features where a training learns from those."""
    if caches_features(model.config, training):
        shape = (rows, model.num_image_tokens, model.image_encoder.output_width)
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, FEATURE_DTYPE)).dtype)
    return torch.empty(picture_shape(model.config, rows), dtype=torch.uint8)


def batch_tensors(batch: Batch) -> list[torch.Tensor]:
    """Those that are there."""
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return [value for value in values if value is not None]


def make_fake(model: nn.Module, fake_mode: Any, device: torch.device) -> None:
    """Put fake tensors on `device` in the place of all weights and buffers.

    Scalars (counters) become real zeros, because a model may read them.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim:
            return torch.zeros((), dtype=tensor.dtype, device=device)
        with fake_mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(buffer))


class Rehearsal:
    """A model with all that the trainer keeps beside it, and updates as the trainer makes them."""

    def __init__(
        self,
        model: BitGenModel,
        training: TrainingConfig,
        batch: Batch,
        robot_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare; the optimizer's moments are made here, of gradients of zeros.

        Args:
            model: on the device, with real or fake weights.
            training: how to train.
            batch: on the host; the one of all updates.
            robot_length: tokens of the longest robot's text.
            device: where to train.
            dtype: of the forward pass.
        """
        self._training, self._batch = training, batch
        self._captions = make_captions(batch, training)
        num_robots = batch.robot_labels.shape[1]
        if num_robots:
            unknown = [f"robot {number}" for number in range(num_robots)]
            names = [*model.config.robot_names, *unknown][:num_robots]
            texts_RL = torch.ones(num_robots, robot_length, dtype=torch.long)
            model.set_robots(names, texts_RL, texts_RL.bool())
        model.set_activation_checkpointing(training.activation_checkpointing)
        model.set_norm_batch(training.norm_batch)
        self._objective = Objective(model.train(), training, device, dtype)
        self._optimizer = make_optimizer(
            model, training.learning_rate, training.weight_decay, training.encoder_learning_rate
        )
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._gradients = GradientBuffers(self._parameters)
        self._statistics = TernaryStatistics(model)
        self._optimizer.step()

    def update(self, words_only: bool = False) -> None:
        """One update of the weights, of as many micro-batches as the training has.

        With `words_only` it is one of word pretraining.
        """
        if self._training.weights_every:
            self._statistics.remember()
        self._gradients.zero()
        batches = [self._batch] * self._training.grad_accumulation
        captions = [None if words_only else self._captions] * len(batches)
        counts = self._objective.counts(batches, words_only, captions)
        for batch, sampled in zip(batches, captions, strict=True):
            sums = self._objective(batch, words_only, sampled).sums
            loss = self._objective.total(sums, counts)
            if loss.requires_grad:
                loss.backward()
        with self._gradients.only_reached():
            limit = self._training.grad_clip or math.inf
            torch.nn.utils.clip_grad_norm_(self._parameters, limit)
            self._optimizer.step()

    def weight_bytes(self) -> int:
        """Of the model's parameters and buffers."""
        model = self._objective.model
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def gradient_bytes(self) -> int:
        """Of one gradient a trained parameter."""
        return sum(p.grad.nbytes for p in self._parameters if p.grad is not None)

    def optimizer_bytes(self) -> int:
        """Of the optimizer's state."""
        states = self._optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values())


def rehearse_without_memory(
    config: BitGenConfig,
    training: TrainingConfig,
    shape: BatchShape,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Rehearsal, StorageTracker]:
    """Make one update on fake tensors; returns what made it, and what lived in it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # What the model reads (masks, lengths) stays real, and meets fake tensors in operations.
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = empty_model(config)
    with fake_mode:
        pictures = empty_pictures(model, training, shape.rows)
    batch = make_batch(config, shape, pictures)
    tracker = StorageTracker()
    tracker.ignore(batch_tensors(batch))
    with tracker:
        make_fake(model, fake_mode, device)
        rehearsal = Rehearsal(model, training, batch, shape.robot_length, device, dtype)
        tracker.restart_peak()
        rehearsal.update()
    return rehearsal, tracker

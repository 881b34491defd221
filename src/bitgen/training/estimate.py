"""What a training will take, told before it begins: sizes, memory and time. Nothing is written."""

from __future__ import annotations

import gc
import math
import mmap
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.features import caches_features
from bitgen.dataset.images import ImageCache, default_cache_dir
from bitgen.dataset.plan_grammar import PlanFormat
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.export.loaded import empty_model
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device
from bitgen.model.encoders import make_image_encoder
from bitgen.model.ternary import TernaryLinear
from bitgen.training.allocator import keep_freed_memory
from bitgen.training.amp import resolve_precision
from bitgen.training.rehearsal import (
    BatchShape,
    Rehearsal,
    batch_tensors,
    empty_pictures,
    make_batch,
    rehearse_without_memory,
)
from bitgen.training.setup import (
    DataSources,
    SetupObserver,
    TrainingData,
    make_datasets,
    picture_variants,
    read_encoder,
    read_sources,
)

HEAP_FACTOR = 1.4
"""Heap over what lives in it, of activations on a CPU. PyTorch asks glibc for aligned blocks, and a
hole that one leaves is then too small for the next of the same size. One number for all models,
batches and precisions: the mean, 1.42, of six cases of benchmarks/training_memory.py (1.17 to 1.70:
nano, tiny, small, with patches of 16 pixels; ternary or not; bf16 or fp32) with glibc 2.36."""

_TIMED_UPDATES = 2
_TIMED_PICTURES = 8
_PAGE_COUNTS, _MEMORY_INFO = Path("/proc/self/statm"), Path("/proc/meminfo")


# Sizes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model, and its bytes in an exported file (2 bits a ternary
    weight, float32 otherwise)."""

    name: str
    ternary_parameters: int
    float_parameters: int
    exported_bytes: int


def part_sizes(model: BitGenModel) -> tuple[PartSize, ...]:
    """Each part of the model; buffers count in the exported bytes alone."""
    sizes = []
    embedding = model.text_decoder.embed_tokens
    parts = {name.replace("_", " "): part for name, part in model.named_children()}
    for name, part in {**parts, "embedding (shared with the lm head)": embedding}.items():
        layers = [module for module in part.modules() if isinstance(module, TernaryLinear)]
        tensors = {id(t): t for t in (*part.parameters(), *part.buffers())}
        if part is not embedding:
            tensors.pop(id(embedding.weight), None)
        ternary = sum(layer.weight.numel() for layer in layers)
        packed = sum(layer.packed_bytes for layer in layers)
        stored = sum(tensor.nbytes for tensor in tensors.values())
        in_floats = sum(p.numel() for p in part.parameters() if id(p) in tensors) - ternary
        sizes.append(PartSize(name, ternary, in_floats, stored - 4 * ternary + packed))
    return tuple(size for size in sizes if size.exported_bytes)


# Memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """The most memory that one process of a training holds at once, in parts, in bytes.

    Attributes:
        device: whose memory it is.
        process: interpreter, libraries, captions: resident in this process. 0 on other devices
            than the CPU: what a CUDA context takes was never measured.
        weights: parameters in float32, and buffers.
        gradients: one float32 a trained parameter.
        optimizer: two moments of AdamW, and counters.
        activations: what lives besides at the worst moment of an update.
        allocator: what the heap holds beyond that, by `HEAP_FACTOR`; 0 on other devices.
        data: batches of one update, and those that workers hold ready.
        checkpoint: copies that writing a checkpoint makes, beyond the room of activations.
        total: the sum.
    """

    device: str
    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    allocator: int
    data: int
    checkpoint: int
    total: int


def estimate_memory(
    config: BitGenConfig, training: TrainingConfig, shape: BatchShape
) -> MemoryEstimate:
    """Predict the peak of a training, by a rehearsal of one update that takes no memory.

    Args:
        config: the architecture.
        training: how to train; `device` and `precision` are resolved for this machine.
        shape: of the largest batch.

    Raises:
        ConfigError: a device or precision that this machine does not have.
    """
    device = resolve_device(training.device)
    dtype = resolve_precision(training.precision, device)
    is_cpu = device.type == "cpu"
    # Before the rehearsal, whose own libraries no training loads.
    process = _resident_with_libraries(config, training, dtype) if is_cpu else 0
    rehearsal, tracker = rehearse_without_memory(config, training, shape, device, dtype)
    weights, gradients = rehearsal.weight_bytes(), rehearsal.gradient_bytes()
    optimizer = rehearsal.optimizer_bytes()
    activations = tracker.peak.total - tracker.at_start.total
    allocator = copies = data = 0
    if is_cpu:
        in_heap = tracker.peak.heap - tracker.at_start.heap
        mapped = tracker.peak.mapped - tracker.at_start.mapped
        allocator = max(0, round(HEAP_FACTOR * in_heap) + mapped - activations)
        copies = _checkpoint_copies(weights, optimizer)
        data = _data_bytes(config, training, shape)
    parts = {
        "process": process,
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "allocator": allocator,
        "data": data,
        "checkpoint": max(0, copies - activations - allocator),
    }
    return MemoryEstimate(device=str(device), **parts, total=sum(parts.values()))


def _data_bytes(config: BitGenConfig, training: TrainingConfig, shape: BatchShape) -> int:
    """Batches on the host: those of one update, and two that each worker holds ready."""
    pictures = empty_pictures(empty_model(config), training, rows=1)
    batch = make_batch(config, replace(shape, rows=1), pictures)
    row = sum(tensor.nbytes for tensor in batch_tensors(batch))
    return row * shape.rows * (training.grad_accumulation + 2 * training.num_workers)


def _checkpoint_copies(weights: int, optimizer: int) -> int:
    """What safetensors copies of the larger of a checkpoint's two files; since 0.7 nothing."""
    return 0 if hasattr(safetensors.torch, "_flatten_as_ptr") else max(weights, optimizer)


def _resident_with_libraries(
    config: BitGenConfig, training: TrainingConfig, dtype: torch.dtype
) -> int:
    """Resident bytes of this process, once all is loaded that updates of a tiny model load."""
    tiny = replace(
        config,
        num_layers=1,
        hidden_size=64,
        intermediate_size=64,
        vocab_size=512,
        image_encoder="vit",
        encoder_config="",
        image_size=4 * config.patch_size,
        encoder_layers=1,
        encoder_hidden_size=16 * config.encoder_heads,
        encoder_intermediate_size=64,
    )
    batch = make_batch(tiny, BatchShape(rows=4, text_length=8, num_words=4))
    rehearsal = Rehearsal(BitGenModel(tiny), training, batch, 0, torch.device("cpu"), dtype)
    rehearsal.update()
    del rehearsal
    gc.collect()
    return resident_bytes()


def resident_bytes() -> int:
    """What this process has in RAM; the most so far, where the present is not told."""
    try:
        return int(_PAGE_COUNTS.read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this process has had in RAM; 0 on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: torch.device) -> int | None:
    """What a process could take of the device's memory now, without swapping; None if not told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMORY_INFO.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


# Time -------------------------------------------------------------------------------------------


def time_updates(
    config: BitGenConfig, training: TrainingConfig, shape: BatchShape, kinds: Sequence[bool]
) -> list[float]:
    """Seconds of an update of each kind: `words_only` of word pretraining, or not.

    Each is the mean of two on synthetic batches, after one that is not counted. It takes the memory
    of a training. Decoding and augmenting pictures is not counted.

    Raises:
        ConfigError: a device or precision that this machine does not have.
    """
    device = resolve_device(training.device)
    dtype = resolve_precision(training.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(training.seed)
    model = BitGenModel(config).to(device)
    batch = make_batch(config, shape)
    if caches_features(config, training):
        batch = make_batch(config, shape, empty_pictures(model, training, shape.rows).normal_())
    rehearsal = Rehearsal(model, training, batch, shape.robot_length, device, dtype)
    seconds = []
    for words_only in kinds:
        rehearsal.update(words_only)
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(_TIMED_UPDATES):
            rehearsal.update(words_only)
        _wait_for(device)
        seconds.append((time.perf_counter() - started) / _TIMED_UPDATES)
    return seconds


def time_features(config: BitGenConfig, training: TrainingConfig) -> float:
    """Seconds that the image encoder takes a picture, without gradients: the better of two batches.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    device = resolve_device(training.device)
    encoder = make_image_encoder(config).to(device).eval()
    images = torch.zeros(_TIMED_PICTURES, 3, config.image_size, config.image_size, device=device)
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        with torch.inference_mode():
            encoder(images)
        _wait_for(device)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds / _TIMED_PICTURES


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# All of it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureEstimate:
    """What features of a frozen image encoder take, which are computed once.

    Attributes:
        rows: pictures, each varied version of one counted by itself.
        bytes: on disk.
        free_bytes: on the disk of the cache.
        seconds: computing all of them, without decoding; None where it was not measured.
    """

    rows: int
    bytes: int
    free_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class TrainingEstimate:
    """What one training will take.

    Attributes:
        model_size: name of the preset.
        quantization: ternary or none.
        precision: dtype of the forward pass.
        parts: of the model.
        exported_bytes: weights of the exported file; tokenizer and robots come on top.
        batch: shape of the largest batch.
        image_tokens: of one picture.
        memory: of one process.
        free_bytes: what the device has free now; None if it does not tell.
        fits: whether there is as much as the training takes on top of what this process holds.
        train_samples: captions (or pictures) and robot tasks of one epoch.
        updates_per_epoch: updates of one epoch.
        total_updates: of the whole training.
        word_pretraining_updates: the first of them, which train the image encoder alone.
        seconds_per_update: of the others, measured; None where it was not.
        seconds_per_word_update: of word pretraining, measured; None where it was not.
        seconds_per_epoch: by that, an epoch of captions.
        seconds_in_total: by both; validations and loading are not counted.
        why_not_timed: why time was not measured; None where it was.
        features: of a frozen image encoder; None where none are cached.
    """

    model_size: str
    quantization: str
    precision: str
    parts: tuple[PartSize, ...]
    exported_bytes: int
    batch: BatchShape
    image_tokens: int
    memory: MemoryEstimate
    free_bytes: int | None
    fits: bool | None
    train_samples: int
    updates_per_epoch: int
    total_updates: int
    word_pretraining_updates: int
    seconds_per_update: float | None
    seconds_per_word_update: float | None
    seconds_per_epoch: float | None
    seconds_in_total: float | None
    why_not_timed: str | None
    features: FeatureEstimate | None


def estimate_training(
    sources: DataSources,
    model_size: str | None = None,
    model_changes: Mapping[str, Any] | None = None,
    training: TrainingConfig | None = None,
    observer: SetupObserver | None = None,
    encoder_weights: str | None = None,
    cache_dir: Path | None = None,
) -> TrainingEstimate:
    """Read the data's captions and tasks (no picture), and say what training on them will take.

    The arguments are those of `prepare_training`. Updates are timed only where they fit.

    Raises:
        InputError: the data or the configuration cannot be used, or several processes train.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--dry_run estimates one process.", remedy="Start it by itself, without torchrun."
        )
    training = training or TrainingConfig()
    observer = observer or SetupObserver()
    device = resolve_device(training.device)
    dtype = resolve_precision(training.precision, device)
    model_changes, _ = read_encoder(
        model_size, model_changes, encoder_weights, observer, sources.initial_model
    )
    config, data, tokenizer = read_sources(sources, model_size, model_changes, training, observer)
    tokenizer = tokenizer or Tokenizer.train(data.texts(), config.vocab_size)
    cache = ImageCache(default_cache_dir(), config.image_size, config.image_resize)
    sets = make_datasets(data, cache, tokenizer, config, training)  # they count in the process
    shape = largest_batch(data, tokenizer, training)
    model = empty_model(config)
    parts = part_sizes(model)
    memory = estimate_memory(config, training, shape)
    free = free_bytes(device)
    fits = None if free is None else memory.total - memory.process <= free
    num_samples = len(sets[0])
    updates = math.ceil(num_samples / (training.batch_size * training.grad_accumulation))
    total = training.max_steps or updates * training.num_epochs
    word_updates = min(total, training.count_word_pretraining(total))
    seconds, word_seconds, in_total, why_not = None, None, None, None
    if fits:
        kinds = [False, True] if word_updates else [False]
        num_timed = len(kinds) * (_TIMED_UPDATES + 1)
        observer.on_note(f"Timing {num_timed} updates on synthetic pictures.")
        seconds, *of_words = time_updates(config, training, shape, kinds)
        word_seconds = of_words[0] if of_words else None
        in_total = seconds * (total - word_updates) + (word_seconds or 0.0) * word_updates
    else:
        why_not = "free memory is not known" if fits is None else "it does not fit in memory"
    return TrainingEstimate(
        model_size=config.model_size,
        quantization=config.quantization,
        precision=str(dtype).removeprefix("torch."),
        parts=parts,
        exported_bytes=sum(part.exported_bytes for part in parts),
        batch=shape,
        image_tokens=model.num_image_tokens,
        memory=memory,
        free_bytes=free,
        fits=fits,
        train_samples=num_samples,
        updates_per_epoch=updates,
        total_updates=total,
        word_pretraining_updates=word_updates,
        seconds_per_update=seconds,
        seconds_per_word_update=word_seconds,
        seconds_per_epoch=None if seconds is None else seconds * updates,
        seconds_in_total=in_total,
        why_not_timed=why_not,
        features=_estimate_features(data, model, training, cache_dir, is_timed=bool(fits)),
    )


def _estimate_features(
    data: TrainingData,
    model: BitGenModel,
    training: TrainingConfig,
    cache_dir: Path | None,
    is_timed: bool,
) -> FeatureEstimate | None:
    if not caches_features(model.config, training):
        return None
    rows = sum(map(len, picture_variants(data, training).values()))
    folder = cache_dir or default_cache_dir()
    while not folder.is_dir():
        folder = folder.parent
    return FeatureEstimate(
        rows=rows,
        bytes=rows * empty_pictures(model, training, rows=1).nbytes,
        free_bytes=shutil.disk_usage(folder).free,
        seconds=rows * time_features(model.config, training) if is_timed else None,
    )


def largest_batch(data: TrainingData, tokenizer: Tokenizer, training: TrainingConfig) -> BatchShape:
    """A full batch that holds the longest text, with a picture in every row."""
    limit = training.max_caption_tokens
    longest = max((len(tokenizer.encode_task(task.task)) for task in data.train_tasks), default=1)
    if data.train_plans:
        plan_format = PlanFormat(tokenizer)
        longest = max(
            longest,
            *(
                len(tokenizer.encode_plan_task(plan.task))
                + len(plan_format.encode(plan.subtasks, training.max_plan_tokens)[0])
                for plan in data.train_plans
            ),
        )
    captions = {caption for image in data.train_images for caption in image.captions}
    for caption in sorted(captions, key=len, reverse=True):
        if longest > min(limit, len(caption.encode())) + 2:
            break  # a token is a byte at least: no other caption is longer
        num_tokens = len(tokenizer.encode(" ".join(caption.split())))
        longest = max(longest, 1 + min(num_tokens + 1, limit))
        if num_tokens >= limit:
            break
    robots = data.catalog if data.train_tasks else []
    most_captions = max((len(image.captions) for image in data.train_images), default=0)
    return BatchShape(
        rows=training.batch_size,
        text_length=longest,
        num_words=max(1, most_captions * limit),
        num_robots=len(robots),
        robot_length=max((len(tokenizer.encode_robot(r.text())) for r in robots), default=0),
    )

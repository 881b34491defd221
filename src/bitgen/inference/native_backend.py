"""The native backend: the C++ engine on the CPU, fed with rows as they become free. No torch.

    requests -> pixels, four at a time -> image tokens -> generator, `batch_size` rows at a time
                                                          -> replies in the order of the requests

While the engine works, Python's global lock is free: the threads that decode pictures go on.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.config import BitGenConfig
from bitgen.dataset.robots import Robot
from bitgen.dataset.task_words import TaskWords
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.export.artifact import open_artifact
from bitgen.inference.answers import Generation
from bitgen.inference.backend import NativeUnavailable, Reply, Request, RobotTexts, TaskRequest
from bitgen.inference.consensus import caption_idf_of, most_agreed
from bitgen.inference.engine import (
    Engine,
    EngineGeneration,
    GenerationOptions,
    Generator,
    TokenSequence,
    why_not_native,
)
from bitgen.inference.options import CaptionOptions, Vocabulary
from bitgen.kernels import library

_ENCODED_AT_ONCE = 4
"""Pictures read in one call: long products, for which unpacking weights pays."""
_HELD_BATCHES = 4
"""Batches of replies that may wait for a slower one before them."""

_TAKE_TORCH = "Leave --backend native out: PyTorch runs it."
# Where a driver of a GPU that torch may use shows itself: NVIDIA's, the one of WSL, AMD's.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class NativeModel:
    """A model on the native engine, with what it needs to answer."""

    backend: NativeBackend
    config: BitGenConfig
    tokenizer: Tokenizer
    catalog: list[Robot]
    info: dict[str, Any]


def open_native(
    path: Path, device: str, packed: bool, threads: int | None, asked_for: bool
) -> NativeModel:
    """Open an artifact, or load a run (by PyTorch, which packs it), for the native engine.

    Args:
        path: an exported file, or the folder of a run or a checkpoint.
        device: as given by the user.
        packed: False asks for the layers of training, which the engine does not have.
        threads: processor threads of the engine; None leaves them as they are.
        asked_for: the user named the native engine: a GPU is no reason against it.

    Raises:
        NativeUnavailable: the engine cannot run this model here.
        ModelFileError: missing, damaged, foreign, or of a newer format.
    """
    if device not in ("auto", "cpu"):
        raise NativeUnavailable(
            f"The native engine runs on the CPU, and device {device} is asked for.",
            remedy=_TAKE_TORCH,
        )
    if not packed:
        raise NativeUnavailable(
            "The native engine runs packed weights only.", remedy="Leave packed at True."
        )
    try:
        library.load()
    except library.KernelsError as error:
        raise NativeUnavailable(error.message, remedy=error.remedy) from error
    if device == "auto" and not asked_for and _torch_has_gpu():
        raise NativeUnavailable("There is a GPU, which PyTorch runs on.")
    if path.is_dir():
        found = _open_run(path)
    else:
        artifact = open_artifact(path)
        config = artifact.header.config
        _check_native(config)
        found = NativeModel(
            NativeBackend(config, artifact.tensors),
            config,
            artifact.tokenizer,
            artifact.catalog,
            artifact.header.info,
        )
    if threads is not None:
        library.set_threads(threads)
    return found


def _open_run(path: Path) -> NativeModel:
    from bitgen.export.loaded import load_run
    from bitgen.training.checkpoint import open_run

    _check_native(open_run(path).config)
    model, tokenizer, catalog, info = load_run(path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return NativeModel(NativeBackend(model.config, tensors), model.config, tokenizer, catalog, info)


def _check_native(config: BitGenConfig) -> None:
    reason = why_not_native(config)
    if reason is not None:
        raise NativeUnavailable(
            f"The native engine does not run this model: {reason}.", remedy=_TAKE_TORCH
        )


def _torch_has_gpu() -> bool:
    """Whether PyTorch would take CUDA or ROCm. Torch is imported only where there is a driver."""
    if sys.platform == "win32":
        from ctypes.util import find_library

        has_driver = find_library("nvcuda") is not None
    else:
        has_driver = any(Path(file).exists() for file in _GPU_FILES)
    if not has_driver:
        return False
    import torch

    return torch.cuda.is_available()


class NativeBackend:
    """A model on the C++ engine."""

    name = "native"

    def __init__(self, config: BitGenConfig, tensors: Mapping[str, np.ndarray]) -> None:
        """`tensors` by the names of an exported file; see `Engine`."""
        self.config = config
        self._engine = Engine(config, tensors)
        self.num_image_tokens = self._engine.num_image_tokens
        self.task_words = TaskWords.of_model(config, tensors)
        self._caption_idf_V = caption_idf_of(tensors)
        self._robots: RobotTexts | None = None
        self._robots_RC = np.empty((0, config.hidden_size), np.float32)
        self._last_picture: tuple[np.ndarray, np.ndarray] | None = None

    def replies(
        self,
        requests: Iterable[Request],
        vocabulary: Vocabulary,
        options: CaptionOptions,
        writes: bool,
        task: TaskRequest | None,
    ) -> Iterator[Reply]:
        """See `Backend.replies`: a row that ends makes room for the next picture at once."""
        remaining = iter(requests)
        if not writes:
            while batch := list(itertools.islice(remaining, options.batch_size)):
                yield from (row.reply() for row in self._rows(batch, task))
            return
        generator = Generator(
            self._engine,
            GenerationOptions(
                eos_id=vocabulary.eos_id,
                max_tokens=options.max_tokens,
                beam_size=options.beam_size,
                length_penalty=options.length_penalty,
                temperature=options.drawing_temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                num_samples=options.num_samples,
                never_ids=vocabulary.never_ids,
                vocab_size=vocabulary.size,
                rows=options.pictures_at_a_time,
            ),
        )
        seed = options.drawing_seed
        in_order: deque[_Row] = deque()
        at_work: dict[int, _Row] = {}

        def fill() -> None:
            # More than there is room for: one begins within the call that ends another.
            while (
                len(at_work) <= options.pictures_at_a_time
                and len(in_order) < _HELD_BATCHES * options.batch_size
                and (batch := list(itertools.islice(remaining, _ENCODED_AT_ONCE)))
            ):
                for row in self._rows(batch, task):
                    number = generator.add(row.request.prompt_ids, row.image_PC, seed)
                    at_work[number] = row
                    in_order.append(row)

        fill()
        for number, generation in generator:
            samples = at_work[number].samples
            samples.append(generation)
            if len(samples) < options.num_samples:
                continue
            best = samples[most_agreed([one.tokens for one in samples], self._caption_idf_V)]
            at_work.pop(number).generation = Generation(
                best.tokens, best.log_probability, best.finished
            )
            while in_order and in_order[0].generation is not None:
                yield in_order.popleft().reply()
            fill()

    def _rows(self, batch: Sequence[Request], task: TaskRequest | None) -> list[_Row]:
        """Read pictures and, with a task, rank the robots for it."""
        image_BPC = self._encode([request.pixels_3SS for request in batch])
        robots: np.ndarray | list[None] = [None] * len(batch)
        if task is not None:
            robots = self._score([task.ids] * len(batch), list(image_BPC), task.robots)
        return list(map(_Row, batch, image_BPC, robots))

    def _encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Image tokens `[B, P, C]`. Those of a single picture are kept: the next question may be
        about the same one, as in a conversation."""
        if len(pixels) != 1:
            return self._engine.encode_images(np.stack(pixels))
        if self._last_picture is None or not np.array_equal(self._last_picture[0], pixels[0]):
            self._last_picture = (pixels[0].copy(), self._engine.encode_images(pixels[0][None]))
        return self._last_picture[1]

    def robot_logits(
        self,
        task_ids: Sequence[list[int]],
        pixels: Sequence[np.ndarray | None],
        robots: RobotTexts,
    ) -> np.ndarray:
        """See `Backend.robot_logits`: all tasks in one pass."""
        present = [picture for picture in pixels if picture is not None]
        encoded = iter(self._encode(present) if present else ())
        images = [None if picture is None else next(encoded) for picture in pixels]
        return self._score(task_ids, images, robots)

    def read_text(
        self, prompt_ids: Sequence[int], pixels: np.ndarray | None, room: int
    ) -> NativeReader:
        """See `Backend.read_text`."""
        image_PC = None if pixels is None else self._engine.encode_images(pixels[None])[0]
        return NativeReader(self._engine, self._engine.prompt(prompt_ids, image_PC), room)

    def _score(
        self,
        task_ids: Sequence[list[int]],
        images: Sequence[np.ndarray | None],
        robots: RobotTexts,
    ) -> np.ndarray:
        """Logits, float32 `[B, R]`, of tasks with image tokens `[P, C]` or without."""
        if robots != self._robots:
            self._robots_RC = self._engine.encode_robots(robots.ids)
            self._robots = robots
        return self._engine.robot_logits(task_ids, images, self._robots_RC, robots.names)


@dataclass
class _Row:
    """One picture on its way through the engine."""

    request: Request
    image_PC: np.ndarray
    robots_R: np.ndarray | None
    samples: list[EngineGeneration] = field(default_factory=list)
    generation: Generation | None = None

    def reply(self) -> Reply:
        return Reply(self.generation, self.robots_R)


class NativeReader:
    """See `bitgen.inference.planning.TextReader`: one row, whose tokens lie in order of slots."""

    def __init__(self, engine: Engine, prompt: TokenSequence, room: int) -> None:
        self._engine = engine
        self.length = len(prompt.ids)
        self._slots = np.arange(self.length + room, dtype=np.int32)
        self._cache = engine.new_cache(len(self._slots))
        first = replace(prompt, slots=self._slots[: self.length])
        engine.forward([first], self._cache, return_logits=False)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        behind = self.length + len(ids)
        row = TokenSequence(ids, past=self.length, slots=self._slots[:behind])
        logits_1V = self._engine.forward([row], self._cache).logits
        assert logits_1V is not None
        self.length = behind
        return logits_1V[0]

    def rewind(self, length: int) -> None:
        self.length = length

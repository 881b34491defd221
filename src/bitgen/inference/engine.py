"""The native engine: a whole model in C++, called by ctypes. NumPy alone, no torch.

    tensors of an artifact -> Engine -> encode_images -> image tokens --.
                                     -> generate / Generator            <+- prompts
                                     -> forward (logits, states), score_robots

The tensors are those of an exported file, by the same names: ternary layers as `NAME.packed`
(tiles, see docs/format.md) and `NAME.scale`, the embedding as float32 or as int8 tiles with row
scales, everything else float32. They are used where they lie and not copied, so that a file can be
mapped into memory.

The engine computes what `BitGenModel` computes: the same integers in every ternary product, sums of
floats in another order. It runs models with ternary weights; pictures only by the `vit` encoder.

Shapes: B rows, L text tokens, P image tokens, C width, V vocabulary, R robots.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitgen.config import ATTENTION_MODES, BitGenConfig
from bitgen.errors import InputError, ModelFileError
from bitgen.kernels import library

Floats = npt.NDArray[np.float32]

_STEPS_A_CALL = 32
"""Passes of the generator between two looks at Python's signals."""


@dataclass(frozen=True)
class TokenSequence:
    """One row of a forward pass: new tokens behind those that the cache holds.

    Attributes:
        ids: token ids; `-1 - i` stands for row `i` of `embeddings`.
        embeddings: float32 `[n, C]`, such as image tokens; None = none.
        prefix: so many tokens at the start see each other, the others see what stands before them.
            `len(ids)` is bidirectional attention.
        past: tokens before these that the cache holds.
        slots: for each token, past and new, its slot in the cache; None without a cache. Rows may
            share the slots of past tokens.
    """

    ids: Sequence[int] | npt.NDArray[Any]
    embeddings: Floats | None = None
    prefix: int = 0
    past: int = 0
    slots: Sequence[int] | npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class EngineOutput:
    """What `Engine.forward` returns; what was not asked for is None.

    Attributes:
        logits: float32 `[B, V]` of each row's last token, or `[total new tokens, V]`.
        states: float32 `[total new tokens, C]`, the final states, normalised.
        pooled: float32 `[B, C]`, the mean of each row's states of text tokens.
    """

    logits: Floats | None
    states: Floats | None
    pooled: Floats | None


@dataclass(frozen=True)
class GenerationOptions:
    """How prompts are continued; the words of `bitgen.inference.generate.generate`.

    Attributes:
        eos_id: the token that ends a row.
        max_tokens: most tokens generated a row, the end of text included.
        beam_size: hypotheses kept a row; 1 is greedy, or sampling with a temperature.
        length_penalty: hypotheses are ranked by `log_probability / length ** length_penalty`.
        temperature: 0 takes the likeliest token.
        top_k: sample among the so many likeliest tokens; 0 among all.
        top_p: sample among the fewest likeliest tokens that hold this probability.
        num_samples: texts drawn of each row, spread evenly over what the model may say (arithmetic
            sampling, arXiv 2210.15458). Those that begin alike are read as one.
        never_ids: tokens that are never chosen.
        vocab_size: ids from here on are never chosen; None = that of the model.
        rows: prompts that are worked on at a time.
    """

    eos_id: int
    max_tokens: int
    beam_size: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1
    never_ids: Sequence[int] = ()
    vocab_size: int | None = None
    rows: int = 16


@dataclass(frozen=True)
class EngineGeneration:
    """What one row generated.

    Attributes:
        tokens: ids, without prompt and without end-of-text token.
        log_probability: sum of the natural log-probabilities of the tokens and the end of text,
            over the whole vocabulary at temperature 1.
        finished: whether the end of text was generated; False where `max_tokens` cut the row off.
    """

    tokens: list[int]
    log_probability: float
    finished: bool


def why_not_native(config: BitGenConfig) -> str | None:
    """Why the engine cannot run models of this config; None where it can.

    A missing library is another matter: see `bitgen.kernels.library.describe`.
    """
    if config.quantization != "ternary":
        return f"its linear weights are not ternary (quantization {config.quantization})"
    if config.image_encoder != "vit":
        return f"its image encoder is {config.image_encoder}"
    return None


class Engine:
    """A model ready to run. Threads may share it: their calls run one after the other.

    Attributes:
        config: the architecture.
        num_image_tokens: P, image tokens a picture.
    """

    def __init__(self, config: BitGenConfig, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Build the engine on the tensors of an artifact.

        It computes by the instruction set that is chosen now (`library.select_kernels`).

        Args:
            config: the architecture; an image encoder other than `vit` is left out, and
                `encode_images` then fails.
            tensors: by name. They must not change while the engine lives. Names that it does not
                need are ignored.

        Raises:
            KernelsError: there is no library of kernels (`bitgen.kernels.library`).
            ModelFileError: a tensor is missing or does not fit the config, or the weights are not
                ternary.
        """
        if config.quantization != "ternary":
            raise ModelFileError(
                f"The native engine runs ternary weights; this model has quantization"
                f" {config.quantization!r}.",
                remedy="Run it in PyTorch.",
            )
        self._library = _declared_library()
        self.config = config
        self.num_image_tokens = (config.image_size // config.patch_size) ** 2
        self._kept: list[npt.NDArray[Any]] = []
        structure = _engine_config(config)
        self._handle = self._library.bitgen_engine_new(ctypes.byref(structure))
        if not self._handle:
            raise ModelFileError(self._error())
        self._close = weakref.finalize(self, self._library.bitgen_engine_free, self._handle)
        for name, tensor in tensors.items():
            self._set(name, np.asarray(tensor), tensors)
        if not self._library.bitgen_engine_ready(self._handle):
            raise ModelFileError(
                self._error(), remedy="Config and weights come from different models."
            )

    def encode_images(self, pixels_B3HW: npt.NDArray[np.uint8]) -> Floats:
        """Image tokens float32 `[B, P, C]` of pixels uint8 `[B, 3, S, S]`, not normalised.

        Raises:
            ValueError: another dtype, or shape than the config's.
            EngineError: this model has no `vit` encoder.
        """
        size = self.config.image_size
        if pixels_B3HW.dtype != np.uint8 or pixels_B3HW.shape[1:] != (3, size, size):
            raise ValueError(
                f"Expected uint8 [B, 3, {size}, {size}], got {pixels_B3HW.dtype}"
                f" {list(pixels_B3HW.shape)}."
            )
        pixels = np.ascontiguousarray(pixels_B3HW)
        tokens = np.empty((len(pixels), self.num_image_tokens, self.config.hidden_size), np.float32)
        self._check(
            self._library.bitgen_engine_encode_images(
                self._handle, pixels.ctypes.data, len(pixels), tokens.ctypes.data
            )
        )
        return tokens

    def new_cache(self, slots: int) -> EngineCache:
        """Room for the keys and values of `slots` tokens, for `forward`."""
        return EngineCache(self, slots)

    def forward(
        self,
        sequences: Sequence[TokenSequence],
        cache: EngineCache | None = None,
        all_logits: bool = False,
        return_logits: bool = True,
        return_states: bool = False,
        return_pooled: bool = False,
    ) -> EngineOutput:
        """One pass of the decoder over rows of any lengths; none pads another.

        Args:
            sequences: the rows.
            cache: takes the new tokens' keys and values; None keeps nothing.
            all_logits: logits of every new token, not of each row's last.
            return_logits: whether logits are computed.
            return_states: whether states are returned.
            return_pooled: whether pooled states are returned.

        Raises:
            EngineError: ids, slots, positions or prefixes out of range.
        """
        total = sum(len(sequence.ids) for sequence in sequences)
        rows, config = _SequenceArray(sequences, config=self.config), self.config
        logits = states = pooled = None
        if return_logits:
            count = total if all_logits else len(sequences)
            logits = np.empty((count, config.vocab_size), np.float32)
        if return_states:
            states = np.empty((total, config.hidden_size), np.float32)
        if return_pooled:
            pooled = np.empty((len(sequences), config.hidden_size), np.float32)
        if cache is not None and cache.engine is not self:
            raise ValueError("The cache belongs to another engine.")
        self._check(
            self._library.bitgen_engine_forward(
                self._handle,
                None if cache is None else cache.handle,
                rows.structures,
                len(sequences),
                int(all_logits),
                _address(logits),
                _address(states),
                _address(pooled),
            )
        )
        return EngineOutput(logits, states, pooled)

    def prompt(self, ids: Sequence[int], image_tokens: Floats | None = None) -> TokenSequence:
        """Image tokens `[P, C]` and text as one row, under the config's attention mode.

        As in generation and robot selection: picture and text see each other, unless the mode is
        causal.
        """
        count = 0 if image_tokens is None else len(image_tokens)
        whole = [*range(-1, -1 - count, -1), *ids]
        prefix = 0 if self.config.attention_mode == "causal" else len(whole)
        return TokenSequence(whole, image_tokens, prefix)

    def encode_robots(self, robot_ids: Sequence[Sequence[int]]) -> Floats:
        """Pooled states float32 `[R, C]` of the robots' texts, for `robot_logits`.

        Args:
            robot_ids: token ids of each robot's text.
        """
        rows = [TokenSequence(ids, prefix=len(ids)) for ids in robot_ids]
        pooled = self.forward(rows, return_logits=False, return_pooled=True).pooled
        assert pooled is not None
        return pooled

    def robot_logits(
        self,
        task_ids: Sequence[Sequence[int]],
        image_tokens: Sequence[Floats | None] | None,
        robots_RC: Floats,
        names: Sequence[str],
    ) -> Floats:
        """Logits float32 `[B, R]`; the sigmoid of one is the robot's probability.

        Args:
            task_ids: token ids of each task.
            image_tokens: `[P, C]` of each task's picture, or None where there is none.
            robots_RC: of `encode_robots`.
            names: of the robots; one seen in training adds its own bias.
        """
        pictures = [None] * len(task_ids) if image_tokens is None else image_tokens
        rows = [self.prompt(ids, p) for ids, p in zip(task_ids, pictures, strict=True)]
        tasks_BC = self.forward(rows, return_logits=False, return_pooled=True).pooled
        assert tasks_BC is not None
        known = self.config.robot_names
        biases = np.array([known.index(n) if n in known else -1 for n in names], np.int32)
        robots_RC = np.ascontiguousarray(robots_RC, np.float32)
        if robots_RC.shape != (len(names), self.config.hidden_size):
            raise ValueError(
                f"Expected states {[len(names), self.config.hidden_size]}, got"
                f" {list(robots_RC.shape)}."
            )
        logits_BR = np.empty((len(tasks_BC), len(names)), np.float32)
        self._check(
            self._library.bitgen_engine_score_robots(
                self._handle,
                tasks_BC.ctypes.data,
                len(tasks_BC),
                robots_RC.ctypes.data,
                len(names),
                biases.ctypes.data,
                logits_BR.ctypes.data,
            )
        )
        return logits_BR

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        image_tokens: Sequence[Floats | None] | None,
        options: GenerationOptions,
        seeds: Sequence[int] | None = None,
    ) -> list[EngineGeneration]:
        """Continue prompts: `Generator` for all of them, in their order; `num_samples` a row.

        Args:
            prompt_ids: token ids of each row, at least one.
            image_tokens: `[P, C]` of each row's picture, or None where there is none.
            options: the same for all rows.
            seeds: of each row's draws when sampling; None draws differently each time.

        Raises:
            EngineError: options or lengths that the model cannot have.
        """
        pictures = [None] * len(prompt_ids) if image_tokens is None else image_tokens
        if len(pictures) != len(prompt_ids):
            raise ValueError(f"{len(pictures)} pictures, but {len(prompt_ids)} prompts.")
        if seeds is not None and len(seeds) != len(prompt_ids):
            raise ValueError(f"{len(seeds)} seeds, but {len(prompt_ids)} prompts.")
        generator = Generator(self, options)
        for row, ids in enumerate(prompt_ids):
            generator.add(ids, pictures[row], None if seeds is None else seeds[row])
        found: dict[int, list[EngineGeneration]] = {}
        for row, generation in generator:
            found.setdefault(row, []).append(generation)
        return [generation for row in range(len(prompt_ids)) for generation in found[row]]

    def _set(
        self, name: str, tensor: npt.NDArray[Any], tensors: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        set_ternary = self._library.bitgen_engine_set_ternary
        layer, _, kind = name.rpartition(".")
        if kind == "packed" and f"{layer}.scale" in tensors:
            tiles = self._keep(tensor, np.uint8)
            scale = float(tensors[f"{layer}.scale"])
            done = set_ternary(self._handle, layer.encode(), tiles.ctypes.data, tiles.nbytes, scale)
        elif kind == "tiles" and f"{layer}.row_scales" in tensors:
            tiles = self._keep(tensor, np.int8)
            scales = self._keep(tensors[f"{layer}.row_scales"], np.float32)
            done = self._library.bitgen_engine_set_int8(
                self._handle,
                layer.encode(),
                tiles.ctypes.data,
                tiles.nbytes,
                scales.ctypes.data,
                scales.size,
            )
        elif tensor.dtype.kind == "f":
            values = self._keep(tensor, np.float32)
            done = self._library.bitgen_engine_set_float(
                self._handle, name.encode(), values.ctypes.data, values.size
            )
        else:
            return
        self._check(done)

    def _keep(self, tensor: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
        """The tensor in one piece, aligned, with a dtype; a copy only where it is not so."""
        tensor = np.require(tensor, dtype, ["C", "A"])
        self._kept.append(tensor)
        return tensor

    def _error(self) -> str:
        text: bytes = self._library.bitgen_last_error()
        return text.decode()

    def _check(self, succeeded: Any) -> None:
        if not succeeded:
            raise EngineError(self._error())


class EngineError(InputError):
    """The engine was asked for what the model cannot do; nothing was changed."""


class EngineCache:
    """Keys and values of tokens of one engine, each in a slot."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        native = engine._library
        self.handle = native.bitgen_cache_new(engine._handle, slots)
        engine._check(self.handle)
        self._close = weakref.finalize(self, native.bitgen_cache_free, self.handle)


class Generator:
    """Continues prompts, several at a time: where one ends, the next one takes its place.

    Iterating works until all prompts added so far have ended, and gives each row's number (counted
    from 0 in the order of `add`) and what it generated, as soon as it ends; each of a row's samples
    one after the other. Prompts may be added meanwhile, also by another thread.
    """

    def __init__(self, engine: Engine, options: GenerationOptions) -> None:
        """Raises EngineError for options out of range, or a bidirectional model."""
        self._engine, self.options = engine, options
        native = self._native = engine._library
        never = np.array(list(options.never_ids), np.int32)
        structure = _GeneratorOptions(
            rows=options.rows,
            max_tokens=options.max_tokens,
            eos_id=options.eos_id,
            vocab_size=(
                engine.config.vocab_size if options.vocab_size is None else options.vocab_size
            ),
            never_ids=never.ctypes.data,
            num_never_ids=len(never),
            beam_size=options.beam_size,
            length_penalty=options.length_penalty,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            num_samples=options.num_samples,
        )
        self._handle = native.bitgen_generator_new(engine._handle, ctypes.byref(structure))
        engine._check(self._handle)
        self._close = weakref.finalize(self, native.bitgen_generator_free, self._handle)

    def add(
        self, ids: Sequence[int], image_tokens: Floats | None = None, seed: int | None = None
    ) -> int:
        """Add a prompt; its number.

        Args:
            ids: token ids, at least one.
            image_tokens: float32 `[P, C]`, copied; they stand before the text.
            seed: of the row's draws when sampling; None takes one of the system's.

        Raises:
            EngineError: ids out of range, or a prompt that leaves no room for `max_tokens`.
        """
        prompt = np.array(ids, np.int32)
        width = self._engine.config.hidden_size
        tokens = np.zeros((0, width)) if image_tokens is None else image_tokens
        embeddings = np.ascontiguousarray(tokens, np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise ValueError(f"Expected image tokens [P, {width}], got {list(embeddings.shape)}.")
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        number: int = self._native.bitgen_generator_add(
            self._handle,
            prompt.ctypes.data,
            len(prompt),
            embeddings.ctypes.data,
            len(embeddings),
            seed % 2**64,
        )
        self._engine._check(number >= 0)
        return number

    def __iter__(self) -> Iterator[tuple[int, EngineGeneration]]:
        unfinished = ctypes.c_int64()
        while True:
            waiting = self._native.bitgen_generator_run(
                self._handle, _STEPS_A_CALL, ctypes.byref(unfinished)
            )
            self._engine._check(waiting >= 0)
            for _ in range(waiting):
                yield self._take()
            if not unfinished.value and not waiting:
                return

    def _take(self) -> tuple[int, EngineGeneration]:
        found = _Generation()
        tokens = np.empty(self.options.max_tokens, np.int32)
        self._native.bitgen_generator_take(self._handle, ctypes.byref(found), tokens.ctypes.data)
        generation = EngineGeneration(
            tokens[: found.num_tokens].tolist(), found.log_probability, bool(found.finished)
        )
        return found.request, generation


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


class _EngineConfig(ctypes.Structure):
    """`bitgen_engine_config` of native/engine.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                "intermediate_size", "num_experts", "experts_per_token", "max_positions",
                "attention_mode", "image_size", "patch_size", "stem_residual_convolutions",
                "encoder_hidden_size", "encoder_layers", "encoder_heads",
                "encoder_intermediate_size", "num_robots",
            )
        ),
        ("rope_theta", ctypes.c_double),
        ("rms_norm_eps", ctypes.c_float),
        ("image_mean", ctypes.c_float * 3),
        ("image_std", ctypes.c_float * 3),
    ]  # fmt: skip


def _engine_config(config: BitGenConfig) -> _EngineConfig:
    values: dict[str, Any] = {
        name: getattr(config, name)
        for name in (field[0] for field in _EngineConfig._fields_)
        if name not in ("attention_mode", "num_robots", "image_mean", "image_std")
    }
    values["attention_mode"] = ATTENTION_MODES.index(config.attention_mode)
    values["num_robots"] = len(config.robot_names)
    values["image_mean"] = (ctypes.c_float * 3)(*config.image_mean)
    values["image_std"] = (ctypes.c_float * 3)(*config.image_std)
    if config.image_encoder != "vit":
        values["image_size"] = 0
    return _EngineConfig(**values)


class _Sequence(ctypes.Structure):
    """`bitgen_sequence` of native/engine.h."""

    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("past", ctypes.c_int64),
        ("num_new", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("num_embeddings", ctypes.c_int64),
        ("prefix", ctypes.c_int64),
    ]


class _SequenceArray:
    """`bitgen_sequence` structures, and the arrays that they point to."""

    def __init__(self, sequences: Sequence[TokenSequence], config: BitGenConfig) -> None:
        self._kept: list[npt.NDArray[Any]] = []
        self.structures = (_Sequence * len(sequences))()
        for structure, sequence in zip(self.structures, sequences, strict=True):
            ids = np.ascontiguousarray(sequence.ids, np.int32)
            structure.ids, structure.num_new = ids.ctypes.data, len(ids)
            structure.past, structure.prefix = sequence.past, sequence.prefix
            self._kept.append(ids)
            if sequence.slots is not None:
                slots = np.ascontiguousarray(sequence.slots, np.int32)
                if len(slots) != sequence.past + len(ids):
                    raise ValueError(
                        f"{len(slots)} slots, but {sequence.past} past tokens and {len(ids)} new."
                    )
                structure.slots = slots.ctypes.data
                self._kept.append(slots)
            if sequence.embeddings is not None:
                embeddings = np.ascontiguousarray(sequence.embeddings, np.float32)
                if embeddings.ndim != 2 or embeddings.shape[1] != config.hidden_size:
                    raise ValueError(
                        f"Expected embeddings [n, {config.hidden_size}], got"
                        f" {list(embeddings.shape)}."
                    )
                structure.embeddings = embeddings.ctypes.data
                structure.num_embeddings = len(embeddings)
                self._kept.append(embeddings)


class _GeneratorOptions(ctypes.Structure):
    """`bitgen_generator_options` of native/engine.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("eos_id", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("never_ids", ctypes.c_void_p),
        ("num_never_ids", ctypes.c_int64),
        ("beam_size", ctypes.c_int64),
        ("length_penalty", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("num_samples", ctypes.c_int64),
    ]


class _Generation(ctypes.Structure):
    """`bitgen_generation` of native/engine.h."""

    _fields_ = [
        ("request", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("log_probability", ctypes.c_double),
        ("finished", ctypes.c_int32),
    ]


def _declared_library() -> ctypes.CDLL:
    native = library.load()
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bitgen_last_error": (text, []),
        "bitgen_engine_new": (pointer, [pointer]),
        "bitgen_engine_free": (None, [pointer]),
        "bitgen_engine_set_float": (ctypes.c_int, [pointer, text, pointer, number]),
        "bitgen_engine_set_ternary": (
            ctypes.c_int,
            [pointer, text, pointer, number, ctypes.c_float],
        ),
        "bitgen_engine_set_int8": (
            ctypes.c_int,
            [pointer, text, pointer, number, pointer, number],
        ),
        "bitgen_engine_ready": (ctypes.c_int, [pointer]),
        "bitgen_engine_encode_images": (ctypes.c_int, [pointer, pointer, number, pointer]),
        "bitgen_cache_new": (pointer, [pointer, number]),
        "bitgen_cache_free": (None, [pointer]),
        "bitgen_engine_forward": (
            ctypes.c_int,
            [pointer, pointer, pointer, number, ctypes.c_int, pointer, pointer, pointer],
        ),
        "bitgen_engine_score_robots": (
            ctypes.c_int,
            [pointer, pointer, number, pointer, number, pointer, pointer],
        ),
        "bitgen_generator_new": (pointer, [pointer, pointer]),
        "bitgen_generator_free": (None, [pointer]),
        "bitgen_generator_add": (
            number,
            [pointer, pointer, number, pointer, number, ctypes.c_uint64],
        ),
        "bitgen_generator_run": (number, [pointer, number, pointer]),
        "bitgen_generator_take": (ctypes.c_int, [pointer, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native

"""Reading one more token a row: call by call, or as one recorded step (a CUDA graph).

On a GPU a decoding step is hundreds of small kernels, and starting them takes longer than running
them. A CUDA graph starts them all at once. It repeats them on the same memory, so it needs a cache
whose steps are all alike (`FixedCache`), and is good for as many rows, and as long a cache, as it
was recorded for.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from bitgen.errors import BitGenError, ConfigError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.cache import AttentionCache, StaticCache
from bitgen.model.masks import AttentionMask

_BUCKET = 64
"""Lengths of cache are multiples of this, so that one recording serves many prompts."""
_WARM_UP_STEPS = 3
_CHECKED_STEPS = 3

Step: TypeAlias = Callable[[], torch.Tensor]
Recorder: TypeAlias = Callable[[Step], Step]
"""Runs a step as often as it likes, and returns what repeats it: each call gives the same tensor,
with new numbers."""


class Decoder(Protocol):
    """What generation asks of a model whose prompts have been read."""

    def read(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Read one more token a row: logits of the next one, float32 `[B, V]`, which are valid up
        to the next call."""

    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row `b` becomes what row `rows_B[b]` was."""


class EagerDecoder:
    """Calls the model for each token."""

    def __init__(self, model: BitGenModel, cache: AttentionCache) -> None:
        self.model, self.cache = model, cache

    def read(self, tokens_B: torch.Tensor) -> torch.Tensor:
        return _next_logits(self.model, tokens_B.unsqueeze(1), self.cache)

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.cache.reorder(rows_B)


class RecordedDecoder:
    """Repeats one recorded step, for a fixed number of rows and length of cache."""

    def __init__(self, model: BitGenModel, rows: int, max_length: int, record: Recorder) -> None:
        """Record. Raises BitGenError if the recorded step answers otherwise than the model."""
        self.cache = model.new_fixed_cache(rows, max_length)
        self._tokens_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=self.cache.device)

        def step() -> torch.Tensor:
            with torch.autocast(self.cache.device.type, enabled=False):
                return _next_logits(model, self._tokens_B1, self.cache)

        self._repeat = record(step)
        self._check(step, model.config.vocab_size)

    def read(self, tokens_B: torch.Tensor) -> torch.Tensor:
        length = self.cache.length
        if length >= self.cache.max_length:
            raise ValueError(f"All {length} positions of the recorded step's cache are held.")
        self._tokens_B1.copy_(tokens_B.unsqueeze(1))
        logits_BV = self._repeat()
        self.cache.length = length + 1  # a recording runs nothing on the host
        return logits_BV

    def reorder(self, rows_B: torch.Tensor) -> None:
        self.cache.reorder(rows_B)

    def _check(self, step: Step, vocab_size: int) -> None:
        """The first tokens of a text, by the recording and by the model itself."""
        rows, device = len(self._tokens_B1), self._tokens_B1.device
        tokens_TB = torch.arange(_CHECKED_STEPS * rows, device=device).view(-1, rows) % vocab_size

        def call(tokens_B: torch.Tensor) -> torch.Tensor:
            self._tokens_B1.copy_(tokens_B.unsqueeze(1))
            return step()

        self.cache.clear()
        expected = [call(tokens_B).clone() for tokens_B in tokens_TB]
        self.cache.clear()
        got = [self.read(tokens_B).clone() for tokens_B in tokens_TB]
        self.cache.clear()
        if not torch.allclose(
            torch.stack(got), torch.stack(expected), rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise BitGenError(
                "The CUDA graph of a decoding step answers otherwise than the model itself.",
                remedy="Leave cuda_graphs out, and report this with the GPU and torch's version.",
            )


class DecodingGraphs:
    """The recorded steps of one model: one for each number of rows and length of cache.

    A few are kept, the last used, each with its cache on the GPU. When the model's weights change,
    all are made anew.
    """

    def __init__(self, model: BitGenModel, most: int = 2, record: Recorder | None = None) -> None:
        """Prepare to record; nothing is recorded yet.

        Args:
            model: it has to stay on its device.
            most: recordings kept.
            record: how a step is recorded; None = as a CUDA graph.

        Raises:
            ConfigError: the model is not on a CUDA device, or has experts.
        """
        device = next(model.parameters()).device
        if record is None and device.type != "cuda":
            raise ConfigError(
                f"CUDA graphs need a CUDA device; the model is on {device}.",
                remedy="Leave cuda_graphs out, or load the model with device cuda.",
            )
        if model.config.num_experts > 1:
            raise ConfigError(
                "A decoding step of a model with experts cannot be a CUDA graph: how many tokens"
                " each expert takes is read by the host in every step.",
                remedy="Leave cuda_graphs out.",
            )
        self.model, self.most = model, most
        self._record = record or record_cuda_graph
        self._weights: tuple[tuple[int, int], ...] = ()
        self._decoders: OrderedDict[tuple[int, int], RecordedDecoder] = OrderedDict()

    @torch.inference_mode()
    def decoder(self, cache: StaticCache, rows_B: torch.Tensor, max_length: int) -> RecordedDecoder:
        """A decoder that goes on from what `cache` holds; valid up to the next call of this.

        Args:
            cache: filled with prompts; copied.
            rows_B: which of its rows each row of the decoder begins as.
            max_length: columns that the rows may come to have.

        Raises:
            BitGenError: recording gave a step that answers otherwise than the model.
        """
        weights = _fingerprint(self.model)
        if weights != self._weights:
            self._decoders.clear()
            self._weights = weights
        key = len(rows_B), -(-max_length // _BUCKET) * _BUCKET
        if key in self._decoders:
            self._decoders.move_to_end(key)
        else:
            while len(self._decoders) >= self.most:
                self._decoders.popitem(last=False)
            self._decoders[key] = RecordedDecoder(self.model, *key, self._record)
        decoder = self._decoders[key]
        decoder.cache.load(cache, rows_B)
        return decoder


def record_cuda_graph(step: Step) -> Step:
    """`step` as a CUDA graph, recorded after a few calls that allocate and compile what it needs.

    As https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs has it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def repeat() -> torch.Tensor:
        graph.replay()
        return output

    return repeat


def _next_logits(
    model: BitGenModel, tokens_B1: torch.Tensor, cache: AttentionCache
) -> torch.Tensor:
    # A mask that is given needs no other to be made, on the host.
    output = model(tokens_B1, attention_mask=AttentionMask.causal(), attention_cache=cache)
    return output.logits[:, -1].float()


def _fingerprint(model: BitGenModel) -> tuple[tuple[int, int], ...]:
    """Where the weights lie, and how often each was changed: what a recording relies on."""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in itertools.chain(model.parameters(), model.buffers())
    )

"""The programs that peers.py and instructions.py run, each with the same text tower.

Every program is given token `(7919 * i + 13) % vocab_size` at position i of a prompt.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from common import seconds_of

from bitgen.config import BitGenConfig
from bitgen.errors import BitGenError, InputError
from bitgen.inference.engine import Engine, GenerationOptions, Generator, TokenSequence
from bitgen.kernels import library
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers

LONGEST = 512
"""Tokens that a program has room for."""
NATIVE, PYTORCH = "BitGen", "BitGen, PyTorch"

Floats = npt.NDArray[np.float32]


class Program(Protocol):
    """One program with one model."""

    def set_threads(self, count: int) -> None:
        """Compute on so many threads from now on."""

    def prompt(self, count: int) -> float:
        """Seconds for `count` new tokens in one call."""

    def decode(self, past: int, count: int) -> float:
        """Seconds for `count` greedy tokens after `past` others."""

    def logits(self, count: int) -> Floats:
        """Logits `[count, V]`."""


@dataclass(frozen=True)
class PeerKind:
    """A program to compare with, and the model file that it takes.

    Attributes:
        name: shown.
        option: of peers.py, for the program's folder.
        architecture: GGUF's name of the graph.
        ternary_type: GGUF's name of the layout of ternary matrices.
        activation: of the graph's feed-forward layers.
        options: of peer.cpp.
        subfolder: of the program's folder, where the headers of llama.cpp lie.
        smallest_width: fewest inputs of a matrix that it multiplies by; it aborts below.
    """

    name: str
    option: str
    architecture: str
    ternary_type: str
    activation: str = "squared ReLU"
    options: tuple[str, ...] = ()
    subfolder: str = "."
    smallest_width: int = 1


PEERS = (
    PeerKind("llama.cpp TQ2_0", "llama_cpp", "bitnet", "TQ2_0", activation="SiLU"),
    PeerKind(
        "bitnet.cpp I2_S", "bitnet_cpp", "bitnet-b1.58", "I2_S", subfolder="3rdparty/llama.cpp"
    ),
    PeerKind("ik_llama.cpp IQ2_BN", "ik_llama_cpp", "bitnet-b1.58", "IQ2_BN", smallest_width=512),
    PeerKind(
        "ik_llama.cpp IQ2_BN_R4",
        "ik_llama_cpp",
        "bitnet-b1.58",
        "IQ2_BN",
        options=("repack",),
        smallest_width=512,
    ),
)


def make_model(model_size: str) -> BitGenModel:
    """A causal model with random ternary weights, packed, and random norms."""
    torch.manual_seed(0)
    config = BitGenConfig.preset(model_size, attention_mode="causal", max_positions=2 * LONGEST)
    model = BitGenModel(config).eval().requires_grad_(False)
    for parameter in model.text_decoder.parameters():
        if parameter.dim() == 1:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    pack_ternary_layers(model)
    return model


def prompt_ids(count: int, vocab_size: int) -> list[int]:
    """The tokens that every program is given; peer.cpp makes the same."""
    return [(7919 * i + 13) % vocab_size for i in range(count)]


class NativePath:
    """BitGen's engine."""

    def __init__(self, model: BitGenModel) -> None:
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self._engine = Engine(model.config, tensors)
        self._cache = self._engine.new_cache(LONGEST)
        self._vocab_size = model.config.vocab_size

    def set_threads(self, count: int) -> None:
        library.set_threads(count)

    def prompt(self, count: int) -> float:
        tokens = TokenSequence(prompt_ids(count, self._vocab_size), slots=range(count))
        return seconds_of(lambda: self._engine.forward([tokens], self._cache))

    def decode(self, past: int, count: int) -> float:
        # The generator of `bitgen infer`, stopped where the prompt has given the first token.
        options = GenerationOptions(eos_id=0, never_ids=[0], max_tokens=count + 1, rows=1)
        generator = Generator(self._engine, options)
        generator.add(prompt_ids(past, self._vocab_size))
        run, unfinished = library.load().bitgen_generator_run, ctypes.c_int64()
        run(generator._handle, 1, ctypes.byref(unfinished))
        seconds = seconds_of(lambda: run(generator._handle, count, ctypes.byref(unfinished)))
        if unfinished.value:
            raise BitGenError(f"The engine did not end after {count} tokens.")
        return seconds

    def logits(self, count: int) -> Floats:
        tokens = TokenSequence(prompt_ids(count, self._vocab_size))
        logits = self._engine.forward([tokens], all_logits=True).logits
        assert logits is not None
        return logits


class TorchPath:
    """BitGen's PyTorch path. It computes the logits of every token of a prompt."""

    def __init__(self, model: BitGenModel) -> None:
        self._model = model

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def prompt(self, count: int) -> float:
        return seconds_of(lambda: self._read(count, count))

    @torch.inference_mode()
    def decode(self, past: int, count: int) -> float:
        logits_V, cache = self._read(past, past + count)

        def write() -> None:
            token_11 = logits_V.argmax().reshape(1, 1)
            for _ in range(count):
                output = self._model(token_11, attention_cache=cache)
                token_11 = output.logits[:, -1].argmax(dim=-1, keepdim=True)

        return seconds_of(write)

    @torch.inference_mode()
    def logits(self, count: int) -> Floats:
        ids = torch.tensor([prompt_ids(count, self._model.config.vocab_size)])
        return self._model(ids).logits[0].float().numpy()

    @torch.inference_mode()
    def _read(self, count: int, room: int) -> tuple[torch.Tensor, Any]:
        ids = torch.tensor([prompt_ids(count, self._model.config.vocab_size)])
        cache = self._model.new_cache(1, room)
        return self._model(ids, attention_cache=cache).logits[0, -1], cache


class Peer:
    """A running peer.cpp, asked line by line."""

    def __init__(self, binary: Path, model: Path, kind: PeerKind, vocab_size: int) -> None:
        self._name, self._vocab_size = f"{kind.name} ({model.name})", vocab_size
        self._logits_file = model.with_suffix(".logits")
        self._process = subprocess.Popen(
            [str(binary), str(model), str(vocab_size), str(LONGEST), *kind.options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def set_threads(self, count: int) -> None:
        self._ask(f"threads {count}")

    def prompt(self, count: int) -> float:
        return float(self._ask(f"prompt {count}"))

    def decode(self, past: int, count: int) -> float:
        return float(self._ask(f"decode {past} {count}"))

    def logits(self, count: int) -> Floats:
        self._ask(f"logits {count} {self._logits_file}")
        return np.fromfile(self._logits_file, np.float32).reshape(count, self._vocab_size)

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return line.strip()

    def _fail(self) -> None:
        raise BitGenError(f"{self._name} ended ({self._process.wait()}).")


def compile_peer(kind: PeerKind, source: Path, output: Path) -> None:
    """Compile peer.cpp against a built program.

    Args:
        kind: which program.
        source: its folder.
        output: the executable to write.

    Raises:
        InputError: `source` is no such program or not built, or there is no compiler.
        BitGenError: the compiler failed.
    """
    root = source.resolve() / kind.subfolder
    includes = [root / "include", root / "ggml" / "include"]
    libraries = sorted(
        path
        for pattern in ("libllama.so", "libggml*.so", "libllama.dylib", "libggml*.dylib")
        for path in source.resolve().rglob(pattern)
    )
    if not (includes[0] / "llama.h").is_file() or not libraries:
        raise InputError(
            f"{source} holds no built {kind.name.split()[0]}: expected"
            f" {includes[0] / 'llama.h'}, and libllama as a shared library in the folder.",
            remedy="Build its shared libraries inside the folder, as its documentation says.",
        )
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise InputError("There is no C++ compiler.", remedy="Install one, or name it in CXX.")
    command = [compiler, "-O2", "-std=c++17", str(Path(__file__).with_name("peer.cpp"))]
    command += [f"-I{include}" for include in includes]
    command += [str(library) for library in libraries]
    command += [f"-Wl,-rpath,{folder}" for folder in {library.parent for library in libraries}]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise BitGenError(f"{' '.join(command)} failed:\n{done.stderr}")


def revision(source: Path) -> str:
    """The commit of a source that is a git checkout, else the name of its folder."""
    if (source / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(source), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return source.resolve().name

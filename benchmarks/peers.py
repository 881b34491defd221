"""Whole models side by side: llama.cpp, bitnet.cpp and ik_llama.cpp against BitGen.

    python benchmarks/peers.py --llama_cpp DIR --bitnet_cpp DIR --ik_llama_cpp DIR

A text tower of each size, with random ternary weights, is written as GGUF for each program (see
gguf_file.py) and run by all of them in one process each:

    decode 64    tokens/s of 64 greedy tokens, one a call, after a prompt of 64 tokens
    prompt 128   tokens/s of 128 new tokens in one call, with logits of the last one
    prompt 512   the same with 512

Cases take turns, program by program and round by round, so that a drift of the machine meets all;
figures are medians over the rounds. Before, every program's logits for 64 tokens are compared with
PyTorch's (relative error of all logits, and how often both name the same likeliest token). Programs
quantize activations in their own ways, so errors are not zero; a model with another activation
function is 5 to 15 times as far away, and how far is shown.

    llama.cpp      TQ2_0, architecture `bitnet`. Its graph has SiLU where BitNet b1.58 2B4T and
                   BitGen have the squared ReLU: it is compared with that model, whose work is the
                   same.
    bitnet.cpp     I2_S, architecture `bitnet-b1.58`
    ik_llama.cpp   IQ2_BN, architecture `bitnet-b1.58`, as it is and repacked at load (IQ2_BN_R4)

Embedding and head of the peers are Q8_0 (8.5 bits), beside our int8 ones; `--embedding F16` or
`F32` takes those, beside our float32 ones. Contexts, caches and attention are each program's
defaults.

DIR is the folder of a program's source, built inside it as a shared library for this processor, as
its own documentation says (the library `llama` of llama.cpp, of ik_llama.cpp, and of the llama.cpp
inside bitnet.cpp). A small program, peer.cpp, is compiled against it here by the compiler of the
variable CXX (c++). What is not given is left out.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from common import interleave, make_parser, run, seconds_of, show_result
from gguf_file import EMBEDDING_TYPES, write_text_tower

from bitgen.config import BitGenConfig
from bitgen.console import console
from bitgen.errors import BitGenError, InputError
from bitgen.model import layers
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers

LONGEST = 512
COMPARED_TOKENS = 64
LARGEST_ERROR = 0.15
"""Of the logits, relative; the other activation function makes 0.5 and more."""
ROUNDS = {"nano": 15, "tiny": 15, "small": 9, "base": 7, "large": 5}
QUICK_ROUNDS = 2
PYTORCH = "BitGen, PyTorch"
SECONDS_OF_REST = 0.02
"""Between two cases, for threads that still spin after their work."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One thing that is timed: `tokens` tokens, after `past` others."""

    name: str
    past: int
    tokens: int


CASES = (Case("decode 64", 64, 64), Case("prompt 128", 0, 128), Case("prompt 512", 0, 512))


class Program(Protocol):
    """One program with one model."""

    def set_threads(self, count: int) -> None: ...

    def prompt(self, count: int) -> float:
        """Seconds for `count` new tokens."""

    def decode(self, past: int, count: int) -> float:
        """Seconds for `count` greedy tokens after `past` others."""

    def logits(self, count: int) -> Floats:
        """Logits `[count, V]`."""


@dataclass(frozen=True)
class PeerKind:
    """A program to compare with, and the model file that it takes.

    Attributes:
        name: shown.
        option: of this script, for the program's folder.
        architecture: GGUF's name of the graph.
        ternary_type: GGUF's name of the layout of ternary matrices.
        activation: of the graph's feed-forward layers.
        options: of peer.cpp.
        subfolder: of the program's folder, where the headers of llama.cpp lie.
    """

    name: str
    option: str
    architecture: str
    ternary_type: str
    activation: str = "squared ReLU"
    options: tuple[str, ...] = ()
    subfolder: str = "."


PEERS = (
    PeerKind("llama.cpp TQ2_0", "llama_cpp", "bitnet", "TQ2_0", activation="SiLU"),
    PeerKind(
        "bitnet.cpp I2_S", "bitnet_cpp", "bitnet-b1.58", "I2_S", subfolder="3rdparty/llama.cpp"
    ),
    PeerKind("ik_llama.cpp IQ2_BN", "ik_llama_cpp", "bitnet-b1.58", "IQ2_BN"),
    PeerKind(
        "ik_llama.cpp IQ2_BN_R4", "ik_llama_cpp", "bitnet-b1.58", "IQ2_BN", options=("repack",)
    ),
)


def prompt_ids(count: int, vocab_size: int) -> list[int]:
    """The tokens that every program is given; peer.cpp makes the same."""
    return [(7919 * i + 13) % vocab_size for i in range(count)]


class Peer:
    """A running `peer`, asked line by line."""

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


class TorchPath:
    """BitGen's PyTorch path, with packed weights."""

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


def main() -> int:
    arguments = read_arguments()
    sources: dict[str, Path] = {}
    for option in dict.fromkeys(kind.option for kind in PEERS):
        if getattr(arguments, option) is None:
            console.note(f"--{option} was not given: left out.")
        else:
            sources[option] = getattr(arguments, option)
    kinds = [kind for kind in PEERS if kind.option in sources]
    checks: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        folder = Path(name)
        binaries = {
            kind.option: compile_peer(kind, sources[kind.option], folder / f"peer_{kind.option}")
            for kind in kinds
        }
        for model_size in arguments.model_sizes:
            model = make_model(model_size)
            expected = reference_logits(model)
            with ExitStack() as stack:
                programs: dict[str, Program] = {}
                for kind in kinds:
                    path = folder / f"{model_size}_{kind.ternary_type}.gguf"
                    if not path.exists():
                        write_text_tower(
                            path, model, kind.architecture, kind.ternary_type, arguments.embedding
                        )
                    peer = Peer(binaries[kind.option], path, kind, model.config.vocab_size)
                    stack.callback(peer.close)
                    programs[kind.name] = peer
                    check = compare(peer, kind.activation, expected)
                    checks.append({"model_size": model_size, "program": kind.name, **check})
                pack_ternary_layers(model)
                programs[PYTORCH] = TorchPath(model)
                results += measure(arguments, model_size, programs)
            for path in folder.glob("*.gguf"):
                path.unlink()
    failures = [
        f"{check['program']}, {check['model_size']}: its logits differ from PyTorch's by"
        f" {check['error']:.3f}; at most {LARGEST_ERROR} was expected."
        for check in checks
        if not check["error"] <= LARGEST_ERROR
    ]
    console.table(
        ("size", "program", "activation", "error", "same token", "error to the other activation"),
        [
            (
                check["model_size"], check["program"], check["activation"],
                f"{check['error']:.4f}", f"{check['same_token']:.2f}",
                f"{check['error_to_other_activation']:.2f}",
            )
            for check in checks
        ],
    )  # fmt: skip
    console.result("")
    names = list(results[0]["tokens_per_second"])
    rows = [
        (
            result["model_size"], result["threads"], result["case"],
            *(f"{result['tokens_per_second'][name]:.1f}" for name in names),
        )
        for result in results
    ]  # fmt: skip
    figures = {
        "embedding": arguments.embedding,
        "peers": {option: revision(source) for option, source in sources.items()},
        "checks": checks,
        "cases": results,
    }
    columns = ("size", "threads", "tokens/s", *names)
    return show_result("peers", figures, columns, rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    for option in dict.fromkeys(kind.option for kind in PEERS):
        parser.add_argument(f"--{option}", type=Path, metavar="DIR", help="source, built in place")
    parser.add_argument(
        "--model_sizes", nargs="+", choices=ROUNDS, default=["tiny", "base", "large"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--embedding", choices=EMBEDDING_TYPES, default="Q8_0", help="of the peers")
    parser.add_argument("--rounds", type=int, help="of every size; by default fewer of larger ones")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument("--work_dir", type=Path, metavar="DIR", help="for files of up to 1 GB")
    return parser.parse_args()


def compile_peer(kind: PeerKind, source: Path, output: Path) -> Path:
    """Compile peer.cpp against a built program.

    Raises:
        InputError: `source` is no such program, not built, or there is no compiler.
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
            f" {includes[0] / 'llama.h'} and a shared library libllama below it.",
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
    return output


def revision(source: Path) -> str:
    """The commit of a source that is a git checkout, else the name of its folder."""
    if (source / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(source), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return source.resolve().name


def make_model(model_size: str) -> BitGenModel:
    """A text tower with random ternary weights and random norms, in float."""
    torch.manual_seed(0)
    config = BitGenConfig.preset(model_size, attention_mode="causal", max_positions=2 * LONGEST)
    model = BitGenModel(config).eval().requires_grad_(False)
    for parameter in model.text_decoder.parameters():
        if parameter.dim() == 1:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model


class _SiLUGate:
    """What the graph of llama.cpp has in the squared ReLU's place."""

    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up


def reference_logits(model: BitGenModel) -> dict[str, Floats]:
    """PyTorch's logits `[COMPARED_TOKENS, V]` by activation function."""
    path = TorchPath(model)
    with mock.patch.object(layers, "_SquaredReluGate", _SiLUGate):
        silu = path.logits(COMPARED_TOKENS)
    return {"squared ReLU": path.logits(COMPARED_TOKENS), "SiLU": silu}


def compare(program: Program, activation: str, expected: Mapping[str, Floats]) -> dict[str, Any]:
    """How far a program's logits are from those of the model that it is to compute."""
    logits = program.logits(COMPARED_TOKENS)
    errors = {
        other: float(np.linalg.norm(logits - values) / np.linalg.norm(values))
        for other, values in expected.items()
    }
    same = logits.argmax(axis=1) == expected[activation].argmax(axis=1)
    return {
        "activation": activation,
        "error": errors.pop(activation),
        "same_token": float(same.mean()),
        "error_to_other_activation": min(errors.values()),
    }


def measure(
    arguments: argparse.Namespace, model_size: str, programs: Mapping[str, Program]
) -> list[dict[str, Any]]:
    """Tokens a second of every program, by threads and case."""
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS[model_size])

    def rate(program: Program, threads: int, case: Case) -> float:
        program.set_threads(threads)
        time.sleep(SECONDS_OF_REST)
        if case.past:
            return case.tokens / program.decode(case.past, case.tokens)
        return case.tokens / program.prompt(case.tokens)

    rates = interleave(
        {
            (threads, case, name): functools.partial(rate, program, threads, case)
            for threads in arguments.threads
            for case in CASES
            for name, program in programs.items()
        },
        rounds,
    )
    return [
        {
            "model_size": model_size,
            "threads": threads,
            "case": case.name,
            "rounds": rounds,
            "tokens_per_second": {
                name: statistics.median(rates[threads, case, name]) for name in programs
            },
        }
        for threads in arguments.threads
        for case in CASES
    ]


if __name__ == "__main__":
    run(main)

"""Whole models side by side: BitGen against llama.cpp, bitnet.cpp and ik_llama.cpp.

    python benchmarks/peers.py --llama_cpp DIR --bitnet_cpp DIR --ik_llama_cpp DIR

A text tower of each size, with random ternary weights, is written as GGUF for each program (see
gguf_file.py) and run by all of them:

    decode 64    tokens/s of 64 greedy tokens, one a call, after a prompt of 64 tokens
    prompt 128   tokens/s of 128 new tokens in one call, with logits of the last one
    prompt 512   the same with 512

Cases take turns, program by program and round by round, so that a drift of the machine meets all;
figures are medians over the rounds. `of memory` is the share of the memory's read bandwidth,
measured before, that decoding takes if every weight is read once a token; more than 1 means that
weights stay in the cache.

Before, each peer's logits for 64 tokens are compared with those of PyTorch with a float32
embedding, and the engine's with those of PyTorch with the same embedding: the relative error of all
logits, and how often both name the same likeliest token. Activations are rounded to int8, so the
smallest difference grows from layer to layer: what keys and values in float16, as every peer has
them, change in PyTorch itself is shown as `float16 cache`, and how far the logits are from those of
a model with another activation function as `other activation`.

    llama.cpp      TQ2_0, architecture `bitnet`. Its graph has SiLU where BitNet b1.58 2B4T and
                   BitGen have the squared ReLU, so it is compared with such a model; the work is
                   the same.
    bitnet.cpp     I2_S, architecture `bitnet-b1.58`
    ik_llama.cpp   IQ2_BN, architecture `bitnet-b1.58`, as it is and repacked at load (IQ2_BN_R4);
                   for widths from 512 on, below which it aborts

Embedding and head of the peers are Q8_0 (8.5 bits) beside our int8 ones (8 bits); with
`--embedding F16` or `F32` they have those, beside our float32 ones. Contexts, caches and attention
are each program's defaults.

DIR is the folder of a program's source, with the shared library `llama` (bitnet.cpp: that of the
llama.cpp inside) built in it for this processor, as its own documentation says. A small program,
peer.cpp, is compiled against it here, by the compiler that the variable CXX names (else c++). What
is not given is left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import interleave, make_parser, run, show_result
from gguf_file import EMBEDDING_TYPES, write_text_tower
from programs import (
    NATIVE,
    PEERS,
    PYTORCH,
    Floats,
    NativePath,
    Peer,
    Program,
    TorchPath,
    compile_peer,
    make_model,
    revision,
)

from bitgen.config import MODEL_SIZES
from bitgen.console import console
from bitgen.kernels import library
from bitgen.model import attention, layers
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import PackedTernaryLinear

COMPARED_TOKENS = 64
LARGEST_ERROR = 0.15
"""Of the logits, relative; another activation function makes 0.5 and more."""
ROUNDS = {"nano": 15, "tiny": 15, "small": 9, "base": 7, "large": 5}
QUICK_ROUNDS = 2
SECONDS_OF_REST = 0.01
"""Between two cases, for threads that still spin after their work."""
READ_BYTES = 512 * 2**20
READ_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One thing that is timed: `tokens` tokens, after `past` others."""

    name: str
    past: int
    tokens: int


CASES = (Case("decode 64", 64, 64), Case("prompt 128", 0, 128), Case("prompt 512", 0, 512))


def main() -> int:
    arguments = read_arguments()
    sources: dict[str, Path] = {}
    for option in dict.fromkeys(kind.option for kind in PEERS):
        if getattr(arguments, option) is None:
            console.note(f"--{option} was not given: left out.")
        else:
            sources[option] = getattr(arguments, option)
    checks: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    bandwidths = {threads: read_bandwidth(threads) for threads in arguments.threads}
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        folder = Path(name)
        for kind in PEERS:
            if kind.option in sources and not (folder / kind.option).exists():
                compile_peer(kind, sources[kind.option], folder / kind.option)
        for model_size in arguments.model_sizes:
            console.note(f"Making and checking {model_size}.")
            model = make_model(model_size)
            expected, float16_error = reference_logits(model)
            with ExitStack() as stack:
                programs: dict[str, Program] = {}
                for kind in PEERS:
                    if kind.option not in sources:
                        continue
                    if model.config.hidden_size < kind.smallest_width:
                        left_out[kind.name].append(model_size)
                        continue
                    path = folder / f"{model_size}_{kind.ternary_type}.gguf"
                    if not path.exists():
                        write_text_tower(
                            path, model, kind.architecture, kind.ternary_type, arguments.embedding
                        )
                    peer = Peer(folder / kind.option, path, kind, model.config.vocab_size)
                    stack.callback(peer.close)
                    programs[kind.name] = peer
                if arguments.embedding == "Q8_0":
                    model.text_decoder.quantize_embedding()
                pytorch = TorchPath(model)
                programs |= {NATIVE: NativePath(model), PYTORCH: pytorch}
                activations = {kind.name: kind.activation for kind in PEERS}
                for program, running in programs.items():
                    reference = dict(expected)
                    if program == NATIVE:
                        reference["squared ReLU"] = pytorch.logits(COMPARED_TOKENS)
                    check = compare(running, activations.get(program, "squared ReLU"), reference)
                    check["float16_cache"] = float16_error
                    checks.append({"model_size": model_size, "program": program, **check})
                results += measure(arguments, model, programs, bandwidths)
            for path in folder.glob(f"{model_size}_*"):
                path.unlink()
    for program, sizes in left_out.items():
        console.note(f"{program} does not run matrices as narrow as those of {', '.join(sizes)}.")
    return show(arguments, checks, results, bandwidths, sources)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    for option in dict.fromkeys(kind.option for kind in PEERS):
        parser.add_argument(f"--{option}", type=Path, metavar="DIR", help="source, built inside")
    parser.add_argument(
        "--model_sizes", nargs="+", choices=MODEL_SIZES, default=["tiny", "base", "large"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--embedding", choices=EMBEDDING_TYPES, default="Q8_0", help="of the peers")
    parser.add_argument("--rounds", type=int, help="of every size; by default fewer of larger ones")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of each size")
    parser.add_argument("--work_dir", type=Path, metavar="DIR", help="for files of up to 1 GB")
    return parser.parse_args()


class _SiLUGate:
    """What the graph of llama.cpp has in the squared ReLU's place."""

    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up


def reference_logits(model: BitGenModel) -> tuple[dict[str, Floats], float]:
    """PyTorch's logits `[COMPARED_TOKENS, V]` by activation function, and the relative error of
    those with keys and values in float16."""
    path, attend = TorchPath(model), attention.masked_attention

    def attend_float16(
        q_BHSD: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, *options: Any
    ) -> Any:
        return attend(q_BHSD, k_BHKD.half().float(), v_BHKD.half().float(), *options)

    logits = path.logits(COMPARED_TOKENS)
    with mock.patch.object(attention, "masked_attention", attend_float16):
        float16_error = relative_error(path.logits(COMPARED_TOKENS), logits)
    with mock.patch.object(layers, "_SquaredReluGate", _SiLUGate):
        return {"squared ReLU": logits, "SiLU": path.logits(COMPARED_TOKENS)}, float16_error


def relative_error(logits: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def compare(program: Program, activation: str, expected: Mapping[str, Floats]) -> dict[str, Any]:
    """How far a program's logits are from those of the model that it is to compute."""
    logits = program.logits(COMPARED_TOKENS)
    errors = {other: relative_error(logits, values) for other, values in expected.items()}
    same = logits.argmax(axis=1) == expected[activation].argmax(axis=1)
    return {
        "activation": activation,
        "error": errors.pop(activation),
        "same_token": float(same.mean()),
        "error_to_other_activation": min(errors.values()),
    }


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory."""
    library.set_threads(threads)
    data = np.ones(READ_BYTES, np.uint8)
    times = [
        library.load().bitgen_time_reading(data.ctypes.data, READ_BYTES, 1)
        for _ in range(READ_ROUNDS)
    ]
    return READ_BYTES / min(times)


def bytes_a_token(model: BitGenModel) -> int:
    """Weights that decoding one token reads: ternary ones at 2 bits, and the head."""
    decoder = model.text_decoder
    ternary = sum(
        layer.packed.nbytes for layer in decoder.modules() if isinstance(layer, PackedTernaryLinear)
    )
    return ternary + sum(tensor.nbytes for tensor in decoder.embed_tokens.state_dict().values())


def measure(
    arguments: argparse.Namespace,
    model: BitGenModel,
    programs: Mapping[str, Program],
    bandwidths: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Tokens a second of every program, by threads and case."""
    model_size = model.config.model_size
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
    results = []
    for threads in arguments.threads:
        for case in CASES:
            speeds = {name: statistics.median(rates[threads, case, name]) for name in programs}
            peers = {name: speed for name, speed in speeds.items() if name not in (NATIVE, PYTORCH)}
            most = bandwidths[threads] / bytes_a_token(model)
            results.append(
                {
                    "model_size": model_size,
                    "threads": threads,
                    "case": case.name,
                    "rounds": rounds,
                    "tokens_per_second": speeds,
                    "fastest_peer": max(peers, key=lambda name: peers[name]) if peers else None,
                    "over_fastest_peer": speeds[NATIVE] / max(peers.values()) if peers else None,
                    "over_pytorch": speeds[NATIVE] / speeds[PYTORCH],
                    "of_memory": speeds[NATIVE] / most if case.past else None,
                }
            )
    return results


def show(
    arguments: argparse.Namespace,
    checks: list[dict[str, Any]],
    results: list[dict[str, Any]],
    bandwidths: Mapping[int, float],
    sources: Mapping[str, Path],
) -> int:
    """Tables, the JSON line, and the exit code."""
    failures = [
        f"{check['program']}, {check['model_size']}: its logits differ from PyTorch's by"
        f" {check['error']:.3f}; at most {LARGEST_ERROR} was expected."
        for check in checks
        if not check["error"] <= LARGEST_ERROR
    ]
    console.table(
        (
            "size", "program", "activation", "error", "float16 cache", "other activation",
            "same token",
        ),
        [
            (
                check["model_size"], check["program"], check["activation"],
                f"{check['error']:.4f}", f"{check['float16_cache']:.4f}",
                f"{check['error_to_other_activation']:.4f}", f"{check['same_token']:.2f}",
            )
            for check in checks
        ],
    )  # fmt: skip
    console.result("")
    speeds = [result["tokens_per_second"] for result in results]
    names = max(speeds, key=len)

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        (
            result["model_size"], result["threads"], result["case"],
            *(shown(result["tokens_per_second"].get(name), 1) for name in names),
            shown(result["over_fastest_peer"], 2), shown(result["over_pytorch"], 2),
            shown(result["of_memory"], 2),
        )
        for result in results
    ]  # fmt: skip
    columns = (
        "size", "threads", "tokens/s", *names, "over the fastest peer", "over PyTorch", "of memory",
    )  # fmt: skip
    read = {threads: bandwidth / 1e9 for threads, bandwidth in bandwidths.items()}
    figures = {
        "embedding": arguments.embedding,
        "kernels": library.describe().kernels,
        "read_gb_per_second": read,
        "peers": {option: revision(source) for option, source in sources.items()},
        "checks": checks,
        "cases": results,
    }
    return show_result("peers", figures, columns, rows, failures)


if __name__ == "__main__":
    run(main)

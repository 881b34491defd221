"""Instructions that one token takes, decoded greedily on one thread: the engine's and PyTorch's.

    python benchmarks/instructions.py --model_size tiny

`perf stat` counts them where the machine lets it, else callgrind (valgrind), which runs a program
some 50 times slower and shows it a processor without AVX-512: the engine and torch then take their
AVX2 paths. Each program is run twice, for few and for more tokens after the same prompt, and the
difference is divided by the difference in tokens, so that what happens once does not count.
Embedding and head are int8.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common import make_parser, run, show_result
from programs import NATIVE, PYTORCH, NativePath, Program, TorchPath, make_model

from bitgen.config import MODEL_SIZES
from bitgen.console import console
from bitgen.errors import BitGenError, InputError

PROMPT_TOKENS = 64
FEW, MANY = 8, 24
PROGRAMS = {"pytorch": PYTORCH, "native": NATIVE}


def main() -> int:
    arguments = read_arguments()
    if arguments.decode is not None:
        model = make_model(arguments.model_size)
        model.text_decoder.quantize_embedding()
        native = arguments.program == "native"
        program: Program = NativePath(model) if native else TorchPath(model)
        program.set_threads(1)
        if arguments.callgrind:
            # Starting and loading run ten times faster without being counted.
            subprocess.run(
                ["callgrind_control", "--instr=on", str(os.getpid())],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        program.decode(PROMPT_TOKENS, arguments.decode)
        return 0
    counter = find_counter()
    console.note(f"Counting by {counter}.")
    per_token = {}
    for name in PROGRAMS:
        few, many = (count(counter, arguments.model_size, name, tokens) for tokens in (FEW, MANY))
        per_token[name] = (many - few) / (MANY - FEW)
    ratio = per_token["pytorch"] / per_token["native"]
    rows = [(PROGRAMS[name], f"{value / 1e6:.2f} M") for name, value in per_token.items()]
    rows.append(("PyTorch's over the engine's", f"{ratio:.1f}"))
    figures = {
        "model_size": arguments.model_size,
        "counter": counter,
        "prompt_tokens": PROMPT_TOKENS,
        "instructions_per_token": per_token,
        "ratio": ratio,
    }
    failures = [] if ratio > 1 else ["The engine takes more instructions than PyTorch."]
    return show_result("instructions", figures, ("", "instructions a token"), rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="tiny")
    parser.add_argument("--decode", type=int, metavar="TOKENS", help="be the program counted")
    parser.add_argument("--program", choices=PROGRAMS, help="which one, with --decode")
    parser.add_argument("--callgrind", action="store_true", help="be counted by callgrind")
    arguments = parser.parse_args()
    if (arguments.decode is None) != (arguments.program is None):
        parser.error("--decode and --program go together")
    return arguments


def find_counter() -> str:
    """`perf` or `callgrind`. Raises InputError where neither runs."""
    if shutil.which("perf"):
        done = subprocess.run([*PERF, "true"], capture_output=True, text=True)
        if done.returncode == 0 and counted_by_perf(done.stderr) is not None:
            return "perf"
    if shutil.which("valgrind"):
        return "callgrind"
    raise InputError(
        "Neither perf nor valgrind counts instructions here.",
        remedy="Install valgrind, or allow perf (kernel.perf_event_paranoid at most 2).",
    )


PERF = ("perf", "stat", "-x,", "-e", "instructions:u")
CALLGRIND = (
    "valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null",
)  # fmt: skip


def counted_by_perf(errors: str) -> int | None:
    found = re.search(r"^(\d+),.*instructions", errors, re.MULTILINE)
    return int(found[1]) if found else None


def count(counter: str, model_size: str, name: str, tokens: int) -> int:
    """Instructions of a whole process that decodes so many tokens."""
    program = [sys.executable, str(Path(__file__)), "--model_size", model_size]
    program += ["--program", name, "--decode", str(tokens)]
    command = [*PERF, *program] if counter == "perf" else [*CALLGRIND, *program, "--callgrind"]
    done = subprocess.run(command, capture_output=True, text=True)
    if counter == "perf":
        counted = counted_by_perf(done.stderr)
    else:
        found = re.search(r"Collected : (\d+)", done.stderr)
        counted = int(found[1]) if found else None
    if done.returncode or counted is None:
        raise BitGenError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr}")
    return counted


if __name__ == "__main__":
    run(main)

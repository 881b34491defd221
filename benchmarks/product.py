"""One packed ternary product against torch's products, the memory's and the processor's limits.

    python benchmarks/product.py
    python benchmarks/product.py --shapes 2560x2560 --tokens 1 --threads 2

Before anything is timed, the integer sums of every path that this processor has are compared with
an exact product. Then, for a matrix of N rows and K inputs and M rows of activations:

- `packed`: two calls from Python, quantization of float32 activations and product;
- `engine`: products alone, one after the other without Python between, as in a model;
- `fp32`, `bf16`: torch's linear; `int8`: torch._int_mm, activations quantized before;
  `dynamic`: torch's dynamically quantized linear, where this torch has one.

M = 1 is measured with weights in the cache, and with weights that come from memory: as many
matrices in turn as fill --buffer_mb. Weights of M > 1 stay the same from call to call.

`of limit` is the engine's share of what the hardware can do at most: of the bytes a second that the
same threads read from the same buffer (M = 1, from memory), or of the products a second of the dot
product instruction on registers (M > 1). Limit and product are measured in turn, round by round;
every figure is the median of the rounds. Other programs that run disturb it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import make_parser, run, show_result

from bitgen.config import MODEL_SIZES, BitGenConfig
from bitgen.console import console
from bitgen.errors import InputError
from bitgen.kernels import library
from bitgen.kernels.tiles import pack_tiles, tile_shape

CONTENDERS = ("fp32", "bf16", "int8", "dynamic")
OTHER_SHAPES = ((2560, 2560), (6912, 2560))
PEAK_ITERATIONS = 200_000
LONGEST_CALL_SERIES = 4096
READ_BYTES = 32 << 20

_read_turns = itertools.count()


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rows: int
    columns: int
    tokens: int
    threads: int
    from_memory: bool


def main() -> int:
    arguments = read_arguments()
    if arguments.kernels:
        library.select_kernels(arguments.kernels)
    native = library.load()
    failures = check_products(arguments.shapes, arguments.tokens)
    buffer = weight_bytes(arguments.buffer_mb << 20)
    cases = [
        Case(*shape, tokens, threads, from_memory)
        for threads in arguments.threads
        for shape in arguments.shapes
        for tokens in arguments.tokens
        for from_memory in ((False, True) if tokens == 1 else (False,))
    ]
    figures, rows = [], []
    threads_before = torch.get_num_threads(), library.threads()
    with console.progress("Measuring") as bar:
        for number, case in enumerate(cases):
            figure = measure(native, case, buffer, arguments)
            figures.append(figure)
            rows.append(table_row(figure))
            bar.update(number + 1, len(cases))
    torch.set_num_threads(threads_before[0])
    library.set_threads(threads_before[1])
    status = library.describe()
    columns = ("N x K", "M", "threads", "weights", "packed", "engine",
               *arguments.against, "GB/s", "GOP/s", "of limit")  # fmt: skip
    return show_result(
        "product",
        {
            "kernels": status.kernels,
            "kernels_reason": status.reason,
            "rounds": arguments.rounds,
            "buffer_mb": arguments.buffer_mb,
            "unit": "seconds a product",
            "products": figures,
        },
        columns,
        rows,
        failures,
    )


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=model_shapes(), metavar="NxK")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256], metavar="M")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--against", choices=CONTENDERS, nargs="*", default=list(CONTENDERS))
    parser.add_argument("--kernels", metavar="PATH", help="avx512-vnni, avx2, ...; the fastest")
    parser.add_argument("--buffer_mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=3, help="of one measurement")
    arguments = parser.parse_args()
    if min(*arguments.tokens, *arguments.threads, arguments.rounds, arguments.buffer_mb, 1) < 1:
        raise InputError("--tokens, --threads, --rounds and --buffer_mb must be at least 1.")
    return arguments


def shape_of(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def model_shapes() -> list[tuple[int, int]]:
    """Matrices of the decoder and the image encoder of all sizes, and two of a larger model."""
    shapes: set[tuple[int, int]] = set()
    for size in MODEL_SIZES:
        config = BitGenConfig.preset(size)
        for width, inner in (
            (config.hidden_size, config.intermediate_size),
            (config.encoder_hidden_size, config.encoder_intermediate_size),
        ):
            shapes |= {(width, width), (inner, width), (width, inner)}
    return sorted(shapes, key=lambda shape: shape[0] * shape[1]) + list(OTHER_SHAPES)


def check_products(shapes: list[tuple[int, int]], tokens: list[int]) -> list[str]:
    """Every path on every shape against an exact product; what is wrong, in words."""
    failures = []
    generator = np.random.default_rng(0)
    chosen = library.describe().kernels
    for rows, columns in shapes:
        ternary = generator.integers(-1, 2, (rows, columns), dtype=np.int8)
        x = generator.integers(-128, 128, (max(tokens), columns), dtype=np.int8)
        tiles = pack_tiles(ternary)
        # Sums are below 2^53: float64 holds them.
        expected = x.astype(np.float64) @ ternary.T.astype(np.float64)
        for kernels in library.describe().usable_kernels:
            library.select_kernels(kernels)
            for count in tokens:
                if not np.array_equal(
                    library.ternary_product(x[:count], tiles, rows), expected[:count]
                ):
                    failures.append(f"{kernels}: {rows}x{columns}, M = {count} is not exact")
    library.select_kernels(chosen)
    return failures


def weight_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of ternary codes that a processor cannot foresee, `size` of them."""
    generator = np.random.default_rng(1)
    piece = pack_tiles(generator.integers(-1, 2, (32, 1 << 18), dtype=np.int8)).ravel()
    return np.resize(piece, size)


def measure(
    native: ctypes.CDLL,
    case: Case,
    buffer: np.ndarray[Any, np.dtype[np.uint8]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The fastest of the rounds of one case, and its share of the limit."""
    torch.set_num_threads(case.threads)
    library.set_threads(case.threads)
    timed: dict[str, Callable[[], float]] = {}
    for name, call in {
        **packed_calls(native, case, buffer),
        **torch_calls(case, buffer, arguments.against),
    }.items():
        calls = call_count(call, arguments.milliseconds / 1000)
        timed[name] = functools.partial(lambda f, n: f(n) / n, call, calls)
    # Seconds that the hardware takes at least for what one product reads, or multiplies.
    limit = read_limit if case.tokens == 1 else multiply_limit
    timed["limit"] = functools.partial(limit, native, case, buffer)
    fastest = dict.fromkeys(timed, float("inf"))
    for _ in range(arguments.rounds):
        for name, time_once in timed.items():
            fastest[name] = min(fastest[name], time_once())
    limit_seconds, engine = fastest.pop("limit"), fastest["engine"]
    has_limit = limit_seconds > 0 and (case.tokens > 1 or case.from_memory)
    return {
        "rows": case.rows,
        "columns": case.columns,
        "tokens": case.tokens,
        "threads": case.threads,
        "weights": "memory" if case.from_memory else "cache",
        "seconds": fastest,
        "gigabytes_per_second": packed_size(case) / engine / 1e9,
        "gigaoperations_per_second": 2 * case.tokens * case.rows * case.columns / engine / 1e9,
        "limit_seconds": limit_seconds,
        "share_of_limit": limit_seconds / engine if has_limit else None,
    }


def packed_size(case: Case) -> int:
    """Bytes of the packed matrix."""
    return int(np.prod(tile_shape(case.rows, case.columns)))


def packed_calls(
    native: ctypes.CDLL, case: Case, buffer: np.ndarray[Any, np.dtype[np.uint8]]
) -> dict[str, Callable[[int], float]]:
    """`packed` and `engine`: functions that make so many products and return the seconds."""
    generator = np.random.default_rng(2)
    activations = generator.standard_normal((case.tokens, case.columns)).astype(np.float32)
    values, scales, sums = library.quantize(activations)
    x = ctypes.byref(
        library.QuantizedRows(
            values.ctypes.data, scales.ctypes.data, sums.ctypes.data, *activations.shape,
            values.shape[1],
        )
    )  # fmt: skip
    size = packed_size(case)
    count = max(1, len(buffer) // size) if case.from_memory else 1
    matrices = (library.TernaryMatrix * count)(*(
        library.TernaryMatrix(buffer.ctypes.data + i * size, case.rows, case.columns, 0.5)
        for i in range(count)
    ))  # fmt: skip
    out = np.empty((case.tokens, case.rows), np.float32)
    pointers = [ctypes.byref(matrix) for matrix in matrices]
    place = 0  # one for both: neither may find in a cache what the other has read

    def packed(calls: int) -> float:
        nonlocal place
        quantize, product = native.bitgen_quantize, native.bitgen_ternary_product
        source, result = activations.ctypes.data, out.ctypes.data
        quantized = values.ctypes.data, values.shape[1], scales.ctypes.data, sums.ctypes.data
        started = time.perf_counter()
        for _ in range(calls):
            quantize(source, case.tokens, case.columns, *quantized)
            product(x, pointers[place], None, result)
            place = (place + 1) % count
        return time.perf_counter() - started

    def engine(calls: int) -> float:
        nonlocal place
        first, place = place, (place + calls) % count
        taken: float = native.bitgen_time_ternary_product(
            x, matrices, count, first, calls, out.ctypes.data
        )
        return taken

    return {"packed": packed, "engine": engine}


def torch_calls(
    case: Case, buffer: np.ndarray[Any, np.dtype[np.uint8]], wanted: list[str]
) -> dict[str, Callable[[int], float]]:
    """The same for torch's products."""
    shape = case.rows, case.columns
    x = torch.randn(case.tokens, case.columns)
    linear = torch.nn.functional.linear
    calls: dict[str, Callable[[int], float]] = {}

    def add(name: str, product: Callable[[Any], object], weights: list[Any]) -> None:
        turns = endless(weights)

        def series(count: int) -> float:
            with torch.inference_mode():
                started = time.perf_counter()
                for _ in range(count):
                    product(next(turns))
                return time.perf_counter() - started

        calls[name] = series

    def matrices(dtype: torch.dtype) -> list[torch.Tensor]:
        """One, or as many as fill the buffer."""
        size = case.rows * case.columns * dtype.itemsize
        count = max(1, len(buffer) // size) if case.from_memory else 1
        store = torch.empty((count, *shape), dtype=dtype)
        store[:] = torch.randint(-1, 2, shape).to(dtype)
        return list(store)

    if "fp32" in wanted:
        add("fp32", lambda weight: linear(x, weight), matrices(torch.float32))
    if "bf16" in wanted:
        x16 = x.bfloat16()
        add("bf16", lambda weight: linear(x16, weight), matrices(torch.bfloat16))
    if "int8" in wanted:
        x8 = (x * 40).clamp(-127, 127).to(torch.int8)
        weights = [weight.T for weight in matrices(torch.int8)]
        try:
            torch._int_mm(x8, weights[0])
            add("int8", lambda weight: torch._int_mm(x8, weight), weights)
        except RuntimeError:  # torch before 2.4
            pass
    if "dynamic" in wanted and (module := dynamic_linear(*shape)) is not None:
        # Its copies would not fit the buffer's rule: it keeps one matrix, in the cache.
        add("dynamic", lambda layer: layer(x), [module])
    return calls


def dynamic_linear(rows: int, columns: int) -> torch.nn.Module | None:
    """torch's dynamically quantized linear layer; None where this torch has none."""
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announced for removal
        try:
            quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
            quantized(torch.zeros(1, columns))
        except (RuntimeError, AttributeError):
            return None
    return quantized


def endless(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def call_count(call: Callable[[int], float], seconds: float) -> int:
    """How many calls take about so long, found by doubling, which warms up as well."""
    calls = 1
    while (taken := call(calls)) < seconds / 2 and calls < LONGEST_CALL_SERIES:
        calls *= 2
    return max(1, min(LONGEST_CALL_SERIES, round(calls * seconds / max(taken, 1e-9))))


def read_limit(
    native: ctypes.CDLL, case: Case, buffer: np.ndarray[Any, np.dtype[np.uint8]]
) -> float:
    """Seconds for reading as many bytes from memory as the packed matrix has.

    Reads the part of the buffer that was read longest ago, so that it is in no cache; a short
    series has a chance to be undisturbed.
    """
    size = min(READ_BYTES, len(buffer))
    start = next(_read_turns) * size % (len(buffer) // size * size)
    taken: float = native.bitgen_time_reading(buffer.ctypes.data + start, size, 1)
    return taken * packed_size(case) / size


def multiply_limit(
    native: ctypes.CDLL, case: Case, buffer: np.ndarray[Any, np.dtype[np.uint8]]
) -> float:
    """Seconds for as many products on registers; 0 where there is no such instruction."""
    products = ctypes.c_int64()
    taken: float = native.bitgen_time_multiplying(PEAK_ITERATIONS, ctypes.byref(products))
    if not products.value:
        return 0.0
    return taken * case.tokens * case.rows * case.columns / products.value


def table_row(figure: dict[str, Any]) -> tuple[str, ...]:
    seconds, share = dict(figure["seconds"]), figure["share_of_limit"]
    packed = seconds.pop("packed")
    engine = seconds.pop("engine")
    return (
        f"{figure['rows']}x{figure['columns']}",
        str(figure["tokens"]),
        str(figure["threads"]),
        figure["weights"],
        microseconds(packed),
        microseconds(engine),
        *(f"{microseconds(taken)} ({taken / packed:.1f}x)" for taken in seconds.values()),
        f"{figure['gigabytes_per_second']:.1f}",
        f"{figure['gigaoperations_per_second']:.0f}",
        "" if share is None else f"{share:.0%}",
    )


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    run(main)

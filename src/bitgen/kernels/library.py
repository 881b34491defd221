"""The library of C++ kernels: found, checked, loaded by ctypes and described. Without torch.

It is built by hatch_build.py when BitGen is installed and lies beside this file, the sources in
`native/`. A library that other sources were built to is refused, so that a pull of new sources
cannot end in calls with wrong arguments. Calls let go of Python's global lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitgen.errors import BitGenError

KERNELS_VARIABLE = "BITGEN_KERNELS"
"""Environment variable that names the path to take: avx512-vnni, avx-vnni, avx2, portable, ..."""
NATIVE_VARIABLE = "BITGEN_NATIVE"
"""Environment variable; 0 keeps the library from being built and from being used."""

TILE_ROWS = 32
CHUNK_INPUTS = 16
CHUNK_BYTES = 128
INT8_INPUTS = 4
ROW_ALIGNMENT = 64

_FOLDER = Path(__file__).parent
_SOURCE_SUFFIXES = (".cpp", ".h", ".inc")
_BUILD_REMEDY = (
    "Install BitGen again where a C++ compiler is in PATH, or run `python hatch_build.py` in the"
    " checkout."
)


class KernelsError(BitGenError):
    """The library of kernels is not there, or lacks what was asked for."""


class QuantizedRows(ctypes.Structure):
    """`bitgen::QuantizedRows` of native/kernels.h."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]


class TernaryMatrix(ctypes.Structure):
    """`bitgen::TernaryMatrix` of native/kernels.h."""

    _fields_ = [
        ("tiles", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class Int8Matrix(ctypes.Structure):
    """`bitgen::Int8Matrix` of native/kernels.h."""

    _fields_ = [
        ("tiles", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class NativeStatus:
    """What runs the products, in words and names."""

    built: bool
    """Whether a library lies beside the sources."""
    usable: bool
    """Whether it is the one of these sources and can be loaded."""
    reason: str
    """Why it is not usable, or why this path was chosen."""
    path: str | None
    """The file."""
    kernels: str | None
    """The path that runs: avx512-vnni, avx-vnni, avx2, neon-dotprod, portable."""
    usable_kernels: tuple[str, ...]
    """Paths that this processor and this build have, the fastest first."""
    cpu_features: tuple[str, ...]
    """Instruction sets of this processor that a path is written for."""
    threads: int | None
    """Threads of the products."""


def library_file() -> Path:
    """Where the library of this system lies, built or not."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return _FOLDER / f"_native{suffix}"


def source_hash(folder: Path = _FOLDER / "native") -> str:
    """Identifies the C++ sources; hatch_build.py computes the same and puts it into the library."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _SOURCE_SUFFIXES:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def load() -> ctypes.CDLL:
    """The library with its functions declared.

    Raises:
        KernelsError: it was not built, was built from other sources, or cannot be loaded.
    """
    library, reason = _load()
    if library is None:
        raise KernelsError(reason, remedy=_BUILD_REMEDY)
    return library


def is_usable() -> bool:
    """Whether `load` succeeds."""
    return _load()[0] is not None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    path = library_file()
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return None, f"{NATIVE_VARIABLE}=0 keeps the C++ kernels from being used."
    if not path.is_file():
        return None, f"The C++ kernels were not built: there is no {path.name} in {path.parent}."
    try:
        library = ctypes.CDLL(str(path))
        built_from: Any = library.bitgen_source_hash
    except (OSError, AttributeError) as error:
        return None, f"The C++ kernels in {path} cannot be loaded: {error}"
    built_from.restype = ctypes.c_char_p
    if built_from().decode() != source_hash():
        return None, f"The C++ kernels in {path} were built from other sources than those beside."
    _declare(library)
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bitgen_kernels_name": (text, []),
        "bitgen_usable_kernels": (text, []),
        "bitgen_cpu_features": (text, []),
        "bitgen_select_kernels": (ctypes.c_int, [text]),
        "bitgen_set_threads": (None, [ctypes.c_int]),
        "bitgen_threads": (ctypes.c_int, []),
        "bitgen_quantize": (None, [pointer, number, number, pointer, number, pointer, pointer]),
        "bitgen_ternary_product": (
            None,
            [ctypes.POINTER(QuantizedRows), ctypes.POINTER(TernaryMatrix), pointer, pointer],
        ),
        "bitgen_int8_product": (
            None,
            [ctypes.POINTER(QuantizedRows), ctypes.POINTER(Int8Matrix), pointer, pointer],
        ),
    }
    measurements: dict[str, list[Any]] = {
        "bitgen_time_reading": [pointer, number, number],
        "bitgen_time_multiplying": [number, ctypes.POINTER(number)],
        "bitgen_time_ternary_product": [
            ctypes.POINTER(QuantizedRows), ctypes.POINTER(TernaryMatrix), number, number, number,
            pointer,
        ],
    }  # fmt: skip
    signatures |= {name: (ctypes.c_double, arguments) for name, arguments in measurements.items()}
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def describe() -> NativeStatus:
    """Which path runs the products here, and why. Loads the library if it can."""
    library, reason = _load()
    path = library_file()
    built = path.is_file()
    if library is None:
        return NativeStatus(built, False, reason, str(path) if built else None, None, (), (), None)
    kernels = library.bitgen_kernels_name().decode()
    usable = tuple(library.bitgen_usable_kernels().decode().split())
    wanted = os.environ.get(KERNELS_VARIABLE)
    if wanted and wanted == kernels:
        reason = f"{KERNELS_VARIABLE} names it"
    elif wanted and wanted not in usable:
        reason = f"{KERNELS_VARIABLE}={wanted} is none of those that run here ({', '.join(usable)})"
    elif kernels == usable[0]:
        reason = "the fastest that this processor and this build have"
    else:
        reason = "chosen by the program"
    return NativeStatus(
        built=True,
        usable=True,
        reason=reason,
        path=str(path),
        kernels=kernels,
        usable_kernels=usable,
        cpu_features=tuple(library.bitgen_cpu_features().decode().split()),
        threads=library.bitgen_threads(),
    )


def select_kernels(name: str | None) -> None:
    """Take the named path from now on; None: the fastest.

    Raises:
        KernelsError: no library, or it has no such path for this processor.
    """
    library = load()
    if not library.bitgen_select_kernels((name or "").encode()):
        usable = library.bitgen_usable_kernels().decode().split()
        raise KernelsError(
            f"There are no kernels {name!r} for this processor.",
            remedy=f"Take one of: {', '.join(usable)}.",
        )


def set_threads(threads: int) -> None:
    """Threads of all products of this process, at least 1. Raises KernelsError without library."""
    load().bitgen_set_threads(threads)


def threads() -> int:
    """Threads of all products of this process. Raises KernelsError without library."""
    count: int = load().bitgen_threads()
    return count


def quantize(
    x_MK: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Int8 activations, one scale a token: as `bitgen.kernels.quantize.quantize_activation`.

    Args:
        x_MK: float32 `[M, K]`.

    Returns:
        Values int8 `[M, ceil(K / 64) * 64]` (0 behind column K), scales float32 `[M]` with
        `x ~ values / scale`, and the values' sums, int32 `[M]`.

    Raises:
        KernelsError: no library.
    """
    library = load()
    x_MK = np.ascontiguousarray(x_MK, dtype=np.float32)
    rows, columns = x_MK.shape
    stride = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    values = np.empty((rows, stride), np.int8)
    scales, sums = np.empty(rows, np.float32), np.empty(rows, np.int32)
    library.bitgen_quantize(
        x_MK.ctypes.data, rows, columns, values.ctypes.data, stride, scales.ctypes.data,
        sums.ctypes.data,
    )  # fmt: skip
    return values, scales, sums


def ternary_product(
    x_MK: npt.NDArray[Any],
    tiles: npt.NDArray[np.uint8],
    rows: int,
    scale: float | None = None,
) -> npt.NDArray[Any]:
    """The product of activations with a ternary matrix `W = scale * T`, `T` `[N, K]`.

    Args:
        x_MK: float32 `[M, K]`, which is quantized first, or int8 `[M, K]`, taken as it is.
        tiles: uint8 `[ceil(N / 32), ceil(K / 16), 128]`, see docs/kernels.md.
        rows: N.
        scale: of the weights; for float32 activations.

    Returns:
        For int8 activations int32 `[M, N]`, `x @ T.T`, exact; for float32 activations float32
        `[M, N]`, `x @ W.T` with quantized x.

    Raises:
        KernelsError: no library.
        ValueError: dtypes or shapes do not fit each other.
    """
    expected = (-(-rows // TILE_ROWS), -(-x_MK.shape[-1] // CHUNK_INPUTS), CHUNK_BYTES)
    _check(x_MK, tiles, np.uint8, expected, (scale is None) == (x_MK.dtype == np.int8))
    x, kept = _quantized(x_MK)
    matrix = TernaryMatrix(tiles.ctypes.data, rows, x_MK.shape[1], 1.0 if scale is None else scale)
    out = np.empty((x.rows, rows), np.int32 if scale is None else np.float32)
    places = (out.ctypes.data, None) if scale is None else (None, out.ctypes.data)
    load().bitgen_ternary_product(ctypes.byref(x), ctypes.byref(matrix), *places)
    del kept
    return out


def int8_product(
    x_MK: npt.NDArray[Any],
    tiles: npt.NDArray[np.int8],
    rows: int,
    row_scales: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[Any]:
    """The product of activations with an int8 matrix `W = row_scale * W8`, `W8` `[N, K]`.

    Args:
        x_MK: float32 `[M, K]`, which is quantized first, or int8 `[M, K]`, taken as it is.
        tiles: int8 `[ceil(N / 32), ceil(K / 4), 32, 4]`, values in [-127, 127].
        rows: N.
        row_scales: float32 `[N]`; for float32 activations.

    Returns:
        For int8 activations int32 `[M, N]`, `x @ W8.T`, exact; for float32 activations float32
        `[M, N]`, `x @ W.T` with quantized x.

    Raises:
        KernelsError: no library.
        ValueError: dtypes or shapes do not fit each other.
    """
    columns = x_MK.shape[-1]
    expected = (-(-rows // TILE_ROWS), -(-columns // INT8_INPUTS), TILE_ROWS, INT8_INPUTS)
    _check(x_MK, tiles, np.int8, expected, (row_scales is None) == (x_MK.dtype == np.int8))
    library = load()
    x, kept = _quantized(x_MK)
    scales = np.ones(rows) if row_scales is None else row_scales
    scales = np.ascontiguousarray(scales, np.float32)
    matrix = Int8Matrix(tiles.ctypes.data, scales.ctypes.data, rows, columns)
    out = np.empty((x.rows, rows), np.int32 if row_scales is None else np.float32)
    places = (out.ctypes.data, None) if row_scales is None else (None, out.ctypes.data)
    library.bitgen_int8_product(ctypes.byref(x), ctypes.byref(matrix), *places)
    del kept
    return out


def _check(
    x_MK: npt.NDArray[Any],
    tiles: npt.NDArray[Any],
    dtype: type,
    expected: tuple[int, ...],
    scale_fits: bool,
) -> None:
    if x_MK.ndim != 2 or x_MK.dtype not in (np.float32, np.int8):
        raise ValueError(f"Expected float32 or int8 [M, K], got {x_MK.dtype} {x_MK.shape}.")
    if not scale_fits:
        raise ValueError("A scale goes with float32 activations, and none with int8 ones.")
    if tiles.shape != expected or tiles.dtype != dtype or not tiles.flags.c_contiguous:
        raise ValueError(
            f"Expected tiles {np.dtype(dtype)} {expected} in one piece,"
            f" got {tiles.dtype} {tiles.shape}."
        )


def _quantized(x_MK: npt.NDArray[Any]) -> tuple[QuantizedRows, tuple[npt.NDArray[Any], ...]]:
    """The structure, and the arrays that it points to, which must live as long."""
    rows, columns = x_MK.shape
    if x_MK.dtype == np.float32:
        values, scales, sums = quantize(x_MK)
    else:
        stride = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
        values = np.zeros((rows, stride), np.int8)
        values[:, :columns] = x_MK
        scales, sums = np.ones(rows, np.float32), values.sum(axis=1, dtype=np.int32)
    x = QuantizedRows(
        values.ctypes.data, scales.ctypes.data, sums.ctypes.data, rows, columns, values.shape[1]
    )
    return x, (values, scales, sums)

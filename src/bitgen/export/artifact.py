"""The exported file, byte by byte: written, and read without torch.

The file is safetensors (https://github.com/huggingface/safetensors): an 8-byte length, a JSON
header, and the tensors one behind the other. What is packed lies as the kernels read it, so that
it is mapped from the file and never copied. docs/format.md describes the whole file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from bitgen.config import BitGenConfig
from bitgen.dataset.robots import Robot, catalog_from_json
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import BitGenError, ConfigError, ModelFileError
from bitgen.kernels.tiles import (
    base3_bytes,
    int8_tile_shape,
    pack_tiles,
    tile_shape,
    unpack_base3,
    unpack_rows,
)

FORMAT = "bitgen"
FORMAT_VERSION = 3
"""Version 1 packed row by row; it is still read. A file without int8 convolutions is of version 2,
which older readers read too."""

PACKINGS = ("2", "1.6")
"""Bits of a ternary weight in the file."""
EMBEDDINGS = ("float32", "int8")
"""How the file holds the embedding, which is also the lm head."""
CONVOLUTIONS = ("float32", "int8")
"""How the file holds the convolutions of the image encoder."""
TILES, BASE3 = ".packed", ".packed_base3"
"""What the name of a ternary layer's weights ends in: at 2 bits a weight, at 1.6."""
EMBEDDING = "text_decoder.embed_tokens"
INT8_TILES = f"{EMBEDDING}.tiles"
INT8_ROWS, ROW_SCALES = ".int8_rows", ".row_scales"
"""What the names of an int8 convolution's weights and scales add to its own."""

ALIGNMENT = 64
"""Packed weights begin at a multiple of so many bytes, in the file and in memory: one cache line,
and the widest vector of today's processors."""

Array: TypeAlias = npt.NDArray[Any]

_TEXTS = ("config", "tokenizer", "robots", "info")
# The bound of the safetensors library on a header.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FOREIGN = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"PK\x03\x04", "a zip archive, perhaps a pickle of torch.save, which BitGen never opens"),
    (b"\x80\x02", "a pickle, which BitGen never opens"),
    (b"\x80\x04", "a pickle, which BitGen never opens"),
    (b"GGUF", "a GGUF model"),
    (b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file, and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    """Offset from the file's first byte."""
    nbytes: int


@dataclass(frozen=True)
class ArtifactHeader:
    """The validated header of an artifact, read without its tensors."""

    version: int
    config: BitGenConfig
    tokenizer_json: str
    robots_json: str
    info: dict[str, Any]
    matrices: Mapping[str, tuple[int, int]]
    """Rows N and inputs K of what is packed, by layer; empty in version 1, which does not say."""
    tensors: Mapping[str, StoredTensor]
    """As the file stores them, under its own names, in its own order."""
    header_bytes: int
    """Bytes before the first tensor."""

    @property
    def packing(self) -> str | None:
        """Bits of a ternary weight, one of `PACKINGS`; None where there are none."""
        if any(name.endswith(BASE3) for name in self.tensors):
            return "1.6"
        return "2" if any(name.endswith(TILES) for name in self.tensors) else None

    @property
    def embedding(self) -> str:
        """How the embedding is stored, one of `EMBEDDINGS`."""
        return "int8" if INT8_TILES in self.tensors else "float32"

    @property
    def int8_convolutions(self) -> tuple[str, ...]:
        """Names in the model of the convolution weights that the file holds in int8."""
        return tuple(n.removesuffix(INT8_ROWS) for n in self.tensors if n.endswith(INT8_ROWS))


@dataclass(frozen=True)
class Artifact:
    """An artifact ready to run.

    Attributes:
        header: what the file says of itself.
        tokenizer: its tokenizer.
        catalog: its robots.
        tensors: every tensor under the name that it has in the model's state dict, not to be
            written to. They are views of the file, which stays mapped while one of them lives; only
            what does not lie in the file as kernels read it (1.6 bits a weight, int8 convolutions,
            version 1, a file written again by another program) is unpacked into memory. Packed
            weights are always tiles (`bitgen.kernels.tiles`) that begin at a multiple of 64 bytes.
    """

    header: ArtifactHeader
    tokenizer: Tokenizer
    catalog: list[Robot]
    tensors: Mapping[str, Array]


# Writing ----------------------------------------------------------------------------------------


def write_artifact(
    file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write an exported file and flush it to the disk. Raises OSError.

    Args:
        file: where to, empty; such as that of `bitgen.files.write_whole`.
        tensors: by their names in the file, in an order of the caller's liking.
        metadata: the header's texts.
    """
    # What fills whole lines comes first, so that nothing stands between tensors and yet each begins
    # at a multiple of the largest power of two that divides its size, up to a line.
    ordered = sorted(tensors.items(), key=lambda item: -_alignment(item[1].nbytes))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, array in ordered:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def _alignment(nbytes: int) -> int:
    """The largest power of two that divides a size, at most a line."""
    return math.gcd(nbytes, ALIGNMENT)


# Reading ----------------------------------------------------------------------------------------


def open_artifact(path: Path | str) -> Artifact:
    """Map an exported file into memory. Costs no more than reading its header, where the weights
    lie in the file as kernels read them.

    Raises:
        ModelFileError: missing, empty, truncated, foreign, changed, or of a newer format.
    """
    path = Path(path)
    with _open(path) as file:
        header = _read_header(path, file)
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be mapped into memory ({error}).") from error
    data = np.frombuffer(mapped, dtype=np.uint8)
    tensors: dict[str, Array] = {}
    for name, stored in header.tensors.items():
        view = data[stored.begin : stored.begin + stored.nbytes]
        if stored.begin % stored.dtype.itemsize:
            view = view.copy()
        array: Array = view.view(stored.dtype).reshape(stored.shape)
        if name.endswith(BASE3):
            name = name.removesuffix(BASE3) + TILES
            array = _unpacked(path, name, array, header)
        elif name.endswith(TILES) and header.version == 1:
            array = _aligned(pack_tiles(unpack_rows(array)))
        elif name.endswith(TILES) or name == INT8_TILES:
            array = _aligned(array)
        elif name == "robot_selector.shared_bias":
            array = array.reshape(1)  # a scalar in the earliest files
        tensors[name] = array
    for name in header.int8_convolutions:
        rows_OIHW, scale_O = tensors.pop(name + INT8_ROWS), tensors.pop(name + ROW_SCALES)
        tensors[name] = rows_OIHW.astype(np.float32) * scale_O[:, None, None, None]
    return Artifact(
        header,
        read_tokenizer(header.tokenizer_json, header.config, path),
        read_catalog(header.robots_json, path),
        tensors,
    )


def _unpacked(path: Path, name: str, packed: Array, header: ArtifactHeader) -> Array:
    rows, columns = header.matrices[name.removesuffix(TILES)]
    try:
        return unpack_base3(packed, rows, columns, _empty_aligned(tile_shape(rows, columns)))
    except ValueError as error:
        raise ModelFileError(
            f"{path} is damaged: {name.removesuffix(TILES)}{BASE3}: {error}",
            remedy="Copy it again.",
        ) from error


def _aligned(array: Array) -> Array:
    """The array, copied only if it does not begin at a multiple of `ALIGNMENT`."""
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = _empty_aligned(array.shape).view(array.dtype)
    np.copyto(copy, array)
    return copy


def _empty_aligned(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = math.prod(shape)
    buffer = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].reshape(shape)


def read_header(path: Path | str) -> ArtifactHeader:
    """Read and validate an artifact's header against the file's length and the format.

    Raises:
        ModelFileError: missing, empty, truncated, foreign, changed, or of a newer format.
    """
    path = Path(path)
    with _open(path) as file:
        return _read_header(path, file)


def _open(path: Path) -> BinaryIO:
    if not path.exists():
        raise ModelFileError(
            f"There is no model at {path}.", remedy="Give a run's folder or an exported file."
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


def _read_header(path: Path, file: BinaryIO) -> ArtifactHeader:
    entries, header_bytes, size = _read_json_header(path, file)
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} is a safetensors file, but not one that BitGen exported.",
            remedy="Export a run with `bitgen export`.",
        )
    text = metadata.get("format_version", "")
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and int(text) > 0):
        raise ModelFileError(f"{path} names no format version that can be read: {text!r}.")
    version = int(text)
    if version > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this BitGen reads up to {FORMAT_VERSION}.",
            remedy="Upgrade BitGen.",
        )
    names = _TEXTS if version == 1 else (*_TEXTS, "matrices")
    missing = [name for name in names if not isinstance(metadata.get(name), str)]
    if missing:
        raise ModelFileError(f"{path} is damaged: its header lacks {', '.join(missing)}.")
    try:
        config = BitGenConfig.from_json(metadata["config"])
    except ConfigError as error:
        raise ModelFileError(
            f"{path} holds a config that cannot be used: {error.message}", remedy=error.remedy
        ) from error
    header = ArtifactHeader(
        version,
        config,
        metadata["tokenizer"],
        metadata["robots"],
        _json_object(path, "info", metadata["info"]),
        {} if version == 1 else _matrices(path, metadata["matrices"]),
        _stored_tensors(path, entries, header_bytes, size),
        header_bytes,
    )
    _check_packed(path, header)
    return header


def _json_object(path: Path, name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged: its {name} is not JSON.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is damaged: its {name} is not a JSON object.")
    return value


def _matrices(path: Path, text: str) -> dict[str, tuple[int, int]]:
    values = _json_object(path, "matrices", text)
    if not all(_are_sizes(value, 2) for value in values.values()):
        raise ModelFileError(f"{path} is damaged: a size in its matrices is no pair of numbers.")
    return {name: (value[0], value[1]) for name, value in values.items()}


def _are_sizes(value: Any, count: int | None = None) -> bool:
    """Whether it is a list of whole numbers from 0 on (JSON's true and false are none)."""
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _read_json_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The safetensors header as JSON, how many bytes stand before the tensors, and in the file."""
    try:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        for magic, what in _FOREIGN:
            if start.startswith(magic):
                raise ModelFileError(
                    f"{path} is not an exported model: it is {what}.",
                    remedy="Give a run's folder or a file of `bitgen export`.",
                )
        if len(start) < 8:
            what = "empty" if size == 0 else f"only {size} bytes long"
            raise ModelFileError(
                f"{path} is not an exported model: it is {what}.",
                remedy="Copy it again, or give a file of `bitgen export`.",
            )
        (length,) = struct.unpack("<Q", start)
        opening = file.read(1)
        if not 2 <= length <= _MAX_HEADER_BYTES or opening not in (b"{", b""):
            raise ModelFileError(
                f"{path} is not an exported model: it is no safetensors file.",
                remedy="Give a run's folder or a file of `bitgen export`.",
            )
        if 8 + length > size:
            raise _truncated(path, size, f"its header alone takes {8 + length} bytes")
        header = json.loads(opening + file.read(length - 1))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged: its header is not JSON.") from error
    return header, 8 + length, size


def _stored_tensors(
    path: Path, entries: Mapping[str, Any], header_bytes: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors in the file's order: one behind the other, and nothing else."""
    found: list[tuple[int, int, str, StoredTensor]] = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _not_safetensors(path, name)
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype_name, str) and _are_sizes(shape) and _are_sizes(offsets, 2)):
            raise _not_safetensors(path, name)
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            raise ModelFileError(
                f"{path}: {name[:80]} has a dtype that BitGen does not use: {dtype_name[:80]}."
            )
        begin, end = offsets
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise _not_safetensors(path, name)
        stored = StoredTensor(dtype, tuple(shape), header_bytes + begin, end - begin)
        found.append((begin, end, name, stored))
    # Among tensors at the same place, those without elements come first.
    found.sort(key=lambda tensor: tensor[:2])
    position = 0
    for begin, end, name, _ in found:
        if begin != position:
            raise _not_safetensors(path, name)
        position = end
    if header_bytes + position > size:
        raise _truncated(path, size, f"its header promises {header_bytes + position}")
    if header_bytes + position < size:
        raise ModelFileError(
            f"{path} is damaged: it has {size} bytes, but its header knows"
            f" {header_bytes + position}.",
            remedy="Copy it again.",
        )
    return {name: stored for _, _, name, stored in found}


def _check_packed(path: Path, header: ArtifactHeader) -> None:
    """Packed tensors have the dtype and shape that the matrices ask for."""
    packed = set()
    for name, stored in header.tensors.items():
        layer, _, last = name.rpartition(".")
        if f".{last}" not in (TILES, BASE3) and name != INT8_TILES:
            continue
        if header.version == 1:
            if stored.dtype != np.uint8 or len(stored.shape) != 2:
                raise _unfit(path, name, stored, "uint8 [N, ceil(K / 4)]")
            continue
        if layer not in header.matrices or layer in packed:
            raise ModelFileError(f"{path} is damaged: its matrices do not fit {name}.")
        packed.add(layer)
        rows, columns = header.matrices[layer]
        dtype, shape = _DTYPES["U8"], list(tile_shape(rows, columns))
        if f".{last}" == BASE3:
            shape = [base3_bytes(rows, columns)]
        elif name == INT8_TILES:
            dtype, shape = _DTYPES["I8"], list(int8_tile_shape(rows, columns))
        if stored.dtype != dtype or list(stored.shape) != shape:
            raise _unfit(path, name, stored, f"{dtype} {shape}")
    for name in header.int8_convolutions:
        weight, scales = header.tensors[name + INT8_ROWS], header.tensors.get(name + ROW_SCALES)
        if name in header.tensors or scales is None:
            raise ModelFileError(f"{path} is damaged: what belongs to {name} does not fit.")
        if weight.dtype != _DTYPES["I8"] or len(weight.shape) != 4:
            raise _unfit(path, name + INT8_ROWS, weight, "int8 [O, I, H, W]")
        if scales.dtype != _DTYPES["F32"] or scales.shape != weight.shape[:1]:
            raise _unfit(path, name + ROW_SCALES, scales, f"float32 {list(weight.shape[:1])}")
    absent = sorted(header.matrices.keys() - packed)
    if absent:
        raise ModelFileError(
            f"{path} is damaged: the weights of {absent[0]} are missing.",
            remedy="Export the run again.",
        )


def _unfit(path: Path, name: str, stored: StoredTensor, expected: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged: {name} is {stored.dtype} {list(stored.shape)}, expected {expected}.",
        remedy="Export the run again.",
    )


def _not_safetensors(path: Path, name: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged: what its header says of {name[:80]!r} is not safetensors'.",
        remedy="Copy it again.",
    )


def _truncated(path: Path, size: int, promised: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is truncated: it has {size} bytes, but {promised}.", remedy="Copy it again."
    )


# What the header holds --------------------------------------------------------------------------


def read_tokenizer(text: str, config: BitGenConfig, source: Path | str) -> Tokenizer:
    """The tokenizer that `text` holds. Raises ModelFileError if it does not fit the config."""
    try:
        tokenizer = Tokenizer.from_json(text)
    except (BitGenError, ValueError) as error:
        raise ModelFileError(f"{source} holds a tokenizer that cannot be read: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFileError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} entries, but the model only"
            f" {config.vocab_size}.",
            remedy="Tokenizer and weights come from different models.",
        )
    return tokenizer


def read_catalog(text: str, source: Path | str) -> list[Robot]:
    """The robot catalog that `text` holds. Raises ModelFileError if it cannot be read."""
    try:
        return catalog_from_json(text)
    except (BitGenError, ValueError) as error:
        raise ModelFileError(
            f"{source} holds a robot catalog that cannot be read: {error}"
        ) from error

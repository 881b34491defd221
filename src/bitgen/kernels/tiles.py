"""Weights as the kernels read them, in memory and in an exported file; without torch.

Ternary weights `T [N, K]` are stored as codes `T + 1` (0, 1, 2) in tiles of 32 rows by 16 inputs,
2 bits a code. Byte `4r + b` of tile `(i, j)` holds in its bits `2f` and `2f + 1` the code of row
`32i + r` and input `16j + 4f + b`: masked by `0x03 << 2f`, the 4 bytes of a row are neighbouring
inputs, ready to be multiplied by four int8 activations. Rows and inputs that only fill up a tile
have the weight 0.

For storage alone, tiles are packed once more: five codes a byte, as digits of base 3 (`3^5 = 243`),
1.6 bits a weight.

Int8 weights `[N, K]` lie in groups of 4 inputs of 32 rows, for the same products as tiles.

docs/format.md describes all of them byte by byte.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Int8: TypeAlias = npt.NDArray[np.int8]

TILE_ROWS = 32
TILE_COLUMNS = 16
TILE_BYTES = 128
_FIELDS = 4  # codes in a byte
_GROUP = 4  # neighbouring inputs that one instruction multiplies
_DIGITS = 5  # codes in a byte of base 3
_LARGEST_BASE3 = 3**_DIGITS - 1
_ZEROS = 0x55  # a tile's byte of four weights 0
_BLOCK = 1 << 15  # bytes of base 3 unpacked at a time, so that what is between stays in the cache


def tile_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Shape of the uint8 tiles of a ternary matrix `[rows, columns]`."""
    return -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS), TILE_BYTES


def pack_tiles(ternary_NK: Int8) -> Bytes:
    """Tiles uint8 `[ceil(N / 32), ceil(K / 16), 128]` of an int8 matrix `[N, K]` in {-1, 0, 1}.

    Raises:
        ValueError: a value other than -1, 0, 1, or not two dimensions.
    """
    if ternary_NK.ndim != 2:
        raise ValueError(f"Expected a matrix [N, K], got shape {ternary_NK.shape}.")
    if ternary_NK.size and (ternary_NK.min() < -1 or ternary_NK.max() > 1):
        raise ValueError("Ternary weights are -1, 0 and 1; got values outside.")
    rows, columns = ternary_NK.shape
    tile_rows, tile_columns, _ = tile_shape(rows, columns)
    codes = np.ones((tile_rows * TILE_ROWS, tile_columns * TILE_COLUMNS), dtype=np.uint8)
    np.add(ternary_NK, 1, out=codes[:rows, :columns], casting="unsafe")
    # The four inputs of a group move together, as one 32-bit number: [i, r, j, f].
    groups = codes.view(np.uint32).reshape(tile_rows, TILE_ROWS, tile_columns, _FIELDS)
    tiles = groups[..., 0].copy()
    for field in range(1, _FIELDS):
        tiles |= groups[..., field] << np.uint32(2 * field)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).view(np.uint8)


def unpack_tiles(tiles: Bytes, rows: int, columns: int) -> Int8:
    """The matrix int8 `[rows, columns]` that `pack_tiles` packed.

    Raises:
        ValueError: the bytes do not fit the size.
    """
    _require(tiles, np.uint8, tile_shape(rows, columns), rows, columns)
    tile_rows, tile_columns, _ = tiles.shape
    lanes = np.ascontiguousarray(tiles).view(np.uint32).transpose(0, 2, 1)
    groups = np.empty((tile_rows, TILE_ROWS, tile_columns, _FIELDS), dtype=np.uint32)
    for field in range(_FIELDS):
        groups[..., field] = lanes >> np.uint32(2 * field) & np.uint32(0x03030303)
    ternary = groups.view(np.int8).reshape(tile_rows * TILE_ROWS, tile_columns * TILE_COLUMNS)
    ternary -= 1
    return np.ascontiguousarray(ternary[:rows, :columns])


def unpack_rows(packed: Bytes) -> Int8:
    """Ternary weights int8 `[N, 4 B]` of rows uint8 `[N, B]`, as the first artifacts hold them.

    Byte `j` of a row holds the codes of inputs `4j ... 4j + 3`, the first in the lowest two bits.
    Inputs that only fill up a row's last byte have the weight 0.
    """
    codes = np.stack([packed >> 2 * field & 3 for field in range(_FIELDS)], axis=-1)
    ternary: Int8 = codes.reshape(len(packed), -1).view(np.int8) - np.int8(1)
    return ternary


def base3_bytes(rows: int, columns: int) -> int:
    """Bytes that `pack_base3` needs for the tiles of a ternary matrix `[rows, columns]`."""
    return _FIELDS * -(-math.prod(tile_shape(rows, columns)) // _DIGITS)


def pack_base3(tiles: Bytes) -> Bytes:
    """Pack tiles, uint8 of any shape and `B` bytes, at five weights a byte, without loss.

    Returns:
        uint8 `[4 G]`, `G = ceil(B / 5)`. Byte `f G + g` is the sum over `d` of `3^d` times the code
        that byte `d G + g` of the tiles holds in its bits `2f` and `2f + 1`. Behind the tiles stand
        weights 0.
    """
    flat = tiles.reshape(-1)
    planes = np.full((_DIGITS, -(-flat.size // _DIGITS)), _ZEROS, dtype=np.uint8)
    planes.reshape(-1)[: flat.size] = flat
    packed = np.zeros((_FIELDS, planes.shape[1]), dtype=np.uint8)
    for field in range(_FIELDS):
        for plane in planes[::-1]:
            packed[field] = packed[field] * 3 + (plane >> 2 * field & 3)
    return packed.reshape(-1)


def unpack_base3(packed: Bytes, rows: int, columns: int, out: Bytes | None = None) -> Bytes:
    """The tiles of a ternary matrix `[rows, columns]` that `pack_base3` packed.

    Args:
        packed: uint8 `[base3_bytes(rows, columns)]`.
        rows: N.
        columns: K.
        out: where to write them, uint8 `tile_shape(rows, columns)`, contiguous.

    Raises:
        ValueError: the bytes do not fit the size, or one is above 242.
    """
    _require(packed, np.uint8, (base3_bytes(rows, columns),), rows, columns)
    if packed.size and packed.max() > _LARGEST_BASE3:
        raise ValueError(f"A byte of five weights is at most {_LARGEST_BASE3}, got {packed.max()}.")
    tiles = np.empty(tile_shape(rows, columns), dtype=np.uint8) if out is None else out
    flat, fields = tiles.reshape(-1), packed.reshape(_FIELDS, -1)
    length = fields.shape[1]
    tables = _base3_tables()
    for start in range(0, length, _BLOCK):
        # Eight bytes for each g, of which byte d goes to the tiles' byte d G + g.
        block = fields[:, start : start + _BLOCK]
        lanes = tables[0].take(block[0])
        for field in range(1, _FIELDS):
            lanes |= tables[field].take(block[field])
        planes = lanes.view(np.uint8).reshape(-1, 8)
        for digit in range(_DIGITS):
            target = flat[digit * length + start : min((digit + 1) * length, flat.size)]
            target = target[: len(planes)]
            target[:] = planes[: len(target), digit]
    return tiles


@functools.cache
def _base3_tables() -> npt.NDArray[np.uint64]:
    """`[4, 256]`: for field f and a byte, its digits as bytes of a number, moved to bits 2f."""
    digits = np.zeros((256, 8), dtype=np.uint8)
    for digit in range(_DIGITS):
        digits[:, digit] = np.arange(256) // 3**digit % 3
    fields = [(digits << 2 * field).view(np.uint64)[:, 0] for field in range(_FIELDS)]
    return np.stack(fields)


def int8_tile_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the int8 tiles of a matrix `[rows, columns]`."""
    return -(-rows // TILE_ROWS), -(-columns // _GROUP), TILE_ROWS, _GROUP


def pack_int8_tiles(matrix_NK: Int8) -> Int8:
    """Tiles int8 `[ceil(N / 32), ceil(K / 4), 32, 4]` of an int8 matrix, filled up with zeros.

    Raises:
        ValueError: not two dimensions.
    """
    if matrix_NK.ndim != 2:
        raise ValueError(f"Expected a matrix [N, K], got shape {matrix_NK.shape}.")
    rows, columns = matrix_NK.shape
    tile_rows, groups, _, _ = int8_tile_shape(rows, columns)
    filled = np.zeros((tile_rows * TILE_ROWS, groups * _GROUP), dtype=np.int8)
    filled[:rows, :columns] = matrix_NK
    lanes = filled.view(np.uint32).reshape(tile_rows, TILE_ROWS, groups).transpose(0, 2, 1)
    return np.ascontiguousarray(lanes)[..., None].view(np.int8)


def unpack_int8_tiles(tiles: Int8, rows: int, columns: int) -> Int8:
    """The matrix int8 `[rows, columns]` that `pack_int8_tiles` packed.

    Raises:
        ValueError: the numbers do not fit the size.
    """
    _require(tiles, np.int8, int8_tile_shape(rows, columns), rows, columns)
    tile_rows, groups, _, _ = tiles.shape
    lanes = np.ascontiguousarray(tiles).view(np.uint32)[..., 0].transpose(0, 2, 1)
    matrix = np.ascontiguousarray(lanes).view(np.int8)
    return np.ascontiguousarray(matrix.reshape(tile_rows * TILE_ROWS, -1)[:rows, :columns])


def _require(
    array: npt.NDArray[Any], dtype: type, shape: tuple[int, ...], rows: int, columns: int
) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"Expected {np.dtype(dtype)} {list(shape)} for a matrix [{rows}, {columns}],"
            f" got {array.dtype} {list(array.shape)}."
        )

"""Weights as the kernels read them, in memory and in an exported file; without torch.

Ternary weights `T [N, K]` are stored as codes `T + 1` (0, 1, 2) in tiles of 32 rows by 16 inputs,
2 bits a code. Byte `4r + b` of tile `(i, j)` holds in its bits `2f` and `2f + 1` the code of row
`32i + r` and input `16j + 4f + b`: masked by `0x03 << 2f`, the 4 bytes of a row are neighbouring
inputs, ready to be multiplied by four int8 activations. Rows and inputs that only fill up a tile
have the weight 0.

Int8 weights `[N, K]` lie in groups of 4 inputs of 32 rows, for the same products.

docs/format.md describes both byte by byte.
"""

from __future__ import annotations

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

"""The layout of packed weights, against its own description, one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.kernels import tiles as tiles_module
from bitgen.kernels.tiles import (
    base3_bytes,
    int8_tile_shape,
    pack_base3,
    pack_int8_tiles,
    pack_tiles,
    tile_shape,
    unpack_base3,
    unpack_int8_tiles,
    unpack_tiles,
)

sizes = st.integers(min_value=1, max_value=100)
seeds = st.integers(0, 2**20)


def random_matrix(rows: int, columns: int, seed: int, bound: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(-bound, bound + 1, (rows, columns), dtype=np.int8)


@given(rows=sizes, columns=sizes, seed=seeds)
@settings(deadline=None)
def test_ternary_tiles_round_trip(rows: int, columns: int, seed: int) -> None:
    ternary = random_matrix(rows, columns, seed)
    tiles = pack_tiles(ternary)
    assert tiles.dtype == np.uint8 and tiles.shape == tile_shape(rows, columns)
    assert tiles.flags.c_contiguous
    assert np.array_equal(unpack_tiles(tiles, rows, columns), ternary)


@given(rows=sizes, columns=sizes, seed=seeds)
@settings(deadline=None, max_examples=20)
def test_each_code_lies_where_the_layout_says(rows: int, columns: int, seed: int) -> None:
    """Weights outside of the matrix are zero: code 1."""
    ternary = random_matrix(rows, columns, seed)
    tiles = pack_tiles(ternary)
    for n in range(32 * tiles.shape[0]):
        for k in range(16 * tiles.shape[1]):
            field, byte = k % 16 // 4, k % 4
            code = tiles[n // 32, k // 16, 4 * (n % 32) + byte] >> (2 * field) & 3
            inside = n < rows and k < columns
            assert code == (ternary[n, k] + 1 if inside else 1)


@given(rows=sizes, columns=sizes, seed=seeds, block=st.sampled_from([1, 7, 1 << 15]))
@settings(deadline=None)
def test_five_weights_a_byte_lose_nothing(rows: int, columns: int, seed: int, block: int) -> None:
    tiles = pack_tiles(random_matrix(rows, columns, seed))
    packed = pack_base3(tiles)
    assert packed.dtype == np.uint8 and packed.shape == (base3_bytes(rows, columns),)
    assert packed.nbytes == 4 * -(-tiles.nbytes // 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "_BLOCK", block)
        unpacked = unpack_base3(packed, rows, columns)
    assert np.array_equal(unpacked, tiles)


@given(rows=sizes, columns=sizes, seed=seeds)
@settings(deadline=None, max_examples=20)
def test_each_digit_lies_where_the_layout_says(rows: int, columns: int, seed: int) -> None:
    tiles = pack_tiles(random_matrix(rows, columns, seed))
    flat, packed = tiles.reshape(-1), pack_base3(tiles)
    length = len(packed) // 4
    for field in range(4):
        for g in range(length):
            for digit in range(5):
                position = digit * length + g
                code = flat[position] >> 2 * field & 3 if position < len(flat) else 1
                assert packed[field * length + g] // 3**digit % 3 == code


def test_five_weights_a_byte_that_cannot_be_are_refused() -> None:
    packed = pack_base3(pack_tiles(random_matrix(20, 20, 0)))
    with pytest.raises(ValueError, match=r"Expected uint8 \[208\] for a matrix \[20, 20\]"):
        unpack_base3(packed[:-1], 20, 20)
    packed[7] = 243
    with pytest.raises(ValueError, match="at most 242, got 243"):
        unpack_base3(packed, 20, 20)


@given(rows=sizes, columns=sizes, seed=seeds)
@settings(deadline=None)
def test_int8_tiles_round_trip(rows: int, columns: int, seed: int) -> None:
    matrix = random_matrix(rows, columns, seed, bound=127)
    tiles = pack_int8_tiles(matrix)
    assert tiles.dtype == np.int8 and tiles.shape == int8_tile_shape(rows, columns)
    assert tiles.flags.c_contiguous
    assert np.array_equal(unpack_int8_tiles(tiles, rows, columns), matrix)


@given(rows=sizes, columns=sizes, seed=seeds)
@settings(deadline=None, max_examples=20)
def test_each_int8_lies_where_the_layout_says(rows: int, columns: int, seed: int) -> None:
    matrix = random_matrix(rows, columns, seed, bound=127)
    tiles = pack_int8_tiles(matrix)
    for n in range(32 * tiles.shape[0]):
        for k in range(4 * tiles.shape[1]):
            inside = n < rows and k < columns
            assert tiles[n // 32, k // 4, n % 32, k % 4] == (matrix[n, k] if inside else 0)


def test_views_into_a_read_only_file_are_unpacked() -> None:
    ternary = random_matrix(40, 24, 0)
    data = b"\0" * 3 + pack_tiles(ternary).tobytes()
    view = np.frombuffer(data, np.uint8)[3:].reshape(tile_shape(40, 24))
    assert not view.flags.writeable
    assert np.array_equal(unpack_tiles(view, 40, 24), ternary)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        pack_tiles(np.array([[2]], dtype=np.int8))
    for pack in (pack_tiles, pack_int8_tiles):
        with pytest.raises(ValueError, match=r"\[N, K\]"):
            pack(np.zeros(3, dtype=np.int8))
    with pytest.raises(ValueError, match=r"Expected uint8 \[1, 2, 128\].*got uint8 \[1, 1, 128\]"):
        unpack_tiles(np.zeros((1, 1, 128), dtype=np.uint8), 20, 20)
    with pytest.raises(ValueError, match="Expected uint8"):
        unpack_tiles(np.zeros((1, 2, 128), dtype=np.int8), 20, 20)
    with pytest.raises(ValueError, match=r"Expected int8 \[1, 5, 32, 4\]"):
        unpack_int8_tiles(np.zeros((1, 4, 32, 4), dtype=np.int8), 20, 20)

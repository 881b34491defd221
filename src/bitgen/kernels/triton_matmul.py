"""The packed ternary product on a GPU, in Triton: int8 activations, 2-bit weights, int32 sums.

    x -> quantize -> int8 [M, K], scales [M, 1] ---.
    tiles -> int32 lanes -> int8 [rows, inputs] ---+-> tensor cores -> int32 -> * s / scale

The kernels read the tiles of `bitgen.kernels.tiles` as they are, so weights cost 2 bits of memory
traffic each. They compute the same integers and the same float32 operations as `bitgen.kernels.
matmul` and `quantize`, in the same order: the answers are equal bit for bit.

This module imports Triton. `bitgen.kernels.gpu` says where it can be used, and imports it there.
"""

# Annotations are not postponed: Triton 3.0 looks for `tl.constexpr` itself, not for its name.
import contextlib
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bitgen.kernels.quantize import SMALLEST_SCALE, quantize_activation
from bitgen.kernels.tiles import TILE_COLUMNS, TILE_ROWS, tile_shape


class _Blocks(NamedTuple):
    """What one program of the product takes at a time."""

    tokens: int
    rows: int
    tiles: int  # along K, in one step
    num_warps: int
    num_stages: int  # steps whose loads are under way at once


_DECODING = _Blocks(tokens=16, rows=32, tiles=32, num_warps=4, num_stages=3)
_MEDIUM = _Blocks(tokens=64, rows=64, tiles=8, num_warps=4, num_stages=3)
_LARGE = _Blocks(tokens=128, rows=128, tiles=8, num_warps=8, num_stages=3)


def blocks_for(num_tokens: int) -> _Blocks:
    """The block sizes for so many tokens. Not tuned: they are what compiles to few instructions."""
    if num_tokens <= _DECODING.tokens:
        return _DECODING
    return _MEDIUM if num_tokens < 1024 else _LARGE


@triton.jit
def _unpack(lanes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Int32 lanes `[ROWS, tiles]` -> ternary weights int8 `[ROWS, COLUMNS]`.

    Input 4f + b of a tile lies in byte b of its lane, bits 2f and 2f + 1. Each join adds one bit
    of that number, the highest first. Four weights are unpacked at once: as bytes of one number.
    """
    lanes = tl.join(lanes, lanes >> 4)
    lanes = tl.join(lanes, lanes >> 2)
    # Code - 1 in every byte: a high bit, which is taken off again, keeps it from borrowing.
    lanes = ((lanes & 0x03030303) + 0x7F7F7F7F) ^ -0x7F7F7F80
    lanes = tl.join(lanes, lanes >> 16)
    lanes = tl.join(lanes, lanes >> 8)
    return tl.reshape(lanes.to(tl.int8), (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["num_tokens", "tile_columns"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    token_scale_ptr,
    lanes_ptr,
    weight_scale_ptr,
    output_ptr,
    num_tokens,
    rows,
    columns,
    tile_columns,
    IS_SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,  # TILES * TILE_COLUMNS
):
    """Rows of `T @ x.T`, written as columns of the output `[M, N]`.

    The weights stand on the left: Hopper's tensor cores take only that factor from registers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    tile = tl.arange(0, TILES)
    column = tl.arange(0, COLUMNS)
    first_lane = (row // TILE_ROWS).to(tl.int64) * tile_columns * TILE_ROWS + row % TILE_ROWS
    lane_ptrs = lanes_ptr + first_lane[:, None] + tile[None, :] * TILE_ROWS
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * columns + column[:, None]
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    for first in range(0, tile_columns, TILES):
        lanes = tl.load(
            lane_ptrs + first * TILE_ROWS,
            mask=(row < rows)[:, None] & (first + tile < tile_columns)[None, :],
            other=0,
        )
        x = tl.load(
            x_ptrs + first * TILE_COLUMNS,
            mask=(token < num_tokens)[None, :] & (first * TILE_COLUMNS + column < columns)[:, None],
            other=0,
        )
        sums = tl.dot(_unpack(lanes, ROWS, COLUMNS), x, sums, out_dtype=tl.int32)
    output = sums
    if IS_SCALED:
        token_scale = tl.load(token_scale_ptr + token, mask=token < num_tokens, other=1.0)
        scale = tl.div_rn(tl.load(weight_scale_ptr), token_scale)
        output = sums.to(tl.float32) * scale[None, :]
    tl.store(
        output_ptr + token.to(tl.int64)[None, :] * rows + row[:, None],
        output,
        mask=(token < num_tokens)[None, :] & (row < rows)[:, None],
    )


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr, quantized_ptr, scale_ptr, columns, COLUMNS: tl.constexpr, SMALLEST: tl.constexpr
):
    """One row of `quantize_activation`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded twice, because PyTorch takes a number divided by a tensor as reciprocal times number.
    scale = tl.div_rn(1.0, tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST)) * 127.0
    # The largest of numbers leaves out NaN; PyTorch's does not, and what is broken must show.
    scale = tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), scale)
    # Clipped first, the product is no factor of the sum below, which would be rounded only once.
    clipped = tl.minimum(tl.maximum(x * scale, -128.0), 127.0)
    # 1.5 * 2^23, where float32 has whole numbers only: the sum is rounded half to even.
    rounded = (clipped + 12582912.0) - 12582912.0
    tl.store(quantized_ptr + row * columns + column, rounded.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`bitgen.kernels.quantize.quantize_activation` in one pass.

    Args:
        x: float `[..., K]`.

    Returns:
        Int8 `[..., K]` and float32 `[..., 1]`.
    """
    x = x.contiguous()
    columns = x.shape[-1]
    quantized = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        padded = triton.next_power_of_2(columns)
        with _on(x.device):
            _quantize_kernel[(scale.numel(),)](
                x,
                quantized,
                scale,
                columns,
                COLUMNS=padded,
                SMALLEST=SMALLEST_SCALE,
                num_warps=4 if padded <= 2048 else 8,
                enable_fp_fusion=False,
            )
    return quantized, scale


def ternary_sums(x_MK: torch.Tensor, tiles: torch.Tensor, rows: int) -> torch.Tensor:
    """`x @ T.T` in integers, as `ternary_matmul_reference` has it.

    Args:
        x_MK: int8 `[M, K]`.
        tiles: uint8 `[ceil(N / 32), ceil(K / 16), 128]` of `T [N, K]`.
        rows: N.

    Returns:
        Int32 `[M, N]`.

    Raises:
        ValueError: tiles of another matrix.
    """
    return _launch(x_MK, None, tiles, rows, None)


def ternary_product(
    x_MK: torch.Tensor,
    token_scale_M1: torch.Tensor,
    tiles: torch.Tensor,
    rows: int,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The sums of `ternary_sums`, multiplied by `scale / token_scale`: float32 `[M, N]`.

    Args:
        x_MK: int8 `[M, K]`, quantized activations.
        token_scale_M1: float32 `[M, 1]`, their scales.
        tiles: as for `ternary_sums`.
        rows: N.
        scale: float32 `[]`, the weights' scale.

    Raises:
        ValueError: tiles of another matrix.
    """
    return _launch(x_MK, token_scale_M1, tiles, rows, scale)


def _launch(
    x_MK: torch.Tensor,
    token_scale_M1: torch.Tensor | None,
    tiles: torch.Tensor,
    rows: int,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens, columns = x_MK.shape
    expected = tile_shape(rows, columns)
    if tiles.shape != expected or tiles.dtype != torch.uint8:
        raise ValueError(
            f"Expected uint8 {list(expected)} for a matrix [{rows}, {columns}],"
            f" got {tiles.dtype} {list(tiles.shape)}."
        )
    is_scaled = scale is not None
    dtype = torch.float32 if is_scaled else torch.int32
    output_MN = torch.empty(num_tokens, rows, dtype=dtype, device=x_MK.device)
    if not output_MN.numel():
        return output_MN
    x_MK, lanes = x_MK.contiguous(), tiles.contiguous().view(torch.int32)
    blocks = blocks_for(num_tokens)
    grid = (triton.cdiv(rows, blocks.rows), triton.cdiv(num_tokens, blocks.tokens))
    with _on(x_MK.device):
        _product_kernel[grid](
            x_MK,
            x_MK if token_scale_M1 is None else token_scale_M1.contiguous(),
            lanes,
            lanes if scale is None else scale,
            output_MN,
            num_tokens,
            rows,
            columns,
            expected[1],
            IS_SCALED=is_scaled,
            TOKENS=blocks.tokens,
            ROWS=blocks.rows,
            TILES=blocks.tiles,
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=TILE_COLUMNS,
            COLUMNS=blocks.tiles * TILE_COLUMNS,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            enable_fp_fusion=False,
        )
    return output_MN


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def wrong_results(device: torch.device) -> list[str]:
    """What differs from PyTorch on this device, in words: each kernel on a small random product."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = TILE_ROWS + 16, 9 * TILE_COLUMNS
    size = tile_shape(rows, columns)
    fields = torch.randint(0, 3, (*size, 4), generator=generator, dtype=torch.uint8)
    tiles = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    # Byte 4r + b, field f -> row r, input 4f + b: the layout once more, apart from the packer.
    codes = fields.view(*size[:2], TILE_ROWS, 4, 4).permute(0, 2, 1, 4, 3)
    ternary_NK = codes.reshape(size[0] * TILE_ROWS, columns)[:rows].long() - 1
    scale = torch.tensor(0.37)
    problems = []
    for num_tokens in (1, _DECODING.tokens + 1, 1024):
        x_MK = torch.randn(num_tokens, columns, generator=generator)
        quantized_MK, token_scale_M1 = quantize_activation(x_MK)
        sums_MN = quantized_MK.long() @ ternary_NK.T
        product_MN = sums_MN.float() * (scale / token_scale_M1)
        got_MK, got_scale_M1 = quantize(x_MK.to(device))
        given = quantized_MK.to(device), token_scale_M1.to(device), tiles.to(device)
        got_MN = ternary_product(*given, rows, scale.to(device))
        if not (
            torch.equal(got_MK.cpu(), quantized_MK)
            and torch.equal(got_scale_M1.cpu(), token_scale_M1)
        ):
            problems.append(f"quantized activations of {num_tokens} tokens")
        if not torch.equal(got_MN.cpu(), product_MN):
            problems.append(f"the product of {num_tokens} tokens")
    return problems

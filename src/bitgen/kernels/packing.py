"""`bitgen.kernels.tiles` for torch's tensors."""

from __future__ import annotations

import torch

from bitgen.kernels.tiles import pack_int8_tiles, pack_tiles, unpack_int8_tiles, unpack_tiles


def pack_ternary(ternary_NK: torch.Tensor) -> torch.Tensor:
    """Pack int8 `[N, K]` in {-1, 0, 1} into tiles, uint8 `[ceil(N / 32), ceil(K / 16), 128]`.

    Raises:
        ValueError: a value other than -1, 0, 1, or not two dimensions.
    """
    return torch.from_numpy(pack_tiles(ternary_NK.cpu().numpy())).to(ternary_NK.device)


def unpack_ternary(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Unpack tiles into int8 `[rows, columns]`, the inverse of `pack_ternary`.

    Raises:
        ValueError: the bytes do not fit the size.
    """
    return torch.from_numpy(unpack_tiles(tiles.cpu().numpy(), rows, columns)).to(tiles.device)


def pack_int8(matrix_NK: torch.Tensor) -> torch.Tensor:
    """Arrange int8 `[N, K]` in tiles, int8 `[ceil(N / 32), ceil(K / 4), 32, 4]`.

    Raises:
        ValueError: not two dimensions.
    """
    return torch.from_numpy(pack_int8_tiles(matrix_NK.cpu().numpy())).to(matrix_NK.device)


def unpack_int8(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Take int8 `[rows, columns]` from its tiles, the inverse of `pack_int8`.

    Raises:
        ValueError: the numbers do not fit the size.
    """
    return torch.from_numpy(unpack_int8_tiles(tiles.cpu().numpy(), rows, columns)).to(tiles.device)

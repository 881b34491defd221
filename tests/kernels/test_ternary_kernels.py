"""Quantizers, packing and the integer products, each against a plain reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.kernels import matmul
from bitgen.kernels.matmul import int8_matmul, ternary_matmul, ternary_matmul_reference
from bitgen.kernels.packing import pack_int8, pack_ternary, unpack_int8, unpack_ternary
from bitgen.kernels.quantize import quantize_activation, quantize_rows, quantize_weight

sizes = st.integers(min_value=1, max_value=70)


def random_ternary(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, width), dtype=torch.int8, generator=generator)


@given(rows=sizes, width=sizes, seed=st.integers(0, 2**20))
@settings(deadline=None)
def test_packing_tensors_round_trips(rows: int, width: int, seed: int) -> None:
    ternary = random_ternary(rows, width, seed)
    assert torch.equal(unpack_ternary(pack_ternary(ternary), rows, width), ternary)
    matrix = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(matrix), rows, width), matrix)


@pytest.mark.parametrize("takes_int8", [True, False])
@given(tokens=st.sampled_from([0, 1, 2, 16, 257]), rows=sizes, width=sizes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_integer_product_is_exact(
    takes_int8: bool, tokens: int, rows: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    ternary = random_ternary(rows, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_is_int8_faster", takes_int8 and matmul._int8_matmul_works())
        product = ternary_matmul(x, ternary)
    assert product.dtype == torch.float32
    assert torch.equal(product.long(), ternary_matmul_reference(x, ternary))


def test_the_faster_product_is_taken_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        assert torch.equal(product().long(), torch.full((128, 128), 128))
        return times.pop()

    monkeypatch.setattr(matmul, "_int8_matmul_works", lambda: True)
    monkeypatch.setattr(matmul, "_seconds", seconds)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int(), raising=False)
    for int8, float32 in ((1.0, 2.0), (2.0, 1.0)):
        monkeypatch.setattr(matmul, "_is_int8_faster", None)
        times[:] = [float32, int8]
        for _ in range(2):
            assert matmul.int8_product_is_faster() == (int8 < float32)
        assert times == []


def test_integer_product_without_int8_support_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_is_int8_faster", False)
    x = torch.randint(-128, 128, (5, 300), dtype=torch.int8)
    ternary = random_ternary(7, 300, 1)
    with torch.autocast("cpu", torch.bfloat16):
        product = ternary_matmul(x, ternary)
    assert torch.equal(product.long(), ternary_matmul_reference(x, ternary))


@pytest.mark.parametrize("takes_int8", [True, False])
@given(tokens=st.sampled_from([0, 1, 2, 16, 257]), rows=sizes, width=sizes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_int8_product_is_exact(
    takes_int8: bool, tokens: int, rows: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_is_int8_faster", takes_int8 and matmul._int8_matmul_works())
        product = int8_matmul(x, weight)
    assert product.dtype == torch.float32
    assert torch.equal(product.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("takes_int8", [True, False])
def test_int8_sums_beyond_the_reach_of_float32_are_rounded_once(
    takes_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes_int8 = takes_int8 and matmul._int8_matmul_works()
    monkeypatch.setattr(matmul, "_is_int8_faster", takes_int8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(100, 128, (3, 6912), dtype=torch.int8, generator=generator)
    weight = torch.randint(100, 128, (5, 6912), dtype=torch.int8, generator=generator)
    sums = x.long() @ weight.long().T
    assert sums.max() > 2**24
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_matmul(x, weight), sums.float())


def test_weight_quantizer_is_mean_absolute_value() -> None:
    weight = torch.tensor([[0.5, -0.1, 2.0], [-1.4, 0.0, -0.4]])
    ternary, scale = quantize_weight(weight)
    assert scale.item() == pytest.approx(4.4 / 6)
    assert ternary.tolist() == [[1, 0, 1], [-1, 0, -1]]


def test_activation_quantizer_rounds_half_to_even_and_scales_each_token() -> None:
    x = torch.tensor([[127.0, 2.5, 3.5, -0.5], [-254.0, 1.0, 3.0, 0.0]])
    quantized, scale = quantize_activation(x)
    assert quantized.tolist() == [[127, 2, 4, 0], [-127, 0, 2, 0]]
    assert scale.tolist() == [[1.0], [0.5]]


def test_activation_quantizer_rounds_its_scale_twice_as_the_file_format_says() -> None:
    """Torch divides a number by a tensor in two steps, and docs/format.md tells others so."""
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(dim=-1, keepdim=True).numpy()
    expected = (np.float32(1) / largest) * np.float32(127)
    quantized, scale = quantize_activation(x)
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(quantized.numpy(), np.rint(x.numpy() * expected).astype(np.int8))


def test_row_quantizer_rounds_half_to_even_and_scales_each_row() -> None:
    weight = torch.tensor([[127.0, 2.5, 3.5, -0.5], [-254.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    quantized, scale = quantize_rows(weight)
    assert quantized.tolist() == [[127, 2, 4, 0], [-127, 0, 2, 0], [0, 0, 0, 0]]
    assert scale.tolist() == pytest.approx([1.0, 2.0, 1e-5 / 127])


def test_quantizers_keep_zeros_finite() -> None:
    ternary, weight_scale = quantize_weight(torch.zeros(2, 3))
    quantized, token_scale = quantize_activation(torch.zeros(2, 3))
    assert not ternary.any() and not quantized.any()
    assert weight_scale.isfinite() and token_scale.isfinite().all()

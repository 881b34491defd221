"""The Triton kernels against plain references: on a GPU, and in Triton's interpreter on a CPU.

The interpreter has to be chosen before Triton is imported. So the tests that launch kernels skip
in an ordinary run without a GPU, and one test runs this file again with the interpreter.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.kernels import gpu
from bitgen.kernels.matmul import ternary_matmul_reference
from bitgen.kernels.packing import pack_ternary
from bitgen.kernels.quantize import quantize_activation

INTERPRETER = "TRITON_INTERPRET"
SOURCE = Path(__file__).resolve().parents[2] / "src"

needs_triton = pytest.mark.skipif(
    gpu.triton_release() < 3, reason="needs Triton 3 or later, which is not installed"
)


def launch_device() -> torch.device:
    """Where kernels can be launched in this process; skips where nowhere."""
    if os.environ.get(INTERPRETER) == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (test_in_the_interpreter runs this without one)")
    return torch.device("cuda")


def kernels() -> ModuleType:
    return importlib.import_module("bitgen.kernels.triton_matmul")


def random_case(
    tokens: int, rows: int, columns: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 activations `[M, K]`, with the extremes, and ternary weights `[N, K]`."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, generator=generator)
    ternary = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)
    return x_MK, ternary


@needs_triton
@pytest.mark.gpu
@given(
    tokens=st.sampled_from([0, 1, 2, 16, 17, 257]),
    rows=st.integers(1, 100),
    columns=st.integers(1, 600),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_sums_are_exact(tokens: int, rows: int, columns: int, seed: int) -> None:
    device = launch_device()
    x_MK, ternary_NK = random_case(tokens, rows, columns, seed)
    sums_MN = kernels().ternary_sums(x_MK.to(device), pack_ternary(ternary_NK).to(device), rows)
    assert sums_MN.dtype == torch.int32
    assert torch.equal(sums_MN.cpu().long(), ternary_matmul_reference(x_MK, ternary_NK))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 256, 1536), (16, 768, 256), (33, 40, 4096), (1030, 130, 80)]
)
def test_product_equals_pytorch_bit_for_bit(tokens: int, rows: int, columns: int) -> None:
    device = launch_device()
    x_MK, ternary_NK = random_case(tokens, rows, columns, seed=tokens)
    token_scale_M1 = torch.rand(tokens, 1) * 50 + 0.1
    scale = torch.tensor(0.0371)
    got_MN = kernels().ternary_product(
        x_MK.to(device),
        token_scale_M1.to(device),
        pack_ternary(ternary_NK).to(device),
        rows,
        scale.to(device),
    )
    sums_MN = ternary_matmul_reference(x_MK, ternary_NK)
    assert torch.equal(got_MN.cpu(), sums_MN.float() * (scale / token_scale_M1))


@needs_triton
@pytest.mark.gpu
def test_sums_at_their_largest() -> None:
    device = launch_device()
    x_MK = torch.full((1, 4096), -128, dtype=torch.int8)
    tiles = pack_ternary(torch.ones(32, 4096, dtype=torch.int8))
    sums_MN = kernels().ternary_sums(x_MK.to(device), tiles.to(device), 32)
    assert torch.equal(sums_MN.cpu(), torch.full((1, 32), -128 * 4096, dtype=torch.int32))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 256), (2, 3, 70), (1, 1), (0, 32), (2, 4096)])
def test_quantizer_equals_pytorch_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device = launch_device()
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    got, got_scale = kernels().quantize(x.to(device))
    quantized, scale = quantize_activation(x)
    assert got.shape == shape and torch.equal(got.cpu(), quantized)
    assert torch.equal(got_scale.cpu(), scale)


@needs_triton
@pytest.mark.gpu
def test_quantizer_at_ties_zeros_and_numbers_that_are_none() -> None:
    device = launch_device()
    ties = torch.tensor([127.0, 2.5, 3.5, -0.5, -1.5, 126.5, -126.5, 0.0])
    x = torch.stack([ties, ties * 2, ties * 0, ties * 1e-9, -ties])
    got, got_scale = kernels().quantize(x.to(device))
    quantized, scale = quantize_activation(x)
    assert torch.equal(got.cpu(), quantized) and torch.equal(got_scale.cpu(), scale)
    broken = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]], device=device)
    _, got_scale = kernels().quantize(broken)
    assert got_scale.isnan().flatten().tolist() == [True, False]


@needs_triton
@pytest.mark.gpu
def test_tiles_of_another_matrix_are_refused() -> None:
    device = launch_device()
    x_MK = torch.zeros(1, 64, dtype=torch.int8, device=device)
    tiles = pack_ternary(torch.zeros(32, 80, dtype=torch.int8)).to(device)
    with pytest.raises(ValueError, match=r"uint8 \[1, 4, 128\] for a matrix \[32, 64\]"):
        kernels().ternary_sums(x_MK, tiles, 32)


@needs_triton
@pytest.mark.gpu
def test_the_check_before_first_use_passes_and_notices_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = launch_device()
    assert kernels().wrong_results(device) == []
    product = kernels().ternary_product
    monkeypatch.setattr(kernels(), "ternary_product", lambda *a: product(*a) + 1)
    assert len(kernels().wrong_results(device)) == 3


@needs_triton
@pytest.mark.gpu
def test_packed_layers_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitgen.model import ternary

    device = launch_device()
    torch.manual_seed(0)
    # Packed where they are trained: another device sums the weights' mean in another order.
    layers = [ternary.TernaryLinear(80, rows).to(device) for rows in (32, 48)]
    packed = [ternary.PackedTernaryLinear.from_trained(layer) for layer in layers]
    x_BSK = torch.randn(2, 3, 80, device=device)
    expected = ternary.linear_group(layers, x_BSK)
    monkeypatch.setattr(ternary, "gpu_kernels", lambda device: kernels())
    for got, want in zip(ternary.linear_group(packed, x_BSK), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(packed[0](x_BSK), expected[0])
    assert all(layer._ternary_NK is None for layer in packed), "the tiles are read as they are"


# Without launching ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get(INTERPRETER) == "1", reason="runs in the interpreter already")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, INTERPRETER: "1", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=SOURCE.parent, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get(INTERPRETER) == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    """To machine code, by the assembler that Triton brings; products by int8 tensor cores."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        pytest.skip(f"written for Triton 3.4 and later; this is {triton.__version__}")
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("Triton's assembler is for Linux")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, module = GPUTarget("cuda", capability, 32), kernels()

    def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any):
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in ("rows", "columns")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options["enable_fp_fusion"] = False
        return triton.compile(source, target=target, options=options)

    pointers = {"x_ptr": "*i8", "token_scale_ptr": "*fp32", "lanes_ptr": "*i32"}
    pointers |= {"weight_scale_ptr": "*fp32", "output_ptr": "*fp32"}
    sizes = dict.fromkeys(["num_tokens", "rows", "columns", "tile_columns"], "i32")
    tile = {"TILE_ROWS": 32, "TILE_COLUMNS": 16}
    for tokens in (1, 64, 2048):
        blocks = module.blocks_for(tokens)
        constants = {"IS_SCALED": True, "TOKENS": blocks.tokens, "ROWS": blocks.rows}
        product = compiled(
            module._product_kernel,
            {**pointers, **sizes},
            {**constants, "TILES": blocks.tiles, **tile, "COLUMNS": blocks.tiles * 16},
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        ptx = product.asm["ptx"]
        assert ".s32.s8.s8" in ptx
        assert "div.rn.f32" in ptx and "div.full.f32" not in ptx
        assert product.metadata.shared <= 99 * 1024, "more than smaller GPUs have"
    pointers = {"x_ptr": "*fp32", "quantized_ptr": "*i8", "scale_ptr": "*fp32", "columns": "i32"}
    constants = {"COLUMNS": 1024, "SMALLEST": 1e-5}
    ptx = compiled(module._quantize_kernel, pointers, constants).asm["ptx"]
    assert "div.rn.f32" in ptx and "fma" not in ptx


def test_other_devices_have_no_kernels_and_say_so() -> None:
    assert gpu.gpu_kernels(torch.device("cpu")) is None
    assert gpu.describe_gpu_kernels(torch.device("cpu")) == "PyTorch (device cpu)"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device on which nothing was tried yet."""
    gpu._checked_kernels.cache_clear()
    monkeypatch.delenv(gpu.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "triton_release", lambda: 3)
    yield torch.device("cuda", 7)
    gpu._checked_kernels.cache_clear()


def fake_kernels(problems: list[str]) -> ModuleType:
    module = ModuleType("kernels")
    module.wrong_results = lambda device: problems  # type: ignore[attr-defined]
    return module


def test_kernels_that_pass_their_check_are_used(
    unchecked: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_kernels([])
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    assert gpu.gpu_kernels(unchecked) is module
    assert gpu.describe_gpu_kernels(unchecked) == "Triton"


def test_kernels_that_answer_wrongly_are_not_used(
    unchecked: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_kernels(["the product of 1 tokens"])
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    with pytest.warns(RuntimeWarning, match="answers wrongly: the product of 1 tokens"):
        assert gpu.gpu_kernels(unchecked) is None
    assert "answers wrongly" in gpu.describe_gpu_kernels(unchecked)


def test_a_triton_that_fails_is_not_used(
    unchecked: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> list[str]:
        raise RuntimeError("Failed to find C compiler.\nMore")

    module = fake_kernels([])
    monkeypatch.setattr(module, "wrong_results", fail)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler"):
        assert gpu.gpu_kernels(unchecked) is None


def test_what_keeps_triton_from_being_tried(
    unchecked: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.gpu_kernels(unchecked) is None
    assert "compute capability 8.0" in gpu.describe_gpu_kernels(unchecked)
    gpu._checked_kernels.cache_clear()
    monkeypatch.setattr(gpu, "triton_release", lambda: 2)
    assert "not installed" in gpu.describe_gpu_kernels(unchecked)
    gpu._checked_kernels.cache_clear()
    monkeypatch.setenv(gpu.SWITCH, "0")
    assert gpu.describe_gpu_kernels(unchecked) == "PyTorch (BITGEN_TRITON is 0)"


def test_the_model_imports_no_triton() -> None:
    module = "bitgen.kernels.triton_matmul"
    code = f"import sys, bitgen.model.bitgen; sys.exit({module!r} in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )

"""The C++ products on every path that this processor has, held to exact integers; and the build."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitgen.kernels import library
from bitgen.kernels.matmul import ternary_matmul_reference
from bitgen.kernels.quantize import quantize_activation
from bitgen.kernels.tiles import pack_int8_tiles, pack_tiles

ROOT = Path(__file__).resolve().parents[2]
TOKENS = st.sampled_from([0, 1, 2, 3, 8, 9, 16, 17, 33, 257])
SIZES = st.one_of(st.integers(1, 100), st.sampled_from([256, 511, 513, 1030, 1041]))
PROPERTY = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

needs_library = pytest.mark.skipif(
    not library.is_usable(), reason=f"no C++ kernels: {library.describe().reason}"
)


@pytest.fixture(params=library.describe().usable_kernels or ("none",))
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of this processor in turn, on three threads (also where there are fewer cores)."""
    if not library.is_usable():
        pytest.skip(f"no C++ kernels: {library.describe().reason}")
    threads = library.threads()
    library.select_kernels(request.param)
    library.set_threads(3)
    yield request.param
    library.set_threads(threads)
    library.select_kernels(None)


def hook() -> ModuleType:
    """hatch_build.py as a module."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hatch_build"] = module  # its dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["hatch_build"]
    return module


def random_int8(generator: np.random.Generator, low: int, high: int, *shape: int) -> Any:
    """Values from low to high; one time in three only these two, so that sums are extreme."""
    if generator.integers(3) == 0:
        return generator.choice(np.array([low, high], np.int8), shape)
    return generator.integers(low, high + 1, shape, dtype=np.int8)


@given(tokens=TOKENS, rows=SIZES, width=SIZES, seed=st.integers(0, 2**20))
@PROPERTY
def test_ternary_sums_are_exact(path: str, tokens: int, rows: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = random_int8(generator, -128, 127, tokens, width)
    ternary = random_int8(generator, -1, 1, rows, width)
    sums = library.ternary_product(x, pack_tiles(ternary), rows)
    assert sums.dtype == np.int32
    expected = ternary_matmul_reference(torch.from_numpy(x), torch.from_numpy(ternary))
    np.testing.assert_array_equal(sums, expected.numpy())


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("weight", [-1, 1])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_largest_sums_do_not_saturate(path: str, tokens: int, weight: int, value: int) -> None:
    x = np.full((tokens, 7000), value, np.int8)
    tiles = pack_tiles(np.full((40, 7000), weight, np.int8))
    assert (library.ternary_product(x, tiles, 40) == 7000 * value * weight).all()


@given(tokens=TOKENS, rows=SIZES, width=SIZES, seed=st.integers(0, 2**20))
@PROPERTY
def test_int8_sums_are_exact(path: str, tokens: int, rows: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = random_int8(generator, -128, 127, tokens, width)
    weight = random_int8(generator, -127, 127, rows, width)
    sums = library.int8_product(x, pack_int8_tiles(weight), rows)
    np.testing.assert_array_equal(sums, x.astype(np.int64) @ weight.T.astype(np.int64))


def activations(seed: int, tokens: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of very different size, some with many ties between two integers, some all zero."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, width)).astype(np.float32)
    x *= 10.0 ** generator.integers(-7, 8, (tokens, 1))
    x[generator.random(tokens) < 0.1] = 0
    ties = generator.random(tokens) < 0.3
    x[ties] = generator.integers(-254, 255, (int(ties.sum()), width)) / 2
    x[ties, :1] = 127
    return np.ascontiguousarray(x, np.float32)


@given(tokens=TOKENS, width=SIZES, seed=st.integers(0, 2**20))
@PROPERTY
def test_quantizer_is_pytorchs_bit_for_bit(path: str, tokens: int, width: int, seed: int) -> None:
    x = activations(seed, tokens, width)
    values, scales, sums = library.quantize(x)
    expected, expected_scales = quantize_activation(torch.from_numpy(x))
    np.testing.assert_array_equal(values[:, :width], expected.numpy())
    assert not values[:, width:].any()
    np.testing.assert_array_equal(scales, expected_scales[:, 0].numpy())
    np.testing.assert_array_equal(sums, expected.numpy().sum(axis=1))


@given(tokens=TOKENS, rows=SIZES, width=SIZES, seed=st.integers(0, 2**20))
@PROPERTY
def test_products_are_sums_times_scales(
    path: str, tokens: int, rows: int, width: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    x = activations(seed, tokens, width)
    quantized, scale = quantize_activation(torch.from_numpy(x))
    ternary = random_int8(generator, -1, 1, rows, width)
    weight_scale = float(np.float32(generator.random() + 0.01))
    sums = quantized.numpy().astype(np.int64) @ ternary.T.astype(np.int64)
    expected = sums.astype(np.float32) * (np.float32(weight_scale) / scale.numpy())
    product = library.ternary_product(x, pack_tiles(ternary), rows, weight_scale)
    np.testing.assert_array_equal(product, expected)

    weight = random_int8(generator, -127, 127, rows, width)
    row_scales = generator.random(rows).astype(np.float32)
    sums = quantized.numpy().astype(np.int64) @ weight.T.astype(np.int64)
    expected = sums.astype(np.float32) * (row_scales / scale.numpy())
    product = library.int8_product(x, pack_int8_tiles(weight), rows, row_scales)
    np.testing.assert_array_equal(product, expected)


@needs_library
def test_wrong_arguments_are_refused() -> None:
    tiles = pack_tiles(np.zeros((4, 20), np.int8))
    with pytest.raises(ValueError, match="float32 or int8"):
        library.ternary_product(np.zeros((1, 20)), tiles, 4)
    with pytest.raises(ValueError, match="Expected tiles uint8"):
        library.ternary_product(np.zeros((1, 33), np.int8), tiles, 4)
    with pytest.raises(ValueError, match="A scale goes with"):
        library.ternary_product(np.zeros((1, 20), np.int8), tiles, 4, 1.0)
    with pytest.raises(library.KernelsError, match="no kernels 'mmx'"):
        library.select_kernels("mmx")


@needs_library
def test_calls_from_several_threads_and_any_number_of_workers() -> None:
    generator = np.random.default_rng(0)
    x, ternary = random_int8(generator, -128, 127, 5, 300), random_int8(generator, -1, 1, 70, 300)
    tiles, expected = pack_tiles(ternary), x.astype(np.int64) @ ternary.T.astype(np.int64)
    wrong: list[int] = []

    def work() -> None:
        for i in range(200):
            if not np.array_equal(library.ternary_product(x, tiles, 70), expected):
                wrong.append(i)

    before = library.threads()
    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for count in (1, 4, 2, 7, 3):
        library.set_threads(count)
    for caller in callers:
        caller.join()
    assert library.threads() == 3 and not wrong
    library.set_threads(before)


def run_python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
    )
    return done.stdout.strip()


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_its_own_threads() -> None:
    code = """
import os, numpy as np
from bitgen.kernels import library
library.set_threads(2)
x = np.ones((3, 70), np.float32)
library.quantize(x)
child = os.fork()
if child == 0:
    os._exit(0 if library.threads() == 2 and library.quantize(x)[2].tolist() == [8890] * 3 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code) == "0"


@needs_library
def test_an_idle_process_takes_no_processor_time() -> None:
    code = """
import time, numpy as np
from bitgen.kernels import library
library.set_threads(2)
library.quantize(np.ones((3, 70), np.float32))
time.sleep(0.01)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    assert float(run_python(code)) < 0.05


def test_the_library_needs_no_torch_and_describes_itself() -> None:
    code = """
import sys
from bitgen.kernels import library
status = library.describe()
print("torch" in sys.modules, bool(status.reason), status.usable == (status.kernels is not None))
"""
    assert run_python(code) == "False True True"


@needs_library
def test_the_environment_names_the_path() -> None:
    code = "from bitgen.kernels.library import describe as d; print(d().kernels, '|', d().reason)"
    named = run_python(code, BITGEN_KERNELS="portable")
    assert named == "portable | BITGEN_KERNELS names it"
    unknown = run_python(code, BITGEN_KERNELS="mmx")
    assert unknown.startswith(library.describe().usable_kernels[0]) and "mmx is none of" in unknown
    assert run_python(code, BITGEN_NATIVE="0").startswith("None | BITGEN_NATIVE=0")


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "source_hash", lambda: "0" * 32)
    library._load.cache_clear()
    try:
        status = library.describe()
        assert status.built and not status.usable and "other sources" in status.reason
        with pytest.raises(library.KernelsError, match="other sources") as caught:
            library.load()
        assert caught.value.remedy is not None and "hatch_build.py" in caught.value.remedy
    finally:
        library._load.cache_clear()


def test_hook_and_library_agree_on_the_sources() -> None:
    native = ROOT / "src" / "bitgen" / "kernels" / "native"
    assert hook().source_hash(native) == library.source_hash(native)
    assert hook().library_path(ROOT).name == library.library_file().name


class App:
    """What hatchling gives a hook to speak with."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def display_warning(self, message: str) -> None:
        self.said.append(f"warning: {message}")

    def display_info(self, message: str) -> None:
        self.said.append(message)


def small_checkout(folder: Path) -> Path:
    """A checkout with one small source, quick to compile."""
    native = folder / "src" / "bitgen" / "kernels" / "native"
    native.mkdir(parents=True)
    (native / "small.cpp").write_text(
        'extern "C" const char* bitgen_source_hash() { return BITGEN_SOURCE_HASH; }\n'
    )
    (native / "small_avx2.cpp").write_text("#if !defined(BITGEN_HAVE_AVX2)\n#error\n#endif\n")
    (native / "small_neon.cpp").write_text("#if !defined(BITGEN_HAVE_NEON)\n#error\n#endif\n")
    return folder


def run_hook(root: Path) -> tuple[dict[str, Any], list[str]]:
    """What the hook puts into a wheel, and what it says."""
    module = hook()
    made = object.__new__(module.CustomBuildHook)
    app = App()
    made._BuildHookInterface__root, made._BuildHookInterface__app = str(root), app
    build_data: dict[str, Any] = {"pure_python": True, "artifacts": []}
    made.initialize("standard", build_data)
    return build_data, app.said


def test_an_install_without_a_compiler_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build_data, said = run_hook(small_checkout(tmp_path))
    assert build_data == {"pure_python": True, "artifacts": []}
    assert len(said) == 1 and said[0].startswith("warning:") and "compiler" in said[0]

    monkeypatch.setenv("CXX", sys.executable)  # a program, but no compiler
    build_data, said = run_hook(tmp_path)
    assert build_data["pure_python"] and said[0].startswith("warning:")
    monkeypatch.setenv("BITGEN_NATIVE", "1")
    with pytest.raises(RuntimeError):
        run_hook(tmp_path)


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"
)
def test_the_hook_builds_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.delenv("BITGEN_NATIVE", raising=False)
    root = small_checkout(tmp_path)
    build_data, said = run_hook(root)
    built = hook().library_path(root)
    assert said[0].startswith("Built") and built.is_file()
    assert build_data["pure_python"] is False
    assert build_data["tag"].startswith("py3-none-")
    assert build_data["artifacts"] == [built.relative_to(root).as_posix()]
    assert hook().source_hash(root / hook().NATIVE).encode() in built.read_bytes()

    assert run_hook(root)[1] == [f"{built.name} is up to date."]
    with (root / hook().NATIVE / "small.cpp").open("a") as file:
        file.write("// changed\n")
    assert ": 1 of" in run_hook(root)[1][0]


def test_status_is_plain_data() -> None:
    status = dataclasses.asdict(library.describe())
    assert set(status) >= {"built", "usable", "reason", "kernels", "threads"}

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitgen.errors import ConfigError
from bitgen.model.device import resolve_device
from bitgen.training import amp
from bitgen.training.amp import autocast, make_grad_scaler, resolve_precision

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    without_devices(monkeypatch)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == CUDA


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_devices(monkeypatch)
    with pytest.raises(ConfigError, match=name) as caught:
        resolve_device(name)
    assert "--device auto" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16", torch.bfloat16),
        ("Features\t: fp asimd bf16", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_precision_on_a_cpu_follows_its_flags(
    line: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(amp, "_CPU_INFO", info)
    monkeypatch.setattr(amp.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert resolve_precision("auto", CPU) == expected


def test_a_cpu_that_does_not_say_what_it_can_do_gets_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amp, "_CPU_INFO", tmp_path / "missing")
    assert resolve_precision("auto", CPU) == torch.float32


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_precision_on_cuda_follows_its_generation(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_precision("auto", CUDA) == expected


def test_precision_given_is_precision_used() -> None:
    assert resolve_precision("fp32", CUDA) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("fp16", CUDA) == torch.float16


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_without_cuda_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="loss scaling"):
        resolve_precision("fp16", torch.device(device))


def test_bf16_without_autocast_is_refused() -> None:
    """No torch has autocast for the meta device, as older ones have none for Apple's GPUs."""
    meta = torch.device("meta")
    with pytest.raises(ConfigError, match="meta") as caught:
        resolve_precision("bf16", meta)
    assert "fp32" in str(caught.value.remedy)
    assert resolve_precision("fp32", meta) == torch.float32


def test_autocast_computes_in_the_dtype_and_not_at_all_for_float32() -> None:
    a = torch.randn(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("newer", [True, False])
def test_grad_scaler_of_torch_amp_or_of_torch_cuda_amp(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def new_scaler(device: str, enabled: bool) -> bool:
        made.append(f"torch.amp {device}")
        return enabled

    def old_scaler(enabled: bool) -> bool:
        made.append("torch.cuda.amp")
        return enabled

    new = SimpleNamespace(GradScaler=new_scaler) if newer else SimpleNamespace()
    monkeypatch.setattr(torch, "amp", new)
    monkeypatch.setattr(torch.cuda, "amp", SimpleNamespace(GradScaler=old_scaler))
    enabled: Any = make_grad_scaler(CUDA, torch.float16)
    assert enabled is True
    assert made == ["torch.amp cuda" if newer else "torch.cuda.amp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fp16_the_scaler_passes_everything_through(dtype: torch.dtype) -> None:
    """With the real class of this torch: `torch.cuda.amp`'s where `torch.amp` has none."""
    scaler = make_grad_scaler(CPU, dtype)
    loss = torch.tensor(2.0)
    home = torch.amp if hasattr(torch.amp, "GradScaler") else torch.cuda.amp
    assert type(scaler) is home.GradScaler
    assert not scaler.is_enabled()
    assert scaler.scale(loss) is loss

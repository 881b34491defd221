"""`bitgen info --system`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bitgen.cli import system
from bitgen.cli.app import main
from bitgen.kernels import library


def test_it_says_which_path_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["info", "--system"])
    assert left.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    status = library.describe()
    expected = f"C++, {status.kernels}" if status.usable else "PyTorch"
    assert f"packed products {expected}" in words and "torch" in words


def test_json_needs_no_torch() -> None:
    code = (
        "import sys\ntry:\n  from bitgen.cli.app import main; main(['info', '--system', '--json'])"
    )
    code += "\nexcept SystemExit:\n  print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, has_torch = done.stdout.splitlines()
    found = json.loads(answer)
    assert has_torch == "False"
    assert found["cpu"] and found["torch"]
    assert found["kernels"]["reason"]


def test_without_the_library_it_names_what_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITGEN_NATIVE", "0")
    library._load.cache_clear()
    try:
        rows = dict(system.system_rows())
        assert rows["packed products"].startswith("PyTorch, ")
        assert "BITGEN_NATIVE=0" in rows["packed products"] and "threads" not in rows
        monkeypatch.setattr(system, "_installed_version", lambda package: "2.2.2+cpu")
        assert "float32 products" in dict(system.system_rows())["packed products"]
        assert system.describe_system()["torch_int8"] is False
        monkeypatch.setattr(system, "_installed_version", lambda package: None)
        assert dict(system.system_rows())["torch"] == "not installed"
    finally:
        library._load.cache_clear()


def test_a_model_is_not_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["info", "runs/x", "--system"])
    assert left.value.code == 2 and "not about a model" in capsys.readouterr().err

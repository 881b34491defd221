"""The command line as such: help, spellings, switches, exit codes, what is imported."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bitgen import __version__
from bitgen.cli.app import app
from bitgen.cli.command import add_command
from bitgen.cli.failures import describe_failure
from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.errors import DatasetError, DownloadError, Interrupted

CHECKOUT = Path(__file__).resolve().parents[2]
COMMANDS = ["train", "infer", "chat", "evaluate", "export", "info", "demo", "data"]
HEAVY = ("torch", "numpy", "PIL", "torchvision", "transformers", "matplotlib", "safetensors")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "COLUMNS": "200"},
    )


def test_help_imports_nothing_heavy() -> None:
    finished = python(
        "import sys\n"
        "from bitgen.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"
    assert all(command in finished.stdout for command in COMMANDS)


def test_importing_the_package_imports_nothing_heavy() -> None:
    finished = python(
        "import sys, bitgen, bitgen.config, bitgen.console\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert finished.stdout == "[]\n", finished.stderr


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    # Processor time, and the best of several: the machine may be busy with other things.
    code = (
        "import resource, subprocess, sys\n"
        "def spent():\n"
        "    usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    return usage.ru_utime + usage.ru_stime\n"
        "times = []\n"
        "for _ in range(8):\n"
        "    before = spent()\n"
        "    subprocess.run([sys.executable, '-m', 'bitgen', '--help'], check=True,\n"
        "                   stdout=subprocess.DEVNULL)\n"
        "    times.append(spent() - before)\n"
        "print(min(times))"
    )
    pytest.importorskip("resource")
    finished = python(code)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) < 0.3


def test_runs_from_a_checkout_without_being_installed(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-I", str(CHECKOUT / "bitgen_cli.py"), "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert (finished.returncode, finished.stdout) == (0, f"bitgen {__version__}\n")


def test_no_command_shows_help(run) -> None:
    for arguments in ([], ["data"]):
        finished = run(*arguments)
        assert finished.code == 0
        assert "Usage" in finished.stdout


def test_every_option_has_help_words() -> None:
    root = typer.main.get_command(app)
    commands = {**root.commands, **root.commands["data"].commands}
    assert set(COMMANDS) | {"scenes", "check", "download"} == set(commands)
    for command in commands.values():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{command.name} {parameter.name}"


def test_train_has_every_option_of_both_configurations() -> None:
    names = {parameter.name for parameter in typer.main.get_command(app).commands["train"].params}
    model = {"image_size", "image_resize", "image_encoder", "freeze_encoder", "quantization",
             "attention_mode", "dropout"}  # fmt: skip
    assert set(TrainingConfig.__dataclass_fields__) <= names
    assert model <= names
    assert model <= set(BitGenConfig.__dataclass_fields__)


@pytest.mark.parametrize("separator", ["_", "-"])
@pytest.mark.parametrize("equals", [True, False])
def test_underscores_and_dashes_are_alike_and_values_stay(
    run, tmp_path: Path, separator: str, equals: bool
) -> None:
    folder = tmp_path / "with-dash_and_underscore"
    options = {
        f"--num{separator}train": "2", f"--num{separator}val": "1",
        f"--image{separator}size": "32",
    }  # fmt: skip
    pairs = [[f"{n}={v}"] if equals else [n, v] for n, v in options.items()]
    finished = run("data", "scenes", folder, *[part for pair in pairs for part in pair])
    assert finished.code == 0, finished.stderr
    assert len(list((folder / "train2017").iterdir())) == 2


def test_version_before_and_debug_and_quiet_on_both_sides(run, tmp_path: Path) -> None:
    assert run("--version").stdout == f"bitgen {__version__}\n"
    for number, arguments in enumerate(
        (["--quiet", "data", "scenes"], ["data", "scenes", "--quiet"])
    ):
        small = ("--num_train", 1, "--num_val", 1, "--image_size", 32)
        finished = run(*arguments, tmp_path / str(number), *small)
        assert (finished.code, finished.stderr) == (0, "")
    for arguments in (["--debug", "infer"], ["infer", "--debug"]):
        finished = run(*arguments, tmp_path / "absent.jpg")
        assert finished.code == 2
        assert "Traceback" in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train", "--nonsense"],
        ["train", "--batch_size", "many"],
        ["export"],
        ["infer", "--seed"],
        ["data", "nonsense"],
    ],
)
def test_usage_errors(run, arguments: list[str]) -> None:
    finished = run(*arguments)
    assert finished.code == 2
    assert finished.stdout == "", finished.stderr
    first, hint = finished.stderr.splitlines()
    assert first.startswith("error: ")
    assert hint.startswith("  See `bitgen")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DatasetError("No captions.", remedy="Add some."), 2, "No captions."),
        (DownloadError("Cut off."), 1, "Cut off."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 2, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 2, "file"),
        (MemoryError(), 1, "memory"),
        (RuntimeError("odd\nsecond line"), 1, "RuntimeError: odd"),
        (RuntimeError("Numpy is not available"), 2, "built for NumPy 1"),
    ],
)
def test_table_of_failures(error: BaseException, code: int, words: str) -> None:
    failure = describe_failure(error)
    assert failure.exit_code == code
    assert words in failure.message
    assert "\n" not in failure.message


def test_interrupted_training_leaves_with_130() -> None:
    assert describe_failure(Interrupted("Stopped.")).exit_code == 130


def test_an_unexpected_error_is_one_line_and_a_hint(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        """Fails."""
        raise RuntimeError("odd")

    broken = typer.Typer()
    broken.callback()(lambda: None)
    add_command(broken, "fail", fail)
    monkeypatch.setattr("bitgen.cli.app.app", broken)
    finished = run("fail")
    assert finished.code == 1
    assert finished.stderr.splitlines()[0] == "error: RuntimeError: odd"
    assert "--debug" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Traceback" in run("fail", "--debug").stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(
        [sys.executable, "-m", "bitgen", "data", "scenes", str(tmp_path / "s"),
         "--num_train", "1", "--num_val", "1", "--image_size", "32", "--quiet"],
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src")},
    )  # fmt: skip
    os.close(writer)
    assert finished.stderr == ""
    assert finished.returncode == 1


def test_lazy_names_of_the_package() -> None:
    import bitgen

    assert bitgen.BitGenConfig is BitGenConfig
    assert {"BitGenModel", "AttentionMask", "BitGen"} <= set(dir(bitgen))
    assert bitgen.BitGenModel.__name__ == "BitGenModel"
    with pytest.raises(AttributeError, match="nonsense"):
        bitgen.nonsense  # noqa: B018

"""What an installed BitGen holds: code, robot catalog and model, without the checkout beside it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitgen.dataset.robots import load_catalog
from bitgen.export.safetensors import export_safetensors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python has none

CHECKOUT = Path(__file__).resolve().parents[1]

needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="needs hatchling installed, so that nothing is fetched",
)

_CATALOG_NAMES = """
import bitgen
from bitgen.dataset.robots import load_catalog
print(bitgen.__file__)
for robot in load_catalog():
    print(robot.name)
"""


def wheel_settings() -> dict[str, Any]:
    """What pyproject.toml says of the wheel."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    return settings


def assert_works_alone(packages: Path, elsewhere: Path) -> None:
    """BitGen in the folder `packages` finds the catalog that the checkout has."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    output = finish([sys.executable, "-c", _CATALOG_NAMES], elsewhere, environment)
    location, *names = output.splitlines()
    assert Path(location).is_relative_to(packages)
    assert names == [robot.name for robot in load_catalog()]


def finish(command: Sequence[str], directory: Path, environment: dict[str, str]) -> str:
    """Run a command in a folder; returns its stdout and fails the test if it fails."""
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_and_included_files_work_alone(tmp_path: Path) -> None:
    """The files that pyproject.toml names for the wheel are enough."""
    settings = wheel_settings()
    packages = tmp_path / "packages"
    for package in settings["packages"]:
        shutil.copytree(CHECKOUT / package, packages / Path(package).name)
    for source, target in settings["force-include"].items():
        shutil.copytree(CHECKOUT / source, packages / target)
    assert_works_alone(packages, tmp_path)


@pytest.mark.slow
@needs_hatchling
def test_the_model_is_in_sdist_and_wheel_and_answers(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A model in data/model goes into the sdist, from there into the wheel, and answers at once."""
    checkout, built, packages = tmp_path / "checkout", tmp_path / "built", tmp_path / "packages"
    checkout.mkdir()
    for name in (".gitignore", "README.md", "pyproject.toml", "hatch_build.py"):
        shutil.copyfile(CHECKOUT / name, checkout / name)
    for name in ("src", "data"):
        shutil.copytree(CHECKOUT / name, checkout / name)
    model = checkout / "data" / "model" / "tiny.safetensors"
    export_safetensors(make_run(), model, overwrite=True)
    (checkout / "data" / "other.safetensors").write_bytes(b"not to ship")
    without_compiler = {**os.environ, "BITGEN_NATIVE": "0"}
    hatchling = [sys.executable, "-m", "hatchling", "build", "--directory", str(built), "--target"]
    finish([*hatchling, "sdist"], checkout, without_compiler)
    (sdist,) = built.glob("bitgen-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not any("other.safetensors" in name for name in archive.getnames())
        if sys.version_info >= (3, 12):
            archive.extractall(tmp_path / "sdist", filter="data")
        else:
            archive.extractall(tmp_path / "sdist")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    finish([*hatchling, "wheel"], unpacked, without_compiler)
    (wheel,) = built.glob("bitgen-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    installed = packages / "bitgen" / "data" / "model"
    assert (installed / "tiny.safetensors").read_bytes() == model.read_bytes()
    assert (installed / "README.md").is_file()

    Image.new("RGB", (64, 48), "green").save(tmp_path / "photo.png")
    command = ["-m", "bitgen", "infer", "photo.png", "--task", "Bring a ball.", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    line = json.loads(finish([sys.executable, *command], tmp_path, environment))
    assert line["image"] == "photo.png"
    assert {robot["name"] for robot in line["robots"]} == {r.name for r in load_catalog()}


@pytest.mark.slow
@needs_hatchling
def test_wheel_works_alone(tmp_path: Path) -> None:
    """A wheel that is built and unpacked has command, catalog and every module."""
    wheels, packages = tmp_path / "wheels", tmp_path / "packages"
    command = [
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(wheels), str(CHECKOUT)),
    ]
    finish(command, tmp_path, dict(os.environ))
    (wheel,) = wheels.glob("bitgen-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    source = CHECKOUT / "src"
    modules = {path.relative_to(source) for path in (source / "bitgen").rglob("*.py")}
    assert modules == {path.relative_to(packages) for path in packages.rglob("*.py")}
    (entry_points,) = packages.glob("*.dist-info/entry_points.txt")
    assert "bitgen = bitgen.cli.app:main" in entry_points.read_text(encoding="utf-8")
    assert_works_alone(packages, tmp_path)

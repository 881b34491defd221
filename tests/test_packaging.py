"""What an installed BitGen holds: code and robot catalog, without the checkout beside it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bitgen.dataset.robots import load_catalog

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python has none

CHECKOUT = Path(__file__).resolve().parents[1]

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
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="needs hatchling installed, so that nothing is fetched",
)
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

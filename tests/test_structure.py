"""The directions that imports may take, so that the layers stay layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "bitgen"

# A part may import itself and the parts named for it.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors"},
    "shipped": {"errors"},
    "kernels": {"errors", "config"},
    "model": {"errors", "config", "kernels"},
    "dataset": {"errors", "files", "config", "model", "shipped"},
    "checkpoint": {"errors", "files", "config", "model", "dataset"},
    "export": {
        *("errors", "files", "config", "kernels", "model", "dataset", "checkpoint", "__init__"),
    },
    "training": {"errors", "files", "config", "model", "dataset", "checkpoint", "export"},
    "inference": {
        *("errors", "files", "config", "shipped", "kernels", "model", "dataset", "checkpoint"),
        "export",
    },
    "console": {"errors"},
    "__init__": {"config", "model", "inference"},
}


def part_of(module: str) -> str:
    """`bitgen.model.masks` belongs to `model`; the checkpoint format stands below training."""
    names = module.split(".")[1:]
    if not names:
        return "__init__"
    return "checkpoint" if names[:2] == ["training", "checkpoint"] else names[0]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "bitgen"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(["bitgen", *path.relative_to(PACKAGE).with_suffix("").parts])
    part = part_of(module.removesuffix(".__init__"))
    if part in ("cli", "__main__"):
        return
    wrong = {name for name in imported_modules(path) if part_of(name) not in ALLOWED[part] | {part}}
    assert not wrong, f"{module} belongs to {part} and may not import {sorted(wrong)}"

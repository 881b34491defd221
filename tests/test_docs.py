"""The pages under docs/ say what the code does: examples are run, pictures drawn again."""

from __future__ import annotations

import doctest
import re
import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_examples_print_what_the_page_shows(page: Path) -> None:
    torch.manual_seed(0)
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0
    assert result.attempted == len(re.findall(r"^>>> ", page.read_text("utf-8"), re.MULTILINE))


def test_pictures_of_masks_are_those_that_the_code_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_masks.py"))["pictures"]()
    stored = {path.stem: path.read_text("utf-8") for path in (DOCS / "masks").glob("*.svg")}
    assert drawn == stored, "Run: python docs/draw_masks.py"
    page = (DOCS / "attention.md").read_text("utf-8")
    assert set(re.findall(r"masks/(\w+)\.svg", page)) == set(drawn)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^):]+?)\)", text):
        name, _, heading = target.partition("#")
        named = DOCS / name if name else page
        assert named.exists(), target
        if heading:
            assert heading in headings(named), target
    for name in re.findall(r"`((?:tests|benchmarks|src|docs)/[\w/.]+)`", text):
        assert (DOCS.parent / name).exists(), name

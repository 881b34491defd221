"""docs/format.md: its bytes are what the code writes, its tables name every tensor of a model.

tests/test_docs.py runs the page's own reader on the page's own bytes.
"""

from __future__ import annotations

import doctest
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitgen.config import MODEL_SIZES, BitGenConfig
from bitgen.export.artifact import EMBEDDINGS, PACKINGS, read_header, write_artifact
from bitgen.export.safetensors import export_safetensors
from bitgen.kernels.tiles import (
    int8_tile_shape,
    pack_base3,
    pack_int8_tiles,
    pack_tiles,
    tile_shape,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
TERNARY = np.array([[1, -1, 0, 0, 1], [0, 1, 1, -1, -1]], dtype=np.int8)
INT8 = np.array([[127, -5, 0], [3, 64, -127]], dtype=np.int8)


@pytest.fixture(scope="module")
def names_of_the_page() -> dict[str, Any]:
    """What the page's examples define."""
    test = doctest.DocTestParser().get_doctest(PAGE.read_text("utf-8"), {}, PAGE.name, None, None)
    doctest.DocTestRunner().run(test, clear_globs=False)
    return test.globs


def test_the_example_is_what_is_written(names_of_the_page: dict[str, Any], tmp_path: Path) -> None:
    path, tiles = tmp_path / "toy.safetensors", pack_tiles(TERNARY)
    tensors = {"toy.packed": tiles, "toy.scale": np.array(0.75, dtype=np.float32)}
    with path.open("wb") as file:
        write_artifact(file, tensors, {"matrices": '{"toy":[2,5]}'})
    assert names_of_the_page["file"] == path.read_bytes()
    assert names_of_the_page["base3"] == pack_base3(tiles).tobytes()
    assert names_of_the_page["tiles"] == pack_int8_tiles(INT8).tobytes()


def test_the_rules_of_the_page_read_matrices_of_many_tiles(
    names_of_the_page: dict[str, Any],
) -> None:
    generator = np.random.default_rng(0)
    ternary = generator.integers(-1, 2, (70, 40), dtype=np.int8)
    tiles = pack_tiles(ternary)
    weight, tile_byte = names_of_the_page["weight"], names_of_the_page["tile_byte"]
    for (n, k), expected in np.ndenumerate(ternary):
        assert weight(tiles.tobytes(), 40, n, k) == expected
    base3 = pack_base3(tiles).tobytes()
    assert bytes(tile_byte(base3, at) for at in range(tiles.size)) == tiles.tobytes()
    matrix = generator.integers(-127, 128, (70, 41), dtype=np.int8)
    packed = pack_int8_tiles(matrix).tobytes()
    for (row, column), expected in np.ndenumerate(matrix):
        assert names_of_the_page["int8"](packed, 41, row, column) == expected


def rows_of_tables(config: BitGenConfig) -> Iterator[tuple[str, str, str]]:
    """Name, kind and shape of each row that stands for tensors of such a model."""
    page = PAGE.read_text("utf-8").partition("## Which tensors there are")[2]
    tables = page.partition("## Accuracy")[0].split("| name | kind | shape |")[1:]
    both, dense, experts, task_words, idf = tables
    of_model = [both, experts if config.num_experts > 1 else dense]
    of_model += [task_words] * bool(config.robot_sets) + [idf] * config.caption_idf
    for table in of_model:
        for name, kind, shape in re.findall(r"^\| `(.*?)` \| (\w+) \| (.*?) ?\|$", table, re.M):
            yield name, kind, shape.strip("`")


def expected_tensors(
    config: BitGenConfig, packing: str, embedding: str, convolutions: str = "float32"
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its name, as the tables say."""
    widths_of_stem = [
        min(256, 32 << halving)
        for halving in range(config.patch_size.bit_length() - 1)
        for _ in range(1 + (config.stem_residual_convolutions if halving else 0))
    ]
    numbers_of_stem = range(len(widths_of_stem))
    counts = {
        "l": range(config.num_layers), "e": range(config.num_experts),
        "t": range(config.predict_tokens - 1), "m": range(config.encoder_layers),
        "c": numbers_of_stem,
    }  # fmt: skip
    letters: dict[str, Any] = {
        "V": config.vocab_size, "C": config.hidden_size, "H": config.num_heads,
        "G": config.num_kv_heads, "D": config.head_dim, "F": config.intermediate_size,
        "E": config.num_experts, "R": len(config.robot_names), "Z": len(config.robot_sets),
        "U": config.task_word_bins,
        "W": config.encoder_hidden_size, "I": config.encoder_intermediate_size,
        "P": (config.image_size // config.patch_size) ** 2,
        "w": {**dict(enumerate(widths_of_stem)), -1: 3},
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {}
    for pattern, kind, formula in rows_of_tables(config):
        used = [letter for letter in counts if f"{{{letter}}}" in pattern]
        for numbers in itertools.product(*(counts[letter] for letter in used)):
            places = dict(zip(used, numbers, strict=True))
            name, widths = pattern.format(**places), dict(letters)
            if not used:  # behind the stem, w[-1] is its last width
                widths["w"] = {-1: letters["w"][numbers_of_stem[-1]]}
            shape = tuple(eval(f"[{formula}]", {**widths, **places}))
            found.update(tensors_of(name, kind, shape, packing, embedding, convolutions))
    return found


def tensors_of(
    name: str, kind: str, shape: tuple[int, ...], packing: str, embedding: str, convolutions: str
) -> dict[str, tuple[int, ...]]:
    """What one row of a table stands for."""
    if kind == "convolution" and convolutions == "int8":
        return {f"{name}.int8_rows": shape, f"{name}.row_scales": shape[:1]}
    if kind in ("float", "half", "convolution"):
        return {name: shape}
    rows, columns = shape
    if kind == "embedding":
        if embedding == "float32":
            return {f"{name}.weight": shape}
        return {f"{name}.tiles": int8_tile_shape(rows, columns), f"{name}.row_scales": (rows,)}
    tiles = tile_shape(rows, columns)
    if packing == "2":
        return {f"{name}.scale": (), f"{name}.packed": tiles}
    return {f"{name}.scale": (), f"{name}.packed_base3": (4 * -(-int(np.prod(tiles)) // 5),)}


@pytest.mark.parametrize(
    ("changes", "packing", "embedding", "convolutions"),
    [
        ({}, "2", "float32", "float32"),
        ({"num_experts": 3, "experts_per_token": 2, "predict_tokens": 3}, "2", "int8", "float32"),
        ({"encoder_hidden_size": 48, "encoder_layers": 2, "patch_size": 8}, "1.6", "int8", "int8"),
        ({"stem_residual_convolutions": 2}, "2", "float32", "float32"),
        ({"stem_residual_convolutions": 1}, "2", "float32", "int8"),
        ({"robot_sets": (1, 3), "task_word_bins": 512}, "2", "float32", "float32"),
        ({"caption_idf": True}, "2", "float32", "float32"),
    ],
    ids=[
        *("dense", "experts and future heads", "1.6 bits", "residual stem", "int8 stem", "words"),
        "idf",
    ],
)
def test_tables_name_every_tensor(
    make_run: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    packing: str,
    embedding: str,
    convolutions: str,
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(**changes), path, False, False, packing, embedding, convolutions)
    header = read_header(path)
    found = {name: stored.shape for name, stored in header.tensors.items()}
    halves = {name for name, stored in header.tensors.items() if stored.dtype == np.float16}
    of_words = ("robot_selector.word_", "caption_idf")
    assert halves == {name for name in found if name.startswith(of_words)}
    assert found == expected_tensors(header.config, packing, embedding, convolutions)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_bytes_of_the_page_are_those_of_the_tensors(size: str) -> None:
    config = BitGenConfig.preset(size)
    numbers = []
    for embedding, packing in itertools.product(EMBEDDINGS, PACKINGS):
        nbytes = 0
        for name, shape in expected_tensors(config, packing, embedding).items():
            is_byte = name.endswith((".packed", ".packed_base3", ".tiles"))
            nbytes += math.prod(shape) * (1 if is_byte else 4)
        numbers.append(f"{nbytes:,}")
    page = PAGE.read_text("utf-8").partition("## Accuracy")[2]
    (row,) = re.findall(rf"^\| {size} \| [\d,]+ \| (.*) \|$", page, re.M)
    assert row.split(" | ") == numbers


def test_metadata_of_the_page_is_that_of_the_file(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    table = PAGE.read_text("utf-8").partition("## The metadata")[2].partition("## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert sorted(named) == sorted(metadata)

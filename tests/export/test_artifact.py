"""The artifact's bytes: how they are laid out, and that they are read without torch."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitgen.errors import ModelFileError
from bitgen.export.artifact import open_artifact, read_header, write_artifact
from bitgen.export.loaded import load_run
from bitgen.export.safetensors import export_safetensors, load_artifact
from bitgen.kernels.tiles import tile_shape, unpack_tiles

MakeRun = Callable[..., Path]

_WITHOUT_TORCH = """
import sys
import warnings
from pathlib import Path

from bitgen.errors import ModelFileError
from bitgen.export.artifact import open_artifact

warnings.simplefilter("error")
artifact = open_artifact(sys.argv[1])
print(artifact.header.config.hidden_size, len(artifact.catalog), artifact.tokenizer.vocab_size)
print(sum(int(array.sum()) for array in artifact.tensors.values() if array.dtype == "uint8"))
try:
    open_artifact(sys.argv[2])
except ModelFileError as error:
    print(error.message.replace(sys.argv[2], "FILE"))
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "torchvision")])
"""


def header_json(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def write_header(path: Path, header: str, data: bytes = b"") -> None:
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def as_version_1(path: Path) -> None:
    """Write a file of version 2 as version 1 was written: each row by itself, 4 weights a byte."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    matrices = json.loads(metadata.pop("matrices"))
    tensors = load_file(path)
    for name, (rows, columns) in matrices.items():
        tiles = tensors[f"{name}.packed"].numpy()
        codes = np.ones((rows, -(-columns // 4) * 4), dtype=np.uint8)
        codes[:, :columns] = unpack_tiles(tiles, rows, columns) + 1
        four = codes.reshape(rows, -1, 4)
        packed = four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6
        tensors[f"{name}.packed"] = torch.from_numpy(packed)
    tensors["robot_selector.shared_bias"] = tensors["robot_selector.shared_bias"].reshape(())
    save_file(tensors, path, metadata={**metadata, "format_version": "1"})


@pytest.fixture
def artifact(make_run: MakeRun, tmp_path: Path) -> Path:
    output = tmp_path / "model.safetensors"
    export_safetensors(make_run(), output)
    return output


# Layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["float32", "int8"])
def test_packed_weights_begin_at_whole_lines_and_nothing_stands_between(
    make_run: MakeRun, tmp_path: Path, embedding: str
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path, embedding=embedding)
    header = read_header(path)
    assert header.header_bytes % 64 == 0
    end = header.header_bytes
    for name, stored in header.tensors.items():
        assert stored.begin == end
        end += stored.nbytes
        assert stored.begin % stored.dtype.itemsize == 0
        if name.endswith((".packed", ".tiles")):
            assert stored.begin % 64 == 0
    assert end == path.stat().st_size
    load_file(path)  # the library of safetensors agrees


@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=8), seed=st.integers(0, 9))
@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tensors_are_written_as_the_library_reads_them(
    tmp_path: Path, shapes: list[list[int]], seed: int
) -> None:
    generator, path = np.random.default_rng(seed), tmp_path / "any.safetensors"
    dtypes = [np.float32, np.uint8, np.int64, np.int8, np.float16, np.bool_]
    tensors = {
        f"{number}": np.asarray(generator.integers(0, 99, shape)).astype(dtypes[number % 6])
        for number, shape in enumerate(shapes)
    }
    with path.open("wb") as file:
        write_artifact(file, tensors, {"title": "\u00e9\u4e16"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert torch.equal(read[name], torch.from_numpy(array))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"title": "\u00e9\u4e16"}


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["float32", "int8"])
@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_tensors_are_those_of_the_model(
    make_run: MakeRun, tmp_path: Path, packing: str, embedding: str
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path, packing=packing, embedding=embedding)
    artifact, state = open_artifact(path), load_artifact(path).model.state_dict()
    assert artifact.tensors.keys() == state.keys()
    for name, array in artifact.tensors.items():
        assert np.array_equal(array, state[name].numpy())
        if name.endswith((".packed", ".tiles")):
            assert array.ctypes.data % 64 == 0
    layers = {name for name in state if name.endswith(".packed")}
    for name in layers:
        rows_columns = artifact.header.matrices[name.removesuffix(".packed")]
        assert artifact.tensors[name].shape == tile_shape(*rows_columns)


def test_weights_are_views_of_the_file(artifact: Path) -> None:
    opened = open_artifact(artifact)
    whole = np.frombuffer(artifact.read_bytes(), np.uint8)
    bases = set()
    for name, array in opened.tensors.items():
        assert not array.flags.writeable and not array.flags.owndata
        stored = opened.header.tensors[name]
        bases.add(array.ctypes.data - stored.begin)
        assert np.array_equal(
            np.frombuffer(array.tobytes(), np.uint8),
            whole[stored.begin : stored.begin + stored.nbytes],
        )
    assert len(bases) == 1  # one map


def test_torch_is_not_imported(artifact: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(artifact.read_bytes()[:-1])
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(artifact), str(cut)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = load_artifact(artifact)
    sums = [t.sum().item() for t in loaded.model.state_dict().values() if t.dtype == torch.uint8]
    size = artifact.stat().st_size
    assert done.stdout.splitlines() == [
        f"32 {len(loaded.catalog)} {loaded.tokenizer.vocab_size}",
        f"{sum(sums)}",
        f"FILE is truncated: it has {size - 1} bytes, but its header promises {size}.",
        "[]",
    ]


def test_files_of_version_1_are_read(make_run: MakeRun, tmp_path: Path) -> None:
    # 36 is no multiple of a tile's 16 inputs, nor is 42 of the 4 weights that shared a byte.
    run_dir = make_run(hidden_size=36, intermediate_size=42)
    path = tmp_path / "model.safetensors"
    export_safetensors(run_dir, path)
    as_version_1(path)
    header = read_header(path)
    assert (header.version, header.packing, header.embedding) == (1, "2", "float32")
    assert len(header.tensors["text_decoder.layers.0.mlp.down_proj.packed"].shape) == 2
    loaded, trained = load_artifact(path), load_run(run_dir).model.state_dict()
    state = loaded.model.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    for name, array in open_artifact(path).tensors.items():
        if name.endswith(".packed"):
            assert array.ctypes.data % 64 == 0
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors["text_decoder.layers.0.mlp.down_proj.packed"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelFileError, match=r"uint8 \[3\], expected uint8 \[N, ceil\(K / 4\)\]"):
        load_artifact(path)


@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_a_file_that_another_program_wrote_again_is_read(
    make_run: MakeRun, tmp_path: Path, packing: str
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path, packing=packing)
    before = {name: array.copy() for name, array in open_artifact(path).tensors.items()}
    header = header_json(path)
    metadata = header.pop("__metadata__")
    # In the order of names, behind a header of odd length: hardly anything is aligned.
    data = path.read_bytes()[read_header(path).header_bytes :]
    entries, parts, end = {}, [], 0
    for name in sorted(header):
        begin, stop = header[name]["data_offsets"]
        parts.append(data[begin:stop])
        entries[name] = {**header[name], "data_offsets": [end, end + stop - begin]}
        end += stop - begin
    text = json.dumps({"__metadata__": metadata, **entries})
    write_header(path, text + " " * (len(text) % 2 + 1), b"".join(parts))
    after = open_artifact(path).tensors
    assert after.keys() == before.keys()
    for name, array in after.items():
        assert np.array_equal(array, before[name])
        if name.endswith(".packed"):
            assert array.ctypes.data % 64 == 0


def test_a_byte_that_is_no_five_weights_is_noticed(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path, packing="1.6")
    header, content = read_header(path), bytearray(path.read_bytes())
    name = "text_decoder.layers.1.self_attn.o_proj.packed_base3"
    content[header.tensors[name].begin + 3] = 250
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{name}: .* at most 242, got 250"):
        load_artifact(path)


# What is refused --------------------------------------------------------------------------------

_NINE = {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "U8"},
        {"dtype": "BF16"},
        {"dtype": 3},
        {"dtype": None},
        {"shape": [8]},
        {"shape": [-9, -1]},
        {"shape": [True, 9]},
        {"shape": "9"},
        {"shape": [9.0]},
        {"data_offsets": []},
        {"data_offsets": ["0", "36"]},
        {"data_offsets": [0, 36, 72]},
        {"data_offsets": [36, 0]},
        {"data_offsets": [4, 40]},
        {"data_offsets": [-36, 0]},
        {"data_offsets": [0, 2**70]},
        {"more": 1},
    ],
    ids=str,
)
def test_entries_that_no_tensor_can_have(artifact: Path, change: Mapping[str, Any]) -> None:
    metadata = header_json(artifact)["__metadata__"]
    write_header(
        artifact, json.dumps({"__metadata__": metadata, "a": {**_NINE, **change}}), bytes(100)
    )
    with pytest.raises(ModelFileError, match="damaged|dtype"):
        read_header(artifact)


def test_headers_that_promise_what_is_not_there(artifact: Path) -> None:
    metadata = header_json(artifact)["__metadata__"]

    def refuse(entries: Mapping[str, Any], size: int, words: str) -> None:
        write_header(artifact, json.dumps({"__metadata__": metadata, **entries}), bytes(size))
        with pytest.raises(ModelFileError, match=words):
            read_header(artifact)

    refuse({"a": _NINE}, 35, "truncated")
    refuse({"a": _NINE}, 37, "damaged: it has")
    refuse({"a": 1}, 0, "damaged")
    refuse({"a": _NINE, "b": _NINE}, 72, "damaged")  # one above the other
    refuse({"a": _NINE, "b": {**_NINE, "data_offsets": [40, 76]}}, 76, "damaged")  # a hole
    write_header(artifact, "{" * 50_000)
    with pytest.raises(ModelFileError, match="damaged"):
        read_header(artifact)
    # What is no tensor of ours is noticed before the tensors are.
    write_header(artifact, json.dumps({"a": _NINE}), bytes(36))
    with pytest.raises(ModelFileError, match="not one that BitGen exported"):
        read_header(artifact)


@pytest.mark.parametrize(
    "matrices",
    ["[]", '{"a": 1}', '{"a": [1]}', '{"a": [1, -2]}', '{"a": [1, true]}', '{"a": [1, 2]}', "{}"],
)
def test_sizes_of_matrices_that_do_not_fit(artifact: Path, matrices: str) -> None:
    with safe_open(artifact, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(artifact), artifact, metadata={**metadata, "matrices": matrices})
    with pytest.raises(ModelFileError, match="damaged"):
        read_header(artifact)


def test_a_folder_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        open_artifact(tmp_path)

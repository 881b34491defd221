"""What a training takes from a run and from an exported file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitgen.errors import ModelFileError
from bitgen.export.safetensors import export_safetensors, load_artifact
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers
from bitgen.training.checkpoint import load_model_tensors, open_run, read_tensors
from bitgen.training.initial_model import open_initial_model

MakeRun = Callable[..., Path]


def test_a_run_gives_its_own_weights(make_run: MakeRun) -> None:
    run_dir = make_run()
    initial, run = open_initial_model(run_dir), open_run(run_dir)
    assert (initial.config, initial.step) == (run.config, run.step)
    assert (initial.tokenizer_json, initial.robots_json) == (run.tokenizer_json, run.robots_json)
    expected, found = read_tensors(run.model_path), initial.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("in_file", ["float32", "int8"])
@pytest.mark.parametrize(
    ("changes", "packing"),
    [({}, "2"), ({"num_experts": 2, "predict_tokens": 2}, "1.6"), ({"quantization": "none"}, "2")],
    ids=["ternary", "experts at 1.6 bits", "full precision"],
)
def test_weights_of_a_file_round_to_what_it_holds(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, int | str], packing: str, in_file: str
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(**changes), path, False, False, packing, in_file, in_file)
    initial, packed = open_initial_model(path), load_artifact(path).model
    model = BitGenModel(initial.config)
    load_model_tensors(model, initial.tensors(), path)
    if in_file == "int8":
        rows = packed.text_decoder.embed_tokens(torch.arange(initial.config.vocab_size))
        assert torch.equal(model.text_decoder.embed_tokens.weight, rows)
        model.text_decoder.quantize_embedding()
    pack_ternary_layers(model)
    expected, found = packed.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="absent"):
        open_initial_model(tmp_path / "absent")
    (tmp_path / "file.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match="zip archive"):
        open_initial_model(tmp_path / "file.safetensors")

"""What a training takes from a run and from an exported file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributions import Distribution, Laplace, Normal, Uniform

from bitgen.errors import ConfigError, ModelFileError
from bitgen.export.safetensors import export_safetensors, load_artifact
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers, quantize_weight
from bitgen.training.checkpoint import load_model_tensors, open_run, read_tensors
from bitgen.training.initial_model import (
    likely_weights,
    open_initial_model,
    open_initial_models,
)

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


@pytest.mark.parametrize(
    "distribution",
    [Normal(0.0, 0.07), Uniform(-0.1, 0.1), Laplace(0.0, 0.05)],
    ids=["normal", "few zeros", "many zeros"],
)
def test_weights_of_a_file_are_spread_as_trained_ones(distribution: Distribution) -> None:
    """So many lie near the threshold, where a small step changes the ternary weight."""
    torch.manual_seed(1)
    trained = distribution.sample((300, 500))
    ternary, scale = quantize_weight(trained)
    found = likely_weights(ternary, scale)
    assert found.dtype == torch.float32
    again, its_scale = quantize_weight(found)
    assert torch.equal(again, ternary)
    torch.testing.assert_close(its_scale, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(likely_weights(ternary, scale), found, rtol=0, atol=0)
    for near in (0.05, 0.2):
        close, expected = (
            ((w.abs() / scale - 0.5).abs() < near).float().mean() for w in (found, trained)
        )
        assert 0.8 * expected < close < 1.25 * expected
    negative = (found[ternary == 0] < 0).float().mean()
    assert 0.48 < negative < 0.52


@pytest.mark.parametrize("value", [0, 1, -1])
def test_weights_that_are_all_alike_round_to_the_same(value: int) -> None:
    ternary = torch.full((4, 8), value, dtype=torch.int8)
    again, scale = quantize_weight(likely_weights(ternary, torch.tensor(0.3)))
    assert torch.equal(again, ternary)
    if value:
        assert scale == pytest.approx(0.3)


def test_several_models_give_their_mean(make_run: MakeRun) -> None:
    """One that is named twice counts twice."""
    first, second = make_run("first", steps=(3,)), make_run("second", steps=(4,), dropout=0.5)
    one, other = (read_tensors(open_run(path).model_path) for path in (first, second))
    found = open_initial_models([first, first, second])
    assert (found.path, found.config) == (first, open_run(first).config)
    tensors = found.tensors()
    assert tensors.keys() == one.keys()
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    assert len(moved) > 10
    for name, value in tensors.items():
        assert value.dtype == one[name].dtype
        expected = (2 * one[name] + other[name]) / 3 if name in moved else one[name]
        torch.testing.assert_close(value, expected)


def test_a_run_and_its_exported_file_have_a_mean(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, path = make_run(), tmp_path / "model.safetensors"
    export_safetensors(run_dir, path)
    name = "text_decoder.layers.0.self_attn.q_proj.weight"
    in_run, in_file = (open_initial_model(each).tensors()[name] for each in (run_dir, path))
    found = open_initial_models([run_dir, path]).tensors()[name]
    torch.testing.assert_close(found, (in_run + in_file) / 2)


@pytest.mark.parametrize("difference", ["architecture", "catalog"])
def test_models_that_have_no_mean_are_refused(make_run: MakeRun, difference: str) -> None:
    first = make_run("first")
    if difference == "architecture":
        second, words = make_run("second", num_layers=3), "num_layers is 2 and 3"
    else:
        second, words = make_run("second"), "robot catalogs differ"
        catalog = second / "robots.json"
        catalog.write_text(catalog.read_text().replace("Drone", "Balloon"))
    with pytest.raises(ConfigError, match=words):
        open_initial_models([first, second])


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="absent"):
        open_initial_model(tmp_path / "absent")
    (tmp_path / "file.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match="zip archive"):
        open_initial_model(tmp_path / "file.safetensors")

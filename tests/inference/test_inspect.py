"""`describe`: numbers that can be counted in another way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitgen.errors import ModelFileError
from bitgen.export.artifact import read_header
from bitgen.export.safetensors import export_safetensors
from bitgen.inference.inspect import describe
from bitgen.inference.predictor import BitGen
from bitgen.kernels.quantize import quantize_weight
from bitgen.model.ternary import TernaryLinear

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    "experts", [{}, {"num_experts": 4, "experts_per_token": 2}], ids=["dense", "experts"]
)
def test_parameters_and_shares_are_those_of_the_trained_model(
    make_run: MakeRun, experts: dict[str, int]
) -> None:
    run_dir = make_run(**experts)
    description = describe(run_dir)
    model = BitGen.load(run_dir, packed=False).model
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    weights = torch.cat([quantize_weight(layer.weight)[0].flatten() for layer in layers])
    total = sum(tensor.numel() for tensor in model.state_dict().values())

    assert (description.num_experts, description.experts_per_token) == (
        (4, 2) if experts else (1, 1)
    )
    assert description.ternary_parameters == weights.numel()
    # A packed layer stores one scale that the trained one computes.
    assert description.float_parameters == total - weights.numel() + len(layers)
    assert description.parameters == sum(part.parameters for part in description.parts)
    assert description.ternary_shares is not None
    for value, name in ((-1, "-1"), (0, "0"), (1, "+1")):
        share = float((weights == value).double().mean())
        assert description.ternary_shares[name] == pytest.approx(share)
    assert description.entropy_per_ternary_weight is not None
    assert 1.4 < description.entropy_per_ternary_weight <= math.log2(3)
    packed = sum(layer.packed_bytes for layer in layers)  # scales included
    assert description.bits_per_ternary_weight == 8 * packed / weights.numel()
    assert (description.packing, description.embedding) == ("2", "float32")
    assert description.dtypes == {
        "ternary (2 bits)": weights.numel(),
        "float32": description.float_parameters,
    }

    by_name = {part.name: part for part in description.parts}
    decoder = by_name["decoder"]
    expected = sum(
        layer.weight.numel()
        for layer in model.text_decoder.modules()
        if isinstance(layer, TernaryLinear)
    )
    assert decoder.ternary_parameters == expected
    embedding = by_name["embedding (shared with the lm head)"]
    assert (embedding.ternary_parameters, embedding.float_parameters) == (0, 512 * 32)
    assert embedding.bytes == 512 * 32 * 4


def test_where_it_comes_from(make_run: MakeRun) -> None:
    description = describe(make_run("garden"))
    assert (description.kind, description.run, description.step) == ("run", "garden", 5)
    assert (description.epoch, description.best_validation_loss) == (1, 2.25)
    assert description.training_loss == 2.5
    assert description.data["train_images"] == 7
    assert description.training["num_epochs"] == 3
    assert (description.decoder_layers, description.encoder_layers) == (2, 1)
    assert (description.image_size, description.image_tokens) == (32, 4)
    assert len(description.robots) > 2


def test_run_checkpoint_and_artifact_differ_only_in_the_file(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run_dir = make_run()
    artifact = tmp_path / "model.safetensors"
    report = export_safetensors(run_dir, artifact)
    checkpoint = run_dir / "checkpoints" / "last"
    of_run, of_checkpoint, of_artifact = describe(run_dir), describe(checkpoint), describe(artifact)
    assert (of_run.kind, of_checkpoint.kind, of_artifact.kind) == ("run", "checkpoint", "artifact")
    assert of_artifact.bytes_on_disk == artifact.stat().st_size
    assert of_run.bytes_on_disk == (checkpoint / "model.safetensors").stat().st_size
    assert of_artifact.bytes_packed == report.ternary_bytes + report.float_bytes
    assert of_artifact.ternary_parameters == report.ternary_weights
    assert of_artifact.float_parameters == report.float_weights
    same = {"path": run_dir, "kind": "run", "bytes_on_disk": 0}
    of_all = [dataclasses.replace(d, **same) for d in (of_run, of_checkpoint, of_artifact)]
    assert of_all[0] == of_all[1] == of_all[2]
    json.dumps({**dataclasses.asdict(of_run), "path": str(run_dir)})


def test_how_an_artifact_is_packed_is_said_in_true_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, artifact = make_run(), tmp_path / "model.safetensors"
    report = export_safetensors(run_dir, artifact, packing="1.6", embedding="int8")
    of_run, found = describe(run_dir), describe(artifact)
    assert (found.packing, found.embedding) == ("1.6", "int8")
    assert found.bytes_packed == report.bytes - report.metadata_bytes
    assert found.bytes_packed == sum(part.bytes for part in found.parts) < of_run.bytes_packed
    assert found.ternary_parameters == of_run.ternary_parameters
    assert found.int8_parameters == 512 * 32
    # Each row of the embedding brings a scale in the place of its floats.
    assert found.float_parameters == of_run.float_parameters - 512 * 32 + 512
    assert found.ternary_shares == of_run.ternary_shares
    layers = len(read_header(artifact).matrices) - 1
    expected = 8 * (report.ternary_bytes + 4 * layers) / report.ternary_weights
    assert found.bits_per_ternary_weight == expected
    assert found.bits_per_weight == 8 * found.bytes_packed / found.parameters
    assert found.dtypes == {
        "ternary (1.6 bits)": found.ternary_parameters,
        "int8": 512 * 32,
        "float32": found.float_parameters,
    }
    by_name = {part.name: part for part in found.parts}
    embedding = by_name["embedding (shared with the lm head)"]
    assert (embedding.int8_parameters, embedding.float_parameters) == (512 * 32, 512)
    assert embedding.bytes == 512 * 32 + 4 * 512


def test_full_precision_is_said(make_run: MakeRun) -> None:
    description = describe(make_run(quantization="none"))
    assert description.quantization == "none"
    assert description.ternary_parameters == 0
    assert description.ternary_shares is None
    assert description.bits_per_ternary_weight is None
    assert description.bits_per_weight == 32


def test_a_backbone_of_torchvision_has_no_layers_of_ours(make_run: MakeRun) -> None:
    description = describe(make_run(image_encoder="mobilenet_v3_small", image_size=64))
    assert description.encoder_layers is None
    assert description.image_encoder == "mobilenet_v3_small"
    assert "int64" in description.dtypes  # batch norm counts its batches


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        describe(tmp_path / "nowhere")
    with pytest.raises(ModelFileError):
        describe(tmp_path)

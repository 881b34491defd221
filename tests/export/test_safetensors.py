"""The artifact: what is in it, that it loads as the same numbers, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitgen.errors import DiskFullError, InputError, ModelFileError, OutputExistsError
from bitgen.export import artifact as artifact_module
from bitgen.export.artifact import read_header
from bitgen.export.loaded import load_run
from bitgen.export.safetensors import export_safetensors, load_artifact
from bitgen.inference.inspect import describe
from bitgen.inference.predictor import BitGen
from bitgen.kernels.packing import unpack_ternary
from bitgen.kernels.quantize import quantize_weight
from bitgen.kernels.tiles import tile_shape
from bitgen.model.ternary import TernaryLinear

MakeRun = Callable[..., Path]
EXPERTS = {"num_experts": 4, "experts_per_token": 2}


@pytest.fixture
def artifact(make_run: MakeRun, tmp_path: Path) -> Path:
    output = tmp_path / "model.safetensors"
    export_safetensors(make_run(), output)
    return output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, *, drop: str = "", **metadata: str) -> None:
    """Write the same tensors under changed metadata."""
    values = {**metadata_of(path), **metadata}
    values.pop(drop, None)
    save_file(load_file(path), path, metadata=values)


# What is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_tensors_are_the_trained_ones_quantized(
    make_run: MakeRun, tmp_path: Path, experts: dict[str, int]
) -> None:
    run_dir = make_run(**experts)
    output = tmp_path / "model.safetensors"
    report = export_safetensors(run_dir, output)
    tensors = load_file(output)
    trained = load_run(run_dir, packed=False).model
    ternary_weights = 0
    for name, layer in trained.named_modules():
        if isinstance(layer, TernaryLinear):
            ternary_NK, scale = quantize_weight(layer.weight.detach())
            packed = tensors.pop(f"{name}.packed")
            assert packed.dtype == torch.uint8
            assert torch.equal(unpack_ternary(packed, *ternary_NK.shape), ternary_NK)
            assert torch.equal(tensors.pop(f"{name}.scale"), scale)
            ternary_weights += ternary_NK.numel()
    state = trained.state_dict()
    for name, tensor in tensors.items():  # all the rest is as it was
        assert torch.equal(tensor, state[name])
        assert tensor.dtype == torch.float32
    assert report.ternary_weights == ternary_weights > 0


def test_the_report_adds_up(make_run: MakeRun, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    report = export_safetensors(make_run(), output)
    assert report.bytes == output.stat().st_size
    assert report.bytes == report.ternary_bytes + report.float_bytes + report.metadata_bytes
    assert report.metadata_bytes == read_header(output).header_bytes
    sizes = read_header(output).matrices.values()
    assert report.ternary_weights == sum(n * k for n, k in sizes)
    assert report.ternary_bytes == sum(math.prod(tile_shape(n, k)) for n, k in sizes)
    assert report.float_bytes == 4 * report.float_weights
    assert (report.quantization, report.packing, report.embedding) == ("ternary", "2", "float32")
    assert (report.int8_weights, report.int8_bytes) == (0, 0)


def test_widths_of_whole_tiles_take_two_bits_a_weight_or_eight_fifths(
    make_run: MakeRun, tmp_path: Path
) -> None:
    widths = {"hidden_size": 256, "head_dim": 64, "num_heads": 4, "intermediate_size": 512}
    encoder = {"encoder_hidden_size": 256, "encoder_intermediate_size": 512}
    run_dir = make_run(**widths, **encoder)
    two = export_safetensors(run_dir, tmp_path / "2.safetensors")
    fewer = export_safetensors(run_dir, tmp_path / "1.6.safetensors", packing="1.6")
    assert two.ternary_bytes == two.ternary_weights // 4
    matrices = read_header(tmp_path / "1.6.safetensors").matrices.values()
    assert fewer.ternary_bytes == sum(4 * -(-(n * k // 4) // 5) for n, k in matrices)
    assert fewer.ternary_bytes == pytest.approx(fewer.ternary_weights / 5, rel=1e-3)
    assert fewer.packing == "1.6" and fewer.ternary_weights == two.ternary_weights
    assert fewer.float_bytes == two.float_bytes


def test_the_file_is_a_fraction_of_the_checkpoint_at_a_real_size(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run_dir = make_run(hidden_size=256, head_dim=64, num_layers=4, intermediate_size=512)
    report = export_safetensors(run_dir, tmp_path / "model.safetensors")
    checkpoint = (run_dir / "checkpoints/last/model.safetensors").stat().st_size
    assert 4 * report.ternary_weights + report.float_bytes == pytest.approx(checkpoint, rel=0.01)
    assert report.ternary_bytes + report.float_bytes < checkpoint / 4


def test_metadata_is_documented_strings_without_private_folders(artifact: Path) -> None:
    metadata = metadata_of(artifact)
    texts = {"config", "tokenizer", "robots", "info", "matrices"}
    assert set(metadata) == {"format", "format_version", *texts}
    assert (metadata["format"], metadata["format_version"]) == ("bitgen", "2")
    assert json.loads(metadata["config"])["hidden_size"] == 32
    assert json.loads(metadata["robots"])[0]["name"]
    info = json.loads(metadata["info"])
    assert (info["run"], info["step"], info["best_validation_loss"]) == ("run", 5, 2.25)
    assert str(artifact.parent).encode() not in artifact.read_bytes()


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_model_in_the_file_computes_the_same_numbers(
    make_run: MakeRun, tmp_path: Path, experts: dict[str, int]
) -> None:
    for quantization in ("ternary", "none"):
        run_dir = make_run(f"run-{quantization}", quantization=quantization, **experts)
        output = tmp_path / f"{quantization}.safetensors"
        report = export_safetensors(run_dir, output)
        assert (report.ternary_weights > 0) == (quantization == "ternary")
        assert report.quantization == quantization
        loaded, trained = load_artifact(output), load_run(run_dir, packed=False)
        ids_BL = torch.tensor([[1, 70, 80], [1, 90, 100]])
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            got = loaded.model(ids_BL, images).logits
            expected = trained.model(ids_BL, images).logits
        assert torch.equal(got, expected)
        assert loaded.tokenizer.to_json() == trained.tokenizer.to_json()
        assert loaded.catalog == trained.catalog
        assert loaded.model.config == trained.model.config
        info = dict(loaded.info)
        assert info.pop("bitgen_version")
        assert info == trained.info


@pytest.mark.parametrize("quantization", ["ternary", "none"])
def test_future_heads_are_kept_or_left_out_with_the_same_answers(
    make_run: MakeRun, tmp_path: Path, quantization: str
) -> None:
    run_dir = make_run(predict_tokens=3, quantization=quantization)
    kept, dropped = tmp_path / "kept.safetensors", tmp_path / "dropped.safetensors"
    with_heads = export_safetensors(run_dir, kept)
    without = export_safetensors(run_dir, dropped, drop_future_heads=True)
    assert without.bytes < with_heads.bytes == kept.stat().st_size
    heads = {name for name in load_file(kept) if name.startswith("future_heads.")}
    assert heads and set(load_file(dropped)) == set(load_file(kept)) - heads
    assert without.ternary_weights < with_heads.ternary_weights or quantization == "none"
    assert read_header(kept).config.predict_tokens == 3
    assert read_header(dropped).config.predict_tokens == 1
    pictures = [Image.effect_noise((40, 40), 80).convert("RGB") for _ in range(2)]
    said = []
    for path in (run_dir, kept, dropped):
        model = BitGen.load(path, device="cpu", backend="torch")
        captions = model.caption(pictures, max_tokens=8)
        assert all((caption.speculation is None) == (path == dropped) for caption in captions)
        said.append([caption.token_ids for caption in captions])
    assert said[0] == said[1] == said[2]
    # There is nothing to leave out of a model without them.
    plain = export_safetensors(make_run("plain"), tmp_path / "a.safetensors")
    same = export_safetensors(tmp_path / "plain", tmp_path / "b.safetensors", False, True)
    assert plain == same


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"predict_tokens": 3}], ids=str)
def test_every_way_to_pack_keeps_its_answers(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, int]
) -> None:
    """1.6 bits change nothing; an int8 embedding is that of `quantize_embedding`."""
    run_dir = make_run(**changes)
    ids_BL = torch.tensor([[1, 70, 80], [1, 90, 100]])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for embedding in ("float32", "int8"):
        expected = load_run(run_dir).model
        if embedding == "int8":
            expected.text_decoder.quantize_embedding()
        logits = []
        for packing in ("2", "1.6"):
            output = tmp_path / f"{packing}-{embedding}.safetensors"
            report = export_safetensors(run_dir, output, packing=packing, embedding=embedding)
            assert (
                report.bytes
                == output.stat().st_size
                == sum(
                    (
                        report.ternary_bytes,
                        report.int8_bytes,
                        report.float_bytes,
                        report.metadata_bytes,
                    )
                )
            )
            assert (report.packing, report.embedding) == (packing, embedding)
            assert (
                report.int8_bytes == report.int8_weights == (512 * 32 if embedding == "int8" else 0)
            )
            header = read_header(output)
            assert (header.packing, header.embedding) == (packing, embedding)
            model = load_artifact(output).model
            with torch.inference_mode():
                logits.append(model(ids_BL, images).logits)
        with torch.inference_mode():
            assert torch.equal(logits[0], expected(ids_BL, images).logits)
        assert torch.equal(logits[0], logits[1])


def test_an_int8_embedding_answers_in_all_ways(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, output = make_run(predict_tokens=3), tmp_path / "model.safetensors"
    export_safetensors(run_dir, output, embedding="int8", packing="1.6")
    model = BitGen.load(output, device="cpu")
    pictures = [Image.effect_noise((40, 40), 80).convert("RGB") for _ in range(3)]
    fast = model.caption(pictures, max_tokens=8, speculative=True)
    plain = model.caption(pictures, max_tokens=8, speculative=False)
    assert [caption.token_ids for caption in fast] == [caption.token_ids for caption in plain]
    assert all(caption.speculation is not None for caption in fast)
    assert len(model.caption(pictures, max_tokens=8, beam_size=3)) == 3
    assert len(model.caption(pictures, max_tokens=8, attention_window=4)) == 3
    ranked = model.select_robots("Inspect the roof for damage.", pictures[0])
    assert {choice.name for choice in ranked} == {robot.name for robot in model.catalog}


@pytest.mark.parametrize(
    "changes", [{}, {"stem_residual_convolutions": 1}, {"patch_size": 8}], ids=str
)
def test_int8_convolutions_are_rounded_and_nothing_else(
    make_run: MakeRun, tmp_path: Path, changes: dict[str, int]
) -> None:
    run_dir, output = make_run(**changes), tmp_path / "model.safetensors"
    plain = export_safetensors(run_dir, tmp_path / "plain.safetensors")
    report = export_safetensors(run_dir, output, convolutions="int8")
    header = read_header(output)
    assert (plain.convolutions, report.convolutions) == ("float32", "int8")
    assert (read_header(tmp_path / "plain.safetensors").version, header.version) == (2, 3)
    assert report.bytes == output.stat().st_size < plain.bytes
    expected, found = load_run(run_dir).model.state_dict(), load_artifact(output).model.state_dict()
    names = {name for name in expected if ".convolutions." in name}
    assert set(header.int8_convolutions) == names
    assert report.int8_weights == report.int8_bytes == sum(expected[n].numel() for n in names)
    for name, weight in expected.items():
        if name not in names:
            assert torch.equal(found[name], weight)
            continue
        step_O = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
        assert ((found[name] - weight).abs() <= step_O * 0.5001).all()
        assert not torch.equal(found[name], weight)
        stored = load_file(output)[f"{name}.int8_rows"]
        assert torch.equal(found[name], stored.float() * step_O)
    described, of_plain = describe(output), describe(run_dir)
    assert (described.convolutions, of_plain.convolutions) == ("int8", "float32")
    assert described.int8_parameters == described.dtypes["int8"] == report.int8_weights
    assert described.parameters == of_plain.parameters
    assert described.bytes_packed == report.bytes - report.metadata_bytes


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        (".int8_rows", torch.zeros(32, 3, 3, 3), r"expected int8 \[O, I, H, W\]"),
        (".int8_rows", torch.zeros(32, 27, dtype=torch.int8), r"expected int8 \[O, I, H, W\]"),
        (".row_scales", torch.zeros(31), r"expected float32 \[32\]"),
        (".row_scales", None, "does not fit"),
        ("", torch.zeros(32, 3, 3, 3), "does not fit"),
    ],
)
def test_int8_convolutions_that_do_not_fit(
    make_run: MakeRun, tmp_path: Path, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors(make_run(), path, convolutions="int8")
    tensors, metadata = load_file(path), metadata_of(path)
    name = f"image_encoder.stem.convolutions.0.weight{suffix}"
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path, metadata)
    with pytest.raises(ModelFileError, match=message):
        load_artifact(path)


def test_ways_to_pack_that_there_are_not(make_run: MakeRun, tmp_path: Path) -> None:
    output = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="no packing '3'") as caught:
        export_safetensors(make_run(), output, packing="3")
    assert "2, 1.6" in str(caught.value.remedy)
    with pytest.raises(InputError, match="no embedding 'int4'"):
        export_safetensors(tmp_path / "run", output, embedding="int4")
    with pytest.raises(InputError, match="no convolutions 'int4'"):
        export_safetensors(tmp_path / "run", output, convolutions="int4")
    full = make_run("full", quantization="none")
    with pytest.raises(InputError, match="nothing to pack at 1.6 bits"):
        export_safetensors(full, output, packing="1.6")
    assert not output.exists()
    report = export_safetensors(full, output, embedding="int8")
    assert (report.packing, report.embedding, report.ternary_bytes) == (None, "int8", 0)
    assert read_header(output).packing is None


def test_an_output_is_replaced_only_when_asked(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, output = make_run(), tmp_path / "model.safetensors"
    output.write_text("precious")
    with pytest.raises(OutputExistsError, match=output.name) as caught:
        export_safetensors(run_dir, output)
    assert "--overwrite" in str(caught.value.remedy)
    assert output.read_text() == "precious"
    export_safetensors(run_dir, output, overwrite=True)
    assert load_artifact(output).model.config.hidden_size == 32


def test_outputs_that_cannot_be(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    with pytest.raises(InputError, match="is a folder"):
        export_safetensors(run_dir, tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_safetensors(run_dir, tmp_path / "file" / "model.safetensors")
    nested = tmp_path / "new" / "folder" / "model.safetensors"
    export_safetensors(run_dir, nested)
    assert nested.is_file()


def test_sources_that_are_no_run(make_run: MakeRun, tmp_path: Path, artifact: Path) -> None:
    output = tmp_path / "out.safetensors"
    for source in (tmp_path / "nowhere", tmp_path, artifact):
        with pytest.raises(ModelFileError):
            export_safetensors(source, output)
    damaged = make_run("damaged")
    weights = damaged / "checkpoints" / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match="truncated"):
        export_safetensors(damaged, output)
    assert not output.exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    run_dir = make_run()
    folder = tmp_path / "full"
    folder.mkdir()
    output = folder / "model.safetensors"
    if existed:
        output.write_text("precious")

    def full(file: BinaryIO, *_: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitgen.export.safetensors.write_artifact", full)
    with pytest.raises(DiskFullError, match=str(output)):
        export_safetensors(run_dir, output, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ([output.name] if existed else [])
    if existed:
        assert output.read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_a_file_that_cannot_grow_leaves_nothing_behind(make_run: MakeRun, tmp_path: Path) -> None:
    import resource
    import signal

    run_dir = make_run()
    folder = tmp_path / "small"
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(InputError, match="cannot be written to .*model.safetensors"):
            export_safetensors(run_dir, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(folder.iterdir()) == []


# What is refused --------------------------------------------------------------------------------


def test_every_truncation_is_noticed(artifact: Path) -> None:
    whole = artifact.read_bytes()
    header_bytes = read_header(artifact).header_bytes
    for size in (0, 1, 7, 8, 9, 100, header_bytes - 1, header_bytes, len(whole) - 1):
        artifact.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match="truncated|empty|bytes long|safetensors"):
            load_artifact(artifact)
    artifact.write_bytes(whole + b"more")
    with pytest.raises(ModelFileError):
        load_artifact(artifact)
    artifact.write_bytes(whole)
    load_artifact(artifact)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    Image.new("RGB", (8, 8)).save(path, format="JPEG")
    with pytest.raises(ModelFileError, match="JPEG"):
        load_artifact(path)
    Image.new("RGB", (8, 8)).save(path, format="PNG")
    with pytest.raises(ModelFileError, match="PNG"):
        load_artifact(path)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(ModelFileError, match="pickle"):
        load_artifact(path)
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFileError, match="pickle"):
        load_artifact(path)
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelFileError, match="GGUF"):
        load_artifact(path)
    path.write_text("just some words, and enough of them")
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load_artifact(path)
    path.write_bytes(bytes(100))
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load_artifact(path)
    with pytest.raises(ModelFileError, match="no model at"):
        load_artifact(tmp_path / "missing")


def test_safetensors_of_something_else(tmp_path: Path, make_run: MakeRun) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ModelFileError, match="not one that BitGen exported"):
        load_artifact(path)
    save_file({"a": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match="not one that BitGen exported"):
        load_artifact(path)
    with pytest.raises(ModelFileError, match="not one that BitGen exported"):
        load_artifact(make_run() / "checkpoints" / "last" / "model.safetensors")


def test_newer_and_senseless_versions(artifact: Path) -> None:
    rewrite(artifact, format_version="4")
    with pytest.raises(
        ModelFileError, match="format version 4; this BitGen reads up to 3"
    ) as caught:
        load_artifact(artifact)
    assert "Upgrade" in str(caught.value.remedy)
    for version in ("", "one", "-1", "0", "1.5"):
        rewrite(artifact, format_version=version)
        with pytest.raises(ModelFileError, match="no format version"):
            load_artifact(artifact)


@pytest.mark.parametrize("name", ["config", "tokenizer", "robots", "info", "matrices"])
def test_metadata_that_is_missing_or_senseless(artifact: Path, name: str) -> None:
    whole = artifact.read_bytes()
    rewrite(artifact, drop=name)
    with pytest.raises(ModelFileError, match=name):
        load_artifact(artifact)
    for text in ("", "[1", '"text"', '{"surprise": 1}'):
        if name == "info" and text.startswith("{"):
            continue  # an open record: any object will do
        artifact.write_bytes(whole)
        rewrite(artifact, **{name: text})
        with pytest.raises(ModelFileError, match=artifact.name):
            load_artifact(artifact)


def test_tensors_that_do_not_fit_the_config(artifact: Path) -> None:
    whole = artifact.read_bytes()
    metadata = metadata_of(artifact)
    name = "text_decoder.layers.0.mlp.up_proj.packed"
    for change, words in (
        (None, "weights of text_decoder.layers.0.mlp.up_proj are missing"),
        (torch.zeros(2, 3, 128, dtype=torch.uint8), r"\[2, 3, 128\], expected uint8 \[2, 2, 128\]"),
        (torch.zeros(2, 2, 128, dtype=torch.int8), r"int8 \[2, 2, 128\], expected uint8"),
    ):
        artifact.write_bytes(whole)
        tensors = load_file(artifact)
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change
        save_file(tensors, artifact, metadata=metadata)
        with pytest.raises(ModelFileError, match=words):
            load_artifact(artifact)
    for change, words in (
        ({"stray": torch.ones(1)}, "stray is unknown"),
        ({"stray.packed": torch.zeros(2, 2, 128, dtype=torch.uint8)}, "do not fit stray.packed"),
        ({"text_decoder.norm.weight": torch.ones(31)}, r"float32 \[31\], expected float32 \[32\]"),
        ({name.replace("packed", "scale"): torch.ones(2)}, r"\[2\], expected float32 \[\]"),
    ):
        artifact.write_bytes(whole)
        save_file({**load_file(artifact), **change}, artifact, metadata=metadata)
        with pytest.raises(ModelFileError, match=words):
            load_artifact(artifact)
    artifact.write_bytes(whole)
    tensors = load_file(artifact)
    del tensors["text_decoder.norm.weight"]
    save_file(tensors, artifact, metadata=metadata)
    with pytest.raises(ModelFileError, match="text_decoder.norm.weight is missing"):
        load_artifact(artifact)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_give_a_clear_error(tmp_path: Path, content: bytes, framed: bool) -> None:
    path = tmp_path / "anything"
    path.write_bytes(struct.pack("<Q", len(content)) + content if framed else content)
    with pytest.raises(ModelFileError):
        load_artifact(path)


def test_nothing_is_unpickled(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert load_artifact(artifact).info["run"] == "run"
    assert "torch.load" not in Path(artifact_module.__file__).read_text()

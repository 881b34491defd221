"""Image encoders of others, from training to the exported file, as a person uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = (
    "--model_size", "nano", "--batch_size", "4", "--precision", "fp32", "--device", "cpu",
    "--warmup_steps", "1", "--captions", "all",
)  # fmt: skip


def answers(run: Any, picture: Path, model: Path) -> dict[str, Any]:
    finished = run("infer", picture, "--model", model, "--json", "--max_tokens", "6")
    assert finished.code == 0, finished.stderr
    found = json.loads(finished.stdout)
    return {name: found[name] for name in ("caption", "tokens", "log_probability")}


def export_and_compare(run: Any, scenes: Path, run_dir: Path) -> None:
    picture = next((scenes / "val2017").iterdir())
    file = run_dir.parent / "model.safetensors"
    finished = run("export", "--model", run_dir, "--output", file)
    assert finished.code == 0, finished.stderr
    of_run, of_file = answers(run, picture, run_dir), answers(run, picture, file)
    assert of_file["tokens"] == of_run["tokens"]
    assert of_file["log_probability"] == pytest.approx(of_run["log_probability"], abs=1e-4)


@pytest.mark.slow
def test_a_frozen_backbone_of_torchvision(run, scenes: Path, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    net = models.resnet18(weights=None)
    weights, run_dir, cache = tmp_path / "resnet18.pth", tmp_path / "run", tmp_path / "cache"
    torch.save(net.state_dict(), weights)
    encoder = (
        "--image_encoder", "resnet18", "--encoder_weights", weights, "--freeze_encoder",
        "--image_size", "64", "--cache_dir", cache,
    )  # fmt: skip
    data = ("--coco_data", scenes, "--output_dir", run_dir)
    finished = run("train", *data, *SMALL, *encoder, "--dry_run")
    assert finished.code == 0, finished.stderr
    assert "features on disk" in finished.stdout and "computing them, once" in finished.stdout
    assert not cache.exists()
    finished = run("train", *data, *SMALL, *encoder, "--max_steps", "2")
    assert finished.code == 0, finished.stderr
    assert "Pictures are not varied" in finished.stderr
    (features,) = cache.iterdir()
    assert features.name.startswith("features-v1-resnet18-64px-")
    weights.unlink()
    shutil.rmtree(cache)
    finished = run("train", "--resume", *data[2:], "--max_steps", "3", "--cache_dir", cache)
    assert finished.code == 0, finished.stderr
    assert (cache / features.name).is_dir()  # of the weights that the run keeps
    export_and_compare(run, scenes, run_dir)


def test_a_fine_tuned_backbone_has_a_rate_of_its_own(run, scenes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", run_dir, *SMALL, "--max_steps", "2"),
        *("--image_encoder", "mobilenet_v3_small", "--image_size", "64"),
        *("--encoder_learning_rate", "0.0001", "--cache_dir", tmp_path / "cache"),
    )
    assert finished.code == 0, finished.stderr
    recorded = json.loads((run_dir / "config.json").read_text())
    assert recorded["training"]["encoder_learning_rate"] == 0.0001
    export_and_compare(run, scenes, run_dir)


@pytest.mark.slow
def test_a_tower_of_transformers_without_its_folder(run, scenes: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, run_dir = tmp_path / "tower", tmp_path / "run"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    options = ("--cache_dir", tmp_path / "cache")
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", run_dir, *SMALL, *options),
        *("--image_encoder", f"hf:{folder}", "--freeze_encoder", "--image_size", "70"),
        *("--max_steps", "2", "--cached_views", "2"),
    )
    assert finished.code == 0, finished.stderr
    assert "were trained on pictures of 56 px" in finished.stderr
    recorded = json.loads((run_dir / "config.json").read_text())["model"]
    assert recorded["image_encoder"] == "hf:tower"
    assert recorded["image_std"] == [0.25, 0.25, 0.25]
    finished = run(
        *("train", "--resume", "--output_dir", run_dir, "--max_steps", "3", *options),
        *("--image_encoder", f"hf:{folder}"),
    )
    assert finished.code == 0, finished.stderr
    shutil.rmtree(folder)
    finished = run("train", "--resume", "--output_dir", run_dir, "--max_steps", "4", *options)
    assert finished.code == 0, finished.stderr
    export_and_compare(run, scenes, run_dir)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image_encoder", "hf:nowhere"], "nowhere"),
        (["--image_encoder", "maxvit_t", "--image_size", "160"], "--image_size 224"),
        (["--image_encoder", "resnet18", "--encoder_weights", "IMAGENET9"], "IMAGENET1K_V1"),
        (["--freeze_encoder", "--encoder_learning_rate", "1e-4"], "--encoder_learning_rate"),
        (["--encoder_learning_rate", "0"], "encoder_learning_rate"),
        (["--cached_views", "3", "--no_augment"], "augment is off"),
    ],
)
def test_encoders_that_cannot_be(
    run, scenes: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    finished = run(
        *("train", "--coco_data", scenes, "--output_dir", tmp_path / "run", *SMALL, *arguments),
        *("--cache_dir", tmp_path / "cache"),
    )
    assert finished.code == 2, finished.stderr
    assert words in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()

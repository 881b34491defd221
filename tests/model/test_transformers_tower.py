"""Vision towers of transformers, held to the last hidden state that transformers gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, ModelFileError
from bitgen.model.encoders import (
    encoder_name,
    load_encoder_weights,
    make_image_encoder,
    open_encoder,
)

PATCHES = 9
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 48, "patch_size": 16,
}  # fmt: skip
# Architecture: its config's class, what else it is given, tokens that are no patch.
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dinov2": ("Dinov2Config", {}, 1),
    "dinov2 with registers": ("Dinov2WithRegistersConfig", {"num_register_tokens": 4}, 5),
    "siglip": ("SiglipVisionConfig", {}, 0),
    "clip": ("CLIPVisionConfig", {}, 1),
    "vit": ("ViTConfig", {}, 1),
    "deit": ("DeiTConfig", {}, 2),
}
SaveTower = Callable[..., tuple[Path, Any]]


def config_for(name: str, size: int = 48, **changes: Any) -> BitGenConfig:
    return BitGenConfig(image_encoder=name, image_size=size, freeze_encoder=True, **changes)


def grid_of(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features, weights = encoder.eval()(images)
    assert weights == ()
    return features


@pytest.fixture
def save_tower(tmp_path: Path) -> SaveTower:
    """Saves a tiny model as others save theirs; returns its folder, and the model."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def save(kind: str, processor: dict[str, Any] | None = None, **more: Any) -> tuple[Path, Any]:
        class_name, options, _ = TOWERS.get(kind, (kind, {}, 0))
        sizes = SMALL if kind in TOWERS else {}
        torch.manual_seed(3)
        config = getattr(transformers, class_name)(**{**sizes, **options, **more})
        model = transformers.AutoModel.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / kind
        model.save_pretrained(folder)
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder, model

    return save


def open_tower(folder: Path, size: int = 48) -> tuple[Any, BitGenConfig]:
    opened = open_encoder(config_for(f"hf:{folder}", size))
    encoder = make_image_encoder(opened.config)
    assert opened.weights is not None
    load_encoder_weights(encoder, opened.config.image_encoder, opened.weights)
    return encoder, opened.config


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_gives_its_own_last_hidden_state_without_special_tokens(
    kind: str, save_tower: SaveTower
) -> None:
    folder, outside = save_tower(kind)
    encoder, config = open_tower(folder)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = outside(pixel_values=images).last_hidden_state
    special = TOWERS[kind][2]
    assert (encoder.num_tokens, encoder.output_width) == (PATCHES, 32)
    assert expected.shape[1] == PATCHES + special
    torch.testing.assert_close(grid_of(encoder, images), expected[:, special:])
    assert config.image_encoder == f"hf:{kind}"
    assert str(folder.parent) not in config.to_json()
    assert not any("pooler" in name or "head" in name for name in encoder.state_dict())


@pytest.mark.parametrize("kind", ["dinov2", "siglip", "clip", "vit"])
def test_a_tower_takes_pictures_of_another_size(kind: str, save_tower: SaveTower) -> None:
    folder, outside = save_tower(kind)
    encoder, _ = open_tower(folder, 64)
    images = torch.randn(2, 3, 64, 64)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = outside(pixel_values=images, **options).last_hidden_state
    assert encoder.num_tokens == 16
    torch.testing.assert_close(grid_of(encoder, images), expected[:, TOWERS[kind][2] :])


@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("SwinConfig", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
        ("ConvNextConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
    ],
)
def test_a_tower_without_special_tokens(
    class_name: str, options: dict[str, Any], save_tower: SaveTower
) -> None:
    folder, outside = save_tower(class_name, image_size=64, **options)
    encoder, _ = open_tower(folder, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = outside(pixel_values=images).last_hidden_state
    if expected.dim() == 4:
        expected = expected.flatten(2).transpose(1, 2)
    assert encoder.num_tokens == expected.shape[1]
    torch.testing.assert_close(grid_of(encoder, images), expected)


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_of_a_model_of_pictures_and_texts_the_part_that_sees(
    kind: str, save_tower: SaveTower
) -> None:
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    folder, outside = save_tower(f"{kind}Config", text_config=text, vision_config=SMALL)
    encoder, _ = open_tower(folder)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = outside.vision_model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(grid_of(encoder, images), expected[:, -PATCHES:])


def test_normalisation_and_size_are_those_of_the_folder(save_tower: SaveTower) -> None:
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": True}
    folder, _ = save_tower("siglip", processor)
    opened = open_encoder(config_for(f"hf:{folder}"))
    assert opened.config.image_mean == (0.5, 0.4, 0.3)
    assert opened.config.image_std == (0.2, 0.2, 0.1)
    assert opened.image_size == 48
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    opened = open_encoder(config_for(f"hf:{folder}"))
    assert (opened.config.image_mean, opened.config.image_std) == ((0, 0, 0), (1, 1, 1))
    (folder / "preprocessor_config.json").unlink()
    nested = {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.9] * 3}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert open_encoder(config_for(f"hf:{folder}")).config.image_std == (0.9,) * 3
    (folder / "processor_config.json").unlink()
    assert open_encoder(config_for(f"hf:{folder}")).config.image_mean == BitGenConfig().image_mean


def test_a_tower_of_half_precision_computes_in_float32(save_tower: SaveTower) -> None:
    folder, outside = save_tower("vit")
    outside.to(torch.bfloat16).save_pretrained(folder)
    encoder, _ = open_tower(folder)
    assert {tensor.dtype for tensor in encoder.parameters()} == {torch.float32}
    weight = outside.embeddings.patch_embeddings.projection.weight
    assert torch.equal(encoder.tower.embeddings.patch_embeddings.projection.weight, weight.float())


def test_folders_that_hold_no_tower(save_tower: SaveTower, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no folder"):
        open_encoder(config_for("hf:facebook/dinov2-small"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelFileError, match="no vision tower"):
        open_encoder(config_for(f"hf:{empty}"))
    (empty / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(ModelFileError, match="no vision tower"):
        open_encoder(config_for(f"hf:{empty}"))
    (empty / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="takes no pictures"):
        open_encoder(config_for(f"hf:{empty}"))
    code = {"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (empty / "config.json").write_text(json.dumps(code))
    (empty / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(ModelFileError, match="no vision tower"):
        open_encoder(config_for(f"hf:{empty}"))
    folder, _ = save_tower("dinov2")
    with pytest.raises(ConfigError, match="--encoder_weights"):
        open_encoder(config_for(f"hf:{folder}"), "weights.pth")
    with pytest.raises(ConfigError, match="multiple of the 16 px") as caught:
        open_tower(folder, 60)
    assert "--image_size 64" in str(caught.value.remedy)


def test_weights_that_lack_something_or_are_a_pickle(save_tower: SaveTower) -> None:
    folder, _ = save_tower("dinov2")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file(
        {k: v for k, v in state.items() if k != "layernorm.weight"}, weights, {"format": "pt"}
    )
    with pytest.raises(ModelFileError, match=r"lacks 1 of .*layernorm\.weight"):
        open_tower(folder)
    weights.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        open_tower(folder)


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="need transformers") as caught:
        open_encoder(config_for(f"hf:{tmp_path}"))
    assert "bitgen[hf]" in str(caught.value.remedy)
    with pytest.raises(ConfigError, match="need transformers"):
        make_image_encoder(config_for("hf:tower", encoder_config='{"model_type": "vit"}'))


def test_a_name_keeps_the_last_part_of_the_folder(tmp_path: Path) -> None:
    assert encoder_name("resnet18") == "resnet18"
    assert encoder_name(f"hf:{tmp_path / 'dinov2'}/") == "hf:dinov2" == encoder_name("hf:dinov2")

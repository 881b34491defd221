"""From files to a model that answers: what export, inference and `bitgen info` share.

    run folder -> config, tensors -> model (float weights) -> packed model
    artifact   -> config, tensors -------------------------> packed model

Models are built without storage and then given their tensors: no weight is initialised only to be
overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.dataset.robots import Robot
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ModelFileError
from bitgen.export.artifact import read_catalog, read_tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import without_storage
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear, TernaryLinear, pack_ternary_layers
from bitgen.training.checkpoint import RunFiles, open_run, read_tensors


class LoadedModel(NamedTuple):
    """A model on the CPU in evaluation mode, with what it needs to answer."""

    model: BitGenModel
    tokenizer: Tokenizer
    catalog: list[Robot]
    info: dict[str, Any]
    """Where it comes from: run, step, losses, data, training options (JSON values)."""


def load_run(path: Path | str, packed: bool = True) -> LoadedModel:
    """Load a run by its folder (its best checkpoint, else its last) or by a checkpoint's folder.

    Args:
        path: the folder.
        packed: convert ternary layers to their run-time form; False keeps the layers of training.

    Raises:
        ModelFileError: missing, damaged, without a checkpoint yet, or of a newer format.
    """
    run = open_run(path)
    tensors = read_tensors(run.model_path)
    model = empty_model(run.config)
    # A file's tensors begin at any address, and kernels sum in another order where that is not the
    # usual alignment: only copies make a run and its artifact compute the same bits.
    assign_tensors(model, {name: t.clone() for name, t in tensors.items()}, run.model_path)
    if packed:
        pack_ternary_layers(model)
    tokenizer = read_tokenizer(run.tokenizer_json, run.config, run.run_dir)
    return LoadedModel(
        model.eval(), tokenizer, read_catalog(run.robots_json, run.run_dir), describe_run(run)
    )


def empty_model(
    config: BitGenConfig, packed: bool = False, embedding: str = "float32"
) -> BitGenModel:
    """The model of `config` for its shapes, or to assign tensors to: with `vit`, without storage.

    Args:
        config: the architecture.
        packed: whether ternary layers take packed weights.
        embedding: `float32`, or `int8` for an embedding and lm head in int8.
    """
    # Some encoders of others read their own weights while they are made.
    with without_storage() if config.image_encoder == "vit" else nullcontext():
        model = BitGenModel(config)
        if packed:
            _make_packed_layers(model)
        if embedding == "int8":
            model.text_decoder.embed_tokens = Int8Embedding(config.vocab_size, config.hidden_size)
    return model


def _make_packed_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, TernaryLinear):
            setattr(module, name, PackedTernaryLinear(child.in_features, child.out_features))
        else:
            _make_packed_layers(child)


def assign_tensors(
    model: BitGenModel, tensors: Mapping[str, torch.Tensor], source: Path | str
) -> None:
    """Make `tensors` the model's own.

    Raises:
        ModelFileError: a name is missing or unknown, or a shape or dtype is not the model's.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name in expected and _kind(tensor) != _kind(expected[name]):
            problems.append(f"{name} is {_kind(tensor)}, expected {_kind(expected[name])}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        remedy = "Config and weights come from different models, or the file was changed."
        if model.config.encoder_config and all("image_encoder." in text for text in problems):
            version = json.loads(model.config.encoder_config).get("transformers_version")
            remedy = (
                "This version of transformers has other names for this image encoder; the model"
                f" was trained with version {version}."
            )
        raise ModelFileError(
            f"{source}: the tensors do not fit the config ({'; '.join(problems[:3])}{more}).",
            remedy=remedy,
        )
    model.load_state_dict(dict(tensors), assign=True)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def describe_run(run: RunFiles) -> dict[str, Any]:
    """What is worth knowing about a trained model wherever it goes, as JSON values.

    Folders of the machine that trained it are left out: of a path only its last part stays.
    """
    progress = run.state.get("progress") or {}
    return {
        "run": run.run_dir.resolve().name,
        "step": run.step,
        "epoch": progress.get("epoch"),
        "tokens": progress.get("tokens"),
        "images": progress.get("images"),
        "training_seconds": progress.get("seconds"),
        "training_loss": progress.get("loss"),
        "best_validation_loss": progress.get("best_loss"),
        "robot_threshold": progress.get("robot_threshold"),
        "robot_temperature": progress.get("robot_temperature"),
        "robot_word_weight": progress.get("robot_word_weight"),
        "data": _without_folders(run.data),
        "training": _without_folders(run.training.to_dict()),
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value

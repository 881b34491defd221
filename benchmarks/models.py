"""Models that benchmarks measure: given ones, random ones, and their full-precision twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.robots import Robot, catalog_to_json, load_catalog
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.export.safetensors import export_safetensors, load_artifact
from bitgen.inference.predictor import BitGen
from bitgen.model.bitgen import BitGenModel
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear
from bitgen.training.checkpoint import create_run, save_checkpoint


def export_model(model: Path | None, model_size: str, directory: Path) -> Path:
    """The model as an exported file.

    Args:
        model: a run's folder or an exported file; None makes one of `model_size` with random
            weights, and words that it never learnt.
        model_size: a preset's name.
        directory: where files go that are made.
    """
    if model is not None and model.is_file():
        return model
    if model is None:
        model = directory / "random"
        write_random_run(model, model_size)
    artifact = directory / "ternary.safetensors"
    export_safetensors(model, artifact)
    return artifact


def export_twin(artifact: Path, directory: Path) -> Path:
    """A model of the same architecture in full precision, as an exported file.

    Its weights are the ternary ones with their scales, in float32: what it leaves out is the
    quantization of activations, so it says much the same.
    """
    loaded = load_artifact(artifact)
    if isinstance(loaded.model.text_decoder.embed_tokens, Int8Embedding):
        raise InputError(
            f"{artifact} holds its embedding in int8, which has no full-precision twin.",
            remedy="Export the run again without --embedding int8.",
        )
    config = dataclasses.replace(loaded.model.config, quantization="none", model_size="custom")
    state = {}
    for name, tensor in loaded.model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        module = loaded.model.get_submodule(layer)
        if not isinstance(module, PackedTernaryLinear):
            state[name] = tensor
        elif kind == "packed":
            state[f"{layer}.weight"] = module.ternary().float() * module.scale
    twin_run = directory / "full-precision"
    _write_run(twin_run, config, state, loaded.tokenizer, loaded.catalog)
    twin = directory / "full-precision.safetensors"
    export_safetensors(twin_run, twin)
    return twin


def convert(model: BitGen, dtype: torch.dtype) -> None:
    """Weights, activations and cache in a dtype; a picture is prepared in float32 as always."""
    net = model.model.to(dtype)
    net.image_encoder.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].to(dtype), *inputs[1:])
    )


def write_random_run(run_dir: Path, model_size: str, seed: int = 0) -> None:
    """A run with random weights, lively enough that pictures and words change what it says."""
    catalog = load_catalog()
    tokenizer = Tokenizer.train([robot.text() for robot in catalog], 400)
    config = BitGenConfig.preset(model_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BitGenModel(config)
        torch.nn.init.normal_(model.text_decoder.embed_tokens.weight, std=0.4)
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                torch.nn.init.ones_(parameter)
    _write_run(run_dir, config, model.state_dict(), tokenizer, catalog)


def _write_run(
    run_dir: Path,
    config: BitGenConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer: Tokenizer,
    catalog: Sequence[Robot],
) -> None:
    create_run(
        run_dir,
        config=config,
        training=TrainingConfig(),
        data={},
        tokenizer_json=tokenizer.to_json(),
        robots_json=catalog_to_json(catalog),
    )
    save_checkpoint(
        run_dir, 1, model=dict(state), training={}, state={"progress": {}}, is_best=True, keep=1
    )

"""The model that a training starts from: another run, an exported file, or the mean of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError
from bitgen.export.artifact import read_header
from bitgen.export.safetensors import load_artifact
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear
from bitgen.training.checkpoint import open_run, read_tensors

# What a training may change of a model without changing its weights.
FREE_OF_WEIGHTS = frozenset(("dropout", "freeze_encoder"))


@dataclass(frozen=True)
class InitialModel:
    """What a training takes over; the weights are read when they are asked for."""

    path: Path
    config: BitGenConfig
    tokenizer_json: str
    robots_json: str
    step: int | None
    """Updates after which the weights were saved; None in a file that does not say."""
    averaged_with: tuple[InitialModel, ...] = ()
    """Models of the same architecture, whose weights have the same part in the mean."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The float weights, by their names in a model that is trained: the mean over the models.

        The mean is of the float weights, before they are rounded to ternary ones (model soups,
        arXiv 2203.05482). Whole numbers are those of the first model.

        Raises:
            ModelFileError: missing, damaged, or a run without a checkpoint yet.
        """
        tensors = self._own_tensors()
        if not self.averaged_with:
            return tensors
        sums = {n: t.double() for n, t in tensors.items() if t.is_floating_point()}
        for other in self.averaged_with:
            others = other._own_tensors()
            for name in sums:
                sums[name] += others[name]
        number = 1 + len(self.averaged_with)
        means = {name: (total / number).to(tensors[name].dtype) for name, total in sums.items()}
        return {**tensors, **means}

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """The float weights of this model alone.

        Those of a run as they are. An exported file has ternary weights, from which the float
        weights are made that round to them: `T * s / (share of T that is not 0)`, so that the mean
        of the absolute values, which is the scale that training finds, is `s` again.
        """
        if not self.path.is_file():
            return read_tensors(open_run(self.path).model_path)
        model = load_artifact(self.path).model
        tensors = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, PackedTernaryLinear):
                del tensors[f"{name}.packed"], tensors[f"{name}.scale"]
                ternary_NK = module.ternary().float()
                share = ternary_NK.abs().mean().clamp(min=1 / ternary_NK.numel())
                tensors[f"{name}.weight"] = ternary_NK * (module.scale / share)
            elif isinstance(module, Int8Embedding):
                del tensors[f"{name}.tiles"], tensors[f"{name}.row_scales"]
                tensors[f"{name}.weight"] = module.quantized() * module.row_scales[:, None]
        return tensors


def open_initial_model(path: Path) -> InitialModel:
    """Read what a run (its best checkpoint), a checkpoint or an exported file is, not its weights.

    Raises:
        ModelFileError: missing, damaged, foreign, or of a newer format; or a run without a
            checkpoint yet.
    """
    if path.is_file():
        header = read_header(path)
        step = header.info.get("step")
        return InitialModel(
            path,
            header.config,
            header.tokenizer_json,
            header.robots_json,
            step if isinstance(step, int) else None,
        )
    run = open_run(path)
    return InitialModel(path, run.config, run.tokenizer_json, run.robots_json, run.step)


def open_initial_models(paths: Sequence[Path]) -> InitialModel:
    """Several models as one that has the mean of their weights; its path is the first one's.

    A model that is named twice counts twice.

    Raises:
        ConfigError: another architecture, tokenizer or robot catalog than the first one's.
        ModelFileError: as `open_initial_model`.
    """
    first, *others = [open_initial_model(path) for path in paths]
    for other in others:
        ours, theirs = first.config.to_dict(), other.config.to_dict()
        different = [
            f"{name} is {ours[name]} and {theirs[name]}"
            for name in ours
            if ours[name] != theirs[name] and name not in FREE_OF_WEIGHTS
        ]
        # A run and a file write the same JSON with other spaces.
        if json.loads(first.tokenizer_json) != json.loads(other.tokenizer_json):
            different.append("their tokenizers differ")
        if json.loads(first.robots_json) != json.loads(other.robots_json):
            different.append("their robot catalogs differ")
        if different:
            raise ConfigError(
                f"The weights of {first.path} and {other.path} have no mean:"
                f" {'; '.join(different)}.",
                remedy="Average models that were trained from the same weights, such as a run and"
                " the one that it started from.",
            )
    return replace(first, averaged_with=tuple(others))

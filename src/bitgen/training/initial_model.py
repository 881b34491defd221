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

        Those of a run as they are. An exported file has ternary weights, from which float weights
        are made that round to them (`likely_weights`).
        """
        if not self.path.is_file():
            return read_tensors(open_run(self.path).model_path)
        model = load_artifact(self.path).model
        tensors = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, PackedTernaryLinear):
                del tensors[f"{name}.packed"], tensors[f"{name}.scale"]
                tensors[f"{name}.weight"] = likely_weights(module.ternary(), module.scale)
            elif isinstance(module, Int8Embedding):
                del tensors[f"{name}.tiles"], tensors[f"{name}.row_scales"]
                tensors[f"{name}.weight"] = module.quantized() * module.row_scales[:, None]
        return tensors


def likely_weights(ternary_NK: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float weights that round to these ternary ones, spread as trained weights are.

    Their sizes are drawn from a normal distribution, cut where so many lie below as are 0 here, and
    fitted to the two numbers of BitNet b1.58 (arXiv 2402.17764, equations 1 to 3): the threshold is
    at half the scale, and the mean of the sizes is the scale. As in a run, some weights then lie
    close to the threshold, where a small step changes the ternary weight; if each lay in the middle
    of its third, none would change at the rates of a fine-tuning. The draw is the same every time,
    so that two trainings from one file have a mean.

    Args:
        ternary_NK: -1, 0 and 1, any dtype, of any shape.
        scale: one number, float32.

    Returns:
        float32, of the same shape.
    """
    is_zero, count = ternary_NK == 0, ternary_NK.numel()
    share = is_zero.double().mean()
    if share in (0, 1):  # no threshold to be seen: all of one size
        return ternary_NK.float() * scale
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(ternary_NK.shape, generator=generator, dtype=torch.float64)
    is_negative = torch.rand(ternary_NK.shape, generator=generator) < 0.5
    share_below = torch.where(is_zero, share * uniform, share + (1 - share) * uniform)
    normal_size = torch.special.ndtri(0.5 + 0.5 * share_below.clamp(max=1 - 1e-7))
    # In scales, and far enough from the threshold for the rounding of float32.
    size = 0.5 * normal_size / torch.special.ndtri(0.5 + 0.5 * share)
    size = torch.where(is_zero, size.clamp(max=0.499), size.clamp(min=0.501))
    beyond = (size - 0.5).masked_fill(is_zero, 0.0)
    missing = count - size[is_zero].sum() - 0.5 * (~is_zero).sum()
    size = torch.where(is_zero, size, 0.5 + beyond * (missing / beyond.sum()))
    sign = torch.where(is_zero, 1.0 - 2.0 * is_negative, ternary_NK.double())
    return (sign * size * scale.double()).float()


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

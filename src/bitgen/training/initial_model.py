"""The model that a training starts from: another run, or an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bitgen.config import BitGenConfig
from bitgen.export.artifact import read_header
from bitgen.export.safetensors import load_artifact
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear
from bitgen.training.checkpoint import open_run, read_tensors


@dataclass(frozen=True)
class InitialModel:
    """What a training takes over; the weights are read when they are asked for."""

    path: Path
    config: BitGenConfig
    tokenizer_json: str
    robots_json: str
    step: int | None
    """Updates after which the weights were saved; None in a file that does not say."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The float weights, by their names in a model that is trained.

        Those of a run as they are. An exported file has ternary weights, from which the float
        weights are made that round to them: `T * s / (share of T that is not 0)`, so that the mean
        of the absolute values, which is the scale that training finds, is `s` again.

        Raises:
            ModelFileError: missing, damaged, or a run without a checkpoint yet.
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

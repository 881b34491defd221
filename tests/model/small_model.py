"""A model small enough to be run in every mode, hundreds of times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitgen.config import BitGenConfig
from bitgen.model.bitgen import BitGenModel

ROBOTS = ("Drone", "Humanoid")

DENSE_AND_EXPERTS = pytest.mark.parametrize(
    "experts",
    [{}, {"num_experts": 4, "experts_per_token": 2}, {"num_experts": 3, "experts_per_token": 1}],
    ids=["dense", "2 of 4 experts", "1 of 3 experts"],
)
"""For what holds with and without experts: changes of `small_config`."""


def small_config(**changes: Any) -> BitGenConfig:
    values: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "intermediate_size": 48, "max_positions": 64, "image_size": 32,
        "encoder_hidden_size": 32, "encoder_layers": 1, "encoder_heads": 4,
        "encoder_intermediate_size": 48, "robot_names": ROBOTS, "quantization": "none",
    }  # fmt: skip
    return BitGenConfig(**{**values, **changes})


def small_model(**changes: Any) -> BitGenModel:
    """With branches as strong as the residual stream, so that attention matters in the logits."""
    torch.manual_seed(0)
    model = BitGenModel(small_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                parameter.fill_(1.0)
    robots = torch.tensor([[4, 20, 21, 22], [4, 23, 0, 0], [4, 30, 31, 0]])
    model.set_robots([*ROBOTS, "Newcomer"], robots, robots != 0)
    return model

"""Configuration: presets, JSON round trip, and what is refused."""

from __future__ import annotations

import json

import pytest

from bitgen.config import MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.errors import ConfigError


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_presets_round_trip_and_suit_every_export_format(size: str) -> None:
    config = BitGenConfig.preset(size, robot_names=("Drone",))
    assert BitGenConfig.from_json(config.to_json()) == config
    assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0
    assert config.num_heads * config.head_dim == config.hidden_size


def test_preset_table_of_the_design() -> None:
    tiny = BitGenConfig.preset("tiny")
    assert (tiny.hidden_size, tiny.num_layers, tiny.num_heads, tiny.head_dim) == (256, 6, 4, 64)
    assert (tiny.intermediate_size, tiny.vocab_size, tiny.image_size) == (768, 8192, 160)
    large = BitGenConfig.preset("large", image_size=None)
    assert (large.hidden_size, large.num_layers, large.image_size) == (1536, 24, 224)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "multiple of the patch size"),
        ({"image_size": "96"}, "image_size must be int"),
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple of num_kv_heads"),
        ({"attention_mode": "sideways"}, "prefix, causal, bidirectional"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden_size": 0}, "at least 1"),
        ({"head_dim": 7}, "even"),
        ({"freeze_encoder": 1}, "freeze_encoder must be bool"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"experts_per_token": 0}, "experts_per_token must be at least 1"),
        ({"experts_per_token": 2}, "experts_per_token .2. must be at most num_experts .1."),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BitGenConfig.preset("nano", **changes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="no model size 'huge'"):
        BitGenConfig.preset("huge")
    with pytest.raises(ConfigError, match="no field named colour"):
        BitGenConfig.from_json(json.dumps({"colour": 1}))
    with pytest.raises(ConfigError, match="not JSON"):
        TrainingConfig.from_json("{")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"load_balance_weight": -0.1}, "load_balance_weight must not be negative"),
        ({"router_z_weight": -0.1}, "router_z_weight must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"captions": "two"}, "one, all"),
    ],
)
def test_impossible_trainings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)

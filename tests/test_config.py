"""Configuration: presets, JSON round trip, and what is refused."""

from __future__ import annotations

import json
from typing import Any

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


# The recipe of a size -----------------------------------------------------------------------------

RECIPE = {
    "batch_size": 64,
    "norm_batch": 64,
    "schedule": "cosine",
    "min_learning_rate": 2e-4,
    "word_pretraining_steps": None,
    "word_pretraining_image_size": 96,
    "word_mixup": 0.2,
}


def changed(training: TrainingConfig) -> dict[str, Any]:
    """What is not as in a training without a recipe."""
    usual = TrainingConfig().to_dict()
    return {name: value for name, value in training.to_dict().items() if value != usual[name]}


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_tiny_and_small_have_the_stem_and_the_recipe_for_photographs(size: str) -> None:
    config = BitGenConfig.preset(size)
    is_for_photographs = size in ("tiny", "small")
    stem = (config.patch_size, config.stem_residual_convolutions)
    assert stem == ((32, 1) if is_for_photographs else (16, 0))
    assert changed(TrainingConfig.for_model(config)) == (RECIPE if is_for_photographs else {})


def test_what_is_given_wins_over_the_recipe_and_none_is_not_given() -> None:
    given = {
        "batch_size": 32,
        "norm_batch": 4,
        "schedule": "two_stage",
        "min_learning_rate": 1e-5,
        "word_pretraining_steps": 0,
        "word_pretraining_image_size": 0,
        "word_mixup": 0.0,
    }
    tiny = BitGenConfig.preset("tiny")
    assert TrainingConfig.for_model(tiny, **given) == TrainingConfig()
    assert changed(TrainingConfig.for_model(tiny, **dict.fromkeys(given), seed=3)) == {
        **RECIPE,
        "seed": 3,
    }
    assert TrainingConfig.for_model(tiny, word_pretraining_steps=7).word_pretraining_steps == 7


@pytest.mark.parametrize(
    ("model", "training", "from_scratch"),
    [
        ({"freeze_encoder": True}, {}, True),
        ({"image_encoder": "resnet50"}, {}, True),
        ({"image_encoder": "hf:dinov2"}, {}, True),
        ({}, {"image_word_weight": 0.0}, True),
        ({}, {"objective": "self_critical"}, True),
        ({}, {}, False),
    ],
    ids=str,
)
def test_there_is_no_word_pretraining_where_it_teaches_nothing(
    model: dict[str, Any], training: dict[str, Any], from_scratch: bool
) -> None:
    config = BitGenConfig.preset("small", **model)
    found = changed(TrainingConfig.for_model(config, from_scratch, **training))
    assert found.items() >= {"batch_size": 64, "norm_batch": 64, "schedule": "cosine"}.items()
    assert ("min_learning_rate" in found) == from_scratch
    assert not any(name.startswith("word_") for name in found)


def test_word_pretraining_that_contradicts_itself_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="image_word_weight is 0"):
        TrainingConfig.for_model(
            BitGenConfig.preset("tiny"), word_pretraining_steps=5, image_word_weight=0.0
        )
    with pytest.raises(ConfigError, match="word_pretraining_steps must not be negative"):
        TrainingConfig(word_pretraining_steps=-1)


@pytest.mark.parametrize("model", [{"image_size": 96}, {"image_size": 192, "patch_size": 64}])
def test_pictures_of_word_pretraining_are_never_larger_and_fit_the_patches(
    model: dict[str, Any],
) -> None:
    training = TrainingConfig.for_model(BitGenConfig.preset("tiny", **model))
    assert training.word_pretraining_steps is None
    assert training.word_pretraining_image_size == 0


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [(None, 18_440, 11_064), (None, 3, 1), (None, 1, 0), (None, 0, 0), (7, 3, 7), (0, 100, 0)],
)
def test_updates_of_word_pretraining(given: int | None, total: int, expected: int) -> None:
    training = TrainingConfig(word_pretraining_steps=given)
    assert training.count_word_pretraining(total) == expected


def test_what_was_stored_before_there_was_a_recipe_reads_as_before() -> None:
    model = BitGenConfig.preset("tiny", patch_size=16, stem_residual_convolutions=0)
    stored = model.to_dict()
    del stored["patch_size"], stored["stem_residual_convolutions"]
    assert BitGenConfig.from_dict(stored) == model
    training = {n: v for n, v in TrainingConfig().to_dict().items() if n not in RECIPE}
    assert TrainingConfig.from_dict(training) == TrainingConfig()

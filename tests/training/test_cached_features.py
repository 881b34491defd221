"""Training on cached features of a frozen encoder, against the encoder in every update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.features import FeatureCache
from bitgen.dataset.scenes import write_scenes
from bitgen.errors import ConfigError
from bitgen.model.bitgen import BitGenModel
from bitgen.training.events import TrainerCallback, TrainingSummary
from bitgen.training.setup import (
    DataSources,
    SetupObserver,
    prepare_resume,
    prepare_training,
)

LOSS = {"none": 2e-3, "ternary": 5e-2}
"""Largest difference of a loss, in nats a token, between cached features and the encoder in each
update, over eight updates in float32. float16 rounds the features; where activations are rounded
to int8 and weights to ternary, few land on the other side, and weights part from update to
update."""
FIRST_LOSS = 1e-3
"""The same, of the first update."""

CHANGES: dict[str, Any] = {
    "image_encoder": "mobilenet_v3_small", "image_size": 64, "freeze_encoder": True,
    "num_layers": 1, "vocab_size": 512,
}  # fmt: skip


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.training: list[float] = []
        self.validation: list[float] = []

    def on_step(self, report: Any) -> None:
        self.training += [report.loss, report.image_word_loss]

    def on_validation(self, report: Any) -> None:
        self.validation.append(report.loss)


class Notes(SetupObserver):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.activities: list[str] = []

    def on_note(self, message: str) -> None:
        self.said.append(message)

    def on_warning(self, message: str) -> None:
        self.said.append(message)

    def on_progress(self, activity: str, done: int, total: int) -> None:
        self.activities.append(activity)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=24, num_val=6, image_size=64)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a torchvision model whose features differ from picture to picture."""
    from torchvision import models

    torch.manual_seed(0)
    net = models.mobilenet_v3_small(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(net.state_dict(), path)
    return path


def options(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "max_steps": 8, "batch_size": 6, "warmup_steps": 2, "precision": "fp32", "device": "cpu",
        "augment": False, "eval_every": 4, "save_every": 4, "captions": "all",
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})


@pytest.fixture
def train(tmp_path: Path, scenes: Path, weights: Path) -> Callable[..., Any]:
    def train(name: str, observer: SetupObserver | None = None, **changes: Any) -> Any:
        losses = Losses()
        trainer = prepare_training(
            DataSources([scenes]),
            tmp_path / name,
            "nano",
            CHANGES,
            options(**changes),
            str(weights),
            cache_dir=tmp_path / "cache",
            callbacks=[losses],
            observer=observer,
        )
        summary = trainer.train()
        return losses, summary, trainer

    return train


@pytest.mark.parametrize("quantization", LOSS)
def test_losses_are_those_of_the_encoder_in_every_update(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setitem(CHANGES, "quantization", quantization)
    cached, _, trainer = train("cached")
    uncached, _, _ = train("uncached", cached_views=0)
    assert isinstance(trainer.validation_set._cache, FeatureCache)
    assert len(cached.training) == len(uncached.training) == 16
    assert cached.training[:2] == pytest.approx(uncached.training[:2], abs=FIRST_LOSS)
    assert cached.training == pytest.approx(uncached.training, abs=LOSS[quantization])
    assert cached.validation == pytest.approx(uncached.validation, abs=LOSS[quantization])
    assert cached.training != uncached.training  # or the encoder ran after all


def test_no_picture_is_encoded_after_the_cache_is_filled(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("first")

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a picture was encoded")

    monkeypatch.setattr(FeatureCache, "_encode", refuse)
    notes = Notes()
    _, summary, trainer = train("second", notes)
    assert isinstance(summary, TrainingSummary) and summary.steps == 8
    batch = next(iter(trainer._train_loader.load([[0, 1]], 0)))
    assert batch.images is None and batch.image_features.dtype == torch.float16
    assert "Decoding images" not in notes.activities


def test_what_becomes_of_augmentation_is_said(train: Callable[..., Any]) -> None:
    for views, words in (
        (1, "Pictures are not varied"),
        (2, "of 2 varied versions of each training picture"),
    ):
        notes = Notes()
        losses, _, _ = train(f"views {views}", notes, augment=True, cached_views=views)
        assert any(words in message for message in notes.said)
        assert len(losses.training) == 16


def test_a_resumed_run_reads_the_same_features(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = train("whole")
    first, _, _ = train("stopped", max_steps=4)

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a picture was encoded")

    monkeypatch.setattr(FeatureCache, "_encode", refuse)
    rest = Losses()
    prepare_resume(
        tmp_path / "stopped",
        training_changes={"max_steps": 8},
        cache_dir=tmp_path / "cache",
        callbacks=[rest],
    ).train(resume=True)
    assert len(first.training) == len(rest.training) == 8
    # The schedule of the first half was that of a shorter training: the last losses are close.
    assert rest.training[-1] == pytest.approx(whole.training[-1], abs=0.5)


def test_features_in_the_place_of_pictures(small_config: BitGenConfig) -> None:
    torch.manual_seed(0)
    model = BitGenModel(small_config).eval()
    images, ids = torch.randn(3, 3, 64, 64), torch.randint(512, (3, 5))
    with torch.no_grad():
        features = model.encode_features(images)
        expected = model(ids, images, return_image_words=True)
        found = model(ids, features, return_image_words=True)
        assert torch.equal(found.logits, expected.logits)
        assert found.image_words is not None and expected.image_words is not None
        assert torch.equal(found.image_words, expected.image_words)
        assert torch.equal(model.image_words(features), model.image_words(images))
        mask = model.build_attention_mask(
            torch.ones(3, 5), image_mask_B=torch.tensor([True, False, True])
        )
        for given in (images, features):
            logits = model(ids, given, attention_mask=mask).logits
            assert torch.allclose(logits[0], expected.logits[0], atol=1e-4)
            assert not torch.allclose(logits[1], expected.logits[1], atol=1e-2)
    with pytest.raises(ValueError, match=r"Expected image features \[B, 4, 576\]"):
        model(ids, features[:, :3])


@pytest.fixture
def small_config() -> BitGenConfig:
    return BitGenConfig.preset("nano", **CHANGES)


def test_a_frozen_encoder_has_no_learning_rate(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frozen image encoder is not trained"):
        prepare_training(
            DataSources([scenes]), tmp_path / "run", "nano", CHANGES,
            options(encoder_learning_rate=1e-4),
        )  # fmt: skip


def test_pretrained_weights_at_the_rate_of_new_ones_are_warned_of(
    scenes: Path, weights: Path, tmp_path: Path
) -> None:
    for own, expected in ((None, True), (1e-4, False)):
        notes = Notes()
        prepare_training(
            DataSources([scenes]), tmp_path / "run", "nano",
            {**CHANGES, "freeze_encoder": False}, options(encoder_learning_rate=own),
            str(weights), cache_dir=tmp_path / "cache", observer=notes,
        )  # fmt: skip
        assert any("--encoder_learning_rate" in message for message in notes.said) is expected


def test_only_what_is_not_frozen_moves(train: Callable[..., Any], weights: Path) -> None:
    _, _, trainer = train("run")
    published = torch.load(weights, weights_only=True)
    for name, tensor in trainer.model.image_encoder.backbone.state_dict().items():
        assert torch.equal(tensor, published[name]), name

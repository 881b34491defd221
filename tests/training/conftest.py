"""A task small enough to be learnt in a second: coloured squares, and two robots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.images import ImageCache
from bitgen.dataset.robots import Robot, RobotTask
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.model.bitgen import BitGenModel
from bitgen.training.trainer import Trainer, TrainerCallback

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
IMAGE_SIZE = 32
NUM_IMAGES = 18
NUM_TASKS = 9


def tiny_config(**changes: Any) -> BitGenConfig:
    values: dict[str, Any] = {
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_layers": 1,
        "intermediate_size": 32,
        "vocab_size": 384,
        "max_positions": 64,
        "image_size": IMAGE_SIZE,
        "encoder_hidden_size": 32,
        "encoder_heads": 2,
        "encoder_layers": 1,
        "encoder_intermediate_size": 32,
        "robot_names": ("Drone", "Diver"),
    }
    return BitGenConfig(**{**values, **changes})


def tiny_training(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "num_epochs": 3,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "eval_every": 1000,
        "save_every": 1000,
        "task_word_dropout": 0.0,  # each word of these few tasks counts
        "robot_phrase_dropout": 0.0,
    }
    return TrainingConfig(**{**values, **changes})


@dataclass
class Events(TrainerCallback):
    """Keeps every event; `on_step_do` is called after each step."""

    on_step_do: Callable[[int], None] | None = None
    events: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def of(self, name: str) -> list[Any]:
        found = [arguments for kind, arguments in self.events if kind == name]
        return [arguments[0] if len(arguments) == 1 else arguments for arguments in found]

    def on_start(self, *arguments: Any) -> None:
        self.events.append(("start", arguments))

    def on_step(self, *arguments: Any) -> None:
        self.events.append(("step", arguments))
        if self.on_step_do is not None:
            self.on_step_do(arguments[0].step)

    def on_validation_progress(self, *arguments: Any) -> None:
        self.events.append(("validation_progress", arguments))

    def on_validation(self, *arguments: Any) -> None:
        self.events.append(("validation", arguments))

    def on_checkpoint(self, *arguments: Any) -> None:
        self.events.append(("checkpoint", arguments))

    def on_warning(self, *arguments: Any) -> None:
        self.events.append(("warning", arguments))

    def on_end(self, *arguments: Any) -> None:
        self.events.append(("end", arguments))


class Workshop:
    """Makes trainers on the coloured squares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = [
            Robot("Drone", ("fly",), ("weak",), ("air",)),
            Robot("Diver", ("swim",), ("slow",), ("water",)),
        ]
        self.images = []
        self.tasks = []
        for index in range(NUM_IMAGES):
            colour = list(COLOURS)[index % len(COLOURS)]
            path = folder / f"{index}.png"
            # Not of one colour alone: batch statistics of no variance would amplify rounding.
            noise = np.random.default_rng(index).integers(-60, 60, (IMAGE_SIZE, IMAGE_SIZE, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            # Of different lengths, so that batches are padded differently.
            captions = (f"a {colour} square", f"this is a large square, and it is all {colour}")
            self.images.append(CaptionedImage(path, index, captions))
            if index < NUM_TASKS:
                robots = ("Drone",) if colour == "red" else ("Diver",)
                self.tasks.append(RobotTask(f"go and look at it, number {index}", robots, path))
        texts = [caption for image in self.images for caption in image.captions]
        texts += [task.task for task in self.tasks] + [robot.text() for robot in self.catalog]
        self.tokenizer = Tokenizer.train(texts, 384)
        self.cache = ImageCache(folder / "cache", IMAGE_SIZE, "crop")
        assert self.cache.prepare([image.path for image in self.images]) == {}

    def dataset(
        self,
        training: TrainingConfig,
        training_mode: bool,
        images: list[CaptionedImage] | None = None,
        tasks: list[RobotTask] | None = None,
        config: BitGenConfig | None = None,
    ) -> TrainingSet:
        half = NUM_IMAGES // 2 + 3
        mine = slice(None, half) if training_mode else slice(half, None)
        return TrainingSet(
            images=self.images[mine] if images is None else images,
            tasks=self.tasks[: NUM_TASKS - 3 if training_mode else None]
            if tasks is None
            else tasks,
            cache=self.cache,
            tokenizer=self.tokenizer,
            config=config or tiny_config(),
            training=training,
            robot_names=[robot.name for robot in self.catalog],
            training_mode=training_mode,
        )

    def trainer(
        self,
        run_dir: Path,
        training: TrainingConfig | None = None,
        config: BitGenConfig | None = None,
        callback: TrainerCallback | None = None,
        data_info: dict[str, Any] | None = None,
        **given: Any,
    ) -> Trainer:
        training = training or tiny_training()
        torch.manual_seed(training.seed)
        values: dict[str, Any] = {
            "model": BitGenModel(config or tiny_config()),
            "train_set": self.dataset(training, True, config=config),
            "val_set": self.dataset(training, False, config=config),
            "tokenizer": self.tokenizer,
            "catalog": self.catalog,
            "training": training,
            "output_dir": run_dir,
            "data_info": data_info or {"coco_data": ["squares"]},
            "callbacks": [callback] if callback is not None else [],
        }
        return Trainer(**{**values, **given})


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def make_events() -> type[Events]:
    return Events


@pytest.fixture
def make_training() -> Callable[..., TrainingConfig]:
    return tiny_training


@pytest.fixture
def make_config() -> Callable[..., BitGenConfig]:
    return tiny_config

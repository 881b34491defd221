"""From data sets and choices to a trainer that is ready: what `bitgen train` and the demo share.

coco folders, tasks --> read_data --> tokenizer, config --> model --.
                             `--> train set, validation set --------+--> Trainer
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.dataset.images import ImageCache, default_cache_dir
from bitgen.dataset.masked import check_objective
from bitgen.dataset.robots import (
    Robot,
    RobotTask,
    catalog_from_json,
    load_catalog,
    load_tasks,
    split_tasks,
)
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError, DatasetError, InputError, OutputExistsError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.image_encoder import load_encoder_weights
from bitgen.training.checkpoint import CHECKPOINTS_FOLDER, CONFIG_FILE, open_run
from bitgen.training.distributed import World
from bitgen.training.events import TrainerCallback
from bitgen.training.trainer import Trainer

# One unreadable image is skipped, whatever the size of the set; of more, this share is tolerated.
MAX_BAD_IMAGE_SHARE = 0.01
BAD_IMAGES_NAMED = 5


class SetupObserver:
    """Hears what is being prepared; does nothing. Override what should be shown."""

    def on_progress(self, activity: str, done: int, total: int) -> None:
        """`done` of `total` steps of `activity` are finished."""

    def on_note(self, message: str) -> None:
        """Something worth knowing."""

    def on_warning(self, message: str) -> None:
        """Something that a person should look at."""


@dataclass(frozen=True)
class DataSources:
    """Where the data of one training comes from."""

    coco_data: Sequence[Path]
    """Folders of COCO-layout data sets; they are joined."""
    robot_data: Path | None = None
    """Robot tasks to train on."""
    robot_val_data: Path | None = None
    """Robot tasks to validate on; None: `robots_val.json` beside `robots_train.json`, or else a
    share of `robot_data`."""
    robots: Path | None = None
    """The robot catalog; None: the one that ships."""
    tokenizer: Path | None = None
    """A `tokenizer.json`; None: one is trained on the captions and tasks."""

    def to_dict(self) -> dict[str, Any]:
        """Absolute paths as JSON values, so that the run resumes from any folder."""
        return {
            "coco_data": [str(path.resolve()) for path in self.coco_data],
            **{
                name: None if path is None else str(path.resolve())
                for name, path in (
                    ("robot_data", self.robot_data),
                    ("robot_val_data", self.robot_val_data),
                    ("robots", self.robots),
                    ("tokenizer", self.tokenizer),
                )
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSources:
        """Read what `to_dict` wrote; other keys are left alone."""
        paths = {
            name: Path(values[name]) if values.get(name) else None
            for name in ("robot_data", "robot_val_data", "robots", "tokenizer")
        }
        return cls([Path(path) for path in values.get("coco_data", ())], **paths)


@dataclass(frozen=True)
class TrainingData:
    """Everything that is learnt from and validated on, before it is decoded and tokenized."""

    train_images: list[CaptionedImage]
    val_images: list[CaptionedImage]
    train_tasks: list[RobotTask]
    val_tasks: list[RobotTask]
    catalog: list[Robot]

    def image_paths(self) -> list[Path]:
        """Every picture file once, in order of first use."""
        with_captions = (image.path for image in (*self.train_images, *self.val_images))
        with_tasks = (t.image for t in (*self.train_tasks, *self.val_tasks) if t.image is not None)
        return list(dict.fromkeys((*with_captions, *with_tasks)))

    def texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: training captions and tasks, and the robots."""
        for image in self.train_images:
            yield from image.captions
        for task in self.train_tasks:
            yield task.task
        if self.train_tasks:
            for robot in self.catalog:
                yield robot.text()

    def counts(self) -> dict[str, int]:
        """How much there is, for the run's record."""
        return {
            "train_images": len(self.train_images),
            "train_captions": sum(len(image.captions) for image in self.train_images),
            "val_images": len(self.val_images),
            "train_tasks": len(self.train_tasks),
            "val_tasks": len(self.val_tasks),
        }

    def words(self) -> str:
        """How much there is, for a person."""
        counts = self.counts()
        return (
            f"To train on: {counts['train_images']:,} images with {counts['train_captions']:,}"
            f" captions, {counts['train_tasks']:,} robot tasks. To validate on:"
            f" {counts['val_images']:,} images, {counts['val_tasks']:,} robot tasks."
        )


def read_data(sources: DataSources) -> TrainingData:
    """Read captions, tasks and catalog. Raises DatasetError where there is nothing to train on."""
    if not sources.coco_data:
        raise InputError(
            "No data set is given.", remedy="Name a folder in COCO layout: --coco_data DIR."
        )
    train_images = load_coco(sources.coco_data, "train")
    val_images = load_coco(sources.coco_data, "val")
    catalog = load_catalog(sources.robots)
    train_tasks: list[RobotTask] = []
    val_tasks: list[RobotTask] = []
    if sources.robot_data is not None:
        train_tasks = load_tasks(sources.robot_data, catalog)
        val_path = sources.robot_val_data
        if val_path is None and sources.robot_data.name == "robots_train.json":
            sibling = sources.robot_data.with_name("robots_val.json")
            val_path = sibling if sibling.is_file() else None
        if val_path is None:
            train_tasks, val_tasks = split_tasks(train_tasks)
        else:
            val_tasks = load_tasks(val_path, catalog)
    return TrainingData(train_images, val_images, train_tasks, val_tasks, catalog)


def read_sources(
    sources: DataSources,
    model_size: str,
    model_changes: Mapping[str, Any] | None,
    training: TrainingConfig,
    observer: SetupObserver,
) -> tuple[BitGenConfig, TrainingData, Tokenizer | None]:
    """The architecture for these data, the data, and the tokenizer if the sources name one.

    The arguments, and what is raised, are those of `prepare_training`.
    """
    config = BitGenConfig.preset(model_size, **(model_changes or {}))
    tokenizer = None
    if sources.tokenizer is not None:
        tokenizer = Tokenizer.load(sources.tokenizer)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    check_objective(config, training, tokenizer)
    data = read_data(sources)
    observer.on_note(data.words())
    if data.train_tasks:
        config = replace(config, robot_names=tuple(robot.name for robot in data.catalog))
    return config, data, tokenizer


def refuse_existing_output(output_dir: Path, overwrite: bool) -> None:
    """Raise OutputExistsError, before any work is done, where the run's folder is in use.

    `overwrite` allows a run there, and nothing else.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{output_dir} exists already.",
            remedy="Continue it with --resume, replace it with --overwrite, or choose another"
            " --output_dir.",
        )
    if not ((output_dir / CONFIG_FILE).is_file() and (output_dir / CHECKPOINTS_FOLDER).is_dir()):
        raise OutputExistsError(
            f"{output_dir} is not a run: it is not overwritten.",
            remedy="Choose another --output_dir.",
        )


def decode_images(
    data: TrainingData, cache: ImageCache, observer: SetupObserver
) -> tuple[TrainingData, int]:
    """Fill the cache; returns the data without unreadable images, and how many those are.

    Raises DatasetError if more than one image and more than 1% of them cannot be read.
    """
    paths = data.image_paths()

    def report(done: int, total: int) -> None:
        observer.on_progress("Decoding images", done, total)

    bad = cache.prepare(paths, on_progress=report)
    if not bad:
        return data, 0
    named = "; ".join(why.rstrip(".") for why in list(bad.values())[:BAD_IMAGES_NAMED])
    more = f"; and {len(bad) - BAD_IMAGES_NAMED} more" if len(bad) > BAD_IMAGES_NAMED else ""
    summary = f"{len(bad)} of {len(paths)} images cannot be read ({named}{more})."
    if len(bad) == len(paths) or len(bad) > max(1, MAX_BAD_IMAGE_SHARE * len(paths)):
        raise DatasetError(
            summary, remedy="Run `bitgen data check DIR` and repair or remove these files."
        )
    observer.on_warning(f"{summary} They are skipped.")
    return (
        replace(
            data,
            train_images=[image for image in data.train_images if image.path not in bad],
            val_images=[image for image in data.val_images if image.path not in bad],
            train_tasks=[task for task in data.train_tasks if task.image not in bad],
            val_tasks=[task for task in data.val_tasks if task.image not in bad],
        ),
        len(bad),
    )


def make_datasets(
    data: TrainingData,
    cache: ImageCache,
    tokenizer: Tokenizer,
    config: BitGenConfig,
    training: TrainingConfig,
) -> tuple[TrainingSet, TrainingSet]:
    """The set to train on, and the one to validate on."""
    names = [robot.name for robot in data.catalog]
    train_set, val_set = (
        TrainingSet(
            images=images,
            tasks=tasks,
            cache=cache,
            tokenizer=tokenizer,
            config=config,
            training=training,
            robot_names=names,
            training_mode=training_mode,
        )
        for images, tasks, training_mode in (
            (data.train_images, data.train_tasks, True),
            (data.val_images, data.val_tasks, False),
        )
    )
    return train_set, val_set


def prepare_training(
    sources: DataSources,
    output_dir: Path,
    model_size: str = "tiny",
    model_changes: Mapping[str, Any] | None = None,
    training: TrainingConfig | None = None,
    encoder_weights: str | None = None,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    observer: SetupObserver | None = None,
    world: World | None = None,
) -> Trainer:
    """A trainer for a new run; nothing is written to `output_dir` before it trains.

    Args:
        sources: the data.
        output_dir: the run's own folder; new or empty.
        model_size: name of the preset.
        model_changes: fields of BitGenConfig that differ from the preset.
        training: how to train.
        encoder_weights: a file for the image encoder, or torchvision's name of weights.
        cache_dir: where decoded images are kept; None: the user's cache folder.
        overwrite: remove a run that is in `output_dir`, once everything else is in order.
        callbacks: hear of the training.
        observer: hears of the preparation.
        world: the processes that share the training; None: this one alone.

    Raises:
        InputError: the data, the configuration or the output cannot be used.
    """
    training = training or TrainingConfig()
    observer = observer or SetupObserver()
    world = world or World()
    if world.is_main:
        refuse_existing_output(output_dir, overwrite)
    config, data, tokenizer = read_sources(sources, model_size, model_changes, training, observer)
    if encoder_weights is not None and Path(encoder_weights).exists():
        encoder_weights = str(Path(encoder_weights).absolute())
    model = _initial_model(config, training, encoder_weights)
    cache = ImageCache(cache_dir or default_cache_dir(), config.image_size, config.image_resize)
    data, num_skipped = decode_images(data, cache, observer)
    if tokenizer is None:
        trained = Tokenizer.train(data.texts(), config.vocab_size).to_json()
        tokenizer = Tokenizer.from_json(world.text_of_main(trained))
    train_set, val_set = make_datasets(data, cache, tokenizer, config, training)
    if world.is_main and output_dir.exists():
        shutil.rmtree(output_dir)
    return Trainer(
        model=model,
        train_set=train_set,
        val_set=val_set,
        tokenizer=tokenizer,
        catalog=data.catalog,
        training=training,
        output_dir=output_dir,
        data_info=_data_info(sources, encoder_weights, data, num_skipped),
        callbacks=callbacks,
        world=world,
    )


def _data_info(
    sources: DataSources, encoder_weights: str | None, data: TrainingData, num_skipped: int
) -> dict[str, Any]:
    """What the run records of where it came from, and needs to resume."""
    return {
        **sources.to_dict(),
        "encoder_weights": encoder_weights,
        **data.counts(),
        "skipped_images": num_skipped,
    }


def _initial_model(
    config: BitGenConfig, training: TrainingConfig, encoder_weights: str | None
) -> BitGenModel:
    """The weights that a training starts from; a function of these three alone."""
    torch.manual_seed(training.seed)
    model = BitGenModel(config)
    if encoder_weights is not None:
        load_encoder_weights(model.image_encoder, config.image_encoder, encoder_weights)
    return model


def prepare_resume(
    run_dir: Path,
    source_changes: Mapping[str, Any] | None = None,
    model_size: str | None = None,
    model_changes: Mapping[str, Any] | None = None,
    training_changes: Mapping[str, Any] | None = None,
    cache_dir: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    observer: SetupObserver | None = None,
    world: World | None = None,
) -> Trainer:
    """A trainer that goes on with a run: call its `train(resume=True)`.

    Model, tokenizer and catalog are the run's; so are data and training settings, except for
    `source_changes` (fields of DataSources) and `training_changes` (fields of TrainingConfig).

    Raises:
        ModelFileError: `run_dir` is not a run that can be read.
        ConfigError: what was asked for of the model is not what the run has.
    """
    observer = observer or SetupObserver()
    run = open_run(run_dir, prefer="last")
    asked = dict(model_changes or {})
    if model_size is not None:
        asked["model_size"] = model_size
    for name, value in asked.items():
        recorded = getattr(run.config, name)
        if value != recorded:
            raise ConfigError(
                f"The run {run_dir} has {name} {recorded}; it cannot go on with {value}.",
                remedy=f"Leave --{name} out, or start a new run in another --output_dir.",
            )
    training = replace(run.training, **(training_changes or {}))
    tokenizer = Tokenizer.from_json(run.tokenizer_json)
    check_objective(run.config, training, tokenizer)
    sources = replace(DataSources.from_dict(run.data), **(source_changes or {}))
    data = read_data(sources)
    observer.on_note(data.words())
    catalog = catalog_from_json(run.robots_json)
    if data.train_tasks and catalog != data.catalog:
        raise ConfigError(
            f"The robot catalog is not the one that {run_dir} was trained with.",
            remedy="Give the same --robots file, or start a new run.",
        )
    config = run.config
    cache = ImageCache(cache_dir or default_cache_dir(), config.image_size, config.image_resize)
    data, num_skipped = decode_images(data, cache, observer)
    train_set, val_set = make_datasets(data, cache, tokenizer, config, training)
    encoder_weights = run.data.get("encoder_weights")
    # A run that was killed before its first checkpoint starts over, from the same weights.
    starts_over = run.checkpoint_dir is None
    return Trainer(
        model=_initial_model(config, training, encoder_weights if starts_over else None),
        train_set=train_set,
        val_set=val_set,
        tokenizer=tokenizer,
        catalog=catalog,
        training=training,
        output_dir=run_dir,
        data_info=_data_info(sources, encoder_weights, data, num_skipped),
        callbacks=callbacks,
        world=world,
    )

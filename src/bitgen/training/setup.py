"""From data sets and choices to a trainer that is ready: what `bitgen train` and the demo share.

coco folders, tasks --> read_data --> tokenizer, config --> model --.
                             `--> train set, validation set --------+--> Trainer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bitgen.config import CAPTION_IDF, BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.dataset.features import FeatureCache, caches_features
from bitgen.dataset.images import ImageCache, default_cache_dir
from bitgen.dataset.masked import check_objective
from bitgen.dataset.plans import TaskPlan, load_plans, split_plans
from bitgen.dataset.robots import (
    Robot,
    RobotTask,
    catalog_from_json,
    load_catalog,
    load_tasks,
    split_tasks,
    without_tasks,
)
from bitgen.dataset.samples import PictureVariants, TrainingSet
from bitgen.dataset.task_words import TASK_WORD_BINS, TASK_WORD_TENSORS, robot_sets
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError, DatasetError, InputError, OutputExistsError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.device import resolve_device
from bitgen.model.encoders import encoder_name, load_encoder_weights, open_encoder
from bitgen.training.checkpoint import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    load_model_tensors,
    open_run,
    read_tensors,
)
from bitgen.training.distributed import World
from bitgen.training.events import TrainerCallback
from bitgen.training.initial_model import FREE_OF_WEIGHTS, InitialModel, open_initial_models
from bitgen.training.trainer import Trainer

# One unreadable image is skipped, whatever the size of the set; of more, this share is tolerated.
MAX_BAD_IMAGE_SHARE = 0.01
BAD_IMAGES_NAMED = 5
DEFAULT_SIZE = "tiny"

# What the name of a size does not say of a model.
_ANY_INITIAL = frozenset(
    ("model_size", "vocab_size", "robot_names", "robot_sets", "task_word_bins", "caption_idf")
)
_ROBOT_BIAS = "robot_selector.robot_bias"


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
    robot_data: Sequence[Path] = ()
    """Files of robot tasks to train on; they are joined."""
    robot_val_data: Path | None = None
    """Robot tasks to validate on; None: `robots_val.json` beside each `robots_train.json`, and a
    share of the other files of `robot_data`."""
    plan_data: Sequence[Path] = ()
    """Plans to train on; they are joined, and a share of them is validated on."""
    robots: Path | None = None
    """The robot catalog; None: the one that ships."""
    tokenizer: Path | None = None
    """A `tokenizer.json`; None: one is trained on the captions, tasks and plans."""
    initial_model: Sequence[Path] = ()
    """Runs (their best checkpoints) or files whose mean weights the training starts from, with the
    first one's tokenizer and, where `robots` is None, its catalog; empty: from random weights."""

    def to_dict(self) -> dict[str, Any]:
        """Absolute paths as JSON values, so that the run resumes from any folder."""
        return {
            "coco_data": [str(path.resolve()) for path in self.coco_data],
            "plan_data": [str(path.resolve()) for path in self.plan_data],
            "robot_data": [str(path.resolve()) for path in self.robot_data],
            **{
                name: None if path is None else str(path.resolve())
                for name, path in (
                    ("robot_val_data", self.robot_val_data),
                    ("robots", self.robots),
                    ("tokenizer", self.tokenizer),
                )
            },
            "initial_model": [str(path.resolve()) for path in self.initial_model],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSources:
        """Read what `to_dict` wrote; other keys are left alone."""
        paths = {
            name: Path(values[name]) if values.get(name) else None
            for name in ("robot_val_data", "robots", "tokenizer")
        }

        def several(name: str) -> list[Path]:
            """Of a run that was written when there could be one only, that one."""
            found = values.get(name) or []
            return [Path(path) for path in ([found] if isinstance(found, str) else found)]

        return cls(
            several("coco_data"),
            several("robot_data"),
            plan_data=several("plan_data"),
            initial_model=several("initial_model"),
            **paths,
        )


@dataclass(frozen=True)
class TrainingData:
    """Everything that is learnt from and validated on, before it is decoded and tokenized."""

    train_images: list[CaptionedImage]
    val_images: list[CaptionedImage]
    train_tasks: list[RobotTask]
    val_tasks: list[RobotTask]
    catalog: list[Robot]
    train_plans: list[TaskPlan] = field(default_factory=list)
    val_plans: list[TaskPlan] = field(default_factory=list)

    def image_paths(self) -> list[Path]:
        """Every picture file once, in order of first use."""
        with_captions = (image.path for image in (*self.train_images, *self.val_images))
        tasks: tuple[RobotTask | TaskPlan, ...] = (
            *self.train_tasks, *self.val_tasks, *self.train_plans, *self.val_plans,
        )  # fmt: skip
        with_tasks = (task.image for task in tasks if task.image is not None)
        return list(dict.fromkeys((*with_captions, *with_tasks)))

    def texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: training captions, tasks and plans, and the robots."""
        for image in self.train_images:
            yield from image.captions
        for task in self.train_tasks:
            yield task.task
        for plan in self.train_plans:
            yield plan.task
            yield from (subtask.subtask for subtask in plan.subtasks)
        if self.train_tasks or self.train_plans:
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
            "train_plans": len(self.train_plans),
            "train_plans_with_image": sum(plan.image is not None for plan in self.train_plans),
            "val_plans": len(self.val_plans),
        }

    def words(self) -> str:
        """How much there is, for a person."""
        counts = self.counts()
        plans = {side: f", {counts[f'{side}_plans']:,} plans" for side in ("train", "val")}
        if not self.train_plans:
            plans = {"train": "", "val": ""}
        return (
            f"To train on: {counts['train_images']:,} images with {counts['train_captions']:,}"
            f" captions, {counts['train_tasks']:,} robot tasks{plans['train']}. To validate on:"
            f" {counts['val_images']:,} images, {counts['val_tasks']:,} robot tasks{plans['val']}."
        )


def read_data(sources: DataSources, catalog: list[Robot] | None = None) -> TrainingData:
    """Read captions, tasks, plans and, unless it is given, the catalog.

    Raises DatasetError where there is nothing to train on.
    """
    if not sources.coco_data:
        raise InputError(
            "No data set is given.", remedy="Name a folder in COCO layout: --coco_data DIR."
        )
    train_images = load_coco(sources.coco_data, "train")
    val_images = load_coco(sources.coco_data, "val")
    if catalog is None:
        catalog = load_catalog(sources.robots)
    train_tasks, val_tasks = _read_tasks(sources, catalog)
    train_plans, val_plans = split_plans(load_plans(sources.plan_data, catalog))
    return TrainingData(
        train_images, val_images, train_tasks, val_tasks, catalog, train_plans, val_plans
    )


def _read_tasks(
    sources: DataSources, catalog: Sequence[Robot]
) -> tuple[list[RobotTask], list[RobotTask]]:
    """Tasks to train and to validate on; none is among both."""
    if not sources.robot_data:
        return [], []
    if sources.robot_val_data is not None:
        val_tasks = load_tasks(sources.robot_val_data, catalog)
        return without_tasks(load_tasks(sources.robot_data, catalog), val_tasks), val_tasks
    val_path_of = {
        path: path.with_name("robots_val.json")
        for path in sources.robot_data
        if path.name == "robots_train.json" and path.with_name("robots_val.json").is_file()
    }
    held_out = load_tasks(list(val_path_of.values()), catalog)
    with_val = load_tasks(list(val_path_of), catalog)
    # Merged before they are divided, so that no task falls on both sides.
    others = load_tasks([path for path in sources.robot_data if path not in val_path_of], catalog)
    train_tasks, val_tasks = split_tasks(without_tasks(others, [*with_val, *held_out]))
    return [*without_tasks(with_val, held_out), *train_tasks], [*held_out, *val_tasks]


def read_sources(
    sources: DataSources,
    model_size: str | None,
    model_changes: Mapping[str, Any] | None,
    training: TrainingConfig,
    observer: SetupObserver,
) -> tuple[BitGenConfig, TrainingData, Tokenizer | None]:
    """The architecture for these data, the data, and the tokenizer if the sources name one.

    The arguments, and what is raised, are those of `prepare_training`.
    """
    tokenizer = catalog = None
    if sources.initial_model:
        initial = open_initial_models(sources.initial_model)
        config = _config_that_fits(initial, model_size, model_changes or {})
        tokenizer = Tokenizer.from_json(initial.tokenizer_json)
        _check_same_tokenizer(tokenizer, sources)
        if sources.robots is None:
            catalog = catalog_from_json(initial.robots_json)
        steps = [
            f"{'the weights' if model.step is None else f'step {model.step:,}'} of {model.path}"
            for model in (initial, *initial.averaged_with)
        ]
        mean = "the mean of " if initial.averaged_with else ""
        observer.on_note(f"Starting from {mean}{', '.join(steps)}.")
    else:
        config = BitGenConfig.preset(model_size or DEFAULT_SIZE, **(model_changes or {}))
        if sources.tokenizer is not None:
            tokenizer = Tokenizer.load(sources.tokenizer)
            config = replace(config, vocab_size=tokenizer.vocab_size)
    check_objective(config, training, tokenizer)
    check_encoder(config, training)
    data = read_data(sources, catalog)
    observer.on_note(data.words())
    if data.train_tasks:
        names = tuple(robot.name for robot in data.catalog)
        config = replace(
            config,
            robot_names=names,
            robot_sets=robot_sets(data.train_tasks, names),
            task_word_bins=TASK_WORD_BINS,
        )
    if data.train_images:
        config = replace(config, caption_idf=True)
    return config, data, tokenizer


def _config_that_fits(
    initial: InitialModel, model_size: str | None, model_changes: Mapping[str, Any]
) -> BitGenConfig:
    """The model's architecture, with what may be changed of it without changing its weights."""
    asked = {}
    if model_size is not None and model_size != initial.config.model_size:
        asked = BitGenConfig.preset(model_size).to_dict()
    of_model, given = initial.config.to_dict(), {**asked, **model_changes}
    # A size says nothing of what is given, nor of the tokenizer's vocabulary and the robots.
    compared = {n: v for n, v in given.items() if n not in _ANY_INITIAL or n in model_changes}
    different = [
        f"{name} is {of_model[name]} there, {value} here"
        for name, value in compared.items()
        if value is not None and value != of_model[name] and name not in FREE_OF_WEIGHTS
    ]
    if different:
        raise ConfigError(
            f"The model of {initial.path} has another architecture: {'; '.join(different)}.",
            remedy="Leave these options out: a training that starts from a model has its"
            " architecture.",
        )
    free = {n: v for n, v in model_changes.items() if n in FREE_OF_WEIGHTS and v is not None}
    return replace(initial.config, **free)


def _check_same_tokenizer(tokenizer: Tokenizer, sources: DataSources) -> None:
    if sources.tokenizer is None:
        return
    given = Tokenizer.load(sources.tokenizer)
    if json.loads(given.to_json()) != json.loads(tokenizer.to_json()):
        raise ConfigError(
            f"{sources.tokenizer} is not the tokenizer that {sources.initial_model[0]} was trained"
            " with: its embedding would stand for other words.",
            remedy="Leave --tokenizer out: that of --initial_model is taken.",
        )


def check_encoder(config: BitGenConfig, training: TrainingConfig) -> None:
    """Raise ConfigError where what is asked of the image encoder contradicts itself."""
    if config.freeze_encoder and training.encoder_learning_rate is not None:
        raise ConfigError(
            "A frozen image encoder is not trained, and an encoder_learning_rate of"
            f" {training.encoder_learning_rate:g} was given.",
            remedy="Leave one of --freeze_encoder and --encoder_learning_rate out.",
        )


def read_encoder(
    model_size: str | None,
    model_changes: Mapping[str, Any] | None,
    weights: str | None,
    observer: SetupObserver,
    initial_model: Sequence[Path] = (),
) -> tuple[dict[str, Any], str | None]:
    """Look at the image encoder that is asked for, before its model is made.

    Returns `model_changes` with what its weights ask for (normalisation; of `hf:FOLDER` its
    architecture), and where the weights come from: an absolute path, torchvision's name of them, or
    None. The arguments, and what is raised, are those of `prepare_training`.
    """
    changes = dict(model_changes or {})
    if initial_model:
        if weights is not None:
            raise InputError(
                f"--encoder_weights would replace those that {initial_model[0]} has.",
                remedy="Leave one of --initial_model and --encoder_weights out.",
            )
        return changes, None
    if weights is not None and Path(weights).exists():
        weights = str(Path(weights).absolute())
    opened = open_encoder(BitGenConfig.preset(model_size or DEFAULT_SIZE, **changes), weights)
    for name in ("image_encoder", "encoder_config", "image_mean", "image_std"):
        if name == "image_encoder" or name not in changes:
            changes[name] = getattr(opened.config, name)
    size = opened.config.image_size
    if opened.image_size is not None and opened.image_size != size:
        observer.on_note(
            f"The weights of {opened.config.image_encoder} were trained on pictures of"
            f" {opened.image_size} px; here they see {size} px (--image_size)."
        )
    return changes, opened.weights


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


def picture_variants(data: TrainingData, training: TrainingConfig) -> dict[Path, list[str]]:
    """Of each picture, in order of first use, the variants whose features are learnt from or
    validated on."""
    wanted: dict[Path, dict[str, None]] = {}
    sides: tuple[tuple[list[CaptionedImage], list[RobotTask | TaskPlan], bool], ...] = (
        (data.train_images, [*data.train_tasks, *data.train_plans], True),
        (data.val_images, [*data.val_tasks, *data.val_plans], False),
    )
    for images, tasks, training_mode in sides:
        variants = PictureVariants(training, training_mode)
        shown = [(image.path, " ".join(image.captions)) for image in images]
        shown += [(task.image, task.task) for task in tasks if task.image is not None]
        for path, words in shown:
            wanted.setdefault(path, {}).update(dict.fromkeys(variants.names(words)))
    return {path: list(names) for path, names in wanted.items()}


def prepare_pictures(
    data: TrainingData,
    model: BitGenModel,
    training: TrainingConfig,
    cache_dir: Path | None,
    observer: SetupObserver,
    world: World,
) -> tuple[TrainingData, ImageCache | FeatureCache, int]:
    """Decode all pictures or, where the image encoder is frozen, compute their features.

    Returns the data without unreadable images, the cache, and how many images were left out.

    Raises:
        DatasetError: more than one image and more than 1% of them cannot be read.
        DiskFullError: no room for the cache.
    """
    config, folder = model.config, cache_dir or default_cache_dir()
    paths = data.image_paths()
    cache: ImageCache | FeatureCache
    if caches_features(config, training):
        device = world.device(resolve_device(training.device))
        vary = PictureVariants(training, training_mode=True).make
        cache = features = FeatureCache(folder, config, model.image_encoder, device, vary)
        wanted = picture_variants(data, training)
        observer.on_note(_cache_words(features, sum(map(len, wanted.values())), training))

        def report_features(done: int, total: int) -> None:
            observer.on_progress("Computing image features", done, total)

        bad = features.prepare(wanted, on_progress=report_features)
    else:
        cache = pictures = ImageCache(folder, config.image_size, config.image_resize)

        def report(done: int, total: int) -> None:
            observer.on_progress("Decoding images", done, total)

        bad = pictures.prepare(paths, on_progress=report)
    data = _without_unreadable(data, bad, len(paths), observer)
    return data, cache, len(bad)


def _cache_words(cache: FeatureCache, num_rows: int, training: TrainingConfig) -> str:
    """What is kept, and what becomes of augmentation, for a person."""
    words = (
        f"The image encoder is frozen: its features of all pictures are kept in {cache.directory}"
        f" ({num_rows * cache.row_bytes / 1e9:,.2f} GB)"
    )
    if not training.augment:
        return f"{words}."
    if training.cached_views == 1:
        return (
            f"{words}. Pictures are not varied: --cached_views N keeps N varied versions of each, 0"
            " varies them anew in each epoch and runs the encoder in every update."
        )
    return f"{words}, of {training.cached_views} varied versions of each training picture."


def _without_unreadable(
    data: TrainingData, bad: Mapping[Path, str], num_paths: int, observer: SetupObserver
) -> TrainingData:
    if not bad:
        return data
    named = "; ".join(why.rstrip(".") for why in list(bad.values())[:BAD_IMAGES_NAMED])
    more = f"; and {len(bad) - BAD_IMAGES_NAMED} more" if len(bad) > BAD_IMAGES_NAMED else ""
    summary = f"{len(bad)} of {num_paths} images cannot be read ({named}{more})."
    if len(bad) == num_paths or len(bad) > max(1, MAX_BAD_IMAGE_SHARE * num_paths):
        raise DatasetError(
            summary, remedy="Run `bitgen data check DIR` and repair or remove these files."
        )
    observer.on_warning(f"{summary} They are skipped.")
    return replace(
        data,
        train_images=[image for image in data.train_images if image.path not in bad],
        val_images=[image for image in data.val_images if image.path not in bad],
        train_tasks=[task for task in data.train_tasks if task.image not in bad],
        val_tasks=[task for task in data.val_tasks if task.image not in bad],
        train_plans=[plan for plan in data.train_plans if plan.image not in bad],
        val_plans=[plan for plan in data.val_plans if plan.image not in bad],
    )


def make_datasets(
    data: TrainingData,
    cache: ImageCache | FeatureCache,
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
            plans=plans,
            cache=cache,
            tokenizer=tokenizer,
            config=config,
            training=training,
            robot_names=names,
            training_mode=training_mode,
        )
        for images, tasks, plans, training_mode in (
            (data.train_images, data.train_tasks, data.train_plans, True),
            (data.val_images, data.val_tasks, data.val_plans, False),
        )
    )
    return train_set, val_set


def check_plans_fit(model: BitGenModel, *sets: TrainingSet) -> None:
    """Raise ConfigError where a plan, with its task and a picture, is longer than the model."""
    longest = max(samples.longest_plan for samples in sets)
    room = model.config.max_positions - model.num_image_tokens
    if longest > room:
        raise ConfigError(
            f"A plan takes {longest} tokens with its task; beside {model.num_image_tokens} image"
            f" tokens the model has room for {room} of its {model.config.max_positions} positions.",
            remedy="Give a smaller --max_plan_tokens, or shorten the task.",
        )


def prepare_training(
    sources: DataSources,
    output_dir: Path,
    model_size: str | None = None,
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
        model_size: name of the preset; None: that of the initial model, or else `DEFAULT_SIZE`.
        model_changes: fields of BitGenConfig that differ from the preset.
        training: how to train.
        encoder_weights: a file for the image encoder, or torchvision's name of weights; those of
            `hf:FOLDER` lie in the folder.
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
    model_changes, encoder_weights = read_encoder(
        model_size, model_changes, encoder_weights, observer, sources.initial_model
    )
    config, data, tokenizer = read_sources(sources, model_size, model_changes, training, observer)
    if (
        encoder_weights is not None
        and config.image_encoder != "vit"
        and not config.freeze_encoder
        and training.encoder_learning_rate is None
    ):
        observer.on_warning(
            f"The pretrained weights of {config.image_encoder} are trained at the learning rate of"
            f" new ones, {training.learning_rate:g}, and may be lost: give a smaller"
            " --encoder_learning_rate, or --freeze_encoder."
        )
    model = _initial_model(config, training, encoder_weights, sources.initial_model)
    data, cache, num_skipped = prepare_pictures(data, model, training, cache_dir, observer, world)
    if tokenizer is None:
        trained = Tokenizer.train(data.texts(), config.vocab_size).to_json()
        tokenizer = Tokenizer.from_json(world.text_of_main(trained))
    train_set, val_set = make_datasets(data, cache, tokenizer, config, training)
    check_plans_fit(model, train_set, val_set)
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
        validate_first=bool(sources.initial_model),
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
    config: BitGenConfig,
    training: TrainingConfig,
    encoder_weights: str | None,
    initial_model: Sequence[Path],
) -> BitGenModel:
    """The weights that a training starts from; a function of these four alone."""
    torch.manual_seed(training.seed)
    model = BitGenModel(config)
    if initial_model:
        initial = open_initial_models(initial_model)
        tensors = initial.tensors()
        _move_robot_bias(model, tensors, initial.config.robot_names)
        own, others = config, initial.config
        _leave_task_words(
            model,
            tensors,
            is_same=(own.robot_sets, own.task_word_bins)
            == (others.robot_sets, others.task_word_bins),
        )
        if config.caption_idf:  # what it does not have the trainer counts
            tensors.setdefault(CAPTION_IDF, model.caption_idf)
        load_model_tensors(model, tensors, initial.path)
    if encoder_weights is not None:
        load_encoder_weights(model.image_encoder, config.image_encoder, encoder_weights)
    return model


def _load_encoder(model: BitGenModel, tensors: Mapping[str, torch.Tensor]) -> None:
    own = {f"image_encoder.{name}" for name in model.image_encoder.state_dict()}
    model.load_state_dict({name: t for name, t in tensors.items() if name in own}, strict=False)


def _move_robot_bias(
    model: BitGenModel, tensors: dict[str, torch.Tensor], names: Sequence[str]
) -> None:
    """Give each robot of the model the bias that it had among `names`; new ones start with none."""
    own = model.robot_selector.robot_bias.detach().clone()
    bias = tensors.get(_ROBOT_BIAS)
    if bias is None or len(bias) != len(names):
        return  # what is wrong there is said when they are loaded
    for index, name in enumerate(model.config.robot_names):
        if name in names:
            own[index] = bias[list(names).index(name)]
    tensors[_ROBOT_BIAS] = own


def _leave_task_words(model: BitGenModel, tensors: dict[str, torch.Tensor], is_same: bool) -> None:
    """Of other sets of robots or bins, keep the model's own: the trainer fits them anew."""
    if not is_same:
        own = model.state_dict()
        for name in TASK_WORD_TENSORS:
            tensors.pop(name, None)
            if name in own:
                tensors[name] = own[name]


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
        if name == "image_encoder":
            value = encoder_name(value)
        if value != recorded:
            raise ConfigError(
                f"The run {run_dir} has {name} {recorded}; it cannot go on with {value}.",
                remedy=f"Leave --{name} out, or start a new run in another --output_dir.",
            )
    training = replace(run.training, **(training_changes or {}))
    tokenizer = Tokenizer.from_json(run.tokenizer_json)
    check_objective(run.config, training, tokenizer)
    check_encoder(run.config, training)
    sources = replace(DataSources.from_dict(run.data), **(source_changes or {}))
    data = read_data(sources)
    observer.on_note(data.words())
    catalog = catalog_from_json(run.robots_json)
    if (data.train_tasks or data.train_plans) and catalog != data.catalog:
        raise ConfigError(
            f"The robot catalog is not the one that {run_dir} was trained with.",
            remedy="Give the same --robots file, or start a new run.",
        )
    encoder_weights = run.data.get("encoder_weights")
    # A run that was killed before its first checkpoint starts over, from the same weights.
    starts_over = run.checkpoint_dir is None
    model = _initial_model(
        run.config,
        training,
        encoder_weights if starts_over else None,
        sources.initial_model if starts_over else (),
    )
    if not starts_over and caches_features(run.config, training):
        # Features are of the weights that training will load: the encoder needs them now.
        _load_encoder(model, read_tensors(run.model_path))
    data, cache, num_skipped = prepare_pictures(
        data, model, training, cache_dir, observer, world or World()
    )
    train_set, val_set = make_datasets(data, cache, tokenizer, run.config, training)
    check_plans_fit(model, train_set, val_set)
    return Trainer(
        model=model,
        train_set=train_set,
        val_set=val_set,
        tokenizer=tokenizer,
        catalog=catalog,
        training=training,
        output_dir=run_dir,
        data_info=_data_info(sources, encoder_weights, data, num_skipped),
        callbacks=callbacks,
        world=world,
        validate_first=bool(sources.initial_model),
    )

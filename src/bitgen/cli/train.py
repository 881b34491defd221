"""`bitgen train`: data sets and options become a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from bitgen.cli.command import config_options
from bitgen.cli.models import RUNS
from bitgen.config import MODEL_SIZES, BitGenConfig, TrainingConfig
from bitgen.errors import InputError

DATA, MODEL, TRAINING, RUN = "Data", "Model", "Training", "Run and machine"

_DATA_FIELDS = ("captions", "max_caption_tokens", "augment")
_MODEL_FIELDS = (
    "image_size", "image_resize", "image_encoder", "freeze_encoder", "quantization",
    "attention_mode", "dropout",
)  # fmt: skip
_TRAINING_FIELDS = (
    "num_epochs", "max_steps", "batch_size", "grad_accumulation", "learning_rate",
    "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip", "label_smoothing",
    "robot_loss_weight", "image_word_weight", "word_pretraining_steps", "prompt_probability",
    "seed",
)  # fmt: skip
_RUN_FIELDS = (
    "eval_every", "save_every", "patience", "keep_checkpoints", "precision", "device",
    "num_workers",
)  # fmt: skip
TRAIN_OPTIONS = [
    *config_options(TrainingConfig, _DATA_FIELDS, DATA),
    *config_options(BitGenConfig, _MODEL_FIELDS, MODEL, of_the_size=("image_size",)),
    *config_options(TrainingConfig, _TRAINING_FIELDS, TRAINING),
    *config_options(TrainingConfig, _RUN_FIELDS, RUN),
]


def train(
    context: typer.Context,
    coco_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--coco_data",
            metavar="DIR",
            rich_help_panel=DATA,
            help="Folder of a data set in COCO layout; may be given several times.",
        ),
    ] = None,
    robot_data: Annotated[
        Path | None,
        typer.Option(
            "--robot_data",
            metavar="FILE",
            rich_help_panel=DATA,
            help="JSON list of robot tasks to train on.",
        ),
    ] = None,
    robot_val_data: Annotated[
        Path | None,
        typer.Option(
            "--robot_val_data",
            metavar="FILE",
            rich_help_panel=DATA,
            help="Robot tasks to validate on. Default: robots_val.json beside robots_train.json,"
            " or a tenth of --robot_data.",
        ),
    ] = None,
    robots: Annotated[
        Path | None,
        typer.Option(
            "--robots",
            metavar="FILE",
            rich_help_panel=DATA,
            help="Robot catalog (JSON). Default: the one that ships.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            rich_help_panel=DATA,
            help="A tokenizer.json to use. Default: one is trained on captions and tasks.",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache_dir",
            metavar="DIR",
            rich_help_panel=DATA,
            help="Where decoded images are kept. Default: bitgen in the user's cache folder.",
        ),
    ] = None,
    model_size: Annotated[
        str,
        typer.Option(
            "--model_size",
            metavar="|".join(MODEL_SIZES),
            rich_help_panel=MODEL,
            help="Size of the model.",
        ),
    ] = "tiny",
    encoder_weights: Annotated[
        str | None,
        typer.Option(
            "--encoder_weights",
            metavar="FILE|NAME",
            rich_help_panel=MODEL,
            help="Weights that the image encoder starts from: a file, or torchvision's name of"
            " them, such as DEFAULT.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            metavar="DIR",
            rich_help_panel=RUN,
            help="The run's own folder. Default: runs/SIZE-DATE-TIME.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=RUN,
            help="Go on with the run in --output_dir, or with the newest; options that are not"
            " given stay as recorded.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", rich_help_panel=RUN, help="Replace the run that is in --output_dir."
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", rich_help_panel=RUN, help="Print the final summary as one JSON object."
        ),
    ] = False,
    **fields: Any,
) -> None:
    """Train a model on COCO captions and, where given, robot tasks."""
    if resume and overwrite:
        raise InputError("--resume goes on with a run, --overwrite replaces it: give one of them.")
    if not coco_data and not resume:
        raise InputError(
            "--coco_data is missing.",
            remedy="Name a folder in COCO layout: --coco_data data/coco. `bitgen data scenes DIR`"
            " draws one, `bitgen data download coco` fetches COCO.",
        )
    given = {
        name for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    model_changes = {name: fields[name] for name in _MODEL_FIELDS}
    training_changes = {name: value for name, value in fields.items() if name not in _MODEL_FIELDS}
    sources: dict[str, Any] = {
        "coco_data": coco_data,
        "robot_data": robot_data,
        "robot_val_data": robot_val_data,
        "robots": robots,
        "tokenizer": tokenizer,
    }
    training = TrainingConfig(**training_changes)

    from bitgen.cli.training_run import show_summary, train_on_console
    from bitgen.training.checkpoint import latest_run
    from bitgen.training.setup import DataSources, SetupObserver, prepare_resume, prepare_training
    from bitgen.training.trainer import Trainer, TrainerCallback

    def prepare(observer: SetupObserver, callback: TrainerCallback) -> Trainer:
        if resume:
            return prepare_resume(
                output_dir or latest_run(RUNS),
                source_changes={n: value for n, value in sources.items() if n in given},
                model_size=model_size if "model_size" in given else None,
                model_changes={n: value for n, value in model_changes.items() if n in given},
                training_changes={n: value for n, value in training_changes.items() if n in given},
                cache_dir=cache_dir,
                callbacks=[callback],
                observer=observer,
            )
        return prepare_training(
            DataSources(**sources),
            output_dir or RUNS / f"{model_size}-{datetime.now():%Y%m%d-%H%M%S}",
            model_size=model_size,
            model_changes=model_changes,
            training=training,
            encoder_weights=encoder_weights,
            cache_dir=cache_dir,
            overwrite=overwrite,
            callbacks=[callback],
            observer=observer,
        )

    show_summary(train_on_console(prepare, resume=resume), json=json)

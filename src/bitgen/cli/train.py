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
from bitgen.shipped import model_path

DATA, MODEL, TRAINING, RUN = "Data", "Model", "Training", "Run and machine"
LOGS = ("none", "tensorboard")

_DATA_FIELDS = (
    "captions", "max_caption_tokens", "max_plan_tokens", "robot_repeats", "plan_repeats",
    "augment", "smallest_crop", "cached_views", "length_buckets",
)  # fmt: skip
_MODEL_FIELDS = (
    "image_size", "image_resize", "image_encoder", "patch_size", "stem_residual_convolutions",
    "freeze_encoder", "quantization", "attention_mode", "dropout", "num_experts",
    "experts_per_token", "predict_tokens",
)  # fmt: skip
_TRAINING_FIELDS = (
    "num_epochs", "max_steps", "batch_size", "grad_accumulation", "learning_rate",
    "encoder_learning_rate", "min_learning_rate", "schedule", "warmup_steps", "weight_decay",
    "grad_clip", "label_smoothing",
    "robot_loss_weight", "task_word_dropout", "robot_phrase_dropout", "image_word_weight",
    "future_token_weight", "load_balance_weight",
    "router_z_weight", "word_pretraining_steps", "word_pretraining_image_size",
    "word_mixup", "norm_batch", "objective", "mlm_probability", "num_sampled_captions",
    "cross_entropy_weight", "prompt_probability", "seed",
)  # fmt: skip
_RUN_FIELDS = (
    "eval_every", "save_every", "patience", "best_by", "cider_images", "keep_checkpoints",
    "weights_every", "precision", "device", "parallel", "num_workers", "compile",
    "activation_checkpointing",
)  # fmt: skip
_MODELS = {size: BitGenConfig.preset(size) for size in MODEL_SIZES}
_RECIPES = {size: TrainingConfig.for_model(model) for size, model in _MODELS.items()}
TRAIN_OPTIONS = [
    *config_options(TrainingConfig, _DATA_FIELDS, DATA, _RECIPES),
    *config_options(BitGenConfig, _MODEL_FIELDS, MODEL, _MODELS),
    *config_options(TrainingConfig, _TRAINING_FIELDS, TRAINING, _RECIPES),
    *config_options(TrainingConfig, _RUN_FIELDS, RUN, _RECIPES),
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
        list[Path] | None,
        typer.Option(
            "--robot_data",
            metavar="FILE",
            rich_help_panel=DATA,
            help="JSON list of robot tasks to train on; may be given several times.",
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
    plan_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--plan_data",
            metavar="FILE",
            rich_help_panel=DATA,
            help="JSON list of plans (subtasks, each with a robot and an order) to train on; a"
            " tenth of them is validated on. May be given several times.",
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
            help="Where decoded images, and features of frozen encoders, are kept. Default: bitgen"
            " in the user's cache folder.",
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
            help="Weights that the image encoder starts from: a file (safetensors, or a state dict"
            " of torch), or torchvision's name of them, such as DEFAULT, which it downloads. Those"
            " of hf:FOLDER lie in the folder.",
        ),
    ] = None,
    initial_model: Annotated[
        list[Path] | None,
        typer.Option(
            "--initial_model",
            metavar="RUN_OR_FILE",
            rich_help_panel=MODEL,
            help="A run (its best checkpoint), one of its checkpoints, an exported file, or"
            " 'shipped': the training starts with its weights, architecture and tokenizer, and with"
            " its robot catalog unless --robots is given. The optimizer starts anew. Given several"
            " times: with the mean of their weights.",
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
    logs: Annotated[
        str,
        typer.Option(
            "--logs",
            metavar="|".join(LOGS),
            rich_help_panel=RUN,
            help="What to write beside metrics.jsonl. tensorboard: losses, speed, ternary weights,"
            " and captions of a few validation pictures, for `tensorboard --logdir`. With torchrun:"
            " -m -- bitgen train ...",
        ),
    ] = LOGS[0],
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log_dir",
            metavar="DIR",
            rich_help_panel=RUN,
            help="Where --logs writes. Default: tensorboard in the run's folder.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry_run",
            rich_help_panel=RUN,
            help="Print sizes, memory and time that the training would take, and write nothing.",
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
    """Train a model on COCO captions and, where given, robot tasks and plans."""
    if resume and overwrite:
        raise InputError("--resume goes on with a run, --overwrite replaces it: give one of them.")
    if resume and initial_model:
        raise InputError(
            "--resume goes on with a run, --initial_model starts a new one: give one of them."
        )
    if dry_run and resume:
        raise InputError(
            "--dry_run is for a new training: a run that is resumed takes what it took before.",
            remedy="Leave one of --dry_run and --resume out.",
        )
    if not coco_data and not resume:
        raise InputError(
            "--coco_data is missing.",
            remedy="Name a folder in COCO layout: --coco_data data/coco. `bitgen data scenes DIR`"
            " draws one, `bitgen data download coco` fetches COCO.",
        )
    if logs not in LOGS:
        raise InputError(f"--logs must be one of {', '.join(LOGS)}; got {logs!r}.")
    if log_dir is not None and logs == "none":
        raise InputError("--log_dir says where --logs writes: give --logs tensorboard too.")
    given = {
        name for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    model_changes = {name: fields[name] for name in _MODEL_FIELDS}
    # A training that starts from a model has its architecture: what is asked for must be given.
    asked_changes = {
        name: value for name, value in model_changes.items() if not initial_model or name in given
    }
    asked_size = model_size if not initial_model or "model_size" in given else None
    training_changes = {name: value for name, value in fields.items() if name not in _MODEL_FIELDS}
    sources: dict[str, Any] = {
        "coco_data": coco_data,
        "robot_data": robot_data or (),
        "robot_val_data": robot_val_data,
        "plan_data": plan_data or (),
        "robots": robots,
        "tokenizer": tokenizer,
        "initial_model": [model_path(path) for path in initial_model or ()],
    }

    def new_training() -> TrainingConfig:
        """By the recipe of the model's size, where nothing else is given."""
        if sources["initial_model"]:
            from bitgen.training.initial_model import open_initial_model

            config = open_initial_model(sources["initial_model"][0]).config
        else:
            config = BitGenConfig.preset(model_size, **model_changes)
        from_scratch = not initial_model and encoder_weights is None
        return TrainingConfig.for_model(config, from_scratch, **training_changes)

    if dry_run:
        from bitgen.cli.dry_run import show_estimate
        from bitgen.cli.training_run import ConsoleObserver
        from bitgen.training.estimate import estimate_training
        from bitgen.training.setup import DataSources, refuse_existing_output

        if output_dir is not None:
            refuse_existing_output(output_dir, overwrite)
        estimate = estimate_training(
            DataSources(**sources),
            asked_size,
            asked_changes,
            new_training(),
            ConsoleObserver(),
            encoder_weights,
            cache_dir,
        )
        show_estimate(estimate, json=json)
        return

    from bitgen.cli.training_run import show_summary, train_on_console
    from bitgen.training.checkpoint import CONFIG_FILE, latest_run
    from bitgen.training.distributed import joined_world, leave_at_once
    from bitgen.training.events import TrainerCallback
    from bitgen.training.setup import DataSources, SetupObserver, prepare_resume, prepare_training
    from bitgen.training.trainer import Trainer

    with joined_world() as world:
        if logs == "tensorboard" and world.is_main:
            from bitgen.cli.tensorboard import LOG_FOLDER, check_tensorboard

            check_tensorboard(log_dir)
        if world.restarts and not resume:
            if output_dir is None:
                raise InputError(
                    "torchrun has started the training again, but which run it was is not known.",
                    remedy="Give --output_dir with every training that may be restarted.",
                )
            resume = (output_dir / CONFIG_FILE).is_file()
        if output_dir is None:
            newest = latest_run(RUNS) if resume else None
            made = RUNS / f"{model_size}-{datetime.now():%Y%m%d-%H%M%S}"
            output_dir = Path(world.text_of_main(str(newest or made)))
        run_dir = output_dir

        def prepare(observer: SetupObserver, callback: TrainerCallback) -> Trainer:
            if resume:
                return prepare_resume(
                    run_dir,
                    source_changes={n: value for n, value in sources.items() if n in given},
                    model_size=model_size if "model_size" in given else None,
                    model_changes={n: value for n, value in model_changes.items() if n in given},
                    training_changes={
                        n: value for n, value in training_changes.items() if n in given
                    },
                    cache_dir=cache_dir,
                    callbacks=[callback],
                    observer=observer,
                    world=world,
                )
            return prepare_training(
                DataSources(**sources),
                run_dir,
                model_size=asked_size,
                model_changes=asked_changes,
                training=new_training(),
                encoder_weights=encoder_weights,
                cache_dir=cache_dir,
                overwrite=overwrite,
                callbacks=[callback],
                observer=observer,
                world=world,
            )

        if world.is_main:
            logs_to = None if logs == "none" else log_dir or run_dir / LOG_FOLDER
            show_summary(train_on_console(prepare, resume=resume, log_dir=logs_to), json=json)
        else:
            prepare(SetupObserver(), TrainerCallback()).train(resume=resume)
    leave_at_once(world)

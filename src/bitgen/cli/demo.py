"""`bitgen demo`: the whole job on drawn scenes, from the data to the exported file."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitgen.cli.models import RUNS
from bitgen.config import DEVICES, TrainingConfig
from bitgen.console import console, duration, file_size
from bitgen.errors import BitGenError, InputError

if TYPE_CHECKING:
    from bitgen.dataset.robots import RobotTask
    from bitgen.inference.predictor import BitGen, Caption
    from bitgen.training.events import TrainerCallback
    from bitgen.training.setup import SetupObserver
    from bitgen.training.trainer import Trainer

# Tuned so that two cores need a few minutes, and held-out scenes are described well.
MODEL_SIZE = "nano"
NUM_TRAIN = 4000
NUM_VAL = 300
SCENE_SIZE = 96
MAX_STEPS = 1650
WORD_PRETRAINING_STEPS = 1280
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
SEED = 0

MAX_TOKENS = 40
SHEET_SCENES = 12
SHEET_COLUMNS = 4


def demo(
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output_dir",
            metavar="DIR",
            help="The run's folder; the scenes are drawn into DIR-scenes beside it.",
        ),
    ] = RUNS / "demo",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo in --output_dir.")
    ] = False,
    num_train: Annotated[int, typer.Option("--num_train", help="Scenes to train on.")] = NUM_TRAIN,
    num_val: Annotated[
        int, typer.Option("--num_val", help="Scenes held out, with unseen combinations.")
    ] = NUM_VAL,
    max_steps: Annotated[int, typer.Option("--max_steps", help="Training steps.")] = MAX_STEPS,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Samples a step.")] = BATCH_SIZE,
    learning_rate: Annotated[
        float, typer.Option("--learning_rate", help="Peak learning rate.")
    ] = LEARNING_RATE,
    seed: Annotated[int, typer.Option("--seed", help="Seed of scenes and training.")] = SEED,
    device: Annotated[
        str, typer.Option("--device", metavar="|".join(DEVICES), help="Where to train and run.")
    ] = TrainingConfig.device,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache_dir",
            metavar="DIR",
            help="Where decoded images are kept. Default: bitgen in the user's cache folder.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as one JSON object.")
    ] = False,
) -> None:
    """Draw scenes, train on them, describe held-out ones, choose robots, and export one file."""
    started = time.monotonic()
    if max_steps < 1:
        raise InputError(f"--max_steps must be at least 1, got {max_steps}.")
    training = TrainingConfig(
        num_epochs=max_steps,  # max_steps ends it earlier
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(WARMUP_STEPS, max_steps // 20),
        schedule="cosine",
        weight_decay=WEIGHT_DECAY,
        augment=False,  # there are enough scenes for so few epochs
        task_word_dropout=0.0,  # and tasks, each word of which counts
        robot_phrase_dropout=0.0,
        prompt_probability=0.0,
        word_pretraining_steps=min(WORD_PRETRAINING_STEPS, max_steps - 1),
        eval_every=max_steps,
        save_every=max_steps,
        seed=seed,
        device=device,
    )
    scenes_dir = output_dir.with_name(f"{output_dir.name}-scenes")
    artifact = output_dir / "demo.safetensors"
    sheet = output_dir / "sheet.png"

    from bitgen.cli.training_run import train_on_console
    from bitgen.dataset.robots import load_tasks
    from bitgen.dataset.scenes import write_scenes
    from bitgen.export.safetensors import export_safetensors
    from bitgen.inference.predictor import BitGen
    from bitgen.inference.scene_evaluation import (
        score_captions,
        score_robots,
        with_shuffled_pictures,
    )
    from bitgen.training.setup import DataSources, prepare_training, refuse_existing_output

    refuse_existing_output(output_dir, overwrite)
    with console.progress("Drawing scenes") as bar:
        write_scenes(scenes_dir, num_train, num_val, seed, SCENE_SIZE, bar.update, overwrite)

    def prepare(observer: SetupObserver, callback: TrainerCallback) -> Trainer:
        return prepare_training(
            DataSources([scenes_dir], robot_data=[scenes_dir / "robots_train.json"]),
            output_dir,
            model_size=MODEL_SIZE,
            training=training,
            cache_dir=cache_dir,
            overwrite=overwrite,
            callbacks=[callback],
            observer=observer,
        )

    summary = train_on_console(prepare)

    model = BitGen.load(output_dir, device=device)
    scenes = json_module.loads((scenes_dir / "scenes_val.json").read_text(encoding="utf-8"))
    pictures = [scenes_dir / "val2017" / scene["file_name"] for scene in scenes]
    captions = _captions(model, pictures, "Describing held-out scenes")
    scores = score_captions([caption.text for caption in captions], scenes)
    console.note("Choosing robots, with the right and with shuffled pictures.")
    tasks = load_tasks(scenes_dir / "robots_val.json", model.catalog)
    robots_right = score_robots(model, tasks)
    robots_right_shuffled = score_robots(model, with_shuffled_pictures(tasks))

    report = export_safetensors(output_dir, artifact, overwrite=overwrite)
    exported = _captions(
        BitGen.load(artifact, device=device), pictures, "The same from the exported file"
    )
    num_equal = sum(
        caption.token_ids == other.token_ids
        for caption, other in zip(captions, exported, strict=True)
    )
    _draw(model, pictures, captions, tasks, sheet)
    seconds = time.monotonic() - started

    if json:
        console.json(
            {
                "run": str(output_dir),
                "scenes": str(scenes_dir),
                "artifact": str(artifact),
                "sheet": str(sheet),
                "steps": summary.steps,
                "first_loss": summary.first_loss,
                "loss": summary.loss,
                "num_captions": scores.num_captions,
                "object_right": scores.object,
                "colour_right": scores.colour,
                "place_right": scores.place,
                "all_right": scores.all,
                "num_tasks": len(tasks),
                "robots_exact_match": robots_right,
                "robots_exact_match_shuffled": robots_right_shuffled,
                "artifact_captions_equal": num_equal,
                "artifact_bytes": report.bytes,
                "seconds": seconds,
            }
        )
    else:
        console.table(
            ("learnt, on scenes with unseen combinations", ""),
            [
                ("captions with the right object", f"{scores.object:.1%}"),
                ("captions with the right colour", f"{scores.colour:.1%}"),
                ("captions with the right place", f"{scores.place:.1%}"),
                ("captions with all three right", f"{scores.all:.1%} of {scores.num_captions}"),
                ("tasks with exactly the right robots", f"{robots_right:.1%} of {len(tasks)}"),
                ("the same with shuffled pictures", f"{robots_right_shuffled:.1%}"),
                ("exported captions equal to the run's", f"{num_equal} of {len(captions)}"),
            ],
        )
        console.result("")
        console.table(
            ("written", ""),
            [
                ("run", str(output_dir)),
                ("exported file", f"{artifact} ({file_size(report.bytes)})"),
                ("picture sheet", str(sheet)),
                ("training curves", str(summary.curves)),
                ("scenes", str(scenes_dir)),
            ],
        )
        console.result(
            f"\nTook {duration(seconds)}. Try it:"
            f" bitgen infer {scenes_dir / 'val2017'} --model {artifact}"
        )
    if num_equal != len(captions):
        raise BitGenError(
            f"{len(captions) - num_equal} captions of the exported file differ from the run's."
        )


def _captions(model: BitGen, pictures: list[Path], activity: str) -> list[Caption]:
    """Greedy captions, with a progress bar."""
    step = 64
    captions: list[Caption] = []
    with console.progress(activity) as bar:
        for start in range(0, len(pictures), step):
            batch = pictures[start : start + step]
            captions += model.caption(batch, max_tokens=MAX_TOKENS, batch_size=step)
            bar.update(len(captions), len(pictures))
    return captions


def _draw(
    model: BitGen,
    pictures: list[Path],
    captions: list[Caption],
    tasks: list[RobotTask],
    sheet: Path,
) -> None:
    """The picture sheet: scenes spread over the held-out ones, their captions, a task's robots."""
    from bitgen.inference.sheet import SheetItem, draw_sheet

    task_of = {task.image.resolve(): task for task in reversed(tasks) if task.image is not None}
    count = min(SHEET_SCENES, len(pictures))
    items = []
    for index in (len(pictures) * number // count for number in range(count)):
        lines = [captions[index].text]
        task = task_of.get(pictures[index].resolve())
        if task is not None:
            ranked = model.select_robots(task.task, pictures[index])
            chosen = [robot for robot in ranked if robot.chosen]
            lines += [
                f"Task: {task.task}",
                ", ".join(f"{robot.name} {robot.probability:.0%}" for robot in chosen),
            ]
        items.append(SheetItem(pictures[index], lines))
    draw_sheet(items, sheet, columns=SHEET_COLUMNS)

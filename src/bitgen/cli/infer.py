"""`bitgen infer`: captions of pictures, and robots for a task."""

from __future__ import annotations

import contextlib
import glob
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitgen.cli.answers import show_answer
from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.cli.models import (
    Backend,
    BatchSize,
    BeamSize,
    Consensus,
    Device,
    LengthPenalty,
    MaxTokens,
    ModelToAsk,
    Temperature,
    Threads,
    model_to_ask,
    with_decoding,
)
from bitgen.console import console
from bitgen.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from bitgen.console import ProgressBar
    from bitgen.dataset.plans import Subtask
    from bitgen.inference.predictor import Answer, BitGen

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def infer(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="Files, folders and globs; may be left out where --task is given.",
        ),
    ] = None,
    model: ModelToAsk = None,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="Words that the caption begins with.")
    ] = "",
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TEXT", help="A job: rank the robots for it and the picture."
        ),
    ] = None,
    robots: Annotated[
        Path | None,
        typer.Option(
            "--robots",
            metavar="FILE",
            help="Robot catalog (JSON) to choose from, also of robots that were not trained on."
            " Default: the model's own.",
        ),
    ] = None,
    robot_threshold: Annotated[
        float | None,
        typer.Option(
            "--robot_threshold",
            metavar="0..1",
            help="Probability from which a robot is chosen. Default: the one that the training's"
            " validation found.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say why each robot is ranked so: the words of task and robot, and the pieces of"
            " the picture, without which its score changes most.",
        ),
    ] = False,
    beam_size: BeamSize = None,
    length_penalty: LengthPenalty = 1.0,
    consensus: Consensus = None,
    temperature: Temperature = 0.0,
    top_k: Annotated[
        int, typer.Option("--top_k", help="Draw among so many likeliest tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top_p", help="Draw among the tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes drawing repeatable.")] = None,
    max_tokens: MaxTokens = 40,
    attention_window: Annotated[
        int,
        typer.Option(
            "--attention_window",
            help="Tokens that each token looks back on, beside the picture and the first four;"
            " memory then stays the same and --max_tokens may be any number. 0: all.",
        ),
    ] = 0,
    speculative: Annotated[
        bool | None,
        typer.Option(
            "--speculative/--no_speculative",
            show_default=False,
            help="Draft several tokens and check them in one call: the same greedy captions, by a"
            " model of --predict_tokens 2 or more. Default: where PyTorch runs, up to four pictures"
            " at a time.",
        ),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            "--heatmap",
            metavar="DIR",
            help="Draw there, in a folder for each picture, where on it the decoder's attention lay"
            " for each word. It shows where the layers looked, not why they answered so.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Split the --task into ordered subtasks, each with a robot."),
    ] = False,
    max_subtasks: Annotated[
        int, typer.Option("--max_subtasks", help="Most subtasks of a --plan.")
    ] = 8,
    plan_robots: Annotated[
        str,
        typer.Option(
            "--plan_robots",
            metavar="auto|decoder|selector",
            help="Who gives the subtasks of a --plan their robots. auto: the decoder that writes"
            " them; for a catalog with robots that it was not trained with, the robot selector.",
        ),
    ] = "auto",
    watch: Annotated[
        Path | None,
        typer.Option(
            "--watch",
            metavar="DIR",
            help="Answer for each picture that arrives in this folder, as soon as it is whole,"
            " until Ctrl-C.",
        ),
    ] = None,
    include_existing: Annotated[
        bool,
        typer.Option(
            "--include_existing", help="With --watch: also for the pictures that are there already."
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, in input order.")
    ] = False,
) -> None:
    """Caption pictures and, with --task, rank the robots for a job and plan it.

    A picture that cannot be read is reported, the others go on, and the exit code is 2 (with
    --watch it is 0).
    """
    if watch is not None and images:
        raise InputError(
            "--watch answers for a folder's new pictures, and pictures are named too.",
            remedy="Give one of them; --include_existing begins with what the folder holds.",
        )
    if include_existing and watch is None:
        raise InputError(
            "--include_existing goes with --watch.", remedy="Name the folder: --watch DIR."
        )
    if not images and task is None and watch is None:
        raise InputError(
            "No picture is given.",
            remedy="Name files, folders or globs, or ask with --task or --watch.",
        )
    if task is not None and not task.strip():
        raise InputError("--task is empty.", remedy='Say the job: --task "bring the red ball".')
    for option, is_given in (
        ("--robots", robots is not None),
        ("--robot_threshold", robot_threshold is not None),
        ("--explain", explain),
    ):
        if is_given and task is None:
            raise InputError(f"{option} is for choosing robots: give --task too.")
    if plan and task is None:
        raise InputError("--plan splits a task, and none is given.", remedy="Give --task too.")
    paths = find_images(images or [])
    if heatmap is not None and not paths and watch is None:
        raise InputError("--heatmap draws on pictures, and none is given.")
    if heatmap is not None and attention_window:
        raise InputError(
            "--heatmap draws attention over the whole caption, --attention_window cuts it off:"
            " give one of them."
        )
    if heatmap is not None and backend == "native":
        raise InputError(
            "--heatmap draws attention, which the native engine does not give out.",
            remedy="Leave --backend native out: PyTorch then draws.",
        )
    arriving = None
    if watch is not None:
        from bitgen.inference.watch import FolderWatch

        # Before the model is loaded: what arrives meanwhile is new.
        arriving = FolderWatch(watch, include_existing)
    source = model_to_ask(model)

    from bitgen.inference.predictor import BitGen, CaptionOptions

    options = CaptionOptions(
        beam_size=1 if beam_size is None else beam_size,
        length_penalty=length_penalty,
        consensus=consensus or 0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        batch_size=batch_size,
        attention_window=attention_window,
        speculative=speculative,
    )
    plan_options = None
    if plan:
        from bitgen.inference.planning import PlanOptions

        plan_options = PlanOptions(
            max_subtasks=max_subtasks, temperature=temperature, seed=seed, robots_by=plan_robots
        )
    folder_plan = None
    if heatmap is not None:
        from bitgen.inference.heatmap import FolderPlan

        folder_plan = FolderPlan(heatmap)
    folders = [None if folder_plan is None else folder_plan.folder(path) for path in paths]
    bitgen = BitGen.load(source, device=device, backend=backend, threads=threads)
    options = with_decoding(options, beam_size, consensus, bitgen.config)
    if console.debug:
        console.note(backend_words(bitgen))
    if robots is not None:
        bitgen.set_catalog(robots)
    if robot_threshold is not None:
        bitgen.robot_threshold = robot_threshold
    ranks = task is not None and (bool(bitgen.config.robot_names) or not plan)
    if ranks and not bitgen.config.robot_names:
        console.warning("This model was trained without robot tasks: its ranking means nothing.")
    reads_only = bitgen.config.attention_mode == "bidirectional"
    if reads_only and (task is None or heatmap is not None):
        raise InputError(
            "This model's attention is bidirectional: it ranks robots, but writes no captions.",
            remedy="Ask with --task and without --heatmap, or take a model of another"
            " --attention_mode.",
        )
    draw = None if heatmap is None else _map_drawer(bitgen, prompt)
    if not paths and arriving is None:
        assert task is not None
        subtasks = bitgen.plan(task, options=plan_options) if plan else None
        ranked = bitgen.select_robots(task) if ranks else None
        if explain and ranked is not None:
            ranked = bitgen.explain_robots(ranked, task)
        show_answer(None, None, ranked, json, subtasks)
        return
    if plan and not bitgen.writes_plans:
        assert task is not None
        bitgen.plan(task)  # says why not, before pictures are read

    def answers_for(pictures: Sequence[Path]) -> Generator[Answer, None, None]:
        return bitgen.answers(
            pictures, options, prompt=prompt, task=task if ranks else None, captions=not reads_only
        )

    def planned(answer: Answer) -> list[Subtask] | None:
        if not plan:
            return None
        assert task is not None and answer.pixels_3SS is not None
        return bitgen.plan(task, picture_of(answer.pixels_3SS), options=plan_options)

    def show(answer: Answer, folder: Path | None) -> None:
        if answer.error is not None:
            console.error(answer.error.message, answer.error.remedy)
            return
        ranked = answer.robots
        if explain and ranked is not None and task is not None:
            ranked = bitgen.explain_robots(ranked, task, answer.pixels_3SS)
        picture = Path(str(answer.picture))
        show_answer(picture, answer.caption, ranked, json, planned(answer))
        if draw is not None and folder is not None:
            sheet = draw(answer, folder)
            if not json:
                console.result(f"  heat maps: {sheet}")

    if arriving is not None:
        from bitgen.cli.watch import answer_arriving

        def show_arrived(answer: Answer) -> None:
            show(
                answer,
                None if folder_plan is None else folder_plan.folder(Path(str(answer.picture))),
            )

        answer_arriving(arriving, answers_for, show_arrived, include_existing)
        return
    num_bad = 0
    with contextlib.closing(answers_for(paths)) as answers, _progress(len(paths)) as bar:
        for number, (folder, answer) in enumerate(zip(folders, answers, strict=True), start=1):
            show(answer, folder)
            num_bad += answer.error is not None
            if bar is not None:
                bar.update(number, len(paths))
    if num_bad:
        if len(paths) > 1:
            console.error(f"{num_bad} of {len(paths)} pictures could not be read.")
        raise typer.Exit(EXIT_BAD_INPUT)


def backend_words(bitgen: BitGen) -> str:
    """Which backend a model runs on and, where it is not the native engine, why."""
    if bitgen.backend == "native":
        return "Runs on the native engine."
    because = f": {bitgen.why_torch}" if bitgen.why_torch else "."
    return f"Runs in PyTorch{because}"


def _map_drawer(bitgen: BitGen, prompt: str) -> Callable[[Answer, Path], Path]:
    """Draws the maps of one answer into a folder and returns the sheet of all words."""
    from bitgen.inference.heatmap import attention_maps, draw_maps, patch_grid

    grid = patch_grid(bitgen)

    def draw(answer: Answer, folder: Path) -> Path:
        assert answer.caption is not None and answer.pixels_3SS is not None
        picture = picture_of(answer.pixels_3SS)
        return draw_maps(attention_maps(bitgen, picture, answer.caption, prompt, grid), folder)

    return draw


def picture_of(pixels_3SS: np.ndarray) -> Image.Image:
    """What a model saw, uint8 `[3, S, S]`, as a picture that it sees again."""
    from PIL import Image

    return Image.fromarray(pixels_3SS.transpose(1, 2, 0))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[ProgressBar | None]:
    """A bar where the answers themselves are not seen: they go to a file or a program."""
    if total == 1 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield None
        return
    with console.progress("Answering", "pictures") as bar:
        yield bar


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The files that the arguments name, in their order; sorted within a folder and a glob.

    Raises InputError for what does not exist, a folder without pictures, a glob without files.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = [
                file
                for file in sorted(path.iterdir())
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            ]
            if not files:
                raise InputError(
                    f"The folder {argument} holds no pictures.",
                    remedy=f"Pictures are known by their ending: {', '.join(IMAGE_SUFFIXES)}.",
                )
            found += files
        elif path.exists():
            found.append(path)
        elif glob.has_magic(argument):
            files = [
                file
                for file in map(Path, sorted(glob.glob(argument, recursive=True)))
                if file.is_file()
            ]
            if not files:
                raise InputError(f"No file matches {argument}.")
            found += files
        else:
            raise InputError(f"There is no file or folder {argument}.")
    return found

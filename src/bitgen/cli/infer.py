"""`bitgen infer`: captions of pictures, and robots for a task."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.cli.models import model_or_newest_run
from bitgen.config import DEVICES
from bitgen.console import console
from bitgen.errors import InputError

if TYPE_CHECKING:
    from bitgen.console import ProgressBar
    from bitgen.inference.predictor import Answer, BitGen, Caption, RobotChoice

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def infer(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="Files, folders and globs; may be left out where --task is given.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="RUN_OR_FILE",
            help="Run folder or exported file. Default: the newest run in ./runs.",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="Words that the caption begins with.")
    ] = "",
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TEXT", help="A job: rank the robots for it and the picture."
        ),
    ] = None,
    beam_size: Annotated[
        int, typer.Option("--beam_size", help="Captions searched side by side; 1 is greedy.")
    ] = 1,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Draw words at random; 0 takes the likeliest.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top_k", help="Draw among so many likeliest tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top_p", help="Draw among the tokens that hold this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes drawing repeatable.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max_tokens", help="Longest caption, in tokens.")
    ] = 40,
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
    batch_size: Annotated[int, typer.Option("--batch_size", help="Pictures at a time.")] = 16,
    device: Annotated[
        str, typer.Option("--device", metavar="|".join(DEVICES), help="Where to run.")
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="auto|native|torch",
            help="native: the CPU, without PyTorch; torch: PyTorch. auto: native where it can.",
        ),
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Processor threads. Default: one a core."),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            "--heatmap",
            metavar="DIR",
            help="Draw there, in a folder for each picture, where on it the decoder's attention lay"
            " for each word. It shows where the layers looked, not why they answered so.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, in input order.")
    ] = False,
) -> None:
    """Caption pictures and, with --task, rank the robots for a job.

    A picture that cannot be read is reported, the others go on, and the exit code is 2.
    """
    if not images and task is None:
        raise InputError(
            "No picture is given.", remedy="Name files, folders or globs, or ask with --task."
        )
    if task is not None and not task.strip():
        raise InputError("--task is empty.", remedy='Say the job: --task "bring the red ball".')
    paths = find_images(images or [])
    if heatmap is not None and not paths:
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
    source = model_or_newest_run(model)

    from bitgen.inference.predictor import BitGen, CaptionOptions

    options = CaptionOptions(
        beam_size=beam_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        batch_size=batch_size,
        attention_window=attention_window,
        speculative=speculative,
    )
    folders: list[Path] | list[None] = [None] * len(paths)
    if heatmap is not None:
        from bitgen.inference.heatmap import plan_folders

        folders = plan_folders(heatmap, paths)
    bitgen = BitGen.load(source, device=device, backend=backend, threads=threads)
    if console.debug:
        console.note(backend_words(bitgen))
    if task is not None and not bitgen.config.robot_names:
        console.warning("This model was trained without robot tasks: its ranking means nothing.")
    reads_only = bitgen.config.attention_mode == "bidirectional"
    if reads_only and (task is None or heatmap is not None):
        raise InputError(
            "This model's attention is bidirectional: it ranks robots, but writes no captions.",
            remedy="Ask with --task and without --heatmap, or take a model of another"
            " --attention_mode.",
        )
    draw = None if heatmap is None else _map_drawer(bitgen, prompt)
    if not paths:
        assert task is not None
        _show(None, None, bitgen.select_robots(task), json)
        return
    num_bad = 0
    answers = bitgen.answers(paths, options, prompt=prompt, task=task, captions=not reads_only)
    with contextlib.closing(answers), _progress(len(paths)) as bar:
        for number, (path, folder, answer) in enumerate(
            zip(paths, folders, answers, strict=True), start=1
        ):
            if answer.error is not None:
                console.error(answer.error.message, answer.error.remedy)
                num_bad += 1
            else:
                _show(path, answer.caption, answer.robots, json)
            if draw is not None and folder is not None and answer.error is None:
                sheet = draw(answer, folder)
                if not json:
                    console.result(f"  heat maps: {sheet}")
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
    from PIL import Image

    from bitgen.inference.heatmap import attention_maps, draw_maps, patch_grid

    grid = patch_grid(bitgen)

    def draw(answer: Answer, folder: Path) -> Path:
        assert answer.caption is not None and answer.pixels_3SS is not None
        picture = Image.fromarray(answer.pixels_3SS.transpose(1, 2, 0))
        return draw_maps(attention_maps(bitgen, picture, answer.caption, prompt, grid), folder)

    return draw


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


def _show(
    image: Path | None,
    caption: Caption | None,
    robots: Sequence[RobotChoice] | None,
    json: bool,
) -> None:
    """Print what was said of one picture, or of a task without one."""
    if json:
        line: dict[str, Any] = {
            "image": None if image is None else str(image),
            "caption": None if caption is None else caption.text,
            "tokens": None if caption is None else caption.tokens,
            "log_probability": None if caption is None else caption.log_probability,
        }
        if caption is not None and caption.speculation is not None:
            line["speculation"] = dataclasses.asdict(caption.speculation)
        if robots is not None:
            line["robots"] = [
                {"name": robot.name, "probability": robot.probability} for robot in robots
            ]
        console.json(line)
        return
    if image is not None:
        console.result(str(image))
    if caption is not None:
        console.result(f"  {caption.text}")
    for robot in robots or ():
        console.result(f"  {robot.probability:6.1%}  {robot.name}")

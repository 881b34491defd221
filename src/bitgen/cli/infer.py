"""`bitgen infer`: captions of pictures, and robots for a task."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen.cli.failures import EXIT_BAD_INPUT
from bitgen.cli.models import model_or_newest_run
from bitgen.config import DEVICES
from bitgen.console import console
from bitgen.errors import ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from bitgen.config import BitGenConfig
    from bitgen.inference.predictor import Caption, RobotChoice

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
            " model of --predict_tokens 2 or more. Default: up to four pictures at a time.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Pictures at a time.")] = 16,
    device: Annotated[
        str, typer.Option("--device", metavar="|".join(DEVICES), help="Where to run.")
    ] = "auto",
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
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}.")
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
    source = model_or_newest_run(model)

    from bitgen.inference.predictor import BitGen

    folders: list[Path] | list[None] = [None] * len(paths)
    if heatmap is not None:
        from bitgen.inference.heatmap import attention_maps, draw_maps, patch_grid, plan_folders

        folders = plan_folders(heatmap, paths)
    bitgen = BitGen.load(source, device=device)
    if task is not None and not bitgen.config.robot_names:
        console.warning("This model was trained without robot tasks: its ranking means nothing.")
    reads_only = bitgen.config.attention_mode == "bidirectional"
    if reads_only and (task is None or heatmap is not None):
        raise InputError(
            "This model's attention is bidirectional: it ranks robots, but writes no captions.",
            remedy="Ask with --task and without --heatmap, or take a model of another"
            " --attention_mode.",
        )
    grid = None if heatmap is None else patch_grid(bitgen)
    if not paths:
        assert task is not None
        _show(Answer(None, None, bitgen.select_robots(task)), json)
        return
    num_bad = 0
    for start in range(0, len(paths), batch_size):
        readable = []
        batch = slice(start, start + batch_size)
        read = _read_pictures(paths[batch], bitgen.config)
        for (path, picture), folder in zip(read, folders[batch], strict=True):
            if isinstance(picture, ImageError):
                console.error(picture.message, picture.remedy)
                num_bad += 1
            else:
                readable.append((path, picture, folder))
        if not readable:
            continue
        pictures = [picture for _, picture, _ in readable]
        captions: list[Caption] | list[None] = [None] * len(pictures)
        if not reads_only:
            captions = bitgen.caption(
                pictures,
                prompt=prompt,
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
        ranked: list[list[RobotChoice]] | list[None] = [None] * len(pictures)
        if task is not None:
            ranked = bitgen.select_robots_batch(
                [task] * len(pictures), pictures, batch_size=batch_size
            )
        for (path, picture, folder), caption, robots in zip(
            readable, captions, ranked, strict=True
        ):
            _show(Answer(path, caption, robots), json)
            if folder is None or caption is None:
                continue
            sheet = draw_maps(attention_maps(bitgen, picture, caption, prompt, grid), folder)
            if not json:
                console.result(f"  heat maps: {sheet}")
    if num_bad:
        if len(paths) > 1:
            console.error(f"{num_bad} of {len(paths)} pictures could not be read.")
        raise typer.Exit(EXIT_BAD_INPUT)


@dataclass(frozen=True)
class Answer:
    """What is printed for one picture, or for a task without one."""

    image: Path | None
    caption: Caption | None
    robots: Sequence[RobotChoice] | None


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


def _read_pictures(
    paths: Sequence[Path], config: BitGenConfig
) -> Iterator[tuple[Path, Image | ImageError]]:
    """Each file decoded once, already at the model's size, or why it cannot be; in order."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    from bitgen.dataset.images import available_cpus, load_image

    def read(path: Path) -> Image.Image | ImageError:
        try:
            pixels_3SS = load_image(path, config.image_size, config.image_resize)
        except ImageError as error:
            return error
        return Image.fromarray(pixels_3SS.transpose(1, 2, 0))

    with ThreadPoolExecutor(available_cpus()) as threads:
        yield from zip(paths, threads.map(read, paths), strict=True)


def _show(answer: Answer, json: bool) -> None:
    caption, robots = answer.caption, answer.robots
    if json:
        line: dict[str, Any] = {
            "image": None if answer.image is None else str(answer.image),
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
    if answer.image is not None:
        console.result(str(answer.image))
    if caption is not None:
        console.result(f"  {caption.text}")
    for robot in robots or ():
        console.result(f"  {robot.probability:6.1%}  {robot.name}")

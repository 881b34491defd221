"""`bitgen evaluate`: figures of a model, or of any captioner's results file, on held-out data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen.cli.models import (
    BatchSize,
    BeamSize,
    Consensus,
    Device,
    LengthPenalty,
    MaxTokens,
    Temperature,
    Threads,
    model_to_ask,
    with_decoding,
)
from bitgen.console import console
from bitgen.errors import DatasetError, InputError
from bitgen.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from bitgen.console import ProgressBar
    from bitgen.dataset.coco import CaptionedImage
    from bitgen.dataset.robots import RobotTask
    from bitgen.inference.answers import Caption
    from bitgen.inference.evaluate import CaptionScores, CaptionStatistics, RobotScores
    from bitgen.inference.predictor import BitGen
    from bitgen.training.held_out import HeldOutLoss

PICTURES = ("given", "blank", "shuffled")
SPLITS = ("train", "val", "test")
ROBOT_SPLITS = ("all", "train", "val")


def evaluate(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="RUN_OR_FILE",
            help="Run folder or exported file. Default: that of `bitgen infer`.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            metavar="FILE",
            help="Score this results file (COCO's format) of any captioner, without a model.",
        ),
    ] = None,
    coco_data: Annotated[
        list[Path] | None,
        typer.Option("--coco_data", metavar="DIR", help="Folder in COCO layout; may be repeated."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="|".join(SPLITS),
            help="Pictures to evaluate on; test: Karpathy's (dataset_coco.json).",
        ),
    ] = "val",
    robot_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--robot_data",
            metavar="FILE",
            help="Robot tasks to choose robots for; may be repeated.",
        ),
    ] = None,
    robot_split: Annotated[
        str,
        typer.Option(
            "--robot_split",
            metavar="|".join(ROBOT_SPLITS),
            help="Which of the tasks; val and train are the parts that training divides them in.",
        ),
    ] = "all",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Probability from which a robot is chosen. Default: the model's own.",
        ),
    ] = None,
    pictures: Annotated[
        str,
        typer.Option(
            "--pictures",
            metavar="|".join(PICTURES),
            help="What the model sees: each picture, grey, or another's picture. The difference"
            " is what looking adds.",
        ),
    ] = "given",
    beam_size: BeamSize = None,
    length_penalty: LengthPenalty = 1.0,
    consensus: Consensus = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of words that are drawn.")] = 0,
    max_tokens: MaxTokens = 40,
    batch_size: BatchSize = 16,
    limit: Annotated[
        int, typer.Option("--limit", help="Evaluate on the first so many pictures; 0: all.")
    ] = 0,
    loss: Annotated[
        bool,
        typer.Option("--loss/--no_loss", help="Loss and perplexity, computed by PyTorch."),
    ] = True,
    java: Annotated[
        bool,
        typer.Option(
            "--java/--no_java", help="Use Java, where it is, to split words and for METEOR."
        ),
    ] = True,
    device: Device = "auto",
    backend: Annotated[
        str,
        typer.Option(
            "--backend", metavar="auto|native|torch", help="What writes the captions; see infer."
        ),
    ] = "auto",
    threads: Threads = None,
    write_predictions: Annotated[
        Path | None,
        typer.Option(
            "--write_predictions", metavar="FILE", help="Write the captions in COCO's format."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page with figures and pictures."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score captions and chosen robots on data that a model was not trained on.

    BLEU, ROUGE-L, CIDEr and METEOR are those of the COCO evaluation (pip install "bitgen[eval]").
    """
    _check(predictions, model, coco_data, robot_data, split, robot_split, pictures, limit)
    from bitgen.inference.evaluate import require_scorers, write_results

    if coco_data:
        require_scorers()
    images = _images(coco_data, split, limit, predictions is None)
    figures: dict[str, Any] = {}
    captions: dict[Any, str] = {}
    bitgen: BitGen | None = None
    source: Path | None = None
    held_out: HeldOutLoss | None = None
    robot_scores: RobotScores | None = None
    said: dict[Any, Caption] = {}
    if predictions is not None:
        figures["predictions"] = str(predictions)
        captions = _predicted(predictions, images, limit)
    else:
        from bitgen.inference.predictor import BitGen, CaptionOptions

        source = model_to_ask(model)
        bitgen = BitGen.load(source, device=device, backend=backend, threads=threads)
        if threshold is not None:
            bitgen.robot_threshold = threshold
        figures["model"] = str(source)
        reads_only = bitgen.config.attention_mode == "bidirectional"
        if images and reads_only:
            raise InputError("This model's attention is bidirectional: it writes no captions.")
        tasks = _tasks(robot_data, robot_split, bitgen)
        with_loss = bool(images) and loss and backend != "native"
        total = len(images) * (2 if with_loss else 1) + len(tasks)
        with console.progress("Evaluating", "answers") as bar:
            if images:
                options = CaptionOptions(
                    beam_size=1 if beam_size is None else beam_size,
                    length_penalty=length_penalty,
                    consensus=consensus or 0,
                    temperature=temperature,
                    seed=seed,
                    max_tokens=max_tokens,
                    batch_size=batch_size,
                )
                options = with_decoding(options, beam_size, consensus, bitgen.config)
                images, said = _captions(bitgen, images, pictures, options, bar, total)
                captions = {image_id: caption.text for image_id, caption in said.items()}
            if with_loss:
                held_out = _loss(bitgen, images, pictures, batch_size, bar, len(images), total)
            if tasks:
                robot_scores = _robots(bitgen, tasks, pictures, batch_size)
                bar.update(total, total)
    scores: CaptionScores | None = None
    statistics: CaptionStatistics | None = None
    if captions:
        scores, statistics = _score(images, captions, coco_data or [], split, java)
    figures |= _figures(split if images else None, pictures, scores, statistics, held_out)
    if robot_scores is not None:
        figures["robots"] = robot_figures(robot_scores)
    if write_predictions is not None:
        write_results(captions, write_predictions)
    if report is not None:
        run = source if bitgen is not None else None
        draw = _overlays(bitgen, said, images, pictures, backend)
        _report(report, figures, images, captions, scores, statistics, robot_scores, run, draw)
    if json:
        console.json(figures)
        return
    _show(figures, robot_scores)
    if report is not None:
        console.result(f"Report: {report}")
    if write_predictions is not None:
        console.result(f"Captions: {write_predictions}")


def _check(
    predictions: Path | None,
    model: Path | None,
    coco_data: Sequence[Path] | None,
    robot_data: Sequence[Path] | None,
    split: str,
    robot_split: str,
    pictures: str,
    limit: int,
) -> None:
    for name, value, choices in (
        ("--split", split, SPLITS),
        ("--robot_split", robot_split, ROBOT_SPLITS),
        ("--pictures", pictures, PICTURES),
    ):
        if value not in choices:
            raise InputError(f"{name} is one of {', '.join(choices)}; got {value!r}.")
    if limit < 0:
        raise InputError(f"--limit is a number of pictures, 0 or more; got {limit}.")
    if predictions is not None and model is not None:
        raise InputError("--predictions scores a file, --model a model: give one of them.")
    if predictions is not None and (robot_data or pictures != "given"):
        raise InputError("--robot_data and --pictures need a model, --predictions has none.")
    if predictions is not None and not coco_data:
        raise InputError(
            "There is nothing to score the captions against.", remedy="Name it: --coco_data DIR."
        )
    if not coco_data and not robot_data:
        raise InputError(
            "There is nothing to evaluate on.",
            remedy="Name captioned pictures (--coco_data DIR), robot tasks (--robot_data FILE) or"
            " both.",
        )


def _images(
    coco_data: Sequence[Path] | None, split: str, limit: int, needs_pictures: bool
) -> list[CaptionedImage]:
    if not coco_data:
        return []
    from bitgen.dataset.coco import load_coco

    images = load_coco(coco_data, split, needs_pictures)  # type: ignore[arg-type]
    ids = {image.image_id for image in images}
    if len(ids) < len(images):
        raise InputError(
            "The same image ids stand in several of the folders, so captions of theirs cannot be"
            " told apart.",
            remedy="Evaluate on one folder after the other.",
        )
    return images[:limit] if limit and needs_pictures else images


def _predicted(path: Path, images: Sequence[CaptionedImage], limit: int) -> dict[Any, str]:
    """The captions of a results file, in the order of the pictures."""
    from bitgen.inference.evaluate import read_results

    found = read_results(path)
    known = {image.image_id for image in images}
    # Ids are numbers in COCO; a captioner may have written them as text.
    by_id = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in found.items()}
    unknown = [image_id for image_id in by_id if image_id not in known]
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(by_id)} captions are of pictures that the split does"
            f" not have, such as {unknown[0]!r}.",
            remedy="Name the split that the captions were written for: --split.",
        )
    if len(by_id) < len(images):
        console.warning(
            f"{path} has captions of {len(by_id):,} of {len(images):,} pictures: those are scored."
        )
    ordered = {image.image_id: by_id[image.image_id] for image in images if image.image_id in by_id}
    return dict(list(ordered.items())[:limit]) if limit else ordered


def _shown(images: Sequence[CaptionedImage], pictures: str, size: int) -> list[Any]:
    """What the model is shown for each of the pictures: paths, or a grey picture each."""
    if pictures == "blank":
        from PIL.Image import new

        return [new("RGB", (size, size), (128, 128, 128))] * len(images)
    if pictures == "shuffled":
        # A cycle through a random order: with two pictures or more, none stays with its captions.
        order = list(range(len(images)))
        random.Random(0).shuffle(order)
        of = dict(zip(order, order[1:] + order[:1], strict=True))
        return [images[of[index]].path for index in range(len(images))]
    return [image.path for image in images]


def _captions(
    bitgen: BitGen,
    images: Sequence[CaptionedImage],
    pictures: str,
    options: Any,
    bar: ProgressBar,
    total: int,
) -> tuple[list[CaptionedImage], dict[Any, Caption]]:
    """The pictures that can be read, and what the model says of them."""
    shown = _shown(images, pictures, bitgen.config.image_size)
    readable, said = [], {}
    for number, (image, answer) in enumerate(
        zip(images, bitgen.answers(shown, options), strict=True), start=1
    ):
        if answer.error is not None:
            console.warning(f"Left out: {answer.error.message}")
        else:
            assert answer.caption is not None
            readable.append(image)
            said[image.image_id] = answer.caption
        bar.update(number, total)
    if not said:
        raise DatasetError("None of the pictures can be read.")
    return readable, said


class _Pixels:
    """Pixels of what the model is shown, by the path of the picture that it stands for."""

    def __init__(self, images: Sequence[CaptionedImage], pictures: str, bitgen: BitGen) -> None:
        self._config = bitgen.config
        shown = _shown(images, pictures, bitgen.config.image_size)
        self._shown = {image.path: picture for image, picture in zip(images, shown, strict=True)}

    def __getitem__(self, path: Path) -> np.ndarray:
        from bitgen.inference.pipeline import picture_pixels

        return picture_pixels(self._shown[path], self._config)


def _loss(
    bitgen: BitGen,
    images: Sequence[CaptionedImage],
    pictures: str,
    batch_size: int,
    bar: ProgressBar,
    done: int,
    total: int,
) -> HeldOutLoss:
    from bitgen.config import TrainingConfig
    from bitgen.training.held_out import held_out_loss

    known = bitgen.info.get("training") or {}
    names = ("seed", "max_caption_tokens", "objective", "mlm_probability")
    training = TrainingConfig.from_dict({name: known[name] for name in names if name in known})
    return held_out_loss(
        bitgen.model,
        bitgen.tokenizer,
        images,
        _Pixels(images, pictures, bitgen),
        training,
        batch_size,
        on_progress=lambda count: bar.update(done + count, total),
    )


def _tasks(paths: Sequence[Path] | None, part: str, bitgen: BitGen) -> list[RobotTask]:
    if not paths:
        return []
    from bitgen.dataset.robots import load_tasks, split_tasks

    if not bitgen.config.robot_names:
        console.warning("This model was trained without robot tasks: its ranking means nothing.")
    tasks = load_tasks(paths, bitgen.catalog)
    if part == "all":
        return tasks
    train, val = split_tasks(tasks)
    return train if part == "train" else val


def _robots(
    bitgen: BitGen, tasks: Sequence[RobotTask], pictures: str, batch_size: int
) -> RobotScores:
    import numpy as np

    from bitgen.inference.evaluate import score_robots
    from bitgen.inference.scene_evaluation import with_shuffled_pictures

    seen: list[Any] = [task.image for task in tasks]
    if pictures == "shuffled":
        seen = [task.image for task in with_shuffled_pictures(tasks)]
    elif pictures == "blank":
        (grey,) = _shown([None], "blank", bitgen.config.image_size)  # type: ignore[list-item]
        seen = [None if image is None else grey for image in seen]
    names = [robot.name for robot in bitgen.catalog]
    ranked = bitgen.select_robots_batch([t.task for t in tasks], seen, batch_size=batch_size)
    choices = [{choice.name: choice for choice in of_task} for of_task in ranked]
    return score_robots(
        names,
        np.array([[row[name].probability for name in names] for row in choices]),
        np.array([[row[name].chosen for name in names] for row in choices]),
        np.array([[name in task.robots for name in names] for task in tasks]),
        bitgen.robot_threshold,
    )


def _score(
    images: Sequence[CaptionedImage],
    captions: Mapping[Any, str],
    coco_data: Sequence[Path],
    split: str,
    java: bool,
) -> tuple[CaptionScores, CaptionStatistics]:
    from bitgen.dataset.coco import load_coco
    from bitgen.inference.evaluate import caption_statistics, has_java, score_captions

    if java and has_java():
        console.note("Scoring by pycocoevalcap; METEOR, a Java program, takes its time.")
    references = {image.image_id: image.captions for image in images}
    scores = score_captions(references, captions, use_java=None if java else False)
    trained_on: list[str] | None = None
    with contextlib.suppress(DatasetError):
        training = load_coco(coco_data, "train", needs_pictures=False)
        # One split alone, divided for training, holds what is scored here.
        if split == "train" or not any(image.image_id in captions for image in training):
            trained_on = [caption for image in training for caption in image.captions]
    return scores, caption_statistics(list(captions.values()), trained_on)


def _figures(
    split: str | None,
    pictures: str,
    scores: CaptionScores | None,
    statistics: CaptionStatistics | None,
    held_out: HeldOutLoss | None,
) -> dict[str, Any]:
    figures: dict[str, Any] = {"pictures": pictures}
    if split is not None:
        figures["split"] = split
    if scores is not None and statistics is not None:
        figures["num_images"] = scores.num_images
        figures["tokenizer"] = scores.tokenizer
        names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
        figures |= {name: getattr(scores, name) for name in names}
        figures["mean_length"] = statistics.mean_length
        figures["vocabulary_size"] = statistics.vocabulary_size
        figures["distinct_share"] = statistics.distinct_share
        figures["copied_share"] = statistics.copied_share
    if held_out is not None:
        figures["loss"] = held_out.mean
        figures["perplexity"] = math.exp(min(held_out.mean, 700.0))
        figures["loss_tokens"] = held_out.num_tokens
    return figures


def robot_figures(scores: RobotScores) -> dict[str, Any]:
    """`RobotScores` as JSON values."""
    figures = dataclasses.asdict(scores)
    figures["robots"] = [
        {**dataclasses.asdict(robot), "f1": robot.f1, "num_tasks": robot.num_tasks}
        for robot in scores.robots
    ]
    return figures


LABELS = {
    "num_images": "pictures", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr",
    "spice": "SPICE", "loss": "loss a token (nats)", "perplexity": "perplexity",
    "mean_length": "words a caption", "vocabulary_size": "different words",
    "distinct_share": "different captions", "copied_share": "copied from training",
}  # fmt: skip
ROBOT_LABELS = {
    "num_tasks": "robot tasks", "threshold": "threshold", "exact_match": "exact match",
    "hamming_loss": "Hamming loss", "macro_f1": "macro F1", "micro_f1": "micro F1",
    "top_1": "top-1", "top_3": "top-3", "calibration_error": "calibration error (ECE)",
}  # fmt: skip
_AS_SHARES = ("distinct_share", "copied_share", "exact_match", "top_1", "top_3")


def labelled(figures: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and values for people; what was not computed is left out."""
    rows = []
    for name, label in labels.items():
        value = figures.get(name)
        if value is None:
            continue
        if name in _AS_SHARES:
            text = f"{value:.1%}"
        elif isinstance(value, int):
            text = f"{value:,}"
        else:
            text = f"{value:.2f}" if name in ("perplexity", "mean_length") else f"{value:.3f}"
        rows.append((label, text))
    return rows


def _show(figures: Mapping[str, Any], robots: RobotScores | None) -> None:
    rows = labelled(figures, LABELS)
    if robots is not None:
        rows += labelled(figures["robots"], ROBOT_LABELS)
    console.table(("", ""), rows)
    if figures.get("tokenizer"):
        console.note(f"Words were split by: {figures['tokenizer']}.")
    if robots is not None:
        console.table(
            ("robot", "tasks", "hits", "wrongly chosen", "missed", "F1"),
            [
                (r.name, r.num_tasks, r.hits, r.wrongly_chosen, r.missed, f"{r.f1:.3f}")
                for r in robots.robots
            ],
        )


def _report(
    path: Path,
    figures: Mapping[str, Any],
    images: Sequence[CaptionedImage],
    captions: Mapping[Any, str],
    scores: CaptionScores | None,
    statistics: CaptionStatistics | None,
    robots: RobotScores | None,
    run: Path | None,
    draw: Callable[[Any], Sequence[tuple[str, Image]]],
) -> None:
    from bitgen.inference import report

    rows = labelled(figures, LABELS)
    groups: list[report.Group] = []
    if scores is not None:
        by_id = {image.image_id: image for image in images}
        ranked = sorted(scores.images, key=lambda image_id: -scores.images[image_id].cider)
        few = min(6, max(1, len(ranked) // 3))
        drawn = random.Random(0).sample(ranked, few)
        for title, ids in (
            ("Best captions", ranked[:few]),
            ("Worst captions", ranked[::-1][:few]),
            ("Random captions", drawn),
        ):
            groups.append(
                report.Group(
                    title,
                    [
                        report.Example(
                            picture=by_id[image_id].path,
                            caption=captions[image_id],
                            references=by_id[image_id].captions,
                            score=scores.images[image_id].cider,
                            overlays=draw(image_id),
                        )
                        for image_id in ids
                    ],
                )
            )
    page = report.render(
        title=Path(str(figures.get("model") or figures.get("predictions"))).name,
        subtitle=_subtitle(figures),
        figures=rows,
        curves=_curves(run),
        groups=groups,
        lengths=dict(statistics.lengths) if statistics is not None else {},
        robots=robots,
        robot_figures=labelled(figures["robots"], ROBOT_LABELS) if robots is not None else [],
    )
    with write_whole(path, "report") as file:
        file.write(page.encode())


def _subtitle(figures: Mapping[str, Any]) -> str:
    parts = []
    if "split" in figures:
        parts.append(f"{figures['num_images']:,} pictures of the split {figures['split']}")
        parts.append(f"words split by {figures['tokenizer']}")
    if figures["pictures"] != "given":
        parts.append(f"{figures['pictures']} pictures")
    if "robots" in figures:
        parts.append(f"{figures['robots']['num_tasks']:,} robot tasks")
    return "; ".join(parts)


def _overlays(
    bitgen: BitGen | None,
    said: Mapping[Any, Caption],
    images: Sequence[CaptionedImage],
    pictures: str,
    backend: str,
) -> Callable[[Any], Sequence[tuple[str, Image]]]:
    """Draws where a model looked for each word; nothing where PyTorch cannot say."""
    if bitgen is None or not said or backend == "native" or pictures != "given":
        return lambda image_id: ()
    from PIL.Image import fromarray

    paths = {image.image_id: image.path for image in images}
    from bitgen.inference.heatmap import attention_maps, overlay, patch_grid

    try:
        grid = patch_grid(bitgen)
    except InputError as error:
        console.note(f"No attention is drawn: {error.message}")
        return lambda image_id: ()

    def draw(image_id: Any) -> list[tuple[str, Image]]:
        maps = attention_maps(bitgen, paths[image_id], said[image_id], grid=grid)
        photograph = fromarray(maps.picture_SS3).resize((112, 112))
        scale = max(float(maps.average.max(initial=0.0)), 4.0 / grid.side**2)
        return [
            (word, overlay(photograph, map_GG, scale, grid.offset))
            for word, map_GG in zip(maps.words, maps.average, strict=True)
        ]

    return draw


def _curves(model: Path | None) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Training and validation losses, and robots chosen exactly right, of a run's metrics."""
    metrics_path = None if model is None else model / "metrics.jsonl"
    if metrics_path is None or not metrics_path.is_file():
        return {}
    from bitgen.training.figures import read_metrics

    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for chart, kind, field, name in (
        ("Loss a token", "train", "loss", "training"),
        ("Loss a token", "validation", "loss", "validation"),
        ("Robots exactly right", "validation", "robot_exact_match", "validation"),
    ):
        points = [
            (float(line["step"]), float(line[field]))
            for line in read_metrics(metrics_path)
            if line["kind"] == kind and isinstance(line.get(field), (int, float))
        ]
        if len(points) > 1:
            lines.setdefault(chart, {})[name] = points
    return lines

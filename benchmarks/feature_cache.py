"""What an epoch on cached features of a frozen image encoder takes, against one that runs it.

    python benchmarks/feature_cache.py --coco_data ../shared/coco

Trains on the same few hundred photographs twice in turn, with `--cached_views 1` and `0`, and times
each epoch from its first update to its last, loading included, validation not. The first epoch of
each training does not count. Filling the cache is timed apart: it is done once. Losses of both must
agree: they learn the same, from features rounded to float16.

Without `--encoder_weights` the encoder's weights are random ones, which compute as long.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from common import interleave, make_parser, run, seconds_of, show_result

from bitgen.config import DEVICES, MODEL_SIZES, TrainingConfig
from bitgen.dataset.features import FeatureCache
from bitgen.errors import InputError
from bitgen.training import setup
from bitgen.training.events import StepReport, TrainerCallback
from bitgen.training.setup import DataSources, TrainingData, prepare_training

AGREEMENT = 0.05
"""Largest difference of the first epoch's mean loss, in nats a token. Ternary layers round, and
small differences grow from update to update; the first loss agrees within a thousandth."""


class Epochs(TrainerCallback):
    """Seconds, processor seconds and mean loss of each epoch."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}
        self.processor_ends: dict[int, float] = {}
        self.losses: dict[int, list[float]] = {}

    def on_step(self, report: StepReport) -> None:
        self.ends[report.epoch] = time.perf_counter()
        self.processor_ends[report.epoch] = time.process_time()
        if report.loss is not None:
            self.losses.setdefault(report.epoch, []).append(report.loss)

    def seconds(self) -> float:
        """Of the median epoch, without the first."""
        return _median_step(list(self.ends.values()))

    def processor_seconds(self) -> float:
        """The same of this process on all processors: other programs do not count."""
        return _median_step(list(self.processor_ends.values()))


def _median_step(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))


def main() -> int:
    arguments = read_arguments()
    fills: list[float] = []
    first_losses: dict[int, float] = {}
    processor: dict[int, list[float]] = {1: [], 0: []}
    with tempfile.TemporaryDirectory(prefix="bitgen-features-") as temporary:
        folder = Path(temporary)
        measure = partial(time_epochs, arguments, folder, fills, first_losses, processor)
        seconds = interleave({views: partial(measure, views) for views in (1, 0)}, arguments.rounds)
        cached, uncached = (statistics.median(seconds[views]) for views in (1, 0))
        bytes_on_disk = sum(file.stat().st_size for file in folder.glob("cache/*/*.features"))
    failures = []
    difference = abs(first_losses[1] - first_losses[0])
    if difference > AGREEMENT:
        failures.append(
            f"the first epoch's loss is {first_losses[1]:.3f} with the cache, {first_losses[0]:.3f}"
            " without"
        )
    count = arguments.num_images
    own_cached, own_uncached = (statistics.median(processor[views]) for views in (1, 0))
    rows = [
        (name, f"{wall:.1f}", f"{own:.1f}", f"{count / wall:.1f}", f"{own_uncached / own:.1f}")
        for name, wall, own in (
            ("encoder in every update", uncached, own_uncached),
            ("cached features", cached, own_cached),
        )
    ]
    rows.append(("filling the cache, once", f"{fills[0]:.1f}", "", f"{count / fills[0]:.1f}", ""))
    figures: dict[str, Any] = {
        "image_encoder": arguments.image_encoder,
        "encoder_weights": "random" if arguments.encoder_weights is None else "given",
        "image_size": arguments.image_size,
        "model_size": arguments.model_size,
        "num_images": count,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "seconds_uncached": uncached,
        "seconds_cached": cached,
        "ratio": uncached / cached,
        "processor_seconds_uncached": own_uncached,
        "processor_seconds_cached": own_cached,
        "processor_ratio": own_uncached / own_cached,
        "seconds_to_fill": fills[0],
        "bytes_on_disk": bytes_on_disk,
        "loss_cached": first_losses[1],
        "loss_uncached": first_losses[0],
        "rounds": {"cached": seconds[1], "uncached": seconds[0]},
    }
    columns = (
        f"{arguments.image_encoder}, {arguments.image_size} px",
        "s an epoch",
        "processor s",
        "images/s",
        "times, by processor s",
    )
    return show_result("feature_cache", figures, columns, rows, failures)


def time_epochs(
    arguments: argparse.Namespace,
    folder: Path,
    fills: list[float],
    first_losses: dict[int, float],
    processor: dict[int, list[float]],
    views: int,
) -> float:
    """Train a few epochs, and return the seconds of one."""
    epochs = Epochs()
    training = TrainingConfig(
        num_epochs=arguments.epochs + 1,
        batch_size=arguments.batch_size,
        augment=False,
        cached_views=views,
        device=arguments.device,
        warmup_steps=10,
        eval_every=10**9,
        save_every=10**9,
        weights_every=0,
    )
    read_data, prepare = setup.read_data, FeatureCache.prepare

    def read_few(*given: Any) -> TrainingData:
        data = read_data(*given)
        if len(data.train_images) < arguments.num_images:
            raise InputError(
                f"There are {len(data.train_images)} training pictures;"
                f" {arguments.num_images} were asked for.",
                remedy="Give a smaller --num_images.",
            )
        few = data.train_images[: arguments.num_images]
        return replace(data, train_images=few, val_images=[])

    def timed(self: FeatureCache, *args: Any, **options: Any) -> dict[Path, str]:
        bad: list[dict[Path, str]] = []
        fills.append(seconds_of(lambda: bad.append(prepare(self, *args, **options))))
        return bad[0]

    with (
        mock.patch.object(setup, "read_data", read_few),
        mock.patch.object(FeatureCache, "prepare", timed),
    ):
        trainer = prepare_training(
            DataSources(arguments.coco_data),
            folder / "run",
            arguments.model_size,
            {
                "image_encoder": arguments.image_encoder,
                "image_size": arguments.image_size,
                "freeze_encoder": True,
            },
            training,
            arguments.encoder_weights,
            cache_dir=folder / "cache",
            overwrite=True,
            callbacks=[epochs],
        )
    trainer.train()
    processor[views].append(epochs.processor_seconds())
    first_losses.setdefault(views, statistics.mean(epochs.losses[1]))
    return epochs.seconds()


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--coco_data", type=Path, nargs="+", required=True)
    parser.add_argument("--image_encoder", default="resnet50")
    parser.add_argument("--encoder_weights")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="tiny")
    parser.add_argument("--num_images", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)

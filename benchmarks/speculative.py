"""How much sooner a model with future token heads writes the same captions.

    python benchmarks/speculative.py --model runs/tiny --images data/coco/val2017

Greedy captions of the same pictures, token after token and by speculative decoding, in this process
and interleaved, by batch size. Encoding pictures is part of both, reading their files is
not. Without --model a nano model is
trained first, on drawn scenes with `--predict_tokens 4`, and asked about scenes held out.

Checks: a share of captions is equal, `--least_equal`. In full precision and in one batch shape all
are; in others a last bit of a float sum may round an int8 activation the other way.

Every figure of time is the median of several rounds; a round measures each case once, in turn.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from pathlib import Path

from common import first_images, interleave, make_parser, run, seconds_of, show_result
from PIL import Image

from bitgen.config import TrainingConfig
from bitgen.console import console
from bitgen.dataset.scenes import write_scenes
from bitgen.errors import InputError
from bitgen.inference.pipeline import picture_pixels
from bitgen.inference.predictor import BitGen, Caption
from bitgen.training.setup import DataSources, prepare_training

MODES = {"plain": False, "speculative": True}


def main() -> int:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="bitgen-speculative-") as temporary:
        model_path, image_dir = arguments.model, arguments.images
        if model_path is None:
            model_path, image_dir = train_on_scenes(Path(temporary), arguments.max_steps)
        elif image_dir is None:
            raise InputError("--model is captioned by --images, and none are given.")
        return measure(arguments, model_path, image_dir)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("--images", type=Path, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--max_steps", type=int, default=600, help="Updates, without --model.")
    parser.add_argument("--least_equal", type=float, default=0.95)
    return parser.parse_args()


def train_on_scenes(directory: Path, max_steps: int) -> tuple[Path, Path]:
    """A run, and pictures that it was not trained on."""
    scenes, run_dir = directory / "scenes", directory / "run"
    with console.progress("Drawing scenes") as bar:
        write_scenes(scenes, 1500, 64, 0, 96, bar.update, False)
    training = TrainingConfig(
        num_epochs=max_steps,  # max_steps ends it earlier
        max_steps=max_steps,
        batch_size=16,
        warmup_steps=min(30, max_steps),
        augment=False,
        prompt_probability=0.0,
        word_pretraining_steps=max_steps // 6,
        eval_every=max_steps,
        save_every=max_steps,
    )
    trainer = prepare_training(
        DataSources([scenes]),
        run_dir,
        model_size="nano",
        model_changes={"predict_tokens": 4},
        training=training,
        cache_dir=directory / "cache",
    )
    console.note(f"Training a nano model for {max_steps} updates.")
    trainer.train()
    return run_dir, scenes / "val2017"


def measure(arguments: argparse.Namespace, model_path: Path, image_dir: Path) -> int:
    model = BitGen.load(model_path, backend="torch")
    if model.config.predict_tokens == 1:
        raise InputError(
            f"{model_path} has no future token heads.", remedy="Train with --predict_tokens 4."
        )
    # Resized once: what is measured is the model, not the decoding of files.
    images = [
        Image.fromarray(picture_pixels(path, model.config).transpose(1, 2, 0))
        for path in first_images(image_dir, arguments.num_images)
    ]
    captions: dict[tuple[int, str], list[Caption]] = {}

    def caption(batch_size: int, mode: str) -> float:
        def work() -> None:
            captions[batch_size, mode] = model.caption(
                images,
                max_tokens=arguments.max_tokens,
                batch_size=batch_size,
                speculative=MODES[mode],
            )

        return seconds_of(work)

    seconds = interleave(
        {
            (batch_size, mode): functools.partial(caption, batch_size, mode)
            for batch_size in arguments.batch_sizes
            for mode in MODES
        },
        arguments.rounds,
        warm_up=1,
    )
    rows, cases, failures = [], [], []
    for batch_size in arguments.batch_sizes:
        plain, fast = (captions[batch_size, mode] for mode in MODES)
        equal = sum(a.token_ids == b.token_ids for a, b in zip(plain, fast, strict=True))
        counts = [found.speculation for found in fast if found.speculation is not None]
        calls = sum(count.model_calls for count in counts)
        drafted = sum(count.drafted for count in counts)
        accepted = sum(count.accepted for count in counts)
        tokens = sum(
            len(found.token_ids) + (len(found.token_ids) < arguments.max_tokens) for found in fast
        )
        ratios = [
            slow / quick
            for slow, quick in zip(
                seconds[batch_size, "plain"], seconds[batch_size, "speculative"], strict=True
            )
        ]
        case = {
            "batch_size": batch_size,
            "plain_images_per_second": len(images)
            / statistics.median(seconds[batch_size, "plain"]),
            "speculative_images_per_second": len(images)
            / statistics.median(seconds[batch_size, "speculative"]),
            "speed_up": statistics.median(ratios),
            "equal_captions": equal / len(images),
            "acceptance_rate": accepted / max(1, drafted),
            "accepted_per_verification": accepted / max(1, calls - len(images)),
            "tokens_per_call": tokens / calls,
        }
        cases.append(case)
        if equal < arguments.least_equal * len(images):
            failures.append(f"Batch {batch_size}: {equal} of {len(images)} captions are equal.")
        rows += [
            (f"batch {batch_size}: token after token", f"{case['plain_images_per_second']:.2f}/s"),
            (
                f"batch {batch_size}: speculative",
                f"{case['speculative_images_per_second']:.2f}/s ({case['speed_up']:.2f} times)",
            ),
            (f"batch {batch_size}: captions equal", f"{equal} of {len(images)}"),
            (f"batch {batch_size}: drafts accepted", f"{case['acceptance_rate']:.1%}"),
            (
                f"batch {batch_size}: accepted a verification",
                f"{case['accepted_per_verification']:.2f}",
            ),
            (f"batch {batch_size}: tokens a call of the model", f"{case['tokens_per_call']:.2f}"),
        ]
    length = statistics.mean(len(found.token_ids) for found in fast)
    rows.append(("length of a caption", f"{length:.1f} tokens"))
    figures = {
        "model_size": model.config.model_size,
        "predict_tokens": model.config.predict_tokens,
        "num_images": len(images),
        "tokens_per_caption": length,
        "cases": cases,
    }
    heads = ("", f"median of {arguments.rounds} rounds")
    return show_result("speculative", figures, heads, rows, failures)


if __name__ == "__main__":
    run(main)

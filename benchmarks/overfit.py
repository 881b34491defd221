"""Whether a model can learn a few real photographs by heart, and its exported file knows them too.

    python benchmarks/overfit.py --coco_data data/coco

The first training images of a COCO folder, one caption each, become a data set of their own in a
temporary folder. `bitgen.training.setup.prepare_training` trains on them all in every step, without
augmentation and prompts and at a constant learning rate, until greedy captions of the checkpoint
repeat every caption letter by letter. The checkpoint is then exported and the file asked as well.

Checks: the first training loss lies within 5% of ln(vocabulary), what a model that knows nothing
gives; run and exported file repeat every caption. The tokenizer is trained on all captions of the
folder, so that the vocabulary is that of a real training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import make_parser, run, show_result

from bitgen.config import DEVICES, MODEL_SIZES, PRECISIONS, BitGenConfig, TrainingConfig
from bitgen.console import console
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import InputError
from bitgen.export.safetensors import export_safetensors
from bitgen.inference.predictor import BitGen, Caption
from bitgen.training.checkpoint import CHECKPOINTS_FOLDER
from bitgen.training.events import StepReport, TrainerCallback
from bitgen.training.setup import DataSources, prepare_training

DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "coco"
LARGEST_DEVIATION = 0.05
"""Of the first loss from ln(vocabulary)."""


def main() -> int:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="bitgen-overfit-") as temporary:
        return overfit(arguments, Path(temporary))


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--coco_data", type=Path, default=DEFAULT_DATA, metavar="DIR")
    parser.add_argument("--model_size", choices=MODEL_SIZES, default="nano")
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--check_every", type=int, default=25, help="Steps between looks.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="Keep the run and the exported file here."
    )
    return parser.parse_args()


def overfit(arguments: argparse.Namespace, temporary: Path) -> int:
    images = load_coco([arguments.coco_data], "train")
    if not 1 <= arguments.num_images <= len(images):
        raise InputError(f"--num_images must lie in 1 to {len(images)}: these images are there.")
    chosen = [(image, _one_line(image.captions[0])) for image in images[: arguments.num_images]]
    data_dir = temporary / "coco"
    write_coco(data_dir, chosen)
    vocab_size = BitGenConfig.preset(arguments.model_size).vocab_size
    tokenizer = Tokenizer.train((text for image in images for text in image.captions), vocab_size)
    tokenizer_file = temporary / "tokenizer.json"
    tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")

    output_dir = (arguments.output_dir or temporary / "out").resolve()
    run_dir, artifact = output_dir / "run", output_dir / "overfit.safetensors"
    max_tokens = max(len(tokenizer.encode(caption)) for _, caption in chosen) + 1
    exam = Exam([image.path for image, _ in chosen], [text for _, text in chosen], max_tokens)
    watcher = StopWhenLearnt(exam, arguments.device)
    training = TrainingConfig(
        num_epochs=arguments.max_steps,  # one step an epoch: all images are in every batch
        max_steps=arguments.max_steps,
        batch_size=len(chosen),
        learning_rate=arguments.learning_rate,
        min_learning_rate=arguments.learning_rate,
        warmup_steps=min(arguments.warmup_steps, arguments.max_steps),
        weight_decay=0.0,
        prompt_probability=0.0,
        augment=False,
        max_caption_tokens=max_tokens,
        precision=arguments.precision,
        device=arguments.device,
        seed=arguments.seed,
        eval_every=arguments.max_steps,
        save_every=arguments.check_every,
        keep_checkpoints=1,
    )
    trainer = prepare_training(
        DataSources([data_dir], tokenizer=tokenizer_file),
        run_dir,
        model_size=arguments.model_size,
        training=training,
        cache_dir=temporary / "cache",
        callbacks=[watcher],
    )
    started = time.perf_counter()
    with contextlib.suppress(Learnt):
        trainer.train()
    seconds = time.perf_counter() - started

    # Not the run's "best": what counts here is what the last checkpoint knows by heart.
    checkpoint = run_dir / CHECKPOINTS_FOLDER / "last"
    by_run = exam.captions(BitGen.load(checkpoint, device=arguments.device))
    export_safetensors(checkpoint, artifact, overwrite=True)
    by_file = exam.captions(BitGen.load(artifact, device=arguments.device))
    return report(arguments, exam, watcher, tokenizer.vocab_size, by_run, by_file, seconds)


def report(
    arguments: argparse.Namespace,
    exam: Exam,
    watcher: StopWhenLearnt,
    vocab_size: int,
    by_run: Sequence[Caption],
    by_file: Sequence[Caption],
    seconds: float,
) -> int:
    first_loss = watcher.first_loss if watcher.first_loss is not None else math.nan
    ratio = first_loss / math.log(vocab_size)
    num_images, num_run, num_file = len(exam.expected), exam.exact(by_run), exam.exact(by_file)
    same = sum(a.token_ids == b.token_ids for a, b in zip(by_run, by_file, strict=True))
    failures = []
    if not abs(ratio - 1) <= LARGEST_DEVIATION:
        failures.append(f"The first loss is {ratio:.3f} times ln(vocabulary), not within 5% of it.")
    for name, number in (("run", num_run), ("exported file", num_file)):
        if number != num_images:
            failures.append(f"The {name} repeats {number} of {num_images} captions.")
    if same != num_images:
        failures.append(f"Run and exported file differ in {num_images - same} captions.")
    for expected, caption in zip(exam.expected, by_file, strict=True):
        if caption.text != expected:
            console.note(f"expected: {expected}\n     got: {caption.text}")
    figures: dict[str, Any] = {
        "model_size": arguments.model_size,
        "num_images": num_images,
        "vocabulary": vocab_size,
        "first_loss": first_loss,
        "ln_vocabulary": math.log(vocab_size),
        "ratio": ratio,
        "steps": watcher.steps,
        "last_loss": watcher.loss,
        "seconds": seconds,
        "exact_by_run": num_run,
        "exact_by_file": num_file,
        "same_tokens": same,
    }
    rows = [
        ("model", f"{arguments.model_size}, {num_images} images of {arguments.coco_data}"),
        ("first loss", f"{first_loss:.4f}"),
        (f"ln(vocabulary of {vocab_size:,})", f"{math.log(vocab_size):.4f}"),
        ("their ratio", f"{ratio:.4f}"),
        ("steps until known by heart", f"{watcher.steps} ({seconds:.0f} s with all looks)"),
        ("last loss", "none" if watcher.loss is None else f"{watcher.loss:.4f}"),
        ("captions repeated by the run", f"{num_run} of {num_images}"),
        ("captions repeated by the exported file", f"{num_file} of {num_images}"),
    ]
    return show_result("overfit", figures, ("", ""), rows, failures)


class Exam:
    """Pictures, the caption that each must get, and the tokens that a caption may take."""

    def __init__(self, pictures: Sequence[Path], expected: Sequence[str], max_tokens: int) -> None:
        self.pictures = list(pictures)
        self.expected = list(expected)
        self.max_tokens = max_tokens

    def captions(self, model: BitGen) -> list[Caption]:
        """Greedy captions of all pictures."""
        return model.caption(self.pictures, max_tokens=self.max_tokens)

    def exact(self, captions: Sequence[Caption]) -> int:
        """How many are what they must be, letter by letter."""
        pairs = zip(captions, self.expected, strict=True)
        return sum(caption.text == expected for caption, expected in pairs)


class Learnt(Exception):
    """Every caption is repeated: the training has done its work."""


class StopWhenLearnt(TrainerCallback):
    """Examines every checkpoint as `bitgen infer` would load it. Raises Learnt at full marks."""

    def __init__(self, exam: Exam, device: str) -> None:
        self.first_loss: float | None = None
        self.loss: float | None = None
        self.steps = 0
        self._exam, self._device = exam, device

    def on_step(self, report: StepReport) -> None:
        if report.step == 1:
            self.first_loss = report.loss
        self.loss, self.steps = report.loss, report.step

    def on_checkpoint(self, path: Path, step: int, is_best: bool) -> None:
        captions = self._exam.captions(BitGen.load(path, device=self._device))
        number, total = self._exam.exact(captions), len(captions)
        console.note(f"step {step}: loss {self.loss:.4f}, {number} of {total} captions repeated")
        if number == total:
            raise Learnt


def write_coco(directory: Path, images: Sequence[tuple[CaptionedImage, str]]) -> None:
    """The pictures with one caption each as a COCO data set, to train and to validate on.

    The validation set is the training set: of a lone one, BitGen would hold images back.
    """
    (directory / "annotations").mkdir(parents=True)
    content = {
        "images": [{"id": image.image_id, "file_name": _file_name(image)} for image, _ in images],
        "annotations": [
            {"id": number, "image_id": image.image_id, "caption": caption}
            for number, (image, caption) in enumerate(images, start=1)
        ],
    }
    for split in ("train", "val"):
        (directory / f"{split}2017").mkdir()
        for image, _ in images:
            shutil.copyfile(image.path, directory / f"{split}2017" / _file_name(image))
        annotations = directory / "annotations" / f"captions_{split}2017.json"
        annotations.write_text(json.dumps(content), encoding="utf-8")


def _file_name(image: CaptionedImage) -> str:
    return f"{image.image_id:012d}{image.path.suffix}"


def _one_line(caption: str) -> str:
    """The caption as the tokenizer reads it: without line ends and doubled spaces."""
    return " ".join(caption.split())


if __name__ == "__main__":
    run(main)

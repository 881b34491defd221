"""What `bitgen export --embedding int8` costs: loss, captions, and bytes, against float32.

    python benchmarks/embedding_precision.py --model runs/demo --coco_data runs/demo-scenes

The run is exported with either embedding and with either packing, to temporary files. The files
with a float32 embedding must answer as each other, token by token and bit by bit, and so must those
with an int8 embedding. Between float32 and int8 are compared, on the validation pictures of
`--coco_data`: the loss of their true captions (nats a token), and the greedy captions. Where two
captions part, the margin is how much the float32 logit of the token that float32 took exceeds that
of the token that int8 took. Captions of scenes that BitGen drew are judged too.

Fails if packing changes an answer, or if the loss changes by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import make_parser, run, show_result

from bitgen.config import DEVICES
from bitgen.console import console, file_size
from bitgen.dataset.coco import CaptionedImage, load_coco
from bitgen.dataset.collate import Collator, Sample
from bitgen.dataset.images import load_image, normalize_images
from bitgen.export.artifact import EMBEDDINGS, PACKINGS
from bitgen.export.safetensors import ExportReport, export_safetensors, load_artifact
from bitgen.inference.predictor import BitGen, Caption
from bitgen.inference.scene_evaluation import score_captions
from bitgen.model.device import resolve_device
from bitgen.training.losses import caption_loss

SCENES_FILE = "scenes_val.json"


def main() -> int:
    arguments = read_arguments()
    pictures = load_coco([arguments.coco_data], "val")[: arguments.num_images]
    reports: dict[tuple[str, str], ExportReport] = {}
    captions: dict[tuple[str, str], list[Caption]] = {}
    losses: dict[str, float] = {}
    models: dict[str, BitGen] = {}
    with tempfile.TemporaryDirectory(prefix="bitgen-embedding-") as temporary:
        for embedding in EMBEDDINGS:
            for packing in PACKINGS:
                case = (embedding, packing)
                path = Path(temporary) / f"{embedding}-{packing}.safetensors"
                reports[case] = export_safetensors(
                    arguments.model, path, packing=packing, embedding=embedding
                )
                model = in_pytorch(path, arguments.device)
                captions[case] = describe(model, pictures, arguments, f"{embedding}, {packing}")
                if packing == PACKINGS[0]:
                    models[embedding] = model
                    losses[embedding] = validation_loss(model, pictures, arguments.batch_size)

    failures = [
        f"Packing at {packing} bits changes a caption of the {embedding} embedding."
        for embedding in EMBEDDINGS
        for packing in PACKINGS[1:]
        if captions[embedding, packing] != captions[embedding, PACKINGS[0]]
    ]
    exact, int8 = (captions[embedding, PACKINGS[0]] for embedding in EMBEDDINGS)
    change = losses["int8"] - losses["float32"]
    if abs(change) > arguments.tolerance:
        failures.append(f"The loss changes by {change:+.4f}, more than {arguments.tolerance}.")
    margins = [
        margin(models["float32"], picture.path, a.token_ids, b.token_ids)
        for picture, a, b in zip(pictures, exact, int8, strict=True)
        if a.token_ids != b.token_ids
    ]
    equal = len(pictures) - len(margins)
    drift = [
        abs(a.log_probability - b.log_probability) / (len(a.token_ids) + 1)
        for a, b in zip(exact, int8, strict=True)
        if a.token_ids == b.token_ids
    ]
    figures: dict[str, Any] = {
        "model": arguments.model.name,
        "num_images": len(pictures),
        "loss": losses,
        "loss_change": change,
        "equal_captions": equal,
        "margins": margins,
        "median_log_probability_change_a_token": statistics.median(drift) if drift else None,
        "bytes": {" ".join(case): report.bytes for case, report in reports.items()},
    }
    rows = [
        ("pictures", f"{len(pictures)}"),
        *((f"loss, {name} embedding", f"{loss:.4f} nats a token") for name, loss in losses.items()),
        ("change of the loss", f"{change:+.5f}"),
        ("greedy captions equal", f"{equal} of {len(pictures)}"),
    ]
    if margins:
        rows.append(
            (
                "logit margin where captions part",
                f"median {statistics.median(margins):.3f}, largest {max(margins):.3f}",
            )
        )
    if drift:
        rows.append(
            ("log-probability of those, median change", f"{statistics.median(drift):.5f} a token")
        )
    scores = judge(arguments.coco_data, pictures, {"float32": exact, "int8": int8})
    for name, score in scores.items():
        rows.append((f"captions all right, {name}", f"{score:.1%}"))
    figures["captions_all_right"] = scores
    for (embedding, packing), report in reports.items():
        rows.append((f"file, {embedding}, {packing} bits", file_size(report.bytes)))
    return show_result("embedding_precision", figures, ("", ""), rows, failures)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="RUN")
    parser.add_argument("--coco_data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num_images", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=40)
    parser.add_argument("--tolerance", type=float, default=0.01, help="Of the loss, in nats.")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return parser.parse_args()


def in_pytorch(path: Path, device: str) -> BitGen:
    """An exported file, run by PyTorch: losses and margins are read from its logits."""
    loaded = load_artifact(path)
    return BitGen(
        loaded.model, loaded.tokenizer, loaded.catalog, resolve_device(device), loaded.info
    )


def describe(
    model: BitGen, pictures: Sequence[CaptionedImage], arguments: argparse.Namespace, name: str
) -> list[Caption]:
    """Greedy captions of all pictures, with a progress bar."""
    captions: list[Caption] = []
    step = arguments.batch_size
    with console.progress(f"Describing, {name}") as bar:
        for start in range(0, len(pictures), step):
            captions += model.caption(
                [picture.path for picture in pictures[start : start + step]],
                max_tokens=arguments.max_tokens,
                batch_size=step,
            )
            bar.update(len(captions), len(pictures))
    return captions


def validation_loss(model: BitGen, pictures: Sequence[CaptionedImage], batch_size: int) -> float:
    """Cross-entropy of every true caption, in nats a token."""
    tokenizer, config, device = model.tokenizer, model.config, model.device
    collate = Collator(tokenizer.pad_id, num_robots=0)
    samples = []
    for picture in pictures:
        pixels = torch.from_numpy(load_image(picture.path, config.image_size, config.image_resize))
        for caption in picture.captions:
            ids = [tokenizer.bos_id, *tokenizer.encode(caption), tokenizer.eos_id]
            samples.append(Sample(ids, 1, pixels))
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size])
        mask = model.model.build_attention_mask(batch.attention_mask, batch.prefix_lengths)
        batch = batch.to(device)
        assert batch.images is not None
        images = normalize_images(batch.images, config.image_mean, config.image_std)
        with torch.inference_mode():
            logits = model.model(batch.input_ids, images, attention_mask=mask).logits
        loss, tokens = caption_loss(logits, batch.labels)
        total, count = total + float(loss), count + int(tokens)
    return total / count


def margin(model: BitGen, path: Path, tokens: Sequence[int], others: Sequence[int]) -> float:
    """By how much the logit of the first of `tokens` that `others` lacks exceeds theirs there."""
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    pairs = zip((*tokens, eos), (*others, eos), strict=False)
    place, (token, other) = next(
        (place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    config = model.config
    pixels = torch.from_numpy(load_image(path, config.image_size, config.image_resize))
    images = normalize_images(pixels[None].to(model.device), config.image_mean, config.image_std)
    ids_BL = torch.tensor([[bos, *tokens[:place]]], device=model.device)
    prefix_B = torch.ones(1, dtype=torch.long)
    mask = model.model.build_attention_mask(torch.ones_like(ids_BL, device="cpu"), prefix_B)
    with torch.inference_mode():
        logits_V = model.model(ids_BL, images, attention_mask=mask).logits[0, -1]
    return float(logits_V[token] - logits_V[other])


def judge(
    directory: Path, pictures: Sequence[CaptionedImage], captions: Mapping[str, Sequence[Caption]]
) -> dict[str, float]:
    """Share of captions that are right in object, colour and place; empty but for drawn scenes."""
    path = directory / SCENES_FILE
    if not path.is_file():
        return {}
    scenes = {scene["file_name"]: scene for scene in json.loads(path.read_text(encoding="utf-8"))}
    entries = [scenes[picture.path.name] for picture in pictures]
    return {
        name: score_captions([caption.text for caption in found], entries).all
        for name, found in captions.items()
    }


if __name__ == "__main__":
    run(main)

"""What a model holds: the numbers behind `bitgen info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitgen.config import CAPTION_IDF
from bitgen.export.artifact import BASE3, INT8_TILES, TILES, read_header
from bitgen.export.loaded import LoadedModel, load_run
from bitgen.export.safetensors import load_artifact
from bitgen.model.bitgen import BitGenModel
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear
from bitgen.training.checkpoint import CONFIG_FILE, open_run

_PARTS = (
    ("image encoder", "image_encoder."),
    ("projector", "projector."),
    ("embedding (shared with the lm head)", "text_decoder.embed_tokens."),
    ("decoder", "text_decoder."),
    ("robot selector", "robot_selector."),
    ("token frequencies of captions", CAPTION_IDF),
    ("future token heads", "future_heads."),
)


@dataclass(frozen=True)
class PartDescription:
    """One part of the model. Scales of ternary and int8 weights count as float."""

    name: str
    ternary_parameters: int
    int8_parameters: int
    float_parameters: int
    bytes: int
    """As the artifact stores it; of a run, as one does by default."""

    @property
    def parameters(self) -> int:
        return self.ternary_parameters + self.int8_parameters + self.float_parameters


@dataclass(frozen=True)
class ModelDescription:
    """What a run, a checkpoint or an artifact holds."""

    path: Path
    kind: str
    """`run`, `checkpoint` or `artifact`."""
    model_size: str
    quantization: str
    """`ternary`, or `none` (full precision)."""
    packing: str | None
    """Bits of a ternary weight in the artifact, `2` or `1.6`; None without ternary weights. Of a
    run, as an artifact has it by default, and so are all bytes and bits below."""
    embedding: str
    """The embedding and lm head in the artifact: `float32` or `int8`."""
    convolutions: str
    """The image encoder's convolutions in the artifact: `float32` or `int8`."""
    parts: tuple[PartDescription, ...]
    parameters: int
    ternary_parameters: int
    int8_parameters: int
    """Of embedding and convolutions, if they are stored as int8."""
    float_parameters: int
    bits_per_ternary_weight: float | None
    """As stored, scales included; None without ternary weights."""
    bits_per_weight: float
    """As stored, over all parameters."""
    entropy_per_ternary_weight: float | None
    """Information in a ternary weight, in bits (at most log2(3) = 1.58): Shannon's entropy of the
    shares."""
    ternary_shares: dict[str, float] | None
    """Share of the ternary weights that are -1, 0 and +1."""
    dtypes: dict[str, int]
    """Values stored in each dtype; packed ternary weights are listed as such, and nothing that only
    fills up a tile is counted."""
    bytes_on_disk: int
    """Of the artifact, or of the checkpoint's weights (float, as training needs them)."""
    bytes_packed: int
    """Of all tensors in the artifact, without config and tokenizer."""
    decoder_layers: int
    num_experts: int
    """Feed-forward layers of a decoder layer; 1 is no mixture."""
    experts_per_token: int
    encoder_layers: int | None
    """None for other encoders than vit."""
    hidden_size: int
    image_encoder: str
    image_size: int
    image_tokens: int
    vocabulary: int
    """Entries of the tokenizer."""
    max_positions: int
    predict_tokens: int
    """Next tokens that each position predicts; 1 = without future token heads."""
    robots: tuple[str, ...]
    """Names in the catalog."""
    run: str | None
    step: int | None
    """Updates after which the weights were saved."""
    epoch: int | None
    """Whole passes over the data by then."""
    tokens: int | None
    """Text tokens learnt from by then."""
    images: int | None
    """Pictures seen by then, repeats counted."""
    training_seconds: float | None
    training_loss: float | None
    """Of the last update."""
    best_validation_loss: float | None
    """The least of all validations by then."""
    data: dict[str, Any]
    """What it was trained on, as the run records it."""
    training: dict[str, Any]
    """The training options."""


def describe(path: Path | str) -> ModelDescription:
    """Describe a run's folder (its best checkpoint, else its last), a checkpoint's, or an artifact.

    Raises:
        ModelFileError: missing, damaged, foreign, or of a newer format.
    """
    path = Path(path)
    loaded: LoadedModel
    int8_convolutions: tuple[str, ...] = ()
    if path.is_dir():
        kind = "run" if (path / CONFIG_FILE).is_file() else "checkpoint"
        loaded = load_run(path)
        bytes_on_disk = open_run(path).model_path.stat().st_size
        packing = "2" if _packed_layers(loaded.model) else None
        stored = {name: tensor.nbytes for name, tensor in loaded.model.state_dict().items()}
    else:
        header = read_header(path)
        kind, loaded = "artifact", load_artifact(path)
        bytes_on_disk, packing = path.stat().st_size, header.packing
        stored = {name: tensor.nbytes for name, tensor in header.tensors.items()}
        int8_convolutions = header.int8_convolutions
    model, config, info = loaded.model, loaded.model.config, loaded.info
    weights = _weight_counts(model)
    weights.update({name: ("int8", weights[name][1]) for name in int8_convolutions})

    parts = _describe_parts(weights, stored)
    ternary, int8, floats = (
        sum(count for kind, count in weights.values() if kind == wanted)
        for wanted in ("ternary", "int8", "float")
    )
    bytes_packed = sum(stored.values())
    shares = _ternary_shares(model)
    layers = _packed_layers(model)
    ternary_bytes = 4 * len(layers) + sum(
        nbytes for name, nbytes in stored.items() if name.endswith((TILES, BASE3))
    )
    return ModelDescription(
        path=path,
        kind=kind,
        model_size=config.model_size,
        quantization=config.quantization,
        packing=packing,
        embedding="int8" if INT8_TILES in stored else "float32",
        convolutions="int8" if int8_convolutions else "float32",
        parts=parts,
        parameters=ternary + int8 + floats,
        ternary_parameters=ternary,
        int8_parameters=int8,
        float_parameters=floats,
        bits_per_ternary_weight=8 * ternary_bytes / ternary if ternary else None,
        bits_per_weight=8 * bytes_packed / (ternary + int8 + floats),
        entropy_per_ternary_weight=None if shares is None else _entropy(shares),
        ternary_shares=shares,
        dtypes=_dtypes(model, weights, packing),
        bytes_on_disk=bytes_on_disk,
        bytes_packed=bytes_packed,
        decoder_layers=config.num_layers,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        encoder_layers=config.encoder_layers if config.image_encoder == "vit" else None,
        hidden_size=config.hidden_size,
        image_encoder=config.image_encoder,
        image_size=config.image_size,
        image_tokens=model.num_image_tokens,
        vocabulary=loaded.tokenizer.vocab_size,
        max_positions=config.max_positions,
        predict_tokens=config.predict_tokens,
        robots=tuple(robot.name for robot in loaded.catalog),
        run=info.get("run"),
        step=info.get("step"),
        epoch=info.get("epoch"),
        tokens=info.get("tokens"),
        images=info.get("images"),
        training_seconds=info.get("training_seconds"),
        training_loss=info.get("training_loss"),
        best_validation_loss=info.get("best_validation_loss"),
        data=info.get("data") or {},
        training=info.get("training") or {},
    )


def _packed_layers(model: BitGenModel) -> dict[str, PackedTernaryLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedTernaryLinear)
    }


def _weight_counts(model: BitGenModel) -> dict[str, tuple[str, int]]:
    """For each tensor's name in the state dict: `ternary`, `int8` or `float`, and how many values,
    without those that only fill up a tile."""
    counts = {name: ("float", tensor.numel()) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            counts[f"{name}.packed"] = ("ternary", module.in_features * module.out_features)
        elif isinstance(module, Int8Embedding):
            counts[f"{name}.tiles"] = ("int8", module.num_embeddings * module.embedding_dim)
    return counts


def _describe_parts(
    weights: Mapping[str, tuple[str, int]], stored: Mapping[str, int]
) -> tuple[PartDescription, ...]:
    """Each tensor is counted in the first part whose prefix its name has; heads and frequencies
    that are not there are no part."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, (kind, count) in weights.items():
        counts[_part_of(name), kind] += count
    nbytes: Counter[str] = Counter()
    for name, size in stored.items():
        nbytes[_part_of(name)] += size
    return tuple(
        PartDescription(
            part,
            counts[part, "ternary"],
            counts[part, "int8"],
            counts[part, "float"],
            nbytes[part],
        )
        for part, prefix in _PARTS
        if prefix not in ("future_heads.", CAPTION_IDF) or nbytes[part]
    )


def _part_of(name: str) -> str:
    return next(part for part, prefix in _PARTS if name.startswith(prefix))


def _ternary_shares(model: BitGenModel) -> dict[str, float] | None:
    counts = torch.zeros(3, dtype=torch.int64)
    for layer in _packed_layers(model).values():
        counts += torch.bincount(layer.ternary().flatten().long() + 1, minlength=3)
    if not counts.sum():
        return None
    return dict(zip(("-1", "0", "+1"), (counts / counts.sum()).tolist(), strict=True))


def _entropy(shares: dict[str, float]) -> float:
    share_3 = torch.tensor(list(shares.values()), dtype=torch.float64)
    return float(torch.special.entr(share_3).sum() / torch.tensor(2.0, dtype=torch.float64).log())


def _dtypes(
    model: BitGenModel, weights: Mapping[str, tuple[str, int]], packing: str | None
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, tensor in model.state_dict().items():
        kind, count = weights[name]
        dtype = "int8" if kind == "int8" else str(tensor.dtype).removeprefix("torch.")
        counts[f"ternary ({packing} bits)" if kind == "ternary" else dtype] += count
    return dict(counts)

"""One deployable file: packed weights, float tensors, and all that `bitgen infer` needs.

`bitgen.export.artifact` writes and reads the bytes; here runs become files, and files become
models of torch. A ternary layer `NAME` is stored as `NAME.packed` (tiles, 2 bits a weight) or
`NAME.packed_base3` (1.6 bits), and `NAME.scale`; the embedding, which is also the lm head, as it is
or in int8, and so are convolutions of the image encoder; everything else keeps its name and dtype.
The header's metadata holds strings:

    format          "bitgen"
    format_version  "2", or "3" with convolutions in int8
    config          the `BitGenConfig`, JSON
    tokenizer       `tokenizer.json`
    robots          the robot catalog, JSON
    info            where the model comes from (run, step, losses, data, options), JSON
    matrices        rows and inputs of each packed matrix, JSON

Unless embedding or convolutions are int8, run and file give the same numbers: the file answers as
its run does, token by token.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitgen import __version__
from bitgen.dataset.robots import catalog_to_json
from bitgen.errors import InputError, ModelFileError, OutputExistsError
from bitgen.export.artifact import (
    BASE3,
    CONVOLUTIONS,
    EMBEDDING,
    EMBEDDINGS,
    FORMAT,
    FORMAT_VERSION,
    INT8_ROWS,
    INT8_TILES,
    PACKINGS,
    ROW_SCALES,
    TILES,
    Array,
    open_artifact,
    write_artifact,
)
from bitgen.export.loaded import LoadedModel, assign_tensors, empty_model, load_run
from bitgen.files import write_whole
from bitgen.kernels.quantize import quantize_rows
from bitgen.kernels.tiles import pack_base3
from bitgen.model.bitgen import BitGenModel
from bitgen.model.int8_embedding import Int8Embedding
from bitgen.model.ternary import PackedTernaryLinear


@dataclass(frozen=True)
class ExportReport:
    """What an exported file holds. The four parts add up to `bytes`."""

    bytes: int
    """Size of the file."""
    packing: str | None
    """Bits of a ternary weight: 2, or 1.6; None for a full-precision model."""
    ternary_weights: int
    """Weights stored packed; 0 for a full-precision model."""
    ternary_bytes: int
    """Bytes of the packed ternary weights, without their scales."""
    embedding: str
    """How the embedding, which is also the lm head, is stored: float32 or int8."""
    convolutions: str
    """How the image encoder's convolutions are stored: float32 or int8."""
    int8_weights: int
    """Weights stored as int8: those of the embedding and of the convolutions, or 0."""
    int8_bytes: int
    """Bytes of the int8 weights, without their scales."""
    float_weights: int
    """Values stored as float: norms, scales, and what of embedding and convolutions is not int8."""
    float_bytes: int
    """Bytes of everything stored unpacked."""
    metadata_bytes: int
    """Bytes of the header: names and shapes, config, tokenizer, robots, info."""
    quantization: str
    """`ternary`, or `none`: full precision, nothing is packed."""


def export_safetensors(
    model_path: Path | str,
    output: Path | str,
    overwrite: bool = False,
    drop_future_heads: bool = False,
    packing: str = "2",
    embedding: str = "float32",
    convolutions: str = "float32",
) -> ExportReport:
    """Write a run as one file. It is written beside `output` and renamed when it is whole.

    Args:
        model_path: a run's folder (its best checkpoint, else its last) or a checkpoint's folder.
        output: the file to write; its folder is made if needed.
        overwrite: replace an output that exists.
        drop_future_heads: leave out the heads that predict tokens beyond the next. The file's
            config then says `predict_tokens` 1, and it answers the same.
        packing: bits of a ternary weight. `2` is what kernels read, mapped from the file; `1.6` is
            a smaller file, unpacked when it is loaded, with the same answers.
        embedding: `float32`, or `int8` for a smaller file and a faster lm head, whose answers are
            close to the run's, but not the same.
        convolutions: `float32`, or `int8` for a file that holds those of the image encoder in a
            quarter of the bytes, one scale an output channel; they are unpacked when it is loaded.
            Answers are close to the run's, but not the same.

    Raises:
        ModelFileError: `model_path` is no run, or a damaged one.
        OutputExistsError: `output` exists and may not be replaced.
        InputError: `output` is a folder, or a place where nothing can be written; a packing, an
            embedding or convolutions that there are not; or 1.6 bits for a model without ternary
            weights.
        DiskFullError: no room; nothing is left behind and an older output is intact.
    """
    output = Path(output)
    _check_choice("packing", packing, PACKINGS)
    _check_choice("embedding", embedding, EMBEDDINGS)
    _check_choice("convolutions", convolutions, CONVOLUTIONS)
    if output.is_dir():
        raise InputError(
            f"{output} is a folder; the output is a file.",
            remedy=f"Name the file, for instance {output / 'model.safetensors'}.",
        )
    if output.exists() and not overwrite:
        raise OutputExistsError(
            f"{output} exists already.", remedy="Choose another output, or add --overwrite."
        )
    if Path(model_path).is_file():
        raise ModelFileError(
            f"{model_path} is a file; a run's folder is exported.",
            remedy="Give the folder that `bitgen train` wrote.",
        )
    model, tokenizer, catalog, info = load_run(model_path)
    if drop_future_heads:
        model.drop_future_heads()
    if packing != "2" and model.config.quantization == "none":
        raise InputError(
            f"{model_path} has full-precision weights: there is nothing to pack at {packing} bits.",
            remedy="Leave the packing at 2.",
        )
    if embedding == "int8":
        model.text_decoder.quantize_embedding()
    matrices = _matrices(model)
    tensors = _stored_tensors(model, packing, convolutions)
    has_int8_convolutions = any(name.endswith(INT8_ROWS) for name in tensors)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION if has_int8_convolutions else 2),
        "config": _compact(model.config.to_dict()),
        "tokenizer": _compact(json.loads(tokenizer.to_json())),
        "robots": _compact(json.loads(catalog_to_json(catalog))),
        "info": _compact({**info, "bitgen_version": __version__}),
        "matrices": _compact(matrices),
    }
    with write_whole(output, "exported model") as file:
        write_artifact(file, tensors, metadata)

    packed = {name: array for name, array in tensors.items() if name.endswith((TILES, BASE3))}
    ternary_bytes = sum(array.nbytes for array in packed.values())
    int8 = {
        name: a for name, a in tensors.items() if name == INT8_TILES or name.endswith(INT8_ROWS)
    }
    int8_bytes = sum(array.nbytes for array in int8.values())
    tensor_bytes = sum(array.nbytes for array in tensors.values())
    size = output.stat().st_size
    return ExportReport(
        bytes=size,
        packing=packing if packed else None,
        ternary_weights=sum(n * k for name, (n, k) in matrices.items() if name != EMBEDDING),
        ternary_bytes=ternary_bytes,
        embedding=embedding,
        convolutions="int8" if has_int8_convolutions else "float32",
        int8_weights=math.prod(matrices.get(EMBEDDING, (0, 0)))
        + sum(array.size for name, array in int8.items() if name != INT8_TILES),
        int8_bytes=int8_bytes,
        float_weights=sum(
            array.size for name, array in tensors.items() if name not in packed and name not in int8
        ),
        float_bytes=tensor_bytes - ternary_bytes - int8_bytes,
        metadata_bytes=size - tensor_bytes,
        quantization=model.config.quantization,
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"There is no {name} {value!r} of exported files.",
            remedy=f"Take one of: {', '.join(choices)}.",
        )


def _matrices(model: BitGenModel) -> dict[str, tuple[int, int]]:
    """Rows and inputs of what is packed, by layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedTernaryLinear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Int8Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
    return found


def _stored_tensors(model: BitGenModel, packing: str, convolutions: str) -> dict[str, Array]:
    """The model's tensors as the file names and holds them."""
    tensors: dict[str, Array] = {}
    in_int8 = set()
    if convolutions == "int8":
        in_int8 = {
            f"image_encoder.{name}.weight"
            for name, module in model.image_encoder.named_modules()
            if isinstance(module, nn.Conv2d)
        }
    for name, tensor in model.state_dict().items():
        array: Array = tensor.numpy()
        if name in in_int8:
            rows, scales = quantize_rows(tensor.flatten(1))
            tensors[name + INT8_ROWS] = rows.view(tensor.shape).numpy()
            tensors[name + ROW_SCALES] = scales.numpy()
            continue
        if packing == "1.6" and name.endswith(TILES):
            name, array = name.removesuffix(TILES) + BASE3, pack_base3(array)
        tensors[name] = array
    return tensors


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def load_artifact(path: Path | str) -> LoadedModel:
    """Load an exported file: a packed model on the CPU, in evaluation mode, ready to answer.

    Raises:
        ModelFileError: missing, empty, truncated, foreign, changed, or of a newer format.
    """
    artifact = open_artifact(path)
    header = artifact.header
    model = empty_model(header.config, packed=True, embedding=header.embedding)
    tensors = {name: _copied(array) for name, array in artifact.tensors.items()}
    assign_tensors(model, tensors, path)
    return LoadedModel(model.eval(), artifact.tokenizer, artifact.catalog, header.info)


def _copied(array: Array) -> torch.Tensor:
    """A tensor of torch's own alignment, by which sums are the same as in a run's model."""
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype)
    np.copyto(tensor.numpy(), array)
    return tensor

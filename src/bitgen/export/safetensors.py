"""One deployable file: packed ternary weights, float tensors, and all that `bitgen infer` needs.

The file is safetensors (https://github.com/huggingface/safetensors). A ternary layer `NAME` is
stored as `NAME.packed` (uint8 `[N, ceil(K / 4)]`, see `bitgen.kernels.packing`) and `NAME.scale`
(float32 `[]`); everything else keeps its name and dtype. The header's metadata holds strings:

    format          "bitgen"
    format_version  "1"
    config          the `BitGenConfig`, JSON
    tokenizer       `tokenizer.json`
    robots          the robot catalog, JSON
    info            where the model comes from (run, step, losses, data, options), JSON

Both ways of loading give the same numbers, so the file answers as its run does, token by token.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bitgen import __version__
from bitgen.config import BitGenConfig
from bitgen.dataset.robots import catalog_to_json
from bitgen.errors import (
    ConfigError,
    DiskFullError,
    InputError,
    ModelFileError,
    OutputExistsError,
)
from bitgen.export.loaded import (
    LoadedModel,
    assign_tensors,
    empty_model,
    load_run,
    read_catalog,
    read_tokenizer,
)
from bitgen.model.ternary import PackedTernaryLinear
from bitgen.training.checkpoint import read_tensors, write_tensors

FORMAT = "bitgen"
FORMAT_VERSION = 1

_TEXTS = ("config", "tokenizer", "robots", "info")
# The bound of the safetensors library on a header.
_MAX_HEADER_BYTES = 100_000_000
_FOREIGN = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"PK\x03\x04", "a zip archive, perhaps a pickle of torch.save, which BitGen never opens"),
    (b"\x80\x02", "a pickle, which BitGen never opens"),
    (b"\x80\x04", "a pickle, which BitGen never opens"),
    (b"GGUF", "a GGUF model"),
    (b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True)
class ExportReport:
    """What an exported file holds. The three parts add up to `bytes`."""

    bytes: int
    """Size of the file."""
    ternary_weights: int
    """Weights stored at 2 bits; 0 for a full-precision model."""
    ternary_bytes: int
    """Bytes of the packed ternary weights."""
    float_weights: int
    """Values stored as float: embedding, norms, convolutions, scales."""
    float_bytes: int
    """Bytes of everything stored unpacked."""
    metadata_bytes: int
    """Bytes of the header: names and shapes, config, tokenizer, robots, info."""
    quantization: str
    """`ternary`, or `none`: full precision, nothing is packed."""


@dataclass(frozen=True)
class ArtifactHeader:
    """The validated header of an artifact, read without its tensors."""

    config: BitGenConfig
    tokenizer_json: str
    robots_json: str
    info: dict[str, Any]
    header_bytes: int


def export_safetensors(
    model_path: Path | str,
    output: Path | str,
    overwrite: bool = False,
    drop_future_heads: bool = False,
) -> ExportReport:
    """Write a run as one file. It is written beside `output` and renamed when it is whole.

    Args:
        model_path: a run's folder (its best checkpoint, else its last) or a checkpoint's folder.
        output: the file to write; its folder is made if needed.
        overwrite: replace an output that exists.
        drop_future_heads: leave out the heads that predict tokens beyond the next. The file's
            config then says `predict_tokens` 1, and it answers the same.

    Raises:
        ModelFileError: `model_path` is no run, or a damaged one.
        OutputExistsError: `output` exists and may not be replaced.
        InputError: `output` is a folder, or a place where nothing can be written.
        DiskFullError: no room; nothing is left behind and an older output is intact.
    """
    output = Path(output)
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
    tensors = model.state_dict()
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": _compact(model.config.to_dict()),
        "tokenizer": _compact(json.loads(tokenizer.to_json())),
        "robots": _compact(json.loads(catalog_to_json(catalog))),
        "info": _compact({**info, "bitgen_version": __version__}),
    }
    _write(output, tensors, metadata)

    packed = [module for module in model.modules() if isinstance(module, PackedTernaryLinear)]
    ternary_bytes = sum(layer.packed.nbytes for layer in packed)
    tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    size = output.stat().st_size
    return ExportReport(
        bytes=size,
        ternary_weights=sum(layer.in_features * layer.out_features for layer in packed),
        ternary_bytes=ternary_bytes,
        float_weights=sum(t.numel() for t in tensors.values())
        - sum(layer.packed.numel() for layer in packed),
        float_bytes=tensor_bytes - ternary_bytes,
        metadata_bytes=size - tensor_bytes,
        quantization=model.config.quantization,
    )


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _write(output: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors(temporary, tensors, metadata)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    except DiskFullError as error:
        raise _disk_full(output) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(output) from error
        raise InputError(
            f"{output} cannot be written ({error}).", remedy="Choose another output."
        ) from error


def _disk_full(output: Path) -> DiskFullError:
    return DiskFullError(
        f"The disk is full: {output} could not be written.",
        remedy="Free some space, or choose another output.",
    )


def load_artifact(path: Path | str) -> LoadedModel:
    """Load an exported file: a packed model on the CPU, in evaluation mode, ready to answer.

    Raises:
        ModelFileError: missing, empty, truncated, foreign, changed, or of a newer format.
    """
    header = read_header(path)
    model = empty_model(header.config, packed=True)
    assign_tensors(model, read_tensors(Path(path)), path)
    return LoadedModel(
        model.eval(),
        read_tokenizer(header.tokenizer_json, header.config, path),
        read_catalog(header.robots_json, path),
        header.info,
    )


def read_header(path: Path | str) -> ArtifactHeader:
    """Read and validate an artifact's header against the file's length and the format.

    Raises:
        ModelFileError: missing, empty, truncated, foreign, or of a newer format.
    """
    path = Path(path)
    header, header_bytes = _read_json_header(path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} is a safetensors file, but not one that BitGen exported.",
            remedy="Export a run with `bitgen export`.",
        )
    version = metadata.get("format_version", "")
    if not (isinstance(version, str) and version.isascii() and version.isdigit()):
        raise ModelFileError(f"{path} names no format version that can be read: {version!r}.")
    if int(version) > FORMAT_VERSION:
        raise ModelFileError(
            f"{path} has format version {version}; this BitGen reads up to {FORMAT_VERSION}.",
            remedy="Upgrade BitGen.",
        )
    missing = [name for name in _TEXTS if not isinstance(metadata.get(name), str)]
    if missing:
        raise ModelFileError(f"{path} is damaged: its header lacks {', '.join(missing)}.")
    try:
        config = BitGenConfig.from_json(metadata["config"])
        info = json.loads(metadata["info"])
    except ConfigError as error:
        raise ModelFileError(
            f"{path} holds a config that cannot be used: {error.message}", remedy=error.remedy
        ) from error
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: its info is not JSON.") from error
    if not isinstance(info, dict):
        raise ModelFileError(f"{path} is damaged: its info is not a JSON object.")
    return ArtifactHeader(config, metadata["tokenizer"], metadata["robots"], info, header_bytes)


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The safetensors header as JSON, and how many bytes stand before the tensors."""
    if not path.exists():
        raise ModelFileError(
            f"There is no model at {path}.", remedy="Give a run's folder or an exported file."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            for magic, what in _FOREIGN:
                if start.startswith(magic):
                    raise ModelFileError(
                        f"{path} is not an exported model: it is {what}.",
                        remedy="Give a run's folder or a file of `bitgen export`.",
                    )
            if len(start) < 8:
                what = "empty" if size == 0 else f"only {size} bytes long"
                raise ModelFileError(
                    f"{path} is not an exported model: it is {what}.",
                    remedy="Copy it again, or give a file of `bitgen export`.",
                )
            (length,) = struct.unpack("<Q", start)
            opening = file.read(1)
            if not 2 <= length <= _MAX_HEADER_BYTES or opening not in (b"{", b""):
                raise ModelFileError(
                    f"{path} is not an exported model: it is no safetensors file.",
                    remedy="Give a run's folder or a file of `bitgen export`.",
                )
            if 8 + length > size:
                raise _truncated(path, size, f"its header alone takes {8 + length} bytes")
            header = json.loads(opening + file.read(length - 1))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is damaged: its header is not JSON.") from error
    try:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if 8 + length + end > size:
            raise _truncated(path, size, f"its header promises {8 + length + end}")
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ModelFileError(f"{path} is damaged: its header is not safetensors'.") from error
    return header, 8 + length


def _truncated(path: Path, size: int, promised: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is truncated: it has {size} bytes, but {promised}.", remedy="Copy it again."
    )

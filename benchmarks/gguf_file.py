"""Writes the text tower of a model as GGUF, the format of llama.cpp and its forks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file has no tokenizer: it is
for programs that are given token ids. Ternary matrices are stored in the layout of one program:

    TQ2_0    llama.cpp: blocks of 256 weights, 2 bits each and one float16 scale
    I2_S     bitnet.cpp on x86-64: blocks of 128 weights, 2 bits each, one float32 scale a matrix
    IQ2_BN   ik_llama.cpp: one float32 scale a row, then blocks of 64 weights, 2 bits each

All three hold exactly the ternary weights; TQ2_0 rounds their scale to float16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.bitgen import BitGenModel
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import PackedTernaryLinear, TernaryLinear

ALIGNMENT = 32
"""Bytes: the format's default for the start of each tensor."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_down": "mlp.down_proj",
}
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorType:
    """How GGUF stores a matrix: the number of the type, and float32 `[N, K]` to bytes."""

    number: int
    encode: Callable[[Floats], Bytes]


@dataclass(frozen=True)
class TernaryType:
    """How GGUF stores a ternary matrix: codes `T + 1`, uint8 `[N, K]`, and scale to bytes."""

    number: int
    encode: Callable[[Bytes, float], Bytes]


def _four_codes_a_byte(codes: Bytes, block: int, first_is_lowest: bool) -> Bytes:
    """`[N, K]` -> `[N, K / block, block / 4]`: byte j holds weights j, j + block / 4, ..."""
    parts = codes.reshape(len(codes), -1, 4, block // 4)
    if not first_is_lowest:
        parts = parts[:, :, ::-1]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2)
    return packed


def _tq2_0(codes: Bytes, scale: float) -> Bytes:
    rows, width = codes.shape
    # Each half of a block of 256 has its own 32 bytes.
    packed = _four_codes_a_byte(codes, 128, first_is_lowest=True).reshape(rows, width // 256, 64)
    ending = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return np.concatenate(
        [packed, np.broadcast_to(ending, (rows, width // 256, 2))], axis=-1
    ).reshape(-1)


def _i2_s(codes: Bytes, scale: float) -> Bytes:
    packed = _four_codes_a_byte(codes, 128, first_is_lowest=False).reshape(-1)
    ending = np.zeros(32, np.uint8)
    ending[:4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return np.concatenate([packed, ending])


def _iq2_bn(codes: Bytes, scale: float) -> Bytes:
    packed = _four_codes_a_byte(codes, 64, first_is_lowest=True).reshape(len(codes), -1)
    beginning = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return np.concatenate([np.broadcast_to(beginning, (len(codes), 4)), packed], axis=-1).reshape(
        -1
    )


def _q8_0(matrix: Floats) -> Bytes:
    """Blocks of 32 values: one float16 scale, then int8."""
    blocks = matrix.reshape(-1, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    values = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0).round()
    encoded: Bytes = np.concatenate(
        [scales.astype(np.float16).view(np.uint8), values.astype(np.int8).view(np.uint8)], axis=1
    )
    return encoded.reshape(-1)


FLOAT32 = TensorType(0, lambda matrix: matrix.reshape(-1).view(np.uint8))
EMBEDDING_TYPES = {
    "F32": FLOAT32,
    "F16": TensorType(1, lambda matrix: matrix.astype(np.float16).reshape(-1).view(np.uint8)),
    "Q8_0": TensorType(8, _q8_0),
}
TERNARY_TYPES = {
    "TQ2_0": TernaryType(35, _tq2_0),
    "I2_S": TernaryType(36, _i2_s),
    "IQ2_BN": TernaryType(135, _iq2_bn),
}


def write_text_tower(
    path: Path, model: BitGenModel, architecture: str, ternary_type: str, embedding_type: str
) -> int:
    """Write embedding, decoder layers and final norm; the head is the embedding.

    Args:
        path: the file.
        model: ternary, trained or packed, with a float embedding, without experts.
        architecture: the name by which the program knows the graph.
        ternary_type: of `TERNARY_TYPES`.
        embedding_type: of `EMBEDDING_TYPES`.

    Returns:
        The bytes of the tensors.
    """
    ternary, embedding = TERNARY_TYPES[ternary_type], EMBEDDING_TYPES[embedding_type]
    decoder = model.text_decoder
    modules = dict(decoder.named_modules())
    writer = _Writer(path, metadata(model.config, architecture))

    def add_float(name: str, stored: TensorType, values: Floats) -> None:
        writer.add(name, values.shape, stored.number, lambda: stored.encode(values))

    def add_ternary(name: str, layer: TernaryLinear | PackedTernaryLinear) -> None:
        if isinstance(layer, TernaryLinear):
            layer = PackedTernaryLinear.from_trained(layer)
        shape = (layer.out_features, layer.in_features)
        packed, scale = layer, float(layer.scale)
        writer.add(
            name,
            shape,
            ternary.number,
            lambda: ternary.encode((packed.ternary() + 1).numpy().astype(np.uint8), scale),
        )

    assert isinstance(decoder.embed_tokens, nn.Embedding), "an int8 embedding has no float values"
    add_float("token_embd.weight", embedding, decoder.embed_tokens.weight.detach().numpy())
    for index in range(model.config.num_layers):
        for theirs, ours in _LAYER_TENSORS.items():
            name, module = f"blk.{index}.{theirs}.weight", modules[f"layers.{index}.{ours}"]
            if isinstance(module, RMSNorm):
                add_float(name, FLOAT32, module.weight.detach().numpy())
            else:
                assert isinstance(module, TernaryLinear | PackedTernaryLinear)
                add_ternary(name, module)
    add_float("output_norm.weight", FLOAT32, decoder.norm.weight.detach().numpy())
    return writer.write()


def metadata(config: BitGenConfig, architecture: str) -> dict[str, str | int | float]:
    """What the programs ask for, under the format's names."""
    return {
        "general.architecture": architecture,
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        f"{architecture}.vocab_size": config.vocab_size,
        f"{architecture}.context_length": config.max_positions,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_heads,
        f"{architecture}.attention.head_count_kv": config.num_kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.dimension_count": config.head_dim,
        f"{architecture}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "no_vocab",
    }


class _Writer:
    """Collects tensors, then writes header and tensors in their order."""

    def __init__(self, path: Path, metadata: Mapping[str, str | int | float]) -> None:
        self._path, self._metadata = path, metadata
        self._tensors: list[tuple[str, tuple[int, ...], int, Callable[[], Bytes]]] = []

    def add(
        self, name: str, shape: tuple[int, ...], number: int, encode: Callable[[], Bytes]
    ) -> None:
        self._tensors.append((name, shape, number, encode))

    def write(self) -> int:
        # Encoded twice would be slow, and held at once large: offsets are written afterwards.
        header = b"GGUF" + struct.pack("<IQQ", 3, len(self._tensors), len(self._metadata))
        for key, value in self._metadata.items():
            header += _text(key) + _value(value)
        offset_places = []
        for name, shape, number, _ in self._tensors:
            header += _text(name) + struct.pack("<I", len(shape))
            header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
            header += struct.pack("<I", number)
            offset_places.append(len(header))
            header += struct.pack("<Q", 0)
        header += bytes(-len(header) % ALIGNMENT)
        offsets, total = [], 0
        with self._path.open("wb") as file:
            file.write(header)
            for *_, encode in self._tensors:
                data = encode().tobytes()
                offsets.append(total)
                padding = -len(data) % ALIGNMENT
                file.write(data + bytes(padding))
                total += len(data) + padding
            for place, offset in zip(offset_places, offsets, strict=True):
                file.seek(place)
                file.write(struct.pack("<Q", offset))
        return total


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)

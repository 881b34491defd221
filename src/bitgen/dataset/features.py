"""Features of a frozen image encoder, computed once and read back from memory-mapped files."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.images import decoding_threads, load_image, normalize_images
from bitgen.dataset.shards import ProgressCallback, RowKey, ShardCache
from bitgen.errors import ConfigError, ImageError
from bitgen.model.encoders import weights_digest
from bitgen.model.image_encoder import ImageEncoder

FEATURE_DTYPE = np.float16
"""Of stored features. Rounding to it costs a hundredth of what rounding to int8 does, which the
first ternary layer behind them does anyway (docs/image_encoders.md has the figures)."""

PLAIN = ""
"""The variant of a picture that is the picture itself."""

_CACHE_VERSION = 1
_BATCH = 32
# Shards of small features would hold very many, whose pictures all wait in memory.
_MOST_ROWS_PER_SHARD = 1024
_VIT_FIELDS = (
    "patch_size", "encoder_hidden_size", "encoder_layers", "encoder_heads",
    "encoder_intermediate_size", "quantization", "rms_norm_eps",
)  # fmt: skip

Variation = Callable[[np.ndarray, str], np.ndarray]
"""Makes a variant, by its name, of pixels uint8 `[3, S, S]`."""


def caches_features(config: BitGenConfig, training: TrainingConfig) -> bool:
    """Whether a training learns from cached features rather than from pictures."""
    return config.freeze_encoder and training.cached_views > 0


class FeatureCache(ShardCache):
    """What a frozen encoder says of pictures: float16 `[P, E]` of each variant of each file.

    The folder is of one encoder, its weights, picture size and normalisation; a file is known by
    path, size and modification time.
    """

    def __init__(
        self,
        directory: Path,
        config: BitGenConfig,
        encoder: ImageEncoder,
        device: torch.device | str = "cpu",
        vary: Variation | None = None,
    ) -> None:
        """
        Args:
            directory: of all caches.
            config: of the model.
            encoder: the model's own; it is moved to the device, and run in evaluation mode.
            device: where features are computed, in float32.
            vary: makes the variants that are asked for; None: there is the plain one alone.
        """
        made_by: dict[str, Any] = {
            "encoder": config.image_encoder,
            "architecture": config.encoder_config,
            "weights": weights_digest(encoder),
            "image_size": config.image_size,
            "image_resize": config.image_resize,
            "mean": config.image_mean,
            "std": config.image_std,
        }
        if config.image_encoder == "vit":
            made_by |= {name: getattr(config, name) for name in _VIT_FIELDS}
        key = hashlib.blake2b(json.dumps(made_by, sort_keys=True).encode(), digest_size=8)
        name = re.sub(r"[^\w.-]+", "-", config.image_encoder)
        super().__init__(
            Path(directory)
            / f"features-v{_CACHE_VERSION}-{name}-{config.image_size}px-{key.hexdigest()}",
            row_shape=(encoder.num_tokens, encoder.output_width),
            dtype=FEATURE_DTYPE,
            suffix=".features",
            contents="image features",
        )
        self._rows_per_shard = min(self._rows_per_shard, _MOST_ROWS_PER_SHARD)
        self._config = config
        self._encoder: ImageEncoder | None = encoder
        self._device, self._vary = torch.device(device), vary

    def prepare(
        self,
        variants: Mapping[Path, Sequence[str]],
        on_progress: ProgressCallback | None = None,
        num_workers: int = 0,
    ) -> dict[Path, str]:
        """Compute what the cache does not hold yet, while threads decode the next pictures.

        Args:
            variants: of each file those that are wanted.
            on_progress: called from this thread with how many features are there, of how many.
            num_workers: threads that decode; 0 takes one a core.

        Returns the files that cannot be used, and why.

        Raises:
            DiskFullError: before anything is computed where the room is known to be too small.
            DatasetError: the cache cannot be written.
            ConfigError: features too large for float16.
        """
        assert self._encoder is not None, "a pickled cache only reads"
        self._encoder.eval().to(self._device)
        return self._prepare(variants, on_progress, num_workers)

    def features(self, path: Path, variant: str = PLAIN) -> np.ndarray:
        """float16 `[P, E]`, a copy. Raises KeyError if not prepared."""
        return self._row(path, variant)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_encoder": None, "_vary": None}

    def _room_remedy(self) -> str:
        return (
            f"{super()._room_remedy()} --cached_views 0 keeps no features: the encoder then runs in"
            " every update."
        )

    def _make_rows(
        self, chunk: Sequence[RowKey], num_workers: int
    ) -> Generator[np.ndarray | str, None, None]:
        with decoding_threads(num_workers) as executor:
            files = [
                (path, [key.variant for key in keys])
                for path, keys in itertools.groupby(chunk, key=lambda key: key.path)
            ]
            decoded = itertools.chain.from_iterable(executor.map(self._decode, files))
            while batch := list(itertools.islice(decoded, _BATCH)):
                pixels = [picture for picture in batch if not isinstance(picture, str)]
                encoded = iter(self._encode(np.stack(pixels)) if pixels else ())
                yield from (row if isinstance(row, str) else next(encoded) for row in batch)

    def _decode(self, file: tuple[str, list[str]]) -> Iterator[np.ndarray | str]:
        path, variants = file
        try:
            pixels = load_image(path, self._config.image_size, self._config.image_resize)
        except ImageError as error:
            return iter([error.message] * len(variants))
        return iter(
            [
                pixels if variant == PLAIN or self._vary is None else self._vary(pixels, variant)
                for variant in variants
            ]
        )

    @torch.inference_mode()
    def _encode(self, pixels_B3SS: np.ndarray) -> np.ndarray:
        assert self._encoder is not None
        images = torch.from_numpy(pixels_B3SS).to(self._device)
        images = normalize_images(images, self._config.image_mean, self._config.image_std)
        features = self._encoder(images)[0].float().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ConfigError(
                f"Features of {self._config.image_encoder} are as large as"
                f" {np.abs(features).max():.3g}, too large to be kept in float16.",
                remedy="Check the weights, or keep no features: --cached_views 0.",
            )
        return stored

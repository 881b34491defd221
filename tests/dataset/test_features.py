"""Features of frozen encoders: computed once, kept on disk, the same as computed anew."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset import features as features_module
from bitgen.dataset.features import FEATURE_DTYPE, FeatureCache, caches_features
from bitgen.dataset.images import load_image, normalize_images
from bitgen.dataset.samples import PictureVariants
from bitgen.errors import ConfigError, DiskFullError
from bitgen.model.encoders import make_image_encoder
from bitgen.model.image_encoder import ImageEncoder

CONFIG = BitGenConfig(
    image_encoder="vit", image_size=32, patch_size=16, freeze_encoder=True, encoder_layers=1,
    encoder_hidden_size=32, encoder_heads=2, encoder_intermediate_size=32,
    quantization="none",  # ternary layers round differently in another batch
)  # fmt: skip
ROUNDING = 2.0**-11
"""Largest relative error of rounding to float16."""


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return make_image_encoder(CONFIG).eval()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(40)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of pictures in each batch that is encoded."""
    sizes: list[int] = []
    real = FeatureCache._encode

    def count(self: FeatureCache, pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(FeatureCache, "_encode", count)
    return sizes


def plain(paths: list[Path]) -> dict[Path, tuple[str, ...]]:
    return dict.fromkeys(paths, ("",))


def expected_features(encoder: ImageEncoder, pixels_3SS: np.ndarray) -> torch.Tensor:
    images = normalize_images(
        torch.from_numpy(pixels_3SS)[None], CONFIG.image_mean, CONFIG.image_std
    )
    with torch.no_grad():
        return encoder(images)[0][0]


def assert_holds(cache: FeatureCache, encoder: ImageEncoder, paths: list[Path]) -> None:
    for path in paths:
        stored = cache.features(path)
        assert stored.dtype == FEATURE_DTYPE
        expected = expected_features(encoder, load_image(path, 32, "crop"))
        torch.testing.assert_close(
            torch.from_numpy(stored).float(), expected, rtol=ROUNDING, atol=1e-4
        )


def test_features_are_those_of_the_encoder(
    tmp_path: Path, pictures: list[Path], encoder: ImageEncoder
) -> None:
    seen: list[tuple[int, int]] = []
    cache = FeatureCache(tmp_path / "cache", CONFIG, encoder)
    assert cache.prepare(plain(pictures), lambda done, total: seen.append((done, total))) == {}
    assert seen[0] == (0, 40) and seen[-1] == (40, 40)
    assert_holds(cache, encoder, pictures)
    copy = pickle.loads(pickle.dumps(cache))  # as a worker gets it
    assert np.array_equal(copy.features(pictures[7]), cache.features(pictures[7]))
    assert len(pickle.dumps(cache)) < 20_000  # no weights, no features
    (rows,) = cache.directory.glob("*.features")
    assert rows.stat().st_size == 40 * encoder.num_tokens * encoder.output_width * 2


def test_what_is_there_is_not_computed_again(
    tmp_path: Path, pictures: list[Path], encoder: ImageEncoder, encoded: list[int]
) -> None:
    FeatureCache(tmp_path, CONFIG, encoder).prepare(plain(pictures[:33]))
    assert encoded == [32, 1]
    os.utime(pictures[0], ns=(0, 1))  # another file now
    again = FeatureCache(tmp_path, CONFIG, encoder)
    again.prepare(plain(pictures))
    assert encoded[2:] == [8]
    assert_holds(again, encoder, pictures)


def test_other_encoders_weights_sizes_and_normalisations_have_their_own(
    tmp_path: Path, encoder: ImageEncoder
) -> None:
    def folder(changes: dict[str, Any], other: ImageEncoder | None = None) -> Path:
        config = replace(CONFIG, **changes)
        return FeatureCache(tmp_path, config, other or encoder).directory

    torch.manual_seed(1)
    folders = [
        folder({}),
        folder({}, make_image_encoder(CONFIG)),
        folder({"image_resize": "pad"}),
        folder({"image_mean": (0.5, 0.5, 0.5)}),
        folder({"image_std": (0.5, 0.5, 0.5)}),
        folder({"image_size": 64}),
        folder({"encoder_heads": 1}),
        folder({"quantization": "ternary"}),
        folder({"image_encoder": "hf:tower", "encoder_config": "{}"}),
    ]
    assert len(set(folders)) == len(folders)
    torch.manual_seed(0)
    assert folder({"num_layers": 9}, make_image_encoder(CONFIG)) == folders[0]


def test_bad_pictures_are_named_and_left_out(
    tmp_path: Path, pictures: list[Path], encoder: ImageEncoder
) -> None:
    pictures[3].write_bytes(b"no picture")
    pictures[35].unlink()
    cache = FeatureCache(tmp_path / "cache", CONFIG, encoder)
    bad = cache.prepare(plain(pictures))
    assert set(bad) == {pictures[3], pictures[35]}
    assert "not a picture" in bad[pictures[3]]
    assert_holds(cache, encoder, [p for p in pictures if p not in bad])
    with pytest.raises(KeyError):
        cache.features(pictures[3])


def test_varied_versions(tmp_path: Path, pictures: list[Path], encoder: ImageEncoder) -> None:
    variants = PictureVariants(TrainingConfig(cached_views=3), training_mode=True)
    names, one_sided = variants.names("a dog"), variants.names("a dog on the left")
    assert len(set(names)) == len(set(one_sided)) == 3
    assert all("mirror" in name for name in names) and not any("mirror" in n for n in one_sided)
    cache = FeatureCache(tmp_path / "cache", CONFIG, encoder, vary=variants.make)
    wanted = {pictures[0]: ("", *names), pictures[1]: one_sided}
    assert cache.prepare(wanted) == {}
    pixels = load_image(pictures[0], 32, "crop")
    rows = [cache.features(pictures[0], name) for name in ("", *names)]
    for row, shown in zip(rows, [pixels, *(variants.make(pixels, n) for n in names)], strict=True):
        torch.testing.assert_close(
            torch.from_numpy(row).float(), expected_features(encoder, shown), rtol=1e-3, atol=1e-4
        )
    assert all(np.abs(rows[0] - row).max() > 0.01 for row in rows[1:])
    assert np.array_equal(variants.make(pixels, names[1]), variants.make(pixels, names[1]))
    plain_names = [
        PictureVariants(TrainingConfig(cached_views=3), training_mode=False).names("a dog"),
        PictureVariants(TrainingConfig(cached_views=1), training_mode=True).names("a dog"),
        PictureVariants(TrainingConfig(augment=False), training_mode=True).names("a dog"),
    ]
    assert plain_names == [("",)] * 3


def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(
    tmp_path: Path,
    pictures: list[Path],
    encoder: ImageEncoder,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("bitgen.dataset.shards.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="image features") as caught:
        FeatureCache(tmp_path, CONFIG, encoder).prepare(plain(pictures))
    assert "--cached_views 0" in str(caught.value.remedy)
    assert not encoded


def test_features_too_large_for_float16_are_refused(
    tmp_path: Path, pictures: list[Path], encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x: (real(x)[0] * 1e6, ()))
    with pytest.raises(ConfigError, match="too large"):
        FeatureCache(tmp_path, CONFIG, encoder).prepare(plain(pictures[:2]))


def test_when_features_are_cached() -> None:
    frozen, free = CONFIG, replace(CONFIG, freeze_encoder=False)
    assert caches_features(frozen, TrainingConfig())
    assert not caches_features(frozen, TrainingConfig(cached_views=0))
    assert not caches_features(free, TrainingConfig())
    with pytest.raises(ConfigError, match="augment is off"):
        TrainingConfig(cached_views=2, augment=False)
    with pytest.raises(ConfigError, match="cached_views"):
        TrainingConfig(cached_views=-1)


COMPUTE_AND_STALL = """
import sys, time
from pathlib import Path
import torch
from bitgen.config import BitGenConfig
from bitgen.dataset import features, shards
from bitgen.model.encoders import make_image_encoder
features._MOST_ROWS_PER_SHARD = 16
def stall(done, total):
    if done == 20:
        print("stalled", flush=True)
        time.sleep(60)
config = BitGenConfig.from_json(sys.argv[3])
torch.manual_seed(0)
paths = sorted(Path(sys.argv[2]).iterdir())
cache = features.FeatureCache(Path(sys.argv[1]), config, make_image_encoder(config))
cache.prepare({path: ("",) for path in paths}, stall)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_leaves_a_valid_cache(
    tmp_path: Path,
    pictures: list[Path],
    encoder: ImageEncoder,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cache"
    arguments = [str(folder), str(pictures[0].parent), CONFIG.to_json()]
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTE_AND_STALL, *arguments], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == b"stalled"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    monkeypatch.setattr(features_module, "_MOST_ROWS_PER_SHARD", 16)
    cache = FeatureCache(folder, CONFIG, encoder)
    cache.prepare(plain(pictures))
    assert sum(encoded) == 40 - 16  # the first shard was whole
    assert len(encoded) == math.ceil((40 - 16) / 16)
    assert_holds(cache, encoder, pictures)

"""What ships with BitGen beside its code: where it is found, and that it is what its card says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bitgen import shipped
from bitgen.errors import ModelFileError
from bitgen.export.safetensors import export_safetensors
from bitgen.inference.predictor import BitGen
from bitgen.shipped import MODEL_CARD, model_path, shipped_file, shipped_model

LARGEST_MODEL = 8_000_000


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package without data, and an empty working folder."""
    folder = tmp_path / "site-packages" / "bitgen"
    folder.mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shipped, "_PACKAGE", folder)
    return folder


def put_model(data: Path, content: bytes = b"model") -> Path:
    model = data / "model" / "tiny.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(content)
    return model


def test_the_package_comes_before_the_checkout(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert shipped_model() is None
    checkout = tmp_path / "checkout"
    beside = put_model(checkout / "data")
    monkeypatch.setattr(shipped, "_PACKAGE", checkout / "src" / "bitgen")
    assert shipped_model() == beside
    inside = put_model(checkout / "src" / "bitgen" / "data")
    assert shipped_model() == inside


def test_the_name_of_the_model_that_ships_yields_to_a_path(package: Path) -> None:
    model = put_model(package / "data")
    assert model_path("shipped") == model_path(Path("shipped")) == model
    assert model_path("runs/shipped") == Path("runs/shipped")
    Path("shipped").mkdir()
    assert model_path("shipped") == Path("shipped")


def test_a_package_without_a_model_says_so(package: Path) -> None:
    with pytest.raises(ModelFileError, match="built without a model") as caught:
        BitGen.load()
    assert "bitgen train" in str(caught.value.remedy)


def test_load_takes_the_model_that_ships(make_run: Callable[..., Path], package: Path) -> None:
    export_safetensors(make_run(), package / "data" / "model" / "tiny.safetensors")
    picture = Image.new("RGB", (40, 40), "red")
    (default,) = BitGen.load().caption(picture, max_tokens=3)
    (named,) = BitGen.load("shipped").caption(picture, max_tokens=3)
    assert default == named


def test_the_model_that_ships_is_small_and_as_its_card_says() -> None:
    card = shipped_file(MODEL_CARD).read_text(encoding="utf-8")
    model = shipped_model()
    assert model is not None
    content = model.read_bytes()
    assert len(content) < LARGEST_MODEL
    assert "TO FILL" not in card
    assert f"{len(content):,} bytes" in card
    assert hashlib.sha256(content).hexdigest() in card


def test_the_model_that_ships_answers() -> None:
    model = BitGen.load()
    (caption,) = model.caption(Image.new("RGB", (200, 150), "blue"))
    assert caption.text
    ranked = model.select_robots("Inspect the roof for damage.")
    assert {robot.name for robot in ranked} == {robot.name for robot in model.catalog}
    assert model.config.robot_names

"""Heat maps: the numbers, where they are drawn, and the files."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitgen.dataset.images import normalize_images, prepare_image
from bitgen.errors import DiskFullError, InputError
from bitgen.export.safetensors import export_safetensors
from bitgen.inference.heatmap import (
    TILE_SIDE,
    AttentionMaps,
    FolderPlan,
    PatchGrid,
    attention_maps,
    draw_maps,
    group_words,
    overlay,
    patch_grid,
    safe_name,
)
from bitgen.inference.predictor import BitGen, Caption
from bitgen.inference.sheet import MARGIN
from bitgen.model.masks import AttentionMask

MakeRun = Callable[..., Path]
STEP = TILE_SIDE + MARGIN


def noise(width: int = 70, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised_noise(bitgen: BitGen) -> torch.Tensor:
    """The noise as the model sees it."""
    config = bitgen.config
    pixels_3SS = prepare_image(noise(), config.image_size, config.image_resize)
    pixels_13SS = torch.from_numpy(pixels_3SS[None])
    return normalize_images(pixels_13SS, config.image_mean, config.image_std)


def maps_of(weights_WNGG: np.ndarray, words: list[str] | None = None) -> AttentionMaps:
    """Maps of a grey picture, with words made up."""
    names = words or [f"word{number}" for number in range(len(weights_WNGG))]
    return AttentionMaps(
        grid=PatchGrid(np.shape(weights_WNGG)[-1], 0.0),
        picture_SS3=np.full((48, 48, 3), 90, dtype=np.uint8),
        caption=" ".join(names),
        words=tuple(names),
        weights_WNGG=np.asarray(weights_WNGG, dtype=np.float32),
    )


def tiles(path: Path, columns: int) -> list[np.ndarray]:
    """The pictures of the first row of a page, without their frames: int `[H, W, 3]`."""
    with Image.open(path) as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    frame = (pixels[:, MARGIN : MARGIN + TILE_SIDE] == (216, 220, 226)).all(axis=(1, 2))
    top = int(frame.argmax()) + 1
    lefts = [MARGIN + 1 + column * STEP for column in range(columns)]
    inner = TILE_SIDE - 2
    return [pixels[top : top + inner, left : left + inner] for left in lefts]


def hottest(tile_HW3: np.ndarray) -> tuple[float, float]:
    """Middle (y, x) of the brightest pixels of a drawn map."""
    brightness_HW = np.asarray(tile_HW3).astype(int).sum(axis=-1)
    y, x = np.nonzero(brightness_HW >= brightness_HW.max() - 3)
    return float(y.mean()), float(x.mean())


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prefix", "causal"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 1.5, "seed": 4}],
    ids=["greedy", "beam", "drawn"],
)
@pytest.mark.parametrize("prompt", ["", "a red"])
@pytest.mark.parametrize(
    "experts", [{}, {"num_experts": 4, "experts_per_token": 2}], ids=["dense", "experts"]
)
def test_maps_are_the_attention_of_the_predicting_position(
    make_run: MakeRun, mode: str, options: dict[str, Any], prompt: str, experts: dict[str, int]
) -> None:
    """Against one forward a token, over what stood before it, under a mask written out."""
    run_dir = make_run(image_size=64, attention_mode=mode, quantization="none", **experts)
    bitgen = BitGen.load(run_dir, device="cpu")
    picture = noise()
    caption = bitgen.caption(picture, prompt=prompt, max_tokens=9, **options)[0]
    assert len(caption.tokens) > 3
    maps = attention_maps(bitgen, picture, caption, prompt)

    prompt_ids = [bitgen.tokenizer.bos_id, *bitgen.tokenizer.encode(prompt)]
    patches, layers = 16, 2
    expected = torch.zeros(len(caption.tokens), layers, patches)
    for token in range(len(caption.tokens)):
        ids = prompt_ids + caption.token_ids[:token]
        length = patches + len(ids)
        allowed_SS = torch.ones(length, length).tril().bool()
        if mode == "prefix":
            end = patches + len(prompt_ids)
            allowed_SS[:end, :end] = True
        with torch.inference_mode():
            output = bitgen.model(
                torch.tensor([ids]),
                images=normalised_noise(bitgen),
                attention_mask=AttentionMask.custom(allowed_SS),
                return_analysis_data=True,
            )
        assert output.logits[0, -1].isfinite().all()
        for layer, weights_BHSK in enumerate(output.attentions):
            expected[token, layer] = sum(head[-1, :patches] for head in weights_BHSK[0]) / 2
    groups = group_words(caption.tokens)
    assert len(maps.words) == len(groups) == len(maps.weights_WNGG)
    assert maps.weights_WNGG.shape[1:] == (layers, 4, 4)
    for word, group in enumerate(groups):
        mean = expected[group].mean(dim=0).reshape(layers, 4, 4)
        np.testing.assert_allclose(maps.weights_WNGG[word], mean, atol=2e-6)
        assert 0 < maps.average[word].sum() < 1
        np.testing.assert_allclose(maps.average[word], mean.mean(dim=0), atol=2e-6)
    assert maps.weights_WNGG.std() > 1e-3


def test_a_caption_that_takes_every_position(make_run: MakeRun) -> None:
    bitgen = BitGen.load(make_run(max_positions=4 + 1 + 9), device="cpu")
    caption = bitgen.caption(noise(), max_tokens=10)[0]
    assert len(caption.tokens) == 10
    maps = attention_maps(bitgen, noise(), caption)
    assert sum(len(group) for group in group_words(caption.tokens)) == 10
    assert np.isfinite(maps.weights_WNGG).all()


def test_run_and_exported_file_give_the_same_maps(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run(num_layers=3)
    artifact = tmp_path / "model.safetensors"
    export_safetensors(run_dir, artifact)
    picture = noise()
    weights = []
    for bitgen in (
        BitGen.load(artifact, device="cpu"),
        BitGen.load(run_dir, device="cpu"),
        BitGen.load(run_dir, device="cpu", packed=False),
    ):
        caption = bitgen.caption(picture, max_tokens=6)[0]
        weights.append(attention_maps(bitgen, picture, caption).weights_WNGG)
    assert weights[0].shape[1] == 3
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_allclose(weights[0], weights[2], atol=1e-5)


def test_a_torchvision_encoder_has_maps_as_well(make_run: MakeRun) -> None:
    run_dir = make_run(image_encoder="mobilenet_v3_small", image_size=64)
    bitgen = BitGen.load(run_dir, device="cpu")
    caption = bitgen.caption(noise(), max_tokens=4)[0]
    weights_WNGG = attention_maps(bitgen, noise(), caption).weights_WNGG
    assert weights_WNGG.shape == (len(group_words(caption.tokens)), 2, 2, 2)
    assert (weights_WNGG > 0).all()


def test_the_picture_is_the_one_that_the_model_saw(make_run: MakeRun) -> None:
    for resize in ("crop", "pad"):
        bitgen = BitGen.load(make_run(resize, image_resize=resize), device="cpu")
        maps = attention_maps(bitgen, noise(), Caption("", [], [], 0.0))
        config = bitgen.config
        normalised_3SS = normalised_noise(bitgen)[0].numpy()
        mean, std = (np.array(v)[:, None, None] for v in (config.image_mean, config.image_std))
        pixels_3SS = (normalised_3SS * std + mean) * 255
        np.testing.assert_allclose(maps.picture_SS3.transpose(2, 0, 1), pixels_3SS, atol=0.01)


# Words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], []),
        ([" A", " red", " b", "all"], [" A", " red", " ball"]),
        ([" b", "all", "."], [" ball", "."]),
        ([" b", "all", ".", "\"", " x"], [" ball", ".\"", " x"]),
        ([" t", "-", "shirt", " '", "s"], [" t-shirt", " 's"]),
        (["all", " on"], ["all", " on"]),
        (["."], ["."]),
        ([" ", "日", " ", " x"], [" 日", " ", " x"]),
        ([" caf", "\ufffd", "\ufffd", " x"], [" caf\ufffd\ufffd", " x"]),
    ],
)  # fmt: skip
def test_tokens_are_grouped_into_words(tokens: list[str], words: list[str]) -> None:
    assert ["".join(tokens[i] for i in group) for group in group_words(tokens)] == words


@given(st.lists(st.text(max_size=4), max_size=12))
def test_every_token_is_in_one_word_in_order(tokens: list[str]) -> None:
    groups = group_words(tokens)
    assert [index for group in groups for index in group] == list(range(len(tokens)))
    assert all(groups)


def test_words_of_a_tokenizer_are_whole(make_run: MakeRun) -> None:
    bitgen = BitGen.load(make_run(), device="cpu")
    text = "a café has 日本 umbrellas."
    ids = bitgen.tokenizer.encode(text)
    tokens = bitgen.tokenizer.tokens(ids)
    assert len(tokens) > 6
    caption = Caption(text, tokens, ids, 0.0)
    maps = attention_maps(bitgen, noise(), caption)
    assert maps.words == ("a", "café", "has", "日本", "umbrellas", ".")


# Places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 3), (4, 2), (2, 4)])
def test_the_hottest_pixel_lies_in_the_patch(row: int, column: int) -> None:
    map_GG = np.full((5, 5), 0.01, dtype=np.float32)
    map_GG[row, column] = 0.4
    photograph = Image.new("RGB", (TILE_SIDE, TILE_SIDE), (90, 90, 90))
    patch = TILE_SIDE / 5
    y, x = hottest(np.asarray(overlay(photograph, map_GG, 0.4)))
    assert (y // patch, x // patch) == (row, column)
    moved_y, moved_x = hottest(np.asarray(overlay(photograph, map_GG, 0.4, offset=-0.25)))
    if 0 < row < 4:
        assert moved_y - y == pytest.approx(-0.25 * patch, abs=1.5)
    if 0 < column < 4:
        assert moved_x - x == pytest.approx(-0.25 * patch, abs=1.5)


def small_pictures(size: int, centres: list[tuple[int, int]]) -> torch.Tensor:
    """A blank picture, then one a centre (y, x) with a small square there: `[1 + n, 3, S, S]`."""
    images = torch.zeros(1 + len(centres), 3, size, size)
    for image, (y, x) in zip(images[1:], centres, strict=True):
        image[:, y - 3 : y + 3, x - 3 : x + 3] = 2.0
    return images


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("vit", 6, -0.47), ("resnet18", 5, -0.4), ("swin_t", 5, 0.0), ("convnext_tiny", 5, 0.0)],
)
def test_maps_lie_where_the_tokens_look(
    make_run: MakeRun, name: str, side: int, expected: float
) -> None:
    """What changes at one place of the picture is drawn there, where attention follows it.

    The stride's phase decides it: padded 3x3 convolutions centre a token's view on the corner of
    its square, 4x4 patches on the middle.
    """
    size = side * (16 if name == "vit" else 32)
    bitgen = BitGen.load(make_run(image_encoder=name, image_size=size), device="cpu")
    grid = patch_grid(bitgen)
    assert grid.side == side
    assert grid.offset == pytest.approx(expected, abs=0.12)
    encoder = bitgen.model.image_encoder
    if name == "vit":
        # Before its layers, in which every token hears of the change.
        encoder.layers = torch.nn.ModuleList()
    # Around the middle of the picture, and not symmetric: rows and columns must not be swapped.
    ys, xs = ([int(size * (share + 0.02 * i)) for i in range(12)] for share in (0.3, 0.5))
    centres = [(y, x) for y, x in zip(ys, xs, strict=True)]
    with torch.inference_mode():
        features_NPE, _ = encoder(small_pictures(size, centres))
    changes_NP = (features_NPE[1:] - features_NPE[:1]).square().sum(dim=-1)
    photograph = Image.new("RGB", (TILE_SIDE, TILE_SIDE))
    off = []
    for change_P, centre in zip(changes_NP, centres, strict=True):
        map_GG = (change_P / change_P.sum()).reshape(side, side).numpy()
        drawn_HW = np.asarray(overlay(photograph, map_GG, 1.0, grid.offset)).astype(float).sum(-1)
        drawn_HW = (drawn_HW - drawn_HW.min()) ** 2
        middles = np.arange(TILE_SIDE) + 0.5
        y = (drawn_HW.sum(1) * middles).sum() / drawn_HW.sum()
        x = (drawn_HW.sum(0) * middles).sum() / drawn_HW.sum()
        off.append((np.array([y, x]) / TILE_SIDE - np.array(centre) / size) * side)
    assert np.abs(np.mean(off, axis=0)).max() < 0.25
    assert np.abs(off).max() < 1


@pytest.mark.parametrize("resize", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(128, 64), (64, 128)], ids=["wide", "tall"])
def test_attention_on_a_thing_is_drawn_on_the_thing(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str, shape: tuple
) -> None:
    """A model whose attention is forced onto the patch that shows most of a white square."""
    bitgen = BitGen.load(make_run(image_size=64, image_resize=resize), device="cpu")
    width, height = shape
    picture = Image.new("RGB", shape, (20, 20, 20))
    picture.paste((255, 255, 255), (width // 2 + 8, height // 2 - 24, width // 2 + 24, height // 2))
    forward = bitgen.model.forward

    def forced(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        if not options.get("return_analysis_data"):
            return output
        is_white_1SS = (options["images"].mean(dim=1) > 1.5).float()
        white_P = torch.nn.functional.avg_pool2d(is_white_1SS, 16).flatten()
        weights = torch.zeros_like(output.attentions[0])
        weights[..., int(white_P.argmax())] = 1.0
        return dataclasses.replace(output, attentions=(weights,) * len(output.attentions))

    monkeypatch.setattr(bitgen.model, "forward", forced)
    caption = bitgen.caption(picture, max_tokens=3)[0]
    maps = attention_maps(bitgen, picture, caption, grid=PatchGrid(4, 0.0))
    sheet = draw_maps(maps, tmp_path)
    first_strip = sorted(tmp_path.glob("01_*.png"))[0]
    assert maps.average[0].max() == 1.0
    for path, columns in ((sheet, 2), (first_strip, 4)):
        photograph, *drawn = tiles(path, columns)
        y_HW, x_HW = np.nonzero(photograph.sum(axis=-1) > 600)
        for tile in drawn:
            y, x = hottest(tile)
            assert abs(y - y_HW.mean()) < TILE_SIDE / 8
            assert abs(x - x_HW.mean()) < TILE_SIDE / 8


# Drawings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "columns"), [(1, 3), (6, 8), (12, 7)])
def test_a_strip_has_photograph_average_and_each_layer(
    tmp_path: Path, layers: int, columns: int
) -> None:
    weights_WNGG = np.zeros((1, layers, 3, 3))
    for layer in range(layers):
        weights_WNGG[0, layer, layer % 3, (layer // 3) % 3] = 0.9
    draw_maps(maps_of(weights_WNGG), tmp_path)
    strip = tmp_path / "01_word0.png"
    with Image.open(strip) as page:
        assert page.width == MARGIN + columns * STEP
    drawn = tiles(strip, columns)[2:]
    assert drawn
    for layer, tile in enumerate(drawn):
        y, x = hottest(tile)
        assert (y // (TILE_SIDE / 3), x // (TILE_SIDE / 3)) == (layer % 3, (layer // 3) % 3)


def test_one_colour_is_one_share_within_a_file(tmp_path: Path) -> None:
    weights_WNGG = np.full((2, 2, 4, 4), 0.01)
    weights_WNGG[0, :, 1, 2] = 0.8
    weights_WNGG[1, :, 3, 0] = 0.4
    maps = maps_of(weights_WNGG)
    sheet = draw_maps(maps, tmp_path)
    photograph = Image.fromarray(maps.picture_SS3).resize((TILE_SIDE, TILE_SIDE))
    drawn = tiles(sheet, 3)[1:]
    for map_GG, tile in zip(maps.average, drawn, strict=True):
        expected = np.asarray(overlay(photograph, map_GG, 0.8)).astype(int)[1:-1, 1:-1]
        np.testing.assert_array_equal(tile, expected)
    assert drawn[0].sum(axis=-1).max() > drawn[1].sum(axis=-1).max() + 100


def test_a_map_without_preference_is_not_drawn_as_a_strong_one(tmp_path: Path) -> None:
    flat = np.full((1, 1, 4, 4), 0.9 / 16)
    strong = flat.copy()
    strong[0, 0, 2, 1] = 0.5
    brightest = []
    for name, weights in (("flat", flat), ("strong", strong)):
        sheet = draw_maps(maps_of(weights), tmp_path / name)
        tile = tiles(sheet, 2)[1].sum(axis=-1)
        brightest.append(int(tile.max()))
        if name == "flat":
            assert tile.max() - tile.min() <= 3
    grey = 3 * 0.4 * 90
    assert brightest[0] - grey < 0.4 * (brightest[1] - grey)


def test_a_single_patch_and_no_words(tmp_path: Path) -> None:
    draw_maps(maps_of(np.full((1, 2, 1, 1), 0.5)), tmp_path / "one")
    assert len(list((tmp_path / "one").iterdir())) == 2
    sheet = draw_maps(maps_of(np.zeros((0, 2, 3, 3))), tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["sheet.png"]
    (photograph,) = tiles(sheet, 1)
    assert (photograph == 90).all()


def test_image_tokens_that_are_no_square_are_refused(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitgen = BitGen.load(make_run(), device="cpu")
    monkeypatch.setattr(bitgen.model, "num_image_tokens", 12)
    with pytest.raises(InputError, match="12 image tokens are no square"):
        patch_grid(bitgen)


# Files ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_word_has_a_file(tmp_path: Path) -> None:
    words = ["日本", "a/b\\c", "", "x" * 500, "\x0f\n", "..", "é\ufffd", "*", "same", "same"]
    draw_maps(maps_of(np.full((len(words), 1, 2, 2), 0.1), words), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "01_日本.png", "02_a_b_c.png", "03_token.png", f"04_{'x' * 60}.png", "05_token.png",
        "06_token.png", "07_é_.png", "08_token.png", "09_same.png", "10_same.png", "sheet.png",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@given(st.text(st.characters(), max_size=300))
def test_names_are_one_safe_part_of_a_path(text: str) -> None:
    name = safe_name(text, "photo", 200)
    assert name not in ("", ".", "..")
    assert Path(name).name == name
    assert 0 < len(os.fsencode(name)) <= 200
    assert name.isprintable()


def test_photographs_of_one_stem_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a/cat.jpg", "b/cat.png", "b/Cat.png", "cat_2.jpg", "a/cat.jpg", "...jpg", "x\n.png"]
    plan = FolderPlan(tmp_path / "new" / "maps")
    folders = [plan.folder(Path(name)) for name in names]
    assert [folder.name for folder in folders] == [
        "cat", "cat_2", "Cat_3", "cat_2_2", "cat_4", "photo", "x_",
    ]  # fmt: skip
    assert len({folder.name.casefold() for folder in folders}) == len(folders)
    assert all(folder.parent == tmp_path / "new" / "maps" for folder in folders)


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for directory in (file, file / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            FolderPlan(directory)
    with pytest.raises(InputError, match="it is a file"):
        FolderPlan(tmp_path).folder(Path("file.jpg"))
    with pytest.raises(InputError, match="heat map cannot be written"):
        draw_maps(maps_of(np.full((1, 1, 2, 2), 0.1)), file)
    assert file.read_text() == "mine"


def test_strips_of_earlier_words_are_removed_and_nothing_else(tmp_path: Path) -> None:
    draw_maps(maps_of(np.full((3, 1, 2, 2), 0.1), ["a", "red", "ball"]), tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "01_beach.png")
    (tmp_path / "02_broken.png").write_bytes(b"no picture")
    draw_maps(maps_of(np.full((2, 1, 2, 2), 0.1), ["a", "dog"]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "01_a.png", "01_beach.png", "02_broken.png", "02_dog.png", "sheet.png",
    ]  # fmt: skip


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, *args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DiskFullError, match="heat map"):
        draw_maps(maps_of(np.full((1, 1, 2, 2), 0.1)), tmp_path)
    assert list(tmp_path.iterdir()) == []

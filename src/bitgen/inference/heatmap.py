"""Heat maps: which patches of a picture the decoder attended to for each word of its caption.

They show where the layers looked, not why the model answered as it did: attention says nothing of
what was done with what was read, and an image token has taken in its surroundings by then. So a
map is a hint at what mattered, and no proof.

Shapes: T generated tokens, W words, N decoder layers, G patches on a side of the picture (P = G * G
image tokens, row by row from the upper left), S the side of the square picture in pixels.
"""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from bitgen.dataset.images import normalize_images
from bitgen.errors import InputError
from bitgen.inference.answers import Caption, Picture
from bitgen.inference.pipeline import picture_pixels
from bitgen.inference.predictor import BitGen
from bitgen.inference.sheet import (
    FIRST_INK,
    LINE_HEIGHT,
    MARGIN,
    OTHER_INK,
    PAPER,
    SheetItem,
    lay_out,
    save_png,
    wrap_line,
)
from bitgen.model.image_encoder import VisionTransformer

SHEET_NAME = "sheet.png"
TILE_SIDE = 224
"""Side of one drawn picture, in pixels."""

_COLOUR_MAP = "inferno"
_OPACITY = 0.6
_GREYS = (32, 204)  # black and white of the photograph below: white must not pass for heat
_LEAST_SCALE = 4.0  # times even attention: only maps that prefer a patch get bright colours
_MOST_SHEET_COLUMNS, _MOST_STRIP_COLUMNS = 6, 8
_LEAST_WIDTH = 480
_LONGEST_WORD, _LONGEST_STEM = 60, 200  # bytes; most file systems take 255, number and ending too
_RESERVED = frozenset('<>:"/\\|?*\N{REPLACEMENT CHARACTER}')
_SOFTWARE = "BitGen heat map"


@dataclass(frozen=True)
class PatchGrid:
    """Where on the picture the image tokens stand."""

    side: int
    """G, tokens on a side."""
    offset: float
    """How far right of and below the middle of its square of the picture a token's view is
    centred, in squares; about -0.5, the upper left corner, behind padded convolutions with stride.
    """


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Where the decoder looked in one picture for each word of a caption."""

    grid: PatchGrid
    picture_SS3: np.ndarray
    """The square picture as the model saw it, before normalising: uint8."""
    caption: str
    """The whole caption, the prompt's words included."""
    words: tuple[str, ...]
    """The generated words (see `group_words`); where a prompt ends within a word, the first one is
    that word's rest."""
    weights_WNGG: np.ndarray
    """Float32 share of a word's attention on each patch, a layer: mean over heads and over the
    word's tokens. What is missing to a sum of 1 went to the text."""

    @property
    def average(self) -> np.ndarray:
        """Mean over the layers, `[W, G, G]`. Each map's sum is what fell on the picture at all."""
        average_WGG: np.ndarray = self.weights_WNGG.mean(axis=1)
        return average_WGG


@torch.inference_mode()
def attention_maps(
    model: BitGen,
    picture: Picture,
    caption: Caption,
    prompt: str = "",
    grid: PatchGrid | None = None,
) -> AttentionMaps:
    """Where the decoder looked in the picture for each word of the caption it gave.

    A token's map is the attention of the position that predicts it, the one before it, in one pass
    over prompt and caption under the mask that generation used.

    Args:
        model: on any device, of any image encoder that gives a square grid.
        picture: what was captioned.
        caption: what `model.caption` answered, by whichever choice of tokens, without an attention
            window.
        prompt: the prompt that was given with it.
        grid: `patch_grid(model)`, to measure it once for several pictures.

    Raises:
        InputError: the image tokens are no square grid, or the caption is longer than the model.
        ImageError: not a picture.
    """
    grid = grid or patch_grid(model)
    pixels_3SS = picture_pixels(picture, model.config)
    groups = group_words(caption.tokens)
    weights_TNP = _token_weights(model, pixels_3SS, caption.token_ids, prompt)
    weights_WNP = np.zeros((len(groups), *weights_TNP.shape[1:]), dtype=np.float32)
    for word, group in enumerate(groups):
        weights_WNP[word] = weights_TNP[group].mean(axis=0)
    return AttentionMaps(
        grid=grid,
        picture_SS3=pixels_3SS.transpose(1, 2, 0),
        caption=caption.text,
        words=tuple(
            model.tokenizer.decode([caption.token_ids[index] for index in group])
            for group in groups
        ),
        weights_WNGG=weights_WNP.reshape(*weights_WNP.shape[:2], grid.side, grid.side),
    )


def _token_weights(
    model: BitGen, pixels_3SS: np.ndarray, token_ids: Sequence[int], prompt: str
) -> np.ndarray:
    """Attention from each token's predicting position to the picture: float32 `[T, N, P]`."""
    tokenizer, net = model.tokenizer, model.model
    image_tokens = net.num_image_tokens
    if not token_ids:
        return np.zeros((0, model.config.num_layers, image_tokens), dtype=np.float32)
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    # The last token predicts nothing that is shown, and may have no position left.
    input_ids_1L = torch.tensor([[*prompt_ids, *token_ids[:-1]]])
    length = image_tokens + input_ids_1L.shape[1]
    if length > model.config.max_positions:
        raise InputError(
            f"The caption is too long to map: {length} tokens with picture and prompt; the model"
            f" has {model.config.max_positions} positions."
        )
    pixels_13SS = torch.from_numpy(pixels_3SS[None]).to(model.device)
    output = net(
        input_ids_1L.to(model.device),
        images=normalize_images(pixels_13SS, model.config.image_mean, model.config.image_std),
        attention_mask=net.build_attention_mask(
            torch.ones_like(input_ids_1L), prefix_lengths_B=torch.tensor([len(prompt_ids)])
        ),
        return_analysis_data=True,
    )
    first = image_tokens + len(prompt_ids) - 1
    weights_NTP = torch.stack(
        [
            weights_1HSK[0, :, first:, :image_tokens].mean(dim=0)
            for weights_1HSK in output.attentions
        ]
    )
    weights_TNP: np.ndarray = weights_NTP.transpose(0, 1).float().cpu().numpy()
    return weights_TNP


def patch_grid(model: BitGen) -> PatchGrid:
    """Where the model's image tokens stand; measured, which takes a second or two at most sizes.

    Raises:
        InputError: the image tokens are no square grid.
    """
    num_tokens = model.model.num_image_tokens
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise InputError(
            f"This model's {num_tokens} image tokens are no square grid of patches, so there is no"
            " telling where on the picture they stand.",
            remedy="Heat maps need an image encoder such as vit, mobilenet_v3_small or resnet50.",
        )
    return PatchGrid(side, _measured_offset(model, side) if side > 1 else 0.0)


def _measured_offset(model: BitGen, side: int) -> float:
    """`PatchGrid.offset` of the token in the middle, by its effective receptive field on noise.

    That is the squared gradient of its features by pixel (arXiv 1701.04128). Our own encoder is
    measured before its layers, in which each token hears of the whole picture.
    """
    encoder, size = model.model.image_encoder, model.config.image_size
    middle = side // 2
    random = torch.Generator().manual_seed(0)
    # A stem is fast, and its few layers differ more from one noise to the next.
    number = 8 if isinstance(encoder, VisionTransformer) else 2
    noise_N3SS = torch.randn(number, 3, size, size, generator=random)
    with torch.inference_mode(False), torch.enable_grad():
        images_N3SS = noise_N3SS.to(model.device, copy=True).requires_grad_()
        if isinstance(encoder, VisionTransformer):
            features_NPE = encoder.stem(images_N3SS).flatten(2).transpose(1, 2)
        else:
            features_NPE, _ = encoder(images_N3SS)
        feature_NE = features_NPE[:, middle * side + middle]
        directions_NE = torch.randn(feature_NE.shape, generator=random).to(model.device)
        (gradient_N3SS,) = torch.autograd.grad((feature_NE * directions_NE).sum(), images_N3SS)
    seen_SS = gradient_N3SS.cpu().double().square().sum(dim=(0, 1))
    total = float(seen_SS.sum())
    if not total > 0:
        return 0.0
    # Convolutions treat both directions alike: one number for them halves the noise.
    seen_S = (seen_SS.sum(dim=0) + seen_SS.sum(dim=1)) / (2 * total)
    centre = float(seen_S @ (torch.arange(size).double() + 0.5))
    return min(max(centre * side / size - (middle + 0.5), -0.5), 0.5)


def group_words(tokens: Sequence[str]) -> list[list[int]]:
    """Indices of the tokens of each word, in order; every token is in one word.

    A word begins at a token that begins with a space. Punctuation behind a word is one of its own,
    so that the full stop has no part in the map of the last word.
    """
    words: list[list[int]] = []
    for index, token in enumerate(tokens):
        if not words or token.startswith(" "):
            words.append([])
        words[-1].append(index)
    split: list[list[int]] = []
    for word in words:
        end = len(word)
        while end > 1 and _is_punctuation(tokens[word[end - 1]]):
            end -= 1
        split += [part for part in (word[:end], word[end:]) if part]
    return split


def _is_punctuation(token: str) -> bool:
    return all(unicodedata.category(character)[0] == "P" for character in token)


# Drawing ----------------------------------------------------------------------------------------


def draw_maps(maps: AttentionMaps, directory: Path) -> Path:
    """Write a strip `01_<word>.png`, `02_...` for each word, and `sheet.png`; returns its path.

    A strip has the photograph, the average over the layers and each layer; the sheet has the
    photograph and each word's average. All maps of one file have one scale, which the file states,
    so that in it one colour is one share of attention. It ends at the largest share drawn, but not
    below four times even attention: a map that prefers no patch stays dark. A token's attention is
    drawn around the place that its view is centred on (`PatchGrid.offset`).

    Folders are made. Strips that an earlier call left there for other words are removed.

    Raises:
        InputError: the folder cannot be made or written to.
        DiskFullError: no room.
    """
    photograph = _photograph(maps)
    caption, average_WGG = _printable(maps.caption), maps.average
    words = [_printable(word) for word in maps.words]
    strips = [directory / name for name in _strip_names(maps.words)]
    for index, (word, strip) in enumerate(zip(words, strips, strict=True)):
        layers = enumerate(maps.weights_WNGG[index], start=1)
        named = [("average of the layers", average_WGG[index])]
        named += [(f"layer {layer}", map_GG) for layer, map_GG in layers]
        title = f"{index + 1} of {len(words)}: {word}"
        _save(_page(title, caption, maps, photograph, named, _MOST_STRIP_COLUMNS), strip)
    sheet = directory / SHEET_NAME
    _save(sheet_of(maps), sheet)
    _remove_strips(directory, keep=strips)
    return sheet


def sheet_of(maps: AttentionMaps) -> Image.Image:
    """The sheet that `draw_maps` writes: the photograph, and each word's average of the layers."""
    named = [
        (f"{index + 1}  {_printable(word)}", map_GG)
        for index, (word, map_GG) in enumerate(zip(maps.words, maps.average, strict=True))
    ]
    return _page(_printable(maps.caption), "", maps, _photograph(maps), named, _MOST_SHEET_COLUMNS)


def _photograph(maps: AttentionMaps) -> Image.Image:
    side = (TILE_SIDE, TILE_SIDE)
    return Image.fromarray(maps.picture_SS3).resize(side, Image.Resampling.LANCZOS)


def overlay(
    photograph: Image.Image, map_GG: np.ndarray, scale: float, offset: float = 0.0
) -> Image.Image:
    """The photograph in grey under the map in colours, smoothed between the patches.

    Args:
        photograph: square.
        map_GG: shares of attention.
        scale: the share that the brightest colour stands for.
        offset: see `PatchGrid.offset`.
    """
    heat = Image.fromarray(np.pad(map_GG / scale, 1, mode="edge").astype(np.float32))
    start, end = 1 - offset, 1 - offset + len(map_GG)
    box = (start, start, end, end)
    smooth = heat.resize(photograph.size, Image.Resampling.BICUBIC, box=box)
    return _tinted(photograph.convert("L"), np.asarray(smooth))


def _tinted(grey: Image.Image, values_HW: np.ndarray) -> Image.Image:
    """A grey picture under colours for values from 0 to 1, cut there: smoothing overshoots."""
    from matplotlib import colormaps

    colours_HW4 = colormaps[_COLOUR_MAP](np.clip(values_HW, 0, 1), bytes=True)
    colours = Image.fromarray(colours_HW4).convert("RGB")
    dimmed = grey.point([round(_GREYS[0] + (_GREYS[1] - _GREYS[0]) * v / 255) for v in range(256)])
    return Image.blend(dimmed.convert("RGB"), colours, _OPACITY)


def _page(
    title: str,
    subtitle: str,
    maps: AttentionMaps,
    photograph: Image.Image,
    named: Sequence[tuple[str, np.ndarray]],
    most_columns: int,
) -> Image.Image:
    """The photograph and the named maps in rows of like length, and what the colours mean."""
    size, side, offset = len(maps.picture_SS3), maps.grid.side, maps.grid.offset
    even = 1 / side**2
    scale = max([min(_LEAST_SCALE * even, 1.0), *(float(map_GG.max()) for _, map_GG in named)])
    lines = ["photograph as the model saw it", f"{size} x {size} pixels, {side} x {side} patches"]
    items = [SheetItem(photograph, lines)]
    for name, map_GG in named:
        figures = f"{map_GG.sum():.1%} on the picture, peak {map_GG.max():.1%}"
        items.append(SheetItem(overlay(photograph, map_GG, scale, offset), [name, figures]))
    rows = math.ceil(len(items) / most_columns)
    grid = lay_out(items, columns=math.ceil(len(items) / rows), picture_side=TILE_SIDE)

    width = max(grid.width, _LEAST_WIDTH)
    parts = [_text(title, 20, FIRST_INK, width)]
    if subtitle:
        parts.append(_text(subtitle, 14, OTHER_INK, width))
    parts.append(grid)
    if named:
        parts.append(_scale_bar(scale, even))
        note = (
            "Colour is the share of a word's attention that falls on one patch, on one scale in"
            f" all maps here; the mark is even attention, {even:.1%} on each of {side**2} patches."
            " What does not fall on the picture falls on the words so far. Attention shows where"
            " the layers looked, not why the model answered as it did."
        )
    else:
        note = "The model added no words: there is nothing to map."
    parts.append(_text(note, 14, OTHER_INK, width))
    page = Image.new("RGB", (width, sum(part.height for part in parts) + 2 * MARGIN), PAPER)
    top = MARGIN
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def _text(text: str, size: int, ink: tuple[int, int, int], width: int) -> Image.Image:
    font = ImageFont.load_default(size)
    lines = wrap_line(text, font, width - 2 * MARGIN)
    line_height = LINE_HEIGHT * size // 14
    block = Image.new("RGB", (width, line_height * len(lines)), PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((MARGIN, number * line_height), line, fill=ink, font=font)
    return block


def _scale_bar(scale: float, even: float) -> Image.Image:
    """The colours over a middle grey, from no attention to `scale`, with a mark at `even`."""
    font = ImageFont.load_default(14)
    block = Image.new("RGB", (_LEAST_WIDTH, LINE_HEIGHT + 8), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((MARGIN, 0), "0%", fill=OTHER_INK, font=font)
    left = MARGIN + 30
    values = np.linspace(0, 1, TILE_SIDE, dtype=np.float32)[None].repeat(LINE_HEIGHT - 4, axis=0)
    bar = _tinted(Image.new("L", (TILE_SIDE, len(values)), 128), values)
    block.paste(bar, (left, 2))
    mark = left + round(even / scale * (TILE_SIDE - 1))
    draw.line((mark, 2, mark, len(values) + 1), fill=PAPER, width=2)
    draw.text((left + TILE_SIDE + 8, 0), f"{scale:.1%}", fill=OTHER_INK, font=font)
    return block


def _printable(text: str) -> str:
    sign = "\N{REPLACEMENT CHARACTER}"
    return "".join(character if character.isprintable() else sign for character in text)


# Files ------------------------------------------------------------------------------------------


class FolderPlan:
    """A folder for each photograph, named by its stem; those of the same stem are numbered: `cat`,
    `cat_2`."""

    def __init__(self, directory: Path) -> None:
        """Make `directory`, in which the folders are.

        Raises:
            InputError: it cannot be made or written to.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Heat maps cannot be written to {directory}: {error.strerror}.",
                remedy="Name a folder, or one that can be made.",
            ) from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise InputError(f"Heat maps cannot be written to {directory}: it may not be changed.")
        self._directory = directory
        self._taken: set[str] = set()
        self._seen: Counter[str] = Counter()

    def folder(self, photograph: Path) -> Path:
        """The folder of the next photograph; it is not made. Raises InputError for a file there."""
        stem = safe_name(photograph.stem, "photo", _LONGEST_STEM)
        name = stem
        while name.casefold() in self._taken:  # some file systems do not tell A from a
            self._seen[stem] += 1
            name = f"{stem}_{self._seen[stem] + 1}"
        self._taken.add(name.casefold())
        folder = self._directory / name
        if folder.exists() and not folder.is_dir():
            raise InputError(f"Heat maps cannot be written to {folder}: it is a file.")
        return folder


def _strip_names(words: Sequence[str]) -> list[str]:
    digits = max(2, len(str(len(words))))
    return [
        f"{number:0{digits}d}_{safe_name(word, 'token', _LONGEST_WORD)}.png"
        for number, word in enumerate(words, start=1)
    ]


def safe_name(text: str, otherwise: str, most_bytes: int) -> str:
    """The text as a part of a file name, or `otherwise` where nothing is left of it."""
    encoding = sys.getfilesystemencoding()
    known = text.encode(encoding, "replace").decode(encoding)
    name = "".join(
        character if character.isprintable() and character not in _RESERVED else "_"
        for character in known
    )
    name = name.encode(encoding)[:most_bytes].decode(encoding, "ignore").strip(" .")
    return name if name.strip("_") else otherwise


def _save(page: Image.Image, path: Path) -> None:
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    save_png(page, path, "heat map", info, optimize=False)


def _remove_strips(directory: Path, keep: Sequence[Path]) -> None:
    """Remove strips of earlier words, and no picture that is not known to be one."""
    for path in sorted(set(directory.glob("[0-9][0-9]*_*.png")) - set(keep)):
        try:
            with Image.open(path) as picture:
                is_strip = picture.info.get("Software") == _SOFTWARE
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        if is_strip:
            path.unlink(missing_ok=True)

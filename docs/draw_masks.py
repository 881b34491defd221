"""Draws the pictures of attention.md: `python docs/draw_masks.py` writes docs/masks/*.svg.

Each square is one (query, key) pair of a mask as `AttentionMask.to_bool` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from bitgen import AttentionMask

CELL, GAP, LABEL, TITLE, NARROWEST = 22, 2, 62, 44, 280
ALLOWED, FORBIDDEN, PAPER, INK, FAINT = "#2b6cb0", "#e8edf3", "#ffffff", "#1a202c", "#8794a5"
STYLE = 'font-family="sans-serif" font-size="11"'

CAPTION = ("img", "img", "a", "red", "cup", "here")
WORDS = ("a", "robot", "lifts", "a", "red", "cup")


def svg_of(
    title: str,
    mask: AttentionMask,
    *rows: Sequence[str],
    queries: Sequence[str] | None = None,
) -> str:
    """A mask as an SVG: queries down, keys across, one grid for each row of the batch.

    Args:
        title: stands above.
        mask: what is drawn.
        rows: the words of the keys, of each row.
        queries: the words of the queries, where they are not the keys'.
    """
    num_queries, num_keys = len(queries or rows[0]), len(rows[0])
    allowed = mask.to_bool(num_queries, num_keys).expand(len(rows), 1, -1, -1)[:, 0]
    grid_width = LABEL + num_keys * (CELL + GAP)
    width = max(len(rows) * grid_width + 8, 8 * len(title) + 16, NARROWEST)
    height = TITLE + LABEL + num_queries * (CELL + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {STYLE}>',
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        f'<text x="8" y="18" font-size="13" font-weight="bold" fill="{INK}">{escape(title)}</text>',
        f'<text x="8" y="34" fill="{FAINT}">query (down) sees key (across); · is padding</text>',
    ]
    for row, words in enumerate(rows):
        parts += _grid(allowed[row], words, queries or words, left=row * grid_width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(
    allowed_QK: torch.Tensor, keys: Sequence[str], queries: Sequence[str], left: int
) -> list[str]:
    parts = []
    for column, word in enumerate(keys):
        x, y = left + LABEL + column * (CELL + GAP) + CELL / 2 + 4, TITLE + LABEL - 6
        parts.append(
            f'<text transform="translate({x:g},{y}) rotate(-60)" fill="{INK}">{escape(word)}</text>'
        )
    for line, word in enumerate(queries):
        y = TITLE + LABEL + line * (CELL + GAP)
        parts.append(
            f'<text x="{left + LABEL - 6}" y="{y + CELL - 7}" text-anchor="end"'
            f' fill="{INK}">{escape(word)}</text>'
        )
        for column in range(len(keys)):
            fill = ALLOWED if bool(allowed_QK[line, column]) else FORBIDDEN
            x = left + LABEL + column * (CELL + GAP)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="3" fill="{fill}"/>'
            )
    return parts


def pictures() -> dict[str, str]:
    """File name and SVG of every picture."""
    window = AttentionMask.sliding_window(window=2, sinks=1)
    sides = AttentionMask.padding(torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    left, right = ("·", "·", "a", "red", "cup", "here"), ("a", "red", "cup", "here", "·", "·")
    # Row 1 has a picture and a short prompt; row 2 has no picture, and a longer prompt.
    built = AttentionMask.prefix([4, 3]) & AttentionMask.padding(
        torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    )
    with_picture = ("img", "img", "·", "bos", "a", "red", "cup")
    without = ("·", "·", "bos", "a", "big", "red", "cup")
    in_the_ring = window.at_positions(torch.tensor([[5]]), torch.tensor([[0, 5, 4]]))
    return {
        "causal": svg_of("causal", AttentionMask.causal(), WORDS),
        "bidirectional": svg_of("bidirectional", AttentionMask.bidirectional(), WORDS),
        "prefix": svg_of("prefix of 3 tokens", AttentionMask.prefix(3), CAPTION),
        "sliding_window": svg_of("sliding window of 2, 1 sink", window, WORDS),
        "padding": svg_of("causal & padding", AttentionMask.causal() & sides, left, right),
        "sides": svg_of("sliding window of 2, 1 sink, & padding", window & sides, left, right),
        "model": svg_of("prefix & padding, as the model builds it", built, with_picture, without),
        "cached": svg_of(
            "causal, query offset 4", AttentionMask.causal(query_offset=4), WORDS, queries=WORDS[4:]
        ),
        "ring": svg_of(
            "slots of a sliding window cache", in_the_ring, ("a", "cup", "red"), queries=("cup",)
        ),
    }


def main() -> None:
    folder = Path(__file__).parent / "masks"
    folder.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()

"""One HTML page about an evaluation, which opens offline: pictures, charts and style are inside.

Everything that comes from data is escaped. Nothing is fetched, and there is no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from bitgen.inference.evaluate import RobotScores

_PICTURE_SIDE = 480
_QUALITY = 82
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 260, 46, 34, 12

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Example:
    """One picture, what was said of it, and what people wrote."""

    picture: Path
    caption: str
    references: Sequence[str]
    score: float
    """CIDEr of the caption."""
    overlays: Sequence[tuple[str, Image.Image]] = field(default_factory=tuple)
    """For each word, where on the picture the model looked."""


@dataclass(frozen=True)
class Group:
    """Examples under one heading."""

    title: str
    examples: Sequence[Example]


def render(
    title: str,
    subtitle: str,
    figures: Sequence[tuple[str, str]],
    curves: Mapping[str, Mapping[str, Points]],
    groups: Sequence[Group],
    lengths: Mapping[int, int],
    robots: RobotScores | None,
    robot_figures: Sequence[tuple[str, str]] = (),
) -> str:
    """The page. A section without content is left out; so is a picture that cannot be read.

    Args:
        title: what was evaluated.
        subtitle: on what.
        figures: names and values of the captions' figures.
        curves: charts of the training: for each, its lines by name.
        groups: captions to look at.
        lengths: how many captions have so many words.
        robots: how robots were chosen.
        robot_figures: names and values of it.
    """
    sections = []
    if figures:
        sections.append(_section("Figures", _tiles(figures)))
    if curves:
        charts = "".join(_line_chart(name, lines) for name, lines in curves.items())
        sections.append(_section("Training", f'<div class="charts">{charts}</div>'))
    if lengths:
        sections.append(_section("Caption length", _histogram(lengths)))
    for group in groups:
        cards = "".join(_card(example) for example in group.examples)
        sections.append(_section(group.title, f'<div class="cards">{cards}</div>'))
    if any(example.overlays for group in groups for example in group.examples):
        sections.append(
            "<p class=note>Attention shows where the decoder's layers looked for each word, not why"
            " the model said it.</p>"
        )
    if robots is not None:
        content = _tiles(robot_figures) + _confusion(robots) + _reliability(robots)
        sections.append(_section("Robots", content))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>Evaluation of {escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><p class=kicker>BitGen evaluation</p><h1>{escape(title)}</h1>"
        f"<p>{escape(subtitle)}</p></header><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _tiles(figures: Sequence[tuple[str, str]]) -> str:
    tiles = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _card(example: Example) -> str:
    source = _data_uri(example.picture)
    picture = (
        f'<img src="{source}" alt="Picture captioned: {escape(example.caption)}">'
        if source
        else '<p class="missing">The picture is not on this machine.</p>'
    )
    references = "".join(f"<li>{escape(text)}</li>" for text in example.references)
    maps = "".join(
        f'<figure><img src="{_encoded(image)}" alt="Attention for {escape(word, quote=True)}">'
        f"<figcaption>{escape(word)}</figcaption></figure>"
        for word, image in example.overlays
    )
    attention = f'<details><summary>Attention</summary><div class="maps">{maps}</div></details>'
    return (
        f"<article>{picture}<div class=body><p class=caption>{escape(example.caption) or '&nbsp;'}"
        f"</p><p class=score>CIDEr {example.score:.2f}</p><details><summary>What people wrote"
        f"</summary><ul>{references}</ul></details>{attention if maps else ''}</div></article>"
    )


def _data_uri(path: Path) -> str | None:
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    return _encoded(picture)


def _encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Charts -------------------------------------------------------------------------------------------


def _chart(title: str, description: str, content: str, legend: str = "") -> str:
    return (
        f"<figure class=chart><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"{content}</svg></figure>"
    )


def _axes(
    x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_name: str
) -> str:
    """Lines and numbers; places are shares of the drawing area, 0 to 1."""
    parts = []
    for place, text in y_ticks:
        y = _y(place)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for place, text in x_ticks:
        parts.append(
            f'<text x="{_x(place):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
            f' text-anchor="{"end" if place > 0.99 else "middle"}">{text}</text>'
        )
    parts.append(
        f'<text x="{_x(0.5):.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return "".join(parts)


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - 8 - _LEFT)


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _BOTTOM - _TOP)


def _line_chart(title: str, lines: Mapping[str, Points]) -> str:
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    width = (right - left) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    spread = (high - low) or 1.0
    parts = [
        _axes(
            [(part, f"{left + part * width:,.0f}") for part in (0, 0.25, 0.5, 0.75, 1)],
            [(part, f"{low + part * spread:.2g}") for part in (0, 0.25, 0.5, 0.75, 1)],
            "updates",
        )
    ]
    legend = ""
    for number, (name, line) in enumerate(lines.items(), start=1):
        kept = line[:: -(-len(line) // 400)]  # no more than a screen shows
        path = " ".join(
            f"{_x((x - left) / width):.1f},{_y((y - low) / spread):.1f}" for x, y in kept
        )
        parts.append(f'<polyline class="line{number}" points="{path}"/>')
        legend += f' <span class="key{number}">{escape(name)}</span>'
    return _chart(title, f"{title} over the updates of the training", "".join(parts), legend)


def _histogram(lengths: Mapping[int, int]) -> str:
    low, high = min(lengths), max(lengths)
    most, count = max(lengths.values()), high - low + 1
    step = -(-count // 12)
    parts = [
        _axes(
            [((n - low + 0.5) / count, str(n)) for n in range(low, high + 1, step)],
            [(part, f"{part * most:,.0f}") for part in (0, 0.5, 1)],
            "words",
        )
    ]
    width = (_x(1) - _x(0)) / count
    for length, number in lengths.items():
        x, top = _x((length - low) / count), _y(number / most)
        parts.append(
            f'<rect class="bar" x="{x + width * 0.1:.1f}" y="{top:.1f}" width="{width * 0.8:.1f}"'
            f' height="{_y(0) - top:.1f}"><title>{number:,} of {length} words</title></rect>'
        )
    return _chart(
        "Captions by their number of words", "Histogram of caption lengths", "".join(parts)
    )


def _reliability(robots: RobotScores) -> str:
    ticks = [(part, f"{part:.0%}") for part in (0, 0.25, 0.5, 0.75, 1)]
    parts = [_axes(ticks, ticks, "probability given")]
    parts.append(f'<line class="ideal" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/>')
    seen = [
        (entry.mean_probability, entry.share_right, entry.count)
        for entry in robots.reliability
        if entry.mean_probability is not None and entry.share_right is not None
    ]
    path = " ".join(f"{_x(p):.1f},{_y(share):.1f}" for p, share, _ in seen)
    parts.append(f'<polyline class="line1" points="{path}"/>')
    most = max(count for _, _, count in seen)
    for probability, share, count in seen:
        radius = 4 + 6 * (count / most) ** 0.5
        parts.append(
            f'<circle class="dot" cx="{_x(probability):.1f}" cy="{_y(share):.1f}" r="{radius:.1f}">'
            f"<title>{count:,} probabilities near {probability:.0%}: right in {share:.0%}</title>"
            "</circle>"
        )
    return _chart(
        "Reliability: how often a probability held (dashed: always as often as it says)",
        "Reliability curve of the robots' probabilities",
        "".join(parts),
    )


def _confusion(robots: RobotScores) -> str:
    names = [robot.name for robot in robots.robots]
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    rows = ""
    for robot, counts in zip(robots.robots, robots.confusion, strict=True):
        cells = "".join(
            f'<td style="--heat:{round(100 * count / max(1, robot.num_tasks))}%"'
            f"{' class=hit' if other == robot.name else ''}>{count}</td>"
            for other, count in zip(names, counts, strict=True)
        )
        rows += (
            f'<tr><th scope="row">{escape(robot.name)}</th>{cells}<td>{robot.num_tasks}</td>'
            f"<td>{robot.missed}</td><td>{robot.wrongly_chosen}</td><td>{robot.f1:.3f}</td></tr>"
        )
    return (
        '<div class="scroll"><table><caption>Tasks that suit the robot of the row, and for how many'
        " of them the robot of the column was chosen. A task may suit several.</caption><thead><tr>"
        f'<th scope="col">suits</th>{head}<th scope="col">tasks</th><th scope="col">missed</th>'
        f'<th scope="col">wrongly chosen</th><th scope="col">F1</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


_STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#171b22;--soft:#576070;--rule:#dde1e7;--one:#2563a8;
--two:#b83a4b;--heat-ink:#2563a8}
@media (prefers-color-scheme:dark){:root{--paper:#12151a;--card:#1b2027;--ink:#e8ebf0;
--soft:#a3adbb;--rule:#323a45;--one:#72aef0;--two:#f08a98;--heat-ink:#3d7cc4}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 16px}
header{padding-top:32px}header p{margin:4px 0;color:var(--soft)}
.kicker{font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{margin:0;font-size:clamp(22px,4vw,32px);line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 12px;font-size:20px}section{margin:32px 0}
.tiles{display:grid;gap:8px;margin:0;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.tiles div,article,.chart,.scroll{background:var(--card);border:1px solid var(--rule);
border-radius:10px}
.tiles div{padding:10px 14px}dt{color:var(--soft);font-size:13px}
dd{margin:0;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.chart{margin:0;padding:12px;max-width:720px}.chart figcaption{font-weight:600;margin-bottom:6px}
.tiles+.scroll,.scroll+.chart{margin-top:12px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--rule)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.line1{stroke:var(--one)}.line2{stroke:var(--two)}.bar,.dot{fill:var(--one)}
.ideal{stroke:var(--soft);stroke-dasharray:5 5}
.key1,.key2{font-weight:400;color:var(--soft);margin-left:10px}
.key1::before,.key2::before{content:"";display:inline-block;width:14px;height:3px;
margin-right:5px;vertical-align:middle;background:var(--one)}.key2::before{background:var(--two)}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
align-items:start}
article{overflow:hidden}article>img{display:block;width:100%;aspect-ratio:4/3;object-fit:contain;
background:#0c0e11}.missing{margin:0;padding:32px 14px;color:var(--soft);text-align:center}
.body{padding:12px 14px}.caption{margin:0;font-weight:600;overflow-wrap:anywhere}
.score,.note{margin:2px 0 8px;color:var(--soft);font-size:14px}
summary{cursor:pointer;color:var(--one)}details{margin-top:4px}
ul{margin:6px 0;padding-left:20px}li{overflow-wrap:anywhere}
.maps{display:grid;gap:6px;margin-top:6px;grid-template-columns:repeat(auto-fill,minmax(80px,1fr))}
.maps figure{margin:0}.maps img{width:100%;display:block;border-radius:4px}
.maps figcaption{font-size:13px;text-align:center;overflow-wrap:anywhere}
.scroll{overflow-x:auto;padding:12px}table{border-collapse:collapse;font-size:14px;
font-variant-numeric:tabular-nums}caption{text-align:left;color:var(--soft);padding-bottom:8px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--rule)}
th{font-weight:600}th[scope=row],thead th:first-child{text-align:left}
td[style]{background:color-mix(in srgb,var(--heat-ink) calc(var(--heat)*.55),transparent)}
td.hit{font-weight:700;outline:1px solid var(--soft);outline-offset:-2px}
"""

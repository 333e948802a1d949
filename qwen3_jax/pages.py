"""Parts of HTML pages that need no network and no library: their style, rows of tables, lines and heat maps as SVG."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 92em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .5em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
td.text { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
.scroll { overflow-x: auto } .no { color: #b3261e } svg { max-width: 100%; height: auto } img { max-width: 100% }
svg text { font: 12px system-ui, sans-serif; fill: #222 } li { margin: .2em 0 }
"""
STROKES = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#9c6b4e", "#9498a0")
WIDTH, HEIGHT, LEFT, TOP, BELOW = 900, 280, 80, 12, 60  # pixels
LOW, EVEN, HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # colours of 0, 1, and 2 or more

Points = Sequence[tuple[float, float]]


def cells(kind: str, values: Sequence[str], look: str = "") -> str:
    """A row of a table.

    Args:
        kind: th or td.
        values: text of each cell.
        look: class of the style; "text" keeps spaces and ends of lines.

    Returns:
        A tr element.
    """
    opened = f'{kind} class="{look}"' if look else kind
    return "<tr>" + "".join(f"<{opened}>{escape(value)}</{kind}>" for value in values) + "</tr>"


def lines(series: Mapping[str, Points], x: str, y: str) -> str:
    """Lines over one pair of axes.

    Args:
        series: name -> points (x, y), finite, in order; a series of one point is a dot.
        x: what runs to the right, with its unit.
        y: what runs upwards, with its unit.

    Returns:
        The SVG element; a sentence where there are no points.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return f"<p>There is no {escape(y)} yet.</p>"
    across, up = (ticks([point[axis] for points in drawn.values() for point in points]) for axis in (0, 1))
    right, bottom = WIDTH - 20, HEIGHT - BELOW

    def place(point: tuple[float, float]) -> tuple[float, float]:
        share = [(value - marks[0]) / (marks[-1] - marks[0]) for value, marks in zip(point, (across, up), strict=True)]
        return LEFT + share[0] * (right - LEFT), bottom - share[1] * (bottom - TOP)

    parts = []
    for mark in up:
        height = place((across[0], mark))[1]
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{said(mark)}</text>')
    for mark in across:
        parts.append(f'<text x="{place((mark, up[0]))[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{said(mark)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 36}" text-anchor="end">{escape(x)}</text>')
    at = float(LEFT)
    for number, (name, points) in enumerate(drawn.items()):
        color = STROKES[number % len(STROKES)]
        path, title = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in points), f"<title>{escape(name)}</title>"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5">{title}</polyline>')
        if len(points) <= 40:
            parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*place(point), color) for point in points]
        parts.append(f'<rect x="{at:g}" y="{HEIGHT - 16}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{at + 16:g}" y="{HEIGHT - 6}">{escape(name)}</text>')
        at += 40 + 7 * len(name)
    return f"{svg(WIDTH, HEIGHT)}<title>{escape(y)}</title>{''.join(parts)}</svg>"


def svg(width: int, height: int) -> str:
    """The tag that opens a picture of so many pixels, which a narrower page makes smaller."""
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'


def ticks(values: Sequence[float]) -> list[float]:
    """Round marks of an axis that holds these values, 1, 2 or 5 times a power of ten apart.

    Args:
        values: at least one, finite.

    Returns:
        Two to some seven marks in order; the first is at most the least value, the last at least the greatest.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def said(value: float) -> str:
    """A number in few letters, 1.5M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def heat(values: Float[np.ndarray, "R C"], name: str, width: int, height: int) -> str:
    """A heat map: blue 0, white 1, red 2 or more.

    Args:
        values: rows from above.
        name: what it shows.
        width: in pixels.
        height: in pixels.

    Returns:
        An img element that holds its picture.
    """
    share = np.clip(np.nan_to_num(np.asarray(values, np.float64), nan=1.0), 0, 2)[..., None]
    low, even, high = (np.asarray(color, np.float64) for color in (LOW, EVEN, HIGH))
    colors = np.where(share < 1, low + share * (even - low), even + (share - 1) * (high - even))
    source = base64.b64encode(_png(np.round(colors).astype(np.uint8))).decode()
    return (
        f'<img alt="{escape(name)}" title="{escape(name)}" width="{width}" height="{height}" '
        f'style="image-rendering: pixelated" src="data:image/png;base64,{source}"/>'
    )


def _png(pixels: np.ndarray) -> bytes:
    """[height, width, 3] uint8 as a PNG (ISO 15948): header, one deflated block of unfiltered rows, end."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

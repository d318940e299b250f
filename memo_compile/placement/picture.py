"""A picture of a placement: time to the right, addresses upward, one rectangle a buffer."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from html import escape

from memo_compile.placement.problem import Buffer, Placement

WIDTH, HEIGHT, MARGIN = 1000, 600, 40


def svg(buffers: Sequence[Buffer], placement: Placement) -> str:
    """An SVG document. Each rectangle says name, bytes, offset and lifetime when pointed at.

    >>> svg([Buffer("a", 4, 0, 2)], Placement({"a": 0}, 4, 4, True, "by hand", 0.0)).count("<rect")
    2
    """
    first = min((b.start for b in buffers), default=0)
    steps = max(1, max((b.end for b in buffers), default=1) - first)
    peak = max(1, placement.peak)
    across, up = WIDTH / steps, HEIGHT / peak
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 2 * MARGIN} {HEIGHT + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" fill="#fff" stroke="#888"/>',
    ]
    for k, b in enumerate(buffers):
        offset = placement.offsets[b.name]
        x, width = MARGIN + (b.start - first) * across, (b.end - b.start) * across
        y, height = MARGIN + HEIGHT - (offset + b.size) * up, b.size * up
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{_colour(k)}" '
            f'stroke="#333" stroke-width="0.3"><title>{escape(b.name)}: {b.size} bytes at {offset}, '
            f"[{b.start}, {b.end})</title></rect>"
        )
    low = MARGIN + HEIGHT - placement.lower_bound * up
    parts += [
        f'<line x1="{MARGIN}" x2="{MARGIN + WIDTH}" y1="{low:.2f}" y2="{low:.2f}" stroke="#c00" '
        'stroke-dasharray="6 4"/>',
        f'<text x="{MARGIN}" y="{MARGIN - 8}">peak {placement.peak:,} bytes, lower bound {placement.lower_bound:,} '
        f"(dashed), by {escape(placement.solver)}</text>",
        f'<text x="{MARGIN}" y="{MARGIN + HEIGHT + 18}">step {first}</text>',
        f'<text x="{MARGIN + WIDTH}" y="{MARGIN + HEIGHT + 18}" text-anchor="end">step {first + steps}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _colour(k: int) -> str:
    """Neighbours in the list get hues far apart: steps of the golden ratio."""
    red, green, blue = colorsys.hls_to_rgb(k * 0.618034 % 1, 0.72, 0.55)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"

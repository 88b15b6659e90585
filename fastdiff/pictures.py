"""Pictures for people: small images enlarged and labelled, in a grid, a strip or an animation. Pillow alone; nothing here knows of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_write

PAPER, INK, MUTED, LINE, ACCENT = "#f5f3ee", "#20242a", "#565d68", "#d6d0c4", "#b4501e"
TITLE, LABEL, CAPTION = 28, 17, 15  # pixels: readable at 100 %
MARGIN, GAP = 28, 8
COLOURS = 256  # of a GIF's frame
# Pillow's font is Latin: what it lacks, and a caption may want, in letters that it has.
SPELT = str.maketrans(
    {"\u00d7": "x", "\u2013": "-", "\u2014": "-", "\u2192": "to", "\u00a0": " ", "\u2248": "~", "\u03b1": "alpha", "\u03c3": "sigma"}
)
# x_t and x_0 with their index lowered, and not dpmpp_2m.
INDEXED = re.compile(r"\b([a-z])_([a-z0-9])\b")

# A progress bar of so many steps: a context manager with update(), as tqdm's.
Bar = Callable[[int], Any]
# First column, last column, text.
Span = tuple[int, int, str]


class Made(NamedTuple):
    """A picture that was written: where, what it is called, and what is to be seen in it, in a sentence or two."""

    path: Path
    title: str
    text: str


@lru_cache(maxsize=8)
def font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def enlarged(image: np.ndarray, scale: int) -> Image.Image:
    """A uint8 image [H, W, C], each pixel a square of `scale` pixels, as RGB on white."""
    pixels = image.repeat(scale, 0).repeat(scale, 1)  # [H scale, W scale, C]
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _runs(text: str, size: int) -> list[tuple[str, Any, int]]:
    """One line as (text, font, how far lowered)."""
    small = round(size * 0.72)
    parts: list[tuple[str, Any, int]] = []
    end = 0
    for match in INDEXED.finditer(text):
        parts += [(text[end : match.start()] + match[1], font(size), 0), (match[2], font(small), round(size * 0.38))]
        end = match.end()
    return [*parts, (text[end:], font(size), 0)]


def width_of(text: str, size: int) -> int:
    """Pixels that the widest line of a text takes."""
    lines = (_runs(line, size) for line in text.translate(SPELT).split("\n"))
    return max(round(float(sum(face.getlength(part) for part, face, _ in runs))) for runs in lines)


def line_height(size: int) -> int:
    return round(size * 1.3)


def wrapped(text: str, size: int, width: int) -> str:
    """A text with line breaks where it would pass a width; a single word may."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and width_of(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: str = INK, align: str = "left") -> None:
    """Lines of text; `at` is the left, middle or right of the top line. x_t has its index lowered."""
    x, y = at
    for line in text.translate(SPELT).split("\n"):
        length = width_of(line, size)
        left: float = x - {"left": 0, "middle": length // 2, "right": length}[align]
        for part, face, lowered in _runs(line, size):
            # By the ascender, so that lines with and without descenders stand alike.
            draw.text((left, y + size + lowered), part, font=face, fill=colour, anchor="ls")
            left += face.getlength(part)
        y += line_height(size)


def height_of(text: str, size: int) -> int:
    return line_height(size) * (text.count("\n") + 1) if text else 0


def figure(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    scale: int,
    title: str = "",
    text: str = "",
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    under: Sequence[Sequence[Span]] = (),
    apart: Sequence[int] = (),
    over: Sequence[Span] = (),
    gauge: tuple[float, str] | None = None,
    note: str = "",
    least: int = 0,
) -> Image.Image:
    """A labelled grid of uint8 images [H, W, C] of one size, or None for an empty place.

    columns, labels: over each column and left of each row. under: for each row, what stands under its tiles (see `each`). over: headings of several
    columns above the columns' own. apart: columns with more room before them. gauge: a bar under the text, filled so far (0 to 1), and what it says.
    note: a line at the end. least: the picture's least width in pixels.
    """
    tiles = [tile for row in rows for tile in row if tile is not None]
    high, wide = (tiles[0].shape[0] * scale, tiles[0].shape[1] * scale) if tiles else (scale, scale)
    across = max((len(row) for row in rows), default=0)

    # What stands over or under a tile is broken to its width, and a word that is longer makes the column wider.
    def longest(texts: Sequence[str], size: int) -> int:
        return max((width_of(word, size) for entry in texts for word in entry.split()), default=0)

    place = max(wide, longest(columns, LABEL), longest([entry for row in under for a, b, entry in row if a == b], CAPTION))
    heads = [wrapped(entry, LABEL, place) for entry in columns]
    aside = max((width_of(entry, LABEL) for entry in labels), default=0)
    lefts, left = [], MARGIN + (aside + 2 * GAP if aside else 0)
    for column in range(across):
        left += (3 * GAP if column in apart else GAP) if column else 0
        lefts.append(left)
        left += place
    captions = [[(a, b, wrapped(entry, CAPTION, lefts[b] + place - lefts[a])) for a, b, entry in row] for row in under]
    width = max(left + MARGIN, least, 2 * MARGIN + width_of(title, TITLE))
    if gauge:
        beside = max(width_of(gauge[1], LABEL), 120) + 2 * GAP  # of one width, while the number in it changes
        width = max(width, 2 * MARGIN + beside + 100)
    text, note = (wrapped(entry, size, width - 2 * MARGIN) for entry, size in ((text, LABEL), (note, CAPTION)))

    top = MARGIN
    title_at, top = top, top + (height_of(title, TITLE) + GAP // 2 if title else 0)
    text_at, top = top, top + height_of(text, LABEL)
    gauge_at, top = top + GAP, top + (LABEL + 2 * GAP if gauge else 0)
    if title or text or gauge:
        top += 2 * GAP
    over_at, top = top, top + (line_height(LABEL) + GAP if over else 0)
    heads_at, top = top, top + (max((height_of(head, LABEL) for head in heads), default=0) + GAP // 2 if heads else 0)
    tops = []
    for r, _ in enumerate(rows):
        tops.append(top)
        top += max(high, height_of(labels[r], LABEL) if r < len(labels) else 0) + GAP
        if r < len(captions):
            top += max((height_of(entry, CAPTION) for _, _, entry in captions[r]), default=0) + GAP // 2
    note_at, top = top + GAP // 2, top + (height_of(note, CAPTION) + GAP if note else 0)
    canvas = Image.new("RGB", (width, top - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)

    write(draw, (MARGIN, title_at), title, TITLE)
    write(draw, (MARGIN, text_at), text, LABEL, MUTED)
    if gauge:
        filled, says = gauge
        right = width - MARGIN - beside
        draw.rectangle((MARGIN, gauge_at + 3, right, gauge_at + LABEL), fill=LINE)
        if filled > 0:
            draw.rectangle((MARGIN, gauge_at + 3, MARGIN + round(min(filled, 1) * (right - MARGIN)), gauge_at + LABEL), fill=ACCENT)
        write(draw, (right + 2 * GAP, gauge_at), says, LABEL)
    for first, last, entry in over:
        middle, end = (lefts[first] + lefts[last] + place) // 2, lefts[last] + place
        write(draw, (middle, over_at), entry, LABEL, ACCENT, "middle")
        draw.line((lefts[first], over_at + line_height(LABEL) + 2, end - 1, over_at + line_height(LABEL) + 2), fill=LINE, width=2)
    for left, head in zip(lefts, heads, strict=False):
        # Headings of fewer lines stand on the tiles, too.
        lower = max(head.count("\n") for head in heads) - head.count("\n")
        write(draw, (left + place // 2, heads_at + lower * line_height(LABEL)), head, LABEL, INK, "middle")
    for r, row in enumerate(rows):
        if r < len(labels):
            lines = height_of(labels[r], LABEL)
            write(draw, (MARGIN, tops[r] + max(high - lines, 0) // 2), labels[r], LABEL)
        for column, tile in enumerate(row):
            x = lefts[column] + (place - wide) // 2
            if tile is not None:
                draw.rectangle((x - 1, tops[r] - 1, x + wide, tops[r] + high), outline=LINE)
                canvas.paste(enlarged(tile, scale), (x, tops[r]))
        for first, last, entry in captions[r] if r < len(captions) else ():
            write(draw, ((lefts[first] + lefts[last] + place) // 2, tops[r] + high + GAP // 2), entry, CAPTION, MUTED, "middle")
    write(draw, (MARGIN, note_at), note, CAPTION, MUTED)
    return canvas


def each(texts: Sequence[str]) -> list[Span]:
    """A text under every tile."""
    return [(k, k, text) for k, text in enumerate(texts)]


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under another, on one sheet of paper."""
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """A PNG, which takes its name only once it is whole."""
    with atomic_write(path) as f:
        picture.save(f, format="PNG", optimize=True)


def save_gif(frames: Sequence[Image.Image], path: Path, *, ms: int | Sequence[int] = 100, pause: int = 1500) -> None:
    """An endless animation of RGB pictures of one size, each for `ms` milliseconds, or for its own; the last one stays for `pause`.

    Each frame has a palette of its own, without dithering, in which the paper and the letters keep their colours to the bit.
    """
    if not frames or len({frame.size for frame in frames}) > 1:
        raise ValueError("an animation takes at least one frame, and all of one size")
    paletted = [_paletted(frame) for frame in frames]
    with atomic_write(path) as f:
        paletted[0].save(
            f,
            format="GIF",
            save_all=True,
            append_images=paletted[1:],
            duration=[*([ms] * len(frames) if isinstance(ms, int) else ms)[:-1], pause],
            loop=0,
            optimize=False,
            disposal=1,
        )


def _paletted(frame: Image.Image) -> Image.Image:
    pixels = np.asarray(frame)  # [H, W, 3]
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)  # [H, W]
    found, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16 & 255, found >> 8 & 255, found & 255], axis=1)  # [K, 3]
    if len(found) <= COLOURS:
        palette, nearest = colours, np.arange(len(found))
    else:
        # What covers the most stays as it is: paper, lines, letters, a sprite's white. The rest is split by what colours there are, each counted once,
        # since a background of a thousand pixels must not take the palette from a face of twenty.
        kept = colours[np.argsort(-counts, kind="stable")[:32]]
        each = Image.fromarray(colours[None].astype(np.uint8))
        few = each.quantize(COLOURS - len(kept), Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).getpalette() or []
        palette = np.concatenate([kept, np.array(few).reshape(-1, 3)])[:COLOURS]
        # |c - p|^2 without the part that is the same for all p.
        distance = (palette**2).sum(1) - 2 * colours @ palette.T  # [K, 256]
        nearest = distance.argmin(1)
    out = Image.frombytes("P", frame.size, nearest[places].astype(np.uint8).tobytes())
    out.putpalette(palette.astype(np.uint8).tobytes())
    return out

"""An image file cut down to what its pixels are made of: no text, profiles or thumbnails, nor pictures after the first.

Pillow takes time and memory for each part of a file, were it empty, and joins, unpacks or looks into those that no pixel needs. So they are counted
here before it sees any, and most are left out.
"""

from __future__ import annotations

import contextlib
import io
from typing import Literal

import numpy as np
from PIL import Image

MAX_PARTS = 1 << 16  # chunks, segments, blocks, strips: a PNG of 128 MiB may be in chunks of 2 KiB
MAX_HEAD = 1 << 16  # bytes of a JPEG's tables ahead of its first scan, or of a PPM's header
MAX_COMMENTS = 1 << 10  # of a PPM in plain text, where Pillow moves up to 1 MiB to take one out
MAX_SCANS = 256  # of a JPEG; a progressive one has some 10
MAX_SCANNED = 1 << 28  # a JPEG's pixels, times its scans: each is gone through for all of the image
MAX_TILE = 1 << 24  # pixels of a TIFF's tile

PNG = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
WEBP_FRAME = (b"ALPH", b"VP8 ", b"VP8L")
WEBP = (b"VP8X", b"ANIM", b"ANMF", *WEBP_FRAME)
# Tables, frames and restarts of a JPEG, and those of a program's segments that tell how colours are stored: what their contents begin with.
JPEG = dict.fromkeys([*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDB, 0xDD], b"") | {0xE0: b"JFIF", 0xEE: b"Adobe"}
JPEG_BARE = (0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE), 0xFF)  # no markers, or without a length
TIFF = {*range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 338, 339, 347, *range(529, 533)}
TIFF_NUMBERS = {3: "u2", 4: "u4", 16: "u8"}


class TooManyError(ValueError):
    """An image file has more of something than any program writes: "more than 65536 parts"."""


def pixels_only(content: bytes) -> bytes:
    """The image file without what its pixels do not need. TooManyError, or ValueError; what else is damaged stays so, for the decoder to tell."""
    readers = {b"\x89PNG": _png, b"\xff\xd8\xff": _jpeg, b"GIF8": _gif, b"RIFF": _webp, b"II": _tiff, b"MM": _tiff, b"P": _ppm}
    return next((read(content) for magic, read in readers.items() if content.startswith(magic)), content)


def too_many_scans(content: bytes, pixels: int) -> bool:
    """Whether a JPEG of so many pixels, cut down, has more scans than there may be."""
    return content.count(b"\xff\xda") > min(MAX_SCANS, MAX_SCANNED // pixels)


def _too_many() -> TooManyError:
    return TooManyError(f"more than {MAX_PARTS} parts")


def _png(content: bytes) -> bytes:
    view, at = memoryview(content), 8
    kept = [view[:8]]
    for _ in range(MAX_PARTS):
        kind, end = content[at + 4 : at + 8], at + 12 + int.from_bytes(content[at : at + 4], "big")
        if kind in PNG:
            kept.append(view[at:end])
        if kind == b"IEND" or end >= len(content):
            return b"".join(kept)
        at = end
    raise _too_many()


def _jpeg(content: bytes) -> bytes:
    head, at = content[:2], 2
    for _ in range(MAX_PARTS):
        if at + 1 >= len(content):
            return head
        code = content[at + 1]
        if content[at] != 0xFF or code in JPEG_BARE:
            at += 1
            continue
        if code == 0xDA:
            # Scans have no such pair in them; a second picture or a film may follow.
            end = content.find(b"\xff\xd9", at)
            return head + (content[at:] if end < 0 else content[at : end + 2])
        end = at + 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big"))
        if code in JPEG and content.startswith(JPEG[code], at + 4):
            head += content[at:end]
        if len(head) > MAX_HEAD:
            raise TooManyError(f"more than {MAX_HEAD} bytes of tables")
        at = end
    raise _too_many()


def _gif(content: bytes) -> bytes:
    flags = int.from_bytes(content[10:11], "little")
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)  # with a palette
    head, control = content[:at], b""
    budget = iter(range(MAX_PARTS))
    for _ in budget:
        kind, end = content[at : at + 2], at + 2
        if kind[:1] == b"!":
            while content[end : end + 1] not in (b"", b"\0") and next(budget, None) is not None:
                end += 1 + content[end]
            if kind == b"!\xf9" and end > at + 2:
                control = content[at : end + 1]
            at = end + 1
        elif kind[:1] in (b",", b";", b""):
            return head + control + content[at:]
        else:
            at += 1
    raise _too_many()


def _webp(content: bytes) -> bytes:
    body = _webp_chunks(content, 12, WEBP)
    return b"".join([b"RIFF", (4 + len(body)).to_bytes(4, "little"), content[8:12], body])


def _webp_chunks(content: bytes, at: int, kinds: tuple[bytes, ...]) -> bytes:
    """Those of the kinds, up to the first picture; a frame has such chunks in it."""
    view = memoryview(content)
    kept: list[bytes | memoryview] = []
    for _ in range(MAX_PARTS):
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if kind == b"ANMF" and kind in kinds:
            frame = content[at + 8 : at + 24] + _webp_chunks(content, at + 24, WEBP_FRAME)
            return b"".join([*kept, kind, len(frame).to_bytes(4, "little"), frame])
        if kind in kinds:
            kept.append(view[at:end])
        if kind in (b"VP8 ", b"VP8L") or end >= len(content):
            return b"".join(kept)
        at = end
    raise _too_many()


def _tiff(content: bytes) -> bytes:
    """Its directory has only the entries of TIFF, the first of each, and none of more than MAX_PARTS numbers; no other directory follows."""
    if content.startswith(b"MM\0+"):
        raise ValueError("a big-endian BigTIFF")  # which some versions of Pillow take for a plain TIFF
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"
    word, counter = (8, 8) if content.startswith(b"II+\0") else (4, 2)  # bytes of an offset, and of the number of entries
    size = 4 + 2 * word

    def number(data: bytes, at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], order)

    start = number(content, word, word)
    count = number(content, start, counter)
    if start < 2 * word:
        raise ValueError("its directory lies in its header")
    if count > MAX_PARTS:
        raise _too_many()
    entries: dict[int, bytes] = {}
    for at in range(start + counter, min(start + counter + count * size, len(content) - size + 1), size):
        if (tag := number(content, at, 2)) in TIFF:
            entries.setdefault(tag, content[at : at + size])
    if any(number(entry, 4, word) > MAX_PARTS for entry in entries.values()):
        raise _too_many()
    directory = b"".join([len(entries).to_bytes(counter, order), *entries.values(), bytes(word)])
    content = b"".join([content[:start], directory, content[start + len(directory) :]])

    def numbers(tag: int, default: int) -> list[int]:
        if (entry := entries.get(tag)) is None:
            return [default]
        if (kind := number(entry, 2, 2)) not in TIFF_NUMBERS:
            raise ValueError(f"its tag {tag} is of the type {kind}")
        dtype, count = np.dtype(TIFF_NUMBERS[kind]).newbyteorder(order), number(entry, 4, word)
        data, at = (entry, 4 + word) if count * dtype.itemsize <= word else (content, number(entry, 4 + word, word))
        return np.frombuffer(data, dtype, count, at).tolist() or [default]

    # Strips may lie in one place, and tiles be larger than the image.
    if max(sum(numbers(279, 0)), sum(numbers(325, 0))) > len(content):
        raise ValueError("its strips are of more bytes than the file has")
    height = numbers(257, 0)[0]
    pixels = numbers(256, 0)[0] * min(height, numbers(278, height)[0])
    if 322 in entries:
        pixels = numbers(322, 0)[0] * numbers(323, 0)[0]
        if pixels > MAX_TILE:
            raise TooManyError(f"more than {MAX_TILE} pixels in a tile")
    if numbers(259, 1)[0] in (6, 7) and content.count(b"\xff\xda") * pixels > MAX_SCANNED:
        raise TooManyError("too many scans for its pixels")
    return content


def _ppm(content: bytes) -> bytes:
    head = io.BytesIO(content[:MAX_HEAD])
    with contextlib.suppress(Exception):  # which the whole file will raise again
        Image.open(head, formats=["PPM"])
    if len(content) > MAX_HEAD == head.tell():
        raise TooManyError(f"more than {MAX_HEAD} bytes of header")
    if content[1:2] in (b"1", b"2", b"3") and content.count(b"#") > MAX_COMMENTS:
        raise TooManyError(f"more than {MAX_COMMENTS} comments")
    return content

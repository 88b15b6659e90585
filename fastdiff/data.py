"""Small images in memory: the shipped sprites, arrays, folders and sprite sheets -> one uint8 NHWC array with labels."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .files import open_regular, read_regular
from .parts import MAX_HEAD, TooManyError, pixels_only, too_many_scans

ASSETS = Path(__file__).parent / "assets"
MAX_BYTES = 8 << 30  # decoded, one array
MAX_CLASSES = 1 << 16  # one stray label must not make a billion names
MAX_NAME = 200  # characters of one class name
MAX_TEXT = 1000  # characters of an error
# An .npz whose arrays take more than both of these is a bomb: deflate can pack 1,000 bytes into one, images do not.
BOMB_BYTES = 64 << 20
BOMB_RATIO = 200
MAX_DIRECTORY = 1 << 20  # bytes of an archive's table of contents, some 10,000 arrays; also of a single read from it
MAX_PIXELS = 1 << 24  # one image: 4096 x 4096
MAX_SLOW_PIXELS = 1 << 20  # where the decoder is Python code
MAX_IMAGE_BYTES = 128 << 20  # one image's file
MAX_ENTRIES = 1 << 21  # of a folder, its class folders included
# Pillow looks at the content, not the name, and some of its formats start other programs (EPS runs Ghostscript): ours are listed.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def one_line(text: str) -> str:
    """Text as it may be shown whatever it quotes: line ends and control characters escaped, and its middle left out where it is long."""
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 4]} ... {text[-MAX_TEXT // 4 :]}"
    return "".join(c if unshowable(c) is None else c.encode("unicode_escape").decode() for c in text)


def unshowable(text: str) -> str | None:
    """The first character that is a control character, a line end or half of a surrogate pair; None where there is none."""
    if text.isascii() and text.isprintable():
        return None
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


def odd_name(names: Iterable[str]) -> str | None:
    """What is wrong with class names, if anything is: they are shown in terminals and pictures, and stand in error messages."""
    for name in names:
        if len(name) > MAX_NAME:
            return f"a class name has {len(name)} characters, and at most {MAX_NAME} are allowed: {name[:20]!r}..."
        if unshowable(name) is not None:
            return f"the class name {name!r} has a control character or half a character in it; name it in plain text"
    return None


class DataError(ValueError):
    """Data that cannot be used: one line saying what is wrong, where, and what would be right."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images [N, H, W, C] uint8 C-contiguous with C of 1, 3 or 4, labels [N] int64 into `classes`, test [N] bool, True = held out.

    Unlabelled: labels None and classes (). Nothing held out: test None. Raises DataError where the parts do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    test: np.ndarray | None = None

    def __post_init__(self) -> None:
        images, labels, test = self.images, self.labels, self.test
        if images.dtype != np.uint8:
            hint = ": multiply values in 0..1 by 255 and round" if images.dtype.kind == "f" else ""
            raise DataError(f"images are {images.dtype}, but must be uint8 in 0..255{hint}")
        if images.ndim != 4 or min(images.shape[1:]) < 1 or images.shape[3] not in (1, 3, 4):
            hint = "; this looks like [N, C, H, W]: transpose it" if images.ndim == 4 and images.shape[1] in (1, 3, 4) else ""
            raise DataError(f"images have shape {images.shape}, but must be [N, H, W, C] with C of 1, 3 or 4{hint}")
        if not images.flags.c_contiguous:
            raise DataError("images are not C-contiguous: pass numpy.ascontiguousarray(images)")
        if (labels is None) != (not self.classes):
            raise DataError("classes without labels" if labels is None else "labels without classes: name each class")
        if len(set(self.classes)) != len(self.classes):
            raise DataError("two classes have the same name")
        if (odd := odd_name(self.classes)) is not None:
            raise DataError(odd)
        if labels is not None:
            if labels.dtype != np.int64 or labels.ndim != 1:
                raise DataError(f"labels are {labels.dtype} of shape {labels.shape}, but must be int64 [N]")
            if len(labels) != len(images):
                raise DataError(f"{len(labels)} labels for {len(images)} images: give one label an image")
            if len(labels) and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise DataError(f"labels span {labels.min()}..{labels.max()}, but must be in 0..{len(self.classes) - 1}")
        if test is not None and (test.dtype != np.bool_ or test.shape != (len(images),)):
            raise DataError(f"test is {test.dtype} of shape {test.shape}, but must be bool ({len(images)},), True = held out")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the order of the network."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def split(self) -> tuple[Dataset, Dataset]:
        """(training part, held-out part), in order; the held-out part is empty when nothing is held out."""
        if self.test is None:
            return self, self._where(slice(0, 0))
        return self._where(~self.test), self._where(self.test)

    def _where(self, keep: np.ndarray | slice) -> Dataset:
        return Dataset(self.images[keep], None if self.labels is None else self.labels[keep], self.classes, None)

    def digest(self) -> str:
        """sha256 (hex) over shape, classes, images and labels: equal for equal training data, whatever file it came from."""
        head = json.dumps([self.images.shape, self.labels is not None, self.classes])
        digest = hashlib.sha256(head.encode() + b"\n")
        digest.update(self.images.data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").data)
        return digest.hexdigest()


Where = str | os.PathLike[str]


def load(
    source: Where = "sprites",
    *,
    labels: Where | None = None,
    tile: int | None = None,
    size: int | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Read images from `source`, which is one of:

    - "sprites": the shipped set (a folder of that name is "./sprites").
    - X.npz with `images` uint8 [N, H, W, C] or [N, H, W], optionally `labels` (integers [N] or one-hot [N, K]), `classes`, `test`.
    - X.npy with such images; `labels` is a second .npy. For sprites_Y.npy, sprite_labels_nc_Y.npy beside it is found unasked.
    - A folder of images, unlabelled, or of one sub-folder a class; hidden and other files are passed over. `size` area-averages all
      to size x size pixels; without it they must be of one size. `skip_bad` warns of unreadable images instead of raising.
    - One image file, cut row by row into squares of `tile` pixels; tiles of a single colour are dropped.

    Image files become RGB, composed on white; of several pictures in one the first is read. Arrays keep their channels. Classes without
    names are called "0", "1", ...
    Raises DataError, one line, for whatever cannot be read. Nothing is ever unpickled, and no name inside a file is used as a path.

    Sizes are believed only once they fit the file, before anything is decoded. Refused are: an .npz whose arrays take more than 64 MiB and
    more than 200 times its own size, arrays of more than 8 GiB, images of more than 2^24 pixels (2^20 in the formats that Pillow decodes in
    Python), 128 MiB or 2^16 parts (chunks, segments, blocks, strips), folders of more than 2^21 entries, more than 2^16 classes, and class
    names of more than 200 characters or with control characters. Of an image file Pillow is given only what its pixels need. So a file that
    is made to take long takes no longer than a large image does, and memory is bounded: beside the images that are returned, 1 GiB for an
    image file or folder; for .npy and .npz 10 times the arrays' bytes, which in an .npz are at most 64 MiB or 200 times its size.
    """
    path = ASSETS / "sprites.npz" if source == "sprites" else Path(source)
    if not os.path.exists(path) or not os.fspath(source):
        raise DataError(f'no such file or folder: {os.fspath(source)!r} (the shipped set is called "sprites")')
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        kind, takes = "a folder", "size"
    elif suffix in (".npz", ".npy"):
        kind, takes = f"an {suffix} file", "labels" if suffix == ".npy" else ""
    elif suffix in SUFFIXES:
        kind, takes = "an image file", "tile"
    else:
        raise DataError(f"{path}: unsupported kind of file; read are folders, .npz, .npy and, with tile=, {' '.join(SUFFIXES)}")
    users = {"labels": "an .npy file", "tile": "an image file (a sprite sheet)", "size": "a folder of images"}
    for name, value in {"labels": labels, "tile": tile, "size": size}.items():
        if value is not None and name != takes:
            raise DataError(f"{path}: {name}= goes with {users[name]}, but this is {kind}")
        if value is not None and name != "labels" and (not isinstance(value, int) or value < 1):
            raise DataError(f"{name}={value!r}: must be a whole number of pixels, 1 or more")

    if kind == "a folder":
        return _folder(path, size, skip_bad)
    if suffix == ".npz":
        return _npz(path)
    if suffix == ".npy":
        return _npy(path, labels)
    if tile is None:
        raise DataError(f"{path}: a single image; give tile= (pixels a side) to cut it into sprites, or name a folder of images")
    return _sheet(path, tile)


class _Archive(io.FileIO):
    """The bytes of an .npz. zipfile reads the table of contents at once, before it can be asked how large it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(MAX_DIRECTORY + 1 if size is None or size < 0 else min(size, MAX_DIRECTORY + 1)) or b""
        if len(content) > MAX_DIRECTORY:
            raise ValueError(f"its table of contents is of more than the {MAX_DIRECTORY} bytes allowed")
        return content


def _npz(path: Path) -> Dataset:
    try:
        with open_regular(path) as stream, _Archive(stream.fileno(), closefd=False) as file, zipfile.ZipFile(file) as archive:
            entries = _entries(path, archive, os.fstat(stream.fileno()).st_size)
            parts = {}
            for key, entry in entries.items():
                with archive.open(entry) as part:
                    parts[key] = _array(part, entry.file_size, f"{path}: array {key!r}")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_why(error)})") from None
    # Foreign bytes raise a dozen kinds: BadZipFile, zlib.error, NotImplementedError, RuntimeError (encrypted), ...
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz, write it with numpy.savez ({_why(error)})") from None
    return _from_arrays(path, parts["images"], parts.get("labels"), parts.get("classes"), parts.get("test"))


def _entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The arrays to be read of an archive of `size` bytes, found by name: what else it holds, under whatever name, is passed over."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = {info.filename: info for info in infos}
    if len(names) != len(infos):
        raise DataError(f"{path}: two entries of the same name")
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, ends, strict=bool(infos)):
        if info.header_offset + zipfile.sizeFileHeader + info.compress_size > end:  # type: ignore[attr-defined]
            raise DataError(f"{path}: entries that overlap; write it with numpy.savez")
    found = {key: names[f"{key}.npy"] for key in ("images", "labels", "classes", "test") if f"{key}.npy" in names}
    if "images" not in found:
        known = ", ".join(repr(name[:MAX_NAME].removesuffix(".npy")) for name in list(names)[:8])
        raise DataError(f"{path}: no array 'images' in it (found: {known or 'nothing'})")
    for key, info in found.items():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: array {key!r} is packed in a way that NumPy does not use; write it with numpy.savez_compressed")
    total = sum(info.file_size for info in found.values())
    if total > max(BOMB_BYTES, BOMB_RATIO * size):
        raise DataError(
            f"{path}: {total} bytes decoded, more than {BOMB_BYTES} and more than {BOMB_RATIO} times its own {size}; "
            "is it a bomb? else write it with numpy.savez"
        )
    return found


def _npy(path: Path, labels: Where | None) -> Dataset:
    beside = path.with_name(path.name.replace("sprites_", "sprite_labels_nc_", 1))
    if labels is None and path.name.startswith("sprites_") and beside.exists():
        labels = beside
    arrays = []
    for each in [path] if labels is None else [path, Path(labels)]:
        try:
            with open_regular(each) as stream:
                arrays.append(_array(stream, os.fstat(stream.fileno()).st_size, str(each)))
        except OSError as error:
            raise DataError(f"{each}: cannot be opened ({_why(error)})") from None
    return _from_arrays(path, arrays[0], arrays[1] if labels is not None else None)


def _array(stream: IO[bytes], size: int, where: str) -> np.ndarray:
    # The header is believed only if it fits the file, before anything is decoded: no zip bombs, no allocation from a false shape.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy and Python, on headers that they can but just read
            version = np.lib.format.read_magic(stream)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(stream)
            need = math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise DataError(f"{where}: holds pickled Python objects, which are never loaded; save a plain array")
            # Of what takes no bytes there could be any number.
            if dtype.kind not in "biufcU" or not dtype.itemsize:
                raise DataError(f"{where}: holds {str(dtype)[:80]}, but must be an array of plain numbers, or names")
            if any(side < 0 for side in shape):
                raise DataError(f"{where}: its header has the shape {shape}")
            if need > MAX_BYTES:
                raise DataError(f"{where}: {need} bytes decoded, more than the {MAX_BYTES} allowed; split it")
            if stream.tell() + need != size:
                raise DataError(f"{where}: truncated or damaged, {size} bytes where its header asks for {stream.tell() + need}")
            stream.seek(0)
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: not a readable .npy array, write it with numpy.save ({_why(error)})") from None
    return array


def _from_arrays(
    path: Path, images: np.ndarray, labels: np.ndarray | None, classes: np.ndarray | None = None, test: np.ndarray | None = None
) -> Dataset:
    if images.size == 0:
        raise DataError(f"no images in {path}: its array has shape {images.shape}")
    images = np.ascontiguousarray(images[..., None] if images.ndim == 3 else images)  # [N, H, W] -> [N, H, W, 1]
    names: tuple[str, ...] = ()
    if classes is not None:
        if classes.ndim != 1 or classes.dtype.kind != "U" or not len(classes):
            raise DataError(f"{path}: classes are {classes.dtype} of shape {classes.shape}, but must be a list of names")
        if len(classes) > MAX_CLASSES or classes.dtype.itemsize > 4 * MAX_NAME:
            raise DataError(
                f"{path}: {len(classes)} classes, named by up to {classes.dtype.itemsize // 4} characters; "
                f"at most {MAX_CLASSES} of {MAX_NAME} are allowed"
            )
        try:
            names = tuple(str(name) for name in classes)
        except (ValueError, SystemError) as error:  # numbers that are no characters
            raise DataError(f"{path}: classes are no text ({_why(error)})") from None
    if labels is not None:
        if len(labels) != len(images) and labels.size:  # before they are made eight times as large
            raise DataError(f"{path}: {len(labels)} labels for {len(images)} images: give one label an image")
        labels, count = _indices(path, labels, len(names) if classes is not None else None)
        names = names or tuple(str(index) for index in range(count))
    try:
        return Dataset(images, labels, names, test)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _indices(path: Path, labels: np.ndarray, named: int | None) -> tuple[np.ndarray, int]:
    if labels.size == 0:
        raise DataError(f"{path}: labels are empty (shape {labels.shape}): give one label an image")
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        if labels.shape[1] > MAX_CLASSES:
            raise DataError(f"{path}: one-hot labels have {labels.shape[1]} columns, more than the {MAX_CLASSES} classes allowed")
        if not (((labels == 0) | (labels == 1)).all() and ((labels == 1).sum(1) == 1).all()):
            raise DataError(f"{path}: labels of shape {labels.shape} are not one-hot: each row must be a single 1 among 0s")
        count = labels.shape[1]
        if named is not None and named != count:
            raise DataError(f"{path}: one-hot labels have {count} columns for {named} classes: give one column a class")
        return labels.argmax(1).astype(np.int64), count
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype} of shape {labels.shape}, but must be integers [N] or one-hot [N, K]")
    low, count = int(labels.min()), int(labels.max()) + 1
    limit = MAX_CLASSES if named is None else named
    if low < 0 or count > limit:  # before the cast, which would wrap a uint64
        why = "without classes" if named is None else f"with {named} classes"
        raise DataError(f"{path}: labels span {low}..{count - 1}, but {why} must be in 0..{limit - 1}")
    return labels.astype(np.int64), count


def _folder(path: Path, size: int | None, skip_bad: bool) -> Dataset:
    try:
        budget = iter(range(MAX_ENTRIES))
        files, folders = _listing(path, budget)
        groups = {each: _listing(each, budget)[0] for each in folders}
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({_why(error)})") from None
    labelled = any(groups.values())
    if labelled and files:
        raise DataError(f"{path}: has images ({files[0].name}, ...) beside folders of images; put all into class folders, or none")
    labels: list[int] = []
    if labelled:
        # Passing over an empty folder would renumber the classes behind it.
        for folder, inside in groups.items():
            if not inside:
                raise DataError(f"no images in {folder}, which stands among class folders: fill it or move it away")
        files = [file for inside in groups.values() for file in inside]
        labels = [index for index, inside in enumerate(groups.values()) for _ in inside]
    if not files:
        raise DataError(f"no images in {path}: what is read is {' '.join(SUFFIXES)}, there or one folder down")

    images, first = np.empty((0, 0, 0, 3), np.uint8), ""
    good: list[int] = []
    bad: list[str] = []
    for index, file in enumerate(files):
        try:
            picture = _picture(file)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{error}; mend it, or leave such images out with skip_bad (--skip-bad)") from None
            bad.append(str(file.relative_to(path)))
            continue
        if size is not None:
            picture = picture.resize((size, size), Image.Resampling.BOX)
        pixels = np.asarray(picture)  # [H, W, 3]
        if not good:
            if len(files) * pixels.nbytes > MAX_BYTES:
                raise DataError(f"{path}: {len(files)} images of {_wh(pixels)} are more than {MAX_BYTES} bytes; give size (--size)")
            images, first = np.empty((len(files), *pixels.shape), np.uint8), file.name
        elif pixels.shape != images.shape[1:]:
            raise DataError(f"{file}: is {_wh(pixels)}, but {first} is {_wh(images[0])}; give size (--size) to resize all")
        images[len(good)] = pixels
        good.append(index)
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        warnings.warn(one_line(f"{path}: skipped {len(bad)} unreadable of {len(files)} images: {', '.join(bad[:5])}{more}"), stacklevel=3)
    if not good:
        raise DataError(f"no images in {path} could be read, all {len(bad)} are damaged")
    names = tuple(folder.name for folder in groups) if labelled else ()
    return Dataset(images[: len(good)], np.array(labels, np.int64)[good] if labelled else None, names, None)


def _listing(folder: Path, budget: Iterator[int]) -> tuple[list[Path], list[Path]]:
    """A folder's images and folders, in order of their names. Links are followed; devices, FIFOs and links that lead nowhere are passed over."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if next(budget, None) is None:
                raise DataError(f"{folder}: more entries than the {MAX_ENTRIES} allowed in all; pack the images into an .npz")
            try:
                if entry.name.startswith("."):
                    continue
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
                    files.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
            except OSError as error:  # a link to itself
                if error.errno != errno.ELOOP:
                    raise
    return [folder / name for name in sorted(files)], [folder / name for name in sorted(folders)]


def _sheet(path: Path, tile: int) -> Dataset:
    pixels = np.asarray(_picture(path))  # [H, W, 3]
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    if pixels.shape != (rows * tile, columns * tile, 3):
        raise DataError(f"{path}: is {_wh(pixels)}, which does not divide into tiles of {tile} x {tile}")
    tiles = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    # On white a transparent tile is all white, so one rule drops both kinds of empty tile.
    tiles = tiles[(tiles != tiles[:, :1, :1]).any((1, 2, 3))]
    if not len(tiles):
        raise DataError(f"no images in {path}: every tile is transparent or of a single colour")
    return Dataset(tiles, None, (), None)


def opened(path: Path) -> Image.Image:
    """The first picture of an image file, of a size that is allowed, not decoded yet. Raises DataError, or what the decoders raise."""
    content = pixels_only(read_regular(path, MAX_IMAGE_BYTES))
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    pixels, size = image.width * image.height, f"{image.width} x {image.height} pixels"
    slow = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    limit = MAX_SLOW_PIXELS if slow else MAX_PIXELS
    if pixels > limit:
        raise DataError(f"{path}: claims {size}, more than the {limit} allowed; make it smaller")
    # Its runs may be of no pixels.
    if slow and image.format == "BMP" and len(content) > MAX_HEAD + 4 * pixels:
        raise DataError(f"{path}: has {len(content)} bytes for {size}, as no program writes; save it anew")
    if image.format == "JPEG":
        if too_many_scans(content, pixels):
            raise DataError(f"{path}: has more scans than any camera or program writes of {size}; save it anew")
        # In one block: where its decoder can do nothing with a block, it begins anew with the next one added.
        image.decodermaxblock = len(content)  # type: ignore[attr-defined]
    return image


def _picture(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with opened(path) as image:
                # Pillow cuts these off at 255 instead of scaling them.
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{path}: has pixels of more than 8 bits (mode {image.mode}); save it with 8 bits a channel")
                return _on_white(image)
    except DataError:
        raise
    except TooManyError as error:
        raise DataError(f"{path}: has {error}, as no camera or program writes; save it anew") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: claims more pixels than the {MAX_PIXELS} allowed; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a readable image (UnidentifiedImageError: it is none of {', '.join(FORMATS)})") from None
    # The decoders raise OSError, SyntaxError, struct.error, ValueError, EOFError, ... on damaged bytes.
    except Exception as error:
        raise DataError(f"{path}: not a readable image ({_why(error)})") from None


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _wh(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def to_float(images: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W] = v / 127.5 - 1, in [-1, 1]; mirrored left-right where `flip` (bool [N]) is True."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(f"images are {images.dtype} of shape {tuple(images.shape)}, but must be uint8 [N, H, W, C]")
    x = images.permute(0, 3, 1, 2)  # [N, C, H, W]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """fp [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] = (x + 1) 127.5, clamped, half to even; the exact inverse of to_float."""
    if not x.is_floating_point() or x.ndim != 4:
        raise DataError(f"x is {x.dtype} of shape {tuple(x.shape)}, but must be floating point [N, C, H, W]")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = 1) -> Image.Image:
    """One RGB picture of uint8 [N, H, W, C] on white, row by row; each pixel `scale` x `scale`, `gap` pixels between images.

    The top left corner of image i is at ((i % columns) (W scale + gap), (i // columns) (H scale + gap)). Raises DataError.
    """
    Dataset(np.ascontiguousarray(images))
    if not len(images) or columns < 1 or scale < 1 or gap < 0:
        raise DataError(f"grid of {len(images)} images with columns={columns}, scale={scale}, gap={gap}: must be >= 1, 1, 1 and 0")
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    down, right = height * scale + gap, width * scale + gap
    canvas = np.full((rows * down - gap, columns * right - gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * down, index % columns * right
        canvas[top : top + down - gap, left : left + right - gap] = image.repeat(scale, 0).repeat(scale, 1)
    return _on_white(Image.fromarray(canvas[..., 0] if channels == 1 else canvas))

"""A run's shards as one .npz, one .npy, a WebDataset tar or a folder of PNGs, one shard in memory at a time."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from . import runs
from .files import atomic_write, flush_folder, part_of, remove_parts
from .runs import Plan, RunError

CHUNK = 1 << 16  # ids and labels written at a time
TARS = r"%0?\d{0,2}d"  # where a shard's number goes in a name

# (shard, images uint8 [n, H, W, C])
Shards = Iterator[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Collected:
    """What `collect` has made. sha256: of all pixels in the order of their numbers, so the same for all formats, shard sizes and machines."""

    path: Path
    images: int
    sha256: str


def collect(
    folder: str | os.PathLike[str], target: str | os.PathLike[str], progress: Callable[[int], object] = lambda images: None
) -> Collected:
    """Write the images of a complete run into one place, checking each shard's digest on the way. By the name of the target:

    - X.npz: images uint8 [N, H, W, C], ids int64 [N], and labels int64 [N] and classes where there are any, as `fastdiff.data.load` reads it.
    - X.npy: such images alone, to be mapped into memory by numpy.load(X, mmap_mode="r"); labels in X_labels.npy.
    - X.tar: WebDataset, for each image its number as 000000000012.png and .cls. With a %d in the name (X-%06d.tar) one tar a shard.
    - anything else: a folder of PNGs, not there before, with a sub-folder a class.

    The target is whole or, after an error, as it was; of several tars each is, and all shards have been found right before the first is written.
    progress: called with the number of images after each shard. RunError where the run is not complete, or the target cannot be.
    """
    folder, target = Path(folder), Path(target)
    manifest = runs.read_run(folder)
    if manifest.missing:
        raise RunError(
            f"{folder} is not complete: shards {runs.ranges(manifest.missing)} of {manifest.plan.count} are missing; "
            "start its command again, and they are made"
        )
    pixels = hashlib.sha256()

    def watched() -> Shards:
        for k, images in runs.shards(folder, manifest):
            pixels.update(images.data)
            yield k, images
            progress(len(images))

    check(target, folder, manifest.plan)
    names = re.escape(target.name)
    remove_parts(
        target.parent, rf"{names}|{re.escape(_labels(target).name)}" if target.suffix.lower() == ".npy" else _pattern(names), alive=True
    )
    if re.search(TARS, target.name):  # of which each takes its name before the next shard is looked at
        for _ in runs.shards(folder, manifest):
            pass
    KINDS.get(target.suffix.lower(), _folder)(manifest.plan, watched(), target)
    return Collected(target, manifest.plan.images, pixels.hexdigest())


def check(target: Path, folder: Path, plan: Plan) -> None:
    """RunError where nothing can be collected into the target."""
    suffix, numbers = target.suffix.lower(), re.findall(TARS, target.name)
    if not target.parent.is_dir():
        raise RunError(f"there is no folder {target.parent} for {target.name}")
    own = {runs.MANIFEST, runs.LOCK, runs.GRID, *map(plan.name, range(plan.count))}
    if target.parent.resolve() == folder.resolve() and target.name in own:
        raise RunError(f"{target} is one of the run's own files; give another name")
    if suffix and suffix not in KINDS:
        raise RunError(f"{target.name} is neither .npz, .npy nor .tar; a folder of PNGs has a name without a suffix")
    if (numbers and suffix != ".tar") or (suffix == ".tar" and target.name.count("%") != len(numbers)) or len(numbers) > 1:
        raise RunError(f"{target.name} is no name of tars, one a shard; those have a single %d, as in sprites-%06d.tar")
    if suffix in KINDS and target.is_dir():
        raise RunError(f"{target} is a folder; give the name of a file")
    if suffix not in KINDS and os.path.lexists(target):
        raise RunError(f"{target} is there already; give the name of a folder that is not, for PNGs, or of a .npz, .npy or .tar")
    if suffix not in (".npz", ".npy") and plan.shape[2] not in (1, 3, 4):
        raise RunError(f"images of {plan.shape[2]} channels cannot be PNGs; collect them into .npz or .npy")


def _pattern(names: str) -> str:
    """Of an escaped name, with the place of a shard's number as any number."""
    return re.sub(TARS, r"\\d+", names)


def _labels(target: Path) -> Path:
    return target.with_name(f"{target.stem}_labels.npy")


def _header(f: IO[bytes], dtype: type, shape: tuple[int, ...]) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, about)  # type: ignore[arg-type]


def _column(f: IO[bytes], plan: Plan, what: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Ids, or what is a function of them, int64 [N]."""
    _header(f, np.int64, (plan.images,))
    for start in range(0, plan.images, CHUNK):
        ids = np.int64(plan.first + start) + np.arange(min(CHUNK, plan.images - start), dtype=np.int64)
        values = what(ids)
        assert values is not None
        f.write(values.data)


def _pixels(f: IO[bytes], plan: Plan, shards: Shards) -> None:
    _header(f, np.uint8, (plan.images, *plan.shape))
    for _, images in shards:
        f.write(images.data)


def _npz(plan: Plan, shards: Shards, target: Path) -> None:
    with atomic_write(target) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            _pixels(member, plan, shards)
        with archive.open("ids.npy", "w", force_zip64=True) as member:
            _column(member, plan, lambda ids: ids)
        if plan.kinds:
            with archive.open("labels.npy", "w", force_zip64=True) as member:
                _column(member, plan, plan.labels)
            with archive.open("classes.npy", "w") as member:
                np.lib.format.write_array(member, np.array(plan.classes), allow_pickle=False)


def _npy(plan: Plan, shards: Shards, target: Path) -> None:
    with atomic_write(target) as f:
        _pixels(f, plan, shards)
        if plan.kinds:  # once all shards were right, and before the images take their name
            with atomic_write(_labels(target)) as g:
                _column(g, plan, plan.labels)


def _png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(out, format="PNG")
    return out.getvalue()


def _tar(plan: Plan, shards: Shards, target: Path) -> None:
    if re.search(TARS, target.name):
        for k, images in shards:
            with atomic_write(target.with_name(target.name % k)) as f:
                _members(f, plan, iter([(k, images)]))
    else:
        with atomic_write(target) as f:
            _members(f, plan, shards)


def _members(f: IO[bytes], plan: Plan, shards: Shards) -> None:
    with tarfile.open(fileobj=f, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for k, images in shards:
            ids, labels = plan.ids(k), plan.labels(plan.ids(k))
            for i, number in enumerate(ids):
                parts = {"png": _png(images[i])} | ({"cls": str(labels[i]).encode()} if labels is not None else {})
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"{number:012}.{suffix}")  # of time 0 and nobody, so that the same run gives the same file
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember all of them to the end


def _folder(plan: Plan, shards: Shards, target: Path) -> None:
    part = part_of(target)
    shutil.rmtree(part, ignore_errors=True)
    names = folder_names(plan.classes)
    homes = {kind: part / names[kind] for kind in plan.kinds} or {-1: part}
    try:
        for home in homes.values():
            home.mkdir(parents=True)
        for k, images in shards:
            ids, labels = plan.ids(k), plan.labels(plan.ids(k))
            for i, number in enumerate(ids):
                (homes[-1 if labels is None else int(labels[i])] / f"{number:012}.png").write_bytes(_png(images[i]))
        getattr(os, "sync", lambda: None)()  # all of them at once: to flush a million small files one by one takes hours
        os.replace(part, target)
        flush_folder(target.parent)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(target)) from None  # the name that the user knows
    finally:
        shutil.rmtree(part, ignore_errors=True)


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """Names of folders for classes: 60 letters, digits, blanks, - and _ at most, and _ for all else. Numbered where they would not be told apart."""
    names = [re.sub(r"[^\w \-]", "_", name).strip()[:60] or "_" for name in classes]
    if len({name.casefold() for name in names}) < len(names):
        return [f"{i} {name}" for i, name in enumerate(names)]
    return names


KINDS = {".npz": _npz, ".npy": _npy, ".tar": _tar}

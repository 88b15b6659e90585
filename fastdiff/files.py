"""Files that are whole or not there: write beside the target, flush to disk, rename; and a folder that one writes to at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only once it is complete. On any error the old file, if there was one, stays as it was."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        flush_folder(path.parent)
    except OSError as e:
        if e.errno is None:  # an encoder's own words
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None  # the name that the user knows
    finally:
        part.unlink(missing_ok=True)


def flush_folder(path: Path) -> None:
    """Have the names in a folder on the disk too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove_parts(folder: Path, pattern: str = "*") -> None:
    """Remove what `atomic_write` left undone of files so named, where its process was killed."""
    for part in folder.glob(f".{pattern}.*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing. ValueError where it cannot be made or written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise ValueError(f"cannot write to the folder {path}: {e.strerror}; choose another with --out") from None
    return path

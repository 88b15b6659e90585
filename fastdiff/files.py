"""Files that are whole or not there: write beside the target, flush to disk, rename; and a folder that one writes to at a time; and
what others have written, within limits."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAX_VALUES = 1 << 18  # of JSON: commas and brackets. Python takes up to some 200 bytes and 6 microseconds for each.
MAX_DEPTH = 32


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only once it is complete. On any error the old file, if there was one, stays as it was."""
    path = Path(path)
    part = part_of(path)
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
        with contextlib.suppress(OSError):  # what is wrong has been said, by the name that the user knows
            part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where a process writes what is to be called `path` once it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def flush_folder(path: Path) -> None:
    """Have the names in a folder on the disk too, where the system and its file system can."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(number)


def remove_parts(folder: Path, names: str, *, alive: bool = False) -> None:
    """Remove what killed processes left undone: parts (`part_of`) of the names that a regular expression matches, and no other files.

    alive: whether other processes may be at it just now, whose parts then stay. A part that is a folder goes with all that is in it.
    """
    for path in list(folder.iterdir()):
        found = re.fullmatch(rf"\.(?:{names})\.(\d+)\.part", path.name)
        if found is None or (alive and _runs(int(found[1]))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is such a process, other than this one, on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A file, opened to read bytes. OSError for what is none: a device would never end, and a FIFO waits for its other end."""
    return os.fdopen(regular(path, os.O_RDONLY), "rb")


def regular(path: str | os.PathLike[str], flags: int) -> int:
    """The descriptor of a file, opened with these flags of `os.open`. OSError for what is none."""
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return number


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """A file's bytes. OSError for one of more than `limit`, before it is read, and for what is no regular file."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(size + 1) if size <= limit else b""
        if size > limit or len(content) > size:  # too many, or still growing
            raise OSError(errno.EFBIG, f"{max(size, len(content))} bytes, more than the {limit} allowed", os.fspath(path))
        return content


def cache_folder() -> Path:
    """$FASTDIFF_CACHE, by default fastdiff's under the user's cache folder. RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTDIFF_CACHE") or Path(base) / "fastdiff")


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


def parse_json(text: str, most: int = MAX_VALUES) -> Any:
    """JSON of at most so many values and MAX_DEPTH, with no key twice in an object. ValueError, one line, for any other."""
    if (values := sum(map(text.count, ",[{"))) > most:
        raise ValueError(f"{values} values of JSON, and at most {most} are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"JSON in more than {MAX_DEPTH} levels") from None
    level: list[Any] = [[value]]
    depth = -1
    while level := [v for each in level for v in (each.values() if isinstance(each, dict) else each) if isinstance(v, (dict, list))]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise ValueError(f"JSON in more than {MAX_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("the same key twice in one object")
    return entries

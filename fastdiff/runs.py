"""A run: many images as numbered shards in a folder, complete and correct whatever stops it on the way.

    manifest.json       what the images depend on, and a sha256 for every shard that is there
    shard-000012.npz    images uint8 [n, H, W, C], ids int64 [n], and, of a network with classes, labels int64 [n] and classes
    .journal-0.jsonl    the sha256 of shards that a rank has written since the manifest was; they go into it at the next start, or the end
    .lock               held by the processes that write here

A shard is a function of the manifest's configuration and its number, so one that is lost, cut short or altered is made again, to the byte, by whoever
comes next. It counts only once its digest is on the disk, and its digest gets there only after itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .distributed import Group
from .files import atomic_write, flush_folder, make_folder, open_regular, parse_json, read_regular, regular, remove_parts

FORMAT = 1
MANIFEST, LOCK, GRID = "manifest.json", ".lock", "grid.png"
PARTS = r"manifest\.json|grid\.png|shard-\d+\.npz"  # what is written here by way of a part, as a regular expression
JOURNALS = ".journal-*.jsonl"
MAX_SHARDS = 100_000
MAX_MANIFEST = 32 << 20  # bytes: three times what MAX_SHARDS ask for
MAX_VALUES = 8 * MAX_SHARDS  # of its JSON, of which a shard has five
# A line of a journal, as `_Writer` writes it.
RECORD = re.compile(rb'^\{"shard": (\d{1,6}), "sha256": "([0-9a-f]{64})"\}(?:\n|\Z)', re.MULTILINE)

log = logging.getLogger(__name__)

# ids int64 [n], labels int64 [n] or None -> images uint8 [n, H, W, C]
Draw = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]


# What decides a run's images and has an option, by which a refusal calls it.
FLAGS = {
    "images": "--batch", "first": "--first", "seed": "--seed", "shard_size": "--shard-size", "labels": "--label", "solver": "--solver",
    "steps": "--steps", "options": "--option", "guidance": "--guidance", "dtype": "--dtype", "way": "--compile", "micro_batch": "--micro-batch",
    "device": "--device", "checkpoint_sha256": "--checkpoint",
}  # fmt: skip


class RunError(ValueError):
    """A folder that is no run, not this run, or damaged: one line that says what is wrong and what would be right."""


@dataclass(frozen=True)
class Plan:
    """Which images a run has and how they are shared out. kinds: the labels that images get in turn, by their number; classes: all names."""

    first: int
    images: int
    shard_size: int
    shape: tuple[int, int, int]  # H, W, C
    kinds: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.images >= 1 and self.first + self.images <= 1 << 63 and self.shard_size >= 1):
            raise RunError(f"images {self.images} from number {self.first} in shards of {self.shard_size} make no run")
        if self.count > MAX_SHARDS:
            least = -(-self.images // MAX_SHARDS)
            raise RunError(f"--shard-size {self.shard_size} makes {self.count} shards; give {least} or more, for at most {MAX_SHARDS}")

    @staticmethod
    def of(config: dict[str, Any]) -> Plan:
        """The plan in a configuration. RunError where there is none."""
        try:
            first, images, shard_size, shape = (config[k] for k in ("first", "images", "shard_size", "shape"))
            kinds, classes = config["labels"] or (), config["classes"] or ()
            numbers = (first, images, shard_size, *shape, *kinds)
            if not all(type(v) is int and 0 <= v < 1 << 63 for v in numbers) or len(shape) != 3 or not all(0 < v < 1 << 16 for v in shape):
                raise TypeError
            if not all(type(v) is str for v in classes) or not all(k < len(classes) for k in kinds):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise RunError("its configuration does not say which images it has") from None
        return Plan(first, images, shard_size, tuple(shape), tuple(kinds), tuple(classes))

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.shard_size)

    def name(self, shard: int) -> str:
        """A shard's file."""
        return f"shard-{shard:06}.npz"

    def ids(self, shard: int) -> np.ndarray:
        """The numbers of a shard's images, int64 [n]."""
        ids: np.ndarray = np.int64(self.first + shard * self.shard_size) + np.arange(self.size(shard), dtype=np.int64)
        return ids

    def size(self, shard: int) -> int:
        """How many images a shard has."""
        return min(self.shard_size, self.images - shard * self.shard_size)

    def entry(self, shard: int, digest: str) -> dict[str, Any]:
        """What a manifest says of a shard that is there."""
        return {"file": self.name(shard), "first": self.first + shard * self.shard_size, "images": self.size(shard), "sha256": digest}

    def most(self, shard: int) -> int:
        """A number of bytes that a shard's file does not reach."""
        names = 4 * max(map(len, self.classes), default=0) * len(self.classes)
        return self.size(shard) * (int(np.prod(self.shape)) + 16) + names + 4096

    def labels(self, ids: np.ndarray) -> np.ndarray | None:
        """The classes of images by their numbers, int64 [n], or None where there are no classes."""
        return np.array(self.kinds, np.int64)[ids % len(self.kinds)] if self.kinds else None

    def pack(self, shard: int, images: np.ndarray) -> bytes:
        """A shard as the bytes of its file. Not compressed: that takes longer than a GPU takes to make the images."""
        ids = self.ids(shard)
        if images.dtype != np.uint8 or images.shape != (len(ids), *self.shape):
            raise ValueError(f"shard {shard} is {images.dtype} {list(images.shape)}, and should be uint8 {[len(ids), *self.shape]}")
        arrays = {"images": images, "ids": ids}
        labels = self.labels(ids)
        if labels is not None:
            arrays |= {"labels": labels, "classes": np.array(self.classes)}
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        return out.getvalue()

    def unpack(self, shard: int, data: bytes) -> np.ndarray:
        """The images in a shard's bytes. RunError where they are not those that the plan has there."""
        foreign = RunError(f"{self.name(shard)} does not hold the images that the manifest has there")
        if len(data) < self.size(shard) * (math.prod(self.shape) + 8):  # a false manifest may ask for more than there is memory for
            raise foreign
        ids = self.ids(shard)
        wanted: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "images": (np.dtype(np.uint8), (len(ids), *self.shape)),
            "ids": (np.dtype(np.int64), ids.shape),
        }
        labels = self.labels(ids)
        if labels is not None:
            wanted["labels"] = (np.dtype(np.int64), labels.shape)
        found: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for name, (dtype, shape) in wanted.items():
                    with archive.open(f"{name}.npy") as stream:
                        # What the header claims is believed only if it is what belongs here: nothing is allocated from a false shape.
                        version = np.lib.format.read_magic(stream)
                        if version != (1, 0) or np.lib.format.read_array_header_1_0(stream) != (shape, False, dtype):
                            raise ValueError
                        body = stream.read(dtype.itemsize * int(np.prod(shape)))
                        found[name] = np.frombuffer(body, dtype).reshape(shape)
        # Foreign bytes raise a dozen kinds: BadZipFile, KeyError, zlib.error, NotImplementedError, ...
        except Exception:
            raise foreign from None
        if not np.array_equal(found["ids"], ids) or (labels is not None and not np.array_equal(found["labels"], labels)):
            raise RunError(f"{self.name(shard)} holds images of other numbers or labels than the manifest has there")
        return found["images"]


@dataclass
class Manifest:
    """What a run is, and the sha256, in hex, of the shards that are known to have been written.

    arithmetic: `Sampler.fingerprint` where the first shard was made, None before. A configuration cannot name all that the bits of a sum depend on.
    """

    config: dict[str, Any]
    digests: dict[int, str] = field(default_factory=dict)
    arithmetic: str | None = None

    def __post_init__(self) -> None:
        self.config = json.loads(json.dumps(self.config))  # as it comes back from the file, to be compared with that
        self.plan = Plan.of(self.config)

    def text(self) -> str:
        plan = self.plan
        complete = len(self.digests) == plan.count
        head = json.dumps({"fastdiff_run": FORMAT, "config": self.config, "arithmetic": self.arithmetic, "complete": complete}, indent=1)
        lines = [json.dumps(plan.entry(k, self.digests[k])) for k in sorted(self.digests)]
        return f'{head[:-2]},\n "shards": [{",".join(f"{chr(10)}  {line}" for line in lines)}\n ]\n}}\n'

    def write(self, folder: Path) -> None:
        """Into its file, atomically."""
        with atomic_write(folder / MANIFEST) as f:
            f.write(self.text().encode())

    @property
    def missing(self) -> list[int]:
        """The shards that have no digest."""
        return [k for k in range(self.plan.count) if k not in self.digests]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest in a file, of at most 32 MiB; reading it takes at most 512 MiB of memory. RunError where it is none, or damaged."""
    path = Path(path)
    try:
        raw = parse_json(read_regular(path, MAX_MANIFEST).decode(), MAX_VALUES)
        if not isinstance(raw, dict) or "fastdiff_run" not in raw:
            raise TypeError("it is not one of fastdiff's")
        if raw["fastdiff_run"] != FORMAT:
            raise TypeError("it has another format version than this fastdiff writes")
        manifest = Manifest(raw["config"], arithmetic=raw.get("arithmetic"))
        if not isinstance(manifest.arithmetic, str | None):
            raise TypeError("its arithmetic is no text")
        for entry in raw["shards"]:
            shard = (entry["first"] - manifest.plan.first) // manifest.plan.shard_size
            digest = _digest(manifest.plan, shard, entry["sha256"])
            if shard in manifest.digests or entry != manifest.plan.entry(shard, digest):
                raise ValueError("an entry that there cannot be, or twice the same")
            manifest.digests[shard] = digest
    except FileNotFoundError:
        raise RunError(f"there is no run in {path.parent}: it has no {path.name}") from None
    except OSError as e:
        raise RunError(f"cannot read {path}: {e.strerror}") from None
    except RunError as e:
        raise e if str(path) in str(e) else RunError(f"{path} is damaged: {e}") from None
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RunError(f"{path} is damaged, or not the manifest of a run: {_short(e)}") from None
    return manifest


def read_run(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a run, finished or under way, with all that its journals say. RunError where there is none."""
    folder = Path(folder)
    plan, found = read_manifest(folder / MANIFEST).plan, dict[int, str]()
    for path in sorted(folder.glob(JOURNALS)):
        with contextlib.suppress(FileNotFoundError):  # it has gone into the manifest meanwhile, which is why that is read last
            found |= _read_journal(plan, path)
    manifest = read_manifest(folder / MANIFEST)
    manifest.digests |= found
    return manifest


def _read_journal(plan: Plan, path: Path) -> dict[int, str]:
    """What a journal says. A line that a kill has cut short says nothing."""
    with open_regular(path) as f:
        text = f.read(MAX_MANIFEST)
    records = [(int(m[1]), m[2].decode()) for m in RECORD.finditer(text) if int(m[1]) < plan.count]
    found, odd = dict(records), text.count(b"\n") + (text[-1:] not in (b"", b"\n")) - len(records)
    if odd:
        log.warning("%s: passed over what is no record of a shard, %d times", path, odd)
    return found


def _digest(plan: Plan, shard: Any, digest: Any) -> str:
    if type(shard) is not int or not 0 <= shard < plan.count or type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("a shard or digest that there cannot be")
    return digest


def _short(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that two configurations do not share, "steps 10, not 20"; "" where they are the same."""
    names = [*old, *(name for name in new if name not in old)]
    differ = [name for name in names if old.get(name) != new.get(name)]
    return "; ".join(f"{_show(name)} {_show(old.get(name))}, not {_show(new.get(name))}" for name in differ)


def _show(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Run:
    """A run that is held for writing; see `hold`."""

    def __init__(self, folder: Path, manifest: Manifest, group: Group) -> None:
        self.folder, self.manifest, self.group = folder, manifest, group
        self.plan = manifest.plan
        self.todo: list[int] = []

    def standing(self) -> str:
        """How far it is, in words. What has been made since `check`, by any rank, is what is in the journals."""
        there = self.manifest.digests.keys() - set(self.todo)
        with contextlib.suppress(OSError):
            there |= {k for path in self.folder.glob(JOURNALS) for k in _read_journal(self.plan, path)}
        return f"{len(there)} of {self.plan.count} shards are in {self.folder}"

    def check(self, checked: Callable[[int], object]) -> None:
        """Find out which shards are still to be made: those without a digest, and those that are not what theirs says. Each rank looks at its part."""
        bad = torch.zeros(self.plan.count, dtype=torch.int32)
        for k in range(self.group.rank, self.plan.count, self.group.world):
            if (self.folder / self.plan.name(k)).is_dir():
                raise RunError(f"{self.folder / self.plan.name(k)} is a folder, where a shard is to be; move it away")
            checked(self.plan.size(k) * self.group.world)
            if k not in self.manifest.digests:
                bad[k] = 1
            elif what := _altered(self.folder, self.manifest, k, _read(self.folder, self.plan, k)):
                log.warning("%s is %s; it is made again", self.folder / self.plan.name(k), what)
                bad[k] = 1
        self.todo = self.group.sum(bad).nonzero().flatten().tolist()
        log.info("%d of %d shards are to be made", len(self.todo), self.plan.count)

    def settle(self, arithmetic: str) -> None:
        """All who make shards of a run must compute the same bits. RunError where the ranks do not, or those who began it did not.

        arithmetic: `Sampler.fingerprint`.
        """
        words = torch.frombuffer(bytearray(hashlib.sha256(arithmetic.encode()).digest()), dtype=torch.int64)
        if self.group.any(not self.group.agree(words)):
            raise RunError(
                "the processes' networks give other bits (another model of CPU or GPU, or other libraries); a run needs equal machines"
            )
        began = self.manifest.arithmetic
        if began not in (None, arithmetic):
            raise RunError(
                f"{self.folder} was begun where the network gives other bits (arithmetic {_show(began)}, here {arithmetic}): on another model of CPU "
                "or GPU, or with other libraries; go on on one like that, or give another --out"
            )
        self.manifest.arithmetic = arithmetic
        if self.group.first and began is None:
            self.manifest.write(self.folder)

    def mine(self) -> Iterator[int]:
        """Shards for this rank, one at a time, from the list that all ranks take theirs from."""
        while (place := self.group.add("taken", 1) - 1) < len(self.todo):
            yield self.todo[place]

    def make(self, draw: Draw) -> None:
        """Make what is to be made, each shard written while the next one is drawn.

        Returns once all ranks have. RunError, with how far it is, where something stops it; all that was made before is kept.
        """
        try:
            with _Writer(self) as writer:
                for k in self.mine():
                    ids = self.plan.ids(k)
                    writer.put(k, draw(ids, self.plan.labels(ids)))
            self.group.barrier()
        except ConnectionError:
            raise
        except OSError as e:
            name = f"{e.filename}: " if e.filename else ""
            raise RunError(f"{name}{e.strerror or e}; {self.standing()}, and the same command goes on from there") from None
        except ValueError as e:
            raise RunError(f"{e}; {self.standing()}") from None

    def finish(self) -> None:
        """All digests into the manifest, once they have been made."""
        if self.group.first:
            self.manifest = _merge(self.folder, self.manifest)
            if self.manifest.missing:
                raise RunError(f"shards {ranges(self.manifest.missing)} are missing in {self.folder}; the same command makes them")
        self.group.barrier()


class _Writer:
    """Writes one shard at a time, on a thread of its own."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.journal = run.folder / f".journal-{run.group.rank}.jsonl"
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="fastdiff-writer")
        self.under_way: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else there is an error already, and this one comes of it or is the next start's to find
                raise
        finally:
            self.pool.shutdown()

    def wait(self) -> None:
        if self.under_way is not None:
            written, self.under_way = self.under_way, None
            written.result()

    def put(self, shard: int, images: np.ndarray) -> None:
        self.wait()
        self.under_way = self.pool.submit(self.write, shard, images)

    def write(self, shard: int, images: np.ndarray) -> None:
        data = self.run.plan.pack(shard, images)
        digest = hashlib.sha256(data).hexdigest()
        if self.run.manifest.digests.get(shard, digest) != digest:
            log.warning("%s has come out otherwise than before: is this the same kind of machine?", self.run.plan.name(shard))
        with atomic_write(self.run.folder / self.run.plan.name(shard)) as f:
            f.write(data)
        new = not self.journal.exists()
        try:
            with open(self.journal, "ab") as f:
                f.write(json.dumps({"shard": shard, "sha256": digest}).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.journal)) from None
        if new:
            flush_folder(self.run.folder)
        log.info("wrote %s, %d bytes", self.run.folder / self.run.plan.name(shard), len(data))


@contextmanager
def hold(
    folder: str | os.PathLike[str], config: dict[str, Any], group: Group, checked: Callable[[int], object] = lambda images: None
) -> Iterator[Run]:
    """The run of that configuration in a folder, begun or taken up, for all ranks of a group, and for nobody else as long as the block lasts.

    config: JSON values that decide the images; `first`, `images`, `shard_size`, `shape`, `labels` and `classes` among them. checked: called with
    a number of images after each shard that has been looked at. RunError where another process writes there, or where the folder holds a run of
    another configuration, which is named. A KeyboardInterrupt in the block says how far the run is.
    """
    folder = Path(folder)
    manifest = Manifest(config)
    with own_folder(folder, group):
        if group.first:
            remove_parts(folder, PARTS)
            if not (folder / MANIFEST).exists():
                if any(folder.glob("shard-*.npz")):
                    raise RunError(f"{folder} holds shards without a {MANIFEST}; give another --out, or remove them")
                manifest.write(folder)
            there = read_manifest(folder / MANIFEST)
            _same(folder, there, manifest)
            _merge(folder, there)
        group.barrier()
        there = read_manifest(folder / MANIFEST)
        _same(folder, there, manifest)
        run = Run(folder, there, group)
        try:
            run.check(checked)
            yield run
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{run.standing()}; the same command goes on from there") from None


def _same(folder: Path, there: Manifest, here: Manifest) -> None:
    if differs := difference(there.config, here.config):
        flags = ", ".join(flag for name, flag in FLAGS.items() if there.config.get(name) != here.config.get(name))
        raise RunError(f"{folder} holds a run with {differs}; give the same again{f' ({flags})' if flags else ''}, or another --out")


def _merge(folder: Path, manifest: Manifest) -> Manifest:
    """Put what the journals say into the manifest, and only then let them go."""
    journals = sorted(folder.glob(JOURNALS))
    for path in journals:
        manifest.digests |= _read_journal(manifest.plan, path)
    if journals:
        manifest.write(folder)
    for path in journals:
        path.unlink()
    return manifest


@contextmanager
def own_folder(folder: Path, group: Group) -> Iterator[None]:
    """A folder, made where it is missing, that all processes of a group write to, and nobody else as long as the block lasts. RunError where another
    process writes there, which is named."""
    if group.first:
        make_folder(folder)
    group.barrier()
    if not folder.is_dir():
        raise RunError(f"the processes see different folders {folder}; each needs the same one, on a disk that all share")
    with _lock(folder, group):
        yield


@contextmanager
def _lock(folder: Path, group: Group) -> Iterator[None]:
    """Held until all processes of the group have ended, however they end. Rank 0 sees that nobody else is there, then all hold it together."""
    try:
        import fcntl
    except ImportError:  # no such locks, and no torchrun, on Windows
        yield
        return

    def taken() -> RunError:
        who = " ".join((folder / LOCK).read_text(errors="replace").split())[:100]
        return RunError(f"{folder} is being written to by {who or 'another process'}; wait for it, or give another --out")

    with _lock_file(folder / LOCK) as f:
        if group.first:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                f.truncate(0)
                f.write(f"process {os.getpid()} on {socket.gethostname()}")
                f.flush()
                os.fsync(f.fileno())
                if group.world > 1:
                    fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken() from None
            except OSError as e:  # some file systems of clusters have none
                log.warning("%s cannot be locked (%s): see to it that nobody else writes there", folder, e.strerror)
        group.barrier()
        f.seek(0)
        word = hashlib.sha256(f.read().encode()).digest()
        if group.any(not group.agree(torch.frombuffer(bytearray(word), dtype=torch.int64))):
            raise RunError(f"the processes see different folders {folder}; each needs the same one, on a disk that all share")
        if not group.first:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken() from None
            except OSError:
                pass
        yield


def _lock_file(path: Path) -> IO[str]:
    """The file that is locked. OSError where a link, which may lead to anything, or what is no file has its name."""
    try:
        return os.fdopen(regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "r+")
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, where the run's lock is to be; remove it", os.fspath(path)) from None
        raise


def _read(folder: Path, plan: Plan, shard: int) -> bytes | None:
    """A shard's file, or None where there is none, or one of another size than a shard can have."""
    path = folder / plan.name(shard)
    try:
        if path.is_file() and path.stat().st_size < plan.most(shard):
            return path.read_bytes()
    except FileNotFoundError:
        pass
    return None


def _altered(folder: Path, manifest: Manifest, shard: int, data: bytes | None) -> str | None:
    """What is wrong with a shard, if anything is."""
    if shard not in manifest.digests or not (folder / manifest.plan.name(shard)).exists():
        return "missing"
    if data is None or hashlib.sha256(data).hexdigest() != manifest.digests[shard]:
        return "not what was written there (its sha256 is another)"
    return None


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. missing, altered: numbers of shards. sha256: of all pixels in the order of their numbers, where all are right."""

    plan: Plan
    missing: tuple[int, ...]
    altered: tuple[int, ...]
    sha256: str | None

    @property
    def right(self) -> bool:
        return self.sha256 is not None


def shards(folder: Path, manifest: Manifest) -> Iterator[tuple[int, np.ndarray]]:
    """(number, images uint8 [n, H, W, C]) of every shard in turn, one in memory at a time. RunError where one is missing or altered."""
    for k in range(manifest.plan.count):
        data = _read(folder, manifest.plan, k)
        if what := _altered(folder, manifest, k, data):
            raise RunError(f"{folder / manifest.plan.name(k)} is {what}; start the run's command again, and it is made")
        yield k, manifest.plan.unpack(k, data or b"")


def verify(folder: str | os.PathLike[str], checked: Callable[[int], object] = lambda images: None) -> Verdict:
    """Look at every shard of a run. checked: called with a number of images after each. RunError where there is no run."""
    folder = Path(folder)
    manifest = read_run(folder)
    plan, pixels = manifest.plan, hashlib.sha256()
    missing: list[int] = []
    altered: list[int] = []
    for k in range(plan.count):
        data = _read(folder, plan, k)
        if what := _altered(folder, manifest, k, data):
            (missing if what == "missing" else altered).append(k)
        elif not missing and not altered:
            pixels.update(plan.unpack(k, data or b"").data)
        checked(plan.size(k))
    return Verdict(plan, tuple(missing), tuple(altered), None if missing or altered else pixels.hexdigest())


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in rising order, in short: 0 to 3, 7."""
    spans: list[list[int]] = []
    for k in numbers:
        if spans and spans[-1][1] == k - 1:
            spans[-1][1] = k
        else:
            spans.append([k, k])
    shown = [f"{a}" if a == b else f"{a} to {b}" for a, b in spans[:10]]
    return ", ".join(shown + ["..."] * (len(spans) > 10))

"""Coverage-guided fuzzing of everything that reads files: `python tests/fuzz.py TARGET [libFuzzer's flags]`, or `all [FOLDER] -runs=N`.

A target takes any bytes, makes a file of them and reads it. The reader must return, or raise its own error, one short line that can be shown, within
SECONDS of processor time and with no more memory than it promises. Anything else is a finding: the bytes are left in a file crash-* (in `all`, in
FOLDER, else build/fuzz), which `python tests/fuzz.py TARGET FILE` runs again.

tests/corpus/TARGET holds what reaches the most code, and former findings; `python tests/fuzz.py TARGET -merge=1 tests/corpus/TARGET NEW` adds what
NEW reaches beyond it. tests/test_fuzz.py goes through all of it, and runs each target for a moment.
"""

from __future__ import annotations

import atexit
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import types
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:  # the corpus is gone through without it
    atheris = None

ROOT = Path(__file__).parent.parent
CORPUS = Path(__file__).parent / "corpus"
# What coverage is counted in; the rest of what is imported runs at full speed.
WATCHED = [
    "fastdiff.checkpoint",
    "fastdiff.data",
    "fastdiff.parts",
    "fastdiff.unet",
    "fastdiff.unet2d",
    "fastdiff.schedules",
    "fastdiff.runs",
    "fastdiff.train",
    "json.decoder",
]
WATCHED += [
    "zipfile",
    "numpy.lib._format_impl",
    "PIL.Image",
    "PIL.ImageFile",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.GifImagePlugin",
]
WATCHED += ["PIL.BmpImagePlugin", "PIL.TiffImagePlugin", "PIL.PpmImagePlugin", "PIL.WebPImagePlugin"]
# Not in these: atheris never lets go of what the comparison of two arrays gives, here a byte for each of an image's.
UNWATCHED = ("_sheet",)
SECONDS = 2.0
LONGEST = 1000  # characters of an error

sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import small_network  # noqa: E402

from fastdiff import Checkpoint, Schedule, UNetConfig, checkpoint, data, runs, train  # noqa: E402

TINY = UNetConfig(shape=(1, 2, 2), patch=1, channels=(2,), middle=0, embedding=4, group=1, num_classes=2)
TRAINING = train.Settings(steps=2, batch=2, timesteps=4, channels=(8,), patch=1, blocks=1, middle=0)
SPRITES = data.Dataset(np.zeros((2, 2, 2, 1), np.uint8), np.arange(2), ("cat", "dog"))


class FindingError(AssertionError):
    """What no file may bring about."""


@cache
def folder() -> Path:
    """Where the files go: in memory, where there is such a file system."""
    path = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def file(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


Pieces = tuple[dict[str, Any], bytes, dict[str, Any]]


def pieces(path: Path) -> Pieces:
    """A file's tensors as a header has them, their bytes, and its metadata."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, content[8 + length :], json.loads(header.pop("__metadata__")["fastdiff"])


@cache
def saved() -> Pieces:
    """Those of a small checkpoint."""
    path = folder() / "whole.safetensors"
    Checkpoint(small_network(config=TINY), Schedule.linear(20), "epsilon", ("cat", "dog"), {"steps": 1}).save(path, torch.float16)
    return pieces(path)


@cache
def trained() -> Pieces:
    """Those of the state of a training run after a step."""
    path, run = folder() / "state.safetensors", train.Run.new(TRAINING, SPRITES, torch.device("cpu"))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    run.step, run.seconds, run.losses, run.history, run.held_out = 1, 0.5, [torch.ones(())], [(1, 0.5)], [(1, 0.5)]
    run.save(path, SPRITES.digest(), ("a",))
    return pieces(path)


def safetensors(header: bytes, made: Callable[[], Pieces] = saved) -> bytes:
    return len(header).to_bytes(8, "little") + header + made()[1]


def with_metadata(text: bytes, made: Callable[[], Pieces] = saved) -> bytes:
    return safetensors(json.dumps(made()[0] | {"__metadata__": {"fastdiff": text.decode(errors="replace")}}).encode(), made)


def resume(content: bytes) -> train.Run:
    """Take up a state of this metadata, with the settings that it says."""
    path = file("d.safetensors", with_metadata(content, trained))
    return train.take_up(train.read_state(path)[2], SPRITES, path, SPRITES.digest(), torch.device("cpu"))


ARRAYS = ("images", "labels", "classes", "test")


def packed(content: bytes) -> bytes:
    """A valid archive of what `content` says: a byte of which arrays there are and how they are packed, then each behind its length in two bytes."""
    stream, which = io.BytesIO(), content[0] if content else 0
    rest = content[1:]
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if which & 16 else zipfile.ZIP_STORED) as archive:
        for bit, name in enumerate(ARRAYS):
            if which >> bit & 1:
                length = int.from_bytes(rest[:2], "little")
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), rest[2 : 2 + length], archive.compression)
                rest = rest[2 + length :]
    return stream.getvalue()


# Each target: how it makes and reads a file, the error that its reader may raise, the memory that it may take (MiB; see the reader's docstring), and
# whether its bytes are JSON.
TARGETS: dict[str, tuple[Callable[[bytes], object], type[Exception], int, bool]] = {
    "checkpoint": (lambda b: checkpoint.load(file("a.safetensors", b)), checkpoint.CheckpointError, 512, False),
    "metadata": (lambda b: checkpoint.load(file("b.safetensors", with_metadata(b))), checkpoint.CheckpointError, 512, True),
    "header": (lambda b: checkpoint.load(file("c.safetensors", safetensors(b))), checkpoint.CheckpointError, 512, True),
    "state": (resume, ValueError, 512, True),
    "npz": (lambda b: data.load(file("a.npz", b)), data.DataError, 640, False),
    "array": (lambda b: data.load(file("b.npz", packed(b))), data.DataError, 640, False),
    "npy": (lambda b: data.load(file("a.npy", b)), data.DataError, 256, False),
    "image": (lambda b: data.load(file("a.png", b), tile=4), data.DataError, 1024, False),
    "manifest": (lambda b: runs.read_manifest(file("manifest.json", b)), runs.RunError, 512, True),
}


def peak() -> int:
    """The most memory that this process has had so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(target: str, content: bytes) -> Exception | None:
    """Read a file of `content`: None, or the reader's error. FindingError where it is not as the docstring above has it."""
    read, kind, memory, _ = TARGETS[target]
    error: Exception | None = None

    def once(clock: Callable[[], float]) -> float:
        nonlocal error
        start = clock()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read(content)
            except kind as e:
                # Its frames hold the image, and, by way of this one, itself: so much would wait for Python to look for cycles.
                error, e.__traceback__, e.__context__ = e, None, None
        return clock() - start

    before = peak()
    # The processor's time takes long to ask for, and the wall's is also that of whatever else runs.
    if once(time.perf_counter) > SECONDS and (seconds := once(time.process_time)) > SECONDS:
        raise FindingError(f"{target}: {seconds:.1f} s, more than {SECONDS}")
    grown = peak() - before
    if grown > memory << 10:
        raise FindingError(f"{target}: {grown >> 10} MiB, more than {memory}")
    text = str(error)
    if error is not None and (not text or len(text) > LONGEST or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)):
        raise FindingError(f"{target}: an error that is no short line: {text!r}")
    return error


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 255, 65536, 65537, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "a", "\n", "\ud800", "\u2028", "x" * 300, "linear", "cosine", "edm", "flow", "UNet2DModel", [], {},
    [[]], [0] * 20, {"": 0}, [1, 16, 16], "F64", "BF16", "from_alphas_cumprod",
]  # fmt: skip


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from spots(value[key])


def mutate_json(content: bytes, limit: int, seed: int) -> bytes:
    """Some places of a JSON text put out, doubled, moved or given an odd value; or its bytes changed, as of any other file."""
    choice = random.Random(seed)
    try:
        value = json.loads(content)
        if not isinstance(value, (dict, list)) or choice.random() < 0.25:
            raise ValueError
        for _ in range(choice.choice((1, 1, 2, 4))):
            places = list(spots(value))
            if not places:
                break
            (at, key), (other, there), what = choice.choice(places), choice.choice(places), choice.random()
            if what < 0.5:
                at[key] = deepcopy(choice.choice(ODD))
            elif what < 0.6:
                del at[key]
            elif what < 0.75:
                at[key] = deepcopy(other[there])
            elif what < 0.85 and isinstance(at, list):
                at.extend(deepcopy(at[: 1 + len(at) // 2]))
            elif isinstance(at, dict):
                at[choice.choice(("", "name", "kind", "shift", "timesteps", "sigma_min", "tau", "x"))] = deepcopy(choice.choice(ODD))
            elif type(at[key]) in (int, float):
                at[key] += choice.choice((-1, 1, 0.5, 1 << 16))
        changed = json.dumps(value).encode()
        return changed if len(changed) <= limit else content[:limit]
    except (ValueError, RecursionError, OverflowError, KeyError):
        return bytes(atheris.Mutate(content, limit))


def watch() -> None:
    """Have coverage counted in the functions of WATCHED."""
    for name in WATCHED:
        module = importlib.import_module(name)
        owners = [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)]
        for value in (v for owner in owners for v in vars(owner).values()):
            inner = next((f for key in ("__func__", "fget", "func") if (f := getattr(value, key, None)) is not None), value)
            if isinstance(inner, types.FunctionType) and inner.__module__ == name and inner.__name__ not in UNWATCHED:
                atheris.instrument_func(inner)


def fuzz(target: str, flags: list[str]) -> None:
    """One target, in this process, which libFuzzer ends: 0 after -runs, 77 with a finding."""
    memory, is_json = TARGETS[target][2:]
    for seed in sorted((CORPUS / target).iterdir())[:1]:
        run(target, seed.read_bytes())  # what is made once for all is not to be counted as some later file's
    limit = (peak() >> 10) + memory + 256  # what interpreter, fuzzer and its corpus take on top
    given = [f"-rss_limit_mb={limit}", "-timeout=20", "-max_len=8192", "-print_final_stats=1", *flags]

    def one(content: bytes) -> None:
        run(target, content)

    again = f"{sys.executable} {Path(__file__).resolve()} {target}"  # what -merge=1 hands to a shell
    atheris.Setup([again, *given], one, **({"custom_mutator": mutate_json} if is_json else {}))
    atheris.Fuzz()


def forked(target: str, flags: list[str], out: int | None = None) -> int:
    """The exit code of `fuzz` in a process of its own, which libFuzzer ends without tidying up."""
    folder()
    child = os.fork()
    if not child:
        if out is not None:
            os.dup2(out, 1), os.dup2(out, 2)
        fuzz(target, flags)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fuzz_all(kept: Path, flags: list[str]) -> int:
    """Every target, with a line of what came of it. How many had a finding."""
    found = 0
    for target in TARGETS:
        new = kept / target
        new.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with tempfile.TemporaryFile() as out:
            code = forked(target, [f"-artifact_prefix={kept}/{target}-", *flags, str(new), str(CORPUS / target)], out.fileno())
            out.seek(0)
            said = out.read().decode(errors="replace")
        stats = dict(re.findall(r"stat::(\w+): +(\d+)", said))
        coverage = max(map(int, re.findall(r" cov: (\d+)", said)), default=0)
        verdict = "nothing found" if code == 0 else f"FOUND (exit code {code}): {' '.join(said.split())[-1500:]}"
        print(
            f"{target}: {stats.get('number_of_executed_units', '?')} executions in {time.perf_counter() - start:.0f} s, "
            f"coverage {coverage}, peak {stats.get('peak_rss_mb', '?')} MiB, {verdict}",
            flush=True,
        )
        found += code != 0
    return found


if __name__ == "__main__":
    name, *flags = sys.argv[1:] or [""]
    if name not in (*TARGETS, "all") or atheris is None:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)}|all [libFuzzer's flags and folders]; needs the package atheris")
    watch()
    if name == "all":
        folders = [flag for flag in flags if not flag.startswith("-")]
        sys.exit(fuzz_all(Path(*folders or [ROOT / "build" / "fuzz"]), [flag for flag in flags if flag.startswith("-")]) > 0)
    sys.exit(forked(name, flags))

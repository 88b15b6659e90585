"""A scale sheet: what one device makes in an hour, and, reckoned from that, what runs of a million to a thousand million images take of many.

    python -m benchmarks.scale --measure --out ROWS.json     # rows of this machine: six minutes of two CPU cores
    python -m benchmarks.scale ROWS.json                     # the sheet in Markdown; with --readme README.md between its markers there

Measured are one device, one process and this machine's disk. All that is said of more devices is arithmetic on these rows and the constants below.
Ranks of a run say nothing to each other while they work but for counters in a store, a few a shard, so they are taken to work side by side at full
speed; what they wait for in the end is the slowest one's last shard.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastdiff
from benchmarks.alike import kept
from benchmarks.conftest import ROOT, described
from benchmarks.layers import writable
from benchmarks.report import RESULTS, ReportError, Row, put, rows_of, table, where
from fastdiff import cli, collect, data, runs
from fastdiff.checkpoint import Checkpoint
from fastdiff.devices import pick_device
from fastdiff.distributed import Group
from fastdiff.files import atomic_write
from fastdiff.sampler import Sampler

PROG = "python -m benchmarks.scale"
START, END = "<!-- scale:start -->", "<!-- scale:end -->"

# (solver, steps, guidance); the first is the default of fastdiff.sample.
CASES = (("unipc", 10, 2.0), ("ddim", 20, 1.0), ("dpmpp_2m", 10, 1.0), ("ddpm", 50, 1.0))
FORMATS = {"shard": "shards, .npz", "npz": "one .npz", "npy": ".npy, with labels", "tar": "WebDataset .tar", "png": "folder of PNGs"}
ROUNDS = 7  # at most, of a case

# What the sheet takes for granted. It says so.
RUNS = (10**6, 10**8, 10**9)
DEVICES = (1, 8, 1000)
MACHINE = 8  # devices that write to one machine's disk; more need a file system that all of them see
SHARED = 1e9  # bytes/s that such a file system takes, from all together
SHARD = 4096  # images, where nothing asks for more or fewer
EACH = 10  # shards a device at least, so that waiting for the last one is a twentieth
OFTEN = 0.1  # start-up from that share of the time on is a limit


@dataclass(frozen=True)
class Size:
    """How much is measured. On CUDA launches weigh, so batches are larger; a CPU has no time for that."""

    batches: tuple[int, ...]
    run: tuple[int, int]  # images and shard size of a whole run
    starts: int = 3
    repeats: int = 10
    shard: int = SHARD
    volume: float = 1e9  # bytes of shards that are written, and looked at again
    cases: int = len(CASES)


FULL = {"cpu": Size((64, 256, 1024), (4096, 1024)), "cuda": Size((256, 4096, 65536), (32768, 4096))}
QUICK = Size((16,), (8, 4), starts=1, repeats=2, shard=64, volume=2e5, cases=2)


class Measurement:
    """Takes the rows, part after part, in a folder that is scratch."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, self.quick, self.seconds = folder, args.quick, args.seconds
        self.device = pick_device(args.device)
        self.size = QUICK if args.quick else FULL[self.device.type]
        how = {"dtype": cli.DTYPES.get(args.dtype), "compile": cli.WAYS.get(args.compile, args.compile)}
        self.options = ["--device", str(self.device), "--compile", args.compile, *(["--dtype", args.dtype] if args.dtype else [])]
        self.checkpoint: Checkpoint = fastdiff.load("sprites")
        self.cases = CASES[: self.size.cases]
        self.samplers = [self.checkpoint.sampler(solver=name, steps=steps, device=self.device, **how) for name, steps, _ in self.cases]

    def row(self, name: str, shape: Iterable[int] = (), **found: Any) -> dict[str, Any]:
        of = self.samplers[0]
        about = described(self.device.type, of.dtype, (*shape, *self.checkpoint.shape))
        return {"name": name, "extra_info": about | {"on": self.device.type, "way": of.way, "quick": self.quick} | found}

    def rows(self) -> Iterator[dict[str, Any]]:
        # Commands first: what they compile is kept for the samplers of this process.
        yield from (self.start_up(), self.run(), self.collected(), *self.written())
        yield from self.rates()

    def command(self, *options: object) -> tuple[float, dict[str, Any]]:
        """`python -m fastdiff.sample`: seconds from the process's start to its end, and its report."""
        words = [sys.executable, "-m", "fastdiff.sample", "--json", *self.options, *map(str, options)]
        began = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise ValueError(f"fastdiff.sample failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
        return seconds, json.loads(done.stdout.splitlines()[-1])

    def start_up(self) -> dict[str, Any]:
        """A command that makes as little as there is: imports, loading, and the first call. On CUDA also where nothing compiled is kept yet."""

        def call(i: int) -> tuple[float, dict[str, Any]]:
            return self.command("--batch", 1, "--shard-size", 1, "--steps", 1, "--out", self.folder / f"start-{i}")

        fresh = {}
        if self.device.type == "cuda":
            seconds, report = call(-1)
            fresh = {"fresh_startup_s": round(seconds, 3), "fresh_compile_s": report["compile_s"]}
        calls = [call(i) for i in range(self.size.starts)]
        parts = {key: median(report[key] for _, report in calls) for key in ("load_s", "compile_s")}
        return self.row("scale_startup", **spread("startup_s", [seconds for seconds, _ in calls]), **parts, **fresh, calls=len(calls))

    def run(self) -> dict[str, Any]:
        """A whole run of the default settings, to hold the arithmetic against, and whose images the other parts take."""
        images, shard = self.size.run
        seconds, report = self.command("--batch", images, "--shard-size", shard, "--out", self.folder / "run")
        return self.row("scale_run", images=images, shard_size=shard, run_s=round(seconds, 3), sample_s=report["sample_s"])

    def collected(self) -> dict[str, Any]:
        """Bytes a sample, as one finds them in the files of each format."""
        target, images = self.folder / "collected", self.size.run[0]
        target.mkdir()
        found = {}
        for kind in [k for k in FORMATS if k != "shard"]:
            (target / kind).mkdir()
            collect.collect(self.folder / "run", target / kind / ("images" + f".{kind}" * (kind != "png")))
            files = [path.stat() for path in (target / kind).rglob("*") if path.is_file()]
            found[f"bytes_{kind}"] = round(sum(of.st_size for of in files) / images, 2)
            if kind == "png" and hasattr(files[0], "st_blocks"):
                found["bytes_png_on_disk"] = round(sum(512 * of.st_blocks for of in files) / images, 2)
        self.pixels = np.resize(np.load(target / "npy" / "images.npy"), (self.size.shard, *self.plan(1).shape))
        packed = len(self.plan(1).pack(0, self.pixels))
        return self.row(
            "scale_bytes", images=images, shard_size=self.size.shard, bytes_shard=round(packed / self.size.shard, 2), **found
        )  # fmt: skip

    def plan(self, shards: int) -> runs.Plan:
        return runs.Plan.of(self.config(shards))

    def config(self, shards: int) -> dict[str, Any]:
        channels, height, width = self.checkpoint.shape
        classes = list(self.checkpoint.classes)
        return {
            "images": shards * self.size.shard, "first": 0, "seed": 0, "shard_size": self.size.shard, "shape": [height, width, channels],
            "labels": list(range(len(classes))), "classes": classes,
        }  # fmt: skip

    def written(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What one process writes when drawing takes no time, and how fast it looks at that again."""
        packed = self.plan(1).pack(0, self.pixels)
        count = max(math.ceil(self.size.volume / len(packed)), 4)
        folder, config = self.folder / "written", self.config(count)
        stamps: list[float] = []

        def draw(ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
            stamps.append(time.perf_counter())
            return self.pixels

        with runs.hold(folder, config, Group()) as run:
            run.make(draw)
            run.finish()

        def store() -> None:
            with atomic_write(self.folder / "probe") as f:
                f.write(packed)

        parts = {
            f"{name}_s": round(median(timed(call) for _ in range(self.size.repeats)), 6)
            for name, call in {
                "pack": lambda: self.plan(1).pack(0, self.pixels), "hash": lambda: hashlib.sha256(packed).hexdigest(), "file": store,
            }.items()
        }  # fmt: skip
        # While a shard is written the next one is drawn, which takes no time here, and waits. So from its second call on, calls of `draw` are as
        # far apart as it takes to pack, hash, write and fsync one.
        each = list(np.diff(stamps[1:]))
        one = self.row(
            "scale_write", shards=len(each), shard_size=self.size.shard, shard_bytes=len(packed), **spread("shard_s", each), **parts,
            mb_per_s=round(len(packed) / median(each) / 1e6, 2), file_mb_per_s=round(len(packed) / parts["file_s"] / 1e6, 2),
            file_system=file_system(folder),
        )  # fmt: skip

        def resume() -> None:
            with runs.hold(folder, config, Group()) as run:
                assert not run.todo

        seconds = {"verify": timed(lambda: runs.verify(folder)), "resume": timed(resume)}
        rates = {f"{name}_mb_per_s": round(count * len(packed) / s / 1e6, 2) for name, s in seconds.items()}
        return one, self.row(
            "scale_resume", bytes=count * len(packed), **{f"{name}_s": round(s, 4) for name, s in seconds.items()}, **rates
        )

    def rates(self) -> Iterator[dict[str, Any]]:
        """Images a second by batch and solver, as uint8 on the host. Cases take turns, forwards and back, as long as there is time."""
        threads = torch.get_num_threads()
        runs_of: dict[tuple[int, int], Callable[[], None]] = {}
        for i, (_, _, guidance) in enumerate(self.cases):
            for batch in self.size.batches:
                runs_of[i, batch] = functools.partial(self.draw, self.samplers[i], batch, guidance)
                self.samplers[i].warmup(guidance != 1, threads, n=batch)
                if self.device.type == "cuda":
                    runs_of[i, batch]()  # of a CPU that would take as long as a round
        seconds: dict[tuple[int, int], list[float]] = {case: [] for case in runs_of}
        began = time.perf_counter()
        for turn in tqdm(range(1 if self.quick else ROUNDS), unit="round", disable=not sys.stderr.isatty()):
            for case in list(runs_of)[:: -1 if turn % 2 else 1]:
                if not turn or time.perf_counter() - began + seconds[case][-1] < self.seconds:
                    seconds[case].append(timed(runs_of[case]))
        for (i, batch), each in seconds.items():
            (solver, steps, guidance), sampler = self.cases[i], self.samplers[i]
            yield self.row(
                f"scale_rate[{solver}-{steps}-{guidance:g}-{batch}]", (batch,), solver=solver, steps=steps, guidance=guidance,
                evaluations=len(sampler.table) * (2 if guidance != 1 else 1), calls=len(each), images=batch * len(each),
                **spread("images_per_s", [batch / s for s in each], 2),
            )  # fmt: skip

    def draw(self, sampler: Sampler, batch: int, guidance: float) -> None:
        labels = torch.arange(batch) % len(self.checkpoint.classes)
        data.to_uint8(sampler(batch, labels=labels, guidance=guidance)).cpu().numpy()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(name: str, values: Iterable[float], digits: int = 6) -> dict[str, float]:
    """Median, lowest and highest, as a row has them."""
    found = sorted(map(float, values))
    return {f"{name}{end}": round(v, digits) for end, v in (("", median(found)), ("_min", found[0]), ("_max", found[-1]))}


def file_system(folder: Path) -> str:
    """What kind of file system a folder is on, "unknown" where the system does not say."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    return max((len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point))[1]


@contextmanager
def own_caches(folder: Path) -> Iterator[None]:
    """Nothing that this machine has compiled or measured before is found, neither here nor by the commands that are started."""
    own = {"FASTDIFF_CACHE": "cache", "TORCHINDUCTOR_CACHE_DIR": "cache/inductor", "TRITON_CACHE_DIR": "cache/triton"}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= {name: str(folder / path) for name, path in own.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def measure(args: argparse.Namespace) -> None:
    writable(args.out, "--out")
    others = [row for row in kept(args.out)["benchmarks"] if not row.get("name", "").startswith("scale_")]
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="fastdiff-scale-") as folder, own_caches(Path(folder)):
        for row in Measurement(args, Path(folder)).rows():
            made.append(row)
            print(row["name"], *(f"{k}={v}" for k, v in row["extra_info"].items() if isinstance(v, float)), flush=True)
            with atomic_write(args.out) as f:  # each at once, should the time not do for all
                f.write(json.dumps({"benchmarks": others + made}, indent=1).encode())


@dataclass(frozen=True)
class Device:
    """What is known of one device. rates: images/s of the default solver by batch; sample_bytes: of one in a shard; and of storage, in bytes/s,
    what a process packs, hashes and writes, what the disk takes, and what a process looks at again."""

    rates: dict[int, float]
    startup_s: float
    sample_bytes: float
    process: float
    disk: float
    resume: float

    def rate(self, shard: int) -> float:
        """Images/s in shards of that size: as of the largest batch measured that is no larger, or else of the smallest."""
        return self.rates[max((n for n in self.rates if n <= shard), default=min(self.rates))]


@dataclass(frozen=True)
class Run:
    """What a run takes. Seconds: start-up, work, the wait for the last shard, on average; in bytes/s what storage is asked for, and what it gives."""

    images: int
    devices: int
    shard: int
    shards: int
    startup_s: float
    work_s: float
    wait_s: float
    asked: float
    given: float
    bytes: float
    resume_s: float
    limits: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.startup_s + self.work_s + self.wait_s


def shard_size(device: Device, images: int, devices: int) -> int:
    """SHARD, or fewer images so that each device gets EACH shards, of no fewer images than were measured; but no more shards than a run may have."""
    even = max(-(-images // (devices * EACH)), min(device.rates))
    return max(min(SHARD, even), -(-images // runs.MAX_SHARDS))


def reckon(device: Device, images: int, devices: int, shard: int | None = None) -> Run:
    """What that many devices take for that many images."""
    shard = shard_size(device, images, devices) if shard is None else shard
    shards = -(-images // shard)
    busy = min(devices, shards)
    rate = device.rate(shard)
    asked = busy * rate * device.sample_bytes
    shared = device.disk if devices <= MACHINE else SHARED
    given = min(busy * device.process, shared)
    slowed = rate * min(1, given / asked)
    one_s = min(shard, images) / slowed
    # With fewer shards than devices each is made at once, and the time is that of one.
    work_s, wait_s = (images / (devices * slowed), one_s / 2 if devices > 1 else 0.0) if shards >= devices else (one_s, 0.0)
    seconds = device.startup_s + work_s + wait_s
    limits = []
    if shards < devices:
        limits.append(f"shards ({devices - shards:,} devices idle)")
    if device.startup_s / seconds > OFTEN:
        limits.append("start-up")
    if asked > given:
        limits.append("storage")
    size = images * device.sample_bytes
    looked = min(busy * device.resume, SHARED if devices > MACHINE else math.inf)
    return Run(
        images, devices, shard, shards, device.startup_s, work_s, wait_s, asked, min(asked, given), size, size / looked,
        tuple(limits) or ("computing",),
    )  # fmt: skip


def number(row: Row, key: str) -> float:
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ReportError(f"{row['name']}: {key} is {found!r}, and should be a number above 0")
    return found


def figure(v: float) -> str:
    """Three digits."""
    return f"{float(f'{v:.3g}'):,.0f}" if v >= 100 else f"{v:.3g}"


def ranged(row: Row, key: str, times: float = 1) -> str:
    middle, low, high = (figure(number(row, key + end) * times) for end in ("", "_min", "_max"))
    return f"{middle} ({low} to {high})"


def power(images: int) -> str:
    return f"10^{len(str(images)) - 1}" if str(images).strip("0") == "1" else f"{images:,}"


def sheets(rows: list[Row]) -> list[str]:
    """A sheet, in Markdown, for every device, way and commit that there are rows of."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"].startswith("scale_"):
            groups.setdefault(f"{where(row)}, {row['way']}", []).append(row)
    if not groups:
        raise ReportError(f"no rows of this benchmark in these files; make some with {PROG} --measure --out FILE")
    return [sheet(title, group) for title, group in groups.items()]


def sheet(title: str, rows: list[Row]) -> str:
    parts = {row["name"]: row for row in rows}
    rates = [row for name, row in parts.items() if name.startswith("scale_rate[")]
    default = [row for row in rates if (row["solver"], row["steps"], row["guidance"]) == CASES[0]]
    wanted = ["scale_startup", "scale_run", "scale_bytes", "scale_write", "scale_resume"]
    if missing := [name for name in wanted if name not in parts] + ["scale_rate of the default solver"] * (not default):
        raise ReportError(f"rows of {title} lack {', '.join(missing)}; make all of them with {PROG} --measure")
    startup, run, sizes, write, resume = (parts[name] for name in wanted)
    device = Device(
        {row["shape"][0]: number(row, "images_per_s") for row in default},
        number(startup, "fresh_startup_s" if "fresh_startup_s" in startup else "startup_s"),
        number(sizes, "bytes_shard"),
        *(number(row, f"{key}mb_per_s") * 1e6 for row, key in ((write, ""), (write, "file_"), (resume, "resume_"))),
    )
    cuda, threads = startup["on"] == "cuda", startup["threads"]
    unit = startup["device"] if cuda else f"{threads} CPU core{'s' * (threads != 1)}"
    hour = "GPU-hour" if cuda else f"hour of {unit}"
    solver, steps, guidance = CASES[0]
    said = ["Medians, with the lowest and the highest, of calls in turns. Guidance other than 1 evaluates the network twice a step."]
    if not cuda:
        said.append(f"No GPU: a device, here and below, is {unit}.")
    if any(row.get("quick") for row in rows):
        said.append("Of --quick: a trial that such rows can be made, no measurement.")
    return "\n\n".join(
        [
            f"**Samples per {hour}, by images of a call: {title}**", by_batch(rates), " ".join(said),
            f"**Beside the sampling: {unit}**", beside(device, startup, run, write, resume),
            f"**Bytes of a sample, over {number(run, 'images'):,} images**", formats(sizes),
            f"**Runs, reckoned; a device is {unit}, {solver}, {steps} steps, guidance {guidance:g}**", *many(device, cuda),
        ]
    )  # fmt: skip


def by_batch(rates: list[Row]) -> str:
    batches = sorted({row["shape"][0] for row in rates})
    lines: dict[str, dict[int, Row]] = {}
    for row in rates:
        lines.setdefault(f"{row['solver']}, {row['steps']}, {row['guidance']:g}", {})[row["shape"][0]] = row
    return table(
        ["solver, steps, guidance", "network evaluations", *(f"{n:,}" for n in batches), "calls"],
        [
            [
                case, str(next(iter(of.values()))["evaluations"]), *(ranged(of[n], "images_per_s", 3600) if n in of else "" for n in batches),
                ", ".join(str(of[n]["calls"]) for n in batches if n in of),
            ]
            for case, of in lines.items()
        ],
    )  # fmt: skip


def beside(device: Device, startup: Row, run: Row, write: Row, resume: Row) -> str:
    lines = [["start-up: a whole command for 1 image in 1 step", f"{ranged(startup, 'startup_s')} s"]]
    if "fresh_startup_s" in startup:
        text = f"{figure(number(startup, 'fresh_startup_s'))} s, of which compiling {figure(number(startup, 'fresh_compile_s'))} s"
        lines.append(["start-up where nothing compiled is kept", text])
    parts = ", ".join(f"{what} {figure(number(write, f'{what}_s') * 1e3)}" for what in ("pack", "hash", "file"))
    # The command found its compiled code kept, so its start-up is that.
    reckoned = number(startup, "startup_s") + number(run, "images") / device.rate(int(number(run, "shard_size")))
    lines += [
        [
            f"pack, hash, write and fsync a shard of {number(write, 'shard_size'):,}, over {number(write, 'shards'):,}",
            f"{ranged(write, 'shard_s', 1e3)} ms; by themselves {parts}",
        ],
        [f"so a process writes; the disk ({write['file_system']}) takes", f"{figure(device.process / 1e6)} MB/s; {figure(device.disk / 1e6)} MB/s"],
        [
            f"take up a complete run again; verify it ({figure(number(resume, 'bytes') / 1e6)} MB, just written, so from memory)",
            f"{figure(device.resume / 1e6)} MB/s; {figure(number(resume, 'verify_mb_per_s'))} MB/s",
        ],
        [
            f"a whole command for {number(run, 'images'):,} images in shards of {number(run, 'shard_size'):,}; the same reckoned as below",
            f"{figure(number(run, 'run_s'))} s; {figure(reckoned)} s",
        ],
    ]  # fmt: skip
    return table(["what", "measured"], lines)


def formats(sizes: Row) -> str:
    lines = [[name, f"{number(sizes, f'bytes_{kind}'):,.0f}"] for kind, name in FORMATS.items()]
    lines[0][0] += f" of {number(sizes, 'shard_size'):,}"
    if "bytes_png_on_disk" in sizes:
        lines[-1][1] += f", and {number(sizes, 'bytes_png_on_disk'):,.0f} in blocks of the disk"
    return table(["as", "bytes"], lines)


def many(device: Device, cuda: bool) -> list[str]:
    """The table of runs, and what it takes for granted."""
    found = [reckon(device, images, devices) for images in RUNS for devices in DEVICES]
    head = "images, devices, --shard-size, shards, hours, device-hours, GB, MB/s of all, start-up, last shard, look again in s, limit"
    lines = [
        [
            power(run.images), f"{run.devices:,}", str(run.shard), f"{run.shards:,}", figure(run.seconds / 3600),
            figure(run.devices * run.seconds / 3600), figure(run.bytes / 1e9), figure(run.asked / 1e6), f"{run.startup_s / run.seconds:.1%}",
            f"{run.wait_s / run.seconds:.1%}", figure(run.resume_s), ", ".join(run.limits),
        ]
        for run in found
    ]  # fmt: skip
    idle = "".join(
        f"; at {SHARD:,} a shard {power(run.images)} images were {shards:,} shards, and {run.devices - shards:,} of {run.devices:,} devices idle"
        for run in found
        if (shards := -(-run.images // SHARD)) < run.devices
    )
    said = [
        "hours of one device are images over its measured rate. Eight and 1,000 are arithmetic: no such run was made;",
        "devices are equal and work at the full rate of one: ranks exchange nothing while they work but for counters in a store, a few a shard. "
        f"All start at once, in the time of one{' where nothing compiled is kept' * cuda}; that they have to find each other is left out;",
        "*last shard*: in the end all wait for the slowest, for half a shard's time on average, which is in the hours, and at most for a whole one's;",
        "an image takes as long as in the largest measured batch that is no larger than its shard;",
        f"`--shard-size` is {SHARD:,}, or less, so that each device has {EACH} shards, but no fewer images than the smallest measured batch; or more, "
        f"so that there are at most {runs.MAX_SHARDS:,}, which a run may have{idle};",
        f"*MB/s of all* is what they would write if storage kept up. Up to {MACHINE} devices write to the measured disk, more to a shared file system "
        f"of {SHARED / 1e9:g} GB/s (assumed), none faster than a process was measured to write. Where storage is the limit, the hours are at its rate;",
        f"start-up is a limit where it is over {OFTEN:.0%} of the time, and computing where nothing else is;",
        "*look again*: what it takes to hash every shard when the complete run is started again, each rank its part, at the rate of files in memory.",
    ]  # fmt: skip
    return [table(head.split(", "), lines), "\n".join(["What this takes for granted:", "", *(f"- {line}" for line in said)])]


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG, description="A sheet of what devices make in an hour and what large runs take, of rows; or the rows, with --measure."
    )
    p.add_argument("files", nargs="*", type=Path, metavar="ROWS", help="rows to make the sheet of (all *scale*.json of benchmarks/results)")
    p.add_argument("--readme", type=Path, metavar="FILE", help=f"put the sheet between {START} and {END} there")
    g = p.add_argument_group("measuring")
    g.add_argument("--measure", action="store_true", help="measure this machine, which must have nothing else to do")
    g.add_argument("--out", type=Path, metavar="FILE", help="for the rows; rows of other benchmarks there stay")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (cuda where there is one)")
    g.add_argument("--dtype", choices=list(cli.DTYPES), metavar="TYPE", help="as of fastdiff.sample")
    g.add_argument("--compile", choices=["auto", "yes", "no", "fused"], default="auto", help="as of fastdiff.sample (auto)")
    g.add_argument(
        "--seconds", type=cli.number(float, 0), default=270.0, metavar="S", help="for the rates: as many rounds as fit, at least one (270)"
    )
    g.add_argument(
        "--scratch", type=Path, metavar="DIR", help="for the files that are written, on the disk to be measured (the system's folder)"
    )
    g.add_argument("--quick", action="store_true", help="a trial with a few images: no measurement")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.measure:
        if args.out is None or args.files or args.readme:
            p.error("--measure takes --out FILE, and neither rows nor --readme")
        measure(args)
        return 0
    files = args.files or sorted(RESULTS.glob("*scale*.json"))
    try:
        text = "\n\n".join(sheets(rows_of(files) if files else []))
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ReportError(f"a row lacks {e}" if isinstance(e, KeyError) else f"these are not rows of this benchmark: {e}") from None
    if args.readme:
        put(args.readme, text, START, END)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

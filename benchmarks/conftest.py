"""What the benchmarks share: cases, graphs of many launches, interleaved ratios, and what a row says of the machine it ran on."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cpuinfo
import pytest
import torch
from torch import Tensor

from fastdiff.loop import own_stream, trial_stream

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
# Launches of a CUDA graph: enough that a replay's start and its wait, some 20 us, weigh under 1 %.
LAUNCHES = 200
# Bytes moved before a buffer is touched again when `cold`: the L2 of an H100 or H200 holds 50 to 60 MB.
ROTATION = 2 << 30


@dataclass(frozen=True)
class Case:
    """A batch for one kernel. cold: every launch works on buffers of its own, in turn, too many for the L2."""

    device: str
    batch: int
    dtype: torch.dtype = torch.float32
    cold: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, 16, 16

    def __str__(self) -> str:
        return f"{self.device}-{self.batch}-{str(self.dtype).removeprefix('torch.')}{'-cold' if self.cold else ''}"


CASES = [
    Case("cpu", 64),
    Case("cpu", 1024),
    *(Case("cuda", 4096, dtype, cold) for cold in (False, True) for dtype in (torch.float32, torch.bfloat16)),
]


def _param(case: Case) -> Any:
    missing = case.device == "cuda" and not CUDA
    return pytest.param(case, id=str(case), marks=pytest.mark.skipif(missing, reason="needs a CUDA GPU"))


@pytest.fixture(params=map(_param, CASES))
def case(request) -> Case:
    return request.param


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each run, one number a round. A round goes forwards and back (A B B A), so that a drift of the machine hits all alike."""
    repeats = {}
    for name, run in runs.items():
        run()
        began = time.perf_counter()
        run()
        # At least 2 ms a measurement: the clock and the loop then weigh nothing.
        repeats[name] = max(1, math.ceil(2e-3 / (time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        total = dict.fromkeys(runs, 0.0)
        for name in (*runs, *reversed(runs)):
            began = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            total[name] += time.perf_counter() - began
        for name in runs:
            seconds[name].append(total[name] / (2 * repeats[name]))
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long as ours each peer takes, round by round: median, lowest, highest. Above 1, ours is the faster."""
    found = {}
    for name, values in seconds.items():
        if name != "ours":
            each = [peer / ours for peer, ours in zip(values, seconds["ours"], strict=True)]
            for end, value in (("", median(each)), ("_min", min(each)), ("_max", max(each))):
                found[f"ratio_to_{name}{end}"] = round(value, 4)
    return found


def in_turn(call: Callable[..., object], sets: Sequence[tuple[Tensor, ...]], launches: int) -> Callable[[], None]:
    """`launches` calls over the sets in turn, each set's last result kept: results must not share memory either when they are to be cold."""

    def run() -> None:
        kept: dict[int, object] = {}
        for i in range(launches):
            kept[i % len(sets)] = call(*sets[i % len(sets)])

    return run


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph: a call replays it and waits for it."""
    graph, device = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
    trial, stream = trial_stream(device), own_stream(device, graph)
    trial.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(trial):
        run()
    torch.cuda.current_stream().wait_stream(trial)
    with torch.cuda.graph(graph, stream=stream):
        run()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def awaited(run: Callable[[], object]) -> Callable[[], None]:
    """`run`, and then wait for the device."""

    def call() -> None:
        run()
        torch.cuda.synchronize()

    return call


def pytest_addoption(parser) -> None:
    parser.addoption("--compiled", action="store_true", help="benchmarks: also what torch.compile makes on the CPU, up to a minute each")


@pytest.fixture
def no_compiled(request) -> Callable[[str], str | None]:
    """Why compiled networks are left out on a device, or None."""

    def why(device: str) -> str | None:
        if device == "cuda":
            return None
        if not request.config.getoption("--compiled"):
            return "left out: networks are compiled for the CPU with --compiled only"
        return None if shutil.which(os.environ.get("CXX", "g++")) else "left out: no C++ compiler"

    return why


@pytest.fixture
def rounds(request) -> int:
    """Rounds of interleaved timing: as many as --benchmark-min-rounds asks of pytest-benchmark."""
    return max(1, request.config.getoption("benchmark_min_rounds"))


@pytest.fixture
def interleaved(rounds) -> Callable[..., tuple[dict[str, list[float]], dict[str, float]]]:
    """Runs by name, "ours" among them -> (seconds per call of each, a number a round; what `ratios` makes of them)."""

    def run(runs: dict[str, Callable[[], object]]) -> tuple[dict[str, list[float]], dict[str, float]]:
        seconds = interleave(runs, rounds)
        return seconds, ratios(seconds)

    return run


@pytest.fixture
def sets(case) -> Callable[[int, Callable[[], tuple[Tensor, ...]]], list[tuple[Tensor, ...]]]:
    """As many sets of a call's tensors as the case needs, given the bytes that a call moves and what makes one set."""
    return lambda moved, make: [make() for _ in range(math.ceil(ROTATION / moved) if case.cold else 1)]


@pytest.fixture
def compare(benchmark, case, interleaved, describe):
    """Time ours by pytest-benchmark; then ours, `eager`, `eager` compiled and a copy of as many bytes, interleaved. All of it goes into the row.

    ours and eager take the tensors of a set; moved: the fewest bytes that one call must read and write. On CUDA each is a graph of many
    launches over the sets in turn. The uncaptured_ ratios are of as many plain calls from Python and one wait.
    """

    def run(ours: Callable[..., object], eager: Callable[..., object], sets: list[tuple[Tensor, ...]], moved: int) -> None:
        cuda = case.device == "cuda"
        launches = max(LAUNCHES, len(sets)) if cuda else 1
        calls = {"ours": ours, "eager": eager}
        reason = _no_compiled(case)
        if reason is None:
            torch.compiler.reset()  # or dynamo stops compiling a function that it has seen in eight shapes
            calls["compiled"] = torch.compile(eager, dynamic=False)
            calls["compiled"](*sets[0])
        plain = {name: in_turn(call, sets, launches) for name, call in calls.items()}
        half = [(torch.randn(moved // 8, device=case.device), torch.empty(moved // 8, device=case.device)) for _ in sets]
        plain["copy"] = in_turn(lambda source, target: target.copy_(source), half, launches)
        runs = {name: captured(call) for name, call in plain.items()} if cuda else plain

        benchmark(runs["ours"])
        seconds, found = interleaved(runs)
        micro = {f"{name}_us": round(median(values) / launches * 1e6, 3) for name, values in seconds.items()}
        benchmark.extra_info |= {
            **describe(case.device, case.dtype, case.shape),
            "launches_per_call": launches,
            "buffer_sets": len(sets),
            "bytes_moved": moved,
            "gb_per_s": round(moved / micro["ours_us"] / 1e3, 2),
            # As many bytes in both, so the ratio of times is the fraction of the copy's GB/s.
            "fraction_of_copy": found["ratio_to_copy"],
            **micro,
            **{key: value for key, value in found.items() if "copy" not in key},
            **({"compiled": reason} if reason else {}),
        }
        if cuda and not case.cold:
            _, found = interleaved({name: awaited(call) for name, call in plain.items() if name != "copy"})
            benchmark.extra_info |= {f"uncaptured_{key}": value for key, value in found.items()}

    return run


def _no_compiled(case: Case) -> str | None:
    """Why the compiled peer is left out, or None. On the CPU, where compiling takes up to 20 s, only the larger batch has it, and none beside a GPU."""
    if case.device == "cuda":
        return None
    if CUDA or case != Case("cpu", 1024):
        return "left out: on the CPU only 1024 images are compiled for, and none beside a GPU"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "left out: no C++ compiler"
    return None


@functools.cache
def _cpu() -> str:
    return cpuinfo.get_cpu_info().get("brand_raw", platform.processor())


@functools.cache
def _commit() -> str:
    """Short hash, "-dirty" when the tree differs (results aside), "unknown" outside git. FASTDIFF_COMMIT names it for a copy without .git."""
    if named := os.environ.get("FASTDIFF_COMMIT"):
        return named

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def described(device: str, dtype: torch.dtype, shape: Sequence[int]) -> dict[str, Any]:
    """What every row says: versions, device, dtype, shape, threads, commit."""
    return {
        "torch": torch.__version__,
        "triton": _triton(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


@pytest.fixture
def describe() -> Callable[..., dict[str, Any]]:
    return described


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Rows are published: what decides the speed stays, names of hosts and builds go."""
    machine_info.clear()
    machine_info |= {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json["commit_info"] = {"id": _commit()}
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        for repeated in ("params", "param", "options"):
            row.pop(repeated, None)

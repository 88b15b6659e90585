"""Long runs: memory that stays flat, files and threads that are let go, a log, lines for schedulers."""

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_checkpoint, small_dataset

from fastdiff import cli, collect, data, runs, sample, train
from fastdiff.distributed import Group
from fastdiff.progress import Progress

CONFIG = {"first": 0, "images": 160, "shard_size": 16, "shape": [8, 8, 3], "labels": [0, 1], "classes": ["cat", "dog"]}


@contextlib.contextmanager
def quiet():
    """What is printed goes where it is not kept: a test that keeps it would grow itself."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def growth(work, rounds: int) -> tuple[float, float]:
    """Bytes that a round of work leaves behind in Python's memory, and in the process's, once it has run for a while."""

    def resident() -> int:
        ctypes.CDLL(None).malloc_trim(0)  # what other tests have given back is not to be what this one takes
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def traced() -> int:
        # CPython's cache of attributes keeps names that torch makes anew for each look, up to 4,096 of them: a room that is filled once.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            sys._clear_type_cache()
        return tracemalloc.get_traced_memory()[0]

    def over(gauge) -> float:
        gc.collect()
        before = gauge()
        for _ in range(rounds):
            work()
        gc.collect()
        return (gauge() - before) / rounds

    for _ in range(rounds // 2):
        work()
    process = min(over(resident) for _ in range(3))  # an allocator's reserve grows once, a leak each time
    tracemalloc.start()
    work()
    python = min(over(traced) for _ in range(3))
    tracemalloc.stop()
    return python, process


def test_memory_is_flat_over_many_micro_batches(tmp_path, log_after):
    """Sampling, callbacks, progress, the log and the shards' writer, 8 micro-batches a round, of tensors of 24 KB: none of them stays, and in Python
    less than 25 bytes a micro-batch."""
    cli.start_log("info")
    sampler = small_checkpoint().sampler(steps=2, solver="ddpm", micro_batch=32)
    numbers = iter(range(10**9))
    seen = []

    def work():
        n = 64 * next(numbers)
        sampler(64, first=n, labels=1, guidance=2.0, progress=progress.part(64))
        sampler(64, first=n, progress=bar.part(64), callback=lambda row, x0: seen.append(float(x0[0, 0, 0, 0])))
        seen.clear()
        with runs.hold(tmp_path, CONFIG | {"images": 128, "shard_size": 64}, Group()) as run:
            run.todo = [0, 1]
            run.make(lambda ids, labels: data.to_uint8(sampler(len(ids), first=int(ids[0]), labels=torch.from_numpy(labels))).numpy())

    with quiet():
        progress, bar = Progress(10**9, as_json=True, every=0.001), Progress(10**9)
        with progress, bar:
            python, process = growth(work, 8)
    assert python < 8 * 25
    assert process < 8 * 24_000 / 3


def test_that_gauge_sees_a_leak():
    kept = []
    python, process = growth(lambda: kept.append(np.ones(1_000_000)), 3)  # more than other tests may have given back
    assert python > 7_900_000
    assert process > 1_000_000


def test_files_and_threads_are_let_go(tmp_path):
    before = held()

    def draw(ids, labels):
        return np.full((len(ids), 8, 8, 3), ids[0] % 251, np.uint8)

    def fails(ids, labels):
        if ids[0] >= 80:
            raise ValueError("no more")
        return draw(ids, labels)

    with pytest.raises(runs.RunError, match="no more"), runs.hold(tmp_path / "run", CONFIG, Group()) as run:
        run.make(fails)
    with (
        runs.hold(tmp_path / "run", CONFIG, Group()),
        pytest.raises(runs.RunError, match="is being written to by process"),
        runs.hold(tmp_path / "run", CONFIG, Group()),
    ):
        pass
    with pytest.raises(runs.RunError, match="is not complete"):
        collect.collect(tmp_path / "run", tmp_path / "all.npz")
    with pytest.raises(runs.RunError, match="holds a run with"), runs.hold(tmp_path / "run", CONFIG | {"steps": 3}, Group()):
        pass
    with runs.hold(tmp_path / "run", CONFIG, Group()) as run:
        run.make(draw)
        run.finish()
    assert runs.verify(tmp_path / "run").right
    for name in ("all.npz", "all.npy", "all.tar", "all-%d.tar", "all"):
        collect.collect(tmp_path / "run", tmp_path / name)
    assert held() == before


def test_log_level_says_more_or_less(tmp_path, monkeypatch, capfd, log_after):
    monkeypatch.chdir(tmp_path)
    small_checkpoint().save("net.safetensors")
    flags = ["--device", "cpu", "--checkpoint", "net.safetensors", "--batch", "6", "--shard-size", "3", "--steps", "1", "--json"]
    assert sample.main([*flags, "--out", "quiet"]) == 0
    assert capfd.readouterr().err == ""
    assert sample.main([*flags, "--out", "loud", "--log-level", "info"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in lines if "wrote" in line] == [
        "wrote loud/shard-000000.npz",
        "wrote loud/shard-000001.npz",
    ]
    assert all(" INFO fastdiff.runs: " in line for line in lines)
    monkeypatch.setenv("RANK", "3")
    (Path("loud") / "shard-000001.npz").write_bytes(b"altered")
    assert sample.main([*flags, "--out", "loud"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "[rank 3] WARNING fastdiff.runs: loud/shard-000001.npz is not what was written there" in line


def test_json_lines_of_a_run(tmp_path, monkeypatch, capsys, log_after):
    """Every line is JSON; progress comes first, as often as asked for, and the report last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress.__init__, "__kwdefaults__", Progress.__init__.__kwdefaults__ | {"every": 0.0})
    small_checkpoint().save("net.safetensors")
    flags = ["--device", "cpu", "--checkpoint", "net.safetensors", "--batch", "40", "--shard-size", "16", "--steps", "2", "--json"]
    assert sample.main([*flags, "--out", "run", "--verify", "--collect", "all.npz"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    events = [json.loads(line) for line in stdout.splitlines()]
    under_way = ("progress", "check", "collect")
    assert [e["event"] for e in events if e["event"] not in under_way] == ["done", "verified", "collected"]
    assert {e["event"] for e in events if e["event"] in under_way} == set(under_way)
    made = [e for e in events[: [e["event"] for e in events].index("done")] if e["event"] == "progress"]
    assert made
    images = [e["images"] for e in made]
    assert images == sorted(images)
    assert images[-1] == 40
    assert all(e["of"] == 40 and (e["eta_s"] is None or e["eta_s"] >= 0) for e in made)
    assert made[-1]["eta_s"] == 0
    done, verified, collected = (e for e in events if e["event"] not in under_way)
    assert {"images": 40, "shards": 3, "made": 3, "processes": 1}.items() <= done.items()
    assert verified["sha256"] == collected["sha256"]


def test_json_lines_of_training(tmp_path, monkeypatch, capsys, log_after):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress.__init__, "__kwdefaults__", Progress.__init__.__kwdefaults__ | {"every": 0.0})
    small = small_dataset()
    np.savez("data.npz", images=small.images, labels=small.labels)
    network = "--channels 16 16 --blocks 1 --middle 0 --timesteps 50"
    assert train.main(f"--device cpu --data data.npz --batch 4 --steps 60 {network} --json --out run".split()) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    *lines, done = map(json.loads, stdout.splitlines())
    assert done["event"] == "done"
    assert Path(done["checkpoint"]).is_file()
    steps = [line["steps"] for line in lines]
    assert steps == sorted(steps) and set(steps) == {*range(1, 61)}  # some twice, where a step takes its time
    assert all(line["event"] == "progress" and line["of"] == 60 for line in lines)
    assert lines[-1]["loss"] > 0
    assert lines[-1]["eta_s"] == 0

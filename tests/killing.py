"""Runs killed with SIGKILL at random moments, taken up again, and compared, file by file, with one that nobody disturbed.

    python tests/killing.py --runs 100 [--seed N] [--real]

A start of torch takes seconds, so the processes that are killed are forks of one that has imported it (--real: processes of their own).
"""

import argparse
import collections
import contextlib
import functools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGES, SHARD = 60, 3
FLAGS = [
    "--batch",
    str(IMAGES),
    "--shard-size",
    str(SHARD),
    "--steps",
    "1",
    "--solver",
    "ddim",
    "--micro-batch",
    "4",
    "--device",
    "cpu",
    "--json",
]
PATIENCE_S = 100.0


def _sample(flags: list[str]) -> int:
    from fastdiff import sample

    return sample.main(flags)


def _child(work: Callable[[], object], log: str, env: dict[str, str]) -> None:
    """What a command does, in a fork. env: a variable that is to be unset is ""."""
    from tqdm import tqdm

    from fastdiff import cli, sample

    tqdm.set_lock(threading.RLock())  # its own is a semaphore for several processes, which one that is killed leaves behind
    os.environ.update(env)
    for name in [name for name, value in env.items() if not value]:
        del os.environ[name]
    with open(log, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    cli.run(work, sample.PROG)


class Process:
    """`python -m fastdiff.sample` with these flags, or a function, in a process of its own, to be killed. What it says is in the file `log`."""

    def __init__(
        self, work: list[str] | Callable[[], object], log: Path, real: bool = False, env: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.log, self.real, env = log, real, env or {}
        log.touch()
        if real:
            env = os.environ | {"PYTHONPATH": str(ROOT)} | env
            with open(log, "ab") as f:
                self.popen = subprocess.Popen([sys.executable, "-m", "fastdiff.sample", *work], stdout=f, stderr=f, env=env, **options)
        else:
            work = functools.partial(_sample, work) if isinstance(work, list) else work
            self.fork = _forks().Process(target=_child, args=(work, str(log), env))
            self.fork.start()
        self.pid = self.popen.pid if real else self.fork.pid

    def poll(self) -> int | None:
        """Its exit code, less than 0 for a signal, or None as long as it runs."""
        return self.popen.poll() if self.real else self.fork.exitcode

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code. TimeoutError, and the process is killed, where it takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.signal(9)
                raise TimeoutError(f"still running after {seconds} s: {self.said()[-2000:]}")
            time.sleep(0.002)
        return self.poll()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text()


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(work: list[str] | Callable[[], object], world: int, folder: Path, env: dict[str, str] | None = None) -> list[Process]:
    """Processes of one job, as torchrun would start them; what each says is in folder/log-RANK."""
    job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | (env or {})
    return [Process(work, folder / f"log-{rank}", env=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


@functools.cache
def _forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdiff.sample"])
    return context


def contents(folder: Path) -> dict[str, bytes]:
    """What a run's folder holds, but for its lock."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def recorded(folder: Path) -> set[str]:
    """The names of the shards whose digests are on the disk."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        found |= {entry["file"] for entry in json.loads((folder / "manifest.json").read_text())["shards"]}
    for journal in folder.glob(".journal-*.jsonl"):
        for line in journal.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.add(f"shard-{json.loads(line)['shard']:06}.npz")
    return found


def moment(folder: Path) -> str:
    """What a process that has been killed was about, as its folder shows it."""
    parts = [p.name for p in folder.glob(".*.part")]
    if any("manifest" in name for name in parts):
        return "in the manifest's .part"
    if any("grid" in name for name in parts):
        return "in the picture's .part"
    if parts:
        return "in a shard's .part"
    there = {p.name for p in folder.glob("shard-*.npz")}
    if there - recorded(folder):
        return "between a shard's name and its record"
    if any(not p.read_bytes().endswith(b"\n") for p in folder.glob(".journal-*.jsonl")):
        return "in a record"
    if len(there) < -(-IMAGES // SHARD):
        return "while drawing"
    return "after the last shard, before the end" if not (folder / "grid.png").exists() else "at the end"


def wait_for(there, process: Process, seconds: float = PATIENCE_S) -> bool:
    """Look until something is there: whether it came before the process ended."""
    end = time.monotonic() + seconds
    while not there():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            process.signal(9)
            raise TimeoutError(process.said()[-2000:])
        time.sleep(0.0005)
    return True


def kill(process: Process, folder: Path, rng: random.Random, seconds: float) -> bool:
    """Kill it at a random moment between its beginning to write and its end: whether it was still running. Some moments are too short to be met by
    time alone, so in half of the cases it is killed a few milliseconds at most after something has come into the folder."""
    if not wait_for((folder / ".lock").exists, process):
        return False
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, seconds))
    else:
        before = len(os.listdir(folder))
        what = rng.choice([".shard-*.part", "shard-*.npz", "shard-*.npz", ".manifest*.part", ".grid*.part"])
        seen, wanted = set(folder.glob(what)), rng.randint(1, 8) if "shard" in what else 1

        def enough() -> bool:
            return len(set(folder.glob(what)) - seen) >= (wanted if what[0] != "." else 1) or len(os.listdir(folder)) < before

        wait_for(enough, process)
        time.sleep(rng.choice([0, 0.0005, 0.001, 0.003]) * rng.random())
    process.signal(9)
    return process.wait() == -9


def rounds(net: Path, folder: Path, runs: int, seed: int = 0, real: bool = False, most: int = 4) -> Iterator[tuple[str, list[str]]]:
    """For each of the runs: what is not right with it in the end, "" for nothing, and where the kills fell."""
    rng, log = random.Random(seed), folder / "log"
    flags = [*FLAGS, "--checkpoint", str(net)]
    calm = folder / "calm"
    process = Process([*flags, "--out", str(calm)], log, real)
    wait_for((calm / ".lock").exists, process)
    began = time.monotonic()
    wait_for((calm / "grid.png").exists, process)
    seconds = time.monotonic() - began
    if process.wait() != 0:
        raise RuntimeError(log.read_text())
    wanted = contents(calm)
    for i in range(runs):
        out, fell = folder / f"run-{i}", []
        for _ in range(rng.randint(1, most)):
            if not kill(Process([*flags, "--out", str(out)], log, real), out, rng, seconds):
                break
            there = len(list(out.glob("shard-*.npz")))
            fell.append(f"{moment(out)}|{there}")
        log.write_text("")
        code = Process([*flags, "--out", str(out)], log, real).wait()
        found = contents(out)
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        fault = f"exit code {code}: {log.read_text()}" if code else f"differs in {odd}" if odd else ""
        if not fault:
            for path in [*out.rglob("*"), out]:
                path.unlink() if path.is_file() else path.rmdir()
        yield fault, fell


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--real", action="store_true")
    args = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FASTDIFF_CACHE"] = str(folder / "cache")
        net = folder / "net.safetensors"
        subprocess.run(
            [sys.executable, "-c", f"import helpers; helpers.small_checkpoint().save({str(net)!r})"],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            check=True,
        )
        good, moments, shards, times = 0, collections.Counter(), collections.Counter(), collections.Counter()
        for i, (fault, fell) in enumerate(rounds(net, folder, args.runs, args.seed, args.real, 2 if args.real else 4)):
            good += not fault
            times[len(fell)] += 1
            for kind, there in (word.split("|") for word in fell):
                moments[kind] += 1
                shards[int(there) * 4 // (IMAGES // SHARD)] += 1
            if fault:
                print(f"run {i}: {fault}", flush=True)
    print(
        f"{good} of {args.runs} runs are, file by file, the undisturbed one; "
        f"{sum(moments.values())} kills of {'real processes' if args.real else 'forks'}"
    )
    for kind, count in moments.most_common():
        print(f"  {count:4} {kind}")
    print("  with", ", ".join(f"{k}/4 of the shards there: {shards[k]}" for k in sorted(shards)))
    print("  runs by number of kills:", ", ".join(f"{k}: {times[k]}" for k in sorted(times)))
    return 0 if good == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())

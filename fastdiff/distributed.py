"""Several processes of one job, as torchrun starts them: who one of them is, and what they say to each other."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

# A rank that is done waits for the slowest. One that has died does not keep the others waiting: its connections close, and torchrun ends them.
TIMEOUT = timedelta(days=7)
STEP = timedelta(hours=1)  # that a step of training may take one rank longer than another; NCCL does not see that a connection has closed
MEETING = timedelta(minutes=10)  # that ranks may take to start
NAP = timedelta(milliseconds=100)  # between which a rank that waits for others heeds signals


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one. rank: 0 to world - 1; local: its number on its machine. names: what the processes call themselves, see
    `restarted`.

    Tensors that pass between the ranks must be equal in shape everywhere. A group of one has nobody to ask, and answers at once.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    names: tuple[str, ...] = ()
    store: Any = field(default_factory=lambda: _Counts(), repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all are here."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each. ConnectionError where one of them has ended."""
        if self.world > 1:
            values = values.clone()
            with lost():
                _wait(dist.all_reduce(values, async_op=True), values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return bool(self.sum(torch.tensor([float(flag)]))[0])

    def agree(self, values: Tensor) -> bool:
        """Whether rank 0 has the same values. values: a CPU tensor."""
        told = values.clone()
        if self.world > 1:
            with lost():
                _wait(dist.broadcast(told, 0, async_op=True), told)
        return torch.equal(told, values)

    def add(self, name: str, number: int) -> int:
        """Add to a number that all see, and return what it is now, without waiting for anyone. It begins at 0, and again after a restart."""
        with lost():
            return int(self.store.add(name, number))

    def restarted(self, names: Any) -> bool:
        """Whether processes of these names were started again as the processes of this group: by the same torchrun, on one machine at least.

        How often it has done so says less: torchrun does not count it where a machine comes or goes, and each machine has a count of its own.
        Nor does --rdzv-id, by which another torchrun may go, too.
        """
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or set(names) & set(self.names):
            return False
        before, now = ({name.partition(" ")[2] for name in some} - {""} for some in (names, self.names))
        return bool(before & now)


class _Counts(collections.Counter[str]):
    """What a group of one counts in, as a store does it."""

    def add(self, name: str, number: int) -> int:
        self[name] += number
        return self[name]


@contextmanager
def lost() -> Iterator[None]:
    """ConnectionError, in one line, for what the backends say of another process that has ended. Other errors stay as they are."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        reason = str(e).partition("]")[2].partition(". ")[0].strip() if "gloo" in str(e) else _first(e)
        raise ConnectionError(f"another process of this job has ended ({reason})") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing to the process's stdout, where torch 2.8's gloo tells of its connections amid our lines of JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _wait(work: Any, values: Tensor) -> None:
    """Wait for a collective, and heed Ctrl-C and SIGTERM meanwhile. CUDA tensors are waited for by the device."""
    while not values.is_cuda and not work.is_completed():
        with suppress(RuntimeError):  # that the nap is over, of which nothing comes with gloo; another is said again below
            work.wait(NAP)
    work.wait()


def _name() -> str:
    """What this process calls itself, as no other does, and what it calls the torchrun that has started it, if one has: a digest of where that
    writes its logs, which is a new folder for each, or of its number."""
    mine = uuid.uuid4().hex
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return mine
    logs = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("attempt_")[0]
    return f"{mine} {hashlib.sha256(f'{platform.node()} {logs or os.getppid()}'.encode()).hexdigest()[:32]}"


def launched() -> bool:
    """Whether torchrun, or what speaks its language, has started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1 and "RANK" in os.environ


def rank() -> int:
    """The number of this process among those of its job, 0 where it is alone."""
    return _number("RANK") if launched() else 0


@contextmanager
def join(cuda: bool = False) -> Iterator[Group]:
    """The group that this process belongs to, as long as the block lasts: from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or alone.

    cuda: CUDA tensors pass between ranks too (by NCCL; those of the CPU always by gloo). ValueError where the variables make no sense.
    """
    if not launched():
        yield Group(names=(_name(),) if "TORCHELASTIC_RUN_ID" in os.environ else ())
        return
    rank, world, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    local = _number("LOCAL_RANK", rank)
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}; start the processes with torchrun, which sets them")
    with _mortal():
        try:
            store, rank, world = next(rendezvous("env://", rank, world, timeout=MEETING))
            # torchrun keeps its store over restarts, with what those that died have left in it.
            names = _meet(PrefixStore("fastdiff", store), rank, world)
        except (dist.DistError, TimeoutError) as e:
            raise ConnectionError(f"no meeting with the other processes at {os.environ['MASTER_ADDR']}, port {port}: {_first(e)}") from None
        store.set_timeout(TIMEOUT)
        store = PrefixStore(f"fastdiff/{names[0]}", store)
        with lost(), _silent():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(
                backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=STEP if cuda else TIMEOUT
            )
    yield Group(rank, world, local, names, PrefixStore("counters", store))
    dist.destroy_process_group()  # not after an error: the others do not come, and are not waited for


def _meet(store: Any, rank: int, world: int) -> tuple[str, ...]:
    """The names of all ranks of this start, the same on each. TimeoutError after MEETING.

    A store that is as old as torchrun may hold what earlier ones have said, at any stage. Each has a name of its own, so the first rank takes nobody
    for present who does not answer to its name, and the others believe nobody who does not know theirs.
    """
    mine, end = _name(), time.monotonic() + MEETING.total_seconds()
    others, told = [f"hello/{r}" for r in range(1, world)], [""]
    if rank:
        store.set(others[rank - 1], mine)
    while time.monotonic() < end:
        if rank and store.check(["names"]):
            names: list[str] = json.loads(store.get("names"))
            if mine in names:
                store.set(f"here/{names[0]}/{mine}", "")
                if store.check([f"all/{names[0]}"]):
                    return tuple(json.loads(store.get(f"all/{names[0]}")))
        elif not rank and store.check(others):
            names = [mine, *(store.get(key).decode() for key in others)]
            if names != told:
                store.set("names", json.dumps(names))
                told = names
            if store.check([f"here/{mine}/{name}" for name in names[1:]]):
                store.set(f"all/{mine}", json.dumps(names))
                return tuple(names)
        time.sleep(0.01)
    raise TimeoutError(f"not all of the {world} came within {MEETING.total_seconds():.0f} s")


@contextmanager
def _mortal() -> Iterator[None]:
    """Ctrl-C and SIGTERM end this process at once, rather than when C++ is done waiting for others: it holds nothing yet."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: handler for s in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(s))}
        for s in before:
            signal.signal(s, signal.SIG_DFL)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def one_voice(group: Group) -> Iterator[None]:
    """Of what ends one rank the others learn sooner or later, each in its own words. One of them speaks, the others end with the same exit code.

    Where all fail alike it is the first, behind whose progress bar the line is to stand. torchrun's SIGTERM for those that remain finds them on
    their way already.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not group.first:
            sys.exit(130)
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if group.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0 if group.first else 0.3)
            with suppress(ConnectionError):  # where the store is gone, too, each speaks for itself
                if group.add("failed", 1) > 1:
                    log.debug("%s", e)
                    sys.exit(2)
        raise


def own_device(name: str | None, local: int) -> str | None:
    """The device of a rank: what was asked for, but of "cuda", or of the best there is, the GPU with the rank's number. Where a launcher shows each
    rank one GPU alone, that one."""
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        alone = "CUDA_VISIBLE_DEVICES" in os.environ and torch.cuda.device_count() == 1
        return "cuda:0" if alone else f"cuda:{local}"
    return name


def _first(e: Exception) -> str:
    """The first line of an error that goes on with the frames of C++."""
    return str(e).splitlines()[0].rstrip(" :.")


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name} is {text!r}; start the processes with torchrun, which sets it") from None

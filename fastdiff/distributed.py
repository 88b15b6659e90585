"""Several processes of one job, as torchrun starts them: who one of them is, and what they say to each other."""

from __future__ import annotations

import collections
import logging
import os
import platform
import signal
import sys
import time
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
MEETING = timedelta(minutes=10)  # that ranks may take to start


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one. rank: 0 to world - 1; local: its number on its machine. attempt: how often torchrun has restarted them.

    Tensors that pass between the ranks must be equal in shape everywhere. A group of one has nobody to ask, and answers at once.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    attempt: int = 0
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
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them."""
        return bool(self.sum(torch.tensor([float(flag)]))[0])

    def agree(self, values: Tensor) -> bool:
        """Whether rank 0 has the same values. values: a CPU tensor."""
        told = values.clone()
        if self.world > 1:
            with lost():
                dist.broadcast(told, 0)
        return torch.equal(told, values)

    def add(self, name: str, number: int) -> int:
        """Add to a number that all see, and return what it is now, without waiting for anyone. It begins at 0, and again after a restart."""
        with lost():
            return int(self.store.add(name, number))


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


def job() -> str:
    """What this job is called over all its restarts: torchrun's --rdzv-id, or who runs torchrun where it has none, or "" without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name


def launched() -> bool:
    """Whether torchrun, or what speaks its language, has started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1 and "RANK" in os.environ


@contextmanager
def join(cuda: bool = False) -> Iterator[Group]:
    """The group that this process belongs to, as long as the block lasts: from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or alone.

    cuda: CUDA tensors pass between ranks too (by NCCL; those of the CPU always by gloo). ValueError where the variables make no sense.
    """
    if not launched():
        yield Group(attempt=_number("TORCHELASTIC_RESTART_COUNT", 0))
        return
    rank, world, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    local, attempt = _number("LOCAL_RANK", rank), _number("TORCHELASTIC_RESTART_COUNT", 0)
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}; start the processes with torchrun, which sets them")
    try:
        store, rank, world = next(rendezvous("env://", rank, world, timeout=MEETING))
    except dist.DistError as e:
        raise ConnectionError(f"no meeting with the other processes at {os.environ['MASTER_ADDR']}, port {port}: {_first(e)}") from None
    store.set_timeout(TIMEOUT)
    # torchrun's static rendezvous keeps its store over restarts, with what those that died have left in it.
    store = PrefixStore(f"fastdiff/{attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=TIMEOUT)
    yield Group(rank, world, local, attempt, PrefixStore("counters", store))
    dist.destroy_process_group()  # not after an error: the others do not come, and are not waited for


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
    except (ValueError, OSError) as e:
        if group.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0 if group.first else 0.3)
            with suppress(ConnectionError):  # where the store is gone, too, each speaks for itself
                if group.add("failed", 1) > 1:
                    log.debug("%s", e)
                    sys.exit(2)
        raise


def own_device(name: str | None, local: int) -> str | None:
    """The device of a rank: what was asked for, but of "cuda", or of the best there is, the GPU with the rank's number."""
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        return f"cuda:{local}"
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

"""What a row says beside the time: operations, kernels, waits and host time a step, memory, and the rate of a matrix product."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import Peer, Task
from fastdiff import reference
from fastdiff.loop import Loop

# Steps of a short and of a longer run: their difference is what further steps cost, without what a call costs.
FEW, MORE = 2, 6


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of that dtype, the best of some: what the device does where nothing is in its way."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best = math.inf
    for _ in range(10 if device == "cuda" else 4):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


class Count(TorchDispatchMode):
    """Counts the operations that reach a device's kernels, those of the network apart, and the reads of a value (`.item()`, `if x > 0`)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.network = self.reads = 0
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "fastdiff":
            # One operation to the dispatcher, but on the CPU its body is many, and they are what costs.
            with self:
                return getattr(reference, func._schema.name.split("::")[1])(*args, **(kwargs or {}))
        self.operations += 1
        self.network += self.inside
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def tell(self, where: str) -> None:
        self.inside = where == "in"


def operations(peer: Peer, n: int, guided: bool = False) -> dict[str, float]:
    """Operations and reads of a further step on the CPU, for n images. {} for compiled code, where PyTorch dispatches none."""
    if peer.sampler is not None:
        return {} if peer.sampler.compile else _own_operations(peer, n, guided)
    if "torch.compile" in peer.about:
        return {}
    counts = []
    for steps in (FEW, MORE):
        counter = Count()
        peer.listeners.append(counter.tell)
        try:
            with counter:
                peer.run(min(n, 2), steps)  # as many operations as for n
        finally:
            peer.listeners.remove(counter.tell)
        counts.append((counter.operations, counter.network, counter.reads))
    total, network, reads = ((b - a) / (MORE - FEW) for a, b in zip(*counts, strict=True))
    return {"ops_per_step": total, "network_ops_per_step": network, "syncs_per_step": reads}


def _own_operations(peer: Peer, n: int, guided: bool) -> dict[str, float]:
    """The second row, counted on this thread, times the micro-batches: a sampler's own threads are out of a counter's sight."""
    loop = own_loop(peer, n, guided)
    counter, call = Count(), loop.engine.network.call

    def watched(*given: Tensor) -> Any:
        counter.tell("in")
        made = call(*given)
        counter.tell("out")
        return made

    with torch.no_grad():
        loop.advance(guided, 1)
        loop.engine.network.call = watched
        try:
            with counter:
                loop.advance(guided, 1)
        finally:
            loop.engine.network.call = call
    batches = math.ceil(n / loop.size)
    return {
        "ops_per_step": counter.operations * batches,
        "network_ops_per_step": counter.network * batches,
        "syncs_per_step": counter.reads * batches,
    }


def own_loop(peer: Peer, n: int, guided: bool) -> Loop:
    """The buffers and graphs that a call for n images takes, at their first row."""
    sampler = peer.sampler
    assert sampler is not None
    sampler.warmup(guided, n=n)
    loop: Loop = next(reversed(sampler._engines.values())).loops[0]
    loop.row.zero_()
    return loop


def kernels(run: Callable[[], object], steps: int) -> dict[str, float]:
    """Kernels and waits for the GPU a step, over one call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in seen)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    launched = sum(
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
        for event in profiler.events()
    )
    return {"kernels_per_step": round(launched / steps, 2), "syncs_per_step": round(waits / steps, 3)}


def host_time(peer: Peer, n: int, steps: int, guided: bool = False) -> float:
    """Microseconds that the host is busy with a further step, not waiting for the GPU, of a peer that does not wait in every step."""
    if peer.sampler is not None:
        loop = own_loop(peer, n, guided)
        with torch.no_grad():
            return _host(lambda: (loop.row.zero_(), loop.advance(guided, steps))) / steps
    few, more = (_host(lambda s=s: peer.run(n, s)) for s in (FEW, MORE))
    return (more - few) / (MORE - FEW)


def _host(run: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        found.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return median(found)


def reserved(run: Callable[[], object]) -> tuple[float, float]:
    """MiB of GPU memory that a call takes on top of what there is: at its peak, and what it keeps. Reserved, so with what CUDA graphs hold."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    return (peak - before) / 2**20, (torch.cuda.memory_reserved() - before) / 2**20


def measured(peer: Peer, task: Task, n: int) -> dict[str, float]:
    """The gauges of a peer that has run before: for a CPU and for a GPU what each can say."""
    guided = task.guidance != 1
    if task.device.type == "cpu":
        return {key: round(value, 2) for key, value in operations(peer, n, guided).items()}
    steps = min(task.steps, 20)  # a profile of 500 steps says no more
    found = kernels(lambda: peer.run(n, steps), steps)
    # Waits of a call, its end for one, are fewer than one a step.
    if found["syncs_per_step"] < 1:
        found["host_us_per_step"] = round(host_time(peer, n, task.steps, guided), 2)
    return found

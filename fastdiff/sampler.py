"""The reverse process: pure noise in, images out, by static buffers, one fused update a row and micro-batches of one fixed shape."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import ops, solvers
from .devices import pick_device
from .noise import column64, counter, signed
from .schedules import Schedule, whole

# Images per model call when micro_batch is "auto". CPU: 64 was as fast as 128 and faster than 16 and 32 on two cores (docs/network.md).
# CUDA: enough to fill the chip; one shape for all, so that images do not depend on how many are asked for.
AUTO_ROWS = {"cpu": 64, "cuda": 1024}

Callback = Callable[[int, Tensor], None]


class _Loop:
    """The buffers of one micro-batch shape and one step over them. Nothing in `step` allocates state, reads the device or branches on it."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        table: solvers.Table,
        size: int,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        conditional: bool,
        guided: bool,
    ) -> None:
        self.model, self.size, self.guided = model, size, guided
        rows = 2 * size if guided else size
        self.x = torch.zeros(size, *shape, device=device)
        self.x0 = torch.zeros_like(self.x)
        self.model_input = torch.zeros(rows, *shape, device=device, dtype=dtype)
        self.labels = torch.zeros(rows, device=device, dtype=torch.int64) if conditional else None
        self.seeds = torch.zeros(size, device=device, dtype=torch.int64)
        self.ids = torch.zeros(size, device=device, dtype=torch.int64)
        self.guidance = torch.ones(size, device=device)
        self.row = torch.zeros(1, device=device, dtype=torch.int64)
        self.start = counter("start", 0, device)
        self.table, self.timesteps = table.tensors(device)
        self.scale = table.start
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, seeds: Tensor, ids: Tensor, labels: Tensor | None, guidance: Tensor, null: int) -> None:
        """Start samples: x_T from the noise stream. Fewer than `size` are filled up with the last one."""
        pad = torch.arange(self.size, device=self.x.device).clamp(max=len(ids) - 1)
        self.seeds.copy_(seeds[pad])
        self.ids.copy_(ids[pad])
        self.guidance.copy_(guidance[pad])
        if self.labels is not None and labels is not None:
            self.labels[: self.size].copy_(labels[pad])
            self.labels[self.size :].fill_(null)
        self.row.zero_()
        self.x.copy_(self.scale * ops.normal(self.seeds, self.ids, self.start, self.x[0].numel()).reshape(self.x.shape))
        self.model_input.copy_(self.x.repeat(2 if self.guided else 1, *[1] * (self.x.ndim - 1)))

    def step(self) -> None:
        t = self.timesteps[self.row].expand(len(self.model_input))
        m = self.model(self.model_input, t) if self.labels is None else self.model(self.model_input, t, self.labels)
        if m.shape != self.model_input.shape:
            raise ValueError(f"the network made {list(m.shape)} of {list(self.model_input.shape)}; it must keep the shape")
        ops.solver_step(self.x, self.x0, m.contiguous(), self.model_input, self.table, self.row, self.seeds, self.ids, self.guidance)
        self.row.add_(1)

    def capture(self) -> None:
        """Record `step` as a CUDA graph, so that a row costs the host one launch. All that it reads and writes are the buffers above."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.row.zero_()
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.row.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def advance(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()


class Sampler:
    """Samples from any network called `model(x, t)` or `model(x, t, labels)`; see `__call__`.

    model: a torch.nn.Module; x is [rows, *shape] in `dtype`, t int64 [rows], labels int64 [rows] with `num_classes` as the null class.
    prediction: what it returns, "epsilon", "v" or "x0". solver, steps and `options` (spacing, eta, variance): see `fastdiff.solvers`.
    clip: x_0 is clamped to [-clip, clip], None for not. device, dtype: default where the model's parameters are, and fp32 on the CPU, bf16 on
    CUDA; where they differ from the model's own, a copy is sampled from, of the weights as they are now. compile: "auto" compiles on CUDA and
    runs eagerly on the CPU. micro_batch: images worked on at a time, "auto" for the device's best. All work is done in micro-batches of this
    one shape, the last one filled up, so an image depends on its seed and id, not on how many are made with it. On the CPU each core runs its
    own micro-batches on one thread, so it does not depend on the number of threads either.

    ValueError for whatever does not fit, in one line that says what would.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        shape: Sequence[int] = (3, 16, 16),
        prediction: str = "epsilon",
        solver: str = "ddim",
        steps: int = 20,
        num_classes: int | None = None,
        clip: float | None = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | str = "auto",
        micro_batch: int | str = "auto",
        **options: Any,
    ) -> None:
        own = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
        self.device = pick_device(own.device if device is None else device)
        self.dtype = (torch.bfloat16 if self.device.type == "cuda" else torch.float32) if dtype is None else dtype
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16")
        if micro_batch != "auto" and (not whole(micro_batch) or int(micro_batch) < 1):
            raise ValueError(f'micro_batch is {micro_batch!r}; give a whole number of at least 1, or "auto"')
        if compile not in (True, False, "auto"):
            raise ValueError(f'compile is {compile!r}; give True, False or "auto"')
        self.table = solvers.table(solver, schedule, steps=steps, prediction=prediction, clip=clip, **options)
        self.shape, self.num_classes, self.micro_batch = tuple(shape), num_classes, micro_batch
        self.compile = self.device.type == "cuda" if compile == "auto" else bool(compile)
        floats = {p.dtype for p in model.parameters()}  # buffers alone may have their reasons
        if own.device != self.device or not floats <= {self.dtype}:
            model = copy.deepcopy(model).to(self.device, self.dtype)
        self.model = model
        self._call: Callable[..., Tensor] = _compiled(model) if self.compile else model
        self._loops: dict[tuple[int, bool], list[_Loop]] = {}

    @property
    def steps(self) -> int:
        """Network evaluations per image (twice as many images each, with guidance)."""
        return len(self.table)

    def size(self, guided: bool) -> int:
        """Images per micro-batch."""
        if self.micro_batch != "auto":
            return int(self.micro_batch)
        return AUTO_ROWS.get(self.device.type, 64) // (2 if guided else 1)

    def warmup(self, guided: bool = False, workers: int = 1) -> float:
        """Build what the first call would: buffers, compiled code, the CUDA graph. Returns the seconds it took."""
        began = time.perf_counter()
        # The limit is a setting of the process, so it is lifted here, before there are worker threads, and not around their calls.
        with _evaluating(self.model), _room_to_compile() if self.compile else contextlib.nullcontext():
            self._build(guided, workers)
        return time.perf_counter() - began

    def _build(self, guided: bool, workers: int) -> None:
        loops = self._loops.setdefault((self.size(guided), guided), [])
        while len(loops) < workers:
            loop = _Loop(
                self._call, self.table, self.size(guided), self.shape, self.device, self.dtype, self.num_classes is not None, guided
            )
            if self.device.type == "cuda":
                with torch.cuda.device(self.device), torch.inference_mode():
                    loop.capture()
                    torch.cuda.synchronize()
            elif self.compile and not loops:
                with torch.inference_mode(), _one_thread():
                    loop.step()
            loops.append(loop)

    def __call__(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        seeds: Sequence[int] | Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """n images, fp32 [n, *shape], in [-1, 1] where x_0 is clamped to that.

        Image i is sample `first + i` of `seed`, or, with seeds, sample 0 of seeds[i]. labels: a class, or one per image; None for the null
        class. guidance: w of classifier-free guidance (Ho & Salimans 2022) as m_u + w (m_c - m_u), one number or one per image: 1 is none, and
        costs one evaluation rather than two. callback(row, x0): after every row of every micro-batch, with its current guess of x_0, fp32
        [up to micro_batch, *shape], a buffer that the next row overwrites. progress: a bar with the time left.

        ValueError for arguments that do not fit, and for a network whose result is not finite (the sample is named).
        """
        if not whole(n) or n < 0:
            raise ValueError(f"the number of images is {n!r}; give a whole number of at least 0")
        seed_column, ids = self._samples(n, seed, first, seeds)
        label_column = self._labels(n, labels)
        weights = _tensor(guidance, "guidance").float()
        if weights.shape not in ((), (n,)) or not weights.isfinite().all():
            raise ValueError(f"guidance must be one finite number, or one per image, [{n}]")
        weights = weights.expand(n).contiguous()
        guided = bool((weights != 1).any())
        if guided and (self.num_classes is None or labels is None):
            raise ValueError("guidance needs labels, and a network with classes and a null class (num_classes)")

        size = self.size(guided)
        starts = range(0, n, size)
        threads = min(torch.get_num_threads(), len(starts)) if self.device.type == "cpu" and callback is None else 1
        self.warmup(guided, threads)
        loops = self._loops[size, guided]
        out = torch.empty(n, *self.shape, device=self.device)
        seed_column, ids, weights = seed_column.to(self.device), ids.to(self.device), weights.to(self.device)
        label_column = None if label_column is None else label_column.to(self.device)
        bar = tqdm(total=len(starts) * self.steps, unit="step", disable=not progress, leave=False, smoothing=0.1, **calm_bar())
        null = self.num_classes or 0

        def work(loop: _Loop, start: int) -> Iterator[None]:
            stop = min(start + size, n)
            label_part = None if label_column is None else label_column[start:stop]
            loop.begin(seed_column[start:stop], ids[start:stop], label_part, weights[start:stop], null)
            for row in range(self.steps):
                loop.advance()
                if callback is not None:
                    callback(row, loop.x0[: stop - start])
                if loop.graph is None:
                    bar.update()
                yield
            images = loop.x[: stop - start]
            finite = images.isfinite().flatten(1).all(1)
            if not finite.all():
                raise ValueError(f"the network gave numbers that are not finite for sample {first + start + int(finite.int().argmin())}")
            out[start:stop].copy_(images)
            if loop.graph is not None:  # rows are only enqueued above; the check has waited for them
                bar.update(self.steps)

        with bar, _evaluating(self.model):
            if self.device.type == "cuda":
                with torch.cuda.device(self.device), torch.inference_mode():
                    for start in starts:
                        collections.deque(work(loops[0], start), maxlen=0)
            else:
                _share(starts, [functools.partial(work, loop) for loop in loops[:threads]])
        return out

    def _samples(self, n: int, seed: int, first: int, seeds: Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor]:
        if seeds is None:
            if not whole(seed) or not whole(first):
                raise ValueError(f"seed is {seed!r} and first is {first!r}; give whole numbers")
            return column64(seed, n), torch.arange(n) + signed(int(first))
        column = column64(seeds, n)
        if whole(seeds) or column.shape != (n,):
            raise ValueError(f"seeds has shape {list(column.shape)} for {n} images; give one seed per image")
        if seed != 0 or first != 0:
            raise ValueError("give either seeds, one per image, or seed and first")
        return column, torch.zeros(n, dtype=torch.int64)

    def _labels(self, n: int, labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given, but this network has no classes (num_classes is None)")
            return None
        column = _tensor(self.num_classes if labels is None else labels, "labels")
        if column.is_floating_point() or column.shape not in ((), (n,)):
            raise ValueError(f"labels must be one class number, or one per image, [{n}]")
        if n and not 0 <= int(column.min()) <= int(column.max()) <= self.num_classes:
            raise ValueError(f"labels must lie in 0 .. {self.num_classes - 1} (or be {self.num_classes}, the null class)")
        return column.to(torch.int64).expand(n).contiguous()


def _compiled(model: nn.Module) -> Callable[..., Tensor]:
    from torch._inductor import config  # slow to import, and only needed here

    # Not "reduce-overhead": its outputs are overwritten by the next run, and x feeds back. The whole step is captured here instead.
    # Not "max-autotune": it picks kernels, and so the order of sums, by timing, and another day's images would have other bits.
    options: dict[str, Any] = {}
    if hasattr(config, "deterministic"):
        options["deterministic"] = True
    if hasattr(config, "loop_reindexing_after_fusion"):
        options["loop_reindexing_after_fusion"] = False  # on, it makes upsample + convolution up to 6 times slower (pytorch issue 189488)
    compiled: Callable[..., Tensor] = torch.compile(model, options=options, dynamic=False)
    return compiled


@contextlib.contextmanager
def _room_to_compile() -> Iterator[None]:
    """All networks of a class share one cache of compiled code, and past its limit they would run eagerly without a word."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        yield


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {values!r}; give a number, or one per image") from None


def calm_bar() -> dict[str, float]:
    """Settings of a progress bar: in a log file, where each new state stays, one in two seconds is enough."""
    return {} if sys.stderr.isatty() else {"mininterval": 2.0}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """This thread's operations on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share(starts: Sequence[int], workers: Sequence[Callable[[int], Iterator[None]]]) -> None:
    """Let each worker, on a thread and a core of its own, take starts until none are left. An error or Ctrl-C stops all after their row."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in starts:
        todo.put(start)
    stop, errors = threading.Event(), []

    def loop(work: Callable[[int], Iterator[None]]) -> None:
        try:
            with torch.inference_mode(), _one_thread(), contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    for _ in work(todo.get_nowait()):
                        if stop.is_set():
                            return
        except BaseException as e:
            errors.append(e)
            stop.set()

    threads = [threading.Thread(target=loop, args=(work,), daemon=True) for work in workers]
    before = torch.get_num_threads()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        # One thread a worker is a setting of the process, too: threads started from now on would take it over.
        torch.set_num_threads(before)
    if errors:
        raise errors[0]

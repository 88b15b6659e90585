"""The reverse process: pure noise in, images out, in micro-batches of one fixed shape."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import hashlib
import itertools
import math
import queue
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import cpu, fused, native, noise, ops, rewrite, solvers, tuned, ways
from .devices import out_of_memory, pick_device
from .loop import BUILDING, CHUNK, Engine, Guide, Kind, Loop, Network, State
from .noise import column64, signed
from .progress import calm_bar
from .schedules import Schedule, whole
from .unet import UNet
from .unet2d import adopted

__all__ = ["Sampler", "State", "Trajectory"]

# Rows of one network call when micro_batch is "auto". CPU: 128 were some percent faster than 64 (docs/network.md).
# CUDA: enough to fill the chip; one shape for all, so that images do not depend on how many are asked for.
AUTO_ROWS = {"cpu": 128, "cuda": 1024}
# Fewer rows, so that few images occupy all cores, and fill none up: only where the network gives the same bits (see `_gives_same`).
FEWER_ROWS = (64, 32, 16, 8, 4, 2, 1)
# Of a network that does not even for so many, this is the one shape: few images fill it on all cores.
SPREAD_ROWS = 32
# A call of the network takes a core as long as this many rows more would, of which some are done by all of its cores together, as is a part of each
# row; and, since all calls read the weights from the same memory, no less than so many for each of them.
CALL_ROWS, CALL_SHARED, ROW_SHARED, CORE_ROWS = 12, 10, 0.3, 6
# The first and the last of them where tiles multiply: a row takes half the time, and calls at the same time wait for one another's Python.
TILED_CALL_ROWS, TILED_CORE_ROWS = 6, 11
# Compiled code is made for one shape only, so it is one that suits few images and many.
COMPILED_ROWS = 32
# Images that the scales of fp8 are taken from: a few of every class, over the whole of the solver's walk.
CALIBRATED = 64
# Kinds of loops that are kept. Each holds its buffers, and on CUDA its graphs; the least recently used goes.
KEPT = 4
MAX_ROWS = 1 << 20  # of a micro-batch

Callback = Callable[[int, Tensor], None]
# After a row: row, first image, the one after the last, and the loop that they are in.
Watch = Callable[[int, int, int, Loop], None]
# The noise of a row, [n, *shape], or None for none.
Noise = Callable[[int], Tensor | None]
# A progress bar of so many steps.
Bar = Callable[[int], Any]
T = TypeVar("T")


class Trajectory(NamedTuple):
    """Images with what they were on the way. images: fp32 [N, *shape]. rows: the rows asked for. x, x0: fp32 [F, N, *shape], the state after each of
    those rows and the guess of x_0 in it; on the CPU."""

    images: Tensor
    rows: tuple[int, ...]
    x: Tensor
    x0: Tensor


class _Job(NamedTuple):
    """The arguments of one call, checked, and as columns on the device."""

    n: int
    table: solvers.Table
    kind: Kind
    guided_rows: tuple[bool, ...]
    columns: dict[str, Tensor]
    noisy: bool
    names: Callable[[int], str]
    watch: Watch | None
    alone: bool
    noise: Noise | None
    guide: Guide | None


class Sampler:
    """Samples from any network called `model(x, t)` or `model(x, t, labels)`; see `__call__`.

    model: a torch.nn.Module; x is [rows, *shape] in `dtype`, t [rows], labels int64 [rows] with `num_classes` as the null class. t is int64, or
    fp32 where the solver looks between timesteps. It returns a tensor of x's shape (or of twice its channels, with a learned variance), or
    something with that in `.sample`. diffusers' UNet2DModel is run as a fastdiff network of the same parameters (`unet2d.adopted`). prediction: what it
    returns, "epsilon", "v", "x0", "flow" or "edm". solver, steps and `options` (spacing,
    eta, variance, ...): see `fastdiff.solvers`; a `solvers.Table` as solver is taken as it is. clip: x_0 is clamped to [-clip, clip], None for
    not. threshold: dynamic thresholding at that quantile (0.995, say) instead; it sorts every image in every row, outside the fused update.
    device, dtype: default where the model's parameters are, and fp32 on the CPU, bf16 on CUDA; where they differ from the model's own, a copy
    is sampled from, of the weights as they are now. On a CPU with tiles (AMX) bf16 is what fastdiff's own networks multiply in convolutions, and all
    else is fp32: the fastest there. "fp8" is bf16 (on a CPU fp32) in which residual blocks convolve e4m3 numbers, of fixed scales that
    come from a first sampling: for GPUs of compute capability 9 or 10; on a CPU it shows what images come out. compile: how the network runs,
    True compiled, False eagerly, "fused" by fastdiff's own kernels (`fastdiff.fused`: a `fastdiff.UNet`; on a CPU by their definition, which is not
    fast); "auto" takes what `measure` has found to be the fastest here, else compiles on CUDA and runs eagerly on the CPU. Compiled code for the CPU
    has the weights built in, as they were at the first call. micro_batch: images
    worked on at a time, "auto" for the device's best, halved when memory runs out. All work is done in micro-batches of one shape, the last one
    filled up, so an image depends on its seed and id, not on how many are made with it. On the CPU each core runs its own micro-batches on one
    thread, so it does not depend on the number of threads either.

    A Sampler may be used from several threads: calls wait for one another. Samplers of their own run at the same time.

    ValueError for whatever does not fit, in one line that says what would.
    """

    _tiled = False  # whether the network's convolutions are those of `cpu.TiledConv2d`

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        shape: Sequence[int] = (3, 16, 16),
        prediction: str = "epsilon",
        solver: str | solvers.Table = "ddim",
        steps: int = 20,
        num_classes: int | None = None,
        clip: float | None = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        compile: bool | str = "auto",
        micro_batch: int | str = "auto",
        threshold: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(schedule, Schedule):
            raise ValueError(
                f"a Sampler takes a torch.nn.Module and a fastdiff.Schedule, not {type(model).__name__} and {type(schedule).__name__}"
            )
        if num_classes is not None and (not whole(num_classes) or int(num_classes) < 1):
            raise ValueError(f"num_classes is {num_classes!r}; give a whole number of at least 1, or None")
        if isinstance(shape, str) or not isinstance(shape, Iterable) or not all(whole(side) and int(side) > 0 for side in shape):
            raise ValueError(f"shape is {shape!r}; give that of an image, such as (3, 16, 16)")
        if misplaced := {"strength", "invert"} & options.keys():
            what = {"strength": "a call's, with x_start", "invert": "encode's"}
            raise ValueError("; ".join(f"{name} is {what[name]}, not the sampler's" for name in sorted(misplaced)))
        own = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
        self.device = pick_device(own.device if device is None else device)
        self.fp8 = dtype == "fp8"
        if dtype is None or self.fp8:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f'dtype is {dtype!r}; give torch.float32, torch.bfloat16, torch.float16 or "fp8"')
        # What tensors are: where a CPU multiplies bf16 by tiles, all but the factors of convolutions is fp32.
        self.dtype, self._tensors = dtype, dtype
        if micro_batch != "auto" and (not whole(micro_batch) or not 1 <= int(micro_batch) <= MAX_ROWS):
            raise ValueError(f'micro_batch is {micro_batch!r}; give a whole number from 1 to {MAX_ROWS}, or "auto"')
        if compile not in (True, False, "auto", "fused"):
            raise ValueError(f'compile is {compile!r}; give True, False, "fused" or "auto"')
        if self.fp8:
            self._check_fp8(compile)
            compile = "fused"
        if compile == "fused" and not isinstance(model, UNet):
            raise ValueError(f'compile="fused" runs a fastdiff.UNet; for {type(model).__name__} see fastdiff.accelerate')
        if compile == "fused" and not fused.fits(model):
            raise ValueError(
                'compile="fused" does not heed hooks, nor a forward or body of one\'s own, which this network has; give compile=False'
            )
        if threshold is not None and not (_real(threshold) and 0 < threshold <= 1):
            raise ValueError(f"threshold is {threshold!r}; give a quantile above 0 and at most 1, such as 0.995, or None")
        self.schedule, self.solver, self.options, self.threshold = schedule, solver, options, threshold
        self._always = {"prediction": prediction, "clip": None if threshold is not None else clip}
        self._steps = steps
        self.table = self._table()
        self.shape, self.num_classes, self.micro_batch = tuple(shape), num_classes, micro_batch
        self._tiled = (
            self.device.type == "cpu" and dtype == torch.bfloat16 and compile in (False, "auto") and not rewrite.accelerated(model)
            and cpu.known(adopted(model, num_classes)) and native.has_tiles()
        )  # fmt: skip
        if self._tiled:
            self._tensors = torch.float32
        floats = {p.dtype for p in model.parameters()}  # buffers alone may have their reasons
        if own.device != self.device or not floats <= {self._tensors}:
            own_copy = copy.deepcopy(model).to(self.device, self._tensors)
            model = rewrite.accelerate(own_copy) if rewrite.accelerated(model) else own_copy
        self.model = model
        self._asked = compile
        self._run_by({True: "compiled", False: "eager", "auto": self._recalled()}.get(compile, "fused"))
        self._network: Network | None = None
        self._engines: collections.OrderedDict[Kind, Engine] = collections.OrderedDict()
        self._same: dict[int, bool] = {}  # of numbers of rows, whether they give the same bits
        self._untold: Any = None  # the stamp of weights that did not tell, where all images were alike
        self._room = sys.maxsize  # rows of a network call that there is memory for
        self._lock = threading.Lock()
        self._inside: set[int] = set()  # threads that work on a call

    @property
    def steps(self) -> int:
        """Network evaluations per image (twice as many images each, with guidance)."""
        return len(self.table)

    @property
    def way(self) -> str:
        """How the network runs: "eager", "compiled", "fused" or "fused, fp8", and on CUDA whether out of a CUDA graph, where it could be captured."""
        captured = self.device.type == "cuda" and all(engine.capture for kind, engine in self._engines.items() if not kind.guide)
        return self._way + ", fp8" * self.fp8 + ", captured" * captured

    def _run_by(self, way: str) -> None:
        self._way, self.compile = way, way == "compiled"

    def _check_fp8(self, compile: bool | str) -> None:
        if compile not in ("auto", "fused"):
            raise ValueError(f'dtype="fp8" is computed by fastdiff\'s own kernels; give compile="fused", or leave it out, not {compile!r}')
        if self.device.type == "cuda" and not ops.has_kernels(self.device):
            name = torch.cuda.get_device_name(self.device)
            raise ValueError(
                f'dtype="fp8" needs a GPU of compute capability 9 or 10 (H100, H200, B200), which {name} is not; give torch.bfloat16'
            )

    def _table(self, solver: str | solvers.Table | None = None, steps: int | None = None, **options: Any) -> solvers.Table:
        """The rows for a solver and steps of one call, by default the sampler's own, with its options where the solver is its own."""
        chosen = self.solver if solver is None else solver
        if isinstance(chosen, solvers.Table):
            if steps is not None or any(name != "strength" or value != 1 for name, value in options.items()):
                raise ValueError("solver is a table of rows, which has its steps and options already; give none, or a solver by its name")
            if (row := chosen.severed()) is not None:
                raise ValueError(
                    f"row {row} of the table looks back on a row before it that there is not; rows of {chosen.solver} go together"
                )
            return chosen
        own = self.options if solver in (None, self.solver) else {}
        if steps is not None or "spacing" in options:
            own = {name: value for name, value in own.items() if name != "timesteps"}
        if "timesteps" in options:
            own = {name: value for name, value in own.items() if name != "spacing"}
        options = {**self._always, **own, **options}
        if "timesteps" not in options:
            options["steps"] = self._steps if steps is None else steps
        return solvers.table(chosen, self.schedule, **options)

    def size(self, guided: bool, n: int | None = None, mixed: bool = False) -> int:
        """Images per micro-batch, for n images, or for many. mixed: guided in some rows only, so that the network is called with half as many, too."""
        halves = 2 if guided else 1
        rows = self._rows(n, halves, mixed)
        return max(min(rows // halves, self._room // halves), 1)  # trying may have found that there is less room

    def _rows(self, n: int | None, halves: int, mixed: bool) -> int:
        """Rows of a network call, for n images of so many rows each."""
        if self.micro_batch != "auto":
            return int(self.micro_batch) * halves
        if self.device.type != "cpu":
            return AUTO_ROWS[self.device.type]
        if self.compile:
            return COMPILED_ROWS
        if not self._gives_same(SPREAD_ROWS):
            return SPREAD_ROWS
        most, threads = self._most(), _threads()
        if n is None or n * halves >= 2 * threads * most:
            return most

        for rows in by_cost(n * halves, most, threads, self._take_network().shared, self._tiled):
            if rows >= halves and all(self._gives_same(called) for called in ((rows, rows // 2, most // 2) if mixed else (rows,))):
                return rows
        return most

    def _most(self) -> int:
        return min(AUTO_ROWS["cpu"], self._room)

    def _gives_same(self, rows: int) -> bool:
        """Whether a network call of so many rows gives the bits of one of the most, by trying: for another shape a library may sum in another order."""
        while (most := self._most()) not in self._same or (rows < most and rows not in self._same):
            x = noise.normal(0, range(most), 0, self.shape, stream="draw").to(self._tensors)
            labels = None if self.num_classes is None else torch.arange(most, device="cpu") % self.num_classes  # there may be no null class
            t, network = self.table.tensors("cpu")[1][:1], self._take_network()

            def call(
                start: int, stop: int, x: Tensor = x, t: Tensor = t, labels: Tensor | None = labels, network: Network = network
            ) -> Any:
                return network.answer(x[start:stop], t.expand(stop - start), None if labels is None else labels[start:stop])

            try:
                with torch.no_grad(), _evaluating(self.model), _one_thread():
                    network.refresh()
                    full = call(0, most)
                    fits = isinstance(full, Tensor) and full.device == self.device and full.shape[:1] == (most,)
                    places = range(0, most - rows + 1, max(rows, most // 4))
                    if fits and (torch.equal(full, full[:1].expand_as(full)) or not full.isfinite().all()):
                        self._untold = network.stamp  # a last layer of zeros, as networks begin with, says nothing of what comes before it
                    self._same |= {rows: fits and all(torch.equal(call(i, i + rows), full[i : i + rows]) for i in places), most: True}
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
                if most == 1 or not out_of_memory(e):
                    raise
                self._room = most // 2
                self._same.clear()
        return self._same[rows] if rows <= most else False

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """One call at a time; without gradients, but with tensors that can be written to after the caller's inference mode; without the caller's
        autocast, which threads that are started here would not have; on a CPU on one core."""
        if threading.get_ident() in self._inside:
            raise ValueError("this Sampler is in the middle of a call; what it calls itself, a callback, say, needs a Sampler of its own")
        place = _one_thread() if self.device.type == "cpu" else contextlib.nullcontext()
        kind = self.device.type
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        with self._lock, self._within(), torch.inference_mode(False), torch.no_grad(), plain, place:
            yield

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        """This thread works on a call."""
        before = {threading.get_ident()} - self._inside  # or it goes on with the call that it was in
        self._inside |= before
        try:
            yield
        finally:
            self._inside -= before

    def warmup(self, guided: bool = False, workers: int = 1, n: int | None = None) -> float:
        """Build what the first call would: buffers, compiled code, CUDA graphs. n: for that many images. Returns the seconds it took."""
        began = time.perf_counter()
        with self._working():
            self._with_room(lambda size: self._ready(guided, size, workers), guided, n)
        return time.perf_counter() - began

    def _ready(self, guided: bool, size: int, workers: int = 1) -> Engine:
        """The engine of the sampler's own solver, for micro-batches of so many images."""
        kind = self._kind(self.table, guided, size, threshold=self.threshold)
        return self._build(kind, self.table, (guided,) * len(self.table), workers)

    def _follow(self) -> None:
        """Take up what has changed of the network since the last call."""
        if self._network is None:
            return
        with BUILDING, torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            anew = self._network.refresh()
        if anew or (self._untold is not None and self._network.stamp != self._untold):
            self._untold = None
            self._same.clear()

    def _with_room(self, work: Callable[[int], T], guided: bool, n: int | None, mixed: bool = False) -> T:
        """What `work` makes, given how many images a micro-batch has: half as many when memory runs out, and again, down to one."""
        self._follow()
        while True:
            size = self.size(guided, n, mixed)
            try:
                return work(size)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
                if size == 1 or not out_of_memory(e):
                    raise
            # Here, where the error holds on to nothing any more.
            self._room = size * (2 if guided else 1) // 2
            self._drop(0)
            warnings.warn(f"out of memory with {size} images at a time; going on with {size // 2}", stacklevel=4)

    def fingerprint(self, guided: bool = False, n: int | None = None) -> str:
        """16 hexadecimal digits of what comes out of one row, of a few samples: equal where the network, the way it runs and the machine's arithmetic
        give the same bits, so that images made in both places are of one kind.

        n: as for `warmup`. Libraries choose by the model of the processor, by their version and by environment variables in what order to sum.
        """

        def row(size: int) -> str:
            (loop, *_) = self._ready(guided, size).loops
            ids = torch.arange(size, device=self.device)
            labels = None if self.num_classes is None else ids % self.num_classes
            weights = torch.full((size,), 2.0 if guided else 1.0, device=self.device, dtype=torch.float32)
            with _evaluating(self.model), _one_thread() if self.device.type == "cpu" else torch.cuda.device(self.device):
                loop.begin(torch.zeros_like(ids), ids, labels, weights)
                loop.advance(guided, 1)
            # Of one image, which the smallest of the micro-batches that give the same bits has, too.
            return hashlib.sha256(loop.x[:1].cpu().numpy().tobytes()).hexdigest()[:16]

        with self._working():
            return self._with_room(row, guided, n)

    def measure(self, guided: bool = False, rounds: int = 5) -> dict[str, float]:
        """Milliseconds of one row, for each way the network can run here: "eager", "compiled", and of a UNet on CUDA "fused". Median of `rounds`,
        interleaved.

        What is fastest is remembered for this kind of network, number of rows, device and version of torch, in a file of the user's cache
        ($FASTDIFF_CACHE), where `compile="auto"` looks it up. Compiling takes from seconds to minutes, the first time.
        """
        found: dict[str, list[float]] = {}
        with self._working(), contextlib.ExitStack() as stack:
            runs: dict[str, Callable[[], None]] = {}
            own = fused.fits(self.model) and self.device.type == "cuda"
            accelerated = rewrite.accelerated(self.model)
            ways_here = ["eager"] if accelerated or self._tiled else ["eager", "compiled", *(["fused"] if own else [])]
            for way in ways_here:
                other = Sampler(
                    self.model, self.schedule, self.shape, num_classes=self.num_classes, device=self.device, dtype=self.dtype,
                    compile={"eager": False, "compiled": True}.get(way, way), micro_batch=self.measured(guided),
                    **{**self._always, **self._settings()},
                )  # fmt: skip
                stack.callback(other._drop, 0)
                try:
                    other._ready(guided, other.size(guided))
                except Exception as e:
                    if way == "eager":
                        raise
                    what = {"compiled": "be compiled", "fused": "run by fastdiff's kernels"}[way]
                    warnings.warn(f"the network cannot {what} here: {(str(e).splitlines() or [type(e).__name__])[0]}", stacklevel=2)
                    continue
                runs[way] = functools.partial(other._time, guided)
            for _ in range(rounds):
                for way, run in (*runs.items(), *reversed(runs.items())):
                    began = time.perf_counter()
                    run()
                    found.setdefault(way, []).append((time.perf_counter() - began) * 1e3)
        result = {way: sorted(times)[len(times) // 2] for way, times in found.items()}
        ways.remember(self._key(), result)
        best = min(result, key=result.__getitem__)
        if self._asked == "auto" and not self.fp8 and best != self._way:
            self._run_by(best)
            self._network, self._same = None, {}
            self._drop(0)
        return result

    def _settings(self) -> dict[str, Any]:
        return {"solver": self.solver, "steps": self._steps, "threshold": self.threshold, **self.options}

    def _time(self, guided: bool) -> None:
        """One row of one micro-batch, on one thread of a CPU."""
        ((_, engine),) = self._engines.items()
        loop = engine.loops[0]
        loop.row.zero_()
        with _evaluating(self.model), _one_thread() if self.device.type == "cpu" else torch.cuda.device(self.device):
            loop.advance(guided, 1)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    def measured(self, guided: bool = False) -> int:
        """Images of the micro-batch that `measure` times."""
        if self.micro_batch != "auto":
            return int(self.micro_batch)
        rows = COMPILED_ROWS if self.device.type == "cpu" else AUTO_ROWS[self.device.type]
        return rows // 2 if guided else rows

    def _key(self) -> str:
        return ways.key(self.model, self.device, self.dtype, self.measured())

    def _recalled(self) -> str:
        if self._tiled or rewrite.accelerated(self.model):
            return "eager"  # it compiles itself, and within another compilation would be as it was before
        fusible = fused.fits(self.model)
        found = {way: ms for way, ms in ways.recall(self._key()).items() if way != "fused" or fusible}
        if found:
            return min(found, key=found.__getitem__)
        if self.device.type != "cuda":
            return "eager"
        shipped = tuned.table().get(torch.cuda.get_device_name(self.device), {})
        way = shipped.get(f"network {ways.digest(self.model)} {str(self.dtype).removeprefix('torch.')}", "compiled")
        return way if way != "fused" or fusible else "compiled"

    def _take_network(self) -> Network:
        if self._network is None:
            compiler = functools.partial(_compiled, cuda=self.device.type == "cuda") if self.compile else None
            # Compiled for a CPU the weights are constants, so all that depends on them must be of the same moment.
            frozen = self.compile and self.device.type == "cpu"
            model = copy.deepcopy(self.model).eval() if frozen else self.model
            if self._way == "fused":
                model = self._fused()
            self._network = Network(model, self.num_classes, compiler, self._tiled)
        return self._network

    def _fused(self) -> fused.FusedUNet:
        """The model by fastdiff's kernels. Says which convolutions they do not cover."""
        assert isinstance(self.model, UNet)
        made = fused.FusedUNet(self.model)
        if self.fp8:
            made = fused.calibrate(made, self._walk)
        if missing := made.uncovered():
            name, reason = next(iter(missing.items()))
            number = f"{len(missing)} of {len(made.convolutions())} convolutions"
            warnings.warn(f"{number} run by PyTorch's own operations: {name}, for one, has {reason}", stacklevel=3)
        return made

    def _walk(self, model: nn.Module) -> None:
        """Walk some images from noise to their end, eagerly."""
        kind = self._kind(self.table, False, CALIBRATED, threshold=self.threshold)
        with torch.no_grad(), _evaluating(self.model):
            engine = Engine(Network(model, self.num_classes, None), kind, self.shape, self.device, self._tensors, capture=False)
            engine.load(self.table)
            engine.grow(1)
            (loop,) = engine.loops
            ids = torch.arange(CALIBRATED, device=self.device)
            labels = None if self.num_classes is None else ids % (self.num_classes + 1)
            loop.begin(torch.zeros_like(ids), ids, labels, torch.ones(CALIBRATED, device=self.device, dtype=torch.float32))
            loop.advance(False, len(self.table))

    def _kind(
        self,
        table: solvers.Table,
        guided: bool,
        size: int,
        painted: bool = False,
        threshold: float | None = None,
        guide: Guide | None = None,
        given: bool = False,
    ) -> Kind:
        fractional = table.timesteps.dtype.kind == "f"
        capacity = max(64, 1 << (len(table) - 1).bit_length())
        return Kind(size, guided, table.history, fractional, capacity, painted, threshold, guide is not None, given)

    def _build(self, kind: Kind, table: solvers.Table, guided_rows: Sequence[bool], workers: int) -> Engine:
        """The engine of a kind with the table in it, ready to run."""
        # The limit on compilations is a setting of the process, so it is lifted here, before there are worker threads, and not around their calls.
        room = _room_to_compile(freeze=self.device.type == "cpu") if self.compile else contextlib.nullcontext()
        place = torch.cuda.device(self.device) if self.device.type == "cuda" else _one_thread()
        with BUILDING, torch.no_grad(), _evaluating(self.model), room, place:
            fixed = self._way == "fused" or any(engine.capture for engine in self._engines.values())  # to modules, or to where weights lie
            if fixed and self._network is not None and self._network.moved():
                self._network, self._same = None, {}
                self._drop(0)
            if kind not in self._engines:
                self._drop(KEPT - 1)
                self._engines[kind] = Engine(
                    self._take_network(), kind, self.shape, self.device, self._tensors, capture=self.device.type == "cuda"
                )
            self._engines.move_to_end(kind)
            engine = self._engines[kind]
            engine.load(table)
            engine.grow(workers)
            if engine.capture:
                for guided in set(guided_rows):
                    runs = [len(list(run)) for flag, run in itertools.groupby(guided_rows) if flag == guided]
                    for loop in engine.loops:
                        loop.build(guided, max(runs))
                torch.cuda.synchronize()
            elif self.compile:
                for guided in set(guided_rows) - engine.ready:
                    engine.loops[0].row.zero_()
                    engine.loops[0].step(guided)
                    engine.ready.add(guided)
        return engine

    def _drop(self, kept: int) -> None:
        """Let go of all but the kinds used last, and give their memory back."""
        if len(self._engines) > kept:
            while len(self._engines) > kept:
                self._engines.popitem(last=False)[1].close()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def __call__(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        seeds: Sequence[int] | Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Guide | None = None,
        latents: Tensor | None = None,
        x_start: Tensor | None = None,
        strength: float = 1.0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
        progress: bool | Bar = False,
        solver: str | solvers.Table | None = None,
        steps: int | None = None,
        _watch: Callable[[solvers.Table], Watch] | None = None,
        **options: Any,
    ) -> Tensor:
        """n images, fp32 [n, *shape], in [-1, 1] where x_0 is clamped to that.

        Image i is sample `first + i` of `seed`, or, with seeds, sample 0 of seeds[i]. labels: a class, or one per image; None for the null
        class. guidance: w of classifier-free guidance (Ho & Salimans 2022) as m_u + w (m_c - m_u), one number or one per image: 1 is none, and
        costs one evaluation rather than two. guidance_interval: (low, high) of what the network is told as t; outside it guidance is 1, and the
        second evaluation is left out (Kynkaanniemi et al. 2024). guide: a function of `State` that returns x0, fp32 [micro_batch, *shape],
        called in every row; slower, since it runs outside the fused update and no CUDA graph holds it.

        latents: noise to start from instead of the stream's, of unit variance, [n, *shape] (see `encode`, `fastdiff.slerp`). x_start, strength:
        images to start from, [n, *shape] or one of [*shape], noised so far that the last `strength` of the steps remove it (Meng et al. 2022,
        SDEdit). known, mask: images and where they are to be kept, 1 or 0, each [n, *shape] or one of [*shape] (the mask also of one channel):
        that region is noised anew from the stream after each row (Lugmayr et al. 2022, RePaint; `resample=10` walks each step ten times).

        noise: a function of the row that returns its noise, of unit variance, [n, *shape], or None where there is none, in place of the stream's; all
        images then go from row to row together, so their states, not the network's, take memory for all n.

        callback(row, x0): after every row of every micro-batch, with its current guess of x_0, fp32 [up to micro_batch, *shape], a buffer that
        the next row overwrites. progress: a bar with the time left, or a function that makes one of a number of steps. solver, steps,
        options: another solver for this call, without a new capture.

        ValueError for arguments that do not fit, and for a network whose result is not finite (row and sample are named).
        """
        if guide is not None and not callable(guide):
            raise ValueError("guide must be a function of a fastdiff.State that returns x0")
        if not _real(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength is {strength!r}; give a number above 0, and at most 1, all of the steps")
        if x_start is None and strength != 1:
            raise ValueError("strength says how much of x_start is to be noised; give x_start too")
        if x_start is not None and latents is not None:
            raise ValueError("give either x_start, images, or latents, noise")
        if (known is None) != (mask is None):
            raise ValueError("known and mask go together: images, and 1 where they are to be kept")
        if "invert" in options:
            raise ValueError("invert is encode's, not a call's")
        table = self._table(solver, steps, strength=strength, **options)
        also = None if _watch is None else _watch(table)

        def watch(row: int, start: int, stop: int, loop: Loop) -> None:
            if also is not None:
                also(row, start, stop, loop)
            if callback is not None:
                callback(row, loop.x0[: stop - start])

        return self._sample(
            n, table, seed=seed, first=first, seeds=seeds, labels=labels, guidance=guidance, interval=guidance_interval, guide=guide,
            given={"latents": latents, "images": x_start, "known": known, "mask": mask},
            watch=watch if also is not None or callback is not None else None, alone=callback is not None or guide is not None,
            threshold=self.threshold, progress=progress, noise=noise,
        )  # fmt: skip

    def trajectory(self, n: int, rows: int | Sequence[int] = 8, **call: Any) -> Trajectory:
        """Images with the state and the guess of x_0 after some rows: a number of them, evenly spread to the last, or a list. Only those are kept.

        call: as of `__call__`. ValueError for rows that there are not.
        """
        _count(n)
        kept: list[Any] = []

        def watch_of(table: solvers.Table) -> Watch:
            total = len(table)
            if whole(rows):
                count = int(rows)  # type: ignore[arg-type]
                wanted = tuple(round((i + 1) * total / count) - 1 for i in range(count))
            else:
                wanted = tuple(rows) if isinstance(rows, Iterable) else ()
            if not wanted or not all(whole(row) and 0 <= row < total for row in wanted) or len(set(wanted)) < len(wanted):
                raise ValueError(f"rows is {rows!r}; give different numbers from 0 to {total - 1}, or how many, from 1 to {total}")
            x, x0 = (torch.empty(len(wanted), n, *self.shape, dtype=torch.float32, device="cpu") for _ in range(2))
            places = {row: i for i, row in enumerate(wanted)}
            kept.extend((wanted, x, x0))

            def watch(row: int, start: int, stop: int, loop: Loop) -> None:
                if row in places:
                    x[places[row], start:stop] = loop.x[: stop - start].cpu()
                    x0[places[row], start:stop] = loop.x0[: stop - start].cpu()

            return watch

        return Trajectory(self(n, _watch=watch_of, **call), *kept)

    def encode(
        self,
        images: Tensor,
        *,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        solver: str | None = None,
        steps: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Tensor:
        """The noise that an image comes from: images [N, *shape] in [-1, 1] -> latents fp32 [N, *shape], for `latents=`, by the solver run
        backwards (Song et al. 2021, section 4.3: DDIM inversion).

        solver: one that adds no noise; by default the sampler's own if it adds none, else ddim. Steps are even in the log-SNR unless its options
        or these say otherwise (spacing, timesteps), and x_0 is not clamped. The same solver, steps, spacing and labels, guidance 1, bring the
        image back; second-order solvers (dpmpp_2m, heun) need the fewest steps.
        """
        if not isinstance(images, Tensor) or images.ndim != 1 + len(self.shape):
            shape = f"of shape {list(images.shape)}" if isinstance(images, Tensor) else repr(images)
            raise ValueError(f"images are {shape}; give a tensor, fp32 [N, {', '.join(map(str, self.shape))}]")
        if solver is None and self._table(steps=steps).column("s").any():
            levels = {name: value for name, value in self.options.items() if name in ("spacing", "timesteps") and steps is None}
            solver, options = "ddim", {**levels, "eta": 0.0, **options}
        own = self.options if solver in (None, self.solver) else {}
        if not {"spacing", "timesteps"} & {*own, *options} and self.schedule.preserving:
            options["spacing"] = "logsnr"
        table = self._table(solver, steps, invert=True, clip=None, **options)
        z = self._sample(len(images), table, labels=labels, guidance=guidance, given={"images": images}, noisy=False, progress=progress)
        return z / self._table(solver, steps, **options).start

    def interpolate(self, seeds: tuple[int, int], n: int = 9, **call: Any) -> Tensor:
        """n images from that of seeds[0] to that of seeds[1], their starting noise on the great circle between the two (`fastdiff.slerp`).

        call: as of `__call__`, without seeds. The noise of the steps, where the solver has any, is seeds[0]'s throughout.
        """
        if not isinstance(seeds, Sequence) or len(seeds) != 2 or not whole(n) or n < 2:
            raise ValueError("interpolation takes two seeds and at least 2 images")
        ends = noise.normal(list(seeds), torch.zeros(2, dtype=torch.int64, device=self.device), 0, self.shape, stream="start")
        weights = torch.linspace(0, 1, n, device=self.device)
        z = noise.slerp(ends[0], ends[1], weights)
        z[0], z[-1] = ends  # to the bit
        return self(n, seeds=[seeds[0]] * n, latents=z, **call)

    def _sample(
        self,
        n: int,
        table: solvers.Table,
        *,
        seed: int = 0,
        first: int = 0,
        seeds: Sequence[int] | Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 1.0,
        interval: tuple[float, float] | None = None,
        guide: Guide | None = None,
        given: dict[str, Tensor | None],
        noisy: bool = True,
        watch: Watch | None = None,
        alone: bool = False,
        threshold: float | None = None,
        progress: bool | Bar = False,
        noise: Noise | None = None,
    ) -> Tensor:
        """A call, once its table is made: check the arguments and run them, in smaller micro-batches when memory runs out."""
        _count(n)
        columns = dict(zip(("seeds", "ids"), self._samples(n, seed, first, seeds), strict=True))
        label_column = self._labels(n, labels)
        if label_column is not None:
            columns["labels"] = label_column
        weights = _tensor(guidance, "guidance").float()
        if weights.shape not in ((), (n,)) or not weights.isfinite().all():
            raise ValueError(f"guidance must be one finite number, or one per image, [{n}]")
        columns["guidance"] = weights.expand(n).contiguous()
        for name, images in given.items():
            if images is not None:
                columns[name] = self._images(images, n, name)
        guided = bool((weights != 1).any())
        if guided and (self.num_classes is None or labels is None):
            raise ValueError("guidance needs labels, and a network with classes and a null class (num_classes)")
        rows = (guided,) * len(table)
        if interval is not None:
            low, high = _interval(interval)
            rows = tuple(guided and low <= t <= high for t in table.timesteps)
            guided = any(rows)
        columns = {name: column.to(self.device) for name, column in columns.items()}

        def names(i: int) -> str:
            return f"sample {first + i}" if seeds is None else f"sample 0 of seed {int(columns['seeds'][i])}"

        null = label_column is not None and n > 0 and (guided or int(label_column.max()) == self.num_classes)
        with self._working():
            if null and self.device.type == "cuda":
                self._check_null(table)
            out = torch.empty(n, *self.shape, device=self.device, dtype=torch.float32)

            def run(size: int) -> Tensor:
                kind = self._kind(table, guided, size, "known" in columns, threshold, guide, noise is not None)
                job = _Job(n, table, kind, rows, columns, noisy, names, watch, alone, noise, guide)
                try:
                    return self._run(job, out, progress) if noise is None else self._run_by_row(job, out, progress)
                finally:  # what the function holds on to is the caller's
                    for engine in self._engines.values():
                        engine.guide = None

            return self._with_room(run, guided, n, mixed=guided and not all(rows))

    def _check_null(self, table: solvers.Table) -> None:
        x = torch.zeros(1, *self.shape, device=self.device, dtype=self.dtype)
        with _evaluating(self.model), torch.cuda.device(self.device):
            self._take_network().check_null(x, table.tensors(self.device)[1][:1])

    def _bar(self, steps: int, progress: bool | Bar) -> Any:
        if callable(progress):
            return progress(steps)
        return tqdm(total=steps, unit="step", disable=not progress, leave=False, smoothing=0.1, **calm_bar())

    def _run_by_row(self, job: _Job, out: Tensor, progress: bool | Bar) -> Tensor:
        """As `_run`, but every image through a row before any goes on to the next, as given noise wants it."""
        n, size, table = job.n, job.kind.size, job.table
        assert job.noise is not None
        starts = range(0, n, size)
        threads = min(_threads(), len(starts)) if self.device.type == "cpu" and not job.alone else 1
        engine = self._build(job.kind, table, job.guided_rows, max(threads, 1))
        engine.guide = job.guide
        x0 = torch.zeros_like(out)
        history = out.new_zeros(len(engine.loops[0].history), *out.shape)
        scales = [table.scale, *table.column("c_next")]
        # Whether all numbers are finite, by row and micro-batch: looked at only where some are not in the end, so that nothing waits for the device.
        well, drawn_well = (torch.ones(len(table), max(len(starts), 1), dtype=torch.bool, device=self.device) for _ in range(2))

        rows, drawn = iter(range(len(table))), list[Tensor | None]()

        def draw() -> None:
            """The noise of the next row, once all are done with the one before."""
            row = next(rows)
            with self._within():  # on whichever thread it is
                z = job.noise(row)  # type: ignore[misc]
            if z is not None and (not isinstance(z, Tensor) or z.shape != out.shape):
                shape = list(z.shape) if isinstance(z, Tensor) else repr(z)
                raise ValueError(f"noise({row}) is {shape}; it must return a tensor of {list(out.shape)}, or None")
            drawn[:] = [None if z is None else z.to(self.device)]
            bar.update(1 if row else 0)

        def work(loop: Loop, mine: Sequence[int], ready: Callable[[], object]) -> Iterator[None]:
            for row, guided in enumerate(job.guided_rows):
                ready()
                (z,) = drawn
                for start in mine:
                    through(loop, start, row, guided, z)
                yield

        def through(loop: Loop, start: int, row: int, guided: bool, z: Tensor | None) -> None:
            stop = min(start + size, n)
            part: dict[str, Any] = {name: column[start:stop] for name, column in job.columns.items()}
            names = (part.pop("seeds"), part.pop("ids"), part.pop("labels", None), part.pop("guidance"))
            if row == 0:
                loop.begin(*names, noisy=job.noisy, **part)
            elif len(starts) > 1:
                state = out[start:stop], x0[start:stop], history[:, start:stop]
                painted = {name: part[name] for name in ("known", "mask") if name in part}
                loop.resume(*names, state=state, row=row, scale=float(scales[row]), **painted)
            assert loop.z is not None
            if z is None:
                loop.z.zero_()
            else:
                loop.z[: stop - start].copy_(z[start:stop])
            loop.advance(guided, 1)
            place = starts.index(start)
            drawn_well[row, place], well[row, place] = loop.z.isfinite().all(), loop.x[: stop - start].isfinite().all()
            if job.watch is not None:
                job.watch(row, start, stop, loop)
            if len(starts) > 1 or row == len(table) - 1:
                out[start:stop].copy_(loop.x[: stop - start])
                x0[start:stop].copy_(loop.x0[: stop - start])
                history[:, start:stop].copy_(loop.history[:, : stop - start])

        with self._bar(len(table), progress) as bar, _evaluating(self.model), torch.no_grad():
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    collections.deque(work(engine.loops[0], starts, draw), maxlen=0)
            elif starts:
                _share_in_step(starts, engine.loops[:threads], work, draw)
            bar.update()
        finite = out.isfinite().flatten(1).all(1)
        if not finite.all():
            row = int(well.all(1).int().argmin())
            who = f"noise({row})" if not drawn_well[row].all() else "the network"
            culprit = job.names(int(finite.int().argmin()))
            raise ValueError(f"{who} gave numbers that are not finite for {culprit}, first in row {row} (t = {table.timesteps[row]:g})")
        return out

    def _run(self, job: _Job, out: Tensor, progress: bool | Bar) -> Tensor:
        n, size, total = job.n, job.kind.size, len(job.table)
        starts = range(0, n, size)
        threads = min(_threads(), len(starts)) if self.device.type == "cpu" and not job.alone else 1
        engine = self._build(job.kind, job.table, job.guided_rows, max(threads, 1))
        engine.guide = job.guide
        bar = self._bar(len(starts) * total, progress)

        def begin(loop: Loop, start: int) -> int:
            stop = min(start + size, n)
            part: dict[str, Any] = {name: column[start:stop] for name, column in job.columns.items()}
            loop.begin(
                part.pop("seeds"), part.pop("ids"), part.pop("labels", None), part.pop("guidance"), noisy=job.noisy, **part
            )  # fmt: skip
            return stop

        def work(loop: Loop, start: int) -> Iterator[None]:
            stop = begin(loop, start)
            row = 0
            for guided, run in itertools.groupby(job.guided_rows):
                left = len(list(run))
                while left:
                    many = min(left, CHUNK) if engine.capture and job.watch is None else 1
                    loop.advance(guided, many)
                    row, left = row + many, left - many
                    if job.watch is not None:
                        job.watch(row - 1, start, stop, loop)
                    if not engine.capture:
                        bar.update()
                    yield
            images = loop.x[: stop - start]
            if not images.isfinite().all():
                self._blame(job, loop, start, begin)
            out[start:stop].copy_(images)
            if engine.capture:  # rows are only enqueued above; the check has waited for them
                bar.update(total)

        with bar, _evaluating(self.model):
            if self.device.type == "cuda":
                with torch.cuda.device(self.device), torch.no_grad():
                    for start in starts:
                        collections.deque(work(engine.loops[0], start), maxlen=0)
            else:
                _share(starts, [functools.partial(work, loop) for loop in engine.loops[:threads]])
        return out

    def _blame(self, job: _Job, loop: Loop, start: int, begin: Callable[[Loop, int], int]) -> None:
        """Walk a micro-batch again, row by row, to the first number that is not finite. ValueError with its row and sample."""
        stop = begin(loop, start)
        for row, guided in enumerate(job.guided_rows):
            loop.advance(guided, 1)
            finite = loop.x[: stop - start].isfinite().flatten(1).all(1)
            if not finite.all():
                culprit = job.names(start + int(finite.int().argmin()))
                raise ValueError(
                    f"the network gave numbers that are not finite for {culprit}, first in row {row} (t = {job.table.timesteps[row]:g})"
                )
        raise ValueError("the network gave numbers that are not finite, but not when it was asked again")

    def _images(self, images: Tensor, n: int, name: str) -> Tensor:
        """[n, *shape] of what a call was given: one per image, or one for all."""
        what = {"latents": "latents", "images": "x_start"}.get(name, name)
        if not isinstance(images, Tensor):
            raise ValueError(f"{what} must be a tensor, fp32 [{n}, {', '.join(map(str, self.shape))}]")
        shapes = [(n, *self.shape), (1, *self.shape), self.shape]
        if name != "mask" and not images.is_floating_point():
            raise ValueError(f"{what} is {images.dtype}; give floating-point numbers, images in [-1, 1] (pixels of uint8: x / 127.5 - 1)")
        if name == "mask":
            shapes += [(n, 1, *self.shape[1:]), (1, 1, *self.shape[1:]), (1, *self.shape[1:]), self.shape[1:]]
        if tuple(images.shape) not in shapes:
            raise ValueError(f"{what} has shape {list(images.shape)}; give {list(shapes[0])}, or one for all, {list(self.shape)}")
        images = images.detach().float()
        if name == "mask" and not ((images == 0) | (images == 1)).all():
            raise ValueError("mask must hold 1 where known is to be kept, and 0 elsewhere")
        if not images.isfinite().all():
            raise ValueError(f"{what} has numbers that are not finite")
        return images.expand(n, *self.shape)

    def _samples(self, n: int, seed: int, first: int, seeds: Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor]:
        if seeds is None:
            if not whole(seed) or not whole(first):
                raise ValueError(f"seed is {seed!r} and first is {first!r}; give whole numbers")
            return column64(int(seed), n), torch.arange(n, device="cpu") + signed(int(first))
        column = column64(seeds, n)
        if (whole(seeds) and not isinstance(seeds, Tensor)) or column.shape != (n,):
            raise ValueError(f"seeds has shape {list(column.shape)} for {n} images; give one seed per image")
        if seed != 0 or first != 0:
            raise ValueError("give either seeds, one per image, or seed and first")
        return column, torch.zeros(n, dtype=torch.int64, device="cpu")

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


def _compiled(call: Callable[..., Any], cuda: bool) -> Callable[..., Any]:
    """`torch.compile` with the settings that sampling wants; for a CPU they are in `_room_to_compile`."""
    options: dict[str, Any] = {}
    if cuda:
        from torch._inductor import config  # slow to import, and only needed here

        # Not "reduce-overhead": its outputs are overwritten by the next run, and x feeds back. The whole step is captured here instead.
        # Not "max-autotune": it picks kernels, and so the order of sums, by timing, and another day's images would have other bits.
        if hasattr(config, "deterministic"):
            options["deterministic"] = True
        if hasattr(config, "loop_reindexing_after_fusion"):
            options["loop_reindexing_after_fusion"] = (
                False  # on, it makes upsample + convolution up to 6 times slower (pytorch issue 189488)
            )
    compiled: Callable[..., Any] = torch.compile(call, options=options, dynamic=False)
    return compiled


@contextlib.contextmanager
def _room_to_compile(freeze: bool) -> Iterator[None]:
    """All networks of a class share one cache of compiled code, and past its limit they would run eagerly without a word.

    freeze: weights become constants, in the layout that the convolutions want; without that compiling hardly pays on a CPU.
    """
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096),
        torch._inductor.config.patch(freezing=freeze),
    ):
        yield


# Models that are being sampled from: how many times over, and the modules that were training before.
_RUNNING: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()
_RUNNING_LOCK = threading.Lock()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and in the mode it was in when the last of those who sample from it, on whatever thread, is done."""
    with _RUNNING_LOCK:
        users, training = _RUNNING.get(model, (0, []))
        if users == 0:
            training = [module for module in model.modules() if module.training]
            if training:
                model.eval()
        _RUNNING[model] = users + 1, training
    try:
        yield
    finally:
        with _RUNNING_LOCK:
            users, training = _RUNNING[model]
            _RUNNING[model] = users - 1, training
            if users == 1:
                del _RUNNING[model]
                for module in training:
                    module.training = True


def _count(n: object) -> None:
    if not whole(n) or n < 0:  # type: ignore[operator]
        raise ValueError(f"the number of images is {n!r}; give a whole number of at least 0")


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def by_cost(n: int, most: int, threads: int, shared: bool, tiled: bool = False) -> list[int]:
    """Numbers of rows that a network call may have on a CPU, the one with which n rows are reckoned to be done the soonest first. shared: cores with no
    call of their own help with another's (`cpu.shared`). tiled: as of `cpu.faster`."""
    more, core = (TILED_CALL_ROWS, TILED_CORE_ROWS) if tiled else (CALL_ROWS, CORE_ROWS)

    def cost(rows: int) -> tuple[float, int]:
        calls = max(math.ceil(n / rows), 1)
        at_once = min(calls, threads)
        saved = 1 - 1 / (threads // at_once) if shared else 0.0
        one = rows * (1 - saved * ROW_SHARED) + more - saved * CALL_SHARED
        return math.ceil(calls / threads) * max(one, at_once * core), rows

    return sorted((most, *(rows for rows in FEWER_ROWS if rows < most)), key=cost)


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in interval)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low <= high:
        raise ValueError(f"guidance_interval is {interval!r}; give (low, high), the timesteps between which guidance applies")
    return low, high


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {values!r}; give a number, or one per image") from None


# What torch.get_num_threads() was before those who now hold it at 1. It is a setting of the thread that makes it and of all that start later,
# so one that asks meanwhile must be told, and the last one to finish puts it back.
_HELD: list[int] = []
_HELD_LOCK = threading.Lock()


def _setting() -> int:
    """The process's number of threads, as a thread sees it that starts now. One that first asked while it was held would still see 1."""
    if _HELD:
        return _HELD[0]
    found: list[int] = []
    fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return found[0]


def _threads() -> int:
    """The number of threads that the user has set, whoever holds it at 1 just now."""
    with _HELD_LOCK:
        return _setting()


@contextlib.contextmanager
def _one_thread() -> Iterator[int]:
    """This thread's operations on one core, of so many that the user has set."""
    with _HELD_LOCK:
        _HELD.append(_setting())
        torch.set_num_threads(1)
    try:
        yield _HELD[0]
    finally:
        with _HELD_LOCK:
            torch.set_num_threads(_HELD.pop())


def _share(starts: Sequence[int], workers: Sequence[Callable[[int], Iterator[None]]], halt: Callable[[], object] = lambda: None) -> None:
    """Let each worker, on a thread and its share of the cores, take starts until none are left. An error or Ctrl-C stops all after their row. A worker
    alone works on the caller's thread. halt: called before the end is waited for, lest any wait for one that has not begun."""
    if len(workers) == 1:
        with torch.no_grad(), _one_thread() as cores, native.team(cores):
            for start in starts:
                collections.deque(workers[0](start), maxlen=0)
        return
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in starts:
        todo.put(start)
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop(work: Callable[[int], Iterator[None]]) -> None:
        try:
            with torch.no_grad(), _one_thread() as cores, native.team(cores // len(workers)), contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    for _ in work(todo.get_nowait()):
                        if stop.is_set():
                            return
        except BaseException as e:
            # What broke a barrier is the error; that it broke for the others is none.
            errors.insert(len(errors) if isinstance(e, threading.BrokenBarrierError) else 0, e)
            stop.set()

    threads = [threading.Thread(target=loop, args=(work,), daemon=True) for work in workers]
    with _one_thread():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()
            halt()
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.join()
    if errors:
        raise errors[0]


def _share_in_step(
    starts: Sequence[int],
    loops: Sequence[Loop],
    work: Callable[[Loop, Sequence[int], Callable[[], object]], Iterator[None]],
    between: Callable[[], None],
) -> None:
    """As `_share`, but a worker keeps its starts, and all wait for one another before each row, when one of them calls `between`."""
    barrier = threading.Barrier(len(loops), action=between)

    def watched(i: int, loop: Loop) -> Iterator[None]:
        try:
            yield from work(loop, starts[i :: len(loops)], barrier.wait)
        except BaseException:  # an error, or the end that another's error has brought about
            barrier.abort()
            raise

    # Nobody gets past the first row before each has taken an i.
    _share(range(len(loops)), [functools.partial(lambda loop, i: watched(i, loop), loop) for loop in loops], barrier.abort)

"""The reverse loop: static buffers of one micro-batch shape, one step over them, and its capture as CUDA graphs.

A step reads and writes device memory alone: the network, the fused update of the row that a device counter names, and the counter. What
a step is captured for is its `Kind`; seed, labels, guidance, solver and number of steps are values in buffers, and change without a capture.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import cpu, native, ops, rewrite
from .devices import out_of_memory
from .fused import FusedUNet
from .noise import counter
from .reference import COLUMNS, SLOTS
from .solvers import Table
from .unet import UNet
from .unet2d import HOOKS, UNet2D, adopted, touched

# Rows in one CUDA graph. A replay costs the host some microseconds, so a sixteenth of that a row; the rest of a loop is replayed row by row.
CHUNK = 16
# Scales and shifts of all rows and classes are kept in a table up to this size, else made anew in every step.
CONDITIONS_BYTES = 256 << 20
# Rows of the table that are computed at a time: one shape, so that a row's bits do not depend on how many there are.
CONDITIONS_ROWS = 16

# Two captures at a time would be in each other's way, and a compilation is a setting of the whole process.
BUILDING = threading.RLock()


class State(NamedTuple):
    """What a guidance function is given: the state x and the guess x0, fp32 [N, *shape], where x stands in the schedule, and whose it is.

    t: what the network is told, alpha and sigma: x = alpha x_0 + sigma z; all three tensors without dimensions. labels: int64 [N] or None.
    seeds, ids: int64 [N]. The last sample may stand several times, to fill a micro-batch up.
    """

    x: Tensor
    x0: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    labels: Tensor | None
    seeds: Tensor
    ids: Tensor


Guide = Callable[[State], Tensor]


class Kind(NamedTuple):
    """What a step depends on that is not a value in a buffer. capacity: rows that the tables hold. guide and threshold work on x0 outside the
    fused update. given: the noise of a row is put into a buffer before it, rather than made in it."""

    size: int
    guided: bool
    history: bool
    fractional: bool
    capacity: int
    painted: bool = False
    threshold: float | None = None
    guide: bool = False
    given: bool = False


class Network:
    """A model as the loop calls it. Where it says that it is `hoisted`, it is `body(x, condition(t, labels))`, and the latter is a table made once for
    all rows; where it says that it is `indexed`, `body(x, conditions, which)` looks the table up itself. tiled: as of `cpu.faster`."""

    def __init__(
        self, model: nn.Module, num_classes: int | None, compiler: Callable[[Any], Callable[..., Any]] | None, tiled: bool = False
    ) -> None:
        self.given, self.num_classes, self.compiler, self.tiled = model, num_classes, compiler, tiled
        self.weights: list[Tensor] = []
        self.stamp: tuple[tuple[int, int], ...] = ()  # of the weights, on a CPU
        self.hooked: tuple[Any, ...]
        self.null_checked = False
        self._build()
        self.refresh()

    def _build(self) -> None:
        accelerated = rewrite.accelerated(self.given)
        model = self.given if accelerated else adopted(self.given, self.num_classes)
        self.model = model = cpu.faster(model, self.tiled) if cpu.known(model) and not accelerated else model
        self.parts = [m for m in self.given.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))]
        self.hooked = self._hooked()
        self.places = self._places()
        # An accelerated module is so as a whole, when it is called.
        self.hoisted = getattr(model, "hoisted", False) is True and not accelerated and in_parts(model)
        self.indexed = getattr(model, "indexed", False)
        self.shared = cpu.shared(model)
        call: Any = model.body if self.hoisted else model
        self.call: Callable[..., Any] = self.compiler(call) if self.compiler else call

    def refresh(self) -> bool:
        """Take up weights that have changed since: in place, or, on a CPU, where nothing is compiled, others in their stead. Whether it runs in another
        way since, so that bits of another shape may be others, too."""
        if isinstance(self.given, FusedUNet):
            self.given.pack()
        weights = self._weights()
        if not all(w.device.type == "cpu" for w in weights):
            return False
        stamp, rehooked = native.stamp(weights), self._hooked() != self.hooked
        if stamp == self.stamp and not rehooked:
            return False
        others = self.model is not self.given and list(map(id, weights)) != list(map(id, self.weights))
        anew = bool(self.weights) and not self.compiler and (others or rehooked)
        if anew:
            self._build()
        cpu.pack(self.model)
        self.weights, self.stamp = weights, stamp
        return anew

    def _hooked(self) -> tuple[Any, ...]:
        """What it computes by, besides its weights, that may change from call to call: hooks, and convolutions that are made seamless, say."""
        settings = [m.padding_mode if isinstance(m, nn.Conv2d) else m.eps for m in self.parts]
        return touched(self.given), in_parts(self.given), settings

    def _weights(self) -> list[Tensor]:
        source = self.given.model if isinstance(self.given, FusedUNet) else self.given
        return [*source.parameters(), *source.buffers()]

    def _places(self) -> list[int]:
        return [w.data_ptr() for w in self._weights()]

    def moved(self) -> bool:
        """Whether weights lie elsewhere than when this was made, where a CUDA graph of it would not find them."""
        return self._places() != self.places

    def check_null(self, x: Tensor, t: Tensor) -> None:
        """ValueError where an embedding of the model has no row for the null class. x: [1, *shape], t: [1].

        A CPU says so when it looks for the row. A GPU says later that something was out of range, and then nothing in the process can use it any more,
        so the embedding is kept from looking.
        """
        if self.null_checked or self.hoisted or self.num_classes is None or rewrite.accelerated(self.given):
            return
        missing = []

        def look(module: nn.Embedding, given: tuple[Any, ...]) -> None:
            if len(given) and isinstance(given[0], Tensor) and int(given[0].max()) == self.num_classes == module.num_embeddings:
                missing.append(module)
                raise IndexError

        hooks = [m.register_forward_pre_hook(look) for m in self.given.modules() if isinstance(m, nn.Embedding)]
        try:
            with contextlib.suppress(Exception):  # whatever else it may be, the loop comes to it
                self.given(x, t, torch.full((1,), self.num_classes, device=x.device))
        finally:
            for hook in hooks:
                hook.remove()
        if missing:
            raise nullless(self.num_classes)
        self.null_checked = True

    def answer(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Any:
        """What the model says as it is, not compiled."""
        if self.hoisted and not self.indexed:
            return self.model.body(x, self.condition(t, labels))  # type: ignore[operator]
        return answered(self.model(x, t) if labels is None else self.model(x, t, labels))

    def condition(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Of timesteps and labels [N]. Of so few that a library might sum in another order, more are made."""
        n, least = len(t), max(len(t), CONDITIONS_ROWS)
        full = [torch.cat([column, column[-1:].expand(least - n)]) if n else column for column in (t, labels) if column is not None]
        made: Tensor = self.model.condition(*full)[:n]  # type: ignore[operator]
        return made

    def conditions(self, t: Tensor) -> Tensor:
        """Of timesteps [rows], for every class and the null class: [rows, classes + 1, K]."""
        classes = 1 if self.num_classes is None else self.num_classes + 1
        labels = None if self.num_classes is None else torch.arange(classes, device=t.device).repeat(CONDITIONS_ROWS)
        parts = []
        for some in torch.split(t, CONDITIONS_ROWS):
            full = torch.cat([some, some[-1:].expand(CONDITIONS_ROWS - len(some))]).repeat_interleave(classes)
            made = self.model.condition(full, labels) if labels is not None else self.model.condition(full)  # type: ignore[operator]
            parts.append(made.unflatten(0, (CONDITIONS_ROWS, classes))[: len(some)])
        return torch.cat(parts)


class Engine:
    """The tables of one `Kind`, and the loops that share them."""

    def __init__(
        self, network: Network, kind: Kind, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, capture: bool
    ) -> None:
        self.network, self.kind, self.shape, self.device, self.dtype = network, kind, shape, device, dtype
        self.capture = capture and not kind.guide
        self.guide: Guide | None = None  # as long as a call lasts
        self.answered: tuple[list[int], list[int]] | None = None  # what shape the network has made of which
        self.table = torch.zeros(kind.capacity, len(COLUMNS), device=device, dtype=torch.float32)
        self.predicted = torch.zeros(kind.capacity, 2, device=device, dtype=torch.float32)  # px and pm, where the update is given x0 itself
        self.timesteps = torch.zeros(kind.capacity, device=device, dtype=torch.float32 if kind.fractional else torch.int64)
        self.levels = torch.zeros(kind.capacity + 1, 2, device=device, dtype=torch.float32)
        self.conditions: Tensor | None = None
        self.conditioned: tuple[Any, Tensor] = None, self.timesteps[:0]  # of what weights and timesteps they are
        if network.hoisted:
            example = network.conditions(self.timesteps[:1])
            if kind.capacity * example.nbytes <= CONDITIONS_BYTES:
                self.conditions = example.new_zeros(kind.capacity, *example.shape[1:])
        self.learned, self.start, self.scale = False, 1.0, 1.0
        self.loops: list[Loop] = []
        self.ready: set[bool] = set()  # what has been compiled on the CPU: steps with guidance, and without

    def load(self, table: Table) -> None:
        """Take up a table: its values go into the buffers that a captured step reads. The network's weights are as it last took them up."""
        n, given = len(table), table
        if self.kind.guide or self.kind.threshold is not None:
            given = table.given_x0()
        rows, t = given.tensors(self.device)
        self.table[:n].copy_(rows)
        self.timesteps[:n].copy_(t)
        self.levels[: n + 1].copy_(torch.from_numpy(table.levels))
        self.predicted[:n].copy_(torch.from_numpy(table.rows[:, :2]))
        stamp = self.network.stamp
        same = stamp and stamp == self.conditioned[0] and torch.equal(t, self.conditioned[1])
        if self.conditions is not None and self.network.hoisted and not (same and not self.network.hooked[0]):
            self.conditions[:n].copy_(self.network.conditions(t))
            known = type(self.network.model) in (UNet, UNet2D, FusedUNet) and not self.network.hooked[0]
            self.conditioned = (stamp, t) if known else (None, t[:0])  # of others, what else it depends on is not known
        self.learned, self.start, self.scale = table.learned, table.start, table.scale
        if self.learned and self.answered is not None and self.answered[0] == self.answered[1]:  # a graph would not look at it again
            raise unlearned(*self.answered)

    def close(self) -> None:
        """Let go of the loops, which would else wait, memory and graphs and all, for the garbage collector: they know their engine."""
        for loop in self.loops:
            loop.graphs.clear()
        self.loops.clear()

    def grow(self, loops: int) -> None:
        while len(self.loops) < loops:
            self.loops.append(Loop(self))


class Loop:
    """The buffers of one micro-batch, and the step over them. Nothing in `step` reads the device or branches on what is in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, kind = engine, engine.kind
        self.size, self.shape, device = kind.size, engine.shape, engine.device
        network = engine.network
        rows = 2 * self.size if kind.guided else self.size
        self.x = torch.zeros(self.size, *self.shape, device=device, dtype=torch.float32)
        self.x0 = torch.zeros_like(self.x)
        self.history = self.x.new_zeros(SLOTS if kind.history else 0, *self.x.shape)
        self.z = torch.zeros_like(self.x) if kind.given else None
        self.model_input = torch.zeros(rows, *self.shape, device=device, dtype=engine.dtype)
        # Also without classes the table of conditions is looked up by a label, 0.
        self.labels = torch.zeros(rows, device=device, dtype=torch.int64)
        self.labelled = network.num_classes is not None
        self.seeds = torch.zeros(self.size, device=device, dtype=torch.int64)
        self.ids = torch.zeros(self.size, device=device, dtype=torch.int64)
        self.guidance = torch.ones(self.size, device=device, dtype=torch.float32)
        self.row = torch.zeros(1, device=device, dtype=torch.int64)
        self.start = counter("start", 0, device)
        if kind.painted:
            self.known, self.mask = torch.zeros_like(self.x), torch.zeros_like(self.x)
            self.known_stream = counter("known", 0, device)
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None  # on which the graphs were captured

    def begin(
        self,
        seeds: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        guidance: Tensor,
        *,
        latents: Tensor | None = None,
        images: Tensor | None = None,
        noisy: bool = True,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Start up to `size` samples, filled up with the last one.

        x is noise from the stream, or start * latents; with images alpha images + sigma noise of the first level, or, not noisy, alpha images.
        """
        pad = self._take(seeds, ids, labels, guidance)
        self.row.zero_()
        z = self._normal(self.start) if latents is None else latents[pad].float()
        alpha, sigma = self.engine.levels[0].unbind(0)
        if images is None:
            self.x.copy_(self.engine.start * z)
        elif noisy:
            self.x.copy_(alpha * images[pad].float() + sigma * z)
        else:
            self.x.copy_(alpha * images[pad].float())
        if known is not None and mask is not None:
            self._cover(known[pad], mask[pad])
            self.x.lerp_(alpha * self.known + sigma * z, self.mask)
        self._feed(self.engine.scale)

    def resume(
        self,
        seeds: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        guidance: Tensor,
        *,
        state: tuple[Tensor, Tensor, Tensor],
        row: int,
        scale: float,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Take samples up where they were before a row. state: x, x0 [n, *shape] and history [slots, n, *shape]. scale: c_in of that row."""
        pad = self._take(seeds, ids, labels, guidance)
        x, x0, history = state
        self.x.copy_(x[pad])
        self.x0.copy_(x0[pad])
        self.history.copy_(history[:, pad])
        self.row.fill_(row)
        if known is not None and mask is not None:
            self._cover(known[pad], mask[pad])
        self._feed(scale)

    def _take(self, seeds: Tensor, ids: Tensor, labels: Tensor | None, guidance: Tensor) -> Tensor:
        """Whose samples these are: up to `size` columns, filled up with the last. Returns where each place's column is."""
        pad = torch.arange(self.size, device=self.x.device).clamp(max=len(ids) - 1)
        self.seeds.copy_(seeds[pad])
        self.ids.copy_(ids[pad])
        self.guidance.copy_(guidance[pad])
        if self.labelled and labels is not None:
            self.labels[: self.size].copy_(labels[pad])
            self.labels[self.size :].fill_(self.engine.network.num_classes or 0)
        return pad

    def _cover(self, known: Tensor, mask: Tensor) -> None:
        self.known.copy_(known)
        self.mask.copy_(mask)

    def _normal(self, counter: Tensor) -> Tensor:
        z: Tensor = ops.straight(ops.normal, self.seeds, self.ids, counter, self.x[0].numel())
        return z.reshape(self.x.shape)

    def _feed(self, scale: float | Tensor) -> None:
        self.model_input.copy_((scale * self.x).repeat(len(self.model_input) // self.size, *[1] * len(self.shape)))

    def step(self, guided: bool) -> None:
        """One row. Not guided, in a loop that has both halves: the network sees the first alone."""
        engine, kind = self.engine, self.engine.kind
        n = 2 * self.size if guided else self.size
        x, labels = self.model_input[:n], self.labels[:n]
        try:
            m = self._ask(x, labels)
        except IndexError as e:
            if not self.labelled or "out of range" not in str(e):
                raise
            raise nullless(engine.network.num_classes) from e
        except RuntimeError as e:
            if engine.dtype == torch.float32 or not ("same dtype" in str(e) or "should be the same" in str(e)):
                raise
            short = str(engine.dtype).removeprefix("torch.")
            raise ValueError(f"the network does not work in {short} ({str(e).splitlines()[0]}); give dtype=torch.float32") from e
        m = self._checked(m, x)
        if kind.guide or kind.threshold is not None:
            m = self._reshaped(m, guided)
        ops.straight(
            ops.solver_step, self.x, self.x0, m, self.model_input, self.history, engine.table, self.row, self.seeds, self.ids, self.guidance, self.z
        )  # fmt: skip
        if kind.painted:
            self._paint()
        self.row.add_(1)

    def _ask(self, x: Tensor, labels: Tensor) -> Any:
        """What the network says in the row that the counter names."""
        engine = self.engine
        if engine.conditions is not None and engine.network.indexed:
            return engine.network.call(x, engine.conditions.flatten(0, 1), self.row * engine.conditions.shape[1] + labels)
        if engine.conditions is not None and engine.network.hoisted:
            return engine.network.call(x, engine.conditions[self.row, labels])
        t = engine.timesteps[self.row].expand(len(x))
        if engine.network.hoisted:
            return engine.network.call(x, engine.network.condition(t, labels if self.labelled else None))
        return engine.network.call(x, t, labels) if self.labelled else engine.network.call(x, t)

    def _checked(self, m: Any, x: Tensor) -> Tensor:
        """The network's answer as a tensor of x's shape, or of twice its channels."""
        m = answered(m)
        if not isinstance(m, Tensor):
            raise ValueError(f"the network returned {type(m).__name__}; it must return a tensor, or something with a tensor in .sample")
        twice = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if self.engine.learned and m.shape != twice:
            raise unlearned([*m.shape], [*x.shape])
        if m.shape not in (x.shape, twice):
            raise ValueError(f"the network made {list(m.shape)} of {list(x.shape)}; it must make the same shape")
        if not m.is_floating_point():
            raise ValueError(f"the network returned {str(m.dtype).removeprefix('torch.')}; it must return floating-point numbers")
        if m.device != x.device:
            raise ValueError(f"the network answered on {m.device} what it was asked on {x.device}; it must stay on one device")
        self.engine.answered = [*m.shape], [*x.shape]
        return (m.float() if m.dtype == torch.float64 else m).contiguous()

    def _reshaped(self, m: Tensor, guided: bool) -> Tensor:
        """x0 of the network's answer, guided, then thresholded and as the user's function has it. v of a learned variance stays as it is."""
        engine, kind, size, channels = self.engine, self.engine.kind, self.size, self.shape[0]
        answer, variance = m[:, :channels].float(), m[:size, channels:].float()
        if guided:
            w = self.guidance.reshape(-1, *[1] * len(self.shape))
            answer = answer[size:] + w * (answer[:size] - answer[size:])
        # Indexed by a tensor of one dimension: one of none would be read back.
        px, pm = engine.predicted[self.row][0].unbind(0)
        raw = x0 = px * self.x + pm * answer
        if engine.guide is not None:
            alpha, sigma = engine.levels[self.row][0].unbind(0)
            t = engine.timesteps[self.row][0]
            labels = self.labels[:size] if self.labelled else None
            x0 = engine.guide(State(self.x, x0, t, alpha, sigma, labels, self.seeds, self.ids))
            if not isinstance(x0, Tensor) or x0.shape != self.x.shape:
                raise ValueError(f"the guidance function must return x0, {list(self.x.shape)}")
            x0 = x0.detach().float()
        if kind.threshold is not None:
            x0 = threshold(x0, kind.threshold)
        x0 = x0 + 0 * raw  # inf would be clamped, and forgotten; inf * 0 is not a number
        return torch.cat([x0, variance], dim=1).contiguous() if variance.numel() else x0.contiguous()

    def _paint(self) -> None:
        """Put the known region, at the noise of the level that this row ends at, over what has been made of it."""
        alpha, sigma = self.engine.levels[self.row + 1][0].unbind(0)
        z = self._normal(self.known_stream + self.row)
        self.x.lerp_(alpha * self.known + sigma * z, self.mask)
        self._feed(self.engine.table[self.row, COLUMNS.index("c_next")])

    def advance(self, guided: bool, rows: int) -> None:
        """Some rows: by replay where they have been captured."""
        while rows and self.graphs:
            many = CHUNK if rows >= CHUNK and (guided, CHUNK) in self.graphs else 1
            self.graphs[guided, many].replay()
            rows -= many
        for _ in range(rows):
            self.step(guided)

    def build(self, guided: bool, rows: int) -> None:
        """What a run of `rows` rows needs before it begins: compiled code, and on CUDA graphs. Whatever is in x is lost."""
        wanted = [many for many in ((CHUNK, 1) if rows >= CHUNK else (1,)) if (guided, many) not in self.graphs]
        if not self.engine.capture or not wanted:
            return
        # All that a graph reads and writes are the buffers above, and memory of its own.
        trial = trial_stream(self.x.device)
        trial.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(trial):
            for _ in range(3):
                self.row.zero_()
                self.step(guided)
        torch.cuda.current_stream().wait_stream(trial)
        self.stream = self.stream or own_stream(self.x.device, self)
        for many in wanted:
            self.row.zero_()
            try:
                with self._capturing() as graph:
                    for _ in range(many):
                        self.step(guided)
            except RuntimeError as e:
                self.pool = None
                self._leave_capture()
                # Where a capture cannot be ended either, what went wrong in it is the reason.
                reason = e.__context__ if isinstance(e.__context__, RuntimeError) and not out_of_memory(e) else e
                if out_of_memory(reason):
                    raise reason from None
                self.engine.capture, self.graphs = False, {}
                what = (str(reason).splitlines() or [type(reason).__name__])[0]
                warnings.warn(f"the network cannot be captured in a CUDA graph, so it runs without: {what}", stacklevel=2)
                return
            self.pool = self.pool or graph.pool()
            self.graphs[guided, many] = graph

    @contextlib.contextmanager
    def _capturing(self) -> Iterator[torch.cuda.CUDAGraph]:
        """On a stream of this loop's own. PyTorch has one for all captures, but of the device that came first, and on another the graph would be empty.
        The outer context leaves the stream even where the capture cannot be ended."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            yield graph

    def _leave_capture(self) -> None:
        """Before PyTorch 2.13 the device's generator stays within a capture that could not be ended, and whoever draws from it next gets an error,
        until another capture has been ended."""
        with contextlib.suppress(RuntimeError), self._capturing():
            self.row.add_(0)


# Streams by device, and who has them.
STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}
OWNERS: weakref.WeakValueDictionary[torch.cuda.Stream, Any] = weakref.WeakValueDictionary()


def own_stream(device: torch.device, owner: Any) -> torch.cuda.Stream:
    """A stream of a device, the current one, that nobody else has as long as the owner lives, of the 32 that PyTorch gives out in turn, over and over.

    Graphs captured on one stream share cuBLAS's workspace, which PyTorch 2.13 frees when the first of them goes (pytorch issue 193402). Before, it
    was kept for good, 32 MiB for a stream; so one that was given back is taken before a new one.
    """
    made = STREAMS.setdefault(device, [])
    for _ in range(32):
        if any(stream not in OWNERS for stream in made):
            break
        if (new := torch.cuda.Stream()) not in made:  # type: ignore[no-untyped-call]
            made.append(new)
    stream = next((stream for stream in made if stream not in OWNERS), made[-1])
    OWNERS[stream] = owner
    return stream


@functools.cache
def trial_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are tried before they are captured, one for all."""
    return own_stream(device, trial_stream)


def nullless(null: int | None) -> ValueError:
    return ValueError(f"the network has no class {null}, the null class, which guidance and images without labels ask for")


def unlearned(made: list[int], x: list[int]) -> ValueError:
    wanted = [x[0], 2 * x[1], *x[2:]]
    return ValueError(f"the network made {made} of {x}; it must make {wanted}, since the variance is learned")


def in_parts(model: nn.Module) -> bool:
    """Whether a network that says it is `hoisted` still is what its condition and body say: calling it does no more by hooks, nor something else by a
    `forward` of its own, or of a class that is derived from the one that says so."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's is what it is of
    if "forward" in vars(model) or any(getattr(model, name) for name in HOOKS):
        return False
    says = next((name for kind in type(model).__mro__ for name in ("hoisted", "forward") if name in vars(kind)), "")
    return says == "hoisted" or "hoisted" in vars(model)


def answered(m: Any) -> Any:
    """What a network says: its result, or its result's `.sample`, or the first of a tuple."""
    m = getattr(m, "sample", m)
    return m[0] if isinstance(m, tuple) and m else m


def threshold(x0: Tensor, quantile: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, "Imagen", section 2.3): a sample is clamped to its quantile of |x0|, at least 1, and divided by it.

    Quantiles are linear between order statistics, as torch.quantile's, which has a limit of size.
    """
    flat = x0.flatten(1).abs().sort(dim=1).values
    place = quantile * (flat.shape[1] - 1)
    low = int(place)
    limit = torch.lerp(flat[:, low], flat[:, min(low + 1, flat.shape[1] - 1)], place - low).clamp(min=1.0)
    limit = limit.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -limit, limit) / limit

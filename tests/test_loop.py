"""The loop: its steps as graphs and one by one, what they touch, and what works on x_0 or x between the network and the next row."""

import contextlib
import dataclasses
import functools
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, FiniteList, Gaussian, Plain, by_hand, guided, small_network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff.loop
import fastdiff.native
import fastdiff.ops
import fastdiff.sampler
import fastdiff.ways
from fastdiff import Sampler, Schedule, noise, solvers
from fastdiff.loop import CHUNK, Engine, Network, threshold
from fastdiff.sampler import KEPT

SCHEDULE = Schedule.linear(50)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
aten, fastdiff_ops = torch.ops.aten, torch.ops.fastdiff


@pytest.fixture(autouse=True)
def dispatched():
    """As on a device: what is watched here is what the dispatcher sees, which on a CPU is not asked, and nothing is in C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastdiff.ops, "straight", lambda op, *args: op(*args))
        patch.setattr(fastdiff.native, "available", lambda: False)
        yield


@pytest.fixture(scope="module")
def network():
    return small_network()


def make(network, **options):
    settings = {"shape": SMALL.shape, "num_classes": 3, "steps": 4, "micro_batch": 4, "dtype": torch.float32, "compile": False} | options
    return Sampler(network, settings.pop("schedule", SCHEDULE), **settings)


def plain(function, **options):
    return make(Plain(function), **{"num_classes": None} | options)


def some_images(n, shape=SMALL.shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def twice(network):
    """A network that says a variance too, in as many channels more."""
    return Plain(lambda x, t, labels: torch.cat([network(x, t, labels), torch.sin(3 * network(x, t, (labels + 1) % 4))], dim=1), network)


HALF = torch.zeros(8, 8)
HALF[:, 4:] = 1
LABELS = torch.tensor([0, 1, 2, 2, 1, 3])
# What a step is captured for, and all that may differ from call to call: options of the sampler, and of the call.
VARIANTS = {
    "plain": ({}, {}),
    "noise": ({"solver": "ddpm"}, {"seed": 3}),
    "two stages": ({"solver": "heun"}, {}),
    "history": ({"solver": "unipc"}, {"guidance": 1.5}),
    "guided": ({}, {"guidance": 2.0}),
    "interval": ({"solver": "ddpm"}, {"guidance": 2.0, "guidance_interval": (20, 40)}),
    "fractions": ({"solver": "dpmpp_2m", "spacing": "logsnr"}, {}),
    "edm": ({"schedule": Schedule.edm(50), "prediction": "edm", "solver": "edm_heun", "churn": 4.0}, {}),
    "learned": ({"solver": "ddpm", "variance": "learned"}, {"guidance": 2.0}),
    "painted": ({"solver": "ddpm"}, {"known": some_images(6), "mask": HALF, "guidance": 2.0}),
    "threshold": ({"threshold": 0.8}, {"guidance": 2.0}),
    "start": ({"solver": "ddpm"}, {"x_start": some_images(6), "strength": 0.8}),
    "fused": ({"compile": "fused", "dtype": torch.bfloat16}, {"guidance": 2.0}),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


def variant(name, device="cpu", steps=20):
    """A sampler and a call of it: two micro-batches, over a chunk of rows and some more."""
    options, call = VARIANTS[name]
    # Wide enough for the kernels, where there are any.
    network = small_network(config=dataclasses.replace(SMALL, channels=(64, 64)) if name == "fused" else SMALL).to(device)
    if name == "learned":
        network = twice(network)
    elif name == "guided":
        network = Plain(network.forward, network)  # without a table of conditions
    return make(network, steps=steps, **options), functools.partial(lambda sampler, **more: sampler(6, **{"labels": LABELS} | call | more))


# Graphs


class Tape(TorchDispatchMode):
    """A CUDA graph without CUDA: it takes down the operations of a step on the memory they had, and does them again on the same memory.

    So it holds a step to what a graph does: a number of the host's, and the choice of an operation, stay as they were. What would read the
    device stops it.
    """

    def __init__(self, log):
        super().__init__()
        self.log, self.done = log, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        out = op(*args, **(kwargs or {}))
        self.done.append((op, args, kwargs or {}, tree_leaves(out)))
        return out

    def pool(self):
        return "pool"

    def replay(self):
        for op, args, kwargs, out in self.done:
            for old, new in zip(out, tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.log.append(self.rows)

    @property
    def rows(self):
        """Of the loop, and of each call of the network."""
        steps = [args for op, args, *_ in self.done if op is fastdiff_ops.solver_step.default]
        (calls,) = {len(m) for _, _, m, *_ in steps}
        return len(steps), calls


# Operations whose result the host must wait for.
WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.unique_consecutive.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


def engines(monkeypatch, capture):
    """Whether the engines built from now on capture."""

    class Other(Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"capture": capture})

    monkeypatch.setattr(fastdiff.sampler, "Engine", Other)


@pytest.fixture
def graphs(monkeypatch):
    """Captures on the CPU, on Tapes: a list of those made, and one of what was replayed."""
    made, log = [], []

    def graph():
        made.append(Tape(log))
        return made[-1]

    class Stream:
        def wait_stream(self, other):
            pass

    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": contextlib.nullcontext, "CUDAGraph": graph, "graph": lambda tape, **_: tape,
        "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    engines(monkeypatch, capture=True)
    return made, log


@each_variant
def test_graphs_make_what_steps_make(name, graphs, monkeypatch):
    sampler, call = variant(name)
    captured, (_, log) = call(sampler), graphs
    assert any(rows == CHUNK for rows, _ in log) == (name != "interval")
    assert sum(rows for rows, _ in log) == 2 * (16 if name == "start" else len(sampler.table))
    engines(monkeypatch, capture=False)
    monkeypatch.undo()
    assert torch.equal(call(variant(name)[0]), captured)


def test_runs_of_rows_are_chunks_and_then_rows_by_themselves(network, graphs):
    _, log = graphs
    sampler = make(network, timesteps=range(49, 1, -1), solver="ddpm")
    sampler(3, labels=1, guidance=2.0, guidance_interval=(20, 44))
    # 5 rows without guidance, 25 with, 18 without; the network is asked for 4 images, or 8.
    assert log == [(1, 4)] * 5 + [(CHUNK, 8)] + [(1, 8)] * (25 - CHUNK) + [(CHUNK, 4)] + [(1, 4)] * (18 - CHUNK)
    log.clear()
    sampler(3, labels=1)
    assert log == [(CHUNK, 4)] * 3
    log.clear()
    sampler(3, labels=1, solver="ddim", steps=5, guidance=3.0)
    assert log == [(1, 8)] * 5


@pytest.mark.parametrize("name", ["noise", "interval", "history", "painted"])
def test_a_callback_and_a_trajectory_see_every_row_of_a_graph(name, graphs, monkeypatch):
    _, log = graphs
    sampler, call = variant(name)
    call(sampler)
    seen = []
    images = call(sampler, callback=lambda row, x0: seen.append((row, x0.clone())))  # on one thread
    assert [row for row, _ in seen] == 2 * list(range(20))
    assert [rows for rows, _ in log[-40:]] == [1] * 40
    options = {"labels": LABELS} | VARIANTS[name][1]
    got = sampler.trajectory(6, range(20), **options)
    monkeypatch.undo()
    want = variant(name)[0].trajectory(6, range(20), **options)
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.x0, want.x0)
    assert torch.equal(got.images, images)
    assert torch.equal(torch.stack([torch.cat([seen[row][1], seen[20 + row][1]]) for row in range(20)]), want.x0)


def test_another_solver_and_other_values_are_replayed_from_the_same_graphs(network, graphs, monkeypatch):
    made, _ = graphs
    calls = [
        {"seed": 1, "labels": 2, "guidance": 3.0},
        {"solver": "ddpm", "steps": 33, "labels": LABELS, "guidance": [1.0, 2.0, 3.0, 4.0, 5.0, 0.0]},
        {"solver": "heun", "steps": 20, "spacing": "trailing", "seeds": range(6), "labels": 0, "guidance": 2.0},
        {"eta": 1.0, "clip": 0.5, "labels": 1, "guidance": 1.5, "x_start": some_images(6), "strength": 0.9},
        {"latents": some_images(6), "labels": 1, "guidance": 1.5, "prediction": "v"},
    ]
    sampler = make(network, steps=20)
    sampler.warmup(guided=True)
    assert len(made) == 2
    got = [sampler(6, **call) for call in calls]
    assert len(made) == 2
    monkeypatch.undo()
    for call, images in zip(calls, got, strict=True):
        assert torch.equal(make(network, steps=20)(6, **call), images)


def test_not_finite_is_named_out_of_graphs_too(graphs):
    def says(x, t, labels):
        return torch.where(((t < 49) & (labels == 2))[:, None, None, None], torch.nan, torch.zeros_like(x))

    with pytest.raises(ValueError, match="not finite for sample 5, first in row 1 "):
        make(Plain(says), shape=(1, 4, 4), steps=20)(3, first=4, labels=[0, 2, 1])
    assert graphs[1] == [(CHUNK, 4)] + 4 * [(1, 4)] + 2 * [(1, 4)]  # and again, row by row, to the one at fault


def test_what_cannot_be_captured_runs_without(graphs, monkeypatch):
    """With one word of it."""

    def says(x, t):
        return x * float(t[0] / 50)

    _, log = graphs
    sampler = plain(says, steps=20)
    with pytest.warns(UserWarning, match="the network cannot be captured in a CUDA graph, so it runs without: operation not permitted"):
        images = sampler(6, seed=1)
    assert torch.equal(sampler(6, seed=1), images)
    assert not log
    want = by_hand(lambda row, x, t: x * (t / 50)[:, None, None, None], sampler.table, SMALL.shape, range(6), seed=1)
    torch.testing.assert_close(images, want, atol=2e-5, rtol=0)
    assert way_on_cuda(sampler, monkeypatch) == "eager"


def way_on_cuda(sampler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "device", SimpleNamespace(type="cuda"))
        return sampler.way


def test_the_way_says_that_it_is_captured_unless_a_function_guides(network, graphs, monkeypatch):
    sampler = make(network)
    for call in ({}, {"labels": 1}, {"guide": lambda state: state.x0}):
        assert way_on_cuda(sampler, monkeypatch) == "eager, captured"
        sampler(2, **call)
    assert way_on_cuda(sampler, monkeypatch) == "eager, captured"


def test_graphs_of_a_loop_are_captured_on_one_stream_of_its_own(network, graphs, monkeypatch):
    """Not on PyTorch's for captures, which is of the first device that had one: on another that would make empty graphs."""
    seen = []
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, stream=None, **_: seen.append(stream) or tape)
    sampler = make(network, steps=20, micro_batch=2)
    sampler(2, labels=1, guidance=2.0, guidance_interval=(0, 20))
    sampler(2, labels=1, guidance=2.0)
    assert len(seen) == 3
    assert seen[0] is not None
    assert len(set(map(id, seen))) == 1


def test_loops_that_are_alive_have_streams_of_their_own(network, graphs, monkeypatch):
    """Of the 32 that PyTorch gives out in turn: where two loops' graphs share one, the first that goes frees what the others' read. No more are taken
    than loops are alive."""

    class Given:
        """As torch.cuda.Stream, equal where it is the same stream."""

        given = 0

        def __init__(self):
            self.number = Given.given % 32
            Given.given += 1

        def __eq__(self, other):
            return self.number == other.number

        def __hash__(self):
            return self.number

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Given)
    monkeypatch.setattr(fastdiff.loop, "STREAMS", {})
    fastdiff.loop.trial_stream.cache_clear()

    def stream_of(sampler):
        sampler.warmup()
        (engine,) = sampler._engines.values()
        return engine.loops[0].stream

    kept = [make(network, steps=2) for _ in range(25)]
    assert len({stream_of(sampler).number for sampler in kept}) == 25
    for _ in range(10):
        other = make(network, steps=2)
        assert stream_of(other).number not in {0, *(stream_of(sampler).number for sampler in kept)}
        other._drop(0)
    assert fastdiff.loop.trial_stream(torch.device("cpu")).number == 0
    assert Given.given == 27
    kept += [make(network, steps=2) for _ in range(10)]
    assert len({stream_of(sampler).number for sampler in kept}) == 31  # more there are not
    fastdiff.loop.trial_stream.cache_clear()


def test_a_capture_that_cannot_be_ended_leaves_nothing_changed(graphs, monkeypatch):
    """As torch.cuda.graph: its end is an error too, and leaves the thread on the stream of the capture, and the generator in it."""
    made, _ = graphs
    streams, capturing, ended = ["of the caller"], set(), []

    @contextlib.contextmanager
    def on(stream):
        before = streams[0]
        streams[0] = stream
        try:
            yield
        finally:
            streams[0] = before

    class Capture:
        def __init__(self, tape, **_):
            self.tape = tape

        def __enter__(self):
            self.before, streams[0] = streams[0], "of the capture"
            capturing.add("generator")
            self.tape.__enter__()

        def __exit__(self, *error):
            self.tape.__exit__(*error)
            if error[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            streams[0] = self.before
            capturing.clear()
            ended.append(len(self.tape.done))

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    sampler = plain(lambda x, t: x * float(t[0] / 50), steps=20)
    with pytest.warns(
        UserWarning, match="in a CUDA graph, so it runs without: operation not permitted when stream is capturing: aten._loc"
    ):
        sampler(6, seed=1)
    assert streams == ["of the caller"]
    assert not capturing
    assert ended == [1]
    assert len(made) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried"), RuntimeError("CUDA error: out of memory")], ids=["allocator", "CUDA"])
@pytest.mark.parametrize("ended", [True, False])
def test_out_of_memory_in_a_capture_halves_the_micro_batch(network, graphs, monkeypatch, error, ended):
    sizes = []

    @contextlib.contextmanager
    def graph(tape, **_):
        with tape:
            yield
        steps = [args for op, args, *_ in tape.done if op is fastdiff_ops.solver_step.default]
        sizes.append(len(steps[0][0]) if steps else 0)
        if sizes[-1] > 1:
            try:
                raise type(error)(*error.args)
            finally:
                if not ended:
                    raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.warns(UserWarning, match=r"out of memory with [42] images at a time; going on with [21]$") as said:
        images = make(network)(2, labels=1)
    assert len(said) == 2 and sizes == [4, 0, 2, 0, 1]  # between them the captures that take the generator out
    monkeypatch.undo()
    torch.testing.assert_close(images, make(network)(2, labels=1), atol=1e-5, rtol=0)


def test_a_guided_step_by_a_function_is_not_captured(network, graphs):
    made, log = graphs
    images = make(network, steps=20)(6, labels=1, guide=lambda state: state.x0 * float(state.alpha))
    assert not made
    assert not log
    assert images.isfinite().all()


# What a step touches


def loop_of(sampler, call):
    """The first loop of the kind that a call uses, with one of its micro-batches begun again."""
    call(sampler)
    loop = next(reversed(sampler._engines.values())).loops[0]
    loop.row.zero_()
    return loop


def kinds_of_step(name):
    return {"interval": (True, False)}.get(name, ("guidance" in VARIANTS[name][1],))


@each_variant
def test_a_step_never_waits_for_the_device(name):
    """Nothing of it reads a number, beside the one fused operation, whose reference may where its kernel does not."""

    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ops.append(op)
            return op(*args, **(kwargs or {}))

    loop = loop_of(*variant(name))
    for guided_step in kinds_of_step(name):
        ops = []
        with torch.no_grad(), Waiting():
            for _ in range(3):
                loop.step(guided_step)
        assert ops.count(fastdiff_ops.solver_step.default) == 3
        assert not WAITING & set(ops)


def tensors_of(*things):
    return {(type(thing).__name__, k): v for thing in things for k, v in vars(thing).items() if isinstance(v, Tensor)}


@each_variant
def test_a_step_changes_its_own_buffers_alone_and_leaves_them_where_they_are(name):
    sampler, call = variant(name)
    loop = loop_of(sampler, call)
    tensors = tensors_of(loop, loop.engine) | dict(sampler.model.state_dict())
    before, places = {k: v.clone() for k, v in tensors.items()}, {k: v.data_ptr() for k, v in tensors.items()}
    with torch.no_grad():
        for guided_step in kinds_of_step(name):
            for _ in range(3):
                loop.step(guided_step)
    now = tensors_of(loop, loop.engine) | dict(sampler.model.state_dict())
    assert {k: v.data_ptr() for k, v in now.items()} == places
    changed = {k[1] for k, v in now.items() if not torch.equal(v, before[k])}
    assert changed == {"x", "x0", "model_input", "row"} | ({"history"} if name == "history" else set())
    assert loop.row.item() == 3 * len(kinds_of_step(name))


# On CUDA


@needs_cuda
@each_variant
def test_replay_is_the_steps_at_every_row(name, monkeypatch):
    call = {"labels": LABELS} | VARIANTS[name][1]
    rows = 16 if name == "start" else 20
    sampler, _ = variant(name, "cuda")
    rows = 16 if name == "start" else len(sampler.table)
    replayed, images = sampler.trajectory(6, range(rows), **call), sampler(6, **call)
    engines(monkeypatch, capture=False)
    stepped = variant(name, "cuda")[0].trajectory(6, range(rows), **call)
    for row in range(rows):
        assert (replayed.x[row] - stepped.x[row]).abs().max() == 0, row
        assert (replayed.x0[row] - stepped.x0[row]).abs().max() == 0, row
    assert torch.equal(images, stepped.images)


@needs_cuda
@each_variant
def test_neither_replays_nor_steps_wait_on_cuda(name):
    loop = loop_of(*variant(name, "cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for guided_step in kinds_of_step(name):
            loop.advance(guided_step, 2)
            with torch.no_grad():
                loop.step(guided_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_what_cannot_be_captured_leaves_stream_and_generator_as_they_were_on_cuda():
    before = torch.cuda.current_stream()
    sampler = plain(lambda x, t: x * float(t[0] / 50), steps=20, device="cuda")
    with pytest.warns(UserWarning, match=r"so it runs without: (?!.*previous error during capture)"):
        images = sampler(6, seed=1)
    assert torch.cuda.current_stream() == before
    assert torch.randn(2, device="cuda").isfinite().all()
    assert torch.equal(sampler(6, seed=1), images)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_second_gpu_has_graphs_of_its_own(network):
    images = [make(network, device=f"cuda:{i}", steps=20)(6, labels=1).cpu() for i in (0, 1, 0)]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=0)
    assert torch.equal(images[0], images[2])


@needs_cuda
def test_other_values_are_replayed_without_a_new_capture_on_cuda(monkeypatch):
    sampler, _ = variant("guided", "cuda")
    sampler.warmup(guided=True)
    calls = [
        {"seed": 1, "labels": 2},
        {"solver": "ddpm", "steps": 33, "labels": LABELS},
        {"solver": "heun", "spacing": "trailing", "seeds": range(6), "labels": 0},
    ]

    def refuse(*_, **__):
        raise AssertionError("captured again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "graph", refuse)
        got = [sampler(6, guidance=2.0, **call) for call in calls]
    engines(monkeypatch, capture=False)
    for call, images in zip(calls, got, strict=True):
        assert torch.equal(variant("guided", "cuda")[0](6, guidance=2.0, **call), images)


# Engines


@pytest.fixture
def built(monkeypatch):
    """The engines built, weakly."""
    made = []

    class Counted(fastdiff.sampler.Engine):  # which captures, after `graphs`
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(fastdiff.sampler, "Engine", Counted)
    return made


def test_values_do_not_build_a_new_engine(network, built):
    sampler = make(network)
    sampler.warmup()
    for call in (
        {"labels": 1},
        {"labels": LABELS[:3], "seed": 4, "first": 9},
        {"seeds": [1, 2, 3]},
        {"solver": "ddpm"},
        {"solver": "dpmpp_2m", "steps": 50, "spacing": "linspace"},
        {"eta": 1.0, "clip": None},
        {"x_start": some_images(3), "strength": 0.5},
        {"latents": some_images(3)},
    ):
        sampler(3, **call)
    sampler.encode(some_images(2), spacing="linspace")
    sampler.trajectory(2, 3)
    assert len(built) == 1


@pytest.fixture
def no_collector():
    """What is let go of is to go at once: with it goes a GPU's memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_engines_used_last_are_kept(network, built, no_collector):
    sampler = make(network)
    calls = [{}, {"guidance": 2.0}, {"solver": "unipc"}, {"spacing": "logsnr"}, {"known": some_images(2), "mask": HALF}]
    assert KEPT == 4

    def use(*which):
        for i in which:
            sampler(2, labels=1, **calls[i])
        assert sum(engine() is not None for engine in built) <= KEPT
        return len(built)

    assert use(0, 1, 2, 3, 0) == 4
    assert use(4) == 5  # in place of 1, the one that was longest out of use
    assert use(0, 2, 3, 4) == 5
    assert use(1) == 6  # in place of 0
    assert use(2, 3, 4) == 6
    assert use(0) == 7


def test_memory_of_graphs_is_let_go_of_at_once(network, graphs, built, no_collector):
    made, _ = graphs
    make(network)(2, labels=1)  # what a first step imports holds on to it
    for things in (made, built):
        things.clear()
    sampler = make(network)
    sampler(2, labels=1)
    tapes = [weakref.ref(tape) for tape in made]
    made.clear()
    sampler._drop(0)
    assert tapes and len(built) == 1 and not any(engine() for engine in built) and not any(tape() for tape in tapes)


def test_what_is_measured_is_let_go_of_at_once(network, graphs, built, no_collector, monkeypatch):
    monkeypatch.setattr(fastdiff.sampler, "_compiled", lambda call, cuda: call)
    monkeypatch.setattr(fastdiff.ways, "remember", lambda key, found: found.update(compiled=-1.0))
    make(network)(2, labels=1)  # what a first step imports holds on to it
    sampler = make(network, compile="auto")
    sampler(2, labels=1)
    kept = built[0]
    assert set(sampler.measure(rounds=1)) == {"eager", "compiled"}
    assert sampler.way == "compiled"
    assert len(built) == 4
    assert not any(engine() for engine in built if engine is not kept)


@pytest.mark.parametrize("change", ["assign", "data"])
def test_weights_that_lie_elsewhere_are_captured_anew(graphs, change, monkeypatch):
    """A graph would read memory that is no longer theirs."""
    network = small_network()
    other = {name: 1.5 * value for name, value in network.state_dict().items()}
    # As on a GPU, where no number of the weights' bits is kept.
    monkeypatch.setattr(Network, "refresh", lambda self: None)
    sampler = make(network)
    first = sampler(2, labels=1)
    if change == "assign":
        network.load_state_dict(other, assign=True)
    else:
        for name, p in network.named_parameters():
            p.data = other[name]
    second = sampler(2, labels=1)
    assert not torch.equal(first, second) and torch.equal(second, make(network)(2, labels=1))


def test_a_variance_that_is_not_there_is_missed_by_a_graph_too(network, graphs):
    sampler = make(network, solver="ddpm")
    sampler(2, labels=1)
    with pytest.raises(ValueError, match=r"it must make \[4, 6, 8, 8\], since the variance is learned"):
        sampler(2, labels=1, variance="learned")
    sampler(2, labels=1)


def test_guidance_functions_share_an_engine_and_are_let_go_of(network, built):
    sampler, seen = make(network), []
    for factor in (0.5, 0.6, 0.7):
        held = torch.full((1,), factor)
        seen.append(weakref.ref(held))
        sampler(2, labels=1, guide=lambda state, held=held: held * state.x0)
    del held
    assert len(built) == 1 and not any(ref() is not None for ref in seen)


# Conditions made once for all rows


@pytest.mark.parametrize("classes", [3, None])
def test_a_condition_does_not_depend_on_how_many_rows_there_are(network, classes):
    t = torch.arange(49, 8, -1)
    made = Network(network, classes, None)
    every = made.conditions(t)
    for n in (1, 2, 15, 16, 17, 33):
        assert torch.equal(made.conditions(t[:n]), every[:n])
        assert torch.equal(made.conditions(t[-n:]), every[-n:])
    null = network.condition(t)
    torch.testing.assert_close(every[:, -1], null, atol=1e-6, rtol=1e-5)  # another size of matrix product
    if classes:
        torch.testing.assert_close(every[:, 1], network.condition(t, torch.ones_like(t)), atol=1e-6, rtol=1e-5)


def test_a_table_of_conditions_that_is_too_large_is_made_row_by_row(network, monkeypatch):
    want = make(network)(6, labels=LABELS, guidance=2.0)
    monkeypatch.setattr(fastdiff.loop, "CONDITIONS_BYTES", 0)
    calls = []
    monkeypatch.setattr(network, "condition", lambda t, labels, made=network.condition: calls.append(len(t)) or made(t, labels))
    got = make(network)(6, labels=LABELS, guidance=2.0)
    assert calls.count(16) == 8  # two micro-batches of four rows, of 8 samples, made up to what has the same bits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


# A function that guides


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 1.0, "clipped_epsilon": False},
        {"clip": None, "prediction": "v"},
        {"solver": "unipc", "steps": 6},
        {"solver": "heun", "prediction": "x0"},
        {"schedule": Schedule.edm(50), "prediction": "edm", "solver": "edm_heun", "churn": 2.0},
        {"schedule": Schedule.flow(50), "prediction": "flow", "solver": "euler"},
        {"solver": "ddpm", "variance": "learned"},
    ],
    ids=str,
)
def test_a_guide_that_changes_nothing_changes_nothing(network, options):
    """But fp32's rounding, since x_0 is then formed before the update, over up to eleven evaluations."""
    sampler = make(twice(network) if "variance" in options else network, **options)
    call = {"labels": LABELS[:5], "guidance": 2.0, "seed": 2}
    want = sampler(5, **call)
    torch.testing.assert_close(sampler(5, guide=lambda state: state.x0, **call), want, atol=1e-4, rtol=1e-5)
    assert torch.equal(sampler(5, **call), want)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "heun", "ddpm"])
@pytest.mark.parametrize("schedule", [Schedule.cosine(100), Schedule.edm(100)], ids=lambda s: s.name)
def test_classifier_guidance_samples_the_posterior(solver, schedule):
    """Prior N(0.1, 0.5^2) and y = x_0 + 0.4 z seen as 0.7: by Bayes N(mean, deviation^2), whose own network makes the same images.

    E[x_0 | x, y] = E[x_0 | x] + sigma^2 / alpha d/dx log p(y | x) (Dhariwal & Nichol 2021, section 4; Tweedie), by autograd.
    """
    prior, seen, spread = Gaussian(0.1, 0.5, schedule, "x0"), 0.7, 0.4

    def guide(state):
        with torch.enable_grad():
            x = state.x.double().requires_grad_()
            x0 = prior.believe(x, state.alpha.double(), state.sigma.double())
            variance = 1 / (1 / 0.5**2 + (state.alpha / state.sigma).double() ** 2) + spread**2
            score = torch.autograd.grad((-((seen - x0) ** 2) / (2 * variance)).sum(), x)[0]
        return state.x0 + state.sigma**2 / state.alpha * score

    precision = 1 / 0.5**2 + 1 / spread**2
    posterior = Gaussian((0.1 / 0.5**2 + seen / spread**2) / precision, 1 / math.sqrt(precision), schedule, "x0")
    options = {
        "schedule": schedule,
        "prediction": "x0",
        "solver": solver,
        "steps": 12,
        "clip": None,
        "num_classes": None,
        "shape": (1, 4, 4),
    }
    want = make(posterior, **options)(6, seed=3)
    got = make(prior, **options)(6, seed=3, guide=guide)
    # alpha is 1e-2 at the start of the cosine schedule, so fp32's alpha and sigma leave sigma^2 / alpha 1e-5 of error, on numbers up to 100.
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert (want - make(prior, **options)(6, seed=3)).abs().max() > 0.1


def test_a_guide_is_told_where_it_is_and_whose_images_they_are(network):
    states = []

    def guide(state):
        assert not state.x.requires_grad
        states.append(state._replace(x=state.x.clone(), x0=state.x0.clone(), ids=state.ids.clone(), labels=state.labels.clone()))
        return state.x0

    sampler = make(network, steps=3)
    sampler(6, seed=9, first=20, labels=LABELS, guidance=2.0, guide=guide)
    assert len(states) == 6
    starts = noise.normal(9, range(20, 26), 0, SMALL.shape, stream="start")
    for state, rows in zip(states[::3], ([0, 1, 2, 3], [4, 5, 5, 5]), strict=True):  # the last one fills the micro-batch up
        assert torch.equal(state.x, starts[rows])
        assert state.labels.tolist() == LABELS[rows].tolist()
        assert state.ids.tolist() == [20 + row for row in rows]
        assert state.seeds.tolist() == [9] * 4
    for state, t in zip(states, 2 * sampler.table.timesteps.tolist(), strict=True):
        assert state.t.item() == t
        assert state.alpha.item() == pytest.approx(SCHEDULE.alpha[t], rel=1e-6)
        assert state.sigma.item() == pytest.approx(SCHEDULE.sigma[t], rel=1e-6)
    # x_0 is what the guided network says, before it is clamped.
    m = guided(network, LABELS[:4], 2.0)(0, states[0].x, torch.full((4,), 49))
    x0 = (states[0].x - SCHEDULE.sigma[49] * m) / SCHEDULE.alpha[49]
    torch.testing.assert_close(states[0].x0, x0.float(), atol=1e-5, rtol=0)
    assert x0.abs().max() > 1.5


def test_a_guide_without_classes_has_no_labels():
    labels = []
    plain(lambda x, t: 0.1 * x)(2, seeds=[4, 5], guide=lambda state: labels.append((state.labels, state.seeds.tolist())) or state.x0)
    assert labels == [(None, [4, 5, 5, 5])] * 4


def test_what_a_guide_returns_takes_the_place_of_x0(network):
    """Clamped as ever; also where the solver would keep the network's own noise estimate."""
    labels = LABELS[:3]
    for options in ({}, {"solver": "dpmpp_2m"}, {"clipped_epsilon": False}, {"clip": 0.4}):
        sampler = make(network, **options)
        got = sampler(3, labels=labels, guide=lambda state: (0.6 * state.x0 + 0.1).double().requires_grad_())
        want = by_hand(guided(network, labels), sampler.table, SMALL.shape, range(3), guess=lambda row, x, x0: 0.6 * x0 + 0.1)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("wrong", [lambda s: s.x0[:1], lambda s: s.x0.mean(), lambda s: None, lambda s: s.x0.flatten(1), lambda s: 0.0])
def test_a_guide_that_returns_something_else(network, wrong):
    with pytest.raises(ValueError, match=r"the guidance function must return x0, \[4, 3, 8, 8\]"):
        make(network)(3, guide=wrong)


# Dynamic thresholding


def imagen(x0, quantile):
    """Saharia et al. 2022, section 2.3: s = the quantile of |x_0| of an image, at least 1; clamp to [-s, s] and divide by s."""
    s = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 1), (1, 5, 5), (2, 3)], ids=str)
def test_threshold_is_imagens(quantile, shape):
    x0 = 2 * torch.randn(9, *shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 9).reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(threshold(x0, quantile), imagen(x0.double(), quantile).float(), atol=1e-6, rtol=0)


def test_threshold_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    x0 = 2 * torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 9).reshape(-1, 1, 1, 1)
    for quantile in (0.5, 0.95, 0.995):
        scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e6)
        torch.testing.assert_close(threshold(x0, quantile), scheduler._threshold_sample(x0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "guidance"),
    [
        ({}, 1.0),
        ({}, 4.0),
        ({"solver": "ddpm"}, 4.0),
        ({"solver": "unipc", "steps": 6}, 4.0),
        ({"solver": "ddpm", "variance": "learned"}, 4.0),
        ({"clipped_epsilon": False}, 4.0),
        ({"prediction": "v"}, 4.0),
    ],
    ids=str,
)
def test_thresholded_by_hand(network, options, guidance):
    model, labels = twice(network) if "variance" in options else network, LABELS[:5]
    sampler = make(model, threshold=0.9, **options)
    got = sampler(5, seed=1, labels=labels, guidance=guidance)
    says, limits = guided(model, labels, guidance), []

    def guess(row, x, x0):
        limits.append(torch.quantile(x0.abs().flatten(1), 0.9, dim=1).max().item())
        return imagen(x0, 0.9)

    want = by_hand(says, sampler.table, SMALL.shape, range(5), seed=1, guess=guess)
    assert max(limits) > 1.2  # so it makes a difference
    # As the plain loop; guidance 4 makes its errors seven times larger.
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_a_threshold_takes_the_place_of_clip(network):
    call = {"labels": LABELS, "guidance": 4.0}
    want = make(network, threshold=0.9)(6, **call)
    assert torch.equal(make(network, threshold=0.9, clip=0.3)(6, **call), want)
    assert not torch.equal(make(network, clip=0.3)(6, **call), want)


def test_threshold_then_guide_is_guide_then_threshold(network):
    """The function has its say first, and what it says is thresholded."""
    sampler = make(network, threshold=0.9)
    got = sampler(5, labels=1, guide=lambda state: 3 * state.x0)
    want = by_hand(
        guided(network, torch.ones(5).long()), sampler.table, SMALL.shape, range(5), guess=lambda row, x, x0: imagen(3 * x0, 0.9)
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# A learned variance


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("steps", [4, 12])
def test_a_learned_variance_by_hand(network, guidance, steps):
    """Nichol & Dhariwal 2021, equation 15. Under guidance v is the class's own."""
    model, labels = twice(network), LABELS[:5]
    sampler = make(model, solver="ddpm", variance="learned", steps=steps)
    got = sampler(5, seed=3, labels=labels, guidance=guidance)
    want = by_hand(guided(model, labels, guidance), sampler.table, SMALL.shape, range(5), seed=3)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)
    for variance in ("posterior", "beta"):
        assert (got - sampler(5, seed=3, labels=labels, guidance=guidance, variance=variance)).abs().max() > 0.01


def test_a_learned_variance_lies_between_the_two_it_is_learned_between(network):
    """v = -1 is the posterior's, v = 1 is beta."""
    said = {v: Plain(lambda x, t, labels, v=v: torch.cat([network(x, t, labels), torch.full_like(x, v)], dim=1), network) for v in (-1, 1)}
    for v, variance in ((-1, "posterior"), (1, "beta")):
        got = make(said[v], solver="ddpm", variance="learned")(5, labels=1)
        torch.testing.assert_close(got, make(network, solver="ddpm", variance=variance)(5, labels=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"solver": "ddpm"}, {"solver": "unipc"}, {"threshold": 0.9}], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_solver_that_learns_no_variance_ignores_it(network, options, guidance):
    call = {"labels": LABELS, "guidance": guidance}
    want = make(Plain(network.forward, network), **options)(6, **call)
    assert torch.equal(make(twice(network), **options)(6, **call), want)


def test_a_learned_variance_needs_a_network_that_says_one(network):
    text = r"the network made \[4, 3, 8, 8\] of \[4, 3, 8, 8\]; it must make \[4, 6, 8, 8\], since the variance is learned"
    with pytest.raises(ValueError, match=text):
        make(network, solver="ddpm", variance="learned")(3)


# A region that is known


def levels_after(table):
    """alpha and sigma of where each row ends, from the schedule: the level of the next row, and at the end no noise."""
    return [(SCHEDULE.alpha[t], SCHEDULE.sigma[t]) for t in table.timesteps[1:]] + [(1.0, 0.0)]


@pytest.mark.parametrize(
    ("call", "guidance"),
    [
        ({"solver": "ddim"}, 1.0),
        ({"solver": "ddpm", "steps": 6}, 2.0),
        ({"solver": "ddpm", "steps": 5, "resample": 3}, 1.0),
        ({"solver": "ddim", "eta": 0.5, "steps": 7, "resample": 2, "jump": 2}, 2.0),
        ({"solver": "dpmpp_2m", "steps": 5, "spacing": "linspace"}, 1.0),
    ],
    ids=str,
)
def test_a_known_region_is_noised_anew_after_each_row(network, call, guidance):
    """By the stream "known" of the row, over what has been made of it; at the start by the starting noise."""
    known, labels, mask = some_images(5), LABELS[:5], HALF.bool()
    table = solvers.table(**{"steps": 4, "schedule": SCHEDULE} | call)
    assert len(table) > call.get("steps", 4) or "resample" not in call
    levels = levels_after(table)
    t = table.timesteps[0]
    z = noise.normal(3, range(10, 15), 0, SMALL.shape, stream="start").double()

    def after(row, x):
        (alpha, sigma), z = levels[row], noise.normal(3, range(10, 15), row, SMALL.shape, stream="known").double()
        return torch.where(mask, alpha * known.double() + sigma * z, x)

    x = torch.where(mask, SCHEDULE.alpha[t] * known.double() + SCHEDULE.sigma[t] * z, z)
    want = by_hand(guided(network, labels, guidance), table, SMALL.shape, range(10, 15), seed=3, x=x, after=after)
    got = make(network)(5, seed=3, first=10, labels=labels, guidance=guidance, known=known, mask=HALF, **call)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)  # as the plain loop, over up to fifteen rows
    assert torch.equal(got[..., 4:], known[..., 4:])


@pytest.mark.parametrize("solver", solvers.names())
def test_a_known_region_is_kept_to_the_bit(network, solver):
    known = some_images(6)
    mask = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    sampler = make(network, solver=solver)
    got, kept = sampler(6, labels=1, known=known, mask=mask), mask.bool().expand_as(known)
    assert torch.equal(got[kept], known[kept])
    assert (got - sampler(6, labels=1))[~kept].abs().max() > 1e-3  # the rest is made to fit


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm"},
        {"solver": "unipc"},
        {"schedule": Schedule.edm(50), "prediction": "edm", "solver": "edm_heun", "churn": 2.0},
        {"schedule": Schedule.flow(50), "prediction": "flow"},
        {"threshold": 0.9},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_nothing_known_is_plain_sampling(network, options):
    sampler = make(network, **options)
    call = {"labels": LABELS, "guidance": 2.0}
    assert torch.equal(sampler(6, known=some_images(6), mask=torch.zeros(8, 8), **call), sampler(6, **call))


def test_masks_of_every_shape_and_one_image_for_all(network):
    known, sampler = some_images(1), make(network, solver="ddpm")
    want = sampler(6, labels=1, known=known.expand(6, -1, -1, -1), mask=HALF.expand(6, 3, 8, 8).clone())
    for mask in (HALF, HALF[None], HALF[None, None], HALF.bool(), HALF.expand(6, 1, 8, 8), HALF.expand(3, 8, 8), HALF.int()):
        assert torch.equal(sampler(6, labels=1, known=known[0], mask=mask), want)


def test_what_is_known_decides_the_rest():
    """Of data that is one of four images, told apart by their left halves, the right halves follow; without fail where steps are walked twice
    (RePaint), for else an early choice stays."""
    schedule, images = Schedule.cosine(100), some_images(4, (1, 4, 4)).sign()
    mask, wanted = torch.zeros(4, 4), images.repeat(16, 1, 1, 1)
    mask[:, :2] = 1
    options = {"schedule": schedule, "num_classes": None, "shape": (1, 4, 4), "solver": "ddpm", "steps": 50, "micro_batch": 64}
    sampler = make(FiniteList(images, schedule), **options)
    wrong = [((sampler(64, known=wanted, mask=mask, resample=r) - wanted).abs() > 1e-2).flatten(1).any(1).sum() for r in (1, 2)]
    assert 0 < wrong[0] < 6
    assert wrong[1] == 0

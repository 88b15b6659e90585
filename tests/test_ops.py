"""The ops as torch sees them: schemas, fakes, torch.compile, and what importing them costs."""

import shutil
import subprocess
import sys
from pathlib import Path

import convolutions as make
import pytest
import torch
from helpers import SMALL, small_network

from fastdiff import native, ops, reference
from fastdiff.fused import FusedUNet

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = (3, 4, 4)
NETWORK = make.DTYPES[0]


def winograd_arguments(n, h=8, bias=True):
    weight = torch.randn(32, 16, 3, 3, device=DEVICE)
    x = torch.randn(n, 16, h, 4, device=DEVICE).to(memory_format=torch.channels_last)
    return x, reference.winograd_weight(weight), torch.randn(32, device=DEVICE) if bias else None


def stream(n):
    return torch.arange(n, device=DEVICE) - 1, torch.arange(n, device=DEVICE) + 2**32, torch.tensor([5], device=DEVICE)


def add_noise_arguments(n, given, target, dtype=torch.float32):
    x0, t = torch.rand(n, *SHAPE, device=DEVICE).to(dtype), torch.arange(n, device=DEVICE) % 10
    table = torch.rand(10, 4, device=DEVICE)
    return (x0, t, table, *((torch.randn_like(x0), None, None, None) if given else (None, *stream(n))), target)


def solver_step_arguments(n, halves=1, dtype=torch.float32, slots=0, variance=False):
    x, x0 = torch.randn(n, *SHAPE, device=DEVICE), torch.randn(n, *SHAPE, device=DEVICE)
    m = torch.randn(halves * n, SHAPE[0] * (1 + variance), *SHAPE[1:], device=DEVICE).to(dtype)
    model_input = torch.zeros(halves * n, *SHAPE, device=DEVICE, dtype=dtype)
    history = torch.randn(slots, n, *SHAPE, device=DEVICE)
    # Six rows of reference.COLUMNS: slot 1 is read and overwritten, slot 2 is neither.
    table = torch.tensor([[1.2, -0.7, 1.0, 0.6, 0.3, 0.1, 0.2, 0.5, 1.0, 0.3, -0.2, 0.0, 1, 0.8, 0.4, 0.3]] * 6, device=DEVICE)
    seeds, ids, row = stream(n)
    return (x, x0, m, model_input, history, table, row, seeds, ids, torch.full((n,), 2.0, device=DEVICE))


def given_noise(arguments):
    return (*arguments, torch.randn_like(arguments[0]))


def scheduler_step_arguments(
    n, dtype=torch.float32, exact=torch.float32, each=True, noise="stream", limit=False, past=0, variance=False, wide=False
):
    x = torch.randn(n, *SHAPE, device=DEVICE).to(dtype)
    m = torch.randn(n, SHAPE[0] * (1 + variance), *SHAPE[1:], device=DEVICE).to(dtype)
    table = torch.tensor([[1.2, -0.7, 1.0, 0.6, 0.3, 0.2, -0.1, 0.3, 0.5, 0.3, 4.0]] * 6, device=DEVICE, dtype=exact)
    rows = torch.arange(n, device=DEVICE) % 6 if each else torch.tensor([2], device=DEVICE)
    seeds, ids, _ = stream(n) if noise == "stream" else (None, None, None)
    limits = torch.linspace(1, 2, n, device=DEVICE, dtype=exact) if limit else None
    before, earlier = (torch.randn_like(x, dtype=exact) if past > i else None for i in range(2))
    return m, x, table, rows, torch.randn_like(x) if noise == "given" else None, seeds, ids, limits, before, earlier, wide


CASES = [
    pytest.param(ops.winograd_conv3x3, lambda: winograd_arguments(3), id="winograd_conv3x3"),
    pytest.param(ops.winograd_conv3x3, lambda: winograd_arguments(0, 4, bias=False), id="winograd_conv3x3-empty"),
    pytest.param(ops.noise_words, lambda: (*stream(3), 5), id="noise_words"),
    pytest.param(ops.normal, lambda: (*stream(3), 25), id="normal"),
    pytest.param(ops.normal, lambda: (*stream(0), 25), id="normal-empty"),
    pytest.param(ops.add_noise, lambda: add_noise_arguments(3, given=False, target=True), id="add_noise-made"),
    pytest.param(ops.add_noise, lambda: add_noise_arguments(3, given=True, target=False, dtype=torch.half), id="add_noise-given"),
    pytest.param(ops.add_noise, lambda: add_noise_arguments(0, given=False, target=True), id="add_noise-empty"),
    pytest.param(ops.solver_step, lambda: solver_step_arguments(3), id="solver_step"),
    pytest.param(ops.solver_step, lambda: solver_step_arguments(3, halves=2, dtype=torch.float16), id="solver_step-guided"),
    pytest.param(ops.solver_step, lambda: solver_step_arguments(3, slots=3), id="solver_step-history"),
    pytest.param(ops.solver_step, lambda: solver_step_arguments(3, halves=2, slots=3, variance=True), id="solver_step-variance"),
    pytest.param(ops.solver_step, lambda: given_noise(solver_step_arguments(3)), id="solver_step-given"),
    pytest.param(ops.scheduler_step, lambda: scheduler_step_arguments(3), id="scheduler_step"),
    pytest.param(ops.scheduler_step, lambda: scheduler_step_arguments(3, each=False, noise=None), id="scheduler_step-alone"),
    pytest.param(
        ops.scheduler_step,
        lambda: scheduler_step_arguments(3, dtype=torch.half, noise="given", limit=True, past=2, variance=True, wide=True),
        id="scheduler_step-half",
    ),
    pytest.param(
        ops.scheduler_step, lambda: scheduler_step_arguments(3, dtype=torch.double, exact=torch.double), id="scheduler_step-double"
    ),
    pytest.param(ops.scheduler_step, lambda: scheduler_step_arguments(0), id="scheduler_step-empty"),
    # With slots: opcheck cannot clone a tensor of two sizes of 0 (torch 2.13, clone_input).
    pytest.param(ops.solver_step, lambda: solver_step_arguments(0, slots=3), id="solver_step-empty"),
    pytest.param(ops.solver_step, lambda: solver_step_arguments(0, slots=3, variance=True), id="solver_step-empty-variance"),
    pytest.param(ops.group_norm_silu, lambda: make.group_norm_silu((3, 4, 4, 64), 8, NETWORK, style=True), id="group_norm_silu"),
    pytest.param(ops.group_norm_silu, lambda: make.group_norm_silu((2, 5, 7, 12), 2, NETWORK, silu=False), id="group_norm_silu-odd"),
    pytest.param(ops.conv3x3, lambda: make.conv3x3(3, 4, (64,), 64, NETWORK, same=True, results=2), id="conv3x3"),
    pytest.param(ops.conv3x3, lambda: make.conv3x3(3, 4, (64, 32), 64, NETWORK, skip=(64, 32), style=True), id="conv3x3-two"),
    pytest.param(ops.conv3x3, lambda: make.conv3x3(3, 7, (24,), 40, NETWORK, stride=2, raw=False), id="conv3x3-halved"),
    pytest.param(ops.conv3x3, lambda: make.conv3x3(0, 4, (64,), 64, NETWORK, style=True), id="conv3x3-empty"),
    pytest.param(ops.conv_up, lambda: make.conv_up(3, 4, 64, 64, NETWORK, results=2), id="conv_up"),
    pytest.param(ops.conv_in, lambda: make.conv_in(3, (3, 8, 8), 2, 64, NETWORK), id="conv_in"),
    pytest.param(ops.conv_in, lambda: make.conv_in(3, (3, 6, 6), 1, 24, NETWORK, results=0), id="conv_in-odd"),
    pytest.param(ops.conv_out, lambda: make.conv_out(3, 4, 64, 3, 2, NETWORK), id="conv_out"),
]


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments())


def sampled(x, x0, m, model_input, history, table, row, seeds, ids, guidance):
    """Every op in one graph, with something to fuse around them."""
    words = ops.noise_words(seeds, ids, row, 4)
    x = x + ops.normal(seeds, ids, row, x[0].numel()).view(x.shape)
    noisy, target = ops.add_noise(x, ids % 6, table[:, :4].contiguous(), None, seeds, ids, row, True)
    x = x * 1.5
    ops.solver_step(x, x0, m, model_input, history, table, row, seeds, ids, guidance)
    before, guess = ops.scheduler_step(x0, x * 2, table[:, :11].contiguous(), ids % 6, None, seeds, ids, None, x0, None, True)
    return words, x + 1, x0, model_input, history * 2, noisy, target, before, guess


@pytest.mark.parametrize(("slots", "variance"), [(0, False), (3, True)])
def test_compile_through_every_op(slots, variance):
    backend = "inductor" if CUDA or shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(sampled, fullgraph=True, backend=backend)
    for n in (2, 3):
        arguments = solver_step_arguments(n, halves=2, slots=slots, variance=variance)
        for got, wanted in zip(compiled(*map(torch.clone, arguments)), sampled(*map(torch.clone, arguments)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5)


def test_a_fused_network_is_one_graph():
    """Its launches are opaque to the compiler, which may fuse what stands between them: nothing, here."""
    network = FusedUNet(small_network().to(DEVICE, NETWORK))
    x, t = torch.randn(3, *SMALL.shape, device=DEVICE).to(NETWORK), torch.arange(3, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, t, t), network(x, t, t))


@pytest.mark.skipif(CUDA, reason="on a GPU the op is the kernel, tested against the reference")
@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_the_body_is_the_reference(op, arguments, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)  # the kernels for a CPU have tests of their own
    given = arguments()
    got, wanted = ([v.clone() if isinstance(v, torch.Tensor) else v for v in given] for _ in range(2))
    results = op(*got), getattr(reference, op._opoverload._schema.name.split("::")[1])(*wanted)
    for g, w in zip((*got, results[0]), (*wanted, results[1]), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


def test_there_is_no_gradient():
    x0, *rest = add_noise_arguments(3, given=True, target=False)
    x_t, _ = ops.add_noise(x0.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="autograd"):
        x_t.sum().backward()


def test_triton_waits_for_a_cuda_tensor():
    """torch itself imports Triton at the first call of any op; the kernels stay out even then."""
    code = """
import sys, torch
from fastdiff import ops
first = "triton" in sys.modules
ops.normal(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 4)
print(first, any(name.startswith("fastdiff.kernels.") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stdout + done.stderr


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("slots", "variance"), [(0, False), (3, True)])
def test_captured_launch_serves_every_row(slots, variance):
    """One captured solver_step, replayed after the row counter moved, is the step of the new row."""
    arguments = solver_step_arguments(65, slots=slots, variance=variance)
    table = arguments[5]
    table.mul_(torch.linspace(0.5, 1.0, 6, device=DEVICE)[:, None])
    table[:, reference.COLUMNS.index("slot")] = torch.tensor([1, -1, 2, 0, 1, -1], device=DEVICE)
    expected = [v.clone() for v in arguments]
    saved = [v.clone() for v in arguments]
    ops.solver_step(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.solver_step(*arguments)
    for v, s in zip(arguments, saved, strict=True):
        v.copy_(s)
    for i in range(6):
        arguments[6].fill_(i)
        expected[6].fill_(i)
        graph.replay()
        ops.solver_step(*expected)
        assert all(torch.equal(v, e) for v, e in zip(arguments, expected, strict=True))

"""The kernels in C beside their definitions: noise, norms, convolutions by Winograd's method and residual blocks; the way without a compiler; what of a
network is replaced, and that it follows its weights."""

import collections
import concurrent.futures
import contextlib
import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import SMALL, block_definition, blocks, guarded, in_memory_of_its_own, small_network, untouched
from torch import nn

import fastdiff
from fastdiff import Sampler, Schedule, UNetConfig, cpu, native, ops, reference
from fastdiff.cpu import WinogradConv2d
from fastdiff.unet import ResBlock
from fastdiff.unet2d import Resnet, UNet2D, UNet2DConfig


@pytest.fixture(params=["in C", "without C"])
def way(request, monkeypatch):
    """Both ways that a machine may have. This one has a compiler, as any has that runs the tests."""
    assert native.available()
    if request.param == "without C":
        monkeypatch.setattr(native, "available", lambda: False)
    return request.param


def convolution(c_in=64, c_out=96, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(c_in + c_out)
        return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias).requires_grad_(False)


def packed(c):
    replaced = WinogradConv2d(c)
    replaced.pack()
    return replaced


def images(n, c, h, w):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(n)).to(memory_format=torch.channels_last)


def exact(c, x):
    return nn.functional.conv2d(x.double(), c.weight.double(), None if c.bias is None else c.bias.double(), padding=1)


@contextlib.contextmanager
def by_default(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_defaults_of_the_process_have_no_part_in_it(dtype, device, way):
    """What C writes is fp32, in memory that there is so much of."""
    network = small_network(config=UNetConfig(channels=(64, 64), blocks=1, middle=1, num_classes=3))
    z, call = torch.ones(5, 3, 16, 16), {"labels": [0, 1, 2, 0, 1], "guidance": 2.0}

    def made():
        sampler = Sampler(network, Schedule.linear(50), shape=(3, 16, 16), num_classes=3, steps=3, solver="ddpm")
        images = sampler(5, **call), sampler(5, noise=lambda row: z, **call), *sampler.trajectory(2, 2, labels=1)[2:]
        return *images, fastdiff.normal(3, torch.tensor([0, 1], device="cpu"), 2, (3, 5))

    wanted = made()
    with by_default(dtype, device):
        found = made()
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_noise_is_the_definition(n, apart):
    """Words to the bit, of seeds and ids of 64 bits; and a counter for all, or one for each, of more than 32 bits."""
    g = torch.Generator().manual_seed(n)
    seeds, ids = (torch.randint(-(1 << 63), (1 << 63) - 1, (n,), generator=g) for _ in range(2))
    counter = torch.randint(0, 1 << 40, (n if apart else 1,), generator=g)
    for quads in (0, 1, 64, 65, 200):
        assert torch.equal(native.noise_words(seeds, ids, counter, quads), reference.noise_words(seeds, ids, counter, quads))
    for numel in (0, 1, 3, 256, 257, 768):
        made, wanted = native.normal(seeds, ids, counter, numel), reference.normal(seeds, ids, counter, numel)
        assert made.shape == (n, numel) and made.dtype == torch.float32
        torch.testing.assert_close(made, wanted, atol=2e-6, rtol=0)


def test_noise_is_normal_to_the_last_bits():
    """Of ten million numbers none is farther than 1e-6 from what its words say, in fp64."""
    seeds, ids, row = torch.zeros(1000, dtype=torch.int64), torch.arange(1000), torch.tensor([5])
    made = native.normal(seeds, ids, row, 10_000).double().view(1000, 2500, 2, 2)
    words = reference.noise_words(seeds, ids, row, 2500).view(1000, 2500, 2, 2)
    u = words[..., 0].float().mul(2.0**-32).add(2.0**-33).double()
    angle = words[..., 1].to(torch.int32).float().mul(1.4629180792671596e-09).double()
    exact = u.log().mul(-2).sqrt()[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    assert (made - exact).abs().max() < 1e-6
    assert exact.abs().max() > 5


def test_noise_touches_its_own_alone():
    for numel in (5, 768):
        outer, z = guarded(3 * numel, 7.0)
        columns = [torch.arange(3) for _ in range(3)]
        native._library().fastdiff_normal(*(column.data_ptr() for column in columns), 1, z.data_ptr(), 3, numel)
        assert untouched(outer) and torch.equal(z.view(3, numel), native.normal(*columns, numel))


@pytest.mark.parametrize("op", ["add_noise", "scheduler_step"])
def test_an_operation_makes_its_noise_in_c(op, monkeypatch):
    """And without a compiler as its definition does; both to rounding."""
    g = torch.Generator().manual_seed(0)
    x, m, ids, calls, plain = torch.randn(3, 3, 4, 4, generator=g), torch.randn(3, 3, 4, 4, generator=g), torch.arange(3), [], native.normal
    monkeypatch.setattr(native, "normal", lambda *args: calls.append(args) or plain(*args))
    if op == "add_noise":
        table = torch.rand(2, 4, generator=g)
        given = (x, torch.tensor([0, 1, 1]), table, None, ids, ids, torch.tensor([3]), True)
    else:
        table = torch.rand(3, len(reference.STEP_COLUMNS), generator=g)
        table[:, reference.STEP_COLUMNS.index("clip")], table[:, -1] = 9, torch.arange(3)
        given = (m, x, table, ids, None, ids, ids, None, None, None, False)
    in_c = getattr(ops, op)(*given)
    assert len(calls) == 1
    monkeypatch.setattr(native, "available", lambda: False)
    for ours, theirs in zip(in_c, getattr(ops, op)(*given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert len(calls) == 1


STEPS = {
    "plain": {},
    "no noise": {"s": 0.0},
    "history, a slot": {"history": True, "slot": 1.0},
    "history, none kept": {"history": True, "slot": -1.0, "h1": 0.0},
    "two halves": {"halves": True},
    "two halves of input, one of m": {"wide": True},
    "a learned variance": {"learned": True},
    "a learned variance, two halves": {"learned": True, "halves": True},
    "noise that is given": {"given": True},
    "no clipping": {"clip": float("inf")},
    "coefficients that ignore": {"c": 0.0, "h0": 0.0, "h1": 0.0, "h2": 0.0, "s": 0.0, "slot": -1.0, "history": True, "nothing": True},
}


def step_arguments(shape, n, history=False, halves=False, wide=False, learned=False, given=False, nothing=False, **columns):
    """Of `solver_step`, with a row of random coefficients but for those that are said. nothing: what they ignore is NaN."""
    g = torch.Generator().manual_seed(n)

    def random(*size):
        return torch.randn(size, generator=g)

    table = 0.5 * random(3, len(reference.COLUMNS))
    for name, value in {"clip": 1.0, "slot": -1.0, "log_s": 0.3, **columns}.items():
        table[1, reference.COLUMNS.index(name)] = value
    x, x0 = random(n, *shape), random(n, *shape)
    m = random(n << halves, shape[0] << learned, *shape[1:])
    kept = random(reference.SLOTS if history else 0, n, *shape)
    if nothing:
        x0.fill_(torch.nan)
        kept.fill_(torch.nan)
    seeds, ids = (torch.randint(-(1 << 62), 1 << 62, (n,), generator=g) for _ in range(2))
    noise = torch.full_like(x, torch.nan) if nothing else random(n, *shape) if given else None
    return [x, x0, m, random(n << (halves or wide), *shape), kept, table, torch.tensor([1]), seeds, ids, 1 + random(n), noise]


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 5), (2, 13, 11)])
@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_its_definition(name, n, shape):
    ours, theirs = step_arguments(shape, n, **STEPS[name]), step_arguments(shape, n, **STEPS[name])
    before = [tensor.clone() for tensor in ours[5:10]]
    assert native.steps(*ours[:6], *ours[9:])
    ops.solver_step(*ours)
    reference.solver_step(*theirs)
    for one, other in zip(ours[:5], theirs[:5], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-6, equal_nan=STEPS[name].get("nothing", False))
    assert all(map(torch.equal, ours[5:10], before))
    again = step_arguments(shape, n, **STEPS[name])
    again[6] = again[6].int()
    ops.solver_step(*again)
    assert torch.equal(again[3], ours[3])
    if STEPS[name].get("nothing"):
        assert all(tensor.isfinite().all() for tensor in (ours[0], ours[1], ours[3]))


def test_a_number_that_is_none_stays_so_in_a_step():
    arguments = step_arguments((3, 8, 8), 2)
    arguments[2][1, 2, 3, 4] = torch.nan
    ops.solver_step(*arguments)
    x, x0, _, given, *_ = arguments
    for made in (x, x0, given):
        assert made.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


def test_what_a_network_says_may_be_of_any_dtype_and_layout():
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, lambda m: m.to(memory_format=torch.channels_last)):
        ours, theirs = (step_arguments((3, 8, 8), 2) for _ in range(2))
        ours[2] = change(ours[2])
        theirs[2] = ours[2].float().contiguous()
        ops.solver_step(*ours)
        native.solver_step(*theirs)
        assert all(map(torch.equal, ours[:2], theirs[:2]))


def test_a_step_of_other_dtypes_is_the_definitions():
    for change in ({3: lambda given: given.bfloat16()}, {10: lambda noise: noise.double()}):
        ours, theirs = (step_arguments((3, 8, 8), 2, given=True) for _ in range(2))
        for arguments in (ours, theirs):
            for i, changed in change.items():
                arguments[i] = changed(arguments[i])
        assert not native.steps(*ours[:6], *ours[9:])
        ops.solver_step(*ours)
        reference.solver_step(*theirs)
        assert all(map(torch.equal, ours[:4], theirs[:4]))


@pytest.mark.parametrize("row", [-1, 3, 1 << 40])
def test_a_step_by_a_row_that_there_is_not_is_refused(row):
    arguments = step_arguments((3, 8, 8), 2)
    x = arguments[0].clone()
    arguments[6] = torch.tensor([row])
    with pytest.raises(AssertionError, match="row is not one of the table's"):
        native.solver_step(*arguments)
    assert torch.equal(arguments[0], x)


def test_a_step_touches_its_own_alone():
    for name in STEPS:
        arguments = step_arguments((3, 5, 5), 3, **STEPS[name])
        outers = []
        for i in (0, 1, 3, 4):
            outer, inner = guarded(arguments[i].numel(), 7.0, arguments[i].flatten())
            arguments[i] = inner.view(arguments[i].shape)
            outers.append(outer)
        m = arguments[2]
        arguments[2] = guarded(m.numel(), torch.nan, m.flatten())[1].view(m.shape)
        native.solver_step(*arguments)
        assert all(map(untouched, outers))
        assert all(tensor.isfinite().all() for tensor in (arguments[0], arguments[1], arguments[3]))


SHAPES = [
    (0, 64, 64, 4, 4),
    (1, 16, 32, 4, 4),
    (7, 48, 32, 8, 8),
    (3, 16, 96, 4, 12),
    (2, 16, 32, 16, 4),
    (2, 128, 64, 16, 16),
    (33, 64, 64, 8, 8),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_is_a_convolution(shape, bias):
    n, c_in, c_out, h, w = shape
    c, x = convolution(c_in, c_out, bias), images(n, c_in, h, w)
    made = reference.winograd_conv3x3(x.double(), reference.winograd_weight(c.weight).double(), None if c.bias is None else c.bias.double())
    # Of rounding there is that of the packed weights alone, to fp32.
    torch.testing.assert_close(made, exact(c, x).to(memory_format=torch.channels_last), atol=1e-5, rtol=0)
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_definition(shape, bias):
    n, c_in, c_out, h, w = shape
    c, x = convolution(c_in, c_out, bias), images(n, c_in, h, w)
    weight = reference.winograd_weight(c.weight)
    assert native.available()
    for kept in native._FREE:
        kept.fill_(torch.nan)
    made, wanted = native.winograd_conv3x3(x, weight, c.bias), reference.winograd_conv3x3(x, weight, c.bias)
    assert made.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made, wanted, atol=4e-5, rtol=0)
    # Sums of 36 terms up to 8 times x and weights up to 1 / 4: some 100 units in the last place of the largest value (Lavin & Gray 2016, table 5).
    torch.testing.assert_close(made.double(), exact(c, x), atol=4e-5, rtol=0, check_stride=False)


def test_a_matrix_in_panels():
    matrix = torch.randn(3, 5, 64)
    made = reference.panels(matrix)
    assert made.shape == (3, 2, 5, 32)
    assert torch.equal(made[1, 1], matrix[1, :, 32:])


def test_other_layouts_are_taken():
    c = convolution(32, 32)
    weight, x = reference.winograd_weight(c.weight), images(4, 32, 8, 8)
    wanted = native.winograd_conv3x3(x, weight, c.bias)
    for other in (x.contiguous(), x.repeat_interleave(2, 0)[::2], torch.cat([x, x], 1)[:, 32:], x.flip(0).flip(0)):
        assert torch.equal(native.winograd_conv3x3(other, weight.transpose(2, 3).contiguous().transpose(2, 3), c.bias), wanted)


def definition(block, x, beside, style):
    def convolve(x, weight, bias):
        return reference.winograd_conv3x3(x, weight.double(), bias)

    def skip(x, panels):
        return torch.einsum("nchw,pcd->npdhw", x, panels.double()).flatten(1, 2)

    return block_definition(block, x, beside, style, convolve, skip)


def layer(c_in, c_out, norm=True, bias=True, silu=True):
    c = convolution(c_in, c_out, bias)
    gamma, beta = 1 + 0.1 * images(1, c_in, 1, 1).flatten(), 0.1 * images(2, c_in, 1, 1)[1].flatten()
    return native.Layer(native.Norm(gamma, beta, 4, 1e-5, silu) if norm else None, reference.winograd_weight(c.weight), c.bias)


def skip(c_in, c_out):
    return reference.panels(convolution(c_in, c_out).weight[:, :, 1, 1].t())


BLOCKS = blocks(layer, skip, least=16, beside=32)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_definition(name, styled, n):
    c, c_beside, build = BLOCKS[name]
    block = build()
    x, beside = images(n, c, 8, 4), images(n, c_beside, 8, 4) if c_beside else None
    style = torch.randn(n, 1000, generator=torch.Generator().manual_seed(1))[:, 7 : 7 + block.style] if styled and block.style else None
    made = block(x, beside, style)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == torch.float32
    # Two Winograd convolutions one after the other, of numbers to 5.
    torch.testing.assert_close(made.double(), definition(block, x, beside, style), atol=1e-4, rtol=0, check_stride=False)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_kernels_touch_their_own_alone(name, cores):
    """What they read stands among NaN, and what they write among sevens."""
    c, c_beside, build = BLOCKS[name]
    block, n, h, w = in_memory_of_its_own(build()), 5, 4, 8
    _, x = guarded(n * h * w * c, torch.nan, images(n, c, h, w))
    _, beside = guarded(n * h * w * c_beside, torch.nan, images(n, c_beside, h, w)) if c_beside else (None, None)
    _, style = guarded(n * block.style, torch.nan, torch.ones(n, block.style)) if block.style else (None, None)
    part = 2
    used, scratch = guarded(native._scratch_numel(part, h, w, block.widest), 7.0, torch.tensor(torch.nan))
    outer, y = guarded(n * h * w * block.c_out, 7.0)
    native._library().fastdiff_block(
        block.told, x.data_ptr(), None if beside is None else beside.data_ptr(), c_beside, None if style is None else style.data_ptr(),
        block.style, y.data_ptr(), n, h, w, part, cores, scratch.data_ptr(),
    )  # fmt: skip
    assert untouched(outer) and untouched(used) and y.isfinite().all()


@pytest.mark.parametrize("name", ["a block", "channels beside it"])
def test_bits_of_an_image_do_not_depend_on_the_others(name):
    c, c_beside, build = BLOCKS[name]
    block, n = build(), 67
    x, beside = images(n, c, 4, 4), images(n, c_beside, 4, 4) if c_beside else None
    style = torch.randn(n, block.style, generator=torch.Generator().manual_seed(1))
    whole = block(x, beside, style)
    for start, stop in ((0, 1), (5, 7), (30, 61), (66, 67)):
        part = slice(start, stop)
        assert torch.equal(block(x[part], None if beside is None else beside[part], style[part]), whole[part])


@pytest.mark.parametrize("cores", [2, 3, 5, 8])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_team_makes_the_bits_of_one(name, cores, monkeypatch):
    """Of more than there are channels to share, too; in one part and in several."""
    c, c_beside, build = BLOCKS[name]
    block, n = build(), 5
    x, beside = images(n, c, 8, 4), images(n, c_beside, 8, 4) if c_beside else None
    style = torch.randn(n, block.style, generator=torch.Generator().manual_seed(1)) if block.style else None
    alone = block(x, beside, style)
    for part in (1, 2, 5):
        monkeypatch.setattr(native, "_part", lambda n, tiles, channels, part=part: part)
        with native.team(cores):
            for _ in range(5):
                assert torch.equal(block(x, beside, style), alone)
    assert native._TEAM.cores == 1


def test_a_team_is_of_as_many_as_are_asked_for():
    """Not of one, which would make the same bits; unless the compiler has no OpenMP."""
    block, x, seen = BLOCKS["a block"][2](), images(1, 64, 4, 4), []
    tasks = Path(f"/proc/{os.getpid()}/task")

    def run():  # a thread of its own has a team of its own
        before = {*tasks.iterdir()}
        for cores in (4, 100):
            with native.team(cores):
                block(x)
            seen.append(len({*tasks.iterdir()} - before))

    if not tasks.exists():
        pytest.skip("threads are counted in /proc")
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [3, native.MOST_CORES - 1]


FORK = """
import os, torch
from fastdiff import native, reference
weight, x = reference.winograd_weight(torch.randn(64, 64, 3, 3)), torch.randn(1, 64, 8, 8)
with native.team(2):
    made = native.winograd_conv3x3(x, weight, None)
    child = os.fork()
    same = torch.equal(native.winograd_conv3x3(x, weight, None), made)
with native.team(2):
    same &= torch.equal(native.winograd_conv3x3(x, weight, None), made)
if not child:
    os._exit(not same)
assert same and os.waitpid(child, 0)[1] == 0
"""


def test_a_fork_does_not_wait_for_its_parents_threads():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


STRIDED = [(0, 3, 32, 4, 4, 2), (1, 3, 64, 5, 7, 2), (3, 64, 96, 8, 8, 2), (5, 17, 32, 1, 1, 2), (2, 16, 32, 6, 9, 1), (40, 5, 32, 2, 3, 3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_a_direct_convolution_is_its_definition(shape, bias):
    n, c_in, c_out, h, w, step = shape
    c, x = convolution(c_in, c_out, bias), images(n, c_in, h, w)
    weight = reference.conv_weight(c.weight)
    made = native.conv3x3(x, weight, c.bias, step)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == torch.float32
    wanted = nn.functional.conv2d(x.double(), c.weight.double(), None if c.bias is None else c.bias.double(), stride=step, padding=1)
    torch.testing.assert_close(made.double(), wanted, atol=1e-5, rtol=0, check_stride=False)
    for i in range(n):
        assert torch.equal(native.conv3x3(x[i : i + 1], weight, c.bias, step), made[i : i + 1])
    for cores in (2, 3, 8):
        with native.team(cores):
            assert torch.equal(native.conv3x3(x.contiguous(), weight, c.bias, step), made)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_a_direct_convolution_touches_its_own_alone(shape, cores):
    n, c_in, c_out, h, w, step = shape
    c = convolution(c_in, c_out)
    _, x = guarded(n * h * w * c_in, torch.nan, images(n, c_in, h, w))
    packed_weight = reference.conv_weight(c.weight)
    _, weight = guarded(packed_weight.numel(), torch.nan, packed_weight)
    _, bias = guarded(c_out, torch.nan, c.bias)
    outer, y = guarded(n * -(-h // step) * -(-w // step) * c_out, 7.0)
    used, scratch = guarded(cores * native.MOST_ROWS * 9 * c_in, 7.0, torch.tensor(torch.nan))
    native._library().fastdiff_conv3x3(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), n, h, w, c_in, c_out, step, cores, scratch.data_ptr()
    )
    assert untouched(outer) and untouched(used) and y.isfinite().all()


@pytest.mark.parametrize("tiles", [1, 24, 100])
def test_parts_are_the_whole(tiles, monkeypatch):
    c, x = convolution(64, 64), images(17, 64, 8, 8)
    weight = reference.winograd_weight(c.weight)
    whole = native.winograd_conv3x3(x, weight, c.bias)
    block, style = ResBlock(64, 64, 16).eval().requires_grad_(False), images(17, 128, 1, 1)[:, :, 0, 0]
    block.conv2.weight.copy_(convolution(64, 64).weight)  # begins as 0
    with torch.no_grad():
        fused = cpu.faster(nn.ModuleList([block]))[0]
        cpu.pack(fused)
        all_of_it = fused(x, style)
        torch.testing.assert_close(all_of_it, block(x, style), atol=5e-5, rtol=0)
        monkeypatch.setattr(native, "_part", lambda n, of_one, channels: max(1, tiles // of_one))
        assert torch.equal(native.winograd_conv3x3(x, weight, c.bias), whole)
        assert torch.equal(fused(x, style), all_of_it)


def test_parts_are_even_and_as_large_as_the_weights():
    assert [native._part(n, 4, 64) for n in (0, 1, 16, 17, 100)] == [1, 1, 16, 9, 15]
    assert native._part(100, 4, 128) == 25 and native._part(100, 1, 16) == 50 and native._part(5, 256, 64) == 1


def test_inference_mode_leaves_nothing_behind():
    c, x = convolution(32, 32), images(3, 32, 8, 8)
    weight = reference.winograd_weight(c.weight)
    native._FREE.clear()
    with torch.inference_mode():
        first = native.winograd_conv3x3(x, weight, c.bias)
    assert torch.equal(native.winograd_conv3x3(x, weight, c.bias), first)


def test_threads_do_not_meet():
    c = convolution(64, 64)
    weight, given = reference.winograd_weight(c.weight), [images(n, 64, 8, 8) for n in (5, 9, 16, 3)]
    wanted = [native.winograd_conv3x3(x, weight, c.bias) for x in given]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            made = pool.map(lambda x: native.winograd_conv3x3(x, weight, c.bias), given)
            assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("false", "false cannot compile the kernels: exit code 1$"),
        ("/nowhere/cc -O2", "/nowhere/cc cannot compile the kernels: .*No such file"),
        (None, "there is no C compiler"),
    ],
)
def test_without_a_compiler_it_says_so_to_the_log(compiler, said, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO, logger="fastdiff.native"):
        assert native._library.__wrapped__() is None
    (record,) = caplog.records
    assert "networks by PyTorch alone: " in record.getMessage() and "\n" not in record.getMessage()
    assert re.search(said, record.getMessage())


def test_a_compiler_without_openmp_will_do(tmp_path, monkeypatch, caplog):
    """Every call is then one core's."""
    compiler = tmp_path / "cc"
    own = os.environ.get("CC", "cc")
    compiler.write_text(f'#!/bin/sh\nfor flag; do [ "$flag" = -fopenmp ] && exit 1; done\nexec {own} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level(logging.INFO, logger="fastdiff.native"):
        library = native._library.__wrapped__()
    assert library is not None and not caplog.records
    block, x = BLOCKS["a block"][2](), images(3, 64, 4, 4)
    wanted = block(x)
    monkeypatch.setattr(native, "_library", lambda: library)
    with native.team(2):
        assert torch.equal(block(x), wanted)


def test_a_library_is_compiled_once(tmp_path, monkeypatch):
    """Another process, here another call, of the same source, compiler and processor takes what the first has kept; where it cannot, it compiles."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    calls, compiled = [], native._compiled
    monkeypatch.setattr(native, "_compiled", lambda *args: calls.append(args) or compiled(*args))
    folder = tmp_path / "cache" / "native"

    def compiles():
        calls.clear()
        assert native._library.__wrapped__() is not None
        return bool(calls)

    assert [compiles() for _ in range(3)] == [True, False, False]
    (kept,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    # A folder that others can write to is not trusted; a file that is damaged, or for another processor, is not taken.
    folder.chmod(0o770)
    assert compiles()
    folder.chmod(0o700)
    assert not compiles()
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert compiles() and len(list(folder.iterdir())) == 2
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DANOTHER"))
    assert compiles() and len(list(folder.iterdir())) == 3
    monkeypatch.setattr(native, "_key", lambda compiler: "damaged")
    (folder / "cpu-damaged.so").write_bytes(kept.read_bytes()[:1000])
    assert [compiles(), compiles()] == [True, False]
    # Nowhere to keep it.
    monkeypatch.setenv("FASTDIFF_CACHE", "/dev/null/nowhere")
    assert [compiles(), compiles()] == [True, True]


def test_a_library_that_cannot_be_loaded_is_none(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("noexec")))
    assert native._library.__wrapped__() is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [0, 1, 17, 32])
def test_values_are_the_direct_convolutions(n, layout, bias, way):
    c = convolution(bias=bias)
    x = images(n, 64, 4, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(packed(c)(x).double(), exact(c, x), atol=2e-5, rtol=0, check_stride=False)


def test_each_pixel_of_the_border_sees_zeros_around(way):
    """An image for each pixel, weights of one: a pixel reaches its neighbours and no others."""
    c = convolution(64, 64, bias=False)
    c.weight.copy_(torch.eye(64)[:, :, None, None].expand(64, 64, 3, 3))
    replaced = packed(c)
    for size in (4, 8) if way == "in C" else (4,):
        x = torch.zeros(size * size, 64, size, size)
        x[:, 5] = torch.eye(size * size).view(size * size, size, size)
        with torch.no_grad():
            torch.testing.assert_close(replaced(x), nn.functional.conv2d(x, c.weight, padding=1), atol=1e-5, rtol=0, check_stride=False)


def test_other_sizes_are_left_to_the_convolution(way):
    c = convolution()
    for size in ((2, 2), (5, 4), (4, 6), *(((8, 8), (4, 8)) if way == "without C" else ())):
        x = images(16, 64, *size)
        with torch.no_grad():
            assert torch.equal(packed(c)(x), c(x))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"))]
)
def test_a_compiler_sees_one_operation(backend):
    model, x = nn.Sequential(nn.SiLU(), packed(convolution(64, 64)), nn.SiLU()).eval(), images(16, 64, 8, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        made = torch.compile(model, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(made, model(x), atol=1e-5, rtol=1e-6)
        assert made.stride() == model(x).stride()


def test_a_single_image_has_the_bits_that_it_has_among_others():
    """Through every kind of convolution: in C, with channels filled up or strides, and those of the library."""
    model = nn.Sequential(
        convolution(12, 64),
        convolution(64, 64),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 12, 3, padding=1),
        nn.Conv2d(12, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 12, 2),
    )
    twin = cpu.faster(model.requires_grad_(False).to(memory_format=torch.channels_last))
    cpu.pack(twin)
    assert [type(m) for m in twin] == [WinogradConv2d] * 2 + [cpu.StridedConv2d, WinogradConv2d] + [cpu.PairedConv2d] * 2
    x = images(5, 12, 8, 8)
    with torch.no_grad():
        whole = twin(x)
        for i in range(5):
            assert torch.equal(twin(x[i : i + 1]), whole[i : i + 1])
        torch.testing.assert_close(whole, model(x), atol=1e-5, rtol=0)
        for i, c in ((0, 12), (2, 64), (5, 12)):
            alone = images(1, c, 8, 8)[0]
            assert torch.equal(twin[i](alone), model[i](alone)), "an image alone, without a batch"


def test_gradients_are_the_convolutions():
    c, x = convolution(64, 64).requires_grad_(True), images(16, 64, 8, 8).requires_grad_(True)
    packed(c)(x).square().sum().backward()
    found = x.grad, c.weight.grad
    x.grad = c.weight.grad = None
    c(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(found, (x.grad, c.weight.grad), strict=True))


def test_which_channels_are_taken(way):
    in_c = way == "in C"
    for c_in, c_out, fits, native_too in (
        (64, 64, True, in_c),
        (72, 64, True, in_c),
        (64, 72, True, in_c),
        (16, 32, in_c, in_c),
        (64, 48, in_c, in_c),
        (12, 64, in_c, in_c),
        (64, 3, in_c, in_c),
    ):
        assert WinogradConv2d.fits(convolution(c_in, c_out)) == fits, (c_in, c_out)
        if fits:
            assert WinogradConv2d(convolution(c_in, c_out)).native is native_too


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(64, 48, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3, padding=1, stride=3),
        nn.Conv2d(64, 64, 3, padding=1).bfloat16(),
        nn.ConvTranspose2d(64, 64, 3, padding=1),
    ],
    ids=str,
)
def test_what_it_does_not_compute_is_not_replaced(module):
    assert not WinogradConv2d.fits(module)
    model = nn.Sequential(module)
    assert cpu.faster(model) is model


def test_a_model_with_it_shares_its_weights_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Sequential(convolution(64, 64)), nn.SiLU(), convolution(64, 64)).train()
    before = list(model.named_modules())
    twin = cpu.faster(model)
    assert list(model.named_modules()) == before
    assert model.training
    assert not twin.training
    assert [type(m) for m in twin.modules()].count(WinogradConv2d) == 2
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    cpu.pack(twin)
    with torch.no_grad():
        for size in (4, 8, 6):
            x = images(16, 64, size, size)
            torch.testing.assert_close(twin(x), model(x), atol=5e-5, rtol=0)


def test_a_module_may_stand_in_several_places(way):
    network = small_network(config=UNetConfig(shape=(3, 8, 8), channels=(64, 64), blocks=2, middle=3, group=16, num_classes=3))
    network.middle[1].conv1, network.middle[1].conv2 = network.middle[0].conv1, network.middle[0].conv1
    network.middle[2], network.shrink[0] = network.middle[0], nn.Sequential(network.shrink[0])
    sampler = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=3)
    x, t, labels = images(3, 3, 8, 8), torch.tensor([4, 9, 30]), torch.tensor([0, 1, 3])
    for _ in range(2):
        sampler(2, labels=1)
        with torch.no_grad():
            torch.testing.assert_close(sampler._network.model(x, t, labels), network(x, t, labels), atol=1e-4, rtol=1e-4)
            network.middle[0].conv1.weight.mul_(1.5)


NETWORKS = {
    "UNet": lambda: small_network(config=UNetConfig(channels=(64, 96), blocks=1, middle=1, group=16, num_classes=3)),
    "UNet2D": lambda: network_2d(),
    "UNet2D, scale_shift": lambda: network_2d(resnet_time_scale_shift="scale_shift"),
}


def network_2d(**options):
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    config = UNet2DConfig(
        sample_size=16, block_out_channels=(64, 96), norm_num_groups=8, down_block_types=down, up_block_types=up, **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2D(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_what_it_said(name, way):
    model = NETWORKS[name]()
    twin = cpu.faster(model)
    cpu.pack(twin)
    replaced = sum(isinstance(m, WinogradConv2d) for m in twin.modules())
    # With the first and the last, whose few channels C fills up.
    assert replaced == (11 if name == "UNet" else 25) + 2 * (way == "in C")
    assert sum(isinstance(m, cpu.StridedConv2d) for m in twin.modules()) == (way == "in C")
    x, t = images(17, 3, 16, 16), torch.arange(17) * 7
    given = (x, t, t % 3) if name == "UNet" else (x, t)
    runs = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        call, norm, direct = native.Block.__call__, native.group_norm_silu, native.conv3x3
        patch.setattr(native.Block, "__call__", lambda block, *args: runs.append(len(block.layers)) or call(block, *args))
        patch.setattr(native, "group_norm_silu", lambda *args: runs.append("norm") or norm(*args))
        patch.setattr(native, "conv3x3", lambda *args: runs.append("direct") or direct(*args))
        torch.testing.assert_close(twin(*given), model(*given), atol=1e-4, rtol=0)
    # Residual blocks, single convolutions, and the norm before the last.
    wanted = {2: 5 if name == "UNet" else 12, 1: 3, "norm": 1, "direct": 1}
    assert collections.Counter(runs) == (wanted if way == "in C" else {})


def resnet(c_in, c_out, factor=1.0, **options):
    config = UNet2DConfig(
        sample_size=16,
        block_out_channels=(64,),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **options,
    )
    return Resnet(c_in, c_out, 32, config, factor)


RESIDUAL = {
    "ResBlock": lambda: ResBlock(64, 64, 16),
    "ResBlock, skip": lambda: ResBlock(128, 64, 16),
    "Resnet": lambda: resnet(64, 64),
    "Resnet, shortcut, factor": lambda: resnet(128, 64, 1.4),
    "Resnet, scale_shift": lambda: resnet(128, 64, resnet_time_scale_shift="scale_shift"),
}


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (6, 4)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_residual_block_is_what_it_was(apart, size, name, way):
    """One whose sides 4 does not divide, too; what comes in in one part or two; and a style whose rows lie apart, as those of a network do."""
    block = RESIDUAL[name]().eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in block.parameters():
            nn.init.normal_(p, std=0.1)
    c_in, c_style = block.conv1.in_channels, 64 if name in ("Resnet", "Resnet, shortcut, factor") else 128
    x, style = images(16, c_in, *size), torch.randn(16, 1000, generator=torch.Generator().manual_seed(1))[:, 7 : 7 + c_style]
    given = (x[:, :48], style, x[:, 48:]) if apart else (x, style)
    fused = cpu.faster(nn.ModuleList([block]))[0]
    assert isinstance(fused, cpu.FusedResBlock) is (way == "in C")
    cpu.pack(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(*given), block(x, style), atol=2e-4, rtol=1e-5)
        assert fused(x[:0], style[:0]).shape == (0, 64, *size)


def test_a_number_that_is_none_stays_so():
    block = ResBlock(64, 64, 16).eval().requires_grad_(False)
    fused = cpu.faster(nn.ModuleList([block]))[0]
    cpu.pack(fused)
    x = images(16, 64, 8, 8)
    x[1, 5, 2, 3] = torch.nan
    with torch.no_grad():
        made = fused(x, torch.zeros(16, 128))
    assert isinstance(fused, cpu.FusedResBlock) and made[[0, *range(2, 16)]].isfinite().all() and made[1].isnan().any()


def test_other_dtypes_are_pytorchs():
    """bf16 on a CPU; and a network of which one convolution alone is in it."""
    model = NETWORKS["UNet"]().bfloat16()
    assert cpu.faster(model) is model
    block = ResBlock(64, 64, 16).eval().requires_grad_(False)
    block.conv2.bfloat16()
    kept = cpu.faster(nn.ModuleList([block]))[0]
    assert isinstance(kept, ResBlock) and isinstance(kept.conv1, WinogradConv2d) and isinstance(kept.conv2, nn.Conv2d)


def test_arguments_that_do_not_fit_are_refused():
    x, weight = images(2, 32, 8, 8), torch.zeros(36, 1, 32, 32)
    norm = native.Norm(torch.ones(32), torch.zeros(32), 2, 1e-5)
    layer, other = native.Layer(norm, weight, None), native.Layer(norm, torch.zeros(36, 2, 32, 32), None)
    block = native.Block([layer] * 2)
    for call in (
        lambda: native.winograd_conv3x3(images(2, 32, 6, 8), weight, None),
        lambda: native.winograd_conv3x3(x.double(), weight, None),
        lambda: native.winograd_conv3x3(x, torch.zeros(36, 1, 16, 32), None),
        lambda: native.winograd_conv3x3(x, torch.zeros(36, 1, 32, 16), None),
        lambda: native.winograd_conv3x3(x, weight, torch.zeros(31)),
        lambda: native.Block([layer] * 3),
        lambda: native.Block([other]),
        lambda: native.Block([other, layer]),
        lambda: native.Block([layer, layer._replace(norm=None)]),
        lambda: native.Block([layer._replace(norm=norm._replace(groups=5))] * 2),
        lambda: native.Block([layer], skip=torch.zeros(1, 16, 32)),
        lambda: native.Block([layer], skip=torch.zeros(1, 32, 32), alone=True),
        lambda: block(x, x),
        lambda: block(x[:, :16], x[:1, 16:]),
        lambda: block(x, None, torch.zeros(2, 32)),
        lambda: block(x, None, torch.zeros(1, 64)),
        lambda: native.Block([layer._replace(norm=None)])(x, None, torch.zeros(2, 64)),
        lambda: native.group_norm_silu(x.permute(0, 2, 3, 1), norm, torch.zeros(2, 64), torch.tensor([0, 2])),
    ):
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph_to_a_compiler(name):
    """In which convolutions alone are operations of ours."""
    model = NETWORKS[name]()
    twin = cpu.faster(model)
    cpu.pack(twin)
    x, t = images(17, 3, 16, 16), torch.arange(17) * 7
    given = (x, t, t % 3) if name == "UNet" else (x, t)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(*given), model(*given), atol=1e-4, rtol=0)


def test_gradients_pass_through_the_twin_as_through_the_network():
    model = NETWORKS["UNet"]()
    twin = cpu.faster(model)
    cpu.pack(twin)
    found = []
    for network in (model, twin):
        x = images(2, 3, 16, 16).requires_grad_(True)
        network(x, torch.tensor([3, 4]), torch.tensor([0, 1])).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


CHANGES = {
    "in place": lambda p: p.mul_(1.1),
    "by .data": lambda p: p.data.mul_(1.1),
    "in inference mode": torch.inference_mode()(lambda p: p.data.mul_(1.1)),
    "to others": lambda p: p.set_(p * 1.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "part", ["", "conv1.weight", "conv1.bias", "norm2.weight", "skip.bias", "grow.0.weight", "modulation.weight", "head.bias"]
)
def test_a_sampler_follows_weights_that_change(way, change, part):
    """Trained further or averaged, all of them or some, between two calls."""
    network = small_network(config=UNetConfig(shape=(3, 8, 8), channels=(64, 64), blocks=1, middle=1, group=16, num_classes=3))
    sampler = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=2, micro_batch=4)
    first = sampler(3, labels=1)
    assert any(isinstance(m, WinogradConv2d) for m in sampler._network.model.modules())
    with torch.no_grad():
        for name, p in network.named_parameters():
            if part in name:
                change(p)
    second = sampler(3, labels=1)
    fresh = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=2, micro_batch=4)(3, labels=1)
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "with gaps"])
def test_the_stamp_of_weights_sees_any_change(layout, dtype, way):
    weight = torch.arange(1000).reshape(5, 10, 4, 5).remainder(255).to(dtype)
    if layout == "channels-last":
        weight = weight.to(memory_format=torch.channels_last)
    elif layout == "with gaps":
        weight = weight.repeat_interleave(2, 3)[..., ::2]
    before = native.stamp([weight])
    assert native.stamp([weight]) == before != native.stamp([weight.clone()])
    for place in ((0, 0, 0, 0), (3, 1, 2, 0), (4, 9, 3, 4)):
        kept = weight[place].clone()
        weight.data[place] = 0 if kept else 1
        assert native.stamp([weight]) != before
        weight.data[place] = kept
        assert native.stamp([weight]) == before
    if dtype is not torch.bool:
        for dim in range(4):
            weight.data.copy_(weight.roll(1, dim))  # the same numbers, in other places
            assert native.stamp([weight]) != before
            weight.data.copy_(weight.roll(-1, dim))


@pytest.mark.parametrize("change", [torch.neg, lambda x: 2 * x, lambda x: x.bfloat16().float()], ids=["negated", "doubled", "rounded"])
def test_the_stamp_sees_a_change_of_all_numbers(change, way):
    """Of signs or exponents alone: differences that are multiples of high powers of two, and that a sum modulo one of them would lose."""
    for shape in ((4,), (256,), (64, 64, 3, 3), (256, 256, 3, 3)):
        weight = torch.tensor([1.1, -2.2, -3.3, 4.4]).repeat(torch.Size(shape).numel() // 4).reshape(shape)
        before = native.stamp([weight])
        weight.copy_(change(weight))
        assert native.stamp([weight]) != before, shape


def test_the_stamp_tells_tensors_apart(way):
    one, two, none = torch.ones(3), torch.zeros(3), torch.empty(0)
    numbers = [number for _, number in native.stamp([one, two, none, torch.zeros(4)])]
    assert len({*numbers[:2]}) == 2 and native.stamp([]) == ()
    assert [number for _, number in native.stamp([two, one, none])] == [numbers[1], numbers[0], numbers[2]]

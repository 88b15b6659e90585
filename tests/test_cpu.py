"""Convolutions by Winograd's method: the kernels in C beside their definition, the way without a compiler, what is replaced, and that it follows its
weights."""

import collections
import concurrent.futures
import ctypes
import logging
import re
import shutil

import pytest
import torch
from helpers import SMALL, small_network
from torch import nn

from fastdiff import Sampler, Schedule, UNetConfig, cpu, native, reference
from fastdiff.cpu import WinogradConv2d
from fastdiff.unet import ResBlock
from fastdiff.unet2d import UNet2D, UNet2DConfig


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


SHAPES = [
    (0, 64, 64, 4, 4),
    (1, 16, 32, 4, 4),
    (7, 32, 16, 8, 8),
    (3, 48, 80, 4, 12),
    (2, 16, 16, 16, 4),
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
    for scratch in native._FREE:
        for kept in scratch.kept.values():
            kept.fill_(torch.nan)
    made, wanted = native.winograd_conv3x3(x, weight, c.bias), reference.winograd_conv3x3(x, weight, c.bias)
    assert made.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made, wanted, atol=4e-5, rtol=0)
    # Sums of 36 terms up to 8 times x and weights up to 1 / 4: some 100 units in the last place of the largest value (Lavin & Gray 2016, table 5).
    torch.testing.assert_close(made.double(), exact(c, x), atol=4e-5, rtol=0, check_stride=False)


def test_other_layouts_are_taken():
    c = convolution(32, 32)
    weight, x = reference.winograd_weight(c.weight), images(4, 32, 8, 8)
    wanted = native.winograd_conv3x3(x, weight, c.bias)
    for other in (x.contiguous(), x.repeat_interleave(2, 0)[::2], torch.cat([x, x], 1)[:, 32:], x.flip(0).flip(0)):
        assert torch.equal(native.winograd_conv3x3(other, weight.transpose(1, 2).contiguous().transpose(1, 2), c.bias), wanted)


def test_the_kernels_touch_their_own_alone():
    """What they read stands among NaN, what they write among sevens."""
    library, n, h, w, c, plane, edge = native._library(), 3, 4, 8, 32, 6 * 32 + 16, 64

    def within(numel, around, fill=None):
        whole = torch.full((numel + 2 * edge,), around)
        inner = whole[edge : edge + numel]
        if fill is not None:
            inner.copy_(fill)
        return whole, inner

    def stand(whole):
        return bool((whole[:edge] == 7).all() and (whole[-edge:] == 7).all())

    def spread(inner):
        return torch.cat([inner, torch.zeros(plane - 6 * c)]).view(36, plane)

    _, x = within(n * h * w * c, torch.nan, torch.arange(n * h * w * c) % 97)
    parts = [within(size, torch.nan, torch.ones(size))[1] for size in (c, c, n * 2 * c)]
    norm = native.Norm(*parts[:2], 2, 1e-5, parts[2].view(n, 2 * c))
    used, scratch = within((4 + h * w) * c, 7.0)
    for told in (None, norm.struct()):
        outer, places = within(35 * plane + 6 * c, 7.0)
        library.fastdiff_winograd_into(x.data_ptr(), places.data_ptr(), told, n, h, w, c, plane, scratch.data_ptr())
        assert stand(outer) and stand(used) and spread(places)[:, : 6 * c].isfinite().all() and (spread(places)[:-1, 6 * c :] == 7).all()
    _, given = within(35 * plane + 6 * c, torch.nan)
    spread_over = given.as_strided((36, 6 * c), (plane, 1))
    given.fill_(torch.nan)
    spread_over.copy_(spread(places)[:, : 6 * c])
    _, bias = within(c, torch.nan, torch.ones(c))
    outer, more = within(35 * plane + 6 * c, 7.0)
    library.fastdiff_winograd_between(
        given.data_ptr(), bias.data_ptr(), norm.struct(), more.data_ptr(), n, h, w, c, plane, scratch.data_ptr()
    )
    assert stand(outer) and stand(used) and spread(more)[:, : 6 * c].isfinite().all() and (spread(more)[:-1, 6 * c :] == 7).all()
    for skip in (None, x.data_ptr()):
        outer, y = within(n * h * w * c, 7.0)
        library.fastdiff_winograd_out_of(given.data_ptr(), bias.data_ptr(), skip, y.data_ptr(), n, h, w, c, plane)
        assert stand(outer) and y.isfinite().all()


@pytest.mark.parametrize("size", [1, 40_000, 100_000])
def test_parts_that_fit_the_memory_are_the_whole(size, monkeypatch):
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
        monkeypatch.setattr(native, "SCRATCH", size)
        torch.testing.assert_close(native.winograd_conv3x3(x, weight, c.bias), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(fused(x, style), all_of_it, atol=1e-5, rtol=0)


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
    few = {"in C": [(15, 4, 4), (15, 8, 8)], "without C": [(16, 8, 8), (16, 4, 8)]}[way]
    for n, *size in ((16, 2, 2), (16, 5, 4), (16, 4, 6), *few):
        x = images(n, 64, *size)
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


def test_gradients_are_the_convolutions():
    c, x = convolution(64, 64).requires_grad_(True), images(16, 64, 8, 8).requires_grad_(True)
    packed(c)(x).square().sum().backward()
    found = x.grad, c.weight.grad
    x.grad = c.weight.grad = None
    c(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(found, (x.grad, c.weight.grad), strict=True))


def test_which_channels_are_taken(way):
    for c_in, c_out, fits in ((64, 64, True), (72, 64, True), (32, 64, False), (64, 48, False), (12, 64, False)):
        assert WinogradConv2d.fits(convolution(c_in, c_out)) == fits, (c_in, c_out)
    # Vectors of 16 channels are what C works on.
    assert WinogradConv2d(convolution(72, 64)).native is False
    assert WinogradConv2d(convolution(64, 64)).native is (way == "in C")


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 64, 3, padding=1),
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
    assert replaced == (11 if name == "UNet" else 25)
    x, t = images(17, 3, 16, 16), torch.arange(17) * 7
    given = (x, t, t % 3) if name == "UNet" else (x, t)
    runs = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for kind in ("residual_block", "winograd_conv3x3", "group_norm_silu"):
            plain = getattr(native, kind)
            patch.setattr(native, kind, lambda *args, kind=kind, plain=plain: runs.append(kind) or plain(*args))
        torch.testing.assert_close(twin(*given), model(*given), atol=1e-4, rtol=0)
    wanted = (
        {"residual_block": 5, "winograd_conv3x3": 1, "group_norm_silu": 1}
        if name == "UNet"
        else {"winograd_conv3x3": 25, "group_norm_silu": 25}
    )
    assert collections.Counter(runs) == (wanted if way == "in C" else {})


@pytest.mark.parametrize("c_in", [128, 64])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (6, 4)])
def test_a_block_is_what_it_was(size, c_in, way):
    """One whose sides 4 does not divide, too; and a style whose rows lie apart, as those of a network do."""
    block = ResBlock(c_in, 64, 16).eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in block.parameters():
            nn.init.normal_(p, std=0.1)
    x, style = images(16, c_in, *size), torch.randn(16, 1000, generator=torch.Generator().manual_seed(1))[:, 7 : 7 + 128]
    fused = cpu.faster(nn.ModuleList([block]))[0]
    cpu.pack(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, style), block(x, style), atol=2e-4, rtol=1e-5)
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
    assert isinstance(kept, ResBlock) and [type(kept.conv1), type(kept.conv2)] == [WinogradConv2d, nn.Conv2d]


def test_arguments_that_do_not_fit_are_refused():
    x, weight = images(2, 32, 8, 8), torch.zeros(36, 32, 32)
    norm = native.Norm(torch.ones(32), torch.zeros(32), 2, 1e-5)
    for call in (
        lambda: native.winograd_conv3x3(images(2, 32, 6, 8), weight, None),
        lambda: native.winograd_conv3x3(x.double(), weight, None),
        lambda: native.winograd_conv3x3(x, torch.zeros(36, 16, 32), None),
        lambda: native.winograd_conv3x3(x, weight, torch.zeros(31)),
        lambda: native.residual_block(x, [(norm, weight, None)] * 2, x[:1]),
        lambda: native.residual_block(x, [(norm._replace(groups=5), weight, None)] * 2, x),
        lambda: native.residual_block(x, [(norm._replace(style=torch.zeros(2, 32)), weight, None)] * 2, x),
        lambda: native.residual_block(x, [(norm._replace(style=torch.zeros(1, 64)), weight, None)] * 2, x),
        lambda: native.group_norm_silu(x.permute(0, 2, 3, 1), norm._replace(style=torch.zeros(2, 64)), torch.tensor([0, 2])),
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


def test_a_sampler_follows_weights_that_change(way):
    """Trained further in place, or loaded anew, between two calls."""
    network = small_network(config=UNetConfig(shape=(3, 8, 8), channels=(64, 64), blocks=1, middle=1, group=16, num_classes=3))
    sampler = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=2, micro_batch=4)
    first = sampler(3, labels=1)
    assert any(isinstance(m, WinogradConv2d) for m in sampler._network.model.modules())
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    second = sampler(3, labels=1)
    fresh = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=2, micro_batch=4)(3, labels=1)
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh)

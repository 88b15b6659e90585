"""The convolutions with all that is in their epilogues: kernels, and on a GPU the ops, against the reference; the library's way too."""

import convolutions as make
import pytest
import torch
from convolutions import CUDA, DEVICE, DTYPES, KERNELS, TOLERANCES, close, needs_kernels
from torch import nn

import fastdiff
from fastdiff import library, ops, reference
from fastdiff.fused import FusedUNet
from fastdiff.kernels import conv, conv_ends, group_norm_silu

pytestmark = needs_kernels

CASES = {
    "one result": {"channels": (64,), "c_out": 64, "raw": False},
    "style by index": {"channels": (64,), "c_out": 64, "style": True, "raw": False},
    "style by image": {"channels": (64,), "c_out": 64, "style": True, "indexed": False},
    "three results": {"channels": (64,), "c_out": 64, "same": True, "results": 2},
    "raw alone": {"channels": (64,), "c_out": 64, "results": 0},
    "a bias for each image": {"channels": (64,), "c_out": 64, "each": True},
    "two inputs": {"channels": (64, 32), "c_out": 64, "style": True},
    "shortcut of one": {"channels": (64,), "c_out": 128, "skip": (64,)},
    "shortcut of two": {"channels": (64,), "c_out": 64, "skip": (64, 32), "results": 2},
    "halved": {"channels": (64,), "c_out": 128, "stride": 2},
    "several tiles of channels": {"channels": (32,), "c_out": 192, "results": 2},
    "groups of one": {"channels": (32,), "c_out": 64, "group": 1},
    "groups of 64": {"channels": (32,), "c_out": 128, "group": 64},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "side"), [(1, 8), (5, 8), (3, 4), (17, 4), (2, 16), (33, 2), (2, (4, 8))], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_conv3x3_is_the_references(case, n, side, dtype):
    arguments = make.conv3x3(n, side, dtype=dtype, **CASES[case])
    with make.guarded() as guards_stand:
        got = conv.conv3x3(*arguments)
        guards_stand()
    for g, w in zip(got, reference.conv3x3(*arguments), strict=True):
        close(g, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "side", "channels", "c_out"), [(1, 4, 64, 64), (5, 4, 32, 128), (17, 2, 64, 64), (2, 8, 96, 192)])
@pytest.mark.parametrize(("results", "raw"), [(0, True), (1, False), (2, True)])
def test_conv_up_is_the_references(n, side, channels, c_out, results, raw, dtype):
    arguments = make.conv_up(n, side, channels, c_out, dtype, results=results, raw=raw)
    with make.guarded() as guards_stand:
        got = conv.conv_up(*arguments)
        guards_stand()
    for g, w in zip(got, reference.conv_up(*arguments), strict=True):
        close(g, w)


ENDS = [(5, (3, 16, 16), 2), (1, (3, 16, 16), 1), (3, (1, 8, 8), 1), (2, (4, 16, 8), 2), (3, (3, 16, 16), 4), (9, (1, 8, 8), 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "shape", "patch"), ENDS, ids=str)
@pytest.mark.parametrize(("c_out", "results", "raw"), [(64, 1, True), (128, 2, False), (192, 0, True)])
def test_conv_in_is_the_references(n, shape, patch, c_out, results, raw, dtype):
    arguments = make.conv_in(n, shape, patch, c_out, dtype, results=results, raw=raw)
    with make.guarded() as guards_stand:
        got = conv_ends.conv_in(*arguments)
        guards_stand()
    for g, w in zip(got, reference.conv_in(*arguments), strict=True):
        close(g, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "shape", "patch"), ENDS, ids=str)
@pytest.mark.parametrize("channels", [64, 96])
def test_conv_out_is_the_references(n, shape, patch, channels, dtype):
    arguments = make.conv_out(n, shape[2] // patch, channels, shape[0], patch, dtype)
    with make.guarded() as guards_stand:
        got = conv_ends.conv_out(*arguments)
        guards_stand()
    close(got, reference.conv_out(*arguments))


@pytest.mark.parametrize("pixels", conv.PIXELS)
@pytest.mark.parametrize("c_out", [64, 128])
def test_any_tile_gives_the_same(pixels, c_out):
    """5 images of 4 x 4 in programs that hold 16, 8 or 4 of them."""
    for kernel, arguments in (
        (conv.conv3x3, make.conv3x3(5, 4, (64,), c_out, DTYPES[0], same=True, results=2)),
        (conv.conv_up, make.conv_up(5, 2, 64, c_out, DTYPES[0], results=2)),
        (conv_ends.conv_in, make.conv_in(5, (3, 8, 8), 2, c_out, DTYPES[0])),
    ):
        for g, w in zip(kernel(*arguments, pixels=pixels), getattr(reference, kernel.__name__)(*arguments), strict=True):
            close(g, w)
    arguments = make.conv_out(5, 4, 64, 3, 2, DTYPES[0])
    close(conv_ends.conv_out(*arguments, pixels=pixels), reference.conv_out(*arguments))


def test_few_images_get_more_programs():
    full, few = conv.tile(4096, 8, 8, 64, processors=132), conv.tile(64, 8, 8, 64, processors=132)
    assert (full["NI"], few["NI"]) == (4, 1)
    assert conv.tile(1, 16, 16, 128, processors=132)["NI"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_arguments_is_read(dtype):
    """Every tensor stands among NaN; a read outside of it would show in the result, but for those that the kernel drops."""
    for kernel, arguments in (
        (conv.conv3x3, make.conv3x3(5, 4, (64, 32), 64, dtype, skip=(64, 32), results=2)),
        (conv.conv3x3, make.conv3x3(5, 8, (64,), 64, dtype, same=True, each=True)),
        (conv.conv3x3, make.conv3x3(5, 8, (64,), 64, dtype, stride=2)),
        (conv.conv_up, make.conv_up(5, 4, 64, 64, dtype)),
        (conv_ends.conv_in, make.conv_in(5, (3, 16, 16), 2, 64, dtype)),
        (conv_ends.conv_out, make.conv_out(5, 8, 64, 3, 2, dtype)),
    ):
        got, wanted = kernel(*make.everywhere(make.between_nans, arguments)), getattr(reference, kernel.__name__)(*arguments)
        for g, w in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (got, wanted)), strict=True):
            close(g, w)


def test_no_images():
    dtype = DTYPES[0]
    for kernel, arguments in (
        (conv.conv3x3, make.conv3x3(0, 8, (64,), 64, dtype, same=True, results=2)),
        (conv.conv_up, make.conv_up(0, 4, 64, 64, dtype)),
        (conv_ends.conv_in, make.conv_in(0, (3, 16, 16), 2, 64, dtype)),
        (conv_ends.conv_out, make.conv_out(0, 8, 64, 3, 2, dtype)),
    ):
        got, wanted = kernel(*arguments), getattr(reference, kernel.__name__)(*arguments)
        for g, w in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (got, wanted)), strict=True):
            assert g.shape == w.shape and g.dtype == w.dtype


def test_images_of_one_pixel_in_any_memory_layout():
    """A contiguous tensor's strides mean nothing where a side is 1, and a descriptor reads strides."""
    arguments = make.conv3x3(3, 1, (64,), 64, DTYPES[0], same=True)
    odd = arguments[0][0].as_strided((3, 1, 1, 64), (64, 1, 1, 1))
    assert odd.is_contiguous() and torch.equal(odd, arguments[0][0])
    for g, w in zip(conv.conv3x3([odd], *arguments[1:]), reference.conv3x3(*arguments), strict=True):
        close(g, w)


def test_images_do_not_mix():
    """Whole images share a program: each of them alone gives the same bits."""
    arguments = make.conv3x3(5, 4, (64,), 64, DTYPES[0], same=True, results=2)
    together = conv.conv3x3(*arguments)
    x, skip = arguments[0][0], arguments[4][0]
    for i in range(5):
        alone = conv.conv3x3([x[i : i + 1]], *arguments[1:4], [skip[i : i + 1]], *arguments[5:])
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a, t[i : i + 1])


def quantised(arguments):
    """Arguments of conv3x3 with x and weight in e4m3, and results of e4m3."""
    x, weight, bias, _, *rest = arguments
    scale = torch.linspace(0.5, 2, len(weight), device=DEVICE) / 64
    inverse = torch.linspace(30, 20, len(rest[2]) // 2, device=DEVICE)
    return ([v.to(reference.FP8) for v in x], (weight * 64).to(reference.FP8), bias, scale, *rest[:5], inverse, *rest[6:])


def close_in_e4m3(g, w, matrix_unit):
    """A step of e4m3 is 2^-3 of a number at most; sums that differ in their last bit may be rounded to either neighbour.

    The matrix unit of a Hopper keeps 13 bits of fraction of a sum of e4m3 products: there y is as exact as bf16, and more results fall to a neighbour.
    """
    assert g.dtype == w.dtype == reference.FP8 and g.shape == w.shape
    g, w = g.float(), w.float()
    # Where rounding reaches the next power of two, Triton's interpreter forgets to carry and gives half of it.
    halved = (g == w / 2) & (torch.frexp(w).mantissa.abs() == 0.5) & (not CUDA)
    torch.testing.assert_close(torch.where(halved, w, g), w, rtol=2**-3, atol=0.25 if matrix_unit else 2**-9)
    assert halved.float().mean() < 0.1
    assert (torch.where(halved, w, g) != w).float().mean() < (0.05 if matrix_unit else 0.01)


@pytest.mark.parametrize("case", ["one result", "style by index", "three results", "two inputs", "shortcut of two"])
@pytest.mark.parametrize("channels", [64, 128])
def test_e4m3_is_the_references(case, channels):
    wider = {"channels": tuple(c * channels // 64 for c in CASES[case]["channels"])}
    arguments = quantised(make.conv3x3(3, 4, dtype=torch.float16, **CASES[case] | wider))
    for g, w in zip(conv.conv3x3(*arguments), reference.conv3x3(*arguments), strict=True):
        if w.dtype == reference.FP8:
            close_in_e4m3(g, w, matrix_unit=CUDA)
        else:
            assert g.dtype == w.dtype and g.shape == w.shape
            rtol, atol = TOLERANCES[torch.bfloat16 if CUDA else g.dtype]
            torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


def test_bad_arguments_are_named():
    dtype = DTYPES[0]
    x, weight, *rest = make.conv3x3(2, 8, (64,), 64, dtype)
    with pytest.raises(AssertionError, match=r"each of x must be contiguous.*\[2, 8, 8, 64\]"):
        conv.conv3x3([x[0].transpose(1, 2)], weight, *rest)
    with pytest.raises(AssertionError, match="weight must be contiguous"):
        conv.conv3x3(x, weight[..., :32].contiguous(), *rest)
    with pytest.raises(AssertionError, match="bias must be contiguous"):
        conv.conv3x3(x, weight, rest[0].half(), *rest[1:])
    shifted = torch.empty(x[0].numel() + 1, dtype=dtype, device=DEVICE)[1:].view(x[0].shape)
    with pytest.raises(AssertionError, match="aligned to 16 bytes"):
        conv.conv3x3([shifted], weight, *rest)
    given = list(make.conv3x3(2, 8, (64,), 64, dtype, style=True))
    given[8] = None
    with pytest.raises(AssertionError, match="style has 5 rows for 2 images; give which"):
        conv.conv3x3(*given)
    with pytest.raises(AssertionError, match="sides must be powers of two"):
        conv.conv3x3(*make.conv3x3(2, 6, (64,), 64, dtype))
    with pytest.raises(AssertionError, match="at most 256 pixels"):
        conv.conv3x3(*make.conv3x3(1, 32, (64,), 64, dtype))
    with pytest.raises(AssertionError, match="must be multiples of 32"):
        conv.conv3x3(*make.conv3x3(1, 8, (48,), 64, dtype))
    with pytest.raises(AssertionError, match=r"6 groups of 192|32 groups of 192 channels"):
        conv.conv3x3(*make.conv3x3(1, 8, (64,), 192, dtype, group=6))
    with pytest.raises(AssertionError, match="scale goes with e4m3"):
        conv.conv3x3(x, weight, rest[0], torch.ones(64, device=DEVICE), *rest[2:])


def recorded(model, n):
    """Every call of a fused operation in one evaluation of a network: (name, arguments)."""
    calls = []

    def watch(name, op):
        def call(*args):
            calls.append((name, args))
            return op(*args)

        return call

    names = ("conv_in", "conv3x3", "conv_up", "conv_out")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in names:
            patch.setattr(ops, name, watch(name, getattr(ops, name)))
        generator = torch.Generator().manual_seed(0)
        dtype = next(model.parameters()).dtype
        x, t = torch.randn(n, *model.config.shape, generator=generator), torch.arange(n) * 37 % 500
        labels = torch.arange(n) % (model.config.num_classes + 1)
        table = model.condition(t.to(DEVICE), labels.to(DEVICE))
        FusedUNet(model).body(x.to(DEVICE, dtype), table, torch.arange(n, device=DEVICE).flip(0))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shipped", "within"), [("sprites", 19), ("sprites-large", 9)])
def test_every_convolution_of_the_shipped_networks(shipped, within, dtype):
    model: nn.Module = fastdiff.load(shipped).model.to(DEVICE, dtype)
    calls = recorded(model, 5)
    assert [name for name, _ in calls].count("conv3x3") == within
    assert [name for name, _ in calls if name != "conv3x3"] == ["conv_in", "conv_up", "conv_out"]
    for name, arguments in calls:
        got = getattr(conv if hasattr(conv, name) and name != "conv_in" else conv_ends, name)(*arguments)
        wanted = getattr(reference, name)(*arguments)
        for g, w in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (got, wanted)), strict=True):
            close(g, w)


@pytest.mark.parametrize("case", CASES)
def test_the_librarys_way_is_the_references(case):
    """In fp32, where nothing is rounded between two operations."""
    arguments = make.conv3x3(3, 8, dtype=torch.float32, **CASES[case])
    for g, w in zip(library.conv3x3(*arguments), reference.conv3x3(*arguments), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4 if CUDA else 1e-5, atol=5e-3 if CUDA else 5e-5)  # CUDA: cuDNN may take TF32


def test_the_librarys_way_at_the_ends_and_up():
    for name, arguments in (
        ("conv_up", make.conv_up(3, 4, 48, 40, torch.float32, results=2)),
        ("conv_in", make.conv_in(3, (3, 12, 12), 2, 40, torch.float32, results=2)),
        ("conv_out", make.conv_out(3, 6, 40, 3, 2, torch.float32)),
        ("conv3x3", make.conv3x3(3, 6, (24, 8), 40, torch.float32, skip=(24, 8), style=True, each=True)),
        ("group_norm_silu", make.group_norm_silu((3, 5, 7, 24), 4, torch.float32, style=True)),
    ):
        got, wanted = getattr(library, name)(*arguments), getattr(reference, name)(*arguments)
        for g, w in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (got, wanted)), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4 if CUDA else 1e-5, atol=5e-3 if CUDA else 5e-5)


@pytest.mark.parametrize("name", ["conv3x3", "conv_up", "conv_in"])
def test_the_librarys_way_to_two_results_of_e4m3(name, monkeypatch):
    """With the kernel for the norms, as on a GPU. The second one's scale stands 4 bytes into a tensor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if name == "conv3x3":
        arguments = quantised(make.conv3x3(3, 6, (64,), 64, torch.float32, same=True, results=2, style=True))
    else:
        size = (3, 64, 64) if name == "conv_up" else ((3, 12, 12), 2, 64)
        arguments = list(getattr(make, name)(3, *size, torch.float32, results=2))
        arguments[4] = torch.tensor([30.0, 20.0], device=DEVICE)  # inverse
    got, wanted = getattr(library, name)(*arguments, norm=group_norm_silu.group_norm_silu), getattr(reference, name)(*arguments)
    assert len(got) == len(wanted) == 3
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=5e-4)
    for g, w in zip(got[1:], wanted[1:], strict=True):
        close_in_e4m3(g, w, matrix_unit=False)


@pytest.mark.skipif(not KERNELS, reason="needs a CUDA GPU of compute capability 9 or 10")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_the_op_is_the_kernel_or_the_library(case):
    """16-bit shapes that fit give the kernel's bits, others the library's result."""
    arguments = make.conv3x3(7, 8, dtype=torch.bfloat16, **CASES[case])
    for g, w in zip(ops.conv3x3(*arguments), conv.conv3x3(*arguments), strict=True):
        assert torch.equal(g, w)
    arguments = make.conv3x3(7, 6, dtype=torch.bfloat16, **CASES[case])
    for g, w in zip(ops.conv3x3(*arguments), reference.conv3x3(*arguments), strict=True):
        torch.testing.assert_close(g, w, rtol=2**-5, atol=4e-2)  # two or three roundings to bf16 on the way


def test_folding_is_pytorchs():
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(reference.fold(x, 4), nn.functional.pixel_unshuffle(x, 4))
    assert torch.equal(reference.unfold(reference.fold(x, 4), 4), x)


def test_up_weight_is_the_repeated_pixels_convolution():
    x, w = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(4, 3, 3, 7, dtype=torch.float64)
    repeated = nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0)
    wanted = nn.functional.conv2d(repeated, w.permute(0, 3, 1, 2), padding=1)
    transposed = reference.up_weight(w).permute(3, 0, 1, 2)
    got = nn.functional.conv_transpose2d(x.permute(0, 3, 1, 2), transposed, stride=2, padding=1)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

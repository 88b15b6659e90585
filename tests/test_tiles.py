"""Convolutions by a processor's tiles: what is multiplied is bf16, all else fp32."""

import pytest
import torch
from helpers import block_definition, blocks, guarded, in_memory_of_its_own, small_network, untouched
from torch import nn

from fastdiff import Sampler, Schedule, UNetConfig, cpu, native, reference
from fastdiff.unet2d import UNet2D, UNet2DConfig

tiles_here = pytest.mark.skipif(not native.has_tiles(), reason="needs a processor with tiles for bf16 (AMX)")


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def images(n, c, h, w):
    return drawn(n, c, h, w).to(memory_format=torch.channels_last)


def weight(c_in, c_out):
    return drawn(c_out, c_in, 3, 3) / (3 * c_in**0.5)


def layer(c_in, c_out, norm=True, bias=True, silu=True):
    own = native.Norm(1 + 0.1 * drawn(c_in), 0.1 * drawn(c_in), 4, 1e-5, silu) if norm else None
    return native.Layer(own, reference.tiled_weight(weight(c_in, c_out)), drawn(c_out) if bias else None)


def skip(c_in, c_out):
    return reference.tiles(drawn(c_in, c_out) / c_in**0.5)


BLOCKS = blocks(layer, skip, least=32, beside=16)


def matrix(tiles):
    """`reference.tiles` undone."""
    n, k = tiles.shape[:2]
    return tiles.permute(1, 3, 5, 0, 2, 4).reshape(32 * k, 32 * n)


def rounded(x):
    return x.float().bfloat16().double()


def definition(block, x, beside, style):
    """In fp64 but for the factors."""

    def convolve(x, tiles, bias):
        taps = matrix(tiles).double().reshape(3, 3, -1, 32 * len(tiles)).permute(3, 2, 0, 1)
        return nn.functional.conv2d(rounded(x), taps, bias, padding=1)

    def skip(x, tiles):
        return torch.einsum("nchw,cd->ndhw", rounded(x), matrix(tiles).double())

    return block_definition(block, x, beside, style, convolve, skip)


def test_a_matrix_in_tiles():
    values = torch.arange(64 * 96).reshape(64, 96).float()
    made = reference.tiles(values)
    assert made.shape == (3, 2, 2, 16, 16, 2) and made.dtype == torch.bfloat16
    assert made[2, 1, 1, 7, 5, 1] == values[32 + 14 + 1, 64 + 16 + 5].bfloat16()
    assert torch.equal(matrix(made), values.bfloat16())
    w = weight(32, 64)
    assert torch.equal(matrix(reference.tiled_weight(w))[4 * 32 + 5], w[:, 5, 1, 1].bfloat16()), "tap by tap, of each its channels"


@tiles_here
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (4, 12)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_definition(name, styled, n, size):
    c, c_beside, build = BLOCKS[name]
    block = build()
    x, beside = images(n, c, *size), images(n, c_beside, *size) if c_beside else None
    style = drawn(n, 1000)[:, 7 : 7 + block.style] if styled and block.style else None
    made = block(x, beside, style)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.dtype == torch.float32
    # The same factors, summed in fp32; behind a norm a few of them are rounded to a neighbour, at most by as much as all are rounded: 1.3e-2.
    tolerance = 1e-2 if any(norm for norm, *_ in block.layers) or len(block.layers) > 1 else 2e-5
    torch.testing.assert_close(made.double(), definition(block, x, beside, style), atol=tolerance, rtol=0, check_stride=False)


@tiles_here
@pytest.mark.parametrize("name", BLOCKS)
def test_the_kernels_touch_their_own_alone(name):
    """What they read stands among NaN, and what they write among sevens."""
    c, c_beside, build = BLOCKS[name]
    block, n, h, w = in_memory_of_its_own(build()), 5, 3, 8
    _, x = guarded(n * h * w * c, torch.nan, images(n, c, h, w))
    _, beside = guarded(n * h * w * c_beside, torch.nan, images(n, c_beside, h, w)) if c_beside else (None, None)
    _, style = guarded(n * block.style, torch.nan, torch.ones(n, block.style)) if block.style else (None, None)
    part = 2
    room = native._tiled_numel(part, h, w, block.c_in, block.widest)
    used, scratch = guarded(room, 7.0, torch.full((room,), torch.nan))
    outer, y = guarded(n * h * w * block.c_out, 7.0)
    native._library().fastdiff_block_tiles(
        block.told, x.data_ptr(), None if beside is None else beside.data_ptr(), c_beside, None if style is None else style.data_ptr(),
        block.style, y.data_ptr(), n, h, w, part, scratch.data_ptr(),
    )  # fmt: skip
    assert untouched(outer) and untouched(used) and y.isfinite().all()


@tiles_here
@pytest.mark.parametrize("name", BLOCKS)
def test_bits_depend_on_neither_the_others_nor_the_parts(name, monkeypatch):
    c, c_beside, build = BLOCKS[name]
    block, n = build(), 37
    x, beside = images(n, c, 8, 4), images(n, c_beside, 8, 4) if c_beside else None
    style = drawn(n, block.style) if block.style else None
    whole = block(x, beside, style)
    for start, stop in ((0, 1), (5, 7), (36, 37)):
        part = slice(start, stop)
        alone = block(x[part], None if beside is None else beside[part], None if style is None else style[part])
        assert torch.equal(alone, whole[part])
    for rows in (1, 100, 400):
        monkeypatch.setattr(native, "ROWS", rows)
        assert torch.equal(block(x, beside, style), whole)


@tiles_here
def test_what_is_no_number_stays_so():
    """In the pixels that see it, of its own image."""
    block, x = BLOCKS["a convolution"][2](), images(3, 32, 6, 5)
    x[1, 3, 2, 0] = torch.nan
    made = block(x).isnan()
    assert made[1, :, 1:4, :2].all() and int(made.sum()) == 64 * 6
    x[1, 3, 2, 0] = torch.inf
    assert not block(x)[1, :, 1:4, :2].isfinite().any()


@tiles_here
@pytest.mark.parametrize("shape", [(3, 12, 64, 8, 8, 1), (1, 64, 12, 5, 7, 1), (4, 64, 96, 8, 8, 2), (2, 33, 3, 5, 7, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_any_channels_and_of_every_second_pixel(shape, bias):
    n, c_in, c_out, h, w, step = shape
    c = nn.Conv2d(c_in, c_out, 3, stride=step, padding=1, bias=bias).requires_grad_(False)
    c.weight.copy_(weight(c_in, c_out))
    x, made = images(n, c_in, h, w), cpu.TiledConv2d(c)
    made.pack()
    wanted = nn.functional.conv2d(rounded(x), rounded(c.weight), None if c.bias is None else c.bias.double(), stride=step, padding=1)
    with torch.no_grad():
        found = made(x)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0, check_stride=False)
        assert torch.equal(made(x[0]), c(x[0])), "an image alone, without a batch"
    c.requires_grad_(True)
    assert torch.equal(made(x), c(x)), "for gradients, the convolution itself"


NETWORKS = {
    "UNet": lambda: small_network(config=UNetConfig(shape=(3, 16, 16), channels=(64, 96), blocks=1, middle=1, group=16, num_classes=3)),
    "few channels": lambda: small_network(
        config=UNetConfig(shape=(1, 12, 12), channels=(16, 48), blocks=1, middle=0, group=16, num_classes=3)
    ),
    "UNet2D": lambda: network_2d(),
}


def network_2d():
    config = UNet2DConfig(
        sample_size=16, block_out_channels=(64, 96), norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2D(config).eval().requires_grad_(False)


def sampler(model, dtype=torch.bfloat16, **options):
    shape, classes = (model.config.shape, 3) if hasattr(model, "label") else ((3, 16, 16), None)
    return Sampler(model, Schedule.cosine(50), shape, "v", steps=4, num_classes=classes, device="cpu", dtype=dtype, **options)


@tiles_here
@pytest.mark.parametrize("name", NETWORKS)
def test_images_are_nearly_those_of_fp32_and_the_same_however_many(name):
    model = NETWORKS[name]()
    ours, whole = sampler(model), sampler(model, torch.float32)
    call = {"labels": 1, "guidance": 2.0} if ours.num_classes else {}
    made, wanted = ours(37, seed=3, **call), whole(37, seed=3, **call)
    assert made.dtype == torch.float32 and not torch.equal(made, wanted)
    error = float((made - wanted).abs().mean())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "has_tiles", lambda: False)
        assert error < float((sampler(model)(37, seed=3, **call) - wanted).abs().mean()), "PyTorch's bf16 rounds every sum, too"
    assert error < 0.01
    for n, first in ((1, 0), (1, 20), (5, 30), (7, 0)):
        assert torch.equal(ours(n, seed=3, first=first, **call), made[first : first + n])
    for micro_batch in (1, 3, 16):
        assert torch.equal(sampler(model, micro_batch=micro_batch)(7, seed=3, **call), made[:7])


@tiles_here
def test_weights_are_followed():
    model = NETWORKS["UNet"]()
    ours = sampler(model)
    before = ours(3)
    with torch.no_grad():
        model.stem.weight.mul_(1.5)
    after = ours(3)
    assert not torch.equal(before, after) and torch.equal(after, sampler(model)(3))
    half = sampler(NETWORKS["UNet"]().to(torch.bfloat16))
    assert half._tensors == torch.float32 and torch.isfinite(half(3)).all()


def test_where_tiles_are_not_taken(monkeypatch):
    class Own(type(NETWORKS["UNet"]())):
        pass

    model = NETWORKS["UNet"]()
    derived = Own(model.config).eval().requires_grad_(False)
    for made in (sampler(derived), sampler(model, compile=True), sampler(model, torch.float32), sampler(model, torch.float16)):
        assert not made._tiled
    assert sampler(model)._tiled is native.has_tiles()
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    plain = sampler(model)
    assert not plain._tiled and next(plain.model.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(plain(2)).all()


@tiles_here
def test_blocks_of_other_weights_are_refused():
    for layers, options, match in (
        ([layer(64, 64)._replace(weight=reference.tiled_weight(weight(64, 64))[:, :3])], {}, "tiled_weight"),
        (
            [layer(64, 64), native.Layer(layer(64, 64).norm, reference.winograd_weight(weight(64, 64)), None)],
            {},
            "both layers must be tiles",
        ),
        ([layer(64, 64)], {"skip": reference.panels(drawn(64, 64))}, "skip must be"),
        ([layer(64, 96)], {}, "as many channels as the result"),
    ):
        with pytest.raises(AssertionError, match=match):
            native.Block(layers, **options)

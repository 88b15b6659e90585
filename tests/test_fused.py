"""The fused network: its numbers beside the UNet's, in fp32, bf16 and fp8, what it follows, and how Sampler and the command use it."""

import copy
import functools
import json
import math
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from convolutions import CUDA, DEVICE, KERNELS
from convolutions import conv_out as make_conv_out
from helpers import SMALL, small_network

import fastdiff
from fastdiff import Sampler, Schedule, UNetConfig, fused, ops, reference, sample, tuned, ways
from fastdiff.fused import FusedUNet, differ
from fastdiff.unet2d import UNet2D, UNet2DConfig

CONFIGS = {
    "sprites": UNetConfig(channels=(64, 128), blocks=2, middle=1, num_classes=8),
    "one level, no middle": UNetConfig(shape=(3, 16, 16), patch=2, channels=(32,), blocks=1, middle=0, num_classes=3),
    "three levels": UNetConfig(shape=(1, 16, 24), patch=1, channels=(16, 24, 32), blocks=2, middle=2),
    "equal widths": UNetConfig(shape=(4, 8, 8), patch=2, channels=(16, 16), blocks=3, middle=0, group=16, num_classes=2),
}


def inputs(config, n=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, *config.shape, generator=generator).to(DEVICE, dtype)
    t = (torch.arange(n) * 97 % 500).to(DEVICE)
    labels = None if config.num_classes is None else (torch.arange(n) % (config.num_classes + 1)).to(DEVICE)
    return x, t, labels


def network(config, dtype=torch.float32):
    return small_network(config=config).to(DEVICE, dtype)


@functools.cache
def shipped(name="sprites"):
    return fastdiff.load(name)


@pytest.mark.skipif(CUDA, reason="on a GPU fp32 is left to the library, tested below")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n", [1, 5])
def test_fp32_is_the_unets_to_rounding(name, n):
    model, given = network(CONFIGS[name]), inputs(CONFIGS[name], n)
    with torch.no_grad():
        wanted = model(*given)
        got = FusedUNet(model)(*given)
    assert got.shape == wanted.shape and got.is_contiguous()
    # Some dozen layers, each sums of up to a few thousand products in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def rms(a, b):
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.mark.parametrize("name", ["random", "sprites", "sprites-large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_no_further_from_fp32_than_twice_the_unets_own(name, dtype):
    """Of compiled code on a GPU, of eager code on a CPU, where compiling takes a minute."""
    full = network(CONFIGS["sprites"]) if name == "random" else copy.deepcopy(shipped(name).model).to(DEVICE)
    given = inputs(full.config, 32)
    small = copy.deepcopy(full).to(dtype)
    with torch.no_grad():
        wanted = full(*given)
        x, t, labels = given
        plain = (torch.compile(small, dynamic=False) if CUDA else small)(x.to(dtype), t, labels)
        got = FusedUNet(small)(x.to(dtype), t, labels)
    assert got.dtype == dtype
    assert 0 < rms(got, wanted) <= 2 * rms(plain, wanted)
    # As it is, it is nearer: a norm, a skip and a bias are added before rounding.
    assert (got.float() - wanted).abs().max() <= 2 * (plain.float() - wanted).abs().max()


def test_conditions_by_row():
    model = network(CONFIGS["sprites"])
    x, t, labels = inputs(CONFIGS["sprites"])
    which = torch.tensor([4, 0, 0, 3, 1], device=DEVICE)
    with torch.no_grad():
        table = model.condition(t, labels)
        made = FusedUNet(model)
        assert torch.equal(made.body(x, table, which), made.body(x, table[which]))


def test_launches_and_flops():
    model = shipped().model
    made = FusedUNet(model)
    assert len(made.convolutions()) == 22  # nine blocks of two, the first, the last, one that shrinks and one that grows
    # Growing by four phases leaves out 5 of every 9 products.
    (grow,) = [c for c in made.convolutions() if c.name == "grow.0"]
    assert sum(c.flops() for c in made.convolutions()) == model.flops() - grow.flops() * 5 // 4
    assert len(FusedUNet(shipped("sprites-large").model).convolutions()) == 12


def test_weights_are_the_networks_own_and_changes_are_taken_up():
    model = network(CONFIGS["equal widths"])
    made = FusedUNet(model)
    assert not list(made.parameters()) and made.state_dict() == {}
    given = inputs(CONFIGS["equal widths"])
    places = [v.data_ptr() for v in made.buffers()]
    with torch.no_grad():
        before = made(*given)
        for p in model.parameters():
            p.mul_(1.1)
        assert torch.equal(made(*given).isfinite(), before.isfinite())
        made.pack()
        torch.testing.assert_close(made(*given), model(*given), rtol=1e-2 if CUDA else 1e-4, atol=1e-2 if CUDA else 1e-4)
    assert places == [v.data_ptr() for v in made.buffers()], "CUDA graphs read the memory of before"


@pytest.mark.filterwarnings("ignore:.*run by PyTorch's own operations")  # as fp32 does on a GPU
@pytest.mark.parametrize("config", [SMALL, UNetConfig(channels=(16,), blocks=1, middle=1, num_classes=2)], ids=str)
def test_a_sampler_gives_the_same_images(config):
    model, schedule = network(config), Schedule.linear(50)
    make = functools.partial(Sampler, model, schedule, shape=config.shape, num_classes=config.num_classes, steps=4, dtype=torch.float32)
    labels = torch.arange(7) % config.num_classes
    plain, own = make(compile=False), make(compile="fused")
    assert own.way.startswith("fused")
    for guidance in (1.0, 2.0):
        got, wanted = (s(7, labels=labels, guidance=guidance, seed=3) for s in (own, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-2 if CUDA else 1e-4)
    # The same bits in any batch, and after the weights have changed the images of the changed ones.
    assert torch.equal(own(3, labels=labels[2:5], seed=3, first=2), own(7, labels=labels, seed=3)[2:5])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    torch.testing.assert_close(own(7, labels=labels, seed=3), plain(7, labels=labels, seed=3), rtol=1e-3, atol=1e-2 if CUDA else 1e-4)


@pytest.mark.skipif(CUDA and not KERNELS, reason="fp8 needs a GPU of compute capability 9 or 10")
@pytest.mark.parametrize("name", ["sprites", "sprites-large"])
def test_fp8_keeps_the_images(name):
    """Of a shipped network, 32 sprites: with e4m3 in the blocks half of them differ from fp32's by less than a fifth of what another seed's do."""
    ckpt = shipped(name)
    labels = torch.arange(32) % 8
    make = functools.partial(ckpt.sampler, solver="unipc", steps=6, device=DEVICE)
    full = make(compile=False, dtype=torch.float32)(32, labels=labels, guidance=2.0)
    sampler = make(dtype="fp8")
    assert sampler.way.startswith("fused, fp8")
    coarse = sampler(32, labels=labels, guidance=2.0)
    other = sampler(32, labels=labels, guidance=2.0, seed=1)
    near, far = ((v - full).square().mean((1, 2, 3)).sqrt().median() for v in (coarse, other))
    assert 0 < near < 0.2 * far
    assert torch.equal(coarse, make(dtype="fp8")(32, labels=labels, guidance=2.0)), "scales are of a fixed walk"


def test_calibration_by_hand():
    """A network that reads the largest of |x| in one place: its step holds HEADROOM times that, and results are divided by their reader's step."""
    config = CONFIGS["equal widths"]
    model = network(config)
    given = inputs(config)
    plain = FusedUNet(model)
    seen = {}
    for c in plain.convolutions():
        c.register_forward_pre_hook(lambda module, args: seen.update({module.name: max(float(v.abs().max()) for v in args[0])}))
    made = fused.calibrate(plain, lambda net: net(*given))
    for c in made.convolutions():
        if c.fp8[0]:
            assert c.step == pytest.approx(seen[c.name] * fused.HEADROOM / reference.FP8_MAX, rel=1e-6)
            assert c.weight.dtype == reference.FP8
            restored = c.weight.float() * c.scale[:, None, None, None] / c.step
            source = dict(model.named_modules())[c.name].weight.permute(0, 2, 3, 1)
            torch.testing.assert_close(restored, source.float(), rtol=2**-4, atol=float(source.abs().max()) * 2**-9)
        if c.fp8[1]:
            steps = {other.name: other.step for other in made.convolutions()}
            torch.testing.assert_close(c.inverse.cpu(), torch.tensor([1 / steps[name] for name in c.readers]))
    names = {c.name for c in made.convolutions() if c.fp8[0]}
    assert names == {c.name for c in made.convolutions()} - {"stem", "head", "shrink.0", "grow.0"}
    with torch.no_grad():
        assert rms(made(*given), model(*given)) < 0.2 * float(model(*given).float().square().mean().sqrt())


def test_what_cannot_be_run_so_is_refused_in_one_line():
    unet2d = UNet2D(UNet2DConfig(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)))
    with pytest.raises(ValueError, match=r"^UNet2D is not a fastdiff.UNet; of other networks fastdiff.accelerate"):
        FusedUNet(unet2d)
    schedule = Schedule.linear(50)
    with pytest.raises(ValueError, match=r'^compile="fused" runs a fastdiff.UNet; for UNet2D see fastdiff.accelerate$'):
        Sampler(unet2d, schedule, shape=(3, 8, 8), compile="fused")
    small = small_network()
    with pytest.raises(
        ValueError, match=r'^dtype="fp8" is computed by fastdiff\'s own kernels; give compile="fused", or leave it out, not True$'
    ):
        Sampler(small, schedule, shape=SMALL.shape, num_classes=3, dtype="fp8", compile=True)
    with pytest.raises(ValueError, match=r'give torch\.float32, torch\.bfloat16, torch\.float16 or "fp8"$'):
        Sampler(small, schedule, shape=SMALL.shape, dtype="fp4")
    with pytest.raises(ValueError, match=r'give True, False, "fused" or "auto"$'):
        Sampler(small, schedule, shape=SMALL.shape, compile="fast")


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as names and capabilities go."""

    def there(capability=(9, 0), name="NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return there


def test_fp8_of_norms_that_begin_as_0():
    network = small_network()
    with torch.no_grad():
        for block in (*network.down, *network.up):
            for p in (block.norm2.weight, block.norm2.bias):
                p.zero_()
        for p in network.modulation.parameters():
            p.zero_()
    sampler = Sampler(network, Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=3, device="cpu", dtype="fp8")
    assert sampler(2, labels=1).isfinite().all()


def test_weights_packed_in_inference_mode_are_followed_outside_of_it():
    network = small_network()
    with torch.inference_mode():
        made = FusedUNet(network)
    network.head.weight.mul_(1.5)
    made.pack()
    x = torch.ones(2, *SMALL.shape)
    torch.testing.assert_close(made(x, torch.tensor([3, 4])), network(x, torch.tensor([3, 4])), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, "fp8"], ids=str)
def test_modules_in_the_place_of_others_are_taken_up(dtype):
    network, other = small_network(0), small_network(1)
    options = {"shape": SMALL.shape, "num_classes": 3, "steps": 3, "device": "cpu", "compile": "fused", "dtype": dtype}
    sampler = Sampler(network, Schedule.linear(50), **options)
    before = sampler(2, labels=1)
    network.head, network.down[0] = other.head, other.down[0]
    after = sampler(2, labels=1)
    assert not torch.equal(after, before) and torch.equal(after, Sampler(network, Schedule.linear(50), **options)(2, labels=1))


def test_fp8_is_refused_where_the_gpu_has_none(a_gpu):
    a_gpu((8, 0), "NVIDIA A100")
    sampler = Sampler.__new__(Sampler)
    sampler.device = torch.device("cuda", 0)
    with pytest.raises(
        ValueError, match=r'^dtype="fp8" needs a GPU of compute capability 9 or 10 \(H100, H200, B200\), which NVIDIA A100 is not;'
    ):
        sampler._check_fp8("auto")


def test_what_no_kernel_covers_is_said(a_gpu):
    a_gpu()
    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert ops.uncovered(device, bf16, 8, 8, 64, 8, 64) is None
    assert ops.uncovered(device, torch.float32, 8, 8, 64, 8, 64) == "float32: the kernels compute with 16 bits"
    assert ops.uncovered(device, bf16, 12, 12, 64, 8, 64).startswith("images of 12 x 12 pixels")
    assert ops.uncovered(device, bf16, 8, 8, 40, 5, 40).startswith("40 channels to 40")
    for other in ((8, 0), (12, 0)):  # the latter's shared memory is too small
        a_gpu(other)
        assert "compute capability 9 or 10" in ops.uncovered(device, bf16, 8, 8, 64, 8, 64)
    a_gpu()
    wide = FusedUNet(fastdiff.UNet(UNetConfig(shape=(3, 24, 24), channels=(64, 128), blocks=1, middle=0)))
    reasons = {c.name: c.uncovered(device, bf16) for c in wide.convolutions()}
    assert all(reason.startswith(("images of 12 x 12", "images of 6 x 6")) for reason in reasons.values())
    ours = FusedUNet(shipped().model)
    assert [c.name for c in ours.convolutions() if c.uncovered(device, bf16)] == []
    for patch, uncovered in ((4, {}), (8, {"head": "64 channels to 192: the last convolution makes at most 64"})):
        folded = FusedUNet(fastdiff.UNet(UNetConfig(shape=(3, 64, 64), patch=patch, channels=(64,), blocks=1, middle=0)))
        assert {c.name: reason for c in folded.convolutions() if (reason := c.uncovered(device, bf16))} == uncovered


def test_a_last_convolution_to_many_channels_runs_by_the_library(a_gpu, monkeypatch):
    a_gpu()
    kernel = SimpleNamespace(conv_out=lambda *_, **__: "kernel")
    monkeypatch.setattr(ops.library, "conv_out", lambda *_: "library")
    for channels, way in ((3, "kernel"), (4, "kernel"), (5, "library")):
        assert ops._chosen("conv_out", kernel, make_conv_out(2, 4, 64, channels, 4, torch.bfloat16), [64], None) == way


def test_a_sampler_warns_of_what_no_kernel_covers():
    sampler = Sampler(small_network(), Schedule.linear(50), shape=SMALL.shape, num_classes=3, steps=2, compile="fused")
    with (
        mock.patch.object(FusedUNet, "uncovered", return_value={"down.0.conv1": "16 channels to 16: too few", "head": "no"}),
        pytest.warns(
            UserWarning, match=r"^2 of 12 convolutions run by PyTorch's own operations: down.0.conv1, for one, has 16 channels to 16"
        ),
    ):
        sampler(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(2)  # said once


@pytest.mark.parametrize("change", ["data", "in place", "flipped"])
def test_weights_that_change_are_packed_again(change):
    """Also those that `.data` writes to, as averages of weights do: of that torch keeps no count."""
    model = small_network()
    fused = FusedUNet(model)
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)
    before = fused(x, t)
    weight = model.down[0].conv1.weight
    if change == "data":
        weight.data.mul_(1.5)
    elif change == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    else:
        weight.data.copy_(weight.data.flip(0))
    fused.pack()
    after = fused(x, t)
    assert not torch.equal(after, before) and torch.equal(after, FusedUNet(model)(x, t))


def test_differences_of_weights_are_seen_on_a_device_too():
    """As it is found out there, in few launches and one wait."""
    one = [torch.randn(3, 4), torch.randn(5), torch.zeros(2, dtype=torch.bfloat16)]
    assert not differ(one, [w.clone() for w in one])
    for i in range(3):
        for value in (1.5, math.nan, math.inf):
            two = [w.clone() for w in one]
            two[i].view(-1)[1] = value
            assert differ(one, two) and differ(two, one)
    assert differ(one[:1], [one[0].flip(0)])


def test_the_shipped_table_decides_what_nobody_has_measured(a_gpu, tmp_path, monkeypatch):
    model = small_network()
    a_gpu()
    key = tuned.key("conv3x3", 1000, 8, 8, [64, 64], 64, torch.bfloat16, "shortcut 128")
    assert key == "conv3x3 1024 8x8 64+64->64 bfloat16 shortcut 128"
    assert tuned.way("NVIDIA H200", key) == ("kernel", {})
    rows = {key: {"way": "kernel 128 3"}, "a": {"way": "library"}, f"network {ways.digest(model)} bfloat16": {"way": "fused"}}
    (tmp_path / "tuned.json").write_text(json.dumps({"NVIDIA H200": rows}))
    monkeypatch.setattr(tuned, "PATH", tmp_path / "tuned.json")
    tuned.table.cache_clear()
    try:
        assert tuned.way("NVIDIA H200", key) == ("kernel", {"pixels": 128, "stages": 3})
        assert tuned.way("NVIDIA H200", "a") == ("library", {})
        assert tuned.way("NVIDIA B200", "a") == ("kernel", {})
        sampler = Sampler.__new__(Sampler)
        sampler.model, sampler.device, sampler.dtype, sampler.micro_batch = model, torch.device("cuda", 0), torch.bfloat16, "auto"
        assert sampler._recalled() == "fused"
        sampler.dtype = torch.float16
        assert sampler._recalled() == "compiled"
    finally:
        tuned.table.cache_clear()


def test_the_shipped_table_is_readable():
    for rows in tuned.table().values():
        for key, way in rows.items():
            assert way in {"eager", "compiled", "fused"} if key.startswith("network") else way.split()[0] in {"kernel", "library"}


def test_the_command(tmp_path, capsys):
    common = ["--batch", "4", "--steps", "2", "--seed", "1", "--json"]
    for folder, how in (("a", ["--compile", "no"]), ("b", ["--compile", "fused", "--dtype", "float32"]), ("c", ["--dtype", "fp8"])):
        assert sample.main([*common, *how, "--device", "cpu", "--out", str(tmp_path / folder)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["way"] == {"a": "eager", "b": "fused", "c": "fused, fp8"}[folder]
    a, b, c = (np.load(tmp_path / folder / "samples.npz")["images"].astype(int) for folder in "abc")
    assert abs(a - b).max() <= 1
    assert 0 < abs(a - c).mean() < 8

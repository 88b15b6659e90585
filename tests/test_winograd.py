"""The convolution of 4 x 4 images by Winograd's method: its values, what it replaces, and that it follows its weights."""

import pytest
import torch
from helpers import SMALL, small_network
from torch import nn

from fastdiff import Sampler, Schedule, UNetConfig, winograd
from fastdiff.winograd import WinogradConv2d


def convolution(c_in=64, c_out=96, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(c_in + c_out)
        return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias).requires_grad_(False)


def packed(c):
    replaced = WinogradConv2d(c)
    replaced.pack()
    return replaced


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [0, 1, 7, 32])
def test_values_are_the_direct_convolutions(n, layout, bias):
    c = convolution(bias=bias)
    x = torch.randn(n, 64, 4, 4, generator=torch.Generator().manual_seed(n)).to(memory_format=layout)
    wanted = nn.functional.conv2d(x.double(), c.weight.double(), None if c.bias is None else c.bias.double(), padding=1)
    # Sums of 36 terms up to 8 times x and weights up to 1 / 4: some 100 units in the last place of the largest value (Lavin & Gray 2016, table 5).
    torch.testing.assert_close(packed(c)(x).double(), wanted, atol=2e-5, rtol=0)


def test_each_pixel_of_the_border_sees_zeros_around():
    """One pixel at a time, weights of one: a pixel reaches its neighbours and no others."""
    c = convolution(64, 64, bias=False)
    c.weight.copy_(torch.eye(64)[:, :, None, None].expand(64, 64, 3, 3))
    replaced = packed(c)
    for i in range(16):
        x = torch.zeros(1, 64, 4, 4)
        x[0, 5, i // 4, i % 4] = 1
        torch.testing.assert_close(replaced(x), nn.functional.conv2d(x, c.weight, padding=1), atol=1e-5, rtol=0)


def test_other_sizes_are_left_to_the_convolution():
    c = convolution()
    for size in ((8, 8), (4, 8), (2, 2), (5, 4)):
        x = torch.randn(2, 64, *size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(packed(c)(x), c(x))


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
    assert winograd.with_winograd(model) is model


def test_a_model_with_it_shares_its_weights_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Sequential(convolution(64, 64)), nn.SiLU(), convolution(64, 64)).train()
    before = list(model.named_modules())
    twin = winograd.with_winograd(model)
    assert list(model.named_modules()) == before
    assert model.training
    assert not twin.training
    assert [type(m) for m in twin.modules()].count(WinogradConv2d) == 2
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    winograd.pack(twin)
    x = torch.randn(3, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twin(x), model(x), atol=5e-5, rtol=0)


def test_a_sampler_follows_weights_that_change():
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

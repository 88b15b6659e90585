"""Other people's networks run through the fused operations: the same values, exactly the replacements that are meant, and nothing left behind."""

import contextlib
import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import KERNELS
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm

from fastdiff import Sampler, Schedule, UNet, UNetConfig, unet2d
from fastdiff.rewrite import _covers, accelerate, report, unaccelerate

# fp32 sums of a few hundred products, in another order, through some twenty layers whose norms keep all near 1: a few units of 2^-24 each, and
# 2e-6 of the largest value was seen. What is forgotten, or added twice, is 1e-2 and more.
CLOSE = 1e-5


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters everywhere, so that no bias, no norm and no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(drawn / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3 * drawn + ("norm" in name and name.endswith("weight")))
    return module.eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference from b, where b's largest value is 1."""
    assert a.shape == b.shape and a.dtype == b.dtype and b.abs().max() > 0.1, (a.shape, b.shape, a.dtype, b.dtype)
    return ((a - b).abs().max() / b.abs().max()).item()


class Block(nn.Module):
    """A residual block as many write it: in place where they can."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.project = GroupNorm(8, c_in), Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.Linear(32, c_out)
        self.norm2, self.conv2 = GroupNorm(8, c_out), Conv2d(c_out, c_out, 3, padding="same")
        self.act, self.drop = nn.SiLU(inplace=True), nn.Dropout(0.1)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h += self.project(e)[:, :, None, None]
        return self.conv2(self.drop(self.act(self.norm2(h)))) + self.skip(x)


class Residual(nn.Module):
    """A small network of them: down, up, and what does not fit at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 32)
        self.stem, self.head, self.norm = Conv2d(3, 64, 3, padding=1), Conv2d(64, 3, 3, padding=1), GroupNorm(8, 64)
        self.a, self.b, self.c = Block(64, 64), Block(64, 128), Block(192, 64)
        self.down = Conv2d(64, 64, 3, stride=2, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), Conv2d(128, 128, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = torch.sin(self.embed(t[:, None].to(x.dtype) / 100))
        a = self.a(self.stem(x), e)
        h = self.up(self.b(self.down(a), e))
        h = self.norm(self.c(torch.cat([h, a], dim=1), e))
        return self.head(h * torch.sigmoid(h))


def unet2d_model(**settings: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    attention = settings.pop("attention")
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(64, 64), layers_per_block=1, norm_num_groups=settings.pop("groups"), add_attention=attention,
        down_block_types=("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D"), **settings,
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    # Of eight blocks: 16 convolutions, and one that halves. Four blocks on the way up have a shortcut. A norm is on its own after the first
    # convolution, after a concatenation (four), and after an attention (two).
    "diffusers": (
        lambda: unet2d_model(attention=False, groups=16),
        {"conv3x3": 17, "conv_up": 1, "group_norm_silu": 5, "norm": 12, "image bias": 8, "skip": 4, "shortcut": 4},
    ),
    "diffusers, scale_shift": (
        lambda: unet2d_model(attention=False, groups=32, resnet_time_scale_shift="scale_shift"),
        {"conv3x3": 17, "conv_up": 1, "group_norm_silu": 5, "norm": 12, "style": 8, "skip": 4, "shortcut": 4},
    ),
    "diffusers, attention": (
        lambda: unet2d_model(attention=True, groups=32),
        {
            **{"conv3x3": 17, "conv_up": 1, "group_norm_silu": 7, "group_norm": 4, "norm": 10},
            **{"image bias": 8, "skip": 4, "shortcut": 4},
        },
    ),
    "diffusers, attention, scale_shift": (
        lambda: unet2d_model(attention=True, groups=16, resnet_time_scale_shift="scale_shift"),
        {"conv3x3": 17, "conv_up": 1, "group_norm_silu": 7, "group_norm": 3, "norm": 10, "style": 8, "skip": 4, "shortcut": 4},
    ),
    "UNet2D": (
        lambda: unet2d.UNet2D(
            unet2d.UNet2DConfig(
                sample_size=16, block_out_channels=(64, 64), layers_per_block=1, resnet_time_scale_shift="scale_shift",
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )
        ),
        {"conv3x3": 17, "conv_up": 1, "group_norm_silu": 7, "group_norm": 3, "norm": 10, "style": 8, "skip": 4, "shortcut": 4},
    ),
    "UNet": (
        lambda: UNet(UNetConfig(shape=(3, 16, 16), channels=(64, 64), middle=1, embedding=64)),
        {"conv3x3": 11, "conv_up": 1, "group_norm_silu": 3, "norm": 8, "style": 5, "skip": 3, "shortcut": 2},
    ),
    # Its groups of 24 channels, after the concatenation, are left alone.
    "Residual": (
        Residual,
        {"conv3x3": 7, "conv_up": 1, "group_norm_silu": 1, "norm": 5, "image bias": 3, "skip": 1, "shortcut": 2},
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, dict[str, int]]:
    make, wanted = NETWORKS[name]
    return lively(make()), wanted


def says(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = network(x, torch.arange(1, len(x) + 1) * 100)
    return out if isinstance(out, Tensor) else out.sample


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_what_it_said_and_is_replaced_as_meant(name):
    network, wanted = made(name)
    images = {"three": drawn(3, 3, 16, 16)}
    if "attention" not in name:  # these take longest to trace
        images["one, channels last"] = drawn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        images["three, every other row"] = drawn(3, 3, 32, 16, seed=1)[:, :, ::2]
    before = {key: says(network, x) for key, x in images.items()}
    assert report(network) == {}
    assert accelerate(network) is network and report(network) == {}
    for key, x in images.items():
        after = says(network, x)
        assert error(after, before[key]) < CLOSE, key
        assert after.stride() == before[key].stride(), key
        assert report(network) == wanted, key


def test_an_empty_batch():
    network, wanted = made("Residual")
    out = says(accelerate(network), drawn(0, 3, 16, 16))
    assert out.shape == (0, 3, 16, 16) and report(network) == wanted


@pytest.mark.parametrize(("inner", "most"), [(None, 12), ("aot_eager", 4)])
def test_one_trace_for_all_batches_if_asked(inner, most):
    """Of more sizes than Dynamo would keep traces of, and through AOTAutograd, as inductor has it."""
    network, wanted = made("Residual")
    before = [says(network, drawn(n, 3, 16, 16)) for n in range(2, most)]
    accelerate(network, dynamic=True, inner=inner)
    counters = torch._dynamo.utils.counters["stats"]
    traced = counters["unique_graphs"]
    for n, out in zip(range(2, most), before, strict=True):
        assert error(says(network, drawn(n, 3, 16, 16)), out) < CLOSE
    assert report(network) == wanted and counters["unique_graphs"] == traced + 1


def test_ten_networks_side_by_side():
    """Dynamo keeps eight graphs with the code of a function, so functions that shared theirs would leave the ninth as it was."""
    networks = [nn.Sequential(lively(GroupNorm(8, 64), seed), nn.SiLU()) for seed in range(10)]
    x = drawn(2, 64, 8, 8)
    for network in networks:
        with torch.no_grad():
            before = network(x)
            assert error(accelerate(network)(x), before) < CLOSE
        assert report(network) == {"group_norm_silu": 1}


def test_the_module_stays_what_it_is():
    network, wanted = made("Residual")
    kept = network.state_dict()
    attributes = set(vars(network)) - {"_compiled_call_impl"}
    facts = {key: (v.data_ptr(), v.stride(), v.clone()) for key, v in kept.items()}
    parameters = [*map(id, network.parameters())]
    x = drawn(2, 3, 16, 16)
    before = says(network, x)
    says(accelerate(network), x)
    assert type(network) is Residual and set(vars(network)) - {"_compiled_call_impl"} == attributes
    assert [*map(id, network.parameters())] == parameters and list(network.state_dict()) == list(facts)
    for key, v in network.state_dict().items():
        pointer, stride, values = facts[key]
        assert v.data_ptr() == pointer and v.stride() == stride and torch.equal(v, values), key
    twin = copy.deepcopy(network)
    assert torch.equal(says(twin, x), before) and report(twin) == {} and report(network) == wanted


def test_unaccelerate_puts_back_what_was_there():
    network, wanted = made("Residual")
    x = drawn(2, 3, 16, 16)
    before = says(network, x)
    accelerate(accelerate(network))
    assert error(says(network, x), before) < CLOSE and report(network) == wanted
    assert unaccelerate(network) is network and network._compiled_call_impl is None and report(network) == {}
    assert torch.equal(says(network, x), before)

    compiled = []

    def backend(gm, examples):
        compiled.append(gm)
        return gm.forward

    network.compile(backend=backend)
    own = network._compiled_call_impl
    accelerate(accelerate(network))
    says(network, x)
    assert not compiled and report(network)
    unaccelerate(network)
    assert network._compiled_call_impl is own and torch.equal(says(network, x), before) and len(compiled) == 1


def test_an_accelerated_module_can_be_let_go():
    network, _ = made("Residual")
    network.compile(backend="eager")
    says(accelerate(network), drawn(1, 3, 16, 16))
    torch._dynamo.reset()
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_changes_of_the_weights_are_followed():
    network, wanted = made("Residual")
    x = drawn(2, 3, 16, 16)
    first = says(accelerate(network), x)
    other = lively(Residual(), seed=1)
    with torch.no_grad():
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    second = says(network, x)
    assert error(second, says(other, x)) < CLOSE < error(second, first)
    network.load_state_dict(lively(Residual()).state_dict(), assign=True)
    assert error(says(network, x), first) < CLOSE and report(network) == wanted


def test_gradients_are_those_of_the_network():
    network, wanted = made("Residual")
    x, t = drawn(2, 3, 16, 16), torch.tensor([5, 6])
    names = [name for name, _ in network.named_parameters()]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(x, t).square().sum(), [x, *network.parameters()])

    before = gradients(x.clone().requires_grad_())
    without = says(accelerate(network), x)
    assert report(network) == wanted
    for name, a, b in zip(["x", *names], gradients(x.clone().requires_grad_()), before, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(says(network, x), without)

    # With nothing that has a gradient, grad mode changes nothing; and of the image alone it is eager's again.
    network.requires_grad_(False)
    assert torch.equal(network(x, torch.tensor([100, 200])), without)
    (a,) = torch.autograd.grad(network(image := x.clone().requires_grad_(), t).square().sum(), image)
    assert torch.equal(a, before[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own derivatives use it
def test_derivatives_in_forward_mode_are_those_of_the_network():
    network, _ = made("Residual")
    x, v, t = drawn(2, 3, 16, 16), drawn(2, 3, 16, 16, seed=1), torch.tensor([5, 6])

    def derivative() -> Tensor | None:
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(network(torch.autograd.forward_ad.make_dual(x, v), t)).tangent

    before, by_func = derivative(), torch.func.jvp(lambda x: network(x, t), (x,), (v,))[1]
    says(accelerate(network), x)
    after = derivative()
    assert before is not None and after is not None and torch.equal(after, before)
    assert torch.equal(torch.func.jvp(lambda x: network(x, t), (x,), (v,))[1], by_func)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.enable_grad()], ids=["autocast", "grad"])
def test_what_is_computed_in_another_mode_is_left_alone(mode, inside):
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = GroupNorm(8, 64), Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            with mode() if inside else contextlib.nullcontext():
                return self.conv(self.norm(x))

    network, x = lively(Inside()), drawn(2, 64, 8, 8)
    with torch.no_grad(), contextlib.nullcontext() if inside else mode():
        before = network(x)
        after = accelerate(network)(x)
    assert torch.equal(after, before) and after.requires_grad == before.requires_grad and report(network) == {}
    with torch.no_grad():
        after = network(x)
    assert report(network) == ({} if inside else {"conv3x3": 1, "group_norm": 1})


def test_bf16_is_as_close_as_it_was():
    """In the two norms' sense, since a few values of bf16 fall to either side by chance: twice the error of the plain module is what the ops allow."""
    for name in ("Residual", "UNet"):
        network, wanted = made(name)
        x = drawn(4, 3, 16, 16)
        exact = says(network, x)
        low = copy.deepcopy(network).bfloat16()
        plain = says(low, x.bfloat16())
        fused = says(accelerate(low), x.bfloat16())
        assert fused.dtype == torch.bfloat16 and report(low) == wanted
        for size in (lambda v: v.abs().max(), lambda v: v.square().mean().sqrt()):
            assert 0 < size(fused.float() - exact) <= 2 * size(plain.float() - exact), name


ONE = {"conv3x3": 1}
ALONE = {
    "fits": (lambda: Conv2d(64, 64, 3, padding=1), 16, ONE),
    "fits, strided": (lambda: Conv2d(32, 128, 3, stride=2, padding=1), 16, ONE),
    "fits, same": (lambda: Conv2d(96, 64, 3, padding="same"), 8, ONE),
    "stride 3": (lambda: Conv2d(64, 64, 3, stride=3, padding=1), 16, {}),
    "5x5": (lambda: Conv2d(64, 64, 5, padding=2), 16, {}),
    "1x1": (lambda: Conv2d(64, 64, 1), 16, {}),
    "3x1": (lambda: Conv2d(64, 64, (3, 1), padding=(1, 0)), 16, {}),
    "no padding": (lambda: Conv2d(64, 64, 3), 18, {}),
    "dilated": (lambda: Conv2d(64, 64, 3, padding=2, dilation=2), 16, {}),
    "dilated, same": (lambda: Conv2d(64, 64, 3, padding="same", dilation=2), 16, {}),
    "two groups": (lambda: Conv2d(64, 64, 3, padding=1, groups=2), 16, {}),
    "circular": (lambda: Conv2d(64, 64, 3, padding=1, padding_mode="circular"), 16, {}),
    "12 channels in": (lambda: Conv2d(12, 64, 3, padding=1), 16, {}),
    "12 channels out": (lambda: Conv2d(64, 12, 3, padding=1), 16, {}),
    "20 pixels": (lambda: Conv2d(64, 64, 3, padding=1), 20, {}),
    "32 pixels": (lambda: Conv2d(64, 64, 3, padding=1), 32, {}),
    "odd, strided": (lambda: Conv2d(64, 64, 3, stride=2, padding=1), 15, {}),
    "float64": (lambda: Conv2d(64, 64, 3, padding=1).double(), 16, {}),
    "norm": (lambda: GroupNorm(8, 64), 20, {"group_norm": 1}),
    "norm, no affine": (lambda: nn.Sequential(GroupNorm(1, 8, affine=False), nn.SiLU()), 5, {"group_norm_silu": 1}),
    "norm, 12 channels": (lambda: GroupNorm(3, 12), 16, {}),
    "norm, groups of 3": (lambda: GroupNorm(8, 24), 16, {}),
    "norm, float64": (lambda: GroupNorm(8, 64).double(), 16, {}),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), 16, {}),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_does_not_fit_is_left_alone(name):
    make, side, wanted = ALONE[name]
    module = lively(make())
    first = next(m for m in module.modules() if isinstance(m, (nn.modules.conv._ConvNd, GroupNorm)))
    x = drawn(2, first.num_channels if isinstance(first, GroupNorm) else first.in_channels, side, side)
    x = x.to(next((p.dtype for p in module.parameters()), x.dtype))
    with torch.no_grad():
        before = module(x)
        after = accelerate(module)(x)
    assert report(module) == wanted
    assert error(after, before) < CLOSE if wanted else torch.equal(after, before)


def test_the_sizes_that_fit_are_those_of_the_kernels():
    pytest.importorskip("triton")
    from fastdiff.kernels import conv

    sides, groups = (0, 1, 2, 3, 4, 8, 16, 32, 64, 256, 512), (None, 1, 2, 3, 6, 8, 64, 128)
    outs, ins = (12, 64, 96, 128, 192), ((32,), (48,), (64, 32), (64, 12))
    found = set()
    for *case, channels in itertools.product(sides, sides, outs, groups, ins):
        found.add(fits := _covers(*case, *channels))
        assert fits == (conv.fits(*case, *channels) is None), (case, channels)
    assert found == {True, False}


class Wired(nn.Module):
    """Parts that `wire` puts together in ways that may be taken together, or may not."""

    def __init__(self, wire: Callable[["Wired", Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wire = wire
        self.conv, self.conv2, self.point = Conv2d(64, 64, 3, padding=1), Conv2d(64, 64, 3, padding=1), Conv2d(64, 64, 1)
        self.norm, self.norm2, self.norm3, self.linear = GroupNorm(8, 64), GroupNorm(8, 64), GroupNorm(16, 64), nn.Linear(64, 128)

    def forward(self, x: Tensor, e: Tensor) -> Any:
        return self.wire(self, x, e)


def tall(v: Tensor) -> Tensor:
    return v[:, :, None, None]


def styled(m: Wired, h: Tensor, e: Tensor) -> Tensor:
    scale, shift = tall(m.linear(e)).chunk(2, dim=1)
    return F.silu(m.norm(h) * (1 + scale) + shift)


def squeezed(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    y = m.conv(x)
    return styled(m, y, y.mean((2, 3)))


def read_before_styled(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    y = m.conv(x)
    return styled(m, y, e + y.sum() * 1e-3) + y


def read_after_styled(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    scale, shift = tall(m.linear(e)).chunk(2, dim=1)
    y = m.conv(x)
    return y * F.silu(torch.addcmul(shift, scale + 1, m.norm(y)))


def keeps_what_it_changes(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    h = m.conv(x)
    kept = h
    h += 1
    return F.silu(m.norm(h)) + kept


def changes_a_view(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    h = m.conv(x)
    h[:, :, 0] = 0
    return F.silu(m.norm(h))


def changes_its_own(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    h = m.conv(x).add_(tall(e))
    return F.silu(m.norm(h), inplace=True).mul_(2)


def noisy(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    torch.manual_seed(0)
    h = m.conv(x)
    return h + F.dropout(h, 0.5, training=True) + torch.randn_like(h.transpose(1, 3)).transpose(1, 3)


def broken(m: Wired, x: Tensor, e: Tensor) -> Tensor:
    h = F.silu(m.norm(m.conv(x)))
    torch._dynamo.graph_break()
    return m.conv2(h)


NORMED = {"conv3x3": 1, "norm": 1}
WIRINGS: list[tuple[Callable[[Wired, Tensor, Tensor], Any], dict[str, int]]] = [
    (lambda m, x, e: F.silu(m.norm(m.conv(x))), NORMED),
    (lambda m, x, e: m.norm(m.conv(x)), {"conv3x3": 1, "group_norm": 1}),
    (lambda m, x, e: styled(m, m.conv(x), e), NORMED | {"style": 1}),
    (lambda m, x, e: styled(m, x, e), {"group_norm_silu": 1, "style": 1}),
    (squeezed, {"conv3x3": 1, "group_norm_silu": 1, "style": 1}),
    (read_before_styled, {"conv3x3": 1, "group_norm_silu": 1, "style": 1}),
    (read_after_styled, NORMED | {"style": 1}),
    (lambda m, x, e: F.silu(m.norm(m.conv(x)) * (1 + tall(e)[:1]) + tall(e)), {"conv3x3": 1, "group_norm": 1}),
    (lambda m, x, e: F.silu(m.norm(m.conv(x)) * (2 + tall(e)) + tall(e)), {"conv3x3": 1, "group_norm": 1}),
    (lambda m, x, e: F.silu(m.norm(m.conv(x))) + F.silu(m.norm2(x)), NORMED | {"group_norm_silu": 1}),
    (lambda m, x, e: [F.silu(n(y)) for y in [m.conv(x)] for n in (m.norm, m.norm2, m.norm3)], NORMED | {"group_norm_silu": 2}),
    (lambda m, x, e: [(h := m.norm(m.conv(x))), F.silu(h)], {"conv3x3": 1, "group_norm": 1}),
    (lambda m, x, e: [(y := m.conv(x)), y + x], ONE),
    (lambda m, x, e: [(y := m.conv(x)) + y, F.silu(m.norm(y))], NORMED),
    (lambda m, x, e: (y := m.conv(x)) + y, ONE),
    (lambda m, x, e: m.conv(x) + tall(e) + x, ONE | {"image bias": 1, "skip": 1}),
    (lambda m, x, e: (x + (tall(e[:1]) + m.conv(x))) / 2, ONE | {"image bias": 1, "skip": 1}),
    (lambda m, x, e: m.conv(x) + tall(e) + tall(e), ONE | {"image bias": 1}),
    (lambda m, x, e: m.conv(x) + x + x, ONE | {"skip": 1}),
    (lambda m, x, e: torch.add(m.conv(x), x, alpha=2), ONE),
    (lambda m, x, e: m.conv(x) + x[:, :1], ONE),
    (lambda m, x, e: m.conv(x[:1]) + x, ONE),
    (lambda m, x, e: m.conv(x) - x, ONE),
    (lambda m, x, e: m.conv(x) + m.conv2(x), {"conv3x3": 2, "skip": 1}),
    (lambda m, x, e: m.conv(m.conv2(x)) + m.point(x), {"conv3x3": 2, "shortcut": 1}),
    (lambda m, x, e: [m.conv(x) + (p := m.point(x)), p], ONE | {"skip": 1}),
    (lambda m, x, e: F.silu(m.norm((m.conv(x) + x) / 1.0)), NORMED | {"skip": 1}),
    (lambda m, x, e: F.conv2d(x, m.conv.weight, stride=2, padding=1) + x[:, :, ::2, ::2], ONE),
    (lambda m, x, e: m.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), {"conv_up": 1}),
    (lambda m, x, e: F.silu(m.norm(m.conv(F.interpolate(x, size=(16, 16))))), {"conv_up": 1, "norm": 1}),
    (lambda m, x, e: styled(m, m.conv(F.interpolate(x, scale_factor=2)), e), {"conv_up": 1, "group_norm_silu": 1, "style": 1}),
    (lambda m, x, e: m.conv(F.interpolate(x, scale_factor=2)) + tall(e), {"conv_up": 1}),
    (lambda m, x, e: [m.conv(u := F.interpolate(x, scale_factor=2)), u], ONE),
    (lambda m, x, e: m.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear")), ONE),
    (lambda m, x, e: m.conv(F.interpolate(x[:, :, :4], size=(16, 8))), ONE),
    (lambda m, x, e: m.conv(F.interpolate(x, scale_factor=2.05)), ONE),
    (lambda m, x, e: m.norm(x.flatten(2)).transpose(1, 2), {"group_norm": 1}),
    (lambda m, x, e: m.conv(x).view(len(x), -1), ONE),
    (lambda m, x, e: F.silu(m.norm(x)).view_as(x).view(torch.complex64).imag, {"group_norm_silu": 1}),
    (lambda m, x, e: [m.conv(x).permute(0, 2, 3, 1), m.conv(x).contiguous(), x], {"conv3x3": 2}),
    (keeps_what_it_changes, {}),
    (changes_a_view, {}),
    (changes_its_own, NORMED | {"image bias": 1}),
    (noisy, ONE),
    (broken, {"conv3x3": 2, "norm": 1}),
]


@pytest.mark.parametrize(("wire", "wanted"), WIRINGS, ids=map(str, range(len(WIRINGS))))
def test_only_what_nobody_else_reads_is_taken_together(wire, wanted):
    network, x, e = lively(Wired(wire)), drawn(3, 64, 8, 8), drawn(3, 64, seed=1)
    with torch.no_grad():
        before, given = network(x, e), x.clone()
        after = accelerate(network)(x, e)
    assert report(network) == wanted and torch.equal(x, given)
    before, after = ([v] if isinstance(v, Tensor) else v for v in (before, after))
    for a, b in zip(after, before, strict=True):
        assert error(a, b) < CLOSE and a.stride() == b.stride()


def test_what_cannot_be_accelerated_is_refused_in_one_line():
    module = GroupNorm(8, 64)
    with pytest.raises(ValueError, match=r"^accelerate takes a torch\.nn\.Module, not function$"):
        accelerate(F.silu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^inner is 'swift', which is no backend of torch\.compile; give None or one of .*inductor"):
        accelerate(module, inner="swift")
    for thing in (module, F.silu):
        with pytest.raises(ValueError, match=r"is not accelerated; fastdiff\.accelerate does it$"):
            unaccelerate(thing)
    assert module._compiled_call_impl is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sampler_runs_an_accelerated_network_as_such(dtype):
    """As a whole, not its `body`, nor a copy that is not accelerated; and in another dtype an accelerated copy."""
    network = lively(UNet(UNetConfig(shape=(3, 16, 16), channels=(64, 64), middle=1, embedding=64, num_classes=2)))
    make = functools.partial(Sampler, network, Schedule.linear(50), num_classes=2, steps=2, dtype=dtype, micro_batch=3)
    wanted = make(compile=False)(3, labels=1, seed=4)
    accelerate(network)
    sampler = make()
    got = sampler(3, labels=1, seed=4)
    assert sampler.way == "eager"
    assert report(sampler.model)["conv3x3"] == 11
    assert (sampler.model is network) == (dtype == torch.float32)
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    else:
        assert (got - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.skipif(not KERNELS, reason="needs a CUDA GPU of compute capability 9 or 10")
def test_on_a_gpu():
    """In bf16, behind inductor, with the kernels' own checks."""
    network = lively(Residual()).cuda().bfloat16()
    given = drawn(4, 3, 16, 16).cuda().bfloat16(), torch.arange(4, device="cuda")
    with torch.no_grad():
        wanted = network(*given)
        got = accelerate(network)(*given)
    assert report(network)["conv3x3"] == 7
    assert error(got, wanted) < 0.05  # twenty layers, each rounded to 2^-8

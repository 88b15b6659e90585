"""Small networks, networks that know their data, and the reverse loop written out, that several tests use."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import Checkpoint, Schedule, UNet, UNetConfig, native, noise, reference
from fastdiff.data import Dataset
from fastdiff.reference import COLUMNS, SLOTS
from fastdiff.solvers import Table

SMALL = UNetConfig(shape=(3, 8, 8), channels=(16, 16), blocks=1, middle=0, embedding=32, num_classes=3)


def small_network(seed: int = 0, config: UNetConfig = SMALL) -> UNet:
    """A UNet of random weights in which no path is silent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


def small_checkpoint(seed: int = 0) -> Checkpoint:
    return Checkpoint(small_network(seed), Schedule.linear(50), "epsilon", ("cat", "dog", "10"), {"steps": 1})


def small_dataset(n: int = 64, held_out: int = 8) -> Dataset:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = np.clip(rng.integers(0, 64, (n, 8, 8, 3)) + 64 * labels[:, None, None, None], 0, 255).astype(np.uint8)
    return Dataset(images, labels.astype(np.int64), ("cat", "dog", "10"), np.arange(n) < held_out)


class Exact(nn.Module):
    """A network that knows its data: it says, as `prediction` has it, that x_0 is `believe(x, alpha, sigma)`."""

    def __init__(self, schedule: Schedule, prediction: str = "epsilon") -> None:
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def believe(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        schedule, whole = self.schedule, np.arange(self.schedule.timesteps)
        if schedule.name == "edm":  # t is sigma itself
            sigma = t.double().numpy()
            alpha = np.ones_like(sigma)
        elif schedule.name == "flow":
            sigma = np.interp(t, whole, schedule.sigma)
            alpha = 1 - sigma
        else:  # between timesteps by the log-SNR
            k = np.exp(-np.interp(t, whole, schedule.log_snr))
            alpha, sigma = 1 / np.sqrt(1 + k**2), k / np.sqrt(1 + k**2)
        alpha, sigma = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        x = x.double()
        x0 = self.believe(x, alpha, sigma)
        if self.prediction == "x0":
            return x0.float()
        z = (x - alpha * x0) / sigma
        return {"epsilon": z, "v": alpha * z - sigma * x0, "flow": z - x0}[self.prediction].float()


class FiniteList(Exact):
    """Data that is one of a few images, all as likely: E[x_0 | x] by softmax over the list."""

    def __init__(self, images: Tensor, schedule: Schedule, prediction: str = "epsilon") -> None:
        super().__init__(schedule, prediction)
        self.images = images.double()

    def believe(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        distance = (x[:, None] - alpha[:, None] * self.images[None]).flatten(2).square().sum(2)
        weight = torch.softmax(-distance / (2 * sigma.reshape(-1, 1) ** 2), dim=1)
        return torch.einsum("nk,kchw->nchw", weight, self.images)


class Gaussian(Exact):
    """Data N(mean, deviation^2) in every pixel."""

    def __init__(self, mean: float, deviation: float, schedule: Schedule, prediction: str = "epsilon") -> None:
        super().__init__(schedule, prediction)
        self.mean, self.deviation = mean, deviation

    def believe(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = self.deviation**2 * alpha / (alpha**2 * self.deviation**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


class Plain(nn.Module):
    """A function as a network, which a sampler can only call. parts: modules that are its own."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def guided(
    network: Callable[..., Tensor], labels: Tensor, guidance: float = 1.0, when: Callable[[int], bool] = lambda row: True, null: int = 3
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """What a network says with classifier-free guidance, in the rows where it applies, as `by_hand` asks. A learned variance stays the class's."""

    def says(row: int, x: Tensor, t: Tensor) -> Tensor:
        m = network(x, t, labels).double()
        if guidance != 1 and when(row):
            free, c = network(x, t, torch.full_like(labels, null)).double(), x.shape[1]
            m[:, :c] = free[:, :c] + guidance * (m[:, :c] - free[:, :c])
        return m

    return says


def by_hand(
    says: Callable[[int, Tensor, Tensor], Tensor],
    table: Table,
    shape: Sequence[int],
    ids: Sequence[int],
    *,
    seed: int = 0,
    x: Tensor | None = None,
    guess: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    after: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The reverse loop in plain float64 arithmetic on a table's rows, with the public noise stream: images, fp32 [N, *shape].

    says(row, x, t): the network's answer, guided. x: where to start, else noise. guess(row, x, x0): the x0 that takes the place of the
    network's, before it is clamped. after(row, x): what takes the place of x after a row.
    """
    x = table.start * noise.normal(seed, ids, 0, shape, stream="start").double() if x is None else x.double()
    before, saved, scale = torch.zeros_like(x), torch.zeros(SLOTS, *x.shape).double(), table.scale
    for row, values in enumerate(table.rows):
        r = dict(zip(COLUMNS, values.tolist(), strict=True))
        answer = says(row, (scale * x).float(), torch.full((len(ids),), table.timesteps[row].item())).double()
        m, v = answer[:, : shape[0]], answer[:, shape[0] :]
        x0 = r["px"] * x + r["pm"] * m
        if guess is not None:
            x0 = guess(row, x, x0)
            m = (x0 - r["px"] * x) / r["pm"]  # what a network says that means this x0
        x0 = x0.clamp(-r["clip"], r["clip"])
        new = r["a"] * x + r["b"] * x0 + r["c"] * before + r["d"] * m + sum(r[f"h{k}"] * saved[k] for k in range(SLOTS))
        if r["s"]:
            new = new + r["s"] * (torch.exp(r["log_s"] * v) if r["log_s"] else 1) * noise.normal(seed, ids, row, shape).double()
        if r["slot"] >= 0:
            saved[int(r["slot"])] = r["save_x"] * x + r["save_x0"] * x0
        x, before, scale = new if after is None else after(row, new), x0, r["c_next"]
    return x.float()


@contextmanager
def within_arguments() -> Iterator[None]:
    """Triton's interpreter raises where a kernel loads or stores outside of the tensors that it was given, even what it then makes no use of."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    spans: list[tuple[int, int]] = []
    launch = GridExecutor.__call__

    def launched(self: Any, *given: Any, **named: Any) -> Any:
        tensors = [v for v in (*given, *named.values()) if isinstance(v, Tensor)]
        spans[:] = [(v.data_ptr(), v.data_ptr() + v.numel() * v.element_size()) for v in tensors]
        return launch(self, *given, **named)

    def watched(access: Callable[..., Any], mask: int) -> Callable[..., Any]:
        def call(self: Any, pointers: Any, *rest: Any) -> Any:
            start = pointers.data[rest[mask].data.astype(bool)].astype(np.int64)
            stop = start + pointers.get_element_ty().primitive_bitwidth // 8
            within = np.any([(first <= start) & (stop <= last) for first, last in spans], axis=0)
            assert within.all(), f"{access.__name__} outside of the arguments, {(~within).sum()} times"
            return access(self, pointers, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launched)
        for name, mask in (("create_masked_load", 0), ("create_masked_store", 1)):
            patch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name), mask))
        yield


Build = Callable[[], native.Block]


def blocks(
    layer: Callable[..., native.Layer], skip: Callable[[int, int], Tensor], least: int, beside: int
) -> dict[str, tuple[int, int, Build]]:
    """Blocks of every kind: channels, those beside them, and what builds one, of one way's layers and skips. least: channels that it takes;
    beside: channels beside 48."""
    return {
        "a convolution": (least, 0, lambda: native.Block([layer(least, 64, norm=False)], alone=True)),
        "a norm before it": (32, 0, lambda: native.Block([layer(32, 32, bias=False)])),
        "no SiLU, half of it": (32, 0, lambda: native.Block([layer(32, 32, silu=False)], times=0.5, alone=True)),
        "a block": (64, 0, lambda: native.Block([layer(64, 64), layer(64, 64)])),
        "a block of few that becomes many": (32, 0, lambda: native.Block([layer(32, 96), layer(96, 96)], skip=skip(32, 96))),
        "a block of many that becomes few": (96, 0, lambda: native.Block([layer(96, 32), layer(32, 64, bias=False)], skip=skip(96, 64))),
        "channels beside it": (
            48, beside, lambda: native.Block([layer(48 + beside, 64), layer(64, 64)], skip=skip(48 + beside, 64), times=0.7)
        ),
        "channels beside it, no skip": (16, 48, lambda: native.Block([layer(64, 32, bias=False), layer(32, 64)])),
        "channels beside it, alone": (16, 16, lambda: native.Block([layer(32, 64, norm=False), layer(64, 32)], alone=True)),
        "a style that is added": (32, 0, lambda: native.Block([layer(32, 64, bias=False), layer(64, 32)], added=True)),
    }  # fmt: skip


def block_definition(
    block: native.Block,
    x: Tensor,
    beside: Tensor | None,
    style: Tensor | None,
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    skip: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What a `native.Block` computes, in fp64. convolve(x, weight, bias), skip(x, matrix): of weights as the block has them."""
    whole = (x if beside is None else torch.cat([x, beside], 1)).double()
    made = whole
    for i, (norm, weight, bias) in enumerate(block.layers):
        own = None if style is None or i + 1 < len(block.layers) else style.double()
        if block.added and own is not None:
            made, own = made + own[:, :, None, None], None
        if norm is not None:
            last = made.permute(0, 2, 3, 1).contiguous()
            last = reference.group_norm_silu(last, norm.gamma, norm.beta, own, None, norm.groups, norm.eps, norm.silu, None)
            made = last.permute(0, 3, 1, 2)
        made = convolve(made, weight, None if bias is None else bias.double())
    if block.skip is not None:
        made = made + skip(whole, block.skip)
    elif not block.told.alone:
        made = made + whole
    return made * block.told.times


def guarded(numel: int, around: float, fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Memory among others: (all of it, [numel] in the middle). fill: what is in it, images as channels-last."""
    whole = torch.full((numel + 128,), around, dtype=torch.float32 if fill is None else fill.dtype)
    inner = whole[64:-64]
    if fill is not None:
        inner.copy_(fill.permute(0, 2, 3, 1).flatten() if fill.ndim == 4 else fill.flatten())
    return whole, inner


def untouched(whole: Tensor, around: float = 7.0) -> bool:
    return bool((whole[:64] == around).all() and (whole[-64:] == around).all())


def in_memory_of_its_own(block: native.Block) -> native.Block:
    """The block, with all that C reads of it among NaN."""

    def kept(tensor: Tensor) -> Tensor:
        return guarded(tensor.numel(), torch.nan, tensor.flatten())[1].view(tensor.shape)

    layers = []
    for norm, weight, bias in block.layers:
        norm = norm and norm._replace(gamma=kept(norm.gamma), beta=kept(norm.beta))
        layers.append(native.Layer(norm, kept(weight), None if bias is None else kept(bias)))
    options = {"times": block.told.times, "alone": bool(block.told.alone), "added": block.added}
    return native.Block(layers, skip=None if block.skip is None else kept(block.skip), **options)

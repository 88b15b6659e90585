"""What the kernels in C save on one core: single convolutions, and evaluations of the shipped networks, beside PyTorch's own and beside what there is
without a C compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import cpu, native
from fastdiff.loop import Network
from fastdiff.sampler import _one_thread


@dataclass(frozen=True)
class Convolution:
    """3 x 3, of `rows` images of side x side pixels, as the shipped networks have them."""

    c_in: int
    c_out: int
    side: int
    rows: int = 64

    def __str__(self) -> str:
        return f"{self.c_in}-{self.c_out}@{self.side}-{self.rows}"


CONVOLUTIONS = [
    Convolution(64, 64, 8),
    Convolution(128, 64, 8),
    Convolution(128, 128, 8),
    Convolution(128, 128, 4),
    Convolution(256, 128, 4),
]


@pytest.fixture
def measure(benchmark, interleaved, describe) -> Callable[..., None]:
    """Time ours by pytest-benchmark, and then ours and the others in turns, on one thread; all of it goes into the row."""

    def run(runs: dict[str, Callable[[], object]], shape: tuple[int, ...], **about: object) -> None:
        with torch.no_grad(), _one_thread():
            benchmark(runs["ours"])
            seconds, found = interleaved(runs)
        benchmark.extra_info |= {
            **describe("cpu", torch.float32, shape), "threads": 1, **about,
            **{f"{name}_us": round(median(values) * 1e6, 2) for name, values in seconds.items()}, **found,
        }  # fmt: skip

    return run


def without_c(build: Callable[[], nn.Module]) -> nn.Module:
    with mock.patch.object(native, "available", return_value=False):
        return build()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_cpu_convolution(case, measure):
    if not native.available():
        pytest.skip("needs a C compiler")
    direct = nn.Conv2d(case.c_in, case.c_out, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(case.rows, case.c_in, case.side, case.side).to(memory_format=torch.channels_last)
    ways = {"ours": cpu.WinogradConv2d(direct), "without_c": without_c(lambda: cpu.WinogradConv2d(direct)), "direct": direct}
    for way in ways.values():
        cpu.pack(way)
    with torch.no_grad():
        torch.testing.assert_close(ways["ours"](x), direct(x), atol=1e-4, rtol=0)
    operations = 18 * case.rows * case.side**2 * case.c_in * case.c_out
    measure({name: lambda way=way: way(x) for name, way in ways.items()}, tuple(x.shape), case=str(case), operations=operations)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("name", fastdiff.checkpoint.shipped())
def test_cpu_network(name, rows, measure):
    """`ours`: as a Sampler runs it. `direct`: the network as it is. `sprites`: that network, as a Sampler runs it."""
    if not native.available():
        pytest.skip("needs a C compiler")
    checkpoint = fastdiff.load(name)
    classes = len(checkpoint.classes)
    networks = {
        "ours": Network(checkpoint.model, classes, None),
        "without_c": without_c(lambda: Network(checkpoint.model, classes, None)),
    }
    x, t = torch.randn(rows, *checkpoint.shape), torch.full((rows,), 200)
    with torch.no_grad():
        condition = checkpoint.model.condition(t, torch.arange(rows) % classes)
    runs = {way: lambda network=network: network.call(x, condition) for way, network in networks.items()}
    runs["direct"] = lambda: checkpoint.model.body(x, condition)
    with torch.no_grad():
        for run in runs.values():
            torch.testing.assert_close(run(), runs["direct"](), atol=1e-3, rtol=0)
        if name != "sprites":
            sprites = Network(fastdiff.load("sprites").model, classes, None)
            other = sprites.model.condition(t, torch.arange(rows) % classes)
            runs["sprites"] = lambda: sprites.call(x, other)
    measure(runs, tuple(x.shape), case=f"{name}, {rows} images", operations=checkpoint.model.flops() * rows)

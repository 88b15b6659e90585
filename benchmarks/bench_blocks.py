"""A fused residual block, two launches, against `fastdiff.unet.ResBlock` compiled and eager, of the same weights on the same activations.

Theirs begins with the norm before its first convolution, ours ends with the norm before the next block's. On the way up that of the other input was
written on the way down, so "up" does a norm less than theirs, and "down" one more.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import copy_rate, launches, layers_of, matmul_rate, repeated, way_of
from fastdiff import UNet, UNetConfig, ops, reference
from fastdiff.fused import Block, FusedUNet, calibrate
from fastdiff.sampler import _compiled, _one_thread, _room_to_compile

CUDA = torch.cuda.is_available()
KERNELS = CUDA and ops.has_kernels(torch.device("cuda"))
# Of a bf16 result, and of one of e4m3 products, root mean square over root mean square.
APART = {torch.float32: 1e-5, torch.bfloat16: 0.02, reference.FP8: 0.1}


class Case(NamedTuple):
    """kind: "middle", one input and its skip as it is; "down", which writes a second norm; "up", two inputs and a shortcut."""

    device: str
    kind: str
    channels: int
    side: int
    batch: int
    dtype: torch.dtype

    def __str__(self) -> str:
        c = self.channels
        what = f"{c}+{c}->{c}" if self.kind == "up" else str(c)
        return f"{self.device}-{self.kind}-{what}@{self.side}-{self.batch}-{str(self.dtype).removeprefix('torch.')}"


SHAPES = [
    ("middle", 64, 8), ("middle", 128, 4), ("up", 64, 8), ("up", 128, 4), ("down", 64, 8), ("middle", 128, 8), ("middle", 256, 8),
    ("middle", 256, 4), ("middle", 64, 16),
]  # fmt: skip
# What a time limit cuts off comes last.
CASES = [
    *(Case("cpu", kind, 64, 8, 32, torch.float32) for kind in ("middle", "up")),
    *(Case("cuda", *shape, batch, dtype) for batch in (1024, 4096) for dtype in (torch.bfloat16, reference.FP8) for shape in SHAPES),
]


def _param(case: Case) -> Any:
    missing = "needs a CUDA GPU" if case.device == "cuda" and not CUDA else ""
    if case.dtype == reference.FP8 and CUDA and not KERNELS:
        missing = "e4m3 needs compute capability 9 or 10 (H100, H200, B200)"
    return pytest.param(case, id=str(case), marks=pytest.mark.skipif(bool(missing), reason=missing))


@pytest.fixture(params=map(_param, CASES))
def case(request) -> Case:
    return request.param


def small(case: Case) -> UNet:
    """A network of one width with random weights, on the device. Two blocks of a kind: the last of all is no example, the head wants its norm only."""
    config = UNetConfig(shape=(3, case.side, case.side), patch=1, channels=(case.channels,), blocks=2, middle=1, num_classes=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.05)
    wide = torch.bfloat16 if case.device == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(case.device, wide)


def recorded(fused: FusedUNet, case: Case, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Block, tuple[Any, ...]]:
    """The first block of that kind, and what it is given in one evaluation: h, h normalised, the partner's two on the way up, conditions, which."""
    block = next(stage for stage in fused.stages if isinstance(stage, Block) and stage.way == case.kind)
    seen: list[tuple[Any, ...]] = []
    # The list of skips is copied: the block takes from it.
    handle = block.register_forward_pre_hook(lambda _, args: seen.append((*args[:2], list(args[2]), *args[3:])))
    fused.body(*given)
    handle.remove()
    return block, seen[0]


def own(block: Block, inputs: tuple[Any, ...]) -> Callable[[], Tensor]:
    """One call of the fused block, its skips given anew."""
    h, act, skips, *conditions = inputs
    return lambda: block(h, act, list(skips), *conditions)[0]


def test_blocks(benchmark, case, interleaved, rounds, describe, no_compiled):
    model = small(case)
    device, wide = case.device, model.stem.weight.dtype
    block = {"down": model.down, "middle": model.middle, "up": model.up}[case.kind][0]
    with torch.no_grad(), _one_thread(), _room_to_compile(freeze=False):
        labels = torch.arange(9, device=device)
        conditions = model.condition(torch.full_like(labels, 200), labels)
        x = torch.randn(case.batch, *model.config.shape, generator=torch.Generator().manual_seed(0)).to(device, wide)
        given = x, conditions, torch.arange(case.batch, device=device) % 9
        fused = FusedUNet(model)
        if case.dtype == reference.FP8:
            sixteen = fused
            fused = calibrate(fused, lambda network: network.body(*given))
        stage, inputs = recorded(fused, case, given)
        ours = own(stage, inputs)
        layers = [layer for layer in layers_of(fused, lambda: fused.body(*given)) if layer.convolution in (stage.first, stage.second)]

        h, _, skips, *_ = inputs
        before = skips[-1][0].permute(0, 3, 1, 2) if case.kind == "up" else None
        here = h.permute(0, 3, 1, 2)  # channels-last, as the network has them
        style = conditions[given[2], stage.first.modulated]

        def eager(h: Tensor, before: Tensor | None, style: Tensor) -> Tensor:
            return block(h if before is None else torch.cat([h, before], dim=1), style)

        calls: dict[str, Callable[[], Tensor]] = {"ours": ours, "eager": lambda: eager(here, before, style)}
        # Of fp8 the others are bf16 as before, and have been compiled for then.
        reason = no_compiled(device) or ("left out: see the row in bfloat16" if case.dtype == reference.FP8 else None)
        if reason is None:
            compiled = _compiled(eager, cuda=device == "cuda")
            calls["compiled"] = lambda: compiled(here, before, style)
        if case.dtype == reference.FP8:
            calls["bfloat16"] = own(*recorded(sixteen, case, given))

        wanted = calls["eager"]().permute(0, 2, 3, 1).float()
        far = float((ours().float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        assert far < APART[case.dtype]

        flops = sum(layer.flops() for layer in layers)
        moved = sum(layer.moved for layer in layers)
        many = launches(flops, device)
        for call in calls.values():
            call()
        runs = {name: repeated(call, [()], many, device) for name, call in calls.items()}
        benchmark.pedantic(runs["ours"], rounds=rounds, warmup_rounds=1)
        seconds, found = interleaved(runs)
    each = {name: median(values) / many for name, values in seconds.items()}
    rate = matmul_rate(device, case.dtype)
    benchmark.extra_info |= {
        **describe(device, case.dtype, h.shape), "threads": 1 if device == "cpu" else torch.get_num_threads(),
        "kind": case.kind, "channels": [v.shape[1] for v in (here, before) if v is not None], "ways": [way_of(layer, "fused") for layer in layers],
        "launches_per_call": 2 * many, "distance_to_eager": float(f"{far:.2g}"),
        "flops": flops, "bytes_moved": moved,
        **{f"{name}_us": round(value * 1e6, 3) for name, value in each.items()},
        **{f"{name}_tflop_per_s": float(f"{flops / value / 1e12:.4g}") for name, value in each.items()},
        "gb_per_s": round(moved / each["ours"] / 1e9, 2),
        "matmul_tflop_per_s": float(f"{rate / 1e12:.4g}"), "fraction_of_matmul": round(flops / each["ours"] / rate, 4),
        "copy_gb_per_s": round(copy_rate(device) / 1e9, 1), "fraction_of_copy": round(moved / each["ours"] / copy_rate(device), 4),
        **found,
        **({"compiled": reason} if reason else {}),
    }  # fmt: skip

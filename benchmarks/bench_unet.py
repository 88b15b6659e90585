"""One evaluation of the shipped network: eager and compiled, on CUDA out of a graph, and how near to a matrix product it comes."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from benchmarks import gauges, peers
from benchmarks.conftest import captured, interleave
from fastdiff.loop import Network
from fastdiff.sampler import _compiled, _one_thread, _room_to_compile

CUDA = torch.cuda.is_available()
CASES = [*(("cpu", rows) for rows in (16, 64)), *(("cuda", rows) for rows in (1024, 4096, 256, 64, 16, 1))]


@pytest.mark.parametrize(
    ("device", "rows"),
    [pytest.param(d, n, id=f"{d}-{n}", marks=pytest.mark.skipif(d == "cuda" and not CUDA, reason="needs a CUDA GPU")) for d, n in CASES],
)
def test_unet(benchmark, device, rows, rounds, describe, no_compiled):
    """`ours`: as a sampler calls it, its table of conditions given; on a CPU on one thread. `plain`: the network as it is."""
    source, ckpt = peers.weights()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = ckpt.model.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *ckpt.shape, generator=generator).to(device, dtype)
    t, labels = torch.full((rows,), 200, device=device), torch.arange(rows, device=device) % len(ckpt.classes)
    with torch.no_grad(), _one_thread(), _room_to_compile(freeze=device == "cpu"):
        condition = model.condition(t, labels)
        network = Network(model, len(ckpt.classes), None)
        runs = {"plain": lambda: model(x, t, labels), "eager": lambda: network.call(x, condition)}
        reason = no_compiled(device)
        if reason is None:
            compiled = _compiled(Network(model, len(ckpt.classes), None).call, cuda=device == "cuda")
            compiled(x, condition)
            runs["compiled"] = lambda: compiled(x, condition)
        if device == "cuda":
            runs = {name: captured(run) for name, run in runs.items()}
        best = "compiled" if "compiled" in runs else "eager"
        benchmark.pedantic(runs[best], rounds=rounds, warmup_rounds=1)
        seconds = {name: median(values) for name, values in interleave(runs, rounds).items()}
        rate = gauges.matmul_rate(device, dtype)
    benchmark.extra_info |= {
        **describe(device, dtype, x.shape),
        "weights": source, "threads": 1 if device == "cpu" else torch.get_num_threads(), "ours": best,
        **({} if reason is None else {"compiled": reason}),
        **{f"{name}_images_per_s": round(rows / value, 1) for name, value in seconds.items()},
        **{f"{name}_gflop_per_s": round(ckpt.model.flops() * rows / value / 1e9, 1) for name, value in seconds.items()},
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "fraction_of_matmul": round(ckpt.model.flops() * rows / seconds[best] / rate, 4),
    }  # fmt: skip

"""The fused network launch by launch: time, bytes and operations of each, beside what the device reaches: `python -m benchmarks.layers`.

A layer is timed alone, over and over on the inputs that it has in the network: on a GPU what it reads may still lie in the L2, as it often does in a
sampler, so it can come out above what `copy_` makes of memory. Its bytes are the fewest that it must read and write.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gauges
from benchmarks.conftest import LAUNCHES, captured, described, in_turn, interleave
from fastdiff import Checkpoint, cli, library, load, ops, reference, tuned
from fastdiff.cli import DTYPES
from fastdiff.devices import pick_device
from fastdiff.files import atomic_write
from fastdiff.fused import Convolution, FusedUNet, calibrate

PROG = "python -m benchmarks.layers"
ROWS = {"cuda": 1024, "cpu": 64}
ROUNDS = 5
# Names of dtypes where room is short.
SHORT = {"float8_e4m3fn": "fp8", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Layer(NamedTuple):
    """A launch of the fused network: a convolution, its op by name, the arguments that the op was called with, and the bytes that it must move."""

    convolution: Convolution
    op: str
    args: tuple[Any, ...]
    moved: int

    @property
    def key(self) -> str:
        return tuned.key(*tuned.shape(self.op, self.args))

    def flops(self) -> int:
        """Of all images."""
        return tuned.shape(self.op, self.args).n * self.convolution.flops()


class Calls(TorchDispatchMode):
    """The network's own operations in order, with their arguments and the bytes that they must move."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fastdiff":
            self.made.append((func._schema.name.split("::")[1], args, traffic(args, results)))
        return results


def fused_network(
    checkpoint: Checkpoint, device: torch.device, kind: torch.dtype | str, rows: int
) -> tuple[FusedUNet, tuple[Tensor, Tensor, Tensor]]:
    """The checkpoint's network by fused operations, and what its `body` is called with: noise, a table of conditions, and who has which of its rows.

    kind: a dtype, or "fp8". The checkpoint's network itself is put on the device. ValueError where the GPU has no e4m3.
    """
    cuda = device.type == "cuda"
    if kind == "fp8" and cuda and not ops.has_kernels(device):
        raise ValueError(f"fp8 needs a GPU of compute capability 9 or 10, which {torch.cuda.get_device_name(device)} is not")
    dtype = kind if isinstance(kind, torch.dtype) else torch.bfloat16 if cuda else torch.float32
    fused = FusedUNet(checkpoint.model.to(device, dtype))
    model = fused.model
    classes = (model.config.num_classes or 0) + 1
    x = torch.randn(rows, *model.config.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    t = torch.full((classes,), checkpoint.schedule.timesteps // 2, device=device)
    conditions = model.condition(t, torch.arange(classes, device=device) if model.config.num_classes else None)
    given = x, conditions, torch.arange(rows, device=device) % classes
    if kind == "fp8":
        fused = calibrate(fused, lambda network: network.body(x[:64], conditions, given[2][:64]))
    return fused, given


def layers_of(fused: FusedUNet, run: Callable[[], object]) -> list[Layer]:
    """The launches of one evaluation, which `run` makes."""
    with Calls() as calls:
        run()
    return [Layer(convolution, *made) for convolution, made in zip(fused.convolutions(), calls.made, strict=True)]


def traffic(args: Sequence[Any], results: Any) -> int:
    """The fewest bytes that a call must read and write: each tensor once, and of a table of conditions its own columns."""
    if isinstance(results, Tensor):
        results = [results]
    flat = [v for given in (*args, *results) for v in (given if isinstance(given, list) else [given])]
    return sum(v.numel() * v.element_size() for v in flat if isinstance(v, Tensor))


def by_library(op: str) -> Callable[..., Any]:
    """An op by what PyTorch has."""
    call: Callable[..., Any] = getattr(library, op)
    return call if op == "conv_out" else functools.partial(call, norm=ops.group_norm_silu)


def way_of(layer: Layer, way: str) -> str:
    """How a launch runs: "reference" on a CPU, "library", or "kernel" with the pixels and stages of a program where a table says them."""
    if way == "library":
        return way
    weight = layer.args[1]
    if weight.device.type != "cuda":
        return "reference"
    if layer.convolution.uncovered(weight.device, weight.dtype) is not None:
        return "library"
    name, sizes = tuned.way(torch.cuda.get_device_name(weight.device), layer.key)
    return " ".join([name, *map(str, sizes.values())])


def launches(flops: int, device: str) -> int:
    """Launches of one graph: enough that its start weighs little (20 us of the 10 ms of 4e12 operations at 400 TFLOP/s). One plain call on a CPU."""
    return max(8, min(LAUNCHES, round(4e12 / flops))) if device == "cuda" else 1


def repeated(call: Callable[..., object], sets: Sequence[tuple[Any, ...]], many: int, device: str) -> Callable[[], object]:
    """`many` calls over the sets in turn, on CUDA out of a graph."""
    run = in_turn(call, sets, many)
    return captured(run) if device == "cuda" else run


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product. On a CPU, where e4m3 is computed in fp32, that of fp32."""
    if dtype != reference.FP8:
        return gauges.matmul_rate(device, dtype)
    if device != "cuda":
        return gauges.matmul_rate(device, torch.float32)
    n, one = 8192, torch.ones((), device=device)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    run = functools.partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * n**3 / _best(run, device)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes a second of `copy_`, read and written, of more than any cache holds."""
    source = torch.zeros(1 << (28 if device == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(run: Callable[[], object], device: str) -> float:
    """Seconds, the least of some."""
    best = math.inf
    for _ in range(11):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def profile(
    fused: FusedUNet, given: tuple[Tensor, Tensor, Tensor], way: str, rounds: int = ROUNDS
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every launch, and one for all. way: "fused", or "library" for PyTorch's operations throughout."""
    x = given[0]
    device = x.device.type
    with torch.no_grad():
        found = layers_of(fused, lambda: fused.body(*given))
        runs, counts = {}, {}
        for layer in found:
            name = layer.convolution.name
            call = by_library(layer.op) if way == "library" else getattr(ops, layer.op)
            call(*layer.args)  # compiles its kernel
            counts[name] = launches(layer.flops(), device)
            runs[name] = repeated(call, [layer.args], counts[name], device)
        if way == "fused":
            counts["network"] = launches(sum(layer.flops() for layer in found), device)
            runs["network"] = repeated(fused.body, [given], counts["network"], device)
        seconds = {name: median(values) / counts[name] for name, values in interleave(runs, rounds).items()}

    rows = []
    for layer in found:
        shape, name = tuned.shape(layer.op, layer.args), layer.convolution.name
        about = described(device, shape.dtype, (shape.n, shape.height, shape.width, shape.c_out))
        rows.append({
            **about, "layer": name, "op": layer.op, "way": way_of(layer, way), "channels": shape.channels, "adds": shape.extra,
            **_measures(seconds[name], layer.flops(), layer.moved, matmul_rate(device, shape.dtype), copy_rate(device)),
        })  # fmt: skip
    flops, total_bytes, total = (sum(row[key] for row in rows) for key in ("flops", "bytes", "us"))
    # Of several dtypes the ceilings are several, so these fractions are means over the time.
    every = {
        **described(device, x.dtype, x.shape), "layer": "all", "fp8": fused.fp8, "way": way,
        **_measures(total / 1e6, flops, total_bytes, matmul_rate(device, x.dtype), copy_rate(device)),
        **{key: round(sum(row["us"] * row[key] for row in rows) / total, 4) for key in ("fraction_of_matmul", "fraction_of_roof")},
        **({"network_us": round(seconds["network"] * 1e6, 3)} if "network" in seconds else {}),
    }  # fmt: skip
    return rows, every


def _measures(seconds: float, flops: int, moved: int, matmul: float, copy: float) -> dict[str, Any]:
    return {
        "us": round(seconds * 1e6, 3), "flops": flops, "bytes": moved, "flop_per_byte": round(flops / moved, 2),
        "tflop_per_s": flops / seconds / 1e12, "gb_per_s": moved / seconds / 1e9,
        "fraction_of_matmul": round(flops / seconds / matmul, 4), "fraction_of_copy": round(moved / seconds / copy, 4),
        # The least time that either ceiling allows, over the time it took.
        "fraction_of_roof": round(max(flops / matmul, moved / copy) / seconds, 4),
        "matmul_tflop_per_s": matmul / 1e12, "copy_gb_per_s": copy / 1e9,
    }  # fmt: skip


def words(row: dict[str, Any]) -> str:
    """What a layer does: result, channels, what is added."""
    _, height, width, c_out = row["shape"]
    taps = {"conv_in": "in, ", "conv_out": "out, ", "conv_up": "up, "}.get(row["op"], "")
    adds = f", {row['adds']}" if row["adds"] else ""
    return f"{taps}{height} x {width}, {' + '.join(map(str, row['channels']))} to {c_out}{adds}"


def text(rows: list[dict[str, Any]], every: dict[str, Any]) -> str:
    """An aligned table, a line a launch and one for all."""
    head = ["layer", "what", "way", "us", "of all", "MB", "GFLOP", "FLOP/B", "TFLOP/s", "GB/s", "of matmul", "of copy", "of the roof"]
    lines = [
        [
            row["layer"], words(row) if row is not every else "", row["way"], f"{row['us']:.1f}", f"{row['us'] / every['us']:.0%}",
            f"{row['bytes'] / 1e6:.2f}", f"{row['flops'] / 1e9:.3f}", f"{row['flop_per_byte']:.1f}", f"{row['tflop_per_s']:.3g}",
            f"{row['gb_per_s']:.4g}", *(f"{row[key]:.2f}" for key in ("fraction_of_matmul", "fraction_of_copy", "fraction_of_roof")),
        ]
        for row in (*rows, every)
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    # Names to the left, numbers to the right.
    made = ["  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in (head, *lines)]  # fmt: skip
    made.insert(-1, "-" * len(made[0]))
    peaks = {row["dtype"]: row["matmul_tflop_per_s"] for row in rows}
    made.append(f"matrix product: {', '.join(f'{rate:.4g} TFLOP/s in {dtype}' for dtype, rate in peaks.items())}; "
                f"copy: {every['copy_gb_per_s']:.4g} GB/s")  # fmt: skip
    if "network_us" in every:
        made.append(
            f"the whole network, one launch after another: {every['network_us']:.1f} us; its layers alone, in sum: {every['us']:.1f} us"
        )
    return "\n".join(line.rstrip() for line in made)


def title(every: dict[str, Any]) -> str:
    dtype = every["dtype"] + (" with fp8 blocks" if every["fp8"] else "")
    return f"{every['device']}, {dtype}, {every['shape'][0]} rows, {every['way']}"


def picture(rows: list[dict[str, Any]], every: dict[str, Any], path: Path) -> None:
    """A roofline (Williams et al. 2009): a point for every kind of layer, its area by its share of the time, under the two ceilings."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((words(row), row["dtype"]), []).append(row)
    points = []
    for (name, dtype), members in kinds.items():
        flops, moved, us = (sum(row[key] for row in members) for key in ("flops", "bytes", "us"))
        points.append((flops / moved, flops / us / 1e6, us / every["us"], f"{name} ({len(members)})" if len(members) > 1 else name, dtype))
    points.sort(key=lambda point: -point[1])

    peaks = {row["dtype"]: row["matmul_tflop_per_s"] for row in rows}
    slope = every["copy_gb_per_s"] / 1e3
    turns = [peak / slope for peak in peaks.values()]
    left, right = min(*(p[0] for p in points), *turns) / 3, max(*(p[0] for p in points), *turns) * 4
    low, high = min(*(p[1] for p in points), slope * left * 2) / 2, max(*(p[1] for p in points), *peaks.values()) * 2
    figure, axis = plt.subplots(figsize=(12, 6.5))
    figure.subplots_adjust(left=0.07, right=0.66, top=0.91, bottom=0.1)
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for direction in (axis.xaxis, axis.yaxis):
        decades = math.log10(right / left if direction is axis.xaxis else high / low)
        direction.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3.5 else (1,)))
        direction.set_major_formatter("{x:g}")
        direction.set_minor_formatter(NullFormatter())

    axis.plot([left, max(turns)], [slope * left, max(peaks.values())], color="black", linewidth=1.5, zorder=1)
    start, end = axis.transData.transform([(left, slope * left), (right, slope * right)])
    angle = math.degrees(math.atan2(*(end - start)[::-1]))
    begin = max(left, low / slope) * 1.15
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    axis.annotate(
        f"copy_: {every['copy_gb_per_s']:,.4g} GB/s", (begin, slope * begin), xytext=(-6, 8), textcoords="offset points",
        rotation=angle, rotation_mode="anchor", fontsize=10,
    )  # fmt: skip
    for (dtype, peak), turn in zip(peaks.items(), turns, strict=True):
        axis.plot([turn, right], [peak, peak], color="black", linewidth=1.5, zorder=1)
        # The lower ones' names below their lines: above them the slope goes on.
        above = peak == max(peaks.values())
        axis.annotate(
            f"{SHORT.get(dtype, dtype)} matrix product: {peak:,.4g} TFLOP/s", (right, peak), xytext=(-5, 6 if above else -6),
            textcoords="offset points", ha="right", va="bottom" if above else "top", fontsize=10, bbox=white, zorder=2.5,
        )  # fmt: skip

    # Names stand in a column, each beside its point as far as the others leave room, with a line to it.
    heights = _spread([math.log(y / low) / math.log(high / low) for _, y, *_ in points], min(0.062, 0.98 / len(points)))
    colors = plt.get_cmap("tab20")
    for i, ((x, y, share, name, dtype), height) in enumerate(zip(points, heights, strict=True)):
        color = colors(2 * i % 20 + i // 10 % 2)
        axis.scatter([x], [y], s=30 + 900 * share, color=color, edgecolors="black", linewidths=0.6, zorder=3)
        axis.annotate(
            f"{name}{', ' + SHORT.get(dtype, dtype) if len(peaks) > 1 else ''}: {share:.0%}", (x, y), xytext=(1.05, height), textcoords="axes fraction",
            va="center", fontsize=10, annotation_clip=False, zorder=2,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    axis.text(1.05, 1.02, "layer (how many): share of the time", transform=axis.transAxes, fontsize=10, weight="bold")
    axis.set_xlabel("operations per byte that must be read or written", fontsize=11)
    axis.set_ylabel("TFLOP/s", fontsize=11)
    axis.set_title(title(every), fontsize=12, loc="left")
    axis.grid(True, which="major", alpha=0.3)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=130)
    plt.close(figure)


def _spread(heights: list[float], step: float) -> list[float]:
    """Falling heights from 0 to 1, moved as little as it takes to stand `step` apart: those that crowd share their mean."""
    crowds: list[list[float]] = []
    for height in heights:
        crowds.append([height])
        while len(crowds) > 1 and _ends(crowds[-2], step)[1] - _ends(crowds[-1], step)[0] < step:
            last = crowds.pop()
            crowds[-1] += last
    tops = [(_ends(crowd, step)[0], len(crowd)) for crowd in crowds]
    spread = [top - k * step for top, many in tops for k in range(many)]
    shift = max(0.02 - spread[-1], 0.0) or min(0.97 - spread[0], 0.0)
    return [height + shift for height in spread]


def _ends(crowd: list[float], step: float) -> tuple[float, float]:
    """The highest and the lowest place of names `step` apart around the mean of their heights."""
    mean, half = sum(crowd) / len(crowd), (len(crowd) - 1) / 2 * step
    return mean + half, mean - half


def writable(path: Path, option: str) -> None:
    """ValueError now for what could not be written in the end."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}; choose another file with {option}")


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG, description="Time, bytes and operations of every launch of the fused network, beside what the device reaches."
    )
    cli.checkpoint_option(p)
    p.add_argument("--rows", type=cli.whole(1), metavar="N", help="images of an evaluation (1024 on cuda, 64 on a cpu)")
    p.add_argument("--dtype", choices=list(DTYPES), metavar="TYPE", help=f"{', '.join(DTYPES)} (bfloat16 on cuda, float32 on a cpu)")
    p.add_argument(
        "--way", choices=["fused", "library"], default="fused", help="as the network runs, or by PyTorch's own operations throughout"
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument("--rounds", type=cli.whole(1), default=ROUNDS, metavar="N", help=f"measurements, of which the median counts ({ROUNDS})")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    p.add_argument("--png", type=Path, metavar="FILE", help="draw a roofline there")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for path, option in ((args.json, "--json"), (args.png, "--png")):
        if path is not None:
            writable(path, option)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    fused, given = fused_network(load(args.checkpoint), device, kind, args.rows or ROWS[device.type])
    rows, every = profile(fused, given, args.way, args.rounds)
    print(f"{title(every)}, torch {every['torch']}, {every['threads']} threads, commit {every['commit']}\n\n{text(rows, every)}")
    if args.json is not None:
        with atomic_write(args.json) as f:
            f.write(json.dumps({"layers": rows, "all": every}, indent=1).encode())
    if args.png is not None:
        picture(rows, every, args.png)
    return 0


if __name__ == "__main__":
    cli.run(main, PROG)

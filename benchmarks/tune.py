"""Which way each convolution of a network is the fastest on this GPU, and the network as a whole: `python -m benchmarks.tune`.

Ways of a convolution are PyTorch's operations ("library") and the kernel with so many pixels and stages of a program ("kernel 128 3"); of a network
"eager", "compiled" and "fused". They take turns out of CUDA graphs of many launches, on the inputs that they have in the network. What is found goes
into the table of fastdiff/tuned.py, {gpu: {key: {"way": the fastest, "us": {way: microseconds}}}}, beside what stands there of other GPUs and shapes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.conftest import described, interleave
from benchmarks.layers import Layer, by_library, fused_network, launches, layers_of, repeated, writable
from fastdiff import cli, load, ops, tuned, ways
from fastdiff.cli import DTYPES
from fastdiff.devices import pick_device
from fastdiff.files import atomic_write
from fastdiff.fused import FusedUNet
from fastdiff.loop import Network
from fastdiff.sampler import _compiled, _room_to_compile

PROG = "python -m benchmarks.tune"
ROUNDS = 5
# Stages of a kernel's pipeline that are tried, and bytes of shared memory that they may take on a Hopper, with some left for the rest.
STAGES, SHARED = (2, 3, 4), 216 << 10
# How far a kernel's results may be from the library's, root mean square over root mean square: some roundings of bf16, or of e4m3.
APART = {False: 0.03, True: 0.1}

Table = dict[str, dict[str, dict[str, Any]]]
Given = tuple[Tensor, Tensor, Tensor]


def kernels_of(layer: Layer) -> dict[str, Callable[..., Any]]:
    """The kernel with each number of pixels of a program that holds whole images, and of stages that shared memory holds."""
    from fastdiff.kernels import conv, conv_ends

    kernel = getattr(conv_ends if layer.op in ("conv_in", "conv_out") else conv, layer.op)
    shape = tuned.shape(layer.op, layer.args)
    channels = 16 if layer.op == "conv_out" else 128 if shape.c_out % 128 == 0 else 64
    return {
        f"kernel {size} {stages}": functools.partial(kernel, pixels=size, stages=stages)
        for size in conv.PIXELS
        for stages in STAGES
        # A stage is 128 bytes of every pixel, a quarter of them where an image grows, and of every channel.
        if size >= shape.height * shape.width and stages * 128 * ((size // 4 if layer.op == "conv_up" else size) + channels) <= SHARED
    }


def contenders(layer: Layer) -> dict[str, Callable[..., Any]]:
    """The ways that can run a launch. On a CPU there is one, the reference."""
    weight = layer.args[1]
    if weight.device.type != "cuda":
        return {"reference": getattr(ops, layer.op)}
    covered = layer.convolution.uncovered(weight.device, weight.dtype) is None
    return {"library": by_library(layer.op), **(kernels_of(layer) if covered else {})}


def recorded(fused: FusedUNet, given: Given) -> list[Layer]:
    """The launches of one evaluation, which runs by the library, so that no kernel is compiled for it."""
    with mock.patch.object(tuned, "way", return_value=("library", {})):
        return layers_of(fused, lambda: fused.body(*given))


def warm(checkpoint: str, device: torch.device, dtype: str, rows: int, share: int, shares: int) -> None:
    """Compile one share of the kernels into Triton's cache."""
    with torch.no_grad():
        fused, given = fused_network(load(checkpoint), device, DTYPES[dtype], rows)
        layers = {
            (layer.key, layer.convolution.results, layer.convolution.raw, layer.convolution.fp8): layer for layer in recorded(fused, given)
        }
        variants = [(run, layer.args) for layer in layers.values() for way, run in contenders(layer).items() if way.startswith("kernel")]
        for run, arguments in variants[share::shares]:
            with contextlib.suppress(Exception):  # the measurement says what cannot be compiled
                run(*arguments)


def compile_ahead(*what: Any, jobs: int) -> None:
    """`warm` in several processes: one alone compiles some fifty kernels for longer than it measures."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=warm, args=(*what, i, jobs), daemon=True) for i in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def apart(got: Any, wanted: Any) -> float:
    """The largest of the results' distances, root mean square over that of what is wanted. inf where something is not finite."""
    if isinstance(got, Tensor):
        got, wanted = [got], [wanted]
    pairs = [(g.float(), w.float()) for g, w in zip(got, wanted, strict=True)]
    far = [(g - w).square().mean().sqrt() / w.square().mean().sqrt().clamp(min=1e-12) for g, w in pairs]
    return max(float(v.nan_to_num(nan=torch.inf)) for v in far)


def sound(layer: Layer, runs: dict[str, Callable[..., Any]], say: Callable[[str], None]) -> dict[str, Callable[..., Any]]:
    """The first of the ways, and those others that run and whose results are its own. The rest is left out, with the reason."""
    (first, run), *others = runs.items()
    kept, wanted = {first: run}, run(*layer.args)
    for way, run in others:
        try:
            far = apart(run(*layer.args), wanted)
        except Exception as e:  # of a compiler, or for want of shared memory
            say(f"  {layer.key}: {way} left out: {(str(e).splitlines() or [type(e).__name__])[0]}")
            continue
        if far <= APART[any(layer.convolution.fp8)]:
            kept[way] = run
        else:
            say(f"  {layer.key}: {way} left out: its results are {far:.2g} of their size from those by {first}")
    return kept


def measured(runs: dict[str, Callable[[], object]], many: int, rounds: int) -> dict[str, float]:
    """Microseconds a launch by way."""
    return {way: round(median(values) / many * 1e6, 3) for way, values in interleave(runs, rounds).items()}


def row_of(us: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"way": min(us, key=us.__getitem__), "us": us, **more}


def convolutions(fused: FusedUNet, given: Given, rounds: int, say: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of every convolution that differs by its key. Those that share one, some with more results than others, are measured together."""
    device = given[0].device.type
    groups: dict[str, list[Layer]] = {}
    for layer in recorded(fused, given):
        groups.setdefault(layer.key, []).append(layer)
    for key, layers in groups.items():
        runs = contenders(layers[0])
        for layer in layers:
            runs = {way: runs[way] for way in sound(layer, runs, say)}
        sets = [layer.args for layer in layers]
        many = -(-launches(layers[0].flops(), device) // len(sets)) * len(sets)
        yield key, row_of(measured({way: repeated(run, sets, many, device) for way, run in runs.items()}, many, rounds))


def network(fused: FusedUNet, given: Given, rounds: int) -> dict[str, float]:
    """Microseconds of one evaluation by the ways that a Sampler has, conditions looked up as it does. Not compiled on a CPU."""
    x, conditions, which = given
    model, classes, device = fused.model, fused.config.num_classes, x.device.type
    eager = Network(model, classes, None).call
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: eager(x, conditions[which]), "fused": lambda: fused.body(*given)}
    with _room_to_compile(freeze=False):
        if device == "cuda":
            compiled = Network(model, classes, functools.partial(_compiled, cuda=True)).call
            calls["compiled"] = lambda: compiled(x, conditions[which])
            compiled(x, conditions[which])
        # One evaluation is some twenty launches or more.
        many = 10 if device == "cuda" else 1
        return measured({way: repeated(call, [()], many, device) for way, call in calls.items()}, many, rounds)


def read(path: Path) -> Table:
    """The table in a file, {} where there is none. ValueError for a file that holds something else."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(rows, dict) and all(isinstance(row, dict) and "way" in row for row in rows.values()) for rows in found.values()
    ):
        raise ValueError(f"{path} holds no table of ways; choose another file with --out")
    return found


def keep(path: Path, gpu: str, rows: dict[str, dict[str, Any]]) -> None:
    """Put rows into the table in a file, beside what is there. The file is whole at any time."""
    found = read(path)
    found[gpu] = dict(sorted({**found.get(gpu, {}), **rows}.items()))
    with atomic_write(path) as f:
        f.write((json.dumps(dict(sorted(found.items())), indent=1) + "\n").encode())
    tuned.table.cache_clear()


@contextlib.contextmanager
def table_at(path: Path) -> Iterator[None]:
    """What is found decides at once how the fused network runs, also where it is not kept in the assets."""
    try:
        with mock.patch.object(tuned, "PATH", path):
            tuned.table.cache_clear()
            yield
    finally:
        tuned.table.cache_clear()


def sizes(text: str) -> list[int]:
    """An argparse type: whole numbers of at least 1."""
    whole = cli.whole(1)
    return [int(whole(part)) for part in text.split(",")]


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG, description="Measure which way each convolution of a network is the fastest on this GPU, and keep it in the table."
    )
    cli.checkpoint_option(p)
    p.add_argument(
        "--rows",
        type=sizes,
        default=[1024, 4096, 256, 64],
        metavar="N,N,...",
        help="images of an evaluation, in that order (1024,4096,256,64)",
    )
    p.add_argument("--dtype", choices=list(DTYPES), metavar="TYPE", help=f"{', '.join(DTYPES)} (bfloat16; on a cpu float32)")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (fastdiff/assets/tuned.json; of a cpu it is printed, and kept only with this)"
    )
    p.add_argument(
        "--seconds", type=cli.number(float, 0), default=float("inf"), metavar="N", help="begin no measurement after that time (no limit)"
    )
    p.add_argument("--rounds", type=cli.whole(1), default=ROUNDS, metavar="N", help=f"measurements, of which the median counts ({ROUNDS})")
    p.add_argument(
        "--jobs", type=cli.whole(0), metavar="N", help="processes that compile kernels beforehand (one a core and 12 at most, on a cpu 0)"
    )
    p.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1, ...; cpu for a dry run, which has one way only")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here, and a table for another device is of no use; --device cpu makes a dry run")
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    out = tuned.PATH if args.out is None and cuda else args.out
    if out is not None:
        writable(out, "--out")
        read(out)
    checkpoint = load(args.checkpoint)
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    gpu = described(device.type, torch.float32, ())["device"]
    began, found = time.monotonic(), {}

    def take(key: str, row: dict[str, Any]) -> None:
        found[key] = row
        print(f"{key}: {row['way']}; us: {', '.join(f'{way} {us:.1f}' for way, us in row['us'].items())}", flush=True)
        if out is not None:
            keep(out, gpu, {key: row})

    def measure() -> None:
        largest = 0
        for rows in args.rows:
            fused, given = fused_network(checkpoint, device, DTYPES[dtype], rows)
            for key, row in convolutions(fused, given, args.rounds, functools.partial(print, flush=True)):
                take(key, row)
                if time.monotonic() - began > args.seconds:
                    print(f"out of time after {args.seconds:g} s: what has no line above keeps the way it had", flush=True)
                    return
            us = network(fused, given, args.rounds)
            # Nobody is given fp8 who has not asked for it, and then there is no other way.
            if rows > largest and dtype != "fp8":
                largest = rows
                take(f"network {ways.digest(fused.model)} {dtype}", row_of(us, rows=rows))
            else:
                print(f"network of {rows} rows, {dtype}; us: {', '.join(f'{way} {v:.1f}' for way, v in us.items())}", flush=True)

    jobs = (min(os.cpu_count() or 1, 12) if cuda else 0) if args.jobs is None else args.jobs
    if jobs:
        compile_ahead(args.checkpoint, device, dtype, args.rows[0], jobs=jobs)
        print(f"{jobs} processes compiled kernels for {time.monotonic() - began:.0f} s", flush=True)
    with torch.no_grad(), table_at(tuned.PATH if out is None else out):
        measure()
    if out is None:
        print(json.dumps({gpu: found}, indent=1))
    else:
        print(f"{len(found)} rows of {gpu} in {out}")
    return 0


if __name__ == "__main__":
    cli.run(main, PROG)

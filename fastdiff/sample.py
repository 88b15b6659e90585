"""Make images: `python -m fastdiff.sample`. Writes samples.npz and grid.png."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from . import cli, data, solvers, ways
from .checkpoint import load
from .devices import pick_device
from .files import atomic_write, make_folder
from .sampler import Sampler

PROG = "python -m fastdiff.sample"
GRID_COLUMNS = 20


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG,
        description="Turn noise into images. An image is decided by --seed and its number (--first, --first + 1, ...), whatever the batch: "
        "ask for more and the first ones stay the same.",
    )
    p.add_argument("--batch", type=cli.whole(1), default=64, metavar="N", help="how many images (default 64)")
    p.add_argument(
        "--label", action="append", metavar="NAME|INDEX", help="class to make; repeat it for several, taken in turn (all in turn)"
    )
    p.add_argument(
        "--guidance",
        type=cli.number(float, 0),
        default=2.0,
        metavar="W",
        help="how strongly to follow the class: 1 plainly, more is clearer and less varied (2)",
    )
    p.add_argument(
        "--steps",
        type=cli.whole(1),
        default=10,
        metavar="N",
        help="network evaluations per image, twice as many with some solvers; more is finer and slower (10)",
    )
    p.add_argument(
        "--solver", default="unipc", metavar="NAME", help=f"how to walk from noise to image: {', '.join(solvers.names())} (unipc)"
    )
    p.add_argument("--spacing", metavar="NAME", help=f"of the steps: {', '.join(solvers.SPACINGS)} (what suits the solver)")
    p.add_argument(
        "--option",
        action="append",
        type=option,
        metavar="NAME=VALUE",
        help="of the solver: eta=0.5, order=3, variance=beta, churn=10, ...; see fastdiff.solvers; repeat it for several",
    )
    p.add_argument("--seed", type=cli.whole(0, 2**64 - 1), default=0, help="another seed gives other images (0)")
    p.add_argument("--first", type=cli.whole(0, 2**63 - 1), default=0, metavar="ID", help="number of the first image (0)")
    p.add_argument("--checkpoint", default="sprites", metavar="FILE", help='a checkpoint of fastdiff.train, or the shipped "sprites"')
    p.add_argument(
        "--out", default="samples", metavar="DIR", help="folder for samples.npz and grid.png, which are replaced there (samples)"
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument(
        "--dtype",
        choices=list(cli.DTYPES),
        metavar="TYPE",
        help=f"of the network: {', '.join(cli.DTYPES)} (bfloat16 on cuda, float32 on cpu); fp8, for an H100 or newer, is bfloat16 with "
        "coarser residual blocks",
    )
    p.add_argument("--micro-batch", type=cli.whole(1), metavar="N", help="images worked on at a time (what suits the device)")
    p.add_argument(
        "--compile",
        choices=["auto", "yes", "no", "fused"],
        default="auto",
        help="compile the network: seconds to minutes the first time, then faster; fused: run it by fastdiff's own kernels, on an H100 or newer "
        "(auto: what --warmup found to be the fastest, else yes on cuda and no on a cpu)",
    )
    p.add_argument(
        "--warmup",
        action="store_true",
        help="make no images: compile the network, keep what was compiled, measure which way is the fastest here, and remember it",
    )
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE as (name, value), a number where it is one. A ValueError, where there is no =, is argparse's to report."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as eta=0.5")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


def class_numbers(wanted: list[str] | None, classes: tuple[str, ...], path: str) -> list[int]:
    """Class names or indices as indices; all classes for None. ValueError for one that does not exist, listing those that do."""
    if not classes:
        if wanted:
            raise ValueError(f"{path} has no classes; leave out --label")
        return []
    numbers = []
    for label in wanted if wanted else classes:
        if label in classes:
            numbers.append(classes.index(label))
        elif label.isdecimal() and int(label) < len(classes):
            numbers.append(int(label))
        else:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
            raise ValueError(f"no class {label!r} in {path}; it has: {known}")
    return numbers


def picture(images: np.ndarray, labels: np.ndarray | None, kinds: int) -> np.ndarray:
    """The images to show, uint8 [rows * GRID_COLUMNS, H, W, C]: a row a class where there are classes, white where a row is short."""
    if labels is None:
        return images[: GRID_COLUMNS * 10]
    rows = []
    for kind in range(kinds):
        row = images[labels == kind][:GRID_COLUMNS]
        if len(row):
            rows.append(np.concatenate([row, np.full((GRID_COLUMNS - len(row), *images.shape[1:]), 255, np.uint8)]))
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ways.keep_compiled()
    device = pick_device(args.device)
    began = time.perf_counter()
    checkpoint = load(args.checkpoint)
    kinds = class_numbers(args.label, checkpoint.classes, args.checkpoint)
    if args.first + args.batch > 1 << 63:
        raise ValueError(f"--first {args.first} with --batch {args.batch} passes the last image number, {(1 << 63) - 1}")
    options = dict(args.option or ())
    if reserved := options.keys() & inspect.signature(Sampler).parameters.keys():
        raise ValueError(f"--option is for the solver; {', '.join(sorted(reserved))} has an option of its own, or none (--help)")
    if args.spacing is not None:
        options["spacing"] = args.spacing
    sampler = checkpoint.sampler(
        solver=args.solver, steps=args.steps, device=device, dtype=cli.DTYPES.get(args.dtype), micro_batch=args.micro_batch or "auto",
        compile=cli.WAYS.get(args.compile, args.compile), **options,
    )  # fmt: skip
    if args.warmup:
        return warm_up(sampler, bool(kinds) and args.guidance != 1, args.json)
    out = make_folder(args.out)
    loaded = time.perf_counter()
    ids = args.first + np.arange(args.batch)
    labels = np.array(kinds)[ids % len(kinds)] if kinds else None
    guidance = args.guidance if kinds else 1.0
    sampler.warmup(guidance != 1, n=args.batch)
    compiled = time.perf_counter()
    images = sampler(
        args.batch, seed=args.seed, first=args.first, labels=None if labels is None else torch.from_numpy(labels), guidance=guidance,
        progress=not args.json or sys.stderr.isatty(),
    )  # fmt: skip
    pixels = data.to_uint8(images).cpu().numpy()
    sampled = time.perf_counter()

    arrays = {"images": pixels, "ids": ids}
    if labels is not None:
        arrays |= {"labels": labels.astype(np.int64), "classes": np.array(checkpoint.classes)}
    with atomic_write(out / "samples.npz") as f:
        np.savez_compressed(f, **arrays)
    with atomic_write(out / "grid.png") as f:
        data.grid(picture(pixels, labels, len(checkpoint.classes)), GRID_COLUMNS, scale=3).save(f, format="PNG")

    seconds = sampled - compiled
    report = {
        "samples": str(out / "samples.npz"), "grid": str(out / "grid.png"), "images": args.batch, "device": device_name(device),
        "dtype": str(sampler.dtype).removeprefix("torch."), "solver": args.solver, "steps": args.steps, "guidance": guidance,
        "way": sampler.way,
        "load_s": round(loaded - began, 3), "compile_s": round(compiled - loaded, 3), "sample_s": round(seconds, 3),
        "images_per_s": round(args.batch / seconds, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{args.batch} images in {report['samples']}, a look at them in {report['grid']}")
        print(f"{report['device']}, {report['dtype']}, {sampler.way}; {args.solver}, {args.steps} steps, guidance {guidance:g}")
        print(
            f"load {report['load_s']:.1f} s, compile {report['compile_s']:.1f} s, "
            f"sampling {seconds:.1f} s: {report['images_per_s']:.0f} images/s"
        )
    return 0


def warm_up(sampler: Sampler, guided: bool, as_json: bool) -> int:
    """Compile and measure, and say what a first call costs, what one costs that finds its code kept, and what every row costs then."""
    began = time.perf_counter()
    sampler.measure(guided, rounds=1)
    first = time.perf_counter() - began
    torch.compiler.reset()
    began = time.perf_counter()
    milliseconds = sampler.measure(guided)
    again = time.perf_counter() - began
    best = min(milliseconds, key=milliseconds.__getitem__)
    report = {
        "device": device_name(sampler.device), "dtype": str(sampler.dtype).removeprefix("torch."), "first_s": round(first, 2),
        "cached_s": round(again, 2), "ms_per_row": {way: round(ms, 3) for way, ms in milliseconds.items()}, "fastest": best,
        "kept": str(ways.path().parent),
    }  # fmt: skip
    if as_json:
        print(json.dumps(report))
        return 0
    print(
        f"{report['device']}, {report['dtype']}: compiled and measured in {first:.1f} s the first time, {again:.1f} s with what is kept now"
    )
    for way, ms in milliseconds.items():
        print(
            f"  {way:9} {ms:8.2f} ms for {sampler.measured_rows} rows of a network call{'   <- the fastest: what runs from now on' * (way == best)}"
        )
    print(f"kept in {report['kept']}")
    return 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

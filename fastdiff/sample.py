"""Make images: `python -m fastdiff.sample`. Writes samples.npz and grid.png, or, of many, shards that outlast whatever stops it."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import logging
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import cli, collect, data, distributed, runs, solvers, ways
from .checkpoint import Checkpoint, load
from .devices import pick_device
from .distributed import Group
from .files import atomic_write, make_folder
from .progress import Progress
from .sampler import Sampler
from .version import __version__

PROG = "python -m fastdiff.sample"
GRID_COLUMNS, GRID_CLASSES = 20, 20

log = logging.getLogger("fastdiff.sample")  # __name__ is "__main__" in the command


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG,
        description="Turn noise into images. An image is decided by --seed and its number (--first, --first + 1, ...), whatever the batch: "
        "ask for more and the first ones stay the same. With --shard-size it is a run of many images, which may be stopped and killed: the same "
        "command goes on with it, and under torchrun several processes share it.",
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
    cli.checkpoint_option(p)
    p.add_argument(
        "--out", default="samples", metavar="DIR", help="folder for samples.npz and grid.png, which are replaced there (samples)"
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument(
        "--dtype",
        choices=list(cli.DTYPES),
        metavar="TYPE",
        help=f"of the network: {', '.join(cli.DTYPES)} (bfloat16 on cuda, float32 on cpu, where bfloat16 is the faster with AMX); "
        "fp8, for an H100 or newer, is bfloat16 with coarser residual blocks",
    )
    p.add_argument("--micro-batch", type=cli.whole(1, 1 << 20), metavar="N", help="images worked on at a time (what suits the device)")
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
    p.add_argument(
        "--json", action="store_true", help="print the report as one JSON object, and before it, of a run, a line of progress now and then"
    )
    cli.add_log_level(p)
    g = p.add_argument_group("runs of many images")
    g.add_argument(
        "--shard-size",
        type=cli.whole(1, 10**9),
        metavar="N",
        help="write numbered shards of N images and a manifest into --out, so that nothing is lost but the shards under way; a run that is there "
        "goes on, if all that decides its images is the same",
    )
    g.add_argument(
        "--verify", action="store_true", help="look at every shard of the run in --out: exit code 0 if all are there and right, else 1"
    )
    g.add_argument(
        "--collect",
        metavar="FILE",
        help="write the images of the run in --out, once it is complete, into one .npz, one .npy, a WebDataset .tar (one a shard with %%06d in its "
        "name), or, under any other name, a folder of PNGs",
    )
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
    """The images to show, uint8 [rows * GRID_COLUMNS, H, W, C]: a row a class where there are classes, but not many, white where a row is short."""
    if labels is None or kinds > GRID_CLASSES:
        return images[: GRID_COLUMNS * 10]
    rows = []
    for kind in range(kinds):
        row = images[labels == kind][:GRID_COLUMNS]
        if len(row):
            rows.append(np.concatenate([row, np.full((GRID_COLUMNS - len(row), *images.shape[1:]), 255, np.uint8)]))
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    cli.start_log(args.log_level)
    if not args.out or args.collect == "":
        raise ValueError(f"--{'collect' if args.out else 'out'} is empty; give a name")
    if not args.shard_size and (args.verify or args.collect):
        return look(args) if distributed.rank() == 0 else 0  # what one process does, several would do to each other
    with distributed.join() as group, distributed.one_voice(group):
        if group.world > 1 and (not args.shard_size or args.warmup):
            raise ValueError(
                f"{group.world} processes share the shards of a run; give --shard-size, or start one process, without torchrun"
            )
        ways.keep_compiled()
        device = pick_device(distributed.own_device(args.device, group.local))
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
        guidance = args.guidance if kinds else 1.0
        if args.warmup:
            return warm_up(sampler, guidance != 1, args.json)
        if args.shard_size:
            share(args, checkpoint, sampler, kinds, guidance, options, group, began)
            return look(args) if group.first and (args.verify or args.collect) else 0
        return once(args, checkpoint, sampler, kinds, guidance, began)


def once(args: argparse.Namespace, checkpoint: Checkpoint, sampler: Sampler, kinds: list[int], guidance: float, began: float) -> int:
    """All images in one call, one file and one picture."""
    if (Path(args.out) / runs.MANIFEST).exists():
        raise ValueError(f"{args.out} holds a run in shards; give its --shard-size to go on with it, or another --out")
    out = make_folder(args.out)
    loaded = time.perf_counter()
    ids = args.first + np.arange(args.batch)
    labels = np.array(kinds)[ids % len(kinds)] if kinds else None
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
    grid = draw_grid(out, pixels, labels, len(checkpoint.classes))
    seconds = sampled - compiled
    report = {
        "samples": str(out / "samples.npz"), "grid": grid, "images": args.batch,
        **settings(args, sampler, guidance),
        "load_s": round(loaded - began, 3), "compile_s": round(compiled - loaded, 3), "sample_s": round(seconds, 3),
        "images_per_s": round(args.batch / seconds, 1),
    }  # fmt: skip
    say(report, args.json, f"{args.batch} images in {report['samples']}{f', a look at them in {grid}' if grid else ''}")
    return 0


def share(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    sampler: Sampler,
    kinds: list[int],
    guidance: float,
    options: dict[str, Any],
    group: Group,
    began: float,
) -> None:
    """The shards of a run that are still to be made, shared out among the processes of a group."""
    config = configuration(args, checkpoint, sampler, kinds, guidance, options)
    with ExitStack() as stack:
        with Progress(args.batch, as_json=args.json, shown=group.first, doing="check") as checked:
            run = stack.enter_context(runs.hold(args.out, config, group, checked.move))
        if args.collect and group.first:  # a name that will not do is said now, and not once all is made
            collect.check(Path(args.collect), run.folder, run.plan)
        plan = run.plan
        to_make = sum(plan.size(k) for k in run.todo)
        loaded = compiled = time.perf_counter()
        if run.todo:
            sampler.warmup(guidance != 1, n=plan.size(run.todo[0]))
            run.settle(sampler.fingerprint(guidance != 1, n=plan.size(run.todo[0])))
            compiled = time.perf_counter()
        with Progress(args.batch, args.batch - to_make, group=group, as_json=args.json) as progress:

            def draw(ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
                images = sampler(
                    len(ids), seed=args.seed, first=int(ids[0]), labels=None if labels is None else torch.from_numpy(labels),
                    guidance=guidance, progress=progress.part(len(ids)),
                )  # fmt: skip
                return data.to_uint8(images).cpu().numpy()

            run.make(draw)
        run.finish()
        seconds = time.perf_counter() - compiled
        if not group.first:
            return
        out = Path(args.out)
        pixels = first_images(out, run.manifest, GRID_COLUMNS * max(min(len(kinds), GRID_CLASSES), 10))
        grid = draw_grid(out, pixels, plan.labels(plan.first + np.arange(len(pixels))), len(checkpoint.classes))
    report = {
        "event": "done", "run": str(out), "manifest": str(out / runs.MANIFEST), "grid": grid, "images": args.batch,
        "shards": plan.count, "made": len(run.todo), "processes": group.world, **settings(args, sampler, guidance),
        "load_s": round(loaded - began, 3), "compile_s": round(compiled - loaded, 3), "sample_s": round(seconds, 3),
        "images_per_s": round(to_make / seconds, 1),
    }  # fmt: skip
    there = f", {plan.count - len(run.todo) or 'none'} of them there already" * (len(run.todo) < plan.count)
    say(report, args.json, f"{args.batch} images in {plan.count} shards in {out}{there}{f'; a look at them in {grid}' if grid else ''}")


def configuration(
    args: argparse.Namespace, checkpoint: Checkpoint, sampler: Sampler, kinds: list[int], guidance: float, options: dict[str, Any]
) -> dict[str, Any]:
    """All that decides a run's images, but for the arithmetic (`Sampler.fingerprint`), which takes a while to find out."""
    channels, height, width = checkpoint.shape
    return {
        "images": args.batch, "first": args.first, "seed": args.seed, "shard_size": args.shard_size, "shape": [height, width, channels],
        "labels": kinds or None, "classes": list(checkpoint.classes) or None, "checkpoint_sha256": checkpoint.digest,
        "solver": args.solver, "steps": args.steps, "options": options, "guidance": guidance,
        "dtype": args.dtype or str(sampler.dtype).removeprefix("torch."), "way": sampler.way, "micro_batch": args.micro_batch or "auto",
        "device": model_of(sampler.device), "torch": torch.__version__, "fastdiff": __version__,
    }  # fmt: skip


def first_images(out: Path, manifest: runs.Manifest, wanted: int) -> np.ndarray:
    """The first images of a complete run, uint8 [up to wanted, H, W, C]."""
    shown: list[np.ndarray] = []
    for _, images in runs.shards(out, manifest):
        shown.append(images)
        if sum(map(len, shown)) >= wanted:
            break
    return np.concatenate(shown)[:wanted]


def look(args: argparse.Namespace) -> int:
    """Check a run, or collect it, or both. Exit code 1 where it is not complete and right."""
    if args.verify:
        total = runs.read_run(args.out).plan.images
        with Progress(total, as_json=args.json, doing="check") as progress:
            found = runs.verify(args.out, progress.move)
        report = {
            "event": "verified", "run": str(args.out), "shards": found.plan.count, "missing": list(found.missing), "altered": list(found.altered),
            "sha256": found.sha256,
        }  # fmt: skip
        if args.json:
            print(json.dumps(report))
        elif found.right:
            print(f"{args.out}: all {found.plan.count} shards are there and right; sha256 of the pixels {found.sha256}")
        else:
            faults = {"missing": found.missing, "altered": found.altered}
            said = "; ".join(f"{len(shards)} {what} ({runs.ranges(shards)})" for what, shards in faults.items() if shards)
            print(f"{args.out}: of {found.plan.count} shards {said}; the run's command, started again, makes them")
        if not found.right:
            return 1
    if args.collect:
        total = runs.read_run(args.out).plan.images
        with Progress(total, as_json=args.json, doing="collect") as progress:
            made = collect.collect(args.out, args.collect, progress.move)
        if args.json:
            print(json.dumps({"event": "collected", "file": str(made.path), "images": made.images, "sha256": made.sha256}))
        else:
            print(f"{made.images} images in {made.path}; sha256 of the pixels {made.sha256}")
    return 0


def settings(args: argparse.Namespace, sampler: Sampler, guidance: float) -> dict[str, Any]:
    """What a report says of how images were made."""
    return {
        "device": device_name(sampler.device), "dtype": str(sampler.dtype).removeprefix("torch."), "solver": args.solver, "steps": args.steps,
        "guidance": guidance, "way": sampler.way,
    }  # fmt: skip


def draw_grid(out: Path, pixels: np.ndarray, labels: np.ndarray | None, kinds: int) -> str | None:
    """The path of grid.png, of images uint8 [n, H, W, C] with labels [n]; see `picture`. None, and no such file, where C makes no colours."""
    if pixels.shape[3] not in (1, 3, 4):
        return None
    with atomic_write(out / runs.GRID) as f:
        data.grid(picture(pixels, labels, kinds), GRID_COLUMNS, scale=3).save(f, format="PNG")
    return str(out / runs.GRID)


def say(report: dict[str, Any], as_json: bool, headline: str) -> None:
    if as_json:
        print(json.dumps(report))
        return
    print(headline)
    print(
        f"{report['device']}, {report['dtype']}, {report['way']}; {report['solver']}, {report['steps']} steps, guidance {report['guidance']:g}"
    )
    print(
        f"load {report['load_s']:.1f} s, compile {report['compile_s']:.1f} s, sampling {report['sample_s']:.1f} s: "
        f"{report['images_per_s']:.0f} images/s"
    )


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
    rows = sampler.measured(guided) * (2 if guided else 1)
    for way, ms in milliseconds.items():
        print(f"  {way:9} {ms:8.2f} ms for {rows} rows of a network call{'   <- the fastest: what runs from now on' * (way == best)}")
    print(f"kept in {report['kept']}")
    return 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def model_of(device: torch.device) -> str:
    """The kind of device as far as it decides the bits of a network's arithmetic: a GPU's model, a CPU's vector instructions."""
    return device_name(device) if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

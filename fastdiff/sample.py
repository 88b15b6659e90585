"""Make images: `python -m fastdiff.sample`. Writes samples.npz and grid.png."""

from __future__ import annotations

import functools
import json
import sys
import time

import numpy as np
import torch

from . import cli, data, solvers
from .checkpoint import load
from .devices import pick_device
from .files import atomic_write, make_folder

PROG = "python -m fastdiff.sample"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        "--steps", type=cli.whole(1), default=12, metavar="N", help="network evaluations per image; more is finer and slower (12)"
    )
    p.add_argument(
        "--solver",
        choices=solvers.names(),
        default="dpmpp_2m",
        metavar="NAME",
        help=f"how to walk from noise to image: {', '.join(solvers.names())} (dpmpp_2m)",
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
        choices=list(DTYPES),
        metavar="TYPE",
        help=f"of the network: {', '.join(DTYPES)} (bfloat16 on cuda, float32 on cpu)",
    )
    p.add_argument("--micro-batch", type=cli.whole(1), metavar="N", help="images worked on at a time (what suits the device)")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


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
    device = pick_device(args.device)
    began = time.perf_counter()
    checkpoint = load(args.checkpoint)
    kinds = class_numbers(args.label, checkpoint.classes, args.checkpoint)
    if args.first + args.batch > 1 << 63:
        raise ValueError(f"--first {args.first} with --batch {args.batch} passes the last image number, {(1 << 63) - 1}")
    sampler = checkpoint.sampler(
        solver=args.solver, steps=args.steps, device=device, dtype=DTYPES.get(args.dtype), micro_batch=args.micro_batch or "auto"
    )
    out = make_folder(args.out)
    loaded = time.perf_counter()
    ids = args.first + np.arange(args.batch)
    labels = np.array(kinds)[ids % len(kinds)] if kinds else None
    guidance = args.guidance if kinds else 1.0
    sampler.warmup(guidance != 1)
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
        "load_s": round(loaded - began, 3), "compile_s": round(compiled - loaded, 3), "sample_s": round(seconds, 3),
        "images_per_s": round(args.batch / seconds, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{args.batch} images in {report['samples']}, a look at them in {report['grid']}")
        print(f"{report['device']}, {report['dtype']}; {args.solver}, {args.steps} steps, guidance {guidance:g}")
        print(
            f"load {report['load_s']:.1f} s, compile {report['compile_s']:.1f} s, sampling {seconds:.1f} s: {report['images_per_s']:.0f} images/s"
        )
    return 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

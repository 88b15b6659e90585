"""How like the images of one way of running the network are to another's: `python -m benchmarks.alike --batch 4096 --out FILE`.

The same seeds, labels and guidance by the network eagerly in fp32, and in each other way. Printed, and written as rows, are the differences of 8-bit
pixels and the distance to the training images that benchmarks.quality measures. An image where a way took another turn is another image, though as
good a one; so the share of images that differ widely is told apart from how much the others do.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastdiff
from benchmarks.conftest import described
from benchmarks.layers import writable
from benchmarks.quality import Distance
from fastdiff import cli, data
from fastdiff.devices import pick_device
from fastdiff.files import atomic_write

PROG = "python -m benchmarks.alike"
# Mean difference of an image's pixels, of 255, from which on it counts as another.
FAR = 10.0
WAYS = ("fused float32", "no bfloat16", "fused bfloat16", "fused fp8")


def way(text: str) -> tuple[str, str]:
    """COMPILE DTYPE. A ValueError is argparse's to report."""
    compile, _, dtype = text.partition(" ")
    if compile not in ("yes", "no", "fused") or dtype not in cli.DTYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not 'yes', 'no' or 'fused' and then one of {', '.join(cli.DTYPES)}, such as 'fused fp8'"
        )
    return compile, dtype


def parser() -> cli.Parser:
    p = cli.Parser(prog=PROG, description="How like the images of one way of running the network are to another's.")
    p.add_argument("ways", nargs="*", type=way, metavar="'COMPILE DTYPE'", help=f"as of fastdiff.sample ({', '.join(WAYS)})")
    p.add_argument("--batch", type=cli.whole(64), default=480, metavar="N", help="how many images (480)")
    p.add_argument("--checkpoint", default="sprites", metavar="FILE", help="of images like the shipped ones (sprites)")
    p.add_argument("--solver", default="unipc", metavar="NAME")
    p.add_argument("--steps", type=cli.whole(1), default=10, metavar="N")
    p.add_argument("--guidance", type=cli.number(float, 0), default=2.0, metavar="W")
    p.add_argument("--device", metavar="NAME")
    p.add_argument("--out", type=Path, metavar="FILE", help="add the rows to that file of pytest-benchmark's, or begin one")
    return p


def kept(path: Path) -> dict[str, Any]:
    """A file of pytest-benchmark's, or an empty one. ValueError for a file that is something else."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {"benchmarks": []}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
        raise ValueError(f"{path} holds no rows of pytest-benchmark; choose another file with --out")
    return found


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of uint8 [N, H, W, C]: in units of 1 of 255."""
    each = np.abs(a.astype(np.int16) - b.astype(np.int16))
    mean = each.reshape(len(each), -1).mean(1)
    near = mean <= FAR
    return {
        "largest": int(each.max()),
        "mean": round(float(mean.mean()), 4),
        "median_image": round(float(np.median(mean)), 4),
        "far": round(float(1 - near.mean()), 4),
        "largest_of_near": int(each[near].max()) if near.any() else 0,
    }


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = pick_device(args.device)
    if args.out is not None:
        writable(args.out, "--out")
        kept(args.out)
    checkpoint, distance = fastdiff.load(args.checkpoint), Distance(args.batch)
    if not checkpoint.classes or checkpoint.shape != (3, 16, 16):
        raise ValueError(f"{args.checkpoint} makes other images than the shipped data has, to which they are compared")
    labels = torch.from_numpy(distance.labels)

    def images(compile: str, dtype: str) -> np.ndarray:
        sampler = checkpoint.sampler(
            solver=args.solver, steps=args.steps, device=device, dtype=cli.DTYPES[dtype], compile=cli.WAYS.get(compile, compile)
        )  # fmt: skip
        made = sampler(args.batch, seed=1, labels=labels, guidance=args.guidance, progress=sys.stderr.isatty())
        return data.to_uint8(made).cpu().numpy()

    truth = images("no", "float32")
    training, held_out = distance.floors()
    of_truth = distance(truth)
    print(
        f"{args.batch} images; distance of other training images {training:.1f}, of held-out ones {held_out:.1f}, of fp32's {of_truth:.1f}"
    )
    rows = []
    for compile, dtype in args.ways or map(way, WAYS):
        made = images(compile, dtype)
        found = difference(made, truth) | {"distance": round(distance(made), 2)}
        print(
            f"{compile:5} {dtype:9} distance {found['distance']:5.1f}; pixels differ by {found['mean']:.3f} of 255 on average, "
            f"{found['median_image']:.3f} in the median image; {found['far']:.2%} of images by more than {FAR:g}, "
            f"the others by {found['largest_of_near']} at most",
            flush=True,
        )
        about = described(device.type, torch.float32 if dtype == "fp8" else cli.DTYPES[dtype], (args.batch, *checkpoint.shape))
        settings = {"solver": args.solver, "steps": args.steps, "guidance": args.guidance, "way": compile, "dtype": dtype}
        floors = {"fp32_distance": round(of_truth, 2), "training_distance": round(training, 2), "held_out_distance": round(held_out, 2)}
        rows.append({"name": f"alike[{compile} {dtype}]", "extra_info": about | settings | found | floors})
    if args.out is not None:
        found = kept(args.out)
        found["benchmarks"] += rows
        with atomic_write(args.out) as f:
            f.write(json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

"""Which way an operation of the network was measured to be the fastest: a table that ships, made by `python -m benchmarks.tune`.

A row is a GPU by its name, an operation with its shape and dtype, and the way: "library", what PyTorch has, or "kernel" with the pixels and stages of a
program. What was never measured takes the kernel wherever it covers the shape.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).parent / "assets" / "tuned.json"


class Shape(NamedTuple):
    """What decides the speed of one call of a convolution. height and width are those of the result; channels, of each input; extra: what is added,
    and the stride."""

    op: str
    n: int
    height: int
    width: int
    channels: list[int]
    c_out: int
    dtype: torch.dtype
    extra: str = ""


def shape(op: str, args: Sequence[Any]) -> Shape:
    """Of a call of "conv3x3", "conv_up", "conv_in" or "conv_out" of ops.py with those arguments."""
    x, weight, extra = args[0], args[1], ""
    if op == "conv3x3":
        n, height, width, _ = x[0].shape
        channels = [v.shape[-1] for v in x]
        skip, skip_weight, stride = args[4], args[5], args[12]
        height, width = height // stride, width // stride
        extra = f"stride {stride}" if stride != 1 else f"shortcut {skip_weight.shape[1]}" if skip_weight is not None else "skip" * len(skip)
    elif op == "conv_in":
        n, folded, height, width = x.shape
        patch = args[5]
        height, width, channels = height // patch, width // patch, [folded * patch**2]
    else:
        n, height, width, c = x.shape
        times = 2 if op == "conv_up" else 1
        height, width, channels = height * times, width * times, [c]
    return Shape(op, n, height, width, channels, len(weight), weight.dtype, extra)


def key(op: str, n: int, height: int, width: int, channels: list[int], c_out: int, dtype: torch.dtype, extra: str = "") -> str:
    """A `Shape` in words. n counts as the next power of two."""
    rows = 1 << max(n - 1, 0).bit_length()
    parts = [op, str(rows), f"{height}x{width}", f"{'+'.join(map(str, channels))}->{c_out}", str(dtype).removeprefix("torch."), extra]
    return " ".join(part for part in parts if part)


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """Ways by GPU and operation; {} where nothing has been measured."""
    found = json.loads(PATH.read_text()) if PATH.is_file() else {}
    return {gpu: {which: str(row["way"]) for which, row in rows.items()} for gpu, rows in found.items()}


def way(gpu: str, which: str) -> tuple[str, dict[str, int]]:
    """("library", {}), or "kernel" with what its launcher is told: pixels and stages of a program, as far as the table says them."""
    name, *sizes = table().get(gpu, {}).get(which, "kernel").split()
    return name, dict(zip(("pixels", "stages"), map(int, sizes), strict=False))

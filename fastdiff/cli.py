"""What the commands share: parsing in one line, bad input as one line and exit code 2, devices by name."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows all options)\n")


def number(kind: type[int] | type[float], low: float, high: float = math.inf, what: str = "number") -> Callable[[str], int | float]:
    """An argparse type: a finite number from `low` to `high`."""
    span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {span}")
        return value

    return parse


def whole(low: int, high: float = math.inf) -> Callable[[str], int | float]:
    return number(int, low, high, "whole number")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is. ValueError where it is not to be had."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda, cuda:0, cuda:1, ...") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no device {name!r} here ({torch.cuda.device_count()} CUDA GPUs); use --device cpu or leave it out")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; known: cpu, cuda")
    return device


def run(main: Callable[[], int], prog: str) -> NoReturn:
    """Run a command: bad input and failing disks are one line on stderr and exit code 2, Ctrl-C is 130. Warnings are one line, too."""
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: {message}\n"
    try:
        code = main()
    except (ValueError, OSError) as e:
        text = f"{e.strerror}: {e.filename}" if isinstance(e, OSError) and e.strerror else str(e)
        print(f"{prog}: {' '.join(text.split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

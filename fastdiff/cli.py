"""What the commands share: parsing in one line, bad input as one line and exit code 2, devices by name."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

# What commands call --dtype and --compile, as Sampler takes them.
DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": "fp8"}
WAYS: dict[str, Any] = {"yes": True, "no": False}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows all options)\n")


def number(kind: type[int] | type[float], low: float, high: float = math.inf, what: str = "number") -> Callable[[str], int | float]:
    """An argparse type: a finite number from `low` to `high`."""
    span = f"at least {low}" if high == math.inf else f"from {low} to {high}"

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


def run(main: Callable[[], int], prog: str) -> NoReturn:
    """Run a command: bad input and failing disks are one line on stderr and exit code 2, Ctrl-C is 130. Warnings are one line, too."""
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: {' '.join(str(message).split())}\n"
    try:
        code = main()
    except (ValueError, OSError) as e:
        text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
        print(f"{prog}: {' '.join(text.split())}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        print(f"{prog}: out of memory; ask for fewer or smaller images at a time (--batch, --micro-batch, --size)", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

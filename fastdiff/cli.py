"""What the commands share: parsing in one line, bad input as one line and exit code 2, an orderly end, a log."""

from __future__ import annotations

import argparse
import atexit
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from . import early
from .devices import out_of_memory

# What commands call --dtype and --compile, as Sampler takes them.
DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": "fp8"}
WAYS: dict[str, Any] = {"yes": True, "no": False}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        # Of several processes with the same arguments one says so.
        self.exit(2, f"{self.prog}: {message} (--help shows all options)\n" if os.environ.get("RANK", "0") == "0" else None)


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


def checkpoint_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--checkpoint",
        default="sprites",
        metavar="FILE",
        help="a checkpoint of fastdiff.train, or a shipped one: sprites, sprites-large (sprites)",
    )


LEVELS = ("debug", "info", "warning", "error")


class _Lines(logging.Handler):
    """Log records as lines on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # In one piece, so that the lines of several processes do not run into each other.
        tqdm.write(" ".join(self.format(record).split()) + "\n", file=sys.stderr, end="")


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=LEVELS, default="warning", help="how much to say on stderr (warning)")


def start_log(level: str) -> None:
    """Send what the library logs, as `fastdiff.*`, to stderr, one line each, with the time and, under torchrun, the rank."""
    log = logging.getLogger("fastdiff")
    log.handlers = [_Lines()]
    rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
    log.handlers[0].setFormatter(logging.Formatter(f"%(asctime)s{rank} %(levelname)s %(name)s: %(message)s"))
    log.setLevel(level.upper())
    log.propagate = False


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; what is under way is being put in order
    raise KeyboardInterrupt


def _deaf() -> None:
    """Of no more signals: all is done or dropped, and another would only break off the end."""
    for number in early.HANDLED:
        signal.signal(number, signal.SIG_IGN)


def run(main: Callable[[], int], prog: str) -> NoReturn:
    """Run a command: bad input and failing disks are one line on stderr and exit code 2, Ctrl-C and SIGTERM are 130. Warnings are one line, too."""
    for name in ("stdout", "stderr"):  # of which a daemon, or a shell with >&-, may have given none
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    heeds = threading.current_thread() is threading.main_thread()
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: {' '.join(str(message).split())}\n"
    try:
        if heeds:
            signal.signal(signal.SIGTERM, _terminate)
            atexit.register(_deaf)
            early.over()
        code = main()
    except (ValueError, OSError) as e:
        text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
        print(f"{prog}: {' '.join(text.split())}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        print(f"{prog}: out of memory; ask for fewer or smaller images at a time (--help)", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as e:
        if heeds:
            _deaf()
        print(f"\n{prog}: interrupted{'; ' * bool(str(e))}{e}", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    if code and torch.distributed.is_available() and torch.distributed.is_initialized():
        # The threads of a group that has not come to its end abort an interpreter that ends under them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

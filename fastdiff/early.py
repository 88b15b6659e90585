"""Ctrl-C and SIGTERM while a command starts. To import torch takes seconds, in the middle of which a KeyboardInterrupt is a traceback, or another
error, or in an extension module the end of the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable

# What is done about the signals that end a command, where nobody has said otherwise.
HANDLED: dict[int, Callable[..., object] | int] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def command() -> str | None:
    """The command of this package that is starting, "python -m fastdiff.sample", if that is what this process is for.

    While Python looks for the module that it is to run, and imports the package for it, the module's place in sys.argv is "-m".
    """
    argv: list[str] = getattr(sys, "argv", [])  # there is none where Python is embedded
    if argv[:1] != ["-m"] or len(argv) >= len(sys.orig_argv):
        return None
    module = sys.orig_argv[-len(argv)].removeprefix("-m")
    return f"python -m {module}" if module.startswith(f"{__package__}.") else None


def watch() -> None:
    """From now until `over`, if a command is starting, end it in one line, with exit code 130. Others who import the package keep their handlers."""
    if command():
        for number, usual in HANDLED.items():
            if signal.getsignal(number) == usual:  # not where a shell has made what runs in the background deaf
                signal.signal(number, _end)


def over() -> None:
    """The usual handlers, in the place of those of `watch`."""
    for number, usual in HANDLED.items():
        if signal.getsignal(number) is _end:
            signal.signal(number, usual)


def _end(*_: object) -> None:
    # At once: nothing is held yet.
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{PROG}: interrupted\n".encode())
    os._exit(130)


PROG = command() or ""

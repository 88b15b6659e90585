"""Which way of running a network was measured to be the fastest here: a small file in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

import torch
from torch import nn

from .files import atomic_write, cache_folder
from .version import __version__


def path() -> Path:
    """$FASTDIFF_CACHE/ways.json, by default under the user's cache folder."""
    return cache_folder() / "ways.json"


def keep_compiled() -> None:
    """Have this process keep what it compiles beside that file, rather than in a folder for temporary files. Before anything is compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def digest(model: nn.Module) -> str:
    """A network's class and the shapes of its weights."""
    shape = [type(model).__qualname__, *(f"{name} {list(v.shape)}" for name, v in model.state_dict().items())]
    return hashlib.sha256("\n".join(shape).encode()).hexdigest()[:16]


def key(model: nn.Module, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """What decides the speed: the network's class and the shapes of its weights, rows, dtype, device, torch and fastdiff."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{digest(model)}, {rows} rows, {str(dtype).removeprefix('torch.')}, {name}, torch {torch.__version__}, fastdiff {__version__}"


def _read() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path().read_text())
        return {k: {way: float(ms) for way, ms in v.items()} for k, v in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):
        return {}  # not there, or nobody's; RuntimeError: there is no home


def recall(which: str) -> dict[str, float]:
    """Milliseconds by way, {} where nothing has been measured."""
    return _read().get(which, {})


def remember(which: str, milliseconds: dict[str, float]) -> None:
    """Keep a measurement. Where nothing can be written it is forgotten."""
    with contextlib.suppress(OSError, RuntimeError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path()) as f:
            f.write(json.dumps({**_read(), which: milliseconds}, indent=1).encode())

"""Kernels in C for the CPU, compiled where there is a C compiler when the first of them is wanted: a quarter of a second, in a folder that is gone
at once. Without one the library does as well as PyTorch alone can. CC names the compiler; CC=false does without."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).parent / "kernels" / name for name in ("winograd.c", "group_norm_silu.c")]
# Contraction of a * b + c into one instruction is what makes a transform one pass at the speed of the cache.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
LIBRARIES = ("-lm",)
# Channels come in vectors of at most so many.
LANES = 16
# Bytes of what one transform makes at a time, more than which the caches do not profit from.
SCRATCH = 32 << 20

_BUILDING = threading.Lock()


class _Scratch(threading.local):
    """Memory of one thread for what stands between the transforms, kept: to get it anew from the system costs a tenth of a convolution."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, numel: int) -> Tensor:
        if name not in self.kept or self.kept[name].numel() < numel:
            self.kept[name] = torch.zeros(numel)  # finite, also in the row that nobody writes
        return self.kept[name][:numel]


_SCRATCH = _Scratch()


def available() -> bool:
    """Whether the kernels are there: compiled now, if they have not been."""
    with _BUILDING:
        return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "")) or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    if not compiler:
        log.info("networks by PyTorch alone: there is no C compiler")
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
            made = Path(folder) / "kernels.so"
            subprocess.run([*compiler, *FLAGS, "-o", made, *SOURCES, *LIBRARIES], check=True, capture_output=True, text=True, timeout=60)
            library = ctypes.CDLL(os.fspath(made))
    except (OSError, subprocess.SubprocessError) as e:
        why = (e.stderr.strip() or f"exit code {e.returncode}") if isinstance(e, subprocess.CalledProcessError) else str(e)
        log.info("networks by PyTorch alone: %s cannot compile the kernels: %s", compiler[0], why.splitlines()[0])
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for name, arguments in {
        "fastdiff_winograd_into": [pointer] * 2 + [number] * 5,
        "fastdiff_winograd_out_of": [pointer] * 3 + [number] * 5,
        "fastdiff_group_norm_silu": [pointer] * 8 + [number] * 5 + [ctypes.c_float, ctypes.c_int],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def winograd_conv3x3(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.winograd_conv3x3`. On the CPU, in fp32, of sides that are multiples of 4 and channels that are multiples of 16."""
    library = _library()
    n, c, h, w = x.shape
    out = packed.shape[2]
    given = [x, packed] + ([] if bias is None else [bias])
    assert library is not None and all(v.device.type == "cpu" and v.dtype == torch.float32 for v in given)
    assert h % 4 == w % 4 == 0 and packed.shape == (36, c, out) and c % LANES == out % LANES == 0 and (bias is None or bias.shape == (out,))
    x, packed = x.contiguous(memory_format=torch.channels_last), packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(n, h, w, out)
    tiles = h * w // 16
    # As even parts as can be.
    parts = max(1, -(-144 * n * tiles * max(c, out) // SCRATCH))
    size = max(1, -(-n // parts))
    for start in range(0, n, size):
        images = min(size, n - start)
        # One row more than there are tiles, so that the 36 places do not lie powers of two apart and drive each other from the cache.
        rows = images * tiles + 1
        places, made = _SCRATCH.take("places", 36 * rows * c), _SCRATCH.take("made", 36 * rows * out)
        library.fastdiff_winograd_into(x[start].data_ptr(), places.data_ptr(), images, h, w, c, rows * c)
        torch.bmm(places.view(36, rows, c), packed, out=made.view(36, rows, out))
        library.fastdiff_winograd_out_of(
            made.data_ptr(), None if bias is None else bias.data_ptr(), y[start].data_ptr(), images, h, w, out, rows * out
        )
    return y.permute(0, 3, 1, 2)


def covers_norm(x: Tensor, inverse: Tensor | None = None) -> bool:
    """Whether `group_norm_silu` takes [N, H, W, C] so."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] % LANES == 0 and inverse is None and available()


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    style: Tensor | None,
    which: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    inverse: Tensor | None,
) -> Tensor:
    """See `reference.group_norm_silu`. Of fp32 on the CPU, with channels that are a multiple of 16, into fp32."""
    library = _library()
    n, height, width, channels = x.shape
    assert library is not None and covers_norm(x, inverse) and channels % groups == 0 and gamma.shape == beta.shape == (channels,)
    x, gamma, beta = x.contiguous(), gamma.float().contiguous(), beta.float().contiguous()
    scale = shift = stride = 0
    if style is not None:
        assert style.shape[1:] == (2 * channels,) and (
            len(style) == n if which is None else which.shape == (n,) and which.dtype == torch.int64
        )
        style = style.float() if style.stride(1) == 1 else style.float().contiguous()
        if which is not None:
            which = which.contiguous()
            assert n == 0 or (int(which.min()) >= 0 and int(which.max()) < len(style))
        scale, shift, stride = style.data_ptr(), style[:, channels:].data_ptr(), style.stride(0)
    y = torch.empty_like(x)
    library.fastdiff_group_norm_silu(
        x.data_ptr(), gamma.data_ptr(), beta.data_ptr(), scale or None, shift or None, None if which is None else which.data_ptr(), y.data_ptr(),
        _SCRATCH.take("norm", 4 * channels).data_ptr(), n, height * width, channels, groups, stride, eps, silu,
    )  # fmt: skip
    return y

"""Kernels in C for the CPU, compiled where there is a C compiler when the first of them is wanted: a quarter of a second, in a folder that is gone
at once. Without one the library does as well as PyTorch alone can. CC names the compiler; CC=false does without."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "kernels" / "cpu.c"
# Contraction of a * b + c into one instruction is what makes a transform one pass at the speed of the cache.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
LIBRARIES = ("-lm",)
# Channels come in vectors of at most so many.
LANES = 16
# Bytes of what one transform makes at a time, more than which the caches do not profit from.
SCRATCH = 32 << 20

_BUILDING = threading.Lock()


# What is nobody's just now.
_FREE: list[Scratch] = []


class Scratch:
    """Memory for what stands between the transforms, kept for the next that asks: to get it anew from the system costs a tenth of a convolution."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, numel: int) -> Tensor:
        if name not in self.kept or self.kept[name].numel() < numel:
            with torch.inference_mode(False):  # or nobody could write to it outside of that mode
                self.kept[name] = torch.zeros(numel)  # finite, also in the row that nobody writes
        return self.kept[name][:numel]


@contextlib.contextmanager
def _scratch() -> Iterator[Scratch]:
    """One that no other thread has."""
    try:
        mine = _FREE.pop()
    except IndexError:
        mine = Scratch()
    try:
        yield mine
    finally:
        _FREE.append(mine)


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
            subprocess.run([*compiler, *FLAGS, "-o", made, SOURCE, *LIBRARIES], check=True, capture_output=True, text=True, timeout=60)
            library = ctypes.CDLL(os.fspath(made))
    except (OSError, subprocess.SubprocessError) as e:
        why = (e.stderr.strip() or f"exit code {e.returncode}") if isinstance(e, subprocess.CalledProcessError) else str(e)
        log.info("networks by PyTorch alone: %s cannot compile the kernels: %s", compiler[0], why.splitlines()[0])
        return None
    pointer, norm, number = ctypes.c_void_p, ctypes.POINTER(_Norm), ctypes.c_long
    for name, arguments in {
        "group_norm_silu": [pointer, pointer, norm, pointer, *[number] * 3, pointer],
        "winograd_into": [pointer, pointer, norm, *[number] * 5, pointer],
        "winograd_between": [pointer, pointer, norm, pointer, *[number] * 5, pointer],
        "winograd_out_of": [pointer, pointer, pointer, pointer, *[number] * 5],
    }.items():
        function = getattr(library, f"fastdiff_{name}")
        function.argtypes, function.restype = arguments, None
    return library


class _Norm(ctypes.Structure):
    """`struct norm` of kernels/cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "scale", "shift")),
        ("groups", ctypes.c_long), ("stride", ctypes.c_long), ("eps", ctypes.c_float), ("silu", ctypes.c_int),
    )  # fmt: skip


class Norm(NamedTuple):
    """GroupNorm of `groups` groups, fp32 gamma and beta [C]; style: fp32 [M, 2 C], scale then shift, or None; then SiLU, or not."""

    gamma: Tensor
    beta: Tensor
    groups: int
    eps: float
    style: Tensor | None = None
    silu: bool = True

    def checked(self, channels: int) -> Norm:
        """Of memory that C reads."""
        gamma, beta, groups, _, style, _ = self
        assert gamma.shape == beta.shape == (channels,) and channels % groups == 0, "gamma and beta must be [C], of groups that divide C"
        assert style is None or (style.ndim == 2 and style.shape[1] == 2 * channels), "style must be [M, 2 C]"
        if style is not None and (style.dtype != torch.float32 or style.stride(1) != 1):
            style = style.float().contiguous()
        return self._replace(gamma=_dense(gamma), beta=_dense(beta), style=style)

    def struct(self, row: int = 0) -> _Norm:
        """What C is told: `row` is that of the first image. It knows addresses alone; the Norm must outlive the call."""
        scale = shift = stride = 0
        if self.style is not None:
            stride = self.style.stride(0)
            scale = self.style.data_ptr() + 4 * row * stride
            shift = scale + 2 * self.style.shape[1]
        return _Norm(self.gamma.data_ptr(), self.beta.data_ptr(), scale or None, shift or None, self.groups, stride, self.eps, self.silu)


def _dense(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def covers(x: Tensor, *channels: int) -> bool:
    """Whether the kernels take images such as x, fp32 on the CPU, in and out of so many channels."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not any(c % LANES for c in channels) and available()


def group_norm_silu(x: Tensor, norm: Norm, which: Tensor | None = None) -> Tensor:
    """See `reference.group_norm_silu`. x: fp32 [N, H, W, C] on the CPU, C a multiple of 16. which: rows of the style, int64 [N], or None for row i."""
    library = _library()
    n, height, width, channels = x.shape
    assert library is not None and covers(x, channels)
    norm = norm.checked(channels)
    rows = 0 if norm.style is None else len(norm.style)
    if which is not None:
        which = which.contiguous()
        assert which.shape == (n,) and which.dtype == torch.int64 and (n == 0 or (which.min() >= 0 and which.max() < rows)), (
            "which must be rows of style"
        )
    assert norm.style is None or which is not None or rows == n, "style must have a row for each image"
    x = x.contiguous()
    y = torch.empty_like(x)
    with _scratch() as scratch:
        library.fastdiff_group_norm_silu(
            x.data_ptr(), y.data_ptr(), norm.struct(), None if which is None else which.data_ptr(), n, height * width, channels,
            scratch.take("image", 4 * channels).data_ptr(),
        )  # fmt: skip
    return y


def _parts(n: int, numbers: int) -> Iterator[tuple[int, int]]:
    """(start, images) of parts as even as can be, of n images with so many numbers each at a time between two transforms."""
    size = max(1, -(-n // max(1, -(-4 * n * numbers // SCRATCH))))
    for start in range(0, n, size):
        yield start, min(size, n - start)


def winograd_conv3x3(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.winograd_conv3x3`. On the CPU, in fp32, of sides that are multiples of 4 and channels that are multiples of 16."""
    return _convolved(x, [(None, packed, bias)], None)


def residual_block(x: Tensor, convolutions: Sequence[tuple[Norm | None, Tensor, Tensor | None]], skip: Tensor) -> Tensor:
    """skip + conv(norm(conv(norm(x)))), for two norms, packed weights and biases. x and skip: fp32 [N, C, H, W], as `winograd_conv3x3` takes them."""
    return _convolved(x, convolutions, skip)


def _convolved(x: Tensor, convolutions: Sequence[tuple[Norm | None, Tensor, Tensor | None]], skip: Tensor | None) -> Tensor:
    library = _library()
    n, c, h, w = x.shape
    out = convolutions[-1][1].shape[2]
    assert library is not None and covers(x, c, out) and h % 4 == w % 4 == 0
    x = x.contiguous(memory_format=torch.channels_last)
    checked = []
    for norm, packed, bias in convolutions:
        assert packed.shape == (36, c, packed.shape[2]) and packed.shape[2] % LANES == 0 and packed.dtype == torch.float32
        assert bias is None or bias.shape == packed.shape[2:]
        if norm is not None:
            norm = norm.checked(c)
            assert norm.style is None or len(norm.style) == n, "style must have a row for each image"
        checked.append((norm, packed.contiguous(), None if bias is None else _dense(bias)))
        c = packed.shape[2]
    if skip is not None:
        assert skip.shape == (n, out, h, w) and covers(skip)
        skip = skip.contiguous(memory_format=torch.channels_last)
    y = torch.empty(n, h, w, out)
    tiles, widest = h * w // 16, max(x.shape[1], *(packed.shape[2] for _, packed, _ in checked))
    with _scratch() as scratch:
        image = scratch.take("image", (4 + h * w) * widest).data_ptr()
        for start, images in _parts(n, 36 * tiles * widest):
            # One row more than there are tiles, so that the 36 places do not lie powers of two apart and drive each other from the cache.
            rows = images * tiles + 1
            made, before = None, None
            for norm, packed, bias in checked:
                _, c, c_out = packed.shape
                places = scratch.take("places", 36 * rows * c)
                told = None if norm is None else norm.struct(start)
                if made is None:
                    source = x.data_ptr() + 4 * start * h * w * c
                    library.fastdiff_winograd_into(source, places.data_ptr(), told, images, h, w, c, rows * c, image)
                else:
                    shift = None if before is None else before.data_ptr()
                    library.fastdiff_winograd_between(made.data_ptr(), shift, told, places.data_ptr(), images, h, w, c, rows * c, image)
                made, before = scratch.take("made", 36 * rows * c_out), bias
                torch.bmm(places.view(36, rows, c), packed, out=made.view(36, rows, c_out))
            assert made is not None
            at = 4 * start * h * w * out
            library.fastdiff_winograd_out_of(
                made.data_ptr(), None if before is None else before.data_ptr(), None if skip is None else skip.data_ptr() + at,
                y.data_ptr() + at, images, h, w, out, rows * out,
            )  # fmt: skip
    return y.permute(0, 3, 1, 2)

"""Kernels in C for the CPU, compiled where there is a C compiler when the first of them is wanted: a second, once, for the library is kept in
fastdiff's cache folder. Without a compiler, PyTorch alone does what it can. CC names the compiler; CC=false does without."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .files import atomic_write, cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "kernels" / "cpu.c"
# Contraction of a * b + c into one instruction is what makes a transform one pass at the speed of the cache.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
LIBRARIES = ("-lm",)
# Threads of the same OpenMP that PyTorch brings along and has loaded. Not every compiler has it; without, a call runs on one core.
TOGETHER = "-fopenmp"
# Channels come in vectors of at most so many, and those of a convolution's result in panels.
LANES, WIDE = 16, reference.WIDE
# Factors of a product come in bf16 so many at a time, and in tiles of such a shape: see `reference.tiles`.
DEEP, TILES_OF = 32, (2, 16, 16, 2)
# More cores than a call has vectors of channels to share would only wait for one another.
MOST_CORES = 8
# Rows that a product in C makes at a time, at most.
MOST_ROWS = 14
# Images in bf16 at a time: rows of a matrix that with its sums fits into a core's cache.
ROWS = 1296
# Tiles of 4 x 4 pixels at a time, or as many as there are channels, if those are more: what is transformed is then as large as the weights are, and
# neither has the other read from memory time and again.
TILES = 64

_BUILDING = threading.Lock()


# Memory that is nobody's just now. To get it anew from the system costs a tenth of a convolution.
_FREE: list[Tensor] = []


def _empty(*shape: int) -> Tensor:
    """fp32 for C to write, whatever the process's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def _scratch(numel: int) -> Iterator[Tensor]:
    """fp32 [numel] that no other thread has, of any values."""
    try:
        mine = _FREE.pop()
    except IndexError:
        mine = _empty(0)
    if mine.numel() < numel:
        with torch.inference_mode(False):  # or nobody could use it outside of that mode
            mine = _empty(numel)
    try:
        yield mine
    finally:
        _FREE.append(mine)


class _Team(threading.local):
    cores = 1
    most = MOST_CORES


_TEAM = _Team()


def _alone() -> None:
    """A fork has none of the threads that OpenMP believes it has, and would wait for them for ever."""
    _Team.most = _Team.cores = _TEAM.cores = 1


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_alone)


@contextlib.contextmanager
def team(cores: int) -> Iterator[None]:
    """Convolutions and blocks that this thread runs are shared among so many cores; bits stay what they are. In a process that has been forked each
    call keeps to one core."""
    before, _TEAM.cores = _TEAM.cores, max(min(cores, _TEAM.most), 1)
    try:
        yield
    finally:
        _TEAM.cores = before


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
        library = _kept(compiler)
    except (OSError, subprocess.SubprocessError) as e:
        why = (e.stderr.strip() or f"exit code {e.returncode}") if isinstance(e, subprocess.CalledProcessError) else str(e)
        log.info("networks by PyTorch alone: %s cannot compile the kernels: %s", compiler[0], why.splitlines()[0])
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    for name, arguments in {
        "normal": [*[pointer] * 3, number, pointer, number, number],
        "noise_words": [*[pointer] * 3, number, pointer, number, number],
        "solver_step": [*[pointer] * 6, number, *[pointer] * 5, number, number, *[ctypes.c_int] * 3],
        "group_norm_silu": [pointer, pointer, ctypes.POINTER(_Norm), pointer, number, pointer, *[number] * 3, pointer],
        "stamps": [*[pointer] * 3, number],
        "tiles": [],
        "conv3x3": [*[pointer] * 4, *[number] * 6, ctypes.c_int, pointer],
        "block": [ctypes.POINTER(_Block), pointer, pointer, number, pointer, number, pointer, *[number] * 4, ctypes.c_int, pointer],
    }.items():
        function = getattr(library, f"fastdiff_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_int if name in ("solver_step", "tiles") else None
    if library.fastdiff_tiles():
        *others, _, scratch = library.fastdiff_block.argtypes
        library.fastdiff_block_tiles.argtypes, library.fastdiff_block_tiles.restype = [*others, scratch], None
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies matrices of bf16 by tiles (AMX), and the system lets it."""
    library = _library()
    return library is not None and bool(library.fastdiff_tiles())


def _kept(compiler: list[str]) -> ctypes.CDLL:
    """The library that an earlier process has compiled of the same source for the same processor, or a new one, kept where that can be."""
    keep = None
    with contextlib.suppress(OSError, RuntimeError):  # no such compiler, no home: what can be done is done below
        keep = cache_folder() / "native" / f"cpu-{_key(compiler)}.so"
        if _own(keep.parent, 0o077) and _own(keep, 0) and _whole(keep.read_bytes()):
            return ctypes.CDLL(os.fspath(keep))
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as folder:
        try:
            library, made = _compiled([*compiler, TOGETHER], Path(folder) / "together.so")
        except (OSError, subprocess.CalledProcessError):
            library, made = _compiled(compiler, Path(folder) / "alone.so")
        with contextlib.suppress(OSError):
            if keep is not None:
                keep.parent.mkdir(0o700, parents=True, exist_ok=True)
                content = made.read_bytes()
                with atomic_write(keep) as f:
                    f.write(content + hashlib.sha256(content).digest())
    return library


def _compiled(compiler: list[str], made: Path) -> tuple[ctypes.CDLL, Path]:
    subprocess.run([*compiler, *FLAGS, "-o", made, SOURCE, *LIBRARIES], check=True, capture_output=True, text=True, timeout=60)
    return ctypes.CDLL(os.fspath(made)), made


def _key(compiler: list[str]) -> str:
    """All that a library depends on: the source, the compiler and what it is told, and the processor that -march=native is."""
    program = os.path.realpath(shutil.which(compiler[0]) or compiler[0])
    state = os.stat(program)
    said = [*compiler, program, f"{state.st_size} {state.st_mtime_ns}", TOGETHER, *FLAGS, *LIBRARIES, _processor()]
    return hashlib.sha256("\0".join(said).encode() + SOURCE.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags", "Features", "CPU")))
    return f"{platform.machine()} {platform.processor()}"


def _whole(content: bytes) -> bool:
    """Whether a kept library ends with its digest: to load one that is cut short ends the process."""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _own(path: Path, others: int) -> bool:
    """Whether a file or folder is this user's, and these bits of its mode are not set: what is run must come from nobody else."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return False
    return not hasattr(os, "geteuid") or (state.st_uid == os.geteuid() and not state.st_mode & others)


class _Norm(ctypes.Structure):
    """`struct norm` of kernels/cpu.c."""

    _fields_ = (
        ("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("groups", ctypes.c_long), ("eps", ctypes.c_float), ("silu", ctypes.c_int),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm), ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("c_in", ctypes.c_long), ("c_out", ctypes.c_long),
    )  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = (
        ("layers", _Layer * 2), ("count", ctypes.c_long), ("skip", ctypes.c_void_p), ("times", ctypes.c_float), ("alone", ctypes.c_int),
        ("added", ctypes.c_int),
    )  # fmt: skip


class Norm(NamedTuple):
    """GroupNorm of `groups` groups, fp32 gamma and beta [C]; then SiLU, or not."""

    gamma: Tensor
    beta: Tensor
    groups: int
    eps: float
    silu: bool = True

    def checked(self, channels: int) -> Norm:
        """Of memory that C reads."""
        assert self.gamma.shape == self.beta.shape == (channels,), "gamma and beta must be [C]"
        assert self.groups > 0 and channels % self.groups == 0, "groups must divide C"
        return self._replace(gamma=_dense(self.gamma), beta=_dense(self.beta))

    def struct(self) -> _Norm:
        """What C is told: addresses, of what must outlive them."""
        return _Norm(self.gamma.data_ptr(), self.beta.data_ptr(), self.groups, self.eps, self.silu)


class Layer(NamedTuple):
    """A 3 x 3 convolution of what norm makes of the images. weight: `reference.winograd_weight`, or `reference.tiled_weight`; bias: [C'] or None."""

    norm: Norm | None
    weight: Tensor
    bias: Tensor | None

    def checked(self) -> Layer:
        if self.tiled:
            deep = self.weight.shape[1]
            assert self.weight.shape[2:] == TILES_OF and deep % 9 == 0, "the weight must be as reference.tiled_weight makes it"
        else:
            assert self.weight.shape[::3] == (36, WIDE) and self.weight.dtype == torch.float32, (
                "the weight must be as reference.winograd_weight makes it"
            )
        c_in, c_out = self.channels
        assert self.bias is None or self.bias.shape == (c_out,), "the bias must be [C']"
        norm, bias = None if self.norm is None else self.norm.checked(c_in), None if self.bias is None else _dense(self.bias)
        return Layer(norm, self.weight.detach().contiguous(), bias)

    def struct(self) -> _Layer:
        norm = _Norm() if self.norm is None else self.norm.struct()
        return _Layer(norm, self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr(), *self.channels)

    @property
    def tiled(self) -> bool:
        return self.weight.dtype == torch.bfloat16

    @property
    def channels(self) -> tuple[int, int]:
        if self.tiled:
            return self.weight.shape[1] // 9 * DEEP, self.weight.shape[0] * WIDE
        return self.weight.shape[2], self.weight.shape[1] * WIDE


def _dense(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def covers(x: Tensor, *channels: int) -> bool:
    """Whether the kernels take images such as x, fp32 on the CPU, of so many channels."""
    return x.is_cpu and x.dtype == torch.float32 and not (channels and any(c % LANES for c in channels)) and available()


def noise_words(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    """See `reference.noise_words`."""
    library, made = _library(), torch.empty(len(ids), quads, 4, dtype=torch.int64, device="cpu")
    assert library is not None
    return _noise(library.fastdiff_noise_words, seeds, ids, counter, made, quads)


def normal(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    """See `reference.normal`; logarithms, roots and cosines are rounded otherwise in their last bits."""
    library = _library()
    assert library is not None
    return _noise(library.fastdiff_normal, seeds, ids, counter, _empty(len(ids), numel), numel)


def _noise(make: Callable[..., None], seeds: Tensor, ids: Tensor, counter: Tensor, made: Tensor, size: int) -> Tensor:
    n = len(ids)
    seeds, ids, counter = (column.to(torch.int64).contiguous() for column in (seeds, ids, counter.reshape(-1)))
    assert seeds.shape == ids.shape == (n,) and len(counter) in (1, n), "give a seed for each id, and a counter for each or all"
    make(seeds.data_ptr(), ids.data_ptr(), counter.data_ptr(), int(len(counter) == n), made.data_ptr(), n, size)
    return made


def steps(x: Tensor, x0: Tensor, m: Tensor, model_input: Tensor, history: Tensor, *others: Tensor | None) -> bool:
    """Whether `solver_step` takes these: in fp32, and dense."""
    tensors = (x, x0, m, model_input, history, *(tensor for tensor in others if tensor is not None))
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors) and available()


def solver_step(
    x: Tensor, x0: Tensor, m: Tensor, model_input: Tensor, history: Tensor, table: Tensor, row: Tensor, seeds: Tensor, ids: Tensor,
    guidance: Tensor, noise: Tensor | None = None,
) -> None:  # fmt: skip
    """See `reference.solver_step`, of what `steps` says."""
    library, n = _library(), len(x)
    assert library is not None and steps(x, x0, m, model_input, history, table, guidance, noise)
    numel, halves, copies = x[0].numel() if n else 0, len(m) != n, len(model_input) // max(n, 1)
    learned = m.shape[1] != x.shape[1]
    row = row.to(torch.int64)
    assert table.shape[1:] == (len(reference.COLUMNS),) and row.numel() == 1
    assert x0.shape == x.shape and m.shape == (n << halves, x.shape[1] << learned, *x.shape[2:])
    assert model_input.shape == (n * copies, *x.shape[1:]) and (noise is None or noise.shape == x.shape)
    assert len(history) == 0 or history.shape == (reference.SLOTS, *x.shape)
    assert seeds.dtype == ids.dtype == torch.int64 and seeds.shape == ids.shape == guidance.shape == (n,)
    seeds, ids = seeds.contiguous(), ids.contiguous()
    done = library.fastdiff_solver_step(
        x.data_ptr(), x0.data_ptr(), m.data_ptr(), model_input.data_ptr(), history.data_ptr() if len(history) else None, table.data_ptr(), len(table),
        row.data_ptr(), seeds.data_ptr(), ids.data_ptr(), guidance.data_ptr(), None if noise is None else noise.data_ptr(), n, numel, halves, learned,
        copies,
    )  # fmt: skip
    assert done, "row is not one of the table's"


def group_norm_silu(x: Tensor, norm: Norm, style: Tensor | None = None, which: Tensor | None = None) -> Tensor:
    """See `reference.group_norm_silu`. x: fp32 [N, H, W, C] on the CPU, C a multiple of 16. which: rows of the style, int64 [N], or None for row i."""
    library = _library()
    n, height, width, channels = x.shape
    assert library is not None and covers(x, channels)
    norm, style = norm.checked(channels), _rows(style, 2 * channels)
    if which is not None:
        which = which.contiguous()
        rows = 0 if style is None else len(style)
        assert which.shape == (n,) and which.dtype == torch.int64 and (n == 0 or (which.min() >= 0 and which.max() < rows)), (
            "which must be rows of style"
        )
    assert style is None or which is not None or len(style) == n, "style must have a row for each image"
    x = x.contiguous()
    y = torch.empty_like(x)
    with _scratch(4 * channels) as scratch:
        library.fastdiff_group_norm_silu(
            x.data_ptr(), y.data_ptr(), norm.struct(), *_told(style), None if which is None else which.data_ptr(), n, height * width, channels,
            scratch.data_ptr(),
        )  # fmt: skip
    return y


def _rows(style: Tensor | None, size: int) -> Tensor | None:
    """A style whose rows C reads."""
    if style is None:
        return None
    assert style.ndim == 2 and style.shape[1] == size, f"style must be [M, {size}]"
    return style if style.dtype == torch.float32 and style.stride(1) == 1 else _dense(style)


def _told(style: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if style is None else (style.data_ptr(), style.stride(0))


class Block:
    """times (x' + layers(x)) of one or two layers, each after the other. x': x by default; with `skip` [C, C'] in `reference.panels`, x skip; with
    `alone` nothing. Where the layers' weights are tiles, and the skip is, what is multiplied is bf16, and all else fp32, and a call keeps to one
    core: with two that share their tiles it took as long.

    A call's style [N, 2 C] is scale and shift of the last layer's norm, or, with `added`, [N, C] that is added to what this norm is of.
    """

    def __init__(
        self, layers: Sequence[Layer], *, skip: Tensor | None = None, times: float = 1.0, alone: bool = False, added: bool = False
    ) -> None:
        self.layers, self.added = [layer.checked() for layer in layers], added
        first, last = (self.layers[i].channels for i in (0, -1))
        self.tiled = self.layers[0].tiled
        assert 1 <= len(self.layers) <= 2 and not first[0] % LANES
        assert self.layers[-1].tiled == self.tiled, "the weights of both layers must be tiles, or of neither"
        assert not self.tiled or has_tiles(), "there are no tiles"
        if len(self.layers) == 2:
            assert self.layers[1].norm is not None and first[1] == last[0], (
                "the second layer must have a norm, and take the first one's channels"
            )
        self.c_in, self.c_out, self.widest = first[0], last[1], max(*first, *last)
        self.skip = None if skip is None else skip.detach().contiguous()
        if self.skip is not None:
            shape = (first[0] // DEEP, *TILES_OF) if self.tiled else (first[0], WIDE)
            kind = torch.bfloat16 if self.tiled else torch.float32
            assert self.skip.shape == (last[1] // WIDE, *shape) and self.skip.dtype == kind and not alone, "skip must be panels of [C, C']"
        else:
            assert alone or first[0] == last[1], "without a skip, what comes in must have as many channels as the result"
        styled = self.layers[-1]
        self.style = 0 if styled.norm is None else styled.channels[0] if added else 2 * styled.channels[0]
        layouts = (_Layer * 2)(*[layer.struct() for layer in self.layers])
        self.told = _Block(layouts, len(self.layers), None if self.skip is None else self.skip.data_ptr(), times, alone, added)

    def takes(self, x: Tensor) -> bool:
        return covers(x) and (self.tiled or x.shape[2] % 4 == x.shape[3] % 4 == 0)

    def __call__(self, x: Tensor, beside: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        """x: fp32 [N, C, H, W] on the CPU, without tiles H and W multiples of 4, and beside, or None, whose channels are taken after those of x.
        Returns fp32 [N, C', H, W], channels-last."""
        library = _library()
        n, c, h, w = x.shape
        assert library is not None and self.takes(x)
        x, c_beside = x.contiguous(memory_format=torch.channels_last), 0
        if beside is not None:
            c_beside = beside.shape[1]
            assert self.takes(beside) and beside.shape == (n, c_beside, h, w), "beside must be of the size of x"
            beside = beside.contiguous(memory_format=torch.channels_last)
        assert c + c_beside == self.c_in, f"there must be {self.c_in} channels"
        style = _rows(style, self.style)
        assert style is None or (self.style and len(style) == n), "style must have a row for each image, and a norm"
        y = _empty(n, h, w, self.c_out)
        given = self.told, x.data_ptr(), None if beside is None else beside.data_ptr(), c_beside, *_told(style), y.data_ptr(), n, h, w
        if self.tiled:
            part = _even(n, ROWS // ((h + 1) * (w + 1)))
            with _scratch(_tiled_numel(part, h, w, self.c_in, self.widest)) as scratch:
                library.fastdiff_block_tiles(*given, part, scratch.data_ptr())
        else:
            part = _part(n, h * w // 16, self.widest)
            with _scratch(_scratch_numel(part, h, w, self.widest)) as scratch:
                library.fastdiff_block(*given, part, _TEAM.cores, scratch.data_ptr())
        return y.permute(0, 3, 1, 2)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
    """A 3 x 3 convolution of every `step`th pixel within a border of zeros. x: fp32 [N, C, H, W] on the CPU; weight: `reference.conv_weight`; bias:
    fp32 [C'] or None. Returns fp32 [N, C', ceil(H / step), ceil(W / step)], channels-last. The bits of an image do not depend on how many there are."""
    library = _library()
    n, c, h, w = x.shape
    channels = weight.shape[0] * WIDE
    assert library is not None and covers(x) and step > 0
    assert weight.shape[1:] == (9 * c, WIDE) and weight.dtype == torch.float32, "the weight must be as reference.conv_weight makes it"
    assert bias is None or bias.shape == (channels,), "the bias must be [C']"
    x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), None if bias is None else _dense(bias)
    y = _empty(n, -(-h // step), -(-w // step), channels)
    with _scratch(_TEAM.cores * MOST_ROWS * 9 * c) as scratch:
        library.fastdiff_conv3x3(
            x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), n, h, w, c, channels, step, _TEAM.cores,
            scratch.data_ptr(),
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def stamps(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """A number of the bits of each tensor, dense and on the CPU: another, but for one chance in 2^32, if any of its bits is another."""
    library, n = _library(), len(tensors)
    assert library is not None
    made = (ctypes.c_int64 * n)()
    library.fastdiff_stamps(
        (ctypes.c_void_p * n)(*[x.data_ptr() for x in tensors]), (ctypes.c_long * n)(*[x.nbytes for x in tensors]), made, n
    )
    return tuple(made)


def stamp(weights: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Another where a weight on a CPU is another, or has other bits: also those that `.data` has changed, as averages of weights often do, which
    torch's own count of changes does not see. One pass over the weights, as an evaluation makes several."""
    dense = [
        w.detach() if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last) else w.detach().contiguous() for w in weights
    ]
    numbers = stamps(dense) if available() else [_number(w) for w in dense]
    return tuple((w.data_ptr(), number) for w, number in zip(weights, numbers, strict=True))


def _number(x: Tensor) -> int:
    """Of a tensor's bits, of 64."""
    return int.from_bytes(hashlib.blake2b(_bits(x).flatten().numpy().data, digest_size=8).digest(), "little")


def _bits(x: Tensor) -> Tensor:
    """The numbers as whole numbers of the same bits."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _scratch_numel(part: int, height: int, width: int, channels: int) -> int:
    """What C wants room for: see `fastdiff_block`."""
    pixels = height * width
    return (5 + 2 * pixels + 72 * (part * pixels // 16 + 1)) * channels


def _tiled_numel(part: int, height: int, width: int, c_in: int, channels: int) -> int:
    """What C wants room for: see `fastdiff_block_tiles`."""
    rows = -(-part * (height + 1) * (width + 1) // 32) * 32
    return (5 + 2 * height * width + rows) * channels + (rows + 2 * width + 4) // 2 * (channels + c_in)


def _part(n: int, tiles: int, channels: int) -> int:
    """How many of n images, of so many tiles each, at a time."""
    return _even(n, max(TILES, channels) // tiles)


def _even(n: int, most: int) -> int:
    """The size of parts of n, as even as can be, of no more than that, or one."""
    return max(1, math.ceil(n / max(1, math.ceil(n / max(1, most)))))


def winograd_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.winograd_conv3x3`. On the CPU, in fp32, of channels that are multiples of 16, and 32 of the result."""
    return Block([Layer(None, weight, bias)], alone=True)(x)

"""Arguments of the network's fused operations, their tolerances, and memory that shows what was not written or should not be touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The kernels compute with 16 bits on a GPU, and the interpreter, whose bf16 is not right, with fp32 and fp16.
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
KERNELS = CUDA and ops.has_kernels(torch.device("cuda"))
needs_kernels = pytest.mark.skipif(CUDA and not KERNELS, reason="the convolutions are kernels for compute capability 9 and 10")
# Sums of some thousand products of size 1 in another order, then a norm that scales them by up to 3: 1e-5 of fp32. A result of 16 bits is also
# rounded, which may tip it to the neighbouring number, 2^-10 or 2^-7 of itself away. tanh.approx, for bf16 alone, is within 2^-11.
TOLERANCES = {torch.float32: (1e-5, 3e-5), torch.float16: (2**-10, 5e-4), torch.bfloat16: (2**-7, 4e-3)}


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.is_contiguous()
    rtol, atol = TOLERANCES[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


class Draw:
    """Random tensors on the device, of one generator."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype).to(DEVICE)

    def weight(self, c_out: int, *rest: int) -> Tensor:
        """Such that a sum of products with numbers of size 1 has size 1."""
        return self.normal(c_out, *rest, scale=float(torch.tensor(rest).prod()) ** -0.5)

    def norms(self, results: int, c_out: int) -> list[Tensor]:
        made = [self.normal(c_out, dtype=torch.float32) for _ in range(2 * results)]
        return [v.abs() + 0.5 if i % 2 == 0 else v for i, v in enumerate(made)]

    def bias(self, rows: int, c_out: int) -> Tensor:
        return self.normal(rows, c_out, dtype=torch.float32)

    def which(self, n: int, rows: int) -> Tensor:
        return torch.randint(0, rows, (n,), generator=self.generator).to(DEVICE)


def conv3x3(
    n: int,
    side: int | tuple[int, int],
    channels: tuple[int, ...],
    c_out: int,
    dtype: torch.dtype,
    *,
    skip: tuple[int, ...] = (),
    same: bool = False,
    results: int = 1,
    style: bool = False,
    indexed: bool = True,
    each: bool = False,
    stride: int = 1,
    raw: bool = True,
    group: int = 8,
) -> tuple[Any, ...]:
    """skip: channels of a shortcut's inputs. same: a skip of the result's shape instead."""
    draw = Draw(n + c_out, dtype)
    height, width = (side, side) if isinstance(side, int) else side
    small = (n, height // stride, width // stride)
    added = [draw.normal(*small, c) for c in skip] if skip else [draw.normal(*small, c_out)] * same
    rows = 5 if indexed else n
    # Scales and shifts are columns among others, as in a table of all blocks'.
    styles = draw.normal(rows, 4 * c_out, scale=0.5)[:, c_out : 3 * c_out] if style else None
    return (
        [draw.normal(n, height, width, c) for c in channels], draw.weight(c_out, 3, 3, sum(channels)), draw.bias(n if each else 1, c_out), None,
        added, draw.weight(c_out, sum(skip)) if skip else None, draw.norms(results, c_out), styles, draw.which(n, rows) if style and indexed else None,
        None, c_out // group, 1e-5, stride, raw,
    )  # fmt: skip


def conv_up(n: int, side: int, channels: int, c_out: int, dtype: torch.dtype, *, results: int = 1, raw: bool = True) -> tuple[Any, ...]:
    draw = Draw(n + c_out, dtype)
    x, weight, bias = draw.normal(n, side, side, channels), draw.weight(c_out, 4, 4, channels), draw.bias(1, c_out)
    return x, weight * 2, bias, draw.norms(results, c_out), None, c_out // 8, 1e-5, raw


def conv_in(
    n: int, shape: tuple[int, int, int], patch: int, c_out: int, dtype: torch.dtype, *, results: int = 1, raw: bool = True
) -> tuple[Any, ...]:
    draw = Draw(n + c_out, dtype)
    x, weight = draw.normal(n, *shape), draw.weight(c_out, 3, 3, shape[0] * patch**2)
    return x, weight, draw.bias(1, c_out), draw.norms(results, c_out), None, patch, c_out // 8, 1e-5, raw


def conv_out(n: int, side: int, channels: int, c_out: int, patch: int, dtype: torch.dtype) -> tuple[Any, ...]:
    draw = Draw(n + channels, dtype)
    folded = c_out * patch**2
    return draw.normal(n, side, side, channels), draw.weight(folded, 3, 3, channels), draw.bias(1, folded)[0], patch


def group_norm_silu(
    shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, *, style: bool = False, indexed: bool = True, silu: bool = True
) -> tuple[Any, ...]:
    draw = Draw(shape[0] + shape[3], dtype)
    n, channels = shape[0], shape[3]
    gamma, beta = draw.norms(1, channels)
    rows = 5 if indexed else n
    styles = draw.normal(rows, 3 * channels, scale=0.5)[:, : 2 * channels] if style else None
    # Far from zero: a mean of squares would cancel.
    x = draw.normal(*shape) + 3
    return x, gamma, beta, styles, draw.which(n, rows) if style and indexed else None, groups, 1e-5, silu, None


@contextmanager
def guarded() -> Iterator[Callable[[], None]]:
    """Results within are allocated full of NaN, between guards. The function says whether the guards still stand."""
    kept: list[tuple[Tensor, int]] = []
    guard, new_empty = 64, torch.Tensor.new_empty

    def poisoned(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **other: Any) -> Tensor:
        if other:  # Triton's interpreter
            return new_empty(like, *shape, dtype=dtype, **other)
        wanted = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        whole = torch.full((wanted.numel() + 2 * guard,), float("nan"), device=like.device).to(dtype or like.dtype)
        whole[:guard] = whole[guard + wanted.numel() :] = 7
        kept.append((whole, wanted.numel()))
        return whole[guard : guard + wanted.numel()].view(wanted)

    def stand() -> None:
        assert kept
        for whole, size in kept:
            assert (whole[:guard].float() == 7).all() and (whole[guard + size :].float() == 7).all(), "written outside of a result"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        patch.setattr(torch, "empty_like", lambda like, dtype=None: poisoned(like, like.shape, dtype=dtype))
        yield stand


def between_nans(v: Tensor) -> Tensor:
    """The tensor in the middle of memory full of NaN, at a place divisible by 16 bytes."""
    guard = 128
    whole = torch.full((v.numel() + 2 * guard,), float("nan"), device=v.device, dtype=v.dtype)
    inner = whole[guard : guard + v.numel()].view(v.shape)
    inner.copy_(v)
    return inner


def everywhere(change: Callable[[Tensor], Tensor], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with every contiguous floating tensor changed."""

    def one(v: Any) -> Any:
        if isinstance(v, list):
            return [one(w) for w in v]
        return change(v) if isinstance(v, Tensor) and v.is_floating_point() and v.is_contiguous() else v

    return tuple(one(v) for v in arguments)

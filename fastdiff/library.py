"""The network's fused operations by what PyTorch has, one after the other: where a kernel does not cover a shape, or was measured to be slower.

Arguments and results: the functions of the same name in reference.py, but what stands between two operations is rounded to the dtype of the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

Norm = Callable[..., Tensor]


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
    out = F.group_norm(x.permute(0, 3, 1, 2), groups, gamma.to(x.dtype), beta.to(x.dtype), eps).permute(0, 2, 3, 1)
    if style is not None:
        scale, shift = (style if which is None else style[which]).to(x.dtype)[:, None, None].chunk(2, dim=-1)
        out = torch.addcmul(shift, out, 1 + scale)
    if silu:
        out = F.silu(out)
    return (out if inverse is None else reference.to_fp8(out, inverse)).contiguous()


def conv3x3(
    x: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    skip: list[Tensor],
    skip_weight: Tensor | None,
    norms: list[Tensor],
    style: Tensor | None,
    which: Tensor | None,
    inverse: Tensor | None,
    groups: int,
    eps: float,
    stride: int,
    raw: bool,
    norm: Norm = group_norm_silu,
) -> list[Tensor]:
    dtype = next((v.dtype for v in (skip_weight, *skip, weight) if v is not None and v.dtype != reference.FP8), torch.bfloat16)
    each = len(bias) != 1
    plain = None if each or scale is not None else bias[0].to(dtype)
    wide = _first(torch.cat([v.to(dtype) for v in x], dim=-1) if len(x) > 1 else x[0].to(dtype))
    y = _last(F.conv2d(wide, _first(weight.to(dtype)), plain, stride=stride, padding=1))
    if scale is not None:
        y = y * scale.to(dtype)
    if plain is None:
        y = y + bias[:, None, None].to(dtype)
    if skip_weight is not None:
        y = y + torch.cat(skip, dim=-1) @ skip_weight.T
    elif skip:
        y = y + skip[0]
    return _results(y, norms, style, which, inverse, groups, eps, raw, norm)


def conv_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norms: list[Tensor],
    inverse: Tensor | None,
    groups: int,
    eps: float,
    raw: bool,
    norm: Norm = group_norm_silu,
) -> list[Tensor]:
    y = F.conv_transpose2d(_first(x), weight.permute(3, 0, 1, 2), bias[0].to(x.dtype), stride=2, padding=1)
    return _results(_last(y), norms, None, None, inverse, groups, eps, raw, norm)


def conv_in(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norms: list[Tensor],
    inverse: Tensor | None,
    patch: int,
    groups: int,
    eps: float,
    raw: bool,
    norm: Norm = group_norm_silu,
) -> list[Tensor]:
    folded = reference.fold(x, patch).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(folded, _first(weight), bias[0].to(x.dtype), padding=1)
    return _results(_last(y), norms, None, None, inverse, groups, eps, raw, norm)


def conv_out(x: Tensor, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    return reference.unfold(F.conv2d(_first(x), _first(weight), bias.to(x.dtype), padding=1), patch).contiguous()


def _first(v: Tensor) -> Tensor:
    """Channels second, as PyTorch counts them; in memory they stay last."""
    return v.permute(0, 3, 1, 2)


def _last(v: Tensor) -> Tensor:
    return v.permute(0, 2, 3, 1).contiguous()


def _results(
    y: Tensor,
    norms: list[Tensor],
    style: Tensor | None,
    which: Tensor | None,
    inverse: Tensor | None,
    groups: int,
    eps: float,
    raw: bool,
    norm: Norm,
) -> list[Tensor]:
    found = [y] if raw else []
    for i in range(len(norms) // 2):
        own = (style, which) if i == 0 else (None, None)
        found.append(norm(y, norms[2 * i], norms[2 * i + 1], *own, groups, eps, True, None if inverse is None else inverse[i : i + 1]))
    return found

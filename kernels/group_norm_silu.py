"""GroupNorm, scale and shift for each image, and SiLU, in one pass over channels-last images (Wu & He 2018).

    y = silu((norm(x) gamma + beta) (1 + s) + t)

A program owns an image, or of a large one as many channels, whole groups of them, as its registers hold; what they do not hold is read again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv import check, fast, silu_of

# Elements that a program holds in registers: 32 for each of 512 threads.
HELD = 16384


@triton.jit
def centred(x, mean, live):
    return tl.where(live, x - mean, 0.0)


@triton.jit
def group_norm_silu_kernel(
    y_ptr, x_ptr, gamma_ptr, beta_ptr, style_ptr, which_ptr, style_stride, inverse_ptr,
    HW: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, CG: tl.constexpr, EPS: tl.constexpr, SILU: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """x_ptr, y_ptr: [N, HW, C]. BC channels a program, BP pixels at a time. CG: channels of a group."""
    image = (tl.program_id(0) // (C // BC)).to(tl.int64)
    co = tl.program_id(0) % (C // BC) * BC + tl.arange(0, BC)
    G: tl.constexpr = BC // CG
    at = image * (HW * C) + tl.arange(0, BP)[:, None] * C + co[None, :]
    pixel = tl.arange(0, BP)[:, None]

    x = tl.load(x_ptr + at, mask=pixel < HW, other=0.0).to(tl.float32)
    total = tl.sum(x, 0)
    for p in tl.range(BP, HW, BP):
        total += tl.sum(tl.load(x_ptr + p * C + at, mask=pixel + p < HW, other=0.0).to(tl.float32), 0)
    mean = tl.sum(tl.reshape(total, (G, CG)), 1) / (HW * CG)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (G, CG)), (1, BC))
    deviation = centred(x, mean, pixel < HW)
    total = tl.sum(deviation * deviation, 0)
    for p in tl.range(BP, HW, BP):
        more = centred(tl.load(x_ptr + p * C + at, mask=pixel + p < HW, other=0.0).to(tl.float32), mean, pixel + p < HW)
        total += tl.sum(more * more, 0)
    rstd = tl.rsqrt(tl.sum(tl.reshape(total, (G, CG)), 1) / (HW * CG) + EPS)
    mul = tl.load(gamma_ptr + co)[None, :] * tl.reshape(tl.broadcast_to(rstd[:, None], (G, CG)), (1, BC))
    add = tl.load(beta_ptr + co)[None, :]
    if style_ptr is not None:
        row = image
        if which_ptr is not None:
            row = tl.load(which_ptr + image)
        scale = 1.0 + tl.load(style_ptr + row * style_stride + co)[None, :].to(tl.float32)
        mul = mul * scale
        add = add * scale + tl.load(style_ptr + row * style_stride + C + co)[None, :].to(tl.float32)
    tl.store(y_ptr + at, finished(deviation, mul, add, inverse_ptr, SILU, PTX).to(y_ptr.dtype.element_ty), mask=pixel < HW)
    for p in tl.range(BP, HW, BP):
        more = tl.load(x_ptr + p * C + at, mask=pixel + p < HW, other=0.0).to(tl.float32) - mean
        tl.store(y_ptr + p * C + at, finished(more, mul, add, inverse_ptr, SILU, PTX).to(y_ptr.dtype.element_ty), mask=pixel + p < HW)


@triton.jit
def finished(deviation, mul, add, inverse_ptr, SILU: tl.constexpr, PTX: tl.constexpr):
    out = deviation * mul + add
    if SILU:
        out = silu_of(out, PTX)
    if inverse_ptr is not None:
        out = tl.clamp(out * tl.load(inverse_ptr), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return out


def channels_of(pixels: int, channels: int, size: int) -> int | None:
    """Channels of a program: a power of two that divides all, whole groups of `size`, at least 16 bytes of fp16; None where there is none."""
    most = channels & -channels
    if size & (size - 1) or size > most or most < 8:
        return None
    least = max(size, 8)
    while most > least and pixels * most > HELD:
        most //= 2
    return most


def fits(channels: int, groups: int) -> str | None:
    """Why images of so many channels are not computed here, or None."""
    if channels % groups or channels_of(1, channels, channels // groups) is None:
        return f"{groups} groups of {channels} channels: a group must have 1, 2, 4, ... channels, and their number must be a multiple of 8"
    return None


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
    """y, of x's shape and dtype, fp32, fp16 or bf16, or e4m3 with inverse: see reference.group_norm_silu. Contiguous.

    which: in range (not checked: that would wait for the device).
    """
    n, height, width, channels = x.shape
    reason = fits(channels, groups)
    assert reason is None, reason
    check("x", x, tuple(x.shape), (torch.float32, torch.float16, torch.bfloat16), x.device)
    for name, v in (("gamma", gamma), ("beta", beta)):
        check(name, v, (channels,), (torch.float32,), x.device)
    if style is not None:
        assert style.ndim == 2 and style.shape[1] == 2 * channels and style.stride(1) == 1 and style.device == x.device, (
            f"style must be [rows, {2 * channels}] with neighbouring columns on {x.device}, not {list(style.shape)} on {style.device}"
        )
        assert which is not None or len(style) == n, f"style has {len(style)} rows for {n} images; give which"
    if which is not None:
        check("which", which, (n,), (torch.int64,), x.device)
    if inverse is not None:
        check("inverse", inverse, (1,), (torch.float32,), x.device, aligned=4)
    y = torch.empty_like(x, dtype=x.dtype if inverse is None else torch.float8_e4m3fn)
    if x.numel():
        pixels, size = height * width, channels // groups
        mine = channels_of(pixels, channels, size)
        at_once = min(triton.next_power_of_2(pixels), max(HELD // mine, 1))
        with torch.cuda.device_of(x):
            group_norm_silu_kernel[(n * (channels // mine),)](
                y, x, gamma, beta, style, which, 0 if style is None else style.stride(0), inverse,
                HW=pixels, C=channels, BC=mine, BP=at_once, CG=size, EPS=eps, SILU=silu, PTX=fast(x.device, x.dtype),
                num_warps=max(4, min(16, at_once * mine // 1024)), enable_fp_fusion=True,
            )  # fmt: skip
    return y

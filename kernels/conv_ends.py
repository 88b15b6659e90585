"""The first and the last convolution, between images of a few channels, channels first, and the network's many, channels last.

    conv_in:   y = conv(pixel_unshuffle(x, patch), weight) + bias, and its norms as conv.py has them
    conv_out:  pixel_shuffle(conv(x, weight) + bias, patch)

Three channels are no box of a tensor descriptor, and would leave most of a step of the matrix unit empty if each of nine taps were one. So conv_in
gathers all taps of a pixel into one column, and conv_out has pixels as the rows of its product and the few channels as its columns. Folding and
unfolding are where they read and write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .conv import (
    check,
    chunk,
    coefficients,
    fast,
    fits,
    group_sum,
    images,
    kinds,
    of_group,
    prepared,
    processors,
    result,
    store,
    tap_tile,
    tile,
)


@triton.jit(do_not_specialize=["n"])
def conv_in_kernel(
    raw_desc, out_desc, out2_desc, x_ptr, w_ptr, bias_ptr, gamma_ptr, beta_ptr, gamma2_ptr, beta2_ptr, inverse_ptr, n,
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, F: tl.constexpr, PATCH: tl.constexpr, CO: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, G: tl.constexpr, EPS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x_ptr: [N, F / PATCH^2, H PATCH, W PATCH]. w_ptr: [CO, 9 F]. Results in boxes of [NI, H, W, BM]."""
    program = tl.program_id(0)
    n0 = program // (CO // BM) * NI
    m0 = program % (CO // BM) * BM
    HW: tl.constexpr = H * W
    AREA: tl.constexpr = PATCH * PATCH
    co = m0 + tl.arange(0, BM)
    pixel = tl.arange(0, NI * HW)[None, :]
    image = pixel // HW
    row = pixel % HW // W
    column = pixel % W
    x_ptr += n0.to(tl.int64) * (F * HW)
    acc = tl.zeros((BM, NI * HW), tl.float32)
    for k0 in tl.range(0, 9 * F, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        tap = k // F
        f = k % F
        y = row + (tap // 3 - 1)[:, None]
        x = column + (tap % 3 - 1)[:, None]
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (k < 9 * F)[:, None] & (image < n - n0)
        # Channel f of a folded image: channel f / AREA, row f % AREA / PATCH and column f % PATCH of its patch.
        at = image * (F * HW) + (f // AREA * (HW * AREA))[:, None]
        at += (y * PATCH + (f % AREA // PATCH)[:, None]) * (W * PATCH) + x * PATCH + (f % PATCH)[:, None]
        taps = tl.load(x_ptr + at, mask=inside, other=0.0)
        w = tl.load(w_ptr + co[:, None] * (9 * F) + k[None, :], mask=(k < 9 * F)[None, :], other=0.0)
        acc = tl.dot(w, taps, acc)

    y = tl.reshape(acc, (BM, NI, HW)) + tl.load(bias_ptr + co)[:, None, None]
    if raw_desc is not None:
        store(raw_desc, y, n0, m0, H, W)
    if out_desc is not None:
        y -= of_group(group_sum(y, G) / (HW * (BM // G)), BM)[:, :, None]
        y *= of_group(tl.rsqrt(group_sum(y * y, G) / (HW * (BM // G)) + EPS), BM)[:, :, None]
        mul, add = coefficients(gamma_ptr, beta_ptr, None, None, 0, co, None, CO)
        store(out_desc, result(y, mul, add, inverse_ptr, PTX), n0, m0, H, W)
        if out2_desc is not None:
            mul, add = coefficients(gamma2_ptr, beta2_ptr, None, None, 0, co, None, CO)
            store(out2_desc, result(y, mul, add, None if inverse_ptr is None else inverse_ptr + 1, PTX), n0, m0, H, W)


@triton.jit(do_not_specialize=["n"])
def conv_out_kernel(
    y_ptr, x_desc, w_desc, bias_ptr, n,
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, C: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, PATCH: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x_desc: [N, H, W, C] in boxes of [NI, H, W, BK]. w_desc: [F, 9 C] in boxes of [BF, BK], BF >= F. y_ptr: [N, F / PATCH^2, H PATCH, W PATCH]."""
    n0 = tl.program_id(0) * NI
    HW: tl.constexpr = H * W
    AREA: tl.constexpr = PATCH * PATCH
    acc = tl.zeros((NI * HW, BF), tl.float32)
    for k in tl.range(0, 9 * (C // BK), num_stages=STAGES):
        tap = k // (C // BK)
        c = k % (C // BK) * BK
        pixels = tl.trans(tap_tile(x_desc, n0, tap, c, H, W, NI, C, BK, False))
        acc = tl.dot(pixels, tl.trans(w_desc.load([0, tap * C + c])), acc)
    f = tl.arange(0, BF)[None, :]
    acc += tl.load(bias_ptr + f, mask=f < F, other=0.0)
    pixel = tl.arange(0, NI * HW)[:, None]
    at = pixel // HW * (F * HW) + f // AREA * (HW * AREA)
    at += (pixel % HW // W * PATCH + f % AREA // PATCH) * (W * PATCH) + pixel % W * PATCH + f % PATCH
    written = (f < F) & (pixel // HW < n - n0)
    tl.store(y_ptr + n0.to(tl.int64) * (F * HW) + at, acc.to(y_ptr.dtype.element_ty), mask=written)


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
    pixels: int | None = None,
    stages: int | None = None,
) -> list[Tensor]:
    """y and its results, [N, H / patch, W / patch, C']: see reference.conv_in. Contiguous, bf16 or fp16. pixels, stages: of a program, see `tile`."""
    n, channels, height, width = x.shape
    c_out, device = weight.shape[0], x.device
    assert height % patch == width % patch == 0, f"images of {height} x {width} pixels cannot be folded {patch} x {patch}"
    height, width, folded = height // patch, width // patch, channels * patch**2
    reason = fits(height, width, c_out, groups if norms else None)
    assert reason is None, reason
    check("x", x, (n, channels, height * patch, width * patch), kinds(device), device)
    check("weight", weight, (c_out, 3, 3, folded), (x.dtype,), device)
    check("bias", bias, (1, c_out), (torch.float32,), device)
    y, (out, out2), (gamma, beta, gamma2, beta2) = prepared(norms, inverse, c_out, (n, height, width, c_out), x.dtype, raw, x)
    if n:
        plan = tile(n, height, width, c_out, processors(device), pixels, stages)
        box = [plan["NI"], height, width, plan["BM"]]
        with torch.cuda.device_of(x):
            conv_in_kernel[(triton.cdiv(n, plan["NI"]) * (c_out // plan["BM"]),)](
                *(None if v is None else images(v, box) for v in (y, out, out2)), x, weight, bias, gamma, beta, gamma2, beta2, inverse, n,
                H=height, W=width, F=folded, PATCH=patch, CO=c_out, BK=64 if folded > 7 else 16, G=max(groups * plan["BM"] // c_out, 1), EPS=eps,
                PTX=fast(device, x.dtype), **plan,
            )  # fmt: skip
    return [v for v in (y, out, out2) if v is not None]


def fits_out(height: int, width: int, c_out: int, channels: int) -> str | None:
    """Why conv_out with so many channels of folded images, columns of its product, is not computed here, or None."""
    if c_out > 64:
        return f"{channels} channels to {c_out}: the last convolution makes at most 64"
    return fits(height, width, 64, None, channels)


def conv_out(x: Tensor, weight: Tensor, bias: Tensor, patch: int, pixels: int | None = None, stages: int | None = None) -> Tensor:
    """[N, C', H patch, W patch]: see reference.conv_out. Contiguous, bf16 or fp16. pixels, stages: of a program, see `tile`."""
    n, height, width, channels = x.shape
    folded, device = weight.shape[0], x.device
    reason = fits_out(height, width, folded, channels)
    assert reason is None, reason
    assert folded % patch**2 == 0, f"{folded} channels must be a multiple of {patch**2}"
    check("x", x, (n, height, width, channels), kinds(device), device)
    check("weight", weight, (folded, 3, 3, channels), (x.dtype,), device)
    check("bias", bias, (folded,), (torch.float32,), device)
    y = x.new_empty(n, folded // patch**2, height * patch, width * patch)
    if n:
        plan = tile(n, height, width, 64, processors(device), pixels, stages)
        wide, k = max(16, triton.next_power_of_2(folded)), chunk(x)
        with torch.cuda.device_of(x):
            conv_out_kernel[(triton.cdiv(n, plan["NI"]),)](
                y, images(x, [plan["NI"], height, width, k]), TensorDescriptor.from_tensor(weight.view(folded, -1), [wide, k]), bias, n,
                H=height, W=width, NI=plan["NI"], C=channels, F=folded, BF=wide, PATCH=patch, BK=k, STAGES=plan["STAGES"],
                num_warps=plan["num_warps"], enable_fp_fusion=True,
            )  # fmt: skip
    return y

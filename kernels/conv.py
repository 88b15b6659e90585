"""Convolution of small images with all that stands around it in its epilogue: a residual block is two launches.

    y = scale conv(x, weight) + bias + skip               conv3x3; skip as it is, or through a convolution of one pixel
    y = conv_transpose(x, weight) + bias                  conv_up: pixels repeated 2 x 2 times, then 3 x 3
    out_i = silu((norm(y) gamma_i + beta_i) (1 + s) + t)

A program owns whole images and BM output channels, so the norm's statistics never leave it: one read, one write. Output channels are the rows of
the product and pixels its columns, so both operands reach the matrix unit from shared memory and 64 channels fill it. Images come and go through
tensor descriptors, whose boxes may begin before an image, where they read the zeros around it, and end behind the last one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .philox import ptx

# Pixels of a program, the most first: fewer where a batch would leave processors without a program. For each and for 64 or 128 output channels:
# warps and stages. By registers (no spills with three results, triton 3.6, 3.7 and 3.9 for sm_90 and sm_100) and shared memory; not timed yet.
TILES = {(64, 256): (8, 2), (64, 128): (4, 3), (64, 64): (4, 3), (128, 256): (8, 3), (128, 128): (8, 3), (128, 64): (4, 3)}
PIXELS = (256, 128, 64)


@triton.jit
def silu_of(v, PTX: tl.constexpr):
    """v sigmoid(v); with PTX within 2^-12 |v| of it, enough for bf16."""
    if PTX:
        # = h tanh(h) + h with h = v / 2: one instruction of the special function unit rather than two.
        h = v * 0.5
        return h * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [h], tl.float32, True, 1) + h
    else:
        return v * tl.sigmoid(v)


@triton.jit
def group_sum(v, G: tl.constexpr):
    """[BM, NI, HW] -> [G, NI]: sums over an image's pixels and the neighbouring channels of a group."""
    return tl.sum(tl.reshape(tl.sum(v, 2), (G, v.shape[0] // G, v.shape[1])), 1)


@triton.jit
def of_group(v, BM: tl.constexpr):
    """[G, NI] -> [BM, NI]: each channel its group's value."""
    G: tl.constexpr = v.shape[0]
    NI: tl.constexpr = v.shape[1]
    return tl.reshape(tl.broadcast_to(v[:, None, :], (G, BM // G, NI)), (BM, NI))


@triton.jit
def store(desc, v, n0, c0, H: tl.constexpr, W: tl.constexpr):
    """v [channels, NI, H W], to channels-last memory."""
    tile = tl.trans(tl.reshape(v, (v.shape[0], v.shape[1] * H * W)).to(desc.dtype))
    desc.store([n0, 0, 0, c0], tl.reshape(tile, (v.shape[1], H, W, v.shape[0])))


@triton.jit
def coefficients(gamma_ptr, beta_ptr, style_ptr, which_ptr, style_stride, co, image, CO: tl.constexpr):
    """What a normalised value is multiplied by, and what is then added, [BM, 1], or [BM, NI] with a style."""
    mul = tl.load(gamma_ptr + co)[:, None]
    add = tl.load(beta_ptr + co)[:, None]
    if style_ptr is not None:
        row = image.to(tl.int64)
        if which_ptr is not None:
            row = tl.load(which_ptr + image)
        at = style_ptr + row[None, :] * style_stride + co[:, None]
        scale = tl.load(at).to(tl.float32) + 1.0
        mul = mul * scale
        add = add * scale + tl.load(at + CO).to(tl.float32)
    return mul, add


@triton.jit
def result(y, mul, add, inverse_ptr, PTX: tl.constexpr):
    """silu(y mul + add), times inverse where the result is e4m3."""
    out = silu_of(y * mul[:, :, None] + add[:, :, None], PTX)
    if inverse_ptr is not None:
        out = tl.clamp(out * tl.load(inverse_ptr), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return out


@triton.jit
def tap_tile(desc, n0, tap, c, H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HALVED: tl.constexpr):
    """BK channels from c of the pixels that one of the nine taps sees, [BK, NI H W]. HALVED: desc is [N, H, 2, W, 2 C], of an image twice as large."""
    y = tap // 3 - 1
    x = tap % 3 - 1
    if HALVED:
        tile = desc.load([n0, y >> 1, y & 1, x >> 1, (x & 1) * C + c])
    else:
        tile = desc.load([n0, y, x, c])
    return tl.trans(tl.reshape(tile, (NI * H * W, BK)))


@triton.jit(do_not_specialize=["n"])
def conv3x3_kernel(
    raw_desc, out_desc, out2_desc, x_desc, x2_desc, w_desc, scale_ptr, bias_ptr, skip_desc, skip2_desc, sw_desc,
    gamma_ptr, beta_ptr, gamma2_ptr, beta2_ptr, style_ptr, which_ptr, style_stride, inverse_ptr, n,
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, S: tl.constexpr, S2: tl.constexpr, CO: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, G: tl.constexpr, EPS: tl.constexpr, HALVED: tl.constexpr, EACH: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x_desc, x2_desc: images of C and C2 channels in boxes of [NI, H, W, BK]; w_desc: [CO, 9 (C + C2)] in boxes of [BM, BK]. skip_desc: in boxes of
    [NI, H, W, BM], or, with sw_desc, it and skip2_desc in boxes of BS of S and S2 channels. G: groups among BM channels. EACH: a bias for each image.
    What is None is left out."""
    program = tl.program_id(0)
    n0 = program // (CO // BM) * NI
    m0 = program % (CO // BM) * BM
    HW: tl.constexpr = H * W
    co = m0 + tl.arange(0, BM)
    image = tl.minimum(n0 + tl.arange(0, NI), n - 1)

    acc = tl.zeros((BM, NI * HW), tl.float32)
    if skip_desc is not None and sw_desc is None:
        # The sum begins with it: added at the end, it would have to be held beside the sum, and registers spill.
        acc = tl.trans(tl.reshape(skip_desc.load([n0, 0, 0, m0]), (NI * HW, BM))).to(tl.float32)
        if scale_ptr is not None:
            acc = acc / tl.load(scale_ptr + co)[:, None]
    for k in tl.range(0, 9 * (C // BK), num_stages=STAGES):
        tap = k // (C // BK)
        c = k % (C // BK) * BK
        acc = tl.dot(w_desc.load([m0, tap * (C + C2) + c]), tap_tile(x_desc, n0, tap, c, H, W, NI, C, BK, HALVED), acc)
    if x2_desc is not None:
        for k in tl.range(0, 9 * (C2 // BK), num_stages=STAGES):
            tap = k // (C2 // BK)
            c = k % (C2 // BK) * BK
            acc = tl.dot(w_desc.load([m0, tap * (C + C2) + C + c]), tap_tile(x2_desc, n0, tap, c, H, W, NI, C2, BK, HALVED), acc)
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + co)[:, None]
    if sw_desc is not None:
        # The fifth of nine taps is the pixel itself.
        for k in tl.range(0, S // BS, num_stages=STAGES):
            acc = tl.dot(sw_desc.load([m0, k * BS]), tap_tile(skip_desc, n0, 4, k * BS, H, W, NI, S, BS, False), acc)
        if skip2_desc is not None:
            for k in tl.range(0, S2 // BS, num_stages=STAGES):
                acc = tl.dot(sw_desc.load([m0, S + k * BS]), tap_tile(skip2_desc, n0, 4, k * BS, H, W, NI, S2, BS, False), acc)

    y = tl.reshape(acc, (BM, NI, HW))
    if EACH:
        y += tl.load(bias_ptr + image[None, :].to(tl.int64) * CO + co[:, None])[:, :, None]
    else:
        y += tl.load(bias_ptr + co)[:, None, None]
    if raw_desc is not None:
        store(raw_desc, y, n0, m0, H, W)
    if out_desc is not None:
        # In the place of y: no more registers, and none of the cancellation of a mean of squares.
        y -= of_group(group_sum(y, G) / (HW * (BM // G)), BM)[:, :, None]
        y *= of_group(tl.rsqrt(group_sum(y * y, G) / (HW * (BM // G)) + EPS), BM)[:, :, None]
        mul, add = coefficients(gamma_ptr, beta_ptr, style_ptr, which_ptr, style_stride, co, image, CO)
        store(out_desc, result(y, mul, add, inverse_ptr, PTX), n0, m0, H, W)
        if out2_desc is not None:
            mul, add = coefficients(gamma2_ptr, beta2_ptr, None, None, 0, co, image, CO)
            store(out2_desc, result(y, mul, add, None if inverse_ptr is None else inverse_ptr + 1, PTX), n0, m0, H, W)


@triton.jit
def phase_of(
    x_desc, w_desc, n0, m0, PY: tl.constexpr, PX: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pixels (2 i + PY, 2 j + PX) of the doubled images, [BM, NI, H W]: sums of the four of sixteen taps that reach them."""
    acc = tl.zeros((BM, NI * H * W), tl.float32)
    for k in tl.range(0, 4 * (C // BK), num_stages=STAGES):
        y = k // (2 * (C // BK))
        x = k // (C // BK) % 2
        c = k % (C // BK) * BK
        tile = tl.reshape(x_desc.load([n0, y + PY - 1, x + PX - 1, c]), (NI * H * W, BK))
        tap = (3 - PY - 2 * y) * 4 + 3 - PX - 2 * x
        acc = tl.dot(w_desc.load([m0, tap * C + c]), tl.trans(tile), acc)
    return tl.reshape(acc, (BM, NI, H * W))


@triton.jit
def store_phase(ptr, at, v, written):
    """v [channels, NI, H W] to every other pixel of every other row, at [NI H W, channels]."""
    tile = tl.trans(tl.reshape(v, (v.shape[0], v.shape[1] * v.shape[2])).to(ptr.dtype.element_ty))
    tl.store(ptr + at, tile, mask=written)


@triton.jit
def store_phases(ptr, at, below, y00, y01, y10, y11, mul, add, inverse_ptr, written, CO: tl.constexpr, PTX: tl.constexpr):
    """The four phases of a result; of y itself where mul is None."""
    store_phase(ptr, at, y00 if mul is None else result(y00, mul, add, inverse_ptr, PTX), written)
    store_phase(ptr, at + CO, y01 if mul is None else result(y01, mul, add, inverse_ptr, PTX), written)
    store_phase(ptr, at + below, y10 if mul is None else result(y10, mul, add, inverse_ptr, PTX), written)
    store_phase(ptr, at + below + CO, y11 if mul is None else result(y11, mul, add, inverse_ptr, PTX), written)


@triton.jit(do_not_specialize=["n"])
def conv_up_kernel(
    raw_ptr, out_ptr, out2_ptr, x_desc, w_desc, bias_ptr, gamma_ptr, beta_ptr, gamma2_ptr, beta2_ptr, inverse_ptr, n,
    H: tl.constexpr, W: tl.constexpr, NI: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    EPS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """x_desc: [N, H, W, C] in boxes of [NI, H, W, BK]. w_desc: [CO, 16 C] in boxes of [BM, BK]. Results: [N, 2 H, 2 W, CO]."""
    program = tl.program_id(0)
    n0 = program // (CO // BM) * NI
    m0 = program % (CO // BM) * BM
    HW: tl.constexpr = H * W
    co = m0 + tl.arange(0, BM)
    image = tl.minimum(n0 + tl.arange(0, NI), n - 1)
    bias = tl.load(bias_ptr + co)[:, None, None]
    y00 = phase_of(x_desc, w_desc, n0, m0, 0, 0, H, W, NI, C, BM, BK, STAGES) + bias
    y01 = phase_of(x_desc, w_desc, n0, m0, 0, 1, H, W, NI, C, BM, BK, STAGES) + bias
    y10 = phase_of(x_desc, w_desc, n0, m0, 1, 0, H, W, NI, C, BM, BK, STAGES) + bias
    y11 = phase_of(x_desc, w_desc, n0, m0, 1, 1, H, W, NI, C, BM, BK, STAGES) + bias

    pixel = tl.arange(0, NI * HW)
    written = (pixel // HW < n - n0)[:, None]
    first = n0.to(tl.int64) * (4 * HW * CO)
    at = (pixel // HW * (4 * HW) + pixel % HW // W * (4 * W) + pixel % W * 2)[:, None] * CO + co[None, :]
    below: tl.constexpr = 2 * W * CO
    if raw_ptr is not None:
        store_phases(raw_ptr + first, at, below, y00, y01, y10, y11, None, None, None, written, CO, PTX)
    if out_ptr is not None:
        number: tl.constexpr = 4 * HW * (BM // G)
        mean = of_group((group_sum(y00, G) + group_sum(y01, G) + group_sum(y10, G) + group_sum(y11, G)) / number, BM)[:, :, None]
        y00 -= mean
        y01 -= mean
        y10 -= mean
        y11 -= mean
        square = group_sum(y00 * y00, G) + group_sum(y01 * y01, G) + group_sum(y10 * y10, G) + group_sum(y11 * y11, G)
        rstd = of_group(tl.rsqrt(square / number + EPS), BM)[:, :, None]
        y00 *= rstd
        y01 *= rstd
        y10 *= rstd
        y11 *= rstd
        mul, add = coefficients(gamma_ptr, beta_ptr, None, None, 0, co, image, CO)
        store_phases(out_ptr + first, at, below, y00, y01, y10, y11, mul, add, inverse_ptr, written, CO, PTX)
        if out2_ptr is not None:
            mul, add = coefficients(gamma2_ptr, beta2_ptr, None, None, 0, co, image, CO)
            other = None if inverse_ptr is None else inverse_ptr + 1
            store_phases(out2_ptr + first, at, below, y00, y01, y10, y11, mul, add, other, written, CO, PTX)


def tile(
    n: int, height: int, width: int, c_out: int, processors: int, pixels: int | None = None, stages: int | None = None
) -> dict[str, int]:
    """NI, BM, STAGES and options for n images whose programs own `pixels` pixels, by default as many as leave every processor a program."""
    m = 128 if c_out % 128 == 0 else 64
    sizes = [size for size in PIXELS if size >= height * width]
    if pixels is None:
        pixels = next((size for size in sizes if n * height * width // size * (c_out // m) >= processors), sizes[-1])
    warps, usual = TILES[m, pixels]
    return {
        "NI": pixels // (height * width),
        "BM": m,
        "STAGES": usual if stages is None else stages,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def chunk(*tensors: Tensor) -> int:
    """Channels in a step of the sum: 128 bytes of them, or as many as divide all."""
    size = 128 // tensors[0].element_size()
    while any(t.shape[-1] % size for t in tensors):
        size //= 2
    return size


def fits(height: int, width: int, c_out: int, groups: int | None, *channels: int) -> str | None:
    """Why images of results of that size, with such channels, are not computed here, or None. groups: of c_out, None without norms."""
    if height * width > PIXELS[0] or any(side < 1 or side & (side - 1) for side in (height, width)):
        return f"images of {height} x {width} pixels: sides must be powers of two, with at most {PIXELS[0]} pixels"
    if c_out % 64 or any(c % 32 for c in channels):
        return f"{' + '.join(map(str, channels))} channels to {c_out}: these must be multiples of 32, and that of 64"
    size = c_out // groups if groups else 1
    if groups and (c_out % groups or size & (size - 1) or size > 64):
        return f"{groups} groups of {c_out} channels: a group must have 1, 2, 4, ... 64 of them"
    return None


def images(v: Tensor, box: list[int]) -> TensorDescriptor:
    """v [N, H, W, C] in boxes, or, with a box of five numbers, as [N, H / 2, 2, W / 2, 2 C]."""
    if len(box) == 5:
        n, height, width, channels = v.shape
        v = v.view(n, height // 2, 2, width // 2, 2 * channels)
    # Where a side is 1, a contiguous tensor may have any stride.
    return TensorDescriptor.from_tensor(v.reshape(-1).view(v.shape), box)


def check(name: str, v: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, aligned: int = 16) -> None:
    """Assert what a kernel relies on. aligned: to so many bytes; what is read a number at a time may stand anywhere."""
    assert v.shape == shape and v.dtype in dtypes and v.is_contiguous() and v.device == device and v.data_ptr() % aligned == 0, (
        f"{name} must be contiguous and aligned to {aligned} bytes, {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)} "
        f"on {device}, not {v.dtype} {list(v.shape)} on {v.device}"
    )


def kinds(device: torch.device) -> tuple[torch.dtype, ...]:
    """Types that are computed with: 16 bits on a GPU, whose fp32 products would be TF32; in the interpreter what it has."""
    return (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.float16)


def prepared(
    norms: list[Tensor], inverse: Tensor | None, c_out: int, shape: tuple[int, ...], dtype: torch.dtype, raw: bool, like: Tensor
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """y, two results and four coefficients, as far as they are wanted."""
    assert len(norms) in (0, 2, 4) and (raw or norms), (
        "norms must hold gamma and beta of up to two results, and something must be asked for"
    )
    for v in norms:
        check("each of norms", v, (c_out,), (torch.float32,), like.device)
    if inverse is not None:
        check("inverse", inverse, (len(norms) // 2,), (torch.float32,), like.device, aligned=4)
    y = like.new_empty(shape, dtype=dtype) if raw else None
    results: list[Tensor | None] = [
        like.new_empty(shape, dtype=dtype if inverse is None else torch.float8_e4m3fn) if i < len(norms) // 2 else None for i in range(2)
    ]
    return y, results, [*norms, *[None] * (4 - len(norms))]


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    pixels: int | None = None,
    stages: int | None = None,
) -> list[Tensor]:
    """y and its results, [N, H / stride, W / stride, C']: see reference.conv3x3. Contiguous, bf16 or fp16, x and weight also both e4m3.

    which: in range (not checked: that would wait for the device). pixels, stages: of a program, see `tile`.
    """
    n, height, width, _ = x[0].shape
    c_out, device = weight.shape[0], x[0].device
    channels, skips = [v.shape[-1] for v in x], [v.shape[-1] for v in skip] if skip_weight is not None else []
    fp8 = x[0].dtype == torch.float8_e4m3fn
    assert len(x) in (1, 2) and len(skip) <= (2 if skip_weight is not None else 1), "x must hold one or two inputs, skip up to two"
    assert stride == 1 or (stride == 2 and height % 2 == width % 2 == 0 and not skip), (
        "stride must be 1, or 2 for even sides and without skip"
    )
    height, width = height // stride, width // stride
    reason = fits(height, width, c_out, groups if norms else None, *channels, *skips)
    assert reason is None, reason
    for v in x:
        check("each of x", v, (n, height * stride, width * stride, v.shape[-1]), (torch.float8_e4m3fn,) if fp8 else kinds(device), device)
    check("weight", weight, (c_out, 3, 3, sum(channels)), (x[0].dtype,), device)
    wide = next((v.dtype for v in (skip_weight, *skip) if v is not None), torch.bfloat16 if fp8 else weight.dtype)
    for v in skip:
        check("each of skip", v, (n, height, width, v.shape[-1] if skips else c_out), (wide,), device)
    if skip_weight is not None:
        check("skip_weight", skip_weight, (c_out, sum(skips)), (wide,), device)
    each = len(bias) != 1
    check("bias", bias, (n if each else 1, c_out), (torch.float32,), device)
    assert (scale is not None) == fp8, "scale goes with e4m3, and e4m3 with scale"
    if scale is not None:
        check("scale", scale, (c_out,), (torch.float32,), device)
    if style is not None:
        assert style.ndim == 2 and style.shape[1] == 2 * c_out and style.stride(1) == 1 and style.device == device, (
            f"style must be [rows, {2 * c_out}] with neighbouring columns on {device}, not {list(style.shape)} on {style.device}"
        )
        assert which is not None or len(style) == n, f"style has {len(style)} rows for {n} images; give which"
    if which is not None:
        check("which", which, (n,), (torch.int64,), device)
    y, (out, out2), (gamma, beta, gamma2, beta2) = prepared(norms, inverse, c_out, (n, height, width, c_out), wide, raw, x[0])
    if n:
        plan = tile(n, height, width, c_out, processors(device), pixels, stages)
        # At least two steps through a shortcut: a loop of one is folded, and then its product has another layout and waits for its loads.
        ni, m, k, s = plan["NI"], plan["BM"], chunk(*x), min(chunk(*skip), min(skips) // 2) if skips else 16
        box, seen = [ni, height, width], [ni, height, width] if stride == 1 else [ni, height, 1, width]
        written = [None if v is None else images(v, [*box, m]) for v in (y, out, out2)]
        read = [images(v, [*seen, k]) for v in x]
        added = [images(v, [*box, s if skips else m]) for v in skip]
        grid = (triton.cdiv(n, ni) * (c_out // m),)
        with torch.cuda.device_of(x[0]):
            conv3x3_kernel[grid](
                *written, *read, *[None] * (2 - len(x)), TensorDescriptor.from_tensor(weight.view(c_out, -1), [m, k]), scale, bias,
                *added, *[None] * (2 - len(skip)), None if skip_weight is None else TensorDescriptor.from_tensor(skip_weight, [m, s]),
                gamma, beta, gamma2, beta2, style, which, 0 if style is None else style.stride(0), inverse, n,
                H=height, W=width, C=channels[0], C2=sum(channels[1:]), S=sum(skips[:1]), S2=sum(skips[1:]), CO=c_out, BK=k, BS=s,
                G=max(groups * m // c_out, 1), EPS=eps, HALVED=stride == 2, EACH=each, PTX=fast(device, wide), **plan,
            )  # fmt: skip
    return [v for v in (y, out, out2) if v is not None]


def fast(device: torch.device, dtype: torch.dtype) -> int:
    """The PTX constexpr: the short SiLU only where the result is no finer."""
    return ptx(device) if dtype == torch.bfloat16 else 0


def conv_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norms: list[Tensor],
    inverse: Tensor | None,
    groups: int,
    eps: float,
    raw: bool,
    pixels: int | None = None,
    stages: int | None = None,
) -> list[Tensor]:
    """y and its results, [N, 2 H, 2 W, C']: see reference.conv_up. Contiguous, bf16 or fp16. pixels, stages: of a program, see `tile`."""
    n, height, width, channels = x.shape
    c_out, device = weight.shape[0], x.device
    reason = fits(2 * height, 2 * width, c_out, groups if norms else None, channels)
    assert reason is None, reason
    check("x", x, (n, height, width, channels), kinds(device), device)
    check("weight", weight, (c_out, 4, 4, channels), (x.dtype,), device)
    check("bias", bias, (1, c_out), (torch.float32,), device)
    y, (out, out2), (gamma, beta, gamma2, beta2) = prepared(norms, inverse, c_out, (n, 2 * height, 2 * width, c_out), x.dtype, raw, x)
    if n:
        plan = tile(n, 2 * height, 2 * width, c_out, processors(device), pixels, stages)
        m, k = plan["BM"], chunk(x)
        with torch.cuda.device_of(x):
            conv_up_kernel[(triton.cdiv(n, plan["NI"]) * (c_out // m),)](
                y, out, out2, images(x, [plan["NI"], height, width, k]), TensorDescriptor.from_tensor(weight.view(c_out, -1), [m, k]),
                bias, gamma, beta, gamma2, beta2, inverse, n,
                H=height, W=width, C=channels, CO=c_out, BK=k, G=max(groups * m // c_out, 1), EPS=eps, PTX=fast(device, x.dtype), **plan,
            )  # fmt: skip
    return [v for v in (y, out, out2) if v is not None]

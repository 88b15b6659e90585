"""One row of a solver for the whole batch, in place: guidance, x0, clamp, update, noise, history and the next model input, one launch.

    m  = m_u + w (m_c - m_u)                    where m holds two halves, conditional first
    x0_new = clamp(px x + pm m, -clip, clip)
    x_new = a x + b x0_new + c x0 + d m + sum_k h_k history_k + s exp(log_s v) z
    history_slot <- save_x x + save_x0 x0_new   unless slot is -1
    x <- x_new;  x0 <- x0_new;  model_input <- c_next x_new

The columns of table[row] are reference.COLUMNS. All of it, the row too, is read from device memory: one captured launch serves every row.
v is the second half of m's channels, else 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import BLOCK, check, grid, ptx, quad_normals, spread, tile


@triton.jit
def clamp(v, limit, PTX: tl.constexpr):
    """v within [-limit, limit]; NaN stays NaN."""
    if PTX >= 86:
        # One instruction for two. Triton makes it of tl.clamp too, but only for a limit it knows at compile time.
        return tl.inline_asm_elementwise("min.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [v, limit], tl.float32, True, 1)
    else:
        return tl.clamp(v, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp2(v, PTX: tl.constexpr):
    """2^v within 2^-22 of itself, subnormal results 0."""
    if PTX:
        # Subnormal results would take three instructions more.
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    else:
        return tl.exp2(v)


@triton.jit(do_not_specialize=["n"])
def solver_step_kernel(
    x_ptr, x0_ptr, m_ptr, model_input_ptr, history_ptr, table_ptr, row_ptr, seeds_ptr, ids_ptr, guidance_ptr, noise_ptr, n,
    NUMEL: tl.constexpr, GUIDED: tl.constexpr, PAIRED: tl.constexpr, HISTORY: tl.constexpr, VARIANCE: tl.constexpr, PTX: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """GUIDED: m holds two halves; PAIRED: model_input does. HISTORY: slots. VARIANCE: each sample of m is NUMEL of m, then NUMEL of v.
    noise_ptr None: the noise is made from seeds and ids."""
    sample, quad, at, step, readable, writable = tile(n, NUMEL, R, P)
    half = n.to(tl.int64) * NUMEL
    m_at, m_half = at, half
    if VARIANCE:
        m_at, m_half = at + spread(sample, R).to(tl.int64) * NUMEL, 2 * half
    x = tl.load(x_ptr + at + step, mask=readable)
    # Read once and never again: leave the cache to x, x0, the history and the model.
    m = tl.load(m_ptr + m_at + step, mask=readable, eviction_policy="evict_first").to(tl.float32)
    if GUIDED:
        unconditional = tl.load(m_ptr + m_half + m_at + step, mask=readable, eviction_policy="evict_first").to(tl.float32)
        m = unconditional + spread(tl.load(guidance_ptr + sample), R) * (m - unconditional)
    row = tl.load(row_ptr)
    coefficients = table_ptr + row * 16
    px = tl.load(coefficients)
    pm = tl.load(coefficients + 1)
    clip = tl.load(coefficients + 2)
    a = tl.load(coefficients + 3)
    b = tl.load(coefficients + 4)
    c = tl.load(coefficients + 5)
    d = tl.load(coefficients + 6)
    s = tl.load(coefficients + 7)
    c_next = tl.load(coefficients + 8)
    # Single-step solvers have c = 0: no traffic for the old x0, whatever is in it. A scalar c != 0 is a float to the interpreter.
    multistep = tl.broadcast_to(c, at.shape) != 0
    old = tl.load(x0_ptr + at + step, mask=writable & multistep, other=0.0)
    new = clamp(px * x + pm * m, clip, PTX)
    out = a * x + b * new + d * m + c * old
    if HISTORY:
        for k in tl.static_range(HISTORY):
            h = tl.load(coefficients + 9 + k)
            if h != 0:
                out += h * tl.load(history_ptr + k * half + at + step, mask=readable)
        # After the loads, for it may be a slot that this row reads: a thread loads what it stores.
        slot = tl.load(coefficients + 12)
        if slot >= 0:
            saved = tl.load(coefficients + 13) * x + tl.load(coefficients + 14) * new
            tl.store(history_ptr + slot.to(tl.int64) * half + at + step, saved, mask=writable)
    if s != 0:
        if noise_ptr is None:
            z = quad_normals(quad, sample, seeds_ptr, ids_ptr, row, s, PTX)
        else:
            z = s * tl.load(noise_ptr + at + step, mask=readable, eviction_policy="evict_first")
        if VARIANCE:
            v = tl.load(m_ptr + NUMEL + m_at + step, mask=readable, eviction_policy="evict_first").to(tl.float32)
            log2_s = tl.load(coefficients + 15) * 1.4426950408889634
            z *= exp2(log2_s * v, PTX)
        out += z
    tl.store(x_ptr + at + step, out, mask=writable)
    tl.store(x0_ptr + at + step, new, mask=writable)
    following = (c_next * out).to(model_input_ptr.dtype.element_ty)
    tl.store(model_input_ptr + at + step, following, mask=writable)
    if PAIRED:
        tl.store(model_input_ptr + half + at + step, following, mask=writable)


def solver_step(
    x: Tensor,
    x0: Tensor,
    m: Tensor,
    model_input: Tensor,
    history: Tensor,
    table: Tensor,
    row: Tensor,
    seeds: Tensor,
    ids: Tensor,
    guidance: Tensor,
    noise: Tensor | None = None,
) -> None:
    """One row, in place on x, x0, history and model_input.

    x, x0: fp32 [N, C, ...]. m, model_input: fp32, fp16 or bf16 [N, C, ...] or [2N, C, ...]; m may have 2C channels. history: fp32
    [3, N, C, ...] or [0, N, C, ...]. table: fp32 [rows, 16]. row: one int32 or int64, in range like the slots in the table (not
    checked: that would wait for the device). seeds, ids: int64 [N]. guidance: w, fp32 [N]. noise: z, fp32 of x's shape, or None for
    the noise stream. All contiguous, apart.
    """
    n, device = len(x), x.device
    channels, *rest = x.shape[1:]
    for name, v, shape in (
        ("x", x, x.shape),
        ("x0", x0, x.shape),
        ("history", history, (3 if len(history) else 0, *x.shape)),
        ("table", table, (len(table), 16)),
        ("guidance", guidance, (n,)),
        ("noise", x if noise is None else noise, x.shape),
    ):
        assert v.shape == shape and v.dtype == torch.float32 and v.is_contiguous() and v.device == device, (
            f"{name} must be contiguous fp32 {list(shape)} on {device}, not {v.dtype} {list(v.shape)} on {v.device}"
        )
    for name, v, widths in (("m", m, (channels, 2 * channels)), ("model_input", model_input, (channels,))):
        assert v.shape in [(size, width, *rest) for size in (n, 2 * n) for width in widths] and v.is_contiguous() and v.device == device, (
            f"{name} must be contiguous, once or twice {n} of {' or '.join(map(str, widths))} channels of {rest} on {device}, "
            f"not {list(v.shape)} on {v.device}"
        )
        assert v.is_floating_point() and v.element_size() in (2, 4), f"{name} must be fp32, fp16 or bf16, not {v.dtype}"
    check(seeds, ids, row, n, device)
    if x.numel():
        numel = x[0].numel()
        with torch.cuda.device_of(x):
            solver_step_kernel[grid(n, numel)](
                x, x0, m, model_input, history, table, row, seeds, ids, guidance, noise, n,
                NUMEL=numel, GUIDED=len(m) != n, PAIRED=len(model_input) != n, HISTORY=len(history), VARIANCE=m.shape[1] != channels,
                PTX=ptx(device), **BLOCK,
            )  # fmt: skip

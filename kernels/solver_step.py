"""One row of a solver for the whole batch, in place: guidance, x0, clamp, update, noise and the next model input, one launch.

    m  = m_u + w (m_c - m_u)                   where m holds two halves, conditional first
    x0_new = clamp(px x + pm m, -clip, clip)
    x <- a x + b x0_new + c x0 + d m + s z;  x0 <- x0_new;  model_input <- c_next x

(px, pm, clip, a, b, c, d, s, c_next) = table[row]. All of it, the row too, is read from device memory: one captured launch serves
every row.
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


@triton.jit(do_not_specialize=["n"])
def solver_step_kernel(
    x_ptr, x0_ptr, m_ptr, model_input_ptr, table_ptr, row_ptr, seeds_ptr, ids_ptr, guidance_ptr, n,
    NUMEL: tl.constexpr, GUIDED: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """GUIDED: m holds two halves; PAIRED: model_input does."""
    sample, quad, at, step, readable, writable = tile(n, NUMEL, R, P)
    half = n.to(tl.int64) * NUMEL
    x = tl.load(x_ptr + at + step, mask=readable)
    # Read once and never again: leave the cache to x, x0 and the model.
    m = tl.load(m_ptr + at + step, mask=readable, eviction_policy="evict_first").to(tl.float32)
    if GUIDED:
        unconditional = tl.load(m_ptr + half + at + step, mask=readable, eviction_policy="evict_first").to(tl.float32)
        m = unconditional + spread(tl.load(guidance_ptr + sample), R) * (m - unconditional)
    row = tl.load(row_ptr)
    coefficients = table_ptr + row * 9
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
    if s != 0:
        out += quad_normals(quad, sample, seeds_ptr, ids_ptr, row, s, PTX)
    tl.store(x_ptr + at + step, out, mask=writable)
    tl.store(x0_ptr + at + step, new, mask=writable)
    following = (c_next * out).to(model_input_ptr.dtype.element_ty)
    tl.store(model_input_ptr + at + step, following, mask=writable)
    if PAIRED:
        tl.store(model_input_ptr + half + at + step, following, mask=writable)


def solver_step(
    x: Tensor, x0: Tensor, m: Tensor, model_input: Tensor, table: Tensor, row: Tensor, seeds: Tensor, ids: Tensor, guidance: Tensor
) -> None:
    """One row, in place on x, x0 and model_input.

    x, x0: fp32 [N, ...]. m, model_input: fp32, fp16 or bf16 [N, ...] or [2N, ...]. table: fp32 [rows, 9]. row: one int32 or int64,
    in range (not checked: that would wait for the device). seeds, ids: int64 [N]. guidance: w, fp32 [N]. All contiguous, apart.
    """
    n, shape, device = len(x), x.shape[1:], x.device
    for name, state in (("x", x), ("x0", x0)):
        assert state.shape == x.shape and state.dtype == torch.float32 and state.is_contiguous() and state.device == device, (
            f"{name} must be contiguous fp32 {list(x.shape)} on {device}, not {state.dtype} {list(state.shape)} on {state.device}"
        )
    for name, other in (("m", m), ("model_input", model_input)):
        assert len(other) in (n, 2 * n) and other.shape[1:] == shape and other.is_contiguous() and other.device == device, (
            f"{name} must be contiguous, once or twice {list(x.shape)} on {device}, not {list(other.shape)} on {other.device}"
        )
        assert other.is_floating_point() and other.element_size() in (2, 4), f"{name} must be fp32, fp16 or bf16, not {other.dtype}"
    for name, values, size in (("table", table, (len(table), 9)), ("guidance", guidance, (n,))):
        assert values.shape == size and values.dtype == torch.float32 and values.is_contiguous() and values.device == device, (
            f"{name} must be contiguous fp32 {list(size)} on {device}, not {values.dtype} {list(values.shape)} on {values.device}"
        )
    check(seeds, ids, row, n, device)
    if x.numel():
        numel = shape.numel()
        with torch.cuda.device_of(x):
            solver_step_kernel[grid(n, numel)](
                x, x0, m, model_input, table, row, seeds, ids, guidance, n,
                NUMEL=numel, GUIDED=len(m) != n, PAIRED=len(model_input) != n, PTX=ptx(device), **BLOCK,
            )  # fmt: skip

"""One row of a solver out of place, with a row for each sample if need be: what a scheduler's `step` is, in one launch.

    x0 = clamp(px x + pm m, -clip, clip)        or, with a limit for each sample, clamp(px x + pm m, -limit, limit) / limit
    x' = a x + b x0 + d m + c before + h earlier + s exp(log_s v) z

The columns of table[row] are reference.STEP_COLUMNS. v is the second half of m's channels, else 0. z is given, or made here from the noise
stream at the row that the table names.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import BLOCK, check, grid, place, ptx, quad_normals, spread, tile
from .solver_step import clamp, exp2


@triton.jit
def coefficient(row, known, column: tl.constexpr, R: tl.constexpr):
    """A column of the table, NaN in a row that it has not: a scalar, or, of rows [1, P], [R * P, 1]."""
    value = tl.load(row + column, known, float("nan"))
    return spread(value, R) if len(value.shape) else value


@triton.jit(do_not_specialize=["n", "T"])
def scheduler_step_kernel(
    out_ptr, x0_ptr, m_ptr, x_ptr, table_ptr, rows_ptr, noise_ptr, seeds_ptr, ids_ptr, limit_ptr, before_ptr, earlier_ptr, n, T,
    NUMEL: tl.constexpr, EACH: tl.constexpr, VARIANCE: tl.constexpr, LAST: tl.constexpr, PTX: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """EACH: rows holds one a sample, else one for all. VARIANCE: each sample of m is C channels of m, then C of v. LAST: 0, or C, and the channels
    of m lie together (channels-last), those of the others apart. noise_ptr and seeds_ptr None: no noise. limit_ptr, before_ptr, earlier_ptr None:
    there is none. Computed in the table's dtype, fp32 or fp64."""
    sample, quad, at, step, readable, writable = tile(n, NUMEL, R, P)
    dtype = table_ptr.dtype.element_ty
    halves: tl.constexpr = 2 if VARIANCE else 1
    first = spread(sample, R).to(tl.int64) * NUMEL
    if LAST:
        pixels: tl.constexpr = NUMEL // LAST
        within = (at - first).to(tl.int32) + step
        m_at = halves * first + within % pixels * (halves * LAST) + within // pixels
    else:
        m_at = at + (halves - 1) * first + step
    x = tl.load(x_ptr + at + step, mask=readable).to(dtype)
    m = tl.load(m_ptr + m_at, mask=readable).to(dtype)
    number, known = place(tl.load(rows_ptr + sample if EACH else rows_ptr), T)
    row = table_ptr + 11 * number
    new = coefficient(row, known, 0, R) * x + coefficient(row, known, 1, R) * m
    if limit_ptr is not None:
        limit = spread(tl.load(limit_ptr + sample), R)
        new = tl.clamp(new, -limit, limit, propagate_nan=tl.PropagateNan.ALL) / limit
    elif dtype == tl.float64:
        limit = coefficient(row, known, 2, R)
        new = tl.clamp(new, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    else:
        new = clamp(new, coefficient(row, known, 2, R), PTX)
    out = coefficient(row, known, 3, R) * x + coefficient(row, known, 4, R) * new + coefficient(row, known, 5, R) * m
    if before_ptr is not None:
        out += coefficient(row, known, 6, R) * tl.load(before_ptr + at + step, mask=readable).to(dtype)
    if earlier_ptr is not None:
        out += coefficient(row, known, 7, R) * tl.load(earlier_ptr + at + step, mask=readable).to(dtype)
    if noise_ptr is not None or seeds_ptr is not None:
        if noise_ptr is None:
            counter = tl.load(row + 10, known, 0).to(tl.int32)
            z = quad_normals(quad, sample, seeds_ptr, ids_ptr, counter, 1.0, PTX).to(dtype)
        else:
            z = tl.load(noise_ptr + at + step, mask=readable).to(dtype)
        scale = coefficient(row, known, 8, R)
        if VARIANCE:
            v = tl.load(m_ptr + m_at + (LAST if LAST else NUMEL), mask=readable).to(dtype)
            exponent = coefficient(row, known, 9, R) * 1.4426950408889634 * v
            z *= tl.exp2(exponent) if dtype == tl.float64 else exp2(exponent, PTX)
        out += scale * z
    tl.store(out_ptr + at + step, out.to(out_ptr.dtype.element_ty), mask=writable)
    tl.store(x0_ptr + at + step, new.to(x0_ptr.dtype.element_ty), mask=writable)


def scheduler_step(
    m: Tensor,
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    limit: Tensor | None,
    before: Tensor | None,
    earlier: Tensor | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """x' and x0, [N, C, ...], in the wider dtype of m and x; x0 in the table's if `wide`.

    m: [N, C, ...] or [N, 2C, ...], also channels-last. x, noise, before, earlier: [N, C, ...]. table: fp32 or fp64 [T, 11]. rows: int64 [1] or [N], of
    -T .. T - 1, counted from the table's end below 0; any other row is of NaN, for an error would wait for the device. seeds, ids: int64 [N].
    limit: [N] of the table's dtype. All but m contiguous.
    """
    n, device = len(x), x.device
    channels, *rest = x.shape[1:]
    last = m.ndim == 4 and not m.is_contiguous() and m.is_contiguous(memory_format=torch.channels_last)
    assert m.shape in ((n, channels, *rest), (n, 2 * channels, *rest)), (
        f"m must be {list(x.shape)}, or of twice the channels, not {list(m.shape)}"
    )
    assert table.dtype in (torch.float32, torch.float64) and table.shape[1:] == (11,), (
        f"table must be fp32 or fp64 [rows, 11], not {table.dtype}"
    )
    for name, v, shapes in (
        ("m", m, (m.shape,)), ("x", x, (x.shape,)), ("noise", noise, (x.shape,)), ("before", before, (x.shape,)),
        ("earlier", earlier, (x.shape,)), ("limit", limit, ((n,),)), ("table", table, (table.shape,)), ("rows", rows, ((1,), (n,))),
    ):  # fmt: skip
        if v is not None:
            assert v.shape in shapes and (v.is_contiguous() or (v is m and last)) and v.device == device, (
                f"{name} must be contiguous, {list(shapes[-1])} on {device}, not {list(v.shape)} on {v.device}"
            )
    assert rows.dtype == torch.int64 and (limit is None or limit.dtype == table.dtype), "rows must be int64, and limit of the table's dtype"
    if noise is not None:
        seeds = ids = None
    elif seeds is not None and ids is not None:
        check(seeds, ids, None, n, device)
    out = torch.empty_like(x, dtype=torch.promote_types(m.dtype, x.dtype))
    x0 = torch.empty_like(out, dtype=table.dtype if wide else out.dtype)
    if x.numel():
        numel = x[0].numel()
        with torch.cuda.device_of(x):
            scheduler_step_kernel[grid(n, numel)](
                out, x0, m, x, table, rows, noise, seeds, ids, limit, before, earlier, n, len(table),
                NUMEL=numel, EACH=len(rows) != 1, VARIANCE=m.shape[1] != channels, LAST=channels if last else 0, PTX=ptx(device), **BLOCK,
            )  # fmt: skip
    return out, x0

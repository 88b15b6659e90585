"""q(x_t | x_0) with a timestep per sample, and the training target, in one pass (Ho et al. 2020, equation 4).

    x_t = alpha x_0 + sigma z,  target = e x_0 + f z,  (alpha, sigma, e, f) = table[t]

z is given, or made here from the noise stream and never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import BLOCK, check, grid, place, ptx, quad_normals, spread, tile


@triton.jit(do_not_specialize=["n", "T"])
def add_noise_kernel(
    x_t_ptr, target_ptr, x0_ptr, t_ptr, table_ptr, noise_ptr, seeds_ptr, ids_ptr, counter_ptr, n, T,
    NUMEL: tl.constexpr, PTX: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """target_ptr None: no target. noise_ptr None: the noise is made from seeds, ids and counter, else those are None."""
    sample, quad, at, step, readable, writable = tile(n, NUMEL, R, P)
    t, known = place(tl.load(t_ptr + sample), T)  # [1, P]
    row, none = table_ptr + 4 * t, float("nan")
    x0 = tl.load(x0_ptr + at + step, mask=readable).to(tl.float32)
    if noise_ptr is None:
        z = quad_normals(quad, sample, seeds_ptr, ids_ptr, tl.load(counter_ptr), 1.0, PTX)
    else:
        z = tl.load(noise_ptr + at + step, mask=readable).to(tl.float32)
    x_t = spread(tl.load(row, known, none), R) * x0 + spread(tl.load(row + 1, known, none), R) * z
    tl.store(x_t_ptr + at + step, x_t.to(x_t_ptr.dtype.element_ty), mask=writable)
    if target_ptr is not None:
        target = spread(tl.load(row + 2, known, none), R) * x0 + spread(tl.load(row + 3, known, none), R) * z
        tl.store(target_ptr + at + step, target.to(target_ptr.dtype.element_ty), mask=writable)


def add_noise(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    counter: Tensor | None,
    target: bool,
) -> tuple[Tensor, Tensor]:
    """x_t and the target (empty unless `target`), in the dtype of x0, fp32, fp16 or bf16 [N, ...], contiguous.

    t: int64 [N], of -T .. T - 1, counted from the table's end below 0. A sample with another becomes NaN: an error would wait for the device.
    table: fp32 [T, 4]. noise: any float of x0's shape, or None: the noise stream at (seeds [N], ids [N], counter).
    """
    n, device = len(x0), x0.device
    numel = x0[0].numel() if n else 0
    assert x0.is_contiguous() and x0.is_floating_point() and x0.element_size() in (2, 4), (
        f"x0 must be contiguous fp32, fp16 or bf16, not {x0.dtype}"
    )
    assert t.shape == (n,) and t.dtype == torch.int64 and t.is_contiguous() and t.device == device, (
        f"t must be contiguous int64 [{n}] on {device}, not {t.dtype} {list(t.shape)} on {t.device}"
    )
    assert table.shape == (len(table), 4) and table.dtype == torch.float32 and table.is_contiguous() and table.device == device, (
        f"table must be contiguous fp32 [T, 4] on {device}, not {table.dtype} {list(table.shape)} on {table.device}"
    )
    if noise is None:
        assert seeds is not None and ids is not None and counter is not None, "without noise, seeds, ids and counter are needed"
        check(seeds, ids, counter, n, device)
    else:
        assert noise.shape == x0.shape and noise.is_contiguous() and noise.device == device, (
            f"noise must be contiguous {list(x0.shape)} on {device}, not {list(noise.shape)} on {noise.device}"
        )
        seeds = ids = counter = None
    x_t = torch.empty_like(x0)
    wanted = torch.empty_like(x0) if target else None
    if x0.numel():
        with torch.cuda.device_of(x0):
            add_noise_kernel[grid(n, numel)](
                x_t, wanted, x0, t, table, noise, seeds, ids, counter, n, len(table), NUMEL=numel, PTX=ptx(device), **BLOCK
            )
    return x_t, x0.new_empty(0) if wanted is None else wanted

"""The noise stream itself, as words or as standard normals: element e of a sample is value e % 4 of quad e // 4.

    words[i, q] = Philox4x32-10(key = seeds[i], counter = (q, counter, ids[i]));  z[i, 4q : 4q + 4] = Box-Muller(words[i, q])

A test or a user draws with it; add_noise and solver_step make the same values where they need them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import BLOCK, check, grid, interleave, ptx, quad_normals, quad_words, tile


@triton.jit(do_not_specialize=["n"])
def normal_kernel(
    out_ptr, seeds_ptr, ids_ptr, counter_ptr, n,
    NUMEL: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    sample, quad, at, step, _, writable = tile(n, NUMEL, R, P)
    counter = tl.load(counter_ptr)
    if WORDS:
        w0, w1, w2, w3 = quad_words(quad, sample, seeds_ptr, ids_ptr, counter, PTX)
        value = interleave(w0, w1, w2, w3)
    else:
        value = quad_normals(quad, sample, seeds_ptr, ids_ptr, counter, 1.0, PTX)
    tl.store(out_ptr + at + step, value.to(out_ptr.dtype.element_ty), mask=writable)


def _launch(out: Tensor, seeds: Tensor, ids: Tensor, counter: Tensor, numel: int, words: bool) -> Tensor:
    n = len(seeds)
    check(seeds, ids, counter, n, seeds.device)
    if out.numel():
        with torch.cuda.device_of(out):
            normal_kernel[grid(n, numel)](out, seeds, ids, counter, n, NUMEL=numel, WORDS=words, PTX=ptx(out.device), **BLOCK)
    return out


def normal(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    """Standard normals, fp32 [N, numel], for seeds and ids, int64 [N], at counter, one integer: stream << 24 | row."""
    return _launch(torch.empty(len(seeds), numel, device=seeds.device), seeds, ids, counter, numel, False)


def noise_words(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    """The words behind `normal`, int64 [N, quads, 4] in [0, 2^32)."""
    out = torch.empty(len(seeds), quads, 4, dtype=torch.int64, device=seeds.device)
    return _launch(out, seeds, ids, counter, 4 * quads, True)

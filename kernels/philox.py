"""The noise stream on loaded values: Philox4x32-10 (Salmon et al. 2011), then Box & Muller (1958), four normals to a counter.

Key = (seed lo, seed hi). Counter = (quad within the sample, stream << 24 | row, sample id lo, sample id hi): no batch in it.

    u = (w0 + 1/2) 2^-32,  theta = int32(w1) 2 pi 2^-32,  (z0, z1) = sqrt(-2 ln u) (cos theta, sin theta)

and (z2, z3) from (w2, w3) alike. fastdiff/reference.py is the definition: the words are equal to it bit for bit.

PTX, a constexpr of every function here, is 0 for portable Triton (the interpreter, AMD), else the compute capability, 80 or more,
whose instructions may be inlined. Blocks are [R, P]: a thread owns one column, R quads of one sample.
"""

import torch
import triton
import triton.language as tl

# For every kernel that draws noise. R quads a thread share the key schedule, the gathers and half of two Philox rounds: 8 rather
# than 4 saves 2.3 of 34 instructions an element, for twice the registers (compiled for sm_90, not yet timed). P: a column a thread.
BLOCK = {"R": 8, "P": 128, "num_warps": 4, "enable_fp_fusion": True}

# |z_device - z_reference| <= NORMAL_ERROR[0] + NORMAL_ERROR[1] r, r = sqrt(-2 ln u): see box_muller.
NORMAL_ERROR = (1.0e-6, 1.4e-6)


@triton.jit
def multiply_wide(a, m: tl.constexpr, PTX: tl.constexpr):
    """Low and high word of the 64-bit product of uint32 words: one IMAD.WIDE, where LLVM makes two of some portable ones."""
    if PTX:
        asm: tl.constexpr = "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }"
        return tl.inline_asm_elementwise(asm, "=r,=r,r,r", [a, tl.full((), m, tl.uint32)], (tl.uint32, tl.uint32), True, 1)
    else:
        p = a.to(tl.uint64) * m
        return p.to(tl.uint32), (p >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, PTX: tl.constexpr):
    """Four words for a counter and a key, uint32. They broadcast late: what the quads of a thread share is computed once."""
    for _ in tl.static_range(10):
        lo0, hi0 = multiply_wide(c0, 0xD2511F53, PTX)
        lo1, hi1 = multiply_wide(c2, 0xCD9E8D57, PTX)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(w0, w1, scale, PTX: tl.constexpr):
    """Two normals times `scale` (a scalar or 1.0) from two uint32 words.

    With PTX the transcendentals are single instructions of the special-function unit. The error budget, from the PTX ISA's bounds:
      cos, sin   2^-20.5 absolute: 6.8e-7 r.    lg2   2^-22 relative for u <= 1/2: 1.2e-7 r.    sqrt   2^-23 relative: 1.2e-7 r.
      rounding of the scale and the products: 2.4e-7 r.    rounding in the reference: 2.2e-7 r.    Together less than 1.4e-6 r.
    For u > 1/2 lg2 is only bounded absolutely, by 2^-22, which is ln(2) 2^-22 / r in r: no bound at all near u = 1, where even its
    sign may be wrong and r NaN. So v = 1 - u < 1/64 (exact: Sterbenz) takes a polynomial, -log2(1 - v) = v (1.44268 + 0.72894 v)
    within 1.04e-5 of itself: 9.2e-7 in r; lg2 is at 9.3e-7 where it takes over. A degree more: 5e-7 and half an instruction.
    """
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    theta = w1.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    if PTX:
        v = 1.0 - u
        near = v * (-1.4426802 + v * -0.7289432)
        far = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)
        log2 = tl.where(v < 0.015625, near, far)
        # Negated in the asm, where it is free; 0 - log2 is an instruction.
        negated: tl.constexpr = "{ .reg .f32 t; neg.f32 t, $1; sqrt.approx.ftz.f32 $0, t; }"
        root = tl.inline_asm_elementwise(negated, "=f,f", [log2], tl.float32, True, 1)
        r = root * (scale * 1.1774100225154747)  # sqrt(2 ln 2)
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [theta], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [theta], tl.float32, True, 1)
    else:
        r = tl.sqrt(tl.log(u) * -2.0) * scale
        cos = tl.cos(theta)
        sin = tl.sin(theta)
    return r * cos, r * sin


@triton.jit
def interleave(v0, v1, v2, v3):
    """Four [R, P] to one [R * P, 4], within the thread."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (v0.shape[0] * v0.shape[1], 4))


@triton.jit
def spread(v, R: tl.constexpr):
    """[1, P], one value a column, to [R * P, 1]."""
    return tl.reshape(tl.broadcast_to(v, (R, v.shape[1])), (R * v.shape[1], 1))


@triton.jit
def quad_words(quad, sample, seeds_ptr, ids_ptr, counter, PTX: tl.constexpr):
    """The four words, uint32 [R, P] each, of quad [R, P] of sample [1, P] (its place in the batch) at a scalar counter."""
    seed = tl.load(seeds_ptr + sample)
    name = tl.load(ids_ptr + sample)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return philox(quad, counter.to(tl.uint32), name.to(tl.uint32), (name >> 32).to(tl.uint32), k0, k1, PTX)


@triton.jit
def quad_normals(quad, sample, seeds_ptr, ids_ptr, counter, scale, PTX: tl.constexpr):
    """Standard normals times scale, fp32 [R * P, 4]."""
    w0, w1, w2, w3 = quad_words(quad, sample, seeds_ptr, ids_ptr, counter, PTX)
    z0, z1 = box_muller(w0, w1, scale, PTX)
    z2, z3 = box_muller(w2, w3, scale, PTX)
    return interleave(z0, z1, z2, z3)


@triton.jit
def tile(n, NUMEL: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """This program's share of n samples of NUMEL elements: P columns, one being quads l, l + L, ..., l + (R - 1) L of a sample.

    Returns sample [1, P] and quad [R, P] for the noise; for the data at [R * P, 1] and step [R * P, 4], such that elements lie at
    ptr + at + step (64 bits, then a constant: the immediate of the load), and the masks readable and writable [R * P, 4].
    Columns past the end read the last one again and write nothing: a mask on a load costs the zeroing of its registers.
    """
    L: tl.constexpr = ((NUMEL + 3) // 4 + R - 1) // R
    first = tl.program_id(0).to(tl.uint32) * P
    columns = (n * L).to(tl.uint32)
    p = tl.minimum(first + tl.arange(0, P)[None, :].to(tl.uint32), columns - 1)
    sample = p // L
    quad = p - sample * L + (tl.arange(0, R)[:, None] * L).to(tl.uint32)
    # Once more for the data, flat: of [R, P, 4] Triton 3.6 spreads R over the threads, and the noise would cross shared memory.
    i = tl.arange(0, R * P)[:, None]
    p = first + (i % P).to(tl.uint32)
    live = p < columns
    p = tl.minimum(p, columns - 1)
    owner = p // L
    within = 4 * (p - owner * L)
    at = owner.to(tl.int64) * NUMEL + within
    step = (i // P) * (4 * L) + tl.arange(0, 4)[None, :]
    # Known true where columns divide a sample, and then the compiler drops it.
    readable = tl.full((1, 1), True, tl.int1)
    if NUMEL % (4 * R) != 0:
        readable = within + step < NUMEL
    return sample, quad, at, step, readable, live & readable


@triton.jit
def place(index, length):
    """A place in a table of so many rows, counted from its end below 0 as PyTorch counts, and whether there is one: a 64-bit number, and a mask."""
    index = tl.where(index < 0, index + length, index)
    return index, (index >= 0) & (index < length)


def grid(n: int, numel: int) -> tuple[int]:
    """Programs for n samples of numel elements. Columns are counted in 31 bits: 2^31 quads are 34 GB of fp32. So are a sample's elements."""
    quads = (numel + 3) // 4
    assert numel < 2**31, f"{numel} elements in one sample are more than 2^31"
    assert n * quads < 2**31, f"{n} samples of {numel} elements are more than 2^33 elements: split the batch"
    return (triton.cdiv(n * triton.cdiv(quads, BLOCK["R"]), BLOCK["P"]),)


def ptx(device: torch.device) -> int:
    """The PTX constexpr for tensors on a device."""
    if not isinstance(philox, triton.JITFunction) or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor if major >= 8 else 0


def check(seeds: torch.Tensor, ids: torch.Tensor, counter: torch.Tensor | None, n: int, device: torch.device) -> None:
    """Assert what every kernel that draws noise for n samples relies on."""
    for name, v in (("seeds", seeds), ("ids", ids)):
        assert v.shape == (n,) and v.dtype == torch.int64 and v.is_contiguous() and v.device == device, (
            f"{name} must be contiguous int64 [{n}] on {device}, not {v.dtype} {list(v.shape)} on {v.device}"
        )
    assert counter is None or (counter.numel() == 1 and counter.dtype in (torch.int32, torch.int64) and counter.device == device), (
        f"row or counter must be one int32 or int64 on {device}, not {counter.dtype} {list(counter.shape)} on {counter.device}"
    )

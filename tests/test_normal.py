"""The noise stream: known answers, the kernels against the reference bit for bit, and the statistics of what comes out."""

import pytest
import torch
import triton
import triton.language as tl

from fastdiff import ops, reference
from fastdiff.kernels import normal as kernels
from fastdiff.kernels import philox

CUDA = torch.cuda.is_available()
WORD = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 10: counter and key, result.
KNOWN = [
    ((0, 0, 0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((WORD,) * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Portable maths (the interpreter, AMD): log, cos and sin of two libraries, each within an ulp or two of a value of at most 6.77.
PORTABLE_ERROR = 2e-6


@triton.jit
def philox_kernel(words_ptr, out_ptr, PTX: tl.constexpr):
    """words: int64 [6, 4], one column a case; out: int64 [4, 4]."""
    at = tl.arange(0, 4)[None, :]
    c0 = tl.load(words_ptr + at).to(tl.uint32)
    c1 = tl.load(words_ptr + 4 + at).to(tl.uint32)
    c2 = tl.load(words_ptr + 8 + at).to(tl.uint32)
    c3 = tl.load(words_ptr + 12 + at).to(tl.uint32)
    k0 = tl.load(words_ptr + 16 + at).to(tl.uint32)
    k1 = tl.load(words_ptr + 20 + at).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0, k1, PTX)
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + 4 + at, w1.to(tl.int64))
    tl.store(out_ptr + 8 + at, w2.to(tl.int64))
    tl.store(out_ptr + 12 + at, w3.to(tl.int64))


@triton.jit
def box_muller_kernel(w0_ptr, w1_ptr, z0_ptr, z1_ptr, scale, PTX: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    z0, z1 = philox.box_muller(tl.load(w0_ptr + at).to(tl.uint32), tl.load(w1_ptr + at).to(tl.uint32), scale, PTX)
    tl.store(z0_ptr + at, z0)
    tl.store(z1_ptr + at, z1)


def box_muller(w0, w1, ptx, scale=1.0):
    z = torch.full((2, len(w0)), torch.nan, device=w0.device)
    box_muller_kernel[(len(w0) // 1024,)](w0, w1, z[0], z[1], scale, PTX=ptx)
    return z


def radius(w0):
    return torch.sqrt(torch.log((w0.float() * 2.0**-32 + 2.0**-33).double()) * -2)


def edge_words(device):
    """Words at both ends, at every power of two from both ends, at the polynomial's end, and random ones: int64 [2, 8192]."""
    generator = torch.Generator().manual_seed(0)
    ends = [0, 1, WORD, WORD - 1, WORD - 64, WORD - 127, WORD - 128, WORD - 129, 1 << 31, (1 << 31) - 1]
    ends += [(1 << i) - j for i in range(1, 32) for j in (0, 1)] + [WORD - (1 << i) + j for i in range(32) for j in (0, 1)]
    ends += [63 * 2**26 + j for j in range(-300, 300, 7)]
    near_one = WORD - torch.randint(0, 2**27, (2048,), generator=generator)
    w0 = torch.cat([torch.tensor(ends), near_one, torch.randint(0, 2**32, (8192 - 2048 - len(ends),), generator=generator)])
    w1 = torch.randint(0, 2**32, (8192,), generator=generator)
    w1[: len(ends)] = torch.tensor(ends).flip(0)
    return torch.stack([w0, w1]).to(device)


def keys(n, device):
    """Seeds of both signs and 64 bits, sample ids beyond 2^32."""
    generator = torch.Generator().manual_seed(n)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    ids = torch.randint(0, 2**40, (n,), generator=generator)
    if n > 2:
        seeds[:3], ids[:3] = torch.tensor([-1, 0, 2**63 - 1]), torch.tensor([0, 2**32 - 1, 2**32])
    return seeds.to(device), ids.to(device)


def test_known_answers(device):
    given = torch.tensor([words for words, _ in KNOWN])
    wanted = [answer.replace(" ", "") for _, answer in KNOWN]
    got = torch.stack(reference.philox(*given.unbind(1)), 1)
    assert ["".join(f"{w:08x}" for w in row) for row in got.tolist()] == wanted

    padded = torch.cat([given, given[:1]]).T.contiguous().to(device)
    out = torch.full((4, 4), -1, dtype=torch.int64, device=device)
    philox_kernel[(1,)](padded, out, PTX=philox.ptx(device))
    assert ["".join(f"{w:08x}" for w in row) for row in out.T[:3].tolist()] == wanted


@pytest.mark.parametrize(("n", "quads"), [(0, 4), (1, 1), (1, 192), (7, 7), (65, 19), (3, 200)])
@pytest.mark.parametrize("counter", [0, 5, 1 << 24 | 499, 3 << 24])
def test_words_are_the_references(n, quads, counter, device):
    seeds, ids = keys(n, device)
    for dtype in (torch.int32, torch.int64):
        at = torch.tensor([counter], dtype=dtype, device=device)
        words = kernels.noise_words(seeds, ids, at, quads)
        assert words.dtype == torch.int64 and torch.equal(words, reference.noise_words(seeds, ids, at, quads))
        assert torch.equal(words, ops.noise_words(seeds, ids, at, quads))


@pytest.mark.parametrize(("n", "numel"), [(0, 768), (1, 1), (1, 25), (7, 75), (65, 768), (2, 784), (3, 3072)])
def test_normal_is_the_references(n, numel, device):
    seeds, ids = keys(n, device)
    counter = torch.tensor([7], device=device)
    z, wanted = kernels.normal(seeds, ids, counter, numel), reference.normal(seeds, ids, counter, numel)
    assert z.dtype == torch.float32 and z.shape == (n, numel)
    words = reference.noise_words(seeds, ids, counter, (numel + 3) // 4)
    r = radius(words[..., ::2]).repeat_interleave(2, -1).flatten(1)[:, :numel]
    bound = philox.NORMAL_ERROR[0] + philox.NORMAL_ERROR[1] * r if philox.ptx(device) else torch.full_like(r, PORTABLE_ERROR)
    assert bool(((z - wanted).abs() <= bound).all())
    torch.testing.assert_close(ops.normal(seeds, ids, counter, numel), z, rtol=0, atol=1e-5)


def test_normal_does_not_depend_on_the_batch(device):
    seeds, ids = keys(9, device)
    counter = torch.tensor([3], dtype=torch.int32, device=device)
    for numel in (25, 768):
        together = kernels.normal(seeds, ids, counter, numel)
        for i in (0, 4, 8):
            assert torch.equal(kernels.normal(seeds[i : i + 1], ids[i : i + 1], counter, numel)[0], together[i])
        # Fewer elements of a sample are its first ones.
        assert torch.equal(kernels.normal(seeds, ids, counter, 21), together[:, :21])


@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_box_muller_at_the_edges(scale, device):
    w0, w1 = edge_words(device)
    z = box_muller(w0, w1, philox.ptx(device), scale)
    error = (z - scale * torch.stack(reference.box_muller(w0, w1))).abs()
    fixed, per_r = philox.NORMAL_ERROR if philox.ptx(device) else (PORTABLE_ERROR, 0)
    assert bool((error <= abs(scale) * (fixed + per_r * radius(w0))).all())


@pytest.mark.skipif(CUDA, reason="the GPU runs the real instructions")
@pytest.mark.parametrize("lg2_error", [-(2.0**-22), 0.0, 2.0**-22])
def test_inlined_maths_with_emulated_instructions(lg2_error, monkeypatch):
    """What box_muller does around the special-function unit, with the PTX ISA's worst error of lg2 on (1/2, 2)."""

    def emulated(asm, constraints, args, *rest):
        (v,) = args
        if "lg2" in asm:
            return tl.log2(v) + lg2_error
        if "sqrt" in asm:
            return tl.sqrt(-v)
        return tl.cos(v) if "cos" in asm else tl.sin(v)

    monkeypatch.setattr(tl, "inline_asm_elementwise", emulated)
    w0, w1 = edge_words("cpu")
    z, r = box_muller(w0, w1, 90), radius(w0)
    error = (z - torch.stack(reference.box_muller(w0, w1))).abs()
    # The emulation leaves out the errors of sqrt, cos and sin: 8e-7 r.
    assert bool((error <= philox.NORMAL_ERROR[0] + 6e-7 * r).all())


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_special_function_error_over_many_words(device):
    """2^22 words: the device stays within the budget written down in box_muller."""
    seeds, ids = keys(1024, device)
    counter = torch.tensor([11], device=device)
    words = reference.noise_words(seeds, ids, counter, 1024)
    r = radius(words[..., ::2]).repeat_interleave(2, -1).flatten(1)
    wanted = reference.normal(seeds.cpu(), ids.cpu(), counter.cpu(), 4096)
    error = (kernels.normal(seeds, ids, counter, 4096) - wanted.to(device)).abs()
    print(f"largest |dz| {error.max():.2e}, largest |dz| / r {(error / r).max():.2e}, rms {error.square().mean().sqrt():.2e}")
    assert bool((error <= philox.NORMAL_ERROR[0] + philox.NORMAL_ERROR[1] * r).all())


def test_normals_are_standard_and_independent(device):
    """Five standard errors of 2^20 values, everywhere."""
    n, numel = 1024, 1024
    seeds = torch.zeros(n, dtype=torch.int64, device=device)
    ids = torch.arange(n, device=device)

    def draw(counter, seeds=seeds, ids=ids):
        return ops.normal(seeds, ids, torch.tensor([counter], device=device), numel).double()

    z = draw(0)
    five = 5 / (n * numel) ** 0.5
    assert abs(z.mean()) < five
    assert abs(z.var() - 1) < five * 2**0.5
    assert abs((z**3).mean()) < five * 15**0.5
    assert abs((z**4).mean() - 3) < five * 96**0.5
    assert abs((z.abs() > 3).double().mean() - 0.0026998) < five * 0.0519
    others = {
        "next row": draw(1),
        "next stream": draw(1 << 24),
        "next seed": draw(0, seeds + 1),
        "seed's high word": draw(0, seeds + 2**32),
        "next id": draw(0, ids=ids + 1),
        "id's high word": draw(0, ids=ids + 2**32),
        **{f"neighbour {lag}": z.roll(lag, 1) for lag in (1, 2, 3, 4, 128)},
    }
    for name, other in others.items():
        assert abs((z * other).mean()) < five, name
        assert abs((z.square() * other.square()).mean() - 1) < five * 8**0.5, name
    # A seed and an id are different words: (seed 1, id 0) is not (seed 0, id 1).
    assert abs((draw(0, seeds + 1, ids)[:-1] * z[1:]).mean()) < 5 / ((n - 1) * numel) ** 0.5


def test_launchers_refuse_what_they_would_misread(device):
    seeds, ids = keys(4, device)
    counter = torch.tensor([0], device=device)
    for bad in [
        (seeds.int(), ids, counter),
        (seeds, ids[:3], counter),
        (seeds, torch.stack([ids, ids], 1)[:, 0], counter),
        (seeds, ids, counter.float()),
        (seeds, ids, torch.cat([counter, counter])),
    ]:
        with pytest.raises(AssertionError, match="must be"):
            kernels.normal(*bad, 16)


def test_batches_and_samples_that_are_too_large_to_count_are_refused():
    """Where in its sample an element lies is counted in 31 bits: beyond, a launch would write before the tensor."""
    assert philox.grid(2, 2**31 - 1) == (2 * 2**31 // 32 // philox.BLOCK["P"],)
    for n, numel in ((1, 2**31), (1, 2**33 - 4), (2**31, 4), (1 << 23, 1024)):
        with pytest.raises(AssertionError, match=r"split the batch|in one sample"):
            philox.grid(n, numel)

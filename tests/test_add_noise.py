"""add_noise: the launcher, and on a GPU the op, against the reference."""

import pytest
import torch
from triton.runtime import InterpreterError

from fastdiff import ops, reference
from fastdiff.kernels import add_noise as kernels

pytestmark = pytest.mark.usefixtures("in_bounds")

CUDA = torch.cuda.is_available()
BATCHES = [(0, (3, 16, 16)), (1, (3, 16, 16)), (7, (1, 28, 28)), (65, (1, 5, 5)), (7, (3, 5, 5)), (65, (3, 16, 16))]
RUNS = [kernels.add_noise, ops.add_noise] if CUDA else [kernels.add_noise]
# fp32: sums of two terms of at most 7 rounded or fused differently, 1e-6, and the device's normals, 1.4e-6 r with r < 6.
# fp16, bf16: that can tip a value to the neighbouring one, which is at most 2^-10 or 2^-7 of it away.
TOLERANCES = {torch.float32: (0, 1e-5), torch.float16: (2**-10, 2e-5), torch.bfloat16: (2**-7, 2e-5)}
# The interpreter truncates fp32 to bf16 where the device rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def batch(n, shape, dtype, device, steps=50):
    generator = torch.Generator().manual_seed(n)
    x0 = torch.rand(n, *shape, generator=generator) * 2 - 1
    t = torch.randint(0, steps, (n,), generator=generator)
    alpha = torch.linspace(0.999, 0.01, steps)
    sigma = (1 - alpha.square()).sqrt()
    table = torch.stack([alpha, sigma, -sigma, alpha], 1)
    noise = torch.randn(n, *shape, generator=generator)
    seeds, ids = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator), torch.arange(n) + 2**32
    counter = torch.tensor([2 << 24 | 9])
    return [v.to(device) for v in (x0.to(dtype), t, table, noise, seeds, ids, counter)]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize(("n", "shape"), BATCHES)
def test_values_are_the_references(n, shape, given, dtype, run, device):
    x0, t, table, noise, seeds, ids, counter = batch(n, shape, dtype, device)
    arguments = (noise, None, None, None) if given else (None, seeds, ids, counter)
    before = x0.clone()
    for target in (True, False):
        got, wanted = run(x0, t, table, *arguments, target), reference.add_noise(x0, t, table, *arguments, target)
        rtol, atol = TOLERANCES[dtype]
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == dtype and g.shape == w.shape
            torch.testing.assert_close(g, w, rtol=rtol, atol=atol)
    assert torch.equal(x0, before)


@pytest.mark.parametrize("noise_dtype", [torch.float16, torch.float32])
def test_noise_of_another_dtype(noise_dtype, device):
    x0, t, table, noise, *_ = batch(7, (3, 5, 5), torch.float16, device)
    arguments = (x0, t, table, noise.to(noise_dtype), None, None, None, True)
    for got, wanted in zip(kernels.add_noise(*arguments), reference.add_noise(*arguments), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-10, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
def test_views_at_any_offset(shape, device):
    """Tensors that start off a 16-byte boundary, beside values that must not be read."""
    x0, t, table, noise, *_ = batch(5, shape, torch.float32, device)
    wanted = kernels.add_noise(x0, t, table, noise, None, None, None, True)
    for offset in (1, 2, 3):
        shifted = []
        for v in (x0, noise):
            room = torch.full((v.numel() + 7,), torch.nan, device=device)
            room[offset : offset + v.numel()] = v.flatten()
            shifted.append(room[offset : offset + v.numel()].view(v.shape))
        got = kernels.add_noise(shifted[0], t, table, shifted[1], None, None, None, True)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_sample_does_not_depend_on_its_batch(device):
    x0, t, table, _, seeds, ids, counter = batch(9, (3, 5, 5), torch.float32, device)
    together = kernels.add_noise(x0, t, table, None, seeds, ids, counter, True)
    for i in (0, 4, 8):
        one = slice(i, i + 1)
        alone = kernels.add_noise(x0[one], t[one], table, None, seeds[one], ids[one], counter, True)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
def test_timesteps_count_from_the_end_and_none_beyond_is_read(given, device):
    """As torch indexes on a CPU; where that is an error, the sample is NaN, and the others are as they were."""
    x0, t, table, noise, seeds, ids, counter = batch(7, (3, 5, 5), torch.float32, device)
    arguments = (noise, None, None, None, True) if given else (None, seeds, ids, counter, True)
    wanted = kernels.add_noise(x0, t, table, *arguments)
    for g, w in zip(kernels.add_noise(x0, t - 50, table, *arguments), wanted, strict=True):
        assert torch.equal(g, w)
    odd = torch.tensor([50, -51, 2**31, -(2**40), 2**62])
    t[1:6] = odd.to(device)
    for g, w in zip(kernels.add_noise(x0, t, table, *arguments), wanted, strict=True):
        assert torch.equal(g[[0, 6]], w[[0, 6]]) and g[1:6].isnan().all()


@pytest.mark.skipif(CUDA, reason="of the interpreter")
def test_a_read_outside_of_the_arguments_is_seen(device):
    x0, t, table, noise, *_ = batch(3, (3, 5, 5), torch.float32, device)
    with pytest.raises(InterpreterError, match="create_masked_load outside of the arguments"):
        kernels.add_noise_kernel[(1,)](x0, None, x0, t, table, noise, None, None, None, 4, 50, NUMEL=75, PTX=0, **kernels.BLOCK)


def test_launcher_refuses_what_it_would_misread(device):
    x0, t, table, noise, seeds, ids, counter = batch(4, (3, 8, 8), torch.float32, device)
    for bad in [
        (x0.double(), t, table, noise, None, None, None, True),
        (x0.to(memory_format=torch.channels_last), t, table, noise, None, None, None, True),
        (x0, t.int(), table, noise, None, None, None, True),
        (x0, t, table[:, :3], noise, None, None, None, True),
        (x0, t, table, noise[:3], None, None, None, True),
        (x0, t, table, None, seeds, None, counter, True),
        (x0, t, table, None, seeds[:2], ids, counter, True),
    ]:
        with pytest.raises(AssertionError, match=r"must be|are needed"):
            kernels.add_noise(*bad)

"""solver_step: the launcher, and on a GPU the op, against the reference."""

import itertools

import pytest
import torch

from fastdiff import ops, reference
from fastdiff.kernels import solver_step as kernels

CUDA = torch.cuda.is_available()
RUNS = [kernels.solver_step, ops.solver_step] if CUDA else [kernels.solver_step]
BATCHES = [(0, (3, 16, 16)), (1, (3, 16, 16)), (7, (1, 28, 28)), (65, (1, 5, 5)), (7, (3, 5, 5)), (65, (3, 16, 16))]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# x and x0 are fp32 whatever the model's dtype: six terms of at most 8 summed or fused differently, 3e-6, and the device's normals,
# 1.4e-6 r s with r < 6; times 1.3 in the model input. In fp16 or bf16 that can tip it to the neighbouring value.
TOLERANCES = {torch.float32: (0, 1.5e-5), torch.float16: (2**-10, 2e-5), torch.bfloat16: (2**-7, 2e-5)}
#        px    pm    clip  a    b    c     d    s    c_next
ROWS = [
    (1.25, -0.75, 1.0, 0.6, 0.3, 0.0, 0.2, 0.5, 1.0),  # DDIM with eta: c = 0
    (1.25, -0.75, 0.9, 0.6, 0.7, -0.4, 0.0, 0.0, 1.3),  # DPM++ 2M: no noise
    (0.8, -0.6, float("inf"), 0.5, -0.3, 0.25, 0.1, -0.8, 0.7),  # no clipping, everything else
]


def state(n, shape, dtype, device, halves=1, row=0, row_dtype=torch.int64):
    """Arguments of solver_step in order, model_input full of NaN. halves: of m; model_input has two, too."""
    generator = torch.Generator().manual_seed(n + row)

    def draw(k):
        return torch.randn(k, *shape, generator=generator)

    x, x0, m = draw(n), draw(n), draw(halves * n).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    ids, guidance = torch.arange(n) + 2**32 - 2, torch.linspace(0, 4, n)
    model_input = torch.full((halves * n, *shape), torch.nan, dtype=dtype)
    given = (x, x0, m, model_input, torch.tensor(ROWS), torch.tensor([row], dtype=row_dtype), seeds, ids, guidance)
    return [v.to(device) for v in given]


def compare(run, arguments, dtype):
    got, wanted = [v.clone() for v in arguments], [v.clone() for v in arguments]
    run(*got)
    reference.solver_step(*wanted)
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if i not in (0, 1, 3):
            rtol, atol = 0, 0  # only x, x0 and model_input are written
        else:
            rtol, atol = TOLERANCES[dtype if i == 3 else torch.float32]
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, equal_nan=True)
    return got


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(len(ROWS)))
@pytest.mark.parametrize(("n", "shape"), BATCHES)
def test_values_are_the_references(n, shape, row, dtype, run, device):
    got = compare(run, state(n, shape, dtype, device, row=row), dtype)
    assert not any(v.isnan().any() for v in got[:4])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m_halves", "input_halves"), [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
def test_guidance_in_two_halves(shape, m_halves, input_halves, dtype, run, device):
    n = 7
    arguments = state(n, shape, dtype, device, halves=2, row=2)
    arguments[2], arguments[3] = arguments[2][: n * m_halves], arguments[3][: n * input_halves]
    got = compare(run, arguments, dtype)
    if input_halves == 2:
        assert torch.equal(got[3][:n], got[3][n:])


@pytest.mark.parametrize(("m_dtype", "input_dtype"), [*itertools.permutations(DTYPES, 2)])
def test_m_and_model_input_of_different_dtypes(m_dtype, input_dtype, device):
    arguments = state(7, (3, 5, 5), m_dtype, device, row=2)
    arguments[3] = arguments[3].to(input_dtype)
    compare(kernels.solver_step, arguments, input_dtype)


def test_row_is_read_from_the_device_and_kept(device):
    for row_dtype in (torch.int32, torch.int64):
        arguments = state(3, (1, 5, 5), torch.float32, device, row_dtype=row_dtype)
        for row in range(len(ROWS)):
            arguments[5].fill_(row)
            compare(kernels.solver_step, arguments, torch.float32)
            assert arguments[5].item() == row


def test_c_of_zero_ignores_the_old_x0(device):
    arguments = state(7, (3, 16, 16), torch.float32, device, row=0)
    arguments[1].fill_(torch.nan)
    got = compare(kernels.solver_step, arguments, torch.float32)
    assert not any(v.isnan().any() for v in got[:4])
    arguments[5].fill_(1)
    assert compare(kernels.solver_step, arguments, torch.float32)[0].isnan().all(), "c = -0.4 reads it"


def test_s_of_zero_makes_no_noise(device):
    first = state(7, (1, 5, 5), torch.float32, device, row=1)
    second = [v.clone() for v in first]
    second[6] += 1
    kernels.solver_step(*first)
    kernels.solver_step(*second)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_nan_in_m_stays_in_its_element(row, device):
    arguments = state(7, (3, 5, 5), torch.float32, device, row=row)
    arguments[2].view(-1)[[0, 40, 200]] = torch.nan
    got = compare(kernels.solver_step, arguments, torch.float32)
    for v in (got[0], got[1], got[3]):
        assert v.view(-1).isnan().nonzero().flatten().tolist() == [0, 40, 200], "the clamp must not hide it"


def test_infinity_in_m_is_clamped(device):
    arguments = state(7, (3, 16, 16), torch.float32, device, row=0)
    arguments[2].view(-1)[[3, 41]] = torch.tensor([torch.inf, -torch.inf], device=device)
    got = compare(kernels.solver_step, arguments, torch.float32)
    assert got[1].view(-1)[[3, 41]].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_views_at_any_offset(offset, shape, device):
    """Tensors that start off a 16-byte boundary: nothing before or after them is read or written."""
    arguments = state(5, shape, torch.float32, device, row=2)
    shifted, rooms = list(arguments), {}
    for i in range(4):
        v = arguments[i]
        rooms[i] = torch.full((v.numel() + 7,), torch.nan, device=device)
        shifted[i] = rooms[i][offset : offset + v.numel()].view(v.shape).copy_(v)
    kernels.solver_step(*arguments)
    kernels.solver_step(*shifted)
    for i in (0, 1, 3):
        assert torch.equal(shifted[i], arguments[i])
        assert rooms[i].isnan().sum() == 7


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 5)])
def test_a_sample_does_not_depend_on_its_batch(shape, device):
    together = state(9, shape, torch.float32, device, row=2)
    alone = {i: [v[i : i + 1].clone() if j not in (4, 5) else v for j, v in enumerate(together)] for i in (0, 4, 8)}
    kernels.solver_step(*together)
    for i, arguments in alone.items():
        kernels.solver_step(*arguments)
        for j in (0, 1, 3):
            assert torch.equal(arguments[j][0], together[j][i])


def test_noise_is_the_stream_of_the_row(device):
    """With m = 0 and x = 0 all that is left is s z."""
    arguments = state(7, (3, 16, 16), torch.float32, device, row=2)
    for i in (0, 1, 2):
        arguments[i].zero_()
    kernels.solver_step(*arguments)
    z = reference.normal(arguments[6], arguments[7], arguments[5], 768).view(7, 3, 16, 16)
    torch.testing.assert_close(arguments[0], -0.8 * z, rtol=0, atol=1e-5)


def test_launcher_refuses_what_it_would_misread(device):
    good = state(4, (3, 8, 8), torch.float32, device)
    for i, bad in [
        (0, good[0].half()),
        (1, good[1][:3]),
        (1, good[1].to(memory_format=torch.channels_last)),
        (2, good[2][:3]),
        (2, good[2].double()),
        (3, good[3].flatten(1)),
        (4, good[4].double()),
        (4, good[4][:, :8]),
        (5, good[5].float()),
        (6, good[6][:2]),
        (8, good[8].double()),
    ]:
        with pytest.raises(AssertionError, match="must be"):
            kernels.solver_step(*good[:i], bad, *good[i + 1 :])

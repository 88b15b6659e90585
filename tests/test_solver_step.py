"""solver_step: the launcher, and on a GPU the op, against the reference."""

import itertools

import pytest
import torch

from fastdiff import ops, reference
from fastdiff.kernels import solver_step as kernels

pytestmark = pytest.mark.usefixtures("in_bounds")

CUDA = torch.cuda.is_available()
RUNS = [kernels.solver_step, ops.solver_step] if CUDA else [kernels.solver_step]
BATCHES = [(0, (3, 16, 16)), (1, (3, 16, 16)), (7, (1, 28, 28)), (65, (1, 5, 5)), (7, (3, 5, 5)), (65, (3, 16, 16))]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# x, x0 and history are fp32 whatever the model's dtype: nine terms of at most 8 summed or fused differently, 5e-6, and the device's
# normals, 1.4e-6 r s with r < 6; times 1.3 in the model input. In fp16 or bf16 that can tip it to the neighbouring value.
TOLERANCES = {torch.float32: (0, 1.5e-5), torch.float16: (2**-10, 2e-5), torch.bfloat16: (2**-7, 2e-5)}
# With |v| < 5 the noise is up to exp(1.5) times as large, and so is its error, 3e-5; the exponential adds 7e-7 of at most 22: its own
# 2^-22, and roundings of an exponent below 2.2 on either side.
VARIANCE_ATOL = 5e-5
#   px    pm    clip a    b    c     d    s    c_next h0    h1    h2  slot save_x save_x0 log_s
ROWS = [
    (1.25, -0.75, 1.0, 0.6, 0.3, 0.0, 0.2, 0.5, 1.0, 0.0, 0.0, 0.0, -1, 0.0, 0.0, 0.3),  # DDIM with eta: c = 0
    (1.25, -0.75, 0.9, 0.6, 0.7, -0.4, 0.0, 0.0, 1.3, 0.0, 0.0, 0.0, -1, 0.0, 0.0, 0.3),  # DPM++ 2M: no noise
    (0.8, -0.6, float("inf"), 0.5, -0.3, 0.25, 0.1, -0.8, 0.7, 0.0, 0.0, 0.0, -1, 0.0, 0.0, -0.3),  # no clipping, everything else
    (1.25, -0.75, 1.0, 0.5, 0.3, 0.2, 0.2, 0.0, 1.0, 0.3, -0.4, 0.2, -1, 0.7, 0.9, 0.0),  # reads every slot, saves none
    (1.25, -0.75, 1.0, 0.5, 0.3, 0.0, 0.0, 0.0, 1.0, 0.3, 0.0, 0.6, 2, 0.7, -0.5, 0.0),  # overwrites one that it reads
    (0.8, -0.6, 1.0, 0.5, 0.3, 0.0, 0.0, 0.4, 1.0, 0.0, 0.0, 0.0, 0, 1.0, 0.0, 0.2),  # saves x and reads none
    (0.8, -0.6, 2.0, 0.5, -0.3, 0.25, 0.1, -0.8, 0.7, -0.3, 0.5, 0.25, 1, -0.4, 0.8, -0.3),  # all of it
]
# Places of the arguments that are written; column of the slot in the table.
X, X0, M, MODEL_INPUT, HISTORY, TABLE, ROW, SEEDS, IDS, GUIDANCE = range(10)
WRITTEN = (X, X0, MODEL_INPUT, HISTORY)
SLOT = reference.COLUMNS.index("slot")


def state(n, shape, dtype, device, halves=1, row=0, row_dtype=torch.int64, slots=None, variance=False):
    """Arguments of solver_step in order, model_input full of NaN. halves: of m; model_input has two, too. slots: else as the row needs."""
    generator = torch.Generator().manual_seed(n + row)

    def draw(*size):
        return torch.randn(*size, *shape[1:], generator=generator)

    channels = shape[0]
    x, x0, m = draw(n, channels), draw(n, channels), draw(halves * n, channels * (2 if variance else 1)).to(dtype)
    history = draw((reference.SLOTS if row >= 3 else 0) if slots is None else slots, n, channels)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    ids, guidance = torch.arange(n) + 2**32 - 2, torch.linspace(0, 4, n)
    model_input = torch.full((halves * n, *shape), torch.nan, dtype=dtype)
    given = (x, x0, m, model_input, history, torch.tensor(ROWS), torch.tensor([row], dtype=row_dtype), seeds, ids, guidance)
    return [v.to(device) for v in given]


def compare(run, arguments, dtype):
    got, wanted = [v.clone() for v in arguments], [v.clone() for v in arguments]
    run(*got)
    reference.solver_step(*wanted)
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        rtol, atol = TOLERANCES[dtype if i == MODEL_INPUT else torch.float32] if i in WRITTEN else (0, 0)
        if i in (X, MODEL_INPUT) and arguments[M].shape[1] != arguments[X].shape[1]:
            atol = VARIANCE_ATOL
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, equal_nan=True)
    for k, (after, before) in enumerate(zip(got[HISTORY], arguments[HISTORY], strict=True)):
        if k != arguments[TABLE][arguments[ROW].item(), SLOT]:
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", range(len(ROWS)))
@pytest.mark.parametrize(("n", "shape"), BATCHES)
def test_values_are_the_references(n, shape, row, dtype, run, device):
    got = compare(run, state(n, shape, dtype, device, row=row), dtype)
    assert not any(v.isnan().any() for v in got[:5])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(("m_halves", "input_halves"), [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
def test_guidance_in_two_halves(shape, m_halves, input_halves, variance, dtype, run, device):
    n = 7
    arguments = state(n, shape, dtype, device, halves=2, row=2, variance=variance)
    arguments[M], arguments[MODEL_INPUT] = arguments[M][: n * m_halves], arguments[MODEL_INPUT][: n * input_halves]
    got = compare(run, arguments, dtype)
    if input_halves == 2:
        assert torch.equal(got[MODEL_INPUT][:n], got[MODEL_INPUT][n:])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 1, 6])
@pytest.mark.parametrize(("n", "shape"), BATCHES)
def test_learned_variance(n, shape, row, dtype, run, device):
    got = compare(run, state(n, shape, dtype, device, row=row, variance=True), dtype)
    assert not any(v.isnan().any() for v in got[:5])


def test_learned_variance_is_the_conditional_half_s(device):
    arguments = state(7, (3, 5, 5), torch.float32, device, halves=2, row=6, variance=True)
    arguments[M][7:, 3:] = torch.nan
    assert not compare(kernels.solver_step, arguments, torch.float32)[X].isnan().any()


@pytest.mark.parametrize(("row", "reach"), [(2, True), (1, False)])
def test_nan_in_learned_variance_stays_in_its_element(row, reach, device):
    arguments = state(7, (3, 5, 5), torch.float32, device, row=row, variance=True)
    arguments[M][[0, 3, 6], [3, 4, 5], [0, 2, 4], [0, 1, 4]] = torch.nan
    got = compare(kernels.solver_step, arguments, torch.float32)
    wanted = [[0, 0, 0, 0], [3, 1, 2, 1], [6, 2, 4, 4]] if reach else []
    assert got[X].isnan().nonzero().tolist() == got[MODEL_INPUT].isnan().nonzero().tolist() == wanted
    assert not got[X0].isnan().any()


@pytest.mark.parametrize(("m_dtype", "input_dtype"), [*itertools.permutations(DTYPES, 2)])
def test_m_and_model_input_of_different_dtypes(m_dtype, input_dtype, device):
    arguments = state(7, (3, 5, 5), m_dtype, device, row=2)
    arguments[MODEL_INPUT] = arguments[MODEL_INPUT].to(input_dtype)
    compare(kernels.solver_step, arguments, input_dtype)


@pytest.mark.parametrize("slots", [0, reference.SLOTS])
def test_row_is_read_from_the_device_and_kept(slots, device):
    for row_dtype in (torch.int32, torch.int64):
        arguments = state(3, (1, 5, 5), torch.float32, device, row_dtype=row_dtype, slots=slots)
        for row in range(len(ROWS)):
            arguments[ROW].fill_(row)
            compare(kernels.solver_step, arguments, torch.float32)
            assert arguments[ROW].item() == row


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
def test_history_is_carried_from_row_to_row(shape, variance, device):
    """Each row starts from what the kernel left of the row before."""
    arguments = state(7, shape, torch.float32, device, slots=reference.SLOTS, variance=variance)
    arguments[HISTORY].fill_(torch.nan)
    for row in (5, 0, 6, 4, 3):
        if row == 6:
            arguments[HISTORY][1:] = arguments[X]
        arguments[ROW].fill_(row)
        arguments = compare(kernels.solver_step, arguments, torch.float32)
        assert not arguments[X].isnan().any()


def test_a_slot_is_read_before_it_is_overwritten(device):
    arguments = state(7, (3, 5, 5), torch.float32, device, row=4)
    for i in (X, X0, M):
        arguments[i].zero_()
    old = arguments[HISTORY].clone()
    arguments[X].fill_(2.0)
    kernels.solver_step(*arguments)
    # x0_new is clamp(2.5) = 1.
    torch.testing.assert_close(arguments[X], 0.5 * 2.0 + 0.3 + 0.3 * old[0] + 0.6 * old[2], rtol=0, atol=2e-6)
    torch.testing.assert_close(arguments[HISTORY][2], torch.full_like(old[2], 0.7 * 2.0 - 0.5), rtol=0, atol=2e-6)
    assert torch.equal(arguments[HISTORY][:2], old[:2])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
@pytest.mark.parametrize(("row", "unread"), [(0, [0, 1, 2]), (4, [1]), (5, [0, 1, 2])])
def test_a_slot_of_weight_zero_is_ignored(row, unread, shape, device):
    arguments = state(7, shape, torch.float32, device, row=row, slots=reference.SLOTS)
    arguments[HISTORY][unread] = torch.nan
    got = compare(kernels.solver_step, arguments, torch.float32)
    assert not any(got[i].isnan().any() for i in (X, X0, MODEL_INPUT))
    arguments[HISTORY].fill_(torch.nan)
    assert compare(kernels.solver_step, arguments, torch.float32)[X].isnan().all() == (row == 4)


def test_c_of_zero_ignores_the_old_x0(device):
    arguments = state(7, (3, 16, 16), torch.float32, device, row=0)
    arguments[X0].fill_(torch.nan)
    got = compare(kernels.solver_step, arguments, torch.float32)
    assert not any(v.isnan().any() for v in got[:4])
    arguments[ROW].fill_(1)
    assert compare(kernels.solver_step, arguments, torch.float32)[X].isnan().all(), "c = -0.4 reads it"


def test_s_of_zero_makes_no_noise(device):
    first = state(7, (1, 5, 5), torch.float32, device, row=1)
    second = [v.clone() for v in first]
    second[SEEDS] += 1
    kernels.solver_step(*first)
    kernels.solver_step(*second)
    assert torch.equal(first[X], second[X])


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_nan_in_m_stays_in_its_element(row, device):
    arguments = state(7, (3, 5, 5), torch.float32, device, row=row)
    arguments[M].view(-1)[[0, 40, 200]] = torch.nan
    got = compare(kernels.solver_step, arguments, torch.float32)
    for i in (X, X0, MODEL_INPUT):
        assert got[i].view(-1).isnan().nonzero().flatten().tolist() == [0, 40, 200], "the clamp must not hide it"


def test_infinity_in_m_is_clamped(device):
    arguments = state(7, (3, 16, 16), torch.float32, device, row=0)
    arguments[M].view(-1)[[3, 41]] = torch.tensor([torch.inf, -torch.inf], device=device)
    got = compare(kernels.solver_step, arguments, torch.float32)
    assert got[X0].view(-1)[[3, 41]].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_views_at_any_offset(offset, variance, shape, device):
    """Tensors that start off a 16-byte boundary: nothing before or after them is read or written."""
    arguments = state(5, shape, torch.float32, device, row=6, halves=2 if variance else 1, variance=variance)
    shifted, rooms = list(arguments), {}
    for i in (X, X0, M, MODEL_INPUT, HISTORY):
        v = arguments[i]
        rooms[i] = torch.full((v.numel() + 7,), torch.nan, device=device)
        shifted[i] = rooms[i][offset : offset + v.numel()].view(v.shape).copy_(v)
    kernels.solver_step(*arguments)
    kernels.solver_step(*shifted)
    for i in WRITTEN:
        assert torch.equal(shifted[i], arguments[i])
        assert rooms[i].isnan().sum() == 7


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 5)])
@pytest.mark.parametrize("variance", [False, True])
def test_a_sample_does_not_depend_on_its_batch(variance, shape, device):
    together = state(9, shape, torch.float32, device, row=6, variance=variance)

    def one(i, j):
        if j in (TABLE, ROW):
            return together[j]
        return (together[j][:, i : i + 1] if j == HISTORY else together[j][i : i + 1]).clone()

    alone = {i: [one(i, j) for j in range(len(together))] for i in (0, 4, 8)}
    kernels.solver_step(*together)
    for i, arguments in alone.items():
        kernels.solver_step(*arguments)
        for j in WRITTEN:
            assert torch.equal(arguments[j], one(i, j))


@pytest.mark.parametrize("variance", [False, True])
def test_noise_is_the_stream_of_the_row(variance, device):
    """With m = 0 and x = 0 all that is left is s exp(log_s v) z."""
    arguments = state(7, (3, 16, 16), torch.float32, device, row=2, variance=variance)
    arguments[X].zero_()
    arguments[X0].zero_()
    arguments[M][:, :3].zero_()
    v = arguments[M][:, 3:] if variance else torch.zeros((), device=device)
    kernels.solver_step(*arguments)
    z = reference.normal(arguments[SEEDS], arguments[IDS], arguments[ROW], 768).view(7, 3, 16, 16)
    torch.testing.assert_close(arguments[X], -0.8 * torch.exp(-0.3 * v) * z, rtol=0, atol=VARIANCE_ATOL if variance else 1e-5)


def test_launcher_refuses_what_it_would_misread(device):
    good = state(4, (3, 8, 8), torch.float32, device, row=3)
    for i, bad in [
        (X, good[X].half()),
        (X0, good[X0][:3]),
        (X0, good[X0].to(memory_format=torch.channels_last)),
        (M, good[M][:3]),
        (M, good[M].double()),
        (M, good[M].repeat(1, 3, 1, 1)),
        (M, good[M].repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)),
        (MODEL_INPUT, good[MODEL_INPUT].flatten(1)),
        (MODEL_INPUT, good[MODEL_INPUT].repeat(1, 2, 1, 1)),
        (HISTORY, good[HISTORY][:2]),
        (HISTORY, good[HISTORY][:, :3]),
        (HISTORY, good[HISTORY][0]),
        (HISTORY, good[HISTORY].double()),
        (HISTORY, good[HISTORY].transpose(3, 4)),
        (HISTORY, good[HISTORY].new_empty(0)),
        (TABLE, good[TABLE].double()),
        (TABLE, good[TABLE][:, :9].contiguous()),
        (ROW, good[ROW].float()),
        (SEEDS, good[SEEDS][:2]),
        (GUIDANCE, good[GUIDANCE].double()),
    ]:
        with pytest.raises(AssertionError, match="must be"):
            kernels.solver_step(*good[:i], bad, *good[i + 1 :])

"""scheduler_step: the launcher, and on a GPU the op, against the reference; and the reference against solver_step's."""

import pytest
import torch

from fastdiff import ops, reference
from fastdiff.kernels import scheduler_step as kernels
from fastdiff.kernels import solver_step as in_place

pytestmark = pytest.mark.usefixtures("in_bounds")

CUDA = torch.cuda.is_available()
RUNS = [kernels.scheduler_step, ops.scheduler_step] if CUDA else [kernels.scheduler_step]
BATCHES = [(0, (3, 16, 16)), (1, (3, 16, 16)), (7, (1, 28, 28)), (65, (1, 5, 5)), (7, (3, 5, 5)), (33, (3, 16, 16))]
DTYPES = [torch.float32, torch.float64, torch.float16, *([torch.bfloat16] if CUDA else [])]
# fp32: seven terms of at most 8 summed or fused differently, 5e-6, and the device's normals, 1.4e-6 r s with r < 6. With |v| < 5 the noise is up to
# exp(1.5) times as large. In fp16 or bf16 that can tip a result to the neighbouring value. fp64: 2^-52 of the same terms, but the exponential
# of the noise's 2^-50.
TOLERANCES = {torch.float32: (0, 1.5e-5), torch.float64: (0, 1e-13), torch.float16: (2**-10, 5e-5), torch.bfloat16: (2**-7, 5e-5)}
VARIANCE_ATOL = {torch.float32: 5e-5, torch.float64: 1e-12, torch.float16: 5e-5, torch.bfloat16: 5e-5}
#   px    pm    clip  a    b    d     c     h    s    log_s row
ROWS = [
    (1.25, -0.75, 1.0, 0.6, 0.3, 0.2, -0.4, 0.3, 0.5, 0.3, 3),
    (0.8, -0.6, float("inf"), 0.5, -0.3, 0.1, 0.25, 0.5, -0.8, -0.3, 999),
    (0.0, 1.0, 0.9, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),
    (1e30, -1e30, 1.0, 0.1, 0.7, 0.0, -0.4, 0.0, 0.3, 0.3, 2**24 - 1),
]
NAMES = ("m", "x", "table", "rows", "noise", "seeds", "ids", "limit", "before", "earlier", "wide")


def state(n, shape, dtype, device, *, m_dtype=None, each=True, noise="stream", variance=False, limit=False, past=2, wide=False):
    """Arguments of scheduler_step by name."""
    generator = torch.Generator().manual_seed(n + 1)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(channels=shape[0]):
        return torch.randn(n, channels, *shape[1:], generator=generator)

    given = {
        "m": draw(shape[0] * (2 if variance else 1)).to(m_dtype or dtype),
        "x": draw().to(dtype),
        "table": torch.tensor(ROWS, dtype=exact),
        "rows": torch.arange(n) % len(ROWS) if each else torch.tensor([1]),
        "noise": draw().to(dtype) if noise == "given" else None,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator) if noise == "stream" else None,
        "ids": torch.arange(n) + 2**32 - 2 if noise == "stream" else None,
        "limit": torch.linspace(1, 2, n, dtype=exact) if limit else None,
        "before": draw().to(exact) if past else None,
        "earlier": draw().to(dtype) if past > 1 else None,
        "wide": wide,
    }
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}


def compare(run, given):
    got, wanted = run(*given.values()), reference.scheduler_step(*given.values())
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == w.dtype and g.is_contiguous()
        rtol, atol = TOLERANCES[g.dtype]
        if given["m"].shape != given["x"].shape:
            atol = VARIANCE_ATOL[g.dtype]
        if g.dtype == torch.float64 and given["seeds"] is not None:
            atol = 5e-5  # the stream is fp32
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, equal_nan=True)
    return got


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("noise", ["stream", "given", None])
@pytest.mark.parametrize(("n", "shape"), BATCHES)
def test_values_are_the_references(n, shape, noise, each, dtype, run, device):
    got = compare(run, state(n, shape, dtype, device, noise=noise, each=each))
    assert not any(v.isnan().any() for v in got)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("past", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5)])
def test_what_may_be_left_out(shape, past, limit, variance, dtype, run, device):
    for noise in ("given", "stream"):
        compare(run, state(7, shape, dtype, device, noise=noise, variance=variance, limit=limit, past=past))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("m_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_wider_dtype_wins_and_x0_can_be_kept_whole(dtype, m_dtype, run, device):
    for wide in (False, True):
        given = state(7, (3, 5, 5), dtype, device, m_dtype=m_dtype, noise="given", wide=wide)
        out, x0 = compare(run, given)
        assert out.dtype == torch.promote_types(dtype, m_dtype)
        assert x0.dtype == (given["table"].dtype if wide else out.dtype)


def test_a_row_is_that_of_the_loop(device):
    """solver_step in place and scheduler_step out of place are one update."""
    given = state(7, (3, 5, 5), torch.float32, device, each=False, variance=True)
    out, x0 = reference.scheduler_step(*given.values())
    named = dict(zip(reference.STEP_COLUMNS, ROWS[1], strict=True))
    row = {**named, "h0": named["h"], "h1": 0.0, "h2": 0.0, "slot": -1.0, "save_x": 0.0, "save_x0": 0.0, "c_next": 1.0}
    table = torch.zeros(1000, 16, device=device)
    table[999] = torch.tensor([row[name] for name in reference.COLUMNS])
    x, old, m = given["x"].clone(), given["before"].clone(), given["m"]
    history = given["earlier"].expand(3, *x.shape).clone()
    at, guidance = torch.tensor([999], device=device), torch.ones(7, device=device)
    reference.solver_step(x, old, m, torch.empty_like(x), history, table, at, given["seeds"], given["ids"], guidance)
    torch.testing.assert_close(out, x, rtol=0, atol=5e-6)
    torch.testing.assert_close(x0, old, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 5)])
def test_a_sample_does_not_depend_on_its_batch_or_on_the_others_rows(shape, device):
    together = state(9, shape, torch.float32, device, variance=True, limit=True)
    out = kernels.scheduler_step(*together.values())
    for i in (0, 4, 8):
        alone = {name: v[i : i + 1].contiguous() if isinstance(v, torch.Tensor) and name != "table" else v for name, v in together.items()}
        for got, wanted in zip(kernels.scheduler_step(*alone.values()), out, strict=True):
            assert torch.equal(got, wanted[i : i + 1])


@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_m_stays_in_its_element(dtype, limit, device):
    given = state(8, (3, 5, 5), dtype, device, limit=limit)
    given["m"].view(-1)[[0, 40, 200]] = torch.nan
    for v in compare(kernels.scheduler_step, given):
        assert v.view(-1).isnan().nonzero().flatten().tolist() == [0, 40, 200], "the clamp must not hide it"


def test_at_no_signal_x0_is_the_sign(device):
    given = state(4, (3, 5, 5), torch.float32, device, noise=None)
    given["m"][3] = given["x"][3] + 0.25 * (torch.arange(75, device=device).view(3, 5, 5) % 3 - 1)
    _, x0 = compare(kernels.scheduler_step, given)
    assert torch.equal(x0[3].flatten(), -(torch.arange(75, device=device) % 3 - 1).float())


@pytest.mark.parametrize("each", [True, False])
def test_rows_count_from_the_end_and_none_beyond_is_read(each, device):
    """As torch indexes on a CPU; where that is an error, the sample is NaN, and the others are as they were."""
    given = state(7, (3, 5, 5), torch.float32, device, each=each, variance=True)
    wanted = kernels.scheduler_step(*given.values())
    for got, right in zip(kernels.scheduler_step(*{**given, "rows": given["rows"] - len(ROWS)}.values()), wanted, strict=True):
        assert torch.equal(got, right)
    for odd in (len(ROWS), -len(ROWS) - 1, 2**31, -(2**40), 2**62):
        rows = given["rows"].clone()
        rows[0] = odd
        for got, right in zip(kernels.scheduler_step(*{**given, "rows": rows}.values()), wanted, strict=True):
            assert got[0].isnan().all() and (torch.equal(got[1:], right[1:]) if each else got.isnan().all())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__module__)
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 5), (3, 5, 7), (4, 1, 1)])
def test_a_channels_last_network_is_read_as_it_lies(shape, variance, run, device):
    for dtype in DTYPES:
        given = state(7, shape, dtype, device, variance=variance)
        last = {**given, "m": given["m"].to(memory_format=torch.channels_last)}
        for got, right in zip(run(*last.values()), run(*given.values()), strict=True):
            assert got.is_contiguous() and torch.equal(got, right)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_views_at_any_offset(offset, device):
    given = state(5, (3, 5, 5), torch.float32, device, noise="given", variance=True)
    shifted = dict(given)
    for name in ("m", "x", "noise", "before", "earlier"):
        v = given[name]
        room = torch.full((v.numel() + 7,), torch.nan, device=device)
        shifted[name] = room[offset : offset + v.numel()].view(v.shape).copy_(v)
    for got, wanted in zip(kernels.scheduler_step(*shifted.values()), kernels.scheduler_step(*given.values()), strict=True):
        assert torch.equal(got, wanted)


def test_launcher_refuses_what_it_would_misread(device):
    good = state(4, (3, 8, 8), torch.float32, device, limit=True)
    for name, bad in [
        ("m", good["m"][:3]),
        ("m", good["m"].repeat(1, 3, 1, 1)),
        ("m", good["m"].transpose(2, 3)),
        ("x", good["x"].to(memory_format=torch.channels_last)),
        ("table", good["table"].half()),
        ("table", good["table"][:, :9].contiguous()),
        ("rows", good["rows"][:3]),
        ("rows", good["rows"].int()),
        ("noise", good["x"][:3]),
        ("noise", good["x"].transpose(2, 3)),
        ("seeds", good["seeds"][:2]),
        ("limit", good["limit"].double()),
        ("before", good["x"][:3]),
        ("earlier", good["x"].flatten(1)),
    ]:
        with pytest.raises(AssertionError, match="must be"):
            kernels.scheduler_step(*{**good, name: bad}.values())


@pytest.mark.parametrize("run", [in_place.solver_step, reference.solver_step], ids=["kernel", "reference"])
@pytest.mark.parametrize("variance", [False, True])
def test_the_loops_step_takes_given_noise_too(variance, run, device):
    """solver_step with the stream's own noise, given, is solver_step without."""
    n, shape = 7, (3, 5, 5)
    columns = dict(zip(reference.STEP_COLUMNS, ROWS[1], strict=True))
    table = torch.tensor([[columns.get(name, 0.0) for name in reference.COLUMNS]], device=device)
    table[0, reference.COLUMNS.index("slot")] = -1
    given = state(n, shape, torch.float32, device, variance=variance)
    row, guidance = torch.tensor([0], device=device), torch.ones(n, device=device)
    z = reference.normal(given["seeds"], given["ids"], row, 75).contiguous().view(n, *shape)
    results = []
    for noise in (None, z):
        x, x0, model_input = given["x"].clone(), given["before"].clone(), torch.empty_like(given["x"])
        run(x, x0, given["m"], model_input, x.new_empty(0, *x.shape), table, row, given["seeds"], given["ids"], guidance, noise)
        results.append(torch.cat([x, x0, model_input]))
    torch.testing.assert_close(*results, rtol=0, atol=5e-5 if variance else 1.5e-5)

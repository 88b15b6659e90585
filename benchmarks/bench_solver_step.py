"""One row of a solver: the fused op against the lines that a plain sampler has instead. "ddpm" makes noise in the row, "ddim" makes none."""

import pytest
import torch

from fastdiff import Schedule, ops, solvers

SCHEDULE = Schedule.cosine(500)
ROW = 10


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_solver_step(case, solver, sets, compare):
    device, n = torch.device(case.device), case.batch
    table = solvers.table(solver, SCHEDULE, prediction="v").tensors(device)[0]
    row = torch.tensor([ROW], device=device)
    seeds, ids = torch.zeros(n, dtype=torch.int64, device=device), torch.arange(n, device=device)
    guidance = torch.ones(n, device=device)
    px, pm, _, a, b, _, d, s, *_ = table[ROW].clone().unbind()

    # These solvers look back on nothing.
    history = torch.empty(0, *case.shape, device=device)

    def ours(x, x0, m, model_input):
        ops.solver_step(x, x0, m, model_input, history, table, row, seeds, ids, guidance)

    def eager(x, x0, m, model_input, z=None):
        """What a diffusers scheduler returns, prev_sample and pred_original_sample, and the next model input."""
        m = m.float()
        x0 = (px * x + pm * m).clamp(-1, 1)
        x = a * x + b * x0
        x = x + s * (torch.randn_like(x) if z is None else z) if solver == "ddpm" else x + d * m
        return x, x0, x.to(case.dtype)

    def state():
        x = torch.randn(case.shape, device=device)
        return x, torch.empty_like(x), torch.randn_like(x, dtype=case.dtype), torch.empty_like(x, dtype=case.dtype)

    x, x0, m, model_input = state()
    z = ops.normal(seeds, ids, row, x[0].numel()).reshape(case.shape)
    want = eager(x, x0, m, model_input, z)
    ours(x, x0, m, model_input)
    torch.testing.assert_close((x, x0), want[:2], atol=1e-5, rtol=0)
    assert torch.equal(model_input, x.to(case.dtype))

    # x is read and written, m read, x0 and the model input written; this row does not read the old x0.
    moved = 3 * x.nbytes + 2 * m.nbytes
    compare(ours, eager, sets(moved, state), moved)

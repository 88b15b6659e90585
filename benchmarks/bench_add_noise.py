"""x_t and the v target for a training batch, a timestep per sample: the fused op against the lines that a training script has instead."""

import pytest
import torch

from fastdiff import Schedule, ops
from fastdiff.noise import counter, noise_table

SCHEDULE = Schedule.cosine(500)


@pytest.mark.parametrize("noise", ["made", "given"])
def test_add_noise(case, noise, sets, compare):
    device, n = torch.device(case.device), case.batch
    table = noise_table(SCHEDULE, "v", device)
    t = torch.randint(SCHEDULE.timesteps, (n,), device=device)
    seeds, ids, count = torch.zeros(n, dtype=torch.int64, device=device), torch.arange(n, device=device), counter("training", 0, device)
    alpha_bar = torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).to(device, case.dtype)

    def ours(x0, z=None):
        given = (None, seeds, ids, count) if z is None else (z, None, None, None)
        return ops.add_noise(x0, t, table, *given, True)

    def eager(x0, z=None):
        """DDPMScheduler.add_noise and .get_velocity of diffusers, sharing their factors."""
        z = torch.randn_like(x0) if z is None else z
        alpha = (alpha_bar[t] ** 0.5)[:, None, None, None]
        sigma = ((1 - alpha_bar[t]) ** 0.5)[:, None, None, None]
        return alpha * x0 + sigma * z, alpha * z - sigma * x0

    x0 = torch.randn(case.shape, device=device, dtype=case.dtype)
    z = ops.normal(seeds, ids, count, x0[0].numel()).reshape(case.shape).to(case.dtype)
    # diffusers forms sqrt(1 - alpha_bar) in the dtype of x0, where it cancels: in bf16 sigma can be off by sqrt(2^-9), and |z| comes to 6.
    tolerance = 1e-3 if case.dtype == torch.float32 else 0.4
    torch.testing.assert_close(ours(x0), eager(x0, z), atol=tolerance, rtol=0)

    tensors = 3 if noise == "made" else 4
    moved = tensors * x0.nbytes
    compare(ours, eager, sets(moved, lambda: tuple(torch.randn_like(x0) for _ in range(tensors - 2))), moved)

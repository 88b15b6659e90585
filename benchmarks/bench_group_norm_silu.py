"""GroupNorm and SiLU of channels-last images, as they stand between the convolutions of a network: the fused op against PyTorch's two."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import CUDA, Case
from fastdiff import ops

EPS, GROUP = 1e-5, 8


@dataclass(frozen=True)
class Insides(Case):
    """Images of a network's insides, [N, H, W, C]."""

    channels: int = 64
    side: int = 8

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.side, self.side, self.channels

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.channels}@{self.side}"


CASES = [
    Insides("cpu", 32),
    *(Insides("cuda", 4096, torch.bfloat16, cold, *of) for cold in (False, True) for of in ((64, 8), (128, 4), (64, 16))),
]


@pytest.fixture(
    params=[
        pytest.param(case, id=str(case), marks=pytest.mark.skipif(case.device == "cuda" and not CUDA, reason="needs a CUDA GPU"))
        for case in CASES
    ]
)
def case(request) -> Insides:
    return request.param


def test_group_norm_silu(case, sets, compare):
    device, c = torch.device(case.device), case.channels
    gamma, beta = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device)
    own_gamma, own_beta = gamma.to(case.dtype), beta.to(case.dtype)

    def ours(x):
        return ops.group_norm_silu(x, gamma, beta, None, None, c // GROUP, EPS, True, None)

    def eager(x):
        return F.silu(F.group_norm(x.permute(0, 3, 1, 2), c // GROUP, own_gamma, own_beta, EPS))

    x = torch.randn(case.shape, device=device, dtype=case.dtype)
    tolerance = 1e-5 if case.dtype == torch.float32 else 0.06  # two roundings of numbers up to 8
    torch.testing.assert_close(ours(x), eager(x).permute(0, 2, 3, 1), atol=tolerance, rtol=tolerance)
    moved = 2 * x.nbytes
    compare(ours, eager, sets(moved, lambda: (torch.randn_like(x),)), moved)

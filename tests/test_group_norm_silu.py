"""group_norm_silu: the kernel, and on a GPU the op, against the reference, and the reference against PyTorch."""

import convolutions as make
import pytest
import torch
from convolutions import CUDA, DEVICE, close
from torch import nn

from fastdiff import native, ops, reference
from fastdiff.kernels import group_norm_silu as kernels

# The interpreter truncates fp32 to bf16 where the device rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# The op is the kernel in Triton on a GPU, and the one in C on a CPU.
RUNS = {"triton": kernels.group_norm_silu, "op" if CUDA else "c": ops.group_norm_silu}
# One image in one program, in several by channels, in several goes over its pixels; pixels and channels that are no powers of two; groups of one.
SHAPES = [
    ((3, 8, 8, 64), 8),
    ((2, 32, 32, 128), 32),
    ((1, 40, 40, 64), 8),
    ((2, 5, 7, 96), 12),
    ((17, 3, 3, 8), 8),
    ((2, 16, 16, 256), 4),
    ((1, 1, 1, 64), 8),
]


def covered(run, dtype, shape):
    """In C: fp32, and vectors of 16 channels."""
    return run != "c" or (dtype == torch.float32 and shape[-1] % native.LANES == 0)


@pytest.mark.parametrize(
    ("run", "dtype", "shape", "groups"),
    [
        pytest.param(run, dtype, shape, groups, id=f"{run}-{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}-{groups}")
        for run in RUNS
        for dtype in DTYPES
        for shape, groups in SHAPES
        if covered(run, dtype, shape)
    ],
)
@pytest.mark.parametrize(
    "how", [{}, {"style": True}, {"style": True, "indexed": False}, {"silu": False}], ids=["plain", "by index", "by image", "no silu"]
)
def test_values_are_the_references(how, shape, groups, dtype, run):
    arguments = make.group_norm_silu(shape, groups, dtype, **how)
    with make.guarded() as guards_stand:
        got = RUNS[run](*arguments)
        guards_stand()
    wanted = reference.group_norm_silu(*arguments)
    assert got.dtype == dtype and got.is_contiguous()
    # fp32: sums over up to 16,000 numbers, of deviations that cancel against a mean of 3. 16 bits: a neighbouring number.
    rtol, atol = {torch.float32: (1e-5, 3e-5), torch.float16: (2**-10, 5e-4), torch.bfloat16: (2**-7, 4e-3)}[dtype]
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("style", [False, True])
def test_the_reference_is_pytorchs(style):
    x, gamma, beta, styles, which, groups, eps, *_ = make.group_norm_silu((3, 5, 7, 24), 4, torch.float64, style=style)
    norm = nn.functional.group_norm(x.permute(0, 3, 1, 2), groups, gamma.double(), beta.double(), eps)
    if style:
        scale, shift = styles[which].chunk(2, dim=1)
        norm = norm * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    wanted = nn.functional.silu(norm).permute(0, 2, 3, 1)
    got = reference.group_norm_silu(x, gamma, beta, styles, which, groups, eps, True, None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # the reference computes in fp32


def test_a_mean_far_from_zero_costs_no_more_than_its_rounding():
    """The variance of numbers around 1000: as mean of squares less square of mean, fp32 would keep no digit of it."""
    x, *rest = make.group_norm_silu((2, 8, 8, 64), 8, torch.float32)
    shifted = x + 1000
    exact = nn.functional.group_norm(shifted.double().permute(0, 3, 1, 2), 8, rest[0].double(), rest[1].double())
    wanted = nn.functional.silu(exact).permute(0, 2, 3, 1).float()
    for run in (*RUNS.values(), reference.group_norm_silu):
        torch.testing.assert_close(run(shifted, *rest), wanted, rtol=1e-3, atol=1e-3)


def test_e4m3_is_the_references():
    x, *rest, _ = make.group_norm_silu((3, 8, 8, 64), 8, torch.float16)
    inverse = torch.tensor([100.0], device=DEVICE)
    got, wanted = (f(x, *rest, inverse).float() for f in (kernels.group_norm_silu, reference.group_norm_silu))
    assert wanted.max() == reference.FP8_MAX
    # Where rounding reaches the next power of two, Triton's interpreter forgets to carry and gives half of it.
    halved = (got == wanted / 2) & (torch.frexp(wanted).mantissa.abs() == 0.5) & (not CUDA)
    torch.testing.assert_close(torch.where(halved, wanted, got), wanted, rtol=2**-3, atol=2**-9)
    assert halved.float().mean() < 0.1


def test_nothing_beside_the_arguments_is_read():
    for name, run in RUNS.items():
        for shape, groups in SHAPES:
            if covered(name, torch.float32, shape):
                arguments = make.group_norm_silu(shape, groups, torch.float32, style=True)
                close(run(*make.everywhere(make.between_nans, arguments)), reference.group_norm_silu(*arguments))


def test_no_images():
    arguments = make.group_norm_silu((0, 8, 8, 64), 8, torch.float32)
    for run in RUNS.values():
        assert run(*arguments).shape == (0, 8, 8, 64)


@pytest.mark.parametrize(("channels", "groups"), [(60, 10), (64, 64), (12, 4), (64, 5), (96, 1)])
def test_what_fits(channels, groups):
    """(64, 64) alone: 6 channels a group, 12 channels, 5 groups that do not divide 64, and a group of 96 do not."""
    reason = kernels.fits(channels, groups)
    assert (reason is None) == ((channels, groups) == (64, 64))
    if reason and channels % groups == 0:
        assert f"{groups} groups of {channels} channels" in reason
        with pytest.raises(AssertionError, match="a group must have"):
            kernels.group_norm_silu(*make.group_norm_silu((1, 4, 4, channels), groups, torch.float32))


def test_bad_arguments_are_named():
    x, gamma, *rest = make.group_norm_silu((2, 4, 4, 64), 8, torch.float32)
    with pytest.raises(AssertionError, match=r"x must be contiguous.*\[2, 4, 4, 64\]"):
        kernels.group_norm_silu(x.transpose(1, 2), gamma, *rest)
    with pytest.raises(AssertionError, match="gamma must be contiguous"):
        kernels.group_norm_silu(x, gamma.double(), *rest)
    with pytest.raises(AssertionError, match=r"style must be \[rows, 128\]"):
        kernels.group_norm_silu(x, gamma, rest[0], torch.zeros(2, 64, device=DEVICE), *rest[2:])


@pytest.mark.skipif(CUDA, reason="of a CPU")
def test_in_c_silu_is_right_from_end_to_end_and_nan_stays():
    """Of one pixel a group of all channels is the numbers themselves, to a scale: from -1000 to 1000, and the ends of what fp32 can say e^x of."""
    x = torch.cat([torch.linspace(-1000, 1000, 2000), torch.linspace(-95, 95, 2096)]).view(1, 1, 1, 4096)
    spread = float(x.double().var(correction=0).sqrt())
    gamma, beta = torch.full((4096,), spread), torch.zeros(4096)
    got = native.group_norm_silu(x, native.Norm(gamma, beta, 1, 0.0))
    torch.testing.assert_close(got.double(), nn.functional.silu(x.double() - x.double().mean()), rtol=3e-6, atol=1e-4)
    near = (x.abs() < 20).double() * x.double()
    got = native.group_norm_silu(near.float(), native.Norm(torch.full((4096,), float(near.var(correction=0).sqrt())), beta, 1, 0.0))
    torch.testing.assert_close(got.double(), nn.functional.silu(near - near.mean()), rtol=1e-5, atol=1e-6)
    broken = torch.ones(2, 2, 2, 32)
    broken[1, 1, 0, 3] = torch.nan
    got = native.group_norm_silu(broken, native.Norm(torch.ones(32), torch.zeros(32), 2, 1e-5))
    assert got[0].isfinite().all() and got[1, ..., :16].isnan().all() and got[1, ..., 16:].isfinite().all()


@pytest.mark.skipif(CUDA, reason="of a CPU")
def test_without_c_the_op_is_its_definition(monkeypatch):
    arguments = make.group_norm_silu((3, 8, 8, 64), 8, torch.float32, style=True)
    x, gamma, beta, style, which, groups, eps, silu, _ = arguments
    norm = native.Norm(gamma, beta, groups, eps, silu)
    assert torch.equal(ops.group_norm_silu(*arguments), native.group_norm_silu(x, norm, style, which))
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(ops.group_norm_silu(*arguments), reference.group_norm_silu(*arguments))

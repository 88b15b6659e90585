"""Noise as a function: the counter-based normal stream, and q(x_t | x_0) made from it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import ops
from .schedules import Schedule, whole

# Top byte of the second counter word: what the noise is for. The numbers fix every image ever made; new streams get new numbers.
STREAMS = {"step": 0, "start": 1, "training": 2, "draw": 3, "known": 4}


def counter(stream: str, row: int, device: torch.device | str | None = None) -> Tensor:
    """The counter word of a stream and row, int64 [1]. ValueError for an unknown stream or a row outside 0 .. 2^24 - 1."""
    if stream not in STREAMS:
        raise ValueError(f"unknown noise stream {stream!r}; known: {', '.join(STREAMS)}")
    if not 0 <= row < 1 << 24:
        raise ValueError(f"row is {row}; the noise stream has rows 0 to {(1 << 24) - 1}")
    return torch.tensor([STREAMS[stream] << 24 | row], device=device)


def signed(value: int) -> int:
    """A seed or id of 64 bits as int64 holds it. ValueError outside -2^63 .. 2^64 - 1."""
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{value} does not fit 64 bits; seeds and sample ids lie between -2^63 and 2^64 - 1")
    return value - (1 << 64) if value >= 1 << 63 else value


def column64(values: int | Sequence[int] | Tensor, n: int, device: torch.device | str = "cpu") -> Tensor:
    """One 64-bit integer, or n of them, as int64 [n]."""
    if not isinstance(values, Tensor):
        if whole(values):
            return torch.full((n,), signed(int(values)), dtype=torch.int64, device=device)  # type: ignore[arg-type]
        try:
            values = torch.tensor([signed(operator.index(v)) for v in values], dtype=torch.int64, device=device)  # type: ignore[union-attr]
        except TypeError:
            raise ValueError(f"seeds and ids are whole numbers, not {values!r}") from None
    if values.is_floating_point():
        raise ValueError(f"seeds and ids are whole numbers, not {values.dtype}")
    return values.to(device, torch.int64).contiguous()


def normal(seed: int | Sequence[int] | Tensor, ids: Sequence[int] | Tensor, row: int, shape: Sequence[int], stream: str = "step") -> Tensor:
    """Standard normal noise of samples `ids`, fp32 [len(ids), *shape], on the device of `ids`.

    A value depends on (seed, id, stream, row, element) alone: Philox4x32-10 (Salmon et al. 2011) under the Box-Muller transform, so not on
    the batch, the device or the process. seed: one for all, or one per id. ids: 64-bit integers. shape: of one sample.
    """
    device = ids.device if isinstance(ids, Tensor) else torch.device("cpu")
    n = len(ids)
    ids, seeds = column64(ids, n, device), column64(seed, n, device)
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds for {n} ids; give one seed, or one per id")
    z: Tensor = ops.straight(ops.normal, seeds, ids, counter(stream, row, device), int(np.prod(shape, dtype=np.int64)))
    return z.reshape(n, *shape)


def slerp(z0: Tensor, z1: Tensor, weight: float | Sequence[float] | Tensor) -> Tensor:
    """Between two noises on the great circle through them, which keeps their length (Shoemake 1985; Song et al. 2021, section 5.3).

    z0, z1: [*shape]. weight: 0 gives z0 and 1 z1; a number gives [*shape], k numbers [k, *shape]. Where the two are parallel, a straight line.
    """
    if z0.shape != z1.shape:
        raise ValueError(f"z0 has shape {list(z0.shape)} and z1 {list(z1.shape)}; they must be the same")
    w = torch.as_tensor(weight, dtype=torch.float64, device=z0.device)
    a, b = z0.double().flatten(), z1.double().flatten()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-6:
        first, second = 1 - w, w
    else:
        first, second = ((1 - w) * angle).sin() / angle.sin(), (w * angle).sin() / angle.sin()
    return (first[..., None] * a + second[..., None] * b).reshape(*w.shape, *z0.shape).to(z0.dtype)


@lru_cache(maxsize=32)
def noise_table(schedule: Schedule, prediction: str, device: torch.device) -> Tensor:
    """Rows (alpha, sigma, e, f) of `reference.add_noise` for a schedule, fp32 [T, 4]: the target e x_0 + f z is what the network predicts."""
    alpha, sigma = schedule.alpha, schedule.sigma
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    targets = {"epsilon": (zero, one), "v": (-sigma, alpha), "x0": (one, zero), "flow": (-one, one)}
    if prediction not in targets:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(targets)}")
    if prediction == "v" and not schedule.preserving:
        raise ValueError(
            f"prediction 'v' is defined where alpha^2 + sigma^2 = 1, not for a schedule of {schedule.name!r}; take 'flow' or 'x0'"
        )
    return torch.from_numpy(np.stack([alpha, sigma, *targets[prediction]], axis=1)).to(device, torch.float32)


def add_noise(
    x0: Tensor,
    t: Tensor,
    schedule: Schedule,
    noise: Tensor | None = None,
    seed: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
    *,
    target: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t ~ q(x_t | x_0) = alpha_t x_0 + sigma_t z in one pass, a timestep per sample (Ho et al. 2020, equation 4).

    x0: [N, ...], fp32, fp16 or bf16, also the result's; computed in fp32. t: integers [N] in 0 .. T - 1. z is `noise`, of x0's shape, or the
    training noise stream of `seed` at sample `ids` (default 0 .. N - 1). target: "epsilon", "v", "x0" or "flow" returns the pair (x_t, what a
    network of that prediction should say). No gradient flows through it. ValueError for unfitting shapes, or both of noise and seed.
    A t on a CUDA device is not checked against T, since that would wait for the device.
    """
    n = len(x0)
    if not x0.is_floating_point():
        raise ValueError(f"x0 is {x0.dtype}; give floating-point images (fastdiff.data.to_float makes them of uint8)")
    if t.shape != (n,) or t.dtype.is_floating_point:
        raise ValueError(f"t is {t.dtype} {list(t.shape)}; give one integer timestep per sample, [{n}]")
    if (noise is None) == (seed is None):
        raise ValueError("give either noise, a tensor of x0's shape, or seed, for noise made in the kernel")
    if noise is not None and noise.shape != x0.shape:
        raise ValueError(f"noise has shape {list(noise.shape)} and x0 {list(x0.shape)}; they must be the same")
    if t.device.type == "cpu" and n and not 0 <= int(t.min()) <= int(t.max()) < schedule.timesteps:
        raise ValueError(f"t holds {int(t.min())} to {int(t.max())}; this schedule has timesteps 0 to {schedule.timesteps - 1}")
    seeds = counters = None
    if noise is None and seed is not None:
        seeds = column64(seed, n, x0.device)
        if len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} samples; give one seed, or one per sample")
        ids = column64(range(n) if ids is None else ids, n, x0.device)
        if len(ids) != n:
            raise ValueError(f"{len(ids)} ids for {n} samples")
        counters = counter("training", 0, x0.device)
    table = noise_table(schedule, target or "epsilon", x0.device)
    t = t.to(x0.device, torch.int64)
    if noise is not None:
        noise, ids = noise.detach().contiguous(), None
    x_t, wanted = ops.add_noise(x0.detach().contiguous(), t, table, noise, seeds, ids, counters, target is not None)
    return (x_t, wanted) if target is not None else x_t

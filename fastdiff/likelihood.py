"""log p(x): what an image is worth to the model, by the probability flow (Song et al. 2021, "Score-based generative modeling", section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import noise
from .loop import answered
from .schedules import Schedule, whole

# Images that the network sees at a time: the gradient holds all of its activations.
MICRO_BATCH = 64

# px and pm of x_0 = px x + pm m, of alpha and sigma.
PREDICTED: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "x0": lambda alpha, sigma: (0.0, 1.0),
}


class Likelihood(NamedTuple):
    """nats: log p(x), fp64 [N]. error: its standard error, of the trace's estimate, fp64 [N]; 0 where the trace is exact. latents: where the flow leads
    to, in units of the noise there, fp32 [N, *shape]. dims: numbers in an image."""

    nats: Tensor
    error: Tensor
    latents: Tensor
    dims: int

    def bits_per_dim(self, levels: int = 256) -> Tensor:
        """-log2 of the probability of an image quantised to so many levels in [-1, 1], a dimension, fp64 [N]; of `dequantised` images."""
        return -self.nats / (self.dims * math.log(2)) + math.log2((levels - 1) / 2)


def dequantised(images: Tensor, ids: Sequence[int] | Tensor | None = None, seed: int = 0) -> Tensor:
    """uint8 images [N, C, H, W] as points spread evenly over their levels, fp32 in [-1, 1] and half a level beyond (Theis et al. 2016, section 3.1)."""
    z = noise.normal(seed, range(len(images)) if ids is None else ids, 0, images.shape[1:], stream="draw")
    u = torch.special.ndtr(z.double()) - 0.5
    points: Tensor = ((images.double() + u) / 127.5 - 1).float()
    return points


def log_likelihood(
    model: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    labels: Tensor | None = None,
    steps: int = 64,
    probes: int | None = None,
    seed: int = 0,
    first: int = 0,
) -> Likelihood:
    """log p(x_0) of images [N, *shape], in [-1, 1], under the model: exact as steps and probes grow.

    Along the probability flow dy/du = y - D(y), y = x / alpha, u = ln(sigma / alpha), where D is the network's x_0, log p falls by the flow's
    divergence, and ends in a Gaussian. The flow is followed by Heun's method in so many even steps of u from the first timestep, whose little noise
    the data is taken to have, to the last. probes: estimates of the divergence by v . dD/dy v with v of random signs from the noise stream of
    (seed, first + i) (Hutchinson; Grathwohl et al. 2019), the same v all the way; None for the exact trace, of d evaluations a step, where an image has
    d <= 64 numbers, else 1. labels: int64 [N], for log p(x | label). ValueError for what does not fit.
    """
    if not isinstance(x0, Tensor) or x0.ndim < 2 or not x0.is_floating_point():
        raise ValueError("x0 must be images as a tensor of floating-point numbers, [N, *shape]")
    if not whole(steps) or steps < 1 or not (probes is None or (whole(probes) and probes >= 1)):
        raise ValueError(f"steps is {steps!r} and probes is {probes!r}; give whole numbers of at least 1, or probes=None")
    if prediction not in PREDICTED:
        raise ValueError(f"prediction is {prediction!r}; a likelihood is known for {', '.join(PREDICTED)}")
    if not schedule.preserving or not np.isfinite(schedule.log_snr[[0, -1]]).all():
        raise ValueError("the flow needs a schedule that preserves variance, with signal and noise at both ends")
    n, dims = len(x0), x0[0].numel() if len(x0) else int(np.prod(x0.shape[1:]))
    exact = probes is None and dims <= 64
    parts = []
    for i in range(0, n, MICRO_BATCH):
        some = x0[i : i + MICRO_BATCH]
        ids = range(first + i, first + i + len(some))
        directions = _units(some) if exact else _signs(some, ids, seed, probes or 1)
        part = None if labels is None else labels[i : i + MICRO_BATCH]
        parts.append(_flow(model, schedule, some, prediction, part, steps, directions, exact))
    if not parts:
        empty = torch.zeros(0, dtype=torch.float64)
        return Likelihood(empty, empty.clone(), x0.float(), dims)
    nats, error, latents = (torch.cat(v) for v in zip(*parts, strict=True))
    return Likelihood(nats, error, latents, dims)


def _units(x0: Tensor) -> Tensor:
    """[d, N, *shape]: for every number of an image, the direction in which it alone changes."""
    d = x0[0].numel()
    return torch.eye(d, device=x0.device, dtype=x0.dtype).reshape(d, 1, *x0.shape[1:]).expand(d, *x0.shape)


def _signs(x0: Tensor, ids: range, seed: int, probes: int) -> Tensor:
    """[probes, N, *shape] of +1 and -1."""
    place = torch.tensor(ids, device=x0.device)
    return torch.stack([noise.normal(seed, place, 1 + k, x0.shape[1:], stream="draw").sign().to(x0.dtype) for k in range(probes)])


def _flow(
    model: nn.Module, schedule: Schedule, x0: Tensor, prediction: str, labels: Tensor | None, steps: int, directions: Tensor, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats [N], standard error [N], latents) of one micro-batch."""
    levels = [schedule.at(v) for v in np.linspace(schedule.log_snr[0], schedule.log_snr[-1], steps + 1)]
    # The ends are timesteps, so they shall not be a rounding error away from them.
    levels[0], levels[-1] = ((float(t), float(schedule.alpha[t]), float(schedule.sigma[t])) for t in (0, schedule.timesteps - 1))
    h = float(schedule.log_snr[0] - schedule.log_snr[-1]) / steps
    dtype, dims = x0.dtype, x0[0].numel()

    def slope(y: Tensor, level: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        """dy/du, and its divergence along each direction, fp64 [directions, N]."""
        t, alpha, sigma = level
        with torch.enable_grad():
            y = y.to(dtype).requires_grad_()
            told = torch.full((len(y),), t, device=y.device)
            x = alpha * y
            m = answered(model(x, told) if labels is None else model(x, told, labels))[:, : x.shape[1]]
            px, pm = PREDICTED[prediction](alpha, sigma)
            guess = px * x + pm * m
            grown = []
            for k, v in enumerate(directions):
                (back,) = torch.autograd.grad(guess, y, v, retain_graph=k + 1 < len(directions))
                grown.append((back * v).double().flatten(1).sum(1))
        along = torch.stack(grown)
        divergence = dims - along.sum(0, keepdim=True) if exact else dims - along
        return (y - guess).detach().double(), divergence.detach()

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        y, total = x0.double(), torch.zeros(1 if exact else len(directions), len(x0), dtype=torch.float64, device=x0.device)
        for now, after in pairwise(levels):
            first, lost = slope(y, now)
            second, lost_after = slope(y + h * first, after)
            y = y + h / 2 * (first + second)
            total = total + h / 2 * (lost + lost_after)
    finally:
        for module in training:
            module.training = True
    alpha = levels[-1][1]
    spread = 1 / alpha  # of y at the end, where x is of unit variance
    last = -((y / spread) ** 2).flatten(1).sum(1) / 2 - dims * (math.log(spread) + math.log(2 * math.pi) / 2)
    nats = last + total
    error = nats.std(0) / math.sqrt(len(nats)) if len(nats) > 1 else torch.full_like(nats[0], 0.0 if exact else math.nan)
    return nats.mean(0), error, (y / spread).float()

"""log p(x): what an image is worth to the model, by the probability flow (Song et al. 2021, "Score-based generative modeling", section 4.3) and by the
variational bound of DDPM (Ho et al. 2020, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import noise
from .loop import answered
from .schedules import Schedule, whole
from .solvers import PREDICTIONS

# Images that the network sees at a time: the gradient holds all of its activations.
MICRO_BATCH = 64
# Rows of the "draw" stream: 0 is of `dequantised`, from 1 on are the probes, and from here on the bound's.
BOUND_ROWS = 1 << 20
VARIANCES = ("posterior", "beta")
EXACT_DIMS = 64


class Likelihood(NamedTuple):
    """nats: log p(x), fp64 [N]. error: its standard error, of the trace's estimate, fp64 [N]; 0 where the trace is exact. latents: where the flow leads
    to, in units of the noise there, [N, *shape] in x0's dtype. dims: numbers in an image."""

    nats: Tensor
    error: Tensor
    latents: Tensor
    dims: int

    def bits_per_dim(self, levels: int = 256) -> Tensor:
        """-log2 of the probability of an image quantised to so many levels in [-1, 1], a dimension, fp64 [N]; of `dequantised` images."""
        return -self.nats / (self.dims * math.log(2)) + math.log2((levels - 1) / 2)


class Bound(NamedTuple):
    """terms: L_0 .. L_T of Ho et al. 2020, equation 5, in nats, fp64 [T + 1, N], the mean over the noise samples: terms[0] of the decoder, terms[k] of
    the step that starts at timesteps[k], terms[T] of the prior. error: standard error of `nats` over the noise samples, fp64 [N]; NaN of a single
    one. timesteps: of the walk, rising, [T]. dims: numbers in an image."""

    terms: Tensor
    error: Tensor
    timesteps: tuple[int, ...]
    dims: int

    @property
    def nats(self) -> Tensor:
        """L, which -log P(x) of the quantised image does not exceed, fp64 [N]."""
        return self.terms.sum(0)

    def bits_per_dim(self) -> Tensor:
        """L in bits a dimension, fp64 [N]."""
        return self.nats / (self.dims * math.log(2))


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
    steps: int = 32,
    probes: int | None = None,
    seed: int = 0,
    first: int = 0,
    sigma_data: float = 0.5,
) -> Likelihood:
    """log p(x_0) of images [N, *shape], in [-1, 1], under the model: exact as steps and probes grow.

    With alpha = cos phi, sigma = sin phi and w = ln tan(phi / 2), the probability flow is dx/dw = alpha x - D(x), where D is the network's x_0.
    Along it log p falls by the flow's divergence, alpha d - tr dD/dx, and it ends in a Gaussian. It is followed by Runge and Kutta's method of
    fourth order in so many even steps of w, four evaluations each, from the first timestep, whose little noise the data is taken to have, to the
    last. A schedule that does not preserve variance is followed in x / sqrt(alpha^2 + sigma^2), which does.

    probes: estimates of the trace by v . dD/dx v with v of random signs from the noise stream of (seed, first + i) (Hutchinson 1990; Grathwohl et al.
    2019), the same v all the way; None for the exact trace, by d gradients an evaluation, where an image has d <= 64 numbers, else 1. labels: int64
    [N], for log p(x | label). The network is called in x0's dtype; in float64 nothing is rounded to less. ValueError for what does not fit.
    """
    _check(schedule, x0, prediction)
    if not whole(steps) or steps < 1 or not (probes is None or (whole(probes) and probes >= 1)):
        raise ValueError(f"steps is {steps!r} and probes is {probes!r}; give whole numbers of at least 1, or probes=None")
    if labels is not None and len(labels) != len(x0):
        raise ValueError(f"{len(labels)} labels for {len(x0)} images; give one label an image")
    n, dims = len(x0), math.prod(x0.shape[1:])
    exact = probes is None and dims <= EXACT_DIMS
    walk = _Walk(model, schedule, prediction, sigma_data, steps)
    parts = []
    with _evaluating(model):
        for i in range(0, n, MICRO_BATCH):
            some = x0[i : i + MICRO_BATCH]
            directions = _units(some) if exact else _signs(some, range(first + i, first + i + len(some)), seed, probes or 1)
            parts.append(walk(some, None if labels is None else labels[i : i + MICRO_BATCH], directions, exact))
    if not parts:
        empty = torch.zeros(0, dtype=torch.float64)
        return Likelihood(empty, empty.clone(), x0.clone(), dims)
    nats, error, latents = (torch.cat(v) for v in zip(*parts, strict=True))
    return Likelihood(nats, error, latents, dims)


def variational_bound(
    model: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    labels: Tensor | None = None,
    levels: int = 256,
    variance: str = "posterior",
    timesteps: int | None = None,
    samples: int = 1,
    seed: int = 0,
    first: int = 0,
    sigma_data: float = 0.5,
) -> Bound:
    """The bound on -log P(x_0) of DDPM, term by term (Ho et al. 2020, equation 5), of images [N, *shape] of so many levels in [-1, 1].

    L_T, the KL from q(x_T | x_0) to N(0, I), and L_{t-1}, that from q(x_{t-1} | x_t, x_0) of equation 7 to p(x_{t-1} | x_t), are closed forms
    given x_t; x_t is drawn so many times, of the noise stream of (seed, first + i). p's mean is equation 7's with the network's x_0. variance: its
    variance, "posterior", beta-tilde_t, or "beta", beta_t. L_0 is the discretised decoder of equation 13, of p's variance at the first timestep;
    beta-tilde is 0 there, so it takes the next one's, as the paper's code does. timesteps: None for all, or a number of them, evenly spread
    (Nichol & Dhariwal 2021, equation 19). labels: int64 [N]. ValueError for what does not fit.
    """
    _check(schedule, x0, prediction)
    numbers = {"levels": levels, "samples": samples, "timesteps": schedule.timesteps if timesteps is None else timesteps}
    for name, value in numbers.items():
        low = 1 if name == "samples" else 2
        if not whole(value) or value < low:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least {low}")
    total = numbers["timesteps"]
    if total > schedule.timesteps:
        raise ValueError(f"timesteps is {total}; this schedule has {schedule.timesteps}")
    if total * samples > (1 << 24) - BOUND_ROWS:
        raise ValueError(f"{total} timesteps of {samples} samples are more than the {(1 << 24) - BOUND_ROWS} that the noise stream has")
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; the bound is known for {', '.join(VARIANCES)}")
    if labels is not None and len(labels) != len(x0):
        raise ValueError(f"{len(labels)} labels for {len(x0)} images; give one label an image")
    walk = np.round(np.linspace(0, schedule.timesteps - 1, total)).astype(np.int64)
    reading = _at_timesteps(schedule, walk, prediction, sigma_data)
    alpha, sigma = reading.alpha, reading.sigma
    if not sigma[0] > 0:
        raise ValueError("the bound needs a schedule with noise at its first timestep")
    # p and q between each timestep and the one before it: q's mean is a x + b x_0, of variance `small`; p's is `large` (equation 7).
    keep = alpha[1:] / alpha[:-1]
    beta = 1 - keep**2
    b = alpha[:-1] * beta / sigma[1:] ** 2
    small = beta * sigma[:-1] ** 2 / sigma[1:] ** 2
    large = small if variance == "posterior" else beta
    if not (beta > 0).all():
        raise ValueError("the bound needs a schedule with more noise at each timestep than at the one before")
    spread = np.log(large / small) + small / large - 1  # of variances alone, a dimension, twice
    decoder = math.sqrt(small[0] if variance == "posterior" else sigma[0] ** 2)

    n, dims = len(x0), math.prod(x0.shape[1:])
    if not n:
        return Bound(torch.zeros(total + 1, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), tuple(walk.tolist()), dims)
    flat, device = x0.double().flatten(1), x0.device
    totals = torch.zeros(samples, n, dtype=torch.float64, device=device)
    terms = torch.zeros(total + 1, n, dtype=torch.float64, device=device)
    terms[total] = 0.5 * ((alpha[-1] * flat) ** 2 + sigma[-1] ** 2 - 1 - 2 * math.log(sigma[-1])).sum(1)
    # As many (timestep, sample) at a time as fill a micro-batch.
    pairs = [(k, j) for k in range(total) for j in range(samples)]
    with torch.no_grad(), _evaluating(model):
        for begin in range(0, n, MICRO_BATCH):
            some = x0[begin : begin + MICRO_BATCH]
            mine = slice(begin, begin + len(some))
            ids, many = torch.arange(first + begin, first + begin + len(some), device=device), max(MICRO_BATCH // len(some), 1)
            for start in range(0, len(pairs), many):
                chosen = pairs[start : start + many]
                z = torch.cat([noise.normal(seed, ids, BOUND_ROWS + k * samples + j, x0.shape[1:], stream="draw") for k, j in chosen])
                which = np.repeat([k for k, _ in chosen], len(some))
                column = (len(which), *[1] * (x0.ndim - 1))
                a, s = (torch.from_numpy(v[which]).to(device).reshape(column) for v in (alpha, sigma))
                clean = some.double().repeat(len(chosen), *[1] * (x0.ndim - 1))
                x = (a * clean + s * z.double()).to(x0.dtype)
                told = None if labels is None else labels[mine].repeat(len(chosen))
                guess = reading.guess(model, which, x, told).double()
                far = (guess - clean).flatten(1)
                for place, (k, j) in enumerate(chosen):
                    part = slice(place * len(some), (place + 1) * len(some))
                    if k:
                        weight, rest = float(b[k - 1] ** 2 / (2 * large[k - 1])), float(dims * spread[k - 1] / 2)
                        term = weight * far[part].square().sum(1) + rest
                    else:
                        term = -_decoded(far[part], clean[part].flatten(1), decoder, levels).sum(1)
                    terms[k, mine] += term / samples
                    totals[j, mine] += term
    error = totals.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(totals[0], math.nan)
    return Bound(terms, error, tuple(walk.tolist()), dims)


def _decoded(far: Tensor, x0: Tensor, deviation: float, levels: int) -> Tensor:
    """ln P of a value's own level under N(x_0 + far, deviation^2), the first and last level reaching to infinity (Ho et al. 2020, equation 13)."""
    half = 1 / (levels - 1)
    low, high = (-far - half) / deviation, (-far + half) / deviation
    low = torch.where(x0 <= -1 + half, -math.inf, low)
    high = torch.where(x0 >= 1 - half, math.inf, high)
    # On the side where both tails are small, ln(Phi(high) - Phi(low)) = ln Phi(high) + ln(1 - Phi(low) / Phi(high)).
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    nats: Tensor = upper + torch.log1p(-torch.exp(lower - upper))
    return nats


class _Reading(NamedTuple):
    """What a network is asked and how it is understood, at each of some levels, in variables that preserve variance: x_0 = px x + pm m of
    m = model(c_in x, told). All float64 [L]."""

    alpha: np.ndarray
    sigma: np.ndarray
    told: np.ndarray
    c_in: np.ndarray
    px: np.ndarray
    pm: np.ndarray

    def guess(self, model: nn.Module, which: np.ndarray, x: Tensor, labels: Tensor | None) -> Tensor:
        """x_0 by the network for x [N, *shape], each at the level `which` [N], in x's dtype."""
        column = (len(which), *[1] * (x.ndim - 1))
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        told = torch.from_numpy(self.told[which]).to(x.device, dtype)
        c_in, px, pm = (torch.from_numpy(v[which]).to(x.device, dtype).reshape(column) for v in (self.c_in, self.px, self.pm))
        asked = (c_in * x).to(x.dtype)
        m = answered(model(asked, told) if labels is None else model(asked, told, labels))[:, : x.shape[1]]
        if m.shape != x.shape:
            raise ValueError(f"the network answers {list(m.shape)} to images {list(x.shape)}")
        guess: Tensor = px * x + pm * m
        return guess


def _reading(schedule: Schedule, t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, prediction: str, sigma_data: float) -> _Reading:
    """Of levels (t, alpha, sigma) of the schedule."""
    scale = np.hypot(alpha, sigma)  # the network's x is so many times ours
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    told, c_in = (sigma if schedule.name == "edm" else t), scale
    if prediction in ("epsilon", "edm") and not (alpha > 0).all():
        raise ValueError(f"without signal {prediction} says nothing of x_0; take a schedule that ends with some, or another prediction")
    if prediction == "epsilon":
        px, pm = 1 / alpha, -sigma / alpha
    elif prediction == "v":
        px, pm = alpha, -sigma
    elif prediction == "x0":
        px, pm = zero, one
    elif prediction == "flow":
        px, pm = 1 / (alpha + sigma), -sigma / (alpha + sigma)
    else:  # Karras et al. 2022, table 1, for x / alpha at the level k
        k = sigma / alpha
        told, c_in = np.log(k) / 4, scale / alpha / np.sqrt(k**2 + sigma_data**2)
        px, pm = sigma_data**2 / (k**2 + sigma_data**2) / alpha, k * sigma_data / np.sqrt(k**2 + sigma_data**2)
    return _Reading(alpha / scale, sigma / scale, told, c_in, px * scale, pm)


def _at_timesteps(schedule: Schedule, t: np.ndarray, prediction: str, sigma_data: float) -> _Reading:
    return _reading(schedule, t.astype(np.float64), schedule.alpha[t], schedule.sigma[t], prediction, sigma_data)


def _check(schedule: Schedule, x0: object, prediction: str) -> None:
    if not isinstance(x0, Tensor) or x0.ndim < 2 or not x0.is_floating_point():
        raise ValueError("x0 must be images as a tensor of floating-point numbers, [N, *shape]")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; a likelihood is known for {', '.join(PREDICTIONS)}")
    if prediction == "v" and not schedule.preserving:
        raise ValueError(f"prediction 'v' is defined where alpha^2 + sigma^2 = 1, not for a schedule of {schedule.name!r}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and then in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _units(x0: Tensor) -> Tensor:
    """[d, N, *shape]: for every number of an image, the direction in which it alone changes."""
    d = x0[0].numel()
    return torch.eye(d, device=x0.device, dtype=x0.dtype).reshape(d, 1, *x0.shape[1:]).expand(d, *x0.shape)


def _signs(x0: Tensor, ids: range, seed: int, probes: int) -> Tensor:
    """[probes, N, *shape] of +1 and -1."""
    place = torch.tensor(ids, device=x0.device)
    return torch.stack([noise.normal(seed, place, 1 + k, x0.shape[1:], stream="draw").sign().to(x0.dtype) for k in range(probes)])


class _Walk:
    """The probability flow from the first timestep to the last, for micro-batches."""

    def __init__(self, model: nn.Module, schedule: Schedule, prediction: str, sigma_data: float, steps: int) -> None:
        ends = _at_timesteps(schedule, np.array([0, schedule.timesteps - 1]), prediction, sigma_data)
        if not ends.sigma[0] > 0:
            raise ValueError("the flow needs a schedule with noise at its first timestep")
        begin, end = np.log(ends.sigma / (1 + ends.alpha)).tolist()
        w = np.linspace(begin, end, 2 * steps + 1)  # each step's begin, middle and end
        # alpha = tanh(-w) and sigma = 1 / cosh(w). The ends are timesteps, so they shall not be a rounding error away from them.
        inner = [schedule.at(float(v)) for v in np.log(np.sinh(-w[1:-1]))]
        first, last = ((float(t), float(schedule.alpha[t]), float(schedule.sigma[t])) for t in (0, schedule.timesteps - 1))
        t, alpha, sigma = np.array([first, *inner, last]).T
        self.model, self.steps, self.h = model, steps, (end - begin) / steps
        self.reading = _reading(schedule, t, alpha, sigma, prediction, sigma_data)

    def __call__(self, x0: Tensor, labels: Tensor | None, directions: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(nats [N], standard error [N], latents) of one micro-batch."""
        dtype, dims, read, h = x0.dtype, x0[0].numel(), self.reading, self.h

        def slope(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
            """dx/dw, and its divergence along each direction, fp64 [directions, N]."""
            alpha = float(read.alpha[level])
            with torch.enable_grad():
                at = x.detach().to(dtype).requires_grad_()
                guess = read.guess(self.model, np.full(len(x), level), at, labels)
                grown = []
                for k, v in enumerate(directions):
                    (back,) = torch.autograd.grad(guess, at, v, retain_graph=k + 1 < len(directions))
                    grown.append((back * v).double().flatten(1).sum(1))
            along = torch.stack(grown)
            divergence = alpha * dims - (along.sum(0, keepdim=True) if exact else along)
            return alpha * x - guess.detach().double(), divergence.detach()

        x = float(read.alpha[0]) * x0.detach().double()
        total = torch.zeros(1 if exact else len(directions), len(x0), dtype=torch.float64, device=x0.device)
        for step in range(self.steps):
            k1, d1 = slope(x, 2 * step)
            k2, d2 = slope(x + h / 2 * k1, 2 * step + 1)
            k3, d3 = slope(x + h / 2 * k2, 2 * step + 1)
            k4, d4 = slope(x + h * k3, 2 * step + 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        # x at the end is of unit variance; at the beginning it was alpha x_0.
        last = -(x**2).flatten(1).sum(1) / 2 - dims * (math.log(2 * math.pi) / 2 - math.log(read.alpha[0]))
        nats = last + total
        error = nats.std(0) / math.sqrt(len(nats)) if len(nats) > 1 else torch.full_like(nats[0], 0.0 if exact else math.nan)
        return nats.mean(0), error, x.to(dtype)

"""Solvers as data: a schedule and a number of steps become a table of rows, one per network evaluation, in float64.

Every row is the same update, whatever the solver; `reference.solver_step` carries it out:

    m  = model(c_in x, t)
    x0 = clamp(px x + pm m, -clip, clip)
    x <- a x + b x0 + c x0_of_the_row_before + d m + s z

A solver is a function that fills the coefficients (a, b, c, d, s). What the network predicts lives in (px, pm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedules import Schedule, whole

PREDICTIONS = ("epsilon", "v", "x0")
SPACINGS = ("leading", "trailing", "linspace")
VARIANCES = ("posterior", "beta")


@dataclass(frozen=True)
class Table:
    """The rows of a solver. `timesteps`: int64 [rows], what the network is told. `rows`: float64 [rows, 9], columns as above plus c_next.

    `start`: standard deviation of x before the first row.
    """

    solver: str
    timesteps: np.ndarray
    rows: np.ndarray
    start: float = 1.0

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(coefficients fp32 [rows, 9], timesteps int64 [rows]) on a device."""
        return torch.from_numpy(self.rows).to(device, torch.float32), torch.from_numpy(self.timesteps).to(device)


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """`steps` of 0 .. `timesteps` - 1, falling, int64 (Lin et al. 2023, table 2, names the three ways).

    "leading" starts low and ends at 0; "linspace" holds both ends, from two steps on; "trailing" starts at the last timestep, where x_T is pure noise.
    """
    if not whole(steps) or not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps!r}; this schedule has {timesteps} timesteps, so give a whole number from 1 to {timesteps}")
    if spacing == "leading":
        t = np.arange(steps, dtype=np.float64)[::-1] * (timesteps // steps)
    elif spacing == "trailing":
        t = np.round(timesteps - np.arange(steps) * (timesteps / steps)) - 1
    elif spacing == "linspace":
        t = np.round(np.linspace(0, timesteps - 1, steps))[::-1]
    else:
        raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    return t.astype(np.int64)


@dataclass(frozen=True)
class Grid:
    """Signal and noise at each row's start, `alpha` and `sigma`, and after it, `alpha_next` and `sigma_next` (1 and 0 after the last)."""

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_next: np.ndarray
    sigma_next: np.ndarray


@dataclass
class Coefficients:
    """The five columns that a solver fills, float64 [rows]. `epsilon` weighs the network's own noise estimate: see `table`."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    s: np.ndarray
    epsilon: np.ndarray


def ddpm(grid: Grid, variance: str = "posterior") -> Coefficients:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on a subset of timesteps too (Nichol & Dhariwal 2021, equation 19).

    x0 and x are mixed by equation 7. variance: "posterior", beta-tilde_t of equation 7, or "beta", beta_t. The last row adds no noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    keep = (grid.alpha / grid.alpha_next) ** 2  # alpha_t of the paper between the two timesteps
    beta = 1 - keep
    noise = grid.sigma**2
    var = beta * grid.sigma_next**2 / noise if variance == "posterior" else np.where(grid.sigma_next > 0, beta, 0.0)
    zero = np.zeros_like(beta)
    a = np.sqrt(keep) * grid.sigma_next**2 / noise
    return Coefficients(a=a, b=grid.alpha_next * beta / noise, c=zero, s=np.sqrt(var), epsilon=zero)


def ddim(grid: Grid, eta: float = 0.0, clipped_epsilon: bool = True) -> Coefficients:
    """Denoising diffusion implicit models (Song et al. 2021, equations 12 and 16). eta: 0 is deterministic, 1 is DDPM's variance.

    clipped_epsilon: take the noise estimate from the clamped x0, as Dhariwal & Nichol's code does, rather than from the network. It is diffusers'
    `use_clipped_model_output`, which is off there; with guidance and few steps the sprites are much cleaner with it.
    """
    if not 0 <= eta < np.inf:
        raise ValueError(f"eta is {eta!r}; it must be finite and at least 0 (0: deterministic, 1: as noisy as DDPM)")
    s = eta * grid.sigma_next / grid.sigma * np.sqrt(1 - (grid.alpha / grid.alpha_next) ** 2)
    if (s > grid.sigma_next).any():
        raise ValueError(f"eta is {eta!r}; at this number of steps that asks for more noise than a row has")
    direction = np.sqrt(grid.sigma_next**2 - s**2)
    zero = np.zeros_like(s)
    if clipped_epsilon:  # epsilon = (x - alpha x0) / sigma
        a = direction / grid.sigma
        return Coefficients(a=a, b=grid.alpha_next - a * grid.alpha, c=zero, s=s, epsilon=zero)
    return Coefficients(a=zero, b=grid.alpha_next, c=zero, s=s, epsilon=direction)


def dpmpp_2m(grid: Grid) -> Coefficients:
    """DPM-Solver++(2M), second order, deterministic (Lu et al. 2022, "DPM-Solver++", algorithm 2). First order in the first and last row."""
    with np.errstate(divide="ignore"):
        lam = np.log(grid.alpha / grid.sigma)
        h = np.log(grid.alpha_next / grid.sigma_next) - lam  # infinite in the last row, where sigma_next is 0
    a = grid.sigma_next / grid.sigma
    gain = grid.alpha_next * -np.expm1(-h)
    half_over_r = np.zeros_like(h)  # 1 / (2 r), r = (step before) / (this step)
    np.divide(h[1:-1], 2 * h[:-2], out=half_over_r[1:-1], where=h[:-2] > 0)  # a step of no length has nothing to say of the next
    zero = np.zeros_like(h)
    return Coefficients(a=a, b=gain * (1 + half_over_r), c=-gain * half_over_r, s=zero, epsilon=zero)


_SOLVERS: dict[str, Callable[..., Coefficients]] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def names() -> list[str]:
    """The solvers that `table`, `Sampler` and `--solver` know."""
    return list(_SOLVERS)


def table(
    solver: str,
    schedule: Schedule,
    *,
    steps: int = 20,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    spacing: str | None = None,
    **options: Any,
) -> Table:
    """The rows of a solver for a schedule. clip: x0 is clamped to [-clip, clip], None for not at all. options: the solver's own (eta, variance).

    spacing: see `spaced_timesteps`. The default is the solver's: "linspace" for dpmpp_2m, whose last row, of first order, should be short, and
    "trailing" for the others and for a single step.

    ValueError for an unknown solver, prediction, spacing or option, and for steps outside 1 .. T.
    """
    if solver not in _SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(_SOLVERS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip!r}; give a positive number, or None for no clamping of x0")
    if spacing is None:
        spacing = "linspace" if solver == "dpmpp_2m" and steps != 1 else "trailing"
    t = spaced_timesteps(schedule.timesteps, steps, spacing)
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    if (sigma == 0).any():
        raise ValueError("the schedule has timesteps without noise (alpha_bar = 1), where no solver step is defined")
    grid = Grid(alpha, sigma, np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0))
    try:
        k = _SOLVERS[solver](grid, **options)
    except TypeError:
        raise ValueError(f"solver {solver!r} does not take {', '.join(options)} with these values") from None

    # x0 = px x + pm m, and the noise estimate epsilon = ex x + em m.
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    if prediction == "epsilon":
        px, pm, ex, em = 1 / alpha, -sigma / alpha, zero, one
    elif prediction == "v":  # Salimans & Ho 2022, appendix D: v = alpha epsilon - sigma x0
        px, pm, ex, em = alpha, -sigma, sigma, alpha
    elif prediction == "x0":
        px, pm, ex, em = zero, one, 1 / sigma, -alpha / sigma
    else:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    limit = np.full_like(alpha, np.inf if clip is None else clip)
    rows = np.stack([px, pm, limit, k.a + k.epsilon * ex, k.b, k.c, k.epsilon * em, k.s, one], axis=1)
    return Table(solver, t, rows)

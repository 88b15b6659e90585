"""Solvers as data: a schedule and a number of steps become a table of rows, one per network evaluation, in float64.

Every row is the same update, whatever the solver; `reference.solver_step` carries it out:

    m  = model(c_in x, t)
    x0 = clamp(px x + pm m, -clip, clip)
    x <- a x + b x0 + c x0_of_the_row_before + d m + sum_k h_k saved_k + s z;    saved_slot <- save_x x + save_x0 x0

A solver is a function from a grid of noise levels to rows. What the network predicts lives in (px, pm), filled in by `table`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .reference import COLUMNS, SLOTS
from .schedules import Schedule, karras, number, whole

PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")
SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras")
VARIANCES = ("posterior", "beta", "learned")


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma z. `t` is where it stands in the schedule, a fraction between timesteps."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """ln(alpha / sigma): inf without noise, -inf without signal."""
        if self.alpha == 0 or self.sigma == 0:
            return -math.inf if self.alpha == 0 else math.inf
        return math.log(self.alpha / self.sigma)


CLEAN = Level(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Grid:
    """The levels that a solver steps between, the first the noisiest and the last where it ends, and the schedule that lies between them."""

    levels: tuple[Level, ...]
    schedule: Schedule

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @cached_property
    def h(self) -> list[float]:
        """The length of every step in the log-SNR."""
        return [b.log_snr - a.log_snr if a[1:] != b[1:] else 0.0 for a, b in pairwise(self.levels)]

    def between(self, log_snr: float) -> Level:
        return Level(*self.schedule.at(log_snr))

    def scale(self, level: Level) -> float:
        """w, where x / w is what moves on a straight line, at time k = sigma / w, while x0 stays: alpha, but 1 in flow matching."""
        if self.schedule.name == "flow":
            return 1.0
        if not level.alpha:
            raise ValueError(
                "this solver steps in sigma / alpha, which is infinite at a timestep without signal; take ddpm, ddim, unipc or a dpmpp_2 or _3 solver"
            )
        return level.alpha

    def reach(self, i: int, most: int) -> int:
        """How many steps before step i a multistep solver may look back on, up to `most`: those of some length, and not from pure noise."""
        n = 0
        while n < min(most, i) and 0 < abs(self.h[i - 1 - n]) < math.inf:
            n += 1
        return n if self.h[i] else 0


@dataclass(frozen=True)
class Row:
    """What a solver says of one row. x at level `at` goes to

        a x + b x0 + c x0_before + epsilon e + sum_k past[k] saved k + 1 rows ago + s exp(log_s v) z

    where e is the network's noise estimate, and v what it has learned of its variance. save: weights of x, as it was, and x0 in what this
    row saves. start: standard deviation of x, in the first row, where it is not the schedule's.
    """

    at: Level
    a: float
    b: float
    c: float = 0.0
    epsilon: float = 0.0
    s: float = 0.0
    past: tuple[float, ...] = ()
    save: tuple[float, float] | None = None
    log_s: float = 0.0
    start: float | None = None


def transfer(now: Level, after: Level) -> Row:
    """To `after` with x0 and the noise estimate both kept (Song et al. 2021, equation 12, eta = 0): the first-order step of every solver."""
    a = after.sigma / now.sigma
    return Row(now, a, after.alpha - a * now.alpha)


def ancestral(now: Level, after: Level, eta: float) -> tuple[Level, float]:
    """Where a deterministic step must lead, and the noise to add, for `after`; eta 1 is DDPM's posterior variance, 0 is none."""
    if not eta:
        return after, 0.0
    keep = now.alpha / after.alpha
    s = eta * after.sigma / now.sigma * math.sqrt(max(now.sigma**2 - (keep * after.sigma) ** 2, 0.0))
    # s^2 and sigma^2 round apart by some ulps where they are equal in exact arithmetic.
    if s > after.sigma * (1 + 1e-12):
        raise ValueError(f"eta is {eta!r}; at this number of steps that asks for more noise than a row has")
    return Level(after.t, after.alpha, math.sqrt(max(after.sigma**2 - s**2, 0.0))), s


def ddpm(grid: Grid, variance: str = "posterior") -> Iterator[Row]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on a subset of timesteps too (Nichol & Dhariwal 2021, equation 19).

    x0 and x are mixed by equation 7. variance: "posterior", beta-tilde_t of equation 7; "beta", beta_t; or "learned", between the two
    as the network says in as many channels more (Nichol & Dhariwal 2021, equation 15). The last row adds no noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}{_near(variance, VARIANCES)}")
    for now, after in pairwise(grid.levels):
        keep = now.alpha / after.alpha  # the square root of alpha_t of the paper, between the two timesteps
        # Not below 0, where the two levels are one but for rounding.
        beta = max(1 - keep**2 if grid.schedule.preserving else now.sigma**2 - (keep * after.sigma) ** 2, 0.0)
        small, large = beta * after.sigma**2 / now.sigma**2, beta if after.sigma else 0.0
        row = Row(now, keep * after.sigma**2 / now.sigma**2, after.alpha * beta / now.sigma**2)
        if variance == "learned" and small > 0:  # log variance = (1 + v) / 2 log large + (1 - v) / 2 log small
            yield replace(row, s=(small * large) ** 0.25, log_s=math.log(large / small) / 4)
        else:
            yield replace(row, s=math.sqrt(large if variance == "beta" else small))


def ddim(grid: Grid, eta: float = 0.0, clipped_epsilon: bool = True) -> Iterator[Row]:
    """Denoising diffusion implicit models (Song et al. 2021, equations 12 and 16). eta: 0 is deterministic, 1 is DDPM's variance.

    clipped_epsilon: take the noise estimate from the clamped x0, as Dhariwal & Nichol's code does, rather than from the network. It is diffusers'
    `use_clipped_model_output`, which is off there; with guidance and few steps the sprites are much cleaner with it.
    """
    _check("eta", eta, "0: deterministic, 1: as noisy as DDPM")
    for now, after in pairwise(grid.levels):
        down, s = ancestral(now, after, eta)
        if clipped_epsilon:
            yield replace(transfer(now, down), s=s)
        else:
            yield Row(now, 0.0, after.alpha, epsilon=down.sigma, s=s)


def euler(grid: Grid) -> Iterator[Row]:
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 1 without its second half; in flow matching, on the flow).

    In these variables it is `ddim` with eta 0: both move x along the line through x and x0.
    """
    yield from (transfer(now, after) for now, after in pairwise(grid.levels))


def euler_ancestral(grid: Grid, eta: float = 1.0) -> Iterator[Row]:
    """Euler's method with fresh noise in every step (k-diffusion, `sample_euler_ancestral`; `ddim` with eta, in these variables)."""
    _check("eta", eta, "0: deterministic, 1: as noisy as DDPM")
    yield from ddim(grid, eta)


def heun(grid: Grid) -> Iterator[Row]:
    """Heun's method, two rows a step, second order (Karras et al. 2022, algorithm 1; in flow matching, on the flow). The last step is Euler's."""
    for now, after in pairwise(grid.levels):
        yield _line(grid, now, after)
        if after.sigma:
            yield _correct(grid, now, after)


def edm_heun(
    grid: Grid, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, churn_noise: float = 1.0
) -> Iterator[Row]:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): before a step of `heun`, noise is added and the level raised by gamma.

    gamma = min(churn / steps, sqrt(2) - 1) where churn_min <= sigma / alpha <= churn_max; churn_noise scales the noise (S_churn, S_tmin,
    S_tmax and S_noise of the paper). The noise is added by the row before, so its z is that row's; the first level's is part of x_T.
    """
    for name, value in (("churn", churn), ("churn_min", churn_min), ("churn_noise", churn_noise)):
        _check(name, value)
    if churn and grid.schedule.name == "flow":
        raise ValueError("churn adds noise and keeps the signal, which leaves the path of a flow schedule; give churn=0")
    gamma = min(churn / grid.steps, math.sqrt(2) - 1)

    def churned(level: Level) -> tuple[Level, float]:
        """The raised level and the noise that raises x / alpha to it."""
        k = level.sigma / level.alpha if level.alpha else math.inf
        if not gamma or not level.sigma or not churn_min <= k <= churn_max:
            return level, 0.0
        return grid.between(level.log_snr - math.log1p(gamma)), churn_noise * k * math.sqrt((1 + gamma) ** 2 - 1)

    first = grid.levels[0]
    now, extra = churned(first)
    start = None if now == first else now.alpha * math.hypot(_start(grid) / first.alpha, extra)
    for i, after in enumerate(grid.levels[1:], start=1):
        following, extra = churned(after) if i < grid.steps else (after, 0.0)
        rows = [_line(grid, now, after)]
        if after.sigma:
            rows.append(_correct(grid, now, after))
        w = following.alpha / after.alpha if following != after else 1.0
        rows[-1] = replace(rows[-1], a=w * rows[-1].a, b=w * rows[-1].b, c=w * rows[-1].c, s=following.alpha * extra)
        rows[0] = replace(rows[0], start=start)
        yield from rows
        now, start = following, None


def dpm_2(grid: Grid) -> Iterator[Row]:
    """The midpoint method with the middle at the geometric mean, two rows a step, second order (k-diffusion, `sample_dpm_2`, after
    Karras et al. 2022 and Lu et al. 2022, DPM-Solver-2). The last step is Euler's."""
    for now, after in pairwise(grid.levels):
        if not after.sigma or after[1:] == now[1:]:
            yield _line(grid, now, after)
            continue
        w, w_after = grid.scale(now), grid.scale(after)
        k, k_after = now.sigma / w, after.sigma / w_after
        k_mid = math.sqrt(k * k_after)
        mid = grid.between(math.log((1 - k_mid) / k_mid) if grid.schedule.name == "flow" else -math.log(k_mid))
        yield _line(grid, now, mid)
        # With y = x / w: y' = y + (k' - k) (y_mid - x0_mid) / k_mid, and y = (y_mid - (1 - r) x0) / r, r = k_mid / k.
        r, jump = k_mid / k, (k_after - k) / k_mid
        yield Row(mid, w_after / grid.scale(mid) * (1 / r + jump), -w_after * jump, c=-w_after * (1 - r) / r)


def dpmpp_2s_ancestral(grid: Grid, eta: float = 1.0) -> Iterator[Row]:
    """DPM-Solver++(2S) with fresh noise in every step, two rows a step (Lu et al. 2022, "DPM-Solver++", algorithm 1; k-diffusion,
    `sample_dpmpp_2s_ancestral`). eta 0 is second order. A step to no noise, or from no signal, is one row."""
    _check("eta", eta, "0: deterministic, 1: as noisy as DDPM")
    for now, after in pairwise(grid.levels):
        down, s = ancestral(now, after, eta)
        if not down.sigma or not now.alpha or not down.alpha or down[1:] == now[1:]:
            yield replace(transfer(now, down), s=s)
            continue
        mid = grid.between((now.log_snr + down.log_snr) / 2)
        yield transfer(now, mid)
        # With y = x / alpha, k = sigma / alpha: y' = R y + (1 - R) x0_mid, and y = (y_mid - (1 - r) x0) / r.
        r, whole_r = math.exp(now.log_snr - mid.log_snr), math.exp(now.log_snr - down.log_snr)
        yield Row(mid, after.alpha / mid.alpha * whole_r / r, after.alpha * (1 - whole_r), c=-after.alpha * whole_r * (1 - r) / r, s=s)


def dpmpp_2m(grid: Grid) -> Iterator[Row]:
    """DPM-Solver++(2M), second order, deterministic (Lu et al. 2022, "DPM-Solver++", algorithm 2). First order in the first and last row."""
    yield from dpmpp_2m_sde(grid, eta=0.0)


def dpmpp_2m_sde(grid: Grid, eta: float = 1.0, solver_type: str = "midpoint") -> Iterator[Row]:
    """SDE-DPM-Solver++(2M), with fresh noise in every step (Lu et al. 2022, "DPM-Solver++", appendix; k-diffusion, `sample_dpmpp_2m_sde`).

    eta: 0 is `dpmpp_2m`, 1 the reverse diffusion's own noise. solver_type: "midpoint" or "heun". First order in the first and last row.
    """
    _check("eta", eta, "0: deterministic, 1: the reverse diffusion's noise")
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"unknown solver_type {solver_type!r}; known: midpoint, heun")
    for i, (now, after) in enumerate(pairwise(grid.levels)):
        if not after.sigma or not after.alpha or not grid.h[i]:
            yield transfer(now, after)
            continue
        h = grid.h[i]
        noisy = eta * h if eta else 0.0
        weight = 0.0  # of (x0 - x0_before), over the ratio of the steps
        if grid.reach(i, 1):
            weight = (
                (_one_minus(h + noisy) / 2 if solver_type == "midpoint" else 1 - _one_minus(h + noisy) / (h + noisy)) * h / grid.h[i - 1]
            )
        yield Row(
            now,
            after.sigma / now.sigma * math.exp(-noisy),
            after.alpha * (_one_minus(h + noisy) + weight),
            c=-after.alpha * weight,
            s=after.sigma * math.sqrt(_one_minus(2 * noisy)),
        )


def dpmpp_3m_sde(grid: Grid, eta: float = 1.0) -> Iterator[Row]:
    """SDE-DPM-Solver++(3M) as k-diffusion has it (`sample_dpmpp_3m_sde`; Lu et al. 2022, "DPM-Solver++", section 4.2).

    With x0 of three rows, but second order where it is measured (eta 0): of the second derivative the formula takes half.

    eta: 0 is deterministic, 1 the reverse diffusion's own noise. First and second order in the first two rows, first in the last.
    """
    _check("eta", eta, "0: deterministic, 1: the reverse diffusion's noise")
    for i, (now, after) in enumerate(pairwise(grid.levels)):
        keep = (0.0, 1.0)
        if not after.sigma or not after.alpha or not grid.h[i]:
            yield replace(transfer(now, after), save=keep)
            continue
        h = grid.h[i]
        noisy = eta * h if eta else 0.0
        span = h + noisy
        phi_1 = _one_minus(span)
        phi_2 = 1 - phi_1 / span
        reach = grid.reach(i, 2)
        weights = np.array([phi_1, 0.0, 0.0])  # of x0, the one before and the one before that
        if reach == 1:
            weights += phi_2 * h / grid.h[i - 1] * np.array([1, -1, 0])
        elif reach == 2:
            r0, r1 = grid.h[i - 1] / h, grid.h[i - 2] / h
            near, far = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
            bend = (near - far) / (r0 + r1)
            weights += phi_2 * (near + bend * r0) - (phi_2 / span - 0.5) * bend
        b, c, older = (after.alpha * weights).tolist()
        s = after.sigma * math.sqrt(_one_minus(2 * noisy))
        yield Row(now, after.sigma / now.sigma * math.exp(-noisy), b, c=c, past=(0.0, older), s=s, save=keep)


def ipndm(grid: Grid, order: int = 4) -> Iterator[Row]:
    """Improved pseudo numerical methods (Zhang & Chen 2023, "DEIS", section 3; Liu et al. 2022): Adams-Bashforth on the slope dx/dk.

    With y = x / w and k = sigma / w, the slope is (y - x0) / k, the noise estimate, or in flow matching the velocity. order: 1 to 4; the
    full order holds for even steps in k. The first rows have fewer slopes to go by; the last row is first order and ends at x0.
    """
    if not whole(order) or not 1 <= order <= 4:
        raise ValueError(f"order is {order!r}; ipndm has orders 1 to 4")
    bashforth = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    for i, (now, after) in enumerate(pairwise(grid.levels)):
        w, w_after = grid.scale(now), grid.scale(after)
        slope = 1 / now.sigma, -w / now.sigma
        if not after.sigma:
            yield replace(_line(grid, now, after), save=slope)
            continue
        first, *rest = (w_after * (after.sigma / w_after - now.sigma / w) * v for v in bashforth[min(order - 1, i)])
        yield Row(now, w_after / w + first * slope[0], first * slope[1], past=tuple(rest), save=slope)


def unipc(grid: Grid, order: int = 2, variant: str = "bh2") -> Iterator[Row]:
    """UniPC (Zhao et al. 2023, algorithms 5 to 8, x0 prediction): predicts to the next level, and there corrects with the network's answer.

    Both in one row: with x the prediction, made in the row before, the corrected x is x plus a difference of x0's, so that no second state
    is kept. order: 1 to 3; the predictor's, and a corrected step is one more. variant: "bh1" or "bh2", B(h) of the paper. The first rows
    have lower order, and so have the last ones; the last row ends at x0.
    """
    if not whole(order) or not 1 <= order <= 3:
        raise ValueError(f"order is {order!r}; unipc has orders 1 to 3")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unknown variant {variant!r}; known: bh1, bh2")

    def weights(i: int, p: int, corrector: bool) -> np.ndarray:
        """Of (x0, one before, ...) in alpha' B(h) sum rho D / r for step i; the corrector's first x0 is the one after the step."""
        h = grid.h[i]
        base = -math.expm1(-h) if variant == "bh2" else h  # -B(h)
        size = p if corrector else p - 1
        r = np.array([*([1.0] if corrector else []), *((grid.levels[i - j].log_snr - grid.levels[i].log_snr) / h for j in range(1, p))])
        phi, want = math.expm1(-h) / -h - 1, []
        for n in range(1, size + 1):
            want.append(phi * math.factorial(n) / -base)
            phi = phi / -h - 1 / math.factorial(n + 1)
        rho = np.array([0.5])  # the paper's choice of one, within the order of the equation's solution
        if size != 1:
            rho = np.linalg.solve(np.vander(r, size, increasing=True).T, np.array(want)) if size else np.zeros(0)
        out = np.zeros(p + 1)  # D = x0_r - x0_now, in the corrector x0_now is the second
        here = 1 if corrector else 0
        for n in range(size):
            place = 0 if corrector and n == 0 else n + 1
            out[place] += rho[n] / r[n]
            out[here] -= rho[n] / r[n]
        return grid.levels[i + 1].alpha * base * out

    before = 0  # the order of the step that led here, 0 where there is nothing to correct
    for i, (now, after) in enumerate(pairwise(grid.levels)):
        shift = np.zeros(SLOTS + 1)  # corrected x - x, as weights of x0, the one before, ...
        if before:
            shift[: before + 1] += weights(i - 1, before, corrector=True)
            shift[1 : before + 1] -= weights(i - 1, before, corrector=False)[:before]
        first = transfer(now, after)
        out = first.a * shift
        out[0] += first.b
        p = min(order, 1 + grid.reach(i, order - 1), grid.steps - i) if after.sigma and after.alpha else 1
        if p > 1:
            out[:p] += weights(i, p, corrector=False)[:p]
        b, c, *older = out.tolist()
        yield Row(now, first.a, b, c=c, past=(0.0, *older), save=(0.0, 1.0))
        before = p if 0 < abs(grid.h[i]) < math.inf else 0


def _one_minus(h: float) -> float:
    """1 - exp(-h)."""
    return -math.expm1(-h)


def _line(grid: Grid, now: Level, after: Level) -> Row:
    """Euler's step of x / w in k = sigma / w."""
    w, w_after = grid.scale(now), grid.scale(after)
    r = after.sigma / w_after / (now.sigma / w)
    return Row(now, w_after / w * r, w_after * (1 - r))


def _correct(grid: Grid, now: Level, after: Level) -> Row:
    """The second row of Heun's step: y' = y + (k' - k) / 2 (slope + slope'), all from y at `after`, its x0 and the x0 before."""
    w, w_after = grid.scale(now), grid.scale(after)
    r = after.sigma / w_after / (now.sigma / w)
    weight = w_after * (1 - r) / (2 * r)
    return Row(after, 1.0, weight, c=-weight)


def _start(grid: Grid) -> float:
    """Standard deviation of x at the first level where there is nothing but noise: of unit variance, or as much as the schedule has added."""
    return 1.0 if grid.schedule.preserving else grid.levels[0].sigma


def _check(name: str, value: float, meaning: str = "") -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be finite and at least 0{f' ({meaning})' if meaning else ''}")


def _near(name: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


_SOLVERS: dict[str, Callable[..., Iterator[Row]]] = {
    f.__name__: f
    for f in (
        ddpm, ddim, euler, euler_ancestral, heun, dpm_2, dpmpp_2s_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ipndm, unipc, edm_heun
    )
}  # fmt: skip


def names() -> list[str]:
    """The solvers that `table`, `Sampler` and `--solver` know."""
    return list(_SOLVERS)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a solver, [R] of them, one per network evaluation.

    timesteps: [R], what the network is told, int64 where all are whole, else float64. rows: float64 [R, 16], columns as `reference.COLUMNS`.
    levels: float64 [R + 1, 2], alpha and sigma of x before each row and after the last. start: standard deviation of x before the first row
    where it is pure noise. scale: what x is multiplied by before the network sees it in the first row. learned: whether the network must
    say its variance in as many channels more.
    """

    solver: str
    timesteps: np.ndarray
    rows: np.ndarray
    levels: np.ndarray
    start: float = 1.0
    scale: float = 1.0
    learned: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """A column by its name, float64 [R]."""
        return self.rows[:, COLUMNS.index(name)]

    @property
    def history(self) -> bool:
        """Whether a row looks at a saved value, beside the x0 of the row before."""
        return bool((self.column("slot") >= 0).any())

    def severed(self) -> int | None:
        """The first row that looks back on what no row before it has left, as one may of rows that are cut out of a table; None where there is none."""
        number, slot = np.arange(len(self)), self.column("slot")
        looks = (self.column("c") != 0) & (number == 0)
        for k in range(SLOTS):
            looks |= (self.column(f"h{k}") != 0) & (np.cumsum(slot == k) - (slot == k) == 0)
        return int(looks.argmax()) if looks.any() else None

    def given_x0(self) -> Table:
        """The same rows for a network that says x0 itself; whatever they took of its own noise estimate then comes from that x0."""
        alpha, sigma = self.levels[:-1].T
        rows = self.rows.copy()
        px, pm, a, d = (COLUMNS.index(name) for name in ("px", "pm", "a", "d"))
        # epsilon = (x - alpha (px x + pm m)) / sigma, of which d holds the part of m, and a the part of x.
        epsilon = np.divide(-self.rows[:, d] * sigma, alpha * self.rows[:, pm], out=np.zeros(len(self)), where=self.rows[:, d] != 0)
        rows[:, a] += epsilon * alpha * self.rows[:, px] / sigma
        rows[:, d] = -epsilon * alpha / sigma
        rows[:, px], rows[:, pm] = 0, 1
        return replace(self, rows=rows)

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(rows fp32 [R, 16], timesteps int64 or fp32 [R]) on a device."""
        t = torch.from_numpy(self.timesteps)
        return torch.from_numpy(self.rows).to(device, torch.float32), t.to(device, torch.float32 if t.is_floating_point() else torch.int64)


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """`steps` of 0 .. `timesteps` - 1, falling, int64 (Lin et al. 2023, table 2, names the three ways).

    "leading" starts low and ends at 0; "linspace" holds both ends, from two steps on; "trailing" starts at the last timestep, where x_T is pure noise.
    """
    _check_steps(timesteps, steps)
    if spacing == "leading":
        t = np.arange(steps, dtype=np.float64)[::-1] * (timesteps // steps)
    elif spacing == "trailing":
        t = np.round(timesteps - np.arange(steps) * (timesteps / steps)) - 1
    elif spacing == "linspace":
        t = np.round(np.linspace(0, timesteps - 1, steps))[::-1]
    else:
        raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}{_near(spacing, SPACINGS)}")
    return t.astype(np.int64)


def _check_steps(timesteps: int, steps: int) -> None:
    if not whole(steps) or not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps!r}; this schedule has {timesteps} timesteps, so give a whole number from 1 to {timesteps}")


def spaced_levels(schedule: Schedule, steps: int, spacing: str) -> list[Level]:
    """The noise levels of `steps` rows, falling: at timesteps (see `spaced_timesteps`), or between them from the last timestep to the first.

    "logsnr" is even in the log-SNR (Lu et al. 2022, DPM-Solver, section 3.4), "karras" in (sigma / alpha)^(1 / 7), or 1 / rho of an edm
    schedule (Karras et al. 2022, equation 5). ValueError for those two where the schedule starts without signal, as a flow does.
    """
    if spacing not in ("logsnr", "karras"):
        t = spaced_timesteps(schedule.timesteps, steps, spacing)
        return [Level(float(i), float(schedule.alpha[i]), float(schedule.sigma[i])) for i in t]
    _check_steps(schedule.timesteps, steps)
    ends = schedule.log_snr[[-1, 0]]
    if not np.isfinite(ends).all():
        raise ValueError(
            f"spacing {spacing!r} needs signal and noise at both ends of the schedule; this one has one only: take linspace or trailing"
        )
    if spacing == "logsnr":
        inner = np.linspace(ends[0], ends[1], steps)
    else:
        inner = -np.log(
            karras(math.exp(-ends[0]), math.exp(-ends[1]), steps, dict(schedule.params)["rho"] if schedule.name == "edm" else 7.0)
        )
    levels = [Level(*schedule.at(v)) for v in inner]
    # The ends are timesteps, so they shall not be a rounding error away from them.
    for i, end in ((0, schedule.timesteps - 1), (-1, 0)):
        if steps > 1 or i == 0:
            levels[i] = Level(float(end), float(schedule.alpha[end]), float(schedule.sigma[end]))
    return levels


def default_spacing(solver: str, schedule: Schedule, steps: int) -> str:
    """The spacing that suits a solver.

    "karras" for an edm schedule; "trailing" for a single step and where a row is one first-order step; "logsnr" for heun and the multistep
    SDE solvers, which go wrong in long steps near pure noise, if the schedule has signal there; "linspace" for the others, since their last
    row, of first order, should be short.
    """
    if schedule.name == "edm":
        return "karras"
    if steps == 1 or solver in ("ddpm", "ddim", "euler", "euler_ancestral"):
        return "trailing"
    return "logsnr" if solver in ("heun", "edm_heun", "dpmpp_2m_sde", "dpmpp_3m_sde") and schedule.alpha[-1] > 0 else "linspace"


def table(
    solver: str,
    schedule: Schedule,
    *,
    steps: int = 20,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    strength: float = 1.0,
    denoise: bool = True,
    invert: bool = False,
    resample: int = 1,
    jump: int = 1,
    sigma_data: float = 0.5,
    **options: Any,
) -> Table:
    """The rows of a solver for a schedule. options: the solver's own, see its function (eta, variance, order, churn, ...).

    prediction: "epsilon", "v", "x0", "flow" (velocity z - x_0), or "edm", the raw network F of Karras et al. 2022, which sees c_in x, is told
    c_noise = ln(sigma) / 4 and answers within c_skip and c_out (table 1, with `sigma_data`). clip: x0 is clamped to [-clip, clip], None for
    not at all. spacing: see `spaced_levels`; the default is the solver's. timesteps: the solver's own choice of falling timesteps, instead
    of steps and spacing. strength: only the last part of the steps, for a start from given images. denoise: end without noise, or, False,
    at timestep 0. invert: from an image, taken for one at timestep 0, up to noise, for a solver that adds none. resample, jump: every `jump`
    steps go back up as many levels, so that each is walked `resample` times (RePaint: Lugmayr et al. 2022, figure 9), for a solver without
    memory.

    ValueError for an unknown solver, prediction, spacing or option, and for steps outside 1 .. T.
    """
    if not isinstance(solver, str) or solver not in _SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(_SOLVERS)}{_near(solver, list(_SOLVERS))}")
    if clip is not None and (not (number(clip) or clip == math.inf) or not clip > 0):
        raise ValueError(f"clip is {clip!r}; give a positive number, or None for no clamping of x0")
    if not number(sigma_data) or not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data is {sigma_data!r}; give the standard deviation of the data, a positive number")
    if not number(strength) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}; give a number above 0, and at most 1, all of the steps")
    if timesteps is not None:
        if spacing is not None:
            raise ValueError("give either timesteps or spacing")
        levels = _own_timesteps(schedule, timesteps)
    else:
        if not whole(steps):
            _check_steps(schedule.timesteps, steps)
        levels = spaced_levels(schedule, steps, spacing or default_spacing(solver, schedule, steps))
    first = Level(0.0, *schedule.noise_at(0.0))
    if any(level.sigma == 0 for level in (*levels, *([first] if invert else []))):
        raise ValueError("the schedule has timesteps without noise (alpha_bar = 1), where no solver step is defined")
    walked = max(round(strength * len(levels)), 1)
    levels = levels[len(levels) - walked :]
    ends = [CLEAN] if denoise and not invert else [first] if levels[-1][1:] != first[1:] else []
    takes = list(inspect.signature(_SOLVERS[solver]).parameters)[1:]
    if unknown := [name for name in options if name not in takes]:
        raise ValueError(f"solver {solver!r} does not take {', '.join(unknown)}; it takes {', '.join(takes) or 'no options'}")
    for name, value in {"denoise": denoise, "invert": invert, **options}.items():
        kind = bool if name in ("denoise", "invert") else type(inspect.signature(_SOLVERS[solver]).parameters[name].default)
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; give True or False")
    grid = Grid((*levels, *ends), schedule)
    if not grid.steps:
        raise ValueError(
            "there is nothing to walk: a run without denoising ends at timestep 0, where an inversion starts, and that is all there is; take more steps"
        )
    try:
        rows = list(_SOLVERS[solver](grid, **options))
        if invert and any(row.s or row.start for row in rows):
            raise ValueError(
                f"solver {solver!r} adds noise with these options; inversion needs one that does not (eta=0, or ddim, heun, ...)"
            )
        if invert:
            grid = Grid(grid.levels[::-1], schedule)
            rows = list(_SOLVERS[solver](grid, **options))
    except TypeError:
        raise ValueError(f"solver {solver!r} does not take {', '.join(options)} with these values") from None
    if invert and (resample != 1 or jump != 1):
        raise ValueError("resampling goes down and up again on the way to an image; it has no part in an inversion")
    if resample != 1 or jump != 1:
        rows = _resampled(rows, grid, resample, jump)
    return _filled(solver, rows, grid, prediction, clip, sigma_data)


def _own_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> list[Level]:
    try:
        t = np.asarray(timesteps, dtype=np.float64)
    except (TypeError, ValueError):
        t = np.zeros(0)
    if t.ndim != 1 or not len(t) or not (np.diff(t) < 0).all() or not 0 <= t[-1] <= t[0] <= schedule.timesteps - 1:
        raise ValueError(f"timesteps must be a falling list of numbers within 0 .. {schedule.timesteps - 1}")
    return [Level(float(v), *schedule.noise_at(float(v))) for v in t]


def _resampled(rows: list[Row], grid: Grid, resample: int, jump: int) -> list[Row]:
    """Rows that go back up. One that leads to where x is raised again does both at once, for the two are one affine map:
    x' = rho x + sqrt(sigma'^2 - rho^2 sigma^2) z raises alpha x_0 + sigma z to alpha' x_0 + sigma' z, rho = alpha' / alpha."""
    if not whole(resample) or resample < 1 or not whole(jump) or jump < 1:
        raise ValueError(f"resample is {resample!r} and jump is {jump!r}; give whole numbers of at least 1")
    n = len(rows)
    if any(r.log_s for r in rows):
        raise ValueError("resampling adds up what is noise, and cannot with a learned variance; take variance='posterior' or 'beta'")
    if n != grid.steps or any(r.c or any(r.past) or r.save for r in rows):
        raise ValueError("resampling needs a solver with one row a step and no memory: ddpm, ddim, euler or euler_ancestral")
    left = dict.fromkeys(range(0, n - jump, jump), resample - 1)  # by the steps that remain after the next, as in the paper's code
    out, i = [], 0
    while i < n:
        row = rows[i]
        i += 1
        if left.get(n - 1 - i, 0):
            left[n - 1 - i] -= 1
            here, back = grid.levels[i], grid.levels[i - jump]
            rho = back.alpha / here.alpha
            s = math.hypot(rho * row.s, math.sqrt(max(back.sigma**2 - (rho * here.sigma) ** 2, 0.0)))
            row = replace(row, a=rho * row.a, b=rho * row.b, epsilon=rho * row.epsilon, s=s)
            i -= jump
        out.append(row)
    return out


def _filled(solver: str, rows: list[Row], grid: Grid, prediction: str, clip: float | None, sigma_data: float) -> Table:
    """The table: what the network predicts turned into x0 and noise, and saved values given their places."""
    t, alpha, sigma = np.array([row.at for row in rows]).T
    schedule, told, c_in = grid.schedule, t, np.ones_like(alpha)
    if schedule.name == "edm":
        told = sigma
    # x0 = px x + pm m, and the noise estimate epsilon = ex x + em m.
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    if prediction in ("epsilon", "edm") and (alpha == 0).any():
        raise ValueError(
            f"at pure noise, without signal, {prediction} says nothing of x0; take a prediction of v, x0 or flow, or other steps"
        )
    if prediction == "epsilon":
        px, pm, ex, em = 1 / alpha, -sigma / alpha, zero, one
    elif prediction == "v":  # Salimans & Ho 2022, appendix D: v = alpha epsilon - sigma x0
        if not schedule.preserving:
            raise ValueError(
                f"prediction 'v' is defined where alpha^2 + sigma^2 = 1, not for a schedule of {schedule.name!r}; take 'flow' or 'x0'"
            )
        px, pm, ex, em = alpha, -sigma, sigma, alpha
    elif prediction == "x0":
        px, pm, ex, em = zero, one, 1 / sigma, -alpha / sigma
    elif prediction == "flow":  # u = epsilon - x0
        px, pm, ex, em = 1 / (alpha + sigma), -sigma / (alpha + sigma), 1 / (alpha + sigma), alpha / (alpha + sigma)
    elif prediction == "edm":  # Karras et al. 2022, table 1, for x / alpha at the level k = sigma / alpha
        k = sigma / alpha
        px, pm = sigma_data**2 / (k**2 + sigma_data**2) / alpha, k * sigma_data / np.sqrt(k**2 + sigma_data**2)
        ex, em = (1 - alpha * px) / sigma, -alpha * pm / sigma
        c_in, told = 1 / np.sqrt(k**2 + sigma_data**2) / alpha, np.log(k) / 4
    else:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}{_near(prediction, PREDICTIONS)}")

    n = len(rows)
    a, b, c, epsilon, s, log_s = (np.array([getattr(row, key) for row in rows]) for key in ("a", "b", "c", "epsilon", "s", "log_s"))
    h, slot, save = np.zeros((n, SLOTS)), np.full(n, -1.0), np.zeros((n, 2))
    for i, row in enumerate(rows):
        for age, weight in enumerate(row.past, start=1):
            if weight:
                h[i, (i - age) % SLOTS] = weight
        # What no later row looks at need not be saved.
        if row.save and any(
            len(later.past) >= age and later.past[age - 1] for age, later in enumerate(rows[i + 1 : i + 1 + SLOTS], start=1)
        ):
            slot[i], save[i] = i % SLOTS, row.save
    limit = np.full(n, np.inf if clip is None else clip)
    columns = {
        "px": px, "pm": pm, "clip": limit, "a": a + epsilon * ex, "b": b, "c": c, "d": epsilon * em, "s": s, "c_next": np.append(c_in[1:], 1.0),
        "h0": h[:, 0], "h1": h[:, 1], "h2": h[:, 2], "slot": slot, "save_x": save[:, 0], "save_x0": save[:, 1], "log_s": log_s,
    }  # fmt: skip
    if told is t and np.array_equal(told, np.round(told)):
        told = told.astype(np.int64)
    start = rows[0].start or _start(grid)
    levels = np.stack([np.append(alpha, grid.levels[-1].alpha), np.append(sigma, grid.levels[-1].sigma)], axis=1)
    values = np.stack([columns[name] for name in COLUMNS], axis=1)
    return Table(solver, told, values, levels, start, float(c_in[0]), bool(log_s.any()))

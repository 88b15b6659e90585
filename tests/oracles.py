"""What solver tables are held to, in float64 NumPy: an interpreter of the rows, exact networks of simple data, and every solver again.

The solvers are written as k-diffusion and the papers write them, one loop a solver, in the variables of Karras et al. 2022: y = x / alpha and
k = sigma / alpha, so that y = x_0 + k z, and the network is a denoiser D(y, k). Those that follow dy/dk, which is (y - D) / k there, serve a
flow schedule too, with y = x and k = sigma. `k` holds the levels from the first to where the solver ends; `noise()` is the next z.
"""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastdiff.reference import COLUMNS, SLOTS

# Every solver with every setting that changes its rows.
ALL = [
    ("ddpm", {}),
    ("ddpm", {"variance": "beta"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5, "clipped_epsilon": False}),
    ("euler", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.3}),
    ("heun", {}),
    ("edm_heun", {}),
    ("edm_heun", {"churn": 7.0}),
    ("edm_heun", {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.007}),
    ("dpm_2", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.4}),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
    ("dpmpp_3m_sde", {"eta": 0.4}),
    ("ipndm", {"order": 1}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("ipndm", {}),
    ("unipc", {"order": 1, "variant": "bh1"}),
    ("unipc", {"order": 1}),
    ("unipc", {"variant": "bh1"}),
    ("unipc", {}),
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("unipc", {"order": 3}),
]
# Two rows a step, and solvers that step on the straight line of a flow.
TWO_STAGE = ("heun", "edm_heun", "dpm_2", "dpmpp_2s_ancestral")
STRAIGHT = ("euler", "heun", "edm_heun", "dpm_2", "ipndm")


def each(*kinds, where=lambda solver, options: True):
    """Parameters (solver, options, *kind) of a test, for ALL `where` it holds. A kind begins with a schedule; churn is not for a flow."""
    return [
        pytest.param(solver, options, *kind, id=" ".join([solver, *(f"{k}={v}" for k, v in options.items()), *map(_named, kind)]))
        for solver, options in ALL
        for kind in kinds or [()]
        if where(solver, options) and not (kind and kind[0].name == "flow" and options.get("churn"))
    ]


def _named(value):
    return getattr(value, "name", str(value))


# The interpreter


def advance(row, x, m, before, saved, z, v=0.0):
    """One row, as `solvers` states it, in place on `saved`: (x, x0). What a row weighs with 0 it does not look at."""
    r = dict(zip(COLUMNS, row, strict=True))
    x0 = np.clip(r["px"] * x + r["pm"] * m, -r["clip"], r["clip"])
    new = r["a"] * x + r["b"] * x0 + r["d"] * m
    if r["c"]:
        new = new + r["c"] * before
    for slot in range(SLOTS):
        if r[f"h{slot}"]:
            new = new + r[f"h{slot}"] * saved[slot]
    if r["s"]:
        new = new + r["s"] * np.exp(r["log_s"] * v) * z
    if r["slot"] >= 0:
        saved[int(r["slot"])] = r["save_x"] * x + r["save_x0"] * x0
    return new, x0


def walk(rows, network, x, noise=None, given=()):
    """A whole table from x: x before every row and after the last, R + 1 of them.

    network(i, seen): what it answers in row i, where it sees c_in x. noise(i): z of row i. given: what takes the place of x in the rows 1, 2, ...
    """
    scales = np.append(rows.scale, rows.column("c_next"))
    assert scales[-1] == 1
    path, before, saved = [x], np.full_like(x, np.nan), [np.full_like(x, np.nan)] * SLOTS
    for i, row in enumerate(rows.rows):
        if 1 <= i <= len(given):
            path[-1] = x = given[i - 1]
        x, before = advance(row, x, network(i, scales[i] * x), before, saved, noise(i) if row[COLUMNS.index("s")] else None)
        path.append(x)
    return path


# Networks


def said(prediction, x, x0, alpha, sigma, sigma_data=0.5):
    """What a network of this prediction says when it believes in x0."""
    epsilon = (x - alpha * x0) / sigma
    if prediction == "edm":  # D = c_skip y + c_out F: Karras et al. 2022, equation 7 and table 1
        y, k = x / alpha, sigma / alpha
        c_skip = sigma_data**2 / (k**2 + sigma_data**2)
        c_out = k * sigma_data / np.sqrt(k**2 + sigma_data**2)
        return (x0 - c_skip * y) / c_out
    return {"epsilon": epsilon, "v": alpha * epsilon - sigma * x0, "x0": x0, "flow": epsilon - x0}[prediction]


def believed(prediction, x, m, alpha, sigma, sigma_data=0.5):
    """x0 for a network of this prediction that says m: the inverse of `said`."""
    if prediction == "edm":
        k = sigma / alpha
        return sigma_data**2 / (k**2 + sigma_data**2) * x / alpha + k * sigma_data / np.sqrt(k**2 + sigma_data**2) * m
    if prediction == "epsilon":
        return (x - sigma * m) / alpha
    return {"v": alpha * x - sigma * m, "x0": m, "flow": (x - sigma * m) / (alpha + sigma)}[prediction]


def network(rows, prediction, denoise, sigma_data=0.5):
    """The network for `walk` that believes denoise(x, alpha, sigma), at the level of each row."""

    def answer(i, seen):
        alpha, sigma = rows.levels[i]
        x = seen * np.sqrt(sigma**2 + alpha**2 * sigma_data**2) if prediction == "edm" else seen
        return said(prediction, x, denoise(x, alpha, sigma), alpha, sigma, sigma_data)

    return answer


MU, S = 0.4, 0.25  # data N(mu, s^2), of every pixel


def gaussian(x, alpha, sigma):
    """E[x_0 | x] for that data."""
    return MU + S**2 * alpha / (alpha**2 * S**2 + sigma**2) * (x - alpha * MU)


def gaussian_flow(x, here, there):
    """Where the probability flow of that data takes x: it keeps the number of standard deviations from the mean."""
    (alpha, sigma), (alpha_2, sigma_2) = here, there
    return alpha_2 * MU + (x - alpha * MU) * np.sqrt((alpha_2**2 * S**2 + sigma_2**2) / (alpha**2 * S**2 + sigma**2))


def finite_list(images):
    """E[x_0 | x] for data that is one of `images` [K, P], all as likely: a softmax over the list."""

    def denoise(x, alpha, sigma):
        score = -((x[:, None] - alpha * images) ** 2).sum(2) / (2 * sigma**2)
        weight = np.exp(score - score.max(1, keepdims=True))
        return weight / weight.sum(1, keepdims=True) @ images

    return denoise


# The solvers


def ddpm(D, y, k, noise, variance="posterior", alpha=lambda k: 1 / np.sqrt(1 + k**2)):
    """Ho et al. 2020, equation 7, divided by alpha. With q(x_t | x_s) = N(r x_s, beta), r = alpha_t / alpha_s: beta = alpha_t^2 (k_t^2 - k_s^2)."""
    for t, s in pairwise(k):
        y = s**2 / t**2 * y + (1 - s**2 / t**2) * D(y, t)
        beta = alpha(t) ** 2 * (t**2 - s**2)
        if s > 0:
            y = y + noise() * math.sqrt(beta / alpha(s) ** 2 if variance == "beta" else s**2 * (1 - s**2 / t**2))
    return y


def ddim(D, y, k, noise, eta=0.0):
    """Song et al. 2021, equations 12 and 16, alpha_bar = 1 / (1 + k^2)."""
    for t, s in pairwise(k):
        bar, bar_s = 1 / (1 + t**2), 1 / (1 + s**2)
        x, x0 = np.sqrt(bar) * y, D(y, t)
        std = eta * math.sqrt((1 - bar_s) / (1 - bar) * (1 - bar / bar_s))
        epsilon = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
        x = np.sqrt(bar_s) * x0 + np.sqrt(1 - bar_s - std**2) * epsilon
        if std:
            x = x + std * noise()
        y = x / np.sqrt(bar_s)
    return y


def ancestral_step(t, s, eta):
    up = min(s, eta * math.sqrt(s**2 * (t**2 - s**2) / t**2))
    return math.sqrt(s**2 - up**2), up


def euler_ancestral(D, y, k, noise, eta=1.0):
    for t, s in pairwise(k):
        down, up = ancestral_step(t, s, eta)
        y = y + (y - D(y, t)) / t * (down - t)
        if up:
            y = y + up * noise()
    return y


def euler(D, y, k, noise):
    for t, s in pairwise(k):
        y = y + (y - D(y, t)) / t * (s - t)
    return y


def edm_heun(D, y, k, noise, churn=0.0, churn_min=0.0, churn_max=math.inf, churn_noise=1.0):
    """Karras et al. 2022, algorithm 2."""
    for t, s in pairwise(k):
        gamma = min(churn / (len(k) - 1), math.sqrt(2) - 1) if churn_min <= t <= churn_max else 0.0
        hat = t + gamma * t
        if gamma and churn_noise:
            y = y + math.sqrt(hat**2 - t**2) * churn_noise * noise()
        d = (y - D(y, hat)) / hat
        to = y + (s - hat) * d
        if s > 0:
            d_2 = (to - D(to, s)) / s
            to = y + (s - hat) * (d / 2 + d_2 / 2)
        y = to
    return y


def heun(D, y, k, noise):
    return edm_heun(D, y, k, noise)


def dpm_2(D, y, k, noise):
    for t, s in pairwise(k):
        d = (y - D(y, t)) / t
        if s > 0:
            mid = math.exp((math.log(t) + math.log(s)) / 2)
            y_2 = y + d * (mid - t)
            d = (y_2 - D(y_2, mid)) / mid
        y = y + d * (s - t)
    return y


def dpmpp_2s_ancestral(D, y, k, noise, eta=1.0):
    for t, s in pairwise(k):
        down, up = ancestral_step(t, s, eta)
        x0 = D(y, t)
        if down == 0:
            y = y + (y - x0) / t * (down - t)
        else:
            h = math.log(t) - math.log(down)
            mid = math.exp(math.log(t) - h / 2)
            y_2 = mid / t * y - math.expm1(-h / 2) * x0
            y = down / t * y - math.expm1(-h) * D(y_2, mid)
        if up:
            y = y + up * noise()
    return y


def dpmpp_2m(D, y, k, noise):
    old, last = None, None
    for t, s in pairwise(k):
        x0 = D(y, t)
        h = math.log(t / s) if s > 0 else math.inf
        if old is None or s == 0:
            y = s / t * y - math.expm1(-h) * x0
        else:
            r = last / h
            y = s / t * y - math.expm1(-h) * ((1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old)
        old, last = x0, h
    return y


def dpmpp_2m_sde(D, y, k, noise, eta=1.0, solver_type="midpoint"):
    old, last = None, None
    for t, s in pairwise(k):
        x0 = D(y, t)
        if s == 0:
            return x0
        h = math.log(t / s)
        span = h + eta * h
        y = s / t * math.exp(-eta * h) * y - math.expm1(-span) * x0
        if old is not None and solver_type == "heun":
            y = y + (-math.expm1(-span) / -span + 1) * (h / last) * (x0 - old)
        elif old is not None:
            y = y + 0.5 * -math.expm1(-span) * (h / last) * (x0 - old)
        if eta:
            y = y + s * math.sqrt(-math.expm1(-2 * eta * h)) * noise()
        old, last = x0, h
    return y


def dpmpp_3m_sde(D, y, k, noise, eta=1.0):
    """diffusers' third order of `sde-dpmsolver++` is no oracle: it has -0.5 where phi_3 below has it, of the other sign."""
    x0_1, x0_2, h_1, h_2 = None, None, None, None
    for t, s in pairwise(k):
        x0 = D(y, t)
        if s == 0:
            return x0
        h = math.log(t / s)
        span = h * (eta + 1)
        y = math.exp(-span) * y - math.expm1(-span) * x0
        phi_2 = math.expm1(-span) / span + 1
        phi_3 = phi_2 / span - 0.5
        if x0_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            y = y + phi_2 * d1 - phi_3 * (d1_0 - d1_1) / (r0 + r1)
        elif x0_1 is not None:
            y = y + phi_2 * (x0 - x0_1) / (h_1 / h)
        if eta:
            y = y + s * math.sqrt(-math.expm1(-2 * h * eta)) * noise()
        x0_1, x0_2, h_1, h_2 = x0, x0_1, h, h_1
    return y


def ipndm(D, y, k, noise, order=4):
    """Liu et al. 2022, equation 13 and its lower orders; at the end, where diffusers' goes on extrapolating, Euler's step."""
    slopes = []
    for t, s in pairwise(k):
        slopes.append((y - D(y, t)) / t)
        n = min(order, len(slopes)) if s > 0 else 1
        if n == 1:
            slope = slopes[-1]
        elif n == 2:
            slope = (3 * slopes[-1] - slopes[-2]) / 2
        elif n == 3:
            slope = (23 * slopes[-1] - 16 * slopes[-2] + 5 * slopes[-3]) / 12
        else:
            slope = (55 * slopes[-1] - 59 * slopes[-2] + 37 * slopes[-3] - 9 * slopes[-4]) / 24
        y = y + (s - t) * slope
    return y


def unipc(D, y, k, noise, order=2, variant="bh2"):
    """Zhao et al. 2023, algorithms 7 and 8: UniC-p of every step but the last, then UniP-p of the next, order 1 at both ends of the run."""

    def unified(x0s, lams, h, y, size, ahead):
        """The step of length h from y, levels lams[-1]: with `ahead`, x0 of where it leads, UniC; without, UniP. Both of order `size`."""
        grow = {"bh1": -h, "bh2": math.expm1(-h)}[variant]
        r = [(lams[-1 - j] - lams[-1]) / h for j in range(1, size)]
        d = [(x0s[-1 - j] - x0s[-1]) / r[j - 1] for j in range(1, size)]
        if ahead is not None:
            r, d = [*r, 1.0], [*d, ahead - x0s[-1]]
        y = math.exp(-h) * y - math.expm1(-h) * x0s[-1]
        if not d:
            return y
        if len(d) == 1:
            rho = [0.5]
        else:
            # h phi_{n+1}(h) n! / B(h) of the paper with -h for h, phi_{n+1}(z) = (phi_n(z) - 1 / n!) / z.
            phi, b = math.expm1(-h) / -h, []
            for n in range(1, len(d) + 1):
                phi = (phi - 1 / math.factorial(n)) / -h
                b.append(-h * phi * math.factorial(n) / grow)
            rho = np.linalg.solve([[v**n for v in r] for n in range(len(d))], b)
        return y - grow * sum(w * v for w, v in zip(rho, d, strict=True))

    steps, x0s, lams, start, n = len(k) - 1, [], [], None, 0
    for i in range(steps):
        x0 = D(y, k[i])
        if i:
            y = unified(x0s, lams, -math.log(k[i]) - lams[-1], start, n, x0)
        x0s, lams, start = [*x0s, x0], [*lams, -math.log(k[i])], y
        n = min(order, i + 1, steps - i)
        if k[i + 1] == 0:
            return x0
        y = unified(x0s, lams, -math.log(k[i + 1]) - lams[-1], y, n, None)
    return y

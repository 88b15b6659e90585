"""Noise schedules: x_t = alpha_t x_0 + sigma_t z in float64, for t = 0 .. T-1 and, by the log-SNR, between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# A cosine or sigmoid schedule would reach alpha_bar = 0 at its end; Nichol & Dhariwal 2021, section 3.2 keep beta under this.
MAX_BETA = 0.999
MAX_TIMESTEPS = 1 << 20  # a file may ask for any number; half a dozen tables of this many take 50 MB


# The constructors that a name may stand for: alpha^2 + sigma^2 = 1 (variance-preserving), or the two below, which have no betas.
PRESERVING = ("linear", "scaled_linear", "cosine", "sigmoid", "from_alphas_cumprod")
NAMES = (*PRESERVING, "flow", "edm")


@dataclass(frozen=True)
class Schedule:
    """A noise schedule of at most 2^20 timesteps, given by the name and parameters that rebuild it. Use the constructors:

    `linear`, `scaled_linear`, `cosine`, `sigmoid` and `from_alphas_cumprod` preserve the variance, alpha^2 + sigma^2 = 1; `flow` is the
    straight line of flow matching, alpha + sigma = 1; `edm` only adds noise, alpha = 1.

    `alpha` and `sigma`, float64 [T]: signal and noise at each timestep. `log_snr`, float64 [T]: ln(alpha / sigma), falling in t.
    `alphas_cumprod`, float64 [T]: alpha_bar_t = prod (1 - beta_s) for s <= t (Ho et al. 2020, equation 4); for `flow` and `edm` that of the
    variance-preserving schedule of the same log-SNR.
    """

    name: str
    params: tuple[tuple[str, Any], ...]

    @staticmethod
    def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """beta_t evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4). ValueError unless 0 < betas < 1."""
        return _checked("linear", timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)

    @staticmethod
    def scaled_linear(timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """sqrt(beta_t) evenly spaced (Rombach et al. 2022, latent diffusion). ValueError unless 0 < betas < 1."""
        return _checked("scaled_linear", timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)

    @staticmethod
    def cosine(timesteps: int = 1000, offset: float = 0.008) -> Schedule:
        """alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)) (Nichol & Dhariwal 2021, equation 17), beta_t at most 0.999."""
        return _checked("cosine", timesteps=timesteps, offset=offset)

    @staticmethod
    def sigmoid(timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
        """alpha_bar(u) a falling sigmoid over [start, end] / tau, rescaled to 1 .. 0 (Jabri et al. 2022, algorithm 6), beta_t at most 0.999."""
        return _checked("sigmoid", timesteps=timesteps, start=start, end=end, tau=tau)

    @staticmethod
    def flow(timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """x_t = (1 - s) x_0 + s z (Lipman et al. 2023; Liu et al. 2023), s = shift u / (1 + (shift - 1) u) (Esser et al. 2024, equation 23).

        u = (t + 1) / T, so the last timestep is pure noise. shift > 1 spends more steps near it, as large images want.
        """
        return _checked("flow", timesteps=timesteps, shift=shift)

    @staticmethod
    def edm(timesteps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
        """x = x_0 + sigma z, sigma from `sigma_min` to `sigma_max` (Karras et al. 2022, equation 5). The network is told sigma itself."""
        return _checked("edm", timesteps=timesteps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: Sequence[float] | np.ndarray | torch.Tensor) -> Schedule:
        """A schedule from alpha_bar_t itself, [T], falling, in (0, 1], and at the last timestep perhaps 0 (zero terminal SNR: Lin et al. 2023).

        ValueError where it is not.
        """
        if isinstance(alphas_cumprod, torch.Tensor):
            alphas_cumprod = alphas_cumprod.detach().cpu().double().numpy()
        try:
            values = np.asarray(alphas_cumprod)
            if values.dtype.kind not in "iuf":  # text would be taken for numbers
                raise ValueError(f"they are {values.dtype}")
            values = values.astype(np.float64)
        except ValueError as e:
            raise ValueError(f"alphas_cumprod holds what is no number: {e}") from None
        if values.ndim != 1:
            raise ValueError(f"alphas_cumprod has shape {list(values.shape)}; give one value per timestep, [T]")
        return _checked("from_alphas_cumprod", alphas_cumprod=tuple(values.tolist()))

    @staticmethod
    def from_config(config: dict[str, Any]) -> Schedule:
        """The inverse of `config`. ValueError for an unknown name or unfitting parameters."""
        params = dict(config)
        name = params.pop("name", None)
        if name not in NAMES:
            raise ValueError(f"unknown schedule {name!r}; known: {', '.join(NAMES)}")
        try:
            schedule: Schedule = getattr(Schedule, name)(**params)
        except TypeError as e:
            raise ValueError(f"schedule {name!r}: {e}") from None
        return schedule

    @property
    def config(self) -> dict[str, Any]:
        """Name and parameters as plain JSON values; `Schedule.from_config` rebuilds the schedule from it exactly."""
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in self.params}}

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    @property
    def preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1."""
        return self.name in PRESERVING

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        p = dict(self.params)
        if not self.preserving:
            return _frozen(self.alpha**2 / (self.alpha**2 + self.sigma**2))
        if self.name == "from_alphas_cumprod":
            return _frozen(np.asarray(p["alphas_cumprod"]))
        if self.name in ("linear", "scaled_linear"):
            power = 1 if self.name == "linear" else 2
            betas = np.linspace(p["beta_start"] ** (1 / power), p["beta_end"] ** (1 / power), p["timesteps"]) ** power
        else:
            u = np.arange(p["timesteps"] + 1) / p["timesteps"]
            if self.name == "cosine":
                bar = np.cos((u + p["offset"]) / (1 + p["offset"]) * np.pi / 2) ** 2
            else:
                rise = 1 / (1 + np.exp(-(p["start"] + u * (p["end"] - p["start"])) / p["tau"]))
                bar = (rise[-1] - rise) / (rise[-1] - rise[0])
            betas = np.minimum(1 - bar[1:] / bar[:-1], MAX_BETA)
        return _frozen(np.cumprod(1 - betas))

    @cached_property
    def betas(self) -> np.ndarray:
        """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, float64 [T]."""
        return _frozen(1 - self.alphas_cumprod / np.concatenate([[1.0], self.alphas_cumprod[:-1]]))

    @cached_property
    def alpha(self) -> np.ndarray:
        if self.name == "edm":
            return _frozen(np.ones_like(self.sigma))
        return _frozen(1 - self.sigma if self.name == "flow" else np.sqrt(self.alphas_cumprod))

    @cached_property
    def sigma(self) -> np.ndarray:
        p = dict(self.params)
        if self.name == "flow":
            return _frozen(shifted(np.arange(1, p["timesteps"] + 1) / p["timesteps"], p["shift"]))
        if self.name == "edm":
            return _frozen(karras(p["sigma_max"], p["sigma_min"], p["timesteps"], p["rho"])[::-1])
        return _frozen(np.sqrt(1 - self.alphas_cumprod))

    @cached_property
    def log_snr(self) -> np.ndarray:
        """Half the log of the signal-to-noise ratio, lambda = ln(alpha / sigma), float64 [T]; -inf without signal, inf without noise."""
        with np.errstate(divide="ignore"):
            return _frozen(np.log(self.alpha) - np.log(self.sigma))

    def noise_at(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at a timestep or between two, 0 <= t <= T - 1: the inverse of `at`."""
        low = int(t)
        p = dict(self.params)
        if t == low:
            return float(self.alpha[low]), float(self.sigma[low])
        if self.name == "flow":
            s = float(shifted(np.float64((t + 1) / p["timesteps"]), p["shift"]))
            return 1 - s, s
        if self.name == "edm":
            ends = p["sigma_min"] ** (1 / p["rho"]), p["sigma_max"] ** (1 / p["rho"])
            return 1.0, float((ends[0] + t / (p["timesteps"] - 1) * (ends[1] - ends[0])) ** p["rho"])
        here, there = self.log_snr[low : low + 2]
        if here == np.inf:  # between no noise and some there is no log-SNR to go by
            return float(self.alpha[low]), float(self.sigma[low])
        return self.at(float(here + (t - low) * (there - here)))[1:]

    def at(self, log_snr: float) -> tuple[float, float, float]:
        """(t, alpha, sigma) where ln(alpha / sigma) is `log_snr`. t is a fraction between timesteps: exact for `flow` and `edm`, else linear in
        the log-SNR between its neighbours (as k-diffusion has it) and never beyond the first or last."""
        p = dict(self.params)
        if self.name == "flow":
            s = float(1 / (1 + np.exp(log_snr)))
            t = p["timesteps"] * s / (p["shift"] - (p["shift"] - 1) * s) - 1
            return float(np.clip(t, 0, p["timesteps"] - 1)), 1 - s, s
        if self.name == "edm":
            sigma = float(np.exp(-log_snr))
            low, high, now = (v ** (1 / p["rho"]) for v in (p["sigma_min"], p["sigma_max"], sigma))
            return float(np.clip((p["timesteps"] - 1) * (now - low) / (high - low), 0, p["timesteps"] - 1)), 1.0, sigma
        t = float(np.interp(-log_snr, -self.log_snr, np.arange(self.timesteps)))
        return t, float(1 / np.sqrt(1 + np.exp(-2 * log_snr))), float(1 / np.sqrt(1 + np.exp(2 * log_snr)))


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    """Esser et al. 2024, equation 23, in the form that is 1 at 1 in floating point too."""
    out: np.ndarray = u / (u + (1 - u) / shift)
    return out


def karras(first: float, last: float, n: int, rho: float) -> np.ndarray:
    """n noise levels from `first` to `last`, even in sigma^(1 / rho), float64 [n] (Karras et al. 2022, equation 5)."""
    levels: np.ndarray = np.linspace(first ** (1 / rho), last ** (1 / rho), n) ** rho
    return levels


def whole(value: object) -> bool:
    """Whether a value is a whole number: int or NumPy's, but not bool and not 2.0."""
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))


def number(value: object) -> bool:
    """Whether a value is a finite number that float64 can hold: int, float or NumPy's, but not bool and no text."""
    try:
        return not isinstance(value, (bool, np.bool_, str, bytes)) and math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _frozen(a: np.ndarray) -> np.ndarray:
    a = np.ascontiguousarray(a, dtype=np.float64)
    a.setflags(write=False)
    return a


def _checked(name: str, **params: Any) -> Schedule:
    timesteps = params.get("timesteps", 1)
    if not whole(timesteps) or timesteps < 1:
        raise ValueError(f"timesteps is {timesteps!r}; a schedule needs a whole number of at least 1")
    if max(timesteps, len(params.get("alphas_cumprod", ()))) > MAX_TIMESTEPS:
        raise ValueError(f"a schedule has at most {MAX_TIMESTEPS} timesteps; this one asks for more")
    if "timesteps" in params:
        params["timesteps"] = int(timesteps)
    for key in ("beta_start", "beta_end"):
        if key in params and not 0 < params[key] < 1:
            raise ValueError(f"{key} is {params[key]!r}; it must lie between 0 and 1")
    if name == "cosine" and not params["offset"] >= 0:
        raise ValueError(f"offset is {params['offset']!r}; it must be at least 0")
    if name == "sigmoid" and not (params["tau"] > 0 and params["end"] > params["start"]):
        raise ValueError("a sigmoid schedule needs tau > 0 and end > start")
    if name == "flow" and not 0 < params["shift"] < np.inf:
        raise ValueError(f"shift is {params['shift']!r}; it must be positive")
    if name == "edm" and not (0 < params["sigma_min"] < params["sigma_max"] < np.inf and 0 < params["rho"] < np.inf):
        raise ValueError("an edm schedule needs 0 < sigma_min < sigma_max, and rho > 0")
    for key, value in params.items():
        if key != "alphas_cumprod" and not number(value):
            raise ValueError(f"{key} is {value!r}; it must be a finite number")
    schedule = Schedule(name, tuple(params.items()))
    if name not in PRESERVING:
        try:
            with np.errstate(all="ignore"):
                sigma = schedule.sigma
            fits = np.isfinite(sigma).all() and sigma[0] > 0 and (np.diff(sigma) >= 0).all()
        except OverflowError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} with {', '.join(f'{k}={v!r}' for k, v in params.items())} gives noise levels that float64 cannot hold"
            )
        return schedule
    with np.errstate(all="ignore"):  # what overflows is refused in the next line
        bar = schedule.alphas_cumprod
    if bar.size == 0 or not (
        np.isfinite(bar).all() and (bar[:-1] > 0).all() and (bar >= 0).all() and (bar <= 1).all() and (np.diff(bar) <= 0).all()
    ):
        raise ValueError("alphas_cumprod must hold at least one value, lie in (0, 1], but the last may be 0, and never rise with t")
    return schedule

"""Noise schedules: x_t = alpha_t x_0 + sigma_t z with alpha_t^2 + sigma_t^2 = 1, in float64, for t = 0 .. T-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# A cosine or sigmoid schedule would reach alpha_bar = 0 at its end; Nichol & Dhariwal 2021, section 3.2 keep beta under this.
MAX_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving noise schedule, given by the name and parameters that rebuild it.

    `alphas_cumprod` is alpha_bar_t = prod (1 - beta_s) for s <= t (Ho et al. 2020, equation 4), float64 [T], falling in t.
    `alpha` = sqrt(alpha_bar) and `sigma` = sqrt(1 - alpha_bar), float64 [T]: signal and noise at each timestep.
    Use the constructors `linear`, `scaled_linear`, `cosine`, `sigmoid` and `from_alphas_cumprod`.
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
    def from_alphas_cumprod(alphas_cumprod: Sequence[float] | np.ndarray | torch.Tensor) -> Schedule:
        """A schedule from alpha_bar_t itself, [T], falling, in (0, 1]. ValueError where it is not."""
        if isinstance(alphas_cumprod, torch.Tensor):
            alphas_cumprod = alphas_cumprod.detach().cpu().double().numpy()
        values = np.asarray(alphas_cumprod, dtype=np.float64)
        if values.ndim != 1:
            raise ValueError(f"alphas_cumprod has shape {list(values.shape)}; give one value per timestep, [T]")
        return _checked("from_alphas_cumprod", alphas_cumprod=tuple(values.tolist()))

    @staticmethod
    def from_config(config: dict[str, Any]) -> Schedule:
        """The inverse of `config`. ValueError for an unknown name or unfitting parameters."""
        params = dict(config)
        name = params.pop("name", None)
        if name not in ("linear", "scaled_linear", "cosine", "sigmoid", "from_alphas_cumprod"):
            raise ValueError(f"unknown schedule {name!r}; known: linear, scaled_linear, cosine, sigmoid, from_alphas_cumprod")
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

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        p = dict(self.params)
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
        return _frozen(np.sqrt(self.alphas_cumprod))

    @cached_property
    def sigma(self) -> np.ndarray:
        return _frozen(np.sqrt(1 - self.alphas_cumprod))


def whole(value: object) -> bool:
    """Whether a value is a whole number: int or NumPy's, but not bool and not 2.0."""
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))


def _frozen(a: np.ndarray) -> np.ndarray:
    a = np.ascontiguousarray(a, dtype=np.float64)
    a.setflags(write=False)
    return a


def _checked(name: str, **params: Any) -> Schedule:
    timesteps = params.get("timesteps", 1)
    if not whole(timesteps) or timesteps < 1:
        raise ValueError(f"timesteps is {timesteps!r}; a schedule needs a whole number of at least 1")
    if "timesteps" in params:
        params["timesteps"] = int(timesteps)
    for key in ("beta_start", "beta_end"):
        if key in params and not 0 < params[key] < 1:
            raise ValueError(f"{key} is {params[key]!r}; it must lie between 0 and 1")
    if name == "cosine" and not params["offset"] >= 0:
        raise ValueError(f"offset is {params['offset']!r}; it must be at least 0")
    if name == "sigmoid" and not (params["tau"] > 0 and params["end"] > params["start"]):
        raise ValueError("a sigmoid schedule needs tau > 0 and end > start")
    schedule = Schedule(name, tuple(params.items()))
    with np.errstate(all="ignore"):  # what overflows is refused in the next line
        bar = schedule.alphas_cumprod
    if bar.size == 0 or not (np.isfinite(bar).all() and (bar > 0).all() and (bar <= 1).all() and (np.diff(bar) <= 0).all()):
        raise ValueError("alphas_cumprod must hold at least one value, lie in (0, 1] and never rise with t")
    return schedule

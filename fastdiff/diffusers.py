"""Drop-ins for diffusers (0.42 and newer): the same classes, calls and images, with every step one fused operation.

    from fastdiff.diffusers import DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler      # instead of: from diffusers import ...
    pipe = fastdiff.diffusers.accelerate(pipe)                                                    # its loop becomes fastdiff's

The schedulers are subclasses with diffusers' signatures, configs and output classes. With the same inputs and generator they give diffusers'
results to rounding in fp32 and fp64; fp16 and bf16 are computed in fp32, and so come closer to the exact result than diffusers'. `step` also
takes a timestep per sample. What has no argument in diffusers is set by `use`: noise from fastdiff's stream, and corrections.

Where diffusers' result is wrong, it is kept unless `use(corrected=True)` asks for the right one:

- All coefficients are formed in fp32 there, where 1 - alpha_bar_t / alpha_bar_s cancels: DDPM's are wrong by some 1e-4 near t = 0.
- DDIM takes t - T // steps for the timestep before, which for `linspace`, and `trailing` where steps do not divide T, is not the next of the
  timesteps.
- DDPM with `fixed_large` adds noise to the final image where the last timestep is not 0 (`trailing`).
- `trailing` of some numbers of steps (61 of 1000, the least) has one timestep more by a rounding, -1, which DDPM and DDIM take for the last of all,
  T - 1, and so make noise of the image that is done. The right step leaves it as it is.

These are right in any case, since diffusers gives no usable number: `fixed_large_log` (NaN there) has the variance beta_t; `add_noise` in bf16 and
fp16 keeps its sigma at small t (0 there, at t <= 2), and leaves the scheduler's own tables where they are; without signal (zero terminal SNR)
x0 of an epsilon prediction is the sign of x - m, clipped; where they are equal, or there is no clipping, diffusers' is NaN or infinite; a step of
DPM-Solver to the level that x has, as the last with `sigma_min` and Karras's or others' sigmas, leaves x as it is (NaN there but for order 1 and 2M).
"""

# No `from __future__ import annotations`: signatures are diffusers' own, types and all.
import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from . import cpu, native, ops, reference, rewrite, unet
from .checkpoint import Checkpoint, CheckpointError, fill, read_json, read_safetensors
from .data import odd_name
from .noise import column64
from .reference import COLUMNS, SLOTS, STEP_COLUMNS
from .sampler import AUTO_ROWS, Sampler, by_cost
from .schedules import MAX_TIMESTEPS, Schedule, whole
from .solvers import Table
from .unet import UNet, UNetConfig
from .unet2d import UNet2D, UNet2DConfig, adopted, traits

try:
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as e:
    raise ImportError(
        f"fastdiff.diffusers needs diffusers 0.42 or newer; pip install 'fastdiff-torch[diffusers]' ({str(e).splitlines()[0]})"
    ) from None
if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 42):
    raise ImportError(
        f"fastdiff.diffusers needs diffusers 0.42 or newer, and this is {diffusers.__version__}; pip install -U 'fastdiff-torch[diffusers]'"
    )

__all__ = [
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "accelerate",
    "load",
    "save",
    "unaccelerate",
]

logger = logging.getLogger(__name__)
_scheduler_step, _add_noise = ops.direct("scheduler_step"), ops.direct("add_noise")

# 1 / alpha where alpha = 0: large enough to make a sign of anything, and finite, so that nothing times it is NaN.
WITHOUT_SIGNAL = 1e30


@dataclass(frozen=True)
class Options:
    """What `use` sets. seeds: int64 [N], then each sample is sample 0 of its seed; else sample `first + i` of `seed`."""

    corrected: bool = False
    counter: bool = False
    seed: int = 0
    first: int = 0
    seeds: Tensor | None = None


def _same(a: Any, b: Any) -> bool:
    """Whether two values are known to be equal without waiting for a device."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        on_cpu = isinstance(a, Tensor) and isinstance(b, Tensor) and a.device.type == b.device.type == "cpu" and a.dtype == b.dtype
        return bool(on_cpu and a is not b and torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)


def _fractional(t: Any) -> bool:
    """Whether a timestep is of a type with fractions, which index nothing."""
    return t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, (float, np.floating))


class _Fused:
    """What the schedulers have in common: tables of coefficients, made once for a configuration, and one operation that carries a row out."""

    # Whatever the tables depend on: assigning one of these makes them anew.
    _SOURCES: ClassVar[frozenset[str]] = frozenset(
        ("alphas_cumprod", "final_alpha_cumprod", "timesteps", "num_inference_steps", "custom_timesteps", "sigmas", "_internal_dict")
    )  # fmt: skip
    # Those of them that may be written into.
    _WATCHED: ClassVar[tuple[str, ...]] = ("alphas_cumprod", "final_alpha_cumprod", "timesteps", "sigmas")
    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    _tables: dict[Hashable, Tensor]

    def _adopt(self) -> None:
        """The last of a constructor."""
        self._options = Options()
        # A pipeline saves under which name its parts are found: those of diffusers, which reads them without fastdiff too.
        self.__module__ = "diffusers"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _Fused._SOURCES:
            # The same again, as by set_timesteps in every call of a pipeline, changes nothing.
            assigned = self.__dict__.setdefault("_assigned", {})
            if name not in assigned or not _same(assigned[name], value):
                object.__setattr__(self, "_tables", {})
            assigned[name] = value
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own tables, of what is assigned to it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_assigned", "_versions")} | {"_tables": {}}

    def _move_timesteps(self, device: str | torch.device | None) -> None:
        """To the device that they are wanted on, which is no change of them."""
        if device is not None:
            object.__setattr__(self, "timesteps", self.timesteps.to(device))

    def use(
        self,
        *,
        corrected: bool = False,
        noise: str = "generator",
        seed: int = 0,
        first: int = 0,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Any:
        """Set what diffusers has no argument for, and return the scheduler; what is not given goes back to diffusers' way.

        corrected: the right result where diffusers' is wrong (see the module). noise: "generator", torch's, as diffusers draws it, or "counter":
        where no generator is given, noise from fastdiff's stream, the same on every device and in every batch. Sample i of a batch is then
        sample `first + i` of `seed`; or, with seeds, one per sample, sample 0 of seeds[i]. The noise of a step at timesteps[i] is row i.
        ValueError for anything else.
        """
        if noise not in ("generator", "counter"):
            raise ValueError(f'noise is {noise!r}; give "generator", torch\'s, or "counter", fastdiff\'s stream')
        if noise == "generator" and seeds is None and (seed or first):
            raise ValueError('seed and first number the noise of the counter; give noise="counter" with them')
        column = None if seeds is None else column64(seeds, len(seeds))
        column64([seed, first], 2)  # are they whole numbers?
        self._options = Options(bool(corrected), noise == "counter" or column is not None, seed, first, column)
        self._tables = {}
        return self

    def _columns(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and ids of n samples, int64 [n]."""
        chosen = self._options
        key = ("columns", n, device)
        if key not in self._tables:
            if chosen.seeds is None:
                columns = column64(chosen.seed, n), torch.arange(n) + chosen.first
            elif len(chosen.seeds) == n:
                columns = chosen.seeds, torch.zeros(n, dtype=torch.int64)
            else:
                raise ValueError(f"use() was given {len(chosen.seeds)} seeds for a batch of {n}; give one per sample")
            self._tables[key] = torch.stack(columns).to(device)
        both = self._tables[key]
        return both[0], both[1]

    def _known(self, key: Hashable, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """A table in a dtype and on a device."""
        if not torch.compiler.is_compiling():
            watched = (self.__dict__.get(name) for name in _Fused._WATCHED)
            versions = tuple(v._version if isinstance(v, Tensor) and not v.is_inference() else 0 for v in watched)
            if versions != getattr(self, "_versions", versions):
                self._tables = {}  # somebody has written into them
            self._versions = versions
        place = (key, dtype, device)
        if place not in self._tables:
            self._tables[place] = make().to(device, dtype)
        return self._tables[place]

    def _prepare(self, key: Hashable, make: Callable[[], Tensor]) -> None:
        """Make what a step in fp32 needs, so that it stands outside of what is compiled."""
        with contextlib.suppress(
            ValueError, IndexError
        ):  # no formula, or a timestep beyond the last: an error of the step, as in diffusers
            self._known(key, torch.float32, self.timesteps.device, make)
        self._known("indices", torch.int64, self.timesteps.device, lambda: torch.arange(3 * self._total))
        self._host_timesteps()

    def _plan(self, eta: float = 0.0, clipped: bool = False) -> Table | None:
        """The timesteps as a table of the loop's, or None where it has no such rows (`_unplanned`)."""
        raise NotImplementedError

    @property
    def _unplanned(self) -> str | None:
        """Why the loop has no rows for this scheduler, if so."""
        if self.config.thresholding and self.config.sample_max_value != 1:
            return "its scheduler bounds each image by a quantile of its own (thresholding, with a sample_max_value that is not 1)"
        return None

    def _draws(self, eta: float = 0.0) -> list[bool]:
        """Whether the step at each timestep draws noise."""
        raise NotImplementedError

    def _loop_table(self, rows: Tensor, learned: bool = False) -> Table:
        """A scheduler's rows [R, 11], fp64, as a loop's [R, 16]."""
        named = dict(zip(STEP_COLUMNS, rows.cpu().numpy().T, strict=True))
        n, at = len(rows), np.arange(len(rows))
        out = {name: named.get(name, np.zeros(n)) for name in COLUMNS}
        out["c_next"], out["slot"] = np.ones(n), np.full(n, -1.0)
        if named["h"].any():  # x0 of two rows before
            out["slot"], out["save_x0"] = at % SLOTS, np.ones(n)
            for slot in range(SLOTS):
                out[f"h{slot}"] = np.where((at - 2) % SLOTS == slot, named["h"], 0.0)
        t = self._host_timesteps().numpy()
        alpha_bar = np.append(self.alphas_cumprod.cpu().double().numpy()[t.clip(max=len(self.alphas_cumprod) - 1)], 1.0)
        levels = np.sqrt(np.stack([alpha_bar, 1 - alpha_bar], axis=1))
        return Table(type(self).__name__, t, np.stack([out[name] for name in COLUMNS], axis=1), levels, learned=learned)

    def _base(self) -> Tensor:
        """alpha_bar, [T] on the CPU, in the precision that coefficients are formed in."""
        base = self.alphas_cumprod.cpu()
        return base.double() if self._options.corrected else base

    def _whole(self, t: Tensor | float) -> int | None:
        """A timestep as a number, if that can be told without waiting for a device: it lies on the CPU, or is a view of the timesteps."""
        if not isinstance(t, Tensor):
            return int(t)
        if t.numel() != 1 or torch.compiler.is_compiling():
            return None
        if t.device.type == "cpu":
            return int(t)
        steps = self.timesteps
        place = t.storage_offset() - steps.storage_offset()
        within = steps.is_contiguous() and 0 <= place < len(steps) and t.dtype == steps.dtype
        if within and t.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr():
            return int(self._host_timesteps()[place])
        return None

    def _host_timesteps(self) -> Tensor:
        """The timesteps on the CPU, read once."""
        return self._known("timesteps", torch.int64, torch.device("cpu"), lambda: self.timesteps)

    def _rows(self, t: Tensor | float, n: int, device: torch.device) -> Tensor:
        """Timesteps as places in a table with one row for each, int64 [1] or [n] on the device: of 3 T rows, those below 0 from the end.
        IndexError for one that has none, as far as that can be told without waiting for a device."""
        if _fractional(t):
            raise IndexError(f"timesteps are whole numbers here, not {t.dtype if isinstance(t, Tensor) else t}")
        rows = 3 * self._total
        number = self._whole(t)
        if number is not None:
            self._check_range(number, number)
            place = number % rows
            return self._known("indices", torch.int64, device, lambda: torch.arange(rows))[place : place + 1]
        assert isinstance(t, Tensor)
        if t.ndim > 1 or t.numel() not in (1, n):
            raise ValueError(f"timestep has shape {list(t.shape)} for a batch of {n}; give one for all, or one per sample, [{n}]")
        if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
            self._check_range(int(t.min()), int(t.max()))
        return t.reshape(-1).to(device, torch.int64).contiguous()

    def _check_range(self, least: int, most: int) -> None:
        """IndexError for timesteps that no table has a row of: diffusers' tables are Python's, and have -1, the last, to -T, the first."""
        total = self._total
        if least < -total or most >= total:
            raise IndexError(f"timestep {least if least < -total else most} is none of this scheduler's, which are 0 to {total - 1}")

    @property
    def _total(self) -> int:
        """T, how many timesteps have a row."""
        return int(self.config.num_train_timesteps)

    def _within(self, t: Tensor) -> Tensor:
        """Where timesteps have a row: with `steps_offset`, and as many steps as there are timesteps, one lies beyond."""
        within: Tensor = (t >= -self._total) & (t < self._total)
        return within

    def _every(self) -> Tensor:
        """Timesteps with a row of their own: 0 to T - 1, -T to -1. In a table of 3 T they are T apart, so that one that is neither has none."""
        return torch.cat([torch.arange(self._total), torch.arange(-self._total, 0)])

    def _step(
        self,
        m: Tensor,
        x: Tensor,
        table: Tensor,
        rows: Tensor,
        *,
        noise: Tensor | None = None,
        counter: bool = False,
        threshold: bool = False,
        before: Tensor | None = None,
        earlier: Tensor | None = None,
        wide: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Carry a row out: the sample before, and x0. noise: z, or, with counter, the stream's."""
        if x.ndim == 1:  # numbers, each for itself
            columns = (v if v is None else v[:, None] for v in (m, x, noise, before, earlier))
            m, x, noise, before, earlier = columns  # type: ignore[assignment]
            both = self._step(
                m, x, table, rows, noise=noise, counter=counter, threshold=threshold, before=before, earlier=earlier, wide=wide
            )  # fmt: skip
            return both[0][:, 0], both[1][:, 0]
        channels = x.shape[1]
        if m.shape != x.shape and m.shape != (len(x), 2 * channels, *x.shape[2:]):
            raise ValueError(f"model_output has shape {list(m.shape)} for a sample of {list(x.shape)}; they must be the same")
        if not (m.is_cuda and m.is_contiguous(memory_format=torch.channels_last)):  # which the kernel reads as they lie
            m = m.contiguous()
        x = x.contiguous()
        seeds, ids = self._columns(len(x), x.device) if counter else (None, None)
        limit = self._limit(m[:, :channels], x, table, rows) if threshold else None
        before, earlier, noise = (v if v is None else v.contiguous() for v in (before, earlier, noise))
        arguments = (m, x, table, rows, noise, seeds, ids, limit, before, earlier, wide)
        if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (m, x, noise, before, earlier)):
            return reference.scheduler_step(*arguments)
        result: tuple[Tensor, Tensor] = _scheduler_step(*arguments)
        return result

    def _limit(self, m: Tensor, x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, section 2.3): a quantile of |x0| of each sample, [N], from 1 to `sample_max_value`."""
        px, pm = table[rows][:, :2].reshape(-1, 2, *[1] * (x.ndim - 1)).unbind(1)
        size = (px * x + pm * m).flatten(1).abs()
        limit: Tensor = torch.quantile(size, self.config.dynamic_thresholding_ratio, dim=1).clamp(min=1, max=self.config.sample_max_value)
        return limit.contiguous()

    def _forward(self, x0: Tensor, noise: Tensor, timesteps: Tensor, table: Callable[[torch.dtype], Tensor]) -> Tensor:
        """table[t, 0] x0 + table[t, 1] noise."""
        dtype = torch.promote_types(x0.dtype, noise.dtype)
        x0, noise = torch.broadcast_tensors(x0, noise)  # type: ignore[no-untyped-call]
        t = timesteps.to(x0.device, torch.int64).flatten()
        if len(x0) == 1 != len(t):  # one image at many timesteps
            x0, noise = x0.expand(len(t), *x0.shape[1:]), noise.expand(len(t), *x0.shape[1:])
        n = len(x0)
        t = (t.expand(n) if len(t) != n else t).contiguous()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        both = x0, noise
        if (
            x0.ndim == 4
            and not all(v.is_contiguous() for v in both)
            and all(v.is_contiguous(memory_format=torch.channels_last) for v in both)
        ):
            x0, noise = (v.permute(0, 2, 3, 1) for v in both)  # as they lie in memory
            return self._forward(x0, noise, t, table).permute(0, 3, 1, 2)
        x0, noise, rows = x0.to(dtype).contiguous(), noise.contiguous(), table(exact)
        if exact == torch.float64:
            alpha, sigma = rows[t][:, :2].reshape(-1, 2, *[1] * (x0.ndim - 1)).unbind(1)
            return alpha * x0 + sigma * noise
        add = reference.add_noise if torch.is_grad_enabled() and (x0.requires_grad or noise.requires_grad) else _add_noise
        result: Tensor = add(x0, t, rows, noise, None, None, None, False)[0]
        return result


class _ByTimestep(_Fused):
    """DDPM and DDIM: a row for each timestep."""

    final_alpha_cumprod: Tensor

    @property
    def _total(self) -> int:
        """As many as there are betas, which are not always as many as the config says."""
        return len(self.alphas_cumprod)

    def _signal(self, velocity: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
        def make() -> Tensor:
            alpha_bar = self.alphas_cumprod.cpu().to(dtype)
            alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            return torch.stack([alpha, -sigma if velocity else sigma, torch.zeros_like(alpha), torch.zeros_like(alpha)], dim=1)

        return self._known(("signal", velocity), dtype, device, make)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: torch.IntTensor) -> Tensor:
        """q(x_t | x_0) (Ho et al. 2020, equation 4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

        original_samples, noise: [N, ...], any float dtype, or one for all. timesteps: integers, [N] or of one element. IndexError for others.
        """
        return self._at_levels(original_samples, noise, timesteps, False)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: torch.IntTensor) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022, appendix D); shapes as of `add_noise`."""
        return self._at_levels(noise, sample, timesteps, True)

    def _at_levels(self, image: Tensor, noise: Tensor, t: Tensor, velocity: bool) -> Tensor:
        if _fractional(t):
            raise IndexError(f"timesteps are whole numbers here, not {t.dtype}")
        return self._forward(image, noise, t, lambda dtype: self._signal(velocity, dtype, image.device))

    def _walk(self) -> tuple[Tensor, Tensor]:
        """Timesteps that a step may start at, and where it goes, -1 for the image; int64."""
        raise NotImplementedError

    def _predicted(self, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """px, pm of x0 = px x + pm m, and ex, em of epsilon = ex x + em m, fp64."""
        alpha, sigma = (alpha_bar**0.5).double(), ((1 - alpha_bar) ** 0.5).double()
        none, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        kind = self.config.prediction_type
        if kind == "epsilon":
            inverse = torch.where(alpha == 0, WITHOUT_SIGNAL, 1 / alpha)
            return inverse, -sigma * inverse, none, one
        if kind == "sample":
            return none, one, 1 / sigma, -alpha / sigma
        if kind == "v_prediction":
            return alpha, -sigma, sigma, alpha
        raise ValueError(f"prediction_type given as {kind} must be one of `epsilon`, `sample` or `v_prediction`")

    def _timestep_plan(self, table: Tensor, learned: bool = False) -> Table:
        steps = self._host_timesteps()
        if len(steps):
            self._check_range(int(steps.min()), int(steps.max()))
        return self._loop_table(table[steps], learned)

    def _dtype_of_x0(self, m: Tensor, x: Tensor) -> torch.dtype:
        """diffusers': what the network has predicted stays as it is."""
        return m.dtype if self.config.prediction_type == "sample" else torch.promote_types(m.dtype, x.dtype)

    @property
    def _clip(self) -> float:
        """The bound of x0, where it is the same for all samples."""
        if self.config.thresholding:
            return 1.0 if self.config.sample_max_value == 1 else float("inf")
        return float(self.config.clip_sample_range) if self.config.clip_sample else float("inf")

    @property
    def _dynamic(self) -> bool:
        """Whether a sample's own quantile bounds its x0; with sample_max_value 1 the quantile is always 1."""
        return bool(self.config.thresholding and self.config.sample_max_value != 1)

    def _by_timestep(self, t: Tensor, after: Tensor, columns: dict[str, Tensor | float]) -> Tensor:
        """[3 T, 11] of columns [len(t)], t as of `_every`. Without a row of its own a timestep is NaN. row: the place of t in the timesteps,
        or beyond."""
        total = self._total
        steps = self.timesteps.cpu().long()
        places = self._within(steps).nonzero()[:, 0].flip(0)
        place = torch.arange(total, 3 * total)
        place[steps[places]] = places  # of several places the first
        columns = {**columns, "row": place[t]}
        if self._options.corrected:  # the image, which is done
            whole = {"px": 1.0, "pm": 0.0, "a": 1.0, "b": 0.0, "d": 0.0, "s": 0.0, "log_s": 0.0}
            columns |= {name: torch.where(t < 0, value, torch.as_tensor(columns.get(name, 0.0))) for name, value in whole.items()}
        table = torch.full((3 * total, len(STEP_COLUMNS)), torch.nan, dtype=torch.float64)
        values = [torch.as_tensor(columns.get(name, 0.0), dtype=torch.float64).expand(len(t)) for name in STEP_COLUMNS]
        table[t.flip(0)] = torch.stack(values, dim=1).flip(0)
        return table


class DDPMScheduler(_ByTimestep, scheduling_ddpm.DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler, ancestral sampling (Ho et al. 2020, algorithm 2), with a fused step. See `use` and the module."""

    @functools.wraps(scheduling_ddpm.DDPMScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt()

    def _walk(self) -> tuple[Tensor, Tensor]:
        if self.custom_timesteps or self.num_inference_steps:
            t = self.timesteps.cpu().long()
            within = self._within(t)
            return t[within], torch.cat([t[1:], torch.tensor([-1])])[within]
        t = self._every()
        return t, t - 1

    def set_timesteps(  # type: ignore[no-untyped-def]
        self,
        num_inference_steps: int = None,  # type: ignore[assignment]
        device: str | torch.device = None,  # type: ignore[assignment]
        timesteps: list[int] | None = None,
    ):
        """Choose the timesteps, by number and `timestep_spacing`, or falling ones of one's own; the coefficients go to the device with them."""
        super().set_timesteps(num_inference_steps, timesteps=timesteps)
        self._move_timesteps(device)
        self._prepare(("rows",), self._table)

    @property
    def _unplanned(self) -> str | None:
        return (
            'its variance is learned as it is (variance_type "learned")' if self.config.variance_type == "learned" else super()._unplanned
        )

    def _plan(self, eta: float = 0.0, clipped: bool = False) -> Table | None:
        if self._unplanned:
            return None
        return self._timestep_plan(self._table(), self.config.variance_type == "learned_range")

    def _draws(self, eta: float = 0.0) -> list[bool]:
        return [t > 0 for t in self._host_timesteps().tolist()]

    def _table(self) -> Tensor:
        t, after = self._walk()
        base, variance_type = self._base(), self.config.variance_type
        now, then = base[t], torch.where(after >= 0, base[after.clamp(min=0)], 1.0)
        # As diffusers forms them, in its order, for in fp32 another order is another number.
        left, kept = 1 - now, now / then
        beta = 1 - kept
        small = torch.clamp((1 - then) / left * beta, min=1e-20)
        log_s: Tensor | float = 0.0
        if variance_type == "fixed_small_log":
            s = torch.exp(0.5 * torch.log(small))
        elif variance_type in ("fixed_large", "fixed_large_log"):
            s = beta**0.5
        elif variance_type == "learned_range":  # log variance = (1 + v) / 2 log beta + (1 - v) / 2 log small
            s, log_s = torch.exp((torch.log(beta) + torch.log(small)) / 4), (torch.log(beta) - torch.log(small)) / 4
        elif variance_type == "learned":  # sqrt(v), in step
            s = torch.ones_like(beta)
        else:  # "fixed_small", and whatever else, as in diffusers
            s = small**0.5
        s = torch.where((t > 0) & (after >= 0) if self._options.corrected else t > 0, s, 0.0)
        px, pm, _, _ = self._predicted(now)
        columns: dict[str, Tensor | float] = {
            "px": px, "pm": pm, "clip": self._clip, "a": kept**0.5 * (1 - then) / left, "b": then**0.5 * beta / left, "s": s, "log_s": log_s
        }  # fmt: skip
        return self._by_timestep(t, after, columns)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:  # type: ignore[type-arg]
        """x_t to the timestep before (Ho et al. 2020, equation 7), in one fused operation.

        model_output: [N, C, ...], or of 2C channels with a learned variance. timestep: a number, a tensor of one, or int64 [N], one per sample.
        sample: x_t, [N, C, ...]. Returns prev_sample and pred_original_sample, in the inputs' dtype. Noise is drawn as diffusers draws it,
        where t > 0; of a timestep that only the device knows, always when compiled or per sample, and else it is waited for, as there.
        IndexError for a timestep that the scheduler has none of.
        """
        n, channels, device = len(sample), sample.shape[1], sample.device
        learned = self.config.variance_type in ("learned", "learned_range")
        if learned != (model_output.shape[1] == 2 * channels):
            wanted = 2 * channels if learned else channels
            raise ValueError(
                f"with variance_type {self.config.variance_type!r} model_output must have {wanted} channels, not {model_output.shape[1]}"
            )
        rows = self._rows(timestep, n, device)
        number = self._whole(timestep)
        if number is None and isinstance(timestep, Tensor) and timestep.numel() == 1 and not torch.compiler.is_compiling():
            number = int(timestep)
            rows = self._rows(number, n, device)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        table = self._known(("rows",), torch.float64 if dtype == torch.float64 else torch.float32, device, self._table)
        self._check_chosen(timestep if number is None else number)
        noisy = number is None or number > 0
        counter = noisy and generator is None and self._options.counter
        z = None
        if noisy and not counter:
            shape = (n, channels, *model_output.shape[2:])
            z = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
        if self.config.variance_type == "learned" and noisy:
            if z is None:
                seeds, ids = self._columns(n, device)
                z = ops.normal(seeds, ids, table[rows, -1].long(), sample[0].numel()).reshape(sample.shape)
            z, counter = z * model_output[:, channels:] ** 0.5, False
        before, x0 = self._step(model_output, sample, table, rows, noise=z, counter=counter, threshold=self._dynamic)
        x0 = x0.to(self._dtype_of_x0(model_output, sample))
        if not return_dict:
            return before, x0
        return DDPMSchedulerOutput(prev_sample=before, pred_original_sample=x0)

    def _check_chosen(self, t: Tensor | int) -> None:
        """IndexError for a timestep that set_timesteps has not chosen, as far as that can be told without waiting for a device."""
        if not (self.custom_timesteps or self.num_inference_steps) or torch.compiler.is_compiling():
            return
        if isinstance(t, Tensor):
            if t.device.type != "cpu":
                return
            odd = t.reshape(-1)[~torch.isin(t.reshape(-1), self._host_timesteps())].tolist()
        else:
            odd = [] if (self._host_timesteps() == t).any() else [t]
        if odd:
            raise IndexError(f"timestep {odd[0]} is none of the {len(self.timesteps)} that set_timesteps has chosen")


class DDIMScheduler(_ByTimestep, scheduling_ddim.DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler (Song et al. 2021), with a fused step. See `use` and the module."""

    @functools.wraps(scheduling_ddim.DDIMScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt()

    def _walk(self) -> tuple[Tensor, Tensor]:
        t = self._every()
        after = t - self.config.num_train_timesteps // self.num_inference_steps
        if self._options.corrected:
            steps = self.timesteps.cpu().long()
            within = self._within(steps)
            after[steps[within]] = torch.cat([steps[1:], torch.tensor([-1])])[within]
        return t, after

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = None):  # type: ignore[no-untyped-def, assignment]
        """Choose the timesteps by number and `timestep_spacing`; the coefficients, of eta 0, go to the device with them."""
        super().set_timesteps(num_inference_steps)
        self._move_timesteps(device)
        self._prepare(("rows", 0.0, False), lambda: self._table(0.0, False))

    def _plan(self, eta: float = 0.0, clipped: bool = False) -> Table | None:
        return None if self._unplanned else self._timestep_plan(self._table(eta, clipped))

    def _draws(self, eta: float = 0.0) -> list[bool]:
        return [eta > 0] * len(self.timesteps)

    def _table(self, eta: float, clipped: bool) -> Tensor:
        t, after = self._walk()
        base = self._base()
        now, then = base[t], torch.where(after >= 0, base[after.clamp(min=0)], self.final_alpha_cumprod.cpu().to(base.dtype))
        left = 1 - now
        s = eta * ((1 - then) / left * (1 - now / then)) ** 0.5
        rest = ((1 - then - s**2) ** 0.5).double()  # of epsilon
        px, pm, ex, em = self._predicted(now)
        columns: dict[str, Tensor | float] = {"px": px, "pm": pm, "clip": self._clip, "s": s, "b": (then**0.5).double()}
        if clipped:
            alpha, sigma = (now**0.5).double(), (left**0.5).double()
            columns |= {"a": rest / sigma, "b": columns["b"] - rest * alpha / sigma}
        else:
            columns |= {"a": rest * ex, "d": rest * em}
        return self._by_timestep(t, after, columns)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:  # type: ignore[type-arg]
        """x_t to the timestep before (Song et al. 2021, equations 12 and 16), in one fused operation.

        model_output, sample: [N, C, ...]. timestep: a number, a tensor of one, or int64 [N], one per sample. Returns prev_sample and
        pred_original_sample, in the inputs' dtype. ValueError before `set_timesteps`, and for both a generator and variance_noise.
        """
        if self.num_inference_steps is None:
            raise ValueError("Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler")
        n, device = len(sample), sample.device
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        if eta > 0 and variance_noise is not None:
            dtype = torch.promote_types(dtype, variance_noise.dtype)
        eta, clipped = float(eta), bool(use_clipped_model_output)
        table = self._known(
            ("rows", eta, clipped), torch.float64 if dtype == torch.float64 else torch.float32, device, lambda: self._table(eta, clipped)
        )  # fmt: skip
        z, counter = None, False
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError(
                    "Cannot pass both generator and variance_noise. Please make sure that either `generator` or `variance_noise` stays `None`."
                )
            counter = variance_noise is None and generator is None and self._options.counter
            if not counter:
                z = variance_noise
                if z is None:
                    z = randn_tensor(model_output.shape, generator=generator, device=device, dtype=model_output.dtype)
                z = z.expand(sample.shape)
        rows, x = self._rows(timestep, n, device), sample
        if dtype != torch.promote_types(model_output.dtype, sample.dtype):  # the noise is of a wider one
            x = sample.to(dtype)
        before, x0 = self._step(model_output, x, table, rows, noise=z, counter=counter, threshold=self._dynamic)
        x0 = x0.to(self._dtype_of_x0(model_output, sample))
        if not return_dict:
            return before, x0
        return DDIMSchedulerOutput(prev_sample=before, pred_original_sample=x0)


class DPMSolverMultistepScheduler(_Fused, scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers' DPMSolverMultistepScheduler (Lu et al. 2022, "DPM-Solver++"; orders 1 to 3), with a fused step. See `use` and the module.

    fp64 stays fp64, where diffusers goes through fp32. Before `set_timesteps`, `add_noise` has the schedule upside down in diffusers (the noise of
    timestep 0 is that of T - 1); corrected=True puts it right.
    """

    _step_index: Any

    @functools.wraps(scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adopt()

    def set_timesteps(  # type: ignore[no-untyped-def]
        self,
        num_inference_steps: int = None,  # type: ignore[assignment]
        device: str | torch.device = None,  # type: ignore[assignment]
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ):
        """Choose the timesteps, by number and the config's spacing, or of one's own; the coefficients go to the device with them."""
        super().set_timesteps(num_inference_steps, mu=mu, timesteps=timesteps)
        self._move_timesteps(device)
        self._known("places", torch.int64, self.timesteps.device, self._places)
        if not self._converted:
            self._prepare(("rows", False), lambda: self._table(False))

    @property
    def _unplanned(self) -> str | None:
        if self._converted:
            return f"its scheduler bounds x0, and solves for the noise (thresholding, with {self.config.algorithm_type!r})"
        if self.config.variance_type in ("learned", "learned_range"):
            return f"its network says a variance (variance_type {self.config.variance_type!r}), which DPM-Solver drops"
        return super()._unplanned

    def _plan(self, eta: float = 0.0, clipped: bool = False) -> Table | None:
        steps, order = len(self.timesteps), self.config.solver_order
        if self._unplanned:
            return None
        at = torch.arange(steps)
        return self._loop_table(self._table(False)[at.clamp(max=order - 1) * steps + at])

    def _draws(self, eta: float = 0.0) -> list[bool]:
        return [self.config.algorithm_type.startswith("sde")] * len(self.timesteps)

    @property
    def _converted(self) -> bool:
        """Whether x0 is bounded sample by sample, and the noise estimate then taken from it: in diffusers' own operations."""
        return bool(self.config.thresholding and not self.config.algorithm_type.endswith("++"))

    @property
    def step_index(self) -> int | None:
        """How many of the timesteps lie behind; None before the first step."""
        index = self._step_index
        return int(index) if isinstance(index, Tensor) else index

    def _places(self) -> Tensor:
        """Where a loop that begins at a timestep begins, int64 [3 T]: its place in the timesteps, of several the second, of none the last."""
        steps = self.timesteps.cpu().long()
        found = self._within(steps).nonzero()[:, 0]
        value, order = torch.sort(steps[found], stable=True)
        rank = torch.arange(len(found)) - torch.searchsorted(value, value)  # among equals
        places = torch.full((3 * self._total,), len(steps) - 1)
        for i in (0, 1):
            places[value[rank == i]] = found[order[rank == i]]
        return places

    def _table(self, converted: bool) -> Tensor:
        """Rows of every place, for 0, 1, ... outputs to look back on: [order, steps, 11] as [order * steps, 11]."""
        config, n = self.config, len(self.timesteps)
        levels = self.sigmas.cpu()
        if self._options.corrected:
            levels = levels.double()
        alpha, sigma = self._sigma_to_alpha_sigma_t(levels)
        log_snr = torch.log(alpha) - torch.log(sigma)
        # The level of each step's start and end, and of the two starts before.
        i = torch.arange(n)
        (al, sg, lg), (al_, sg_, lg_) = ([v[place] for v in (alpha, sigma, log_snr)] for place in (i, i + 1))
        h = lg_ - lg
        r0, r1 = (lg - log_snr[i - 1]) / h, (log_snr[i - 1] - log_snr[i - 2]) / h
        kind, solver_type = config.algorithm_type, config.solver_type
        plus, noisy = kind.endswith("++"), kind.startswith("sde")
        zero = torch.zeros_like(h)
        # Weights of x, of D0 and of the noise; then of D1 at second order; then of D1 and D2 at third.
        if kind == "dpmsolver++":
            falling = torch.exp(-h) - 1.0
            x, d0, s = sg_ / sg, -(al_ * falling), zero
            second = -0.5 * (al_ * falling) if solver_type == "midpoint" else al_ * (falling / h + 1.0)
            third = al_ * (falling / h + 1.0), -(al_ * ((falling + h) / h**2 - 0.5))
        elif kind == "dpmsolver":
            rising = torch.exp(h) - 1.0
            x, d0, s = al_ / al, -(sg_ * rising), zero
            second = -0.5 * (sg_ * rising) if solver_type == "midpoint" else -(sg_ * (rising / h - 1.0))
            third = -(sg_ * (rising / h - 1.0)), -(sg_ * ((rising - h) / h**2 - 0.5))
        elif kind == "sde-dpmsolver++":
            gone = 1 - torch.exp(-2.0 * h)
            x, d0, s = sg_ / sg * torch.exp(-h), al_ * gone, sg_ * torch.sqrt(gone)
            bend = al_ * (gone / (-2.0 * h) + 1.0)
            second = 0.5 * (al_ * gone) if solver_type == "midpoint" else bend
            third = bend, al_ * ((gone - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        else:
            rising = torch.exp(h) - 1.0
            x, d0, s = al_ / al, -2.0 * (sg_ * rising), sg_ * torch.sqrt(torch.exp(2 * h) - 1.0)
            second = -(sg_ * rising) if solver_type == "midpoint" else -2.0 * (sg_ * (rising / h - 1.0))
            if config.solver_order > 2:
                raise ValueError(
                    'algorithm_type "sde-dpmsolver" has no third order; give solver_order=2, or algorithm_type="sde-dpmsolver++"'
                )
            third = second, zero
        if not noisy:
            s = zero
        # D1 = (m0 - m1) / r0, or by three outputs; D2 their bend.
        q = r0 / (r0 + r1)
        near = torch.stack([1 / r0, -1 / r0, zero])
        bend_of = torch.stack([1 / r0, -1 / r0 - 1 / r1, 1 / r1])
        weights = torch.stack(
            [
                torch.stack([d0, zero, zero]),
                torch.stack([d0, zero, zero]) + second * near,
                torch.stack([d0, zero, zero]) + third[0] * (near + q * bend_of) + third[1] * (1 / (r0 + r1)) * bend_of,
            ]
        )  # [order, m0 m1 m2, n]
        last = (i == n - 1) & (config.euler_at_final or (config.lower_order_final and n < 15) or config.final_sigmas_type == "zero")
        last_but_one = (i == n - 2) & (config.lower_order_final and n < 15)
        px, pm = self._converts(al, sg, levels[:-1], plus, converted)
        clip = 1.0 if plus and config.thresholding and config.sample_max_value == 1 else float("inf")
        parts = []
        for behind in range(config.solver_order):
            order = torch.full((n,), min(config.solver_order, behind + 1))
            order = torch.where(last | (levels[1:] == levels[:-1]), 1, torch.where(last_but_one, order.clamp(max=2), order))
            b, c, earlier = weights[order - 1, :, i].unbind(1)
            columns = {"px": px, "pm": pm, "clip": clip, "a": x, "b": b, "c": c, "h": earlier, "s": s, "row": i}
            values = [torch.as_tensor(columns.get(name, 0.0), dtype=torch.float64).expand(n) for name in STEP_COLUMNS]
            parts.append(torch.stack(values, dim=1))
        return torch.cat(parts)

    def _converts(self, alpha: Tensor, sigma: Tensor, level: Tensor, plus: bool, converted: bool) -> tuple[Tensor, Tensor]:
        """px, pm of what the solver integrates: x0 (DPM-Solver++) or epsilon (DPM-Solver), fp64."""
        kind = self.config.prediction_type
        alpha, sigma, level = alpha.double(), sigma.double(), level.double()
        none, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if converted:
            return none, one
        known = {"epsilon": (none, one), "sample": (1 / sigma, -alpha / sigma), "v_prediction": (sigma, alpha)}
        if plus:
            known = {
                "epsilon": (1 / alpha, -sigma / alpha),
                "sample": (none, one),
                "v_prediction": (alpha, -sigma),
                "flow_prediction": (one, -level),
            }
        if kind not in known:
            names = ", ".join(f"`{name}`" for name in known)
            raise ValueError(f"prediction_type given as {kind} must be one of {names} for the DPMSolverMultistepScheduler.")
        return known[kind]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:  # type: ignore[type-arg]
        """x to the next of the timesteps, in one fused operation.

        model_output, sample: [N, C, ...]; of a model that says its variance, in as many channels more, the first C are taken. timestep: a number or
        a tensor of one, where the loop begins, after which the scheduler counts; or int64 [N], one per sample, all after as many steps. Returns
        prev_sample in the inputs' dtype. ValueError before `set_timesteps`, IndexError after the last step.
        """
        if self.num_inference_steps is None:
            raise ValueError("Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler")
        n, device, config, steps = len(sample), sample.device, self.config, len(self.timesteps)
        each = isinstance(timestep, Tensor) and timestep.numel() > 1
        if self._step_index is None and not each:
            self._begin(timestep, device)
        behind = min(self.lower_order_nums, config.solver_order - 1)
        index = self._step_index
        if each:
            rows = self._known("places", torch.int64, device, self._places)[self._rows(timestep, n, device)] + behind * steps
        elif isinstance(index, Tensor):
            rows = index + behind * steps
        elif index >= steps:
            raise IndexError(f"all {steps} steps are done; set_timesteps begins anew")
        else:
            place = behind * steps + index
            rows = self._known("rows", torch.int64, device, lambda: torch.arange(config.solver_order * steps))[place : place + 1]
        converted = self._converted
        m = model_output
        if converted:
            m = self.convert_model_output(m, sample=sample)
        dtype = torch.promote_types(m.dtype, sample.dtype)
        table = self._known(
            ("rows", converted), torch.float64 if dtype == torch.float64 else torch.float32, device, lambda: self._table(converted)
        )  # fmt: skip
        z, counter = None, False
        if config.algorithm_type.startswith("sde"):
            counter = variance_noise is None and generator is None and self._options.counter
            if variance_noise is not None:
                z = variance_noise.to(device=device).expand(sample.shape)
            elif not counter:
                z = randn_tensor(sample.shape, generator=generator, device=device, dtype=torch.float32)
        outputs = self.model_outputs
        before, x0 = self._step(
            m, sample, table, rows, noise=z, counter=counter, wide=True,
            threshold=bool(config.thresholding and not converted and config.sample_max_value != 1),
            before=outputs[-1] if behind > 0 else None, earlier=outputs[-2] if behind > 1 else None,
        )  # fmt: skip
        if model_output.dtype != dtype and config.prediction_type == ("sample" if config.algorithm_type.endswith("++") else "epsilon"):
            before = before.to(model_output.dtype)  # as what the network has predicted, which the solver takes as it is
        self.model_outputs = [*outputs[1:], x0]
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        if not each:
            self._step_index = self._step_index + 1
        if not return_dict:
            return (before,)
        return SchedulerOutput(prev_sample=before)

    def _begin(self, timestep: int | Tensor, device: torch.device) -> None:
        """Find the first place of a loop; compiled, it stays on the device."""
        if self._begin_index is not None:
            self._step_index = self._begin_index
        elif torch.compiler.is_compiling():
            places = self._known("places", torch.int64, device, self._places)
            self._step_index = places[self._rows(timestep, 1, device)]
        else:
            number = None if _fractional(timestep) else self._whole(timestep)
            self._init_step_index(timestep if number is None else number)

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The place of a timestep in the schedule: of several the second, so that a loop from the middle skips none, and of none the last."""
        if schedule_timesteps is None and not isinstance(timestep, Tensor):
            schedule_timesteps = self._host_timesteps()
        return int(super().index_for_timestep(timestep, schedule_timesteps))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: torch.IntTensor) -> Tensor:
        """alpha x_0 + sigma noise at the levels of the timesteps, or, in a loop that has begun or has a begin index, at its level.

        original_samples, noise: [N, ...], any float dtype. timesteps: [N].
        """
        device = original_samples.device
        at = self._begin_index if self._step_index is None else self._step_index
        if self._begin_index is None:
            at = None

        def levels(dtype: torch.dtype) -> Tensor:
            def make() -> Tensor:
                sigmas = self.sigmas.cpu().to(dtype)
                if self._options.corrected and self.num_inference_steps is None:
                    sigmas = sigmas.flip(0)
                alpha, sigma = self._sigma_to_alpha_sigma_t(sigmas)
                both = torch.stack([alpha, sigma, torch.zeros_like(alpha), torch.zeros_like(alpha)], dim=1)
                return both if at is not None else both[self._places()]

            return self._known(("levels", at is not None), dtype, device, make)

        if at is not None:
            levels_of = self._known("level", torch.int64, device, lambda: torch.arange(len(self.sigmas)))
            index = at if isinstance(at, Tensor) else levels_of[at : at + 1]
            timesteps = index.expand(timesteps.shape[0])  # type: ignore[assignment]
        return self._forward(original_samples, noise, timesteps, levels)


_SCHEDULERS: dict[type, type] = {
    scheduling_ddpm.DDPMScheduler: DDPMScheduler,
    scheduling_ddim.DDIMScheduler: DDIMScheduler,
    scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
}


def _patched(scheduler: Any) -> bool:
    """Whether a scheduler has a function put upon it, or, of a class derived from fastdiff's, a step of its own: it is to be called as it is."""
    derived = isinstance(scheduler, _Fused) and all(type(scheduler).step is not ours.step for ours in _SCHEDULERS.values())  # type: ignore[attr-defined]
    put = [value for value in vars(scheduler).values() if callable(value) and not hasattr(value, "_torchdynamo_orig_callable")]
    return derived or bool(put)


def _ours(scheduler: Any) -> Any:
    """The fused scheduler of the same class, config and state, where there is one; else the scheduler itself."""
    ours = _SCHEDULERS.get(type(scheduler))
    if ours is None or _patched(scheduler):
        return scheduler
    made = ours.from_config(scheduler.config)  # type: ignore[attr-defined]
    for name, value in vars(scheduler).items():  # a schedule that was set by hand, for one, stands in no config
        if not callable(value):
            setattr(made, name, copy.deepcopy(value) if isinstance(value, (Tensor, list)) else value)
    return made


@dataclass(frozen=True)
class Settings:
    """What `accelerate` was asked for."""

    dtype: torch.dtype | None = None
    compile: bool | str = "auto"
    micro_batch: int | str = "auto"


class _Draws:
    """The noise of a loop, drawn from torch's generators as diffusers draws it; from the first row again where a loop starts again."""

    def __init__(
        self, shape: tuple[int, ...], generator: Any, device: torch.device, dtype: torch.dtype, draws: Sequence[bool]
    ) -> None:  # fmt: skip
        self.draw = functools.partial(randn_tensor, shape, generator=generator, device=device, dtype=dtype)
        self.draws, self.device = draws, device
        self.generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        self.states = self._states()

    def _states(self) -> list[Tensor]:
        if self.generators:
            return [generator.get_state() for generator in self.generators]
        return [torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()]

    def __call__(self, row: int) -> Tensor | None:
        if row == 0:
            if self.generators:
                for generator, state in zip(self.generators, self.states, strict=True):
                    generator.set_state(state)
            elif self.device.type == "cuda":
                torch.cuda.set_rng_state(self.states[0], self.device)
            else:
                torch.set_rng_state(self.states[0])
        return self.draw() if self.draws[row] else None


class _Through:
    """A bar that moves as an iterator is gone through, from whichever thread."""

    def __init__(self, bar: Iterable[int]) -> None:
        self.left, self.lock = iter(bar), threading.Lock()

    def __enter__(self) -> Any:
        self.update()
        return self

    def update(self, n: int = 1) -> None:
        with self.lock:
            for _ in range(n):
                next(self.left, None)

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(AttributeError):  # of an iterator that is no generator
            self.left.close()  # type: ignore[attr-defined]


# What the loop's network may compute in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Made:
    """A sampler that is kept. source: the network that it was given. stamp: of the weights as they were, where compiled code has them built in."""

    sampler: Sampler
    source: nn.Module
    stamp: tuple[tuple[int, int], ...] | None

    def follow(self) -> Sampler:
        """The sampler, with the source's weights as they are now, whatever has changed them."""
        if self.sampler.model is not self.source:  # another dtype's copy
            with torch.inference_mode(False), torch.no_grad():
                copied, given = ([*model.parameters(), *model.buffers()] for model in (self.sampler.model, self.source))
                torch._foreach_copy_(copied, given)
        return self.sampler


class _Owned:
    """A pipeline of a UNet2DModel, or of a network that `save` wrote, whose loop is fastdiff's."""

    unet: Any
    scheduler: Any
    _takes: ClassVar[type[_Fused]] = _Fused
    _settings: Settings = Settings()
    _said: str | None = None  # why the loop is diffusers' own, as it was logged
    _samplers: dict[Hashable, _Made]

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own samplers."""
        return {name: value for name, value in self.__dict__.items() if name != "_samplers"}

    def __reduce__(self) -> Any:
        """By the class that was accelerated: what `accelerate` has made of it stands in no module."""
        return _revived, (self.__dict__.get("_before", {}).get("class", type(self)),), self.__getstate__()

    def _obstacle(self) -> str | None:
        """Why the loop is diffusers' own, or None where it is fastdiff's."""
        unet, device = self.unet, self._execution_device  # type: ignore[attr-defined]
        if not isinstance(unet, UNet2DModel) and not _saved(unet):
            return f"its unet is a {type(unet).__name__}, not a UNet2DModel"
        if hasattr(unet, "_hf_hook"):
            return "its unet has a hook of accelerate's, as of one that is offloaded"
        if any(hasattr(module, "_diffusers_hook") for module in unet.modules()):
            return "its unet has hooks of diffusers', as of layerwise casting or group offloading"
        if device.type not in AUTO_ROWS:
            return f"fastdiff has no loop for {device.type}"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on (accelerate's dtype does the same, and faster)"
        if (self._settings.dtype or unet.dtype) not in DTYPES:
            return f"its unet computes in {unet.dtype}"
        if getattr(unet.config, "class_embed_type", None) is not None:
            return f"its unet has a class_embed_type, {unet.config.class_embed_type!r}"
        if any(isinstance(module, nn.Dropout) and module.training and module.p for module in unet.modules()):
            return "its unet is in training mode and has dropout (unet.eval() ends that)"
        if not isinstance(self.scheduler, self._takes):
            return f"its {type(self.scheduler).__name__} is not one of fastdiff's that it takes"
        if _patched(self.scheduler):
            return f"its {type(self.scheduler).__name__} has a step of its own"
        reason: str | None = self.scheduler._unplanned
        return reason

    def _size(self, n: int, asked: bool) -> int | None:
        """Images per micro-batch, or None where diffusers' own loop does as well, and nothing is asked for that it has not."""
        unet, settings, device = self.unet, self._settings, self._execution_device  # type: ignore[attr-defined]
        if settings.micro_batch != "auto":
            return int(settings.micro_batch)
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        tiled = (settings.dtype or unet.dtype) == torch.bfloat16 and native.has_tiles()
        in_c = settings.compile in ("auto", False) and (tiled or settings.dtype in (None, unet.dtype)) and not rewrite.accelerated(unet)
        if device.type == "cpu" and in_c and (tiled or cpu.shared(unet)):
            return math.ceil(n / math.ceil(n / by_cost(n, AUTO_ROWS["cpu"], threads, not tiled, tiled)[0]))
        if n < threads and not asked and settings == Settings():  # only PyTorch's own loop lets cores share an image
            return None
        return min(math.ceil(n / threads), AUTO_ROWS[device.type])

    def _sampler(self, table: Table, size: int) -> Sampler:
        """One for the network as it is, which is kept as long as no module of it is another or is changed, whatever its weights are."""
        unet, settings, device = self.unet, self._settings, self._execution_device  # type: ignore[attr-defined]
        weights = [*unet.parameters(), *unet.buffers()]
        places = tuple((id(v), v.data_ptr(), v.dtype) for v in weights)
        key = (id(unet), device, settings, size, rewrite.accelerated(unet), traits(unet), places)
        known = self.__dict__.setdefault("_samplers", {})
        made: _Made | None = known.pop(key, None)
        if made is None or (made.stamp is not None and made.stamp != native.stamp(weights)):
            while len(known) >= 4:
                known.pop(next(iter(known)))
            source, shape, classes = _network(unet)
            compile = settings.compile
            if compile == "fused" and not isinstance(source, UNet):
                source, compile = rewrite.accelerate(copy.copy(source) if source is unet else source), "auto"
            sampler = Sampler(
                source, Schedule.from_alphas_cumprod(self.scheduler.alphas_cumprod), shape, solver=table, device=device,
                dtype=settings.dtype or unet.dtype, num_classes=classes, compile=compile, micro_batch=size,
            )  # fmt: skip
            made = _Made(sampler, source, native.stamp(weights) if sampler.compile and device.type == "cpu" else None)
        known[key] = made  # the last one used stands last
        return made.follow()

    def _bar(self, total: int) -> Any:
        """The pipeline's progress bar; one of its owner's goes through something, as in diffusers' loop."""
        made = self.progress_bar  # type: ignore[attr-defined]
        return made(total=total) if getattr(made, "__func__", None) is DiffusionPipeline.progress_bar else _Through(made(range(total)))

    def _sample(
        self,
        n: int,
        generator: Any,
        steps: int,
        output_type: str | None,
        return_dict: bool,
        class_labels: Any,
        callback: Callable[[int, Tensor], None] | None,
        eta: float = 0.0,
        clipped: bool = False,
        why: str | None = None,
    ) -> Any:
        """The call, or None where diffusers' own loop has to do it. why: what is known to stand against fastdiff's."""
        scheduler, device = self.scheduler, self._execution_device  # type: ignore[attr-defined]
        options: Options = getattr(scheduler, "_options", Options())
        counter = generator is None and options.counter
        asked = class_labels is not None or callback is not None or counter
        obstacle = self._obstacle()
        why = why or ("it makes no images" if n < 1 or steps < 1 else None) or obstacle
        size = None if why else self._size(n, asked)
        if why and asked:
            raise ValueError(
                f"class_labels, callback and use(noise=\"counter\") need fastdiff's loop, and this pipeline runs in diffusers' own: {why}"
            )
        if size is None:
            # What has changed since it was accelerated is news, once.
            level = logging.WARNING if obstacle not in (None, self._said) else logging.INFO
            self._said = obstacle
            logger.log(level, "%s: diffusers' own loop: %s", type(self).__name__, why or f"it does {n} of its images as fast")
            return None
        scheduler.set_timesteps(steps)
        table = scheduler._plan(eta, clipped)
        if isinstance(self.unet, UNet2DModel) and (self.unet.config.num_class_embeds is None) != (class_labels is None):
            raise ValueError("class_labels go with a UNet that has class embeddings (num_class_embeds): give both or neither")
        sampler = self._sampler(table, size)
        call: dict[str, Any] = {"labels": class_labels, "callback": callback, "progress": self._bar}
        shape, dtype = (n, *sampler.shape), self.unet.dtype
        if counter:
            call |= {"seed": options.seed, "first": options.first} if options.seeds is None else {"seeds": options.seeds}
        else:
            call["latents"] = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            draws = scheduler._draws(eta)
            if any(draws):
                noise_dtype = torch.float32 if isinstance(scheduler, DPMSolverMultistepScheduler) else dtype
                call["noise"] = _Draws(shape, generator, device, noise_dtype, draws)
        made = (sampler(n, solver=table, **call) / 2 + 0.5).clamp(0, 1)
        image: Any = made.to(dtype) if output_type == "pt" else made.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)  # type: ignore[attr-defined]
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return ImagePipelineOutput(images=image) if return_dict else (image,)


def _saved(model: Any) -> bool:
    """Whether it is fastdiff's own UNet as `save` has written it."""
    return type(model).__name__ == "FastdiffUNet" and isinstance(getattr(model, "net", None), nn.Module)


def _network(model: Any) -> tuple[nn.Module, tuple[int, ...], int | None]:
    """What the loop runs of a pipeline's network, the shape of an image, and the number of classes."""
    config = model.config
    sides = config.sample_size
    shape = (config.in_channels, *((sides, sides) if isinstance(sides, int) else sides))
    if not _saved(model):
        classes = None if config.num_class_embeds is None else config.num_class_embeds - 1
        return model if rewrite.accelerated(model) else adopted(model, classes), shape, classes
    classes = len(config.classes) or None
    put = any(part[-1] for part in traits(model))  # hooks, or a forward of one's own
    code = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    if put or rewrite.accelerated(model) or code is None or Path(code).read_text() != _source():
        return model, shape, classes
    with torch.device("meta"):
        made = UNet(UNetConfig.from_config(dict(config.network)))
    made.load_state_dict(dict(model.net.named_parameters()), assign=True)
    return made.eval(), shape, classes


def _revived(cls: type) -> Any:
    """An accelerated pipeline of a class, to be filled."""
    return object.__new__(_with_loop(cls))


@functools.cache
def _with_loop(cls: type) -> type:
    """The class of a pipeline with fastdiff's loop in place of diffusers'; itself where it has a loop of its own, or fastdiff's already."""
    for ours in (DDPMPipeline, DDIMPipeline):
        theirs = ours.__mro__[2]
        if cls is theirs:
            return ours
        if cls.__call__ is theirs.__call__:  # type: ignore[attr-defined]

            @functools.wraps(cls.__init__)  # type: ignore[misc]
            def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                cls.__init__(self, *args, **kwargs)  # type: ignore[misc]
                self.scheduler = _ours(self.scheduler)

            # Its constructor's arguments are what diffusers takes for the parts of a pipeline.
            return type(cls.__name__, (ours, cls), {"__module__": cls.__module__, "__init__": __init__})
    return cls


class DDPMPipeline(_Owned, pipeline_ddpm.DDPMPipeline):
    """diffusers' DDPMPipeline with fastdiff's schedulers and loop; what `accelerate` makes of one. See `accelerate`."""

    def __init__(self, unet: UNet2DModel, scheduler: scheduling_ddpm.DDPMScheduler):
        super().__init__(unet, _ours(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> ImagePipelineOutput | tuple:  # type: ignore[type-arg]
        """Images, as diffusers returns them. class_labels: a class, or [batch_size]. callback(row, x0): after every row, with the guess of x_0."""
        result = self._sample(batch_size, generator, num_inference_steps, output_type, return_dict, class_labels, callback)
        if result is None:
            result = super().__call__(batch_size, generator, num_inference_steps, output_type, return_dict)
        return result  # type: ignore[no-any-return]


class DDIMPipeline(_Owned, pipeline_ddim.DDIMPipeline):
    """diffusers' DDIMPipeline with fastdiff's scheduler and loop; what `accelerate` makes of one. See `accelerate`.

    diffusers' constructor makes a DDIMScheduler of its own from whatever scheduler it is given, by its config. This one keeps a fastdiff
    scheduler as it is, options of `use` and all, and makes a fastdiff DDIMScheduler of any other.
    """

    def __init__(self, unet: UNet2DModel, scheduler: scheduling_ddim.DDIMScheduler):
        super().__init__(unet, scheduler)  # type: ignore[arg-type]
        self.scheduler = scheduler if isinstance(scheduler, DDIMScheduler) else _ours(self.scheduler)

    _takes = DDIMScheduler

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> ImagePipelineOutput | tuple:  # type: ignore[type-arg]
        """Images, as diffusers returns them. class_labels: a class, or [batch_size]. callback(row, x0): after every row, with the guess of x_0."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size}; give one per image")
        why = None if 0 <= eta <= 1 else f"eta is {eta}, and not from 0 to 1"
        result = self._sample(
            batch_size, generator, num_inference_steps, output_type, return_dict, class_labels, callback, eta, bool(use_clipped_model_output), why
        )  # fmt: skip
        if result is None:
            result = super().__call__(batch_size, generator, eta, num_inference_steps, use_clipped_model_output, output_type, return_dict)
        return result  # type: ignore[no-any-return]


def accelerate(
    pipe: DiffusionPipeline, *, dtype: torch.dtype | None = None, compile: bool | str = "auto", micro_batch: int | str = "auto"
) -> DiffusionPipeline:
    """Make a pipeline fast, in place, and return it: the same call, images and return as before. `unaccelerate` undoes it.

    A DDPMPipeline or DDIMPipeline, or one of a class derived from them that leaves their `__call__` as it is, gets fastdiff's loop: all rows of
    a micro-batch in CUDA graphs where noise is not asked of a generator, row by row where it is, so that the images are those of before from
    the same generator. With `pipe.scheduler.use(noise="counter")` and no generator the noise is made within the graphs. Its call also takes
    class_labels and callback. dtype: what the network computes in, torch.float32, bfloat16 or float16, default its own; torch.bfloat16 is faster on
    CUDA and on a CPU with AMX, and near the same images. compile, micro_batch: as `Sampler`'s, but a micro-batch is by default as large as the batch,
    up to what suits the device, and "fused" runs a UNet2DModel as `fastdiff.accelerate` has it. Weights are followed, whatever changes them. A network
    that gives numbers that are not finite is an error.

    Where the loop cannot be fastdiff's, as with a scheduler that it has none of, it is diffusers' own, and what only fastdiff's has is an error.
    In any other pipeline, its own loop stays: a scheduler that fastdiff has is swapped, and the UNet is compiled (on CUDA, or with
    compile=True; "fused" as by `fastdiff.accelerate`). What was done, and why not more, is logged by the logger "fastdiff.diffusers", and is the text
    `pipe.accelerated`; what has changed since, and keeps fastdiff's loop from a call, is a warning of that logger's, once. A scheduler's state, such
    as a schedule set by hand, goes with it. Accelerated again, a pipeline keeps the scheduler that it has, options of `use` and all.
    ValueError for what is no diffusers pipeline, and for arguments that there are not.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"accelerate takes a pipeline of diffusers, not {type(pipe).__name__}; for a network alone, see fastdiff.Sampler")
    _check_settings(dtype, compile, micro_batch)
    scheduler = getattr(pipe, "scheduler", None)
    if "_before" in pipe.__dict__:
        unaccelerate(pipe)
    cls: Any = type(pipe)
    unet, done = getattr(pipe, "unet", None), []
    before: dict[str, Any] = {"class": cls, "scheduler": getattr(pipe, "scheduler", None), "swapped": _ours(scheduler), "strides": []}
    if isinstance(unet, nn.Module):
        before["strides"] = [(p, p.stride()) for p in unet.parameters() if p.ndim == 4]
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if before["swapped"] is not before["scheduler"]:
        pipe.scheduler = before["swapped"]
        done.append(f"its {type(scheduler).__name__} is fastdiff's")
    elif scheduler is not None and not isinstance(scheduler, _Fused):
        lack = "something was put upon it" if type(scheduler) in _SCHEDULERS else "fastdiff has none"
        done.append(f"its {type(scheduler).__name__} stays, since {lack}")
    pipe.__class__ = _with_loop(cls)
    if isinstance(pipe, _Owned):
        pipe._settings = Settings(dtype, compile, micro_batch)
        why = pipe._said = pipe._obstacle()
        ours = why is None
        done.insert(0, "its loop is fastdiff's" if ours else f"its own loop stays, as it is: {why}")
    else:
        ours = False
        done.insert(0, "its own loop stays")
        if isinstance(unet, nn.Module):
            before["compiled"] = unet, unet._compiled_call_impl
            done.append(_compile(unet, compile))
        if dtype is not None or micro_batch != "auto":
            done.append("dtype and micro_batch change nothing")
    pipe.__dict__["_before"] = before
    pipe.accelerated = f"{cls.__name__}: " + "; ".join(done)
    logger.log(logging.INFO if ours else logging.WARNING, "%s", pipe.accelerated)
    return pipe


def _check_settings(dtype: Any, compile: Any, micro_batch: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or None for the network's own")
    if compile not in (True, False, "auto", "fused"):
        raise ValueError(f'compile is {compile!r}; give True, False, "fused" or "auto"')
    if micro_batch != "auto" and (not whole(micro_batch) or int(micro_batch) < 1):
        raise ValueError(f'micro_batch is {micro_batch!r}; give a whole number of at least 1, or "auto"')


def _compile(unet: nn.Module, compile: bool | str) -> str:
    """Compile the network of a pipeline with a loop of its own, and say so."""
    if compile == "fused":
        rewrite.accelerate(unet)
        return "its UNet runs by fastdiff's fused operations"
    if compile == "auto" and unet._compiled_call_impl is not None:
        return "its UNet stays compiled as it was"
    if compile is True or (compile == "auto" and any(p.device.type == "cuda" for p in unet.parameters())):
        unet.compile()  # type: ignore[no-untyped-call]
        return "its UNet is compiled"
    return "its UNet is not compiled (compile=True does it on a CPU)"


def unaccelerate(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `accelerate`, in place, and return the pipeline. A scheduler that was put in since stays. ValueError for one that is not accelerated."""
    before = pipe.__dict__.pop("_before", None)
    if before is None:
        raise ValueError("this pipeline is not accelerated; fastdiff.diffusers.accelerate does it")
    if before["swapped"] is not before["scheduler"] and pipe.scheduler is before["swapped"]:
        pipe.scheduler = before["scheduler"]
    pipe.__class__ = before["class"]
    for p, stride in before["strides"]:  # of 1 x 1 convolutions too, where they decide which code runs, and so how it rounds
        p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p.data)
    if "compiled" in before:
        unet, compiled = before["compiled"]
        unet._compiled_call_impl = compiled
    for name in ("accelerated", "_settings", "_samplers", "_said"):
        pipe.__dict__.pop(name, None)
    return pipe


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
# What a pipeline's folder holds as unet/fastdiff_unet.py, after the source of fastdiff/unet.py.
WRAPPER = '''

from diffusers import ConfigMixin, ModelMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.models.unets.unet_2d import UNet2DOutput  # noqa: E402


class FastdiffUNet(ModelMixin, ConfigMixin):
    """fastdiff's UNet as a component of a diffusers pipeline. class_labels: int64 [N], or None for the null class."""

    @register_to_config
    def __init__(self, sample_size, in_channels, out_channels, network, classes=(), record=None):
        super().__init__()
        self.net = UNet(UNetConfig.from_config(dict(network)))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        answer = self.net(sample, timestep, class_labels)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)
'''


def _source() -> str:
    return Path(unet.__file__).read_text() + WRAPPER


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint as the folder of a DDPMPipeline, which plain diffusers, without fastdiff, loads and samples from identically in fp32.

    A network that came from a UNet2DModel is written as one. fastdiff's own UNet is none, nor can one compute it (its groups are of so many channels,
    not so many groups, and it works on folded pixels), so its source goes into the folder, as diffusers has it for components of one's own:
    `DDPMPipeline.from_pretrained(path, trust_remote_code=True)`. Without class_labels that samples from the null class. Its scheduler has the
    checkpoint's schedule, prediction and clip, and what `load` has kept of the one before.
    ValueError for a prediction that diffusers' DDPM has no name for, or a schedule without betas.
    """
    model, prediction = checkpoint.model, PREDICTION_TYPES.get(checkpoint.prediction)
    if prediction is None or not checkpoint.schedule.preserving:
        raise ValueError(
            f"diffusers' DDPMScheduler has no prediction {checkpoint.prediction!r} with a schedule of {checkpoint.schedule.name!r}; "
            f"it has {', '.join(PREDICTION_TYPES)} and schedules that preserve variance"
        )
    folder = Path(path)
    component: Any
    if isinstance(model, UNet2D):
        component, names = UNet2DModel(**model.config.config), ["diffusers", "UNet2DModel"]
        component.load_state_dict(model.state_dict())
    else:
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        code = folder / "unet" / "fastdiff_unet.py"
        code.write_text(_source())
        spec = importlib.util.spec_from_file_location("fastdiff_unet", code)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
        channels, height, width = model.config.shape
        component = module.FastdiffUNet(
            (height, width), channels, channels, model.config.config, list(checkpoint.classes), checkpoint.record
        )  # fmt: skip
        component.net.load_state_dict(model.state_dict())
        names = ["fastdiff_unet", "FastdiffUNet"]
    component.save_pretrained(folder / "unet")
    kept = checkpoint.record.get("scheduler")
    settings = {name: kept[name] for name in KEPT if name in kept} if isinstance(kept, dict) else {}
    if component.config.out_channels == 2 * component.config.in_channels:
        settings["variance_type"] = "learned_range"
    settings |= {"clip_sample": checkpoint.clip is not None, "clip_sample_range": checkpoint.clip or 1.0}
    scheduler = DDPMScheduler(
        num_train_timesteps=checkpoint.schedule.timesteps, trained_betas=checkpoint.schedule.betas.tolist(), prediction_type=prediction,
        **settings,
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": names,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# Settings of a pipeline's scheduler that `load` keeps in record["scheduler"], beside its _class_name, and `save` writes again.
KEPT = (
    "variance_type", "timestep_spacing", "steps_offset", "thresholding", "dynamic_thresholding_ratio", "sample_max_value",
)  # fmt: skip
# Schedulers whose x is alpha x_0 + sigma z with alpha^2 + sigma^2 = 1, of betas that DDPMScheduler has, too.
PRESERVING = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a folder of a diffusers pipeline with a UNet2DModel, or one that `save` wrote. fp32, on the CPU, in eval mode.

    Weights are read from unet/diffusion_pytorch_model.safetensors alone, never from a pickled .bin, and no code of the folder is run. Limits and
    memory are those of `fastdiff.load`, for the file and the three JSON files alike. Classes of a UNet2DModel are named by their numbers; the last of
    its class embeddings is taken for the null class. Of the scheduler the betas and the prediction are read, and the bound of x_0 that it has, if any,
    as `clip`. Where it is not a DDPMScheduler with the defaults, record["scheduler"] has its _class_name, and its variance, spacing and thresholding,
    which a sampler is told as solver, variance, spacing and threshold. CheckpointError where there is no such folder, or its network or schedule is
    not covered.
    """
    folder = Path(path)
    try:
        index = read_json(folder / "model_index.json")
        settings = read_json(folder / "unet" / "config.json")
        scheduling = read_json(folder / "scheduler" / "scheduler_config.json")
        kind = index["unet"][1]
    except (OSError, ValueError, KeyError, TypeError) as e:
        missing = (
            f"{Path(e.filename).relative_to(folder)} is missing"
            if isinstance(e, FileNotFoundError) and e.filename
            else f"{type(e).__name__}: {e}"
        )
        raise CheckpointError(f"{folder} is not the folder of a diffusers pipeline with a unet and a scheduler: {missing}") from None
    model: UNet | UNet2D
    try:
        if kind not in ("UNet2DModel", "FastdiffUNet"):
            raise ValueError(
                f"its network is a {kind}; fastdiff reads UNet2DModel (any other runs as it is, by accelerate or fastdiff.Sampler)"
            )
        with torch.device("meta"):  # takes no memory before the file is known to have the weights
            if kind == "UNet2DModel":
                model = UNet2D(UNet2DConfig.from_config(settings))
                classes = tuple(str(i) for i in range(model.config.num_classes or 0))
            else:
                model = UNet(UNetConfig.from_config(settings["network"]))
                classes = tuple(settings["classes"])
        weights = read_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]
        fill(model, {_renamed(name, kind): v for name, v in weights.items()})
        if (
            not all(isinstance(c, str) for c in classes)
            or len(set(classes)) != len(classes)
            or len(classes) != (model.config.num_classes or 0)
        ):
            raise ValueError(f"classes are no {model.config.num_classes or 0} different names")
        if odd := odd_name(classes):
            raise ValueError(odd)
        steps = scheduling.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {steps!r}; it must be a whole number of at most {MAX_TIMESTEPS}")
        if scheduling.get("_class_name") not in PRESERVING or scheduling.get("use_flow_sigmas"):
            what = "has flow sigmas" if scheduling.get("use_flow_sigmas") else f"is {scheduling.get('_class_name')}"
            raise ValueError(f"its scheduler {what}, whose schedule is not one of betas; read are those of {', '.join(PRESERVING)}")
        scheduler = scheduling_ddpm.DDPMScheduler.from_config(scheduling)
        names = {name: ours for ours, name in PREDICTION_TYPES.items()}
        if scheduler.config.prediction_type not in names:
            raise ValueError(f"prediction_type {scheduler.config.prediction_type!r} is not covered; it may be {', '.join(names)}")
        schedule = Schedule.from_alphas_cumprod(scheduler.alphas_cumprod)
        record = dict(settings.get("record") or {})
        kept = {name: scheduling[name] for name in ("_class_name", *KEPT) if name in scheduling}
        if not kept.items() <= ({"_class_name": "DDPMScheduler"} | _defaults("DDPMScheduler")).items():
            record["scheduler"] = kept
        clip = _bound(scheduling)
    # diffusers believes its configuration: what it does with an odd one is any of these.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError, ArithmeticError) as e:
        raise CheckpointError(f"{folder} cannot be read as a checkpoint: {' '.join(str(e).split())[:300]}") from None
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Checkpoint(model, schedule, names[scheduler.config.prediction_type], classes, record, clip=clip)


def _bound(scheduling: dict[str, Any]) -> float | None:
    """What a scheduler of this configuration clamps x0 to, or None; also where it is a quantile of each image. ValueError where it is no number."""
    said = _defaults(scheduling["_class_name"])
    said = {name: scheduling.get(name, value) for name, value in said.items()}
    if said.get("thresholding"):
        return 1.0 if said["sample_max_value"] == 1 else None
    if not said.get("clip_sample"):
        return None
    bound = said.get("clip_sample_range", 1.0)
    if type(bound) not in (int, float) or not 0 < bound < math.inf:
        raise ValueError(f"clip_sample_range is {bound!r}; it must be a positive number")
    return float(bound)


def _defaults(scheduler: str) -> dict[str, Any]:
    """The settings of a diffusers scheduler that is given none."""
    parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _renamed(name: str, kind: str) -> str:
    """A weight's name as the network has it, by which files of diffusers before 0.12 did not yet call those of attention."""
    if kind == "FastdiffUNet":
        return name.removeprefix("net.")
    before, _, last = name.rpartition(".")
    block, _, part = before.rpartition(".")
    return f"{block}.{OLD_ATTENTION[part]}.{last}" if part in OLD_ATTENTION else name

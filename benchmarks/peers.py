"""Who fastdiff is measured against, all with the same network, solver, steps and dtype: each a `Peer`, called for n images.

All of them take the same steps, so from the same noise a solver that adds none brings them to the same images, to rounding; `bench_sampler` checks it
before it times them. Whoever is not installed, or cannot do what is asked, raises `LeftOutError` with the reason, which stands in the row.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import Schedule, UNet, UNetConfig, solvers


class LeftOutError(Exception):
    """A peer that cannot run here, and why."""


@dataclass(frozen=True)
class Task:
    """What to sample: a network called `model(x, t)`, or `model(x, t, labels)` with classes, on its device and in its dtype."""

    model: nn.Module
    schedule: Schedule
    prediction: str
    solver: str
    steps: int
    shape: tuple[int, int, int] = (3, 16, 16)
    num_classes: int | None = None
    guidance: float = 1.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def labels(self, n: int, device: torch.device | str | None = None) -> Tensor | None:
        return None if self.num_classes is None else torch.arange(n, device=device or self.device) % self.num_classes

    def noise(self, n: int, seed: int | None = None) -> Tensor:
        """What a run begins with, fp32: of a seed what diffusers' pipelines draw with a generator of it, in the network's dtype; else any."""
        if seed is None:
            return torch.randn(n, *self.shape, device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(n, *self.shape, generator=generator, device=self.device, dtype=self.dtype).float()


@dataclass
class Peer:
    """run(n, steps, seed=None): images fp32 [n, *shape] in [-1, 1], on the device, perhaps still being worked on. seed: see Task.noise.

    listeners: functions that are told "in" and "out" around each call of the network. sampler: fastdiff's own, where the peer is one. held: MiB of the
    GPU's memory that its warm-ups have kept, for buffers and graphs.
    """

    name: str
    about: str
    run: Callable[..., Tensor]
    sampler: fastdiff.Sampler | None = None
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    held: float = 0.0


def weights() -> tuple[str, fastdiff.Checkpoint]:
    """The shipped checkpoint, or a random network: the speed is the same."""
    try:
        return "sprites", fastdiff.load("sprites")
    except fastdiff.CheckpointError:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = UNet(UNetConfig(num_classes=8))
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.05)
        return "random", fastdiff.Checkpoint(model.eval().requires_grad_(False), Schedule.cosine(500), "v", tuple("abcdefgh"))


def diffusers_unet() -> nn.Module:
    """A UNet2DModel of 0.129 GFLOP an image of 3 x 16 x 16, the shipped network's 0.122 within 10 %. Random weights: the speed is the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _diffusers().UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def flops(model: nn.Module, *given: Tensor) -> int:
    """Floating-point operations of convolutions, matrix products and attention in model(*given), two per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given)
    return counter.get_total_flops()


class Watched(nn.Module):
    """A network that tells when it is being called."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.listeners = model, []

    def forward(self, *given: Any) -> Any:
        if not self.listeners:
            return self.inner(*given)
        for tell in self.listeners:
            tell("in")
        made = self.inner(*given)
        for tell in self.listeners:
            tell("out")
        return made


def ours(task: Task, compile: bool, micro_batch: int | str = "auto", name: str = "fastdiff") -> Peer:
    """fastdiff.Sampler itself. The sampler is in `.sampler`, to be warmed up before it is timed."""
    sampler = fastdiff.Sampler(
        task.model, task.schedule, task.shape, task.prediction, task.solver, task.steps, task.num_classes,
        device=task.device, dtype=task.dtype, compile=compile, micro_batch=micro_batch,
    )  # fmt: skip

    def run(n: int, steps: int, seed: int | None = None) -> Tensor:
        latents = None if seed is None else task.noise(n, seed)
        return sampler(n, labels=task.labels(n, "cpu"), guidance=task.guidance, solver=task.solver, steps=steps, latents=latents)

    own = "" if micro_batch == "auto" else f", micro_batch={micro_batch}"
    return Peer(name, f"Sampler({'compile=True' if compile else 'compile=False'}{own}), {sampler.way}", run, sampler)


def plain(task: Task) -> Peer:
    """Algorithm 2 of Ho et al. 2020 with classifier-free guidance, x_0 clamped, one tensor operation after another, as a learner writes it."""
    model = Watched(task.model)
    tables: dict[int, list[dict[str, float]]] = {}

    def rows(steps: int) -> list[dict[str, float]]:
        if steps not in tables:
            table = solvers.table(task.solver, task.schedule, steps=steps, prediction=task.prediction)
            if table.history or table.scale != 1 or table.learned:
                raise LeftOutError(f"the plain loop has no {task.solver}")
            columns = {key: table.column(key).tolist() for key in ("px", "pm", "clip", "a", "b", "c", "d", "s")}
            tables[steps] = [
                {"t": t, **{key: column[i] for key, column in columns.items()}} for i, t in enumerate(table.timesteps.tolist())
            ]
        return tables[steps]

    rows(task.steps)

    @torch.inference_mode()
    def run(n: int, steps: int, seed: int | None = None) -> Tensor:
        labels = task.labels(n)
        null = None if labels is None else torch.full_like(labels, task.num_classes)
        x = task.noise(n, seed)
        before = None
        for row in rows(steps):
            t = torch.full((n,), row["t"], device=task.device)
            m = predict(x, t, labels)
            if task.guidance != 1:
                free = predict(x, t, null)
                m = free + task.guidance * (m - free)
            x0 = (row["px"] * x + row["pm"] * m).clamp(-row["clip"], row["clip"])
            x = row["a"] * x + row["b"] * x0 + row["d"] * m
            if row["c"] != 0:
                x = x + row["c"] * before
            if row["s"] > 0:
                x = x + row["s"] * torch.randn_like(x)
            before = x0
        return x

    def predict(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        made = model(x.to(task.dtype), t) if labels is None else model(x.to(task.dtype), t, labels)
        return getattr(made, "sample", made).float()

    return Peer("plain PyTorch loop", f"one tensor operation after another, torch {torch.__version__}", run, listeners=model.listeners)


def diffusers(task: Task, best: bool = False) -> Peer:
    """diffusers' DDPMPipeline or DDIMPipeline on the same network, without pictures and progress bar.

    best: with what its documentation advises, channels-last and torch.compile (bf16 is the task's own); on CUDA the timestep is put on the GPU
    first, without which "reduce-overhead" would not make its CUDA graph.
    """
    library = _diffusers()
    kinds = {"ddpm": (library.DDPMPipeline, library.DDPMScheduler), "ddim": (library.DDIMPipeline, library.DDIMScheduler)}
    if task.solver not in kinds:
        raise LeftOutError(f"diffusers has no pipeline of this kind for {task.solver}")
    if task.guidance != 1:
        raise LeftOutError("diffusers' unconditional pipelines know no guidance")
    pipeline, scheduler = kinds[task.solver]
    prediction = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}[task.prediction]
    call: Callable[..., Any] = task.model
    about = f"diffusers {library.__version__}, {pipeline.__name__}, eager"
    if best:
        cuda = task.device.type == "cuda"
        mode = "reduce-overhead" if cuda else "default"
        call = torch.compile(copy.deepcopy(task.model).to(memory_format=torch.channels_last), mode=mode, fullgraph=True, dynamic=False)
        about = f"diffusers {library.__version__}, {pipeline.__name__}, channels_last, torch.compile(mode={mode!r}, fullgraph=True)"
    network = Watched(_InPipeline(call, task, on_device=best))
    unet = _Shaped(network, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline(
            unet,
            scheduler(
                num_train_timesteps=task.schedule.timesteps, trained_betas=task.schedule.betas.tolist(), clip_sample=True,
                prediction_type=prediction, timestep_spacing="trailing",
            ),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"use_clipped_model_output": True} if task.solver == "ddim" else {}

    def run(n: int, steps: int, seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator(task.device).manual_seed(seed)
        images = pipe(batch_size=n, generator=generator, num_inference_steps=steps, output_type="pt", **more).images
        return images.float().mul(2).sub(1)

    name = "diffusers" if not best else "diffusers, best settings"
    return Peer(name, about, run, listeners=network.listeners)


def k_diffusion(task: Task) -> Peer:
    """k-diffusion's own loop and its wrapper for a discrete schedule, with the denoised image clamped as ours is."""
    sampling, external, version = _k_diffusion()
    loops = {"ddim": "sample_euler", "ddpm": "sample_euler_ancestral", "dpmpp_2m": "sample_dpmpp_2m"}  # the same steps, in its variables
    wrappers = {"v": external.DiscreteVDDPMDenoiser, "epsilon": external.DiscreteEpsDDPMDenoiser}
    if task.solver not in loops or task.prediction not in wrappers:
        raise LeftOutError(f"k-diffusion has no {task.solver} for a prediction of {task.prediction}")
    if task.guidance != 1:
        raise LeftOutError("k-diffusion's guidance is left to scripts of its own")
    loop = getattr(sampling, loops[task.solver])
    network = Watched(task.model)

    def predict(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        made = network(x.to(task.dtype), t) if labels is None else network(x.to(task.dtype), t, labels)
        return getattr(made, "sample", made).float()

    alphas_cumprod = torch.from_numpy(task.schedule.alphas_cumprod.copy()).float()
    wrapper = wrappers[task.prediction](predict, alphas_cumprod, quantize=True).to(task.device)

    def denoiser(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        return wrapper(x, sigma, **given).clamp(-1, 1)

    @torch.inference_mode()
    def run(n: int, steps: int, seed: int | None = None) -> Tensor:
        levels = solvers.table(task.solver, task.schedule, steps=steps, prediction=task.prediction).levels
        sigmas = torch.from_numpy(levels[:, 1] / levels[:, 0]).float().to(task.device)
        # x_T of the schedule over its alpha: pure noise there is one standard deviation in all.
        x = task.noise(n, seed) * math.sqrt(1 + float(levels[0, 1] / levels[0, 0]) ** 2)
        labels = task.labels(n)
        return loop(denoiser, x, sigmas, extra_args={} if labels is None else {"labels": labels}, disable=True)

    return Peer("k-diffusion", f"k-diffusion {version}, {loops[task.solver]}", run, listeners=network.listeners)


class _InPipeline(nn.Module):
    """A network as a pipeline calls it, `unet(x, t)` with one t for all and on the CPU: the labels are bound, and t is spread as UNet2DModel does."""

    def __init__(self, call: Callable[..., Any], task: Task, on_device: bool) -> None:
        super().__init__()
        self.call, self.num_classes, self.on_device = call, task.num_classes, on_device
        self.bound: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor) -> Any:
        if self.num_classes is None:
            return self.call(x, t.to(x.device) if self.on_device else t)
        if len(x) not in self.bound:
            self.bound[len(x)] = torch.arange(len(x), device=x.device) % self.num_classes
        return types.SimpleNamespace(sample=self.call(x, t.to(x.device).expand(len(x)), self.bound[len(x)]))


class _Shaped(nn.Module):
    """What a pipeline asks of a unet beside the call."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, task.device, task.dtype
        self.config = types.SimpleNamespace(sample_size=task.shape[1:], in_channels=task.shape[0])

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.network(x, t)


def _diffusers() -> Any:
    if importlib.util.find_spec("diffusers") is None:
        raise LeftOutError("diffusers is not installed (pip install diffusers)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("diffusers")
            for name in ("UNet2DModel", "DDPMPipeline", "DDIMPipeline", "DDPMScheduler", "DDIMScheduler"):
                getattr(library, name)  # imported only now
    except Exception as e:  # of whatever it needs and finds in another version
        raise LeftOutError(f"diffusers cannot be imported: {' '.join(str(e).split())[:120]}") from None
    return library


def _k_diffusion() -> tuple[Any, Any, str]:
    """k_diffusion.sampling and .external of the installed distribution, without its package's __init__, which imports a dozen more.

    scipy, torchdiffeq and torchsde serve likelihoods, LMS and Brownian trees, none of them here, so they need not be there; of
    k_diffusion.utils only append_dims is called.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise LeftOutError("k-diffusion is not installed (pip install --no-deps k-diffusion)")
    stand_ins: dict[str, types.ModuleType] = {}

    def stand_in(name: str, **content: Any) -> None:
        stand_ins[name] = types.ModuleType(name)
        vars(stand_ins[name]).update(content)

    stand_in("k_diffusion", __path__=list(spec.submodule_search_locations))
    stand_in("k_diffusion.utils", append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)])
    vars(stand_ins["k_diffusion"])["utils"] = stand_ins["k_diffusion.utils"]
    stand_in("scipy", integrate=None)
    stand_in("torchdiffeq", odeint=None)
    stand_in("torchsde")
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        sampling, external = (importlib.import_module(f"k_diffusion.{name}") for name in ("sampling", "external"))
    except Exception as e:
        raise LeftOutError(f"k-diffusion cannot be imported: {' '.join(str(e).split())[:120]}") from None
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return sampling, external, importlib.metadata.version("k-diffusion")

"""fastdiff.diffusers against diffusers: a scheduler's step and add_noise, and whole pipelines, the same call on the same inputs in one run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.conftest import Case, _param, awaited
from benchmarks.gauges import Count

# torch 2.13 with numpy 2, in diffusers' own np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
diffusers = pytest.importorskip("diffusers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastdiff.diffusers as ours

SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddim eta 1": ("DDIMScheduler", {"eta": 1.0}),
    "dpmpp 2m": ("DPMSolverMultistepScheduler", {}),
}
STEPS = 50
# Images are compared after so many steps: a network of random weights blows rounding up, that of TF32 in twenty steps to half of a pixel's range.
FEW = 2
CASES = [Case("cpu", 1), Case("cpu", 64), *(Case("cuda", n, dtype) for n in (1, 4096) for dtype in (torch.float32, torch.bfloat16))]
PIPELINES = [Case("cpu", 1), Case("cpu", 16), Case("cpu", 64), Case("cuda", 1), Case("cuda", 64), Case("cuda", 1024)]


def breaks(call: Callable[..., object], *inputs: torch.Tensor) -> int:
    """Graph breaks where torch.compile goes through a call."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(torch._dynamo.explain(call)(*inputs).graph_break_count)


def counted(run: Callable[[], object], calls: int) -> dict[str, float]:
    """Operations that reach kernels, and reads of a value, in each of so many calls."""
    with Count() as counter:
        run()
    return {"ops_per_call": round(counter.operations / calls, 2), "reads_per_call": round(counter.reads / calls, 2)}


@pytest.fixture
def versus(benchmark, interleaved, describe):
    """Time ours and theirs, interleaved; their counts go into the row beside ours. calls: that one run makes."""

    def run(case: Case, runs: dict[str, Callable[[], object]], calls: int, counts: dict[str, dict[str, Any]], **more: Any) -> None:
        timed = {name: awaited(call) for name, call in runs.items()} if case.device == "cuda" else runs
        benchmark(timed["ours"])
        seconds, found = interleaved(timed)
        benchmark.extra_info |= {
            **describe(case.device, case.dtype, case.shape),
            "diffusers": diffusers.__version__,
            **{f"{name}_us": round(median(values) / calls * 1e6, 2) for name, values in seconds.items()},
            **found,
            "counts": counts,
            **more,
        }

    return run


@pytest.mark.parametrize("case", [*map(_param, CASES)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_diffusers_step(case, scheduler, versus):
    """All steps of a loop with a network that costs nothing: microseconds a step, Python and all."""
    name, options = SCHEDULERS[scheduler]
    x = torch.randn(case.shape, device=case.device, dtype=case.dtype)
    m = torch.randn_like(x)
    runs, counts, results = {}, {}, {}
    for who, library in (("ours", ours), ("diffusers", diffusers)):
        made = getattr(library, name)()

        def loop(made=made):
            made.set_timesteps(STEPS, device=case.device)
            sample = x
            for t in made.timesteps:
                sample = made.step(m, t, sample, **options).prev_sample
            return sample

        torch.manual_seed(0)
        results[who] = loop()
        runs[who] = loop
        counts[who] = counted(loop, STEPS)
        made.set_timesteps(STEPS, device=case.device)
        counts[who] |= {
            "graph_breaks": breaks(lambda t, sample, made=made: made.step(m, t, sample, **options).prev_sample, made.timesteps[3], x),
        }
    # Noise in bf16 rounds otherwise when diffusers works in it throughout; over 50 steps that comes to some tenths.
    torch.testing.assert_close(
        results["ours"],
        results["diffusers"],
        rtol=1e-3 if case.dtype == torch.float32 else 0.1,
        atol=1e-3 if case.dtype == torch.float32 else 0.5,
    )
    versus(case, runs, STEPS, counts, scheduler=name, step_options=options, steps=STEPS)


@pytest.mark.parametrize("case", [*map(_param, CASES)])
def test_diffusers_add_noise(case, versus):
    """A training batch, a timestep per sample."""
    x0 = torch.randn(case.shape, device=case.device, dtype=case.dtype)
    z, t = torch.randn_like(x0), torch.randint(0, 1000, (case.batch,), device=case.device)
    runs, counts, results = {}, {}, {}
    for who, library in (("ours", ours), ("diffusers", diffusers)):
        made = library.DDPMScheduler()
        runs[who] = lambda made=made: made.add_noise(x0, z, t)
        results[who] = runs[who]()
        counts[who] = {**counted(runs[who], 1), "graph_breaks": breaks(made.add_noise, x0, z, t)}
    # diffusers forms sqrt(1 - alpha_bar) in bf16, where it cancels: sigma can be off by sqrt(2^-9), and |z| comes to 6.
    torch.testing.assert_close(results["ours"], results["diffusers"], rtol=0, atol=1e-5 if case.dtype == torch.float32 else 0.4)
    versus(case, runs, 1, counts)


@pytest.mark.parametrize("case", [*map(_param, PIPELINES)])
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_diffusers_pipeline(case, kind, versus):
    """DDPMPipeline and DDIMPipeline of a UNet2DModel as they are, and accelerated: the same images from the same generator."""
    pipelines(case, kind, versus, "auto")


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_diffusers_pipeline_compiled(kind, versus, no_compiled):
    """On the CPU, where it has to be asked for, since compiling takes 20 s and more."""
    if reason := no_compiled("cpu"):
        pytest.skip(reason)
    pipelines(Case("cpu", 64), kind, versus, True)


def pipelines(case: Case, kind: str, versus: Callable[..., None], compile: bool | str) -> None:
    steps = 5 if case.device == "cpu" else 20
    network = peers.diffusers_unet().to(case.device, case.dtype)
    base = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipes = {
            "ours": ours.accelerate(base(copy.deepcopy(network), diffusers.DDPMScheduler()), compile=compile),
            "diffusers": base(network, diffusers.DDPMScheduler()),
        }
    runs, results = {}, {}
    for who, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)

        def run(steps=steps, pipe=pipe):
            generator = torch.Generator(case.device).manual_seed(0)
            return pipe(case.batch, generator=generator, num_inference_steps=steps, output_type="pt").images

        runs[who], results[who] = run, run(FEW)
    # cuDNN takes TF32 unless told otherwise, and what users have is timed: its 2^-11 of a number comes to 3e-3 in some pixel, fp32's to 4e-6. A clip, a
    # timestep or a schedule a little off comes to 3e-2 and more.
    torch.testing.assert_close(results["ours"], results["diffusers"], rtol=0, atol=1e-2 if case.device == "cuda" else 1e-4)
    rate = {
        "steps": steps,
        "pipeline": base.__name__,
        "way": "compiled, captured" if case.device == "cuda" else "compiled" if compile is True else "eager",
    }
    versus(case, runs, 1, {}, **rate)

"""Images per second of the whole reverse process, against the peers of `benchmarks.peers`, with the same weights, solver, steps and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import gauges, peers
from benchmarks.peers import LeftOutError, Peer, Task
from fastdiff import Schedule

CUDA = torch.cuda.is_available()
# How far images of peers may be apart, on average over all pixels, that lie in [-1, 1]; single ones may be far, where a network blows rounding up.
# In two steps they come to 3e-4 in fp32, by k-diffusion's sigma of 1e4, and to 4e-3 in bf16, in which diffusers keeps x too; from other noise to 0.03
# where the network guesses the average image, in a single step, and to 0.2 and more elsewhere.
ALIKE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Job:
    """compiled: also those whose network is compiled for this case alone, which takes 15 to 60 s each. dtype: bf16 on CUDA, else fp32, unless it is
    said."""

    device: str
    batch: int
    solver: str = "ddim"
    steps: int = 20
    network: str = "sprites"
    guidance: float = 1.0
    compiled: bool = False
    dtype: str = ""

    def __str__(self) -> str:
        words = [self.device, self.batch, self.solver, self.steps]
        words += [self.network] * (self.network != "sprites") + ["guided"] * (self.guidance != 1) + ["compiled"] * self.compiled
        words += [self.dtype] * bool(self.dtype)
        return "-".join(map(str, words))


# The sampler that is used on CUDA compiles the network once, for all of the first lines. What compiles for a case of its own comes later, and what has
# 500 steps, a minute or two of the peers' time, last, where a time limit would cut it off. 64 images in 50 steps are to take diffusers at least 10
# times as long, and 3 times where it is compiled.
JOBS = [
    Job("cpu", 64, steps=5),
    Job("cpu", 1),
    Job("cpu", 16, steps=10),
    Job("cpu", 256, steps=2),
    Job("cpu", 1024, steps=1),
    Job("cpu", 64, "ddpm", steps=2),
    Job("cpu", 64, "dpmpp_2m", steps=2),
    Job("cpu", 64, steps=2, guidance=2.0),
    Job("cpu", 64, steps=2, network="UNet2DModel"),
    Job("cpu", 64, steps=5, dtype="bfloat16"),
    Job("cpu", 1, dtype="bfloat16"),
    Job("cpu", 1024, steps=1, dtype="bfloat16"),
    Job("cpu", 64, steps=5, compiled=True),
    Job("cpu", 64, steps=5, network="UNet2DModel", compiled=True),
    Job("cuda", 64, steps=50),
    *(Job("cuda", n) for n in (1024, 1, 256, 4096, 16)),
    Job("cuda", 64, steps=50, network="UNet2DModel"),
    Job("cuda", 1024, network="UNet2DModel"),
    Job("cuda", 64, steps=50, compiled=True),
    Job("cuda", 64, steps=50, network="UNet2DModel", compiled=True),
    Job("cuda", 1024, "ddpm", 50),
    Job("cuda", 1024, guidance=2.0),
    Job("cuda", 1, compiled=True),
    Job("cuda", 1024, "dpmpp_2m", 20),
    Job("cuda", 1024, "ddpm", 500),
    Job("cuda", 64, "ddpm", 500),
]


def longest(job: Job) -> int:
    """Steps of the longest job that a sampler shares with this one: its own table has as many, and a call says how many it takes."""
    return max(
        other.steps
        for other in JOBS
        if (other.device, other.network, other.solver, other.dtype) == (job.device, job.network, job.solver, job.dtype)
    )


@pytest.fixture(scope="module")
def tasks() -> Callable[[Job], tuple[str, Task]]:
    """Where the weights are from, and the task of a job; the network is on the device once."""
    models: dict[tuple[str, str, str], tuple[str, Task]] = {}

    def of(job: Job) -> tuple[str, Task]:
        key = job.device, job.network, job.dtype
        if key not in models:
            dtype = getattr(torch, job.dtype or ("bfloat16" if job.device == "cuda" else "float32"))
            if job.network == "sprites":
                source, ckpt = peers.weights()
                models[key] = (
                    source,
                    Task(ckpt.model.to(job.device, dtype), ckpt.schedule, ckpt.prediction, "ddim", 1, ckpt.shape, len(ckpt.classes)),
                )
            else:
                models[key] = "random", Task(peers.diffusers_unet().to(job.device, dtype), Schedule.linear(500), "epsilon", "ddim", 1)
        source, of_any = models[key]
        return source, Task(
            of_any.model, of_any.schedule, of_any.prediction, job.solver, job.steps, of_any.shape, of_any.num_classes, job.guidance
        )  # fmt: skip

    return of


@pytest.fixture(scope="module")
def samplers() -> dict[Any, Peer]:
    """fastdiff's samplers that several cases share, so that the network is compiled once."""
    return {}


def contenders(
    job: Job, task: Task, samplers: dict[Any, Peer], request: pytest.FixtureRequest
) -> tuple[dict[str, Callable[[], Peer]], dict[str, str]]:
    """What makes each peer, ours first, and why others are left out."""

    def own(name: str, compile: bool, micro_batch: int | str = "auto") -> Callable[[], Peer]:
        def make() -> Peer:
            key = job.device, job.network, job.solver, job.guidance, job.dtype, compile, micro_batch
            if key not in samplers:
                samplers[key] = peers.ours(replace(task, steps=longest(job)), compile, micro_batch, name)
            return samplers[key]

        return make

    cuda = job.device == "cuda"
    found: dict[str, Callable[[], Peer]] = {}
    if job.network == "UNet2DModel" and cuda and not job.compiled:
        found["ours"] = own("fastdiff, not compiled", False)
    else:
        found["ours"] = own("fastdiff", cuda or job.compiled)
    if job.compiled and not cuda:
        found["fastdiff_eager"] = own("fastdiff, not compiled", False)
    if job.dtype:
        found["fastdiff_float32"] = lambda: peers.ours(
            replace(task, model=copy.deepcopy(task.model).float(), steps=longest(job)), False, name="fastdiff, float32"
        )
    if cuda and job.batch < 1024:
        found["fastdiff_own_batch"] = own("fastdiff, a micro-batch of just so many, not compiled", False, job.batch)
        if job.compiled:
            found["fastdiff_own_batch_compiled"] = own("fastdiff, a micro-batch of just so many", True, job.batch)
    found["plain"] = lambda: peers.plain(task)
    found["diffusers"] = lambda: peers.diffusers(task)
    found["k_diffusion"] = lambda: peers.k_diffusion(task)
    reason = request.getfixturevalue("no_compiled")(job.device) if job.compiled else "left out: compiled in the cases that say so"
    if reason is None:
        found["diffusers_best"] = lambda: peers.diffusers(task, best=True)
        return found, {}
    return found, {"diffusers_best": reason}


def warmed(peer: Peer, guided: bool, job: Job) -> float:
    """Seconds that a sampler's warm-up takes, none where another job has done it. What it keeps of the GPU's memory is the peer's to remember."""
    found = []

    def run() -> None:
        found.append(peer.sampler.warmup(guided, n=job.batch))

    if job.device == "cuda":
        peer.held += gauges.reserved(run)[1]
    else:
        run()
    return found[0]


def compare(made: dict[str, Peer], job: Job, task: Task) -> None:
    """A first call of each, which must come to ours' images where the solver adds no noise to that which they all begin with."""
    images = {name: peer.run(job.batch, min(job.steps, gauges.FEW), seed=0) for name, peer in made.items()}
    if job.solver != "ddpm":
        apart = {name: float((v - images["ours"]).abs().mean()) for name, v in images.items()}
        assert max(apart.values()) < ALIKE[task.dtype], f"images differ from ours: {apart}"


@pytest.mark.parametrize(
    "job",
    [pytest.param(j, id=str(j), marks=pytest.mark.skipif(j.device == "cuda" and not CUDA, reason="needs a CUDA GPU")) for j in JOBS],
)
def test_sampler(benchmark, job, tasks, samplers, rounds, interleaved, describe, request):
    source, task = tasks(job)
    if job.compiled and (reason := request.getfixturevalue("no_compiled")(job.device)):
        pytest.skip(reason)
    cuda, guided = job.device == "cuda", job.guidance != 1
    made: dict[str, Peer] = {}
    makers, left_out = contenders(job, task, samplers, request)
    for name, make in makers.items():
        try:
            made[name] = make()
        except LeftOutError as e:
            left_out[name] = str(e)

    def call(peer: Peer) -> Callable[[], None]:
        def run() -> None:
            peer.run(job.batch, job.steps)
            if cuda:
                torch.cuda.synchronize()

        return run

    warmups = {name: warmed(peer, guided, job) for name, peer in made.items() if peer.sampler is not None}
    runs = {name: call(peer) for name, peer in made.items()}
    compare(made, job, task)
    rate = gauges.matmul_rate(job.device, task.dtype)
    labels = task.labels(1)
    given = [torch.zeros(1, *task.shape, device=task.device, dtype=task.dtype), torch.zeros(1, device=task.device)]
    work = peers.flops(task.model, *given, *([] if labels is None else [labels])) * job.batch * job.steps * (2 if guided else 1)
    benchmark.pedantic(runs["ours"], rounds=rounds, warmup_rounds=1)
    seconds, found = interleaved(runs)
    sampler = made["ours"].sampler
    benchmark.extra_info |= {
        **describe(job.device, task.dtype, (job.batch, *task.shape)),
        "weights": source, "network": job.network, "solver": job.solver, "steps": job.steps, "guidance": job.guidance,
        "way": sampler.way, "micro_batch": sampler.size(guided, job.batch), "warmup_s": round(warmups["ours"], 2),
        "matmul_gflop_per_s": round(rate / 1e9, 1), **found,
        "peers": {
            name: {
                "about": peer.about,
                "images_per_s": round(job.batch / median(seconds[name]), 2),
                "ms_per_step": round(median(seconds[name]) / job.steps * 1e3, 4),
                "model_gflop_per_s": round(work / median(seconds[name]) / 1e9, 1),
                "fraction_of_matmul": round(work / median(seconds[name]) / rate, 4),
                **gauges.measured(peer, task, job.batch),
            }
            for name, peer in made.items()
        },
        "left_out": left_out,
    }  # fmt: skip
    benchmark.extra_info |= {
        key: benchmark.extra_info["peers"]["ours"][key] for key in ("images_per_s", "ms_per_step", "model_gflop_per_s")
    }
    if cuda:
        benchmark.extra_info["peak_memory_mb"] = round(made["ours"].held + gauges.reserved(runs["ours"])[0])

"""Images per second of the whole reverse process, against the plain loop of PyTorch calls that a learner writes."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import pytest
import torch

import fastdiff
from fastdiff import Schedule, UNet, UNetConfig
from fastdiff.solvers import Table


@dataclass(frozen=True)
class Job:
    device: str
    batch: int
    guidance: float = 1.0
    micro_batch: int | str = "auto"

    def __str__(self) -> str:
        own = "" if self.micro_batch == "auto" else f"-by{self.micro_batch}"
        return f"{self.device}-{self.batch}{own}{'-guided' if self.guidance != 1 else ''}"


STEPS = {"cpu": 2, "cuda": 20}
# The last three compile the network for shapes of their own, so they stand where a time limit would cut them off.
JOBS = [
    *(Job("cpu", n) for n in (64, 256)),
    Job("cpu", 64, guidance=2.0),
    *(Job("cuda", n) for n in (1, 64, 1024, 4096)),
    Job("cuda", 1024, guidance=2.0),
    *(Job("cuda", n, micro_batch=n) for n in (1, 64, 4096)),
]


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


@pytest.fixture(scope="module")
def checkpoint():
    return weights()


@pytest.fixture(scope="module")
def samplers(checkpoint):
    """One sampler per device and micro-batch, so that the network is compiled once for each."""
    made = {}

    def of(job: Job) -> fastdiff.Sampler:
        key = job.device, job.micro_batch
        if key not in made:
            made[key] = checkpoint[1].sampler(solver="ddpm", steps=STEPS[job.device], device=job.device, micro_batch=job.micro_batch)
        return made[key]

    return of


@torch.inference_mode()
def plain_loop(model, table: Table, shape, device, dtype, labels, null, guidance):
    """Algorithm 2 of Ho et al. 2020 with classifier-free guidance, x_0 clamped, one tensor operation after another."""
    x = torch.randn(shape, device=device)
    for t, (px, pm, clip, a, b, _, d, s, _) in zip(table.timesteps.tolist(), table.rows.tolist(), strict=True):
        steps = torch.full((len(x),), t, device=device)
        m = model(x.to(dtype), steps, labels).float()
        if guidance != 1:
            free = model(x.to(dtype), steps, null).float()
            m = free + guidance * (m - free)
        x0 = (px * x + pm * m).clamp(-clip, clip)
        x = a * x + b * x0 + d * m
        if s > 0:
            x = x + s * torch.randn_like(x)
    return x


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(
            j, id=str(j), marks=pytest.mark.skipif(j.device == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
        )
        for j in JOBS
    ],
)
def test_sampler(benchmark, job, checkpoint, samplers, rounds, interleaved, describe):
    source, ckpt = checkpoint
    sampler = samplers(job)
    labels = torch.arange(job.batch, device=sampler.device) % len(ckpt.classes)
    null = torch.full_like(labels, len(ckpt.classes))
    guided = job.guidance != 1
    shape = (job.batch, *ckpt.shape)

    cuda = job.device == "cuda"

    def ours():
        sampler(job.batch, labels=labels, guidance=job.guidance)
        if cuda:
            torch.cuda.synchronize()

    def eager():
        plain_loop(sampler.model, sampler.table, shape, sampler.device, sampler.dtype, labels, null, job.guidance)
        if cuda:
            torch.cuda.synchronize()

    warmup = sampler.warmup(guided)
    ours()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(ours, rounds=rounds)
    if cuda:
        # Reserved rather than allocated: what a CUDA graph holds counts too.
        benchmark.extra_info["peak_memory_mb"] = round(torch.cuda.max_memory_reserved() / 2**20)
    seconds, found = interleaved({"ours": ours, "eager": eager})
    each = median(seconds["ours"])
    evaluations = sampler.steps * (2 if guided else 1)
    benchmark.extra_info |= {
        **describe(job.device, sampler.dtype, shape),
        "weights": source,
        "steps": sampler.steps,
        "guidance": job.guidance,
        "micro_batch": sampler.size(guided),
        "warmup_s": round(warmup, 2),
        "images_per_s": round(job.batch / each, 2),
        "ms_per_step": round(each / sampler.steps * 1e3, 4),
        "model_gflop_per_s": round(ckpt.model.flops() * evaluations * job.batch / each / 1e9, 1),
        "eager_images_per_s": round(job.batch / median(seconds["eager"]), 2),
        **found,
    }

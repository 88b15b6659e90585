"""Peak memory of sampling: bounded by the micro-batch, whatever the number of images. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
# On the CPU the peak of the process over what it had after a first, smallest call, which loads libraries. On CUDA the most that is reserved beside
# the weights, with what a first call leaves behind: a sampler's buffers and graphs are made in it, whatever its size.
CODE = """
import json, resource, sys, torch
from dataclasses import replace
from benchmarks import peers
device, who, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
dtype = torch.bfloat16 if device == "cuda" else torch.float32
_, ckpt = peers.weights()
task = peers.Task(ckpt.model.to(device, dtype), ckpt.schedule, ckpt.prediction, "ddim", 2, ckpt.shape, len(ckpt.classes))
try:
    peer = peers.ours(task, compile=False) if who == "ours" else peers.diffusers(task)
except peers.LeftOutError as e:
    print(json.dumps(str(e)))
    raise SystemExit
def peak():
    return torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
if device == "cuda":
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = peak()
peer.run(1, 2)
if device == "cpu":
    before = peak()
peer.run(n, 2)
print(json.dumps(peak() - before))
"""


def peak(device: str, who: str, n: int) -> float | str:
    """MiB, or why not."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE, device, who, str(n)], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("device", "sizes"),
    [
        ("cpu", (64, 256, 1024)),
        pytest.param("cuda", (64, 1024, 4096), marks=pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")),
    ],
    ids=["cpu", "cuda"],
)
def test_memory(benchmark, device, sizes, describe):
    found: dict[str, float | str] = {}
    benchmark.pedantic(lambda: found.update({str(n): peak(device, "ours", n) for n in sizes}), rounds=1)
    theirs = {str(n): peak(device, "diffusers", n) for n in sizes}
    benchmark.extra_info |= {
        **describe(device, torch.bfloat16 if device == "cuda" else torch.float32, (sizes[-1], 3, 16, 16)),
        "steps": 2,
        **{f"peak_memory_mb_{n}": v if isinstance(v, str) else round(v, 1) for n, v in found.items()},
        **{f"diffusers_peak_memory_mb_{n}": v if isinstance(v, str) else round(v, 1) for n, v in theirs.items()},
    }
    # Beside the images themselves, in fp32, and what an allocator rounds up, the largest call needs no more than the middle one.
    images = (sizes[-1] - sizes[1]) * 3 * 16 * 16 * 4 / 2**20
    assert found[str(sizes[-1])] <= found[str(sizes[1])] + images + 32, found

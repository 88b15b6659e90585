"""What the first images cost: importing, the first call, one that finds its code kept, and a call after that. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
IMPORT = """
import json, time
began = time.perf_counter()
import torch
middle, worked = time.perf_counter(), time.process_time()
import fastdiff
print(json.dumps([middle - began, time.perf_counter() - middle, time.process_time() - worked]))
"""
CALLS = """
import time, json, sys, torch, fastdiff
device, compile = sys.argv[1], sys.argv[2] == "True"
sampler = fastdiff.load("sprites").sampler(solver="unipc", steps=10, device=device, compile=compile)
seconds = []
for _ in range(3):
    began = time.perf_counter()
    sampler(64, labels=0)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
print(json.dumps([seconds[0], min(seconds[1:])]))
"""


def measured(code: str, *words: str, **environment: str) -> list[float]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import(benchmark, rounds, describe):
    """fastdiff over torch, which it needs anyway."""
    benchmark.pedantic(lambda: measured(IMPORT), rounds=1)
    found = [measured(IMPORT) for _ in range(rounds)]
    torch_s, own_s, worked_s = (median(v) for v in zip(*found, strict=True))
    benchmark.extra_info |= {
        **describe("cpu", torch.float32, ()), "import_torch_s": round(torch_s, 3), "import_fastdiff_over_torch_s": round(own_s, 3),
    }  # fmt: skip
    assert worked_s < 0.3  # of the processor's time, for the clock's is also that of whatever else runs


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU"))])
def test_first_call(benchmark, device, way, describe, no_compiled, tmp_path):
    if way == "compiled" and (reason := no_compiled(device)):
        pytest.skip(reason)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    words = device, str(way == "compiled")
    first, _ = benchmark.pedantic(lambda: measured(CALLS, *words, **caches), rounds=1)
    cached, steady = measured(CALLS, *words, **caches)
    benchmark.extra_info |= {
        **describe(device, torch.bfloat16 if device == "cuda" else torch.float32, (64, 3, 16, 16)),
        "steps": 10, "way": way, "first_call_s": round(first, 3), "cached_first_call_s": round(cached, 3), "steady_s": round(steady, 4),
    }  # fmt: skip

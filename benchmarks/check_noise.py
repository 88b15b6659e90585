"""Is the noise of this machine the defined one, and do images depend on seed and id alone? `python3 -m benchmarks.check_noise`, exit code 1 if not."""

from __future__ import annotations

import hashlib
import math
import sys

import torch

from fastdiff import ops, reference
from fastdiff.kernels.philox import NORMAL_ERROR

from .peers import weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLES, NUMEL, CHUNK = (16384, 1024, 1024) if DEVICE.type == "cuda" else (1024, 1024, 256)
failed = []


def report(what: str, value: object, good: bool | None = None) -> None:
    """One line; good is None for what is only to be known."""
    print(f"{'ok' if good else 'FAILED' if good is False else '  '}\t{what}\t{value}", flush=True)
    if good is False:
        failed.append(what)


def noise() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds, ids = (torch.randint(-(2**63), 2**63 - 1, (SAMPLES,), generator=generator) for _ in range(2))
    row = torch.tensor([1 << 24 | 123])
    z = ops.normal(seeds.to(DEVICE), ids.to(DEVICE), row.to(DEVICE), NUMEL).cpu()
    words_equal, apart, beyond = True, 0.0, -1.0
    for start in range(0, SAMPLES, CHUNK):
        at = slice(start, start + CHUNK)
        here = seeds[at], ids[at], row
        words = ops.noise_words(*(v.to(DEVICE) for v in here), NUMEL // 4).cpu()
        words_equal &= torch.equal(words, reference.noise_words(*here, NUMEL // 4))
        wanted = reference.normal(*here, NUMEL)
        error = (z[at] - wanted).abs()
        r = wanted.unflatten(1, (-1, 2)).norm(dim=2, keepdim=True).expand(-1, -1, 2).flatten(1)
        apart, beyond = max(apart, float(error.max())), max(beyond, float((error - NORMAL_ERROR[0] - NORMAL_ERROR[1] * r).max()))
    report("words equal the reference's", words_equal, words_equal)
    report(
        f"max |z_device - z_reference| over 2^{math.log2(z.numel()):g}",
        f"{apart:.3g}, within the bound of kernels/philox.py: {beyond <= 0}",
        beyond <= 0,
    )
    mean, std = float(z.double().mean()), float(z.double().std())
    # Five standard errors.
    report("mean", f"{mean:.2g}", abs(mean) < 5 / math.sqrt(z.numel()))
    report("standard deviation", f"{std:.6f}", abs(std - 1) < 5 / math.sqrt(2 * z.numel()))


def images() -> None:
    source, ckpt = weights()
    sampler = ckpt.sampler(solver="ddpm", steps=10, device=DEVICE)
    n = sampler.size(False) + 9
    labels = torch.arange(n) % len(ckpt.classes)
    first = sampler(n, seed=1, labels=labels)
    again = sampler(n, seed=1, labels=labels)
    report("a second run is equal", torch.equal(first, again), torch.equal(first, again))
    prefix = all(torch.equal(sampler(k, seed=1, labels=labels[:k]), first[:k]) for k in (1, 7, n - 3))
    report("fewer images are the first ones", prefix, prefix)
    inside = torch.equal(sampler(5, seed=1, first=n - 6, labels=labels[n - 6 : n - 1]), first[n - 6 : n - 1])
    report("images from the middle are equal", inside, inside)
    if DEVICE.type == "cuda":
        for engine in sampler._engines.values():
            for loop in engine.loops:
                loop.graphs.clear()
            engine.capture = False
        launched = sampler(n, seed=1, labels=labels)
        report("graph replay equals plain launches", torch.equal(first, launched), torch.equal(first, launched))
        apart = (ckpt.sampler(solver="ddpm", steps=10, device="cpu")(64, seed=1, labels=labels[:64]) - first[:64].cpu()).abs()
        report("|image - the CPU's in fp32|: mean, max", f"{float(apart.mean()):.3g}, {float(apart.max()):.3g}")
    report(f"sha256 of {n} images ({source} weights)", hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()[:16])


if __name__ == "__main__":
    print(f"device\t{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'cpu'}, torch {torch.__version__}")
    noise()
    images()
    sys.exit(bool(failed))

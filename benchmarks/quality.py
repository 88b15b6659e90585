"""How near samples come to the training images, by solver and steps: `python -m benchmarks.quality dpmpp_2m,12,2 ddpm,500,2 ddim,20,2,trailing`.

An argument is solver,steps,guidance[,spacing]. Printed is the Frechet distance (Heusel et al. 2017, with statistics of a fixed random convolution and
of pooled colours in place of a trained network's) to as many training images of the same classes: for comparing settings with each other, no more.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from torch import nn

import fastdiff
from fastdiff import data

IMAGES = 480


def random_features() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 96, 3, 2, 1), nn.ReLU()).requires_grad_(False)


def statistics(images: np.ndarray, network: nn.Module) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float64 [N, 240]."""
    x = data.to_float(torch.from_numpy(images))
    h = network(x)
    return torch.cat([h.mean((2, 3)), h.amax((2, 3)), nn.functional.avg_pool2d(x, 4).flatten(1)], dim=1).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def main(settings: list[str]) -> None:
    checkpoint = fastdiff.load("sprites")
    learn, held_out = data.load().split()
    labels = np.arange(IMAGES) % len(learn.classes)
    network = random_features()

    def real(part: data.Dataset, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return statistics(part.images[[rng.choice(np.flatnonzero(part.labels == k)) for k in labels]], network)

    target = real(learn, 0)
    mean, deviation = target.mean(0), target.std(0) + 1e-6

    def distance(found: np.ndarray) -> float:
        return frechet((found - mean) / deviation, (target - mean) / deviation)

    print(f"other training images {distance(real(learn, 1)):.1f}, held-out images {distance(real(held_out, 1)):.1f}", flush=True)
    for setting in settings:
        solver, steps, guidance, *spacing = setting.split(",")
        sampler = checkpoint.sampler(solver=solver, steps=int(steps), **({"spacing": spacing[0]} if spacing else {}))
        began = time.perf_counter()
        images = sampler(IMAGES, seed=1, labels=torch.from_numpy(labels), guidance=float(guidance))
        found = distance(statistics(data.to_uint8(images).numpy(), network))
        print(f"{setting}: {found:.1f}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""How near samples come to the training images, by solver and steps: `python -m benchmarks.quality dpmpp_2m,12,2 ddpm,500,2 ddim,20,2,trailing`.

An argument is solver,steps,guidance[,spacing]; --checkpoint, --dtype and --compile are as python -m fastdiff.sample has them. Printed is the Frechet
distance (Heusel et al. 2017, with statistics of a fixed random convolution and of pooled colours in place of a trained network's) to as many training
images of the same classes: for comparing settings with each other, no more.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import nn

import fastdiff
from fastdiff import cli, data

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


class Distance:
    """Frechet distances to training images of the shipped data, `number` of them, even over the classes."""

    def __init__(self, number: int = IMAGES) -> None:
        self.learn, self.held_out = data.load().split()
        self.labels = np.arange(number) % len(self.learn.classes)
        self.network = random_features()
        self.target = self._real(self.learn, 0)
        self.mean, self.deviation = self.target.mean(0), self.target.std(0) + 1e-6

    def _real(self, part: data.Dataset, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return statistics(part.images[[rng.choice(np.flatnonzero(part.labels == k)) for k in self.labels]], self.network)

    def _to(self, found: np.ndarray) -> float:
        return frechet((found - self.mean) / self.deviation, (self.target - self.mean) / self.deviation)

    def __call__(self, images: np.ndarray) -> float:
        """Of uint8 [N, H, W, 3]."""
        return self._to(statistics(images, self.network))

    def floors(self) -> tuple[float, float]:
        """Of other training images, and of held-out ones."""
        return self._to(self._real(self.learn, 1)), self._to(self._real(self.held_out, 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="How near samples come to the training images.")
    parser.add_argument("settings", nargs="+", metavar="SOLVER,STEPS,GUIDANCE[,SPACING]")
    parser.add_argument("--checkpoint", default="sprites", metavar="FILE")
    parser.add_argument("--dtype", choices=list(cli.DTYPES))
    parser.add_argument("--compile", choices=["auto", "yes", "no", "fused"], default="auto")
    args = parser.parse_args()
    checkpoint, distance = fastdiff.load(args.checkpoint), Distance()
    print("other training images {:.1f}, held-out images {:.1f}".format(*distance.floors()), flush=True)
    for setting in args.settings:
        solver, steps, guidance, *spacing = setting.split(",")
        sampler = checkpoint.sampler(
            solver=solver, steps=int(steps), dtype=cli.DTYPES.get(args.dtype), compile=cli.WAYS.get(args.compile, args.compile),
            **({"spacing": spacing[0]} if spacing else {}),
        )  # fmt: skip
        began = time.perf_counter()
        images = sampler(IMAGES, seed=1, labels=torch.from_numpy(distance.labels), guidance=float(guidance))
        found = distance(data.to_uint8(images).cpu().numpy())
        print(f"{setting}: {found:.1f}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

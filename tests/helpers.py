"""Small networks and data that several tests use."""

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import Checkpoint, Schedule, UNet, UNetConfig
from fastdiff.data import Dataset

SMALL = UNetConfig(shape=(3, 8, 8), channels=(16, 16), blocks=1, middle=0, embedding=32, num_classes=3)


def small_network(seed: int = 0, config: UNetConfig = SMALL) -> UNet:
    """A UNet of random weights in which no path is silent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet(config)
        for p in model.parameters():
            nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


def small_checkpoint(seed: int = 0) -> Checkpoint:
    return Checkpoint(small_network(seed), Schedule.linear(50), "epsilon", ("cat", "dog", "10"), {"steps": 1})


def small_dataset(n: int = 64, held_out: int = 8) -> Dataset:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = np.clip(rng.integers(0, 64, (n, 8, 8, 3)) + 64 * labels[:, None, None, None], 0, 255).astype(np.uint8)
    return Dataset(images, labels.astype(np.int64), ("cat", "dog", "10"), np.arange(n) < held_out)


class FiniteList(nn.Module):
    """The exact noise prediction for data that is one of a few images, all as likely: E[x_0 | x_t] by softmax over the list."""

    def __init__(self, images: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.register_buffer("images", images.double())
        self.register_buffer("alpha", torch.from_numpy(schedule.alpha.copy()))
        self.register_buffer("sigma", torch.from_numpy(schedule.sigma.copy()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v[t].reshape(-1, 1, 1, 1) for v in (self.alpha, self.sigma))
        distance = (x.double()[:, None] - alpha[:, None] * self.images[None]).flatten(2).square().sum(2)
        weight = torch.softmax(-distance / (2 * sigma.reshape(-1, 1) ** 2), dim=1)
        x0 = torch.einsum("nk,kchw->nchw", weight, self.images)
        return ((x.double() - alpha * x0) / sigma).to(x.dtype)

"""Data in the plane whose noised densities are known exactly, and a network of thirty thousand numbers that learns their score in seconds.

Every set is a mixture of Gaussians, and noise leaves it one: with x_0 ~ sum_k w_k N(m_k, C_k), x_t = alpha x_0 + sigma z has the density
sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I), its gradient in closed form, and by Bayes' rule the mean of all x_0 that may have led to x_t.
A network is shown pairs (x_0, x_t) only (denoising score matching: Vincent 2011, section 4; over all noise levels: Song & Ermon 2019,
equation 6), and `cosine` says how near its score comes to the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import noise
from .progress import calm_bar
from .sampler import Bar, Sampler, _one_thread
from .schedules import Schedule

# Of one point of the plane.
SHAPE = (2,)
SCHEDULE = Schedule.cosine(1000)
# Both axes together have the variance that the schedule takes data to have.
VARIANCE = 1.0


@dataclass(frozen=True, eq=False)
class Toy:
    """A distribution of points in the plane, sum_k w_k N(m_k, C_k), centred and of variance 1 an axis, on average.

    weights: fp64 [K], of sum 1. means: fp64 [K, 2]. covariances: fp64 [K, 2, 2]. labels: int64 [K], the class of each part, or None. classes:
    their names. Methods take x fp64 [N, 2] and the noise level (alpha, sigma), by default none, and answer for the noised density; label: of one
    class alone.
    """

    name: str
    title: str
    weights: Tensor
    means: Tensor
    covariances: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def of(self, label: int) -> Toy:
        """One class alone. ValueError where there is none of that number."""
        if self.labels is None or not 0 <= label < len(self.classes):
            raise ValueError(f"label is {label!r}; {self.name} has {len(self.classes)} classes")
        own = self.labels == label
        weights = self.weights[own]
        return replace(
            self, weights=weights / weights.sum(), means=self.means[own], covariances=self.covariances[own], labels=None, classes=()
        )

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0, label: int | None = None) -> Tensor:
        """ln p_t(x), fp64 [N]."""
        return self._parts(x, alpha, sigma, label)[1].logsumexp(1)

    def score(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0, label: int | None = None) -> Tensor:
        """grad ln p_t(x), fp64 [N, 2]: the parts' own, -(alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k), each as likely as x is of it."""
        _, logs, pulls = self._parts(x, alpha, sigma, label)
        score: Tensor = (logs.softmax(1)[..., None] * -pulls).sum(1)
        return score

    def posterior_mean(self, x: Tensor, alpha: float, sigma: float, label: int | None = None) -> Tensor:
        """E[x_0 | x_t = x], fp64 [N, 2]: what a denoiser of least squared error says."""
        toy, logs, pulls = self._parts(x, alpha, sigma, label)
        means = toy.means + alpha * (toy.covariances @ pulls[..., None])[..., 0]  # [N, K, 2]
        mean: Tensor = (logs.softmax(1)[..., None] * means).sum(1)
        return mean

    def posterior(
        self, x: Tensor, n: int, alpha: float, sigma: float, *, seed: int = 0, first: int = 0, label: int | None = None
    ) -> Tensor:
        """n draws of x_0 given x_t = x for each x, fp64 [N, n, 2]; draw j of point i is sample first + i n + j of the seed."""
        toy, logs, pulls = self._parts(x, alpha, sigma, label)
        z = noise.normal(seed, range(first, first + len(x) * n), 0, (3,), stream="draw").double().reshape(len(x), n, 3)
        k = _chosen(logs.softmax(1), z[..., 0])  # [N, n]
        spread = toy.covariances - alpha**2 * toy.covariances @ torch.linalg.inv(toy._noised(alpha, sigma)) @ toy.covariances
        means = toy.means + alpha * (toy.covariances @ pulls[..., None])[..., 0]
        roots = torch.linalg.cholesky(spread)
        draws: Tensor = means.gather(1, k[..., None].expand(-1, -1, 2)) + (roots[k] @ z[..., 1:, None])[..., 0]
        return draws

    def sample(self, n: int, *, seed: int = 0, first: int = 0, row: int = 0, label: int | None = None) -> tuple[Tensor, Tensor | None]:
        """n points, fp64 [n, 2], and their classes, int64 [n], or None; point i is sample first + i of (seed, row) of the noise stream."""
        toy = self if label is None else self.of(label)
        z = noise.normal(seed, torch.arange(first, first + n), row, (3,), stream="draw").double()
        k = _chosen(toy.weights, z[:, 0])
        points = toy.means[k] + (torch.linalg.cholesky(toy.covariances)[k] @ z[:, 1:, None])[..., 0]
        if label is not None:
            return points, torch.full((n,), label)
        return points, None if toy.labels is None else toy.labels[k]

    def _noised(self, alpha: float, sigma: float) -> Tensor:
        return alpha**2 * self.covariances + sigma**2 * torch.eye(2, dtype=torch.float64)

    def _parts(self, x: Tensor, alpha: float, sigma: float, label: int | None) -> tuple[Toy, Tensor, Tensor]:
        """(what is asked, ln w_k N(x; ...) [N, K], (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k) [N, K, 2])."""
        toy = self if label is None else self.of(label)
        covariances = toy._noised(alpha, sigma)
        inverse = torch.linalg.inv(covariances)
        dx, dy = (x.double()[:, None, i] - alpha * toy.means[:, i] for i in range(2))  # [N, K]
        px, py = (dx * inverse[:, i, 0] + dy * inverse[:, i, 1] for i in range(2))
        constant = toy.weights.log() - torch.logdet(covariances) / 2 - math.log(2 * math.pi)
        logs, pulls = constant - (dx * px + dy * py) / 2, torch.stack([px, py], dim=-1)
        return toy, logs, pulls


def _chosen(weights: Tensor, z: Tensor) -> Tensor:
    """Which part a standard normal number picks: weights [..., K], z [..., n] -> int64 [..., n]."""
    sums = weights.cumsum(-1)
    u = torch.special.ndtr(z) * sums[..., -1:]
    return torch.searchsorted(sums, u.contiguous()).clamp(max=weights.shape[-1] - 1)


def _standard(
    name: str,
    title: str,
    means: Any,
    covariances: Any,
    weights: Any = None,
    labels: Sequence[int] | None = None,
    classes: tuple[str, ...] = (),
) -> Toy:
    """Shifted and scaled, both axes alike, to mean 0 and the variance that the schedule takes data to have."""
    m = torch.as_tensor(np.asarray(means, dtype=np.float64))
    c = torch.as_tensor(np.asarray(covariances, dtype=np.float64)).expand(len(m), 2, 2)
    w = torch.full((len(m),), 1 / len(m), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    m = m - w @ m
    spread = (w[:, None] * m**2).sum() + (w * c.diagonal(dim1=1, dim2=2).sum(1)).sum()
    scale = float((2 * VARIANCE / spread).sqrt())
    return Toy(name, title, w, scale * m, scale**2 * c, None if labels is None else torch.tensor(labels), classes)


def _turned(degrees: float, long: float, short: float) -> np.ndarray:
    """A covariance: standard deviations along an axis and across it."""
    turn = math.radians(degrees)
    axes = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return np.asarray(axes @ np.diag([long**2, short**2]) @ axes.T)


def gaussian() -> Toy:
    """One Gaussian, four times as long as wide."""
    return _standard("gaussian", "elongated Gaussian", [[0.0, 0.0]], _turned(30, 1.0, 0.25)[None])


def mixture() -> Toy:
    """Three Gaussians, a class each, of different shapes and weights."""
    means = [[-1.25, -0.75], [1.25, -0.6], [0.1, 1.3]]
    covariances = np.stack([_turned(45, 0.42, 0.22), _turned(-30, 0.45, 0.24), _turned(0, 0.5, 0.22)])
    return _standard("mixture", "mixture of three Gaussians", means, covariances, [0.3, 0.4, 0.3], [0, 1, 2], ("left", "right", "top"))


def moons(points: int = 96, blur: float = 0.09) -> Toy:
    """Two half circles that reach into each other: points, each blurred by a Gaussian."""
    turn = np.linspace(0, np.pi, points // 2)
    upper = np.stack([np.cos(turn), np.sin(turn)], 1)
    lower = np.stack([1 - np.cos(turn), 0.5 - np.sin(turn)], 1)
    return _standard("moons", "two moons", np.concatenate([upper, lower]), blur**2 * np.eye(2)[None])


def spiral(points: int = 128, blur: float = 0.065, turns: float = 1.5) -> Toy:
    """An arm that winds outwards, points at even distances, each blurred by a Gaussian."""
    fine = np.linspace(0, 1, 4096)
    radius, turn = 0.12 + fine, 2 * np.pi * turns * fine
    arm = np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(arm, axis=0), axis=1))])
    even = np.interp(np.linspace(0, length[-1], points), length, fine)
    means = np.stack([np.interp(even, fine, arm[:, i]) for i in range(2)], 1)
    return _standard("spiral", "spiral", means, blur**2 * np.eye(2)[None])


TOYS: dict[str, Callable[[], Toy]] = {"gaussian": gaussian, "mixture": mixture, "moons": moons, "spiral": spiral}


class Denoiser(nn.Module):
    """A multilayer perceptron that says v = alpha z - sigma x_0 of x_t, so x_0 = alpha x_t - sigma v: model(x fp32 [N, 2], t [N], labels [N] or
    None) -> fp32 [N, 2], for a `Sampler` with prediction="v". labels: 0 .. classes - 1, or `classes` for no class.

    For data of variance 1 that is the preconditioning of Karras et al. 2022, table 1: what the network has to say is of variance 1 at every noise
    level. It is told ln(alpha / sigma) by sines and cosines, and of x also some waves, without which narrow shapes are learned slowly (Tancik et
    al. 2020).
    """

    log_snr: Tensor
    waves: Tensor
    beats: Tensor

    def __init__(self, classes: int = 0, *, schedule: Schedule = SCHEDULE, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.classes = classes
        # Beyond these bounds there is next to nothing but signal, or noise, and no more to tell.
        self.register_buffer("log_snr", torch.from_numpy(schedule.log_snr.copy()).float().clamp(-4, 6))
        self.register_buffer("waves", torch.pi * torch.tensor([0.5, 1.0]))
        self.register_buffer("beats", torch.pi / 16 * torch.arange(1, 9))
        self.enter = nn.Linear(2 + 4 * len(self.waves), width)
        self.level = nn.Linear(1 + 2 * len(self.beats), width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2)
        # Before training it says 0, of whatever class.
        for weights in (self.leave.weight, self.leave.bias, *([self.label.weight] if self.label else [])):
            nn.init.zeros_(weights)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        low = t.long().clamp(max=len(self.log_snr) - 2)
        level = torch.lerp(self.log_snr[low], self.log_snr[low + 1], t.float() - low)[:, None]
        beat, wave = level * self.beats, (x[:, :, None] * self.waves).flatten(1)  # [N, 8], [N, 4]
        h = self.enter(torch.cat([x, wave.sin(), wave.cos()], 1)) + self.level(torch.cat([level / 4, beat.sin(), beat.cos()], 1))
        if self.label is not None:
            h = h + self.label(torch.full_like(low, self.classes) if labels is None else labels)
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        answer: Tensor = self.leave(nn.functional.silu(h))
        return answer

    @torch.no_grad()
    def score(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """grad ln p_t(x) as the network has it, -z / sigma with z = sigma x + alpha v, fp64 [N, 2]: x [N, 2], one t for all."""
        alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
        v = self(x.float(), torch.full((len(x),), t), labels).double()
        score: Tensor = -(sigma * x.double() + alpha * v) / sigma
        return score


# The noise levels that examples are trained at: ln(alpha / sigma) normally distributed, as in Karras et al. 2022, section 5, about where these shapes
# come apart.
LEVEL_MEAN, LEVEL_SPREAD = 0.8, 1.5
# Part of the examples trained without their class (Ho & Salimans 2022, section 4.2, find 0.1 to 0.2 the best for images).
NO_CLASS = 0.25
# Of a training run: seconds.
STEPS = 800
# Examples whose points are one another's company, see `company`.
GROUP = 256


def company(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The mean of all points of a group that x_t may have come from, each as likely as it is: x, x0 [G, R, 2], alpha, sigma [G, R, 1] ->
    [G, R, 2]. allowed: bool [G, R, R], whether example i may have come from point j.

    The x_0 that x_t was made of is one arrow from x_t; this is the mean over as many as the group holds. Its own expectation given x_t is
    E[x_0 | x_t] as well, and its variance far less (Xu et al. 2023, "Stable target field", for a group that x_0 itself belongs to).
    """
    # -|x - alpha x_0|^2 / (2 sigma^2) without the part that all points share.
    logits = torch.baddbmm(-((alpha / sigma) ** 2) / 2 * x0.square().sum(2)[:, None], x * (alpha / sigma**2), x0.transpose(1, 2))
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    return torch.bmm(logits.softmax(2), x0)


def train(
    toy: Toy,
    *,
    seed: int = 0,
    steps: int = STEPS,
    batch: int = 1024,
    rate: float = 8e-3,
    average: float = 0.995,
    progress: bool | Bar = False,
) -> Denoiser:
    """A network that has learned a set from points of it and their noised selves, and nothing else: the averaged weights, in seconds on one core.

    The loss is that of v against what the group's mean (see `company`) makes it. steps, batch, rate: AdamW's, the rate rising over 50 steps and
    falling to 0 as a cosine does; batch is a multiple of `GROUP`. average: decay of the averaged weights. The same arguments give the same weights.
    """
    if batch % GROUP or batch < GROUP or steps < 1:
        raise ValueError(f"batch is {batch} and steps is {steps}; give a multiple of {GROUP}, and at least 1 step")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser(len(toy.classes))
    weights: list[Tensor] = list(model.parameters())
    averages = [p.detach().clone() for p in weights]
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    alphas, sigmas = (torch.from_numpy(column.copy()).float() for column in (SCHEDULE.alpha, SCHEDULE.sigma))
    falling = torch.from_numpy(-SCHEDULE.log_snr)
    made = progress(steps) if callable(progress) else tqdm(total=steps, unit="step", disable=not progress, leave=False, **calm_bar())
    with made as bar, _one_thread():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * min((step + 1) / 50, 1) * (1 + math.cos(math.pi * step / steps)) / 2
            ids = torch.arange(step * batch, (step + 1) * batch)
            points, labels = toy.sample(batch, seed=seed, first=step * batch, row=1)
            # Multiples of irrational numbers fill the unit interval more evenly than random ones.
            quantile = (ids * (math.sqrt(5) - 1) / 2 + 0.5).double() % 1
            wanted = LEVEL_MEAN + LEVEL_SPREAD * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
            t = torch.searchsorted(falling, -wanted).clamp(max=SCHEDULE.timesteps - 1)
            x0 = points.float()
            x = noise.add_noise(x0, t, SCHEDULE, seed=seed, ids=ids)
            assert isinstance(x, Tensor)
            told, allowed = None, None
            if labels is not None:
                told = torch.where(ids * math.sqrt(2) % 1 < NO_CLASS, len(toy.classes), labels)
                mine, theirs = told.reshape(-1, GROUP, 1), labels.reshape(-1, 1, GROUP)
                allowed = (mine == theirs) | (mine == len(toy.classes))
            alpha, sigma = alphas[t][:, None], sigmas[t][:, None]
            at, points_of, alphas_of, sigmas_of = (part.reshape(-1, GROUP, part.shape[1]) for part in (x, x0, alpha, sigma))
            v = (alpha * x - company(at, points_of, alphas_of, sigmas_of, allowed).reshape(-1, 2)) / sigma
            loss = (model(x, t, told) - v).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - min(average, (step + 1) / (step + 10)))
            bar.update()
    with torch.no_grad():
        torch._foreach_copy_(weights, averages)
    return model.eval().requires_grad_(False)


def sampler(model: Denoiser, solver: str = "ddim", steps: int = 20, **options: Any) -> Sampler:
    """A Sampler of points in the plane, fp32 [N, 2], by a trained network."""
    return Sampler(
        model, SCHEDULE, SHAPE, "v", solver, steps, num_classes=model.classes or None, clip=None, compile=False, micro_batch=512, **options
    )


def grid(reach: float = 4.0, points: int = 81) -> Tensor:
    """A square grid of points about 0, row by row from below, fp64 [points^2, 2]."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


# Of the highest density; what is less is negligible.
NEGLIGIBLE = 1e-3


def cosine(learned: Tensor, exact: Tensor, density: Tensor) -> float:
    """Mean cosine similarity of two fields [N, 2] over the points whose density [N] is above a thousandth of its largest value, each counting alike."""
    kept = density > NEGLIGIBLE * density.max()
    return float(nn.functional.cosine_similarity(learned[kept].double(), exact[kept].double(), dim=1).mean())


def similarity(toy: Toy, model: Denoiser, t: int, label: int | None = None) -> float:
    """How like the exact score of x_t a network's is: `cosine` on a fine grid."""
    x = grid()
    alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    labels = None if label is None else torch.full((len(x),), label)
    return cosine(model.score(x, t, labels), toy.score(x, alpha, sigma, label), toy.log_density(x, alpha, sigma, label).exp())


def timestep(sigma: float) -> int:
    """The timestep whose noise is nearest to sigma."""
    return int(np.abs(SCHEDULE.sigma - sigma).argmin())


_TRAINED: dict[tuple[str, int], Denoiser] = {}


def trained(name: str, seed: int = 0, *, progress: bool | Bar = False) -> Denoiser:
    """The network of a set by its name, trained once in a process. ValueError for a set that there is not."""
    if name not in TOYS:
        raise ValueError(f"unknown set {name!r}; known: {', '.join(TOYS)}")
    if (name, seed) not in _TRAINED:
        _TRAINED[name, seed] = train(TOYS[name](), seed=seed, progress=progress)
    return _TRAINED[name, seed]

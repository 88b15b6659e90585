"""Toy data against its definitions, and a network that learns its score in seconds."""

import math

import numpy as np
import pytest
import torch

from fastdiff import toy
from fastdiff.field import SIGMAS
from fastdiff.ideal import IdealDenoiser
from fastdiff.toy import SCHEDULE, TOYS

NAMES = list(TOYS)
LEVELS = [(1.0, 0.0), (0.95, math.sqrt(1 - 0.95**2)), (0.4, math.sqrt(1 - 0.16))]


def places(n: int = 200) -> torch.Tensor:
    return torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 - 2.5


@pytest.mark.parametrize("name", NAMES)
def test_is_centred_and_of_variance_one(name):
    data = TOYS[name]()
    mean = data.weights @ data.means
    variance = data.weights @ (data.means**2 + data.covariances.diagonal(dim1=1, dim2=2))
    assert mean.abs().max() < 1e-12
    assert variance.sum().item() == pytest.approx(2)
    points, _ = data.sample(20_000, seed=3)
    assert (points.mean(0) - mean).abs().max() < 0.03
    assert (points.var(0) - variance).abs().max() < 0.04


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", LEVELS)
def test_density_is_one_in_all(name, level):
    data, points = TOYS[name](), 241
    x = toy.grid(6, points)
    assert data.log_density(x, *level).exp().sum().item() * (12 / (points - 1)) ** 2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", LEVELS)
def test_score_is_the_gradient(name, level):
    data, x = TOYS[name](), places().requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_density(x, *level).sum(), x)
    x = x.detach()
    found = data.score(x, *level)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
    step = 1e-5
    for axis in range(2):
        away = torch.zeros(2, dtype=torch.float64)
        away[axis] = step
        slope = (data.log_density(x + away, *level) - data.log_density(x - away, *level)) / (2 * step)
        torch.testing.assert_close(found[:, axis], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_posterior_mean_is_that_of_brute_force(name, level):
    """By Tweedie's formula from the score, and by a sum over a fine grid of x_0 with Bayes' rule."""
    alpha, sigma = level
    data, x = TOYS[name](), places(20) * 0.7
    found = data.posterior_mean(x, alpha, sigma)
    torch.testing.assert_close(found, (x + sigma**2 * data.score(x, alpha, sigma)) / alpha, rtol=1e-9, atol=1e-9)
    x0 = toy.grid(5, 401)
    logs = data.log_density(x0) - (x[:, None] - alpha * x0).square().sum(2) / (2 * sigma**2)
    torch.testing.assert_close(found, logs.softmax(1) @ x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["moons", "spiral"])
def test_agrees_with_the_ideal_denoiser_of_its_points(name):
    """A blurred list at one level is the list itself at a noisier one: alpha^2 blur^2 + sigma^2."""
    data, x, t = TOYS[name](), places(50), 400
    alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    exact = IdealDenoiser(data.means, SCHEDULE, "x0")
    blur = float(data.covariances[0, 0, 0])
    part = math.sqrt(sigma**2 - alpha**2 * blur)
    told = torch.full((50,), float(t))
    torch.testing.assert_close(data.log_density(x, alpha, part), exact.log_density(x, told), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(data.score(x, alpha, part), exact.score(x, told), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_draws_of_the_posterior_have_its_mean_and_spread(name):
    alpha, sigma = LEVELS[2]
    data, x, n = TOYS[name](), torch.tensor([[0.5, -0.5], [-1.0, 1.0]], dtype=torch.float64), 20_000
    found = data.posterior(x, n, alpha, sigma, seed=1)
    torch.testing.assert_close(found.mean(1), data.posterior_mean(x, alpha, sigma), rtol=0, atol=0.04)
    x0 = toy.grid(5, 401)
    shares = (data.log_density(x0) - (x[:, None] - alpha * x0).square().sum(2) / (2 * sigma**2)).softmax(1)
    variance = shares @ x0**2 - (shares @ x0) ** 2
    torch.testing.assert_close(found.var(1), variance, rtol=0.05, atol=0.01)


def test_samples_are_of_their_classes_and_of_the_stream():
    data = toy.mixture()
    points, labels = data.sample(3000, seed=5)
    assert labels is not None
    shares = torch.bincount(labels, minlength=3) / 3000
    assert (shares - data.weights).abs().max() < 0.03
    for k in range(3):
        assert (points[labels == k].mean(0) - data.means[k]).abs().max() < 0.08
        own, told = data.sample(500, seed=5, label=k)
        assert told is not None and bool((told == k).all())
        assert (own.mean(0) - data.means[k]).abs().max() < 0.08
    some, _ = data.sample(10, seed=5, first=100)
    assert torch.equal(some, points[100:110])
    assert not torch.equal(data.sample(10, seed=6)[0], points[:10])


def test_a_class_is_that_part_alone():
    data, x = toy.mixture(), places()
    together = torch.stack([data.log_density(x, 0.8, 0.6, label=k) + data.weights[k].log() for k in range(3)]).logsumexp(0)
    torch.testing.assert_close(together, data.log_density(x, 0.8, 0.6))
    for bad in (3, -1):
        with pytest.raises(ValueError, match="mixture has 3 classes"):
            data.score(x, label=bad)
    with pytest.raises(ValueError, match="spiral has 0 classes"):
        toy.spiral().sample(3, label=0)


def test_cosine_counts_what_is_not_negligible():
    exact = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])
    learned = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    density = torch.tensor([1.0, 0.5, 0.002, 0.0005])
    assert toy.cosine(learned, exact, density) == pytest.approx((1 - 1 + math.sqrt(0.5)) / 3)
    assert toy.cosine(exact, exact, density) == pytest.approx(1)
    assert toy.cosine(-exact, exact, density) == pytest.approx(-1)


def test_company_is_the_posterior_mean_over_the_group():
    generator = torch.Generator().manual_seed(1)
    x, x0 = (torch.randn(2, 5, 2, generator=generator) for _ in range(2))
    sigma = torch.rand(2, 5, 1, generator=generator) * 0.8 + 0.1
    alpha = (1 - sigma**2).sqrt()
    allowed = torch.rand(2, 5, 5, generator=generator) < 0.6
    allowed |= torch.eye(5, dtype=torch.bool)
    found = toy.company(x, x0, alpha, sigma, allowed)
    for g in range(2):
        for i in range(5):
            weights = torch.exp(-(x[g, i] - alpha[g, i] * x0[g]).square().sum(1) / (2 * sigma[g, i] ** 2)) * allowed[g, i]
            torch.testing.assert_close(found[g, i], weights @ x0[g] / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_learned_score_points_where_the_exact_one_does(name):
    """What the issue asks for, 0.98, at every level shown; after training of seconds."""
    data, network = TOYS[name](), toy.trained(name)
    for sigma in SIGMAS:
        found = toy.similarity(data, network, toy.timestep(sigma))
        assert 0.98 < found <= 1 + 1e-9, f"{name} at sigma {sigma}: {found}"
    # Vacuous if any network would do.
    assert toy.similarity(data, toy.Denoiser(len(data.classes)), toy.timestep(0.4)) < 0.9


def test_learned_score_of_each_class():
    data, network = toy.mixture(), toy.trained("mixture")
    for label in range(3):
        for sigma in SIGMAS:
            assert toy.similarity(data, network, toy.timestep(sigma), label) > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_learned_denoiser_is_the_posterior_mean_at_every_level(name):
    """Lengths too, and where hardly anything but noise is left, from where every sampler starts."""
    data, network = TOYS[name](), toy.trained(name)
    x = toy.grid(3, 31)
    for t in (20, 100, 300, 600, 850, 950, 998):
        alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
        share = data.log_density(x, alpha, sigma).softmax(0)[:, None]
        x0 = alpha * x - sigma * network(x.float(), torch.full((len(x),), t)).double()
        assert (share * (x0 - data.posterior_mean(x, alpha, sigma)) ** 2).sum().sqrt() < 0.08


@pytest.mark.parametrize("name", ["mixture", "spiral"])
def test_training_is_the_same_twice(name):
    first, second, other = (toy.train(TOYS[name](), steps=12, seed=seed) for seed in (3, 3, 4))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.leave.weight, other.leave.weight)
    assert not torch.equal(first.leave.weight, torch.zeros_like(first.leave.weight))


def test_training_leaves_the_generator_alone_and_counts_its_steps():
    counted = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            counted.append("closed")

        def update(self):
            counted.append(1)

    before = torch.get_rng_state()
    toy.train(toy.gaussian(), steps=3, batch=256, progress=lambda steps: counted.append(steps) or Bar())
    assert counted == [3, 1, 1, 1, "closed"]
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="multiple of 256"):
        toy.train(toy.gaussian(), batch=100)
    with pytest.raises(ValueError, match="known: gaussian, mixture, moons, spiral"):
        toy.trained("star")


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Szekely & Rizzo 2013: 0 for two samples of one distribution, but for chance."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 50), ("ddpm", 100), ("dpmpp_2m_sde", 30)])
def test_samplers_of_the_library_draw_the_data(solver, steps):
    data = toy.moons()
    drawn = toy.sampler(toy.trained("moons"), solver, steps)(1024, seed=1).double()
    assert drawn.shape == (1024, 2)
    real, more = (data.sample(2048, seed=seed)[0] for seed in (7, 8))
    assert energy_distance(drawn, real) < 0.012
    # What it says of another distribution, and of the same.
    assert energy_distance(torch.from_numpy(np.random.default_rng(0).normal(size=(1024, 2))), real) > 0.03
    assert energy_distance(more[:1024], real) < 0.006


@pytest.mark.parametrize("label", [0, 1, 2])
def test_guidance_leads_to_the_class(label):
    data = toy.mixture()
    sampler = toy.sampler(toy.trained("mixture"), "ddim", 20)

    def share(x: torch.Tensor) -> float:
        logs = torch.stack([data.log_density(x, label=k) + data.weights[k].log() for k in range(3)])
        return float((logs.argmax(0) == label).double().mean())

    free, told, more = (sampler(256, seed=2, **call) for call in ({}, {"labels": label}, {"labels": label, "guidance": 4.0}))
    assert share(free) == pytest.approx(float(data.weights[label]), abs=0.1)
    assert share(told) > 0.98 and share(more) > 0.98
    centre = data.means[label]
    assert (told.double().mean(0) - centre).norm() < 0.1
    # More guidance is less variety, further from the others.
    assert more.var(0).sum() < 0.8 * told.var(0).sum()
    assert more.double().mean(0).norm() > told.double().mean(0).norm()

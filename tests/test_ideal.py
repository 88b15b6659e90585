"""The exact denoiser of a finite list, against Bayes' rule written out, gradients, and closed forms."""

import math
import resource

import numpy as np
import pytest
import torch
from helpers import FiniteList

from fastdiff import Sampler, Schedule, noise
from fastdiff.ideal import IdealDenoiser

LINEAR = Schedule.linear(1000)
POINTS = torch.tensor([[0.5, 0.5], [-0.5, 0.2], [0.1, -0.6], [0.9, -0.3], [0.0, 0.1]])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])
LABELS = torch.tensor([0, 1, 0, 1, 1])


def by_bayes(x, alpha, sigma, images, weights):
    """(posterior, its mean, log p) of one x in plain loops of float64."""
    logs = []
    for image, weight in zip(images.double(), weights.double(), strict=True):
        squares = sum((a - alpha * b) ** 2 for a, b in zip(x.flatten().tolist(), image.flatten().tolist(), strict=True))
        logs.append(math.log(weight / weights.double().sum()) - squares / (2 * sigma**2) if weight > 0 else -math.inf)
    top = max(logs)
    shares = [math.exp(v - top) for v in logs]
    posterior = torch.tensor([v / sum(shares) for v in shares], dtype=torch.float64)
    log_p = top + math.log(sum(shares)) - x.numel() * math.log(sigma * math.sqrt(2 * math.pi))
    return posterior, (posterior.reshape(-1, *[1] * (images.ndim - 1)) * images.double()).sum(0), log_p


SCHEDULES = {
    "linear": (LINEAR, [0.0, 37.0, 400.5, 999.0]),
    "cosine": (Schedule.cosine(100), [0.0, 12.25, 50.0, 98.0]),
    "flow": (Schedule.flow(100, shift=3.0), [0.0, 12.25, 50.0, 99.0]),
    "edm": (Schedule.edm(100), [0.002, 0.1, 1.7, 80.0]),
}


def level(schedule, t):
    return (1.0, t) if schedule.name == "edm" else schedule.noise_at(t)


def inputs(schedule, times, images=POINTS):
    """x in float64 at each time, from the list's first image but one on."""
    z = noise.normal(3, range(len(times)), 0, images.shape[1:]).double()
    ends = [level(schedule, t) for t in times]
    return torch.stack([a * images[1 + i % 2].double() + s * z[i] for i, (a, s) in enumerate(ends)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_mean_and_density_are_bayes_rule(name):
    schedule, times = SCHEDULES[name]
    model, x, t = IdealDenoiser(POINTS, schedule, weights=WEIGHTS), inputs(schedule, times), torch.tensor(times, dtype=torch.float64)
    posterior, mean, log_p = zip(*(by_bayes(x[i], *level(schedule, v), POINTS, WEIGHTS) for i, v in enumerate(times)), strict=True)
    torch.testing.assert_close(model.posterior(x, t), torch.stack(posterior), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(x, t), torch.stack(mean), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.log_density(x, t), torch.tensor(log_p, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert model.posterior(x, t)[:, 3].eq(0).all(), "an image of weight 0 is not there"


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_prediction_means_the_same_x0(name):
    """Each answer turned back by its definition: z = (x - alpha x_0) / sigma, v = alpha z - sigma x_0, u = z - x_0, and F of EDM's table 1."""
    schedule, times = SCHEDULES[name]
    x, t = inputs(schedule, times), torch.tensor(times, dtype=torch.float64)
    alpha, sigma = (torch.tensor([level(schedule, v)[i] for v in times], dtype=torch.float64)[:, None] for i in (0, 1))
    x0 = IdealDenoiser(POINTS, schedule)(x, t)
    back = {"epsilon": lambda m: (x - sigma * m) / alpha, "flow": lambda m: (x - sigma * m) / (alpha + sigma)}
    if schedule.preserving:
        back["v"] = lambda m: alpha * x - sigma * m
    for prediction, solve in back.items():
        some = slice(None) if prediction == "flow" else (alpha[:, 0] > 1e-3)  # without signal noise says little of x_0
        m = IdealDenoiser(POINTS, schedule, prediction)(x, t)
        torch.testing.assert_close(solve(m)[some], x0[some], rtol=1e-7, atol=1e-9)
    k, signal = (sigma / alpha)[:3], alpha[:3]
    spread = (k**2 + 0.25).sqrt()
    m = IdealDenoiser(POINTS, schedule, "edm")(x[:3] / signal / spread, k[:, 0].log() / 4)
    torch.testing.assert_close(0.25 / spread**2 * x[:3] / signal + 0.5 * k / spread * m, x0[:3], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_the_gradient_of_the_density_and_derivatives_are_exact(name):
    """Tweedie: the score says the mean; and the mean's own derivative is alpha / sigma^2 times the posterior's covariance."""
    schedule, times = SCHEDULES[name]
    model, t = IdealDenoiser(POINTS, schedule, weights=WEIGHTS), torch.tensor(times, dtype=torch.float64)
    x = inputs(schedule, times).requires_grad_()
    (grown,) = torch.autograd.grad(model.log_density(x, t).sum(), x)
    torch.testing.assert_close(model.score(x.detach(), t), grown, rtol=1e-7, atol=1e-7)
    rows = [torch.autograd.grad(model(x, t)[:, i].sum(), x)[0] for i in range(2)]
    posterior, mean = model.posterior(x.detach(), t), model(x.detach(), t)
    apart = POINTS.double()[None] - mean[:, None]
    covariance = torch.einsum("nk,nki,nkj->nij", posterior, apart, apart)
    gain = torch.tensor([a / s**2 for a, s in (level(schedule, v) for v in times)], dtype=torch.float64).reshape(-1, 1, 1)
    torch.testing.assert_close(torch.stack(rows, 1), gain * covariance, rtol=1e-6, atol=1e-8)


def test_a_class_is_its_own_list_and_the_null_class_is_all():
    model, x, t = IdealDenoiser(POINTS, LINEAR, "epsilon", WEIGHTS, LABELS), inputs(LINEAR, [300.0] * 3), torch.tensor(300)
    assert model.num_classes == 2
    labels = torch.tensor([0, 1, 2])
    parts = [(POINTS[[0, 2]], WEIGHTS[[0, 2]]), (POINTS[[1, 3, 4]], WEIGHTS[[1, 3, 4]]), (POINTS, WEIGHTS)]
    for ask in ("__call__", "score", "log_density"):
        wanted = [getattr(IdealDenoiser(p, LINEAR, "epsilon", w), ask)(x[i : i + 1], t) for i, (p, w) in enumerate(parts)]
        torch.testing.assert_close(getattr(model, ask)(x, t, labels), torch.cat(wanted), rtol=1e-9, atol=1e-12)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 2)))
    assert model.posterior(x, t, labels)[0, LABELS == 1].eq(0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_of_images_it_says_what_the_tests_have_said_so_far(prediction):
    schedule = Schedule.flow(50) if prediction == "flow" else LINEAR
    images = noise.normal(1, range(7), 0, (3, 4, 4)).clamp(-1, 1)
    x, t = noise.normal(2, range(5), 0, (3, 4, 4)), torch.tensor([0, 5, 20, 40, 48])
    found = IdealDenoiser(images, schedule, prediction)(x, t)
    assert found.dtype == torch.float32 and found.shape == x.shape
    torch.testing.assert_close(found, FiniteList(images, schedule, prediction)(x, t), rtol=1e-5, atol=1e-4)


def test_with_hardly_any_noise_it_is_the_nearest_image():
    """Logits of 10^8 and more: no overflow, and one image's weight is 1. Without any noise at all, too."""
    model = IdealDenoiser(POINTS, Schedule.edm(10))
    x = (POINTS[[2, 0]] + 0.01).double()
    for sigma in (1e-6, 1e-30, 0.0):
        torch.testing.assert_close(model(x, torch.tensor(sigma)), POINTS[[2, 0]].double(), rtol=0, atol=1e-12)
        assert torch.equal(model.posterior(x, torch.tensor(sigma)).argmax(1), torch.tensor([2, 0]))
    clean = Schedule.from_alphas_cumprod([1.0, 0.5])
    torch.testing.assert_close(IdealDenoiser(POINTS, clean)(x, torch.tensor(0)), POINTS[[2, 0]].double(), rtol=0, atol=1e-12)
    # Halfway between two, it is both, whatever their distance to a third.
    pair = IdealDenoiser(torch.tensor([[-1.0], [1.0], [5.0]]), Schedule.edm(10))
    assert pair(torch.zeros(1, 1), torch.tensor(1e-4)).abs() < 1e-12


def test_a_solver_finds_the_images_of_the_list():
    """Started from noise, heun ends at an image of the list, of the class it was asked for."""
    model = IdealDenoiser(POINTS.reshape(5, 2, 1, 1), LINEAR, "x0", labels=LABELS)
    labels = torch.arange(8) % 2
    images = Sampler(model, LINEAR, shape=(2, 1, 1), prediction="x0", num_classes=2, solver="heun", steps=30)(8, labels=labels)
    distance = (images.reshape(8, 1, 2) - POINTS).square().sum(2).sqrt()
    assert (distance.min(1).values < 0.02).all(), distance.min(1).values
    assert torch.equal(LABELS[distance.argmin(1)], labels)


def test_many_samples_go_by_in_groups(monkeypatch):
    x, t = noise.normal(2, range(9), 0, (2,)), torch.arange(9) * 100
    labels = torch.arange(9) % 3
    model = IdealDenoiser(POINTS, LINEAR, "v", labels=LABELS)
    wanted = [ask(x, t, labels) for ask in (model, model.log_density, model.posterior)]
    monkeypatch.setattr("fastdiff.ideal.TABLE", 10)
    found = [ask(x, t, labels) for ask in (model, model.log_density, model.posterior)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert model(x[:0], t[:0]).shape == (0, 2) and model.log_density(x[:0], t[:0]).shape == (0,)


def test_twenty_thousand_images_stay_under_a_gigabyte():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the most so far
    images = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (20_000, 768)).astype(np.float32))
    model = IdealDenoiser(images, LINEAR, "epsilon")
    x = images[:64].clone().requires_grad_()
    model(x, torch.full((64,), 200.5)).square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(model.posterior(x.detach(), torch.tensor(200)).argmax(1), torch.arange(64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


BAD = [
    ({"images": torch.zeros(0, 2)}, "images must be a tensor of floating-point numbers"),
    ({"images": torch.zeros(3, 2, dtype=torch.uint8)}, "images must be a tensor of floating-point numbers"),
    ({"images": torch.full((3, 2), math.nan)}, "images hold numbers that are not finite"),
    ({"prediction": "noise"}, "prediction is 'noise'; known: epsilon, v, x0, flow, edm"),
    ({"prediction": "v", "schedule": Schedule.flow(10)}, "not for a schedule of 'flow'"),
    ({"weights": torch.ones(4)}, "weights must be 5 finite numbers"),
    ({"weights": torch.tensor([1, 1, 1, 1, -1.0])}, "none below 0 and not all 0"),
    ({"weights": torch.zeros(5)}, "none below 0 and not all 0"),
    ({"labels": torch.zeros(5)}, r"labels must be int64 \[5\]"),
    ({"labels": torch.tensor([0, 0, 2, 2, 2])}, "class 1 has no image of positive weight"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_lists_that_do_not_fit_are_refused(change, text):
    given = {"images": POINTS, "schedule": LINEAR, **change}
    with pytest.raises(ValueError, match=text):
        IdealDenoiser(**given)


def test_samples_that_do_not_fit_are_refused():
    model, x = IdealDenoiser(POINTS, LINEAR, labels=LABELS), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"x is \[2, 3\]; the images of the list ask for floating-point numbers \[N, 2\]"):
        model(torch.zeros(2, 3), torch.tensor(0))
    with pytest.raises(ValueError, match=r"t has shape \[3\]; give one for all or one a sample, \[2\]"):
        model(x, torch.zeros(3))
    with pytest.raises(ValueError, match="t holds 0 to 1000; this schedule has timesteps 0 to 999"):
        model(x, torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match=r"labels must be one a sample, in 0 \.\. 2, of which 2 is any class"):
        model(x, torch.tensor(0), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="images without labels"):
        IdealDenoiser(POINTS, LINEAR)(x, torch.tensor(0), torch.tensor([0, 0]))
    clean = Schedule.from_alphas_cumprod([1.0, 0.5])
    for ask in (IdealDenoiser(POINTS, clean, "epsilon"), IdealDenoiser(POINTS, clean).score, IdealDenoiser(POINTS, clean).log_density):
        with pytest.raises(ValueError, match=r"without noise .* is not defined"):
            ask(x, torch.tensor(0))

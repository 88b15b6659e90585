"""log p(x) against closed forms, and what the shipped network makes of sprites."""

import math

import numpy as np
import pytest
import torch
from helpers import FiniteList, Gaussian, Plain, small_network

import fastdiff
from fastdiff import Schedule, data, dequantised, log_likelihood

SCHEDULE = Schedule.linear(1000)
# sigma / alpha of the first timestep: the noise that the data is taken to have.
LITTLE = float(SCHEDULE.sigma[0] / SCHEDULE.alpha[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.3, 0.5), (-0.2, 0.1)])
def test_gaussian_data(mean, deviation, prediction):
    """Of a Gaussian the flow and its divergence are known: it scales and shifts. The end is taken for N(0, 1), which it is but for alpha."""
    x0 = torch.linspace(-1, 1, 12).reshape(4, 3, 1, 1)
    model = Gaussian(mean, deviation, SCHEDULE, prediction)
    found = log_likelihood(model, SCHEDULE, x0, prediction=prediction, steps=800)
    spread, alpha, sigma = math.hypot(deviation, LITTLE), SCHEDULE.alpha[-1], SCHEDULE.sigma[-1]
    stretch = math.hypot(alpha * deviation, sigma) / spread
    ends = alpha * mean + (x0.double() - mean) * stretch
    wanted = (torch.distributions.Normal(0, 1).log_prob(ends) + math.log(stretch)).flatten(1).sum(1)
    # Heun's error falls with the square of the steps; twelve deviations out, in 800, it is 2e-4 of where the flow leads, and twice that of its square.
    torch.testing.assert_close(found.nats, wanted, rtol=5e-4, atol=2e-3)
    torch.testing.assert_close(found.latents, ends.float(), rtol=2.5e-4, atol=2e-4)
    # And that is the data's own density, as near as the end is to N(0, 1).
    own = torch.distributions.Normal(mean, spread).log_prob(x0.double()).flatten(1).sum(1)
    assert ((found.nats - own).abs() <= 0.01 + 5e-4 * own.abs() + 2 * alpha * (abs(mean) + alpha) * ends.abs().flatten(1).sum(1)).all()
    assert (found.error == 0).all() and found.dims == 3


def test_twice_the_steps_is_a_quarter_of_the_error():
    x0 = torch.full((1, 2, 1, 1), 0.4)
    model = Gaussian(0.1, 0.5, SCHEDULE)
    nats = [log_likelihood(model, SCHEDULE, x0, steps=steps).nats.item() for steps in (20, 40, 80, 640)]
    errors = [abs(v - nats[-1]) for v in nats[:-1]]
    assert 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5


def mixture(x0, points):
    """log density of points with the first timestep's noise, all as likely."""
    distance = (x0.double()[:, None] - points.double()[None]).flatten(2).square().sum(2)
    dims = x0[0].numel()
    return torch.logsumexp(-distance / (2 * LITTLE**2), dim=1) - math.log(len(points)) - dims * math.log(LITTLE * math.sqrt(2 * math.pi))


POINTS = torch.tensor([[0.5, 0.5], [-0.5, 0.2], [0.1, -0.6]]).reshape(3, 2, 1, 1)


def test_the_denoiser_of_a_finite_set():
    x0 = torch.cat([POINTS, POINTS + 0.01, POINTS - torch.tensor([0.02, 0.0]).reshape(2, 1, 1)])
    found = log_likelihood(FiniteList(POINTS, SCHEDULE), SCHEDULE, x0, steps=1500)
    torch.testing.assert_close(found.nats, mixture(x0, POINTS), rtol=0, atol=0.03)


def test_random_probes_are_right_on_average_and_say_how_far_off_they_are():
    x0 = POINTS + 0.01
    model = FiniteList(POINTS, SCHEDULE)
    exact = log_likelihood(model, SCHEDULE, x0, steps=80).nats
    found = log_likelihood(model, SCHEDULE, x0, steps=80, probes=40, seed=1)
    assert ((found.nats - exact).abs() <= 4 * found.error + 1e-6).all() and (found.error > 0).all()
    # A sample's probes are its own, whatever the batch.
    alone = log_likelihood(model, SCHEDULE, x0[2:], steps=80, probes=40, seed=1, first=2)
    torch.testing.assert_close(alone.nats, found.nats[2:], rtol=0, atol=1e-6)
    single = log_likelihood(model, SCHEDULE, x0, steps=30, probes=1)
    assert single.error.isnan().all()


def test_bits_per_dim_and_dequantisation():
    """Uniform over [-1, 1] and half a level beyond is 8 bits a number."""
    found = fastdiff.Likelihood(
        torch.tensor([-12 * math.log(256 / 127.5)], dtype=torch.float64), torch.zeros(1), torch.zeros(1, 3, 2, 2), 12
    )
    assert found.bits_per_dim().item() == pytest.approx(8)
    assert found.bits_per_dim(2).item() == pytest.approx(math.log2(256 / 127.5) - 1)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(40, 3, 1, 1)
    points = dequantised(images)
    offset = (points + 1) * 127.5 - images.float()
    assert offset.abs().max() <= 0.5001 and abs(offset.mean()) < 0.005 and abs(offset.std() - 12**-0.5) < 0.005
    assert torch.equal(points[3:5], dequantised(images[3:5], ids=[3, 4])) and not torch.equal(points, dequantised(images, seed=1))


def test_the_shipped_network_knows_sprites_from_scrambled_ones_and_from_noise():
    """Held-out sprites, their pixels in another order, and noise of the same range; by a single probe each."""
    checkpoint, (_, held_out) = fastdiff.load("sprites"), data.load().split()
    some = np.linspace(0, len(held_out.images) - 1, 4).astype(int)
    images = torch.from_numpy(held_out.images[some]).permute(0, 3, 1, 2)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    scrambled = images.flatten(2)[:, :, order].reshape(images.shape)
    random = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x0 = dequantised(torch.cat([images, scrambled, random]))
    labels = torch.from_numpy(held_out.labels[some]).repeat(3)
    found = log_likelihood(checkpoint.model, checkpoint.schedule, x0, prediction=checkpoint.prediction, labels=labels, steps=12)
    bits = found.bits_per_dim().reshape(3, 4)
    assert (bits[0] + 0.5 < bits[1]).all() and (bits[1] < bits[2]).all(), bits
    assert 1 < bits[0].mean() < 8, bits


def test_a_network_stays_in_the_mode_it_was_in():
    model = small_network().train()
    log_likelihood(model, SCHEDULE, torch.zeros(1, 3, 8, 8), steps=1)
    assert model.training and not any(p.grad is not None for p in model.parameters())
    assert log_likelihood(model, SCHEDULE, torch.zeros(0, 3, 8, 8)).nats.shape == (0,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x0": [1.0]}, "x0 must be images as a tensor of floating-point numbers"),
        ({"x0": torch.zeros(2, 3, 1, 1, dtype=torch.uint8)}, "floating-point numbers"),
        ({"steps": 0}, "steps is 0 and probes is None; give whole numbers of at least 1"),
        ({"probes": 1.5}, "probes is 1.5"),
        ({"prediction": "flow"}, "prediction is 'flow'; a likelihood is known for epsilon, v, x0"),
        ({"schedule": Schedule.flow(10)}, "a schedule that preserves variance, with signal and noise at both ends"),
        ({"schedule": Schedule.from_alphas_cumprod([0.9, 0.5, 0.0])}, "with signal and noise at both ends"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    given = {"schedule": SCHEDULE, "x0": torch.zeros(2, 3, 1, 1), **change}
    with pytest.raises(ValueError, match=text):
        log_likelihood(Plain(lambda x, t: x), given.pop("schedule"), given.pop("x0"), **given)

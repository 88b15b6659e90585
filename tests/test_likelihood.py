"""log p(x) and its bound against closed forms, and what the shipped network makes of sprites."""

import math

import numpy as np
import pytest
import torch
from helpers import Plain, small_network
from torch import nn
from torch.distributions import Normal, kl_divergence

import fastdiff
from fastdiff import Schedule, data, dequantised, log_likelihood, noise
from fastdiff.ideal import IdealDenoiser
from fastdiff.likelihood import variational_bound

LINEAR, COSINE, FLOW, EDM = Schedule.linear(1000), Schedule.cosine(1000), Schedule.flow(1000), Schedule.edm(1000)


def little(schedule):
    """sigma / alpha of the first timestep: the noise that the data is taken to have."""
    return float(schedule.sigma[0] / schedule.alpha[0])


class Mixture(nn.Module):
    """A network that knows its data, a mixture of Gaussians N(means[c], deviations[c]^2), in float64 from end to end."""

    def __init__(self, means, deviations, weights, schedule, prediction="x0"):
        super().__init__()
        self.means, self.deviations = torch.tensor(means).double(), torch.tensor(deviations).double()
        self.log_weights = torch.tensor(weights).double().log() - math.log(sum(weights))
        self.schedule, self.prediction = schedule, prediction

    def forward(self, x, t):
        assert x.dtype == t.dtype == torch.float64
        levels = {v: (1.0, v) if self.schedule.name == "edm" else self.schedule.noise_at(v) for v in set(t.tolist())}
        alpha, sigma = torch.tensor([levels[v] for v in t.tolist()], dtype=torch.float64).split(1, dim=1)
        flat = x.flatten(1)
        spread = alpha**2 * self.deviations**2 + sigma**2  # [N, C]
        off = flat[:, None] - alpha[:, None] * self.means  # [N, C, D]
        share = torch.softmax(self.log_weights - off.square().sum(2) / (2 * spread) - flat.shape[1] / 2 * spread.log(), 1)
        x0 = (share[..., None] * (self.means + (alpha * self.deviations**2 / spread)[..., None] * off)).sum(1)
        z = (flat - alpha * x0) / sigma
        return {"x0": x0, "epsilon": z, "v": alpha * z - sigma * x0, "flow": z - x0}[self.prediction].reshape(x.shape)

    def log_density(self, x):
        """ln p of the data with the first timestep's noise."""
        spread, flat = self.deviations**2 + little(self.schedule) ** 2, x.flatten(1)
        off = (flat[:, None] - self.means).square().sum(2)
        return torch.logsumexp(self.log_weights - off / (2 * spread) - flat.shape[1] / 2 * (2 * math.pi * spread).log(), 1)

    def draw(self, n, shape):
        """n of the data with that noise, by turns of each Gaussian."""
        c = torch.arange(n) % len(self.deviations)
        z = noise.normal(9, range(n), 7, shape).double()
        return (
            self.means[c].reshape(n, *shape) + torch.hypot(self.deviations[c], torch.tensor(little(self.schedule))).reshape(n, 1, 1, 1) * z
        )


def gaussian(mean, deviation, schedule, prediction="x0", dims=3):
    return Mixture([[mean] * dims], [deviation], [1.0], schedule, prediction)


@pytest.mark.parametrize(("schedule", "prediction"), [(COSINE, "epsilon"), (COSINE, "v"), (COSINE, "x0"), (FLOW, "flow"), (FLOW, "x0")])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.3, 0.5), (-0.2, 0.1)])
def test_gaussian_data(mean, deviation, schedule, prediction):
    model = gaussian(mean, deviation, schedule, prediction)
    x0 = model.draw(6, (3, 1, 1))
    found = log_likelihood(model, schedule, x0, prediction=prediction)
    torch.testing.assert_close(found.nats, model.log_density(x0), rtol=0, atol=1e-3)
    assert (found.error == 0).all() and found.dims == 3 and found.latents.dtype == torch.float64


@pytest.mark.parametrize("schedule", [LINEAR, EDM])
@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-0.2, 0.1)])
def test_what_the_last_timestep_still_knows_of_the_data(mean, deviation, schedule):
    """Where some signal is left at the end, that end is not N(0, 1) but is taken for it, as sampling does: the flow scales and shifts by a known
    amount, and log p is of what sampling would make."""
    model = gaussian(mean, deviation, schedule)
    x0 = model.draw(6, (3, 1, 1))
    found = log_likelihood(model, schedule, x0, prediction="x0", steps=64)
    norm = math.hypot(schedule.alpha[-1], schedule.sigma[-1])
    alpha, sigma = schedule.alpha[-1] / norm, schedule.sigma[-1] / norm
    stretch = math.hypot(alpha * deviation, sigma) / math.hypot(deviation, little(schedule))
    ends = alpha * mean + (x0 - mean) * stretch
    wanted = (Normal(0, 1).log_prob(ends) + math.log(stretch)).flatten(1).sum(1)
    torch.testing.assert_close(found.nats, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.latents, ends, rtol=0, atol=1e-4)
    assert (found.nats - model.log_density(x0)).abs().max() > 1e-3, "the difference would be seen"


def test_twice_the_steps_is_a_sixteenth_of_the_error():
    model = gaussian(0.3, 0.5, FLOW)
    x0 = model.draw(6, (3, 1, 1))
    wanted = model.log_density(x0)
    errors = [(log_likelihood(model, FLOW, x0, prediction="x0", steps=steps).nats - wanted).abs().max() for steps in (16, 32, 64)]
    assert 11 < errors[0] / errors[1] < 22 and 11 < errors[1] / errors[2] < 22, errors


@pytest.mark.parametrize("schedule", [COSINE, FLOW])
def test_mixtures_of_gaussians(schedule):
    model = Mixture([[0.5, 0.5, 0.0, 0.1], [-0.5, 0.2, 0.3, -0.4], [0.1, -0.6, -0.4, 0.0]], [0.2, 0.1, 0.3], [1.0, 2.0, 1.0], schedule)
    x0 = torch.cat([model.draw(6, (1, 2, 2)), torch.zeros(1, 1, 2, 2).double()])
    found = log_likelihood(model, schedule, x0, prediction="x0", steps=48)
    torch.testing.assert_close(found.nats, model.log_density(x0), rtol=0, atol=1e-3)


POINTS = torch.tensor([[0.5, 0.5], [-0.5, 0.2], [0.1, -0.6]]).reshape(3, 2, 1, 1)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [*((COSINE, p) for p in ("epsilon", "v", "x0", "edm")), (LINEAR, "epsilon"), (FLOW, "flow"), (EDM, "x0"), (EDM, "edm")],
)
def test_the_denoiser_of_a_finite_set(schedule, prediction):
    """Its density at the first noise level is known. A float64 list answers in the images' dtype."""
    model = IdealDenoiser(POINTS, schedule, prediction, weights=torch.tensor([1.0, 2.0, 1.0]))
    x0 = torch.cat([POINTS, POINTS + little(schedule), POINTS - torch.tensor([2 * little(schedule), 0.0]).reshape(2, 1, 1)]).double()
    found = log_likelihood(model, schedule, x0, prediction=prediction, steps=64)
    first = torch.tensor(float(schedule.sigma[0]) if schedule.name == "edm" else 0.0)
    dims = 2 * math.log(float(schedule.alpha[0]))
    wanted = model.log_density(schedule.alpha[0] * x0, first) + dims
    if prediction == "edm":  # the network is asked by ln(sigma / alpha) / 4, the list by its own schedule
        wanted = (
            IdealDenoiser(POINTS, schedule, "x0", weights=torch.tensor([1.0, 2.0, 1.0])).log_density(schedule.alpha[0] * x0, first) + dims
        )
    # The linear and EDM's schedule end with some signal.
    torch.testing.assert_close(found.nats, wanted, rtol=0, atol=5e-3 if schedule in (LINEAR, EDM) else 1e-3)


def test_a_label_is_told_to_the_network():
    model = IdealDenoiser(POINTS, COSINE, labels=torch.tensor([0, 1, 1]))
    x0, labels = POINTS.double(), torch.tensor([0, 1, 2])
    found = log_likelihood(model, COSINE, x0, prediction="x0", labels=labels)
    torch.testing.assert_close(
        found.nats, model.log_density(COSINE.alpha[0] * x0, torch.tensor(0), labels) + 2 * math.log(COSINE.alpha[0]), rtol=0, atol=2e-3
    )
    assert found.nats[0] - found.nats[1] == pytest.approx(math.log(2), abs=2e-3)


def test_hutchinsons_mean_is_the_exact_trace():
    """Over 1,024 images of one probe each, within three standard errors; and what it says of its own error is so."""
    dims, rng = 12, np.random.default_rng(0)
    model = Mixture(rng.uniform(-0.5, 0.5, (3, dims)).tolist(), [0.2, 0.1, 0.3], [1.0, 2.0, 1.0], COSINE)
    x0 = model.draw(1024, (3, 2, 2))
    exact = log_likelihood(model, COSINE, x0, prediction="x0", steps=6).nats
    off = log_likelihood(model, COSINE, x0, prediction="x0", steps=6, probes=1, seed=2).nats - exact
    assert off.std() > 0.01, "a single probe is not exact"
    assert abs(off.mean()) <= 3 * off.std() / math.sqrt(len(off)), (off.mean(), off.std() / math.sqrt(len(off)))
    some = log_likelihood(model, COSINE, x0[:128], prediction="x0", steps=6, probes=16, seed=3)
    assert 0.8 < (some.nats - exact[:128]).square().mean().sqrt() / some.error.square().mean().sqrt() < 1.25
    assert not some.nats.requires_grad and not some.latents.requires_grad


def test_probes_are_signs_and_independent():
    """v . D v of a diagonal is exact for signs; of one that is alike everywhere, (sum v)^2 / d, it is right on average only for independent ones."""
    model = gaussian(0.1, 0.3, COSINE, dims=12)
    x0 = model.draw(3, (3, 2, 2))
    exact, found = (log_likelihood(model, COSINE, x0, prediction="x0", steps=4, probes=probes).nats for probes in (None, 1))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    average = Plain(lambda x, t: 0.5 * x.mean((1, 2, 3), keepdim=True).expand_as(x))
    x0 = torch.zeros(600, 3, 2, 2, dtype=torch.float64)
    exact, found = (log_likelihood(average, COSINE, x0, prediction="x0", steps=4, probes=probes).nats for probes in (None, 1))
    off = found - exact
    assert off.std() > 0.1 and abs(off.mean()) <= 3 * off.std() / math.sqrt(len(off))


def test_a_samples_probes_are_its_own():
    model = IdealDenoiser(POINTS, COSINE)
    x0 = (POINTS + 0.01).double()
    found = log_likelihood(model, COSINE, x0, prediction="x0", steps=8, probes=4, seed=1)
    alone = log_likelihood(model, COSINE, x0[2:], prediction="x0", steps=8, probes=4, seed=1, first=2)
    torch.testing.assert_close(alone.nats, found.nats[2:], rtol=0, atol=1e-9)
    other = log_likelihood(model, COSINE, x0[2:], prediction="x0", steps=8, probes=4, seed=2, first=2)
    assert (other.nats - alone.nats).abs() > 1e-6 and (found.error > 0).all()
    assert log_likelihood(model, COSINE, x0, prediction="x0", steps=2, probes=1).error.isnan().all()


def levels_of(n, dims=4, deviation=0.3, mean=0.1):
    """Gaussian data on the 256 levels, and with the bins' own log probability, exact. [N, dims, 1, 1], fp64 [N]."""
    z = noise.normal(4, range(n), 0, (dims, 1, 1)).double()
    x0 = ((((mean + deviation * z).clamp(-1, 1) + 1) * 127.5).round()) / 127.5 - 1
    spread = math.hypot(deviation, little(COSINE))
    ends = [torch.special.ndtr((x0 + side / 255 - mean) / spread) for side in (-1, 1)]
    return x0, (ends[1] - ends[0]).log().flatten(1).sum(1)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_every_term_of_the_bound_is_its_closed_form(variance):
    """Of Gaussian data, whose exact network is off by (1 - g alpha)(x_0 - mean) - g sigma z. Many noise samples of one image, black and white in it."""
    schedule, mean, deviation, n = Schedule.linear(12, 1e-3, 0.5), 0.1, 0.4, 1500
    x0 = torch.tensor([-1.0, 1.0, 51 / 255, -0.6], dtype=torch.float64).reshape(1, 4, 1, 1)
    model = gaussian(mean, deviation, schedule, dims=4)
    bound = variational_bound(model, schedule, x0.expand(n, -1, -1, -1), prediction="x0", variance=variance, seed=5)
    assert bound.terms.shape == (13, n) and bound.timesteps == tuple(range(12)) and bound.dims == 4
    bar, betas, flat = schedule.alphas_cumprod, schedule.betas, x0.flatten()
    prior = kl_divergence(Normal(math.sqrt(bar[-1]) * flat, math.sqrt(1 - bar[-1])), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(bound.terms[-1], prior.expand(n), rtol=1e-9, atol=0)
    for t in range(12):
        gain = deviation**2 * math.sqrt(bar[t]) / (bar[t] * deviation**2 + 1 - bar[t])
        shift, scale = -(1 - gain * math.sqrt(bar[t])) * (flat - mean), gain * math.sqrt(1 - bar[t])  # of the guess, less x_0
        before = bar[t - 1] if t else 1.0
        small = (1 - before) / (1 - bar[t]) * betas[t]
        own = small if variance == "posterior" else betas[t]
        if t:
            weight = math.sqrt(before) * betas[t] / (1 - bar[t])  # Ho et al. 2020, equation 7
            step = kl_divergence(Normal(0.0, math.sqrt(small)), Normal(torch.zeros(4).double(), math.sqrt(own))).sum()
            wanted = step + weight**2 * (shift**2 + scale**2).sum() / (2 * own)
        else:
            own = (1 - bar[0]) / (1 - bar[1]) * betas[1] if variance == "posterior" else betas[0]
            z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
            guess = Normal(flat + shift + scale * z, math.sqrt(own))
            low, high = guess.cdf(flat - 1 / 255), guess.cdf(flat + 1 / 255)
            low[:, 0], high[:, 1] = 0.0, 1.0
            wanted = -torch.trapezoid((high - low).log() * Normal(0.0, 1.0).log_prob(z).exp(), z, dim=0).sum()
        found = bound.terms[t]
        assert abs(found.mean() - wanted) <= 4 * found.std() / math.sqrt(n) + 1e-9, (t, found.mean(), wanted)
    torch.testing.assert_close(bound.nats, bound.terms.sum(0))
    torch.testing.assert_close(bound.bits_per_dim(), bound.nats / (4 * math.log(2)))


def test_the_bound_is_above_and_nears_log_p_as_the_walk_grows_longer(monkeypatch):
    """Four times the steps come about four times as near to -log P of the levels, and to what log_likelihood says of the same images dequantised."""
    monkeypatch.setattr("fastdiff.likelihood.MICRO_BATCH", 4096)
    x0, exact = levels_of(4096)
    model = gaussian(0.1, 0.3, COSINE, dims=4)
    points = x0 + (torch.special.ndtr(noise.normal(8, range(4096), 0, x0.shape[1:]).double()) - 0.5) / 127.5
    flow = log_likelihood(model, COSINE, points, prediction="x0", steps=16).nats - 4 * math.log(127.5)
    assert abs(flow.mean() - exact.mean()) < 1e-3
    gaps = []
    for steps in (8, 32, 128):
        bound = variational_bound(model, COSINE, x0, prediction="x0", variance="beta", timesteps=steps, samples=4)
        gap = bound.nats + flow
        assert gap.mean() > 3 * gap.std() / math.sqrt(len(gap)), steps
        gaps.append(gap.mean().item())
    assert 3 < gaps[0] / gaps[1] < 8 and 2.5 < gaps[1] / gaps[2] < 6 and gaps[2] < 0.2, gaps


def test_a_bound_tells_its_own_error_and_a_samples_noise_is_its_own():
    model, (x0, _) = gaussian(0.1, 0.3, COSINE, dims=4), levels_of(5)
    bound = variational_bound(model, COSINE, x0, prediction="x0", timesteps=10, samples=30, seed=1)
    other = variational_bound(model, COSINE, x0, prediction="x0", timesteps=10, samples=30, seed=2)
    z = (bound.nats - other.nats) / torch.hypot(bound.error, other.error)
    assert (z.abs() < 4).all() and (z.abs() > 0).all()
    alone = variational_bound(model, COSINE, x0[3:], prediction="x0", timesteps=10, samples=30, seed=1, first=3)
    torch.testing.assert_close(alone.terms, bound.terms[:, 3:], rtol=1e-9, atol=1e-9)
    assert bound.timesteps == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    single = variational_bound(model, COSINE, x0, prediction="x0", timesteps=10)
    assert single.error.isnan().all() and single.nats.isfinite().all()
    assert variational_bound(model, COSINE, x0[:0], prediction="x0").terms.shape == (1001, 0)


@pytest.mark.parametrize(("schedule", "prediction"), [(COSINE, "v"), (COSINE, "edm"), (FLOW, "flow"), (EDM, "edm")])
def test_the_bound_is_the_same_for_every_way_of_saying_x0(schedule, prediction):
    x0 = POINTS.double()
    wanted = variational_bound(IdealDenoiser(POINTS, schedule), schedule, x0, prediction="x0", timesteps=20)
    model = IdealDenoiser(POINTS, schedule, prediction, labels=torch.tensor([0, 0, 1]))
    found = variational_bound(model, schedule, x0, prediction=prediction, timesteps=20, labels=torch.full((3,), 2))
    torch.testing.assert_close(found.terms, wanted.terms, rtol=1e-5, atol=1e-6)


def test_a_decoder_far_off_is_finite():
    """Where the network is wrong by 2 at a deviation of 0.006, ln P is about -50,000, not ln 0."""
    x0 = torch.tensor([-0.2, 0.2, 1.0, -1.0]).reshape(1, 4, 1, 1)
    off = torch.tensor([2.0, -2.0, -2.0, 2.0]).reshape(1, 4, 1, 1)
    found = variational_bound(
        Plain(lambda x, t: (x0 + off).repeat(len(x), 1, 1, 1)), COSINE, x0, prediction="x0", timesteps=3, variance="beta"
    )
    assert found.terms[0].item() == pytest.approx(4 * 2**2 / (2 * little(COSINE) ** 2), rel=0.01)


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
    found = log_likelihood(checkpoint.model, checkpoint.schedule, x0, prediction=checkpoint.prediction, labels=labels, steps=5)
    bits = found.bits_per_dim().reshape(3, 4)
    assert (bits[0] + 0.5 < bits[1]).all() and (bits[1] < bits[2]).all(), bits
    assert 1 < bits[0].mean() < 8, bits
    assert found.latents.dtype == torch.float32


def test_a_network_stays_in_the_mode_it_was_in():
    model = small_network().train()
    log_likelihood(model, LINEAR, torch.zeros(1, 3, 8, 8), steps=1)
    variational_bound(model, LINEAR, torch.zeros(1, 3, 8, 8), timesteps=2)
    assert model.training and not any(p.grad is not None for p in model.parameters())
    assert log_likelihood(model, LINEAR, torch.zeros(0, 3, 8, 8)).nats.shape == (0,)


BOTH = [
    ({"x0": [1.0]}, "x0 must be images as a tensor of floating-point numbers"),
    ({"x0": torch.zeros(2, 3, 1, 1, dtype=torch.uint8)}, "floating-point numbers"),
    ({"prediction": "noise"}, "prediction is 'noise'; a likelihood is known for epsilon, v, x0, flow, edm"),
    ({"prediction": "v", "schedule": Schedule.flow(10)}, "not for a schedule of 'flow'"),
    ({"schedule": Schedule.from_alphas_cumprod([0.9, 0.5, 0.0])}, "without signal epsilon says nothing of x_0"),
    ({"schedule": Schedule.from_alphas_cumprod([1.0, 0.5, 0.1])}, "needs a schedule with noise at its first timestep"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "3 labels for 2 images"),
]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *BOTH,
        ({"steps": 0}, "steps is 0 and probes is None; give whole numbers of at least 1"),
        ({"probes": 1.5}, "probes is 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    given = {"schedule": LINEAR, "x0": torch.zeros(2, 3, 1, 1), **change}
    with pytest.raises(ValueError, match=text):
        log_likelihood(Plain(lambda x, t: x), given.pop("schedule"), given.pop("x0"), **given)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *BOTH,
        ({"levels": 1}, "levels is 1; give a whole number of at least 2"),
        ({"samples": 0}, "samples is 0; give a whole number of at least 1"),
        ({"timesteps": 1.5}, "timesteps is 1.5; give a whole number of at least 2"),
        ({"timesteps": 1001}, "timesteps is 1001; this schedule has 1000"),
        ({"samples": 1 << 14}, "are more than the 15728640 that the noise stream has"),
        ({"variance": "learned"}, "variance is 'learned'; the bound is known for posterior, beta"),
        ({"schedule": Schedule.from_alphas_cumprod([0.9, 0.9, 0.5])}, "more noise at each timestep than at the one before"),
    ],
)
def test_a_bound_of_what_does_not_fit_is_refused(change, text):
    given = {"schedule": LINEAR, "x0": torch.zeros(2, 3, 1, 1), **change}
    with pytest.raises(ValueError, match=text):
        variational_bound(Plain(lambda x, t: x), given.pop("schedule"), given.pop("x0"), **given)


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the network answers \[2, 3, 2, 2\] to images \[2, 3, 1, 1\]"):
        log_likelihood(Plain(lambda x, t: x.repeat(1, 1, 2, 2)), LINEAR, torch.zeros(2, 3, 1, 1))

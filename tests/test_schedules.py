"""Schedules, against formulas written out here and against diffusers."""

import json
import math
from decimal import Decimal, getcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastdiff.schedules import Schedule

NAMED = [
    Schedule.linear(),
    Schedule.linear(7, 0.01, 0.3),
    Schedule.scaled_linear(500),
    Schedule.cosine(50),
    Schedule.cosine(50, offset=0.1),
    Schedule.sigmoid(40, tau=0.7),
    Schedule.from_alphas_cumprod([0.9, 0.5, 1 / 3]),
    Schedule.flow(50),
    Schedule.flow(20, shift=3.0),
    Schedule.edm(),
    Schedule.edm(18, 0.01, 30.0, 3.0),
]
ids = [str(s.config)[:60] for s in NAMED]


def running_product(betas: list[float]) -> list[float]:
    """prod (1 - beta), to 50 digits."""
    getcontext().prec = 50
    out, product = [], Decimal(1)
    for beta in betas:
        product *= 1 - Decimal(beta)
        out.append(float(product))
    return out


def close(actual, expected, relative):
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=0)


@pytest.mark.parametrize(("timesteps", "start", "end"), [(1000, 1e-4, 0.02), (7, 0.3, 0.01), (1, 0.1, 0.2), (2, 0.5, 0.5)])
def test_linear_is_its_formula(timesteps, start, end):
    betas = [start + (end - start) * t / max(timesteps - 1, 1) for t in range(timesteps)]
    schedule = Schedule.linear(timesteps, start, end)
    close(schedule.alphas_cumprod, running_product(betas), 1e-12)
    np.testing.assert_allclose(schedule.betas, betas, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("timesteps", "start", "end"), [(1000, 0.00085, 0.012), (5, 0.01, 0.4)])
def test_scaled_linear_is_its_formula(timesteps, start, end):
    a, b = math.sqrt(start), math.sqrt(end)
    betas = [(a + (b - a) * t / (timesteps - 1)) ** 2 for t in range(timesteps)]
    close(Schedule.scaled_linear(timesteps, start, end).alphas_cumprod, running_product(betas), 1e-12)


@pytest.mark.parametrize(("timesteps", "offset"), [(1000, 0.008), (20, 0.008), (20, 0.0), (20, 0.5)])
def test_cosine_is_the_papers_until_the_last_beta(timesteps, offset):
    bar = [math.cos((t / timesteps + offset) / (1 + offset) * math.pi / 2) ** 2 for t in range(timesteps + 1)]
    schedule = Schedule.cosine(timesteps, offset)
    # Equation 17, f(t) / f(0), for t = 1 .. T - 1; alpha_bar_T would be 0, and beta_T is held to 0.999.
    close(schedule.alphas_cumprod[:-1], np.array(bar[1:-1]) / bar[0], 1e-10)
    close(schedule.alphas_cumprod[-1], schedule.alphas_cumprod[-2] * 0.001, 1e-12)


def test_sigmoid_is_the_papers_until_the_last_beta():
    def rise(v):
        return 1 / (1 + math.exp(-v))

    for start, end, tau in ((-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-3.0, 1.0, 1.5)):
        low, high = rise(start / tau), rise(end / tau)
        bar = [(high - rise((start + t / 30 * (end - start)) / tau)) / (high - low) for t in range(1, 30)]
        schedule = Schedule.sigmoid(30, start, end, tau)
        close(schedule.alphas_cumprod[:-1], bar, 1e-11)
        close(schedule.alphas_cumprod[-1], bar[-1] * 0.001, 1e-11)


@pytest.mark.parametrize(
    ("schedule", "name", "betas"),
    [
        (Schedule.linear(), "linear", (1e-4, 0.02)),
        (Schedule.linear(500, 0.001, 0.05), "linear", (0.001, 0.05)),
        (Schedule.scaled_linear(), "scaled_linear", (0.00085, 0.012)),
        (Schedule.cosine(1000), "squaredcos_cap_v2", (1e-4, 0.02)),
        (Schedule.cosine(37), "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
    ids=["linear", "linear 500", "scaled_linear", "cosine", "cosine 37"],
)
def test_agrees_with_diffusers(schedule, name, betas):
    """Its tables are fp32, ours float64: beta is held to an fp32 rounding or two, alpha_bar to what the roundings of 1 - beta sum up to.

    Its "sigmoid" is another schedule (GeoDiff's: a sigmoid of beta, not of alpha_bar), so there is none to compare with.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(schedule.timesteps, *betas, beta_schedule=name)
    np.testing.assert_allclose(schedule.betas, theirs.betas.double().numpy(), rtol=3e-7, atol=3e-10)
    error = theirs.alphas_cumprod.double().numpy() / schedule.alphas_cumprod - 1
    assert (np.abs(error) < np.cumsum(2.0**-23 / (1 - schedule.betas))).all()


@pytest.mark.parametrize(("timesteps", "shift"), [(1000, 1.0), (1000, 3.0), (7, 0.5), (1, 2.0)])
def test_flow_is_its_formula(timesteps, shift):
    """x_t = (1 - s) x_0 + s z, and Esser et al. 2024, equation 23: s = shift u / (1 + (shift - 1) u), u = 1/T .. 1."""
    u = [(t + 1) / timesteps for t in range(timesteps)]
    schedule = Schedule.flow(timesteps, shift)
    close(schedule.sigma, [shift * v / (1 + (shift - 1) * v) for v in u], 1e-15)
    assert (schedule.alpha == 1 - schedule.sigma).all()
    assert (schedule.alpha[-1], schedule.sigma[-1]) == (0, 1)
    assert schedule.log_snr[-1] == -math.inf
    assert schedule.timesteps == timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_agrees_with_diffusers(shift):
    """Its table is fp32."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    close(Schedule.flow(1000, shift).sigma, theirs.sigmas.double().numpy()[::-1], 3e-7)


@pytest.mark.parametrize(("timesteps", "low", "high", "rho"), [(1000, 0.002, 80.0, 7.0), (18, 0.01, 30.0, 3.0), (2, 0.5, 1.0, 1.0)])
def test_edm_is_its_formula(timesteps, low, high, rho):
    """Karras et al. 2022, equation 5, whose i is T - 1 - t; noise is added and the signal kept."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    levels = [(a + i / (timesteps - 1) * (b - a)) ** rho for i in range(timesteps)]
    schedule = Schedule.edm(timesteps, low, high, rho)
    close(schedule.sigma, levels[::-1], 1e-13)
    assert (schedule.alpha == 1).all()
    assert schedule.timesteps == timesteps
    close(Schedule.edm(1, low, high, rho).sigma, [high], 1e-14)


def test_edm_agrees_with_diffusers():
    """Its levels are made in float64 and rounded to fp32."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EDMEulerScheduler()
    for steps in (2, 18, 1000):
        theirs.set_timesteps(steps)
        close(Schedule.edm(steps).sigma, theirs.sigmas[:-1].double().numpy()[::-1], 2e-7)


@pytest.mark.parametrize("schedule", NAMED, ids=ids)
def test_log_snr_is_the_logarithm_of_signal_over_noise(schedule):
    snr = [math.log(a / s) if a else -math.inf for a, s in zip(schedule.alpha, schedule.sigma, strict=True)]
    np.testing.assert_allclose(schedule.log_snr, snr, rtol=1e-12, atol=1e-14)
    assert (np.diff(schedule.log_snr) < 0).all()
    assert schedule.preserving == (schedule.name not in ("flow", "edm"))
    # That of the variance-preserving schedule of the same log-SNR: logit(alpha_bar) = 2 lambda.
    np.testing.assert_allclose(schedule.alphas_cumprod, [1 / (1 + math.exp(-2 * v)) if v > -math.inf else 0 for v in snr], rtol=1e-12)


def test_log_snr_is_infinite_without_noise():
    assert Schedule.from_alphas_cumprod([1.0, 0.5]).log_snr.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("schedule", NAMED, ids=ids)
def test_at_a_timesteps_log_snr_is_that_timestep(schedule):
    for t, log_snr in enumerate(schedule.log_snr):
        found, alpha, sigma = schedule.at(float(log_snr))
        np.testing.assert_allclose((found, alpha, sigma), (t, schedule.alpha[t], schedule.sigma[t]), rtol=1e-12, atol=1e-11)


def sigma_to_t(log_sigmas, log_sigma):
    """k-diffusion's DiscreteSchedule.sigma_to_t."""
    low = min(max(sum(v <= log_sigma for v in log_sigmas) - 1, 0), len(log_sigmas) - 2)
    w = (log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[low + 1])
    w = min(max(w, 0.0), 1.0)
    return (1 - w) * low + w * (low + 1)


@pytest.mark.parametrize(
    "schedule", [s for s in NAMED if s.name not in ("flow", "edm")], ids=[i for i in ids if "flow" not in i and "edm" not in i]
)
def test_between_timesteps_t_is_k_diffusions(schedule):
    """Linear in ln(sigma / alpha) between the neighbours, and no further than the ends; alpha and sigma are of that log-SNR wherever it is."""
    log_sigmas = (-schedule.log_snr).tolist()
    span = log_sigmas[-1] - log_sigmas[0]
    for log_sigma in np.linspace(log_sigmas[0] - 0.2 * span, log_sigmas[-1] + 0.2 * span, 41):
        t, alpha, sigma = schedule.at(float(-log_sigma))
        np.testing.assert_allclose(t, sigma_to_t(log_sigmas, log_sigma), rtol=0, atol=1e-10)
        np.testing.assert_allclose((alpha**2 + sigma**2, math.log(sigma / alpha)), (1, log_sigma), rtol=1e-12, atol=1e-13)


def test_between_timesteps_t_is_diffusers():
    """Its `_sigma_to_t` in NumPy takes float64."""
    diffusers = pytest.importorskip("diffusers")
    schedule = Schedule.linear()
    log_sigmas = -schedule.log_snr
    sigmas = np.exp(np.linspace(log_sigmas[0], log_sigmas[-1], 57))
    theirs = diffusers.EulerDiscreteScheduler()._sigma_to_t(sigmas, log_sigmas)
    np.testing.assert_allclose([schedule.at(-math.log(s))[0] for s in sigmas], theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_exact_between_timesteps(shift):
    schedule = Schedule.flow(10, shift)
    for t in np.linspace(0, 9, 37)[:-1]:
        u = (t + 1) / 10
        s = shift * u / (1 + (shift - 1) * u)
        np.testing.assert_allclose(schedule.at(math.log((1 - s) / s)), (t, 1 - s, s), rtol=1e-12, atol=1e-12)


def test_an_edm_schedule_is_exact_between_timesteps():
    """t of the formula, not of its values at the timesteps around it."""
    schedule = Schedule.edm(10, 0.01, 30.0, 3.0)
    a, b = 0.01 ** (1 / 3), 30.0 ** (1 / 3)
    for t in np.linspace(0, 9, 37):
        sigma = (a + t / 9 * (b - a)) ** 3
        np.testing.assert_allclose(schedule.at(-math.log(sigma)), (t, 1, sigma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", NAMED, ids=ids)
def test_noise_at_is_the_inverse_of_at(schedule):
    """At a timestep its own alpha and sigma, to the bit."""
    last = schedule.timesteps - 1
    for t in np.linspace(0, last, 4 * last + 1)[: -1 if schedule.name == "flow" else None]:
        alpha, sigma = schedule.noise_at(float(t))
        assert isinstance(alpha, float) and isinstance(sigma, float)
        np.testing.assert_allclose(schedule.at(math.log(alpha / sigma)), (t, alpha, sigma), rtol=1e-9, atol=1e-9)
        if t == int(t):
            assert (alpha, sigma) == (schedule.alpha[int(t)], schedule.sigma[int(t)])
    assert schedule.noise_at(last) == (schedule.alpha[-1], schedule.sigma[-1])


@pytest.mark.parametrize("schedule", NAMED, ids=ids)
def test_at_is_never_beyond_the_first_or_last_timestep(schedule):
    last = schedule.timesteps - 1
    low = schedule.log_snr[-1] if schedule.name != "flow" else -50.0
    for log_snr, t in ((schedule.log_snr[0] + 1, 0), (schedule.log_snr[0] + 20, 0), (low - 1, last), (low - 20, last)):
        np.testing.assert_allclose(schedule.at(float(log_snr))[0], t, rtol=0, atol=1e-9)
        assert 0 <= schedule.at(float(log_snr))[0] <= last


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ([1.0, 0.7, 0.7, 0.1], [1.0, 0.7, 0.7, 0.1]),
        (np.array([0.7, 0.1], dtype=np.float32), [float(np.float32(0.7)), float(np.float32(0.1))]),
        (torch.tensor([0.7, 0.1]), [float(np.float32(0.7)), float(np.float32(0.1))]),
        (torch.tensor([0.7, 0.1], dtype=torch.float64, requires_grad=True), [0.7, 0.1]),
    ],
    ids=["list", "numpy fp32", "tensor fp32", "tensor fp64"],
)
def test_from_alphas_cumprod_keeps_every_value(given, exact):
    schedule = Schedule.from_alphas_cumprod(given)
    assert schedule.alphas_cumprod.tolist() == exact
    assert schedule.alpha.tolist() == [math.sqrt(v) for v in exact]
    assert schedule.sigma.tolist() == [math.sqrt(1 - v) for v in exact]
    assert schedule.timesteps == len(exact)
    ratios = [1 - b / a for a, b in pairwise([1.0, *exact])]
    np.testing.assert_allclose(schedule.betas, ratios, rtol=0, atol=1e-15)


def test_a_schedule_holds_its_values_though_its_source_changes():
    source = np.array([0.9, 0.2])
    schedule = Schedule.from_alphas_cumprod(source)
    source[:] = 0.5
    assert schedule.alphas_cumprod.tolist() == [0.9, 0.2]
    for table in (schedule.alphas_cumprod, schedule.betas, schedule.alpha, schedule.sigma, schedule.log_snr, Schedule.flow(3).sigma):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.1


@pytest.mark.parametrize("schedule", NAMED, ids=ids)
def test_config_rebuilds_it_exactly_through_json(schedule):
    again = Schedule.from_config(json.loads(json.dumps(schedule.config)))
    assert again == schedule
    assert hash(again) == hash(schedule)
    for key in ("alphas_cumprod", "alpha", "sigma", "log_snr"):
        assert getattr(again, key).tobytes() == getattr(schedule, key).tobytes()


def test_config_fills_in_the_defaults():
    assert Schedule.from_config({"name": "cosine", "timesteps": 30}) == Schedule.cosine(30)
    assert Schedule.from_config({"name": "flow", "timesteps": 30}) == Schedule.flow(30, 1.0)
    assert Schedule.from_config({"name": "edm"}) == Schedule.edm(1000, 0.002, 80.0, 7.0)
    assert Schedule.flow(1000).config == {"name": "flow", "timesteps": 1000, "shift": 1.0}
    assert Schedule.edm(9).config == {"name": "edm", "timesteps": 9, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert Schedule.cosine(30) != Schedule.cosine(31)


fraction = st.floats(1e-6, 0.5)
any_schedule = st.one_of(
    st.builds(Schedule.linear, st.integers(1, 300), fraction, fraction),
    st.builds(Schedule.scaled_linear, st.integers(1, 300), fraction, fraction),
    st.builds(Schedule.cosine, st.integers(1, 3000), st.floats(0, 10)),
    st.builds(
        lambda n, a, span, tau: Schedule.sigmoid(n, a, a + span, tau),
        st.integers(1, 3000),
        *[st.floats(-3, 3)],
        *[st.floats(0.5, 6)] * 2,
    ),
    st.builds(lambda v: Schedule.from_alphas_cumprod(sorted(v, reverse=True)), st.lists(st.floats(1e-12, 1), min_size=1)),
)


@settings(max_examples=300, deadline=None)
@given(any_schedule)
def test_signal_and_noise_keep_the_variance_and_change_one_way(schedule):
    alpha, sigma = schedule.alpha, schedule.sigma
    assert alpha.dtype == sigma.dtype == np.float64
    assert alpha.shape == sigma.shape == schedule.betas.shape == (schedule.timesteps,)
    assert np.abs(alpha**2 + sigma**2 - 1).max() < 1e-15
    assert (np.diff(alpha) <= 0).all()
    assert (np.diff(sigma) >= 0).all()
    assert (alpha > 0).all()
    assert (alpha <= 1).all()
    assert (schedule.betas >= 0).all()
    assert (schedule.betas < 1).all()
    assert Schedule.from_config(schedule.config) == schedule


straight_or_edm = st.one_of(
    st.builds(Schedule.flow, st.integers(1, 3000), st.floats(0.01, 100)),
    st.builds(
        lambda n, low, ratio, rho: Schedule.edm(n, low, low * ratio, rho),
        st.integers(1, 3000),
        st.floats(1e-4, 1),
        st.floats(1.5, 1e5),
        st.floats(0.5, 12),
    ),
)


@settings(max_examples=200, deadline=None)
@given(straight_or_edm)
def test_a_flow_keeps_the_sum_and_an_edm_schedule_the_signal(schedule):
    alpha, sigma = schedule.alpha, schedule.sigma
    assert alpha.dtype == sigma.dtype == np.float64
    assert alpha.shape == sigma.shape == schedule.betas.shape == schedule.log_snr.shape == (schedule.timesteps,)
    assert (alpha + sigma == 1).all() if schedule.name == "flow" else (alpha == 1).all()
    assert (np.diff(sigma) > 0).all()
    assert (alpha >= 0).all()
    assert (sigma > 0).all()
    assert np.isfinite(sigma).all()
    assert not schedule.preserving
    assert Schedule.from_config(schedule.config) == schedule


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2))
@example([0.5, math.nextafter(0.5, 1)])
def test_any_rise_is_refused(values):
    assume(any(b > a for a, b in pairwise(values)))
    with pytest.raises(ValueError, match="never rise with t"):
        Schedule.from_alphas_cumprod(values)


HOLDS = r"alphas_cumprod must hold at least one value, lie in \(0, 1\], but the last may be 0, and never rise with t"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Schedule.linear(0), "timesteps is 0; a schedule needs a whole number of at least 1"),
        (lambda: Schedule.cosine(-3), "timesteps is -3; "),
        (lambda: Schedule.sigmoid(2.0), "timesteps is 2.0; "),
        (lambda: Schedule.scaled_linear(True), "timesteps is True; "),
        (lambda: Schedule.cosine("9"), "timesteps is '9'; "),
        (lambda: Schedule.linear(10, 0.0), "beta_start is 0.0; it must lie between 0 and 1"),
        (lambda: Schedule.linear(10, -0.1), "beta_start is -0.1; "),
        (lambda: Schedule.linear(10, 0.1, 1.0), "beta_end is 1.0; it must lie between 0 and 1"),
        (lambda: Schedule.scaled_linear(10, math.nan), "beta_start is nan; "),
        (lambda: Schedule.scaled_linear(10, 0.1, math.inf), "beta_end is inf; "),
        (lambda: Schedule.cosine(10, -0.01), "offset is -0.01; it must be at least 0"),
        (lambda: Schedule.cosine(10, math.nan), "offset is nan; "),
        (lambda: Schedule.sigmoid(10, tau=0.0), "a sigmoid schedule needs tau > 0 and end > start"),
        (lambda: Schedule.sigmoid(10, 3.0, 3.0), "a sigmoid schedule needs tau > 0 and end > start"),
        (lambda: Schedule.sigmoid(10, math.nan), "a sigmoid schedule needs tau > 0 and end > start"),
        (lambda: Schedule.flow(0), "timesteps is 0; "),
        (lambda: Schedule.edm(2.0), "timesteps is 2.0; "),
        (lambda: Schedule.flow(10, 0.0), "shift is 0.0; it must be positive"),
        (lambda: Schedule.flow(10, -1.0), "shift is -1.0; "),
        (lambda: Schedule.flow(10, math.nan), "shift is nan; "),
        (lambda: Schedule.flow(10, math.inf), "shift is inf; "),
        (lambda: Schedule.edm(10, 1.0, 1.0), "an edm schedule needs 0 < sigma_min < sigma_max, and rho > 0"),
        (lambda: Schedule.edm(10, 0.0), "an edm schedule needs"),
        (lambda: Schedule.edm(10, 0.1, math.inf), "an edm schedule needs"),
        (lambda: Schedule.edm(10, math.nan), "an edm schedule needs"),
        (lambda: Schedule.edm(10, rho=0.0), "an edm schedule needs"),
        (lambda: Schedule.edm(10, rho=math.inf), "an edm schedule needs"),
        (lambda: Schedule.edm(10, rho=math.nan), "an edm schedule needs"),
        (lambda: Schedule.linear(2000, 0.5, 0.9), HOLDS),  # alpha_bar underflows to 0
        (lambda: Schedule.from_alphas_cumprod([]), HOLDS),
        (lambda: Schedule.from_alphas_cumprod([0.5, 0.6]), HOLDS),
        (lambda: Schedule.from_alphas_cumprod([0.5, math.nan]), HOLDS),
        (lambda: Schedule.from_alphas_cumprod([math.inf, 0.5]), HOLDS),
        (lambda: Schedule.from_alphas_cumprod([1.1, 0.5]), HOLDS),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5, 0.0, 0.0])), HOLDS),
        (lambda: Schedule.from_alphas_cumprod([0.5, -0.1]), HOLDS),
        (
            lambda: Schedule.from_alphas_cumprod(np.full((2, 3), 0.5)),
            r"alphas_cumprod has shape \[2, 3\]; give one value per timestep",
        ),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor(0.5)), r"alphas_cumprod has shape \[\]; give one value per timestep"),
        (
            lambda: Schedule.from_config({"name": "quadratic"}),
            "unknown schedule 'quadratic'; known: linear, scaled_linear, cosine, sigmoid, from_alphas_cumprod, flow, edm",
        ),
        (lambda: Schedule.from_config({"name": "from_config"}), "unknown schedule 'from_config'; "),
        (lambda: Schedule.from_config({}), "unknown schedule None; "),
        (lambda: Schedule.from_config({"name": "linear", "gamma": 2}), "schedule 'linear': .*gamma"),
        (lambda: Schedule.from_config({"name": "flow", "sigma_min": 2}), "schedule 'flow': .*sigma_min"),
        (lambda: Schedule.from_config({"name": "edm", "rho": "x"}), "schedule 'edm': "),
        (lambda: Schedule.from_config({"name": "from_alphas_cumprod"}), "schedule 'from_alphas_cumprod': .*alphas_cumprod"),
        (lambda: Schedule.from_config({"name": "linear", "beta_start": "x"}), "schedule 'linear': "),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.cosine(10, math.inf),
        lambda: Schedule.sigmoid(10, -math.inf),
        lambda: Schedule.sigmoid(10, end=math.inf),
        lambda: Schedule.sigmoid(10, tau=math.inf),
        lambda: Schedule.sigmoid(10, -1000.0, 1000.0),
        lambda: Schedule.sigmoid(10, tau=0.01),
    ],
    ids=["offset inf", "start -inf", "end inf", "tau inf", "range wide", "tau small"],
)
def test_what_overflows_is_refused_too_without_a_warning(make):
    """numpy's RuntimeWarning would be an error here."""
    with pytest.raises(ValueError, match=r"must|needs"):
        make()

"""Solver tables, carried out in float64 by the interpreter below, against diffusers, the papers' formulas and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiff import solvers
from fastdiff.schedules import Schedule
from fastdiff.solvers import spaced_timesteps, table

LINEAR = Schedule.linear(1000)
DIFFUSERS_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
# Every solver with every setting that changes its rows.
ALL = [
    ("ddpm", {}),
    ("ddpm", {"variance": "beta"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5, "clipped_epsilon": True}),
    ("dpmpp_2m", {}),
]
ALL_IDS = [" ".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in ALL]


def step(row, x, m, before, z):
    """One row of a table, as the design states it: (x, x0)."""
    px, pm, clip, a, b, c, d, s, c_next = row
    assert c_next == 1
    x0 = np.clip(px * x + pm * m, -clip, clip)
    return a * x + b * x0 + (c * before if c else 0) + d * m + (s * z if s else 0), x0


def run(rows, predict, x, noise):
    """A whole table. predict(x, t) is the network, noise(row) its z."""
    before = np.full_like(x, np.nan)
    for i, (row, t) in enumerate(zip(rows.rows, rows.timesteps, strict=True)):
        x, before = step(row, x, predict(x, t), before, noise(i))
    return x


def said(prediction, x, x0, alpha, sigma):
    """What a network of this prediction says when it believes in x0."""
    epsilon = (x - alpha * x0) / sigma
    return {"epsilon": epsilon, "v": alpha * epsilon - sigma * x0, "x0": x0}[prediction]


# Timesteps


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1200).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))), st.sampled_from(solvers.SPACINGS))
def test_spacing_is_its_formula_to_the_nearest_timestep(size, spacing):
    """Lin et al. 2023, table 2, in whole numbers. An exact half may go either way, as floating point has it."""
    timesteps, steps = size
    t = spaced_timesteps(timesteps, steps, spacing)
    assert t.dtype == np.int64
    assert t.shape == (steps,)
    back = np.arange(steps)[::-1]  # steps - 1 .. 0
    if spacing == "leading":
        assert (t == back * (timesteps // steps)).all()
    elif spacing == "trailing":
        assert (2 * np.abs((t + 1) * steps - timesteps * (back + 1)) <= steps).all()
    else:
        assert (2 * np.abs(t * (steps - 1) - (timesteps - 1) * back) <= max(steps - 1, 0)).all()


@pytest.mark.parametrize("timesteps", [1, 2, 3, 50, 97, 500])
def test_timesteps_fall_and_stay_in_range_for_every_number_of_steps(timesteps):
    for steps in range(1, timesteps + 1):
        ends = {}
        for spacing in solvers.SPACINGS:
            t = spaced_timesteps(timesteps, steps, spacing)
            assert (np.diff(t) < 0).all(), (steps, spacing)
            assert 0 <= t[-1] <= t[0] < timesteps, (steps, spacing)
            ends[spacing] = t[0], t[-1]
        assert ends["trailing"][0] == timesteps - 1
        assert ends["leading"][1] == 0
        if steps > 1:
            assert ends["linspace"] == (timesteps - 1, 0)
    for spacing in solvers.SPACINGS:
        assert (spaced_timesteps(timesteps, timesteps, spacing) == np.arange(timesteps)[::-1]).all()


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_timesteps_are_diffusers(spacing):
    """For trailing spacing only where steps divide T: its arange by a fraction drifts, to steps + 1 values ending at -1 (50, 29), else."""
    diffusers = pytest.importorskip("diffusers")
    theirs = {t: diffusers.DDIMScheduler(t, timestep_spacing=spacing) for t in (50, 97, 1000)}
    for timesteps, scheduler in theirs.items():
        for steps in [*range(1, 51), timesteps]:
            if spacing != "trailing" or timesteps % steps == 0:
                scheduler.set_timesteps(steps)
                assert spaced_timesteps(timesteps, steps, spacing).tolist() == scheduler.timesteps.tolist(), (timesteps, steps)


# The rows against diffusers


def float64(scheduler, schedule):
    """diffusers' own arithmetic, on float64 tables."""
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    return scheduler


def random_like_a_run(rows, seed=0):
    """x and m of two rows' worth of trouble: x0 far outside the clip and well inside it."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 3, 5, 5)), (rng.standard_normal((2, 3, 5, 5)) for _ in rows.rows), rng


def agree(ours, theirs, relative=2e-12):
    """float64 on both sides; 1 - alpha_bar_t / alpha_bar_s loses up to four digits at small t, in both."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("clip", [1.0, 0.3, None])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_rows_are_diffusers(variance, theirs, prediction, clip, spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        1000,
        variance_type=theirs,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing=spacing,
    )
    float64(scheduler, LINEAR)
    for steps in (1, 10, 40):
        rows = table("ddpm", LINEAR, steps=steps, prediction=prediction, clip=clip, spacing=spacing, variance=variance)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == rows.timesteps.tolist()
        x, models, _ = random_like_a_run(rows)
        for i, (row, m) in enumerate(zip(rows.rows, models, strict=True)):
            t = int(rows.timesteps[i])
            generator = torch.Generator().manual_seed(i)
            out = scheduler.step(torch.from_numpy(m), t, torch.from_numpy(x), generator=generator)
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).numpy()
            ours, x0 = step(row, x, m, np.nan, z)
            expected = out.prev_sample.numpy()
            if i == steps - 1 and t > 0:
                # A fault of diffusers: where the last timestep is not 0 it adds noise to the final image, of variance beta or 1e-20.
                bar = LINEAR.alphas_cumprod[t]
                expected = expected - z * (np.sqrt(1 - bar) if variance == "beta" else 1e-10)
            agree(ours, expected)
            agree(x0, out.pred_original_sample.numpy())
            x = ours


@pytest.mark.parametrize(("spacing", "counts"), [("leading", (1, 10, 30, 40)), ("trailing", (1, 10, 40))])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("clipped_epsilon", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
def test_ddim_rows_are_diffusers(prediction, eta, clipped_epsilon, clip, spacing, counts):
    """Where its previous timestep, t - T // n, is the next of its own: not for linspace, nor for trailing where n does not divide T."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000, prediction_type=DIFFUSERS_PREDICTION[prediction], clip_sample=clip is not None, timestep_spacing=spacing
    )
    float64(scheduler, LINEAR)
    for steps in counts:
        options = {"eta": eta, "clipped_epsilon": clipped_epsilon}
        rows = table("ddim", LINEAR, steps=steps, prediction=prediction, clip=clip, spacing=spacing, **options)
        scheduler.set_timesteps(steps)
        x, models, rng = random_like_a_run(rows)
        for row, t, m in zip(rows.rows, rows.timesteps, models, strict=True):
            z = rng.standard_normal(x.shape)
            out = scheduler.step(
                torch.from_numpy(m),
                int(t),
                torch.from_numpy(x),
                eta=eta,
                use_clipped_model_output=clipped_epsilon,
                variance_noise=torch.from_numpy(z) if eta else None,
            )
            ours, x0 = step(row, x, m, np.nan, z)
            agree(ours, out.prev_sample.numpy())
            agree(x0, out.pred_original_sample.numpy())
            x = ours


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 30), ("trailing", 7)])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize(("eta", "clipped_epsilon"), [(0.0, False), (0.7, False), (0.7, True)])
def test_ddim_rows_are_the_papers_where_diffusers_is_not(eta, clipped_epsilon, prediction, spacing, steps):
    """Song et al. 2021, equations 12 and 16, between timesteps that diffusers' DDIM does not step between."""
    options = {"eta": eta, "clipped_epsilon": clipped_epsilon}
    rows = table("ddim", LINEAR, steps=steps, prediction=prediction, clip=0.8, spacing=spacing, **options)
    bars = [LINEAR.alphas_cumprod[t] for t in rows.timesteps] + [1.0]
    x, models, rng = random_like_a_run(rows)
    for row, m, bar, after in zip(rows.rows, models, bars, bars[1:], strict=False):
        z = rng.standard_normal(x.shape)
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        x0, epsilon = {
            "epsilon": ((x - sigma * m) / alpha, m),
            "v": (alpha * x - sigma * m, sigma * x + alpha * m),
            "x0": (m, (x - alpha * m) / sigma),
        }[prediction]
        x0 = np.clip(x0, -0.8, 0.8)
        if clipped_epsilon:
            epsilon = (x - alpha * x0) / sigma
        noise = eta * ((1 - after) / (1 - bar) * (1 - bar / after)) ** 0.5
        expected = after**0.5 * x0 + (1 - after - noise**2) ** 0.5 * epsilon + noise * z
        ours, _ = step(row, x, m, np.nan, z)
        agree(ours, expected)
        x = ours


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # diffusers' set_timesteps
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize("spacing", solvers.SPACINGS)
def test_dpmpp_2m_rows_are_diffusers(spacing, prediction, steps):
    """Its `step` casts to fp32, so its update formulas are called in float64, in the order of its `step`; that, in fp32, settles the order."""
    diffusers = pytest.importorskip("diffusers")
    rows = table("dpmpp_2m", LINEAR, steps=steps, prediction=prediction, clip=None, spacing=spacing)
    exact, whole = (
        diffusers.DPMSolverMultistepScheduler(
            1000,
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type=DIFFUSERS_PREDICTION[prediction],
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            final_sigmas_type="zero",
        )
        for _ in range(2)
    )
    for scheduler in (exact, whole):
        scheduler.set_timesteps(timesteps=rows.timesteps.tolist())
    bar = LINEAR.alphas_cumprod[rows.timesteps]
    exact.sigmas = torch.from_numpy(np.append(((1 - bar) / bar) ** 0.5, 0.0))
    x, models, _ = random_like_a_run(rows)
    x_whole, before, history = torch.from_numpy(x), np.nan, []
    for i, (row, m) in enumerate(zip(rows.rows, models, strict=True)):
        exact._step_index = i
        history.append(exact.convert_model_output(torch.from_numpy(m), sample=torch.from_numpy(x)))
        if i in (0, steps - 1):
            expected = exact.dpm_solver_first_order_update(history[-1], sample=torch.from_numpy(x))
        else:
            expected = exact.multistep_dpm_solver_second_order_update(history[-2:], sample=torch.from_numpy(x))
        x, before = step(row, x, m, before, None)
        agree(before, history[-1].numpy())
        agree(x, expected.numpy())
        x_whole = whole.step(torch.from_numpy(m), int(rows.timesteps[i]), x_whole).prev_sample
        agree(x, x_whole.numpy(), 2e-4)  # fp32 tables and sums, over the whole run


# Closed forms

MU, S = 0.4, 0.25  # the data is N(mu, s^2), of every pixel


def gaussian(schedule, prediction="epsilon"):
    """The exact network for that data: E[x0 | x] = mu + k (x - alpha mu), k = s^2 alpha / (alpha^2 s^2 + sigma^2)."""

    def predict(x, t):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        x0 = MU + S**2 * alpha / (alpha**2 * S**2 + sigma**2) * (x - alpha * MU)
        return said(prediction, x, x0, alpha, sigma)

    return predict


def moments(rows, predict):
    """Mean and variance of the result for x_T ~ N(0, 1), exactly: the response to each normal by itself, since all is affine."""
    n = len(rows)
    unit = np.eye(n + 2)  # 0: nothing; 1: x_T; 2 + i: the noise of row i
    out = run(rows, predict, unit[1], lambda i: unit[2 + i])
    return out[0], np.sum((out[1:] - out[0]) ** 2)


def recursion(solver, schedule, t, eta=0.0, variance="posterior", clipped_epsilon=False):
    """Mean and variance by the papers' formulas. D = x - alpha mu goes to g D (+ noise); a 2M row also takes the D before."""
    bar = np.append(schedule.alphas_cumprod[t], 1.0)
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    k = S**2 * alpha / (alpha**2 * S**2 + sigma**2)
    mean, gain = -alpha[0] * MU, np.zeros(len(t) + 1)  # of D; gain: by each normal so far
    gain[0] = 1.0
    old_mean, old_gain = 0.0, 0.0 * gain
    for i in range(len(t)):
        noise, c = 0.0, 0.0
        if solver == "ddpm":
            beta = 1 - bar[i] / bar[i + 1]
            g = (alpha[i + 1] * beta * k[i] + np.sqrt(1 - beta) * (1 - bar[i + 1])) / (1 - bar[i])
            noise = beta * ((1 - bar[i + 1]) / (1 - bar[i]) if variance == "posterior" else i < len(t) - 1)
        elif solver == "ddim":
            noise = eta**2 * (1 - bar[i + 1]) / (1 - bar[i]) * (1 - bar[i] / bar[i + 1])
            g = alpha[i + 1] * k[i] + np.sqrt(1 - bar[i + 1] - noise) * (1 - alpha[i] * k[i]) / sigma[i]
        else:  # Lu et al. 2022, algorithm 2: D_i = (1 + 1 / 2r) x0_i - 1 / 2r x0_{i-1}
            whole, half = alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i], 0.0
            if 0 < i < len(t) - 1:
                lam = np.log(alpha[i - 1 : i + 2] / sigma[i - 1 : i + 2])
                half = (lam[2] - lam[1]) / (lam[1] - lam[0]) / 2
            g, c = sigma[i + 1] / sigma[i] + whole * (1 + half) * k[i], -whole * half * k[i - 1]
        (mean, old_mean), (gain, old_gain) = (g * mean + c * old_mean, mean), (g * gain + c * old_gain, gain)
        gain[i + 1] = np.sqrt(noise)
    return MU + mean, np.sum(gain**2)


@pytest.mark.parametrize(("solver", "options"), ALL, ids=ALL_IDS)
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
def test_gaussian_data_follows_the_exact_recursion_and_arrives(prediction, solver, options):
    errors = []
    for steps in (10, 50, 250, 1000):
        rows = table(solver, LINEAR, steps=steps, prediction=prediction, clip=None, **options)
        mean, variance = moments(rows, gaussian(LINEAR, prediction))
        np.testing.assert_allclose((mean, variance), recursion(solver, LINEAR, rows.timesteps, **options), rtol=1e-9)
        errors.append((abs(mean - MU), abs(np.sqrt(variance) - S)))
    # What is left at all 1,000 steps: x_T starts at N(0, 1) rather than N(alpha_T mu, ...), and the steps of the schedule itself.
    assert max(errors[-1]) < 0.005, errors
    assert errors[0][1] > errors[1][1] > errors[2][1] > errors[3][1], errors


def even_steps_in_log_snr():
    """Half log-SNR from -6 to 8 in 1024 equal steps: linspace of 2^k + 1 steps lands on it, and the last jump, to sigma 0, weighs 1e-6."""
    return Schedule.from_alphas_cumprod(1 / (1 + np.exp(-2 * np.linspace(8, -6, 1025))))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
def test_deterministic_solvers_converge_to_the_probability_flow_at_their_order(prediction, solver, order):
    schedule = even_steps_in_log_snr()
    x = np.linspace(-2, 2, 9)
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    exact = MU + S * (x - alpha * MU) / np.sqrt(alpha**2 * S**2 + sigma**2)
    errors = []
    for steps in (17, 33, 65, 129):
        rows = table(solver, schedule, steps=steps, prediction=prediction, clip=None, spacing="linspace")
        errors.append(np.abs(run(rows, gaussian(schedule, prediction), x, lambda _: 0.0) - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders[-2:] - order).max() < 0.2, (errors, orders)
    assert errors[-1] < {1: 0.02, 2: 0.002}[order], errors


def finite_list(schedule, images, prediction):
    """The exact network for data that is one of `images` [K, P]: a softmax over the list."""

    def predict(x, t):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        score = -((x[:, None] - alpha * images) ** 2).sum(2) / (2 * sigma**2)
        weight = np.exp(score - score.max(1, keepdims=True))
        x0 = weight / weight.sum(1, keepdims=True) @ images
        return said(prediction, x, x0, alpha, sigma)

    return predict


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("prediction", solvers.PREDICTIONS)
@pytest.mark.parametrize(("solver", "options"), ALL, ids=ALL_IDS)
def test_the_exact_network_of_a_list_returns_its_images(solver, options, prediction, clip):
    rng = np.random.default_rng(1)
    images = np.sign(rng.standard_normal((5, 3 * 8 * 8))) * rng.uniform(0.3, 1, (5, 1))
    for schedule, spacing in ((LINEAR, "trailing"), (LINEAR, "leading"), (Schedule.cosine(300), "linspace")):
        if (spacing, clip) == ("linspace", None):
            continue  # the cosine schedule starts at alpha 2e-5, where an unclamped x0 has lost the digits for 1e-2
        rows = table(solver, schedule, steps=25, prediction=prediction, clip=clip, spacing=spacing, **options)
        out = run(
            rows,
            finite_list(schedule, images, prediction),
            rng.standard_normal((60, 192)),
            lambda _: rng.standard_normal((60, 192)),
        )
        distance = np.abs(out[:, None] - images).max(2)
        assert distance.min(1).max() < 1e-2
        assert len(set(distance.argmin(1))) == 5


# The table itself


@pytest.mark.parametrize(("solver", "options"), ALL, ids=ALL_IDS)
def test_a_table_of_every_size_is_finite_starts_alone_and_ends_without_noise(solver, options):
    for schedule in (LINEAR, Schedule.cosine(20), Schedule.sigmoid(20), Schedule.scaled_linear(20)):
        for steps in (1, 2, 3, 19, 20):
            for spacing in solvers.SPACINGS:
                rows = table(solver, schedule, steps=steps, clip=None, spacing=spacing, **options)
                assert rows.solver == solver
                assert rows.start == 1.0
                assert len(rows) == len(rows.timesteps) == steps
                assert rows.rows.shape == (steps, 9)
                assert rows.rows.dtype == np.float64
                assert (rows.rows[:, 2] == np.inf).all()
                assert np.isfinite(np.delete(rows.rows, 2, axis=1)).all()
                assert rows.rows[0, 5] == 0
                assert rows.rows[-1, 7] == 0
                assert (rows.rows[:, 7] >= 0).all()


def test_the_device_gets_the_rows_rounded_once():
    rows = table("ddim", LINEAR, steps=7, clip=0.9, eta=0.3)
    coefficients, timesteps = rows.tensors("cpu")
    assert coefficients.dtype == torch.float32
    assert timesteps.dtype == torch.int64
    assert coefficients.numpy().tobytes() == rows.rows.astype(np.float32).tobytes()
    assert timesteps.tolist() == rows.timesteps.tolist()


def test_names_are_the_solvers_that_table_takes():
    assert solvers.names() == ["ddpm", "ddim", "dpmpp_2m"]
    for name in solvers.names():
        assert table(name, LINEAR).solver == name


@pytest.mark.parametrize(("solver", "options"), ALL, ids=ALL_IDS)
def test_a_schedule_that_stands_still_for_a_step_is_no_trouble(solver, options):
    """`Schedule` allows equal neighbours; between them there is nothing to do, so the rows stay finite and the moments the same."""
    still = Schedule.from_alphas_cumprod([0.95, 0.7, 0.7, 0.4, 0.1, 0.001])
    moving = Schedule.from_alphas_cumprod([0.95, 0.7, 0.4, 0.1, 0.001])
    rows = table(solver, still, steps=6, clip=None, **options)
    assert np.isfinite(np.delete(rows.rows, 2, axis=1)).all()
    if solver != "dpmpp_2m":  # it has the history of a step of no length, so its next row may be first order
        expected = moments(table(solver, moving, steps=5, clip=None, **options), gaussian(moving))
        np.testing.assert_allclose(moments(rows, gaussian(still)), expected, rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(1e-6, 1, exclude_max=True), min_size=1, max_size=8), st.floats(0, 1))
@example([1 - 1e-15, 0.5], 1.0)
def test_any_eta_up_to_1_fits_any_schedule(bars, eta):
    """Song et al. 2021, equation 16: at eta 1 the variance is DDPM's, which is at most sigma_next^2."""
    schedule = Schedule.from_alphas_cumprod(sorted(bars, reverse=True))
    rows = table("ddim", schedule, steps=len(bars), eta=eta)
    assert np.isfinite(rows.rows).all()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'; known: ddpm, ddim, dpmpp_2m"),
        ({"prediction": "noise"}, "unknown prediction 'noise'; known: epsilon, v, x0"),
        ({"spacing": "karras"}, "unknown spacing 'karras'; known: leading, trailing, linspace"),
        ({"solver": "ddpm", "variance": "learned"}, "unknown variance 'learned'; known: posterior, beta"),
        ({"steps": 0}, "steps is 0; this schedule has 1000 timesteps, so give a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps is 1001; this schedule has 1000 timesteps"),
        ({"steps": -1}, "steps is -1; "),
        ({"steps": True}, "steps is True; "),
        ({"steps": 5.0}, "steps is 5.0; "),
        ({"clip": 0}, "clip is 0; give a positive number, or None for no clamping of x0"),
        ({"clip": -1.0}, "clip is -1.0; "),
        ({"clip": float("nan")}, "clip is nan; "),
        ({"eta": -0.1}, "eta is -0.1; it must be finite and at least 0"),
        ({"eta": float("nan")}, "eta is nan; it must be finite and at least 0"),
        ({"eta": 10}, "eta is 10; at this number of steps that asks for more noise than a row has"),
        ({"eta": "1"}, "solver 'ddim' does not take eta with these values"),
        ({"solver": "ddpm", "eta": 1.0}, "solver 'ddpm' does not take eta"),
        ({"solver": "dpmpp_2m", "variance": "beta"}, "solver 'dpmpp_2m' does not take variance"),
        ({"churn": 1}, "solver 'ddim' does not take churn"),
        ({"eta": float("inf")}, "eta is inf; "),
        ({"eta": float("inf"), "steps": 1}, "eta is inf; "),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(arguments, text):
    with pytest.raises(ValueError, match=text):
        table(**{"solver": "ddim", "schedule": LINEAR, **arguments})


@pytest.mark.parametrize("solver", solvers.names())
def test_a_timestep_without_noise_is_refused_only_where_it_is_used(solver):
    schedule = Schedule.from_alphas_cumprod([1.0, 0.8, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"timesteps without noise \(alpha_bar = 1\)"):
        table(solver, schedule, steps=4)
    assert table(solver, schedule, steps=2, spacing="trailing").timesteps.tolist() == [3, 1]


def test_default_spacing_is_the_solvers_own():
    schedule = Schedule.cosine(500)
    for solver, first_and_last in (("ddpm", [499, 49]), ("ddim", [499, 49]), ("dpmpp_2m", [499, 0])):
        assert solvers.table(solver, schedule, steps=10).timesteps[[0, -1]].tolist() == first_and_last
        assert solvers.table(solver, schedule, steps=1).timesteps.tolist() == [499]

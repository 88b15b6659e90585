"""Solver tables: their timesteps and levels, what they make of data that is known exactly, and what is refused. See test_solver_oracles for rows."""

import math
import re
from bisect import bisect_right
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import ALL, MU, STRAIGHT, TWO_STAGE, S, each, finite_list, gaussian, gaussian_flow, network, walk

from fastdiff import solvers
from fastdiff.reference import COLUMNS, SLOTS
from fastdiff.schedules import Schedule
from fastdiff.solvers import spaced_timesteps, table

LINEAR, FLOW, EDM = Schedule.linear(1000), Schedule.flow(1000), Schedule.edm(1000)
WHOLE = ("leading", "trailing", "linspace")
# What a network may predict on each schedule, the first of each being the usual.
PREDICTIONS = {"linear": ("epsilon", "v", "x0", "flow", "edm"), "flow": ("flow", "x0"), "edm": ("edm", "epsilon", "x0", "flow")}
# Solvers whose rows know of no other row.
SIMPLE = ("ddpm", "ddim", "euler", "euler_ancestral")


def deterministic(solver, options):
    """Whether it adds no noise."""
    if "eta" in options or "churn" in options:
        return not (options.get("eta") or options.get("churn"))
    return solver != "ddpm" and "ancestral" not in solver and "sde" not in solver


def same(ours, other):
    """The same rows at the same levels, bit for bit."""
    return all(np.array_equal(getattr(ours, key), getattr(other, key)) for key in ("rows", "levels", "timesteps", "start", "scale"))


# Timesteps and levels


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1200).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))), st.sampled_from(WHOLE))
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
        for spacing in WHOLE:
            t = spaced_timesteps(timesteps, steps, spacing)
            assert (np.diff(t) < 0).all(), (steps, spacing)
            assert 0 <= t[-1] <= t[0] < timesteps, (steps, spacing)
            ends[spacing] = t[0], t[-1]
        assert ends["trailing"][0] == timesteps - 1
        assert ends["leading"][1] == 0
        if steps > 1:
            assert ends["linspace"] == (timesteps - 1, 0)
    for spacing in WHOLE:
        assert (spaced_timesteps(timesteps, timesteps, spacing) == np.arange(timesteps)[::-1]).all()


@pytest.mark.parametrize("spacing", WHOLE)
def test_timesteps_are_diffusers(spacing):
    """For trailing spacing only where steps divide T: its arange by a fraction drifts, to steps + 1 values ending at -1 (50, 29), else."""
    diffusers = pytest.importorskip("diffusers")
    theirs = {t: diffusers.DDIMScheduler(t, timestep_spacing=spacing) for t in (50, 97, 1000)}
    for timesteps, scheduler in theirs.items():
        for steps in [*range(1, 51), timesteps]:
            if spacing != "trailing" or timesteps % steps == 0:
                scheduler.set_timesteps(steps)
                assert spaced_timesteps(timesteps, steps, spacing).tolist() == scheduler.timesteps.tolist(), (timesteps, steps)


@pytest.mark.parametrize("schedule", [LINEAR, Schedule.cosine(50), EDM, Schedule.edm(20, 0.01, 30.0, 3.0)], ids=lambda s: s.name)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_logsnr_and_karras_levels_are_even_in_what_they_say(steps, schedule):
    """Lu et al. 2022, section 3.4, and Karras et al. 2022, equation 5: rho is 7, but an edm schedule's own. The ends are timesteps exactly."""
    rho = dict(schedule.params).get("rho", 7.0)
    for spacing, even in (("logsnr", np.log), ("karras", lambda k: k ** (1 / rho))):
        rows = table("euler", schedule, steps=steps, prediction="x0", spacing=spacing)
        alpha, sigma = rows.levels[:-1].T
        k = sigma / alpha
        first, last = even(schedule.sigma[[-1, 0]] / schedule.alpha[[-1, 0]])
        np.testing.assert_allclose(even(k), first + (last - first) * np.arange(steps) / max(steps - 1, 1), rtol=0, atol=1e-11)
        assert (alpha[0], sigma[0]) == (schedule.alpha[-1], schedule.sigma[-1])
        if steps > 1:
            assert (alpha[-1], sigma[-1]) == (schedule.alpha[0], schedule.sigma[0])
        np.testing.assert_allclose(alpha**2 + (0 if schedule.name == "edm" else sigma**2), 1, rtol=1e-15)
        if schedule.name != "edm":
            assert rows.timesteps[0] == schedule.timesteps - 1


@pytest.mark.parametrize("spacing", [*solvers.SPACINGS, None])
@pytest.mark.parametrize("schedule", [Schedule.linear(1), Schedule.cosine(1), Schedule.edm(1)], ids=lambda s: s.name)
def test_the_only_timestep_of_a_schedule_is_the_only_level(schedule, spacing):
    rows = table("dpmpp_2m_sde", schedule, steps=1, prediction="x0", spacing=spacing)
    assert rows.levels.tolist() == [[schedule.alpha[0], schedule.sigma[0]], [1, 0]]
    for way in ({"denoise": False}, {"invert": True}):
        with pytest.raises(ValueError, match="denois"):
            table("dpmpp_2m_sde", schedule, steps=1, prediction="x0", spacing=spacing, **way)


def level_of(schedule, t):
    """(alpha, sigma) of a timestep, whole or not: a flow's formula; else ln sigma / alpha runs straight between the timesteps, k-diffusion's
    t_to_sigma, the inverse of its sigma_to_t."""
    if schedule.name == "flow":
        u = (t + 1) / schedule.timesteps
        shift = dict(schedule.params)["shift"]
        s = shift * u / (1 + (shift - 1) * u)
        return 1 - s, s
    low = min(bisect_right(range(schedule.timesteps), t) - 1, schedule.timesteps - 2)
    here, there = np.log(schedule.sigma[low : low + 2] / schedule.alpha[low : low + 2])
    k = math.exp((1 - (t - low)) * here + (t - low) * there)
    return (1 / math.sqrt(1 + k**2), k / math.sqrt(1 + k**2)) if schedule.preserving else (1.0, k)


@pytest.mark.parametrize(
    ("solver", "options", "schedule"), each((LINEAR,), (Schedule.cosine(300),), (FLOW,), (Schedule.flow(100, 3.0),), (EDM,))
)
def test_the_network_is_told_the_level_of_x(solver, options, schedule):
    """Of every row, those between timesteps too; for an edm schedule sigma itself, for an edm network ln(sigma / alpha) / 4."""
    if options.get("churn"):
        options = options | {"churn_max": 1.0}  # above the last timestep there is nothing to tell; see the next test
    for spacing in ("leading", "linspace", *(() if schedule.name == "flow" else ("logsnr", "karras"))):
        rows = table(solver, schedule, steps=12, spacing=spacing, prediction="x0", **options)
        if schedule.name == "edm":
            assert (rows.timesteps == rows.levels[:-1, 1]).all()
        else:
            told = [level_of(schedule, t) for t in rows.timesteps]
            np.testing.assert_allclose(told, rows.levels[:-1], rtol=1e-10, atol=1e-13)
        if rows.levels[0, 0]:
            rows = table(solver, schedule, steps=12, spacing=spacing, prediction="edm", **options)
            np.testing.assert_allclose(rows.timesteps, np.log(rows.levels[:-1, 1] / rows.levels[:-1, 0]) / 4, rtol=1e-12)


def test_churn_above_the_last_timestep_is_told_as_the_last():
    """k-diffusion's clamp."""
    rows = table("edm_heun", LINEAR, steps=10, churn=3.0)
    np.testing.assert_allclose(rows.levels[0, 1] / rows.levels[0, 0], 1.3 * LINEAR.sigma[-1] / LINEAR.alpha[-1], rtol=1e-12)
    assert rows.timesteps[0] == 999


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (Schedule.flow(1000, 3.0),), (EDM,)))
def test_a_callers_timesteps_are_the_levels_of_those(solver, options, schedule):
    told = spaced_timesteps(1000, 9, "linspace")
    spaced = table(solver, schedule, steps=9, spacing="linspace", prediction="x0", **options)
    assert same(table(solver, schedule, timesteps=told, prediction="x0", **options), spaced)
    assert same(table(solver, schedule, timesteps=[float(t) for t in told], prediction="x0", **options), spaced)


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, Schedule.flow(100, 3.0)], ids=lambda s: s.name)
def test_a_callers_timesteps_may_lie_between(schedule):
    last = schedule.timesteps - 1
    t = [last - 0.5, last / 2 + 0.25, 10.75, 0.5]
    rows = table("euler", schedule, timesteps=t, prediction="x0")
    assert rows.timesteps.dtype == np.float64
    assert rows.timesteps.tolist() == t
    np.testing.assert_allclose(rows.levels[:-1], [level_of(schedule, v) for v in t], rtol=1e-12)


@pytest.mark.parametrize("solver", solvers.names())
def test_default_spacing_is_the_solvers_own(solver):
    def ends(schedule, steps, prediction):
        return table(solver, schedule, steps=steps, prediction=prediction).timesteps[[0, -1]].tolist()

    cosine = Schedule.cosine(500)
    assert ends(cosine, 10, "epsilon") == [499, 49 if solver in SIMPLE else 0]
    assert ends(cosine, 1, "epsilon") == [499, 499]
    assert ends(FLOW, 10, "flow") == [999, 99 if solver in SIMPLE else 0]
    assert same(table(solver, EDM, steps=7), table(solver, EDM, steps=7, spacing="karras"))
    spacing = "trailing" if solver in SIMPLE else "logsnr" if solver in ("heun", "edm_heun", "dpmpp_2m_sde", "dpmpp_3m_sde") else "linspace"
    assert same(table(solver, cosine, steps=10), table(solver, cosine, steps=10, spacing=spacing))
    assert solvers.default_spacing(solver, cosine, 10) == spacing


@pytest.mark.parametrize("prediction", ["x0", "edm"])
def test_an_edm_network_is_told_floating_point_whatever_the_level(prediction):
    """sigma 1 and 80 are whole, and so is ln(1) / 4; a timestep is another thing."""
    for schedule in (Schedule.edm(), Schedule.edm(10, 0.01, 1.0)):
        rows = table("euler", schedule, steps=1, prediction=prediction)
        assert rows.timesteps.dtype == np.float64
        assert rows.tensors("cpu")[1].dtype == torch.float32


# Data N(mu, s^2)


def moments(run, n):
    """Mean and standard deviation of what `run` makes of a normal start and n normals: of its response to each by itself, for all is affine.

    run(start, normals): carries vectors of n + 2, one for each normal and, first, one for none of them.
    """
    unit = np.eye(n + 2)
    out = run(unit[1], unit[2:])
    return out[0], np.sqrt(np.sum((out[1:] - out[0]) ** 2))


def table_moments(rows, prediction):
    ends = moments(
        lambda start, z: walk(rows, network(rows, prediction, gaussian), rows.start * start, lambda i: z[i])[-1],
        len(rows),
    )
    return np.array(ends)


def oracle_moments(solver, options, schedule, t):
    """The same by the solvers of `oracles`, from the start that the schedule says: unit variance, or the noise that it has added."""
    straight = schedule.name == "flow" and solver in STRAIGHT
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    start = (1.0 if schedule.preserving else sigma[0]) / (1.0 if straight else alpha[0])
    own = {k: v for k, v in options.items() if k != "clipped_epsilon"}
    if solver == "ddpm":
        own["alpha"] = {"linear": lambda k: 1 / math.sqrt(1 + k**2), "flow": lambda k: 1 / (1 + k), "edm": lambda k: 1.0}[schedule.name]

    def run(x, z):
        draw = iter(z)
        levels = [*(sigma if straight else sigma / alpha), 0.0]
        denoise = (lambda y, k: gaussian(y, 1 - k, k)) if straight else (lambda y, k: gaussian(y, 1.0, k))
        return getattr(oracles, solver)(denoise, start * x, levels, lambda: next(draw), **own)

    return np.array(moments(run, len(t)))


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (FLOW,), (EDM,)))
def test_gaussian_data_follows_the_exact_recursion(solver, options, schedule):
    """Mean and standard deviation, those of the start with its churn among them. From just below pure noise, where y is finite."""
    t = np.linspace(998, 0, 40).round().astype(int)
    expected = oracle_moments(solver, options, schedule, t)
    for prediction in PREDICTIONS[schedule.name]:
        rows = table(solver, schedule, timesteps=t, prediction=prediction, clip=None, **options)
        # x_T is 200 times the data, so an error of 1e-14 in it is one of 1e-11 here.
        np.testing.assert_allclose(table_moments(rows, prediction), expected, rtol=1e-10)


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (FLOW,), (EDM,)))
def test_gaussian_data_arrives(solver, options, schedule):
    prediction = PREDICTIONS[schedule.name][0]
    errors = []
    for steps in (10, 270):
        rows = table(solver, schedule, steps=steps, prediction=prediction, clip=None, **options)
        errors.append(np.abs(table_moments(rows, prediction) - (MU, S)))
    # What is left of the mean: x_T starts at N(0, 1) rather than N(alpha_T mu, ...).
    assert errors[1][0] < 0.002, errors
    assert errors[1][1] < min(0.013, errors[0][1] / 4), errors


def test_gaussian_data_arrives_when_resampled():
    errors = []
    for steps in (50, 400):
        rows = table("ddpm", LINEAR, steps=steps, clip=None, resample=3, jump=5)
        errors.append(np.abs(table_moments(rows, "epsilon") - (MU, S)).max())
    assert errors[1] < min(0.015, errors[0] / 3), errors


def even_in_log_snr():
    """ln(alpha / sigma) from -5 to 5 in 1024 equal steps, so that linspace of 2^k + 1 steps is even too."""
    return Schedule.from_alphas_cumprod(1 / (1 + np.exp(-2 * np.linspace(5, -5, 1025))))


def even_in_sigma():
    """sigma / alpha from 0.2 to 2, of the size of the data's, in 1024 equal steps."""
    return Schedule.from_alphas_cumprod(1 / (1 + np.linspace(0.2, 2, 1025) ** 2))


def measured(solver, options, schedule, prediction="epsilon", exact=0, unfinished=0):
    """The order of convergence to the probability flow, of the largest error of any row: measured twice, from 65 to 129 to 257 steps.

    exact: how many rows are given x of the flow itself, as a multistep method wants. unfinished: how many of the last are not looked at.
    """
    errors = []
    for steps in (65, 129, 257):
        rows = table(solver, schedule, steps=steps, prediction=prediction, clip=None, spacing="linspace", **options)
        x = np.linspace(-2, 2, 9) * math.hypot(rows.levels[0, 0] / 2, rows.levels[0, 1])
        flow = [gaussian_flow(x, rows.levels[0], level) for level in rows.levels[:-1]]
        path = walk(rows, network(rows, prediction, gaussian), x, None, flow[1 : 1 + exact])
        ends = len(flow) - unfinished
        errors.append(max(np.abs(a - b).max() for a, b in zip(path[:ends], flow[:ends], strict=True)))
    assert errors[-1] > 1e-12  # rounding has no order
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("ddim", {}, 1),
        ("ddim", {"clipped_epsilon": False}, 1),
        ("euler", {}, 1),
        ("euler_ancestral", {"eta": 0.0}, 1),
        ("heun", {}, 2),
        ("edm_heun", {}, 2),
        ("dpm_2", {}, 2),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, 2),
        # Of the third order by name: k-diffusion's, diffusers' and its authors' formula takes half of D'' for it, for its D2 is a divided
        # difference and wants a factor of 2. With that it measures 3.0.
        ("dpmpp_3m_sde", {"eta": 0.0}, 2),
        # Zhao et al. 2023, theorem 3.1: with the corrector one more than the predictor's.
        *[("unipc", {"order": p, "variant": variant}, p + 1) for p in (1, 2, 3) for variant in ("bh1", "bh2")],
    ],
    ids=str,
)
def test_order_of_convergence(solver, options, order):
    """The last rows of unipc are of lower order by design, and not looked at."""
    orders = measured(solver, options, even_in_log_snr(), unfinished=3 if solver == "unipc" else 0)
    assert np.abs(orders - order).max() < 0.2, orders


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_convergence_of_ipndm(order):
    """Where steps are even in k, on either schedule. Begun with exact values: of itself it begins with a step of order 1, and measures 2."""
    for schedule, prediction in ((even_in_sigma(), "epsilon"), (Schedule.flow(1025), "flow")):
        orders = measured("ipndm", {"order": order}, schedule, prediction, exact=3)
        assert np.abs(orders - order).max() < 0.2, orders
    assert measured("ipndm", {"order": 4}, even_in_log_snr(), exact=3).max() < 2.2


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm_2", 2)])
def test_order_of_convergence_on_a_flow(solver, order):
    orders = measured(solver, {}, Schedule.flow(1025), "flow")
    assert np.abs(orders - order).max() < 0.2, orders


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("ddpm", {}, 1),
        ("ddpm", {"variance": "beta"}, 1),
        ("ddim", {"eta": 1.0}, 1),
        ("euler_ancestral", {}, 1),
        ("dpmpp_2s_ancestral", {}, 2),
        ("dpmpp_2m_sde", {}, 2),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
        ("dpmpp_3m_sde", {}, 2),
        ("edm_heun", {"churn": 3.0}, 2),
        ("edm_heun", {"churn": 3.0, "churn_min": 0.1, "churn_max": 4.0}, 2),
    ],
    ids=str,
)
def test_order_of_convergence_in_distribution(solver, options, order):
    """Of mean and standard deviation at timestep 0, from those that x_T should have."""
    schedule, errors = even_in_log_snr(), []
    for steps in (65, 129, 257):
        rows = table(solver, schedule, steps=steps, clip=None, spacing="linspace", denoise=False, **options)
        (alpha, sigma), (end_alpha, end_sigma) = rows.levels[[0, -1]]

        def run(start, z, rows=rows, alpha=alpha, sigma=sigma):
            return walk(rows, network(rows, "epsilon", gaussian), alpha * MU + math.hypot(alpha * S, sigma) * start, lambda i: z[i])[-1]

        mean, std = moments(run, len(rows))
        errors.append(max(abs(mean - end_alpha * MU), abs(std - math.hypot(end_alpha * S, end_sigma))))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders - order).max() < 0.2, orders


# Data that is a list of images


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(("solver", "options"), each())
def test_the_exact_network_of_a_list_returns_its_images(solver, options, clip):
    rng = np.random.default_rng(1)
    images = np.sign(rng.standard_normal((5, 3 * 8 * 8))) * rng.uniform(0.3, 1, (5, 1))
    cases = [(LINEAR, "trailing", p) for p in PREDICTIONS["linear"]]
    cases += [(LINEAR, "leading", "epsilon"), (LINEAR, "logsnr", "v"), (LINEAR, "karras", "epsilon"), (EDM, "karras", "edm")]
    cases += [(FLOW, "linspace", "flow"), (FLOW, "trailing", "x0")]
    if clip:
        # It starts at alpha 2e-5, where an unclamped x0 has lost the digits for 1e-2.
        cases += [(Schedule.cosine(300), None, p) for p in PREDICTIONS["linear"]]
    for schedule, spacing, prediction in cases:
        if schedule is FLOW and options.get("churn"):
            continue
        rows = table(solver, schedule, steps=25, prediction=prediction, clip=clip, spacing=spacing, **options)
        x = rows.start * rng.standard_normal((60, 192))
        out = walk(rows, network(rows, prediction, finite_list(images)), x, lambda _: rng.standard_normal((60, 192)))[-1]
        distance = np.abs(out[:, None] - images).max(2)
        assert distance.min(1).max() < 1e-2, (schedule.name, spacing, prediction)
        assert len(set(distance.argmin(1))) == 5, (schedule.name, spacing, prediction)


# The table itself

any_table = st.fixed_dictionaries(
    {
        "case": st.sampled_from(ALL),
        "schedule": st.sampled_from(
            [
                LINEAR,
                Schedule.cosine(20),
                Schedule.sigmoid(20),
                Schedule.scaled_linear(30),
                FLOW,
                Schedule.flow(30, 3.0),
                EDM,
                Schedule.edm(20),
            ]
        ),
        "steps": st.integers(1, 20),
        "spacing": st.sampled_from([*solvers.SPACINGS, None]),
        "strength": st.floats(0.05, 1),
        "denoise": st.booleans(),
    }
)


def built(case, schedule, steps, spacing, strength=1.0, denoise=True, **more):
    """The table, with what does not fit the schedule left out."""
    solver, options = case
    if schedule.name == "flow":
        options = {} if options.get("churn") else options
        spacing = None if spacing in ("logsnr", "karras") else spacing
    more.setdefault("clip", None)
    more.setdefault("prediction", PREDICTIONS.get(schedule.name, ("epsilon",))[0])
    if not denoise and (steps == 1 or strength < 1):
        denoise = True
    return table(solver, schedule, steps=steps, spacing=spacing, strength=strength, denoise=denoise, **options, **more)


@settings(max_examples=400, deadline=None)
@given(any_table)
def test_any_table_is_finite_starts_alone_and_ends_without_noise(drawn):
    rows = built(**drawn)
    solver, schedule = drawn["case"][0], drawn["schedule"]
    n = len(rows)
    assert rows.solver == solver
    assert rows.rows.shape == (n, len(COLUMNS))
    assert rows.rows.dtype == rows.levels.dtype == np.float64
    assert rows.timesteps.shape == (n,)
    assert rows.levels.shape == (n + 1, 2)
    assert (rows.column("clip") == np.inf).all()
    assert np.isfinite(np.delete(rows.rows, COLUMNS.index("clip"), axis=1)).all()
    assert rows.column("c")[0] == 0
    assert not rows.rows[0, [COLUMNS.index(f"h{k}") for k in range(SLOTS)]].any()
    assert (rows.column("s") >= 0).all()
    assert not rows.learned
    assert not rows.column("log_s").any()
    assert rows.column("c_next")[-1] == 1
    assert rows.history == (rows.column("slot") >= 0).any()
    if rows.levels[-1, 1] == 0:
        # The end is x0, whatever was before; in DDPM to the digits that 1 - alpha_bar has lost.
        assert rows.levels[-1, 0] == 1
        np.testing.assert_allclose(rows.column("b")[-1], 1, rtol=1e-11 if solver == "ddpm" else 0)
        for name in ("a", "c", "d", "s", "h0", "h1", "h2"):
            assert rows.column(name)[-1] == 0
        walked = max(round(drawn["strength"] * drawn["steps"]), 1)
        if solver in TWO_STAGE:
            alone = 1 + (solver == "dpmpp_2s_ancestral" and rows.levels[0, 0] == 0 and walked > 1)  # at the end, and from pure noise
            assert n == 2 * walked - alone
        else:
            assert n == walked
    else:
        assert rows.levels[-1].tolist() == [schedule.alpha[0], schedule.sigma[0]]


@settings(max_examples=400, deadline=None)
@given(any_table, st.booleans())
def test_what_a_row_reads_was_written_by_the_right_row(drawn, invert):
    """A slot by its number alone: the row that wrote it is as many rows ago as the solver means, had the weights that it means, and no
    write is for nothing."""
    solver = drawn["case"][0]
    invert = invert and deterministic(*drawn["case"]) and drawn["schedule"].name != "flow" and drawn["steps"] > 1
    rows = built(**(drawn | {"strength": 1.0, "denoise": False, "invert": True} if invert else drawn))
    ages = {"dpmpp_3m_sde": {2}, "ipndm": {1, 2, 3}, "unipc": {2, 3}}.get(solver, set())
    writer, read = {}, set()
    for i, row in enumerate(rows.rows):
        r = dict(zip(COLUMNS, row, strict=True))
        assert not (r["c"] and solver in (*SIMPLE, "ipndm"))
        for slot in range(SLOTS):
            if r[f"h{slot}"]:
                assert i - writer[slot] in ages, (i, slot, writer)
                read.add(writer[slot])
        if r["slot"] >= 0:
            alpha, sigma = rows.levels[i]
            w = 1.0 if drawn["schedule"].name == "flow" else alpha
            slope = (1 / sigma, -w / sigma)
            np.testing.assert_allclose((r["save_x"], r["save_x0"]), slope if solver == "ipndm" else (0, 1), rtol=1e-12)
            assert r["slot"] in range(SLOTS)
            writer[int(r["slot"])] = i
        else:
            assert r["slot"] == -1
            assert r["save_x"] == r["save_x0"] == 0
    assert read == set(np.flatnonzero(rows.column("slot") >= 0))
    if ages and not invert and len(rows) > 5 and drawn["steps"] == len(rows) and drawn["case"][1].get("order", 3) > 2:
        assert rows.history


@settings(max_examples=400, deadline=None)
@given(any_table, st.sampled_from(["x0", "flow", None]))
def test_levels_are_those_of_x(drawn, prediction):
    """A network that knows the image x_0 leads every solver along alpha x_0 + sigma z: its mean and its noise are those of `levels` in each
    row. `start` is what the noise of x_T is. (DDPM with variance beta has another noise, and churn_noise != 1 too.)"""
    case, schedule = drawn["case"], drawn["schedule"]
    if case[1].get("variance") == "beta" or case[1].get("churn_noise"):
        case = ("ddpm", {})
    prediction = prediction or PREDICTIONS.get(schedule.name, ("epsilon",))[0]
    rows = built(**(drawn | {"case": case}), prediction=prediction)
    unit, (alpha, sigma) = np.eye(len(rows) + 2), rows.levels[0]
    path = walk(rows, network(rows, prediction, lambda x, alpha, sigma: 1.0 + 0 * x), alpha + sigma * unit[1], lambda i: unit[2 + i])
    for x, level in zip(path, rows.levels, strict=True):
        mean, std = x[0], np.sqrt(np.sum((x[1:] - x[0]) ** 2))
        np.testing.assert_allclose((mean, std), level, rtol=1e-8, atol=1e-9)
    if rows.solver != "edm_heun":
        assert rows.start == (1 if schedule.preserving else sigma)


@pytest.mark.parametrize("churn_noise", [1.0, 1.007, 0.5, 0.0])
@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=lambda s: s.name)
def test_start_is_the_first_level_with_its_churn(schedule, churn_noise):
    """Karras et al. 2022, algorithm 2, lines 5 and 6, of x_T / alpha_T with x_T of unit variance, or sigma_max: x / alpha of row 0."""
    rows = table("edm_heun", schedule, steps=10, churn=2.0, churn_noise=churn_noise)
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    k = sigma / alpha
    variance = ((1.0 if schedule is LINEAR else sigma) / alpha) ** 2 + churn_noise**2 * ((1.2 * k) ** 2 - k**2)
    np.testing.assert_allclose(rows.start, rows.levels[0, 0] * math.sqrt(variance), rtol=1e-12)
    assert table("edm_heun", schedule, steps=10, churn=2.0, churn_max=1.0).start == (1.0 if schedule is LINEAR else sigma)


def test_churn_is_for_the_levels_within_its_bounds_and_at_them():
    k = EDM.sigma[[900, 500, 100]].tolist()
    for low, high, churned in ((0, math.inf, k), (k[1], k[1], k[1:2]), (0, k[1], k[1:]), (k[1], math.inf, k[:2]), (k[1] + 1, k[0] - 1, [])):
        rows = table("edm_heun", EDM, timesteps=[900, 500, 100], prediction="x0", churn=0.3, churn_min=low, churn_max=high)
        np.testing.assert_allclose(rows.levels[0::2, 1], [1.1 * v if v in churned else v for v in k], rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(any_table)
def test_strength_walks_the_last_steps_as_a_run_of_its_own(drawn):
    """Bit for bit the table of the last timesteps, so no row looks back on what was not walked; for a solver without memory, the last rows."""
    schedule, steps = drawn["schedule"], drawn["steps"]
    spacing = drawn["spacing"] if drawn["spacing"] in WHOLE else "linspace"
    rows = built(**(drawn | {"spacing": spacing, "denoise": True}))
    t = spaced_timesteps(schedule.timesteps, steps, spacing)
    tail = t[steps - max(round(drawn["strength"] * steps), 1) :]
    solver, options = drawn["case"]
    if schedule.name == "flow" and options.get("churn"):
        options = {}
    prediction = PREDICTIONS.get(schedule.name, ("epsilon",))[0]
    assert same(rows, table(solver, schedule, timesteps=tail, clip=None, prediction=prediction, **options))
    if solver in SIMPLE or (solver in TWO_STAGE and not options.get("churn")):
        whole = built(**(drawn | {"spacing": spacing, "denoise": True, "strength": 1.0}))
        assert (rows.rows == whole.rows[len(whole) - len(rows) :]).all()
        assert (rows.levels == whole.levels[len(whole) - len(rows) :]).all()


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (FLOW,), (EDM,)))
def test_without_denoising_a_run_ends_at_timestep_0(solver, options, schedule):
    end = [schedule.alpha[0], schedule.sigma[0]]
    for spacing, more in (("trailing", 1), ("linspace", 0), ("leading", 0)):
        rows = table(solver, schedule, steps=8, spacing=spacing, prediction="x0", denoise=False, **options)
        ends = table(solver, schedule, steps=8, spacing=spacing, prediction="x0", **options)
        assert rows.levels[-1].tolist() == end
        if "churn" in options:
            assert rows.column("s")[-1] == 0  # there is no step after it to churn for
        levels = [level for level in ends.levels[:-1].tolist() if level != end]
        # The last step of a two-stage solver has two rows where it does not end without noise; the step to timestep 0 is one more.
        assert len(rows) == len(ends) - 1 + more * (2 if solver in TWO_STAGE else 1)
        if not options.get("churn") and solver not in TWO_STAGE:
            assert rows.levels[:-1].tolist() == levels


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, EDM], ids=lambda s: s.name)
def test_an_inversion_goes_up_the_levels_that_a_run_goes_down(schedule):
    """From timestep 0, where the image is, whatever the spacing: from where sampling without denoising ends."""
    for solver in ("ddim", "euler", "dpmpp_2m", "ipndm", "unipc"):
        for options in ({}, {"spacing": "trailing"}, {"spacing": "leading"}, {"spacing": "linspace"}):
            if schedule is FLOW and options.get("spacing") != "leading":
                options = options | {"strength": 0.5}  # short of pure noise
            down, up = (table(solver, schedule, prediction="x0", **options, **way) for way in ({"denoise": False}, {"invert": True}))
            assert up.levels.tolist() == down.levels[::-1].tolist(), (solver, options)


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpm_2", {}, 2), ("dpmpp_2s_ancestral", {"eta": 0.0}, 2), ("dpmpp_2m", {}, 2)],
)
def test_inversion_arrives_at_its_order_and_sampling_brings_the_image_back(solver, options, order):
    schedule, errors = even_in_log_snr(), []
    for steps in (65, 129, 257):
        up, down = (
            table(solver, schedule, steps=steps, clip=None, spacing="linspace", **options, **way)
            for way in ({"invert": True}, {"denoise": False})
        )
        x = up.levels[0, 0] * np.linspace(-0.5, 1.2, 9)
        noise = walk(up, network(up, "epsilon", gaussian), x)[-1]
        again = walk(down, network(down, "epsilon", gaussian), noise)[-1]
        errors.append((np.abs(noise - gaussian_flow(x, up.levels[0], up.levels[-1])).max(), np.abs(again - x).max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders[:, 0] - order).max() < 0.2, orders
    assert orders[:, 1].min() > order - 0.1, orders
    assert errors[-1][1] < {1: 0.02, 2: 2e-5}[order]


@pytest.mark.parametrize(("solver", "options"), each(where=deterministic))
def test_inversion_may_end_at_pure_noise(solver, options):
    """At alpha = 0, where a flow ends. The step there is of first order, or straight."""
    errors, x = [], np.linspace(-0.5, 1.2, 9)
    for steps in (50, 200):
        rows = table(solver, FLOW, steps=steps, prediction="flow", clip=None, spacing="linspace", invert=True, **options)
        assert np.isfinite(np.delete(rows.rows, COLUMNS.index("clip"), axis=1)).all()
        assert rows.levels[[0, -1]].tolist() == [[FLOW.alpha[0], FLOW.sigma[0]], [0, 1]]
        noise = walk(rows, network(rows, "flow", gaussian), x)[-1]
        errors.append(np.abs(noise - gaussian_flow(x, rows.levels[0], (0, 1))).max())
    assert errors[1] < errors[0] / 3, errors


def repaint(steps, jump, resample):
    """The times of Lugmayr et al. 2022, as its code has them in get_schedule_jump: t_T - 1 down to -1, with jumps up."""
    jumps = dict.fromkeys(range(0, steps - jump, jump), resample - 1)
    t, times = steps, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump):
                t = t + 1
                times.append(t)
    return [*times, -1]


@pytest.mark.parametrize(("solver", "options"), each(where=lambda solver, _: solver in SIMPLE))
@pytest.mark.parametrize(("steps", "jump", "resample"), [(10, 1, 2), (12, 3, 3), (13, 4, 2), (7, 6, 5), (5, 5, 3), (20, 10, 10), (6, 2, 1)])
def test_resampling_walks_as_repaint_does(steps, jump, resample, solver, options):
    """A row for every step down, which goes back up where the next times rise; x keeps the mean and the noise of its level all along."""
    rows = table(solver, LINEAR, steps=steps, clip=None, spacing="leading", resample=resample, jump=jump, **options)
    times = repaint(steps, jump, resample)
    assert rows.timesteps.tolist() == [now * (1000 // steps) for now, after in pairwise(times) if after < now]
    alone = table(solver, LINEAR, steps=steps, clip=None, spacing="leading", **options)
    if resample == 1:
        assert same(rows, alone)
    if options.get("variance") == "beta":
        return
    unit = np.eye(len(rows) + 2)
    (alpha, sigma), answer = rows.levels[0], network(rows, "epsilon", lambda x, alpha, sigma: 1.0 + 0 * x)
    for x, level in zip(walk(rows, answer, alpha + sigma * unit[1], lambda i: unit[2 + i]), rows.levels, strict=True):
        np.testing.assert_allclose((x[0], np.sqrt(np.sum((x[1:] - x[0]) ** 2))), level, rtol=1e-10, atol=1e-13)


def test_repaints_times_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.RePaintScheduler(1000)
    for steps, jump, resample in ((10, 1, 2), (12, 3, 3), (20, 10, 10)):
        scheduler.set_timesteps(steps, jump, resample)
        assert scheduler.timesteps.tolist() == [t * (1000 // steps) for t in repaint(steps, jump, resample)[:-1]]


@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("ddim", {"eta": 0.5, "clipped_epsilon": False}), ("euler_ancestral", {})])
def test_a_resampled_row_is_the_step_down_and_the_forward_process_up(solver, options):
    """x' = rho x + sqrt(sigma'^2 - rho^2 sigma^2) z after the row of the same level that does not rise, clamp and all."""
    rows, alone = (
        table(solver, LINEAR, steps=6, clip=0.5, spacing="leading", **options, **way) for way in ({"resample": 2, "jump": 2}, {})
    )
    rng = np.random.default_rng(0)
    rises = 0
    for i, row in enumerate(rows.rows[:-1]):
        (j,) = np.flatnonzero(alone.timesteps == rows.timesteps[i])
        (alpha, sigma), (up_alpha, up_sigma) = alone.levels[j + 1], rows.levels[i + 1]
        rises += up_sigma > sigma
        x, m, z = rng.standard_normal((3, 50))
        rho = up_alpha / alpha
        down, x0 = oracles.advance(alone.rows[j], x, m, None, None, 0 * z)
        ours, ours_x0 = oracles.advance(row, x, m, None, None, 0 * z)
        np.testing.assert_allclose(ours, rho * down, rtol=1e-12)
        assert (x0 == ours_x0).all()
        np.testing.assert_allclose(
            row[COLUMNS.index("s")] ** 2, (rho * alone.column("s")[j]) ** 2 + up_sigma**2 - (rho * sigma) ** 2, rtol=1e-12, atol=1e-15
        )
    assert rises == 2


@pytest.mark.parametrize(("solver", "options"), each())
def test_a_schedule_that_stands_still_for_a_step_is_no_trouble(solver, options):
    """`Schedule` allows equal neighbours; between them there is nothing to do. A multistep solver forgets what was before, and a corrector
    still corrects; the others come to where they would have."""
    still = Schedule.from_alphas_cumprod([0.95, 0.7, 0.7, 0.4, 0.1, 0.001])
    moving = Schedule.from_alphas_cumprod([0.95, 0.7, 0.4, 0.1, 0.001])
    options = options if "churn" not in options else {}  # its gamma is of the number of steps
    rows = table(solver, still, timesteps=range(5, -1, -1), clip=None, **options)
    without = table(solver, moving, timesteps=range(4, -1, -1), clip=None, **options)
    assert np.isfinite(np.delete(rows.rows, COLUMNS.index("clip"), axis=1)).all()
    expected = table_moments(without, "epsilon")
    if solver in (*SIMPLE, *TWO_STAGE):
        np.testing.assert_allclose(table_moments(rows, "epsilon"), expected, rtol=1e-12)
    else:
        np.testing.assert_allclose(table_moments(rows, "epsilon"), expected, atol=0.15)
    (at,) = np.flatnonzero((rows.levels[:-1] == rows.levels[1:]).all(1) & (rows.levels[:-1, 1] == still.sigma[2]))[-1:]
    rng = np.random.default_rng(0)
    x, m, old, *saved = rng.standard_normal((6, 40))
    before = oracles.advance(rows.rows[at], x, m, old, saved, None)[0]
    if solver != "unipc":
        np.testing.assert_allclose(before, x, rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1, exclude_max=True), min_size=1, max_size=8), st.floats(0, 1), st.sampled_from(["ddim", "dpmpp_2s_ancestral"])
)
@example([1 - 1e-15, 0.5], 1.0, "ddim")
def test_any_eta_up_to_1_fits_any_schedule(bars, eta, solver):
    """Song et al. 2021, equation 16: at eta 1 the variance is DDPM's, which is at most sigma_next^2."""
    schedule = Schedule.from_alphas_cumprod(sorted(bars, reverse=True))
    rows = table(solver, schedule, steps=len(bars), eta=eta)
    assert np.isfinite(rows.rows).all()


def test_the_device_gets_the_rows_rounded_once():
    rows = table("ddim", LINEAR, steps=7, clip=0.9, eta=0.3)
    coefficients, timesteps = rows.tensors("cpu")
    assert coefficients.dtype == torch.float32
    assert timesteps.dtype == torch.int64
    assert coefficients.numpy().tobytes() == rows.rows.astype(np.float32).tobytes()
    assert timesteps.tolist() == rows.timesteps.tolist()
    rows = table("dpm_2", LINEAR, steps=7)
    coefficients, timesteps = rows.tensors("cpu")
    assert timesteps.dtype == torch.float32
    assert timesteps.numpy().tobytes() == rows.timesteps.astype(np.float32).tobytes()


@pytest.mark.parametrize("prediction", PREDICTIONS["linear"])
def test_clip_holds_x0(prediction):
    for solver in solvers.names():
        rows = table(solver, LINEAR, steps=8, prediction=prediction, clip=0.3)
        assert (rows.column("clip") == 0.3).all()
        free = table(solver, LINEAR, steps=8, prediction=prediction, clip=None)
        assert (np.delete(rows.rows, COLUMNS.index("clip"), axis=1) == np.delete(free.rows, COLUMNS.index("clip"), axis=1)).all()


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (FLOW,), (EDM,)))
def test_given_x0_the_rows_are_those_of_a_network_that_says_x0(solver, options, schedule):
    """But for what the network sees and is told, which stay its own."""
    want = table(solver, schedule, steps=9, prediction="x0", spacing="linspace", **options)
    for prediction in PREDICTIONS[schedule.name]:
        rows = table(solver, schedule, steps=9, prediction=prediction, spacing="linspace", **options)
        given = rows.given_x0()
        assert (given.column("c_next") == rows.column("c_next")).all()
        assert given.scale == rows.scale
        assert given.timesteps is rows.timesteps
        assert (given.levels == want.levels).all()
        for name in COLUMNS:
            if name != "c_next":
                np.testing.assert_allclose(given.column(name), want.column(name), rtol=1e-10, atol=1e-13, err_msg=f"{prediction} {name}")


def test_names_are_the_solvers_that_table_takes():
    assert set(solvers.names()) == {solver for solver, _ in ALL}
    for name in solvers.names():
        rows = table(name, LINEAR)
        assert rows.solver == name
        assert same(rows, table(name, LINEAR, steps=20, prediction="epsilon", clip=1.0))


# Refusals

KNOWN = "known: ddpm, ddim, euler, euler_ancestral, heun, dpm_2, dpmpp_2s_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ipndm, unipc, edm_heun"
NOT_FALLING = r"timesteps must be a falling list of numbers within 0 \.\. 999"
ADDS_NOISE = r"solver '\w+' adds noise with these options; inversion needs one that does not \(eta=0, or ddim, heun, \.\.\.\)"
WITHOUT_NOISE = r"timesteps without noise \(alpha_bar = 1\)"
NO_MEMORY = "resampling needs a solver with one row a step and no memory: ddpm, ddim, euler or euler_ancestral"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"solver": "eulr"}, rf"^unknown solver 'eulr'; {KNOWN} \(did you mean euler\?\)$"),
        ({"solver": "ddmp"}, rf"{KNOWN} \(did you mean ddpm or ddim\?\)$"),
        ({"solver": "quadratic"}, rf"^unknown solver 'quadratic'; {KNOWN}$"),
        ({"prediction": "eps"}, r"unknown prediction 'eps'; known: epsilon, v, x0, flow, edm \(did you mean epsilon\?\)"),
        ({"spacing": "trail"}, r"unknown spacing 'trail'; known: leading, trailing, linspace, logsnr, karras \(did you mean trailing\?\)"),
        (
            {"solver": "ddpm", "variance": "learnt"},
            r"unknown variance 'learnt'; known: posterior, beta, learned \(did you mean learned\?\)",
        ),
        ({"solver": "dpmpp_2m_sde", "solver_type": "mid"}, "unknown solver_type 'mid'; known: midpoint, heun"),
        ({"solver": "unipc", "variant": "bh3"}, "unknown variant 'bh3'; known: bh1, bh2"),
        ({"solver": "unipc", "order": 4}, "order is 4; unipc has orders 1 to 3"),
        ({"solver": "unipc", "order": 2.0}, r"order is 2\.0; unipc has"),
        ({"solver": "ipndm", "order": 0}, "order is 0; ipndm has orders 1 to 4"),
        ({"solver": "ipndm", "order": True}, "order is True; ipndm has"),
        ({"steps": 0}, "steps is 0; this schedule has 1000 timesteps, so give a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps is 1001; this schedule has 1000 timesteps"),
        ({"steps": 1001, "spacing": "karras"}, "steps is 1001; this schedule has 1000 timesteps"),
        ({"steps": -1}, "steps is -1; "),
        ({"steps": True}, "steps is True; "),
        ({"steps": 5.0}, "steps is 5.0; "),
        ({"steps": "9"}, "steps is '9'; "),
        ({"clip": 0}, "clip is 0; give a positive number, or None for no clamping of x0"),
        ({"clip": -1.0}, "clip is -1.0; "),
        ({"clip": math.nan}, "clip is nan; "),
        ({"strength": 0.0}, "strength is 0.0; give a number above 0, and at most 1, all of the steps"),
        ({"strength": 1.1}, "strength is 1.1; "),
        ({"strength": math.nan}, "strength is nan; "),
        ({"timesteps": []}, NOT_FALLING),
        ({"timesteps": [1, 2]}, NOT_FALLING),
        ({"timesteps": [5, 5]}, NOT_FALLING),
        ({"timesteps": [1000, 2]}, NOT_FALLING),
        ({"timesteps": [999.5]}, NOT_FALLING),
        ({"timesteps": [3, -1]}, NOT_FALLING),
        ({"timesteps": [math.nan]}, NOT_FALLING),
        ({"timesteps": 7}, NOT_FALLING),
        ({"timesteps": [7], "spacing": "karras"}, "give either timesteps or spacing"),
        ({"eta": -0.1}, r"eta is -0.1; it must be finite and at least 0 \(0: deterministic, 1: as noisy as DDPM\)"),
        ({"eta": math.nan}, "eta is nan; it must be finite and at least 0"),
        ({"eta": math.inf}, "eta is inf; "),
        ({"eta": math.inf, "steps": 1}, "eta is inf; "),
        ({"solver": "dpmpp_2m_sde", "eta": -1.0}, r"eta is -1.0; .* \(0: deterministic, 1: the reverse diffusion's noise\)"),
        ({"solver": "dpmpp_3m_sde", "eta": math.inf}, "eta is inf; "),
        ({"solver": "euler_ancestral", "eta": math.nan}, "eta is nan; "),
        ({"solver": "dpmpp_2s_ancestral", "eta": -1}, "eta is -1; "),
        ({"eta": 10}, "eta is 10; at this number of steps that asks for more noise than a row has"),
        ({"solver": "dpmpp_2s_ancestral", "eta": 10}, "eta is 10; at this number of steps"),
        ({"eta": "1"}, "solver 'ddim' does not take eta with these values"),
        ({"churn": 1}, "solver 'ddim' does not take churn; it takes eta, clipped_epsilon"),
        ({"solver": "ddpm", "eta": 1.0}, "solver 'ddpm' does not take eta; it takes variance"),
        ({"solver": "dpmpp_2m", "eta": 0.0}, "solver 'dpmpp_2m' does not take eta; it takes no options"),
        ({"solver": "edm_heun", "churn": -1.0}, r"churn is -1\.0; it must be finite and at least 0"),
        ({"solver": "edm_heun", "churn": math.inf}, "churn is inf; "),
        ({"solver": "edm_heun", "churn_min": math.nan}, "churn_min is nan; "),
        ({"solver": "edm_heun", "churn_noise": -0.5}, r"churn_noise is -0\.5; "),
        (
            {"solver": "edm_heun", "churn": 1, "schedule": FLOW, "prediction": "flow"},
            "churn adds noise and keeps the signal, .* give churn=0",
        ),
        ({"schedule": FLOW, "prediction": "epsilon"}, "without signal, epsilon says nothing of x0; take a prediction of v, x0 or flow"),
        ({"schedule": FLOW, "prediction": "edm"}, "without signal, edm says nothing of x0"),
        (
            {"schedule": FLOW, "prediction": "v", "steps": 3},
            r"'v' is defined where alpha\^2 \+ sigma\^2 = 1, not for .*'flow'; take 'flow' or",
        ),
        ({"schedule": EDM, "prediction": "v"}, "prediction 'v' is defined where .* not for a schedule of 'edm'"),
        (
            {"schedule": FLOW, "prediction": "flow", "spacing": "karras"},
            "spacing 'karras' needs signal and noise at both ends of the schedule",
        ),
        (
            {"schedule": FLOW, "prediction": "flow", "spacing": "logsnr"},
            "spacing 'logsnr' needs signal and noise .*: take linspace or trailing",
        ),
        ({"prediction": "edm", "sigma_data": 0.0}, r"sigma_data is 0\.0; "),
        ({"prediction": "edm", "sigma_data": -0.5}, r"sigma_data is -0\.5; "),
        ({"prediction": "edm", "sigma_data": math.nan}, "sigma_data is nan; "),
        ({"resample": 0}, "resample is 0 and jump is 1; give whole numbers of at least 1"),
        ({"resample": 2.0}, "resample is 2.0 and"),
        ({"resample": 2, "jump": 0}, "jump is 0; "),
        ({"solver": "heun", "resample": 2}, NO_MEMORY),
        ({"solver": "dpmpp_2m", "resample": 2}, NO_MEMORY),
        ({"solver": "ipndm", "resample": 2}, NO_MEMORY),
        ({"invert": True, "timesteps": [0]}, "inver"),
        ({"invert": True, "resample": 2}, "resampling .* no part in an inversion"),
        ({"solver": "ddpm", "invert": True}, ADDS_NOISE),
        ({"invert": True, "eta": 0.5}, ADDS_NOISE),
        ({"solver": "euler_ancestral", "invert": True}, ADDS_NOISE),
        ({"solver": "dpmpp_2s_ancestral", "invert": True}, ADDS_NOISE),
        ({"solver": "dpmpp_2m_sde", "invert": True}, ADDS_NOISE),
        ({"solver": "dpmpp_3m_sde", "invert": True, "eta": 0.1}, ADDS_NOISE),
        ({"solver": "edm_heun", "invert": True, "churn": 1.0}, ADDS_NOISE),
        ({"denoise": False, "timesteps": [0]}, "denois"),
        ({"denoise": False, "steps": 10, "spacing": "leading", "strength": 0.1}, "denois"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(arguments, text):
    with pytest.raises(ValueError, match=text):
        table(**{"solver": "ddim", "schedule": LINEAR, **arguments})


odd_schedule = st.sampled_from(
    [
        *(Schedule.linear(n) for n in (1, 2, 50)),
        *(Schedule.flow(n, 3.0) for n in (1, 2, 50)),
        *(Schedule.edm(n) for n in (1, 2, 50)),
        Schedule.cosine(1),
        *map(Schedule.from_alphas_cumprod, ([0.9] * 3, [1.0, 1.0, 0.5, 0.1, 0.1], [1.0, 0.5], [1 - 1e-15, 0.7, 0.7, 0.5, 1e-12])),
    ]
)
OURS = [
    "nothing to walk: a run without denoising", WITHOUT_NOISE, ADDS_NOISE, NO_MEMORY, "at both ends of the schedule",
    "says nothing of x0; take", "'v' is defined where", "give churn=0", "no part in an inversion", "this schedule has",
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(ALL),
    odd_schedule,
    st.one_of(
        st.fixed_dictionaries({"steps": st.integers(1, 12), "spacing": st.sampled_from([*solvers.SPACINGS, None])}),
        st.fixed_dictionaries({"timesteps": st.lists(st.floats(0, 1), min_size=1, max_size=5, unique=True)}),
    ),
    st.fixed_dictionaries(
        {
            "prediction": st.sampled_from(solvers.PREDICTIONS),
            "strength": st.sampled_from([1.0, 0.5, 0.01]),
            "denoise": st.booleans(),
            "invert": st.booleans(),
            "resample": st.sampled_from([1, 1, 1, 3]),
            "jump": st.sampled_from([1, 1, 1, 2, 9]),
        }
    ),
)
def test_any_arguments_make_a_finite_table_or_are_refused_by_name(case, schedule, places, more):
    """And nothing warns on the way, which would be an error here."""
    if "timesteps" in places:
        places = {"timesteps": sorted({v * (schedule.timesteps - 1) for v in places["timesteps"]}, reverse=True)}
    try:
        rows = table(case[0], schedule, **case[1], **places, **more)
    except ValueError as e:
        assert any(re.search(text, str(e)) for text in OURS), e
    else:
        assert np.isfinite(rows.rows).all()
        assert np.isfinite(rows.levels).all()
        assert np.isfinite(rows.timesteps).all()


@pytest.mark.parametrize("solver", solvers.names())
def test_a_timestep_without_noise_is_refused_only_where_it_is_used(solver):
    schedule = Schedule.from_alphas_cumprod([1.0, 0.8, 0.5, 0.1])
    with pytest.raises(ValueError, match=WITHOUT_NOISE):
        table(solver, schedule, steps=4, spacing="linspace")
    rows = table(solver, schedule, steps=2, spacing="trailing")
    assert rows.timesteps[[0, -1]].tolist() == [3, 1]
    assert np.isfinite(rows.rows).all()


def test_nothing_lies_between_a_timestep_without_noise_and_the_next():
    """Its log-SNR is infinite. Nor can an inversion start from it; a run without denoising ends there as with it."""
    schedule = Schedule.from_alphas_cumprod([1.0, 0.8, 0.5, 0.1])
    with pytest.raises(ValueError, match=WITHOUT_NOISE):
        table("ddim", schedule, timesteps=[2, 0.5])
    with pytest.raises(ValueError, match=WITHOUT_NOISE):
        table("ddim", schedule, timesteps=[3, 1], invert=True)
    assert same(table("ddim", schedule, timesteps=[3, 1], denoise=False), table("ddim", schedule, timesteps=[3, 1]))


@pytest.mark.parametrize(
    ("solver", "call", "text"),
    [
        ("ddim", {"timesteps": ["a", 3]}, r"timesteps must be a falling list of numbers within 0 \.\. 99"),
        ("ddpm", {"steps": 5, "variance": "learned", "resample": 2}, "cannot with a learned variance; take variance='posterior' or 'beta'"),
    ],
)
def test_what_cannot_be_walked_is_said(solver, call, text):
    with pytest.raises(ValueError, match=text):
        table(solver, Schedule.linear(100), **call)

"""Every row of every solver, in float64, against the solvers of `oracles` and of diffusers; and in fp32."""

import sys

import numpy as np
import oracles
import pytest
import torch
from oracles import STRAIGHT, advance, believed, each, walk

from fastdiff import reference
from fastdiff.schedules import Schedule
from fastdiff.solvers import spaced_timesteps, table

# What NumPy says of the way diffusers makes its tables.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:__array_{word}:DeprecationWarning") for word in ("_ implementation", "wrap__ must accept")
]

LINEAR, FLOW, EDM = Schedule.linear(1000), Schedule.flow(1000, 3.0), Schedule.edm(1000)
KINDS = [(LINEAR, p) for p in ("epsilon", "v", "x0", "flow", "edm")] + [(FLOW, "flow"), (FLOW, "x0"), (EDM, "edm"), (EDM, "epsilon")]
KIND_IDS = [f"{schedule.name} {prediction}" for schedule, prediction in KINDS]
SHAPE = (4, 3, 5, 5)
ALPHA = {"linear": lambda k: 1 / np.sqrt(1 + k**2), "flow": lambda k: 1 / (1 + k), "edm": lambda k: 1.0}


def agree(ours, theirs, relative=1e-12):
    """float64 on both sides, to so much of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


def beside(solver, options, schedule, t, prediction, clip, answers, noise, path, rows):
    """The solver of `oracles`, given the same answers and noise: what its network was shown and where it ended, against a table's path.

    Every network evaluation is compared: the place and time at which the oracle asks, and that it asks as often as the table has rows.
    """
    straight = schedule.name == "flow" and solver in STRAIGHT
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    levels = [*(sigma if straight else sigma / alpha), 0.0]
    weight = (lambda k: 1.0) if straight else ALPHA[schedule.name]
    drawn = [noise[i] for i in range(len(rows)) if rows.column("s")[i]]
    if rows.levels[0, 1] * alpha[0] > sigma[0] * rows.levels[0, 0] * (1 + 1e-9):
        drawn.insert(0, 0 * noise[0])  # the first level's churn is part of x_T
    drawn, asked = iter(drawn), []

    def denoise(y, k):
        w = weight(k)
        here = (1 - k, k) if straight else (w, w * k)
        np.testing.assert_allclose(rows.levels[len(asked)], here, rtol=1e-12)
        x0 = believed(prediction, w * y, answers[len(asked)], *here)
        asked.append(w * y)
        return x0 if clip is None else np.clip(x0, -clip, clip)

    own = {k: v for k, v in options.items() if k != "clipped_epsilon"} | ({"alpha": weight} if solver == "ddpm" else {})
    start = path[0] / (1.0 if straight else rows.levels[0, 0])
    end = getattr(oracles, solver)(denoise, start, levels, lambda: next(drawn), **own)
    assert len(asked) == len(rows)
    assert next(drawn, None) is None
    return [*asked, end]


@pytest.mark.parametrize(("solver", "options", "schedule", "prediction"), each(*KINDS))
def test_rows_are_the_independent_solvers(solver, options, schedule, prediction):
    rng = np.random.default_rng(0)
    for t in ([999, 700, 400, 200, 100, 30, 0], [800, 300], [500], [*range(950, 0, -50)]):
        if schedule.name == "flow" and t[0] == 999 and solver not in STRAIGHT:
            t = [990, *t[1:]]  # pure noise has a test of its own
        for clip in (None, 0.8):
            if clip and options.get("clipped_epsilon") is False:
                continue  # has a test of its own
            rows = table(solver, schedule, timesteps=t, prediction=prediction, clip=clip, **options)
            answers, noise = rng.standard_normal((2, len(rows), *SHAPE))
            path = walk(rows, lambda i, _, answers=answers: answers[i], rows.start * rng.standard_normal(SHAPE), lambda i, z=noise: z[i])
            theirs = beside(solver, options, schedule, t, prediction, clip, answers, noise, path, rows)
            for ours, other in zip(path, theirs, strict=True):
                agree(ours, other)


@pytest.mark.parametrize(("solver", "options", "schedule", "prediction"), each(KINDS[0], KINDS[5], KINDS[7]))
def test_fp32_follows_to_rounding(solver, options, schedule, prediction):
    """`reference.solver_step` on the table as the device gets it, with its own noise stream, over a whole run.

    To 2e-6 of the largest value, some 30 roundings of 2^-24: the worst of these runs, of 37 rows, has 8e-7.
    """
    t = [*range(950, 0, -50)]
    rows = table(solver, schedule, timesteps=t, prediction=prediction, clip=None, **options)
    rng = np.random.default_rng(0)
    answers = rng.standard_normal((len(rows), *SHAPE)).astype(np.float32)
    x = torch.from_numpy((rows.start * rng.standard_normal(SHAPE)).astype(np.float32))
    seeds, ids, coefficients = torch.arange(4), torch.arange(4) + 7, rows.tensors("cpu")[0]
    x0, seen, saved = torch.full_like(x, torch.nan), rows.scale * x, torch.full((reference.SLOTS, *SHAPE), torch.nan)
    path, inputs, noise = [x.numpy().astype(np.float64)], [seen.numpy().astype(np.float64)], []
    for i, m in enumerate(answers):
        row = torch.tensor([i])
        noise.append(reference.normal(seeds, ids, row, x[0].numel()).reshape(SHAPE).double().numpy())
        reference.solver_step(x, x0, torch.from_numpy(m), seen, saved, coefficients, row, seeds, ids, torch.ones(4))
        path.append(x.numpy().astype(np.float64))
        inputs.append(seen.numpy().astype(np.float64))
    theirs = beside(solver, options, schedule, t, prediction, None, answers.astype(np.float64), noise, path, rows)
    for i, (ours, other) in enumerate(zip(path, theirs, strict=True)):
        agree(ours, other, 2e-6)
        if prediction == "edm" and i < len(rows):
            alpha, sigma = rows.levels[i]
            agree(inputs[i], other / np.sqrt(sigma**2 + alpha**2 * 0.25), 2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(("schedule", "prediction"), KINDS, ids=KIND_IDS)
def test_ddim_may_keep_the_networks_noise_where_x0_is_clamped(schedule, prediction, eta):
    """Song et al. 2021, equation 12: alpha' x0 + sqrt(sigma'^2 - s^2) epsilon + s z, of equation 16's s, with x0 clamped and epsilon not."""
    t = [900, 700, 400, 10]
    rows = table("ddim", schedule, timesteps=t, prediction=prediction, clip=0.8, eta=eta, clipped_epsilon=False)
    levels = [*zip(schedule.alpha[t], schedule.sigma[t], strict=True), (1.0, 0.0)]
    rng = np.random.default_rng(0)
    for row, (alpha, sigma), (after, sigma_after) in zip(rows.rows, levels, levels[1:], strict=False):
        x, m, z = rng.standard_normal((3, *SHAPE))
        x0 = believed(prediction, x, m, alpha, sigma)
        s = eta * sigma_after / sigma * np.sqrt(sigma**2 - (alpha / after * sigma_after) ** 2)
        epsilon = (x - alpha * x0) / sigma
        expected = after * np.clip(x0, -0.8, 0.8) + np.sqrt(sigma_after**2 - s**2) * epsilon + s * z
        agree(advance(row, x, m, None, None, z)[0], expected)


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, EDM], ids=lambda s: s.name)
def test_a_learned_variance_is_between_the_two_that_are_known(schedule):
    """Nichol & Dhariwal 2021, equation 15: log s^2 = f log beta + (1 - f) log beta-tilde, v = 2 f - 1; all else is the same row."""
    small, large, learned = (
        table("ddpm", schedule, steps=10, spacing="linspace", prediction="x0", variance=name) for name in ("posterior", "beta", "learned")
    )
    assert learned.learned
    assert not small.learned
    assert not large.learned
    for v in (-1.0, 0.0, 0.3, 1.0):
        s = learned.column("s") * np.exp(learned.column("log_s") * v)
        np.testing.assert_allclose(s, large.column("s") ** ((1 + v) / 2) * small.column("s") ** ((1 - v) / 2), rtol=1e-12)
    rest = [i for i, name in enumerate(reference.COLUMNS) if name not in ("s", "log_s")]
    assert (learned.rows[:, rest] == small.rows[:, rest]).all()
    assert (learned.rows[:, rest] == large.rows[:, rest]).all()


@pytest.mark.parametrize(("solver", "options"), each(where=lambda solver, _: solver not in STRAIGHT))
def test_from_pure_noise_the_first_step_is_of_first_order_and_is_not_looked_back_on(solver, options):
    """Where alpha = 0 the variables of `oracles` are infinite: the step is alpha' x0 + s z + sqrt(sigma'^2 - s^2) x, and then a run begins."""
    t = [999, 800, 500, 300, 200, 100, 0]
    rows, later = (table(solver, FLOW, timesteps=v, prediction="flow", clip=None, **options) for v in (t, t[1:]))
    assert (rows.levels[0] == (0, 1)).all()
    assert rows.start == 1
    rng = np.random.default_rng(0)
    answers, noise = rng.standard_normal((2, len(rows), *SHAPE))
    path = walk(rows, lambda i, _: answers[i], rng.standard_normal(SHAPE), lambda i: noise[i])
    x, x0, (alpha, sigma) = path[0], path[0] - answers[0], rows.levels[1]
    eta = options.get("eta", 1.0 if solver in ("ddpm", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde") else 0.0)
    s = sigma * (1.0 if eta and solver in ("dpmpp_2m_sde", "dpmpp_3m_sde") else eta)
    if options.get("variance") == "beta":
        agree(path[1], alpha * x0 + noise[0])
    else:
        agree(path[1], alpha * x0 + s * noise[0] + np.sqrt(sigma**2 - s**2) * x)
    for ours, other in zip(path[1:], walk(later, lambda i, _: answers[i + 1], path[1], lambda i: noise[i + 1]), strict=True):
        agree(ours, other)


@pytest.mark.parametrize(("solver", "options", "schedule"), each((LINEAR,), (FLOW,), (EDM,)))
def test_a_raw_edm_network_is_the_denoiser_that_table_1_makes_of_it(solver, options, schedule):
    """Karras et al. 2022, equation 7: D(y, k) = c_skip y + c_out F(c_in y, c_noise), for any F. The run on D itself predicts x0."""
    t, data = [900, 700, 400, 200, 100, 30], 0.7
    rows = table(solver, schedule, timesteps=t, prediction="edm", clip=None, sigma_data=data, **options)
    noise = np.random.default_rng(0).standard_normal((len(rows), *SHAPE))

    def raw(seen, told):
        return np.tanh(seen + told)

    def denoise(y, k):
        c_skip, c_out = data**2 / (k**2 + data**2), k * data / np.sqrt(data**2 + k**2)
        c_in, c_noise = 1 / np.sqrt(data**2 + k**2), np.log(k) / 4
        return c_skip * y + c_out * raw(c_in * y, c_noise)

    x = rows.start * np.random.default_rng(1).standard_normal(SHAPE)
    ours = walk(rows, lambda i, seen: raw(seen, rows.timesteps[i]), x, lambda i: noise[i])
    theirs = walk(
        table(solver, schedule, timesteps=t, prediction="x0", clip=None, **options),
        lambda i, seen: denoise(seen / rows.levels[i, 0], rows.levels[i, 1] / rows.levels[i, 0]),
        x,
        lambda i: noise[i],
    )
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b)


# diffusers

DIFFUSERS_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


class Double:
    """A module in which float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


class Theirs:
    """A scheduler of diffusers that runs in float64, its tables and its `step` alike: all that says float32 in its file means float64."""

    def __init__(self, monkeypatch, name, schedule=None, **config):
        kind = getattr(pytest.importorskip("diffusers"), name)
        module = sys.modules[kind.__module__]
        for key in {"torch", "np"} & vars(module).keys():
            if not isinstance(getattr(module, key), Double):
                monkeypatch.setattr(module, key, Double(getattr(module, key)))
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: self.noise, raising=False)
        self.scheduler = kind(**config)
        if schedule is not None:
            self.scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def set_sigmas(self, sigmas):
        """Levels instead of those of its `set_timesteps`."""
        self.scheduler.sigmas = torch.from_numpy(np.ascontiguousarray(sigmas))

    def step(self, i, m, x, z, **options):
        """Row i: what it makes of x, and its x0 where it tells."""
        self.noise = torch.from_numpy(z)
        out = self.scheduler.step(torch.from_numpy(m), self.scheduler.timesteps[i], torch.from_numpy(x), **options)
        return out.prev_sample.numpy(), getattr(out, "pred_original_sample", None)


@pytest.fixture
def theirs(monkeypatch):
    """Makes schedulers of diffusers: theirs(name, schedule, **config)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield lambda name, schedule=None, **config: Theirs(monkeypatch, name, schedule, **config)
    torch.set_default_dtype(before)


def follow(rows, scheduler, weights, relative=1e-12, last=True, **options):
    """Both through a run of random answers and noise. weights: what x of theirs is to be multiplied by to be ours, before each row and after.

    Where theirs scales the input of the network, that is compared too.
    """
    rng = np.random.default_rng(0)
    assert len(scheduler.timesteps) == len(rows)
    x = rows.start * rng.standard_normal(SHAPE)
    other, before, saved = x / weights[0], np.full(SHAPE, np.nan), [np.full(SHAPE, np.nan)] * reference.SLOTS
    scales = np.append(rows.scale, rows.column("c_next"))
    for i, row in enumerate(rows.rows):
        if hasattr(scheduler.scheduler, "scale_model_input"):
            agree(scales[i] * x, scheduler.scale_model_input(torch.from_numpy(other), scheduler.timesteps[i]).numpy(), relative)
        m, z = rng.standard_normal((2, *SHAPE))
        other, x0 = scheduler.step(i, m, other, z, **options)
        x, before = advance(row, x, m, before, saved, z)
        if i < len(rows) - 1 or last:
            agree(x, weights[i + 1] * other, relative)
        if x0 is not None:
            agree(before, x0.numpy(), relative)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [1.0, 0.3, None])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(("variance", "kind"), [("posterior", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")])
def test_ddpm_rows_are_diffusers(theirs, variance, kind, prediction, clip, spacing):
    """All but the last row: where the last timestep is not 0 theirs adds noise to the final image. To 2e-12, for 1 - alpha_bar_t /
    alpha_bar_s and beta / sigma^2 lose up to four digits at small t, in both."""
    scheduler = theirs(
        "DDPMScheduler",
        LINEAR,
        variance_type=kind,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing=spacing,
    )
    rng = np.random.default_rng(0)
    for steps in (1, 10, 40):
        rows = table("ddpm", LINEAR, steps=steps, prediction=prediction, clip=clip, spacing=spacing, variance=variance)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == rows.timesteps.tolist()
        assert rows.learned == (variance == "learned" and steps > 1)
        x = rng.standard_normal(SHAPE)
        for i, row in enumerate(rows.rows):
            m, z, v = rng.standard_normal((3, *SHAPE))
            answer = np.concatenate([m, v], axis=1) if variance == "learned" else m
            expected, x0 = scheduler.step(i, answer, x, z)
            x, ours = advance(row, x, m, np.nan, None, z, v)
            agree(ours, x0.numpy())
            agree(x, expected if i < steps - 1 else x0.numpy(), 2e-12)


@pytest.mark.parametrize(("spacing", "counts"), [("leading", (1, 10, 30, 40)), ("trailing", (1, 10, 40))])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("clipped_epsilon", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_ddim_rows_are_diffusers(theirs, prediction, eta, clipped_epsilon, clip, spacing, counts):
    """Where its previous timestep, t - T // n, is the next of its own: not for linspace, nor for trailing where n does not divide T."""
    scheduler = theirs(
        "DDIMScheduler", LINEAR, prediction_type=DIFFUSERS_PREDICTION[prediction], clip_sample=clip is not None, timestep_spacing=spacing
    )
    for steps in counts:
        options = {"eta": eta, "clipped_epsilon": clipped_epsilon}
        rows = table("ddim", LINEAR, steps=steps, prediction=prediction, clip=clip, spacing=spacing, **options)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == rows.timesteps.tolist()
        follow(rows, scheduler, np.ones(steps + 1), eta=eta, use_clipped_model_output=clipped_epsilon)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("solver", "name", "spacing"),
    [
        (solver, name, spacing)
        for solver, name in (
            ("euler", "EulerDiscreteScheduler"),
            ("ddim", "EulerDiscreteScheduler"),
            ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
            ("heun", "HeunDiscreteScheduler"),
            ("edm_heun", "HeunDiscreteScheduler"),
            ("dpm_2", "KDPM2DiscreteScheduler"),
        )
        for spacing in ("leading", "trailing", *(() if solver == "euler_ancestral" else ("karras",)))
    ],
)
def test_rows_are_diffusers_in_the_variables_of_karras(theirs, solver, name, spacing, prediction):
    """With timesteps and levels of their own making. KDPM2 rounds karras' timesteps, but not those of its middles."""
    config = {"use_karras_sigmas": True, "timestep_spacing": "linspace"} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = theirs(name, LINEAR, prediction_type=DIFFUSERS_PREDICTION[prediction], **config)
    for steps in (4, 10, 25):
        rows = table(solver, LINEAR, steps=steps, prediction=prediction, clip=None, spacing=spacing)
        scheduler.set_timesteps(steps)
        told = scheduler.timesteps.numpy()
        if spacing == "karras" and solver == "dpm_2":
            np.testing.assert_allclose(rows.timesteps[1::2], told[1::2], rtol=1e-12)
            assert (rows.timesteps[::2].round() == told[::2]).all()
        else:
            np.testing.assert_allclose(rows.timesteps, told, rtol=1e-12)
        follow(rows, scheduler, rows.levels[:, 0])


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_heun_rows_are_diffusers_with_clipping(theirs, prediction, steps):
    scheduler = theirs(
        "HeunDiscreteScheduler",
        LINEAR,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        clip_sample=True,
        clip_sample_range=0.8,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    rows = table("heun", LINEAR, steps=steps, prediction=prediction, clip=0.8, spacing="leading")
    follow(rows, scheduler, rows.levels[:, 0])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras", "logsnr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize(
    ("solver", "options", "config"),
    [
        ("ddim", {}, {"solver_order": 1}),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, {"solver_type": "heun"}),
        ("dpmpp_2m", {}, {}),
        ("dpmpp_2m_sde", {}, {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
        ("dpmpp_3m_sde", {"eta": 0.0}, {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}),
    ],
    ids=["ddim", "dpmpp_2m heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde heun", "dpmpp_3m_sde eta=0"],
)
def test_dpmpp_rows_are_diffusers(theirs, solver, options, config, prediction, spacing):
    """Their "lu_lambdas" is our logsnr; they round timesteps of that and of karras."""
    config = {"algorithm_type": "dpmsolver++"} | config
    own = {"karras": {"use_karras_sigmas": True}, "logsnr": {"use_lu_lambdas": True}}.get(spacing, {})
    scheduler = theirs("DPMSolverMultistepScheduler", LINEAR, prediction_type=DIFFUSERS_PREDICTION[prediction], **config, **own)
    for steps in (1, 2, 3, 10, 25):
        rows = table(solver, LINEAR, steps=steps, prediction=prediction, clip=None, spacing=spacing, **options)
        if own:
            scheduler.set_timesteps(steps)
            assert (scheduler.timesteps.numpy() == rows.timesteps.round()).all()
        else:
            scheduler.set_timesteps(timesteps=rows.timesteps.tolist())
        follow(rows, scheduler, np.ones(len(rows) + 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_rows_are_diffusers(theirs, order, variant, prediction):
    """Their bh1 is NaN in a last row that ends without noise, for it takes B(h) = h = inf times nothing."""
    scheduler = theirs(
        "UniPCMultistepScheduler",
        LINEAR,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        solver_order=order,
        solver_type=variant,
        timestep_spacing="trailing",
    )
    for steps in (1, 2, 4, 10, 25):
        rows = table("unipc", LINEAR, steps=steps, prediction=prediction, clip=None, spacing="trailing", order=order, variant=variant)
        scheduler.set_timesteps(steps)
        scheduler.scheduler.last_sample = None
        assert scheduler.timesteps.tolist() == rows.timesteps.tolist()
        follow(rows, scheduler, np.ones(len(rows) + 1), last=variant == "bh2")


@pytest.mark.parametrize(
    ("solver", "options", "name", "config"),
    [
        ("dpmpp_2m", {}, "DPMSolverMultistepScheduler", {}),
        (
            "dpmpp_3m_sde",
            {"eta": 0.0},
            "DPMSolverMultistepScheduler",
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        ),
        ("unipc", {}, "UniPCMultistepScheduler", {}),
        ("unipc", {"order": 3, "variant": "bh1"}, "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    ],
)
def test_multistep_rows_on_a_flow_are_diffusers(theirs, solver, options, name, config):
    """At our timesteps: theirs begin a bit below pure noise."""
    scheduler = theirs(name, use_flow_sigmas=True, prediction_type="flow_prediction", **config)
    for t in ([500], [900, 300], [999 - 1, 900, 800, 500, 400, 390, 200, 100, 10, 0]):
        rows = table(solver, FLOW, timesteps=t, prediction="flow", clip=None, **options)
        scheduler.set_timesteps(len(t))
        scheduler.scheduler.last_sample = None
        scheduler.set_sigmas([*FLOW.sigma[t], 0.0])
        follow(rows, scheduler, np.ones(len(t) + 1), last=config.get("solver_type") != "bh1")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "name"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")])
def test_rows_on_a_flow_are_diffusers(theirs, solver, name, shift):
    """28 steps divide 999, so that their evenly spaced times are timesteps; their Heun shifts its last time twice, so it is given ours."""
    schedule = Schedule.flow(1000, shift)
    for steps in (2, 4, 28):
        rows = table(solver, schedule, steps=steps, prediction="flow", clip=None, spacing="linspace")
        scheduler = theirs(name, shift=shift)
        u = np.linspace(1, 0.001, steps)
        if solver == "euler":
            scheduler.set_timesteps(sigmas=u)
        else:
            scheduler.set_timesteps(steps)
            s = np.append(shift * u / (1 + (shift - 1) * u), 0.0)
            scheduler.set_sigmas([s[0], *s[1:-1].repeat(2), 0.0])
        follow(rows, scheduler, np.ones(len(rows) + 1))


def test_ipndm_rows_are_diffusers(theirs):
    """Their alpha and sigma are given to it, and it predicts v. Its last row goes on extrapolating where ours ends at x0."""
    for steps in (1, 2, 3, 4, 5, 25):
        t = spaced_timesteps(1000, steps, "trailing")
        rows = table("ipndm", LINEAR, steps=steps, prediction="v", clip=None, spacing="trailing")
        scheduler = theirs("IPNDMScheduler", trained_betas=[*LINEAR.sigma[t], 0.0])
        scheduler.set_timesteps(steps)
        follow(rows, scheduler, np.ones(steps + 1), last=steps == 1)


@pytest.mark.parametrize(
    ("solver", "options", "name", "config"),
    [
        ("euler", {}, "EDMEulerScheduler", {}),
        ("dpmpp_2m", {}, "EDMDPMSolverMultistepScheduler", {}),
        (
            "dpmpp_3m_sde",
            {"eta": 0.0},
            "EDMDPMSolverMultistepScheduler",
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        ),
        ("dpmpp_2m_sde", {}, "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
    ids=["euler", "dpmpp_2m", "dpmpp_3m_sde", "dpmpp_2m_sde"],
)
def test_edm_rows_are_diffusers(theirs, solver, options, name, config):
    """What the network sees and is told, what that makes of its answer, and the levels, all by their own preconditioning."""
    scheduler = theirs(name, sigma_data=0.7, **config)
    for steps in (1, 2, 18):
        rows = table(solver, EDM, steps=steps, prediction="edm", clip=None, sigma_data=0.7, **options)
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(rows.timesteps, scheduler.timesteps.numpy(), rtol=1e-12)
        follow(rows, scheduler, np.ones(steps + 1))

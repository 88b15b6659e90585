"""The schedulers: diffusers' numbers, signatures and files; what it lacks; and its faults, kept by default and corrected on request."""

import copy
import functools
import inspect
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

diffusers = pytest.importorskip("diffusers")

from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import fastdiff.diffusers as ours  # noqa: E402
from fastdiff import noise  # noqa: E402
from fastdiff.reference import STEP_COLUMNS  # noqa: E402

pytestmark = [
    # torch 2.13 with numpy 2, in diffusers' own np.array(tensor).
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    # diffusers', of algorithm_type "dpmsolver" and "sde-dpmsolver".
    pytest.mark.filterwarnings("ignore:.*algorithm_type .*dpmsolver is deprecated:FutureWarning"),
    # diffusers' own divisions by alpha = 0 and sigma = 0, in numpy.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning"),
]
NAMES = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
SHAPE = (3, 4, 4)

common = {
    "num_train_timesteps": st.integers(20, 60),
    "beta_end": st.sampled_from([0.02, 0.1, 0.3]),
    "rescale_betas_zero_snr": st.booleans(),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.integers(0, 1),
    "thresholding": st.sampled_from([False, False, True]),
    "dynamic_thresholding_ratio": st.sampled_from([0.9, 0.995]),
    "sample_max_value": st.sampled_from([1.0, 1.5]),
}
clipped = {
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "clip_sample": st.booleans(),
    "clip_sample_range": st.sampled_from([1.0, 2.0]),
}
CONFIGS = {
    "DDPMScheduler": st.fixed_dictionaries(
        common
        | clipped
        | {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
            "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other"]),
        }
    ),
    "DDIMScheduler": st.fixed_dictionaries(
        common
        | clipped
        | {"beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]), "set_alpha_to_one": st.booleans()}
    ),
    "DPMSolverMultistepScheduler": st.fixed_dictionaries(
        common
        | {
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "solver_order": st.integers(1, 3),
            "algorithm_type": st.sampled_from(["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"]),
            "solver_type": st.sampled_from(["midpoint", "heun"]),
            "lower_order_final": st.booleans(),
            "euler_at_final": st.booleans(),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
            "spaced": st.sampled_from([None, None, "use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_flow_sigmas"]),
        }
    ),
}
CALLS = {
    "DDPMScheduler": st.just({}),
    "DDIMScheduler": st.fixed_dictionaries(
        {"eta": st.sampled_from([0.0, 0.4, 1.0]), "use_clipped_model_output": st.sampled_from([False, True, None]), "given": st.booleans()}
    ),
    "DPMSolverMultistepScheduler": st.fixed_dictionaries({"given": st.booleans()}),
}


def build(library, name, config):
    """A scheduler, or the error that its config makes; use_..._sigmas by its name in `spaced`."""
    config = dict(config)
    spaced = config.pop("spaced", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(library, name)(**config, **({spaced: True} if spaced else {}))
    except (ValueError, NotImplementedError) as e:
        return e


def terms_of(scheduler, t, call):
    """The row that the last step took, [11]."""
    if isinstance(scheduler, ours.DDIMScheduler):
        return scheduler._table(call.get("eta", 0.0), bool(call.get("use_clipped_model_output")))[int(t)]
    if isinstance(scheduler, ours.DDPMScheduler):
        return scheduler._table()[int(t)]
    # Had it looked back on as much as it ever does.
    steps = len(scheduler.timesteps)
    return scheduler._table(False).reshape(-1, steps, 11)[:, scheduler.step_index - 1].abs().nan_to_num(0.0, posinf=torch.inf).amax(0)


def close(got, wanted, terms, dtype, slack):
    """Equal to rounding, where diffusers' is finite. terms: the size of what has been added up."""
    finite = wanted.isfinite()
    assert got.dtype == wanted.dtype
    bound = slack * torch.finfo(dtype).eps * (terms + wanted.abs() + 1)
    off = (got - wanted).abs().masked_fill(~finite, 0) - bound.masked_fill(~finite, 1)
    assert (off <= 0).all(), f"off by {(got - wanted).abs()[finite].max():.2e}, allowed {bound[finite].min():.2e} and more"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_configurations_give_diffusers_numbers(name, data):
    """At every step of a loop both get diffusers' own x. fp64 in DDPM and DDIM is equal to fp64's rounding, since the coefficients are diffusers'
    own fp32 ones; but logarithms and exponentials of fp32 round otherwise on vectors than on numbers, so what is formed of them (a learned
    variance, and DPM-Solver, which diffusers takes through fp32 besides) is equal to fp32's."""
    config = data.draw(CONFIGS[name])
    call = data.draw(CALLS[name])
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    steps, n = data.draw(st.integers(2, 18)), data.draw(st.integers(1, 3))
    source = data.draw(st.sampled_from(["generator", "list", "global"]))
    theirs, mine = build(diffusers, name, config), build(ours, name, config)
    assert isinstance(theirs, Exception) == isinstance(mine, Exception)
    if isinstance(theirs, Exception):
        assert type(theirs) is type(mine) and str(theirs) == str(mine)
        return
    own = data.draw(st.booleans()) and name == "DDPMScheduler"
    chosen = sorted(data.draw(st.sets(st.integers(0, 19), min_size=1, max_size=8)), reverse=True)
    assume(config.get("algorithm_type") != "sde-dpmsolver" or config["solver_order"] < 3)
    for scheduler in (theirs, mine):
        if own:
            scheduler.set_timesteps(timesteps=chosen)
        else:
            scheduler.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, mine.timesteps) and theirs.timesteps.dtype == mine.timesteps.dtype
    given_noise = call.pop("given", False) if name != "DDPMScheduler" else False
    learned = config.get("variance_type", "") in ("learned", "learned_range")
    rough = config.get("variance_type", "") in ("learned_range", "fixed_small_log") or name.startswith("DPM")
    working = torch.float32 if rough else dtype

    random = torch.Generator().manual_seed(steps)
    seeds = [torch.Generator().manual_seed(i) for i in range(n)]
    mine_seeds = [torch.Generator().manual_seed(i) for i in range(n)]
    x = torch.randn(n, *SHAPE, generator=random, dtype=dtype)
    with np.errstate(all="ignore"):
        for t in theirs.timesteps:
            m = torch.randn(n, *SHAPE, generator=random, dtype=dtype)
            if learned:
                v = torch.rand(n, *SHAPE, generator=random, dtype=dtype)
                m = torch.cat([m, v if config["variance_type"] == "learned" else 2 * v - 1], dim=1)
            more = dict(call)
            if given_noise and more.get("eta", 1):
                more["variance_noise"] = torch.randn(n, *SHAPE, generator=random, dtype=dtype)
            results = []
            for scheduler, generators in ((theirs, seeds), (mine, mine_seeds)):
                if "variance_noise" not in more and source != "global":
                    more["generator"] = generators if source == "list" else generators[0]
                torch.manual_seed(5)
                try:
                    results.append((scheduler.step(m, t, x, **more), torch.rand(1)))
                except (ValueError, IndexError) as e:  # a loop that begins at the second of two equal timesteps comes to its end too soon
                    results.append((e, None))
                more.pop("generator", None)
            if isinstance(results[0][0], Exception):
                assert type(results[1][0]) is type(results[0][0])
                if name.startswith("DPM"):
                    return
                continue  # a timestep beyond the last, by steps_offset
            (wanted, after), (got, mine_after) = results
            assert torch.equal(after, mine_after), "the global generator is used as often"
            assert type(wanted) is type(got)
            # The terms that are added up: x0 is px x + pm m, and x' is of x, x0, m, earlier x0s of the like size and noise below 5.
            signed = terms_of(mine, t, more)
            px, pm, clip = signed[[STEP_COLUMNS.index(column) for column in ("px", "pm", "clip")]]
            row = dict(zip(STEP_COLUMNS, signed.abs().unbind(), strict=True))
            x0_terms = row["px"] * x.abs() + row["pm"] * m[:, :3].abs()
            # Only where x0 is clamped for certain is its rounding forgotten; two large terms may well make a small x0.
            clamped = (px * x + pm * m[:, :3]).abs() > clip + 4 * torch.finfo(dtype).eps * x0_terms
            sizes = row["a"] * x.abs() + (row["b"] + row["c"] + row["h"]) * torch.where(clamped, clip, x0_terms) + row["d"] * m[:, :3].abs()
            if row["px"] > 1e20:
                return  # x - m over nothing: only its sign can be told, and that not where the two are near
            if "pred_original_sample" in wanted:
                close(got.pred_original_sample, wanted.pred_original_sample, x0_terms, dtype, 4)
            # exp(h) - 1 in fp32 is off by some 1 / h roundings, h > 0.02 here; where nothing clips x0, its own rounding comes on top.
            close(
                got.prev_sample, wanted.prev_sample, sizes + 5 * row["s"], working, 64 if working != dtype or name.startswith("DPM") else 8
            )
            x = wanted.prev_sample
            if not x.isfinite().all() or x.abs().max() > 1e3:
                return
    for a, b in zip(seeds, mine_seeds, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def loop(scheduler, dtype=torch.float32, n=4, steps=12, channels=3, **call):
    """prev_sample of every step, each from the same x."""
    scheduler.set_timesteps(steps)
    found, random = [], torch.Generator().manual_seed(0)
    x = torch.randn(n, *SHAPE, generator=random)
    for t in scheduler.timesteps:
        m = torch.randn(n, channels, *SHAPE[1:], generator=random)
        torch.manual_seed(1)
        found.append(scheduler.step(m.to(torch.bfloat16).to(dtype), t, x.to(torch.bfloat16).to(dtype), **call).prev_sample)
    return torch.stack(found)


@pytest.mark.parametrize(("name", "call"), [("DDPMScheduler", {}), ("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {})])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_we_are_nearer_to_the_truth(dtype, prediction, name, call):
    """The truth is diffusers' own in fp64, without noise. Ours is it to one rounding, and to fp32's in an unclipped x0."""
    call = dict(call)
    config = {"prediction_type": prediction}
    if name == "DDPMScheduler":
        config["variance_type"] = "fixed_small"
    truth, theirs, mine = (
        loop(getattr(library, name)(**config), d, **call) for library, d in ((diffusers, torch.float64), (diffusers, dtype), (ours, dtype))
    )
    if name == "DDPMScheduler":  # noise in the dtype is another draw in fp64: compare the last step, which has none
        truth, theirs, mine = (v[-1:] for v in (truth, theirs, mine))
    assert mine.dtype == theirs.dtype == dtype

    def error(v):
        return (v.double() - truth.double()).square().mean().sqrt()

    assert error(mine) <= error(theirs)
    slack = truth.abs() * torch.finfo(dtype).eps / 2 + 1e-4 * (1 + truth.abs())
    assert ((mine.double() - truth.double()).abs() <= slack).all()


# What diffusers has wrong.


def test_fixed_large_log_has_the_variance_of_fixed_large():
    large = loop(ours.DDPMScheduler(variance_type="fixed_large"))
    assert torch.equal(loop(ours.DDPMScheduler(variance_type="fixed_large_log")), large)
    assert loop(diffusers.DDPMScheduler(variance_type="fixed_large_log"))[:-1].isnan().all()


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_half_precision_add_noise_keeps_its_sigma_and_the_tables_their_place(name):
    mine, theirs = getattr(ours, name)(), getattr(diffusers, name)()
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    for t in (0, 1, 2, 5, 500):
        got = mine.add_noise(zero, one, torch.tensor([t])).item()
        exact = (1 - mine.alphas_cumprod[t].double().item()) ** 0.5
        assert abs(got / exact - 1) <= 2**-8, t
        if t in (0, 1, 2):
            assert theirs.add_noise(zero, one, torch.tensor([t])).item() == 0
    before = mine.alphas_cumprod
    mine.add_noise(torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, 3, 4, 4, device="meta"), torch.tensor([1, 2], device="meta"))
    assert mine.alphas_cumprod is before


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 7), ("trailing", 7)])
def test_ddim_goes_to_the_next_of_the_timesteps_when_corrected(spacing, steps):
    """A network that knows its image, and a step from the true x_t: x at the next timestep is alpha x_0 + sigma z again."""
    theirs, kept, right = (
        scheduler(num_train_timesteps=100, timestep_spacing=spacing, clip_sample=False)
        for scheduler in (diffusers.DDIMScheduler, ours.DDIMScheduler, ours.DDIMScheduler)
    )
    right.use(corrected=True)
    image, z = torch.rand(2, *SHAPE, dtype=torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    for scheduler in (theirs, kept, right):
        scheduler.set_timesteps(steps)
    misses = []
    for t, after in zip(right.timesteps, [*right.timesteps[1:], None], strict=True):
        alpha_bar, to = right.alphas_cumprod[t].double(), 1.0 if after is None else right.alphas_cumprod[after].double()
        x = alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * z
        wanted = to**0.5 * image + (1 - to) ** 0.5 * z
        torch.testing.assert_close(right.step(z, t, x).prev_sample, wanted, rtol=0, atol=1e-12)
        plain = theirs.step(z, t, x).prev_sample
        torch.testing.assert_close(kept.step(z, t, x).prev_sample, plain, rtol=0, atol=1e-12)
        misses.append((plain - wanted).abs().max())
    assert max(misses) > 1e-2


def test_the_final_image_is_without_noise_when_corrected():
    """trailing, with steps that do not divide T: the last timestep is not 0."""
    x, m = torch.ones(2, *SHAPE), torch.zeros(2, *SHAPE)
    spread = []
    for scheduler in (diffusers.DDPMScheduler, ours.DDPMScheduler, lambda **config: ours.DDPMScheduler(**config).use(corrected=True)):
        made = scheduler(variance_type="fixed_large", timestep_spacing="trailing")
        made.set_timesteps(20)
        assert made.timesteps[-1] > 0
        torch.manual_seed(0)
        spread.append(made.step(m, made.timesteps[-1], x).prev_sample.std())
    assert spread[0] > 0.05 and abs(spread[1] - spread[0]) < 1e-6 and spread[2] == 0


def test_coefficients_near_t_0_are_right_when_corrected():
    """Of x_0 = x = 1 the posterior's mean is known (Ho et al. 2020, equation 7), in fp64 from the same alpha_bar."""
    mine, right = ours.DDPMScheduler(prediction_type="sample"), ours.DDPMScheduler(prediction_type="sample").use(corrected=True)
    x, worst = torch.ones(1, 1, 1, 1, dtype=torch.float64), [0.0, 0.0]
    for t in range(1, 30):
        now, then = mine.alphas_cumprod[t].double(), mine.alphas_cumprod[t - 1].double()
        wanted = (then**0.5 * (1 - now / then) + (now / then) ** 0.5 * (1 - then)) / (1 - now)
        for i, scheduler in enumerate((mine, right)):
            # The mean alone: the noise of one seed, taken off.
            ends = [scheduler.step(sign * x, t, sign * x, generator=torch.Generator().manual_seed(0)).prev_sample for sign in (1, -1)]
            worst[i] = max(worst[i], abs((ends[0] - ends[1]).item() / 2 - wanted.item()))
    assert worst[1] < 1e-14 < 1e-5 < worst[0] < 1e-3


def test_dpm_add_noise_before_set_timesteps():
    clean, z = torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)
    t = torch.tensor([0, 999])
    theirs, mine = diffusers.DPMSolverMultistepScheduler(), ours.DPMSolverMultistepScheduler()
    upside_down = theirs.add_noise(clean, z, t)[:, 0, 0, 0]
    assert upside_down[0] > 0.99 and upside_down[1] < 0.02
    torch.testing.assert_close(mine.add_noise(clean, z, t)[:, 0, 0, 0], upside_down, rtol=1e-6, atol=0)
    right = ours.DDPMScheduler().add_noise(clean, z, t)
    torch.testing.assert_close(mine.use(corrected=True).add_noise(clean, z, t), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("spaced", ["use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas"])
@pytest.mark.parametrize("solver", [{"solver_order": 1}, {}, {"solver_type": "heun"}, {"solver_order": 3}])
def test_a_step_between_equal_sigmas_leaves_the_image(solver, spaced, kind):
    """These end at sigma_min, and "sigma_min" is then appended."""
    config = {spaced: True, "final_sigmas_type": "sigma_min", "algorithm_type": kind, **solver}
    theirs, mine = diffusers.DPMSolverMultistepScheduler(**config), ours.DPMSolverMultistepScheduler(**config)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SHAPE, generator=random)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(20)
    assert mine.sigmas[-1] == mine.sigmas[-2]
    for t in mine.timesteps:
        m = torch.randn(2, *SHAPE, generator=random)
        wanted, got = (s.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (theirs, mine))
        if wanted.isfinite().all():
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
        before, x = x, got
    torch.testing.assert_close(x, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_without_signal_x0_is_the_sign_and_not_nan(name):
    """Where x and m are equal but for rounding the sign is that of rounding."""
    mine = getattr(ours, name)(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    theirs = getattr(diffusers, name)(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    x = torch.randn(2, *SHAPE)
    m = x.clone()
    m[0] += 0.1
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(10)
    got, wanted = (s.step(m, s.timesteps[0], x, generator=torch.Generator().manual_seed(0)) for s in (mine, theirs))
    assert (got.pred_original_sample[0] == -1).all() and got.pred_original_sample.abs().max() <= 1
    torch.testing.assert_close(got.prev_sample[0], wanted.prev_sample[0], rtol=0, atol=1e-6)
    assert wanted.prev_sample[1].isnan().all() and got.prev_sample.isfinite().all()


# The forward process.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_and_velocity(name, dtype):
    """fp64 of DPM-Solver is from fp32 sigmas in both."""
    mine, theirs = getattr(ours, name)(), getattr(diffusers, name)()
    random = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(5, *SHAPE, generator=random, dtype=dtype) for _ in range(2))
    rtol = 4 * torch.finfo(dtype).eps
    for t in (torch.tensor([0, 1, 500, 998, 999]), torch.tensor([7]).expand(5), torch.tensor([3, 3, 3, 3, 3], dtype=torch.int32)):
        for method in ("add_noise", *(["get_velocity"] if hasattr(theirs, "get_velocity") else [])):
            got, wanted = getattr(mine, method)(x0, z, t), getattr(theirs, method)(x0, z, t)
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=2 * rtol)
    torch.testing.assert_close(mine.add_noise(x0, z[:1], t), theirs.add_noise(x0, z[:1], t), rtol=rtol, atol=2 * rtol)
    if name != "DPMSolverMultistepScheduler":
        for one in (torch.tensor([9]), torch.tensor(9)):
            torch.testing.assert_close(mine.add_noise(x0, z, one), theirs.add_noise(x0, z, one), rtol=rtol, atol=2 * rtol)
    for t in (torch.tensor([0, 500, 999]), torch.tensor([7])):  # one image at each of them
        for method in ("add_noise", *(["get_velocity"] if hasattr(theirs, "get_velocity") else [])):
            got, wanted = getattr(mine, method)(x0[:1], z[:1], t), getattr(theirs, method)(x0[:1], z[:1], t)
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=2 * rtol)
    t = torch.tensor([3, 3, 3, 3, 3], dtype=torch.int32)
    mixed = mine.add_noise(x0.float(), z.double(), t)
    assert mixed.dtype == theirs.add_noise(x0.float(), z.double(), t).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_channels_last_images_are_noised_as_they_lie(dtype):
    """Without a copy, and as diffusers leaves them; where only one of the two is so, or there is a single pixel, as ever."""
    scheduler, t = ours.DDPMScheduler(), torch.tensor([1, 500, 999])
    for shape in (SHAPE, (3, 1, 1), (1, 4, 4)):
        x0, z = (torch.randn(3, *shape).to(dtype) for _ in range(2))
        wanted = scheduler.add_noise(x0, z, t)
        last = [v.to(memory_format=torch.channels_last) for v in (x0, z)]
        for pair in (last, (last[0], z), (x0, last[1])):
            assert torch.equal(scheduler.add_noise(*pair, t), wanted)
    x0, z = (torch.randn(3, *SHAPE, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
    with Seen() as seen:
        made = scheduler.add_noise(x0, z, t)
    assert made.is_contiguous(memory_format=torch.channels_last) and not {"aten::clone", "aten::copy_"} & set(seen.names)


def test_dpm_add_noise_at_a_begin_index_makes_nothing_anew():
    """No tensor of a number, which on a GPU is a copy that is waited for."""
    scheduler = ours.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(4)
    x, t = torch.randn(3, *SHAPE), scheduler.timesteps[4].repeat(3)
    scheduler.add_noise(x, x, t)
    with Seen() as seen:
        scheduler.add_noise(x, x, t)
    assert "aten::lift_fresh" not in seen.names


@pytest.mark.parametrize("begin", [None, 4])
def test_dpm_add_noise_in_a_loop(begin):
    mine, theirs = ours.DPMSolverMultistepScheduler(use_karras_sigmas=True), diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    x0, z = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(12)
        if begin is not None:
            scheduler.set_begin_index(begin)
    steps = theirs.timesteps[begin or 0 :]
    for t in steps[:3]:
        got, wanted = (s.add_noise(x0, z, t.repeat(3)) for s in (mine, theirs))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        a, b = (s.step(z, t, x0).prev_sample for s in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert mine.step_index == theirs.step_index


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_as_in_diffusers(name):
    grads = []
    for library in (diffusers, ours):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(10)
        random = torch.Generator().manual_seed(0)
        x, m = (torch.randn(2, *SHAPE, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2))
        t = scheduler.timesteps[3]
        noisy = scheduler.add_noise(x, m, t.repeat(2))
        out = scheduler.step(m, t, noisy, generator=torch.Generator().manual_seed(0)).prev_sample
        out.square().sum().backward()
        grads.append((x.grad, m.grad))
    for got, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert wanted.abs().max() > 0.1


# What diffusers lacks.


@pytest.mark.parametrize(("name", "call"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 0.5}), ("DPMSolverMultistepScheduler", {})])
def test_a_timestep_per_sample(name, call):
    scheduler = getattr(ours, name)().use(noise="counter", seed=4)
    scheduler.set_timesteps(10)
    x, m = torch.randn(6, *SHAPE), torch.randn(6, *SHAPE)
    t = scheduler.timesteps[torch.tensor([0, 3, 9, 3, 8, 1])]
    got = scheduler.step(m, t, x, **call)
    for i in range(6):
        alone = getattr(ours, name)().use(noise="counter", seed=4, first=i)
        alone.set_timesteps(10)
        one = alone.step(m[i : i + 1], t[i], x[i : i + 1], **call)
        torch.testing.assert_close(got.prev_sample[i], one.prev_sample[0], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"timestep has shape \[5\] for a batch of 6; give one for all, or one per sample, \[6\]"):
        scheduler.step(m, t[:5], x, **call)
    for odd in (-1001, 1000):
        with pytest.raises(IndexError, match=f"timestep {odd} is none of this scheduler's, which are 0 to 999"):
            scheduler.step(m, torch.tensor([900, odd, 0, 0, 0, 0]), x, **call)
    if name == "DDPMScheduler":
        with pytest.raises(IndexError, match="timestep 5 is none of the 10 that set_timesteps has chosen"):
            scheduler.step(m, torch.tensor([900, 5, 0, 0, 0, 0]), x, **call)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_timesteps_with_fractions_are_an_index_error(name):
    """As in diffusers, and for 5.0, too. DPM-Solver looks for its place."""
    x = torch.zeros(2, *SHAPE)
    for library in (diffusers, ours):
        scheduler = getattr(library, name)()
        scheduler.set_timesteps(10)
        for t in (5.0, 0.5, torch.tensor(5.0), torch.tensor([5.0])):
            with pytest.raises(IndexError):
                scheduler.step(x, t, x)
        with pytest.raises(IndexError):
            scheduler.add_noise(x, x, torch.tensor([5.0, 6.0]))
    results = []
    for library in (diffusers, ours):
        for t in (300.0, 300.5):
            scheduler = library.DPMSolverMultistepScheduler()
            scheduler.set_timesteps(10)
            scheduler.step(x, t, x)
            results.append(scheduler.step_index)
    assert results[:2] == results[2:]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_of_mixed_dtypes_come_diffusers(name, prediction):
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for of_m, of_x, of_z in ((bf16, f32, f32), (f32, bf16, f32), (f64, f32, f32), (f16, bf16, f32), (bf16, bf16, f32), (f32, f32, f64)):
        results = []
        for library in (diffusers, ours):
            scheduler = getattr(library, name)(prediction_type=prediction)
            scheduler.set_timesteps(10)
            given = {"eta": 0.5, "variance_noise": torch.ones(2, *SHAPE, dtype=of_z)} if name == "DDIMScheduler" else {}
            torch.manual_seed(0)
            step = scheduler.step(
                torch.full((2, *SHAPE), 0.25, dtype=of_m), scheduler.timesteps[1], torch.ones(2, *SHAPE, dtype=of_x), **given
            )
            results.append(dict(step))
        for key, wanted in results[0].items():
            assert results[1][key].dtype == wanted.dtype, (key, of_m, of_x, of_z)
            torch.testing.assert_close(results[1][key], wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_samples_of_one_dimension(name):
    """DDPM of diffusers asks for their channels."""
    results = []
    for library in (diffusers, ours):
        scheduler, x = getattr(library, name)(), torch.linspace(-1, 1, 6)
        scheduler.set_timesteps(10)
        x = scheduler.add_noise(x, x.flip(0), torch.tensor([400]))
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.5, t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_the_variance_is_the_configs():
    """What a scheduler's attribute of that name says does not count."""
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    results = []
    for library in (diffusers, ours):
        scheduler = library.DDPMScheduler()
        scheduler.variance_type = "fixed_large"
        scheduler.set_timesteps(10)
        results.append(scheduler.step(m, scheduler.timesteps[-2], x, generator=torch.Generator().manual_seed(0)).prev_sample)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "call"),
    [
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {"variance_type": "learned"}, {}),
        ("DDIMScheduler", {}, {"eta": 1.0}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)
def test_noise_from_the_counter_is_the_streams(name, config, call):
    scheduler = getattr(ours, name)(**config)
    channels = 6 if config.get("variance_type") else 3
    x, m = torch.randn(4, *SHAPE), torch.rand(4, channels, *SHAPE[1:])

    def at(i, **more):
        scheduler.set_timesteps(10)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        return scheduler.step(m, scheduler.timesteps[i], x, **call, **more).prev_sample

    class Given(torch.Generator):
        pass

    for i in (0, 3, 8):
        states = {}
        for key, options in (("seed", {"seed": 7, "first": 2}), ("other", {"seed": 8, "first": 2}), ("seeds", {"seeds": [7, 1, 2, 3]})):
            scheduler.use(**{"noise": "counter", **options})
            states[key] = at(i)
            assert torch.equal(states[key], at(i))
        # The difference of two seeds is s times that of their noises.
        z = {key: noise.normal(seed, range(2, 6), i, SHAPE) for key, seed in (("seed", 7), ("other", 8))}
        weight = m[:, 3:] ** 0.5 if channels == 6 else 1
        ratio = (states["seed"] - states["other"]) / ((z["seed"] - z["other"]) * weight)
        assert ratio.min() > 0 and (ratio.max() - ratio.min()) / ratio.mean() < 0.05
        torch.testing.assert_close(
            states["seeds"][0] - states["other"][0],
            ratio.median() * (noise.normal(7, [0], i, SHAPE)[0] - z["other"][0]) * (weight[0] if channels == 6 else 1),
            rtol=0.01,
            atol=1e-4,
        )
        # A generator that is given is used all the same.
        scheduler.use(noise="counter")
        drawn = [at(i, generator=torch.Generator().manual_seed(0)), scheduler.use() and at(i, generator=torch.Generator().manual_seed(0))]
        assert torch.equal(*drawn)


def test_use_refuses_what_it_does_not_know():
    scheduler = ours.DDPMScheduler()
    with pytest.raises(ValueError, match='noise is \'stream\'; give "generator", torch\'s, or "counter"'):
        scheduler.use(noise="stream")
    scheduler.use(seeds=[1, 2])
    with pytest.raises(ValueError, match=r"use\(\) was given 2 seeds for a batch of 3; give one per sample"):
        scheduler.step(torch.zeros(3, *SHAPE), 5, torch.zeros(3, *SHAPE))
    with pytest.raises(ValueError, match="whole numbers"):
        scheduler.use(seeds=[0.5])
    with pytest.raises(ValueError, match="whole numbers"):
        scheduler.use(noise="counter", seed=0.5)
    with pytest.raises(ValueError, match='seed and first number the noise of the counter; give noise="counter" with them'):
        scheduler.use(seed=3)


# Misuse.


def test_misuse_is_an_error_of_the_same_type():
    x = torch.zeros(2, *SHAPE)
    for name in NAMES[1:]:
        for library in (diffusers, ours):
            with pytest.raises(ValueError, match="you need to run 'set_timesteps' after creating the scheduler"):
                getattr(library, name)().step(x, 5, x)
    for library in (diffusers, ours):
        ddim, ddpm, dpm = library.DDIMScheduler(), library.DDPMScheduler(), library.DPMSolverMultistepScheduler()
        ddim.set_timesteps(10)
        ddpm.set_timesteps(10)
        dpm.set_timesteps(2)
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            ddim.step(x, 0, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
        with pytest.raises(IndexError):
            ddpm.step(x, 5, x)
        with pytest.raises(IndexError):
            ddim.step(x, 1000, x)
        for t in dpm.timesteps:
            dpm.step(x, t, x)
        with pytest.raises(IndexError):
            dpm.step(x, 0, x)
        for call in ({"num_inference_steps": 2000}, {"num_inference_steps": 5, "timesteps": [3, 2]}, {"timesteps": [2, 3]}):
            with pytest.raises(ValueError, match=r"timesteps|inference"):
                ddpm.set_timesteps(**call)
        with pytest.raises(ValueError, match="prediction_type given as flow"):
            library.DDPMScheduler(prediction_type="flow").step(x, 3, x)
    with pytest.raises(ValueError, match="with variance_type 'learned' model_output must have 6 channels, not 3"):
        ours.DDPMScheduler(variance_type="learned").step(x, 3, x)
    with pytest.raises(ValueError, match=r"model_output has shape \[2, 3, 4, 5\] for a sample of \[2, 3, 4, 4\]"):
        ours.DDPMScheduler().step(torch.zeros(2, 3, 4, 5), 3, x)
    mine = ours.DDPMScheduler()
    mine.set_timesteps(10)
    with pytest.raises(IndexError, match="timestep 5 is none of the 10 that set_timesteps has chosen"):
        mine.step(x, 5, x)


def test_what_has_no_formula_is_refused():
    """diffusers fails in its third step, with an UnboundLocalError."""
    scheduler = ours.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match='"sde-dpmsolver" has no third order; give solver_order=2'):
        scheduler.step(torch.zeros(1, *SHAPE), scheduler.timesteps[0], torch.zeros(1, *SHAPE))


def test_a_timestep_beyond_the_last_is_an_error_of_the_step():
    """Leading spacing with an offset, and as many steps as there are timesteps."""
    x = torch.zeros(1, *SHAPE)
    for library in (diffusers, ours):
        scheduler = library.DDIMScheduler(num_train_timesteps=10, steps_offset=1)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 10
        with pytest.raises(IndexError):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("corrected", [False, True])
def test_beside_a_timestep_beyond_the_last_the_others_are_as_ever(corrected, name):
    config = {"num_train_timesteps": 10, "steps_offset": 1, "timestep_spacing": "leading"}
    theirs, mine = getattr(diffusers, name)(**config), getattr(ours, name)(**config).use(corrected=corrected)
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps[1:-1]:
        wanted, got = (s.step(m, t, x, generator=torch.Generator().manual_seed(0)).prev_sample for s in (theirs, mine))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("betas", [20, 1200])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_betas_are_not_always_as_many_as_the_config_says(name, betas):
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    for t in (0, 4, 19, -1, betas - 1):
        results = []
        for library in (diffusers, ours):
            scheduler = getattr(library, name)(trained_betas=np.linspace(1e-4, 0.02, betas).tolist())
            if name == "DDIMScheduler":
                scheduler.set_timesteps(250)
            results.append(scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(IndexError, match=f"timestep {betas} is none of this scheduler's, which are 0 to {betas - 1}"):
        scheduler.step(m, betas, x)


def trailing(library, name, **config):
    """29 of 50, to which a rounding adds a timestep, -1."""
    scheduler = getattr(library, name)(num_train_timesteps=50, timestep_spacing="trailing", **config)
    scheduler.set_timesteps(29)
    assert len(scheduler.timesteps) == 30 and scheduler.timesteps[-1] == -1
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "config", "call"),
    [
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, {}),
        ("DDIMScheduler", {}, {}),
        ("DDIMScheduler", {"set_alpha_to_one": False}, {"eta": 1.0, "use_clipped_model_output": True}),
        ("DPMSolverMultistepScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    ],
)
def test_a_timestep_of_minus_1_is_taken_as_diffusers_takes_it(name, config, call, prediction):
    theirs, mine = (trailing(library, name, prediction_type=prediction, **config) for library in (diffusers, ours))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SHAPE, generator=random)
    for t in theirs.timesteps:
        m = torch.randn(2, *SHAPE, generator=random)
        after = []
        for scheduler in (theirs, mine):
            torch.manual_seed(1)
            after.append((dict(scheduler.step(m, t, x, **call)), torch.rand(1)))
        (wanted, drawn), (got, mine_drawn) = after
        assert torch.equal(drawn, mine_drawn)
        for key, value in wanted.items():
            assert value.isfinite().all()
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-4)
        x = wanted["prev_sample"]


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_timesteps_below_0_count_from_the_end_as_far_as_there_are_some(name):
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    for t in (-1, -2, -500, -1000, torch.tensor(-7)):
        results = []
        for library in (diffusers, ours):
            scheduler = getattr(library, name)()
            if name == "DDIMScheduler":
                scheduler.set_timesteps(10)
            results.append(scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0)))
        for key, value in results[0].items():
            torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-4)
    for library in (diffusers, ours):
        scheduler = getattr(library, name)()
        if name == "DDIMScheduler":
            scheduler.set_timesteps(10)
        for t in (-1001, 1000, torch.tensor(-1001)):
            with pytest.raises(IndexError):
                scheduler.step(m, t, x)
    with pytest.raises(IndexError, match="timestep -1001 is none of this scheduler's, which are 0 to 999"):
        scheduler.step(m, -1001, x)
    with pytest.raises(IndexError, match="timestep -2 is none of the 30 that set_timesteps has chosen"):
        trailing(ours, "DDPMScheduler").step(m, -2, x)


@pytest.mark.parametrize(("name", "call"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 0.5}), ("DPMSolverMultistepScheduler", {})])
def test_a_timestep_of_minus_1_per_sample_compiled_and_noised(name, call):
    theirs, mine = (trailing(library, name) for library in (diffusers, ours))
    x, m, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([-1, 20, -1])
    torch.testing.assert_close(mine.add_noise(x, m, t), theirs.add_noise(x, m, t), rtol=1e-5, atol=1e-5)
    t = mine.timesteps[torch.tensor([29, 3, 0])]
    got = mine.use(noise="counter", seed=4).step(m, t, x, **call).prev_sample
    for i in range(3):
        alone = trailing(ours, name).use(noise="counter", seed=4, first=i).step(m[i : i + 1], t[i], x[i : i + 1], **call)
        torch.testing.assert_close(got[i], alone.prev_sample[0], rtol=0, atol=2e-6)

    torch.compiler.reset()
    eager, compiled = trailing(ours, name), trailing(ours, name)
    step = torch.compile(lambda m, t, x: compiled.step(m, t, x, **call).prev_sample, backend="aot_eager", fullgraph=True)
    for t in eager.timesteps[-1:]:  # where a loop begins
        results = []
        for run in (lambda m, t, x: eager.step(m, t, x, **call).prev_sample, step):
            torch.manual_seed(0)
            results.append(run(m, t, x))
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize(("name", "call"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})])
def test_a_timestep_of_minus_1_leaves_the_image_when_corrected(name, call, config):
    """All that diffusers makes of it is noise: the image is divided by the last alpha."""
    right, kept = trailing(ours, name, beta_end=0.3, **config).use(corrected=True), trailing(ours, name, beta_end=0.3, **config)
    image, m = torch.rand(2, *SHAPE) * 2 - 1, torch.randn(2, *SHAPE)
    got = right.step(m, right.timesteps[-1], image, **call)
    assert torch.equal(got.prev_sample, image)
    torch.testing.assert_close(got.pred_original_sample, image)
    assert (kept.step(m, kept.timesteps[-1], image, **call).prev_sample - image).abs().mean() > 0.5


# The contract.


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_diffusers(name):
    mine, theirs = getattr(ours, name), getattr(diffusers, name)
    public = [key for key in dir(theirs) if (not key.startswith("_") or key in ("__init__", "__len__")) and callable(getattr(theirs, key))]
    assert {"step", "add_noise", "set_timesteps", "from_config", "save_pretrained", "scale_model_input"} <= set(public)
    for key in public:
        assert inspect.signature(getattr(mine, key)) == inspect.signature(getattr(theirs, key)), key
    assert inspect.signature(mine) == inspect.signature(theirs) and mine.__name__ == theirs.__name__ and issubclass(mine, theirs)
    a, b = mine(), theirs()
    assert dict(a.config) == dict(b.config) and (len(a), a.order, a.init_noise_sigma) == (len(b), b.order, b.init_noise_sigma)
    x = torch.randn(1, *SHAPE)
    assert a.scale_model_input(x, 3) is x and {c.__name__ for c in a.compatibles} == {c.__name__ for c in b.compatibles}
    if name == "DDPMScheduler":
        for s in (a, b):
            s.set_timesteps(10)
        assert [int(a.previous_timestep(t)) for t in a.timesteps] == [int(b.previous_timestep(t)) for t in b.timesteps]


def set_values(scheduler):
    """Its config, without the note of which values are defaults, which diffusers drops on the way through a file."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_configs_go_between_all_of_them_and_through_files(name, other, tmp_path):
    config = {"num_train_timesteps": 77, "beta_end": 0.05, "prediction_type": "v_prediction"}
    for source in (ours, diffusers):
        made = getattr(source, name)(**config)
        got, wanted = (getattr(library, other).from_config(made.config) for library in (ours, diffusers))
        assert set_values(got) == set_values(wanted) and type(got) is getattr(ours, other)
        made.save_pretrained(tmp_path / source.__name__)
        for library in (ours, diffusers):
            loaded = getattr(library, name).from_pretrained(tmp_path / source.__name__)
            assert type(loaded) is getattr(library, name) and set_values(loaded) == set_values(made)
    files = [(tmp_path / s.__name__ / "scheduler_config.json").read_text() for s in (ours, diffusers)]
    assert json.loads(files[0]) == json.loads(files[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_copies(copied, name):
    first = getattr(ours, name)().use(noise="counter", seed=3)
    first.set_timesteps(7)
    second = copied(first)
    assert type(second) is type(first)
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    t = first.timesteps[0]
    assert torch.equal(first.step(m, t, x).prev_sample, second.step(m, t, x).prev_sample)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_and_its_original_go_ways_of_their_own(name):
    first = getattr(ours, name)().use(noise="counter", seed=3)
    first.set_timesteps(10)
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    first.step(m, first.timesteps[0], x)
    second = copy.copy(first)
    for scheduler, steps in ((second, 20), (first, 20), (second, 10), (second, 20)):
        scheduler.set_timesteps(steps)
        fresh = getattr(ours, name)().use(noise="counter", seed=3)
        fresh.set_timesteps(steps)
        for s in (scheduler, fresh):
            s.step(m, s.timesteps[0], x)
        assert torch.equal(scheduler.step(m, scheduler.timesteps[1], x).prev_sample, fresh.step(m, fresh.timesteps[1], x).prev_sample)


@pytest.mark.parametrize("name", NAMES)
def test_tables_follow_what_is_assigned(name):
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)

    def both(change, t=None):
        results = []
        for library in (diffusers, ours):
            scheduler = getattr(library, name)()
            scheduler.set_timesteps(10)
            scheduler.step(m, scheduler.timesteps[0], x)
            if name.startswith("DPM"):
                scheduler.set_timesteps(10)
            change(scheduler)
            at = scheduler.timesteps[2] if t is None else t
            results.append(scheduler.step(m, at, x, generator=torch.Generator().manual_seed(0)).prev_sample)
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
        return results[1]

    plain = both(lambda s: None)
    changes = [lambda s: s.register_to_config(prediction_type="v_prediction"), lambda s: s.set_timesteps(20)]
    if not name.startswith("DPM"):

        def in_place(scheduler):
            scheduler.alphas_cumprod[:] = scheduler.alphas_cumprod**2

        changes += [in_place, lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2)]
    else:
        changes.append(lambda s: s.sigmas.mul_(1.5))
    if name == "DDPMScheduler":
        changes.append(lambda s: setattr(s, "timesteps", torch.tensor([900, 850, 700, 20])))
    if name == "DDIMScheduler":
        both(lambda s: s.final_alpha_cumprod.mul_(0.99995), torch.tensor(0))
    for change in changes:
        assert not torch.equal(both(change), plain)
    with torch.inference_mode():
        scheduler = getattr(ours, name)()
        scheduler.set_timesteps(10)
        scheduler.step(m, scheduler.timesteps[2], x)


# Speed.


class Seen(TorchDispatchMode):
    """What reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "call", "operations"), [("DDPMScheduler", {}, 21), ("DDIMScheduler", {}, 16), ("DPMSolverMultistepScheduler", {}, 15)]
)
def test_an_eager_step_is_few_operations(name, call, operations):
    """On the CPU the terms are counted one by one; diffusers dispatches 63, 37 and 63, and reads 11 values back for DDPM."""
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(50)
    x, m = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    steps = list(scheduler.timesteps)
    for t in steps[:2]:
        scheduler.step(m, t, x, **call)
    with Seen() as seen:
        scheduler.step(m, steps[2], x, **call)
    assert len(seen.names) <= operations and "aten::nonzero" not in seen.names


def test_timesteps_on_a_device_are_told_by_their_place():
    """A view of scheduler.timesteps, wherever they are, is known without reading it. (The device is a pretence: its values cannot be read.)"""
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    host, hidden = scheduler._host_timesteps(), scheduler.timesteps.to("meta")
    whole = ours.DDPMScheduler._whole

    def told(steps, t):
        """With these as its timesteps, of which the values are in reading order those of `host`."""
        scheduler.__dict__["timesteps"] = steps
        return whole(scheduler, t)

    assert [told(hidden, t) for t in hidden] == host.tolist()
    later = hidden[3:]
    assert [told(later, t) for t in later] == host[: len(later)].tolist(), "places are counted from their own first"
    assert told(later, hidden[1]) is None, "one that lies before them is none of them"
    assert told(hidden[::2], hidden[2]) is None and told(hidden, hidden[2:4]) is None
    assert told(hidden, hidden[2].to(torch.int32)) is None


def stepper(scheduler):
    def step(x, t):
        return scheduler.step(x * 0.5, t, x).prev_sample

    return step


@pytest.mark.parametrize(
    ("name", "config", "most"),
    [
        ("DDPMScheduler", {}, 1),
        ("DDIMScheduler", {}, 1),
        ("DPMSolverMultistepScheduler", {}, 3),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, 4),
    ],
)
def test_a_loop_of_compiled_steps_compiles_once(name, config, most):
    """DPM-Solver once for each number of outputs that it can look back on, and once more."""
    torch.compiler.reset()
    x = torch.randn(2, *SHAPE)
    results = []
    for compiled in (False, True):
        scheduler = getattr(ours, name)(**config)
        scheduler.set_timesteps(20)
        counter = CompileCounter()
        step = torch.compile(stepper(scheduler), backend=counter, fullgraph=True) if compiled else stepper(scheduler)
        torch.manual_seed(0)
        y = x
        for t in scheduler.timesteps:
            y = step(y, t)
        results.append(y)
    assert counter.frame_count <= most
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert getattr(scheduler, "step_index", 20) == 20


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_loop_is_one_graph(name):
    torch.compiler.reset()
    x = torch.randn(2, *SHAPE)
    scheduler, other = getattr(ours, name)(), getattr(ours, name)()

    def run(scheduler, x):
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.5, t, x).prev_sample
        return x

    for s in (scheduler, other):
        s.set_timesteps(20)
    counter = CompileCounter()
    torch.manual_seed(0)
    got = torch.compile(functools.partial(run, scheduler), backend=counter, fullgraph=True)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, run(other, x), rtol=0, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_for_timesteps_compile_too(name):
    """Twice, for numbers become symbols when they change, and with what else the history needs."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        scheduler = getattr(ours, name)()
        scheduler.set_timesteps(8)
        counter = CompileCounter()
        step = torch.compile(stepper(scheduler), backend=counter, fullgraph=True) if compiled else stepper(scheduler)
        torch.manual_seed(0)
        y = torch.ones(2, *SHAPE)
        for t in scheduler.timesteps.tolist():
            y = step(y, t)
        results.append(y)
    assert counter.frame_count <= 3
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_compiled_add_noise():
    torch.compiler.reset()
    scheduler = ours.DDPMScheduler()
    x, z, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([1, 5, 900])
    eager = scheduler.add_noise(x, z, t)
    compiled = torch.compile(scheduler.add_noise, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, z, t), eager, rtol=0, atol=1e-6)


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "config", "call"),
    [
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 1.5}, {"eta": 0.5}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)
def test_a_loop_on_a_gpu_waits_for_nothing_and_is_the_cpus(name, config, call, dtype):
    """The same noise, from a CPU generator, which is copied over: so the loop that must not wait draws by the counter."""
    channels = 6 if config.get("variance_type") else 3
    random = torch.Generator().manual_seed(0)
    x, m = torch.randn(4, *SHAPE, generator=random).to(dtype), torch.rand(4, channels, *SHAPE[1:], generator=random).to(dtype)

    def run(device, **more):
        scheduler = getattr(ours, name)(**config).use(noise="counter", seed=1)
        scheduler.set_timesteps(10, device=device)
        y, given = x.to(device), m.to(device)
        clean = scheduler.add_noise(y, y, scheduler.timesteps[:1].expand(4))
        for warm in (True, False):
            scheduler.set_timesteps(10, device=device)
            if device == "cuda" and not warm:
                torch.cuda.set_sync_debug_mode("error")
            y = x.to(device) if warm else y * 0 + clean
            for t in scheduler.timesteps:
                y = scheduler.step(given, t, y, **call, **more).prev_sample
        return y

    try:
        got = run("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-4  # the stream's normals, and a rounding to bf16, of ten steps
    torch.testing.assert_close(got.cpu(), run("cpu"), rtol=tolerance, atol=tolerance)


# Without diffusers.


@pytest.mark.parametrize(
    ("setup", "text"),
    [
        ("sys.modules['diffusers'] = None", "fastdiff.diffusers needs diffusers 0.42 or newer; pip install 'fastdiff-torch[diffusers]'"),
        ("import diffusers; diffusers.__version__ = '0.41.2'", "fastdiff.diffusers needs diffusers 0.42 or newer, and this is 0.41.2"),
    ],
)
def test_missing_or_old_diffusers_is_one_clear_import_error(setup, text):
    code = f"import sys; {setup}\ntry:\n    import fastdiff.diffusers\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert text in done.stdout and "\n" not in done.stdout.strip() and not done.returncode, done.stderr

"""The sampler: the images it makes, that they depend on seed and id alone, what it can start from, and what it refuses."""

import functools
import re
import threading
import warnings
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SMALL, FiniteList, Gaussian, Plain, by_hand, guided, small_checkpoint, small_network
from torch import nn

from fastdiff import Sampler, Schedule, UNet, UNetConfig, native, noise, solvers
from fastdiff.loop import Network
from fastdiff.noise import slerp

SCHEDULE = Schedule.linear(50)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    """Both ways to run; on CUDA the convolutions of these tests keep fp32's bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield request.param


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture
def threads():
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(network, device="cpu", **options):
    settings = {"shape": SMALL.shape, "num_classes": 3, "steps": 4, "micro_batch": 4, "dtype": torch.float32, "compile": False} | options
    return Sampler(network, settings.pop("schedule", SCHEDULE), device=device, **settings)


def plain(function, *parts, shape=SMALL.shape, schedule=SCHEDULE, **options):
    """A sampler of a function called with (x, t)."""
    return Sampler(Plain(function, *parts), schedule, **({"shape": shape, "steps": 4, "micro_batch": 4, "compile": False} | options))


def some_images(n, shape=SMALL.shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Images are those of the plain loop


@pytest.mark.parametrize("solver", solvers.names())
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_is_the_plain_loop(network, solver, guidance, device):
    sampler = make(network, device, solver=solver)
    labels = torch.tensor([0, 1, 2, 2, 1])
    got = sampler(5, seed=3, first=7, labels=labels, guidance=guidance)
    want = by_hand(guided(network, labels, guidance), sampler.table, SMALL.shape, range(7, 12), seed=3)
    # fp32 against fp64 over four rows, each of which divides by alpha >= 0.77 and clamps. On CUDA the normals differ by up to 1e-5 besides.
    torch.testing.assert_close(got.cpu(), want, atol=2e-5 if device == "cpu" else 2e-4, rtol=0)


def test_a_seed_per_image_is_sample_0_of_that_seed(network, device):
    sampler = make(network, device)
    seeds = [11, 2**63 + 5, -4, 11, 0]
    images = sampler(5, seeds=seeds, labels=0)
    for seed, image in zip(seeds, images, strict=True):
        assert torch.equal(sampler(1, seed=seed, labels=0)[0], image)
    assert torch.equal(images[0], images[3])


def test_labels_and_guidance_per_image(network, device):
    sampler = make(network, device)
    labels, weights = [0, 1, 2, 3, 1], [1.0, 2.0, 4.0, 3.0, 0.0]
    mixed = sampler(5, labels=labels, guidance=weights)
    for i, (label, weight) in enumerate(zip(labels, weights, strict=True)):
        alone = sampler(1, first=i, labels=label, guidance=[weight] if weight != 1 else 1.0)
        torch.testing.assert_close(alone[0], mixed[i], atol=1e-6, rtol=0)


ROWS = [49, 37, 30, 20, 12, 3]


@pytest.mark.parametrize("ends", [(12, 37), (20.5, 30.0), (0, 49)])
def test_guidance_within_an_interval_of_timesteps_alone(network, ends, device):
    sampler, labels = make(network, device, timesteps=ROWS), torch.tensor([0, 2, 1])
    inside = [ends[0] <= t <= ends[1] for t in ROWS]
    got = sampler(3, labels=labels, guidance=3.0, guidance_interval=ends)
    want = by_hand(guided(network, labels, 3.0, inside.__getitem__), sampler.table, SMALL.shape, range(3))
    torch.testing.assert_close(got.cpu(), want, atol=2e-5 if device == "cpu" else 2e-4, rtol=0)


def test_outside_the_interval_the_network_is_asked_for_half_as_much(network):
    calls = []
    sampler = make(Plain(lambda x, t, labels: calls.append((int(t[0]), len(x))) or x, network), timesteps=ROWS)
    sampler(3, labels=1, guidance=3.0, guidance_interval=(12, 30))
    assert calls == [(49, 4), (37, 4), (30, 8), (20, 8), (12, 8), (3, 4)]


def test_an_interval_without_rows_is_no_guidance(network):
    sampler = make(network)
    assert torch.equal(sampler(3, labels=1, guidance=3.0, guidance_interval=(0.5, 1)), sampler(3, labels=1))


# The same seed, the same images, bit for bit


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_images_depend_on_seed_and_id_alone(network, solver, guidance, device):
    sampler = make(network, device, solver=solver)
    call = {"seed": 5, "labels": 1, "guidance": guidance}
    whole = sampler(23, **call)
    for n in (1, 4, 7, 22):
        assert torch.equal(sampler(n, **call), whole[:n])
    assert torch.equal(sampler(8, first=10, **call), whole[10:18])  # each at another place of a micro-batch
    assert torch.equal(sampler(1, first=22, **call), whole[22:])
    assert not torch.equal(sampler(4, **call | {"seed": 6}), whole[:4])


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
@pytest.mark.parametrize("call", [{}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": (20, 40)}], ids=str)
def test_images_do_not_depend_on_how_many(network, solver, call, threads):
    sampler = make(network, solver=solver, micro_batch="auto")
    labels = torch.arange(1000) % 4
    threads(2)
    whole = sampler(1000, seed=8, labels=labels, **call)
    for count in (1, 2, 3):
        threads(count)
        for n in (1, 7, 64):
            assert torch.equal(sampler(n, seed=8, labels=labels[:n], **call), whole[:n])
    assert torch.equal(sampler(7, seed=8, first=990, labels=labels[990:997], **call), whole[990:997])


@pytest.mark.parametrize("call", [{}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": (20, 40)}], ids=str)
@pytest.mark.parametrize(
    "other", [lambda rows: rows <= 8, lambda rows: rows <= 16, lambda rows: rows == 32, lambda rows: rows == 64, lambda rows: rows < 128]
)
def test_images_do_not_depend_on_how_many_whatever_a_library_does_with_few_rows(call, other, threads):
    """A network whose last bits are others for few rows, as those of a convolution may be."""

    def says(x, t, labels):
        return x * (0.5 + 2**-20 if other(len(x)) else 0.5) + labels.reshape(-1, 1, 1, 1) / 8

    sampler = make(Plain(says), shape=(1, 4, 4), micro_batch="auto")
    whole = sampler(200, labels=1, **call)
    for count in (1, 2, 3):
        threads(count)
        for n in (1, 9, 40, 100):
            assert torch.equal(sampler(n, labels=1, **call), whole[:n]), (count, n)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (1, {1: 1, 2: 2, 3: 4, 8: 8, 16: 16, 64: 64, 1000: 128}),
        (2, {1: 1, 2: 2, 3: 4, 6: 8, 8: 8, 12: 8, 16: 8, 24: 16, 64: 32, 1000: 128}),
        (8, {1: 1, 8: 8, 64: 16, 1000: 128}),
    ],
)
def test_cores_share_a_call_of_few_images(count, sizes, threads):
    """Where the network runs in C, whose calls they can share."""
    assert native.available()
    sampler = make(small_network(), micro_batch="auto")
    threads(count)
    assert {n: sampler.size(False, n) for n in sizes} == sizes


@pytest.mark.parametrize(
    ("n", "count", "sizes"),
    [(32, 2, {16}), (64, 2, {32}), (1, 1, {1}), (4, 2, {2}), (8, 2, {4}), (16, 2, {8}), (17, 2, {16}), (128, 1, {128}), (1000, 2, {128})],
)
def test_few_images_occupy_every_core(n, count, sizes, threads):
    seen = []
    sampler = plain(lambda x, t: seen.append(len(x)) or x * 0.1, micro_batch="auto", shape=(1, 4, 4))
    threads(count)
    sampler(n)  # what it finds out about the network, it finds out once
    seen.clear()
    sampler(n)
    assert set(seen) == sizes
    assert len(seen) == 4 * -(-n // min(sizes))


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_images_do_not_depend_on_threads(network, solver, threads):
    sampler = make(network, solver=solver)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sampler(17, seed=1, labels=2, guidance=1.5))
        assert torch.get_num_threads() == count
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_callback_sees_every_row_of_every_micro_batch_in_order(network, device, threads):
    threads(2)
    sampler, seen = make(network, device), []
    images = sampler(6, labels=0, callback=lambda row, x0: seen.append((row, x0.clone())))
    assert [row for row, _ in seen] == [0, 1, 2, 3] * 2
    assert [len(x0) for _, x0 in seen] == [4] * 4 + [2] * 4
    # The last row of DDIM returns its x_0 itself.
    assert torch.equal(torch.cat([seen[3][1], seen[7][1]]), images)
    assert torch.equal(images, sampler(6, labels=0))


def test_nothing_is_left_changed(network):
    state = torch.random.get_rng_state()
    network.train()
    try:
        image = make(network)(2, labels=0)
        assert network.training
    finally:
        network.eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not image.is_inference()


def test_inference_mode_is_no_other_mode(network):
    """Nor what is made in it a hindrance outside of it."""
    want = make(network)(6, labels=0)
    with torch.inference_mode():
        sampler = make(network)
        first = sampler(6, labels=0)
        sampler.warmup()
        mark = sampler.fingerprint()
    assert not first.is_inference()
    for solver in (None, "unipc"):  # the second of another kind
        images = sampler(6, labels=0, solver=solver)
        with torch.inference_mode():
            assert torch.equal(sampler(6, labels=0, solver=solver), images)
    assert torch.equal(first, want)
    assert sampler.fingerprint() == mark


def test_weights_that_others_take_the_place_of_are_taken_up():
    """By an assignment, or by load_state_dict(assign=True), between two calls."""
    config = UNetConfig(shape=SMALL.shape, patch=2, channels=(32,), blocks=1, middle=0, num_classes=3)
    first, second = small_network(config=config), small_network(config=config)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.1)
    sampler = make(first)
    before = sampler(3, labels=0)
    first.load_state_dict(second.state_dict(), assign=True)
    after = sampler(3, labels=0)
    assert torch.equal(after, make(second)(3, labels=0))
    assert not torch.equal(after, before)


def test_empty(network):
    for options in ({}, {"micro_batch": "auto"}, {"micro_batch": "auto", "solver": "ddpm"}):
        sampler = make(network, **options)
        assert sampler(0).shape == sampler(0, labels=1, guidance=2.0).shape == (0, *SMALL.shape)
        assert sampler(0, noise=lambda row: torch.zeros(0, *SMALL.shape)).shape == (0, *SMALL.shape)
        assert sampler.trajectory(0, 2).x.shape == (2, 0, *SMALL.shape)
        assert sampler.encode(torch.zeros(0, *SMALL.shape)).shape == (0, *SMALL.shape)


def test_another_dtype_leaves_the_model_alone(network, device):
    sampler = make(network, device, dtype=torch.bfloat16)
    image = sampler(4, labels=1)
    assert image.dtype == torch.float32
    assert next(network.parameters()).dtype == torch.float32
    # bf16 keeps 8 bits, over four rows and a handful of layers.
    torch.testing.assert_close(image.cpu(), make(network)(4, labels=1), atol=0.1, rtol=0)


# Another solver for one call


@pytest.mark.parametrize(
    "call",
    [
        {"solver": "heun"},
        {"steps": 7},
        {"solver": "unipc", "steps": 6, "order": 3},
        {"solver": "ddpm", "steps": 9, "variance": "beta"},
        {"eta": 1.0},
        {"spacing": "karras"},
        {"timesteps": [40, 20, 3]},
        {"denoise": False},
        {"prediction": "v"},
        {"clip": 0.3},
    ],
    ids=str,
)
def test_a_call_with_another_solver_is_a_sampler_of_that_solver(network, call, device):
    want = make(network, device, **call)(5, seed=2, labels=1)
    sampler = make(network, device)
    usual = sampler(5, seed=2, labels=1)
    assert torch.equal(sampler(5, seed=2, labels=1, **call), want)
    assert torch.equal(sampler(5, seed=2, labels=1), usual)
    assert not torch.equal(usual, want)


def test_steps_of_a_call_come_before_timesteps_of_the_sampler(network):
    sampler = make(network, timesteps=[40, 20, 3])
    assert torch.equal(sampler(2, labels=1, steps=7), make(network, steps=7)(2, labels=1))


@pytest.mark.parametrize(
    ("own", "call"),
    [
        ({"timesteps": [40, 20, 3]}, {"spacing": "karras"}),
        ({"spacing": "karras"}, {"timesteps": [40, 20, 3]}),
        ({"timesteps": [40, 20, 3], "eta": 0.5}, {"timesteps": [30, 9], "eta": 0.5}),
    ],
    ids=str,
)
def test_the_levels_of_a_call_take_the_place_of_the_samplers(network, own, call):
    assert torch.equal(make(network, **own)(2, labels=1, **call), make(network, **call)(2, labels=1))


def test_options_are_those_of_the_samplers_own_solver(network):
    """A call with another solver has that one's defaults, and a call that names the same has the sampler's."""
    sampler = make(network, solver="ddim", eta=0.7, spacing="karras")
    usual = sampler(3, labels=0)
    assert torch.equal(sampler(3, labels=0, solver="ddim"), usual)
    assert torch.equal(sampler(3, labels=0, solver="euler_ancestral"), make(network, solver="euler_ancestral")(3, labels=0))
    assert torch.equal(sampler(3, labels=0, spacing="trailing"), make(network, eta=0.7, spacing="trailing")(3, labels=0))


# What a network may be


def test_finite_list_of_images_comes_back():
    images = some_images(5).round()
    schedule = Schedule.cosine(200)
    for solver, steps in (("ddpm", 100), ("ddim", 50), ("dpmpp_2m", 20), ("unipc", 20)):
        sampler = Sampler(FiniteList(images, schedule), schedule, shape=SMALL.shape, solver=solver, steps=steps)
        only_of(sampler(40, seed=1), images)


def only_of(made, images):
    """Each is one of the images, and each image is among them."""
    distance = (made[:, None] - images[None]).flatten(2).abs().amax(2)
    assert distance.amin(1).max() < 1e-2
    assert len(distance.argmin(1).unique()) == len(images)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddpm"])
def test_a_flow_ends_at_its_data(solver):
    images, schedule = some_images(5).round(), Schedule.flow(100)
    sampler = Sampler(FiniteList(images, schedule, "flow"), schedule, shape=SMALL.shape, prediction="flow", solver=solver, steps=50)
    only_of(sampler(40, seed=1), images)


@pytest.mark.parametrize("solver", ["heun", "edm_heun", "dpmpp_2m"])
def test_a_denoiser_is_told_sigma(solver):
    images, schedule = some_images(5).round(), Schedule.edm(sigma_max=20.0)
    told, exact = [], FiniteList(images, schedule, "x0")
    sampler = plain(lambda x, t: told.append(t) or exact(x, t), schedule=schedule, prediction="x0", solver=solver, steps=30, micro_batch=40)
    only_of(sampler(40, seed=1), images)
    # k-diffusion's denoisers take sigma; it falls from sigma_max, and the last step starts at sigma_min.
    np.testing.assert_allclose([t[0].item() for t in told], sampler.table.levels[:-1, 1], rtol=1e-6)
    assert told[0][0].item() == pytest.approx(20.0)
    assert all((t == t[0]).all() and t.shape == (40,) for t in told)


@pytest.mark.parametrize("solver", ["heun", "edm_heun", "unipc"])
def test_an_edm_network_is_its_preconditioned_denoiser(network, solver):
    """Karras et al. 2022, equation 7: D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)."""
    data = 0.5

    def raw(x, noise_level):
        return network(x, 100 * noise_level)

    def denoiser(x, sigma):
        sigma = sigma.double().reshape(-1, 1, 1, 1)
        total = sigma**2 + data**2
        answer = raw((x.double() / total.sqrt()).float(), (sigma.flatten().log() / 4).float())
        return (data**2 / total * x.double() + sigma * data / total.sqrt() * answer.double()).float()

    options = {"solver": solver, "steps": 6, "schedule": Schedule.edm(sigma_max=10.0), "churn": 3.0 if solver == "edm_heun" else None}
    options = {k: v for k, v in options.items() if v is not None}
    got = plain(raw, prediction="edm", **options)(5, seed=4)
    want = plain(denoiser, prediction="x0", **options)(5, seed=4)
    assert want.std() > 0.1
    # The two round x, c_in x and the denoiser at different places: fp32 on numbers up to 40, over 11 evaluations.
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_any_module_without_classes():
    def zero(x, t):
        assert t.shape == (len(x),)
        return torch.zeros_like(x)

    x_T = noise.normal(0, range(3), 0, (1, 5, 5), stream="start")
    made = plain(zero, shape=(1, 5, 5), steps=1, clip=None)(3)
    torch.testing.assert_close(made, x_T / SCHEDULE.alpha[-1], atol=1e-5, rtol=1e-5)


WRAPPED = {"sample": lambda m: SimpleNamespace(sample=m), "tuple": lambda m: (m, "more"), "double": lambda m: m.double()}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("micro_batch", [4, "auto"])
def test_an_answer_may_be_wrapped(network, wrap, micro_batch):
    """As diffusers' networks do it, with return_dict and without."""
    want = plain(lambda x, t: network(x, t), micro_batch=micro_batch)(5, seed=1)
    assert torch.equal(plain(lambda x, t: wrap(network(x, t)), micro_batch=micro_batch)(5, seed=1), want)


def test_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_class_embeds=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ).eval()  # fmt: skip
    sampler = make(Plain(lambda x, t, labels: unet(x, t, class_labels=labels), unet))
    labels = torch.tensor([0, 1, 2, 2, 1])
    with torch.no_grad():
        want = by_hand(
            guided(lambda x, t, labels: unet(x, t, class_labels=labels).sample, labels, 2.0), sampler.table, SMALL.shape, range(5), seed=3
        )
    assert (want[2] - want[1]).abs().max() > 0.1
    torch.testing.assert_close(sampler(5, seed=3, labels=labels, guidance=2.0), want, atol=2e-5, rtol=0)
    without = Sampler(Plain(lambda x, t: unet(x, t, class_labels=torch.full_like(t, 3)), unet), SCHEDULE, shape=SMALL.shape, steps=4)
    torch.testing.assert_close(without(2), sampler(2), atol=2e-5, rtol=0)


def test_conditions_made_once_are_those_of_every_row(network):
    """UNet has `condition` and `body`; wrapped it has neither. One matrix product of many rows or of few: rounding, over four rows."""
    hidden = Plain(lambda *given: network(*given), network)
    for call in ({}, {"labels": 2}, {"labels": 1, "guidance": 3.0}):
        torch.testing.assert_close(make(network)(5, **call), make(hidden)(5, **call), atol=2e-5, rtol=0)


def test_a_network_with_classes_sampled_without(network):
    """The null class throughout, in a table of conditions with one column rather than four."""
    torch.testing.assert_close(make(network, num_classes=None)(5), make(network)(5), atol=2e-5, rtol=0)


def test_samples_in_eval_mode_and_leaves_every_mode_as_it_was(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 3, padding=1))
    model[1].eval()
    modes = []
    model.register_forward_hook(lambda m, *_: modes.append([part.training for part in m.modules()]))
    sampler = Sampler(Plain(lambda x, t: model(x), model).to(device), SCHEDULE, shape=SMALL.shape, steps=2, dtype=torch.float32)
    assert torch.equal(sampler(3), sampler(3))
    assert modes
    assert not any(any(m) for m in modes)
    assert [part.training for part in model.modules()] == [True, True, False, True, True]


# Starts other than noise


@pytest.mark.parametrize(("solver", "rows"), [("ddim", slice(4, 10)), ("ddpm", slice(4, 10)), ("heun", slice(8, 19))])
def test_from_images_the_last_part_of_the_steps(network, solver, rows, device):
    sampler = make(network, device, solver=solver, steps=10, spacing="trailing")
    start, labels = some_images(5), torch.tensor([0, 1, 2, 2, 1])
    got = sampler(5, seed=3, first=2, labels=labels, x_start=start, strength=0.6)
    table = solvers.table(solver, SCHEDULE, steps=10, strength=0.6, spacing="trailing")
    assert table.timesteps.tolist() == sampler.table.timesteps[rows].tolist()
    t, z = table.timesteps[0], noise.normal(3, range(2, 7), 0, SMALL.shape, stream="start").double()
    x = SCHEDULE.alpha[t] * start.double() + SCHEDULE.sigma[t] * z
    want = by_hand(guided(network, labels), table, SMALL.shape, range(2, 7), seed=3, x=x)
    # As above, over up to eleven rows.
    torch.testing.assert_close(got.cpu(), want, atol=4e-5 if device == "cpu" else 4e-4, rtol=0)


def test_strength_1_noises_fully(network):
    seen = []
    sampler = make(Plain(lambda x, t, labels: seen.append((t[0].item(), x.clone())) or network(x, t, labels), network))
    start = some_images(4)
    sampler(4, x_start=start, strength=1)
    assert [t for t, _ in seen] == sampler.table.timesteps.tolist()
    z = noise.normal(0, range(4), 0, SMALL.shape, stream="start")
    torch.testing.assert_close(seen[0][1], (SCHEDULE.alpha[49] * start + SCHEDULE.sigma[49] * z).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["x_start", "latents"])
def test_one_start_is_for_all(network, name):
    sampler, start = make(network, solver="ddpm"), some_images(1)
    want = sampler(6, **{name: start.expand(6, -1, -1, -1)})
    assert torch.equal(sampler(6, **{name: start}), want)
    assert torch.equal(sampler(6, **{name: start[0]}), want)
    assert torch.equal(sampler(2, first=4, **{name: start.double()}), want[4:])


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.flow(50), Schedule.edm(50)], ids=lambda s: s.name)
def test_latents_are_noise_of_unit_variance(schedule):
    """Those of the stream give what the stream gives, and the network sees them at the deviation of the schedule's first level."""
    first = []

    def says(x, t):
        first.append(x.clone())
        return 0.1 * x

    sampler = plain(says, schedule=schedule, prediction="x0", solver="euler")
    z = noise.normal(5, range(3), 0, SMALL.shape, stream="start")
    assert torch.equal(sampler(3, seed=5, latents=z), sampler(3, seed=5))
    first.clear()
    other = some_images(4, seed=1)
    sampler(4, latents=other)
    deviation = {"linear": 1.0, "flow": 1.0, "edm": 80.0}[schedule.name]
    torch.testing.assert_close(first[0], deviation * other, rtol=1e-6, atol=0)


# There and back


GAUSSIAN = Schedule.cosine(400)


def round_trip(steps, schedule=GAUSSIAN, **options):
    """Images, their latents, and the images made of these, of data N(0.2, 0.3^2)."""
    network = Gaussian(0.2, 0.3, schedule)
    images = 0.2 + 0.3 * noise.normal(7, range(3), 0, (1, 6, 6)).clamp(-2, 2)
    sampler = Sampler(network, schedule, shape=(1, 6, 6), steps=steps, clip=None, **options)
    latents = sampler.encode(images)
    spacing = {} if schedule.name == "edm" else {"spacing": "logsnr"}
    return images, latents, sampler(3, latents=latents, **spacing)


def error(steps, **options):
    images, _, again = round_trip(steps, **options)
    return (again - images).abs().max().item()


@pytest.mark.parametrize("schedule", [GAUSSIAN, Schedule.edm(400)], ids=lambda s: s.name)
def test_encode_is_the_way_back(schedule):
    errors = [error(steps, schedule=schedule, solver="ddim") for steps in (20, 80, 320)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # first order
    assert errors[2] < 0.02
    second = error(80, schedule=schedule, solver="heun")
    assert second < errors[1] / 4


@pytest.mark.parametrize("schedule", [GAUSSIAN, Schedule.edm(400)], ids=lambda s: s.name)
def test_encode_gives_the_latents_of_the_probability_flow(schedule):
    """Which keeps the number of standard deviations from the mean, from the first level alpha_0 x_0 to the last, which is divided by its own."""
    images, latents, _ = round_trip(200, schedule=schedule, solver="heun")
    (a, s), (a_T, s_T) = ((schedule.alpha[i], schedule.sigma[i]) for i in (0, -1))
    deviations = (a * images - a * 0.2) / np.hypot(a * 0.3, s)
    want = (a_T * 0.2 + deviations * np.hypot(a_T * 0.3, s_T)) / (80.0 if schedule.name == "edm" else 1.0)
    torch.testing.assert_close(latents, want, atol=2e-3, rtol=0)
    assert latents.abs().max() > 1


def test_encode_by_hand(network):
    """From alpha x_0, at the level of timestep 0, with no noise, up to the last level; alpha_0 is 0.95, so that it shows."""
    schedule, images, labels = Schedule.linear(50, 0.1, 0.2), some_images(5), torch.tensor([0, 1, 2, 2, 1])
    sampler = make(network, schedule=schedule, timesteps=[49, 30, 10, 0])
    table = solvers.table("ddim", schedule, timesteps=[49, 30, 10, 0], invert=True, clip=None)
    assert table.timesteps.tolist() == [0, 10, 30]
    want = by_hand(guided(network, labels, 2.0), table, SMALL.shape, range(5), x=schedule.alpha[0] * images.double())
    # alpha falls to 0.02, so errors of fp32 grow some fifty times.
    torch.testing.assert_close(sampler.encode(images, labels=labels, guidance=2.0), want, atol=1e-4, rtol=1e-4)


def test_encode_takes_ddim_where_the_own_solver_adds_noise(network):
    images = some_images(5)
    want = make(network).encode(images, labels=1)
    assert torch.equal(make(network, solver="ddpm").encode(images, labels=1), want)
    assert torch.equal(make(network, solver="ddim", eta=1.0).encode(images, labels=1), want)
    assert not torch.equal(make(network, solver="heun").encode(images, labels=1), want)


def test_encode_clamps_nothing(network):
    images = 3 * some_images(5)
    want = make(network, clip=None).encode(images, labels=1)
    assert want.abs().max() > 2
    assert torch.equal(make(network, clip=0.1).encode(images, labels=1), want)
    assert torch.equal(make(network, threshold=0.5).encode(images, labels=1), want)


@pytest.mark.parametrize("options", [{"spacing": "karras"}, {"timesteps": [49, 30, 10, 2]}], ids=str)
def test_encode_walks_the_samplers_own_levels(network, options):
    images = some_images(2)
    want = make(network).encode(images, **options)
    assert torch.equal(make(network, **options).encode(images), want)


def test_encode_refuses_one_image_without_a_batch(network):
    with pytest.raises(ValueError, match=r"\[N, 3, 8, 8\]|\[1, 3, 8, 8\]|shape \[3, 8, 8\]"):
        make(network).encode(torch.zeros(SMALL.shape))


def test_interpolation_goes_from_one_seeds_image_to_the_others(network, device):
    sampler = make(network, device)
    made = sampler.interpolate((3, 2**40), 6, labels=1)
    assert torch.equal(made[0], sampler(1, seed=3, labels=1)[0])
    assert torch.equal(made[-1], sampler(1, seed=2**40, labels=1)[0])
    ends = noise.normal([3, 2**40], [0, 0], 0, SMALL.shape, stream="start")
    for i in (1, 2, 3, 4):
        alone = sampler(1, latents=slerp(ends[0], ends[1], i / 5), labels=1)[0]
        torch.testing.assert_close(made[i], alone, atol=1e-5, rtol=0)
        assert (made[i] - made[i - 1]).abs().max() > 1e-3


def test_interpolation_with_a_noisy_solver_keeps_the_first_seeds_noise(network):
    sampler = make(network, solver="ddpm")
    made = sampler.interpolate((3, 4), 3, labels=1)
    assert torch.equal(made[0], sampler(1, seed=3, labels=1)[0])
    z = noise.normal(4, [0], 0, SMALL.shape, stream="start")
    assert torch.equal(made[-1:], sampler(1, seed=3, latents=z, labels=1))


# Trajectories


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [([5, 0, 3], (5, 0, 3)), (range(6), (0, 1, 2, 3, 4, 5)), (6, (0, 1, 2, 3, 4, 5)), (3, (1, 3, 5)), (np.int64(2), (2, 5)), (1, (5,))],
)
def test_a_trajectory_has_the_rows_asked_for(network, rows, wanted, threads):
    threads(2)
    sampler, seen = make(network, solver="ddpm", steps=6), {}
    sampler(6, seed=1, labels=2, callback=lambda row, x0: seen.setdefault(row, []).append(x0.clone()))
    got = sampler.trajectory(6, rows, seed=1, labels=2)
    assert got.rows == wanted
    assert torch.equal(got.images, sampler(6, seed=1, labels=2))
    for i, row in enumerate(got.rows):
        assert torch.equal(got.x0[i], torch.cat(seen[row]))
    assert torch.equal(got.x[wanted.index(5)], got.images)


def test_the_states_of_a_trajectory_are_those_of_the_plain_loop(network):
    sampler, path = make(network, solver="ddpm", steps=6), []
    by_hand(
        guided(network, torch.tensor([0, 1, 2])), sampler.table, SMALL.shape, range(3), after=lambda row, x: path.append(x.float()) or x
    )
    got = sampler.trajectory(3, range(6), labels=[0, 1, 2])
    torch.testing.assert_close(got.x, torch.stack(path), atol=2e-5, rtol=0)


def test_a_trajectory_with_a_callback_has_both(network):
    sampler, seen = make(network), []
    got = sampler.trajectory(4, [0, 3], labels=1, callback=lambda row, x0: seen.append(x0.clone()))
    assert len(seen) == 4
    assert torch.equal(got.x0, torch.stack([seen[0], seen[3]]))


# Threads


def test_two_samplers_share_a_model(network, threads):
    """The first is done while the second is at work: modes and numbers of threads hold until then, and come back afterwards."""
    threads(3)
    meet, first_done, modes, started = threading.Barrier(2, timeout=30), threading.Event(), [], [True, True]

    def says(x, t, labels):
        who = int(labels[0])
        if not started[who]:
            started[who] = True
            meet.wait()
        elif who == 1:
            assert first_done.wait(30)
        modes.append((model.training, torch.get_num_threads()))
        return network(x, t, labels)

    model = Plain(says, network)
    samplers = [make(model, steps=1), make(model, steps=5, solver="unipc")]
    first_done.set()
    alone = [sampler(4, labels=who) for who, sampler in enumerate(samplers)]
    first_done.clear()
    modes.clear()
    started[:] = [False, False]
    model.training = True
    made, counts = {}, {}

    def sample(who):
        try:
            made[who] = samplers[who](4, labels=who)
            counts[who] = torch.get_num_threads()
        finally:
            if who == 0:
                first_done.set()

    workers = [threading.Thread(target=sample, args=(who,)) for who in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(made[who], alone[who]) for who in (0, 1))
    assert modes == [(False, 1)] * 6
    assert model.training
    assert not network.training
    later = []
    last = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    last.start()
    last.join()
    assert [counts, later, torch.get_num_threads()] == [{0: 3, 1: 3}, [3], 3]


def test_a_call_that_begins_while_another_is_at_work_keeps_the_number_of_threads(threads):
    """A thread takes its number from the process when it first needs it, which may be while another's call holds it at 1."""
    threads(3)
    working, release, asked, go, found = threading.Event(), threading.Event(), threading.Event(), threading.Event(), []

    def waits(x, t):
        working.set()
        assert release.wait(30)
        return x

    class Seed:
        def __index__(self):
            torch.get_num_threads()  # as many an operation on a tensor does
            asked.set()
            assert go.wait(30)
            return 5

    def sample():
        plain(lambda x, t: x)(1, seeds=[Seed()])
        found.append(torch.get_num_threads())

    first, second = threading.Thread(target=plain(waits), args=(1,)), threading.Thread(target=sample)
    first.start()
    assert working.wait(30)
    second.start()
    assert asked.wait(30)
    release.set()
    first.join()
    go.set()
    second.join()
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [3, 3]


def test_one_sampler_in_two_threads(network):
    """The second call comes while the first is within the network, and waits."""
    inside, overtaken = threading.Event(), threading.Event()

    def says(x, t, labels):
        if int(labels[0]) == 1:
            overtaken.set()
        elif not inside.is_set():
            inside.set()
            overtaken.wait(0.3)
        return network(x, t, labels)

    sampler = make(Plain(says, network), solver="ddpm")
    calls = [{"seed": 5, "labels": 0, "guidance": 2.0}, {"seed": 6, "labels": 1, "solver": "ddim", "steps": 7, "guidance": 3.0}]
    inside.set()
    alone = [sampler(5, **call) for call in calls]
    inside.clear()
    overtaken.clear()
    made = {}
    first, second = (threading.Thread(target=lambda i=i: made.update({i: sampler(5, **calls[i])})) for i in (0, 1))
    first.start()
    assert inside.wait(30)
    second.start()
    first.join()
    second.join()
    assert all(torch.equal(made[i], alone[i]) for i in (0, 1))


# Memory


ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    *(
        RuntimeError(text)
        for text in (
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
            "Triton Error [CUDA]: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        )
    ),
]


def cramped(network, most, error=ROOM[0]):
    """A network that has memory for so many rows."""

    def says(x, t, labels):
        if len(x) > most:
            raise type(error)(*error.args)
        return network(x, t, labels)

    return Plain(says, network)


def warned(sampler, n, **call):
    """The images, and what was said meanwhile."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return sampler(n, **call), [str(w.message) for w in said]


class Scaled(nn.Module):
    """A network of one's own, with a convolution that a CPU would have a faster one for."""

    def __init__(self, channels=64):
        super().__init__()
        self.stem, self.conv, self.head = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, channels), (channels, channels), (channels, 3)))
        self.gain = 1.0

    def forward(self, x, t):
        return self.gain * self.head(self.conv(self.stem(x)))


def says_what_it_does(change):
    """Whether a sampler follows a change of its network that only Python knows of."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Scaled().eval().requires_grad_(False)
    sampler = make(network, num_classes=None)
    before = sampler(3)
    change(network)
    after = sampler(3)
    return not torch.equal(before, after) and torch.equal(after, make(network, num_classes=None)(3))


def test_what_a_networks_python_says_is_heeded():
    """Attributes, hooks, locks, and what a module of one's own reads of another's weights."""
    assert says_what_it_does(lambda network: setattr(network, "gain", 0.5))
    assert says_what_it_does(lambda network: network.conv.register_forward_hook(lambda module, given, made: 0.5 * made))
    assert says_what_it_does(lambda network: setattr(network.conv, "forward", lambda x: 0.5 * x))
    assert says_what_it_does(lambda network: setattr(network, "forward", lambda x, t: 0.5 * x))

    class Odd(Scaled):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, x, t):
            return nn.functional.conv2d(super().forward(x, t), self.stem.weight[:3] * 0.1, padding=1).to(self.conv.weight.dtype)

    assert make(Odd().requires_grad_(False), num_classes=None)(2).isfinite().all()


def test_hooks_of_fastdiffs_own_networks_are_heeded():
    network = small_network(config=UNetConfig(channels=(64, 64), blocks=1, middle=1, num_classes=3))
    sampler = make(network, shape=(3, 16, 16))
    before = sampler(2, labels=1)
    handle = network.head.register_forward_hook(lambda module, given, made: 0.5 * made)
    hooked = sampler(2, labels=1)
    assert not torch.equal(hooked, before) and torch.equal(hooked, make(network, shape=(3, 16, 16))(2, labels=1))
    handle.remove()
    torch.testing.assert_close(sampler(2, labels=1), before, atol=1e-4, rtol=0)


class Half(UNet):
    def forward(self, x, t, labels=None):
        return 0.5 * UNet.forward(self, x, t, labels)


UPON = {
    "hook": lambda network: network.register_forward_hook(lambda module, given, made: 0.5 * made),
    "hook before": lambda network: network.register_forward_pre_hook(lambda module, given: (0.5 * given[0], *given[1:])),
    "hook on what is made once": lambda network: network.time.register_forward_hook(lambda module, given, made: 20 * made),
    "forward of its own": lambda network: setattr(network, "forward", functools.partial(Half.forward, network)),
    "forward of its class's own": lambda network: setattr(network, "__class__", Half),
}


@pytest.mark.parametrize("upon", UPON)
@pytest.mark.parametrize("channels", [(64, 64), (24,)], ids=["in C", "as it is"])
def test_what_is_put_upon_the_network_itself_is_heeded(channels, upon, monkeypatch):
    """Such a network is no longer what its condition and body say. Before the first call, or between two."""
    monkeypatch.setattr(native, "available", lambda: channels == (64, 64))
    network = small_network(config=UNetConfig(channels=channels, blocks=1, middle=1, num_classes=3))
    plain = small_network(config=network.config)
    sampler = make(network, shape=(3, 16, 16), clip=None)
    before = sampler(2, labels=1)
    UPON[upon](network)

    def says(x, t, labels):
        return network(x, t, labels)

    wanted = make(Plain(says, network), shape=(3, 16, 16), clip=None)(2, labels=1)
    for found in (sampler(2, labels=1), make(network, shape=(3, 16, 16), clip=None)(2, labels=1)):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert (wanted - before).abs().max() > 1e-2
    if "hook" in upon:
        for module in network.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        torch.testing.assert_close(sampler(2, labels=1), make(plain, shape=(3, 16, 16), clip=None)(2, labels=1), atol=1e-3, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=r'^compile="fused" does not heed hooks, nor a forward or body of one\'s own'):
            make(network, shape=(3, 16, 16), compile="fused")


@pytest.mark.parametrize("change", ["hook", "padding", "eps"])
def test_what_changes_how_a_network_runs_is_taken_up_between_two_calls(change, threads):
    """Convolutions made seamless, norms, hooks; also for which shapes give the same bits."""
    threads(1)
    network = small_network(config=UNetConfig(channels=(64, 64), blocks=1, middle=1, num_classes=3))
    sampler = make(network, shape=(3, 16, 16), micro_batch="auto")
    before = sampler(1, labels=1)
    for module in network.modules():
        if change == "padding" and isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
        elif change == "eps" and isinstance(module, nn.GroupNorm):
            module.eps = 0.1
    if change == "hook":
        network.head.register_forward_hook(lambda module, given, made: made * (0.5 + 2**-18 if len(made) < 32 else 0.5))
    after = sampler(1, labels=1)
    assert not torch.equal(after, before)
    assert torch.equal(after, make(network, shape=(3, 16, 16), micro_batch="auto")(1, labels=1))
    assert torch.equal(after, sampler(260, labels=1)[:1])


def test_a_network_that_begins_with_zeros_does_not_settle_which_shapes_give_the_same_bits(threads):
    """All that it says is 0, of any number of rows; once it has been trained, last bits may be others for few."""
    gain = nn.Parameter(torch.zeros(()), requires_grad=False)

    def says(x, t):
        return gain * x * (0.5 + 2**-20 if len(x) < 32 else 0.5)

    threads(1)
    sampler = plain(says, nn.ParameterList([gain]), shape=(1, 4, 4), micro_batch="auto")
    for value in (0.0, 0.0, torch.nan, 1.0):
        gain.fill_(value)
        if value == value:
            sampler(1)
            sampler(3)
    whole = sampler(200)
    assert all(torch.equal(sampler(n), whole[:n]) for n in (1, 3, 40))


@pytest.mark.parametrize("noise", [None, lambda row: torch.zeros(6, *SMALL.shape)])
def test_autocast_of_the_caller_has_no_part_in_it(network, noise, threads):
    """Threads of a call's own would not have it."""

    def says(x, t, labels):
        return network(x, t, labels)

    sampler = make(Plain(says, network), micro_batch=2)
    wanted = sampler(6, labels=1, noise=noise)
    for count in (1, 2):
        threads(count)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sampler(6, labels=1, noise=noise), wanted)
            assert torch.is_autocast_enabled("cpu")


def test_names_alone_do_not_make_a_network_one_of_two_parts():
    """condition and body may mean anything."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.condition, self.body = nn.Embedding(500, 8), Scaled(8)

        def forward(self, x, t):
            return x - 0.5 * self.body(x, self.condition(t).mean())

    network = Own().requires_grad_(False)
    assert torch.equal(make(network, num_classes=None)(2), make(Plain(lambda x, t: network(x, t), network), num_classes=None)(2))


class Labelled(nn.Module):
    """A network that adds what an embedding of so many classes says, and notes for how many labels it could."""

    def __init__(self, classes):
        super().__init__()
        self.label, self.asked = nn.Embedding(classes, 3), []

    def forward(self, x, t, labels):
        beside = self.label(labels)[:, :, None, None]
        self.asked.append(len(labels))
        return 0.1 * x + beside


def test_classes_without_a_null_class(device):
    for micro_batch in (4, "auto"):
        sampler = make(Labelled(3).requires_grad_(False), device, micro_batch=micro_batch)
        assert sampler(2, labels=[1, 2]).isfinite().all()
        for call in ({"labels": 1, "guidance": 2.0}, {}):
            with pytest.raises(
                ValueError, match="the network has no class 3, the null class, which guidance and images without labels ask for"
            ):
                sampler(2, **call)
        assert sampler(2, labels=[1, 2]).isfinite().all()


@pytest.mark.parametrize(("classes", "missing"), [(3, True), (4, False), (500, False)])
def test_a_null_class_is_looked_for_without_asking_for_what_is_not_there(classes, missing):
    """As on a GPU, where that would be the end of the process's use of it."""
    model = Labelled(classes).requires_grad_(False)
    network = Network(model, 3, None)
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        if missing:
            with pytest.raises(ValueError, match="the network has no class 3, the null class"):
                network.check_null(x, t)
        else:
            network.check_null(x, t)
    assert model.asked == ([] if missing else [1])
    assert not model.label._forward_pre_hooks


def test_a_call_within_a_call_is_refused(network):
    """Its buffers are in use. A Sampler of its own is none of that."""
    sampler, other = make(network), make(network)
    wanted = sampler(6, labels=1)
    nested = []

    def tries(*_):
        with pytest.raises(ValueError, match=r"in the middle of a call; .* needs a Sampler of its own"):
            sampler(1, labels=2)
        nested.append(other(1, labels=2))

    assert torch.equal(sampler(6, labels=1, callback=tries), wanted)
    assert torch.equal(sampler(6, labels=1, guide=lambda state: (tries(), state.x0)[1]), sampler(6, labels=1, guide=lambda state: state.x0))
    assert torch.equal(sampler(6, labels=1, noise=tries), wanted)
    assert torch.equal(sampler(6, labels=1, noise=lambda row: None, callback=tries), wanted)
    assert all(torch.equal(image, other(1, labels=2)) for image in nested)


def test_noise_that_is_not_finite_is_named_with_its_row(network):
    sampler = make(network, solver="ddpm")
    z = torch.zeros(6, *SMALL.shape)
    with pytest.raises(ValueError, match=r"^noise\(2\) gave numbers that are not finite for sample 4, first in row 2 \(t = "):
        sampler(6, labels=1, noise=lambda row: z.index_fill(0, torch.tensor(4), torch.nan) if row == 2 else z)
    broken = plain(lambda x, t: x * (torch.inf if t[0] < 20 else 0.1), solver="ddpm")
    with pytest.raises(ValueError, match=r"^the network gave numbers that are not finite for sample 0, first in row 3 \(t = 11\)"):
        broken(6, noise=lambda row: z)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"micro_batch": 1 << 62}, "micro_batch is 4611686018427387904; give a whole number from 1 to 1048576"),
        ({"num_classes": 2.5}, "num_classes is 2.5; give a whole number of at least 1, or None"),
        ({"num_classes": True}, "num_classes is True"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"shape": 16}, "shape is 16; give that of an image"),
        ({"shape": "abc"}, "shape is 'abc'"),
        ({"shape": (3, 0, 8)}, "shape is "),
        ({"schedule": None}, "a Sampler takes a torch.nn.Module and a fastdiff.Schedule, not UNet and NoneType"),
        ({"strength": 0.5}, "strength is a call's, with x_start, not the sampler's"),
        ({"invert": True}, "invert is encode's, not the sampler's"),
        ({"clip": "a"}, "clip is 'a'"),
        ({"sigma_data": "a"}, "sigma_data is 'a'"),
        ({"solver": ["ddim"]}, "unknown solver"),
        ({"denoise": "no"}, "denoise is 'no'; give True or False"),
        ({"clipped_epsilon": "no"}, "clipped_epsilon is 'no'; give True or False"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_one_line(network, given, text):
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        make(network, **given)
    assert "\n" not in str(caught.value)


def test_calls_that_make_no_sense_are_one_line(network):
    sampler = make(network)
    assert torch.equal(sampler(2, seed=torch.tensor(3), labels=1), sampler(2, seed=3, labels=1))
    pixels = torch.zeros(2, *SMALL.shape, dtype=torch.uint8)
    for call, text in (
        ({"invert": True}, "invert is encode's"),
        ({"x_start": pixels, "strength": 0.5}, "x_start is torch.uint8; give floating-point numbers, images in [-1, 1]"),
        ({"known": pixels, "mask": pixels}, "known is torch.uint8"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            sampler(2, labels=1, **call)
    with pytest.raises(ValueError, match=r"x_start is torch\.uint8"):
        sampler.encode(pixels, labels=1)
    with pytest.raises(ValueError, match="the network returned int64; it must return floating-point numbers"):
        plain(lambda x, t: x.long())(2)
    double = plain(lambda x, t: 0.1 * x.double())(2)
    torch.testing.assert_close(double, plain(lambda x, t: 0.1 * x)(2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"the network does not work in bfloat16 \(.*\); give dtype=torch.float32"):
        make(Mixed().requires_grad_(False), num_classes=None, dtype=torch.bfloat16)(2)


class Mixed(Scaled):
    def forward(self, x, t):
        return self.head(self.stem(x).float())


@pytest.mark.parametrize("error", ROOM, ids=lambda e: str(e)[:40] or type(e).__name__)
@pytest.mark.parametrize(
    ("n", "micro_batch", "guidance", "most", "sizes"),
    [
        (200, "auto", 1.0, 40, (32,)),  # found out beforehand
        (200, "auto", 2.0, 20, (8,)),
        (7, 6, 1.0, 3, (6, 3)),
        (7, 6, 1.0, 1, (6, 3, 1)),
        (9, 8, 2.0, 8, (8, 4)),  # 8 images with guidance are 16 rows
    ],
)
def test_out_of_memory_halves_the_micro_batch(network, error, n, micro_batch, guidance, most, sizes):
    sampler = make(cramped(network, most, error), micro_batch=micro_batch)
    call = {"seed": 3, "labels": 1, "guidance": guidance}
    got, said = warned(sampler, n, **call)
    assert said == [f"out of memory with {a} images at a time; going on with {b}" for a, b in pairwise(sizes)]
    assert sampler.size(guidance != 1) == sizes[-1]
    hidden = Plain(lambda *given: network(*given), network)
    assert torch.equal(got, make(hidden, micro_batch=sizes[-1])(n, **call))
    assert torch.equal(sampler(n, **call), got)  # and no other word of it


@pytest.mark.parametrize("most", [40, 20, 5])
def test_out_of_memory_with_few_images(network, most):
    """Where the size of the micro-batch is tried out beforehand, with more rows than are needed."""
    sampler = make(cramped(network, most), micro_batch="auto")
    got, _ = warned(sampler, 5, labels=1)
    # Below 16 rows a convolution may sum in another order.
    torch.testing.assert_close(got, make(network, micro_batch=16)(5, labels=1), atol=1e-5, rtol=0)
    assert torch.equal(sampler(5, labels=1), got)


@pytest.mark.parametrize("micro_batch", [2, "auto"])
def test_out_of_memory_with_one_image_is_an_error(network, micro_batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            make(cramped(network, 0), micro_batch=micro_batch)(200)


# Networks that fail


def broken(row, sample, value, seeds=None, **options):
    """A sampler whose network says `value` somewhere in one row, for one sample, which it knows by its starting noise. x_0 is 0 otherwise."""
    seed, ids = (0, range(64)) if seeds is None else (seeds, [0] * len(seeds))
    culprit = noise.normal(seed, ids, 0, (1, 4, 4), stream="start")[sample]
    state = {}

    def says(x, t):
        if t[0] == first:
            state["at"] = (x == culprit).flatten(1).sum(1) > 8
        m = torch.zeros_like(x)
        if t[0] == told[row]:
            m[state["at"], 0, 1, 2] = value
        return m

    sampler = plain(says, shape=(1, 4, 4), prediction="x0", timesteps=[40, 30, 20, 10], **options)
    told = sampler.table.timesteps
    first = told[0]
    return sampler


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options", [{}, {"clip": None}, {"solver": "unipc"}, {"solver": "ddpm"}, {"threshold": 0.9}, {"threshold": 1.0}], ids=str
)
@pytest.mark.parametrize("row", [0, 2, 3])
def test_not_finite_names_row_and_sample(value, options, row):
    with pytest.raises(ValueError, match=rf"not finite for sample 37, first in row {row} \(t = {40 - 10 * row}\)$"):
        broken(row, 37, value, **options)(64)


def test_not_finite_names_the_seed():
    with pytest.raises(ValueError, match=r"not finite for sample 0 of seed 7, first in row 1 \(t = 30\)$"):
        broken(1, 3, torch.nan, seeds=[5, 6, 9, 7, 8, 4])(6, seeds=[5, 6, 9, 7, 8, 4])


def test_not_finite_counts_from_first():
    with pytest.raises(ValueError, match="not finite for sample 13, first in row 0 "):
        broken(0, 13, torch.nan)(6, first=10)


def test_not_finite_where_the_region_is_kept():
    mask = torch.zeros(4, 4)
    mask[1, 2] = 1
    with pytest.raises(ValueError, match="not finite for sample 2, first in row 3 "):
        broken(3, 2, torch.nan)(4, known=torch.zeros(1, 4, 4), mask=mask)


def test_an_error_in_the_network_comes_out():
    def fails(x, t):
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        plain(fails)(200)


@pytest.mark.parametrize(
    ("says", "text"),
    [
        (lambda x, t: x[:, :1], r"the network made \[16, 1, 8, 8\] of \[16, 3, 8, 8\]; it must make the same shape"),
        (lambda x, t: x[:2], r"the network made \[2, 3, 8, 8\] of \[16, 3, 8, 8\]"),
        (lambda x, t: x.sum(), r"the network made \[\] of"),
        (lambda x, t: x.to("meta"), "the network answered on meta what it was asked on cpu"),
        (lambda x, t: None, "the network returned NoneType; it must return a tensor"),
        (lambda x, t: {"out": x}, "the network returned dict"),
        (lambda x, t: x.numpy(), "the network returned ndarray"),
        (lambda x, t: (), "the network returned tuple"),
        (lambda x, t: SimpleNamespace(sample=None), "the network returned NoneType"),
    ],
)
@pytest.mark.parametrize("micro_batch", [16, "auto"])
def test_an_answer_that_does_not_fit(says, text, micro_batch):
    with pytest.raises(ValueError, match=text.replace("16", r"\d+")) as caught:
        plain(says, micro_batch=micro_batch)(1)
    assert "\n" not in str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": "eulr"}, "unknown solver 'eulr'; known: ddpm"),
        ({"steps": 0}, "from 1 to 50"),
        ({"steps": 51}, "from 1 to 50"),
        ({"prediction": "noise"}, "unknown prediction"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"micro_batch": True}, "micro_batch is True"),
        ({"compile": "yes"}, "compile is 'yes'"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99' here"),
        ({"clip": 0}, "clip is 0"),
        ({"eta": 1.0, "solver": "ddpm"}, "does not take eta"),
        ({"threshold": 0}, "threshold is 0; give a quantile"),
        ({"threshold": 1.01}, "threshold is 1.01"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.9"}, "threshold is '0.9'"),
    ],
)
def test_bad_settings(network, options, text):
    with pytest.raises(ValueError, match=text):
        make(network, **options)


IMAGES = torch.zeros(3, *SMALL.shape)
HOLE = IMAGES.clone()
HOLE[1, 0, 2, 3] = torch.inf
ONES = torch.ones(8, 8)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"n": -1}, "number of images is -1"),
        ({"n": 2.0}, "number of images is 2.0"),
        ({"labels": 4}, r"labels must lie in 0 .. 2 \(or be 3"),
        ({"labels": [0, 1]}, r"one per image, \[3\]"),
        ({"labels": 0.5}, "labels must be"),
        ({"labels": "cat"}, "labels is 'cat'"),
        ({"guidance": [1.0, 2.0], "labels": 0}, r"one per image, \[3\]"),
        ({"guidance": float("nan"), "labels": 0}, "finite"),
        ({"guidance": None, "labels": 0}, "guidance is None"),
        ({"guidance": 2.0}, "guidance needs labels"),
        ({"guidance_interval": (5,)}, r"guidance_interval is \(5,\); give \(low, high\)"),
        ({"guidance_interval": 7}, "guidance_interval is 7"),
        ({"guidance_interval": (30, 20)}, r"guidance_interval is \(30, 20\)"),
        ({"guidance_interval": (float("nan"), 20)}, "guidance_interval is "),
        ({"guidance_interval": "no"}, "guidance_interval is 'no'"),
        ({"seeds": [1, 2]}, "one seed per image"),
        ({"seeds": [1, 2, 3], "first": 4}, "either seeds"),
        ({"seeds": [1.5, 2.5, 3.5]}, "whole numbers"),
        ({"seeds": 5}, "one seed per image"),
        ({"seed": 2**64}, "does not fit 64 bits"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "12"}, "seed is '12'"),
        ({"guide": 3}, "guide must be a function of a fastdiff.State"),
        ({"latents": [1, 2]}, r"latents must be a tensor, fp32 \[3, 3, 8, 8\]"),
        ({"latents": IMAGES[:2]}, r"latents has shape \[2, 3, 8, 8\]; give \[3, 3, 8, 8\], or one for all, \[3, 8, 8\]"),
        ({"latents": HOLE}, "latents has numbers that are not finite"),
        ({"x_start": HOLE}, "x_start has numbers that are not finite"),
        ({"x_start": IMAGES[:, :1]}, r"x_start has shape \[3, 1, 8, 8\]"),
        ({"x_start": 0.5}, "x_start must be a tensor"),
        ({"x_start": IMAGES, "latents": IMAGES}, "either x_start, images, or latents, noise"),
        ({"strength": 0.5}, "strength says how much of x_start is to be noised; give x_start too"),
        ({"x_start": IMAGES, "strength": 0}, "strength is 0; give a number above 0"),
        ({"x_start": IMAGES, "strength": 1.5}, "strength is 1.5"),
        ({"x_start": IMAGES, "strength": "half"}, "strength is 'half'"),
        ({"known": IMAGES}, "known and mask go together"),
        ({"mask": ONES}, "known and mask go together"),
        ({"known": IMAGES, "mask": ONES / 2}, "mask must hold 1 where known is to be kept, and 0 elsewhere"),
        ({"known": IMAGES, "mask": HOLE}, "mask must hold 1"),
        ({"known": IMAGES, "mask": torch.ones(4, 4)}, r"mask has shape \[4, 4\]; give \[3, 3, 8, 8\]"),
        ({"known": HOLE, "mask": ONES}, "known has numbers that are not finite"),
        ({"known": IMAGES[0, 0], "mask": ONES}, r"known has shape \[8, 8\]"),
        ({"known": IMAGES, "mask": ONES, "resample": 0}, "resample is 0"),
        ({"known": IMAGES, "mask": ONES, "resample": 3, "solver": "unipc"}, "resampling needs a solver with one row a step"),
        ({"solver": "unipcc"}, r"unknown solver 'unipcc'; .*did you mean unipc\?"),
        ({"solver": "heun", "eta": 1.0}, "solver 'heun' does not take eta"),
        ({"stepz": 3}, "solver 'ddim' does not take stepz"),
        ({"steps": 51}, "steps is 51"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"spacing": "even"}, "unknown spacing 'even'"),
        ({"timesteps": [3, 40]}, "timesteps must be a falling list"),
        ({"clip": -1}, "clip is -1"),
    ],
)
def test_bad_calls(network, call, text):
    with pytest.raises(ValueError, match=text):
        make(network)(**({"n": 3} | call))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.trajectory(3, 0), "rows is 0; give different numbers from 0 to 3, or how many, from 1 to 4"),
        (lambda s: s.trajectory(3, 5), "rows is 5"),
        (lambda s: s.trajectory(3, -1), "rows is -1"),
        (lambda s: s.trajectory(3, [0, 4]), r"rows is \[0, 4\]"),
        (lambda s: s.trajectory(3, [-1]), r"rows is \[-1\]"),
        (lambda s: s.trajectory(3, [1, 1]), r"rows is \[1, 1\]"),
        (lambda s: s.trajectory(3, []), r"rows is \[\]"),
        (lambda s: s.trajectory(3, [1.0]), r"rows is \[1.0\]"),
        (lambda s: s.trajectory(3, 2.5), "rows is 2.5"),
        (lambda s: s.trajectory(3, [0, 1, 7], steps=3), "from 0 to 2"),
        (lambda s: s.trajectory(-1, 2), "number of images is -1"),
        (lambda s: s.trajectory(2.0, 2), "number of images is 2.0"),
        (lambda s: s.interpolate((1, 2), 1), "two seeds and at least 2 images"),
        (lambda s: s.interpolate((1, 2, 3)), "two seeds"),
        (lambda s: s.interpolate(5), "two seeds"),
        (lambda s: s.interpolate((1, 2), 2.5), "at least 2 images"),
        (lambda s: s.interpolate((1, 2.5)), "whole numbers"),
        (lambda s: s.interpolate((1, 2), x_start=IMAGES), "either x_start"),
        (lambda s: s.encode(IMAGES, solver="ddpm"), "solver 'ddpm' adds noise with these options; inversion needs one that does not"),
        (lambda s: s.encode(IMAGES, resample=3), "resampl"),
        (lambda s: s.encode(IMAGES[:, :2]), r"shape \[3, 2, 8, 8\]"),
        (lambda s: s.encode(IMAGES, labels=7), "labels must lie in"),
        (lambda s: s.encode(HOLE), "not finite"),
    ],
)
def test_bad_calls_of_the_other_methods(network, call, text):
    with pytest.raises(ValueError, match=text):
        call(make(network))


def test_labels_for_a_network_without_classes(network):
    with pytest.raises(ValueError, match="has no classes"):
        make(network, num_classes=None)(2, labels=1)
    with pytest.raises(ValueError, match="guidance needs labels, and a network with classes"):
        make(network, num_classes=None)(2, guidance=2.0)


def test_the_start_is_its_own_stream():
    start = noise.normal(0, range(4), 0, SMALL.shape, stream="start")
    step = noise.normal(0, range(4), 0, SMALL.shape, stream="step")
    assert not torch.isclose(start, step).any(1).all()


@pytest.mark.parametrize(("solver", "options"), [("ddpm", {}), ("ddim", {"eta": 0.5}), ("dpmpp_3m_sde", {}), ("unipc", {"order": 3})])
@pytest.mark.parametrize(("n", "micro_batch"), [(5, "auto"), (5, 2), (2, 3), (0, 2)])
def test_given_noise_is_taken_in_place_of_the_streams(n, micro_batch, solver, options):
    """The stream's own noise, given, gives the same bits: x, x0 and history of each micro-batch are carried from row to row."""
    sampler = small_checkpoint().sampler(solver=solver, steps=6, micro_batch=micro_batch, device="cpu", **options)
    call = {"seed": 3, "labels": 1, "guidance": 2.0}
    rows, seen = [], []

    def draw(row):
        rows.append(row)
        return noise.normal(3, range(n), row, (3, 8, 8)) if sampler.table.column("s")[row] else None

    got = sampler(n, noise=draw, callback=lambda row, x0: seen.append((row, len(x0))), **call)
    assert torch.equal(got, sampler(n, **call))
    assert rows == (list(range(6)) if n else []) and [row for row, _ in seen] == sorted(row for row, _ in seen)
    other = sampler(n, noise=lambda row: torch.zeros(n, 3, 8, 8), **call)
    assert torch.equal(other, got) == (not sampler.table.column("s").any() or not n)


def test_given_noise_and_a_known_region():
    sampler = small_checkpoint().sampler(solver="ddpm", steps=4, micro_batch=2, device="cpu")
    known, mask = torch.rand(5, 3, 8, 8) * 2 - 1, (torch.arange(8) < 4).float().expand(1, 8, 8)
    call = {"seed": 1, "known": known, "mask": mask}
    got = sampler(5, noise=lambda row: noise.normal(1, range(5), row, (3, 8, 8)), **call)
    assert torch.equal(got, sampler(5, **call))


def test_errors_in_given_noise_stop_all_workers():
    sampler = small_checkpoint().sampler(solver="ddpm", steps=4, micro_batch=1, device="cpu")
    with pytest.raises(ValueError, match=r"noise\(2\) is \[5, 3, 8\]; it must return a tensor of \[5, 3, 8, 8\], or None"):
        sampler(5, noise=lambda row: torch.zeros(5, 3, 8, 8)[..., 0] if row == 2 else None)
    with pytest.raises(ValueError, match=r"noise\(0\) is 'z'; it must"):
        sampler(5, noise=lambda row: "z")
    with pytest.raises(ZeroDivisionError):
        sampler(5, noise=lambda row: 1 // row)

    def fails(row, x0):
        raise KeyError(row)

    with pytest.raises(KeyError):
        sampler(5, noise=lambda row: None, callback=fails)
    with pytest.raises(ValueError, match="not finite for sample 3"):
        sampler(5, noise=lambda row: torch.zeros(5, 3, 8, 8).index_fill_(0, torch.tensor([3]), torch.nan))


@pytest.mark.parametrize("noise", [None, lambda row: None])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()], ids=repr)
def test_a_thread_that_cannot_be_started_is_not_waited_for(network, noise, error, threads, monkeypatch):
    """Nor do those that were started wait for it."""
    threads(3)
    sampler, start, began = make(network, solver="ddpm", micro_batch=2), threading.Thread.start, []

    def starts(self):
        if self.daemon and (began.append(self) or len(began) == 2):
            raise error
        start(self)

    monkeypatch.setattr(threading.Thread, "start", starts)
    with pytest.raises(type(error), match=str(error) or None):
        sampler(6, labels=1, noise=noise)
    assert len(began) == 2 and not began[0].is_alive()


def test_a_table_of_rows_is_a_solver():
    checkpoint = small_checkpoint()
    sampler = checkpoint.sampler(solver="dpmpp_2m", steps=5, device="cpu")
    wanted = sampler(3, seed=1)
    assert torch.equal(checkpoint.sampler(solver=sampler.table, device="cpu")(3, seed=1), wanted)
    assert torch.equal(checkpoint.sampler(device="cpu")(3, seed=1, solver=sampler.table), wanted)
    for call in ({"steps": 4}, {"eta": 0.5}, {"strength": 0.5, "x_start": torch.zeros(3, 8, 8)}):
        with pytest.raises(ValueError, match="solver is a table of rows, which has its steps and options already"):
            sampler(3, solver=sampler.table, **call)


@pytest.mark.parametrize("solver", solvers.names())
def test_rows_cut_out_of_a_table_that_look_back_are_refused(network, solver):
    """They would see what another call has left in the buffers."""
    table = solvers.table(solver, SCHEDULE, steps=8)
    assert table.severed() is None
    rest = replace(table, timesteps=table.timesteps[5:], rows=table.rows[5:], levels=table.levels[5:])
    look = [name for name in ("c", "h0", "h1", "h2") if rest.column(name).any()]
    sampler = make(network)
    if rest.column("c")[0] or any(rest.column(name)[0] for name in look):
        with pytest.raises(
            ValueError, match=rf"^row 0 of the table looks back on a row before it that there is not; rows of {solver} go together"
        ):
            sampler(2, solver=rest)
    elif not look:
        assert torch.equal(sampler(2, solver=rest), (sampler(9), sampler(2, solver=rest))[1])


def test_seeds_in_a_tensor():
    sampler = small_checkpoint().sampler(steps=2, device="cpu")
    assert torch.equal(sampler(2, seeds=torch.tensor([5, 2**62])), sampler(2, seeds=[5, 2**62]))
    with pytest.raises(ValueError, match=r"seeds has shape \[\] for 1 images"):
        sampler(1, seeds=torch.tensor(5))


def test_a_bar_of_ones_own():
    class Bar:
        done = 0

        def update(self, n=1):
            self.done += n

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

    for call in ({}, {"noise": lambda row: None}):
        bars = []
        small_checkpoint().sampler(steps=4, micro_batch=2, device="cpu")(
            5, progress=lambda total, b=bars: b.append((Bar(), total)) or b[-1][0], **call
        )
        ((bar, total),) = bars
        assert bar.done == total == (4 if call else 12) and bar.closed


ZERO_TERMINAL = ["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc"]


@pytest.mark.parametrize("solver", solvers.names())
def test_a_schedule_that_ends_without_signal(solver):
    """Zero terminal SNR (Lin et al. 2023, algorithm 1): a network of v that knows its one image leads to it from pure noise."""
    root = np.sqrt(Schedule.linear(100).alphas_cumprod)
    schedule = Schedule.from_alphas_cumprod(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
    assert schedule.alpha[-1] == 0 and schedule.log_snr[-1] == -np.inf and schedule.noise_at(99) == (0.0, 1.0)
    if solver not in ZERO_TERMINAL:
        with pytest.raises(ValueError, match="infinite at a timestep without signal"):
            solvers.table(solver, schedule, steps=6, prediction="v", spacing="trailing")
        return
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    table = solvers.table(solver, schedule, steps=6, prediction="v", spacing="trailing")
    assert table.timesteps[0] == 99 and np.isfinite(table.rows[:, 3:]).all()

    class Knows(nn.Module):
        def forward(self, x, t):
            k = torch.from_numpy(np.exp(-np.interp(t, np.arange(99), schedule.log_snr[:99]))).where(t < 99, torch.inf)
            alpha, sigma = (v.float().reshape(-1, 1, 1, 1) for v in ((1 + k**2) ** -0.5, (1 + k**-2) ** -0.5))
            return (alpha * x - image) / sigma

    sampler = Sampler(Knows(), schedule, shape=(3, 4, 4), prediction="v", solver=table, compile=False, device="cpu")
    torch.testing.assert_close(sampler(2, seed=1), image.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at pure noise, without signal, epsilon says nothing"):
        solvers.table(solver, schedule, steps=6, prediction="epsilon", spacing="trailing")
    with pytest.raises(ValueError, match="needs signal and noise at both ends"):
        solvers.table(solver, schedule, steps=6, prediction="v", spacing="logsnr")

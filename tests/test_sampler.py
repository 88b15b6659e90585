"""The sampler: the images it makes, that they depend on seed and id alone, and what it refuses."""

import threading

import pytest
import torch
from helpers import SMALL, FiniteList, small_network
from torch import nn

from fastdiff import Sampler, Schedule, noise, reference, solvers

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


def make(network, device="cpu", **options):
    settings = {"shape": SMALL.shape, "num_classes": 3, "steps": 4, "micro_batch": 4, "dtype": torch.float32, "compile": False} | options
    return Sampler(network, SCHEDULE, device=device, **settings)


def by_hand(network, table, n, seed=0, first=0, labels=None, guidance=1.0):
    """The reverse loop in plain float64 arithmetic on the table's rows, with the public noise stream."""
    ids = range(first, first + n)
    x = noise.normal(seed, ids, 0, SMALL.shape, stream="start").double()
    history = torch.zeros_like(x)
    null = torch.full((n,), 3)
    labels = null if labels is None else labels
    for row, (t, (px, pm, clip, a, b, c, d, s, _)) in enumerate(zip(table.timesteps, table.rows, strict=True)):
        t = torch.full((n,), int(t))
        m = network(x.float(), t, labels).double()
        if guidance != 1:
            free = network(x.float(), t, null).double()
            m = free + guidance * (m - free)
        x0 = (px * x + pm * m).clamp(-clip, clip)
        z = noise.normal(seed, ids, row, SMALL.shape).double()
        x = a * x + b * x0 + c * history + d * m + s * z
        history = x0
    return x.float()


@pytest.mark.parametrize("solver", solvers.names())
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_is_the_plain_loop(network, solver, guidance, device):
    sampler = make(network, device, solver=solver)
    labels = torch.tensor([0, 1, 2, 2, 1])
    got = sampler(5, seed=3, first=7, labels=labels, guidance=guidance)
    want = by_hand(network, sampler.table, 5, 3, 7, labels, guidance)
    # fp32 against fp64 over four rows, each of which divides by alpha >= 0.77 and clamps. On CUDA the normals differ by up to 1e-5 besides.
    torch.testing.assert_close(got.cpu(), want, atol=2e-5 if device == "cpu" else 2e-4, rtol=0)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_images_depend_on_seed_and_id_alone(network, solver, device):
    sampler = make(network, device, solver=solver)
    whole = sampler(23, seed=5, labels=1)
    for n in (1, 4, 7, 22):
        assert torch.equal(sampler(n, seed=5, labels=1), whole[:n])
    assert torch.equal(sampler(8, seed=5, first=10, labels=1), whole[10:18])
    assert torch.equal(sampler(1, seed=5, first=22, labels=1), whole[22:])
    assert not torch.equal(sampler(4, seed=6, labels=1), whole[:4])


def test_images_do_not_depend_on_threads(network):
    sampler = make(network, solver="ddpm")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sampler(17, seed=1, labels=2, guidance=1.5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


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


def test_finite_list_of_images_comes_back():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    schedule = Schedule.cosine(200)
    for solver, steps in (("ddpm", 100), ("ddim", 50), ("dpmpp_2m", 20)):
        sampler = Sampler(FiniteList(images, schedule), schedule, shape=(3, 8, 8), solver=solver, steps=steps, dtype=torch.float32)
        made = sampler(40, seed=1)
        distance = (made[:, None] - images[None]).flatten(2).abs().amax(2)
        assert distance.amin(1).max() < 1e-2, solver
        assert len(distance.argmin(1).unique()) == 5, f"{solver} makes only some of the list"


def test_callback_sees_every_row_of_every_micro_batch(network, device):
    sampler = make(network, device)
    seen = []
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
    assert threading.active_count() == 1 or all(not t.name.startswith("fastdiff") for t in threading.enumerate())


def test_empty(network):
    assert make(network)(0).shape == (0, *SMALL.shape)


def test_any_module_without_classes():
    class Zero(nn.Module):
        def forward(self, x, t):
            assert t.shape == (len(x),)
            return torch.zeros_like(x)

    sampler = Sampler(Zero(), SCHEDULE, shape=(1, 5, 5), steps=1, clip=None)
    x_T = noise.normal(0, range(3), 0, (1, 5, 5), stream="start")
    torch.testing.assert_close(sampler(3), x_T / SCHEDULE.alpha[-1], atol=1e-5, rtol=1e-5)


def test_another_dtype_leaves_the_model_alone(network, device):
    sampler = make(network, device, dtype=torch.bfloat16)
    image = sampler(4, labels=1)
    assert image.dtype == torch.float32
    assert next(network.parameters()).dtype == torch.float32
    # bf16 keeps 8 bits, over four rows and a handful of layers.
    torch.testing.assert_close(image.cpu(), make(network)(4, labels=1), atol=0.1, rtol=0)


def test_compiled(network, device):
    sampler = make(network, device, compile=True)
    torch.testing.assert_close(sampler(5, labels=1), make(network, device)(5, labels=1), atol=1e-5 if device == "cpu" else 1e-3, rtol=0)
    assert torch.equal(sampler(2, first=3, labels=1), sampler(5, labels=1)[3:])


@needs_cuda
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_replay_is_the_plain_launches_and_never_waits(network, solver):
    sampler = make(network, "cuda", solver=solver)
    replayed = sampler(6, labels=1)
    (loops,) = sampler._loops.values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loops[0].advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loops[0].graph = None
    assert torch.equal(sampler(6, labels=1), replayed)


def test_not_finite_names_the_sample():
    x_T = noise.normal(0, range(64), 0, (1, 4, 4), stream="start")[:, 0, 0, 0]
    culprit = int(x_T.argmax())
    limit = float(x_T.sort().values[-2:].mean())

    class Broken(nn.Module):
        def forward(self, x, t):
            return torch.where(x[:, :1, :1, :1] > limit, torch.nan, torch.zeros_like(x))

    # One row: after it, other samples pass the limit too.
    sampler = Sampler(Broken(), SCHEDULE, shape=(1, 4, 4), steps=1, micro_batch=4)
    with pytest.raises(ValueError, match=f"not finite for sample {culprit}$"):
        sampler(64)


def test_an_error_in_the_network_comes_out():
    class Fails(nn.Module):
        def forward(self, x, t):
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        Sampler(Fails(), SCHEDULE, shape=(1, 4, 4))(200)


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
    ],
)
def test_bad_settings(network, options, text):
    with pytest.raises(ValueError, match=text):
        make(network, **options)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"n": -1}, "number of images is -1"),
        ({"n": 2.0}, "number of images is 2.0"),
        ({"labels": 4}, r"labels must lie in 0 .. 2 \(or be 3"),
        ({"labels": [0, 1]}, r"one per image, \[3\]"),
        ({"labels": 0.5}, "labels must be"),
        ({"guidance": [1.0, 2.0], "labels": 0}, r"one per image, \[3\]"),
        ({"guidance": float("nan"), "labels": 0}, "finite"),
        ({"guidance": 2.0}, "guidance needs labels"),
        ({"seeds": [1, 2]}, "one seed per image"),
        ({"seeds": [1, 2, 3], "first": 4}, "either seeds"),
        ({"seed": 2**64}, "does not fit 64 bits"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "12"}, "seed is '12'"),
        ({"seeds": [1.5, 2.5, 3.5]}, "whole numbers"),
        ({"seeds": 5}, "one seed per image"),
        ({"labels": "cat"}, "labels is 'cat'"),
        ({"labels": 0, "guidance": None}, "guidance is None"),
    ],
)
def test_bad_calls(network, call, text):
    with pytest.raises(ValueError, match=text):
        make(network)(**({"n": 3} | call))


def test_a_network_that_changes_the_shape(network):
    with pytest.raises(ValueError, match=r"the network made \[4, 1, 8, 8\] of \[4, 3, 8, 8\]"):
        Sampler(lambda_module(lambda x, t: x[:, :1]), SCHEDULE, shape=SMALL.shape, micro_batch=4)(1)


@pytest.mark.parametrize("compile", [False, True])
def test_samples_in_eval_mode_and_leaves_every_mode_as_it_was(compile, device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 3, padding=1))
    model[1].eval()
    modes = []
    model.register_forward_hook(lambda m, *_: modes.append([part.training for part in m.modules()]))
    whole_model = lambda_module(lambda x, t: model(x), model)
    sampler = Sampler(whole_model.to(device), SCHEDULE, shape=SMALL.shape, steps=2, dtype=torch.float32, compile=compile)
    assert torch.equal(sampler(3), sampler(3))
    assert modes
    assert not any(any(m) for m in modes)
    assert [part.training for part in model.modules()] == [True, True, False, True, True]


def lambda_module(function, *parts):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x, t):
            return function(x, t)

    return Wrapped()


def test_labels_for_a_network_without_classes(network):
    with pytest.raises(ValueError, match="has no classes"):
        make(network, num_classes=None)(2, labels=1)


def test_the_start_is_its_own_stream(network):
    start = noise.normal(0, range(4), 0, SMALL.shape, stream="start")
    step = noise.normal(0, range(4), 0, SMALL.shape, stream="step")
    assert not torch.isclose(start, step).any(1).all()
    assert make(network).table.rows.shape[1] == reference.COLUMNS

"""The public noise functions: the stream against another Philox and the normal law, add_noise against float64."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastdiff.noise import STREAMS, add_noise, counter, normal, slerp
from fastdiff.schedules import Schedule

WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 in Python's whole numbers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def expected_normals(seed, sample, stream, row, numel):
    """The stream as DESIGN states it, in double precision."""
    out = []
    for quad in range(-(-numel // 4)):
        at = (quad, stream << 24 | row, sample % 2**32, (sample >> 32) % 2**32)
        w = philox(at, (seed % 2**32, (seed >> 32) % 2**32))
        for a, b in ((w[0], w[1]), (w[2], w[3])):
            r, theta = math.sqrt(-2 * math.log((a + 0.5) / 2**32)), b * 2 * math.pi / 2**32
            out += [r * math.cos(theta), r * math.sin(theta)]
    return out[:numel]


@pytest.mark.parametrize(
    ("at", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ((WORD,) * 4, (WORD,) * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe0994fdcceb5001e42024126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_this_files_philox_gives_random123s_known_answers(at, key, answer):
    assert "".join(f"{w:08x}" for w in philox(at, key)) == answer


# The bounds: fp32 rounds u (2^-25 of ln u is the most near u = 1, where z is small), theta (pi 2^-24) and three functions of them.
TOLERANCE = 2e-6


def test_the_first_values_are_pinned():
    """What is pinned here fixes every image ever made. The words of the first two are Random123's 6627e8d5 e169c58d."""
    z = normal(seed=0, ids=[0], row=0, shape=(8,))
    pinned = [0.99113768, -0.92466259, -0.61760896, -0.48206859, -0.15363823, 0.18082590, 0.83173510, 0.19743972]
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z[0].double(), pinned, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(expected_normals(0, 0, 0, 0, 8), pinned, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("name", "number"), [("step", 0), ("start", 1), ("training", 2), ("draw", 3)])
def test_values_are_those_of_the_stated_stream(name, number):
    chance = random.Random(number)
    cases = [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**24 - 1), (-1, 2**32, 1), (2**63, 2**32 - 1, 255), (-(2**63), 2**40 + 7, 256)]
    cases += [(chance.getrandbits(64), chance.getrandbits(64), chance.getrandbits(24)) for _ in range(8)]
    for seed, sample, row in cases:
        z = normal(seed, [sample], row, (3, 3, 5), stream=name)
        assert z.shape == (1, 3, 3, 5)
        expected = expected_normals(seed, sample, number, row, 45)
        np.testing.assert_allclose(z.flatten().double(), expected, rtol=0, atol=TOLERANCE, err_msg=str((seed, sample, row)))


def test_the_rarest_values_keep_the_half_word():
    """The first word of this sample is 345 of 2^32, z near 5.7: u = w 2^-32 without its 1/2 would be off by 2.5e-4."""
    sample = 296355
    assert philox((0, 0, sample, 0), (0, 0))[0] == 345
    z = normal(0, [sample], 0, (2,))[0].double()
    np.testing.assert_allclose(z, expected_normals(0, sample, 0, 0, 2), rtol=0, atol=TOLERANCE)
    assert z.norm() > 5.7


def test_streams_are_numbered_once_and_for_all():
    assert STREAMS == {"step": 0, "start": 1, "training": 2, "draw": 3, "known": 4}
    assert counter("training", 5).tolist() == [2 * 2**24 + 5]


# What a value depends on, and what not

IDS = [0, 1, 7, 2**31, 2**32, 2**32 + 1, 2**63 + 5, -1]


def test_a_sample_does_not_depend_on_its_batch():
    alone = {i: normal(3, [i], 2, (3, 5, 5))[0] for i in IDS}
    for ids in (IDS, IDS[::-1], IDS[2:5] * 3):
        for i, z in zip(ids, normal(3, ids, 2, (3, 5, 5)), strict=True):
            assert torch.equal(z, alone[i])


def test_a_value_does_not_depend_on_the_shape_but_on_its_place():
    flat = normal(3, IDS, 2, (77,))
    assert torch.equal(normal(3, IDS, 2, (7, 11)).flatten(1), flat)
    for numel in (1, 2, 3, 4, 5, 75):
        assert torch.equal(normal(3, IDS, 2, (numel,)), flat[:, :numel])
    assert torch.equal(normal(3, IDS, 2, ()), flat[:, 0])


def test_a_seed_per_sample_is_each_seed_by_itself():
    seeds = [0, 2**64 - 1, -5, 2**40, 0, 1, 2, 3]
    together = normal(seeds, IDS, 0, (9,))
    for seed, i, z in zip(seeds, IDS, together, strict=True):
        assert torch.equal(z, normal(seed, [i], 0, (9,))[0])
    assert torch.equal(normal([4] * 8, IDS, 0, (9,)), normal(4, IDS, 0, (9,)))


def test_64_bits_wrap_and_tensors_are_as_good_as_lists():
    assert torch.equal(normal(2**64 - 1, [2**64 - 2], 0, (9,)), normal(-1, [-2], 0, (9,)))
    assert torch.equal(normal(2**63, [0], 0, (9,)), normal(-(2**63), [0], 0, (9,)))
    ids = torch.tensor([5, 6, -1])
    assert torch.equal(normal(1, ids, 0, (9,)), normal(1, [5, 6, 2**64 - 1], 0, (9,)))
    assert torch.equal(normal(torch.tensor([1, 2, 3]), ids[:], 0, (9,)), normal([1, 2, 3], ids, 0, (9,)))
    assert torch.equal(normal(1, torch.arange(20)[::3], 0, (9,)), normal(1, range(0, 20, 3), 0, (9,)))
    assert torch.equal(normal(1, ids.int(), 0, (9,)), normal(1, ids, 0, (9,)))


def test_threads_do_not_change_a_bit():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(normal(11, range(300), 4, (3, 16, 16)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_seeds_ids_rows_streams_and_elements_all_differ():
    """Every bit of seed, id and row counts: no two of these blocks share a value they would not share by chance."""
    blocks = [normal(0, [0], 0, (4096,), stream=name)[0] for name in STREAMS]
    blocks += [normal(1 << b, [0], 0, (4096,))[0] for b in range(64)]
    blocks += [normal(0, [1 << b], 0, (4096,))[0] for b in range(64)]
    blocks += [normal(0, [0], 1 << b, (4096,))[0] for b in range(24)]
    z = torch.stack(blocks)
    products = z @ z.T / 4096 - torch.diag(z.square().mean(1))
    # 157 * 156 / 2 correlations of deviation 1/64 each.
    assert products.abs().max() < 5 / 64
    assert abs(products.square().sum() / (157 * 156) * 4096 - 1) < 5 * math.sqrt(2 / (157 * 78))


def test_empty_batches():
    for ids in ([], torch.empty(0, dtype=torch.int64)):
        assert normal(0, ids, 0, (3, 4, 4)).shape == (0, 3, 4, 4)
    assert normal(0, [1, 2], 0, (3, 0)).shape == (2, 3, 0)


# The law. The stream is fixed, so these pass or fail for good; 5 sigma makes a right stream's failure a matter of 1 in a million.


@pytest.fixture(scope="module")
def sample():
    """z [rows 4, ids 512, elements 768]; ids cross 2^32."""
    return torch.stack([normal(2024, range(2**32 - 256, 2**32 + 256), row, (768,)) for row in range(4)])


@pytest.mark.parametrize(("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)])
def test_moments_are_the_normals(sample, power, moment, variance):
    """E z^p, and Var z^p = E z^2p - (E z^p)^2."""
    z = sample.double()
    assert abs(z.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / z.numel())
    for element in range(4):  # each of the four values that one Philox call gives
        part = z[..., element::4]
        assert abs(part.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / part.numel())


def test_the_distribution_is_the_normal(sample):
    """Kolmogorov-Smirnov: sqrt(n) D exceeds 2.6 with probability 2 exp(-2 * 2.6^2) = 3e-6."""
    for z in (sample.double().flatten(), *(sample[..., i::4].double().flatten() for i in range(4))):
        cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
        n = len(z)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = max((cdf - steps[:-1]).max().item(), (steps[1:] - cdf).max().item())
        assert math.sqrt(n) * distance < 2.6


def test_tails_are_the_normals_and_end_where_the_words_end(sample):
    z = sample.double().abs()
    for bound in (2.0, 3.0, 4.0):
        expected = z.numel() * math.erfc(bound / math.sqrt(2))
        assert abs((z > bound).sum().item() - expected) < 5 * math.sqrt(expected)
    assert z.max() < math.sqrt(2 * 33 * math.log(2)) < 6.77
    assert torch.isfinite(sample).all()


def neighbours(z):
    for lag in (1, 2, 3, 4, 5, 16, 256):
        yield f"elements {lag} apart", z[..., :-lag], z[..., lag:]
    for lag in (1, 2, 32, 256):  # 256: the id's high word changes
        yield f"ids {lag} apart", z[:, :-lag], z[:, lag:]
    for a, b in pairwise(range(4)):
        yield f"rows {a} and {b}", z[a], z[b]
    yield "rows 0 and 3", z[0], z[3]
    for seed in (2023, 2025, 2024 + 2**32):
        yield f"seeds 2024 and {seed}", z[0], normal(seed, range(2**32 - 256, 2**32 + 256), 0, (768,)).double()
    for stream in ("start", "training", "draw"):
        yield f"streams step and {stream}", z[0], normal(2024, range(2**32 - 256, 2**32 + 256), 0, (768,), stream=stream).double()


def test_neighbours_do_not_correlate(sample):
    """Neither values (deviation 1) nor squares (deviation of (a^2 - 1)(b^2 - 1): 2)."""
    for name, a, b in neighbours(sample.double()):
        bound = 5 / math.sqrt(a.numel())
        assert abs((a * b).mean().item()) < bound, name
        assert abs(((a.square() - 1) * (b.square() - 1)).mean().item()) < 2 * bound, name


# Between two noises


@pytest.fixture(scope="module")
def ends():
    return normal([1, 2], [0, 0], 0, (3, 8, 8), stream="start")


def test_slerp_walks_the_great_circle_evenly(ends):
    """On the unit sphere: angles from either end in proportion to the weight, in the plane of the two."""
    a, b = (z.double() / z.double().norm() for z in ends)
    whole = torch.arccos((a * b).sum())
    weights = [-0.5, 0.0, 0.1, 0.25, 0.5, 0.9, 1.0]
    for weight, z in zip(weights, slerp(a, b, weights), strict=True):
        assert z.norm().item() == pytest.approx(1, abs=1e-12)
        assert (z * a).sum().item() == pytest.approx(math.cos(weight * whole), abs=1e-12)
        assert (z * b).sum().item() == pytest.approx(math.cos((1 - weight) * whole), abs=1e-12)


def test_slerp_keeps_unit_variance_where_a_straight_line_does_not(ends):
    z = slerp(*ends, torch.linspace(0, 1, 11))
    lengths = z.flatten(1).norm(dim=1)
    assert (lengths / ends.flatten(1).norm(dim=1).mean() - 1).abs().max() < 0.05
    assert torch.lerp(*ends, 0.5).norm() < 0.8 * lengths[5]
    torch.testing.assert_close(z[[0, -1]], ends, atol=1e-6, rtol=0)


def test_slerp_of_one_weight_or_many_in_any_shape(ends):
    z = slerp(*ends, [[0.2, 0.7, 1.0], [0.0, 0.5, 0.3]])
    assert z.shape == (2, 3, 3, 8, 8)
    assert z.dtype == torch.float32
    for i, weight in enumerate([0.2, 0.7, 1.0, 0.0, 0.5, 0.3]):
        assert torch.equal(z.flatten(0, 1)[i], slerp(*ends, weight))
    assert torch.equal(slerp(*ends.half(), 0.4), slerp(*ends.half().float(), 0.4).half())


def test_slerp_of_parallel_noises_is_the_straight_line(ends):
    z = ends[0]
    torch.testing.assert_close(slerp(z, z, [0.0, 0.3, 1.0]), z.expand(3, -1, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(z, 3 * z, 0.25), 1.5 * z, atol=1e-5, rtol=0)
    assert slerp(z, -z, 0.25).isfinite().all()


# add_noise

SCHEDULE = Schedule.linear(50, 1e-4, 0.2)
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def batch(dtype=torch.float32, n=9, shape=(3, 5, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = (torch.rand(n, *shape, generator=generator) * 2 - 1).to(dtype)
    return x0, torch.randint(0, 50, (n,), generator=generator), torch.randn(n, *shape, generator=generator)


def truth(x0, t, z, schedule=SCHEDULE):
    """alpha, sigma, x0, z and x_t in float64."""
    alpha, sigma = (torch.from_numpy(v.copy())[t].reshape(-1, *[1] * (x0.ndim - 1)) for v in (schedule.alpha, schedule.sigma))
    return alpha, sigma, x0.double(), z.double(), alpha * x0.double() + sigma * z.double()


def one_rounding(actual, exact, scale):
    """One rounding to the result's dtype, on top of fp32 arithmetic on numbers of the size of `scale`: 2^-22 of it."""
    assert actual.dtype in ROUNDING
    smallest = {torch.float16: 2.0**-25}.get(actual.dtype, 0.0)
    bound = exact.abs() * ROUNDING[actual.dtype] * (1 + 1e-5) + scale * 2.0**-22 + smallest
    excess = (actual.double() - exact).abs() - bound
    assert (excess <= 0).all(), excess.max()


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 28, 28), (), (7,)], ids=str)
def test_x_t_is_alpha_x0_plus_sigma_z(dtype, shape):
    x0, t, z = batch(dtype, shape=shape)
    before = x0.clone()
    out = add_noise(x0, t, SCHEDULE, z)
    alpha, sigma, clean, noise, exact = truth(x0, t, z)
    assert out.dtype == dtype
    assert out.shape == x0.shape
    one_rounding(out, exact, alpha * clean.abs() + sigma * noise.abs())
    assert torch.equal(x0, before)


def test_float64_images_stay_float64_at_fp32_precision():
    x0, t, z = batch(torch.float64)
    out = add_noise(x0, t, SCHEDULE, z)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, truth(x0, t, z)[-1], rtol=0, atol=1e-6)


def test_every_timestep_has_its_own_signal_and_noise():
    t = torch.arange(50)
    one, zero = torch.ones(50, 1), torch.zeros(50, 1)
    np.testing.assert_allclose(add_noise(one, t, SCHEDULE, zero)[:, 0], SCHEDULE.alpha, rtol=1e-7)
    np.testing.assert_allclose(add_noise(zero, t, SCHEDULE, one)[:, 0], SCHEDULE.sigma, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_least_noise(dtype):
    """At t = 0 alpha_bar is 0.9999, which bf16 rounds to 1: tables in the images' dtype, as diffusers has them, lose all of sigma."""
    schedule = Schedule.linear()
    x0, t = torch.zeros(4, 3, 16, 16, dtype=dtype), torch.tensor([0, 2, 5, 0])
    z = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    alpha, sigma, clean, noise, exact = truth(x0, t, z, schedule)
    out = add_noise(x0, t, schedule, z)
    one_rounding(out, exact, sigma * noise.abs())
    np.testing.assert_allclose(out.double().flatten(1).std(1) / z.double().flatten(1).std(1), sigma.flatten(), rtol=2e-3)
    bright = torch.full_like(x0, 0.5)
    alpha, sigma, clean, noise, exact = truth(bright, t, z, schedule)
    one_rounding(add_noise(bright, t, schedule, z), exact, alpha * clean.abs() + sigma * noise.abs())


@DTYPES
def test_noise_is_used_as_given_whatever_its_dtype(dtype):
    x0, t, z = batch()
    assert torch.equal(add_noise(x0, t, SCHEDULE, z.to(dtype)), add_noise(x0, t, SCHEDULE, z.to(dtype).float()))


@DTYPES
def test_targets_are_what_a_network_should_say(dtype):
    x0, t, z = batch(dtype)
    alpha, sigma, clean, noise, exact = truth(x0, t, z)
    size = clean.abs() + noise.abs()
    wanted = {"epsilon": noise, "v": alpha * noise - sigma * clean, "x0": clean, "flow": noise - clean}
    for target, value in wanted.items():
        x_t, said = add_noise(x0, t, SCHEDULE, z, target=target)
        assert torch.equal(x_t, add_noise(x0, t, SCHEDULE, z))
        assert said.dtype == dtype
        one_rounding(x_t, exact, size)
        one_rounding(said, value, size)
        # And back: the x0 that a solver would take from it.
        again = {
            "epsilon": lambda x, m: (x - sigma * m) / alpha,
            "v": lambda x, m: alpha * x - sigma * m,
            "x0": lambda x, m: m,
            "flow": lambda x, m: (x - sigma * m) / (alpha + sigma),
        }[target](x_t.double(), said.double())
        error = (again - clean).abs() * (alpha if target == "epsilon" else 1)
        assert (error <= 4 * ROUNDING[dtype] * (1 + size)).all()


@DTYPES
@pytest.mark.parametrize("schedule", [Schedule.flow(50), Schedule.flow(50, shift=3.0), Schedule.edm(50, sigma_max=5.0)], ids=str)
def test_flow_and_edm_noise_by_their_own_alpha_and_sigma(dtype, schedule):
    """Flow matching: x_t = (1 - s) x_0 + s z and u = z - x_0 = dx/ds (Lipman et al. 2023). EDM: x = x_0 + sigma z."""
    x0, t, z = batch(dtype)
    alpha, sigma, clean, noise, exact = truth(x0, t, z, schedule)
    assert torch.equal(alpha, 1 - sigma if schedule.name == "flow" else torch.ones_like(alpha))
    x_t, said = add_noise(x0, t, schedule, z, target="flow")
    one_rounding(x_t, exact, alpha * clean.abs() + sigma * noise.abs())
    one_rounding(said, noise - clean, clean.abs() + noise.abs())
    one_rounding(add_noise(x0, t, schedule, z, target="x0")[1], clean, clean.abs())


def test_the_end_of_a_flow_is_noise_alone():
    x0, _, z = batch()
    assert torch.equal(add_noise(x0, torch.full((9,), 49), Schedule.flow(50), z), z)


def test_seeded_noise_is_the_training_stream_at_row_0():
    x0, t, _ = batch()
    ids = [5, 2**32, 2**64 - 1, -7, 0, 1, 2, 3, 4]
    z = normal(-3, ids, 0, (3, 5, 5), stream="training")
    np.testing.assert_allclose(z[1].flatten().double(), expected_normals(-3, 2**32, 2, 0, 75), rtol=0, atol=TOLERANCE)
    for target in (None, "epsilon", "v", "x0", "flow"):
        made = add_noise(x0, t, SCHEDULE, seed=-3, ids=ids, target=target)
        given = add_noise(x0, t, SCHEDULE, z, target=target)
        for a, b in zip(*((v,) if target is None else v for v in (made, given)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    x_t, epsilon = add_noise(x0, t, SCHEDULE, seed=-3, ids=torch.tensor([5]).expand(9), target="epsilon")
    torch.testing.assert_close(epsilon, z[:1].expand(9, -1, -1, -1), rtol=0, atol=TOLERANCE)
    assert x_t.isfinite().all()


def test_default_ids_count_from_0_and_no_batch_changes_a_sample():
    x0, t, _ = batch()
    whole = add_noise(x0, t, SCHEDULE, seed=2**64 - 1)
    assert torch.equal(whole, add_noise(x0, t, SCHEDULE, seed=-1, ids=range(9)))
    for i in range(9):
        assert torch.equal(whole[i : i + 1], add_noise(x0[i : i + 1], t[i : i + 1], SCHEDULE, seed=-1, ids=[i]))
    assert not torch.equal(whole, add_noise(x0, t, SCHEDULE, seed=0))


def test_views_and_other_integer_timesteps_are_the_same():
    x0, t, z = batch(n=18)
    expected = add_noise(x0[::2].contiguous(), t[::2].contiguous(), SCHEDULE, z[::2].contiguous())
    assert torch.equal(add_noise(x0[::2], t[::2].int(), SCHEDULE, z[::2]), expected)
    last = torch.channels_last
    assert torch.equal(add_noise(x0[::2].to(memory_format=last), t[::2], SCHEDULE, z[::2].to(memory_format=last)), expected)
    seeded = add_noise(x0.contiguous(), t, SCHEDULE, seed=1)
    assert torch.equal(add_noise(x0.to(memory_format=last), t, SCHEDULE, seed=1), seeded)


@DTYPES
@pytest.mark.parametrize("target", [None, "v"])
def test_empty_batch(dtype, target):
    x0, t = torch.empty(0, 3, 4, 4, dtype=dtype), torch.empty(0, dtype=torch.int64)
    for noise in ({"noise": torch.empty(0, 3, 4, 4)}, {"seed": 0}, {"seed": 0, "ids": []}):
        out = add_noise(x0, t, SCHEDULE, **noise, target=target)
        for v in (out,) if target is None else out:
            assert v.shape == x0.shape
            assert v.dtype == dtype


def test_no_gradient_flows():
    x0, t, z = batch()
    x0.requires_grad_()
    assert not add_noise(x0, t, SCHEDULE, seed=0).requires_grad
    assert not add_noise(x0, t, SCHEDULE, z).requires_grad


def noised(**changes):
    x0, t, _ = batch(n=3)
    return add_noise(**{"x0": x0, "t": t, "schedule": SCHEDULE, "seed": 0, **changes})


WIDTH = r"{} does not fit 64 bits; seeds and sample ids lie between -2\^63 and 2\^64 - 1"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: normal(0, [0], 0, (3,), stream="other"), "unknown noise stream 'other'; known: step, start, training, draw"),
        (lambda: normal(0, [0], -1, (3,)), "row is -1; the noise stream has rows 0 to 16777215"),
        (lambda: normal(0, [0], 2**24, (3,)), "row is 16777216; "),
        (lambda: normal(2**64, [0], 0, (3,)), WIDTH.format(2**64)),
        (lambda: normal(0, [-(2**63) - 1], 0, (3,)), WIDTH.format(-(2**63) - 1)),
        (lambda: normal([0, 2**64], [0, 1], 0, (3,)), WIDTH.format(2**64)),
        (lambda: normal([0, 1], [0, 1, 2], 0, (3,)), "2 seeds for 3 ids; give one seed, or one per id"),
        (lambda: normal(torch.zeros(1, dtype=torch.int64), [0, 1, 2], 0, (3,)), "1 seeds for 3 ids"),
        (lambda: noised(t=torch.tensor([0, 1])), r"t is torch.int64 \[2\]; give one integer timestep per sample, \[3\]"),
        (lambda: noised(t=torch.tensor(1)), r"t is torch.int64 \[\]; give one"),
        (lambda: noised(t=torch.zeros(3)), r"t is torch.float32 \[3\]; give one integer"),
        (lambda: noised(t=torch.tensor([0, 50, 1])), "t holds 0 to 50; this schedule has timesteps 0 to 49"),
        (lambda: noised(t=torch.tensor([3, -1, 1])), "t holds -1 to 3; this schedule has timesteps 0 to 49"),
        (lambda: noised(seed=None), "give either noise, a tensor of x0's shape, or seed"),
        (lambda: noised(noise=torch.zeros(3, 3, 5, 5)), "give either noise, a tensor of x0's shape, or seed"),
        (
            lambda: noised(seed=None, noise=torch.zeros(3, 5, 5)),
            r"noise has shape \[3, 5, 5\] and x0 \[3, 3, 5, 5\]; they must be the same",
        ),
        (lambda: noised(ids=[1, 2]), "2 ids for 3 samples"),
        (lambda: noised(ids=torch.arange(4)), "4 ids for 3 samples"),
        (lambda: noised(seed=-(2**64)), WIDTH.format(-(2**64))),
        (lambda: noised(target="score"), "unknown prediction 'score'; known: epsilon, v, x0, flow"),
        (lambda: noised(schedule=Schedule.flow(50), target="v"), "prediction 'v' is defined where .* not for a schedule of 'flow'"),
        (lambda: slerp(torch.zeros(3), torch.zeros(4), 0.5), r"z0 has shape \[3\] and z1 \[4\]; they must be the same"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()

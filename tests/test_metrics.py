"""fastdiff.metrics: against closed forms, loops over all pairs, and what must not change them."""

import math

import numpy as np
import pytest
import torch

from fastdiff import metrics
from fastdiff.metrics import Estimate


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, cov, n=200, seed=0):
    """[n, D] whose own mean and covariance are these, to rounding."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(torch.tensor(cov, dtype=torch.float64)).T + torch.tensor(mean, dtype=torch.float64)


def test_frechet_of_gaussians_with_diagonal_covariances():
    """|m_a - m_b|^2 + sum (s_a - s_b)^2."""
    a = exactly([1.0, -2.0, 0.0], np.diag([4.0, 1.0, 0.25]), seed=1)
    b = exactly([0.0, -2.0, 2.0], np.diag([1.0, 1.0, 9.0]), 300, seed=2)
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + 0 + (0.5 - 3) ** 2, rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    """In two dimensions tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2)."""
    cov_a, cov_b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = cov_a @ cov_b
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    a, b = exactly([0.0, 1.0], cov_a, seed=3), exactly([0.5, 1.0], cov_b, seed=4)
    assert metrics.frechet_distance(a, b) == pytest.approx(0.25 + 3 + 4 - 2 * cross, rel=1e-9)


def test_frechet_ignores_order_turns_and_shifts_and_scales_as_a_square():
    a, b = normal(80, 6, 1) * torch.arange(1, 7), normal(90, 6, 2) + 0.3
    turn, _ = torch.linalg.qr(normal(6, 6, 3))
    value = metrics.frechet_distance(a, b)
    assert value > 1
    for c, d, factor in (
        (b, a, 1),
        (a.flip(0), b.flip(0), 1),
        (a @ turn, b @ turn, 1),
        (a + 1000, b + 1000, 1),
        (3 * a, 3 * b, 9),
        (a.float(), b.float().numpy(), 1),
    ):
        assert metrics.frechet_distance(c, d) == pytest.approx(factor * value, rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def kernel(x, y):
    return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_kernel_distance_is_the_double_loop():
    a, b = normal(7, 3, 1), normal(9, 3, 2) * 1.5
    wanted = (
        mean(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j)
        + mean(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j)
        - 2 * mean(kernel(x, y) for x in a for y in b)
    )
    assert metrics.kernel_distance(a, b) == pytest.approx(wanted, rel=1e-12)
    assert metrics.kernel_distance(b, a) == pytest.approx(wanted, rel=1e-12)


def test_kernel_distance_by_strata_is_the_double_loop_over_classes():
    a, b = normal(7, 3, 1), normal(9, 3, 2)
    of_a, of_b = torch.tensor([0, 1, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0])

    def within(x, stratum):
        total = 0.0
        for k in (0, 1):
            for m in (0, 1):
                p, q = x[stratum == k], x[stratum == m]
                pairs = [kernel(p[i], q[j]) for i in range(len(p)) for j in range(len(q)) if k != m or i != j]
                total += len(p) * len(q) / len(x) ** 2 * mean(pairs)
        return total

    wanted = within(a, of_a) + within(b, of_b) - 2 * mean(kernel(x, y) for x in a for y in b)
    assert metrics.kernel_distance(a, b, (of_a, of_b)) == pytest.approx(wanted, rel=1e-12)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    """Classes far apart: drawn as they come with no strata, drawn evenly with strata. Evenly without strata it would be below zero."""

    def values(even, strata):
        found = []
        for seed in range(300):
            sets = []
            for part in (0, 1):
                g = torch.Generator().manual_seed(2 * seed + part)
                label = torch.arange(20) % 2 if even else torch.randint(0, 2, (20,), generator=g)
                sets.append((torch.randn(20, 2, generator=g, dtype=torch.float64) * 0.3 + 2 * label[:, None], label))
            (a, of_a), (b, of_b) = sets
            found.append(metrics.kernel_distance(a, b, (of_a, of_b) if strata else None))
        found = np.array(found)
        return found.mean(), found.std() / math.sqrt(len(found))

    for even in (False, True):
        value, error = values(even, even)
        assert abs(value) < 3 * error
    value, error = values(True, False)
    assert value < -10 * error


def loops(real, fake, k, j):
    """Precision and recall with k neighbours, density and coverage with j, one pair at a time."""

    def distance(x, y):
        return float((x - y).square().sum())

    def radii(x, k):
        return [sorted(distance(x[i], x[m]) for m in range(len(x)) if m != i)[k - 1] for i in range(len(x))]

    real_k, fake_k, real_j = radii(real, k), radii(fake, k), radii(real, j)
    precision = mean(any(distance(x, r) <= real_k[i] for i, r in enumerate(real)) for x in fake)
    recall = mean(any(distance(r, x) <= fake_k[i] for i, x in enumerate(fake)) for r in real)
    density = sum(distance(x, r) <= real_j[i] for x in fake for i, r in enumerate(real)) / (j * len(fake))
    coverage = mean(any(distance(x, r) <= real_j[i] for x in fake) for i, r in enumerate(real))
    return precision, recall, density, coverage


@pytest.mark.parametrize("whole", [False, True], ids=["apart", "ties and duplicates"])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_manifolds_are_the_loops(monkeypatch, whole, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, fake = normal(40, 2, 1), normal(33, 2, 2) + 0.6
    if whole:  # on a grid: many at equal distances, many at none
        real, fake = (4 * real).round(), (4 * fake).round()
    wanted = loops(real, fake, 2, 3)
    assert all(0 < v < (2 if i == 2 else 1) for i, v in enumerate(wanted))
    assert metrics.manifolds(real, fake, 2, 3) == pytest.approx(wanted, abs=1e-12)
    assert metrics.precision_recall(real, fake, 2) == pytest.approx(wanted[:2], abs=1e-12)
    assert metrics.density_coverage(real, fake, 3) == pytest.approx(wanted[2:], abs=1e-12)
    # A shift that a product of squares alone would drown in.
    assert metrics.manifolds(real + 2**20, fake + 2**20, 2, 3) == pytest.approx(wanted, abs=1e-12)


def test_manifolds_of_the_same_and_of_strangers():
    x = normal(50, 4)
    same, far = metrics.manifolds(x, x), metrics.manifolds(x, x + 100)
    assert same.precision == same.recall == same.coverage == 1 and same.density > 1
    assert tuple(far) == (0, 0, 0, 0)
    # One mode of two: all of it is right, half of the data is not reached.
    two = torch.cat([x, x + 100])
    one = metrics.manifolds(two, x + 1e-3)
    assert one.precision == 1 and one.recall == 0.5 and one.coverage == 0.5


def test_blocks_stay_small(monkeypatch):
    assert 8 * 20_000 <= metrics.BLOCK <= 1 << 25  # several rows of 20,000; a few blocks fit into 1 GB
    largest = []
    squares = metrics._squares
    monkeypatch.setattr(metrics, "_squares", lambda a, b: (largest.append(len(a) * len(b)), squares(a, b))[1])
    monkeypatch.setattr(metrics, "BLOCK", 5000)
    metrics.manifolds(normal(300, 3), normal(400, 3, 1))
    metrics.nearest(normal(300, 3), normal(400, 3, 1))
    assert len(largest) > 60 and max(largest) <= 5000


@pytest.mark.parametrize("block", [60, 1 << 20])
def test_nearest_is_the_loop(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    a, b = normal(25, 5, 1), normal(31, 5, 2)
    b[7] = a[3]
    found = metrics.nearest(a, b)
    every = (a[:, None] - b).square().sum(2).sqrt()
    assert torch.equal(found.which, every.argmin(1)) and torch.allclose(found.distance, every.min(1).values, rtol=1e-12)
    assert found.distance[3] == 0 and found.which[3] == 7
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 3), np.uint8)
    samples = np.random.default_rng(1).integers(0, 256, (9, 3, 4, 3), np.uint8)
    samples[2], images[33], images[12] = images[30], images[30], images[30]
    told = []
    found = metrics.nearest_images(samples, images, told.append)
    rms = np.sqrt(((samples[:, None].astype(float) - images) ** 2).mean((2, 3, 4)))
    assert np.allclose(found.distance, rms.min(1), rtol=1e-12) and found.which.tolist() == rms.argmin(1).tolist()
    assert found.distance[2] == 0 and found.which[2] == 12  # the first of three
    assert sum(told) == 9


def test_novelty_counts_what_is_nearer_than_the_threshold():
    distance = torch.tensor([0.0, 4.999, 5.0, 80.0])
    assert metrics.novelty(distance) == 0.5
    assert metrics.novelty(distance.numpy(), 100) == 0
    assert metrics.novelty([7.0, 9.0]) == 1


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normal(400, 1, 5)
    (found,) = metrics.jackknife(lambda x: float(x.mean()), x)
    assert found.value == float(x.mean())
    # Of G = 20 parts of one size: the deviation of the parts' means over G^(1/2), which is known to a sixth.
    assert found.error == pytest.approx(float(x.std()) / 20, rel=0.35)
    assert metrics.jackknife(lambda x: float(x.mean()), x) == [found]
    assert metrics.jackknife(lambda x: float(x.mean()), x, seed=1) != [found]


def test_jackknife_leaves_each_member_out_once():
    seen, told = [], []

    def statistic(x, y):
        seen.append((set(x.tolist()), set(y.tolist())))
        return float(x.sum()), float(y.sum())

    found = metrics.jackknife(statistic, torch.arange(10.0), torch.arange(100.0, 113.0), groups=5, progress=told.append)
    assert [len(estimate) for estimate in found] == [2, 2] and found[0].value == 45 and len(told) == 5
    for i, whole in enumerate((set(range(10)), set(range(100, 113)))):
        left = [whole - each[i] for each in seen[1:]]
        assert sorted(v for some in left for v in some) == sorted(whole) and max(map(len, left)) - min(map(len, left)) <= 1
    values = [sum(each[0]) for each in seen[1:]]
    assert found[0].error == pytest.approx(math.sqrt(4 / 5 * sum((v - mean(values)) ** 2 for v in values)))


def test_jackknife_by_strata_leaves_out_some_of_each():
    label = torch.arange(40) % 4
    counts = []
    metrics.jackknife(lambda x: counts.append(torch.bincount(x, minlength=4)) or 0.0, label, groups=10, strata=[label])
    assert all(v.tolist() == [9] * 4 for v in counts[1:]) and len(counts) == 11
    # Means of classes far apart: as they come the classes' shares vary, by strata they do not.
    x = label.double() * 10 + normal(40, 1, 1)[:, 0]
    (loose,), (strict,) = (metrics.jackknife(lambda x: float(x.mean()), x, groups=10, strata=s) for s in (None, [label]))
    assert loose.error > 4 * strict.error
    assert isinstance(strict, Estimate)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("the Frechet distance of 6 features needs at least 7 images, but there are 6", lambda: metrics.frechet_distance(normal(6, 6), normal(9, 6))),
        ("the kernel distance needs at least 2 images, but there are 1", lambda: metrics.kernel_distance(normal(9, 2), normal(1, 2))),
        ("kernel distance needs at least 2", lambda: metrics.kernel_distance(normal(3, 2), normal(3, 2), ([0, 0, 1], [0, 0, 0]))),
        ("precision and recall with 3 neighbours needs at least 4", lambda: metrics.precision_recall(normal(9, 2), normal(3, 2))),
        ("density and coverage with 5 neighbours needs at least 6", lambda: metrics.density_coverage(normal(5, 2), normal(9, 2))),
        ("density and coverage needs at least 1", lambda: metrics.density_coverage(normal(9, 2), normal(0, 2))),
        ("nearest neighbour needs at least 1", lambda: metrics.nearest(normal(3, 2), normal(0, 2))),
        ("nearest training image needs at least 1", lambda: metrics.nearest_images(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8))),
        ("both must be uint8", lambda: metrics.nearest_images(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 5, 3), np.uint8))),
        ("novelty needs at least 1", lambda: metrics.novelty([])),
        ("a standard error needs at least 4", lambda: metrics.jackknife(lambda x: 0.0, normal(3, 1))),
        (r"features \[N, D\] and \[M, D\], not of \[5, 2\] and \[5, 3\]", lambda: metrics.kernel_distance(normal(5, 2), normal(5, 3))),
        ("finite numbers", lambda: metrics.frechet_distance(normal(5, 2), torch.full((5, 2), math.nan))),
    ],
)  # fmt: skip
def test_refusals_are_one_line(match, call):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)

"""How near samples come to data, and how near they must not: distances of distributions, manifolds of neighbours, copies. Pure arithmetic in float64.

Features are [N, D], of real images a and of samples b; images uint8 [N, H, W, C]. No result needs more than a few blocks of `BLOCK` numbers at
a time beside its arguments, so 20,000 against 20,000 stays under 1 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20  # numbers in a block of distances, 8 MiB
# Below this root mean square difference, in levels of 255 over pixels and channels, a sample is a copy of its nearest training image. Of the 2,333
# held-out sprites none is nearer to a training image than 5.5, half are further than 36; a training sprite under noise of a standard
# deviation of up to 4 levels is (2.8 to 4.1 from its own), under 8 it no longer is (5.5 and more).
COPY = 5.0
PRECISION_K, COVERAGE_K = 3, 5  # as in the papers
GROUPS = 20
TIE = 1 + 1e-9  # squared distances nearer than this to a radius are at it, whatever the rounding


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


class Nearest(NamedTuple):
    """Distance to the nearest of the others, float64 [N], and which one that is, int64 [N]."""

    distance: Tensor
    which: Tensor


class Manifolds(NamedTuple):
    """Of samples against real images; density may exceed 1, the others are parts of 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(a: Any, b: Any) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of [N, D] and [M, D]: Heusel et al. 2017, equation 6.

    The covariances are those of samples (N - 1). Small samples make it larger, so compare at one size only. ValueError for fewer than D + 1 of
    either, of which a covariance has no full rank.
    """
    a, b = _pair("the Frechet distance", a, b)
    need = a.shape[1] + 1
    for x in (a, b):
        _enough(f"the Frechet distance of {need - 1} features", len(x), need)
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = ((x - m).T @ (x - m) / (len(x) - 1) for x, m in ((a, mean_a), (b, mean_b)))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # root root^T = C_a, and root^T C_b root has the eigenvalues of C_a C_b
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(a: Any, b: Any, strata: tuple[Any, Any] | None = None) -> float:
    """The unbiased MMD^2 of [N, D] and [M, D] under k(x, y) = (x . y / D + 1)^3: Binkowski et al. 2018, equation 4.

    Its expectation is 0 for equal distributions at any sample size, so it may be negative. All pairs are used, not subsets. strata: whole
    numbers [N] and [M], where so many of each class were drawn on purpose: an image then stands for its class, and the terms that it would
    form with itself are those of its class (without this the distance comes out too small). ValueError for fewer than 2 of either, or of a class.
    """
    a, b = _pair("the kernel distance", a, b)

    def total(x: Tensor, y: Tensor) -> float:
        return sum(float((x[rows] @ y.T / x.shape[1] + 1).pow_(3).sum()) for rows in _rows(x, y))

    def within(x: Tensor, stratum: Tensor) -> float:
        whole = total(x, x)
        for k in torch.unique(stratum):
            some = x[stratum == k]
            n = len(some)
            _enough("the kernel distance", n, 2)
            diagonal = float((some.square().sum(1) / x.shape[1] + 1).pow(3).sum())
            own = total(some, some)
            whole += (own - diagonal) * n / (n - 1) - own
        return whole / len(x) ** 2

    for x in (a, b):
        _enough("the kernel distance", len(x), 2)
    of_a, of_b = (torch.zeros(len(x)) if strata is None else torch.as_tensor(strata[i]) for i, x in enumerate((a, b)))
    return within(a, of_a) + within(b, of_b) - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(real: Any, fake: Any, k: int = PRECISION_K) -> tuple[float, float]:
    """Parts of [M, D] samples on the manifold of [N, D] real images, and the other way round: Kynkaanniemi et al. 2019, equations 1 and 2.

    The manifold of a set is the union of the balls about its points that reach to their k-th neighbour in it. ValueError for fewer than
    k + 1 of either.
    """
    found = manifolds(real, fake, k, None)
    return found.precision, found.recall


def density_coverage(real: Any, fake: Any, k: int = COVERAGE_K) -> tuple[float, float]:
    """Naeem et al. 2020, equations 5 and 6, of [N, D] real images and [M, D] samples.

    Density: in how many balls about real images a sample lies, over k; coverage: the part of the balls that holds a sample. A ball
    reaches to the k-th real neighbour. ValueError for fewer than k + 1 real images, or no samples.
    """
    found = manifolds(real, fake, None, k)
    return found.density, found.coverage


def manifolds(real: Any, fake: Any, precision_k: int | None = PRECISION_K, coverage_k: int | None = COVERAGE_K) -> Manifolds:
    """Precision, recall, density and coverage in one pass over the distances; NaN where k is None."""
    real, fake = _pair("precision and recall", real, fake)
    n, m = len(real), len(fake)
    for k, name, counts in ((precision_k, "precision and recall", (n, m)), (coverage_k, "density and coverage", (n,))):
        for count in counts:
            _enough(f"{name} with {k} neighbours", count, 0 if k is None else k + 1)
    _enough("density and coverage", m, 1)
    real, fake = real - real.mean(0), fake - real.mean(0)  # what all have in common would cost digits
    ks = [k for k in (precision_k, coverage_k) if k is not None]
    radii = dict(zip(ks, (TIE * r for r in _radii(real, ks)), strict=True))
    own = None if precision_k is None else TIE * _radii(fake, [precision_k])[0]
    on_real = torch.zeros(m, dtype=torch.bool)
    recalled, covered, balls = 0, 0, 0
    for rows in _rows(real, fake):
        d = _squares(real[rows], fake)  # [n, M]
        if precision_k is not None and own is not None:
            on_real |= (d <= radii[precision_k][rows, None]).any(0)
            recalled += int((d <= own).any(1).sum())
        if coverage_k is not None:
            inside = d <= radii[coverage_k][rows, None]
            covered += int(inside.any(1).sum())
            balls += int(inside.sum())
    return Manifolds(
        math.nan if precision_k is None else float(on_real.double().mean()),
        math.nan if precision_k is None else recalled / n,
        math.nan if coverage_k is None else balls / (coverage_k * m),
        math.nan if coverage_k is None else covered / n,
    )


def nearest(a: Any, b: Any) -> Nearest:
    """For each of [N, D] the nearest of [M, D], by Euclidean distance; the first of several. ValueError for no b."""
    a, b = _pair("the nearest neighbour", a, b)
    _enough("the nearest neighbour", len(b), 1)
    a, b = a - b.mean(0), b - b.mean(0)
    which = torch.empty(len(a), dtype=torch.int64)
    for rows in _rows(a, b):
        which[rows] = _squares(a[rows], b).argmin(1)
    return Nearest((a - b[which]).square().sum(1).sqrt(), which)


def nearest_images(samples: np.ndarray, training: np.ndarray, progress: Callable[[int], object] | None = None) -> Nearest:
    """For each sample, uint8 [N, H, W, C], the nearest training image, uint8 [M, H, W, C], by root mean square difference in levels of 255.

    progress: told how many samples are done with. ValueError for images of two sizes, or no training images.
    """
    if samples.shape[1:] != training.shape[1:] or samples.dtype != np.uint8 or training.dtype != np.uint8:
        raise ValueError(
            f"samples are {samples.dtype} {list(samples.shape)}, training images {training.dtype} {list(training.shape)}; "
            "both must be uint8 [N, H, W, C] of one size"
        )
    _enough("the nearest training image", len(training), 1)
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).flatten(1) for v in (samples, training))
    best, which = torch.full((len(x),), math.inf, dtype=torch.float64), torch.zeros(len(x), dtype=torch.int64)
    size = max(BLOCK // x.shape[1], 1)
    for begin in range(0, len(x), size):
        some = x[begin : begin + size].double()
        mine, index = best[begin : begin + size], which[begin : begin + size]
        for start in range(0, len(y), size):
            other = y[start : start + size].double()
            for rows in _rows(some, other):
                # Whole numbers up to 2^53, so that equal images are at 0 and ties are ties.
                found, at = (some[rows].square().sum(1)[:, None] + other.square().sum(1) - 2 * some[rows] @ other.T).min(1)
                closer = found < mine[rows]
                mine[rows] = torch.where(closer, found, mine[rows])
                index[rows] = torch.where(closer, at + start, index[rows])
        if progress is not None:
            progress(len(some))
    return Nearest((best / x.shape[1]).sqrt(), which)


def novelty(distance: Any, threshold: float = COPY) -> float:
    """1 minus the part of samples nearer than `threshold` to a training image, by the distances of `nearest_images`. ValueError for none."""
    d = torch.as_tensor(distance, dtype=torch.float64)
    _enough("novelty", len(d), 1)
    return 1 - float((d < threshold).double().mean())


def jackknife(
    statistic: Callable[..., Sequence[float] | float],
    *samples: Tensor,
    groups: int = GROUPS,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Estimate]:
    """Value and standard error of a statistic, or of several, by leaving out a part of every sample at a time: Efron & Stein 1981.

    error^2 = (G - 1) / G sum_g (theta_g - mean theta)^2, G = `groups` parts, drawn by `seed`; of small samples as many as have two
    members each. statistic: takes the samples, [N, ...] each, and returns numbers. strata: whole numbers [N] for each sample, where so many
    of each class were drawn on purpose; each part then has its share of each. progress: told of each part. ValueError for fewer than 4 of a sample.
    """
    for x in samples:
        _enough("a standard error", len(x), 4)
    count = min(groups, *(len(x) // 2 for x in samples))
    generator = torch.Generator().manual_seed(seed)
    part = []
    for i, x in enumerate(samples):
        shuffled = torch.randperm(len(x), generator=generator)
        if strata is not None:
            shuffled = shuffled[torch.as_tensor(strata[i])[shuffled].argsort(stable=True)]
        mine = torch.empty(len(x), dtype=torch.int64)
        mine[shuffled] = torch.arange(len(x)) % count
        part.append(mine)

    def values(*x: Tensor) -> list[float]:
        found = statistic(*x)
        return [float(found)] if isinstance(found, int | float) else [float(v) for v in found]

    whole = values(*samples)
    left = []
    for g in range(count):
        left.append(values(*(x[p != g] for x, p in zip(samples, part, strict=True))))
        if progress is not None:
            progress(1)
    spread = torch.tensor(left, dtype=torch.float64).var(0, correction=0) * (count - 1)
    return [Estimate(value, math.sqrt(float(s))) for value, s in zip(whole, spread, strict=True)]


def _pair(what: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
        raise ValueError(f"{what} is of features [N, D] and [M, D], not of {list(a.shape)} and {list(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{what} is of finite numbers, but some features are not")
    return a, b


def _enough(what: str, count: int, need: int) -> None:
    if count < need:
        raise ValueError(f"{what} needs at least {need} images, but there are {count}")


def _rows(a: Tensor, b: Tensor) -> Iterator[slice]:
    size = max(BLOCK // max(len(b), 1), 1)
    return (slice(i, min(i + size, len(a))) for i in range(0, len(a), size))


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [N, M], 0 for equal points whatever the rounding of the product."""
    size = a.square().sum(1)[:, None] + b.square().sum(1)
    d = size - 2 * a @ b.T
    return torch.where(d < 1e-13 * size, 0.0, d)


def _radii(x: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Squared distance of each of [N, D] to its k-th neighbour, not counting itself, [N] for each k."""
    found = torch.empty(len(ks), len(x), dtype=torch.float64)  # small pieces kept between large ones would leave holes between them
    for rows in _rows(x, x):
        d = _squares(x[rows], x)
        # Itself first, even where a rounded distance would come before it.
        d[torch.arange(len(d)), torch.arange(rows.start, rows.stop)] = -1
        smallest = d.topk(max(ks) + 1, dim=1, largest=False, sorted=True).values
        for k, out in zip(ks, found, strict=True):
            out[rows] = smallest[:, k]
    return list(found)

"""What `python -m fastdiff.evaluate --likelihood` says: log p(x) of images, scrambled ones and noise, DDPM's bound, and classes by log p(x | class)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import data, noise
from .checkpoint import Checkpoint
from .data import Dataset
from .likelihood import dequantised, log_likelihood, variational_bound
from .progress import calm_bar
from .sampler import Bar, _evaluating, _share, _threads
from .schedules import whole

# Images in a job: few enough for two cores to end at the same time, and enough to fill the network's matrices. The bound has many evaluations of each.
MICRO_BATCH, BOUND_BATCH = 16, 4
# Rows of the "draw" stream: far above those of the probes, and below the bound's.
SCRAMBLE_ROW, UNIFORM_ROW = 1 << 19, (1 << 19) + 1
# With fewer images a class has no accuracy of its own.
ENOUGH = 4
KINDS = ("images", "scrambled", "noise")


@dataclass(frozen=True)
class Mean:
    """Over the images. error: its standard error."""

    mean: float
    error: float

    @staticmethod
    def of(values: Tensor) -> Mean:
        return Mean(float(values.mean()), float(values.std()) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.error:.3f}"


@dataclass(frozen=True)
class Ordered:
    """How many images are likelier than themselves scrambled, how many of those than noise, and how many are in order throughout."""

    image_over_scrambled: int
    scrambled_over_noise: int
    both: int


@dataclass(frozen=True)
class Parts:
    """The bound of Ho et al. 2020, equation 5, in bits a dimension. prior: L_T. thirds: the sums of L_1 .. L_{T-1} over the noisiest, the middle and
    the cleanest third of the walk. decoder: L_0. terms: L_0 .. L_T, the means over the images, [T + 1]. timesteps: of the walk, rising, [T]; terms[k]
    is of the step that starts at timesteps[k], and the last is the prior's. ends: the part of the images' numbers that are 0 or 255, whose levels the
    decoder takes to reach to infinity, so that they cost next to nothing."""

    total: Mean
    prior: float
    thirds: tuple[float, float, float]
    decoder: float
    terms: tuple[float, ...]
    timesteps: tuple[int, ...]
    ends: float


@dataclass(frozen=True)
class Classes:
    """Classes told by the largest log p(x | class). per_class: (right, images) of those with enough images. error: standard error of `accuracy`."""

    accuracy: float
    error: float
    right: int
    images: int
    chance: float
    per_class: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Report:
    """What was found. bits_per_dim: of the dequantised "images", "scrambled" and "noise". probe_error: what of a single image's is due to the random
    probes, the root of its mean square, or None for a single probe. bound, classes: None where they were not asked for or, of classes, not known."""

    checkpoint: str
    images: str
    count: int
    steps: int
    probes: int
    seed: int
    bits_per_dim: dict[str, Mean]
    probe_error: float | None
    ordered: Ordered
    bound: Parts | None
    classes: Classes | None
    seconds: float

    def json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def text(self) -> str:
        """The lines that a person reads, without a newline at the end."""
        named = {"images": "as they are", "scrambled": "their pixels scrambled", "noise": "uniform noise"}
        lines = [f"log p(x) under {self.checkpoint} of {self.count} images, {self.images}, in bits/dim (the less, the likelier)"]
        lines += [f"  {named[kind]:24}{self.bits_per_dim[kind]}" for kind in KINDS]
        o, n = self.ordered, self.count
        lines.append(
            f"  likelier than scrambled: {o.image_over_scrambled} of {n}; scrambled than noise: {o.scrambled_over_noise} of {n}; both: {o.both} of {n}"
        )
        if self.probe_error is not None:
            lines.append(f"  of a single image's {self.probe_error:.3f} is the error of its {self.probes} probes")
        if self.bound is not None:
            b = self.bound
            lines.append(f"DDPM's bound, {len(b.timesteps)} steps   {b.total}")
            thirds = ", ".join(f"{v:.3f}" for v in b.thirds)
            lines.append(f"  prior {b.prior:.4f}; steps from noise to image by thirds {thirds}; decoder {b.decoder:.3f}")
            if b.total.mean < self.bits_per_dim["images"].mean:
                lines.append(
                    f"  (it may be below the above: it is of whole levels, and 0 and 255, {100 * b.ends:.0f} % of these numbers, reach to infinity)"
                )
        if self.classes is not None:
            c = self.classes
            lines.append(
                f"classes by log p(x | class): {c.right} of {c.images} right, {c.accuracy:.3f} +- {c.error:.3f} (chance {c.chance:.3f})"
            )
            lines += [f"  {name:24}{right} of {images}" for name, (right, images) in c.per_class.items()]
        lines.append(f"{self.seconds:.0f} s; {self.steps} steps, {self.probes} probe{'s' * (self.probes > 1)}, seed {self.seed}")
        return "\n".join(lines)


class _Job(NamedTuple):
    """What one call works out, of the images of `part`. kind: of KINDS, or "bound". label: one class for all, or None for their own."""

    kind: str
    part: slice
    label: int | None
    cost: int


def likelihoods(
    checkpoint: Checkpoint,
    source: str,
    *,
    images: Dataset | None = None,
    count: int = 32,
    steps: int = 8,
    probes: int = 1,
    bound: bool = True,
    classify: bool = True,
    seed: int = 0,
    progress: bool | Bar = False,
) -> Report:
    """How likely a checkpoint takes images to be, themselves, scrambled, and beside noise; and whether it knows their classes.

    source: the checkpoint's name, for the report and for messages. images: of which `count` are taken, even over their classes and always the same
    ones, of the held-out part where there is one; None for the shipped sprites, held out. Classes are the checkpoint's by their names or numbers;
    images without labels are asked for without a class. steps, probes: `log_likelihood`'s; 8 steps come within 0.01 bits/dim of the limit on the
    shipped network. bound: work out `variational_bound` at every timestep; it takes the levels 0 and 255 to reach to infinity, as the paper has it,
    so of images with much white or black it may be below what the flow says of them dequantised. classify: ask for every class, which costs as many
    walks an image. progress: a bar with the time left, or a function that makes one of a number of steps, as Sampler's. On a CPU each core works on
    micro-batches of its own.

    ValueError, one line, for what does not fit.
    """
    began = time.perf_counter()
    if not whole(count) or count < 2:
        raise ValueError(f"a likelihood of {count!r} images has no standard error; give at least 2")
    chosen, labels, name = _chosen(checkpoint, source, images, int(count))
    n = len(chosen)
    pixels = {"images": chosen, "scrambled": _scrambled(chosen, seed), "noise": _uniform(chosen, seed)}
    points = {kind: dequantised(v, seed=seed) for kind, v in pixels.items()}
    clean = data.to_float(chosen.permute(0, 2, 3, 1))
    kinds, network, schedule = len(checkpoint.classes), checkpoint.model, checkpoint.schedule
    device = next(network.parameters()).device
    each: list[int | None] = list(range(kinds)) if classify and labels is not None else [None]
    shared: dict[str, Any] = {"prediction": checkpoint.prediction, "seed": seed}
    # What cannot be asked is refused before anything is worked out.
    log_likelihood(network, schedule, clean[:0], steps=steps, probes=probes, **shared)
    if bound:
        variational_bound(network, schedule, clean[:0], **shared)
    nats = {kind: torch.zeros(n, dtype=torch.float64) for kind in KINDS}
    errors = torch.zeros(n, dtype=torch.float64)
    told = torch.zeros(n, max(kinds, 1), dtype=torch.float64)  # log p(x | class)
    terms = torch.zeros(schedule.timesteps + 1, n, dtype=torch.float64)

    # A step is four evaluations, each with a gradient that costs about as much; the bound's are one a timestep.
    parts, fewer = _runs(n, MICRO_BATCH), _runs(n, BOUND_BATCH)
    jobs = [_Job("bound", part, None, schedule.timesteps * (part.stop - part.start)) for part in fewer if bound]
    asks = [("images", label) for label in each] + [("scrambled", None), ("noise", None)]
    jobs += [_Job(kind, part, label, 8 * steps * (part.stop - part.start)) for part, (kind, label) in itertools.product(parts, asks)]
    total = sum(job.cost for job in jobs)
    bar: Any = (
        progress(total)
        if callable(progress)
        else tqdm(total=total, unit="evaluation", unit_scale=True, disable=not progress, leave=False, **calm_bar())
    )

    def work(i: int) -> Iterator[None]:
        kind, part, label, cost = jobs[i]
        own = None if labels is None else labels[part]
        asked = own if label is None else torch.full((part.stop - part.start,), label)
        given: dict[str, Any] = {"labels": None if asked is None else asked.to(device), "first": part.start, **shared}
        if kind == "bound":
            terms[:, part] = variational_bound(network, schedule, clean[part].to(device), **given).terms.cpu()
        else:
            found = log_likelihood(network, schedule, points[kind][part].to(device), steps=steps, probes=probes, **given)
            log_p, error = found.nats.cpu(), found.error.cpu()
            if not bool(log_p.isfinite().all()):
                raise ValueError(f"{source} gave numbers that are not finite for {kind} {part.start} to {part.stop - 1}")
            if label is not None:
                told[part, label] = log_p
            # Those that were asked for by their own class, or without one.
            mine = torch.ones_like(log_p, dtype=torch.bool) if own is None or label is None else own == label
            nats[kind][part] = torch.where(mine, log_p, nats[kind][part])
            if kind == "images":
                errors[part] = torch.where(mine, error, errors[part])
        bar.update(cost)
        yield

    threads = min(_threads(), len(jobs)) if device.type == "cpu" else 1
    with bar, _evaluating(network):
        _share(range(len(jobs)), [work] * threads)

    dims = chosen[0].numel()
    bits = {kind: -v / (dims * math.log(2)) + math.log2(127.5) for kind, v in nats.items()}
    above, below = bits["images"] < bits["scrambled"], bits["scrambled"] < bits["noise"]
    return Report(
        checkpoint=source, images=name, count=n, steps=int(steps), probes=int(probes), seed=seed,
        bits_per_dim={kind: Mean.of(v) for kind, v in bits.items()},
        probe_error=float(errors.square().mean().sqrt()) / (dims * math.log(2)) if probes > 1 else None,
        ordered=Ordered(int(above.sum()), int(below.sum()), int((above & below).sum())),
        bound=_parts(terms / (dims * math.log(2)), chosen) if bound else None,
        classes=_classes(told, labels, checkpoint.classes) if classify and labels is not None else None,
        seconds=round(time.perf_counter() - began, 3),
    )  # fmt: skip


def _chosen(checkpoint: Checkpoint, source: str, images: Dataset | None, count: int) -> tuple[Tensor, Tensor | None, str]:
    """uint8 [N, C, H, W], their labels by the checkpoint's numbers, and what they are called."""
    dataset = data.load() if images is None else images
    _, held_out = dataset.split()
    name = "of those held out" if len(held_out) else "given"
    if images is None:
        name = "shipped sprites held out of training"
    dataset = held_out if len(held_out) else dataset
    advice = "give images like those it was trained on (--likelihood IMAGES)" if images is None else ""
    (channels, height, width), (own, *size) = dataset.shape, checkpoint.shape
    if (height, width) != tuple(size):
        resize = f"resize them with --size {size[0]}" if size[0] == size[1] else "resize them"
        raise ValueError(f"the images are {width} x {height} pixels and {source} knows {size[1]} x {size[0]}; {advice or resize}")
    if channels != own:
        layers = {1: "grey", 3: "RGB", 4: "RGB with alpha"}
        raise ValueError(
            f"the images have {channels} channels ({layers[channels]}) and {source} knows {own}; {advice or 'convert them, or give image files'}"
        )
    if len(dataset) < 2:
        raise ValueError(f"{len(dataset)} images are too few for a likelihood with its standard error; give at least 2")
    labels = None
    if checkpoint.classes and dataset.labels is not None:
        labels = _numbers(dataset, checkpoint.classes, source, advice)[dataset.labels]
    chosen = _even(labels, len(dataset), count)
    pixels = torch.from_numpy(dataset.images[chosen]).permute(0, 3, 1, 2).contiguous()
    return pixels, None if labels is None else torch.from_numpy(labels[chosen]), name


def _runs(n: int, size: int) -> list[slice]:
    """0 .. n - 1 in runs of at most so many."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _numbers(dataset: Dataset, classes: tuple[str, ...], source: str, advice: str) -> np.ndarray:
    """The checkpoint's number of each class of the images, int64 [classes]; -1 for one that no image is of."""
    found: np.ndarray = np.full(len(dataset.classes), -1)
    for i in np.unique(dataset.labels) if dataset.labels is not None else ():
        name = dataset.classes[i]
        if name in classes:
            found[i] = classes.index(name)
        elif name.isdecimal() and int(name) < len(classes):
            found[i] = int(name)
        else:
            known = ", ".join(classes)
            raise ValueError(
                f"the images have a class {name!r} that {source} lacks (it has: {known}); {advice or 'rename it, or give no classes'}"
            )
    return found


def _even(labels: np.ndarray | None, n: int, count: int) -> np.ndarray:
    """Places of `count` of n images, spread over the list, and evenly over the classes as far as each has images; rising."""
    if labels is None:
        return _spread(n, min(count, n))
    members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    quotas, left = [0] * len(members), min(count, n)
    while left:
        for k, some in enumerate(members):
            if left and quotas[k] < len(some):
                quotas[k], left = quotas[k] + 1, left - 1
    chosen: np.ndarray = np.sort(np.concatenate([some[_spread(len(some), q)] for some, q in zip(members, quotas, strict=True)]))
    return chosen


def _spread(n: int, count: int) -> np.ndarray:
    """`count` different places of n, the first and the last among them."""
    places: np.ndarray = np.linspace(0, n - 1, count).round().astype(np.int64)
    return places


def _scrambled(images: Tensor, seed: int) -> Tensor:
    """The pixels of each image in an order of its own."""
    n, channels, height, width = images.shape
    order = noise.normal(seed, range(n), SCRAMBLE_ROW, (height * width,), stream="draw").argsort(dim=1, stable=True)
    mixed: Tensor = images.flatten(2).gather(2, order[:, None].expand(n, channels, -1)).reshape(images.shape)
    return mixed


def _uniform(images: Tensor, seed: int) -> Tensor:
    """Noise in their place, every level as likely."""
    z = noise.normal(seed, range(len(images)), UNIFORM_ROW, images.shape[1:], stream="draw")
    levels: Tensor = (torch.special.ndtr(z.double()) * 256).clamp(0, 255).to(torch.uint8)
    return levels


def _parts(terms: Tensor, images: Tensor) -> Parts:
    """terms: bits a dimension, [T + 1, N]. images: uint8, of the same N."""
    mean, timesteps = terms.mean(1), len(terms) - 1
    # The steps alone, the noisiest first.
    late, middle, early = (float(part.sum()) for part in mean[1:-1].flip(0).tensor_split(3))
    values = tuple(mean.tolist())
    ends = float(((images == 0) | (images == 255)).double().mean())
    return Parts(Mean.of(terms.sum(0)), values[-1], (late, middle, early), values[0], values, tuple(range(timesteps)), ends)


def _classes(told: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Classes:
    """told: log p(x | class), [N, classes]."""
    right = told.argmax(1) == labels
    p, n = float(right.double().mean()), len(labels)
    sizes = torch.bincount(labels, minlength=len(classes)).tolist()
    each = {name: (int(right[labels == k].sum()), sizes[k]) for k, name in enumerate(classes) if sizes[k] >= ENOUGH}
    # Of n - 1, as the other means have it.
    return Classes(p, math.sqrt(p * (1 - p) / (n - 1)), int(right.sum()), n, 1 / len(classes), each)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

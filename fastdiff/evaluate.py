"""Say how good samples are: `python -m fastdiff.evaluate`. Every number stands beside its floor, held-out images in place of samples."""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from . import classifier, cli, data, densities, metrics, solvers, ways
from .checkpoint import Checkpoint, load
from .devices import pick_device
from .files import atomic_write, make_folder
from .metrics import Estimate
from .progress import calm_bar

PROG = "python -m fastdiff.evaluate"
SOLVER, STEPS, GUIDANCE = "unipc", 10, 2.0
COUNT, SWEEP_COUNT = 800, 400
EVALUATIONS = (5, 7, 10, 14, 20, 30)
PAIRS = 16
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
# Key, name, what is better, decimals; parts of 1 are printed as percentages.
METRICS = (
    ("frechet", "Fréchet distance", "lower", 2),
    ("kernel", "kernel distance", "lower", 4),
    ("precision", "precision", "higher", None),
    ("recall", "recall", "higher", None),
    ("density", "density", "higher", 3),
    ("coverage", "coverage", "higher", None),
    ("accuracy", "class as asked for", "higher", None),
    ("novelty", "novelty", "higher", None),
)
RULE = (
    "the fewest network evaluations whose Fréchet distance is above the least in the sweep by at most one standard error of their difference; "
    "of several, the one with the least distance"
)


@dataclass(frozen=True)
class Features:
    """What is measured by: `module` maps images to features; `classifier` is it, where it is one of ours."""

    name: str
    module: nn.Module
    classifier: classifier.Classifier | None = None


class Inception(nn.Module):
    """torch-fidelity's Inception v3, pool features [N, 2048], as a module of images in [-1, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(((x + 1) * 127.5).round().to(torch.uint8))[0]
        return found


def find_features(spec: str | None, device: torch.device) -> Features:
    """The shipped classifier for None, a classifier's file, "inception", or MODULE:NAME. ValueError, one line, for what cannot be had."""
    if spec is None or spec.endswith(".safetensors"):
        model = classifier.load_classifier(spec)
        name = "the shipped classifier" if spec is None else spec
        return Features(name, model.to(device), model)
    if spec == "inception":
        return Features("Inception v3", _inception().to(device))
    where, colon, name = spec.partition(":")
    if not (colon and where and name):
        raise ValueError(f'--features {spec}: give MODULE:NAME of a torch module, a classifier\'s .safetensors file, or "inception"')
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(where))
        if not isinstance(found, nn.Module):
            found = found()  # type: ignore[operator]
    except Exception as e:  # whatever the user's code raises
        raise ValueError(f"--features {spec}: cannot be had ({type(e).__name__}: {' '.join(str(e).split())[:160]})") from None
    if not isinstance(found, nn.Module):
        raise ValueError(f"--features {spec}: is a {type(found).__name__}; it must be a torch.nn.Module, or a function that returns one")
    return Features(spec, found.to(device))


def _inception() -> nn.Module:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("--features inception: needs torch-fidelity, which is not installed (pip install torch-fidelity); or leave it out")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not weights.is_file():
        raise ValueError(
            f"--features inception: nothing is downloaded here; put torch-fidelity's {INCEPTION_WEIGHTS} into {weights.parent}"
        )
    extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    return Inception(extractor("inception", ["2048"], feature_extractor_weights_path=str(weights)))


def even(room: np.ndarray, count: int) -> np.ndarray:
    """`count` shared out over classes with `room` for so many, int64 [K]: as even as there is room, or all there is room for."""
    quota = np.zeros_like(room)
    for _ in range(min(count, int(room.sum()))):
        quota[np.where(quota < room, quota, np.iinfo(np.int64).max).argmin()] += 1
    return quota


def draw(part: data.Dataset, quota: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Numbers of so many images of each class, or of quota[0] where there are none, without repeats, in the order of the classes."""
    labels = np.zeros(len(part), np.int64) if part.labels is None else part.labels
    return np.concatenate([np.sort(rng.choice(np.flatnonzero(labels == k), n, replace=False)) for k, n in enumerate(quota)])


def pick(part: data.Dataset, chosen: np.ndarray) -> data.Dataset:
    """Those images, by number or bool."""
    return data.Dataset(part.images[chosen], None if part.labels is None else part.labels[chosen], part.classes)


def room(part: data.Dataset) -> np.ndarray:
    """Images of each class, int64 [K]; [1] of all where there are no classes."""
    return np.array([len(part)]) if part.labels is None else np.bincount(part.labels, minlength=len(part.classes))


@dataclass(frozen=True)
class Result:
    """Estimates by the keys of METRICS; nearest: the nearest training image of each; per_class: {class: part that is as asked for}."""

    estimates: dict[str, Estimate]
    nearest: metrics.Nearest
    per_class: dict[str, float]

    @property
    def copies(self) -> int:
        return int((self.nearest.distance < metrics.COPY).sum())


class Yardstick:
    """Training images to compare with, and what other images come to, as many: held-out ones, the floor, and training images once more.

    Classes are drawn as evenly as the held-out images go. Where none are held out, half of the images are taken as if they were. `again`
    is None where too few training images are left over.
    """

    def __init__(self, dataset: data.Dataset, features: Features, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.features, self.seed, self.held_out = features, seed, dataset.test is not None and bool(dataset.test.any())
        self.all = dataset.split()[0] if self.held_out else dataset
        if not self.held_out:
            order = rng.permutation(len(dataset))
            if dataset.labels is not None:
                order = order[dataset.labels[order].argsort(kind="stable")]
            apart = np.zeros(len(dataset), bool)
            apart[order[1::2]] = True
            dataset = data.Dataset(dataset.images, dataset.labels, dataset.classes, apart)
        self.learn, self.test = dataset.split()
        self.quota = even(np.minimum(room(self.learn), room(self.test)), count)
        self.count = int(self.quota.sum())
        chosen = draw(self.learn, self.quota, rng)
        self.real, self._others = pick(self.learn, chosen), pick(self.test, draw(self.test, self.quota, rng))
        left = pick(self.learn, ~np.isin(np.arange(len(self.learn)), chosen))
        self._more = pick(left, draw(left, self.quota, rng)) if (room(left) >= self.quota).all() else None

    @property
    def labels(self) -> np.ndarray | None:
        """The classes that samples are to have, int64 [count], in their order."""
        return self.real.labels

    def check(self) -> None:
        """ValueError, one line, where there are too few images for a metric, or the features take no such images."""
        model = self.features.classifier
        if model is not None and model.shape != self.real.shape:
            raise ValueError(
                f"{self.features.name} is for images of {_size(model.shape)}, but these are {_size(self.real.shape)}; "
                f"give --size {model.shape[1]}, or other features (--features)"
            )
        width = classifier.features(self.features.module, self.real.images[:1]).shape[1]
        # A standard error leaves one part in GROUPS out.
        for what, need in (
            ("precision and recall", 16),
            (f"the Frechet distance of {width} features", width + 1 + -(-width // (metrics.GROUPS - 1)) + 1),
        ):
            if self.count < need:
                raise ValueError(
                    f"{what} needs at least {need} images to compare, but there are {self.count}; give more (--count, --samples, --data)"
                )

    def measure_floor(self, progress: Callable[[float], object] = lambda n: None) -> None:
        """Features of the training images, and `floor` and `again`. progress is told of 7 N in all."""
        self.found = classifier.features(self.features.module, self.real.images, progress)
        strata = self.labels
        self.floor = self.measure(self._others.images, strata, strata, self.learn.images, progress)
        self.again = None if self._more is None else self.measure(self._more.images, strata, strata, self.learn.images, progress)

    def measure(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        strata: np.ndarray | None = None,
        training: np.ndarray | None = None,
        progress: Callable[[float], object] = lambda n: None,
    ) -> Result:
        """Of samples, uint8 [N, H, W, C], asked to be of `labels`, int64 [N]. strata: their classes, where so many of each were made on purpose.

        progress is told of 3 N in all.
        """
        found = classifier.features(self.features.module, images, progress)
        near = metrics.nearest_images(images, self.all.images if training is None else training, progress)
        own, of = (np.zeros(len(x), np.int64) if y is None else y for x, y in ((self.found, self.labels), (found, strata)))
        if min(self.quota[self.quota > 0], default=0) < 3:  # left out of one part, and still a pair
            own, of = np.zeros_like(own), np.zeros_like(of)

        def statistic(a: Tensor, b: Tensor) -> Sequence[float]:
            (a, of_a), (b, of_b) = ((x[:, :-1], x[:, -1]) for x in (a, b))
            return metrics.frechet_distance(a, b), metrics.kernel_distance(a, b, (of_a, of_b)), *metrics.manifolds(a, b)

        parts = metrics.jackknife(
            statistic, *(torch.cat([x, torch.from_numpy(y)[:, None]], dim=1) for x, y in ((self.found, own), (found, of))),
            seed=self.seed, strata=(own, of), progress=lambda n: progress(n * len(images) / metrics.GROUPS),
        )  # fmt: skip
        estimates = dict(zip((key for key, *_ in METRICS), parts, strict=False))
        per_class = {}
        model = self.features.classifier
        if model is not None and labels is not None and model.classes == self.real.classes:
            right = classifier.classify(model, found).numpy() == labels
            estimates["accuracy"] = part_of(right)
            per_class = {name: float(right[labels == k].mean()) for k, name in enumerate(model.classes) if (labels == k).any()}
        estimates["novelty"] = part_of(near.distance.numpy() >= metrics.COPY)
        return Result(estimates, near, per_class)


def part_of(yes: np.ndarray) -> Estimate:
    """The part of [N] that is True, and its standard error, (p (1 - p) / N)^(1/2)."""
    p = float(yes.mean())
    return Estimate(p, math.sqrt(p * (1 - p) / len(yes)))


def read_images(source: str, size: int | None, rgb: bool, what: str) -> data.Dataset:
    """`data.load`, resized to size x size where asked; greyscale and alpha arrays as RGB where asked. One line of warning for files that were."""
    dataset = data.load(source, size=size if os.path.isdir(source) else None)
    if os.path.isdir(source) and (odd := _odd_files(Path(source))):
        warnings.warn(f"{source}: of {len(dataset)} images {odd}; all are read as RGB on white", stacklevel=2)
    images = dataset.images
    if rgb and images.shape[3] != 3:
        images = np.stack([np.asarray(data.grid(image[None], 1)) for image in images])  # on white
    if size is not None and images.shape[1:3] != (size, size):
        pictures = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)
        images = np.stack([np.asarray(p.resize((size, size), Image.Resampling.BOX)) for p in pictures])
        images = images[..., None] if images.ndim == 3 else images
    return data.Dataset(np.ascontiguousarray(images), dataset.labels, dataset.classes, dataset.test)


def _odd_files(folder: Path) -> str:
    """How many image files are greyscale, have alpha or a palette, in words."""
    found: collections.Counter[str] = collections.Counter()
    for each in [
        *folder.iterdir(),
        *(file for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".") for file in sub.iterdir()),
    ]:
        if each.suffix.lower() in data.SUFFIXES and not each.name.startswith(".") and each.is_file():
            try:
                with data.opened(each) as image:
                    mode, clear = image.mode, "transparency" in image.info
            except Exception:  # what cannot be read, data.load has refused
                continue
            found["have alpha"] += mode in ("LA", "RGBA", "PA") or clear
            found["are greyscale"] += mode in ("1", "L", "LA")
            found["have a palette"] += mode in ("P", "PA")
    return ", ".join(f"{n} {what}" for what, n in found.items() if n)


def check_fit(shape: tuple[int, int, int], wanted: tuple[int, int, int], what: str, others: str = "the training images") -> None:
    """ValueError, one line, for images that are not like the others."""
    if shape[0] != wanted[0]:
        kind = {1: "greyscale", 3: "RGB", 4: "RGBA, with alpha"}
        hint = "give --rgb to take all as RGB, on white" if {shape[0], wanted[0]} - {3} else ""
        raise ValueError(f"{what} are {kind.get(shape[0], shape[0])}, but {others} are {kind.get(wanted[0], wanted[0])}; {hint}")
    if shape[1:] != wanted[1:]:
        hint = f"give --size {wanted[1]} to resize them" if wanted[1] == wanted[2] else "resize them"
        raise ValueError(f"{what} are {_size(shape)}, but {others} are {_size(wanted)}; {hint}, or name other images")


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]} x {shape[1]} pixels" + ("" if shape[0] == 3 else f" and {shape[0]} channels")


def choose(samples: data.Dataset, count: int | None, seed: int) -> data.Dataset:
    """`count` of the samples, drawn by `seed`, in their order; all of them for None, or where there are no more."""
    if count is None or len(samples) <= count:
        return samples
    chosen = np.sort(np.random.default_rng(seed).choice(len(samples), count, replace=False))
    return pick(samples, chosen)


def like(samples: data.Dataset, stick: Yardstick) -> tuple[data.Dataset, bool]:
    """As many samples as there are to compare with; with the same number of each class, and True, where they have classes and enough."""
    if samples.labels is not None and samples.classes == stick.real.classes and (room(samples) >= stick.quota).all():
        return pick(samples, draw(samples, stick.quota, np.random.default_rng(stick.seed))), True
    return choose(samples, stick.count, stick.seed), False


def sampler_labels(checkpoint: Checkpoint, stick: Yardstick) -> np.ndarray | None:
    """The class to ask the checkpoint for, for each sample, int64 [count]; ValueError where its classes are not the data's."""
    if not checkpoint.classes:
        return None
    if stick.labels is None:
        return np.arange(stick.count) % len(checkpoint.classes)
    missing = [name for name in stick.real.classes if name not in checkpoint.classes]
    if missing:
        raise ValueError(
            f"the data have a class {missing[0]!r}, which the checkpoint has not; name the data that it was trained on (--data)"
        )
    labels: np.ndarray = np.array([checkpoint.classes.index(name) for name in stick.real.classes])[stick.labels]
    return labels


def table(found: Result, floor: Result, again: Result | None) -> str:
    """The lines that a person reads."""
    columns = {"samples": found, "held out (floor)": floor} | ({} if again is None else {"training again": again})
    rows = [["", *columns, "better"]]
    for key, name, better, digits in METRICS:
        if any(key in column.estimates for column in columns.values()):
            rows.append([name, *(written(column.estimates.get(key), digits) for column in columns.values()), better])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "   ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))) for row in rows
    )


def written(estimate: Estimate | None, digits: int | None, with_error: bool = True) -> str:
    if estimate is None:
        return ""
    value, error = estimate
    if not with_error:
        return f"{value:.1%}" if digits is None else f"{value:.{digits}f}"
    return f"{value:.1%} ± {error:.1%}" if digits is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def as_json(result: Result) -> dict[str, Any]:
    distance = result.nearest.distance
    return {
        "metrics": {key: {"value": value, "standard_error": error} for key, (value, error) in result.estimates.items()},
        "class_accuracy": result.per_class, "copies": result.copies,
        "nearest_training_image": {"least": float(distance.min()), "median": float(distance.median())},
    }  # fmt: skip


def floors(stick: Yardstick) -> dict[str, Any]:
    return {"floor": as_json(stick.floor)} | ({} if stick.again is None else {"training_again": as_json(stick.again)})


def estimate_of(value: dict[str, float] | None) -> Estimate | None:
    return None if value is None else Estimate(value["value"], value["standard_error"])


def save_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as f:
        f.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def pairs_picture(images: np.ndarray, result: Result, stick: Yardstick, columns: int = 8) -> Image.Image:
    """The samples nearest to a training image, each above that image, with their distance."""
    order = result.nearest.distance.argsort(stable=True)[:PAIRS]
    scale = max(96 // max(images.shape[1:3]), 1)
    high, wide = images.shape[1] * scale, images.shape[2] * scale
    columns = min(columns, len(order))
    bands = -(-len(order) // columns)
    left, top, gap, line = 92, 84, 12, 22
    width = max(left + columns * (wide + gap) + gap, 880)
    band = 2 * high + 4 + line + gap
    canvas = Image.new("RGB", (width, top + bands * band), "white")
    pen = ImageDraw.Draw(canvas)
    floor = stick.floor.nearest.distance
    pen.text((gap, 12), f"The {len(order)} samples of {len(images)} that come closest to a training image", "black", _font(20))
    pen.text(
        (gap, 44), f"Root mean square difference in levels of 255; below {metrics.COPY:g} a sample counts as a copy: {result.copies} do. "
        f"Of held-out images the closest is at {float(floor.min()):.1f}, half are beyond {float(floor.median()):.1f}.", "#444444", _font(14),
    )  # fmt: skip
    training = stick.all.images
    for place, i in enumerate(order.tolist()):
        x, y = left + place % columns * (wide + gap), top + place // columns * band
        if place % columns == 0:
            pen.text((gap, y + high // 2 - 8), "sample", "black", _font(15))
            pen.text((gap, y + high + 4 + high // 2 - 18), "nearest in\ntraining", "black", _font(15))
        for down, image in ((0, images[i]), (high + 4, training[int(result.nearest.which[i])])):
            tile = data.grid(image[None], 1, scale=scale)
            canvas.paste(tile, (x, y + down))
            pen.rectangle((x - 1, y + down - 1, x + wide, y + down + high), outline="#bbbbbb")
        distance = float(result.nearest.distance[i])
        text, font = f"{distance:.1f}", _font(15)
        pen.text(
            (x + (wide - pen.textlength(text, font=font)) / 2, y + 2 * high + 7),
            text,
            "#c00000" if distance < metrics.COPY else "black",
            font,
        )
    return canvas


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0
        return ImageFont.load_default()


class Part:
    """A bar of its own steps, as Sampler wants one, that moves another by `weight` in all."""

    def __init__(self, bar: Any, weight: float, steps: int) -> None:
        self.bar, self.each = bar, weight / steps

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.bar.update(n * self.each)


def bar_of(total: float, what: str, shown: bool) -> Any:
    return tqdm(
        total=total, desc=what, disable=not shown, leave=False, smoothing=0.1,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}", **calm_bar(),
    )  # fmt: skip


def choice(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a sweep that RULE picks."""
    values = [row["metrics"]["frechet"] for row in rows]
    best = min(values, key=lambda v: v["value"])
    near = [
        row
        for row, v in zip(rows, values, strict=True)
        if v["value"] - best["value"] <= math.hypot(v["standard_error"], best["standard_error"])
    ]
    return min(near, key=lambda row: (row["evaluations"], row["metrics"]["frechet"]["value"]))


def steps_for(checkpoint: Checkpoint, solver: str, evaluations: int) -> tuple[int, int]:
    """(steps, network evaluations) of a solver: as many steps as so many evaluations allow, and at least one."""
    for steps in dict.fromkeys((evaluations, (evaluations + 1) // 2)):
        rows = len(solvers.table(solver, checkpoint.schedule, steps=steps, prediction=checkpoint.prediction))
        if rows <= evaluations:
            break
    return steps, rows


def sweep(
    checkpoint: Checkpoint,
    stick: Yardstick,
    out: Path,
    about: dict[str, Any],
    names: Sequence[str],
    evaluations: Sequence[int],
    options: dict[str, Any],
    guidance: float,
    shown: bool,
) -> dict[str, Any]:
    """Quality of every solver at every number of evaluations, written to sweep.json row by row; rows that are there already are kept."""
    path = out / "sweep.json"
    plan = [(name, *steps_for(checkpoint, name, n)) for name in names for n in evaluations]
    rows: list[dict[str, Any]] = []
    if path.exists():
        try:
            before = json.loads(path.read_text())
            rows, was = list(before["rows"]), dict(before["about"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no sweep of this command; move it away, or choose another folder (--out)") from None
        if odd := [key for key in about if was.get(key) != about[key] and key != "evaluations"]:
            raise ValueError(
                f"{path} is of other settings ({odd[0]} {was.get(odd[0])!r}, not {about[odd[0]]!r}); choose another folder (--out), or move it away"
            )
        about = about | {"evaluations": sorted({*about["evaluations"], *was.get("evaluations", [])})}
    done = {(row["solver"], row["steps"]) for row in rows}
    todo = [each for each in dict.fromkeys(plan) if each[:2] not in done]
    labels = sampler_labels(checkpoint, stick)
    guidance = guidance if checkpoint.classes else 1.0
    n, extra = stick.count, 2.0  # measuring takes about as long as two evaluations
    with bar_of(sum(count + extra for *_, count in todo) + 2 * extra, "sweep", shown) as bar:
        stick.measure_floor(lambda k: bar.update(2 * extra * k / (7 * n)))
        for solver, steps, count in todo:
            bar.set_postfix_str(f"; {solver}, {steps} steps")
            sampler = checkpoint.sampler(solver=solver, steps=steps, **options)
            sampler.warmup(guidance != 1, n=n)
            began = time.perf_counter()
            x = sampler(
                n, seed=stick.seed, labels=None if labels is None else torch.from_numpy(labels), guidance=guidance,
                progress=functools.partial(Part, bar, count),
            )  # fmt: skip
            images = data.to_uint8(x).cpu().numpy()
            seconds = time.perf_counter() - began
            found = stick.measure(
                images, stick.labels, None if labels is None else stick.labels, progress=lambda k: bar.update(extra * k / (3 * n))
            )
            rows.append({"solver": solver, "steps": steps, "evaluations": count, "seconds": round(seconds, 4), **as_json(found)})
            save_json(path, {"about": about, **floors(stick), "rows": rows})
    place = {name: i for i, name in enumerate(solvers.names())}
    rows.sort(key=lambda row: (place.get(row["solver"], len(place)), row["evaluations"]))
    picked = choice(rows)
    report = {
        "about": about, **floors(stick), "rule": RULE,
        "choice": {key: picked[key] for key in ("solver", "steps", "evaluations", "seconds")}, "rows": rows,
    }  # fmt: skip
    save_json(path, report)
    return report


def sweep_table(report: dict[str, Any]) -> str:
    """The lines that a person reads: a row a solver and number of evaluations, the chosen one marked. All errors stand in the JSON."""
    keys = [
        (key, name, digits)
        for key, name, *_, digits in METRICS
        if key in report["rows"][0]["metrics"] and key not in ("density", "novelty")
    ]
    lines = [["solver", "steps", "evaluations", "seconds", *(name for _, name, _ in keys)]]
    picked = report["choice"]
    others = {"held-out images (floor)": report["floor"], "training images again": report.get("training_again")}
    for row in [*report["rows"], *({"solver": name, "metrics": other["metrics"]} for name, other in others.items() if other)]:
        cells = [written(estimate_of(row["metrics"].get(key)), digits, key == "frechet") for key, _, digits in keys]
        chosen = row["solver"] == picked["solver"] and row.get("steps") == picked["steps"]
        took = f"{row['seconds']:.3g}" if "seconds" in row else ""
        lines.append([row["solver"] + " <-" * chosen, *(str(row.get(key, "")) for key in ("steps", "evaluations")), took, *cells])
    return aligned(lines)


COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#5b5b5b", "#bcbd22", "#17becf", "#003f8a", "#7a9b00", "#b8336a",
)  # fmt: skip


def lines_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by solver, rising in evaluations; solvers that come to the same samples are one, called "ddim = euler"."""
    by_solver: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_solver.setdefault(row["solver"], []).append(row)
    same: dict[tuple[Any, ...], list[str]] = {}
    for solver, own in by_solver.items():
        own.sort(key=lambda row: row["evaluations"])
        key = tuple((row["evaluations"], *(float(f"{v['value']:.3g}") for v in row["metrics"].values())) for row in own)
        same.setdefault(key, []).append(solver)
    return {" = ".join(names): by_solver[names[0]] for names in same.values()}


def sweep_picture(report: dict[str, Any], path: Path) -> bool:
    """Fréchet distance against network evaluations and against seconds, a line a solver. False, and no picture, without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ImportError:
        return False
    about, picked = report["about"], report["choice"]
    lines = lines_of(report["rows"])
    bounds = {
        label: report[key]["metrics"]["frechet"]
        for key, label in (("floor", "held-out images (floor)"), ("training_again", "training images again"))
        if key in report
    }
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "evaluations"), (right, "seconds")):
        for i, (solver, rows) in enumerate(lines.items()):
            chosen = picked["solver"] in solver.split(" = ")
            values = [row["metrics"]["frechet"] for row in rows]
            axes.errorbar(
                [row[key] for row in rows], [v["value"] for v in values], [v["standard_error"] for v in values] if chosen else None,
                color=COLOURS[i % len(COLOURS)], marker="osD^vP*X<>hdp"[i % 13], ms=7 if chosen else 5, lw=2.8 if chosen else 1.3,
                zorder=5 if chosen else 3, label=solver, capsize=3,
            )  # fmt: skip
            for row, v in zip(rows, values, strict=True):
                if chosen and row["steps"] == picked["steps"]:
                    axes.plot([row[key]], [v["value"]], "o", ms=17, mfc="none", mec="black", mew=1.6, zorder=6)
        for (label, v), style, colour in zip(bounds.items(), ("--", ":"), ("0.25", "0.5"), strict=False):
            axes.axhspan(v["value"] - v["standard_error"], v["value"] + v["standard_error"], color=colour, alpha=0.13, lw=0, zorder=1)
            axes.axhline(v["value"], color=colour, ls=style, lw=1.4, zorder=2, label=label)
        axes.set(xscale="log", yscale="log")
        axes.grid(True, alpha=0.35)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    left.set_xticks(about["evaluations"])
    two = f" (each of two passes, guidance {about['guidance']:g})" if about["guidance"] != 1 else ""
    left.set_xlabel(f"network evaluations an image{two}", fontsize=12)
    right.set_xlabel(f"seconds for {about['count']} images ({about['machine']})", fontsize=12)
    left.set_ylabel("Fréchet distance to training images (lower is better)", fontsize=12)
    shown = [row["metrics"]["frechet"]["value"] for row in report["rows"]] + [v["value"] for v in bounds.values()]
    left.set_ylim(max(min(shown), 1e-6) * 0.75, max(shown) * 1.25)
    handles, labels = left.get_legend_handles_labels()
    last = {solver: rows[-1]["metrics"]["frechet"]["value"] for solver, rows in lines.items()}
    order = sorted(range(len(labels)), key=lambda i: -last.get(labels[i], 0))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False, fontsize=11)
    figure.suptitle(
        f"Quality of every solver: {about['count']} samples against as many training images; chosen: {picked['solver']}, {picked['steps']} steps",
        fontsize=14,
    )
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=110)
    return True


def bound_picture(bound: densities.Parts, path: Path) -> bool:
    """The terms of the bound against the timestep. False, and no picture, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="timestep", ylabel="bits per dimension, a step", yscale="log")
    axes.set_title(f"Where the {bound.total.mean:.2f} bits per dimension of DDPM's bound are spent")
    axes.plot(bound.timesteps[1:], bound.terms[1:-1], lw=1.8)
    axes.plot(bound.timesteps[:1], bound.terms[:1], "o", label="the last step, to whole levels")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=120)
    return True


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG,
        description="Say how good samples are, each number with its standard error and beside its floor: what held-out images, as many, come to "
        "in place of samples. Writes evaluation.json and pairs.png, the samples that come closest to a training image, into --out.",
    )
    g = p.add_argument_group("what is measured")
    cli.checkpoint_option(g)
    g.add_argument(
        "--samples", metavar="FILE", help="images instead of a checkpoint's: samples.npz of fastdiff.sample, a folder, .npz, .npy"
    )
    g.add_argument("--data", default="sprites", metavar="FILE", help="the training images: sprites (shipped), a folder, .npz, .npy")
    g.add_argument(
        "--count", type=cli.whole(1), metavar="N", help=f"samples, and images to compare with ({COUNT}; of a sweep {SWEEP_COUNT})"
    )
    g.add_argument(
        "--features", metavar="MODULE:NAME", help="what to measure by: a torch module, or a function that returns one, of images in [-1, 1]; a file of "
        'python -m fastdiff.classifier; or "inception", where torch-fidelity is installed with its weights (the shipped classifier)',
    )  # fmt: skip
    g.add_argument("--size", type=cli.whole(1, 4096), metavar="PIXELS", help="resize the images of --samples and --data")
    g.add_argument("--rgb", action="store_true", help="take greyscale images, and images with alpha, as RGB on white")
    g = p.add_argument_group("sampling")
    g.add_argument("--solver", metavar="NAME", help=f"{', '.join(solvers.names())} ({SOLVER}; a sweep takes all, or this one)")
    g.add_argument("--steps", type=cli.whole(1), metavar="N", help=f"({STEPS})")
    g.add_argument("--guidance", type=cli.number(float, 0), metavar="W", help=f"how strongly to follow the class ({GUIDANCE:g})")
    g.add_argument("--seed", type=cli.whole(0, 2**63 - 1), default=0, help="of samples, of the images to compare with, of the errors (0)")
    g.add_argument("--compile", choices=["auto", "yes", "no", "fused"], help="as python -m fastdiff.sample has it (auto)")
    g.add_argument("--dtype", choices=list(cli.DTYPES), metavar="TYPE", help=f"of the network: {', '.join(cli.DTYPES)}")
    g = p.add_argument_group("instead of one evaluation").add_mutually_exclusive_group()
    g.add_argument(
        "--sweep", action="store_true", help="every solver over numbers of network evaluations: sweep.json, sweep.png, and which it would choose; "
        "started again it goes on where it was interrupted",
    )  # fmt: skip
    g.add_argument(
        "--likelihood",
        nargs="?",
        const="",
        metavar="IMAGES",
        help="how likely the checkpoint finds images (the shipped held-out sprites): likelihood.json",
    )
    p.add_argument(
        "--evaluations",
        type=cli.whole(1),
        nargs="+",
        metavar="N",
        help=f"of a sweep: network evaluations an image ({' '.join(map(str, EVALUATIONS))})",
    )
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument("--out", default="evaluation", metavar="DIR", help="folder for what is written, which is replaced there (evaluation)")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.samples is not None:
        given = [name for name in ("solver", "steps", "guidance", "compile", "dtype") if getattr(args, name) is not None]
        given += ["sweep"] * args.sweep + ["likelihood"] * (args.likelihood is not None)
        if given:
            raise ValueError(f"--{given[0]} is of sampling, but --samples are images that are there; leave one of the two out")
    if args.sweep and args.steps is not None:
        raise ValueError("--steps is of one evaluation; a sweep takes --evaluations")
    if args.evaluations and not args.sweep:
        raise ValueError("--evaluations is of a sweep; give --sweep, or --steps")
    ways.keep_compiled()
    device = pick_device(args.device)
    out = make_folder(args.out)
    shown = not args.json or sys.stderr.isatty()
    command = shlex.join([*PROG.split(), *(sys.argv[1:] if argv is None else argv)])
    if args.likelihood is not None:
        return likelihood(args, device, out, shown, command)

    began = time.perf_counter()
    dataset = read_images(args.data, args.size, args.rgb, "training images")
    given_samples = None if args.samples is None else read_images(args.samples, args.size, args.rgb, "the samples")
    checkpoint = load(args.checkpoint) if given_samples is None else None
    if given_samples is not None:
        check_fit(given_samples.shape, dataset.shape, f"{args.samples}: the images")
    elif checkpoint is not None:
        check_fit(checkpoint.shape, dataset.shape, f"the images of {args.checkpoint}")
        trained_on = checkpoint.record.get("data")
        if trained_on is not None and trained_on != dataset.digest():
            warnings.warn(
                f"{args.checkpoint} was trained on other images than {args.data}, so novelty says little; name them (--data)", stacklevel=1
            )
    count = args.count or (SWEEP_COUNT if args.sweep else COUNT if given_samples is None else len(given_samples))
    if given_samples is not None:
        count = min(count, len(given_samples))
    stick = Yardstick(dataset, find_features(args.features, device), count, args.seed)
    stick.check()
    if stick.count < count:
        why = (
            f"{len(stick.test)} images are held out"
            if stick.held_out
            else "half of the data stand in for held-out images, which there are none of"
        )
        warnings.warn(f"{stick.count} images are compared, not {count}: {why}", stacklevel=1)
    guidance = GUIDANCE if args.guidance is None else args.guidance
    options = {"device": device, "dtype": cli.DTYPES.get(args.dtype), "compile": cli.WAYS.get(args.compile, args.compile or "auto")}
    about: dict[str, Any] = {
        "data": args.data, "data_sha256": dataset.digest(), "count": stick.count, "seed": args.seed, "features": stick.features.name,
        "features_sha256": digest(stick.features.module),
        "training_images": len(stick.all), "held_out_images": len(stick.test) if stick.held_out else 0,
        "standard_error": f"jackknife over {metrics.GROUPS} parts; of parts of 1, binomial for accuracy and novelty",
        "copy_below": metrics.COPY, "machine": device_name(device), "torch": torch.__version__,
    }  # fmt: skip
    if checkpoint is not None:
        about |= {
            "checkpoint": args.checkpoint,
            "checkpoint_sha256": digest(checkpoint.model),
            "guidance": guidance if checkpoint.classes else 1.0,
            "dtype": args.dtype,
            "compile": args.compile or "auto",
        }

    if args.sweep:
        assert checkpoint is not None
        names = [args.solver] if args.solver else solvers.names()
        about["evaluations"] = sorted(set(args.evaluations or EVALUATIONS))
        report = sweep(checkpoint, stick, out, about, names, about["evaluations"], options, guidance, shown)
        drawn = sweep_picture(report, out / "sweep.png")
        if args.json:
            print(json.dumps(report, ensure_ascii=False))
            return 0
        print(sweep_table(report))
        picked = report["choice"]
        print(f"It would choose {picked['solver']} with {picked['steps']} steps ({picked['evaluations']} evaluations): {RULE}.")
        print(f"in {out / 'sweep.json'}" + (f", drawn in {out / 'sweep.png'}" if drawn else "; no picture without matplotlib"))
        return 0

    if given_samples is not None:
        samples, stratified = like(given_samples, stick)
        asked = samples.labels if samples.classes == dataset.classes else None
        strata = asked if stratified else None
        images = samples.images
        source = args.samples
        sampling = 0.0
    else:
        assert checkpoint is not None
        labels = sampler_labels(checkpoint, stick)
        steps, solver = args.steps or STEPS, args.solver or SOLVER
        sampler = checkpoint.sampler(solver=solver, steps=steps, **options)
        sampler.warmup(about["guidance"] != 1, n=stick.count)
        start = time.perf_counter()
        with bar_of(1, "sampling", shown) as bar:
            x = sampler(
                stick.count, seed=args.seed, labels=None if labels is None else torch.from_numpy(labels), guidance=about["guidance"],
                progress=functools.partial(Part, bar, 1),
            )  # fmt: skip
        images, asked = data.to_uint8(x).cpu().numpy(), None if labels is None else stick.labels
        strata = asked
        sampling = time.perf_counter() - start
        about |= {"solver": solver, "steps": steps, "evaluations": sampler.steps, "way": sampler.way}
        source = f"{args.checkpoint} ({solver}, {steps} steps, guidance {about['guidance']:g}, seed {args.seed})"
    with bar_of(7 * stick.count + 3 * len(images), "measuring", shown) as bar:
        stick.measure_floor(bar.update)
        found = stick.measure(images, asked, strata, progress=bar.update)
    floor = stick.floor
    with atomic_write(out / "pairs.png") as f:
        pairs_picture(images, found, stick).save(f, format="PNG")
    order = found.nearest.distance.argsort(stable=True)[:PAIRS].tolist()
    training = np.flatnonzero(~dataset.test) if stick.held_out and dataset.test is not None else np.arange(len(dataset))
    report = {
        "command": command, "samples": source, "about": about, "found": as_json(found), **floors(stick),
        "better": {key: better for key, _, better, _ in METRICS},
        "closest": [
            {"sample": i, "training_image": int(training[int(found.nearest.which[i])]), "distance": float(found.nearest.distance[i])} for i in order
        ],
        "seconds": {"sampling": round(sampling, 2), "all": round(time.perf_counter() - began, 2)},
    }  # fmt: skip
    save_json(out / "evaluation.json", report)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    other = (
        f"{stick.count} held-out images" if stick.held_out else f"{stick.count} images of the other half of the data (none are held out)"
    )
    print(
        f"{len(images)} samples of {source}, against {stick.count} of {len(stick.all)} training images; features of {stick.features.name}"
    )
    print(f"floor: {other}, against the same; beside it other training images, against the same")
    print(table(found, floor, stick.again))
    if found.per_class:
        print("as asked for: " + ", ".join(f"{name} {part:.0%}" for name, part in found.per_class.items()))
    (least, half), (far, beyond) = ((float(r.nearest.distance.min()), float(r.nearest.distance.median())) for r in (found, floor))
    print(
        f"copies (nearer than {metrics.COPY:g} of 255 levels to a training image): {found.copies} of {len(images)}; the nearest is at {least:.1f}, "
        f"half are beyond {half:.1f} (held-out images: {far:.1f} and {beyond:.1f})"
    )
    print(f"in {out / 'evaluation.json'}, closest pairs in {out / 'pairs.png'}; {report['seconds']['all']:.0f} s")
    return 0


def likelihood(args: argparse.Namespace, device: torch.device, out: Path, shown: bool, command: str) -> int:
    """--likelihood: what fastdiff.densities says."""
    images = None if not args.likelihood else read_images(args.likelihood, args.size, args.rgb, "the images")
    checkpoint = load(args.checkpoint)
    if images is not None:
        check_fit(images.shape, checkpoint.shape, f"{args.likelihood}: the images", f"those of {args.checkpoint}")
    checkpoint.model.to(device)
    more = {} if args.count is None else {"count": args.count}
    report = densities.likelihoods(checkpoint, args.checkpoint, images=images, seed=args.seed, progress=shown, **more)
    save_json(out / "likelihood.json", {"command": command, **report.json()})
    drawn = report.bound is not None and bound_picture(report.bound, out / "likelihood.png")
    if args.json:
        print(json.dumps(report.json(), ensure_ascii=False))
        return 0
    print(report.text())
    print(f"in {out / 'likelihood.json'}" + (f", drawn in {out / 'likelihood.png'}" if drawn else ""))
    return 0


def digest(module: nn.Module) -> str:
    """sha256 (hex) over a module's weights."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

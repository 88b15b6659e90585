"""A small classifier of sprites, whose features the evaluation measures by: `python -m fastdiff.classifier` trains one in minutes."""

from __future__ import annotations

import argparse
import functools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import cli, data
from .checkpoint import CheckpointError, fill, read_tensors, write_tensors
from .devices import pick_device
from .files import make_folder
from .progress import calm_bar
from .unet import MAX_SIZE

PROG = "python -m fastdiff.classifier"
FORMAT = 1
SHIPPED = data.ASSETS / "classifier.safetensors"
ROWS = 256  # images to a call, when features are taken


class Classifier(nn.Module):
    """Convolutions with batch norm, halving twice, pooled to the features; a linear layer from those says the class.

    `forward` is the features: x fp [N, C, H, W] in [-1, 1] -> [N, 64], at least 0; `head` takes them to logits [N, classes].
    shape: (C, H, W) of the images that it was trained on. record: how, plain JSON values.
    """

    def __init__(self, shape: tuple[int, int, int], classes: tuple[str, ...], width: int = 48, features: int = 64) -> None:
        super().__init__()
        self.shape, self.classes, self.width, self.features = shape, classes, width, features
        self.record: dict[str, Any] = {}

        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(shape[0], width),
            *block(width, width, 2),  # [N, width, H / 2, W / 2]
            *block(width, 2 * width),
            *block(2 * width, 2 * width, 2),  # [N, 2 width, H / 4, W / 4]
            *block(2 * width, 2 * width),
        )
        self.neck = nn.Linear(4 * width, features)
        self.head = nn.Linear(features, len(classes))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)  # [N, 2 width, H / 4, W / 4]
        return F.relu(self.neck(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights (fp16), classes and record, atomically, as .safetensors."""
        about = {
            "classifier": FORMAT, "shape": list(self.shape), "width": self.width, "features": self.features,
            "classes": list(self.classes), "record": self.record,
        }  # fmt: skip
        write_tensors(path, {k: v.half() for k, v in self.state_dict().items() if v.is_floating_point()}, about)


def load_classifier(path: str | os.PathLike[str] | None = None) -> Classifier:
    """The classifier in a file of `python -m fastdiff.classifier`, or the shipped one. fp32, on the CPU, in eval mode.

    CheckpointError, a ValueError, where there is none, or it is truncated, foreign, pickled or of another format version. Limits and memory are
    those of `fastdiff.load`.
    """
    path = SHIPPED if path is None else Path(path)
    tensors, about = read_tensors(path) if os.path.isfile(path) else ({}, {})
    if about.get("classifier") != FORMAT:
        found = f"no file {str(path)!r}" if not about else f"{path} holds no classifier of format {FORMAT}"
        raise CheckpointError(f"{found}; {PROG} --out FILE trains one")
    try:
        sizes, classes = [*about["shape"], about["width"], about["features"]], about["classes"]
        if len(sizes) != 5 or not all(type(v) is int and 1 <= v <= MAX_SIZE for v in sizes):
            raise ValueError(f"shape, width and features must be whole numbers of at most {MAX_SIZE}")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or data.odd_name(classes) is not None:
            raise ValueError("classes are no list of names")
        with torch.device("meta"):  # takes no memory before the file is known to have the weights
            model = Classifier((sizes[0], sizes[1], sizes[2]), tuple(classes), sizes[3], sizes[4])
        model.record = dict(about["record"])
        fill(model, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path} has unfitting weights or metadata: {' '.join(str(e).split())[:200]}") from None
    return model


def features(module: nn.Module, images: np.ndarray, progress: Callable[[int], object] | None = None) -> Tensor:
    """What a module says of images, uint8 [N, H, W, C] -> float64 [N, D] on the CPU.

    module: maps fp32 [n, C, H, W] in [-1, 1] to [n, D], or to [n, D, h, w], of which the mean over h and w is taken. It is called in eval
    mode, up to 256 images at a time, where its parameters are, and put back into its own mode. progress: told how many images are done
    with. ValueError for a module that takes no such images, or says something else, or no finite numbers.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    what = type(module).__name__
    training, found = module.training, list[Tensor]()
    module.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(images), ROWS):
                x = data.to_float(torch.from_numpy(images[start : start + ROWS]).to(device))
                try:
                    h = module(x)
                except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as e:
                    if isinstance(e, torch.OutOfMemoryError):
                        raise
                    reason = " ".join(str(e).split())[:160]
                    raise ValueError(
                        f"the features' module {what} takes no images [N, C, H, W] of shape {list(x.shape)}: {reason}"
                    ) from None
                if not isinstance(h, Tensor) or h.ndim not in (2, 4) or len(h) != len(x) or not h.is_floating_point():
                    said = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
                    raise ValueError(f"the features' module {what} returned {said} for {len(x)} images; it must be [N, D] or [N, D, h, w]")
                h = h.double().mean((2, 3)) if h.ndim == 4 else h.double()
                if not h.isfinite().all():
                    raise ValueError(f"the features' module {what} returned numbers that are not finite")
                found.append(h.cpu())
                if progress is not None:
                    progress(len(x))
    finally:
        module.train(training)
    if not found:
        raise ValueError("no images to take features of")
    return torch.cat(found)


def classify(model: Classifier, found: Tensor) -> Tensor:
    """The likeliest class by features, [N, 64] -> int64 [N]."""
    with torch.no_grad():
        logits: Tensor = model.head(found.to(model.head.weight))
    return logits.argmax(1).cpu()


@dataclass(frozen=True)
class Settings:
    """What decides the weights, with the data, on one kind of machine and number of threads."""

    steps: int = 2000
    batch: int = 128
    lr: float = 3e-3
    seed: int = 0
    flip: bool = True
    shift: int = 1
    smoothing: float = 0.1
    balance: float = 0.5
    decay: float = 0.05


def augmented(images: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W], each mirrored by chance, and moved by up to `shift` pixels over a white ground."""
    n, (height, width) = len(images), images.shape[1:3]
    flip = torch.rand(n, generator=generator) < 0.5 if settings.flip else None
    x = data.to_float(images, flip)
    if not settings.shift:
        return x
    x = F.pad(x, (settings.shift,) * 4, value=1.0)
    by = torch.randint(0, 2 * settings.shift + 1, (2, n, 1), generator=generator)
    rows, columns = by[0] + torch.arange(height), by[1] + torch.arange(width)  # [N, H], [N, W]
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def train(settings: Settings, dataset: data.Dataset, progress: bool = True) -> Classifier:
    """A classifier of the training part of `dataset`, in eval mode, its record with the accuracy on the held-out part.

    AdamW, the learning rate a quarter of a cosine; a class of m images is drawn in proportion to m^balance. DataError without labels.
    """
    learn, test = dataset.split()
    if learn.labels is None or len(dataset.classes) < 2:
        raise data.DataError("a classifier needs images of two classes or more: a folder with a sub-folder a class, or an .npz with labels")
    if not len(learn):
        raise data.DataError("every image is held out; nothing is left to train on")
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Classifier(learn.shape, dataset.classes)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = torch.from_numpy(learn.images), torch.from_numpy(learn.labels)
    weight = torch.bincount(labels, minlength=len(dataset.classes)).double()[labels] ** (settings.balance - 1)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.decay)
    began = time.perf_counter()
    model.train()
    with tqdm(total=settings.steps, unit="step", disable=not progress, smoothing=0.1, **calm_bar()) as bar:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min((step + 1) / 100, math.cos(math.pi / 2 * step / settings.steps))
            index = torch.multinomial(weight, settings.batch, replacement=True, generator=generator)
            x = augmented(images[index], settings, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model.head(model(x)), labels[index], label_smoothing=settings.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update()
            if step % 50 == 49:
                if not loss.isfinite():
                    raise ValueError(f"the loss is no longer finite at step {step + 1}; try a smaller --lr")
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    # As it will be read: what is reported is of the weights in the file.
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.copy_(value.half())
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval().requires_grad_(False)
    model.record = {
        "settings": asdict(settings), "data": dataset.digest(), "images": len(learn), "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1), "training": accuracy(model, learn), "held_out": accuracy(model, test),
    }  # fmt: skip
    return model


def accuracy(model: Classifier, part: data.Dataset) -> dict[str, Any] | None:
    """{"images", "accuracy", "per_class": {name: part}} of labelled images, None where there are none."""
    if part.labels is None or not len(part):
        return None
    right = classify(model, features(model, part.images)).numpy() == part.labels
    per_class = {name: round(float(right[part.labels == k].mean()), 4) for k, name in enumerate(part.classes) if (part.labels == k).any()}
    return {"images": len(part), "accuracy": round(float(right.mean()), 4), "per_class": per_class}


def parser() -> cli.Parser:
    d = Settings()
    p = cli.Parser(
        prog=PROG,
        argument_default=argparse.SUPPRESS,
        description="Train a small classifier of images, whose features python -m fastdiff.evaluate measures by (--features FILE). The shipped "
        "one was made by the defaults. Prints the accuracy on the images that the data hold out.",
    )
    p.add_argument("--out", default="classifier.safetensors", metavar="FILE", help="file to write (classifier.safetensors)")
    p.add_argument(
        "--data", default="sprites", help="sprites (shipped), a folder with a sub-folder a class, or an .npz or .npy with labels"
    )
    p.add_argument("--size", default=None, type=cli.whole(1, 4096), metavar="PIXELS", help="resize a folder's images to this size")
    p.add_argument("--steps", type=cli.whole(1), help=f"optimiser steps ({d.steps})")
    p.add_argument("--batch", type=cli.whole(2), help=f"examples a step ({d.batch})")
    p.add_argument("--lr", type=cli.number(float, 0, 1), help=f"AdamW's learning rate at the start ({d.lr})")
    p.add_argument("--seed", type=cli.whole(0, 2**63 - 1), help=f"fixes weights, order and augmentation ({d.seed})")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror every other example left-right (yes)")
    p.add_argument(
        "--shift", type=cli.whole(0, 64), metavar="PIXELS", help=f"move examples by up to so many pixels, over white ({d.shift})"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    out = Path(args["out"])
    if out.is_dir() or not out.name:
        raise ValueError(f"--out {args['out']} is a folder; name a file, such as {out / 'classifier.safetensors'}")
    make_folder(out.parent)
    dataset = data.load(args["data"], size=args["size"])
    settings = Settings(**{f.name: args[f.name] for f in fields(Settings) if f.name in args})
    pick_device("cpu")
    model = train(settings, dataset)
    model.record["command"] = shlex.join([*PROG.split(), *(sys.argv[1:] if argv is None else argv)])
    model.save(out)
    held_out, learnt = model.record["held_out"], model.record["training"]
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, trained on {model.record['images']} images in {model.record['seconds']:.0f} s")
    print(
        f"accuracy on training images {learnt['accuracy']:.2%}"
        + (f", on {held_out['images']} held-out images {held_out['accuracy']:.2%}" if held_out else "")
    )
    for name, part in (held_out or learnt)["per_class"].items():
        print(f"  {name:24} {part:.1%}")
    return 0


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

"""Train the network: `python -m fastdiff.train`. A step is a function of the settings and its number, so a resumed run continues exactly.

Under torchrun the processes share each step's examples: what is learnt does not depend on how many they are, beyond rounding.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import cli, data, ops
from .checkpoint import MAX_FILE, MAX_HEADER, Checkpoint, CheckpointError, read_tensors, write_tensors
from .devices import pick_device
from .distributed import Group, join, lost, one_voice, own_device
from .files import atomic_write, remove_parts
from .noise import counter, noise_table, signed
from .progress import Progress
from .runs import own_folder
from .schedules import MAX_TIMESTEPS, Schedule, number
from .unet import MAX_BLOCKS, MAX_SIZE, UNet, UNetConfig

PROG = "python -m fastdiff.train"
log = logging.getLogger("fastdiff.train")  # __name__ is "__main__" in the command
STATE, CHECKPOINT = "state.safetensors", "checkpoint.safetensors"
PARTS = r"(?:state|checkpoint)\.safetensors|loss\.png|samples-\d+\.png"  # what is written by way of a part, as a regular expression
# Several processes ask each other whether one of them was told to stop, which each waits for the slowest to answer: so often that torchrun, which
# kills 30 s after its SIGTERM, leaves time to save, and after so many steps at most.
ASK_S, ASK_STEPS = 2.0, 100
MAX_POINTS = 1 << 14  # of a loss curve: a state has two, and is read with at most 2^18 values of JSON, of which a point has three
ALONE = Group()
# What settings may be, whether typed or read from a state: whole numbers from, to; names; the other numbers are from 0 to 1.
WHOLE = {
    "steps": (1, 1 << 38), "batch": (1, 1 << 24), "warmup": (0, 1 << 38), "seed": (0, (1 << 64) - 1), "timesteps": (1, MAX_TIMESTEPS),
    "patch": (1, MAX_SIZE), "blocks": (1, MAX_BLOCKS), "middle": (0, MAX_BLOCKS),
}  # fmt: skip
NAMES = {"schedule": ("linear", "scaled_linear", "cosine", "sigmoid", "flow"), "prediction": ("epsilon", "v", "x0", "flow")}


@dataclass(frozen=True)
class Settings:
    """What decides the weights. Two runs with equal settings, data and machine give equal weights, interrupted or not."""

    steps: int = 12_000
    batch: int = 128
    lr: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    drop_label: float = 0.1
    balance: float = 0.5
    flip: bool = False
    seed: int = 0
    schedule: str = "cosine"
    timesteps: int = 500
    prediction: str = "v"
    channels: tuple[int, ...] = (64, 128)
    patch: int = 2
    blocks: int = 2
    middle: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.channels, list):
            object.__setattr__(self, "channels", tuple(self.channels))
        for name, value in vars(self).items():
            fits, wanted = _fits(name, value)
            if not fits:
                raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _fits(name: str, value: Any) -> tuple[bool, str]:
    """Whether a setting may have this value, and what it must be."""
    if name in WHOLE:
        low, high = WHOLE[name]
        return type(value) is int and low <= value <= high, f"a whole number, at least {low} and at most {high}"
    if name in NAMES:
        return isinstance(value, str) and value in NAMES[name], f"one of {', '.join(NAMES[name])}"
    if name == "channels":
        fits = isinstance(value, tuple) and 0 < len(value) <= MAX_BLOCKS and all(type(c) is int and 0 < c <= MAX_SIZE for c in value)
        return fits, f"1 to {MAX_BLOCKS} whole numbers, each at least 1 and at most {MAX_SIZE}"
    if name == "flip":
        return isinstance(value, bool), "True or False"
    return number(value) and 0 <= value <= 1, "a number from 0 to 1"


def learning_rate(settings: Settings, step: int) -> float:
    """Warm-up, a constant stretch, then a line to 0 over the last `decay` of the steps."""
    rise = (step + 1) / settings.warmup if step < settings.warmup else 1.0
    left = (settings.steps - step) / max(settings.decay * settings.steps, 1)
    return settings.lr * min(rise, left, 1.0)


@dataclass
class Pool:
    """The training images on the device, and how examples are drawn from them."""

    images: Tensor  # uint8 [M, H, W, C]
    labels: Tensor | None  # int64 [M]
    share: Tensor  # float64 [M], rising to 1: which part of the unit interval draws which image
    counter: Tensor

    @staticmethod
    def of(dataset: data.Dataset, balance: float, device: torch.device) -> Pool:
        """balance: a class of m images is drawn in proportion to m^balance, so 1 is as they come and 0 every class alike."""
        weight = np.ones(len(dataset))
        if dataset.labels is not None:
            count = np.bincount(dataset.labels, minlength=len(dataset.classes))
            weight = np.maximum(count, 1).astype(np.float64)[dataset.labels] ** (balance - 1)
        share = np.cumsum(weight) / weight.sum()
        labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)
        return Pool(torch.from_numpy(dataset.images).to(device), labels, torch.from_numpy(share).to(device), counter("draw", 0, device))

    def draw(self, settings: Settings, examples: Tensor, seeds: Tensor, null: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Examples by number, int64 [B] -> (x_0 fp32 [B, C, H, W], timesteps int64 [B], labels int64 [B]).

        The four words of one Philox call say timestep, image, label dropout (Ho & Salimans 2022, algorithm 1) and flip.
        """
        words = ops.noise_words(seeds, examples, self.counter, 1)[:, 0]  # [B, 4]
        t = words[:, 0] * settings.timesteps >> 32
        uniform = (words[:, 1:3].double() + 0.5) * 2.0**-32
        index = torch.searchsorted(self.share, uniform[:, 0].contiguous()).clamp(max=len(self.share) - 1)
        x0 = data.to_float(self.images[index], words[:, 3] >> 31 == 1 if settings.flip else None)
        labels = None if self.labels is None else torch.where(uniform[:, 1] < settings.drop_label, null, self.labels[index])
        return x0, t, labels


@dataclass
class Run:
    """A training run in progress: everything that its next step depends on."""

    settings: Settings
    schedule: Schedule
    classes: tuple[str, ...]
    model: UNet
    ema: UNet
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of all processes together, since the last entry of history

    @staticmethod
    def new(settings: Settings, dataset: data.Dataset, device: torch.device) -> Run:
        config, schedule = layout(settings, dataset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = UNet(config)
        model = model.to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
        return Run(settings, schedule, dataset.classes, model, ema, optimizer)

    def checkpoint(self, record: dict[str, Any]) -> Checkpoint:
        curve = self.history[:: max(len(self.history) // 100, 1)]
        record = record | {"step": self.step, "seconds": round(self.seconds), "loss": curve, "held_out_loss": self.held_out}
        return Checkpoint(self.ema, self.schedule, self.settings.prediction, self.classes, record)

    def save(self, path: Path, digest: str, names: tuple[str, ...] = ()) -> None:
        """Everything that `restore` needs, in one file, atomically. names: of the processes, for `Group.restarted`."""
        tensors = {f"{part}.{k}": v for part, m in (("model", self.model), ("ema", self.ema)) for k, v in m.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        if self.losses:
            tensors["losses"] = torch.stack(self.losses)
        about = {
            "training": 1, "settings": asdict(self.settings), "digest": digest, "step": self.step, "seconds": self.seconds,
            "history": self.history, "held_out": self.held_out, "processes": names,
        }  # fmt: skip
        write_tensors(path, tensors, about)

    def restore(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """From what `read_state` gives, of a network that `compare` has found to fit."""
        for part, m in (("model", self.model), ("ema", self.ema)):
            m.load_state_dict({k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")})
        parameters = list(self.model.parameters())
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                # Moments must lie in memory as their parameter does (channels-last): the fused optimiser walks both in memory order.
                like = parameters[int(i)]
                state.setdefault(int(i), {})[key] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.losses = list(tensors["losses"].to(next(self.model.parameters()).device)) if "losses" in tensors else []
        self.step, self.seconds = about["step"], float(about["seconds"])
        self.history, self.held_out = [tuple(p) for p in about["history"]], [tuple(p) for p in about["held_out"]]


def layout(settings: Settings, dataset: data.Dataset) -> tuple[UNetConfig, Schedule]:
    """The network and the schedule of a run. ValueError where these settings and data make none, or one whose state could not be read again."""
    config = UNetConfig(
        dataset.shape,
        settings.patch,
        settings.channels,
        settings.blocks,
        settings.middle,
        num_classes=len(dataset.classes) or None,
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(config).parameters())
    most = (MAX_FILE - MAX_HEADER) // 16  # with averages and two moments, in fp32
    if count > most:
        raise ValueError(
            f"a network of {count} parameters, of whose state --resume reads {most} at most; give fewer --channels or --blocks"
        )
    return config, Schedule.from_config({"name": settings.schedule, "timesteps": settings.timesteps})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Settings]:
    """A state file's tensors, metadata and settings. CheckpointError for anything else; `compare` looks at the tensors."""
    if not path.is_file():
        raise CheckpointError(f"nothing to resume: there is no {path}; leave out --resume to begin a run there")
    tensors, about = read_tensors(path)
    if about.get("training") != 1:
        raise CheckpointError(f"{path} is not the state of a training run")
    try:
        if about["settings"].keys() != {f.name for f in fields(Settings)}:
            raise ValueError("its settings are those of another version")
        settings = Settings(**about["settings"])
        step, seconds = about["step"], about["seconds"]
        if type(step) is not int or not 0 <= step <= settings.steps:
            raise ValueError(f"step is {step!r}; it must be a whole number from 0 to its settings' steps, {settings.steps}")
        if not number(seconds) or seconds < 0:
            raise ValueError(f"seconds is {seconds!r}; it must be a number of at least 0")
        for name in ("history", "held_out"):
            if not isinstance(about[name], list) or not all(_point(v, step) for v in about[name]):
                raise ValueError(f"{name} is no list of pairs of a step, until {step}, and a loss")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path} is the state of no training run that this version knows: {e}") from None
    return tensors, about, settings


def _point(value: Any, step: int) -> bool:
    """Whether it is a point of a loss curve. A loss on held-out images may have been infinite, or no number."""
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and 0 <= value[0] <= step and type(value[1]) is float


def compare(tensors: dict[str, Tensor], step: int, config: UNetConfig) -> None:
    """ValueError, whose subject is the file, where a state's tensors are not those of such a network after so many steps. Allocates nothing."""
    with torch.device("meta"):
        model = UNet(config)
    wanted = {f"{part}.{k}": v.shape for part in ("model", "ema") for k, v in model.state_dict().items()}
    for i, p in enumerate(model.parameters() if step else ()):
        wanted |= {f"adam.{i}.step": torch.Size(), f"adam.{i}.exp_avg": p.shape, f"adam.{i}.exp_avg_sq": p.shape}
    losses = tensors.get("losses", torch.empty(0))
    if losses.dim() != 1 or len(losses) > step:
        raise ValueError(f"holds losses of the shape {list(losses.shape)} after {step} steps")
    given = {k: v.shape for k, v in tensors.items() if k != "losses"}
    if wanted != given:
        odd = min(k for k in wanted | given if wanted.get(k) != given.get(k))
        raise ValueError(f"does not fit its own settings: {odd} is {_shape(given.get(odd))}, should be {_shape(wanted.get(odd))}")
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise ValueError(f"holds {name} as {value.dtype}, should be torch.float32")


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else str(list(shape))


def take_up(settings: Settings, dataset: data.Dataset, path: Path, digest: str, device: torch.device) -> Run:
    """The run whose state is at `path`. ValueError where that was another run, of other data or settings, or is damaged: before a network is made."""
    tensors, about, saved = read_state(path)
    if about.get("digest") != digest:
        raise ValueError(f"{path} was trained on other data; give the same --data, or another --out for a new run")
    for name, value in asdict(saved).items():
        if name != "steps" and value != getattr(settings, name):
            raise ValueError(f"{path} was trained with another {name}: {value}; leave it out, or give another --out")
    config, _ = layout(settings, dataset)
    try:
        compare(tensors, about["step"], config)
    except ValueError as e:
        raise CheckpointError(f"{path} is damaged: it {e}") from None
    if about["step"] > settings.steps:
        raise ValueError(f"{path} is at step {about['step']} already; give --steps above it to go on")
    run = Run.new(settings, dataset, device)
    run.restore(tensors, about)
    return run


def begin(settings: Settings, dataset: data.Dataset, out: Path, digest: str, device: torch.device, resume: bool, group: Group) -> Run:
    """A new run, or the one in the folder, which nobody else may write to. ValueError where what is there is not to be gone on with."""
    path = out / STATE
    there = group.any(group.first and path.exists())  # the first rank decides, lest half of them go on
    if resume or (there and group.any(group.first and ours(path, group))):
        run = take_up(settings, dataset, path, digest, device)
        log.info("go on with %s at step %d of %d", path, run.step, settings.steps)
        return run
    if there:
        raise ValueError(f"{out} holds a training run already; add --resume to go on with it, or give another --out")
    return Run.new(settings, dataset, device)


@contextmanager
def postponed_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list rather than acted on; a second Ctrl-C acts at once."""
    got: list[int] = []

    def note(number: int, _: Any) -> None:
        got.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@torch.no_grad()
def held_out_loss(run: Run, dataset: data.Dataset, device: torch.device, chunk: int = 256) -> float:
    """Mean squared error of the averaged network on the held-out images, each at a timestep and noise that stay the same."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    table = noise_table(run.schedule, run.settings.prediction, device)
    for start in range(0, len(dataset), chunk):
        x0 = data.to_float(torch.from_numpy(dataset.images[start : start + chunk]).to(device))
        ids = torch.arange(start, start + len(x0), device=device)
        labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[start : start + chunk]).to(device)
        zeros = torch.zeros_like(ids)
        t = ops.noise_words(zeros, ids, counter("draw", 1, device), 1)[:, 0, 0] * run.settings.timesteps >> 32
        x_t, target = ops.add_noise(x0, t, table, None, zeros, ids, counter("training", 1, device), True)
        total += F.mse_loss(run.ema(x_t, t, labels).float(), target, reduction="sum")
    return float(total) / (len(dataset) * int(np.prod(dataset.shape)))


def train(
    settings: Settings,
    dataset: data.Dataset,
    out: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    compile: bool | None = None,
    save_every: int = 500,
    sample_every: int = 1000,
    log_every: int = 50,
    record: dict[str, Any] | None = None,
    as_json: bool = False,
    group: Group = ALONE,
) -> Path:
    """Train to settings.steps and return the checkpoint's path; `out` also gets the run's state, sample grids and the loss curve.

    as_json: lines of JSON rather than a bar, see `Progress`. group: the processes that share the work, each of which calls this alike; the first
    one writes. Those that torchrun has started again go on from the state that they have saved before. KeyboardInterrupt after Ctrl-C or
    SIGTERM, with the run saved. ValueError where the settings, data or folder do not fit, or another process writes there, which is named;
    ConnectionError where another process of the group has ended.
    """
    device, out = pick_device(device), Path(out)
    learn, test = dataset.split()
    if not len(learn):
        raise ValueError("there are no images to train on: all are held out")
    if settings.batch < group.world:
        raise ValueError(f"a batch of {settings.batch} is too small for {group.world} processes: each needs an example of every step")
    layout(settings, dataset)
    digest = learn.digest()

    def agree(step: int) -> None:
        if group.any(not group.agree(fingerprint(settings, digest, step))):
            raise ValueError(f"the processes see different data, settings or states; each needs the same --data and the same {out}")

    agree(0)  # nobody writes before all have looked
    with own_folder(out, group):
        run = begin(settings, dataset, out, digest, device, resume, group)
        agree(run.step)
        if group.first:
            remove_parts(out, PARTS)
        about = {
            "settings": asdict(settings),
            "data": dataset.digest(),
            "images": len(learn),
            "device": str(device),
            "processes": group.world,
            "torch": torch.__version__,
        }
        return _go_on(
            run, learn, test, out, digest, (record or {}) | about, group, device=device, compile=compile, save_every=save_every,
            sample_every=sample_every, log_every=log_every, as_json=as_json,
        )  # fmt: skip


def _go_on(
    run: Run,
    learn: data.Dataset,
    test: data.Dataset,
    out: Path,
    digest: str,
    record: dict[str, Any],
    group: Group,
    *,
    device: torch.device,
    compile: bool | None,
    save_every: int,
    sample_every: int,
    log_every: int,
    as_json: bool,
) -> Path:
    """What `train` does with a run in a folder that nobody else writes to."""
    settings, cuda = run.settings, device.type == "cuda"
    first, end = (settings.batch * r // group.world for r in (group.rank, group.rank + 1))
    pool = Pool.of(learn, settings.balance, device)
    table = noise_table(run.schedule, settings.prediction, device)
    noise_counter = counter("training", 0, device)
    seeds = torch.full((end - first,), signed(settings.seed), device=device)
    null = len(run.classes)
    # The mean over ranks of the ranks' weighted means is the mean over the batch.
    weight = (end - first) * group.world / settings.batch
    call = torch.compile(run.model) if (cuda if compile is None else compile) else run.model
    if group.world > 1:
        with lost():  # DDP finds what is compiled within it, and has it cut where gradients can set out
            call = DistributedDataParallel(call, device_ids=[device] if cuda else None)
    parameters: list[Tensor] = list(run.model.parameters())
    averages: list[Tensor] = list(run.ema.parameters())
    shares: list[Tensor] = []  # this rank's part of the losses that are not yet in run.losses
    log.info("%d of %d: examples %d to %d of each %d, on %s", group.rank + 1, group.world, first, end - 1, settings.batch, device)

    def check_loss() -> None:
        """Add up what the ranks have, all of which see the same sums, and so stop together."""
        if shares:
            run.losses += group.sum(torch.stack(shares) / group.world)
            shares.clear()
        if run.losses and not torch.stack(run.losses).isfinite().all():
            kept = f"the last good state is in {out}" if (out / STATE).exists() else "nothing was saved yet"
            raise ValueError(f"the loss is no longer finite at step {run.step}; {kept}; try a smaller --lr")

    def save() -> None:
        """The state last: whatever a kill leaves undone before it is made again on resume."""
        check_loss()
        if not group.first:
            return
        if len(test) and (not run.held_out or run.held_out[-1][0] != run.step):
            add_point(run.held_out, run.step, held_out_loss(run, test, device))
        loss_curve(run, out / "loss.png")
        run.checkpoint(record).save(out / CHECKPOINT)
        run.save(out / STATE, digest, group.names)
        log.info("saved step %d in %s; held-out loss %s", run.step, out, run.held_out[-1][1] if run.held_out else "unknown")

    ask, asked = run.step, (run.step, time.monotonic())

    def stop() -> bool:
        """Whether a signal has come, to any rank. Each has its own moment, so several settle it at steps that they have in common: the first one
        says how many go before the next."""
        nonlocal ask, asked
        if group.world == 1:
            return bool(signals)
        if run.step < ask:
            return False
        now = time.monotonic()
        said = group.sum(torch.tensor([bool(signals), steps_to_ask(run.step - asked[0], now - asked[1]) if group.first else 0]))
        ask, asked = run.step + int(said[1]), (run.step, now)
        return bool(said[0])

    began, before, started = time.perf_counter(), run.seconds, run.step
    with (
        # Not of the group: each rank takes every step.
        Progress(settings.steps, run.step, unit="steps", as_json=as_json, shown=group.first) as progress,
        postponed_signals() as signals,
        lost(),
    ):
        while run.step < settings.steps and not stop():
            for options in run.optimizer.param_groups:
                options["lr"] = learning_rate(settings, run.step)
            examples = torch.arange(run.step * settings.batch + first, run.step * settings.batch + end, device=device)
            x0, t, labels = pool.draw(settings, examples, seeds, null)
            x_t, target = ops.add_noise(x0, t, table, None, seeds, examples, noise_counter, True)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                loss = F.mse_loss(call(x_t, t, labels).float(), target)
            if weight != 1:
                loss = loss * weight
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - min(settings.ema, (run.step + 1) / (run.step + 10)))
            shares.append(loss.detach())
            run.step += 1
            run.seconds = before + time.perf_counter() - began
            progress.move(1)
            if run.step == started + 1:
                progress.begin()  # the first step compiles
            if run.step % log_every == 0:
                check_loss()
                mean = float(torch.stack(run.losses).mean())
                run.losses.clear()
                add_point(run.history, run.step, mean)
                progress.note(f"loss {mean:.4f}, {settings.batch * progress.rate():.0f} images/s", loss=round(mean, 6))
                log.debug("step %d: loss %.6f", run.step, mean)
            last = run.step == settings.steps
            if group.first and (run.step % sample_every == 0 or last):
                sample_grid(run, out / f"samples-{run.step:06d}.png")
            if run.step % save_every == 0 or last:
                save()
        if run.step < settings.steps:
            save()
        group.barrier()  # nobody ends, or says that all is there, while the first one writes
    if run.step < settings.steps:
        raise KeyboardInterrupt(f"stopped at step {run.step} of {settings.steps}; saved in {out}")
    return out / CHECKPOINT


def ours(path: Path, group: Group) -> bool:
    """Whether the state at `path` is what these processes have saved before they were started again."""
    try:
        return group.restarted(read_state(path)[1].get("processes"))
    except CheckpointError:
        return False


def add_point(curve: list[tuple[int, float]], step: int, loss: float) -> None:
    """At the end of a loss curve, which keeps every other point where they have become MAX_POINTS."""
    curve.append((step, round(loss, 6)))
    if len(curve) >= MAX_POINTS:
        del curve[-2::-2]


def steps_to_ask(steps: int, seconds: float) -> int:
    """How many steps are about ASK_S long, if so many took so many seconds."""
    return max(1, min(int(ASK_S * steps / max(seconds, 1e-9)), ASK_STEPS))


def fingerprint(settings: Settings, digest: str, step: int) -> Tensor:
    """What the ranks of a run must have in common before a step, int64 [1]."""
    words = repr((digest, settings, step)).encode()
    return torch.tensor([int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)])


def sample_grid(run: Run, path: Path, per_class: int = 8, most: int = 20) -> None:
    """A picture of new images by the averaged network, a row a class (the first `most`), always from the same noise."""
    kinds = min(max(len(run.classes), 1), most)
    labels = torch.arange(kinds).repeat_interleave(per_class) if run.classes else None
    steps = min(20, run.schedule.timesteps)
    sampler = run.checkpoint({}).sampler(steps=steps, dtype=torch.float32, compile=False, micro_batch=16)
    images = sampler(kinds * per_class, labels=labels, guidance=2.0 if run.classes else 1.0)
    with atomic_write(path) as f:
        data.grid(data.to_uint8(images).cpu().numpy(), per_class, scale=3).save(f, format="PNG")


def loss_curve(run: Run, path: Path) -> None:
    """Loss against step, the mean of every logged stretch, and the held-out loss. Left out where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="mean squared error", yscale="log", title="Training loss")
    if run.history:
        axes.plot(*zip(*run.history, strict=True), lw=1, label="training, as it went")
    if run.held_out:
        axes.plot(*zip(*run.held_out, strict=True), "o-", ms=3, label="held out, averaged weights")
    axes.grid(True, which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=120)


def parser() -> cli.Parser:
    d = Settings()
    p = cli.Parser(
        prog=PROG,
        argument_default=argparse.SUPPRESS,
        description="Train a class-conditional diffusion UNet on small images. Writes checkpoint.safetensors (averaged weights, for "
        "python -m fastdiff.sample --checkpoint), state.safetensors (for --resume), sample grids and a loss curve into --out. "
        "Ctrl-C saves and says how to go on. torchrun --nproc-per-node N -m fastdiff.train shares each step's examples among N processes.",
    )
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        default="sprites",
        help="sprites (shipped), a folder of images with a sub-folder a class, .npz, .npy, or a sheet with --tile",
    )
    g.add_argument("--labels", default=None, help="labels of a .npy data file, a second .npy")
    g.add_argument("--tile", default=None, type=cli.whole(1, 4096), metavar="PIXELS", help="cut an image file into tiles of this size")
    g.add_argument("--size", default=None, type=cli.whole(1, 4096), metavar="PIXELS", help="resize a folder's images to this size")
    g.add_argument("--skip-bad", default=False, action="store_true", help="leave out images of a folder that cannot be read, and name them")
    g.add_argument("--flip", action="store_true", help="mirror every other example left-right")
    g.add_argument(
        "--balance",
        type=cli.number(float, 0, 1),
        metavar="P",
        help=f"draw a class of m images in proportion to m^P: 1 as they come, 0 all classes alike ({d.balance})",
    )
    g = p.add_argument_group("training")
    g.add_argument("--out", default="runs/train", help="folder of the run (runs/train)")
    g.add_argument(
        "--resume",
        default=False,
        action="store_true",
        help="go on with the run in --out, exactly as if it had not been interrupted",
    )
    g.add_argument("--steps", type=cli.whole(1), help=f"optimiser steps in all ({d.steps})")
    g.add_argument("--batch", type=cli.whole(1), help=f"examples a step ({d.batch})")
    g.add_argument("--lr", type=cli.number(float, 0, 1), help=f"AdamW's learning rate ({d.lr})")
    g.add_argument("--warmup", type=cli.whole(0), metavar="STEPS", help=f"steps of rising learning rate ({d.warmup})")
    g.add_argument(
        "--decay",
        type=cli.number(float, 0, 1),
        metavar="PART",
        help=f"part of the steps, at the end, over which the learning rate falls to 0 ({d.decay})",
    )
    g.add_argument("--ema", type=cli.number(float, 0, 1), help=f"decay of the averaged weights, which are what is sampled from ({d.ema})")
    g.add_argument(
        "--drop-label",
        type=cli.number(float, 0, 1),
        metavar="P",
        help=f"chance that an example is trained without its class, for guidance ({d.drop_label})",
    )
    g.add_argument("--seed", type=cli.whole(0, 2**64 - 1), help=f"fixes weights, order, timesteps and noise ({d.seed})")
    g = p.add_argument_group("diffusion and network")
    g.add_argument("--schedule", choices=NAMES["schedule"], help=f"noise schedule ({d.schedule})")
    g.add_argument("--timesteps", type=cli.whole(1), help=f"noise levels ({d.timesteps})")
    g.add_argument("--prediction", choices=NAMES["prediction"], help=f"what the network learns to say ({d.prediction})")
    g.add_argument(
        "--channels", type=cli.whole(1), nargs="+", metavar="C", help=f"width at each resolution ({' '.join(map(str, d.channels))})"
    )
    g.add_argument("--patch", type=cli.whole(1), help=f"pixels folded into channels before the first convolution, each way ({d.patch})")
    g.add_argument("--blocks", type=cli.whole(1), help=f"residual blocks at each resolution, down and up ({d.blocks})")
    g.add_argument("--middle", type=cli.whole(0), help=f"residual blocks between down and up ({d.middle})")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default=None, help="cpu or cuda (cuda where there is one)")
    g.add_argument("--compile", default=None, action=argparse.BooleanOptionalAction, help="torch.compile the network (on CUDA)")
    g.add_argument("--save-every", default=500, type=cli.whole(1), metavar="STEPS", help="steps between saves (500)")
    g.add_argument(
        "--sample-every", default=1000, type=cli.whole(1), metavar="STEPS", help="steps between sample grids and loss curves (1000)"
    )
    p.add_argument(
        "--json",
        default=False,
        action="store_true",
        help="print lines of JSON: progress now and then, and in the end where the checkpoint is",
    )
    cli.add_log_level(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    cli.start_log(args["log_level"])
    typed = sys.argv[1:] if argv is None else argv
    with join(cuda=torch.cuda.is_available() and args["device"] != "cpu") as group, one_voice(group):
        return command(args, typed, group)


def command(args: dict[str, Any], typed: list[str], group: Group) -> int:
    out = Path(args["out"])
    given = {f.name: args[f.name] for f in fields(Settings) if f.name in args}
    if "channels" in given:
        given["channels"] = tuple(given["channels"])
    if args["resume"]:
        given = asdict(read_state(out / STATE)[2]) | given
    if group.world > 1 and (args["device"] or "").startswith("cuda:"):
        raise ValueError(f"{group.world} processes take a GPU each; give --device cuda, or leave it out, not {args['device']}")
    device = pick_device(own_device(args["device"], group.local) if group.world > 1 else args["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dataset = data.load(args["data"], labels=args["labels"], tile=args["tile"], size=args["size"], skip_bad=args["skip_bad"])
    start = PROG if group.world == 1 else f"torchrun --nproc-per-node {group.world} -m fastdiff.train"
    line = shlex.join([*start.split(), *typed])
    began = time.perf_counter()
    try:
        path = train(
            Settings(**given), dataset, out, resume=args["resume"], device=device, compile=args["compile"], save_every=args["save_every"],
            sample_every=args["sample_every"], record={"command": line, "source": args["data"]}, as_json=args["json"], group=group,
        )  # fmt: skip
    except KeyboardInterrupt as e:
        if group.first:
            again = line if args["resume"] else f"{line} --resume"
            if args["json"]:
                print(json.dumps({"event": "stopped", "why": str(e) or "interrupted", "resume": again}))
            else:
                print(f"\n{e}. Go on with: {again}" if str(e) else "\ninterrupted")
        return 130
    if group.first and args["json"]:
        seconds = round(time.perf_counter() - began, 1)
        print(
            json.dumps(
                {"event": "done", "checkpoint": str(path), "images": len(dataset.split()[0]), "seconds": seconds, "device": str(device)}
            )
        )
    elif group.first:
        print(f"{path}: trained on {len(dataset.split()[0])} images in {time.perf_counter() - began:.0f} s on {device}")
        print(f"sample from it: python -m fastdiff.sample --checkpoint {path}")
    return 0


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

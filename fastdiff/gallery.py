"""The pictures of `fastdiff.show`, one function a kind: a checkpoint and options -> files, and what is to be seen in them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from . import data, noise, solvers
from .checkpoint import Checkpoint
from .devices import pick_device
from .files import make_folder
from .likelihood import dequantised, log_likelihood
from .loop import answered
from .pictures import Bar, Made, each, figure, save, save_gif, stacked
from .sampler import Sampler
from .schedules import Schedule

# The noise levels of the lesson, as sigma / alpha: what a person says of a sprite there.
LEVELS = (
    (0.0, "clean"),
    (0.12, "a little noise"),
    (0.3, "some noise"),
    (0.6, "more noise"),
    (1.1, "only an outline"),
    (2.2, "hardly a hint"),
    (20.0, "no idea"),
)
GUIDANCES = (0.0, 1.0, 2.0, 4.0, 8.0)
# Clear, and still varied: what the pictures that are not about guidance use.
GUIDANCE = 2.0
# The classes of the shipped set that are best seen, and so are shown where not all are.
FAVOURITES = ("adventurer", "portrait", "monster", "potion or food", "spell", "armour")
SOLVERS = ("ddpm", "ddim", "heun", "dpmpp_2m", "unipc")
EVALUATIONS = (5, 10, 20, 50)


def silent(steps: int) -> Any:
    """A progress bar that nobody sees."""
    return tqdm(total=steps, disable=True)


@dataclass(frozen=True)
class Options:
    """What a picture is made with. label: a class number, or None for the picture's own choice. steps, solver, scale: None for the picture's own;
    `solvers` takes several. image: the picture of `forward`, a file or the number of a shipped sprite. progress: makes a progress bar."""

    seed: int = 0
    label: int | None = None
    steps: tuple[int, ...] = ()
    solver: tuple[str, ...] = ()
    scale: int | None = None
    image: str | None = None
    device: str | None = None
    progress: Bar = silent

    def one(self, name: str, default: Any) -> Any:
        """The only one of several steps or solvers. ValueError where there are more."""
        values = getattr(self, name)
        if len(values) > 1:
            raise ValueError(f"--{name} was given {len(values)} times; this picture takes one (only solvers compares several)")
        return values[0] if values else default


class Mixture(nn.Module):
    """A network whose class k is halfway, or some of the way, between two classes of another network: weights[k] is how much of the second.

    What it says is the average of what the network says of either class. Of a score that means: the logarithms of the two densities are averaged, so
    a walk along it looks for images that both classes find likely, p(x | a)^(1 - w) p(x | b)^w (up to the noise levels between, where it is only
    nearly so), and not for some of one class beside some of the other. Class len(weights) is the null class, as ever.
    """

    weights: Tensor
    pairs: Tensor

    def __init__(self, network: nn.Module, first: int, second: int, weights: Tensor, null: int) -> None:
        super().__init__()
        self.network, self.null = network, null
        self.register_buffer("weights", torch.cat([weights, torch.zeros(1)]))
        self.register_buffer("pairs", torch.tensor([[first, second]] * len(weights) + [[null, null]]))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        weight = self.weights.to(x.dtype)[labels].reshape(-1, 1, 1, 1)
        first, second = (answered(self.network(x, t, self.pairs[labels, k])) for k in (0, 1))
        mixed: Tensor = (1 - weight) * first + weight * second
        return mixed


def forward(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """A sprite at rising levels of noise: a strip, what the network makes of each level, and an animation."""
    x0 = data.to_float(torch.from_numpy(_picture(checkpoint, options)[None]))  # [1, C, H, W]
    z = noise.normal(options.seed, [0], 0, checkpoint.shape, stream="draw")
    scale, out = _scale(checkpoint, options, 128), make_folder(out)
    noisy: list[Any] = []
    guesses: list[Any] = []
    shares: list[Any] = []
    with options.progress(len(LEVELS)) as bar:
        for ratio, _ in LEVELS:
            for parts, part in zip((noisy, guesses, shares), _noised(checkpoint, x0, z, ratio, options.label), strict=True):
                parts.append(part)
            bar.update()
    names = [name for _, name in LEVELS]
    captions = [_percent(share) for share in shares]
    strip = figure(
        [noisy], scale=scale, columns=names, under=[each(captions)], title="Noise dissolves a sprite",
        text="x_t = alpha x_0 + sigma z: the sprite fades while Gaussian noise takes over. First the details go, then the outline, then all.",
        note="Noise: its share of the variance.",
    )  # fmt: skip
    save(strip, out / "forward.png")
    pair = figure(
        [noisy, guesses], scale=scale, columns=names, under=[each(captions)], labels=["x_t", "its guess\nof x_0"],
        title="What the network makes of it",
        text="In one look, at each level: the average of all sprites that this noise could have come from. "
        "The more noise, the more such sprites there are, and the softer is their average.",
    )  # fmt: skip
    save(pair, out / "forward_guess.png")

    frames, steps = [], 25
    first, last = np.log(0.03), np.log(LEVELS[-1][0])
    with options.progress(steps + 1) as bar:
        for k in range(steps + 1):
            ratio = float(np.exp(first + (last - first) * (k - 1) / (steps - 1))) if k else 0.0
            seen, guessed, share = _noised(checkpoint, x0, z, ratio, options.label)
            name = [name for level, name in LEVELS if level <= ratio * 1.001][-1]
            frames.append(
                figure(
                    [[seen, guessed]], scale=2 * scale, title=f"Noise dissolves a sprite: {name}", columns=["x_t", "the network's guess of x_0"],
                    gauge=(share, _percent(share)), least=660,
                )
            )  # fmt: skip
            bar.update()
    save_gif(frames, out / "forward.gif", ms=[1200] + [150] * steps, pause=2000)
    return [
        Made(out / "forward.png", "Noise dissolves a sprite", "A sprite at seven levels of noise, from clean to no idea."),
        Made(
            out / "forward_guess.png",
            "What the network makes of it",
            "Above, a sprite with more and more noise; below, the network's guess of the clean sprite at each level: sharp, then "
            "soft, then the average of all sprites.",
        ),
        Made(
            out / "forward.gif",
            "Noise dissolves a sprite, as a film",
            "The same sprite dissolving in noise, from clean to no idea, and what the network takes it for.",
        ),
    ]


def reverse(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """From pure noise to sprites: x_t and the guess of x_0 in it, as a strip and an animation of 32 sprites."""
    sampler = _sampler(checkpoint, options, solver="ddim", steps=min(40, checkpoint.schedule.timesteps))
    rows, columns, out = 4, 8, make_folder(out)
    labels = _labels(checkpoint, options, rows * columns, each=columns, shown=rows)
    seen = _walk(sampler, rows * columns, labels, options)
    total = len(seen.x0)
    scale = _scale(checkpoint, options, 96)

    # Rows of the table at even steps of what an eye sees: the share of noise, from all to none.
    wanted = [1, 0.97, 0.9, 0.75, 0.55, 0.35, 0.18, 0.06]
    moments = sorted({int(np.abs(seen.shares[:total] - share).argmin()) for share in wanted})
    chosen = [0, columns, 2 * columns] if rows > 2 else [0]
    strips: list[list[np.ndarray | None]] = []
    for sample in chosen:
        strips.append([seen.x[k, sample] for k in moments] + [seen.x[-1, sample]])
        strips.append([seen.x0[k, sample] for k in moments] + [seen.x[-1, sample]])
    strip = figure(
        strips, scale=scale, columns=[_percent(seen.shares[k]) for k in moments] + ["done"],
        labels=["x_t", "guess of x_0"] * len(chosen), title="Out of noise: first an outline, then detail",
        text="Above, the image on its way; below, the network's guess at that moment of what it will be. "
        "A step goes a little towards the guess, and then the network looks again.",
    )  # fmt: skip
    save(strip, out / "reverse.png")

    small = max(scale // 2, 1)
    frames = []
    # What happens in the last tenth of the noise is what the eye sees most of.
    film = sorted({int(np.abs(seen.shares[:total] - share).argmin()) for share in 1 - np.linspace(0, 1, 18) ** 1.5} | {0, total})
    with options.progress(len(film)) as bar:
        for k in film:
            guesses = seen.x0[k] if k < total else seen.x[-1]
            grids: list[list[np.ndarray | None]] = [
                [*seen.x[k, r * columns : (r + 1) * columns], *guesses[r * columns : (r + 1) * columns]] for r in range(rows)
            ]
            share = seen.shares[k]
            frames.append(
                figure(
                    grids, scale=small, apart=[columns], title="Out of noise: thirty-two sprites", gauge=(share, _percent(share)),
                    over=[(0, columns - 1, "x_t"), (columns, 2 * columns - 1, "guess of x_0")],
                )
            )  # fmt: skip
            bar.update()
    save_gif(frames, out / "reverse.gif", ms=220, pause=3000)
    return [
        Made(
            out / "reverse.png",
            "Out of noise: first an outline, then detail",
            "Three sprites on their way out of pure noise, each with the network's guess of the end below it: a soft outline first, "
            "detail last.",
        ),
        Made(
            out / "reverse.gif",
            "Thirty-two sprites at once",
            "Left, four rows of eight sprites come out of noise; right, what the network takes them for on the way.",
        ),
    ]


def posterior(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """One clean sprite and many noisy versions of it; one noisy sprite and many completions, at several levels."""
    count, shown = 48, 7
    solver = options.one("solver", "ddpm")
    steps = options.one("steps", min(40, checkpoint.schedule.timesteps))
    sampler = checkpoint.sampler(solver=solver, steps=steps, device=pick_device(options.device))
    if not sampler.table.column("s").any():
        raise ValueError(f"solver {solver!r} adds no noise, so a noisy sprite would have one completion; take ddpm or euler_ancestral")
    pixels = _picture(checkpoint, options)
    x0 = data.to_float(torch.from_numpy(pixels[None]))
    scale, out = _scale(checkpoint, options, 80), make_folder(out)

    alpha, sigma, _ = _level(checkpoint.schedule, 0.6)
    z = noise.normal(options.seed, range(2 * (shown + 2)), 1, checkpoint.shape, stream="draw")
    versions = _shown(alpha * x0 + sigma * z, alpha, sigma)
    half = shown + 2
    clean = figure(
        [[pixels, *versions[:half]], [None, *versions[half:]]], scale=scale, apart=[1],
        columns=["clean"], over=[(1, half, f"noisy versions of it, each {100 * _share(alpha, sigma):.0f} % noise")],
        title="One clean sprite, many noisy ones", text="To add noise is easy: draw it. Every draw makes another noisy image of the same sprite.",
    )  # fmt: skip

    rows: list[list[np.ndarray | None]] = []
    labels = []
    for strength in (0.3, 0.45, 0.6, 0.75):
        table = solvers.table(
            solver, checkpoint.schedule, steps=steps, strength=strength, prediction=checkpoint.prediction, clip=checkpoint.clip
        )
        alpha, sigma = (float(v) for v in table.levels[0])
        # The start is the same for all: one seed. The noise of the steps is each one's own.
        images = sampler(
            count, seeds=[options.seed] * count, x_start=x0, strength=strength, labels=options.label, progress=options.progress,
            noise=lambda row: noise.normal(options.seed + 1, range(count), row, checkpoint.shape),
        ).cpu()  # fmt: skip
        start = alpha * x0 + sigma * noise.normal(options.seed, [0], 0, checkpoint.shape, stream="start")
        best = guess(checkpoint, start, float(table.timesteps[0]), options.label)
        made = data.to_uint8(images).numpy()
        average = data.to_uint8(images.mean(0, keepdim=True)).numpy()[0]
        rows.append([_shown(start, alpha, sigma)[0], *made[:shown], average, data.to_uint8(best).numpy()[0]])
        labels.append(_percent(_share(alpha, sigma)))
    many = figure(
        rows, scale=scale, labels=labels, apart=[1, shown + 1],
        columns=["noisy", *[""] * shown, f"mean of {count}", "guess of x_0"], over=[(1, shown, "clean sprites that it may have been")],
        title="One noisy sprite, many clean ones",
        text="Little noise leaves no doubt. Much noise leaves many answers, and a network that must give one gives their average: the last column, "
        "in a single look, is what the column before it took many walks to find.",
    )  # fmt: skip
    save(stacked([clean, many]), out / "posterior.png")
    return [
        Made(
            out / "posterior.png",
            "Many answers",
            "Above, one clean sprite and eighteen noisy versions of it. Below, noisy sprites at four levels and seven clean sprites "
            "that each may have been; their mean looks like the network's guess.",
        ),
    ]


def guidance(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """The same noise at rising guidance towards a class, and at mixtures of two classes."""
    if not checkpoint.classes:
        raise ValueError("guidance needs a network with classes, and this checkpoint has none")
    steps = min(20, checkpoint.schedule.timesteps)
    sampler = _sampler(checkpoint, options, solver="unipc", steps=steps)
    columns, scale, out = 10, _scale(checkpoint, options, 80), make_folder(out)
    label = options.label if options.label is not None else min(1, len(checkpoint.classes) - 1)
    name = checkpoint.classes[label]
    n = len(GUIDANCES) * columns
    seeds = [options.seed + i for i in range(columns)] * len(GUIDANCES)
    weights = [w for w in GUIDANCES for _ in range(columns)]
    images = data.to_uint8(sampler(n, seeds=seeds, labels=label, guidance=weights, progress=options.progress)).cpu().numpy()
    says = ["any class", "the class", "clearer", "alike", "overdone"]
    picture = figure(
        _rows(images, columns), scale=scale, labels=[f"w = {w:g}\n{say}" for w, say in zip(GUIDANCES, says, strict=True)],
        title=f"Guidance: from anything to {_an(name)}",
        text="A column is one noise. At 0 the network is not told the class, at 1 it is, and beyond, each step goes further where the class leads: "
        "m_u\u00a0+\u00a0w\u00a0(m_c\u00a0-\u00a0m_u).",
    )  # fmt: skip
    save(picture, out / "guidance.png")
    made = [
        Made(
            out / "guidance.png",
            f"Guidance: from anything to {_an(name)}",
            f"Ten columns of one noise each, at guidance 0, 1, 2, 4 and 8 towards {_an(name)}: more guidance, more of the class and "
            "less variety.",
        )
    ]
    if len(checkpoint.classes) < 2:
        return made

    others = [k for k in (2, 0, 1) if k != label and k < len(checkpoint.classes)]
    first, second = (label, others[0]) if options.label is not None else (0, min(2, len(checkpoint.classes) - 1))
    shares = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0])
    mixture = Mixture(checkpoint.model, first, second, shares, len(checkpoint.classes))
    mixer = Sampler(
        mixture, checkpoint.schedule, shape=checkpoint.shape, prediction=checkpoint.prediction, num_classes=len(shares),
        solver=sampler.solver, steps=options.one("steps", steps), device=sampler.device, compile=False,
    )  # fmt: skip
    labels = [k for k in range(len(shares)) for _ in range(columns)]
    images = data.to_uint8(mixer(n, seeds=seeds, labels=labels, guidance=GUIDANCE, progress=options.progress)).cpu().numpy()
    one, two = checkpoint.classes[first], checkpoint.classes[second]
    picture = figure(
        _rows(images, columns), scale=scale, labels=[f"{100 * (1 - s):.0f} % {one}\n{100 * s:.0f} % {two}" for s in shares.tolist()],
        title=f"Mixtures: between {one} and {two}",
        text="A column is one noise. What the network says of the two classes is averaged in every step, so the walk looks for sprites that "
        "both could claim. There was never such a class.",
    )  # fmt: skip
    save(picture, out / "mixtures.png")
    return [
        *made,
        Made(
            out / "mixtures.png",
            f"Mixtures: between {one} and {two}",
            f"Ten columns of one noise each, in five steps from {_an(one)} to {_an(two)}.",
        ),
    ]


def compare(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """The same noise walked by several solvers in several numbers of evaluations, with the time taken."""
    names = options.solver or SOLVERS
    counts = options.steps or tuple(n for n in EVALUATIONS if n <= checkpoint.schedule.timesteps)
    shown, measured = 3, 16
    sampler = checkpoint.sampler(solver="ddim", steps=counts[0], device=pick_device(options.device))
    for name in names:  # before anything is drawn
        for count in counts:
            solvers.table(name, checkpoint.schedule, steps=_steps(name, count, checkpoint.schedule), prediction=checkpoint.prediction)
    labels = _labels(checkpoint, options, measured, each=1, shown=shown)
    guided = 1.0 if labels is None else GUIDANCE
    walk = functools.partial(sampler, measured, seed=options.seed, labels=labels, guidance=guided)
    scale, out = _scale(checkpoint, options, 64), make_folder(out)
    walk()  # the first call of all builds what the others find
    rows: list[list[np.ndarray | None]] = []
    heads: list[str] = []
    with options.progress(len(names) * len(counts)) as bar:
        for name in names:
            row: list[np.ndarray | None] = []
            for count in counts:
                steps = _steps(name, count, checkpoint.schedule)
                began = time.perf_counter()
                images = data.to_uint8(walk(solver=name, steps=steps)).cpu().numpy()
                heads.append(f"{time.perf_counter() - began:.2f} s")
                row += list(images[:shown])
                bar.update()
            rows.append(row)
    spans = [(shown * k, shown * (k + 1) - 1) for k in range(len(counts))]
    picture = figure(
        rows, scale=scale, labels=list(names), apart=[first for first, _ in spans[1:]],
        over=[(first, last, f"{count} evaluations") for (first, last), count in zip(spans, counts, strict=True)],
        under=[[(*span, heads[r * len(counts) + k]) for k, span in enumerate(spans)] for r in range(len(names))],
        title="The same noise, other solvers",
        text="Every solver starts from the same noises. Short walks come out soft or broken; in long ones all solvers that draw no noise of their own "
        "arrive at the same sprites. One that draws noise on its way (ddpm) ends elsewhere.",
        note=f"Under the tiles: seconds for {measured} images at guidance {guided:g}, on {_machine(sampler.device)}.",
    )  # fmt: skip
    save(picture, out / "solvers.png")
    return [
        Made(
            out / "solvers.png",
            "The same noise, other solvers",
            "A row a solver, a column a number of evaluations: the same three noises become the same three sprites, once there are "
            "evaluations enough.",
        )
    ]


def interpolate(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """From the image of one seed to that of another, along the great circle between their noises."""
    sampler = _sampler(checkpoint, options, solver="unipc", steps=min(20, checkpoint.schedule.timesteps))
    if sampler.table.column("s").any():
        raise ValueError(
            f"solver {sampler.solver!r} adds noise, so a seed's noise alone does not decide its image; take ddim, heun, dpmpp_2m or unipc"
        )
    count, columns, rows = 17, 9, 5
    scale, out = _scale(checkpoint, options, 96), make_folder(out)
    labels = _labels(checkpoint, options, rows, each=1, shown=rows)
    paths = []
    for r in range(rows):
        label = None if labels is None else labels[r]
        paths.append(
            sampler.interpolate(
                (options.seed + 2 * r, options.seed + 2 * r + 1), count, labels=label, guidance=1.0 if label is None else GUIDANCE,
                progress=options.progress,
            )
        )  # fmt: skip
    films = np.stack([data.to_uint8(path).cpu().numpy() for path in paths])  # [rows, count, H, W, C]
    picked = [round(i * (count - 1) / (columns - 1)) for i in range(columns)]
    picture = figure(
        [list(film[picked]) for film in films], scale=scale, title="Between two noises",
        columns=["one seed", *[f"{100 * i / (columns - 1):.0f} %" for i in range(1, columns - 1)], "another"],
        labels=[
            f"seeds {options.seed + 2 * r}, {options.seed + 2 * r + 1}" + (f"\n{checkpoint.classes[labels[r]]}" if labels else "")
            for r in range(rows)
        ],
        text="Each row walks from one starting noise to another along the great circle between them, and every noise on the way is made into a sprite. "
        "There is hardly a place without one.",
    )  # fmt: skip
    save(picture, out / "interpolate.png")
    frames = [
        figure([list(films[:, k])], scale=scale, title="Between two noises", gauge=(k / (count - 1), f"{100 * k / (count - 1):.0f} %"))
        for k in range(count)
    ]
    there_and_back = [800] + [150] * (count - 2)
    save_gif(frames + frames[-2:0:-1], out / "interpolate.gif", ms=2 * there_and_back, pause=150)
    return [
        Made(
            out / "interpolate.png",
            "Between two noises",
                "Five rows of nine sprites, each row changing by and by from one seed's sprite to another's.",
        ),
        Made(out / "interpolate.gif", "From seed to seed, and back", "Five sprites changing into five others, and back again."),
    ]  # fmt: skip


def likelihood(checkpoint: Checkpoint, out: Path, options: Options) -> list[Made]:
    """What the model gives images for being likely: sprites, its own, upside down, scrambled, noise and an empty one."""
    if not checkpoint.schedule.preserving or checkpoint.prediction not in ("epsilon", "v", "x0"):
        raise ValueError("a likelihood needs a network that says epsilon, v or x0, and a schedule that preserves variance")
    shown, shape = 6, checkpoint.shape
    out = make_folder(out)
    real, known = _sprites(checkpoint, options, shown), knows_shipped(checkpoint)
    labels = _labels(checkpoint, options, shown, each=1, shown=shown)
    sampler = checkpoint.sampler(solver="unipc", steps=min(20, checkpoint.schedule.timesteps), device=pick_device(options.device))
    guided = GUIDANCE if labels is not None else 1.0
    own = data.to_uint8(sampler(shown, seed=options.seed, labels=labels, guidance=guided, progress=options.progress)).cpu().numpy()
    rng = np.random.default_rng(options.seed)
    pixels = real.reshape(shown, -1, shape[0])
    scrambled = np.stack([image[rng.permutation(len(image))] for image in pixels]).reshape(real.shape)
    static = rng.integers(0, 256, real.shape, dtype=np.uint8)
    kinds = {
        "sprites it never saw" if known else "sprites": real,
        "the network's own": own,
        "upside down": real[:, ::-1].copy(),
        "pixels shuffled": scrambled,
        "noise": static,
        "nothing": np.full_like(real[:1], 255),
    }
    images = torch.from_numpy(np.concatenate(list(kinds.values()))).permute(0, 3, 1, 2)  # [N, C, H, W]
    x0, bits = dequantised(images), list[float]()
    with options.progress(len(images)) as bar:
        for i in range(0, len(images), 8):
            part = x0[i : i + 8]
            p = log_likelihood(
                checkpoint.model, checkpoint.schedule, part, prediction=checkpoint.prediction, steps=24, probes=1, first=i
            )  # fmt: skip
            bits += p.bits_per_dim().tolist()
            bar.update(len(part))
    rows: list[list[np.ndarray | None]] = [list(group) for group in kinds.values()]
    numbers = iter(bits)
    picture = figure(
        rows, scale=_scale(checkpoint, options, 80), labels=list(kinds), under=[each([f"{next(numbers):.2f}" for _ in row]) for row in rows],
        title="p(image)",
        text="What an image costs, in bits a number, by the model's own density: the fewer, the likelier. One bit less is "
        f"2^{int(np.prod(shape))} times as likely.",
    )  # fmt: skip
    save(picture, out / "likelihood.png")
    return [
        Made(
            out / "likelihood.png",
            "p(image)",
            "Sprites, upside-down sprites, shuffled pixels, noise and an empty image, each with the bits that it costs the model.",
        )
    ]


KINDS: dict[str, Callable[[Checkpoint, Path, Options], list[Made]]] = {
    "forward": forward,
    "reverse": reverse,
    "posterior": posterior,
    "guidance": guidance,
    "solvers": compare,
    "interpolate": interpolate,
    "likelihood": likelihood,
}


class _Walk(NamedTuple):
    """x: uint8 [R + 1, N, H, W, C], before each row and at the end. x0: uint8 [R, N, H, W, C], the guess in it. shares: of noise in x, [R + 1]."""

    x: np.ndarray
    x0: np.ndarray
    shares: np.ndarray


def _walk(sampler: Sampler, n: int, labels: list[int] | None, options: Options) -> _Walk:
    table = sampler.table
    path = sampler.trajectory(
        n, rows=range(len(table)), seed=options.seed, labels=labels, progress=options.progress
    )  # fmt: skip
    start = table.start * noise.normal(options.seed, range(n), 0, sampler.shape, stream="start")
    states = torch.cat([start[None], path.x])  # [R + 1, N, C, H, W]
    x = np.stack([_shown(state, *level) for state, level in zip(states, table.levels.tolist(), strict=True)])
    x0 = data.to_uint8(path.x0.flatten(0, 1)).numpy().reshape(len(table), *x.shape[1:])
    return _Walk(x, x0, np.array([_share(*level) for level in table.levels.tolist()]))


def guess(checkpoint: Checkpoint, x: Tensor, t: float, label: int | None) -> Tensor:
    """What the network takes x [N, C, H, W] at timestep t for, in one evaluation: E[x_0 | x], as far as it has learned it."""
    table = solvers.table("ddim", checkpoint.schedule, timesteps=[t], prediction=checkpoint.prediction, clip=None)
    px, pm = (float(table.column(name)[0]) for name in ("px", "pm"))
    told = torch.full((len(x),), float(table.timesteps[0]))
    with torch.no_grad():
        if checkpoint.classes:
            labels = torch.full((len(x),), len(checkpoint.classes) if label is None else label)
            m = checkpoint.model(table.scale * x, told, labels)
        else:
            m = checkpoint.model(table.scale * x, told)
    x0: Tensor = px * x + pm * answered(m)[:, : x.shape[1]]
    return x0


def _noised(checkpoint: Checkpoint, x0: Tensor, z: Tensor, ratio: float, label: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    """x_0 [1, C, H, W] with noise, sigma / alpha = ratio: as an image, the network's guess from it, and the share of noise."""
    if not ratio:
        clean = data.to_uint8(x0).numpy()[0]
        return clean, clean, 0.0
    alpha, sigma, t = _level(checkpoint.schedule, ratio)
    x = alpha * x0 + sigma * z
    return _shown(x, alpha, sigma)[0], data.to_uint8(guess(checkpoint, x, t, label)).numpy()[0], _share(alpha, sigma)


def _level(schedule: Schedule, ratio: float) -> tuple[float, float, float]:
    """(alpha, sigma, t) where sigma / alpha is `ratio`."""
    t, alpha, sigma = schedule.at(-float(np.log(max(ratio, 1e-4))))
    return alpha, sigma, t


def _share(alpha: float, sigma: float) -> float:
    """How much of the variance of x is noise, for an image of unit variance."""
    return sigma**2 / (alpha**2 + sigma**2)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} % noise"


def _shown(x: Tensor, alpha: float, sigma: float) -> np.ndarray:
    """x [N, C, H, W] as uint8 [N, H, W, C]; where a schedule lets it grow, brought back to unit variance."""
    return data.to_uint8(x.cpu() / float(np.hypot(alpha, sigma))).numpy()


def _scale(checkpoint: Checkpoint, options: Options, pixels: int) -> int:
    return options.scale or max(pixels // max(checkpoint.shape[1:]), 1)


def _sampler(checkpoint: Checkpoint, options: Options, solver: str, steps: int) -> Sampler:
    return checkpoint.sampler(solver=options.one("solver", solver), steps=options.one("steps", steps), device=pick_device(options.device))


def _favourites(checkpoint: Checkpoint) -> list[int]:
    """Classes in the order in which pictures show them: those that are seen best first."""
    classes = checkpoint.classes
    return sorted(range(len(classes)), key=lambda k: FAVOURITES.index(classes[k]) if classes[k] in FAVOURITES else len(FAVOURITES) + k)


def _labels(checkpoint: Checkpoint, options: Options, n: int, *, each: int, shown: int) -> list[int] | None:
    """A class for each of n images: the one that was asked for, or the first few in turn, each so many times."""
    if not checkpoint.classes:
        return None
    kinds = [options.label] if options.label is not None else _favourites(checkpoint)[:shown]
    return [kinds[i // each % len(kinds)] for i in range(n)]


def _picture(checkpoint: Checkpoint, options: Options) -> np.ndarray:
    """The sprite of `forward` and `posterior`, uint8 [H, W, C]: what was asked for, or one by the seed."""
    if options.image is None:
        pixels: np.ndarray = _sprites(checkpoint, options, 1)[0]
        return pixels
    channels, height, width = checkpoint.shape
    if options.image.isdecimal():
        images = data.load().images
        if int(options.image) >= len(images):
            raise ValueError(
                f"no shipped sprite {options.image}; they have the numbers 0 to {len(images) - 1} (a file of that name is ./{options.image})"
            )
        picture = Image.fromarray(images[int(options.image)])
    else:
        try:
            with data.opened(Path(options.image)) as file:
                rgba = file.convert("RGBA")
        except FileNotFoundError:
            raise ValueError(f"no image {options.image!r}; give an image file, or the number of a shipped sprite") from None
        # The decoders raise OSError, SyntaxError, struct.error, ValueError, EOFError, ... on damaged bytes.
        except Exception as e:
            raise ValueError(
                f"{options.image} is not a readable image ({type(e).__name__}); give one of {', '.join(data.FORMATS)}"
            ) from None
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if picture.size != (width, height):
        picture = ImageOps.pad(picture, (width, height), Image.Resampling.BOX, color="white")
    if channels != 3:
        picture = picture.convert({1: "L", 4: "RGBA"}[channels])
    return np.array(picture).reshape((height, width, channels))


def _sprites(checkpoint: Checkpoint, options: Options, n: int) -> np.ndarray:
    """n images by the seed, uint8 [n, H, W, C]: held-out sprites of the shipped set where the network knows it, else of the network's own."""
    if knows_shipped(checkpoint):
        _, held = data.load().split()
        assert held.labels is not None
        rng = np.random.default_rng(options.seed)
        labels = _labels(checkpoint, options, n, each=1, shown=max(n, 1)) or []
        return np.stack([held.images[rng.choice(np.flatnonzero(held.labels == label))] for label in labels])
    sampler = checkpoint.sampler(solver="unipc", steps=min(20, checkpoint.schedule.timesteps), device=pick_device(options.device))
    labels_or_none = _labels(checkpoint, options, n, each=1, shown=n)
    images = sampler(n, seed=options.seed, labels=labels_or_none, guidance=1.0 if labels_or_none is None else GUIDANCE)
    return data.to_uint8(images).cpu().numpy()


def knows_shipped(checkpoint: Checkpoint) -> bool:
    """Whether a network is of the shipped sprites' shape and classes."""
    shipped = data.load()
    return (shipped.classes, shipped.shape) == (checkpoint.classes, checkpoint.shape)


def _steps(solver: str, evaluations: int, schedule: Schedule) -> int:
    """Steps of a solver in at most so many evaluations."""
    twice = len(solvers.table(solver, schedule, steps=2)) > 2
    return max((evaluations + 1) // 2, 1) if twice else evaluations


def _rows(images: np.ndarray, columns: int) -> list[list[np.ndarray | None]]:
    return [list(images[i : i + columns]) for i in range(0, len(images), columns)]


def _an(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}"

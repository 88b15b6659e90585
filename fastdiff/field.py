"""Pictures of diffusion in the plane, where all of it can be seen: densities under noise, what a network learns, its score, and walks along it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import noise, toy
from .files import atomic_write, make_folder
from .pictures import INK, LINE, MUTED, PAPER, Bar, Made
from .progress import calm_bar
from .toy import SCHEDULE, Toy

LACKING = "pictures of the field need matplotlib, the extra `plot`: pip install 'fastdiff-torch[plot]'"
# Okabe & Ito 2008: told apart by those who do not see red, or green.
EXACT, LEARNED = "#0072B2", "#D55E00"
APART = ("#D55E00", "#00795C", "#A3387A")
# From nothing to the highest density.
SHADES = (PAPER, "#d5e3ee", "#a3c4de", "#6a9fc9")
# Of the noise, in the pictures with several levels.
SIGMAS = (0.2, 0.4, 0.7, 0.92)
# Half the width of what is shown.
REACH = 2.9
DPI = 110


class Sheet:
    """A figure of rows x columns square panels, its title and text above them."""

    def __init__(
        self,
        rows: int,
        columns: int,
        title: str,
        text: str,
        *,
        size: float,
        heads: Sequence[bool],
        aside: bool = False,
        reach: float = REACH,
        centre: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError(LACKING) from None
        # All in inches.
        gap, margin, line, head = 0.12, 0.2, 0.24, 0.3
        left, top = margin + 0.3 * aside, 0.58 + line * (1 + text.count("\n"))
        width = left + columns * size + (columns - 1) * gap + margin
        tops = [top + sum(heads[: r + 1]) * head + r * (size + gap) for r in range(rows)]
        height = tops[-1] + size + margin
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
        self.panels = [
            [
                self.figure.add_axes(((left + c * (size + gap)) / width, (height - tops[r] - size) / height, size / width, size / height))
                for c in range(columns)
            ]
            for r in range(rows)
        ]
        for row in self.panels:
            for panel in row:
                x, y = ((middle - reach, middle + reach) for middle in centre)
                panel.set(xlim=x, ylim=y, xticks=[], yticks=[], facecolor=PAPER, aspect="equal")
                for edge in panel.spines.values():
                    edge.set(color=LINE, linewidth=1)
        across = left / width
        self.figure.text(across, 1 - 0.16 / height, title, fontsize=17, color=INK, va="top")
        self.figure.text(across, 1 - 0.52 / height, text, fontsize=11.5, color=MUTED, va="top", linespacing=1.35)

    def beside(self, row: int, text: str) -> None:
        """What a row is, turned, left of it."""
        self.panels[row][0].text(
            -0.05, 0.5, text, transform=self.panels[row][0].transAxes, rotation=90, ha="right", va="center", fontsize=12.5, color=INK
        )

    def save(self, path: Path) -> None:
        with atomic_write(path) as f:
            self.figure.savefig(f, format="png", dpi=DPI, facecolor=PAPER)


def head(panel: Any, text: str, colour: str = INK) -> None:
    panel.set_title(text, fontsize=12, color=colour, pad=6)


def levels(sigma: float) -> tuple[int, float, float]:
    """(t, alpha, sigma) of the timestep nearest to sigma."""
    t = toy.timestep(sigma)
    return t, float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])


def shade(panels: Sequence[Any], data: Toy, alpha: float = 1.0, sigma: float = 0.0, depth: float = 1.0) -> None:
    """The density as a colour, by its square root, so that thin parts are seen too."""
    from matplotlib.colors import LinearSegmentedColormap

    (left, right), (low, high) = panels[0].get_xlim(), panels[0].get_ylim()
    points = 151
    middle = torch.tensor([left + right, low + high], dtype=torch.float64) / 2
    found = data.log_density(toy.grid((right - left) / 2, points) + middle, alpha, sigma).exp().reshape(points, points).numpy()
    for panel in panels:
        panel.imshow(
            np.sqrt(found / found.max()), origin="lower", extent=(left, right, low, high), vmin=0, vmax=1 / depth,
            interpolation="bilinear", cmap=LinearSegmentedColormap.from_list("density", SHADES),
        )  # fmt: skip


def dots(panel: Any, points: Tensor, *, size: float = 6, colour: str = INK, alpha: float = 0.55, **style: Any) -> None:
    panel.scatter(*points.T.numpy(), s=size, color=colour, alpha=alpha, linewidths=0, **style)


def density(out: Path, seed: int, networks: dict[str, toy.Denoiser]) -> list[Made]:
    """Every set under more and more noise, and 300 of its points, the same all the way."""
    title = "Noise turns any density into the same cloud"
    sheet = Sheet(
        len(toy.TOYS), 1 + len(SIGMAS), title,
        "Shade: the exact density of x\u209c = \u03b1 x\u2080 + \u03c3 z.  "
        "Dots: the same 300 points in every column, each on its own way into the noise.",
        size=2.5, heads=(True, False, False, False), aside=True, reach=3.0,
    )  # fmt: skip
    for r, make in enumerate(toy.TOYS.values()):
        data = make()
        x0, _ = data.sample(300, seed=seed)
        for c, wanted in enumerate((0.0, *SIGMAS)):
            panel = sheet.panels[r][c]
            t, alpha, sigma = levels(wanted) if wanted else (0, 1.0, 0.0)
            x = noise.add_noise(x0.float(), torch.full((300,), t), SCHEDULE, seed=seed) if wanted else x0
            assert isinstance(x, Tensor)
            shade([panel], data, alpha, sigma)
            dots(panel, x)
            if r == 0:
                head(panel, f"noise \u03c3 = {wanted:g}" if wanted else "data, no noise")
        sheet.beside(r, data.title)
    path = out / "density.png"
    sheet.save(path)
    return [
        Made(
            path,
            title,
            "Four sets of points, a row each, under more and more noise from left to right. A little noise rounds off detail; more of it lets the "
            "parts run into one another; at the end every row shows the same round cloud. That is why sampling can start there without "
            "knowing anything about the data.",
        )
    ]


def arrows(out: Path, seed: int, networks: dict[str, toy.Denoiser]) -> list[Made]:
    """From a few x_t to the x_0 that they may have come from, and to their mean."""
    title = "What the network learns is the mean of all arrows"
    data, many = toy.moons(), 20
    sheet = Sheet(
        1, 3, title,
        "Each dark dot is one noisy point x\u209c. Thin arrows lead to clean points x\u2080 that it may have come from; "
        "training examples are such arrows.\n"
        "The thick arrow leads to the exact mean of them all, E[x\u2080 | x\u209c]. The ring is what the trained network says.",
        size=4.2, heads=(True,), reach=2.35,
    )  # fmt: skip
    places = {
        0.3: [(-1.3, 1.5), (1.25, 0.6), (1.5, -1.55)],
        0.6: [(-1.25, 1.6), (1.6, -1.4)],
        0.92: [(-1.3, 1.5), (1.8, -1.7)],
    }
    for panel, (wanted, starts) in zip(sheet.panels[0], places.items(), strict=True):
        t, alpha, sigma = levels(wanted)
        x = torch.tensor(starts, dtype=torch.float64)
        shade([panel], data, depth=0.8)
        ends, means = data.posterior(x, many, alpha, sigma, seed=seed), data.posterior_mean(x, alpha, sigma)
        with torch.no_grad():
            says = alpha * x - sigma * networks["moons"](x.float(), torch.full((len(x),), t)).double()
        for start, fan, mean, answer in zip(x.tolist(), ends, means.tolist(), says.tolist(), strict=True):
            for end in fan.tolist():
                arrow(panel, start, end, color=INK, width=0.012, head=0.07, alpha=0.4, zorder=3)
            arrow(panel, start, mean, color=EXACT, width=0.05, head=0.17, zorder=4)
            panel.plot(*start, "o", ms=8, color=INK, mec=PAPER, mew=1.2, zorder=6)
            panel.plot(*answer, "o", ms=12, mfc="none", mec=LEARNED, mew=2.4, zorder=7)
        head(panel, f"noise \u03c3 = {wanted:g}")
    from matplotlib.lines import Line2D

    sheet.panels[0][2].legend(
        handles=[
            Line2D([], [], color=INK, alpha=0.6, lw=1, label="to a possible x\u2080"),
            Line2D([], [], color=EXACT, lw=3.2, label="to their mean"),
            Line2D([], [], color=LEARNED, marker="o", ms=11, mfc="none", mew=2.4, ls="", label="what the network says"),
        ],
        loc="lower left", fontsize=10.5, frameon=True, facecolor=PAPER, edgecolor=LINE, labelcolor=INK,
    )  # fmt: skip
    path = out / "arrows.png"
    sheet.save(path)
    return [
        Made(
            path,
            title,
            "A noisy point may have come from many clean ones (thin arrows). A network that is asked for the clean point and marked by its squared "
            "error does best with the mean of them all (thick arrow), and that is where the trained one's answer lies (ring). With little noise "
            "the arrows agree. With much noise they fan out over the whole data, and the mean may lie where there is no data at all.",
        )
    ]


def arrow(panel: Any, start: Sequence[float], end: Sequence[float], *, color: str, width: float, head: float, **style: Any) -> None:
    """From start to end to the point; width and head in units of the plane."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = min(1.3 * head, 0.9 * math.hypot(dx, dy))
    panel.arrow(
        *start, dx, dy, width=width, head_width=head, head_length=length, length_includes_head=True, color=color, linewidth=0, **style
    )


def score(out: Path, seed: int, networks: dict[str, toy.Denoiser], names: Sequence[str] = tuple(toy.TOYS)) -> list[Made]:
    """For every set the score field of the network beside the exact one, at several levels, with their cosine similarity."""
    made = []
    for name in names:
        data, network = toy.TOYS[name](), networks[name]
        title, reach = f"The score field: {data.title}", 2.6
        sheet = Sheet(
            2, len(SIGMAS), title,
            "Arrows point to where the noisy density grows fastest, \u2207 ln p\u209c(x), drawn where it is not negligible; lengths are compressed. "
            "Shade: the exact density.\nTop: by formula. Bottom: by a network that has seen samples only. "
            "Cosine: how well the arrows agree, 1 is perfectly.",
            size=3.3, heads=(True, True), aside=True, reach=reach,
        )  # fmt: skip
        points = 19
        x = toy.grid(reach * (1 - 1 / points), points)
        similar = []
        for c, wanted in enumerate(SIGMAS):
            t, alpha, sigma = levels(wanted)
            fine = data.log_density(toy.grid(), alpha, sigma).max()
            x_shown = x[data.log_density(x, alpha, sigma) > fine + math.log(toy.NEGLIGIBLE)]
            exact, learned = data.score(x_shown, alpha, sigma), network.score(x_shown, t)
            shade([row[c] for row in sheet.panels], data, alpha, sigma, depth=0.55)
            similar.append(toy.similarity(data, network, t))
            for r, (field, colour) in enumerate(((exact, EXACT), (learned, LEARNED))):
                panel = sheet.panels[r][c]
                # Directions as they are; lengths by their square root, against the exact field's.
                length = field.norm(dim=1, keepdim=True).clamp(min=1e-9)
                longest = exact.norm(dim=1).quantile(0.9)
                drawn = field / length * (length / longest).clamp(max=1).sqrt() * 2 * reach / points
                panel.quiver(
                    *x_shown.T.numpy(), *drawn.T.numpy(), color=colour, angles="xy", scale_units="xy", scale=1, pivot="mid",
                    width=0.0065, headwidth=3.6, headlength=3.8, headaxislength=3.4, minlength=0.5,
                )  # fmt: skip
            head(sheet.panels[0][c], f"noise \u03c3 = {wanted:g}")
            head(sheet.panels[1][c], f"cosine {math.floor(similar[-1] * 1000) / 1000:.3f}", LEARNED)
        sheet.beside(0, "exact")
        sheet.beside(1, "learned")
        path = out / f"score_{name}.png"
        sheet.save(path)
        made.append(
            Made(
                path,
                title,
                "The score is an arrow at every point: the way in which the noisy density grows fastest. Above it is computed from the density itself, "
                "below by a small network after seconds of training on samples. They agree to a cosine similarity of "
                f"{math.floor(min(similar) * 1000) / 1000:.3f} or more wherever there is density to speak of. With much noise all arrows point to "
                "the middle; with little noise each points to the nearest data.",
            )
        )
    return made


def walk(network: toy.Denoiser, n: int, solver: str, steps: int, seed: int, **call: Any) -> Tensor:
    """Particles from noise to data, [steps + 1, n, 2], the start included."""
    sampler = toy.sampler(network, solver, steps)
    start = sampler.table.start * noise.normal(seed, range(n), 0, toy.SHAPE, stream="start")
    return torch.cat([start[None], sampler.trajectory(n, range(steps), seed=seed, **call).x])


def tracks(panel: Any, x: Tensor, shown: Sequence[int], colours: Sequence[str], width: float = 1.6) -> None:
    """All particles' ends as faint dots, and the whole ways of some, [steps + 1, N, 2]."""
    dots(panel, x[-1], size=5, alpha=0.4, zorder=2)
    for i, colour in zip(shown, colours, strict=True):
        way = x[:, i].numpy()
        panel.plot(*way.T, color=colour, lw=width, zorder=3, solid_joinstyle="round")
        panel.plot(*way[0], "o", ms=7.5, mfc=PAPER, mec=colour, mew=2, zorder=5)
        panel.plot(*way[-1], "o", ms=7.5, color=colour, mec=INK, mew=1, zorder=6)


def nearest(starts: Tensor, places: Sequence[tuple[float, float]]) -> list[int]:
    """Of points [N, 2] the ones next to some places."""
    found: list[int] = torch.cdist(torch.tensor(places), starts).argmin(1).tolist()
    return found


def paths(out: Path, seed: int, networks: dict[str, toy.Denoiser], names: Sequence[str] = ("mixture", "moons", "spiral")) -> list[Made]:
    """From the same noise to data: without noise on the way and with it, in few steps and in many."""
    made = []
    few, many, particles = 6, 100, 500
    places = [(1.6, 1.5), (-1.9, 1.2), (-1.2, -1.7)]
    for name in names:
        data = toy.TOYS[name]()
        title = f"From noise to data: {data.title}"
        sheet = Sheet(
            2, 2, title,
            f"Three particles, from the same starts (rings) in all panels to their ends (filled).\n"
            f"Dots: where {particles} particles end.  Shade: the density of the data.",
            size=4.3, heads=(True, False), aside=True, reach=2.6,
        )  # fmt: skip
        for r, (solver, what) in enumerate((("ddim", "deterministic (DDIM)"), ("ddpm", "stochastic (DDPM)"))):
            for c, steps in enumerate((few, many)):
                panel = sheet.panels[r][c]
                shade([panel], data)
                x = walk(networks[name], particles, solver, steps, seed)
                tracks(panel, x, nearest(x[0], places), APART, 1.0 if (r, c) == (1, 1) else 1.8)
                if r == 0:
                    head(panel, f"{steps} steps")
            sheet.beside(r, what)
        path = out / f"paths_{name}.png"
        sheet.save(path)
        made.append(
            Made(
                path,
                title,
                "Particles start in pure noise and follow the learned score to the data. Above, the deterministic way: smooth curves, and the same "
                "start always ends at the same place. Below, fresh noise is added in every step, so the ways tremble and where one ends is left to "
                f"chance as well. With {few} steps the ways are coarse, and some end where there is no data; with {many} both kinds of walk "
                "end spread as the data is.",
            )
        )
    return made


def guidance(out: Path, seed: int, networks: dict[str, toy.Denoiser]) -> list[Made]:
    """The same noise led to one class, with more and more guidance."""
    title = "Guidance bends the paths to one class"
    data, network, label, particles = toy.mixture(), networks["mixture"], 2, 400
    sheet = Sheet(
        1, 4, title,
        f"The same noise in every panel, walked without and with the class \u201c{data.classes[label]}\u201d (dashed outline). Guidance w follows "
        r"$m_u + w\,(m_c - m_u)$: at 1 what the" "\nnetwork says of the class, beyond it more. "
        "Rings: starts. Filled: ends. Dots: where 400 particles end. Shade: the density of all data.",
        size=3.6, heads=(True,), reach=3.0, centre=(0.0, 0.6),
    )  # fmt: skip
    axis = np.linspace(-4, 4, 201)
    own = data.log_density(toy.grid(4, 201), label=label).reshape(201, 201).numpy()
    places = [(math.cos(turn) * 1.6, math.sin(turn) * 1.6) for turn in np.linspace(0, 2 * math.pi, 10, endpoint=False) + 0.3]
    for panel, weight in zip(sheet.panels[0], (None, 1.0, 2.0, 4.0), strict=True):
        shade([panel], data)
        call: dict[str, Any] = {} if weight is None else {"labels": label, "guidance": weight}
        x = walk(network, particles, "ddim", 50, seed, **call)
        tracks(panel, x, nearest(x[0], places), [LEARNED] * len(places))
        # About what two standard deviations hold.
        panel.contour(axis, axis, own, levels=[float(own.max()) - 2], colors=[INK], linewidths=1.3, linestyles="dashed")
        head(panel, "no class" if weight is None else f"guidance {weight:g}")
    path = out / "guidance.png"
    sheet.save(path)
    return [
        Made(
            path,
            title,
            "Without a class, particles end in all three parts. Told the class, the same particles bend to its part. Guidance above 1 exaggerates what "
            "the class changes: the ways bend sooner, and the ends crowd where the class is least like the others, so they are surer and less varied, "
            "and no longer spread as the class's own data is.",
        )
    ]


Maker = Callable[[Path, int, dict[str, toy.Denoiser]], list[Made]]
# Of each kind of picture: what makes it, and the sets whose networks it needs.
KINDS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "density": (density, ()),
    "arrows": (arrows, ("moons",)),
    "score": (score, tuple(toy.TOYS)),
    "paths": (paths, ("mixture", "moons", "spiral")),
    "guidance": (guidance, ("mixture",)),
}


def draw(out: Path, *, seed: int = 0, kinds: Sequence[str] | None = None, progress: bool | Bar = False) -> list[Made]:
    """The pictures of the plane as PNG files in a folder, and what they show; `kinds` of `KINDS`, by default all.

    seed: of the data, the training and the noise. progress: a bar, or a function that makes one of a number of steps. ValueError for a kind
    that there is not, and without matplotlib, the extra `plot`.
    """
    wanted = list(KINDS) if kinds is None else list(kinds)
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(LACKING) from None
    out = make_folder(out)
    sets = dict.fromkeys(name for kind in wanted for name in KINDS[kind][1])
    # In steps of training, which is most of the time: a picture takes about as long as so many.
    picture = 200
    total = toy.STEPS * len(sets) + picture * len(wanted)
    made: list[Made] = []
    with progress(total) if callable(progress) else tqdm(total=total, unit="step", disable=not progress, leave=False, **calm_bar()) as bar:
        networks = {}
        for name in sets:
            before = (name, seed) in toy._TRAINED
            networks[name] = toy.trained(name, seed, progress=lambda steps: contextlib.nullcontext(bar))
            bar.update(toy.STEPS if before else 0)
        for kind in wanted:
            made += KINDS[kind][0](out, seed, networks)
            bar.update(picture)
    return made

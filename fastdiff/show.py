"""Make pictures that explain diffusion: `python -m fastdiff.show KIND`. Writes PNG and GIF files, and for `tour` a page of HTML."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import cli, field, gallery, solvers, tour
from .checkpoint import Checkpoint, load
from .pictures import Bar, Made
from .progress import calm_bar

PROG = "python -m fastdiff.show"
# Kind: one line, what it shows, and the options of its own, beside those that all have.
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "forward": (
        "noise dissolves a sprite",
        "A sprite at seven levels of noise, from clean over some noise and only an outline to no idea, with what the network takes each for. "
        "Writes forward.png, forward_guess.png and forward.gif.",
        ("checkpoint", "label", "image", "scale"),
    ),
    "reverse": (
        "sprites come out of noise",
        "The walk from pure noise to sprites, each with the network's guess on the way: first an outline, then detail. "
        "Writes reverse.png and reverse.gif.",
        ("checkpoint", "label", "steps", "solver", "scale"),
    ),
    "posterior": (
        "one noisy sprite, many clean ones",
        "One clean sprite and many noisy versions of it; one noisy sprite and many clean ones that it may have been, with their mean beside the "
        "network's guess. Writes posterior.png.",
        ("checkpoint", "label", "image", "steps", "solver", "scale"),
    ),
    "guidance": (
        "how guidance bends the path",
        "The same noise at guidance 0, 1, 2, 4 and 8 towards a class, and between two classes. Writes guidance.png and mixtures.png.",
        ("checkpoint", "label", "steps", "solver", "scale"),
    ),
    "solvers": (
        "solvers and steps side by side",
        "The same noise walked by several solvers in several numbers of network evaluations, with the time taken. Writes solvers.png.",
        ("checkpoint", "label", "steps", "solver", "scale"),
    ),
    "field": (
        "where the score points, in two dimensions",
        "Densities in the plane, the score fields that point to them, exact and learned, and walks along them. Writes a folder, field. "
        "Needs matplotlib, the extra `plot`.",
        (),
    ),
    "interpolate": (
        "from one seed's sprite to another's",
        "Sprites from noises between two noises. Writes interpolate.png and interpolate.gif.",
        ("checkpoint", "label", "steps", "solver", "scale"),
    ),
    "likelihood": (
        "what p(image) makes of sprites, and of others",
        "What sprites, upside-down sprites, shuffled pixels and noise cost the model, in bits a number. Writes likelihood.png.",
        ("checkpoint", "label", "scale"),
    ),
    "tour": (
        "all of these as one page that teaches",
        "All pictures in the order of a lesson, with a paragraph each, in one file that needs nothing else. Writes tour.html and the pictures.",
        ("checkpoint", "label"),
    ),
}


def parser() -> cli.Parser:
    p = cli.Parser(
        prog=PROG,
        description="Pictures that show how diffusion works, from the network that ships with the package or one of your own. "
        "Begin with `tour`: it makes them all. Each kind has a --help of its own.",
    )
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds", parser_class=cli.Parser)
    for kind, (line, text, own) in KINDS.items():
        q = kinds.add_parser(kind, help=line, description=text)
        q.add_argument("--out", default="show", metavar="DIR", help="folder for the files, which are replaced there (show)")
        q.add_argument("--seed", type=cli.whole(0, 2**63 - 1), default=0, metavar="N", help="another seed gives other noise (0)")
        for name in own:
            _add(q, name, kind)
        if own:
            q.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    return p


def _add(q: argparse.ArgumentParser, name: str, kind: str) -> None:
    several = "; repeat it to compare several" if kind == "solvers" else ""
    if name == "checkpoint":
        cli.checkpoint_option(q)
    elif name == "label":
        q.add_argument("--label", metavar="NAME|INDEX", help="one class for all of the picture (the picture's own choice)")
    elif name == "image":
        q.add_argument("--image", metavar="FILE|INDEX", help="an image file, or the number of a shipped sprite (one by --seed and --label)")
    elif name == "steps":
        what = "network evaluations" if kind == "solvers" else "steps of the walk: more is finer and slower"
        q.add_argument("--steps", type=cli.whole(1), action="append", metavar="N", help=f"{what}{several}")
    elif name == "solver":
        q.add_argument("--solver", action="append", metavar="NAME", help=f"how to walk: {', '.join(solvers.names())}{several}")
    elif name == "scale":
        q.add_argument(
            "--scale", type=cli.whole(1, 32), metavar="N", help="pixels of the picture to a pixel of a sprite (what fits a screen)"
        )


def bars(kind: str) -> Bar:
    """Progress bars with a name."""
    return lambda steps: tqdm(total=steps, desc=kind, unit="step", leave=False, smoothing=0.1, **calm_bar())


def class_number(checkpoint: Checkpoint, label: str | None, path: str) -> int | None:
    """A class by its name or index. ValueError for one that there is not, with those that there are."""
    classes = checkpoint.classes
    if label is None or label in classes:
        return None if label is None else classes.index(label)
    if not classes:
        raise ValueError(f"{path} has no classes; leave out --label")
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise ValueError(f"no class {label!r} in {path}; it has: {', '.join(f'{i} {name}' for i, name in enumerate(classes))}")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    out = Path(args.out)
    for picture in field.draw(out / tour.FIELD, seed=args.seed, progress=bars("field")) if args.kind == "field" else _draw(args, out):
        print(f"{picture.path}  {picture.title}")
    return 0


def _draw(args: Any, out: Path) -> list[Made]:
    checkpoint = load(args.checkpoint)
    given = vars(args)
    options = gallery.Options(
        seed=args.seed,
        label=class_number(checkpoint, args.label, args.checkpoint),
        steps=tuple(given.get("steps") or ()),
        solver=tuple(given.get("solver") or ()),
        scale=given.get("scale"),
        image=given.get("image"),
        device=args.device,
        progress=bars(args.kind),
    )
    if args.kind == "tour":
        return tour.tour(checkpoint, out, options, bars)
    return gallery.KINDS[args.kind](checkpoint, out, options)


if __name__ == "__main__":
    cli.run(functools.partial(main), PROG)

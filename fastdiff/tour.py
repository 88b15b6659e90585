"""All pictures of `fastdiff.show` as one page that teaches: a single HTML file with its images in it, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, features

from . import field, gallery
from .checkpoint import Checkpoint
from .files import atomic_write, make_folder
from .gallery import Options
from .pictures import PAPER, Bar, Made


class Section(NamedTuple):
    """A part of the lesson. kind: of its pictures. only: file names of those it shows, in this order; () for all. text: paragraphs of HTML."""

    kind: str
    title: str
    text: str
    only: tuple[str, ...] = ()


LESSON = (
    Section(
        "forward",
        "Noise dissolves a sprite",
        """
<p>A sprite of {size} pixels is a list of {numbers} numbers: {channels} of each pixel, from &minus;1 (dark) to 1 (bright). Noise is a
list of {numbers} numbers, too, each drawn by itself from the bell curve, with no plan at all. Mix the two, and the sprite dissolves like ink in
water:</p>
<p class="equation"><i>x<sub>t</sub></i> = <i>&alpha;<sub>t</sub> x</i><sub>0</sub> + <i>&sigma;<sub>t</sub> z</i></p>
<p>Here <i>x</i><sub>0</sub> is the sprite, <i>z</i> the noise, and <i>t</i> says how far we are: from <i>&alpha;</i> = 1, <i>&sigma;</i>
= 0, where all is clean, to <i>&alpha;</i> = 0, <i>&sigma;</i> = 1, where nothing is left. On the way a person would say: clean, some
noise, only an outline, no idea. Small things go first, since a detail of one pixel has one number to speak for it, and an outline has
hundreds.</p>""",
        ("forward.png", "forward.gif"),
    ),
    Section(
        "forward",
        "What the network learns",
        """
<p>The network is shown a noisy sprite and told how much noise there is. It has to say what the sprite was, and is marked by the square of
its error, over very many sprites and all levels of noise. It cannot know the one right answer: many sprites could have become this
noise. What loses least on average is to say the average of them all:</p>
<p class="equation">guess(<i>x<sub>t</sub></i>, <i>t</i>) = E[ <i>x</i><sub>0</sub> | <i>x<sub>t</sub></i> ]</p>
<p>With little noise hardly any other sprite would do, and the guess is sharp. With much noise many would, and it is soft. With nothing
but noise it is the average of every sprite there is: the grey ghost on the right. (A network may be asked for the noise instead of the
sprite. Either follows from the other by the equation above.)</p>""",
        ("forward_guess.png",),
    ),
    Section(
        "reverse",
        "Walking back",
        """
<p>Now start from pure noise and walk the other way. The network looks and makes its soft guess. Take a small step towards it: keep most
of the noise, and put a little of the guess in its place. Look again. There is a little less noise now, so a few sprites have become
unlikely, and the guess is a little sharper. After some dozen steps nothing is left to guess. So a sprite arrives as it left, in the
opposite order: first an outline, then detail. Apart from the class, nobody chose what to draw: the noise at the start,
with the network, decided all of it.</p>""",
    ),
    Section(
        "posterior",
        "Why there are many answers",
        """
<p>Adding noise has many outcomes, and so has taking it away. Below, one noisy sprite is walked back 48 times, each time with a little
fresh noise on the way, as the first samplers did. From little noise all walks come home to the same sprite. From much noise they part:
another coat, another shield, perhaps another creature. Each answer is sharp, and each could be the truth. Their mean is blurred, and it
is what the network had guessed in a single look. That is why one look is not enough to make an image, and a walk is.</p>""",
    ),
    Section(
        "guidance",
        "Bending the path",
        """
<p>The network can be told what to expect: a portrait, say. It can also be told nothing. Where the two answers differ, the difference is
what the class wants, and one can go further that way than the network itself would:</p>
<p class="equation"><i>m</i> = <i>m</i><sub>free</sub> + <i>w</i> ( <i>m</i><sub>class</sub> &minus; <i>m</i><sub>free</sub> )</p>
<p>At <i>w</i> = 0 the class is ignored, at 1 it is obeyed. At 2 sprites are clearer and a little more alike, and at 8 colours and
outlines are overdone: guidance buys clarity with variety. Answers can also be averaged over two classes, and then the walk looks for what
both would accept, though nobody ever drew an adventurer that is half a monster.</p>""",
    ),
    Section(
        "solvers",
        "How many steps, and which",
        """
<p>In the limit of many small steps the walk is a smooth curve, the solution of a differential equation, and a solver is a way to follow
it with few looks of the network, which is where all the time goes. <code>ddim</code> takes each guess as it comes. <code>dpmpp_2m</code>
and <code>unipc</code> remember their last looks, and foresee the bend. <code>heun</code> looks twice a step, which pays once steps are
small. <code>ddpm</code> adds fresh noise on its way, so it ends somewhere else. All others end at the same sprites when given time; the
good ones are nearly there after ten looks.</p>""",
    ),
    Section(
        "field",
        "The field that points to data",
        """
<p>{numbers} dimensions cannot be drawn, but two can. Here data are points in the plane, and every place has an arrow: which way to go to become
more likely, and how urgently. That is the score, the gradient of the logarithm of the density. The network has known it all along, for
the guess and the score are one thing in two words:</p>
<p class="equation">&nabla; log <i>p<sub>t</sub></i>(<i>x<sub>t</sub></i>) = ( <i>&alpha;<sub>t</sub></i> E[ <i>x</i><sub>0</sub> |
<i>x<sub>t</sub></i> ] &minus; <i>x<sub>t</sub></i> ) / <i>&sigma;<sub>t</sub></i><sup>2</sup></p>
<p>Under much noise all arrows point to the middle, and the field is smooth. With less it parts and curls around the data. A sampler is a
leaf in this wind while the wind changes, and guidance is a second wind that blows to one class.</p>""",
        ("arrows.png", "score_moons.png", "paths_moons.png", "guidance.png"),
    ),
    Section(
        "interpolate",
        "Between images",
        """
<p>Without fresh noise on the way, the starting noise alone decides the sprite, so it can serve as its address. Go from one address to
another, along the great circle (two noises mixed in a straight line would be too faint to be noise), and sprites change by and by: a
cloak grows, a hat turns, and sometimes one thing becomes another between two steps. Nearly every place on the way is a sprite of its own,
which is what it means that the network has learned sprites and not a list of them.</p>""",
    ),
    Section(
        "likelihood",
        "What p(image) means",
        """
<p>Behind all of this stands one function. <i>p</i>(<i>x</i>) says for every image how likely it is to come out, and the walk, run from an
image to its noise, gives its value: where paths crowd together, <i>p</i> is high. It is written in bits for each of the {numbers} numbers, as a
file size: the fewer, the likelier. Sprites that the network has never seen are cheap. Most are dearer upside down, dearer still with
their pixels shuffled, and noise is dearest: a good model finds the usual usual, and is surprised by the rest. But look at the last row.
The likeliest image of them all is the empty one. Likely is not the same as typical: there is one empty image, and there are countless
sprites, each less likely, and nearly all draws come from them.</p>
<p>That is the subject in a line: learn to take noise away at every level, and you have learned <i>p</i>(image).</p>""",
    ),
)

# The pictures of the plane stand in a folder of their own: some are called like others.
FIELD = "field"
PLANE = ("arrows", "score", "paths", "guidance")
# A PNG of more bytes is put into the page as WebP, which takes a quarter.
LARGE = 300_000

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>How noise becomes a sprite</title>
<style>
:root {{ --paper: #fbfaf7; --ink: #20242a; --muted: #5c6370; --line: #ddd8cc; --accent: #a4450f; --code: #f0ece2 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --ink: #e6e3dc; --muted: #a3a9b4; --line: #353a42; --accent: #f0935a; --code: #24282f }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 18px/1.6 Georgia, "Times New Roman", serif }}
main {{ max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px }}
h1 {{ font-size: 2.3rem; line-height: 1.2; margin: 1rem 0 .5rem }}
h2 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem }}
p, nav, footer {{ max-width: 44rem }}
.lead {{ font-size: 1.15rem; color: var(--muted) }}
nav ol {{ padding-left: 1.4rem; columns: 2 16rem }}
a {{ color: var(--accent) }}
section {{ border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 2rem }}
.equation {{ font-size: 1.25rem; text-align: center; margin: 1rem 0; overflow-x: auto; white-space: nowrap }}
figure {{ margin: 1.5rem 0; max-width: 100% }}
.frame {{ overflow-x: auto; border-radius: 8px; border: 1px solid var(--line); background: {paper}; width: fit-content; max-width: 100% }}
.frame img {{ display: block; max-width: 100%; height: auto }}
figcaption {{ color: var(--muted); font-size: .95rem; margin-top: .4rem; max-width: 44rem }}
.hint {{ display: none }}
@media (max-width: 700px) {{
  body {{ font-size: 17px }}
  h1 {{ font-size: 1.8rem }}
  .frame.wide img {{ max-width: none; width: calc(var(--w) * .65) }}
  .hint {{ display: inline }}
  .equation {{ font-size: 1.05rem }}
}}
code {{ background: var(--code); overflow-wrap: anywhere; border-radius: 4px; padding: .1em .35em; font-size: .85em }}
.make {{ color: var(--muted); font-size: .95rem }}
footer {{ border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; color: var(--muted); font-size: .95rem }}
</style>
</head>
<body>
<main>
<h1>How noise becomes a sprite</h1>
<p class="lead">A network learns one thing, to see what is noise in a noisy image, at every level from a little grain over only an outline to no
idea. This page shows what follows from it. Every picture was made by {network}, from seed {seed}.</p>
<nav aria-label="Contents"><ol>
{contents}
</ol></nav>
{sections}
<footer>
Made by <code>python -m fastdiff.show tour</code>. Another <code>--seed</code> makes another page, and each picture has a command of
its own with <code>--help</code>.
</footer>
</main>
</body>
</html>
"""


def tour(checkpoint: Checkpoint, out: Path, options: Options, bars: Callable[[str], Bar]) -> list[Made]:
    """All pictures, and tour.html with all of them in it. What a checkpoint cannot show is left out, with a warning. bars: progress by name."""
    out = make_folder(out)
    kinds = list(dict.fromkeys(section.kind for section in LESSON))
    made: dict[str, list[Made]] = {}
    for number, kind in enumerate(kinds, 1):
        progress = bars(f"{kind} ({number} of {len(kinds)})")
        try:
            if kind == "field":
                made[kind] = field.draw(out / FIELD, kinds=PLANE, seed=options.seed, progress=progress)
            else:
                made[kind] = gallery.KINDS[kind](checkpoint, out, dataclasses.replace(options, progress=progress))
        except ValueError as e:
            warnings.warn(f"the tour goes without {kind}: {e}", stacklevel=2)
    record = checkpoint.record
    network = "the network that ships with fastdiff" if gallery.knows_shipped(checkpoint) else "a network of your own"
    if isinstance(steps := record.get("step"), int):
        network += f", after {steps:,} steps of training"
    path = out / "tour.html"
    text = page(made, network, options.seed, checkpoint.shape)
    with atomic_write(path) as f:
        f.write(text.encode())
    return [*(picture for group in made.values() for picture in group), Made(path, "How noise becomes a sprite", "The tour.")]


def page(made: dict[str, list[Made]], network: str, seed: int, shape: tuple[int, int, int]) -> str:
    """The page, of the pictures that there are. shape: (C, H, W) of a sprite."""
    channels, height, width = shape
    facts = {
        "{size}": f"{width} by {height}",
        "{numbers}": f"{channels * height * width:,}",
        "{channels}": {1: "the brightness", 3: "red, green and blue"}.get(channels, "red, green, blue and opacity"),
    }
    sections: list[str] = []
    contents: list[str] = []
    for section in LESSON:
        pictures = made.get(section.kind, [])
        if section.only:
            named = {picture.path.name: picture for picture in pictures}
            pictures = [named[name] for name in section.only if name in named]
        if not pictures:
            continue
        text, number = section.text, len(sections) + 1
        for name, fact in facts.items():
            text = text.replace(name, fact)
        contents.append(f'<li><a href="#part{number}">{section.title}</a></li>')
        command = f"python -m fastdiff.show {section.kind}" + f" --seed {seed}" * (seed != 0)
        sections.append(
            f'<section id="part{number}">\n<h2>{number}. {section.title}</h2>{text}\n{_figures(pictures)}\n'
            f'<p class="make">Make it: <code>{command}</code></p>\n</section>'
        )
    return PAGE.format(network=network, seed=seed, contents="\n".join(contents), sections="\n".join(sections), paper=PAPER)


def _figures(pictures: Sequence[Made]) -> str:
    return "\n".join(_figure(picture) for picture in pictures)


def _figure(made: Made) -> str:
    content = made.path.read_bytes()
    with Image.open(made.path) as picture:
        (width, height), kind = picture.size, (picture.format or "PNG").lower()
        if kind == "png" and len(content) > LARGE and features.check("webp"):
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="WEBP", quality=90)
            content, kind = buffer.getvalue(), "webp"
    data = base64.b64encode(content).decode()
    text = html.escape(made.text)
    wide = width > 700
    hint = ' <span class="hint">(Scroll the picture sideways.)</span>' if wide else ""
    return (
        f'<figure><div class="frame{" wide" * wide}"><img src="data:image/{kind};base64,{data}" alt="{text}" '
        f'width="{width}" height="{height}" style="--w: {width}px"></div>\n'
        f"<figcaption>{text}{hint}</figcaption></figure>"
    )

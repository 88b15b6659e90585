"""The tour is one file that needs nothing else, and has every picture in it, in the order of the lesson."""

import base64
import io
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import SMALL, small_checkpoint, small_network
from PIL import Image, features

from fastdiff import Checkpoint, Schedule, cli, show, tour
from fastdiff.gallery import Options, silent
from fastdiff.pictures import Made

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes; that each is closed, in its place."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.heads, self.words = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heads.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heads[-1] += data
        if "style" not in self.open:
            self.words += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def plane(out, *, kinds, seed, progress):
    """In place of `field.draw`, which trains networks: pictures of its names, one of them large."""
    out.mkdir(exist_ok=True)
    made = []
    for k, name in enumerate(tour.LESSON[[s.kind for s in tour.LESSON].index("field")].only):
        shape = (400, 400, 3) if k == 0 else (20, 30, 3)
        Image.fromarray(np.random.default_rng(seed + k).integers(0, 256, shape, dtype=np.uint8)).save(out / name)
        made.append(Made(out / name, "Plane", f'Picture {k} <of> the "plane"'))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour")
    checkpoint = replace(small_checkpoint(), schedule=Schedule.cosine(50), record={"step": 1200})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tour.field, "draw", plane)
        made = tour.tour(checkpoint, out, Options(seed=3, scale=4, device="cpu"), lambda name: silent)
    assert made[-1].path == out / "tour.html"
    assert all(m.path.is_file() for m in made)
    return out


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "tour.html").read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_loaded_from_anywhere(text, page):
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text))
    for _, attrs in page.tags:
        assert not {"srcset", "onload", "onclick"} & attrs.keys()
        assert attrs.get("src", "data:").startswith("data:")
        assert attrs.get("href", "#").startswith("#")


def test_every_picture_is_in_it_and_whole(folder, page):
    images = page.all("img")
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".gif"))
    assert len(images) == len(files) == 16
    kinds = []
    for image in images:
        kind, content = re.fullmatch(r"data:image/(png|gif|webp);base64,(.*)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as picture:
            picture.load()
            assert picture.format.lower() == kind
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
        kinds.append(kind)
        assert len(image["alt"]) > 20
    assert kinds.count("gif") == 3
    # A large picture is packed, the others are the files to the bit; the plane's guidance.png has not taken the place of the other.
    assert kinds.count("webp") == (1 if features.check("webp") else 0)
    contents = {base64.b64decode(image["src"].split(",")[1]) for image in images}
    assert len({p.read_bytes() for p in files} - contents) == kinds.count("webp")
    assert 'Picture 0 <of> the "plane"' in [image["alt"] for image in images]


def test_the_order_is_a_lessons(page):
    titles = [section.title for section in tour.LESSON]
    assert page.heads == [f"{i}. {title}" for i, title in enumerate(titles, 1)]
    kinds = [section.kind for section in tour.LESSON]
    assert kinds == ["forward", "forward", "reverse", "posterior", "guidance", "solvers", "field", "interpolate", "likelihood"]
    assert set(kinds) == show.KINDS.keys() - {"tour"}
    # The contents lead to the sections.
    assert [a["href"] for a in page.all("a")] == [f"#{s['id']}" for s in page.all("section")]
    (html,) = page.all("html")
    assert html["lang"] == "en"


def test_facts_are_the_networks(page):
    assert "A sprite of 8 by 8 pixels is a list of 192 numbers: red, green and blue of each pixel" in " ".join(page.words.split())
    assert "Every picture was made by a network of your own, after 1,200 steps of training, from seed 3." in " ".join(page.words.split())
    assert "python -m fastdiff.show reverse --seed 3" in page.words
    assert not re.search(r"\{[a-z]+\}", page.words)


def test_what_a_network_cannot_show_is_left_out_and_said(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ValueError("no matplotlib here")

    monkeypatch.setattr(tour.field, "draw", missing)
    for kind in ("reverse", "posterior", "solvers", "interpolate"):
        monkeypatch.setitem(tour.gallery.KINDS, kind, lambda *_: [])
    net = Checkpoint(small_network(config=replace(SMALL, num_classes=None)), Schedule.flow(50), "flow")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = tour.tour(net, tmp_path, Options(scale=4, device="cpu"), lambda name: silent)
    said = [str(w.message) for w in caught]
    assert [text.split(":")[0] for text in said] == [f"the tour goes without {kind}" for kind in ("guidance", "field", "likelihood")]
    assert "no matplotlib here" in said[1]
    assert [m.path.name for m in made] == ["forward.png", "forward_guess.png", "forward.gif", "tour.html"]
    page = Page((tmp_path / "tour.html").read_text())
    assert page.heads == ["1. Noise dissolves a sprite", "2. What the network learns"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net").mkdir()
    small_checkpoint().save("net/net.safetensors")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: show.main(["tour", "--checkpoint", "net/net.safetensors", "--out", "file"]), show.PROG)
    assert caught.value.code == 2
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert "cannot write to the folder file" in stderr

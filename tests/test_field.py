"""The pictures of the plane: which files, of what sizes, and what they do without matplotlib."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from fastdiff import field, noise, toy
from fastdiff.pictures import PAPER

ROOT = Path(__file__).parent.parent
FILES = {
    "density": ["density.png"],
    "arrows": ["arrows.png"],
    "score": [f"score_{name}.png" for name in toy.TOYS],
    "paths": ["paths_mixture.png", "paths_moons.png", "paths_spiral.png"],
    "guidance": ["guidance.png"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All of them, once, the progress that was told, and the folder."""
    out = tmp_path_factory.mktemp("field") / "new"
    told = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            told.append(n)

    made = field.draw(out, progress=lambda total: told.append(-total) or Bar())
    return made, told, out


def test_files_are_those_promised(drawn):
    made, _, out = drawn
    assert [picture.path for picture in made] == [out / name for kind in field.KINDS for name in FILES[kind]]
    assert sorted(path.name for path in out.iterdir()) == sorted(picture.path.name for picture in made)
    assert len({picture.title for picture in made}) == len(made)
    for picture in made:
        assert len(picture.text) > 150 and picture.text.endswith(".")


def test_pictures_are_of_a_size_to_show_and_not_empty(drawn):
    paper = np.array([int(PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    for picture in drawn[0]:
        with Image.open(picture.path) as image:
            assert image.format == "PNG"
            assert 900 <= image.width <= 1900 and 500 <= image.height <= 1600
            pixels = np.asarray(image.convert("RGB")).astype(int)
        inked = (np.abs(pixels - paper) > 12).any(2)
        assert 0.05 < inked.mean() < 0.9
        # Nothing is cut off at an edge.
        assert not inked[:8].any() and not inked[-8:].any() and not inked[:, :8].any() and not inked[:, -8:].any()


def test_progress_ends_at_its_total(drawn):
    told = drawn[1]
    assert told[0] < 0
    assert sum(told) == 0


def test_score_says_its_similarity(drawn):
    """The text of each set's picture names the lowest cosine, and it is what the issue asks for."""
    for name in toy.TOYS:
        (picture,) = (picture for picture in drawn[0] if picture.path.name == f"score_{name}.png")
        lowest = min(toy.similarity(toy.TOYS[name](), toy.trained(name), toy.timestep(sigma)) for sigma in field.SIGMAS)
        assert lowest > 0.98
        assert f"{int(lowest * 1000) / 1000:.3f}" in picture.text


def test_some_kinds_alone_and_the_same_twice(drawn, tmp_path):
    made = field.draw(tmp_path, kinds=["guidance", "arrows"])
    assert [picture.path.name for picture in made] == ["guidance.png", "arrows.png"]
    for picture in made:
        assert picture.path.read_bytes() == (drawn[2] / picture.path.name).read_bytes()


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown kind 'colour'; known: density, arrows, score, paths, guidance"):
        field.draw(tmp_path / "new", kinds=["colour"])
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_one_line_says_what_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\nimport fastdiff.field\n"
        "try: fastdiff.field.draw(Path(sys.argv[1]))\n"
        "except ValueError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "new")], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == field.LACKING + "\n", done.stderr
    assert "matplotlib" in field.LACKING and "plot" in field.LACKING
    assert not (tmp_path / "new").exists()


def test_walks_begin_in_the_stream_and_end_where_the_sampler_does():
    network = toy.trained("mixture")
    x = field.walk(network, 5, "ddpm", 7, 3, labels=1)
    assert x.shape == (8, 5, 2)
    torch.testing.assert_close(x[0], noise.normal(3, range(5), 0, (2,), stream="start"), rtol=0, atol=1e-3)
    assert torch.equal(x[-1], toy.sampler(network, "ddpm", 7)(5, seed=3, labels=1))


def test_nearest_finds_the_points_beside_places():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-2.0, 0.5]])
    assert field.nearest(points, [(-1.5, 0.0), (2.0, 2.0)]) == [2, 1]

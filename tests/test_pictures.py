"""Figures and animations: that what is asked for stands in them, whole, and that a GIF keeps its colours."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from fastdiff import pictures
from fastdiff.pictures import PAPER, each, enlarged, figure, save_gif, stacked

PAPER_RGB = ImageColor.getrgb(PAPER)


def tiles(n, size=4, channels=3, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8))


def places(picture, tile, scale):
    """(left, top) of every place in a picture where an enlarged tile stands, to the bit."""
    whole, wanted = np.asarray(picture), np.asarray(enlarged(tile, scale))
    high, wide = wanted.shape[:2]
    windows = np.argwhere((whole[: len(whole) - high + 1, : whole.shape[1] - wide + 1] == wanted[0, 0]).all(2))
    return [(x, y) for y, x in windows.tolist() if np.array_equal(whole[y : y + high, x : x + wide], wanted)]


def test_enlarged_squares_on_white():
    tile = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)  # opaque, clear
    pixels = np.asarray(enlarged(tile, 3))
    assert pixels.shape == (3, 6, 3)
    assert (pixels[:, :3] == [10, 20, 30]).all()
    assert (pixels[:, 3:] == 255).all()
    assert (np.asarray(enlarged(np.full((2, 2, 1), 7, np.uint8), 2)) == 7).all()


def test_tiles_stand_in_rows_and_columns():
    a, b, c, d, e = tiles(5)
    picture = figure(
        [[a, b, None], [c, d, e]], scale=5, columns=["one", "two", "three"], labels=["up", "down"], title="Title", text="Text."
    )
    at = [places(picture, tile, 5) for tile in (a, b, c, d, e)]
    assert [len(found) for found in at] == [1] * 5
    (ax, ay), (bx, by), (cx, cy), (dx, dy), (ex, ey) = (found[0] for found in at)
    assert ay == by < cy == dy == ey
    assert ax == cx < bx == dx < ex
    assert bx - ax == ex - dx > 20  # a column apart, and as wide as "three" at least


def test_columns_can_stand_apart():
    row = tiles(4)
    picture = figure([row], scale=8, apart=[1])
    left = [places(picture, tile, 8)[0][0] for tile in row]
    assert left[1] - left[0] == left[2] - left[1] + 2 * pictures.GAP
    assert left[2] - left[1] == left[3] - left[2] == 32 + pictures.GAP


@pytest.mark.parametrize("scale", [1, 4, 9])
def test_nothing_is_cut_off(scale):
    """However long the words and small the tiles: a rim of bare paper on every side, but for what is drawn."""
    picture = figure(
        [tiles(3), tiles(3, seed=1)], scale=scale, title="A title that is rather long", text="Some text that goes on for a while. " * 6,
        columns=["extraordinarily", "x_t", "jg"], labels=["a label\nof two lines", "guess of x_0"], over=[(0, 1, "over"), (2, 2, "end")],
        under=[each(["a caption", "b", "incomprehensibilities"]), [(0, 2, "under all of them")]], gauge=(0.5, "50 % noise"),
        note="A note at the end, also long enough to be broken into lines.",
    )  # fmt: skip
    pixels = np.asarray(picture)
    rim = np.ones(pixels.shape[:2], bool)
    rim[18:-18, 18:-18] = False
    assert (pixels[rim] == PAPER_RGB).all()
    assert (pixels[~rim] != PAPER_RGB).any()


def test_longer_texts_are_broken_at_words():
    text = pictures.wrapped("one two three four", pictures.LABEL, 70)
    assert text.replace("\n", " ") == "one two three four"
    assert "\n" in text
    assert all(pictures.width_of(line, pictures.LABEL) <= 70 for line in text.split("\n"))
    assert pictures.wrapped("incomprehensible", pictures.LABEL, 5) == "incomprehensible"
    # What must stay together does.
    assert "\n" not in pictures.wrapped("m\u00a0+\u00a0w", pictures.LABEL, 1)


def test_an_index_is_lowered_and_a_solver_keeps_its_name():
    assert [part for part, _, lowered in pictures._runs("the x_t, or x_0", 17) if lowered] == ["t", "0"]
    assert [part for part, _, lowered in pictures._runs("dpmpp_2m dpm_2", 17) if lowered] == []
    assert pictures.width_of("x_t", 17) < pictures.width_of("xt", 17)


def test_the_gauge_is_filled_so_far():
    full, half, none = (
        (np.asarray(figure([tiles(8)], scale=8, gauge=(share, "noise"))) == ImageColor.getrgb(pictures.ACCENT)).all(2).sum()
        for share in (1, 0.5, 0)
    )
    assert none == 0
    assert half == pytest.approx(full / 2, rel=0.02)


def test_a_gauge_has_room_beside_the_smallest_tile():
    picture = figure([tiles(1, size=1)], scale=1, gauge=(1, "100 % noise"))
    assert picture.width > 250
    assert (np.asarray(picture)[:, -18:] == PAPER_RGB).all()


def test_stacked_keeps_the_parts():
    a, b = figure([tiles(2)], scale=4), figure([tiles(3, seed=1)], scale=4)
    both = stacked([a, b])
    assert both.size == (max(a.width, b.width), a.height + b.height)
    assert both.crop((0, 0, *a.size)).tobytes() == a.tobytes()
    assert both.crop((0, a.height, b.width, a.height + b.height)).tobytes() == b.tobytes()


def read(path):
    with Image.open(path) as film:
        frames, durations = [], []
        for k in range(film.n_frames):
            film.seek(k)
            durations.append(film.info["duration"])
            frames.append(np.asarray(film.convert("RGB")))
        return frames, durations, film.info.get("loop")


def test_a_gif_has_its_frames_times_and_an_endless_loop(tmp_path):
    frames = [figure([tiles(2, seed=k)], scale=4) for k in range(5)]
    save_gif(frames, tmp_path / "a.gif", ms=80, pause=1500)
    found, durations, loop = read(tmp_path / "a.gif")
    assert durations == [80] * 4 + [1500]
    assert loop == 0
    # 32 colours in a frame, and those of the rim: none is lost.
    for frame, picture in zip(found, frames, strict=True):
        assert np.array_equal(frame, np.asarray(picture))
    save_gif(frames, tmp_path / "a.gif", ms=[500, 80, 90, 100, 1], pause=200)
    assert read(tmp_path / "a.gif")[1] == [500, 80, 90, 100, 200]


def test_a_gif_of_many_colours_keeps_paper_letters_and_sprites(tmp_path):
    """3,200 colours in 256: the paper and a sprite's white to the bit, the rest nearly; nothing flickers where nothing moves."""
    noisy = tiles(50, size=8)
    for tile in noisy:
        tile[:3] = 255
    frames = [figure([noisy[k:] + noisy[:k]], scale=2, text="Some words", gauge=(1, "100 % noise")) for k in range(3)]
    save_gif(frames, tmp_path / "a.gif")
    found, _, _ = read(tmp_path / "a.gif")
    for frame, picture in zip(found, frames, strict=True):
        wanted = np.asarray(picture)
        assert np.abs(frame.astype(int) - wanted).mean() < 6
        for colour in (PAPER_RGB, (255, 255, 255), ImageColor.getrgb(pictures.ACCENT)):
            same = (wanted == colour).all(2)
            assert same.any()
            assert (frame[same] == colour).all()


def test_frames_of_two_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one frame, and all of one size"):
        save_gif([figure([tiles(1)], scale=2), figure([tiles(2)], scale=2)], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []

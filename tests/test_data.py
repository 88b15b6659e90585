"""fastdiff.data: each reader's values, each refusal's words, and that any bytes give a Dataset or a DataError, nothing else."""

import hashlib
import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff import data
from fastdiff.data import DataError, Dataset, grid, load, to_float, to_uint8


def pictures(count=6, height=5, width=4, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def save(folder, images, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / (names[index] if names else f"{index}.png"))


def fails(match, source, **options):
    with pytest.raises(DataError, match=match) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value) and (caught.value.__suppress_context__ or caught.value.__context__ is None)


def test_sprites_are_the_documented_set():
    file = data.ASSETS / "sprites.npz"
    digest = "4efa9dba4e7f07140663143447f02c7889becaa135c70fa4e1dcaad1cbe6f8bf"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert digest in (data.ASSETS / "LICENSES.md").read_text()
    sprites = load()
    assert len(sprites) == 23446 and sprites.shape == (3, 16, 16) and sprites.labels.dtype == np.int64
    names = "adventurer;portrait;monster;weapon;armour;potion or food;book, wand or jewel;spell"
    assert sprites.classes == tuple(names.split(";"))
    assert np.bincount(sprites.labels).tolist() == [8000, 8000, 1500, 1500, 1248, 546, 1152, 1500]
    assert np.bincount(sprites.labels[sprites.test]).tolist() == [800, 800, 145, 137, 142, 42, 112, 155]
    train, held_out = sprites.split()
    assert (len(train), len(held_out)) == (23446 - 2333, 2333) and train.test is None and held_out.test is None
    assert np.array_equal(held_out.images, sprites.images[sprites.test])
    assert np.array_equal(train.labels, sprites.labels[~sprites.test])


def test_split_of_an_unsplit_set_holds_out_nothing():
    train, held_out = Dataset(pictures(), None, (), None).split()
    assert np.array_equal(train.images, pictures()) and len(held_out) == 0 and held_out.shape == (3, 5, 4)


def test_digest_depends_on_content_alone():
    labels = np.array([0, 1, 0, 1, 0, 1])
    base = Dataset(pictures(), labels, ("a", "b"), None)
    assert base.digest() == Dataset(pictures(), labels.copy(), ("a", "b"), np.ones(6, bool)).digest()
    changed = pictures()
    changed[5, 4, 3, 2] ^= 1
    others = [
        Dataset(changed, labels, ("a", "b"), None),
        Dataset(pictures(), 1 - labels, ("a", "b"), None),
        Dataset(pictures(), labels, ("ab", ""), None),
        Dataset(pictures(), None, (), None),
        Dataset(pictures().reshape(6, 4, 5, 3), labels, ("a", "b"), None),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 6
    # Written out by hand: the digest stands in checkpoints, so it must not drift.
    head = b'[[6, 5, 4, 3], true, ["a", "b"]]\n'
    assert base.digest() == hashlib.sha256(head + pictures().tobytes() + struct.pack("<6q", *labels)).hexdigest()


@pytest.mark.parametrize(
    ("match", "parts"),
    [
        ("images are float32, but must be uint8 in 0..255: multiply", {"images": np.zeros((2, 4, 4, 3), np.float32)}),
        ("images are int64, but must be uint8 in 0..255$", {"images": np.zeros((2, 4, 4, 3), np.int64)}),
        (r"shape \(2, 3, 8, 8\).*looks like \[N, C, H, W\]", {"images": np.zeros((2, 3, 8, 8), np.uint8)}),
        (r"must be \[N, H, W, C\]", {"images": np.zeros((2, 8), np.uint8)}),
        (r"must be \[N, H, W, C\]", {"images": np.zeros((2, 0, 4, 3), np.uint8)}),
        ("not C-contiguous", {"images": np.zeros((2, 4, 4, 3), np.uint8)[:, ::2]}),
        ("classes without labels", {"classes": ("a",)}),
        ("labels without classes", {"labels": np.zeros(2, np.int64)}),
        ("same name", {"labels": np.zeros(2, np.int64), "classes": ("a", "a")}),
        ("must be int64", {"labels": np.zeros(2, np.int32), "classes": ("a",)}),
        ("3 labels for 2 images", {"labels": np.zeros(3, np.int64), "classes": ("a",)}),
        (r"labels span 0\.\.2, but must be in 0\.\.1", {"labels": np.array([0, 2]), "classes": ("a", "b")}),
        (r"labels span -1\.\.0", {"labels": np.array([0, -1]), "classes": ("a", "b")}),
        ("test is int64", {"test": np.zeros(2, np.int64)}),
        (r"test is bool of shape \(3,\)", {"test": np.zeros(3, bool)}),
    ],
)
def test_dataset_refuses_parts_that_do_not_fit(match, parts):
    images = parts.pop("images", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=match):
        Dataset(images, parts.get("labels"), parts.get("classes", ()), parts.get("test"))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, write):
    labels, test = np.array([2, 0, 1, 1, 0, 2], np.uint8), np.array([0, 1, 0, 0, 0, 1], bool)
    write(tmp_path / "a.npz", images=pictures(), labels=labels, classes=["x", "y", "z"], test=test, more=np.zeros(3))
    got = load(tmp_path / "a.npz")
    assert np.array_equal(got.images, pictures()) and got.labels.tolist() == labels.tolist() and got.labels.dtype == np.int64
    assert got.classes == ("x", "y", "z") and np.array_equal(got.test, test)


def test_npz_one_hot_grey_and_nameless(tmp_path):
    np.savez(tmp_path / "a.npz", images=pictures(channels=1)[..., 0], labels=np.eye(4)[[3, 0, 1, 1, 0, 3]])
    got = load(str(tmp_path / "a.npz"))
    assert np.array_equal(got.images, pictures(channels=1)) and got.shape == (1, 5, 4)
    assert got.labels.tolist() == [3, 0, 1, 1, 0, 3] and got.classes == ("0", "1", "2", "3") and got.test is None
    np.savez(tmp_path / "b.npz", images=np.asfortranarray(pictures(channels=4)))
    got = load(tmp_path / "b.npz")
    assert np.array_equal(got.images, pictures(channels=4)) and got.labels is None and got.classes == ()


@pytest.mark.parametrize(
    ("match", "arrays"),
    [
        (r"a\.npz: no array 'images' in it \(found: 'x'\)", {"x": pictures()}),
        (r"a\.npz: images are float64.*0\.\.255", {"images": pictures() / 255}),
        (r"a\.npz: images have shape \(5,\)", {"images": np.zeros(5, np.uint8)}),
        (r"no images in .*a\.npz", {"images": pictures(0)}),
        (r"a\.npz: array 'images': holds pickled", {"images": np.array([pictures(), None], object)}),
        (r"a\.npz: 5 labels for 6 images", {"images": pictures(), "labels": np.zeros(5, int)}),
        (r"a\.npz: labels are float64", {"images": pictures(), "labels": np.zeros(6)}),
        (r"a\.npz: labels of shape \(6, 2\) are not one-hot", {"images": pictures(), "labels": np.zeros((6, 2))}),
        (r"a\.npz: labels of shape \(6, 2\) are not one-hot", {"images": pictures(), "labels": np.full((6, 2), np.nan)}),
        (r"2 columns for 3 classes", {"images": pictures(), "labels": np.eye(2)[[0] * 6], "classes": ["a", "b", "c"]}),
        (r"span 0\.\.2, but with 2 classes must be in 0\.\.1", {"images": pictures(), "labels": [0, 2] * 3, "classes": ["a", "b"]}),
        (r"span -1\.\.0", {"images": pictures(), "labels": [0, 0, 0, 0, 0, -1]}),
        (r"without classes must be in 0\.\.65535", {"images": pictures(), "labels": [0, 0, 0, 0, 0, 1 << 40]}),
        (r"with 1 classes", {"images": pictures(), "labels": np.array([2**64 - 1] * 6, np.uint64), "classes": ["a"]}),
        (r"labels are empty", {"images": pictures(), "labels": []}),
        (r"a\.npz: classes are int64", {"images": pictures(), "labels": [0] * 6, "classes": [1, 2]}),
        (r"a\.npz: classes without labels", {"images": pictures(), "classes": ["a"]}),
        (r"a\.npz: test is uint8", {"images": pictures(), "test": np.zeros(6, np.uint8)}),
    ],
)
def test_npz_refusals(tmp_path, match, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    fails(match, tmp_path / "a.npz")


def test_npz_damaged(tmp_path):
    np.savez(tmp_path / "whole.npz", images=pictures())
    whole = (tmp_path / "whole.npz").read_bytes()
    flipped = whole[:300] + b"?" * 9 + whole[309:]
    for name, content in {"cut": whole[:-40], "foreign": b"hello", "empty": b"", "flipped": flipped}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        fails(rf"{name}\.npz.*: not a readable", tmp_path / f"{name}.npz")


def test_npz_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    def npy(shape, payload):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return stream.getvalue() + payload

    def write(content):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", content)

    write(npy((1 << 20, 64, 64, 3), b"\0" * 1000))
    fails(f"12884901888 bytes decoded, more than the {8 << 30} allowed", tmp_path / "a.npz")
    write(npy((1 << 10, 64, 64, 3), b"\0" * 1000))
    fails("truncated or damaged", tmp_path / "a.npz")
    write(npy((10, 10, 10, 3), b"\0" * 3000))
    assert len(load(tmp_path / "a.npz")) == 10
    monkeypatch.setattr(data, "MAX_BYTES", 2999)
    fails("3000 bytes decoded, more than the 2999 allowed", tmp_path / "a.npz")


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", pictures())
    np.save(tmp_path / "l.npy", np.array([1, 0, 1, 0, 0, 1], np.int16))
    got = load(tmp_path / "a.npy")
    assert np.array_equal(got.images, pictures()) and got.labels is None
    got = load(tmp_path / "a.npy", labels=str(tmp_path / "l.npy"))
    assert got.labels.tolist() == [1, 0, 1, 0, 0, 1] and got.classes == ("0", "1")


def test_npy_course_layout_finds_its_labels(tmp_path):
    np.save(tmp_path / "sprites_1788_16x16.npy", pictures(6, 16, 16))
    np.save(tmp_path / "sprite_labels_nc_1788_16x16.npy", np.eye(5)[[4, 0, 1, 1, 2, 3]])
    got = load(tmp_path / "sprites_1788_16x16.npy")
    assert np.array_equal(got.images, pictures(6, 16, 16)) and got.labels.tolist() == [4, 0, 1, 1, 2, 3]
    assert got.classes == ("0", "1", "2", "3", "4")
    np.save(tmp_path / "sprite_labels_nc_1788_16x16.npy", np.full((6, 5), 0.2))
    fails("not one-hot", tmp_path / "sprites_1788_16x16.npy")


def test_npy_refusals(tmp_path):
    np.save(tmp_path / "a.npy", pictures())
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-1])
    fails(r"cut\.npy: truncated or damaged", tmp_path / "cut.npy")
    (tmp_path / "foreign.npy").write_bytes(b"not numpy at all")
    fails(r"foreign\.npy: not a readable \.npy", tmp_path / "foreign.npy")
    np.save(tmp_path / "object.npy", np.array([{}], object))
    fails(r"object\.npy: holds pickled", tmp_path / "object.npy")
    np.save(tmp_path / "float.npy", pictures() / np.float32(255))
    fails(r"float\.npy: images are float32.*uint8 in 0\.\.255", tmp_path / "float.npy")
    fails(r"none\.npy: cannot be opened", tmp_path / "a.npy", labels=tmp_path / "none.npy")
    np.save(tmp_path / "l.npy", np.zeros(7, int))
    fails("7 labels for 6 images", tmp_path / "a.npy", labels=tmp_path / "l.npy")


def test_folder_with_classes(tmp_path):
    images = pictures()
    save(tmp_path / "b cat", images[:2])
    save(tmp_path / "a dog", images[2:5], ["z.PNG", "y.bmp", "x.png"])
    save(tmp_path / ".hidden", images)
    (tmp_path / "b cat" / "notes.txt").write_text("not an image")
    (tmp_path / "b cat" / "._0.png").write_text("not an image")
    (tmp_path / "readme.md").write_text("not an image")
    got = load(tmp_path)
    assert got.classes == ("a dog", "b cat") and got.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(got.images, images[[4, 3, 2, 0, 1]])


def test_folder_flat_becomes_rgb_on_white(tmp_path):
    Image.fromarray(np.array([[0, 200]], np.uint8)).save(tmp_path / "1.png")
    Image.fromarray(np.array([[[10, 20, 30, 0], [0, 0, 255, 51]]], np.uint8)).save(tmp_path / "2.png")
    Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)).quantize(2).save(tmp_path / "3.gif")
    got = load(tmp_path)
    assert got.labels is None and got.classes == ()
    # Alpha 51 of 255 is a fifth: 0.2 * (0, 0, 255) + 0.8 * 255.
    assert got.images.tolist() == [[[[0, 0, 0], [200, 200, 200]]], [[[255, 255, 255], [204, 204, 255]]], [[[10, 20, 30], [40, 50, 60]]]]


def test_folder_of_mixed_sizes_needs_size(tmp_path):
    save(tmp_path, [pictures(1, 4, 4)[0], np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)])
    fails(r"1\.png: is 8 x 4, but 0\.png is 4 x 4; give size", tmp_path)
    got = load(tmp_path, size=2)
    # Area average: each pixel is the mean of a 2 x 4 block of [4, 8, 3].
    expected = np.arange(4 * 8 * 3).reshape(2, 2, 2, 4, 3).mean((1, 3))
    assert got.images.shape == (2, 2, 2, 3) and np.abs(got.images[1] - expected).max() <= 0.5


def test_folder_refusals(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    fails("no images in .*empty", tmp_path / "empty")
    save(tmp_path / "mixed", pictures(1))
    save(tmp_path / "mixed" / "class", pictures(1))
    fails(r"mixed: has images \(0\.png, \.\.\.\) beside folders", tmp_path / "mixed")
    save(tmp_path / "holes" / "a", pictures(1))
    (tmp_path / "holes" / "b").mkdir()
    fails(r"no images in .*holes.b, which stands among class folders", tmp_path / "holes")
    save(tmp_path / "large", pictures(10))
    monkeypatch.setattr(data, "MAX_BYTES", 599)
    fails("10 images of 4 x 5 are more than 599 bytes", tmp_path / "large")


def test_folder_with_damaged_images(tmp_path):
    save(tmp_path / "a", pictures(3))
    save(tmp_path / "b", pictures(2, seed=1))
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[:60])
    (tmp_path / "b" / "0.png").write_bytes(b"")
    fails(r"a.1\.png: not a readable image", tmp_path)
    with pytest.warns(UserWarning, match=r"skipped 2 unreadable of 5 images: a.1\.png, b.0\.png$") as caught:
        got = load(tmp_path, skip_bad=True)
    assert caught[0].filename == __file__
    assert np.array_equal(got.images, np.stack([*pictures(3)[[0, 2]], pictures(2, seed=1)[1]])) and got.labels.tolist() == [0, 0, 1]
    for name in ("a/0.png", "a/2.png", "b/1.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped 5 unreadable of 5"):
        fails("no images in .* could be read, all 5 are damaged", tmp_path, skip_bad=True)


def test_image_formats_that_would_mislead(tmp_path):
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(tmp_path / "deep.png")
    fails(r"deep\.png: has pixels of more than 8 bits", tmp_path)
    (tmp_path / "deep.png").unlink()
    # Pillow would hand this to Ghostscript, whatever its name.
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n")
    fails(r"script\.png: not a readable image \(UnidentifiedImageError", tmp_path)


@pytest.mark.parametrize("side", [10_000, 20_000, 65_000])
def test_image_bomb(tmp_path, side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    fails(r"bomb\.png: claims .*more .*than the 16777216 allowed", tmp_path / "bomb.png", tile=16)


def test_sheet(tmp_path):
    tiles = pictures(6, 4, 4, 4)
    tiles[..., 3] = 255
    tiles[1, ..., 3] = 0
    tiles[3] = [9, 8, 7, 255]
    sheet = np.concatenate([np.concatenate(tiles[:3], 1), np.concatenate(tiles[3:], 1)], 0)
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    got = load(tmp_path / "sheet.png", tile=4)
    assert np.array_equal(got.images, tiles[[0, 2, 4, 5], ..., :3]) and got.labels is None
    fails(r"sheet\.png: is 12 x 8, which does not divide into tiles of 5 x 5", tmp_path / "sheet.png", tile=5)
    fails("does not divide into tiles of 16", tmp_path / "sheet.png", tile=16)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "plain.png")
    fails("no images in .*plain.png: every tile is transparent or of a single colour", tmp_path / "plain.png", tile=4)


def test_mixed_calls(tmp_path):
    save(tmp_path / "f", pictures(1))
    np.save(tmp_path / "a.npy", pictures())
    np.savez(tmp_path / "a.npz", images=pictures())
    (tmp_path / "a.txt").write_text("")
    fails("no such file or folder: '.*nowhere'", tmp_path / "nowhere")
    fails("no such file or folder: ''", "")
    fails("no such file or folder", "x" * 5000)
    fails(r"a\.txt: unsupported kind of file; read are folders, \.npz, \.npy and, with tile=, \.png", tmp_path / "a.txt")
    fails(r"0\.png: a single image; give tile=", tmp_path / "f" / "0.png")
    fails(r"tile= goes with an image file \(a sprite sheet\), but this is a folder", tmp_path / "f", tile=16)
    fails(r"labels= goes with an \.npy file, but this is a folder", tmp_path / "f", labels=tmp_path / "a.npy")
    fails(r"labels= goes with an \.npy file, but this is an \.npz file", tmp_path / "a.npz", labels=tmp_path / "a.npy")
    fails(r"size= goes with a folder of images, but this is an \.npy file", tmp_path / "a.npy", size=16)
    fails(r"size= goes with a folder of images, but this is an image file", tmp_path / "f" / "0.png", size=16)
    fails(r"tile= goes with .*, but this is an \.npz file", "sprites", tile=16)
    fails("size=0: must be a whole number", tmp_path / "f", size=0)
    fails(r"tile=1\.5: must be a whole number", tmp_path / "f" / "0.png", tile=1.5)


def damaged(whole):
    """Either arbitrary bytes, or a whole file with a few bytes changed and its end cut off: the second gets past the magic."""
    edits = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)

    def apply(edits, end):
        content = bytearray(whole)
        for place, value in edits:
            content[place] = value
        return bytes(content[:end])

    return st.binary(max_size=200) | st.builds(apply, edits, st.integers(0, len(whole)) | st.just(len(whole)))


def whole_file(suffix):
    stream = io.BytesIO()
    if suffix == ".npz":
        np.savez_compressed(stream, images=pictures(2), labels=[0, 1], classes=["a", "b"])
    elif suffix == ".npy":
        np.save(stream, pictures(2))
    else:
        Image.fromarray(pictures(1, 4, 4, 4)[0]).save(stream, suffix[1:])
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".png", ".gif"])
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_any_bytes_give_a_dataset_or_a_data_error(tmp_path, monkeypatch, suffix, choice):
    # A changed size in a GIF's header stays cheap to decode.
    monkeypatch.setattr(data, "MAX_PIXELS", 1 << 20)
    file = tmp_path / f"fuzz{suffix}"
    file.write_bytes(choice.draw(damaged(whole_file(suffix))))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = load(file, tile=4) if suffix in data.SUFFIXES else load(file)
    except DataError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    else:
        assert isinstance(got, Dataset) and len(got) > 0


def test_every_byte_survives_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 4, 4)
    x = to_float(values)
    assert x.dtype == torch.float32 and x.shape == (2, 4, 8, 4) and x.is_contiguous()
    assert x.min() == -1 and x.max() == 1 and x[1, 2, 3, 1] == values[1, 3, 1, 2] / 127.5 - 1
    back = to_uint8(x)
    assert torch.equal(back, values) and back.is_contiguous()
    assert torch.equal(to_uint8(x.double()), values)
    assert to_float(values[:0]).shape == (0, 4, 8, 4) and to_uint8(x[:0]).shape == (0, 8, 4, 4)


def test_flip_mirrors_left_right_where_asked():
    images = torch.from_numpy(pictures(3))
    x = to_float(images, torch.tensor([False, True, False]))
    expected = images.clone()
    expected[1] = torch.from_numpy(pictures(3)[1, :, ::-1].copy())
    assert torch.equal(to_uint8(x), expected) and not torch.equal(expected, images) and x.is_contiguous()


def test_to_uint8_clamps_and_rounds_half_to_even():
    def bytes_of(*values):
        return to_uint8(torch.tensor(values).reshape(1, 1, 1, -1)).flatten().tolist()

    assert bytes_of(-7.0, 9.0, float("inf"), -float("inf"), -1.0, 1.0) == [0, 255, 255, 0, 0, 255]
    assert bytes_of(-1 + 0.99 / 255, -1 + 1.01 / 255, -0.5, 0.5) == [0, 1, 64, 191]
    x = (2 * torch.arange(255, dtype=torch.float64) + 1) / 255 - 1
    x = x.float()[((x.float() + 1) * 127.5) % 1 == 0.5]
    assert len(x) > 50 and all(value % 2 == 0 for value in bytes_of(*x.tolist()))
    assert to_uint8(torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16)).item() == 191


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_to_float_refusals(x):
    with pytest.raises(DataError, match=r"must be uint8 \[N, H, W, C\]"):
        to_float(x)


@pytest.mark.parametrize("x", [torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)])
def test_to_uint8_refusals(x):
    with pytest.raises(DataError, match=r"must be floating point \[N, C, H, W\]"):
        to_uint8(x)


@pytest.mark.parametrize(("scale", "gap"), [(1, 1), (3, 2), (2, 0)])
def test_grid_places_each_pixel(scale, gap):
    images = pictures(5, 2, 3)
    got = np.asarray(grid(images, 2, scale=scale, gap=gap))
    down, right = 2 * scale + gap, 3 * scale + gap
    assert got.shape == (3 * down - gap, 2 * right - gap, 3)
    expected = np.full_like(got, 255)
    for index, y, x in np.ndindex(5, 2, 3):
        top, left = index // 2 * down + y * scale, index % 2 * right + x * scale
        expected[top : top + scale, left : left + scale] = images[index, y, x]
    assert np.array_equal(got, expected)


def test_grid_of_grey_and_of_alpha():
    got = np.asarray(grid(np.array([0, 90], np.uint8).reshape(2, 1, 1, 1), 9))
    assert got.tolist() == [[[0] * 3, [255] * 3, [90] * 3]]
    got = np.asarray(grid(np.array([[0, 0, 255, 51], [1, 2, 3, 255], [1, 2, 3, 0]], np.uint8).reshape(3, 1, 1, 4), 1, gap=0))
    assert got.tolist() == [[[204, 204, 255]], [[1, 2, 3]], [[255] * 3]]


@pytest.mark.parametrize("options", [{"columns": 0}, {"columns": 1, "scale": 0}, {"columns": 1, "gap": -1}])
def test_grid_refusals(options):
    with pytest.raises(DataError, match="grid of 6 images with columns="):
        grid(pictures(), **options)
    with pytest.raises(DataError, match="grid of 0 images"):
        grid(pictures(0), 1)
    with pytest.raises(DataError, match="uint8"):
        grid(pictures() / 255, 1)

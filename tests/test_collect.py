"""A run in one place: every format says what the shards say, and a target is whole or as it was."""

import errno
import hashlib
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastdiff import collect as module
from fastdiff import data, runs
from fastdiff.collect import collect, folder_names
from fastdiff.distributed import Group
from fastdiff.runs import RunError

CLASSES = ("cat", "dog", "10")


def config(images=23, shard_size=5, shape=(6, 7, 3), first=4, labels=(2, 0), classes=CLASSES):
    return {
        "images": images, "first": first, "shard_size": shard_size, "shape": list(shape), "labels": list(labels) or None,
        "classes": list(classes) or None,
    }  # fmt: skip


def draw(shape):
    """Images that are a function of their numbers."""
    return lambda ids, labels: np.stack([np.random.default_rng(int(i)).integers(0, 256, shape, dtype=np.uint8) for i in ids])


def run(folder, **settings):
    """A complete run, (folder, images, ids)."""
    about = config(**settings)
    with runs.hold(folder, about, Group()) as held:
        held.make(draw(tuple(about["shape"])))
        held.finish()
    ids = about["first"] + np.arange(about["images"])
    return folder, draw(tuple(about["shape"]))(ids, None), ids


def entries(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name != ".lock")


@pytest.fixture
def made(tmp_path):
    return run(tmp_path / "run")


def test_npz_has_all_and_is_data(made, tmp_path):
    folder, images, ids = made
    done = collect(folder, tmp_path / "x.npz")
    assert (done.path, done.images, done.sha256) == (tmp_path / "x.npz", 23, hashlib.sha256(images.tobytes()).hexdigest())
    assert runs.verify(folder).sha256 == done.sha256
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["images"], images)
        assert np.array_equal(arrays["ids"], ids)
        assert arrays["labels"].tolist() == [(2, 0)[i % 2] for i in ids]
        assert (arrays["images"].dtype, arrays["ids"].dtype, arrays["labels"].dtype) == (np.uint8, np.int64, np.int64)
    loaded = data.load(tmp_path / "x.npz")
    assert np.array_equal(loaded.images, images)
    assert loaded.labels.tolist() == [(2, 0)[i % 2] for i in ids]
    assert loaded.classes == CLASSES


def test_npy_is_mapped_into_memory(made, tmp_path):
    folder, images, ids = made
    collect(folder, tmp_path / "x.npy")
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, images)
    loaded = data.load(tmp_path / "x.npy", labels=tmp_path / "x_labels.npy")
    assert loaded.labels.tolist() == [(2, 0)[i % 2] for i in ids]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["x.tar", "x-%06d.tar", "X.TAR"])
def test_tars_have_a_png_and_a_class_for_every_number(tmp_path, name, channels):
    folder, images, ids = run(tmp_path / "run", shape=(6, 7, channels))
    collect(folder, tmp_path / name)
    paths = sorted(p for p in tmp_path.iterdir() if p.suffix.lower() == ".tar")
    assert [p.name for p in paths] == ([name] if "%" not in name else [f"x-{k:06}.tar" for k in range(5)])
    names, found, labels = [], [], []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                assert (member.isreg(), member.mtime, member.uid, member.uname) == (True, 0, 0, "")
                if member.name.endswith(".png"):
                    with Image.open(tar.extractfile(member)) as image:
                        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
                        found.append(np.asarray(image).reshape(6, 7, channels))
                else:
                    labels.append(int(tar.extractfile(member).read()))
    assert names == [f"{i:012}.{kind}" for i in ids for kind in ("png", "cls")]
    assert np.array_equal(found, images)
    assert labels == [(2, 0)[i % 2] for i in ids]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_has_a_png_for_every_number_and_is_data(tmp_path, channels):
    folder, images, ids = run(tmp_path / "run", shape=(6, 7, channels))
    collect(folder, tmp_path / "pngs")
    names = {2: "10", 0: "cat"}
    assert entries(tmp_path / "pngs") == sorted(["10", "cat", *(f"{names[(2, 0)[i % 2]]}/{i:012}.png" for i in ids)])
    for i, image in zip(ids, images, strict=True):
        with Image.open(tmp_path / "pngs" / names[(2, 0)[i % 2]] / f"{i:012}.png") as found:
            assert np.array_equal(np.asarray(found).reshape(6, 7, channels), image)
    loaded = data.load(tmp_path / "pngs")
    assert loaded.classes == ("10", "cat")
    if channels == 3:
        order = [i for kind in (2, 0) for i in range(23) if (2, 0)[ids[i] % 2] == kind]
        assert np.array_equal(loaded.images, images[order])


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.tar", "pngs"])
def test_without_classes_there_are_no_labels(tmp_path, name):
    folder, images, ids = run(tmp_path / "run", labels=(), classes=())
    collect(folder, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run", name])
    if name != "x.tar":
        loaded = data.load(tmp_path / name)
        assert np.array_equal(loaded.images, images)
        assert (loaded.labels, loaded.classes) == (None, ())
    else:
        with tarfile.open(tmp_path / name) as tar:
            assert tar.getnames() == [f"{i:012}.png" for i in ids]


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.tar", "x-%d.tar", "pngs"])
def test_the_same_bytes_twice_whatever_the_shards_were(tmp_path, name):
    found = []
    for i, size in enumerate((5, 5, 23, 1)):
        home = tmp_path / str(i)
        home.mkdir()
        folder, _, _ = run(home / "run", shard_size=size)
        done = collect(folder, home / name)
        shutil.rmtree(folder)
        found.append(({p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}, done.sha256))
    assert found[0] == found[1]
    if "%" not in name:
        assert found[0] == found[2] == found[3]
    assert len({sha for _, sha in found}) == 1


def test_images_of_numbers_near_the_last_and_more_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    folder, images, _ = run(tmp_path / "run", first=2**63 - 23)
    collect(folder, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["images"], images)
        assert arrays["ids"].tolist() == [2**63 - 23 + i for i in range(23)]
        assert arrays["labels"].tolist() == [(2, 0)[(2**63 - 23 + i) % 2] for i in range(23)]


def test_other_channels_are_no_pictures(tmp_path):
    folder, images, _ = run(tmp_path / "run", shape=(6, 7, 2))
    for name in ("x.tar", "pngs"):
        with pytest.raises(RunError, match=r"images of 2 channels cannot be PNGs; collect them into \.npz or \.npy"):
            collect(folder, tmp_path / name)
    collect(folder, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), images)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("there", "there is there already; give the name of a folder that is not"),
        ("file", "file is there already"),
        ("nowhere/x.npz", "there is no folder .*nowhere for x.npz"),
        ("x.zip", "x.zip is neither .npz, .npy nor .tar"),
        ("x-%d-%d.tar", "is no name of tars, one a shard; those have a single %d"),
        ("x-%s.tar", "is no name of tars"),
        ("x-%.tar", "is no name of tars"),
        ("x-%%d.tar", "is no name of tars"),
        ("x-%0999999999d.tar", "is no name of tars"),
        ("dangling", "dangling is there already"),
    ],
)
def test_a_target_that_cannot_be_is_one_line(made, tmp_path, name, text):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = entries(tmp_path)
    with pytest.raises(RunError, match=text) as caught:
        collect(made[0], tmp_path / name)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == before


NAMES = ["x.npz", "x.npy", "x.tar", "pngs"]


@pytest.mark.parametrize("name", NAMES)
def test_an_incomplete_run_is_refused(made, tmp_path, name):
    folder = made[0]
    manifest = runs.read_manifest(folder / "manifest.json")
    for k in (1, 3, 4):
        del manifest.digests[k]
    manifest.write(folder)
    with pytest.raises(RunError, match="is not complete: shards 1, 3 to 4 of 5 are missing; start its command again, and they are made"):
        collect(folder, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(RunError, match="there is no run in"):
        collect(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["run/shard-000002.npz", "run/manifest.json", "run/../run/shard-000000.npz"])
def test_the_runs_own_files_are_no_target(made, tmp_path, name):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="is one of the run's own files; give another name"):
        collect(made[0], tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    collect(made[0], tmp_path / "run" / "all.npz")


@pytest.mark.parametrize("harm", ["altered", "lost"])
@pytest.mark.parametrize("name", [*NAMES, "x-%d.tar"])
def test_a_bad_shard_leaves_the_target_as_it_was(made, tmp_path, name, harm):
    folder = made[0]
    if name != "pngs":
        (tmp_path / name.replace("%d", "0")).write_text("old")
        (tmp_path / "x_labels.npy").write_text("old")
    shard = folder / "shard-000003.npz"
    content = shard.read_bytes()
    shard.unlink()
    if harm == "altered":
        shard.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        RunError, match=r"shard-000003.npz is (not what was written|missing).*start the run's command again, and it is made"
    ):
        collect(folder, tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "pngs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_the_target_as_it_was(made, tmp_path, name, monkeypatch):
    if name != "pngs":
        (tmp_path / name).write_text("old")
    if name == "x.npy":
        (tmp_path / "x_labels.npy").write_text("old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        collect(made[0], tmp_path / name)
    assert caught.value.filename in (str(tmp_path / name), str(tmp_path / "x_labels.npy"))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "pngs").exists()


@pytest.mark.parametrize("name", [*NAMES, "x-%06d.tar", "x[1]*.npz"])
def test_what_a_killed_collection_left_is_removed(made, tmp_path, name):
    stale = tmp_path / f".{name.replace('%06d', '000001')}.1234.part"
    if name == "pngs":
        stale.mkdir()
        (stale / "1.png").write_text("half")
    else:
        stale.write_text("half")
    (tmp_path / ".other.npz.1234.part").write_text("not ours")
    collect(made[0], tmp_path / name)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == [".other.npz.1234.part"]


def test_progress_counts_images(made, tmp_path):
    seen = []
    collect(made[0], tmp_path / "x.npz", seen.append)
    assert seen == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.tar", "x-%d.tar", "pngs"])
def test_memory_is_that_of_a_few_shards(tmp_path, name, monkeypatch):
    """Twenty shards in the memory of five: and a tar's list of its members, of which there are many in a shard of small images, is not kept."""
    monkeypatch.setattr(runs, "MAX_MANIFEST", 1 << 16)  # room for one is made before it is read
    shape, each = ((4, 4, 1), 50) if "tar" in name else ((64, 64, 3), 10)
    with runs.hold(tmp_path / "run", config(images=20 * each, shard_size=each, shape=shape), Group()) as held:
        held.make(lambda ids, labels: np.full((len(ids), *shape), int(ids[0]) % 251, np.uint8))
        held.finish()
    size = max(p.stat().st_size for p in (tmp_path / "run").glob("shard-*"))
    (tmp_path / "first").mkdir()
    peaks = []
    for target in (tmp_path / "first" / name, tmp_path / name):  # what is imported and cached once is no part of it
        tracemalloc.start()
        try:
            collect(tmp_path / "run", target)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 5 * size + (200 << 10)


@given(st.lists(st.text(max_size=80), max_size=8, unique=True))
def test_names_of_folders_are_apart_and_stay_inside(classes):
    names = folder_names(tuple(classes))
    assert len({name.casefold() for name in names}) == len(classes)
    for name in names:
        assert name and len(os.fsencode(name)) < 256
        assert not set(name) & set('/\\.:\0\n*?"<>|') and name == Path(name).name


def test_class_names_with_path_tricks_stay_inside(tmp_path):
    classes = ("../x", "a/b", "", "a_b", "/etc/passwd", "..", "C:\\x", "Katze", "katze", "\u732b" * 100, "con\n")
    folder, images, _ = run(tmp_path / "run", classes=classes, labels=tuple(range(11)), first=0)
    collect(folder, tmp_path / "deep" if (tmp_path / "deep").mkdir() else tmp_path / "deep" / "pngs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "run"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["pngs"]
    homes = sorted((tmp_path / "deep" / "pngs").iterdir(), key=lambda p: int(p.name.split()[0]))
    assert [p.name.partition(" ")[2] for p in homes] == [
        "___x", "a_b", "_", "a_b", "_etc_passwd", "__", "C__x", "Katze", "katze", "\u732b" * 60, "con_"
    ]  # fmt: skip
    for kind, home in enumerate(homes):
        assert [int(p.stem) for p in sorted(home.iterdir())] == [i for i in range(23) if i % 11 == kind]
    assert np.array_equal(data.load(tmp_path / "deep" / "pngs").images.shape, images.shape)

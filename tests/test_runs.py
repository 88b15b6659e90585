"""Runs of many images: what is in the folder is right, or is found to be wrong and made again, whatever stopped the run, and however often."""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import FLAGS, ROOT, Process, contents, free_port, ranks, rounds, wait_for

from fastdiff import cli, data, load, native, runs, sample
from fastdiff.distributed import Group, join
from fastdiff.loop import Loop
from fastdiff.runs import MAX_SHARDS, Manifest, Plan, RunError

LONG = ["--batch", "60", "--shard-size", "3", "--steps", "25", "--solver", "ddpm", "--micro-batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said():
    """What the library logs of runs."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    log, keep = logging.getLogger("fastdiff.runs"), Keep(logging.WARNING)
    log.addHandler(keep)
    yield records
    log.removeHandler(keep)


# Runs of made-up images, in this process.


def config(images=10, shard_size=3, shape=(2, 3, 1), first=0, labels=(1, 0), classes=("a", "b"), **more):
    return {
        "images": images, "first": first, "shard_size": shard_size, "shape": list(shape), "labels": list(labels) or None,
        "classes": list(classes) or None,
    } | more  # fmt: skip


def draw(ids, labels, shape=(2, 3, 1)):
    return np.stack([np.random.default_rng(int(i)).integers(0, 256, shape, dtype=np.uint8) for i in ids])


def make(folder, *, stop_after=None, **about):
    """A run, or its beginning: after so many shards the process is gone."""
    with runs.hold(folder, config(**about), Group()) as run:
        drawn = []

        def drawing(ids, labels):
            if len(drawn) == stop_after:
                raise KeyError("gone")
            drawn.append(int(ids[0]))
            return draw(ids, labels, tuple(about.get("shape", (2, 3, 1))))

        with pytest.raises(KeyError) if stop_after is not None else contextlib.nullcontext():
            run.make(drawing)
            run.finish()
    return drawn


@given(
    st.integers(1, 400), st.integers(1, 500), st.sampled_from([0, 1, 7, 2**31, 2**63 - 400]), st.sampled_from([(), (0,), (2, 0), (0, 1, 2)])
)
@settings(max_examples=150)
def test_a_plan_has_every_image_once_in_order(images, size, first, kinds):
    plan = Plan(first, images, size, (1, 1, 1), kinds, ("a", "b", "c") if kinds else ())
    ids = [int(i) for k in range(plan.count) for i in plan.ids(k)]
    assert ids == list(range(first, first + images))
    assert [len(plan.ids(k)) for k in range(plan.count)] == [plan.size(k) for k in range(plan.count)]
    assert all(plan.size(k) == size for k in range(plan.count - 1)) and 1 <= plan.size(plan.count - 1) <= size
    for k in {0, plan.count - 1}:
        labels = plan.labels(plan.ids(k))
        assert (labels is None) == (not kinds)
        assert labels is None or labels.tolist() == [kinds[int(i) % len(kinds)] for i in plan.ids(k)]
        pixels = np.random.default_rng(0).integers(0, 256, (plan.size(k), 1, 1, 1), dtype=np.uint8)
        data = plan.pack(k, pixels)
        assert len(data) < plan.most(k)
        assert np.array_equal(plan.unpack(k, data), pixels)
        assert plan.pack(k, pixels) == data


@pytest.mark.parametrize(
    "about", [{"images": 0}, {"images": -1}, {"first": -1}, {"first": 2**63 - 9}, {"shard_size": 0}, {"images": MAX_SHARDS * 3 + 1}]
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, about):
    with pytest.raises(RunError) as caught:
        make(tmp_path / "run", **about)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_many_shards_say_what_would_do():
    with pytest.raises(RunError, match="--shard-size 2 makes 150000 shards; give 3 or more, for at most 100000"):
        Plan(0, 300_000, 2, (1, 1, 1))
    assert Plan(0, 300_000, 3, (1, 1, 1)).count == MAX_SHARDS


def test_a_shard_of_foreign_bytes_is_refused():
    plan = Plan(5, 10, 4, (2, 3, 1), (1, 0), ("a", "b"))
    images = draw(plan.ids(1), None)
    right = plan.pack(1, images)
    others = [
        Plan(5, 10, 4, (3, 2, 1), (1, 0), ("a", "b")), Plan(4, 10, 4, (2, 3, 1), (1, 0), ("a", "b")), Plan(5, 10, 4, (2, 3, 1), (0, 1), ("a", "b")),
        Plan(5, 10, 4, (2, 3, 1)), Plan(5, 10, 3, (2, 3, 1), (1, 0), ("a", "b")), Plan(5, 7, 4, (2, 3, 1), (1, 0), ("a", "b")),
    ]  # fmt: skip
    foreign = [other.pack(1, np.zeros((other.size(1), *other.shape), np.uint8)) for other in others]
    foreign += [plan.pack(0, images), b"", b"PK", right[:-1], right[:300], right[20:], b"\0" * len(right), os.urandom(len(right))]
    for odd in foreign:
        with pytest.raises(RunError, match=r"shard-000001.npz (does not hold the images|holds images of other numbers or labels)"):
            plan.unpack(1, odd)
    for i in range(len(right)):  # an altered byte is refused, or is no part of what is read, or is a pixel, which only the digest knows
        with contextlib.suppress(RunError):
            assert plan.unpack(1, right[:i] + bytes([right[i] ^ 0x41]) + right[i + 1 :]).shape == images.shape
    with pytest.raises(ValueError, match=r"shard 1 is uint8 \[3, 2, 3, 1\], and should be uint8 \[4, 2, 3, 1\]"):
        plan.pack(1, images[:3])
    with pytest.raises(ValueError, match="float64"):
        plan.pack(1, images.astype(float))


def test_a_false_plan_takes_no_memory():
    """A manifest may claim a shard of 2^40 images: bytes that are too few for it are refused before there is an array of their numbers."""
    small = Plan(0, 4, 4, (2, 3, 1))
    data = small.pack(0, draw(small.ids(0), None))
    for images in (1 << 40, 1 << 62):
        with pytest.raises(RunError, match="does not hold the images"):
            Plan(0, images, images, (2, 3, 1)).unpack(0, data)


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()),
    st.sets(st.integers(0, 3)),
)
def test_a_manifest_comes_back_from_its_text(tmp_path_factory, more, there):
    path = tmp_path_factory.mktemp("manifest", numbered=True) / "manifest.json"
    manifest = Manifest(more | config(**{}), {k: hashlib.sha256(bytes([k])).hexdigest() for k in there})
    path.write_text(manifest.text())
    back = runs.read_manifest(path)
    assert (back.config, back.digests, back.text()) == (manifest.config, manifest.digests, manifest.text())
    assert json.loads(manifest.text())["complete"] == (len(there) == 4)
    assert back.missing == [k for k in range(4) if k not in there]
    shutil.rmtree(path.parent)


WHOLE = json.loads(Manifest(config(), dict.fromkeys(range(4), "0" * 64)).text())


def altered(*where, to):
    raw = copy.deepcopy(WHOLE)
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = to
    return json.dumps(raw)


def without(*where):
    raw = json.loads(altered(*where, to=0))
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    return json.dumps(raw)


HOSTILE = [
    "", "{", "[]", "null", "7", '"run"', "{}", "\ufeff{}", "[" * 100_000, '{"fastdiff_run": ' + "[" * 100_000, "9" * 5_000, "NaN",
    '{"fastdiff_run": 1}', '{"fastdiff_run": 1, "config": {}, "shards": []}',
    *(altered("fastdiff_run", to=v) for v in (0, 2, "1", None, [1])), *(altered("config", to=v) for v in (None, [], "x", 7, {})),
    *(altered("shards", to=v) for v in (None, "x", 7, {"a": 1}, [None], [7], ["x"], [[]], [{}])),
    *(altered("config", k, to=v) for k in ("images", "first", "shard_size") for v in (-1, 0.5, "9", None, True, [], 2**63, 10**400, 1e300)),
    *(altered("config", "shape", to=v) for v in (None, [], [2, 3], [2, 3, 1, 1], [0, 3, 1], [-2, 3, 1], 7, "abc", [2**16, 1, 1])),
    *(altered("config", "shape", to=v) for v in (["2", 3, 1], [2.0, 3, 1], [True, 3, 1], [[2], 3, 1])),
    *(altered("config", "labels", to=v) for v in ([2], [-1], ["a"], [None], [0.0], 7, "a", [[0]], {"a": 1}, [2**70])),
    *(altered("config", "classes", to=v) for v in (7, [7], [None], [["a"]], None, ["a"], [])),
    *(without("config", k) for k in ("images", "first", "shard_size", "shape", "labels", "classes")), without("config"), without("shards"),
    *(altered("shards", 1, "sha256", to=v) for v in (None, 7, "", "0" * 63, "0" * 65, "G" * 64, "0" * 63 + "\n", "A" * 64, ["0" * 64])),
    *(altered("shards", 1, "first", to=v) for v in (None, "3", 3.0, 4, -3, 0, 12, 2**70, True, [3], float("nan"), float("inf"))),
    *(altered("shards", 1, "file", to=v) for v in ("../shard-000001.npz", "/etc/passwd", "shard-1.npz", "", None, "shard-000001.npz\n", "\x1b[2J")),
    *(altered("shards", 1, "images", to=v) for v in (None, 2, 4, -3, "3", 2**70)),
    *(without("shards", 1, k) for k in ("file", "first", "images", "sha256")),
    altered("shards", to=[*WHOLE["shards"], WHOLE["shards"][1]]), altered("shards", 1, to=WHOLE["shards"][0]), altered("shards", 1, "more", to=1),
]  # fmt: skip


@pytest.mark.parametrize("command", ["read", "hold", "verify"])
def test_a_hostile_manifest_is_one_line_and_stays_as_it_is(tmp_path, command):
    path = tmp_path / "manifest.json"
    for text in HOSTILE:
        path.write_text(text)
        with pytest.raises(RunError) as caught:
            {"read": lambda: runs.read_manifest(path), "hold": lambda: make(tmp_path), "verify": lambda: runs.verify(tmp_path)}[command]()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700, text[:200]
        assert str(path) in str(caught.value) or str(tmp_path) in str(caught.value)
        assert path.read_text() == text
        assert contents(tmp_path).keys() == {"manifest.json"}


def test_control_characters_of_a_configuration_are_not_shown_as_they_are(tmp_path):
    make(tmp_path, solver="\x1b[2J\nddim", **{"bad\nname": 1})
    with pytest.raises(RunError, match=r'solver "\\u001b') as caught:
        make(tmp_path, solver="ddim")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["missing", "folder", "huge", "fifo", "latin", "link"])
def test_a_manifest_that_is_no_file_of_its_size_is_refused(tmp_path, kind):
    path = tmp_path / "manifest.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as f:
            f.truncate(runs.MAX_MANIFEST + 1)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "latin":
        path.write_bytes(b'{"fastdiff_run": "\xff"}')
    elif kind == "link":
        path.symlink_to("/dev/zero")
    with pytest.raises(RunError) as caught:
        runs.read_manifest(path)
    assert str(caught.value).isprintable()
    if kind == "missing":
        assert str(caught.value) == f"there is no run in {tmp_path}: it has no manifest.json"


def test_a_manifest_cut_or_altered_anywhere_is_refused_or_another(tmp_path):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for i in range(len(whole) - 1):
        path.write_bytes(whole[:i])
        with pytest.raises(RunError, match="is damaged"):
            runs.read_manifest(path)
        for bits in (1, 0x80):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :])
            with contextlib.suppress(RunError):
                assert (
                    runs.read_manifest(path).text().encode() != whole
                    or bytes([whole[i] ^ bits]) in b" \n\t\r!"
                    or i < whole.index(b"shards")
                )
    for i in (0, 1, 100, len(whole) - 3):
        path.write_bytes(whole[:i])
        before = contents(tmp_path)
        with pytest.raises(RunError, match="is damaged"):
            make(tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "about",
    [
        {}, {"images": 1}, {"images": 9}, {"shard_size": 1}, {"shard_size": 1000}, {"shard_size": 10}, {"labels": (), "classes": ()},
        {"first": 2**63 - 10}, {"shape": (4, 1, 4)},
    ],
)  # fmt: skip
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, about):
    make(tmp_path / "calm", **about)
    calm, count = contents(tmp_path / "calm"), Plan.of(config(**about)).count
    assert sorted(calm) == sorted(["manifest.json", *(f"shard-{k:06}.npz" for k in range(count))])
    assert runs.verify(tmp_path / "calm").right
    for stop in range(0, count, max(count // 4, 1)):
        out = tmp_path / f"stopped-{stop}"
        make(out, stop_after=stop, **about)
        found = runs.verify(out)
        assert found.missing == tuple(range(stop, count)) and not found.altered and found.sha256 is None
        size = about.get("shard_size", 3)
        assert make(out, **about) == [about.get("first", 0) + k * size for k in range(stop, count)]
        assert contents(out) == calm
        assert make(out, **about) == []
        assert contents(out) == calm


def test_a_journal_cut_at_any_byte_costs_what_it_says_no_more(tmp_path):
    make(tmp_path / "calm", images=6)
    calm = contents(tmp_path / "calm")
    out = tmp_path / "run"
    with runs.hold(out, config(images=6), Group()) as run:
        run.make(draw)  # all shards there, and nothing in the manifest
    before = contents(out)
    journal = before[".journal-0.jsonl"]
    lines = journal.splitlines(keepends=True)
    assert len(lines) == 2
    for i in range(len(journal) + 1):
        (out / ".journal-0.jsonl").write_bytes(journal[:i])
        # A line is whole without its line end, too.
        whole = [k for k in range(2) if i >= sum(map(len, lines[: k + 1])) - 1]
        assert sorted(runs.read_run(out).digests) == whole
        if i % 5 == 0 or abs(i - len(lines[0])) < 3 or i > len(journal) - 3:
            assert make(out, images=6) == [3 * k for k in range(2) if k not in whole]
            assert contents(out) == calm
            for name in contents(out):
                (out / name).write_bytes(before.get(name, b""))


GARBAGE = [
    b"\0" * 100, b"{}", b"[]", b"null", b"7", b"{", b"[" * 50_000, b"\xff\xfe", b"\x1b[2J", b'{"shard": 1}',
    *(b'{"shard": %s, "sha256": "%s"}' % (shard, b"0" * 64) for shard in (b"-1", b"4", b"1.0", b"true", b"[1]", b'"1"')),
    b'{"shard": 1, "sha256": "x"}', b'{"shard": 1, "sha256": 7}', b"9" * 5_000,
]  # fmt: skip


def test_garbage_in_a_journal_is_passed_over(tmp_path, said):
    make(tmp_path / "calm")
    calm = contents(tmp_path / "calm")
    out = tmp_path / "run"
    make(out, stop_after=2)
    journal = out / ".journal-0.jsonl"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*GARBAGE[:9], lines[0], *GARBAGE[9:], lines[1]]))
    (out / ".journal-77.jsonl").write_bytes(b"\n".join(GARBAGE))
    assert make(out) == [6, 9]
    assert contents(out) == calm
    assert sorted(line.partition("run/")[2] for line in said) == [
        f".journal-{rank}.jsonl: passed over what is no record of a shard, {len(GARBAGE)} times" for rank in (0, 77)
    ]


def harm(folder, kind, shard=2):
    path, other = folder / f"shard-{shard:06}.npz", folder / "shard-000001.npz"
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": data[:-100], "empty": b"", "altered": data[:150] + bytes([data[150] ^ 1]) + data[151:], "another": other.read_bytes(),
                "longer": data + b"\0", "huge": data + b"\0" * 1_000_000,
            }[kind]
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["cut", "empty", "altered", "deleted", "another", "longer", "huge"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, said, kind):
    make(tmp_path)
    calm = contents(tmp_path)
    harm(tmp_path, kind)
    found = runs.verify(tmp_path)
    assert (found.missing, found.altered) == (((2,), ()) if kind == "deleted" else ((), (2,)))
    assert not found.right
    with pytest.raises(RunError, match=r"shard-000002\.npz is"):
        list(runs.shards(tmp_path, runs.read_run(tmp_path)))
    assert make(tmp_path) == [6]
    assert contents(tmp_path) == calm
    assert len(said) == 1 and re.search("shard-000002.npz is .*; it is made again", said[0])


def test_a_shard_without_a_record_is_made_again(tmp_path, said):
    make(tmp_path / "calm")
    out = tmp_path / "run"
    make(out, stop_after=3)
    journal = out / ".journal-0.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    harm(out, "altered")  # who knows what it is
    assert make(out) == [6, 9]
    assert contents(out) == contents(tmp_path / "calm")
    assert said == []  # nothing was wrong


def test_shards_without_a_manifest_are_not_overwritten(tmp_path):
    make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"holds shards without a manifest.json; give another --out, or remove them"):
        make(tmp_path)
    assert contents(tmp_path) == before


def test_what_killed_writers_left_is_removed_and_other_files_stay(tmp_path):
    tmp_path.joinpath("notes.txt").write_text("keep me")
    tmp_path.joinpath(".shard-000001.npz.123.part").write_text("half")
    tmp_path.joinpath(".manifest.json.123.part").write_text("half")
    others = [
        ".movie.mkv.part",
        ".project.backup.part/thesis.tex",
        ".shard-000001.npz.part",
        ".all.tar.123.part",
        "a.npz.1.part",
        "notes.txt",
    ]
    for name in others:
        tmp_path.joinpath(name).parent.mkdir(exist_ok=True)
        tmp_path.joinpath(name).write_text("keep me")
    make(tmp_path)
    there = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock")
    assert there == sorted(["manifest.json", *others, *(f"shard-{k:06}.npz" for k in range(4))])


def test_another_configuration_is_refused_by_name(tmp_path):
    make(tmp_path, steps=10, options={"eta": 1})
    before = contents(tmp_path)
    for about, text in (
        ({"steps": 20, "options": {"eta": 1}}, "holds a run with steps 10, not 20; give the same again (--steps), or another --out"),
        ({"steps": 10, "options": {}}, 'options {"eta": 1}, not {}'),
        ({"steps": 10}, 'options {"eta": 1}, not null'),
        ({"steps": 10, "options": {"eta": 1}, "new": "x" * 200}, "new null, not xxx"),
        ({"steps": 10, "options": {"eta": 1}, "images": 11}, "images 10, not 11"),
        ({"steps": 1, "options": {"eta": 1}, "shard_size": 2}, "shard_size 3, not 2; steps 10, not 1"),
    ):
        with pytest.raises(RunError, match=re.escape(text)) as caught:
            make(tmp_path, **about)
        assert len(str(caught.value)) < 500
        assert contents(tmp_path) == before


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with runs.hold(tmp_path, config(), Group()) as run:
        with pytest.raises(RunError, match=f"is being written to by process {os.getpid()} on .*; wait for it, or give another --out"):
            make(tmp_path)
        run.make(draw)
        run.finish()
    assert runs.verify(tmp_path).right
    assert make(tmp_path) == []


def test_a_run_is_read_while_it_goes_on(tmp_path):
    """Whoever verifies sees each shard that has a record; when its record moves from the journal into the manifest, too."""
    with runs.hold(tmp_path, config(), Group()) as run:
        run.make(draw)
        merged, read = [], runs._read_journal

        def late(plan, path):
            run.finish()  # between its looking for journals and its reading them
            merged.append(path)
            return read(plan, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "_read_journal", lambda plan, path: read(plan, path) if merged or patch.undo() else late(plan, path))
            assert runs.read_run(tmp_path).missing == []
        assert len(merged) == 1


def test_a_full_disk_keeps_what_was_made(tmp_path, monkeypatch):
    make(tmp_path / "calm")
    real, left = os.fsync, []

    def full(number):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        real(number)

    for calls in range(30):
        out = tmp_path / f"run-{calls}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            left[:] = [None] * calls
            try:
                make(out)
            except (RunError, OSError) as e:
                assert "No space left on device" in str(e) and "\n" not in str(e)
                if (out / "manifest.json").exists() and isinstance(e, RunError):
                    assert re.search(r"; \d of 4 shards are in .*run-\d+, and the same command goes on from there", str(e)), e
            else:
                break
        there = runs.verify(out).missing if (out / "manifest.json").exists() else range(4)
        assert not list(out.glob(".*.part"))
        assert make(out) == [3 * k for k in there]
        assert contents(out) == contents(tmp_path / "calm")
    else:
        pytest.fail("the disk was never large enough")
    assert calls > 10


def test_a_record_cut_short_by_a_full_disk_is_an_error(tmp_path):
    """A write may write less than it was given, and say so only by its number."""
    process = Process(functools.partial(_journal_full, str(tmp_path / "run")), tmp_path / "log")
    assert process.wait() == 2
    assert ".journal-0.jsonl: File too large; 0 of 1 shards are in" in process.said().splitlines()[-1]
    make(tmp_path / "calm", images=3)
    make(tmp_path / "run", images=3)
    assert contents(tmp_path / "run") == contents(tmp_path / "calm")


def _journal_full(folder):
    with runs.hold(folder, config(images=3), Group()) as run:
        (run.folder / ".journal-0.jsonl").write_bytes(b" " * 3_000 + b"\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_050, 3_050))
        run.make(draw)
        run.finish()


def test_a_shard_is_on_the_disk_before_its_record_is(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace

    def syncing(number):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{number}')).name}".replace(f".{os.getpid()}", ""))
        sync(number)

    def replacing(old, new):
        events.append(f"name {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    make(tmp_path / "run", images=6)
    written = [[f"flush .{name}.part", f"name {name}", "flush run"] for name in ("manifest.json", "shard-000000.npz", "shard-000001.npz")]
    record = ["flush .journal-0.jsonl"]
    assert events == ["flush .lock", *written[0], *written[1], *record, "flush run", *written[2], *record, *written[0]]


def test_shards_of_other_arithmetic_are_not_mixed(tmp_path):
    """bfloat16 on processors with other instructions, say: the configuration is the same, and what comes out is not."""
    with runs.hold(tmp_path, config(), Group()) as run:
        assert run.manifest.arithmetic is None
        run.settle("0123456789abcdef")
        run.todo = run.todo[:2]
        run.make(draw)
    assert runs.read_run(tmp_path).arithmetic == "0123456789abcdef"
    before = contents(tmp_path)
    with (
        runs.hold(tmp_path, config(), Group()) as run,
        pytest.raises(RunError, match=r"other bits \(arithmetic 0123456789abcdef, here fedc"),
    ):
        run.settle("fedcba9876543210")
    assert {k: v for k, v in contents(tmp_path).items() if "shard" in k} == {k: v for k, v in before.items() if "shard" in k}
    with runs.hold(tmp_path, config(), Group()) as run:
        run.settle("0123456789abcdef")
        run.make(draw)
        run.finish()
    assert runs.verify(tmp_path).right


def test_a_folder_in_a_shards_place_is_named(tmp_path):
    (tmp_path / "shard-000002.npz").mkdir()
    (tmp_path / "manifest.json").write_text(runs.Manifest(config()).text())
    with pytest.raises(RunError, match=r"shard-000002.npz is a folder, where a shard is to be; move it away"):
        make(tmp_path)


def test_what_is_there_is_counted_as_it_is_checked(tmp_path):
    make(tmp_path)
    seen = []
    with runs.hold(tmp_path, config(), Group(), seen.append):
        assert seen == [runs.Manifest(config()).plan.size(k) for k in range(4)]
    seen.clear()
    runs.verify(tmp_path, seen.append)
    assert sum(seen) == runs.Manifest(config()).plan.images


def test_a_run_whose_end_finds_shards_missing_says_so(tmp_path):
    with (
        pytest.raises(RunError, match=r"shards 0 to 3 are missing in .*; the same command makes them"),
        runs.hold(tmp_path, config(), Group()) as run,
    ):
        run.finish()


def test_ranges():
    assert runs.ranges([]) == ""
    assert runs.ranges([3]) == "3"
    assert runs.ranges([0, 1, 2, 7, 9, 10]) == "0 to 2, 7, 9 to 10"
    assert runs.ranges(range(0, 100, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ..."


# The command.


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    small_checkpoint().save(path)
    return path


@pytest.fixture(scope="module")
def calm(net, tmp_path_factory):
    """A run of the real command that nobody disturbs: (flags, the files that it ends with)."""
    folder = tmp_path_factory.mktemp("calm")
    done = Process([*FLAGS, "--checkpoint", str(net), "--out", str(folder / "run")], folder / "log", real=True)
    assert done.wait() == 0, done.said()
    assert sorted(p.name for p in (folder / "run").iterdir()) == sorted(
        [".lock", "grid.png", "manifest.json", *(f"shard-{k:06}.npz" for k in range(20))]
    )
    assert json.loads(done.said().splitlines()[-1])["made"] == 20
    return [*FLAGS, "--checkpoint", str(net)], contents(folder / "run")


@pytest.fixture(scope="module")
def slow(net, tmp_path_factory):
    """The same, of a run that takes a while."""
    folder = tmp_path_factory.mktemp("slow")
    done = Process([*LONG, "--checkpoint", str(net), "--out", str(folder / "run")], folder / "log")
    assert done.wait() == 0, done.said()
    return [*LONG, "--checkpoint", str(net)], contents(folder / "run")


def shards_there(folder, count):
    return lambda: len(list(folder.glob("shard-*.npz"))) >= count


def run(flags):
    """The command in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr("warnings.formatwarning", None)
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: sample.main(flags), sample.PROG)
    return caught.value.code


def test_verify_and_collect_say_what_there_is(net, tmp_path, capsys):
    flags = [
        "--device",
        "cpu",
        "--checkpoint",
        str(net),
        "--batch",
        "10",
        "--steps",
        "1",
        "--shard-size",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run([*flags, "--verify", "--collect", str(tmp_path / "all.npz")]) == 0
    out = capsys.readouterr().out
    sha = runs.verify(tmp_path / "run").sha256
    assert f"10 images in 3 shards in {tmp_path / 'run'}; a look at them in" in out
    assert f"all 3 shards are there and right; sha256 of the pixels {sha}" in out
    assert f"10 images in {tmp_path / 'all.npz'}; sha256 of the pixels {sha}" in out
    with np.load(tmp_path / "all.npz") as arrays:
        made = data.to_uint8(load(net).sampler(solver="unipc", steps=1)(10, labels=[i % 3 for i in range(10)], guidance=2.0))
        assert np.array_equal(arrays["images"], made)
        assert arrays["labels"].tolist() == [i % 3 for i in range(10)]
        assert hashlib.sha256(arrays["images"].tobytes()).hexdigest() == sha
    harm(tmp_path / "run", "deleted")
    harm(tmp_path / "run", "cut", 0)
    assert run(["--out", str(tmp_path / "run"), "--verify"]) == 1
    assert "of 3 shards 1 missing (2); 1 altered (0); the run's command, started again, makes them" in capsys.readouterr().out
    assert run(["--out", str(tmp_path / "run"), "--verify", "--json"]) == 1
    report = {"event": "verified", "run": str(tmp_path / "run"), "shards": 3, "missing": [2], "altered": [0], "sha256": None}
    assert json.loads(capsys.readouterr().out) == report
    assert run(["--out", str(tmp_path / "run"), "--collect", str(tmp_path / "all.npy")]) == 2
    assert not (tmp_path / "all.npy").exists()
    assert run([*flags, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert (report["event"], report["shards"], report["made"], report["images"]) == ("done", 3, 2, 10)
    assert "shard-000002.npz is missing; it is made again" in printed.err and "shard-000000.npz is not what was written" in printed.err
    assert run(["--out", str(tmp_path / "run"), "--verify", "--collect", str(tmp_path / "all.tar"), "--json"]) == 0
    verified, collected = map(json.loads, capsys.readouterr().out.splitlines())
    assert verified["sha256"] == collected["sha256"] == sha
    assert (collected["event"], collected["images"], collected["file"]) == ("collected", 10, str(tmp_path / "all.tar"))
    assert run(["--out", str(tmp_path / "nowhere"), "--verify"]) == 2
    assert f"there is no run in {tmp_path / 'nowhere'}" in capsys.readouterr().err


@pytest.mark.parametrize("real", [False, True])
def test_runs_killed_at_random_moments_end_as_if_nobody_had(net, tmp_path, pytestconfig, real):
    count = (20 if real else 100) if pytestconfig.getoption("--long") else 1 if real else 5
    kills = 0
    for fault, fell in rounds(net, tmp_path, count, seed=7, real=real, most=2 if real else 4):
        assert not fault
        kills += len(fell)
    assert kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(slow, tmp_path, number):
    flags, wanted = slow
    out = tmp_path / "run"
    process = Process([*flags, "--out", str(out)], tmp_path / "log")
    assert wait_for(shards_there(out, 2), process)
    process.signal(number)
    if number == signal.SIGTERM:
        process.signal(number)  # an impatient one
    assert process.wait() == 130
    there = len(list(out.glob("shard-*.npz")))
    assert 2 <= there < 20
    said = re.search(
        r"^python -m fastdiff.sample: interrupted; (\d+) of 20 shards are in (.*); the same command goes on from there$",
        process.said(),
        re.M,
    )
    assert int(said[1]) == there and said[2] == str(out)
    assert "Traceback" not in process.said()
    assert not list(out.glob(".*.part"))
    again = Process([*flags, "--out", str(out), "--json"], tmp_path / "again")
    assert again.wait() == 0
    assert json.loads(again.said().splitlines()[-1])["made"] == 20 - there
    assert contents(out) == wanted


def test_a_signal_to_all_ranks_ends_them_in_order(slow, tmp_path):
    flags, wanted = slow
    out = tmp_path / "run"
    processes = ranks([*flags, "--out", str(out)], 2, tmp_path)
    assert wait_for(shards_there(out, 2), processes[0])
    for process in processes:
        process.signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [130, 130], [process.said() for process in processes]
    said = "".join(process.said() for process in processes)
    assert len(re.findall("interrupted; .* the same command goes on from there", said)) == 1
    assert "Traceback" not in said and "terminate called" not in said
    assert Process([*flags, "--out", str(out)], tmp_path / "again").wait() == 0
    assert contents(out) == wanted


def slow_to_warm_up(flags):
    sample.Sampler.warmup = lambda self, *_, **__: time.sleep(60)
    return sample.main(flags)


def test_a_signal_while_the_network_is_compiled(calm, tmp_path):
    flags, _ = calm
    out = tmp_path / "run"
    process = Process(functools.partial(slow_to_warm_up, [*flags, "--out", str(out)]), tmp_path / "log")
    assert wait_for((out / "manifest.json").exists, process)
    time.sleep(0.2)
    process.signal(signal.SIGTERM)
    assert process.wait() == 130
    assert f"interrupted; 0 of 20 shards are in {out}; the same command goes on from there" in process.said()


def test_two_collections_into_one_file_are_both_whole(finished, tmp_path):
    _, folder = finished
    both = [Process(["--out", str(folder), "--collect", str(tmp_path / "all.tar")], tmp_path / f"log-{i}") for i in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.said() for process in both]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".", "all"))] == ["all.tar"]


def small_files(flags, limit):
    assert native.available()  # a compiler writes a file, too, and what has been compiled is kept
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return sample.main(flags)


def test_no_file_may_grow_as_on_a_full_disk(calm, tmp_path):
    flags, wanted = calm
    out = tmp_path / "run"
    sizes = {name: len(data) for name, data in wanted.items()}
    assert 1_200 < sizes["shard-000000.npz"] < sizes["grid.png"]
    for limit, name, made in (
        (1_200, "shard-000000.npz", 0),
        (sizes["manifest.json"] - 100, "manifest.json", 20),
        (sizes["grid.png"] - 1, "grid.png", 20),
    ):
        process = Process(functools.partial(small_files, [*flags, "--out", str(out)], limit), tmp_path / "log")
        assert process.wait() == 2
        last = process.said().splitlines()[-1]
        assert last.startswith(f"python -m fastdiff.sample: {out / name}: File too large"), process.said()
        assert "Traceback" not in process.said()
        assert not list(out.glob(".*.part"))
        assert len(list(out.glob("shard-*.npz"))) == made
        if not made:
            assert last.endswith(f"; 0 of 20 shards are in {out}, and the same command goes on from there")
    assert Process([*flags, "--out", str(out)], tmp_path / "log").wait() == 0
    assert contents(out) == wanted


def test_a_folder_that_cannot_be_written_is_one_line(calm, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/self/run"), Path("/proc/self")):
        assert run([*calm[0], "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"cannot write to the folder {out}" in err
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.fixture(scope="module")
def finished(calm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    for name, content in calm[1].items():
        (folder / name).write_bytes(content)
    return [*calm[0], "--out", str(folder)], folder


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--seed", "1"], "seed 0, not 1"),
        (["--steps", "2"], "steps 1, not 2"),
        (["--solver", "ddpm"], "solver ddim, not ddpm"),
        (["--option", "eta=0.5"], 'options {}, not {"eta": 0.5}'),
        (["--spacing", "leading"], 'options {}, not {"spacing": "leading"}'),
        (["--guidance", "3"], "guidance 2.0, not 3.0"),
        (["--label", "dog"], "labels [0, 1, 2], not [1]"),
        (["--label", "dog", "--label", "cat", "--label", "10"], "labels [0, 1, 2], not [1, 0, 2]"),
        (["--batch", "61"], "images 60, not 61"),
        (["--first", "1"], "first 0, not 1"),
        (["--shard-size", "4"], "shard_size 3, not 4"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
        (["--micro-batch", "5"], "micro_batch 4, not 5"),
        (["--compile", "fused"], "way eager, not fused"),
        (["--seed", "1", "--steps", "3"], "seed 0, not 1; steps 1, not 3"),
    ],
)
def test_another_command_is_refused_by_what_differs(finished, capsys, more, text):
    flags, folder = finished
    before = contents(folder)
    assert run([*flags, *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{folder} holds a run with {text}; give the same again (--" in err
    assert contents(folder) == before


def test_a_checkpoint_that_has_been_replaced_is_refused(net, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    shutil.copy(net, path)
    flags = [*FLAGS, "--checkpoint", str(path), "--batch", "6", "--out", str(tmp_path / "run")]
    assert run(flags) == 0
    before, digest = contents(tmp_path / "run"), hashlib.sha256(path.read_bytes()).hexdigest()
    assert runs.read_manifest(tmp_path / "run" / "manifest.json").config["checkpoint_sha256"] == digest
    small_checkpoint(1).save(path)
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    capsys.readouterr()
    assert run(flags) == 2
    assert f"holds a run with checkpoint_sha256 {digest}, not {other}; give the same again" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
    shutil.copy(net, path.with_name("moved.safetensors"))  # it is the content that counts, not the name
    assert run([*flags, "--checkpoint", str(tmp_path / "moved.safetensors")]) == 0


@pytest.mark.parametrize(("name", "text"), [("x.jpg", "is neither .npz, .npy nor .tar"), ("no/x.npz", "there is no folder")])
def test_a_name_to_collect_into_that_will_not_do_is_said_before_anything_is_made(calm, tmp_path, capsys, name, text):
    out = tmp_path / "run"
    assert run([*calm[0], "--out", str(out), "--collect", str(tmp_path / name)]) == 2
    assert text in capsys.readouterr().err and not list(out.glob("shard-*"))


def test_a_lock_that_is_a_link_or_no_file_is_refused(calm, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "precious"
    out.mkdir()
    other.write_text("precious")
    (out / ".lock").symlink_to(other)
    assert run([*calm[0], "--out", str(out)]) == 2
    assert f"{out / '.lock'}: a symbolic link, where the run's lock is to be; remove it" in capsys.readouterr().err
    assert other.read_text() == "precious"
    (out / ".lock").unlink()
    os.mkfifo(out / ".lock")
    assert run([*calm[0], "--out", str(out)]) == 2
    assert f"{out / '.lock'}: not a regular file" in capsys.readouterr().err


def test_a_journal_that_is_no_file_is_not_waited_for(finished, capsys):
    flags, folder = finished
    journal = folder / ".journal-5.jsonl"
    os.mkfifo(journal)
    try:
        for call in ([*flags], ["--out", str(folder), "--verify"], ["--out", str(folder), "--collect", str(folder.parent / "x.npz")]):
            assert run(call) == 2
            assert f"{journal}: not a regular file" in capsys.readouterr().err
    finally:
        journal.unlink()


def test_records_of_a_journal(tmp_path):
    plan, path, digest = Plan.of(config()), tmp_path / ".journal-0.jsonl", "ab" * 32
    record = json.dumps({"shard": 2, "sha256": digest})
    for text, found in (
        (record, {2: digest}),
        (f"{record}\n" * 3 + json.dumps({"shard": 0, "sha256": digest}), {2: digest, 0: digest}),
        (f"x\n{record}\n", {2: digest}),
        (f"{record[:-1]}\n{record}\n", {2: digest}),
        (record[:-1], {}),
        (f"{record} ", {}),
        (json.dumps({"shard": plan.count, "sha256": digest}), {}),
        (json.dumps({"shard": -1, "sha256": digest}), {}),
        (json.dumps({"shard": 2, "sha256": digest.upper()}), {}),
        (f"[{record}]", {}),
        ("", {}),
    ):
        path.write_text(text)
        assert runs._read_journal(plan, path) == found, text


def test_a_plain_command_does_not_write_into_a_run(finished, capsys):
    flags, folder = finished
    before = contents(folder)
    plain = [word for i, word in enumerate(flags) if word != "--shard-size" and flags[i - 1] != "--shard-size"]
    assert run(plain) == 2
    assert f"{folder} holds a run in shards; give its --shard-size to go on with it, or another --out" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_complete_run_is_left_as_it_is(finished, capsys):
    flags, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    assert run(flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("shard-*")} == before


def test_out_of_memory_in_the_middle_halves_the_micro_batch_and_nothing_else(calm, tmp_path, monkeypatch):
    flags, wanted = calm
    real, calls = Loop.advance, []

    def advance(self, guided, rows):
        calls.append(len(self.x))
        if len(self.x) > 2 and len(calls) > 5:
            raise torch.OutOfMemoryError("no room")
        real(self, guided, rows)

    monkeypatch.setattr(Loop, "advance", advance)
    with pytest.warns(UserWarning, match="out of memory with 4 images at a time; going on with 2"):
        assert sample.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert calls[:6] == [4] * 6 and set(calls[6:]) == {2}
    assert contents(tmp_path / "run") == wanted


def test_out_of_memory_before_the_first_shard_halves_the_micro_batch_and_nothing_else(calm, tmp_path, monkeypatch):
    """While the first buffers and graphs are made, where a size that is too large is mostly found out."""
    flags, wanted = calm
    real, sizes = Loop.__init__, []

    def init(self, engine):
        sizes.append(engine.kind.size)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no room")
        real(self, engine)

    monkeypatch.setattr(Loop, "__init__", init)
    with pytest.warns(UserWarning, match="out of memory with") as said:
        assert sample.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert [str(warning.message)[19:] for warning in said] == ["4 images at a time; going on with 2", "2 images at a time; going on with 1"]
    assert sizes[:3] == [4, 2, 1] and set(sizes[2:]) == {1}
    assert contents(tmp_path / "run") == wanted


def test_a_number_that_is_not_finite_names_its_image_and_keeps_the_shards_before(calm, tmp_path, monkeypatch, capsys):
    flags, wanted = calm
    real = Loop.advance

    def advance(self, guided, rows):
        real(self, guided, rows)
        self.x[self.ids == 31] = torch.nan

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "advance", advance)
        assert run([*flags, "--out", str(out)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert "the network gave numbers that are not finite for sample 31, first in row 0" in err[0]
    assert err[0].endswith(f"; 10 of 20 shards are in {out}")
    assert runs.verify(out).missing == tuple(range(10, 20))
    assert run([*flags, "--out", str(out)]) == 0
    assert contents(out) == wanted


def test_a_second_command_in_one_folder_is_refused_and_the_first_undisturbed(slow, tmp_path, capsys):
    flags, wanted = slow
    out = tmp_path / "run"
    process = Process([*flags, "--out", str(out)], tmp_path / "log")
    assert wait_for(shards_there(out, 1), process)
    assert run([*flags, "--out", str(out)]) == 2
    assert process.poll() is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(
        rf"{out} is being written to by process {process.pid} on \S+; wait for it, or give another --out", err
    )
    assert process.wait() == 0
    assert contents(out) == wanted


@pytest.mark.parametrize(("size", "rows"), [("1", "4"), ("64", "1"), ("64", "64"), ("1000", "1000"), ("50", "auto")])
def test_shards_and_micro_batches_of_any_size_have_the_same_pixels(net, tmp_path, size, rows):
    few = size == "1"
    flags = ["--device", "cpu", "--checkpoint", str(net), "--batch", "24" if few else "150", "--steps", "2", "--json"]
    flags += ["--micro-batch", rows] if rows != "auto" else []
    assert sample.main([*flags, "--shard-size", size, "--out", str(tmp_path / "run")]) == 0
    assert sample.main([*flags, "--out", str(tmp_path / "once"), "--micro-batch", "16"]) == 0
    with np.load(tmp_path / "once" / "samples.npz") as arrays:
        assert runs.verify(tmp_path / "run").sha256 == hashlib.sha256(arrays["images"].tobytes()).hexdigest()


def test_the_picture_of_many_classes_is_of_images_in_turn():
    """A row for each of a thousand would take gigabytes."""
    images, labels = np.arange(500, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(500) % 100
    assert np.array_equal(sample.picture(images, labels, sample.GRID_CLASSES + 1), images[:200])
    few = sample.picture(images, labels % sample.GRID_CLASSES, sample.GRID_CLASSES)
    assert len(few) == 20 * sample.GRID_CLASSES and np.array_equal(few[:20], images[: 20 * 20 : 20])


# Several processes.


def test_one_of_several_processes_looks_at_a_run(finished, tmp_path):
    _, folder = finished
    process = torchrun("--out", str(folder), "--verify", "--collect", str(tmp_path / "pngs"), cwd=tmp_path, world=2)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert stdout.count("all 20 shards are there and right") == stdout.count("images in") == 1
    assert len(list((tmp_path / "pngs").rglob("*.png"))) == 60


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_run_and_leave_the_same_files(calm, tmp_path, world):
    flags, wanted = calm
    out = tmp_path / "run"
    processes = ranks([*flags, "--out", str(out), "--log-level", "info"], world, tmp_path)
    assert [p.wait() for p in processes] == [0] * world, [p.said() for p in processes]
    assert contents(out) == wanted
    report = json.loads([line for line in processes[0].said().splitlines() if line.startswith("{")][-1])
    assert (report["processes"], report["made"]) == (world, 20)
    wrote = [p.said().count("wrote ") for p in processes]
    assert sum(wrote) == 20
    assert not any('"done"' in p.said() for p in processes[1:])


def test_a_run_goes_on_with_another_number_of_ranks(slow, tmp_path):
    flags, wanted = slow
    out = tmp_path / "run"
    (tmp_path / "two").mkdir()
    processes = ranks([*flags, "--out", str(out)], 2, tmp_path / "two")
    assert wait_for(lambda: len(list(out.glob(".journal-*.jsonl"))) == 2, processes[0])
    for process in processes:
        process.signal(signal.SIGKILL)
    assert [p.wait() for p in processes] == [-9, -9]
    made = len(list(out.glob("shard-*.npz")))
    assert 2 <= made < 20
    one = Process([*flags, "--out", str(out)], tmp_path / "one")
    assert wait_for(shards_there(out, made + 1), one)
    one.signal(signal.SIGKILL)
    assert one.wait() == -9
    (tmp_path / "three").mkdir()
    assert [p.wait() for p in ranks([*flags, "--out", str(out)], 3, tmp_path / "three")] == [0, 0, 0]
    assert contents(out) == wanted


def keep(folder):
    """A group that holds a run until somebody says enough."""
    with join() as group, runs.hold(folder, config(), group):
        (folder / f"held-{group.rank}").touch()
        while not (folder / "enough").exists():
            time.sleep(0.01)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_a_group_holds_is_refused_to_a_third(tmp_path, victim):
    out = tmp_path / "run"
    processes = ranks(functools.partial(keep, out), 2, tmp_path)
    for rank in range(2):
        assert wait_for((out / f"held-{rank}").exists, processes[rank])
    with pytest.raises(RunError, match=f"is being written to by process {processes[0].pid} on "):
        make(out)
    processes[victim].signal(signal.SIGKILL)  # the other holds it still
    processes[victim].wait()
    with pytest.raises(RunError, match="is being written to by process"):
        make(out)
    (out / "enough").touch()
    processes[1 - victim].wait()
    assert make(out) == [0, 3, 6, 9]


def with_net(flags, nets):
    return sample.main([*flags, "--checkpoint", nets[int(os.environ["RANK"])]])


def test_another_checkpoint_on_one_rank_is_refused(net, tmp_path):
    small_checkpoint(1).save(tmp_path / "other.safetensors")
    work = functools.partial(with_net, [*FLAGS, "--out", str(tmp_path / "run")], [str(net), str(tmp_path / "other.safetensors")])
    processes = ranks(work, 2, tmp_path)
    assert [p.wait() for p in processes] == [2, 2]
    assert "holds a run with checkpoint_sha256 " in processes[1].said()
    assert "python -m fastdiff.sample: " not in processes[0].said()  # one of them speaks
    assert not list((tmp_path / "run").glob("shard-*"))


def torchrun(*flags, cwd, world, restarts=0):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--max-restarts",
        str(restarts),
        "--monitor-interval",
        "0.1",
    ]
    return subprocess.Popen(
        ["timeout", "-k", "1", "100", *command, "--master-addr", "127.0.0.1", "--master-port", free_port(), "-m", "fastdiff.sample", *flags],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_rank_that_is_killed_under_torchrun_costs_its_shard_and_no_more(slow, tmp_path):
    flags, wanted = slow
    out = tmp_path / "run"
    process = torchrun(*flags, "--out", str(out), "--verify", "--json", cwd=tmp_path, world=2, restarts=2)
    end = time.monotonic() + 90
    while not shards_there(out, 1)() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)
    who = re.match(r"process (\d+) on ", (out / ".lock").read_text())
    os.kill(int(who[1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert contents(out) == wanted
    *_, done, verified = map(json.loads, stdout.splitlines())
    assert 1 <= done["made"] < 20 and done["processes"] == 2
    assert (verified["missing"], verified["altered"]) == ([], [])
    assert f"process {who[1]} " not in (out / ".lock").read_text()

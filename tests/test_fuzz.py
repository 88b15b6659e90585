"""The fuzzer's corpus, all of it, and a short, fixed run of the fuzzer itself: see fuzz.py."""

import gc
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import fuzz
import pytest

from fastdiff.checkpoint import CheckpointError

SIZES = {target: sum(1 for _ in (fuzz.CORPUS / target).iterdir()) for target in fuzz.TARGETS}
RUNS = 400  # executions of each target in a short run


def test_the_corpus_is_small_and_nothing_else():
    assert {p.name for p in fuzz.CORPUS.iterdir()} == fuzz.TARGETS.keys()
    files = [p for p in fuzz.CORPUS.rglob("*") if p.is_file()]
    assert len(files) <= 400 and sum(p.stat().st_size for p in files) <= 1 << 20 and min(SIZES.values()) >= 3


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_corpus(target):
    """Each file gives a result or the reader's own error; of every target there are some of either."""
    results = [fuzz.run(target, path.read_bytes()) for path in sorted((fuzz.CORPUS / target).iterdir())]
    assert None in results and any(results)


def test_what_was_read_is_let_go_of():
    """An error's frames hold what was read; in a cycle they wait for Python's collector, which counts objects, not bytes."""
    files = [path.read_bytes() for path in sorted((fuzz.CORPUS / "image").iterdir())]
    found = [fuzz.run("image", content) for content in files]  # all of them, for what is made but once
    assert any(found)
    while gc.collect():  # what was here before
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for content in files:
            fuzz.run("image", content)
        gc.collect()
        assert [v for v in gc.garbage if isinstance(v, types.FrameType)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda content: 1 / 0, "division by zero"),
        (lambda content: None, "80 MiB, more than 64"),
        (lambda content: sum(range(3 * 10**7)), "s, more than 0.1"),
        (lambda content: (_ for _ in ()).throw(CheckpointError("")), "an error that is no short line"),
    ],
)
def test_what_it_calls_a_finding(monkeypatch, wrong, text):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    monkeypatch.setitem(fuzz.TARGETS, "checkpoint", (wrong, CheckpointError, 64, False))
    peaks = iter((0, 80 << 10 if "MiB" in text else 0))
    monkeypatch.setattr(fuzz, "peak", lambda: next(peaks))
    with pytest.raises((fuzz.FindingError, ZeroDivisionError), match=text):
        fuzz.run("checkpoint", b"")


def test_coverage_costs_no_memory():
    """atheris keeps what some traced comparisons give; see fuzz.UNWATCHED."""
    pytest.importorskip("atheris")
    code = (
        "import io, fuzz; from PIL import Image; out = io.BytesIO(); Image.effect_noise((1024, 1024), 50).save(out, 'PNG')\n"
        "def now(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "fuzz.watch(); first = [fuzz.run('image', out.getvalue()) for _ in range(4)]; before = now()\n"
        "for _ in range(40): fuzz.run('image', out.getvalue())\n"
        "print(first[0], now() - before < 60, now() - before)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(fuzz.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("None True"), done.stdout + done.stderr


def test_a_short_run(tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, str(Path(fuzz.__file__)), "all", str(tmp_path), f"-runs={RUNS}", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"(\w+): (\d+) executions in \d+ s, coverage (\d+), peak \d+ MiB, nothing found", done.stdout)
    assert [target for target, _, _ in found] == list(fuzz.TARGETS)
    assert all(int(count) >= RUNS and int(coverage) > 50 for _, count, coverage in found), found

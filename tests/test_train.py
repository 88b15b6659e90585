"""Training: that it learns, that a step is a function of its number, and that an interrupted run ends as an unbroken one."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_dataset
from killing import Process, wait_for
from PIL import Image
from safetensors.torch import load_file

import fastdiff
from fastdiff import CheckpointError
from fastdiff import train as train_module
from fastdiff.checkpoint import read_tensors, write_tensors
from fastdiff.data import Dataset
from fastdiff.distributed import Group
from fastdiff.runs import RunError, own_folder
from fastdiff.train import CHECKPOINT, STATE, Pool, Run, Settings, add_point, layout, learning_rate, main, read_state, train

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(steps=24, batch=8, channels=(16, 16), blocks=1, middle=0, timesteps=50, warmup=4)


def run(out, steps=SETTINGS.steps, **options):
    return train(dataclasses.replace(SETTINGS, steps=steps), small_dataset(), out, log_every=5, save_every=6, sample_every=100, **options)


def command(out, *extra):
    flags = "--device cpu --steps 40 --batch 8 --channels 16 16 --blocks 1 --middle 0 --timesteps 50 --save-every 7 --sample-every 1000"
    return [sys.executable, "-m", "fastdiff.train", "--out", str(out), *flags.split(), *extra]


def assert_same_files(a, b):
    """Weights, averages, moments and loss curve, to the bit."""
    for name in (STATE, CHECKPOINT):
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        assert [k for k in one if not torch.equal(one[k], two[k])] == []
    one, two = fastdiff.load(a / CHECKPOINT).record, fastdiff.load(b / CHECKPOINT).record
    assert (one["loss"], one["held_out_loss"], one["step"]) == (two["loss"], two["held_out_loss"], two["step"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return out


def test_writes_what_it_says(unbroken):
    assert {p.name for p in unbroken.iterdir()} == {STATE, CHECKPOINT, "samples-000024.png", "loss.png", ".lock"}
    record = fastdiff.load(unbroken / CHECKPOINT).record
    assert record["step"] == 24
    assert [step for step, _ in record["loss"]] == [5, 10, 15, 20]
    assert [step for step, _ in record["held_out_loss"]] == [6, 12, 18, 24]


def test_same_settings_same_weights(unbroken, tmp_path):
    run(tmp_path)
    assert_same_files(unbroken, tmp_path)


def test_a_long_training_can_be_resumed(tmp_path, monkeypatch):
    """Its loss curves would grow past what is read of a file: after 4 million steps nothing could go on."""
    dataset, settings = small_dataset(), dataclasses.replace(SETTINGS, steps=1 << 38)
    long = Run.new(settings, dataset, torch.device("cpu"))
    for i in range(1, 100_001):
        add_point(long.history, 50 * i, 0.25)
        add_point(long.held_out, 50 * i, 0.25)
    long.step = 50 * i
    long.save(tmp_path / STATE, dataset.digest())
    long.checkpoint({}).save(tmp_path / CHECKPOINT)
    kept = read_state(tmp_path / STATE)[1]["history"]
    assert train_module.MAX_POINTS // 2 <= len(kept) < train_module.MAX_POINTS and kept[-1] == [long.step, 0.25]
    assert len(fastdiff.load(tmp_path / CHECKPOINT).record["held_out_loss"]) == len(kept)

    monkeypatch.setattr(train_module, "MAX_POINTS", 4)
    run(tmp_path / "thinned")
    record = fastdiff.load(tmp_path / "thinned" / CHECKPOINT).record
    assert [step for step, _ in record["loss"]] == [10, 20] and [step for step, _ in record["held_out_loss"]] == [12, 24]


def test_a_network_whose_state_could_not_be_read_again_is_refused_at_once():
    with pytest.raises(
        ValueError, match=r"^a network of \d+ parameters, of whose state --resume reads 267386880 at most; give fewer --channels"
    ):
        layout(dataclasses.replace(SETTINGS, channels=(4096,)), small_dataset())


def test_learns_what_the_classes_look_like(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=300, batch=32, lr=3e-3, warmup=20, ema=0.98, schedule="cosine", prediction="v")
    path = train(settings, small_dataset(), tmp_path, save_every=300, sample_every=300)
    trained = fastdiff.load(path)
    assert trained.record["held_out_loss"][-1][1] < 0.5, "predicting no noise at all scores 1"
    brightness = [float(trained.sampler(steps=20)(16, labels=k, guidance=1.5).mean()) for k in range(3)]
    truth = [float(np.mean(small_dataset().images[np.arange(64) % 3 == k] / 127.5 - 1)) for k in range(3)]
    assert brightness == pytest.approx(truth, abs=0.15)


def test_killed_at_a_random_moment_and_resumed(tmp_path):
    """SIGKILL, twice, wherever it falls: the end is that of the run that nobody touched."""
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "killed"
    rng = np.random.default_rng()
    for attempt in range(2):
        process = subprocess.Popen(command(out, *["--resume"] * ((out / STATE).exists())), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / STATE).exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6) + attempt)
        process.kill()
        process.wait()
    done = subprocess.run(command(out, "--resume"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "whole", out)
    assert list(out.glob(".*.part")) == []


def test_ctrl_c_saves_and_says_where(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, "--save-every", "1000", "--steps", "100000"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in iter(lambda: process.stderr.read(200), ""):
        if "/100000" in line and " 0/100000" not in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    typed = " ".join(command(out, "--save-every", "1000", "--steps", "100000")[1:])
    assert f"saved in {out}. Go on with: python {typed} --resume" in stdout
    step = fastdiff.load(out / CHECKPOINT).record["step"]
    assert 0 < step < 100_000
    # Only --out and --resume: everything else is in the state.
    resume = [sys.executable, "-m", "fastdiff.train", "--device", "cpu", "--out", str(out), "--resume", "--steps", str(step + 3)]
    done = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert fastdiff.load(out / CHECKPOINT).record["step"] == step + 3


def test_more_steps_before_the_decay_began_is_the_longer_run(unbroken, tmp_path):
    # A run of 12 steps decays from step 8.4 on, so it is stopped at 6: by the same means as Ctrl-C, a signal to the process.
    class Stop:
        def __init__(self):
            self.count = 0

        def __call__(self, *_):
            self.count += 1
            if self.count == 6:
                os.kill(os.getpid(), signal.SIGINT)

    stop = Stop()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, *_: stop() if type(m).__name__ == "UNet" and m.training else None
    )
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped at step 6 of 12"):
            run(tmp_path, steps=12)
    finally:
        handle.remove()
    run(tmp_path, resume=True)
    assert_same_files(unbroken, tmp_path)


def test_learning_rate():
    s = Settings(steps=100, lr=1.0, warmup=10, decay=0.5)
    assert [learning_rate(s, i) for i in (0, 4, 9, 10, 49, 50, 75, 99)] == [0.1, 0.5, 1, 1, 1, 1, 0.5, 0.02]


def test_draws_are_balanced_dropped_and_in_range():
    data = dataclasses.replace(small_dataset(60, 0), labels=np.repeat([0, 1, 2], [40, 16, 4]))
    examples = torch.arange(30_000)
    for balance, odds in ((1.0, (40, 16, 4)), (0.5, (40**0.5, 4, 2)), (0.0, (1, 1, 1))):
        pool = Pool.of(data, balance, torch.device("cpu"))
        _, t, labels = pool.draw(dataclasses.replace(SETTINGS, drop_label=0.2), examples, torch.zeros_like(examples), 3)
        share = np.bincount(labels, minlength=4) / len(examples)
        want = np.append(0.8 * np.array(odds) / sum(odds), 0.2)
        assert share == pytest.approx(want, abs=0.012)
        assert np.bincount(t, minlength=50) / len(examples) == pytest.approx(np.full(50, 0.02), abs=0.005)


def test_flips_mirror_half_of_the_examples():
    data = small_dataset(1, 0)
    pool = Pool.of(dataclasses.replace(data, labels=np.zeros(1, np.int64)), 1.0, torch.device("cpu"))
    examples = torch.arange(1000)
    x0, _, _ = pool.draw(dataclasses.replace(SETTINGS, flip=True), examples, torch.zeros_like(examples), 3)
    image = torch.from_numpy(data.images[0] / np.float32(127.5) - np.float32(1)).permute(2, 0, 1)
    as_is = torch.isclose(x0, image, atol=1e-6).flatten(1).all(1)
    mirrored = torch.isclose(x0, image.flip(2), atol=1e-6).flatten(1).all(1)
    assert (as_is ^ mirrored).all()
    assert 430 < int(mirrored.sum()) < 570


def test_refuses_to_overwrite_or_to_mix_runs(unbroken):
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    with pytest.raises(ValueError, match="holds a training run already; add --resume"):
        run(unbroken)
    with pytest.raises(ValueError, match="trained on other data"):
        train(SETTINGS, small_dataset(32), unbroken, resume=True)
    with pytest.raises(ValueError, match="trained with another lr"):
        train(dataclasses.replace(SETTINGS, lr=1e-5), small_dataset(), unbroken, resume=True)
    with pytest.raises(ValueError, match="is at step 24 already"):
        run(unbroken, steps=10, resume=True)
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before


def test_a_loss_that_explodes_keeps_the_last_good_state(tmp_path):
    settings = dataclasses.replace(SETTINGS, lr=1.0, steps=2000)
    run(tmp_path, steps=6)
    good = load_file(tmp_path / STATE)
    data = small_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.train.F.mse_loss", lambda a, b, **k: (a - b).square().mean() * torch.nan)
        with pytest.raises(ValueError, match=r"the loss is no longer finite at step 10; the last good state is in"):
            train(dataclasses.replace(settings, lr=SETTINGS.lr), data, tmp_path, resume=True, log_every=5, save_every=100)
    assert all(torch.equal(good[k], v) for k, v in load_file(tmp_path / STATE).items())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--steps", "0"], "--steps: '0' is not a whole number at least 1"),
        (["--lr", "fast"], "--lr: 'fast' is not a number from 0 to 1"),
        (["--data", "nowhere"], "nowhere"),
        (["--resume", "--out", "nowhere"], "nothing to resume"),
        (["--channels", "20"], "multiple of group 8"),
        (["--device", "tpu"], "tpu"),
        (["--schedule", "square"], "invalid choice: 'square'"),
        (["--out", "/proc/fastdiff"], "cannot write to the folder /proc/fastdiff"),
    ],
)
def test_bad_input_is_one_line(flags, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.train", "--device", "cpu", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_corrupt_image(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 20, 200)).save(tmp_path / "data" / kind / f"{i}.png")
    (tmp_path / "data" / "cat" / "2.png").write_bytes(b"\x89PNG and no more")
    flags = ("--data", str(tmp_path / "data"), "--steps", "2", "--out", str(tmp_path / "run"))
    done = subprocess.run(command(tmp_path, *flags), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "2.png" in done.stderr
    assert "--skip-bad" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    done = subprocess.run(command(tmp_path, *flags, "--skip-bad"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("python -m fastdiff.train: ")
    assert "2.png" in done.stderr.splitlines()[0]
    assert "trained on 7 images" in done.stdout
    assert fastdiff.load(tmp_path / "run" / CHECKPOINT).classes == ("cat", "dog")


def test_what_a_kill_between_two_writes_left_undone_is_made_on_resume(unbroken, tmp_path):
    stopped = KeyboardInterrupt("as if killed")

    def dies(self, path, *about):
        if self.step == SETTINGS.steps:
            raise stopped
        original(self, path, *about)

    original = Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", dies)
        with pytest.raises(KeyboardInterrupt, match="as if killed"):
            run(tmp_path)
    for lost in (CHECKPOINT, "samples-000024.png", "loss.png"):
        (tmp_path / lost).unlink()
    run(tmp_path, resume=True)
    assert_same_files(unbroken, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in unbroken.iterdir()}


def test_few_timesteps_and_many_classes(tmp_path):
    data = Dataset(small_dataset(66).images, np.arange(66), tuple(f"class {i}" for i in range(66)))
    train(dataclasses.replace(SETTINGS, steps=1, timesteps=3), data, tmp_path)
    with Image.open(tmp_path / "samples-000001.png") as picture:
        assert picture.size == (8 * 24 + 7, 20 * 24 + 19)


def test_stopped_before_the_first_step(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.train.postponed_signals", lambda: contextlib.nullcontext([signal.SIGINT]))
        with pytest.raises(KeyboardInterrupt, match="stopped at step 0 of 24"):
            run(tmp_path)
    run(tmp_path, resume=True)
    one, two = load_file(unbroken / STATE), load_file(tmp_path / STATE)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def waits(out):
    """A training whose tenth step takes until somebody says enough."""
    steps = []

    def called(module, *_):
        if type(module).__name__ == "UNet" and module.training:
            steps.append(module)
            while len(steps) == 10 and not out.with_name("enough").exists():
                time.sleep(0.01)

    torch.nn.modules.module.register_module_forward_pre_hook(called)
    run(out)


def test_a_second_training_in_one_folder_is_refused_and_the_first_undisturbed(unbroken, tmp_path):
    out = tmp_path / "run"
    process = Process(functools.partial(waits, out), tmp_path / "log")
    try:
        assert wait_for((out / STATE).exists, process), process.said()
        who = f"{out} is being written to by process {process.pid} on "
        for resume in (False, True):
            with pytest.raises(RunError, match=who):
                run(out, resume=resume)
        done = subprocess.run([*command(out)[:7], "--resume"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"python -m fastdiff.train: {who}")
        assert done.stderr.endswith("; wait for it, or give another --out\n")
    finally:
        (tmp_path / "enough").touch()
    assert process.wait() == 0, process.said()
    assert_same_files(unbroken, out)


def test_parts_are_removed_by_the_one_that_holds_the_folder(tmp_path):
    """Not those of a process that has yet to save for the first time."""
    part = tmp_path / f".{STATE}.1.part"
    with own_folder(tmp_path, Group()):
        part.touch()
        with pytest.raises(RunError, match=f"is being written to by process {os.getpid()} on "):
            run(tmp_path)
        assert part.exists()
    run(tmp_path, steps=1)
    assert not part.exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path, small = tmp_path_factory.mktemp("data") / "data.npz", small_dataset()
    np.savez(path, images=small.images, labels=small.labels, classes=np.array(small.classes), test=small.test)
    return path


def refused(out, source, match):
    """By the command that takes all its settings from the state."""
    before = (out / STATE).read_bytes()
    with pytest.raises(CheckpointError, match=match) as caught:
        main(["--device", "cpu", "--data", str(source), "--out", str(out), "--resume", "--steps", "70"])
    text = str(caught.value)
    assert text.isprintable() and len(text) <= 1000
    assert (out / STATE).read_bytes() == before
    assert not (out / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None}, {"settings": {}}, {"settings": []}, {"history": 3}, {"history": [["a", "b"]]}, {"history": [[5, "0.5"]]},
        {"history": [[5]]}, {"history": [[5, 0.5, 1]]}, {"history": [5]}, {"history": [[25, 0.5]]}, {"history": [[-1, 0.5]]},
        {"history": [[True, 0.5]]}, {"history": [[5, 10**400]]}, {"held_out": [["a", {}]]}, {"held_out": None}, {"step": "x"}, {"step": -10},
        {"step": 25}, {"step": 6.0}, {"step": True}, {"step": None}, {"step": math.inf}, {"step": 10**400}, {"seconds": None},
        {"seconds": "1"}, {"seconds": -1.0}, {"seconds": math.nan}, {"seconds": 10**400},
    ],
)  # fmt: skip
def test_a_damaged_state_is_one_line(unbroken, source, tmp_path, log_after, change):
    tensors, about = read_tensors(unbroken / STATE)
    write_tensors(tmp_path / STATE, tensors, about | change)
    (name,) = change
    refused(tmp_path, source, rf"is the state of no training run that this version knows: .*{'' if name == 'settings' else name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", None), ("steps", 10**400), ("batch", 2.5), ("batch", 0), ("batch", True), ("batch", 1 << 40), ("lr", "abc"),
        ("lr", math.nan), ("lr", [0.1]), ("warmup", -1), ("decay", {}), ("ema", None), ("ema", 1.5), ("drop_label", True),
        ("balance", "zz"), ("balance", -math.inf), ("flip", 1), ("seed", -1), ("seed", 1 << 64), ("schedule", "edm"),
        ("schedule", ["cosine"]), ("timesteps", 1 << 40), ("prediction", "\x1b"), ("prediction", {}), ("channels", []),
        ("channels", 16), ("channels", "16"), ("channels", [16.0]), ("channels", [10**400]), ("channels", [16] * 10_000),
        ("patch", 0), ("blocks", "1"), ("middle", -1),
    ],
)  # fmt: skip
def test_a_state_of_settings_that_there_cannot_be_is_one_line(unbroken, source, tmp_path, log_after, name, value):
    tensors, about = read_tensors(unbroken / STATE)
    write_tensors(tmp_path / STATE, tensors, about | {"settings": about["settings"] | {name: value}})
    refused(tmp_path, source, rf"that this version knows: {name} is .*it must be ")


def test_a_state_of_unfitting_tensors_is_one_line(unbroken, source, tmp_path, log_after):
    tensors, about = read_tensors(unbroken / STATE)
    moment = "adam.0.exp_avg"
    for change, gone, match in (
        ({"adam.999.step": torch.zeros(())}, None, "adam.999.step is [], should be not there"),
        ({"adam.-1.step": torch.zeros(())}, None, "adam.-1.step is"),
        ({"adam.x": torch.zeros(())}, None, "adam.x is"),
        ({"more": torch.zeros(2)}, None, "more is [2], should be not there"),
        ({"renamed": tensors[moment]}, moment, "adam.0.exp_avg is not there, should be [256, 128]"),
        ({}, "adam.0.step", "adam.0.step is not there, should be []"),
        ({}, "ema.stem.weight", "ema.stem.weight is not there"),
        ({moment: tensors[moment][:1]}, None, "adam.0.exp_avg is [1, 128], should be [256, 128]"),
        ({moment: tensors[moment].double()}, None, "adam.0.exp_avg as torch.float64, should be torch.float32"),
        ({"losses": torch.zeros(())}, None, "losses of the shape []"),
        ({"losses": torch.zeros(25)}, None, "losses of the shape [25] after 24 steps"),
    ):
        write_tensors(tmp_path / STATE, {k: v for k, v in (tensors | change).items() if k != gone}, about)
        refused(tmp_path, source, rf"is damaged: it (does not fit its own settings: |holds ){re.escape(match)}")
    write_tensors(tmp_path / STATE, tensors, about | {"step": 0, "history": [], "held_out": []})
    refused(tmp_path, source, re.escape("holds losses of the shape [4] after 0 steps"))


def test_nothing_to_train_on(tmp_path):
    data = dataclasses.replace(small_dataset(), test=np.ones(64, bool))
    with pytest.raises(ValueError, match="all are held out"):
        train(SETTINGS, data, tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        dataclasses.replace(SETTINGS, batch=0)


def test_images_without_classes(tmp_path):
    data = Dataset(small_dataset().images)
    path = train(dataclasses.replace(SETTINGS, steps=2), data, tmp_path)
    trained = fastdiff.load(path)
    assert trained.classes == ()
    assert trained.sampler(steps=2)(3).shape == (3, 3, 8, 8)
    assert trained.record["held_out_loss"] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda(compile, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=200, batch=32, lr=3e-3, warmup=20, ema=0.98)
    train(dataclasses.replace(settings, steps=20), small_dataset(), tmp_path, device="cuda", compile=compile, save_every=10)
    path = train(settings, small_dataset(), tmp_path, device="cuda", compile=compile, resume=True, save_every=100)
    record = fastdiff.load(path).record
    assert record["step"] == 200
    assert record["held_out_loss"][-1][1] < 0.6

"""Training by several processes: that their number does not matter, and that they start, stop, fail and come back as one."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_dataset
from killing import ranks, wait_for
from safetensors.torch import load_file

import fastdiff
from fastdiff import data
from fastdiff.checkpoint import read_tensors
from fastdiff.distributed import Group
from fastdiff.runs import RunError
from fastdiff.train import ASK_S, ASK_STEPS, CHECKPOINT, STATE, Settings, fingerprint, main, steps_to_ask, train

ROOT = Path(__file__).parent.parent
# 10 examples are 5 + 5 and 2 + 3 + 2 + 3. Without a decay, a run of fewer steps is the beginning of one of more.
SETTINGS = Settings(steps=24, batch=10, channels=(16, 16), blocks=1, middle=0, timesteps=50, warmup=4, decay=0.0)
FILES = {STATE, CHECKPOINT, "loss.png", "samples-000024.png", ".lock"}

# What several processes add up in another order differs by the rounding of fp32, and Adam divides by the size of a gradient, however small.
# Weights that move by 1.5e-3 a step were 3e-6 apart after 24 steps, losses near 1 by 1.2e-7. With every rank's share weighted alike, whether
# of 2 examples or of 3, it was 2e-2 and 4e-2.
WEIGHTS, LOSSES = 5e-5, 2e-6

# What each process does: one training after another. It notes how each ended, a hash of its weights and averages, how many files it wrote in
# the folder of the run, and how often it called the averaged network.
WORKER = """
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
import fastdiff.train
from fastdiff import data
from fastdiff.distributed import join
from fastdiff.train import Run, Settings, train

fastdiff.train.ASK_S = 0  # at every step
source, jobs = json.loads(sys.argv[1])
new, runs, written, averaged = Run.new, [], [], []
Run.new = staticmethod(lambda *a: runs.append(new(*a)) or runs[-1])

def opened(event, args):
    if event == "open" and str(args[0]).startswith(job["out"]) and args[2] & (os.O_WRONLY | os.O_RDWR):
        written.append(str(args[0]).removeprefix(job["out"]))

def called(module, *_):
    if type(module).__name__ == "UNet" and not module.training:
        averaged.append(module)
    elif type(module).__name__ == "UNet" and group.rank == 1 and runs[-1].step == job["tell"]:
        os.kill(os.getpid(), signal.SIGTERM)

job = jobs[0]
sys.addaudithook(opened)
torch.nn.modules.module.register_module_forward_hook(called)
with join() as group:
    for number, job in enumerate(jobs):
        written.clear(), averaged.clear()
        try:
            settings = Settings(**{k: tuple(v) if k == "channels" else v for k, v in job["settings"].items()})
            options = {"log_every": job["log_every"], "save_every": 6, "sample_every": 100, "resume": job["resume"]}
            end = str(train(settings, data.load(source), Path(job["out"]), group=group, **options))
        except KeyboardInterrupt as e:
            end = f"stopped: {e}"
        weights = b"".join(p.detach().numpy().tobytes() for m in (runs[-1].model, runs[-1].ema) for p in m.parameters())
        note = [end, hashlib.sha256(weights).hexdigest(), len([name for name in written if name != "/.lock"]), len(averaged)]
        Path(source).with_name(f"{group.world}-{number}-{group.rank}").write_text(json.dumps(note))
"""


def children(pid):
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def rank_of(pid):
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if line.startswith(b"RANK="):
                return int(line[5:])
    return None


class Torchrun:
    """torchrun, of which nothing is left when the block ends."""

    def __init__(self, world, *args, elastic=()):
        command = [sys.executable, "-m", "torch.distributed.run", *(elastic or ["--standalone"]), "--nproc-per-node", str(world), *args]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*children(self.process.pid), self.process.pid]:  # each the first of a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.communicate()

    def wait_for(self, path):
        end = time.monotonic() + 120
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)

    def result(self):
        """(stdout, stderr, what our commands say on stderr when they end). Neither a warning nor a traceback of ours may be there."""
        stdout, stderr = self.process.communicate(timeout=120)
        assert "warn" not in stderr.lower(), stderr
        assert f'File "{ROOT}' not in stderr, stderr
        return stdout, stderr, re.findall(r"python -m fastdiff\.train: .*", stderr)


def flags(source, out, settings=SETTINGS):
    words = {"data": source, "out": out, "device": "cpu"} | {k: v for k, v in dataclasses.asdict(settings).items() if k != "flip"}
    spelt = {f"--{k.replace('_', '-')}": map(str, v) if isinstance(v, tuple) else [str(v)] for k, v in words.items()}
    return ["--save-every", "6", *(word for k, v in spelt.items() for word in (k, *v))]


def distance(a, b):
    """The largest difference of weights and averages, and of the losses since the last entry of the curve."""
    one, two = load_file(a / STATE), load_file(b / STATE)
    assert one.keys() == two.keys()
    apart = {k: float((one[k].double() - two[k].double()).abs().max()) for k in one}
    return max(v for k, v in apart.items() if k.startswith(("model", "ema"))), apart["losses"]


def assert_alike(a, b):
    """Two runs that differ by rounding alone."""
    weights, losses = distance(a, b)
    assert weights < WEIGHTS
    assert losses < LOSSES
    one, two = fastdiff.load(a / CHECKPOINT).record, fastdiff.load(b / CHECKPOINT).record
    assert one["step"] == two["step"]
    for name in ("loss", "held_out_loss"):
        curve, other = dict(one[name]), dict(two[name])
        assert curve.keys() <= other.keys()  # where the other was stopped, it has one more
        np.testing.assert_allclose(list(curve.values()), [other[step] for step in curve], rtol=0, atol=LOSSES)


def alone(out, steps=SETTINGS.steps, **changes):
    options = {"log_every": 5, "save_every": 6, "sample_every": 100, "resume": False} | changes.pop("options", {})
    train(dataclasses.replace(SETTINGS, steps=steps, **changes), small_dataset(), out, **options)
    return out


def work(world, source, *jobs):
    """Trainings by several processes, in which each notes what WORKER says; a row a job, an entry a rank."""
    jobs = [{"settings": dataclasses.asdict(SETTINGS), "resume": False, "tell": None, "log_every": 5} | job for job in jobs]
    script = source.with_name("worker.py")
    script.write_text(WORKER)
    with Torchrun(world, str(script), json.dumps([str(source), jobs])) as run:
        _, stderr, _ = run.result()
    assert run.process.returncode == 0, stderr
    notes = [[source.with_name(f"{world}-{number}-{rank}") for rank in range(world)] for number in range(len(jobs))]
    return [[json.loads(note.read_text()) for note in row] for row in notes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def source(folder):
    small = small_dataset()
    np.savez(folder / "data.npz", images=small.images, labels=small.labels, classes=np.array(small.classes), test=small.test)
    assert data.load(folder / "data.npz").digest() == small.digest()
    return folder / "data.npz"


@pytest.fixture(scope="module")
def one(folder):
    return alone(folder / "one")


@pytest.fixture(scope="module")
def two(folder, source):
    """An unbroken run, and one whose second rank is told to stop in its eighth step, and that then goes on: (their folders, their notes)."""
    whole, told = folder / "two", folder / "told"
    return (whole, told), work(2, source, {"out": str(whole)}, {"out": str(told), "tell": 7}, {"out": str(told), "resume": True})


@pytest.fixture(scope="module")
def stopped(folder, source):
    """A run by two that torchrun's SIGTERM stopped: (its folder, its last step, stdout)."""
    out, script = folder / "stopped", folder / "asks_often.py"
    script.write_text("from fastdiff import cli, train\ntrain.ASK_S = 0\ncli.run(train.main, train.PROG)\n")
    with Torchrun(2, str(script), *flags(source, out, dataclasses.replace(SETTINGS, steps=100_000))) as run:
        run.wait_for(out / STATE)
        run.process.terminate()
        stdout, _, said = run.result()
    assert said == []
    return out, read_tensors(out / STATE)[1]["step"], stdout


@pytest.fixture(scope="module")
def four(folder, source, stopped):
    """An unbroken run, and one that two have begun, one has gone on with, and four end."""
    stopped, step, _ = stopped
    out = folder / "by two, one and four"
    shutil.copytree(stopped, out)
    alone(out, step + 3, options={"resume": True, "log_every": 50})
    end = dataclasses.asdict(dataclasses.replace(SETTINGS, steps=step + 6))
    notes = work(4, source, {"out": str(folder / "four")}, {"out": str(out), "settings": end, "resume": True, "log_every": 50})
    return (folder / "four", out), notes


def test_the_number_of_processes_does_not_matter(one, two, four, tmp_path):
    for (out, _), _ in (two, four):
        assert_alike(one, out)
        assert [step for step, _ in fastdiff.load(out / CHECKPOINT).record["loss"]] == [5, 10, 15, 20]
        assert [step for step, _ in fastdiff.load(out / CHECKPOINT).record["held_out_loss"]] == [6, 12, 18, 24]
    weights, losses = distance(one, alone(tmp_path, seed=1))
    assert weights > 1000 * WEIGHTS
    assert losses > 1000 * LOSSES


def test_each_process_has_the_same_weights_and_averages(two, four):
    for _, notes in (two, four):
        for row in notes:
            assert len({weights for _, weights, *_ in row}) == 1
    assert len({row[0][1] for row in two[1][:2]}) == 2, "at different steps they differ"


def test_only_the_first_process_writes_and_evaluates(two, four):
    for (out, _), notes in (two, four):
        assert {p.name for p in out.iterdir()} == FILES
        assert {end for end, *_ in notes[0]} == {str(out / CHECKPOINT)}
        assert [(files, calls) for _, _, files, calls in notes[0][1:]] == [(0, 0)] * (len(notes[0]) - 1)
        assert notes[0][0][2] >= 4 * 2 + 1, "states, checkpoints and a grid"
        assert notes[0][0][3] >= 4, "the held-out images"
        assert fastdiff.load(out / CHECKPOINT).record["processes"] == len(notes[0])


def test_one_that_is_told_to_stop_stops_all_at_one_step(one, two):
    (whole, told), notes = two
    assert {end for end, *_ in notes[1]} == {f"stopped: stopped at step 8 of 24; saved in {told}"}
    # Two addends have one sum in any order, so here nothing is left to rounding.
    assert distance(whole, told) == (0, 0)
    assert {p.name for p in told.iterdir()} == FILES


def test_torchrun_passes_sigterm_on_and_the_run_is_saved(stopped):
    out, step, stdout = stopped
    assert 0 < step < 100_000
    assert f"stopped at step {step} of 100000; saved in {out}. Go on with: torchrun --nproc-per-node 2 -m fastdiff.train" in stdout
    assert stdout.count("stopped at step") == 1
    assert stdout.rstrip().endswith("--resume")


def test_goes_on_with_another_number_of_processes(stopped, four, tmp_path):
    assert_alike(alone(tmp_path, stopped[1] + 6, options={"log_every": 50}), four[0][1])


def test_a_killed_process_is_started_again_and_the_run_goes_on(source, tmp_path):
    settings, out = dataclasses.replace(SETTINGS, steps=36), tmp_path / "killed"
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    command = ("-m", "fastdiff.train", *flags(source, out, settings), "--save-every", "12", "--log-level", "info")
    with Torchrun(2, *command, elastic=("--master-port", port, "--max-restarts", "2")) as run:
        run.wait_for(out / STATE)
        (second,) = [pid for pid in children(run.process.pid) if rank_of(pid) == 1]
        os.kill(second, signal.SIGKILL)
        stdout, stderr, said = run.result()
    assert run.process.returncode == 0, stderr
    went_on = re.findall(r"\[rank (\d)\] INFO fastdiff\.train: go on with \S+ at step (\d+) of 36", stderr)
    assert sorted(rank for rank, _ in went_on) == ["0", "1"]
    assert {int(step) % 12 for _, step in went_on} == {0}
    assert len(said) == 1, "the one that was left says so"
    assert "another process of this job has ended" in said[0]
    assert stdout.count("trained on") == 1
    assert_alike(alone(tmp_path / "whole", 36, options={"log_every": 50, "save_every": 12}), out)
    assert [p.name for p in out.glob(".*")] == [".lock"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_folder_that_a_group_trains_in_is_refused_to_a_third_until_all_have_ended(source, tmp_path, victim):
    out = tmp_path / "run"
    processes = ranks(functools.partial(main, flags(source, out, dataclasses.replace(SETTINGS, steps=100_000))), 2, tmp_path)
    try:
        assert wait_for((out / STATE).exists, processes[0]), processes[0].said()
        with pytest.raises(RunError, match=f"is being written to by process {processes[0].pid} on "):
            alone(out, 1, options={"resume": True})
    finally:
        processes[victim].signal(signal.SIGKILL)
    assert [p.wait() for p in processes] == [-9 if rank == victim else 2 for rank in range(2)], [p.said() for p in processes]
    step = read_tensors(out / STATE)[1]["step"]
    alone(out, step + 1, options={"resume": True})
    assert read_tensors(out / STATE)[1]["step"] == step + 1


def test_a_restart_goes_on_with_nothing_but_what_its_own_torchrun_saved(tmp_path):
    first, again, another = (Group(names=(name,)) for name in ("a X", "b X", "c Y"))
    alone(tmp_path / "a", 6, options={"group": first})
    alone(tmp_path / "b", 12)
    for group in (another, first, Group()):  # `first` for a second time is no restart
        with pytest.raises(ValueError, match="holds a training run already; add --resume"):
            alone(tmp_path / "a", 12, options={"group": group})
    alone(tmp_path / "a", 12, options={"group": again})
    assert distance(tmp_path / "a", tmp_path / "b") == (0, 0)
    alone(tmp_path / "c", 6, options={"group": again})  # killed before anything was saved
    assert read_tensors(tmp_path / "c" / STATE)[1]["step"] == 6
    (tmp_path / "c" / STATE).write_text("not a state")
    with pytest.raises(ValueError, match="holds a training run already; add --resume"):
        alone(tmp_path / "c", 12, options={"group": first})


def test_what_is_refused_stays_refused_when_torchrun_starts_it_again(source, tmp_path):
    """Two that are called alike. How often they have restarted is not the same on all machines, where one has come or gone."""

    def start(logs, attempt, steps, count):
        folder = tmp_path / f"{logs}-{attempt}"
        folder.mkdir()
        env = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env["MASTER_PORT"] = str(store.port)
        env["TORCHELASTIC_ERROR_FILE"] = f"/tmp/job_{logs}/attempt_{attempt}/0/error.json"
        words = flags(source, out, dataclasses.replace(SETTINGS, steps=steps))
        processes = ranks(functools.partial(main, words), 2, folder, env)
        return [p.wait(60) for p in processes], [p.said() for p in processes]

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "run"
    codes, said = start("a", 0, 6, 0)
    assert codes == [0, 0], said
    state = (out / STATE).read_bytes()
    for attempt in (0, 1):
        codes, said = start("b", attempt, 12, attempt)
        assert codes == [2, 2]
        assert "".join(said).count("holds a training run already; add --resume to go on with it") == 1
        assert (out / STATE).read_bytes() == state
    codes, said = start("a", 1, 12, 0)
    assert codes == [0, 0], said
    assert read_tensors(out / STATE)[1]["step"] == 12


def test_ranks_ask_each_other_about_every_two_seconds():
    assert steps_to_ask(0, 0.0) == 1  # nothing known yet
    assert steps_to_ask(1, 5.0) == 1
    assert steps_to_ask(4, 4 * 0.5) == ASK_S / 0.5
    assert steps_to_ask(100, 0.1) == ASK_STEPS


def test_a_loss_that_explodes_in_one_process_ends_all(source, tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "nan.py"
    script.write_text("""
import os
from fastdiff import cli, train
original = train.F.mse_loss
calls = []
def explodes(*args, **options):
    calls.append(1)
    return original(*args, **options) * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 9 else 1)
train.F.mse_loss = explodes
cli.run(train.main, train.PROG)
""")
    with Torchrun(2, str(script), *flags(source, out)) as run:
        _, stderr, said = run.result()
    assert said == [
        f"python -m fastdiff.train: the loss is no longer finite at step 12; the last good state is in {out}; try a smaller --lr"
    ]
    # torchrun ends the second one itself, if it sees the first one's end sooner than that sees it.
    assert {"2"} <= {*re.findall(r"exitcode +: (-?\d+) ", stderr)} <= {"2", str(-signal.SIGTERM)}
    assert read_tensors(out / STATE)[1]["step"] == 6
    assert all(v.isfinite().all() for v in load_file(out / STATE).values())
    assert [p.name for p in out.glob(".*")] == [".lock"]


def test_more_processes_than_examples(tmp_path):
    with pytest.raises(ValueError, match=r"^a batch of 10 is too small for 11 processes: each needs an example of every step$"):
        train(SETTINGS, small_dataset(), tmp_path / "run", group=Group(rank=3, world=11))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_run_does_not_join(tmp_path, monkeypatch):
    """As of two machines without a common disk, where one has a state and the other none."""
    monkeypatch.setattr(Group, "agree", lambda self, values: False)
    monkeypatch.setattr(Group, "any", lambda self, flag: flag)
    with pytest.raises(ValueError, match="the processes see different data, settings or states"):
        train(SETTINGS, small_dataset(), tmp_path / "run", group=Group(rank=1, world=2))
    assert list(tmp_path.iterdir()) == []


def test_what_the_ranks_must_have_in_common():
    def of(step=0, digest="a", **changes):
        return int(fingerprint(dataclasses.replace(SETTINGS, **changes), digest, step))

    assert of() == of()
    assert len({of(), of(step=1), of(digest="b"), of(lr=1e-3)}) == 4

"""Processes of one job: who they are, what they say to each other, and what becomes of the others when one ends."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from killing import ROOT, Process, free_port, ranks

from fastdiff import distributed
from fastdiff.distributed import Group, join, launched, own_device

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_launched_by_nobody(monkeypatch):
    assert not launched()
    monkeypatch.setenv("RANK", "0")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()
    monkeypatch.delenv("RANK")
    assert not launched()


def test_a_group_of_one_answers_at_once():
    with join() as group:
        assert (group.rank, group.world, group.local, group.names, group.first) == (0, 1, 0, (), True)
        group.barrier()
        values = torch.tensor([1, 2])
        assert group.sum(values).tolist() == [1, 2]
        assert group.agree(values)
        assert group.any(True) and not group.any(False)
        assert [group.add("a", 2), group.add("a", 0), group.add("b", -1), group.add("a", 1)] == [2, 2, -1, 3]
    assert Group().add("a", 1) == 1  # of its own


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("WORLD_SIZE", "many", "the environment variable WORLD_SIZE is 'many'; start the processes with torchrun"),
        ("WORLD_SIZE", "", "the environment variable WORLD_SIZE is ''"),
        ("RANK", "x", "the environment variable RANK is 'x'"),
        ("RANK", "2", "RANK is 2 and WORLD_SIZE 2"),
        ("RANK", "-1", "RANK is -1 and WORLD_SIZE 2"),
        ("LOCAL_RANK", "1.5", "the environment variable LOCAL_RANK is '1.5'"),
        ("MASTER_PORT", "http", "the environment variable MASTER_PORT is 'http'"),
        ("MASTER_PORT", None, "the environment variable MASTER_PORT is ''"),
        ("MASTER_PORT", "70000", "port"),
        ("MASTER_ADDR", None, "MASTER_ADDR"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(monkeypatch, name, value, text):
    for key, whole in (WHOLE | {name: value}).items():
        if whole is not None:
            monkeypatch.setenv(key, whole)
    with pytest.raises(ValueError, match=text) as caught, join():
        pass
    assert "\n" not in str(caught.value)


def test_who_was_started_again_by_the_same_torchrun():
    def restarted(before, now):
        return Group(names=tuple(now)).restarted(before)

    assert restarted(["a X", "b X"], ["c X", "d X"])
    assert restarted(["a X", "b Y"], ["c Z", "d Y", "e Z"])  # of its machines, one is left
    assert not restarted(["a X", "b X"], ["c Y", "d Y"])
    assert not restarted(["a X", "b X"], ["a X", "b X"])  # the same processes, for a second time
    assert not restarted(["a", "b"], ["c", "d"])  # by no torchrun
    assert not restarted([], ["a X"])
    assert not any(Group(names=("a X",)).restarted(odd) for odd in (None, "b X", [1], [["b X"]], {"b X": 1}))


def test_a_torchrun_is_known_by_the_folder_of_its_logs(monkeypatch):
    def names(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
        with join() as group:
            return group.names

    first = names(RUN_ID="7", ERROR_FILE="/tmp/x/7_a/attempt_0/0/error.json")
    for file, same in (("/tmp/x/7_a/attempt_1/0/error.json", True), ("/tmp/x/7_b/attempt_1/0/error.json", False), ("", False)):
        assert Group(names=names(ERROR_FILE=file)).restarted(list(first)) is same
    assert Group(names=names(ERROR_FILE="")).restarted(list(names(ERROR_FILE="")))  # without logs, by its number
    assert "/" not in first[0]


def test_what_backends_say_is_one_line_and_other_errors_stay():
    with (
        pytest.raises(ConnectionError, match=r"^another process of this job has ended \(Connection closed by peer \[127.0.0.1\]:3\)$"),
        distributed.lost(),
    ):
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:3. This may be\nmore")
    with pytest.raises(ConnectionError, match=r"^another process of this job has ended \(no answer\)$"), distributed.lost():
        raise torch.distributed.DistNetworkError("no answer:\nframe #0")
    with pytest.raises(RuntimeError, match="shapes differ"), distributed.lost():
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("asked", "found", "device"),
    [("cuda", True, "cuda:3"), (None, True, "cuda:3"), (None, False, None), ("cpu", True, "cpu"), ("cuda:1", True, "cuda:1")],
)
def test_a_rank_has_the_gpu_of_its_number(monkeypatch, asked, found, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert own_device(asked, 3) == device


def test_a_rank_that_is_shown_one_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_device(None, 3) == "cuda:3"  # which is refused: there is none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert own_device(None, 3) == own_device("cuda", 3) == "cuda:0"
    assert own_device("cuda:2", 3) == "cuda:2" and own_device("cpu", 3) == "cpu"


def talk():
    """What ranks find out from each other, as JSON."""
    with join() as group:
        group.barrier()
        mine = torch.tensor([group.rank, 1.0])
        found = {
            "who": [group.rank, group.world, group.local, len(group.names)],
            "sum": group.sum(mine).tolist(),
            "mine": mine.tolist(),
            "any": [group.any(group.rank == 1), group.any(False)],
            "agree": [group.agree(torch.tensor([7])), group.agree(torch.tensor([group.rank]))],
            "added": group.add("taken", 1),
        }
        group.barrier()
        print(json.dumps(found | {"all": group.add("taken", 0)}), flush=True)


def test_three_ranks_agree(tmp_path):
    processes = ranks(talk, 3, tmp_path)
    assert [p.wait() for p in processes] == [0, 0, 0], processes[0].said()
    said = [json.loads(p.said()) for p in processes]
    for rank, found in enumerate(said):
        assert found["who"] == [rank, 3, rank, 3]
        assert found["sum"] == [3, 3]
        assert found["mine"] == [rank, 1]  # not summed in place
        assert found["any"] == [True, False]
        assert found["agree"] == [True, rank == 0]
        assert found["all"] == 3
    assert sorted(found["added"] for found in said) == [1, 2, 3]


def torchruns():
    """A store as torchrun keeps one, and the variables of those that are to meet in it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def late(seconds):
    time.sleep(seconds)
    talk()


def test_ranks_meet_in_a_store_that_holds_what_earlier_ones_have_left(tmp_path):
    """torchrun's, where a machine has come or gone: each counts its restarts for itself."""
    store, env = torchruns()
    store.set("fastdiff/hello/1", "dead 1")  # of a start that was broken off
    store.set("fastdiff/names", '["dead 0", "dead 1"]')
    for counts, waits in ((("0", "1"), (0, 0.3)), (("3", "0"), (0.3, 0))):
        processes = [
            Process(
                functools.partial(late, wait),
                tmp_path / f"log-{counts[0]}-{rank}",
                env=env | {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": count},
            )
            for rank, (count, wait) in enumerate(zip(counts, waits, strict=True))
        ]
        assert [p.wait(20) for p in processes] == [0, 0], [p.said() for p in processes]
        said = [json.loads(p.said()) for p in processes]
        assert sorted(found["added"] for found in said) == [1, 2]
        assert [found["all"] for found in said] == [2, 2]


def impatient():
    distributed.MEETING = timedelta(seconds=1)
    with join():
        pass


def test_what_a_backend_prints_does_not_get_among_our_lines(capfd, monkeypatch):
    print("before")
    with distributed._silent():
        os.write(1, b"[Gloo] Rank 1 is connected\n")
        os.write(2, b"an error\n")
    print("after")
    assert tuple(capfd.readouterr()) == ("before\nafter\n", "an error\n")

    def closed(fd):
        raise OSError(9, "Bad file descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", closed)
        with distributed._silent():
            print("none")
    assert capfd.readouterr().out == "none\n"


def test_a_rank_that_does_not_come_is_one_line(tmp_path):
    store, env = torchruns()
    processes = ranks(impatient, 2, tmp_path, env | {"WORLD_SIZE": "3"})
    for process in processes:
        assert process.wait(20) == 2
        assert process.said().splitlines()[-1] == (
            "python -m fastdiff.sample: no meeting with the other processes at 127.0.0.1, "
            f"port {store.port}: not all of the 3 came within 1 s"
        )


def wait_long(where, file):
    file.write_text("")
    with join() as group, distributed.one_voice(group):
        group.barrier()
        file.write_text("in the group")
        if group.first:
            time.sleep(60)
        elif where == "barrier":
            group.barrier()
        else:
            group.agree(torch.ones(1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["barrier", "agree", "host", "meeting"])
def test_a_rank_that_waits_for_others_heeds_signals(tmp_path, where, number):
    """In the fork of a fork server, whose handler of Ctrl-C is that of any Python, and which ends without a shutdown of the interpreter: gloo's
    threads would abort that."""
    file, world = tmp_path / "there", 2
    work = functools.partial(wait_long, where, file)
    if where in ("barrier", "agree"):
        processes = ranks(work, world, tmp_path)
    else:
        env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        if where == "meeting":
            _store, there = torchruns()
            env |= there
        processes = [Process(work, tmp_path / "log", env=env)]
    waiting = processes[-1]
    end = time.monotonic() + 30
    while not (file.exists() and (len(processes) == 1 or file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    waiting.signal(number)
    try:
        assert waiting.wait(2) == (130 if len(processes) == 2 else -number)
        assert "Traceback" not in waiting.said()
    finally:
        processes[0].signal(signal.SIGKILL)


def fail(error):
    with join() as group, distributed.one_voice(group):
        group.barrier()
        raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(MemoryError(), 2, "out of memory"), (torch.OutOfMemoryError("CUDA"), 2, "out of memory"), (RuntimeError("a fault"), 1, "a fault")],
)
def test_one_rank_speaks_for_all(tmp_path, error, code, text):
    _store, env = torchruns()
    processes = ranks(functools.partial(fail, error), 2, tmp_path, env)
    assert [p.wait(20) for p in processes] == [code, 2]
    assert text in processes[0].said()
    assert processes[1].said() == ""


def die(victim, what):
    """One rank ends without a word, while the others ask."""
    with join() as group:
        group.barrier()
        if group.rank == victim:
            os._exit(1)
        if what == "sum":
            group.sum(torch.ones(3))
        else:
            while True:
                group.add("taken", 1)
                time.sleep(0.01)


@pytest.mark.parametrize(("victim", "what"), [(1, "sum"), (0, "sum"), (0, "add")])
def test_a_rank_that_dies_is_a_connection_error_of_the_others(tmp_path, victim, what):
    processes = ranks(functools.partial(die, victim, what), 3, tmp_path)
    for rank, process in enumerate(processes):
        code = process.wait(60)
        if rank != victim:
            assert code == 2, process.said()
            last = process.said().splitlines()[-1]
            assert last.startswith("python -m fastdiff.sample: another process of this job has ended (")
            assert "Traceback" not in process.said()


def test_a_host_that_is_not_there_is_one_line(tmp_path):
    env = WHOLE | {"RANK": "1", "MASTER_ADDR": "host.invalid"}
    process = Process(impatient, tmp_path / "log", env=env)
    assert process.wait() == 2
    last = process.said().splitlines()[-1]
    assert last.startswith("python -m fastdiff.sample: no meeting with the other processes at host.invalid, port 29500: ")
    assert "Traceback" not in process.said()


RESTARTED = """
import os
from fastdiff import distributed
with distributed.join() as group:
    group.barrier()
    group.add("taken", 1)
    group.barrier()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0:
        if group.rank == 1:
            os.kill(os.getpid(), 9)
        group.barrier()
    print(f"attempt {attempt}, taken {group.add('taken', 0)}", flush=True)
"""


def test_counters_begin_at_0_again_when_torchrun_restarts_its_processes(tmp_path):
    """With the rendezvous that keeps its store over restarts."""
    (tmp_path / "script.py").write_text(RESTARTED)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            *("timeout", "-k", "1", "100", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
            *("--master-addr", "127.0.0.1", "--master-port", free_port(), "--monitor-interval", "0.1", str(Path("script.py"))),
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Two processes write to one pipe: a line end may come after the other's line.
    assert done.stdout.replace("\n", "") == "attempt 1, taken 2" * 2

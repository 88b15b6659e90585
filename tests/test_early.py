"""A command that is stopped while it starts, which takes seconds, ends in one line; a program that imports the package is left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import early

ROOT = Path(__file__).parent.parent
COMMANDS = ["sample", "train", "evaluate", "show", "classifier"]
# Sends this process a signal as soon as a module is looked for.
SENDER = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), int(os.environ["SENT"]))

sys.meta_path.insert(0, Sender())
"""


def start(folder, at, number, *words, env=None, **options):
    (folder / "sitecustomize.py").write_text(SENDER)
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "AT": at, "SENT": str(int(number))} | (env or {})
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120, **options)


MOMENTS = [("fastdiff.ideal", 15), ("torch", 2), ("torch._C", 2), ("torch._C", 15), ("torch.nn", 2), ("PIL", 2), ("fastdiff.cli", 2)]


@pytest.mark.parametrize(("at", "number"), MOMENTS)
def test_a_signal_while_torch_is_imported_is_one_line(tmp_path, at, number):
    done = start(tmp_path, at, number, "-m", "fastdiff.sample", "--batch", "1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\npython -m fastdiff.sample: interrupted\n")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".py"] in ([], ["__pycache__"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_it(tmp_path, command):
    done = start(tmp_path, "torch", signal.SIGINT, f"-mfastdiff.{command}")
    assert (done.returncode, done.stderr) == (130, f"\npython -m fastdiff.{command}: interrupted\n")


def test_the_list_of_commands_is_whole():
    assert sorted(COMMANDS) == sorted(p.stem for p in (ROOT / "fastdiff").glob("*.py") if 'if __name__ == "__main__"' in p.read_text())


def test_of_several_processes_one_says_so(tmp_path):
    done = start(tmp_path, "torch", signal.SIGINT, "-m", "fastdiff.sample", env={"RANK": "1"})
    assert (done.returncode, done.stderr) == (130, "")


def test_a_command_that_a_shell_has_made_deaf_stays_deaf(tmp_path):
    deaf = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    done = start(tmp_path, "torch", signal.SIGINT, "-m", "fastdiff.sample", "--help", **deaf)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m fastdiff.sample")


def test_a_signal_once_all_is_done_changes_nothing(tmp_path):
    """Python takes a moment to end with torch in it."""
    code = "import atexit, os, signal; from fastdiff import cli\natexit.register(os.kill, os.getpid(), {})\ncli.run(lambda: 0, 'it')"
    for number in (signal.SIGINT, signal.SIGTERM):
        # Before what is registered later, in atexit's order, which is the last one first.
        late = code.format(int(number))
        done = subprocess.run([sys.executable, "-c", late], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["-m", "mine.program"], ["-m", "mine"], ["mine/program.py"], ["-c", "import mine.program"]])
def test_a_program_that_imports_the_package_keeps_its_handlers(tmp_path, words):
    home = tmp_path / "mine"
    home.mkdir()
    said = "import fastdiff, signal; print(signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15) == 0)\n"
    for name in ("__init__", "__main__", "program"):
        (home / f"{name}.py").write_text(said if name != "program" else "")
    done = start(tmp_path, "", 0, *words, "fastdiff.sample")
    assert done.stderr == "" and set(done.stdout.split()) <= {"True"}
    assert "mine/program.py" in words or done.stdout


def test_what_a_process_is_for(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "fastdiff.train", "--out", "-m"])
    monkeypatch.setattr(sys, "argv", ["-m", "--out", "-m"])
    assert early.command() == "python -m fastdiff.train"
    for argv in (["train.py", "--out", "-m"], ["-m", "-m"], ["-m"], [], ["-m"] * 9):
        monkeypatch.setattr(sys, "argv", argv)
        assert early.command() is None
    monkeypatch.delattr(sys, "argv")
    assert early.command() is None

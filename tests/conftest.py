"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before any kernel is decorated."""

import logging
import os
import signal

# The networks of the tests are too small to share, and OpenMP's waiting threads fight with whatever else runs. What is said of threads is
# tested with numbers of its own. Before torch is imported, and for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what it runs in the background deaf to Ctrl-C, and commands that tests start and then interrupt would be so, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


# Files that take a minute or so, of which none is to be begun last. By their numbers of tests, which is xdist's order, they would be.
SLOW = ["sample", "runs", "train", "train_distributed", "codegen_fused", "diffusers_pipelines", "field", "distributed"]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="kill a hundred runs rather than a few; nothing is left out without it")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """The whole suite is shared by all cores where pytest-xdist is installed, file by file; tests that are named run in this process, as do those that
    need the GPU for themselves. -n says otherwise."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and not (CUDA or config.option.collectonly or config.option.usepdb)
    worker = "PYTEST_XDIST_WORKER" in os.environ  # which would have workers of its own, and these again
    if (
        whole
        and not worker
        and config.pluginmanager.hasplugin("xdist")
        and config.option.numprocesses is None
        and config.option.dist == "no"
    ):
        config.option.numprocesses, config.option.dist = min(8, os.cpu_count() or 1), "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items) -> None:
    """In workers, which deal out files in this order; without them, tests run in the order that the command names."""
    if not hasattr(config, "workerinput"):
        return
    slow = [f"test_{name}.py" for name in SLOW]
    items.sort(key=lambda item: slow.index(item.path.name) if item.path.name in slow else len(slow))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test, and no command that one starts, looks at what was measured on this machine before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_bounds():
    """In the interpreter no kernel touches memory outside of its arguments; on a GPU compute-sanitizer looks (see benchmarks/gpu)."""
    if CUDA:
        yield
        return
    from helpers import within_arguments

    with within_arguments():
        yield


@pytest.fixture
def device() -> torch.device:
    """Where launchers are tested: the GPU, or CPU tensors in the interpreter."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def log_after():
    """The library's log as it was before."""
    log = logging.getLogger("fastdiff")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before

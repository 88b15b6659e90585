"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before any kernel is decorated."""

import os

# The networks of the tests are too small to share, and OpenMP's waiting threads fight with whatever else runs. What is said of threads is
# tested with numbers of its own. Before torch is imported, and for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="kill a hundred runs rather than a few; nothing is left out without it")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test, and no command that one starts, looks at what was measured on this machine before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def device() -> torch.device:
    """Where launchers are tested: the GPU, or CPU tensors in the interpreter."""
    return torch.device("cuda" if CUDA else "cpu")

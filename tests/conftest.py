"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before any kernel is decorated."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where launchers are tested: the GPU, or CPU tensors in the interpreter."""
    return torch.device("cuda" if CUDA else "cpu")

"""fastdiff: sprites from noise, as fast as the hardware allows.

    ckpt = fastdiff.load("sprites")
    images = ckpt.sampler(steps=20)(64, seed=0, labels=0, guidance=2.0)      # fp32 [64, 3, 16, 16] in [-1, 1]

Importing it needs neither a GPU nor Triton.
"""

from . import early

early.watch()  # before torch, which takes seconds

# ruff: noqa: E402
from . import ideal, solvers
from .checkpoint import Checkpoint, CheckpointError, load
from .data import DataError
from .likelihood import Bound, Likelihood, dequantised, log_likelihood, variational_bound
from .noise import add_noise, normal, slerp
from .rewrite import accelerate, unaccelerate
from .sampler import Sampler, State, Trajectory
from .schedules import Schedule
from .unet import UNet, UNetConfig
from .version import __version__ as __version__

__all__ = [
    "Bound",
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "Likelihood",
    "Sampler",
    "Schedule",
    "State",
    "Trajectory",
    "UNet",
    "UNetConfig",
    "accelerate",
    "add_noise",
    "dequantised",
    "ideal",
    "load",
    "log_likelihood",
    "normal",
    "slerp",
    "solvers",
    "unaccelerate",
    "variational_bound",
]

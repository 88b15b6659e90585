"""Devices by name, and what they say when their memory is full."""

from __future__ import annotations

import torch


def pick_device(name: torch.device | str | None) -> torch.device:
    """The device of that name, with its index on CUDA, or the best there is for None. ValueError where it is not to be had."""
    try:
        device = torch.device(name if name is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda, cuda:0, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported; known: cpu, cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"there is no device {str(name)!r} here ({torch.cuda.device_count()} CUDA GPUs); use cpu, or leave it out")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def out_of_memory(e: BaseException) -> bool:
    """Also where it is not the allocator that says so: CUDA itself, as it makes a graph or loads a kernel, and its libraries."""
    said = ("allocate memory", "CUDA error: out of memory", "[CUDA]: out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED")
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(words in str(e) for words in said)

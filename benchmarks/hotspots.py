"""Where a sampler's time goes: kernels by time, and the host's part, of one captured loop and one without. `python -m benchmarks.hotspots`."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gauges, peers
from benchmarks.peers import Peer, Task

CUDA = torch.cuda.is_available()
BATCH, STEPS = (1024, 20) if CUDA else (64, 2)


def main() -> None:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    _, ckpt = peers.weights()
    task = Task(ckpt.model.to(device, dtype), ckpt.schedule, ckpt.prediction, "ddim", STEPS, ckpt.shape, len(ckpt.classes))
    contenders: list[Peer] = [peers.ours(task, compile=CUDA), peers.plain(task)]
    for peer in contenders:
        peer.run(BATCH, STEPS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as profiler:
            peer.run(BATCH, STEPS)
            if CUDA:
                torch.cuda.synchronize()
        print(f"== {peer.name}: {peer.about}; {BATCH} images, {STEPS} steps")
        order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))
        print(f"a step: {gauges.measured(peer, task, BATCH)}")


if __name__ == "__main__":
    main()

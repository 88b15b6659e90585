"""The only dispatch: each operation as torch.ops.fastdiff.NAME. The body is the reference (CPU, MPS, XPU), "cuda" the kernel.

Arguments, shapes and results: the function of the same name in reference.py. On CUDA tensors must be contiguous, which the launcher
asserts; results are contiguous everywhere. Nothing here has a gradient: a training batch is noised without one. The ops are opaque
to torch.compile, which needs no GPU and no Triton to trace them; the kernels are imported when the first CUDA tensor arrives.
"""

# No `from __future__ import annotations`: custom_op reads the annotations to write the schema.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference


@custom_op("fastdiff::noise_words", mutates_args=())
def noise_words(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    """Words of the noise stream, int64 [N, quads, 4]."""
    return reference.noise_words(seeds, ids, counter, quads)


@noise_words.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import normal as kernel

    return kernel.noise_words(*args)


@noise_words.register_fake
def _(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    return seeds.new_empty(len(seeds), quads, 4)


@custom_op("fastdiff::normal", mutates_args=())
def normal(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    """Standard normal noise, fp32 [N, numel]."""
    return reference.normal(seeds, ids, counter, numel).contiguous()


@normal.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import normal as kernel

    return kernel.normal(*args)


@normal.register_fake
def _(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    return seeds.new_empty(len(seeds), numel, dtype=torch.float32)


@custom_op("fastdiff::add_noise", mutates_args=())
def add_noise(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    counter: Tensor | None,
    target: bool,
) -> tuple[Tensor, Tensor]:
    """x_t and the training target (empty unless `target`), in x0's dtype."""
    x_t, wanted = reference.add_noise(x0, t, table, noise, seeds, ids, counter, target)
    return x_t.contiguous(), wanted.contiguous()


@add_noise.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import add_noise as kernel

    return kernel.add_noise(*args)


@add_noise.register_fake
def _(x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape if args[-1] else (0,))


@custom_op("fastdiff::solver_step", mutates_args=("x", "x0", "model_input", "history"))
def solver_step(
    x: Tensor,
    x0: Tensor,
    m: Tensor,
    model_input: Tensor,
    history: Tensor,
    table: Tensor,
    row: Tensor,
    seeds: Tensor,
    ids: Tensor,
    guidance: Tensor,
    noise: Tensor | None = None,
) -> None:
    """One row of a solver, in place on x, x0, history and model_input."""
    reference.solver_step(x, x0, m, model_input, history, table, row, seeds, ids, guidance, noise)


@solver_step.register_kernel("cuda")
def _(*args: Any) -> None:
    from .kernels import solver_step as kernel

    kernel.solver_step(*args)


@solver_step.register_fake
def _(*args: Any) -> None:
    return None


@custom_op("fastdiff::scheduler_step", mutates_args=())
def scheduler_step(
    m: Tensor,
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    limit: Tensor | None,
    before: Tensor | None,
    earlier: Tensor | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """One row of a solver out of place: the next x, and x0."""
    out, x0 = reference.scheduler_step(m, x, table, rows, noise, seeds, ids, limit, before, earlier, wide)
    return out.contiguous(), x0.contiguous()


@scheduler_step.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import scheduler_step as kernel

    return kernel.scheduler_step(*args)


@scheduler_step.register_fake
def _(m: Tensor, x: Tensor, table: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(m.dtype, x.dtype))
    return out, out.new_empty(x.shape, dtype=table.dtype) if args[-1] else torch.empty_like(out)


def direct(name: str) -> Callable[..., Any]:
    """An op without the dispatcher where its body is all there is to call, eagerly on plain CPU tensors: for a few images, the dispatcher takes
    longer than the body."""
    op, body = globals()[name], getattr(reference, name)

    def call(first: Tensor, *rest: Any) -> Any:
        plain = type(first) is Tensor and first.device.type == "cpu" and not torch.compiler.is_compiling()
        return (body if plain else op)(first, *rest)

    return call

"""The only dispatch: each operation as torch.ops.fastdiff.NAME. The body is the reference (CPU, MPS, XPU), "cuda" the kernel in Triton, "cpu" the one
in C, where an operation has it.

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

from . import library, native, reference, tuned


@custom_op("fastdiff::noise_words", mutates_args=())
def noise_words(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    """Words of the noise stream, int64 [N, quads, 4]."""
    return reference.noise_words(seeds, ids, counter, quads)


@noise_words.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import normal as kernel

    return kernel.noise_words(*args)


@noise_words.register_kernel("cpu")
def _(*args: Any) -> Any:
    return (native if native.available() else reference).noise_words(*args)


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


@normal.register_kernel("cpu")
def _normal(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    """The noise stream on a CPU."""
    return native.normal(seeds, ids, counter, numel) if native.available() else reference.normal(seeds, ids, counter, numel).contiguous()


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


@add_noise.register_kernel("cpu")
def _(x0: Tensor, t: Tensor, table: Tensor, noise: Any, seeds: Any, ids: Any, counter: Any, target: bool) -> Any:
    if noise is None:
        noise = _normal(seeds, ids, counter, x0[0].numel() if len(x0) else 0).reshape(x0.shape)
    x_t, wanted = reference.add_noise(x0, t, table, noise, None, None, None, target)
    return x_t.contiguous(), wanted.contiguous()


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


@solver_step.register_kernel("cpu")
def _solver_step(x: Tensor, x0: Tensor, m: Tensor, model_input: Tensor, history: Tensor, table: Tensor, *args: Any) -> None:
    _, _, _, guidance, *noise = args
    m = m.float().contiguous()
    step = native if native.steps(x, x0, m, model_input, history, table, guidance, *noise) else reference
    step.solver_step(x, x0, m, model_input, history, table, *args)


@solver_step.register_fake
def _(*args: Any) -> None:
    return None


_ON_CPU = {normal: _normal, solver_step: _solver_step}


def straight(op: Any, *args: Any) -> Any:
    """op(*args), of `normal` and `solver_step`. On a CPU where nothing is being compiled its kernel itself is called: torch's dispatcher of custom
    operations imports the compiler first, which takes a second, and takes longer than a step of few images does."""
    if args[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return _ON_CPU[op](*args)
    return op(*args)


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


@scheduler_step.register_kernel("cpu")
def _(m: Tensor, x: Tensor, table: Tensor, rows: Tensor, noise: Any, seeds: Any, ids: Any, *rest: Any) -> Any:
    if noise is None and seeds is not None and ids is not None and len(x):
        noise = _normal(seeds, ids, table[rows, -1].long(), x[0].numel()).reshape(x.shape)
    out, x0 = reference.scheduler_step(m, x, table, rows, noise, None, None, *rest)
    return out.contiguous(), x0.contiguous()


@scheduler_step.register_fake
def _(m: Tensor, x: Tensor, table: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=torch.promote_types(m.dtype, x.dtype))
    return out, out.new_empty(x.shape, dtype=table.dtype) if args[-1] else torch.empty_like(out)


@custom_op("fastdiff::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    style: Tensor | None,
    which: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    inverse: Tensor | None,
) -> Tensor:
    """GroupNorm, scale and shift, and SiLU, of channels-last images."""
    return reference.group_norm_silu(x, gamma, beta, style, which, groups, eps, silu, inverse).contiguous()


@group_norm_silu.register_kernel("cuda")
def _(x: Tensor, *args: Any) -> Any:
    from .kernels import group_norm_silu as kernel

    return (library if kernel.fits(x.shape[-1], args[4]) else kernel).group_norm_silu(x, *args)


@group_norm_silu.register_kernel("cpu")
def _(x: Tensor, *args: Any) -> Any:
    gamma, beta, style, which, groups, eps, silu, inverse = args
    if inverse is None and native.covers(x, x.shape[-1]):
        return native.group_norm_silu(x, native.Norm(gamma, beta, groups, eps, silu), style, which)
    return reference.group_norm_silu(x, *args).contiguous()


@group_norm_silu.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if args[-1] is None else reference.FP8)


@custom_op("fastdiff::conv3x3", mutates_args=())
def conv3x3(
    x: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    skip: list[Tensor],
    skip_weight: Tensor | None,
    norms: list[Tensor],
    style: Tensor | None,
    which: Tensor | None,
    inverse: Tensor | None,
    groups: int,
    eps: float,
    stride: int,
    raw: bool,
) -> list[Tensor]:
    """A convolution of 3 x 3 with bias, skip, norms and SiLU: y if raw, and each result."""
    return reference.conv3x3(x, weight, bias, scale, skip, skip_weight, norms, style, which, inverse, groups, eps, stride, raw)


@conv3x3.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import conv as kernel

    x, _, _, _, skip, skip_weight, norms, _, _, _, groups, *_ = args
    read = [v.shape[-1] for v in (x if skip_weight is None else [*x, *skip])]
    return _chosen("conv3x3", kernel, args, read, groups if norms else None)


def _results(x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, norms: list[Tensor], inverse: Tensor | None, raw: bool) -> list[Tensor]:
    made = [x.new_empty(shape, dtype=dtype)] if raw else []
    return made + [x.new_empty(shape, dtype=dtype if inverse is None else reference.FP8) for _ in range(len(norms) // 2)]


@conv3x3.register_fake
def _(
    x: list[Tensor], weight: Tensor, bias: Tensor, scale: Any, skip: list[Tensor], skip_weight: Any, norms: list[Tensor], *args: Any
) -> list[Tensor]:
    *_, inverse, _, _, stride, raw = args
    dtype = next((v.dtype for v in (skip_weight, *skip, weight) if v is not None and v.dtype != reference.FP8), torch.bfloat16)
    n, height, width, _ = x[0].shape
    shape = (n, (height - 1) // stride + 1, (width - 1) // stride + 1, weight.shape[0])
    return _results(x[0], shape, dtype, norms, inverse, raw)


@custom_op("fastdiff::conv_up", mutates_args=())
def conv_up(
    x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Tensor | None, groups: int, eps: float, raw: bool
) -> list[Tensor]:
    """Pixels repeated, a convolution of 3 x 3, bias, norms and SiLU: y if raw, and each result."""
    return reference.conv_up(x, weight, bias, norms, inverse, groups, eps, raw)


@conv_up.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import conv as kernel

    x, _, _, norms, _, groups, _, _ = args
    return _chosen("conv_up", kernel, args, [x.shape[-1]], groups if norms else None)


@conv_up.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Any, groups: int, eps: float, raw: bool) -> list[Tensor]:
    n, height, width, _ = x.shape
    return _results(x, (n, 2 * height, 2 * width, weight.shape[0]), x.dtype, norms, inverse, raw)


@custom_op("fastdiff::conv_in", mutates_args=())
def conv_in(
    x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Tensor | None, patch: int, groups: int, eps: float, raw: bool
) -> list[Tensor]:
    """Pixels folded into channels, a convolution of 3 x 3, bias, norms and SiLU: y if raw, and each result, channels last."""
    return reference.conv_in(x, weight, bias, norms, inverse, patch, groups, eps, raw)


@conv_in.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import conv_ends as kernel

    _, _, _, norms, _, _, groups, _, _ = args
    return _chosen("conv_in", kernel, args, [], groups if norms else None)


@conv_in.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Any, patch: int, groups: int, eps: float, raw: bool
) -> list[Tensor]:
    n, _, height, width = x.shape
    return _results(x, (n, height // patch, width // patch, weight.shape[0]), x.dtype, norms, inverse, raw)


@custom_op("fastdiff::conv_out", mutates_args=())
def conv_out(x: Tensor, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    """A convolution of 3 x 3 and bias, channels unfolded to pixels: channels first."""
    return reference.conv_out(x, weight, bias, patch)


@conv_out.register_kernel("cuda")
def _(*args: Any) -> Any:
    from .kernels import conv_ends as kernel

    return _chosen("conv_out", kernel, args, [args[0].shape[-1]], None)


@conv_out.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    n, height, width, _ = x.shape
    return x.new_empty(n, weight.shape[0] // patch**2, height * patch, width * patch)


@custom_op("fastdiff::winograd_conv3x3", mutates_args=())
def winograd_conv3x3(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A 3 x 3 convolution by Winograd's method, fp32 [N, C', H, W], channels-last."""
    return reference.winograd_conv3x3(x, packed, bias)


@winograd_conv3x3.register_kernel("cpu")
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    convolve = native.winograd_conv3x3 if native.available() else reference.winograd_conv3x3
    return convolve(x, packed, bias)


@winograd_conv3x3.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    n, _, height, width = x.shape
    return x.new_empty(n, packed.shape[1] * reference.WIDE, height, width).to(memory_format=torch.channels_last)


def has_kernels(device: torch.device) -> bool:
    """Whether the convolutions' kernels run there: Hopper and Blackwell of data centres have the shared memory that they take, others do not."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def uncovered(
    device: torch.device, dtype: torch.dtype, height: int, width: int, c_out: int, groups: int | None, *channels: int, op: str = "conv3x3"
) -> str | None:
    """Why a convolution of channels to c_out, with a result of height x width pixels, runs by the library on a GPU, or None where a kernel does it."""
    from .kernels import conv, conv_ends

    if not has_kernels(device):
        return "the kernels need a GPU of compute capability 9 or 10 (H100, H200, B200)"
    if dtype not in (torch.bfloat16, torch.float16, reference.FP8):
        return f"{str(dtype).removeprefix('torch.')}: the kernels compute with 16 bits"
    out = op == "conv_out"
    reason: str | None = conv_ends.fits_out(height, width, c_out, *channels) if out else conv.fits(height, width, c_out, groups, *channels)
    return reason


def _chosen(op: str, kernel: Any, args: Any, read: list[int], groups: int | None) -> Any:
    """A convolution by its kernel or by the library. read: channels that the kernel takes in steps."""
    found, device = tuned.shape(op, args), args[1].device
    if uncovered(device, found.dtype, found.height, found.width, found.c_out, groups, *read, op=op) is None:
        way, sizes = tuned.way(torch.cuda.get_device_name(device), tuned.key(*found))
        if way == "kernel":
            return getattr(kernel, op)(*args, **sizes)
    if op == "conv_out":
        return library.conv_out(*args)
    return getattr(library, op)(*args, norm=group_norm_silu)


def direct(name: str) -> Callable[..., Any]:
    """An op without the dispatcher where its body is all there is to call, eagerly on plain CPU tensors: for a few images, the dispatcher takes
    longer than the body."""
    op, body = globals()[name], getattr(reference, name)

    def call(first: Tensor, *rest: Any) -> Any:
        plain = type(first) is Tensor and first.device.type == "cpu" and not torch.compiler.is_compiling()
        return (body if plain else op)(first, *rest)

    return call

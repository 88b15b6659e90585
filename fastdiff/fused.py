"""A UNet run through fused operations: a residual block is two launches, and no norm, concatenation, bias or skip has one of its own.

Every convolution writes what the next one reads: its result normalised by the GroupNorm that stands before that one, and beside it the result itself
where a skip needs it. Weights are packed once; scales and shifts are looked up in a table of conditions by the kernel that applies them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import native, ops, reference
from .unet import ResBlock, UNet
from .unet2d import touched

EPS = 1e-5
# Most images are never seen in calibration; twice the largest value seen costs e4m3, a floating-point type, no precision.
HEADROOM = 2.0


class Convolution(nn.Module):
    """One launch: a convolution, what it adds, and the norms of those that read it. Its parameters are the network's own; `pack` copies what they say.

    norms: (GroupNorm, first channel) of each result. raw: y itself is wanted too. modulated: the place of the first result's scales and shifts in a row
    of conditions. shortcut: a convolution of one pixel for what is added. inputs: how many tensors what it reads, or adds, comes in. readers: who reads
    each result. fp8: whether what it reads is e4m3, and whether its results are.
    """

    def __init__(
        self,
        name: str,
        op: str,
        source: nn.Conv2d,
        norms: list[tuple[nn.GroupNorm, int]],
        *,
        raw: bool,
        size: tuple[int, int],
        group: int,
        patch: int = 1,
        stride: int = 1,
        modulated: slice | None = None,
        shortcut: nn.Conv2d | None = None,
        inputs: int = 1,
        readers: tuple[str, ...] = (),
        fp8: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        # Outside of nn.Module's sight: they are the network's, and this module has none.
        self._sources = (source, shortcut, norms)
        self.name, self.op, self.raw, self.size, self.group, self.patch, self.stride = name, op, raw, size, group, patch, stride
        self.modulated, self.readers, self.fp8 = modulated, readers, fp8
        self.channels, self.c_out = source.in_channels, source.out_channels
        self.shortcut, self.inputs = 0 if shortcut is None else shortcut.in_channels, inputs
        self.results = len(norms)
        self.step = 1.0  # what one unit of the e4m3 numbers that it reads stands for
        for buffer in ("weight", "bias", "scale", "skip_weight", "inverse"):
            self.register_buffer(buffer, None, persistent=False)
        for i in range(2 * self.results):
            self.register_buffer(f"norm{i}", None, persistent=False)
        self.weight: Tensor
        self.bias: Tensor
        self.scale: Tensor | None
        self.skip_weight: Tensor | None
        self.inverse: Tensor | None

    def pack(self) -> None:
        """Take up the network's weights."""
        source, shortcut, norms = self._sources
        with torch.inference_mode(False), torch.no_grad():  # or nobody could write to it outside of that mode
            weight = source.weight.permute(0, 2, 3, 1)  # [C', 3, 3, C]
            if self.op == "conv_up":
                weight = reference.up_weight(weight.float()).to(weight.dtype)
            bias = torch.zeros(self.c_out, device=weight.device, dtype=torch.float32) if source.bias is None else source.bias.float()
            if shortcut is not None:
                self._keep("skip_weight", shortcut.weight.flatten(1))
                if shortcut.bias is not None:
                    bias = bias + shortcut.bias.float()
            if self.fp8[0]:
                top = weight.float().abs().amax((1, 2, 3)).clamp(min=1e-12) / reference.FP8_MAX
                weight = reference.to_fp8(weight, 1 / top[:, None, None, None])
                self._keep("scale", top * self.step)
            self._keep("weight", weight)
            self._keep("bias", bias if self.op == "conv_out" else bias[None])
            for i, (norm, first) in enumerate(norms):
                for j, v in enumerate((norm.weight, norm.bias)):
                    self._keep(f"norm{2 * i + j}", v[first : first + self.c_out].float())

    def _keep(self, name: str, value: Tensor) -> None:
        """In the memory where it was before, if there was one: CUDA graphs read that."""
        kept = getattr(self, name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype or kept.device != value.device:
            setattr(self, name, value.clone(memory_format=torch.contiguous_format))
        else:
            kept.copy_(value)

    @property
    def norms(self) -> list[Tensor]:
        return [getattr(self, f"norm{i}") for i in range(2 * self.results)]

    def forward(self, x: list[Tensor], skip: Iterable[Tensor] = (), condition: Tensor | None = None, which: Tensor | None = None) -> Any:
        groups = self.c_out // self.group
        if self.op == "conv_in":
            return ops.conv_in(x[0], self.weight, self.bias, self.norms, self.inverse, self.patch, groups, EPS, self.raw)
        if self.op == "conv_up":
            return ops.conv_up(x[0], self.weight, self.bias, self.norms, self.inverse, groups, EPS, self.raw)
        if self.op == "conv_out":
            return ops.conv_out(x[0], self.weight, self.bias, self.patch)
        style = None if condition is None or self.modulated is None else condition[:, self.modulated]
        return ops.conv3x3(
            x, self.weight, self.bias, self.scale, list(skip), self.skip_weight, self.norms, style, None if style is None else which,
            self.inverse, groups, EPS, self.stride, self.raw,
        )  # fmt: skip

    def flops(self) -> int:
        """Floating-point operations for an image, two per multiply-add."""
        taps = 4 if self.op == "conv_up" else 9
        return 2 * self.size[0] * self.size[1] * self.c_out * (taps * self.channels + self.shortcut)

    def uncovered(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it runs by PyTorch's own operations on that GPU, or None where a kernel does it."""
        groups = self.c_out // self.group if self.results else None
        # The kernel takes each input's channels in steps, and the first convolution all taps of a pixel.
        if self.op == "conv_in":
            read = []
        elif self.shortcut:
            read = [self.channels, self.shortcut // self.inputs]
        else:
            read = [self.channels // self.inputs]
        return ops.uncovered(device, dtype, *self.size, self.c_out, groups, *read, op=self.op)


def fits(model: nn.Module) -> bool:
    """Whether calling it is what UNet says, and no more: no hooks, and no forward or body of a class's, or a module's, own."""
    return isinstance(model, UNet) and type(model).forward is UNet.forward and type(model).body is UNet.body and not touched(model)


class FusedUNet(nn.Module):
    """`model(x, t, labels)` as the given UNet computes it. The weights are the given one's own; a change of them is taken up by `pack`.

    Its numbers are those of the UNet but for rounding: norms, skips and biases are added before a result is rounded to the dtype rather than after.
    `condition` and `body` as the UNet's; `body(x, conditions, which)` takes row which[i] of a table of conditions for image i. fp8: what residual
    blocks convolve is e4m3, by scales that `calibrate` finds; skips, and the other convolutions, keep the dtype. ValueError for other networks.
    """

    hoisted = indexed = True

    def __init__(self, model: UNet, fp8: bool = False) -> None:
        super().__init__()
        if not isinstance(model, UNet):
            raise ValueError(
                f"{type(model).__name__} is not a fastdiff.UNet; of other networks fastdiff.accelerate makes the fused operations' use"
            )
        self._model = [model]  # a list, so that its parameters are not this module's
        self.fp8, self.config = fp8, model.config
        self._stamp: Any = None
        self._kept: list[Tensor] = []
        self.stages = nn.ModuleList(_stages(model, fp8))
        self.pack()

    @property
    def model(self) -> UNet:
        return self._model[0]

    def pack(self) -> None:
        """Take up the UNet's weights, if they have changed, also where `.data` has been written to, of which torch keeps no count."""
        if self._changed([p.detach() for p in self.model.parameters()]):
            for convolution in self.convolutions():
                convolution.pack()

    def _changed(self, weights: list[Tensor]) -> bool:
        if all(w.device.type == "cpu" for w in weights):
            before, self._stamp = self._stamp, native.stamp(weights)
            return bool(before != self._stamp)
        places = [(w.device, w.dtype, w.shape) for w in weights]
        if places == [(w.device, w.dtype, w.shape) for w in self._kept] and not differ(weights, self._kept):
            return False
        self._kept = [w.clone() for w in weights]
        return True

    def convolutions(self) -> list[Convolution]:
        """In the order of their launches."""
        return [module for module in self.modules() if isinstance(module, Convolution)]

    def uncovered(self) -> dict[str, str]:
        """Convolutions that run by PyTorch's own operations on the weights' GPU, with the reason. {} on a CPU, where the reference runs."""
        p = next(self.model.parameters())
        if p.device.type != "cuda":
            return {}
        found = {c.name: c.uncovered(p.device, reference.FP8 if c.fp8[0] else p.dtype) for c in self.convolutions()}
        return {name: reason for name, reason in found.items() if reason is not None}

    def condition(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N] timesteps and [N] labels -> the scales and shifts of every block, [N, K]."""
        return self.model.condition(t, labels)

    def body(self, x: Tensor, condition: Tensor, which: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and [N, K], or [rows, K] with which int64 [N] -> [N, C, H, W], contiguous."""
        h, act = x.contiguous(), x
        skips: list[tuple[Tensor, Tensor]] = []
        for stage in self.stages:
            h, act = stage(h, act, skips, condition, which)  # type: ignore[operator]
        return act

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.body(x, self.condition(t, labels))


def differ(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether any number of the one list is not that of the other, or no number. One wait for the device."""
    off = torch._foreach_norm(torch._foreach_sub(one, two), ord=math.inf)
    return bool(torch.stack([v.float() for v in off]).amax() != 0)


class Resize(nn.Module):
    """The first or the last convolution, or one that changes the size."""

    def __init__(self, convolution: Convolution, reads_result: bool) -> None:
        super().__init__()
        self.convolution, self.reads_result = convolution, reads_result

    def forward(
        self, h: Tensor, act: Tensor, skips: list[tuple[Tensor, Tensor]], condition: Tensor, which: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        found = self.convolution([act if self.reads_result else h])
        return (found, found) if isinstance(found, Tensor) else (found[0], found[-1])


class Block(nn.Module):
    """A residual block. On the way down it leaves its result and a second normalised one for its partner, which takes them on the way up."""

    def __init__(self, first: Convolution, second: Convolution, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = first, second, way

    def forward(
        self, h: Tensor, act: Tensor, skips: list[tuple[Tensor, Tensor]], condition: Tensor, which: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h_before, act_before = skips.pop() if self.way == "up" else (None, None)
        (inside,) = self.first([act] if act_before is None else [act, act_before], (), condition, which)
        found = self.second([inside], [h] if h_before is None else [h, h_before])
        if self.way == "down":
            skips.append((found[0], found[-1]))
            return found[0], found[-2]
        return found[0], found[-1]


def _stages(model: UNet, fp8: bool) -> Iterator[nn.Module]:
    """What stands one after another from image to image, each with the norms of what reads it."""
    config = model.config
    levels, blocks = len(config.channels), config.blocks
    _, height, width = config.shape
    sizes = [(height // config.patch >> i, width // config.patch >> i) for i in range(levels)]
    ends = [0]
    for size in model.sizes:
        ends.append(ends[-1] + size)
    places = iter([slice(a, b) for a, b in itertools.pairwise(ends)])

    # (kind, module, level, name) of all, so that each can look at what comes next.
    down = [
        entry
        for i in range(levels)
        for entry in (
            *([("shrink", model.shrink[i - 1], i, f"shrink.{i - 1}")] if i else []),
            *(("down", model.down[i * blocks + j], i, f"down.{i * blocks + j}") for j in range(blocks)),
        )
    ]
    middle = [("middle", block, levels - 1, f"middle.{j}") for j, block in enumerate(model.middle)]
    up = [
        entry
        for k, i in enumerate(reversed(range(levels)))
        for entry in (
            *([("grow", model.grow[k - 1], i, f"grow.{k - 1}")] if k else []),
            *(("up", model.up[k * blocks + j], i, f"up.{k * blocks + j}") for j in range(blocks)),
        )
    ]
    chain: list[tuple[str, Any, int, str]] = [("stem", model.stem, 0, "stem"), *down, *middle, *up, ("head", model.head, 0, "head")]
    partners = iter([(block, name) for kind, block, _, name in reversed(chain) if kind == "up"])

    for (kind, module, level, name), (after, reader, _, following) in zip(chain, [*chain[1:], ("", None, 0, "")], strict=True):
        norms: list[tuple[nn.GroupNorm, int]] = []
        readers: tuple[str, ...] = ()
        if after == "head":
            norms, readers = [(model.norm, 0)], ("head",)
        elif isinstance(reader, ResBlock):
            norms, readers = [(reader.norm1, 0)], (f"{following}.conv1",)
        to_fp8 = fp8 and isinstance(reader, ResBlock)
        common: dict[str, Any] = {"raw": after != "head", "size": sizes[level], "group": config.group}
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "stem": ("conv_in", {"patch": config.patch}), "shrink": ("conv3x3", {"stride": 2}), "grow": ("conv_up", {})
        }  # fmt: skip
        if kind in ("stem", "shrink", "grow"):
            op, extra = kinds[kind]
            yield Resize(Convolution(name, op, module, norms, readers=readers, fp8=(False, to_fp8), **common, **extra), reads_result=False)
        elif kind == "head":
            yield Resize(Convolution(name, "conv_out", module, [], **common | {"raw": True}, patch=config.patch), reads_result=True)
        else:
            if kind == "down":
                # The second half of what the partner's norm sees.
                partner, which = next(partners)
                norms, readers = [*norms, (partner.norm1, config.channels[level])], (*readers, f"{which}.conv1")
            inputs = 2 if kind == "up" else 1
            first = Convolution(
                f"{name}.conv1", "conv3x3", module.conv1, [(module.norm2, 0)], modulated=next(places), inputs=inputs,
                readers=(f"{name}.conv2",), fp8=(fp8, fp8), **common | {"raw": False},
            )  # fmt: skip
            shortcut = module.skip if isinstance(module.skip, nn.Conv2d) else None
            second = Convolution(
                f"{name}.conv2", "conv3x3", module.conv2, norms, shortcut=shortcut, inputs=inputs, readers=readers,
                fp8=(fp8, fp8 and bool(norms) and after != "head"), **common,
            )  # fmt: skip
            yield Block(first, second, kind if kind in ("down", "up") else "middle")


def calibrate(fused: FusedUNet, run: Callable[[FusedUNet], object]) -> FusedUNet:
    """A network like the given one in fp8, with fixed scales: e4m3 holds HEADROOM times the largest that residual blocks read during `run`.

    run: is given the network, and samples from it, say.
    """
    largest: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any) -> None:
        assert isinstance(module, Convolution)
        for v in args[0]:
            top = v.detach().abs().amax().float()
            largest[module.name] = torch.maximum(largest[module.name], top) if module.name in largest else top

    handles = [convolution.register_forward_pre_hook(hook) for convolution in fused.convolutions()]
    try:
        run(fused)
    finally:
        for handle in handles:
            handle.remove()
    quantised = FusedUNet(fused.model, fp8=True)
    for convolution in quantised.convolutions():
        # Where nothing but zeros was read, by norms that begin as 0, any scale will do.
        convolution.step = (float(largest[convolution.name]) or 1.0) * HEADROOM / reference.FP8_MAX
    steps = {convolution.name: convolution.step for convolution in quantised.convolutions()}
    for convolution in quantised.convolutions():
        if convolution.fp8[1]:
            inverse = [1 / steps[name] for name in convolution.readers]
            convolution.inverse = torch.tensor(inverse, device=convolution.weight.device, dtype=torch.float32)
        convolution.pack()
    return quantised

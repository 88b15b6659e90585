"""The network: a small class-conditional UNet that predicts noise, x_0 or v from a noisy image and its timestep."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A file may ask for any network, and one is laid out before the file's tensors are compared with it.
MAX_SIZE = 1 << 16  # of every single number
MAX_BLOCKS = 256  # residual blocks in all; the largest published UNets have some 40


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. `channels` has one width per resolution, each half the size of the one before.

    The image is folded `patch` x `patch` pixels to a channel vector first (space-to-depth), so 16 x 16 x 3 is worked on as
    8 x 8 x 12: matrix units and vector lanes are better filled by wide channels than by many pixels. `blocks` residual blocks stand
    at each resolution on the way down and again on the way up, `middle` between them. GroupNorm groups have `group` channels.
    ValueError for what makes no network, or one of more than 256 blocks, or of a side, width, folded pixel or number of classes above 2^16.
    """

    shape: tuple[int, int, int] = (3, 16, 16)
    patch: int = 2
    channels: tuple[int, ...] = (64, 128)
    blocks: int = 1
    middle: int = 2
    embedding: int = 256
    group: int = 8
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("shape", "channels"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a list of whole numbers")
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "channels", tuple(self.channels))
        numbers = (*self.shape, self.patch, *self.channels, self.blocks, self.embedding, self.group)
        if len(self.shape) != 3 or not self.channels or not all(type(v) is int and v > 0 for v in numbers):
            raise ValueError("a UNetConfig needs shape (C, H, W), at least one channel width, and positive whole numbers throughout")
        if (
            type(self.middle) is not int
            or self.middle < 0
            or not (self.num_classes is None or (type(self.num_classes) is int and self.num_classes > 0))
        ):
            raise ValueError("a UNetConfig needs middle >= 0 and num_classes None or at least 1")
        sizes = {
            "a side or channel of shape": max(self.shape), "channels": max(self.channels), "embedding": self.embedding,
            "num_classes": self.num_classes or 0, "shape[0] x patch^2": self.shape[0] * self.patch**2,
        }  # fmt: skip
        for name, value in sizes.items():
            if value > MAX_SIZE:
                raise ValueError(f"{name} is {value}; it can be at most {MAX_SIZE}")
        if 2 * self.blocks * len(self.channels) + self.middle > MAX_BLOCKS:
            raise ValueError(
                f"{2 * self.blocks * len(self.channels) + self.middle} residual blocks; a network can have at most {MAX_BLOCKS}"
            )
        fold = self.patch * 2 ** (len(self.channels) - 1)
        if self.shape[1] % fold or self.shape[2] % fold:
            raise ValueError(f"image size {self.shape[1]} x {self.shape[2]} must be a multiple of {fold} (patch x 2^(levels - 1))")
        if any(c % self.group for c in self.channels) or self.embedding % 4:
            raise ValueError(f"every width in channels {self.channels} must be a multiple of group {self.group}, embedding of 4")

    @property
    def config(self) -> dict[str, Any]:
        """Plain JSON values; `UNetConfig.from_config` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_config(config: dict[str, Any]) -> UNetConfig:
        unknown = set(config) - {f.name for f in fields(UNetConfig)}
        if unknown:
            raise ValueError(f"unknown network setting {', '.join(sorted(unknown))}")
        return UNetConfig(**config)


def timestep_embedding(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of t at frequencies 10000^(-i / (size / 2)), fp32 [N, size] (Vaswani et al. 2017, section 3.5). t: [N]."""
    frequency = torch.exp(torch.arange(size // 2, device=t.device, dtype=torch.float32) * (-math.log(10000) / (size // 2)))
    angle = t.float()[:, None] * frequency  # [N, size / 2]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def embedding(rows: int, size: int) -> nn.Embedding:
    """nn.Embedding(rows, size). On the meta device, where its normal numbers would be none, drawing them imports torch's compiler: a second."""
    weight = torch.empty(rows, size)
    return nn.Embedding(rows, size, _weight=weight if weight.is_meta else nn.init.normal_(weight))


def norm_silu(norm: nn.GroupNorm, x: Tensor, style: Tensor | None = None) -> Tensor:
    """silu(norm(x) (1 + scale) + shift) of x [N, C, H, W] and style [N, 2 C], scale then shift, or None for neither."""
    h: Tensor = norm(x)
    if style is not None:
        scale, shift = style[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, h, 1 + scale)
    return F.silu(h)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) * (1 + scale) + shift)): scale and shift, the style, say which timestep and class it is. Channels that
    stand beside those of x are taken after them."""

    norm_silu = staticmethod(norm_silu)  # `cpu` has another

    def __init__(self, c_in: int, c_out: int, group: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(c_in // group, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(c_out // group, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        # Zero: every block starts as its skip alone (Goyal et al. 2017), and the network as zero.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, style: Tensor, beside: Tensor | None = None) -> Tensor:
        if beside is not None:
            x = torch.cat([x, beside], dim=1)
        h = self.conv1(self.norm_silu(self.norm1, x))  # [N, c_out, H, W]
        out: Tensor = self.skip(x) + self.conv2(self.norm_silu(self.norm2, h, style))
        return out


class UNet(nn.Module):
    """`model(x, t, labels)` -> a prediction of x's shape.

    x: [N, C, H, W]. t: timesteps, [N], any number type. labels: int64 [N] in 0 .. num_classes, where num_classes is the null class
    ("any class"), which guidance needs; None means the null class for all. Everything that depends on timestep and class alone is
    `condition(t, labels)`, [N, K], so a sampler may compute it once for all rows and call `body(x, condition)`.
    """

    hoisted = True
    norm_silu = staticmethod(norm_silu)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c, e = config.channels, config.embedding
        folded = config.shape[0] * config.patch**2
        levels = range(len(c))
        self.time = nn.Sequential(nn.Linear(e // 2, e), nn.SiLU(), nn.Linear(e, e))
        self.label = embedding(config.num_classes + 1, e) if config.num_classes else None
        self.stem = nn.Conv2d(folded, c[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(c[i], c[i], config.group) for i in levels for _ in range(config.blocks))
        self.shrink = nn.ModuleList(nn.Conv2d(c[i], c[i + 1], 3, stride=2, padding=1) for i in levels[:-1])
        self.middle = nn.ModuleList(ResBlock(c[-1], c[-1], config.group) for _ in range(config.middle))
        self.up = nn.ModuleList(ResBlock(2 * c[i], c[i], config.group) for i in reversed(levels) for _ in range(config.blocks))
        self.grow = nn.ModuleList(nn.Conv2d(c[i + 1], c[i], 3, padding=1) for i in reversed(levels[:-1]))
        self.norm = nn.GroupNorm(c[0] // config.group, c[0])
        self.head = nn.Conv2d(c[0], folded, 3, padding=1)
        # All scales and shifts of all blocks in one matrix product.
        self.sizes = [2 * block.norm2.num_channels for block in (*self.down, *self.middle, *self.up)]
        self.modulation = nn.Linear(e, sum(self.sizes))
        for zero in (self.head, self.modulation):
            for p in zero.parameters():
                nn.init.zeros_(p)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def condition(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N] timesteps and [N] labels -> the scales and shifts of every block, [N, K]."""
        e = self.time(timestep_embedding(t, self.config.embedding // 2).to(self.modulation.weight.dtype))
        if self.label is not None:
            e = e + (self.label.weight[-1] if labels is None else self.label(labels))
        scales: Tensor = self.modulation(F.silu(e))
        return scales

    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """[N, C, H, W] and [N, K] -> [N, C, H, W], contiguous."""
        blocks = self.config.blocks
        styles = iter(torch.split(condition, self.sizes, dim=1))
        x = F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(x)
        skips = []
        for i, block in enumerate(self.down):
            if i and i % blocks == 0:
                h = self.shrink[i // blocks - 1](h)
            h = block(h, next(styles))
            skips.append(h)
        for block in self.middle:
            h = block(h, next(styles))
        for i, block in enumerate(self.up):
            if i and i % blocks == 0:
                h = self.grow[i // blocks - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = block(h, next(styles), skips.pop())
        return F.pixel_shuffle(self.head(self.norm_silu(self.norm, h)), self.config.patch).contiguous()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.body(x, self.condition(t, labels))

    def flops(self) -> int:
        """Floating-point operations of the convolutions of one evaluation of one image, two per multiply-add."""
        sizes: list[int] = []
        hooks = [
            m.register_forward_hook(lambda m, _, y: sizes.append(2 * y[0, 0].numel() * m.weight.numel()))
            for m in self.modules()
            if isinstance(m, nn.Conv2d)
        ]
        with torch.no_grad():
            x = next(self.parameters()).new_zeros(1, *self.config.shape)
            self(x, x.new_zeros(1))
        for hook in hooks:
            hook.remove()
        return sum(sizes)

"""A network as a CPU runs it the fastest: convolutions of 3 x 3 with a quarter of the multiplications (Winograd 1980; Lavin & Gray 2016,
F(4 x 4, 3 x 3)), and GroupNorm, scale, shift and SiLU in one pass over an image.

    y = A^T [(G w G^T) * (B^T x B)] A

where x is 6 x 6 pixels for 4 x 4 of y, and the product in the middle is one of channels for each of 36 places: 36 matrix products, of all tiles of
all images. With the outer transforms in C (`native`) that is 1.6 to 1.9 times as fast as the direct convolution for 64 images of 64 to 256 channels
(benchmarks/bench_cpu.py), of any size that 4 divides. Without a C compiler they are matrix products, too, which pay on images of 4 x 4 pixels alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import native, ops, reference, unet

# Fewer channels leave the products too small to pay for the transforms.
LEAST_CHANNELS = 64
# Weights are four times as many numbers as those of a direct convolution. Fewer images, unless they are large, do not pay for reading them.
LEAST_IMAGES, LEAST_TILES = 16, 256


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with one pixel of zeros around, of the given one's parameters: fast where 4 divides the image's sides and the images are
    not few (without C: where the sides are 4), else as it was.

    What it computes from the weights is as they were at the last `pack`. Errors are some ten times those of a direct convolution in fp32:
    1e-5 of the largest value.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.direct = convolution
        self.native = _in_c(convolution)
        # The columns of B^T that only ever meet the border of zeros are left out.
        bt, at = torch.tensor(reference.WINOGRAD_BT)[:, 1:5], torch.tensor(reference.WINOGRAD_AT)
        self.register_buffer("before", torch.einsum("ap,bq->abpq", bt, bt).reshape(36, 16).float(), persistent=False)
        self.register_buffer("after", torch.einsum("pa,qb->pqab", at, at).reshape(16, 36).float(), persistent=False)
        self.register_buffer("packed", None, persistent=False)
        self.stamp: tuple[int, int] | None = None
        self.before: Tensor
        self.after: Tensor
        self.packed: Tensor

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.stride == module.dilation == (1, 1)
            and module.padding == (1, 1)
            and module.padding_mode == "zeros"
            and module.groups == 1
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
            and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
        )

    def pack(self) -> None:
        """Take up the weights, if they have changed."""
        weight = self.direct.weight
        stamp = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        if stamp != self.stamp:
            with torch.no_grad():
                self.packed = reference.winograd_weight(weight)
            self.stamp = stamp

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.native and _tiled(x) and not torch.is_grad_enabled():
            # The dispatcher is for the compiler; without it a call is the sooner there.
            convolve = ops.winograd_conv3x3 if torch.compiler.is_compiling() else native.winograd_conv3x3
            made: Tensor = convolve(x, self.packed, self.direct.bias)
        elif self.native or (h, w) != (4, 4):
            made = self.direct(x)
        else:
            pixels = x.permute(0, 2, 3, 1).reshape(n, 16, c)
            places = torch.matmul(self.before, pixels).transpose(0, 1)  # [36, N, C]
            made = torch.matmul(self.after, torch.bmm(places, self.packed).transpose(0, 1))  # [N, 16, C']
            if self.direct.bias is not None:
                made = made + self.direct.bias
            made = made.reshape(n, 4, 4, self.direct.out_channels).permute(0, 3, 1, 2)
        return made


def _in_c(convolution: nn.Conv2d) -> bool:
    """Of convolutions that fit otherwise."""
    return convolution.in_channels % native.LANES == convolution.out_channels % native.LANES == 0 and native.available()


def _tiled(x: Tensor) -> bool:
    """Whether images divide into tiles, and into enough of them."""
    n, _, h, w = x.shape
    return h % 4 == w % 4 == 0 and (n >= LEAST_IMAGES or n * h * w >= 16 * LEAST_TILES)


def _plainly() -> bool:
    """Whether operations are to be PyTorch's own: where a gradient is kept. A compiler's are as fast, and take in what stands around them."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def norm_silu(norm: nn.GroupNorm, x: Tensor, style: Tensor | None = None) -> Tensor:
    """`unet.norm_silu`, in one pass."""
    if _plainly() or not native.covers(x, x.shape[1]):
        return unet.norm_silu(norm, x, style)
    made = native.group_norm_silu(x.permute(0, 2, 3, 1), native.Norm(norm.weight, norm.bias, norm.num_groups, norm.eps, style))
    return made.permute(0, 3, 1, 2)


class FusedResBlock(nn.Module):
    """A `unet.ResBlock` of two convolutions in C, whose images go from one matrix product to the next within the cache."""

    def __init__(self, block: unet.ResBlock) -> None:
        super().__init__()
        self.block = block

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return type(module) is unet.ResBlock and all(WinogradConv2d.fits(conv) and _in_c(conv) for conv in (module.conv1, module.conv2))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        block = self.block
        if _plainly() or not _tiled(x) or not native.covers(x):
            made: Tensor = block(x, style)
            return made
        stages: list[tuple[nn.GroupNorm, Any, Tensor | None]] = [(block.norm1, block.conv1, None), (block.norm2, block.conv2, style)]
        parts = [
            (native.Norm(norm.weight, norm.bias, norm.num_groups, norm.eps, own), conv.packed, conv.direct.bias)
            for norm, conv, own in stages
        ]
        return native.residual_block(x, parts, block.skip(x))


def faster(model: nn.Module) -> nn.Module:
    """The model, in eval mode, with its fitting convolutions replaced, and the norms and blocks of fastdiff's own networks; its parameters and buffers
    are the given one's own. The model itself where there is nothing to replace."""
    if not any(WinogradConv2d.fits(module) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if WinogradConv2d.fits(child):
                setattr(parent, name, WinogradConv2d(child))  # type: ignore[arg-type]
            elif FusedResBlock.fits(child):
                setattr(parent, name, FusedResBlock(child))  # type: ignore[arg-type]
        if hasattr(parent, "norm_silu"):
            parent.norm_silu = norm_silu  # type: ignore[assignment]
    return twin.eval()


def pack(model: nn.Module) -> None:
    """Let every replaced convolution of a model take up its weights."""
    for module in model.modules():
        if isinstance(module, WinogradConv2d):
            module.pack()

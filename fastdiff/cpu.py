"""A network as a CPU runs it the fastest: convolutions of 3 x 3 with a quarter of the multiplications (Winograd 1980; Lavin & Gray 2016,
F(4 x 4, 3 x 3)), and a residual block's norms, convolutions and sum in one call.

    y = A^T [(G w G^T) * (B^T x B)] A

where x is 6 x 6 pixels for 4 x 4 of y, and the product in the middle is one of channels for each of 36 places: 36 matrix products, of all tiles of
all images. In C (`native`) that is twice as fast as the direct convolution (benchmarks/bench_cpu.py), of any size that 4 divides, and an
image's bits do not depend on what other images there are. Without a C compiler all are matrix products of PyTorch's, which pay on images of 4 x 4
pixels alone. Where a processor has tiles for bf16, and bf16 is asked for, convolutions are direct, and faster yet (docs/network.md).
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native, ops, reference, unet, unet2d

# Without C, fewer channels leave the products too small to pay for the transforms.
LEAST_CHANNELS = 64


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with one pixel of zeros around, of the given one's parameters: fast where 4 divides the image's sides (without C: where they
    are 4), else as it was. In C, where channels are filled up with zeros to what its vectors take, the bits of an image do not depend on how many there
    are.

    What it computes from the weights is as they were at the last `pack`. Errors are some ten times those of a direct convolution in fp32:
    1e-5 of the largest value.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.direct = convolution
        self.native = native.available()
        # Channels that are wanting, of what comes in and of what goes out.
        self.wanting = (-convolution.in_channels % native.LANES, -convolution.out_channels % native.WIDE) if self.native else (0, 0)
        # The columns of B^T that only ever meet the border of zeros are left out.
        bt, at = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in (reference.WINOGRAD_BT, reference.WINOGRAD_AT))
        bt = bt[:, 1:5]
        self.register_buffer("before", torch.einsum("ap,bq->abpq", bt, bt).reshape(36, 16).float(), persistent=False)
        self.register_buffer("after", torch.einsum("pa,qb->pqab", at, at).reshape(16, 36).float(), persistent=False)
        self.register_buffer("packed", None, persistent=False)
        self.block: native.Block
        self.bias: Tensor | None
        self.before: Tensor
        self.after: Tensor
        self.packed: Tensor

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        return (
            _plain3x3(module)
            and module.stride == (1, 1)
            and (native.available() or min(module.in_channels, module.out_channels) >= LEAST_CHANNELS)
        )

    def pack(self) -> None:
        """Take up the weights."""
        comes, goes = self.wanting
        weight = F.pad(self.direct.weight.detach(), (0, 0, 0, 0, 0, comes, 0, goes))
        self.bias = None if self.direct.bias is None else F.pad(self.direct.bias.detach(), (0, goes))
        self.packed = reference.winograd_weight(weight) if self.native else reference.winograd_matrices(weight)
        if self.native:
            self.block = native.Block([self.layer()], alone=True)

    def layer(self, norm: nn.GroupNorm | None = None) -> native.Layer:
        """The convolution after a norm, as C runs it."""
        return native.Layer(None if norm is None else _norm(norm), self.packed, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        compiling, (comes, goes) = torch.compiler.is_compiling(), self.wanting
        if self.native and _tiled(x) and not torch.is_grad_enabled() and not (compiling and (comes or goes)):
            if compiling:
                made: Tensor = ops.winograd_conv3x3(x, self.packed, self.bias)
            else:
                made = self.block(F.pad(x, (0, 0, 0, 0, 0, comes)) if comes else x)
                made = made[:, : self.direct.out_channels] if goes else made
        elif self.native or x.ndim != 4 or x.shape[2:] != (4, 4):
            made = self.direct(x)
        else:
            n, c = x.shape[:2]
            pixels = x.permute(0, 2, 3, 1).reshape(n, 16, c)
            places = torch.matmul(self.before, pixels).transpose(0, 1)  # [36, N, C]
            made = torch.matmul(self.after, torch.bmm(places, self.packed).transpose(0, 1))  # [N, 16, C']
            if self.direct.bias is not None:
                made = made + self.direct.bias
            made = made.reshape(n, 4, 4, self.direct.out_channels).permute(0, 3, 1, 2)
        return made


class StridedConv2d(nn.Module):
    """A 3 x 3 convolution of every second pixel with one of zeros around, of the given one's parameters, in C: the bits of an image do not depend on
    how many there are. What it computes from the weights is as they were at the last `pack`."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.direct = convolution
        self.register_buffer("packed", None, persistent=False)
        self.packed: Tensor

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        return _plain3x3(module) and module.stride == (2, 2) and module.out_channels % native.WIDE == 0 and native.available()

    def pack(self) -> None:
        """Take up the weights."""
        self.packed = reference.conv_weight(self.direct.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if _plainly() or x.ndim != 4 or not native.covers(x):
            made: Tensor = self.direct(x)
            return made
        return native.conv3x3(x, self.packed, self.direct.bias, 2)


class TiledConv2d(nn.Module):
    """A 3 x 3 convolution of every pixel, or every second, with one of zeros around, of the given one's parameters, by a processor's tiles (AMX): what
    is multiplied is bf16, sums are fp32. Channels are filled up with zeros; the bits of an image do not depend on how many there are. What it computes
    from the weights is as they were at the last `pack`."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.direct = convolution
        self.wanting = -convolution.in_channels % native.DEEP, -convolution.out_channels % native.WIDE
        self.register_buffer("packed", None, persistent=False)
        self.block: native.Block
        self.bias: Tensor | None
        self.packed: Tensor

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return _plain3x3(module) and module.stride in ((1, 1), (2, 2)) and native.has_tiles()

    def pack(self) -> None:
        """Take up the weights."""
        comes, goes = self.wanting
        self.bias = None if self.direct.bias is None else F.pad(self.direct.bias.detach(), (0, goes))
        self.packed = reference.tiled_weight(F.pad(self.direct.weight.detach(), (0, 0, 0, 0, 0, comes, 0, goes)))
        self.block = native.Block([self.layer()], alone=True)

    def layer(self, norm: nn.GroupNorm | None = None) -> native.Layer:
        """The convolution after a norm, as C runs it."""
        return native.Layer(None if norm is None else _norm(norm), self.packed, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        comes, goes = self.wanting
        if _plainly() or x.ndim != 4 or not native.covers(x):
            made: Tensor = self.direct(x)
            return made
        made = self.block(F.pad(x, (0, 0, 0, 0, 0, comes)) if comes else x)
        made = made[:, : self.direct.out_channels] if goes else made
        step = self.direct.stride[0]
        return made if step == 1 else made[:, :, ::step, ::step].contiguous(memory_format=torch.channels_last)


class PairedConv2d(nn.Conv2d):
    """A convolution of the library's that gives a single image the bits that it has among others: two of it are what the library is given. For one it
    sums in another order."""

    def forward(self, x: Tensor) -> Tensor:
        single = x.ndim == 4 and len(x) == 1 and not _plainly()
        return super().forward(x.expand(2, -1, -1, -1))[:1] if single else super().forward(x)


def _plain3x3(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether it is a 3 x 3 convolution, of any stride, with one pixel of zeros around, in fp32 on the CPU."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.dilation == (1, 1)
        and module.padding == (1, 1)
        and module.padding_mode == "zeros"
        and module.groups == 1
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    )


def _aligned(convolution: nn.Module, tiled: bool) -> bool:
    """Whether C does it with no channels filled up."""
    kind, unit = (TiledConv2d, native.DEEP) if tiled else (WinogradConv2d, native.LANES)
    if not kind.fits(convolution) or not native.available():  # type: ignore[attr-defined]
        return False
    assert isinstance(convolution, nn.Conv2d)
    return convolution.in_channels % unit == convolution.out_channels % native.WIDE == 0


def _norm(norm: nn.GroupNorm) -> native.Norm:
    return native.Norm(norm.weight, norm.bias, norm.num_groups, norm.eps)


def _tiled(x: Tensor) -> bool:
    """Whether these are images, in fp32, that divide into tiles."""
    return x.ndim == 4 and x.dtype == torch.float32 and x.shape[2] % 4 == x.shape[3] % 4 == 0


def _plainly() -> bool:
    """Whether operations are to be PyTorch's own: where a gradient is kept. A compiler's are as fast, and take in what stands around them."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def norm_silu(norm: nn.GroupNorm, x: Tensor, style: Tensor | None = None) -> Tensor:
    """`unet.norm_silu`, in one pass."""
    if _plainly() or not native.covers(x, x.shape[1]):
        return unet.norm_silu(norm, x, style)
    made = native.group_norm_silu(x.permute(0, 2, 3, 1), _norm(norm), style)
    return made.permute(0, 3, 1, 2)


class FusedResBlock(nn.Module):
    """A residual block, `unet.ResBlock` or `unet2d.Resnet`, in one call into C: norms, convolutions and what is added, of an image in the cache."""

    def __init__(self, block: unet.ResBlock | unet2d.Resnet, tiled: bool = False) -> None:
        super().__init__()
        self.block, self.tiled = block, tiled
        self.native: native.Block
        if isinstance(block, unet2d.Resnet):
            self.time_emb_proj = block.time_emb_proj  # which makes the style

    @staticmethod
    def fits(module: Any, tiled: bool = False) -> bool:
        return (
            type(module) in (unet.ResBlock, unet2d.Resnet)
            and all(_aligned(conv, tiled) for conv in (module.conv1, module.conv2))
            and module.norm1.weight.dtype == module.norm2.weight.dtype == torch.float32
        )

    def pack(self) -> None:
        """Take up the weights, once the convolutions have."""
        block = self.block
        layers = [conv.layer(norm) for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2))]  # type: ignore[operator]
        if isinstance(block, unet2d.Resnet):
            shortcut, factor, added = getattr(block, "conv_shortcut", None), block.factor, not block.scaled
        else:
            shortcut, factor, added = block.skip if isinstance(block.skip, nn.Conv2d) else None, 1.0, False
        skip = None
        if shortcut is not None:
            matrix = shortcut.weight.detach()[:, :, 0, 0].t().float()
            skip = reference.tiles(matrix) if self.tiled else reference.panels(matrix)
            layers[1] = layers[1]._replace(bias=layers[1].bias + shortcut.bias)
        self.native = native.Block(layers, skip=skip, times=1 / factor, added=added)

    def forward(self, x: Tensor, style: Tensor, beside: Tensor | None = None) -> Tensor:
        if _plainly() or not native.covers(x) or not self.native.takes(x):
            made: Tensor = self.block(x, style, beside)
            return made
        return self.native(x, beside, style)


def known(model: nn.Module) -> bool:
    """Whether it is one of fastdiff's own networks, and as that was made. Of any other a copy might lose what its Python says: hooks, attributes that
    change, modules of one's own."""
    own = (unet.__name__, unet2d.__name__, "torch.nn.modules.")
    return (
        type(model) in (unet.UNet, unet2d.UNet2D)
        and not unet2d.touched(model)
        and all(type(m).__module__.startswith(own) for m in model.modules())
    )


def faster(model: nn.Module, tiled: bool = False) -> nn.Module:
    """The model, in eval mode, with its fitting convolutions replaced, and the norms and blocks of fastdiff's own networks; its parameters and buffers
    are the given one's own. The model itself where there is nothing to replace. tiled: by `TiledConv2d`, whose factors are bf16."""
    kinds: tuple[Any, ...] = (TiledConv2d,) if tiled else (WinogradConv2d, StridedConv2d)
    if not any(kinds[0].fits(module) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    replaced: dict[nn.Module | None, nn.Module] = {}  # a module may stand in several places
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or child in replaced:
                pass
            elif replace := next((kind for kind in kinds if kind.fits(child)), None):
                if replace is not StridedConv2d:
                    child.__class__ = PairedConv2d
                replaced[child] = replace(child)
            elif FusedResBlock.fits(child, tiled):
                replaced[child] = FusedResBlock(child, tiled)  # type: ignore[arg-type]
            elif type(child) is nn.Conv2d and child.kernel_size != (1, 1):
                child.__class__ = PairedConv2d
            if child in replaced:
                setattr(parent, name, replaced[child])
        if hasattr(parent, "norm_silu"):
            parent.norm_silu = norm_silu  # type: ignore[assignment]
    return twin.eval()


def shared(model: nn.Module) -> bool:
    """Whether cores can share a call of a model, or of what `faster` makes of it: see `native.team`."""
    replaced = (WinogradConv2d, StridedConv2d)
    return native.available() and any(
        isinstance(module, replaced) or any(kind.fits(module) for kind in replaced) for module in model.modules()
    )


def pack(model: nn.Module) -> None:
    """Let every replaced convolution and block of a model take up its weights."""
    modules = [*model.modules()]
    for kinds in ((WinogradConv2d, StridedConv2d, TiledConv2d), (FusedResBlock,)):  # what a block has before itself
        for module in modules:
            if isinstance(module, kinds):
                module.pack()  # type: ignore[operator]

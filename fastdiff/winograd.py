"""Convolutions of 4 x 4 pixels on a CPU, with a quarter of the multiplications (Winograd 1980; Lavin & Gray 2016, F(4 x 4, 3 x 3)).

    y = A^T [(G w G^T) * (B^T x B)] A

where x is an image of 4 x 4 within its border of zeros. All three transforms are matrix products here, and the product in the middle is one of
channels for each of 36 places. Measured on one core, 128 to 256 channels, 32 to 64 images: 1.5 to 1.7 times as fast as the direct
convolution. Larger images are left alone: their transforms cost as much as is saved.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# Fewer channels leave the products too small to pay for the transforms.
LEAST_CHANNELS = 64

# Lavin & Gray 2016, section 4.3; the columns of B^T that only ever meet the border of zeros are left out.
_BT = [[0, -5, 0, 1], [-4, -4, 1, 1], [4, -4, -1, 1], [-2, -1, 2, 1], [2, -1, -2, 1], [4, 0, -5, 0]]
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_AT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with one pixel of zeros around, of the given one's parameters: fast where the image is 4 x 4, else as it was.

    What it computes from the weights is as they were at the last `pack`. Errors are some ten times those of a direct convolution in fp32:
    1e-5 of the largest value.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.direct = convolution
        g, bt, at = (torch.tensor(v, dtype=torch.float64) for v in (_G, _BT, _AT))
        self.register_buffer("g", g, persistent=False)
        self.register_buffer("before", torch.einsum("ap,bq->abpq", bt, bt).reshape(36, 16).float(), persistent=False)
        self.register_buffer("after", torch.einsum("pa,qb->pqab", at, at).reshape(16, 36).float(), persistent=False)
        self.register_buffer("packed", None, persistent=False)
        self.stamp: tuple[int, int] | None = None
        self.before: Tensor
        self.after: Tensor
        self.packed: Tensor
        self.g: Tensor

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.stride == module.dilation == (1, 1)
            and module.padding == (1, 1)
            and module.padding_mode == "zeros"
            and module.groups == 1
            and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
        )

    def pack(self) -> None:
        """Take up the weights, if they have changed."""
        weight = self.direct.weight
        stamp = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        if stamp != self.stamp:
            with torch.no_grad():
                moved = torch.einsum("ia,jb,ocab->ijco", self.g, self.g, weight.double())
                self.packed = moved.reshape(36, *moved.shape[2:]).float().contiguous()
            self.stamp = stamp

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (4, 4):
            out: Tensor = self.direct(x)
            return out
        n, c = x.shape[:2]
        pixels = x.permute(0, 2, 3, 1).reshape(n, 16, c)
        places = torch.matmul(self.before, pixels).transpose(0, 1)  # [36, N, C]
        made = torch.matmul(self.after, torch.bmm(places, self.packed).transpose(0, 1))  # [N, 16, C']
        if self.direct.bias is not None:
            made = made + self.direct.bias
        return made.reshape(n, 4, 4, self.direct.out_channels).permute(0, 3, 1, 2)


def with_winograd(model: nn.Module) -> nn.Module:
    """The model, in eval mode, with its fitting convolutions replaced; its parameters and buffers are the given one's own. The model itself where
    there is nothing to replace."""
    if not any(WinogradConv2d.fits(module) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if WinogradConv2d.fits(child):
                setattr(parent, name, WinogradConv2d(child))  # type: ignore[arg-type]
    return twin.eval()


def pack(model: nn.Module) -> None:
    """Let every replaced convolution of a model take up its weights."""
    for module in model.modules():
        if isinstance(module, WinogradConv2d):
            module.pack()

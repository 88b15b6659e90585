"""diffusers' UNet2DModel, natively: the same arithmetic and the same names of weights, with what depends on the timestep alone computed apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import MAX_BLOCKS, MAX_SIZE, embedding, norm_silu

# What a setting has to be, where UNet2DModel knows more than is computed here.
ONLY: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_padding": (0, 1),
    "num_train_timesteps": (None,),
}
# Whole numbers: the least that they may be, and whether None stands for a default.
WHOLE = {
    "in_channels": (1, False), "out_channels": (1, False), "time_embedding_dim": (0, True), "freq_shift": (-MAX_SIZE, False),
    "layers_per_block": (1, False), "downsample_padding": (0, False), "attention_head_dim": (1, True), "norm_num_groups": (1, False),
    "attn_norm_num_groups": (0, True), "num_class_embeds": (1, True),
}  # fmt: skip
SWITCHES = ("center_input_sample", "flip_sin_to_cos", "add_attention")
FRACTIONS = ("mid_block_scale_factor", "dropout", "norm_eps")


@dataclass(frozen=True)
class UNet2DConfig:
    """The settings of UNet2DModel, by its names and defaults. ValueError for what is not computed here: other blocks than the (attention) blocks
    DownBlock2D, AttnDownBlock2D, UpBlock2D, AttnUpBlock2D, and what ONLY lists. dropout is for training and has no effect.

    num_class_embeds: embeddings of classes, of which the last doubles as the null class, so that `num_classes` is one less. A single embedding
    leaves no class to choose: `num_classes` is None. ValueError, too, for more than 256 residual blocks and for numbers above 2^16.
    """

    sample_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            kind = int if name == "block_out_channels" else str
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(type(v) is kind for v in given):
                raise ValueError(f"{name}={given!r} must be a list of {'whole numbers' if kind is int else 'names'}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        if self.sample_size is None:
            raise ValueError("a UNet2DModel with sample_size=None does not say how large its images are; give its sample_size")
        for name, known in ONLY.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"a UNet2DModel with {name}={getattr(self, name)!r} is not covered; {name} must be {' or '.join(map(repr, known))}"
                )
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
        for name, allowed in blocks.items():
            types = getattr(self, name)
            if unknown := sorted(set(types) - set(allowed)):
                raise ValueError(f"a UNet2DModel with blocks {', '.join(unknown)} is not covered; {name} may be {' and '.join(allowed)}")
            if len(types) != len(self.block_out_channels) or not types:
                raise ValueError(f"{len(types)} {name} for {len(self.block_out_channels)} block_out_channels; give one for each")
        self._check_numbers()
        fold = 2 ** (len(self.block_out_channels) - 1)
        if any(side < 1 or side % fold for side in self.shape[1:]):
            raise ValueError(f"sample_size={self.sample_size!r} must be a multiple of {fold} (2^(levels - 1))")
        levels = zip(self.block_out_channels, self.down_block_types, self.up_block_types[::-1], strict=True)
        attentive = [c for c, *types in levels if any(t.startswith("Attn") for t in types)]
        if any(c < (self.attention_head_dim or 1) for c in attentive + [self.block_out_channels[-1]] * self.add_attention):
            raise ValueError(f"attention_head_dim={self.attention_head_dim!r} must be at most the block_out_channels that have attention")

    def _check_numbers(self) -> None:
        for name, (least, optional) in WHOLE.items():
            value = getattr(self, name)
            if not (value is None and optional) and (type(value) is not int or not least <= value <= MAX_SIZE + 1):
                raise ValueError(f"{name}={value!r} must be {'None or ' * optional}at least {least} and at most {MAX_SIZE + 1}")
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in FRACTIONS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= MAX_SIZE or (name == "mid_block_scale_factor" and not value):
                raise ValueError(f"{name}={value!r} must be a number from 0 to {MAX_SIZE}")
        sides = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        if len(sides) != 2 or not all(type(v) is int and v <= MAX_SIZE for v in sides):
            raise ValueError(f"sample_size={self.sample_size!r} must be one or two whole numbers of at most {MAX_SIZE}")
        if not all(1 <= v <= MAX_SIZE for v in self.block_out_channels):
            raise ValueError(f"block_out_channels={self.block_out_channels!r} must be from 1 to {MAX_SIZE}")
        total = len(self.block_out_channels) * (2 * self.layers_per_block + 1) + 2
        if total > MAX_BLOCKS:
            raise ValueError(f"{total} residual blocks; a network can have at most {MAX_BLOCKS}")
        if odd := [v for v in self.block_out_channels if v % self.norm_num_groups]:
            raise ValueError(f"block_out_channels {odd[0]} is no multiple of norm_num_groups={self.norm_num_groups}")
        if self.add_attention and self.block_out_channels[-1] % (self.attn_norm_num_groups or 1):
            raise ValueError(
                f"block_out_channels {self.block_out_channels[-1]} is no multiple of attn_norm_num_groups={self.attn_norm_num_groups}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        height, width = (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size
        return self.in_channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Classes to choose from, without the last embedding, which doubles as the null class; None where that leaves none."""
        return None if self.num_class_embeds is None or self.num_class_embeds < 2 else self.num_class_embeds - 1

    @property
    def config(self) -> dict[str, Any]:
        """Plain JSON values; `UNet2DConfig.from_config` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_config(config: dict[str, Any]) -> UNet2DConfig:
        """From a UNet2DModel's config, whose entries that begin with _ say nothing of the network."""
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        if unknown := sorted(set(given) - {f.name for f in fields(UNet2DConfig)}):
            raise ValueError(f"unknown setting of a UNet2DModel: {', '.join(unknown)}")
        return UNet2DConfig(**given)


class Resnet(nn.Module):
    """skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + style))), or, with scale_shift, the style a scale and shift of norm2's result. Channels that
    stand beside those of x are taken after them."""

    norm_silu = staticmethod(norm_silu)

    def __init__(self, c_in: int, c_out: int, temb: int, config: UNet2DConfig, factor: float = 1.0) -> None:
        super().__init__()
        groups, self.scaled, self.factor = config.norm_num_groups, config.resnet_time_scale_shift == "scale_shift", factor
        self.norm1 = nn.GroupNorm(groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, c_out * (1 + self.scaled))
        self.norm2 = nn.GroupNorm(groups, c_out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, style: Tensor, beside: Tensor | None = None) -> Tensor:
        if beside is not None:
            x = torch.cat([x, beside], dim=1)
        h = self.conv1(self.norm_silu(self.norm1, x))
        h = self.norm_silu(self.norm2, h, style) if self.scaled else self.norm_silu(self.norm2, h + style[:, :, None, None])
        h = self.conv2(h)
        out: Tensor = ((self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h) / self.factor
        return out


class Attention(nn.Module):
    """x + self-attention of all pixels (Vaswani et al. 2017), after a group norm where there is one."""

    def __init__(self, channels: int, groups: int | None, config: UNet2DConfig, factor: float = 1.0) -> None:
        super().__init__()
        self.width, self.factor = config.attention_head_dim or channels, factor
        inner = channels // self.width * self.width  # fewer than channels, where the heads leave a remainder
        self.group_norm = nn.GroupNorm(groups, channels, eps=config.norm_eps) if groups else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # [N, H W, C]
        q, k, v = (f(h).unflatten(2, (-1, self.width)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, H W, heads * width]
        out: Tensor = (self.to_out[0](h).transpose(1, 2).reshape(n, c, height, width) + x) / self.factor
        return out


class Resized(nn.Module):
    """A convolution that halves or, after repeating pixels, doubles the sides."""

    def __init__(self, channels: int, padding: int | None) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if padding is None else 2, padding=1 if padding is None else padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Stage(nn.Module):
    """What stands at one resolution, by UNet2DModel's names."""

    def __init__(self, resnets: list[Resnet], attentions: list[Attention], **resized: Resized) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        for name, module in resized.items():
            setattr(self, name, nn.ModuleList([module]))


class UNet2D(nn.Module):
    """`model(x, t, labels)` as UNet2DModel computes it, with its `state_dict`.

    x: [N, C, H, W]. t: timesteps, [N] or one for all, any number type. labels: int64 [N], or None for the last embedding, where there are
    embeddings. What depends on timestep and class alone is `condition(t, labels)`, [N, K], and the rest `body(x, condition)`.
    """

    hoisted = True
    norm_silu = staticmethod(norm_silu)

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        c, levels = config.block_out_channels, range(len(config.block_out_channels))
        temb, factor = config.time_embedding_dim or 4 * c[0], config.mid_block_scale_factor
        self.conv_in = nn.Conv2d(config.in_channels, c[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(c[0], temb), "linear_2": nn.Linear(temb, temb)})
        if config.num_class_embeds is not None:
            self.class_embedding = embedding(config.num_class_embeds, temb)
        stages = []
        skips = [c[0]]
        for i in levels:
            widths = [c[max(i - 1, 0)] if j == 0 else c[i] for j in range(config.layers_per_block)]
            attentive = config.down_block_types[i] == "AttnDownBlock2D"
            down = {"downsamplers": Resized(c[i], config.downsample_padding)} if i + 1 < len(c) else {}
            stages.append(
                Stage(
                    [Resnet(w, c[i], temb, config) for w in widths],
                    [Attention(c[i], config.norm_num_groups, config) for _ in widths if attentive],
                    **down,
                )
            )
            skips += [c[i]] * (len(widths) + bool(down))
        self.down_blocks = nn.ModuleList(stages)
        plain = config.norm_num_groups if config.resnet_time_scale_shift == "default" else None
        attention = [Attention(c[-1], config.attn_norm_num_groups or plain, config, factor)] if config.add_attention else []
        self.mid_block = Stage([Resnet(c[-1], c[-1], temb, config, factor) for _ in range(2)], attention)
        stages, width = [], c[-1]
        for i in reversed(levels):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(Resnet(width + skips.pop(), c[i], temb, config))
                width = c[i]
            attentive = config.up_block_types[len(c) - 1 - i] == "AttnUpBlock2D"
            up = {"upsamplers": Resized(c[i], None)} if i else {}
            stages.append(Stage(resnets, [Attention(c[i], config.norm_num_groups, config) for _ in resnets if attentive], **up))
        self.up_blocks = nn.ModuleList(stages)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(c[0], config.out_channels, 3, padding=1)
        self.sizes = [resnet.time_emb_proj.out_features for resnet in self._resnets()]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _resnets(self) -> Iterator[Any]:
        """In the order that they are used in."""
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            yield from stage.resnets  # type: ignore[misc]

    def condition(self, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """[N] timesteps and [N] labels -> the style of every residual block, [N, K]. ValueError for labels where there are no classes."""
        if labels is not None and self.config.num_class_embeds is None:
            raise ValueError("labels were given to a network without classes; its num_class_embeds is None")
        weight: Tensor = self.time_embedding["linear_1"].weight  # type: ignore[assignment]
        t = torch.as_tensor(t, device=weight.device).reshape(-1)
        half, config = self.config.block_out_channels[0] // 2, self.config
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - config.freq_shift))
        angle = t[:, None].float() * frequency
        parts = [angle.sin(), angle.cos()]
        e = torch.cat(parts[::-1] if config.flip_sin_to_cos else parts, dim=1)
        e = F.pad(e, (0, config.block_out_channels[0] % 2)).to(weight.dtype)
        e = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](e)))
        if config.num_class_embeds is not None:
            e = e + (self.class_embedding.weight[-1] if labels is None else self.class_embedding(labels))
        e = F.silu(e)
        return torch.cat([resnet.time_emb_proj(e) for resnet in self._resnets()], dim=1)

    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """[N, C, H, W] and [N, K] -> [N, C_out, H, W], contiguous."""
        styles = iter(torch.split(condition.expand(len(x), -1), self.sizes, dim=1))
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for stage in self.down_blocks:
            for j, resnet in enumerate(stage.resnets):  # type: ignore[arg-type, union-attr]
                h = resnet(h, next(styles))
                if hasattr(stage, "attentions"):
                    h = stage.attentions[j](h)  # type: ignore[index, operator]
                skips.append(h)
            if hasattr(stage, "downsamplers"):
                h = stage.downsamplers[0](h)  # type: ignore[index, operator]
                skips.append(h)
        h = self.mid_block.resnets[0](h, next(styles))
        if hasattr(self.mid_block, "attentions"):
            h = self.mid_block.attentions[0](h)
        h = self.mid_block.resnets[1](h, next(styles))
        for stage in self.up_blocks:
            for j, resnet in enumerate(stage.resnets):  # type: ignore[arg-type, union-attr]
                h = resnet(h, next(styles), skips.pop())
                if hasattr(stage, "attentions"):
                    h = stage.attentions[j](h)  # type: ignore[index, operator]
            if hasattr(stage, "upsamplers"):
                h = stage.upsamplers[0](h)  # type: ignore[index, operator]
        out: Tensor = self.conv_out(self.norm_silu(self.conv_norm_out, h))
        return out.contiguous()

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        return self.body(x, self.condition(t, labels))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def touched(model: nn.Module) -> bool:
    """Whether calling it does something else, or more, than its classes say."""
    return any("forward" in vars(module) or any(getattr(module, name) for name in HOOKS) for module in model.modules())


# What a module says of itself that has no part in what it computes without gradients, in eval mode; and what `adopted` looks at apart.
ASIDE = ("training", "gradient_checkpointing", "processor")


def traits(model: nn.Module) -> tuple[Any, ...]:
    """What a network computes by, besides its weights: of each module its place, type and plain attributes, and what has been put upon it."""
    found = []
    for name, module in model.named_modules():
        own = [(key, value) for key, value in vars(module).items() if key[0] != "_" and key not in ASIDE]
        plain = {key: value for key, value in own if value is None or isinstance(value, (int, float, str, tuple))}
        put = [key for key, value in own if callable(value)]  # a `forward` of the module's own, for one
        put += [f"{kind} {key}" for kind in ("_forward_hooks", "_forward_pre_hooks") for key in getattr(module, kind)]
        found.append((name, type(module), tuple(plain.items()), tuple(put)))
    return tuple(found)


def _as_made(model: nn.Module, settings: dict[str, Any]) -> bool:
    """Whether a network is what its class makes of its settings: no module and no attribute of another kind or value, and nothing put upon any."""
    with torch.device("meta"):
        made = traits(type(model)(**settings))
    given = traits(model)
    return len(given) == len(made) and all(
        (name, kind, put) == (*other[:2], other[3]) and dict(plain).items() >= dict(other[2]).items()
        for (name, kind, plain, put), other in zip(given, made, strict=True)
    )


def adopted(model: nn.Module, num_classes: int | None) -> nn.Module:
    """A UNet2D of the same parameters, if the network is diffusers' UNet2DModel and nothing but that: no class of one's own, hooks, adapters or
    attention processors, and no module or setting of one (padding_mode, say) that its config does not make; and if it has classes where classes are
    spoken of. Else the network itself."""
    if (type(model).__module__, type(model).__qualname__) != ("diffusers.models.unets.unet_2d", "UNet2DModel"):
        return model
    processors = {type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")}
    if touched(model) or processors - {"AttnProcessor", "AttnProcessor2_0"}:
        return model
    try:
        config = UNet2DConfig.from_config(dict(model.config))  # type: ignore[arg-type]
        if (config.num_class_embeds is None) != (num_classes is None) or not _as_made(model, config.config):
            return model
        with torch.device("meta"):
            made = UNet2D(config)
        # The parameters themselves, so that what replaces their data is seen.
        made.load_state_dict({**dict(model.named_parameters()), **dict(model.named_buffers())}, assign=True)
    except (ValueError, RuntimeError):  # settings, or weights, that are not its own
        return model
    return made.eval()

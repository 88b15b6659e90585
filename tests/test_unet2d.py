"""UNet2D against diffusers' UNet2DModel, of which it is the arithmetic."""

import inspect
from dataclasses import fields

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from fastdiff.unet2d import UNet2D, UNet2DConfig  # noqa: E402

PLAIN = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
BASE = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
CASES = [
    {},
    {"layers_per_block": 2, "downsample_padding": 0},
    {"resnet_time_scale_shift": "scale_shift"},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2, "attention_head_dim": None},
    {**PLAIN, "add_attention": False, "flip_sin_to_cos": False, "freq_shift": 1},
    {"num_class_embeds": 5, "out_channels": 6, "act_fn": "swish"},
    {"sample_size": (8, 4), "in_channels": 1, "out_channels": 1, "center_input_sample": True, "time_embedding_dim": 24},
    {"attention_head_dim": 3, "num_class_embeds": 1},
    {"mid_block_scale_factor": 2.0, "norm_eps": 1e-3, "dropout": 0.5},
    {
        "block_out_channels": (8, 12, 16), "layers_per_block": 3, "sample_size": 16,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
]  # fmt: skip


def pair(case, dtype=torch.float64):
    """Theirs and ours, of random weights in which no path is silent."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{**BASE, **case}).to(dtype).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3 if p.ndim == 1 else 0.2)
    mine = UNet2D(UNet2DConfig.from_config(dict(theirs.config))).to(dtype).eval()
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def inputs(config, dtype=torch.float64, n=3):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(n, *config.shape, generator=random, dtype=torch.float64).to(dtype)
    last = None if config.num_class_embeds is None else config.num_class_embeds - 1
    labels = None if last is None else torch.tensor([0, last, min(2, last)])[:n]
    return x, torch.tensor([0, 17, 999])[:n], labels


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_computes_what_unet2dmodel_computes(case):
    """fp64: the order of sums differs, in some convolutions and in attention. The sinusoids are fp32 in both."""
    theirs, mine = pair(case)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    x, t, labels = inputs(mine.config)
    wanted = theirs(x, t, labels).sample
    got = mine(x, t, labels)
    assert got.is_contiguous() and wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * float(1 + wanted.abs().max()))
    condition = mine.condition(t, labels)
    assert torch.equal(mine.body(x, condition), got)
    for i in range(3):
        one = mine.condition(t[i : i + 1], None if labels is None else labels[i : i + 1])
        torch.testing.assert_close(one, condition[i : i + 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(mine(x, 17, labels), mine(x, t[1:2].expand(3), labels), rtol=0, atol=1e-12)
    if labels is not None:
        null = torch.full((3,), mine.config.num_class_embeds - 1)
        torch.testing.assert_close(mine(x, t), theirs(x, t, null).sample, rtol=0, atol=1e-12 * float(1 + wanted.abs().max()))


@torch.no_grad()
def test_single_precision_and_bf16():
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        theirs, mine = pair({}, dtype)
        x, t, _ = inputs(mine.config, dtype)
        wanted, got = theirs(x, t).sample, mine(x, t)
        assert got.dtype == dtype and (got - wanted).abs().max() <= bound * (1 + wanted.abs().max())


@pytest.mark.parametrize(("embeddings", "classes"), [(None, None), (1, None), (2, 1), (5, 4)])
def test_the_last_embedding_is_no_class(embeddings, classes):
    assert UNet2DConfig(num_class_embeds=embeddings).num_classes == classes


@torch.no_grad()
def test_timesteps_of_any_number_type():
    """Also fractional ones. (A Python float UNet2DModel cuts to a whole number; a tensor it takes as it is.)"""
    theirs, mine = pair({})
    x, _, _ = inputs(mine.config)
    for t in (17, torch.tensor(17.5), torch.tensor([17.5]), torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([1.5, 2.25, 999.875])):
        wanted = theirs(x, t).sample
        torch.testing.assert_close(mine(x, t), wanted, rtol=0, atol=1e-12 * float(1 + wanted.abs().max()))
    assert torch.equal(mine(x, 17.5), mine(x, torch.tensor(17.5)))


def test_labels_without_classes_are_refused():
    _, mine = pair({})
    x, t, _ = inputs(mine.config)
    with pytest.raises(ValueError, match="labels were given to a network without classes; its num_class_embeds is None"):
        mine(x, t, torch.tensor([0, 0, 0]))


def test_it_compiles_whole():
    torch.compiler.reset()
    _, mine = pair({}, torch.float32)
    x, t, _ = inputs(mine.config, torch.float32)
    counter = CompileCounter()
    with torch.no_grad():
        torch.compile(mine, backend=counter, fullgraph=True)(x, t)
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", CASES)
def test_configs(case):
    config = UNet2DConfig.from_config(dict(diffusers.UNet2DModel(**{**BASE, **case}).config))
    assert UNet2DConfig.from_config(config.config) == config


def test_defaults_are_unet2dmodels():
    defaults = {name: p.default for name, p in inspect.signature(diffusers.UNet2DModel.__init__).parameters.items() if name != "self"}
    mine = UNet2DConfig()
    assert {f.name for f in fields(UNet2DConfig)} == set(defaults)
    assert all(getattr(mine, name) == value for name, value in defaults.items() if name != "sample_size")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"time_embedding_type": "fourier"},
            "a UNet2DModel with time_embedding_type='fourier' is not covered; time_embedding_type must be 'positional'",
        ),
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
            "blocks SkipDownBlock2D is not covered; down_block_types may be DownBlock2D and",
        ),
        ({"downsample_type": "resnet"}, "downsample_type='resnet' is not covered"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not covered; class_embed_type must be None"),
        ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish'"),
        ({"block_out_channels": (8, 16, 16)}, "2 down_block_types for 3 block_out_channels; give one for each"),
        ({"sample_size": None}, "a UNet2DModel with sample_size=None does not say how large its images are"),
        ({"downsample_padding": 2}, "downsample_padding=2 is not covered; downsample_padding must be 0 or 1"),
        ({"sample_size": 7}, r"sample_size=7 must be a multiple of 2 \(2\^\(levels - 1\)\)"),
        ({"num_class_embeds": 0}, "num_class_embeds=0 must be None or at least 1"),
        ({"attention_head_dim": 32}, "attention_head_dim=32 must be at most the block_out_channels that have attention"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet' is not covered"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be 'default' or 'scale_shift'"),
        ({"mid_block_type": None}, "mid_block_type=None is not covered"),
        ({"dropuot": 0.1}, "unknown setting of a UNet2DModel: dropuot"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, text):
    with pytest.raises(ValueError, match=text):
        UNet2DConfig.from_config({**BASE, **change})

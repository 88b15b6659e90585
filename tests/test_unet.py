"""The network: its settings, its conditioning, its cost."""

import math

import pytest
import torch

from fastdiff.unet import UNet, UNetConfig, timestep_embedding


def scrambled(config: UNetConfig, seed: int = 0) -> UNet:
    """A UNet with no zero weights left, so that every path shows in the output."""
    torch.manual_seed(seed)
    model = UNet(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(num_classes=8),
        UNetConfig(shape=(1, 8, 8), patch=1, channels=(8,), blocks=1, middle=0, group=4),
        UNetConfig(shape=(4, 16, 24), channels=(16, 24, 32), blocks=2, middle=1),
    ],
    ids=["sprites", "one level", "three levels"],
)
def test_output_fits_the_input_and_depends_on_every_parameter(config):
    model = scrambled(config)
    x = torch.randn(3, *config.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, config.num_classes]) if config.num_classes else None
    y = model(x, torch.tensor([0, 7, 499]), labels)
    assert y.shape == x.shape
    assert y.is_contiguous()
    y.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_starts_as_zero():
    model = UNet(UNetConfig())
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([1, 2])).abs().max() == 0


def test_images_do_not_mix():
    model = scrambled(UNetConfig(num_classes=3))
    x, t, labels = torch.randn(4, 3, 16, 16), torch.tensor([3, 50, 200, 499]), torch.tensor([0, 1, 2, 3])
    whole = model(x, t, labels)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]), whole[i : i + 1], atol=1e-4, rtol=1e-4)
        others = torch.cat([x[:i], torch.randn(1, 3, 16, 16), x[i + 1 :]])
        changed = (model(others, t, labels) - whole).flatten(1).abs().amax(1) > 0
        assert changed.tolist() == [j == i for j in range(4)]


def test_no_labels_is_the_null_class_and_classes_differ():
    model = scrambled(UNetConfig(num_classes=3))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 400])
    outputs = [model(x, t, torch.full((2,), k)) for k in range(4)]
    assert torch.equal(model(x, t), outputs[3])
    assert all((outputs[a] - outputs[b]).abs().max() > 1e-3 for a in range(4) for b in range(a))


def test_condition_and_body_are_the_whole():
    model = scrambled(UNetConfig(num_classes=3))
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([10, 400]), torch.tensor([1, 3])
    assert torch.equal(model.body(x, model.condition(t, labels)), model(x, t, labels))


def test_timestep_embedding_by_hand():
    e = timestep_embedding(torch.tensor([0, 3]), 8)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    wanted = [[math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies] for t in (0, 3)]
    torch.testing.assert_close(e, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_flops_of_a_network_counted_by_hand():
    config = UNetConfig(shape=(3, 8, 8), patch=2, channels=(8,), blocks=1, middle=0, group=4)
    pixels = 4 * 4
    stem, head = 12 * 8 * 9, 8 * 12 * 9
    down = 2 * 8 * 8 * 9
    up = 16 * 8 * 9 + 8 * 8 * 9 + 16 * 8
    assert UNet(config).flops() == 2 * pixels * (stem + down + up + head)


def test_config_round_trip():
    config = UNetConfig(shape=(1, 8, 8), channels=(16, 32), num_classes=4)
    assert UNetConfig.from_config(config.config) == config


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"shape": (3, 16)}, "shape"),
        ({"channels": ()}, "at least one channel"),
        ({"channels": (0,)}, "positive whole numbers"),
        ({"channels": (12,)}, "multiple of group 8"),
        ({"shape": (3, 18, 16)}, "must be a multiple of 4"),
        ({"num_classes": 0}, "num_classes"),
        ({"middle": -1}, "middle"),
        ({"blocks": 1.5}, "whole numbers"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        UNetConfig(**settings)


def test_unknown_setting():
    with pytest.raises(ValueError, match="unknown network setting attention"):
        UNetConfig.from_config({"attention": True})

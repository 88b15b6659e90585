"""What the command finds: of lists that are known by heart, of the shipped network, and of what does not fit."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_checkpoint, small_dataset
from torch import nn

import fastdiff
from fastdiff import Schedule, data, densities, dequantised, log_likelihood
from fastdiff.data import Dataset
from fastdiff.densities import Mean, likelihoods
from fastdiff.ideal import IdealDenoiser
from fastdiff.likelihood import variational_bound

SCHEDULE = Schedule.cosine(40)


def known(dataset, classes=("cat", "dog", "10")):
    """A checkpoint whose network knows a dataset by heart, a class at a time."""
    images = data.to_float(torch.from_numpy(dataset.images))
    checkpoint = small_checkpoint()
    model = IdealDenoiser(images, SCHEDULE, labels=torch.from_numpy(dataset.labels))
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model.config = checkpoint.model.config
    return replace(checkpoint, model=model, schedule=SCHEDULE, prediction="x0", classes=classes)


DATASET = small_dataset(24, 24)


def test_a_list_known_by_heart(monkeypatch):
    """Its images are likelier than scrambled ones and those than noise, and each is of its own class. Micro-batches are as good as one."""
    checkpoint = known(DATASET)
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.done += n

    found = likelihoods(checkpoint, "mine", images=DATASET, count=9, steps=4, progress=Bar)
    assert [bar.done for bar in bars] == [bars[0].total] and bars[0].total == 9 * 40 + 9 * 5 * 8 * 4
    assert (found.count, found.images, found.probe_error) == (9, "of those held out", None)
    assert found.ordered == densities.Ordered(9, 9, 9)
    assert found.bits_per_dim["images"].mean < found.bits_per_dim["scrambled"].mean < found.bits_per_dim["noise"].mean
    assert (found.classes.right, found.classes.images, found.classes.accuracy, found.classes.error) == (9, 9, 1.0, 0.0)
    assert found.classes.per_class == {} and found.classes.chance == pytest.approx(1 / 3)
    monkeypatch.setattr(densities, "MICRO_BATCH", 2)
    monkeypatch.setattr(densities, "BOUND_BATCH", 3)
    again = likelihoods(checkpoint, "mine", images=DATASET, count=9, steps=4)
    for kind in densities.KINDS:
        assert again.bits_per_dim[kind].mean == pytest.approx(found.bits_per_dim[kind].mean, rel=1e-6)
    assert again.bound.terms == pytest.approx(found.bound.terms, rel=1e-6, abs=1e-9)


def test_the_figures_are_those_of_the_library():
    """By log_likelihood and variational_bound on all images at once, each asked for its own class; the probes' error; the bound's parts."""
    checkpoint = known(DATASET)
    found = likelihoods(checkpoint, "mine", images=DATASET, count=24, steps=3, probes=3, seed=5)
    images, labels = torch.from_numpy(DATASET.images).permute(0, 3, 1, 2), torch.from_numpy(DATASET.labels)
    given = {"prediction": "x0", "labels": labels, "seed": 5}
    own = log_likelihood(checkpoint.model, SCHEDULE, dequantised(images, seed=5), steps=3, probes=3, **given)
    bits = own.bits_per_dim()
    assert found.bits_per_dim["images"].mean == pytest.approx(bits.mean().item(), rel=1e-6)
    assert found.bits_per_dim["images"].error == pytest.approx(bits.std().item() / math.sqrt(24), rel=1e-6)
    assert found.probe_error == pytest.approx(own.error.square().mean().sqrt().item() / (192 * math.log(2)), rel=1e-5)
    bound = variational_bound(checkpoint.model, SCHEDULE, data.to_float(torch.from_numpy(DATASET.images)), **given)
    terms = (bound.terms / (192 * math.log(2))).mean(1)
    b = found.bound
    assert b.total.mean == pytest.approx(bound.bits_per_dim().mean().item(), rel=1e-6) and b.terms == pytest.approx(
        terms.tolist(), rel=1e-6
    )
    assert (b.decoder, b.prior) == (b.terms[0], b.terms[-1]) and b.timesteps == tuple(range(40)) and len(b.terms) == 41
    assert b.thirds == pytest.approx([terms[27:40].sum().item(), terms[14:27].sum().item(), terms[1:14].sum().item()], rel=1e-6)
    assert b.prior + sum(b.thirds) + b.decoder == pytest.approx(b.total.mean, rel=1e-9)
    assert found.classes.per_class == dict.fromkeys(checkpoint.classes, (8, 8))


def test_classes_that_are_told_wrong_are_counted():
    """The list has every second image's class as another: those are taken for that one."""
    other = Dataset(DATASET.images, np.where(np.arange(24) % 2, (DATASET.labels + 1) % 3, DATASET.labels), DATASET.classes)
    found = likelihoods(known(DATASET), "mine", images=other, count=24, steps=2, bound=False).classes
    assert (found.right, found.images, found.accuracy) == (12, 24, 0.5)
    assert found.error == pytest.approx(math.sqrt(0.25 / 23)) and found.per_class == dict.fromkeys(DATASET.classes, (4, 8))


def test_what_may_be_left_out():
    checkpoint = known(DATASET)
    bare = Dataset(DATASET.images)
    found = likelihoods(checkpoint, "mine", images=bare, count=3, steps=1, bound=False)
    assert found.bound is None and found.classes is None and found.images == "given"
    assert "bound" not in found.text() and "classes" not in found.text() and found.json()["bound"] is None
    of_all = dequantised(torch.from_numpy(DATASET.images[[0, 12, 23]]).permute(0, 3, 1, 2))
    bits = log_likelihood(checkpoint.model, SCHEDULE, of_all, prediction="x0", steps=1, probes=1).bits_per_dim()
    assert found.bits_per_dim["images"].mean == pytest.approx(bits.mean().item(), rel=1e-6)
    labelled = likelihoods(checkpoint, "mine", images=DATASET, count=3, steps=1, bound=False, classify=False)
    assert labelled.classes is None
    assert labelled.bits_per_dim["images"].mean < found.bits_per_dim["images"].mean, "a class's own list is shorter"


def test_images_are_even_over_the_classes_and_always_the_same():
    labels = np.array([0] * 50 + [2] * 3 + [1] * 20)
    chosen = densities._even(labels, 73, 16)
    assert np.bincount(labels[chosen]).tolist() == [7, 6, 3]
    assert len(set(chosen.tolist())) == 16 and (np.diff(chosen) > 0).all() and {0, 49, 50, 51, 52, 53, 72} <= set(chosen.tolist())
    assert densities._even(labels, 73, 500).tolist() == list(range(73))
    assert densities._even(None, 9, 3).tolist() == [0, 4, 8] and densities._even(None, 2, 5).tolist() == [0, 1]


def test_scrambled_images_have_the_same_pixels_and_noise_has_every_level():
    images = torch.from_numpy(small_dataset(40).images).permute(0, 3, 1, 2)
    mixed = densities._scrambled(images, 0)
    as_sets = [[sorted(map(tuple, image.flatten(1).T.tolist())) for image in some] for some in (images, mixed)]
    assert as_sets[0] == as_sets[1], "whole pixels move, none is lost"
    assert (mixed != images).flatten(1).any(1).all()
    same = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(2, 3, 1, 1)
    assert not torch.equal(*densities._scrambled(same, 0)), "each has an order of its own"
    assert torch.equal(densities._scrambled(images[:5], 0), mixed[:5]) and not torch.equal(densities._scrambled(images, 1), mixed)
    levels = torch.bincount(densities._uniform(torch.zeros(100, 3, 16, 16), 0).flatten().long(), minlength=256)
    assert ((levels - 300).abs() < 6 * math.sqrt(300)).all()


def test_the_shipped_network_on_held_out_sprites():
    found = likelihoods(fastdiff.load("sprites"), "sprites", count=8, steps=3, bound=False, classify=False)
    assert found.images == "shipped sprites held out of training"
    assert found.ordered == densities.Ordered(8, 8, 8)
    assert 2 < found.bits_per_dim["images"].mean < 5 < found.bits_per_dim["scrambled"].mean < 8 < found.bits_per_dim["noise"].mean


def test_a_report_is_read_by_machines_and_by_people():
    found = likelihoods(known(DATASET), "mine", images=DATASET, count=24, steps=2, probes=2)
    plain = found.json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["bits_per_dim"]["noise"] == {"mean": found.bits_per_dim["noise"].mean, "error": found.bits_per_dim["noise"].error}
    assert plain["ordered"]["both"] == 24 and len(plain["bound"]["terms"]) == 41 and plain["classes"]["per_class"]["dog"] == [8, 8]
    text = found.text()
    for line in (
        "log p(x) under mine of 24 images, of those held out, in bits/dim (the less, the likelier)",
        f"  their pixels scrambled  {found.bits_per_dim['scrambled']}",
        "  likelier than scrambled: 24 of 24; scrambled than noise: 24 of 24; both: 24 of 24",
        f"DDPM's bound, 40 steps   {found.bound.total}",
        "classes by log p(x | class): 24 of 24 right, 1.000 +- 0.000 (chance 0.333)",
        "  dog                     8 of 8",
    ):
        assert line in text.splitlines(), text
    ends = ((DATASET.images == 0) | (DATASET.images == 255)).mean()
    assert found.bound.ends == pytest.approx(ends) and 0 < ends < 0.1
    low, high = (replace(found, bound=replace(found.bound, total=Mean(v, 0.0), ends=0.65)).text() for v in (-9.0, 99.0))
    assert (
        "  (it may be below the above: it is of whole levels, and 0 and 255, 65 % of these numbers, reach to infinity)" in low.splitlines()
    )
    assert "below" not in high
    assert str(Mean.of(torch.tensor([1.0, 2.0, 3.0]))) == "2.000 +- 0.577"


CLASSES = ("cat", "dog", "10")
BAD = [
    ({"count": 1}, "a likelihood of 1 images has no standard error; give at least 2"),
    ({"count": 2.5}, "a likelihood of 2.5 images has no standard error"),
    ({"steps": 0}, "steps is 0 and probes is 1"),
    ({"probes": 0}, "steps is 8 and probes is 0"),
    ({"images": Dataset(DATASET.images[:1])}, "1 images are too few for a likelihood with its standard error; give at least 2"),
    ({"images": Dataset(DATASET.images[:0])}, "0 images are too few"),
    (
        {"images": None},
        r"the images are 16 x 16 pixels and mine knows 8 x 8; give images like those it was trained on \(--likelihood IMAGES\)",
    ),
    (
        {"images": Dataset(np.zeros((3, 16, 12, 3), np.uint8))},
        "the images are 12 x 16 pixels and mine knows 8 x 8; resize them with --size 8",
    ),
    (
        {"images": Dataset(np.zeros((3, 8, 8, 4), np.uint8))},
        r"the images have 4 channels \(RGB with alpha\) and mine knows 3; convert them, or give image files",
    ),
    ({"images": Dataset(np.zeros((3, 8, 8, 1), np.uint8))}, r"the images have 1 channels \(grey\) and mine knows 3"),
    (
        {"images": Dataset(DATASET.images[:2], np.array([0, 1]), ("cat", "dragon"))},
        r"the images have a class 'dragon' that mine lacks \(it has: cat, dog, 10\); rename it, or give no classes",
    ),
    ({"images": Dataset(DATASET.images[:2], np.array([0, 1]), ("2", "3"))}, "a class '3' that mine lacks"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_what_does_not_fit_is_one_line(change, text, monkeypatch):
    monkeypatch.setattr(densities, "_share", lambda *_: pytest.fail("refused before anything is worked out"))
    with pytest.raises(ValueError, match=text) as caught:
        likelihoods(known(DATASET), "mine", **{"images": DATASET, **change})
    assert "\n" not in str(caught.value)


def test_classes_are_known_by_name_or_number():
    numbers = densities._numbers(Dataset(DATASET.images[:4], np.array([0, 1, 2, 2]), ("dog", "10", "0", "unused")), CLASSES, "mine", "")
    assert numbers.tolist() == [1, 2, 0, -1]


def test_numbers_that_are_not_finite_are_an_error():
    checkpoint = known(DATASET)
    checkpoint.model.images.fill_(math.inf)
    with pytest.raises(ValueError, match="mine gave numbers that are not finite for images 0 to 1"):
        likelihoods(checkpoint, "mine", images=DATASET, count=2, steps=1, bound=False)

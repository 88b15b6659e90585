"""fastdiff.classifier: the shipped one is what its record says, features of any module, training that repeats, one line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_checkpoint, small_dataset
from torch import nn

from fastdiff import classifier, data
from fastdiff.checkpoint import CheckpointError, read_tensors, write_tensors
from fastdiff.classifier import Classifier, Settings, features, load_classifier

ROOT = Path(__file__).parent.parent
QUICK = Settings(steps=60, batch=16, shift=0)


@pytest.fixture(scope="module")
def trained():
    return classifier.train(QUICK, small_dataset(), progress=False)


def pictures(n=5, size=8):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_shipped_is_small_and_as_accurate_as_it_says():
    assert classifier.SHIPPED.stat().st_size < 1_000_000
    model = load_classifier()
    sprites = data.load()
    _, held_out = sprites.split()
    assert model.shape == (3, 16, 16) and model.classes == sprites.classes and not model.training
    assert model.record["data"] == sprites.digest() and model.record["settings"] == json.loads(json.dumps(vars(Settings())))
    assert model.record["command"].startswith("python -m fastdiff.classifier --out ")
    found = features(model, held_out.images)
    assert found.shape == (2333, 64) and found.dtype == torch.float64
    right = classifier.classify(model, found).numpy() == held_out.labels
    assert right.mean() >= 0.95
    said = model.record["held_out"]
    assert right.mean() == pytest.approx(said["accuracy"], abs=2e-3) and said["images"] == 2333
    for k, name in enumerate(sprites.classes):
        assert right[held_out.labels == k].mean() == pytest.approx(said["per_class"][name], abs=0.03)


def test_training_learns_repeats_and_survives_its_file(trained, tmp_path):
    assert trained.record["held_out"]["accuracy"] == 1 and trained.record["held_out"]["images"] == 8
    again = classifier.train(QUICK, small_dataset(), progress=False)
    other = classifier.train(Settings(steps=60, batch=16, shift=0, seed=1), small_dataset(), progress=False)
    trained.save(tmp_path / "a.safetensors")
    back = load_classifier(tmp_path / "a.safetensors")
    found = features(trained, pictures())
    assert torch.equal(features(again, pictures()), found) and not torch.equal(features(other, pictures()), found)
    assert torch.equal(features(back, pictures()), found)
    assert back.record == json.loads(json.dumps(trained.record)) and back.classes == ("cat", "dog", "10") and back.shape == (3, 8, 8)
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    assert {v.dtype for v in tensors.values()} == {torch.float16}


def test_accuracy_counts(trained):
    part = small_dataset(30, 0)
    wrong = data.Dataset(part.images, (part.labels + (part.labels == 1)) % 3, part.classes)  # dogs are said to be "10"
    assert classifier.accuracy(trained, part) == {"images": 30, "accuracy": 1, "per_class": {"cat": 1, "dog": 1, "10": 1}}
    assert classifier.accuracy(trained, wrong) == {"images": 30, "accuracy": 0.6667, "per_class": {"cat": 1, "10": 0.5}}
    assert classifier.accuracy(trained, data.Dataset(part.images)) is None


def test_augmentation_mirrors_and_moves_over_white():
    image = torch.from_numpy(pictures(1, 6))
    x = data.to_float(image)[0]
    wide = nn.functional.pad(x, (1, 1, 1, 1), value=1.0)
    every = [side[:, i : i + 6, j : j + 6] for side in (wide, wide.flip(2)) for i in range(3) for j in range(3)]
    out = classifier.augmented(image.expand(400, -1, -1, -1), Settings(), torch.Generator().manual_seed(0))
    which = [[i for i, known in enumerate(every) if torch.equal(known, one)] for one in out]
    assert all(len(found) == 1 for found in which) and len({found[0] for found in which}) == 18
    plain = classifier.augmented(image, Settings(flip=False, shift=0), torch.Generator())
    assert torch.equal(plain[0], x)


class Patches(nn.Module):
    """[N, C, H, W] -> [N, C, 2, 2]."""

    def forward(self, x):
        assert not self.training and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
        return nn.functional.adaptive_avg_pool2d(x, 2)


def test_features_of_any_module_are_pooled_and_batched(monkeypatch):
    module, told = Patches(), []
    monkeypatch.setattr(classifier, "ROWS", 2)
    found = features(module, pictures(5), told.append)
    wanted = (pictures(5).astype(np.float64) / 127.5 - 1).mean((1, 2))
    assert found.dtype == torch.float64 and np.allclose(found, wanted, atol=1e-6) and told == [2, 2, 1]
    assert module.training  # as it was
    flat = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 7)).requires_grad_(True)
    assert features(flat, pictures(3)).shape == (3, 7) and not features(flat, pictures(3)).requires_grad


class Says(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("match", "module"),
    [
        (r"Conv2d takes no images \[N, C, H, W\] of shape \[5, 3, 8, 8\]", nn.Conv2d(4, 1, 3)),
        (r"Says returned \[5, 3, 8\] for 5 images; it must be \[N, D\]", Says(lambda x: x[:, :, 0])),
        (r"Says returned \[2, 3, 8, 8\] for 5 images", Says(lambda x: x[:2])),
        ("Says returned tuple for 5 images", Says(lambda x: (x, x))),
        ("not finite", Says(lambda x: x.flatten(1).log())),
        ("Says returned .* for 5 images", Says(lambda x: x.flatten(1).long())),
    ],
)
def test_features_refuse_in_one_line(match, module):
    with pytest.raises(ValueError, match=match) as caught:
        features(module, pictures())
    assert "\n" not in str(caught.value)


def test_no_images_have_no_features():
    with pytest.raises(ValueError, match="no images"):
        features(Patches(), pictures(0))


def test_load_refuses_what_is_no_classifier(tmp_path):
    def fails(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load_classifier(tmp_path / "c.safetensors")
        assert "\n" not in str(caught.value)

    fails("no file .*trains one")
    small_checkpoint().save(tmp_path / "c.safetensors")
    fails("holds no classifier of format 1")
    torch.save({}, tmp_path / "c.safetensors")
    fails("pickled")
    model = Classifier((3, 8, 8), ("a", "b"), width=4, features=8)
    model.save(tmp_path / "c.safetensors")
    tensors, about = read_tensors(tmp_path / "c.safetensors")
    load_classifier(tmp_path / "c.safetensors")
    for odd in ({"width": 5}, {"classes": ["a"]}, {"shape": [3, 8]}, {"record": None}):
        write_tensors(tmp_path / "c.safetensors", tensors, about | odd)
        fails("unfitting")
    write_tensors(tmp_path / "c.safetensors", {k: v / 0 for k, v in tensors.items()}, about)
    fails("no finite numbers")
    write_tensors(tmp_path / "c.safetensors", tensors, about | {"classifier": 2})
    fails("format 1")


def save(path, dataset):
    np.savez(path, images=dataset.images, labels=dataset.labels, classes=np.array(dataset.classes), test=dataset.test)
    return str(path)


def test_the_command_writes_a_classifier_and_reports(tmp_path, capsys):
    source = save(tmp_path / "d.npz", small_dataset())
    out = tmp_path / "new" / "c.safetensors"
    assert classifier.main(["--data", source, "--out", str(out), "--steps", "40", "--batch", "16", "--no-flip", "--shift", "0"]) == 0
    said = capsys.readouterr().out
    for part in (f"{out}: ", "MB, trained on 56 images in ", "on 8 held-out images 100.00%", "cat", "dog"):
        assert part in said
    record = load_classifier(out).record
    assert record["settings"] | {"steps": 40, "batch": 16, "flip": False, "shift": 0} == record["settings"]
    assert record["command"].endswith("--no-flip --shift 0") and [p.name for p in out.parent.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize(
    ("match", "flags"),
    [
        ("is a folder; name a file", ["--out", "."]),
        ("two classes or more", ["--data", "plain.npz", "--out", "c.safetensors"]),
        ("no such file", ["--data", "nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, match, flags):
    monkeypatch.chdir(tmp_path)
    np.savez("plain.npz", images=pictures())
    with pytest.raises(ValueError, match=match) as caught:
        classifier.main(flags)
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["plain.npz"]


def test_exit_code_and_line_of_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.classifier", "--steps", "none"], cwd=ROOT, capture_output=True, text=True, env=None
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "'none' is not a whole number" in done.stderr

"""The command: it sees what it should, says the same twice, goes on with a sweep, and bad input is one line."""

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_checkpoint, small_dataset
from PIL import Image
from torch import nn

from fastdiff import classifier, data, evaluate, metrics, solvers
from fastdiff.evaluate import Yardstick

ROOT = Path(__file__).parent.parent
COUNT = 240


class Pooled(nn.Module):
    """Features for images of any size: four by four patches' means, [N, C 4] of them."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def pooled():
    return Pooled()


pooled_here = Pooled()
number = 3


@pytest.fixture(scope="module")
def sprites():
    return data.load()


@pytest.fixture(scope="module")
def stick(sprites):
    made = Yardstick(sprites, evaluate.find_features(None, torch.device("cpu")), COUNT)
    made.check()
    made.measure_floor()
    return made


@pytest.fixture(scope="module")
def other(stick):
    """Training images that are not those compared with, of the same classes."""
    return stick._more.images


def save(path, dataset):
    arrays = {"images": dataset.images}
    if dataset.labels is not None:
        arrays |= {"labels": dataset.labels, "classes": np.array(dataset.classes)}
    if dataset.test is not None:
        arrays["test"] = dataset.test
    np.savez(path, **arrays)
    return str(path)


def value(result, key):
    return result.estimates[key].value


# What it should see.


def test_floor_is_near_but_not_zero(stick):
    assert 0.1 < value(stick.floor, "frechet") < 5 and value(stick.floor, "accuracy") > 0.9 and value(stick.floor, "novelty") == 1
    assert value(stick.again, "frechet") < value(stick.floor, "frechet") and value(stick.again, "accuracy") > 0.99
    assert all(error > 0 for key, (_, error) in stick.floor.estimates.items() if key != "novelty")


def test_training_copies_have_no_novelty(stick, other):
    copies = stick.measure(other, stick.labels)
    assert value(copies, "novelty") == 0 and copies.copies == COUNT and float(copies.nearest.distance.max()) == 0
    assert np.array_equal(stick.all.images[copies.nearest.which.numpy()], other)
    noisy = (other + np.random.default_rng(0).normal(0, 3, other.shape)).clip(0, 255).round().astype(np.uint8)
    assert value(stick.measure(noisy, stick.labels), "novelty") == 0
    half = np.concatenate([other[: COUNT // 2], stick._others.images[COUNT // 2 :]])
    assert value(stick.measure(half, None), "novelty") == 0.5


def test_no_held_out_sprite_counts_as_a_copy(sprites):
    learn, held_out = sprites.split()
    distance = metrics.nearest_images(held_out.images, learn.images).distance
    assert float(distance.min()) == pytest.approx(5.5, abs=0.05) and float(distance.min()) > metrics.COPY
    assert float(distance.median()) == pytest.approx(36.1, abs=0.2)


def test_noise_is_at_a_huge_distance(stick):
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
    found = stick.measure(noise, stick.labels)
    assert value(found, "frechet") > 20 * value(stick.floor, "frechet") and value(found, "kernel") > 20 * abs(value(stick.floor, "kernel"))
    assert value(found, "precision") < 0.1 and value(found, "recall") < 0.1 and value(found, "coverage") < 0.1
    assert value(found, "accuracy") < 0.3


def test_one_class_only_has_low_recall(stick, sprites):
    learn, _ = sprites.split()
    one = learn.images[learn.labels == 2][:COUNT]
    found = stick.measure(one, np.full(COUNT, 2))
    assert value(found, "recall") < value(stick.again, "recall") / 2 and value(found, "coverage") < 0.4
    assert value(found, "precision") > 0.7 and value(found, "accuracy") > 0.95  # good images, as asked for
    assert value(found, "frechet") > 5 * value(stick.again, "frechet")


def test_blurred_is_worse_than_clean(stick, other):
    x = torch.from_numpy(other).permute(0, 3, 1, 2).float()
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    found = stick.measure(blurred.round().byte().permute(0, 2, 3, 1).numpy(), stick.labels)
    for key, sign in (("frechet", 1), ("kernel", 1), ("precision", -1), ("density", -1), ("coverage", -1)):
        (worse, a), (clean, b) = found.estimates[key], stick.again.estimates[key]
        assert sign * (worse - clean) > 3 * (a + b), key


def test_other_classes_than_asked_for_are_seen(stick, other):
    wrong = (stick.labels + 1) % 8
    found = stick.measure(other, wrong)
    assert value(found, "accuracy") < 0.05
    assert set(found.per_class) == set(stick.real.classes) and value(found, "frechet") == value(stick.again, "frechet")


# What is compared with what.


def test_classes_are_shared_out_evenly():
    assert evaluate.even(np.array([9, 2, 5]), 9).tolist() == [4, 2, 3]
    assert evaluate.even(np.array([9, 0, 5]), 4).tolist() == [2, 0, 2]
    assert evaluate.even(np.array([1, 2]), 50).tolist() == [1, 2]


def test_the_parts_are_disjoint_and_of_the_same_classes(stick, sprites):
    learn, held_out = sprites.split()
    for part, within in ((stick.real, learn), (stick._more, learn), (stick._others, held_out)):
        assert np.bincount(part.labels, minlength=8).tolist() == stick.quota.tolist() == [30] * 8
        known = {image.tobytes() for image in within.images}
        assert all(image.tobytes() in known for image in part.images)
    sets = [{image.tobytes() for image in part.images} for part in (stick.real, stick._more, stick._others)]
    assert [len(s) for s in sets] == [COUNT] * 3 and not any(a & b for a, b in itertools.combinations(sets, 2))
    assert Yardstick(sprites, stick.features, 800).quota.tolist() == [109, 109, 108, 108, 108, 42, 108, 108]


def test_without_held_out_images_half_stand_in():
    whole = small_dataset(60, 0)
    stick = Yardstick(data.Dataset(whole.images, whole.labels, whole.classes), evaluate.Features("", pooled()), 24)
    assert not stick.held_out and len(stick.learn) == len(stick.test) == 30 and len(stick.all) == 60 and stick.quota.tolist() == [8, 8, 8]
    a, b = ({image.tobytes() for image in part.images} for part in (stick.real, stick._others))
    assert not a & b
    stick.measure_floor()
    assert value(stick.floor, "novelty") == 1 and "accuracy" not in stick.floor.estimates
    assert stick.again is None  # 30 - 24 are too few


def test_given_samples_are_taken_class_by_class_where_they_can(sprites, stick):
    _, held_out = sprites.split()
    some, even = evaluate.like(held_out, stick)
    assert even and np.bincount(some.labels).tolist() == [30] * 8
    few, even = evaluate.like(data.Dataset(held_out.images[:300], held_out.labels[:300], held_out.classes), stick)
    assert not even and len(few) == COUNT
    assert evaluate.choose(held_out, None, 0) is held_out and len(evaluate.choose(held_out, 7, 0)) == 7


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sprites, stick):
    """Files to evaluate: held-out sprites as samples, and small images with a checkpoint of theirs."""
    path = tmp_path_factory.mktemp("files")
    save(path / "good.npz", stick._others)
    save(path / "small.npz", small_dataset(120, 40))
    small_checkpoint().save(path / "net.safetensors")
    return path


def run(*flags):
    return evaluate.main(["--device", "cpu", *map(str, flags)])


def report_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_table_json_and_picture_say_the_same(folder, tmp_path, capsys):
    assert run("--samples", folder / "good.npz", "--count", 160, "--out", tmp_path / "a", "--seed", 3) == 0
    said = capsys.readouterr()
    assert "%|" in said.err  # a bar
    lines = said.out.splitlines()
    report = report_of(tmp_path / "a")
    assert lines[0].startswith(f"160 samples of {folder / 'good.npz'}, against 160 of 21113 training images")
    for key, name, better, digits in evaluate.METRICS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        columns = [report[part]["metrics"][key] for part in ("found", "floor", "training_again")]
        assert all(set(v) == {"value", "standard_error"} for v in columns)
        places = [line.index(evaluate.written(evaluate.estimate_of(v), digits)) for v in columns]
        assert places == sorted(places) and line.endswith(better) and report["better"][key] == better
    assert report["found"]["metrics"]["novelty"]["value"] == 1 and report["found"]["copies"] == 0
    assert report["found"]["class_accuracy"].keys() == set(data.load().classes)
    assert report["about"]["count"] == 160 and report["about"]["seed"] == 3 and "jackknife" in report["about"]["standard_error"]
    assert len(report["about"]["data_sha256"]) == 64 and report["seconds"]["all"] > 0
    first = report["closest"][0]
    distances = [pair["distance"] for pair in report["closest"]]
    assert distances == sorted(distances) and first["distance"] == report["found"]["nearest_training_image"]["least"]

    # The same again is the same, printed as one object, without a bar; another seed is another draw.
    assert run("--samples", folder / "good.npz", "--count", 160, "--out", tmp_path / "b", "--seed", 3, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == report_of(tmp_path / "b")
    for key in ("found", "floor", "training_again", "about", "closest"):
        assert again[key] == report[key]
    run("--samples", folder / "good.npz", "--count", 160, "--out", tmp_path / "c", "--seed", 4)
    assert report_of(tmp_path / "c")["found"] != report["found"]


def test_the_picture_shows_the_closest_pairs(folder, stick, other, tmp_path):
    images = np.concatenate([other[:1], stick._others.images[: COUNT - 1]])
    found = stick.measure(images, None)
    picture = np.asarray(evaluate.pairs_picture(images, found, stick))
    assert picture.shape[1] >= 880 and picture.shape[0] > 400
    copy = images[0].repeat(6, 0).repeat(6, 1)  # the closest pair is a training image and itself
    assert np.array_equal(picture[84 : 84 + 96, 92 : 92 + 96], copy)
    assert np.array_equal(picture[84 + 100 : 84 + 196, 92 : 92 + 96], copy)
    assert (picture[84 + 196 :, 92 : 92 + 96] == [192, 0, 0]).all(2).any()  # its distance in red


def test_samples_of_a_checkpoint(folder, tmp_path, capsys):
    flags = ["--checkpoint", folder / "net.safetensors", "--data", folder / "small.npz", "--features", "test_evaluate:pooled", "--steps", 2]
    assert run(*flags, "--count", 30, "--out", tmp_path) == 0
    said = capsys.readouterr()
    report = report_of(tmp_path)
    assert "unipc, 2 steps, guidance 2, seed 0" in said.out and "class as asked for" not in said.out
    assert report["about"]["evaluations"] == 2 and report["about"]["solver"] == "unipc" and report["about"]["count"] == 30
    assert report["seconds"]["sampling"] <= report["seconds"]["all"]
    # As the library makes them, of the classes in turn of the draw.
    checkpoint = small_checkpoint()
    checkpoint.save(tmp_path / "net.safetensors")
    checkpoint = evaluate.load(tmp_path / "net.safetensors")
    x = checkpoint.sampler(solver="unipc", steps=2)(30, labels=torch.arange(3).repeat_interleave(10), guidance=2.0)
    stick = Yardstick(data.load(folder / "small.npz"), evaluate.Features("", pooled()), 30)
    stick.measure_floor()
    found = stick.measure(data.to_uint8(x).numpy(), None, stick.labels)
    assert evaluate.as_json(found) == report["found"]


def test_data_without_held_out_images_or_with_few_says_so(folder, tmp_path):
    whole = small_dataset(60, 0)
    save(tmp_path / "d.npz", data.Dataset(whole.images, whole.labels, whole.classes))
    flags = ["--checkpoint", folder / "net.safetensors", "--data", tmp_path / "d.npz", "--features", "test_evaluate:pooled", "--steps", 1]
    with pytest.warns(UserWarning, match="30 images are compared, not 50: half of the data stand in"):
        assert run(*flags, "--count", 50, "--out", tmp_path) == 0
    assert report_of(tmp_path)["about"]["held_out_images"] == 0


def test_a_checkpoint_of_other_data_is_warned_of(folder, tmp_path):
    checkpoint = small_checkpoint()
    checkpoint.record["data"] = "0" * 64
    checkpoint.save(tmp_path / "net.safetensors")
    flags = ["--checkpoint", tmp_path / "net.safetensors", "--data", folder / "small.npz", "--features", "test_evaluate:pooled"]
    with pytest.warns(UserWarning, match="trained on other images than"):
        assert run(*flags, "--steps", 1, "--count", 24, "--out", tmp_path) == 0


# Features.


def test_features_are_a_module_a_function_or_a_file(tmp_path):
    cpu = torch.device("cpu")
    assert isinstance(evaluate.find_features("test_evaluate:pooled", cpu).module, Pooled)
    assert isinstance(evaluate.find_features("test_evaluate:Pooled", cpu).module, Pooled)
    assert evaluate.find_features("test_evaluate:pooled_here", cpu).module is sys.modules["test_evaluate"].pooled_here
    classifier.Classifier((3, 8, 8), ("a", "b")).save(tmp_path / "c.safetensors")
    assert evaluate.find_features(str(tmp_path / "c.safetensors"), cpu).classifier.classes == ("a", "b")
    assert evaluate.find_features(None, cpu).classifier.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("match", "spec"),
    [
        ("give MODULE:NAME", "nothing"),
        ("cannot be had .ModuleNotFoundError", "no_such_module:net"),
        ("cannot be had .AttributeError", "test_evaluate:absent"),
        ("cannot be had .TypeError: 'int' object is not callable", "test_evaluate:number"),
        ("is a Dataset; it must be a torch.nn.Module", "helpers:small_dataset"),
        ("no file .*trains one", "nowhere.safetensors"),
    ],
)
def test_features_that_are_none(match, spec):
    with pytest.raises(ValueError, match=match) as caught:
        evaluate.find_features(spec, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_inception_where_torch_fidelity_is_there_with_weights(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="torch-fidelity, which is not installed"):
        evaluate.find_features("inception", cpu)

    class Extractor(nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            assert features == ["2048"] and Path(feature_extractor_weights_path).is_file()

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)),)

    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    monkeypatch.syspath_prepend(tmp_path)
    stub = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    stub.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=f"nothing is downloaded here.*{evaluate.INCEPTION_WEIGHTS}"):
        evaluate.find_features("inception", cpu)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / evaluate.INCEPTION_WEIGHTS).touch()
    images = small_dataset(5).images
    found = classifier.features(evaluate.find_features("inception", cpu).module, images)
    assert np.allclose(found, images.mean((1, 2)), atol=1e-4)
    sys.modules.pop("torch_fidelity", None)


# Bad input.


def write_odd(path, stick):
    """Files of each kind of trouble, under `path`."""
    images = stick._others.images
    np.savez(path / "wide.npz", images=np.zeros((90, 32, 32, 3), np.uint8))
    np.savez(path / "oblong.npz", images=np.zeros((90, 16, 20, 3), np.uint8))
    np.savez(path / "grey.npz", images=images.mean(3).astype(np.uint8))
    np.savez(path / "alpha.npz", images=np.concatenate([images, np.full_like(images[..., :1], 255)], axis=3))
    np.savez(path / "few.npz", images=images[:40])
    np.savez(path / "float.npz", images=images / 255)
    (path / "empty").mkdir()
    (path / "text.npz").write_text("no")


@pytest.mark.parametrize(
    ("match", "flags"),
    [
        ("wide.npz: the images are 32 x 32 pixels, but the training images are 16 x 16 pixels; give --size 16 to resize", "--samples wide.npz"),
        ("oblong.npz: the images are 20 x 16 pixels, but .*give --size 16", "--samples oblong.npz"),
        ("grey.npz: the images are greyscale, but the training images are RGB; give --rgb", "--samples grey.npz"),
        ("alpha.npz: the images are RGBA, with alpha, but the training images are RGB; give --rgb", "--samples alpha.npz"),
        ("no images in empty", "--samples empty"),
        ("the Frechet distance of 64 features needs at least 70 images to compare, but there are 40; give more", "--samples few.npz"),
        ("needs at least 70 images to compare, but there are 50", "--count 50"),
        ("float.npz: images are float64.*multiply", "--samples float.npz"),
        ("text.npz: not a readable .npz", "--samples text.npz"),
        ("no such file or folder: 'nowhere'", "--samples nowhere"),
        ("no such file or folder: 'nowhere'", "--data nowhere"),
        ("no checkpoint 'nowhere'", "--checkpoint nowhere"),
        ("is for images of 16 x 16 pixels, but these are 8 x 8 pixels; give --size 16, or", "--samples good8.npz --data good8.npz --count 80"),
        ("images of sprites are 16 x 16 pixels, but the training images are 8 x 8 pixels", "--data good8.npz"),
        ("unknown solver 'nosuch'", "--solver nosuch"),
        ("--solver is of sampling, but --samples are images", "--samples good8.npz --solver ddim"),
        ("--sweep is of sampling", "--samples good8.npz --sweep"),
        ("--steps is of one evaluation; a sweep takes --evaluations", "--sweep --steps 5"),
        ("--evaluations is of a sweep", "--evaluations 5"),
        ("--features nosuch: give MODULE:NAME", "--features nosuch"),
        ("precision and recall needs at least 16 images to compare, but there are 9", "--features test_evaluate:pooled --count 9"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, stick, match, flags):
    monkeypatch.chdir(tmp_path)
    write_odd(tmp_path, stick)
    save(tmp_path / "good8.npz", small_dataset(200, 90))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        run(*flags.split())
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.name not in before] in ([], ["evaluation"])
    assert not list(tmp_path.glob("evaluation/*"))


def test_size_and_rgb_are_the_offered_ways_out(tmp_path, stick, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = stick._others.images
    np.savez("twice.npz", images=images.repeat(2, 1).repeat(2, 2))
    np.savez("grey.npz", images=images.mean(3).astype(np.uint8))
    clear = np.concatenate([images, np.where(images.min(3, keepdims=True) == 255, 0, 255).astype(np.uint8)], axis=3)
    clear[clear[..., 3] == 0] = 0  # what is clear was white
    np.savez("alpha.npz", images=clear)
    assert np.array_equal(evaluate.read_images("twice.npz", 16, False, "").images, images)
    assert np.array_equal(evaluate.read_images("alpha.npz", None, True, "").images, images)
    grey = evaluate.read_images("grey.npz", None, True, "").images
    assert grey.shape == images.shape and (grey == images.mean(3).astype(np.uint8)[..., None]).all()
    small = evaluate.read_images("grey.npz", 8, False, "").images
    assert small.shape == (COUNT, 8, 8, 1) and abs(small.mean() - grey.mean()) < 1
    assert run("--samples", "twice.npz", "--size", 16, "--count", 80, "--json") == 0
    assert json.loads(capsys.readouterr().out)["found"]["copies"] == 0


def test_files_that_are_greyscale_or_have_alpha_or_a_palette_are_named(tmp_path, stick):
    for i, image in enumerate(stick._others.images[:12]):
        picture = Image.fromarray(image)
        mode = ("RGB", "L", "P", "RGBA")[i % 4]
        (picture.quantize(16) if mode == "P" else picture.convert(mode)).save(tmp_path / f"{i:02}.png")
    with pytest.warns(UserWarning, match="of 12 images 3 have alpha, 3 are greyscale, 3 have a palette; all are read as RGB on white"):
        found = evaluate.read_images(str(tmp_path), None, False, "")
    assert found.images.shape == (12, 16, 16, 3) and np.array_equal(found.images[0], stick._others.images[0])


def test_exit_code_and_line_of_the_command(tmp_path):
    np.savez(tmp_path / "wide.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.evaluate", "--samples", "wide.npz"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("python -m fastdiff.evaluate: wide.npz: the images are 32 x 32 pixels")


# The sweep, and likelihoods.


def sweep_flags(folder, out):
    return [
        "--sweep", "--checkpoint", folder / "net.safetensors", "--data", folder / "small.npz", "--features", "test_evaluate:pooled",
        "--count", 24, "--out", out,
    ]  # fmt: skip


def test_a_sweep_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solvers, "names", lambda: ["ddim", "heun"])
    measure, calls = Yardstick.measure, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 5:  # the floor, training images again, two rows
            raise KeyboardInterrupt
        return measure(self, *args, **options)

    monkeypatch.setattr(Yardstick, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*sweep_flags(folder, tmp_path), "--evaluations", 2, 3)
    before = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["solver"], row["steps"]) for row in before["rows"]] == [("ddim", 2), ("ddim", 3)]
    assert run(*sweep_flags(folder, tmp_path), "--evaluations", 2, 3) == 0
    assert len(calls) == 5 + 2 + 2
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["rows"][:2] == before["rows"] and report["floor"] == before["floor"]
    # Heun's two evaluations a step, but for the last: 1 step is 1, 2 steps are 3.
    assert [(r["solver"], r["steps"], r["evaluations"]) for r in report["rows"]] == [
        ("ddim", 2, 2), ("ddim", 3, 3), ("heun", 1, 1), ("heun", 2, 3),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["metrics"].keys() >= {"frechet", "kernel", "recall"} for row in report["rows"])
    said = capsys.readouterr().out
    picked = report["choice"]
    assert f"It would choose {picked['solver']} with {picked['steps']} steps" in said and evaluate.RULE in said and said.count("<-") == 1
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 1000

    # Nothing is left to do; more evaluations are added; other settings are refused, and the file stays.
    run(*sweep_flags(folder, tmp_path), "--evaluations", 2, 3)
    assert len(calls) == 5 + 4 + 2
    run(*sweep_flags(folder, tmp_path), "--evaluations", 4, "--solver", "ddim")
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert len(report["rows"]) == 5 and report["about"]["evaluations"] == [2, 3, 4]
    with pytest.raises(ValueError, match=r"sweep.json is of other settings \(guidance 2.0, not 3.0\); choose another folder"):
        run(*sweep_flags(folder, tmp_path), "--guidance", 3)
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="is no sweep of this command"):
        run(*sweep_flags(folder, tmp_path))


def test_a_sweeps_row_is_an_evaluation(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solvers, "names", lambda: ["dpmpp_2m"])
    run(*sweep_flags(folder, tmp_path), "--evaluations", 3, "--json")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    run(*sweep_flags(folder, tmp_path)[1:], "--solver", "dpmpp_2m", "--steps", 3, "--json")
    assert row["metrics"] == json.loads(capsys.readouterr().out)["found"]["metrics"]


def rows(*values):
    return [
        {"solver": name, "steps": n, "evaluations": n, "seconds": n / 2, "metrics": {"frechet": {"value": v, "standard_error": e}}}
        for name, n, v, e in values
    ]


def test_the_rule_takes_the_fewest_evaluations_within_one_error_of_the_difference_to_the_least():
    made = rows(("a", 5, 3.0, 0.5), ("a", 10, 1.0, 0.2), ("b", 5, 1.3, 0.1), ("b", 8, 1.15, 0.1), ("c", 8, 1.1, 0.1), ("c", 6, 1.22, 0.1))
    # 0.22 is one error of the difference, sqrt(0.2^2 + 0.1^2), and more than either; 0.3 is not within it.
    assert evaluate.choice(made) == made[5]
    assert evaluate.choice(made[:5]) == made[4]
    assert evaluate.choice(made[:3]) == made[1]


def test_solvers_of_the_same_samples_are_one_line():
    made = rows(("a", 5, 3.0, 0.5), ("b", 5, 3.00001, 0.5), ("c", 5, 3.1, 0.5), ("a", 2, 9.0, 0.5), ("b", 2, 9.0, 0.5), ("c", 2, 9.0, 0.5))
    lines = evaluate.lines_of(made)
    assert {name: [row["evaluations"] for row in own] for name, own in lines.items()} == {"a = b": [2, 5], "c": [2, 5]}


def test_steps_of_every_solver_stay_within_the_evaluations():
    checkpoint = small_checkpoint()
    for name in solvers.names():
        for n in (1, 2, 5, 10):
            steps, count = evaluate.steps_for(checkpoint, name, n)
            assert n - 1 <= count <= n and count == len(solvers.table(name, checkpoint.schedule, steps=steps))


def test_likelihood_is_that_of_densities(folder, tmp_path, capsys):
    flags = ["--checkpoint", folder / "net.safetensors", "--count", 4, "--out", tmp_path]
    assert run("--likelihood", folder / "small.npz", *flags, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "likelihood.json").read_text())
    assert kept.pop("command").startswith("python -m fastdiff.evaluate ") and kept == printed and printed["count"] == 4
    assert (tmp_path / "likelihood.png").is_file()
    with pytest.raises(ValueError, match="8 x 8 pixels; give --size 8"):
        run("--likelihood", "sprites", *flags)

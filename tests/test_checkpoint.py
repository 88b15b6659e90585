"""Checkpoint files: whole round trips, and one clear line for everything that is no checkpoint."""

import json
import pickle
import struct

import pytest
import torch
from helpers import small_checkpoint
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff import CheckpointError, cli
from fastdiff.files import atomic_write


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    small_checkpoint().save(path, torch.float32)
    return path


def rewrite(path, change):
    """The same weights under changed metadata."""
    tensors = load_file(path)
    with open(path, "rb") as f:
        head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    about = json.loads(head["__metadata__"]["fastdiff"])
    change(about, tensors)
    save_file(tensors, path, {"fastdiff": json.dumps(about)})


def test_round_trip(saved):
    ours, back = small_checkpoint(), fastdiff.load(saved)
    assert (back.schedule, back.prediction, back.classes, back.record) == (ours.schedule, ours.prediction, ours.classes, ours.record)
    assert back.shape == (3, 8, 8)
    for (name, a), (_, b) in zip(ours.model.state_dict().items(), back.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(ours.sampler(steps=3)(4, labels=1), back.sampler(steps=3)(4, labels=1))


def test_half_the_bytes_at_half_precision(saved, tmp_path):
    small_checkpoint().save(tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * saved.stat().st_size
    for a, b in zip(fastdiff.load(saved).model.parameters(), fastdiff.load(tmp_path / "half.safetensors").model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-11, atol=2**-24)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small_checkpoint(1).save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_an_encoders_own_error_keeps_its_words(tmp_path):
    with pytest.raises(OSError, match="cannot write this"), atomic_write(tmp_path / "x.png"):
        raise OSError("cannot write this")
    assert list(tmp_path.iterdir()) == []


def test_no_such_file():
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'nowhere': neither a .safetensors file nor a shipped one \(shipped: sprites, sprites-large\)"
    ):
        fastdiff.load("nowhere")


def test_truncated_anywhere(saved):
    whole = saved.read_bytes()
    for size in (0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"not a whole \.safetensors file"):
            fastdiff.load(saved)


@pytest.mark.parametrize("content", [b"hello, world, this is no checkpoint", b"\xff" * 64, struct.pack("<Q", 10) + b"{" * 64])
def test_foreign(saved, content):
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a whole \.safetensors file"):
        fastdiff.load(saved)


def test_pickled_is_refused_and_not_run(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    saved.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="pickled"):
        fastdiff.load(saved)
    torch.save({"weight": torch.ones(2)}, saved)
    with pytest.raises(CheckpointError, match="pickled"):
        fastdiff.load(saved)
    assert not (tmp_path / "ran").exists()


def test_safetensors_of_somebody_else(saved):
    save_file({"weight": torch.ones(2)}, saved)
    with pytest.raises(CheckpointError, match="not written by fastdiff"):
        fastdiff.load(saved)
    save_file({"weight": torch.ones(2)}, saved, {"fastdiff": "{"})
    with pytest.raises(CheckpointError, match="not JSON"):
        fastdiff.load(saved)
    save_file({"weight": torch.ones(2)}, saved, {"fastdiff": "[" * 100_000})
    with pytest.raises(CheckpointError, match="not JSON"):
        fastdiff.load(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda about, _: about.update(format=2), "format version 2; this fastdiff reads version 1"),
        (lambda about, _: about.pop("format"), "no fastdiff checkpoint in it"),
        (lambda about, _: about.pop("schedule"), "unreadable metadata: KeyError: 'schedule'"),
        (lambda about, _: about.update(schedule={"name": "square"}), "unknown schedule 'square'"),
        (lambda about, _: about.update(schedule="linear"), "unreadable metadata"),
        (lambda about, _: about["network"].update(attention=True), "unknown network setting attention"),
        (lambda about, _: about["network"].update(patch="2"), "unreadable metadata"),
        (lambda about, _: about["network"].update(blocks=2), "does not fit its own network settings"),
        (lambda about, _: about["network"].update(embedding=10**9), "unreadable metadata|does not fit"),
        (lambda about, _: about.update(prediction="score"), "prediction 'score'"),
        (lambda about, _: about.update(classes=["cat"]), "1 class names for 3"),
        (lambda about, _: about.update(classes="abc"), "no list of different names"),
        (lambda about, _: about.update(classes=["a", "b", "a"]), "no list of different names"),
        (
            lambda about, _: about.update(schedule={"name": "linear", "timesteps": 10**13}),
            "unreadable metadata: .*at most 1048576 timesteps",
        ),
        (lambda _, tensors: tensors.pop("stem.bias"), "stem.bias is None"),
        (lambda _, tensors: tensors["stem.bias"].fill_(torch.nan), "no finite numbers, in stem.bias"),
        (lambda _, tensors: tensors.update({"stem.bias": torch.zeros(16, dtype=torch.int32)}), "no finite numbers, in stem.bias"),
    ],
)
def test_metadata_that_does_not_fit(saved, change, text):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        fastdiff.load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shipped_ones_are_named_by_the_commands():
    assert fastdiff.checkpoint.shipped() == ("sprites", "sprites-large")
    parser = cli.Parser()
    cli.checkpoint_option(parser)
    assert f"a shipped one: {', '.join(fastdiff.checkpoint.shipped())} (sprites)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(("name", "channels", "flops"), [("sprites", (64, 128), 0.125e9), ("sprites-large", (128, 128), 0.151e9)])
def test_shipped_sprites(name, channels, flops):
    shipped = fastdiff.load(name)
    assert shipped.shape == (3, 16, 16)
    assert shipped.classes == fastdiff.data.load().classes
    assert shipped.model.config.channels == channels
    assert shipped.model.flops() < flops
    assert {"command", "data", "step", "loss", "held_out_loss"} <= shipped.record.keys()
    path = fastdiff.checkpoint.ASSETS / f"{name}.safetensors"
    assert path.stat().st_size < 8_000_000

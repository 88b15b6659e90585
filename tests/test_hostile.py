"""Hostile files: each kind is refused in one short line, at once, and within the memory that the reader's docstring states."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import safetensors, saved
from helpers import SMALL, small_checkpoint, small_dataset, small_network
from PIL import Image
from safetensors.torch import save_file

import fastdiff
from fastdiff import Checkpoint, CheckpointError, Schedule, UNetConfig, checkpoint, data, files, runs, train
from fastdiff.classifier import Classifier, load_classifier
from fastdiff.data import DataError, Dataset
from fastdiff.unet2d import UNet2DConfig

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
LINUX = sys.platform == "linux"


def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)) << 10


@contextmanager
def within(memory, seconds=2.0):
    """The block takes at most so many bytes more than there were, at its highest, and so much of the processor's time."""
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what there is
    before, start = LINUX and status("VmRSS"), time.process_time()
    yield
    taken = time.process_time() - start
    assert taken <= seconds, f"{taken:.1f} s"
    if LINUX:
        assert status("VmHWM") - before <= memory, f"{(status('VmHWM') - before) / MIB:.0f} MiB"


def refused(read, match, memory=64 * MIB, kind=ValueError):
    with within(memory), pytest.raises(kind, match=match) as caught:
        read()
    text = str(caught.value)
    assert text and data.unshowable(text) is None and len(text) <= 1000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def refuse_checkpoint(path, content, match, **options):
    if content is not None:
        path.write_bytes(content)
    refused(lambda: fastdiff.load(path), match, kind=CheckpointError, **options)


def entry(dtype="U8", shape=(8,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def headed(header, room=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * room


def in_metadata(text):
    return safetensors(json.dumps(saved()[0] | {"__metadata__": {"fastdiff": text}}).encode())


def described(**change):
    return in_metadata(json.dumps(saved()[2] | change))


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[" * 100_000, "JSON in more than 32 levels"),
        (b'{"a":' * 40 + b"0" + b"}" * 40, "JSON in more than 32 levels"),
        (b"[" + b"[]," * MIB + b"0]", "2097153 values of JSON, and at most 262144 are read"),
        (b'{"a": 1, "a": 2}', "the same key twice in one object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"\xff\xfe{}", "utf-8"),
        ("{}".encode("utf-16"), "utf-8|not a whole"),
        (b"[]", "its header is no JSON object"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "its metadata is no object of strings"),
        ({"a": entry(), "__metadata__": None}, "its metadata is no object of strings"),
        ({"a\nb": entry()}, r"name has more than 200 characters, or ones that cannot be printed: 'a\\nb'"),
        ({"\ud800": entry()}, "ones that cannot be printed"),
        ({"x" * 201: entry()}, "name has more than 200 characters"),
        ({"a": [0]}, "a is no tensor"),
        ({"a": {**entry(), "more": 1}}, "a is no tensor"),
        ({"a": entry("F4")}, "a is of the dtype 'F4'; read are F64, F32, F16"),
        ({"a": entry(["F32"])}, "a is of the dtype"),
        ({"a": entry(shape=(-8,))}, "a is of no shape"),
        ({"a": entry(shape=(-2, -4))}, "a is of no shape"),
        ({"a": entry(shape=(True, 8))}, "a is of no shape"),
        ({"a": entry(shape=(8.0,))}, "a is of no shape"),
        ({"a": entry(shape=(1,) * 9)}, "more than 8 dimensions"),
        ({"a": entry(shape=(0, 10**30), span=(0, 0))}, "a is of no shape"),
        ({"a": entry(shape=(2**32, 2**32))}, r"a has 8 bytes for a shape of \[4294967296, 4294967296\] and U8"),
        ({"a": entry(shape=(9,))}, "a has 8 bytes for a shape of"),
        ({"a": entry(span=(0, 9))}, "a lies outside the file"),
        ({"a": entry(span=(8, 0))}, "a has -8 bytes"),
        ({"a": entry(span=(-8, 0))}, "a lies outside the file"),
        ({"a": entry(span=(0, 8, 8))}, "a lies outside the file"),
        ({"a": entry(), "b": entry()}, "its tensors overlap or leave gaps"),
        ({"a": entry(shape=(4,), span=(4, 8))}, "its tensors overlap or leave gaps"),
        ({f"{i}": entry(shape=(0,), span=(0, 0)) for i in range(16_385)}, "16385 tensors, and at most 16384 are read"),
    ],
)
def test_headers(path, header, match):
    refuse_checkpoint(path, headed(header), match, memory=256 * MIB)


def test_sizes_of_a_header_and_of_a_file(path):
    """Of sparse files, which take no room on the disk."""
    for length, size, match in (
        (0, 5 << 30, "5368709120 bytes, 0 of them header, and at most 4294967296 and 16777216 are read"),
        (17 * MIB, 64 * MIB, "67108864 bytes, 17825792 of them header, and at most 4294967296 and 16777216 are read"),
        (2**63, 8 * MIB, "a header of 9223372036854775808 bytes in a file of 8388608"),
        (2**64 - 1, 8, "a header of 18446744073709551615 bytes in a file of 8"),
    ):
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, size)
        refuse_checkpoint(path, None, match, memory=MIB)


def test_tensors_are_what_safetensors_reads(path):
    """Of every dtype, of no elements and of odd places, too; the digest is of the file."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(kind): (torch.arange(15) * 7 % 11).reshape(3, 5).to(kind) for kind in kinds} | {
        "none": torch.zeros(0, 4),
        "one": torch.ones(()),
    }
    save_file(tensors, path, {"fastdiff": "{}"})
    found, metadata, digest = checkpoint.read_safetensors(path)
    assert found.keys() == tensors.keys() and metadata == {"fastdiff": "{}"}
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    odd = headed({"a": entry(shape=(3,), span=(0, 3)), "b": entry("F32", (2,), (3, 11))}, 0) + b"abc" + struct.pack("<2f", 1.5, -2)
    path.write_bytes(odd)
    b = checkpoint.read_safetensors(path)[0]["b"]
    assert b.tolist() == [1.5, -2] and b.data_ptr() % 4 == 0


def test_digest_of_a_checkpoint(path):
    made = small_checkpoint()
    assert made.digest == ""
    made.save(path)
    back = fastdiff.load(path)
    assert back.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    changed = Checkpoint(back.model, back.schedule, back.prediction, back.classes, back.record)
    assert changed == back and changed.digest == ""


def test_a_checkpoint_takes_a_small_multiple_of_its_file(path):
    config = UNetConfig(shape=(3, 8, 8), channels=(512,), blocks=1, middle=1, embedding=256)
    Checkpoint(small_network(config=config), Schedule.linear(50)).save(path)
    size = path.stat().st_size
    assert size > 30 * MIB
    with within(6 * size, 10):
        fastdiff.load(path)


def test_the_costliest_header_stays_within_the_promise(path):
    half = files.MAX_VALUES // 2 - 100
    about = "{" + ",".join(f'"{i:x}":1.5' for i in range(half)) + "}"
    refuse_checkpoint(path, in_metadata(about), "no fastdiff checkpoint", memory=512 * MIB)


NETWORK = SMALL.config
UNET2D = {"kind": "UNet2DModel", **UNet2DConfig(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
          up_block_types=("UpBlock2D",) * 2).config}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blocks": 10**9}, "4000000000 residual blocks; a network can have at most 256"),
        ({"middle": 10**9}, "1000000004 residual blocks; a network can have at most 256"),
        ({"channels": [16] * 10_000}, "residual blocks; a network can have at most 256"),
        ({"channels": [1 << 17]}, "channels is 131072; it can be at most 65536"),
        ({"embedding": 10**9}, "embedding is 1000000000; it can be at most 65536"),
        ({"num_classes": 10**9}, "num_classes is 1000000000; it can be at most 65536"),
        ({"shape": [3, 1 << 20, 1 << 20]}, "shape is 1048576; it can be at most 65536"),
        ({"patch": 1 << 15, "shape": [3, 1 << 16, 1 << 16]}, r"shape\[0\] x patch\^2 is 3221225472"),
        ({"blocks": True}, "positive whole numbers"),
        ({"blocks": float("inf")}, "positive whole numbers"),
        ({"shape": 5}, "shape is 5; it must be a list"),
        ({"channels": "abc"}, "channels is 'abc'; it must be a list"),
        ({"channels": [float("nan")]}, "positive whole numbers"),
        ({"patch": 10**4000}, "unreadable metadata"),
    ],
)
def test_networks(path, change, match):
    with within(64 * MIB), pytest.raises(ValueError, match=match if "unreadable" not in match else "limit|must be"):
        UNetConfig.from_config(NETWORK | change)
    refuse_checkpoint(path, described(network=NETWORK | change), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000 must be at least 1 and at most 65537"),
        ({"layers_per_block": 200}, "804 residual blocks; a network can have at most 256"),
        ({"layers_per_block": True}, "layers_per_block=True must be"),
        ({"block_out_channels": [1 << 20, 32]}, r"block_out_channels=.* must be from 1 to 65536"),
        ({"block_out_channels": [-32, 32]}, r"block_out_channels=.* must be from 1 to 65536"),
        ({"block_out_channels": "ab"}, "must be a list of whole numbers"),
        ({"block_out_channels": [33, 32]}, "block_out_channels 33 is no multiple of norm_num_groups=32"),
        ({"down_block_types": [["DownBlock2D"]] * 2}, "must be a list of names"),
        ({"norm_num_groups": 0}, "norm_num_groups=0 must be"),
        ({"attn_norm_num_groups": 7}, "no multiple of attn_norm_num_groups=7"),
        ({"attention_head_dim": -1}, "attention_head_dim=-1 must be None or at least 1"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a number"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor=0 must be a number"),
        ({"dropout": "x"}, "dropout='x' must be a number"),
        ({"center_input_sample": 1}, "center_input_sample=1 must be True or False"),
        ({"in_channels": 10**12}, "in_channels=1000000000000 must be"),
        ({"num_class_embeds": 10**12}, "num_class_embeds=1000000000000 must be"),
        ({"sample_size": [8, 8, 8]}, "must be one or two whole numbers"),
        ({"sample_size": 1 << 20}, "must be one or two whole numbers"),
        ({"sample_size": 8.0}, "must be one or two whole numbers"),
    ],
)
def test_networks_of_diffusers(path, change, match):
    settings = {k: v for k, v in UNET2D.items() if k != "kind"}
    with within(64 * MIB), pytest.raises(ValueError, match=match):
        UNet2DConfig.from_config(settings | change)
    refuse_checkpoint(path, described(network=UNET2D | change), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "linear", "timesteps": 10**9}, "a schedule has at most 1048576 timesteps"),
        ({"name": "edm", "timesteps": 10**9}, "a schedule has at most 1048576 timesteps"),
        ({"name": "linear", "timesteps": True}, "timesteps is True"),
        ({"name": "linear", "beta_start": float("nan")}, "beta_start is nan"),
        ({"name": "cosine", "offset": 10**400}, "offset is 1000"),
        ({"name": "cosine", "offset": float("inf")}, "offset is inf; it must be a finite number"),
        ({"name": "flow", "shift": True}, "shift is True; it must be a finite number"),
        ({"name": "sigmoid", "tau": float("inf")}, "tau is inf; it must be a finite number"),
        ({"name": "edm", "rho": 1e-9}, "edm with .*rho=1e-09 gives noise levels that float64 cannot hold"),
        ({"name": "edm", "sigma_min": 1e-300, "rho": 1e-3}, "gives noise levels that float64 cannot hold|finite"),
        ({"name": "from_alphas_cumprod", "alphas_cumprod": ["0.5"]}, "alphas_cumprod holds what is no number"),
        ({"name": "from_alphas_cumprod", "alphas_cumprod": [10**400]}, "alphas_cumprod holds what is no number"),
        ({"name": "from_alphas_cumprod", "alphas_cumprod": [[0.5], 1]}, "alphas_cumprod holds what is no number"),
        ({"name": "from_alphas_cumprod", "alphas_cumprod": [True]}, "alphas_cumprod holds what is no number"),
        ({"name": ["linear"]}, "unknown schedule"),
        ({"name": "linear", "timesteps": "1000"}, "timesteps is '1000'"),
    ],
)
def test_schedules(path, change, match):
    with within(64 * MIB), pytest.raises(ValueError, match=match):
        Schedule.from_config(change)
    refuse_checkpoint(path, described(schedule=change), match)


def test_the_largest_networks_and_schedules_are_quick(path):
    """What is just within the limits does not fit the file, which is found out at once."""
    with within(256 * MIB):
        assert Schedule.cosine(1 << 20).timesteps == 1 << 20
    large = NETWORK | {"channels": [1 << 16], "embedding": 1 << 16, "blocks": 100, "middle": 56, "num_classes": 1 << 16}
    refuse_checkpoint(
        path, described(network=large, classes=[str(i) for i in range(1 << 16)]), "does not fit its own network", memory=128 * MIB
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: in_metadata("[" * 100_000), "not JSON, or more than is read: JSON in more than 32 levels"),
        (lambda: in_metadata(json.dumps({"format": 1, "record": json.loads("[" * 40 + "]" * 40)})), "JSON in more than 32 levels"),
        (lambda: in_metadata('{"format":1,"format":1}'), "the same key twice"),
        (lambda: in_metadata('{"format":' + "1" * 5000 + "}"), "4300 digits"),
        (lambda: headed(b'{"__metadata__": {"fastdiff": "[' + b"\\u002c" * (MIB + 9) + b']"}}', 0), "values of JSON"),
        (lambda: described(format=True), "format version True"),
        (lambda: described(format="\x1b[2J\n"), r"format version '\\x1b\[2J\\n'"),
        (lambda: described(format="x" * 10**6), "format version"),
        (lambda: described(prediction=["v"]), r"prediction \['v'\]"),
        (lambda: described(network={"kind": []}), "unreadable metadata: TypeError"),
        (lambda: described(network={"kind": "Unpickler"}), "unreadable metadata: KeyError"),
        (lambda: described(network={"a\nb\x1b": 1}), r"unknown network setting a\\nb\\x1b"),
        (lambda: described(classes=["cat", "d\nog"]), r"the class name 'd\\nog' has a control character"),
        (lambda: described(classes=["cat", "\x1b[31m"]), "has a control character"),
        (lambda: described(classes=["cat", "\ud800"]), "has a control character or half a character"),
        (lambda: described(classes=["cat", "a\u2028b"]), "has a control character"),
        (lambda: described(classes=["cat", "x" * 201]), "a class name has 201 characters, and at most 200 are allowed"),
        (lambda: described(classes=["cat", "cat"]), "no list of different names"),
        (lambda: described(record=3), "unreadable metadata"),
    ],
)
def test_metadata(path, content, match):
    refuse_checkpoint(path, content(), match, memory=128 * MIB)


def test_a_pickle_by_any_name_is_not_opened(tmp_path, path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for protocol in range(2, 6):
        refuse_checkpoint(path, pickle.dumps(Bomb(), protocol), "is a pickled checkpoint")
    torch.save({"a": Bomb()}, path)
    refuse_checkpoint(path, None, "is a pickled checkpoint")
    # A header of 128 bytes begins like a pickle.
    header = json.dumps({"a": entry(span=(0, 9))}).encode()
    refuse_checkpoint(path, headed(header.ljust(128)), "a lies outside the file")
    for name in ("b.npy", "b.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        refused(lambda name=name: data.load(tmp_path / name), "not a readable", kind=DataError)
        np.save(tmp_path / "c.npy", np.array([Bomb()], object), allow_pickle=True)
    refused(lambda: data.load(tmp_path / "c.npy"), "holds pickled Python objects", kind=DataError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.npz")
    for suffix in (".npy", ".safetensors", ".png"):
        os.symlink("fifo.npz", tmp_path / f"fifo{suffix}")
        os.symlink("/dev/zero", tmp_path / f"zero{suffix}")
        os.symlink(f"loop{suffix}", tmp_path / f"loop{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
    os.symlink("/dev/zero", tmp_path / "zero.npz")
    for name in ("fifo", "zero", "folder", "loop"):
        refuse_checkpoint(tmp_path / f"{name}.safetensors", None, "no checkpoint")
        refused(lambda name=name: load_classifier(tmp_path / f"{name}.safetensors"), "no file", kind=CheckpointError)
        with pytest.raises(CheckpointError, match=r"cannot read .*: (not a regular file|Too many)"):
            checkpoint.read_tensors(tmp_path / f"{name}.safetensors")
    for name in ("fifo.npz", "zero.npz", "fifo.npy", "zero.npy"):
        refused(lambda name=name: data.load(tmp_path / name), "cannot be (read|opened) .*not a regular file", kind=DataError)
    for name in ("fifo.png", "zero.png"):
        refused(lambda name=name: data.load(tmp_path / name, tile=4), "not a regular file", kind=DataError)
    refused(lambda: data.load(tmp_path / "loop.npy"), "no such file", kind=DataError)
    np.save(tmp_path / "images.npy", np.zeros((1, 2, 2, 3), np.uint8))
    refused(lambda: data.load(tmp_path / "images.npy", labels=tmp_path / "fifo.npy"), "not a regular file", kind=DataError)


def test_names_that_no_file_can_have():
    for name in ("x" * 5000, "a\0b", "\ud800"):
        for read, match in ((fastdiff.load, "no checkpoint"), (load_classifier, "no file"), (data.load, "no such file")):
            refused(lambda name=name, read=read: read(name), match)


def test_files_that_change_or_may_not_be_read(path, monkeypatch):
    small_checkpoint().save(path)
    whole, places = path.read_bytes(), checkpoint._places
    for size in (len(whole) - 5, len(whole) + 5):

        def change(*given, size=size):
            os.truncate(path, size)
            return places(*given)

        monkeypatch.setattr(checkpoint, "_places", change)
        refuse_checkpoint(path, whole, "its size changed while it was read")
    monkeypatch.setattr(checkpoint, "_places", places)

    def forbidden(name, *flags):
        raise PermissionError(13, "Permission denied", str(name))

    for name in ("a.npz", "a.npy", "a.png"):
        path.with_name(name).touch()
    monkeypatch.setattr("os.open", forbidden)
    refuse_checkpoint(path, None, "cannot read .*: Permission denied")
    for name, match in (("a.npz", "cannot be read"), ("a.npy", "cannot be opened"), ("a.png", "not a readable image")):
        refused(
            lambda name=name: data.load(path.with_name(name), tile=4 if name == "a.png" else None),
            f"{match}.*Permission denied",
            kind=DataError,
        )


def test_a_classifier_takes_no_memory_before_its_file_is_known_to_fit(tmp_path):
    path = tmp_path / "c.safetensors"
    model = Classifier((3, 8, 8), ("a", "b"), width=4, features=8)
    model.save(path)
    tensors, about = checkpoint.read_tensors(path)
    for odd, match in (
        ({"width": 30_000}, "does not fit"),
        ({"features": 1 << 16, "width": 1 << 16}, "does not fit"),
        ({"width": 10**12}, "at most 65536"),
        ({"shape": [3, 8, True]}, "whole numbers"),
        ({"classes": ["a", "b\n"]}, "no list of names"),
        ({"classes": "ab"}, "no list of names"),
    ):
        checkpoint.write_tensors(path, tensors, about | odd)
        refused(lambda: load_classifier(path), f"unfitting weights or metadata: .*{match}", kind=CheckpointError)


def test_a_state_takes_no_memory_before_its_file_is_known_to_fit(tmp_path):
    small, path = small_dataset(), tmp_path / train.STATE
    settings = train.Settings(steps=1, batch=2, channels=(8, 8), blocks=1, middle=0, timesteps=50)
    train.train(settings, small, tmp_path)
    tensors, about = checkpoint.read_tensors(path)
    large = dataclasses.replace(settings, channels=(1024, 1024))
    for digest, match in ((about["digest"], "is damaged: "), ("", "was trained on other data")):
        checkpoint.write_tensors(path, tensors, about | {"settings": dataclasses.asdict(large), "digest": digest})
        refused(lambda: train.train(large, small, tmp_path, resume=True), match)


def npy(shape, dtype="|u1", body=b"", fortran=False, version=(1, 0)):
    stream = io.BytesIO()
    header = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode() if not isinstance(shape, bytes) else shape
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    stream.write(b"\x93NUMPY" + bytes(version) + len(header).to_bytes(2 if version == (1, 0) else 4, "little") + header + body)
    return stream.getvalue()


def archive(entries, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries of the same name
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


IMAGES = npy((2, 2, 2, 3), body=bytes(24))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy((-2, -2, 2, 3), body=bytes(24)), r"its header has the shape \(-2, -2, 2, 3\)"),
        (npy((2, 2, 2, 3), "|O", bytes(24 * 8)), "holds pickled Python objects"),
        (npy((2,), [("a", "|u1"), ("b", "|O")], bytes(18)), "holds pickled Python objects"),
        (npy((2,), [("a", "|u1")], bytes(2)), "must be an array of plain numbers, or names"),
        (npy((2, 2), ("|u1", (2, 3)), bytes(24)), "must be an array of plain numbers, or names|not a readable"),
        (npy((10**18,), "<U0"), "must be an array of plain numbers, or names"),
        (npy((10**18,), "|V0"), "must be an array of plain numbers, or names"),
        (npy((2,), "<M8[s]", bytes(16)), "must be an array of plain numbers, or names"),
        (npy((0, 10**30)), r"not a readable|no images"),
        (npy((1,) * 70, body=b"\0"), "not a readable"),
        (npy((1 << 40,)), "1099511627776 bytes decoded, more than the 8589934592 allowed"),
        (npy((1 << 30,)), "truncated or damaged"),
        (npy((2, 2, 2, 3), body=bytes(25)), "truncated or damaged"),
        (npy((2.5,), body=bytes(2)), "not a readable"),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}"), "not a readable|bytes decoded"),
        (npy(b"(" * 9000 + b")" * 9000), "not a readable"),
        (npy(b"-" * 9000 + b"1"), "not a readable"),
        (npy(b"[" * 60_000), "not a readable"),
        (npy(b" " * (8 * MIB), version=(2, 0)), "not a readable"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "not a readable"),
        (b"\x93NUMPY\x09\x00" + IMAGES[8:], "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_npy(tmp_path, content, match):
    (tmp_path / "a.npy").write_bytes(content)
    refused(lambda: data.load(tmp_path / "a.npy"), match, kind=DataError)
    if len(content) < 1 << 16:
        (tmp_path / "a.npz").write_bytes(archive([("images.npy", IMAGES), ("labels.npy", content)]))
        refused(lambda: data.load(tmp_path / "a.npz"), f"{match}|labels are empty|0 labels", kind=DataError)


def test_npy_of_fortrans_order_and_of_later_versions(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    for version in ((1, 0), (2, 0), (3, 0)):
        (tmp_path / "a.npy").write_bytes(npy((2, 2, 2, 3), body=images.tobytes("F"), fortran=True, version=version))
        assert np.array_equal(data.load(tmp_path / "a.npy").images, images)
    # As Python 2 wrote it, of which NumPy would warn.
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 2L, 2L, 3L)}"
    (tmp_path / "a.npy").write_bytes(npy(header, body=images.tobytes()))
    assert np.array_equal(data.load(tmp_path / "a.npy").images, images)


def overlapping():
    """An entry that is said to begin inside another."""
    content = bytearray(archive([("images.npy", IMAGES), ("other.npy", IMAGES)], zipfile.ZIP_STORED))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = (50).to_bytes(4, "little")
    return bytes(content)


def zeros(count):
    return archive([("images.npy", npy((count, 1, 1, 1), body=bytes(count)))])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: zeros(65 * MIB), "68157568 bytes decoded, more than 67108864 and more than 200 times its own"),
        (lambda: archive([(f"{n}.npy", npy((40 * MIB, 1, 1, 1), body=bytes(40 * MIB))) for n in ("images", "test")]), "more than 200 times its own"),
        (lambda: archive([("images.npy", IMAGES)] * 2), "two entries of the same name"),
        (overlapping, "entries that overlap"),
        (lambda: archive([("images.npy", IMAGES)], zipfile.ZIP_BZIP2), "packed in a way that NumPy does not use"),
        (lambda: archive([("images.npy", IMAGES)], zipfile.ZIP_LZMA), "packed in a way that NumPy does not use"),
        (lambda: archive([(f"{i:040}.npy", b"") for i in range(12_000)] + [("images.npy", IMAGES)]), "table of contents"),
        (lambda: archive([("../images.npy", IMAGES), ("/images.npy", IMAGES)]), r"no array 'images' in it \(found: '\.\./images', '/images'\)"),
        (lambda: archive([("x\n\x1b[2J" + "y" * 60_000, IMAGES)]), "no array 'images' in it"),
        (lambda: archive([("images.npy", IMAGES), ("labels.npy", npy((1, 1 << 20), body=b"\1" + bytes((1 << 20) - 1)))]), "1 labels for 2 images"),
        (lambda: archive([("images.npy", npy((1, 1, 1, 1), body=b"1")), ("labels.npy", npy((1, 1 << 20), body=b"\1" + bytes((1 << 20) - 1)))]),
         "one-hot labels have 1048576 columns, more than the 65536 classes allowed"),
        (lambda: classed(npy((2,), "<U201", bytes(1608))), "named by up to 201 characters; at most 65536 of 200 are allowed"),
        (lambda: classed(npy((65_537,), "<U1", bytes(4 * 65_537))), "65537 classes"),
        (lambda: classed(npy((2,), "<U1", b"\xff\xff\xff\xff\0\0\0\0")), "classes are no text"),
        (lambda: classed(npy((2,), "<U1", b"\0\xd8\0\0\0\0\0\0")), "has a control character or half a character"),
        (lambda: classed(npy((2,), "<U1", b"\n\0\0\0a\0\0\0")), "has a control character"),
        (lambda: classed(npy((2,), "<U1", bytes(8))), "two classes have the same name"),
    ],
)  # fmt: skip
def test_npz(tmp_path, content, match):
    (tmp_path / "a.npz").write_bytes(content())
    refused(lambda: data.load(tmp_path / "a.npz"), match, memory=32 * MIB, kind=DataError)


def classed(classes):
    return archive([("images.npy", IMAGES), ("labels.npy", npy((2,), body=b"\0\1")), ("classes.npy", classes)])


def test_names_in_an_archive_are_no_paths(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    names = ("../out.npy", "/tmp/out.npy", "C:\\out.npy", "..\\..\\out", "images.npy/../../out", "\u202eypn.")
    Path("a.npz").write_bytes(archive([*((name, IMAGES) for name in names), ("images.npy", IMAGES)]))
    assert len(data.load("a.npz")) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "inside"]


def test_npz_memory_is_as_promised(tmp_path):
    """An honest archive that is just no bomb: 32 million images of one pixel, with labels that become eight times as large."""
    count = 31 * MIB
    parts = [("images.npy", npy((count, 1, 1, 1), body=bytes(count))), ("labels.npy", npy((count,), body=bytes(count)))]
    (tmp_path / "a.npz").write_bytes(archive(parts))
    del parts
    with within(10 * 2 * count, 10):
        assert len(data.load(tmp_path / "a.npz")) == count


def chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, body=b"", *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def picture(kind, **options):
    stream = io.BytesIO()
    Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(stream, kind, **options)
    return stream.getvalue()


def rle_bmp(width, height, body):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def many_scans(count, side=8):
    """A progressive JPEG whose last scan comes many times; each is gone through for the whole image."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: png(4097, 4096), "claims 4097 x 4096 pixels, more than the 16777216 allowed"),
        (lambda: png(65_535, 65_535), "claims more pixels than the 16777216 allowed"),
        (lambda: png(2**31 - 1, 2**31 - 1), "claims more pixels than the 16777216 allowed|not a readable"),
        (lambda: png(0, 0), "not a readable"),
        (lambda: picture("GIF")[:6] + b"\xff\xff\xff\xff" + picture("GIF")[10:], "claims more pixels|not a readable"),
        (lambda: rle_bmp(4096, 1024, b"\0\1"), "claims 4096 x 1024 pixels, more than the 1048576 allowed"),
        (lambda: b"P3\n4096 1024\n255\n" + b"1 " * 1000, "claims 4096 x 1024 pixels, more than the 1048576 allowed"),
        (lambda: many_scans(1000), "has more scans than any camera or program writes of 8 x 8 pixels"),
        (lambda: many_scans(30, 4096), "has more scans than any camera or program writes of 4096 x 4096 pixels"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n", "it is none of PNG, JPEG"),
    ],
)
def test_images(tmp_path, content, match):
    (tmp_path / "a.png").write_bytes(content())
    refused(lambda: data.load(tmp_path / "a.png", tile=4), match, memory=128 * MIB, kind=DataError)


MANY = 32 * MIB


def many(part, size=MANY):
    return part * (size // len(part))


def inside(kind, place, part, size=MANY):
    """A picture with a part many times ahead of a place in it."""
    whole = picture(kind)
    at = whole.index(place) - (4 if kind == "PNG" else 0)
    return whole[:at] + many(part, size) + whole[at:]


def segment(code, body):
    return b"\xff" + bytes([code]) + struct.pack(">H", 2 + len(body)) + body


def webp(*chunks):
    """A WebP of 8 x 8 pixels in the extended format."""
    moving = chunks[0].startswith(b"ANMF")
    body = b"WEBPVP8X" + struct.pack("<IBxxxBxxBxx", 10, 2 * moving, 7, 7) + moving * (b"ANIM" + struct.pack("<I6x", 6)) + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def frame(body):
    """A frame of a moving WebP of 8 x 8 pixels."""
    body = struct.pack("<6xBxxBxx3xx", 7, 7) + body
    return b"ANMF" + struct.pack("<I", len(body)) + body


def tiff(entries=(), body=b"", width=8, height=8, packed=1, strips=(4, 1, 8), lengths=(4, 1, 64)):
    """A grey TIFF. Entries are (tag, type, count, value), where strips, lengths and any entry may stand for what lies at a place of the body."""
    size = [(256, 4, 1, width), (257, 4, 1, height), (278, 4, 1, height)]
    known = sorted([*size, (258, 3, 1, 8), (259, 3, 1, packed), (262, 3, 1, 1), (273, *strips), (279, *lengths), *entries])
    start = 14 + 12 * len(known)
    rows = [(tag, kind, count, value + start if count > 4 else value) for tag, kind, count, value in known]
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(struct.pack("<HHII", *row) for row in rows) + bytes(4) + body


PARTS = r"has more than 65536 parts, as no camera or program writes; save it anew"
TABLES = r"has more than 65536 bytes of tables, as no camera"
HEADER = r"has more than 65536 bytes of header, as no camera"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\xe5\0\2"), PARTS),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\xfe\0\2"), PARTS),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\xdb\0\2"), TABLES),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\xc4\0\2"), TABLES),
        (lambda: inside("JPEG", b"\xff\xe0", segment(0xDB, (b"\0" + b"\1" * 64) * 1000)), TABLES),
        (lambda: inside("JPEG", b"\xff\xe0", segment(0xC0, b"\x08\0\x08\0\x08\3" + b"\1\x11\0" * 21_000)), TABLES),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\xd0"), PARTS),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff\0"), PARTS),
        (lambda: inside("JPEG", b"\xff\xe0", b"\xff"), PARTS),
        (lambda: inside("PNG", b"IDAT", chunk(b"zzZz")), PARTS),
        (lambda: inside("PNG", b"IDAT", chunk(b"tEXt")), PARTS),
        (lambda: inside("PNG", b"IDAT", chunk(b"PLTE", b"abc")), PARTS),
        (lambda: inside("PNG", b"IDAT", chunk(b"IDAT")), PARTS),
        (lambda: inside("PNG", b"IEND", chunk(b"IDAT")), PARTS),
        (lambda: inside("PNG", b"IEND", chunk(b"zzZz")), PARTS),
        (lambda: inside("GIF", b",\0\0\0\0", b"\x21\xf9\0\0"), PARTS),
        (lambda: inside("GIF", b",\0\0\0\0", b"\x21\xf9\4\0\0\0\0\0"), PARTS),
        (lambda: inside("GIF", b",\0\0\0\0", b"\x21\xff\0\0"), PARTS),
        (lambda: inside("GIF", b",\0\0\0\0", b"\x21\xfe\1a\0"), PARTS),
        (lambda: inside("GIF", b",\0\0\0\0", b"\0"), PARTS),
        (lambda: picture("GIF").replace(b",\0\0\0\0", b"\x21\xfe" + many(b"\1a") + b"\0,\0\0\0\0", 1), PARTS),
        (lambda: webp(many(b"zzzz\0\0\0\0"), picture("WEBP")[12:]), PARTS),
        (lambda: b"P6\n#" + many(b"x") + b"\n8 8\n255\n" + bytes(192), HEADER),
        (lambda: b"P6\n8 8\n25#" + many(b"x") + b"\n5\n" + bytes(192), HEADER),
        (lambda: b"P6\n" + many(b" ") + b"8 8\n255\n" + bytes(192), HEADER),
        (lambda: b"P3\n8 8\n255\n" + b"#\n" * MIB + b"1 " * 192, "has more than 1024 comments, as no camera"),
        (lambda: rle_bmp(8, 8, many(b"\0\2\0\0")), r"has 33555510 bytes for 8 x 8 pixels, as no program writes; save it anew"),
        (lambda: rle_bmp(8, 8, many(b"\1\0")), r"bytes for 8 x 8 pixels, as no program"),
        (lambda: tiff(width=1, height=1 << 20, strips=(3, 1 << 20, 0), body=bytes(2 * MIB)), PARTS),
        (lambda: tiff([(338, 5, 4 * MIB, 0)], many(b"\1\0\0\0")), PARTS),
        (lambda: b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 10**6) + bytes(20 * 10**6), PARTS),
    ],
)
def test_images_of_many_parts(tmp_path, content, match):
    path = tmp_path / "a.png"
    path.write_bytes(content())
    refused(lambda: data.load(path, tile=4), match, memory=128 * MIB, kind=DataError)
    path.unlink()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("JPEG", lambda: inside("JPEG", b"\xff\xe0", segment(0xE1, b"Exif\0\0" + bytes(65_000)), 3 * MANY)),
        ("JPEG", lambda: inside("JPEG", b"\xff\xd9", b"\xff")),
        ("PNG", lambda: inside("PNG", b"IDAT", chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(MIB), 9)))),
        ("PNG", lambda: inside("PNG", b"IDAT", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(MIB), 9)))),
        ("PNG", lambda: inside("PNG", b"IEND", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * MIB), 9)))),
        ("WEBP", lambda: webp(picture("WEBP", lossless=True)[12:], many(b"zzzz\0\0\0\0", 3 * MANY))),
        ("WEBP", lambda: webp(frame(picture("WEBP", lossless=True)[12:] + many(b"zzzz\0\0\0\0", 3 * MANY)))),
        ("WEBP", lambda: webp(many(frame(picture("WEBP", lossless=True)[12:]), 3 * MANY))),
        ("TIFF", lambda: tiff([(282, 5, 4 * MIB, 0), (283, 5, 4 * MIB, 0)], many(b"\1\0\0\0"))),
    ],
)
def test_what_no_pixel_needs_is_not_looked_into(tmp_path, kind, content):
    path = tmp_path / "a.png"
    path.write_bytes(tiff() if kind == "TIFF" else picture(kind, **({"lossless": True} if kind == "WEBP" else {})))
    plain = data.load(path, tile=4).images
    path.write_bytes(content())
    with within(256 * MIB):
        assert np.array_equal(data.load(path, tile=4).images, plain)
    path.unlink()


def test_tiffs_of_strips_in_one_place(tmp_path):
    """65,536 strips, each said to be the same MiB; and a tile of 4 GiB for an image of 64 pixels."""
    count = 1 << 16
    body = struct.pack("<I", 14 + 12 * 8) * count + struct.pack("<I", MIB) * count + bytes(MIB)
    (tmp_path / "a.tif").write_bytes(tiff([(284, 3, 1, 1)], body, 1, count, 5, (4, count, 0), (4, count, 4 * count)))
    refused(lambda: data.load(tmp_path / "a.tif", tile=4), "its strips are of more bytes than the file has", kind=DataError)
    tiles = [(322, 4, 1, 1 << 16), (323, 4, 1, 1 << 16), (324, 4, 1, 8), (325, 4, 1, 64)]
    (tmp_path / "a.tif").write_bytes(tiff(tiles, packed=5))
    refused(lambda: data.load(tmp_path / "a.tif", tile=4), "more than 16777216 pixels in a tile", kind=DataError)
    scans = many_scans(30, 4096)
    content = tiff(body=scans, width=4096, height=4096, packed=7, strips=(4, 1, 14 + 12 * 8), lengths=(4, 1, len(scans)))
    (tmp_path / "a.tif").write_bytes(content)
    refused(lambda: data.load(tmp_path / "a.tif", tile=4), "has too many scans for its pixels, as no camera", kind=DataError)
    for magic, match in ((b"MM\0+", "a big-endian BigTIFF"), (b"II*\0\4\0\0\0", "its directory lies in its header")):
        (tmp_path / "a.tif").write_bytes(magic + tiff()[len(magic) :])
        refused(lambda: data.load(tmp_path / "a.tif", tile=4), match, kind=DataError)


def test_what_programs_and_cameras_write_is_read(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    path = tmp_path / "a.png"

    def read(**options):
        image.save(path, **options)
        with Image.open(path) as file:
            plain = np.asarray(data._on_white(file))
        assert np.array_equal(data.load(path, tile=64).images[0], plain), options

    # A photo: Exif, 3 MiB of a profile in 50 segments, and what a phone adds after the picture.
    photo = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + bytes(50_000), "icc_profile": rng.bytes(3 * MIB), "xmp": b"<x/>" * 10_000}
    for progressive in (False, True):
        read(format="JPEG", **photo, progressive=progressive, comment=b"a" * 1000)
    read(format="MPO", save_all=True, append_images=[image.rotate(90)])
    path.write_bytes(path.read_bytes() + many(rng.bytes(1 << 20)))
    data.load(path, tile=64)
    for kind in ("PNG", "TIFF", "WEBP"):
        read(format=kind, exif=photo["exif"], icc_profile=rng.bytes(100_000), **({"lossless": True} if kind == "WEBP" else {}))
    for packed in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        read(format="TIFF", compression=packed, save_all=True, append_images=[image.rotate(90)], tiffinfo={278: 8, 700: b"<x/>" * 10_000})
    read(format="TIFF", big_tiff=True)
    read(format="GIF", save_all=True, append_images=[image.rotate(90)], comment=b"a" * 1000, transparency=3, loop=0)

    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    body = b"".join(b"\0" + row.tobytes() for x, y, across, down in passes for row in pixels[y::down, x::across])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 1))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND"))
    assert np.array_equal(data.load(path, tile=64).images[0], pixels)


def test_a_large_sheet_is_read(tmp_path):
    """4096 x 4096 pixels with alpha, not compressed: 64 MiB."""
    pixels = np.random.default_rng(0).integers(0, 256, (4096, 4096, 4), np.uint8)
    pixels[..., 3] |= 255
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    assert (tmp_path / "a.png").stat().st_size > 64 * MIB
    with within(1024 * MIB, 10):
        images = data.load(tmp_path / "a.png", tile=1024).images
    assert np.array_equal(images[5], pixels[1024:2048, 1024:2048, :3])
    (tmp_path / "a.png").unlink()


def test_the_largest_image_stays_within_the_promise(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4096, 4096, bytes(4097 * 4096)))
    with within(1024 * MIB, 10), pytest.raises(DataError, match="every tile is transparent or of a single colour"):
        data.load(tmp_path / "a.png", tile=4096)
    (tmp_path / "b.bmp").write_bytes(rle_bmp(1 << 20, 1, b"\0\0\0\1"))
    with within(1024 * MIB), pytest.raises(DataError):
        data.load(tmp_path / "b.bmp", tile=1)
    for kind in ("JPEG", "WEBP", "GIF"):
        Image.new("RGB", (4096, 4096), "red").save(tmp_path / "d.png", kind, **({"progressive": True} if kind == "JPEG" else {}))
        with within(1024 * MIB, 4), pytest.raises(DataError, match="does not divide into tiles of 4095"):
            data.load(tmp_path / "d.png", tile=4095)
    with open(tmp_path / "c.png", "wb") as file:
        file.truncate(data.MAX_IMAGE_BYTES + 1)
    refused(lambda: data.load(tmp_path / "c.png", tile=4), "134217729 bytes, more than the 134217728 allowed", kind=DataError)


def test_moving_pictures_are_their_first_frame(tmp_path):
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "b.png", "c.webp"):
        (tmp_path / name).unlink(missing_ok=True)
        first.save(tmp_path / name, save_all=True, append_images=[second] * 50, **({"lossless": True} if name == "c.webp" else {}))
    assert np.array_equal(data.load(tmp_path).images, np.stack([np.asarray(first)] * 3))


def test_folders(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.png")
        os.symlink("/dev/zero", tmp_path / "c.png")
        os.symlink("d.png", tmp_path / "d.png")
        os.symlink("loop", tmp_path / "loop")
        os.symlink(".", tmp_path / "e.png")  # a folder called so, which has images: itself
        os.symlink("nowhere", tmp_path / "f.png")
        (tmp_path / "e.png").unlink()
    with within(64 * MIB):
        assert len(data.load(tmp_path)) == 1
    (tmp_path / "classes").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "classes" / "a.png")
    for i in range(490):
        (tmp_path / f"{i}.txt").touch()
        (tmp_path / "classes" / f"{i}.txt").touch()
    assert len(data.load(tmp_path)) == 1
    for limit in (400, 505):
        monkeypatch.setattr(data, "MAX_ENTRIES", limit)
        refused(lambda: data.load(tmp_path), f"more entries than the {limit} allowed in all; pack the images into an .npz", kind=DataError)


def test_a_folders_names_are_shown_on_one_line(tmp_path):
    (tmp_path / "x\n\x1b[31m.png").write_bytes(b"damaged")
    refused(lambda: data.load(tmp_path), r"x\\n\\x1b\[31m\.png: not a readable image", kind=DataError)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable of 2 images: x\\n\\x1b\[31m\.png"):
        data.load(tmp_path, skip_bad=True)
    (tmp_path / "c" / "b\nad").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "c" / "b\nad" / "a.png")
    refused(lambda: data.load(tmp_path / "c"), r"the class name 'b\\nad' has a control character", kind=DataError)
    refused(
        lambda: data.load(tmp_path / "nowhere\n" / ("x" * 5000)), r"no such file or folder: .*nowhere\\n/xxx.* \.\.\. .*xxx", kind=DataError
    )


def test_names_of_classes():
    part = small_dataset(6, 0)
    for name, match in (("a\x07", "control character"), ("x" * 201, "201 characters"), ("\udc80", "half a character")):
        with pytest.raises(DataError, match=match):
            Dataset(part.images, part.labels, ("cat", "dog", name))
    Dataset(part.images, part.labels, ("", "Käse, 猫 \u200d", "x" * 200))


def manifest_with(filling, size=runs.MAX_MANIFEST):
    head, end = b'{"fastdiff_run": 1, "x": [', b"0]}"
    return head + filling * ((size - len(head) - len(end)) // len(filling)) + end


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"a",', b"1.5,", b"[[],[]],", b'{"a":0},'], ids=bytes.decode)
def test_a_manifest_of_many_values(tmp_path, filling):
    path = tmp_path / runs.MANIFEST
    path.write_bytes(manifest_with(filling))
    refused(lambda: runs.read_manifest(path), "values of JSON, and at most 800000 are read", memory=128 * MIB, kind=runs.RunError)


def test_the_costliest_manifest_stays_within_the_promise(tmp_path):
    path = tmp_path / runs.MANIFEST
    path.write_bytes(manifest_with(b"{},", int(1.4 * runs.MAX_VALUES)))
    refused(lambda: runs.read_manifest(path), "KeyError", memory=512 * MIB, kind=runs.RunError)
    path.write_bytes(b"[" * MIB)
    refused(lambda: runs.read_manifest(path), "more than 32 levels|values of JSON", memory=512 * MIB, kind=runs.RunError)


@pytest.mark.parametrize(
    "filling", [b"\n", b"[[],[]],", b'{"shard": 1}\n', b'{"shard": 0, "sha256": "' + b"a" * 64 + b'"}\n', b'{"shard": '], ids=range(5)
)
def test_a_journal_of_nothing(tmp_path, filling):
    path = tmp_path / ".journal-0.jsonl"
    path.write_bytes(filling * (runs.MAX_MANIFEST // len(filling)))
    with within(128 * MIB):
        found = runs._read_journal(runs.Plan(0, 4, 2, (8, 8, 3)), path)
    assert found == ({0: "a" * 64} if b"aa" in filling else {})


def test_a_pipelines_folder_is_never_unpickled(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = pytest.importorskip("fastdiff.diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(20)).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    before = ours.load(tmp_path)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in before.model.state_dict().items())

    # As diffusers called the weights of attention once.
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in unet.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = value.contiguous()
    save_file(renamed, weights)
    assert all(torch.equal(v, before.model.state_dict()[k]) for k, v in ours.load(tmp_path).model.state_dict().items())

    def change(file, match, text=None, **values):
        path = tmp_path / file
        was = path.read_text()
        path.write_text(json.dumps(json.loads(was) | values) if text is None else text)
        refused(lambda: ours.load(tmp_path), match, kind=CheckpointError)
        path.write_text(was)

    change("unet/config.json", "at most 65537", layers_per_block=10**9)
    change("unet/config.json", "does not fit its own network settings", block_out_channels=[1 << 16, 1 << 16])
    change("unet/config.json", "JSON in more than 32 levels", "[" * 100_000)
    change("model_index.json", "RecursionError|32 levels", "[" * 100_000)
    change("model_index.json", "the same key twice", '{"unet": 1, "unet": 2}')
    change("model_index.json", "its network is a", unet=["diffusers", {"a": "\x1b\n"}])
    change("scheduler/scheduler_config.json", "num_train_timesteps is 1000000000", num_train_timesteps=10**9)
    change("scheduler/scheduler_config.json", "num_train_timesteps is True", num_train_timesteps=True)
    change("scheduler/scheduler_config.json", "cannot be read as a checkpoint", beta_schedule="x\n")
    change("scheduler/scheduler_config.json", "cannot be read as a checkpoint", "[]")

    ours.save(small_checkpoint(), tmp_path / "own")
    config = "own/unet/config.json"
    assert ours.load(tmp_path / "own").classes == ("cat", "dog", "10")
    for classes, match in (
        (["a", "b"], "no 3 different names"),
        (["a", "b", 3], "no 3 different names"),
        ([["a"], "b", "c"], "no 3 different names"),
        (["a", "b", "a"], "no 3 different names"),
        (["a", "b", "c\n"], "control character"),
    ):
        was = (tmp_path / config).read_text()
        (tmp_path / config).write_text(json.dumps(json.loads(was) | {"classes": classes}))
        refused(lambda: ours.load(tmp_path / "own"), match, kind=CheckpointError)
        (tmp_path / config).write_text(was)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    weights.unlink()
    torch.save({"a": Bomb()}, weights.with_suffix(".bin"))
    refused(lambda: ours.load(tmp_path), r"cannot read .*safetensors: No such file", kind=CheckpointError)
    torch.save({"a": Bomb()}, weights)
    refused(lambda: ours.load(tmp_path), "is a pickled checkpoint", kind=CheckpointError)
    assert not (tmp_path / "ran").exists()


# The commands, each in a process of its own that has imported already, so that what is measured is the file's doing alone.
RUNNER = """
import json, os, sys, tempfile, time
from fastdiff import cli, sample, train
for name, *flags in json.loads(sys.argv[1]):
    command = {"sample": sample, "train": train}[name]
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            open("/proc/self/clear_refs", "w").write("5")
            before = int(open("/proc/self/statm").read().split()[1]) * 4
            try:
                cli.run(lambda: command.main(["--device", "cpu", *flags]), command.PROG)
            except SystemExit as e:
                peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
                os.write(1, f"\\0{peak - before}".encode())
                os._exit(e.code)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.wait4(child, 0)[1])
        seconds = time.perf_counter() - start
        out.seek(0)
        said, _, peak = out.read().decode().partition("\\0")
        print(json.dumps([code, said, int(peak or -1), seconds]))
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_commands(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return name

    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a\x1b.png").write_bytes(b"damaged")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.safetensors").write_bytes(in_metadata('{"training": 1, "settings": {"a\\n": 1}}'))
    bad = [
        ["sample", "--checkpoint", write("a.safetensors", headed(b"[" * 100_000))],
        ["sample", "--checkpoint", write("b.safetensors", described(network=NETWORK | {"blocks": 10**9}))],
        ["sample", "--checkpoint", write("c.safetensors", described(classes=["cat", "\x1b[31m\n"]))],
        ["sample", "--checkpoint", write("d.safetensors", described(schedule={"name": "linear", "timesteps": 10**9}))],
        ["sample", "--checkpoint", write("e.safetensors", pickle.dumps({}, 4))],
        ["sample", "--checkpoint", "fifo.npz"],
        ["sample", "--checkpoint", "images"],
        ["train", "--data", write("a.npz", zeros(65 * MIB))],
        ["train", "--data", "fifo.npz"],
        ["train", "--data", write("a.npy", npy((1 << 40,)))],
        ["train", "--data", write("a.png", png(65_535, 65_535)), "--tile", "16"],
        ["train", "--data", "images"],
        ["train", "--data", "sprites", "--resume", "--out", "run"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(bad)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(bad)
    for flags, (code, said, peak, seconds) in zip(bad, results, strict=True):
        assert code == 2 and said.startswith("python -m fastdiff.") and said.count("\n") == 1 and said.endswith("\n"), (flags, code, said)
        assert "Traceback" not in said and data.unshowable(said[:-1]) is None and seconds < 4, (flags, said, seconds)
        assert 0 <= peak <= (128 << 10), (flags, peak)


def test_a_command_as_it_is_called(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04" + bytes(64))
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.sample", "--device", "cpu", "--checkpoint", "bad.safetensors"], cwd=tmp_path, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "bad.safetensors is a pickled" in done.stderr

"""The table of the fastest ways, from its measurement to the choice that ops make by it, and the profile by layers."""

import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import small_checkpoint, small_network
from PIL import Image

import fastdiff
from benchmarks import layers, tune
from fastdiff import UNetConfig, cli, ops, tuned, ways
from fastdiff.fused import FusedUNet

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    small_checkpoint().save(path)
    return str(path)


@pytest.fixture(scope="module")
def sprites():
    """The shipped network's launches for 2 images."""
    fused, given = layers.fused_network(fastdiff.load("sprites"), CPU, torch.float32, 2)
    return layers.layers_of(fused, lambda: fused.body(*given))


def test_a_dry_run_has_a_row_for_every_convolution_and_one_for_the_network(net, tmp_path, capsys):
    before = tuned.PATH.read_bytes()
    path = tmp_path / "table.json"
    assert tune.main(["--device", "cpu", "--checkpoint", net, "--rows", "3,9,2", "--rounds", "1", "--out", str(path)]) == 0
    ((device, rows),) = json.loads(path.read_text()).items()
    assert device == layers.described("cpu", torch.float32, ())["device"]
    # 2 to 4 and 9 to 16 images count alike; the network, eager or fused, as measured for the most.
    name = f"network {ways.digest(small_checkpoint().model)} float32"
    network = rows.pop(name)
    assert network["rows"] == 9
    assert network["us"].keys() == {"eager", "fused"}
    assert network["way"] == min(network["us"], key=network["us"].get)
    assert {key.split()[1] for key in rows} == {"2", "4", "16"}
    wanted = {
        "conv_in 4 4x4 12->16 float32", "conv3x3 4 4x4 16->16 float32", "conv3x3 4 4x4 16->16 float32 skip",
        "conv3x3 4 2x2 16->16 float32 stride 2", "conv3x3 4 2x2 16->16 float32", "conv3x3 4 2x2 16->16 float32 skip",
        "conv3x3 4 2x2 16+16->16 float32", "conv3x3 4 2x2 16->16 float32 shortcut 32", "conv_up 4 4x4 16->16 float32",
        "conv3x3 4 4x4 16+16->16 float32", "conv3x3 4 4x4 16->16 float32 shortcut 32", "conv_out 4 4x4 16->12 float32",
    }  # fmt: skip
    assert {key for key in rows if key.split()[1] == "4"} == wanted
    assert all(row["way"] == "reference" and row["us"]["reference"] > 0 for row in rows.values())
    assert capsys.readouterr().out.endswith(f"{3 * 12 + 1} rows of {device} in {path}\n")
    assert tuned.PATH.read_bytes() == before


def test_without_a_file_of_its_own_a_dry_run_only_prints(net, capsys):
    before = tuned.PATH.read_bytes()
    assert tune.main(["--device", "cpu", "--checkpoint", net, "--rows", "1", "--rounds", "1", "--seconds", "0"]) == 0
    assert tuned.PATH.read_bytes() == before
    said = capsys.readouterr().out
    assert "out of time after 0 s" in said
    (rows,) = json.loads(said[said.index("\n{") :]).values()
    assert list(rows) == ["conv_in 1 4x4 12->16 float32"]


def test_fp8_has_keys_of_its_own_and_no_row_for_the_network(net, tmp_path):
    path = tmp_path / "table.json"
    assert tune.main(["--device", "cpu", "--checkpoint", net, "--rows", "2", "--rounds", "1", "--dtype", "fp8", "--out", str(path)]) == 0
    (rows,) = json.loads(path.read_text()).values()
    assert {key.split()[4] for key in rows if key.startswith("conv3x3") and "stride" not in key} == {"float8_e4m3fn"}
    assert not [key for key in rows if key.startswith("network")]


def chosen(layer, monkeypatch):
    """What an op does of such a call on a GPU called "A chip" whose kernels cover everything."""
    monkeypatch.setattr(ops, "uncovered", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A chip")
    monkeypatch.setattr(ops.library, layer.op, lambda *_, **__: "library")
    kernel = SimpleNamespace(**{layer.op: lambda *_, **sizes: ("kernel", sizes)})
    return ops._chosen(layer.op, kernel, layer.args, [], None)


def test_what_tune_keeps_is_what_ops_choose(sprites, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    found = [{"library": 5.0, "kernel 256 3": 3.0, "kernel 64": 4.0}, {"library": 2.0, "kernel 128": 2.5}]
    by_key = {layer.key: layer for layer in sprites}
    assert len(by_key) == 12
    last = list(by_key)[-1]
    kept = {key: found[i % 2] for i, key in enumerate(by_key) if key != last}
    for key, us in kept.items():
        tune.keep(path, "A chip", {key: tune.row_of(us)})
    with tune.table_at(path):
        assert [tuned.way("A chip", key) for key in kept] == [
            (("kernel", {"pixels": 256, "stages": 3}), ("library", {}))[i % 2] for i in range(11)
        ]
        for i, key in enumerate(kept):
            assert chosen(by_key[key], monkeypatch) == (("kernel", {"pixels": 256, "stages": 3}), "library")[i % 2], key
        assert chosen(by_key[last], monkeypatch) == ("kernel", {})
    assert tuned.way("A chip", next(iter(kept))) == ("kernel", {})


def test_the_networks_row_is_what_a_sampler_recalls(tmp_path, monkeypatch):
    sampler = small_checkpoint().sampler(device="cpu")
    tune.keep(tmp_path / "t.json", "A chip", {f"network {ways.digest(sampler.model)} float32": tune.row_of({"eager": 3.0, "fused": 1.0})})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A chip")
    monkeypatch.setattr(sampler, "device", torch.device("cuda", 0))
    assert sampler._recalled() == "compiled"
    with tune.table_at(tmp_path / "t.json"):
        assert sampler._recalled() == "fused"


def test_what_stands_in_the_table_of_others_stays(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"Z": {"k": {"way": "library", "us": {}}}, "A": {"x": {"way": "kernel 64", "us": {}}, "y": {"way": "library"}}})
    )
    tune.keep(path, "A", {"y": tune.row_of({"kernel 128": 1.0})})
    assert tune.read(path) == {
        "A": {"x": {"way": "kernel 64", "us": {}}, "y": {"way": "kernel 128", "us": {"kernel 128": 1.0}}},
        "Z": {"k": {"way": "library", "us": {}}},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.skipif(CUDA, reason="the kernels run in the interpreter")
def test_kernels_that_are_not_the_librarys_are_left_out():
    config = UNetConfig(shape=(3, 8, 8), patch=1, channels=(64, 64), blocks=1, middle=0, embedding=32)
    fused, given = layers.fused_network(
        fastdiff.Checkpoint(small_network(0, config), fastdiff.Schedule.linear(50), "v"), CPU, torch.float32, 1
    )
    found = {layer.convolution.name: layer for layer in layers.layers_of(fused, lambda: fused.body(*given))}
    # 64 pixels to an image above, 16 below: a program holds one or some.
    layer = found["down.1.conv2"]
    every = {f"kernel {pixels} {stages}" for pixels in (256, 128, 64) for stages in (2, 3, 4)}
    assert tune.kernels_of(found["stem"]).keys() == tune.kernels_of(layer).keys() == every
    runs = {"library": layers.by_library(layer.op), **tune.kernels_of(layer)}

    def wrong(*args):
        return [1.2 * v for v in layers.by_library(layer.op)(*args)]

    def broken(*args):
        raise RuntimeError("out of resource: shared memory\nand more")

    said = []
    kept = tune.sound(layer, {**runs, "wrong": wrong, "broken": broken}, said.append)
    assert kept == runs
    assert said == [
        f"  {layer.key}: wrong left out: its results are 0.2 of their size from those by library",
        f"  {layer.key}: broken left out: out of resource: shared memory",
    ]
    large = UNetConfig(shape=(3, 16, 16), patch=1, channels=(64,), blocks=1, middle=0, embedding=32)
    fused, given = layers.fused_network(
        fastdiff.Checkpoint(small_network(0, large), fastdiff.Schedule.linear(50), "v"), CPU, torch.float32, 1
    )
    for layer in layers.layers_of(fused, lambda: fused.body(*given)):
        assert tune.kernels_of(layer).keys() == {"kernel 256 2", "kernel 256 3", "kernel 256 4"}


def test_stages_are_as_many_as_shared_memory_holds(sprites):
    """128 channels and 256 pixels of 128 bytes are 48 KB, of which Hopper's 227 hold four."""
    found = {layer.convolution.name: layer for layer in sprites}
    assert {*tune.kernels_of(found["down.2.conv1"])} >= {"kernel 256 4", "kernel 64 4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "STAGES", (4, 5))
        assert {*tune.kernels_of(found["down.2.conv1"])} == {"kernel 256 4", "kernel 128 4", "kernel 128 5", "kernel 64 4", "kernel 64 5"}


def test_layers_count_operations_and_bytes(tmp_path, capsys):
    path, picture = tmp_path / "layers.json", tmp_path / "layers.png"
    assert layers.main(["--device", "cpu", "--rows", "3", "--rounds", "1", "--json", str(path), "--png", str(picture)]) == 0
    found = json.loads(path.read_text())
    rows, every = {row["layer"]: row for row in found["layers"]}, found["all"]
    model = fastdiff.load("sprites").model
    fused = FusedUNet(model)
    assert list(rows) == [convolution.name for convolution in fused.convolutions()]
    # What the plain network counts, but for the convolution of repeated pixels, of whose nine taps four are left.
    flops = model.flops() - 5 * 2 * 8 * 8 * 128 * 64
    assert every["flops"] == sum(row["flops"] for row in rows.values()) == 3 * flops == 3 * sum(c.flops() for c in fused.convolutions())
    assert rows["grow.0"]["flops"] == 3 * 4 * 2 * 8 * 8 * 128 * 64

    image = 3 * 8 * 8 * 64 * 4
    norm, which = 2 * 64 * 4, 3 * 8
    styles = 9 * 2 * 64 * 4  # a scale and a shift a channel, of eight classes and none
    assert rows["down.0.conv1"]["bytes"] == 2 * image + 9 * 64 * 64 * 4 + 64 * 4 + norm + styles + which
    # y, the next block's and the partner's; the skip.
    assert rows["down.0.conv2"]["bytes"] == 5 * image + 9 * 64 * 64 * 4 + 64 * 4 + 2 * norm
    assert rows["up.2.conv2"]["bytes"] == 5 * image + 9 * 64 * 64 * 4 + 128 * 64 * 4 + 64 * 4 + norm
    assert every["bytes"] == sum(row["bytes"] for row in rows.values())
    for row in (*rows.values(), every):
        assert {"device", "dtype", "shape", "commit", "torch", "threads"} <= row.keys()
        assert row["tflop_per_s"] == pytest.approx(row["flops"] / row["us"] / 1e6, rel=1e-3)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=1e-3)
        assert row["fraction_of_matmul"] == pytest.approx(row["tflop_per_s"] / row["matmul_tflop_per_s"], abs=2e-4)
        assert row["flop_per_byte"] == pytest.approx(row["flops"] / row["bytes"], abs=0.01)
    assert rows["shrink.0"]["shape"] == [3, 4, 4, 128]
    assert every["network_us"] > 0

    said = capsys.readouterr().out
    assert f"{every['device']}, float32, 3 rows, fused" in said
    table = [line for line in said.splitlines() if line.startswith(("layer ", *rows, "all "))]
    assert len(table) == 1 + len(rows) + 1
    assert len({len(line) for line in table}) == 1
    with Image.open(picture) as image:
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_layers_by_the_library(net, capsys, monkeypatch):
    called, own = [], layers.library.conv_out
    monkeypatch.setattr(layers.library, "conv_out", lambda *args: called.append(1) or own(*args))
    assert layers.main(["--device", "cpu", "--checkpoint", net, "--rows", "2", "--rounds", "1", "--way", "library"]) == 0
    said = capsys.readouterr().out
    assert ", 2 rows, library, " in said
    assert called
    assert "reference" not in said


def test_fp8_layers_have_bytes_of_their_own():
    wide, given = layers.fused_network(small_checkpoint(), CPU, torch.float32, 2)
    narrow, _ = layers.fused_network(small_checkpoint(), CPU, "fp8", 2)
    moved = [{layer.convolution.name: layer.moved for layer in layers.layers_of(f, lambda f=f: f.body(*given))} for f in (wide, narrow)]
    # Input, weight and result have a byte where they had four; a scale a channel and an inverse come on top.
    assert moved[0]["down.0.conv1"] - moved[1]["down.0.conv1"] == 3 * (2 * 2 * 4 * 4 * 16 + 9 * 16 * 16) - 16 * 4 - 4


@pytest.mark.parametrize("heights", [[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [0.9, 0.5, 0.49, 0.48, 0.1], [0.01, 0.005], [0.99, 0.98]])
def test_names_in_the_picture_stand_apart(heights):
    spread = layers._spread(heights, 0.06)
    assert all(a - b > 0.06 - 1e-9 for a, b in itertools.pairwise(spread))
    assert spread[0] <= 0.99
    assert spread[-1] >= 0.01
    if heights[0] == 0.9:
        assert spread[0] == 0.9
        assert spread[-1] == 0.1


TUNE, LAYERS = (tune, ["--device", "cpu"]), (layers, ["--device", "cpu"])


@pytest.mark.parametrize(
    ("command", "flags", "text"),
    [
        (TUNE, ["--rows", "0"], "'0' is not a whole number at least 1"),
        (TUNE, ["--rows", "64,"], "'' is not a whole number"),
        (TUNE, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (TUNE, ["--out", "nowhere/table.json"], "cannot write nowhere/table.json"),
        (TUNE, ["--out", "."], "cannot write ."),
        (TUNE, ["--out", "list.json"], "list.json holds no table of ways"),
        (TUNE, ["--out", "text.json"], "text.json holds no table of ways"),
        (TUNE, ["--checkpoint", "nobody.safetensors"], "nobody.safetensors"),
        (TUNE, ["--device", "tpu"], "unknown device 'tpu'"),
        (LAYERS, ["--rows", "0"], "'0' is not a whole number at least 1"),
        (LAYERS, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (LAYERS, ["--way", "compiled"], "invalid choice: 'compiled'"),
        (LAYERS, ["--json", "nowhere/layers.json"], "cannot write nowhere/layers.json"),
        (LAYERS, ["--png", "."], "cannot write ."),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, command, flags, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    Path("list.json").write_text('{"A chip": [1]}')
    Path("text.json").write_text("nothing")
    module, first = command
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: module.main([*first, *flags]), module.PROG)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{module.PROG}: ")
    assert text in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.json", "text.json"]


@pytest.mark.skipif(CUDA, reason="there is a GPU here")
def test_without_a_gpu_there_is_nothing_to_measure():
    done = subprocess.run([sys.executable, "-m", "benchmarks.tune"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m benchmarks.tune: there is no CUDA GPU here, and a table for another device is of no use; --device cpu makes a dry run\n"
    )

"""The command: what it writes and prints, and that bad input is one line, exit code 2 and nothing lost."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, small_checkpoint, small_network
from PIL import Image

import fastdiff
from fastdiff import cli, data, sample

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    small_checkpoint().save(path)
    return str(path)


def command(*flags, cwd, **options):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "fastdiff.sample", "--device", "cpu", *flags], cwd=cwd, env=env, capture_output=True, text=True, **options
    )


def arrays(folder):
    with np.load(Path(folder) / "samples.npz") as file:
        return dict(file)


def test_writes_images_labels_ids_and_a_picture(net, tmp_path):
    done = command("--checkpoint", net, "--batch", "10", "--first", "5", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["grid.png", "samples", "samples.npz"]
    made = arrays(tmp_path / "samples")
    assert made["images"].dtype == np.uint8
    assert made["images"].shape == (10, 8, 8, 3)
    assert made["ids"].tolist() == list(range(5, 15))
    assert made["labels"].tolist() == [i % 3 for i in range(5, 15)]
    assert made["classes"].tolist() == ["cat", "dog", "10"]
    # A row a class: 20 tiles of 8 pixels, three times enlarged, and a pixel between.
    with Image.open(tmp_path / "samples" / "grid.png") as picture:
        assert picture.size == (20 * 24 + 19, 3 * 24 + 2)
    for said in (
        "10 images in samples/samples.npz",
        "samples/grid.png",
        "CPU, ",
        "float32",
        "eager",
        "unipc",
        "3 steps",
        "load ",
        "compile ",
        "images/s",
    ):
        assert said in done.stdout
    again = fastdiff.load(net).sampler(solver="unipc", steps=3)
    images = again(10, first=5, labels=[i % 3 for i in range(5, 15)], guidance=2.0)
    assert np.array_equal(data.to_uint8(images).numpy(), made["images"])


def test_json_has_the_same_numbers(net, tmp_path):
    done = command("--checkpoint", net, "--batch", "4", "--steps", "2", "--json", "--solver", "ddim", "--guidance", "1", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert {"images": 4, "steps": 2, "solver": "ddim", "guidance": 1.0, "dtype": "float32"}.items() <= report.items()
    assert report["images_per_s"] == pytest.approx(4 / report["sample_s"], rel=0.2)
    assert {"load_s", "compile_s", "samples", "grid", "device"} <= report.keys()


def test_solver_spacing_and_options_are_the_librarys(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--checkpoint", net, "--batch", "3", "--steps", "5", "--json", "--guidance", "1"]
    for given, wanted in (
        (["--solver", "ddim", "--option", "eta=0.5", "--option", "clipped_epsilon=false"], {"solver": "ddim", "eta": 0.5, "clipped_epsilon": False}),
        (["--solver", "ddpm", "--option", "variance=beta", "--spacing", "leading"], {"solver": "ddpm", "variance": "beta", "spacing": "leading"}),
        (["--option", "order=3"], {"solver": "unipc", "order": 3}),
    ):  # fmt: skip
        assert sample.main([*flags, *given]) == 0
        images = fastdiff.load(net).sampler(steps=5, **wanted)(3, labels=[0, 1, 2])
        assert np.array_equal(arrays("samples")["images"], data.to_uint8(images).numpy())


def test_warmup_measures_remembers_and_makes_no_images(tmp_path):
    """The first run compiles, the next finds it kept; what was found to be the fastest runs from then on."""
    config = dataclasses.replace(SMALL, channels=(16,))  # to compile it takes half as long
    net = tmp_path / "net.safetensors"
    fastdiff.Checkpoint(small_network(0, config), fastdiff.Schedule.linear(50), "epsilon", ("cat", "dog", "10")).save(net)
    env = os.environ | {"PYTHONPATH": str(ROOT), "FASTDIFF_CACHE": str(tmp_path / "cache")}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)  # a compiler that has run in this process has set it
    flags = [sys.executable, "-m", "fastdiff.sample", "--device", "cpu", "--checkpoint", net, "--json"]
    done = subprocess.run([*flags, "--warmup"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "net.safetensors"}
    assert report["cached_s"] < report["first_s"]
    assert set(report["ms_per_row"]) == {"eager", "compiled"}
    assert report["fastest"] == min(report["ms_per_row"], key=report["ms_per_row"].get)
    assert (tmp_path / "cache" / "ways.json").is_file()
    assert any((tmp_path / "cache" / "inductor").iterdir())
    for flag, way in (("auto", report["fastest"]), ("no", "eager")):
        done = subprocess.run(
            [*flags, "--batch", "2", "--steps", "1", "--compile", flag], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["way"] == way


def test_compile_flags_are_the_samplers(net, tmp_path, monkeypatch):
    ways = []

    def enough(sampler):
        ways.append(sampler.way)
        raise ValueError("enough")

    monkeypatch.setattr(fastdiff.Sampler, "_take_network", enough)
    for flag in ("yes", "no", "fused"):
        with pytest.raises(ValueError, match="enough"):
            sample.main(["--device", "cpu", "--checkpoint", net, "--batch", "2", "--compile", flag, "--out", str(tmp_path)])
    assert ways == ["compiled", "eager", "fused"]


def test_any_part_of_a_run_is_the_run(net, tmp_path):
    """Images 100 .. 107 alone are, to the bit, images 100 .. 107 of 150, on any number of threads."""
    run = ("--checkpoint", net, "--steps", "3", "--solver", "ddpm", "--micro-batch", "8")
    for out, flags, threads in (
        ("all", ("--batch", "150"), "2"),
        ("part", ("--batch", "8", "--first", "100"), "1"),
        ("start", ("--batch", "31"), "3"),
    ):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-m", "fastdiff.sample", "--device", "cpu", *run, *flags, "--out", out],
            cwd=tmp_path,
            env=env,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    whole, part, start = (arrays(tmp_path / out) for out in ("all", "part", "start"))
    assert np.array_equal(part["images"], whole["images"][100:108])
    assert np.array_equal(part["labels"], whole["labels"][100:108])
    assert np.array_equal(start["images"], whole["images"][:31])
    assert len(np.unique(whole["images"].reshape(150, -1), axis=0)) == 150


def test_labels_by_name_and_index_in_turn(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--checkpoint", net, "--batch", "5", "--steps", "1", "--json"]
    assert sample.main([*flags, "--label", "dog", "--label", "0"]) == 0
    assert arrays("samples")["labels"].tolist() == [1, 0, 1, 0, 1]
    # A class may be called like a number: its name comes first.
    assert sample.main([*flags, "--label", "10"]) == 0
    assert arrays("samples")["labels"].tolist() == [2] * 5


def test_the_same_command_twice_replaces_its_own_files_and_no_others(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("samples").mkdir()
    Path("samples/notes.txt").write_text("keep me")
    flags = ["--device", "cpu", "--checkpoint", net, "--batch", "3", "--steps", "1", "--json"]
    sample.main(flags)
    first = Path("samples/samples.npz").read_bytes()
    sample.main(flags)
    assert Path("samples/samples.npz").read_bytes() == first
    sample.main([*flags, "--seed", "1"])
    assert Path("samples/samples.npz").read_bytes() != first
    assert sorted(p.name for p in Path("samples").iterdir()) == ["grid.png", "notes.txt", "samples.npz"]
    assert Path("samples/notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--batch", "0"], "argument --batch: '0' is not a whole number at least 1"),
        (["--batch", "many"], "argument --batch: 'many' is not a whole number at least 1"),
        (["--batch", "2.5"], "argument --batch: '2.5' is not"),
        (["--steps", "-3"], "argument --steps"),
        (["--steps", "51"], "steps is 51; this schedule has 50 timesteps, so give a whole number from 1 to 50"),
        (["--guidance", "nan"], "argument --guidance: 'nan' is not a number at least 0"),
        (["--guidance", "-1"], "argument --guidance: '-1' is not a number at least 0"),
        (["--guidance", "inf"], "argument --guidance"),
        (["--micro-batch", "0"], "argument --micro-batch"),
        (["--label", "bird"], "no class 'bird' in NET; it has: 0 cat, 1 dog, 2 10"),
        (["--label", "3"], "no class '3' in NET; it has: 0 cat, 1 dog, 2 10"),
        (["--solver", "eulr"], "unknown solver 'eulr'; known: ddpm, "),
        (["--solver", "eulr"], "(did you mean euler?)"),
        (["--spacing", "karas"], "unknown spacing 'karas'; known: leading, trailing, linspace, logsnr, karras (did you mean karras?)"),
        (["--option", "eta"], "argument --option: 'eta' is not NAME=VALUE, such as eta=0.5"),
        (["--option", "eta=1"], "solver 'unipc' does not take eta; it takes order, variant"),
        (["--option", "order=4"], "order is 4; unipc has orders 1 to 3"),
        (["--option", "steps=4"], "--option is for the solver; steps has an option of its own"),
        (["--compile", "maybe"], "argument --compile: invalid choice: 'maybe'"),
        (["--seed", "-1"], "argument --seed"),
        (["--seed", str(2**64)], "argument --seed"),
        (["--first", str(2**63 - 1), "--batch", "2"], "passes the last image number"),
        (["--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
        (["--checkpoint", "."], "no checkpoint '.'"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--out", "/proc/nowhere"], "cannot write to the folder /proc/nowhere"),
        (["--out", "file"], "cannot write to the folder file"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line(net, tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: sample.main(["--device", "cpu", "--checkpoint", net, *flags]), sample.PROG)
    assert caught.value.code == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert text.replace("NET", net) in stderr
    assert stderr.count("\n") == 1
    assert stderr.startswith("python -m fastdiff.sample: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_input_for_real_has_no_traceback(tmp_path):
    done = command("--checkpoint", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no checkpoint 'nowhere'" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--shard-size", "2"), ("--shard-size", "2", "--json", "--log-level", "info")])
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_without_a_place_to_say_anything_it_does_what_it_says(net, tmp_path, flags, closed):
    words = [sys.executable, "-m", "fastdiff.sample", "--device", "cpu", "--checkpoint", net, "--batch", "3", "--steps", "1", *flags]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and (tmp_path / "samples" / "grid.png").exists()


def test_images_of_channels_that_are_no_colours_have_no_picture(tmp_path, capsys):
    config = fastdiff.UNetConfig(shape=(2, 4, 4), patch=1, channels=(8,), middle=0, embedding=8, group=4)
    fastdiff.Checkpoint(small_network(config=config), fastdiff.Schedule.linear(20)).save(tmp_path / "net.safetensors")
    flags = [
        "--device",
        "cpu",
        "--checkpoint",
        str(tmp_path / "net.safetensors"),
        "--batch",
        "3",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert sample.main(flags) == 0 and capsys.readouterr().out.startswith(f"3 images in {tmp_path / 'out' / 'samples.npz'}\n")
    assert sample.main([*flags, "--shard-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["grid"] is None
    assert arrays(tmp_path / "out")["images"].shape == (3, 4, 4, 2)
    assert {p.name for p in (tmp_path / "out").iterdir()} - {".lock"} == {
        "samples.npz",
        "manifest.json",
        "shard-000000.npz",
        "shard-000001.npz",
    }


def test_disk_full_keeps_the_old_files(net, tmp_path):
    flags = ("--checkpoint", net, "--batch", "64", "--steps", "1")
    assert command(*flags, cwd=tmp_path).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "samples").iterdir()}

    def small_disk():
        # No file may grow past 4 KiB: writes fail part of the way, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = command(*flags, "--seed", "1", cwd=tmp_path, preexec_fn=small_disk)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "python -m fastdiff.sample: samples/samples.npz: File too large"
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "samples").iterdir()} == before


def test_too_much_for_the_memory_is_one_line(net, tmp_path):
    for flags, said in (
        (("--batch", "10000000000000"), "out of memory; ask for fewer or smaller images at a time"),
        (("--micro-batch", "100000000000"), "'100000000000' is not a whole number from 1 to 1048576"),
    ):
        done = command("--checkpoint", net, *flags, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr


def test_a_folder_called_like_the_shipped_checkpoint(tmp_path):
    (tmp_path / "sprites").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "fastdiff-write-test").write_text("keep me")
    done = command("--batch", "2", "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "fastdiff-write-test").read_text() == "keep me"


def test_help_explains(tmp_path):
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for flag in (
        "--batch",
        "--steps",
        "--solver",
        "--seed",
        "--first",
        "--label",
        "--guidance",
        "--checkpoint",
        "--device",
        "--dtype",
        "--micro-batch",
        "--spacing",
        "--option",
        "--compile",
        "--warmup",
        "--out",
        "--json",
    ):
        assert flag in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_by_default(net, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--checkpoint", net, "--batch", "70", "--steps", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == torch.cuda.get_device_name()
    assert report["dtype"] == "bfloat16"
    on_gpu = arrays("samples")["images"]
    assert sample.main(["--checkpoint", net, "--batch", "70", "--steps", "3", "--device", "cpu"]) == 0
    # The same noise, the network in bf16: the same pictures, within a few of 255 steps.
    assert np.abs(on_gpu.astype(int) - arrays("samples")["images"]).mean() < 4

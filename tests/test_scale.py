"""The scale sheet: its arithmetic against numbers worked out by hand, its text, and rows that are really measured."""

import contextlib
import io
import json

import pytest

from benchmarks import scale
from benchmarks.scale import Device, reckon
from fastdiff import sample

ABOUT = {
    "device": "A chip", "dtype": "float32", "torch": "2.13.0", "threads": 2, "commit": "abc1234", "way": "eager", "on": "cpu", "quick": False,
    "shape": [3, 16, 16],
}  # fmt: skip


def spread(name, value, low, high):
    return {name: value, f"{name}_min": low, f"{name}_max": high}


def rate(batch, images_per_s, solver="unipc", steps=10, guidance=2.0, calls=3):
    found = spread("images_per_s", images_per_s, images_per_s * 0.9, images_per_s * 1.1)
    more = {"solver": solver, "steps": steps, "guidance": guidance, "evaluations": steps * (2 if guidance != 1 else 1), "calls": calls}
    return f"scale_rate[{solver}-{steps}-{guidance:g}-{batch}]", {**ABOUT, **more, "shape": [batch, 3, 16, 16], **found}


def rows(**changes):
    """Rows of 100 images/s, 80 in calls of 64. changes: fields by the row's name without scale_."""
    found = dict([rate(64, 80.0), rate(1024, 100.0, calls=2), rate(64, 20.0, "ddpm", 50, 1.0)])
    found |= {
        "scale_startup": spread("startup_s", 4.0, 3.5, 5.0),
        "scale_run": {"images": 4096, "shard_size": 1024, "run_s": 45.5, "sample_s": 41.0},
        "scale_bytes": {"images": 4096, "shard_size": 4096, "bytes_shard": 800.0, "bytes_npz": 784.4, "bytes_npy": 776.1, "bytes_tar": 3072.0,
                        "bytes_png": 650.0, "bytes_png_on_disk": 4096.0},
        "scale_write": {"shards": 10, "shard_size": 4096, **spread("shard_s", 0.03, 0.02, 0.05), "pack_s": 0.004, "hash_s": 0.012, "file_s": 0.008,
                        "mb_per_s": 100.0, "file_mb_per_s": 400.0, "file_system": "ext4"},
        "scale_resume": {"bytes": 10**9, "verify_s": 2.0, "verify_mb_per_s": 500.0, "resume_s": 1.0, "resume_mb_per_s": 1000.0},
    }  # fmt: skip
    return {name: {**ABOUT, **row, **changes.get(name.removeprefix("scale_"), {})} for name, row in found.items()}


def written(path, rows):
    path.write_text(json.dumps({"benchmarks": [{"name": name, "extra_info": row} for name, row in rows.items()]}))
    return str(path)


# 50 images/s in calls of 100, 100 in calls of 1,000; 10 s to start; samples of 1,000 bytes; a process writes 1 MB/s, the disk 2, and 4 are read.
SLOW = Device({100: 50.0, 1000: 100.0}, 10.0, 1000.0, 1e6, 2e6, 4e6)
LARGE = Device({100: 50.0, 1000: 100.0}, 10.0, 1e5, 1e6, 2e6, 4e6)


def test_computing():
    run = reckon(SLOW, 10**7, 1)
    assert (run.shard, run.shards) == (4096, 2442)
    assert (run.work_s, run.wait_s, run.seconds) == (1e5, 0, 100_010), "alone there is nobody to wait for"
    assert (run.asked, run.given, run.bytes, run.resume_s) == (1e5, 1e5, 1e10, 2500)
    assert run.limits == ("computing",)
    eight = reckon(SLOW, 10**7, 8)
    assert (eight.work_s, eight.wait_s) == (12_500, 20.48), "half of 4,096 images at 100/s"
    assert (eight.asked, eight.resume_s, eight.limits) == (8e5, 312.5, ("computing",))


def test_start_up():
    run = reckon(SLOW, 10_000, 8)
    assert (run.shard, run.shards) == (125, 80), "ten shards each"
    assert (run.work_s, run.wait_s, run.seconds) == (25, 1.25, 36.25), "at the 50/s of calls of 100"
    assert run.limits == ("start-up",)


def test_storage():
    alone = reckon(LARGE, 10**6, 1)
    assert (alone.asked, alone.given) == (1e7, 1e6), "100 images/s are 10 MB/s, and a process writes 1"
    assert (alone.work_s, alone.limits) == (1e5, ("storage",))
    eight = reckon(LARGE, 10**6, 8)
    assert (eight.asked, eight.given) == (8e7, 2e6), "the disk takes 2 MB/s of what eight could write"
    assert (eight.work_s, eight.wait_s) == (50_000, 819.2), "20 images/s, 2.5 of each, and half of 4,096"
    assert eight.limits == ("storage",)


def test_more_devices_than_a_machine_has_share_a_file_system():
    device = Device(LARGE.rates, 10.0, 1e5, 1e7, 1.0, 4e6)
    run = reckon(device, 10**6, 1000)
    assert (run.shard, run.asked, run.given) == (100, 5e9, scale.SHARED), "the disk of one machine is not asked"
    assert (run.work_s, run.wait_s, run.seconds) == (100, 5, 115)
    assert run.resume_s == 100, "1,000 read 4 GB/s, and the file system gives 1"
    assert run.limits == ("storage",), "start-up is 8.7 %"


def test_fewer_shards_than_devices():
    run = reckon(SLOW, 500, 8)
    assert (run.shard, run.shards) == (100, 5), "no shard of fewer images than were measured"
    assert (run.work_s, run.wait_s, run.seconds) == (2, 0, 12)
    assert run.limits == ("shards (3 devices idle)", "start-up")
    assert reckon(SLOW, 10**6, 1000).shards == 10_000
    coarse = reckon(SLOW, 10**6, 1000, shard=4096)
    assert (coarse.shards, coarse.work_s, coarse.limits[0]) == (245, 40.96, "shards (755 devices idle)")


def test_no_more_shards_than_a_run_may_have():
    run = reckon(SLOW, 10**9, 8)
    assert (run.shard, run.shards) == (10_000, scale.runs.MAX_SHARDS)


def test_the_sheet(tmp_path, capsys):
    assert scale.main([written(tmp_path / "rows.json", rows())]) == 0
    text = capsys.readouterr().out
    where = "A chip, float32, torch 2.13.0, 2 threads, commit abc1234, eager"
    assert f"**Samples per hour of 2 CPU cores, by images of a call: {where}**" in text
    assert "No GPU: a device, here and below, is 2 CPU cores." in text
    assert "| unipc, 10, 2 | 20 | 288,000 (259,000 to 317,000) | 360,000 (324,000 to 396,000) | 3, 2 |" in text
    assert "| ddpm, 50, 1 | 50 | 72,000 (64,800 to 79,200) |  | 3 |" in text
    assert "| start-up: a whole command for 1 image in 1 step | 4 (3.5 to 5) s |" in text
    assert "a shard of 4,096, over 10 | 30 (20 to 50) ms; by themselves pack 4, hash 12, file 8 |" in text
    assert "the disk (ext4) takes | 100 MB/s; 400 MB/s |" in text
    assert "verify it (1,000 MB, just written, so from memory) | 1,000 MB/s; 500 MB/s |" in text
    assert "| a whole command for 4,096 images in shards of 1,024; the same reckoned as below | 45.5 s; 45 s |" in text, "4 + 40.96 s"
    assert "| shards, .npz of 4,096 | 800 |" in text and "| folder of PNGs | 650, and 4,096 in blocks of the disk |" in text
    # 10,004 s; 100 images/s of 800 bytes; 1 GB/s is looked at again.
    assert "| 10^6 | 1 | 4096 | 245 | 2.78 | 2.78 | 0.8 | 0.08 | 0.0% | 0.0% | 0.8 | computing |" in text
    # 4 + 12.5 + 0.625 s at the 80/s of calls of 64.
    assert "| 10^6 | 1,000 | 100 | 10,000 | 0.00476 | 4.76 | 0.8 | 64 | 23.4% | 3.6% | 0.8 | start-up |" in text
    # 4 + 10^9 / 10^5 + 50 s.
    assert "| 10^9 | 1,000 | 10000 | 100,000 | 2.79 | 2,790 | 800 | 80 | 0.0% | 0.5% | 800 | computing |" in text
    assert "arithmetic: no such run was made" in text and "shared file system of 1 GB/s (assumed)" in text
    assert "at 4,096 a shard 10^6 images were 245 shards, and 755 of 1,000 devices idle;" in text
    assert "GPU-hour" not in text and "--quick" not in text


def test_the_sheet_of_a_gpu(tmp_path, capsys):
    gpu = {
        name: row | {"on": "cuda", "device": "A GPU"}
        for name, row in rows(startup={"fresh_startup_s": 60.0, "fresh_compile_s": 40.0}).items()
    }
    gpu |= {name: gpu[name] | dict(rate(1024, 1e5)[1], on="cuda", device="A GPU") for name in ["scale_rate[unipc-10-2-1024]"]}
    files = [written(tmp_path / "gpu.json", gpu), written(tmp_path / "cpu.json", rows(run={"quick": True}))]
    assert scale.main(files) == 0
    text, of_cpu = capsys.readouterr().out.split("**Samples per hour of 2 CPU cores")
    assert text.startswith("**Samples per GPU-hour, by images of a call: A GPU, ")
    assert "No GPU" not in text and "No GPU" in of_cpu
    assert "Of --quick: a trial" in of_cpu
    assert "| start-up where nothing compiled is kept | 60 s, of which compiling 40 s |" in text
    # 80 MB/s of one, of 100; 640 MB/s of eight, of the disk's 400, so 500,000 images/s: 60 + 2,000 s, and half of 10,000 images at 62,500/s.
    assert "| 10^9 | 1 | 10000 | 100,000 | 2.79 | 2.79 | 800 | 80 | 0.6% | 0.0% | 800 | computing |" in text
    assert "| 10^9 | 8 | 10000 | 100,000 | 0.572 | 4.58 | 800 | 640 | 2.9% | 0.0% | 100 | storage |" in text
    # 80 GB/s of 1,000, of 1 that all share: 800 s.
    assert "| 10^9 | 1,000 | 10000 | 100,000 | 0.24 | 240 | 800 | 80,000 | 6.9% | 0.5% | 800 | storage |" in text


def test_readme_is_changed_between_its_markers_only(tmp_path, capsys):
    readme, file = tmp_path / "README.md", written(tmp_path / "rows.json", rows())
    readme.write_text(f"before\n{scale.START}\nstale\n{scale.END}\nafter\n")
    for _ in range(2):
        assert scale.main([file, "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{scale.START}\n\n**Samples per hour") and text.endswith(f"\n\n{scale.END}\nafter\n")
        assert "stale" not in text
    assert capsys.readouterr().out == ""
    readme.write_text("no markers")
    with pytest.raises(scale.ReportError, match="must hold"):
        scale.main([file, "--readme", str(readme)])
    assert readme.read_text() == "no markers"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not JSON"),
        ("[]", "no rows"),
        ({"test_sampler[x]": {}}, "no rows of this benchmark in these files; make some with python -m benchmarks.scale --measure --out FILE"),
        ({"scale_run": {"device": "A chip"}}, "a row lacks 'dtype'"),
        ({name: row for name, row in rows().items() if name != "scale_write"}, "lack scale_write; make all of them with"),
        ({name: row for name, row in rows().items() if "unipc" not in name}, "lack scale_rate of the default solver"),
        (rows(startup={"startup_s": 0}), "scale_startup: startup_s is 0, and should be a number above 0"),
        (rows(write={"mb_per_s": "fast"}), "scale_write: mb_per_s is 'fast', and"),
        (rows(resume={"resume_mb_per_s": float("nan")}), "scale_resume: resume_mb_per_s is nan, and"),
        (rows(bytes={"bytes_tar": None}), "scale_bytes: bytes_tar is None, and"),
        (rows() | {"scale_rate[x]": {**rate(64, 80.0)[1], "shape": 5}}, "these are not rows of this benchmark"),
    ],
)  # fmt: skip
def test_bad_rows_are_one_line(tmp_path, content, text):
    path = tmp_path / "rows.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        written(path, content)
    with pytest.raises(scale.ReportError) as failed:
        scale.main([str(path)])
    assert text in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.parametrize("arguments", [["--measure"], ["--measure", "--out", "x.json", "rows.json"]])
def test_measuring_asks_for_a_file(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        scale.main(arguments)
    assert stopped.value.code == 2
    assert "--measure takes --out FILE" in capsys.readouterr().err


def test_rows_that_are_really_measured_make_a_sheet(tmp_path, monkeypatch, capsys):
    real, started = scale.Measurement.command, []

    def command(self, *options):
        """The start-up as it is; the other command in this process, which spares the seconds of another start."""
        started.append(options)
        if "--steps" in options:
            return real(self, *options)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert sample.main(["--json", *self.options, *map(str, options)]) == 0
        return 9.0, json.loads(out.getvalue().splitlines()[-1])

    monkeypatch.setattr(scale.Measurement, "command", command)
    monkeypatch.setattr(sample.cli, "start_log", lambda level: None)  # the log of this process stays as it is
    out = tmp_path / "rows.json"
    written(out, {"other": {}, "scale_rate[old]": {}})
    (tmp_path / "scratch").mkdir()
    assert scale.main(["--measure", "--quick", "--device", "cpu", "--out", str(out), "--scratch", str(tmp_path / "scratch")]) == 0
    assert len(started) == 2
    assert not list((tmp_path / "scratch").iterdir()), "what is measured with is removed"
    found = {row["name"]: row["extra_info"] for row in json.loads(out.read_text())["benchmarks"]}
    assert list(found) == ["other", "scale_startup", "scale_run", "scale_bytes", "scale_write", "scale_resume", "scale_rate[unipc-10-2-16]",
                           "scale_rate[ddim-20-1-16]"]  # fmt: skip
    assert found["scale_rate[unipc-10-2-16]"]["shape"] == [16, 3, 16, 16]
    assert found["scale_rate[unipc-10-2-16]"]["evaluations"] == found["scale_rate[ddim-20-1-16]"]["evaluations"] == 20
    assert found["scale_startup"]["startup_s"] > found["scale_startup"]["load_s"] > 0
    sizes = found["scale_bytes"]
    assert 784 < sizes["bytes_shard"] < 820, "768 of pixels, 8 of the number, 8 of the label, and what a file of 64 begins and ends with"
    assert sizes["bytes_npy"] == (8 * 776 + 2 * 128) / 8, "pixels and labels, and a header of 128 bytes each"
    assert sizes["bytes_tar"] > sizes["bytes_png"] > 100
    write = found["scale_write"]
    assert write["shard_s_min"] <= write["shard_s"] <= write["shard_s_max"]
    assert write["mb_per_s"] == pytest.approx(write["shard_bytes"] / write["shard_s"] / 1e6, rel=0.02, abs=0.01)
    assert found["scale_resume"]["bytes"] == 4 * write["shard_bytes"]
    capsys.readouterr()
    assert scale.main([str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("| 10^") == 9 and "Of --quick: a trial" in text and "nan" not in text


def test_a_command_that_fails_is_one_line(monkeypatch):
    measurement = object.__new__(scale.Measurement)
    measurement.options = []
    monkeypatch.setattr(scale.sys, "executable", "false")
    with pytest.raises(ValueError, match=r"^fastdiff\.sample failed: it says nothing$"):
        measurement.command("--batch", 1)

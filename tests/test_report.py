"""Tables and pictures of benchmark rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import report

ROOT = Path(__file__).parent.parent
ABOUT = {"device": "A chip", "dtype": "float32", "torch": "2.13.0", "threads": 2, "commit": "abc1234", "shape": [64, 3, 16, 16]}
PEERS = {
    "ours": {"images_per_s": 200.0, "fraction_of_matmul": 0.5, "ops_per_step": 12, "syncs_per_step": 0},
    "diffusers": {"images_per_s": 100.0},
}
RATIO = {"ratio_to_diffusers": 2.0, "ratio_to_diffusers_min": 1.9, "ratio_to_diffusers_max": 2.1}
SAMPLER = {**ABOUT, **RATIO, "network": "sprites", "solver": "ddim", "steps": 20, "guidance": 1.0, "peers": PEERS}
KERNEL = {
    **ABOUT,
    "ours_us": 12.345,
    "gb_per_s": 99.6,
    "fraction_of_copy": 0.91,
    **{f"ratio_to_eager{end}": 3.0 for end in ("", "_min", "_max")},
}

BLOCK = {
    **ABOUT,
    "shape": [1024, 8, 8, 64],
    "kind": "up",
    "channels": [64, 64],
    "ours_us": 20.04,
    "ours_tflop_per_s": 412.3,
    "fraction_of_matmul": 0.553,
    "gb_per_s": 1234.5,
    **{f"ratio_to_compiled{end}": 1.5 for end in ("", "_min", "_max")},
}


def written(path, *rows):
    path.write_text(json.dumps({"benchmarks": [{"name": name, "extra_info": extra} for name, extra in rows]}))
    return path


@pytest.fixture
def file(tmp_path):
    larger = {
        **SAMPLER,
        "way": "compiled",
        "shape": [256, 3, 16, 16],
        "peers": {"ours": {"images_per_s": 400.0}, "diffusers": {"images_per_s": 150.0}},
    }
    return written(tmp_path / "rows.json", ("test_sampler[a]", SAMPLER), ("test_sampler[b]", larger), ("test_solver_step[cpu-64]", KERNEL))


def test_tables_hold_the_figures_and_where_they_are_from(file, capsys):
    assert report.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert "**Sampling: A chip, float32, torch 2.13.0, 2 threads, commit abc1234**" in text
    assert "| 64 images, sprites, ddim 20 | fastdiff | 200 |  | 0.50 | 12 |  | 0 |" in text
    assert "| 256 images, sprites, ddim 20 | fastdiff, compiled | 400 |" in text
    assert "|  | diffusers | 100 | 2.00 (1.90 to 2.10) |" in text
    assert "| solver_step[cpu-64] | 12.3 | 100 | 0.91 | 3.00 (3.00 to 3.00) |  |" in text


def test_tables_of_the_networks_parts(tmp_path, capsys):
    norm = {**KERNEL, "ratio_to_compiled": 1.25, "ratio_to_compiled_min": 1.2, "ratio_to_compiled_max": 1.3}
    fp8 = {**BLOCK, "dtype": "float8_e4m3fn", "kind": "middle", "channels": [64], "ratio_to_bfloat16": 1.4}
    fp8 |= {"ratio_to_bfloat16_min": 1.3, "ratio_to_bfloat16_max": 1.45}
    rows = written(tmp_path / "rows.json", ("test_group_norm_silu[x]", norm), ("test_blocks[a]", BLOCK), ("test_blocks[b]", fp8))
    assert report.main([str(rows)]) == 0
    text = capsys.readouterr().out
    assert "**Kernels: A chip, float32, torch 2.13.0, 2 threads, commit abc1234**" in text
    assert "| group_norm_silu[x] | 12.3 | 100 | 0.91 | 3.00 (3.00 to 3.00) | 1.25 (1.20 to 1.30) |" in text
    assert "**Residual blocks, two launches each: A chip, float32, torch 2.13.0, 2 threads, commit abc1234**" in text
    assert "| up, 64 + 64 to 64 @ 8, 1024 images | 20.0 | 412 | 0.55 | 1234 |  | 1.50 (1.50 to 1.50) |  |" in text
    assert "**Residual blocks, two launches each: A chip, float8_e4m3fn, " in text
    assert "| middle, 64 to 64 @ 8, 1024 images | 20.0 | 412 | 0.55 | 1234 |  | 1.50 (1.50 to 1.50) | 1.40 (1.30 to 1.45) |" in text


def test_the_committed_rows_make_tables(capsys):
    assert report.main([]) == 0
    text = capsys.readouterr().out
    assert "**Kernels: " in text
    assert "**Sampling: " in text
    assert "nan" not in text


def test_readme_is_changed_between_its_markers_only(file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert report.main([str(file), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{report.START}\n\n**Sampling")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "old" not in text
    assert capsys.readouterr().out == ""


def test_picture(file, tmp_path):
    assert report.main([str(file), "--png", str(tmp_path / "speed.png")]) == 0
    with Image.open(tmp_path / "speed.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    ("content", "more", "text"),
    [
        ("{", [], "not JSON"),
        ("[]", [], "no rows"),
        ('{"benchmarks": []}', [], "no rows"),
        (None, [], "No such file"),
        (json.dumps({"benchmarks": [{"name": "test_sampler[x]", "extra_info": {}}]}), [], "a row lacks"),
        (json.dumps({"benchmarks": [{"name": "test_solver_step[x]", "extra_info": KERNEL}]}), ["--png", "x.png"], "nothing to draw"),
        (json.dumps({"benchmarks": [{"name": "test_solver_step[x]", "extra_info": KERNEL}]}), ["--readme", "plain.md"], "must hold"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, content, more, text):
    monkeypatch.chdir(tmp_path)
    Path("plain.md").write_text("no markers")
    if content is not None:
        Path("rows.json").write_text(content)
    assert report.main(["rows.json", *more]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("x.png").exists()
    assert Path("plain.md").read_text() == "no markers"


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "benchmarks.report", "nowhere.json"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "python -m benchmarks.report: nowhere.json: No such file or directory\n"


def test_a_table_of_how_like_images_are(tmp_path, capsys):
    row = {
        **ABOUT, "solver": "unipc", "steps": 10, "guidance": 2.0, "way": "fused", "dtype": "fp8", "distance": 24.04, "mean": 3.14159,
        "median_image": 2.5, "largest": 255, "far": 0.0625, "fp32_distance": 23.4, "training_distance": 19.7, "held_out_distance": 38.2,
    }  # fmt: skip
    assert report.main([str(written(tmp_path / "rows.json", ("alike[fused fp8]", row), ("alike[no bfloat16]", row | {"way": "no"})))]) == 0
    text = capsys.readouterr().out
    assert "**64 images by other ways than eagerly in fp32: A chip, unipc 10, guidance 2, torch 2.13.0" in text
    assert "distance of fp32's images 23.4, of other training images 19.7, of held-out ones 38.2**" in text
    assert "| fused, fp8 | 24.0 | 3.142 | 2.500 | 255 | 6.25% |\n| eager, fp8 |" in text


def test_kernels_of_a_cpu(tmp_path, capsys):
    found = {f"ratio_to_{peer}{end}": value for peer, value in (("direct", 1.66), ("without_c", 1.37)) for end in ("", "_min", "_max")}
    convolution = {"case": "64-96@8-32", "shape": [32, 64, 8, 8], "ours_us": 1000.4, "operations": 226_492_416}
    network = {"case": "sprites, 64 images", "ours_us": 20_000, "operations": 7_782_400_000}
    rows = [("test_cpu_convolution[a]", ABOUT | found | convolution), ("test_cpu_network[b]", ABOUT | found | network)]
    assert report.main([str(written(tmp_path / "rows.json", *rows))]) == 0
    text = capsys.readouterr().out
    assert "**On one core, with kernels in C: A chip, float32" in text
    assert "| convolution 64-96@8, 32 images | 1,000 | 226 | 1.66 (1.66 to 1.66) | 1.37 (1.37 to 1.37) |" in text
    assert "| sprites, 64 images | 20,000 | 389 | 1.66" in text

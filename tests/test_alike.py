"""How like the images of two ways are: the command, its rows, and the differences by hand."""

import json

import numpy as np
import pytest

from benchmarks import alike


def test_differences_by_hand():
    a = np.full((4, 2, 2, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 1  # a whole image by 1
    b[2, 0, 0] = 220  # one pixel of four by 120: 30 on average
    b[3, 0, 0, 0] = 40  # one channel by 60: 5 on average
    found = alike.difference(b, a)
    assert found == {"largest": 120, "mean": 9.0, "median_image": 3.0, "far": 0.25, "largest_of_near": 60}
    assert alike.difference(a, b) == found, "unsigned numbers may not wrap"


def test_the_command_adds_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"benchmarks": [{"name": "other"}], "machine_info": {}}))
    assert alike.main(["fused float32", "no bfloat16", "--batch", "64", "--steps", "2", "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "64 images; distance of other training images" in text and "fused float32" in text
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["benchmarks"]] == ["other", "alike[fused float32]", "alike[no bfloat16]"]
    ours, plain = (row["extra_info"] for row in found["benchmarks"][1:])
    assert ours["way"] == "fused" and ours["shape"] == [64, 3, 16, 16] and ours["largest"] <= 1
    assert 0 < plain["mean"] < 10
    assert plain["fp32_distance"] == ours["fp32_distance"] > ours["training_distance"] > 0


@pytest.mark.parametrize(
    ("arguments", "text"), [(["fused int8"], "'fused int8' is not 'yes', 'no' or 'fused'"), (["--batch", "3"], "at least 64")]
)
def test_bad_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        alike.main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json holds no rows of pytest-benchmark; choose another file with --out$"):
        alike.main(["--out", str(other), "--device", "cpu"])
    assert other.read_text() == "[1, 2]"

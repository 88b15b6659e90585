"""What the launches of fused networks compile to, with no GPU: matrix instructions fed from shared memory, no spills, no stack, wide accesses."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
MATRIX = {90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA")}


@functools.cache
def reports():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("codegen_fused.py")
    done = subprocess.run([sys.executable, script, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: r | {"arch": int(name.split()[0].removeprefix("sm_"))} for name, r in json.loads(done.stdout).items()}


def these(kernel):
    return {name: r for name, r in reports().items() if r["kernel"] == f"{kernel}_kernel"}


def counted(r, pattern):
    return sum(n for opcode, n in r["opcodes"].items() if re.match(pattern, opcode))


def test_every_launch_of_the_networks_is_there():
    """Each compilation once: the shipped network's 22 launches are 17 kernels in bf16, for both GPUs; e4m3 and a single image are others."""
    for arch in (90, 100):
        own = [name for name in reports() if name.startswith(f"sm_{arch} sprites ") and "fp8" not in name]
        assert {name.split()[-1] for name in own} >= {"stem", "down.0.conv1", "down.0.conv2", "shrink.0", "up.0.conv2", "grow.0", "head"}
        assert len(own) >= 14 and sum(name.startswith(f"sm_{arch} sprites fp8") for name in reports()) >= 12
    assert sum(name.startswith("sm_90 one sprite") for name in reports()) >= 14
    assert sum(name.startswith("sm_90 wide") for name in reports()) >= 14


@pytest.mark.skipif(
    TRITON < (3, 6), reason="Triton's compiler before 3.6 spills registers of three kernels in fp8 and of the first convolution"
)
def test_nothing_spills():
    spilt = {
        name: r["used"] for name, r in reports().items() if r["used"]["STACK"] or r["used"]["LOCAL"] or counted(r, r"STL|LDL(?!\w)|LDL\.")
    }
    assert spilt == {}


def test_sums_stay_in_one_layout():
    """Folded loops of one step, the shortcut's for one, would have products of another layout, and move the whole sum between the two."""
    assert {name: r["sums_moved"] for name, r in reports().items() if r["sums_moved"]} == {}


@pytest.mark.parametrize("kernel", ["conv3x3", "conv_up", "conv_in", "conv_out"])
def test_products_are_the_matrix_units(kernel):
    assert these(kernel)
    for name, r in these(kernel).items():
        half, quarter = MATRIX[r["arch"]]
        # e4m3 alone in the blocks; a shortcut beside it stays in bf16, and so do the convolutions that are in no block.
        blocks = "fp8" in name and "conv" in name.split()[-1]
        assert (counted(r, quarter) > 0) == blocks, name
        assert counted(r, half) > 0 or blocks, name
        assert not counted(r, r"HMMA|IMMA|FFMA2?\.\d"), f"{name}: the older matrix unit"


def test_on_hopper_both_operands_come_from_shared_memory():
    """HGMMA with its first operand in registers reads R..., from shared memory gdesc alone; and it is as wide as the tile allows."""
    for name, r in these("conv3x3").items():
        if r["arch"] == 90:
            widths = {int(w) for opcode in r["opcodes"] for w in re.findall(r"^[HQ]GMMA\.64x(\d+)x", opcode)}
            assert widths <= ({256, 128} if "one sprite" not in name else {64, 32}), (name, widths)


@pytest.mark.parametrize("kernel", ["conv3x3", "conv_up", "conv_out"])
def test_images_and_weights_come_by_descriptor(kernel):
    for name, r in these(kernel).items():
        assert counted(r, "UTMALDG") >= 2, name
        # What is left to ordinary loads are vectors: bias, gamma, beta, scales and shifts.
        assert not counted(r, r"LDGSTS"), name


def test_results_go_by_descriptor_or_16_bytes():
    for kernel in ("conv3x3", "conv_in"):
        for name, r in these(kernel).items():
            assert 1 <= counted(r, "UTMASTG") <= 3 and not counted(r, "STG"), name
    for name, r in these("conv_up").items():
        assert counted(r, r"STG\.E\.128") and not counted(r, r"STG(?!\.E\.128)"), name


def test_norms_alone_read_and_write_16_bytes():
    assert {r["arch"] for r in these("group_norm_silu").values()} == {80, 90}
    for name, r in these("group_norm_silu").items():
        assert counted(r, r"LDG\.E\.128") and counted(r, r"STG\.E\.128"), name
        assert not counted(r, r"STG(?!\.E\.128)"), name

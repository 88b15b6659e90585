"""What the kernels compile to, with no GPU: no spills, wide accesses, and an instruction budget an element."""

import json
import os
import re
import subprocess
import sys

import codegen
import pytest

# Instructions an element on the longest path. fp32 solver_step on sm_90, with noise and without guidance, is the promise; the rest
# is what triton 3.7 gives plus about 1.5, to notice a change. bf16 adds packing and unpacking; sm_80 clamps in two instructions. With
# history the path is that of a row which reads all three slots and saves; others branch round what they do not use.
BUDGET = {
    "solver_step fp32 sm_90": 32.0,
    "solver_step fp32 sm_80": 33.8,
    "solver_step fp32 sm_100": 32.0,
    "solver_step bf16 sm_90": 35.0,
    "solver_step bf16 sm_80": 35.4,
    "solver_step bf16 sm_100": 34.0,
    "solver_step guided bf16 sm_90": 39.8,
    "solver_step 784 fp32 sm_90": 34.7,
    "solver_step history fp32 sm_90": 40.8,
    "solver_step variance bf16 sm_90": 40.0,
    "solver_step given fp32 sm_90": 16.3,
    "scheduler_step fp32 sm_90": 10.3,
    "scheduler_step given fp32 sm_90": 11.7,
    "scheduler_step given bf16 sm_90": 17.2,
    "scheduler_step stream fp32 sm_90": 30.7,
    "scheduler_step each fp32 sm_90": 11.7,
    "scheduler_step limit past fp32 sm_90": 18.7,
    "scheduler_step variance bf16 sm_90": 22.0,
    "scheduler_step channels-last bf16 sm_90": 28.0,
    "normal fp32": 21.4,
    "add_noise fp32": 26.4,
    "add_noise bf16 sm_90": 28.5,
    "add_noise given fp32 sm_90": 7.9,
    "add_noise no target fp32 sm_90": 24.0,
    "words sm_90": 14.4,
}


@pytest.fixture(scope="module")
def reports():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, codegen.__file__, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", codegen.CASES)
def test_machine_code(case, reports):
    opcodes, used = reports[case]["opcodes"], reports[case]["used"]
    (budget,) = {value for name, value in BUDGET.items() if case.startswith(name)} or {None}
    # A sample of 75 is read a word at a time, the noise crosses shared memory, and with history 72 bytes a thread spill: it is let be.
    if "history 75" not in case:
        assert used["STACK"] == used["LOCAL"] == 0 and not any(o.startswith(("LDL", "STL")) for o in opcodes), "spills"
    if budget is None:
        assert " 75 " in case, "no budget"
        return
    assert reports[case]["per_element"] <= budget
    assert used["SHARED"] == 0 and "BAR.SYNC" not in opcodes, "layouts are exchanged through shared memory"
    # One word at a time: the coefficients (16 of a table), guidance and the counter. Nothing as large as x, which is 32 words.
    narrow = {o: c for o, c in opcodes.items() if re.fullmatch(r"(LDG|STG)\.E(\.EF)?(\.[US]?\d\d?)?", o) and not o.endswith(".64")}
    if "channels-last" in case:  # a quad of m does not lie together
        assert narrow.pop("LDG.E.U16") == 32
    assert set(narrow) <= {"LDG.E"} and sum(narrow.values()) <= 18


@pytest.mark.parametrize("case", [case for case in codegen.CASES if " 75 " not in case])
def test_accesses_are_a_quad_wide(case, reports):
    opcodes, bf16 = reports[case]["opcodes"], "bf16" in case
    stores = {o for o in opcodes if o.startswith("STG")}
    assert stores <= ({"STG.E.128", "STG.E.64"} if bf16 else {"STG.E.128"})
    if case.startswith("solver_step"):
        assert any(re.fullmatch(r"LDG\.E\.EF\.64" if bf16 else r"LDG\.E\.EF\.128", o) for o in opcodes), "m leaves the cache first"
        assert opcodes["LDG.E.128"] == (40 if "history" in case else 16), "x, the old x0 and three slots, eight quads each"


@pytest.mark.parametrize("case", [case for case in codegen.CASES if case.startswith("solver_step")])
def test_a_thread_loads_what_it_stores(case, reports):
    """x0 and history are overwritten in the launch that reads them: in two layouts, one thread would overwrite what another has yet to read."""
    assert len(reports[case]["fp32_layouts"]) == 1


@pytest.mark.parametrize("case", ["solver_step fp32 sm_90", "normal fp32 sm_90", "words sm_90"])
def test_philox_is_two_wide_multiplies_a_round(case, reports):
    # 8 quads x 10 rounds x 2, less the 14 that a thread's quads share in the first two rounds; a few more are addresses.
    opcodes = reports[case]["opcodes"]
    assert 146 <= opcodes["IMAD.WIDE.U32"] <= 152
    assert opcodes.get("IMAD.HI.U32", 0) <= 3


@pytest.mark.parametrize("case", [*(case for case in codegen.CASES if "_step" in case), *codegen.EXACT])
def test_a_clamp_keeps_nan(case, reports):
    """A minimum without NaN in its name makes the limit of it, and images of a broken network; the interpreter's keeps it in any case."""
    found = reports[case]["clamps"]
    if "fp64" in case:  # for which there is no such instruction
        assert found == {"setp.nan.f64": 64, "min.f64": 32, "max.f64": 32}
    elif "sm_80" in case or "limit" in case:
        assert found == {"min.NaN.f32": 32, "max.NaN.f32": 32}
    else:
        assert found == {"min.NaN.xorsign.abs.f32": 32}

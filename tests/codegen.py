"""Compile the kernels for any CUDA architecture with no GPU and no driver and read the machine code; run it for a table.

test_codegen.py runs it as a process of its own: a kernel decorated for the interpreter cannot be compiled. Triton brings cuobjdump and nvdisasm.
"""

from __future__ import annotations

import collections
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BIN = "backends/nvidia/bin"
MACHINES = {80: "SM80", 90: "SM90a", 100: "SM100a"}  # as nvdisasm calls what Triton compiles for
# A SASS line: address, predicate if any, opcode, operands.
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*[a-z0-9_.]*[A-Z0-9_.]*)([^;]*);", re.M)


def compile_offline(fn: Any, types: dict[str, str], constants: dict[str, Any], arch: int, options: dict[str, Any]) -> Any:
    """The cubin and ttgir of a kernel, by name. types: {argument: "*fp32", "i32", ...}, pointers aligned to 16 bytes; constants: {argument: value}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm


def output(program: str, *flags: str, of: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(of)
        file.flush()
        command = [Path(triton.__file__).parent / BIN / program, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes that a kernel takes, by name."""
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", output("cuobjdump", "-res-usage", of=cubin))}


def code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin, which is an ELF file: its section .text.*"""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    found = [cubin[at : at + length] for name, _, _, _, at, length in sections if cubin.startswith(b".text.", sections[names][4] + name)]
    (only,) = found
    return only


def disassembled(cubins: list[bytes], arch: int) -> list[list[tuple[int, str, str, str]]]:
    """Address, predicate, opcode and operands of every instruction of each kernel, by one run: to begin takes nvdisasm longer than to read a kernel."""
    codes = [code(cubin) for cubin in cubins]
    sass = output("nvdisasm", "--binary", MACHINES[arch], of=b"".join(codes))
    lines = iter([(int(address, 16), *rest) for address, *rest in LINE.findall(sass)])
    kernels = [[next(lines) for _ in range(len(each) // 16)] for each in codes]  # of 16 bytes each
    assert next(lines, None) is None, "there is an instruction more than there is room for"
    return kernels  # type: ignore[return-value]


def executed(lines: list[tuple[int, str, str, str]]) -> collections.Counter[str]:
    """Opcodes on the longest path through a kernel: no warp executes more. Raises ValueError if there is a loop or a call."""
    index = {address: i for i, (address, *_) in enumerate(lines)}
    following: list[list[int]] = []
    for i, (address, predicate, opcode, operands) in enumerate(lines):
        target = re.search(r"0x[0-9a-f]+", operands) if opcode.startswith(("BRA", "JMP")) else None
        conditional = bool(predicate) or (target is not None and re.search(r"\bU?P\d", operands))
        if opcode.startswith(("CALL", "RET", "BRX")):
            raise ValueError(f"{opcode} at {address:#x}")
        # The trap after the end, a branch to itself, is never reached.
        jumps = [index[int(target[0], 16)]] if target is not None and int(target[0], 16) != address else []
        ends = opcode.startswith("EXIT") or target is not None
        following.append(jumps + ([i + 1] if (conditional or not ends) and i + 1 < len(lines) else []))
    # Depth first by hand: kernels are thousands of instructions long.
    longest: dict[int, int] = {}
    open_, stack = set(), [0]
    while stack:
        i = stack[-1]
        todo = [j for j in following[i] if j not in longest]
        if any(j in open_ for j in todo):
            raise ValueError(f"a loop at {lines[i][0]:#x}")
        if todo:
            open_.add(i)
            stack.extend(todo[:1])
        else:
            longest[i] = 1 + max((longest[j] for j in following[i]), default=0)
            open_.discard(i)
            stack.pop()
    counts, i = collections.Counter([lines[0][2]]), 0
    while following[i]:
        i = max(following[i], key=longest.__getitem__)
        counts[lines[i][2]] += 1
    return counts


def block() -> dict[str, Any]:
    from fastdiff.kernels import philox

    return philox.BLOCK


def compiled(kernel: str, arch: int, dtype: str = "fp32", numel: int = 768, **flags: Any) -> Any:
    """One kernel as its launcher would compile it for `arch`."""
    import importlib

    fn = getattr(importlib.import_module(f"fastdiff.kernels.{kernel}"), f"{kernel}_kernel")
    options = {key: block()[key] for key in ("num_warps", "enable_fp_fusion")}
    constants = {"NUMEL": numel, "PTX": arch, "R": block()["R"], "P": block()["P"], **flags}
    types = dict.fromkeys(fn.arg_names, "*fp64" if dtype == "fp64" else "*fp32")
    types |= {"row_ptr": "*i32", "counter_ptr": "*i32", "seeds_ptr": "*i64", "ids_ptr": "*i64", "t_ptr": "*i64", "n": "i32", "T": "i32"}
    types |= dict.fromkeys(("m_ptr", "model_input_ptr", "x_t_ptr", "target_ptr", "noise_ptr"), f"*{dtype}")
    if kernel == "add_noise":
        types["x0_ptr"] = f"*{dtype}"
    if kernel == "scheduler_step":
        types |= dict.fromkeys(("x_ptr", "x0_ptr", "out_ptr"), f"*{dtype}") | {"rows_ptr": "*i64"}
    return compile_offline(fn, types, constants, arch, options)


def clamps(asm: Any) -> dict[str, int]:
    """How often each instruction stands in the PTX that takes the smaller or larger of two numbers, or looks for NaN."""
    return collections.Counter(re.findall(r"\b((?:min|max|setp\.nan)\.[\w.]*f(?:32|64))\b", asm["ptx"]))


def report(asm: Any, lines: list[tuple[int, str, str, str]]) -> dict[str, Any]:
    """Resources, instructions an element, opcodes and clamps of one kernel."""
    rows, columns = block()["R"], block()["P"]
    tiles = rf"tt\.(?:load|store) .*tensor<{rows * columns}x4x!tt\.ptr<f32>, (#\w+)>"
    opcodes = executed(lines)
    per_element = sum(opcodes.values()) * 32 * block()["num_warps"] / (4 * rows * columns)
    layouts = sorted(set(re.findall(tiles, asm["ttgir"])))
    return {
        "used": resources(asm["cubin"]), "opcodes": dict(opcodes), "per_element": per_element, "fp32_layouts": layouts, "clamps": clamps(asm),
    }  # fmt: skip


PLAIN = {"GUIDED": False, "PAIRED": False, "HISTORY": 0, "VARIANCE": False, "noise_ptr": None}
ALONE = dict.fromkeys(("noise_ptr", "seeds_ptr", "ids_ptr", "limit_ptr", "before_ptr", "earlier_ptr")) | {
    "EACH": False,
    "VARIANCE": False,
    "LAST": 0,
}
CASES: dict[str, dict[str, Any]] = {}
for _arch in (80, 90, 100):
    _step = {"kernel": "solver_step", "arch": _arch} | PLAIN
    _normal = {"kernel": "normal", "arch": _arch}
    _made = {"noise_ptr": None}
    _given = {"seeds_ptr": None, "ids_ptr": None, "counter_ptr": None}
    CASES |= {
        f"solver_step fp32 sm_{_arch}": _step,
        f"solver_step bf16 sm_{_arch}": _step | {"dtype": "bf16"},
        f"normal fp32 sm_{_arch}": _normal | {"WORDS": False},
        f"add_noise fp32 sm_{_arch}": {"kernel": "add_noise", "arch": _arch} | _made,
    }
_step = {"kernel": "solver_step", "arch": 90} | PLAIN
_alone = {"kernel": "scheduler_step", "arch": 90} | ALONE


def _but(case: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key not in names} | changes


SCHEDULED = {
    "fp32": _alone,
    "given fp32": _but(_alone, "noise_ptr"),
    "given bf16": _but(_alone, "noise_ptr", dtype="bf16"),
    "stream fp32": _but(_alone, "seeds_ptr", "ids_ptr"),
    "each fp32": _but(_alone, "noise_ptr", EACH=True),
    "limit past fp32": _but(_alone, "noise_ptr", "limit_ptr", "before_ptr", "earlier_ptr"),
    "variance bf16": _but(_alone, "noise_ptr", dtype="bf16", VARIANCE=True),
    "channels-last bf16": _but(_alone, "noise_ptr", dtype="bf16", LAST=3),
}
CASES |= {
    "solver_step guided bf16 sm_90": _step | {"dtype": "bf16", "GUIDED": True, "PAIRED": True},
    "solver_step 784 fp32 sm_90": _step | {"numel": 784},
    "solver_step 75 fp32 sm_90": _step | {"numel": 75},
    "solver_step history fp32 sm_90": _step | {"HISTORY": 3},
    "solver_step history 75 fp32 sm_90": _step | {"numel": 75, "HISTORY": 3},
    "solver_step variance bf16 sm_90": _step | {"dtype": "bf16", "VARIANCE": True},
    "solver_step given fp32 sm_90": _but(_step, "noise_ptr"),
    "words sm_90": {"kernel": "normal", "arch": 90, "WORDS": True},
    "add_noise bf16 sm_90": {"kernel": "add_noise", "arch": 90, "dtype": "bf16"} | _made,
    "add_noise given fp32 sm_90": {"kernel": "add_noise", "arch": 90} | _given,
    **{f"scheduler_step {name} sm_90": case for name, case in SCHEDULED.items()},
    "add_noise no target fp32 sm_90": {"kernel": "add_noise", "arch": 90, "target_ptr": None} | _made,
}
# Of which only the clamps are looked at: division in fp64 is a call.
EXACT = {
    "scheduler_step fp64 sm_90": _but(_alone, dtype="fp64"),
    "scheduler_step limit fp64 sm_90": _but(_alone, "limit_ptr", dtype="fp64"),
}

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    made = {name: compiled(**case) for name, case in CASES.items()}
    lines = {}
    for arch in MACHINES:
        names = [name for name, case in CASES.items() if case["arch"] == arch]
        lines |= dict(zip(names, disassembled([made[name]["cubin"] for name in names], arch), strict=True))
    reports = {name: report(asm, lines[name]) for name, asm in made.items()}
    if "--json" in sys.argv:
        print(json.dumps(reports | {name: {"clamps": clamps(compiled(**case))} for name, case in EXACT.items()}))
    else:
        for name, r in reports.items():
            wide = {o: c for o, c in r["opcodes"].items() if o.startswith(("LDG", "STG"))}
            print(f"{name:35} {r['per_element']:5.1f} an element  {r['used']}  {wide}")

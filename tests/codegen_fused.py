"""Compile every launch of a fused network as its launcher would, with no GPU, and read the machine code; run it for a table.

The launchers are called with tensors that have no memory, and what they would launch is compiled offline. test_codegen_fused.py runs it as a
process of its own: a kernel decorated for the interpreter cannot be compiled.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.pop("TRITON_INTERPRET", None)

import torch
from codegen import MACHINES, compile_offline, disassembled, resources

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")


class Launch:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, fn: Any, kept: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.fn, self.kept = fn, kept

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: self.kept.append((self.fn, args, constants))


@contextmanager
def launched(arch: int, processors: int):
    """Launchers for a GPU of `arch` that launch nothing: a list of what they would."""
    from fastdiff.kernels import conv, conv_ends, group_norm_silu

    kept: list[Any] = []
    with ExitStack() as stack:
        for module, name in (
            (conv, "conv3x3"), (conv, "conv_up"), (conv_ends, "conv_in"), (conv_ends, "conv_out"), (group_norm_silu, "group_norm_silu"),
        ):  # fmt: skip
            fn = getattr(module, f"{name}_kernel")
            stack.enter_context(mock.patch.object(module, f"{name}_kernel", Launch(fn, kept)))
        for module in (conv, conv_ends):
            stack.enter_context(mock.patch.object(module, "kinds", return_value=(torch.bfloat16, torch.float16)))
            stack.enter_context(mock.patch.object(module, "processors", return_value=processors))
        stack.enter_context(mock.patch.object(conv, "ptx", return_value=arch))
        yield kept


def network(config: Any, n: int, fp8: bool) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a UNet of that shape launches for n images, by the name of its convolution. Within `launched`."""
    from fastdiff import UNet, fused
    from fastdiff.kernels import conv, conv_ends

    with torch.device("meta"):
        model = UNet(config).to(torch.bfloat16)
        made = fused.FusedUNet(model, fp8=fp8)
        names: list[str] = []
        for convolution in made.convolutions():
            if convolution.fp8[1]:
                convolution.inverse = torch.empty(len(convolution.readers))
            convolution.register_forward_pre_hook(lambda module, args: names.append(module.name))
        launchers = {"conv3x3": conv.conv3x3, "conv_up": conv.conv_up, "conv_in": conv_ends.conv_in, "conv_out": conv_ends.conv_out}
        with ExitStack() as stack:
            for name, launcher in launchers.items():
                stack.enter_context(mock.patch.object(fused.ops, name, launcher))
            kept: list[Any] = []
            for module in (conv, conv_ends):
                for name in launchers:
                    if isinstance(launch := getattr(module, f"{name}_kernel", None), Launch):
                        stack.enter_context(mock.patch.object(launch, "kept", kept))
            x = torch.empty(n, *config.shape, dtype=torch.bfloat16)
            made.body(x, torch.empty(20, sum(model.sizes), dtype=torch.bfloat16), torch.empty(n, dtype=torch.int64))
    return dict(zip(names, kept, strict=True))


def compiled(fn: Any, args: tuple[Any, ...], constants: dict[str, Any], arch: int) -> Any:
    """One launch's kernel."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    types, fixed = {}, {key: value for key, value in constants.items() if key not in OPTIONS}
    for name, value in zip(fn.arg_names, args, strict=False):
        if value is None:
            fixed[name] = None
        elif isinstance(value, TensorDescriptor):
            types[name] = f"tensordesc<{TYPES[value.base.dtype]}{str(list(value.block_shape)).replace(' ', '')}>"
        else:
            types[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
    return compile_offline(fn, types, fixed, arch, {key: constants[key] for key in OPTIONS})


def report(fn: Any, asm: Any, lines: list[tuple[int, str, str, str]]) -> dict[str, Any]:
    """Resources and opcodes of one kernel."""
    # From one layout of the matrix unit to another. Where only the products' depth differs, e4m3's from bf16's, the registers are the same.
    layouts = dict(re.findall(r"^(#mma\d*) = #ttg.nvidia_mma<(.*)>", re.sub(r", \d+\]", "]", asm["ttgir"]), re.M))
    pairs = re.findall(r"convert_layout .*xf32, (#mma\d*)> -> tensor<\d+x\d+xf32, (#mma\d*)>", asm["ttgir"])
    moved = sum(layouts[one] != layouts[other] for one, other in pairs)
    opcodes = collections.Counter(opcode for _, _, opcode, _ in lines)
    return {"kernel": fn.__name__, "used": resources(asm["cubin"]), "opcodes": dict(opcodes), "sums_moved": moved}


def described(fn: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """What two launches share if one compilation serves both."""
    shapes = [getattr(v, "block_shape", None) or str(getattr(v, "dtype", v is None)) for v in args]
    return json.dumps([fn.__name__, shapes, constants], default=str)


def cases() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], int]]:
    """Launches by name, each compilation once: of the shipped networks, and of one with 128 and 256 channels at 16 x 16 to 4 x 4 pixels."""
    import fastdiff
    from fastdiff import UNetConfig
    from fastdiff.kernels import group_norm_silu

    shipped, large = (fastdiff.load(name).model.config for name in ("sprites", "sprites-large"))
    wide = UNetConfig(shape=(3, 16, 16), patch=1, channels=(128, 256, 256), blocks=2, middle=1, num_classes=8)
    found: dict[str, Any] = {}
    for arch in (90, 100):
        seen: set[str] = set()
        runs = [("sprites", shipped, 4096, False), ("sprites fp8", shipped, 4096, True)]
        runs += [("sprites-large", large, 4096, False), ("sprites-large fp8", large, 4096, True)]
        if arch == 90:
            runs += [("one sprite", shipped, 1, False), ("wide", wide, 4096, False)]
        for title, config, n, fp8 in runs:
            with launched(arch, processors=132):
                for name, (fn, args, constants) in network(config, n, fp8).items():
                    if (same := described(fn, args, constants)) not in seen:
                        seen.add(same)
                        found[f"sm_{arch} {title} {name}"] = (fn, args, constants, arch)
    for arch in (80, 90):
        for pixels, channels in ((64, 64), (16, 128), (1024, 128)):
            with launched(arch, 132) as kept:
                side = int(pixels**0.5)
                x, style = (
                    torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, side, side, channels), (3, 2 * channels))
                )
                one = torch.empty(channels, device="meta")
                group_norm_silu.group_norm_silu(x, one, one, style, torch.empty(8, dtype=torch.int64, device="meta"), 8, 1e-5, True, None)
                found[f"sm_{arch} norm {pixels} pixels {channels}"] = (*kept[0], arch)
    return found


if __name__ == "__main__":
    reports, found = {}, cases()
    for arch in MACHINES:
        made = {name: (case[0], compiled(*case)) for name, case in found.items() if case[-1] == arch}
        lines = disassembled([asm["cubin"] for _, asm in made.values()], arch)
        reports |= {name: report(fn, asm, own) for (name, (fn, asm)), own in zip(made.items(), lines, strict=True)}
    if "--json" in sys.argv:
        print(json.dumps(reports))
    else:
        for name, r in reports.items():
            kinds = ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "UTMALDG", "UTMASTG", "LDG", "STG", "STL", "LDL")
            print(f"{name:40} {r['used']}  { ({o: c for o, c in r['opcodes'].items() if o.startswith(kinds)}) }")

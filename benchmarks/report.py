"""Tables and a picture of benchmark rows: `python -m benchmarks.report [FILES] [--readme README.md] [--png docs/speed.png]`.

Without files all of benchmarks/results is read. The tables go to standard output, or into a README between its two markers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- speed:start -->", "<!-- speed:end -->"
NAMES = {
    "ours": "fastdiff", "fastdiff_eager": "fastdiff, eager", "fastdiff_float32": "fastdiff, float32",
    "fastdiff_own_batch": "fastdiff, own micro-batch, not compiled",
    "fastdiff_own_batch_compiled": "fastdiff, own micro-batch", "plain": "plain PyTorch loop", "diffusers": "diffusers",
    "diffusers_best": "diffusers, best settings", "k_diffusion": "k-diffusion", "eager": "plain PyTorch loop",
}  # fmt: skip

Row = dict[str, Any]


class ReportError(ValueError):
    """Files without rows, or a README without markers."""


def rows_of(paths: Iterable[Path]) -> list[Row]:
    """The rows of pytest-benchmark's files: `extra_info` with `name`. Other JSON files, such as the report of a command, have none."""
    rows = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ReportError(f"{path}: {e.strerror if isinstance(e, OSError) else 'not JSON'}") from None
        if isinstance(content, dict):
            rows += [{**row["extra_info"], "name": row["name"]} for row in content.get("benchmarks", [])]
    if not rows:
        raise ReportError(
            "no rows of pytest-benchmark in these files; make some with pytest benchmarks --benchmark-only --benchmark-json=FILE"
        )
    return rows


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def put(path: Path, text: str, start: str, end: str) -> None:
    """Text in place of what stands between two markers of a file."""
    old = path.read_text()
    if old.count(start) != 1 or old.count(end) != 1:
        raise ReportError(f"{path} must hold {start} and {end} once each")
    path.write_text(re.sub(f"{start}.*{end}", lambda _: f"{start}\n\n{text}\n\n{end}", old, flags=re.S))


def where(row: Row) -> str:
    return f"{row['device']}, {row['dtype']}, torch {row['torch']}, {row['threads']} threads, commit {row['commit']}"


def who(row: Row, peer: str) -> str:
    """A peer by name, ours with the way its network ran."""
    return f"fastdiff, {row['way']}" if peer == "ours" and "way" in row else NAMES.get(peer, peer)


def ratio(row: Row, peer: str) -> str:
    """How many times as long the peer takes, with the lowest and highest of the rounds."""
    if f"ratio_to_{peer}" not in row:
        return ""
    middle, low, high = (row[f"ratio_to_{peer}{end}"] for end in ("", "_min", "_max"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def sections(rows: list[Row]) -> list[str]:
    """Markdown: for every kind of row a table for every machine and commit."""
    parts: dict[str, tuple[list[str], list[list[str]]]] = {}

    def add(title: str, head: list[str], line: list[str]) -> None:
        parts.setdefault(title, (head, []))[1].append(line)

    for row in rows:
        kind = row["name"].partition("[")[0].removeprefix("test_")
        if kind in ("solver_step", "add_noise", "group_norm_silu"):
            add(
                f"Kernels: {where(row)}",
                ["case", "us", "GB/s", "of a copy", "against eager", "against compiled"],
                [
                    row["name"].removeprefix("test_"), f"{row['ours_us']:.1f}", f"{row['gb_per_s']:.0f}", f"{row['fraction_of_copy']:.2f}",
                    ratio(row, "eager"), ratio(row, "compiled"),
                ],
            )  # fmt: skip
        elif kind == "blocks":
            n, _, side, c_out = row["shape"]
            add(
                f"Residual blocks, two launches each: {where(row)}",
                ["block", "us", "TFLOP/s", "of a matrix product", "GB/s", "against eager", "against compiled", "against fused bf16"],
                [
                    f"{row['kind']}, {' + '.join(map(str, row['channels']))} to {c_out} @ {side}, {n} images", f"{row['ours_us']:.1f}",
                    f"{row['ours_tflop_per_s']:.3g}", f"{row['fraction_of_matmul']:.2f}", f"{row['gb_per_s']:.0f}",
                    *(ratio(row, peer) for peer in ("eager", "compiled", "bfloat16")),
                ],
            )  # fmt: skip
        elif kind == "alike":
            run = {**row, "dtype": f"{row['solver']} {row['steps']}, guidance {row['guidance']:g}"}
            way = {"no": "eager", "yes": "compiled"}.get(row["way"], row["way"])
            floors = [row[f"{which}_distance"] for which in ("fp32", "training", "held_out")]
            add(
                f"{row['shape'][0]} images by other ways than eagerly in fp32: {where(run)}; distance of fp32's images {floors[0]:.1f}, "
                f"of other training images {floors[1]:.1f}, of held-out ones {floors[2]:.1f}",
                ["way", "distance", "pixels differ by, of 255", "in the median image", "at most", "images that differ by more than 10"],
                [
                    f"{way}, {row['dtype']}", f"{row['distance']:.1f}", f"{row['mean']:.3f}", f"{row['median_image']:.3f}",
                    f"{row['largest']}", f"{row['far']:.2%}",
                ],
            )  # fmt: skip
        elif kind == "sampler":
            peers = row.get("peers") or {"ours": row, "eager": {"images_per_s": row.get("eager_images_per_s", float("nan"))}}
            case = f"{row['shape'][0]} images, {row.get('network', 'sprites')}, {row.get('solver', 'ddpm')} {row['steps']}"
            case += f", guidance {row['guidance']:g}" if row.get("guidance", 1) != 1 else ""
            for peer, of in peers.items():
                steps = [f"{of[key]:g}" if key in of else "" for key in ("ops_per_step", "kernels_per_step", "syncs_per_step")]
                rate = [f"{of['images_per_s']:.4g}", f"{of['fraction_of_matmul']:.2f}" if "fraction_of_matmul" in of else ""]
                add(
                    f"Sampling: {where(row)}",
                    ["case", "who", "images/s", "ours is as fast, times", "of a matrix product", "operations a step", "kernels", "waits"],
                    [case, who(row, peer), rate[0], ratio(row, peer), rate[1], *steps],
                )
                case = ""
        elif kind == "unet":
            for way in ("plain", "eager", "compiled"):
                if f"{way}_images_per_s" in row:
                    add(
                        f"One evaluation of the network: {where(row)}",
                        ["rows", "way", "images/s", "GFLOP/s", "GFLOP/s of a matrix product"],
                        [
                            str(row["shape"][0]), way, f"{row[f'{way}_images_per_s']:.0f}", f"{row[f'{way}_gflop_per_s']:.0f}",
                            f"{row['matmul_gflop_per_s']:.0f}",
                        ],
                    )  # fmt: skip
        elif kind in ("cpu_convolution", "cpu_network"):
            case = row["case"] if kind == "cpu_network" else "convolution " + row["case"].rpartition("-")[0] + f", {row['shape'][0]} images"
            add(
                f"On one core, with kernels in C: {where(row)}",
                ["what", "us", "the direct way's operations, GFLOP/s", "PyTorch's own takes, times as long", "ours without C"],
                [
                    case, f"{row['ours_us']:,.0f}", f"{row['operations'] / row['ours_us'] / 1e3:.0f}",
                    ratio(row, "direct"), ratio(row, "without_c"),
                ],
            )  # fmt: skip
        elif kind.startswith("diffusers_"):
            what = {
                "diffusers_step": f"{row.get('scheduler')}.step{', eta 1' if row.get('step_options') else ''}",
                "diffusers_add_noise": "DDPMScheduler.add_noise",
                "diffusers_pipeline": f"{row.get('pipeline')}, {row.get('steps')} steps, ours {row.get('way')}",
            }[kind.removesuffix("_compiled")]
            counts = [row["counts"].get(who, {}) for who in ("ours", "diffusers")]
            add(
                f"diffusers {row['diffusers']} and fastdiff.diffusers: {where(row)}",
                ["call", "images", "ours, us", "theirs, us", "ours is as fast, times", "operations, ours and theirs", "values read", "graph breaks"],
                [
                    what, str(row["shape"][0]), f"{row['ours_us']:,.0f}", f"{row['diffusers_us']:,.0f}", ratio(row, "diffusers"),
                    *(", ".join(f"{of[key]:.3g}" for of in counts if key in of) for key in ("ops_per_call", "reads_per_call", "graph_breaks")),
                ],
            )  # fmt: skip
        elif kind == "import":
            line = [f"{row['import_torch_s']:.2f}", f"{row['import_fastdiff_over_torch_s']:.3f}"]
            add(f"Importing: {where(row)}", ["torch, s", "fastdiff over it, s"], line)
        elif kind == "first_call":
            line = [row["way"], *(f"{row[key]:.2f}" for key in ("first_call_s", "cached_first_call_s", "steady_s"))]
            add(
                f"64 images, {row['steps']} steps: {where(row)}",
                ["way", "first call, s", "first call with kept code, s", "further calls, s"],
                line,
            )
        elif kind == "memory":
            sizes = sorted(int(key.rpartition("_")[2]) for key in row if key.startswith("peak_memory_mb_"))
            for library, prefix in (("fastdiff", ""), ("diffusers", "diffusers_")):
                found = [row.get(f"{prefix}peak_memory_mb_{n}", "") for n in sizes]
                add(f"Peak memory, MiB: {where(row)}", ["who", *(f"{n} images" for n in sizes)], [library, *map(str, found)])
    return [f"**{title}**\n\n{table(head, lines)}" for title, (head, lines) in parts.items()]


def picture(rows: list[Row], path: Path) -> None:
    """Images a second, times steps, against the batch: a line for each peer, a panel for each device, network and solver with several batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.get("peers") and row.get("guidance", 1) == 1:
            panel = panels.setdefault(f"{row['device']}, {row['dtype']}\n{row['network']}, {row['solver']}", {})
            for peer, of in row["peers"].items():
                panel.setdefault(who(row, peer), {})[row["shape"][0]] = of["images_per_s"] * row["steps"]
    panels = {title: lines for title, lines in panels.items() if len({n for points in lines.values() for n in points}) > 1}
    if not panels:
        raise ReportError("no rows of the sampler with peers and several batches, so there is nothing to draw")
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            own = name.startswith("fastdiff")
            axis.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name, linewidth=2.2 if own else 1.2, zorder=3 if own else 2)
        axis.set_xscale("log", base=2)
        values = [v for points in lines.values() for v in points.values()]
        if max(values) > 4 * min(values):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.15 * max(values))
        ticks = sorted({n for points in lines.values() for n in points})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("images at a time")
        axis.set_ylabel("images per second, times steps")
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a picture of benchmark rows.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="rows of pytest-benchmark (all of benchmarks/results)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"put the tables between {START} and {END} there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw images per second, times steps, against the batch")
    args = parser.parse_args(argv)
    try:
        rows = rows_of(args.files or sorted(RESULTS.glob("*.json")))
        text = "\n\n".join(sections(rows))
        if args.readme:
            put(args.readme, text, START, END)
        else:
            print(text)
        if args.png:
            picture(rows, args.png)
    except (ReportError, OSError, KeyError) as e:
        text = f"a row lacks {e}" if isinstance(e, KeyError) else str(e)
        print(f"python -m benchmarks.report: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

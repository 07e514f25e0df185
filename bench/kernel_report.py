"""Compile every kernel for every target, on any machine, and write what came out to docs/kernels.md.

python bench/kernel_report.py                       # the table in docs/kernels.md
python bench/kernel_report.py --records out.json    # the same as records, for tests/kernels/test_compile.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
INTRO = """---
hide:
  - toc
---

# What the kernels become

Compiled ahead of time by `make kernel-report` with Triton {triton}; no GPU is needed. The launches are those of the
wrappers in `kernels/`, at the shapes named; shapes beyond the first are shown for one target. No page is written if a
kernel spills, has a stack frame, accesses a row in less than 16 bytes, or fuses a product; on any target, at any shape.

* *registers* per thread; *spills* are instructions that move a register to memory and back; *shared* memory in bytes
  per program, *stack* in bytes per thread.
* *row access*: bytes per load or store of a row, and how many of each there are in the code.
* *bytes per row*: read and written for one row with one destination ({note}).
* *instructions*: in the code (not executed): global loads and stores by width in bits, then by kind; *fused* products
  and sums are those of which a division is made, and no others are allowed.
"""
SHOWN_TARGET = "sm_90"
ROWLESS = ("dispatch: layout", "barrier: signal", "barrier: wait", "padded: receive", "padded: return")
NOTE = "sums read one row per entry or rank"


def compile_all(job: tuple[str, str]) -> list[dict[str, Any]]:
    """Compile all launches of one shape for one target."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    from moecomm.kernels import aot

    shape_name, target = job
    shape = next(shape for shape in aot.SHAPES if shape.name == shape_name)
    return [compiled.record() for compiled in aot.inspect(shape, target)]


def collect(shapes: list[str] | None = None, targets: list[str] | None = None, workers: int | None = None) -> Any:
    """Records of all kernels at the shapes and targets named, or at all of them."""
    from moecomm.kernels import aot

    names = shapes or [shape.name for shape in aot.SHAPES]
    return collect_jobs([(name, target) for name in names for target in (targets or list(aot.TARGETS))], workers)


def collect_jobs(jobs: list[tuple[str, str]], workers: int | None = None) -> Any:
    """Records of all kernels at pairs of shape and target; with one worker, by this process."""
    if workers == 1:
        return [record for job in jobs for record in compile_all(job)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or min(len(jobs), os.cpu_count() or 1), mp_context=spawn) as pool:
        return [record for records in pool.map(compile_all, jobs) for record in records]


def where(record: dict[str, Any]) -> str:
    return f"{record['kernel']} at {record['shape']} on {record['target']}"


def complaints(record: dict[str, Any]) -> list[str]:
    """What no kernel may do, wherever it runs."""
    from moecomm.kernels import aot

    found = []
    if record["spilled"] or record["stack_bytes"]:
        found.append(f"{record['spilled']} spills, {record['stack_bytes']} bytes of stack")
    if record["shared_bytes"] > aot.SHARED_LIMIT_BYTES[record["target"]]:
        found.append(f"{record['shared_bytes']} bytes of shared memory")
    narrow = [access for access in record["row_widths"] if access[1] < 16]
    if narrow:
        found.append(f"narrow row accesses: {narrow}")
    if not record["row_widths"] and record["kernel"] not in ROWLESS:
        found.append("no access to a row was recognised")
    if record["fused"] or record["flushes"]:
        found.append(f"{record['fused']} fused multiply-adds, {record['flushes']} flushes of subnormal numbers")
    return [f"{where(record)}: {text}" for text in found]


def quick_jobs() -> list[tuple[str, str]]:
    """Shape and target of what the tests compile: the first shape for all targets, and each target at one more."""
    from moecomm.kernels import aot

    first, *others = (shape.name for shape in aot.SHAPES)
    return [(first, target) for target in aot.TARGETS] + list(zip(others * 2, aot.TARGETS, strict=True))


def table(records: list[dict[str, Any]]) -> str:
    """One Markdown table."""
    head = (
        "| kernel | target | warps | registers | spills | stack | shared | row access | bytes per row | instructions |"
    )
    lines = [head, "|" + " --- |" * 10]
    for r in records:
        widths = ", ".join(f"{count} {kind}s of {width}" for (kind, width), count in count_widths(r).items()) or "-"
        mix = ", ".join(f"{kind} {count}" for kind, count in sorted(r["mix"].items()))
        moved = "{} + {}".format(*r["traffic"]) if any(r["traffic"]) else "-"
        use = f"{r['num_warps']} | {r['registers']} | {r['spilled']} | {r['stack_bytes']} | {r['shared_bytes']}"
        lines.append(f"| {r['kernel']} | {r['target']} | {use} | {widths} | {moved} | {mix} |")
    return "\n".join(lines)


def count_widths(record: dict[str, Any]) -> dict[tuple[str, int], int]:
    """Row accesses by (load or store, bytes)."""
    found: dict[tuple[str, int], int] = {}
    for kind, width, _ in record["row_widths"]:
        found[kind, width] = found.get((kind, width), 0) + 1
    return found


def page(records: list[dict[str, Any]]) -> str:
    """The whole page."""
    import triton

    parts = [INTRO.format(triton=triton.__version__, note=NOTE)]
    if measured := re.search(r"^## On a GPU\n.*?(?=^## )", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        parts.append(measured[0])  # written by hand from bench/results/kernels.json
    names = list(dict.fromkeys(r["shape"] for r in records))
    for name in names:
        shown = [r for r in records if r["shape"] == name and (name == names[0] or r["target"] == SHOWN_TARGET)]
        parts.append(f"## {name}\n\n{table(shown)}\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Compile, then write the page or the records; arguments: those of the command line unless told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="write JSON records here instead of the page")
    parser.add_argument("--shapes", nargs="*", help="names of shapes; default: all")
    parser.add_argument("--targets", nargs="*", help="names of targets; default: all")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--quick", action="store_true", help="each target at two shapes only")
    given = parser.parse_args(arguments)
    if "TRITON_INTERPRET" in os.environ:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if given.quick:
        records = collect_jobs(quick_jobs(), given.workers)
    else:
        records = collect(given.shapes, given.targets, given.workers)
    if given.records is not None:
        given.records.write_text(json.dumps(records), encoding="utf-8")
        return
    if problems := [problem for record in records for problem in complaints(record)]:
        sys.exit("\n".join(problems))
    PAGE.write_text(page(records), encoding="utf-8")
    print(f"{len(records)} kernels compiled; wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

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
wrappers in `kernels/`, at the shapes named; shapes beyond the first are shown for one target, and held to the same by
`tests/kernels/test_compile.py` on all.

* *registers* per thread; *spills* are instructions that move a register to memory and back; *shared* memory in bytes
  per program, *stack* in bytes per thread.
* *row access*: bytes per load or store of a row, and how many of each there are in the code.
* *bytes per row*: read and written for one row with one destination ({note}).
* *instructions*: in the code (not executed): global loads and stores by width in bits, then by kind; *fused* products
  and sums are those of which a division is made, and no others are allowed.
"""
SHOWN_TARGET = "sm_90"
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
    wanted = [(name, target) for name in names for target in (targets or list(aot.TARGETS))]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or min(len(wanted), os.cpu_count() or 1), mp_context=spawn) as pool:
        return [record for records in pool.map(compile_all, wanted) for record in records]


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


def main() -> None:
    """Compile, then write the page or the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="write JSON records here instead of the page")
    parser.add_argument("--shapes", nargs="*", help="names of shapes; default: all")
    parser.add_argument("--targets", nargs="*", help="names of targets; default: all")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    given = parser.parse_args()
    if "TRITON_INTERPRET" in os.environ:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    records = collect(given.shapes, given.targets, given.workers)
    if given.records is not None:
        given.records.write_text(json.dumps(records), encoding="utf-8")
        return
    PAGE.write_text(page(records), encoding="utf-8")
    print(f"{len(records)} kernels compiled; wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

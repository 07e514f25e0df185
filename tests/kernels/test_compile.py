"""Every kernel compiled for GPUs that are not here, and held to what it must be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import kernel_report
from bench.kernel_report import ROWLESS, complaints, where

aot = pytest.importorskip("moecomm.kernels.aot", reason="triton is not installed")
assembly = pytest.importorskip("moecomm.kernels.assembly", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600
FP8_HARDWARE = ("sm_90", "sm_100")
NAMES = sorted(aot.operations(aot.SHAPES[0]))
SENDING = ("padded: send", "padded: return", "barrier: signal")
SENDERS = [name for name in NAMES if "push" in name or name.startswith(SENDING)]
WAITERS = [
    name
    for name in NAMES
    if name.startswith(
        ("gradient", "combine: reduce", "dispatch: receive", "dispatch: permute", "padded: receive", "padded: sum")
    )
    or name == "barrier: wait"
]
FP8_WRITERS = ("dispatch: push_quantized", "local: quantize", "padded: send, FP8", "padded: return, FP8")
Record = dict[str, Any]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the report is made of, but every kernel for every target at two shapes; from Triton's cache if known there.

    `make kernel-report` compiles at all shapes for all targets, and fails where a test here would.
    """
    out = tmp_path_factory.mktemp("compiled") / "records.json"
    options = ["--quick", "--workers", "1", "--records", str(out)]
    if "TRITON_INTERPRET" not in os.environ:
        kernel_report.main(options)  # here torch and Triton are imported
    else:  # whatever it says, kernels of this process may be interpreted
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "bench/kernel_report.py", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def of(records: list[Record], name: str, target: str | None = None) -> list[Record]:
    found = [r for r in records if r["kernel"] == name and target in (None, r["target"])]
    assert found, f"{name} was not compiled for {target}"
    return found


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_all_compile(records: list[Record], target: str) -> None:
    shapes = [shape for shape in aot.SHAPES if (shape.name, target) in kernel_report.quick_jobs()]
    assert len(shapes) == 2
    for shape in shapes:
        found = sorted(r["kernel"] for r in records if r["target"] == target and r["shape"] == shape.name)
        assert found == sorted(aot.operations(shape)), f"{shape.name} on {target}"


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("name", NAMES)
def test_no_spill_no_narrow_access_no_fusion(records: list[Record], name: str) -> None:
    assert [text for record in of(records, name) for text in complaints(record)] == []


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_both_read_and_written(records: list[Record], name: str) -> None:
    """Where rows go in and out, accesses of both kinds are found: the check above looked at the right lines."""
    for record in of(records, name):
        kinds = {kind for kind, _, _ in record["row_widths"]}
        one_way = {"gradient: reduce_grad_weights": {"load"}}.get(name, {"load", "store"})
        assert kinds == (set() if name in ROWLESS else one_way), where(record)


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_signals_are_ordered_at_system_scope(records: list[Record], target: str) -> None:
    for record in (r for name in SENDERS for r in of(records, name, target)):
        assert {"release", "arrive"} <= set(record["orders"]), where(record)
    for record in (r for name in WAITERS for r in of(records, name, target)):
        assert "acquire" in record["orders"], where(record)
    for record in (r for name in set(NAMES) - set(SENDERS) - set(WAITERS) for r in of(records, name, target)):
        assert record["orders"] == [], f"{where(record)} orders memory and should not"


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_fp8_uses_the_instruction_where_there_is_one(records: list[Record], target: str) -> None:
    for record in (r for name in FP8_WRITERS for r in of(records, name, target)):
        assert record["converts_to_fp8"] == (target in FP8_HARDWARE), where(record)


@pytest.mark.timeout(DEADLINE_S + 30)
def test_report_is_complete(records: list[Record]) -> None:
    text = kernel_report.page(records)
    for record in records:
        if record["shape"] == aot.SHAPES[0].name or record["target"] == kernel_report.SHOWN_TARGET:
            row = f"| {record['kernel']} | {record['target']} | {record['num_warps']} | {record['registers']} |"
            assert row in text.split(f"## {record['shape']}\n")[1].split("\n## ")[0]


def test_numbers_that_are_one_compile_too() -> None:
    """Triton makes a constant of an integer 1, such as the rank of rank 1."""
    found = [launch for shape in aot.SHAPES[:2] for launch in aot.launches(shape._replace(tokens=1), rank=1).values()]
    assert {launch.kernel for launch in found} == {launch.kernel for launch in aot.launches(aot.SHAPES[0]).values()}
    for launch in {launch.kernel: launch for launch in found}.values():
        assert aot.compile_launch(launch, "sm_90").asm["ptx"], launch.kernel


# The checks can fail: what they look for, in code that has it.


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spilled": 2}, "2 spills, 0 bytes of stack"),
        ({"stack_bytes": 8}, "0 spills, 8 bytes of stack"),
        ({"shared_bytes": 65 << 10}, "66560 bytes of shared memory"),
        ({"row_widths": [["store", 2, "push.py:1"]]}, "narrow row accesses"),
        ({"row_widths": []}, "no access to a row was recognised"),
        ({"fused": 1}, "1 fused multiply-adds, 0 flushes"),
        ({"flushes": 1}, "0 fused multiply-adds, 1 flushes"),
    ],
    ids=str,
)
def test_every_complaint_is_made(records: list[Record], changes: dict[str, Any], problem: str) -> None:
    (record, *_) = of(records, "dispatch: push", "gfx942")
    assert complaints(record) == []
    assert len(complaints(record | changes)) == 1 and problem in complaints(record | changes)[0]


def test_a_narrow_access_is_seen() -> None:
    """The row lines of a kernel compiled without the alignment hint."""
    shape = aot.SHAPES[0]._replace(hidden=7169)
    launch = aot.launches(shape)["local: unpermute"]
    (compiled,) = aot.inspect(shape, "sm_90", {"local: unpermute": launch})
    record = compiled.record()
    assert any("narrow row accesses" in text for text in complaints(record))


def test_a_fused_product_is_seen() -> None:
    launch = aot.launches(aot.SHAPES[1])["combine: reduce, each"]
    fused = aot.compile_launch(launch, "sm_90", fused=True)
    assert assembly.fused_products(fused.asm["ptx"]) > 0
    assert assembly.fused_products(aot.compile_launch(launch, "sm_90").asm["ptx"]) == 0


@pytest.mark.parametrize(
    ("text", "orders"),
    [
        ("@%p3 atom.global.sys.acq_rel.add.u64 %rd6, [%rd14], %rd7;", ["arrive"]),
        ("fence.release.sys;\n@%p5 st.relaxed.sys.global.b64 [%rd19], %rd15;", ["release"]),
        ("fence.acq_rel.sys;\n@%p5 st.relaxed.sys.global.b64 [%rd19], %rd15;", ["release"]),
        ("atom.global.sys.release.exch.b64 %rd25, [%rd26], %rd27;", ["release"]),
        ("@%p2 ld.relaxed.sys.global.b64 %rd10, [%rd11];\nfence.acquire.sys;", ["acquire"]),
        ("@%p2 ld.relaxed.sys.global.b64 %rd10, [%rd11];\nfence.acquire.gpu;", []),
        ("buffer_inv sc0 sc1\nglobal_load_dwordx2 v[8:9], v[4:5], off sc0 sc1\n", ["acquire"]),
        ("global_load_dwordx2 v[8:9], v[4:5], off sc0 sc1\n", []),
        ("buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt(0)\nglobal_store_dwordx2 v[0:1], v[2:3], off sc0 sc1\n", ["release"]),
        ("global_store_dwordx2 v[0:1], v[2:3], off sc0 sc1\n", []),
        ("fence.release.gpu;\n@%p5 st.relaxed.sys.global.b64 [%rd19], %rd15;", []),
        ("@%p5 st.global.b64 [%rd19], %rd15;", []),
    ],
)
def test_orders_are_recognised(text: str, orders: list[str]) -> None:
    assert assembly.memory_orders(text) == orders

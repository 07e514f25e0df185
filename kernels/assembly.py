"""Read what a compiler made of a kernel: how wide its accesses are, what it orders, what it needs."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import triton

_ORDERS = {
    "arrive": (
        r"\.sys\.acq_rel\.add",
        r"buffer_wbl2 sc0 sc1[^;]*?global_atomic_add_x2[^\n]*sc0 sc1\n[^;]*?buffer_inv sc0 sc1",
    ),
    "release": (
        r"\.sys\.release\.exch",
        r"fence\.(?:release|acq_rel)\.sys;[^;]*?st\.relaxed\.sys",
        r"buffer_wbl2 sc0 sc1\n(?:(?!\s*global_)[^\n]*\n)*\s*global_store_dwordx2[^\n]*sc0 sc1",
    ),
    "acquire": (
        r"\.sys\.acquire\.",
        r"ld\.relaxed\.sys[^;]*;[^;]*?fence\.(?:acquire|acq_rel)\.sys",
        r"(?s)\A(?=.*buffer_inv sc0 sc1).*global_load_dwordx2[^\n]*sc0 sc1",
    ),
}
_NVIDIA_KINDS = {
    "barrier": ("BAR", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),
    "atomic": ("ATOM", "ATOMG", "RED", "REDG"),
    "shared": ("LDS", "STS", "LDSM", "SHFL"),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "FSETP", "MUFU", "F2F", "F2FP", "HADD2", "HMUL2", "I2F"),
    "branch": ("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC"),
}


class Use(NamedTuple):
    """What a kernel needs: registers per thread, instructions that spill, stack bytes, instructions by kind."""

    registers: int
    spilled: int
    stack_bytes: int
    mix: Counter[str]


def row_widths(assembly: str) -> Iterator[tuple[str, int, str]]:
    """Every access to memory from a source line marked `# row access`: load or store, bytes, place."""
    files = {number: Path(path).name for number, path in re.findall(r"\.file\s+(\d+)[^\n]*\"([^\"\n]*)\"", assembly)}
    place, inline = "", 0  # lines of inline assembly count up from the true place, which comes first
    for line in assembly.splitlines():
        words = line.split()
        if words[:1] == [".loc"]:
            inline += inline > 0
            if inline <= 2:
                place = f"{files.get(words[1], '?')}:{words[2]}"
        elif "begin inline asm" in line:
            inline = 1
        elif "end inline asm" in line:
            inline = 0
        elif place in _row_lines():
            access = access_width(line)
            if access:
                yield (*access, place)


def access_width(line: str) -> tuple[str, int] | None:
    """Load or store, and bytes, of one instruction of PTX or AMD assembly; None if it is no access to global memory.

    >>> access_width("@%p6 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];")
    ('load', 16)
    >>> access_width("global_store_short v[0:1], v2, off"), access_width("s_waitcnt vmcnt(0)")
    (('store', 2), None)
    """
    found = re.search(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](\d+)\b", line)
    if found:
        return ("load" if found[1] == "ld" else "store"), int(found[2] or 1) * int(found[3]) // 8
    found = re.search(r"\b(?:global|buffer|flat)_(load|store)_(?:[a-z]+_)*?(dword|short|[us]?byte)(?:x(\d))?", line)
    if found:
        return found[1], {"dword": 4, "short": 2}.get(found[2], 1) * int(found[3] or 1)
    return None


def memory_orders(assembly: str) -> list[str]:
    """What is ordered at system scope: arrive (acquire and release in one), release, acquire.

    >>> memory_orders("fence.release.sys; @%p5 st.relaxed.sys.global.b64 [ %rd1 ], %rd2;")
    ['release']
    """
    return [name for name, patterns in _ORDERS.items() if any(re.search(pattern, assembly) for pattern in patterns)]


def fused_products(assembly: str) -> int:
    """Fused multiply-adds, aside from the five of which AMD makes a division.

    >>> fused_products("fma.rn.f32 %f1, %f2, %f3, %f4;")
    1
    """
    fused = len(re.findall(r"\bfma\.rn|\bv_(?:pk_|dot2?_)?(?:fma|fmac|mac|mad)_(?:mix)?f(?:16|32)", assembly))
    return fused - 5 * assembly.count("v_div_fixup_f32")


def flushes(assembly: str) -> int:
    """Operations, or on AMD whole kernels, that take subnormal numbers for zero.

    >>> flushes("add.ftz.f32 %f1, %f2, %f3;"), flushes(".amdhsa_float_denorm_mode_32 3")
    (1, 0)
    """
    modes = re.findall(r"\.amdhsa_float_denorm_mode_\w+\s+(\d)", assembly)
    return assembly.count(".ftz") + sum(mode != "3" for mode in modes)


def uses_nvidia(cubins: list[bytes], arch: str) -> list[Use]:
    """What cubins for one architecture (such as SM90) need; disassembled together, as that takes its time per call.

    Division is made of fused operations; they aside, `FFMA` counts as kind fused.
    """
    codes = [_code(cubin) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    text = _run("nvdisasm", b"".join(codes), "--binary", arch)
    opcodes: list[list[str]] = [[] for _ in cubins]
    for place, opcode in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", text):
        opcodes[bisect(ends, int(place, 16))].append(opcode)
    return [_use_nvidia(cubin, code, found) for cubin, code, found in zip(cubins, codes, opcodes, strict=True)]


def _use_nvidia(cubin: bytes, code: bytes, opcodes: list[str]) -> Use:
    assert len(opcodes) * 16 == len(code), f"{len(opcodes)} instructions of 16 bytes in {len(code)} bytes"
    usage = _run("cuobjdump", cubin, "--dump-resource-usage")
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    spilled = sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes)
    return Use(registers, spilled, stack, Counter(_kind_nvidia(opcode) for opcode in opcodes if opcode != "NOP"))


def _code(cubin: bytes) -> bytes:
    """The instructions of the only kernel in a cubin: section .text.NAME of a 64-bit little-endian ELF file."""
    assert cubin[:6] == b"\x7fELF\x02\x01", "a cubin is a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + at * size) for at in range(count)]
    named = sections[names][4]
    (found,) = (s for s in sections if cubin.startswith(b".text.", named + s[0]))
    return cubin[found[4] : found[4] + found[5]]


def _run(tool: str, content: bytes, *options: str) -> str:
    """What a tool of NVIDIA, which Triton brings along, prints about a file."""
    path = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def use_amd(assembly: str) -> Use:
    """What AMD assembly needs."""
    opcodes = re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+)", assembly, re.MULTILINE)
    vector, spilled, scalar_spilled, stack = (
        _number(rf"\.{name}:\s+(\d+)", assembly)
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return Use(vector, spilled + scalar_spilled, stack, Counter(map(_kind_amd, opcodes)))


def _kind_nvidia(opcode: str) -> str:
    head, *rest = opcode.split(".")
    if head in ("LDG", "STG"):
        return f"{head} {next((part for part in rest if part in ('64', '128', '256')), 'narrow')}"
    if head == "FFMA":
        return "fused"
    return next((kind for kind, heads in _NVIDIA_KINDS.items() if head in heads), "integer")


def _kind_amd(opcode: str) -> str:
    access = access_width(opcode)
    if access:
        head = "LDG" if access[0] == "load" else "STG"
        return f"{head} {access[1] * 8 if access[1] > 4 else 'narrow'}"
    kinds = {
        "shared": r"ds_",
        "atomic": r".*atomic",
        "barrier": r"buffer_wb|buffer_inv|s_barrier|s_waitcnt",
        "branch": r"s_cbranch|s_branch|s_endpgm",
        "fused": r"v_(pk_)?(fma|fmac|mac|mad)_(mix)?f",
        "float": r".*_f(16|32|64)",
    }
    return next((kind for kind, pattern in kinds.items() if re.match(pattern, opcode)), "integer")


@cache
def _row_lines() -> frozenset[str]:
    return frozenset(
        f"{path.name}:{number}"
        for path in Path(__file__).parent.glob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.rstrip().endswith("# row access")
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in the assembly"
    return int(found[1])

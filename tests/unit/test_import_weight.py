"""`import moecomm` is cheap: nothing heavy is loaded, nothing is started, nothing is printed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist

CHECK = """
import sys
import moecomm, moecomm.rows
import torch, torch.distributed as dist
own = ("moecomm.transport.collective", "moecomm.transport.mpi", "moecomm.fused", "moecomm.padded", "moecomm.membership")
others = ("triton", "mpi4py", "llvmlite", "numba", "matplotlib", "hypothesis")
heavy = [name for name in own + others if name in sys.modules]
assert not heavy, f"loaded: {heavy}"
assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert not (dist.is_available() and dist.is_initialized()), "a process group exists"
"""

# A step of training takes no more: not the compiler of torch either, which costs every process a second or two. What
# compiles the loops over rows is loaded by now, where it is installed: its absence above is no accident.
STEP = """
with moecomm.Buffer(num_experts=2, hidden=8, top_k=1, max_tokens_per_rank=4, dtype=torch.float32) as buffer:
    out = buffer.dispatch(torch.ones(4, 8, requires_grad=True), torch.zeros(4, 1).long(), torch.ones(4, 1))
    buffer.combine(out.x, out.handle).sum().backward()
assert "torch._dynamo" not in sys.modules, "the compiler of torch is loaded"
assert (moecomm.rows.backend() == "llvmlite") == (sys.modules.get("llvmlite") is not None), moecomm.rows.backend()
"""


def test_import_is_light_and_silent() -> None:
    result = subprocess.run([sys.executable, "-c", CHECK + STEP], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check, in this process without what is heavy, and after somebody has loaded or started something."""
    names: dict[str, tuple[str, ...]] = {}
    with pytest.raises(AssertionError, match=r"loaded: \[.*'llvmlite'"):
        exec("import llvmlite" + CHECK, names)
    for name in names["own"] + names["others"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    exec(CHECK, {})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AssertionError, match="a process group exists"):
            exec(CHECK, {})
    finally:
        dist.destroy_process_group()

"""`import moecomm` is cheap: nothing heavy is loaded, nothing is started, nothing is printed."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys
import moecomm
import torch, torch.distributed as dist
own = ("moecomm.transport.collective", "moecomm.transport.mpi", "moecomm.fused", "moecomm.padded", "moecomm.membership")
others = ("triton", "mpi4py", "llvmlite", "matplotlib", "hypothesis")
heavy = [name for name in own + others if name in sys.modules]
assert not heavy, f"loaded: {heavy}"
assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert not (dist.is_available() and dist.is_initialized()), "a process group exists"
"""

# A step of training takes no more: not the compiler of torch either, which costs every process a second or two.
STEP = """
import sys
import moecomm, torch
with moecomm.Buffer(num_experts=2, hidden=8, top_k=1, max_tokens_per_rank=4, dtype=torch.float32) as buffer:
    out = buffer.dispatch(torch.ones(4, 8, requires_grad=True), torch.zeros(4, 1).long(), torch.ones(4, 1))
    buffer.combine(out.x, out.handle).sum().backward()
assert "torch._dynamo" not in sys.modules, "the compiler of torch is loaded"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_import_is_light_and_silent() -> None:
    result = run(CHECK + STEP)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_check_can_fail() -> None:
    """The same check, after somebody else has loaded something heavy."""
    for code, complaint in (
        ("import llvmlite\n", "loaded: ['llvmlite']"),
        (
            "import torch.distributed as d\nd.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n",
            "group",
        ),
    ):
        result = run(code + CHECK)
        assert result.returncode == 1
        assert complaint in result.stderr

"""Staging: chunks go through pinned memory in order, in few slots, copies and messages at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moecomm.transport._staging import Chunk, Pipeline, Slots, StreamEngine, copy_engine, device_awareness

Step = Callable[[Chunk, Tensor], Callable[[], bool]]


class Script:
    """Steps whose jobs are done when the test says so."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.finished: set[tuple[str, int]] = set()
        self.slot_of: dict[int, int] = {}

    def step(self, name: str) -> Step:
        def begin(job: Chunk, slot: Tensor) -> Callable[[], bool]:
            self.begun.append((name, job.tag))
            assert self.slot_of.setdefault(job.tag, slot.data_ptr()) == slot.data_ptr(), "a job keeps its slot"
            return lambda: (name, job.tag) in self.finished

        return begin


def pipeline(script: Script, num_jobs: int, num_slots: int) -> Pipeline:
    jobs = [Chunk(0, tag, 1, None, torch.zeros(4, dtype=torch.uint8)) for tag in range(num_jobs)]
    slots = [torch.zeros(8, dtype=torch.uint8) for _ in range(num_slots)]
    return Pipeline(iter(jobs), slots, script.step("copy"), script.step("send"))


def test_copy_and_send_overlap_in_few_slots() -> None:
    script = Script()
    line = pipeline(script, num_jobs=3, num_slots=2)
    assert not line.advance()
    assert script.begun == [("copy", 0), ("copy", 1)], "no third slot"
    script.finished.add(("copy", 0))
    assert not line.advance()
    assert script.begun[2:] == [("send", 0)], "sent while the second is still being copied"
    script.finished.add(("send", 0))
    assert not line.advance()
    assert script.begun[3:] == [("copy", 2)], "the slot is used again as soon as its message has gone"
    assert script.slot_of[2] == script.slot_of[0] != script.slot_of[1]
    script.finished |= {("copy", 1), ("copy", 2), ("send", 1), ("send", 2)}
    line.advance()
    assert line.advance()
    assert line.num_done == 3


def test_messages_leave_in_order_whatever_order_copies_end_in() -> None:
    script = Script()
    line = pipeline(script, num_jobs=3, num_slots=3)
    line.advance()
    script.finished.add(("copy", 1))
    assert not line.advance()
    assert ("send", 1) not in script.begun, "messages between two ranks are matched by their order"
    script.finished |= {("copy", 0), ("copy", 2)}
    line.advance()
    assert [tag for name, tag in script.begun if name == "send"] == [0, 1, 2]


def test_a_pipeline_of_nothing_is_done() -> None:
    assert pipeline(Script(), num_jobs=0, num_slots=2).advance()


class HostEngine:
    """Memory of the host that plays pinned memory."""

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    mark = start = None


def test_slots_grow_with_rows_and_are_counted() -> None:
    slots = Slots(HostEngine(), chunk_bytes=100, num_slots=3)  # type: ignore[arg-type]
    assert slots.allocated_bytes == 0
    first = slots.of("send", row_bytes=10)
    assert [slot.numel() for slot in first] == [100] * 3
    assert slots.of("send", row_bytes=10) is first
    assert [slot.numel() for slot in slots.of("recv", row_bytes=1000)] == [1000] * 3
    assert slots.allocated_bytes == 3300


def test_cpu_needs_no_engine() -> None:
    assert copy_engine(torch.device("cpu")) is None


class Comm:
    """A communicator that knows about memory kinds."""

    def __init__(self, kinds: str | None) -> None:
        self.kinds = kinds

    def Get_info(self) -> Any:
        return {"mpi_memory_alloc_kinds": self.kinds} if self.kinds else {}


def test_memory_kinds_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type("MPI", (), {"__file__": None})  # a library without any query function: the interpreter itself
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", type("mpi4py", (), {"MPI": fake}))
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    aware, reason = device_awareness(Comm("system,mpi,cuda:device"), cuda)
    assert aware and "this MPI takes cuda memory as it is" in reason
    for kinds in ("system,mpi,rocm", None):
        aware, reason = device_awareness(Comm(kinds), cuda)
        assert not aware
        assert reason == (
            "this MPI does not take cuda memory (it has no MPIX_Query_cuda_support): staged through pinned host memory"
        )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_awareness(Comm("rocm"), cuda)[0], "torch calls AMD devices cuda"
    assert device_awareness(Comm(None), torch.device("cpu"))[0]


@pytest.mark.gpu
def test_stream_engine_copies_beside_the_caller() -> None:
    """Written without a GPU at hand: it has never run on one."""
    device = torch.device("cuda", torch.cuda.current_device())
    engine = StreamEngine(device)
    pinned, back = engine.host(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    assert pinned.is_pinned()
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device=device)
    packed = engine.mark()
    while not packed():
        pass
    for dst, src in ((pinned, source), (back, pinned)):
        done = engine.start(dst, src)
        while not done():
            pass
    assert torch.equal(back, source)

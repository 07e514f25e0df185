"""What comes from other ranks is unpickled without running anything that a stranger wrote."""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.blobs import dumps, loads, named_in
from moecomm.errors import ConfigError, UnsupportedError
from moecomm.group import Group, _StoreExchange
from moecomm.quant import QuantSpec
from moecomm.testing.simulated import simulate


@dataclasses.dataclass
class Ours:
    """A class of a user."""

    number: int


class Does:
    """Runs a function when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "obj",
    [
        (1, 2.5, True, None, "text", b"bytes", 1 + 2j, {3}, frozenset({4}), range(5)),
        collections.Counter("abca"),
        (torch.bfloat16, torch.Size([2, 3]), torch.device("cpu")),
        (np.float32(2.5), np.arange(4).tolist()),
        moecomm.ExpertPlacement.uniform(6, 4),
        moecomm.Topology((0, 0, 1)),
        QuantSpec.of("fp8"),
    ],
)
def test_what_ranks_tell_each_other_comes_through(obj: Any) -> None:
    assert loads(dumps(obj)) == obj


def test_arrays_tensors_and_errors_come_through() -> None:
    assert loads(dumps(np.arange(6.0).reshape(2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    for tensor in (torch.randn(3, 4).bfloat16().T, torch.tensor(7), torch.empty(0, 3), torch.tensor([1 + 2j]).conj()):
        again = loads(dumps(tensor))
        assert again.dtype == tensor.dtype and again.shape == tensor.shape and torch.equal(again, tensor.resolve_conj())
    error = loads(dumps(ConfigError("it does not fit", got=3, rank=1)))
    assert type(error) is ConfigError and error.got == 3 and "rank 1: it does not fit" in str(error)


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch pwned"),
        (eval, "open('pwned', 'w')"),
        (getattr, "text", "upper"),
        (torch.load, "pwned"),
        (torch.storage._load_from_bytes, pickle.dumps(Does(os.system, "touch pwned"))),  # as tensors do by themselves
        (simulate, print, 1),
    ],
)
def test_what_a_stranger_wrote_is_not_called(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        with pytest.raises(UnsupportedError, match="not taken from another rank"):
            loads(pickle.dumps(Does(*call), protocol=protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "blob", [b"", b"\x80", b"garbage", Random(7).randbytes(100), b"cmoecomm.blobs\nio.open\n(S'pwned'\nS'w'\ntR."]
)
def test_bytes_that_are_no_object_are_refused(blob: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedError):
        loads(blob)
    assert not list(tmp_path.iterdir())


def test_a_class_is_taken_from_who_sends_it_as_well() -> None:
    mine, theirs = dumps([Ours(1)]), dumps([Ours(2)])
    assert loads(theirs, named_in(mine)) == [Ours(2)]
    with pytest.raises(UnsupportedError, match=r"got tests.unit.test_blobs.Ours"):
        loads(theirs)


def test_who_writes_to_the_store_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store: Any = dist.HashStore()
    group = Group(rank=0, size=2, exchange=_StoreExchange(store, 0, 2))
    attack = Does(os.system, "touch pwned")
    for number, blob in enumerate((pickle.dumps(attack), pickle.dumps(("roll call", pickle.dumps(attack))))):
        store.set(f"moecomm/{number}/came/1", blob)
        store.set(f"moecomm/{number}/left/1", b"1")
        with pytest.raises(UnsupportedError, match=r"not taken from another rank: got (posix|nt)\.system"):
            group.all_gather_object(0, timeout_s=20.0, operation="roll call")
    assert not list(tmp_path.iterdir())

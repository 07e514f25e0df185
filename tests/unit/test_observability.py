"""What is going on can be seen: phases and bytes in a profile, counters as Prometheus text, heat maps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import moecomm
from moecomm import viz
from moecomm.metrics import Stats


def a_buffer() -> moecomm.Buffer:
    return moecomm.Buffer(num_experts=4, hidden=6, top_k=2, max_tokens_per_rank=8, dtype=torch.float32)


def test_phases_and_bytes_are_in_a_profile(tmp_path: Path) -> None:
    x, idx = torch.randn(8, 6), torch.randn(8, 4).topk(2).indices
    with a_buffer() as buffer:
        buffer.combine((out := buffer.dispatch(x, idx)).x, out.handle)  # not profiled: its bytes must not show
        before = buffer.stats()
        with profile() as trace:
            buffer.combine((out := buffer.dispatch(x, idx)).x, out.handle)
        after = buffer.stats()
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if str(event.get("name", "")).startswith("moecomm::")]
    assert {f"moecomm::{phase}" for phase in ("plan", "counts", "send", "wait", "arrange")} <= set(names)
    told = [re.fullmatch(r"moecomm::bytes local=(\d+) remote=(\d+)", name) for name in names]
    local = sum(int(match[1]) for match in told if match)
    assert local == after["bytes_local"] - before["bytes_local"] > 0
    sends = [event for event in events if event.get("name") == "moecomm::send"]
    inner = [event for event in events if str(event.get("name", "")).startswith("moecomm::bytes")]
    assert len(sends) == len(inner) == 2
    for send, sent in zip(sends, inner, strict=True):
        assert send["ts"] <= sent["ts"] and sent["ts"] + sent["dur"] <= send["ts"] + send["dur"]


def test_nothing_is_recorded_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecomm.core.record_function", None)
    with a_buffer() as buffer:
        buffer.dispatch(torch.randn(8, 6), torch.randn(8, 4).topk(2).indices)


def test_stats_speak_prometheus() -> None:
    with a_buffer() as buffer:
        buffer.dispatch(torch.randn(8, 6), torch.randn(8, 4).topk(2).indices)
        stats = buffer.stats()
    assert stats["dispatches"] == 1
    lines = stats.prometheus(rank=3).splitlines()
    sample = re.compile(r'[a-z_]+\{rank="3"(,index="\d+")?\} [0-9.e+-]+')
    kind = re.compile(r"# TYPE [a-z_]+ (counter|gauge)")
    assert all(sample.fullmatch(line) or kind.fullmatch(line) for line in lines), lines
    assert 'moecomm_dispatches_total{rank="3"} 1' in lines
    assert any(line.startswith('moecomm_wait_seconds_total{rank="3"} ') for line in lines)


def test_tensors_and_odd_labels() -> None:
    text = Stats(wait_of_peer_s=torch.tensor([0.5, 2.0])).prometheus(job='a "b"\\')
    assert 'moecomm_wait_of_peer_seconds_total{job="a \\"b\\"\\\\",index="1"} 2' in text


def test_heat_maps(tmp_path: Path) -> None:
    idx = torch.tensor([[0, 1], [0, 2], [0, -1]])
    with a_buffer() as buffer:
        load, traffic = viz.gather_load(buffer, idx), viz.gather_traffic(buffer, idx)
    assert load.tolist() == [3, 1, 1, 0] and traffic.tolist() == [[3]]
    figure = viz.expert_load(load)
    figure.savefig(tmp_path / "load.png")
    assert "worst 2.40" in figure.axes[0].get_title() and (tmp_path / "load.png").stat().st_size > 3000
    viz.peer_traffic(torch.arange(16).view(4, 4), row_bytes=100).savefig(tmp_path / "traffic.png")
    with pytest.raises(moecomm.ConfigError, match=r"rows is no square table: got \(2, 3\); expected \(W, W\)"):
        viz.peer_traffic(torch.zeros(2, 3))
    with pytest.raises(moecomm.ConfigError, match="load is no table of counts"):
        viz.expert_load(torch.zeros(0))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(moecomm.UnsupportedError, match=r"heat maps need matplotlib: .*pip install 'moecomm\[viz\]'"):
        viz.expert_load(torch.ones(3))

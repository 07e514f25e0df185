"""The ways to dispatch and combine that are timed against each other, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moecomm
from bench.baseline import baseline_combine, baseline_dispatch
from bench.case import Case, check_combine, check_dispatch, decoded
from bench.memory import PeakMemory
from bench.options import Setting
from bench.ranks import Ranks
from bench.show import note

Rows = Tensor | tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class Path:
    """One way: dispatch() gives (rows, what combine needs besides), combine(outputs, that) gives (T, H).

    Quantised rows are a pair, codes and scales.
    name, transport: as in `Measurement`. stats: counters of the buffer, if it is ours. gate, peak_memory_bytes: what
    `check` found out. is_peer: another library's, left out if it fails.
    """

    name: str
    transport: str = ""
    dispatch: Callable[[], tuple[Rows, Any]]
    combine: Callable[[Tensor, Any], Tensor]
    stats: Callable[[], dict[str, Any]] | None = None
    gate: str = ""
    peak_memory_bytes: int | None = None
    is_peer: bool = False
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def label(self) -> str:
        """Name and transport: what tells it from the others of a run."""
        return f"{self.name} {self.transport}".rstrip()


def make_buffer(setting: Setting, ranks: Ranks, transport: str, **more: Any) -> moecomm.Buffer:
    """A buffer for this setting, on what its transport stands on."""
    return moecomm.Buffer(
        ranks.group_for(transport),
        num_experts=setting.experts,
        hidden=setting.hidden,
        top_k=setting.top_k,
        max_tokens_per_rank=max(setting.tokens, 1),
        dtype=setting.dtype,
        transport=transport,
        reduce=setting.reduce,
        device=ranks.device,
        **more,
    )


def moecomm_path(setting: Setting, case: Case, buffer: moecomm.Buffer) -> Path:
    """Ours, over one buffer."""

    def dispatch() -> tuple[Rows, moecomm.Dispatched]:
        out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=setting.layout, quant=setting.quant)
        return out.x, out

    def combine(outputs: Tensor, out: moecomm.Dispatched) -> Tensor:
        return buffer.combine(outputs, out.handle)

    return Path(name="moecomm", transport=buffer.transport, dispatch=dispatch, combine=combine, stats=buffer.stats)


def baseline_path(setting: Setting, case: Case, comm: Any = None) -> Path:
    """The frameworks' path over `all_to_all_single`, or over MPI's `Alltoallv`."""
    return Path(
        name="baseline" if comm is None else "baseline mpi",
        dispatch=partial(baseline_dispatch, case.x, case.topk_idx, setting.experts, comm),
        combine=lambda outputs, routing: baseline_combine(outputs, case.topk_weights_TK, routing),
    )


def why_no_baseline(setting: Setting, ranks: Ranks) -> str:
    """Why the frameworks' path cannot run this setting, or nothing."""
    if setting.layout != "expert":
        return f"the frameworks' path has no layout {setting.layout!r}"
    if setting.quant:
        return "the frameworks' path sends rows as they are"
    if setting.experts % ranks.world:
        return f"the frameworks' path needs as many experts on every rank; {setting.experts} on {ranks.world} are not"
    if ranks.shares_device:
        return "NCCL refuses ranks that share a GPU"
    return ""


def make_paths(setting: Setting, ranks: Ranks, case: Case, stack: ExitStack) -> list[Path]:
    """Ours on every transport that was asked for, and the baselines that can run; buffers close with the stack."""
    paths = []
    for transport in setting.transports:
        buffer = stack.enter_context(make_buffer(setting, ranks, transport))
        paths.append(moecomm_path(setting, case, buffer))
    if not why_no_baseline(setting, ranks):
        paths.append(baseline_path(setting, case))
        if ranks.comm is not None and ranks.device.type == "cpu":
            paths.append(baseline_path(setting, case, ranks.comm))
    return paths


def check_paths(setting: Setting, ranks: Ranks, case: Case, paths: Sequence[Path]) -> list[Path]:
    """Run every path once: the right rows come, the right sums come back; note memory, keep outputs for combine.

    Returns:
        The paths, without those of other libraries that failed.

    Raises:
        AssertionError: a path is wrong.
    """
    placement = moecomm.ExpertPlacement.uniform(setting.experts, ranks.world)
    kept = [path for path in paths if passes(path, ranks, lambda path: _check(setting, ranks, case, placement, path))]
    for path in kept[1:]:  # they are all the same
        if torch.equal(path.outputs, kept[0].outputs):
            path.outputs = kept[0].outputs
    return kept


def passes(path: Path, ranks: Ranks, check: Callable[[Path], None]) -> bool:
    """Check a path and note its memory; False, on all ranks, if it is another library's and fails on one."""
    failure = ""
    with PeakMemory(ranks.device) as peak:
        try:
            check(path)
        except Exception as error:
            if not path.is_peer:
                raise
            failure = f"{type(error).__name__}: {error}"
    failures = [told for told in ranks.all_gather(failure) if told] if path.is_peer else []
    if failures:
        note(ranks.rank, f"no {path.name}: {failures[0]}")
    path.peak_memory_bytes = max(ranks.all_gather(peak.bytes))
    return not failures


def _check(setting: Setting, ranks: Ranks, case: Case, placement: moecomm.ExpertPlacement, path: Path) -> None:
    rows, home = path.dispatch()
    path.outputs = _outputs(setting, case, placement, path, decoded(rows, setting), home)
    check_combine(case, path.combine(path.outputs, home), path.label)
    exact = f"dispatch {'as the reference quantises' if setting.quant else 'bit for bit'}, "
    path.gate = exact * (setting.layout == "expert") + "combine within 4 roundings of float64"


def _outputs(
    setting: Setting, case: Case, placement: moecomm.ExpertPlacement, path: Path, rows: Tensor, home: Any
) -> Tensor:
    """What the experts make of the rows; in layout "rank" already weighted and summed over this rank's experts."""
    if setting.layout == "expert":
        experts = check_dispatch(case, rows, placement, path.label)
        return rows * case.expert_scale_E[experts][:, None]
    assert home.topk_idx is not None and home.topk_weights is not None  # of ours, and of DeepEP's
    here = placement.experts_of_rank[case.rank]
    scales = case.expert_scale_E[(home.topk_idx + (here[0] if here else 0)).clamp(min=0).long()]
    outputs = torch.empty_like(rows)
    for part in torch.arange(len(outputs), device=rows.device).split(128):
        terms = (rows[part][:, None] * scales[part][..., None]).float() * home.topk_weights[part][..., None]
        outputs[part] = terms.sum(1).to(rows.dtype)
    return outputs

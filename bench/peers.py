"""Other libraries beside ours, where they are installed and can run; else a note says why not.

torch's symmetric memory: `all_to_all_vdev_2d` there and `all_to_all_vdev_2d_offset` back, with splits that never leave
the GPU (torch.distributed._symmetric_memory, operations `torch.ops.symm_mem`). DeepEP: `deep_ep.Buffer` as its README
uses it, the normal mode against our layout "rank", the low-latency mode against "padded". Both move rows between GPUs.
Their results are checked as ours are; one that fails is left out with its error, since it is not what is measured here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bench.baseline import weighted_sum
from bench.case import Case
from bench.options import Setting
from bench.paths import Path, why_no_baseline
from bench.ranks import Ranks
from bench.show import note

_DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
_LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
_noted: set[str] = set()


class Peer(NamedTuple):
    """Another library. why_not: why it cannot run a setting, or nothing. make: its path; collective."""

    name: str
    why_not: Callable[[Setting, Ranks], str]
    make: Callable[[Setting, Ranks, Case], Path]


class Arrived(NamedTuple):
    """What DeepEP gives beside rows of layout "rank": its handle, (N, K) local expert ids or -1, (N, K) weights."""

    handle: Any
    topk_idx: Tensor
    topk_weights: Tensor


def peer_paths(setting: Setting, ranks: Ranks, case: Case, peers: tuple[Peer, ...]) -> list[Path]:
    """The paths of those that can run; of the others one rank says why not, once."""
    paths = []
    for peer in peers:
        reason, path = peer.why_not(setting, ranks), None
        if not reason:
            try:
                path = peer.make(setting, ranks, case)
            except Exception as error:  # what another library raises is no failure of this benchmark
                reason = f"{type(error).__name__}: {error}"
        reasons = [told for told in ranks.all_gather(reason) if told]
        if path is not None and not reasons:
            paths.append(path)
        elif (text := f"no {peer.name}: {(reasons or [reason])[0]}") not in _noted:
            _noted.add(text)
            note(ranks.rank, text)
    return paths


def _no_gpus(ranks: Ranks) -> str:
    """Why nothing that moves rows between GPUs can run, or nothing."""
    if ranks.device.type != "cuda":
        return "it moves rows between GPUs"
    return "its ranks cannot share a GPU" if ranks.shares_device else ""


def why_no_vdev(setting: Setting, ranks: Ranks) -> str:
    """Why torch's all-to-all in symmetric memory cannot run a setting, or nothing."""
    if reason := _no_gpus(ranks) or why_no_baseline(setting, ranks):
        return reason
    if ranks.world == 1:
        return "one rank has nobody to send to"
    import torch.distributed._symmetric_memory as symmetric

    if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d"):
        return f"torch {torch.__version__} does not have it"
    if not symmetric.is_nvshmem_available():
        return "NVSHMEM is not installed"
    if symmetric.get_backend(ranks.device) != "NVSHMEM":
        return "torch's symmetric memory has another backend: set TORCH_SYMMMEM=NVSHMEM"
    return ""


class _Vdev:
    """Sorted rows go out of symmetric memory and come home to it."""

    def __init__(self, setting: Setting, ranks: Ranks, case: Case) -> None:
        import torch.distributed._symmetric_memory as symmetric

        world = dist.group.WORLD
        assert world is not None, "asked for more than one rank"
        self._case, self._experts, self._name = case, setting.experts, world.group_name
        self._choices = case.topk_idx.numel()
        per_expert = sum(torch.bincount(ids.reshape(-1), minlength=setting.experts) for ids in case.topk_idx_of_rank)
        assert isinstance(per_expert, Tensor)
        arrive = per_expert.view(ranks.world, -1).sum(1)
        self._arrive = int(arrive[ranks.rank])
        most = max(self._choices, int(arrive.max()))  # symmetric memory is as large on every rank

        def make(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            made = symmetric.empty(*shape, dtype=dtype, device=ranks.device)
            symmetric.rendezvous(made, world)
            return made

        rows = [make(most, setting.hidden, dtype=setting.dtype) for _ in range(4)]
        self._sent, self._arrived, self._outputs, self._home = rows
        self._splits, self._out, self._back = make(setting.experts), make(2, setting.experts), make(2, setting.experts)

    def dispatch(self) -> tuple[Tensor, Tensor]:
        """Rows by local expert, then source rank; and the sort of the entries."""
        x, experts = self._case.x, self._case.topk_idx.reshape(-1)
        order = torch.argsort(experts, stable=True)
        torch.index_select(x, 0, order // self._case.topk_idx.shape[1], out=self._sent[: self._choices])
        self._splits.zero_().scatter_add_(0, experts, torch.ones_like(experts))
        torch.ops.symm_mem.all_to_all_vdev_2d(self._sent, self._arrived, self._splits, self._out, self._name)
        return self._arrived[: self._arrive], order

    def combine(self, outputs: Tensor, order: Tensor) -> Tensor:
        """Bring outputs home, and sum the weighted rows of each token."""
        self._outputs[: self._arrive].copy_(outputs)
        torch.ops.symm_mem.all_to_all_vdev_2d_offset(self._outputs, self._home, self._out, self._back, self._name)
        return weighted_sum(self._home[: self._choices], order, self._case.topk_weights_TK)


def vdev_path(setting: Setting, ranks: Ranks, case: Case) -> Path:
    """torch's all-to-all in symmetric memory."""
    exchange = _Vdev(setting, ranks, case)
    return Path(name="torch vdev_2d", dispatch=exchange.dispatch, combine=exchange.combine, is_peer=True)


def _why_no_deep_ep(setting: Setting, ranks: Ranks) -> str:
    if importlib.util.find_spec("deep_ep") is None:
        return "deep_ep is not installed"
    if reason := _no_gpus(ranks):
        return reason
    if ranks.world not in _DEEP_EP_RANKS:
        return f"it has no setting for {ranks.world} ranks"
    if setting.quant or setting.dtype != torch.bfloat16:
        return "it is timed with rows of bfloat16 as they are"
    return ""


def why_no_deep_ep(setting: Setting, ranks: Ranks) -> str:
    """Why the normal mode of DeepEP cannot run a setting, or nothing."""
    if setting.layout != "rank":
        return "it brings one row per token and rank: compare it with --layout rank"
    return _why_no_deep_ep(setting, ranks)


def deep_ep_path(setting: Setting, ranks: Ranks, case: Case) -> Path:
    """The normal mode of DeepEP, layout pass included."""
    deep_ep: Any = importlib.import_module("deep_ep")
    configs = [make(ranks.world) for make in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config)]
    nvl = max(config.get_nvl_buffer_size_hint(setting.row_bytes, ranks.world) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(setting.row_bytes, ranks.world) for config in configs)
    buffer = deep_ep.Buffer(dist.group.WORLD, nvl, rdma if ranks.world > ranks.local_world else 0)
    ids = case.topk_idx.to(getattr(deep_ep, "topk_idx_t", torch.int64))

    def dispatch() -> tuple[Tensor, Arrived]:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, setting.experts)
        rows, topk_idx, topk_weights, _, handle, _ = buffer.dispatch(
            case.x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=case.topk_weights_TK,
        )
        return rows, Arrived(handle, topk_idx, topk_weights)

    def combine(outputs: Tensor, home: Arrived) -> Tensor:
        y: Tensor = buffer.combine(outputs, home.handle)[0]
        return y

    return Path(name="DeepEP", dispatch=dispatch, combine=combine, is_peer=True)


def why_no_low_latency(setting: Setting, ranks: Ranks) -> str:
    """Why the low-latency mode of DeepEP cannot run a setting, or nothing."""
    if reason := _why_no_deep_ep(setting, ranks):
        return reason
    if setting.hidden not in _LOW_LATENCY_HIDDEN:
        return f"its low-latency mode has no H {setting.hidden}"
    return f"it wants as many experts on all {ranks.world} ranks" if setting.experts % ranks.world else ""


def low_latency_path(setting: Setting, ranks: Ranks, case: Case) -> Path:
    """The low-latency mode of DeepEP, rows as they are."""
    deep_ep: Any = importlib.import_module("deep_ep")
    most = max(1, setting.tokens)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, setting.hidden, ranks.world, setting.experts)
    buffer = deep_ep.Buffer(
        dist.group.WORLD, 0, size, low_latency_mode=True, num_qps_per_rank=setting.experts // ranks.world
    )
    ids = case.topk_idx.to(getattr(deep_ep, "topk_idx_t", torch.int64))

    def dispatch() -> tuple[Tensor, Any]:
        rows, _, handle, _, _ = buffer.low_latency_dispatch(case.x, ids, most, setting.experts, use_fp8=False)
        return rows, handle

    def combine(outputs: Tensor, handle: Any) -> Tensor:
        y: Tensor = buffer.low_latency_combine(outputs, ids, case.topk_weights_TK, handle)[0]
        return y

    return Path(name="DeepEP low latency", dispatch=dispatch, combine=combine, is_peer=True)


PEERS = (Peer("torch vdev_2d", why_no_vdev, vdev_path), Peer("DeepEP", why_no_deep_ep, deep_ep_path))
DECODE_PEERS = (Peer("DeepEP low latency", why_no_low_latency, low_latency_path),)

"""The experts modules of a model: finding them, refusing what cannot be spread by name, cutting and saving weights."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecomm import UnsupportedError
from moecomm.nn.sharded import ShardedExperts, Sharding

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLAGS = ("num_experts", "has_gate", "is_transposed", "_is_expert_parallel")
_WANTED = (
    'a module called "experts", or with the flags that transformers gives one, with a number `num_experts`, stacked '
    "weights of shape (num_experts, ...) and a forward of three arguments: tokens, (T, K) expert ids, (T, K) weights"
)


def find_experts(model: nn.Module, rank: int) -> dict[str, nn.Module]:
    """The experts modules of a model by name.

    Raises:
        UnsupportedError: there is none, or one that cannot be spread: its name, and what was looked for.

    >>> find_experts(nn.Sequential(nn.ReLU()), rank=0)
    Traceback (most recent call last):
    ...
    moecomm.errors.UnsupportedError: rank 0: Sequential has no experts that can be spread: got no module ...
    """
    named = dict(model.named_modules())
    found = {name: module for name, module in named.items() if _is_candidate(name, module)}
    for name, module in found.items():
        reason = _why_not(module)
        if reason is not None:
            what, got = f"{name} ({type(module).__name__}) cannot be spread over ranks", reason
            raise UnsupportedError(what, got=got, expected=_WANTED, rank=rank)
    if not found:
        similar = [f"{name} ({type(m).__name__})" for name, m in named.items() if _sounds_like_experts(name, m)]
        got = f"modules such as {', '.join(similar[:3])}" if similar else "no module that is called after experts"
        what = f"{type(model).__name__} has no experts that can be spread"
        raise UnsupportedError(what, got=got, expected=_WANTED, rank=rank)
    _refuse_ties(model, found, rank)
    return found


def _is_candidate(name: str, module: nn.Module) -> bool:
    return name.split(".")[-1] == "experts" or all(hasattr(module, flag) for flag in _FLAGS)


def _sounds_like_experts(name: str, module: nn.Module) -> bool:
    return re.search("expert|moe", f"{name.split('.')[-1]} {type(module).__name__}", re.IGNORECASE) is not None


def _why_not(experts: nn.Module) -> str | None:
    """Why a module cannot be spread, or None."""
    own = dict(experts.named_parameters(recurse=False))
    every = dict(experts.named_parameters())
    num_experts = getattr(experts, "num_experts", None)
    if isinstance(experts, ShardedExperts) or getattr(experts, "_is_expert_parallel", False):
        return "one that is expert-parallel already"
    if any(hasattr(parameter, "placements") for parameter in every.values()) or hasattr(experts, "_get_fsdp_state"):
        return "one that is parallelised already: its weights are DTensors"
    if "forward" in vars(experts):
        return "one whose forward has been replaced (by tensor parallelism, offloading or another wrapper)"
    config = getattr(experts, "config", None)
    if getattr(config, "_experts_implementation", None) == "deepgemm_megamoe":
        return 'experts_implementation="deepgemm_megamoe", which exchanges tokens itself'
    for key, tensor in (*every.items(), *experts.named_buffers()):
        if type(tensor.data) is not Tensor or (key in every and tensor.dtype not in _FLOATS):
            kind = "weights of another dtype" if tensor.dtype == torch.float64 else "quantised weights"
            return f"{kind}: {key} is a {type(tensor.data).__name__} of {tensor.dtype}, not one of {_FLOATS}"
    if not isinstance(num_experts, int) or not own:
        return f"num_experts={num_experts!r} and {len(own)} weights of its own"
    shapes = {key: tuple(parameter.shape) for key, parameter in every.items()}
    odd = [f"{key} {shape}" for key, shape in shapes.items() if key not in own or shape[:1] != (num_experts,)]
    if odd:
        return f"num_experts={num_experts} and weights that are not one per expert: {', '.join(odd[:3])}"
    signature = inspect.signature(experts.forward)
    takes = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return None if len(takes) == 3 else f"forward{signature}"


def _refuse_ties(model: nn.Module, found: dict[str, nn.Module], rank: int) -> None:
    """Weights that experts modules share stay shared; those of an expert and something else cannot."""
    first_at: dict[Any, tuple[str, nn.Parameter, bool]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = any(module is experts for experts in found.values())
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.numel():
                this = f"{prefix}.{key}", parameter, inside
                on_meta = parameter.device.type == "meta"
                place = id(parameter) if on_meta else (parameter.device, parameter.data_ptr())
                first = first_at.setdefault(place, this)
                if (first[2] or inside) and (first[1] is not parameter or first[2] != inside):
                    what, got = f"{first[0]} and {this[0]} are tied", "one memory for both"
                    expected = "expert weights that are tied to no others"
                    raise UnsupportedError(what, got=got, expected=expected, remedy="clone one of them", rank=rank)


def keep_local(experts: nn.Module, expert_ids: Sequence[int], cut: dict[nn.Parameter, nn.Parameter | None]) -> None:
    """Cut the weights to some experts, in memory of their own.

    Args:
        experts: whose parameters all have the experts as first dimension.
        expert_ids: what to keep, in this order.
        cut: what has become of the parameters that several modules share, so that they go on sharing; added to.

    >>> module = nn.Linear(2, 4, bias=False)
    >>> keep_local(module, [3, 1], {})
    >>> module.weight.shape
    torch.Size([2, 2])
    """
    for key, parameter in list(experts.named_parameters(recurse=False)):
        local = cut.get(parameter)
        if local is None:
            local = nn.Parameter(parameter.detach()[list(expert_ids)], requires_grad=parameter.requires_grad)
            local.__dict__.update(parameter.__dict__)
        if parameter in cut:
            cut[parameter] = local
        experts.register_parameter(key, local)


def shared_parameters(found: dict[str, nn.Module]) -> dict[nn.Parameter, nn.Parameter | None]:
    """The parameters that more than one of the modules has, as `keep_local` takes them.

    >>> one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> other.weight = one.weight
    >>> len(shared_parameters({"a": one, "b": other})), len(shared_parameters({"a": one}))
    (1, 0)
    """
    every = [parameter for module in found.values() for parameter in module.parameters()]
    return {parameter: None for parameter, times in Counter(every).items() if times > 1}


class GatheredExperts(ShardedExperts):
    """Experts of one rank whose state dict holds those of all, so that it fits any number of ranks."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # the parameters themselves are wanted
            return
        keys = [prefix + key for key, _ in self.named_parameters(recurse=False)]
        if not any(destination[key].is_meta for key in keys):
            timeout_s = self.sharding.exchange.timeout_s
            self.sharding.exchange.group.barrier(timeout_s=timeout_s, operation="state_dict")
        for key in keys:
            destination[key] = _gather(destination[key], self.sharding)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        num_experts, ids = self.sharding.placement.num_experts, list(self.sharding.expert_ids)
        for key, _ in self.named_parameters(recurse=False):
            whole = state_dict.get(prefix + key)
            if whole is not None and whole.shape[:1] == (num_experts,):
                state_dict[prefix + key] = whole[ids]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _gather(local: Tensor, sharding: Sharding) -> Tensor:
    """The (E, ...) weights of all ranks in order of global expert id."""
    group, placement = sharding.exchange.group, sharding.placement
    whole = local.new_empty(placement.num_experts, *local.shape[1:])
    if local.is_meta:
        return whole
    parts = group.all_gather_object(local.cpu(), operation="state_dict") if group.mpi_comm is not None else None
    for rank, ids in enumerate(placement.experts_of_rank):
        if ids:
            part = local if rank == group.rank else local.new_empty(len(ids), *local.shape[1:])
            if parts is not None:
                part = parts[rank].to(local.device)
            elif group.size > 1:
                dist.broadcast(part, group=group.process_group, group_src=rank)
            whole[list(ids)] = part
    return whole

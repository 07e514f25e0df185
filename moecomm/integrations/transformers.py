"""Expert parallelism for mixture-of-experts models of Hugging Face `transformers`, version 5.23 or later.

Two ways in: `register` for models that `from_pretrained` is about to load and distribute, `expert_parallel` for a model
that is already built. In both, only the forward of the experts modules changes: router, shared experts, dropped tokens
and the normalisation of weights stay the model's own. See docs/huggingface.md.

Legend: T tokens of this rank, H hidden, E experts in all, L experts of this rank, K top-k, W ranks.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecomm import ConfigError, ExpertPlacement, UnsupportedError
from moecomm.integrations.experts import GatheredExperts, find_experts, keep_local, shared_parameters
from moecomm.nn.exchange import ExpertExchange, check_options
from moecomm.nn.sharded import Sharding, run_experts, shard_experts

__all__ = ["clip_grad_norm_", "expert_parallel", "register"]

Model = TypeVar("Model", bound=nn.Module)


def expert_parallel(
    model: Model, group: object = None, *, replicated: bool = False, average_gradients: bool = True, **options: Any
) -> Model:
    """Spread the experts of a built model over the ranks of a group; changes and returns the model. Collective.

    Each rank keeps its own experts and forgets the others. Afterwards every forward and backward is collective, also
    for a rank without tokens. Call it before the optimizer is made. On the meta device nothing is materialised: what
    is later (`to_empty`, `load_state_dict(assign=True)`) are the local experts only.

    `state_dict()` is collective and gives the whole weights, as the unsharded model's does, so `save_pretrained` works
    too; `load_state_dict()` takes whole or local ones. `DistributedDataParallel` leaves the experts alone.

    Gradients: those of the experts' weights are of the mean over the ranks' losses, as DDP and FSDP make all others.
    So they are those of the unsharded model both for a batch that is spread over the ranks, once the other parameters'
    gradients are averaged over the ranks, and for a batch that all ranks have.

    Args:
        model: all its experts modules follow the contract of transformers 5: stacked weights, and a forward of tokens,
            (T, K) expert ids and (T, K) weights. At least Mixtral, Qwen3-MoE, DeepSeek-V3, OLMoE and gpt-oss do.
        group: as of Buffer.
        replicated: all ranks always have the same batch: each token then is computed once in all and not once per rank.
        average_gradients: False: the gradient of the sum of the losses.
        options: of Buffer, except those that follow from the model. Without max_tokens_per_rank the buffer grows as
            needed, see `moecomm.nn.ExpertExchange`.

    Raises:
        UnsupportedError: the model is not understood, parallelised or quantised already, or ties expert weights to
            others: the module's name, and what was looked for.
        ConfigError: no option of Buffer, or a placement for another number of experts or ranks.

    >>> import torch, moecomm.testing
    >>> model = nn.Linear(2, 2)
    >>> expert_parallel(model)
    Traceback (most recent call last):
    ...
    moecomm.errors.UnsupportedError: rank 0: Linear has no experts that can be spread: got no module ...
    """
    check_options(options)
    given = options.pop("placement", None)
    exchange = ExpertExchange(group, **options)
    rank = exchange.group.rank
    if replicated:
        if exchange.group.size > 1 and exchange.group.process_group is None:
            what, remedy = "replicated=True needs a torch.distributed process group", "leave it out: results are equal"
            raise UnsupportedError(what, got=group, remedy=remedy, rank=rank)
        exchange = ExpertExchange(group, replicated_over=exchange.group.process_group, **options)
    found = find_experts(model, rank)
    placements = {name: _placement(name, experts, given, exchange) for name, experts in found.items()}
    factor = 1 / exchange.batches if average_gradients else 1.0
    cut = shared_parameters(found)
    for name, experts in found.items():
        sharding = Sharding(exchange, placements[name], factor)
        keep_local(experts, sharding.expert_ids, cut)
        shard_experts(experts, sharding, GatheredExperts)
    _tell_others(model, exchange, list(found), replicated)
    return model


def _placement(name: str, experts: Any, given: Any, exchange: ExpertExchange) -> ExpertPlacement:
    num_experts, size, rank = experts.num_experts, exchange.group.size, exchange.group.rank
    if given is None:
        return ExpertPlacement.uniform(num_experts, size)
    placement = given if isinstance(given, ExpertPlacement) else ExpertPlacement.explicit(given)
    if (placement.num_experts, placement.num_ranks) != (num_experts, size):
        raise ConfigError(
            f"placement does not fit {name}",
            got=f"one for {placement.num_experts} experts on {placement.num_ranks} ranks",
            expected=f"{num_experts} experts on {size} ranks",
            remedy="list every expert of the model once, and a list for every rank",
            rank=rank,
        )
    return placement


def _tell_others(model: Any, exchange: ExpertExchange, found: list[str], replicated: bool) -> None:
    """Tell DDP to leave the experts alone, and generate() that a rank that is done must go on with the others."""
    names = [f"{name}.{key}" for name in found for key, _ in model.get_submodule(name).named_parameters()]
    model._ddp_params_and_buffers_to_ignore = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    everybody = dist.is_available() and dist.is_initialized() and dist.get_world_size() == exchange.group.size
    if everybody and exchange.group.size > 1 and not replicated:
        model._is_fsdp_managed_module = True  # what generate() looks at to set its default of synced_gpus


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients of a model that `expert_parallel` has spread by the norm of all of them. Collective.

    `torch.nn.utils.clip_grad_norm_` would see this rank's experts only, and scale each rank's copy of the other weights
    by another factor.

    Args:
        model: whose gradients are there, those of all but the experts averaged over the ranks.
        max_norm: what their 2-norm, over all experts and once over everything else, is to be at most.

    Returns:
        () the norm before, the same on all ranks.

    Raises:
        UnsupportedError: `expert_parallel` has not spread the model.

    >>> clip_grad_norm_(nn.Linear(2, 2), 1.0)
    Traceback (most recent call last):
    ...
    moecomm.errors.UnsupportedError: Linear has no experts that expert_parallel has spread: use ...
    """
    spread = [module for module in model.modules() if isinstance(module, GatheredExperts)]
    if not spread:
        what, remedy = "has no experts that expert_parallel has spread", "use torch.nn.utils.clip_grad_norm_"
        raise UnsupportedError(f"{type(model).__name__} {what}", remedy=remedy)
    parameters = [p for p in model.parameters() if p.grad is not None]
    of_experts = {id(p) for experts in spread for p in experts.parameters(recurse=False)}
    here = torch.nn.utils.get_total_norm([p.grad for p in parameters if id(p) in of_experts and p.grad is not None])
    rest = torch.nn.utils.get_total_norm([p.grad for p in parameters if id(p) not in of_experts and p.grad is not None])
    exchange = spread[0].sharding.exchange
    told = exchange.group.all_gather_object(float(here), timeout_s=exchange.timeout_s, operation="clip_grad_norm_")
    norm = torch.linalg.vector_norm(torch.tensor([float(rest), *told], device=rest.device))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# -- from_pretrained(distributed_config=...) -------------------------------------------------------------------------


def register(name: str = "moecomm", **options: Any) -> None:
    """Make moecomm an `ep_implementation` of transformers.

    Afterwards `from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=4, ep_size=4,
    ep_implementation="moecomm"))` loads each rank's experts only and exchanges tokens through moecomm; FSDP, tensor
    parallelism and saving are transformers' own. Gradients are scaled by FSDP as transformers asks it to.

    Args:
        name: what `ep_implementation` is called.
        options: of Buffer, except those that follow from the model. Without max_tokens_per_rank the buffer grows as
            needed, see `moecomm.nn.ExpertExchange`.

    Raises:
        UnsupportedError: transformers is not installed, or too old; a placement was given.
        ConfigError: no option of Buffer, or one that follows from the model.

    >>> register("moecomm-source", placement=[[0]])
    Traceback (most recent call last):
    ...
    moecomm.errors.UnsupportedError: placement cannot be chosen here: got placement=[[0]]; leave it out
    """
    check_options(options, without=("placement",))
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError as error:
        what, remedy = "transformers has no expert-parallel implementations here", "pip install 'moecomm[hf]'"
        raise UnsupportedError(what, got=str(error), expected="version 5.23 or later", remedy=remedy) from error
    EPImplementationInterface.register(name, functools.partial(EPImplementation, options=options))


class EPImplementation:
    """What transformers makes for each experts module; not to be made by hand.

    Args:
        experts: whose weights transformers has cut to this rank's.
        ep_mesh: the ranks that share the experts, in contiguous blocks.
        tp_mesh: those of them that have the same tokens.
        options: of Buffer.

    >>> EPImplementation.needs_shared_batch
    False
    """

    needs_shared_batch = False

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any, options: dict[str, Any]) -> None:
        self._experts, self._forward = experts, experts.forward
        self._exchange = _shared_exchange(ep_mesh.get_group(), tp_mesh.get_group(), options)
        num_experts: Any = experts.num_experts
        self._placement = ExpertPlacement.uniform(num_experts * ep_mesh.size(), ep_mesh.size())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Give the (T, H) outputs of (T, H) tokens routed to (T, K) global expert ids with (T, K) weights."""

        def experts(rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
            return run_experts(self._experts, self._forward, rows, tokens_per_expert, 1.0)

        return self._exchange(hidden_states, top_k_index, top_k_weights, experts, self._placement)


_exchanges: WeakValueDictionary[Any, ExpertExchange] = WeakValueDictionary()


def _shared_exchange(ep_group: Any, tp_group: Any, options: dict[str, Any]) -> ExpertExchange:
    """One for all layers: they take turns."""
    key = (ep_group.group_name, tp_group.group_name, repr(sorted(options.items())))
    exchange = _exchanges.get(key)
    if exchange is None or exchange.group.process_group is not ep_group:
        exchange = _exchanges[key] = ExpertExchange(ep_group, replicated_over=tp_group, **options)
    return exchange

"""`ExpertParallel`: expert parallelism for hand-written layers, in the way of `torch.distributed.tensor.parallel`."""

from __future__ import annotations

from typing import Any, final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from moecomm.errors import UnsupportedError
from moecomm.nn.exchange import ExpertExchange, check_options
from moecomm.nn.sharded import ShardedExperts, Sharding, shard_experts, takes_grouped_rows
from moecomm.placement import ExpertPlacement


@final
class ExpertParallel(ParallelStyle):
    """Spread the experts of a layer over a mesh dimension; a style for `parallelize_module`.

    The module of the plan is an experts module, or a layer with one as its `experts`. All parameters of an experts
    module have the experts as their first dimension, and its forward is one of

    * `forward(x, topk_idx, topk_weights)`: (T, H) tokens, (T, K) expert ids (-1 for none) and weights to the (T, H)
      weighted sums over K. On each rank it is called with the rows that came there as tokens, local expert ids, K = 1
      and weights of 1.
    * `forward(rows, expert_offsets)`: (N, H) rows that the layer has grouped by expert and (E,) int32 ends of the
      groups to (N, H), as `GroupedExperts` does; on each rank with local experts.

    Parameters become DTensors sharded over the experts, so `fully_shard` over another dimension of the same mesh,
    `torch.distributed.checkpoint` and `full_tensor()` take them as they do in tensor parallelism. An attribute
    `num_experts` becomes the number of this rank's experts.

    Gradients: those of the experts' weights are of the mean over the mesh dimension of the ranks' losses, as FSDP and
    DDP make all others. So they are right for another batch on each rank, where the other parameters are averaged over
    all ranks, and for the same batch on each rank of the dimension.

    Args:
        average_gradients: False: of the sum of the ranks' losses.
        buffer_options: of Buffer, except num_experts, hidden, top_k, dtype, device, which follow from the tokens, and
            placement, which follows from the DTensors. Without max_tokens_per_rank the buffer grows as needed, see
            ExpertExchange.

    Raises:
        ConfigError: no option of Buffer.
        UnsupportedError: when applied: the module is none of the above (its name, and what was looked for).

    >>> import os, torch, torch.distributed as dist
    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> from moecomm.nn import ExpertParallel, GroupedExperts
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    >>> layer = nn.ModuleDict({"experts": GroupedExperts(8, 16, range(4))})
    >>> layer = parallelize_module(layer, mesh["ep"], {"experts": ExpertParallel(max_tokens_per_rank=64)})
    >>> layer["experts"](torch.ones(3, 8), torch.tensor([1, 1, 3, 3], dtype=torch.int32)).shape
    torch.Size([3, 8])
    >>> layer["experts"].w_in.placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
    """

    def __init__(self, *, average_gradients: bool = True, **buffer_options: Any) -> None:
        super().__init__()
        check_options(buffer_options, without=("placement",))
        self._average, self._options = average_gradients, buffer_options
        self._exchanges: dict[DeviceMesh, ExpertExchange] = {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name, experts = _experts_of(module)
        if device_mesh.ndim != 1:
            raise UnsupportedError("experts are spread over one dimension", got=device_mesh, remedy="pass mesh['ep']")
        num_experts = _num_experts(name, experts)
        grouped = takes_grouped_rows(name, experts)
        if device_mesh not in self._exchanges:
            self._exchanges[device_mesh] = ExpertExchange(device_mesh.get_group(), **self._options)
        exchange = self._exchanges[device_mesh]
        for key, parameter in experts.named_parameters(recurse=False):
            local = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            if local.to_local().untyped_storage().nbytes() > local.to_local().nbytes:
                local = DTensor.from_local(
                    local.to_local().clone(), device_mesh, [Shard(0)], shape=local.shape, stride=local.stride()
                )
            experts.register_parameter(key, nn.Parameter(local, requires_grad=parameter.requires_grad))
        # Shard(0) gives blocks as torch.chunk does, which need not be those of ExpertPlacement.uniform.
        size = -(-num_experts // device_mesh.size())
        blocks = [range(num_experts)[rank * size : (rank + 1) * size] for rank in range(device_mesh.size())]
        factor = 1 / exchange.group.size if self._average else 1.0
        shard_experts(experts, Sharding(exchange, ExpertPlacement.explicit(blocks), factor, grouped))
        return module


def _experts_of(module: nn.Module) -> tuple[str, nn.Module]:
    experts = getattr(module, "experts", module)
    name = "experts" if experts is not module else type(module).__name__
    if not isinstance(experts, nn.Module):
        what = f"{type(module).__name__}.experts is no module"
        raise UnsupportedError(what, got=type(experts).__name__, expected="an nn.Module with stacked weights")
    return name, experts


def _num_experts(name: str, experts: nn.Module) -> int:
    """E, the first dimension of every parameter; what else there is is refused by name."""
    own = dict(experts.named_parameters(recurse=False))
    shapes = {key: tuple(parameter.shape) for key, parameter in experts.named_parameters()}
    got: object = shapes or "no parameters"
    if isinstance(experts, ShardedExperts) or any(isinstance(p, DTensor) for p in own.values()):
        got = "one that is parallelised already"
    elif own and len(own) == len(shapes) and all(shapes.values()):
        leading = {shape[0] for shape in shapes.values()}
        if len(leading) == 1 and getattr(experts, "num_experts", min(leading)) in leading:
            return min(leading)
    raise UnsupportedError(
        f"{name} ({type(experts).__name__}) holds no experts that can be spread",
        got=got,
        expected="parameters of its own, all with the experts as first dimension",
        remedy="stack the weights of all experts, or leave this module out of the plan",
    )

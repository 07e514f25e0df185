"""Time a whole MoE layer, in tokens per second: dispatch, SwiGLU experts, combine; forward, and forward with backward.

    torchrun --nproc-per-node 4 bench/bench_moe_layer.py --preset tiny --tokens 128,1024

Paths: ours over each transport; "baseline", the same experts between the frameworks' all-to-all; "experts alone", the
experts on the rows that arrived: the roof, for a layer cannot be faster than its matrix products. The routing is given
(see --skew), so that both do the same work; a router's own product is left out on all paths.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.baseline import baseline_combine, baseline_dispatch
from bench.bench_dispatch_combine import needed_bytes as exchange_bytes
from bench.case import Case, check_dispatch, make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.memory import PeakMemory
from bench.options import Setting, make_parser
from bench.paths import make_buffer, why_no_baseline
from bench.ranks import Ranks
from bench.record import Measurement
from bench.show import note, progress
from bench.traffic import traffic
from moecomm.nn import GroupedExperts
from moecomm.presets import PRESETS

EXPERTS_ALONE = "experts alone"


@dataclass(kw_only=True)
class Layer:
    """One way to run the layer: forward gives (T, H) of (T, H); peak_memory_bytes, gate: as in `Measurement`."""

    name: str
    transport: str = ""
    forward: Callable[[Tensor], Tensor]
    peak_memory_bytes: int | None = None
    gate: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.transport}".rstrip()


def intermediate_of(setting: Setting) -> int:
    """D: as given, as in the preset, or twice H."""
    given = setting.options.intermediate
    known = PRESETS[setting.preset].intermediate if setting.preset in PRESETS else 2 * setting.hidden
    return int(given or known)


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check the layers against each other, then time them in turn."""
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    placement = moecomm.ExpertPlacement.uniform(setting.experts, ranks.world)
    here = placement.experts_of_rank[ranks.rank]
    experts = GroupedExperts(setting.hidden, intermediate_of(setting), here, dtype=setting.dtype, device=ranks.device)
    with ExitStack() as stack:
        layers, arrived = make_layers(setting, ranks, case, experts, stack)
        check_layers(setting, ranks, case, placement, layers, arrived)
        times: defaultdict[str, list[float]] = defaultdict(list)
        step = stack.enter_context(progress(ranks.rank, "rounds", setting.warmup + setting.repeats))
        for number in range(setting.warmup + setting.repeats):
            if number == setting.warmup:
                times.clear()
            turn = number % len(layers)
            for layer in layers[turn:] + layers[:turn]:
                times[f"{layer.label}|forward"].append(ranks.time_us(partial(forward, layer, case.x)))
                times[f"{layer.label}|training"].append(ranks.time_us(partial(training, layer, case.x, experts)))
            step()
    return summarize(setting, ranks, case, placement, layers, ranks.slowest(times))


def make_layers(
    setting: Setting, ranks: Ranks, case: Case, experts: GroupedExperts, stack: ExitStack
) -> tuple[list[Layer], dict[str, Tensor]]:
    """Every way, and the rows that arrived on the last forward of each."""
    arrived: dict[str, Tensor] = {}

    def ours(buffer: moecomm.Buffer, label: str, x: Tensor) -> Tensor:
        out = buffer.dispatch(x, case.topk_idx, case.topk_weights_TK)
        assert isinstance(out.x, Tensor) and out.expert_offsets is not None
        arrived[label] = out.x.detach()
        return buffer.combine(experts(out.x, out.expert_offsets), out.handle)

    def theirs(x: Tensor) -> Tensor:
        rows, routing = baseline_dispatch(x, case.topk_idx, setting.experts)
        arrived["baseline"] = rows.detach()
        here = routing.num_experts_here
        counts = torch.tensor(routing.chunk_rows).view(-1, here).sum(0)
        offsets = counts.cumsum(0).to(torch.int32).to(rows.device)
        return baseline_combine(experts(rows, offsets), case.topk_weights_TK, routing)

    layers = []
    for transport in setting.transports:
        buffer = stack.enter_context(make_buffer(setting, ranks, transport))
        label = f"moecomm {buffer.transport}"
        layers.append(Layer(name="moecomm", transport=buffer.transport, forward=partial(ours, buffer, label)))
    first = layers[0].label
    if reason := why_no_baseline(setting, ranks):
        note(ranks.rank, f"no baseline: {reason}")
    else:
        layers.append(Layer(name="baseline", forward=theirs))
    layers[0].forward(case.x)
    rows = arrived[first]
    ids = torch.cat([of_rank.flatten() for of_rank in case.topk_idx_of_rank])
    counts = torch.bincount(ids, minlength=setting.experts)[list(experts.expert_ids)]
    offsets = counts.cumsum(0).to(torch.int32)

    def alone(x: Tensor) -> Tensor:
        return experts(rows.detach().requires_grad_(x.requires_grad), offsets)

    layers.append(Layer(name=EXPERTS_ALONE, forward=alone))
    return layers, arrived


def check_layers(
    setting: Setting,
    ranks: Ranks,
    case: Case,
    placement: moecomm.ExpertPlacement,
    layers: Sequence[Layer],
    arrived: dict[str, Tensor],
) -> None:
    """Rows arrive bit for bit, and all outputs agree within the roundings of two sums."""
    reference: Tensor | None = None
    for layer in layers:
        with PeakMemory(ranks.device) as peak:
            y = forward(layer, case.x)
        layer.peak_memory_bytes = max(ranks.all_gather(peak.bytes))
        if layer.name == EXPERTS_ALONE:
            continue
        check_dispatch(case, arrived[layer.label], placement, layer.label)
        layer.gate = "dispatch bit for bit"
        if reference is None:
            reference = y
            continue
        # The rows are the same, so the experts' rows are; two sums of K terms differ by their roundings only.
        unit = torch.finfo(setting.dtype).eps / 2
        error = (y.double() - reference.double()).abs().max()
        bound = 8 * unit * (1 + setting.top_k) * max(float(reference.double().abs().max()), 1e-30)
        assert error <= bound, f"{layer.label}: off by {error:.2e} from {layers[0].label}, allowed {bound:.2e}"
        layer.gate = f"{layer.gate}, layers within {8 * (1 + setting.top_k)} roundings of the largest output"
    layers[0].gate = layers[1].gate or layers[0].gate


def forward(layer: Layer, x: Tensor) -> Tensor:
    """Run it without gradients."""
    with torch.no_grad():
        return layer.forward(x)


def training(layer: Layer, x: Tensor, experts: GroupedExperts) -> None:
    """Run it forward and backward, with gradients of rows and experts."""
    experts.zero_grad()
    y = layer.forward(x.detach().requires_grad_())
    y.backward(torch.ones_like(y))


def summarize(
    setting: Setting,
    ranks: Ranks,
    case: Case,
    placement: moecomm.ExpertPlacement,
    layers: Sequence[Layer],
    times: dict[str, list[float]],
) -> list[Measurement]:
    """Rows, with tokens per second of all ranks. Bytes are those of a dispatch and a combine, twice in training."""
    of = traffic(case.ids_of_rank, placement, layout="expert", reduce=setting.reduce, row_bytes=setting.row_bytes)
    both = [one for of_ranks in of.values() for one in of_ranks]
    depth = f"{setting.case_name(ranks.world)} D={intermediate_of(setting)}"
    recorder = Recorder("moe_layer", setting, ranks, case.ids_of_rank, case=depth)
    rows = []
    for operation in ("forward", "training"):
        for layer in layers:
            row = recorder.row(
                layer.name,
                operation,
                times[f"{layer.label}|{operation}"],
                both if operation == "forward" else both + both,
                transport=layer.transport,
                gate=layer.gate,
                peak_memory_bytes=layer.peak_memory_bytes,
            )
            tokens_per_s = ranks.world * setting.tokens / (row.p50_us * 1e-6)
            rows.append(
                replace(row, extras={"tokens_per_s": round(tokens_per_s), "intermediate": intermediate_of(setting)})
            )
    return compared(rows, roof=EXPERTS_ALONE)


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes per rank: what the exchange takes, the experts while they are drawn in float32, gradients, inner rows."""
    held, inner = -(-setting.experts // world), intermediate_of(setting)
    weights = held * 3 * setting.hidden * inner
    exchange = exchange_bytes(setting, world)
    rows = exchange // (8 * setting.row_bytes)  # arrivals, and more
    return exchange + weights * (2 * 4 + 2 * setting.dtype.itemsize) + 6 * rows * inner * setting.dtype.itemsize


def parser() -> argparse.ArgumentParser:
    """The options of the family, and one more."""
    made = make_parser(__doc__, tokens=[128, 1024])
    made.add_argument("--intermediate", type=int, help="inner size D of an expert instead of that of the preset")
    made.set_defaults(burst=0)
    return made


BENCHMARK = Benchmark(
    name="moe_layer",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={"layout": ("expert",), "quant": ("none",)},  # the experts work on rows as they are
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, parser()))

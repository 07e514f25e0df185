"""DeepEP 2.1.0's Python API as its callers know it, compared with `moecomm.deep_ep`.

    python -m tests.deep_ep.contract          # print what differs
    python -m tests.deep_ep.contract --write  # write the tables of docs/deep_ep.md

Signatures are facts, noted from use, in `contract.txt`; `...` for a default that nobody relies on.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecomm import deep_ep
from moecomm.deep_ep import hybrid_ep_buffer
from moecomm.deep_ep.refusals import NotThere

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deep_ep.md"

SIGNATURES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()

# What attributes of objects hold; looked at on a buffer of one rank.
ATTRIBUTES = {
    "Buffer": "group rank group_size num_nvl_bytes num_rdma_bytes low_latency_mode explicitly_destroy",
    "ElasticBuffer": "group rank_idx num_ranks num_bytes num_max_tokens_per_rank num_scaleout_ranks num_scaleup_ranks "
    "scaleout_rank_idx scaleup_rank_idx num_rdma_ranks num_nvlink_ranks num_allocated_qps deterministic "
    "allow_hybrid_mode allow_multiple_reduction prefer_overlap_with_compute nccl_comm_handle runtime",
    "EPHandle": "do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx num_recv_tokens "
    "num_expanded_tokens num_recv_tokens_per_expert_list psum_num_recv_tokens_per_scaleup_rank "
    "psum_num_recv_tokens_per_expert num_unaligned_recv_tokens_per_expert recv_src_metadata dst_buffer_slot_idx "
    "token_metadata_at_forward channel_linked_list",
}

# Arguments that are taken, and change no result: callable -> argument -> why.
NO_EFFECT = {
    "Buffer": {
        "num_qps_per_rank": "no queue pairs",
        "allow_nvlink_for_low_latency_mode": "the transport is chosen by what works",
        "allow_mnnvl": "the transport is chosen by what works",
        "use_fabric": "of a fork; no fabric handles",
    },
    "Buffer.get_low_latency_rdma_size_hint": {"num_ranks": "DeepEP's size does not depend on it either"},
    "Buffer.dispatch": {
        "num_tokens_per_rank": "checked; counted again from is_token_in_rank",
        "num_tokens_per_rdma_rank": "counted again from is_token_in_rank",
        "config": "sets the number of channels in a handle; there are no chunks",
    },
    "Buffer.combine": {"config": "there are no chunks"},
    "ElasticBuffer": {
        "num_cpu_bytes": "only Engram uses it",
        "deterministic": "order never depends on time",
        "prefer_overlap_with_compute": "only in get_theoretical_num_sms",
        "allow_hybrid_mode": "only in get_logical_domain_size; the transport decides how rows travel",
        "sl_idx": "no service levels",
        "num_allocated_qps": "kept; no queue pairs",
        "num_gpu_timeout_secs": "one deadline for all waits: num_cpu_timeout_secs",
    },
    "ElasticBuffer.barrier": {
        "use_comm_stream": "there is no such stream",
        "with_cpu_sync": "the host always waits",
        "sequential": "there is one barrier",
    },
    "ElasticBuffer.get_buffer_size_hint": {
        "allow_hybrid_mode": "the size of one domain",
        "allow_multiple_reduction": "the size is the same",
    },
    "ElasticBuffer.get_theoretical_num_sms": {"num_scaleout_topk": "choices are not limited to nodes"},
    "ElasticBuffer.dispatch": {
        "num_qps": "no queue pairs",
        "num_sms": "kept in the handle",
        "do_zero_padding": "padding is always zero",
        "allocate_on_comm_stream": "checked with previous_event; there is no such stream",
    },
    "ElasticBuffer.combine": {
        "num_qps": "no queue pairs",
        "num_sms": "not used",
        "allocate_on_comm_stream": "checked with previous_event; there is no such stream",
    },
    "HybridEPBuffer": {"use_fp8": "rows of any dtype travel", "tuning": "num_sms_*, num_blocks_*: other kernels"},
    "HybridEPBuffer.dispatch_with_permute": {
        "num_of_experts_per_rank": "the routing map says it",
        "non_blocking": "the number of rows is known on the host anyway",
        "fuse_permute_dispatch": "rows are always written where they belong",
    },
    "HybridEPBuffer.combine_with_unpermute": {
        "pad_multiple": "the handle knows it",
        "num_dispatched_tokens": "the handle knows it",
        "fuse_unpermute_combine": "always one step",
    },
}

UNSUPPORTED = {
    "Engram": "get_engram_storage_size_hint, engram_write, engram_fetch",
    "PP": "get_pp_buffer_size_hint, pp_set_config, pp_send, pp_recv",
    "all-gather sessions": "get_agrs_num_max_session_bytes, get_agrs_buffer_size_hint, agrs_set_config, "
    "create_agrs_session, destroy_agrs_session, agrs_new_session, agrs_get_inplace_tensor, all_gather",
    "NVFP4 of forks": "low_latency_dispatch(use_nvfp4=True), low_latency_dispatch(x_global_scale=...)",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. status: "same", "same, and more", "raises UnsupportedError", or what is wrong."""

    name: str
    signature: str
    status: str

    @property
    def is_explained(self) -> bool:
        return self.status.startswith(("same", "raises UnsupportedError"))


def find(name: str) -> Any:
    """The object behind a dotted name."""
    thing: Any = deep_ep
    for part in name.split("."):
        thing = hybrid_ep_buffer if part == "hybrid_ep_buffer" else inspect.getattr_static(thing, part, None)
        if thing is None:
            return None
        thing = thing.__func__ if isinstance(thing, staticmethod) else thing
    return thing


def arguments(signature: str) -> list[tuple[str, Any]] | None:
    """(name, default) of each argument; Ellipsis where there is none to compare; None where nothing is known."""
    if "(...)" in signature:
        return None
    tree = ast.parse(f"def f({signature.partition('(')[2]}: pass").body[0]
    assert isinstance(tree, ast.FunctionDef)
    defaults = [ast.literal_eval(node) for node in tree.args.defaults]
    names = [arg.arg for arg in tree.args.args]
    return list(zip(names, [Ellipsis] * (len(names) - len(defaults)) + defaults, strict=True))


def compare(line: str) -> Row:
    """One signature against ours."""
    name, _, rest = line.partition("(")
    ours = find(name)
    if ours is None:
        return Row(name, rest and "(" + rest, "missing")
    if name.startswith("ElasticBuffer.") and name.split(".")[1] in vars(NotThere):
        return Row(name, "", "raises UnsupportedError")
    if not rest:
        return Row(name, "", "same")
    known = [p for p in inspect.signature(ours).parameters.values() if p.name != "self"]
    if [p.name for p in known] == ["args", "kwargs"]:  # hands everything on
        known = list(inspect.signature(find(name.replace("internode_", ""))).parameters.values())[1:]
    theirs = arguments(line)
    if theirs is None:
        return Row(name, "", "same")
    by_name = {p.name: p for p in known}
    wrong = [f"no {arg}" for arg, _ in theirs if arg not in by_name]
    if wrong:
        return Row(name, "(" + rest, ", ".join(wrong))
    wrong = [
        f"{arg}={by_name[arg].default!r}"
        for arg, default in theirs
        if default is not Ellipsis and by_name[arg].default != default
    ]
    positional = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    if positional and positional[: len(theirs)] != [arg for arg, _ in theirs]:
        wrong.append("another order")
    more = [p.name for p in known if p.name not in dict(theirs)]
    return Row(name, "(" + rest, ", ".join(wrong) or (f"same, and {', '.join(more)}" if more else "same"))


def rows() -> list[Row]:
    """All lines of the table."""
    made = [compare(line) for line in SIGNATURES]
    buffers = {
        "Buffer": deep_ep.Buffer(),
        "ElasticBuffer": deep_ep.ElasticBuffer(num_max_tokens_per_rank=1, hidden=1),
    }
    for name, attributes in ATTRIBUTES.items():
        thing = buffers.get(name)
        fields = set(dir(thing)) if thing else set(dir(deep_ep.EPHandle)) | set(deep_ep.EPHandle.__dataclass_fields__)
        missing = [attribute for attribute in attributes.split() if attribute not in fields]
        made.append(
            Row(f"{name}: attributes", attributes.replace(" ", ", "), f"missing {missing}" if missing else "same")
        )
    return made


def tables() -> str:
    """The generated part of the page."""
    lines = ["| name | DeepEP's signature | here |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {f'`{row.signature}`' if row.signature else ''} | {row.status} |" for row in rows()]
    lines += ["", "### Taken, without effect on results", "", "| where | argument | why |", "|---|---|---|"]
    lines += [f"| `{where}` | `{arg}` | {why} |" for where, args in NO_EFFECT.items() for arg, why in args.items()]
    lines += ["", "### Not supported: raises `UnsupportedError`", "", "| what | names |", "|---|---|"]
    lines += [
        f"| {what} | {', '.join(f'`{n}`' for n in re.split(', ', names))} |" for what, names in UNSUPPORTED.items()
    ]
    return "\n".join(lines)


BEGIN, END = "<!-- begin: python -m tests.deep_ep.contract --write -->", "<!-- end -->"


def with_tables(page: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    for row in rows():
        if not row.is_explained:
            print(f"{row.name}: {row.status}")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

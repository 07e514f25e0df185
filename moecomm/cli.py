"""`python -m moecomm {info,doctor,plan,bench,conformance}`: alone, under torchrun, under mpiexec; one rank prints."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

import moecomm
from moecomm.diagnostics import Cluster, Forecast, collect, examine, forecast
from moecomm.launch import Launch, is_first, joined, resolve
from moecomm.presets import PRESETS

_BENCH = Path(__file__).resolve().parents[1] / "bench"
_COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: its words; None: those of this process.

    Returns:
        0; 1 if something is wrong; 2 for wrong options.

    >>> main(["plan", "--preset", "tiny", "--tokens", "16"])
    tiny on 1 node x 1 rank, 16 tokens per rank: transport local
    ...
    0
    """
    try:
        with _one_voice():
            result = commands.main(list(sys.argv[1:] if argv is None else argv), "moecomm", standalone_mode=False)
    except click.ClickException as error:
        if is_first():
            error.show()
        return error.exit_code
    except click.Abort:
        return 1
    except moecomm.MoECommError as error:
        click.echo(f"moecomm: error: {error}", err=True)
        return 1
    return int(result or 0)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Let help and version be printed by one rank."""
    if not is_first() and {"--help", "--version"} & set(sys.argv):
        raise click.Abort
    yield


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moecomm.__version__, prog_name="moecomm")
def commands() -> None:
    """Look at an installation of moecomm, plan, measure and check it.

    Every command also runs under torchrun ("torchrun --nproc-per-node 4 -m moecomm doctor") and mpiexec ("mpiexec -n 4
    python -m moecomm doctor"); one rank prints.
    """


@commands.command()
@_device
@_json
def info(device: str, as_json: bool) -> int:
    """Say what is here: versions, devices, links, MPI, memory, and what each transport answers."""
    try:
        with joined(device) as launch:
            facts = collect(launch)
            first = launch.rank == 0
    except Exception as error:  # not being able to join is a fact, too
        alone = Launch(
            launcher="alone", group=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")
        )
        facts, first = collect(alone) | {"error": f"cannot join the other processes: {error}"}, is_first()
    if first:
        _print_json(facts) if as_json else _print_facts(facts)
    return 0


@commands.command()
@_device
@_json
def doctor(device: str, as_json: bool) -> int:
    """Probe memory, limits, clocks and every pair of ranks; end with what to fix and how."""
    findings = []
    with joined(device) as launch:
        for finding in examine(launch):
            findings.append(finding)
            if launch.rank == 0 and not as_json:
                mark = click.style(f"{finding.level:8}", fg=_COLORS[finding.level])
                click.echo(f"{mark} {finding.probe}: {finding.text}")
        told = resolve(launch).all_gather_object([f.level for f in findings], operation="doctor")
        first = launch.rank == 0
    bad = any(level == "problem" for levels in told for level in levels)
    if first and as_json:
        _print_json([asdict(finding) for finding in findings])
    elif first:
        to_fix = [finding for finding in findings if finding.remedy]
        click.echo("\nnothing to fix" if not to_fix else "\nto fix:")
        for number, finding in enumerate(to_fix, 1):
            click.echo(f"{number}. {finding.probe}: {finding.remedy}")
    return int(bad)


@commands.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="The model.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--ranks-per-node", type=click.IntRange(1), default=1, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of each rank.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True)
@click.option("--link-gbit", type=click.FloatRange(0), default=0.0, help="Speed of a node's link, Gbit/s, if known.")
@_json
def plan(preset: str, nodes: int, ranks_per_node: int, tokens: int, dtype: str, link_gbit: float, as_json: bool) -> int:
    """Say what a model needs on a cluster: bytes per rank and layer, buffer memory, transport and why."""
    cluster = Cluster(nodes=nodes, ranks_per_node=ranks_per_node, link_gbit_per_s=link_gbit)
    result = forecast(PRESETS[preset], cluster, tokens=tokens, dtype=_DTYPES[dtype])
    if is_first() and as_json:
        _print_json({"preset": preset, "tokens": tokens, "dtype": dtype, **asdict(cluster), **asdict(result)})
    elif is_first():
        _print_plan(preset, cluster, tokens, result)
    return 0


@commands.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": False}
)
@click.argument("name", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def bench(name: str | None, options: tuple[str, ...]) -> int:
    """Run a benchmark, as in "python -m moecomm bench dispatch_combine --preset tiny"; without a name: list them.

    They are scripts in the folder bench/ of a checkout, with options of their own (--help after the name).
    """
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(_BENCH.glob("bench_*.py"))}
    if not scripts:
        raise click.ClickException(
            f"the benchmarks are not installed with the library (no {_BENCH.name}/ beside it): clone the repository, "
            "`make setup` there, and run the command again"
        )
    if name in (None, "-h", "--help", "--json"):
        if is_first() and name == "--json":
            _print_json(list(scripts))
        elif is_first():
            click.echo("\n".join([bench.help or "", "", *(f"  {script}" for script in scripts)]))
        return 0
    assert name is not None
    if name not in scripts:
        raise click.UsageError(f"no benchmark {name!r}: there are {', '.join(scripts)}")
    sys.argv = [str(scripts[name]), *options]
    try:
        runpy.run_path(str(scripts[name]), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@commands.command()
@click.option("--transport", default="all", show_default=True, help="Names with commas; all: those that work here.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first random case.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Routings per case.")
@_device
@_json
def conformance(transport: str, minutes: float, rounds: int, seed: int, device: str, as_json: bool) -> int:
    """Compare every operation with a slow oracle on these ranks: copies and sums bit for bit, gradients bounded."""
    from moecomm.testing.suite import run_suite

    with joined(device) as launch:
        transports = None if transport == "all" else transport.split(",")
        report = run_suite(launch.group, minutes=minutes, transports=transports, rounds=rounds, seed=seed)
        first = launch.rank == 0
    if first and as_json:
        _print_json(report.as_dict())
    elif first:
        click.echo(report.page())
    return int(not report.ok)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _print_facts(facts: dict[str, Any]) -> None:
    """One block per section."""
    for section, found in facts.items():
        click.echo(click.style(section.replace("_", " "), bold=True))
        if section == "transports" and "answers" in found:
            for name, answer in found["answers"].items():
                mark = "chosen" if name == found["chosen"] else "yes" if answer["ok"] else "no"
                click.echo(f"  {name:14} {mark:7} {answer['reason']}")
            click.echo(f"  ranks by node  {found['ranks_by_node']}")
        elif section == "environment":
            for name, one in found.items():
                click.echo(f"  {name:24} {one['value'] or '-':8} {one['meaning']}{'' if one['set'] else ' (default)'}")
        elif isinstance(found, dict):
            for name, value in found.items():
                click.echo(f"  {name:20} {_plain(name, value)}")
        else:
            click.echo(f"  {found}")


def _plain(name: str, value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, dict) and set(value) == {"ok", "reason"}:
        return f"{'yes' if value['ok'] else 'no'}: {value['reason']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value / 1e9:.1f} GB" if name.endswith("_bytes") else str(value)


def _print_plan(name: str, cluster: Cluster, tokens: int, result: Forecast) -> None:
    nodes, ranks = cluster.nodes, cluster.ranks_per_node
    click.echo(
        f"{name} on {nodes} node{'s' * (nodes > 1)} x {ranks} rank{'s' * (ranks > 1)}, {tokens} tokens per rank: "
        f"transport {result.transport}"
    )
    click.echo(f"  because {result.why}")
    click.echo("  one rank, one layer, on average, in MB (deduplicated):")
    for label, (every, least) in (
        ("to itself", result.local),
        ("to its node", result.same_node),
        ("to other nodes", result.other_nodes),
    ):
        click.echo(f"    dispatch {label:16} {every / 1e6:10.1f} ({least / 1e6:.1f})")
    if nodes > 1:
        click.echo(f"    once per node              {result.once_per_node_bytes / 1e6:8.1f}")
    click.echo(f"  dispatch and combine, sent per layer: {result.layer_bytes / 1e6:.1f} MB")
    click.echo(f"  over the model, forward:              {result.model_bytes / 1e9:.2f} GB")
    click.echo(f"  rows that a dispatch gives a rank:    {result.received_bytes / 1e6:.1f} MB")
    click.echo(f"  reserved by the buffer:               {result.reserved_bytes / 1e9:.2f} GB (committed as rows come)")
    if result.wire_ms is not None:
        click.echo(f"  time on the link at full speed:       {result.wire_ms:.2f} ms per layer")

"""The options that every benchmark has, and the settings that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.routing import Skew
from moecomm.presets import PRESETS, preset_of
from moecomm.quant import FORMATS, QuantSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What one case of a benchmark is: one number of tokens and one skew, on every transport that was asked for.

    hidden, experts, top_k: H, E, K. tokens: T per rank. transports: names as `Buffer` takes them. dtype: of the rows.
    quant: None or what `dispatch(quant=)` takes. repeats, warmup: rounds that count,
        and before each sitting. seed: of routing and rows.
    options: the whole command line, for what only one benchmark has.
    """

    hidden: int
    experts: int
    top_k: int
    tokens: int
    skew: Skew
    transports: tuple[str, ...]
    layout: str
    reduce: str
    dtype: torch.dtype
    quant: str | None
    repeats: int
    warmup: int
    seed: int
    options: argparse.Namespace

    @property
    def preset(self) -> str:
        """The model of this shape, or "custom"."""
        return preset_of(self.hidden, self.experts, self.top_k)

    @property
    def dtype_name(self) -> str:
        """As in `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the dtype of the buffer."""
        return self.hidden * self.dtype.itemsize

    @property
    def wire_row_bytes(self) -> int:
        """Bytes of a row as a dispatch sends it."""
        return QuantSpec.of(self.quant).row_bytes(self.hidden) if self.quant else self.row_bytes

    def case_name(self, world: int) -> str:
        """The name under which every run finds this case; a transport is no part of it."""
        shape = f"W={world} T={self.tokens} H={self.hidden} K={self.top_k} E={self.experts} {self.dtype_name}"
        skew = "" if self.skew.kind == "uniform" else f" {self.skew}"
        quant = f" {self.quant}" if self.quant else ""
        return f"{shape} {self.layout} {self.reduce}{quant}{skew}"


def make_parser(
    about: str | None,
    own_shape: Mapping[str, Sequence[int]] | None = None,
    *,
    repeats: int = 12,
    repeats_of_tiny: int | None = None,
    **defaults: Any,
) -> argparse.ArgumentParser:
    """A parser with the options of the family; a benchmark adds its own, and gives other defaults by name.

    own_shape: the `hidden`, `experts` and `top_k` of a benchmark that has no preset of its own; --preset replaces them.
    repeats, repeats_of_tiny: rounds without --repeats, and for preset tiny, if these are others.
    """
    shapes = {name: ",".join(map(str, sizes)) for name, sizes in (own_shape or {}).items()}
    own = "H {hidden}, E {experts}, K {top_k}".format(**shapes) if shapes else "tiny"
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shape = parser.add_argument_group("shape")
    shape.add_argument("--preset", choices=PRESETS, help=f"H, E and K of a model (default: {own})")
    shape.add_argument("--hidden", type=_sizes, help="H instead of that of the preset, a comma list")
    shape.add_argument("--experts", type=_sizes, help="E instead of that of the preset, a comma list")
    shape.add_argument("--top-k", type=_sizes, help="K instead of that of the preset, a comma list")
    shape.add_argument("--tokens", type=_counts, default=[1, 16, 128, 1024], help="T per rank, a comma list")
    shape.add_argument(
        "--skew", type=_skews, default=[Skew("uniform", 0.0)], help="uniform, zipf:S, hot:P, ratio:R; a comma list"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--transport", type=_names, default=["auto"], help="a comma list (default: auto)")
    how.add_argument("--layout", choices=("expert", "rank", "padded"), default="expert")
    how.add_argument("--reduce", choices=("rank", "source"), default="rank")
    how.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the rows (default: %(default)s)")
    how.add_argument("--quant", choices=("none", *FORMATS), default="none", help="of rows on the wire (default: none)")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    steady = "bind ranks to cores and settle malloc, so that runs agree (auto: preset tiny with a core for each rank)"
    how.add_argument("--steady", choices=("auto", "on", "off"), default="auto", help=steady)
    run = parser.add_argument_group("run")
    tiny = f", of tiny {repeats_of_tiny}" if repeats_of_tiny else ""
    run.add_argument("--repeats", type=positive, help=f"timed rounds (default: {repeats}{tiny})")
    run.add_argument("--sittings", type=positive, default=0, help="with buffers of their own (default: repeats / 8)")
    run.add_argument("--warmup", type=_count, default=3, help="rounds before each sitting (default: %(default)s)")
    run.add_argument("--seed", type=_count, default=0, help="of routing and rows (default: %(default)s)")
    run.add_argument("--out", type=Path, help="write OUT.csv and OUT.json (cases that are there are replaced)")
    run.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    parser.set_defaults(own_shape=own_shape, default_repeats=(repeats, repeats_of_tiny or repeats), **defaults)
    return parser


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """One setting per skew, shape and number of tokens; the numbers of tokens change first."""
    model = PRESETS[args.preset or "tiny"]
    shape: Mapping[str, Sequence[int]] = {name: [getattr(model, name)] for name in ("hidden", "experts", "top_k")}
    if args.own_shape and not args.preset:
        shape = args.own_shape
    each = (getattr(args, name) or shape[name] for name in ("hidden", "experts", "top_k"))
    for skew, hidden, experts, top_k, tokens in product(args.skew, *each, args.tokens):
        yield Setting(
            hidden=hidden,
            experts=experts,
            top_k=top_k,
            tokens=tokens,
            skew=skew,
            transports=tuple(args.transport),
            layout=args.layout,
            reduce=args.reduce,
            dtype=DTYPES[args.dtype],
            quant=None if args.quant == "none" else args.quant,
            repeats=args.repeats or args.default_repeats[preset_of(hidden, experts, top_k) == "tiny"],
            warmup=args.warmup,
            seed=args.seed,
            options=args,
        )


def refusal(setting: Setting, takes: Mapping[str, Sequence[str]]) -> str:
    """Say which option has a value that a benchmark cannot measure, or nothing.

    takes: by option (layout, reduce, transport, quant, dtype, skew, steady) the values that it can; all where it is not
        named.

    >>> (setting,) = settings(make_parser("").parse_args(["--tokens", "4", "--layout", "rank"]))
    >>> refusal(setting, {"layout": ["expert"]})
    '--layout rank means nothing here; give expert'
    """
    given = {
        "layout": [setting.layout],
        "reduce": [setting.reduce],
        "transport": setting.transports,
        "quant": [setting.quant or "none"],
        "dtype": [setting.dtype_name],
        "skew": [setting.skew.kind],
        "steady": [setting.options.steady],
    }
    for name, values in takes.items():
        for value in given[name]:
            if value not in values:
                return f"--{name} {value} means nothing here; give {' or '.join(values)}"
    return ""


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different names with commas between them")
    return names


def _skews(text: str) -> list[Skew]:
    return [Skew.parse(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    """A whole number of at least 1; argparse shows the message if it is none."""
    if (number := _count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return number

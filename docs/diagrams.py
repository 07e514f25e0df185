"""Draw the diagrams of the docs that are boxes and arrows; `python docs/diagrams.py` rewrites docs/assets/*.svg.

Each is a picture on a page of its own, with the colours of the reader's system, so that it is legible on any site.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ASSETS = Path(__file__).resolve().parent / "assets"
STYLE = """<style>
  .page { fill: #ffffff; stroke: #d0d7de; }
  .box { fill: #f3f5f8; stroke: #b6bfc9; }
  .ours { fill: #dff1e9; stroke: #1b7f5c; }
  text { font-family: ui-sans-serif, system-ui, Helvetica, Arial, sans-serif; fill: #1f2328; font-size: 14px; }
  .head { font-weight: 700; text-anchor: middle; }
  .mid { text-anchor: middle; }
  .note { fill: #57606a; font-size: 13px; }
  .line { stroke: #57606a; stroke-width: 1.6; fill: none; }
  .life { stroke: #b6bfc9; stroke-width: 1.4; stroke-dasharray: 5 5; }
  .tip { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d; }
    .box { fill: #161b22; stroke: #484f58; }
    .ours { fill: #12352a; stroke: #4fc79b; }
    text { fill: #e6edf3; }
    .note { fill: #9da7b3; }
    .line { stroke: #9da7b3; }
    .life { stroke: #484f58; }
    .tip { fill: #9da7b3; }
  }
</style>
<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">
<path class="tip" d="M0 0 L10 5 L0 10 z"/></marker></defs>"""
# A step of a sequence: (from, to, text); to equal to from is something an actor does by itself.
Step = tuple[int, int, str]


def page(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture with a title for those who cannot see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">\n'
        f'<title id="title">{escape(title)}</title>\n{STYLE}\n'
        f'<rect class="page" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, kind: str = "mid") -> str:
    """Some words."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def box(x: float, y: float, width: float, lines: Sequence[str], kind: str = "box") -> str:
    """A box with lines in it, the first one bold."""
    height = 14 + 20 * len(lines)
    drawn = [f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="6"/>']
    for number, line in enumerate(lines):
        drawn.append(text(x + width / 2, y + 22 + 20 * number, line, "head" if number == 0 else "mid note"))
    return "\n".join(drawn)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """From here to there."""
    return f'<line class="line" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" marker-end="url(#tip)"/>'


def sequence(title: str, actors: Sequence[str], steps: Sequence[Step], gap: int = 270) -> str:
    """Actors side by side, time downwards."""
    left, top, step_height = gap // 2 + 10, 70, 44
    xs = [left + gap * number for number in range(len(actors))]
    height = top + step_height * len(steps) + 40
    parts = [text(x, 36, actor, "head") for x, actor in zip(xs, actors, strict=True)]
    parts += [f'<line class="life" x1="{x}" y1="50" x2="{x}" y2="{height - 16}"/>' for x in xs]
    for number, (source, to, words) in enumerate(steps):
        y = top + step_height * number + 20
        if source == to:
            width = min(gap - 16, 22 + 7.4 * len(words))
            parts.append(
                f'<rect class="box" x="{xs[source] - width / 2:g}" y="{y - 17}" width="{width:g}" height="28" rx="6"/>'
            )
            parts.append(text(xs[source], y + 2, words))
        else:
            parts.append(arrow(xs[source], y + 6, xs[to], y + 6))
            parts.append(text((xs[source] + xs[to]) / 2, y, words))
    return page(2 * left + gap * (len(actors) - 1), height, title, parts)


def architecture() -> str:
    """The layers of the library, and which way imports go."""
    rows = (
        ("what a user could have written", "nn, diagnostics, testing, deep_ep, integrations, cli", "box"),
        ("Buffer", "checks, operations, autograd: the public face", "ours"),
        ("transport", "local, symmetric, hierarchical, mpi, collective: rows of bytes, nothing of experts", "box"),
        ("memory and kernels", "memfd and device memory; Triton kernels", "box"),
        ("plan, handle, reference", "routing to rows, without communication; the slow oracle beside it", "box"),
        ("group, topology, placement, rows, quant", "who is there, who shares memory, which rank holds what", "box"),
        ("errors, environment", "one tree of exceptions, one place that reads variables", "box"),
    )
    parts = []
    for number, (name, what, kind) in enumerate(rows):
        y = 24 + 78 * number
        parts.append(box(40, y, 640, [name, what], kind))
        if number:
            parts.append(arrow(360, y - 24, 360, y - 2))
    return page(720, 24 + 78 * len(rows) + 4, "Layers of moecomm; imports go downwards only", parts)


def layouts() -> str:
    """The four tokens of the worked example, in the layouts expert and rank."""
    parts = [
        text(90, 34, "tokens of rank 0", "head"),
        text(330, 34, 'layout "expert"', "head"),
        text(560, 34, 'layout "rank"', "head"),
    ]
    for number, (name, experts) in enumerate((("a", "0, 1"), ("b", "2, 0"), ("c", "3, 2"), ("d", "1, none"))):
        parts.append(box(20, 56 + 62 * number, 140, [name, f"experts {experts}"]))
    for number, (name, rows) in enumerate(
        (("expert 0", "a b"), ("expert 1", "a d"), ("expert 2", "b c"), ("expert 3", "c"))
    ):
        parts.append(box(250, 56 + 62 * number, 160, [rows, name], "ours"))
    parts.append(box(480, 56, 160, ["a b d", "rank 0: once each"], "ours"))
    parts.append(box(480, 180, 160, ["b c", "rank 1: once each"], "ours"))
    parts += [arrow(166, 180, 244, 180), text(205, 168, "or", "mid note")]
    parts.append(text(445, 180, "or", "mid note"))
    parts.append(text(330, 326, "rank 0 holds experts 0 and 1, rank 1 holds experts 2 and 3", "mid note"))
    return page(660, 346, "Four tokens in two layouts", parts)


DIAGRAMS = {
    "architecture": architecture,
    "layouts": layouts,
    "symmetric_dispatch": lambda: sequence(
        "Dispatch over shared memory between two ranks",
        ["rank 0", "memory of rank 1", "rank 1"],
        [
            (0, 0, "plan: sort entries by expert"),
            (0, 1, "ARRIVE: counts, into a letter box"),
            (2, 1, "reads ARRIVE of everybody"),
            (0, 0, "final slot of every row is known"),
            (0, 1, "rows, straight into their slots"),
            (0, 1, "DONE, and where to write to me next"),
            (2, 1, "reads DONE of everybody"),
            (2, 2, "the segment is the result"),
        ],
    ),
    "symmetric_combine": lambda: sequence(
        "Combine over shared memory between two ranks",
        ["rank 1 (experts)", "memory of rank 0", "rank 0 (tokens)"],
        [
            (0, 0, "sum over k, float32, in order"),
            (0, 1, "one row per token, once rounded"),
            (0, 1, "DONE"),
            (2, 1, "reads DONE of everybody"),
            (2, 2, "sum over ranks in order"),
            (2, 2, "round once: the result"),
        ],
    ),
    "hierarchical_dispatch": lambda: sequence(
        "Dispatch of one token to two experts on another node",
        ["node 0, rank 0", "node 1, rank 2 (forwards)", "node 1, rank 3"],
        [
            (0, 0, "counts of all ranks, over control"),
            (0, 1, "the token, once, and its two slots"),
            (1, 1, "first copy: an expert of its own"),
            (1, 2, "second copy, through shared memory"),
            (2, 1, "combine: sum of its rows"),
            (1, 1, "sum over the node, in order"),
            (1, 0, "one row home"),
        ],
        gap=280,
    ),
    "kernel_dispatch": lambda: sequence(
        "Dispatch by kernels between two GPUs",
        ["GPU 0", "buffer of GPU 1", "GPU 1"],
        [
            (0, 0, "layout: slots by prefix sum"),
            (0, 1, "push: rows, metadata, counts"),
            (0, 1, "signal = operation number (release)"),
            (2, 1, "receive waits for W signals (acquire)"),
            (2, 2, "permute into expert groups"),
        ],
        gap=290,
    ),
}


def main() -> None:
    """Rewrite them all."""
    for name, draw in DIAGRAMS.items():
        (ASSETS / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

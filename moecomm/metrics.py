"""What `Buffer.stats()` gives: a dict that can also speak Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

_RISING = ("_s", "dispatches", "replays", "combines", "frees", "blocks", "copies", "leases")


@final
class Stats(dict[str, Any]):
    """Counters by name: numbers, or tensors with one number per rank or per local expert.

    >>> Stats(dispatches=3, wait_s=0.25)["dispatches"]
    3
    """

    def prometheus(self, **labels: object) -> str:
        """Write the counters in the text format of Prometheus, each with these labels and the prefix `moecomm_`.

        A tensor becomes one line per element, with the label `index`. Serve the text under /metrics with whatever HTTP
        server the program has, or write it to a file for the node exporter's textfile collector.

        Args:
            labels: name and value, as in rank=0, layer="3".

        >>> print(Stats(dispatches=3, bytes_remote=128, wait_s=0.25).prometheus(rank=1), end="")
        # TYPE moecomm_dispatches_total counter
        moecomm_dispatches_total{rank="1"} 3
        # TYPE moecomm_bytes_remote_total counter
        moecomm_bytes_remote_total{rank="1"} 128
        # TYPE moecomm_wait_seconds_total counter
        moecomm_wait_seconds_total{rank="1"} 0.25
        """
        lines = []
        for name, value in self.items():
            full, kind = _name(name)
            lines.append(f"# TYPE {full} {kind}")
            if isinstance(value, Tensor):
                numbers = enumerate(value.detach().cpu().flatten().tolist())
                lines += [f"{full}{_braces({**labels, 'index': index})} {number:g}" for index, number in numbers]
            else:
                lines.append(f"{full}{_braces(labels)} {value}")
        return "".join(line + "\n" for line in lines)


def _name(name: str) -> tuple[str, str]:
    """Name and kind by the rules of Prometheus: base units spelled out, `_total` behind what only rises."""
    rises = name.startswith(("rows_", "bytes_")) or name.endswith(_RISING)
    base = name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
    return f"moecomm_{base}{'_total' if rises else ''}", "counter" if rises else "gauge"


def _braces(labels: Mapping[str, object]) -> str:
    def escaped(value: object) -> str:
        return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inner = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""

"""Which rank keeps the others waiting: one line out of the per-peer wait times of `Buffer.stats()`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STANDS_OUT = 4.0  # times as long as the typical rank
_NOTABLE_S = 0.0005  # per step; less is what turns of a shared core take


def slow_rank(waited_s: Sequence[Tensor], steps: int) -> tuple[int | None, str]:
    """Say in one line for whom the others wait, and name a rank that stands out.

    Args:
        waited_s: of each rank the (W,) seconds that it waited for every other, `Buffer.stats()["waited_s"]`.
        steps: dispatches and combines, in pairs.

    Returns:
        The rank that stands out, or None; and the line.

    >>> slow_rank([torch.tensor([0.0, 0.1, 2.0]), torch.tensor([0.1, 0.0, 2.0]), torch.tensor([0.1, 0.1, 0.0])], 100)
    (2, 'rank 2 kept each other rank waiting 20.00 ms per step, the typical rank 1.00 ms')
    """
    table = torch.stack(list(waited_s)).double()
    world = len(table)
    if world == 1:
        return None, "one rank waits for nobody"
    mean_s = (table.sum(0) - table.diagonal()) / (world - 1) / steps
    typical = float(mean_s.sort().values[(world - 1) // 2])
    worst = int(mean_s.argmax())
    longest = float(mean_s[worst])
    stands_out = longest > _NOTABLE_S and longest > _STANDS_OUT * typical
    if not stands_out:
        return None, f"each rank waits {1e3 * typical:.2f} ms per step for another, at most {1e3 * longest:.2f} ms"
    text = f"kept each other rank waiting {1e3 * longest:.2f} ms per step, the typical rank {1e3 * typical:.2f} ms"
    return worst, f"rank {worst} {text}"

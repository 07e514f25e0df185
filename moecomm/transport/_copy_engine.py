"""Sending by the copy engines: kernels pack rows by destination in memory of this rank, copies move the blocks on.

The kernels that pack are those that push: only the addresses differ, so the bytes are the same. Where copies go depends
on the number of the operation, which is on the device, and after a wait that gave up nothing may be sent: so the host
looks before every send, and waits for the kernels of this rank until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor


@final
class CopyEngine:
    """The blocks on their way to every peer.

    views: every rank's buffer as (bytes,) uint8. peers: (2, FIELDS, W) addresses of their areas. each: whether rows
    come home one by one; then blocks hold M * K of them.
    """

    def __init__(self, transport: Any, views: Sequence[Tensor], peers: Tensor, each: bool) -> None:
        from moecomm.kernels.wire import COUNTS, FIELDS, META, ROWS, SIGNALS

        wire, link = transport.wire, transport.link
        self._transport, self._views = transport, views
        self._fields = int(ROWS), int(META), int(COUNTS)
        self._peers = peers - torch.tensor([view.data_ptr() for view in views])  # offsets into each view
        most = transport.max_tokens * (wire.top_k if each else 1)
        self._line_bytes = wire.row_bytes, 4 * wire.meta_words, 8 * wire.counts_width
        room = most, transport.max_tokens, 1  # lines of each field for one destination
        sizes = [-(-lines * nbytes // 256) * 256 for lines, nbytes in zip(room, self._line_bytes, strict=True)]
        self._memory = torch.zeros(wire.world, sum(sizes) + 256, dtype=torch.uint8, device=transport.device)
        self._starts = [0, sizes[0], sizes[0] + sizes[1]]
        state = torch.zeros_like(link.state)
        self._links = {}
        for block in {transport.max_tokens, most}:  # kernels add this rank's block to what the table says
            table = torch.empty(2, FIELDS, wire.world, dtype=torch.int64)
            for field, lines in zip(self._fields, (block, transport.max_tokens, 1), strict=True):
                skipped = link.rank * lines * self._line_bytes[field]
                table[:, field] = self._block_addresses(self._starts[field]) - skipped
            table[:, int(SIGNALS)] = self._block_addresses(sum(sizes))  # nobody reads these words
            packing = link._replace(peers=table.to(transport.device), state=state, max_tokens=block)
            self._links[block] = packing

    def send(
        self,
        link: Any,
        push: Callable[[Any], None],
        num_rows: Callable[[], np.ndarray],
        *,
        block: int,
        planned: bool = False,
    ) -> None:
        """Pack with a kernel that pushes, copy, signal.

        push: launches it on the link that it is given. num_rows: gives (W,) rows for each rank, once they are known.
        block: rows of each source at its destination. planned: whether metadata and counts go along.
        """
        from moecomm.kernels.sync import signal

        transport = self._transport
        push(self._links[block]._replace(tag=link.tag))
        transport.await_own("send", transport.mark())
        generation = (transport.seq + 1) & 1
        for rank, count in enumerate(num_rows().tolist()):
            lines = (count, count, 1) if planned else (count, 0, 0)
            for field, first, number in zip(self._fields, (block, transport.max_tokens, 1), lines, strict=True):
                self._copy(generation, field, rank, first * link.rank, number)
        signal(link, transport.wire)

    def _copy(self, generation: int, field: int, rank: int, first: int, lines: int) -> None:
        """Copy lines of this rank's block for a rank into that rank's area, from line `first` on."""
        nbytes = lines * self._line_bytes[field]
        if nbytes:
            at = int(self._peers[generation, field, rank]) + first * self._line_bytes[field]
            source = self._memory[rank, self._starts[field] :][:nbytes]
            self._views[rank][at : at + nbytes].copy_(source, non_blocking=True)

    def _block_addresses(self, start: int) -> Tensor:
        return torch.tensor([block.data_ptr() + start for block in self._memory])

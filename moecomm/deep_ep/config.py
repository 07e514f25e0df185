"""`Config`: what steers DeepEP's kernels. Here it is kept, checked, and answers how many bytes those would need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from moecomm.deep_ep.refusals import demand

NVL_PEERS = 8  # ranks that DeepEP takes for one node
_TOP_K, _SCALES, _META_BYTES = 128, 128, 8  # what its size hints leave room for in every row
_IDX_BYTES, _WEIGHT_BYTES, _SCALE_BYTES, _INT_BYTES = 8, 4, 4, 4
_VECTOR_BYTES = 16


@final
@dataclass(slots=True)
class Config:
    """Chunk sizes of DeepEP's queues; none has an effect here, where there are no queues.

    num_sms: even. num_max_*_chunked_send_tokens: sent at once. num_max_*_chunked_recv_tokens: room at the receiver.

    Raises:
        ConfigError: a count below 1, or a chunk that its receiver has no room for.

    >>> Config(20, 6, 256).get_nvl_buffer_size_hint(hidden_bytes=14336, num_ranks=8)
    335709824
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            demand(isinstance(value, int) and value >= 1, f"{name} is no count", got=repr(value), expected="at least 1")
        sent, room = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        demand(sent < room, "num_max_nvl_chunked_send_tokens is too large", got=sent, expected=f"below {room}")
        sent, room = self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens
        demand(sent < room, "num_max_rdma_chunked_send_tokens is too large", got=sent, expected=f"below {room}")
        room = self.num_max_rdma_chunked_recv_tokens = -(-room // sent) * sent
        what = "num_max_rdma_chunked_send_tokens is too large"
        demand(2 * sent <= room, what, got=sent, expected=f"at most half of {room}")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for rows of hidden_bytes between the ranks of a node; a multiple of 128."""
        _check_hint(hidden_bytes, num_ranks)
        nodes, peers = max(num_ranks // NVL_PEERS, 1), min(num_ranks, NVL_PEERS)
        queues = self.num_sms // 2 * peers
        rows = queues * self.num_max_nvl_chunked_recv_tokens
        return _lines(queues * (2 * nodes + 3) * _INT_BYTES + rows * _row_bytes(hidden_bytes))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for rows of hidden_bytes between nodes, 0 where there is one; a multiple of 128."""
        _check_hint(hidden_bytes, num_ranks)
        if num_ranks <= NVL_PEERS:
            return 0
        queues = self.num_sms // 2 * (num_ranks // NVL_PEERS)
        rows = queues * self.num_max_rdma_chunked_recv_tokens
        flags = queues * (2 * NVL_PEERS + 2) * _INT_BYTES
        return _lines(2 * (flags + rows * (_row_bytes(hidden_bytes) + _VECTOR_BYTES)))


def low_latency_size_hint(num_max: int, hidden: int, num_experts: int) -> int:
    """Bytes of DeepEP's low-latency buffers: two of each, for sending, receiving and signalling.

    >>> low_latency_size_hint(128, 7168, 256), low_latency_size_hint(128, 7168, 288)
    (1908410496, 2146961792)
    """
    scales = 4 * -(-hidden // 128)
    dispatch, combine = _VECTOR_BYTES + max(2 * hidden, hidden + scales), scales + 2 * hidden
    send, recv = (
        max(num_max * dispatch, num_experts * num_max * combine),
        num_experts * num_max * max(dispatch, combine),
    )
    return _lines(2 * (send + recv + _lines(num_experts * _INT_BYTES)) + 1)  # at least one byte is left over


# Ranks: (nvl send, nvl recv, rdma send, rdma recv).
DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    **dict.fromkeys((24, 32, 48, 64), (32, 288, 8, 128)),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    **dict.fromkeys((24, 32, 48, 64), (1, 288, 8, 128)),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    **dict.fromkeys((144, 160), (2, 720, 8, 128)),
}


def preset(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    """The config of the next larger number of ranks that the table has, or of the largest.

    >>> preset(DISPATCH, 3, 20).num_max_nvl_chunked_send_tokens
    6
    """
    demand(isinstance(num_ranks, int) and num_ranks >= 1, "num_ranks is no count", got=repr(num_ranks), expected=">= 1")
    return Config(num_sms, *table[next((known for known in sorted(table) if known >= num_ranks), max(table))])


def _row_bytes(hidden_bytes: int) -> int:
    return hidden_bytes + _META_BYTES + _TOP_K * (_IDX_BYTES + _WEIGHT_BYTES) + _SCALES * _SCALE_BYTES


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


def _check_hint(hidden_bytes: int, num_ranks: int) -> None:
    for name, value in (("hidden_bytes", hidden_bytes), ("num_ranks", num_ranks)):
        demand(isinstance(value, int) and value >= 1, f"{name} is no count", got=repr(value), expected="at least 1")

"""Layout "padded": static shapes, no count exchange, one wave per operation. For decoding; see docs/design/decode.md."""

from moecomm.padded.operations import PaddedOperations

__all__ = ["PaddedOperations"]

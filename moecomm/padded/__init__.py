"""Layout "padded", for decoding: static shapes, no count exchange, one wave per operation (docs/design/decode.md)."""

from moecomm.padded.operations import PaddedOperations

__all__ = ["PaddedOperations"]

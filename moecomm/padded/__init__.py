"""Layout "padded", for decoding: static shapes, no count exchange, one wave per operation (docs/design/decode.md)."""

from moecomm.padded.operations import PaddedOperations, refuse_options

__all__ = ["PaddedOperations", "refuse_options"]

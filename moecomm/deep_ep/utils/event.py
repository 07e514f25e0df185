"""The module in which DeepEP has its events."""

from moecomm.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]

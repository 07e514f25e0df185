"""The version of moecomm, in one place."""

__version__ = "0.1.0"

"""The environment variables of moecomm; the only place that reads them."""

from __future__ import annotations

import os

from moecomm.errors import ConfigError

# name -> (default, meaning); both are printed by `python -m moecomm info`.
VARIABLES = {
    "MOECOMM_TIMEOUT_S": ("60", "deadline of every wait in seconds, where the constructor gives none"),
    "MOECOMM_TRANSPORT": ("auto", "transport, where the constructor leaves it at auto"),
    "MOECOMM_RANKS_PER_NODE": ("", "pretend that every so many consecutive ranks form one node (tests)"),
}


def _read(name: str) -> str:
    return os.environ.get(name, VARIABLES[name][0])


def timeout_s() -> float:
    """Default deadline in seconds."""
    text = _read("MOECOMM_TIMEOUT_S")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError("MOECOMM_TIMEOUT_S is no deadline", got=repr(text), expected="a positive number of seconds")
    return value


def transport() -> str:
    """Transport name that replaces "auto"."""
    return _read("MOECOMM_TRANSPORT")


def ranks_per_node() -> int | None:
    """Ranks per pretended node, or None to detect nodes."""
    text = _read("MOECOMM_RANKS_PER_NODE")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("MOECOMM_RANKS_PER_NODE is no rank count", got=repr(text), expected="a positive integer")
    return int(text)


def interprets_kernels() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU; it reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "yes", "on", "y")


def allows_shared_devices() -> bool:
    """Whether torch lets several ranks have symmetric memory on one device; meant for tests."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0") == "1"

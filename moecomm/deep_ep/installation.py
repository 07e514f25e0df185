"""Stand in for `deep_ep`: in this process, and in those that a script starts."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from pathlib import Path

from moecomm.errors import ConfigError

_NAME, _OURS = "deep_ep", "moecomm.deep_ep"
# `deep_ep` as a package for processes that know of nothing: importing it installs this one in its place.
SHIM = Path(__file__).parent / "shim"


def install() -> None:
    """Make `import deep_ep` give `moecomm.deep_ep`, with all its modules; idempotent.

    Raises:
        ConfigError: another deep_ep has been imported.

    >>> install()
    >>> import deep_ep, deep_ep.utils.math
    >>> deep_ep.__name__
    'moecomm.deep_ep'
    """
    ours = importlib.import_module(_OURS)
    there = sys.modules.get(_NAME)
    if there not in (None, ours) and str(SHIM) not in str(getattr(there, "__file__", "")):
        raise ConfigError(
            "another deep_ep has been imported",
            got=getattr(there, "__file__", repr(there)),
            expected="none before install()",
            remedy="call moecomm.deep_ep.install() first",
        )
    for found in pkgutil.walk_packages(ours.__path__, _OURS + "."):
        if not found.name.startswith((f"{_OURS}.shim", f"{_OURS}.__main__")):
            importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name == _OURS or name.startswith(_OURS + "."):
            sys.modules[_NAME + name.removeprefix(_OURS)] = module


def pass_on() -> None:
    """Let `import deep_ep` work in processes started from here, however they are started."""
    path = str(SHIM)
    if path not in sys.path:
        sys.path.insert(0, path)  # spawned ones inherit it
    before = dict(os.environ).get("PYTHONPATH")  # not read, but handed on
    if path not in (before or "").split(os.pathsep):
        os.environ["PYTHONPATH"] = path if not before else os.pathsep.join((path, before))

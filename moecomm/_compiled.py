"""The loops in machine code, where they can be had: modules that need llvmlite, imported when first asked for."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def compiled(module: str) -> ModuleType | None:
    """A module of kernels, or None without llvmlite; `why_not` then says more. `import moecomm` does not pay for it.

    >>> compiled("moecomm._rows_jit") is compiled("moecomm._rows_jit")
    True
    """
    return None if why_not() else importlib.import_module(module)


@cache
def why_not() -> str:
    """The reason why nothing can be compiled here, or "".

    >>> isinstance(why_not(), str)
    True
    """
    try:
        importlib.import_module("moecomm._jit")
    except ImportError as error:
        return f"llvmlite is not usable: {error}"
    return ""

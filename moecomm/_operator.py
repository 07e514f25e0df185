"""Make functions operators of torch without loading its compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def operator(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make `fn` the operator moecomm::<its name>.

    `torch.library.custom_op` does the same, and imports the compiler of torch at the first call to keep out of its way.
    That takes a second or two of every process; here it is kept out once somebody else has imported it.
    """
    name = "moecomm::" + fn.__name__.removesuffix("_now")

    @cache
    def untraced() -> Callable[..., Any]:
        return sys.modules["torch._dynamo"].disable(fn)

    @wraps(fn)
    def call(*args: Any) -> Any:
        return untraced()(*args) if "torch._dynamo" in sys.modules else fn(*args)

    torch.library.define(name, torch.library.infer_schema(fn, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", call)
    return fn

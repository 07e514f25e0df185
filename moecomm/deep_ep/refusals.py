"""How this package says no: before anything is sent, with what was got and what is accepted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from moecomm.errors import ConfigError, UnsupportedError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


def demand(holds: bool, what: str, *, got: object, expected: object, remedy: str | None = None) -> None:
    """Refuse an argument unless it holds.

    >>> try:
    ...     demand(1 > 2, "num_sms is odd", got=3, expected="an even number")
    ... except ConfigError as error:
    ...     print(error)
    num_sms is odd: got 3; expected an even number
    """
    if not holds:
        raise ConfigError(what, got=got, expected=expected, remedy=remedy)


def demand_count(name: str, value: Any) -> None:
    """Refuse what is no integer of at least 1."""
    if not isinstance(value, int) or value < 1:
        demand(False, f"{name} is no count", got=repr(value), expected="at least 1")


def demand_tensor(name: str, value: Any, *shape: int | None, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    """Refuse what is no tensor of that shape (None: any length) and one of those dtypes."""
    if isinstance(value, Tensor) and value.ndim == len(shape) and (not dtypes or value.dtype in dtypes):
        for want, have in zip(shape, value.shape, strict=True):
            if want is not None and want != have:
                break
        else:
            return value
    demand(isinstance(value, Tensor), f"{name} is no tensor", got=type(value).__name__, expected="a torch.Tensor")
    fits = value.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, value.shape, strict=True))
    expected = f"({', '.join('any' if want is None else str(want) for want in shape)})"
    demand(fits, f"{name} has the wrong shape", got=tuple(value.shape), expected=expected)
    accepted = " or ".join(map(str, dtypes))
    demand(not dtypes or value.dtype in dtypes, f"{name} has the wrong dtype", got=value.dtype, expected=accepted)
    return value


def demand_streams(
    previous_event: object, asynchronous: bool, allocate_on_comm_stream: bool, *, name: str = "async_finish"
) -> None:
    """Memory for another stream may be had only where the caller says what it waits for and will wait himself."""
    if allocate_on_comm_stream and (previous_event is None or not asynchronous):
        demand(
            False,
            f"allocate_on_comm_stream needs previous_event and {name}",
            got=f"previous_event={previous_event!r}, {name}={asynchronous}",
            expected="both, or allocate_on_comm_stream=False",
        )


def unsupported(what: str) -> UnsupportedError:
    """What is listed as not supported in docs/deep_ep.md."""
    return UnsupportedError(f"{what} is not supported", remedy="see the table in docs/deep_ep.md")


def _refuse(name: str) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise unsupported(name)

    refuse.__name__, refuse.__doc__ = name, f"Not supported: raises UnsupportedError. ({name})"
    return refuse


class NotThere:
    """Methods of DeepEP's second API that raise `UnsupportedError`: Engram, PP and all-gather sessions."""

    get_engram_storage_size_hint = staticmethod(_refuse("get_engram_storage_size_hint"))
    engram_write = _refuse("engram_write")
    engram_fetch = _refuse("engram_fetch")
    get_pp_buffer_size_hint = staticmethod(_refuse("get_pp_buffer_size_hint"))
    pp_set_config = _refuse("pp_set_config")
    pp_send = _refuse("pp_send")
    pp_recv = _refuse("pp_recv")
    get_agrs_num_max_session_bytes = staticmethod(_refuse("get_agrs_num_max_session_bytes"))
    get_agrs_buffer_size_hint = staticmethod(_refuse("get_agrs_buffer_size_hint"))
    agrs_set_config = _refuse("agrs_set_config")
    create_agrs_session = _refuse("create_agrs_session")
    destroy_agrs_session = _refuse("destroy_agrs_session")
    agrs_new_session = _refuse("agrs_new_session")
    agrs_get_inplace_tensor = _refuse("agrs_get_inplace_tensor")
    all_gather = _refuse("all_gather")

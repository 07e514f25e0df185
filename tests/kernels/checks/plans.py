"""What functions of Triton's language do in the interpreter, noted at their first call and repeated from then on.

What such a function makes of its operands depends on their types and on constants, not on numbers: it ends in calls of
the builder, which are the same where types and constants are. Repeating them spares all that comes before. The builder
is Triton's own: it loads, computes and stores. A function that does look at a number, or does anything else that cannot
be noted, is called each time as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import triton.language.core as core
import triton.runtime.interpreter as interpreter

_MOST_PLANS = 50_000
_SIMPLE = frozenset((int, bool, str, type(None)))  # of these, equal ones of one class are the same
# Parts of the names of calls that are made each time, whatever they are given; others give constants for constants.
_LIVE = ("program", "load", "store", "atomic", "assert", "assume", "barrier", "print")
_UNKNOWN = object()
_Place = tuple[int, int]  # among operands (0), constants (1) or what calls gave (2), and the how-manieth of these


_plans: dict[Any, Any] = {}  # False: there is none, the function has to be called each time
_named: list[Any] = []  # whatever a key of `_plans` has the address of
_noting: list[_Notes] = []


def planned(function: Any, **given: Any) -> Any:
    """A function that calls another one, with options of its own, when it has no plan for such operands yet."""
    tensor, simple, plan_of = core.tensor, _SIMPLE, _plans.get

    def called(*args: Any, **options: Any) -> Any:
        if _noting:
            return function(*args, **(options | given))
        key, handles = [function], []
        for value in args:
            kind = value.__class__
            if kind is tensor:
                key.append(id(value.type))
                handles.append(value.handle)
            elif kind in simple:
                key += kind, value
            else:
                key.append(_described(value))
        if options:
            for name, value in options.items():
                if value.__class__ is tensor:
                    key += name, id(value.type)
                    handles.append(value.handle)
                else:
                    key += name, _described(value)
        of = tuple(key)
        plan = plan_of(of)
        if plan:
            return plan(*handles)
        if plan is False or _UNKNOWN in key:
            return function(*args, **(options | given))
        if len(_plans) >= _MOST_PLANS:
            forget()
        _named.append([value.type if value.__class__ is tensor else value for value in (*args, *options.values())])
        result, _plans[of] = _Notes().take(function, args, options, given)
        return result

    return called


def forget() -> None:
    """All plans: what they rest on has changed."""
    _plans.clear()
    _named.clear()


def _described(value: Any) -> Any:
    """Equal for constants that are alike to the last bit."""
    kind = value.__class__
    if kind in _SIMPLE:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if isinstance(value, core.dtype):
        return core.dtype, id(value)
    if kind is core.constexpr:
        parts = [value.value]
    elif kind is slice:
        parts = [value.start, value.stop, value.step]
    elif isinstance(value, (tuple, list, core.tuple)):
        parts = list(value)
    else:
        return _UNKNOWN
    parts = [_described(part) for part in parts]
    return _UNKNOWN if _UNKNOWN in parts else (kind, *parts)


class _Watched(interpreter.TensorHandle):
    """A handle whose numbers are for the builder only: it is noted when something else looks at them."""

    def __init__(self, handle: Any, notes: _Notes) -> None:
        self.handle, self.notes, self.dtype, self.attr = handle, notes, handle.dtype, handle.attr

    @property
    def data(self) -> Any:
        self.notes.complete &= self.notes.building
        return self.handle.data


class _Notes:
    """Stands for the builder while a function is called for the first time."""

    def __init__(self) -> None:
        self.builder, self.building, self.complete = interpreter.interpreter_builder, False, True
        self.places: dict[int, tuple[_Place, Any]] = {}  # of handles by address; they stay, so that addresses do
        self.num_operands = 0
        self.constants: list[Any] = []
        self.calls: list[tuple[str, list[_Place]]] = []

    def take(self, function: Any, args: Any, options: Any, given: Any) -> tuple[Any, Any]:
        """Call the function; what it gives, and the plan of it, False if it has to be called each time."""
        args, options = [self.watch(value) for value in args], {name: self.watch(v) for name, v in options.items()}
        semantic = interpreter.interpreter_semantic
        _noting.append(self)
        semantic.builder = self
        try:
            result = function(*args, **(options | given))
        finally:
            semantic.builder = self.builder
            _noting.clear()
        if result is None:
            return None, self.plan(None, None)
        if result.__class__ is not core.tensor:
            return result, False
        handle, plan = result.handle, self.plan(self.place(result.handle), result.type)
        return core.tensor(handle.handle if isinstance(handle, _Watched) else handle, result.type), plan

    def watch(self, value: Any) -> Any:
        """The operand, watched."""
        if value.__class__ is not core.tensor:
            return value
        self.num_operands += 1
        return core.tensor(self.known(_Watched(value.handle, self), (0, self.num_operands - 1)), value.type)

    def known(self, handle: Any, place: _Place) -> Any:
        self.places[id(handle)] = place, handle
        return handle

    def place(self, argument: Any) -> _Place:
        """Where an argument of a call comes from."""
        if id(argument) in self.places:
            return self.places[id(argument)][0]
        parts = argument if isinstance(argument, (list, tuple)) else (argument,)
        self.complete &= not any(isinstance(part, interpreter.TensorHandle) for part in parts)  # made by somebody else
        self.constants.append(argument)
        return 1, len(self.constants) - 1

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        return (lambda *arguments: self.call(name, member, arguments)) if callable(member) else member

    def call(self, name: str, member: Any, arguments: tuple[Any, ...]) -> Any:
        """Make a call, and note it."""
        self.building = True
        try:
            result = member(*arguments)
        finally:
            self.building = False
        gives_numbers = isinstance(result, interpreter.TensorHandle)
        if not gives_numbers and name.startswith("get_"):  # types and the like: nothing happens
            return result
        places = [self.place(argument) for argument in arguments]
        is_constant = not any(part in name for part in _LIVE) and all(kind == 1 for kind, _ in places)
        if gives_numbers and is_constant:
            result.data.flags.writeable = False
            self.constants.append(result)
            return self.known(result, (1, len(self.constants) - 1))
        self.calls.append((name, places))
        self.complete &= result is None or gives_numbers
        at = 2, len(self.calls) - 1
        return self.known(_Watched(result, self), at) if gives_numbers else result

    def plan(self, place: _Place | None, type: Any) -> Any:
        """What was noted, if that was all, as a function of the handles of the operands."""
        if not self.complete:
            return False
        calls = tuple((name, tuple(places)) for name, places in self.calls)
        make = _compiled(self.num_operands, len(self.constants), calls, place)
        return make(type, core.tensor, self.builder, *self.constants)


@functools.cache
def _compiled(num_operands: int, num_constants: int, calls: tuple[Any, ...], place: _Place | None) -> Any:
    """Given a type, `tensor`, the builder and constants: the function that makes calls, and gives a tensor or None."""
    lines = [f"{_name(2, i)} = builder.{name}({_names(places)})" for i, (name, places) in enumerate(calls)]
    lines.append("return None" if place is None else f"return tensor({_name(*place)}, type)")
    constants = _names([(1, i) for i in range(num_constants)])
    operands = _names([(0, i) for i in range(num_operands)])
    text = f"def given(type, tensor, builder, {constants}):\n def plan({operands}):\n  "
    scope: dict[str, Any] = {}
    exec(text + "\n  ".join(lines) + "\n return plan", scope)
    return scope["given"]


def _name(kind: int, at: int) -> str:
    return f"{'ocr'[kind]}{at}"


def _names(places: Iterable[_Place]) -> str:
    return ", ".join(_name(*place) for place in places)

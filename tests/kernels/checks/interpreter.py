"""A quicker interpreter: what Triton's works out again and again about languages and types, worked out once.

Nothing here touches a value: numbers are loaded, computed and stored by Triton's own code. `check_plain.py` runs a case
in the interpreter as it comes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import triton.language.core as core
import triton.runtime.interpreter as interpreter

_CLOSED = frozenset(("int1", "int8", "uint8", "int16", "int32", "int64", "uint64", "fp32", "fp64"))  # under operations
_INTEGERS = frozenset(("int32", "int64"))
_BITS = _INTEGERS | {"int1"}


@functools.cache
def hurry() -> None:
    """Patch the interpreter to be about five times as fast."""
    _prepare_once()
    _know_types()
    _know_what_operations_give()
    _know_shapes()
    _check_sizes_once()
    _combine_directly()


@functools.cache
def yield_while_polling() -> None:
    """Have every atomic operation of the interpreter that acquires give way to other processes."""
    builder = interpreter.interpreter_builder
    plain = builder.create_atomic_rmw

    def give_way(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if str(sem).endswith("ACQUIRE"):
            time.sleep(0.0002)
        return plain(operation, pointer, value, mask, sem, scope)

    builder.create_atomic_rmw = give_way


def check_overflow(wanted: bool) -> None:
    """Have the interpreter check every integer operation for overflow, or not: that halves its speed."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


def _prepare_once() -> None:
    """`triton.language` is patched once and stays so, not in every launch and every call of a device function."""
    prepare = interpreter._patch_lang
    languages: dict[Any, frozenset[int]] = {}
    prepared: set[frozenset[int]] = set()

    class Nothing:
        def restore(self) -> None:
            return

    def prepare_once(function: Any) -> Any:
        seen = languages.get(function)
        if seen is None:
            values = function.__globals__.values()
            seen = frozenset(id(value) for value in values if value is interpreter.tl or value is core)
            languages[function] = seen
        if seen not in prepared:
            prepared.add(seen)
            prepare(function)
        return Nothing()

    def pass_semantic(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", member)  # without the check that it is called from a kernel

        def called(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **options)

        scope.set_attr(owner, name, called)

    interpreter._patch_lang, interpreter._patch_attr = prepare_once, pass_semantic


def _know_types() -> None:
    """One object per block type, which knows what tensors of that type share; types are compared by identity first."""
    unwrap, start, equal, build = core._unwrap_if_constexpr, core.tensor.__init__, core.dtype.__eq__, _build_block_type
    plain = frozenset((int, bool, float, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type))
    number_types: dict[str, Any] = {}
    number_type = interpreter._get_np_dtype

    def unwrap_quickly(value: Any) -> Any:
        kind = value.__class__
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    def start_known(self: Any, handle: Any, type: Any) -> None:
        shared = type.__dict__.get("_shared")
        if shared is None:
            start(self, handle, type)
            type._shared = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = shared

    def known_number_type(type: Any) -> Any:
        if type.name not in number_types:
            number_types[type.name] = number_type(type)
        return number_types[type.name]

    build(core.block_type)
    core._unwrap_if_constexpr = unwrap_quickly
    core.tensor.__init__ = start_known
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    interpreter._get_np_dtype = known_number_type


def _build_block_type(block_type: Any) -> None:
    plain, equal = block_type.__init__, block_type.__eq__
    known: dict[Any, Any] = {}

    def build(cls: Any, element_ty: Any, shape: Any) -> Any:
        sizes = [core._unwrap_if_constexpr(size) for size in shape]
        return made_of(element_ty, tuple(sizes))

    def made_of(element_ty: Any, sizes: tuple[int, ...]) -> Any:
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in known:
            made = object.__new__(block_type)
            plain(made, element_ty, list(sizes))
            made._sizes = sizes
            known[key] = made
        return known[key]

    block_type.__new__ = build
    block_type.__init__ = lambda self, element_ty, shape: None
    block_type.with_element_ty = lambda self, element_ty: made_of(element_ty, self._sizes)
    block_type.__eq__ = lambda self, other: self is other or equal(self, other)


def _know_what_operations_give() -> None:
    """Operands of one type need no conversion; what two types have in common, and constants, are remembered."""
    semantic = interpreter.interpreter_semantic
    check, common, cast = semantic.binary_op_type_checking_impl, semantic.computation_type_impl, semantic.cast
    common_types: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}

    def check_quickly(lhs: Any, rhs: Any, *args: Any, **options: Any) -> Any:
        if lhs.__class__ is not core.tensor or lhs.dtype.name not in _CLOSED:
            return check(lhs, rhs, *args, **options)
        if rhs.__class__ is core.tensor:
            return (lhs, rhs) if lhs.type is rhs.type else check(lhs, rhs, *args, **options)
        if rhs.__class__ not in (int, bool):  # floats are not equal only where they are the same: -0.0 is 0.0
            return check(lhs, rhs, *args, **options)
        key = rhs.__class__, rhs, lhs.type.name, args, *options.items()
        if key not in constants:
            converted, made = check(lhs, rhs, *args, **options)
            made.handle.data.flags.writeable = False
            constants[key] = made if converted.type is lhs.type else None
        made = constants[key]
        return check(lhs, rhs, *args, **options) if made is None else (lhs, made)

    def known_common(a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, divides: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, divides
        if key not in common_types:
            common_types[key] = common(a, a_is_scalar, b, b_is_scalar, divides)
        return common_types[key]

    def cast_quickly(value: Any, to: Any, *args: Any, **options: Any) -> Any:
        if value.dtype is to:
            return value
        if value.dtype is core.int32 and to is core.int64:  # every offset of a row
            kind = value.type
            wide = kind.with_element_ty(to) if kind.__class__ is core.block_type else to
            return core.tensor(interpreter.interpreter_builder.create_int_cast(value.handle, to, True), wide)
        return cast(value, to, *args, **options)

    semantic.binary_op_type_checking_impl = check_quickly
    semantic.computation_type_impl = known_common
    semantic.cast = cast_quickly


def _know_shapes() -> None:
    """Operands of one shape are not brought into one."""
    broadcast = interpreter.interpreter_semantic.broadcast_impl_value

    def broadcast_quickly(lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        alike = a is b or getattr(a, "_sizes", None) == getattr(b, "_sizes", None)  # numbers have none
        return (lhs, rhs) if alike else broadcast(lhs, rhs)

    interpreter.interpreter_semantic.broadcast_impl_value = broadcast_quickly


def _check_sizes_once() -> None:
    """Whether numbers of one type fit into another is known after the first of them."""
    check = interpreter.TensorHandle.__post_init__
    fitting: set[Any] = set()

    def start(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        key = data.dtype, dtype.name
        if key not in fitting:
            check(self)
            fitting.add(key)

    interpreter.TensorHandle.__init__ = start


def _combine_directly() -> None:
    """Operators of two operands of one number type, and offsets of pointers, go straight to the builder."""
    builder = interpreter.interpreter_builder
    for names, numbers, gives_type in (
        ({"add": "add", "sub": "sub", "mul": "mul"}, _INTEGERS, _same_type),
        ({"and": "and", "or": "or"}, _BITS, _same_type),
        (
            {"lt": "icmpSLT", "le": "icmpSLE", "gt": "icmpSGT", "ge": "icmpSGE", "eq": "icmpEQ", "ne": "icmpNE"},
            _INTEGERS,
            _bool_type,
        ),
    ):
        for name, operation in names.items():
            create = getattr(builder, f"create_{operation}")
            _replace_operator(f"__{name}__", create, numbers, gives_type)


def _replace_operator(name: str, create: Any, numbers: frozenset[str], gives_type: Any) -> None:
    tensor, block, builder = core.tensor, core.block_type, interpreter.interpreter_builder
    semantic, plain = interpreter.interpreter_semantic, getattr(core.tensor, name)
    adds = name == "__add__"
    constants: dict[Any, Any] = {}

    def constant(self: Any, value: int) -> Any:
        key = self.dtype.name, value
        if key not in constants:
            constants[key] = semantic.scalar_constant(value, self.dtype) if -(2**31) <= value < 2**31 else None
        return constants[key]

    def combine(self: Any, other: Any) -> Any:
        if other.__class__ is core.constexpr:
            other = other.value
        if builder.options.sanitize_overflow:
            return plain(self, other, _semantic=semantic)
        if other.__class__ is int and self.dtype.name in numbers:
            made = constant(self, other)
            other = other if made is None else made
        if other.__class__ is not tensor:
            return plain(self, other, _semantic=semantic)
        a, b = self.type, other.type
        if a is b or b.__class__ is not block:
            wide = a
        elif a.__class__ is not block:
            wide = b
        else:
            return plain(self, other, _semantic=semantic)
        if self.dtype is other.dtype and self.dtype.name in numbers:
            return tensor(create(self.handle, other.handle), gives_type(wide))
        if adds and other.dtype.name in _INTEGERS and self.dtype.__class__ is core.pointer_type:
            kind = wide.with_element_ty(self.dtype) if wide.__class__ is block else self.dtype
            return tensor(builder.create_addptr(self.handle, other.handle), kind)
        return plain(self, other, _semantic=semantic)

    setattr(core.tensor, name, combine)


def _same_type(kind: Any) -> Any:
    return kind


def _bool_type(kind: Any) -> Any:
    return kind.with_element_ty(core.int1) if kind.__class__ is core.block_type else core.int1

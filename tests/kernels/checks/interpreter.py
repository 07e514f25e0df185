"""A quicker interpreter: what Triton's works out again and again about languages and types, worked out once.

Numbers are loaded, computed and stored as Triton's own code does it. `check_plain.py` compares both: it runs a case in
the interpreter as it comes, and single operations in this one and that one.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import numpy as np
import triton.language.core as core
import triton.runtime.interpreter as interpreter

from tests.kernels.checks.plans import forget, planned


@functools.cache
def hurry() -> None:
    """Patch the interpreter to be about ten times as fast."""
    _prepare_once()
    _know_types()
    _check_sizes_once()
    _compute_directly()
    _move_directly()
    _plan_assignments()


@functools.cache
def yield_while_polling() -> None:
    """Have every atomic operation of the interpreter that acquires give way to other processes."""
    builder = interpreter.interpreter_builder
    plain = builder.create_atomic_rmw

    polling: Any = None  # index of the program that acquired last

    def give_way(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        nonlocal polling
        if str(sem).endswith("ACQUIRE"):
            time.sleep(0.001 if polling is builder.grid_idx else 0)
            polling = builder.grid_idx
        return plain(operation, pointer, value, mask, sem, scope)

    builder.create_atomic_rmw = give_way


def check_overflow(wanted: bool) -> None:
    """Have the interpreter check every integer operation for overflow, or not: that halves its speed."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)
    forget()


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
        scope.set_attr(owner, name, planned(inner, _semantic=interpreter.interpreter_semantic))

    interpreter._patch_lang, interpreter._patch_attr = prepare_once, pass_semantic


def _know_types() -> None:
    """One object per block type, which knows what tensors of that type share; types are compared by identity first."""
    unwrap, start, equal = core._unwrap_if_constexpr, core.tensor.__init__, core.dtype.__eq__
    plain = frozenset((int, bool, float, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type))
    number_types: dict[str, Any] = {}
    number_type = interpreter._get_np_dtype

    def unwrap_quickly(value: Any) -> Any:
        kind = value.__class__
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    def start_known(self: Any, handle: Any, type: Any) -> None:
        try:
            self.shape, self.numel, self.dtype = type._shared
        except AttributeError:
            start(self, handle, type)
            type._shared = self.shape, self.numel, self.dtype
        self.handle, self.type = handle, type

    def known_number_type(type: Any) -> Any:
        if type.name not in number_types:
            number_types[type.name] = number_type(type)
        return number_types[type.name]

    _build_block_type(core.block_type)
    _build_pointer_type(core.pointer_type)
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


def _build_pointer_type(pointer_type: Any) -> None:
    plain = pointer_type.__init__
    known: dict[Any, Any] = {}

    def build(cls: Any, element_ty: Any, address_space: str = "global", const: bool = False) -> Any:
        element_ty = core._unwrap_if_constexpr(element_ty)
        key = element_ty.name, getattr(element_ty, "address_space", None), address_space, const
        if key not in known:
            known[key] = object.__new__(pointer_type)
            plain(known[key], element_ty, address_space, const)
        return known[key]

    pointer_type.__new__ = build
    pointer_type.__init__ = lambda self, element_ty, address_space="global", const=False: None


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


def _compute_directly() -> None:
    """Whether what an operation gives has to be made narrower is known after the first of its kind."""
    builder = interpreter.InterpreterBuilder
    plain, new, kind_of = builder.binary_op, object.__new__, interpreter.TensorHandle
    bitwise = np.bitwise_and, np.bitwise_or, np.bitwise_xor  # of which one bit makes one bit
    given: dict[Any, Any] = {}

    def compute(self: Any, lhs: Any, rhs: Any, operation: Any) -> Any:
        a, b = lhs.data, rhs.data
        key = operation, a.dtype, b.dtype, lhs.dtype.name
        kind = given.get(key)
        if kind is None:
            made = plain(self, lhs, rhs, operation)
            as_it_comes = operation(a, b).dtype == made.data.dtype and (a.dtype != bool or operation in bitwise)
            given[key] = made.dtype if as_it_comes else False
            return made
        if not kind:
            return plain(self, lhs, rhs, operation)
        made = new(kind_of)
        made.data, made.dtype, made.attr = operation(a, b), kind, {}
        return made

    builder.binary_op = compute


def _move_directly() -> None:
    """Arrays that are all of one number, or another view of the same numbers, without numpy's functions in Python."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    splat = builder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype != interpreter._get_np_dtype(arg.dtype):
            return splat(self, ret_ty, arg)
        made = np.empty(ret_ty.shape, arg.data.dtype)
        made[...] = arg.data
        return handle(made, arg.dtype.scalar)

    def create_broadcast(self: Any, arg: Any, shape: Any) -> Any:
        made = np.empty(shape, arg.data.dtype)
        made[...] = arg.data
        return handle(made, arg.dtype.scalar)

    def create_expand_dims(self: Any, arg: Any, axis: int) -> Any:
        return handle(arg.data[(slice(None),) * axis + (None,)], arg.dtype.scalar)

    def create_load(self: Any, ptr: Any, cache_policy: Any, is_volatile: bool) -> Any:
        mask = handle(np.ones(ptr.data.shape, bool), core.int1)
        return self.create_masked_load(ptr, mask, None, cache_policy, is_volatile)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: bool) -> Any:
        kind = ptrs.get_element_ty()
        numbers = interpreter._get_np_dtype(kind)
        others = np.zeros(ptrs.data.shape, numbers) if other is None else other.data
        return handle(interpreter._interpreter.load(ptrs.data, mask.data, others, numbers), kind)

    for function in (create_splat, create_broadcast, create_expand_dims, create_load, create_masked_load):
        setattr(builder, function.__name__, function)


def _plan_assignments() -> None:
    """What is assigned in a kernel is mostly a tensor already."""
    tensor, semantic = core.tensor, interpreter.interpreter_semantic
    make = planned(semantic.to_tensor)
    semantic.to_tensor = lambda value, check_type=True: value if value.__class__ is tensor else make(value, check_type)

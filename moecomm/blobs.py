"""Objects as bytes for other ranks, read without running what a stranger wrote.

Bytes travel through a key-value store, and whoever reaches the store of a job can write to it. So what comes from there
is unpickled with a short list of what it may name: containers, numbers, dtypes, arrays, tensors, data classes,
enumerations and errors of moecomm, and what this rank names itself in the same call. Anything else is refused before it
is called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor

from moecomm import errors

Global = tuple[str, str]  # module and name

_HARMLESS: frozenset[Global] = frozenset(
    {
        *(("builtins", name) for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
        *(("collections", name) for name in ("Counter", "OrderedDict", "deque")),
        *(("torch", name) for name in ("Size", "device")),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        *(("numpy", name) for name in ("dtype", "ndarray")),
        ("_codecs", "encode"),  # how numbers of numpy hold their bytes
        ("moecomm.blobs", "_tensor_of"),
        ("moecomm.errors", "_rebuild"),
    }
)


def dumps(obj: Any) -> bytes:
    """An object as bytes.

    >>> loads(dumps({"rows": torch.ones(2), "dtype": torch.bfloat16}))
    {'rows': tensor([1., 1.]), 'dtype': torch.bfloat16}
    """
    file = io.BytesIO()
    _Writer(file).dump(obj)
    return file.getvalue()


def loads(blob: bytes, also: Collection[Global] = ()) -> Any:
    """The object of these bytes; also: what they may name beside what is harmless.

    Raises:
        UnsupportedError: they name something else, or are no pickle.

    >>> loads(b"cos\\nsystem\\n(S'true'\\ntR.")
    Traceback (most recent call last):
    moecomm.errors.UnsupportedError: this is not taken from another rank: got os.system; ...
    """
    try:
        return _Reader(io.BytesIO(blob), frozenset(also)).load()
    except errors.UnsupportedError:
        raise
    except Exception as error:
        what = "these bytes of another rank are no object"
        raise errors.UnsupportedError(what, got=f"{type(error).__name__}: {error}") from None


def named_in(blob: bytes) -> frozenset[Global]:
    """What bytes that this rank wrote name, for `loads` of what others sent in the same call.

    >>> sorted(named_in(dumps(Exception)))
    [('builtins', 'Exception')]
    """
    recorder = _Recorder(io.BytesIO(blob))
    recorder.load()
    return frozenset(recorder.named)


@final
class _Writer(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Tensors as their bytes: what torch makes of them names a function that unpickles anything."""
        if not isinstance(obj, Tensor) or obj.layout is not torch.strided or obj.is_quantized:
            return NotImplemented
        flat = obj.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
        return _tensor_of, (flat.view(torch.uint8).numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _tensor_of(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


@final
class _Recorder(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.named: set[Global] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add((module, name))
        return super().find_class(module, name)


@final
class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, also: frozenset[Global]) -> None:
        super().__init__(file)
        self._allowed = _HARMLESS | also

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names, if that may be: a name with dots could go on from there to anything."""
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        found: Any = None
        if module == "torch" and "." not in name:
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
        elif module.partition(".")[0] == "moecomm" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, (Enum, errors.MoECommError))):
                return found
        raise errors.UnsupportedError(
            "this is not taken from another rank",
            got=f"{module}.{name}",
            expected="numbers, text, containers, arrays, tensors, or objects of classes that this rank sends itself",
        )

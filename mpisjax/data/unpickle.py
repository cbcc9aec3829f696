"""Reads the pickles of CIFAR's python version: containers, numbers, text, and NumPy arrays of bytes.

A pickle is a program that may call whatever it can name. This unpickler finds stand-ins for the few names that NumPy's
arrays need, and nothing else. It extends the Python version of `pickle.Unpickler`, because the C version reserves memory
for whatever number a file claims; opcodes that do so in Python too, or that such files do not need, are taken out.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from mpisjax.errors import UserError

_UNWANTED = (
    "PERSID BINPERSID INST OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4 EMPTY_SET ADDITEMS FROZENSET BYTEARRAY8 NEXT_BUFFER "
    "READONLY_BUFFER"
)


class _Dtype:
    """Stands in for `numpy.dtype`; only its code counts."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code


class _Array:
    """Stands in for an array that has no state yet."""

    value: np.ndarray | None = None


class _Unpickler(pickle._Unpickler):
    stack: list[Any]  # what `pickle` has and its type stubs leave out
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()
        if code not in {getattr(pickle, name)[0] for name in _UNWANTED.split()}
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin-1")
        self._room = len(
            content
        )  # for bytes that protocol 2 writes as text, so that no text is copied without end

    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            "numpy.core.multiarray _reconstruct": lambda *_: _Array(),
            "numpy._core.multiarray _reconstruct": lambda *_: _Array(),
            "numpy ndarray": None,
            "numpy dtype": _Dtype,
            "_codecs encode": self._encode,
            "__builtin__ bytes": lambda: b"",
        }
        if f"{module} {name}" not in stand_ins:
            raise pickle.UnpicklingError(f"the name {f'{module} {name}'[:80]!r}")
        return stand_ins[f"{module} {name}"]

    def _encode(self, text: str, _: str) -> bytes:
        self._room -= len(text)
        if self._room < 0:
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin-1")

    def load_build(self) -> None:
        """BUILD: only an array takes a state; a dtype's is left out, and nothing else may have one."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            target.value = _array_of_bytes(state)
        elif not isinstance(target, _Dtype):
            raise pickle.UnpicklingError("a state for something that is no array")

    def load_setitem(self) -> None:
        """SETITEM, for text as key alone: Python would crash on the hash of tuples that are nested deeply enough."""
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def load_setitems(self) -> None:
        """SETITEMS, likewise."""
        self._put(self.pop_mark())

    def load_dict(self) -> None:
        """DICT, likewise."""
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def _put(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or not all(isinstance(key, str | bytes) for key in items[::2]):
            raise pickle.UnpicklingError("a dictionary with keys other than text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }


def _array_of_bytes(state: Any) -> np.ndarray:
    """The uint8 array that a state of `numpy.ndarray.__setstate__` (version, shape, dtype, is_fortran, data) means."""
    _, shape, dtype, fortran, data = state
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1") or not isinstance(data, bytes):
        raise pickle.UnpicklingError("an array of something other than bytes")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 4:
        raise pickle.UnpicklingError("an array of impossible shape")
    if math.prod(shape) != len(data):
        raise pickle.UnpicklingError("an array that is truncated")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def unpickle(content: bytes, name: str) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays, lists, numbers and text.

    Args:
        content: The pickle, from Python 2 or 3.
        name: What to call the file in an error.

    Returns:
        The dictionary. Its keys, and text and bytes of Python 2, are text (Latin-1); arrays are uint8.

    Raises:
        UserError: If it holds anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes within text
            result = _Unpickler(content).load()
    except (
        pickle.UnpicklingError, ValueError, LookupError, TypeError, OverflowError, AttributeError, EOFError, struct.error,
    ) as error:  # fmt: skip
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is not a pickle of plain arrays and lists ({why}): fetch the file again"
        ) from error
    if not isinstance(result, dict):
        raise UserError(f"{name} is not a pickled dictionary: fetch the file again")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else key: value.value
        if isinstance(value, _Array)
        else value
        for key, value in result.items()
    }

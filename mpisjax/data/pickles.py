"""Pickles of arrays and lists, such as those of CIFAR, read without trust.

A pickle is a program that may call whatever it can name. Ours names stand-ins for NumPy's arrays and nothing else. It
is run by Python's unpickler in Python, whose memo is a dict: the one in C makes a memo of any size that a file claims.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from mpisjax.errors import UserError


class _Dtype:
    """Stands in for `numpy.dtype`; only its code counts."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and the like, which bytes do not have."""


class _Array:
    """Stands in for a `numpy.ndarray` of bytes; `value` is it."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Takes (version, shape, dtype, is_fortran, data)."""
        _, shape, dtype, fortran, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1") or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of something other than bytes")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 4:
            raise pickle.UnpicklingError("an array of impossible shape")
        if math.prod(shape) != len(data):
            raise pickle.UnpicklingError("an array that is truncated")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


_LOAD = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
# A bytearray is made as large as the file claims, before it is read. A set hashes whatever it is given.
_REFUSED = {code[0] for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)}


def _with_text_for_keys(code: bytes, keys: slice) -> dict[int, Callable[[Any], None]]:
    """An opcode that fills a dict. The keys lie on the stack; the hash of a deep tuple would end the process."""

    def load(unpickler: Any) -> None:
        if not all(isinstance(key, str | bytes) for key in unpickler.stack[keys]):
            raise pickle.UnpicklingError("keys other than text")
        _LOAD[code[0]](unpickler)

    return {code[0]: load}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    dispatch: ClassVar = {
        **{code: load for code, load in _LOAD.items() if code not in _REFUSED},
        **_with_text_for_keys(pickle.SETITEM, slice(-2, -1)),
        **_with_text_for_keys(pickle.SETITEMS, slice(0, None, 2)),
        **_with_text_for_keys(pickle.DICT, slice(0, None, 2)),
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin-1")
        self._room = len(content)  # for bytes, which protocol 2 writes as text

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
    except Exception as error:  # a damaged pickle makes Python raise whatever it likes
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{name} is not a pickle of plain arrays and lists ({why}): fetch the file again") from error
    if not isinstance(result, dict) or not all(isinstance(key, str | bytes) for key in result):
        raise UserError(f"{name} is not a pickled dictionary with text as keys: fetch the file again")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else key: value.value if isinstance(value, _Array) else value
        for key, value in result.items()
    }

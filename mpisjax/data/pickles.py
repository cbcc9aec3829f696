"""Reads the pickles of the python version of CIFAR without unpickling.

A pickle is a program, and running one from elsewhere is running its author's code. This reads the handful of
instructions that those files consist of (see `pickletools`): containers, numbers, text, bytes, and NumPy arrays of
bytes. Names such as `numpy.ndarray` are compared with those expected and never looked up, nothing is called, and
whatever else occurs is an error. Memory stays within a small multiple of the file's size.
"""

from __future__ import annotations

import io
import math
import pickletools
import warnings
from typing import Any

import numpy as np

from mpisjax.errors import UserError


class _Name(str):
    """A global that is known by name only."""


class _Mark:
    """Where a run of items begins on the stack."""


class _Dtype:
    """What `numpy.dtype(...)` would give."""

    def __init__(self, code: Any) -> None:
        self.code = code


class _Array:
    """What `numpy._reconstruct(...)` would give, before and after its state is set."""

    value: np.ndarray | None = None


_ARRAY_MAKERS = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_KNOWN = _ARRAY_MAKERS | {"numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ bytes"}
_PUSH = {
    "BININT", "BININT1", "BININT2", "INT", "LONG1", "BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}


class Unexpected(Exception):
    """An instruction, or an operand, that such a file does not have."""


def load(content: bytes, name: str) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays, lists, numbers and text.

    Args:
        content: The pickle, of protocol 0 to 4, from Python 2 or 3.
        name: What to call the file in an error.

    Returns:
        The dictionary. Text and bytes of Python 2 are text here (Latin-1); arrays are uint8.

    Raises:
        UserError: If it holds anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes within text, from pickletools
            result = _Machine().run(content)
    except (Unexpected, ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{name} is not a pickle of plain arrays and lists ({error}): fetch the file again"
        ) from error
    if not isinstance(result, dict):
        raise UserError(f"{name} is not a pickled dictionary: fetch the file again")
    return {_text(key): _plain(value) for key, value in result.items()}


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


class _Machine:
    """The stack machine of the pickle format, less everything that runs code."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise Unexpected("no STOP")

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Those that only push are told by table, the others by method."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            if count > len(self.stack):
                raise Unexpected("a tuple of missing items")
            items = [self.stack.pop() for _ in range(count)]
            self.stack.append(tuple(reversed(items)))
        elif name not in _IGNORED:
            method = getattr(self, "do_" + name.lower(), None)
            if method is None:
                raise Unexpected(f"instruction {name}")
            method(argument)

    def do_mark(self, _: Any) -> None:
        self.stack.append(_Mark())

    def do_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def do_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.popped_to_mark()))

    def do_list(self, _: Any) -> None:
        self.stack.append(self.popped_to_mark())

    def do_dict(self, _: Any) -> None:
        items = self.popped_to_mark()
        self.stack.append({})
        self.put_items(items)

    def do_append(self, _: Any) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def do_appends(self, _: Any) -> None:
        items = self.popped_to_mark()
        self.top(list).extend(items)

    def do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put_items([key, value])

    def do_setitems(self, _: Any) -> None:
        self.put_items(self.popped_to_mark())

    def put_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2 or not all(isinstance(key, (str, bytes)) for key in items[::2]):
            raise Unexpected("a dictionary with keys other than text")
        target.update(zip(items[::2], items[1::2], strict=True))

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def do_get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    do_binput = do_long_binput = do_put
    do_binget = do_long_binget = do_get

    def do_global(self, argument: str) -> None:
        self.push_name(argument)

    def do_stack_global(self, _: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.push_name(f"{module} {attribute}")

    def push_name(self, name: str) -> None:
        if name not in _KNOWN:
            raise Unexpected(f"the name {name[:80]!r}")
        self.stack.append(_Name(name))

    def do_reduce(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise Unexpected("a call of something that is no known name")
        if name in _ARRAY_MAKERS and arguments[:1] == ("numpy ndarray",):
            self.stack.append(_Array())
        elif name == "numpy dtype":
            self.stack.append(_Dtype(_text(arguments[0])))
        elif (
            name == "_codecs encode" and _text(arguments[1]) == "latin1"
        ):  # how protocol 2 writes Python 3's bytes
            self.stack.append(arguments[0].encode("latin-1"))
        elif name == "__builtin__ bytes" and arguments == ():
            self.stack.append(b"")
        else:
            raise Unexpected(f"a call of {name}")

    def do_build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Array):
            target.value = _bytes_array(state)
        elif not isinstance(target, _Dtype):
            raise Unexpected("a state for something that is no array")

    def popped_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[place], _Mark):
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise Unexpected("no mark")

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Unexpected(f"no {kind.__name__} where one is needed")
        return self.stack[-1]


def _bytes_array(state: Any) -> np.ndarray:
    """The uint8 array that a state of `numpy.ndarray.__setstate__` (version, shape, dtype, is_fortran, data) means."""
    _, shape, dtype, fortran, data = state
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1") or not isinstance(data, bytes):
        raise Unexpected("an array of something other than bytes")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 4:
        raise Unexpected("an array of impossible shape")
    if math.prod(shape) != len(data):
        raise Unexpected("an array that is truncated")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")

"""Operators as ``ops/edgekit_op.h`` has them, for Python: those that a library lists, and kernels in Python."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError

# numpy's names of the types in edgekit_op.h.
_DTYPES = {
    1: "float32",
    2: "int32",
    3: "uint8",
    4: "int64",
    6: "bool",
    7: "int16",
    9: "int8",
    11: "float64",
}
_INTEGER, _REAL, _TEXT = 1, 2, 3
_ABI = 1

Array = npt.NDArray[Any]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int32)),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("constant", ctypes.c_int32),
    )


class _Option(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("text", ctypes.c_char_p),
    )


class _Node(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("options", ctypes.POINTER(_Option)),
        ("option_count", ctypes.c_int32),
        ("blob", ctypes.c_void_p),
        ("blob_bytes", ctypes.c_size_t),
        ("state", ctypes.c_void_p),
        ("user", ctypes.c_void_p),
        ("index", ctypes.c_int32),
        ("version", ctypes.c_int32),
        ("resize", ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p])),
        ("fail", ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p])),
    )


_Call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Op(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_int32),
        ("init", _Call),
        ("prepare", _Call),
        ("invoke", _Call),
        ("free", _Free),
        ("user", ctypes.c_void_p),
    )


class _Library(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_int32),
        ("op_count", ctypes.c_int32),
        ("ops", ctypes.POINTER(ctypes.POINTER(Op))),
    )


def listed_versions(path: Path, source: Path | None = None) -> dict[str, int]:
    """As :func:`ops_of`, by name."""
    return {op.name.decode(errors="replace"): op.version for op in ops_of(path, source)}


def ops_of(path: Path, source: Path | None = None) -> list[Op]:
    """The operators in a library; it stays loaded. ``source`` is what it was made of, if that is what a user knows.

    Raises:
        EdgekitError: it does not load, has no operators, or was built with another ``edgekit_op.h``.
    """
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise EdgekitError(
            f"operators {path} do not load ({error})",
            mend="build them on this kind of machine, with `edgekit ops build`",
        ) from error
    try:
        library.edgekit_library.restype = ctypes.POINTER(_Library)
        listed = library.edgekit_library().contents
    except (AttributeError, ValueError) as error:
        raise EdgekitError(
            f"{source or path} exports no operators", mend="name them in EDGEKIT_OPS(&...), of edgekit_op.h"
        ) from error
    if listed.abi != _ABI:
        raise EdgekitError(
            f"operators {path}", expected=f"edgekit_op.h number {_ABI}", got=str(listed.abi), mend="build them again"
        )
    return [listed.ops[i].contents for i in range(listed.op_count)]


class PythonKernel:
    """An operator that calls a Python function; arguments as :meth:`edgekit.CustomOpResolver.add`.

    Args:
        raised: has what the function raised in a thread, as ``error``.

    Attributes:
        op: the operator; it and this object must live as long as an interpreter has it.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        version: int,
        shape: Callable[..., Any] | None,
        raised: threading.local,
    ) -> None:
        self._name, self._function, self._shape, self._raised = name, function, shape, raised
        self._calls: dict[int, Callable[[], None]] = {}
        self.op = Op(
            name.encode(),
            version,
            _Call(),
            _Call(self._guarded(self._prepare)),
            _Call(self._guarded(lambda address: self._calls[address]())),
            _Free(lambda address: self._calls.pop(address, None) and None),
        )

    def _guarded(self, work: Callable[[int], None]) -> Callable[[int], int]:
        """``work``, whose exceptions are kept for Python and told to the interpreter."""
        raised, name = self._raised, self._name

        def call(address: int) -> int:
            try:
                work(address)
            except BaseException as error:
                raised.error = error
                if isinstance(error, Exception):
                    error.edgekit_operator = name  # type: ignore[attr-defined]
                text = f"{type(error).__name__}: {error}".encode(errors="replace")
                return int(_Node.from_address(address).fail(address, b"%s", text))
            return 0

        return call

    def _prepare(self, address: int) -> None:
        node = _Node.from_address(address)
        inputs, outputs = node.inputs[: node.input_count], node.outputs[: node.output_count]
        options = _options(node)
        if self._shape:
            shapes = self._shape(*(_dims(tensor) if tensor.type else None for tensor in inputs), **options)
            for number, dims in enumerate([shapes] if len(outputs) == 1 and np.ndim(shapes) == 1 else shapes):
                if node.resize(address, number, len(dims), (ctypes.c_int32 * len(dims))(*dims)):
                    raise ValueError(f"output {number} cannot have the shape {tuple(dims)}")
        self._calls[address] = self._call(node, len(inputs), options)

    def _call(self, node: _Node, count: int, options: dict[str, Any]) -> Callable[[], None]:
        """A function that runs the kernel on the node's tensors as they are when it is called. A tensor keeps its place
        from call to call, but for a dynamic one: its array is made anew when the address has changed."""
        function, name = self._function, self._name
        tensors = [node.inputs[i] for i in range(count)] + [node.outputs[i] for i in range(node.output_count)]
        arrays: list[Array | None] = [None] * len(tensors)
        places: list[int | None] = [-1] * len(tensors)

        def call() -> None:
            for number, tensor in enumerate(tensors):
                if (place := tensor.data) != places[number]:
                    arrays[number], places[number] = _array(tensor, writeable=number >= count), place
            made = function(*arrays[:count], **options)
            results = made if isinstance(made, tuple) else (made,)
            if len(results) != len(arrays) - count:
                raise ValueError(f"{name}: expected {len(arrays) - count} arrays of its kernel, got {len(results)}")
            for array, result in zip(arrays[count:], results, strict=True):
                assert array is not None
                if np.shape(result) != array.shape:
                    raise ValueError(
                        f"{name}: expected an array of shape {array.shape} of its kernel, got {np.shape(result)}"
                    )
                np.copyto(array, result, casting="same_kind")

        return call


def _options(node: _Node) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in node.options[: node.option_count] if node.option_count else []:
        text = option.text.decode(errors="replace") if option.kind == _TEXT else ""
        value = {_INTEGER: option.integer, _REAL: option.real, _TEXT: text}[option.kind]
        values[option.key.decode(errors="replace")] = value
    values.pop("version", None)
    return values


def _dims(tensor: _Tensor) -> tuple[int, ...]:
    return tuple(tensor.dims[: tensor.rank]) if tensor.rank else ()


def _array(tensor: _Tensor, writeable: bool) -> Array | None:
    """The memory of a tensor, not a copy."""
    if not tensor.type:
        return None
    memory = (ctypes.c_char * tensor.bytes).from_address(tensor.data) if tensor.bytes else b""
    array: Array = np.frombuffer(memory, _DTYPES[tensor.type]).reshape(_dims(tensor))
    array.flags.writeable = writeable and bool(tensor.bytes)
    return array

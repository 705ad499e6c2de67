"""The kernels of custom operators for TensorFlow's own interpreter, in which its converter calibrates.

TensorFlow hands the address of its ``tflite::MutableOpResolver`` to a function
(``target_spec._experimental_custom_op_registerers``), and has ``AddCustom`` to be found by its name.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.custom_ops import CustomOpResolver, library
from edgekit.errors import EdgekitError
from edgekit.native_ops import Op

# As in tensorflow/lite/core/c/common.h; see ops/tflite.h.
_Init = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Registration(ctypes.Structure):
    _fields_ = (
        ("init", _Init),
        ("free", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("invoke", ctypes.c_void_p),
        ("profiling_string", ctypes.c_void_p),
        ("builtin_code", ctypes.c_int32),
        ("custom_name", ctypes.c_char_p),
        ("version", ctypes.c_int),
        ("registration_external", ctypes.c_void_p),
        ("async_kernel", ctypes.c_void_p),
        ("inplace_operator", ctypes.c_uint64),
    )


# What TensorFlow's resolvers point to: it stays to the end of the process.
_registered: list[Any] = []


def registerer(resolver: CustomOpResolver) -> Callable[[int], None]:
    """A function that adds all operators of ``resolver`` to the ``MutableOpResolver`` at an address.

    Raises:
        EdgekitError: when called: EdgeKit's library was not built, or this TensorFlow has no ``AddCustom``.
    """

    def register(address: int) -> None:
        native = ctypes.CDLL(os.fspath(library()))
        native.edgekit_init.restype = ctypes.c_void_p
        native.edgekit_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        add = _add_custom()
        for op in resolver.ops():
            registration = _registration(native, op)
            add(address, ctypes.c_char_p(op.name), ctypes.addressof(registration), 1)
            _registered.append((registration, op, resolver))

    return register


def _registration(native: ctypes.CDLL, op: Op) -> _Registration:
    operator = ctypes.addressof(op)

    def init(context: int, blob: int, blob_bytes: int) -> int:
        return int(native.edgekit_init(context, operator, blob, blob_bytes) or 0)

    pointers = (
        ctypes.cast(getattr(native, f"edgekit_{name}"), ctypes.c_void_p) for name in ("free", "prepare", "invoke")
    )
    return _Registration(_Init(init), *pointers, custom_name=op.name, version=1)


def _add_custom() -> Callable[..., None]:
    """``tflite::MutableOpResolver::AddCustom`` of the TensorFlow in this process."""
    symbol = "_ZN6tflite17MutableOpResolver9AddCustomEPKcPK18TfLiteRegistrationi"
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]
    for path in dict.fromkeys(path for path in loaded if "tensorflow" in path):
        try:
            function = getattr(ctypes.CDLL(path), symbol)
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        function.restype = None
        return function  # type: ignore[no-any-return]
    raise EdgekitError(
        "TensorFlow has no way to register a custom operator",
        expected=f"the symbol {symbol}",
        mend="install another TensorFlow",
    )

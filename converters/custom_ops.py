"""Marks TensorFlow functions as custom operators of TFLite, and holds their kernels against them.

A marked function is a ``tf.function`` that says what it implements, and that one operator can stand for it
(``tfl_fusable_op``): TensorFlow's converter then leaves out its body and keeps a custom operator of that name, as
prepare_composite_functions_tf.cc in tensorflow/compiler/mlir/lite/transforms has it.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from flatbuffers import flexbuffers
from tensorflow.core.framework import attr_value_pb2

from edgekit.converters import layers, recipes, rewrite
from edgekit.converters.registerer import registerer
from edgekit.converters.weights import first_words
from edgekit.custom_ops import CustomOpResolver
from edgekit.errors import ConversionError, EdgekitError
from edgekit.flatbuffer import Model

Option = bool | int | float | str
Array = npt.NDArray[Any]

# The kernels are held against the functions on so many items.
MAX_ITEMS = 4

# As edgekit_op.h has it.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_FUSABLE = "tfl_fusable_op"
_VERSION = "version"


@dataclass(frozen=True)
class Marked:
    """A TensorFlow function that a custom operator stands for."""

    name: str
    version: int
    tolerance: float
    options: tuple[tuple[str, Any], ...]
    function: Callable[..., Any]


# By name, and by options: layers may have different ones.
_marked: dict[str, dict[tuple[tuple[str, Any], ...], Marked]] = {}


def custom_op(
    name: str, /, *, version: int = 1, tolerance: float = 1e-3, **options: Option
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function of TensorFlow tensors as the custom operator ``name``, which ``edgekit convert`` keeps.

    To be called in the ``call`` of a Keras layer. The function takes tensors, by their order, and gives one or a tuple
    of them; what it needs of the layer's weights is handed to it. It remains what Keras trains and runs::

        @edgekit.custom_op("Mish", beta=1.0)
        def mish(x, beta):
            return x * tf.math.tanh(tf.math.softplus(beta * x))

    Args:
        name: letters, digits and underscores, the first one a letter.
        version: what kernels know it by, 1 or more: a new one for a new meaning of inputs or options.
        tolerance: how far a kernel may be off this function, as a share of the largest value.
        options: what the kernel is given beside tensors: truth values (1 and 0 in the model), whole numbers of 64 bits,
            real numbers of 32, and text. Those that the function has an argument for are given to it too.

    Raises:
        EdgekitError: a name, a version or an option that no model can hold; and, where it is called, a function that
            uses tensors which are no arguments of it.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise EdgekitError(
            f"custom operator {name!r}",
            expected="a name of letters, digits and underscores, the first one a letter",
            mend="give it another",
        )
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**31:
        raise EdgekitError(f"version of custom operator {name}", expected="a whole number from 1", got=repr(version))
    if not (isinstance(tolerance, (int, float)) and math.isfinite(tolerance) and tolerance >= 0):
        raise EdgekitError(f"tolerance of custom operator {name}", expected="a share, as 0.001", got=repr(tolerance))
    held = tuple(sorted((key, _held(name, key, value)) for key, value in options.items()))

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        arguments = inspect.signature(function).parameters
        given = {key: value for key, value in options.items() if key in arguments}

        def of_tensors(*tensors: Any) -> Any:
            return function(*tensors, **given)

        implementing = tf.function(of_tensors, experimental_implements=_implements(name, version, held))

        @functools.wraps(function)
        def operator(*tensors: Any) -> Any:
            try:
                return implementing(*[tf.convert_to_tensor(tensor) for tensor in tensors])
            except AssertionError as error:
                if "_implements" not in str(error):
                    raise
                raise EdgekitError(
                    f"custom operator {name}: its function uses a tensor or a variable that is no argument of it",
                    mend="hand it over as an argument",
                ) from error

        known = _marked.setdefault(name, {})
        if any(other.version != version for other in known.values()):
            known.clear()
        known[held] = Marked(name, version, float(tolerance), held, operator)
        return operator

    return mark


def _held(name: str, key: str, value: object) -> int | float | str:
    """An option as the model holds it."""
    if key == _FUSABLE or not key.isidentifier():
        raise EdgekitError(f"option {key!r} of custom operator {name}", expected="another name", mend="rename it")
    if isinstance(value, (bool, np.bool_)):  # TensorFlow would make -1 of True
        return int(value)
    if isinstance(value, (int, np.integer)) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, (float, np.floating)) and abs(float(value)) <= float(np.finfo(np.float32).max):
        return float(np.float32(value))
    if isinstance(value, str) and "\0" not in value:
        return value
    raise EdgekitError(
        f"option {key} of custom operator {name}",
        expected="a truth value, a whole number of 64 bits, a finite number of 32, or text",
        got=repr(value)[:80],
        mend="give what is larger as a tensor",
    )


def _implements(name: str, version: int, options: Sequence[tuple[str, Any]]) -> str:
    """What a function says of itself, as ``experimental_implements`` takes it."""
    told = attr_value_pb2.NameAttrList(name=name)
    told.attr[_FUSABLE].b = True
    if version > 1:  # the interpreter does not tell a delegate the version of an operator that it does not know
        told.attr[_VERSION].i = version
    for key, value in options:
        if isinstance(value, str):
            told.attr[key].s = value.encode()
        elif isinstance(value, float):
            told.attr[key].f = value
        else:
            told.attr[key].i = value
    return str(told)


def marked() -> bool:
    """Whether any function was marked in this process."""
    return bool(_marked)


def having(content: bytes, name: str) -> bool:
    """Whether a graph has the custom operator ``name``."""
    return any(operator.custom and operator.name == name for operator in Model(content).operators)


def load(paths: Iterable[str]) -> tuple[CustomOpResolver, tuple[str, ...]]:
    """A resolver with the kernels in ``paths``, whose Python files register layers and marked functions too; and those
    of the paths that have kernels.

    Raises:
        EdgekitError: a file cannot be loaded.
    """
    resolver, with_kernels = CustomOpResolver(), []
    for path in paths:
        known, resolver.versions = resolver.versions, {}
        resolver.load(path)
        if resolver.versions:
            with_kernels.append(path)
        resolver.versions = known | resolver.versions
    return resolver, tuple(with_kernels)


def unknown(names: Iterable[str]) -> ConversionError:
    """The error for operators that nobody has."""
    return ConversionError(
        f"the model has operators that no TFLite runtime has: {', '.join(dict.fromkeys(names))}",
        mend="build it of layers that TFLite knows",
    )


def convert(model: Any, recipe: str, calibration: Callable[[], recipes.Tensors], resolver: CustomOpResolver) -> bytes:
    """As :func:`edgekit.converters.recipes.convert`, of a model with marked functions.

    Raises:
        ConversionError: an operator was not marked, or its kernel raises while TensorFlow calibrates.
    """
    try:
        content = recipes.convert(model, recipe, calibration, registerer(resolver))
    except Exception as error:
        if (raised := resolver.take_error()) is None:
            raise
        raise _failing(raised) from error
    # TensorFlow's converter makes custom operators of all that TFLite does not have, and of version 1.
    tree = rewrite.load(content)
    custom = {code.customCode.decode(): code for code in tree.operatorCodes if code.customCode is not None}
    if foreign := [name for name in custom if name not in _marked]:
        raise unknown(foreign)
    versions = {name: next(iter(_marked[name].values())).version for name in custom}
    if all(custom[name].version == version for name, version in versions.items()):
        return content
    for name, version in versions.items():
        custom[name].version = version
    return rewrite.save(tree)


def _failing(error: BaseException) -> ConversionError:
    return ConversionError(
        f"a custom operator's kernel fails in the model ({type(error).__name__}: {error})", mend="mend it"
    )


def check(content: bytes, tensors: Iterable[Array], resolver: CustomOpResolver) -> None:
    """Holds the kernels of a float flatbuffer's custom operators against the functions that were marked.

    The graph runs on ``tensors`` in LiteRT, without XNNPACK, and with what custom operators make among its outputs, so
    that all can be read. Each function is then called on what its kernel was given: an operator is judged by itself,
    whatever those before it did.

    Raises:
        ConversionError: an operator has no kernel, or one that fails or gives something else than the function.
    """
    model = Model(content)
    names = " ".join(operator.name for operator in model.operators)
    if problem := resolver.outdated(model) or resolver.unresolved(model, names):
        raise ConversionError(f"the model needs {problem}")
    nodes = _nodes(content)
    if not nodes:
        return
    try:
        interpreter = layers.interpreter(content, resolver)
        for tensor in tensors:
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensor)
            interpreter.invoke()
            for node in nodes:
                node.compare(interpreter.get_tensor)
    except (RuntimeError, ValueError) as error:
        raise _failing(resolver.take_error() or error) from error
    for node in nodes:
        node.judge()


class _Node:
    """A custom operator in a graph, and how far its kernel is off the function that it stands for."""

    def __init__(self, index: int, marked: Marked, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self._index, self._marked, self._inputs, self._outputs = index, marked, inputs, outputs
        self._largest, self._furthest = np.zeros(len(outputs)), np.zeros(len(outputs))

    def compare(self, tensor: Callable[[int], Array]) -> None:
        """Compares what lies in the tensors now."""
        found = [tensor(index) for index in self._outputs]
        given = [tf.constant(tensor(index)) for index in self._inputs]
        try:
            right = [np.asarray(one) for one in tf.nest.flatten(self._marked.function(*given))]
        except Exception as error:  # whatever TensorFlow, or the function, raises
            raise self._error(f"its function fails on what it gets in the model ({first_words(error)})") from error
        shapes = [[(one.shape, one.dtype.name) for one in ones] for ones in (right, found)]
        if shapes[0] != shapes[1]:
            told = (", ".join(f"{dtype} {shape}" for shape, dtype in of) for of in shapes)
            raise self._error("its kernel gives tensors of other shapes or types", *told)
        for number, (a, b) in enumerate(zip(found, right, strict=True)):
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(invalid="ignore"):
                off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            self._furthest[number] = max(self._furthest[number], np.nan_to_num(off, nan=np.inf).max(initial=0))
            self._largest[number] = max(self._largest[number], np.abs(b[np.isfinite(b)]).max(initial=0))

    def judge(self) -> None:
        """Raises a ConversionError where the kernel was too far off."""
        # Where all is nothing there is no share of it.
        shares = self._furthest / np.where(self._largest, self._largest, 1.0)
        if (share := shares.max(initial=0)) > self._marked.tolerance:
            raise self._error(
                f"its kernel gives something else than its function (output {int(shares.argmax())})",
                f"at most {self._marked.tolerance:g} of the largest value off",
                f"{share:.2g}",
            )

    def _error(self, problem: str, expected: str = "", got: str = "") -> ConversionError:
        of = self._marked
        return ConversionError(
            f"custom operator {of.name} version {of.version} (node {self._index}): {problem}",
            expected=expected,
            got=got,
            mend="mend the one that is wrong" if expected else "mend it",
        )


def _nodes(content: bytes) -> list[_Node]:
    model = rewrite.load(content)
    nodes = []
    for index, operator in enumerate(model.subgraphs[0].operators):
        name = model.operatorCodes[operator.opcodeIndex].customCode
        if name is None:
            continue
        options = flexbuffers.Loads(bytes(operator.customOptions))
        options.pop(_VERSION, None)
        by_options = _marked[name.decode()]
        marked = by_options.get(tuple(sorted(options.items())))
        if marked is None:  # a SavedModel, which brings its function along
            raise ConversionError(
                f"custom operator {name.decode()} in the model has other options than the function that was marked",
                expected=" or ".join(str(dict(known)) for known in by_options),
                got=str(options),
                mend="mark it as it was when the model was saved",
            )
        inputs = [int(tensor) for tensor in operator.inputs if tensor >= 0]
        nodes.append(_Node(index, marked, inputs, [int(tensor) for tensor in operator.outputs]))
    return nodes

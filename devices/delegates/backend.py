"""A model in a TFLite runtime, in this process: on the CPU, with a delegate library, or on LiteRT's GPU accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit import runtimes, sandboxed
from edgekit.custom_ops import Ops, resolver
from edgekit.errors import BundleError, EdgekitError
from edgekit.flatbuffer import Model


@dataclass(frozen=True)
class TensorType:
    """What a tensor is like. ``scale`` is 0 where it is not quantized."""

    shape: tuple[int, ...]
    dtype: str
    scale: float
    zero_point: int


class Backend(Protocol):
    """A model that is loaded.

    Attributes:
        runtime: name of the TFLite runtime.
        input, output: the first of the model's tensors; others are states.
        operators: of the graph that was loaded.
        operators_delegated: how many of them the delegate took, on the CPU: XNNPACK; None where the runtime does not
            tell.
        isolated: in a process of its own; then no call takes longer than a limit.
    """

    runtime: str
    input: TensorType
    output: TensorType
    operators: int
    operators_delegated: int | None
    isolated: bool

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The input tensor -> the raw output, shape (classes,); what the graph keeps in states goes on."""

    def reset(self) -> None:
        """Puts the states as they were at the beginning."""

    def close(self) -> None: ...


class Interpreted:
    """In the interpreter of a runtime.

    Args:
        content: the model.
        path: where it is from, for errors.
        runtime: name of the runtime; None takes the preferred one.
        library: a delegate library, as the dynamic loader takes it; empty for none, which is XNNPACK.
        options: what it is told.
        threads: threads of the CPU kernels.
        ops: kernels of custom operators beside EdgeKit's own.

    Raises:
        BundleError: the runtime refuses it.
        RuntimeMissingError: no runtime is installed.
    """

    isolated = False

    def __init__(
        self,
        content: bytes,
        path: Path,
        *,
        runtime: str | None = None,
        library: str = "",
        options: Mapping[str, str] | None = None,
        threads: int = 1,
        ops: Ops = (),
    ) -> None:
        self.runtime, module = runtimes.load(runtime)
        self._model, self._path, self._library = Model(content, str(path)), path, library
        operators = self._model.operators
        custom = any(operator.custom for operator in operators)
        self._ops = resolver(ops) if ops or custom else None
        if self._ops and (problem := self._ops.outdated(self._model)):
            raise BundleError(f"bundle {path} needs {problem}")
        delegates = [self._ops.delegate(module)] if self._ops and self._ops.wanted(self._model) else []
        try:
            if library:
                delegates.append(module.load_delegate(library, dict(options or {})))
            # From memory, not by path: the file may be replaced or cut while the model runs.
            self._interpreter: Any = module.Interpreter(
                model_content=content, num_threads=threads, experimental_delegates=delegates
            )
            taken = self._taken() if library else None  # before XNNPACK takes what is left
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, OSError) as error:
            raise self._failure("does not load", error) from error
        self.operators, self.operators_delegated = len(operators), self._taken() if taken is None else taken
        input_details, *states = self._interpreter.get_input_details()
        output_details, *new_states = self._interpreter.get_output_details()
        self.input, self.output = _type(input_details), _type(output_details)
        self._input_index, self._output_index = input_details["index"], output_details["index"]
        # What a call leaves in an output tensor is what the next one finds in the input tensor.
        self._states = [
            (old["index"], new["index"], old["quantization"][1]) for old, new in zip(states, new_states, strict=True)
        ]
        self.reset()

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """As :meth:`Backend.invoke`.

        Raises:
            BundleError: the runtime failed. What the Python kernel of a custom operator raises comes as it is.
        """
        interpreter = self._interpreter  # one that another thread closes meanwhile lives until it is through
        if interpreter is None:
            raise BundleError(f"bundle {self._path}: the model was closed", mend="load it again")
        try:
            interpreter.set_tensor(self._input_index, tensor)
            interpreter.invoke()
            raw: npt.NDArray[Any] = interpreter.get_tensor(self._output_index)
            for old, new, _ in self._states:  # from tensor to tensor, without a copy in between
                interpreter.tensor(old)()[...] = interpreter.tensor(new)()
        except (ValueError, RuntimeError) as error:
            raise self._failure("failed in the interpreter", error) from error
        return raw.reshape(-1)

    def reset(self) -> None:
        if interpreter := self._interpreter:
            for old, _, zero in self._states:
                interpreter.tensor(old)()[...] = zero

    def close(self) -> None:
        """Frees the interpreter's memory."""
        self._interpreter = None

    def _taken(self) -> int | None:
        """Operators in the pieces that delegates took, but for those that have a kernel."""
        try:
            taken = {position for piece in sandboxed.pieces(self._interpreter) for position in piece}
        except AttributeError:  # what it asks is no public part of the runtimes
            return None
        known = self._ops.versions if self._ops else {}
        return sum(not (op.custom and op.name in known) for i, op in enumerate(self._model.operators) if i in taken)

    def _failure(self, what: str, error: Exception) -> BaseException:
        if self._ops and (raised := self._ops.take_error()):
            return raised
        if self._ops and (missing := self._ops.unresolved(self._model, str(error))):
            return BundleError(f"bundle {self._path} needs {missing}")
        if self._library:
            return EdgekitError(f"{self.runtime}: {error}")
        return BundleError(f"bundle {self._path} {what} ({self.runtime}: {error})", mend="try `edgekit inspect` on it")


class Accelerated:
    """On the GPU accelerator of LiteRT, which takes the whole model. Arguments as :class:`Interpreted`.

    Raises:
        EdgekitError: there is no such accelerator, no driver for it, or it refuses the model.
    """

    runtime, isolated = "litert", False
    operators_delegated: int | None

    def __init__(self, content: bytes, path: Path) -> None:
        model = Model(content, str(path))
        try:
            self._model: Any = sandboxed.Accelerated(content)
        except (ImportError, ValueError, RuntimeError) as error:
            raise EdgekitError(str(error)) from error
        self.operators = self.operators_delegated = len(model.operators)
        self.input, self.output = (
            TensorType(tensor.shape, tensor.dtype, (*tensor.scale, 0.0)[0], (*tensor.zero_point, 0)[0])
            for tensor in (model.inputs[0], model.outputs[0])
        )

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        try:
            self._model.set([tensor])
            self._model.invoke()
        except (ValueError, RuntimeError) as error:
            raise EdgekitError(str(error)) from error
        raw: npt.NDArray[Any] = self._model.get()
        return raw.reshape(-1)

    def reset(self) -> None:
        """It has no states."""

    def close(self) -> None:
        self._model = None


def _type(details: Mapping[str, Any]) -> TensorType:
    scale, zero_point = details["quantization"]
    shape = tuple(int(n) for n in details["shape"])
    return TensorType(shape, np.dtype(details["dtype"]).name, float(scale), int(zero_point))

"""A model in a TFLite runtime, driven by lines of JSON: ``sandboxed.py MODULE MODEL.tflite DELEGATE THREADS``, and for
one with custom operators EdgeKit's folder and files with kernels.

The other side is :class:`edgekit.sandbox.Sandbox`. A process of its own, started by path: a runtime that crashes on the
model is then a finding, and the Python that runs it needs that runtime and NumPy only, not EdgeKit.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # This folder's modules must not be taken for others of the same name. PYTHONSAFEPATH leaves it out from the start.
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)

import importlib
import importlib.util
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

_answers = sys.stdout


def _answer(**fields: Any) -> None:
    _answers.write(json.dumps(fields) + "\n")
    _answers.flush()


def _memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` (resident now) or ``VmHWM`` (at its most); 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def pieces(interpreter: Any) -> list[list[int]]:
    """The operators in each delegated piece of its graph: what lies between the inputs and the outputs of the piece."""
    nodes = interpreter._get_ops_details()
    producers = {int(t): n for n in nodes if n["op_name"] != "DELEGATE" for t in n["outputs"]}
    found = []
    for piece in (node for node in nodes if node["op_name"] == "DELEGATE"):
        inputs, inside, waiting = set(map(int, piece["inputs"])), set(), [int(t) for t in piece["outputs"]]
        while waiting:
            tensor = waiting.pop()
            producer = producers.get(tensor)
            if producer is None or tensor in inputs or producer["index"] in inside:
                continue
            inside.add(producer["index"])
            waiting += [int(t) for t in producer["inputs"]]
        found.append(sorted(inside))
    return found


class _Interpreter:
    """On the CPU (XNNPACK), with the delegate in a shared library, or with none, and every tensor there to be read."""

    def __init__(self, module: str, model: str, delegate: str, threads: int, ops: tuple[str, ...]) -> None:
        runtime = importlib.import_module(module)
        self.baseline_bytes = _memory("VmRSS")
        options: dict[str, Any] = {}
        delegates = [_custom_ops(*ops).delegate(runtime)] if ops else []
        if delegate == "none":  # XNNPACK keeps what lies inside its pieces to itself
            resolver = runtime.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            options = {"experimental_op_resolver_type": resolver, "experimental_preserve_all_tensors": True}
        elif delegate != "cpu":
            delegates.append(runtime.load_delegate(delegate))
        self._interpreter = runtime.Interpreter(
            model_path=model, num_threads=threads, experimental_delegates=delegates, **options
        )
        self._interpreter.allocate_tensors()
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()
        self.inputs = [(detail["shape"], detail["dtype"]) for detail in self._inputs]
        self.output = (self._outputs[0]["shape"], self._outputs[0]["dtype"])
        # Zeros, as the device begins with: for quantized ones their zero point.
        self.states = [
            np.full(detail["shape"], detail["quantization"][1], detail["dtype"]) for detail in self._inputs[1:]
        ]
        self.pieces = pieces(self._interpreter)

    def set(self, tensors: list[Any]) -> None:
        for detail, tensor in zip(self._inputs, tensors, strict=True):
            self._interpreter.set_tensor(detail["index"], tensor)

    def invoke(self) -> None:
        self._interpreter.invoke()

    def get(self, tensor: int | None = None) -> Any:
        return self._interpreter.get_tensor(self._outputs[0]["index"] if tensor is None else tensor)

    def get_states(self) -> list[Any]:
        return [self._interpreter.get_tensor(detail["index"]) for detail in self._outputs[1:]]


class Accelerated:
    """``content``, a ``.tflite``, on LiteRT's GPU accelerator (WebGPU)."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.compiled_model import CompiledModel, HardwareAccelerator

        self.baseline_bytes = _memory("VmRSS")
        self._content = content  # which the model reads
        self._model = CompiledModel.from_buffer(content, hardware_accel=HardwareAccelerator.GPU)
        if not self._model.is_fully_accelerated():
            raise RuntimeError("the GPU takes only a part of the model")
        self.pieces = None  # it does not tell
        self._signature = self._model.get_signature_list()
        name = next(iter(self._signature))
        given = self._model.get_input_tensor_details(name)
        made = next(iter(self._model.get_output_tensor_details(name).values()))
        self.inputs = [(detail["shape"], np.dtype(detail["dtype"])) for detail in given.values()]
        self.output = (made["shape"], np.dtype(made["dtype"]))
        self._inputs, self._outputs = self._model.create_input_buffers(0), self._model.create_output_buffers(0)

    def set(self, tensors: list[Any]) -> None:
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            buffer.write(np.ascontiguousarray(tensor))

    def invoke(self) -> None:
        self._model.run_by_index(0, self._inputs, self._outputs)
        # Running returns before the result is there, reading waits for it.
        shape, dtype = self.output
        self._result = np.asarray(self._outputs[0].read(int(np.prod(shape)), dtype.type)).reshape(shape)

    def get(self) -> Any:
        return self._result


def _noise(shape: Any, dtype: Any) -> Any:
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.uniform(-1, 1, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(max(limits.min, -(2**15)), min(limits.max, 2**15), shape, dtype=dtype, endpoint=True)


def _invoke(model: Any, count: int) -> None:
    """Times of ``count`` invocations, ms."""
    times = np.empty(count)
    for number in range(count):
        started = time.perf_counter()
        model.invoke()
        times[number] = time.perf_counter() - started
    _answer(ms=(1e3 * times).round(4).tolist(), peak_bytes=_memory("VmHWM") - model.baseline_bytes)


def _replay(model: Any, inputs: str, outputs: str, count: int | None, *tensor: int) -> None:
    """Runs the tensors in the file ``inputs``, or so many of them, one after the other, and writes what comes out to
    ``outputs``, (n, values): the model's output, or what it has in ``tensor``.

    A model with states is given each of them step by step, (steps, ...), beginning with states of zeros; what counts
    is what comes out of the last step.
    """
    results = []
    for number, given in enumerate(np.load(inputs, mmap_mode="r")[:count]):
        if given.ndim == len(model.inputs[0][0]):
            states = model.states
            for step in given:
                model.set([step[None], *states])
                model.invoke()
                states = model.get_states()
        else:
            model.set([given[None]])
            model.invoke()
        results.append(model.get(*tensor).reshape(-1))
        _answer(done=number + 1)
    np.save(outputs, np.stack(results))
    _answer(written=True)


def _custom_ops(package: str, *paths: str) -> Any:
    """A resolver of the EdgeKit in the folder ``package``, which this Python need not have installed."""
    spec = importlib.util.spec_from_file_location(
        "edgekit", Path(package, "__init__.py"), submodule_search_locations=[package]
    )
    assert spec and spec.loader
    sys.modules["edgekit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["edgekit"])
    return importlib.import_module("edgekit.custom_ops").CustomOpResolver(*paths)


def main(module: str, path: str, delegate: str, threads: str, *ops: str) -> None:
    global _answers
    # What libedgetpu and LiteRT print belongs with the other messages: standard output is for answers.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        model: Any = (
            Accelerated(Path(path).read_bytes())
            if delegate == "gpu"
            else _Interpreter(module, path, delegate, int(threads), ops)
        )
        model.set([_noise(*given) for given in model.inputs])
        _answer(pieces=model.pieces)
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            (_invoke if command == "invoke" else _replay)(model, *arguments)
    except Exception as error:
        traceback.print_exc()
        _answer(error=" ".join(str(error).split())[:300] or type(error).__name__)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])

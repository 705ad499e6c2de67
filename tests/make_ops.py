"""Writes graphs with custom operators that the tests have kernels for, and the same of built-in operators.

- ``colour_op.tflite``: a bundle that tells a picture by its mean colour, times ``gain`` by the operator ``Sharpen``.
- ``chain.tflite``: x (1, 4, 4, 8) -> RELU -> Square -> RELU -> Square -> Square -> RELU, ``Square`` with options of
  each kind; ``chain_built_in.tflite`` with MUL(x, x) in its place.
- ``newer.tflite``: ``Square`` of version 7.
- ``two_outputs.tflite``: ``Split`` of x (1, 8) into two of (1, 4), one of which goes through ``Square``.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from edgekit import bundle
from edgekit.converters import rewrite
from edgekit.manifest import CustomOp, ImageInput, Manifest, Output

OPERATOR = schema.BuiltinOperator
OPTIONS = {"factor": 1.5, "count": -7, "flag": True, "mode": "abc", "big": 1 << 40}


class Graph:
    """A flatbuffer of float tensors, built operator by operator."""

    def __init__(self, *inputs: tuple[int, ...]) -> None:
        self.model, self.subgraph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [schema.BufferT()], []
        self.subgraph.tensors, self.subgraph.operators = [], []
        self.model.subgraphs = [self.subgraph]
        self.inputs = [self.tensor(shape) for shape in inputs]

    def tensor(self, shape: tuple[int, ...], data: np.ndarray | None = None) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = f"t{len(self.subgraph.tensors)}", np.array(shape, np.int32), True
        tensor.type, tensor.buffer = schema.TensorType.FLOAT32, 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer, tensor.type = len(self.model.buffers) - 1, schema.TensorType.INT32
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def add(
        self, name: str, inputs: list[int], *shapes: tuple[int, ...], version: int = 1, options: Any = None
    ) -> list[int]:
        """A built-in operator, or a custom one where TFLite has none of that name."""
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        built_in = getattr(OPERATOR, name, None)
        code.builtinCode = OPERATOR.CUSTOM if built_in is None else built_in
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        if built_in is None:
            code.customCode = name
            operator.customOptions = np.frombuffer(bytes(flexbuffers.Dumps(options or {})), np.uint8)
        elif options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.model.operatorCodes.append(code)
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        outputs = [self.tensor(shape) for shape in shapes]
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        self.subgraph.operators.append(operator)
        return outputs

    def save(self, *outputs: int) -> bytes:
        self.subgraph.inputs, self.subgraph.outputs = np.array(self.inputs, np.int32), np.array(outputs, np.int32)
        return rewrite.save(self.model)


def chain(square: str, version: int = 1, shape: tuple[int, ...] = (1, 4, 4, 8)) -> bytes:
    graph = Graph(shape)
    (x,) = graph.inputs
    for count in (1, 2, 0):
        (x,) = graph.add("RELU", [x], shape)
        for _ in range(count):
            if square == "MUL":
                (x,) = graph.add("MUL", [x, x], shape, options=schema.MulOptionsT())
            else:
                (x,) = graph.add(square, [x], shape, version=version, options=OPTIONS)
    return graph.save(x)


def two_outputs() -> bytes:
    graph = Graph((1, 8))
    low, high = graph.add("Split", graph.inputs, (1, 4), (1, 4))
    (squared,) = graph.add("Square", [low], (1, 4), options=OPTIONS)
    return graph.save(squared, high)


def colour() -> bytes:
    graph = Graph((1, 32, 32, 3))
    axes = graph.tensor((2,), np.array([1, 2], np.int32))
    (mean,) = graph.add("MEAN", [*graph.inputs, axes], (1, 3), options=schema.ReducerOptionsT())
    (sharp,) = graph.add("Sharpen", [mean], (1, 3), options={"gain": 5.0})
    softmax = schema.SoftmaxOptionsT()
    softmax.beta = 1.0
    return graph.save(*graph.add("SOFTMAX", [sharp], (1, 3), options=softmax))


def main(folder: Path) -> None:
    for name, content in {
        "chain": chain("Square"),
        "chain_built_in": chain("MUL"),
        "newer": chain("Square", version=7),
        "two_outputs": two_outputs(),
    }.items():
        (folder / f"{name}.tflite").write_bytes(content)
    content = colour()
    manifest = Manifest(
        name="colour_op",
        version="1",
        input=ImageInput(size_wh=(32, 32), mean=(127.5,), std=(127.5,)),
        output=Output(activation="softmax"),
        quantization="float32",
        custom_ops=(CustomOp(name="Sharpen", version=1),),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    (folder / "colour_op.tflite").write_bytes(bundle.pack(content, manifest, ("red", "green", "blue")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

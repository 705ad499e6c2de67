"""Passes over a converted flatbuffer: the same arithmetic in operators that XNNPACK takes, in fewer pieces.

Each pass keeps the integers of the graph's own tensors, but for rounding. Where it leaves out a constant factor, the
tensor's declared scale takes that up, and the factor travels down to the next weights, whose scale is divided by it:
the integers stay, and so do the real values behind the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_OPERATOR = schema.BuiltinOperator
_INT8 = schema.TensorType.INT8
_NONE, _RELU6 = schema.ActivationFunctionType.NONE, schema.ActivationFunctionType.RELU6
# Operators whose weights can take up a factor of their input, and those that hand it on to their output.
_WEIGHTED = (_OPERATOR.CONV_2D, _OPERATOR.DEPTHWISE_CONV_2D, _OPERATOR.FULLY_CONNECTED)
_LINEAR = (_OPERATOR.MEAN, _OPERATOR.MUL, _OPERATOR.RESHAPE, _OPERATOR.AVERAGE_POOL_2D, _OPERATOR.MAX_POOL_2D)


def load(content: bytes) -> Any:
    """The flatbuffer as a tree of objects (``ModelT``)."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    for buffer in model.buffers:
        # litert-quantizer keeps the weights behind the flatbuffer, where packing would lose them.
        if buffer.offset > 1:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def save(model: Any) -> bytes:
    builder = _Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Aligns bytes to 16, as ``schema.fbs`` demands of buffers and the generated Python code does not."""

    def StartVector(self, element_bytes: int, count: int, alignment: int) -> Any:
        return super().StartVector(element_bytes, count, 16 if element_bytes == 1 else alignment)


def rewrite(content: bytes, recipe: str = "int8") -> bytes:
    """``content`` after all passes for that recipe; as it was where none finds anything to do."""
    passes = PASSES.get(recipe, ())
    if not passes:
        return content
    model = load(content)
    return save(model) if sum([rewrite_pass(model) for rewrite_pass in passes]) else content


def join(first: bytes, second: bytes) -> bytes:
    """The graph that gives the one output of ``first`` to the one input of ``second``."""
    model, following = load(first), load(second)
    graph, added = model.subgraphs[0], following.subgraphs[0]
    # -1 is an input left out
    index = {-1: -1} | {own: own + len(graph.tensors) for own in range(len(added.tensors))}
    index[int(added.inputs[0])] = int(graph.outputs[0])
    for tensor in added.tensors:
        tensor.buffer += len(model.buffers)
    for operator in added.operators:
        operator.opcodeIndex += len(model.operatorCodes)
        for which in ("inputs", "outputs"):
            setattr(operator, which, np.array([index[int(t)] for t in getattr(operator, which)], np.int32))
    model.buffers += following.buffers
    model.operatorCodes += following.operatorCodes
    graph.tensors += added.tensors
    graph.operators += added.operators
    graph.outputs = np.array([index[int(t)] for t in added.outputs], np.int32)
    made = following.signatureDefs[0].outputs
    for entry in made:
        entry.tensorIndex = index[entry.tensorIndex]
    model.signatureDefs[0].outputs = made
    return save(model)


def share_buffers(model: Any) -> None:
    """Keeps equal constants once, and none that nothing refers to."""
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors]
    kept = {int(entry.buffer) for entry in model.metadata or []}
    first: dict[bytes, int] = {}
    for tensor in tensors:
        data = model.buffers[tensor.buffer].data
        if data is not None:
            tensor.buffer = first.setdefault(np.asarray(data, np.uint8).tobytes(), tensor.buffer)
        kept.add(int(tensor.buffer))
    for index, buffer in enumerate(model.buffers):
        if index not in kept:
            buffer.data = None


def split_hard_swish(model: Any) -> int:
    """HARD_SWISH(x) -> MUL(x, ADD(x, 3) with RELU6), the factor 1/6 left to the weights that follow or, where its
    output reaches something else than weights, to one more MUL.

    XNNPACK has no int8 HARD_SWISH; each one ends a delegated piece.

    Returns:
        How many were rewritten.
    """
    graph = Graph(model)
    rewritten = 0
    for position, operator in reversed(list(graph.operators("HARD_SWISH"))):
        x, y = int(operator.inputs[0]), int(operator.outputs[0])
        if graph.tensor(x).type != _INT8:
            continue
        shape, gate_name = graph.tensor(x).shape, f"hard_swish_gate_{position}"
        gate = graph.add_tensor(gate_name, shape, 6 / 255, -128)
        added = graph.operator(_OPERATOR.ADD, 2, [x, graph.constant(3.0)], gate, schema.AddOptionsT, _RELU6)
        if graph.can_scale(y):
            multiplied = [graph.operator(_OPERATOR.MUL, 2, [x, gate], y, schema.MulOptionsT, _NONE)]
            graph.scale(y, 6.0)
        else:
            of_y = graph.tensor(y).quantization
            product = graph.add_tensor(f"{gate_name}_product", shape, 6.0 * of_y.scale[0], of_y.zeroPoint[0])
            multiplied = [
                graph.operator(_OPERATOR.MUL, 2, [x, gate], product, schema.MulOptionsT, _NONE),
                graph.operator(_OPERATOR.MUL, 2, [product, graph.constant(1 / 6)], y, schema.MulOptionsT, _NONE),
            ]
        graph.replace(position, [added, *multiplied])
        rewritten += 1
    return rewritten


def fold_scalar_multiplication(model: Any) -> int:
    """MUL(MUL(a, constant), b) -> MUL(a, b), the constant left to the weights that follow.

    So ends the hard-sigmoid of a squeeze-and-excitation block: relu6(x + 3) times 1/6, times the features.

    Returns:
        How many were folded.
    """
    graph = Graph(model)
    folded = 0
    for position, operator in reversed(list(graph.operators("MUL"))):
        a, middle = int(operator.inputs[0]), int(operator.outputs[0])
        constant = graph.scalar(int(operator.inputs[1]))
        users = graph.users(middle)
        if constant is None or constant <= 0 or graph.tensor(a).type != _INT8:
            continue
        if operator.builtinOptions.fusedActivationFunction != _NONE or middle in graph.outputs:
            continue
        if len(users) != 1 or graph.name(users[0]) != "MUL" or not graph.can_scale(int(users[0].outputs[0])):
            continue
        users[0].inputs = np.array([a if i == middle else i for i in users[0].inputs], np.int32)
        graph.replace(position, [])
        graph.scale(int(users[0].outputs[0]), 1 / constant)
        folded += 1
    return folded


def quantize_layer_norm(model: Any) -> int:
    """DEQUANTIZE -> EdgekitLayerNorm -> QUANTIZE becomes the operator on 8-bit tensors, which computes the same.

    TensorFlow's converter keeps custom operators in float.

    Returns:
        How many were rewritten.
    """
    graph = Graph(model)
    rewritten = 0
    for _, operator in list(graph.operators("CUSTOM")):
        if model.operatorCodes[operator.opcodeIndex].customCode != b"EdgekitLayerNorm":
            continue
        x, y = int(operator.inputs[0]), int(operator.outputs[0])
        before, after = graph.maker(x), graph.users(y)
        if before is None or graph.name(before) != "DEQUANTIZE" or y in graph.outputs:
            continue
        if len(after) != 1 or graph.name(after[0]) != "QUANTIZE":
            continue
        given, made = int(before.inputs[0]), int(after[0].outputs[0])
        if graph.tensor(given).type != _INT8 or graph.tensor(made).type != _INT8:
            continue
        operator.inputs = np.array([given, *operator.inputs[1:]], np.int32)
        operator.outputs = np.array([made], np.int32)
        graph.subgraph.operators.remove(after[0])
        if not graph.users(x) and x not in graph.outputs:
            graph.subgraph.operators.remove(before)
        rewritten += 1
    return rewritten


def keep_constants_in_float(model: Any) -> int:
    """A custom operator's float16 constants become float32 again.

    XNNPACK would take their DEQUANTIZE, whose result leaves its piece, and the graph would fall into more of them.

    Returns:
        How many were rewritten.
    """
    graph = Graph(model)
    rewritten = 0
    for _, operator in list(graph.operators("CUSTOM")):
        for position, tensor in enumerate(map(int, operator.inputs)):
            maker = graph.maker(tensor)
            if maker is None or graph.name(maker) != "DEQUANTIZE":
                continue
            given, made = graph.tensor(int(maker.inputs[0])), graph.tensor(tensor)
            data = model.buffers[given.buffer].data
            if data is None or given.type != schema.TensorType.FLOAT16:
                continue
            value = np.frombuffer(bytes(data), np.float16).astype(np.float32)
            index = graph.add_tensor(made.name, made.shape, data=value)
            operator.inputs = np.array([*operator.inputs[:position], index, *operator.inputs[position + 1 :]], np.int32)
            if not graph.users(tensor):
                graph.subgraph.operators.remove(maker)
            rewritten += 1
    return rewritten


PASSES: dict[str, tuple[Callable[[Any], int], ...]] = {
    "float16": (keep_constants_in_float,),
    "int8": (split_hard_swish, fold_scalar_multiplication, quantize_layer_norm),
}


class Graph:
    """The first subgraph of a model, with what the passes do to it."""

    def __init__(self, model: Any) -> None:
        self.model, self.subgraph = model, model.subgraphs[0]
        self.outputs = set(map(int, self.subgraph.outputs))
        self._constants: dict[float, int] = {}

    def tensor(self, index: int) -> Any:
        return self.subgraph.tensors[index]

    def code(self, operator: Any) -> int:
        of_model = self.model.operatorCodes[operator.opcodeIndex]
        return int(max(of_model.builtinCode, of_model.deprecatedBuiltinCode))

    def name(self, operator: Any) -> str:
        return str(next(name for name, code in vars(_OPERATOR).items() if code == self.code(operator)))

    def operators(self, name: str) -> Iterator[tuple[int, Any]]:
        for position, operator in enumerate(self.subgraph.operators):
            if self.code(operator) == getattr(_OPERATOR, name):
                yield position, operator

    def users(self, tensor: int) -> list[Any]:
        return [operator for operator in self.subgraph.operators if tensor in list(operator.inputs)]

    def maker(self, tensor: int) -> Any:
        """The operator that makes ``tensor``; None for an input and a constant."""
        return next((operator for operator in self.subgraph.operators if tensor in list(operator.outputs)), None)

    def scalar(self, index: int) -> float | None:
        """The value of a quantized constant of one element."""
        tensor = self.tensor(index)
        data = self.model.buffers[tensor.buffer].data
        if tensor.type != _INT8 or data is None or len(data) != 1:
            return None
        scale, zero_point = tensor.quantization.scale[0], tensor.quantization.zeroPoint[0]
        return float(scale * (int(np.uint8(data[0]).view(np.int8)) - int(zero_point)))

    def can_scale(self, tensor: int) -> bool:
        """Whether all that follows from ``tensor`` ends in weights that can take up a factor."""
        if tensor in self.outputs:
            return False
        for operator in self.users(tensor):
            code = self.code(operator)
            if code in _WEIGHTED and int(operator.inputs[0]) == tensor:
                continue
            if code not in _LINEAR or list(operator.inputs).count(tensor) != 1:
                return False
            if getattr(operator.builtinOptions, "fusedActivationFunction", _NONE) != _NONE:
                return False
            if not self.can_scale(int(operator.outputs[0])):
                return False
        return True

    def scale(self, tensor: int, factor: float) -> None:
        """Declares ``tensor`` to be ``factor`` times as much by the same integers, and the weights that follow less."""
        quantization = self.tensor(tensor).quantization
        quantization.scale = (np.asarray(quantization.scale, np.float64) * factor).astype(np.float32)
        for operator in self.users(tensor):
            if self.code(operator) in _WEIGHTED:
                self._divide_weights(operator, factor)
            else:
                self.scale(int(operator.outputs[0]), factor)

    def _divide_weights(self, operator: Any, factor: float) -> None:
        weights = self.tensor(int(operator.inputs[1]))
        quantization = weights.quantization
        if len(self.users(int(operator.inputs[1]))) > 1:  # shared with an operator whose input keeps its scale
            index = self.add_tensor(weights.name, weights.shape, 1.0, 0)
            copy = self.tensor(index)
            copy.type, copy.buffer = weights.type, weights.buffer
            copy.quantization.zeroPoint = quantization.zeroPoint
            copy.quantization.quantizedDimension = quantization.quantizedDimension
            operator.inputs = np.array([operator.inputs[0], index, *operator.inputs[2:]], np.int32)
            weights = copy
        weights.quantization.scale = (np.asarray(quantization.scale, np.float64) / factor).astype(np.float32)

    def add_tensor(self, name: Any, shape: Any, scale: float = 0.0, zero_point: int = 0, data: Any = None) -> int:
        """An int8 tensor, or a float32 one where ``scale`` is 0."""
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank, tensor.buffer = name, np.array(shape, np.int32), True, 0
        tensor.type = _INT8 if scale else schema.TensorType.FLOAT32
        if scale:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.array([scale], np.float32)
            tensor.quantization.zeroPoint = np.array([zero_point], np.int64)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def constant(self, value: float) -> int:
        """A tensor of one element, above 0."""
        if value not in self._constants:
            data = np.array([127], np.int8)
            self._constants[value] = self.add_tensor(f"constant_{value:g}", [1], value / 127, 0, data)
        return self._constants[value]

    def operator(
        self,
        code: int,
        version: int,
        inputs: list[int],
        output: int,
        options: Callable[[], Any],
        activation: int | None = None,
    ) -> Any:
        operator = schema.OperatorT()
        operator.opcodeIndex = self._operator_code(code, version)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        operator.builtinOptions = options()
        if activation is not None:
            operator.builtinOptions.fusedActivationFunction = activation
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, options.__name__.removesuffix("T"))
        return operator

    def _operator_code(self, code: int, version: int) -> int:
        for index, known in enumerate(self.model.operatorCodes):
            if max(known.builtinCode, known.deprecatedBuiltinCode) == code and known.version >= version:
                return index
        added = schema.OperatorCodeT()
        added.builtinCode, added.deprecatedBuiltinCode, added.version = code, min(code, 127), version
        self.model.operatorCodes.append(added)
        return len(self.model.operatorCodes) - 1

    def replace(self, position: int, operators: list[Any]) -> None:
        self.subgraph.operators[position : position + 1] = operators

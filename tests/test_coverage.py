from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import coverage, edge_tpu, gpu
from edgekit.errors import BundleError
from edgekit.flatbuffer import BUILTIN_OPERATORS, TENSOR_TYPES, Model, Operator

VISION = Path(__file__).parents[2] / "shared" / "data" / "vision"
IMAGE = (1, 16, 16, 8)


class Graph:
    """A flatbuffer built operator by operator from the input ``x``; every tensor made has ``dtype``."""

    def __init__(self, shape: tuple[int, ...] = IMAGE, dtype: str = "int8", given: str = "") -> None:
        self.schema = schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
        self.dtype, self.model = dtype, schema.ModelT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [schema.BufferT()], []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.subgraphs = [self.graph]
        self.x = self.tensor(shape, given or dtype)
        self.graph.inputs = [self.x]

    def tensor(self, shape: tuple[int, ...], dtype: str, data: Any = None) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type = f"t{len(self.graph.tensors)}", list(shape), TENSOR_TYPES.index(dtype)
        if dtype in ("int8", "uint8"):
            tensor.quantization = self.schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [0.1], [0]
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.asarray(data, dtype).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def constant(self, data: Any, dtype: str = "int32") -> int:
        return self.tensor(np.shape(data), dtype, data)

    def add(
        self, name: str, *inputs: int, shape: tuple[int, ...] = IMAGE, dtype: str = "", version: int = 1, **options: Any
    ) -> int:
        """Adds an operator and returns its output. ``options`` are fields of the ``kind`` of builtin options."""
        code = self.schema.OperatorCodeT()
        known = name in BUILTIN_OPERATORS
        code.builtinCode = BUILTIN_OPERATORS.index(name if known else "CUSTOM")
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        code.customCode = None if known else name
        self.model.operatorCodes.append(code)
        operator = self.schema.OperatorT()
        operator.opcodeIndex, operator.inputs = len(self.model.operatorCodes) - 1, list(inputs)
        if kind := options.pop("kind", ""):
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(self.schema, f"{kind}T")()
            for field, value in options.items():
                setattr(operator.builtinOptions, field, value)
        operator.outputs = [self.tensor(shape, dtype or self.dtype)]
        self.graph.operators.append(operator)
        return int(operator.outputs[0])

    def conv(self, x: int, **options: Any) -> int:
        weights = self.constant(np.zeros((8, 3, 3, 8)), self.dtype if self.dtype in ("int8", "uint8") else "float32")
        return self.add("CONV_2D", x, weights, kind="Conv2DOptions", **options)

    def read(self, *outputs: int) -> Model:
        self.graph.outputs = list(outputs) or [len(self.graph.tensors) - 1]
        builder = pytest.importorskip("flatbuffers").Builder()
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return Model(bytes(builder.Output()))


def names(model: Model, refusals: list[str]) -> list[str]:
    return [operator.name for operator, reason in zip(model.operators, refusals, strict=True) if reason]


# --- The compiled pairs


def origins(whole: Model, compiled: Model) -> list[bool]:
    """For each operator of ``whole``, whether it is in ``compiled`` as itself, outside ``edgetpu-custom-op``.

    The compiler keeps the order of what it leaves, and the name, type and shape of the tensors which that makes. An
    output of the custom operator must be made by an operator that was taken.
    """
    made: dict[Any, list[int]] = defaultdict(list)
    for index, operator in enumerate(whole.operators):
        made[_made_by(whole, operator)].append(index)
    left = [operator for operator in compiled.operators if operator.name != "edgetpu-custom-op"]
    matched = [made[_made_by(compiled, operator)] for operator in left]
    assert all(len(indices) == 1 for indices in matched), "an operator was left that the original has not, or twice"
    outside = [indices[0] for indices in matched]
    assert outside == sorted(outside)
    produced = {whole.tensors[i].name: n for n, operator in enumerate(whole.operators) for i in operator.outputs}
    for operator in compiled.operators:
        if operator.name == "edgetpu-custom-op":
            assert not {produced[compiled.tensors[i].name] for i in operator.outputs} & set(outside)
    return [index in outside for index in range(len(whole.operators))]


def _made_by(model: Model, operator: Operator) -> tuple[Any, ...]:
    made = [model.tensors[index] for index in operator.outputs]
    return operator.name, *((tensor.name, tensor.dtype, tensor.shape) for tensor in made)


PAIRS = sorted(path.name for path in VISION.glob("*_edgetpu.tflite"))


@pytest.mark.parametrize("compiled_name", PAIRS)
def test_edge_tpu_agrees_with_the_compiler_on_every_operator(compiled_name: str) -> None:
    compiled_path = VISION / compiled_name
    whole, compiled = (
        Model(path.read_bytes(), str(path))
        for path in (compiled_path.with_name(compiled_name.replace("_edgetpu", "")), compiled_path)
    )
    refusals = edge_tpu.refusals(whole)
    assert [bool(reason) for reason in refusals] == origins(whole, compiled), refusals


def test_pairs_hold_left_operators(vision_data: Path) -> None:
    """That the comparison compares: one of the pairs has operators on both sides."""
    assert len(PAIRS) >= 3
    model = Model((vision_data / "deeplabv3_mnv2_dm05_pascal_quant.tflite").read_bytes())
    predicted = coverage.edge_tpu(model)
    assert (predicted.operators, predicted.delegated, predicted.pieces, predicted.measured) == (72, 64, 1, False)
    assert sum(left.count for left in predicted.left) == 8
    assert predicted.left[0] == coverage.Left(
        operator="RESIZE_BILINEAR", count=1, reason="enlarges 33 times, which is not precise enough"
    )


def test_edge_tpu_of_a_compiled_model_is_what_the_compiler_left(vision_data: Path) -> None:
    model = Model((vision_data / "deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite").read_bytes())
    found = coverage.edge_tpu(model)
    assert (found.measured, found.operators, found.delegated) == (True, 9, 1)
    assert {left.reason for left in found.left} == {"left to the CPU when the model was compiled"}


# --- Edge TPU


def test_edge_tpu_leaves_what_comes_after_and_takes_the_branch_that_does_not() -> None:
    graph = Graph()
    stem = graph.conv(graph.x)
    refused = graph.add("HARD_SWISH", stem)
    after = graph.add("RELU", graph.conv(refused))
    branch = graph.conv(graph.conv(stem))  # later in the file, but it needs nothing that was refused
    model = graph.read(graph.add("ADD", after, branch))
    assert edge_tpu.refusals(model) == [
        "",
        "not among the operators that the Edge TPU has",
        *["comes after HARD_SWISH, which is not taken"] * 2,
        "",
        "",
        "comes after HARD_SWISH, which is not taken",
    ]
    predicted = coverage.edge_tpu(model)
    assert (predicted.delegate, predicted.delegated, predicted.pieces) == ("edge-tpu", 3, 1)
    assert [(left.operator, left.count) for left in predicted.left] == [
        ("HARD_SWISH", 1), ("CONV_2D", 1), ("RELU", 1), ("ADD", 1),
    ]  # fmt: skip


def test_edge_tpu_of_float_ends_leaves_only_those() -> None:
    """As the compiler's log has it: f0cal/google-coral issue 20."""
    graph = Graph(given="float32")
    made = graph.conv(graph.conv(graph.add("QUANTIZE", graph.x)))
    model = graph.read(graph.add("DEQUANTIZE", made, dtype="float32"))
    assert names(model, edge_tpu.refusals(model)) == ["QUANTIZE", "DEQUANTIZE"]


def test_edge_tpu_of_a_float_graph_takes_nothing() -> None:
    graph = Graph(dtype="float32")
    model = graph.read(graph.add("RELU", graph.conv(graph.x)))
    predicted = coverage.edge_tpu(model)
    assert (predicted.delegated, predicted.pieces) == (0, 0)
    assert all("float32" in left.reason for left in predicted.left)


def test_edge_tpu_refuses_a_version_newer_than_the_compiler() -> None:
    graph = Graph()
    model = graph.read(graph.conv(graph.add("RELU", graph.x), version=6))
    assert edge_tpu.refusals(model) == [
        "the compiler refuses the model: CONV_2D has version 6, it knows 5"
    ] * 2  # fmt: skip


def _resize(to: int) -> Any:
    return lambda g: g.add("RESIZE_BILINEAR", g.x, g.constant([to, to]), shape=(1, to, to, 8))


def _mean(*axes: int) -> Any:
    return lambda g: g.add("MEAN", g.x, g.constant(axes), shape=(1, 1, 1, 8))


def _pool(activation: int) -> Any:
    return lambda g: g.add("MAX_POOL_2D", g.x, kind="Pool2DOptions", fusedActivationFunction=activation)


def _strided_slice(stride: int, **options: int) -> Any:
    return lambda g: g.add(
        "STRIDED_SLICE", g.x, g.constant([0] * 4), g.constant(IMAGE), g.constant([1, stride, 1, 1]),
        kind="StridedSliceOptions", **options,
    )  # fmt: skip


def _concatenation(value: int) -> Any:
    return lambda g: g.add(
        "CONCATENATION", g.x, g.constant(np.full(IMAGE, value), "int8"), shape=(1, 16, 16, 16),
        kind="ConcatenationOptions", axis=3,
    )  # fmt: skip


def _fully_connected(shape: tuple[int, ...]) -> Any:
    return lambda g: g.add("FULLY_CONNECTED", g.x, g.constant(np.zeros((4, 8)), "int8"), shape=shape)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda g: g.conv(g.x, dilationWFactor=2, dilationHFactor=2), ""),
        (lambda g: g.conv(g.x, dilationWFactor=2), "dilated differently"),
        (lambda g: g.add("CONV_2D", g.x, g.x), "weights are computed"),
        (lambda g: g.add("ADD", g.x, g.constant([0.5], "float32")), "float32 parameters"),
        (lambda g: g.add("CAST", g.x, dtype="int32"), "not among"),
        (lambda g: g.add("RELU", g.x, dtype="int16"), "int16"),
        (lambda g: g.add("MyOperator", g.x), "custom operator"),
        (lambda g: g.add("RESHAPE", g.x, g.constant([2, 8, 16, 8]), shape=(2, 8, 16, 8)), "innermost"),
        (lambda g: g.add("RESHAPE", g.x, g.constant([2048]), shape=(2048,)), ""),
        (_resize(32), ""),
        (_resize(256), "enlarges 16 times"),
        (_mean(1, 2), ""),
        (_mean(-3, -2, 0), "batch"),
        (_pool(0), ""),
        (_pool(1), "fused activation"),
        (_strided_slice(1), ""),
        (_strided_slice(2), "strides"),
        (_strided_slice(1, ellipsisMask=1), "ellipsis"),
        (_concatenation(0), ""),
        (_concatenation(1), "zeros"),
        (_fully_connected((1, 4)), ""),
        (_fully_connected((256, 4)), "one-dimensional"),
        (lambda g: g.add("SOFTMAX", g.x), "one-dimensional"),
        (lambda g: g.add("PAD", g.x, g.constant([[0, 0], [1, 1], [1, 1], [0, 0]])), ""),
        (lambda g: g.add("PAD", g.x, g.constant([[0, 1], [0, 0], [0, 0], [0, 0]])), "batch"),
        (lambda g: g.add("PRELU", g.x, g.constant(np.zeros((1, 1, 8)), "int8")), ""),
        (lambda g: g.add("PRELU", g.x, g.constant(np.zeros((16, 1, 8)), "int8")), "slopes"),
        (lambda g: g.add("SPLIT", g.constant(3), g.x), ""),
        (lambda g: g.add("SPLIT", g.constant(-4), g.x), "batch"),
        (lambda g: g.add("PACK", g.x, g.x, shape=(1, 2, 4), kind="PackOptions", axis=1), ""),
        (lambda g: g.add("PACK", g.x, g.x, shape=(1, 2, 4), kind="PackOptions", axis=-3), "batch"),
    ],
)
def test_edge_tpu_knows_the_limits_of_an_operator(build: Any, reason: str) -> None:
    graph = Graph()
    build(graph)
    (found,) = edge_tpu.refusals(graph.read())
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize("refusals", [edge_tpu.refusals, gpu.refusals])
@pytest.mark.parametrize(("signature", "open_"), [([-1, 16, 16, 8], False), ([1, -1, -1, 8], True)])
def test_sizes_that_are_left_open_are_refused(refusals: Any, signature: list[int], open_: bool) -> None:
    graph = Graph()
    graph.graph.tensors[graph.x].shapeSignature = signature
    (reason,) = refusals(graph.read(graph.conv(graph.x)))
    assert ("left open" in reason) == open_


# --- GPU


def test_gpu_takes_the_largest_piece_only() -> None:
    """As LiteRT 2.3.0 was seen to do."""
    graph = Graph(dtype="float32")
    first = graph.conv(graph.x)
    refused = graph.add("ARG_MIN", first)
    model = graph.read(graph.add("RELU", graph.conv(refused)))
    assert gpu.refusals(model) == [
        "outside the largest piece, the only one that is taken", "not among the operators that the GPU has", "", "",
    ]  # fmt: skip
    predicted = coverage.gpu(model)
    assert (predicted.delegate, predicted.measured, predicted.delegated, predicted.pieces) == ("gpu", False, 2, 1)


@pytest.mark.parametrize("packed", ["float16", "int8"])
def test_gpu_takes_weights_that_are_unpacked(packed: str) -> None:
    graph = Graph(dtype="float32")
    weights = graph.add("DEQUANTIZE", graph.constant(np.zeros((8, 3, 3, 8)), packed), shape=(8, 3, 3, 8))
    three = graph.add("DEQUANTIZE", graph.constant(3, packed), shape=())
    made = graph.add("CONV_2D", graph.x, weights, kind="Conv2DOptions")
    model = graph.read(graph.add("HARD_SWISH", graph.add("ADD", made, three)))
    assert coverage.gpu(model).delegated == 5


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda g: g.add("RELU", g.x), ""),
        (lambda g: g.add("ARG_MAX", g.x, g.constant(3), shape=(1, 16, 16), dtype="int32"), ""),
        (lambda g: g.add("ARG_MAX", g.x, g.constant(3), shape=(1, 16, 16), dtype="int64"), "int64"),
        (lambda g: g.add("RESHAPE", g.x, g.constant([1, 16, 16, 2, 4]), shape=(1, 16, 16, 2, 4)), "4 dimensions"),
        (lambda g: g.add("RELU", g.constant([1.0], "float32")), "constant inputs"),
        (lambda g: g.add("MyOperator", g.x), "custom"),
        (lambda g: g.add("WHILE", g.x), "not among"),
        (lambda g: g.add("TOPK_V2", g.x, g.constant(2), version=2), "version"),
        (lambda g: g.add("SOFTMAX", g.x, kind="SoftmaxOptions", beta=1.0), ""),
        (lambda g: g.add("SOFTMAX", g.x, kind="SoftmaxOptions", beta=2.0), "beta"),
        (_strided_slice(2), ""),
        (_strided_slice(1, shrinkAxisMask=1), "axis"),
        (lambda g: g.add("ADD_N", g.x, g.x, g.x), "3 inputs"),
        (lambda g: g.add("UNIDIRECTIONAL_SEQUENCE_LSTM", g.x, g.tensor((1, 8), "float32")), "state"),
    ],
)
def test_gpu_knows_the_limits_of_an_operator(build: Any, reason: str) -> None:
    graph = Graph(dtype="float32")
    build(graph)
    (found,) = gpu.refusals(graph.read())
    assert reason in found and bool(found) == bool(reason)


def test_gpu_takes_nothing_of_a_graph_that_computes_sizes() -> None:
    graph = Graph(dtype="float32")
    size = graph.add("SHAPE", graph.x, shape=(4,), dtype="int32")
    model = graph.read(graph.add("RESHAPE", graph.conv(graph.x), size))
    predicted = coverage.gpu(model)
    assert predicted.delegated == predicted.pieces == 0
    assert all("static sizes" in left.reason for left in predicted.left)


# --- Both


@pytest.mark.parametrize("predict", [coverage.edge_tpu, coverage.gpu])
def test_mutations_are_refused_or_told(predict: Any, models: Path) -> None:
    content = (models / "int8.tflite").read_bytes()
    random = np.random.default_rng(0)
    told = 0
    for _ in range(1000):
        mutated = bytearray(content)
        for at in random.integers(8, len(content), random.integers(1, 10)):
            mutated[at] = random.integers(0, 256)
        try:
            predict(Model(bytes(mutated)))
            told += 1
        except BundleError:
            pass
    assert told


@pytest.mark.host
def test_gpu_takes_mobilenet_v3_whole() -> None:
    """As LiteRT's GPU accelerator does."""
    keras = pytest.importorskip("keras")
    pytest.importorskip("tensorflow")
    from edgekit.converters import recipes

    given = keras.Input(batch_shape=(1, 32, 32, 3))
    network = keras.applications.MobileNetV3Small(input_tensor=given, alpha=0.35, weights=None, classes=3)
    predicted = coverage.gpu(Model(recipes.convert(network, "float16", None)))
    assert (predicted.delegated, predicted.pieces, predicted.left) == (predicted.operators, 1, ())

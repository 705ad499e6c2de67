from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.host
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from ai_edge_litert.interpreter import Interpreter  # noqa: E402

import edgekit.bundle  # noqa: E402
from edgekit import runtimes  # noqa: E402
from edgekit.converters import recipes, rewrite  # noqa: E402
from edgekit.flatbuffer import Model  # noqa: E402
from edgekit.sandbox import Sandbox  # noqa: E402


def int8(build: Callable[[Any], Any]) -> bytes:
    """An int8 flatbuffer of ``build`` over (1, 16, 16, 8), with seeded weights and calibration data."""
    keras.utils.set_random_seed(0)
    given = keras.Input(batch_shape=(1, 16, 16, 8))
    random = np.random.default_rng(0)
    data = [random.uniform(-1, 1, (1, 16, 16, 8)).astype(np.float32) for _ in range(20)]
    return recipes.convert(keras.Model(given, build(given)), "int8", lambda: data)


def outputs(content: bytes, frames: int = 30) -> np.ndarray:
    """Of the plain kernels, without XNNPACK, on noise."""
    from ai_edge_litert.interpreter import OpResolverType

    interpreter = Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    random, results = np.random.default_rng(1), []
    for _ in range(frames):
        interpreter.set_tensor(given["index"], random.integers(-128, 128, given["shape"]).astype(np.int8))
        interpreter.invoke()
        results.append(interpreter.get_tensor(made["index"]).astype(int))
    return np.array(results)


def float_output(content: bytes, x: np.ndarray) -> np.ndarray:
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def apply(content: bytes, rewrite_pass: Callable[[Any], int]) -> tuple[bytes, int]:
    model = rewrite.load(content)
    found = rewrite_pass(model)
    return rewrite.save(model), found


def operators(content: bytes) -> list[str]:
    return [operator.name for operator in Model(content).operators]


def conv(x: Any, filters: int = 12) -> Any:
    return keras.layers.Conv2D(filters, 3, padding="same")(x)


def swish(x: Any) -> Any:
    return keras.layers.Activation("hard_swish")(x)


def hard_sigmoid_gate(x: Any) -> Any:
    squeezed = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    squeezed = keras.layers.Conv2D(12, 1)(squeezed)
    return keras.layers.Multiply()([x, keras.layers.Rescaling(1 / 6)(keras.layers.ReLU(6.0)(squeezed + 3.0))])


SWISH: dict[str, tuple[Callable[[Any], Any], int]] = {
    "one": (lambda x: conv(swish(conv(x))), 1),
    "two in a row": (lambda x: conv(swish(conv(swish(conv(x))))), 2),
    "pooled": (
        lambda x: keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(swish(conv(x)))),
        1,
    ),
    "gated": (lambda x: conv(hard_sigmoid_gate(swish(conv(x)))), 1),
    "two users": (lambda x: (lambda y: conv(y) + conv(y))(swish(conv(x))), 1),
    "the output": (lambda x: swish(conv(x)), 1),
    "added": (lambda x: (lambda y: conv(swish(y) + y))(conv(x)), 1),
}


@pytest.mark.parametrize("case", SWISH)
def test_split_hard_swish_computes_the_same(case: str) -> None:
    build, expected = SWISH[case]
    before = int8(build)
    after, found = apply(before, rewrite.split_hard_swish)
    assert found == expected
    assert operators(after).count("HARD_SWISH") == operators(before).count("HARD_SWISH") - expected
    difference = np.abs(outputs(after) - outputs(before))
    assert difference.max() <= 4 and difference.mean() < 0.5


@pytest.mark.parametrize("case", SWISH)
def test_split_hard_swish_leaves_one_piece_for_xnnpack(case: str, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(rewrite.rewrite(int8(SWISH[case][0])))
    with Sandbox(runtimes.find()["litert"], tmp_path / "model.tflite") as trial:
        assert trial.pieces == [list(range(len(operators((tmp_path / "model.tflite").read_bytes()))))]


@pytest.mark.parametrize("gates", [1, 2])
def test_fold_scalar_multiplication_computes_the_same(gates: int) -> None:
    def build(x: Any) -> Any:
        x = conv(x)
        for _ in range(gates):
            x = conv(hard_sigmoid_gate(x))
        return x

    before = int8(build)
    after, found = apply(before, rewrite.fold_scalar_multiplication)
    assert found == gates and operators(after).count("MUL") == operators(before).count("MUL") - gates
    difference = np.abs(outputs(after) - outputs(before))
    assert difference.max() <= 3 and difference.mean() < 0.5


def test_fold_leaves_a_product_that_is_the_output() -> None:
    before = int8(lambda x: hard_sigmoid_gate(conv(x)))
    after, found = apply(before, rewrite.fold_scalar_multiplication)
    assert found == 0 and operators(after) == operators(before)


def test_graph_with_nothing_to_rewrite_stays_as_it_is() -> None:
    content = int8(lambda x: conv(keras.layers.ReLU()(conv(x))))
    assert rewrite.rewrite(content) == content


def test_trained_mobilenet_v3_is_one_piece_for_xnnpack(digits: Path, tmp_path: Path) -> None:
    """The scales of a trained model: XNNPACK refuses those that random weights lead to."""
    edgekit.convert(
        digits / "digits.keras", tmp_path / "digits.tflite", quantize="int8", calibration=digits / "calibration"
    )
    content = edgekit.bundle.read_file(tmp_path / "digits.tflite").content
    with Sandbox(runtimes.find()["litert"], tmp_path / "digits.tflite") as trial:
        assert trial.pieces and len(trial.pieces) == 1
    assert "HARD_SWISH" not in operators(content) and operators(content).count("MUL") == 28


def test_join_gives_the_output_of_one_graph_to_the_other() -> None:
    def converted(layer: Any, shape: tuple[int, ...]) -> bytes:
        given = keras.Input(batch_shape=shape)
        return bytes(tf.lite.TFLiteConverter.from_keras_model(keras.Model(given, layer(given))).convert())

    first = converted(keras.layers.Conv2D(3, 2), (1, 5, 5, 1))
    second = converted(keras.layers.Softmax(), (1, 4, 4, 3))
    joined = rewrite.join(first, second)
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(float_output(joined, x), float_output(second, float_output(first, x)), atol=1e-6)
    assert operators(joined) == ["CONV_2D", "SOFTMAX"]


def test_share_buffers_keeps_equal_constants_once() -> None:
    given = keras.Input(batch_shape=(1, 8, 8, 4))
    ones = keras.layers.Conv2D(64, 3, kernel_initializer="ones")
    twos = keras.layers.Conv2D(64, 3, kernel_initializer=keras.initializers.Constant(2.0))
    model = keras.Model(given, keras.layers.Add()([ones(given), keras.layers.ReLU()(twos(given))]))
    content = bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    tree = rewrite.load(content)
    weights = [tensor for tensor in tree.subgraphs[0].tensors if list(tensor.shape) == [64, 3, 3, 4]]
    assert len(weights) == 2
    for tensor in weights:
        tree.buffers[tensor.buffer].data = np.ones((64, 3, 3, 4), np.float32).view(np.uint8).ravel()
    rewrite.share_buffers(tree)
    smaller = rewrite.save(tree)
    assert len(content) - len(smaller) > 4 * 64 * 9 * 4 - 500
    x = np.ones((1, 8, 8, 4), np.float32)
    assert float_output(smaller, x).max() == pytest.approx(2 * 36)

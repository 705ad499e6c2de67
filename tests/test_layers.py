from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.host
keras = pytest.importorskip("keras")
pytest.importorskip("tensorflow")

from edgekit.converters import layers, recipes  # noqa: E402


@pytest.fixture(scope="module")
def data() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32) for _ in range(20)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Its second layer squeezes all that matters into a hundredth of its range, which 8 bits cannot hold."""
    keras.utils.set_random_seed(0)
    given = keras.Input(batch_shape=(1, 16, 16, 3))
    x = keras.layers.Conv2D(8, 3, name="first")(given)
    coarse = np.concatenate([np.full(7, 1.0), [300.0]])
    x = x * keras.ops.convert_to_tensor(coarse.astype(np.float32))
    return keras.Model(given, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))


def test_compare_names_the_layer_that_loses(model: Any, data: Any) -> None:
    float32 = recipes.convert(model, "float32", None)
    found = layers.compare(float32, recipes.convert(model, "int8", lambda: data), data[:8])
    assert len(found) >= 3
    decibels = [layer.sqnr_db for layer in found if layer.sqnr_db is not None]
    assert decibels == sorted(decibels) and decibels[0] > 0 and decibels[-1] < 80
    assert sum(layer.lost_db is None for layer in found) == 1  # the first has none before it
    finer = layers.compare(float32, recipes.convert(model, "int16x8", lambda: data), data[:8])
    assert finer[0].sqnr_db is not None and finer[0].sqnr_db > decibels[0]


def test_compare_of_the_same_graph_finds_no_noise(model: Any, data: Any) -> None:
    float32 = recipes.convert(model, "float32", None)
    assert {layer.sqnr_db for layer in layers.compare(float32, float32, data[:2])} == {None}


def test_sqnr_is_what_its_definition_says(model: Any, data: Any) -> None:
    """Of the model's output, worked out from the outputs alone."""
    from ai_edge_litert.interpreter import Interpreter

    contents = [recipes.convert(model, recipe, lambda: data) for recipe in ("float32", "float16")]
    outputs = []
    for content in contents:
        interpreter = Interpreter(model_content=content)
        interpreter.allocate_tensors()
        rows = []
        for tensor in data[:8]:
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensor)
            interpreter.invoke()
            rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
        outputs.append(np.array(rows, np.float64))
    expected = 10 * np.log10((outputs[0] ** 2).sum() / ((outputs[0] - outputs[1]) ** 2).sum())
    of_output = {layer.operator: layer.sqnr_db for layer in layers.compare(*contents, data[:8])}
    assert of_output["FULLY_CONNECTED"] == pytest.approx(expected, abs=0.3)

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import Manifest
from edgekit.quantization import quantize

pytestmark = pytest.mark.host
tf = pytest.importorskip("tensorflow")

from edgekit.converters import crnn, crnn_graph, crnn_int8, crnn_quantize  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    """A small CRNN whose every weight is different and whose first normalization is as trained."""
    model = crnn.build(tags=4, frames=96, bn_axis="frequency")
    random = np.random.default_rng(2)
    for layer in model.layers:
        shapes = [weight.shape for weight in layer.weights]
        if layer.name == "bn_0_freq":
            ones = np.ones(shapes[0])
            layer.set_weights([ones, 0 * ones, -20 * ones, 200 * ones])
        elif "bn" in layer.name:
            layer.set_weights([random.uniform(0.5, 1.5, shape) for shape in shapes])
        elif shapes:
            layer.set_weights([random.normal(0, 1.5 / np.sqrt(np.prod(shape[:-1]) or 9), shape) for shape in shapes])
    return model


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    """What stands for music where there is none."""
    return crnn_quantize.made_clips(96, 96)[:4]


def interpreter(content: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    loaded = Interpreter(model_content=content)
    loaded.allocate_tensors()
    return loaded


def scores(content: bytes, clips: np.ndarray) -> np.ndarray:
    loaded, found = interpreter(content), []
    (given,) = loaded.get_input_details()
    scale, zero_point = given["quantization"]
    for clip in clips:
        levels = quantize(clip, given["dtype"], scale, zero_point) if scale else clip
        loaded.set_tensor(given["index"], levels[None])
        loaded.invoke()
        found.append(loaded.get_tensor(loaded.get_output_details()[0]["index"])[0])
    return np.array(found)


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [("float32", 1e-5), ("float16", 2e-3), ("int8-weights", 0.03), ("int8", 0.1), ("int16x8", 0.03)],
)
def test_convert_keeps_the_scores(model: Any, clips: np.ndarray, recipe: str, tolerance: float) -> None:
    content = crnn_quantize.convert(model, recipe, clips)
    expected = np.asarray(model(clips, training=False))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores(content, clips), expected, atol=tolerance)
    graph = Model(content)
    assert [t.name for t in graph.inputs] == ["log_mel"] and [t.name for t in graph.outputs] == ["scores"]
    (features,) = [tensor for tensor in graph.tensors if tensor.name == crnn_graph.FEATURES]
    assert int(np.prod(features.shape)) == model.get_layer("reshape").output.shape[1] * 128


def test_int8_has_all_four_convolutions_in_8_bits_and_their_weights_once(model: Any, clips: np.ndarray) -> None:
    content = crnn_quantize.convert(model, "int8", clips)
    graph = Model(content)
    convolutions = [operator for operator in graph.operators if operator.name == "CONV_2D"]
    # the third and the fourth are there once for each slice of their output
    assert len(convolutions) == 2 + len(crnn_int8.SLICES[2]) + len(crnn_int8.SLICES[3])
    for operator in convolutions:
        assert {graph.tensors[t].dtype for t in (*operator.inputs[:2], *operator.outputs)} == {"int8"}
    assert len(content) < len(crnn_quantize.convert(model, "float16", None))


def test_int8_weights_are_a_third_with_data_and_without(model: Any, clips: np.ndarray) -> None:
    float32 = crnn_quantize.convert(model, "float32", None)
    expected = np.asarray(model(clips, training=False))
    for calibration in (None, clips):
        content = crnn_quantize.convert(model, "int8-weights", calibration)
        assert len(content) < 0.36 * len(float32)
        np.testing.assert_allclose(scores(content, clips), expected, atol=0.03)


@pytest.mark.parametrize("recipe", ["float32", "float16", "int8-weights", "dynamic"])
def test_stream_has_its_states_in_the_same_order_on_both_sides(model: Any, recipe: str) -> None:
    graph = Model(crnn_quantize.convert(model, recipe, None, streaming=True))
    (given, *states), (made, *new) = graph.inputs, graph.outputs
    assert (given.name, given.shape) == ("log_mel", (1, 96, crnn_graph.STEP, 1))
    assert (made.name, made.shape) == ("scores", (1, 4))
    assert [(f"new_{state.name}", state.shape) for state in states] == [(state.name, state.shape) for state in new]
    assert len(states) == 5


@pytest.mark.parametrize("recipe", ["int8", "int16x8"])
def test_stream_in_integers_is_refused(model: Any, clips: np.ndarray, recipe: str) -> None:
    with pytest.raises(ConversionError, match=f"--streaming has no {recipe}.*--quantize int8-weights"):
        crnn_quantize.convert(model, recipe, clips, streaming=True)


def test_augment_keeps_the_clips_and_their_range(clips: np.ndarray) -> None:
    more = crnn_int8.augment(clips, 12)
    assert more.shape == (12, *clips.shape[1:])
    np.testing.assert_array_equal(more[:4], clips)
    assert len({clip.tobytes() for clip in more}) == 12
    for number, clip in enumerate(more[4:]):
        assert np.ptp(clip) <= np.ptp(clips[number % 4]) + 1e-3
    assert len(crnn_int8.augment(clips, 3)) == 3


@pytest.fixture(scope="module")
def published(crnn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts the published weights, calibrated on the author's clips."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "clips").mkdir()
    for path in crnn_data.glob("*.npy"):
        shutil.copy(path, folder / "clips")

    def convert(recipe: Any) -> tuple[Manifest, int]:
        output = folder / f"{recipe}.tflite"
        weights = str(crnn_data / crnn.WEIGHTS_FILE)
        if not output.exists():
            manifests[recipe] = edgekit.convert(
                "crnn", output, weights=weights, calibration=folder / "clips", quantize=recipe
            )
        return manifests[recipe], output.stat().st_size

    manifests: dict[str, Manifest] = {}
    return convert


@pytest.mark.parametrize(
    ("recipe", "on_clips", "share"),
    [("float32", 0.001, 1), ("float16", 0.01, 1), ("int8-weights", 0.02, 0.9), ("int8", 0.07, 0.7)],
)
def test_published_tagger_keeps_its_tags(published: Any, recipe: str, on_clips: float, share: float) -> None:
    """On the author's two log-mels, and on 24 copies of them moved in time, in each runtime here.

    int8 keeps 85 % of many copies, so that of 24 it is to keep 70 % whatever the rounding. One of the two clips lies
    where a gate flips: noise at 60 dB, a fifth of that of int8, changes a score of it by 0.04.
    """
    of_bundle, size = published(recipe)
    assert of_bundle.runtimes["litert"].status == "ok"
    for name, check in of_bundle.runtimes.items():
        if check.status != "not-installed":
            assert check.status == "ok" and check.max_abs_difference <= on_clips, (name, check)
            assert check.top1_agreement == 1 and check.within_0_03 >= share, (name, check)
    assert size <= published("float16")[1] or recipe == "float32"


def test_published_tagger_in_dynamic_range_is_refused(published: Any) -> None:
    """Its activations in 8 bits for a whole tensor flip the gates."""
    with pytest.raises(ConversionError, match=r"within 0\.03 .*int8-weights"):
        published("dynamic")

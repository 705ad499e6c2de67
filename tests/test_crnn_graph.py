from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.errors import ConversionError

pytestmark = pytest.mark.host
tf = pytest.importorskip("tensorflow")

from edgekit.converters import crnn, crnn_graph  # noqa: E402


def seeded(**options: Any) -> Any:
    """A CRNN whose every weight is different and whose scores are not all alike."""
    model = crnn.build(tags=4, **options)
    random = np.random.default_rng(2)
    for layer in model.layers:
        shapes = [weight.shape for weight in layer.weights]
        if "bn" in layer.name:
            gamma, beta, mean, variance = (random.uniform(0.5, 1.5, shape) for shape in shapes)
            layer.set_weights([gamma, beta - 1, mean - 1, variance])
        elif shapes:
            layer.set_weights([random.normal(0, 1.5 / np.sqrt(np.prod(shape[:-1]) or 9), shape) for shape in shapes])
    return model


def sound(frames: int, bands: int = 96) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, bands, frames, 1)).astype(np.float32)


@pytest.mark.parametrize("axis", ["time", "frequency"])
@pytest.mark.parametrize(("frames", "bands"), [(96, 96), (100, 128), (24, 200)])
def test_window_is_the_keras_model(axis: Any, frames: int, bands: int) -> None:
    model = seeded(frames=frames, num_mel_bins=bands, bn_axis=axis)
    x = sound(frames, bands)
    scores = crnn_graph.window(crnn_graph.fold(model))(x)["scores"]
    expected = np.asarray(model(x, training=False))
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def feed(model: Any, heard: np.ndarray, *, exact: bool, begin: float = 0.0) -> list[np.ndarray]:
    """The scores after each call, the states being ``begin`` at first."""
    graph = crnn_graph.stream(crnn_graph.fold(model), exact=exact).get_concrete_function()
    _, *specs = graph.structured_input_signature[0]
    states = [np.full(spec.shape, begin, np.float32) for spec in specs]
    scores = []
    for start in range(0, heard.shape[2], crnn_graph.STEP):
        given = heard[:, :, start : start + crnn_graph.STEP]
        made = graph(*map(tf.constant, [given, *states]))
        scores.append(np.asarray(made["scores"]))
        states = [np.asarray(made[f"new_{spec.name}"]) for spec in specs]
    return scores


def calls(frames: int, *, exact: bool) -> int:
    return crnn_graph.streaming_window_samples(frames, 256, exact=exact) // (256 * crnn_graph.STEP)


@pytest.mark.parametrize(("frames", "bands"), [(193, 96), (200, 128), (290, 200)])
def test_exact_stream_gives_what_the_keras_model_gives_for_the_last_window(frames: int, bands: int) -> None:
    model = seeded(frames=frames, num_mel_bins=bands, bn_axis="frequency")
    warm = calls(frames, exact=True)
    heard = sound(crnn_graph.STEP * (warm + 3), bands)
    for number, scores in enumerate(feed(model, heard, exact=True), 1):
        if number >= warm:
            last = heard[:, :, : crnn_graph.STEP * number][:, :, -frames:]
            np.testing.assert_allclose(scores, model(last, training=False), atol=1e-5)


@pytest.mark.parametrize(("frames", "bands"), [(96, 96), (200, 128)])
def test_stream_gives_what_the_reference_gives_for_all_at_once(frames: int, bands: int) -> None:
    model = seeded(frames=frames, num_mel_bins=bands, bn_axis="frequency")
    warm = calls(frames, exact=False)
    heard = sound(crnn_graph.STEP * (warm + 2), bands)
    for number, scores in enumerate(feed(model, heard, exact=False), 1):
        if number >= warm:
            reference = crnn_graph.reference(model, heard[:, :, : crnn_graph.STEP * number])
            np.testing.assert_allclose(scores, reference, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_warm_stream_has_forgotten_how_it_began(exact: bool) -> None:
    """As long as declared, and no shorter by two calls: then it still hears its first states."""
    model = seeded(frames=200, bn_axis="frequency")
    warm = calls(200, exact=exact)
    heard = sound(crnn_graph.STEP * warm)
    quiet, loud = (feed(model, heard, exact=exact, begin=begin) for begin in (0.0, 50.0))
    np.testing.assert_allclose(quiet[-1], loud[-1], atol=1e-5)
    assert np.abs(quiet[-3] - loud[-3]).max() > 1e-4


def test_stream_of_a_normalization_over_time_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"--streaming .* over time, .*build\(bn_axis='frequency'\)"):
        crnn_graph.stream(crnn_graph.fold(seeded(frames=96)))


def test_exact_stream_of_a_window_without_a_middle_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"--exact with a window of 96 frames: expected more than 192"):
        crnn_graph.stream(crnn_graph.fold(seeded(frames=96, bn_axis="frequency")), exact=True)

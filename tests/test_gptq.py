from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.host
tf = pytest.importorskip("tensorflow")

from edgekit.converters import gptq  # noqa: E402


def smooth(random: Any, count: int, channels: int) -> list[np.ndarray]:
    """Tensors whose neighbours resemble each other, in place and between channels."""
    mixed = random.normal(size=(channels, channels)).astype(np.float32)
    noise = random.normal(size=(count, 1, 16, 24, channels)).cumsum(2).cumsum(3).astype(np.float32) @ mixed
    return list(noise / noise.std())


def test_quantize_loses_less_of_the_output_than_rounding_each_weight() -> None:
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 4, 6)).astype(np.float32)
    inputs = smooth(random, 12, 4)
    seen, held_out = inputs[:8], inputs[8:]
    ours, scale = gptq.quantize(kernel, gptq.covariance(seen)[0])
    widest = np.abs(kernel).max((0, 1, 2)) / 127
    assert ours.dtype == np.int8 and np.abs(ours.astype(int)).max() <= 127

    def lost(weights: np.ndarray) -> float:
        difference = kernel - weights
        outputs = [np.asarray(tf.nn.conv2d(x, difference, 1, "VALID")) for x in held_out]
        return float(np.mean([np.var(y, (0, 1, 2)).sum() for y in outputs]))

    assert lost(ours.astype(np.float32) * scale) < 0.5 * lost(np.round(kernel / widest) * widest)


def test_quantize_of_inputs_that_never_vary_rounds_each_weight() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 3)).astype(np.float32)
    integers, scale = gptq.quantize(kernel, np.zeros((18, 18)))
    np.testing.assert_array_equal(integers, np.clip(np.round(kernel / scale), -127, 127))


def test_quantize_a_channel_without_weights() -> None:
    kernel = np.zeros((3, 3, 1, 2), np.float32)
    kernel[1, 1, 0, 1] = -254
    integers, scale = gptq.quantize(kernel, np.eye(9))
    np.testing.assert_allclose(integers * scale, kernel)
    assert integers[1, 1, 0, 1] == -127 and np.isfinite(scale).all()


def test_covariance_is_that_of_the_patches() -> None:
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(1, 5, 7, 2)).astype(np.float32) for _ in range(2))

    def patches(tensor: np.ndarray) -> np.ndarray:
        padded = np.pad(tensor[0], ((1, 1), (1, 1), (0, 0)))
        windows = [padded[row : row + 5, column : column + 7] for row in range(3) for column in range(3)]
        return np.stack(windows, 2).reshape(35, 18)

    covariance, mean = gptq.covariance([x], [y])
    np.testing.assert_allclose(mean, patches(x).mean(0), atol=1e-6)
    expected = (patches(x) - patches(x).mean(0)).T @ (patches(y) - patches(y).mean(0)) / 35
    np.testing.assert_allclose(covariance, expected, atol=1e-5)
    np.testing.assert_allclose(gptq.covariance([x])[0], np.cov(patches(x).T, bias=True), atol=1e-5)

"""LayerNormalization as EdgeKit's own operator.

Converted to int8 by TensorFlow it is a dozen operators, each of which rounds, and most of which XNNPACK does not take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from edgekit.converters.custom_ops import custom_op

OPERATOR = "EdgekitLayerNorm"


@functools.cache
def _operator(epsilon: float) -> Any:
    return custom_op(OPERATOR, epsilon=epsilon)(_normalized)


def _normalized(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + epsilon) * gamma + beta


class _AsOperator(keras.layers.LayerNormalization):  # type: ignore[misc]
    def call(self, inputs: Any) -> Any:
        axes = self.axis if isinstance(self.axis, list) else [self.axis]
        if axes not in ([-1], [len(inputs.shape) - 1]) or self.rms_scaling:
            return super().call(inputs)
        gamma = self.gamma if self.scale else tf.ones(inputs.shape[-1:])
        beta = self.beta if self.center else tf.zeros(inputs.shape[-1:])
        outputs = _operator(float(self.epsilon))(tf.cast(inputs, tf.float32), gamma, beta)
        return tf.cast(outputs, self.compute_dtype)


@contextmanager
def as_operator(model: Any) -> Iterator[None]:
    """Within the block each ``LayerNormalization`` in ``model`` over its last axis is a marked function.

    The layers themselves change their class: so it reaches those inside of nested models and of a user's own layers,
    which cannot be made anew.
    """
    layers = [layer for layer in model._flatten_layers() if type(layer) is keras.layers.LayerNormalization]
    try:
        for layer in layers:
            object.__setattr__(layer, "__class__", _AsOperator)
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "__class__", keras.layers.LayerNormalization)

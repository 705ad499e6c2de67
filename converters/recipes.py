"""The quantization recipes: from a Keras model with a static batch to a TFLite flatbuffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

Tensors = Iterable[npt.NDArray[np.float32]]


def convert(
    model: Any,
    recipe: str,
    calibration: Callable[[], Tensors] | None,
    registerer: Callable[[int], None] | None = None,
) -> bytes:
    """Converts ``model``.

    Args:
        model: a Keras model whose every shape is known.
        recipe: a name in ``RECIPES``.
        calibration: gives the input tensors, each (1, ...); for the recipes in ``targets.CALIBRATED``.
        registerer: adds the kernels of custom operators to TensorFlow's resolver at an address, for its calibrator.
            Without one, custom operators are an error.
    """
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if registerer:
        converter.allow_custom_ops = True
        converter.target_spec._experimental_custom_op_registerers = [registerer]
    return RECIPES[recipe](converter, calibration)


def _float32(converter: Any, _: Any) -> bytes:
    return bytes(converter.convert())


def _float16(converter: Any, _: Any) -> bytes:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return bytes(converter.convert())


def _int8_weights(converter: Any, _: Any) -> bytes:
    from litert_quantizer import quantizer, recipe

    quantized = quantizer.Quantizer(bytes(converter.convert()), recipe.weight_only_wi8_afp32()).quantize()
    return bytes(quantized.quantized_model)


def _dynamic(converter: Any, _: Any) -> bytes:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    _per_tensor_dense(converter)
    return bytes(converter.convert())


def _int8(converter: Any, calibration: Callable[[], Tensors]) -> bytes:
    return _calibrated(converter, calibration, tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.int8, tf.int8)


def _int16x8(converter: Any, calibration: Callable[[], Tensors]) -> bytes:
    return int16x8(converter, calibration, tf.int16)


def int16x8(converter: Any, calibration: Callable[[], Tensors], output: Any) -> bytes:
    """The recipe, with an output tensor of the TensorFlow type ``output``."""
    operators = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    # There is no 16-bit HARD_SWISH: what has no 16-bit form stays in float.
    return _calibrated(converter, calibration, operators, tf.int16, output, tf.lite.OpsSet.TFLITE_BUILTINS)


def _calibrated(
    converter: Any, calibration: Callable[[], Tensors], operators: Any, activations: Any, output: Any, *fallback: Any
) -> bytes:
    def representative_dataset() -> Iterator[list[npt.NDArray[np.float32]]]:
        for tensor in calibration():
            yield [tensor]

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative_dataset
    converter.target_spec.supported_ops = [operators, *fallback]
    converter.inference_input_type, converter.inference_output_type = activations, output
    _per_tensor_dense(converter)
    return bytes(converter.convert())


def _per_tensor_dense(converter: Any) -> None:
    # Per-channel weights make FULLY_CONNECTED a version 12 operator, which tflite-runtime 2.14 does not load.
    converter._experimental_disable_per_channel_quantization_for_dense_layers = True


RECIPES: dict[str, Callable[[Any, Any], bytes]] = {
    "float32": _float32,
    "float16": _float16,
    "int8-weights": _int8_weights,
    "dynamic": _dynamic,
    "int8": _int8,
    "int16x8": _int16x8,
}

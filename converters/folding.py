"""What a Keras model does to its pixels before the first layer that has weights, left to the device's preprocessing.

There it is a look-up table and costs nothing, in the graph it would be operators over the whole image.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from edgekit.converters.weights import first_words
from edgekit.errors import ConversionError

# Layers that change where pixels are and not what they are, and those that do nothing but in training.
_MOVING = tuple(
    getattr(keras.layers, name) for name in ("Resizing", "CenterCrop", "RandomCrop", "ZeroPadding2D", "Cropping2D")
)
_AUGMENTING = tuple(
    getattr(keras.layers, name) for name in dir(keras.layers) if name.startswith("Random") and name != "RandomCrop"
)

# Largest difference of an output, relative to the largest output, that the order of the arithmetic makes, and that
# pixels make which only one of two models rounds.
_SAME, _ROUNDED = 1e-4, 1e-2

Numbers = npt.NDArray[np.float64]


def fold(model: Any, shape: tuple[int, int, int]) -> tuple[Numbers, Numbers, Any]:
    """``scale``, ``offset`` and the rest of ``model``, which does with ``pixels * scale + offset`` what ``model`` does
    with pixels. Tried on noise: where it does not, ``model`` stays whole."""
    scale, offset, rest = _behind_scaling(model, shape[2])
    if rest is not None and rest is not model and _difference(model, rest, shape, scale, offset) < _SAME:
        return scale, offset, rest
    return np.ones(1), np.zeros(1), model


def _behind_scaling(model: Any, channels: int) -> tuple[Numbers, Numbers, Any]:
    """Takes the layers at the head of ``model`` off that do no more than ``x * scale + offset``: scale, offset, and a
    model of the others, None where there are none."""
    scale, offset = np.ones(1), np.zeros(1)
    tensor, end = model.inputs[0], model.outputs[0]
    while tensor is not end:
        calls = _calls(model, tensor)
        if len(calls) != 1 or len(calls[0].input_tensors) != 1 or len(calls[0].outputs) != 1:
            break
        layer, following = calls[0].operation, calls[0].outputs[0]
        if nested := _functional(layer):
            layer = nested
            its_scale, its_offset, rest = _behind_scaling(nested, channels)
        else:
            its_scale, its_offset, rest = _scaling(layer, channels)
        if rest is layer:
            break
        scale, offset = scale * its_scale, offset * its_scale + its_offset
        if rest is not None:
            given = keras.Input(batch_shape=rest.inputs[0].shape, dtype=rest.inputs[0].dtype)
            x = rest(given)
            return scale, offset, keras.Model(given, x if following is end else keras.Model(following, end)(x))
        tensor = following
    if tensor is end:
        return scale, offset, None
    return scale, offset, model if tensor is model.inputs[0] else keras.Model(tensor, end)


def _scaling(layer: Any, channels: int) -> tuple[Numbers, Numbers, Any]:
    """Scale and offset of ``layer``, each one number or one a channel, and None; or ``layer`` if it does more."""
    scale, offset = np.ones(1), np.zeros(1)
    if isinstance(layer, keras.layers.Rescaling):
        scale, offset = np.asarray(layer.scale, float), np.asarray(layer.offset, float)
    elif isinstance(layer, keras.layers.Normalization) and layer.mean is not None and not layer.invert:
        mean, variance = np.asarray(layer.mean, float), np.asarray(layer.variance, float)
        scale = 1 / np.maximum(np.sqrt(variance), keras.config.epsilon())
        offset = -mean * scale
    elif not isinstance(layer, _AUGMENTING):
        return scale, offset, layer
    with np.errstate(all="ignore"):  # (x - mean) / std must be able to say the same
        undone = np.isfinite(1 / scale).all() and np.isfinite(offset / scale).all()
    per_channel = all(n.size == 1 or (n.size == channels and n.shape[-1] == channels) for n in (scale, offset))
    return (scale.ravel(), offset.ravel(), None) if undone and per_channel else (np.ones(1), np.zeros(1), layer)


def normalizes(model: Any) -> bool:
    """Whether ``model`` scales its pixels, at once or behind layers that only move them."""
    tensors = [model.inputs[0]]
    for tensor in tensors:  # which grow in number
        for call in _calls(model, tensor):
            layer = call.operation
            if isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization):
                return True
            if (nested := _functional(layer)) and normalizes(nested):
                return True
            if isinstance(layer, _MOVING + _AUGMENTING):
                tensors += call.outputs
    return False


def _functional(layer: Any) -> Any:
    """A model used as a layer, as a plain function of its first input; None for any other layer."""
    if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
        return keras.Model(layer.inputs[0], layer.outputs[0]) if len(layer.inputs) == len(layer.outputs) == 1 else None
    return None


def _calls(model: Any, tensor: Any) -> list[Any]:
    """The calls of layers on ``tensor``. Keras has no public way to its graph."""
    nodes = (node for level in model._nodes_by_depth.values() for node in level)
    return [node for node in nodes if any(given is tensor for given in node.input_tensors)]


def on_float(model: Any, shape: tuple[int, int, int], name: str) -> tuple[Any, tuple[str, ...]]:
    """The layers of ``model``, which takes uint8 pixels, on a float32 input: the converters quantize that. And what
    the user should know of it."""
    mend = "build the model on a float input; quantization makes it 8-bit"
    try:
        given = keras.Input(model.inputs[0].shape[1:], dtype="float32")
        twin = keras.models.clone_model(model, input_tensors=given, clone_function=lambda layer: layer)
        difference = _difference(model, twin, shape)
    except Exception as error:
        # whatever its layers raise on a type that they were not made for
        raise ConversionError(
            f"model {name} takes uint8 pixels only ({type(error).__name__}: {first_words(error)})", mend=mend
        ) from error
    if not difference < _ROUNDED:
        raise ConversionError(
            f"model {name} takes uint8 pixels",
            expected="the same results from the same pixels as float32",
            got=f"results that differ by {difference:.2g} of the largest",
            mend=mend,
        )
    if difference < _SAME:
        return twin, ()
    rounds = "the model rounds its uint8 pixels inside, the converted one does not"
    return twin, (f"{rounds}: on noise, its results differ by {difference:.2g} of the largest",)


def _difference(
    model: Any, other: Any, shape: tuple[int, int, int], scale: Numbers | float = 1.0, offset: Numbers | float = 0.0
) -> float:
    """The largest difference between what ``model`` makes of pixels and ``other`` of ``pixels * scale + offset``, in
    parts of the largest result. NaN where either makes a NaN."""
    random, worst = np.random.default_rng(0), []
    for brightest in (255, 31):
        pixels = random.integers(0, brightest + 1, (1, *shape))
        ours = np.asarray(model(tf.cast(pixels, model.inputs[0].dtype), training=False))
        theirs = np.asarray(other(tf.cast(pixels * scale + offset, other.inputs[0].dtype), training=False))
        worst.append(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(ours)), np.finfo(float).tiny))
    return float(np.max(worst))


def numbers(values: Numbers) -> tuple[float, ...]:
    """One number where all are the same; 127.5 rather than 127.49999999999999."""
    numbers = tuple(float(f"{value:.12g}") for value in values)
    return numbers[:1] if len(set(numbers)) == 1 else numbers

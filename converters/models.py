"""The Keras model to convert: a MobileNetV3 with its weights, or a user's own classifier."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from edgekit.converters import folding
from edgekit.converters.weights import first_words, load_weights
from edgekit.errors import ConversionError

MOBILENETS: dict[str, Callable[..., Any]] = {
    "mobilenet-v3-small": keras.applications.MobileNetV3Small,
    "mobilenet-v3-large": keras.applications.MobileNetV3Large,
}
IMAGENET_CLASSES = 1000
# Where nothing else is said: classes, and side of the input in px.
DEFAULTS = {"classes": (IMAGENET_CLASSES, 224), "attention": (10, 512)}
ATTENTION_UNITS = 32


@dataclass(frozen=True)
class Classifier:
    """A Keras model (batch, height, width, 1 or 3) -> (batch, classes), and how pixels become its input.

    ``model`` begins behind the layers that normalize pixels: ``mean`` and ``std`` (one number, or one a channel) stand
    for them. ``static`` is the same model with a batch of 1: XNNPACK refuses tensors of dynamic shape. ``assumed`` says
    that ``mean`` and ``std`` are a guess. ``warnings`` are for the user to read.
    """

    model: Any
    static: Any
    size_wh: tuple[int, int]
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool
    warnings: tuple[str, ...] = ()


def open_model(
    name: str,
    *,
    weights: str,
    classes: int | None,
    input_size: int | None,
    mean: float | None,
    std: float | None,
    alpha: float = 1.0,
    minimalistic: bool = False,
    dropout: float | None = None,
    head: str = "classes",
) -> Classifier:
    """Builds the named model or loads the one at a path.

    Args:
        name: one of ``MOBILENETS``, or a path.
        weights: of a named model: ``none``, ``imagenet`` or a file.
        classes: how many; those of a loaded model are checked.
        input_size: side of the square input, px; of a named model, or of one that leaves it open.
        mean, std: a pixel x in 0..255 enters the model as ``(x - mean) / std``, before what the model itself does to
            it. By default 0 and 1 for a model that normalizes for itself, else 127.5 and 127.5.
        alpha: width multiplier of a named model.
        minimalistic: a named model without squeeze-and-excite, hard-swish and 5 x 5 kernels.
        dropout: rate before the last layer of a named model, 0.2 by default; it matters only to training.
        head: of a named model: ``classes``, Keras's own (1000 classes at 224 x 224 by default), or ``attention``: the
            last feature map, each of its channels weighed by a gate made of all their means (10 classes at 512 x 512).

    Raises:
        ConversionError: the model, its weights or an option do not fit.
    """
    options = {
        f"--weights {weights}": weights != "none",
        f"--alpha {alpha:g}": alpha != 1,
        "--minimalistic": minimalistic,
        f"--dropout {dropout}": dropout is not None,
        f"--head {head}": head != "classes",
    }
    warnings: tuple[str, ...] = ()
    if name in MOBILENETS:
        model, warnings = _named(name, weights, classes, input_size, float(alpha), minimalistic, dropout, head)
    elif given := [option for option, is_given in options.items() if is_given]:
        purpose = "load them into" if given[0].startswith("--weights") else "build"
        raise ConversionError(given[0], expected=f"{' or '.join(MOBILENETS)} to {purpose}", got=f"model {name}")
    else:
        model = _load(name)
        if any(layer.name == "bn_0_freq" for layer in getattr(model, "layers", [])):
            raise ConversionError(
                f"model {name} is a CRNN, which hears sound",
                mend=f"convert it as 'crnn --weights {name}', with the --frames and --bn-axis that it was trained with",
            )
    shape = _check(model, name, classes, input_size)
    # A plain function of one tensor, in place of a Sequential, or of a model that takes and gives a dict.
    model = keras.Model(model.inputs[0], model.outputs[0])
    takes_pixels = model.inputs[0].dtype == "uint8"
    if takes_pixels and (mean is not None or std is not None):
        raise ConversionError(
            f"model {name} takes uint8 pixels as they are",
            expected="neither --mean nor --std",
            got=f"{mean if mean is not None else std:g}",
            mend="leave the option out",
        )
    own = takes_pixels or folding.normalizes(model)
    scale, offset, model = folding.fold(model, shape)
    if model.inputs[0].dtype == "uint8":
        model, rounding = folding.on_float(model, shape, name)
        warnings += rounding
    # What the user asks for comes first: ((x - before) / per) * scale + offset, written as one (x - mean) / std.
    before = mean if mean is not None else 0.0 if own else 127.5
    per = std if std is not None else 1.0 if own else 127.5
    fixed = keras.Input(batch_shape=(1, *shape), dtype=model.inputs[0].dtype)
    return Classifier(
        model=model,
        static=keras.Model(fixed, model(fixed)),
        size_wh=(shape[1], shape[0]),
        channels=shape[2],
        classes=model.outputs[0].shape[1],
        mean=folding.numbers(before - offset * per / scale),
        std=folding.numbers(per / scale),
        assumed=not own and name not in MOBILENETS and (mean is None or std is None),
        warnings=warnings,
    )


def _check(model: Any, name: str, classes: int | None, input_size: int | None) -> tuple[int, int, int]:
    """Refuses what is no image classifier; height, width and channels of its input."""
    if not getattr(model, "inputs", None) or not getattr(model, "outputs", None):
        raise ConversionError(
            f"model {name} does not know the shape of its input",
            mend="save it as a functional model, or after it was called once on data",
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ConversionError(
            f"model {name}",
            expected="one input and one output",
            got=f"{len(model.inputs)} and {len(model.outputs)}",
            mend="give a model that maps one image to the scores of its classes",
        )
    shape, scores = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise ConversionError(
            f"model {name}: input",
            expected="images (batch, height, width, 1 or 3)",
            got=str(shape),
            mend="give an image classifier",
        )
    if len(scores) != 2 or scores[1] is None:
        raise ConversionError(
            f"model {name}: output", expected="scores (batch, classes)", got=str(scores), mend="give a classifier"
        )
    if model.inputs[0].dtype not in ("float32", "float16", "bfloat16", "uint8"):
        raise ConversionError(
            f"model {name}: input",
            expected="type float32 or uint8",
            got=str(model.inputs[0].dtype),
            mend="build the model on a float input; quantization makes it 8-bit",
        )
    height, width = (input_size if side is None else side for side in shape[1:3])
    if height is None or width is None:
        raise ConversionError(f"model {name} takes images of any size", mend="say which with --input-size PIXELS")
    if classes is not None and classes != scores[1]:
        raise ConversionError(
            f"model {name}",
            expected=f"{classes} classes, as --classes or the lines of --labels say",
            got=str(scores[1]),
            mend="give the label file that belongs to this model",
        )
    if input_size is not None and (height, width) != (input_size, input_size):
        raise ConversionError(
            f"--input-size {input_size}", expected=f"the model's own {width} x {height}", mend="leave the option out"
        )
    return height, width, shape[3]


def _named(
    name: str,
    weights: str,
    classes: int | None,
    input_size: int | None,
    alpha: float,
    minimalistic: bool,
    dropout: float | None,
    head: str,
) -> tuple[Any, tuple[str, ...]]:
    """A model of ``MOBILENETS``, and what the user should know of it."""
    if head not in DEFAULTS:
        raise ConversionError(f"--head {head}", expected=" or ".join(DEFAULTS), mend="give one of these")
    classes = classes or (None if head == "classes" else DEFAULTS[head][0])
    size = input_size or DEFAULTS[head][1]
    if size < 32:
        raise ConversionError(
            f"--input-size {size}", expected="32 or more for a MobileNetV3", mend="give a larger size"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConversionError(f"--alpha {alpha:g}", expected="a width multiplier above 0", mend="give 1 or 0.75")
    rate = 0.2 if dropout is None else dropout
    if not 0 <= rate < 1:
        raise ConversionError(f"--dropout {rate:g}", expected="a rate from 0 to below 1", mend="leave the option out")
    if weights == "imagenet":
        _check_imagenet(classes if head == "classes" else None, alpha, minimalistic)

    def build(initial: str | None) -> Any:
        options = {"alpha": alpha, "minimalistic": minimalistic, "weights": initial, "include_preprocessing": False}
        if head == "classes":
            options |= {"classes": classes or IMAGENET_CLASSES, "dropout_rate": rate}
        else:
            options["include_top"] = False
        model = MOBILENETS[name](input_shape=(size, size, 3), **options)
        return model if head == "classes" else _attention(model, classes, rate)

    if weights == "imagenet":
        try:
            model = build("imagenet")
        except Exception as error:
            # Keras raises a bare Exception for a failed download.
            file = (
                f"weights_mobilenet_v3_{name.rpartition('-')[2]}{'_minimalistic' * minimalistic}_224_{alpha}_float"
                f"{'_no_top_v2' * (head != 'classes')}.h5"
            )
            home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
            raise ConversionError(
                f"the ImageNet weights of {name} cannot be had (no network?)",
                mend=f"put Keras's file {file} into {home / 'models'}",
            ) from error
        random = f"the {head} head of {name} has random weights: train it on your images, and give its .keras file"
        return model, (random,) * (head != "classes")
    model = build(None)
    return model, () if weights == "none" else load_weights(model, Path(weights))


def _check_imagenet(classes: int | None, alpha: float, minimalistic: bool) -> None:
    if classes not in (None, IMAGENET_CLASSES):
        raise ConversionError(
            "--weights imagenet",
            expected=f"{IMAGENET_CLASSES} classes",
            got=str(classes),
            mend="train the model on your classes and give its .keras file",
        )
    if alpha not in ((1.0,) if minimalistic else (0.75, 1.0)):
        raise ConversionError(
            "--weights imagenet",
            expected="--alpha 1 with --minimalistic" if minimalistic else "--alpha 0.75 or 1",
            got=f"{alpha:g}",
            mend="Keras has no other file: give one of your own with --weights",
        )


def _attention(backbone: Any, classes: int | None, dropout: float) -> Any:
    """``backbone`` (batch, height, width, channels) with a gate on its channels, and a layer of classes.

    The gate is squeeze-and-excitation (Hu et al., 2018): the mean of each channel over the image, through a layer of
    ``ATTENTION_UNITS`` and one of all channels, to a factor in 0..1 for each channel.
    """
    layers, features = keras.layers, backbone.output
    channels = features.shape[-1]
    x = layers.GlobalAveragePooling2D(name="attention_pool")(features)
    x = layers.Dense(ATTENTION_UNITS, activation="relu", name="attention_squeeze")(x)
    x = layers.Dense(channels, activation="sigmoid", name="attention_excite")(x)
    x = layers.Reshape((1, 1, channels), name="attention_broadcast")(x)
    x = layers.Multiply(name="attention_gate")([features, x])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(classes, activation="softmax", name="predictions")(x)
    return keras.Model(backbone.input, x, name=f"{backbone.name}_attention")


def _load(name: str) -> Any:
    path = Path(name)
    if not path.exists():
        raise ConversionError(
            f"model {name!r} does not exist",
            expected=f"{' or '.join(MOBILENETS)}, or the path of a .keras, .h5 or SavedModel",
            mend="check the path",
        )
    try:
        if path.is_dir():
            return _saved_model(path)
        return keras.models.load_model(path, compile=False)
    except ConversionError:
        raise
    except Exception as error:
        # Keras raises nearly every type of exception here, with a page of text.
        raise ConversionError(
            f"model {name} cannot be loaded ({type(error).__name__}: {first_words(error)})",
            expected="a whole classifier saved as .keras, .h5 or SavedModel",
            mend="save it again, made of Keras's own layers, or give the .py with the others as --ops",
        ) from error


def _saved_model(path: Path) -> Any:
    """The default signature of a SavedModel as a Keras model."""
    if not (path / "saved_model.pb").exists():
        raise ConversionError(
            f"model {path}", expected="a SavedModel folder with saved_model.pb", got="none in it", mend="give another"
        )
    signatures = tf.saved_model.load(str(path)).signatures
    if "serving_default" not in signatures:
        raise ConversionError(
            f"model {path}",
            expected="a signature serving_default",
            got=str(list(signatures)),
            mend="export it with one",
        )
    signature = signatures["serving_default"]
    inputs = list(signature.structured_input_signature[1].values())
    outputs = signature.structured_outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConversionError(
            f"model {path}", expected="one input and one output", got=f"{len(inputs)} and {len(outputs)}"
        )
    given = keras.Input(shape=inputs[0].shape[1:], dtype=inputs[0].dtype.name)
    (result,) = keras.layers.TFSMLayer(path, call_endpoint="serving_default")(given).values()
    return keras.Model(given, result)

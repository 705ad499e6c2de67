"""The Keras model to convert: a MobileNetV3 with its weights, or a user's own classifier."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from edgekit.errors import ConversionError

MOBILENETS: dict[str, Callable[..., Any]] = {
    "mobilenet-v3-small": keras.applications.MobileNetV3Small,
    "mobilenet-v3-large": keras.applications.MobileNetV3Large,
}
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Classifier:
    """A Keras model (batch, height, width, 1 or 3) -> (batch, classes), and how pixels become its input.

    ``static`` is the same model with a batch of 1: XNNPACK refuses tensors of dynamic shape. ``assumed`` says that
    ``mean`` and ``std`` are a guess.
    """

    model: Any
    static: Any
    size_wh: tuple[int, int]
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumed: bool


def open_model(
    name: str, *, weights: str, classes: int | None, input_size: int | None, mean: float | None, std: float | None
) -> Classifier:
    """Builds the named model or loads the one at a path.

    Raises:
        ConversionError: the model or its weights do not fit.
    """
    if name in MOBILENETS:
        model = _mobilenet(name, weights, classes, input_size)
    elif weights != "none":
        raise ConversionError(
            f"--weights {weights}", expected=f"{' or '.join(MOBILENETS)} to load them into", got=f"model {name}"
        )
    else:
        model = _load(name)
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
    if model.inputs[0].dtype not in ("float32", "float16", "bfloat16"):
        raise ConversionError(
            f"model {name}: input",
            expected="type float32",
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
    fixed = keras.Input(batch_shape=(1, height, width, shape[3]), dtype=model.inputs[0].dtype)
    own = _normalizes(model)
    return Classifier(
        model=model,
        static=keras.Model(fixed, model(fixed)),
        size_wh=(width, height),
        channels=shape[3],
        classes=scores[1],
        mean=(mean if mean is not None else 0.0 if own else 127.5,),
        std=(std if std is not None else 1.0 if own else 127.5,),
        assumed=not own and name not in MOBILENETS and (mean is None or std is None),
    )


def _mobilenet(name: str, weights: str, classes: int | None, input_size: int | None) -> Any:
    size = input_size or 224
    if size < 32:
        raise ConversionError(
            f"--input-size {size}", expected="32 or more for a MobileNetV3", mend="give a larger size"
        )
    if weights == "imagenet" and classes not in (None, IMAGENET_CLASSES):
        raise ConversionError(
            "--weights imagenet",
            expected=f"{IMAGENET_CLASSES} classes",
            got=str(classes),
            mend="train the model on your classes and give its .keras file",
        )

    def build(initial: str | None) -> Any:
        return MOBILENETS[name](
            input_shape=(size, size, 3),
            weights=initial,
            classes=classes or IMAGENET_CLASSES,
            include_preprocessing=False,
        )

    if weights == "imagenet":
        try:
            return build("imagenet")
        except Exception as error:
            # Keras raises a bare Exception for a failed download.
            file = f"weights_mobilenet_v3_{name.rpartition('-')[2]}_224_1.0_float.h5"
            home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
            raise ConversionError(
                f"the ImageNet weights of {name} cannot be had (no network?)",
                mend=f"put Keras's file {file} into {home / 'models'}",
            ) from error
    model = build(None)
    if weights != "none":
        load_weights(model, Path(weights))
    return model


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
            f"model {name} cannot be loaded ({type(error).__name__}: {_first_words(error)})",
            expected="a whole classifier saved as .keras, .h5 or SavedModel",
            mend="save it again, made of Keras's own layers",
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


def _normalizes(model: Any) -> bool:
    """Whether the model begins with a layer that normalizes pixels itself."""
    for layer in model.layers[:4]:
        if isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization):
            return True
        if isinstance(layer, keras.Model):
            return _normalizes(layer)
        if not isinstance(layer, keras.layers.InputLayer):
            return False
    return False


def load_weights(model: Any, path: Path) -> None:
    """Loads the weights in a ``.weights.h5``, ``.keras`` or older ``.h5`` file into ``model``, checked layer by layer.

    Raises:
        ConversionError: they are not this model's; it says which layer, which shape, and which was expected.
    """
    if not path.is_file():
        raise ConversionError(
            f"weights {path} do not exist", expected="none, imagenet or a .weights.h5, .keras or .h5 file"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            file, legacy = _weights_file(path, Path(folder))
            if legacy:
                _check_weights(_legacy_layout(file), _model_layout(model), path)
            else:
                own = Path(folder, "own.weights.h5")
                model.save_weights(own)
                found, expected = _keras3_layout(file), _keras3_layout(own)
                # By position in the file, which is by class of layer; named by the model's own layers.
                names = {key: layer for key, (layer, _) in expected.items()}
                order = {key: n for n, key in enumerate(expected)}
                _check_weights(
                    [
                        (names.get(key, found[key][0]), found[key][1])
                        for key in sorted(found, key=lambda k: order.get(k, len(order)))
                    ],
                    list(expected.values()),
                    path,
                )
            model.load_weights(file)
        except ConversionError:
            raise
        except Exception as error:
            raise ConversionError(
                f"weights {path} cannot be loaded ({type(error).__name__}: {_first_words(error)})",
                mend="give a file that Keras's save_weights or save wrote",
            ) from error


Layout = list[tuple[str, list[tuple[int, ...]]]]


def _weights_file(path: Path, folder: Path) -> tuple[Path, bool]:
    """A copy with the suffix that Keras goes by, and whether it is of the older layout."""
    copy = folder / "given.weights.h5"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as inner, copy.open("wb") as outer:
            shutil.copyfileobj(inner, outer)
    else:
        shutil.copyfile(path, copy)
    with h5py.File(copy) as file:
        legacy = "layer_names" in file.attrs or "model_weights" in file
    return (copy.rename(folder / "given.h5"), True) if legacy else (copy, False)


def _legacy_layout(path: Path) -> Layout:
    with h5py.File(path) as file:
        root = file.get("model_weights", file)
        layers = [_text(name) for name in root.attrs["layer_names"]]
        layout = [(name, [root[name][_text(w)].shape for w in root[name].attrs["weight_names"]]) for name in layers]
    return [(name, shapes) for name, shapes in layout if shapes]


def _model_layout(model: Any) -> Layout:
    return [(layer.name, [tuple(w.shape) for w in layer.weights]) for layer in model.layers if layer.weights]


def _keras3_layout(path: Path) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
    """Path in the file -> layer's name and the shapes of its weights."""
    layout: dict[str, tuple[str, list[tuple[int, ...]]]] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Group) and key.endswith("/vars") and len(item):
            shapes = [item[str(n)].shape for n in range(len(item))]
            layout[key] = (_text(item.attrs.get("name", key)), shapes)

    with h5py.File(path) as file:
        file.visititems(visit)
    return layout


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else words[:200].rpartition(" ")[0] + " …"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _check_weights(found: Layout, expected: Layout, path: Path) -> None:
    for (layer, shapes), (_, wanted) in zip(found, expected, strict=False):
        if shapes != wanted:
            raise ConversionError(
                f"weights {path} do not fit: layer {layer}",
                expected=_shapes(wanted),
                got=_shapes(shapes),
                mend="give weights of this model, and --labels or --classes and --input-size that go with them",
            )
    if len(found) != len(expected):
        raise ConversionError(
            f"weights {path} do not fit",
            expected=f"{len(expected)} layers with weights",
            got=str(len(found)),
            mend="give weights of this model",
        )


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return " ".join(str(shape) for shape in shapes)

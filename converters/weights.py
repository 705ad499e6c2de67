"""Weights from a file into a Keras model, checked layer by layer."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt

from edgekit.errors import ConversionError

Layout = list[tuple[str, list[tuple[int, ...]]]]
Arrays = list[npt.NDArray[Any]]

# Keras 1 wrote the variance under the name running_std, and each gate of a GRU by itself.
_BATCH_NORMALIZATION = {"gamma": 0, "beta": 1, "mean": 2, "variance": 3, "std": 3}
_KIND = re.compile(rf"({'|'.join(_BATCH_NORMALIZATION)})(_\d+)?(:\d+)?$")
_GATE = re.compile(r"_([WUb])_([zrh])(_\d+)?(:\d+)?$")


def load_weights(model: Any, path: Path, top: str = "") -> tuple[str, ...]:
    """Loads the weights in a ``.weights.h5``, ``.keras`` or older ``.h5`` file into ``model``, checked layer by layer.

    An older file (Keras 1 and 2) may hold its kernels as (height, width, in, out), or as Theano did, (out, in, height,
    width), which are transposed. Those that Theano trained are turned: the file's attribute ``backend`` tells, or where
    it has none, as before Keras 1.2, its name.

    Args:
        top: the layer that a file may have beyond those of a model without a top.

    Returns:
        What was done to the weights that the user should know of.

    Raises:
        ConversionError: they are not this model's; it says which layer, which shape, and which was expected.
    """
    if not path.is_file():
        raise ConversionError(
            f"weights {path} do not exist", expected="a name that --help has, or a .weights.h5, .keras or .h5 file"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = _weights_file(path, Path(folder))
            with h5py.File(file) as opened:
                root = opened.get("model_weights", opened)
                if _names(root, "layer_names"):
                    return _load_legacy(model, root, path, top)
            _load_keras3(model, file, path, top)
        except ConversionError:
            raise
        except Exception as error:
            raise ConversionError(
                f"weights {path} cannot be loaded ({type(error).__name__}: {first_words(error)})",
                mend="give a file that Keras's save_weights or save wrote",
            ) from error
    return ()


def first_words(error: Exception) -> str:
    """A line's worth of what Keras says on a page: the beginning of the cause, which it puts last."""
    cause = str(error).rpartition("Exception encountered: ")[2]
    words = " ".join(re.sub(r"\x1b\[[\d;]*m", "", cause).split())  # it prints in bold, too
    return words if len(words) <= 200 else words[:200].rpartition(" ")[0] + " …"


def _weights_file(path: Path, folder: Path) -> Path:
    """A copy with the suffix that Keras goes by."""
    copy = folder / "given.weights.h5"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as inner, copy.open("wb") as outer:
            shutil.copyfileobj(inner, outer)
    else:
        shutil.copyfile(path, copy)
    return copy


def _load_keras3(model: Any, file: Path, path: Path, top: str) -> None:
    own = file.with_name("own.weights.h5")
    model.save_weights(own)
    found, expected = _keras3_layout(file), _keras3_layout(own)
    found = {key: item for key, item in found.items() if key in expected or not top or item[0] != top}
    missing = [layer for key, (layer, _) in expected.items() if key not in found]
    if missing and found.keys() < expected.keys():
        _refuse_count(missing[0], len(found), len(expected), path)
    # By position in the file, which is by class of layer; named by the model's own layers.
    names = {key: layer for key, (layer, _) in expected.items()}
    order = {key: n for n, key in enumerate(expected)}
    keys = sorted(found, key=lambda key: order.get(key, len(order)))
    _check([(names.get(key, found[key][0]), found[key][1]) for key in keys], list(expected.values()), path)
    model.load_weights(file)


def _keras3_layout(path: Path) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
    """Path in the file -> layer's name and the shapes of its weights."""
    layout: dict[str, tuple[str, list[tuple[int, ...]]]] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Group) and key.endswith("/vars") and len(item):
            shapes = [item[str(n)].shape for n in range(len(item))]
            # A recurrent layer keeps them in its cell; all cells have the same name.
            layer = file.get(key.replace("/cell/vars", "/vars"), item)
            layout[key] = (_text(layer.attrs.get("name", key)), shapes)

    with h5py.File(path) as file:
        file.visititems(visit)
    return layout


def _load_legacy(model: Any, root: Any, path: Path, top: str) -> tuple[str, ...]:
    """Layer for layer, in the order of the file, as Keras 1 and 2 did."""
    saved = [(name, arrays) for name in _names(root, "layer_names") if (arrays := _arrays(root[name]))]
    layers = [layer for layer in model.layers if layer.weights]
    if top and saved and saved[-1][0] == top != layers[-1].name:
        saved.pop()
    # This order of a layer's weights is that of the format, whatever order the layer itself has.
    variables = [layer.trainable_weights + layer.non_trainable_weights for layer in layers]
    expected: Layout = [
        (layer.name, [tuple(variable.shape) for variable in of_layer])
        for layer, of_layer in zip(layers, variables, strict=True)
    ]
    transposed = [
        (name, [_from_theano(array, layer, wanted) for array in arrays])
        for (name, arrays), layer, (_, [wanted, *_]) in zip(saved, layers, expected, strict=False)
    ] + saved[len(layers) :]

    def fitting(candidate: list[tuple[str, Arrays]]) -> int:
        return sum(_shapes(arrays) == wanted for (_, arrays), (_, wanted) in zip(candidate, expected, strict=False))

    # A kernel as wide as it is deep fits either way: the other layers of the file tell.
    of_theano = fitting(transposed) > fitting(saved)
    chosen = transposed if of_theano else saved
    _check([(name, _shapes(arrays)) for name, arrays in chosen], expected, path)
    backend = _text(root.attrs.get("backend", ""))
    turned = backend == "theano" or (not backend and "theano" in path.name.lower())
    told_by = "" if backend else ", as its name says: rename it if they were not"
    for layer, of_layer, (_, arrays) in zip(layers, variables, chosen, strict=True):
        for variable, array in zip(of_layer, arrays, strict=True):
            # Theano convolves where the others correlate.
            variable.assign(array[::-1, ::-1] if turned and _convolves(layer) and array.ndim == 4 else array)
    return (
        *([f"the kernels in {path} are (out, in, height, width): they were transposed"] * of_theano),
        *([f"the kernels in {path} were trained with Theano{told_by}: they were turned by 180 degrees"] * turned),
    )


def _arrays(group: Any) -> Arrays:
    """The weights of a layer; those of a batch normalization as gamma, beta, mean, variance, those of a GRU as kernel,
    recurrent kernel, bias, each with its gates side by side: update (z), reset (r), candidate (h)."""
    names = _names(group, "weight_names")
    gates = {match[1] + match[2]: name for name in names if (match := _GATE.search(name))}
    if len(gates) == len(names) == 9:
        joined = ([np.asarray(group[gates[weight + gate]]) for gate in "zrh"] for weight in "WUb")
        return [np.concatenate(parts, axis=-1) for parts in joined]
    kinds = {name: _BATCH_NORMALIZATION[match[1]] for name in names if (match := _KIND.search(name))}
    if len(kinds) == len(names) == 4:
        names.sort(key=kinds.__getitem__)
    return [np.asarray(group[name]) for name in names]


def _from_theano(array: npt.NDArray[Any], layer: Any, wanted: tuple[int, ...]) -> npt.NDArray[Any]:
    """(out, in, height, width), for a depthwise convolution (multiplier, in, height, width) or (in, multiplier, ...),
    -> as TensorFlow has it."""
    if array.ndim != 4 or not _convolves(layer):
        return array
    kernel = array.transpose(2, 3, 1, 0)
    if isinstance(layer, keras.layers.DepthwiseConv2D) and kernel.shape != wanted:
        return array.transpose(2, 3, 0, 1)
    return kernel


def _convolves(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)


def _names(group: Any, attribute: str) -> list[str]:
    """The names in an attribute, which Keras split over several (``layer_names0`` and on) where HDF5 had no room."""
    if attribute in group.attrs:
        return [_text(name) for name in group.attrs[attribute]]
    parts = itertools.takewhile(group.attrs.__contains__, (f"{attribute}{n}" for n in itertools.count()))
    return [_text(name) for part in parts for name in group.attrs[part]]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _check(found: Layout, expected: Layout, path: Path) -> None:
    for (layer, shapes), (_, wanted) in zip(found, expected, strict=False):
        if shapes != wanted:
            raise ConversionError(
                f"weights {path} do not fit: layer {layer}",
                expected=" ".join(map(str, wanted)),
                got=" ".join(map(str, shapes)),
                mend="give weights of this model, and the --labels or --classes and sizes that go with them",
            )
    if len(found) != len(expected):
        _refuse_count(max(found, expected, key=len)[min(len(found), len(expected))][0], len(found), len(expected), path)


def _refuse_count(layer: str, found: int, expected: int, path: Path) -> None:
    raise ConversionError(
        f"weights {path} do not fit: layer {layer} is {'beyond the model' if found > expected else 'not in the file'}",
        expected=f"{expected} layers with weights",
        got=str(found),
        mend="give weights of this model",
    )


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [array.shape for array in arrays]

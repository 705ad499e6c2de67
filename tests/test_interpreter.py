from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgekit
from edgekit import runtimes
from edgekit.errors import BundleError, EdgekitError, RuntimeMissingError


@pytest.mark.parametrize("recipe", ["float32", "int8"])
@pytest.mark.parametrize("label", ["red", "green", "blue"])
def test_predict_names_the_colour(models: Path, colour: Callable[..., Any], recipe: str, label: str) -> None:
    with edgekit.load(models / f"{recipe}.tflite") as model:
        predictions = model.predict(colour(label, (640, 480)))
        assert predictions[0].label == label and predictions[0].score > 0.5
        assert [p.score for p in predictions] == sorted((p.score for p in predictions), reverse=True)
        assert sum(p.score for p in predictions) == pytest.approx(1, abs=0.02)
        assert model.predict(colour(label)[..., ::-1], channel_order="bgr", top_k=1)[0].label == label


def test_stages_make_the_prediction(models: Path, colour: Callable[..., Any]) -> None:
    image = colour("green")
    with edgekit.load(models / "int8.tflite") as model:
        tensor = model.preprocess(image)
        raw = model.invoke(tensor)
        assert (tensor.dtype, raw.dtype, raw.shape) == (np.int8, np.int8, (3,))
        assert model.decode(raw) == model.predict(image)
        assert model.decode(raw, threshold=0.5) == model.predict(image, top_k=1)


def test_labels_file_replaces_the_packed_labels(models: Path, tmp_path: Path, colour: Callable[..., Any]) -> None:
    (tmp_path / "labels.txt").write_text("rouge\nvert\nbleu\n")
    with edgekit.load(models / "float32.tflite", labels=tmp_path / "labels.txt") as model:
        assert model.predict(colour("blue"))[0].label == "bleu"


def test_model_runs_on_after_its_file_was_cut(models: Path, tmp_path: Path, colour: Callable[..., Any]) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes((models / "float32.tflite").read_bytes())
    with edgekit.load(path) as model:
        path.write_bytes(b"")
        assert model.predict(colour("red"))[0].label == "red"


def test_preferred_runtime_is_used(models: Path) -> None:
    installed = list(runtimes.installed())
    with edgekit.load(models / "int8.tflite") as model:
        assert model.runtime == installed[0]
    assert installed == sorted(installed, key=list(runtimes.RUNTIMES).index)


def test_runtime_that_is_not_installed_is_an_error(models: Path) -> None:
    missing = next(name for name in runtimes.RUNTIMES if name not in runtimes.installed())
    with pytest.raises(RuntimeMissingError, match="pip install"):
        edgekit.load(models / "int8.tflite", runtime=missing)
    with pytest.raises(RuntimeMissingError, match="expected litert or tflite-runtime"):
        edgekit.load(models / "int8.tflite", runtime="other")


def test_runtime_that_does_not_fit_numpy_is_an_error(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tflite-runtime with NumPy 2 imports and then fails at its first call."""
    import importlib.metadata

    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.4.6" if name == "numpy" else version(name))
    monkeypatch.setitem(runtimes.RUNTIMES, "tflite-runtime", ("json", "pip"))  # one that imports
    with pytest.raises(RuntimeMissingError, match=r"its wheel needs NumPy 1, got 2\.4\.6"):
        edgekit.load(models / "int8.tflite", runtime="tflite-runtime")
    assert "tflite-runtime" not in runtimes.installed()


def test_delegate_that_is_not_supported_is_an_error(models: Path) -> None:
    with pytest.raises(BundleError, match="expected auto or cpu"):
        edgekit.load(models / "int8.tflite", delegate="quantum")


@pytest.mark.parametrize("threads", [0, 100_000])
def test_threads_out_of_range_are_an_error(models: Path, threads: int) -> None:
    with pytest.raises(BundleError, match="threads: expected 1 to 256"):
        edgekit.load(models / "int8.tflite", threads=threads)


def test_image_that_does_not_fit_is_an_error(models: Path) -> None:
    with edgekit.load(models / "int8.tflite") as model, pytest.raises(EdgekitError, match="expected uint8"):
        model.predict(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


def test_macaw_is_named(vision_data: Path) -> None:
    image = cv2.cvtColor(cv2.imread(str(vision_data / "parrot.jpg")), cv2.COLOR_BGR2RGB)
    labels = vision_data / "imagenet_labels.txt"
    with edgekit.load(vision_data / "mobilenet_v2_1.0_224_quant.tflite", labels=labels) as model:
        (best,) = model.predict(image, top_k=1)
    assert (best.label, best.score > 0.9) == ("macaw", True)


def test_custom_operator_nobody_has_is_named(vision_data: Path) -> None:
    with pytest.raises(BundleError, match="needs the custom operator edgetpu-custom-op version 1"):
        edgekit.load(vision_data / "mobilenet_v1_0.25_128_quant_edgetpu.tflite")


@pytest.mark.parametrize("name", ["keras_lstm_mnist_ptq", "deeplabv3_mnv2_dm05_pascal_quant", "model_invoking_error"])
def test_model_that_is_no_image_classifier_is_refused(vision_data: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"expected .*got .*give an image classifier"):
        edgekit.load(vision_data / f"{name}.tflite")

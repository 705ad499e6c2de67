from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    with pytest.raises(BundleError, match="expected auto, cpu, coral, gpu or the path of a delegate library"):
        edgekit.load(models / "int8.tflite", delegate="quantum")


def test_threads_may_share_a_model(models: Path, colour: Callable[..., Any]) -> None:
    labels = ["red", "green", "blue"] * 200
    images = {label: colour(label) for label in set(labels)}
    with edgekit.load(models / "float32.tflite") as model, ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda label: model.predict(images[label])[0].label, labels)) == labels


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
        edgekit.load(vision_data / "mobilenet_v1_0.25_128_quant_edgetpu.tflite", delegate="cpu")


@pytest.mark.parametrize("name", ["keras_lstm_mnist_ptq", "deeplabv3_mnv2_dm05_pascal_quant", "model_invoking_error"])
def test_model_that_is_no_image_classifier_is_refused(vision_data: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"expected .*got .*give an image classifier"):
        edgekit.load(vision_data / f"{name}.tflite")


def tone(hz: float, samples: int = 12_288) -> np.ndarray:
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(samples) / 12_000)).astype(np.float32)


@pytest.mark.parametrize(("hz", "label"), [(440, "low"), (3000, "high"), (0, "silence")])
@pytest.mark.parametrize("samples", [6144, 20_000, 5900])
def test_predict_names_what_is_heard(sound_models: Path, hz: float, label: str, samples: int) -> None:
    with edgekit.load(sound_models / "window.tflite") as model:
        (best,) = model.predict(tone(hz, samples), threshold=0.5)
        assert best.label == label and model.warm
        assert model.predict((tone(hz, samples) * 32_768).astype(np.int16), top_k=1)[0].label == label


def test_predict_takes_the_middle_of_what_is_longer(sound_models: Path) -> None:
    sound = np.concatenate([tone(3000, 10_000), tone(440, 6144), tone(3000, 10_000)])
    with edgekit.load(sound_models / "window.tflite") as model:
        assert [p.label for p in model.predict(sound, threshold=0.5)] == ["low"]


def test_stream_predicts_once_it_is_warm_whatever_the_pieces(sound_models: Path) -> None:
    with edgekit.load(sound_models / "stream.tflite") as model:
        assert not model.warm and model.predict(tone(440, 6143)) == [] and not model.warm
        last = model.predict(tone(440, 1))
        assert model.warm and last[0].label == "low"
        assert model.predict(tone(440, 100)) == last  # not a hop yet
        assert model.predict(tone(3000, 12_288), top_k=1)[0].label == "high"


def test_stream_remembers_until_it_is_reset(sound_models: Path) -> None:
    hops = tone(440, 6144).reshape(2, 3072)
    with edgekit.load(sound_models / "stream.tflite") as model:
        first = [model.invoke(model.preprocess(hop)).tolist() for hop in hops]
        again = [model.invoke(model.preprocess(hop)).tolist() for hop in hops]
        assert first[0] != again[0] and model.warm
        model.reset()
        assert not model.warm
        assert [model.invoke(model.preprocess(hop)).tolist() for hop in hops] == first
        assert model.decode(model.invoke(model.preprocess(hops[0])), threshold={"high": 0.5, "*": 1}) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_stream_begins_anew_after_samples_that_are_not_finite(sound_models: Path, bad: float) -> None:
    with edgekit.load(sound_models / "stream.tflite") as model:
        model.predict(tone(440))
        with pytest.raises(EdgekitError, match="finite samples"):
            model.predict(np.full(3072, bad, np.float32))
        assert not model.warm and model.predict(tone(3000, 3072)) == []
        assert model.predict(tone(3000, 3072), top_k=1)[0].label == "high"


@pytest.mark.parametrize(
    ("sound", "complaint"),
    [
        (np.zeros((10, 2), np.float32), "mono samples"),
        (np.zeros(10, np.uint8), "float in -1..1 or int16"),
        (np.full(10, np.nan), "finite samples"),
        (np.zeros(0), "at least one sample"),
    ],
)
def test_sound_that_does_not_fit_is_an_error(sound_models: Path, sound: np.ndarray, complaint: str) -> None:
    with edgekit.load(sound_models / "window.tflite") as model, pytest.raises(EdgekitError, match=complaint):
        model.predict(sound)
    with edgekit.load(sound_models / "stream.tflite") as model:
        if "at least one" not in complaint and "finite" not in complaint:
            with pytest.raises(EdgekitError, match=complaint):
                model.predict(sound)
        with pytest.raises(EdgekitError, match="expected 3072 samples, a hop of the stream, got 10"):
            model.preprocess(np.zeros(10, np.float32))

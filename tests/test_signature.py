from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit import bundle
from edgekit.audio_preprocess import StreamPreprocessor, WindowPreprocessor, fit
from edgekit.errors import BundleError
from edgekit.manifest import AudioInput

replace: Any = msgspec.structs.replace


def reread(path: Path, **changes: Any) -> bundle.Bundle:
    """The bundle, had its manifest been another: fields of its input or front end."""
    file = bundle.read_file(path)
    assert file.manifest and isinstance(file.manifest.input, AudioInput)
    front_end = {
        name: changes.pop(name) for name in list(changes) if name in file.manifest.input.front_end.__struct_fields__
    }
    given = replace(file.manifest.input, **changes)
    given = replace(given, front_end=replace(given.front_end, **front_end))
    return bundle.classifier(dataclasses.replace(file, manifest=replace(file.manifest, input=given)))


@pytest.mark.parametrize("name", ["window", "stream"])
def test_bundle_of_sound_is_read(sound_models: Path, name: str) -> None:
    read = reread(sound_models / f"{name}.tflite")
    assert isinstance(read.input, AudioInput) and read.labels == ("silence", "low", "high")
    assert read.input.tensor_shape == tuple(read.file.model.inputs[0].shape) and read.output.multi_label


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        (
            "window",
            {"window_samples": 6143},
            r"expected the log-mel frames of its sound, \(1, 16, 24, 1\), got \(1, 16, 25",
        ),
        ("window", {"num_mel_bins": 17}, r"\(1, 17, 25, 1\)"),
        ("window", {"streaming": True}, r"\(1, 16, 12, 1\)"),
        ("stream", {"streaming": False}, "expected one input and one output, got 2 inputs and 2 outputs"),
        ("stream", {"hop_samples": 2560}, r"\(1, 16, 10, 1\)"),
        ("stream", {"hop_samples": 3000}, "hop_samples of a stream: expected a multiple of frame_hop_samples, 256"),
        ("stream", {"window_samples": 6145}, "window_samples of a stream: expected a multiple"),
        ("stream", {"fft_samples": 1024}, "fft_samples of a stream: expected at most twice frame_hop_samples, 256"),
        ("stream", {"range_db": 80.0}, "range_db of a stream: expected none"),
    ],
)
def test_bundle_whose_tensors_and_manifest_differ_is_refused(
    sound_models: Path, name: str, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BundleError, match=complaint):
        reread(sound_models / f"{name}.tflite", **changes)


def test_states_that_do_not_return_as_they_came_are_refused(sound_models: Path) -> None:
    file = bundle.read_file(sound_models / "stream.tflite")

    class Model:
        inputs, outputs = (
            file.model.inputs,
            [file.model.outputs[0], dataclasses.replace(file.model.outputs[1], dtype="int8")],
        )

    with pytest.raises(BundleError, match=r"state 1: expected an output as the input, .*float32.*got .*int8"):
        bundle.classifier(dataclasses.replace(file, model=Model()))  # type: ignore[arg-type]


def test_sound_is_fitted_to_the_window() -> None:
    sound = np.arange(1, 8, dtype=np.float32)
    assert fit(sound, 9).tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert fit(sound, 3).tolist() == [3, 4, 5] and fit(sound, 7).tolist() == sound.tolist()


def test_quantized_tensor_is_near_the_float_one(sound_models: Path) -> None:
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 6144)
    for name, kind in (("window", WindowPreprocessor), ("stream", StreamPreprocessor)):
        given = bundle.read(sound_models / f"{name}.tflite").input
        assert isinstance(given, AudioInput)
        part = sound[: given.hop_samples] if given.streaming else sound
        real, quantized = kind(given)(part), kind(given, "int8", 0.5, 10)(part)
        assert quantized.dtype == np.int8 and quantized.shape == real.shape == given.tensor_shape
        np.testing.assert_allclose((quantized.astype(float) - 10) * 0.5, np.clip(real, -69, 58.5), atol=0.2501)

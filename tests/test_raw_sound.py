from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit import bundle, custom_ops
from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import AudioInput

pytestmark = pytest.mark.skipif(custom_ops.find_library() is None, reason="EdgeKit's library of operators is not built")


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """A tone that glides up, over noise."""
    seconds = np.arange(samples) / 12_000
    noise = np.random.default_rng(seed).normal(scale=0.02, size=samples)
    return (0.3 * np.sin(2 * np.pi * (200 + 900 * seconds) * seconds) + noise).astype(np.float32)


def scores(predictions: list[Any]) -> dict[str, float]:
    return {prediction.label: prediction.score for prediction in predictions}


def test_tensor_is_the_sound(sound_models: Path) -> None:
    for name, samples in (("window", 6144), ("stream", 3072)):
        of_bundle = bundle.read(sound_models / f"{name}_in_graph.tflite")
        assert isinstance(of_bundle.input, AudioInput) and of_bundle.input.front_end_in_graph
        assert of_bundle.file.model.inputs[0].shape == (1, samples) == of_bundle.input.tensor_shape


@pytest.mark.parametrize("samples", [6144, 20_000, 5000, 1])
def test_window_in_the_graph_predicts_as_without(sound_models: Path, samples: int) -> None:
    x = sound(samples)
    with (
        edgekit.load(sound_models / "window.tflite") as outside,
        edgekit.load(sound_models / "window_in_graph.tflite") as inside,
    ):
        for given in (x, (x * 32_768).astype(np.int16)):
            assert scores(inside.predict(given)) == pytest.approx(scores(outside.predict(given)), abs=1e-4)


def test_stream_in_the_graph_predicts_as_without(sound_models: Path) -> None:
    """Also after it has begun anew."""
    with (
        edgekit.load(sound_models / "stream.tflite") as outside,
        edgekit.load(sound_models / "stream_in_graph.tflite") as inside,
    ):
        for seed in range(2):
            for piece in np.split(sound(30_000, seed), [100, 5000, 9000, 20_000]):
                expected = scores(outside.predict(piece))
                assert scores(inside.predict(piece)) == pytest.approx(expected, abs=1e-4)
            assert expected and inside.warm
            outside.reset()
            inside.reset()


def test_samples_that_are_not_finite_are_told(sound_models: Path) -> None:
    x = sound(6144)
    with edgekit.load(sound_models / "window_in_graph.tflite") as model:
        with pytest.raises(EdgekitError, match="at least one sample"):
            model.predict(x[:0])
        x[17] = np.nan
        with pytest.raises(EdgekitError, match="finite samples"):
            model.predict(x)
        with pytest.raises(BundleError, match=r"EdgekitLogMel \(node 0\): sound: expected finite samples"):
            model.invoke(x[None])
        assert model.predict(sound(6144))
    with edgekit.load(sound_models / "stream_in_graph.tflite") as stream:
        stream.predict(sound(6144))
        with pytest.raises(EdgekitError, match="finite samples"):
            stream.predict(x)
        assert not stream.warm and stream.predict(sound(6144)) and stream.warm


@pytest.mark.parametrize("name", ["window", "stream"])
def test_file_is_streamed_through_the_graph(sound_models: Path, name: str, tmp_path: Path, edgekit_cli: Any) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(12_000)
        file.writeframes((sound(30_000) * 32_767).astype("<i2").tobytes())
    found = []
    for bundle_name in (name, f"{name}_in_graph"):
        shutil.copy(sound_models / f"{bundle_name}.tflite", tmp_path)
        result = edgekit_cli(
            "run", f"{bundle_name}.tflite", "--source", "sound.wav", "--broker", "none", "--json", "--top-k", "1"
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        found.append([(line["seq"], line["predictions"][0]["label"]) for line in lines])
    assert found[0] == found[1] and len(found[0]) > 3
    assert "in the graph" in edgekit_cli("inspect", f"{name}_in_graph.tflite").stdout


def test_bundle_whose_graph_takes_something_else_is_refused(sound_models: Path, tmp_path: Path) -> None:
    file = bundle.read_file(sound_models / "window.tflite")
    assert file.manifest
    import msgspec

    input = msgspec.structs.replace(file.manifest.input, front_end_in_graph=True)
    manifest = msgspec.structs.replace(file.manifest, input=input)
    (tmp_path / "wrong.tflite").write_bytes(bundle.pack(file.content, manifest, ("silence", "low", "high")))
    with pytest.raises(BundleError, match=r"expected the samples of its sound, \(1, 6144\), got \(1, 16, 25, 1\)"):
        bundle.read(tmp_path / "wrong.tflite")

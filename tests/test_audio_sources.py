from __future__ import annotations

import json
import threading
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import edgekit
from edgekit.errors import EdgekitError, SourceError

soundfile = pytest.importorskip("soundfile")
SCHEMA = json.loads(resources.files("edgekit").joinpath("schemas/prediction.json").read_text())
HOP_S, WINDOW_S = 0.256, 0.512


def tones(*hz: float, seconds: float = 1.0, rate_hz: int = 12_000) -> np.ndarray:
    """One after the other; 0 is silence."""
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    return np.concatenate([0.2 * np.sin(2 * np.pi * one * time_s) for one in hz])


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Stereo at 48 kHz: a second each of a low tone, silence and a high tone."""
    sound = tones(440, 0, 3000, rate_hz=48_000)
    soundfile.write(tmp_path / "recording.flac", np.stack([sound, sound], 1), 48_000)
    return tmp_path / "recording.flac"


def seconds(window: Any) -> tuple[datetime, datetime]:
    start, end = (datetime.fromisoformat(at.replace("Z", "+00:00")) for at in (window.start, window.end))
    return start, end


@pytest.mark.parametrize(("name", "windows"), [("window", 11), ("stream", 10)])
def test_file_is_heard_to_its_end(sound_models: Path, recording: Path, name: str, windows: int, broker: Any) -> None:
    received = broker.subscribe("edgekit/pi/main/prediction", "-C", str(windows))
    messages: list[Any] = []
    counts = edgekit.run(
        sound_models / f"{name}.tflite",
        str(recording),
        broker=broker.url,
        device_id="pi",
        on_prediction=messages.append,
    )
    assert (counts.captured, counts.inferred, counts.dropped, counts.failed, counts.in_flight) == (
        windows,
        windows,
        0,
        0,
        0,
    )
    assert [message.input.frame for message in messages] == list(range(windows))
    assert {message.input.file for message in messages} == {"recording.flac"}
    labels = [message.predictions[0].label for message in messages]
    assert labels[:2] == ["low"] * 2 and labels[4:6] == ["silence"] * 2 and labels[-2:] == ["high"] * 2
    times = [seconds(message.window) for message in messages]
    assert [message.captured_at for message in messages] == [message.window.end for message in messages]
    for number, (start, end) in enumerate(times[:10]):
        assert (end - start).total_seconds() == pytest.approx(WINDOW_S, abs=0.002)
        assert (start - times[0][0]).total_seconds() == pytest.approx(number * HOP_S, abs=0.002)
    if name == "window":  # the last one ends with the sound
        assert (times[-1][1] - times[0][0]).total_seconds() == pytest.approx(3, abs=0.01)
    for _, payload in received():
        jsonschema.validate(payload, SCHEMA)
        assert set(payload["window"]) == {"start", "end"}


def test_file_gives_what_predict_gives(sound_models: Path, recording: Path) -> None:
    """The stream also hop by hop, and whatever the pieces are."""
    from edgekit.audio import read_audio

    sound = np.concatenate(list(read_audio(recording, 12_000)))
    for name in ("window", "stream"):
        heard = [m.predictions for m in edgekit.stream(sound_models / f"{name}.tflite", str(recording))]
        with edgekit.load(sound_models / f"{name}.tflite") as model:
            if name == "window":
                expected = [model.predict(sound[3072 * n : 3072 * n + 6144]) for n in range(10)]
            else:
                expected = [model.predict(hop) for hop in sound[: 11 * 3072].reshape(11, 3072)][1:]
                assert model.predict(sound[:0]) == expected[-1]
        assert heard[:10] == expected


def test_hop_is_another_if_told_so(sound_models: Path, recording: Path) -> None:
    messages = list(edgekit.stream(sound_models / "window.tflite", str(recording), hop_s=1.0))
    assert [m.predictions[0].label for m in messages] == ["low", "silence", "high", "high"]


@pytest.mark.parametrize("hop_s", [0, -1, float("nan"), float("inf")])
def test_hop_that_is_none_is_refused(sound_models: Path, recording: Path, hop_s: float) -> None:
    with pytest.raises(EdgekitError, match="hop_s: expected seconds"):
        list(edgekit.stream(sound_models / "window.tflite", str(recording), hop_s=hop_s))


def test_hop_where_there_is_none_to_choose_is_refused(sound_models: Path, models: Path, red: Path) -> None:
    for bundle, source, complaint in (
        (sound_models / "stream.tflite", "mic", "streams"),
        (models / "int8.tflite", red, "takes images"),
    ):
        with pytest.raises(EdgekitError, match=f"hop: .*got one that {complaint}.*leave it out"):
            list(edgekit.stream(bundle, source, hop_s=1))


def test_short_file_is_one_window(sound_models: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", tones(440, seconds=0.3), 12_000)
    (message,) = edgekit.stream(sound_models / "window.tflite", str(tmp_path / "short.wav"))
    start, end = seconds(message.window)
    assert (end - start).total_seconds() == pytest.approx(0.3, abs=0.002)
    with pytest.raises(SourceError, match=r"too short for a model that streams: expected at least 0\.51 s"):
        list(edgekit.stream(sound_models / "stream.tflite", str(tmp_path / "short.wav")))


def test_one_sample_is_one_window(sound_models: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 12_000)
    (message,) = edgekit.stream(sound_models / "window.tflite", str(tmp_path / "one.wav"))
    assert message.predictions


@pytest.mark.parametrize(("name", "inferred", "failed"), [("window", 9, 2), ("stream", 8, 1)])
def test_samples_that_are_not_finite_fail_and_are_not_heard_later(
    sound_models: Path, tmp_path: Path, name: str, inferred: int, failed: int, caplog: Any
) -> None:
    sound = tones(440, 440, 440)
    sound[15_000:15_200] = np.nan  # within the fifth hop
    soundfile.write(tmp_path / "nan.wav", sound, 12_000, subtype="FLOAT")
    messages: list[Any] = []
    counts = edgekit.run(
        sound_models / f"{name}.tflite", str(tmp_path / "nan.wav"), broker="none", on_prediction=messages.append
    )
    assert (counts.inferred, counts.failed, counts.in_flight) == (inferred, failed, 0)
    assert {message.predictions[0].label for message in messages} == {"low"}
    assert "NaN or infinite" in caplog.text


def test_loop_begins_again_until_it_is_stopped(sound_models: Path, recording: Path) -> None:
    for name, windows in (("window", 11), ("stream", 10)):
        stop, frames = threading.Event(), []

        def count(message: Any, frames: list[int] = frames, stop: threading.Event = stop) -> None:
            frames.append(message.input.frame)
            if len(frames) == 25:
                stop.set()

        edgekit.run(
            sound_models / f"{name}.tflite", str(recording), broker="none", loop=True, stop=stop, on_prediction=count
        )
        assert frames == [*range(windows), *range(windows), *range(25 - 2 * windows)]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("camera:0", "stream main: source camera:0: expected sound, which its bundle takes, got images"),
        ("rtsp://ann:hunter2@cam/1", "source rtsp://cam/1: expected sound"),
        (".", "'.' is a folder: expected mic"),
        ("nowhere.wav", "does not exist"),
        ("text.mp3", "text.mp3 is not a sound file"),
        ("picture.png", "picture.png is not a sound file"),
        ("empty.flac", "empty.flac is empty"),
    ],
)
def test_source_that_gives_no_sound_is_an_error(
    sound_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: Path, spec: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.mp3").write_text("this is no sound\n" * 100)
    Path("picture.png").write_bytes((frames / "1-green.png").read_bytes())
    Path("empty.flac").touch()
    for name in ("window", "stream"):
        with pytest.raises(SourceError, match=complaint) as caught:
            list(edgekit.stream(sound_models / f"{name}.tflite", spec))
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("spec", ["mic", "mic:USB", "recording.flac"])
def test_sound_for_a_model_of_images_is_an_error(models: Path, spec: str) -> None:
    with pytest.raises(SourceError, match=f"source {spec}: expected images, which its bundle takes, got sound"):
        list(edgekit.stream(models / "int8.tflite", spec))


def test_thresholds_by_tag(sound_models: Path, recording: Path, edgekit_cli: Any, edgekit_fails: Any) -> None:
    command = ("run", sound_models / "window.tflite", "--source", recording, "--broker", "none", "--json")
    shown = edgekit_cli(*command, "--threshold", "0.5", "--threshold", "silence=1")
    assert shown.returncode == 0, shown.stderr
    named = [[p["label"] for p in json.loads(line)["predictions"]] for line in shown.stdout.splitlines()]
    assert len(named) == 11 and named[0] == ["low"] and named[5] == [] and named[-1] == ["high"]
    assert "stream main: threshold lov=0.5: expected a label of the model; try low" in edgekit_fails(
        *command, "--threshold", "lov=0.5"
    )
    assert edgekit_cli(*command, "--threshold", "low=x").returncode == 2

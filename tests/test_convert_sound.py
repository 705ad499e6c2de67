from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import edgekit
from edgekit import bundle, custom_ops, runtimes
from edgekit.errors import ConversionError, EdgekitError
from edgekit.manifest import AudioInput

pytestmark = pytest.mark.host
pytest.importorskip("tensorflow")
soundfile = pytest.importorskip("soundfile")
raw_sound = pytest.importorskip("edgekit.converters.raw_sound")
needs_library = pytest.mark.skipif(
    custom_ops.find_library() is None, reason="EdgeKit's library of operators is not built"
)

TAGS = ("low", "high", "both")
RATE_HZ = 16_000


def sound(tag: str, seed: int, seconds: float = 2.2) -> np.ndarray:
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    waves = {name: np.sin(2 * np.pi * hertz * (1 + 0.02 * seed) * t) for name, hertz in (("low", 220), ("high", 2500))}
    wave = sum(waves.values()) if tag == "both" else waves[tag]
    trembling = 1 + 0.5 * np.sin(2 * np.pi * (2 + seed) * t)
    return 0.2 * wave * trembling + np.random.default_rng(seed).normal(0, 0.01, len(t))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound of each tag in clips/TAG, labels in tags.txt, and weights of small CRNNs, all of them different."""
    folder = tmp_path_factory.mktemp("sound")
    for tag in TAGS:
        (folder / "clips" / tag).mkdir(parents=True)
        for seed in range(4):
            soundfile.write(folder / "clips" / tag / f"{seed}.{'wav' if seed else 'flac'}", sound(tag, seed), RATE_HZ)
    (folder / "tags.txt").write_text("".join(f"{tag}\n" for tag in TAGS))
    script = """
import numpy as np
from edgekit.converters import crnn
random = np.random.default_rng(0)
for name, options in (
    ("time", {"frames": 96}), ("frequency", {"frames": 96, "bn_axis": "frequency"}),
    ("long", {"frames": 250, "bn_axis": "frequency"}),
):
    model = crnn.build(tags=3, **options)
    for layer in model.layers:
        weights = layer.get_weights()
        if layer.name.startswith("bn"):
            # as trained: what enters is brought to a mean of 0 and a deviation of 1
            size = weights[0].shape
            first = layer.name == "bn_0_freq"
            layer.set_weights([
                random.uniform(0.8, 1.2, size), random.normal(0, 0.1, size),
                random.normal(-30 if first else 0, 0.1, size), random.uniform(0.8, 1.2, size) * (400 if first else 1),
            ])
        elif weights:
            layer.set_weights([w + random.normal(0, 0.02, w.shape) for w in weights])
    model.save_weights(f"{name}.weights.h5")
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def convert(folder: Path) -> Any:
    """``edgekit.convert`` of a CRNN of 96 frames, calibrated and validated with the sound, unless told otherwise."""

    def run(output: Path, **options: Any) -> Any:
        given = {"weights": str(folder / "time.weights.h5"), "labels": folder / "tags.txt", "frames": 96}
        data = {"calibration": folder / "clips", "validation": folder / "clips"}
        return edgekit.convert("crnn", output, **{**given, **data, **options})

    return run


@pytest.fixture(scope="module")
def converted(folder: Path) -> Any:
    """What the command line makes of it: its answer, the report and the bundle are in ``folder``."""
    command = [sys.executable, "-m", "edgekit", "convert", "crnn", "-o", "tagger.tflite", "--frames", "96", "--json"]
    options = ["--weights", "time.weights.h5", "--labels", "tags.txt", "--calibration", "clips", "--hop", "0.25"]
    data = ["--validation", "clips", "--report", "report", "--name", "tagger"]
    return subprocess.run([*command, *options, *data], cwd=folder, capture_output=True, text=True, timeout=240)


def test_cli_converts_a_crnn(converted: Any, folder: Path) -> None:
    assert converted.returncode == 0, converted.stderr
    told = json.loads(converted.stdout)
    assert (told["task"], told["quantization"]) == ("audio-tagging", "int8-weights")
    assert told["output"] == {"activation": "sigmoid", "in_graph": True, "multi_label": True}
    given = told["input"]
    assert (given["kind"], given["sample_rate_hz"]) == ("audio", 12_000)
    assert (given["window_samples"], given["hop_samples"]) == (95 * 256, 3000)
    assert (given["front_end"]["num_mel_bins"], given["front_end"]["range_db"]) == (96, 80)
    checked = told["verification"]
    assert (checked["data"], checked["count"], checked["copies"], checked["within_0_03"]) == ("validation", 12, 24, 1)
    assert checked["features_sqnr_db"] > 30
    assert told["calibration"]["count"] == 12 and told["runtimes"]["litert"]["status"] == "ok"


def test_bundle_of_a_crnn_is_run_by_the_device(converted: Any, folder: Path) -> None:
    assert bundle.read(folder / "tagger.tflite").labels == TAGS
    with edgekit.load(folder / "tagger.tflite") as model:
        predictions = model.predict(sound("low", 0)[: 95 * 256].astype(np.float32))
    assert sorted(p.label for p in predictions) == sorted(TAGS)


def test_bundle_of_a_crnn_has_standard_metadata_of_sound(converted: Any, folder: Path) -> None:
    model = bundle.read_file(folder / "tagger.tflite").model
    assert model.label_file == bundle.LABELS_NAME and model.normalization is None
    content = model.metadata["TFLITE_METADATA"]
    assert b"Log-mel spectrogram in dB of 24320 samples" in content and b"Sound tagger." in content


def test_metadata_of_sound_is_read_by_the_published_schema(converted: Any, folder: Path) -> None:
    """MediaPipe ships the schema; sample rate and channels are where it has them."""
    python = os.environ.get("EDGEKIT_MEDIAPIPE_PYTHON")
    if not python:
        pytest.skip("EDGEKIT_MEDIAPIPE_PYTHON names no Python with MediaPipe")
    (folder / "metadata.bin").write_bytes(
        bytes(bundle.read_file(folder / "tagger.tflite").model.metadata["TFLITE_METADATA"])
    )
    script = """
from mediapipe.tasks.metadata import metadata_schema_py_generated as schema
model = schema.ModelMetadata.GetRootAs(open("metadata.bin", "rb").read())
content = model.SubgraphMetadata(0).InputTensorMetadata(0).Content()
assert content.ContentPropertiesType() == schema.ContentProperties.AudioProperties
sound = schema.AudioProperties()
sound.Init(content.ContentProperties().Bytes, content.ContentProperties().Pos)
print(sound.SampleRate(), sound.Channels())
"""
    result = subprocess.run([python, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["12000", "1"]


def test_report_of_a_crnn_speaks_of_clips_and_tags(converted: Any, folder: Path) -> None:
    page = (folder / "report" / "report.html").read_text()
    text = " ".join(page.split())
    assert "2.027 s of sound at 12 kHz, 96 mel bands; a result every 0.25 s" in text
    assert "24 shifted copies of the clips too: 100.00 % came out" in text and "dB above the noise" in text
    assert "validation data, 12 clips." in text and " images" not in page
    document = json.loads((folder / "report" / "report.json").read_text())
    assert [figures["support"] for figures in document["bundle"]["classes"]] == [4, 4, 4]
    assert np.array(document["bundle"]["confusion"]).shape == (3, 2, 2)
    assert {row["model"] for row in document["latency"]} == {"float32", "int8-weights"}


def test_without_data_it_says_that_only_noise_was_tried(edgekit_cli: Any) -> None:
    result = edgekit_cli("convert", "crnn", "-o", "out.tflite", "--frames", "96", "--classes", "4")
    assert result.returncode == 0 and "compared on 4 clips of noise only" in result.stdout
    assert "crnn without --weights has random ones" in result.stderr


@pytest.mark.parametrize("recipe", ["float16", "int8"])
def test_recipe_is_faithful_in_every_runtime(convert: Any, tmp_path: Path, recipe: str) -> None:
    of_bundle = convert(tmp_path / "out.tflite", quantize=recipe)
    for name, check in of_bundle.runtimes.items():
        assert check.status == "not-installed" or (check.status == "ok" and check.within_0_03 >= 0.7), (name, check)
    assert of_bundle.verification.max_abs_difference < 0.03
    assert (of_bundle.calibration is None) == (recipe != "int8")
    if custom_ops.find_library() is None:
        return
    # With the front end in the graph, before which int8 is quantized, the same.
    file = bundle.read_file(tmp_path / "out.tflite")
    content, given = raw_sound.attach(file.content, of_bundle.input), raw_sound.in_graph(of_bundle.input)
    manifest = msgspec.structs.replace(of_bundle, input=given, sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "in_graph.tflite").write_bytes(bundle.pack(content, manifest, TAGS))
    found = []
    for name in ("out", "in_graph"):
        with edgekit.load(tmp_path / f"{name}.tflite") as model:
            found.append({p.label: p.score for p in model.predict(sound("both", 1).astype(np.float32))})
    assert found[0] == pytest.approx(found[1], abs=0.01) and len(found[0]) == 3


@pytest.mark.parametrize(
    ("exact", "frames", "weights", "window_frames"),
    [(False, 96, "frequency", 96 + 72), (True, 250, "long", 264)],
    ids=["plain", "exact"],
)
def test_stream_gives_what_it_should_after_its_window(
    convert: Any, folder: Path, tmp_path: Path, exact: bool, frames: int, weights: str, window_frames: int
) -> None:
    """Fed hop by hop, in each runtime; held against Keras on the whole."""
    of_bundle = convert(
        tmp_path / "out.tflite", quantize="float32", streaming=True, exact=exact, frames=frames,
        weights=str(folder / f"{weights}.weights.h5"),
    )  # fmt: skip
    given, checked = of_bundle.input, of_bundle.verification
    assert (given.streaming, given.hop_samples, given.window_samples) == (True, 6144, 256 * window_frames)
    assert given.front_end.range_db is None
    assert all(check.status in ("ok", "not-installed") for check in of_bundle.runtimes.values())
    assert checked.max_abs_difference < 1e-5 and checked.within_0_03 == 1
    model = bundle.read(tmp_path / "out.tflite").file.model
    assert len(model.inputs) == len(model.outputs) > 1


@needs_library
def test_stream_with_the_front_end_in_the_graph_is_converted(
    convert: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_bundle = convert(
        tmp_path / "out.tflite", edgekit_ops=True, streaming=True, target="jetson-nano",
        weights=str(folder / "frequency.weights.h5"),
    )  # fmt: skip
    assert of_bundle.input.front_end_in_graph and of_bundle.verification.max_abs_difference < 0.03
    assert [(custom.name, custom.version) for custom in of_bundle.custom_ops] == [("EdgekitLogMel", 1)]
    assert "takes whole graphs of built-in operators only" in caplog.text
    metadata = bundle.read_file(tmp_path / "out.tflite").model.metadata["TFLITE_METADATA"]
    assert b"Sound in -1..1" in metadata and b"Log-mel" not in metadata
    with edgekit.load(tmp_path / "out.tflite") as model:
        given = np.concatenate([sound(tag, 0) for tag in TAGS]).astype(np.float32)
        assert model.predict(given) and model.warm


def test_own_operators_need_the_library(convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ops, "FOLDER", tmp_path)
    with pytest.raises(ConversionError, match=r"--edgekit-ops; EdgeKit's libedgekit_ops\.so was not built"):
        convert(tmp_path / "out.tflite", edgekit_ops=True)


@needs_library
def test_front_end_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound_models: Path
) -> None:
    given = bundle.read(sound_models / "window.tflite").input
    assert isinstance(given, AudioInput)
    (tmp_path / "model.tflite").write_bytes((sound_models / "window_in_graph.tflite").read_bytes())
    assert 0 < raw_sound.check(tmp_path / "model.tflite", given, runtimes.find()) < 1e-3
    of = raw_sound.options(given)
    monkeypatch.setattr(raw_sound, "options", lambda _: of | {"high_hz": 5990.0})
    with pytest.raises(ConversionError, match=r"expected the levels of calibration within 0.001 dB, got .* dB off"):
        raw_sound.check(tmp_path / "model.tflite", given, runtimes.find())


def test_stream_of_int8_weights_is_chosen_where_int8_would_be(convert: Any, folder: Path, tmp_path: Path) -> None:
    of_bundle = convert(
        tmp_path / "out.tflite", streaming=True, weights=str(folder / "frequency.weights.h5"), target="raspberry-pi-5"
    )
    assert of_bundle.quantization == "int8-weights"
    with pytest.raises(ConversionError, match="--streaming for coral, which runs int8 graphs only"):
        convert(tmp_path / "out.tflite", streaming=True, target="coral")


@pytest.fixture(scope="module")
def keras_home(crnn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Keras's downloads with the published weights."""
    home = tmp_path_factory.mktemp("keras")
    (home / "models").mkdir()
    name = "music_tagger_crnn_weights_tensorflow.h5"
    (home / "models" / name).write_bytes((crnn_data / name).read_bytes())
    return home


class TestPublished:
    """The author's weights and log-mels."""

    def test_msd_weights_by_name_bring_their_tags(
        self, keras_home: Path, crnn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KERAS_HOME", str(keras_home))
        (tmp_path / "clips").mkdir()
        for clip in ("cute", "actionable"):
            (tmp_path / "clips" / f"{clip}.npy").write_bytes((crnn_data / f"bensound-{clip}.npy").read_bytes())
        of_bundle = edgekit.convert(
            "crnn", tmp_path / "out.tflite", weights="msd", quantize="float32", calibration=tmp_path / "clips"
        )
        assert bundle.read(tmp_path / "out.tflite").labels[9] == "jazz" and of_bundle.output.multi_label
        assert (of_bundle.input.window_samples, of_bundle.input.hop_samples) == (349_440, 174_720)
        checked = of_bundle.verification
        assert (checked.count, checked.copies, checked.within_0_03, checked.top1_agreement) == (2, 24, 1, 1)
        # the Keras model gives the published scores, as test_crnn.py proves
        for check in of_bundle.runtimes.values():
            assert check.status == "not-installed" or check.max_abs_difference < 1e-4

    def test_author_clip_as_mp3_gives_the_tags_that_he_published(
        self, keras_home: Path, crnn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole way, from the file: decoder, resampler, front end, weights."""
        monkeypatch.setenv("KERAS_HOME", str(keras_home))
        (tmp_path / "jazz").mkdir()
        (tmp_path / "jazz" / "cute.mp3").write_bytes((crnn_data / "bensound-cute.mp3").read_bytes())
        edgekit.convert("crnn", tmp_path / "out.tflite", weights="msd", quantize="float16", calibration=tmp_path)
        from edgekit.audio import read_audio

        samples = np.concatenate(list(read_audio(tmp_path / "jazz" / "cute.mp3", 12_000)))
        with edgekit.load(tmp_path / "out.tflite") as model:
            best, second, *_ = model.predict(samples, top_k=5)
        # another decoder than the author's, 8 ms apart: not his scores to the third digit
        assert (best.label, second.label) == ("jazz", "instrumental") and best.score == pytest.approx(0.444, abs=0.1)


def npy(path: Path, x: np.ndarray) -> None:
    np.save(path, x)


BAD_DATA = {
    "text named mp3": (lambda f: (f / "a.mp3").write_text("not a sound"), r"a\.mp3 is not a sound file; give a wav"),
    "nan": (
        lambda f: npy(f / "a.npy", np.full((96, 96), np.nan)),
        r"a\.npy: expected finite numbers, got NaN or infinity",
    ),
    "shape": (lambda f: npy(f / "a.npy", np.zeros((96, 95))), r"expected log-mels of shape \(96, 96\)"),
    "empty": (Path.is_dir, "expected at least one clip, got none"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(edgekit_fails: Any, tmp_path: Path, case: str) -> None:
    make, complaint = BAD_DATA[case]
    (tmp_path / "clips").mkdir()
    make(tmp_path / "clips")
    line = edgekit_fails("convert", "crnn", "-o", "out.tflite", "--frames", "96", "--calibration", "clips")
    assert re.search(complaint, line) and not (tmp_path / "out.tflite").exists()


def test_whole_crnn_is_told_how_to_convert_it(tmp_path: Path) -> None:
    from edgekit.converters import crnn

    crnn.build(frames=96, tags=3).save(tmp_path / "tagger.keras")
    with pytest.raises(ConversionError, match=r"tagger\.keras is a CRNN, .*; convert it as 'crnn --weights "):
        edgekit.convert(tmp_path / "tagger.keras", tmp_path / "out.tflite")


def test_silence_is_warned_about(convert: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE_HZ), RATE_HZ)
    convert(tmp_path / "out.tflite", calibration=tmp_path, validation=None)
    assert "all calibration clips are silence, or do not change" in caplog.text


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("crnn", {"input_size": 96}, "--input-size is for models of images: got model crnn; leave it out"),
        ("crnn", {"alpha": 0.5}, "--alpha is for models of images"),
        ("crnn", {"minimalistic": True}, "--minimalistic is for models of images"),
        ("crnn", {"dropout": 0.1}, "--dropout is for"),
        ("crnn", {"head": "attention"}, "--head is for"),
        ("crnn", {"mean": 0.0}, "--mean is for"),
        ("mobilenet-v3-small", {"mels": 96}, "--mels is for models of sound: got model mobilenet-v3-small"),
        ("mobilenet-v3-small", {"streaming": True}, "--streaming is for models of sound"),
        ("mine.keras", {"frames": 96}, "--frames is for models of sound: got model mine.keras"),
        ("mine.keras", {"bn_axis": "time"}, "--bn-axis is for"),
        ("mine.keras", {"hop": 0.5}, "--hop is for"),
        ("crnn", {"exact": True}, "--exact is a way of streaming; give --streaming too"),
        ("crnn", {"hop": 0.0}, "--hop 0: expected seconds above 0"),
        ("crnn", {"hop": float("nan")}, "--hop nan: expected seconds above 0"),
        ("crnn", {"frames": 0}, "--frames: expected 1 or more"),
        ("crnn", {"quantize": "int8"}, "int8 needs calibration data; give .* typical clips"),
    ],
)
def test_options_that_do_not_fit_the_kind_are_refused(tmp_path: Path, model: str, options: Any, complaint: str) -> None:
    with pytest.raises(EdgekitError, match=complaint):
        edgekit.convert(model, tmp_path / "out.tflite", **options)
    assert not list(tmp_path.iterdir())


class TestOpenSound:
    """The model before it is converted."""

    @pytest.fixture
    def open(self) -> Any:
        from edgekit.converters import subjects
        from edgekit.converters.worker import Job

        def run(**options: Any) -> Any:
            image = {"alpha": 1.0, "minimalistic": False, "dropout": None, "head": "classes", "input_size": None}
            none = dict.fromkeys(("calibration", "validation", "mean", "std", "mels", "bn_axis", "hop"))
            job = Job(
                folder="", model="crnn", weights="none", labels=(), quantize="float32", classes=3, frames=96,
                streaming=False, exact=False, report=False, ops=(), edgekit_ops=False, **image, **none,
            )  # fmt: skip
            return subjects.open_sound(msgspec.structs.replace(job, **options))

        return run

    def test_sizes_come_from_the_options(self, open: Any) -> None:
        subject = open(mels=128, frames=200, hop=1.5)
        assert (subject.kind.shape, subject.classes, subject.multi_label) == ((128, 200, 1), 3, True)
        assert (subject.kind.input.window_samples, subject.kind.input.hop_samples) == (199 * 256, 18_000)
        assert subject.kind.input.front_end.num_mel_bins == 128

    def test_classes_are_as_many_as_labels(self, open: Any) -> None:
        assert open(classes=None, labels=("a", "b")).classes == 2
        assert open(classes=None).classes == 50

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"bn_axis": "time"}, "--streaming with --bn-axis time: the first normalization depends on the place"),
            ({"weights": "msd"}, "--streaming with --weights msd: .*train the model with --bn-axis frequency"),
            ({"hop": 0.5}, r"--hop 0\.5: expected 0\.512 s with --streaming"),
        ],
    )
    def test_what_cannot_be_streamed_is_refused(self, open: Any, options: Any, complaint: str) -> None:
        with pytest.raises(ConversionError, match=complaint):
            open(streaming=True, **options)

    def test_streaming_takes_the_normalization_that_it_needs(self, open: Any) -> None:
        assert open(streaming=True, hop=0.512).kind.input.hop_samples == 6144

    def test_published_file_by_its_path_brings_its_tags(self, open: Any, crnn_data: Path) -> None:
        weights = str(crnn_data / "music_tagger_crnn_weights_tensorflow.h5")
        assert open(weights=weights, classes=None, frames=1366).labels[9] == "jazz"
        with pytest.raises(ConversionError, match=r"layer output: expected \(32, 3\) \(3,\), got \(32, 50\)"):
            open(weights=weights, frames=1366)

"""What ``edgekit convert`` chooses, proves and refuses: recipes, targets, report."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit import bundle
from edgekit.errors import ConversionError

pytestmark = pytest.mark.host
pytest.importorskip("tensorflow")


@pytest.fixture
def convert(models: Path, tmp_path: Path) -> Any:
    """``edgekit.convert`` of colours.keras into an empty folder, with its labels and data, unless told otherwise."""
    (tmp_path / "out").mkdir()

    def run(model: Any = models / "colours.keras", **options: Any) -> Any:
        given = {"labels": models / "labels.txt", "mean": 127.5, "std": 127.5, **options}
        return edgekit.convert(model, tmp_path / "out" / "door.tflite", **given)

    return run


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of uint8 pixels, one with branches, one of several labels, one with an operator of TensorFlow's."""
    folder = tmp_path_factory.mktemp("relatives")
    script = """
import keras, sys
sys.path.insert(0, sys.argv[1])
from make_colours import build
pixels = keras.Input((32, 32, 3), dtype="uint8")
keras.Model(pixels, build()(keras.layers.Rescaling(1 / 127.5, -1)(pixels))).save("uint8.keras")
given = keras.Input((32, 32, 3))
halves = [build()(keras.layers.Rescaling(1.0)(given)), build()(keras.layers.AveragePooling2D(1)(given))]
keras.Model(given, keras.layers.Average()(halves)).save("branches.keras")
build(activation="sigmoid").save("tags.keras")
x = keras.ops.fft2((given[..., 0], given[..., 1]))[0]
x = keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(x))
keras.Model(given, x).save("fft.keras")
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def test_auto_says_why_and_keeps_it_in_the_manifest(
    convert: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    convert(target="raspberry-pi-5", calibration=models / "data.npz")
    kept = bundle.read(tmp_path / "out" / "door.tflite").file.manifest
    assert kept and (kept.quantization, kept.target) == ("int8", "raspberry-pi-5")
    assert "8-bit dot products" in kept.quantization_reason and kept.quantization_reason in caplog.text


def test_auto_takes_the_second_choice_where_the_first_loses_too_much(
    convert: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibrated on a range a thousand times the data's, int8 sees all of it as nothing."""
    random = np.random.default_rng(0)
    x = np.load(models / "data.npz")["x"].astype(np.float32) / 127.5 - 1
    np.savez(tmp_path / "wide.npz", x=random.uniform(-1e3, 1e3, x.shape).astype(np.float32))
    np.savez(tmp_path / "held-out.npz", x=x, y=np.load(models / "data.npz")["y"])
    options = {"calibration": tmp_path / "wide.npz", "validation": tmp_path / "held-out.npz", "max_drop": 0.02}
    of_bundle = convert(target="raspberry-pi-5", **options)
    assert of_bundle.quantization == "int8-weights" and of_bundle.verification.top1 == 1.0
    assert "int8 loses" in caplog.text and "look like noise" in caplog.text
    (tmp_path / "out" / "door.tflite").unlink()
    with pytest.raises(ConversionError, match=r"int8 loses .* points of top-1: expected at most 2, as --max-drop says"):
        convert(quantize="int8", report=tmp_path / "report", **options)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "report").exists()


def test_explicit_recipe_that_is_slow_on_the_target_is_warned_about(
    convert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    convert(quantize="dynamic", target="raspberry-pi-4")
    assert "dynamic is slower than float32 on raspberry-pi-4's CPU" in caplog.text


def test_int16x8_runs_and_agrees(convert: Any, models: Path) -> None:
    of_bundle = convert(quantize="int16x8", calibration=models / "data.npz", validation=models / "data.npz")
    assert of_bundle.verification.top1_agreement == 1.0 and of_bundle.runtimes["litert"].status == "ok"


def test_report_holds_what_the_bundle_shows(convert: Any, models: Path, tmp_path: Path) -> None:
    of_bundle = convert(
        quantize="int8", calibration=models / "data.npz", validation=models / "data.npz", report=tmp_path / "report"
    )
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["manifest"]["sha256"] == of_bundle.sha256 and found["data"] == "validation"
    assert found["bundle"]["top1"] == found["keras"]["top1"] == 1.0
    assert np.trace(found["bundle"]["confusion"]) == np.sum(found["bundle"]["confusion"]) == 120
    decibels = [layer["sqnr_db"] for layer in found["layers"] if layer["sqnr_db"] is not None]
    assert len(decibels) >= 3 and decibels == sorted(decibels) and decibels[0] > 5
    assert {(row["model"], row["threads"]) for row in found["latency"]} >= {("float32", 1), ("int8", 1)}
    assert {row["delegate"].split()[0] for row in found["coverage"]} == {"xnnpack", "edge-tpu", "gpu"}
    for row in found["coverage"]:
        assert row["delegated"] + sum(left["count"] for left in row["left"]) == row["operators"]
    calibration = found["calibration"]
    assert -1 <= calibration["minimum"] < calibration["mean"] < calibration["maximum"] <= 1
    assert set(found["sizes_bytes"]) == {"float32", "int8"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(label in page for label in ("red", "green", "blue")) and "<svg" in page


def test_report_for_several_labels_has_a_matrix_for_each(
    convert: Any, models: Path, relatives: Path, tmp_path: Path
) -> None:
    x, y = (np.load(models / "data.npz")[name] for name in "xy")
    np.savez(tmp_path / "tags.npz", x=x, y=np.eye(3, dtype=int)[y] | (y == 1)[:, None] * np.array([1, 0, 0]))
    of_bundle = convert(
        relatives / "tags.keras", quantize="float16", validation=tmp_path / "tags.npz", report=tmp_path / "report"
    )
    found = json.loads((tmp_path / "report" / "report.json").read_text())["bundle"]
    assert of_bundle.output.multi_label and of_bundle.verification.top1 is None
    assert found["multi_label"] and [np.sum(matrix) for matrix in found["confusion"]] == [120] * 3
    assert [row["support"] for row in found["classes"]] == [80, 40, 40]


def test_report_into_a_file_is_refused_and_nothing_written(convert: Any, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(edgekit.EdgekitError, match="cannot make the report folder"):
        convert(quantize="float32", report=tmp_path / "report")
    assert not list((tmp_path / "out").iterdir())


def test_model_of_uint8_pixels_becomes_an_int8_bundle(
    convert: Any, models: Path, relatives: Path, tmp_path: Path, colour: Any
) -> None:
    data = {"calibration": models / "data.npz", "validation": models / "data.npz"}
    of_bundle = convert(relatives / "uint8.keras", quantize="int8", mean=None, std=None, **data)
    assert of_bundle.verification.top1 == 1.0 and of_bundle.input.mean == (127.5,)
    file = bundle.read_file(tmp_path / "out" / "door.tflite")
    assert file.model.inputs[0].dtype == "int8" and file.model.operators[0].name == "CONV_2D"
    with edgekit.load(tmp_path / "out" / "door.tflite") as model:
        assert model.predict(colour("green"))[0].label == "green"


def test_model_with_branches_converts(convert: Any, models: Path, relatives: Path) -> None:
    data = {"calibration": models / "data.npz", "validation": models / "data.npz"}
    checked = convert(relatives / "branches.keras", quantize="int8", **data).verification
    assert checked.top1 == checked.top1_keras == 1.0


def test_operator_that_no_runtime_has_is_named(convert: Any, relatives: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"operators that no TFLite runtime has: .*FFT2D"):
        convert(relatives / "fft.keras", quantize="float32")
    assert not list((tmp_path / "out").iterdir())


def test_attention_head_is_one_piece_for_xnnpack(tmp_path: Path) -> None:
    edgekit.convert(
        "mobilenet-v3-small", tmp_path / "defects.tflite", head="attention", quantize="int8-weights", input_size=96
    )
    found = edgekit.inspect(tmp_path / "defects.tflite")
    assert found["inputs"][0]["shape"] == [1, 96, 96, 3] and found["outputs"][0]["shape"] == [1, 10]
    assert found["delegates"][0]["pieces"] == 1 and not found["delegates"][0]["left"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target": "toaster"}, r"target 'toaster': expected raspberry-pi-3 or"),
        ({"target": "coral"}, "target coral needs calibration data"),
        ({"max_drop": 0.02}, "--max-drop: expected a share from 0 to 1, and --validation"),
        ({"quantize": "int16x8"}, "int16x8 needs calibration data"),
        ({"alpha": 0.5}, "alpha"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    convert: Any, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConversionError, match=complaint):
        convert(**options)
    assert not list((tmp_path / "out").iterdir())

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_help_names_every_command(edgekit_cli: Any) -> None:
    result = edgekit_cli("--help")
    assert result.returncode == 0
    for command in ("convert", "run", "listen", "inspect", "bench"):
        assert command in result.stdout
        assert edgekit_cli(command, "--help").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "x.tflite"],
        ["run", "x", "--source", "y", "--threads", "0"],
        ["listen", "--count", "x"],
    ],
)
def test_wrong_usage_is_status_2(edgekit_cli: Any, arguments: list[str]) -> None:
    result = edgekit_cli(*arguments)
    assert result.returncode == 2 and "Usage" in result.stderr and "Traceback" not in result.stderr


def test_run_through_mosquitto_is_read_back_with_mosquitto_sub(
    edgekit_cli: Any, vision_data: Path, broker: Any
) -> None:
    received = broker.subscribe("edgekit/+/main/prediction", "-C", "1")
    result = edgekit_cli(
        "run", vision_data / "mobilenet_v2_1.0_224_quant.tflite", "--labels", vision_data / "imagenet_labels.txt",
        "--source", vision_data / "parrot.jpg", "--broker", broker.url,
    )  # fmt: skip
    assert result.returncode == 0 and not result.stdout
    ((_, prediction),) = received()
    best = prediction["predictions"][0]
    assert best["label"] == "macaw" and best["score"] > 0.9


def test_run_prints_predictions_as_json_lines(edgekit_cli: Any, models: Path, frames: Path) -> None:
    result = edgekit_cli(
        "run", models / "int8.tflite", "--source", frames, "--broker", "none", "--json", "--top-k", "1"
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["predictions"][0]["label"] for line in lines] == ["red", "green", "blue"] * 2
    assert "6 captured, 6 inferred, 0 dropped, 0 failed" in result.stderr


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("cut", "not a whole TFLite model"),
        ("text", "is not a TFLite model"),
        ("missing", "No such file"),
        ("labels", "expected 3 lines"),
        ("device", "device_id: expected a name of a-z, 0-9, _ and -, got 'pi#'"),
        ("source", "does not exist"),
        ("broker", "cannot be reached"),
        ("scheme", "expected mqtt://"),
    ],
)
def test_run_with_bad_input_says_so_in_one_line(
    edgekit_fails: Any,
    models: Path,
    frames: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
    case: str,
    complaint: str,
) -> None:
    whole = (models / "int8.tflite").read_bytes()
    (tmp_path / "good.tflite").write_bytes(whole)
    (tmp_path / "cut.tflite").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tflite").write_text("this is text\n" * 50)
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    bundle = {"cut": "cut.tflite", "text": "text.tflite", "missing": "missing.tflite"}.get(case, "good.tflite")
    more = {
        "labels": ["--labels", "labels.txt"],
        "device": ["--device-id", "pi#"],
        "broker": ["--broker", f"mqtt://ann:hunter2@127.0.0.1:{free_port()}"],
        "scheme": ["--broker", "tcp://ann:hunter2@hub"],
    }.get(case, [])
    source = "nowhere" if case == "source" else frames
    line = edgekit_fails("run", bundle, "--source", source, *(more or ["--broker", "none"]))
    assert complaint in line and "hunter2" not in line


def test_run_of_a_model_that_fails_says_so_in_one_line(edgekit_fails: Any, vision_data: Path) -> None:
    model = vision_data / "model_invoking_error.tflite"
    assert "model_invoking_error.tflite" in edgekit_fails("run", model, "--source", vision_data / "parrot.jpg")


def test_debug_shows_where_the_error_came_from(edgekit_cli: Any) -> None:
    result = edgekit_cli("inspect", "missing.tflite", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr and "BundleError" in result.stderr


def test_convert_without_its_packages_says_what_to_install(edgekit_fails: Any, models: Path) -> None:
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("they are installed here")
    line = edgekit_fails("convert", models / "colours.keras", "-o", "out.tflite")
    assert "needs the package" in line and "pip install 'edgekit[convert]'" in line


def test_inspect_shows_a_bundle(edgekit_cli: Any, models: Path) -> None:
    shown = edgekit_cli("inspect", models / "int8.tflite")
    assert shown.returncode == 0
    for fact in ("int8 1", "red, green, blue", "32 x 32 x 3", "CONV_2D", "litert", "labels.txt"):
        assert fact in shown.stdout
    found = json.loads(edgekit_cli("inspect", models / "int8.tflite", "--json").stdout)
    assert found["manifest"]["quantization"] == "int8" and found["classifier"]["labels"] == ["red", "green", "blue"]
    assert found["inputs"][0]["shape"] == [1, 32, 32, 3]
    by_delegate = {row["delegate"].split()[0]: row for row in found["delegates"]}
    assert by_delegate["xnnpack"]["measured"] and not by_delegate["gpu"]["measured"]
    # all of it is int8, and no operator of it is foreign to the Edge TPU
    assert by_delegate["edge-tpu"]["delegated"] == sum(row["count"] for row in found["operators"])
    assert "edge-tpu (predicted)" in shown.stdout


def test_inspect_shows_models_made_by_others(edgekit_cli: Any, vision_data: Path) -> None:
    for path in vision_data.glob("*.tflite"):
        result = edgekit_cli("inspect", path)
        assert result.returncode == 0 and "manifest" in result.stdout, result.stderr
    assert (
        "edgetpu-custom-op (custom)"
        in edgekit_cli("inspect", vision_data / "keras_lstm_mnist_ptq_edgetpu.tflite").stdout
    )


def test_console_script_starts(tmp_path: Path) -> None:
    script = shutil.which("edgekit", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if script is None:
        pytest.skip("edgekit is on the path of Python, not installed")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, cwd=tmp_path).stdout.startswith(
        "edgekit, "
    )

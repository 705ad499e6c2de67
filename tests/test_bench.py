from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.errors import BundleError, EdgekitError


def test_bench_measures_bundles_side_by_side(models: Path) -> None:
    measured = edgekit.bench(
        [models / "float32.tflite", models / "int8.tflite"], delegates=["cpu"], threads=[1, 2], seconds=0.1
    )
    assert {(row.bundle, row.threads) for row in measured.inference} == {
        (str(models / f"{name}.tflite"), threads) for name in ("float32", "int8") for threads in (1, 2)
    }
    for row in measured.inference:
        assert row.latency_ms and 0 < row.latency_ms.p50 <= row.latency_ms.p95 <= row.latency_ms.p99, row
        assert row.memory_bytes or not Path("/proc/self/status").exists()
        assert row.delegated is not None and 0 <= row.delegated <= row.operators
        assert (row.ratio == 1.0) or "int8" in row.bundle
    for stages in measured.stages:
        assert stages.preprocess_ms and stages.inference_ms and stages.decode_ms


def test_bench_says_what_cannot_be_measured(models: Path) -> None:
    measured = edgekit.bench(models / "float32.tflite", delegates=["cpu", "/missing.so"], threads=[1], seconds=0.1)
    by_delegate = {row.delegate: row for row in measured.inference}
    assert "missing.so" in by_delegate["/missing.so"].problem and by_delegate["/missing.so"].latency_ms is None
    assert by_delegate["cpu"].latency_ms


def test_bench_takes_the_compiled_model_for_coral(models: Path, tmp_path: Path) -> None:
    from edgekit import bundle
    from edgekit.devices import bench

    for name in ("door.tflite", "door_edgetpu.tflite"):
        (tmp_path / name).write_bytes((models / "int8.tflite").read_bytes())
    file = bundle.read_file(tmp_path / "door.tflite")
    assert bench._model(file, "coral").name == "door_edgetpu.tflite"
    assert bench._model(file, "cpu").name == "door.tflite"


def test_bench_of_a_model_that_does_not_run_says_why(vision_data: Path) -> None:
    with pytest.raises(EdgekitError, match=r"nothing could be measured \(.* with cpu: .*custom op"):
        edgekit.bench(vision_data / "model_invoking_error.tflite", delegates=["cpu"], threads=[1], seconds=0.1)


def test_bench_of_a_model_that_is_no_classifier_has_no_stages(vision_data: Path) -> None:
    measured = edgekit.bench(
        vision_data / "deeplabv3_mnv2_dm05_pascal_quant.tflite", delegates=["cpu"], threads=[1], seconds=0.1
    )
    assert measured.inference[0].latency_ms and "output: expected type" in measured.stages[0].problem


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"threads": [0]}, "threads: expected 1 to 256"), ({"seconds": 0}, "seconds"), ({"bundles": []}, "at least one")],
)
def test_bench_refuses_what_makes_no_sense(models: Path, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EdgekitError, match=complaint):
        edgekit.bench(**{"bundles": models / "int8.tflite", **arguments})


def test_bench_of_a_missing_bundle() -> None:
    with pytest.raises(BundleError, match="No such file"):
        edgekit.bench("missing.tflite")


def test_bench_command_prints_tables_and_json(edgekit_cli: Any, models: Path) -> None:
    bundles = (models / "float32.tflite", models / "int8.tflite")
    options = ("--delegate", "cpu", "--threads", "1", "--seconds", "0.1")
    shown = edgekit_cli("bench", *bundles, *options)
    assert shown.returncode == 0, shown.stderr
    assert all(word in shown.stdout for word in ("int8.tflite", "p99 ms", "preprocess", "decode", "ratio"))
    told = edgekit_cli("bench", *bundles, *options, "--json")
    found = json.loads(told.stdout)
    assert found["schema"] == "edgekit.bench/1" and len(found["inference"]) >= 2


@pytest.mark.parametrize(("name", "given"), [("window", "window of 0.51 s"), ("stream", "hop of 0.26 s")])
def test_bench_of_a_bundle_that_hears(sound_models: Path, name: str, given: str) -> None:
    measured = edgekit.bench(sound_models / f"{name}.tflite", delegates=["cpu"], threads=[1], seconds=0.1)
    assert all(row.latency_ms for row in measured.inference)
    (stages,) = measured.stages
    assert stages.given == given and stages.preprocess_ms and stages.inference_ms and stages.decode_ms

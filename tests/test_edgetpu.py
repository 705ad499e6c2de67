from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import bundle
from edgekit.errors import ConversionError

pytestmark = pytest.mark.host
pytest.importorskip("tensorflow")

# What version 16 prints, with the figures of this model; the compiler itself is for x86-64 Debian and not to be had.
LOG = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 12 ms.

Input model: model.tflite
Input size: 6.00KiB
Output model: model_edgetpu.tflite
Output size: 30.00KiB
On-chip memory used for caching model parameters: 5.00KiB
Number of Edge TPU subgraphs: 1
Total number of operations: 5
Operation log: model_edgetpu.log

Operator                       Count      Status

CONV_2D                        2          Mapped to Edge TPU
MEAN                           1          Mapped to Edge TPU
FULLY_CONNECTED                1          Mapped to Edge TPU
SOFTMAX                        1          More than one subgraph is not supported
Compilation child process completed within timeout period.
Compilation succeeded!
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for ``edgetpu_compiler`` on the PATH."""

    def put(script: str) -> None:
        program = tmp_path / "bin" / "edgetpu_compiler"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    return put


@pytest.fixture
def convert(models: Path, tmp_path: Path) -> Any:
    (tmp_path / "out").mkdir()

    def run(**options: Any) -> Any:
        given = {"target": "coral", "calibration": models / "data.npz", "mean": 127.5, "std": 127.5, **options}
        return edgekit.convert(models / "colours.keras", tmp_path / "out" / "door.tflite", **given)

    return run


def test_coral_target_compiles_beside_the_bundle_and_reads_the_log(compiler: Any, convert: Any, tmp_path: Path) -> None:
    compiler(f"""[ "$1 $2" = "-s -o" ] || exit 9
name=$(basename "$4" .tflite)
cp "$4" "$3/${{name}}_edgetpu.tflite"
cat <<'LOG'
{LOG}
LOG""")
    of_bundle = convert(report=tmp_path / "report")
    assert (of_bundle.quantization, of_bundle.target) == ("int8", "coral")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["door.tflite", "door_edgetpu.tflite"]
    bundle.read(tmp_path / "out" / "door.tflite")
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    (of_tpu,) = [row for row in found["coverage"] if row["delegate"] == "edge-tpu"]
    assert (of_tpu["measured"], of_tpu["operators"], of_tpu["delegated"], of_tpu["pieces"]) == (True, 5, 4, 1)
    assert of_tpu["left"] == [{"operator": "SOFTMAX", "count": 1, "reason": "More than one subgraph is not supported"}]


def test_coral_target_without_the_compiler_says_so_and_writes_the_bundle(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    convert()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["door.tflite"]
    assert "edgetpu_compiler is not on the PATH" in caplog.text and "door_edgetpu.tflite" in caplog.text
    (tmp_path / "out" / "door_edgetpu.tflite").write_bytes(b"of yesterday")
    convert()
    assert "door_edgetpu.tflite was compiled from an earlier bundle" in caplog.text


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo 'Invalid model: model.tflite'; echo; exit 1", "status 1: Invalid model"),
        ("exit 0", "status 0: it said nothing"),
        ('touch "$3/$(basename "$4" .tflite)_edgetpu.tflite"; echo done', "no table of operators"),
    ],
)
def test_coral_target_with_a_failing_compiler_writes_nothing(
    compiler: Any, convert: Any, tmp_path: Path, script: str, complaint: str
) -> None:
    compiler(script)
    with pytest.raises(ConversionError, match=complaint):
        convert()
    assert not list((tmp_path / "out").iterdir())

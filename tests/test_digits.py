from __future__ import annotations

from pathlib import Path

import pytest

import edgekit

pytestmark = pytest.mark.host


@pytest.mark.parametrize("recipe", ["float32", "int8"])
def test_mobilenet_keeps_its_accuracy_on_held_out_digits(digits: Path, tmp_path: Path, recipe: str) -> None:
    """At most two points under the Keras model, counted on what comes out of the pipeline."""
    manifest = edgekit.convert(
        digits / "digits.keras", tmp_path / "digits.tflite", quantize=recipe, mean=127.5, std=127.5,  # type: ignore[arg-type]
        labels=digits / "labels.txt", calibration=digits / "calibration", validation=digits / "validation",
    )  # fmt: skip
    checked = manifest.verification
    assert checked and checked.top1_keras and checked.top1
    assert checked.top1_keras > 0.9, "the model has not learnt"
    assert checked.top1 >= checked.top1_keras - 0.02
    truth = (digits / "held-out.txt").read_text().split()
    messages = list(edgekit.stream(tmp_path / "digits.tflite", str(digits / "held-out.avi")))
    right = sum(message.predictions[0].label == digit for message, digit in zip(messages, truth, strict=True))
    assert right / len(truth) >= checked.top1_keras - 0.02

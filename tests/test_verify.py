from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import bundle
from edgekit.converters import kinds, verify
from edgekit.converters.data import Dataset
from edgekit.converters.verify import Compared, UnfaithfulError

pytestmark = pytest.mark.host
pytest.importorskip("sklearn")

CLIPS = 30


@pytest.fixture(params=["window", "stream"])
def check(request: Any, sound_models: Path, tmp_path: Path) -> Callable[..., verify.Verified]:
    """Verifies a bundle of sound against what it gives itself, changed as the test says."""
    path = Path(shutil.copy(sound_models / f"{request.param}.tflite", tmp_path / "model.tflite"))
    of_bundle = bundle.read(path)
    kind = kinds.of(of_bundle.input)
    random = np.random.default_rng(0)
    loudness = random.uniform(-60, 0, (CLIPS, 16, 1, 1)) * (np.arange(16) < 8)[None, :, None, None]
    x = (loudness + random.normal(0, 1, (CLIPS, *kind.shape))).astype(np.float32)

    def scores() -> np.ndarray:
        """What the graph computes, worked out in NumPy."""
        levels = x[..., 0].mean(2)
        low, high = levels[:, :5].max(1), levels[:, 9:].max(1)
        return np.asarray(1 / (1 + np.exp(-0.3 * np.stack([-60 - np.maximum(low, high), low + 20, high + 20], 1))))

    def run(change: Callable[[np.ndarray], np.ndarray] = lambda s: s, **options: Any) -> verify.Verified:
        given: dict[str, Any] = {"copies": 0, "data": "calibration", "features": None, **options}
        compared = Compared(
            dataset=Dataset(x, None, ""), keras_outputs=change(scores()).astype(np.float32),
            labels=("silence", "low", "high"), **given,
        )  # fmt: skip
        return verify.verify(path, kind, of_bundle.output, compared, lambda *_: None)

    return run


def test_verify_of_sound_counts_clips_that_are_right(check: Any) -> None:
    verified = check(copies=6)
    checked = verified.verification
    assert (checked.count, checked.copies, checked.within_0_03, checked.top1_agreement) == (24, 6, 1, 1)
    assert checked.max_abs_difference < 1e-5
    assert verified.runtimes["litert"].status == "ok" and verified.runtimes["litert"].within_0_03 == 1


def test_verify_of_sound_takes_a_few_that_are_off(check: Any) -> None:
    def five_off(scores: np.ndarray) -> np.ndarray:
        return scores - 0.05 * (np.arange(CLIPS) < 5)[:, None]

    checked = check(five_off).runtimes["litert"]
    assert checked.status == "ok" and checked.within_0_03 == pytest.approx(25 / 30, abs=1e-6)
    assert checked.max_abs_difference == pytest.approx(0.05, abs=1e-4)


def test_verify_of_sound_that_is_wrong_everywhere_is_refused_with_its_figures(check: Any) -> None:
    with pytest.raises(UnfaithfulError, match=r"not the Keras model any more \(litert: 0% of clips within 0\.03"):
        check(lambda scores: scores + 0.05)
    with pytest.raises(
        UnfaithfulError, match=r"another tag comes first on \d+% of the clips.*; try another --quantize"
    ):
        check(lambda scores: np.roll(scores, 1, axis=1))


def test_verify_of_sound_on_noise_proves_that_it_runs(check: Any) -> None:
    checked = check(lambda scores: scores + 0.05, data="noise")
    assert checked.runtimes["litert"].status == "ok" and checked.verification.within_0_03 is None


def test_verify_of_sound_in_a_runtime_that_is_wrong_says_so(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a runtime that loads a model and gives something a little else."""
    import sys

    wrong = tmp_path / "site" / "tflite_runtime"
    wrong.mkdir(parents=True)
    (wrong / "__init__.py").touch()
    (wrong / "interpreter.py").write_text(
        "from ai_edge_litert.interpreter import Interpreter as Right\n"
        "class Interpreter(Right):\n"
        "    def get_tensor(self, index):\n"
        "        x = super().get_tensor(index)\n"
        "        return x + 0.04 if x.shape == (1, 3) else x\n"
    )
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo 2.14.0 || PYTHONPATH="{wrong.parent}" exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_TFLITE_RUNTIME_PYTHON", str(python))
    checks = check().runtimes
    assert (checks["litert"].status, checks["tflite-runtime"].status) == ("ok", "differs")
    assert "0% of clips within 0.03 of the Keras model, 70% are needed: do not use it there" in (
        checks["tflite-runtime"].detail
    )

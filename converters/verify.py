"""Holds a converted model against the Keras model, in every TFLite runtime at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import runtimes
from edgekit.converters.data import Dataset, allocate
from edgekit.converters.metrics import Figures, figures
from edgekit.decode import NotFiniteError, scores
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import ImageInput, Output, RuntimeCheck, Verification, VerifiedOn
from edgekit.preprocess import ImagePreprocessor
from edgekit.sandbox import Sandbox, SandboxError

logger = logging.getLogger(__name__)

# The same model in two runtimes differs by the rounding of their kernels: on MobileNetV3-Small by 5e-8 (float32) to
# 0.007 (int8) of the outputs' norm. A runtime that computes something else is off by about 1.
MAX_RELATIVE_DIFFERENCE = 0.1
# Below this the bundle is hardly the model that was converted.
LOW_AGREEMENT = 0.95


@dataclass(frozen=True)
class Verified:
    """What became of a model in each runtime, and what it gives in the preferred one of those that are right.

    Attributes:
        figures, keras_figures: of the converted and of the Keras model; None where the data has no labels.
    """

    runtimes: dict[str, RuntimeCheck]
    verification: Verification
    preferred: str
    figures: Figures | None
    keras_figures: Figures | None


def verify(
    model_path: Path,
    input: ImageInput,
    output: Output,
    compared: Dataset,
    keras_outputs: npt.NDArray[np.float32],
    data: VerifiedOn,
    labels: tuple[str, ...],
    progress: Callable[[str, int, int], None],
) -> Verified:
    """Runs ``compared`` through the model in each runtime, by the device's own preprocessing and decoding.

    Args:
        keras_outputs: of the Keras model on the same data, shape (n, classes).
        data: which data it is, for :class:`Verification`.
        labels: names of the classes.

    Raises:
        ConversionError: no runtime gives the outputs of the Keras model.
    """
    model = Model(model_path.read_bytes(), str(model_path))
    given, made = model.inputs[0], model.outputs[0]
    quantization = (given.scale[0], given.zero_point[0]) if given.scale else (0.0, 0)
    preprocess = ImagePreprocessor(input, given.dtype, *quantization)
    inputs = model_path.parent / "inputs.npy"
    tensors = allocate(inputs, given.dtype, (len(compared.x), *preprocess.shape_nhwc[1:]))
    for number, tensor in enumerate(compared.tensors(preprocess, *quantization)):
        tensors[number] = tensor[0]
    tensors.flush()
    keras_scores = scores(keras_outputs, output)
    found: dict[str, npt.NDArray[np.float32]] = {}
    checks: dict[str, RuntimeCheck] = {}
    available = runtimes.find()
    for name in runtimes.RUNTIMES:
        if name not in available:
            hint = f"; name a Python that has it in {runtimes.PYTHON_VARIABLE}" if name == "tflite-runtime" else ""
            checks[name] = RuntimeCheck(status="not-installed", detail=f"not tried{hint}")
            continue
        runtime = available[name]
        outputs = model_path.parent / f"{name}.npy"
        told = partial(_tell, progress, f"checking in {name}", len(tensors))
        failure = ""
        try:
            with Sandbox(runtime, model_path) as sandbox:
                sandbox.replay(inputs, outputs, told)
            found[name] = scores(
                np.load(outputs), output, *((made.scale[0], made.zero_point[0]) if made.scale else (0.0, 0))
            )
        except (SandboxError, NotFiniteError) as error:
            failure = str(error)
        checks[name] = RuntimeCheck(status="failed", version=runtime.version, detail=failure)
    if not found:
        reasons = "; ".join(f"{name}: {check.detail}" for name, check in checks.items())
        raise ConversionError(
            f"the converted model runs in no TFLite runtime ({reasons})", mend="try another --quantize"
        )
    reference = min(found, key=lambda name: float(np.abs(found[name] - keras_scores).mean()))
    for name, values in found.items():
        difference = relative_difference(values, found[reference])
        same = difference <= MAX_RELATIVE_DIFFERENCE
        checks[name] = RuntimeCheck(
            status="ok" if same else "differs",
            version=available[name].version,
            max_abs_difference=round(float(np.abs(values - keras_scores).max()), 6),
            top1_agreement=round(agree(values, keras_scores, output), 6),
            detail="" if same else f"its outputs are {difference:.0%} off those of {reference}: do not use it there",
        )
    preferred = next(name for name, check in checks.items() if check.status == "ok")
    agreement = agree(found[preferred], keras_scores, output)
    if data != "noise" and agreement < LOW_AGREEMENT:
        logger.warning("the bundle agrees with the Keras model on %.1f %% only", 100 * agreement)
    truth = compared.class_ids
    of_keras, of_bundle = (
        None if truth is None else figures(values, truth, labels, output.multi_label)
        for values in (keras_scores, found[preferred])
    )
    verification = Verification(
        data=data,
        count=len(keras_scores),
        top1_agreement=None if data == "noise" else round(agreement, 6),
        mean_abs_difference=round(float(np.abs(found[preferred] - keras_scores).mean()), 6),
        **_accuracy(of_bundle, ""),
        **_accuracy(of_keras, "_keras"),
    )
    return Verified(checks, verification, preferred, of_bundle, of_keras)


def relative_difference(values: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Norm of the difference over the norm of ``reference``."""
    norm = float(np.linalg.norm(reference))
    difference = float(np.linalg.norm(values - reference))
    return difference / norm if norm else float(difference > 0)


def agree(values: npt.NDArray[np.float32], others: npt.NDArray[np.float32], output: Output) -> float:
    """Share of the rows, shape (n, classes), that name the same: the same highest class or, for several labels at once,
    the same classes above one half."""
    if output.multi_label:
        return float(np.mean(((values >= 0.5) == (others >= 0.5)).all(-1)))
    return float(np.mean(values.argmax(-1) == others.argmax(-1)))


def _accuracy(of_model: Figures | None, suffix: str) -> dict[str, Any]:
    """The fields of :class:`Verification` with that suffix."""
    rounded = {}
    for name in ("top1", "top5", "f1_macro"):
        value = getattr(of_model, name, None)
        rounded[f"{name}{suffix}"] = None if value is None else round(value, 6)
    return rounded


def _tell(progress: Callable[[str, int, int], None], stage: str, total: int, done: int) -> None:
    progress(stage, done, total)

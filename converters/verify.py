"""Holds a converted model against the Keras model, in every TFLite runtime at hand."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit import runtimes
from edgekit.converters import fidelity
from edgekit.converters.data import Dataset, allocate
from edgekit.converters.kinds import Kind
from edgekit.converters.metrics import Figures, figures
from edgekit.decode import NotFiniteError, scores
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import Output, RuntimeCheck, Verification, VerifiedOn
from edgekit.quantization import dequantize
from edgekit.sandbox import Sandbox, SandboxError

logger = logging.getLogger(__name__)

# The same model in two runtimes differs by the rounding of their kernels: on MobileNetV3-Small by 5e-8 (float32) to
# 0.007 (int8) of the outputs' norm. A runtime that computes something else is off by about 1.
MAX_RELATIVE_DIFFERENCE = 0.1
# Below this the bundle is hardly the model that was converted.
LOW_AGREEMENT = 0.95

# The tensors that each runtime is given, in the folder of the model.
INPUTS = "inputs.npy"

Scores = npt.NDArray[np.float32]


class UnfaithfulError(ConversionError):
    """The bundle loads, and is not the model that was converted in any runtime."""


@dataclass(frozen=True)
class Compared:
    """What a bundle is held against.

    Attributes:
        dataset: the items, with their classes where they are labelled.
        copies: so many of the last items are copies of the others, to judge by, with no part in the figures.
        keras_outputs: of the Keras model on the items, shape (n, classes).
        features: what the Keras model has before the part that saturates, for the first items, (m, values); None where
            it has no such part.
        data: which data it is.
        labels: names of the classes.
    """

    dataset: Dataset
    copies: int
    keras_outputs: Scores
    features: npt.NDArray[np.float32] | None
    data: VerifiedOn
    labels: tuple[str, ...]


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
    kind: Kind,
    output: Output,
    compared: Compared,
    progress: Callable[[str, int, int], None],
    ops: Sequence[str] = (),
) -> Verified:
    """Runs ``compared`` through the model in each runtime, by the device's own preprocessing and decoding. ``ops`` are
    files with kernels of custom operators.

    Raises:
        ConversionError: the model runs in no runtime; or, an :class:`UnfaithfulError`, none gives the outputs of the
            Keras model.
    """
    found, checks = _run(model_path, kind, output, compared.dataset, progress, ops)
    if not found:
        reasons = "; ".join(f"{name}: {check.detail}" for name, check in checks.items())
        raise ConversionError(
            f"the converted model runs in no TFLite runtime ({reasons})", mend="try another --quantize"
        )
    keras_scores = scores(compared.keras_outputs, output)
    count = len(keras_scores) - compared.copies
    reference = min(found, key=lambda name: float(np.abs(found[name] - keras_scores).mean()))
    problems = {}
    for name, values in found.items():
        if kind.saturates and compared.data != "noise":
            judged = fidelity.judge(values, keras_scores, count)
            agreement, within, problem = judged.first, round(judged.within, 6), judged.problem
        else:
            difference = relative_difference(values, found[reference])
            agreement, within = agree(values, keras_scores, output), None
            same = difference <= MAX_RELATIVE_DIFFERENCE
            problem = "" if same else f"its outputs are {difference:.0%} off those of {reference}"
        problems[name] = problem
        checks[name] = msgspec.structs.replace(
            checks[name],
            status="differs" if problem else "ok",
            max_abs_difference=round(float(np.abs(values - keras_scores)[:count].max()), 6),
            top1_agreement=round(agreement, 6),
            within_0_03=within,
            detail=problem and f"{problem}: do not use it there",
        )
    preferred = next((name for name, check in checks.items() if check.status == "ok"), "")
    if not preferred:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UnfaithfulError(
            f"the converted model is not the Keras model any more ({reasons})",
            mend="try another --quantize: float16 loses least, int8-weights next",
        )
    keras_scores, kept = keras_scores[:count], found[preferred][:count]
    agreement = checks[preferred].top1_agreement or 0.0
    if compared.data != "noise" and agreement < LOW_AGREEMENT:
        logger.warning("the bundle agrees with the Keras model on %.1f %% only", 100 * agreement)
    truth = compared.dataset.class_ids
    of_keras, of_bundle = (
        None if truth is None else figures(values, truth, compared.labels, output.multi_label)
        for values in (keras_scores, kept)
    )
    verification = Verification(
        data=compared.data,
        count=count,
        top1_agreement=None if compared.data == "noise" else agreement,
        mean_abs_difference=round(float(np.abs(kept - keras_scores).mean()), 6),
        max_abs_difference=checks[preferred].max_abs_difference,
        copies=compared.copies,
        within_0_03=checks[preferred].within_0_03,
        features_sqnr_db=None if compared.features is None else _features_sqnr_db(model_path, compared.features, ops),
        **_accuracy(of_bundle, ""),
        **_accuracy(of_keras, "_keras"),
    )
    return Verified(checks, verification, preferred, of_bundle, of_keras)


def _run(
    model_path: Path,
    kind: Kind,
    output: Output,
    dataset: Dataset,
    progress: Callable[[str, int, int], None],
    ops: Sequence[str],
) -> tuple[dict[str, Scores], dict[str, RuntimeCheck]]:
    """Scores in each runtime that runs the model, by its name; and what became of it in each."""
    model = Model(model_path.read_bytes(), str(model_path))
    given, made = model.inputs[0], model.outputs[0]
    quantization = (given.scale[0], given.zero_point[0]) if given.scale else (0.0, 0)
    inputs = model_path.parent / INPUTS
    waiting = kind.tensors(dataset.x, given.dtype, *quantization)
    first = next(waiting)
    tensors = allocate(inputs, given.dtype, (len(dataset.x), *first.shape[1:]))
    for number, tensor in enumerate(itertools.chain([first], waiting)):
        tensors[number] = tensor[0]
    tensors.flush()
    found: dict[str, Scores] = {}
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
            with Sandbox(runtime, model_path, ops=ops) as sandbox:
                sandbox.replay(inputs, outputs, told)
            found[name] = scores(
                np.load(outputs), output, *((made.scale[0], made.zero_point[0]) if made.scale else (0.0, 0))
            )
        except (SandboxError, NotFiniteError) as error:
            failure = str(error)
        checks[name] = RuntimeCheck(status="failed", version=runtime.version, detail=failure)
    return found, checks


def _features_sqnr_db(model_path: Path, of_keras: npt.NDArray[np.float32], ops: Sequence[str]) -> float | None:
    """Signal to noise ratio of what enters the part that saturates, dB; None where it cannot be read."""
    model = Model(model_path.read_bytes())
    index = fidelity.features(model)
    if index is None:
        return None
    runtime = next(iter(runtimes.find().values()))
    outputs = model_path.parent / "features_found.npy"
    try:
        with Sandbox(runtime, model_path, "none", ops=ops) as sandbox:
            sandbox.replay(model_path.parent / INPUTS, outputs, count=len(of_keras), tensor=index)
    except SandboxError as error:
        logger.debug("%s without delegate %s", runtime.name, error)
        return None
    found, tensor = np.load(outputs), model.tensors[index]
    real = dequantize(found, tensor.scale[0], tensor.zero_point[0]) if tensor.scale else found
    return fidelity.sqnr_db(of_keras, real) if real.shape == of_keras.shape else None


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

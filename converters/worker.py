"""The TensorFlow part of a conversion, in a process of its own: the converter ends the whole process for some models.

Run as ``python -m edgekit.converters.worker`` with a :class:`Job` as JSON on standard input; writes one JSON event a
line on standard output, and its results into the job's folder.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgekit.converters import data, targets
from edgekit.converters.report import CalibrationSummary, Layer
from edgekit.errors import EdgekitError
from edgekit.manifest import Calibration, ImageInput, VerifiedOn
from edgekit.preprocess import ImagePreprocessor

# More images make no better ranges, and no truer figure.
MAX_CALIBRATION, MAX_VALIDATION, NOISE_FRAMES = 500, 5000, 16
BATCH = 32

Head = Literal["classes", "attention"]


class Job(msgspec.Struct, kw_only=True):
    """What to convert; see :func:`edgekit.convert`. ``folder`` is where to write."""

    folder: str
    model: str
    weights: str
    alpha: float
    minimalistic: bool
    dropout: float | None
    head: Head
    labels: tuple[str, ...]
    calibration: str | None
    validation: str | None
    quantize: str
    input_size: int | None
    classes: int | None
    mean: float | None
    std: float | None
    report: bool


class Result(msgspec.Struct, kw_only=True):
    """What was converted: ``model.tflite``, and for the comparison ``<data>.npy`` (images or tensors), ``keras.npy``
    (the Keras model's outputs on them) and, where labelled, ``class_ids.npy``. For a report, ``float32.tflite`` and
    ``layers``."""

    input: ImageInput
    classes: int
    calibration: Calibration | None
    summary: CalibrationSummary | None
    layers: tuple[Layer, ...]
    data: VerifiedOn
    warnings: list[str]


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Progress of a stage, or the end: a result, or an error with a traceback where it was not foreseen."""

    stage: str = ""
    done: int = 0
    total: int = 0
    result: Result | None = None
    error: str = ""
    traceback: str = ""


def main() -> None:
    # TensorFlow prints to standard output, in Python and in C++: only our events may go there.
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    def tell(event: Event) -> None:
        events.write(msgspec.json.encode(event) + b"\n")

    try:
        tell(Event(result=_convert(msgspec.json.decode(sys.stdin.buffer.read(), type=Job), tell)))
    except EdgekitError as error:
        tell(Event(error=str(error), traceback=traceback.format_exc()))
    except ModuleNotFoundError as error:
        line = f"convert needs the package {error.name}; pip install 'edgekit[convert]'"
        tell(Event(error=line, traceback=traceback.format_exc()))
    except OSError as error:
        line = (
            f"{error.strerror or error}: {error.filename or tempfile.gettempdir()}; make room or mend it, and try again"
        )
        tell(Event(error=line, traceback=traceback.format_exc()))
    except Exception as error:
        tell(Event(error=_unforeseen(error), traceback=traceback.format_exc()))


def _unforeseen(error: Exception) -> str:
    """A line for an error of TensorFlow's."""
    foreign = re.findall(r"(?:TF Select|Custom) ops: ([\w, ]+)", str(error))
    if foreign:
        return (
            f"the model has operators that no TFLite runtime has: {', '.join(dict.fromkeys(foreign))}; "
            "build it of layers that TFLite knows"
        )
    reason = " ".join(str(error).split())[:300]
    return (
        f"TensorFlow cannot convert the model ({type(error).__name__}: {reason}); "
        "try another --quantize, or --debug for the whole story"
    )


def _convert(job: Job, tell: Any) -> Result:
    tell(Event(stage="loading TensorFlow"))
    from edgekit.converters import layers, models, recipes, rewrite

    tell(Event(stage="loading the model"))
    folder = Path(job.folder)
    classifier = models.open_model(
        job.model,
        weights=job.weights,
        classes=job.classes or len(job.labels) or None,
        input_size=job.input_size,
        alpha=job.alpha,
        minimalistic=job.minimalistic,
        dropout=job.dropout,
        head=job.head,
        mean=job.mean,
        std=job.std,
    )
    warnings = [*classifier.warnings]
    if job.model in models.MOBILENETS and job.weights == "none":
        warnings.append(f"{job.model} without --weights has random ones: good for measuring speed, and nothing else")
    if classifier.assumed:
        warnings.append(
            "the model does not say how its pixels are normalized: "
            f"(x - {classifier.mean[0]:g}) / {classifier.std[0]:g} is assumed; say otherwise with --mean and --std"
        )
    input = ImageInput(
        size_wh=classifier.size_wh,
        channels=3 if classifier.channels == 3 else 1,
        mean=classifier.mean,
        std=classifier.std,
    )

    preprocess = ImagePreprocessor(input)
    multi_label = _multi_label(classifier, preprocess)

    def load(what: str, path: str, limit: int, classes: int | None) -> data.Dataset:
        return data.load(
            path,
            what,
            input,
            folder,
            limit=limit,
            classes=classes,
            multi_label=multi_label,
            labels=job.labels,
            progress=lambda done, total: tell(Event(stage=f"reading {what} data", done=done, total=total)),
        )

    # All data is read and checked before the long part.
    calibration = load("calibration", job.calibration, MAX_CALIBRATION, None) if job.calibration else None
    validation = load("validation", job.validation, MAX_VALIDATION, classifier.classes) if job.validation else None
    if calibration and len(calibration.x) < data.FEW:
        warnings.append(
            f"{len(calibration.x)} calibration images are few: {data.FEW} or more give steadier int8 ranges"
        )
    if calibration and (doubt := data.suspicion(calibration.x)):
        warnings.append(doubt)

    stage = f"quantizing to {job.quantize}"
    tell(Event(stage=stage))

    def tensors() -> Iterator[Any]:
        assert calibration is not None
        if calibration.x.dtype == np.uint8:
            # The input's range is that of all pixels, not of those that happened to be seen: one black, one white.
            image = calibration.x[0].copy()
            image[0, 0], image[-1, -1] = 0, 255
            yield preprocess(image)
        for done, tensor in enumerate(calibration.tensors(preprocess), 1):
            yield tensor
            tell(Event(stage=stage, done=done, total=len(calibration.x)))

    content = recipes.convert(classifier.static, job.quantize, tensors)
    Path(folder, "model.tflite").write_bytes(rewrite.rewrite(content) if job.quantize == "int8" else content)

    which: VerifiedOn = "validation" if validation else "calibration" if calibration else "noise"
    compared = validation or calibration or _noise(folder, preprocess)
    _keras_outputs(classifier, compared, preprocess, folder, tell)
    if compared.class_ids is not None:
        np.save(folder / "class_ids.npy", compared.class_ids)
    used = calibration if job.quantize in targets.CALIBRATED else None
    of_layers: tuple[Layer, ...] = ()
    if job.report:
        float32 = content if job.quantize == "float32" else recipes.convert(classifier.static, "float32", None)
        Path(folder, "float32.tflite").write_bytes(float32)
        tell(Event(stage="comparing the layers"))
        if job.quantize != "float32":
            of_layers = layers.compare(float32, content, islice(compared.tensors(preprocess), layers.MAX_FRAMES))
    return Result(
        input=input,
        classes=classifier.classes,
        calibration=Calibration(count=len(used.x), digest=used.digest) if used else None,
        summary=_summary(used, preprocess) if used and job.report else None,
        layers=of_layers,
        data=which,
        warnings=warnings,
    )


def _summary(calibration: data.Dataset, preprocess: ImagePreprocessor) -> CalibrationSummary:
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for tensor in calibration.tensors(preprocess):
        count, total = count + tensor.size, total + float(tensor.sum(dtype=np.float64))
        squares += float(np.square(tensor, dtype=np.float64).sum())
        low, high = min(low, float(tensor.min())), max(high, float(tensor.max()))
    mean = total / count
    return CalibrationSummary(
        count=len(calibration.x),
        digest=calibration.digest,
        minimum=low,
        maximum=high,
        mean=mean,
        std=max(squares / count - mean**2, 0.0) ** 0.5,
    )


def _multi_label(classifier: Any, preprocess: ImagePreprocessor) -> bool:
    """Whether each class has a score of its own: they lie in 0..1 and do not add up to 1. A SavedModel does not tell
    its last activation otherwise."""
    frames = np.random.default_rng(0).integers(0, 256, (2, *preprocess.shape_nhwc[1:]), np.uint8)
    scores = np.concatenate([np.asarray(classifier.static(preprocess(frame), training=False)) for frame in frames])
    return bool((scores >= 0).all() and (scores <= 1).all() and (np.abs(scores.sum(1) - 1) > 1e-2).any())


def _noise(folder: Path, preprocess: ImagePreprocessor) -> data.Dataset:
    frames = np.random.default_rng(0).integers(0, 256, (NOISE_FRAMES, *preprocess.shape_nhwc[1:]), np.uint8)
    np.save(folder / "noise.npy", frames)
    return data.Dataset(frames, None, "")


def _keras_outputs(
    classifier: Any, compared: data.Dataset, preprocess: ImagePreprocessor, folder: Path, tell: Any
) -> None:
    """Writes what the Keras model makes of the data, shape (n, classes)."""
    import tensorflow as tf

    dynamic = classifier.model.inputs[0].shape[0] is None
    # Without XLA, which takes longer to compile than this takes to run.
    predict = tf.function(classifier.model if dynamic else classifier.static, jit_compile=False, reduce_retracing=True)
    count = len(compared.x)
    outputs = np.empty((count, classifier.classes), np.float32)
    tensors = compared.tensors(preprocess)
    step = BATCH if dynamic else 1
    for start in range(0, count, step):
        batch = [next(tensors) for _ in range(min(step, count - start))]
        outputs[start : start + step] = predict(tf.constant(np.concatenate(batch)), training=False)
        tell(Event(stage="running the Keras model", done=start + len(batch), total=count))
    np.save(folder / "keras.npy", outputs)


if __name__ == "__main__":
    main()

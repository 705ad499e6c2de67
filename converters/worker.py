"""The TensorFlow part of a conversion, in a process of its own: the converter ends the whole process for some models.

Run as ``python -m edgekit.converters.worker`` with a :class:`Job` as JSON on standard input; writes one JSON event a
line on standard output, and its results into the job's folder.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from edgekit.converters import data
from edgekit.converters.report import CalibrationSummary, Layer
from edgekit.errors import EdgekitError
from edgekit.flatbuffer import Model
from edgekit.manifest import AudioInput, Calibration, ImageInput, VerifiedOn

if TYPE_CHECKING:
    from edgekit.converters.kinds import Kind
    from edgekit.converters.subjects import Subject

Head = Literal["classes", "attention"]
BatchNormAxis = Literal["time", "frequency"]
# The model whose input is sound.
SOUND = "crnn"
# The stage in which kernels run that a user wrote.
CHECKING = "checking the custom operators"


class Job(msgspec.Struct, kw_only=True):
    """What to convert; see :func:`edgekit.convert`. ``folder`` is where to write, ``hop`` in seconds."""

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
    mels: int | None
    frames: int | None
    bn_axis: BatchNormAxis | None
    streaming: bool
    exact: bool
    hop: float | None
    report: bool
    ops: tuple[str, ...]
    edgekit_ops: bool


class Result(msgspec.Struct, kw_only=True):
    """What was converted: ``model.tflite``, and for the comparison ``compared.npy`` (items), ``keras.npy`` (the Keras
    model's outputs on them) and, where labelled, ``class_ids.npy``; of sound ``features.npy``, what the Keras model has
    before its GRUs for the first items. For a report, ``float32.tflite`` and ``layers``.

    Attributes:
        labels: of the classes; empty where they have none.
        data: what the items are, but for the last of them, which are ``copies`` of the others.
        ops: those of the job's that have kernels.
    """

    input: ImageInput | AudioInput
    classes: int
    labels: tuple[str, ...]
    calibration: Calibration | None
    summary: CalibrationSummary | None
    layers: tuple[Layer, ...]
    data: VerifiedOn
    copies: int
    ops: tuple[str, ...]
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
        from edgekit.converters.custom_ops import unknown

        return str(unknown(foreign))
    reason = " ".join(str(error).split())[:300]
    return (
        f"TensorFlow cannot convert the model ({type(error).__name__}: {reason}); "
        "try another --quantize, or --debug for the whole story"
    )


def _convert(job: Job, tell: Any) -> Result:
    warnings = _collected_warnings()
    tell(Event(stage="loading TensorFlow"))
    from edgekit.converters import custom_ops, fidelity, layers, subjects

    tell(Event(stage="loading the model"))
    folder = Path(job.folder)
    resolver, ops = custom_ops.load(job.ops)  # they have layers of the model, too
    subject = subjects.open_sound(job) if job.model == SOUND else subjects.open_images(job, resolver)
    kind = subject.kind
    warnings += subject.warnings

    def load(what: str, path: str, limit: int, classes: int | None) -> data.Dataset:
        return data.load(
            path,
            what,
            kind,
            folder,
            limit=limit,
            classes=classes,
            multi_label=subject.multi_label,
            labels=subject.labels,
            progress=lambda done, total: tell(Event(stage=f"reading {what} data", done=done, total=total)),
        )

    # All data is read and checked before the long part.
    calibration = load("calibration", job.calibration, kind.max_calibration, None) if job.calibration else None
    validation = load("validation", job.validation, kind.max_validation, subject.classes) if job.validation else None
    if calibration and (count := len(calibration.x)) < kind.enough:
        few = f"{count} calibration {kind.thing}{'s are' if count > 1 else ' is'} few"
        warnings.append(f"{few}: {kind.enough} or more give steadier int8 ranges")
    if calibration and (doubt := kind.suspicion(calibration.x)):
        warnings.append(doubt)

    compared = validation or calibration or data.Dataset(kind.noise(), None, "")
    if subject.check:
        tell(Event(stage=CHECKING))
        subject.check(kind.inputs(compared.x[: custom_ops.MAX_ITEMS]))

    stage = f"quantizing to {job.quantize}"
    tell(Event(stage=stage))
    content = subject.convert(
        job.quantize,
        calibration.x if calibration else None,
        lambda done: tell(Event(stage=stage, done=done, total=len(calibration.x) if calibration else 0)),
    )
    Path(folder, "model.tflite").write_bytes(content)
    if ops and not any(operator.custom for operator in Model(content).operators):
        warnings.append(f"{ops[0]} is for nothing: the model has no custom operator; mark one with edgekit.custom_op")

    which: VerifiedOn = "validation" if validation else "calibration" if calibration else "noise"
    copies = [] if which == "noise" else list(kind.copies(compared.x))
    if copies or which == "noise":
        count = len(compared.x) + len(copies)
        items = data.save(folder / "compared.npy", itertools.chain(compared.x, copies), count)
    else:  # they may be many, and lie there already
        items = compared.x
        os.link(folder / f"{which}.npy", folder / "compared.npy")
    _keras_outputs(subject, items, folder, tell)
    if subject.features and which != "noise":
        some = kind.inputs(compared.x[: fidelity.MAX_CLIPS])
        np.save(folder / "features.npy", [subject.features(x).reshape(-1) for x in some])
    if compared.class_ids is not None:
        np.save(folder / "class_ids.npy", compared.class_ids)
    used = calibration if job.quantize in subject.calibrated else None
    of_layers: tuple[Layer, ...] = ()
    if job.report:
        float32 = content if job.quantize == "float32" else subject.convert("float32", None, lambda _: None)
        Path(folder, "float32.tflite").write_bytes(float32)
        tell(Event(stage="comparing the layers"))
        if job.quantize not in ("float32", *subject.remade):
            of_layers = layers.compare(
                float32, content, itertools.islice(kind.inputs(compared.x), layers.MAX_FRAMES), subject.resolver
            )
    return Result(
        input=kind.input,
        classes=subject.classes,
        labels=subject.labels,
        calibration=Calibration(count=len(used.x), digest=used.digest) if used else None,
        summary=_summary(used, kind) if used and job.report else None,
        layers=of_layers,
        data=which,
        copies=len(copies),
        ops=ops,
        warnings=warnings,
    )


def _collected_warnings() -> list[str]:
    """A list that grows by what our modules warn of from now on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("edgekit").addHandler(handler)
    return lines


def _summary(calibration: data.Dataset, kind: Kind) -> CalibrationSummary:
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for tensor in kind.inputs(calibration.x):
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


def _keras_outputs(subject: Subject, items: Any, folder: Path, tell: Any) -> None:
    """Writes what the Keras model makes of the items, shape (n, classes)."""
    outputs = np.empty((len(items), subject.classes), np.float32)
    tensors = subject.kind.inputs(items)
    for start in range(0, len(items), subject.batch):
        batch = np.concatenate(list(itertools.islice(tensors, subject.batch)))
        outputs[start : start + len(batch)] = subject.predict(batch)
        tell(Event(stage="running the Keras model", done=start + len(batch), total=len(items)))
    np.save(folder / "keras.npy", outputs)


if __name__ == "__main__":
    main()

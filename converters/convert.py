"""From a Keras model to a bundle: convert in a child process, verify in each runtime, pack, write."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from edgekit import bundle, custom_ops, runtimes, sandbox
from edgekit.converters import edgetpu, kinds, measure, metadata, metrics, raw_sound, targets, verify
from edgekit.converters import report as reports
from edgekit.converters.data import Dataset
from edgekit.converters.targets import Choice
from edgekit.converters.verify import Compared, UnfaithfulError, Verified
from edgekit.converters.worker import CHECKING, SOUND, BatchNormAxis, Event, Head, Job, Result
from edgekit.coverage import Coverage
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import AudioInput, CustomOp, ImageInput, Manifest, Output

logger = logging.getLogger(__name__)

# What a music tagger gives, wherever in its graph the sigmoid lies.
_TAGS = Output(activation="sigmoid", multi_label=True)

_ROOT = str(Path(bundle.__file__).parents[1])
# Without the user's folder among those that modules are taken from.
_WORKER = "import sys; sys.path[:] = [p for p in sys.path if p]; from edgekit.converters.worker import main; main()"

Recipe = Literal["auto", "float32", "float16", "int8-weights", "dynamic", "int8", "int16x8"]
Progress = Callable[[str, int, int], None]


class TooMuchLostError(ConversionError):
    """The bundle's accuracy is further below the Keras model's than ``max_drop`` allows."""


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str = "none",
    labels: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    quantize: Recipe = "auto",
    target: str | None = None,
    max_drop: float | None = None,
    report: str | os.PathLike[str] | None = None,
    input_size: int | None = None,
    classes: int | None = None,
    alpha: float = 1.0,
    minimalistic: bool = False,
    dropout: float | None = None,
    head: Head = "classes",
    mean: float | None = None,
    std: float | None = None,
    mels: int | None = None,
    frames: int | None = None,
    bn_axis: BatchNormAxis | None = None,
    streaming: bool = False,
    exact: bool = False,
    hop: float | None = None,
    ops: Sequence[str | os.PathLike[str]] = (),
    edgekit_ops: bool = False,
    name: str | None = None,
    version: str = "1",
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Converts a Keras classifier of images, or a music tagger, into a bundle, and proves what it lost.

    Args:
        model: ``mobilenet-v3-small``, ``mobilenet-v3-large``, ``crnn``, or the path of an image classifier: a
            ``.keras``, ``.h5`` or SavedModel.
        output: the ``.tflite`` to write; nothing is written if anything fails.
        weights: of a named model: ``none`` (random), ``imagenet``, for a CRNN ``msd``, or a ``.weights.h5``, ``.keras``
            or ``.h5`` file.
        labels: a text file with one label a line; by default those of the weights ``msd``, or none.
        calibration: a folder of images, or of audio files or log-mels, or an ``.npy`` or ``.npz`` (``x``), that fixes
            the int8 ranges.
        validation: labelled data: a folder per class, or an ``.npz`` with ``x`` and ``y``; ``y`` holds class numbers,
            shape (n,), or for a model of several labels at once 0 or 1, shape (n, classes).
        quantize: the recipe; ``auto`` chooses it by ``target``.
        target: the device, a name in :data:`edgekit.converters.targets.TARGETS`. For ``coral`` the bundle is compiled
            too, into ``NAME_edgetpu.tflite`` beside ``output``, where ``edgetpu_compiler`` is on the PATH.
        max_drop: fail where the bundle's accuracy on the validation data (top-1; macro F1 for several labels at once)
            is further below the Keras model's, as a share: 0.02 is two points. ``auto`` tries another recipe first.
        report: a folder for ``report.html`` and ``report.json``.
        input_size: side of the square input, px; for a named model (224, or 512 with the head ``attention``) or one
            that leaves it open.
        classes: of a named model, where there are no labels.
        alpha, minimalistic, dropout: of a named model, as :func:`keras.applications.MobileNetV3Small` has them.
        head: of a named model: ``classes``, or ``attention``: channels gated by their global average, for defects.
        mean, std: a pixel x in 0..255 enters the model as ``(x - mean) / std``. By default 0 and 1 for a model that
            normalizes for itself, else 127.5 and 127.5.
        mels, frames: of a CRNN: size of the log-mel spectrogram of a window, 96 x 1366 by default.
        bn_axis: of a CRNN: what its first normalization is over, ``time`` as published, or ``frequency``, which can be
            streamed and is the default with ``streaming``.
        streaming: of a CRNN: the bundle is given what is new of the sound only, and keeps what it needs of the rest.
        exact: with ``streaming``: the scores are those of the padded window, for somewhat more work.
        hop: of a CRNN: seconds from one prediction to the next, half a window by default; a streaming bundle has its
            own.
        ops: files of custom operators: ``.py`` with Keras layers, functions marked with :func:`edgekit.custom_op` and
            kernels marked with :func:`edgekit.kernel`, or ``.so`` with kernels, as ``edgekit ops build`` makes them.
        edgekit_ops: use EdgeKit's own operators: of images, for ``LayerNormalization`` over the last axis; of sound,
            for the front end, which is in the graph then, and the bundle takes sound itself.
        name, version: the bundle's; the name of ``output`` and ``1`` by default.
        progress: called with a stage's name, how much of it is done, and of how much (0: unknown).

    Returns:
        The manifest of the bundle.

    Raises:
        ConversionError: the model, its weights or its data do not fit, or TensorFlow cannot convert it.
        EdgekitError: the labels cannot be read, or ``output`` cannot be written.
    """
    output = Path(output)
    _check(output, quantize, calibration is not None, target, "clips" if os.fspath(model) == SOUND else "images")
    of_images = {
        "--input-size": input_size,
        "--alpha": None if alpha == 1 else alpha,
        "--minimalistic": minimalistic or None,
        "--dropout": dropout,
        "--head": None if head == "classes" else head,
        "--ops": ops or None,
        "--mean": mean,
        "--std": std,
    }
    of_sound = {
        "--mels": mels,
        "--frames": frames,
        "--bn-axis": bn_axis,
        "--streaming": streaming or None,
        "--exact": exact or None,
        "--hop": hop,
    }
    _check_kind(os.fspath(model), of_images, of_sound)
    for what, value in (
        ("--input-size", input_size),
        ("--classes", classes),
        ("--mels", mels),
        ("--frames", frames),
    ):
        if value is not None and value < 1:
            raise ConversionError(what, expected="1 or more", got=str(value), mend="give a whole number")
    if hop is not None and not (math.isfinite(hop) and hop > 0):
        raise ConversionError(
            f"--hop {hop:g}", expected="seconds above 0", mend="give 0.5 for two predictions a second"
        )
    for what, number in (("--mean", mean), ("--std", std), ("--alpha", alpha), ("--dropout", dropout)):
        if number is not None and (not math.isfinite(number) or (what == "--std" and number == 0)):
            raise ConversionError(what, expected="a finite number, not 0 for std", got=str(number), mend="mend it")
    if max_drop is not None and not (0 <= max_drop <= 1 and validation):
        raise ConversionError(
            "--max-drop",
            expected="a share from 0 to 1, and --validation to measure it on",
            got=f"{max_drop:g}" if validation else "no --validation",
            mend="give labelled data, and 0.02 for two points",
        )
    if edgekit_ops and custom_ops.find_library() is None:
        raise ConversionError("--edgekit-ops", mend=custom_ops.NOT_BUILT)
    labels_given = bundle.read_labels(labels, classes) if labels else ()
    job = Job(
        folder="",
        model=os.fspath(model),
        weights=weights,
        alpha=alpha,
        minimalistic=minimalistic,
        dropout=dropout,
        head=head,
        labels=labels_given,
        calibration=os.fspath(calibration) if calibration else None,
        validation=os.fspath(validation) if validation else None,
        quantize="",
        input_size=input_size,
        classes=classes,
        mean=mean,
        std=std,
        mels=mels,
        frames=frames,
        bn_axis=bn_axis,
        streaming=streaming,
        exact=exact,
        hop=hop,
        report=report is not None,
        ops=tuple(os.fspath(path) for path in ops),
        edgekit_ops=edgekit_ops,
    )
    choices = [Choice(quantize, "")] if quantize != "auto" else targets.choose(target, calibration is not None)
    if streaming and quantize == "auto":  # the states of a stream are float
        choices = [choice for choice in choices if choice.recipe not in targets.CALIBRATED]
        if not choices:
            raise ConversionError(
                f"--streaming for {target}, which runs int8 graphs only", mend="leave one of them out"
            )
    with ExitStack() as stack:
        temporary = stack.enter_context(bundle.replacing(output))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-")))
        for choice in choices:
            if choice.reason:
                logger.info("%s is chosen: %s", choice.recipe, choice.reason)
            job = msgspec.structs.replace(job, quantize=choice.recipe, folder=str(folder / choice.recipe))
            try:
                converted = _convert(job, name or output.stem, version, max_drop, progress)
                break
            except (TooMuchLostError, UnfaithfulError) as error:
                if choice is choices[-1]:
                    raise
                logger.warning("%s", error)
        of_bundle = Manifest(
            name=name or output.stem,
            version=version,
            task="audio-tagging" if job.model == SOUND else "image-classification",
            input=converted.result.input,
            output=converted.output,
            quantization=choice.recipe,
            quantization_reason=choice.reason,
            target=target or "",
            calibration=converted.result.calibration,
            custom_ops=_custom_ops(converted.content),
            runtimes=converted.verified.runtimes,
            verification=converted.verified.verification,
            sha256=hashlib.sha256(converted.content).hexdigest(),
        )
        if target and of_bundle.custom_ops and (doubt := targets.caution_custom(target)):
            logger.warning("%s", doubt)
        beside = output.with_name(f"{output.stem}_edgetpu.tflite")
        compiled = _compile(converted.path, beside, stack) if target == "coral" and choice.recipe == "int8" else None
        if beside.exists() and not compiled:
            logger.warning("%s was compiled from an earlier bundle: compile it again, or remove it", beside)
        if report is not None:
            reports.write(Path(report), _report(converted, of_bundle, compiled, progress))
        temporary.write_bytes(bundle.pack(converted.content, of_bundle, converted.result.labels))
        bundle.read(temporary)
    return of_bundle


def _custom_ops(content: bytes) -> tuple[CustomOp, ...]:
    custom = [CustomOp(name=of.name, version=of.version) for of in Model(content).operators if of.custom]
    return tuple(dict.fromkeys(custom))


def _check_kind(model: str, of_images: Mapping[str, object], of_sound: Mapping[str, object]) -> None:
    """Refuses options that belong to another kind of model; one that is not given is None."""
    foreign, kind = (of_images, "images") if model == SOUND else (of_sound, "sound")
    if given := [option for option, value in foreign.items() if value is not None]:
        raise ConversionError(f"{given[0]} is for models of {kind}", got=f"model {model}", mend="leave it out")
    if of_sound["--exact"] and not of_sound["--streaming"]:
        raise ConversionError("--exact is a way of streaming", mend="give --streaming too, or leave it out")


def _check(output: Path, quantize: str, calibrated: bool, target: str | None, things: str) -> None:
    if output.suffix != ".tflite" or output.is_dir():
        raise ConversionError(
            f"output {output}",
            expected="a file whose name ends in .tflite",
            got="a folder" if output.is_dir() else repr(output.name),
            mend="give another path",
        )
    if quantize not in get_args(Recipe):
        raise ConversionError(
            f"quantize {quantize!r}", expected=" or ".join(get_args(Recipe)), mend="give one of these"
        )
    if quantize in targets.CALIBRATED and not calibrated:
        raise ConversionError(
            f"{quantize} needs calibration data",
            mend=f"give --calibration a folder of typical {things}, a hundred rather than ten",
        )
    if target and quantize == "auto":
        targets.find(target)
    elif target and (caution := targets.caution(target, quantize)):
        logger.warning("%s", caution)


@dataclass(frozen=True)
class _Converted:
    """A converted and verified model: its file, which has the metadata, and what is known of it."""

    path: Path
    content: bytes
    job: Job
    result: Result
    labels: tuple[str, ...]
    output: Output
    verified: Verified


def _convert(job: Job, name: str, version: str, max_drop: float | None, progress: Progress) -> _Converted:
    """Converts as ``job`` says, and verifies the result."""
    folder = Path(job.folder)
    folder.mkdir()
    result = _work(job, progress)
    for warning in result.warnings:
        logger.warning("%s", warning)
    path = folder / "model.tflite"

    def describe(plain: bytes, input: ImageInput | AudioInput) -> bytes:
        states = len(Model(plain).inputs) - 1
        return metadata.attach(plain, input, name=name, version=version, labelled=bool(result.labels), states=states)

    content = describe(path.read_bytes(), result.input)
    path.write_bytes(content)
    output = _TAGS if isinstance(result.input, AudioInput) else bundle.guess_output(Model(content))
    truth = np.load(folder / "class_ids.npy") if (folder / "class_ids.npy").exists() else None
    if truth is not None and truth.ndim == 2 and not output.multi_label:
        truth = truth.argmax(1)  # one label each: the scores only looked like those of several at once
    labels = result.labels or tuple(f"class {number}" for number in range(result.classes))
    compared = Compared(
        dataset=Dataset(np.load(folder / "compared.npy", mmap_mode="r"), truth, ""),
        copies=result.copies,
        keras_outputs=np.load(folder / "keras.npy"),
        features=np.load(folder / "features.npy") if (folder / "features.npy").exists() else None,
        data=result.data,
        labels=labels,
    )
    verified = verify.verify(path, kinds.of(result.input), output, compared, progress, result.ops)
    for runtime, check in verified.runtimes.items():
        if check.status in ("failed", "differs"):
            logger.warning("%s %s: %s", runtime, check.status, check.detail)
    if max_drop is not None and verified.keras_figures and verified.figures:
        keras, kept = metrics.headline(verified.keras_figures), metrics.headline(verified.figures)
        if keras - kept > max_drop + 1e-9:
            what = "macro F1" if output.multi_label else "top-1"
            raise TooMuchLostError(
                f"{job.quantize} loses {100 * (keras - kept):.2f} points of {what}",
                expected=f"at most {100 * max_drop:g}, as --max-drop says",
                got=f"{keras:.2%} in Keras and {kept:.2%} in the bundle",
                mend="try another --quantize, or more --calibration data like the validation data",
            )
    if job.edgekit_ops and isinstance(result.input, AudioInput):
        input = raw_sound.in_graph(result.input)
        for model in filter(Path.exists, (path.with_name("float32.tflite"), path)):
            model.write_bytes(raw_sound.attach(model.read_bytes(), result.input))
        content = describe(path.read_bytes(), input)
        path.write_bytes(content)
        progress("checking the front end", 0, 0)
        working = [name for name, check in verified.runtimes.items() if check.status in ("ok", "differs")]
        found = runtimes.find()
        raw_sound.check(path, result.input, {name: found[name] for name in working})
        result = msgspec.structs.replace(result, input=input)
    return _Converted(path, content, job, result, labels, output, verified)


def _compile(model: Path, output: Path, stack: ExitStack) -> Coverage | None:
    """Compiles ``model`` for the Edge TPU; ``output`` is there when ``stack`` is left well."""
    compiler = edgetpu.find()
    if not compiler:
        logger.warning(
            "%s is not on the PATH: the bundle runs on the CPU until %s is made with it, on x86-64 Debian",
            edgetpu.COMPILER,
            output.name,
        )
        return None
    compiled, coverage = edgetpu.compile(compiler, model, model.parent)
    stack.enter_context(bundle.replacing(output)).write_bytes(compiled.read_bytes())
    logger.info("the Edge TPU takes %d of %d operators", coverage.delegated, coverage.operators)
    return coverage


def _report(
    converted: _Converted, of_bundle: Manifest, compiled: Coverage | None, progress: Progress
) -> reports.Report:
    recipe, verified, result = converted.job.quantize, converted.verified, converted.result
    models = {"float32": converted.path.with_name("float32.tflite"), recipe: converted.path}
    latency, coverage = measure.measure(models, verified.runtimes, progress, result.ops)
    return reports.Report(
        manifest=of_bundle,
        data=result.data,
        labels=converted.labels,
        sizes_bytes={model: path.stat().st_size for model, path in models.items()},
        keras=verified.keras_figures,
        bundle=verified.figures,
        layers=result.layers,
        latency=latency,
        coverage=(*coverage, *measure.predict(Model(converted.content), compiled)),
        calibration=result.summary,
        warnings=tuple(result.warnings),
    )


def _work(job: Job, progress: Progress) -> Result:
    """Runs ``job`` in a child process."""
    stage = "starting"
    try:
        given = msgspec.json.encode(job)
    except UnicodeEncodeError as error:
        raise ConversionError("a path is not valid UTF-8", mend="rename the file") from error
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            # not with -m, which would import what lies in the user's folder
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # the child must find the same edgekit, installed or in a checkout
            env={**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])},
        ) as child,
    ):
        try:
            assert child.stdin and child.stdout
            child.stdin.write(given)
            child.stdin.close()
            event = Event()
            for line in child.stdout:
                event = msgspec.json.decode(line, type=Event)
                if event.stage:
                    stage = event.stage
                    progress(stage, event.done, event.total)
            status = child.wait()
        finally:
            child.kill()
        log.seek(0)
        logger.debug("%s\n%s", log.read()[-20_000:], event.traceback)
    if event.error:
        raise ConversionError(event.error)
    if status and stage == CHECKING:
        raise ConversionError(f"a kernel of a custom operator {sandbox.describe_exit(status)}", mend="mend it")
    if status or event.result is None:
        raise ConversionError(
            f"the TensorFlow converter {sandbox.describe_exit(status)} while {stage}", mend="try another --quantize"
        )
    return event.result

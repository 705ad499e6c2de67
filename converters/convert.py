"""From a Keras model to a bundle: convert in a child process, verify in each runtime, pack, write."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np

from edgekit import bundle
from edgekit.converters import metadata, verify
from edgekit.converters.data import Dataset
from edgekit.converters.worker import Event, Job, Result
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import Manifest

logger = logging.getLogger(__name__)

_ROOT = str(Path(bundle.__file__).parents[1])

Recipe = Literal["float32", "float16", "int8-weights", "dynamic", "int8"]
Progress = Callable[[str, int, int], None]


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str = "none",
    labels: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    quantize: Recipe = "int8-weights",
    input_size: int | None = None,
    classes: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    name: str | None = None,
    version: str = "1",
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Converts a Keras classifier into a bundle, and proves what it lost.

    Args:
        model: ``mobilenet-v3-small``, ``mobilenet-v3-large``, or the path of a ``.keras``, ``.h5`` or SavedModel.
        output: the ``.tflite`` to write; nothing is written if anything fails.
        weights: of a named model: ``none`` (random), ``imagenet``, or a ``.weights.h5``, ``.keras`` or ``.h5`` file.
        labels: a text file with one label a line.
        calibration: a folder of images, or an ``.npy`` or ``.npz`` (``x``), that fixes the int8 ranges.
        validation: labelled data: a folder per class, or an ``.npz`` with ``x`` and ``y``.
        quantize: the recipe.
        input_size: side of the square input, px; for a named model (224) or one that leaves it open.
        classes: of a named model, where there are no labels.
        mean, std: a pixel x in 0..255 enters the model as ``(x - mean) / std``. By default 0 and 1 for a model that
            normalizes for itself, else 127.5 and 127.5.
        name, version: the bundle's; the name of ``output`` and ``1`` by default.
        progress: called with a stage's name, how much of it is done, and of how much (0: unknown).

    Returns:
        The manifest of the bundle.

    Raises:
        ConversionError: the model, its weights or its data do not fit, or TensorFlow cannot convert it.
        EdgekitError: the labels cannot be read, or ``output`` cannot be written.
    """
    output = Path(output)
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
    if quantize == "int8" and not calibration:
        raise ConversionError(
            "int8 needs calibration data", mend="give --calibration a folder of 100 or more typical images"
        )
    for what, value in (("--input-size", input_size), ("--classes", classes)):
        if value is not None and value < 1:
            raise ConversionError(what, expected="1 or more", got=str(value), mend="give a whole number")
    for what, number in (("--mean", mean), ("--std", std)):
        if number is not None and (not math.isfinite(number) or (what == "--std" and number == 0)):
            raise ConversionError(what, expected="a finite number, not 0 for std", got=str(number), mend="mend it")
    names = bundle.read_labels(labels, classes) if labels else ()
    with (
        bundle.replacing(output) as temporary,
        tempfile.TemporaryDirectory(prefix="edgekit-") as folder,
    ):
        job = Job(
            folder=folder,
            model=os.fspath(model),
            weights=weights,
            labels=names,
            calibration=os.fspath(calibration) if calibration else None,
            validation=os.fspath(validation) if validation else None,
            quantize=quantize,
            input_size=input_size,
            classes=classes,
            mean=mean,
            std=std,
        )
        result = _work(job, progress)
        for warning in result.warnings:
            logger.warning("%s", warning)
        of_bundle, content = _finish(Path(folder), result, quantize, name or output.stem, version, names, progress)
        temporary.write_bytes(bundle.pack(content, of_bundle, names))
        bundle.read(temporary)
    return of_bundle


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
            [sys.executable, "-c", "import sys; sys.path.pop(0); from edgekit.converters.worker import main; main()"],
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
    if status or event.result is None:
        raise ConversionError(
            f"the TensorFlow converter {verify.describe_exit(status)} while {stage}", mend="try another --quantize"
        )
    return event.result


def _finish(
    folder: Path, result: Result, quantize: str, name: str, version: str, labels: tuple[str, ...], progress: Progress
) -> tuple[Manifest, bytes]:
    """Verifies the converted model; its manifest, and its flatbuffer with metadata."""
    content = metadata.attach(
        (folder / "model.tflite").read_bytes(), result.input, name=name, version=version, labelled=bool(labels)
    )
    (folder / "model.tflite").write_bytes(content)
    output = bundle.guess_output(Model(content))
    class_ids = folder / "class_ids.npy"
    compared = Dataset(
        np.load(folder / f"{result.data}.npy", mmap_mode="r"), np.load(class_ids) if class_ids.exists() else None, ""
    )
    runtimes, verification = verify.verify(
        folder / "model.tflite",
        result.input,
        output,
        compared,
        np.load(folder / "keras.npy"),
        result.data,
        progress,
    )
    for runtime, check in runtimes.items():
        if check.status in ("failed", "differs"):
            logger.warning("%s %s: %s", runtime, check.status, check.detail)
    of_bundle = Manifest(
        name=name,
        version=version,
        input=result.input,
        output=output,
        quantization=quantize,
        calibration=result.calibration,
        runtimes=runtimes,
        verification=verification,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return of_bundle, content

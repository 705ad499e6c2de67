"""Holds a converted model against the Keras model, in every TFLite runtime at hand."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit import runtimes
from edgekit.converters.data import Dataset, allocate
from edgekit.decode import NotFiniteError, scores
from edgekit.errors import ConversionError
from edgekit.flatbuffer import Model
from edgekit.manifest import ImageInput, Output, RuntimeCheck, Verification, VerifiedOn
from edgekit.preprocess import ImagePreprocessor

logger = logging.getLogger(__name__)

# A Python with tflite-runtime, where this one cannot have it: its wheel needs NumPy 1 and Python 3.11 at most.
PYTHON_VARIABLE = "EDGEKIT_TFLITE_RUNTIME_PYTHON"

# The same model in two runtimes differs by the rounding of their kernels: on MobileNetV3-Small by 5e-8 (float32) to
# 0.007 (int8) of the outputs' norm. A runtime that computes something else is off by about 1.
MAX_RELATIVE_DIFFERENCE = 0.1
# Below this the bundle is hardly the model that was converted.
LOW_AGREEMENT = 0.95
# A runtime that gives no frame for so long hangs.
STALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Runtime:
    """A TFLite runtime that can be tried: its module, its version and the Python that has it."""

    name: str
    module: str
    version: str
    python: str


def find_runtimes() -> list[Runtime]:
    """The runtimes of this Python, and tflite-runtime of the one that ``EDGEKIT_TFLITE_RUNTIME_PYTHON`` names.

    Raises:
        ConversionError: that one does not have it.
    """
    found = {
        name: Runtime(name, runtimes.RUNTIMES[name][0], version, sys.executable)
        for name, version in runtimes.installed().items()
    }
    if python := os.environ.get(PYTHON_VARIABLE):
        ask = "import sys; sys.path.pop(0); import importlib.metadata as m; print(m.version('tflite-runtime'))"
        try:
            answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConversionError(
                f"{PYTHON_VARIABLE}={python} does not run ({error})", mend="name a Python there, or unset it"
            ) from error
        if answer.returncode:
            raise ConversionError(
                f"{PYTHON_VARIABLE}={python} has no tflite-runtime", mend="install it there or unset it"
            )
        module = runtimes.RUNTIMES["tflite-runtime"][0]
        found["tflite-runtime"] = Runtime("tflite-runtime", module, answer.stdout.strip(), python)
    return list(found.values())


def verify(
    model_path: Path,
    input: ImageInput,
    output: Output,
    compared: Dataset,
    keras_outputs: npt.NDArray[np.float32],
    data: VerifiedOn,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, RuntimeCheck], Verification]:
    """Runs ``compared`` through the model in each runtime, by the device's own preprocessing and decoding.

    Args:
        keras_outputs: of the Keras model on the same data, shape (n, classes).
        data: which data it is, for :class:`Verification`.

    Returns:
        What became of each runtime, and the figures in the preferred one of those that are right.

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
    available = {runtime.name: runtime for runtime in find_runtimes()}
    for name in runtimes.RUNTIMES:
        if name not in available:
            hint = f"; name a Python that has it in {PYTHON_VARIABLE}" if name == "tflite-runtime" else ""
            checks[name] = RuntimeCheck(status="not-installed", detail=f"not tried{hint}")
            continue
        runtime = available[name]
        outputs = model_path.parent / f"{name}.npy"
        failure = _replay(
            runtime, model_path, inputs, outputs, partial(_tell, progress, f"checking in {name}", len(tensors))
        )
        try:
            if not failure:
                found[name] = scores(
                    np.load(outputs), output, *((made.scale[0], made.zero_point[0]) if made.scale else (0.0, 0))
                )
        except NotFiniteError as error:
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
    figures = _figures(found[preferred], keras_scores, compared.class_ids, output, data)
    if figures.top1_agreement is not None and figures.top1_agreement < LOW_AGREEMENT:
        logger.warning("the bundle agrees with the Keras model on %.1f %% only", 100 * figures.top1_agreement)
    return checks, figures


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


def _figures(
    values: npt.NDArray[np.float32],
    keras_scores: npt.NDArray[np.float32],
    class_ids: npt.NDArray[np.int64] | None,
    output: Output,
    data: VerifiedOn,
) -> Verification:
    def top1(of: npt.NDArray[np.float32]) -> float | None:
        return None if class_ids is None else round(float(np.mean(of.argmax(-1) == class_ids)), 6)

    return Verification(
        data=data,
        count=len(values),
        top1_agreement=None if data == "noise" else round(agree(values, keras_scores, output), 6),
        mean_abs_difference=round(float(np.abs(values - keras_scores).mean()), 6),
        top1_keras=top1(keras_scores),
        top1=top1(values),
    )


def _replay(runtime: Runtime, model: Path, inputs: Path, outputs: Path, progress: Callable[[int], None]) -> str:
    """Empty, or why the runtime failed."""
    command = [
        runtime.python,
        str(Path(__file__).with_name("replay.py")),
        runtime.module,
        str(model),
        str(inputs),
        str(outputs),
    ]
    with (
        (model.parent / f"{runtime.name}.log").open("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, bufsize=0) as child,
    ):
        try:
            assert child.stdout is not None
            while select.select([child.stdout], [], [], STALL_TIMEOUT_S)[0]:
                line = child.stdout.readline()
                if not line:
                    break
                if line.strip().isdigit():
                    progress(int(line))
            else:
                return f"gave nothing for {STALL_TIMEOUT_S:g} s"
            status = child.wait()
        finally:
            child.kill()
        if status == 0:
            return ""
        log.seek(0)
        lines = log.read().strip().splitlines()
    return f"{describe_exit(status)}{f': {lines[-1][:200]}' if lines and status > 0 else ''}"


def _tell(progress: Callable[[str, int, int], None], stage: str, total: int, done: int) -> None:
    progress(stage, done, total)


def describe_exit(status: int) -> str:
    """How a child process ended; ``status`` as :class:`subprocess.Popen` gives it, negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed ({name}: out of memory?)" if name == "SIGKILL" else f"crashed ({name})"

"""What a bundle costs on this machine: per runtime, delegate and number of threads, and per stage of the pipeline."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit import bundle, runtimes
from edgekit.bundle import File
from edgekit.devices.delegates.plans import EDGE_TPU_LIBRARY, compiled_path
from edgekit.devices.interpreter import Model
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput, ImageInput
from edgekit.runtimes import Runtime
from edgekit.sandbox import Sandbox, SandboxError, alternate

SCHEMA: Literal["edgekit.bench/1"] = "edgekit.bench/1"
# A camera's frame.
FRAME_WH = (1280, 720)


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of a stage's time, ms."""

    p50: float
    p95: float
    p99: float


class Inference(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle in one runtime with one delegate.

    ``ratio`` is its median against that of the first bundle measured in the same way. ``delegated`` of ``operators``
    run in ``pieces`` of the delegate (on the CPU: XNNPACK); None where the runtime does not tell. ``memory_bytes`` is
    the peak beyond the bare runtime, None where the system does not tell. A ``problem`` says why there are no times.
    """

    bundle: str
    runtime: str
    version: str
    delegate: str
    threads: int
    latency_ms: Times | None = None
    ratio: float | None = None
    memory_bytes: int | None = None
    operators: int
    delegated: int | None = None
    pieces: int | None = None
    problem: str = ""


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """The stages of the pipeline on what ``given`` tells, on the CPU, in the runtime and with the threads that
    :func:`edgekit.load` takes by itself: a 1280 x 720 frame, a window of sound or, where it streams, a hop. A
    ``problem`` says why there are none."""

    bundle: str
    given: str = ""
    preprocess_ms: Times | None = None
    inference_ms: Times | None = None
    decode_ms: Times | None = None
    problem: str = ""


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    schema: Literal["edgekit.bench/1"] = SCHEMA
    machine: str
    cores: int
    inference: tuple[Inference, ...]
    stages: tuple[Stages, ...]


@dataclass(frozen=True)
class _Trial:
    file: File
    model: Path
    runtime: Runtime
    delegate: str
    threads: int


def bench(
    bundles: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    delegates: Sequence[str] = ("cpu", "coral", "gpu"),
    threads: Sequence[int] = (),
    seconds: float = 2.0,
    ops: Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Bench:
    """Measures bundles in every runtime installed, in turns within one run, so that the machine's noise strikes all
    alike.

    Args:
        bundles: one or more ``.tflite``; the first is what the others are compared with.
        delegates: ``cpu``, ``coral``, ``gpu`` or the path of a delegate library.
        threads: numbers of threads of the CPU kernels; 1 and the number of cores by default.
        seconds: how long to measure each combination.
        ops: files with kernels of custom operators beside EdgeKit's own, as :class:`edgekit.CustomOpResolver` takes
            them.
        progress: called with a stage's name, how much of it is done, and of how much.

    Raises:
        BundleError: a bundle cannot be read.
        EdgekitError: no runtime is installed, an argument does not fit, or nothing at all could be measured.
    """
    paths = [bundles] if isinstance(bundles, str | os.PathLike) else list(bundles)
    cores = len(os.sched_getaffinity(0))
    counts = list(dict.fromkeys(threads or (1, cores)))
    if not paths:
        raise EdgekitError("bench", expected="at least one bundle", got="none", mend="name a .tflite file")
    if not all(1 <= count <= 256 for count in counts):
        raise EdgekitError("threads", expected="1 to 256", got=", ".join(map(str, counts)), mend="give others")
    if not 0 < seconds <= 3600:
        raise EdgekitError("seconds", expected="more than 0, at most 3600", got=str(seconds), mend="give another")
    files = [bundle.read_file(path) for path in paths]
    found = runtimes.find()
    if not found:
        runtimes.load()  # says what to install
    trials = [
        _Trial(file, _model(file, delegate), runtime, delegate, count)
        for runtime in found.values()
        for delegate in delegates
        if not (delegate == "gpu" and runtime.name != "litert")
        for count in (counts if delegate == "cpu" else counts[:1])
        for file in files
    ]
    inference = tuple(_inference(trials, seconds, ops, progress))
    if not any(row.latency_ms for row in inference):
        reasons = dict.fromkeys(f"{row.runtime} with {row.delegate}: {row.problem}" for row in inference)
        raise EdgekitError(f"nothing could be measured ({'; '.join(reasons)})", mend="try `edgekit inspect` on it")
    return Bench(
        machine=f"{platform.machine()} {_cpu()}".strip(),
        cores=cores,
        inference=inference,
        stages=tuple(_stages(file, min(seconds, 2.0), ops) for file in files),
    )


def _model(file: File, delegate: str) -> Path:
    """What is loaded: for Coral the compiled model beside the bundle, where it is."""
    compiled = compiled_path(file.path)
    return compiled if delegate == "coral" and compiled.exists() else file.path


def _inference(
    trials: list[_Trial],
    seconds: float,
    ops: Sequence[str | os.PathLike[str]],
    progress: Callable[[str, int, int], None],
) -> list[Inference]:
    problems: dict[int, str] = {}
    open_ones: dict[int, Sandbox] = {}
    with ExitStack() as stack:
        for number, trial in enumerate(trials):
            progress("loading", number + 1, len(trials))
            library = EDGE_TPU_LIBRARY if trial.delegate == "coral" else trial.delegate
            try:
                open_ones[number] = stack.enter_context(
                    Sandbox(trial.runtime, trial.model, library, trial.threads, ops)
                )
            except SandboxError as error:
                problems[number] = str(error)
        measured = alternate(list(open_ones.values()), seconds, lambda *count: progress("measuring", *count))
    times: dict[int, npt.NDArray[np.float64]] = {}
    for number, result in zip(open_ones, measured, strict=True):
        if isinstance(result, SandboxError):
            problems[number] = str(result)
        else:
            times[number] = result
    first: dict[tuple[str, str, int], float] = {}
    rows = []
    for number, trial in enumerate(trials):
        row = Inference(
            bundle=str(trial.file.path),
            runtime=trial.runtime.name,
            version=trial.runtime.version,
            delegate=trial.delegate,
            threads=trial.threads,
            operators=len(trial.file.model.operators),
            problem=problems.get(number, ""),
        )
        if number in times:
            latency, pieces = _times(times[number]), open_ones[number].pieces
            like = first.setdefault((trial.runtime.name, trial.delegate, trial.threads), latency.p50)
            row = msgspec.structs.replace(
                row,
                latency_ms=latency,
                ratio=round(latency.p50 / like, 3),
                memory_bytes=open_ones[number].peak_bytes or None,
                delegated=None if pieces is None else sum(map(len, pieces)),
                pieces=None if pieces is None else len(pieces),
            )
        rows.append(row)
    return rows


def _stages(file: File, seconds: float, ops: Sequence[str | os.PathLike[str]]) -> Stages:
    try:
        of_bundle = bundle.classifier(file)
        given, frame = _frame(of_bundle.input)
        marks: list[tuple[float, ...]] = []
        with Model(of_bundle, delegate="cpu", ops=ops) as model:
            started_s = time.perf_counter()
            while (now_s := time.perf_counter()) - started_s < seconds or len(marks) < 10:
                tensor = model.preprocess(*frame)
                preprocessed_s = time.perf_counter()
                raw = model.invoke(tensor)
                inferred_s = time.perf_counter()
                model.decode(raw)
                marks.append((now_s, preprocessed_s, inferred_s, time.perf_counter()))
    except EdgekitError as error:
        return Stages(bundle=str(file.path), problem=str(error))
    preprocess, inference, decode = 1e3 * np.diff(np.array(marks[1:]), axis=1).T
    return Stages(
        bundle=str(file.path),
        given=given,
        preprocess_ms=_times(preprocess),
        inference_ms=_times(inference),
        decode_ms=_times(decode),
    )


def _frame(input: ImageInput | AudioInput) -> tuple[str, tuple[Any, ...]]:
    """What a source gives, in words, and as arguments of :attr:`Model.preprocess`."""
    random = np.random.default_rng(0)
    if isinstance(input, AudioInput):
        samples = input.hop_samples if input.streaming else input.window_samples
        what = "hop" if input.streaming else "window"
        return f"{what} of {samples / input.sample_rate_hz:.2f} s", (random.uniform(-0.1, 0.1, samples),)
    width, height = FRAME_WH
    return f"{width} x {height} frame", (random.integers(0, 256, (height, width, 3), np.uint8), "bgr")


def _times(ms: npt.NDArray[np.float64]) -> Times:
    p50, p95, p99 = (round(float(value), 4) for value in np.percentile(ms, [50, 95, 99]))
    return Times(p50=p50, p95=p95, p99=p99)


def _cpu() -> str:
    """The processor's or the board's name, where the system tells."""
    for path in ("/proc/device-tree/model", "/proc/cpuinfo"):
        try:
            for line in Path(path).read_text(errors="replace").splitlines():
                if path.endswith("model"):
                    return line.strip("\0 ")
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            continue
    return ""

"""What the report says of speed and delegates: measured on this machine, or predicted from documented rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from edgekit import coverage, runtimes
from edgekit.converters.report import Latency
from edgekit.coverage import Coverage
from edgekit.flatbuffer import Model
from edgekit.manifest import RuntimeCheck
from edgekit.sandbox import Sandbox, SandboxError, alternate

SECONDS = 1.0


def measure(
    models: dict[str, Path], checks: dict[str, RuntimeCheck], progress: Callable[[str, int, int], None]
) -> tuple[tuple[Latency, ...], tuple[Coverage, ...]]:
    """Latency of the models, in turns within one run, in each runtime that runs the bundle, on one thread and on all
    cores; and what XNNPACK took of the last of them in each runtime."""
    found = runtimes.find()
    counts = sorted({1, len(os.sched_getaffinity(0))})
    trials = [
        (found[name], threads, model)
        for name, check in checks.items()
        if check.status in ("ok", "differs")
        for threads in counts
        for model in models
    ]
    latency, taken = [], {}
    with ExitStack() as stack:
        sandboxes = []
        for runtime, threads, model in trials:
            sandbox = stack.enter_context(Sandbox(runtime, models[model], threads=threads))
            sandboxes.append(sandbox)
            taken[runtime.name, model] = sandbox.pieces
        measured = alternate(sandboxes, SECONDS, lambda *count: progress("measuring latency", *count))
    for (runtime, threads, model), times in zip(trials, measured, strict=True):
        if not isinstance(times, SandboxError):
            p50, p95 = np.percentile(times, [50, 95]).round(4).tolist()
            latency.append(
                Latency(
                    model=model, runtime=runtime.name, version=runtime.version, threads=threads, p50_ms=p50, p95_ms=p95
                )
            )
    *_, last = models
    graph = Model(models[last].read_bytes())
    return tuple(latency), tuple(
        coverage.measured(f"xnnpack in {name} {found[name].version}", graph, pieces)
        for (name, model), pieces in taken.items()
        if model == last and pieces is not None
    )


def predict(model: Model, compiled: Coverage | None) -> tuple[Coverage, ...]:
    """Of the Edge TPU, as ``edgetpu_compiler`` says where it was run, and of the GPU."""
    return (compiled or coverage.edge_tpu(model), coverage.gpu(model))

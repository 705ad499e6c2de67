"""What the report says of speed and delegates: measured on this machine, or predicted from documented rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path

import numpy as np

from edgekit import coverage, runtimes
from edgekit.converters.report import Latency
from edgekit.coverage import Coverage
from edgekit.flatbuffer import Model
from edgekit.manifest import RuntimeCheck
from edgekit.runtimes import Runtime
from edgekit.sandbox import Sandbox, SandboxError, alternate

SECONDS = 1.0


def measure(
    models: dict[str, Path],
    checks: dict[str, RuntimeCheck],
    progress: Callable[[str, int, int], None],
    ops: Sequence[str] = (),
) -> tuple[tuple[Latency, ...], tuple[Coverage, ...]]:
    """Latency of the models, in turns within one run, in each runtime that runs the bundle, on one thread and on all
    cores; and what XNNPACK took of the last of them in each runtime. ``ops`` are files with kernels of custom
    operators."""
    found = runtimes.find()
    working = [found[name] for name, check in checks.items() if check.status in ("ok", "differs")]
    counts = sorted({1, len(os.sched_getaffinity(0))})
    sandboxes: dict[tuple[Runtime, int, str], Sandbox] = {}
    with ExitStack() as stack:
        for trial in product(working, counts, models):
            runtime, threads, model = trial
            # The float model may be of newer operators than the bundle.
            with suppress(SandboxError):
                sandboxes[trial] = stack.enter_context(Sandbox(runtime, models[model], threads=threads, ops=ops))
        measured = alternate(list(sandboxes.values()), SECONDS, lambda *count: progress("measuring latency", *count))
    latency = []
    for (runtime, threads, model), times in zip(sandboxes, measured, strict=True):
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
        coverage.measured(f"xnnpack in {runtime.name} {runtime.version}", graph, sandbox.pieces)
        for (runtime, threads, model), sandbox in sandboxes.items()
        if (threads, model) == (1, last) and sandbox.pieces is not None
    )


def predict(model: Model, compiled: Coverage | None) -> tuple[Coverage, ...]:
    """Of the Edge TPU, as ``edgetpu_compiler`` says where it was run, and of the GPU."""
    return (compiled or coverage.edge_tpu(model), coverage.gpu(model))

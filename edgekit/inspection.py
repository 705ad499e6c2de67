"""What is in a ``.tflite`` file, and what the delegates of TFLite make of it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from edgekit import bundle as bundles
from edgekit import coverage, runtimes
from edgekit.custom_ops import CustomOpResolver
from edgekit.errors import EdgekitError
from edgekit.flatbuffer import Tensor
from edgekit.sandbox import Sandbox, SandboxError

logger = logging.getLogger(__name__)


def inspect(path: str | os.PathLike[str], *, ops: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """The manifest, tensors, operators and packed files of any ``.tflite``, as plain data that fits JSON.

    Args:
        path: the file.
        ops: files with kernels of custom operators beside EdgeKit's own, as :class:`edgekit.CustomOpResolver` takes
            them. A custom operator is told with the version of its ``kernel``, None where there is none.

    ``classifier`` tells how EdgeKit runs it, or, as a line of text, why it cannot. ``delegates`` tells what each would
    take: XNNPACK as measured in a process of its own, in each runtime that is installed and loads the file.

    Raises:
        BundleError: as :func:`edgekit.bundle.read_file`.
    """
    file = bundles.read_file(path)
    kernels = CustomOpResolver(*ops).versions
    operators = Counter((operator.name, operator.version, operator.custom) for operator in file.model.operators)
    classifier: str | dict[str, Any]
    try:
        bundle = bundles.classifier(file)
        classifier = {
            "labels": list(bundle.labels),
            "input": msgspec.to_builtins(bundle.input),
            "output": msgspec.to_builtins(bundle.output),
        }
    except EdgekitError as error:
        classifier = str(error)
    return {
        "path": str(file.path),
        "bytes": file.path.stat().st_size,
        "sha256": file.sha256,
        "packed_files": list(file.packed),
        "inputs": [_tensor(tensor) for tensor in file.model.inputs],
        "outputs": [_tensor(tensor) for tensor in file.model.outputs],
        "operators": [
            {"name": name, "version": version, "custom": custom, "count": count}
            | ({"kernel": kernels.get(name)} if custom else {})
            for (name, version, custom), count in sorted(operators.items())
        ],
        "classifier": classifier,
        "delegates": [msgspec.to_builtins(of_delegate) for of_delegate in _delegates(file, ops)],
        "manifest": msgspec.to_builtins(file.manifest) if file.manifest else None,
    }


def _delegates(file: bundles.File, ops: Sequence[str | os.PathLike[str]]) -> Iterator[coverage.Coverage]:
    for runtime in runtimes.find().values():
        try:
            with Sandbox(runtime, file.path, ops=ops) as sandbox:
                pieces = sandbox.pieces or []
        except SandboxError as error:
            logger.warning("%s does not load %s: %s", runtime.name, file.path, error)
        else:
            yield coverage.measured(f"xnnpack in {runtime.name} {runtime.version}", file.model, pieces)
    yield coverage.edge_tpu(file.model)
    yield coverage.gpu(file.model)


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "scale": list(tensor.scale),
        "zero_point": list(tensor.zero_point),
    }

"""What is in a ``.tflite`` file, without running it."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import msgspec

from edgekit import bundle as bundles
from edgekit.flatbuffer import Tensor


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest, tensors, operators and packed files of a bundle, as plain data that fits JSON.

    Raises:
        BundleError: as :func:`edgekit.bundle.read`.
    """
    bundle = bundles.read(path)
    operators = Counter((operator.name, operator.version, operator.custom) for operator in bundle.model.operators)
    return {
        "path": str(bundle.path),
        "name": bundle.name,
        "version": bundle.version,
        "bytes": bundle.path.stat().st_size,
        "sha256": bundle.sha256,
        "labels": list(bundle.labels),
        "packed_files": list(bundle.packed),
        "inputs": [_tensor(tensor) for tensor in bundle.model.inputs],
        "outputs": [_tensor(tensor) for tensor in bundle.model.outputs],
        "input": msgspec.to_builtins(bundle.input),
        "output": msgspec.to_builtins(bundle.output),
        "operators": [
            {"name": name, "version": version, "custom": custom, "count": count}
            for (name, version, custom), count in sorted(operators.items())
        ],
        "manifest": msgspec.to_builtins(bundle.manifest) if bundle.manifest else None,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "scale": list(tensor.scale),
        "zero_point": list(tensor.zero_point),
    }

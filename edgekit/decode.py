"""From the output tensor to predictions, without touching an interpreter."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.manifest import Output
from edgekit.quantization import dequantize


class Prediction(msgspec.Struct, frozen=True):
    """One class the model names: its number, its label, and its score in 0..1."""

    class_id: int
    label: str
    score: float


class NotFiniteError(EdgekitError):
    """The model gave NaN or infinity."""


def scores(raw: npt.NDArray[Any], output: Output, scale: float = 0.0, zero_point: int = 0) -> npt.NDArray[np.float32]:
    """Output tensors, shape (n, classes), raw as the interpreter gives them -> scores in 0..1, same shape.

    ``scale`` and ``zero_point`` are those of a quantized output tensor, ``scale`` 0 where it is float.

    Raises:
        NotFiniteError: a score is NaN or infinite.
    """
    values = dequantize(raw, scale, zero_point) if scale else raw.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise NotFiniteError("model output is not finite", mend="convert the model again, or check its weights")
    if not output.in_graph and output.activation == "softmax":
        exponentials = np.exp(values - values.max(-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(-1, keepdims=True), np.float32)
    if not output.in_graph and output.activation == "sigmoid":
        # through tanh, which does not overflow
        return np.asarray(0.5 * (1 + np.tanh(0.5 * values)), np.float32)
    return values


def top(
    class_scores: npt.NDArray[np.float32], labels: tuple[str, ...], threshold: float = 0.0, top_k: int = 3
) -> list[Prediction]:
    """The ``top_k`` highest of ``class_scores`` (classes,) that reach ``threshold``, highest first; of equal scores the
    lower class number first."""
    order = np.argsort(-class_scores, kind="stable")[:top_k]
    return [
        Prediction(int(i), labels[i], round(float(class_scores[i]), 6)) for i in order if class_scores[i] >= threshold
    ]

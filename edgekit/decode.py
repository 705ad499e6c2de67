"""From the output tensor to predictions, without touching an interpreter."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
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
    if scale and raw.dtype.itemsize == 1:
        values = _reals(raw.dtype, scale, zero_point)[raw.view(np.uint8)]
    else:
        values = dequantize(raw, scale, zero_point) if scale else raw.astype(np.float32, copy=False)
    if not (math.isfinite(scale) if scale else np.isfinite(values).all()):
        raise NotFiniteError("model output is not finite", mend="convert the model again, or check its weights")
    if not output.in_graph and output.activation == "softmax":
        exponentials = np.exp(values - values.max(-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(-1, keepdims=True), np.float32)
    if not output.in_graph and output.activation == "sigmoid":
        # through tanh, which does not overflow
        return np.asarray(0.5 * (1 + np.tanh(0.5 * values)), np.float32)
    return values


@functools.lru_cache(maxsize=16)
def _reals(dtype: np.dtype[Any], scale: float, zero_point: int) -> npt.NDArray[np.float32]:
    """What each byte is. Right after an inference NumPy's code is in no cache, and each call of it costs; so one."""
    return dequantize(np.arange(256, dtype=np.uint8).view(dtype), scale, zero_point)


# In a mapping of thresholds: all labels that it does not name.
OTHERS = "*"
# The lowest score of a class that is named: one for all, or by label.
Threshold = float | Mapping[str, float]


def thresholds(threshold: Threshold, labels: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """The lowest score of each class that is named, (classes,). A mapping gives it by label; ``"*"`` stands for all
    that it does not name, whose threshold is 0 without it.

    Raises:
        EdgekitError: a score is not in 0..1, or a label is none of the model's.
    """
    by_label = dict(threshold) if isinstance(threshold, Mapping) else {OTHERS: threshold}
    for label, score in by_label.items():
        if label != OTHERS and label not in labels:
            close = difflib.get_close_matches(label, labels) or labels[:5]
            raise EdgekitError(
                f"threshold {label}={score:g}", expected="a label of the model", mend=f"try {' or '.join(close)}"
            )
        if not 0 <= score <= 1:
            raise EdgekitError("threshold", expected="a score from 0 to 1", got=str(score), mend="give one")
    others = by_label.get(OTHERS, 0.0)
    return np.array([by_label.get(label, others) for label in labels], np.float32)


def top(
    class_scores: npt.NDArray[np.float32],
    labels: tuple[str, ...],
    threshold: float | npt.NDArray[np.float32] = 0.0,
    top_k: int = 3,
) -> list[Prediction]:
    """The ``top_k`` highest of ``class_scores`` (classes,) that reach ``threshold``, one for all or (classes,), highest
    first; of equal scores the lower class number first."""
    left, named = np.where(class_scores >= threshold, class_scores, -np.inf), []
    for _ in range(min(top_k, len(labels))):  # for the few that are named faster than to sort all
        highest = int(left.argmax())
        if left[highest] == -np.inf:
            break
        named.append(Prediction(highest, labels[highest], round(float(class_scores[highest]), 6)))
        left[highest] = -np.inf
    return named

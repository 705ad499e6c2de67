"""How faithful a quantized tag network is.

One whose recurrent gates saturate flips rather than drifts: an error before them is nothing, or changes the tags. So it
is judged by the signal to noise ratio before the gates, and by how many of many clips come out as they should.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.flatbuffer import Model
from edgekit.quantization import dequantize, quantize

# A score that differs by less is right.
TOLERANCE = 0.03
# Below this share of right clips a runtime is not to be used.
REQUIRED_SHARE = 0.8
# Tags whose scores are closer have no order: an int8 score has steps of 0.004, and two may be off by one each.
TIE = 0.01
# On how many clips the features are measured.
MAX_CLIPS = 8

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fidelity:
    """Shares in 0..1: ``within`` of the many clips whose every score is within ``TOLERANCE``, with the right tag first;
    ``first`` of the clips that the user gave that have the right tag first."""

    within: float
    first: float

    @property
    def problem(self) -> str:
        """Why this is not the model that was converted; empty if it is."""
        if self.first < REQUIRED_SHARE:
            return f"another tag comes first on {1 - self.first:.0%} of the clips"
        if self.within < REQUIRED_SHARE:
            return f"{self.within:.0%} of clips within {TOLERANCE} of the Keras model, {REQUIRED_SHARE:.0%} are needed"
        return ""


def judge(scores: Scores, of_keras: Scores, clips: int) -> Fidelity:
    """Compares scores of shape (n, tags), those of so many ``clips`` and then those of their copies.

    Where there are copies, ``within`` is their share: the clips may have been those that calibrated.
    """
    leading = np.take_along_axis(of_keras, scores.argmax(-1)[:, None], -1)[:, 0]
    first = leading >= of_keras.max(-1) - TIE
    near = np.abs(scores - of_keras).max(-1) <= TOLERANCE
    judged = slice(clips, None) if len(scores) > clips else slice(None)
    return Fidelity(within=float((first & near)[judged].mean()), first=float(first[:clips].mean()))


def features_sqnr_db(content: bytes, pairs: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> float | None:
    """Signal to noise ratio, dB, of what enters the gates of a flatbuffer's GRU; None where that is not to be found.

    Args:
        pairs: an input tensor (1, ...), and what the float model has in its place.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph = Model(content)
    index = _features(graph)
    if index is None or len(graph.inputs) != 1:
        return None
    # XNNPACK keeps what lies inside its pieces to itself.
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    given, made = graph.inputs[0], graph.tensors[index]
    signal = noise = 0.0
    for x, expected in pairs:
        tensor = quantize(x, given.dtype, given.scale[0], given.zero_point[0]) if given.scale else x
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensor)
        interpreter.invoke()
        found = interpreter.get_tensor(index)
        if found.size != expected.size:
            return None
        real = dequantize(found, made.scale[0], made.zero_point[0]) if made.scale else found.astype(np.float32)
        signal += float(np.square(expected, dtype=np.float64).sum())
        noise += float(np.square(expected.ravel() - real.ravel(), dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if signal and noise else None


def _features(graph: Model) -> int | None:
    """The tensor of that name, which converters drop where it is but another shape of what it is made of: or what
    enters the first fully connected operator, the kernel of the first GRU."""
    named = (number for number, tensor in enumerate(graph.tensors) if tensor.name == "features")
    entering = (operator.inputs[0] for operator in graph.operators if operator.name == "FULLY_CONNECTED")
    return next(named, next(entering, None))

"""How faithful a quantized tag network is.

One whose recurrent gates saturate flips rather than drifts: an error before them is nothing, or changes the tags. So it
is judged by the signal to noise ratio before the gates, and by how many of many clips come out as they should.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.flatbuffer import Model

# A score that differs by less is right.
TOLERANCE = 0.03
# Below this share of right clips a runtime is not to be used. What is right for 85 % of all clips shows 70 % or more on
# 24 of them but for once in a hundred times; what is broken shows 40 % at most.
REQUIRED_SHARE = 0.7
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


def features(graph: Model) -> int | None:
    """The tensor that enters the GRU of a flatbuffer: the one of that name, which converters drop where it is but
    another shape of what it is made of, or what the first fully connected operator takes."""
    named = (number for number, tensor in enumerate(graph.tensors) if tensor.name == "features")
    entering = (operator.inputs[0] for operator in graph.operators if operator.name == "FULLY_CONNECTED")
    return next(named, next(entering, None))


def sqnr_db(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float | None:
    """Signal to noise ratio, dB; None where there is no signal, or no noise."""
    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(expected - found, dtype=np.float64).sum())
    return round(10 * math.log10(signal / noise), 2) if signal and noise else None

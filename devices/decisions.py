"""From the scores of each frame to labels that are held: they begin and end, and do not flicker."""

from __future__ import annotations

import itertools
import secrets
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from edgekit.manifest import Output

Scores = npt.NDArray[np.float32]

MAX_SMOOTHING = 10_000


class Change(NamedTuple):
    """A label begins to be held, or ends; ``event_id`` is the same for both, and ``score`` the smoothed one."""

    event: Literal["begin", "end"]
    event_id: str
    class_id: int
    score: float


def check(smoothing: int, hysteresis: float) -> None:
    """
    Raises:
        EdgekitError: one of them is out of its range.
    """
    if not 1 <= smoothing <= MAX_SMOOTHING:
        raise EdgekitError(
            "smoothing", expected=f"1 to {MAX_SMOOTHING} predictions", got=str(smoothing), mend="give 1 for none"
        )
    if not 0 <= hysteresis <= 1:
        raise EdgekitError("hysteresis", expected="0 to 1", got=str(hysteresis), mend="give 0 for none")


class Decisions:
    """Which labels are held, prediction after prediction.

    A label begins when its smoothed score reaches its threshold, and ends when it falls below the threshold less the
    hysteresis; where that is nothing, below half of the threshold. Of classes that exclude each other one is held: the
    highest that reaches its threshold, until another one that does exceeds it by more than the hysteresis. Where each
    class has a score of its own (``multi_label``) any number is held; those with a threshold of 0 are always there,
    and neither begin nor end.

    Smoothing is an exponential moving average with a weight of 2 / (smoothing + 1) for the newest score, which has the
    centre of mass of a plain average over as many. It begins with the first score as it is.

    Args:
        limits: the threshold of each class, (classes,). They and the other two may be set anew between two updates.
        smoothing: over about so many predictions; 1: none.
        hysteresis: in scores.

    Attributes:
        current: class and smoothed score of the highest label that is held or always there.

    Raises:
        EdgekitError: ``smoothing`` or ``hysteresis`` is out of its range.
    """

    def __init__(self, output: Output, limits: Scores, *, smoothing: int = 1, hysteresis: float = 0.1) -> None:
        check(smoothing, hysteresis)
        self.limits, self.smoothing, self.hysteresis = limits, smoothing, hysteresis
        self.current: tuple[int, float] | None = None
        self._multi_label = output.multi_label
        self._smoothed: Scores | None = None
        self._held: dict[int, str] = {}  # event by class
        self._series, self._numbers = secrets.token_hex(4), itertools.count(1)

    def update(self, scores: Scores) -> list[Change]:
        """Takes the scores of the next prediction, (classes,); what changes by them, first what ends."""
        if self._smoothed is None or self.smoothing == 1:
            self._smoothed = np.array(scores, np.float32)
        else:
            self._smoothed += 2 / (self.smoothing + 1) * (scores - self._smoothed)
        held = (self._several if self._multi_label else self._one)(self._smoothed)
        changes = [self._end(class_id) for class_id in sorted(self._held.keys() - held)]
        for class_id in sorted(held - self._held.keys()):
            event_id = self._held[class_id] = f"{self._series}-{next(self._numbers)}"
            changes.append(Change("begin", event_id, class_id, float(self._smoothed[class_id])))
        return changes

    def end(self) -> list[Change]:
        """All that is held ends, and what comes next is not smoothed with what was."""
        changes = [self._end(class_id) for class_id in sorted(self._held)]
        self._smoothed = self.current = None
        return changes

    def _end(self, class_id: int) -> Change:
        assert self._smoothed is not None  # something was held
        return Change("end", self._held.pop(class_id), class_id, float(self._smoothed[class_id]))

    def _one(self, scores: Scores) -> set[int]:
        """The class that is held now, of those that exclude each other."""
        limits = self.limits
        highest = int(np.where(scores >= limits, scores, -np.inf).argmax())
        score = float(scores[highest])
        self.current = (highest, score) if score >= limits[highest] else None
        for before in self._held:
            score_before = float(scores[before])
            exceeded = self.current and score - score_before > self.hysteresis
            if score_before >= self._end_below(float(limits[before])) and not exceeded:
                self.current = before, score_before
        return {self.current[0]} if self.current else set()

    def _several(self, scores: Scores) -> set[int]:
        """The classes that are held now, where each has a score of its own."""
        limits = self.limits
        levels = limits
        if self._held:
            levels = limits.copy()
            levels[list(self._held)] = [self._end_below(limit) for limit in limits[list(self._held)].tolist()]
        there = scores >= levels  # all with a threshold of 0 among them
        highest = int(np.where(there, scores, -np.inf).argmax())
        self.current = (highest, float(scores[highest])) if there[highest] else None
        return set(np.flatnonzero(there & (limits > 0)).tolist())

    def _end_below(self, limit: float) -> float:
        # At least half the threshold: a threshold near the hysteresis would never be left.
        return max(limit - self.hysteresis, limit / 2)

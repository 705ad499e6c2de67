"""What is published of a frame: a numbered prediction, the events of labels that begin or end, and the state."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.bundle import Bundle
from edgekit.decode import Prediction
from edgekit.devices.decisions import Change, Decisions
from edgekit.devices.sources.frames import Frame
from edgekit.messages import (
    BundleRef,
    EventMessage,
    Latency,
    PredictionMessage,
    StateMessage,
    Window,
    printable,
    timestamp,
)


class Result(NamedTuple):
    """``state`` where it changed. Without a prediction, labels only end."""

    prediction: PredictionMessage | None
    events: list[EventMessage]
    state: StateMessage | None


class Marks(NamedTuple):
    """When a frame was captured, taken up, preprocessed, inferred and decoded; s on the monotonic clock. ``ahead_s``:
    how long it was preprocessed before that."""

    captured_s: float
    started_s: float
    preprocessed_s: float
    inferred_s: float
    decoded_s: float
    ahead_s: float = 0.0

    def stages_s(self) -> tuple[float, float, float, float]:
        """Waiting, preprocessing, inference and decoding."""
        return (
            self.started_s - self.captured_s,
            self.preprocessed_s - self.started_s + self.ahead_s,
            self.inferred_s - self.preprocessed_s,
            self.decoded_s - self.inferred_s,
        )


def new_boot_id() -> str:
    return uuid.uuid4().hex[:12]


class Results:
    """Makes them, for one stream and one boot. One thread at a time may use it."""

    def __init__(self, device: str, stream: str, boot_id: str) -> None:
        self._device, self._stream, self.boot_id = device, stream, boot_id
        self.seq = 0
        self._class_id: int | None = -1  # of the state that was told
        self._captured_at = ""

    def take(self, bundle: Bundle, decisions: Decisions) -> None:
        """From now on they are of this bundle. What is held must have ended."""
        self._labels, self.decisions = bundle.labels, decisions
        self.bundle_ref = BundleRef(printable(bundle.name), bundle.version, bundle.file.sha256)

    def make(
        self,
        frame: Frame,
        scores: npt.NDArray[np.float32],
        predictions: list[Prediction],
        marks: Marks,
        delegate: str,
        clock_step_s: float,
    ) -> Result:
        """Of a frame whose classes have these ``scores``, (classes,), and of which ``predictions`` are named."""
        changes = self.decisions.update(scores)
        self.seq += 1
        _, preprocess_s, inference_s, _ = marks.stages_s()
        captured_at = self._captured_at = timestamp(frame.captured_at)
        prediction = PredictionMessage(
            schema="edgekit.prediction/1",
            id=f"{self.boot_id}-{self.seq}",
            boot_id=self.boot_id,
            seq=self.seq,
            device=self._device,
            stream=self._stream,
            captured_at=captured_at,
            replayed=False,
            bundle=self.bundle_ref,
            delegate=delegate,
            latency_ms=Latency(
                round(1e3 * preprocess_s, 3),
                round(1e3 * inference_s, 3),
                round(1e3 * (marks.decoded_s - marks.captured_s), 3),
            ),
            clock_step_s=round(clock_step_s, 3) if clock_step_s else None,
            window=Window(timestamp(frame.window_start), captured_at) if frame.window_start else None,
            input=frame.input,
            predictions=predictions,
        )
        events = [self._event(change, captured_at) for change in changes]
        return Result(prediction, events, self._state(self.decisions.current, captured_at))

    def end(self, *, state: bool) -> Result | None:
        """All that is held ends. ``state``: there is none any more; at the end of a run the device's status tells."""
        # not before the frame that made it begin: the time of a sound file runs ahead
        changes, now = self.decisions.end(), max(timestamp(datetime.now(timezone.utc)), self._captured_at)
        result = Result(
            None, [self._event(change, now) for change in changes], self._state(None, now) if state else None
        )
        return result if result.events or result.state else None

    def _event(self, change: Change, at: str) -> EventMessage:
        return EventMessage(
            schema="edgekit.event/1",
            event_id=change.event_id,
            event=change.event,
            boot_id=self.boot_id,
            device=self._device,
            stream=self._stream,
            at=at,
            class_id=change.class_id,
            label=self._labels[change.class_id],
            score=round(change.score, 6),
            replayed=False,
        )

    def _state(self, current: tuple[int, float] | None, at: str) -> StateMessage | None:
        class_id, score = current or (None, None)
        if class_id == self._class_id:
            return None
        self._class_id = class_id
        return StateMessage(
            schema="edgekit.state/1",
            captured_at=at,
            class_id=class_id,
            label=None if class_id is None else self._labels[class_id],
            score=None if score is None else round(score, 6),
        )

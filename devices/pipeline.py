"""The way of a frame: source -> preprocess -> invoke -> decode -> decide -> publish."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.decode import NotFiniteError, Threshold, thresholds, top
from edgekit.devices.decisions import Decisions
from edgekit.devices.frames import Frame, Source
from edgekit.devices.health import Recent, percentiles_ms
from edgekit.devices.interpreter import Model
from edgekit.devices.results import Marks, Result, Results, new_boot_id
from edgekit.errors import EdgekitError, InferenceError
from edgekit.manifest import AudioInput
from edgekit.messages import DelegateHealth, PredictionMessage, SnapshotImage, StreamHealth, StreamInfo, check_name

logger = logging.getLogger(__name__)

# The system's clock was set where it moved by so much more than the monotonic one: more than NTP slews in a second.
CLOCK_STEP_S, _SLEW = 0.5, 1e-3
# Failures of a live source are told so often at most.
_TELL_S = 10.0
# A change or the end of a pause is noticed within so long.
_NOTICE_S = 0.05
# Of the settings, those that a command may change on the way.
CHANGEABLE = frozenset({"threshold", "top_k", "max_fps"})


@dataclass
class Counts:
    """What became of the frames, or the windows of sound: ``captured = inferred + dropped + failed + in_flight``.

    ``gaps``: how often the source was lost, or sound before there was a window of it. ``paused``: how many of those
    dropped came in a pause. ``failures``: those failed, by cause.
    """

    captured: int = 0
    inferred: int = 0
    dropped: int = 0
    failed: int = 0
    gaps: int = 0
    paused: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return self.captured - self.inferred - self.dropped - self.failed

    def __add__(self, other: Counts) -> Counts:
        numbers = [getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)[:-1]]
        return Counts(*numbers, dict(Counter(self.failures) + Counter(other.failures)))

    def __str__(self) -> str:
        gaps = f", {self.gaps} gaps" if self.gaps else ""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.failures.items())
        failed = f"{self.failed} failed" + (f" ({causes})" if causes else "")
        return f"{self.captured} captured, {self.inferred} inferred, {self.dropped} dropped, {failed}{gaps}"


@dataclass(frozen=True)
class Settings:
    """What to do with the predictions; arguments as :func:`run`, checked here."""

    device_id: str
    stream: str = "main"
    threshold: Threshold = 0.0
    top_k: int = 3
    max_fps: float | None = None
    smoothing: int = 1
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        check_name(self.device_id, "device id")
        check_name(self.stream, "stream")
        for score in self.threshold.values() if isinstance(self.threshold, Mapping) else (self.threshold,):
            if not 0 <= score <= 1:
                raise EdgekitError("threshold", expected="a score from 0 to 1", got=str(score), mend="give one")
        if not 1 <= self.top_k < 2**31:
            raise EdgekitError("top-k", expected="1 or more", got=str(self.top_k), mend="give how many classes to name")
        if self.max_fps is not None and not 0.001 <= self.max_fps < math.inf:
            raise EdgekitError(
                "max-fps", expected="0.001 or more", got=str(self.max_fps), mend="leave it out to take every frame"
            )


class Pipeline:
    """What comes of the frames of one source, by way of one model, numbered, as an iterator.

    One thread iterates. Others may pause it, change its settings or its model, which takes effect between two frames,
    and ask for a snapshot or its health.

    Raises:
        EdgekitError: the settings do not fit the model: a label or ``max_fps``.
    """

    def __init__(self, model: Model, source: Source, settings: Settings, boot_id: str | None = None) -> None:
        self.source = source
        self._results = Results(settings.device_id, settings.stream, boot_id or new_boot_id())
        self.paused = False
        # One attribute, so that the thread that iterates finds either all of a change or nothing.
        self._in_force = settings, self._limits(settings, model)
        self._lock = threading.Lock()
        self._next: tuple[Model, Settings, npt.NDArray[np.float32]] | None = None
        self._paused_frames = self._clock_steps = 0
        self._failures: dict[str, int] = {}
        self._cold = False  # the model has not heard a whole window since a pause
        self._newest: Frame | None = None
        self._prediction: PredictionMessage | None = None
        self._clock = math.nan, 0.0  # how far the system's clock is ahead, and when that was
        self._clock_step_s = 0.0  # what no prediction has told yet
        self.recent = Recent()
        self._told_s, self._untold = -math.inf, 0  # when a failure was told, and how many were not
        self._take(model)

    def _take(self, model: Model) -> None:
        self.model = model
        settings, limits = self._decided_by = self._in_force
        decisions = Decisions(model.bundle.output, limits, smoothing=settings.smoothing, hysteresis=settings.hysteresis)
        self._results.take(model.bundle, decisions)

    @property
    def settings(self) -> Settings:
        return self._in_force[0]

    @property
    def counts(self) -> Counts:
        inferred, failures, paused = self._results.seq, self._failures.copy(), self._paused_frames
        dropped = self.source.dropped + paused
        # the last to be read: a frame is counted here first, so that none in flight is less than none
        captured = self.source.captured
        return Counts(captured, inferred, dropped, sum(failures.values()), self.source.gaps, paused, failures)

    def pause(self) -> None:
        """Predicts no more until :meth:`resume`: a live source goes on and is not looked at, a file waits."""
        if not self.paused:
            logger.info("paused")
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            logger.info("resumed")
        self.paused = False

    def change(self, **changes: Any) -> Settings:
        """Changes ``threshold``, ``top_k`` or ``max_fps``; the settings as they are then.

        Raises:
            EdgekitError: one of them is wrong, and nothing was changed.
        """
        if unknown := changes.keys() - CHANGEABLE:
            raise EdgekitError(
                f"setting {min(unknown)}", expected=" or ".join(sorted(CHANGEABLE)), mend="start it again to change it"
            )
        self.adopt(dataclasses.replace(self.settings, **changes))
        logger.info("changed: %s", ", ".join(f"{name}={value}" for name, value in changes.items()))
        return self.settings

    def adopt(self, settings: Settings) -> None:
        """From the next frame on these are in force.

        Raises:
            EdgekitError: they do not fit the model, and nothing was changed.
        """
        with self._lock:
            if self._next:
                model = self._next[0]
                self._next = model, settings, self._limits(settings, model)
            else:
                self._in_force = settings, self._limits(settings, self.model)

    def replace(self, model: Model, settings: Settings) -> None:
        """From the next frame on it is this model that predicts, with these settings; the one before is closed then.

        Raises:
            EdgekitError: they do not fit each other, and nothing was changed.
        """
        limits = self._limits(settings, model)
        with self._lock:
            waiting, self._next = self._next, (model, settings, limits)
        if waiting:
            waiting[0].close()

    def close(self) -> None:
        """Frees the model, and the one that was to come."""
        self.model.close()
        if self._next:
            self._next[0].close()

    def snapshot(self) -> SnapshotImage:
        """The newest frame, and the newest prediction.

        Raises:
            EdgekitError: there is none yet, or the source gives sound.
        """
        if isinstance(self.model.bundle.input, AudioInput):
            raise EdgekitError("snapshot: this stream is of sound", mend="ask one of images")
        if self._newest is None:
            raise EdgekitError("snapshot: there was no frame yet", mend="ask again")
        from edgekit.devices.snapshot import snapshot  # with OpenCV, of which sound has no need

        return snapshot(self._newest, self._prediction)

    def health(self) -> StreamHealth:
        counts, model = self.counts, self.model
        return StreamHealth(
            captured=counts.captured,
            inferred=counts.inferred,
            dropped={"behind": counts.dropped - counts.paused, "paused": counts.paused},
            failed=counts.failed,
            failures=counts.failures,
            in_flight=counts.in_flight,
            gaps=counts.gaps,
            lost=self.source.lost,
            clock_steps=self._clock_steps,
            fps=self.recent.fps(),
            latency_ms=percentiles_ms(self.recent.total_s()),
            stages_ms=self.recent.stages_ms(),
            delegate=DelegateHealth(
                requested=model.requested_delegate,
                active=model.delegate,
                operators_delegated=model.operators_delegated,
                operators=model.operators,
            ),
        )

    def info(self) -> StreamInfo:
        return StreamInfo(
            self._results.bundle_ref, self.model.delegate, self.source.name, self.model.requested_delegate
        )

    def _limits(self, settings: Settings, model: Model) -> npt.NDArray[np.float32]:
        """The lowest score of each class that is named, (classes,).

        Raises:
            EdgekitError: the settings do not fit the model.
        """
        given = model.bundle.input
        if settings.max_fps and self.source.live and isinstance(given, AudioInput) and given.streaming:
            needed = given.sample_rate_hz / given.hop_samples
            if settings.max_fps < needed:
                raise EdgekitError(
                    "max-fps",
                    expected=f"{needed:.2f} or more, as a model that streams must hear all",
                    got=f"{settings.max_fps:g}",
                    mend="leave it out",
                )
        return thresholds(settings.threshold, model.bundle.labels)

    def __iter__(self) -> Iterator[Result]:
        due_s = self._wait_until_due(-math.inf)
        for frame in self.source:
            if self._next:
                yield from self._ended(state=True)
                self._swap()
            if frame.image_bgr is not None:
                self._newest = frame
            if self.paused and self.source.live:
                self._paused_frames += frame.complete
                self.model.reset()
                self._cold = True
                yield from self._ended(state=True)
                continue
            result = self._predict(frame)
            if result is not None:
                self._prediction = result.prediction
                given_s = time.monotonic()
                yield result
                self.recent.published(time.monotonic() - given_s)
            due_s = self._wait_until_due(due_s)
        yield from self._ended(state=False)

    def _ended(self, *, state: bool) -> Iterator[Result]:
        if result := self._results.end(state=state):
            yield result

    def _swap(self) -> None:
        before = self.model
        with self._lock:
            assert self._next
            after, settings, limits = self._next
            self._next, self._in_force = None, (settings, limits)
        self._take(after)
        self._cold = False
        before.close()
        logger.info("from now on bundle %s %s", after.bundle.name, after.bundle.version)

    def _wait_until_due(self, last_due_s: float) -> float:
        """Waits for the time of the next frame, and of a file for the end of a pause; when that was, or is."""
        began_s = time.perf_counter()
        while True:
            max_fps = self.settings.max_fps
            due_s = max(last_due_s + 1 / max_fps, began_s) if max_fps else began_s
            wait_s = min(due_s - time.perf_counter(), _NOTICE_S)
            if self.paused:
                if self.source.live:
                    return due_s
                wait_s = _NOTICE_S
            if wait_s <= 0 or self.source.stop.wait(wait_s):
                return due_s

    def _predict(self, frame: Frame) -> Result | None:
        model, (settings, limits) = self.model, self._in_force
        self._watch_clock(frame)
        if frame.begins:
            model.reset()
        if frame.error:
            return self._fail(frame, "unreadable", frame.error)
        started_s = time.monotonic()
        try:
            tensor = (
                model.preprocess(frame.samples) if frame.image_bgr is None else model.preprocess(frame.image_bgr, "bgr")
            )
            preprocessed_s = time.monotonic()
            raw = model.invoke(tensor)
            inferred_s = time.monotonic()
        except InferenceError as error:
            return self._fail(frame, error.cause, str(error))
        if not frame.complete:  # a stream that warms up
            return None
        if not model.warm:  # it began anew because of a pause, or of a failure, which was told
            if self._cold:
                self._paused_frames += 1
            else:
                self._count_failure("warming up")
            return None
        self._cold = False
        try:
            scores = model.scores(raw)
        except NotFiniteError as error:
            model.reset()
            return self._fail(frame, "not finite", str(error))
        predictions = top(scores, model.bundle.labels, limits, settings.top_k)
        if self._in_force is not self._decided_by:
            self._decided_by = self._in_force
            decisions = self._results.decisions
            decisions.limits, decisions.smoothing, decisions.hysteresis = (
                limits,
                settings.smoothing,
                settings.hysteresis,
            )
        marks = Marks(frame.captured_s, started_s, preprocessed_s, inferred_s, time.monotonic())
        result = self._results.make(frame, scores, predictions, marks, model.delegate, self._clock_step_s)
        self._clock_step_s = 0.0
        self.recent.add(*marks)
        return result

    def _watch_clock(self, frame: Frame) -> None:
        (before_s, at_s), self._clock = self._clock, (frame.clock_offset_s, frame.captured_s)
        step_s = frame.clock_offset_s - before_s  # NaN with the first frame, which is no step
        if abs(step_s) > CLOCK_STEP_S + _SLEW * (frame.captured_s - at_s):
            self._clock_steps += 1
            self._clock_step_s += step_s
            logger.warning("the system's clock was set by %+.1f s", step_s)

    def _count_failure(self, cause: str) -> None:
        self._failures[cause] = self._failures.get(cause, 0) + 1

    def _fail(self, frame: Frame, cause: str, reason: str) -> None:
        if frame.complete:
            self._count_failure(cause)
        if self.source.live and frame.captured_s - self._told_s < _TELL_S:  # a log is not to fill the disk
            self._untold += 1
            return
        more = f" (and {self._untold} before it)" if self._untold else ""
        self._told_s, self._untold = frame.captured_s, 0
        logger.warning("%s skipped: %s%s", "frame" if frame.window_start is None else "sound", reason, more)

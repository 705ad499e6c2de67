"""The way of a frame: source -> preprocess -> invoke -> decode -> decide -> publish."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit.decode import NotFiniteError, thresholds, top
from edgekit.devices.config import StreamConfig, check_stream
from edgekit.devices.counts import Counts
from edgekit.devices.decisions import Decisions
from edgekit.devices.health import Recent, percentiles_ms
from edgekit.devices.interpreter import Model
from edgekit.devices.results import Marks, Result, Results, new_boot_id
from edgekit.devices.sources.frames import Frame, Source
from edgekit.errors import EdgekitError, InferenceError
from edgekit.manifest import AudioInput
from edgekit.messages import DelegateHealth, PredictionMessage, SnapshotImage, StreamHealth, StreamInfo

logger = logging.getLogger(__name__)

# The system's clock was set where it moved by so much more than the monotonic one: more than NTP slews in a second.
CLOCK_STEP_S, _SLEW = 0.5, 1e-3
# At most one line every 60 s names a failure of a live source; of a file source, after this many files that are named.
_TELL_S, _FAILED_FILES = 60.0, 20
# A change or the end of a pause is noticed within so long.
_NOTICE_S = 0.05
# Of the settings, those that a command may change on the way.
CHANGEABLE = frozenset({"threshold", "top_k", "max_fps"})


class Pipeline:
    """What comes of the frames of one source, by way of one model, numbered, as an iterator.

    One thread iterates. Others may pause it, change its settings or its model, which takes effect between two frames,
    and ask for a snapshot or its health.

    Raises:
        EdgekitError: the settings do not fit the model: a label or ``max_fps``.
    """

    def __init__(
        self, model: Model, source: Source, config: StreamConfig, device_id: str, boot_id: str | None = None
    ) -> None:
        self.source, self.device_id = source, device_id
        self._results = Results(device_id, config.name, boot_id or new_boot_id())
        self.paused = False
        # One attribute, so that the thread that iterates finds either all of a change or nothing.
        self._in_force = config, self.check(config, model)
        self._lock, self._closed = threading.RLock(), False
        # What is in force from the next frame on.
        self._next: tuple[Model, StreamConfig, npt.NDArray[np.float32]] | None = None
        self._paused_frames = self._clock_steps = 0
        self._failures: dict[str, int] = {}
        self._cold = False  # the model has not heard a whole window since a pause
        self._newest: Frame | None = None
        self._prediction: PredictionMessage | None = None
        self._clock = math.nan, 0.0  # how far the system's clock is ahead, and when that was
        self._clock_step_s = 0.0  # what no prediction has told yet
        self.recent = Recent()
        self._failed_lines = 0
        self._told_s, self._untold = -math.inf, 0  # when a failure was told, and how many were not
        self._take(model)

    def _take(self, model: Model) -> None:
        self.model = model
        config, limits = self._decided_by = self._in_force
        decisions = Decisions(model.bundle.output, limits, smoothing=config.smoothing, hysteresis=config.hysteresis)
        self._results.take(model.bundle, decisions)

    @property
    def config(self) -> StreamConfig:
        """The settings in force, or those that are to be."""
        following = self._next
        return following[1] if following else self._in_force[0]

    @property
    def newest(self) -> Model:
        """The model in use, or the one that is to be."""
        following = self._next
        return following[0] if following else self.model

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
            logger.info("stream %s: paused", self.config.name)
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            logger.info("stream %s: resumed", self.config.name)
        self.paused = False

    def change(self, **changes: Any) -> StreamConfig:
        """Changes ``threshold``, ``top_k`` or ``max_fps``; the settings as they are then.

        Raises:
            EdgekitError: one of them is wrong, and nothing was changed.
        """
        if unknown := changes.keys() - CHANGEABLE:
            raise EdgekitError(
                f"setting {min(unknown)}", expected=" or ".join(sorted(CHANGEABLE)), mend="start it again to change it"
            )
        with self._lock:
            self.adopt(msgspec.structs.replace(self.config, **changes))
        logger.info(
            "stream %s: changed %s", self.config.name, ", ".join(f"{name}={value}" for name, value in changes.items())
        )
        return self.config

    def adopt(self, config: StreamConfig | None = None, model: Model | None = None) -> None:
        """From the next frame on these settings are in force, or those that are now, and with a ``model`` it is this
        one that predicts; the one before is closed then.

        Raises:
            EdgekitError: they do not fit the model, and nothing was changed.
        """
        with self._lock:
            config = config or self.config
            waiting = self._next[0] if self._next else None
            limits = self.check(config, model)
            if after := model or waiting:
                self._next = after, config, limits
            else:
                self._in_force = config, limits
            unused = after if self._closed else waiting if model else None
        if unused:
            unused.close()

    def close(self) -> None:
        """Frees source and model."""
        self.source.close()
        self.close_model()

    def close_model(self) -> None:
        """Frees the model, and the one that was to come, from any thread: a call under way fails where it can be
        ended."""
        with self._lock:
            self._closed, models = True, {self.model, self.newest}
        for model in models:
            model.close()

    def snapshot(self) -> SnapshotImage:
        """The newest frame, and the newest prediction.

        Raises:
            EdgekitError: there is none yet, or the source gives sound.
        """
        if isinstance(self.model.bundle.input, AudioInput):
            raise EdgekitError("snapshot: this stream is of sound", mend="ask one of images")
        if self._newest is None:
            raise EdgekitError("snapshot: there was no frame yet", mend="ask again")
        from edgekit.devices.publish.snapshot import snapshot  # with OpenCV, of which sound has no need

        return snapshot(self._newest, self._prediction)

    def health(self) -> StreamHealth:
        counts, model = self.counts, self.model
        return StreamHealth(
            captured=counts.captured,
            inferred=counts.inferred,
            dropped=counts.dropped_by_cause,
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

    def check(self, config: StreamConfig, model: Model | None = None) -> npt.NDArray[np.float32]:
        """The lowest score of each class that is named, (classes,), with these settings and the newest model, or with
        another one.

        Raises:
            EdgekitError: they do not fit the model, or a value is out of its range.
        """
        model = model or self.newest
        check_stream(config)
        given = model.bundle.input
        if config.max_fps and self.source.live and isinstance(given, AudioInput) and given.streaming:
            needed = given.sample_rate_hz / given.hop_samples
            if config.max_fps < needed:
                raise EdgekitError(
                    "max_fps",
                    expected=f"{needed:.2f} or more, as a model that streams must hear all",
                    got=f"{config.max_fps:g}",
                    mend="leave it out",
                )
        return thresholds(config.threshold, model.bundle.labels)

    def __iter__(self) -> Iterator[Result]:
        due_s = self._wait_until_due(-math.inf)
        for frame in self.source:
            if self._next:
                yield from self._ended()
                self._swap()
            if frame.begins:  # what was held before the gap may have ended in it
                yield from self._ended()
            if frame.image_bgr is not None:
                self._newest = frame
            if self.paused and self.source.live:
                self._paused_frames += frame.complete
                if not self._cold:
                    self.model.reset()
                    self._cold = True
                yield from self._ended()
                continue
            result = self._predict(frame)
            if result is not None:
                self._prediction = result.prediction
                given_s = time.monotonic()
                yield result
                self.recent.published(time.monotonic() - given_s)
            due_s = self._wait_until_due(due_s)

    def end(self, *, state: bool) -> Result | None:
        """All that is held ends, as after the last frame. ``state``: nothing is held any more, and that is told too."""
        return self._results.end(state=state)

    def _ended(self) -> Iterator[Result]:
        if result := self.end(state=True):
            yield result

    def _swap(self) -> None:
        with self._lock:
            assert self._next
            before, (after, config, limits) = self.model, self._next
            self._in_force = config, limits
            self._take(after)
            self._next = None
        self._cold = False
        before.close()
        logger.info("from now on bundle %s %s", after.bundle.name, after.bundle.version)

    def _wait_until_due(self, last_due_s: float) -> float:
        """Waits for the time of the next frame, and of a file for the end of a pause; when that was, or is."""
        began_s = time.perf_counter()
        while True:
            max_fps = self.config.max_fps
            due_s = max(last_due_s + 1 / max_fps, began_s) if max_fps else began_s
            wait_s = min(due_s - time.perf_counter(), _NOTICE_S)
            if self.paused:
                if self.source.live:
                    return due_s
                wait_s = _NOTICE_S
            if wait_s <= 0 or self.source.stop.wait(wait_s):
                return due_s

    def _predict(self, frame: Frame) -> Result | None:
        model, (config, limits) = self.model, self._in_force
        self._watch_clock(frame)
        if frame.begins:
            model.reset()
        if frame.error:
            self._fail(frame, "unreadable", frame.error)
            return None
        started_s, preprocess, ahead_s = time.monotonic(), model.preprocess, 0.0
        try:
            if frame.prepared and frame.prepared.by is preprocess:
                tensor, _, ahead_s = frame.prepared
            elif frame.image_bgr is None:
                tensor = preprocess(frame.samples)
            else:
                tensor = preprocess(frame.image_bgr, "bgr")
                self.source.prepare = preprocess
            preprocessed_s = time.monotonic()
            raw = model.invoke(tensor)
            inferred_s = time.monotonic()
        except InferenceError as error:
            self._fail(frame, error.cause, str(error))
            return None
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
            self._fail(frame, "not finite", str(error))
            return None
        predictions = top(scores, model.bundle.labels, limits, config.top_k)
        if self._in_force is not self._decided_by:
            self._decided_by = self._in_force
            decisions = self._results.decisions
            decisions.limits, decisions.smoothing, decisions.hysteresis = (
                limits,
                config.smoothing,
                config.hysteresis,
            )
        marks = Marks(frame.captured_s, started_s, preprocessed_s, inferred_s, time.monotonic(), ahead_s)
        result = self._results.make(frame, scores, predictions, marks, model.delegate, self._clock_step_s)
        self._clock_step_s = 0.0
        self.recent.add(marks)
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
        self._failed_lines += 1
        # Each file is named, but a folder that is looped, or a camera, is not to fill the disk with its log.
        is_limited = self.source.live or self._failed_lines > _FAILED_FILES
        if is_limited and frame.captured_s - self._told_s < _TELL_S:
            self._untold += 1
            return
        more = f" (and {self._untold} before it)" if self._untold else ""
        self._told_s, self._untold = frame.captured_s, 0
        logger.warning("%s skipped: %s%s", "frame" if frame.window_start is None else "sound", reason, more)

"""The way of a frame: source -> preprocess -> invoke -> decode -> publish."""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import edgekit
from edgekit import runtimes
from edgekit.decode import NotFiniteError, Threshold, thresholds
from edgekit.devices.frames import Frame, Source
from edgekit.devices.health import Recent, cpu_temp_c, rss_bytes
from edgekit.devices.interpreter import Model
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput
from edgekit.messages import (
    BundleRef,
    DelegateHealth,
    HealthMessage,
    InfoMessage,
    Latency,
    PredictionMessage,
    SnapshotImage,
    SpoolHealth,
    StreamInfo,
    Versions,
    Window,
    check_name,
    printable,
    timestamp,
)

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the frames, or the windows of sound: ``captured = inferred + dropped + failed + in_flight``.

    ``gaps``: how often sound was lost before there was a window of it. ``paused``: how many of those dropped came in a
    pause.
    """

    captured: int = 0
    inferred: int = 0
    dropped: int = 0
    failed: int = 0
    gaps: int = 0
    paused: int = 0

    @property
    def in_flight(self) -> int:
        return self.captured - self.inferred - self.dropped - self.failed

    def __str__(self) -> str:
        gaps = f", {self.gaps} gaps" if self.gaps else ""
        return f"{self.captured} captured, {self.inferred} inferred, {self.dropped} dropped, {self.failed} failed{gaps}"


@dataclass(frozen=True)
class Settings:
    """What to do with the predictions; arguments as :func:`run`, checked here."""

    device_id: str
    stream: str = "main"
    threshold: Threshold = 0.0
    top_k: int = 3
    max_fps: float | None = None

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


# A change or the end of a pause is noticed within so long.
_NOTICE_S = 0.05
# Of the settings, those that may be changed on the way.
CHANGEABLE = frozenset({"threshold", "top_k", "max_fps"})


class Pipeline:
    """Predictions of one model on one source, numbered, as an iterator.

    One thread iterates. Another may pause it, change its settings, which takes effect between two frames, and ask for a
    snapshot or its health.

    Raises:
        EdgekitError: the settings do not fit the model: a label or ``max_fps``.
    """

    def __init__(self, model: Model, source: Source, settings: Settings) -> None:
        self.model, self.source = model, source
        self.boot_id = uuid.uuid4().hex[:12]
        self.bundle_ref = BundleRef(printable(model.bundle.name), model.bundle.version, model.bundle.file.sha256)
        self.paused = False
        # One attribute, so that the thread that iterates finds either all of a change or nothing.
        self._in_force = settings, self._limits(settings)
        self._inferred = self._failed = self._paused_frames = 0
        self._cold = False  # the model has not heard a whole window since a pause
        self._newest: Frame | None = None
        self._prediction: PredictionMessage | None = None
        self._recent = Recent()

    @property
    def settings(self) -> Settings:
        return self._in_force[0]

    @property
    def counts(self) -> Counts:
        inferred, failed, paused = self._inferred, self._failed, self._paused_frames
        dropped = self.source.dropped + paused
        # the last to be read: a frame is counted here first, so that none in flight is less than none
        return Counts(self.source.captured, inferred, dropped, failed, self.source.gaps, paused)

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
        settings = dataclasses.replace(self.settings, **changes)
        self._in_force = settings, self._limits(settings)
        logger.info("changed: %s", ", ".join(f"{name}={value}" for name, value in changes.items()))
        return settings

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

    def health(self, spool: SpoolHealth) -> HealthMessage:
        """How it fares. ``spool`` is what the publisher knows."""
        counts, model = self.counts, self.model
        return HealthMessage(
            schema="edgekit.health/1",
            captured=counts.captured,
            inferred=counts.inferred,
            dropped={"behind": counts.dropped - counts.paused, "paused": counts.paused},
            failed=counts.failed,
            in_flight=counts.in_flight,
            fps=self._recent.fps(),
            latency_ms=self._recent.percentiles_ms(),
            spool=spool,
            delegate=DelegateHealth(
                requested=model.requested_delegate,
                active=model.delegate,
                # which of them XNNPACK takes no runtime tells
                operators_delegated=None,
                operators=len(model.bundle.file.model.operators),
            ),
            cpu_temp_c=cpu_temp_c(),
            rss_bytes=rss_bytes(),
            uptime_s=self._recent.uptime_s(),
        )

    def _limits(self, settings: Settings) -> npt.NDArray[np.float32]:
        """The lowest score of each class that is named, (classes,).

        Raises:
            EdgekitError: the settings do not fit the model.
        """
        given = self.model.bundle.input
        if settings.max_fps and self.source.live and isinstance(given, AudioInput) and given.streaming:
            needed = given.sample_rate_hz / given.hop_samples
            if settings.max_fps < needed:
                raise EdgekitError(
                    "max-fps",
                    expected=f"{needed:.2f} or more, as a model that streams must hear all",
                    got=f"{settings.max_fps:g}",
                    mend="leave it out",
                )
        return thresholds(settings.threshold, self.model.bundle.labels)

    def info(self) -> InfoMessage:
        runtime_version = runtimes.installed().get(self.model.runtime, "")
        return InfoMessage(
            schema="edgekit.info/1",
            device=self.settings.device_id,
            boot_id=self.boot_id,
            profile=platform.machine(),
            versions=Versions(
                edgekit.__version__, platform.python_version(), f"{self.model.runtime} {runtime_version}".strip()
            ),
            streams={self.settings.stream: StreamInfo(self.bundle_ref, self.model.delegate, self.source.name)},
        )

    def __iter__(self) -> Iterator[PredictionMessage]:
        due_s = self._wait_until_due(-math.inf)
        for frame in self.source:
            if frame.image_bgr is not None:
                self._newest = frame
            if self.paused and self.source.live:
                self._paused_frames += frame.complete
                self.model.reset()
                self._cold = True
                continue
            message = self._predict(frame)
            if message is not None:
                self._prediction = message
                self._recent.add(message.latency_ms.total)
                yield message
            due_s = self._wait_until_due(due_s)

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

    def _predict(self, frame: Frame) -> PredictionMessage | None:
        model, (settings, limits) = self.model, self._in_force
        if frame.begins:
            model.reset()
        if frame.error:
            self._fail(frame, frame.error)
            return None
        started_s = time.monotonic()
        tensor = (
            model.preprocess(frame.samples) if frame.image_bgr is None else model.preprocess(frame.image_bgr, "bgr")
        )
        preprocessed_s = time.monotonic()
        raw = model.invoke(tensor)
        inferred_s = time.monotonic()
        if not frame.complete:  # a stream that warms up
            return None
        if not model.warm:  # it began anew because of a pause, or of a failure, which was told
            self._paused_frames += self._cold
            self._failed += not self._cold
            return None
        self._cold = False
        try:
            predictions = model.decode(raw, threshold=limits, top_k=settings.top_k)
        except NotFiniteError as error:
            model.reset()
            self._fail(frame, str(error))
            return None
        self._inferred += 1
        return PredictionMessage(
            schema="edgekit.prediction/1",
            id=f"{self.boot_id}-{self._inferred}",
            boot_id=self.boot_id,
            seq=self._inferred,
            device=settings.device_id,
            stream=settings.stream,
            captured_at=timestamp(frame.captured_at),
            replayed=False,
            bundle=self.bundle_ref,
            delegate=model.delegate,
            latency_ms=Latency(
                round(1e3 * (preprocessed_s - started_s), 3),
                round(1e3 * (inferred_s - preprocessed_s), 3),
                round(1e3 * (time.monotonic() - frame.captured_s), 3),
            ),
            window=Window(timestamp(frame.window_start), timestamp(frame.captured_at)) if frame.window_start else None,
            input=frame.input,
            predictions=predictions,
        )

    def _fail(self, frame: Frame, reason: str) -> None:
        self._failed += frame.complete
        logger.warning("%s skipped: %s", "frame" if frame.window_start is None else "sound", reason)

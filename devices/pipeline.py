"""The way of a frame: source -> preprocess -> invoke -> decode -> publish."""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import edgekit
from edgekit import runtimes
from edgekit.bundle import read
from edgekit.decode import NotFiniteError
from edgekit.devices.interpreter import Model
from edgekit.devices.publisher import Publisher
from edgekit.devices.sources import Frame, Source, open_source
from edgekit.embedded_broker import EmbeddedBroker, is_embedded
from edgekit.errors import EdgekitError
from edgekit.messages import (
    BundleRef,
    InfoMessage,
    Latency,
    PredictionMessage,
    StreamInfo,
    Versions,
    check_name,
    default_device_id,
    printable,
    timestamp,
)
from edgekit.mqtt import parse_broker

logger = logging.getLogger(__name__)

# How long a finite source waits for the embedded broker's first subscriber.
SUBSCRIBER_TIMEOUT_S = 10.0


@dataclass
class Counts:
    """What became of the frames: ``captured = inferred + dropped + failed + in_flight``."""

    captured: int = 0
    inferred: int = 0
    dropped: int = 0
    failed: int = 0

    @property
    def in_flight(self) -> int:
        return self.captured - self.inferred - self.dropped - self.failed

    def __str__(self) -> str:
        return f"{self.captured} captured, {self.inferred} inferred, {self.dropped} dropped, {self.failed} failed"


@dataclass(frozen=True)
class Settings:
    """What to do with the predictions; arguments as :func:`run`, checked here."""

    device_id: str
    stream: str = "main"
    threshold: float = 0.0
    top_k: int = 3
    max_fps: float | None = None

    def __post_init__(self) -> None:
        check_name(self.device_id, "device id")
        check_name(self.stream, "stream")
        if not 0 <= self.threshold <= 1:
            raise EdgekitError("threshold", expected="a score from 0 to 1", got=str(self.threshold), mend="give one")
        if self.top_k < 1:
            raise EdgekitError("top-k", expected="1 or more", got=str(self.top_k), mend="give how many classes to name")
        if self.max_fps is not None and not 0.001 <= self.max_fps < math.inf:
            raise EdgekitError(
                "max-fps", expected="0.001 or more", got=str(self.max_fps), mend="leave it out to take every frame"
            )


class Pipeline:
    """Predictions of one model on one source, numbered, as an iterator."""

    def __init__(self, model: Model, source: Source, settings: Settings) -> None:
        self.model, self.source, self.settings = model, source, settings
        self.boot_id = uuid.uuid4().hex[:12]
        self.bundle_ref = BundleRef(printable(model.bundle.name), model.bundle.version, model.bundle.file.sha256)
        self._inferred = self._failed = 0

    @property
    def counts(self) -> Counts:
        return Counts(self.source.captured, self._inferred, self.source.dropped, self._failed)

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
        period_s = 1 / self.settings.max_fps if self.settings.max_fps else 0.0
        next_s = time.perf_counter()
        for frame in self.source:
            message = self._predict(frame)
            if message is not None:
                yield message
            if period_s:
                next_s = max(next_s + period_s, time.perf_counter())
                self.source.stop.wait(next_s - time.perf_counter())

    def _predict(self, frame: Frame) -> PredictionMessage | None:
        model = self.model
        if frame.image_bgr is None:
            self._fail(frame.error)
            return None
        started_s = time.perf_counter()
        tensor = model.preprocess(frame.image_bgr, "bgr")
        preprocessed_s = time.perf_counter()
        raw = model.invoke(tensor)
        inferred_s = time.perf_counter()
        try:
            predictions = model.decode(raw, threshold=self.settings.threshold, top_k=self.settings.top_k)
        except NotFiniteError as error:
            self._fail(str(error))
            return None
        self._inferred += 1
        return PredictionMessage(
            schema="edgekit.prediction/1",
            id=f"{self.boot_id}-{self._inferred}",
            boot_id=self.boot_id,
            seq=self._inferred,
            device=self.settings.device_id,
            stream=self.settings.stream,
            captured_at=timestamp(frame.captured_at),
            replayed=False,
            bundle=self.bundle_ref,
            delegate=model.delegate,
            latency_ms=Latency(
                round(1e3 * (preprocessed_s - started_s), 3),
                round(1e3 * (inferred_s - preprocessed_s), 3),
                round(1e3 * (time.perf_counter() - frame.captured_s), 3),
            ),
            input=frame.input,
            predictions=predictions,
        )

    def _fail(self, reason: str) -> None:
        self._failed += 1
        logger.warning("frame skipped: %s", reason)


def stream(
    bundle: str | os.PathLike[str],
    source: str,
    *,
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str = "auto",
    threads: int = 1,
    threshold: float = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    loop: bool = False,
) -> Iterator[PredictionMessage]:
    """The predictions of ``bundle`` on ``source``, one by one, published nowhere. Otherwise as :func:`run`."""
    settings = Settings(default_device_id() if device_id is None else device_id, stream, threshold, top_k, max_fps)
    of_bundle = read(bundle, labels)
    with (
        open_source(source, loop=loop) as frames,
        Model(of_bundle, delegate=delegate, threads=threads) as model,
    ):
        yield from Pipeline(model, frames, settings)


def run(
    bundle: str | os.PathLike[str],
    source: str,
    *,
    broker: str = "mqtt://localhost",
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str = "auto",
    threads: int = 1,
    threshold: float = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    loop: bool = False,
    stop: threading.Event | None = None,
    on_start: Callable[[], None] | None = None,
    on_prediction: Callable[[PredictionMessage], None] | None = None,
) -> Counts:
    """Streams ``source`` through ``bundle`` and publishes the predictions, to the end of the source.

    Args:
        bundle: any classification ``.tflite``.
        source: ``camera:N``, ``rtsp://…``, ``http://…`` (MJPEG), or the path of a video, an image or a folder of
            images.
        broker: ``mqtt://[user:pass@]host[:port]``, ``mqtts://…``, ``embedded`` (a broker in this process, on
            127.0.0.1:1883) or ``none``.
        labels: a label file to use instead of the packed one.
        device_id: this device's name in the topics; the host's name by default.
        stream: this stream's name in the topics.
        delegate: ``auto`` or ``cpu``.
        threads: threads of the CPU kernels.
        threshold: leave out classes with a lower score.
        top_k: name so many classes at most.
        max_fps: take no more frames a second.
        loop: start a file source again at its end.
        stop: ends the run when set.
        on_start: called when all is open, before the first frame.
        on_prediction: called with each prediction as well.

    Returns:
        What became of the frames.

    Raises:
        EdgekitError: the bundle, the source or the broker cannot be used as asked.
    """
    stop = stop or threading.Event()
    settings = Settings(default_device_id() if device_id is None else device_id, stream, threshold, top_k, max_fps)
    of_bundle = read(bundle, labels)
    with ExitStack() as stack:
        frames = stack.enter_context(open_source(source, loop=loop, stop=stop))
        model = stack.enter_context(Model(of_bundle, delegate=delegate, threads=threads))
        pipeline = Pipeline(model, frames, settings)
        sinks = [on_prediction] if on_prediction else []
        if broker != "none":
            embedded = stack.enter_context(EmbeddedBroker(broker)) if is_embedded(broker) else None
            address = embedded.address if embedded else parse_broker(broker)
            publisher = stack.enter_context(Publisher(address, pipeline.info(), stream, stop))
            sinks.append(publisher.prediction)
            if embedded and not frames.live:
                logger.info("%s is open; waiting up to %g s for a subscriber", address, SUBSCRIBER_TIMEOUT_S)
                if not embedded.wait_for_subscriber(SUBSCRIBER_TIMEOUT_S, stop):
                    logger.warning("no subscriber came; going on without")
        if on_start:
            on_start()
        try:
            for message in pipeline:
                for sink in sinks:
                    sink(message)
        finally:
            logger.info("%s", pipeline.counts)
    return pipeline.counts

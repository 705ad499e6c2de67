"""One stream: a source and a model, joined by a pipeline that has a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import msgspec

from edgekit import bundle as bundles
from edgekit.bundle import Bundle
from edgekit.decode import thresholds
from edgekit.devices.config import StreamConfig
from edgekit.devices.frames import Source
from edgekit.devices.pipeline import Pipeline
from edgekit.devices.profiles import Profile
from edgekit.devices.results import Result
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput

logger = logging.getLogger(__name__)


def read_bundle(config: StreamConfig) -> Bundle:
    """The bundle of a stream, with a hop of another length if told so.

    Raises:
        EdgekitError: it cannot be read, or the configuration does not fit it.
    """
    bundle = bundles.read(config.bundle, config.labels)
    thresholds(config.threshold, bundle.labels)
    if config.hop_s is None:
        return bundle
    given = bundle.input
    if not isinstance(given, AudioInput) or given.streaming:
        kind = "streams sound by hops of its own" if isinstance(given, AudioInput) else "takes images"
        raise EdgekitError(
            "hop", expected="a bundle that takes windows of sound", got=f"one that {kind}", mend="leave it out"
        )
    hop_samples = max(1, round(config.hop_s * given.sample_rate_hz))
    return dataclasses.replace(bundle, input=msgspec.structs.replace(given, hop_samples=hop_samples))


def open_source(
    config: StreamConfig, bundle: Bundle, profile: Profile, stop: threading.Event, *, patient: bool
) -> Source:
    """The source, of what the bundle takes. Sound needs no OpenCV, images no soundfile.

    Raises:
        SourceError: there is no such source; or, unless ``patient``, it cannot be opened now.
    """
    if isinstance(bundle.input, AudioInput):
        from edgekit.devices.audio_sources import open_audio_source

        return open_audio_source(
            config.source,
            bundle.input,
            loop=config.loop,
            stop=stop,
            patient=patient,
            preferred=profile.audio.microphone,
        )
    from edgekit.devices import sources

    return sources.open_source(
        config.source, loop=config.loop, stop=stop, drop=config.drop, patient=patient, camera=profile.camera
    )


class Stream:
    """Its thread hands each result to ``publish`` until the source ends, ``stop`` is set, or something fails.

    Attributes:
        error: what failed, after it ended.
    """

    def __init__(
        self,
        config: StreamConfig,
        pipeline: Pipeline,
        publish: Callable[[Stream, Result], None],
        on_end: Callable[[], None],
    ) -> None:
        self.config, self.pipeline = config, pipeline
        self.error: BaseException | None = None
        self._publish, self._on_end = publish, on_end
        self._thread = threading.Thread(target=self._run, name=f"stream {config.name}", daemon=True)

    @property
    def live(self) -> bool:
        return self.pipeline.source.live

    @property
    def ended(self) -> bool:
        return self._thread.ident is not None and not self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            for result in self.pipeline:
                self._publish(self, result)
        except BaseException as error:
            self.error = error
        finally:
            self._on_end()

    def close(self, end_s: float) -> None:
        """Ends it; one that hangs in a driver is left behind at ``end_s`` on the monotonic clock."""
        pipeline = self.pipeline
        pipeline.source.stop.set()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, end_s - time.monotonic()))
            if self._thread.is_alive():
                logger.error("stream %s does not end, and is left behind", self.config.name)
        pipeline.source.close()
        pipeline.close()

"""One stream: a source and a model, joined by a pipeline that has a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgekit import bundle as bundles
from edgekit.audio import is_sound
from edgekit.bundle import Bundle
from edgekit.decode import thresholds
from edgekit.devices.config import StreamConfig
from edgekit.devices.delegates.plans import compiled_path
from edgekit.devices.pipeline import Pipeline
from edgekit.devices.profiles import Profile, detect
from edgekit.devices.results import Result
from edgekit.devices.sources.frames import Source, is_file, public_name
from edgekit.errors import EdgekitError, SourceError
from edgekit.manifest import AudioInput

logger = logging.getLogger(__name__)

# What ends when its model is ended does so within so long.
_LAST_S = 0.3

Status = tuple[int, ...]


class Files(NamedTuple):
    """What a model is made of, by size, time and place: the bundle, the one compiled for Coral, the labels. None: there
    is no such file."""

    bundle: Status | None
    compiled: Status | None
    labels: Status | None

    @classmethod
    def of(cls, config: StreamConfig) -> Files:
        path = Path(config.bundle)
        return cls(_status(path), _status(compiled_path(path)), _status(Path(config.labels)) if config.labels else None)


def _status(path: Path) -> Status | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # of its times the one that nothing can set back
    return status.st_size, status.st_ctime_ns, status.st_ino, status.st_dev


def read_bundle(config: StreamConfig) -> Bundle:
    """The bundle of a stream, with a hop of another length if told so. The source is not opened.

    Raises:
        EdgekitError: it cannot be read, or the configuration does not fit it.
    """
    bundle = bundles.read(config.bundle, config.labels)
    where = f"stream {config.name}: "
    try:
        thresholds(config.threshold, bundle.labels)
    except EdgekitError as error:
        raise EdgekitError(where + error.what, expected=error.expected, got=error.got, mend=error.mend) from error
    given = bundle.input
    takes = "sound" if isinstance(given, AudioInput) else "images"
    gives = "sound" if is_sound(config.source) else takes if is_file(config.source) else "images"
    if gives != takes:
        raise SourceError(
            f"{where}source {public_name(config.source)}",
            expected=f"{takes}, which its bundle takes",
            got=gives,
            mend="give another source, or another bundle",
        )
    if config.hop_s is None:
        return bundle
    if not isinstance(given, AudioInput) or given.streaming:
        kind = "streams sound by hops of its own" if isinstance(given, AudioInput) else "takes images"
        raise EdgekitError(
            f"{where}hop",
            expected="a bundle that takes windows of sound",
            got=f"one that {kind}",
            mend="leave it out",
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
        from edgekit.devices.sources.sound import open_audio_source

        return open_audio_source(
            config.source,
            bundle.input,
            loop=config.loop,
            stop=stop,
            patient=patient,
            preferred=profile.audio.microphone,
        )
    from edgekit.devices.sources import images

    return images.open_source(
        config.source, loop=config.loop, stop=stop, drop=config.drop, patient=patient, camera=profile.camera
    )


def try_source(config: StreamConfig, bundle: Bundle) -> None:
    """Opens the source, which is a file, as a run would.

    Raises:
        SourceError: it cannot be opened.
    """
    open_source(config, bundle, detect(), threading.Event(), patient=False).close()


class Stream:
    """A source and a model that are open. Once it is started, its thread hands each result to ``publish`` until the
    source ends, it is closed, or something fails; then it calls ``on_end`` and frees both.

    Attributes:
        config: as asked for; a command may have changed it since, as its pipeline knows.
        files: as they were when the model was read.
        ended: whether it has had its last frame.
        error: what failed.
    """

    def __init__(
        self,
        config: StreamConfig,
        files: Files,
        pipeline: Pipeline,
        publish: Callable[[Stream, Result], None],
        on_end: Callable[[Stream], None],
    ) -> None:
        self.config, self.files, self.pipeline = config, files, pipeline
        self.ended = False
        self.error: BaseException | None = None
        self._publish, self._on_end = publish, on_end
        self._thread = threading.Thread(target=self._run, name=f"stream {config.name}", daemon=True)

    @property
    def live(self) -> bool:
        return self.pipeline.source.live

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            for result in self.pipeline:
                self._publish(self, result)
        except BaseException as error:
            self.error = error
        self.ended = True
        try:
            self._on_end(self)
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.pipeline.close()

    def close(self, end_s: float) -> None:
        """Ends it; one that hangs in a driver is left behind at ``end_s`` on the monotonic clock, or shortly after."""
        pipeline = self.pipeline
        pipeline.source.stop.set()
        if self._thread.ident is None:
            pipeline.close()
            return
        self._thread.join(max(0.0, end_s - time.monotonic()))
        if self._thread.is_alive():
            pipeline.close_model()
            self._thread.join(_LAST_S)
        if self._thread.is_alive():
            logger.error("stream %s does not end, and is left behind", self.config.name)
            pipeline.source.close()  # another one may want its camera

"""What runs on a device: its streams, each in a thread of its own, and the publisher that serves them all."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import edgekit
from edgekit import runtimes
from edgekit.broker import is_embedded, parse_broker
from edgekit.bundle import Bundle
from edgekit.custom_ops import Ops
from edgekit.devices.config import Config, StreamConfig
from edgekit.devices.counts import Counts
from edgekit.devices.health import device_health
from edgekit.devices.interpreter import Model
from edgekit.devices.pipeline import Pipeline
from edgekit.devices.profiles import detect, load_profile
from edgekit.devices.publish.commands import Commands
from edgekit.devices.publish.home_assistant import Config as Announcement
from edgekit.devices.publish.home_assistant import Discovery, discovery, label_groups
from edgekit.devices.publish.publisher import Publisher
from edgekit.devices.publish.spool import Spool, spool_folder
from edgekit.devices.results import Result, new_boot_id
from edgekit.devices.service.notify import notify, watchdog_s
from edgekit.devices.stream import Files, Stream, open_source, read_bundle
from edgekit.errors import BrokerError, EdgekitError
from edgekit.messages import HealthMessage, InfoMessage, SpoolHealth, Versions, default_device_id

if TYPE_CHECKING:
    from edgekit.embedded_broker import EmbeddedBroker

logger = logging.getLogger(__name__)

# How long a finite source waits for the embedded broker's first subscriber.
SUBSCRIBER_TIMEOUT_S = 10.0
# Streams that are told to stop and do not, as in a driver that hangs, are left behind after so long.
STREAM_END_S = 1.0
# How often it looks whether all is well.
_LOOK_S = 0.2
STATUS_S = 10.0


class Device:
    """Runs a configuration. Leaving the ``with`` block drains: what was predicted is delivered, and ``offline`` said.

    Args:
        stop: ends the run when set.
        patient: it is a service, by a configuration file: a live source that cannot be opened now is waited for.
        ops: kernels of custom operators, instead of the paths of the configuration.
        on_result: called with what came of each frame when it has been given to the publisher, one at a time.

    Attributes:
        streams: by name.
        replacement: another configuration, to be started anew with: this run ends.

    Raises:
        EdgekitError: a bundle, a source or the broker cannot be used as asked.
    """

    def __init__(
        self,
        config: Config,
        stop: threading.Event,
        *,
        patient: bool = False,
        ops: Ops = (),
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        self.config, self._stop, self._patient, self._ops, self._on_result = config, stop, patient, ops, on_result
        self.device_id = config.device_id or default_device_id()
        self.profile = load_profile(config.profile) if config.profile else detect()
        self.streams: dict[str, Stream] = {}
        self.replacement: Config | None = None
        self._boot_id, self._began_s = new_boot_id(), time.monotonic()
        # Streams that are about to end, and what became of the frames of those that have.
        self._leaving: list[Stream] = []
        self._past = Counts()
        self._running = False
        self._woken = threading.Event()
        self._results, self._changes = threading.Lock(), threading.Lock()
        self._publisher: Publisher | None = None
        self._discovery: Discovery | None = None
        self._stack = ExitStack()
        try:
            for of_stream in config.stream:
                files = Files.of(of_stream)
                model = self.load(of_stream, read_bundle(of_stream), len(config.stream))
                self.streams[of_stream.name] = self.open(of_stream, files, model, self._boot_id)
            versions = edgekit.__version__, platform.python_version(), runtimes.installed().get(model.runtime, "")
            self._versions = Versions(*versions[:2], f"{model.runtime} {versions[2]}".strip())
            self._info = self.info()
            self.check_groups({name: stream.pipeline.model.bundle for name, stream in self.streams.items()})
            if config.broker != "none":
                self._connect(config)
        except BaseException:
            self._close(self.streams.values())
            self._stack.close()
            raise

    def load(self, config: StreamConfig, bundle: Bundle, streams: int) -> Model:
        """``bundle`` with the delegate, threads and kernels that ``config`` asks for, as one of so many ``streams``."""
        return Model(
            bundle,
            delegate=config.delegate,
            strict=config.strict,
            order=self.profile.delegates,
            threads=config.threads or max(1, self.profile.threads // streams),
            hang_s=self.config.hang_s,
            ops=self._ops or config.ops,
        )

    def open(self, config: StreamConfig, files: Files, model: Model, boot_id: str | None = None) -> Stream:
        """A stream that does not run yet; ``model`` is its own, also if this fails.

        Raises:
            EdgekitError: there is no such source, or, unless it is waited for, it cannot be opened now; or the
                settings do not fit the model.
        """
        patient = self._patient or self._running  # another stream may have its camera or microphone yet
        try:
            source = open_source(config, model.bundle, self.profile, threading.Event(), patient=patient)
            try:
                pipeline = Pipeline(model, source, config, self.device_id, boot_id)
            except BaseException:
                source.close()
                raise
        except BaseException:
            model.close()
            raise
        return Stream(config, files, pipeline, self._publish, self._end_of)

    def _connect(self, config: Config) -> None:
        finite = not any(stream.live for stream in self.streams.values())
        embedded: EmbeddedBroker | None = None
        if is_embedded(config.broker):
            from edgekit.embedded_broker import EmbeddedBroker  # with asyncio, of which nothing else has need

            embedded = self._stack.enter_context(EmbeddedBroker(config.broker))
        address = embedded.address if embedded else parse_broker(config.broker)
        # A configuration may have other streams tomorrow.
        name = self.device_id if self._patient else ".".join([self.device_id, *self.streams])
        # An embedded broker ends with this process: what it does not get is not for another one.
        in_memory = embedded or config.spool == "none"
        path = None if in_memory else spool_folder(config.spool) / f"{name}.sqlite"
        if config.home_assistant:
            self._discovery = Discovery(self.device_id, self._announcement())
        self._publisher = self._stack.enter_context(
            Publisher(
                address,
                self._info,
                f"edgekit-{name.replace('.', '-')}",
                Spool(path, max_bytes=config.spool_bytes, max_age_s=config.spool_age_s),
                self._stop,
                prefix=config.prefix,
                replay_per_s=config.replay_rate,
                health=self._health,
                commands=Commands(self._pipelines) if config.commands else None,
                discovery=self._discovery,
            )
        )
        if embedded and finite:
            logger.info("%s is open; waiting up to %g s for a subscriber", address, SUBSCRIBER_TIMEOUT_S)
            if not embedded.wait_for_subscriber(SUBSCRIBER_TIMEOUT_S, self._stop, besides=self._publisher.filters):
                logger.warning("no subscriber came; going on without")

    def start(self) -> None:
        """Starts the streams."""
        self._running = True
        for stream in self.streams.values():
            stream.start()
        notify("READY=1")

    def attend(self) -> None:
        """Waits until all streams have ended, it is told to stop, or there is a replacement.

        Raises:
            EdgekitError: a stream failed, or hangs where nothing but the end of the process helps.
        """
        look_s, status_s = min(_LOOK_S, watchdog_s() or _LOOK_S), 0.0
        while not (self._stop.is_set() or self.replacement or all(one.ended for one in self.streams.values())):
            self._woken.wait(look_s)
            self._woken.clear()
            self._check()
            notify("WATCHDOG=1")
            if time.monotonic() > status_s:
                status_s = time.monotonic() + STATUS_S
                notify(f"STATUS={self.counts}")
        self._check()

    def _check(self) -> None:
        for stream in list(self.streams.values()):
            if stream.error:
                raise stream.error
            began_s = stream.pipeline.model.began_s
            if began_s and time.monotonic() - began_s > self.config.hang_s:
                # in this process, where a thread in native code cannot be ended
                raise EdgekitError(
                    f"stream {stream.config.name}: the model hangs for {self.config.hang_s:g} s",
                    mend="start the run again, as a service does by itself",
                )

    # -- for upkeep ------------------------------------------------------------------------------------------------

    def change(self, streams: Iterable[Stream], removed: Iterable[str] = ()) -> None:
        """Runs ``streams``, each instead of the one of its name if there is one, and those ``removed`` no more."""
        new, removed = {stream.config.name: stream for stream in streams}, set(removed)
        with self._changes:
            # at once, so that never none are there
            self._leaving = [one for name, one in self.streams.items() if name in new or name in removed]
            self.streams = {name: one for name, one in self.streams.items() if name not in removed} | new
            for one in self._leaving:
                if one.config.name in new:
                    new[one.config.name].pipeline.paused = one.pipeline.paused
        self._close(self._leaving)  # before the others begin, which may want their cameras
        with self._changes:
            self._past, self._leaving = sum((one.pipeline.counts for one in self._leaving), self._past), []
            if self._running:
                for stream in new.values():
                    stream.start()
        if not self._running:  # it has ended meanwhile
            self._close(new.values())
        for name in removed:
            if self._publisher:
                self._publisher.forget(name)

    def check_groups(self, bundles: Mapping[str, Bundle]) -> None:
        """
        Raises:
            EdgekitError: a group names a label that none of these bundles has.
        """
        self._groups({name: bundle.labels for name, bundle in bundles.items()})

    def announce(self) -> None:
        """Publishes what the device is, where that has changed."""
        info = self.info()
        if info != self._info:
            self._info = info
            if self._publisher:
                self._publisher.announce(info)
            if self._discovery:
                self._discovery.change(self._announcement())

    # -- for streams and publisher ---------------------------------------------------------------------------------

    def _publish(self, stream: Stream, result: Result) -> None:
        if self._publisher:
            self._publisher.publish(
                stream.config.name, result, wait=None if stream.live else stream.pipeline.source.stop
            )
        if self._on_result:
            with self._results:
                self._on_result(result)
        if self._stop.is_set():
            stream.pipeline.source.stop.set()

    def _end_of(self, stream: Stream) -> None:
        self._woken.set()
        # What is the state when the run ends remains, as the device's status tells what it is worth.
        if result := stream.pipeline.end(state=self.streams.get(stream.config.name) is not stream):
            self._publish(stream, result)

    def _pipelines(self) -> dict[str, Pipeline]:
        return {name: stream.pipeline for name, stream in self.streams.items()}

    def _health(self, spool: SpoolHealth) -> HealthMessage:
        with self._changes:
            pipelines = self._pipelines()
            past = sum((stream.pipeline.counts for stream in self._leaving), self._past)
        return device_health(pipelines, past, spool, self.profile.cpu_temp_c(), self._began_s)

    def _announcement(self) -> Announcement:
        labels = {name: pipeline.model.bundle.labels for name, pipeline in self._pipelines().items()}
        return discovery(self._info, labels, self._groups(labels), prefix=self.config.prefix)

    def _groups(self, labels: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        return label_groups(self.config.label_groups, [label for names in labels.values() for label in names])

    @property
    def counts(self) -> Counts:
        with self._changes:
            streams = [*self.streams.values(), *self._leaving]
            return sum((stream.pipeline.counts for stream in streams), self._past)

    def info(self) -> InfoMessage:
        return InfoMessage(
            schema="edgekit.info/1",
            device=self.device_id,
            boot_id=self._boot_id,
            profile=self.profile.name,
            versions=self._versions,
            streams={name: pipeline.info() for name, pipeline in self._pipelines().items()},
        )

    def _close(self, streams: Iterable[Stream]) -> None:
        streams = list(streams)
        for stream in streams:
            stream.pipeline.source.stop.set()
        end_s = time.monotonic() + STREAM_END_S
        for stream in streams:
            try:
                stream.close(end_s)
            except Exception as error:  # the others, and the publisher, are to be closed all the same
                logger.error("stream %s: %s", stream.config.name, error)
                logger.debug("stream %s", stream.config.name, exc_info=True)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changes:
            was_running, self._running = self._running, False
        if was_running and not self.replacement:
            notify("STOPPING=1")
        if self._publisher:
            self._publisher.hurried = bool(error or self.replacement)
        self._close([*self.streams.values(), *self._leaving])
        logger.info("%s", self.counts)
        try:
            self._stack.__exit__(kind, error, trace)
        except BrokerError as unacknowledged:
            if not self.replacement:
                raise
            logger.error("%s", unacknowledged)

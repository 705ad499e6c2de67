"""What runs on a device: its streams, each in a thread of its own, and the publisher that serves them all."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import edgekit
from edgekit import runtimes
from edgekit.broker import is_embedded, parse_broker
from edgekit.bundle import Bundle
from edgekit.custom_ops import Ops
from edgekit.devices.commands import Commands
from edgekit.devices.config import Config, StreamConfig
from edgekit.devices.health import device_health
from edgekit.devices.home_assistant import Config as Announcement
from edgekit.devices.home_assistant import Discovery, discovery, label_groups
from edgekit.devices.interpreter import Model
from edgekit.devices.notify import notify, watchdog_s
from edgekit.devices.pipeline import Counts, Pipeline
from edgekit.devices.profiles import detect, load_profile
from edgekit.devices.publisher import Publisher
from edgekit.devices.results import Result, new_boot_id
from edgekit.devices.spool import Spool, spool_folder
from edgekit.devices.stream import Stream, open_source, read_bundle
from edgekit.errors import EdgekitError
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
        self._boot_id, self._began_s = new_boot_id(), time.monotonic()
        self._past = Counts()  # of streams that are no more
        self._woken, self._lock = threading.Event(), threading.Lock()
        self._publisher: Publisher | None = None
        self._discovery: Discovery | None = None
        self._stack = ExitStack()
        try:
            for of_stream in config.stream:
                bundle = read_bundle(of_stream)
                model = self.load(of_stream, bundle)
                self.streams[of_stream.name] = self._open(of_stream, model, self._boot_id, patient)
            self._info = self.info()
            if config.broker != "none":
                self._connect(config)
        except BaseException:
            self._close_streams(self.streams.values())
            self._stack.close()
            raise

    def load(self, config: StreamConfig, bundle: Bundle) -> Model:
        """``bundle`` with the delegate, threads and kernels that ``config`` asks for."""
        return Model(
            bundle,
            delegate=config.delegate,
            strict=config.strict,
            order=self.profile.delegates,
            threads=config.threads or max(1, self.profile.threads // len(self.config.stream)),
            hang_s=self.config.hang_s,
            ops=self._ops or config.ops,
        )

    def _open(self, config: StreamConfig, model: Model, boot_id: str, patient: bool) -> Stream:
        stop = threading.Event()
        try:
            source = open_source(config, model.bundle, self.profile, stop, patient=patient)
            try:
                pipeline = Pipeline(model, source, config, self.device_id, boot_id)
            except BaseException:
                source.close()
                raise
        except BaseException:
            model.close()
            raise
        return Stream(config, pipeline, self._publish, self._woken.set)

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

    def attend(self, ended: Callable[[], bool] = lambda: False) -> None:
        """Runs the streams until all have ended, it is told to stop, or ``ended`` says so.

        Raises:
            EdgekitError: a stream failed, or hangs where nothing but the end of the process helps.
        """
        for stream in self.streams.values():
            stream.start()
        notify("READY=1")
        look_s, status_s = min(_LOOK_S, watchdog_s() or _LOOK_S), 0.0
        while not (self._stop.is_set() or ended() or all(stream.ended for stream in self.streams.values())):
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

    def restart(self, config: StreamConfig, model: Model) -> None:
        """Runs ``model`` on another source, instead of the stream of that name if there is one. A new boot, whose
        predictions count from 1."""
        self.remove(config.name, keep_state=True)
        stream = self.streams[config.name] = self._open(config, model, new_boot_id(), True)
        stream.start()

    def remove(self, name: str, *, keep_state: bool = False) -> None:
        if stream := self.streams.get(name):
            self._close_streams([stream])
            self._past += stream.pipeline.counts
            if not keep_state:
                del self.streams[name]
                if self._publisher:
                    self._publisher.forget(name)

    def announce(self) -> None:
        """Publishes what the device is, where that has changed."""
        info = self.info()
        if info != self._info:
            self._info = info
            if self._publisher:
                self._publisher.announce(info)
            if self._discovery:
                self._discovery.change(self._announcement())

    # -- for the publisher -----------------------------------------------------------------------------------------

    def _publish(self, stream: Stream, result: Result) -> None:
        if self._publisher:
            self._publisher.publish(stream.config.name, result, wait=not stream.live)
        if self._on_result:
            with self._lock:
                self._on_result(result)
        if self._stop.is_set():
            stream.pipeline.source.stop.set()

    def _pipelines(self) -> dict[str, Pipeline]:
        return {name: stream.pipeline for name, stream in list(self.streams.items())}

    def _health(self, spool: SpoolHealth) -> HealthMessage:
        return device_health(self._pipelines(), spool, self.profile.cpu_temp_c(), self._began_s)

    def _announcement(self) -> Announcement:
        labels = {name: pipeline.model.bundle.labels for name, pipeline in self._pipelines().items()}
        given = [f"{name}={label}" for name, named in self.config.label_groups.items() for label in named]
        groups = label_groups(given, [label for names in labels.values() for label in names])
        return discovery(self._info, labels, groups, prefix=self.config.prefix)

    @property
    def counts(self) -> Counts:
        return sum((pipeline.counts for pipeline in self._pipelines().values()), self._past)

    def info(self) -> InfoMessage:
        pipelines = self._pipelines()
        runtime = next(iter(pipelines.values())).model.runtime
        version = runtimes.installed().get(runtime, "")
        return InfoMessage(
            schema="edgekit.info/1",
            device=self.device_id,
            boot_id=self._boot_id,
            profile=self.profile.name,
            versions=Versions(edgekit.__version__, platform.python_version(), f"{runtime} {version}".strip()),
            streams={name: pipeline.info() for name, pipeline in pipelines.items()},
        )

    def _close_streams(self, streams: Iterable[Stream]) -> None:
        streams = list(streams)
        for stream in streams:
            stream.pipeline.source.stop.set()
        end_s = time.monotonic() + STREAM_END_S
        for stream in streams:
            stream.close(end_s)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        notify("STOPPING=1")
        self._close_streams(self.streams.values())
        logger.info("%s", self.counts)
        self._stack.__exit__(kind, error, trace)

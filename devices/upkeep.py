"""What keeps a device up to date while it runs: other bundles, another configuration, delegates to be tried again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from edgekit.broker import BrokerAddress
from edgekit.bundle import Bundle
from edgekit.devices.config import Config, StreamConfig
from edgekit.devices.device import Device
from edgekit.devices.interpreter import Model
from edgekit.devices.pipeline import CHANGEABLE
from edgekit.devices.service.notify import notify
from edgekit.devices.stream import Files, Stream, read_bundle
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput

logger = logging.getLogger(__name__)

LOOK_S = 1.0
# At the end, what it is loading is waited for so long.
_END_S = 0.3
# Of a stream, what may change without another model, and what with another model but on the same source.
_OF_SETTINGS = CHANGEABLE | {"smoothing", "hysteresis"}
_OF_MODEL = {"bundle", "labels", "delegate", "strict", "threads", "ops"}


class Upkeep:
    """Looks every second, in a thread of its own, as loading a model may take long.

    Args:
        device: what it keeps up to date.
        read: reads the configuration again; None where there is no file of it.
        reload: asks to do so when set.
    """

    def __init__(self, device: Device, read: Callable[[], Config] | None, reload: threading.Event) -> None:
        self._device, self._read, self._reload = device, read, reload
        # Of streams, files that have changed and may still be written to.
        self._unsettled: dict[str, Files] = {}
        self._told = ""  # what failed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def __enter__(self) -> Upkeep:
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._end.wait(LOOK_S):
            try:
                self._look()
                self._told = ""
            except Exception as error:  # the streams go on
                line = f"upkeep failed ({type(error).__name__}: {error})"
                if line != self._told:
                    self._told = line
                    logger.error("%s", line)
                logger.debug("upkeep failed", exc_info=True)

    def _look(self) -> None:
        if self._reload.is_set():
            self._reload.clear()
            self._read_again()
        for stream in self._device.streams.values():
            if not stream.ended:
                stream.pipeline.model.tend()
                self._renew(stream)
        self._device.announce()

    # -- bundles ---------------------------------------------------------------------------------------------------

    def _renew(self, stream: Stream) -> None:
        """Takes what its files have become, once they are twice the same."""
        name, files, before = stream.config.name, Files.of(stream.config), stream.files
        if files == before or self._unsettled.get(name) != files:
            self._unsettled[name] = files
            return
        stream.files, config, used = files, stream.pipeline.config, stream.pipeline.newest.bundle
        try:
            bundle = read_bundle(config)
            same = bundle.file.sha256 == used.file.sha256 and bundle.labels == used.labels
            if same and files.compiled == before.compiled:
                return
            streams = self._device.streams
            self._device.check_groups({one: streams[one].pipeline.newest.bundle for one in streams} | {name: bundle})
            model = self._load(config, bundle, stream, len(streams))
            # With the settings as they are by now: a command may have changed them meanwhile.
            if _takes(stream, config, model):
                try:
                    stream.pipeline.adopt(model=model)
                except BaseException:
                    model.close()
                    raise
            else:
                other = self._device.open(stream.config, files, model)
                try:
                    other.pipeline.adopt(stream.pipeline.config)
                except BaseException:
                    other.close(0.0)
                    raise
                self._device.change([other])
        except EdgekitError as error:
            logger.error("%s; refused, and stream %s goes on as it was", error, name)

    def _load(self, config: StreamConfig, bundle: Bundle, stream: Stream | None, streams: int) -> Model:
        """The model of ``config``, which has predicted once.

        Raises:
            EdgekitError: it does not run, or is for another task than that of ``stream``.
        """
        if stream and config.source == stream.config.source:
            kinds = ["images", "sound"]
            of, used = (isinstance(one.input, AudioInput) for one in (bundle, stream.pipeline.newest.bundle))
            if of != used:
                raise EdgekitError(
                    f"bundle {config.bundle} is for another task",
                    expected=f"one of {kinds[used]}",
                    got=f"one of {kinds[of]}",
                )
        model = self._device.load(config, bundle, streams)
        try:
            model.probe()
        except BaseException:
            model.close()
            raise
        return model

    # -- the configuration -----------------------------------------------------------------------------------------

    def _read_again(self) -> None:
        if self._read is None:
            logger.info("there is no configuration file to read again; bundles are looked at all the time")
            return
        notify("RELOADING=1")
        try:
            self._take(self._read())
        except EdgekitError as error:
            logger.error("%s; the configuration before stays in force", error)
        finally:
            if not self._device.replacement:  # which says so when it runs
                notify("READY=1")

    def _take(self, config: Config) -> None:
        """All of it, or nothing.

        Raises:
            EdgekitError: something in it cannot be used.
        """
        device = self._device
        whole = _fields(config, but={"stream"}) != _fields(device.config, but={"stream"})
        files, bundles = {one.name: Files.of(one) for one in config.stream}, {}
        for one in config.stream:
            stream = device.streams.get(one.name)
            unchanged = stream and one == stream.config and not whole
            bundles[one.name] = stream.pipeline.newest.bundle if stream and unchanged else read_bundle(one)
        if whole:
            if isinstance(config.broker, BrokerAddress):
                config.broker.tls_context()  # certificates that are wrong are not to end what runs
            logger.info("the configuration concerns the whole device, which starts anew")
            device.replacement = config
            return
        device.check_groups(bundles)
        opened: list[Stream] = []
        changed: list[tuple[Stream, StreamConfig, Model | None]] = []
        with ExitStack() as unused:
            for one in config.stream:
                stream = device.streams.get(one.name)
                if stream and one == stream.config:
                    continue
                if stream and not stream.ended and not _differ(one, stream.config, _OF_SETTINGS):
                    stream.pipeline.check(one)
                    changed.append((stream, one, None))
                    continue
                model = self._load(one, bundles[one.name], stream, len(config.stream))
                unused.callback(model.close)
                if stream and not stream.ended and _takes(stream, one, model):
                    stream.pipeline.check(one, model)
                    changed.append((stream, one, model))
                else:
                    opened.append(device.open(one, files[one.name], model))
                    unused.callback(opened[-1].pipeline.close)
            unused.pop_all()
        device.config = config
        for stream, one, other in changed:
            stream.pipeline.adopt(one, other)
            stream.config, stream.files = one, files[one.name]
        device.change(opened, device.streams.keys() - bundles.keys())
        logger.info("the configuration was read again")


def _fields(config: Config | StreamConfig, but: set[str] | frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in msgspec.structs.asdict(config).items() if name not in but}


def _differ(one: StreamConfig, other: StreamConfig, but: set[str] | frozenset[str]) -> bool:
    return _fields(one, but) != _fields(other, but)


def _takes(stream: Stream, config: StreamConfig, model: Model) -> bool:
    """Whether ``model`` takes what the source of ``stream`` gives, which is the one of ``config``."""
    given = model.bundle.input
    return not _differ(config, stream.config, _OF_SETTINGS | _OF_MODEL) and (
        not isinstance(given, AudioInput) or given == stream.pipeline.newest.bundle.input
    )

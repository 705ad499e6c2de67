"""What keeps a device up to date while it runs: other bundles, another configuration, delegates to be tried again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgekit.devices.config import Config, StreamConfig
from edgekit.devices.device import Device
from edgekit.devices.interpreter import Model
from edgekit.devices.notify import notify
from edgekit.devices.pipeline import CHANGEABLE
from edgekit.devices.stream import Stream, read_bundle
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput

logger = logging.getLogger(__name__)

LOOK_S = 1.0
# Of a stream, what may change without another model, and what with another model but on the same source.
_OF_SETTINGS = CHANGEABLE | {"smoothing", "hysteresis"}
_OF_MODEL = {"bundle", "labels", "delegate", "strict", "threads", "ops"}

# Size, time and inode of each file that a model is made of; None for one that is not there.
Files = tuple[tuple[int, int, int] | None, ...]
# Stream, bundle and labels.
Key = tuple[str, str, str | None]


class Upkeep:
    """Looks every second, in a thread of its own, as loading a model may take long.

    Args:
        device: what it keeps up to date.
        read: reads the configuration again; None where there is no file of it.
        reload: asks to do so when set.

    Attributes:
        replacement: another configuration that concerns the whole device, which is to be started anew with it.
    """

    def __init__(self, device: Device, read: Callable[[], Config] | None, reload: threading.Event) -> None:
        self._device, self._read, self._reload = device, read, reload
        self.replacement: Config | None = None
        self._files = {_key(stream.config): _files(stream.config) for stream in device.streams.values()}
        # Files that have changed and may still be written to.
        self._unsettled: dict[Key, Files] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def __enter__(self) -> Upkeep:
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join(LOOK_S)  # what it is loading is of no more use

    def _run(self) -> None:
        while not self._end.wait(LOOK_S):
            try:
                self._look()
            except Exception:  # the streams go on
                logger.exception("upkeep failed")

    def _look(self) -> None:
        if self._reload.is_set():
            self._reload.clear()
            self._read_again()
        for stream in list(self._device.streams.values()):
            stream.pipeline.model.tend()
            if self._settled(stream.config):
                self._renew(stream)
        self._device.announce()

    # -- bundles ---------------------------------------------------------------------------------------------------

    def _settled(self, config: StreamConfig) -> bool:
        """Whether the files of a model have changed, and were the same when last looked at."""
        key, files = _key(config), _files(config)
        if files == self._files.setdefault(key, files):
            self._unsettled.pop(key, None)
            return False
        if self._unsettled.get(key) != files:
            self._unsettled[key] = files
            return False
        self._files[key] = self._unsettled.pop(key)
        return True

    def _renew(self, stream: Stream) -> None:
        before = stream.pipeline.model.bundle
        try:
            model = self._load(stream.config, stream)
            if model.bundle.file.sha256 == before.file.sha256 and model.bundle.labels == before.labels:
                model.close()
                return
            self._run_with(stream.config, model)
        except EdgekitError as error:
            logger.error("%s; refused, and stream %s goes on as it was", error, stream.config.name)

    def _load(self, config: StreamConfig, stream: Stream | None) -> Model:
        """The model of ``config``, which has predicted once.

        Raises:
            EdgekitError: it does not load or run, or is for another task than that of ``stream``.
        """
        bundle = read_bundle(config)
        if stream and config.source == stream.config.source:
            used = stream.pipeline.model.bundle
            if isinstance(bundle.input, AudioInput) != isinstance(used.input, AudioInput):
                kinds = ("images", "sound") if isinstance(used.input, AudioInput) else ("sound", "images")
                raise EdgekitError(
                    f"bundle {config.bundle} is for another task",
                    expected=f"one of {kinds[1]}",
                    got=f"one of {kinds[0]}",
                )
        model = self._device.load(config, bundle)
        try:
            model.probe()
        except BaseException:
            model.close()
            raise
        return model

    def _run_with(self, config: StreamConfig, model: Model) -> None:
        """On the source that is open, where the new model takes what it gives."""
        stream = self._device.streams.get(config.name)
        given = model.bundle.input
        if (
            stream
            and not _differ(config, stream.config, _OF_SETTINGS | _OF_MODEL)
            and (not isinstance(given, AudioInput) or given == stream.pipeline.model.bundle.input)
        ):
            stream.pipeline.replace(model, config)
            stream.config = config
        else:
            self._device.restart(config, model)

    # -- the configuration -----------------------------------------------------------------------------------------

    def _read_again(self) -> None:
        if self._read is None:
            logger.info("there is no configuration file to read again; bundles are looked at all the time")
            return
        notify("RELOADING=1")
        try:
            self._adopt(self._read())
        except EdgekitError as error:
            logger.error("%s; the configuration before stays in force", error)
        notify("READY=1")

    def _adopt(self, config: Config) -> None:
        """All of it, or nothing.

        Raises:
            EdgekitError: something in it cannot be used.
        """
        device = self._device
        if _fields(config, but={"stream"}) != _fields(device.config, but={"stream"}):
            for of_stream in config.stream:
                read_bundle(of_stream)
            logger.info("the configuration concerns the whole device, which starts anew")
            self.replacement = config
            return
        models: dict[str, Model] = {}
        try:
            for of_stream in config.stream:
                stream = device.streams.get(of_stream.name)
                if stream is None or _differ(of_stream, stream.config, _OF_SETTINGS):
                    models[of_stream.name] = self._load(of_stream, stream)
                elif of_stream != stream.config:
                    read_bundle(of_stream)
        except BaseException:
            for model in models.values():
                model.close()
            raise
        device.config = config
        for name in device.streams.keys() - {of_stream.name for of_stream in config.stream}:
            device.remove(name)
        for of_stream in config.stream:
            if of_stream.name in models:
                self._run_with(of_stream, models[of_stream.name])
            else:
                stream = device.streams[of_stream.name]
                stream.pipeline.adopt(of_stream)
                stream.config = of_stream
        logger.info("the configuration was read again")


def _fields(config: Config | StreamConfig, but: set[str] | frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in msgspec.structs.asdict(config).items() if name not in but}


def _differ(one: StreamConfig, other: StreamConfig, but: set[str] | frozenset[str]) -> bool:
    return _fields(one, but) != _fields(other, but)


def _key(config: StreamConfig) -> Key:
    return config.name, config.bundle, config.labels


def _files(config: StreamConfig) -> Files:
    path = Path(config.bundle)
    paths = [path, path.with_name(f"{path.stem}_edgetpu.tflite"), *([Path(config.labels)] if config.labels else [])]
    found: list[tuple[int, int, int] | None] = []
    for one in paths:
        try:
            status = one.stat()
            found.append((status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)

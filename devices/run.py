"""Runs a bundle on a source, or a configuration of several streams."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from edgekit.broker import BrokerAddress
from edgekit.custom_ops import CustomOpResolver, Ops, paths_of
from edgekit.decode import Threshold
from edgekit.devices.config import Config, StreamConfig, read_config
from edgekit.devices.counts import Counts
from edgekit.devices.device import Device
from edgekit.devices.results import Result
from edgekit.devices.upkeep import Upkeep
from edgekit.errors import EdgekitError
from edgekit.messages import PREFIX, PredictionMessage

logger = logging.getLogger(__name__)


def stream(
    bundle: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str | os.PathLike[str] = "auto",
    strict: bool = False,
    threads: int | None = None,
    threshold: Threshold = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    hop_s: float | None = None,
    loop: bool = False,
    drop: str = "oldest",
    ops: Ops = (),
) -> Iterator[PredictionMessage]:
    """The predictions of ``bundle`` on ``source``, one by one, published nowhere. Otherwise as :func:`run`."""
    of_stream = _stream_config(
        bundle, source, stream, labels, ops, delegate, strict=strict, threads=threads, threshold=threshold, top_k=top_k,
        max_fps=max_fps, hop_s=hop_s, loop=loop, drop=drop,
    )  # fmt: skip
    config = Config(stream=(of_stream,), device_id=device_id, broker="none")
    with Device(config, threading.Event(), ops=_resolver(ops)) as device:
        for result in device.streams[stream].pipeline:
            if result.prediction:
                yield result.prediction


def run(
    bundle: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    broker: str | BrokerAddress = "mqtt://localhost",
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str | os.PathLike[str] = "auto",
    strict: bool = False,
    threads: int | None = None,
    threshold: Threshold = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    hop_s: float | None = None,
    loop: bool = False,
    drop: str = "oldest",
    smoothing: int = 1,
    hysteresis: float = 0.1,
    ops: Ops = (),
    profile: str | os.PathLike[str] | None = None,
    spool: str | os.PathLike[str] | None = None,
    spool_size_mb: int = 64,
    spool_days: float = 7.0,
    replay_rate: float = 500.0,
    prefix: str = PREFIX,
    commands: bool = True,
    home_assistant: bool = True,
    label_groups: Sequence[str] = (),
    hang_s: float = 30.0,
    stop: threading.Event | None = None,
    reload: threading.Event | None = None,
    on_start: Callable[[], None] | None = None,
    on_prediction: Callable[[PredictionMessage], None] | None = None,
) -> Counts:
    """Streams ``source`` through ``bundle`` and publishes the predictions, to the end of the source; or does so for
    each stream of a configuration file.

    Args:
        bundle: an audio-tagging bundle, or any ``.tflite`` that classifies images. When the file changes, it is taken
            from the next frame on, if it is a good one.
        source: ``camera:N``, ``camera:csi``, ``rtsp://…``, ``http://…`` (MJPEG), or the path of a video, an image or a
            folder of images; of sound: ``mic``, ``mic:NAME`` or the path of an audio file.
        config: a TOML file, instead of all arguments but the last four. Its live sources are waited for.
        broker: ``mqtt://[user:pass@]host[:port]``, ``mqtts://…``, ``embedded`` (a broker in this process, on
            127.0.0.1:1883) or ``none``.
        labels: a label file to use instead of the packed one.
        device_id: this device's name in the topics; the host's name by default.
        stream: this stream's name in the topics.
        delegate: ``auto``, ``cpu``, ``coral``, ``gpu`` or the path of a delegate library.
        strict: fail where this delegate does not load or fails, instead of going on with the next.
        threads: threads of the CPU kernels; by default as the profile says.
        threshold: leave out classes with a lower score: one for all, or by label, ``"*"`` for all others.
        top_k: name so many classes at most.
        max_fps: take no more frames a second.
        hop_s: take a window of sound so often, instead of as the bundle says.
        loop: start a file source again at its end.
        drop: what a live source drops when the model is behind: the ``oldest`` frame, the ``newest``, or ``none``.
        smoothing: decide what is held by the scores of about so many predictions.
        hysteresis: a label that is held ends when its score is so much below its threshold.
        ops: kernels of custom operators beside EdgeKit's own, as :func:`edgekit.load` takes them.
        profile: the device's profile, instead of the one that is detected.
        spool: folder in which predictions are kept until the broker has them; by default that of ``STATE_DIRECTORY``,
            as systemd sets it, else ``~/.local/state/edgekit``; ``none``: in memory alone.
        spool_size_mb: so much is kept at most, the oldest given up first.
        spool_days: so old they become.
        replay_rate: what was kept is sent no faster, in messages a second.
        prefix: what topics begin with.
        commands: carry out what arrives on ``<base>/command``.
        home_assistant: announce the device to Home Assistant.
        label_groups: ``NAME=LABEL,LABEL``: a binary sensor of Home Assistant each.
        hang_s: a model that takes longer hangs.
        stop: ends the run when set.
        reload: reads the configuration file again when set.
        on_start: called when all is open, before the first frame.
        on_prediction: called with each prediction when it has been given to the publisher, in a thread of the stream.

    Returns:
        What became of the frames.

    Raises:
        EdgekitError: the bundle, the source or the broker cannot be used as asked.
    """
    if config is not None:
        read = partial(read_config, config)
        wanted = read()
    elif bundle is None or source is None:
        raise EdgekitError("run", expected="a bundle and a source, or a configuration", mend="give them")
    else:
        read = None
        of_stream = _stream_config(
            bundle, source, stream, labels, ops, delegate, strict=strict, threads=threads, threshold=threshold,
            top_k=top_k, max_fps=max_fps, hop_s=hop_s, loop=loop, drop=drop, smoothing=smoothing, hysteresis=hysteresis,
        )  # fmt: skip
        wanted = Config(
            stream=(of_stream,),
            device_id=device_id,
            broker=broker,
            prefix=prefix,
            profile=None if profile is None else os.fspath(profile),
            spool=None if spool is None else os.fspath(spool),
            spool_size_mb=_plain(spool_size_mb),
            spool_days=_plain(spool_days),
            replay_rate=_plain(replay_rate),
            commands=commands,
            home_assistant=home_assistant,
            label_groups=_groups(label_groups),
            hang_s=_plain(hang_s),
        )

    def on_result(result: Result) -> None:
        if on_prediction and result.prediction:
            on_prediction(result.prediction)

    stop, reload, counts = stop or threading.Event(), reload or threading.Event(), Counts()
    before: Config | None = None
    while True:
        try:
            device = Device(wanted, stop, patient=config is not None, ops=_resolver(ops), on_result=on_result)
        except EdgekitError as error:
            if before is None:
                raise
            logger.error("%s; the configuration before comes back into force", error)
            wanted, before = before, None
            continue
        with device:
            if on_start:
                on_start()
            device.start()
            with Upkeep(device, read, reload):
                device.attend()
        counts += device.counts
        if device.replacement is None or stop.is_set():
            return counts
        wanted, before = device.replacement, device.config


def _groups(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Members by name; those of one text are told apart when the labels are known, which may have commas in them."""
    groups: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, members = text.partition("=")
        if not equals:
            raise EdgekitError(f"label group {text!r}", expected="NAME=LABEL,LABEL", mend="give a name and its labels")
        groups[name] = (*groups.get(name, ()), members)
    return groups


def _resolver(ops: Ops) -> Ops:
    """Kernels that cannot be told by their paths."""
    return ops if isinstance(ops, CustomOpResolver) else ()


def _stream_config(
    bundle: str | os.PathLike[str],
    source: str | os.PathLike[str],
    name: str,
    labels: str | os.PathLike[str] | None,
    ops: Ops,
    delegate: str | os.PathLike[str],
    **others: Any,
) -> StreamConfig:
    return StreamConfig(
        bundle=os.fspath(bundle),
        source=os.fspath(source),
        name=name,
        labels=None if labels is None else os.fspath(labels),
        ops=() if isinstance(ops, CustomOpResolver) else tuple(os.fspath(path) for path in paths_of(ops)),
        delegate=os.fspath(delegate),
        **_plain(others),
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers, as a threshold that was calculated is one, as Python's: no message can hold them."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value

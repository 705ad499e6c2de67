"""Runs a bundle on a source: the way of a frame, opened and joined."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec

from edgekit.broker import BrokerAddress, parse_broker
from edgekit.bundle import Bundle, read
from edgekit.custom_ops import Ops
from edgekit.decode import Threshold
from edgekit.devices.commands import Commands
from edgekit.devices.frames import Source
from edgekit.devices.home_assistant import Discovery, discovery
from edgekit.devices.home_assistant import label_groups as parse_groups
from edgekit.devices.interpreter import Model
from edgekit.devices.pipeline import Counts, Pipeline, Settings
from edgekit.devices.publisher import REPLAY_PER_S, Publisher
from edgekit.devices.spool import MAX_AGE_S, MAX_BYTES, Spool, spool_folder
from edgekit.embedded_broker import EmbeddedBroker, is_embedded
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput
from edgekit.messages import PREFIX, PredictionMessage, check_prefix, default_device_id

logger = logging.getLogger(__name__)

# How long a finite source waits for the embedded broker's first subscriber.
SUBSCRIBER_TIMEOUT_S = 10.0


def _read(path: str | os.PathLike[str], labels: str | os.PathLike[str] | None, hop_s: float | None) -> Bundle:
    """The bundle, with a hop of another length if told so."""
    of_bundle = read(path, labels)
    if hop_s is None:
        return of_bundle
    given = of_bundle.input
    if not isinstance(given, AudioInput) or given.streaming:
        kind = "streams sound by hops of its own" if isinstance(given, AudioInput) else "takes images"
        raise EdgekitError(
            "hop", expected="a bundle that takes windows of sound", got=f"one that {kind}", mend="leave it out"
        )
    if not 1 <= hop_s * given.sample_rate_hz < 2**31:
        raise EdgekitError("hop", expected="seconds, above 0", got=f"{hop_s:g}", mend="give how often to predict")
    hop_samples = round(hop_s * given.sample_rate_hz)
    return dataclasses.replace(of_bundle, input=msgspec.structs.replace(given, hop_samples=hop_samples))


def _open(source: str, of_bundle: Bundle, loop: bool, stop: threading.Event | None = None) -> Source:
    """The source, of what the bundle takes. Sound needs no OpenCV, images no soundfile."""
    if isinstance(of_bundle.input, AudioInput):
        from edgekit.devices.audio_sources import open_audio_source

        return open_audio_source(source, of_bundle.input, loop=loop, stop=stop)
    from edgekit.devices.sources import open_source

    return open_source(source, loop=loop, stop=stop)


def stream(
    bundle: str | os.PathLike[str],
    source: str,
    *,
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str = "auto",
    threads: int = 1,
    threshold: Threshold = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    hop_s: float | None = None,
    loop: bool = False,
    ops: Ops = (),
) -> Iterator[PredictionMessage]:
    """The predictions of ``bundle`` on ``source``, one by one, published nowhere. Otherwise as :func:`run`."""
    settings = Settings(default_device_id() if device_id is None else device_id, stream, threshold, top_k, max_fps)
    of_bundle = _read(bundle, labels, hop_s)
    with (
        _open(source, of_bundle, loop) as frames,
        Model(of_bundle, delegate=delegate, threads=threads, ops=ops) as model,
    ):
        yield from Pipeline(model, frames, settings)


def run(
    bundle: str | os.PathLike[str],
    source: str,
    *,
    broker: str | BrokerAddress = "mqtt://localhost",
    labels: str | os.PathLike[str] | None = None,
    device_id: str | None = None,
    stream: str = "main",
    delegate: str = "auto",
    threads: int = 1,
    threshold: Threshold = 0.0,
    top_k: int = 3,
    max_fps: float | None = None,
    hop_s: float | None = None,
    loop: bool = False,
    ops: Ops = (),
    spool: str | os.PathLike[str] | None = None,
    spool_bytes: int = MAX_BYTES,
    spool_age_s: float = MAX_AGE_S,
    replay_per_s: float = REPLAY_PER_S,
    prefix: str = PREFIX,
    commands: bool = True,
    home_assistant: bool = True,
    label_groups: Sequence[str] = (),
    stop: threading.Event | None = None,
    on_start: Callable[[], None] | None = None,
    on_prediction: Callable[[PredictionMessage], None] | None = None,
) -> Counts:
    """Streams ``source`` through ``bundle`` and publishes the predictions, to the end of the source.

    Args:
        bundle: an audio-tagging bundle, or any ``.tflite`` that classifies images.
        source: ``camera:N``, ``rtsp://…``, ``http://…`` (MJPEG), or the path of a video, an image or a folder of
            images; of sound: ``mic``, ``mic:NAME`` or the path of an audio file.
        broker: ``mqtt://[user:pass@]host[:port]``, ``mqtts://…``, ``embedded`` (a broker in this process, on
            127.0.0.1:1883) or ``none``.
        labels: a label file to use instead of the packed one.
        device_id: this device's name in the topics; the host's name by default.
        stream: this stream's name in the topics.
        delegate: ``auto`` or ``cpu``.
        threads: threads of the CPU kernels.
        threshold: leave out classes with a lower score: one for all, or by label, ``"*"`` for all others.
        top_k: name so many classes at most.
        max_fps: take no more frames a second.
        hop_s: take a window of sound so often, instead of as the bundle says.
        loop: start a file source again at its end.
        ops: kernels of custom operators beside EdgeKit's own, as :func:`edgekit.load` takes them.
        spool: folder in which predictions are kept until the broker has them; by default that of ``STATE_DIRECTORY``,
            as systemd sets it, else ``~/.local/state/edgekit``; ``none``: in memory alone.
        spool_bytes: so many are kept at most, the oldest given up first.
        spool_age_s: so old they become.
        replay_per_s: what was kept is sent no faster.
        prefix: what topics begin with.
        commands: carry out what arrives on ``<base>/command``.
        home_assistant: announce the device to Home Assistant.
        label_groups: ``NAME=LABEL,LABEL``: a binary sensor of Home Assistant each.
        stop: ends the run when set.
        on_start: called when all is open, before the first frame.
        on_prediction: called with each prediction when it has been given to the publisher.

    Returns:
        What became of the frames.

    Raises:
        EdgekitError: the bundle, the source or the broker cannot be used as asked.
    """
    stop = stop or threading.Event()
    settings = Settings(default_device_id() if device_id is None else device_id, stream, threshold, top_k, max_fps)
    of_bundle = _read(bundle, labels, hop_s)
    check_prefix(prefix)
    groups = parse_groups(label_groups, of_bundle.labels)
    with ExitStack() as stack:
        frames = stack.enter_context(_open(source, of_bundle, loop, stop))
        model = stack.enter_context(Model(of_bundle, delegate=delegate, threads=threads, ops=ops))
        pipeline = Pipeline(model, frames, settings)
        sinks: list[Callable[[PredictionMessage], None]] = []
        if broker != "none":
            embedded = EmbeddedBroker(broker) if isinstance(broker, str) and is_embedded(broker) else None
            if embedded:
                stack.enter_context(embedded)
            address = embedded.address if embedded else parse_broker(broker)
            # An embedded broker ends with this process: what it does not get is not for another one.
            in_memory = embedded or spool == "none"
            path = None if in_memory else spool_folder(spool) / f"{settings.device_id}.{settings.stream}.sqlite"
            info = pipeline.info()
            publisher = Publisher(
                address,
                info,
                settings.stream,
                Spool(path, max_bytes=spool_bytes, max_age_s=spool_age_s),
                stop,
                wait=not frames.live,
                prefix=prefix,
                replay_per_s=replay_per_s,
                health=pipeline.health,
                commands=Commands(pipeline) if commands else None,
                discovery=Discovery(
                    settings.device_id, discovery(info, {settings.stream: of_bundle.labels}, groups, prefix=prefix)
                )
                if home_assistant
                else None,
            )
            stack.enter_context(publisher)
            sinks.append(publisher.prediction)
            if embedded and not frames.live:
                logger.info("%s is open; waiting up to %g s for a subscriber", address, SUBSCRIBER_TIMEOUT_S)
                if not embedded.wait_for_subscriber(SUBSCRIBER_TIMEOUT_S, stop, besides=publisher.filters):
                    logger.warning("no subscriber came; going on without")
        if on_prediction:
            sinks.append(on_prediction)
        if on_start:
            on_start()
        try:
            for message in pipeline:
                for sink in sinks:
                    sink(message)
        finally:
            logger.info("%s", pipeline.counts)
    return pipeline.counts

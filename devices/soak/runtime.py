"""The runtime of a soak without a model: made predictions at a steady rate, by way of the real publisher and spool."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path

import msgspec

import edgekit
from edgekit.broker import parse_broker
from edgekit.decode import Prediction
from edgekit.devices.publish.publisher import Publisher
from edgekit.devices.publish.spool import Spool
from edgekit.devices.results import Result
from edgekit.messages import (
    BundleRef,
    InfoMessage,
    Latency,
    PredictionMessage,
    StreamInfo,
    Versions,
    timestamp,
)


class Told(msgspec.Struct):
    """What is printed, one JSON object a line, when the publisher has taken a prediction.

    ``call_ms``: what that took; ``shed``: what was given up since the start, by cause.
    """

    id: str
    call_ms: float | None = None
    shed: dict[str, int] = {}


def main() -> None:
    """Runs until SIGTERM; ``--rate 0`` sends what an earlier one left."""
    parser = argparse.ArgumentParser()
    for name in ("--broker", "--device-id", "--stream", "--spool"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rate", type=float, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")
    stop = threading.Event()
    # in another thread, as this one may be about to wait for the event, with its lock held
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stop.set).start())

    boot_id, bundle = uuid.uuid4().hex[:12], BundleRef("soak", "1", "0" * 64)
    info = InfoMessage(
        schema="edgekit.info/1",
        device=given.device_id,
        boot_id=boot_id,
        profile="soak",
        versions=Versions(edgekit.__version__, sys.version.split()[0], "none"),
        streams={given.stream: StreamInfo(bundle, "none", "made")},
    )
    spool = Spool(Path(given.spool) / f"{given.device_id}.{given.stream}.sqlite")
    client_id = f"edgekit-{given.device_id}-{given.stream}"
    with Publisher(parse_broker(given.broker), info, client_id, spool, stop) as publisher:
        seq, next_s = 0, time.monotonic()
        while not stop.wait(max(0.0, next_s - time.monotonic()) if given.rate else None):
            next_s += 1 / given.rate
            seq += 1
            message = PredictionMessage(
                schema="edgekit.prediction/1",
                id=f"{boot_id}-{seq}",
                boot_id=boot_id,
                seq=seq,
                device=given.device_id,
                stream=given.stream,
                captured_at=timestamp(datetime.now(timezone.utc)),
                replayed=False,
                bundle=bundle,
                delegate="none",
                latency_ms=Latency(0.0, 0.0, 0.0),
                predictions=[Prediction(seq // 20 % 2, "made", 0.9)],
            )
            began_s = time.perf_counter()
            publisher.publish(given.stream, Result(message, [], None), wait=None)
            told = Told(message.id, round(1e3 * (time.perf_counter() - began_s), 4), spool.shed)
            sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

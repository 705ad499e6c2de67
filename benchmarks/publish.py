"""What the spool costs: messages a second against plain paho, and the time that a publish call takes.

    python benchmarks/publish.py [FOLDER]    # a folder for the spool, on the disk to be measured

Needs mosquitto. Both senders take turns within one run, on one broker.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgekit.broker import parse_broker
from edgekit.decode import Prediction
from edgekit.devices.publish.publisher import Publisher
from edgekit.devices.publish.spool import Spool
from edgekit.devices.results import Result
from edgekit.devices.soak.mosquitto import Mosquitto
from edgekit.messages import BundleRef, InfoMessage, Latency, PredictionMessage, Versions, encode

MESSAGES = 10_000
ROUNDS = 5


def message(seq: int) -> PredictionMessage:
    return PredictionMessage(
        schema="edgekit.prediction/1", id=f"b-{seq}", boot_id="b", seq=seq, device="bench", stream="main",
        captured_at="2026-11-22T03:04:05.678Z", replayed=False, bundle=BundleRef("digits", "1", "9f" * 32),
        delegate="cpu", latency_ms=Latency(0.4, 2.8, 3.4), predictions=[Prediction(7, "7", 0.91)],
    )  # fmt: skip


INFO = InfoMessage(
    schema="edgekit.info/1", device="bench", boot_id="b", profile="bench", versions=Versions("0", "3", "-"), streams={}
)


def plain_paho(port: int) -> tuple[float, float]:
    """Messages a second from memory, until the last is acknowledged, and microseconds of CPU time for each."""
    done, left = threading.Event(), [MESSAGES]
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)

    def acknowledged(*_arguments: object) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    client.on_publish = acknowledged
    client.connect("127.0.0.1", port)
    client.loop_start()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for seq in range(MESSAGES):
        client.publish("edgekit/bench/main/prediction", encode(message(seq + 1)), qos=1)
    done.wait()
    result = MESSAGES / (time.perf_counter() - began_s), 1e6 * (time.process_time() - cpu_s) / MESSAGES
    client.disconnect()
    client.loop_stop()
    return result


def spooled(port: int, folder: Path) -> tuple[float, float]:
    """The same by way of a publisher and its spool."""
    publisher = Publisher(
        parse_broker(f"mqtt://127.0.0.1:{port}"),
        INFO,
        "edgekit-bench",
        Spool(folder / "rate.sqlite"),
        threading.Event(),
    )
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for seq in range(MESSAGES):
        publisher.publish("main", Result(message(seq + 1), [], None), wait=threading.Event())
    publisher._flush()
    result = MESSAGES / (time.perf_counter() - began_s), 1e6 * (time.process_time() - cpu_s) / MESSAGES
    publisher.close()
    return result


def calls_ms(port: int, folder: Path, rate: float, *, busy: bool, seconds: float = 20.0) -> np.ndarray:
    """Milliseconds that each call of ``publish`` took, at ``rate`` a second; ``busy``: with work in between that, as
    an invoke, leaves Python to others."""
    address, stop = parse_broker(f"mqtt://127.0.0.1:{port}"), threading.Event()
    publisher = Publisher(address, INFO, "edgekit-bench", Spool(folder / "calls.sqlite"), stop)
    work = np.ones((256, 256), np.float32)
    took: list[float] = []
    next_s = time.perf_counter()
    for seq in range(int(rate * seconds)):
        next_s += 1 / rate
        while time.perf_counter() < next_s:
            if busy:
                np.matmul(work, work)
            else:
                time.sleep(max(0.0, next_s - time.perf_counter()))
        one = Result(message(seq + 1), [], None)
        began_s = time.perf_counter()
        publisher.publish("main", one, wait=None)
        took.append(1e3 * (time.perf_counter() - began_s))
    stop.set()
    publisher.close()
    return np.array(took)


def report(what: str, took: np.ndarray) -> None:
    p50, p99, worst = np.percentile(took, [50, 99, 100])
    print(f"publish call, {what:30}  p50 {p50:.3f} ms, p99 {p99:.3f} ms, at most {worst:.2f} ms")


def main() -> None:
    logging.disable(logging.CRITICAL)
    where = sys.argv[1] if len(sys.argv) > 1 else None
    if where:
        Path(where).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        with Mosquitto(folder, lasting=False) as broker:
            port = broker.port
            print(f"{len(encode(message(1)))} bytes, {MESSAGES} messages, {ROUNDS} turns")
            rounds = [(plain_paho(port), spooled(port, folder)) for _ in range(ROUNDS)]
            plain, kept = (
                tuple(map(statistics.median, zip(*column, strict=True))) for column in zip(*rounds, strict=True)
            )
            print(f"plain paho, from memory  {plain[0]:7,.0f} a second, {plain[1]:.0f} us of CPU each")
            print(f"by way of the spool      {kept[0]:7,.0f} a second, {kept[1]:.0f} us of CPU each")
            ratios = sorted(one[0] / other[0] for other, one in rounds)
            print(f"ratio of rates {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            report("50 a second", calls_ms(port, folder, 50, busy=False))
            report("50 a second, busy between", calls_ms(port, folder, 50, busy=True))
            report("500 a second, busy between", calls_ms(port, folder, 500, busy=True))
        report("50 a second, broker away", calls_ms(port, folder, 50, busy=True))


if __name__ == "__main__":
    main()

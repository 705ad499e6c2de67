"""What the spool costs: messages a second against plain paho, and the time a publish call takes from the thread that predicts.

    python benchmarks/publish.py [FOLDER]    # a folder for the spool, on the disk to be measured

Needs mosquitto. Both senders take turns within one run, on one broker.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import statistics
import subprocess
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
from edgekit.devices.publisher import Publisher
from edgekit.devices.spool import Spool
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


def plain_paho(port: int) -> float:
    """Messages a second from memory, until the last is acknowledged."""
    done, left = threading.Event(), [MESSAGES]
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)

    def acknowledged(*_arguments: object) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    client.on_publish = acknowledged
    client.connect("127.0.0.1", port)
    client.loop_start()
    began_s = time.perf_counter()
    for seq in range(MESSAGES):
        client.publish("edgekit/bench/main/prediction", encode(message(seq + 1)), qos=1)
    done.wait()
    took_s = time.perf_counter() - began_s
    client.disconnect()
    client.loop_stop()
    return MESSAGES / took_s


def spooled(port: int, folder: Path) -> float:
    publisher = Publisher(
        parse_broker(f"mqtt://127.0.0.1:{port}"), INFO, "main", Spool(folder / "rate.sqlite"), threading.Event()
    )
    began_s = time.perf_counter()
    for seq in range(MESSAGES):
        publisher.prediction(message(seq + 1))
    while publisher._spool.messages:
        time.sleep(0.001)
    took_s = time.perf_counter() - began_s
    publisher.close()
    return MESSAGES / took_s


def calls_ms(port: int, folder: Path, rate: float, seconds: float, busy: bool) -> np.ndarray:
    """Milliseconds that each call of ``prediction`` took, at ``rate`` a second, with work in between that is NumPy's."""
    publisher = Publisher(
        parse_broker(f"mqtt://127.0.0.1:{port}"), INFO, "main", Spool(folder / "calls.sqlite"), threading.Event(), wait=False
    )
    work = np.ones((256, 256), np.float32)
    took, next_s = [], time.perf_counter()
    for seq in range(int(rate * seconds)):
        next_s += 1 / rate
        while time.perf_counter() < next_s:
            if busy:
                work @ work  # releases the interpreter's lock, as an invoke does
            else:
                time.sleep(max(0.0, next_s - time.perf_counter()))
        one = message(seq + 1)
        began_s = time.perf_counter()
        publisher.prediction(one)
        took.append(1e3 * (time.perf_counter() - began_s))
    publisher._stop.set()
    publisher.close()
    return np.array(took)


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n")
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        broker = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        try:
            rates = [(plain_paho(port), spooled(port, folder)) for _ in range(ROUNDS)]
            plain, kept = (statistics.median(column) for column in zip(*rates, strict=True))
            ratios = sorted(one / other for other, one in rates)
            print(f"{len(encode(message(1)))} bytes, {MESSAGES} messages, {ROUNDS} turns")
            print(f"plain paho, from memory   {plain:8,.0f} a second")
            print(f"by way of the spool       {kept:8,.0f} a second, {statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            results = {"plain_per_s": plain, "spooled_per_s": kept, "ratio": statistics.median(ratios)}
            for rate, busy in ((50, False), (50, True), (500, True)):
                took = calls_ms(port, folder, rate, 10, busy)
                p50, p99, worst = np.percentile(took, [50, 99, 100])
                print(f"publish call, {rate} a second, {'busy' if busy else 'idle'}: p50 {p50:.3f} ms, p99 {p99:.3f} ms, at most {worst:.2f} ms")
                results[f"call_p99_ms_{rate}_{'busy' if busy else 'idle'}"] = float(p99)
        finally:
            broker.terminate()
            broker.wait()
        broker = None
        took = calls_ms(port, folder, 50, 10, True)
        p50, p99, worst = np.percentile(took, [50, 99, 100])
        print(f"publish call, 50 a second, broker away: p50 {p50:.3f} ms, p99 {p99:.3f} ms, at most {worst:.2f} ms")
        print(json.dumps(results))


if __name__ == "__main__":
    main()

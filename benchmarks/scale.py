"""Many devices on one Mosquitto, and a group of consumers that share what they say: what is lost, and how late it is.

    python benchmarks/scale.py [--devices 1000] [--rate 1 2 4 ...] [--consumers 1 2 4] [--seconds 30] [--runs 1] [--tls]
    python benchmarks/scale.py --broker mqtts://cluster    # user, password and certificates as edgekit run takes them

Each device is a connection of its own (MQTT 5, QoS 1) that publishes a prediction ``--rate`` times a second, at times
that do not wait for anyone; a message is as late as it is received after the time at which it was due, by a program
that iterates over an ``edgekit.Subscriber``. All devices are one process, each consumer is one. With several rates, a
number of consumers is left off at the first rate at which a message is lost or the 99th percentile is past a second.
Exit status 1 if that is the first rate. "others" is what everything else on the machine took: repeat it if it is much.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from microphone import cpu_s
from paho.mqtt.enums import CallbackAPIVersion

from edgekit import Prediction, Subscriber
from edgekit.accounting import Accounting
from edgekit.broker import BrokerAddress, parse_broker
from edgekit.messages import BundleRef, Latency, PredictionMessage, encode, timestamp, topic

# The broker keeps what a consumer is behind, up to a bound, and is told to keep more than the default of 1,000.
SETTINGS = ["allow_anonymous true", "max_queued_messages 100000", "max_inflight_messages 100", "user root"]
TLS_SETTINGS = ["cafile ca.crt", "certfile server.crt", "keyfile server.key", "require_certificate true"]
# On a broker that others use too.
PREFIX = "edgekit-scale"
CERTIFICATE = Path(__file__).parents[1] / "examples" / "mosquitto" / "certificate"
LATE_MS = 1000.0
# A consumer ends when the devices have, and it has received nothing for so long.
IDLE_S = 2.0
LABELS = ("tabby", "macaw", "delivery van")


@dataclass(frozen=True)
class Sent:
    """What the devices did: messages per device, those the broker did not acknowledge, how late they were sent."""

    each: int
    unacknowledged: int
    behind_p99_ms: float
    cpu_s: float
    payload_bytes: int


@dataclass(frozen=True)
class Received:
    """What one consumer got, and how long after it was due each message came."""

    accounting: bytes
    late_ms: np.ndarray
    cpu_s: float


def allow_many_files() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def prediction(device: str, seq: int, due_s: float) -> PredictionMessage:
    return PredictionMessage(
        schema="edgekit.prediction/1",
        id=f"3f9c2a417b60-{seq}",
        boot_id="3f9c2a417b60",
        seq=seq,
        device=device,
        stream="door",
        captured_at=timestamp(datetime.fromtimestamp(due_s, timezone.utc)),
        replayed=False,
        bundle=BundleRef("door", "1", 64 * "0"),
        delegate="cpu",
        latency_ms=Latency(0.4, 2.8, 3.4),
        predictions=[Prediction(number, label, 0.6 / (number + 1)) for number, label in enumerate(LABELS)],
    )


def devices(address: BrokerAddress, count: int, rate: float, seconds: float, pipe: Connection) -> None:
    """Connects, says so, waits for the word, and publishes."""
    allow_many_files()
    selector, acknowledged, connected, tls = selectors.DefaultSelector(), 0, 0, address.tls_context()

    def on_publish(*_: object) -> None:
        nonlocal acknowledged
        acknowledged += 1

    def on_connect(*_: object) -> None:
        nonlocal connected
        connected += 1

    clients: list[paho.Client] = []
    for number in range(count):
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"edgekit-{number}", protocol=paho.MQTTv5)
        client.on_publish, client.on_connect = on_publish, on_connect
        if tls:
            client.tls_set_context(tls)
        client.connect(address.host, address.port, keepalive=300)
        selector.register(client.socket(), selectors.EVENT_READ, client)
        clients.append(client)

    def serve(wait_s: float) -> None:
        for key, _ in selector.select(wait_s):
            key.data.loop_read()
            while tls and key.fileobj.pending():  # read from the socket already
                key.data.loop_read()

    while connected < count:
        serve(1.0)
    pipe.send(None)
    pipe.recv()
    chance = random.Random(count)
    phases = sorted((chance.random() / rate, number) for number in range(count))
    each, behind_ms, cpu_before_s, start_s = round(seconds * rate), [], own_cpu_s(), time.time()
    for seq in range(1, each + 1):
        for phase_s, number in phases:
            due_s = start_s + (seq - 1) / rate + phase_s
            while (wait_s := due_s - time.time()) > 0:
                serve(wait_s)
            device = f"pi-{number}"
            payload = encode(prediction(device, seq, due_s))
            clients[number].publish(topic(device, "door", "prediction", prefix=PREFIX), payload, qos=1)
            behind_ms.append(1000 * (time.time() - due_s))
            if len(behind_ms) % 50 == 0:  # or acknowledgements wait for a moment without a message due
                serve(0.0)
    give_up_s = time.time() + 20
    while acknowledged < each * count and time.time() < give_up_s:
        serve(0.2)
    behind_p99_ms = float(np.percentile(behind_ms, 99))
    pipe.send(Sent(each, each * count - acknowledged, behind_p99_ms, own_cpu_s() - cpu_before_s, len(payload)))


def consumer(address: BrokerAddress, group: str, number: int, ended: Event, pipe: Connection) -> None:
    """Receives until the devices have ended and no more comes. The broker keeps its share, were it to die."""
    late_ms: list[float] = []
    name = f"{group}-{number}"
    with Subscriber(address, prefix=PREFIX, group=group, client_id=name, session_expiry_s=60) as subscriber:
        pipe.send(None)
        cpu_before_s = own_cpu_s()
        while True:
            try:
                message = subscriber.next(IDLE_S)
            except TimeoutError:
                if ended.is_set():
                    break
                continue
            now_s = time.time()
            assert message.captured_at
            due = datetime.fromisoformat(message.captured_at.replace("Z", "+00:00"))
            late_ms.append(1000 * (now_s - due.timestamp()))
    pipe.send(Received(subscriber.accounting.to_json(), np.array(late_ms), own_cpu_s() - cpu_before_s))


class Mosquitto:
    """One of our own. What it takes is NaN of a broker that is not ours."""

    def __init__(self, folder: Path, tls: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        config = folder / "mosquitto.conf"
        config.write_text("\n".join([f"listener {port} 127.0.0.1", *SETTINGS, *(TLS_SETTINGS if tls else []), ""]))
        self.address = parse_broker(f"mqtt://127.0.0.1:{port}")
        if tls:
            for arguments in (["ca"], ["server", "localhost", "127.0.0.1"], ["device", "pi"]):
                subprocess.run([CERTIFICATE, *arguments], cwd=folder, check=True, capture_output=True)
            files = {"cafile": folder / "ca.crt", "certfile": folder / "pi.crt", "keyfile": folder / "pi.key"}
            paths = {name: str(path) for name, path in files.items()}
            self.address = parse_broker(f"mqtts://127.0.0.1:{port}", **paths)
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self._process = subprocess.Popen([program, "-c", config], cwd=folder, stderr=subprocess.DEVNULL)
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        sys.exit("mosquitto does not start; install it")

    def cpu_s(self) -> float:
        return cpu_s(self._process.pid)

    def resident_kb(self) -> float:
        return int(Path(f"/proc/{self._process.pid}/status").read_text().partition("VmRSS:")[2].split()[0])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@dataclass(frozen=True)
class Elsewhere:
    """A broker that runs already: what it takes cannot be seen from here."""

    address: BrokerAddress

    def cpu_s(self) -> float:
        return np.nan

    resident_kb = cpu_s

    def close(self) -> None:
        """It is not ours."""


def busy_s() -> float:
    """What all cores of this machine have worked so far, for whomever."""
    user, nice, system, _idle, _waiting, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def measure(
    broker: Mosquitto | Elsewhere, devices_count: int, rate: float, consumers_count: int, seconds: float
) -> bool:
    """Prints a row; whether all arrived and 99 of 100 within a second."""
    context = multiprocessing.get_context("spawn")
    empty_kb, idle_s = broker.resident_kb(), broker.cpu_s()
    try:
        ended = context.Event()
        pipes = [context.Pipe() for _ in range(consumers_count + 1)]
        ours = [pair[0] for pair in pipes]
        arguments = (broker.address, devices_count, rate, seconds, pipes[0][1])
        processes = [context.Process(target=devices, args=arguments, daemon=True)]
        # Of a name of its own: the sessions of a run before would take their share of this one.
        group = f"scale-{uuid.uuid4().hex[:8]}"
        for number, (_, theirs) in enumerate(pipes[1:]):
            each = (broker.address, group, number, ended, theirs)
            processes.append(context.Process(target=consumer, args=each, daemon=True))
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that one that ends is heard of
        for pipe in ours:
            pipe.recv()
        connection_kb = (broker.resident_kb() - empty_kb) / devices_count
        connection_us = 1e6 * (broker.cpu_s() - idle_s) / devices_count
        before_s, busy_before_s, started_s = broker.cpu_s(), busy_s(), time.monotonic()
        ours[0].send(None)
        sent: Sent = ours[0].recv()
        ended.set()
        received: list[Received] = [pipe.recv() for pipe in ours[1:]]
        broker_s, all_s = broker.cpu_s() - before_s, busy_s() - busy_before_s
        took_s = time.monotonic() - started_s
        for process in processes:
            process.join(10)
    finally:
        broker.close()
    came = Accounting.merge(Accounting.from_json(part.accounting) for part in received)
    late_ms = np.concatenate([part.late_ms for part in received])
    lost = sent.each * devices_count - came.predictions
    p50, p99, worst = np.percentile(late_ms, [50, 99, 100]) if len(late_ms) else (np.inf,) * 3
    consumers_s = [part.cpu_s for part in received]
    others_s = all_s - broker_s - sent.cpu_s - sum(consumers_s)
    each_us = [f"{1e6 * used_s / len(late_ms):.0f}" for used_s in (broker_s, sent.cpu_s, sum(consumers_s))]
    row = (
        (9, consumers_count), (10, f"{rate * devices_count:,.0f}"), (9, f"{sent.each * devices_count:,}"), (6, lost),
        (6, came.duplicates), (6, sent.unacknowledged), (8, f"{p50:.1f}"), (8, f"{p99:.1f}"),
        (8, f"{worst:.1f}"), (9, f"{sent.behind_p99_ms:.1f}"), (6, each_us[0]), (7, each_us[1]), (9, each_us[2]),
        (10, f"{others_s / took_s:.1f}"), (7, f"{connection_kb:.1f}"), (5, f"{connection_us:.0f}"),
        (6, sent.payload_bytes),
    )  # fmt: skip
    print(*(f"{value:>{width}}" for width, value in row), flush=True)
    return not lost and not sent.unacknowledged and p99 < LATE_MS


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures many devices and a group of consumers on one broker.")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="messages a second of each device")
    parser.add_argument("--consumers", type=int, nargs="+", default=[1, 2, 4], help="of one group")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the devices publish")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--broker", help="that runs already, instead of a Mosquitto")
    parser.add_argument("--tls", action="store_true", help="with client certificates")
    options = parser.parse_args()
    allow_many_files()
    elsewhere = Elsewhere(parse_broker(options.broker)) if options.broker else None
    print(f"{'CPU time of a message, us':>99}{'others,':>12}{'a connection':>14}")
    print(
        "consumers messages/s      sent   lost double un-ack   p50 ms   p99 ms   max ms  sent p99 broker devices"
        " consumers      cores      kB    us  bytes"
    )
    good = True
    for _ in range(options.runs):
        for consumers_count in options.consumers:
            for number, rate in enumerate(options.rate):
                with tempfile.TemporaryDirectory() as folder:
                    broker = elsewhere or Mosquitto(Path(folder), options.tls)
                    reached = measure(broker, options.devices, rate, consumers_count, options.seconds)
                good &= reached or number > 0
                if not reached:
                    break
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

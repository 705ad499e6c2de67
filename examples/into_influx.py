"""Writes predictions and the health of all devices as InfluxDB line protocol, for Telegraf.

    python examples/into_influx.py [--broker mqtt://hub]

In telegraf.conf:

    [[inputs.execd]]
      command = ["python3", "/opt/into_influx.py", "--broker", "mqtt://hub"]
      data_format = "influx"

A prediction becomes a line for each class it names, at the time of its frame: one that comes twice overwrites itself.
Certificates and a password come from the variables EDGEKIT_MQTT_CAFILE, _CERT, _KEY, _USERNAME and _PASSWORD_FILE.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

from edgekit import Subscriber
from edgekit.messages import HealthMessage, PredictionMessage


def tag(value: str) -> str:
    """``value`` as line protocol has it: it has no line ends there, nor a backslash at the end."""
    return re.sub(r"([, =])", r"\\\1", re.sub(r"\s", " ", value).rstrip("\\")) or "-"


def of_prediction(prediction: PredictionMessage) -> Iterator[str]:
    captured_at = datetime.fromisoformat(prediction.captured_at.replace("Z", "+00:00"))
    at_ns = round(captured_at.timestamp() * 1000) * 1_000_000
    for rank, named in enumerate(prediction.predictions, 1):
        tags = f"device={prediction.device},stream={prediction.stream},label={tag(named.label)}"
        yield f"edgekit,{tags} score={named.score},rank={rank}i,total_ms={prediction.latency_ms.total} {at_ns}"


def of_health(device: str, health: HealthMessage) -> str:
    fields = {
        "fps": health.fps,
        "inferred": f"{health.inferred}i",
        "dropped": f"{sum(health.dropped.values())}i",
        "failed": f"{health.failed}i",
        "p99_ms": health.latency_ms.p99,
        "spooled": f"{health.spool.messages}i",
        "shed": f"{sum(health.spool.shed.values())}i",
        "cpu_temp_c": health.cpu_temp_c,
    }
    known = ",".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    return f"edgekit_health,device={device} {known}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes predictions and health as InfluxDB line protocol.")
    parser.add_argument("--broker", default="mqtt://localhost")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    subscriber = Subscriber(given.broker, kinds=("prediction", "health"), patience_s=60)
    print("receiving", file=sys.stderr)
    with suppress(KeyboardInterrupt), subscriber:
        for message in subscriber:
            if message.prediction:
                for line in of_prediction(message.prediction):
                    print(line)
            elif message.health:
                print(of_health(message.device, message.health))
            sys.stdout.flush()
    print(subscriber.accounting, file=sys.stderr)


if __name__ == "__main__":
    main()

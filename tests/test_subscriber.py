from __future__ import annotations

import json
import logging
import subprocess
from typing import Any

import msgspec
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edgekit import Subscriber
from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError, EdgekitError
from edgekit.messages import PredictionMessage

PREDICTION = {
    "schema": "edgekit.prediction/1", "id": "b-1", "boot_id": "b", "seq": 1, "device": "pi", "stream": "door",
    "captured_at": "2026-11-22T03:04:05.678Z", "replayed": False,
    "bundle": {"name": "n", "version": "1", "sha256": "00"}, "delegate": "cpu",
    "latency_ms": {"preprocess": 0.4, "inference": 2.8, "total": 3.4},
    "predictions": [{"class_id": 3, "label": "macaw", "score": 0.91}],
}  # fmt: skip


def publish(broker: Any, topic: str, payload: object, *options: str) -> None:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    subprocess.run(
        ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-t", topic, "-m", text, *options],
        check=True,
    )


def test_message_is_typed(broker: Any) -> None:
    with Subscriber(broker.url, device="pi", stream="door") as subscriber:
        publish(broker, "edgekit/pi/door/prediction", PREDICTION)
        message = subscriber.next(10)
    assert (message.kind, message.device, message.stream) == ("prediction", "pi", "door")
    assert (message.label, message.score, message.captured_at) == ("macaw", 0.91, "2026-11-22T03:04:05.678Z")
    assert message.prediction == msgspec.convert(PREDICTION, PredictionMessage)


def test_missing_holds_the_seqs_that_never_came(broker: Any) -> None:
    with Subscriber(broker.url) as subscriber:
        for seq in (5, 6, 9, 10):
            publish(broker, "edgekit/pi/door/prediction", {**PREDICTION, "seq": seq})
        publish(broker, "edgekit/pi/door/prediction", {**PREDICTION, "seq": 1, "boot_id": "c"})
        assert [list(subscriber.next(10).missing) for _ in range(5)] == [[], [], [7, 8], [], []]


def test_only_what_was_asked_for_arrives(broker: Any) -> None:
    with Subscriber(broker.url, device="pi", kinds=("prediction", "status")) as subscriber:
        publish(broker, "edgekit/other/door/prediction", PREDICTION)
        publish(broker, "edgekit/pi/door/state", {"a": 1})
        publish(broker, "edgekit/pi/status", "online")
        message = subscriber.next(10)
        assert (message.kind, message.device, message.payload, message.label) == ("status", "pi", "online", None)
        with pytest.raises(TimeoutError):
            subscriber.next(0.3)


def test_message_of_others_is_skipped_with_a_warning(broker: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with Subscriber(broker.url) as subscriber:
        for payload in ("not JSON", "[" * 100_000, {**PREDICTION, "seq": "many"}):
            publish(broker, "edgekit/pi/door/prediction", payload)
        publish(broker, "edgekit/pi/door/prediction", PREDICTION)
        assert subscriber.next(10).label == "macaw"
    assert caplog.text.count("skipped") == 3


def test_group_shares_the_messages(broker: Any) -> None:
    with Subscriber(broker.url, group="g") as one, Subscriber(broker.url, group="g") as other:
        for seq in range(1, 21):
            publish(broker, "edgekit/pi/door/prediction", {**PREDICTION, "seq": seq})
        received = [[], []]
        for mine, subscriber in zip(received, (one, other), strict=True):
            try:
                while True:
                    mine.append(subscriber.next(1).prediction.seq)
            except TimeoutError:
                pass
    assert received[0] and received[1]
    assert sorted(received[0] + received[1]) == list(range(1, 21))


@pytest.mark.parametrize("names", [{"device": "a/b"}, {"stream": "#"}, {"group": "+"}])
def test_name_that_cannot_stand_in_a_topic_is_refused(names: Any) -> None:
    with pytest.raises(EdgekitError, match="expected a name of a-z"):
        Subscriber("mqtt://localhost", **names)


def test_group_on_a_broker_without_mqtt_5_is_an_error(free_port: Any) -> None:
    url = f"127.0.0.1:{free_port()}"
    with EmbeddedBroker(f"embedded://{url}"), pytest.raises(BrokerError, match="MQTT 5"):
        Subscriber(f"mqtt://{url}", group="g")


def test_subscription_that_is_refused_is_an_error(mosquitto: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Mosquitto 2.0 accepts every subscription; the answer is put in its place here."""
    broker = mosquitto()
    with Subscriber(broker.url) as subscriber:
        subscriber._answered([ReasonCode(PacketTypes.SUBACK, "Not authorized")])
        with pytest.raises(BrokerError, match="refused the subscription: not authorized"):
            subscriber.next(5)


def test_unreachable_broker_is_an_error(free_port: Any) -> None:
    with pytest.raises(BrokerError, match="cannot be reached"):
        Subscriber(f"mqtt://127.0.0.1:{free_port()}")

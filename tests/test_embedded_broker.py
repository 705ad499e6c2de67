from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError
from edgekit.mqtt import connect


def test_delivers_everything_before_it_closes(free_port: Callable[[], int]) -> None:
    received: list[bytes] = []
    with EmbeddedBroker(f"embedded://127.0.0.1:{free_port()}") as broker:
        assert not broker.wait_for_subscriber(0.05, threading.Event())
        subscriber = connect(
            broker.address,
            "subscriber",
            on_connect=lambda client: client.subscribe("#", 1),
            on_message=lambda message: received.append(message.payload),
        )
        assert broker.wait_for_subscriber(5, threading.Event())
        publisher = connect(broker.address, "publisher")
        sent = [publisher.publish("a", str(number), qos=1) for number in range(1000)]
        sent[-1].wait_for_publish(30)
        publisher.disconnect()
        publisher.loop_stop()
    assert [int(payload) for payload in received] == list(range(1000))
    subscriber.disconnect()
    subscriber.loop_stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "embedded-broker"]


def test_port_that_is_taken_is_an_error(free_port: Callable[[], int]) -> None:
    url = f"embedded://127.0.0.1:{free_port()}"
    with EmbeddedBroker(url), pytest.raises(BrokerError, match="cannot listen on mqtt://127"):
        EmbeddedBroker(url)


def test_url_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(BrokerError, match="expected embedded or embedded://host:port"):
        EmbeddedBroker("embedded://host:port")

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError
from edgekit.mqtt import Connection

pytestmark = pytest.mark.no_runtime


def test_delivers_everything_before_it_closes(free_port: Callable[[], int]) -> None:
    received: list[bytes] = []
    sent = threading.Event()
    acknowledged: list[int] = []

    def publish() -> None:
        for number in range(1000):
            publisher.publish("a", str(number))

    def on_publish(mid: int, _reason: Any) -> None:
        acknowledged.append(mid)
        if len(acknowledged) == 1000:
            sent.set()

    with EmbeddedBroker(f"embedded://127.0.0.1:{free_port()}") as broker:
        assert not broker.wait_for_subscriber(0.05, threading.Event())
        subscriber = Connection(
            broker.address,
            "subscriber",
            subscriptions=["#"],
            on_message=lambda message: received.append(message.payload),
        )
        subscriber.start()
        assert broker.wait_for_subscriber(5, threading.Event())
        publisher = Connection(broker.address, "publisher", on_connect=publish, on_publish=on_publish)
        publisher.start()
        assert sent.wait(30)
        publisher.close()
    assert [int(payload) for payload in received] == list(range(1000))
    subscriber.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "embedded-broker"]


@pytest.mark.parametrize("flags", [0x02, 0x06], ids=["", "with a Last Will"])
def test_mqtt_5_is_refused(free_port: Callable[[], int], flags: int) -> None:
    """As 3.1.1 has it, so that the client connects again with that; amqtt would wait for more to come."""
    will = b"\x00\x00\x01a\x00\x01b" if flags & 0x04 else b""
    body = b"\x00\x04MQTT\x05" + bytes([flags]) + b"\x00\x1e\x05\x11\x00\x00\x00\x3c\x00\x03one" + will
    port = free_port()
    with EmbeddedBroker(f"embedded://127.0.0.1:{port}"), socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"\x10" + bytes([len(body)]) + body)
        assert client.recv(100) == b"\x20\x02\x00\x01"
        assert client.recv(100) == b""


def test_port_that_is_taken_is_an_error(free_port: Callable[[], int]) -> None:
    url = f"embedded://127.0.0.1:{free_port()}"
    with EmbeddedBroker(url), pytest.raises(BrokerError, match="cannot listen on mqtt://127"):
        EmbeddedBroker(url)


@pytest.mark.parametrize(
    "url",
    ["embedded://host:port", "embedded:1884", "embedded:1884/x", "embedded://[::1", "embedded://h:0",
     "embedded://h:1884/topic", "embedded://ann:s3cret@127.0.0.1:1884"],
)  # fmt: skip
def test_url_that_cannot_be_read_is_an_error(url: str) -> None:
    with pytest.raises(BrokerError, match="expected embedded or embedded://host:port") as caught:
        EmbeddedBroker(url)
    assert "s3cret" not in str(caught.value)


def test_listens_on_an_ipv6_address(free_port: Callable[[], int]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    port = free_port()
    with EmbeddedBroker(f"embedded://[::1]:{port}") as broker:
        socket.create_connection(("::1", port), 5).close()
        client = Connection(broker.address, "one")
        assert client.start()
        client.close()
        assert str(broker.address) == f"mqtt://[::1]:{port}"

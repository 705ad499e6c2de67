from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from edgekit.broker import parse_broker
from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError
from edgekit.mqtt import connect


@pytest.mark.parametrize(
    ("url", "text", "credentials"),
    [
        ("mqtt://hub", "mqtt://hub:1883", (None, None)),
        ("mqtt://ann:s%40crét@10.0.0.1:1884", "mqtt://10.0.0.1:1884", ("ann", "s@crét")),
        ("mqtts://hub", "mqtts://hub:8883", (None, None)),
        ("mqtt://[::1]:99", "mqtt://[::1]:99", (None, None)),
    ],
)
def test_parse_broker(url: str, text: str, credentials: Any) -> None:
    address = parse_broker(url)
    assert (str(address), (address.username, address.password)) == (text, credentials)
    assert "s@crét" not in repr(address)


@pytest.mark.parametrize(
    "url", ["hub", "http://u:hunter2@hub", "mqtt://", "mqtt://u:hunter2@hub:x", "mqtt://hub/topic", ""]
)
def test_parse_broker_refuses_other_forms_and_keeps_the_password_to_itself(url: str) -> None:
    with pytest.raises(BrokerError, match="expected mqtt://") as caught:
        parse_broker(url)
    assert "hunter2" not in str(caught.value)


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_MQTT_USERNAME", "ann")
    monkeypatch.setenv("EDGEKIT_MQTT_PASSWORD", "secret")
    address = parse_broker("mqtt://hub")
    assert (address.username, address.password) == ("ann", "secret")


def test_connects_with_mqtt_5(broker: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = connect(parse_broker(broker.url), "one")
    assert client.protocol == paho.MQTTv5 and "MQTT 5" in caplog.text
    client.disconnect()
    client.loop_stop()


def test_falls_back_to_mqtt_3_1_1(free_port: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    with EmbeddedBroker(f"embedded://127.0.0.1:{port}"):
        client = connect(parse_broker(f"mqtt://127.0.0.1:{port}"), "one")
        assert client.protocol == paho.MQTTv311 and "MQTT 3.1.1" in caplog.text
        client.disconnect()
        client.loop_stop()


def test_unreachable_broker_is_told_apart(free_port: Callable[[], int]) -> None:
    with pytest.raises(BrokerError, match="cannot be reached"):
        connect(parse_broker(f"mqtt://127.0.0.1:{free_port()}"), "one")
    with pytest.raises(BrokerError, match="cannot be reached"):
        connect(parse_broker("mqtt://no-such-host.invalid"), "one")


def test_patience_waits_for_a_broker_that_comes_later(mosquitto: Callable[..., Any]) -> None:
    broker = mosquitto()
    broker.stop()
    threading.Timer(0.7, broker.start).start()
    client = connect(parse_broker(broker.url), "one", patience_s=10)
    assert client.is_connected()
    client.disconnect()
    client.loop_stop()


def test_refused_credentials_are_told_apart(mosquitto: Callable[..., Any], tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "ann", "right"], check=True)
    passwords.chmod(0o644)
    tmp_path.chmod(0o755)
    broker = mosquitto("allow_anonymous false", f"password_file {passwords}", "user root")
    with pytest.raises(BrokerError, match=r"refused the connection: not authori[sz]ed"):
        connect(parse_broker(f"mqtt://ann:wrong@127.0.0.1:{broker.port}"), "one")
    client = connect(parse_broker(f"mqtt://ann:right@127.0.0.1:{broker.port}"), "one")
    client.disconnect()
    client.loop_stop()


@pytest.mark.parametrize("hang_up", [True, False], ids=["hangs up", "keeps silent"])
def test_peer_that_is_no_broker_is_an_error(hang_up: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                peer, _ = server.accept()
                if hang_up:
                    peer.close()
                else:
                    peers.append(peer)

        peers: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(BrokerError, match="did not answer as an MQTT broker"):
            connect(parse_broker(f"mqtt://127.0.0.1:{server.getsockname()[1]}"), "one", timeout_s=1)
        for peer in peers:
            peer.close()


def test_reconnects_and_calls_on_connect_again(broker: Any) -> None:
    connections: list[float] = []
    client = connect(parse_broker(broker.url), "one", on_connect=lambda _: connections.append(time.monotonic()))
    broker.stop()
    broker.start()
    deadline = time.monotonic() + 15
    while len(connections) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    client.disconnect()
    client.loop_stop()
    assert len(connections) == 2

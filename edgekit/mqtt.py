"""Connecting to an MQTT broker: MQTT 5 first, 3.1.1 where the broker knows no better."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.errors import BrokerError

logger = logging.getLogger(__name__)

_NAMES = {MQTTProtocolVersion.MQTTv5: "MQTT 5", MQTTProtocolVersion.MQTTv311: "MQTT 3.1.1"}
_USAGE = "mqtt://[user:password@]host[:port], mqtts://…, embedded or none"


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker is, and what to speak with it, tried in that order. Its text form leaves out the credentials."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    protocols: tuple[MQTTProtocolVersion, ...] = (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_broker(url: str) -> BrokerAddress:
    """Parses ``mqtt://[user:password@]host[:port]`` (port 1883) or ``mqtts://…`` (8883).

    A user and password that the URL lacks come from ``EDGEKIT_MQTT_USERNAME`` and ``EDGEKIT_MQTT_PASSWORD``, which,
    unlike the URL, do not show in the process list.

    Raises:
        BrokerError: ``url`` is of another form. The message does not repeat it, as it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BrokerError("broker URL cannot be read", expected=_USAGE, mend="percent-encode odd characters") from None
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/"):
        raise BrokerError(
            "broker URL",
            expected=_USAGE,
            got=f"scheme {parts.scheme!r}, host {parts.hostname!r}" + (", a path" if parts.path.strip("/") else ""),
            mend="give scheme and host, and no more than a port",
        )
    tls = parts.scheme == "mqtts"
    return BrokerAddress(
        host=parts.hostname,
        port=port or (8883 if tls else 1883),
        tls=tls,
        username=unquote(parts.username) if parts.username else os.environ.get("EDGEKIT_MQTT_USERNAME"),
        password=unquote(parts.password) if parts.password else os.environ.get("EDGEKIT_MQTT_PASSWORD"),
    )


def connect(
    address: BrokerAddress,
    client_id: str,
    *,
    will: tuple[str, str] | None = None,
    on_connect: Callable[[paho.Client], object] | None = None,
    on_message: Callable[[paho.MQTTMessage], None] | None = None,
    on_publish: Callable[[int, ReasonCode], None] | None = None,
    on_subscribe: Callable[[list[ReasonCode]], None] | None = None,
    timeout_s: float = 10.0,
    patience_s: float = 0.0,
) -> paho.Client:
    """A client that is connected, with its network thread running; it reconnects by itself from then on.

    Args:
        will: topic and payload of a retained QoS 1 Last Will.
        on_connect: called after each connection, so after each reconnection too; subscribe and say ``online`` here.
        on_message: called for each message, in the network thread.
        on_publish: called with the message id of each message that the broker has answered, and its answer, there too.
        on_subscribe: called with the broker's answers to a subscription, one for each topic filter, there too.
        timeout_s: for the connection and for the broker's answer, each.
        patience_s: keep trying for so long while the broker cannot be reached.

    Raises:
        BrokerError: the broker cannot be reached, does not answer, or refuses the connection.
    """
    for protocol in address.protocols:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol)
        client.connect_timeout = timeout_s
        client.reconnect_delay_set(min_delay=1, max_delay=30)
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if address.tls:
            client.tls_set()
        if will:
            client.will_set(*will, qos=1, retain=True)
        if on_message:
            client.on_message = lambda _client, _userdata, message: on_message(message)
        if on_publish:
            client.on_publish = lambda _client, _userdata, mid, reason, _properties: on_publish(mid, reason)
        if on_subscribe:
            client.on_subscribe = lambda _client, _userdata, _mid, reasons, _properties: on_subscribe(reasons)
        answer = _handshake(client, address, on_connect, timeout_s, patience_s)
        if answer is not None and not answer.is_failure:
            logger.info("connected to %s with %s", address, _NAMES[protocol])
            return client
        client.loop_stop()
        # An older broker refuses the version, or hangs up on a CONNECT it cannot read.
        if answer is not None and answer.getName() != "Unsupported protocol version":
            raise BrokerError(
                f"broker {address} refused the connection: {answer.getName().lower()}",
                mend="check the user and password, and the broker's access rules",
            )
    raise BrokerError(
        f"broker {address} accepted the connection but did not answer as an MQTT broker",
        mend="check that an MQTT broker listens there, and whether it wants TLS (mqtts://)",
    )


def _handshake(
    client: paho.Client,
    address: BrokerAddress,
    on_connect: Callable[[paho.Client], object] | None,
    timeout_s: float,
    patience_s: float,
) -> ReasonCode | None:
    """Connects, starts the network thread and waits: the broker's answer, None if it hung up or kept silent."""
    done = threading.Event()
    answers: list[ReasonCode] = []

    def connected(client: paho.Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            if answers:
                logger.warning("broker %s refused the connection: %s", address, reason)
        else:
            if answers:
                logger.info("connected to %s again", address)
            if on_connect:
                on_connect(client)
        answers.append(reason)
        done.set()

    def disconnected(_client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if answers and not answers[0].is_failure and reason.is_failure:
            logger.warning("connection to %s lost: %s; connecting again", address, reason)
        done.set()

    client.on_connect, client.on_disconnect = connected, disconnected
    deadline, waiting = time.monotonic() + patience_s, False
    while True:
        try:
            client.connect(address.host, address.port, keepalive=30)
            break
        except (OSError, ValueError) as error:
            if time.monotonic() >= deadline:
                raise BrokerError(
                    f"broker {address} cannot be reached ({error})",
                    mend="check host and port, and that the broker runs",
                ) from error
            if not waiting:
                logger.info("waiting for broker %s (%s)", address, error)
            waiting = True
            time.sleep(0.3)
    client.loop_start()
    done.wait(timeout_s)
    return answers[0] if answers else None


def unique_client_id(purpose: str) -> str:
    """A client id that no other client has; a second client of the same id would throw the first one out."""
    return f"edgekit-{purpose}-{uuid.uuid4().hex[:8]}"

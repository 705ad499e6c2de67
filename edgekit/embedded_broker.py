"""An MQTT broker inside the process (amqtt), for trying things out on a machine that has none."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from paho.mqtt.enums import MQTTProtocolVersion

from edgekit.broker import BrokerAddress
from edgekit.errors import BrokerError

logger = logging.getLogger(__name__)


class EmbeddedBroker:
    """A broker that serves while the ``with`` block lasts: MQTT 3.1.1, no authentication, nothing kept on disk.

    Args:
        url: ``embedded`` (127.0.0.1:1883) or ``embedded://host:port``.

    Raises:
        BrokerError: ``url`` is of another form, or the port is taken.
    """

    def __init__(self, url: str = "embedded") -> None:
        from amqtt.broker import Broker

        _mend_amqtt()
        self.address = _address(url)
        # amqtt logs an error for each MQTT 5 client, which connects again with 3.1.1
        logging.getLogger("amqtt").setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedded-broker", daemon=True)
        self._thread.start()
        try:
            self._broker = self._run(self._start(Broker))
        except Exception as error:
            self._stop_loop()
            raise BrokerError(
                f"embedded broker cannot listen on {self.address} ({error.__cause__ or error})",
                mend="stop what listens there, or give another port: embedded://127.0.0.1:1884",
            ) from error

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(15)

    async def _start(self, broker_class: Any) -> Any:
        # amqtt takes what is before the last colon for the host, and keeps the brackets of an IPv6 address
        bind = f"{self.address.host}:{self.address.port}"
        broker = broker_class(
            {
                "listeners": {"default": {"type": "tcp", "bind": bind}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )
        await broker.start()
        return broker

    def wait_for_subscriber(self, timeout_s: float, stop: threading.Event, besides: Sequence[str] = ()) -> bool:
        """Waits until someone has subscribed; False if no one did within ``timeout_s`` or before ``stop``.

        Args:
            besides: topic filters that do not count: they are our own.
        """

        def subscribed() -> bool:
            return any(topic_filter not in besides for topic_filter in tuple(self._broker.subscriptions))

        _wait(lambda: subscribed() or stop.is_set(), timeout_s)
        return subscribed()

    def drain(self, timeout_s: float) -> bool:
        """Waits until the subscribers have acknowledged all that was published."""

        def idle() -> bool:
            broker = self._broker
            sessions = [session for session, _ in tuple(broker._sessions.values())]
            return (
                all(session.delivered_message_queue.empty() for session in sessions)
                and broker._broadcast_queue.empty()
                and not any(not task.done() for task in tuple(broker._tasks_queue))
                and not any(session.inflight_out for session in sessions)
            )

        return _wait(idle, timeout_s)

    def close(self) -> None:
        if not self.drain(5.0):
            logger.warning("embedded broker stopped before its subscribers had received everything")
        try:
            self._run(self._broker.shutdown())
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _address(url: str) -> BrokerAddress:
    """The message of its error does not repeat the URL, which may hold a password meant for another broker."""
    try:
        parts = urlsplit(url)
        port = parts.port
        more = parts.path.strip("/") or parts.query or parts.fragment
        if url != "embedded" and (parts.scheme != "embedded" or "@" in url or port == 0 or more):
            raise ValueError
    except ValueError:
        raise BrokerError(
            "embedded broker",
            expected="embedded or embedded://host:port",
            mend="give a host and the number of a port alone: it asks for no user or password",
        ) from None
    host = parts.hostname or "127.0.0.1"
    return BrokerAddress(
        unquote(host) if ":" in host else host, port or 1883, protocols=(MQTTProtocolVersion.MQTTv311,)
    )


def _mend_amqtt() -> None:
    """Has amqtt refuse a CONNECT of MQTT 5, and pass on all of a client that goes.

    It takes the properties of MQTT 5 for other fields and waits for the rest of those (Yakifo/amqtt#325); and it
    forgets what a client has published, though it acknowledged it, if that disconnects before it is distributed.
    """
    from amqtt.mqtt.connect import ConnectPacket, ConnectPayload
    from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler

    class Payload(ConnectPayload):  # type: ignore[misc]
        @classmethod
        async def from_stream(cls, reader: Any, fixed_header: Any, variable_header: Any) -> Any:
            if variable_header.proto_level > 4:
                return cls("unread", "unread", b"")
            return await super().from_stream(reader, fixed_header, variable_header)

    async def wait_disconnect(handler: Any) -> Any:
        packet = await handler._disconnect_waiter if handler._disconnect_waiter is not None else None
        while handler.session and not handler.session.delivered_message_queue.empty():
            await asyncio.sleep(0.001)
        return packet

    ConnectPacket.PAYLOAD = Payload
    BrokerProtocolHandler.wait_disconnect = wait_disconnect


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

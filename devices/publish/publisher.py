"""Publishes what a device sees: predictions by way of the spool; status, info, state and health as they are now."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.broker import BrokerAddress
from edgekit.devices.publish.commands import Commands, response_topic
from edgekit.devices.publish.home_assistant import Discovery
from edgekit.devices.publish.spool import Spool, Stored
from edgekit.devices.results import Result
from edgekit.errors import BrokerError, EdgekitError
from edgekit.messages import (
    OFFLINE,
    ONLINE,
    PREFIX,
    HealthMessage,
    InfoMessage,
    SpoolHealth,
    encode,
    topic,
)
from edgekit.mqtt import Connection

logger = logging.getLogger(__name__)

# So many messages are under way at most; a broker may allow fewer.
MAX_INFLIGHT = 100
# What waited is sent no faster unless told otherwise: a broker that comes back is not to be overrun by its devices.
REPLAY_PER_S = 500.0
HEALTH_S = 10.0
# While messages come the publisher looks for them so often: to wake it for each would cost the thread that predicts
# more than all else it does for publishing. It sleeps when none has come for so long.
LOOK_S, IDLE_S = 0.02, 1.0
# What a broker refuses for want of a right or of room is tried again after so long.
REFUSED_RETRY_S = 10.0
# Closing gives up when the broker has acknowledged nothing for so long.
CLOSE_TIMEOUT_S = 30.0
# Told to stop, or without ever having reached the broker, it gives up after so long. With the time that sources and
# models take to end, a run that is told to stop says offline within 5 s.
STOP_TIMEOUT_S, OFFLINE_TIMEOUT_S = 1.5, 1.0
# Who waits for room or for the broker looks so often.
_WAIT_S = 0.01
# A broker keeps larger commands to itself.
_MAX_PACKET_BYTES = 65536
# A packet has no more than this beside topic, payload and correlation data.
_PACKET_BYTES = 32
# The broker's answers that are about this one message, and not about what we may do now.
_OF_THE_MESSAGE = {"Topic name invalid", "Packet too large", "Payload format invalid", "Retain not supported"}


class Publisher:
    """Says ``online`` and ``info`` on each connection, and ``offline`` at the end, by itself or by Last Will.

    :meth:`publish` is for the threads that predict, and does no more than put messages into shared memory; a thread of
    its own stores and sends it, and deletes it when the broker has acknowledged it. Leaving the ``with``
    block waits until the broker has acknowledged every message.

    Args:
        info: as it is at the start; :meth:`announce` tells another.
        client_id: our name at the broker.
        replay_per_s: messages that waited are sent no faster.
        health: called with the state of the spool every ``HEALTH_S``, for what is to be published as ``health``.

    Raises:
        BrokerError: the broker refuses the connection at the start; or, at the end, has not acknowledged all: it says
            how many, and whether they are kept for the next run.
    """

    def __init__(
        self,
        address: BrokerAddress,
        info: InfoMessage,
        client_id: str,
        spool: Spool,
        stop: threading.Event,
        *,
        prefix: str = PREFIX,
        replay_per_s: float = REPLAY_PER_S,
        health: Callable[[SpoolHealth], HealthMessage] | None = None,
        commands: Commands | None = None,
        discovery: Discovery | None = None,
    ) -> None:
        self._address, self._device, self._spool, self._stop = address, info.device, spool, stop
        self._base, self._prefix = topic(info.device, prefix=prefix), prefix
        self._command_topic, self._status_topic = f"{self._base}/command", f"{self._base}/status"
        self._health, self._commands, self._discovery = health, commands, discovery
        # What the broker is to keep, by topic, and what it was given on this connection.
        self._retained: dict[str, bytes] = {}
        self._given: dict[str, bytes] = {}
        self._sheds = False  # there is a source that waits for no one
        self.announce(info)
        # Of the connection, by message id: predictions and events, and what is sent beside them.
        self._inflight: dict[int, Stored] = {}
        self._beside: dict[int, str] = {}
        self._left_out: set[str] = set()  # what was reported to be too large, or else not to be taken
        self._replay_per_s, self._tokens, self._tokens_s = replay_per_s, 0.0, time.monotonic()
        self._health_s = self._stalled_s = 0.0
        self._again = False  # what was refused is to be sent again
        self._refusal = ""
        self._left = self._turns = 0
        self._was_connected, self._idle = False, True
        self._last_ack_s = time.monotonic()
        self._ending = self._said_offline = False
        #: Set before the end, it gives up then as soon as if told to stop.
        self.hurried = False
        #: Topic filters that it subscribes to.
        self.filters = (*([self._command_topic] if commands else ()), *(discovery.filters if discovery else ()))
        connection: Connection | None = None
        try:
            if not replay_per_s > 0:
                raise EdgekitError(
                    "replay rate", expected="more than 0 a second", got=f"{replay_per_s:g}", mend="give one"
                )
            self._connection = connection = Connection(
                address,
                client_id,
                will=(self._status_topic, OFFLINE),
                subscriptions=self.filters,
                maximum_packet_size=_MAX_PACKET_BYTES,
                on_connect=self._connected,
                on_disconnect=self._disconnected,
                on_message=self._received,
                on_publish=self._acknowledged,
                on_subscribe=self._subscribed,
                on_turn=self._turn,
            )
            connection.start(patience_s=None, stop=stop)
        except BaseException:
            if connection is None or connection.close():
                spool.close()
            raise

    # -- for any thread --------------------------------------------------------------------------------------------

    def publish(self, stream: str, result: Result, *, wait: threading.Event | None) -> None:
        """Publishes what came of a frame of ``stream``.

        Args:
            wait: for room where there is none, as a file can, until this is set. Otherwise, and then, a message for
                which there is none is shed and counted.
        """
        prediction, events, state = result
        self._sheds |= wait is None
        if prediction:
            self._put(f"{stream}/prediction", encode(prediction), wait)
        for event in events:
            self._put(f"{stream}/event", encode(event), wait)
        if state:
            self._retained[f"{self._base}/{stream}/state"] = encode(state)
        if self._idle:
            self._connection.wake()

    def announce(self, info: InfoMessage) -> None:
        """What the device is, from now on."""
        self._retained[f"{self._base}/info"] = encode(info)

    def forget(self, stream: str) -> None:
        """A stream is no more: the broker keeps no state of it."""
        self._retained[f"{self._base}/{stream}/state"] = b""

    def _put(self, to: str, payload: bytes, wait: threading.Event | None) -> None:
        while wait and self._spool.full and not (wait.is_set() or self._stop.is_set()):
            time.sleep(_WAIT_S)
        while not self._spool.put(to, payload):
            if wait is None or wait.is_set() or self._stop.is_set():
                self._spool.count_shed("memory")
                break
            time.sleep(_WAIT_S)

    def close(self) -> None:
        """Waits for the broker to acknowledge everything, says ``offline``, disconnects and closes the spool."""
        left = self._flush()
        self._ending = True
        self._connection.wake()
        deadline_s = time.monotonic() + OFFLINE_TIMEOUT_S
        while self._connection.connected and not self._ended and time.monotonic() < deadline_s:
            time.sleep(_WAIT_S)
        if self._connection.connected and not self._ended:
            logger.warning("broker %s has not acknowledged the last status, offline", self._address)
        if self._connection.close():
            self._spool.close()
        else:  # it is in the midst of the spool
            logger.error("the disk of %s does not answer; what is in memory is kept there", self._spool.path)
        if not left:
            return
        what = f"broker {self._address} has not acknowledged {left} messages"
        if self._refusal:
            what = f"broker {self._address} refuses what is published ({self._refusal}): {left} messages are left"
        elif not self._was_connected:
            what = f"broker {self._address} cannot be reached: {left} messages are left"
        if self._spool.path is None:
            raise BrokerError(what, mend="check the broker and run again")
        if self._spool.disk_error:
            what += f"; they are kept in memory until the machine restarts, as {self._spool.path} cannot be written"
        else:
            what += f"; they are kept in {self._spool.path}"
        if self._stop.is_set() or self.hurried:
            logger.warning("%s and sent by the next run", what)
            return
        mend = "check its access rules for this user and device id" if self._refusal else "check the broker"
        raise BrokerError(what, mend=f"{mend}, and run this device and stream again to send them")

    @property
    def _ended(self) -> bool:
        return self._said_offline and not self._beside

    def _flush(self) -> int:
        """Waits until all is acknowledged or the broker has been still for too long; how many are left."""
        began_s = self._last_ack_s = time.monotonic()
        turn = self._turns + 2  # the first that began after now
        while self._left or self._turns < turn:
            now_s = time.monotonic()
            if now_s - self._last_ack_s > CLOSE_TIMEOUT_S or (
                now_s - began_s > STOP_TIMEOUT_S
                and (self._stop.is_set() or self.hurried or self._refusal or not self._was_connected)
            ):
                break
            self._connection.wake()
            time.sleep(_WAIT_S)
        return self._left if self._turns >= turn else max(1, self._left)

    # -- for the connection's thread -------------------------------------------------------------------------------

    def _turn(self) -> float:
        now_s = time.monotonic()
        self._idle = False
        wish_s = self._spool.store(urgent=not self._connection.connected or (self._sheds and self._spool.half_full))
        if self._connection.connected:
            wish_s = min(wish_s, self._send(now_s), self._say(now_s))
        # Only in this thread the spool can be counted while messages move from one place of it to the next.
        self._left = self._spool.messages
        self._turns += 1
        if now_s - self._spool.stored_s < IDLE_S:
            return min(wish_s, LOOK_S)
        self._idle = True
        return 0.0 if self._spool.unread else wish_s  # put before it could be seen that we are idle

    def _send(self, now_s: float) -> float:
        """Sends what there is room for under way; returns after how many seconds there may be more to do."""
        if self._again:
            if self._inflight or now_s < self._stalled_s:
                return max(0.1, self._stalled_s - now_s)
            self._again = False
            self._spool.mark()
        most = max(1.0, self._replay_per_s / 5)
        self._tokens = min(most, self._tokens + (now_s - self._tokens_s) * self._replay_per_s)
        self._tokens_s = now_s
        room = min(MAX_INFLIGHT, self._connection.client.broker_receive_maximum) - len(self._inflight)
        if room <= 0:
            return 60.0
        rows = self._spool.take(room)
        for number, stored in enumerate(rows):
            if stored.replayed and self._tokens < 1:
                self._spool.give_back(rows[number:])
                return 1 / self._replay_per_s
            self._tokens -= stored.replayed
            self._send_one(stored)
        return 60.0

    def _send_one(self, stored: Stored) -> None:
        payload, to = stored.payload, f"{self._base}/{stored.topic}"
        if stored.replayed:
            # Nowhere else: in a string, the quotation marks would have backslashes before them.
            payload = payload.replace(b'"replayed":false', b'"replayed":true', 1)
        if self._too_large(to, payload):
            self._spool.drop(stored, "too large for the broker")
            return
        left_s = self._spool.max_age_s - (self._spool.clock_s - stored.stored_s)
        mid = self._connection.publish(to, payload, expiry_s=max(1, int(left_s)))
        self._inflight[mid] = stored

    def _say(self, now_s: float) -> float:
        """What is not about one frame: state, health, discovery and the end; returns as :meth:`_send`."""
        for to, payload in list(self._retained.items()):
            if self._given.get(to) is not payload:
                self._given[to] = payload
                self._publish(to, payload, retain=True)
        if self._health and now_s >= self._health_s:
            self._health_s = now_s + HEALTH_S
            self._publish(f"{self._base}/health", encode(self._health(self._spool_health())), qos=0)
        if self._discovery:
            for to, payload in self._discovery.turn(now_s):
                self._publish(to, payload, retain=True)
        if self._ending and not self._said_offline:
            self._publish(self._status_topic, OFFLINE, retain=True)
            self._said_offline = True  # not before: close() looks for what is not acknowledged then
        due_s = min(
            self._health_s if self._health else now_s + 60, self._discovery.due_s if self._discovery else math.inf
        )
        return max(0.0, due_s - now_s)

    def _publish(
        self,
        to: str,
        payload: bytes | str,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        what: str = "",
    ) -> None:
        """Sends what is not in the spool, unless it is too large for the broker, which would end the connection.

        Args:
            what: its name in the log; without one, its topic.
        """
        if self._too_large(to, payload, correlation):
            self._leave_out(what or to, "packet too large")
            return
        mid = self._connection.publish(to, payload, qos=qos, retain=retain, correlation_data=correlation)
        if qos:
            self._beside[mid] = what or to

    def _too_large(self, to: str, payload: bytes | str, correlation: bytes | None = None) -> bool:
        size = sum(len(part.encode() if isinstance(part, str) else part) for part in (to, payload, correlation or b""))
        return size + _PACKET_BYTES > self._connection.client.broker_maximum_packet_size

    def _leave_out(self, what: str, cause: str) -> None:
        if what not in self._left_out:
            self._left_out.add(what)
            logger.error(
                "broker %s does not take %s, which is left out: %s; raise its limit of packets and messages",
                self._address, what, cause,
            )  # fmt: skip

    def _spool_health(self) -> SpoolHealth:
        spool = self._spool
        return SpoolHealth(
            messages=spool.messages,
            bytes=spool.bytes,
            oldest_s=round(spool.oldest_s, 3) if spool.messages else None,
            shed=dict(spool.shed),
        )

    def _connected(self) -> None:
        self._was_connected, self._again = True, False
        self._spool.mark()
        self._publish(self._status_topic, ONLINE, retain=True)
        self._given.clear()  # the broker may have forgotten it
        if self._discovery:
            self._discovery.on_connect(time.monotonic())

    def _disconnected(self) -> None:
        self._inflight.clear()
        self._beside.clear()
        self._said_offline = False
        self._spool.mark()

    def _acknowledged(self, mid: int, reason: ReasonCode) -> None:
        stored = self._inflight.pop(mid, None)
        name = reason.getName() if reason.is_failure else ""
        if stored is None:
            what = self._beside.pop(mid, "")
            if name in _OF_THE_MESSAGE:
                self._leave_out(what, name.lower())
            elif name:
                self._tell_refusal(name)
        elif not name:
            self._spool.delete(stored)
            self._refusal = ""
            self._last_ack_s = time.monotonic()
        elif name in _OF_THE_MESSAGE:
            self._spool.drop(stored, f"refused by the broker: {name.lower()}")
        else:
            self._tell_refusal(name)
            self._again, self._stalled_s = True, time.monotonic() + REFUSED_RETRY_S

    def _tell_refusal(self, name: str) -> None:
        if self._refusal != name.lower():
            self._refusal = name.lower()
            logger.error(
                "broker %s refuses what is published: %s; check its access rules", self._address, self._refusal
            )

    def _subscribed(self, reasons: list[ReasonCode]) -> None:
        if any(reason.is_failure for reason in reasons):
            logger.warning("broker %s refuses a subscription: commands may not arrive", self._address)

    def _received(self, message: paho.MQTTMessage) -> None:
        if message.topic != self._command_topic:
            if self._discovery:
                self._discovery.on_message(message.topic, message.payload, time.monotonic())
            return
        if not self._commands:
            return
        answers = self._commands.answer(message.payload, retained=message.retain)
        asked_for = getattr(message.properties, "ResponseTopic", "")
        if answers and (to := response_topic(asked_for, self._device, prefix=self._prefix)):
            for answer in answers:
                correlation = getattr(message.properties, "CorrelationData", None)
                self._publish(to, answer, correlation=correlation, what="an answer to a command")

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BrokerError as unacknowledged:
            if error is None:
                raise
            logger.error("%s", unacknowledged)

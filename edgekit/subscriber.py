"""Receives what devices publish, and accounts for what did not come."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from types import TracebackType
from typing import get_args

import msgspec
from paho.mqtt.client import MQTTMessage, topic_matches_sub
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.accounting import Accounting
from edgekit.broker import BrokerAddress, parse_broker
from edgekit.errors import BrokerError, EdgekitError
from edgekit.events import Events
from edgekit.messages import PREFIX, check_name, check_prefix
from edgekit.mqtt import Connection, unique_client_id
from edgekit.mqtt_client import ANSWER_TIMEOUT_S, Client
from edgekit.received import OF_DEVICE, Kind, Message, decode, printable

logger = logging.getLogger(__name__)

# The broker is not asked for larger ones: nothing of EdgeKit's is.
MESSAGE_BYTES = 2**20
# Health goes out with QoS 0, which nobody waits for: so many wait for a slow consumer, others are dropped.
QOS_0_WAITING = 1000
# Of the subscriptions that an earlier run may have left to a session, so many are given up on one connection.
UNSUBSCRIBED = 100


class Subscriber:
    """Iterates over the messages of devices, connecting again as need be. A context manager; both also with ``async``.

    A message is acknowledged when the next one is asked for, by :meth:`ack`, or at the end of a ``with`` block that no
    exception left. With a ``client_id`` and ``session_expiry_s``, whoever dies at work on a message gets it again.

    It connects when it is made; in a coroutine, with ``async with`` or when the first message is asked for.

    Args:
        broker: ``mqtt://[user:pass@]host[:port]`` or ``mqtts://…``, or what ``parse_broker`` made of it.
        device, stream: only this one; None for all.
        kinds: only these kinds of message.
        group: subscribers of one group share the messages among them (shared subscription).
        patience_s: keep trying for so long while the broker cannot be reached at the start.
        prefix: what the topics begin with.
        client_id: the name under which the broker keeps what comes while we are away; a random one if None.
        session_expiry_s: for so long it does; 0: not at all.
        receive_maximum: so many messages may wait here to be asked for. The broker keeps the others.

    Attributes:
        accounting: what came and what did not.
        events: which labels are held, as far as is known, where ``kinds`` has ``event``.

    Raises:
        BrokerError: the broker cannot be reached at the start, or refuses the subscription.
        EdgekitError: a name cannot be part of a topic, or there is none for the session.
    """

    def __init__(
        self,
        broker: str | BrokerAddress,
        *,
        device: str | None = None,
        stream: str | None = None,
        kinds: Sequence[Kind] = ("prediction",),
        group: str | None = None,
        patience_s: float = 0.0,
        prefix: str = PREFIX,
        client_id: str | None = None,
        session_expiry_s: int = 0,
        receive_maximum: int = 100,
    ) -> None:
        of_device = "+" if device is None else check_name(device, "device")
        of_stream = "+" if stream is None else check_name(stream, "stream")
        share = f"$share/{check_name(group, 'group')}/" if group is not None else ""
        self._prefix = f"{check_prefix(prefix)}/"
        if unknown := [kind for kind in kinds if kind not in get_args(Kind)]:
            raise EdgekitError("kind of message", expected=", ".join(get_args(Kind)), got=unknown[0])
        if session_expiry_s and not client_id:
            raise EdgekitError("a session that the broker keeps needs a name", mend="give a client_id")
        self._filters = [
            self._prefix + "/".join((of_device, kind) if kind in OF_DEVICE else (of_device, of_stream, kind))
            for kind in kinds
        ]
        self._share, self._named = share, client_id or "this subscriber"
        self._unsubscribed: set[str] = set()  # on this connection
        self._unasked = False  # whether something came that the filters do not ask for
        self.accounting, self.events = Accounting(partial=group is not None), Events(partial=group is not None)
        self._group, self._patience_s, self._keeps_session = group, patience_s, session_expiry_s > 0
        self._messages: deque[tuple[MQTTMessage, Client]] = deque()
        self._handed_out: tuple[MQTTMessage, Client] | None = None
        self._changed = threading.Condition()
        self._tell_loop: Callable[[], object] | None = None
        self._held = False  # until it is known whether what waits here will come again
        self._dropped = 0
        self._opened = self._subscribed = self._closed = False
        self._refusal = ""
        self._connection = Connection(
            parse_broker(broker),
            client_id or unique_client_id("subscriber"),
            subscriptions=[share + topic_filter for topic_filter in self._filters],
            session_expiry_s=session_expiry_s,
            receive_maximum=receive_maximum,
            maximum_packet_size=MESSAGE_BYTES,
            manual_ack=True,
            on_connect=self._connected,
            on_disconnect=self._lost,
            on_message=self._received,
            on_subscribe=self._answered,
        )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._open()

    # -- in the thread of the connection ---------------------------------------------------------------------------

    def _connected(self) -> None:
        self._unsubscribed.clear()
        client = self._connection.client
        if self._share and client.session_present:  # what this one took before it joined the group, all of it
            client.unsubscribe(self._filters)
        if not client.session_present:  # nothing of what waits here will come again
            self._held = False
        self._tell()

    def _lost(self) -> None:
        self._held = self._keeps_session

    def _received(self, message: MQTTMessage) -> None:
        if not self._asked_for(message):
            self._turn_away(message)
            return
        if message.qos == 0 and len(self._messages) >= QOS_0_WAITING:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("messages of QoS 0 are dropped, as they are not asked for as fast as they come")
            return
        with self._changed:
            if self._held:
                self._forget(message)
            self._messages.append((message, self._connection.client))
        self._tell()

    def _asked_for(self, message: MQTTMessage) -> bool:
        try:
            return any(topic_matches_sub(topic_filter, message.topic) for topic_filter in self._filters)
        except UnicodeDecodeError:  # its topic is no text
            return False

    def _turn_away(self, message: MQTTMessage) -> None:
        """A session keeps the subscriptions of earlier runs too: what only those ask for is dropped."""
        client = self._connection.client
        if message.qos:
            self._connection.ack(message, client)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = repr(message._topic)
        if not self._unasked:
            self._unasked = True
            logger.warning(
                "the session of %s still has other subscriptions, and what comes only from those is dropped, "
                "first a message on %s; give each subscriber a client_id of its own",
                self._named, printable(topic),
            )  # fmt: skip
        stale = [
            share + topic_filter
            for topic_filter in self._earlier_filters(topic)
            if topic_filter not in self._filters
            for share in {"", self._share}
            if share + topic_filter not in self._unsubscribed
        ]
        if stale and len(self._unsubscribed) < UNSUBSCRIBED:
            self._unsubscribed.update(stale)
            client.unsubscribe(stale)

    def _earlier_filters(self, topic: str) -> list[str]:
        """Those of a subscriber with this prefix that ``topic`` matches."""
        *names, kind = topic.removeprefix(self._prefix).split("/")
        if kind not in get_args(Kind) or len(names) != (1 if kind in OF_DEVICE else 2):
            return [f"{self._prefix}#"]
        return ["/".join((self._prefix[:-1], *of, kind)) for of in product(*(("+", name) for name in names))]

    def _forget(self, again: MQTTMessage) -> None:
        """What waits here and comes again is not to come twice."""
        for place, (message, of) in enumerate(self._messages):
            if of is not self._connection.client and (message.topic, message.payload) == (again.topic, again.payload):
                del self._messages[place]
                return

    def _answered(self, reasons: list[ReasonCode]) -> None:
        # A broker sends what it has of our session first. What did not come by now it has forgotten, as one does that
        # was killed before it saved: it is in no other hands than ours.
        self._held = False
        refused = [reason for reason in reasons if reason.is_failure]
        self._refusal = str(refused[0]).lower() if refused else ""
        self._subscribed = True
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if tell_loop := self._tell_loop:
            with suppress(RuntimeError):  # that loop has ended
                tell_loop()

    # -- for its user ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._opened or self._closed:
            return
        self._opened = True
        try:
            self._connection.start(self._patience_s)
            if self._group is not None and self._connection.protocol != MQTTProtocolVersion.MQTTv5:
                raise BrokerError(
                    "a group needs shared subscriptions, which came with MQTT 5, and the broker speaks 3.1.1",
                    mend="leave the group out, or use a broker that speaks MQTT 5",
                )
            with self._changed:
                self._changed.wait_for(lambda: self._subscribed or self._closed, ANSWER_TIMEOUT_S)
            if not self._subscribed:
                raise BrokerError("broker did not answer the subscription", mend="look at its log")
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        if self._refusal:
            raise BrokerError(
                f"broker refused the subscription: {self._refusal}", mend="check its access rules for this user"
            )

    def next(self, timeout_s: float | None = None) -> Message:
        """The next message. One that is not EdgeKit's is skipped, with a warning.

        Raises:
            TimeoutError: none came within ``timeout_s``.
            EdgekitError: the subscriber is closed.
        """
        if message := self._next(timeout_s):
            return message
        raise EdgekitError("the subscriber is closed")

    def _next(self, timeout_s: float | None = None) -> Message | None:
        """None: it is closed."""
        self._open()
        self.ack()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._closed:
            if message := self._take():
                return message
            self._check()
            # In short waits, so that Ctrl-C is heard on every platform.
            left_s = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
            if left_s <= 0:
                raise TimeoutError(f"no message within {timeout_s:g} s")
            with self._changed:
                self._changed.wait_for(self._has_news, left_s)
        return None

    def _has_news(self) -> bool:
        return bool((self._messages and not self._held) or self._refusal or self._closed)

    def ack(self) -> None:
        """Acknowledges the message that was handed out last: it is done with and will not come again."""
        if handed_out := self._handed_out:
            self._handed_out = None
            message, client = handed_out
            if message.qos:
                self._connection.ack(message, client)

    def __iter__(self) -> Iterator[Message]:
        while message := self._next():
            yield message

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        await self._open_async()
        self.ack()
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        self._tell_loop = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while not self._closed:
                if message := self._take():
                    return message
                self._check()
                await arrived.wait()
                arrived.clear()
        finally:
            self._tell_loop = None
        raise StopAsyncIteration

    def _take(self) -> Message | None:
        """The next message that is EdgeKit's, if there is one now."""
        while True:
            with self._changed:
                if self._held or not self._messages:
                    return None
                self._handed_out = self._messages.popleft()
            received = self._handed_out[0]
            try:
                return decode(received, self._prefix, self.accounting, self.events)
            except (msgspec.MsgspecError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
                # Not acknowledged, it would come again and end the next run as well.
                topic = printable(received.topic)
                logger.warning("message on %s skipped, it is not one of EdgeKit's: %s", topic, printable(str(error)))
                self.ack()

    def close(self) -> None:
        """Ends the connection, and whoever waits for a message. The last one handed out is not acknowledged by this."""
        self._closed = True
        self._tell()
        self._connection.close()

    def __enter__(self) -> Subscriber:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ack()
        self.close()

    async def __aenter__(self) -> Subscriber:
        try:
            await self._open_async()
        except asyncio.CancelledError:  # the thread would connect later, and take messages that nobody asks for
            await asyncio.shield(asyncio.to_thread(self.close))
            raise
        return self

    async def _open_async(self) -> None:
        if not self._opened:
            await asyncio.to_thread(self._open)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.__exit__, kind, error, trace))

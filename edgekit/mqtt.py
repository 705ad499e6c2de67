"""A connection to an MQTT broker, made again when lost: MQTT 5 first, 3.1.1 where the broker knows no better."""

from __future__ import annotations

import contextlib
import logging
import random
import selectors
import socket
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from paho.mqtt.client import MQTTMessage
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.broker import BrokerAddress, check_text
from edgekit.errors import BrokerError
from edgekit.mqtt_client import (
    ANSWER_TIMEOUT_S,
    BAD_CREDENTIALS,
    CLIENT_ID_INVALID,
    NOT_AUTHORIZED,
    SESSION_TAKEN_OVER,
    UNAVAILABLE,
    UNSPECIFIED,
    UNSUPPORTED_VERSION,
    Client,
)

logger = logging.getLogger(__name__)

_NAMES = {MQTTProtocolVersion.MQTTv5: "MQTT 5", MQTTProtocolVersion.MQTTv311: "MQTT 3.1.1"}

# A connection that is not waited for is given so long to come or be refused.
START_S = 3.0
# Waits before connecting again double from the first to the second, each shortened by chance to half at most.
BACKOFF_S = (0.5, 30.0)
# A connection that held for so long was a good one: the waits begin anew.
GOOD_S = 5.0
# What to do about a broker's certificate that is refused, by OpenSSL's code of the reason.
_CERTIFICATE = "have its certificate, and that of its authority, made without this fault"
_AUTHORITY = "give the authority that signed its certificate with --cafile"
_CHAIN = f"{_AUTHORITY}; if one in between signed it, the broker must send the certificate of that one too"
_NAME = "its certificate is for another host; give a name or address that is in it, or a certificate with this one"
_CERTIFICATES = {
    2: _CHAIN,
    9: "its certificate is not valid yet; check the clock of this device, and from when it is valid",
    10: "its certificate has expired; renew it, or check the clock of this device",
    18: "its certificate is signed by itself; give that with --cafile",
    19: _AUTHORITY,
    20: _CHAIN,
    21: _CHAIN,
    62: _NAME,  # host
    64: _NAME,  # IP address
}
_OURS = -1  # no broker's reason
# A broker that stays away is told of again so often.
REMIND_S = 600.0
# Answers of a broker that may let us in later: it is unavailable, busy, shutting down, over a quota or a rate, or gives
# no reason. All others need a change of the configuration.
_TEMPORARY = {UNSPECIFIED, 0x83, UNAVAILABLE, 0x89, 0x8B, 0x97, 0x9F}


def unique_client_id(purpose: str) -> str:
    """A client id that no other client has; a second client of the same id would throw the first one out."""
    return f"edgekit-{purpose}-{uuid.uuid4().hex[:8]}"


class Connection:
    """A connection to a broker, made again for ever when lost, by a thread of its own.

    Each connection is a new paho client: what a lost one had under way is forgotten, and for the owner to send again.
    The callbacks are called in that thread and must not block; :meth:`publish` may be called from them
    alone.

    Args:
        will: topic and payload of a retained QoS 1 Last Will.
        subscriptions: topic filters, subscribed to with QoS 1 on each connection.
        session_expiry_s: above 0, the broker keeps the subscriptions and what arrives for them while we are away.
        receive_maximum: how many messages the broker may send without having our acknowledgement (MQTT 5).
        maximum_packet_size: the broker keeps larger packets from us, in bytes (MQTT 5).
        manual_ack: a message is acknowledged by :meth:`ack` instead of when ``on_message`` returns.
        on_connect, on_disconnect: called after each connection, and when it is lost.
        on_message: called with each message.
        on_publish: called with the id of each message that the broker has answered, and its answer.
        on_subscribe: called with the answers to a subscription, one for each topic filter.
        on_turn: called after each network event and each :meth:`wake`; may return after how many seconds at the latest
            it wants to be called again.

    Raises:
        BrokerError: a certificate cannot be read, or MQTT cannot carry the client id or a topic.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        will: tuple[str, str] | None = None,
        subscriptions: Sequence[str] = (),
        session_expiry_s: int = 0,
        receive_maximum: int = 100,
        maximum_packet_size: int | None = None,
        manual_ack: bool = False,
        on_connect: Callable[[], None] | None = None,
        on_disconnect: Callable[[], None] | None = None,
        on_message: Callable[[MQTTMessage], None] | None = None,
        on_publish: Callable[[int, ReasonCode], None] | None = None,
        on_subscribe: Callable[[list[ReasonCode]], None] | None = None,
        on_turn: Callable[[], float | None] | None = None,
    ) -> None:
        check_text("client id", client_id)
        for topic in (*subscriptions, *(will or ())[:1]):
            check_text("topic", topic)
        self.address, self._client_id, self._subscriptions = address, client_id, tuple(subscriptions)
        self._options: dict[str, Any] = {
            "will": will,
            "session_expiry_s": session_expiry_s,
            "receive_maximum": receive_maximum,
            "maximum_packet_size": maximum_packet_size,
            "manual_ack": manual_ack,
        }
        self._on_connect, self._on_disconnect, self._on_message = on_connect, on_disconnect, on_message
        self._on_publish, self._on_subscribe, self._on_turn = on_publish, on_subscribe, on_turn
        self._tls = address.tls_context()
        self.connected = False
        self.protocol = address.protocols[0]
        self._settled = False  # on the protocol: it was accepted once
        self._client: Client | None = None
        self._sock: Any = None
        self._dialling = False
        self._dialled: tuple[Client, Exception | None] | None = None
        self._since_s = self._retry_s = 0.0
        self._failures = 0
        self._awaited = False  # someone waits for the first connection
        self._told, self._told_s = "", 0.0
        self._acks: deque[tuple[Client, int]] = deque()
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._error: BrokerError | None = None  # why the last attempt failed
        self._refused = False  # and that trying again is of no use before someone mends it
        self._broken = False  # and that it is a fault of ours, which nobody should wait for
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._awake = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)

    # -- for any thread --------------------------------------------------------------------------------------------

    def start(self, patience_s: float | None = 0.0, stop: threading.Event | None = None) -> bool:
        """Starts the thread and waits for the first connection; whether there is one.

        Args:
            patience_s: keep trying for so long where the broker cannot be reached; None: not having reached it is no
                error, and the thread keeps trying.
            stop: with ``patience_s`` None, ends the waiting when set.

        Raises:
            BrokerError: the broker refuses the connection, or cannot be reached; or the thread fails.
        """
        self._awaited = bool(patience_s)
        started_s = time.monotonic()
        try:
            self._thread.start()
            with self._changed:
                while not self.connected:
                    if self._error and (self._refused or (self._broken and patience_s is not None)):
                        raise self._error
                    if self._closing.is_set():
                        raise BrokerError(f"connection to broker {self.address} was closed", mend="open it again")
                    if not self._thread.is_alive():
                        raise self._error or self._fault()
                    waited_s = time.monotonic() - started_s
                    if patience_s is None and (self._error or waited_s > START_S or (stop and stop.is_set())):
                        return False
                    if patience_s is not None and self._error and waited_s >= patience_s:
                        raise self._error
                    # in short waits, so that Ctrl-C is heard on every platform
                    self._changed.wait(0.2)
        except BaseException:
            self.close()
            raise
        finally:
            self._awaited = False
        return True

    def ack(self, message: MQTTMessage, client: Client) -> None:
        """Acknowledges a message that ``client`` received; nothing is done if that connection has gone since."""
        self._acks.append((client, message.mid))
        self.wake()

    def wake(self) -> None:
        """Has ``on_turn`` called soon."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full, so it will wake up; or closed
                self._wake_w.send(b"\0")

    def close(self) -> bool:
        """Disconnects, which takes back the Last Will, and ends the thread; False if it has not ended yet."""
        self._closing.set()
        self._awake = False
        self.wake()
        if self._thread.ident is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join(ANSWER_TIMEOUT_S)
        return not self._thread.is_alive()

    # -- for the callbacks -----------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """Of the present connection: what the broker allows us, and whether it had kept our session."""
        assert self._client
        return self._client

    def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
        correlation_data: bytes | None = None,
    ) -> int:
        """Sends a message; its id. ``expiry_s``: the broker keeps it for so long for who is away (MQTT 5)."""
        return self.client.send(topic, payload, qos, retain, expiry_s, correlation_data)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = 0.0
        ended: BaseException | None = None
        try:
            while not self._closing.is_set():
                try:
                    self._turn(wait_s)
                    wish_s = self._on_turn() if self._on_turn else None
                except Exception as error:  # a fault of ours must not end a service for good
                    logger.exception("unexpected error; connecting to %s again", self.address)
                    self._recover(error)
                    self._closing.wait(BACKOFF_S[0])  # one that comes at each turn must not keep a processor busy
                    wish_s = None
                wait_s = 1.0 if wish_s is None else min(1.0, max(0.0, wish_s))
            self._hang_up()
        except BaseException as error:
            ended = error
            raise
        finally:
            self._release()
            if ended:
                self._break(ended)

    def _turn(self, wait_s: float) -> None:
        now_s = time.monotonic()
        if self._client is None and not self._dialling:
            if now_s >= self._retry_s:
                self._dial()
            else:
                wait_s = min(wait_s, self._retry_s - now_s)
        if self._client and self._sock and not self._client.socket():
            wait_s = 0.0  # paho has closed it, having found at a publish that it is gone
        elif self._client and self._sock:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
            if self._selector.get_key(self._sock).events != events:
                self._selector.modify(self._sock, events)
            if self._client.ahead:
                wait_s = 0.0
        ready = {key.fileobj: events for key, events in self._selector.select(wait_s)}
        if self._wake_r in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_r.recv(64)
            self._awake = False  # not before: who wakes now is heard in this turn
        if self._dialled:
            self._take_over(*self._dialled)
        elif self._client:
            self._serve(self._client, bool(ready.get(self._sock, 0) & selectors.EVENT_READ))

    def _dial(self) -> None:
        """Begins to connect, in a thread of its own: names that nobody resolves and hosts that keep silent block."""
        client = Client(self.address, self._client_id, self.protocol, self._tls, **self._options)
        if on_message := self._on_message:
            client.on_message = lambda _client, _userdata, message: on_message(message)
        if on_publish := self._on_publish:
            client.on_publish = lambda _client, _userdata, mid, reason, _properties: on_publish(mid, reason)
        if on_subscribe := self._on_subscribe:
            client.on_subscribe = lambda _client, _userdata, _mid, reasons, _properties: on_subscribe(reasons)

        def dial() -> None:
            error: Exception | None = None
            try:
                client.dial()
            except Exception as failure:  # told by _take_over
                error = failure
            self._dialled = client, error
            self.wake()
            if self._closing.is_set():  # no one may take it over any more
                self._thread.join(ANSWER_TIMEOUT_S)
                if self._dialled:
                    self._hang_up_on(client)

        threading.Thread(target=dial, name=f"dial-{self._client_id}", daemon=True).start()
        self._dialling = True  # not where no thread can be started

    def _take_over(self, client: Client, error: Exception | None) -> None:
        self._dialled, self._dialling = None, False
        if error:
            mend = "check host and port, and that the broker runs"
            if isinstance(error, ssl.SSLCertVerificationError):
                mend = _CERTIFICATES.get(error.verify_code, _CERTIFICATE)
            elif isinstance(error, ssl.SSLError):
                mend = "check that it speaks TLS on this port"
            self._fail(f"broker {self.address} cannot be reached ({error})", mend)
            return
        self._sock = client.open()
        if not self._sock:
            self._hung_up()
            return
        self._client, self._since_s = client, time.monotonic()
        self._selector.register(self._sock, selectors.EVENT_READ)

    def _serve(self, client: Client, readable: bool) -> None:
        self._send_acks(client)
        client.serve(readable)
        if client.answer is not None and not self.connected:
            self._judge(client.answer)
        elif self.connected and client.socket() is None:
            self._lost(client.lost_because, client.lost_code)
        elif not self.connected and (client.socket() is None or time.monotonic() - self._since_s > ANSWER_TIMEOUT_S):
            self._drop()
            self._hung_up()

    def _send_acks(self, client: Client) -> None:
        while self._acks:
            of_client, mid = self._acks.popleft()
            if of_client is client:
                client.ack(mid, 1)

    def _judge(self, answer: ReasonCode) -> None:
        name = answer.getName()
        if answer.is_failure:
            self._drop()
            if answer.value == UNSUPPORTED_VERSION:
                self._hung_up()
            elif answer.value in _TEMPORARY:
                self._fail(f"broker {self.address} takes no connection now: {name.lower()}", "look at its log")
            else:
                mend = "look at the broker's log"
                if answer.value in (BAD_CREDENTIALS, NOT_AUTHORIZED):
                    mend = "check the user and password, and the broker's access rules"
                elif answer.value == CLIENT_ID_INVALID:
                    mend = f"the broker's rules allow no client that calls itself {self._client_id}"
                self._fail(f"broker {self.address} refused the connection: {name.lower()}", mend, refused=True)
            return
        self._since_s, self._settled, self._told = time.monotonic(), True, ""
        logger.info("connected to %s with %s", self.address, _NAMES[self.protocol])
        with self._changed:
            self.connected, self._error, self._refused, self._broken = True, None, False, False
            self._changed.notify_all()
        if self._subscriptions:
            self.client.subscribe([(topic_filter, 1) for topic_filter in self._subscriptions])
        if self._on_connect:
            self._on_connect()

    def _lost(self, why: str, code: int) -> None:
        self._drop()
        self.connected = False
        logger.warning("connection to %s lost: %s; connecting again", self.address, why)
        if time.monotonic() - self._since_s > GOOD_S:
            self._failures = 0
        elif self._failures == 3:
            mend = "look at the broker's log, and at its limits"
            if code == _OURS:
                mend = "report it with what the log says"
            elif code in (UNSPECIFIED, SESSION_TAKEN_OVER):
                why = f"another client may call itself {self._client_id} too"  # not every broker gives its reason
                mend = "give each device an id, and each of its runs a stream of its own; or look at the broker's log"
            logger.error("connections to %s are lost within seconds: %s; %s", self.address, why, mend)
        self._back_off()
        if self._on_disconnect:
            self._on_disconnect()

    def _hung_up(self) -> None:
        """Before an answer: as an older broker does to a CONNECT that it cannot read."""
        protocols = self.address.protocols
        later = protocols[protocols.index(self.protocol) + 1 :]
        if later and not self._settled:
            self.protocol = later[0]
            return
        if not self._settled:
            self.protocol = protocols[0]
        self._fail(
            f"broker {self.address} accepted the connection but did not answer as an MQTT broker",
            "check that an MQTT broker listens there, and whether it wants TLS (mqtts://) or a client certificate",
        )

    def _fail(self, what: str, mend: str, refused: bool = False) -> None:
        if refused:
            self._failures = 99
        self._back_off()
        now_s = time.monotonic()
        if what != self._told or now_s - self._told_s > REMIND_S:
            self._told, self._told_s = what, now_s
            logger.log(logging.ERROR if refused else logging.WARNING, "%s; %s; trying again", what, mend)
        with self._changed:
            self._error, self._refused, self._broken = BrokerError(what, mend=mend), refused, False
            self._changed.notify_all()

    def _back_off(self) -> None:
        first_s, last_s = BACKOFF_S
        if self._awaited:
            last_s = 1.0
        wait_s = min(last_s, first_s * 2 ** min(self._failures, 16))
        self._failures += 1
        self._retry_s = time.monotonic() + wait_s * random.uniform(0.5, 1.0)

    def _drop(self) -> None:
        """Forgets the connection. paho may have closed its socket, which the selector still lists then."""
        self._client = None
        if self._sock:
            with contextlib.suppress(KeyError, ValueError):  # this thread must never end for it
                self._selector.unregister(self._sock)
            self._sock.close()
            self._sock = None

    def _recover(self, error: Exception) -> None:
        try:
            if self.connected:
                self._lost("an error of ours", _OURS)
            else:
                self._drop()
                self._back_off()
        except Exception:  # of a callback, or one that the same fault brings
            logger.exception("unexpected error while the connection to %s is given up", self.address)
            self._back_off()
        self._break(error)

    def _break(self, error: BaseException) -> None:
        """Whoever waits for a connection is to hear of a fault of ours."""
        with self._changed:
            self._error, self._refused, self._broken = self._fault(error), False, True
            self._changed.notify_all()

    def _fault(self, error: BaseException | None = None) -> BrokerError:
        fault = BrokerError(
            f"connection to broker {self.address} failed by an error of EdgeKit ({type(error).__name__})",
            mend="report it with what the log says",
        )
        fault.__cause__ = error
        return fault

    @staticmethod
    def _hang_up_on(client: Client) -> None:
        """One that no one has taken over; another thread may do so too."""
        with contextlib.suppress(Exception):
            client.disconnect()
            if sock := client.socket():
                sock.close()

    def _release(self) -> None:
        if self._dialled:
            self._hang_up_on(self._dialled[0])
        self.connected = False
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()

    def _hang_up(self) -> None:
        """Says DISCONNECT, having sent what is left."""
        client = self._client
        if client and self.connected:
            self._send_acks(client)
            client.disconnect()
            deadline_s = time.monotonic() + 1.0
            while client.socket() and client.want_write() and time.monotonic() < deadline_s:
                if client.loop_write() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    break
                time.sleep(0.005)
        if client:
            self._drop()

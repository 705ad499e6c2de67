"""One connection to a broker: paho's client, driven by the loop of its owner."""

from __future__ import annotations

import functools
import ssl
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.broker import BrokerAddress

KEEP_ALIVE_S = 30
# For the connection, and for the broker's answer, each.
ANSWER_TIMEOUT_S = 10.0
# Reason codes of MQTT 5, which paho makes of those of 3.1.1 too; its names for them are its own.
UNSPECIFIED = 0x80
UNSUPPORTED_VERSION = 0x84
CLIENT_ID_INVALID = 0x85
BAD_CREDENTIALS = 0x86
NOT_AUTHORIZED = 0x87
UNAVAILABLE = 0x88
SESSION_TAKEN_OVER = 0x8E
# Packets are read up to so many before it is the turn of others.
_READS = 100


class _ReadAhead:
    """A socket that asks the system for as much as there is: paho asks for each byte of a header by itself."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._ahead = memoryview(b"")

    def recv(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(self._sock.recv(max(size, 16384)))
        part, self._ahead = self._ahead[:size], self._ahead[size:]
        return bytes(part)

    def pending(self) -> int:
        """Bytes that were received and not read, of which the system knows nothing."""
        return len(self._ahead) + (self._sock.pending() if isinstance(self._sock, ssl.SSLSocket) else 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Packed(Properties):
    """Properties that are not packed anew for each message: that alone takes longer than to send it."""

    packed: bytes | None = None

    def pack(self) -> bytes:
        if self.packed is None:
            # past the check of names in Properties.__setattr__
            object.__setattr__(self, "packed", super().pack())  # type: ignore[no-untyped-call]
        return self.packed or b""


@functools.lru_cache(maxsize=8)
def _properties(expiry_s: int | None, correlation_data: bytes | None) -> Properties:
    properties = _Packed(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    if correlation_data is not None:
        properties.CorrelationData = correlation_data
    return properties


class Client(paho.Client):
    """A paho client that connects once, and keeps what the broker answered.

    Arguments as of :class:`edgekit.mqtt.Connection`.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        protocol: MQTTProtocolVersion,
        tls: ssl.SSLContext | None,
        *,
        will: tuple[str, str] | None,
        session_expiry_s: int,
        receive_maximum: int,
        maximum_packet_size: int | None,
        manual_ack: bool,
    ) -> None:
        v5 = protocol == MQTTProtocolVersion.MQTTv5
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            clean_session=None if v5 else not session_expiry_s,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        self.address = address
        self.answer: ReasonCode | None = None
        self.session_present = False
        # Of the broker, for what we send.
        self.broker_receive_maximum, self.broker_maximum_packet_size = 20, 2**28
        self.lost_because, self.lost_code = "", UNSPECIFIED
        self.connect_timeout = ANSWER_TIMEOUT_S
        self.max_inflight_messages_set(65535)  # what may be under way is for the owner to decide
        self.username_pw_set(address.username, address.password)
        if tls:
            self.tls_set_context(tls)
        if will:
            self.will_set(*will, qos=1, retain=True)
        self._connecting: dict[str, Any] = {}
        if v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = session_expiry_s
            properties.ReceiveMaximum = receive_maximum
            if maximum_packet_size:
                properties.MaximumPacketSize = maximum_packet_size
            self._connecting = {"properties": properties, "clean_start": not session_expiry_s}
        self._ahead: _ReadAhead | None = None
        self.on_connect, self.on_disconnect = self._answered, self._disconnected

    def dial(self) -> None:
        """Opens the connection and sends CONNECT. Blocks for as long as it takes, names and TLS included."""
        self.connect(self.address.host, self.address.port, KEEP_ALIVE_S, **self._connecting)

    def open(self) -> _ReadAhead | None:
        """The connection's socket, once :meth:`dial` is through; None if the broker has hung up."""
        if sock := self.socket():
            # paho has no way to give it one
            self._sock = self._ahead = _ReadAhead(sock)  # type: ignore[assignment]
        return self._ahead

    @property
    def ahead(self) -> bool:
        """Whether more was received than read."""
        return bool(self._ahead and self.socket() and self._ahead.pending())

    def serve(self, readable: bool) -> None:
        """Reads and writes what can be without waiting, and does what is due."""
        if readable or self.ahead:
            self.loop_read()
            for _ in range(_READS):
                if not self.ahead:
                    break
                self.loop_read()
        if self.want_write():
            self.loop_write()
        self.loop_misc()

    def send(
        self,
        topic: str,
        payload: bytes | str,
        qos: int,
        retain: bool,
        expiry_s: int | None,
        correlation_data: bytes | None,
    ) -> int:
        properties = None
        if self.protocol == MQTTProtocolVersion.MQTTv5 and (expiry_s is not None or correlation_data is not None):
            properties = _properties(expiry_s, correlation_data)
        return self.publish(topic, payload, qos, retain, properties).mid

    def _answered(self, _client: Any, _userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        self.answer, self.session_present = reason, bool(flags.session_present)
        if properties:
            self.broker_receive_maximum = getattr(properties, "ReceiveMaximum", 65535)
            self.broker_maximum_packet_size = getattr(properties, "MaximumPacketSize", 2**28)

    def _disconnected(self, _client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self.lost_code = reason.value
        self.lost_because = "it hung up" if reason.value == UNSPECIFIED else reason.getName().lower()

"""Publishes what a device sees: ``status``, ``info``, ``prediction``, ``state``, at QoS 1."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.broker import BrokerAddress
from edgekit.errors import BrokerError
from edgekit.messages import OFFLINE, ONLINE, InfoMessage, PredictionMessage, StateMessage, encode, topic
from edgekit.mqtt import connect

logger = logging.getLogger(__name__)

# Predictions the broker has not acknowledged yet: past this many the pipeline waits for it.
MAX_UNACKNOWLEDGED = 1000
# Closing gives up when the broker has acknowledged nothing for so long.
CLOSE_TIMEOUT_S = 30.0
# Having been told to stop, it gives up sooner.
STOP_TIMEOUT_S = 3.0


class Publisher:
    """Says ``online`` and ``info`` on each connection, and ``offline`` at the end, by itself or by Last Will.

    Leaving the ``with`` block waits until the broker has acknowledged every message.

    Raises:
        BrokerError: the broker cannot be reached at the start, or, at the end, has refused messages or not acknowledged
            them; it says how many.
    """

    def __init__(self, address: BrokerAddress, info: InfoMessage, stream: str, stop: threading.Event) -> None:
        self._address, self._info, self._stop = address, info, stop
        device = info.device
        self._status_topic, self._info_topic = topic(device, "status"), topic(device, "info")
        self._prediction_topic, self._state_topic = (
            topic(device, stream, "prediction"),
            topic(device, stream, "state"),
        )
        self._acknowledged = threading.Condition()
        # Message ids on their way and those acknowledged; an acknowledgement may come before publish has returned.
        self._sent: set[int] = set()
        self._acks: set[int] = set()
        self._refused = 0
        self._last_ack_s = time.monotonic()
        self._class_id: int | None = -1
        self._state = b""
        self._client = connect(
            address,
            f"edgekit-{device}-{stream}",
            will=(self._status_topic, OFFLINE),
            on_connect=self._announce,
            on_publish=self._acknowledge,
        )

    def prediction(self, message: PredictionMessage) -> None:
        """Publishes ``message``, and the stream's state where its highest class changed.

        Waits while ``MAX_UNACKNOWLEDGED`` messages are on their way, so that a broker that is slow or away costs
        frames, which the source counts, and not memory.
        """
        while self._unacknowledged() >= MAX_UNACKNOWLEDGED and not self._stop.is_set():
            self._wait(0.2)
        self._publish(self._prediction_topic, encode(message))
        highest = message.predictions[0] if message.predictions else None
        class_id = highest.class_id if highest else None
        if class_id != self._class_id:
            self._class_id = class_id
            state = StateMessage(
                schema="edgekit.state/1",
                captured_at=message.captured_at,
                class_id=class_id,
                label=highest.label if highest else None,
                score=highest.score if highest else None,
            )
            self._state = encode(state)
            self._publish(self._state_topic, self._state, retain=True)

    def close(self) -> None:
        """Waits for the broker to acknowledge everything, says ``offline`` and disconnects."""
        lost = self._flush()
        # Said in any case: the broker may be slow and not gone, and a disconnect takes back the Last Will.
        self._publish(self._status_topic, OFFLINE, retain=True)
        if not lost and self._flush():
            logger.warning("broker %s has not acknowledged the last status, offline", self._address)
        self._client.disconnect()
        self._client.loop_stop()
        if lost:
            raise BrokerError(
                f"broker {self._address} has not acknowledged {lost} messages", mend="check the broker and run again"
            )
        if self._refused:
            raise BrokerError(
                f"broker {self._address} refused {self._refused} messages",
                mend="check its access rules for this user and device id",
            )

    def _flush(self) -> int:
        """Waits until all is acknowledged or the broker has been still for too long; how many are left."""
        self._last_ack_s = time.monotonic()
        while left := self._unacknowledged():
            patience_s = STOP_TIMEOUT_S if self._stop.is_set() else CLOSE_TIMEOUT_S
            if time.monotonic() - self._last_ack_s > patience_s:
                break
            self._wait(0.2)
        return left

    def _announce(self, client: paho.Client) -> None:
        self._client = client
        self._publish(self._status_topic, ONLINE, retain=True)
        self._publish(self._info_topic, encode(self._info), retain=True)
        if self._state:  # connected again, to a broker that may have forgotten it
            self._publish(self._state_topic, self._state, retain=True)

    def _publish(self, to: str, payload: bytes | str, retain: bool = False) -> None:
        # paho calls _acknowledge with its own lock held: ours must not be held here.
        sent = self._client.publish(to, payload, qos=1, retain=retain)
        with self._acknowledged:
            self._sent.add(sent.mid)

    def _acknowledge(self, mid: int, reason: ReasonCode) -> None:
        with self._acknowledged:
            if reason.is_failure:  # MQTT 5 only: an older broker drops what it does not allow and says nothing
                if not self._refused:
                    logger.error("broker %s refuses what is published: %s", self._address, reason)
                self._refused += 1
            self._acks.add(mid)
            self._last_ack_s = time.monotonic()
            self._acknowledged.notify_all()

    def _unacknowledged(self) -> int:
        with self._acknowledged:
            both = self._sent & self._acks
            self._sent -= both
            self._acks -= both
            return len(self._sent)

    def _wait(self, timeout_s: float) -> None:
        with self._acknowledged:
            if not self._acks:
                self._acknowledged.wait(timeout_s)

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

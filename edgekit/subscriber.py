"""Receives what devices publish, as typed messages."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Literal

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from edgekit.broker import parse_broker
from edgekit.errors import BrokerError
from edgekit.messages import PREFIX, PredictionMessage, check_name
from edgekit.mqtt import connect, unique_client_id

logger = logging.getLogger(__name__)

Kind = Literal["prediction", "event", "state", "status", "info", "health"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a device.

    ``prediction`` is set for the kind ``prediction``; ``payload`` is the decoded JSON, for ``status`` its text.
    ``missing`` holds the ``seq`` numbers between this prediction and the one before it, of the same device, stream and
    boot, that never came.
    """

    kind: Kind
    device: str
    stream: str
    topic: str
    payload: object
    retained: bool
    prediction: PredictionMessage | None = None
    missing: range = range(0)

    @property
    def label(self) -> str | None:
        """Label of the highest class; None for another kind of message, or where no class reached the threshold."""
        return self.prediction.predictions[0].label if self.prediction and self.prediction.predictions else None

    @property
    def score(self) -> float | None:
        return self.prediction.predictions[0].score if self.prediction and self.prediction.predictions else None

    @property
    def captured_at(self) -> str | None:
        """When the frame was captured, RFC 3339 in UTC."""
        return self.prediction.captured_at if self.prediction else None


class Subscriber:
    """Iterates over the messages of devices, reconnecting as need be; a context manager.

    Args:
        broker: ``mqtt://[user:pass@]host[:port]`` or ``mqtts://…``.
        device, stream: only this one; None for all.
        kinds: only these kinds of message.
        group: subscribers of one group share the messages among them (shared subscription).
        patience_s: keep trying for so long while the broker cannot be reached at the start.

    Raises:
        BrokerError: the broker cannot be reached at the start, or refuses the subscription.
        EdgekitError: a name cannot be part of a topic.
    """

    def __init__(
        self,
        broker: str,
        *,
        device: str | None = None,
        stream: str | None = None,
        kinds: tuple[Kind, ...] = ("prediction",),
        group: str | None = None,
        patience_s: float = 0.0,
    ) -> None:
        of_device = "+" if device is None else check_name(device, "device")
        of_stream = "+" if stream is None else check_name(stream, "stream")
        share = f"$share/{check_name(group, 'group')}/" if group is not None else ""
        self._filters = [
            share + "/".join((PREFIX, of_device, kind) if kind in _OF_DEVICE else (PREFIX, of_device, of_stream, kind))
            for kind in kinds
        ]
        self._last_seq: dict[tuple[str, str, str], int] = {}
        self._messages: queue.SimpleQueue[paho.MQTTMessage] = queue.SimpleQueue()
        self._subscribed = threading.Event()
        self._refusal = ""
        self._client = connect(
            parse_broker(broker),
            unique_client_id("subscriber"),
            on_connect=lambda client: client.subscribe([(topic_filter, 1) for topic_filter in self._filters]),
            on_message=self._messages.put,
            on_subscribe=self._answered,
            patience_s=patience_s,
        )
        try:
            if group is not None and self._client.protocol != MQTTProtocolVersion.MQTTv5:
                raise BrokerError(
                    "a group needs shared subscriptions, which came with MQTT 5, and the broker speaks 3.1.1",
                    mend="leave the group out, or use a broker that speaks MQTT 5",
                )
            self._subscribed.wait(10)
            self._check()
        except BaseException:
            self.close()
            raise

    def _answered(self, reasons: list[ReasonCode]) -> None:
        refused = [reason for reason in reasons if reason.is_failure]
        self._refusal = str(refused[0]).lower() if refused else ""
        self._subscribed.set()

    def _check(self) -> None:
        if self._refusal:
            raise BrokerError(
                f"broker refused the subscription: {self._refusal}", mend="check its access rules for this user"
            )

    def next(self, timeout_s: float | None = None) -> Message:
        """The next message. One that is not EdgeKit's is skipped, with a warning.

        Raises:
            TimeoutError: none came within ``timeout_s``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # In short waits, so that Ctrl-C is heard on every platform.
            left_s = 0.5 if deadline is None else min(0.5, max(0.0, deadline - time.monotonic()))
            try:
                received = self._messages.get(timeout=left_s)
            except queue.Empty:
                self._check()
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"no message within {timeout_s:g} s") from None
                continue
            try:
                return self._decode(received)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                logger.warning("message on %s skipped, it is not one of EdgeKit's: %s", received.topic, error)

    def __iter__(self) -> Iterator[Message]:
        while True:
            yield self.next()

    def _decode(self, received: paho.MQTTMessage) -> Message:
        levels = received.topic.split("/")
        kind, stream = levels[-1], levels[2] if len(levels) == 4 else ""
        prediction, missing = None, range(0)
        payload: object = received.payload.decode() if kind == "status" else msgspec.json.decode(received.payload)
        if kind == "prediction":
            prediction = msgspec.convert(payload, PredictionMessage)
            missing = self._account(prediction)
        return Message(
            kind=kind,  # type: ignore[arg-type]
            device=levels[1],
            stream=stream,
            topic=received.topic,
            payload=payload,
            retained=received.retain,
            prediction=prediction,
            missing=missing,
        )

    def _account(self, prediction: PredictionMessage) -> range:
        key = (prediction.device, prediction.stream, prediction.boot_id)
        last = self._last_seq.get(key, prediction.seq - 1)
        self._last_seq[key] = max(last, prediction.seq)
        return range(last + 1, prediction.seq)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_OF_DEVICE = ("status", "info", "health")

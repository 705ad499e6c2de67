"""A message of a device as a subscriber gets it, typed."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec
from paho.mqtt.client import MQTTMessage

from edgekit.accounting import Accounting
from edgekit.decode import Prediction
from edgekit.events import Events
from edgekit.messages import PAYLOADS, EventMessage, HealthMessage, InfoMessage, PredictionMessage, StateMessage

Kind = Literal["prediction", "event", "state", "status", "info", "health"]
# Those of a whole device; the others are of a stream.
OF_DEVICE = ("status", "info", "health")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a device.

    Of ``prediction``, ``event``, ``state``, ``info`` and ``health`` the one of its ``kind`` is set. ``payload`` is the
    decoded JSON, for ``status`` its text. ``stream`` is empty where a message is about the whole device.
    ``missing`` holds the ``seq`` numbers between this prediction and those before it, of the same device, stream and
    boot, that have not come; never for a consumer of a group. ``duplicate``: this prediction or event came before.
    ``began`` is the begin of an event that ends, if it came. ``left_open``: events of this stream that will not end, as
    the device has died since, or the end was lost; neither is known to a consumer of a group.
    """

    kind: Kind
    device: str
    stream: str
    topic: str
    payload: object
    retained: bool
    prediction: PredictionMessage | None = None
    event: EventMessage | None = None
    state: StateMessage | None = None
    info: InfoMessage | None = None
    health: HealthMessage | None = None
    missing: range = range(0)
    duplicate: bool = False
    began: EventMessage | None = None
    left_open: tuple[EventMessage, ...] = ()

    @property
    def label(self) -> str | None:
        """Label of the highest class of a prediction or state, or of an event; None where there is none."""
        return self._named.label if self._named else None

    @property
    def score(self) -> float | None:
        return self._named.score if self._named else None

    @property
    def captured_at(self) -> str | None:
        """When the frame of a prediction, event or state was captured, RFC 3339 in UTC."""
        if self.event:
            return self.event.at
        of_frame = self.prediction or self.state
        return of_frame.captured_at if of_frame else None

    @property
    def held_s(self) -> float | None:
        """For how long a label was held, by the device's clock; None but for an end whose begin came."""
        if not (self.event and self.began):
            return None
        try:
            return (_time(self.event.at) - _time(self.began.at)).total_seconds()
        except ValueError:  # no time at all, as the 99th of a month
            return None

    @property
    def _named(self) -> Prediction | EventMessage | StateMessage | None:
        if self.prediction:
            return self.prediction.predictions[0] if self.prediction.predictions else None
        return self.event or self.state

    def __str__(self) -> str:
        """One line for people, without what could steer a terminal: labels and texts are of whoever may publish."""
        if self.prediction:
            named = ", ".join(f"{p.label} {p.score:.2f}" for p in self.prediction.predictions) or "-"
            what, replayed = f"#{self.prediction.seq}  {named}", self.prediction.replayed
        elif self.event:
            held = "" if self.held_s is None else f" after {self.held_s:.1f} s"
            what = f"{self.event.event}  {self.event.label} {self.event.score:.2f}{held}"
            replayed = self.event.replayed
        else:
            return printable(f"{self.topic}  {self.payload}")
        notes = {
            "replayed": replayed,
            "duplicate": self.duplicate,
            f"{len(self.missing):,} missing": self.missing,
            f"left open: {', '.join(f'{event.label} since {event.at}' for event in self.left_open)}": self.left_open,
        }
        noted = "".join(f"  [{note}]" for note, holds in notes.items() if holds)
        return printable(f"{self.captured_at}  {self.device}/{self.stream}  {what}{noted}")


def _time(timestamp: str) -> datetime:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00"))  # Python 3.10 reads no Z


def printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def decode(received: MQTTMessage, prefix: str, accounting: Accounting, events: Events) -> Message:
    """``received`` on a topic below ``prefix``, typed; a prediction or event is taken into account.

    Raises:
        MsgspecError, ValueError, LookupError, ArithmeticError, RecursionError: it is not one of EdgeKit's.
    """
    device, *of_stream, kind = received.topic.removeprefix(prefix).split("/")
    if kind not in PAYLOADS and kind != "status":
        raise msgspec.ValidationError(f"its kind is {kind!r}")
    stream = of_stream[0] if of_stream else ""
    fields: dict[str, Any] = {}
    payload: object = received.payload.decode() if kind == "status" else msgspec.json.decode(received.payload)
    if kind != "status":
        typed = fields[kind] = msgspec.convert(payload, PAYLOADS[kind])
        # Who may write to this topic may not speak for others.
        for name, of_topic in (("device", device), ("stream", stream)):
            if getattr(typed, name, of_topic) != of_topic:
                raise msgspec.ValidationError(f"its {name} is {getattr(typed, name)!r}")
        if isinstance(typed, PredictionMessage):
            if typed.seq >= 2**53:
                raise msgspec.ValidationError(f"its seq is {typed.seq}")
            heard = accounting.add(typed, redelivered=received.dup)
            fields.update(missing=heard.missing, duplicate=heard.duplicate, left_open=events.add(typed).left_open)
        elif isinstance(typed, EventMessage):
            fields.update(events.add(typed)._asdict())
    return Message(
        kind=kind,  # type: ignore[arg-type]
        device=device,
        stream=stream,
        topic=received.topic,
        payload=payload,
        retained=received.retain,
        **fields,
    )

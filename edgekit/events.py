"""Which labels a device holds, told by the events that came: begins and ends paired, and those that will not end."""

from __future__ import annotations

from typing import NamedTuple

from edgekit.messages import EventMessage, PredictionMessage

# Of one stream. A device sends no more than a hundred messages again, and a broker no more than wait at a subscriber.
REMEMBERED = 256
# Boots of one stream, those heard last.
BOOTS = 64


class Told(NamedTuple):
    """What one message tells beside itself.

    ``duplicate``: this event came before. ``began``: the begin of an event that ends. ``left_open``: events that began
    and will not end, as their device died, or of which the end was lost.
    """

    duplicate: bool = False
    began: EventMessage | None = None
    left_open: tuple[EventMessage, ...] = ()


class _Stream:
    def __init__(self) -> None:
        self.boot_ids: dict[str, None] = {}  # the one heard last is the last one
        self.open: dict[int, EventMessage] = {}  # by class
        self.came: dict[tuple[str, str], None] = {}  # event_id and event, the newest last


class Events:
    """Follows the events of all devices and streams, in the order in which they come.

    Args:
        partial: of one consumer of a group, which gets its share of the messages, and so cannot pair them.
    """

    def __init__(self, *, partial: bool = False) -> None:
        self.partial = partial
        self._streams: dict[tuple[str, str], _Stream] = {}

    @property
    def open(self) -> list[EventMessage]:
        """The begins of those that have not ended, as far as is known."""
        # lists: another thread may add one meanwhile
        return [event for stream in list(self._streams.values()) for event in list(stream.open.values())]

    def of(self, device: str, stream: str) -> list[EventMessage]:
        """As :attr:`open`, of one stream."""
        known = self._streams.get((device, stream))
        return list(known.open.values()) if known else []

    def add(self, message: EventMessage | PredictionMessage) -> Told:
        """Takes an event into account, or a prediction, which tells of another boot as well.

        A device sends what it has of an earlier boot first, so that with the first message of a new one it is known
        that no end will come. Times do not tell: a device's clock may be set.
        """
        key = message.device, message.stream
        if isinstance(message, PredictionMessage) and key not in self._streams:
            return Told()
        known = self._streams.setdefault(key, _Stream())
        left_open: list[EventMessage] = []
        if message.boot_id in known.boot_ids:
            if next(reversed(known.boot_ids)) != message.boot_id:
                known.boot_ids[message.boot_id] = known.boot_ids.pop(message.boot_id)
        else:
            known.boot_ids[message.boot_id] = None
            if len(known.boot_ids) > BOOTS:
                del known.boot_ids[next(iter(known.boot_ids))]
            left_open += known.open.values()
            known.open.clear()
        if isinstance(message, EventMessage):
            return self._add(message, known, left_open)
        return Told(left_open=tuple(left_open))

    def _add(self, event: EventMessage, known: _Stream, left_open: list[EventMessage]) -> Told:
        if (event.event_id, event.event) in known.came:
            return Told(duplicate=True)
        known.came[event.event_id, event.event] = None
        if len(known.came) > REMEMBERED:
            del known.came[next(iter(known.came))]
        if self.partial:
            return Told()
        open_one = known.open.get(event.class_id)
        if event.event == "end":
            if not open_one or open_one.event_id != event.event_id:
                return Told(left_open=tuple(left_open))
            return Told(began=known.open.pop(event.class_id), left_open=tuple(left_open))
        if (event.event_id, "end") not in known.came:
            if open_one:
                left_open.append(open_one)
            known.open[event.class_id] = event
        return Told(left_open=tuple(left_open))

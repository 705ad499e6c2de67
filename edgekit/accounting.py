"""What came of each stream and what did not: gaps, duplicates and reordering, told by the ``seq`` of predictions."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec

from edgekit.errors import EdgekitError
from edgekit.messages import Count, PredictionMessage

# Gaps that are remembered of one boot; of older ones only how many predictions were missing.
GAPS = 4096
# Boots that are remembered of one stream, those heard last; of earlier ones only the counts.
BOOTS = 8
# Ranges that a line names.
NAMED = 5


class Intervals:
    """A set of whole numbers from 0 to 2⁶³-1, as the edges of its intervals: first, one past the last, first, …"""

    def __init__(self, ranges: Iterable[range] = ()) -> None:
        self.edges = array("q")
        for numbers in ranges:
            self.add(numbers)

    def __contains__(self, number: int) -> bool:
        return bisect_right(self.edges, number) % 2 == 1

    def add(self, numbers: range) -> None:
        edges = self.edges
        if numbers and edges and numbers.start == edges[-1]:  # nearly always
            edges[-1] = numbers.stop
        elif numbers:
            left, right = bisect_left(edges, numbers.start), bisect_right(edges, numbers.stop)
            # An edge at an odd place is the end of an interval, which the new one then goes on.
            new = [edge for edge, place in ((numbers.start, left), (numbers.stop, right)) if place % 2 == 0]
            edges[left:right] = array("q", new)

    def ranges(self) -> list[range]:
        return [range(start, stop) for start, stop in zip(self.edges[::2], self.edges[1::2], strict=True)]

    def size(self) -> int:
        return sum(self.edges[1::2]) - sum(self.edges[::2])

    def common(self, other: Intervals) -> Intervals:
        found, mine, others = Intervals(), self.ranges(), other.ranges()
        while mine and others:
            found.add(range(max(mine[-1].start, others[-1].start), min(mine[-1].stop, others[-1].stop)))
            # From the end: what reaches less far down is done with.
            (mine if mine[-1].start > others[-1].start else others).pop()
        return found

    def forget_below(self, number: int) -> None:
        place = bisect_right(self.edges, number)
        self.edges[:place] = array("q", [number] if place % 2 else [])


class Heard(NamedTuple):
    """What the ``seq`` of one prediction tells: those before it that did not come, and whether it came before."""

    missing: range
    duplicate: bool


class Boot(msgspec.Struct, kw_only=True):
    """What came of one stream since its device's runtime started.

    ``first`` is the ``seq`` that is expected first: 1, or that of the first prediction heard where it may have started
    before us; what comes from before that is no reason to miss others. ``sent_again`` are those of ``received`` that
    said so, ``replayed`` by the device or by the broker.
    """

    device: str
    stream: str
    boot_id: str
    first: int
    newest_at: str
    received: Intervals = msgspec.field(default_factory=Intervals)
    sent_again: Intervals = msgspec.field(default_factory=Intervals)
    predictions: Count = 0
    duplicates: Count = 0
    duplicates_unflagged: Count = 0
    reordered: Count = 0
    missing_below_first: Count = 0

    def add(self, seq: int, sent_again: bool) -> Heard:
        edges = self.received.edges
        end = edges[-1] if edges else self.first
        if seq in self.received or (self.missing_below_first and seq < self.first):
            self.duplicates += 1
            self.duplicates_unflagged += not sent_again
            return Heard(range(0), True)
        self.predictions += 1
        self.reordered += seq < end
        self.received.add(range(seq, seq + 1))
        if sent_again:
            self.sent_again.add(range(seq, seq + 1))
        del self.sent_again.edges[: -2 * GAPS]
        if len(edges) > 2 * GAPS:
            oldest, self.first = self.first, max(self.first, edges[2])
            self.missing_below_first += max(0, edges[0] - oldest) + max(0, edges[2] - max(edges[1], oldest))
            self.begin_at(self.first)
        return Heard(range(end, seq), False)

    def missing(self) -> list[range]:
        """Those that did not come, up to the newest one that did."""
        ends = [self.first, *self.received.edges[1::2]]
        gaps = [range(max(end, self.first), start) for end, start in zip(ends, self.received.edges[::2], strict=False)]
        return [gap for gap in gaps if gap]

    def missing_count(self) -> int:
        return self.missing_below_first + sum(map(len, self.missing()))

    def take_in(self, other: Boot) -> None:
        """Adds what another subscriber heard of the same boot."""
        self.first = min(self.first, other.first)
        twice = self.received.common(other.received)
        for mine, others in ((self.received, other.received), (self.sent_again, other.sent_again)):
            for numbers in others.ranges():
                mine.add(numbers)
        self.newest_at = max(self.newest_at, other.newest_at)
        self.predictions += other.predictions - twice.size()
        self.duplicates += other.duplicates + twice.size()
        self.duplicates_unflagged += other.duplicates_unflagged + twice.size() - twice.common(self.sent_again).size()
        self.reordered += other.reordered
        self.missing_below_first += other.missing_below_first

    def begin_at(self, first: int) -> None:
        self.first = first
        self.received.forget_below(first)
        self.sent_again.forget_below(first)


class Earlier(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The counts of all boots of one stream that are no longer remembered."""

    device: str
    stream: str
    boots: Count = 0
    predictions: Count = 0
    missing: Count = 0
    duplicates: Count = 0
    duplicates_unflagged: Count = 0
    reordered: Count = 0

    def take_in(self, other: Earlier) -> None:
        for name in ("boots", "predictions", "missing", "duplicates", "duplicates_unflagged", "reordered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _Stream:
    def __init__(self, device: str, stream: str) -> None:
        self.boots: dict[str, Boot] = {}  # the one heard last is the last one
        self.earlier = Earlier(device=device, stream=stream)

    def fold(self, boot: Boot, missing: int) -> None:
        earlier = self.earlier
        earlier.take_in(
            Earlier(
                device=earlier.device,
                stream=earlier.stream,
                boots=1,
                predictions=boot.predictions,
                missing=missing,
                duplicates=boot.duplicates,
                duplicates_unflagged=boot.duplicates_unflagged,
                reordered=boot.reordered,
            )
        )

    def bound(self, partial: bool) -> None:
        while len(self.boots) > BOOTS:
            oldest = self.boots.pop(next(iter(self.boots)))
            self.fold(oldest, 0 if partial else oldest.missing_count())


class _Stored(msgspec.Struct):
    """The JSON form."""

    schema: Literal["edgekit.accounting/1"]
    partial: bool
    boots: list[Boot]
    earlier: list[Earlier] = msgspec.field(default_factory=list)


class Accounting:
    """What came, by device, stream and boot. Of each stream it takes a bounded memory.

    ``str()`` of it is one line for people. A stream is accounted for from the first of its predictions that came, and
    each later boot of it from ``seq`` 1, up to the newest that came.

    Args:
        partial: of one consumer of a group, which gets its share of the predictions: what is missing is known when the
            accountings of the whole group are merged.
    """

    def __init__(self, *, partial: bool = False) -> None:
        self.partial = partial
        self._streams: dict[tuple[str, str], _Stream] = {}

    def add(self, prediction: PredictionMessage, *, redelivered: bool = False) -> Heard:
        """Takes a prediction into account; ``redelivered``: the broker says that it sent it before (DUP)."""
        seq, boot_id, at = prediction.seq, prediction.boot_id, prediction.captured_at
        stream = self._stream(prediction.device, prediction.stream)
        boots = stream.boots
        if not (boot := boots.get(boot_id)):
            later = any(known.newest_at < at for known in boots.values())
            boot = boots[boot_id] = Boot(
                device=prediction.device,
                stream=prediction.stream,
                boot_id=boot_id,
                first=1 if later else seq,
                newest_at=at,
            )
            stream.bound(self.partial)
        elif next(reversed(boots)) != boot_id:
            boots[boot_id] = boots.pop(boot_id)
        boot.newest_at = max(boot.newest_at, at)
        heard = boot.add(seq, prediction.replayed or redelivered)
        return Heard(range(0), heard.duplicate) if self.partial else heard

    def _stream(self, device: str, stream: str) -> _Stream:
        key = device, stream
        return self._streams.get(key) or self._streams.setdefault(key, _Stream(device, stream))

    @classmethod
    def merge(cls, parts: Iterable[Accounting]) -> Accounting:
        """The accounting of all consumers of a group, or of consecutive runs of one subscriber.

        It begins where each of them remembers all gaps; a consumer of a group forgets what it had long ago. Of a boot
        which a group shared and one of them may have forgotten, what came is counted, and nothing is missing.
        What came to two of them is a duplicate where both remember the boot.
        """
        parts = list(parts)
        heard: dict[tuple[str, str, str], list[tuple[Boot, bool]]] = {}
        for part in parts:
            for boot in cls.from_json(part.to_json()).boots:  # of a copy
                heard.setdefault((boot.device, boot.stream, boot.boot_id), []).append((boot, part.partial))
        merged = cls()
        for (device, stream, boot_id), boots in heard.items():
            begin = max((boot.first for boot, _ in boots if boot.missing_below_first), default=0)
            whole = Boot(device=device, stream=stream, boot_id=boot_id, first=begin or boots[0][0].first, newest_at="")
            for boot, partial in boots:
                if begin:
                    boot.begin_at(begin)
                if partial:  # it missed the share of the others
                    boot.missing_below_first = 0
                whole.take_in(boot)
            partly = any(partial for _, partial in boots)
            if partly and any(part._may_have_forgotten(device, stream, boot_id) for part in parts):
                merged._stream(device, stream).fold(whole, 0)
            else:
                merged._stream(device, stream).boots[boot_id] = whole
        for part in parts:
            for earlier in part._earlier():
                merged._stream(earlier.device, earlier.stream).earlier.take_in(earlier)
        for of_stream in merged._streams.values():
            if len(of_stream.boots) > BOOTS:
                of_stream.boots = dict(sorted(of_stream.boots.items(), key=lambda boot: boot[1].newest_at))
                of_stream.bound(partial=False)
        return merged

    def _may_have_forgotten(self, device: str, stream: str, boot_id: str) -> bool:
        known = self._streams.get((device, stream))
        return bool(known and known.earlier.boots and boot_id not in known.boots)

    def _earlier(self) -> list[Earlier]:
        return [stream.earlier for stream in list(self._streams.values()) if stream.earlier.boots]

    def to_json(self) -> bytes:
        stored = _Stored("edgekit.accounting/1", self.partial, self.boots, self._earlier())
        return msgspec.json.encode(stored, enc_hook=_encoded)

    @classmethod
    def from_json(cls, text: bytes | str) -> Accounting:
        """
        Raises:
            EdgekitError: ``text`` is not what :meth:`to_json` makes.
        """
        try:
            stored = msgspec.json.decode(text, type=_Stored, dec_hook=_decoded)
        except (msgspec.DecodeError, ValueError, OverflowError) as error:
            raise EdgekitError("accounting", expected="JSON as Accounting.to_json makes", got=str(error)) from error
        accounting = cls(partial=stored.partial)
        for boot in stored.boots:
            accounting._stream(boot.device, boot.stream).boots[boot.boot_id] = boot
        for earlier in stored.earlier:
            accounting._stream(earlier.device, earlier.stream).earlier.take_in(earlier)
        return accounting

    def of(self, device: str, stream: str) -> Accounting:
        """That of one stream alone, which goes on with this one."""
        one = Accounting(partial=self.partial)
        one._streams = {(device, stream): self._streams.get((device, stream)) or _Stream(device, stream)}
        return one

    @property
    def boots(self) -> list[Boot]:
        """Those that are remembered: of each stream the last ones."""
        # lists: another thread may add one meanwhile
        return [boot for stream in list(self._streams.values()) for boot in list(stream.boots.values())]

    def _count(self, what: Literal["predictions", "duplicates", "duplicates_unflagged", "reordered"]) -> int:
        return sum(getattr(counted, what) for counted in (*self._earlier(), *self.boots))

    @property
    def predictions(self) -> int:
        """How many came, each counted once."""
        return self._count("predictions")

    @property
    def missing(self) -> int | None:
        """How many did not come; None where that is not known, of one consumer of a group."""
        if self.partial:
            return None
        return sum(earlier.missing for earlier in self._earlier()) + sum(boot.missing_count() for boot in self.boots)

    @property
    def duplicates(self) -> int:
        return self._count("duplicates")

    @property
    def duplicates_unflagged(self) -> int:
        """How many of the duplicates neither the device marked as replayed nor the broker as sent before."""
        return self._count("duplicates_unflagged")

    @property
    def reordered(self) -> int:
        """How many came after one with a higher ``seq``."""
        return self._count("reordered")

    def __str__(self) -> str:
        if not self._streams:
            return "no predictions"
        duplicates, unflagged = self.duplicates, self.duplicates_unflagged
        flagged = f" ({unflagged:,} not marked as such)" if unflagged else " (all replayed)" if duplicates else ""
        came = (
            f"{_counted(self.predictions, 'prediction')} of {_counted(len(self._streams), 'stream')}, "
            f"{_counted(duplicates, 'duplicate')}{flagged}, {self.reordered:,} reordered"
        )
        if self.partial:
            return f"one of a group, whose accountings together tell what is missing: {came}"
        return f"{self._missing() or 'nothing missing'}: {came}"

    def _missing(self) -> str:
        named = [
            f"{earlier.device}/{earlier.stream} {earlier.missing:,} in earlier boots"
            for earlier in self._earlier()
            if earlier.missing
        ]
        for boot in self.boots:
            # repr: the name of a boot may be any text
            of_boot = f"{boot.device}/{boot.stream} {boot.boot_id[:16]!r}"
            if boot.missing_below_first:
                named.append(f"{of_boot} {boot.missing_below_first:,} below {boot.first}")
            for lost in boot.missing():
                named.append(f"{of_boot} {lost[0]}" + (f"-{lost[-1]}" if len(lost) > 1 else ""))
        more = f", and {len(named) - NAMED:,} gaps more" if len(named) > NAMED else ""
        return f"{self.missing:,} missing ({', '.join(named[:NAMED])}{more})" if named else ""


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _encoded(intervals: Any) -> list[tuple[int, int]]:
    """First and last of each."""
    return [(numbers[0], numbers[-1]) for numbers in intervals.ranges()]


def _decoded(_type: type, pairs: Any) -> Intervals:
    return Intervals(range(first, last + 1) for first, last in pairs)

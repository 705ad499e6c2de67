"""What a soak found: the account of every prediction, and who lost it."""

from __future__ import annotations

from collections import Counter

import msgspec

from edgekit.devices.soak.proxy import Passage

# Lost predictions that a text names.
_NAMED = 20
# The reason in a PUBACK of MQTT 5 for a message that nobody had subscribed to.
_NO_SUBSCRIBERS = 0x10


class Lost(msgspec.Struct):
    id: str
    by: str
    how: str


class CallMs(msgspec.Struct):
    """Milliseconds that the runtime was held up by publishing one prediction."""

    p50: float
    p99: float
    max: float


class SoakResult(msgspec.Struct, kw_only=True):
    """The account. ``sent``: predictions of which the runtime told, after its publisher had taken them.

    ``untold``: those that arrived of which it could tell no more, as it was killed. Of the duplicates those are
    ``unflagged`` that neither the runtime marked as replayed nor the broker as sent before (DUP); ``by_broker`` are
    those that the runtime had sent once only. ``runtime_ended``: why a runtime ended that was not killed.
    """

    seed: int
    duration_s: float
    rate: float
    faults: dict[str, int]
    runtime_starts: int
    runtime_ended: list[str]
    sent: int
    received: int
    untold: int
    lost: list[Lost]
    duplicates: int
    duplicates_unflagged: int
    duplicates_by_broker: int
    reordered: int
    shed: dict[str, int]
    call_ms: CallMs | None

    @property
    def sound(self) -> bool:
        return not self.lost and not self.duplicates_unflagged

    def __str__(self) -> str:
        unflagged = f"{self.duplicates_unflagged:,} not marked as such" if self.duplicates_unflagged else "all marked"
        of_duplicates = f" ({unflagged}, {self.duplicates_by_broker:,} by the broker)" if self.duplicates else ""
        shed = ", ".join(f"{count:,} {cause}" for cause, count in self.shed.items()) or "none"
        befell = ", ".join(f"{count} x {action}" for action, count in self.faults.items()) or "no faults"
        lines = [
            f"sent {self.sent:,}, received {self.received:,}, lost {len(self.lost):,}",
            f"duplicates {self.duplicates:,}{of_duplicates}, reordered {self.reordered:,}, shed {shed}",
            f"in {self.duration_s:g} s at {self.rate:g} a second, seed {self.seed}: {befell}",
        ]
        if self.call_ms:
            lines.append(
                "publishing held up the runtime for {p50} ms (p50), {p99} ms (p99), {max} ms at most".format(
                    **msgspec.structs.asdict(self.call_ms)
                )
            )
        lines += [
            f"the runtime ended by itself, {count} times: {why}" for why, count in Counter(self.runtime_ended).items()
        ]
        lines += [f"lost {one.id}, by the {one.by}: {one.how}" for one in self.lost[:_NAMED]]
        if len(self.lost) > _NAMED:
            lines.append(f"and {len(self.lost) - _NAMED:,} more")
        return "\n".join(lines)


def blame(prediction: str, first: Passage | None, second: Passage | None) -> Lost:
    """Who had it last: ``first`` is its passage from the runtime to the broker, ``second`` on to the subscriber."""
    if first is None:
        return Lost(prediction, "runtime", "never sent")
    if second is not None and second.answer is not None:
        return Lost(prediction, "subscriber", f"acknowledged with {second.answer:#x}, not handed out")
    if first.answer is None:
        return Lost(prediction, "runtime", f"sent {first.times} times, never acknowledged, not sent again")
    if first.answer == _NO_SUBSCRIBERS:
        return Lost(prediction, "broker", "acknowledged as having no subscriber")
    if first.answer >= 0x80:
        return Lost(prediction, "runtime", f"refused by the broker with {first.answer:#x}, not sent again")
    if second is None:
        return Lost(prediction, "broker", "acknowledged, not passed on")
    return Lost(prediction, "broker", f"passed on {second.times} times, never acknowledged, not sent again")

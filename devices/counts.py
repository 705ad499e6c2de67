"""What became of the frames of a stream, or of several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What became of the frames, or the windows of sound: ``captured = inferred + dropped + failed + in_flight``.

    ``gaps``: how often the source was lost, or sound before there was a window of it. ``paused``: how many of those
    dropped came in a pause. ``failures``: those failed, by cause.
    """

    captured: int = 0
    inferred: int = 0
    dropped: int = 0
    failed: int = 0
    gaps: int = 0
    paused: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        return self.captured - self.inferred - self.dropped - self.failed

    @property
    def dropped_by_cause(self) -> dict[str, int]:
        return {"behind": self.dropped - self.paused, "paused": self.paused}

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.captured + other.captured,
            self.inferred + other.inferred,
            self.dropped + other.dropped,
            self.failed + other.failed,
            self.gaps + other.gaps,
            self.paused + other.paused,
            dict(Counter(self.failures) + Counter(other.failures)),
        )

    def __str__(self) -> str:
        gaps = f", {self.gaps} gaps" if self.gaps else ""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.failures.items())
        failed = f"{self.failed} failed" + (f" ({causes})" if causes else "")
        return f"{self.captured} captured, {self.inferred} inferred, {self.dropped} dropped, {failed}{gaps}"

"""Cuts the sound of a source into what a model is given: windows that overlap, or the hops of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekit.audio import Samples
from edgekit.manifest import AudioInput


@dataclass(frozen=True)
class Stretch:
    """A window, or a hop, of sound without a gap.

    ``end`` is the number of the sample after it, counted from the beginning or the last gap. ``window_samples`` is how
    much of the sound before ``end`` a prediction would be about. ``begins`` and ``complete`` as in
    :class:`~edgekit.devices.sources.frames.Frame`. ``error``: it cannot be used.
    """

    samples: Samples
    end: int
    window_samples: int
    begins: bool
    complete: bool
    error: str = ""


class Cutter:
    """Takes sound piece by piece."""

    def __init__(self, input: AudioInput) -> None:
        self._input = input
        # A stream is given each sample once.
        self._length = input.hop_samples if input.streaming else input.window_samples
        self.restart()

    def restart(self) -> None:
        """What comes next does not follow what came before."""
        self._pieces: list[Samples] = []
        # Numbers of the samples: the first one held, the one after the last, and where the next stretch begins.
        self._held = self._end = self._next = 0
        # From where on a stream has heard all without a gap.
        self._since = 0
        self._begins = True

    def push(self, samples: Samples) -> Iterator[Stretch]:
        """The stretches that are complete with ``samples``."""
        self._pieces.append(samples)
        self._end += len(samples)
        if self._end < self._next + self._length:
            return
        sound = np.concatenate(self._pieces)
        while self._end >= self._next + self._length:
            start = self._next - self._held
            yield self._stretch(sound[start : start + self._length].copy(), self._next + self._length)
            self._next += self._input.hop_samples
        # finish() may need the last window.
        forgotten = min(self._next, self._end - (0 if self._input.streaming else self._length)) - self._held
        self._pieces, self._held = [sound[forgotten:].copy()], self._held + forgotten

    def finish(self) -> Iterator[Stretch]:
        """The rest at the end of a file: the last window, which ends where the sound ends, or all of a sound that is
        shorter. Less than a hop at the end of a stream is left out."""
        covered = self._next - self._input.hop_samples + self._length if self._next else 0
        if not self._input.streaming and self._end > covered:
            yield self._stretch(np.concatenate(self._pieces)[-self._length :], self._end)

    def _stretch(self, samples: Samples, end: int) -> Stretch:
        error = "" if np.isfinite(samples).all() else "some of its samples are NaN or infinite"
        window = self._input.window_samples
        complete = not self._input.streaming or end - self._since >= window
        stretch = Stretch(samples, end, min(window, end), self._begins, complete, error)
        self._begins = bool(error)
        if error:
            self._since = end
        return stretch


class SampleClock:
    """When a sample was captured, by counting them: their arrival is uneven, their rate is not.

    The clock of the sound card and that of the system drift apart, some seconds a day. That is made up for slowly, with
    a time constant of a minute; at once where sound arrives earlier than by the count, as none does before it was made.

    Args:
        sample_rate_hz: of the samples counted.
    """

    _TIME_CONSTANT_S = 60.0

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate_hz = sample_rate_hz
        self._count = 0
        self._start_s = 0.0

    def late_s(self, samples: int, arrived_s: float) -> float:
        """By how much ``samples`` more, arrived at ``arrived_s`` on the monotonic clock, come later than by the count;
        0 for the first ones."""
        return arrived_s - self.time_s((self._count + samples) / self._rate_hz) if self._count else 0.0

    def count(self, samples: int, arrived_s: float) -> None:
        late_s, self._count = self.late_s(samples, arrived_s), self._count + samples
        duration_s = samples / self._rate_hz
        if self._count == samples:
            self._start_s = arrived_s - duration_s
        else:
            self._start_s += late_s * (min(duration_s / self._TIME_CONSTANT_S, 1) if late_s > 0 else 1)

    def time_s(self, since_start_s: float | None = None) -> float:
        """The monotonic time so many seconds of sound after the first sample; without it, after all that were
        counted."""
        return self._start_s + (self._count / self._rate_hz if since_start_s is None else since_start_s)


def wall_time_s(monotonic_s: float) -> float:
    """Seconds since 1970 of a time on the monotonic clock, as the system's clock is set now: it may be set while we
    run, as on a Raspberry Pi that starts without the time."""
    return monotonic_s + time.time() - time.monotonic()

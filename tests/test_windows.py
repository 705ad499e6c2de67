from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.devices.sources.windows import Cutter, SampleClock
from edgekit.manifest import AudioInput, LogMel

FRONT_END = LogMel(fft_samples=4, frame_hop_samples=2, num_mel_bins=1, low_hz=0, high_hz=500)
WINDOWS = AudioInput(sample_rate_hz=1000, window_samples=10, hop_samples=4, front_end=FRONT_END)
STREAM = msgspec.structs.replace(WINDOWS, streaming=True)


def cut(cutter: Cutter, samples: int, piece: int, start: int = 0) -> list[Any]:
    """All stretches of sound whose samples are their own numbers, given in pieces."""
    sound = np.arange(start, start + samples, dtype=np.float32)
    return [stretch for at in range(0, samples, piece) for stretch in cutter.push(sound[at : at + piece])]


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_windows_overlap_and_the_last_ends_with_the_sound(piece: int) -> None:
    cutter = Cutter(WINDOWS)
    stretches = [*cut(cutter, 25, piece), *cutter.finish()]
    assert [(s.samples[0], s.end) for s in stretches] == [(0, 10), (4, 14), (8, 18), (12, 22), (15, 25)]
    assert all(len(s.samples) == s.window_samples == 10 and s.complete for s in stretches)
    assert [s.begins for s in stretches] == [True, False, False, False, False]


def test_windows_that_end_with_the_sound_are_all() -> None:
    cutter = Cutter(WINDOWS)
    assert [s.end for s in [*cut(cutter, 18, 5), *cutter.finish()]] == [10, 14, 18]


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_windows_may_lie_apart(piece: int) -> None:
    cutter = Cutter(msgspec.structs.replace(WINDOWS, hop_samples=15))
    stretches = [*cut(cutter, 42, piece), *cutter.finish()]
    assert [(s.samples[0], s.end) for s in stretches] == [(0, 10), (15, 25), (30, 40), (32, 42)]


def test_sound_shorter_than_a_window_is_one() -> None:
    cutter = Cutter(WINDOWS)
    assert cut(cutter, 7, 2) == []
    (short,) = cutter.finish()
    assert (len(short.samples), short.end, short.window_samples, short.complete) == (7, 7, 7, True)


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_stream_is_complete_once_a_window_was_heard(piece: int) -> None:
    cutter = Cutter(STREAM)
    stretches = [*cut(cutter, 22, piece), *cutter.finish()]
    np.testing.assert_array_equal(np.concatenate([s.samples for s in stretches]), np.arange(20))
    assert [(s.end, s.complete, s.begins) for s in stretches] == [
        (4, False, True), (8, False, False), (12, True, False), (16, True, False), (20, True, False),
    ]  # fmt: skip


@pytest.mark.parametrize("input", [WINDOWS, STREAM])
def test_nothing_spans_a_restart(input: AudioInput) -> None:
    cutter = Cutter(input)
    cut(cutter, 19, 5)
    cutter.restart()
    stretches = cut(cutter, 14, 5, start=1000)
    assert stretches[0].begins and stretches[0].samples[0] == 1000
    complete = [s for s in stretches if s.complete]
    assert complete[0].end in (10, 12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_an_error_of_their_windows(bad: float) -> None:
    sound = np.arange(40, dtype=np.float32)
    sound[17] = bad
    windows = list(Cutter(WINDOWS).push(sound))
    assert [bool(s.error) for s in windows] == [s.end - 10 <= 17 < s.end for s in windows]
    hops = list(Cutter(STREAM).push(sound))
    assert [s.end for s in hops if s.error] == [20]
    assert [s.end for s in hops if s.begins] == [4, 24]
    assert [s.end for s in hops if s.complete] == [12, 16, 20, 32, 36, 40]


def clock_after(arrivals: list[tuple[int, float]], rate_hz: int = 1000) -> SampleClock:
    clock = SampleClock(rate_hz)
    for samples, arrived_s in arrivals:
        clock.count(samples, arrived_s)
    return clock


def test_clock_counts_samples_however_uneven_they_arrive() -> None:
    random = np.random.default_rng(0)
    clock = clock_after([(100, 50.1 + 0.1 * n + random.uniform(0, 0.05)) for n in range(1200)])
    assert clock.time_s(0) == pytest.approx(50, abs=0.06)
    assert clock.time_s() - clock.time_s(0) == pytest.approx(120)


@pytest.mark.parametrize("drift", [2e-4, -2e-4])
def test_clock_follows_a_sound_card_that_drifts(drift: float) -> None:
    """A card off by 17 s a day, for a day."""
    clock = clock_after([(1000, 50 + n * (1 + drift)) for n in range(1, 86_400)])
    assert clock.time_s() == pytest.approx(50 + 86_399 * (1 + drift), abs=0.05)


def test_clock_tells_how_late_sound_is() -> None:
    clock = SampleClock(1000)
    assert clock.late_s(100, 7.0) == 0
    clock.count(100, 7.0)
    assert clock.late_s(100, 7.1) == pytest.approx(0) and clock.late_s(100, 9.1) == pytest.approx(2)
    clock.count(100, 7.05)  # the first ones came late
    assert clock.time_s() == pytest.approx(7.05)

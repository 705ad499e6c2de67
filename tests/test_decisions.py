from __future__ import annotations

import re
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.devices.decisions import Change, Decisions
from edgekit.errors import EdgekitError
from edgekit.manifest import Output

ONE, SEVERAL = Output(activation="softmax"), Output(activation="sigmoid", multi_label=True)


def decisions(output: Output, limits: Iterable[float], **options: Any) -> Decisions:
    return Decisions(output, np.array(list(limits), np.float32), **options)


def told(changes: list[Change]) -> list[str]:
    return [f"{change.event} {change.class_id}" for change in changes]


def course(made: Decisions, *frames: Iterable[float]) -> list[list[str]]:
    return [told(made.update(np.array(list(scores), np.float32))) for scores in frames]


def test_label_is_held_from_its_threshold_to_below_the_hysteresis() -> None:
    made = decisions(ONE, [0.5, 0.5], hysteresis=0.125)
    scores = [0.25, 0.5, 0.4375, 0.375, 0.3125, 0.4375, 0.75]
    begun_and_ended = course(made, *([score, 0.0] for score in scores))
    assert begun_and_ended == [[], ["begin 0"], [], [], ["end 0"], [], ["begin 0"]]


def test_begin_and_end_have_one_id_and_the_score_of_their_time() -> None:
    made = decisions(SEVERAL, [0.5, 0.5])
    begins = made.update(np.array([0.75, 0.5], np.float32))
    ends = made.update(np.array([0.25, 0.125], np.float32))
    again = made.update(np.array([1.0, 0.0], np.float32))
    assert [(c.event, c.class_id, c.score) for c in begins + ends + again] == [
        ("begin", 0, 0.75), ("begin", 1, 0.5), ("end", 0, 0.25), ("end", 1, 0.125), ("begin", 0, 1.0),
    ]  # fmt: skip
    assert [c.event_id for c in begins] == [c.event_id for c in ends]
    assert re.fullmatch(r"[0-9a-f]{8}-1", begins[0].event_id)
    assert again[0].event_id not in {c.event_id for c in begins}
    other = decisions(SEVERAL, [0.5]).update(np.array([1.0], np.float32))
    assert other[0].event_id[:8] != begins[0].event_id[:8]


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.101, 0.12, 0.2, 0.6])
def test_label_ends_below_half_its_threshold_at_the_latest(threshold: float) -> None:
    made = decisions(SEVERAL, [threshold] * 3, hysteresis=0.1)
    frames = [threshold + 0.01, 0, 0], [max(threshold - 0.1, threshold / 2) - 0.001, 0, 0]
    assert course(made, *frames) == [["begin 0"], ["end 0"]]


def test_another_label_takes_over_in_one_update_once_it_leads_by_more_than_the_hysteresis() -> None:
    made = decisions(ONE, [0.0, 0.0], hysteresis=0.125)
    changes = course(made, [0.5, 0.5], [0.4375, 0.5625], [0.375, 0.625], [0.5, 0.5])
    assert changes == [["begin 0"], [], ["end 0", "begin 1"], []]


@pytest.mark.parametrize(("hysteresis", "expected"), [(0.0, ["end 0", "begin 1"]), (0.5, [])])
def test_label_takes_over_from_one_that_is_still_above_its_threshold(hysteresis: float, expected: list[str]) -> None:
    made = decisions(ONE, [0.25, 0.25], hysteresis=hysteresis)
    assert course(made, [0.625, 0.375], [0.375, 0.625]) == [["begin 0"], expected]


def test_label_that_does_not_reach_its_own_threshold_takes_nothing_over() -> None:
    """Class 1 is the highest throughout, and never reaches its threshold."""
    made = decisions(ONE, [0.25, 0.75], hysteresis=0.0)
    assert course(made, [0.375, 0.625], [0.25, 0.7], [0.125, 0.7]) == [["begin 0"], [], ["end 0"]]
    assert made.current is None


def test_without_a_threshold_one_label_is_always_held() -> None:
    made = decisions(ONE, [0, 0, 0], hysteresis=0.0)
    changes = course(made, [0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0.5])
    assert changes == [["begin 0"], ["end 0", "begin 1"], [], ["end 1", "begin 2"]]
    assert told(made.end()) == ["end 2"]


def test_several_labels_are_held_each_by_its_threshold() -> None:
    made = decisions(SEVERAL, [0.5, 0.75, 1.0], hysteresis=0.25)
    changes = course(made, [0.5, 0.8, 0.9], [0.3, 0.8, 1.0], [0.2, 0.6, 0.8], [0, 0, 0])
    assert changes == [["begin 0", "begin 1"], ["begin 2"], ["end 0"], ["end 1", "end 2"]]


def test_labels_without_a_threshold_make_no_events_where_several_are_held() -> None:
    made = decisions(SEVERAL, [0.0, 0.5], hysteresis=0.125)
    assert course(made, [0.25, 0.0]) == [[]] and made.current == (0, 0.25)
    assert course(made, [0.25, 0.5]) == [["begin 1"]] and made.current == (1, 0.5)
    assert course(made, [0.25, 0.375]) == [[]] and made.current == (1, 0.375), "held, if below its threshold"
    assert course(made, [0.5, 0.375]) == [[]] and made.current == (0, 0.5)
    assert told(made.end()) == ["end 1"] and made.current is None


@pytest.mark.parametrize("output", [ONE, SEVERAL])
def test_nothing_is_held_below_the_thresholds(output: Output) -> None:
    made = decisions(output, [0.5, 0.5])
    assert course(made, [0.4, 0.3], [0.1, 0.4]) == [[], []]
    assert made.current is None and made.end() == []


@pytest.mark.parametrize("output", [ONE, SEVERAL])
def test_label_with_a_threshold_within_the_hysteresis_ends_below_half_of_it(output: Output) -> None:
    made = decisions(output, [0.1, 0.1], hysteresis=0.1)
    assert course(made, [0.1, 0.0], [0.0625, 0.0], [0.03125, 0.0]) == [["begin 0"], [], ["end 0"]]


def test_first_score_is_taken_as_it_is_and_those_after_it_are_averaged() -> None:
    made = decisions(ONE, [0.0], smoothing=3)
    averages = []
    for score in (0.75, 0.25, 0.25, 1.0):
        made.update(np.array([score], np.float32))
        averages.append(made.current)
    assert averages == [(0, 0.75), (0, 0.5), (0, 0.375), (0, 0.6875)]


def test_one_frame_that_differs_changes_nothing_when_smoothed() -> None:
    def events(smoothing: int) -> int:
        made = decisions(ONE, [0.5, 0.5], smoothing=smoothing)
        frames = [[0.0, 1.0] if number == 10 else [1.0, 0.0] for number in range(20)]
        return sum(map(len, course(made, *frames)))

    assert (events(1), events(5)) == (5, 1)


def test_score_that_wavers_about_the_threshold_is_one_event_by_hysteresis_and_many_without() -> None:
    noise = np.random.default_rng(1).uniform(-0.04, 0.04, 500)

    def begun(output: Output, hysteresis: float) -> int:
        made = decisions(output, [0.5, 0.5], hysteresis=hysteresis)
        return str(course(made, *([0.5 + part, 0.1] for part in noise))).count("begin")

    for output in (ONE, SEVERAL):
        assert begun(output, 0.1) == 1
        assert begun(output, 0.0) > 50


@pytest.mark.parametrize("output", [ONE, SEVERAL])
def test_end_forgets_what_was(output: Output) -> None:
    made = decisions(output, [0.5, 0.5], smoothing=9)
    course(made, [1.0, 0.0])
    assert told(made.end()) == ["end 0"]
    assert made.end() == [] and made.current is None
    assert course(made, [0.0, 0.5]) == [["begin 1"]], "not smoothed with what was before"


@pytest.mark.parametrize("output", [ONE, SEVERAL])
def test_thresholds_and_smoothing_may_change_on_the_way(output: Output) -> None:
    made = decisions(output, [0.5, 0.5])
    assert course(made, [0.6, 0.2]) == [["begin 0"]]
    made.limits = np.array([0.65, 0.5], np.float32)
    assert course(made, [0.6, 0.2]) == [[]], "within the hysteresis of the new one"
    made.limits = np.array([0.8, 0.5], np.float32)
    assert course(made, [0.6, 0.2]) == [["end 0"]]
    made.limits, made.smoothing = np.array([0.5, 0.5], np.float32), 3
    assert course(made, [0.2, 0.6], [0.2, 0.6]) == [[], ["begin 1"]]


def test_label_that_loses_its_threshold_ends_where_several_are_held() -> None:
    made = decisions(SEVERAL, [0.5, 0.5])
    course(made, [1.0, 0.0])
    made.limits = np.array([0.0, 0.5], np.float32)
    assert course(made, [1.0, 0.0], [0.0, 0.0]) == [["end 0"], []]


def test_scores_may_be_written_over_after_the_update() -> None:
    """As the output tensor of an interpreter is."""
    scores = np.array([0.75, 0.0], np.float32)
    made = decisions(ONE, [0.5, 0.5])
    made.update(scores)
    scores[:] = 0
    assert made.end()[0].score == 0.75


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"smoothing": 0}, r"smoothing: expected 1 to 10000 predictions, got 0; give 1 for none"),
        ({"smoothing": 10_001}, "got 10001"),
        ({"hysteresis": -0.1}, r"hysteresis: expected 0 to 1, got -0\.1; give 0 for none"),
        ({"hysteresis": 1.1}, r"got 1\.1"),
        ({"hysteresis": float("nan")}, "got nan"),
    ],
)
def test_smoothing_or_hysteresis_out_of_range_is_an_error(options: Any, complaint: str) -> None:
    with pytest.raises(EdgekitError, match=complaint):
        decisions(ONE, [0.5], **options)


def by_the_book(
    multi_label: bool, limits: list[float], smoothing: int, hysteresis: float, frames: list[list[float]]
) -> list[tuple[set[int], int | None]]:
    """What is held after each frame and which of it is the highest, class by class, in plain numbers."""
    held: set[int] = set()
    smoothed: list[float] = []
    course = []
    for scores in frames:
        alpha = 2 / (smoothing + 1)
        smoothed = [(1 - alpha) * old + alpha * new for old, new in zip(smoothed or scores, scores, strict=True)]
        reached = [c for c, score in enumerate(smoothed) if score >= limits[c]]
        lowest = [max(limit - hysteresis, limit / 2) for limit in limits]
        kept = {c for c in held if smoothed[c] >= lowest[c]}
        if multi_label:
            held = {c for c in {*reached, *kept} if limits[c] > 0}
            shown = held | {c for c in reached if limits[c] == 0}
        else:
            best = max(reached, key=lambda c: (smoothed[c], -c), default=None)
            if best is not None and not any(smoothed[best] - smoothed[c] <= hysteresis for c in kept):
                kept = {best}
            shown = held = kept
        course.append((held, max(shown, key=lambda c: (smoothed[c], -c), default=None)))
    return course


@pytest.mark.parametrize("seed", range(60))
def test_decisions_are_those_of_a_plain_loop_over_the_classes(seed: int) -> None:
    """Without smoothing the scores are sixteenths, so that many are equal to each other, to thresholds and to what the
    hysteresis leaves; averages of equal ones would differ in their last bits."""
    random = np.random.default_rng(seed)
    multi_label, classes, smoothing = bool(seed % 2), int(random.integers(1, 6)), (1, 1, 3, 5)[seed // 2 % 4]
    limits = [float(limit) for limit in random.integers(0, 14, classes) * random.integers(0, 2, classes) / 16]
    hysteresis = float(random.choice([0.0, 0.0625, 0.125, 0.5]))
    walk = 8 + np.cumsum(random.integers(-2, 3, (150, classes)), axis=0)
    if smoothing > 1:
        walk = walk + random.uniform(-0.5, 0.5, walk.shape)
    frames = (np.abs((walk + 16) % 32 - 16) / 16).tolist()
    made = decisions(SEVERAL if multi_label else ONE, limits, smoothing=smoothing, hysteresis=hysteresis)
    held: dict[str, int] = {}
    ended: list[str] = []

    def follow(changes: list[Change]) -> None:
        assert told(changes) == sorted(told(changes), key=lambda text: text.startswith("begin")), "first what ends"
        for change in changes:
            if change.event == "begin":
                assert change.event_id not in [*held, *ended]
                held[change.event_id] = change.class_id
            else:
                assert held.pop(change.event_id) == change.class_id
                ended.append(change.event_id)

    for number, (scores, expected) in enumerate(
        zip(frames, by_the_book(multi_label, limits, smoothing, hysteresis, frames), strict=True)
    ):
        follow(made.update(np.array(scores, np.float32)))
        current = made.current[0] if made.current else None
        assert (set(held.values()), current) == expected, f"frame {number}"
        assert len(set(held.values())) == len(held)
    follow(made.end())
    assert not held and made.current is None


def test_run_publishes_what_begins_and_ends_and_what_is_held(models: Path, video: Path, broker: Any) -> None:
    """A video of 30 frames of each of three colours, which differ from each other by more than smoothing blurs."""
    with edgekit.Subscriber(broker.url, kinds=("prediction", "event", "state")) as subscriber:
        edgekit.run(models / "int8.tflite", str(video), broker=broker.url, threshold=0.6, smoothing=5, hysteresis=0.1)
        messages, events = [], 0
        while events < 6:
            messages.append(subscriber.next(20))
            events += messages[-1].kind == "event"
    told = [message for message in messages if message.event]
    assert [f"{message.event.event} {message.label}" for message in told if message.event] == [
        "begin red", "end red", "begin green", "end green", "begin blue", "end blue",
    ]  # fmt: skip
    assert not any(message.duplicate or message.left_open for message in messages)
    assert [message.held_s is not None for message in told] == [False, True] * 3
    assert subscriber.events.open == [] and subscriber.accounting.missing == 0
    seqs = [message.prediction.seq if message.prediction else 0 for message in messages]
    # events come right after the prediction that decided them: the first frame, and later than the 31st and the 61st
    assert seqs.index(1) < messages.index(told[0]) < seqs.index(2)
    assert seqs.index(32) < messages.index(told[2]) < seqs.index(40)
    assert seqs.index(90) < messages.index(told[-1])
    ((_, state),) = broker.subscribe("edgekit/+/main/state", "-C", "1", "-W", "5")()
    assert state["label"] == "blue"


def test_sound_that_is_held_at_the_end_of_a_file_ends_with_it(sound_models: Path, broker: Any, tmp_path: Path) -> None:
    """It is read faster than it would sound, so that its end is ahead of the clock."""
    with wave.open(str(tmp_path / "low.wav"), "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(12_000)
        recording.writeframes((8000 * np.sin(2 * np.pi * 300 * np.arange(120_000) / 12_000)).astype("<i2").tobytes())
    with edgekit.Subscriber(broker.url, kinds=("event",)) as subscriber:
        edgekit.run(sound_models / "window.tflite", str(tmp_path / "low.wav"), broker=broker.url, threshold=0.5)
        begin, end = subscriber.next(20), subscriber.next(20)
    assert (begin.label, end.label) == ("low", "low")
    assert end.held_s and end.held_s > 9

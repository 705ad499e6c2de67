from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgekit import events as module
from edgekit.events import Events, Told
from edgekit.messages import EventMessage, PredictionMessage

pytestmark = pytest.mark.no_runtime


def event(event_id: str, what: str, class_id: int = 3, boot_id: str = "a", **changes: Any) -> EventMessage:
    fields = {
        "schema": "edgekit.event/1", "event_id": event_id, "event": what, "boot_id": boot_id, "device": "pi",
        "stream": "door", "at": "2026-11-22T03:04:05.678Z", "class_id": class_id, "label": f"label {class_id}",
        "score": 0.91, "replayed": False,
    }  # fmt: skip
    return msgspec.convert({**fields, **changes}, EventMessage)


def prediction(predictions: Any, boot_id: str) -> PredictionMessage:
    return msgspec.convert(*predictions(1, boot_id=boot_id), PredictionMessage)


def test_end_is_paired_with_its_begin() -> None:
    events = Events()
    begins = [event("a-1", "begin", 3), event("a-2", "begin", 4), event("b-1", "begin", 3, stream="yard")]
    assert [events.add(begin) for begin in begins] == [Told()] * 3
    assert events.open == begins and events.of("pi", "door") == begins[:2]
    assert events.add(event("a-1", "end", 3)) == Told(began=begins[0])
    assert events.open == begins[1:] and events.of("pi", "cellar") == []


def test_event_that_comes_twice_is_a_duplicate_and_changes_nothing() -> None:
    events = Events()
    come = [event("a-1", "begin"), event("a-1", "begin"), event("a-1", "end"), event("a-1", "begin", replayed=True),
            event("a-1", "end", replayed=True), event("a-2", "begin")]  # fmt: skip
    assert [events.add(one).duplicate for one in come] == [False, True, False, True, True, False]
    assert events.open == [come[-1]]


def test_end_of_what_began_before_we_listened_is_paired_with_nothing() -> None:
    events = Events()
    assert events.add(event("a-1", "end")) == Told()
    assert events.add(event("a-1", "begin")) == Told(), "it came late, and has ended"
    assert events.open == []


@pytest.mark.parametrize("kind", ["event", "prediction"])
def test_what_a_device_held_that_died_is_left_open_once_its_next_boot_speaks(kind: str, predictions: Any) -> None:
    """What it had not sent before it died comes first."""
    events = Events()
    begins = [event("a-1", "begin", 3), event("a-2", "begin", 4)]
    for begin in begins:
        events.add(begin)
    assert events.add(event("a-2", "end", 4, replayed=True)) == Told(began=begins[1])
    news = event("b-1", "begin", 4, "b") if kind == "event" else prediction(predictions, "b")
    assert events.add(news) == Told(left_open=(begins[0],))
    assert events.open == ([news] if kind == "event" else [])
    assert events.add(prediction(predictions, "a")) == Told(), "a boot that is known is no new one"
    assert events.add(event("a-1", "end")) == Told()


def test_next_event_of_a_label_tells_that_the_end_of_the_one_before_was_lost() -> None:
    events = Events()
    begins = [event("a-1", "begin"), event("a-2", "begin")]
    assert [events.add(begin).left_open for begin in begins] == [(), (begins[0],)]
    assert events.add(event("a-1", "end")) == Told(), "it comes after all"
    assert events.open == [begins[1]]


def test_predictions_alone_tell_nothing(predictions: Any) -> None:
    events = Events()
    assert [events.add(prediction(predictions, boot_id)) for boot_id in "abc"] == [Told()] * 3


def test_consumer_of_a_group_knows_what_came_twice_and_no_more(predictions: Any) -> None:
    events = Events(partial=True)
    come = event("a-1", "begin"), event("a-2", "begin"), event("a-1", "begin"), event("a-1", "end", boot_id="b")
    assert [events.add(one) for one in (*come, prediction(predictions, "c"))] == [
        Told(), Told(), Told(duplicate=True), Told(), Told(),
    ]  # fmt: skip
    assert events.open == []


def test_memory_is_bounded_and_what_is_held_for_long_still_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 20)
    events = Events()
    begin = event("a-0", "begin", 0)
    events.add(begin)
    for number in range(1, 200):
        for what in ("begin", "end"):
            assert events.add(event(f"a-{number}", what, 1)).left_open == ()
    assert events.add(event("a-199", "end", 1)).duplicate
    assert len(events._streams["pi", "door"].came) == 20
    assert events.add(event("a-0", "end", 0)).began == begin


def test_memory_is_bounded_however_often_a_device_starts(predictions: Any) -> None:
    events = Events()
    events.add(event("a-0", "begin"))
    for number in range(1, 500):
        open_one = events.open[0]
        begin = event(f"{number}-0", "begin", boot_id=f"boot {number}")
        assert events.add(begin) == Told(left_open=(open_one,))
        assert events.add(prediction(predictions, f"boot {max(1, number - 1)}")) == Told(), "it is late"
    assert events.open == [begin]
    assert len(events._streams["pi", "door"].boot_ids) == module.BOOTS


def test_boot_that_is_still_heard_is_no_new_one_however_many_others_come(predictions: Any) -> None:
    events = Events()
    events.add(event("a-0", "begin"))
    for number in range(200):
        events.add(prediction(predictions, f"boot {number}"))
        assert events.add(prediction(predictions, "a")) == Told()
    events.add(event("a-1", "begin"))
    assert events.add(prediction(predictions, "a")) == Told() and len(events.open) == 1

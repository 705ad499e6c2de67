from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from edgekit import accounting as module
from edgekit.accounting import Accounting, Intervals
from edgekit.errors import EdgekitError
from edgekit.messages import PredictionMessage

pytestmark = pytest.mark.no_runtime


def prediction(seq: int, boot_id: str = "a", **changes: Any) -> PredictionMessage:
    fields = {
        "schema": "edgekit.prediction/1", "id": f"{boot_id}-{seq}", "boot_id": boot_id, "seq": seq, "device": "pi",
        "stream": "door", "captured_at": "2026-11-22T03:04:05.678Z", "replayed": False,
        "bundle": {"name": "n", "version": "1", "sha256": "00"}, "delegate": "cpu",
        "latency_ms": {"preprocess": 0.4, "inference": 2.8, "total": 3.4}, "predictions": [],
    }  # fmt: skip
    return msgspec.convert({**fields, **changes}, PredictionMessage)


def heard(seqs: Iterable[int], *, partial: bool = False, **changes: Any) -> Accounting:
    accounting = Accounting(partial=partial)
    for seq in seqs:
        accounting.add(prediction(seq, **changes))
    return accounting


def figures(of: Accounting) -> dict[str, int | None]:
    return {
        name: value
        for name in ("predictions", "missing", "duplicates", "duplicates_unflagged", "reordered")
        if (value := getattr(of, name))
    }


def test_intervals_hold_what_a_set_holds() -> None:
    chance = random.Random(1)
    for _ in range(300):
        sets: list[set[int]] = [set(), set()]
        both = Intervals(), Intervals()
        for _ in range(chance.randrange(12)):
            which, start = chance.randrange(2), chance.randrange(40)
            numbers = range(start, start + chance.choice((0, 1, 1, 5)))
            sets[which] |= set(numbers)
            both[which].add(numbers)
        for expected, intervals in zip((*sets, sets[0] & sets[1]), (*both, both[0].common(both[1])), strict=True):
            assert [n for numbers in intervals.ranges() for n in numbers] == sorted(expected)
            assert [n for n in range(50) if n in intervals] == sorted(expected)
            assert intervals.size() == len(expected)
            assert len(set(intervals.edges)) == len(intervals.edges), "intervals that touch are one"
        both[0].forget_below(20)
        assert [n for numbers in both[0].ranges() for n in numbers] == sorted(n for n in sets[0] if n >= 20)


@pytest.mark.parametrize(
    ("seqs", "expected"),
    [
        ([], {}),
        ([1, 2, 3], {"predictions": 3}),
        ([5, 6], {"predictions": 2}),  # it may have begun before us
        ([1, 2, 5, 8, 9], {"predictions": 5, "missing": 4}),
        ([1, 3, 2], {"predictions": 3, "reordered": 1}),
        ([5, 2, 6], {"predictions": 3, "reordered": 1}),  # 2 was sent again
        ([1, 2, 2, 1], {"predictions": 2, "duplicates": 2, "duplicates_unflagged": 2}),
    ],
)
def test_what_came_is_counted(seqs: list[int], expected: dict[str, int]) -> None:
    assert figures(heard(seqs)) == expected


def test_nothing_at_all_is_not_nothing_missing() -> None:
    assert str(Accounting()) == str(Accounting(partial=True)) == "no predictions"


def test_add_tells_what_is_missing_before_and_whether_it_came_before() -> None:
    accounting = Accounting()
    told = [accounting.add(prediction(seq)) for seq in (5, 6, 9, 7, 9)]
    assert [list(heard.missing) for heard in told] == [[], [], [7, 8], [], []]
    assert [heard.duplicate for heard in told] == [False, False, False, False, True]


def test_duplicate_is_flagged_by_the_device_or_the_broker() -> None:
    accounting = heard([1, 2, 3])
    accounting.add(prediction(2, replayed=True))
    accounting.add(prediction(3), redelivered=True)
    assert figures(accounting) == {"predictions": 3, "duplicates": 2}
    assert str(accounting) == "nothing missing: 3 predictions of 1 stream, 2 duplicates (all replayed), 0 reordered"


def test_next_boot_of_a_stream_is_expected_from_its_first_prediction() -> None:
    accounting = heard([7, 8])
    told = accounting.add(prediction(3, "b", captured_at="2026-11-22T03:05:00.000Z"))
    assert (list(told.missing), accounting.missing) == ([1, 2], 2)


def test_boot_before_the_one_that_was_heard_first_is_not_expected_from_its_first_prediction() -> None:
    accounting = heard([7, 8])
    accounting.add(prediction(30, "b", captured_at="2026-11-22T03:03:00.000Z", replayed=True))
    assert accounting.missing == 0


def test_line_names_what_is_missing() -> None:
    accounting = heard([*range(1, 1001), 1002, 1010])
    assert str(accounting) == (
        "8 missing (pi/door 'a' 1001, pi/door 'a' 1003-1009): 1,002 predictions of 1 stream, 0 duplicates, 0 reordered"
    )
    assert "and 3 gaps more" in str(heard(range(1, 18, 2)))
    assert "\x1b" not in str(heard([1, 3], boot_id="\x1b[2J"))


def test_consumer_of_a_group_says_that_it_cannot_tell() -> None:
    accounting = heard([1, 4, 5], partial=True)
    assert accounting.missing is None
    assert str(accounting).startswith("one of a group, whose accountings together tell what is missing: 3 predictions")
    assert not accounting.add(prediction(9)).missing


def test_merge_tells_what_no_consumer_of_a_group_received() -> None:
    chance = random.Random(2)
    parts = [Accounting(partial=True) for _ in range(3)]
    for seq in range(1, 2001):
        if seq not in (17, 18, 900):
            chance.choice(parts).add(prediction(seq))
    parts[0].add(prediction(17, "b", stream="other"))
    merged = Accounting.merge(Accounting.from_json(part.to_json()) for part in parts)
    assert figures(merged) == {"predictions": 1998, "missing": 3}
    assert str(merged).startswith("3 missing (pi/door 'a' 17-18, pi/door 'a' 900): 1,998 predictions of 2 streams")


def test_merge_tells_what_two_consumers_received() -> None:
    """The device sent 3 again, the other consumer got it then; 5 came twice for no reason."""
    one, other = heard([1, 2, 3, 5], partial=True), heard([4, 5, 6], partial=True)
    other.add(prediction(3, replayed=True))
    merged = Accounting.merge([one, other])
    assert figures(merged) == {"predictions": 6, "duplicates": 2, "duplicates_unflagged": 1, "reordered": 1}
    assert "2 duplicates (1 not marked as such)" in str(merged)
    assert figures(one) == {"predictions": 4}, "the parts are as before"


def test_accounting_is_the_same_after_json() -> None:
    accounting = heard([3, 4, 9, 8, 4])
    accounting.add(prediction(4, replayed=True))
    again = Accounting.from_json(accounting.to_json())
    assert (str(again), again.to_json()) == (str(accounting), accounting.to_json())


@pytest.mark.parametrize(
    "text", ["", "{}", '{"schema":"edgekit.accounting/1","partial":false,"boots":[{"received":[1]}]}']
)
def test_other_json_is_an_error(text: str) -> None:
    with pytest.raises(EdgekitError, match=r"expected JSON as Accounting\.to_json makes"):
        Accounting.from_json(text)


def test_memory_is_bounded_and_what_is_missing_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GAPS", 50)
    accounting = Accounting()
    for seq in range(1, 2001, 2):
        accounting.add(prediction(seq, replayed=True))
    assert figures(accounting) == {"predictions": 1000, "missing": 999}
    assert len(accounting.to_json()) < 3000
    assert accounting.add(prediction(1)).duplicate
    assert "'a' 950 below 1901" in str(accounting)


def test_merge_begins_where_all_consumers_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GAPS", 50)
    parts = heard(range(1, 2001, 2), partial=True), heard(range(2, 1991, 2), partial=True)
    merged = Accounting.merge(parts)
    assert (merged.missing, merged.predictions) == (4, 1995)


def restarts(times: int, seqs: Iterable[int] = (1, 2, 4, 4), *, partial: bool = False, since: int = 0) -> Accounting:
    """Of a device that starts again each second."""
    accounting = Accounting(partial=partial)
    for number in range(since, since + times):
        at = f"2026-11-22T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000Z"
        for seq in seqs:
            accounting.add(prediction(seq, f"boot {number}", captured_at=at))
    return accounting


def test_memory_is_bounded_however_often_a_device_starts_and_the_counts_stay_right() -> None:
    accounting, size = restarts(3000), len(restarts(100).to_json())
    assert figures(accounting) == {
        "predictions": 9000, "missing": 3000, "duplicates": 3000, "duplicates_unflagged": 3000
    }  # fmt: skip
    assert len(accounting.boots) == module.BOOTS and len(accounting.to_json()) < size + 100
    assert "3,000 missing (pi/door 2,992 in earlier boots, pi/door 'boot 2992' 3, " in str(accounting)
    assert figures(accounting.of("pi", "door")) == figures(accounting)
    again = Accounting.from_json(accounting.to_json())
    assert (str(again), again.to_json()) == (str(accounting), accounting.to_json())


def test_boot_that_is_still_heard_is_remembered_however_many_others_come() -> None:
    accounting = heard([1], boot_id="lasting")
    for number in range(2, 50):
        accounting.add(prediction(1, f"boot {number}"))
        assert accounting.add(prediction(number, "lasting")).missing == range(0)
    assert figures(accounting) == {"predictions": 97}
    assert accounting.add(prediction(20, "lasting")).duplicate


def test_merge_of_runs_keeps_the_counts_of_earlier_boots() -> None:
    """The boot between the first two came to both."""
    merged = Accounting.merge([restarts(30), restarts(5, since=29), restarts(30, since=34)])
    assert (merged.predictions, merged.missing, merged.duplicates) == (3 * 64, 64, 65 + 3)
    assert len(merged.boots) == module.BOOTS


def test_merge_of_a_group_claims_nothing_missing_of_what_one_of_it_has_forgotten() -> None:
    """One consumer heard each boot, the other only the first: it still remembers it."""
    one, other = restarts(30, (1, 3), partial=True), restarts(1, (2, 4), partial=True)
    merged = Accounting.merge([one, other])
    assert (merged.predictions, merged.duplicates) == (62, 0)
    assert merged.missing == module.BOOTS  # 2 of each that is remembered


def test_accounting_that_was_saved_without_earlier_boots_is_read() -> None:
    text = '{"schema":"edgekit.accounting/1","partial":false,"boots":[]}'
    assert str(Accounting.from_json(text)) == "no predictions"

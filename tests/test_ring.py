from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.devices.publish import ring as ring_module
from edgekit.devices.publish.ring import Ring
from edgekit.errors import EdgekitError

SIZE = 4096


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ring_module, "_SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring("pi-4.main", SIZE)
    yield ring
    if ring._fd >= 0:
        ring.close()


def records(ring: Ring, limit: int = 1000) -> list[bytes]:
    return [record for _, record in ring.read(limit)]


def test_put_and_read_keep_records_of_any_length_over_the_end_of_the_ring(ring: Ring) -> None:
    chance = random.Random(1)
    for _ in range(300):
        put = [chance.randbytes(chance.choice((0, 1, 7, 8, 9, 500, 1000))) for _ in range(3)]
        assert all(ring.put(record) for record in put) and ring.count == 3
        read = ring.read(10)
        assert [record for _, record in read] == put and ring.empty and ring.count == 0
        ring.release(read[-1][0])
    assert ring.head > 10 * SIZE


def test_put_is_refused_where_there_is_no_room_until_some_is_given_back(ring: Ring) -> None:
    assert ring.put(bytes(SIZE - 8)) and not ring.put(b"")
    assert ring.half_full and not ring.fits(bytes(SIZE - 7))
    ((end, _),) = ring.read(1)
    assert not ring.put(b"")
    ring.release(end)
    assert ring.put(b"") and records(ring) == [b""]


def test_rewind_reads_again_what_was_not_released(ring: Ring) -> None:
    for record in (b"a", b"b", b"c", b"d"):
        ring.put(record)
    first, *_ = ring.read(3)
    ring.release(first[0])
    ring.rewind()
    assert ring.count == 3 and records(ring, 2) == [b"b", b"c"] and records(ring) == [b"d"]


def test_release_of_what_was_not_read_or_is_gone_changes_nothing(ring: Ring) -> None:
    ring.put(b"a")
    ring.put(b"b")
    ring.release(ring.head)
    assert records(ring) == [b"a", b"b"]
    ring.release(ring.head)
    ring.release(0)
    ring.rewind()
    assert ring.empty


def test_open_finds_what_was_not_released(ring: Ring) -> None:
    for record in (b"a", b"b", b"c"):
        ring.put(record)
    ring.release(ring.read(1)[0][0])
    name = ring.id
    ring.close()
    again = Ring("pi-4.main", SIZE)
    assert again.id == name and again.count == 2 and records(again) == [b"b", b"c"]
    again.close()


def test_open_of_a_ring_in_use_is_refused(ring: Ring) -> None:
    with pytest.raises(EdgekitError, match=r"spool pi-4\.main is in use by another run"):
        Ring("pi-4.main", SIZE)
    other = Ring("pi-5.main", SIZE)
    other.put(b"other")
    assert ring.empty
    other.close()


def test_open_through_a_link_is_refused_and_loud(
    ring: Ring, shared_memory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring.put(b"b")
    ring.close()
    (path,) = shared_memory.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    own = Ring("pi-4.main", SIZE)
    assert "no shared memory" in caplog.text and own.put(b"a") and records(own) == [b"a"]
    assert (tmp_path / "elsewhere").read_bytes() == before
    own._words.release()


def test_open_of_another_size_is_told_as_lost(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.put(b"a")
    ring.close()
    lost: list[int] = []
    other = Ring("pi-4.main", 2 * SIZE, on_lost=lost.append)
    assert other.empty and lost == [1] and "damaged" in caplog.text
    other.close()


def test_record_damaged_under_a_process_cuts_the_ring_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    lost: list[int] = []
    ring = Ring(None, SIZE, on_lost=lost.append)
    for record in (b"first", b"second", b"third"):
        ring.put(record)
    at = ring._map.find(b"second")
    ring._map[at : at + 1] = b"S"
    assert records(ring) == [b"first"] and lost == [2] and ring.count == 0 and ring.empty
    ring.put(b"fourth")
    assert records(ring) == [b"fourth"] and "damaged" in caplog.text
    ring.rewind()
    assert records(ring) == [b"first", b"fourth"]


def test_count_is_right_again_after_a_put_that_was_interrupted(ring: Ring) -> None:
    ring.put(b"a")
    ring.count = 0  # as if before it was counted
    assert not ring.empty and records(ring) == [b"a"] and ring.count == 0


def test_put_from_several_threads_loses_none(ring: Ring) -> None:
    def puts(thread: int) -> None:
        for number in range(500):
            while not ring.put(b"%d %d" % (thread, number)):
                pass

    threads = [threading.Thread(target=puts, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    read: list[bytes] = []
    while any(thread.is_alive() for thread in threads) or not ring.empty:
        for end, record in ring.read(50):
            read.append(record)
            ring.release(end)
    for thread in range(3):
        assert [record for record in read if record.startswith(b"%d " % thread)] == [
            b"%d %d" % (thread, number) for number in range(500)
        ]


def test_1000_damaged_rings_give_what_is_whole_in_order_and_nothing_else(ring: Ring, shared_memory: Path) -> None:
    chance = random.Random(2)
    put: list[bytes] = []
    released = 0
    while ring.head < SIZE + 1000:
        put.append(b"%d " % len(put) + chance.randbytes(chance.randrange(100)))
        assert ring.put(put[-1])
        if len(put) > 30:
            ring.release(ring.read(1)[0][0])
            released += 1
    ring.close()
    (path,) = shared_memory.iterdir()
    whole = path.read_bytes()
    outcomes = set()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            if chance.random() < 0.5:
                at = chance.randrange(len(data))
                data[at] ^= 1 << chance.randrange(8)
            elif chance.random() < 0.5:
                at = chance.randrange(64)
                data[at : at + 8] = chance.choice((bytes(8), b"\xff" * 8, chance.randbytes(8)))
            else:
                del data[chance.randrange(len(data)) :]
                data += bytes(8)
        path.write_bytes(data)
        lost: list[int] = []
        again = Ring("pi-4.main", SIZE, on_lost=lost.append)
        assert again.put(b"new")
        read = records(again)
        assert read.pop() == b"new"
        order = [put.index(record) for record in read]  # ValueError: altered
        is_empty = data[24:32] == data[32:40]  # nothing tells that it was not so
        assert order == list(range(released, released + len(order)))
        assert order[-1:] == [len(put) - 1] or lost or is_empty
        outcomes.add(len(order))
        again.close()
    assert len(outcomes) > 10


def test_close_leaves_no_file_unless_something_is_left(shared_memory: Path) -> None:
    ring = Ring("pi-4.main", SIZE)
    assert ring.put(b"one")
    ring.close()
    assert len(list(shared_memory.iterdir())) == 1
    ring = Ring("pi-4.main", SIZE)
    ((position, record),) = ring.read(10)
    assert record == b"one"
    ring.release(position)
    ring.close()
    assert not list(shared_memory.iterdir())

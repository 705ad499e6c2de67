from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.devices.publish import ring, spool_file
from edgekit.devices.publish import spool as spool_module
from edgekit.devices.publish.spool import Spool, Stored, spool_folder
from edgekit.errors import EdgekitError

TOPIC = "main/prediction"
# Runs that are killed; many more by hand.
KILLS = int(os.environ.get("EDGEKIT_TEST_KILLS", "8"))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the test's own, so that no test leaves a ring behind."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(ring, "_SHARED_MEMORY", folder)
    return folder


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for others to share a commit."""
    monkeypatch.setattr(spool_module, "_BATCH_S", 0.0)
    monkeypatch.setattr(spool_module, "_DELETE_S", 0.0)
    monkeypatch.setattr(spool_module, "_RETRY_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "pi-4.main.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Spool]]:
    """Opens the spool; what is still open at the end of the test is closed."""
    spools = []

    def opens(**limits: Any) -> Spool:
        spools.append(Spool(path, **limits))
        return spools[-1]

    yield opens
    for spool in spools:
        abandon(spool)


def abandon(spool: Spool) -> None:
    """Leaves everything as a killed process does, but for the locks."""
    if spool._ring._fd >= 0:
        spool._file.close()
        spool._ring.close()


def put(spool: Spool, *numbers: int, size: int = 0) -> None:
    for number in numbers:
        assert spool.put(TOPIC, b"%d " % number + b"x" * size)


def numbers(stored: list[Stored]) -> list[int]:
    return [int(one.payload.split()[0]) for one in stored]


def drain(spool: Spool) -> list[int]:
    """What arrives when all is sent, in its order."""
    arrived = []
    for _ in range(100):
        spool.store()
        while taken := spool.take(100):
            arrived += numbers(taken)
            for one in taken:
                spool.delete(one)
        if not spool.messages:
            return arrived
    raise AssertionError(f"{spool.messages} messages are left")


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with monkeypatch.context() as patience:
            patience.setattr(spool_module, "_RETRY_S", 3600.0)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def retry(spool: Spool) -> None:
    """As if the time had come to try the disk again."""
    spool._retry_s = 0.0
    spool.store()


# -- in order, once, until deleted


@pytest.mark.parametrize("count", [1, 499, 1700])
def test_take_is_in_order_and_once_however_much_waits(opened: Any, count: int) -> None:
    spool = opened()
    for number in range(count):
        put(spool, number)
        if number % 300 == 0:
            spool.store()
    assert drain(spool) == list(range(count)) and spool.take(10) == [] and spool.bytes == 0


def test_take_without_a_file_needs_no_folder() -> None:
    spool = Spool(None)
    put(spool, *range(20))
    assert drain(spool) == list(range(20))
    spool.close()


def test_give_back_is_taken_next(opened: Any) -> None:
    spool = opened()
    put(spool, *range(5))
    spool.store()
    taken = spool.take(4)
    spool.give_back(taken[1:])
    assert numbers(spool.take(10)) == [1, 2, 3, 4]


def test_mark_sends_again_what_has_not_arrived_and_says_so(opened: Any) -> None:
    spool = opened()
    put(spool, *range(6))
    spool.store()
    first = spool.take(4)
    assert not any(one.replayed for one in first)
    spool.delete(first[0])
    spool.delete(first[2])  # the deletes are not written yet
    put(spool, 6)  # nor is this stored
    spool.mark()
    spool.store()
    put(spool, 7)
    spool.store()
    again = spool.take(10)
    assert numbers(again) == [1, 3, 4, 5, 6, 7]
    assert [one.replayed for one in again] == [True] * 5 + [False]


def test_take_passes_over_many_that_wait_to_be_deleted(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened()
    put(spool, *range(1200))
    while spool.unread:
        spool.store()
    for _ in range(21):
        for one in spool.take(50):
            spool.delete(one)
    with full_disk(monkeypatch):
        spool.store()
        spool.mark()
        assert numbers(spool.take(100)) == list(range(1050, 1150))


def test_delete_of_the_same_message_twice_counts_once(opened: Any) -> None:
    spool = opened()
    put(spool, *range(3))
    spool.store()
    one = spool.take(1)[0]
    spool.delete(one)
    spool.delete(one)
    assert spool.messages == 2
    spool.store()
    spool.delete(one)  # late
    spool.store()
    assert spool.messages == 2 and drain(spool) == [1, 2] and spool.bytes == 0


def test_put_of_what_never_fits_is_counted(opened: Any) -> None:
    spool = opened()
    assert spool.put(TOPIC, bytes(ring.RING_BYTES)) and spool.shed == {"too large for the spool": 1}
    put(spool, 1)
    assert drain(spool) == [1]


def test_put_when_shared_memory_is_full_is_refused_until_there_is_room(opened: Any) -> None:
    spool = opened()
    count = 0
    while spool.put(TOPIC, b"%d " % count + bytes(10_000)):
        count += 1
    assert count > 150 and spool.half_full
    assert drain(spool) == list(range(count))
    put(spool, count)
    assert drain(spool) == [count]


# -- from process to process


def test_open_finds_what_was_left_in_the_file_and_in_shared_memory(opened: Any) -> None:
    spool = opened()
    put(spool, *range(3))
    spool.store()
    put(spool, 3, 4)
    abandon(spool)
    spool = opened()
    assert spool.messages == 5
    put(spool, 5)
    assert drain(spool) == list(range(6))


def test_open_after_a_kill_between_commit_and_release_has_no_message_twice(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened()
    put(spool, *range(3))
    with monkeypatch.context() as killed:
        killed.setattr(ring.Ring, "release", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            spool.store()
    abandon(spool)
    spool = opened()
    assert spool.messages == 3 and drain(spool) == [0, 1, 2]


def test_close_leaves_nothing_in_shared_memory(opened: Any, shared_memory: Path) -> None:
    spool = opened()
    put(spool, *range(700))
    spool.close()
    shutil.rmtree(shared_memory)  # the machine restarts
    shared_memory.mkdir()
    assert drain(opened()) == list(range(700))


def test_open_of_a_spool_in_use_is_refused(opened: Any) -> None:
    opened()
    with pytest.raises(EdgekitError, match="in use by another run"):
        opened()


def test_open_without_shared_memory_is_loud_and_still_locked(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ring, "_SHARED_MEMORY", Path("/nowhere"))
    spool = opened()
    assert "no shared memory" in caplog.text
    with pytest.raises(EdgekitError, match="another run uses it"):
        opened()
    put(spool, 1)
    assert drain(spool) == [1]
    spool._file.close()


def test_open_in_a_folder_that_cannot_be_made_says_how_to_mend_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgekitError, match="--spool"):
        Spool(tmp_path / "file" / "a.sqlite")


@pytest.mark.parametrize("limits", [{"max_bytes": 100}, {"max_age_s": 0}, {"max_age_s": float("nan")}])
def test_open_with_limits_too_small_is_refused(path: Path, limits: Any) -> None:
    with pytest.raises(EdgekitError, match="limits of the spool"):
        Spool(path, **limits)


def test_spool_folder_is_as_given_else_that_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edgekit:/other")
    assert spool_folder("here") == Path("here") and spool_folder(None) == Path("/var/lib/edgekit")


def test_kill_at_any_moment_loses_and_repeats_nothing(tmp_path: Path, path: Path, shared_memory: Path) -> None:
    chance = random.Random(6)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told: set[int] = set()
    arrived: set[int] = set()
    for run in range(KILLS):
        first = max(told, default=0) + 2  # one may have been put and not told
        log = tmp_path / "told"
        with log.open("wb") as out:
            arguments = [path, str(first), str(run), shared_memory]
            child = subprocess.Popen([sys.executable, HERE / "spool_child.py", *arguments], stdout=out, env=environment)
            deadline_s = time.monotonic() + 60
            while not log.stat().st_size and time.monotonic() < deadline_s:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.2)
            child.kill()
            child.wait()
        highest = -1
        for line in log.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            word, *values = line.split()
            if word == "put":
                told.add(int(values[0]))
            elif word == "mark":
                highest = -1
            else:
                number, replayed, delete = map(int, values)
                assert number > highest  # once and in order
                assert replayed or (number >= first and number not in arrived)
                highest = number
                if delete:
                    arrived.add(number)
    spool = Spool(path)
    left = drain(spool)
    spool.close()
    assert len(told) > 100 * KILLS
    assert left == sorted(set(left)) and told <= arrived | set(left)


# -- other versions of the file


def write_version_0(path: Path, *numbers: int) -> None:
    """A spool as it was before its version was written to it, and left by a process that was killed."""
    path.parent.mkdir()
    database = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "PRAGMA auto_vacuum = INCREMENTAL",
        "PRAGMA application_id = 1162103601",
        "PRAGMA journal_mode = WAL",
        "CREATE TABLE message (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, stored_s REAL NOT "
        "NULL, ring INTEGER NOT NULL, position INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    ):
        database.execute(statement)
    for number in numbers:
        payload, fields = b"%d " % number, (number, number / 10, 77, 8 * number)
        checksum = zlib.crc32(struct.pack("=qdqq", *fields) + TOPIC.encode() + payload)
        row = (number, TOPIC, payload, *fields[1:], checksum)
        database.execute("INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    database.close()


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def version(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def test_spool_of_the_version_before_is_sent_whole(opened: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_version_0(path, *range(1, 6))
    spool = opened()
    put(spool, 6)
    assert drain(spool) == list(range(1, 7)) and not spool.shed and "damaged" not in caplog.text
    spool.close()
    assert version(path) == 1


def test_spool_of_the_version_before_opens_on_a_full_disk(
    opened: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_0(path, 1, 2)
    with full_disk(monkeypatch):
        assert numbers(opened().take(10)) == [1, 2]


def test_spool_of_an_earlier_version_is_brought_to_that_of_today(
    opened: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ((), ("ALTER TABLE message RENAME COLUMN moved_s TO stored_s", "DROP TABLE note"))
    write_version_0(path, 1, 2)
    change(path, "ALTER TABLE message RENAME COLUMN stored_s TO moved_s", "CREATE TABLE note (text TEXT)")
    monkeypatch.setattr(spool_file, "_MIGRATIONS", steps)
    monkeypatch.setattr(spool_file, "_VERSION", len(steps))
    spool = opened()
    assert drain(spool) == [1, 2] and not spool.shed
    spool.close()
    assert version(path) == 2


def test_more_indexes_and_tables_are_no_damage(opened: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = opened()
    put(spool, *range(5))
    spool.close()
    change(path, "CREATE INDEX by_time ON message (stored_s)", "CREATE TABLE note (text TEXT)", "ANALYZE")
    spool = opened()
    put(spool, 5)
    assert drain(spool) == list(range(6)) and not spool.shed and "damaged" not in caplog.text


def test_spool_of_a_later_version_is_an_error_and_stays_as_it_is(opened: Any, path: Path) -> None:
    spool = opened()
    put(spool, *range(5))
    spool.close()
    change(path, "ALTER TABLE message RENAME TO letter", "PRAGMA user_version = 2")
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(EdgekitError, match=r"was written by a later EdgeKit .*; install"):
            opened()
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    change(path, "ALTER TABLE letter RENAME TO message", "PRAGMA user_version = 1")
    assert drain(opened()) == list(range(5))


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.DataError("query string is too large"),
        sqlite3.ProgrammingError("Cannot operate on a closed database."),
        sqlite3.OperationalError("in words of a later SQLite"),
        sqlite3.NotSupportedError("no"),
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not say what error it is")
def test_an_error_that_says_nothing_of_the_file_is_no_damage(
    opened: Any, path: Path, monkeypatch: pytest.MonkeyPatch, error: sqlite3.Error
) -> None:
    def fails(*_: Any) -> None:
        raise error

    spool = opened()
    put(spool, 1)
    with monkeypatch.context() as failing:
        failing.setattr(spool_file.SpoolFile, "commit", fails)
        spool.store()
    assert spool.disk_error and not list(path.parent.glob("*.damaged"))
    put(spool, 2)
    assert drain(spool) == [1, 2] and not spool.shed


def test_python_310_takes_errors_without_a_code_for_what_they_are() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database, pytest.raises(sqlite3.Error) as wrong:
        database.execute("SELECT nothing")
    assert spool_file._guessed_code(wrong.value) == spool_file.SQLITE_ERROR
    assert spool_file._guessed_code(sqlite3.DatabaseError("malformed")) in spool_file._DAMAGE
    assert spool_file._guessed_code(sqlite3.ProgrammingError("closed")) == 0
    assert not spool_file.is_damage(sqlite3.OperationalError("database is locked"))


# -- limits


def test_bytes_above_the_limit_shed_the_oldest_and_count_them(opened: Any) -> None:
    spool = opened(max_bytes=1 << 16)
    put(spool, *range(200), size=1000)
    while spool.unread:
        spool.store()
    assert spool.bytes <= 1 << 16
    arrived = drain(spool)
    assert arrived == list(range(200 - len(arrived), 200))
    assert spool.shed == {"full": 200 - len(arrived)} and len(arrived) > 50
    assert spool.bytes == 0


def test_full_tells_who_can_wait_before_anything_is_shed(opened: Any) -> None:
    spool = opened(max_bytes=1 << 16)
    count = 0
    for _ in range(5):
        while not spool.full:
            put(spool, count, size=100)
            count += 1
        spool.store()
        assert spool.bytes > 0.8 * (1 << 16) and not spool.shed
        for one in spool.take(60):
            spool.delete(one)
    assert count > 500 and drain(spool) == list(range(300, count))


def test_rows_under_way_are_not_shed(opened: Any) -> None:
    spool = opened(max_bytes=1 << 16)
    put(spool, *range(40), size=1000)
    spool.store()
    taken = spool.take(10)
    put(spool, *range(40, 200), size=1000)
    while spool.unread:
        spool.store()
    for one in taken:
        spool.delete(one)
    assert numbers(taken) == list(range(10)) and spool.messages + spool.shed["full"] == 190


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes time pass."""
    passed = [0.0]
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed[0])

    def passes(seconds: float) -> None:
        passed[0] += seconds

    return passes


def test_age_above_the_limit_sheds_and_counts(opened: Any, clock: Any) -> None:
    spool = opened(max_age_s=3600.0)
    put(spool, *range(5))
    spool.store()
    spool.mark()
    clock(3000)
    put(spool, *range(5, 8))
    spool.store()
    assert 3000 <= spool.oldest_s < 3010
    clock(700)
    spool.store()
    assert spool.shed == {"age": 5} and 700 <= spool.oldest_s < 710 and drain(spool) == [5, 6, 7]
    assert spool.oldest_s == 0


def test_age_counts_only_while_the_spool_is_open_whatever_the_clock_says(opened: Any, clock: Any) -> None:
    spool = opened(max_age_s=3600.0)
    put(spool, 1)
    spool.store()
    clock(1000)
    put(spool, 2)
    spool.store()
    abandon(spool)
    clock(-90_000)  # the machine restarts: its monotonic clock begins anew
    spool = opened(max_age_s=3600.0)
    assert 1000 <= spool.oldest_s < 1010
    spool.store()
    assert spool.shed == {} and drain(spool) == [1, 2]


def test_file_shrinks_after_a_backlog_though_messages_go_on(opened: Any, clock: Any, path: Path) -> None:
    spool = opened()
    for number in range(8000):
        put(spool, number, size=1000)
        if spool.half_full:
            spool.store()
    assert len(drain(spool)) == 8000
    for number in range(8000, 8040):
        put(spool, number)
        clock(11)
        spool.store()
        if number > 8005:
            for one in spool.take(1):
                spool.delete(one)
    spool.store()
    assert spool.messages > 1
    spool._file._run("PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.stat().st_size < 400_000


def test_what_waits_for_long_is_on_the_disk_itself(opened: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    spool = opened()
    put(spool, 1)
    spool.store()
    assert not synced
    clock(2)
    spool.store()
    spool.store()
    (log,) = spool.path.parent.glob("*-wal")
    assert synced == [log.stat().st_ino]
    assert drain(spool) == [1]
    clock(5)
    spool.store()
    assert len(synced) == 1


def test_disk_that_cannot_sync_is_told(
    opened: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    spool = opened()
    put(spool, 1)
    spool.store()
    clock(2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        spool.store()
    assert "cannot be written" in caplog.text
    put(spool, 2)
    assert drain(spool) == [1, 2] and "can be written again" in caplog.text


# -- the disk is full


def test_full_disk_sends_from_shared_memory_in_order_and_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened()
    put(spool, *range(3))
    spool.store()
    arrived = []
    with full_disk(monkeypatch):
        put(spool, *range(3, 9))
        spool.store()
        assert spool.disk_error and spool.messages == 9
        for one in spool.take(5):
            arrived += numbers([one])
            spool.delete(one)
        assert arrived == [0, 1, 2]
        taken = spool.take(4)
        assert numbers(taken) == [3, 4, 5, 6] and not any(one.id for one in taken)
        spool.give_back(taken[3:])
        for one in reversed(taken[:3]):  # the broker's answers may come in any order
            spool.delete(one)
        put(spool, 9)
        spool.store()
        assert numbers(spool.take(9)) == [6] and numbers(spool.take(9)) == [7, 8, 9]
    spool.mark()
    retry(spool)
    assert not spool.disk_error
    again = spool.take(10)
    assert numbers(again) == [6, 7, 8, 9] and all(one.replayed for one in again)
    spool.mark()
    assert drain(spool) == [6, 7, 8, 9]


def test_full_disk_and_killed_keeps_what_was_not_sent(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened()
    put(spool, *range(3))
    spool.store()
    for one in spool.take(2):
        spool.delete(one)
    with full_disk(monkeypatch):
        put(spool, 3, 4)
        spool.store()
        assert numbers(spool.take(1)) == [2] and numbers(spool.take(1)) == [3]
        abandon(spool)
        spool = opened()  # a file that is there opens without room
        assert numbers(spool.take(10)) == [0, 1, 2]  # their deletes could not be written
        spool.store()
        assert numbers(spool.take(10)) == [3, 4]
    spool.mark()
    assert drain(spool) == list(range(5))


def test_disk_full_at_the_start_goes_on_in_memory_and_is_loud(
    opened: Any, shared_memory: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened().close()
    path.unlink()
    with full_disk(monkeypatch):
        spool = opened()
        assert "free disk space" in caplog.text
        put(spool, *range(4))
        spool.store()
        assert numbers(spool.take(2)) == [0, 1]
    spool.mark()
    retry(spool)
    assert drain(spool) == list(range(4)) and path.exists()


def test_full_disk_that_is_full_of_the_spool_itself_is_freed_when_all_has_arrived(
    opened: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened()
    put(spool, *range(1000), size=1000)
    while spool.unread:
        spool.store()
    with full_disk(monkeypatch):
        while taken := spool.take(100):
            for one in taken:
                spool.delete(one)
        spool.store()
        assert spool.disk_error and spool.messages == 0
        retry(spool)
        assert sum(file.stat().st_size for file in path.parent.iterdir()) == 0
        put(spool, 1000)
        retry(spool)
        assert numbers(spool.take(1)) == [1000]
    spool.mark()
    assert drain(spool) == [1000]


# -- the file is damaged


def damage(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randrange(1, 30)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + 5000] = chance.randbytes(min(len(data) - at, chance.randrange(1, 5000)))
    elif kind == 3:
        for _ in range(chance.randrange(1, 10)):
            data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
    else:
        data[at:at] = chance.randbytes(chance.randrange(1, 300))
    path.write_bytes(data)


@pytest.mark.parametrize("state", ["open", "closed"])
def test_500_damaged_files_give_what_is_whole_in_order_and_nothing_else(
    tmp_path: Path, shared_memory: Path, path: Path, opened: Any, state: str
) -> None:
    chance = random.Random(state)
    payloads = {b"%d " % number + b"y" * (number % 700): number for number in range(300)}
    spool = opened()
    for payload, number in payloads.items():
        spool.put(TOPIC, payload)
        if number % 50 == 49:
            spool.store()
    for payload in (b"300 ", b"301 "):
        payloads[payload] = len(payloads)
        spool.put(TOPIC, payload)  # in shared memory only
    shm = shared_memory / next(shared_memory.iterdir()).name
    if state == "closed":
        spool._file.close()
    files = {file: file.read_bytes() for file in [*path.parent.iterdir(), shm]}
    abandon(spool)
    told: Counter[str] = Counter()
    for _ in range(500):
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        for file, data in files.items():
            file.write_bytes(data)
        damage(chance.choice(sorted(files)), chance)
        try:
            spool = Spool(path)
        except EdgekitError as error:  # it cannot be known that it was the number that was damaged; nothing is lost
            assert "later EdgeKit" in str(error) and 1 < int.from_bytes(path.read_bytes()[60:64], "big") < 32
            continue
        spool.put(TOPIC, b"new")
        arrived = []
        while spool.messages:
            spool.store()
            for one in spool.take(100):
                arrived.append(one.payload)
                spool.delete(one)
        assert arrived.pop() == b"new"
        order = [payloads[payload] for payload in arrived]  # KeyError: altered
        assert order == sorted(set(order))
        spool.close()
        spool = Spool(path)
        assert not spool.messages
        spool.close()
        whole = sum(number < 300 for number in order)
        told["all" if whole == 300 else "some" if whole else "none"] += 1
    assert min(told[word] for word in ("all", "none", "some")) > 20, told


def damage_rows(spool: Spool, path: Path) -> None:
    """Alters what is in the middle of the file under the process that has it open."""
    spool._file._run("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with subprocess.Popen(["dd", f"of={path}", "conv=notrunc", "bs=1", f"seek={size // 2}"], stdin=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as dd:  # fmt: skip
        dd.communicate(bytes(9000))


@pytest.fixture
def damaged(opened: Any, path: Path) -> Spool:
    """A spool of 600 messages, 5 of which have arrived, whose file is damaged under it."""
    spool: Spool = opened()
    put(spool, *range(600), size=500)
    while spool.unread:
        spool.store()
    spool.mark()
    for one in spool.take(5):
        spool.delete(one)
    spool._unload()
    spool._file._run("PRAGMA cache_size = 0")
    damage_rows(spool, path)
    return spool


def test_file_damaged_under_a_process_loses_only_what_cannot_be_read_and_counts_it(damaged: Spool, path: Path) -> None:
    arrived = drain(damaged)
    lost = set(range(5, 600)) - set(arrived)
    assert arrived == sorted(set(arrived)) and 0 < len(lost) < 100
    assert damaged.shed == {"damaged": len(lost)}
    assert path.with_name(path.name + ".damaged").exists()


def test_file_damaged_on_a_full_disk_is_mended_when_there_is_room(
    damaged: Spool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(monkeypatch):
        damaged.take(500)
        put(damaged, 600)
        damaged.store()
        damaged.mark()
        assert damaged.take(10) == []  # not before what is older
    retry(damaged)
    damaged.mark()
    arrived = drain(damaged)
    assert arrived == sorted(set(arrived)) and arrived[-1] == 600
    assert damaged.shed == {"damaged": 596 - len(arrived)}


@pytest.mark.parametrize("step", range(1, 7))
def test_kill_in_a_rescue_loses_nothing_that_can_be_read(
    damaged: Spool, path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    abandon(damaged)
    done = [0]

    def until_killed(change: Any) -> Any:
        def changes(*given: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == step:
                raise KeyboardInterrupt
            return change(*given, **options)

        return changes

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", until_killed(Path.replace))
        killed.setattr(Path, "unlink", until_killed(Path.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            abandon(opened())
    arrived = drain(opened())
    assert arrived == sorted(set(arrived)) and len(arrived) > 500

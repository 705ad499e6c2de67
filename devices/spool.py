"""What is to be published, kept until the broker has it: in shared memory for moments, then in SQLite."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from edgekit.devices.ring import RING_BYTES, Ring
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
MAX_AGE_S = 7 * 86400.0
# A row takes so much beside its payload and topic.
_ROW_BYTES = 64
# Commits are no closer than this: what comes in between shares one.
_BATCH_S = 0.02
_BATCH = 500
# Rows that wait longer than this are on the disk itself soon, not only in the system's cache.
_SYNC_S = 1.0
# How often a disk that cannot be written is tried again.
_RETRY_S = 2.0
# How often rows are looked at for their age.
_AGE_S = 10.0

_APPLICATION_ID = 0x45444B31
_COLUMNS = "id, topic, payload, stored_s, ring, position, checksum"
_TABLE = (
    "CREATE TABLE message (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, stored_s REAL NOT NULL, "
    "ring INTEGER NOT NULL, position INTEGER NOT NULL, checksum INTEGER NOT NULL)"
)


def spool_folder(given: str | os.PathLike[str] | None) -> Path:
    """Where spools lie: as given, else where systemd keeps a service's state, else where a user's state is kept."""
    if given is not None:
        return Path(given)
    if of_service := os.environ.get("STATE_DIRECTORY"):
        return Path(of_service.split(":")[0])
    return platformdirs.user_state_path("edgekit")


class Stored(NamedTuple):
    """A message that waits. ``id`` is 0 for one that is in shared memory only, as the disk cannot be written.

    ``stored_s``: when it was stored, by :attr:`Spool.clock_s`.
    """

    id: int
    topic: str
    payload: bytes
    stored_s: float
    position: int
    replayed: bool


class Spool:
    """Messages in the order they were put, until they are deleted. One process at a time has it open.

    ``put`` may be called from any thread, and writes to shared memory only, so that no disk is ever waited for. All
    else is for one thread. ``store`` moves what was put to the disk, many messages in a commit. A killed process loses
    nothing of what was put, a machine that loses power what came in the last second or two. While the disk cannot be
    written messages stay in shared memory, and are taken from there.

    Args:
        path: the SQLite file; None: in memory only.
        max_bytes: of the rows; above it the oldest that were not taken are shed.
        max_age_s: older ones are shed. Time during which no process had the spool open does not count, nor does what
            happens to the system's clock.

    Raises:
        EdgekitError: the folder cannot be written, or another process has the spool open; limits too small.
    """

    def __init__(self, path: Path | None, *, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S) -> None:
        if max_bytes < 1 << 16 or not max_age_s > 0:
            raise EdgekitError(
                "limits of the spool",
                expected="65,536 bytes and more than 0 seconds at least",
                got=f"{max_bytes} bytes, {max_age_s:g} seconds",
                mend="give larger ones",
            )
        self.path, self.max_bytes, self.max_age_s = path, max_bytes, max_age_s
        self.shed: dict[str, int] = {}
        self.stored_s = -1e9  # when a message was last stored, by the monotonic clock
        self.disk_error = ""
        self._ring = Ring(None if path is None else str(path.absolute()))
        self._ring_id = self._ring.id & 0x7FFFFFFFFFFFFFFF  # SQLite's integers are signed
        self._fresh: deque[Stored] = deque()
        self._deleted: list[int] = []
        self._from_ring: deque[Stored] = deque()  # taken from shared memory, not deleted yet
        self._arrived: set[int] = set()  # and those of them that may be, behind others that may not
        self._last_id, self._clock_s, self._oldest_s = 0, 0.0, 0.0
        self._replay_id = self._replay_position = 0
        self._commit_s = self._sync_s = self._age_s = self._shrunk_s = -1e9
        self._retry_s = 0.0
        self._started_s = time.monotonic()
        self._database: sqlite3.Connection | None = None
        self._log = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- for any thread --------------------------------------------------------------------------------------------

    def put(self, topic: str, payload: bytes) -> bool:
        """Adds a message; False if there is no room for it in shared memory."""
        return self._ring.put(topic.encode() + b"\0" + payload)

    @property
    def messages(self) -> int:
        """How many are to be deleted yet."""
        return self._rows - len(self._deleted) + self._ring.count + len(self._from_ring)

    @property
    def unread(self) -> int:
        """How many are in shared memory only."""
        return self._ring.count

    @property
    def half_full(self) -> bool:
        """Whether shared memory is."""
        return self._ring.half_full

    @property
    def full(self) -> bool:
        return self.bytes >= 0.9 * self.max_bytes

    @property
    def oldest_s(self) -> float:
        """Age of the oldest message that is stored, in seconds."""
        return max(0.0, self.clock_s - self._oldest_s) if self._rows > len(self._deleted) else 0.0

    @property
    def clock_s(self) -> float:
        """Seconds for which the spool has been open since its oldest message came, over all processes."""
        return self._clock_s + time.monotonic() - self._started_s

    # -- for the thread that owns it -------------------------------------------------------------------------------

    def store(self, urgent: bool = True) -> float:
        """Moves what was put to the disk and deletes what is to be deleted, in one commit.

        Args:
            urgent: also where enough is there to be taken, so that what is stored has to be read again.

        Returns:
            After how many seconds it is to be called again, if anything is left to do.
        """
        now_s = time.monotonic()
        if not (self._ring.count or self._deleted):
            self._sync(now_s)
            return _SYNC_S if self._rows else 60.0
        since_s = now_s - self._commit_s
        if since_s < _BATCH_S and self._ring.count < _BATCH:
            return _BATCH_S - since_s
        if not self._ring.count and since_s < 1.0 and len(self._deleted) < _BATCH:
            return 1.0 - since_s  # to delete is not urgent
        if now_s < self._retry_s or self._from_ring:
            return max(0.05, self._retry_s - now_s)
        if len(self._fresh) >= _BATCH and not urgent:
            return _BATCH_S
        records = self._ring.read(_BATCH)
        deleted, self._deleted = self._deleted, []
        stored = list(self._rows_of(records))
        try:
            with self._commit():
                self._database.executemany("DELETE FROM message WHERE id = ?", ((one,) for one in deleted))
                self._insert(stored)
        except sqlite3.Error as error:
            self._deleted = deleted + self._deleted
            self._ring.rewind()
            self._cannot_write(error)
            return _RETRY_S
        self._commit_s = now_s
        if records:
            self.stored_s = now_s
        if self.disk_error:
            logger.warning("spool %s can be written again", self.path)
            self.disk_error = ""
        self._rows -= len(deleted)
        if records:
            self._ring.release(records[-1][0])
        if stored:
            if self._loaded == self._last_id and len(self._fresh) < _BATCH:
                self._fresh.extend(stored)
                self._loaded = stored[-1].id
            if not self._rows:
                self._oldest_s = stored[0].stored_s
            self._rows += len(stored)
            self._last_id = stored[-1].id
            self.bytes += sum(map(_size, stored))
        if self.bytes > self.max_bytes:
            self._shed_oldest()
        if not self._rows and now_s - self._shrunk_s > _AGE_S:
            self._shrunk_s = now_s
            with contextlib.suppress(sqlite3.Error):
                self._run("PRAGMA incremental_vacuum")
        self._sync(now_s)
        return 0.0 if self._ring.count else 1.0

    def mark(self) -> None:
        """A connection was made or lost: what has been put by now is replayed, and begun again with the oldest."""
        self._replay_id, self._replay_position = self._last_id, self._ring.head
        self._fresh.clear()
        self._from_ring.clear()
        self._arrived.clear()
        self._ring.rewind()
        self._loaded = 0

    def take(self, limit: int) -> list[Stored]:
        """The next messages, oldest first; each once for each :meth:`mark`."""
        if not self._fresh and self._loaded < self._last_id:
            self._load()
        taken = []
        while self._fresh and len(taken) < limit:
            taken.append(self._fresh.popleft())
        if self.disk_error and not taken and time.monotonic() < self._retry_s:
            taken = list(self._rows_of(self._ring.read(limit), on_disk=False))
            self._from_ring.extend(taken)
        return taken

    def give_back(self, stored: list[Stored]) -> None:
        """Takes back messages that were taken last, to be taken next."""
        self._fresh.extendleft(reversed(stored))

    def delete(self, stored: Stored) -> None:
        """The message has arrived."""
        if stored.id:
            self._deleted.append(stored.id)
            self.bytes -= _size(stored)
            self._oldest_s = max(self._oldest_s, stored.stored_s)
            return
        self._arrived.add(stored.position)
        while self._from_ring and self._from_ring[0].position in self._arrived:
            done = self._from_ring.popleft()
            self._arrived.discard(done.position)
            self._ring.release(done.position)

    def drop(self, stored: Stored, cause: str) -> None:
        """Deletes a message that will not arrive, and counts it."""
        self.count_shed(cause)
        self.delete(stored)

    def count_shed(self, cause: str, count: int = 1) -> None:
        if not self.shed.get(cause):
            logger.error("messages are shed, the first of them now: %s; health tells how many", cause)
        self.shed[cause] = self.shed.get(cause, 0) + count

    def close(self) -> None:
        if self._deleted:
            self._commit_s = -1e9
            self.store()
        self._disconnect()
        self._ring.close()

    # -- the database ----------------------------------------------------------------------------------------------

    def _open(self, damage: sqlite3.Error | None = None) -> None:
        """``damage``: what showed that the file is damaged, if that is known before it is opened."""
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                if damage:
                    raise damage
                self._connect()
                self._survey()
            except sqlite3.Error as error:
                if self.path is None or not os.access(self.path, os.W_OK) or _is_no_damage(error):
                    raise
                rescued = self._rescue(self.path, error)
                self._connect()
                self._insert(rescued)
                self._survey()
        except (OSError, sqlite3.Error) as error:
            mend = "give a folder that can be written with --spool, and free disk space"
            if "locked" in str(error):
                mend = "another run uses it: give this one another --stream, device id or --spool"
            raise EdgekitError(f"spool {self.path} cannot be opened ({error})", mend=mend) from error
        self._loaded = 0
        if self.messages:
            logger.info("spool %s: %d messages of an earlier run are to be sent", self.path, self.messages)

    def _survey(self) -> None:
        """Counts what is there; DatabaseError where a message was altered."""
        self._rows = self.bytes = self._already = 0
        newest_s = 0.0
        for row in self._each("ASC"):
            if not (stored := _whole(row)):
                raise sqlite3.DatabaseError("a message was altered")
            if not self._rows:
                self._oldest_s = stored.stored_s
            self._rows += 1
            newest_s = stored.stored_s
            # never less than it was: who took a message of a damaged file may still delete it
            self._last_id = max(self._last_id, stored.id)
            self.bytes += _size(stored)
            # A process may have been killed after a commit and before it gave back the room in shared memory.
            if row[4] == self._ring_id:
                self._already = stored.position
        self._clock_s = max(self._clock_s, newest_s - (time.monotonic() - self._started_s))

    def _each(self, order: str) -> Iterator[tuple[Any, ...]]:
        assert self._database
        try:
            yield from self._database.execute(f"SELECT {_COLUMNS} FROM message ORDER BY id {order}")
        except UnicodeDecodeError as error:  # in what SQLite says of a damaged file
            raise sqlite3.DatabaseError("damaged") from error

    def _run(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        assert self._database
        try:
            return self._database.execute(statement, values).fetchall()
        except UnicodeDecodeError as error:  # as in _each
            raise sqlite3.DatabaseError("damaged") from error

    def _connect(self) -> None:
        """Opens the file, new where there is none; DatabaseError where it is not ours or not whole."""
        self._disconnect()
        self._database = sqlite3.connect(
            ":memory:" if self.path is None else self.path, timeout=0, isolation_level=None, check_same_thread=False
        )
        # What is no UTF-8 shows by its checksum.
        self._database.text_factory = lambda text: text.decode(errors="replace")
        run = self._run
        run("PRAGMA locking_mode = EXCLUSIVE")  # and so no file of shared memory beside it
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA cell_size_check = ON")
        run("PRAGMA cache_size = -512")
        schema = run("SELECT type, sql FROM sqlite_master")
        if not schema and run("PRAGMA page_count")[0][0] <= 1:
            if self.path is not None:
                self.path.chmod(0o600)
            run("PRAGMA auto_vacuum = INCREMENTAL")
            run(f"PRAGMA application_id = {_APPLICATION_ID}")
            run("PRAGMA journal_mode = WAL")
            run(_TABLE)
        elif schema != [("table", _TABLE)] or run("PRAGMA application_id") != [(_APPLICATION_ID,)]:
            raise sqlite3.DatabaseError("not a spool of this version")
        run("PRAGMA journal_mode = WAL")
        # The log is synced by _sync, where anything waits for long; what is sent at once need not wear out the disk.
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA journal_size_limit = 4194304")
        if (found := run("PRAGMA quick_check(1)")) != [("ok",)]:
            raise sqlite3.DatabaseError(str(found[0][0]))
        if self.path is not None:
            with contextlib.suppress(OSError):
                self._log = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)

    def _disconnect(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        if self._database:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def _rescue(self, path: Path, error: sqlite3.Error) -> list[Stored]:
        """What can be read of a damaged file, which is put aside."""
        rows: dict[int, Stored] = {}
        altered = set()
        for order in ("ASC", "DESC"):
            with contextlib.suppress(sqlite3.Error):
                for row in self._each(order):
                    if stored := _whole(row):
                        rows[stored.id] = stored
                    else:
                        altered.add(row[0])
        self._disconnect()
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        for suffix in ("-wal", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        logger.error(
            "spool %s is damaged (%s): %d messages in it can be read and will be sent; it is kept as %s",
            path, error, len(rows), aside.name,
        )  # fmt: skip
        if altered:
            self.count_shed("damaged", len(altered))
        # of no position in shared memory: it was that of an earlier ring
        return [rows[number]._replace(position=0) for number in sorted(rows)]

    def _insert(self, stored: Iterable[Stored]) -> None:
        assert self._database
        self._database.executemany(
            f"INSERT INTO message ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (*row[:4], self._ring_id, row.position, _checksum(*row[:4], self._ring_id, row.position))
                for row in stored
            ),
        )

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._run("ROLLBACK")
            raise

    def _cannot_write(self, error: sqlite3.Error) -> None:
        if not self.disk_error:
            logger.error(
                "spool %s cannot be written (%s): messages wait in memory, %d MB of them at most; free disk space",
                self.path, error, RING_BYTES >> 20,
            )  # fmt: skip
        self.disk_error = str(error)
        self._retry_s = time.monotonic() + _RETRY_S
        if not _is_no_damage(error):  # under our hands
            with contextlib.suppress(EdgekitError):
                self._open(error)
                self.mark()

    def _load(self) -> None:
        deleted = set(self._deleted)
        try:
            rows = self._run(f"SELECT {_COLUMNS} FROM message WHERE id > ? ORDER BY id LIMIT {_BATCH}", (self._loaded,))
            loaded = [_whole(row) for row in rows]
            if None in loaded:
                raise sqlite3.DatabaseError("a message was altered")
        except sqlite3.Error as error:
            self._cannot_write(error)
            return
        for stored in loaded:
            if stored and stored.id not in deleted:
                self._fresh.append(stored._replace(replayed=self._is_replayed(stored.id, stored.position)))
        self._loaded = rows[-1][0] if rows else self._last_id
        if self._fresh:
            self._oldest_s = self._fresh[0].stored_s

    def _rows_of(self, records: list[tuple[int, bytes]], on_disk: bool = True) -> Iterator[Stored]:
        number, clock_s = self._last_id, self.clock_s
        for position, record in records:
            if position <= self._already:
                continue
            topic, _, payload = record.partition(b"\0")
            number += 1
            identity = number if on_disk else 0
            yield Stored(identity, topic.decode(), payload, clock_s, position, self._is_replayed(identity, position))

    def _is_replayed(self, identity: int, position: int) -> bool:
        return 0 < identity <= self._replay_id or 0 < position <= self._replay_position

    def _sync(self, now_s: float) -> None:
        """What waits is on the disk soon, and rows that are too old are not."""
        if self._rows and now_s - self._sync_s > _SYNC_S and self._log >= 0 and self.oldest_s > _SYNC_S:
            self._sync_s = now_s
            with contextlib.suppress(OSError):
                os.fsync(self._log)
        if self._rows and now_s - self._age_s > _AGE_S and self.oldest_s > self.max_age_s:
            self._age_s = now_s
            self._shed("age", "stored_s < ?", self.clock_s - self.max_age_s)

    def _shed_oldest(self) -> None:
        """Down to nine tenths, so that it is not done for each message."""
        to_free, last = self.bytes - 0.9 * self.max_bytes, self._loaded
        with contextlib.suppress(sqlite3.Error):
            assert self._database
            for number, size in self._database.execute(
                "SELECT id, length(payload) + length(topic) FROM message WHERE id > ? ORDER BY id", (self._loaded,)
            ):
                to_free -= size + _ROW_BYTES
                last = number
                if to_free <= 0:
                    break
            self._shed("full", "id <= ?", last)

    def _shed(self, cause: str, condition: str, value: float) -> None:
        """Rows that are loaded are under way, and stay."""
        where = f"id > {self._loaded} AND {condition}"
        try:
            with self._commit():
                ((count, size),) = self._run(
                    f"SELECT count(*), coalesce(sum(length(payload) + length(topic)), 0) FROM message WHERE {where}",
                    (value,),
                )
                self._run(f"DELETE FROM message WHERE {where}", (value,))
        except sqlite3.Error as error:
            self._cannot_write(error)
            return
        self._rows -= count
        self.bytes -= size + _ROW_BYTES * count
        if count:
            self.count_shed(cause, count)


def _size(stored: Stored) -> int:
    return len(stored.payload) + len(stored.topic) + _ROW_BYTES


def _checksum(number: int, topic: str, payload: bytes, stored_s: float, ring: int, position: int) -> int:
    return zlib.crc32(payload, zlib.crc32(f"{number} {topic} {stored_s!r} {ring} {position}".encode()))


def _whole(row: Sequence[Any]) -> Stored | None:
    """The message in a row, unless it is damaged."""
    number, topic, payload, stored_s, _ring, position, checksum = row
    if isinstance(payload, bytes) and isinstance(topic, str) and _checksum(*row[:6]) == checksum:
        return Stored(number, topic, payload, stored_s, position, True)
    return None


def _is_no_damage(error: sqlite3.Error) -> bool:
    """Whether it is what the system would not let us do, and not what is in the file."""
    return any(
        part in str(error) for part in ("locked", "unable to open", "full", "disk I/O", "out of memory", "readonly")
    )

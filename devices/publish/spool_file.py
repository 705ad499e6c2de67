"""The file of a spool: messages in SQLite, each with a checksum, and what is done when the file is damaged."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Id, topic, payload, stored_s, id of the ring that it was in, where its record ended there, and the checksum of these.
Row = tuple[int, str, bytes, float, int, int, int]
_COLUMNS = "id, topic, payload, stored_s, ring, position, checksum"
_TABLE = (
    "CREATE TABLE message (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, stored_s REAL NOT NULL, "
    "ring INTEGER NOT NULL, position INTEGER NOT NULL, checksum INTEGER NOT NULL)"
)
# Of that table, as PRAGMA table_info gives them: place, name, type, not null, default, in the primary key.
_TABLE_INFO = [
    (0, "id", "INTEGER", 0, None, 1),
    (1, "topic", "TEXT", 1, None, 0),
    (2, "payload", "BLOB", 1, None, 0),
    (3, "stored_s", "REAL", 1, None, 0),
    (4, "ring", "INTEGER", 1, None, 0),
    (5, "position", "INTEGER", 1, None, 0),
    (6, "checksum", "INTEGER", 1, None, 0),
]
_APPLICATION_ID = 0x45444B31
# The statements that lead from each version of the file to the next: another table is another version, and gets an
# entry here. Files of version 0 have today's table; only the number was not written yet.
_MIGRATIONS: tuple[tuple[str, ...], ...] = ((),)
_VERSION = len(_MIGRATIONS)
# There will hardly be as many: a higher number is a damaged one.
_VERSIONS = 32
# SQLite's result codes (https://www.sqlite.org/rescode.html), which the sqlite3 module names from Python 3.11 on.
SQLITE_ERROR, SQLITE_BUSY, SQLITE_IOERR, SQLITE_FULL = 1, 5, 10, 13
# Corrupt, too big, constraint, mismatch, format, not a database: to our statements, only the content gives these.
_DAMAGE = frozenset((11, 18, 19, 20, 24, 26))
_NUMBERS = struct.Struct("=qdqq")
# A row takes so much beside its payload and topic.
ROW_BYTES = 64
# Pages that are given back at once at most, of 4 KB, so that no one waits for long.
_SHRINK_PAGES = 2000


class Damaged(sqlite3.DatabaseError):
    """What is in the file is not what was written to it."""


class NewerVersion(sqlite3.NotSupportedError):
    """The file is whole, as far as can be seen, but of a version that is not known here."""


class SpoolFile:
    """Rows in the order of their ids. It may be closed by a failure, and opened again when the disk is well.

    All methods raise sqlite3.Error: what :func:`is_damage` knows where the file is damaged.

    Args:
        path: None: in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = self.bytes = 0
        self.oldest_s = self.newest_s = 0.0  # as the oldest and newest row say; the oldest may be one that has gone
        self.last_id = 0  # the highest there ever was
        self._counted = False
        self._database: sqlite3.Connection | None = None
        self._log = -1

    # -- opening ---------------------------------------------------------------------------------------------------

    def open(self, damage: Exception | None = None) -> int:
        """Opens the file, new where there is none. Each row is read, so that nothing altered is ever sent.

        Args:
            damage: what showed that the file is damaged, if that is known.

        Returns:
            How many messages were lost by damage: within a run as counted, else as far as ids tell.

        Raises:
            OSError: as for all files.
        """
        known, is_new = self.count if self._counted else None, False
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._put_in_place()
            is_new = not self.path.exists()
        try:
            if damage:
                raise damage
            self._connect()
            self._survey()
            return 0
        except (OSError, sqlite3.Error) as error:
            if self.path is None or is_new or not is_damage(error) or not os.access(self.path, os.W_OK):
                self.close()
                if self.path and is_new:  # half made
                    self.path.unlink(missing_ok=True)
                    _beside(self.path, "-wal").unlink(missing_ok=True)
                raise
            gaps = self._rescue(self.path, error)
            return gaps if known is None else known - self.count

    def _connect(self) -> None:
        """Damaged where the file is not ours or not whole; NewerVersion where a later EdgeKit wrote it."""
        self.close()
        self._database = sqlite3.connect(
            self.path or ":memory:", timeout=0, isolation_level=None, check_same_thread=False
        )
        # What is no UTF-8 shows by its checksum.
        self._database.text_factory = lambda text: text.decode(errors="replace")
        try:
            version = self._prepare()
        except sqlite3.OperationalError as error:
            if error_code(error) == SQLITE_ERROR:  # the statements are right: it is how the file says it is to be read
                raise Damaged(str(error)) from error
            raise
        self._migrate(version)
        if not self._has_table():
            raise Damaged("its table is not that of a spool")
        if self.path:
            with contextlib.suppress(OSError):
                self._log = os.open(_beside(self.path, "-wal"), os.O_RDONLY | os.O_CLOEXEC)

    def _prepare(self) -> int:
        """Makes the database ready, new where it is empty; its version."""
        run = self._run
        run("PRAGMA locking_mode = EXCLUSIVE")  # and so no file of shared memory beside it
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA cell_size_check = ON")
        run("PRAGMA cache_size = -512")
        if not run("SELECT name FROM sqlite_master") and run("PRAGMA page_count")[0][0] <= 1:
            if self.path:
                self.path.chmod(0o600)
            run("PRAGMA auto_vacuum = INCREMENTAL")
            run(f"PRAGMA application_id = {_APPLICATION_ID}")
            run(f"PRAGMA user_version = {_VERSION}")
            run("PRAGMA journal_mode = WAL")
            run(_TABLE)
        if run("PRAGMA application_id") != [(_APPLICATION_ID,)]:
            raise Damaged("not a spool")
        ((version,),) = run("PRAGMA user_version")
        if not 0 <= version < _VERSIONS:
            raise Damaged("its version was altered")
        if version > _VERSION:
            raise NewerVersion(f"version {version}, and {_VERSION} is the highest known")
        run("PRAGMA journal_mode = WAL")
        # The log is synced by sync(), where anything waits for long; what is sent at once need not wear out the disk.
        run("PRAGMA synchronous = NORMAL")
        run("PRAGMA journal_size_limit = 4194304")
        if (found := run("PRAGMA quick_check(1)")) != [("ok",)]:
            raise Damaged(str(found[0][0]))
        return int(version)

    def _migrate(self, version: int) -> None:
        """Brings the file to the version of today, all or nothing."""
        if version == _VERSION:
            return
        statements = [statement for step in _MIGRATIONS[version:] for statement in step]
        try:
            with self._transaction() as database:
                for statement in statements:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.Error as error:
            # Where the number alone cannot be written, as the disk is full, the next run will write it.
            if statements or error_code(error) not in (SQLITE_FULL, SQLITE_IOERR):
                raise

    def _has_table(self) -> bool:
        """Whether rows can be read and added. More indexes or tables do no harm; triggers and unique indexes may."""
        if any(kind == "trigger" for (kind,) in self._run("SELECT type FROM sqlite_master")):
            return False
        if any(unique for _, _, unique, *_ in self._run("PRAGMA index_list(message)")):
            return False
        return self._run("PRAGMA table_info(message)") == _TABLE_INFO

    def _survey(self) -> None:
        """Counts what is there; Damaged where a message was altered."""
        count, size, oldest_s, newest_s, last_id = 0, 0, 0.0, 0.0, 0
        for row in self._each(f"SELECT {_COLUMNS} FROM message ORDER BY id"):
            last_id, topic, payload, newest_s, *_ = _check(row)
            oldest_s = oldest_s if count else newest_s
            count += 1
            size += row_bytes(topic, payload)
        self.count, self.bytes, self.oldest_s, self.newest_s = count, size, oldest_s, newest_s
        self.last_id = max(self.last_id, last_id)
        self._counted = True

    def _rescue(self, path: Path, error: Exception) -> int:
        """Moves what can be read of a damaged file to a new one; how many rows are missing between the others.

        A process may be killed at any step: what was rescued is whole when it gets its name.
        """
        rows: dict[int, Row] = {}
        for order in ("ASC", "DESC"):  # from both ends to where it is damaged
            with contextlib.suppress(sqlite3.Error):
                for row in self._each(f"SELECT {_COLUMNS} FROM message ORDER BY id {order}"):
                    with contextlib.suppress(Damaged):
                        rows[row[0]] = _check(row)
        self.close()
        making = _beside(path, ".rescuing")
        for left in (making, _beside(making, "-wal")):
            left.unlink(missing_ok=True)
        new = SpoolFile(making)
        try:
            new._connect()
            new.commit({}, [rows[number] for number in sorted(rows)])
            new._run("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            new.close()
        making.replace(_beside(path, ".rescued"))
        self._put_in_place()
        logger.error(
            "spool %s is damaged (%s): %d messages in it can be read and will be sent; it is kept as %s",
            path, error, len(rows), _beside(path, ".damaged").name,
        )  # fmt: skip
        self._connect()
        self._survey()
        return max(rows) - min(rows) + 1 - len(rows) if rows else 1

    def _put_in_place(self) -> None:
        """A file that was rescued takes the place of the damaged one, which is put aside."""
        assert self.path
        rescued, aside = _beside(self.path, ".rescued"), _beside(self.path, ".damaged")
        if not rescued.exists():
            return
        if self.path.exists():
            _beside(aside, "-wal").unlink(missing_ok=True)
            self.path.replace(aside)
        # A log of the damaged file would be taken for one of the new.
        if (log := _beside(self.path, "-wal")).exists():
            log.replace(_beside(aside, "-wal"))
        _beside(self.path, "-journal").unlink(missing_ok=True)
        rescued.replace(self.path)

    @property
    def is_open(self) -> bool:
        return self._database is not None

    def close(self) -> None:
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        if self._database:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def remove(self) -> None:
        """Closes the file and removes it with all rows."""
        self.close()
        for path in (self.path, _beside(self.path, "-wal")) if self.path else ():
            path.unlink(missing_ok=True)
        self.count = self.bytes = 0

    # -- rows ------------------------------------------------------------------------------------------------------

    def after(self, number: int, limit: int) -> list[Row]:
        """The next rows behind this id; Damaged if one was altered."""
        found = self._run(f"SELECT {_COLUMNS} FROM message WHERE id > ? ORDER BY id LIMIT ?", (number, limit))
        return [_check(row) for row in found]

    def position(self, ring: int) -> int:
        """How far the records of this ring are stored, as its rows tell."""
        ((position,),) = self._run("SELECT max(position) FROM message WHERE ring = ?", (ring,))
        return position or 0

    def commit(self, deleted: Mapping[int, int], rows: Sequence[Row]) -> None:
        """Deletes rows and adds others behind the last, all or nothing.

        Args:
            deleted: their bytes by id.
        """
        gone = 0
        with self._transaction() as database:
            if deleted:
                first, last = min(deleted), max(deleted)
                if last - first + 1 == len(deleted):
                    gone = database.execute("DELETE FROM message WHERE id BETWEEN ? AND ?", (first, last)).rowcount
                else:
                    each = [(number,) for number in deleted]
                    gone = database.executemany("DELETE FROM message WHERE id = ?", each).rowcount
            if rows:
                database.executemany(f"INSERT INTO message ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        if rows:
            if gone == self.count:
                self.oldest_s = rows[0][3]
            self.last_id, self.newest_s = rows[-1][0], rows[-1][3]
        self.count += len(rows) - gone
        self.bytes += sum(row_bytes(row[1], row[2]) for row in rows) - sum(deleted.values())
        if gone != len(deleted):  # some were lost by damage
            self._count()

    def shed_older(self, after: int, stored_s: float) -> int:
        """Deletes rows behind an id that were stored before; how many."""
        return self._shed(after, self._run("SELECT max(id) FROM message WHERE stored_s < ?", (stored_s,))[0][0])

    def shed_oldest(self, after: int, size_bytes: float) -> int:
        """Deletes the first rows behind an id that are so large together; how many."""
        last = None
        sizes = "SELECT id, length(payload) + length(topic) FROM message WHERE id > ? ORDER BY id"
        for number, size in self._each(sizes, (after,)):
            last = number
            size_bytes -= size + ROW_BYTES
            if size_bytes <= 0:
                break
        return self._shed(after, last)

    def _shed(self, after: int, last: int | None) -> int:
        if last is None or last <= after:
            return 0
        with self._transaction() as database:
            count = database.execute("DELETE FROM message WHERE id > ? AND id <= ?", (after, last)).rowcount
        self._count()
        return count

    def _count(self) -> None:
        ((self.count, size),) = self._run(
            "SELECT count(*), coalesce(sum(length(payload) + length(topic)), 0) FROM message"
        )
        self.bytes = size + ROW_BYTES * self.count
        if oldest := self._run("SELECT stored_s FROM message ORDER BY id LIMIT 1"):
            self.oldest_s = oldest[0][0]

    def sync(self) -> None:
        """What was committed is on the disk itself afterwards; OSError if it cannot be."""
        if self._log >= 0:
            os.fsync(self._log)

    def shrink(self) -> None:
        """Gives back room that rows have left."""
        if self._run("PRAGMA freelist_count")[0][0] * 4 > self._run("PRAGMA page_count")[0][0] and self._database:
            # A script, as execute() would give back a single page: it stops at the first of rows without columns.
            self._database.executescript(f"PRAGMA incremental_vacuum({_SHRINK_PAGES})")

    # -- SQLite ----------------------------------------------------------------------------------------------------

    def _each(self, statement: str, values: Sequence[object] = ()) -> Iterator[Any]:
        if not self._database:
            raise sqlite3.OperationalError("unable to open database file")
        try:
            yield from self._database.execute(statement, values)
        except UnicodeDecodeError as error:  # in what SQLite says of a damaged file
            raise Damaged("damaged") from error

    def _run(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        return list(self._each(statement, values))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._run("BEGIN IMMEDIATE")
        assert self._database
        try:
            yield self._database
            self._run("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._run("ROLLBACK")
            if isinstance(error, UnicodeDecodeError):  # as in _each
                raise Damaged("damaged") from error
            raise


def error_code(error: Exception) -> int:
    """SQLite's primary result code; 0 where the error did not come from SQLite itself."""
    if sys.version_info >= (3, 11):
        return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
    return _guessed_code(error)


def _guessed_code(error: Exception) -> int:
    """For Python 3.10, whose errors have no code: by their class, and where that is shared by many, by their words.

    An operational error in other words is SQLITE_ERROR, which counts as damage only while the file is opened.
    """
    if isinstance(error, sqlite3.OperationalError):
        codes = {"locked": SQLITE_BUSY, "out of memory": 7, "readonly": 8, "disk I/O": SQLITE_IOERR,
                 "full": SQLITE_FULL, "unable to open": 14}  # fmt: skip
        return next((code for words, code in codes.items() if words in str(error)), SQLITE_ERROR)
    kinds: dict[type[Exception], int] = {sqlite3.DatabaseError: 11, sqlite3.DataError: 18, sqlite3.IntegrityError: 19}
    return kinds.get(type(error), 0)


def is_damage(error: Exception) -> bool:
    """Whether it is what is in the file, and not what the system would not let us do, or a fault of ours."""
    return isinstance(error, Damaged) or error_code(error) in _DAMAGE


def row_bytes(topic: str, payload: bytes) -> int:
    return len(topic) + len(payload) + ROW_BYTES


def make_row(number: int, topic: str, payload: bytes, stored_s: float, ring: int, position: int) -> Row:
    numbers = _NUMBERS.pack(number, stored_s, ring, position)
    checksum = zlib.crc32(payload, zlib.crc32(topic.encode(), zlib.crc32(numbers)))
    return number, topic, payload, stored_s, ring, position, checksum


def _check(row: Row) -> Row:
    """The row, unless it was altered: Damaged."""
    with contextlib.suppress(TypeError, AttributeError, struct.error):  # SQLite holds any type in any column
        if isinstance(row[2], bytes) and make_row(*row[:6]) == row:
            return row
    raise Damaged("a message was altered")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)

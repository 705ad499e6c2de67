"""What is to be published, kept until the broker has it: in shared memory for moments, then in a file."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import platformdirs

from edgekit.devices.publish.ring import RING_BYTES, Record, Ring
from edgekit.devices.publish.spool_file import (
    ROW_BYTES,
    SQLITE_BUSY,
    SQLITE_FULL,
    SQLITE_IOERR,
    NewerVersion,
    Row,
    SpoolFile,
    error_code,
    is_damage,
    make_row,
    row_bytes,
)
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
MAX_AGE_S = 7 * 86400.0
# Commits are no closer than this: what comes in between shares one.
_BATCH_S = 0.02
_BATCH = 500
# What is to be deleted waits so long for others.
_DELETE_S = 1.0
# Rows that wait longer than this are on the disk itself soon, not only in the system's cache.
_SYNC_S = 1.0
# How often a disk that cannot be written is tried again.
_RETRY_S = 2.0
# How often rows are looked at for their age, and the file for room to give back.
_TIDY_S = 10.0


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
        EdgekitError: the folder cannot be written, or another process has the spool open; a later EdgeKit wrote it;
            limits too small.
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
        self._shedding = threading.Lock()
        self.stored_s = -1e9  # when a message was last stored, by the monotonic clock
        self.disk_error = ""
        self._file = SpoolFile(path)
        self._fresh: deque[Stored] = deque()  # to be taken next
        self._loaded = 0  # the id up to which rows are in _fresh, or were
        self._deleted: dict[int, int] = {}  # bytes by id: rows to be deleted by the next commit
        self._deleted_bytes = 0
        self._passed_s = 0.0  # when the newest of what has arrived was stored
        self._from_ring: deque[Stored] = deque()  # taken from shared memory, not deleted yet
        self._arrived: set[int] = set()  # and those of them that may be, behind others that may not
        self._replay_id = self._replay_position = 0
        self._commit_s = self._sync_s = self._tidy_s = self._retry_s = -1e9
        self._started_s = time.monotonic()
        self._ring = Ring(None if path is None else str(path.absolute()), on_lost=self._lost)
        try:
            self._open()
        except BaseException:
            self._file.close()
            self._ring.close()
            raise

    def _open(self) -> None:
        path, is_new = self.path, self.path is not None and not os.access(self.path, os.F_OK)
        try:
            self._lost(self._file.open())
            # A process may have been killed after a commit and before it gave back the room in shared memory.
            if position := self._file.position(self._ring.id):
                self._ring.read(self._ring.count)
                self._ring.release(position)
                self._ring.rewind()
        except NewerVersion as error:
            raise EdgekitError(
                f"spool {path} was written by a later EdgeKit ({error}); it is left as it is",
                mend="install that EdgeKit again to send what is in it, or give another folder with --spool",
            ) from error
        except (OSError, sqlite3.Error) as error:
            if is_new and _is_full(error):  # with nothing in it there is nothing to wait for
                self._cannot_write(error)
            else:
                mend = "give a folder that can be written with --spool, and free disk space"
                if error_code(error) == SQLITE_BUSY:
                    mend = "another run uses it: give this one another --stream, device id or --spool"
                raise EdgekitError(f"spool {path} cannot be opened ({error})", mend=mend) from error
        self._clock_s = self._file.newest_s
        self.mark()
        if self.messages:
            logger.info("spool %s: %d messages of an earlier run are to be sent", path, self.messages)

    # -- for any thread --------------------------------------------------------------------------------------------

    def put(self, topic: str, payload: bytes) -> bool:
        """Adds a message; False if there is no room for it in shared memory."""
        record = topic.encode() + b"\0" + payload
        if self._ring.put(record):
            return True
        if self._ring.fits(record):
            return False
        self.count_shed("too large for the spool")
        return True

    @property
    def messages(self) -> int:
        """How many are to be deleted yet."""
        return max(0, self._file.count - len(self._deleted)) + self._ring.count + len(self._from_ring)

    @property
    def unread(self) -> int:
        """How many are in shared memory only."""
        return self._ring.count

    @property
    def half_full(self) -> bool:
        """Whether shared memory is."""
        return self._ring.half_full

    @property
    def bytes(self) -> int:
        """Of the messages that are stored."""
        return max(0, self._file.bytes - self._deleted_bytes)

    @property
    def full(self) -> bool:
        """Whether who can wait should, so that nothing is shed: with what is in shared memory, as it will be stored."""
        return self.bytes + self._ring.held_bytes + ROW_BYTES * self._ring.count >= 0.9 * self.max_bytes

    @property
    def oldest_s(self) -> float:
        """Age of the oldest message that is stored, in seconds."""
        if self._file.count <= len(self._deleted):
            return 0.0
        return max(0.0, self.clock_s - max(self._file.oldest_s, self._passed_s))

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
        since_s = now_s - self._commit_s
        if self._ring.empty:
            if not self._deleted:
                self._tidy(now_s)
                return _SYNC_S if self._file.count else 60.0
            if since_s < _DELETE_S and len(self._deleted) < _BATCH:
                return _DELETE_S - since_s
        elif since_s < _BATCH_S and self._ring.count < _BATCH:
            return _BATCH_S - since_s
        if now_s < self._retry_s or self._from_ring:
            return max(0.05, self._retry_s - now_s)
        if len(self._fresh) >= _BATCH and not urgent:
            return _BATCH_S
        records = self._ring.read(_BATCH)
        rows = self._rows(records)
        try:
            if self.disk_error and self._file.count <= len(self._deleted):
                # All have arrived: where the disk is full it may be full of this very file.
                self._file.remove()
                self._deleted = {}
            if not self._file.is_open:
                self._lost(self._file.open())
            self._file.commit(self._deleted, rows)
        except (OSError, sqlite3.Error) as error:
            self._ring.rewind()
            self._cannot_write(error)
            return _RETRY_S
        self._commit_s = now_s
        self._deleted, self._deleted_bytes = {}, 0
        if self.disk_error:
            logger.warning("spool %s can be written again", self.path)
            self.disk_error = ""
        if rows:
            self.stored_s = now_s
            self._ring.release(records[-1][0])
            if self._loaded == rows[0][0] - 1 and len(self._fresh) < _BATCH:
                self._fresh.extend([self._stored(row) for row in rows])
                self._loaded = rows[-1][0]
        self._tidy(now_s)
        return 0.0 if not self._ring.empty else _DELETE_S

    def mark(self) -> None:
        """A connection was made or lost: what has been put by now is replayed, and begun again with the oldest."""
        self._replay_id, self._replay_position = self._file.last_id, self._ring.head
        self._fresh.clear()
        self._from_ring.clear()
        self._arrived.clear()
        self._ring.rewind()
        self._loaded = 0 if self._file.count > len(self._deleted) else self._file.last_id

    def take(self, limit: int) -> list[Stored]:
        """The next messages, oldest first; each once for each :meth:`mark`."""
        while not self._fresh and self._loaded < self._file.last_id and self._load():
            pass
        taken = [self._fresh.popleft() for _ in range(min(limit, len(self._fresh)))]
        if self.disk_error and not taken and self._loaded >= self._file.last_id and time.monotonic() < self._retry_s:
            taken = [self._stored(row)._replace(id=0) for row in self._rows(self._ring.read(limit))]
            self._from_ring.extend(taken)
        return taken

    def give_back(self, stored: list[Stored]) -> None:
        """Takes back messages that were taken last, to be taken next."""
        self._fresh.extendleft(reversed(stored))

    def delete(self, stored: Stored) -> None:
        """The message has arrived."""
        if stored.id:
            if stored.id not in self._deleted:
                self._deleted[stored.id] = size = row_bytes(stored.topic, stored.payload)
                self._deleted_bytes += size
                self._passed_s = max(self._passed_s, stored.stored_s)
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
        with self._shedding:
            before = self.shed.get(cause, 0)
            self.shed[cause] = before + count
        if not before:
            logger.error("messages are shed, the first of them now: %s; health tells how many", cause)

    def close(self) -> None:
        """Stores what can be stored: shared memory does not outlast the machine."""
        self.mark()
        self._retry_s = -1e9
        while self._deleted or not self._ring.empty:
            self._commit_s = -1e9
            self.store()
            if self.disk_error:
                break
        self._file.close()
        self._ring.close()

    # -- rows and records ------------------------------------------------------------------------------------------

    def _rows(self, records: list[Record]) -> list[Row]:
        """What becomes of records of shared memory on the disk."""
        rows, number, clock_s, ring = [], self._file.last_id, self.clock_s, self._ring.id
        for position, record in records:
            topic, _, payload = record.partition(b"\0")
            number += 1
            rows.append(make_row(number, topic.decode(), payload, clock_s, ring, position))
        return rows

    def _stored(self, row: Row) -> Stored:
        number, topic, payload, stored_s, ring, position, _ = row
        replayed = number <= self._replay_id or (ring == self._ring.id and position <= self._replay_position)
        return Stored(number, topic, payload, stored_s, position, replayed)

    def _load(self) -> bool:
        """The next rows that are not deleted; False if they cannot be read."""
        try:
            rows = self._file.after(self._loaded, _BATCH)
        except sqlite3.Error as error:
            self._cannot_write(error)
            return False
        self._fresh.extend(self._stored(row) for row in rows if row[0] not in self._deleted)
        self._loaded = rows[-1][0] if rows else self._file.last_id
        return True

    def _unload(self) -> None:
        """What was loaded and not taken will be loaded again."""
        if self._fresh and self._fresh[0].id:
            self._loaded = self._fresh[0].id - 1
            self._fresh.clear()

    # -- the disk --------------------------------------------------------------------------------------------------

    def _tidy(self, now_s: float) -> None:
        """Keeps to the limits. Nothing is to be deleted now; rows that were taken are under way, and stay."""
        if not self._file.count and now_s - self._tidy_s < _TIDY_S:
            return
        try:
            if self._file.bytes > self.max_bytes:
                self._unload()
                # down to nine tenths, so that it is not done for each message
                self._count("full", self._file.shed_oldest(self._loaded, self._file.bytes - 0.9 * self.max_bytes))
            if now_s - self._tidy_s > _TIDY_S:
                self._tidy_s = now_s
                if self.oldest_s > self.max_age_s:
                    self._unload()
                    self._count("age", self._file.shed_older(self._loaded, self.clock_s - self.max_age_s))
                self._file.shrink()
            if now_s - self._sync_s > _SYNC_S and self.oldest_s > _SYNC_S:
                self._sync_s = now_s
                self._file.sync()
        except (OSError, sqlite3.Error) as error:
            self._cannot_write(error)

    def _cannot_write(self, error: Exception) -> None:
        if not self.disk_error:
            logger.error(
                "spool %s cannot be written (%s): messages wait in memory, %d MB of them at most; free disk space",
                self.path, error, RING_BYTES >> 20,
            )  # fmt: skip
        self.disk_error = str(error)
        self._retry_s = time.monotonic() + _RETRY_S
        if is_damage(error):  # under our hands
            try:
                self._lost(self._file.open(error))
            except (OSError, sqlite3.Error) as again:
                logger.error("spool %s is damaged (%s) and cannot be mended now (%s)", self.path, error, again)

    def _lost(self, count: int) -> None:
        if count > 0:
            self.count_shed("damaged", count)

    def _count(self, cause: str, count: int) -> None:
        if count:
            self.count_shed(cause, count)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return error_code(error) in (SQLITE_FULL, SQLITE_IOERR)

"""A queue of records in shared memory: what a process leaves there when it is killed is there for the next."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import stat
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

RING_BYTES = 2 << 20
_SHARED_MEMORY = Path("/dev/shm")
_MAGIC = b"EKRING01"
# Words of 8 bytes, native order: magic, id, size of the data, then head and tail, which only ever grow.
_HEADER_BYTES, _HEAD, _TAIL = 64, 3, 4
# What head and tail never reach, and SQLite's integers hold.
_LIMIT = 1 << 62
# The position of a record's end, and the record.
Record = tuple[int, bytes]
_RECORD = struct.Struct("=II")  # bytes of the record, CRC-32 of its position and content


class Ring:
    """Records between ``tail`` and ``head``, both counted in bytes since the ring was made.

    It lies in ``/dev/shm``: a record is there after ``kill -9``, and is gone when the machine restarts. No put ever
    waits for a disk. A record is seen only when it is whole: ``head`` moves after it, in one store.

    Args:
        name: what the ring belongs to; None for one of this process alone.
        size_bytes: of the records and 8 bytes for each.
        on_lost: called with how many records are damaged; with 1 where an earlier process put them, as no one knows.

    Raises:
        EdgekitError: another process uses the ring of this name.
    """

    def __init__(
        self, name: str | None, size_bytes: int = RING_BYTES, *, on_lost: Callable[[int], object] = int
    ) -> None:
        self._size = size_bytes // 8 * 8
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._fd = -1
        cut = False
        if name is not None:
            try:
                try:
                    self._fd, cut = self._open(name)
                except FileNotFoundError:
                    self._fd, cut = self._open(name)
            except OSError as error:
                logger.warning(
                    "no shared memory (%s): the last moments before the process is killed may be lost; enlarge %s",
                    error, _SHARED_MEMORY,
                )  # fmt: skip
        self._map = mmap.mmap(self._fd, _HEADER_BYTES + self._size)  # -1: anonymous memory
        self._words = memoryview(self._map).cast("Q")
        if not self._valid():
            if cut or self._map[:8] != bytes(8) or self._words[_HEAD]:
                logger.error("what an earlier run left in shared memory is damaged and left out")
                on_lost(1)
            self._map[:_HEADER_BYTES] = bytes(_HEADER_BYTES)
            self._words[1], self._words[2] = int.from_bytes(os.urandom(7), "big"), self._size
            self._map[:8] = _MAGIC
        self.id: int = self._words[1]
        # The process has the ring for itself: of what it writes to shared memory it need read nothing again.
        self._head: int = self._words[_HEAD]
        self._tail: int = self._words[_TAIL]
        self._cursor = self._tail
        #: Records not read yet.
        self.count = 0
        while self._cursor < self._head:
            if (record := self._record(self._cursor)) is None:
                self._cut(kept=self.count)
                break
            self._cursor, _ = record
            self.count += 1
        self._cursor = self._tail

    def _open(self, name: str) -> tuple[int, bool]:
        """The locked file, and whether it was of another size, so that nothing in it can be used."""
        uid = os.getuid()
        path = self._path = _SHARED_MEMORY / f"edgekit-{uid}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.ring"
        # Everyone may write to /dev/shm: not through a link, and not into what another user has put there.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != uid:
                raise PermissionError(f"{path} is not ours")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EdgekitError(
                    f"spool {name} is in use by another run",
                    mend="give this one another --stream, device id or --spool",
                ) from None
            if not path.exists() or path.stat().st_ino != found.st_ino:
                raise FileNotFoundError(f"{path} was just removed by another run")
            length = _HEADER_BYTES + self._size
            found = os.fstat(fd)  # another process may have just made it
            if found.st_size != length:
                os.ftruncate(fd, 0)
            # all of it now: a page that cannot be had later would end the process (SIGBUS)
            os.posix_fallocate(fd, 0, length)
        except BaseException:
            os.close(fd)
            raise
        return fd, found.st_size not in (0, length)

    def _valid(self) -> bool:
        words = self._words
        return (
            self._map[:8] == _MAGIC
            and words[1] < _LIMIT
            and words[2] == self._size
            and 0 <= words[_HEAD] - words[_TAIL] <= self._size
            and words[_HEAD] < _LIMIT
            and words[_HEAD] % 8 == words[_TAIL] % 8 == 0
        )

    @property
    def head(self) -> int:
        return self._head

    @property
    def empty(self) -> bool:
        """Whether all records are read."""
        return self._cursor == self._head

    @property
    def held_bytes(self) -> int:
        """Of all records that were not released."""
        return self._head - self._tail

    @property
    def half_full(self) -> bool:
        return self.held_bytes > self._size // 2

    def fits(self, record: bytes) -> bool:
        """Whether there can ever be room for it."""
        return len(record) + _RECORD.size <= self._size

    def put(self, record: bytes) -> bool:
        """Adds a record; False if there is no room for it. May be called from any thread."""
        length = len(record)
        with self._lock:
            head = self._head
            new = head + (length + 15) // 8 * 8
            if new - self._tail > self._size:
                return False
            at = _HEADER_BYTES + head % self._size
            _RECORD.pack_into(self._map, at, length, _checksum(head, record))  # never over the end: multiples of 8
            at += 8
            if at + length <= _HEADER_BYTES + self._size:
                self._map[at : at + length] = record
            else:
                first = _HEADER_BYTES + self._size - at
                self._map[at:] = record[:first]
                self._map[_HEADER_BYTES : _HEADER_BYTES + length - first] = record[first:]
            self._words[_HEAD] = self._head = new
            self.count += 1
        return True

    def read(self, limit: int) -> list[Record]:
        """The next records; they stay until :meth:`release`."""
        records: list[Record] = []
        while len(records) < limit and self._cursor < self._head:
            if (record := self._record(self._cursor)) is None:
                self._cut(kept=len(records))
                break
            records.append(record)
            self._cursor = record[0]
        with self._lock:
            # Counted anew when all are read: who puts may have been interrupted before it counted.
            self.count = 0 if self.empty else self.count - len(records)
        return records

    def rewind(self) -> None:
        """What was read and not released is read again."""
        at, end, again = self._tail, self._cursor, 0
        while at < end:
            if (record := self._record(at)) is None:
                self._cursor = at
                self._cut(kept=0)
                break
            at, _ = record
            again += 1
        with self._lock:
            self._cursor = self._tail
            self.count += again

    def release(self, position: int) -> None:
        """Gives back the room of all records that were read, up to this position."""
        if self._tail < position <= self._cursor:
            self._words[_TAIL] = self._tail = position

    def _record(self, at: int) -> Record | None:
        """The record that begins there; None if it is damaged."""
        start = _HEADER_BYTES + at % self._size
        length, checksum = _RECORD.unpack_from(self._map, start)
        end = at + (length + 15) // 8 * 8
        if end > self._head:
            return None
        start += 8
        over = start + length - _HEADER_BYTES - self._size
        record = self._map[start : start + length]
        if over > 0:
            record += self._map[_HEADER_BYTES : _HEADER_BYTES + over]
        return (end, record) if _checksum(at, record) == checksum else None

    def _cut(self, kept: int) -> None:
        """Leaves out what is at the cursor and behind it, as no one knows where the next record begins."""
        with self._lock:
            logger.error("%d bytes in shared memory are damaged and left out", self._head - self._cursor)
            self._words[_HEAD] = self._head = self._cursor
            lost, self.count = max(1, self.count - kept), kept
        self._on_lost(lost)

    def close(self) -> None:
        """Removes the file if nothing is left in it."""
        empty = self._head == self._tail
        self._words.release()
        self._map.close()
        if self._fd >= 0:
            if empty:  # while no other may have it
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _checksum(position: int, record: bytes) -> int:
    """With the position, so that what an earlier round left there is not taken for a record."""
    return zlib.crc32(record, position & 0xFFFFFFFF)

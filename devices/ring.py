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
from pathlib import Path

from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

RING_BYTES = 2 << 20
_SHARED_MEMORY = Path("/dev/shm")
_MAGIC = b"EKRING01"
# Words of 8 bytes, native order: magic, id, size of the data, then head and tail, which only ever grow.
_HEADER_BYTES, _HEAD, _TAIL = 64, 3, 4
_RECORD = struct.Struct("=II")  # bytes of the record, CRC-32 of its position and content


class Ring:
    """Records between ``tail`` and ``head``, both counted in bytes since the ring was made.

    It lies in ``/dev/shm``: a record is there after ``kill -9``, and is gone when the machine restarts. No put ever
    waits for a disk. A record is seen only when it is whole: ``head`` moves after it, in one store.

    Args:
        name: what the ring belongs to; None for one of this process alone.
        size_bytes: of the records and 8 bytes for each.

    Raises:
        EdgekitError: another process uses the ring of this name.
    """

    def __init__(self, name: str | None, size_bytes: int = RING_BYTES) -> None:
        self._size = size_bytes // 8 * 8
        self._lock = threading.Lock()
        self._fd = -1
        if name is not None:
            try:
                self._fd = self._open(name)
            except OSError as error:
                logger.warning(
                    "no shared memory (%s): the last moments before the process is killed may be lost; enlarge %s",
                    error, _SHARED_MEMORY,
                )  # fmt: skip
        length = _HEADER_BYTES + self._size
        self._map = mmap.mmap(self._fd, length)  # -1: anonymous memory
        self._words = memoryview(self._map).cast("Q")
        if not self._valid():
            if self._map[:8] != bytes(8):
                logger.error("what an earlier run left in shared memory is damaged and left out")
            self._map[:_HEADER_BYTES] = bytes(_HEADER_BYTES)
            self._words[1], self._words[2] = int.from_bytes(os.urandom(7), "big"), self._size
            self._map[:8] = _MAGIC
        self.id: int = self._words[1]
        self._cursor: int = self._words[_TAIL]
        self.count = 0  # records not read yet
        while self._skip():
            self.count += 1
        self._cursor = self._words[_TAIL]

    def _open(self, name: str) -> int:
        uid = os.getuid()
        path = _SHARED_MEMORY / f"edgekit-{uid}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.ring"
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
            length = _HEADER_BYTES + self._size
            if found.st_size != length:
                os.ftruncate(fd, 0)
            # all of it now: a page that cannot be had later would end the process (SIGBUS)
            os.posix_fallocate(fd, 0, length)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _valid(self) -> bool:
        words = self._words
        return (
            self._map[:8] == _MAGIC
            and words[2] == self._size
            and 0 <= words[_HEAD] - words[_TAIL] <= self._size
            and words[_HEAD] % 8 == words[_TAIL] % 8 == 0
        )

    @property
    def head(self) -> int:
        return int(self._words[_HEAD])

    @property
    def half_full(self) -> bool:
        return bool(self._words[_HEAD] - self._words[_TAIL] > self._size // 2)

    def put(self, record: bytes) -> bool:
        """Adds a record; False if there is no room for it. May be called from any thread."""
        room = (len(record) + _RECORD.size + 7) // 8 * 8
        with self._lock:
            head = self._words[_HEAD]
            if head + room - self._words[_TAIL] > self._size:
                return False
            self._write(head, _RECORD.pack(len(record), _checksum(head, record)) + record)
            self._words[_HEAD] = head + room
            self.count += 1
        return True

    def read(self, limit: int) -> list[tuple[int, bytes]]:
        """The next records, each with the position of its end; they stay until :meth:`release`."""
        records = []
        while len(records) < limit and (record := self._skip()) is not None:
            records.append((self._cursor, record))
        with self._lock:
            self.count -= len(records)
        return records

    def rewind(self) -> None:
        """What was read and not released is read again."""
        again, end = 0, self._cursor
        self._cursor = self._words[_TAIL]
        while self._cursor < end and self._skip() is not None:
            again += 1
        self._cursor = self._words[_TAIL]
        with self._lock:
            self.count += again

    def release(self, position: int) -> None:
        """Gives back the room of all records up to this position."""
        self._words[_TAIL] = position
        self._cursor = max(self._cursor, position)

    def _skip(self) -> bytes | None:
        """The record at the cursor, which moves behind it."""
        at, head = self._cursor, self._words[_HEAD]
        if at >= head:
            return None
        length, checksum = _RECORD.unpack(self._read(at, _RECORD.size))
        end = at + (length + _RECORD.size + 7) // 8 * 8
        record = self._read(at + _RECORD.size, length) if end <= head else b""
        if end > head or _checksum(at, record) != checksum:
            logger.error("%d bytes in shared memory are damaged and left out", head - at)
            self._words[_HEAD] = at
            return None
        self._cursor = end
        return record

    def _write(self, position: int, data: bytes) -> None:
        start = _HEADER_BYTES + position % self._size
        first = _HEADER_BYTES + self._size - start
        if len(data) <= first:
            self._map[start : start + len(data)] = data
        else:
            self._map[start:] = data[:first]
            self._map[_HEADER_BYTES : _HEADER_BYTES + len(data) - first] = data[first:]

    def _read(self, position: int, length: int) -> bytes:
        start = _HEADER_BYTES + position % self._size
        first = _HEADER_BYTES + self._size - start
        if length <= first:
            return self._map[start : start + length]
        return self._map[start:] + self._map[_HEADER_BYTES : _HEADER_BYTES + length - first]

    def close(self) -> None:
        self._words.release()
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _checksum(position: int, record: bytes) -> int:
    """With the position, so that what an earlier round left there is not taken for a record."""
    return zlib.crc32(record, position & 0xFFFFFFFF)

"""A microphone, as blocks of samples: the near side of the process that records, ``recorder.py``."""

from __future__ import annotations

import json
import logging
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgekit.devices.sources.recorder import HEADER
from edgekit.errors import SourceError
from edgekit.sandbox import describe_exit

logger = logging.getLogger(__name__)

# A sound system that takes longer to open a device, and to get the first sound from it, hangs.
OPEN_TIMEOUT_S = 10.0
# So does a device that gives nothing more for so long.
STALL_TIMEOUT_S = 2.0
# For a recorder that was killed.
END_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Block:
    """``samples`` (n, channels) that had arrived at ``arrived_s`` on the monotonic clock. ``gap``: some before them
    were lost."""

    samples: npt.NDArray[np.int16]
    arrived_s: float
    gap: bool


class Microphone:
    """A recording. :meth:`open` it before the first :meth:`read`, :meth:`close` it after the last; :meth:`end` makes a
    thread that waits in one of them give up.

    Args:
        name: the device, or a part of its name; empty for the default one.
        preferred: a part of the name of one that is taken before the default one, where it is there.

    Attributes:
        name, sample_rate_hz, channels: of the device, known after :meth:`open`.
    """

    def __init__(self, name: str = "", preferred: str = "") -> None:
        self.name, self.sample_rate_hz, self.channels = name, 0, 0
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._recorder = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("recorder.py"), name, preferred],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the one who reads
        )
        self._unread = bytearray()

    def open(self) -> None:
        """Waits until there is sound, maybe silence.

        Raises:
            SourceError: there is no such microphone, it cannot be opened or gives nothing, or PyAudio is missing.
        """
        deadline_s = time.monotonic() + OPEN_TIMEOUT_S
        while b"\n" not in self._unread:
            self._receive(deadline_s, "does not open")
        line, _, self._unread = self._unread.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise SourceError(found["error"], mend=found["mend"])
        self.name, self.sample_rate_hz, self.channels = found["name"], found["sample_rate_hz"], found["channels"]
        while not self._unread:
            self._receive(deadline_s, "gives no sound")
        logger.debug("recording from %s at %d Hz, %d channels", self.name, self.sample_rate_hz, self.channels)

    def read(self) -> Block:
        """The next block; waits for it.

        Raises:
            SourceError: the device gives nothing any more, or it was closed.
        """
        deadline_s = time.monotonic() + STALL_TIMEOUT_S
        header_bytes = struct.calcsize(HEADER)
        while len(self._unread) < header_bytes:
            self._receive(deadline_s, "gives no sound")
        length, arrived_s, gap = struct.unpack_from(HEADER, self._unread)
        while len(self._unread) < header_bytes + length:
            self._receive(deadline_s, "gives no sound")
        block = bytes(self._unread[header_bytes : header_bytes + length])
        del self._unread[: header_bytes + length]
        return Block(np.frombuffer(block, np.int16).reshape(-1, self.channels), arrived_s, gap)

    def _receive(self, deadline_s: float, otherwise: str) -> None:
        assert self._recorder.stdout
        pipe = self._recorder.stdout.fileno()
        if not select.select([pipe], [], [], max(deadline_s - time.monotonic(), 0))[0]:
            raise SourceError(f"microphone {self.name or 'default'} {otherwise}", mend="check the device")
        received = os.read(pipe, 1 << 16)
        if not received:
            self._log.seek(0)
            logger.debug("%s", self._log.read()[-20_000:])
            status = self._recorder.wait()
            how = f" ({describe_exit(status)})" if status else ""
            raise SourceError(f"microphone {self.name or 'default'} stopped{how}", mend="check that it is plugged in")
        self._unread += received

    def end(self) -> None:
        """Stops recording, from any thread."""
        self._recorder.kill()

    def close(self) -> None:
        """
        Raises:
            SourceError: it does not end, as in a driver where no signal reaches it.
        """
        self.end()
        try:
            self._recorder.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise SourceError(f"microphone {self.name or 'default'} does not end", mend="restart the device") from None
        finally:
            for file in (self._recorder.stdin, self._recorder.stdout, self._log):
                if file:
                    file.close()

    def __enter__(self) -> Microphone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""A runtime in a process of its own, started, killed and kept from the disk, and what it told."""

from __future__ import annotations

import logging
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

from edgekit.accounting import Intervals
from edgekit.devices.soak.runtime import Told

logger = logging.getLogger(__name__)

# What ended by itself is started again after so long, as a service is.
_RESTART_S = 1.0


class Runtime:
    """The process under test, and what it told. It leaves its log in ``folder``."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._spool, self._log = folder / "spool", folder / "runtime.log"
        self._command = [*command, "--spool", str(self._spool)]
        self._told: dict[str, Intervals] = {}
        self.calls_ms: list[float] = []
        self.shed: dict[int, dict[str, int]] = {}
        self.starts, self.ended = 0, list[str]()
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._ended_s = 0.0
        self._last_line = ""
        self._disk_full = False

    def start(self) -> None:
        """Does nothing if it runs."""
        if self._process:
            return
        self.starts += 1
        self._ended_s = 0.0
        # A session of its own: Ctrl-C is for us to handle.
        self._process = process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        if self._disk_full:
            self.fill_disk()
        assert process.stdout and process.stderr
        self._readers = [
            threading.Thread(target=self._read_told, args=(process.stdout, self.starts), daemon=True),
            threading.Thread(target=self._read_log, args=(process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def told(self) -> dict[str, Intervals]:
        """The predictions it told of, by boot."""
        told = {}
        for boot_id, numbers in self._told.copy().items():
            copy = told[boot_id] = Intervals()
            copy.edges = numbers.edges[:]  # in one step, as a thread goes on with it
        return told

    def _read_told(self, lines: IO[bytes], start: int) -> None:
        for line in lines:
            if not line.endswith(b"\n"):  # killed while it wrote
                break
            told = msgspec.json.decode(line, type=Told)
            boot_id, _, seq = told.id.rpartition("-")
            self._told.setdefault(boot_id, Intervals()).add(range(int(seq), int(seq) + 1))
            if told.call_ms is not None:
                self.calls_ms.append(told.call_ms)
            if told.shed:
                self.shed[start] = told.shed

    def _read_log(self, lines: IO[bytes]) -> None:
        with self._log.open("ab") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self._last_line = line.decode(errors="replace").strip()

    def tend(self) -> None:
        """Starts it again where it ended by itself."""
        if self._process and self._process.poll() is not None:
            self._wait()
            self.ended.append(self._last_line)
            logger.warning("the runtime ended by itself: %s", self._last_line)
            self._ended_s = time.monotonic()
        if self._ended_s and time.monotonic() - self._ended_s > _RESTART_S:
            self.start()

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._wait()

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._wait()

    def _wait(self) -> None:
        assert self._process
        self._process.wait()
        for reader in self._readers:
            reader.join()
        self._process = None

    def fill_disk(self, fraction: float = 0.0) -> None:
        """From now on no file grows beyond this part of the largest one of the spool, as if a quota was used up."""
        self._disk_full = True
        sizes = [path.stat().st_size for path in self._spool.glob("*")]
        self._limit_files(int(fraction * max(sizes, default=0)))

    def free_disk(self) -> None:
        self._disk_full = False
        self._limit_files(resource.RLIM_INFINITY)

    def _limit_files(self, size_bytes: int) -> None:
        if self._process and self._process.poll() is None:
            _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))

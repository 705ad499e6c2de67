"""A Mosquitto of our own, to be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

from edgekit.errors import BrokerError

START_TIMEOUT_S = 10.0
_SETTINGS = """\
listener {port} 127.0.0.1
allow_anonymous true
# its default keeps 1,000 messages for a subscriber that is away, and drops the others
max_queued_messages 0
"""
_LASTING = """\
persistence true
persistence_location {folder}/
# writes down at once what it acknowledges; its defaults forget half an hour when it is killed
autosave_on_changes true
autosave_interval 1
"""


class Mosquitto:
    """Runs while the ``with`` block lasts, on a free port of 127.0.0.1, and keeps what it acknowledged in ``folder``.

    Args:
        lasting: False: in memory alone, as fast as it is.

    Raises:
        BrokerError: Mosquitto is not installed, or does not start.
    """

    def __init__(self, folder: Path, *, lasting: bool = True) -> None:
        # Debian keeps it where only root looks
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if not program:
            raise BrokerError("mosquitto is not installed", mend="apt-get install mosquitto, or brew install mosquitto")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        settings = (_SETTINGS + (_LASTING if lasting else "")).format(port=self.port, folder=folder)
        if os.getuid() == 0:  # it would become another user, who may not write to the folder
            settings += "user root\n"
        (folder / "mosquitto.conf").write_text(settings)
        self._command = [program, "-c", str(folder / "mosquitto.conf")]
        self._log, self._database = folder / "mosquitto.log", folder / "mosquitto.db"
        self._process = self._start()

    def start(self) -> None:
        """Does nothing if it runs.

        Raises:
            BrokerError: it does not start; with the end of its log.
        """
        if self._process.poll() is not None:
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return process
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    process.kill()
                    last = self._log.read_text(errors="replace").splitlines()[-1:]
                    raise BrokerError("mosquitto does not start", got="".join(last), mend="see its log") from None
                time.sleep(0.02)

    def save(self) -> None:
        """Has it write down what it knows, and waits for that."""
        before = self._database.stat().st_mtime_ns if self._database.exists() else 0
        self._process.send_signal(signal.SIGUSR1)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._database.exists() or self._database.stat().st_mtime_ns == before:
            if time.monotonic() > deadline_s:
                raise BrokerError("mosquitto does not save its state", mend="see its log")
            time.sleep(0.02)

    def stop(self) -> None:
        """As a restart of the service does: it says goodbye and saves."""
        self._process.terminate()
        self._process.wait(START_TIMEOUT_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Mosquitto:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

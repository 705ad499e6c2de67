"""Mosquitto for the tests: real brokers on this machine, and their own clients."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Mosquitto:
    """A real broker on a free port of its own."""

    def __init__(self, folder: Path, port: int, *settings: str) -> None:
        self.port, self.url = port, f"mqtt://127.0.0.1:{port}"
        self._config = folder / f"mosquitto-{port}.conf"
        self._config.write_text("\n".join([f"listener {port} 127.0.0.1", *(settings or ["allow_anonymous true"]), ""]))
        self._subscribers: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self) -> None:
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "mosquitto does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def publish(self, topic: str, *payloads: object) -> None:
        """Publishes texts, and other things as JSON, with QoS 1 and over one connection."""
        lines = [payload if isinstance(payload, str) else json.dumps(payload) for payload in payloads]
        subprocess.run(
            ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic, "-l"],
            input="\n".join([*lines, ""]),
            text=True,
            check=True,
        )

    def subscribe(self, topic: str, *options: str) -> Callable[[], list[tuple[str, Any]]]:
        """Starts a ``mosquitto_sub`` and waits until its subscription stands.

        The result waits for it to end and returns what it received, JSON decoded.
        """
        output = self._config.with_name(f"received-{len(self._subscribers)}")
        command = ["stdbuf", "-oL", "mosquitto_sub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic]
        with output.open("w") as file:
            process = subprocess.Popen([*command, "-d", "-F", "received\t%t\t%p", *options], stdout=file)
        self._subscribers.append(process)
        deadline = time.monotonic() + 20
        while "\nSubscribed " not in output.read_text() and process.poll() is None:
            assert time.monotonic() < deadline, "mosquitto_sub does not subscribe"
            time.sleep(0.01)

        def received() -> list[tuple[str, Any]]:
            process.wait(60)
            lines = (line.split("\t", 2) for line in output.read_text().splitlines() if line.startswith("received\t"))
            return [(to, json.loads(payload) if payload[:1] == "{" else payload) for _, to, payload in lines]

        return received

    def close(self) -> None:
        for process in self._subscribers:
            process.kill()
            process.wait()
        self.resume()
        self.stop()

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgekit.devices.service.notify import notify, watchdog_s


@pytest.fixture(params=["path", "abstract"])
def received(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """systemd's end of the socket: gives the next datagram."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@edgekit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield lambda: listener.recv(4096).decode()


def test_notify_sends_one_datagram(received: Callable[[], str]) -> None:
    notify("READY=1", "STATUS=2 streams,\n30 fps")
    assert received() == "READY=1\nSTATUS=2 streams, 30 fps"


def test_reloading_comes_with_the_time(received: Callable[[], str]) -> None:
    notify("RELOADING=1")
    first, second = received().splitlines()
    assert first == "RELOADING=1" and int(second.removeprefix("MONOTONIC_USEC=")) > 0


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock:2:1", "@" + "x" * 200, "/" + "x" * 4096])
def test_notify_without_a_listener_does_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_notify_does_not_wait_for_a_listener_that_does_not_read(received: Callable[[], str]) -> None:
    """The test would not end."""
    for _ in range(10_000):
        notify("WATCHDOG=1")
    assert received() == "WATCHDOG=1"


@pytest.mark.parametrize(
    ("limit_us", "pid", "expected"),
    [
        ("60000000", str(os.getpid()), 30.0),
        ("60000000", "", 30.0),
        ("60000000", "1", None),
        ("", "", None),
        ("0", "", None),
        ("soon", "", None),
    ],
)
def test_watchdog_is_ours_or_none(
    limit_us: str, pid: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", limit_us)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert watchdog_s() == expected

"""What a service tells systemd of itself: https://www.freedesktop.org/software/systemd/man/sd_notify.html."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(*assignments: str) -> None:
    """Sends ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1``, ``RELOADING=1`` or ``STATUS=…`` in one datagram.

    Does nothing where no one listens (``NOTIFY_SOCKET``), and never fails or waits: a service works without it.
    ``RELOADING=1`` is sent with the time, which ``Type=notify-reload`` wants.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    lines = [" ".join(assignment.split()) for assignment in assignments]
    if "RELOADING=1" in lines:
        lines.append(f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto("\n".join(lines).encode(errors="replace"), os.fsencode(address))


def watchdog_s() -> float | None:
    """How often ``WATCHDOG=1`` is to be sent: half of the time after which systemd ends a service that keeps silent,
    in seconds. None where it does not watch this process."""
    limit_us, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit_us.isdecimal() or pid not in ("", str(os.getpid())):
        return None
    return int(limit_us) / 2e6 or None

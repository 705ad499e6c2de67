"""A configuration as a systemd service: installed, looked at, removed."""

from __future__ import annotations

import json
import logging
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle import replacing
from edgekit.devices.service.unit import check, checked_name, unit_text
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

# What tells a unit of ours from another's.
_MARK = "# Written by `edgekit service install`"
_UNITS = "etc/systemd/system"
# Where distributions have units of their own, which one in /etc would replace.
_OTHERS = ("lib/systemd/system", "usr/lib/systemd/system", "run/systemd/system")
# Longer than a start and an end may take (TimeoutStartSec=, TimeoutStopSec=).
_PATIENCE_S = 240.0
_LOG_LINES = 10


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a service fares, as systemd tells it. ``log`` are its newest lines; what systemd does not tell is None.

    ``since_s``: for how long it has been as ``active`` says. ``watchdog_s``: it is ended when silent for so long.
    """

    schema: Literal["edgekit.service/1"] = "edgekit.service/1"
    name: str
    active: str
    detail: str
    enabled: str
    result: str
    status: str
    since_s: float | None
    restarts: int | None
    watchdog_s: float | None
    pid: int | None
    memory_bytes: int | None
    log: tuple[str, ...]


def install(
    config_path: str | os.PathLike[str], *, name: str = "edgekit", user: str = "edgekit", root: Path = Path("/")
) -> Path:
    """Makes the user if there is none, writes the unit, has it started now and whenever the machine starts; one that
    is there already is replaced and started anew.

    Returns:
        The unit's path.

    Raises:
        EdgekitError: the configuration cannot be used, by this user or at all; we may not do this; systemd is not
            here, or could not start it.
    """
    _may_change(root)
    text = unit_text(config_path, name=name, user=user, root=root)
    path = _unit_path(name, root)
    for other in _OTHERS:
        if (found := root / other / path.name).exists():
            raise EdgekitError(f"{found} is a service of this system", mend="give another --name")
    if not _is_ours(path):
        raise EdgekitError(f"{path} was not written by EdgeKit", mend="give another --name, or remove it")
    _make_user(user)
    _check_as(user, Path(config_path).absolute())
    with replacing(path) as temporary:
        temporary.write_text(text)
    path.chmod(0o644)
    _systemctl("daemon-reload")
    _systemctl("enable", path.name)
    try:
        _systemctl("restart", path.name)
    except EdgekitError as error:
        log = _log(path.name) or [error.what]
        raise EdgekitError(
            f"service {name} does not start ({log[-1]})",
            mend=f"see `journalctl -u {name}`; systemd tries again until `edgekit service remove`",
        ) from error
    return path


def status(name: str = "edgekit", *, root: Path = Path("/")) -> ServiceStatus:
    """How the service fares.

    Raises:
        EdgekitError: there is no such service, or no systemd.
    """
    path = _unit_path(name, root)
    _has_systemd(root)
    if not path.exists():
        raise EdgekitError(f"there is no service {name}", mend="edgekit service install CONFIG.toml")
    wanted = (
        "ActiveState SubState UnitFileState Result StatusText NRestarts WatchdogUSec MainPID MemoryCurrent "
        "StateChangeTimestampMonotonic"
    ).split()
    shown = dict(
        line.partition("=")[::2]
        for line in _systemctl("show", path.name, f"--property={','.join(wanted)}").splitlines()
    )
    since_us = _number(shown.get("StateChangeTimestampMonotonic"))
    return ServiceStatus(
        name=name,
        active=shown.get("ActiveState", "unknown"),
        detail=shown.get("SubState", ""),
        enabled=shown.get("UnitFileState", ""),
        result=shown.get("Result", ""),
        status=shown.get("StatusText", ""),
        since_s=round(max(0.0, time.clock_gettime(time.CLOCK_MONOTONIC) - since_us / 1e6), 1) if since_us else None,
        restarts=_number(shown.get("NRestarts")),
        watchdog_s=_seconds(shown.get("WatchdogUSec", "")),
        pid=_number(shown.get("MainPID")) or None,
        memory_bytes=_number(shown.get("MemoryCurrent")),
        log=tuple(_log(path.name)),
    )


def remove(name: str = "edgekit", *, root: Path = Path("/")) -> Path:
    """Ends the service and deletes its unit. Its user and its folder, with what was not sent yet, stay.

    Returns:
        The path of the unit that was deleted.

    Raises:
        EdgekitError: there is no such service of ours, or we may not do this.
    """
    path = _unit_path(name, root)
    _may_change(root)
    if not path.exists():
        raise EdgekitError(f"there is no service {name}", mend="give its --name")
    if not _is_ours(path):
        raise EdgekitError(f"{path} was not written by EdgeKit", mend="give another --name")
    _systemctl("disable", "--now", path.name)
    path.unlink()
    _systemctl("daemon-reload")
    return path


def _unit_path(name: str, root: Path) -> Path:
    return root / _UNITS / f"{checked_name('name', name)}.service"


def _is_ours(path: Path) -> bool:
    return not path.exists() or path.read_text(errors="replace").startswith(_MARK)


def _has_systemd(root: Path) -> None:
    # https://www.freedesktop.org/software/systemd/man/sd_booted.html
    if not (root / "run/systemd/system").is_dir() or not shutil.which("systemctl"):
        raise EdgekitError(
            "systemd does not run here, as in a container", mend="have what does start `edgekit run --config`"
        )


def _may_change(root: Path) -> None:
    _has_systemd(root)
    if os.geteuid():
        raise EdgekitError("a service is for root to change", mend=f"sudo {sys.executable} -m edgekit service …")


def _make_user(user: str) -> None:
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", f"/var/lib/{user}"]
        _run([*command, "--shell", "/usr/sbin/nologin", user], f"make the user {user}")
        return
    if found.pw_uid >= 1000:
        # systemd-logind's RemoveIPC=, which leaves system users alone
        logger.warning(
            "%s is not a system user: when its last login ends, systemd deletes its shared memory, with what the "
            "service has not written yet; leave --user out, or set RemoveIPC=no in /etc/systemd/logind.conf",
            user,
        )


def _check_as(user: str, path: Path) -> None:
    """Reads the configuration and all it names with the rights of the user, who may have neither our home folder nor
    this Python."""
    try:
        account = pwd.getpwnam(user)
    except KeyError as error:
        raise EdgekitError(f"there is no user {user}", mend="make one, or give another --user") from error
    rights: dict[str, Any] = {}
    if account.pw_uid != os.getuid():
        groups = os.getgrouplist(user, account.pw_gid)
        rights = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": groups}
    code = "import json, sys; from edgekit.devices.service.service import problem;"
    code += " print(json.dumps(problem(sys.argv[1])))"
    mend = f"put it where {user} may read it, as in /opt, or give another --user"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, path], cwd="/", env={"PATH": os.defpath}, capture_output=True, text=True,
            timeout=120, **rights,
        )  # fmt: skip
    except OSError as error:
        raise EdgekitError(f"the user {user} cannot run {sys.executable} ({error.strerror})", mend=mend) from error
    except subprocess.TimeoutExpired as error:
        raise EdgekitError(f"the user {user} cannot read {path} within 120 s", mend="check the disk") from error
    if result.returncode:
        why = (result.stderr.splitlines() or ["it says nothing"])[-1]
        raise EdgekitError(f"the user {user} cannot run EdgeKit in {sys.prefix} ({why})", mend=mend)
    if problem := json.loads(result.stdout.splitlines()[-1]):
        raise EdgekitError(f"for the user {user}: {problem}", mend=mend)


def problem(path: str) -> str:
    """What keeps this process from using the configuration; empty if nothing does."""
    try:
        spool = check(Path(path)).spool
    except EdgekitError as error:
        return str(error)
    if spool and spool != "none" and not os.access(spool, os.W_OK):
        return f"the spool {spool} is no folder that may be written"
    return ""


def _systemctl(*arguments: str) -> str:
    return _run(["systemctl", "--no-pager", *arguments], f"systemctl {arguments[0]}")


def _run(command: list[str], what: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdgekitError(f"cannot {what} ({error})", mend="try it by hand") from error
    if result.returncode:
        why = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[0]
        raise EdgekitError(f"cannot {what} ({why})", mend=f"try `{' '.join(command)}`")
    return result.stdout


def _log(unit_name: str) -> list[str]:
    """The newest lines of the service's log; none where we may not read it."""
    try:
        command = ["journalctl", "--no-pager", "--quiet", "-u", unit_name, "-n", str(_LOG_LINES), "-o", "short-iso"]
        return _run(command, "read the log").splitlines()
    except EdgekitError:
        return []


def _number(text: str | None) -> int | None:
    # "[not set]", and the largest 64-bit number, stand for none
    return int(text) if text and text.isdecimal() and int(text) < 2**63 else None


def _seconds(text: str) -> float | None:
    """Of a span as systemd writes it, as ``1min 30s``."""
    units = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
    parts = re.findall(r"([\d.]+)(h|min|ms|us|s)\b", text)
    return sum(float(number) * units[unit] for number, unit in parts) or None

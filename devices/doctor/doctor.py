"""What a device has, what is missing, and how to mend it: ``edgekit doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

import edgekit
from edgekit.broker import BrokerAddress, parse_broker
from edgekit.devices.config import Config, StreamConfig, read_config
from edgekit.devices.doctor import machine, probe
from edgekit.devices.doctor.finding import Finding, failed, from_error, missing, ok
from edgekit.devices.profiles import Profile, detect, load_profile
from edgekit.devices.publish.spool import MAX_BYTES, spool_folder
from edgekit.devices.sources.frames import is_file, public_name
from edgekit.devices.stream import read_bundle, try_source
from edgekit.errors import BrokerError, EdgekitError
from edgekit.mqtt import Connection, unique_client_id

# A check that takes longer hangs.
CHECK_S = 60.0


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`doctor` found."""

    schema: Literal["edgekit.doctor/1"] = "edgekit.doctor/1"
    profile: str
    findings: tuple[Finding, ...]

    @property
    def failing(self) -> list[str]:
        """Names of what is needed and missing or failed."""
        return [finding.check for finding in self.findings if finding.needed and finding.status != "ok"]


class Check(NamedTuple):
    name: str
    run: Callable[[], Finding | Iterator[Finding]]
    needed: bool = False
    limit_s: float = CHECK_S


def doctor(
    config: str | os.PathLike[str] | None = None,
    *,
    broker: str | BrokerAddress | None = None,
    root: Path = Path("/"),
) -> Diagnosis:
    """Looks at this device: runtimes and delegates, each in a process of its own, cameras, microphone, broker, disk,
    memory, clock.

    Nothing is changed, no frame is taken, and no check may keep the others waiting.

    Args:
        config: a configuration, as ``edgekit run --config`` takes it: what it names is needed.
        broker: a broker that is needed, instead of that of the configuration.
        root: of the system's files about its hardware.
    """
    findings = [_python()]
    known: Config | None = None
    profile = detect(root)
    try:
        if config is not None:
            known = read_config(config)
            names = ", ".join(stream.name for stream in known.stream)
            findings.append(ok("configuration", f"{config}, streams: {names}", needed=True))
        if known and known.profile:
            profile = load_profile(known.profile)
    except EdgekitError as error:
        findings.append(from_error("configuration", error, needed=True))
    findings.append(ok("profile", f"{profile.name}: {profile.title}"))
    streams = known.stream if known else ()
    sources = tuple(stream.source for stream in streams)
    microphones = tuple(source[4:] for source in dict.fromkeys(sources) if source.partition(":")[0] == "mic")
    needed_broker = broker if broker is not None else known.broker if known else None
    checks = [
        Check("runtime", partial(probe.models, profile, streams), True, probe.limit_s(len(streams))),
        Check("operators", probe.operators),
        Check("camera", partial(machine.cameras, profile, root, needed=sources)),
        *(
            Check("mic", partial(machine.microphone, profile, name, needed=bool(microphones)), bool(microphones))
            for name in microphones or ("",)
        ),
        *(Check(f"source of {stream.name}", partial(_source, stream), needed=True) for stream in streams),
        Check("broker", partial(find_broker, needed_broker), needed=needed_broker is not None),
        Check("spool", partial(_spool, known), needed=known is not None),
        Check("system", partial(_system, profile, root, len(streams) or 1)),
    ]
    return Diagnosis(profile=profile.name, findings=(*findings, *carry_out(checks)))


def carry_out(checks: list[Check]) -> Iterator[Finding]:
    """All at once; findings in the order of the checks."""
    found: list[list[Finding]] = [[] for _ in checks]

    def run(check: Check, into: list[Finding]) -> None:
        try:
            made = check.run()
            for finding in [made] if isinstance(made, Finding) else made:
                into.append(finding)
        except Exception as error:  # a check that fails is a finding too
            into.append(failed(check.name, f"{type(error).__name__}: {error}", "please report it", needed=check.needed))

    threads = [
        threading.Thread(target=run, args=(check, into), name=f"check {check.name}", daemon=True)
        for check, into in zip(checks, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    started_s = time.monotonic()
    for check, into, thread in zip(checks, found, threads, strict=True):
        thread.join(max(0.0, started_s + check.limit_s - time.monotonic()))
        yield from list(into)
        if thread.is_alive():
            yield failed(
                check.name, f"gave no answer within {check.limit_s:g} s", "restart the device", needed=check.needed
            )


def _python() -> Finding:
    detail = f"{platform.python_version()}, EdgeKit {edgekit.__version__}, {platform.machine()}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return ok("python", detail, needed=True)
    return failed("python", detail, "use Python 3.10 to 3.13")


def _source(stream: StreamConfig) -> Iterator[Finding]:
    """Of what is neither a camera nor a microphone, which are listed by themselves."""
    check, source, name = f"source of {stream.name}", stream.source, public_name(stream.source)
    if "://" in source:
        yield _answers(check, source, name)
    elif not is_file(source):
        return
    elif not Path(source).exists():
        yield missing(check, f"there is no {name}", "check the path", needed=True)
    elif not os.access(source, os.R_OK):
        yield failed(check, f"{name} may not be read", "chmod or move it", needed=True)
    else:
        yield _opens(check, stream, name)


def _opens(check: str, stream: StreamConfig, name: str) -> Finding:
    """Whether a file is what the bundle takes."""
    try:
        bundle = read_bundle(stream)
    except EdgekitError:  # which is told of the bundle
        return ok(check, f"{name} can be read", needed=True)
    try:
        try_source(stream, bundle)
    except EdgekitError as error:
        return from_error(check, error, needed=True)
    return ok(check, f"{name} opens", needed=True)


def _answers(check: str, url: str, name: str) -> Finding:
    """Whether something listens where a network camera should be."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"rtsp": 554, "rtsps": 322, "https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return failed(check, f"{name} does not answer ({why})", "check its address and the network", needed=True)
    return ok(check, f"{name} answers", needed=True)


def find_broker(broker: str | BrokerAddress | None) -> Finding:
    """Connects as a client of its own, and disconnects."""
    needed = broker is not None
    if isinstance(broker, str) and (broker == "none" or broker.startswith("embedded")):
        return ok("broker", broker, needed=needed)
    try:
        address = parse_broker(broker or "mqtt://localhost")
        connection = Connection(address, unique_client_id("doctor"))
        connection.start()
        protocol = connection.protocol.name.removeprefix("MQTT")
        connection.close()
    except BrokerError as error:
        finding = from_error("broker", error, needed=needed)
        if needed:
            return finding
        return missing("broker", "none on this machine", "give its URL with --broker")
    return ok("broker", f"{address} lets us in, with MQTT {'5' if protocol == 'v5' else '3.1.1'}", needed=needed)


def _spool(config: Config | None) -> Finding:
    needed = config is not None
    if config and config.spool == "none":
        return ok("spool", "none: in memory", needed=needed)
    folder = spool_folder(config.spool if config else None).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        mend = "give a folder that can be written with --spool"
        return failed("spool", f"{there} cannot be written", mend, needed=needed)
    free, most = shutil.disk_usage(there).free, config.spool_bytes if config else MAX_BYTES
    if free < most:
        mend = "free some, or give a smaller --spool-size"
        return failed("spool", f"{folder}: {free / 1e6:,.0f} MB free, of {most / 1e6:,.0f} it may take", mend)
    return ok("spool", f"{folder}, {free / 1e6:,.0f} MB free", needed=needed)


def _system(profile: Profile, root: Path, streams: int) -> Iterator[Finding]:
    yield machine.shared_memory(streams)
    yield machine.memory(root)
    yield machine.clock()
    yield from machine.heat(profile, root)

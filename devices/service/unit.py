"""The systemd unit that runs a configuration. What is in it, and why: ``edgekit.service``, its template."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import edgekit
from edgekit.devices.config import Config, read_config
from edgekit.devices.publish.home_assistant import label_groups
from edgekit.devices.sources.frames import is_file
from edgekit.devices.stream import read_bundle, try_source
from edgekit.devices.toml_file import TomlFile
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("edgekit.service")
# Who is in them may open cameras, microphones, GPUs and Edge TPUs; each system has some of them.
_GROUPS = ("video", "audio", "render", "plugdev", "apex")
# On a Jetson: kinds of devices that systemd does not know by name.
_NODES = ("dev/nvmap",)
_HOMES = ("/home", "/root", "/run/user")


def checked_name(what: str, name: str) -> str:
    """``name``, of the service or of its user (``what``), if it can be one."""
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", name):
        raise EdgekitError(
            f"{what} {name!r}", expected="small letters, digits, - and _, 32 at most", mend=f"give another --{what}"
        )
    return name


def unit_text(
    config_path: str | os.PathLike[str], *, name: str = "edgekit", user: str = "edgekit", root: Path = Path("/")
) -> str:
    """The unit that runs a configuration on this machine.

    Args:
        config_path: the configuration; it and all it names is read.
        name: of the service and of the folder below ``/var/lib`` that has its spool.
        user: whose rights it has.
        root: of the system whose groups and devices count.

    Raises:
        EdgekitError: the configuration, or what it names, cannot be used.
    """
    checked_name("name", name)
    checked_name("user", user)
    path = Path(config_path).absolute()
    config = check(path)
    spool = Path(config.spool).absolute() if config.spool and config.spool != "none" else None
    used = [*files_of(path, config), *filter(None, [spool])]
    at_home = next(filter(_is_home, [place for one in used for place in (one, one.resolve())]), None)
    if at_home:
        logger.info(
            "%s is in a home folder: the service may read what everyone may read in all of them; "
            "elsewhere, as in /opt, they are hidden from it",
            at_home,
        )
    lines = ["PrivateTmp=yes"]
    if (root / "usr/sbin/nvargus-daemon").exists():
        # https://github.com/roflcoopter/viseron/issues/583
        lines = ["# The camera of a Jetson is reached by a socket in /tmp.", "PrivateTmp=no", "ReadWritePaths=/tmp"]
    if spool:
        lines.append(f"ReadWritePaths={_quoted(spool)}")
    return TEMPLATE.read_text().format(
        name=name,
        title=path.name.replace("%", "%%"),
        python=_quoted(sys.executable),
        config=_quoted(path).replace("$", "$$"),  # only behind the program is $ for a variable
        user=user,
        groups=" ".join(_groups(root)),
        protect_home="read-only" if at_home else "yes",
        writable="".join(f"{line}\n" for line in lines),
        devices="".join(f"DeviceAllow=/{node} rw\n" for node in _NODES if (root / node).exists()),
    )


def check(path: Path) -> Config:
    """The configuration, if all it names can be read by this process."""
    config = read_config(path)
    bundles = [read_bundle(stream) for stream in config.stream]
    label_groups(config.label_groups, [label for bundle in bundles for label in bundle.labels])
    for used in files_of(path, config):
        if not os.access(used, os.R_OK):
            there = "" if os.access(used, os.F_OK) else "is not there, or "
            raise EdgekitError(f"{used} {there}may not be read", mend="check the path, chmod or move it")
    for stream, bundle in zip(config.stream, bundles, strict=True):
        if is_file(stream.source):
            try_source(stream, bundle)
    if not isinstance(config.broker, str):
        config.broker.tls_context()
    return config


def files_of(path: Path, config: Config) -> list[Path]:
    """What a configuration needs to read, the Python that runs it first."""
    paths: list[str | None] = [sys.executable, sys.prefix, sys.base_prefix, str(Path(edgekit.__file__).parent)]
    paths += [str(Path(__file__).parents[1]), str(path)]
    for stream in config.stream:
        paths += [stream.bundle, stream.labels, *stream.ops]
        if is_file(stream.source):
            paths.append(stream.source)
    if not isinstance(config.broker, str):
        paths += [config.broker.cafile, config.broker.certfile, config.broker.keyfile]
    if password_file := TomlFile(path, "configuration").data.get("password_file"):
        paths.append(str(path.parent / password_file))
    return [Path(one).absolute() for one in paths if one]


def _is_home(path: Path) -> bool:
    return any(map(path.is_relative_to, _HOMES))


def _quoted(path: str | os.PathLike[str]) -> str:
    """As one word of a unit: https://www.freedesktop.org/software/systemd/man/systemd.service.html, Command Lines."""
    text = os.fspath(path).replace("%", "%%")
    if not text.isprintable():
        raise EdgekitError(f"path {text!r}", expected="one that a systemd unit can hold", mend="rename it")
    if re.fullmatch(r"[\w./%:@+-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _groups(root: Path) -> list[str]:
    lines = (root / "etc/group").read_text().splitlines()
    known = {line.partition(":")[0] for line in lines}
    return [group for group in _GROUPS if group in known]

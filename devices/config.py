"""What a device runs: its streams, and how their predictions get away. As a TOML file or from the command line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from edgekit.broker import BrokerAddress, parse_broker
from edgekit.devices.profiles import load_profile
from edgekit.devices.sources.frames import is_file
from edgekit.devices.toml_file import MEND, Key, TomlFile, shown
from edgekit.errors import BrokerError, EdgekitError
from edgekit.messages import PREFIX, check_name, check_prefix

logger = logging.getLogger(__name__)

DELEGATES = ("auto", "cpu", "coral", "gpu")
# The beginning of the path of a delegate library, which options may follow.
_LIBRARY = r"[^,]*(/|\.so(?![^.,]))"


class ConfigError(EdgekitError):
    """A configuration with a value that cannot be. ``key`` leads to it, ``other`` to another one that it is at odds
    with."""

    def __init__(self, key: Key, what: str, *, other: Key = (), expected: str, got: str = "", mend: str = "") -> None:
        self.key, self.other = key, other
        super().__init__(what, expected=expected, got=got, mend=mend)


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source through one bundle; fields as the arguments of :func:`edgekit.run`.

    ``threads``: None takes the profile's, shared among the streams.
    """

    bundle: str
    source: str
    name: str = "main"
    labels: str | None = None
    delegate: str = "auto"
    strict: bool = False
    threads: int | None = None
    threshold: float | dict[str, float] = 0.0
    top_k: int = 3
    max_fps: float | None = None
    hop_s: float | None = None
    loop: bool = False
    drop: str = "oldest"
    smoothing: int = 1
    hysteresis: float = 0.1
    ops: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the whole device; ``stream`` are its streams. None: the default that :func:`edgekit.run` documents.

    Raises:
        ConfigError: there is no stream, two have one name, or a value is out of its range.
    """

    stream: tuple[StreamConfig, ...]
    device_id: str | None = None
    broker: str | BrokerAddress = "mqtt://localhost"
    prefix: str = PREFIX
    profile: str | None = None
    spool: str | None = None
    spool_size_mb: int = 64
    spool_days: float = 7.0
    replay_rate: float = 500.0
    commands: bool = True
    home_assistant: bool = True
    label_groups: dict[str, tuple[str, ...]] = {}
    hang_s: float = 30.0

    def __post_init__(self) -> None:
        _check(self, (), "")
        if not self.stream:
            raise ConfigError(("stream",), "stream", expected=_RULES["stream"].expected, got="none", mend="add one")
        if self.profile is not None:
            try:
                load_profile(self.profile)
            except EdgekitError as error:
                raise ConfigError(
                    ("profile",), error.what, expected=error.expected, got=error.got, mend=error.mend
                ) from error
        places: dict[str, int] = {}
        for number, stream in enumerate(self.stream):
            check_stream(stream, ("stream", number))
            if (first := places.setdefault(stream.name, number)) != number:
                raise ConfigError(
                    ("stream", number, "name"),
                    f"stream {stream.name}",
                    other=("stream", first, "name"),
                    expected="a name of its own",
                    got="that of another stream",
                    mend="give each stream another name, in name =",
                )

    @property
    def spool_bytes(self) -> int:
        return self.spool_size_mb << 20

    @property
    def spool_age_s(self) -> float:
        return self.spool_days * 86400


class _Written(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration as its file has it: what tells of the broker becomes an address, and paths begin at the file."""

    broker: str = "mqtt://localhost"
    password_file: str | None = None
    cafile: str | None = None
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        """Checked as what it becomes."""


class _Rule(NamedTuple):
    """What a value is to be, in words, and whether it is. Of a table: each of its values."""

    expected: str
    holds: Callable[[Any], object] = lambda _: True


def _passes(check: Callable[..., object], *arguments: object) -> bool:
    try:
        check(*arguments)
    except EdgekitError:
        return False
    return True


def _within(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: least <= value <= most


_MOST = 2**31 - 1
_NAME = _Rule("a name of a-z, 0-9, _ and -", lambda value: _passes(check_name, value, "name"))
_PATH = _Rule("a path", lambda value: value and "\0" not in value)
_SWITCH = _Rule("true or false")
_RULES = {
    "stream": _Rule("[[stream]] with a bundle and a source"),
    "bundle": _PATH._replace(expected="the path of a .tflite"),
    "source": _PATH._replace(expected="a camera, a microphone, a URL or the path of a file"),
    "name": _NAME,
    "labels": _PATH,
    "delegate": _Rule(
        f"{', '.join(DELEGATES)} or the path of a library (.so)",
        lambda value: value in DELEGATES or re.match(_LIBRARY, value),
    ),
    "strict": _SWITCH,
    "threads": _Rule("a whole number from 1 to 256", _within(1, 256)),
    "threshold": _Rule("a score from 0 to 1, or a table of them by label", _within(0, 1)),
    "top_k": _Rule("a whole number, 1 or more", _within(1, _MOST)),
    "max_fps": _Rule("frames a second, 0.001 or more", _within(0.001, _MOST)),
    "hop_s": _Rule("seconds, 0.001 or more", _within(0.001, _MOST)),
    "loop": _SWITCH,
    "drop": _Rule("oldest, newest or none", lambda value: value in ("oldest", "newest", "none")),
    "smoothing": _Rule("a whole number from 1 to 10000", _within(1, 10_000)),
    "hysteresis": _Rule("a score from 0 to 1", _within(0, 1)),
    "ops": _Rule("a list of paths", lambda value: all(map(_PATH.holds, value))),
    "device_id": _NAME,
    "broker": _Rule("mqtt://host[:port], mqtts://host[:port], embedded or none"),
    **dict.fromkeys(("password_file", "cafile", "cert", "key"), _PATH),
    "prefix": _Rule("names of a-z, 0-9, _ and -, with / between them", lambda value: _passes(check_prefix, value)),
    "profile": _PATH._replace(expected="the name of a profile"),
    "spool": _PATH._replace(expected="the path of a folder, or none"),
    "spool_size_mb": _Rule("megabytes, a whole number from 1 to 1000000", _within(1, 1_000_000)),
    "spool_days": _Rule("days, 0.001 or more", _within(0.001, _MOST)),
    "replay_rate": _Rule("messages a second, 0.001 or more", _within(0.001, _MOST)),
    "commands": _SWITCH,
    "home_assistant": _SWITCH,
    "label_groups": _Rule("a table of lists of labels, by names of a-z, 0-9, _ and -", len),
    "hang_s": _Rule("seconds, 0.1 or more", _within(0.1, _MOST)),
}


def check_stream(stream: StreamConfig, at: Key = ()) -> None:
    """
    Raises:
        ConfigError: a value is out of its range.
    """
    _check(stream, at, f"stream {stream.name}: ")


def _check(config: StreamConfig | Config, at: Key, where: str) -> None:
    """Holds values against their types, which those from Python need not have, and their rules."""
    for field in msgspec.structs.fields(config):
        name, given = field.name, getattr(config, field.name)
        if isinstance(given, BrokerAddress):
            continue
        rule, table = _RULES[name], given if isinstance(given, Mapping) else {"": given}
        try:
            msgspec.convert(given, field.type)
        except msgspec.ValidationError as error:
            raise ConfigError((*at, name), where + name, expected=rule.expected, got=shown(given), mend=MEND) from error
        for key, value in table.items():
            is_right = value is None or rule.holds(value)
            if not is_right or (name == "label_groups" and not _NAME.holds(key)):
                raise ConfigError(
                    (*at, name, *filter(None, [key])),
                    f"{where}{name}" + (f" {key!r}" if key else ""),
                    expected=rule.expected,
                    got=shown(key if is_right else value),
                    mend=MEND,
                )


def read_config(path: str | os.PathLike[str]) -> Config:
    """Reads a configuration. Relative paths in it begin at its folder.

    Raises:
        EdgekitError: it cannot be read or used; the message names the file, the line and the key.
    """
    file = TomlFile(path, "configuration")
    written = file.convert(_Written, {"[[stream]]": StreamConfig}, {key: rule.expected for key, rule in _RULES.items()})
    try:
        _check(written, (), "")
        return Config(
            **{name: getattr(written, name) for name in Config.__struct_fields__}
            | {
                "stream": tuple(_begin_at(file.path.parent, stream) for stream in written.stream),
                "broker": _address(written, file),
                "profile": _join(file.path.parent, written.profile, unless=r".*(?<!\.toml)$"),
                "spool": _join(file.path.parent, written.spool, unless="none$"),
            }
        )
    except ConfigError as error:
        got = f"that of line {file.line(error.other)}" if error.other else error.got
        raise file.error(error.key, error.what, expected=error.expected, got=got, mend=error.mend) from error


def _join(folder: Path, path: Any, unless: str = "$") -> Any:
    """The path of a file as seen from here. What begins with ``unless``, a pattern, is none."""
    return path if path is None or re.match(unless, path) else str(folder / path)


def _begin_at(folder: Path, stream: StreamConfig) -> StreamConfig:
    return msgspec.structs.replace(
        stream,
        bundle=_join(folder, stream.bundle),
        source=_join(folder, stream.source) if is_file(stream.source) else stream.source,
        labels=_join(folder, stream.labels),
        delegate=_join(folder, stream.delegate, unless=rf"(?!{_LIBRARY})"),
        ops=tuple(_join(folder, path) for path in stream.ops),
    )


def _address(written: _Written, file: TomlFile) -> str | BrokerAddress:
    url, folder = written.broker, file.path.parent
    given = [name for name in ("password_file", "cafile", "cert", "key") if getattr(written, name)]
    if url in ("none", "embedded") or url.startswith("embedded:"):
        if given:
            raise ConfigError((given[0],), given[0], expected="a broker with mqtt:// or mqtts://", got=url, mend=MEND)
        return url
    try:
        address = parse_broker(
            url,
            cafile=_join(folder, written.cafile),
            certfile=_join(folder, written.cert),
            keyfile=_join(folder, written.key),
            password_file=_join(folder, written.password_file),
        )
    except BrokerError as error:
        at = "password_file" if error.what.startswith("password") else "broker"
        raise ConfigError((at,), error.what, expected=error.expected, got=error.got, mend=error.mend) from error
    if urlsplit(url).password and file.path.stat().st_mode & 0o004:
        logger.warning(
            "everyone on this machine can read the broker's password in %s; chmod 640 it, or give a password_file",
            file.path,
        )
    return address

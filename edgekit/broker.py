"""Where a broker is, and who we are to it: its URL, certificates and password."""

from __future__ import annotations

import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from paho.mqtt.enums import MQTTProtocolVersion

from edgekit.errors import BrokerError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

logger = logging.getLogger(__name__)

_USAGE = "mqtt://[user:password@]host[:port], mqtts://…, embedded or none"
_ENCODE = (
    "percent-encode # / ? @ : [ ] % in its user and password (# as %23, / as %2F, ? as %3F, @ as %40), "
    "or give the password in a password file"
)
# What others call ours. Any other scheme may be a user of a URL that begins with it: only these are repeated.
_SCHEMES = dict.fromkeys(("tcp", "http", "ws"), "mqtt") | dict.fromkeys(("ssl", "tls", "https", "wss"), "mqtts")
# A shell's variable that is the whole of a user, password, host or port, or one in braces anywhere.
_VARIABLE = re.compile(r"\$\{[^{}]*\}|(?<=[/:@])\$[A-Z_][A-Z0-9_]*(?=[/:@]|$)")


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker is, and what to speak with it, tried in that order. Its text form leaves out the credentials.

    ``cafile``: whom to trust instead of the system's authorities; ``certfile`` and ``keyfile``: who we are (PEM files).
    """

    host: str
    port: int
    tls: bool = False
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    protocols: tuple[MQTTProtocolVersion, ...] = (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311)

    def __post_init__(self) -> None:
        check_text("host of the broker", self.host)
        check_text("broker's user", self.username)
        check_text("broker's password", self.password, nul=True)

    def __str__(self) -> str:
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """What TLS is done with; None for ``mqtt://``.

        Raises:
            BrokerError: a certificate or key cannot be read.
        """
        if not self.tls:
            return None
        path = self.cafile
        try:
            context = ssl.create_default_context(cafile=path)
            if self.certfile:
                path = self.certfile
                # an empty password instead of a question on the terminal
                context.load_cert_chain(self.certfile, self.keyfile, password="")
        except OSError as error:
            raise BrokerError(
                f"certificate {path} of broker {self}",
                expected="a PEM file and, for a client certificate, its key without a password",
                got=str(error.strerror or error),
                mend="check --cafile, --cert and --key",
            ) from error
        return context


def check_text(what: str, text: str | None, nul: bool = False) -> None:
    """Refuses what MQTT cannot carry as a text: one from bytes that are not UTF-8, too long, or with a NUL in it.

    Raises:
        BrokerError: names ``what`` it is, not the text, which may be a password.
    """
    try:
        size = len((text or "").encode())
    except UnicodeEncodeError:
        raise BrokerError(f"{what} is not valid UTF-8", mend="write it in UTF-8 where it is given") from None
    if size > 65535:
        raise BrokerError(what, expected="at most 65,535 bytes", got=f"{size:,}", mend="give a shorter one")
    if not nul and "\0" in (text or ""):
        raise BrokerError(f"{what} holds a NUL character", mend="give one without")


def is_embedded(url: str | BrokerAddress) -> TypeIs[str]:
    """Whether it asks for a broker in this process."""
    return isinstance(url, str) and (url == "embedded" or url.startswith("embedded:"))


def parse_broker(
    broker: str | BrokerAddress,
    *,
    cafile: str | None = None,
    certfile: str | None = None,
    keyfile: str | None = None,
    password_file: str | None = None,
) -> BrokerAddress:
    """Parses ``mqtt://[user:password@]host[:port]`` (port 1883) or ``mqtts://…`` (8883).

    What is not given comes from ``EDGEKIT_MQTT_USERNAME``, ``_PASSWORD``, ``_PASSWORD_FILE``, ``_CAFILE``, ``_CERT``
    and ``_KEY``: unlike the URL, none of them shows a password in the process list.

    Raises:
        BrokerError: ``broker`` is of another form, or the file of the password cannot be read. The message repeats
            no part of the URL: where it is misread, any of them may belong to the password.
    """
    if isinstance(broker, BrokerAddress):
        return broker
    check_text("broker URL", broker, nul=True)
    parts, host, port = _split(broker.strip())
    tls = parts.scheme == "mqtts"
    given = os.environ.get
    files = cafile or given("EDGEKIT_MQTT_CAFILE"), certfile or given("EDGEKIT_MQTT_CERT")
    if (cafile or certfile) and not tls:
        raise BrokerError("certificates for a broker without TLS", expected="mqtts://…", mend="give its URL so")
    return BrokerAddress(
        host=host,
        port=port or (8883 if tls else 1883),
        tls=tls,
        username=_unquote(parts.username) if parts.username else given("EDGEKIT_MQTT_USERNAME"),
        password=_unquote(parts.password) if parts.password else _password(password_file),
        cafile=files[0],
        certfile=files[1],
        keyfile=keyfile or given("EDGEKIT_MQTT_KEY"),
    )


def _split(url: str) -> tuple[SplitResult, str, int | None]:
    """The parts of a broker's URL, its host and its port."""
    if _VARIABLE.search(url):
        raise BrokerError(
            "a variable in the broker URL is not replaced here",
            mend="write its value, or a $ as %24; user and password may come from EDGEKIT_MQTT_USERNAME and _PASSWORD",
        )
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BrokerError("broker URL cannot be read", expected=_USAGE, mend=_ENCODE) from None
    more = [name for name in ("path", "query", "fragment") if getattr(parts, name).strip("/")]
    # urlsplit leaves out tabs and line ends
    if re.search(r"[\x00-\x1f\x7f]", url) or ("@" in url and (more or "@" not in parts.netloc)):
        raise BrokerError("broker URL cannot be read", expected=_USAGE, mend=_ENCODE)
    host = parts.hostname or ""
    if parts.scheme not in ("mqtt", "mqtts") or not host or re.search(r"[\s$]", host) or more:
        got, mend = "one of another form", "give scheme and host, and no more than a port"
        if better := _SCHEMES.get(parts.scheme):
            got, mend = f"{parts.scheme}://", f"write {better}:// instead"
        elif parts.scheme in ("mqtt", "mqtts"):
            got = f"a {' and a '.join(more)}" if more else "no host" if not host else "a host that is no name"
        elif "://" not in url:
            got, mend = "no scheme", "begin it with mqtt:// or mqtts://"
        raise BrokerError("broker URL", expected=_USAGE, got=got, mend=mend)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        expected = "a number from 1 to 65535"
        raise BrokerError("port of the broker's URL", expected=expected, mend=f"give one, or none; or {_ENCODE}")
    return parts, unquote(host) if ":" in host else host, port  # the zone of an address may be written as %25eth0


def _unquote(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise BrokerError(
            "user or password in the broker URL is not valid UTF-8 once its % are decoded", mend=f"{_ENCODE}, in UTF-8"
        ) from None


def _password(file: str | None) -> str | None:
    """From the file given, else the variables."""
    if not file and (password := os.environ.get("EDGEKIT_MQTT_PASSWORD")):
        return password
    if not (file := file or os.environ.get("EDGEKIT_MQTT_PASSWORD_FILE")):
        return None
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # Windows begins a text file with a mark
        if Path(file).stat().st_mode & 0o004:
            logger.warning("everyone on this machine can read the password in %s; chmod 600 it", file)
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(
            f"password file {file}",
            expected="a text file with the password in its first line",
            got=str(getattr(error, "strerror", "") or "bytes that are not UTF-8"),
            mend="check --password-file",
        ) from (None if isinstance(error, UnicodeDecodeError) else error)  # it holds the bytes
    return text.split("\n", 1)[0].rstrip("\r")

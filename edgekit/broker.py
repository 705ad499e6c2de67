"""Where a broker is, and who we are to it: its URL, certificates and password."""

from __future__ import annotations

import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from paho.mqtt.enums import MQTTProtocolVersion

from edgekit.errors import BrokerError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

logger = logging.getLogger(__name__)

_USAGE = "mqtt://[user:password@]host[:port], mqtts://…, embedded or none"


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker is, and what to speak with it, tried in that order. Its text form leaves out the credentials.

    ``cafile``: whom to trust instead of the system's authorities; ``certfile`` and ``keyfile``: who we are (PEM files).
    """

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    protocols: tuple[MQTTProtocolVersion, ...] = (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
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
        BrokerError: ``broker`` is of another form, or the file of the password cannot be read. The message does not
            repeat the URL, as it may hold a password.
    """
    if isinstance(broker, BrokerAddress):
        return broker
    try:
        parts = urlsplit(broker)
    except ValueError:
        raise BrokerError("broker URL cannot be read", expected=_USAGE, mend="percent-encode odd characters") from None
    try:
        port = parts.port
    except ValueError:
        port = 0
    more = [name for name in ("path", "query", "fragment") if getattr(parts, name).strip("/")]
    odd = re.search(r"[\s\x00-\x1f\x7f]", parts.hostname or "")
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or odd or more:
        raise BrokerError(
            "broker URL",
            expected=_USAGE,
            got=", a ".join([f"scheme {parts.scheme!r}, host {parts.hostname!r}", *more]),
            mend="give scheme and host, and no more than a port",
        )
    if port == 0:
        raise BrokerError("port of the broker's URL", expected="a number from 1 to 65535", mend="give one, or none")
    tls = parts.scheme == "mqtts"
    given = os.environ.get
    files = cafile or given("EDGEKIT_MQTT_CAFILE"), certfile or given("EDGEKIT_MQTT_CERT")
    if (cafile or certfile) and not tls:
        raise BrokerError("certificates for a broker without TLS", expected="mqtts://…", mend="give its URL so")
    return BrokerAddress(
        host=parts.hostname,
        port=port or (8883 if tls else 1883),
        tls=tls,
        username=unquote(parts.username) if parts.username else given("EDGEKIT_MQTT_USERNAME"),
        password=unquote(parts.password) if parts.password else _password(password_file),
        cafile=files[0],
        certfile=files[1],
        keyfile=keyfile or given("EDGEKIT_MQTT_KEY"),
    )


def _password(file: str | None) -> str | None:
    """From the file given, else the variables."""
    if not file and (password := os.environ.get("EDGEKIT_MQTT_PASSWORD")):
        return password
    if not (file := file or os.environ.get("EDGEKIT_MQTT_PASSWORD_FILE")):
        return None
    try:
        text = Path(file).read_text()
        if Path(file).stat().st_mode & 0o004:
            logger.warning("everyone on this machine can read the password in %s; chmod 600 it", file)
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(
            f"password file {file}",
            expected="a text file with the password in its first line",
            got=str(getattr(error, "strerror", "") or "other bytes"),
            mend="check --password-file",
        ) from error
    return text.split("\n", 1)[0].rstrip("\r")

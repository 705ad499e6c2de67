"""What goes over MQTT: the topics and the payloads, typed. ``schemas/`` holds the JSON Schema of each payload."""

from __future__ import annotations

import os
import re
import socket
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

import msgspec

from edgekit.decode import Prediction
from edgekit.errors import EdgekitError

PREFIX = "edgekit"
ONLINE, OFFLINE = "online", "offline"

_NAME = r"^[a-z0-9_-]+$"
Name = Annotated[str, msgspec.Meta(pattern=_NAME)]
# RFC 3339, UTC, milliseconds
Timestamp = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
Count = Annotated[int, msgspec.Meta(ge=0)]


class BundleRef(msgspec.Struct, frozen=True):
    """Which model it was; ``version`` is empty for a model without a manifest."""

    name: str
    version: str
    sha256: str


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds: of the two costly stages, and from the frame to the finished prediction."""

    preprocess: float
    inference: float
    total: float


class Window(msgspec.Struct, frozen=True):
    """The stretch of sound a prediction is about."""

    start: Timestamp
    end: Timestamp


class FileInput(msgspec.Struct, frozen=True):
    """Where in a file source a frame comes from, counted from 0."""

    file: str
    frame: Count


class PredictionMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Payload of ``<base>/<stream>/prediction``. ``seq`` starts at 1 for each ``boot_id`` and stream, without holes."""

    schema: Literal["edgekit.prediction/1"]
    id: str
    boot_id: str
    seq: Annotated[int, msgspec.Meta(ge=1)]
    device: Name
    stream: Name
    captured_at: Timestamp
    replayed: bool
    window: Window | None = None
    bundle: BundleRef
    delegate: str
    latency_ms: Latency
    input: FileInput | None = None
    predictions: list[Prediction]


class StateMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/<stream>/state``: the highest class now; null where none reaches the threshold."""

    schema: Literal["edgekit.state/1"]
    captured_at: Timestamp
    class_id: int | None
    label: str | None
    score: float | None


class Versions(msgspec.Struct, frozen=True):
    edgekit: str
    python: str
    runtime: str


class StreamInfo(msgspec.Struct, frozen=True):
    bundle: BundleRef
    delegate: str
    source: str


class InfoMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/info``."""

    schema: Literal["edgekit.info/1"]
    device: Name
    boot_id: str
    profile: str
    versions: Versions
    streams: dict[str, StreamInfo]


PAYLOADS: dict[str, type[msgspec.Struct]] = {
    "prediction": PredictionMessage,
    "state": StateMessage,
    "info": InfoMessage,
}


encode = msgspec.json.Encoder().encode


def json_schema(payload: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the payload with this name in ``PAYLOADS``."""
    schema = msgspec.json.schema(PAYLOADS[payload])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def check_name(name: str, what: str) -> str:
    """``name`` if it can stand in a topic.

    Raises:
        EdgekitError: it holds something else than ``a-z 0-9 _ -``.
    """
    if not re.fullmatch(_NAME, name):
        raise EdgekitError(
            f"{what} {name!r}",
            expected="a name of a-z, 0-9, _ and -",
            mend="give another one; it becomes part of a topic",
        )
    return name


def default_device_id() -> str:
    """The host's name, made fit for a topic."""
    return re.sub(r"[^a-z0-9_-]+", "-", socket.gethostname().lower()).strip("-") or "device"


def printable(name: str) -> str:
    """``name`` of a file as UTF-8 text: a file's name may be any bytes, a payload may not."""
    return os.fsencode(name).decode("utf-8", "replace")


def topic(device: str, *levels: str) -> str:
    return "/".join((PREFIX, device, *levels))


def timestamp(at: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as every payload has it."""
    return at.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

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
    """The model that made the prediction. ``version`` is empty for a model without an EdgeKit manifest."""

    name: str
    version: str
    sha256: str


class Latency(msgspec.Struct, frozen=True):
    """Latency in milliseconds: preprocessing, inference, and the total from frame to finished prediction."""

    preprocess: float
    inference: float
    total: float


class Window(msgspec.Struct, frozen=True):
    """The span of audio that a prediction covers."""

    start: Timestamp
    end: Timestamp


class FileInput(msgspec.Struct, frozen=True):
    """The file that a frame was read from and the frame's index in it, starting at 0."""

    file: str
    frame: Count


class PredictionMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Payload of ``<base>/<stream>/prediction``. ``seq`` starts at 1 for each ``boot_id`` and stream and has no gaps.
    ``clock_step_s`` is present if the system clock was set since the previous prediction: the step in seconds."""

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
    clock_step_s: float | None = None
    input: FileInput | None = None
    predictions: list[Prediction]


class StateMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/<stream>/state``: the top class now; null if none reaches its
    threshold."""

    schema: Literal["edgekit.state/1"]
    captured_at: Timestamp
    class_id: int | None
    label: str | None
    score: float | None


class EventMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/<stream>/event``: a label became active (``begin``) or inactive (``end``).
    Both events carry the same ``event_id``."""

    schema: Literal["edgekit.event/1"]
    event_id: str
    event: Literal["begin", "end"]
    boot_id: str
    device: Name
    stream: Name
    at: Timestamp
    class_id: int
    label: str
    score: float
    replayed: bool


class Versions(msgspec.Struct, frozen=True):
    """Versions of EdgeKit, Python and the TFLite runtime."""

    edgekit: str
    python: str
    runtime: str


class StreamInfo(msgspec.Struct, frozen=True):
    """One stream: ``delegate`` is the active delegate, ``requested_delegate`` the configured one."""

    bundle: BundleRef
    delegate: str
    source: str
    requested_delegate: str = "auto"


class InfoMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/info``: versions of the software, and the bundle, source and delegate of each stream."""

    schema: Literal["edgekit.info/1"]
    device: Name
    boot_id: str
    profile: str
    versions: Versions
    streams: dict[str, StreamInfo]


class Percentiles(msgspec.Struct, frozen=True):
    """Latency percentiles in milliseconds over recent predictions; null before the first one."""

    p50: float | None
    p95: float | None
    p99: float | None


class SpoolHealth(msgspec.Struct, frozen=True):
    """Messages waiting to be sent: their number, their size, and the age of the oldest in seconds (null if none waits).
    ``shed`` counts the predictions and events discarded since this boot, by cause."""

    messages: Count
    bytes: Count
    oldest_s: float | None
    shed: dict[str, Count]


class DelegateHealth(msgspec.Struct, frozen=True):
    """The requested and the active delegate, and how many of the model's operators it runs (null if unknown)."""

    requested: str
    active: str
    operators_delegated: Count | None
    operators: Count | None


class StreamHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Health of one stream. ``captured = inferred + dropped + failed + in_flight`` always holds. ``dropped`` and
    ``failures`` count by cause. ``lost`` is true while the source delivers nothing, and ``gaps`` counts such outages.
    ``clock_steps`` counts changes of the system clock. ``stages_ms`` breaks ``latency_ms`` down by stage."""

    captured: Count
    inferred: Count
    dropped: dict[str, Count]
    failed: Count
    failures: dict[str, Count]
    in_flight: Count
    gaps: Count
    lost: bool
    clock_steps: Count
    fps: float
    latency_ms: Percentiles
    stages_ms: dict[str, Percentiles]
    delegate: DelegateHealth


class HealthMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of ``<base>/health``. Counts cover this boot and all streams, including streams that a configuration
    change has removed. ``captured = inferred + dropped + failed + in_flight`` always holds. ``dropped`` counts by
    cause. ``streams`` holds the streams that are configured now. A null value is not available on the device."""

    schema: Literal["edgekit.health/1"]
    captured: Count
    inferred: Count
    dropped: dict[str, Count]
    failed: Count
    in_flight: Count
    fps: float
    latency_ms: Percentiles
    spool: SpoolHealth
    delegate: DelegateHealth
    streams: dict[str, StreamHealth]
    cpu_temp_c: float | None
    rss_bytes: Count | None
    uptime_s: float


class _Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command"):
    """A command for ``stream``, or without it for all streams of the device."""

    stream: Name | None = None


class Ping(_Command, frozen=True, tag="ping"):
    """Checks that the device responds."""


class Pause(_Command, frozen=True, tag="pause"):
    """Pauses predictions: frames of a live source are skipped, a file source waits."""


class Resume(_Command, frozen=True, tag="resume"):
    """Resumes predictions."""


class Set(_Command, frozen=True, kw_only=True, tag="set"):
    """Changes the settings that are given. ``threshold`` is one score for all labels, or an object of label to score
    with ``"*"`` for all other labels. ``max_fps`` null removes the limit."""

    threshold: float | dict[Annotated[str, msgspec.Meta(max_length=200)], float] | msgspec.UnsetType = msgspec.UNSET
    top_k: int | msgspec.UnsetType = msgspec.UNSET
    max_fps: float | msgspec.UnsetType | None = msgspec.UNSET


class Snapshot(_Command, frozen=True, tag="snapshot"):
    """Requests the newest frame as an image."""


# Payload of ``<base>/command``.
CommandMessage = Ping | Pause | Resume | Set | Snapshot


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The active settings of a stream."""

    paused: bool
    threshold: float | dict[str, float]
    top_k: int
    max_fps: float | None


class SnapshotImage(msgspec.Struct, frozen=True, kw_only=True):
    """The newest frame and the newest prediction. The prediction may belong to an earlier frame; it is null before the
    first one."""

    content_type: Literal["image/jpeg"]
    size_wh: tuple[int, int]
    captured_at: Timestamp
    data: bytes
    prediction: PredictionMessage | None


class ResponseMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Response to a command. ``command`` is null if it could not be recognized; ``error`` says why nothing changed."""

    schema: Literal["edgekit.response/1"]
    device: Name
    stream: Name
    at: Timestamp
    command: str | None
    ok: bool
    error: str | None = None
    settings: StreamSettings
    snapshot: SnapshotImage | None = None


# What has a JSON Schema of this name.
PAYLOADS: dict[str, Any] = {
    "prediction": PredictionMessage,
    "event": EventMessage,
    "state": StateMessage,
    "info": InfoMessage,
    "health": HealthMessage,
    "command": CommandMessage,
    "response": ResponseMessage,
}


encode = msgspec.json.Encoder().encode


def json_schema(payload: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the payload with this name in ``PAYLOADS``.

    The descriptions are the docstrings of this module, as running text: how a docstring is indented depends on the
    Python version and on msgspec's.
    """
    schema = msgspec.json.schema(PAYLOADS[payload])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_with_plain_descriptions(schema)}


def _with_plain_descriptions(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_plain_descriptions(item) for item in node]
    if isinstance(node, dict):
        return {
            key: " ".join(value.split())
            if key == "description" and isinstance(value, str)
            else _with_plain_descriptions(value)
            for key, value in node.items()
        }
    return node


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


def check_prefix(prefix: str) -> str:
    """``prefix`` if topics can begin with it: a name, or several with ``/`` between them.

    Raises:
        EdgekitError: it is none.
    """
    for level in prefix.split("/"):
        check_name(level, "prefix" if level == prefix else f"prefix {prefix!r}: level")
    return prefix


def default_device_id() -> str:
    """The host's name, made fit for a topic."""
    return re.sub(r"[^a-z0-9_-]+", "-", socket.gethostname().lower()).strip("-") or "device"


def printable(name: str) -> str:
    """``name`` of a file as UTF-8 text: a file's name may be any bytes, a payload may not."""
    return os.fsencode(name).decode("utf-8", "replace")


def topic(device: str, *levels: str, prefix: str = PREFIX) -> str:
    return "/".join((prefix, device, *levels))


def timestamp(at: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as every payload has it."""
    return at.astimezone(timezone.utc).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"

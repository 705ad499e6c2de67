"""Home Assistant's device-based MQTT discovery: what a device has is told once and kept by the broker.

https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from edgekit.errors import EdgekitError
from edgekit.messages import OFFLINE, ONLINE, PREFIX, InfoMessage, encode, topic

logger = logging.getLogger(__name__)

# Home Assistant's own prefix, and where it says that it has started.
DISCOVERY_PREFIX = "homeassistant"
# It asks devices to spread their announcements after it has started.
MAX_BIRTH_DELAY_S = 3.0
# What the broker has kept of an earlier run comes within so long.
RETAINED_S = 1.0
# So long after what removes components come those that are left; sooner, Home Assistant may still be at the former.
REMOVAL_S = 1.0
# Without a word for so long, health is not known; it comes every 10 s.
EXPIRE_AFTER_S = 35
# Of an announcement, and of one with what is to be removed: larger than 64 KiB, the device would not be given its own
# back. To stay below, labels are not listed one by one.
MAX_BYTES, MAX_REMOVAL_BYTES = 56_000, 65_000
# As the state of a sensor, Home Assistant takes these for no value at all, or passes them over.
_NO_VALUES = frozenset(("", "None", "unknown", "unavailable"))
_MANUFACTURER = "EdgeKit"

Config = dict[str, Any]


def label_groups(given: Mapping[str, Iterable[str]], labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Labels by the group's name, of groups whose members are a label or several with commas between them: one with a
    comma in it is told from several by what ``labels`` there are.

    Raises:
        EdgekitError: one is none of ``labels``.
    """
    known = tuple(dict.fromkeys(labels))  # of several streams
    groups: dict[str, tuple[str, ...]] = {}
    for name, texts in given.items():
        members = [label for text in texts for label in ([text] if text in known else text.split(","))]
        for label in members:
            if label not in known:
                close = difflib.get_close_matches(label, known) or known[:5]
                raise EdgekitError(
                    f"label group {name}: {label!r}", expected="a label of the model", mend=f"try {' or '.join(close)}"
                )
        groups[name] = tuple(members)
    return groups


def discovery(
    info: InfoMessage,
    labels: Mapping[str, Sequence[str]],
    groups: Mapping[str, Sequence[str]],
    *,
    prefix: str = PREFIX,
) -> Config:
    """What Home Assistant is told of a device.

    For each stream: a sensor with the label of its state, an event entity for labels that begin and end, and a binary
    sensor for each group of labels, on while the label is one of them. And diagnostics, of each stream where there are
    several.

    Args:
        labels: all that a stream may name, by stream.
        groups: labels by the name of a group. A stream that has none of them has no such sensor.
    """
    device = info.device
    components: Config = {}
    for stream in info.streams:
        state_topic = topic(device, stream, "state", prefix=prefix)
        components[f"{stream}.label"] = _label_sensor(stream, state_topic, labels[stream])
        components[f"{stream}.event"] = _event(stream, topic(device, stream, "event", prefix=prefix))
        for group, members in groups.items():
            named = [label for label in members if label in labels[stream]]
            if named:
                components[f"{stream}.group.{group}"] = {
                    "platform": "binary_sensor",
                    "name": f"{stream} {group}",
                    "state_topic": state_topic,
                    # a string of JSON is one of Jinja too
                    "value_template": "{{ 'ON' if value_json.label in "
                    f"{json.dumps(named, ensure_ascii=False)} else 'OFF' }}}}",
                }
    for key, diagnostic in _diagnostics(list(info.streams)).items():
        components[key] = {
            "entity_category": "diagnostic",
            "state_topic": topic(device, "health", prefix=prefix),
            "expire_after": EXPIRE_AFTER_S,
            **diagnostic,
        }
    for key, component in components.items():
        component["unique_id"] = f"edgekit.{device}.{key}"
    config: Config = {
        "device": {
            "identifiers": [f"edgekit.{device}"],
            "name": device,
            "manufacturer": _MANUFACTURER,
            "model": info.profile,
            "sw_version": info.versions.edgekit,
        },
        "origin": {"name": _MANUFACTURER, "sw_version": info.versions.edgekit},
        "availability_topic": topic(device, "status", prefix=prefix),
        "payload_available": ONLINE,
        "payload_not_available": OFFLINE,
        "qos": 1,
        "components": components,
    }
    return _bounded(config, MAX_BYTES)


def _bounded(config: Config, max_bytes: int) -> Config:
    """``config`` without the options of as many sensors as it takes, those with the most first."""
    while len(encode(config)) > max_bytes:
        components: Config = config["components"]
        listed = [key for key, component in components.items() if "options" in component]
        if not listed:
            logger.warning(
                "the announcement to Home Assistant may be too large for the broker; give smaller label groups"
            )
            break
        longest = max(listed, key=lambda key: len(encode(components[key])))
        sensor = {name: value for name, value in components[longest].items() if name not in ("options", "device_class")}
        config = {**config, "components": {**components, longest: sensor}}
    return config


def _shown(labels: Sequence[str]) -> dict[str, str]:
    """How labels appear in Home Assistant: without white space around them, as templates give them; and in quotation
    marks where it would see no value in them."""
    shown = {label: label.strip() for label in labels}
    for label, text in shown.items():
        if text in _NO_VALUES:
            while text in _NO_VALUES or text in shown.values():
                text = f'"{text}"'
            shown[label] = text
    return shown


def _label_sensor(stream: str, state_topic: str, labels: Sequence[str]) -> Config:
    shown = _shown(labels)
    value = "value_json.label"
    if quoted := {label: text for label, text in shown.items() if text != label.strip()}:
        value = f"{json.dumps(quoted, ensure_ascii=False)}.get({value}, {value})"
    sensor: Config = {
        "platform": "sensor",
        "name": stream,
        "icon": "mdi:eye",
        "state_topic": state_topic,
        # null where no class reaches the threshold, which Home Assistant shows as unknown
        "value_template": f"{{{{ {value} }}}}",
        "json_attributes_topic": state_topic,
        "json_attributes_template": "{{ {'score': value_json.score, 'captured_at': value_json.captured_at} | tojson }}",
    }
    if shown:
        sensor |= {"device_class": "enum", "options": list(dict.fromkeys(shown.values()))}
    return sensor


def _event(stream: str, event_topic: str) -> Config:
    """https://www.home-assistant.io/integrations/event.mqtt/"""
    return {
        "platform": "event",
        "name": stream,
        "icon": "mdi:eye-outline",
        "state_topic": event_topic,
        "event_types": ["begin", "end"],
        # nothing of what is sent afterwards: it is no news then, and Home Assistant takes every event as of now
        "value_template": "{{ '' if value_json.replayed else {'event_type': value_json.event, "
        "'label': value_json.label, 'score': value_json.score, 'event_id': value_json.event_id, "
        "'at': value_json.at} | tojson }}",
    }


def _diagnostics(streams: Sequence[str]) -> Config:
    """Those of the device, and of each stream; the rate and the delegate of the only stream are the device's."""
    components = {"cpu_temp_c": _CPU_TEMPERATURE, "spool": _SPOOL}
    if len(streams) == 1:
        components |= {
            "fps": _fps("Frames per second", "value_json"),
            "delegate": _delegate("Delegate", "value_json"),
        }
    for stream in streams:
        value = f"value_json.streams['{stream}']"
        if len(streams) > 1:
            components[f"{stream}.fps"] = _fps(f"{stream} frames per second", value)
            components[f"{stream}.delegate"] = _delegate(f"{stream} delegate", value)
        components[f"{stream}.lost"] = {
            "platform": "binary_sensor",
            "name": f"{stream} source",
            "device_class": "problem",
            "value_template": f"{{{{ 'ON' if {value}.lost else 'OFF' }}}}",
        }
    return components


def _fps(name: str, value: str) -> Config:
    return {
        "platform": "sensor",
        "name": name,
        "icon": "mdi:speedometer",
        "value_template": f"{{{{ {value}.fps }}}}",
        "unit_of_measurement": "fps",
        "state_class": "measurement",
        "suggested_display_precision": 1,
    }


def _delegate(name: str, value: str) -> Config:
    return {
        "platform": "sensor",
        "name": name,
        "icon": "mdi:chip",
        "value_template": f"{{{{ {value}.delegate.active }}}}",
    }


_CPU_TEMPERATURE: Config = {
    "platform": "sensor",
    "name": "CPU temperature",
    "device_class": "temperature",
    "value_template": "{{ value_json.cpu_temp_c }}",
    "unit_of_measurement": "°C",
    "state_class": "measurement",
    "suggested_display_precision": 1,
}
_SPOOL: Config = {
    "platform": "sensor",
    "name": "Messages waiting",
    "icon": "mdi:tray-full",
    "value_template": "{{ value_json.spool.messages }}",
    "state_class": "measurement",
}


class _Component(msgspec.Struct):
    platform: str


class _Origin(msgspec.Struct):
    name: str


class _Previous(msgspec.Struct):
    """Of an announcement of ours, what is needed to take it back."""

    origin: _Origin
    components: dict[str, _Component]


def removal(previous: bytes, now: Config) -> Config | None:
    """``now`` with what makes Home Assistant remove those components that ``previous`` had and ``now`` has not, or has
    as others; None if there are none, or ``previous`` is no announcement of ours."""
    try:
        before = msgspec.json.decode(previous, type=_Previous)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if previous:
            logger.warning("what was announced of this device before is not ours, and is replaced")
        return None
    if before.origin.name != _MANUFACTURER:
        return None
    components = now["components"]
    stale = {
        key: {"platform": component.platform}
        for key, component in before.components.items()
        if components.get(key, {}).get("platform") != component.platform
    }
    return _bounded({**now, "components": {**components, **stale}}, MAX_REMOVAL_BYTES) if stale else None


class Discovery:
    """When to announce a device: on each connection, unless the broker has kept it, when Home Assistant starts, and
    when the device changes.

    The caller subscribes to :attr:`filters`, tells what happens, and publishes, retained, what :meth:`turn` gives.
    """

    def __init__(self, device: str, config: Config, *, discovery_prefix: str = DISCOVERY_PREFIX) -> None:
        self._config, self._payload = config, encode(config)
        self._wanted = config
        self._config_topic = f"{discovery_prefix}/device/{device}/config"
        self._birth_topic = f"{discovery_prefix}/status"
        self.filters = (self._birth_topic, self._config_topic)
        #: When :meth:`turn` has something to give.
        self.due_s = math.inf
        self._looking = False  # for what the broker has kept
        self._removal: bytes | None = None

    def change(self, config: Config) -> None:
        """Announces another one from the next turn on; may be called from any thread."""
        self._wanted = config

    def on_connect(self, now_s: float) -> None:
        self._looking, self._removal, self.due_s = True, None, now_s + RETAINED_S

    def on_message(self, topic: str, payload: bytes | bytearray, now_s: float) -> None:
        """For each message on one of :attr:`filters`."""
        if topic == self._config_topic and self._looking:
            self._looking, self.due_s = False, now_s
            if payload == self._payload:
                self.due_s = math.inf
            elif stale := removal(bytes(payload), self._config):
                self._removal = encode(stale)
        elif topic == self._birth_topic and payload == b"online" and self.due_s == math.inf:
            self.due_s = now_s + random.uniform(0, MAX_BIRTH_DELAY_S)

    def turn(self, now_s: float) -> list[tuple[str, bytes]]:
        """Topics and payloads to publish now."""
        if (wanted := self._wanted) is not self._config:
            self._become(wanted, now_s)
        if now_s < self.due_s:
            return []
        self._looking, self.due_s, payload = False, math.inf, self._payload
        if self._removal:
            payload, self._removal, self.due_s = self._removal, None, now_s + REMOVAL_S
        return [(self._config_topic, payload)]

    def _become(self, config: Config, now_s: float) -> None:
        before, after = self._removal or self._payload, encode(config)
        self._config, self._payload = config, after
        if before != after and not self._looking:  # else what the broker has kept tells what there was
            stale = removal(before, config)
            self._removal, self.due_s = encode(stale) if stale else None, now_s

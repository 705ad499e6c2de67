from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import edgekit
from edgekit.devices.publish.home_assistant import Discovery, discovery, label_groups, removal
from edgekit.errors import EdgekitError
from edgekit.messages import BundleRef, InfoMessage, StreamInfo, Versions, encode

pytestmark = pytest.mark.no_runtime

SCHEMA = json.loads(Path(__file__).with_name("home_assistant_schema.json").read_text())
# Names that would end a string of Jinja or of JSON, if they could.
HARD = [
    '"',
    "'",
    "\\",
    "\\n",
    "{{ 1 }}",
    "{% raw %}",
    "{# a",
    "}}",
    "tench, Tinca tinca",
    "日本",
    "🦜",
    "a\u2028b",
    " two words ",
]
LABELS = {"door": ["cat", "dog", "none of these", *HARD], "yard": ["cat", "car"]}
GROUPS = {"pets": ["cat", "dog"], "hard": HARD, "cars": ["car"]}
CONFIG_TOPIC = "homeassistant/device/pi-4/config"


def info(*streams: str) -> InfoMessage:
    bundle = BundleRef("door", "1", "00")
    return InfoMessage(
        schema="edgekit.info/1",
        device="pi-4",
        boot_id="b",
        profile="aarch64",
        versions=Versions("0.1.0", "3.11.2", "litert 2.3.0"),
        streams={stream: StreamInfo(bundle, "cpu", "camera:0") for stream in streams},
    )


CONFIG = discovery(info("door", "yard"), LABELS, GROUPS)
ONE_STREAM = discovery(info("door"), LABELS, {})


@pytest.mark.parametrize("config", [CONFIG, ONE_STREAM])
def test_discovery_is_within_the_documented_schema(config: Any) -> None:
    jsonschema.validate(json.loads(encode(config)), SCHEMA)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("device", "identifiers"), []),
        (("device", "color"), "red"),
        (("origin",), {}),
        (("components",), {}),
        (("components", "door.fps", "unique_id"), None),
        (("components", "door.fps", "stat_cls"), "measurement"),
        (("components", "door.fps", "state_topic"), "edgekit/+/health"),
        (("components", "door.label", "options"), []),
        (("components", "door.label", "device_class"), "temperature"),
        (("components", "cpu_temp_c", "unit_of_measurement"), "C"),
        (("components", "door.group.pets", "options"), ["ON"]),
        (("components", "door.event", "event_types"), []),
        (("components", "door.event", "expire_after"), 35),
    ],
)
def test_schema_refuses_what_home_assistant_would_not_take(where: tuple[str, ...], value: Any) -> None:
    config = json.loads(encode(CONFIG))
    part = config
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, SCHEMA)


def test_discovery_has_an_entity_for_each_stream_and_group_and_what_tells_their_health() -> None:
    components = CONFIG["components"]
    assert set(components) == {
        "door.label", "door.event", "door.group.pets", "door.group.hard", "door.fps", "door.delegate", "door.lost",
        "yard.label", "yard.event", "yard.group.pets", "yard.group.cars", "yard.fps", "yard.delegate", "yard.lost",
        "cpu_temp_c", "spool",
    }  # fmt: skip
    assert components["yard.label"]["options"] == ["cat", "car"]
    assert components["yard.label"]["state_topic"] == "edgekit/pi-4/yard/state"
    assert components["yard.event"]["state_topic"] == "edgekit/pi-4/yard/event"
    assert components["spool"]["state_topic"] == "edgekit/pi-4/health" and components["spool"]["expire_after"] == 35
    assert CONFIG["availability_topic"] == "edgekit/pi-4/status"
    unique_ids = [component["unique_id"] for component in components.values()]
    assert len(set(unique_ids)) == len(unique_ids)


def test_discovery_of_one_stream_tells_the_health_of_the_device() -> None:
    components = ONE_STREAM["components"]
    assert set(components) == {"door.label", "door.event", "door.lost", "fps", "cpu_temp_c", "delegate", "spool"}


def test_discovery_of_names_that_look_alike_has_different_ids() -> None:
    groups = {"b_c": ["x"], "c": ["x"], "label": ["x"]}
    components = discovery(info("a", "a_b"), {"a": ["x"], "a_b": ["x"]}, groups)["components"]
    assert len({component["unique_id"] for component in components.values()}) == 2 * 5 + 2 * 3 + 2


def test_discovery_with_another_prefix() -> None:
    config = discovery(info("door"), LABELS, {}, prefix="site/7")
    assert config["availability_topic"] == "site/7/pi-4/status"
    assert config["components"]["fps"]["state_topic"] == "site/7/pi-4/health"


def test_discovery_of_very_many_labels_lists_none() -> None:
    sensor = discovery(info("door"), {"door": [f"label {n}" * 5 for n in range(2000)]}, {})["components"]["door.label"]
    assert "options" not in sensor and "device_class" not in sensor


IMAGENET = [f"tench number {n}, Tinca tinca" for n in range(1000)]


def test_discovery_of_several_streams_with_very_many_labels_fits_one_message_and_lists_what_it_can() -> None:
    config = discovery(info("a", "b", "c", "few"), {**dict.fromkeys("abc", IMAGENET), "few": ["cat", "dog"]}, {})
    assert len(encode(config)) < 60_000
    jsonschema.validate(json.loads(encode(config)), SCHEMA)
    listed = [key for key, component in config["components"].items() if "options" in component]
    assert "few.label" in listed and len(listed) == 2
    assert all(("device_class" in config["components"][f"{stream}.label"]) == (f"{stream}.label" in listed)
               for stream in ("a", "b", "c", "few"))  # fmt: skip


def test_removal_fits_one_message_whatever_there_was() -> None:
    many = [f"room_{number}_" + "x" * 100 for number in range(150)]
    before = {"origin": {"name": "EdgeKit"}, "components": {f"{name}.label": {"platform": "sensor"} for name in many}}
    now = discovery(info("a"), {"a": IMAGENET + [f"more {n}" + "y" * 20 for n in range(500)]}, {})
    assert "options" in now["components"]["a.label"]
    taken_back = removal(encode(before), now)
    assert taken_back is not None and len(encode(taken_back)) < 65_400
    jsonschema.validate(json.loads(encode(taken_back)), SCHEMA)
    assert all(taken_back["components"][f"{name}.label"] == {"platform": "sensor"} for name in many)
    assert set(now["components"]) < set(taken_back["components"])


def rendered(component: dict[str, Any], payload: dict[str, Any], template: str = "value_template") -> str:
    jinja2 = pytest.importorskip("jinja2")
    return str(jinja2.Template(component[template]).render(value_json=payload)).strip()


@pytest.mark.parametrize("label", [*LABELS["door"], None])
def test_templates_tell_every_label(label: str | None) -> None:
    state = {"label": label, "score": None if label is None else 0.5, "captured_at": "2026-11-22T03:04:05.678Z"}
    components = CONFIG["components"]
    said = rendered(components["door.label"], state)
    assert said == "None" if label is None else said in components["door.label"]["options"]
    assert rendered(components["door.group.pets"], state) == ("ON" if label in ("cat", "dog") else "OFF")
    assert rendered(components["door.group.hard"], state) == ("ON" if label in HARD else "OFF")
    attributes = json.loads(rendered(components["door.label"], state, "json_attributes_template"))
    assert attributes == {"score": state["score"], "captured_at": state["captured_at"]}


# What Home Assistant takes for no value, or passes over, as a sensor's state.
NO_VALUES = ["None", "unknown", "unavailable", ""]


@pytest.mark.parametrize("label", ["None", "unknown", "unavailable", "", " ", " None ", "none", '"None"', "cat"])
def test_label_that_home_assistant_takes_for_no_value_is_shown(label: str) -> None:
    labels = ["None", "unknown", "unavailable", "", " ", " None ", "none", '"None"', "cat"]
    config = discovery(info("door"), {"door": labels}, {"group": [label]})
    jsonschema.validate(json.loads(encode(config)), SCHEMA)
    sensor, group = (config["components"][f"door.{name}"] for name in ("label", "group.group"))
    said = {one: rendered(sensor, {"label": one}) for one in labels}
    assert said[label] not in NO_VALUES and said[label] in sensor["options"]
    assert len(set(said.values())) == len(set(sensor["options"])) == len(sensor["options"]) == len(labels)
    assert label.strip() in said[label] and rendered(sensor, {"label": None}) == "None"
    assert rendered(group, {"label": label}) == "ON" and rendered(group, {"label": None}) == "OFF"


def health(**streams: tuple[float, str, bool]) -> dict[str, Any]:
    """Frames a second, active delegate and whether the source is lost, of each stream; the device's are the sum and
    the first one's."""
    told = {
        stream: {"fps": fps, "delegate": {"active": active}, "lost": lost}
        for stream, (fps, active, lost) in streams.items()
    }
    first = next(iter(told.values()))
    return {**first, "fps": sum(one["fps"] for one in told.values()), "streams": told}


def test_templates_tell_the_health_of_each_stream() -> None:
    payload = health(door=(29.5, "gpu", True), yard=(1.0, "cpu", False))
    for stream, expected in (("door", ["29.5", "gpu", "ON"]), ("yard", ["1.0", "cpu", "OFF"])):
        parts = [CONFIG["components"][f"{stream}.{name}"] for name in ("fps", "delegate", "lost")]
        assert [rendered(part, payload) for part in parts] == expected
    only = health(door=(29.5, "gpu", False))
    parts = [ONE_STREAM["components"][name] for name in ("fps", "delegate", "door.lost")]
    assert [rendered(part, only) for part in parts] == ["29.5", "gpu", "OFF"]


@pytest.mark.parametrize("label", LABELS["door"])
def test_templates_tell_every_event_but_not_those_that_are_sent_afterwards(label: str) -> None:
    event = {"event_id": "a-1", "event": "begin", "label": label, "score": 0.5, "at": "2026-11-22T03:04:05.678Z"}
    component = CONFIG["components"]["door.event"]
    told = json.loads(rendered(component, {**event, "replayed": False}))
    assert {"event": told.pop("event_type"), **told} == event and event["event"] in component["event_types"]
    assert rendered(component, {**event, "replayed": True}) == ""


def test_label_groups_have_labels_with_commas_in_them() -> None:
    given = {"pets": ("cat,dog", "parrot"), "fish": ("tench, Tinca tinca",)}
    labels = ["cat", "dog", "parrot", "tench, Tinca tinca"]
    assert label_groups(given, labels) == {"pets": ("cat", "dog", "parrot"), "fish": ("tench, Tinca tinca",)}


@pytest.mark.parametrize(
    ("given", "error"),
    [("warm", "NAME=LABEL"), ("warm=", "a label of the model"), ("warm=red,gren", "try green"), ("W=red", "a-z, 0-9")],
)
def test_label_group_that_is_wrong_is_refused(models: Path, frames: Path, given: str, error: str) -> None:
    with pytest.raises(EdgekitError, match=error):
        edgekit.run(models / "int8.tflite", frames, broker="none", label_groups=[given])


def test_removal_takes_back_what_is_no_more() -> None:
    now = discovery(info("door"), LABELS, {"pets": ["cat"]})
    taken_back = removal(encode(CONFIG), now)
    assert taken_back is not None
    jsonschema.validate(json.loads(encode(taken_back)), SCHEMA)
    stale = {
        "door.group.hard", "door.fps", "door.delegate", "yard.label", "yard.event", "yard.group.pets",
        "yard.group.cars", "yard.fps", "yard.delegate", "yard.lost",
    }  # fmt: skip
    assert {key for key, component in taken_back["components"].items() if len(component) == 1} == stale
    assert taken_back["components"]["yard.label"] == {"platform": "sensor"}
    assert {key: part for key, part in taken_back["components"].items() if key not in stale} == now["components"]


def test_removal_of_a_component_that_becomes_another_platforms() -> None:
    before = json.loads(encode(CONFIG))
    before["components"]["spool"]["platform"] = "number"
    taken_back = removal(encode(before), CONFIG)
    assert taken_back and taken_back["components"]["spool"] == {"platform": "number"}


@pytest.mark.parametrize(
    "previous",
    [b"", b"{", b"\xff", b"[]", b"{}", b"[" * 5000, b'{"components":{"a":{"platform":"light"}},"origin":{"name":"x"}}',
     b'{"components":{"a":1},"origin":{"name":"EdgeKit"}}', encode(CONFIG)],
)  # fmt: skip
def test_removal_of_nothing_of_ours(previous: bytes) -> None:
    assert removal(previous, CONFIG) is None


def turns(flow: Discovery, from_s: float, to_s: float) -> list[tuple[float, str, Any]]:
    """What it publishes, and when, if it is asked when it says so."""
    published = []
    while from_s <= flow.due_s <= to_s:
        at_s = flow.due_s
        published += [(at_s, to, json.loads(payload)) for to, payload in flow.turn(at_s)]
    return published


def test_announcement_is_made_when_the_broker_has_kept_none() -> None:
    flow = Discovery("pi-4", CONFIG)
    assert set(flow.filters) == {"homeassistant/status", CONFIG_TOPIC} and flow.due_s == math.inf
    flow.on_connect(100)
    assert flow.turn(100) == []
    ((at_s, to, config),) = turns(flow, 100, 200)
    assert at_s <= 101 and to == CONFIG_TOPIC and config == json.loads(encode(CONFIG))
    flow.on_message(CONFIG_TOPIC, encode(CONFIG), 102)  # its own comes back
    assert turns(flow, 102, 200) == []


def test_announcement_that_the_broker_has_kept_is_not_made_again() -> None:
    flow = Discovery("pi-4", CONFIG)
    flow.on_connect(100)
    flow.on_message(CONFIG_TOPIC, encode(CONFIG), 100.1)
    assert turns(flow, 100, 200) == []
    flow.on_connect(300)  # to a broker that has lost it
    assert len(turns(flow, 300, 400)) == 1


def test_stale_components_are_removed_before_the_announcement() -> None:
    now = discovery(info("door"), LABELS, {})
    flow = Discovery("pi-4", now)
    flow.on_connect(100)
    flow.on_message(CONFIG_TOPIC, encode(CONFIG), 100.1)
    (removed_s, _, removed), (announced_s, _, announced) = turns(flow, 100, 200)
    assert removed["components"]["yard.label"] == {"platform": "sensor"} and announced == json.loads(encode(now))
    assert announced_s - removed_s >= 1


def test_announcement_is_made_again_when_home_assistant_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Discovery("pi-4", CONFIG)
    flow.on_connect(100)
    flow.on_message("homeassistant/status", b"online", 100)
    assert len(turns(flow, 100, 200)) == 1
    delays = []
    random.seed(1)
    for start_s in range(200, 1200, 100):
        flow.on_message("homeassistant/status", b"offline", start_s - 10)
        flow.on_message("homeassistant/status", b"online", start_s)
        flow.on_message("homeassistant/status", b"online", start_s)
        ((at_s, _, config),) = turns(flow, start_s, start_s + 50)
        assert config == json.loads(encode(CONFIG))
        delays.append(at_s - start_s)
    assert 0 <= min(delays) < 1 < max(delays) <= 3


def test_device_that_changes_is_announced_again_without_what_is_no_more() -> None:
    flow = Discovery("pi-4", CONFIG)
    flow.on_connect(100)
    flow.on_message(CONFIG_TOPIC, encode(CONFIG), 100.1)
    flow.change(json.loads(encode(CONFIG)))
    assert flow.turn(200) == [], "it is as it was"
    flow.change(ONE_STREAM)
    ((_, removing),) = flow.turn(300)
    assert json.loads(removing)["components"]["yard.label"] == {"platform": "sensor"}
    ((at_s, _, config),) = turns(flow, 300, 400)
    assert at_s >= 301 and config == json.loads(encode(ONE_STREAM))
    with_groups = discovery(info("door"), LABELS, GROUPS)
    flow.change(with_groups)
    assert [json.loads(payload) for _, payload in flow.turn(400)] == [json.loads(encode(with_groups))]
    assert turns(flow, 400, 500) == []


def test_device_that_changes_before_it_is_announced_takes_back_what_the_broker_has_kept() -> None:
    before, after = discovery(info("door"), LABELS, GROUPS), discovery(info("yard"), LABELS, {})
    flow = Discovery("pi-4", CONFIG)
    flow.on_connect(100)
    flow.change(after)
    assert flow.turn(100.1) == []
    flow.on_message(CONFIG_TOPIC, encode(before), 100.2)
    (_, _, removing), (_, _, config) = turns(flow, 100.2, 200)
    assert removing["components"]["door.group.hard"] == {"platform": "binary_sensor"}
    assert config == json.loads(encode(after))


@pytest.mark.parametrize("payload", [b"\xff", b"{", b"[" * 10_000, b'{"origin":{"name":"Zigbee"}}', b""])
def test_foreign_configuration_is_replaced(payload: bytes) -> None:
    flow = Discovery("pi-4", CONFIG)
    flow.on_connect(100)
    flow.on_message(CONFIG_TOPIC, payload, 100.1)
    ((_, _, config),) = turns(flow, 100, 200)
    assert config == json.loads(encode(CONFIG))


def test_device_announces_itself_to_a_broker_and_again_to_home_assistant_that_starts(
    models: Path, video: Path, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has other label groups than the first: what is no more is removed."""
    monkeypatch.setattr("edgekit.devices.publish.home_assistant.MAX_BIRTH_DELAY_S", 0.2)

    def announced(messages: int, group: str) -> list[dict[str, Any]]:
        """The announcements of a run during which Home Assistant starts, once the first ones are out."""
        received = broker.subscribe("homeassistant/device/pi/config", "-C", str(messages), "-W", "20", "-R")
        first = broker.subscribe("homeassistant/device/pi/config", "-C", str(messages - 1), "-W", "20", "-R")
        stop = threading.Event()
        running = threading.Thread(
            target=edgekit.run,
            args=(models / "int8.tflite", str(video)),
            kwargs={
                "broker": broker.url, "device_id": "pi", "loop": True, "max_fps": 20.0, "stop": stop,
                "label_groups": [f"{group}=red,blue"],
            },
            daemon=True,  # a test that fails must not wait for it
        )  # fmt: skip
        running.start()
        first()
        broker.publish("homeassistant/status", "online")
        configs = [payload for _, payload in received()]
        stop.set()
        running.join()
        for config in configs:
            jsonschema.validate(config, SCHEMA)
        return configs

    config, again = announced(2, "warm")
    assert config == again and config["components"]["main.label"]["options"] == ["red", "green", "blue"]
    removing, config, again = announced(3, "bright")
    assert removing["components"]["main.group.warm"] == {"platform": "binary_sensor"}
    assert "main.group.warm" not in config["components"] and "main.group.bright" in config["components"]
    assert config == again
    ((_, kept),) = broker.subscribe("homeassistant/device/pi/config", "-C", "1", "-W", "5")()
    assert kept == config

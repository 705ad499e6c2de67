from __future__ import annotations

import base64
import json
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import edgekit
from edgekit.devices.config import StreamConfig
from edgekit.devices.counts import Counts
from edgekit.devices.health import device_health
from edgekit.devices.interpreter import load
from edgekit.devices.pipeline import Pipeline
from edgekit.devices.publish.commands import MAX_COMMAND_BYTES, Commands, response_topic
from edgekit.devices.sources.frames import Frame, Source
from edgekit.messages import PredictionMessage, SpoolHealth, encode, json_schema

RESPONSE, HEALTH = json_schema("response"), json_schema("health")


class Camera(Source):
    """Gives the frames that a test puts, and to no one else those that came in between, as a camera does."""

    def __init__(self, live: bool) -> None:
        super().__init__("camera:0", threading.Event())
        self.live = live
        self._given: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def put(self, *images_bgr: np.ndarray) -> None:
        for image in images_bgr:
            self._given.put(Frame(image))

    def _frames(self) -> Iterator[Frame]:
        while not self.stop.is_set():
            try:
                yield self._given.get(timeout=0.02)
            except queue.Empty:
                continue


class Running:
    """A pipeline that runs in a thread, its predictions in ``queue``, and its commands."""

    def __init__(self, model: Any, source: Source, stream: str = "main", **settings: Any) -> None:
        config = StreamConfig(bundle="int8.tflite", source="camera:0", name=stream, **settings)
        self.pipeline, self.source = Pipeline(model, source, config, "pi"), source
        self.commands = Commands(lambda: {stream: self.pipeline})
        self.predictions: queue.SimpleQueue[PredictionMessage] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for result in self.pipeline:
            if result.prediction:
                self.predictions.put(result.prediction)

    def answer(self, command: Any, retained: bool = False) -> dict[str, Any]:
        payload = command if isinstance(command, bytes) else json.dumps(command).encode()
        (answer,) = self.commands.answer(payload, retained=retained)
        response: dict[str, Any] = json.loads(answer)
        jsonschema.validate(response, RESPONSE)
        return response

    def next(self) -> PredictionMessage:
        return self.predictions.get(timeout=10)

    def stop(self) -> None:
        self.source.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def run(models: Path) -> Iterator[Callable[..., Running]]:
    """Starts a pipeline on a source that a test feeds."""
    started: list[Running] = []

    def start(live: bool = True, **settings: Any) -> Running:
        started.append(Running(model, Camera(live), "door", **settings))
        return started[-1]

    with load(models / "int8.tflite") as model:
        yield start
        for running in started:
            running.stop()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not come to be")


def test_ping_tells_the_settings(run: Any) -> None:
    response = run(threshold={"red": 0.5, "*": 0.25}, top_k=2, max_fps=30.0).answer({"command": "ping"})
    assert (
        response["ok"] and response["command"] == "ping" and (response["device"], response["stream"]) == ("pi", "door")
    )
    settings = {"paused": False, "threshold": {"red": 0.5, "*": 0.25}, "top_k": 2, "max_fps": 30.0}
    assert response["settings"] == settings


def test_pause_of_a_camera_drops_what_comes_until_resume(run: Any, colour: Any) -> None:
    running = run()
    running.source.put(colour("red")[..., ::-1])
    assert running.next().predictions[0].label == "red"
    assert running.answer({"command": "pause"})["settings"]["paused"]
    running.source.put(*[colour("green")[..., ::-1]] * 5)
    until(lambda: running.pipeline.counts.paused == 5)
    assert not running.answer({"command": "resume"})["settings"]["paused"]
    running.source.put(colour("blue")[..., ::-1])
    message = running.next()
    assert (message.seq, message.predictions[0].label) == (2, "blue")
    health = json.loads(
        encode(device_health({"door": running.pipeline}, Counts(), SpoolHealth(0, 0, None, {}), None, 0.0))
    )
    jsonschema.validate(health, HEALTH)
    assert health["captured"] == 7 and health["inferred"] == 2
    assert health["dropped"] == {"behind": 0, "paused": 5} and health["in_flight"] == 0
    assert health["latency_ms"]["p99"] > 0 and health["fps"] > 0


def test_pause_of_a_file_loses_no_frame(run: Any, colour: Any) -> None:
    running = run(live=False)
    running.answer({"command": "pause"})
    running.source.put(*[colour("green")[..., ::-1]] * 20)
    running.answer({"command": "resume"})
    assert [running.next().seq for _ in range(20)] == list(range(1, 21))
    assert running.pipeline.counts.dropped == 0


def test_stop_ends_a_pause(run: Any) -> None:
    running = run(live=False)
    running.answer({"command": "pause"})
    running.stop()  # fails if it does not end


def test_pause_of_a_stream_of_sound_begins_anew_with_a_whole_window(sound_models: Path) -> None:
    """What a streaming model would say before it has heard a window again is lost to the pause, and counted so."""
    with load(sound_models / "stream.tflite") as model:
        hop, window = model.bundle.input.hop_samples, model.bundle.input.window_samples
        source = Camera(live=True)
        running = Running(model, source)
        give = lambda: source._given.put(Frame(samples=np.zeros(hop, np.float32), complete=heard >= window))  # noqa: E731
        try:
            heard = 0
            while not running.pipeline.counts.inferred:
                heard += hop
                give()
                until(lambda: source._given.empty())
                threading.Event().wait(0.02)
            running.answer({"command": "pause"})
            give()
            until(lambda: running.pipeline.counts.paused == 1)
            running.answer({"command": "resume"})
            for _ in range(window // hop + 1):
                give()
            until(lambda: running.pipeline.counts.inferred >= 2 and running.pipeline.counts.in_flight == 0)
            counts = running.pipeline.counts
            assert counts.failed == 0 and counts.paused >= window // hop - 1
        finally:
            running.stop()


def test_set_changes_what_the_next_predictions_name(run: Any, colour: Any) -> None:
    running = run()
    running.source.put(colour("red")[..., ::-1])
    assert len(running.next().predictions) == 3
    response = running.answer({"command": "set", "top_k": 1, "threshold": {"green": 1.0}, "max_fps": 1000})
    assert response["settings"] == {"paused": False, "threshold": {"green": 1.0}, "top_k": 1, "max_fps": 1000.0}
    running.source.put(colour("red")[..., ::-1], colour("green")[..., ::-1])
    assert [p.label for p in running.next().predictions] == ["red"]
    assert "green" not in [p.label for p in running.next().predictions]
    assert running.answer({"command": "set", "max_fps": None})["settings"]["max_fps"] is None


def test_set_of_max_fps_is_heard_in_the_middle_of_a_long_wait(run: Any, colour: Any) -> None:
    running = run(live=False, max_fps=0.001)
    running.source.put(*[colour("red")[..., ::-1]] * 2)
    assert running.next().seq == 1
    running.answer({"command": "set", "max_fps": None})
    assert running.next().seq == 2


def test_snapshot_is_the_newest_frame_at_most_640_wide(run: Any, colour: Any) -> None:
    running = run()
    assert "no frame yet" in running.answer({"command": "snapshot"})["error"]
    running.source.put(colour("blue", (1280, 720))[..., ::-1])
    message = running.next()
    snapshot = running.answer({"command": "snapshot"})["snapshot"]
    image = cv2.imdecode(np.frombuffer(base64.b64decode(snapshot["data"]), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (360, 640, 3) and snapshot["size_wh"] == [640, 360]
    assert np.abs(image.mean((0, 1)) - (230, 30, 30)).max() < 10
    assert snapshot["prediction"]["id"] == message.id and snapshot["captured_at"] == message.captured_at


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * 4000, "malformed"),
        (b"pause", "malformed"),
        (b"null", "malformed"),
        ({}, "missing required field `command`"),
        ({"command": "reboot"}, "Invalid value 'reboot'"),
        ({"command": "PAUSE"}, "Invalid value"),
        ({"command": "pause", "for_s": 5}, "unknown field `for_s`"),
        ({"command": "pause", "stream": "a b"}, "stream"),
        ({"command": "pause", "padding": "x" * MAX_COMMAND_BYTES}, "at most 4096 bytes"),
        ({"command": "set"}, "give one at least"),
        ({"command": "set", "threshold": 1.5}, "a score from 0 to 1"),
        ({"command": "set", "threshold": "0.5"}, "got `str`"),
        ({"command": "set", "threshold": {"red": 0.5, "rot": 0.5}}, "try red"),
        ({"command": "set", "threshold": {"x" * 3000: 0.5}}, "length"),
        ({"command": "set", "top_k": 0}, "1 or more"),
        ({"command": "set", "top_k": 10**30}, "top_k"),
        ({"command": "set", "top_k": 10**400}, "top_k"),
        ({"command": "set", "max_fps": 10**400}, "malformed"),
        ({"command": "set", "top_k": True}, "got `bool`"),
        ({"command": "set", "max_fps": 0}, "0.001 or more"),
        (b'{"command":"set","max_fps":NaN}', "malformed"),
        (b'{"command":"set","max_fps":1e999}', "malformed"),
        ({"command": "set", "top_k": 2, "threshold": 0.9, "max_fps": -1}, "max_fps"),
        ({"command": "set", "device_id": "other"}, "unknown field `device_id`"),
    ],
)
def test_wrong_command_is_answered_with_an_error_and_changes_nothing(run: Any, command: Any, error: str) -> None:
    running = run(threshold=0.25, max_fps=100.0)
    before = running.answer({"command": "ping"})["settings"]
    response = running.answer(command)
    assert not response["ok"] and error in response["error"] and len(response["error"]) <= 300
    assert response["settings"] == before


def test_retained_command_is_not_carried_out(run: Any) -> None:
    response = run().answer({"command": "pause"}, retained=True)
    assert not response["ok"] and "retain" in response["error"] and not response["settings"]["paused"]


def test_command_for_another_stream_is_left_to_it(run: Any) -> None:
    running = run()
    assert running.commands.answer(b'{"command":"pause","stream":"yard"}', retained=False) == []
    assert not running.pipeline.paused
    assert running.answer({"command": "pause", "stream": "door"})["settings"]["paused"]


def _mutated(random_: random.Random) -> bytes:
    """A command with something wrong in it, or, at times, nothing."""
    values = [
        None, True, False, 0, -1, 1, 2, 3, 1.5, 0.5, 1e-300, 1e300, 2**31, 2**63, 10**30, "", "red", "door", "é\u2028",
        [], {}, [1], {"red": 0.5}, {"red": None}, {"*": 1}, {"nobody": 0.5}, {"": 0}, "x" * 5000,
    ]  # fmt: skip
    command: Any = {
        "command": random_.choice(["ping", "pause", "resume", "set", "set", "set", "snapshot", random_.choice(values)])
    }
    for _ in range(random_.randrange(4)):
        key = random_.choice(["threshold", "top_k", "max_fps", "stream", "retain", "command", "", "Threshold"])
        command[key] = random_.choice(values)
    if random_.random() < 0.1:
        command = random_.choice([[command], {"command": command}, random_.choice(values)])
    payload = bytearray(json.dumps(command, ensure_ascii=random_.random() < 0.5).encode())
    if random_.random() < 0.5:
        for _ in range(random_.randrange(1, 4)):
            place = random_.randrange(len(payload) + 1)
            what = random_.randrange(4)
            if what == 0:
                payload[place:place] = random_.randbytes(random_.randrange(1, 4))
            elif what == 1:
                del payload[place : place + random_.randrange(1, 8)]
            elif what == 2 and place < len(payload):
                payload[place] ^= 1 << random_.randrange(8)
            else:
                payload[place:place] = payload[random_.randrange(len(payload) + 1) :][:20]
    return bytes(payload)


def test_ten_thousand_mutated_commands_crash_nothing_and_change_only_what_is_valid(
    run: Any, colour: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What a valid command would have changed is worked out by JSON Schema and the rules of the docs, not by the code
    under test."""
    caplog.set_level("CRITICAL")
    schema = jsonschema.Draft202012Validator(json_schema("command"))
    running = run(live=False)
    running.source.put(colour("red")[..., ::-1])
    running.next()
    random_ = random.Random(7)
    state: dict[str, Any] = {"paused": False, "threshold": 0.0, "top_k": 3, "max_fps": None}
    valid = refused = 0
    for _ in range(10_000):
        payload = _mutated(random_)
        answers = running.commands.answer(payload, retained=False)
        try:
            command = json.loads(payload.decode())
        except ValueError:
            command = None
        well_formed = len(payload) <= MAX_COMMAND_BYTES and schema.is_valid(command)
        if well_formed and command.get("stream") not in (None, "door"):
            assert answers == [], payload
            continue
        ok = well_formed and not _nonsense(command)
        response = json.loads(answers[0])
        if ok:
            if command["command"] in ("pause", "resume"):
                state["paused"] = command["command"] == "pause"
            state |= {name: command[name] for name in state.keys() & command.keys()}
            state["max_fps"] = None if state["max_fps"] is None else float(state["max_fps"])
        assert response["ok"] == ok, (payload, response)
        assert response["settings"] == state, (payload, response)
        valid, refused = valid + ok, refused + (not ok)
    assert valid > 500 and refused > 5000
    running.answer({"command": "resume"})
    running.answer({"command": "set", "max_fps": None})
    running.source.put(colour("red")[..., ::-1])
    assert running.next().seq == 2


def _nonsense(command: Any) -> bool:
    """Whether a command of the right form asks for what cannot be."""
    if command["command"] != "set":
        return False
    threshold = command.get("threshold", 0.5)
    scores = threshold if isinstance(threshold, dict) else {"*": threshold}
    top_k, max_fps = command.get("top_k", 1), command.get("max_fps", 1)
    return (
        not {"threshold", "top_k", "max_fps"} & command.keys()
        or any(not 0 <= score <= 1 or label not in ("*", "red", "green", "blue") for label, score in scores.items())
        or not 1 <= top_k < 2**31
        or not (max_fps is None or 0.001 <= max_fps < 2**31)
    )


@pytest.mark.parametrize("requested", ["edgekit/pi/response", "edgekit/pi/response/7/a", "ann/answers", "edgekits/x"])
def test_response_topic_that_may_be_used(requested: str) -> None:
    assert response_topic(requested, "pi") == requested


@pytest.mark.parametrize(
    "requested",
    [
        "", "a/#", "+/a", "$SYS/broker", "$share/g/a", "a\0b", "x" * 300, "\ud800",
        "edgekit", "edgekit/pi/command", "edgekit/other/command", "edgekit/pi/door/prediction", "edgekit/pi/status",
        "edgekit/other/response/1", "edgekit/pi/responses", "homeassistant/status", "homeassistant/device/pi/config",
    ],
)  # fmt: skip
def test_response_topic_that_would_speak_for_others_is_refused(requested: str) -> None:
    assert response_topic(requested, "pi") is None


def test_response_topic_of_another_prefix() -> None:
    assert response_topic("site/7/pi/response", "pi", prefix="site/7") == "site/7/pi/response"
    assert response_topic("site/7/pi/command", "pi", prefix="site/7") is None


class Caller:
    """Asks a device over MQTT 5, as anyone would."""

    def __init__(self, port: int) -> None:
        self._answers: queue.SimpleQueue[paho.MQTTMessage] = queue.SimpleQueue()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = lambda _client, _userdata, message: self._answers.put(message)
        self._client.connect("127.0.0.1", port)
        self._client.subscribe("edgekit/pi/response/me")
        self._client.loop_start()

    def ask(self, command: bytes, number: bytes, timeout_s: float = 10.0) -> dict[str, Any]:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic, properties.CorrelationData = "edgekit/pi/response/me", number
        self._client.publish("edgekit/pi/command", command, qos=1, properties=properties)
        answer = self._answers.get(timeout=timeout_s)
        assert answer.properties.CorrelationData == number
        response: dict[str, Any] = json.loads(answer.payload)
        jsonschema.validate(response, RESPONSE)
        return response

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def asked(models: Path, video: Path, broker: Any) -> Iterator[Callable[..., Caller]]:
    """Starts a run that goes on for ever, and a caller."""
    stop, ends = threading.Event(), []

    def start(**options: Any) -> Caller:
        begun = threading.Event()
        running = threading.Thread(
            target=edgekit.run,
            args=(models / "int8.tflite", str(video)),
            kwargs={
                "broker": broker.url, "device_id": "pi", "loop": True, "max_fps": 50.0, "stop": stop,
                "on_prediction": lambda _: begun.set(), **options,
            },
        )  # fmt: skip
        running.start()
        caller = Caller(broker.port)
        ends.extend((caller.close, running.join))
        assert begun.wait(20)
        return caller

    yield start
    stop.set()
    for end in ends:
        end()


def test_commands_over_mqtt_are_answered_with_their_correlation_data(asked: Any) -> None:
    caller = asked()
    assert caller.ask(b'{"command":"ping"}', b"1")["ok"]
    assert caller.ask(b'{"command":"set","max_fps":25,"top_k":1}', b"2")["settings"]["max_fps"] == 25
    assert caller.ask(b'{"command":"pause"}', b"3")["settings"]["paused"]
    assert "malformed" in caller.ask(b"{", b"4")["error"]
    assert not caller.ask(b'{"command":"resume"}', b"5")["settings"]["paused"]
    assert caller.ask(b'{"command":"snapshot"}', b"6")["snapshot"]["size_wh"] == [64, 48]


def test_settings_that_numpy_calculated_are_answered(asked: Any) -> None:
    caller = asked(threshold={"red": np.float32(0.5)}, top_k=np.int64(2), max_fps=np.float64(40))
    settings = caller.ask(b'{"command":"ping"}', b"1")["settings"]
    assert settings == {"paused": False, "threshold": {"red": 0.5}, "top_k": 2, "max_fps": 40.0}


def test_commands_that_are_turned_off_are_not_answered(asked: Any) -> None:
    with pytest.raises(queue.Empty):
        asked(commands=False).ask(b'{"command":"ping"}', b"1", timeout_s=1)

"""A device that changes while it runs: bundles, its configuration, delegates."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from edgekit.devices.upkeep import Upkeep
from edgekit.errors import SourceError

sys.path.insert(0, str(Path(__file__).parent))
from network_camera import NetworkCamera
from running import Running, of_stream, replace, settings


def seqs(run: Running, stream: str = "main") -> dict[str, list[int]]:
    """Of each boot."""
    of_boot: dict[str, list[int]] = {}
    for prediction in run.predictions.copy():
        if prediction.stream == stream:
            of_boot.setdefault(prediction.boot_id, []).append(prediction.seq)
    return of_boot


@pytest.fixture
def hear(until: Any) -> Iterator[Callable[..., list[tuple[str, Any]]]]:
    """Subscribes to all that devices say at a broker: a list that grows."""
    clients = []

    def subscribe(broker: Any) -> list[tuple[str, Any]]:
        heard: list[tuple[str, Any]] = []
        client, there = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5), threading.Event()

        def on_message(_client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
            payload = message.payload.decode()
            heard.append((message.topic, json.loads(payload) if payload[:1] == "{" else payload))

        client.on_message, client.on_subscribe = on_message, lambda *_: there.set()
        client.connect("127.0.0.1", broker.port)
        client.subscribe("edgekit/#", 1)
        client.loop_start()
        clients.append(client)
        assert there.wait(10)
        return heard

    yield subscribe
    for client in clients:
        client.disconnect()
        client.loop_stop()


def end(run: Running, heard: list[tuple[str, Any]], until: Any) -> None:
    """Ends the run, and waits for its last word."""
    run.end()
    assert not run.error and run.counts.in_flight == 0 and run.counts.inferred == len(run.predictions)
    until(lambda: "offline" in [payload for _, payload in heard[-3:]])


def goes_on(run: Running, until: Any) -> None:
    seen = len(run.predictions)
    until(lambda: len(run.predictions) > seen + 3)


def events(messages: list[tuple[str, Any]]) -> list[tuple[str, str, str]]:
    """Of the messages that a subscriber received: what began or ended, and its id; each begin has one end."""
    found = [payload for to, payload in messages if to.endswith("/event")]
    open_: set[str] = set()
    for event in found:
        assert (event["event"] == "end") == (event["event_id"] in open_)
        open_ ^= {event["event_id"]}
    assert not open_
    return [(event["stream"], event["event"], event["label"]) for event in found]


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_changed_bundle_is_taken_between_two_frames_and_a_bad_one_is_refused(
    models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    bundle = tmp_path / "bundle.tflite"
    shutil.copyfile(models / "float32.tflite", bundle)
    received = broker.subscribe("edgekit/pi/info", "-C", "2", "-W", "20")
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker=broker.url, device_id="pi")
    until(lambda: run.predictions)
    first = run.predictions[0].bundle.sha256
    bad = tmp_path / "bad.bin"
    bad.write_bytes((models / "int8.tflite").read_bytes()[:-1000])
    replace(bad, bundle)
    until(lambda: "refused, and stream main goes on as it was" in caplog.text)
    assert run.predictions[-1].bundle.sha256 == first
    replace(models / "int8.tflite", bundle)
    until(lambda: run.predictions[-1].bundle.sha256 != first)
    count = len(run.predictions)
    until(lambda: len(run.predictions) > count + 5)
    infos = [payload["streams"]["main"]["bundle"]["sha256"] for _, payload in received()]
    run.end()
    assert infos == [first, run.predictions[-1].bundle.sha256]
    assert [p.seq for p in run.predictions] == list(range(1, len(run.predictions) + 1))
    assert caplog.text.count("refused, and stream") == 1


def test_bundle_for_another_task_is_refused(
    models: Path, sound_models: Path, red: Path, tmp_path: Path, running: Any, until: Any, caplog: Any
) -> None:
    bundle = tmp_path / "bundle.tflite"
    shutil.copyfile(models / "float32.tflite", bundle)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker="none")
    until(lambda: run.predictions)
    replace(sound_models / "window.tflite", bundle)
    until(lambda: "is for another task: expected one of images, got one of sound" in caplog.text)
    count = len(run.predictions)
    until(lambda: len(run.predictions) > count + 3)


def test_command_that_comes_while_a_bundle_loads_stays_in_force(
    models: Path, red: Path, tmp_path: Path, running: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, load = tmp_path / "bundle.tflite", Upkeep._load
    shutil.copyfile(models / "float32.tflite", bundle)

    def load_meanwhile(upkeep: Upkeep, config: Any, of: Any, stream: Any, streams: int) -> Any:
        model = load(upkeep, config, of, stream, streams)
        stream.pipeline.change(top_k=1)
        return model

    monkeypatch.setattr(Upkeep, "_load", load_meanwhile)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker="none")
    until(lambda: run.predictions)
    first = run.predictions[0].bundle.sha256
    replace(models / "int8.tflite", bundle)
    until(lambda: run.predictions[-1].bundle.sha256 != first)
    goes_on(run, until)
    assert {len(p.predictions) for p in run.predictions if p.bundle.sha256 != first} == {1}


def test_bundle_whose_labels_the_settings_do_not_fit_is_refused(
    models: Path, red: Path, tmp_path: Path, running: Any, until: Any, caplog: Any, broker: Any
) -> None:
    """It would not start with them either."""
    bundle, labels = tmp_path / "bundle.tflite", tmp_path / "labels.txt"
    shutil.copyfile(models / "int8.tflite", bundle)
    labels.write_text("red\ngreen\nblue\n")
    options = {"source": str(red), "loop": True, "max_fps": 100, "labels": labels}
    by_threshold = running(bundle=bundle, **options, broker="none", threshold={"red": 0.5})
    by_group = running(bundle=bundle, **options, broker=broker.url, label_groups=["warm=red"])
    until(lambda: by_threshold.predictions and by_group.predictions)
    labels.write_text("crimson\ngreen\nblue\n")
    until(lambda: caplog.text.count("refused, and stream main goes on as it was") == 2)
    assert "label group warm: 'red': expected a label of the model" in caplog.text
    goes_on(by_threshold, until)
    assert by_threshold.labels()[-1] == "red" == by_group.labels()[-1]


def test_bundle_that_is_gone_is_told_once_and_one_that_is_the_same_is_not_taken_anew(
    models: Path, red: Path, tmp_path: Path, running: Any, until: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "edgekit")
    bundle = tmp_path / "bundle.tflite"
    shutil.copyfile(models / "int8.tflite", bundle)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=200, broker="none")
    until(lambda: run.predictions)
    bundle.unlink()
    until(lambda: "No such file" in caplog.text)
    shutil.copyfile(models / "int8.tflite", bundle)
    os.utime(bundle, (0, 0))
    for _ in range(5):
        goes_on(run, until)
    assert caplog.text.count("No such file") == 1 and "from now on" not in caplog.text


def test_bundle_that_changes_while_it_is_loaded_is_taken(
    models: Path, red: Path, tmp_path: Path, running: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.devices import device

    bundle, read = tmp_path / "bundle.tflite", device.read_bundle
    shutil.copyfile(models / "int8.tflite", bundle)

    def read_and_change(config: Any) -> Any:
        found = read(config)
        replace(models / "float32.tflite", bundle)
        return found

    monkeypatch.setattr(device, "read_bundle", read_and_change)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker="none")
    until(lambda: run.predictions and run.predictions[-1].bundle.name == "float32")
    assert run.predictions[0].bundle.name == "int8"


def test_model_compiled_for_coral_is_looked_at_when_it_comes(
    models: Path, red: Path, tmp_path: Path, running: Any, until: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "edgekit")
    bundle = tmp_path / "bundle.tflite"
    shutil.copyfile(models / "int8.tflite", bundle)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker="none")
    until(lambda: run.predictions)
    shutil.copyfile(models / "int8.tflite", tmp_path / "bundle_edgetpu.tflite")
    until(lambda: "from now on bundle int8" in caplog.text)
    goes_on(run, until)


def test_bundle_is_taken_after_a_pause_as_it_is_then_and_with_what_commands_have_set(
    models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    """Another one, and again the first: while a file waits none is taken."""
    caplog.set_level(logging.INFO, "edgekit")
    bundle, command = tmp_path / "bundle.tflite", "edgekit/pi/command"
    shutil.copyfile(models / "int8.tflite", bundle)
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=100, broker=broker.url, device_id="pi")
    until(lambda: run.predictions)
    first = run.predictions[0].bundle.sha256
    broker.publish(command, {"command": "set", "top_k": 1}, {"command": "pause"})
    until(lambda: "paused" in caplog.text)
    for other in ("float32", "int8", "float32"):
        loaded = caplog.text.count("passed over")
        replace(models / f"{other}.tflite", bundle)
        until(lambda: caplog.text.count("passed over") > loaded)  # noqa: B023
    count = len(run.predictions)
    broker.publish(command, {"command": "resume"})
    until(lambda: len(run.predictions) > count + 3)
    assert {p.bundle.sha256 for p in run.predictions[count + 1 :]}.isdisjoint({first})
    assert all(len(p.predictions) == 1 for p in run.predictions[count + 1 :])


def test_many_bundles_leave_nothing_behind(
    models: Path,
    red: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: Any,
    until: Any,
    broker: Any,
    hear: Any,
) -> None:
    from edgekit.devices.delegates.backend import Interpreted

    def open_files() -> int:
        count = 0
        for descriptor in range(1024):
            with suppress(OSError):
                os.fstat(descriptor)
                count += 1
        return count

    bundle, closed = tmp_path / "bundle.tflite", []
    close = Interpreted.close
    monkeypatch.setattr(Interpreted, "close", lambda one: (closed.append(one._interpreter is None), close(one)))
    shutil.copyfile(models / "int8.tflite", bundle)
    heard = hear(broker)
    threads, files = threading.active_count(), open_files()
    run = running(bundle=bundle, source=str(red), loop=True, max_fps=200, broker=broker.url, device_id="pi")
    until(lambda: run.predictions)
    for number in range(12):
        replace(models / ("float32.tflite", "int8.tflite")[number % 2], bundle)
        until(lambda: run.predictions[-1].bundle.name == ("float32", "int8")[number % 2])  # noqa: B023
    end(run, heard, until)
    assert closed == [False] * 13, "each once"
    assert (threading.active_count(), open_files()) == (threads, files)
    assert events(heard) == [("main", what, "red") for what in ("begin", "end") * 13]
    assert list(seqs(run).values()) == [list(range(1, len(run.predictions) + 1))]


# -- the configuration -------------------------------------------------------------------------------------------------


def test_reload_changes_adds_and_removes_streams_and_keeps_the_others(
    models: Path, red: Path, blue: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    config.write_text(
        settings(broker.url, of_stream("a", model, red), of_stream("b", model, red), of_stream("c", model, red))
    )
    run = running(config=config)
    until(lambda: {p.stream for p in run.predictions.copy()} == {"a", "b", "c"})
    config.write_text(
        settings(
            broker.url,
            of_stream("a", model, red, "top_k = 1"),
            of_stream("b", model, blue),
            of_stream("d", model, blue),
        )
    )
    run.reload.set()
    until(lambda: "blue" in run.labels("b") and "blue" in run.labels("d"))
    until(lambda: len([p for p in run.predictions.copy() if p.stream == "a"][-1].predictions) == 1)
    seen = len(run.predictions)
    until(lambda: len(run.predictions) > seen + 20)
    assert "c" not in {p.stream for p in run.predictions[seen + 3 :]}
    run.end()
    of_a = [p for p in run.predictions if p.stream == "a"]
    assert [p.seq for p in of_a] == list(range(1, len(of_a) + 1))  # it was never interrupted
    of_b = {p.boot_id: [] for p in run.predictions if p.stream == "b"}
    for p in run.predictions:
        if p.stream == "b":
            of_b[p.boot_id].append(p.seq)
    assert len(of_b) == 2 and all(seqs == list(range(1, len(seqs) + 1)) for seqs in of_b.values())
    assert run.counts.captured == run.counts.inferred == len(run.predictions)
    retained = dict(broker.subscribe("edgekit/#", "-W", "1")())
    assert {to for to in retained if to.endswith("/state")} == {f"edgekit/pi/{name}/state" for name in "abd"}


def test_reload_of_a_wrong_configuration_changes_nothing(
    models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    config.write_text(settings(broker.url, of_stream("a", model, red)))
    run = running(config=config)
    until(lambda: run.predictions)
    for number, wrong in enumerate(("treshold = 0.5", 'labels = "none.txt"', "threshold = { purple = 0.5 }"), 1):
        config.write_text(settings(broker.url, of_stream("a", model, red, wrong)))
        run.reload.set()
        until(lambda: caplog.text.count("the configuration before stays in force") == number)  # noqa: B023
    count = len(run.predictions)
    until(lambda: len(run.predictions) > count + 3)
    assert len({p.boot_id for p in run.predictions}) == 1


def test_reload_that_concerns_the_device_starts_it_anew(
    models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any
) -> None:
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    config.write_text(settings(broker.url, of_stream("a", model, red)))
    run = running(config=config)
    until(lambda: run.predictions)
    config.write_text(settings(broker.url, of_stream("a", model, red)).replace('"pi"', '"pi-5"'))
    run.reload.set()
    until(lambda: run.predictions[-1].device == "pi-5")
    run.end()
    retained = dict(broker.subscribe("edgekit/+/status", "-W", "1")())
    assert retained == {"edgekit/pi/status": "offline", "edgekit/pi-5/status": "offline"}
    assert run.counts.inferred == len(run.predictions)


def test_only_stream_takes_another_source_or_another_name_and_the_run_goes_on(
    models: Path, red: Path, blue: Path, tmp_path: Path, broker: Any, hear: Any, running: Any, until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("edgekit.devices.publish.publisher.HEALTH_S", 0.02)
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    heard = hear(broker)
    config.write_text(settings(broker.url, of_stream("a", model, red)))
    run = running(config=config)
    until(lambda: run.labels("a"))
    broker.publish("edgekit/pi/command", {"command": "pause"}, {"command": "resume"})
    for name, source, label in (("a", blue, "blue"), ("b", red, "red")):
        config.write_text(settings(broker.url, of_stream(name, model, source)))
        run.reload.set()
        until(lambda: label in run.labels(name))  # noqa: B023
    end(run, heard, until)
    assert events(heard) == [
        ("a", "begin", "red"), ("a", "end", "red"), ("a", "begin", "blue"), ("a", "end", "blue"),
        ("b", "begin", "red"), ("b", "end", "red"),
    ]  # fmt: skip
    healths = [payload for to, payload in heard if to.endswith("/health")]
    assert {*healths[0]["streams"], *healths[-1]["streams"]} == {"a", "b"}
    for count in ("captured", "inferred"):
        counted = [health[count] for health in healths]
        assert counted == sorted(counted), "none is forgotten"
    assert healths[-1]["inferred"] > healths[-1]["streams"]["b"]["inferred"]


def test_reload_that_cannot_open_a_source_changes_nothing(
    models: Path, red: Path, blue: Path, tmp_path: Path, running: Any, until: Any, caplog: Any
) -> None:
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    config.write_text(settings("none", of_stream("a", model, red), of_stream("b", model, red)))
    run = running(config=config)
    until(lambda: run.labels("a") and run.labels("b"))
    config.write_text(
        settings(
            "none",
            of_stream("a", models / "float32.tflite", red, "top_k = 1"),
            of_stream("c", model, blue),
            of_stream("d", model, tmp_path / "nowhere.png"),
        )
    )
    run.reload.set()
    until(lambda: "nowhere.png' does not exist" in caplog.text)
    seen = len(run.predictions)
    goes_on(run, until)
    assert {(p.stream, len(p.predictions), p.bundle.name) for p in run.predictions[seen:]} <= {
        ("a", 3, "int8"), ("b", 3, "int8"),
    }  # fmt: skip
    assert len(seqs(run, "a")) == len(seqs(run, "b")) == 1


def test_reload_with_a_certificate_that_is_none_changes_nothing(
    models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    config, stream = tmp_path / "edgekit.toml", of_stream("a", models / "int8.tflite", red)
    config.write_text(settings(broker.url, stream))
    run = running(config=config)
    until(lambda: run.predictions)
    (tmp_path / "ca.pem").write_text("none")
    config.write_text(settings(broker.url.replace("mqtt:", "mqtts:"), 'cafile = "ca.pem"', stream))
    run.reload.set()
    until(lambda: "ca.pem" in caplog.text and "the configuration before stays in force" in caplog.text)
    goes_on(run, until)
    assert len(seqs(run, "a")) == 1


def test_stream_that_is_paused_stays_so_with_another_source(
    models: Path, red: Path, blue: Path, tmp_path: Path, broker: Any, running: Any, until: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "edgekit")
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    config.write_text(settings(broker.url, of_stream("a", model, red)))
    run = running(config=config)
    until(lambda: run.predictions)
    broker.publish("edgekit/pi/command", {"command": "pause"})
    until(lambda: "paused" in caplog.text)
    config.write_text(settings(broker.url, of_stream("a", model, blue)))
    run.reload.set()
    until(lambda: "the configuration was read again" in caplog.text)
    time.sleep(0.3)
    assert "blue" not in run.labels("a")
    broker.publish("edgekit/pi/command", {"command": "resume"})
    until(lambda: "blue" in run.labels("a"))


def test_stream_that_has_ended_runs_again_when_its_configuration_changes(
    models: Path, red: Path, blue: Path, tmp_path: Path, running: Any, until: Any
) -> None:
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    others, once = of_stream("a", model, red), of_stream("once", model, red, "top_k = 2").replace("loop = true", "")
    config.write_text(settings("none", others, once))
    run = running(config=config)
    until(lambda: run.labels("once"))
    for text, predicted in ((once, 1), (once.replace("top_k = 2", "top_k = 1"), 2)):
        config.write_text(settings("none", others, text))
        run.reload.set()
        until(lambda: not run.reload.is_set() and len(run.labels("once")) == predicted)  # noqa: B023
        goes_on(run, until)
    assert len(run.labels("once")) == 2 and len(seqs(run, "a")) == 1


def test_upkeep_that_fails_is_told_once(
    models: Path, red: Path, running: Any, until: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.devices.interpreter import Model

    tended: list[Model] = []

    def tend(model: Model) -> None:
        tended.append(model)
        raise RuntimeError("no more")

    monkeypatch.setattr(Model, "tend", tend)
    run = running(bundle=models / "int8.tflite", source=str(red), loop=True, max_fps=50, broker="none")
    until(lambda: len(tended) > 3)
    goes_on(run, until)
    assert caplog.text.count("upkeep failed (RuntimeError: no more)") == 1 and "Traceback" not in caplog.text


@pytest.fixture
def cameras(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[NetworkCamera]]:
    monkeypatch.setattr("edgekit.devices.sources.frames.RETRY_S", 0.05)
    cameras = [NetworkCamera(), NetworkCamera()]
    for camera in cameras:
        camera.start()
    yield cameras
    for camera in cameras:
        camera.kill()


def test_streams_exchange_their_cameras_which_only_one_may_have(
    models: Path, tmp_path: Path, cameras: list[NetworkCamera], running: Any, until: Any, caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from edgekit.devices.sources import images as sources

    opener, taken = sources.camera_opener, set()

    def exclusive(spec: str, hints: Any) -> Callable[[], Any]:
        def open_camera() -> Any:
            if spec in taken:
                raise SourceError(f"source {spec} is busy")
            taken.add(spec)
            camera = opener(spec, hints)()
            close = camera.close
            camera.close = lambda: (close(), taken.remove(spec))
            return camera

        return open_camera

    monkeypatch.setattr(sources, "camera_opener", exclusive)
    config, model = tmp_path / "edgekit.toml", models / "int8.tflite"
    one, other = (camera.url for camera in cameras)
    config.write_text(settings("none", of_stream("a", model, one), of_stream("b", model, other)))
    run = running(config=config)
    until(lambda: run.labels("a") and run.labels("b"))
    config.write_text(settings("none", of_stream("a", model, other), of_stream("b", model, one)))
    run.reload.set()
    until(lambda: len(seqs(run, "a")) == len(seqs(run, "b")) == 2)
    run.end()
    assert not taken and "busy" not in caplog.text
    assert run.counts.in_flight == 0 and run.counts.inferred == len(run.predictions)


def test_label_ends_where_its_camera_was_lost(
    models: Path, tmp_path: Path, cameras: list[NetworkCamera], broker: Any, hear: Any, running: Any, until: Any
) -> None:
    """What was held may have ended in the gap."""
    heard = hear(broker)
    camera = cameras[0]
    camera.black = True
    run = running(bundle=models / "int8.tflite", source=camera.url, max_fps=50, broker=broker.url, device_id="pi")
    for _ in range(2):
        seen = len(run.predictions)
        until(lambda: len(run.predictions) > seen + 3)  # noqa: B023
        camera.kill()
        time.sleep(0.3)
        camera.start()
    seen = len(run.predictions)
    until(lambda: len(run.predictions) > seen + 3)
    end(run, heard, until)
    assert [what for _, what, _ in events(heard)] == ["begin", "end"] * 3 and run.counts.gaps == 2


@pytest.mark.parametrize("wrong", ["spool", "broker"])
def test_device_that_cannot_start_anew_goes_back_to_what_it_was(
    models: Path, red: Path, tmp_path: Path, broker: Any, mosquitto: Any, running: Any, until: Any, caplog: Any,
    wrong: str,
) -> None:  # fmt: skip
    config, stream = tmp_path / "edgekit.toml", of_stream("a", models / "int8.tflite", red)
    config.write_text(settings(broker.url, stream))
    run = running(config=config)
    until(lambda: run.predictions)
    if wrong == "spool":
        config.write_text(f'spool = "{red}"\n' + settings(broker.url, stream))
    else:
        config.write_text(settings(mosquitto("allow_anonymous false").url, stream))
    run.reload.set()
    until(lambda: "the configuration before comes back into force" in caplog.text)
    goes_on(run, until)
    config.write_text(settings(broker.url, stream).replace('"pi"', '"pi-5"'))
    run.reload.set()
    until(lambda: run.predictions[-1].device == "pi-5")
    run.end()
    assert not run.error and run.counts.inferred == len(run.predictions)


def test_device_whose_broker_is_gone_starts_anew_with_another_one(
    models: Path, red: Path, tmp_path: Path, broker: Any, hear: Any, mosquitto: Any, running: Any, until: Any
) -> None:
    """What the one before did not take is kept for the other."""
    config, stream = tmp_path / "edgekit.toml", of_stream("a", models / "int8.tflite", red)
    config.write_text(settings(broker.url, stream))
    run = running(config=config)
    until(lambda: run.predictions)
    broker.kill()
    goes_on(run, until)
    other = mosquitto()
    heard = hear(other)
    config.write_text(settings(other.url, stream))
    run.reload.set()
    until(lambda: len(seqs(run, "a")) == 2)
    goes_on(run, until)
    end(run, heard, until)
    broker.start()
    arrived = {payload["id"] for to, payload in heard if to.endswith("/prediction")}
    assert {p.id for p in run.predictions[-3:]} < arrived
    assert any(payload.startswith(run.predictions[0].boot_id) for payload in arrived)


def test_systemd_is_told_what_goes_on(
    models: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: Any, until: Any
) -> None:
    """STOPPING=1 only at the end: systemd would kill what goes on after it."""
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

        def listen() -> None:
            while told[-1:] != ["the end"]:
                told.append(listener.recv(4096).decode().split("=1")[0])

        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        config, stream = tmp_path / "edgekit.toml", of_stream("a", models / "int8.tflite", red)
        for broken, text in ((False, stream), (False, stream.replace("50", "60")), (True, "x"), (False, stream)):
            config.write_text(settings("none", text).replace("pi", "pi-5" if told and text == stream else "pi"))
            if not told:
                run = running(config=config)
            else:
                count = told.count("READY")
                run.reload.set()
                until(lambda: told.count("READY") > count)  # noqa: B023
            until(lambda: told[-1:] == ["WATCHDOG"])
            assert broken or run.predictions
        run.end()
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"the end", str(tmp_path / "notify"))
        listening.join(10)
    assert [what for what in told if what.isupper() and what != "WATCHDOG"] == [
        "READY", "RELOADING", "READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING",
    ]  # fmt: skip


def test_storm_of_reloads_and_bundles_loses_nothing(
    models: Path, red: Path, blue: Path, tmp_path: Path, cameras: list[NetworkCamera], broker: Any, hear: Any,
    running: Any, until: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("edgekit.devices.publish.publisher.HEALTH_S", 0.02)
    config, bundle, chance = tmp_path / "edgekit.toml", tmp_path / "bundle.tflite", random.Random(0)
    heard = hear(broker)
    shutil.copyfile(models / "int8.tflite", bundle)

    def write() -> None:
        streams = [
            of_stream(name, bundle, chance.choice([red, blue, cameras[0].url, cameras[1].url]))
            for name in chance.sample("abcd", chance.randint(1, 3))
        ]
        text = settings(broker.url, *streams)
        config.write_text(text if chance.random() < 0.8 else text[: chance.randrange(len(text))])

    config.write_text(settings(broker.url, of_stream("a", bundle, red)))
    run = running(config=config)
    until(lambda: run.predictions)
    for number in range(40):
        write()
        run.reload.set()
        if number % 3 == 0:
            replace(models / chance.choice(["float32.tflite", "int8.tflite"]), bundle)
        if number % 10 == 0:
            broker.publish("edgekit/pi/command", {"command": chance.choice(["pause", "resume"])})
        time.sleep(chance.uniform(0, 0.15))
    config.write_text(settings(broker.url, of_stream("a", bundle, red), of_stream("d", bundle, blue)))
    broker.publish("edgekit/pi/command", {"command": "resume"})
    run.reload.set()
    goes_on(run, until)
    end(run, heard, until)
    events(heard)
    numbers: dict[str, list[int]] = {}
    for to, payload in heard:
        if to.endswith("/prediction"):
            numbers.setdefault(payload["stream"] + payload["boot_id"], []).append(payload["seq"])
    assert sum(map(len, numbers.values())) == run.counts.inferred
    assert all(of_boot == list(range(1, len(of_boot) + 1)) for of_boot in numbers.values())
    before: dict[str, Any] = {"captured": 0, "inferred": 0}
    for health in [payload for to, payload in heard if to.endswith("/health")]:
        for one in (health, *health["streams"].values()):
            parts = [one["inferred"], *one["dropped"].values(), one["failed"], one["in_flight"]]
            assert one["captured"] == sum(parts) and min(parts) >= 0
        assert all(health[count] >= before[count] for count in ("captured", "inferred"))
        before = health

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import edgekit
from edgekit.errors import BrokerError, EdgekitError

SCHEMAS = {
    name: json.loads(resources.files("edgekit").joinpath(f"schemas/{name}.json").read_text())
    for name in ("prediction", "event", "state", "info", "health")
}


def start_run(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgekit", "run", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_video_arrives_whole_in_order_and_within_the_schemas(models: Path, video: Path, broker: Any) -> None:
    received = broker.subscribe("edgekit/pi/#", "-C", str(90 + 3 + 6 + 4))
    # so slowly that no state is overtaken by the next one
    counts = edgekit.run(
        models / "int8.tflite", str(video), broker=broker.url, device_id="pi", stream="door", max_fps=300
    )
    messages = received()
    assert (counts.captured, counts.inferred, counts.failed, counts.dropped, counts.in_flight) == (90, 90, 0, 0, 0)
    assert messages[0] == ("edgekit/pi/status", "online") and messages[-1] == ("edgekit/pi/status", "offline")
    by_kind: dict[str, list[Any]] = {}
    for topic, payload in messages:
        kind = topic.rpartition("/")[2]
        by_kind.setdefault(kind, []).append(payload)
        if kind != "status":
            jsonschema.validate(payload, SCHEMAS[kind])
    predictions = by_kind["prediction"]
    assert [p["seq"] for p in predictions] == list(range(1, 91))
    assert [p["input"] for p in predictions] == [{"file": video.name, "frame": n} for n in range(90)]
    assert [p["predictions"][0]["label"] for p in predictions] == ["red"] * 30 + ["green"] * 30 + ["blue"] * 30
    assert len({p["boot_id"] for p in predictions}) == 1 and len({p["id"] for p in predictions}) == 90
    assert [p["captured_at"] for p in predictions] == sorted(p["captured_at"] for p in predictions)
    assert [state["label"] for state in by_kind["state"]] == ["red", "green", "blue"]
    events = [(event["event"], event["label"]) for event in by_kind["event"]]
    assert events == [(what, label) for label in ("red", "green", "blue") for what in ("begin", "end")]
    assert len({event["event_id"] for event in by_kind["event"]}) == 3
    (health,) = by_kind["health"]
    assert health["captured"] == sum(
        (health["inferred"], *health["dropped"].values(), health["failed"], health["in_flight"])
    )
    (info,) = by_kind["info"]
    assert info["streams"]["door"]["bundle"] == predictions[0]["bundle"]


def test_what_is_retained_tells_who_comes_later(models: Path, frames: Path, broker: Any) -> None:
    edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi", stream="door")
    retained = dict(broker.subscribe("edgekit/#", "-W", "1")())
    assert set(retained) == {"edgekit/pi/status", "edgekit/pi/info", "edgekit/pi/door/state"}
    assert retained["edgekit/pi/status"] == "offline" and retained["edgekit/pi/door/state"]["label"] == "blue"


def test_threshold_leaves_classes_out_but_no_seq(models: Path, frames: Path, broker: Any) -> None:
    received = broker.subscribe("edgekit/pi/main/+", "-C", "7")  # there is no event
    edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi", threshold=1.0)
    messages = received()
    predictions = [payload for topic, payload in messages if topic.endswith("prediction")]
    assert [(p["seq"], p["predictions"]) for p in predictions] == [(n, []) for n in range(1, 7)]
    (state,) = [payload for topic, payload in messages if topic.endswith("state")]
    assert state["label"] is None


def test_unreadable_image_is_counted_and_skipped(
    models: Path, frames: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(frames, tmp_path / "frames")
    (folder / "3-broken.png").write_bytes(b"\x89PNG")
    seqs: list[int] = []
    counts = edgekit.run(
        models / "int8.tflite", str(folder), broker="none", on_prediction=lambda message: seqs.append(message.seq)
    )
    assert (counts.captured, counts.inferred, counts.failed) == (7, 6, 1) and seqs == [1, 2, 3, 4, 5, 6]
    assert "3-broken.png is not a readable image" in caplog.text


def test_stream_gives_the_same_predictions_as_load(models: Path, video: Path) -> None:
    messages = list(edgekit.stream(models / "float32.tflite", str(video), device_id="pi", top_k=1))
    assert len(messages) == 90 and all(len(message.predictions) == 1 for message in messages)
    assert [message.predictions[0].label for message in messages[::30]] == ["red", "green", "blue"]


def test_max_fps_paces(models: Path, frames: Path) -> None:
    started_s = time.monotonic()
    assert len(list(edgekit.stream(models / "int8.tflite", str(frames), max_fps=20))) == 6
    assert time.monotonic() - started_s >= 5 / 20


@pytest.mark.parametrize("options", [{"threshold": 1.1}, {"threshold": float("nan")}, {"top_k": 0}, {"max_fps": 0}])
def test_setting_out_of_range_is_refused(models: Path, frames: Path, options: Any) -> None:
    with pytest.raises(EdgekitError, match="expected"):
        list(edgekit.stream(models / "int8.tflite", str(frames), **options))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_ends_the_run_with_offline(
    models: Path, video: Path, broker: Any, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    run = start_run(
        models / "int8.tflite", "--source", video, "--loop", "--max-fps", "50", "--device-id", "pi",
        "--broker", broker.url, cwd=tmp_path,
    )  # fmt: skip
    assert len(broker.subscribe("edgekit/pi/main/prediction", "-C", "1")()) == 1
    following = broker.subscribe("edgekit/pi/#", "-W", "6")
    assert len(broker.subscribe("edgekit/pi/main/prediction", "-C", "20")()) == 20
    run.send_signal(number)
    _, log = run.communicate(timeout=10)
    assert run.returncode == status and "Traceback" not in log
    messages = following()
    assert messages[-1] == ("edgekit/pi/status", "offline")
    inferred = int(log.split(" inferred")[0].split()[-1])
    assert max(p["seq"] for topic, p in messages if topic.endswith("prediction")) == inferred


def test_last_will_says_offline_when_the_runtime_is_killed(
    models: Path, video: Path, broker: Any, tmp_path: Path
) -> None:
    run = start_run(
        models / "int8.tflite", "--source", video, "--loop", "--device-id", "pi", "--broker", broker.url, cwd=tmp_path
    )
    status = broker.subscribe("edgekit/pi/status", "-C", "2", "-W", "20")
    broker.subscribe("edgekit/pi/main/prediction", "-C", "5")()
    run.kill()
    run.communicate()
    assert [payload for _, payload in status()] == ["online", "offline"]


def test_broker_that_restarts_costs_no_prediction(
    models: Path, video: Path, mosquitto: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The broker keeps its sessions on disk, so the subscriber hears all that it ever acknowledged."""
    folder = tmp_path_factory.mktemp("persistence")
    folder.chmod(0o777)
    folder.parent.chmod(0o755)
    broker = mosquitto("allow_anonymous true", "persistence true", f"persistence_location {folder}/", "user root")
    received = broker.subscribe("edgekit/pi/main/prediction", "-c", "-i", "hears-all", "-W", "8")

    def restart() -> None:
        time.sleep(0.5)
        broker.stop()
        time.sleep(0.5)
        broker.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    counts = edgekit.run(models / "int8.tflite", str(video), broker=broker.url, device_id="pi", max_fps=45)
    restarting.join()
    assert counts.inferred == 90
    assert sorted({payload["seq"] for _, payload in received()}) == list(range(1, 91))


def test_broker_that_stays_away_at_the_end_is_an_error_with_a_number(
    models: Path, frames: Path, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.devices.publish.publisher.CLOSE_TIMEOUT_S", 1.0)
    seen: list[int] = []

    def pause(message: Any) -> None:
        seen.append(message.seq)
        if message.seq == 1:
            broker.pause()

    with pytest.raises(BrokerError, match=r"has not acknowledged [1-9]\d* messages"):
        edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi", on_prediction=pause)
    assert len(seen) == 6


def test_broker_that_refuses_what_is_published_is_an_error(
    models: Path, frames: Path, mosquitto: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rules = tmp_path_factory.mktemp("acl") / "acl"
    rules.write_text("topic read edgekit/#\ntopic write edgekit/+/status\ntopic write edgekit/+/info\n")
    rules.chmod(0o644)
    broker = mosquitto("allow_anonymous true", f"acl_file {rules}", "user root")
    with pytest.raises(BrokerError, match=r"not authorized\): 18 messages are left.*access rules"):
        edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_is_heard_while_connecting(models: Path, frames: Path, tmp_path: Path, number: int, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtt://127.0.0.1:{silent.getsockname()[1]}"
        run = start_run(models / "int8.tflite", "--source", frames, "--broker", url, cwd=tmp_path)
        peer, _ = silent.accept()
        run.send_signal(number)
        _, log = run.communicate(timeout=5)
        peer.close()
    assert run.returncode == status and "Traceback" not in log


def test_full_spool_makes_a_file_wait_for_the_broker(
    models: Path, video: Path, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.devices.config.Config.spool_bytes", 1 << 16)
    received = broker.subscribe("edgekit/pi/main/prediction", "-C", "900", "-W", "30")
    at: list[float] = []

    def pause(_message: Any) -> None:
        at.append(time.monotonic())
        if len(at) == 20:
            broker.pause()
            threading.Timer(1.0, broker.resume).start()
        if len(at) == 900:
            stop.set()

    stop = threading.Event()
    edgekit.run(
        models / "int8.tflite", str(video), broker=broker.url, device_id="pi", loop=True, stop=stop,
        on_prediction=pause,
    )  # fmt: skip
    assert at[-1] - at[19] > 0.8  # it waited with so much of it as the spool may hold
    assert [payload["seq"] for _, payload in received()] == list(range(1, 901))


def test_spool_in_memory_leaves_no_file(models: Path, frames: Path, broker: Any, state_home: Path) -> None:
    counts = edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi", spool="none")
    assert counts.inferred == 6 and not list(state_home.iterdir())
    edgekit.run(models / "int8.tflite", str(frames), broker=broker.url, device_id="pi")
    assert [path.name for path in (state_home / "edgekit").iterdir()] == ["pi.main.sqlite"]


def test_embedded_broker_serves_who_listens(
    models: Path, video: Path, free_port: Callable[[], int], edgekit_cli: Any, tmp_path: Path
) -> None:
    port = free_port()
    run = start_run(
        models / "int8.tflite", "--source", video, "--device-id", "pi", "--broker", f"embedded://127.0.0.1:{port}",
        cwd=tmp_path,
    )  # fmt: skip
    listened = edgekit_cli(
        "listen", "--broker", f"mqtt://127.0.0.1:{port}", "--count", "90", "--timeout", "30", "--json"
    )
    assert listened.returncode == 0, listened.stderr
    _, log = run.communicate(timeout=30)
    assert run.returncode == 0 and "90 captured, 90 inferred" in log
    lines = [json.loads(line) for line in listened.stdout.splitlines()]
    predictions = [line["payload"] for line in lines if line["topic"] == "edgekit/pi/main/prediction"]
    assert [p["seq"] for p in predictions] == list(range(1, 91))
    jsonschema.validate(predictions[0], SCHEMAS["prediction"])


def test_embedded_broker_without_subscriber_goes_on(
    models: Path, frames: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("edgekit.devices.device.SUBSCRIBER_TIMEOUT_S", 0.2)
    counts = edgekit.run(models / "int8.tflite", str(frames), broker=f"embedded://127.0.0.1:{free_port()}")
    assert counts.inferred == 6 and "no subscriber came" in caplog.text


def test_no_thread_is_left_behind(models: Path, frames: Path, broker: Any) -> None:
    before = set(threading.enumerate())
    edgekit.run(models / "int8.tflite", str(frames), broker=broker.url)
    assert set(threading.enumerate()) == before


def test_credentials_of_a_source_stay_out_of_info(models: Path, colour: Any) -> None:
    from edgekit.devices.config import StreamConfig
    from edgekit.devices.interpreter import load
    from edgekit.devices.pipeline import Pipeline
    from edgekit.devices.sources.frames import Source

    with load(models / "int8.tflite") as model:
        url = "rtsp://ann:hunter2@cam/1"
        config = StreamConfig(bundle="int8.tflite", source=url)
        pipeline = Pipeline(model, Source(url, threading.Event()), config, "pi")
        info = pipeline.info()
    assert info.source == "rtsp://cam/1"

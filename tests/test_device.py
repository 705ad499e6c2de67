from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.devices.stream import Stream
from edgekit.errors import BundleError

sys.path.insert(0, str(Path(__file__).parent))
from running import of_stream, settings


def test_streams_of_images_and_of_sound_run_side_by_side(
    models: Path, sound_models: Path, red: Path, tmp_path: Path, broker: Any, running: Any, until: Any
) -> None:
    sound = tmp_path / "sound.wav"
    import soundfile

    soundfile.write(sound, np.random.default_rng(0).uniform(-0.1, 0.1, 30_000), 8000)
    config = tmp_path / "edgekit.toml"
    config.write_text(
        settings(
            broker.url,
            of_stream("door", models / "int8.tflite", red),
            of_stream("ear", sound_models / "window.tflite", sound),
        )
    )
    received = broker.subscribe("edgekit/pi/#", "-W", "4")
    run = running(config=config)
    until(lambda: len(run.labels("door")) > 5 and len([p for p in run.predictions if p.stream == "ear"]) > 5)
    until(lambda: len(run.labels("door")) > 20)
    run.end()
    assert not run.error and run.counts.in_flight == 0
    messages = received()
    assert [payload for to, payload in messages if to.endswith("/status")] == ["online", "offline"]
    info = next(payload for to, payload in messages if to.endswith("/info"))
    assert set(info["streams"]) == {"door", "ear"}
    health = next(payload for to, payload in messages if to.endswith("/health"))
    assert set(health["streams"]) == {"door", "ear"}
    assert health["captured"] == sum(one["captured"] for one in health["streams"].values())
    for stream in ("door", "ear"):
        seqs = [payload["seq"] for to, payload in messages if to == f"edgekit/pi/{stream}/prediction"]
        assert len(seqs) > 5 and seqs == list(range(1, len(seqs) + 1))
    assert {p.boot_id for p in run.predictions} == {info["boot_id"]}


def test_stream_that_fails_ends_the_run_with_its_error(
    models: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker: Any
) -> None:
    from edgekit.devices.interpreter import Model

    invoke, calls = Model.invoke, iter(range(10))

    def fails(self: Model, tensor: Any) -> Any:
        if next(calls) == 3:
            raise BundleError("the interpreter is broken")
        return invoke(self, tensor)

    monkeypatch.setattr(Model, "invoke", fails)
    events = broker.subscribe("edgekit/pi/main/event", "-C", "2", "-W", "10")
    with pytest.raises(BundleError, match="the interpreter is broken"):
        edgekit.run(models / "int8.tflite", str(red), loop=True, broker=broker.url, device_id="pi")
    assert dict(broker.subscribe("edgekit/+/status", "-W", "1")()) == {"edgekit/pi/status": "offline"}
    (_, begin), (_, end) = events()
    assert (begin["event"], end["event"]) == ("begin", "end") and begin["event_id"] == end["event_id"]


def test_model_that_hangs_in_this_process_ends_the_run_and_the_broker_hears_of_it(
    op_models: Path, red: Path, broker: Any, tmp_path: Path
) -> None:
    """Nothing can end a thread in native code, so the process does; its broker is told, and what it predicted kept."""
    script = tmp_path / "hangs.py"
    script.write_text(
        "import sys, time, edgekit\n"
        "calls = iter(range(1000))\n"
        "def hang(x, **_):\n"
        "    while next(calls) > 5: time.sleep(1000)\n"
        "    return x\n"
        "ops = edgekit.CustomOpResolver()\n"
        "ops.add('Sharpen', hang)\n"
        f"edgekit.run({str(op_models / 'colour_op.tflite')!r}, {str(red)!r}, loop=True, broker={broker.url!r},"
        " device_id='pi', ops=ops, hang_s=1.0)\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "hangs for 1 s; start the run again" in result.stderr, result.stderr
    assert dict(broker.subscribe("edgekit/+/status", "-W", "1")()) == {"edgekit/pi/status": "offline"}


def test_sigterm_ends_within_five_seconds_whatever_the_broker_does(
    models: Path, red: Path, tmp_path: Path, broker: Any
) -> None:
    command = [sys.executable, "-m", "edgekit", "run", models / "int8.tflite", "--source", red, "--loop", "--json"]
    command += ["--broker", broker.url, "--device-id", "pi", "--max-fps", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    for _ in range(20):
        json.loads(process.stdout.readline())
    broker.pause()
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - began_s < 5, log
    assert "sent by the next run" in log and "Traceback" not in log


def test_stream_that_cannot_be_closed_keeps_nothing_else_from_it(
    models: Path, red: Path, broker: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def close(*_: object) -> None:
        raise ValueError("generator already executing")

    monkeypatch.setattr(Stream, "close", close)
    counts = edgekit.run(models / "int8.tflite", str(red), broker=broker.url, device_id="pi")
    assert counts.inferred == 1 and "stream main: generator already executing" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mqtt-edgekit-pi")]


def test_log_that_nobody_reads_any_more_ends_nothing(models: Path, red: Path, broker: Any) -> None:
    """Nor does a full disk: a line is lost, and the thread that wrote it goes on."""
    command = [sys.executable, "-m", "edgekit", "run", models / "int8.tflite", "--source", red, "--loop", "--json"]
    command += ["--max-fps", "50", "--broker", broker.url, "--device-id", "pi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr and process.stdout.readline()
    threading.Thread(target=process.stdout.read, daemon=True).start()
    process.stderr.close()
    broker.stop()
    broker.start()
    try:
        assert broker.subscribe("edgekit/pi/main/prediction", "-C", "1", "-W", "20")()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_storm_of_signals_is_survived(models: Path, red: Path, tmp_path: Path) -> None:
    """Also where one comes while another is being dealt with."""
    config = tmp_path / "edgekit.toml"
    config.write_text(settings("none", of_stream("a", models / "int8.tflite", red)))
    command = [sys.executable, "-m", "edgekit", "run", "--config", config, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    try:
        for _ in range(40_000):
            process.send_signal(signal.SIGHUP)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in log, log


def test_closed_terminal_ends_a_run_that_has_no_configuration_to_read(models: Path, red: Path, broker: Any) -> None:
    command = [sys.executable, "-m", "edgekit", "run", models / "int8.tflite", "--source", red, "--loop", "--json"]
    command += ["--broker", broker.url, "--device-id", "pi"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup has the tests ignore
    )  # fmt: skip
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert dict(broker.subscribe("edgekit/+/status", "-W", "1")()) == {"edgekit/pi/status": "offline"}

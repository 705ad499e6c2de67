from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgekit
from edgekit.errors import BundleError, EdgekitError


class Running:
    """``edgekit.run`` in a thread, with what its streams predicted."""

    def __init__(self, **options: Any) -> None:
        self.stop, self.reload, self.error = threading.Event(), threading.Event(), ""
        self.counts: Any = None
        self.predictions: list[Any] = []
        self._thread = threading.Thread(target=self._run, kwargs=options, daemon=True)
        self._thread.start()

    def _run(self, **options: Any) -> None:
        try:
            self.counts = edgekit.run(
                stop=self.stop, reload=self.reload, on_prediction=self.predictions.append, **options
            )
        except EdgekitError as error:
            self.error = str(error)

    def labels(self, stream: str = "main") -> list[str]:
        return [p.predictions[0].label for p in self.predictions.copy() if p.stream == stream and p.predictions]

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(**options))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.devices.upkeep.LOOK_S", 0.05)


@pytest.fixture
def red(tmp_path: Path, colour: Any) -> Path:
    path = tmp_path / "red.png"
    cv2.imwrite(str(path), colour("red")[..., ::-1])
    return path


@pytest.fixture
def blue(tmp_path: Path, colour: Any) -> Path:
    path = tmp_path / "blue.png"
    cv2.imwrite(str(path), colour("blue")[..., ::-1])
    return path


def replace(source: Path, target: Path) -> None:
    """In one step, and with another time than before."""
    beside = target.with_suffix(".new")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def settings(broker: str, *streams: str) -> str:
    return "\n".join([f'device_id = "pi"\nbroker = "{broker}"', *streams])


def of_stream(name: str, bundle: Path, source: Path, more: str = "") -> str:
    return f'[[stream]]\nname = "{name}"\nbundle = "{bundle}"\nsource = "{source}"\nloop = true\nmax_fps = 50\n{more}\n'


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
        until(lambda: caplog.text.count("the configuration before stays in force") == number)
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
    with pytest.raises(BundleError, match="the interpreter is broken"):
        edgekit.run(models / "int8.tflite", str(red), loop=True, broker=broker.url, device_id="pi")
    assert dict(broker.subscribe("edgekit/+/status", "-W", "1")()) == {"edgekit/pi/status": "offline"}


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

"""The microphone for real: PulseAudio in user space, PyAudio, and a broker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import edgekit
import edgekit.devices.pipeline
from edgekit import bundle
from edgekit.devices.sources.microphone import Microphone
from edgekit.devices.sources.sound import open_audio_source
from edgekit.errors import SourceError
from edgekit.manifest import AudioInput

sys.path.insert(0, str(Path(__file__).parent))
from sound_server import SoundServer

pytestmark = pytest.mark.skipif(not shutil.which("pulseaudio"), reason="needs pulseaudio; scripts/test installs it")
pytest.importorskip("pyaudio", reason="needs pyaudio; scripts/test installs it")
WINDOW_S = 0.512


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoundServer]:
    """A sound card of 48 kHz, stereo, whose microphone hears what is played."""
    server = SoundServer(tmp_path_factory.mktemp("sound"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


class Run:
    """``edgekit.run`` on a microphone in a thread, and what it said."""

    def __init__(self, bundle: Path, source: str = "mic", **options: Any) -> None:
        self.messages: list[Any] = []
        self.stop = threading.Event()
        self.counts: Any = None

        def run() -> None:
            self.counts = edgekit.run(
                bundle, source, stop=self.stop, on_prediction=self.messages.append, **{"broker": "none", **options}
            )

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def until(self, condition: Callable[[], Any], timeout_s: float = 25.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert self._thread.is_alive() and time.monotonic() < deadline_s, [
                m.predictions for m in self.messages[-5:]
            ]
            time.sleep(0.02)

    def until_heard(self, label: str, since: int = 0) -> None:
        self.until(lambda: any(m.predictions[0].label == label for m in self.messages[since:] if m.predictions))

    def end(self) -> Any:
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.counts.captured == self.counts.inferred + self.counts.dropped + self.counts.failed
        return self.counts

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(10)


def moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


@pytest.mark.parametrize("name", ["window", "stream"])
def test_what_is_played_comes_out_over_mqtt(
    sound_models: Path, server: SoundServer, broker: Any, tmp_path: Path, name: str
) -> None:
    """A synthetic voice, and what it is not: silence before it, a high tone after it."""
    speech = tmp_path / "speech.wav"
    subprocess.run(["espeak-ng", "-w", speech, "Hello, microphone."], check=True)
    keeps = ("edgekit/pi/ear/prediction", "-c", "-i", "hears-all")
    broker.subscribe(*keeps, "-E")()  # from now on the broker keeps what comes for this one
    started_s = time.time()
    with Run(sound_models / f"{name}.tflite", broker=broker.url, device_id="pi", stream="ear", top_k=1) as run:
        run.until_heard("silence")
        server.play(speech).wait(20)
        run.until_heard("low")
        server.play_tone(3000, seconds=2)
        run.until_heard("high")
        counts = run.end()
    payloads = [payload for _, payload in broker.subscribe(*keeps, "-C", str(counts.inferred))()]
    labels = [payload["predictions"][0]["label"] for payload in payloads]
    assert [label for i, label in enumerate(labels) if label not in labels[:i]] == ["silence", "low", "high"]
    assert [payload["seq"] for payload in payloads] == list(range(1, counts.inferred + 1)) and counts.gaps == 0
    ends = [moment(payload["window"]["end"]) for payload in payloads]
    starts = [moment(payload["window"]["start"]) for payload in payloads]
    assert all(end - start == pytest.approx(WINDOW_S, abs=0.002) for start, end in zip(starts, ends, strict=True))
    assert started_s - 0.5 < starts[0] and ends[-1] < time.time() and ends == sorted(ends)
    assert ends[-1] - ends[0] == pytest.approx(0.256 * (counts.captured - 1), abs=0.1)
    assert payloads[-1]["captured_at"] == payloads[-1]["window"]["end"] and "input" not in payloads[-1]


@pytest.mark.parametrize("trouble", ["stalls", "goes away", "is suspended"])
def test_gap_is_told_and_nothing_spans_it(
    sound_models: Path, server: SoundServer, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Run(sound_models / "stream.tflite") as run:
        tone = server.play_tone(440)
        run.until_heard("low")
        if trouble == "stalls":
            server.pause()
        elif trouble == "goes away":
            server.stop()
        else:
            server.control("suspend-sink", "cable", "1")
        run.until(lambda: "opening it again until it does" in caplog.text)
        before, resumed_s = len(run.messages), time.time()
        tone.kill()
        if trouble == "stalls":
            server.resume()
        elif trouble == "goes away":
            server.start()
        else:
            server.control("suspend-sink", "cable", "0")
        server.play_tone(3000)
        run.until_heard("high", since=before)
        counts = run.end()
    assert counts.gaps >= 1 and "gap in the sound of microphone" in caplog.text
    assert all(m.predictions[0].label == "low" for m in run.messages[2:before])
    assert moment(run.messages[before].window.start) > resumed_s - 0.1
    assert [m.seq for m in run.messages] == list(range(1, counts.inferred + 1))


def test_patient_source_waits_for_its_microphone(
    sound_models: Path, server: SoundServer, until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    input = bundle.read(sound_models / "window.tflite").input
    assert isinstance(input, AudioInput)
    server.stop()
    with pytest.raises(SourceError):
        open_audio_source("mic", input)
    with open_audio_source("mic", input, patient=True) as source:
        until(lambda: source.lost)
        server.start()
        assert next(iter(source)).samples is not None
        assert not source.lost and source.gaps == 0
    assert "opening it again until it does" in caplog.text


@pytest.mark.parametrize("name", ["window", "stream"])
def test_model_too_slow_drops_windows_or_makes_a_gap(
    sound_models: Path, server: SoundServer, name: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Of windows the newest wins; a stream that cannot wait any longer begins anew."""
    monkeypatch.setattr("edgekit.devices.sources.sound.MAX_BACKLOG_S", 0.6)
    run_prediction = edgekit.devices.pipeline.Pipeline._predict

    def slowly(pipeline: Any, frame: Any) -> Any:
        time.sleep(0.6)
        return run_prediction(pipeline, frame)

    monkeypatch.setattr("edgekit.devices.pipeline.Pipeline._predict", slowly)
    with Run(sound_models / f"{name}.tflite") as run:
        run.until(lambda: len(run.messages) > 4)
        counts = run.end()
    assert counts.dropped > 2 and server
    assert (counts.gaps > 0) == (name == "stream") == ("it comes faster than it is dealt with" in caplog.text)


def test_no_microphone_is_an_error(
    sound_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgekit_fails: Any
) -> None:
    (tmp_path / "asound.conf").write_text("pcm.!default { type pulse }\n")
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(tmp_path / "asound.conf"))
    monkeypatch.setenv("PULSE_SERVER", f"unix:{tmp_path}/nowhere")
    line = edgekit_fails("run", sound_models / "window.tflite", "--source", "mic", "--broker", "none")
    assert "there is no microphone; plug one in" in line


def test_microphone_of_another_name_is_an_error_that_lists_those_there_are(
    sound_models: Path, server: SoundServer
) -> None:
    with pytest.raises(SourceError, match=r"there is no microphone 'Yeti'; give one of: .*default"):
        edgekit.run(sound_models / "window.tflite", "mic:Yeti", broker="none")
    with Run(sound_models / "window.tflite", "mic:DEFAU") as run:
        run.until_heard("silence")
    assert server


def test_pyaudio_that_is_missing_is_an_error(sound_models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "pyaudio.py").write_text("raise ImportError('libportaudio.so.2: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(SourceError, match=r"needs PyAudio \(libportaudio.*pip install 'edgekit\[mic\]'"):
        edgekit.run(sound_models / "window.tflite", "mic", broker="none")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_ends_it_and_its_recorder(
    sound_models: Path, server: SoundServer, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """And what sound drivers print by themselves is not shown."""
    command = [sys.executable, "-m", "edgekit", "run", sound_models / "stream.tflite", "--source", "mic"]
    run = subprocess.Popen(
        [*command, "--broker", "none", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout and run.stdout.readline()
    run.send_signal(number)
    _, log = run.communicate(timeout=10)
    assert run.returncode == status
    assert not [line for line in log.splitlines() if not line.startswith(("edgekit: info: ", "INFO: "))], log
    deadline_s = time.monotonic() + 5
    while server.control("list", "short", "source-outputs").stdout:
        assert time.monotonic() < deadline_s, "it still records"
        time.sleep(0.05)


def test_recorder_ends_with_a_reader_that_was_killed(sound_models: Path, server: SoundServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgekit", "run", sound_models / "stream.tflite", "--source", "mic"]
    run = subprocess.Popen(
        [*command, "--broker", "none", "--json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert run.stdout and run.stdout.readline()
    run.kill()
    run.communicate()
    deadline_s = time.monotonic() + 5
    while server.control("list", "short", "source-outputs").stdout:
        assert time.monotonic() < deadline_s, "it still records"
        time.sleep(0.05)


def test_microphone_is_regained_whatever_failed(
    sound_models: Path, server: SoundServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when there is no room for another process."""
    from edgekit.devices.sources import sound
    from edgekit.devices.sources.microphone import Block, Microphone

    read, fails = Microphone.read, iter([False] * 15 + [True])

    def read_or_fail(microphone: Microphone) -> Block:
        if next(fails, False):
            raise OSError(12, "Cannot allocate memory")
        return read(microphone)

    refusals = iter([True, True])

    def microphone_or_none(*arguments: str) -> Microphone:
        if heard and next(refusals, False):
            raise OSError(12, "Cannot allocate memory")
        return Microphone(*arguments)

    heard: list[Any] = []
    monkeypatch.setattr(Microphone, "read", read_or_fail)
    monkeypatch.setattr(sound, "Microphone", microphone_or_none)
    with Run(sound_models / "stream.tflite") as run:
        run.until_heard("silence")
        heard.append(run)
        run.until(lambda: "gap in the sound" in caplog.text)
        count = len(run.messages)
        run.until(lambda: len(run.messages) > count + 1)
        counts = run.end()
    assert counts.gaps == 1 and "Cannot allocate memory" in caplog.text and server


@pytest.mark.parametrize("how", ["flag", "time"])
def test_sound_lost_between_two_blocks_is_a_gap(
    sound_models: Path, server: SoundServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """PortAudio flags it, or blocks come later than by the count of their samples."""
    from edgekit.devices.sources import sound
    from edgekit.devices.sources.microphone import Block, Microphone

    read = Microphone.read
    asked = []

    def lossy(microphone: Microphone) -> Block:
        block = read(microphone)
        asked.append(block)
        lost = len(asked) >= 15
        if how == "flag":
            return Block(block.samples, block.arrived_s, gap=len(asked) == 15)
        return Block(block.samples, block.arrived_s + (1.5 if lost else 0), gap=False)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sound.Microphone, "read", lossy)
        with Run(sound_models / "stream.tflite") as run:
            run.until(lambda: len(asked) > 30)
            counts = run.end()
    assert counts.gaps == 1 and "gap in the sound" in caplog.text and server
    assert abs(datetime.now(timezone.utc).timestamp() - moment(run.messages[-1].window.end)) < 2


@pytest.mark.parametrize(("preferred", "name"), [("USB", "usb_desk"), ("built-in", "default")])
def test_microphone_that_the_profile_prefers_is_taken_where_it_is_there(
    server: SoundServer, preferred: str, name: str
) -> None:
    with Path(server.environment["ALSA_CONFIG_PATH"]).open("a") as config:
        config.write("pcm.usb_desk { type pulse }\n")
    with Microphone("", preferred) as microphone:
        microphone.open()
        assert microphone.name == name

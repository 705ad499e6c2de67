from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from local_mosquitto import Mosquitto

DATA = Path(__file__).parents[2] / "shared" / "data"
COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Spools lie in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder


def pytest_configure() -> None:
    """A shell has what it starts in the background ignore SIGINT; here it is what ends a command."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: those that need TensorFlow last."""
    items.sort(key=lambda item: item.get_closest_marker("host") is not None)


def colour_image(label: str, size_wh: tuple[int, int] = (48, 32), seed: int = 0) -> np.ndarray:
    """A noisy RGB picture of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size_wh[1], size_wh[0], 3))
    return (np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def colour() -> Callable[..., np.ndarray]:
    return colour_image


@pytest.fixture(scope="session")
def vision_data() -> Path:
    """Models and pictures made by others."""
    if not (DATA / "vision").is_dir():
        pytest.skip("no ../shared/data/vision here")
    return DATA / "vision"


@pytest.fixture(scope="session")
def crnn_data() -> Path:
    """The published weights of the music tagger and two of its author's clips."""
    if not (DATA / "crnn").is_dir():
        pytest.skip("no ../shared/data/crnn here")
    return DATA / "crnn"


def run_edgekit(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def edgekit_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``edgekit ARGUMENTS`` as a user would, in an empty folder."""
    return lambda *arguments, **options: run_edgekit(*arguments, cwd=tmp_path, **options)


@pytest.fixture
def edgekit_fails(edgekit_cli: Any) -> Callable[..., str]:
    """Runs ``edgekit ARGUMENTS``, which must fail with status 1 and one clear line; returns the line."""

    def fails(*arguments: str | Path, **options: Any) -> str:
        result = edgekit_cli(*arguments, **options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("edgekit: error: ")]
        assert (result.returncode, len(lines)) == (1, 1), result.stderr
        assert "Traceback" not in result.stderr and "unexpected" not in result.stderr, result.stderr
        return lines[0]

    return fails


def wait_until_listening(process: subprocess.Popen[str]) -> None:
    """Reads the log of an ``edgekit listen`` until its subscription stands."""
    assert process.stderr
    for line in process.stderr:
        if "listening" in line:
            return
    pytest.fail("edgekit listen ended")


@pytest.fixture(scope="session")
def until_listening() -> Callable[[subprocess.Popen[str]], None]:
    return wait_until_listening


@contextmanager
def models_folder(factory: pytest.TempPathFactory, name: str = "") -> Iterator[Path]:
    """The folder of the test models, or ``name`` in it: that of an earlier run where ``EDGEKIT_TEST_MODELS`` has one.

    It is locked, so that of runs side by side one makes what is missing and the others wait.
    """
    given = os.environ.get("EDGEKIT_TEST_MODELS")
    folder = (Path(given) if given else factory.mktemp("models")) / name
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def needs_tensorflow() -> None:
    pytest.importorskip("tensorflow", reason="needs TensorFlow, or models in EDGEKIT_TEST_MODELS")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with colours.keras and what ``edgekit convert`` makes of it: float32.tflite and int8.tflite."""
    with models_folder(tmp_path_factory) as folder:
        if not (folder / "int8.tflite").exists():
            needs_tensorflow()
            script = Path(__file__).with_name("make_colours.py")
            subprocess.run([sys.executable, script, folder / "colours.keras"], check=True, capture_output=True)
            (folder / "labels.txt").write_text("".join(f"{label}\n" for label in COLOURS))
            x = np.stack([colour_image(label, (32, 32), seed) for seed in range(40) for label in COLOURS])
            np.savez(folder / "data.npz", x=x, y=np.tile(np.arange(3), 40))
            for recipe in ("float32", "int8"):
                result = run_edgekit(
                    "convert", "colours.keras", "-o", f"{recipe}.tflite", "--quantize", recipe, "--mean", "127.5",
                    "--std", "127.5", "--labels", "labels.txt", "--calibration", "data.npz", "--validation", "data.npz",
                    cwd=folder,
                )  # fmt: skip
                assert result.returncode == 0, result.stderr
        return folder


def _written(factory: pytest.TempPathFactory, script: str, last: str) -> Path:
    """The folder with what a script beside this file writes, ``last`` at the end."""
    with models_folder(factory) as folder:
        if not (folder / last).exists():
            needs_tensorflow()
            subprocess.run([sys.executable, Path(__file__).with_name(script), folder], check=True, capture_output=True)
        return folder


@pytest.fixture(scope="session")
def sound_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small bundles of sound: see make_sound.py."""
    return _written(tmp_path_factory, "make_sound.py", "stream_in_graph.tflite")


@pytest.fixture(scope="session")
def op_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs with custom operators: see make_ops.py."""
    return _written(tmp_path_factory, "make_ops.py", "colour_op.tflite")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV3-Small trained on handwritten digits, with its data: see examples/train_digits.py."""
    pytest.importorskip("tensorflow")
    pytest.importorskip("sklearn")
    with models_folder(tmp_path_factory, "digits") as folder:
        if not (folder / "held-out.avi").exists():
            script = Path(__file__).parents[1] / "examples" / "train_digits.py"
            command = [sys.executable, script, folder, "--size", "48", "--epochs", "9"]
            subprocess.run(command, check=True, capture_output=True)
        return folder


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures, two of each colour, of different sizes and formats."""
    folder = tmp_path_factory.mktemp("frames")
    for number, label in enumerate(list(COLOURS) * 2):
        image = colour_image(label, (40 + 16 * number, 64), number)
        cv2.imwrite(str(folder / f"{number}-{label}.{'png' if number % 2 else 'jpg'}"), image[..., ::-1])
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 90 frames: 30 red, 30 green, 30 blue."""
    path = tmp_path_factory.mktemp("video") / "colours.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for number in range(90):
        writer.write(colour_image(list(COLOURS)[number // 30], (64, 48), number)[..., ::-1])
    writer.release()
    return path


@pytest.fixture(scope="session")
def predictions() -> Callable[..., list[dict[str, Any]]]:
    """Payloads of predictions with these ``seq``."""

    def payloads(*seqs: int, **changes: Any) -> list[dict[str, Any]]:
        always = {
            "schema": "edgekit.prediction/1", "id": "b-1", "boot_id": "b", "device": "pi", "stream": "door",
            "captured_at": "2026-11-22T03:04:05.678Z", "replayed": False,
            "bundle": {"name": "n", "version": "1", "sha256": "00"}, "delegate": "cpu",
            "latency_ms": {"preprocess": 0.4, "inference": 2.8, "total": 3.4},
            "predictions": [{"class_id": 3, "label": "macaw", "score": 0.91}],
        }  # fmt: skip
        return [{**always, "seq": seq, **changes} for seq in seqs]

    return payloads


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any]], None]:
    """Waits until a condition holds; fails if it does not within 20 seconds."""

    def wait(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds ports, other ones in each run that goes on beside: Linux gives those from 32,768 on to connections."""

    def find() -> int:
        while True:
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port := random.randrange(10_000, 32_768)))
                return port

    return find


@pytest.fixture
def mosquitto(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Callable[..., Mosquitto]]:
    """Starts real Mosquitto brokers, each with the settings given."""
    started: list[Mosquitto] = []

    def start(*settings: str) -> Mosquitto:
        started.append(Mosquitto(tmp_path_factory.mktemp("mosquitto"), free_port(), *settings))
        return started[-1]

    if not (shutil.which("mosquitto") or Path("/usr/sbin/mosquitto").exists()):
        pytest.skip("no mosquitto here; scripts/test installs it")
    yield start
    for broker in started:
        broker.close()


@pytest.fixture
def broker(mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    return mosquitto()


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts ``edgekit.run`` in threads, which look often whether something has changed: see running.py."""
    from running import Running

    monkeypatch.setattr("edgekit.devices.upkeep.LOOK_S", 0.05)
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(**options))
        return started[-1]

    yield start
    for one in started:
        one.end()


def _picture(label: str, folder: Path) -> Path:
    cv2.imwrite(str(folder / f"{label}.png"), colour_image(label)[..., ::-1])
    return folder / f"{label}.png"


@pytest.fixture
def red(tmp_path: Path) -> Path:
    return _picture("red", tmp_path)


@pytest.fixture
def blue(tmp_path: Path) -> Path:
    return _picture("blue", tmp_path)

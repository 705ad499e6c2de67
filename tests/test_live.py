"""Live sources with the real OpenCV, on a network camera that fails as they do."""

from __future__ import annotations

import functools
import http.server
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

from edgekit.devices.sources import cameras, frames, live
from edgekit.devices.sources.frames import Source
from edgekit.devices.sources.images import open_source
from edgekit.errors import SourceError

sys.path.insert(0, str(Path(__file__).parent))
from network_camera import NetworkCamera, RtspCamera


@pytest.fixture
def camera(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[NetworkCamera]:
    """By HTTP, or of the class that the test names."""
    monkeypatch.setattr(frames, "RETRY_S", 0.05)
    monkeypatch.setattr(frames, "MAX_RETRY_S", 0.2)
    camera = getattr(request, "param", NetworkCamera)()
    camera.start()
    yield camera
    camera.kill()


class Watched:
    """Takes the frames of a source in a thread, and keeps their numbers."""

    def __init__(self, source: Source, seconds_each: float = 0.0) -> None:
        self.source, self.numbers, self.frames = source, [], []

        def take() -> None:
            for frame in source:
                self.frames.append(frame)
                self.numbers.append(number_of(frame))
                time.sleep(seconds_each)

        self._thread = threading.Thread(target=take, daemon=True)
        self._thread.start()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.stop.set()
        self._thread.join(10)
        self.source.close()
        assert self.source.captured == len(self.frames) + self.source.dropped


def number_of(frame: Any) -> int:
    return round(float(frame.image_bgr.mean()) / 2)


def threads_of(source: Source) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"source {source.name}"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_newest_frame_wins_unless_told_otherwise(camera: NetworkCamera, until: Callable[..., None]) -> None:
    with open_source(camera.url) as source:
        given = iter(source)
        first, captured = number_of(next(given)), source.captured
        until(lambda: source.captured > captured + 20)
        assert source.live and number_of(next(given)) - first > 20
    assert source.captured == 2 + source.dropped
    assert not threads_of(source)


def test_drop_newest_keeps_what_waits(camera: NetworkCamera, until: Callable[..., None]) -> None:
    with open_source(camera.url, drop="newest") as source:
        given = iter(source)
        next(given)
        captured = source.captured
        until(lambda: source.captured > captured)
        waits_since_s = time.monotonic()
        until(lambda: source.captured > captured + 20)
        frame = next(given)
        assert frame.captured_s < waits_since_s  # the time of the picture, not that of its use
        assert frame.captured_at.timestamp() == pytest.approx(frame.captured_s + frame.clock_offset_s, abs=1e-3)
    assert source.captured == 2 + source.dropped


def test_drop_none_keeps_all(camera: NetworkCamera) -> None:
    with open_source(camera.url, drop="none") as source:
        numbers = []
        for frame in source:
            numbers.append(number_of(frame))
            time.sleep(0.02)
            if len(numbers) == 40:
                break
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert source.captured == 40 + source.dropped and source.dropped <= 2  # those that waited at the end


def test_drop_of_another_kind_is_refused(camera: NetworkCamera) -> None:
    with pytest.raises(SourceError, match="drop: expected oldest or newest or none, got 'all'"):
        open_source(camera.url, drop="all")


@pytest.mark.parametrize("camera", [NetworkCamera, RtspCamera], indirect=True)
def test_camera_that_restarts_is_regained(
    camera: NetworkCamera, until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with Watched(open_source(camera.url)) as watched:
        source = watched.source
        for round_ in range(1, 3):
            seen = len(watched.frames)
            until(lambda: len(watched.frames) > seen + 3)  # noqa: B023
            camera.kill()
            until(lambda: source.lost)
            time.sleep(0.3)  # several tries
            seen = len(watched.frames)
            camera.start()
            until(lambda: len(watched.frames) > seen + 3)  # noqa: B023
            assert source.gaps == round_ and not source.lost
            assert [frame.begins for frame in watched.frames].index(True, seen) == seen
            assert sum(frame.begins for frame in watched.frames) == round_
    told = warnings(caplog)
    assert len(told) == 4 and not threads_of(source)
    assert "gives no more frames; trying again until it does" in told[0] and "gives frames again, after" in told[1]


@pytest.mark.parametrize("camera", [NetworkCamera, RtspCamera], indirect=True)
def test_camera_that_stalls_is_opened_anew(
    camera: NetworkCamera, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cameras, "READ_TIMEOUT_S", 0.5)
    with Watched(open_source(camera.url)) as watched:
        until(lambda: watched.frames)
        camera.stalled = True
        until(lambda: watched.source.lost)
        seen, camera.stalled = len(watched.frames), False
        until(lambda: len(watched.frames) > seen + 3)
        assert watched.source.gaps and len(threads_of(watched.source)) == 1


@pytest.fixture
def hanging(camera: NetworkCamera, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Source]:
    """Opens the camera. A read of it, when it is stalled, does not return; nor does opening it again."""

    def open_it() -> Source:
        begun_s = time.monotonic()
        source = open_source(camera.url)
        # On a slow machine nothing is to be taken for hung that is not.
        monkeypatch.setattr(live, "STALL_S", max(0.4, 4 * (time.monotonic() - begun_s)))
        return source

    monkeypatch.setattr(cameras, "READ_TIMEOUT_S", 60.0)
    monkeypatch.setattr(live, "CLOSE_S", 0.1)
    return open_it


def test_camera_that_hangs_is_opened_by_another_thread(
    camera: NetworkCamera, hanging: Callable[[], Source], until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with Watched(hanging()) as watched:
        source = watched.source
        until(lambda: watched.frames)
        camera.stalled = True
        until(lambda: "has given nothing for" in caplog.text)
        assert source.lost and len(threads_of(source)) >= 2
        camera.stalled = False  # the calls that hung return, with a frame each: it is used of one thread alone
        seen = len(watched.frames)
        until(lambda: len(watched.frames) > seen + 10)
        until(lambda: len(threads_of(source)) == 1)
        assert source.gaps == 1
        times = [frame.captured_s for frame in watched.frames]
        assert times == sorted(times)
    assert not threads_of(source)


def test_no_more_than_a_few_threads_hang(
    camera: NetworkCamera,
    hanging: Callable[[], Source],
    until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(live, "MAX_ABANDONED", 1)
    with Watched(hanging()) as watched:
        until(lambda: watched.frames)
        camera.stalled = True
        until(lambda: "2 threads hang that opened source" in caplog.text)
        time.sleep(1)
        assert len(threads_of(watched.source)) == 2 and len(warnings(caplog)) == 2
        camera.stalled, seen = False, len(watched.frames)
        until(lambda: len(watched.frames) > seen + 3)


@pytest.mark.parametrize("trouble", ["hangs", "is gone"])
def test_source_ends_while_its_camera(
    camera: NetworkCamera, hanging: Callable[[], Source], until: Callable[..., None], trouble: str
) -> None:
    source = hanging()
    with Watched(source) as watched:
        until(lambda: watched.frames)
        if trouble == "hangs":
            camera.stalled = True
        else:
            camera.kill()
        until(lambda: source.lost)
    if trouble == "hangs":
        camera.stalled = False
    else:
        camera.start()
    captured = source.captured
    until(lambda: not threads_of(source))
    assert source.captured == captured


def test_source_ends_when_it_is_stopped(camera: NetworkCamera) -> None:
    stop = threading.Event()
    with open_source(camera.url, stop=stop) as source:
        for number, _ in enumerate(source):
            if number == 3:
                stop.set()
    assert number == 3 and not threads_of(source)


def test_patient_source_waits_for_its_camera(
    camera: NetworkCamera, until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    camera.kill()
    with pytest.raises(SourceError, match="cannot be opened; check its address"):
        open_source(camera.url)
    with Watched(open_source(camera.url, patient=True)) as watched:
        until(lambda: watched.source.lost)
        camera.start()
        until(lambda: len(watched.frames) > 3)
        assert not watched.source.lost and watched.source.gaps == 0
    told = warnings(caplog)
    assert len(told) == 2 and "cannot be opened" in told[0] and "gives frames, after" in told[1]


def test_camera_that_does_not_answer_at_the_start_is_an_error(
    camera: NetworkCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "STALL_S", 0.4)
    monkeypatch.setattr(live, "CLOSE_S", 0.1)
    camera.stalled = True
    with pytest.raises(SourceError, match=r"did not answer for 0\.4 s; check the camera or the network"):
        open_source(camera.url)


def test_frame_of_another_size_is_taken(camera: NetworkCamera, until: Callable[..., None]) -> None:
    with Watched(open_source(camera.url)) as watched:
        for size_wh in ((64, 48), (96, 64), (1, 1), (64, 48)):
            camera.size_wh = size_wh
            seen = len(watched.frames)
            until(lambda: len(watched.frames) > seen + 5)  # noqa: B023
        assert all(frame.image_bgr.shape[2] == 3 for frame in watched.frames)


def test_camera_that_gives_black_is_told_once(
    camera: NetworkCamera,
    until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(live, "LOOK_S", 0.0)
    camera.black = True
    with Watched(open_source(camera.url)) as watched:
        until(lambda: len(watched.frames) > 30)
        assert [line for line in warnings(caplog) if "is there a cap on it, or no light?" in line] == warnings(caplog)
        camera.black, camera.number = False, 60
        until(lambda: "is no longer black" in caplog.text)
    assert len(warnings(caplog)) == 2


def test_network_camera_has_one_thread_as_others_hold_pictures_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPEG-4, as OpenCV writes no H.264: FFmpeg gives that as many threads."""
    monkeypatch.delenv("OPENCV_FFMPEG_THREADS", raising=False)
    writer = cv2.VideoWriter(str(tmp_path / "door.avi"), cv2.VideoWriter.fourcc(*"mp4v"), 30, (64, 48))
    for level in range(30):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        opener = cameras.camera_opener(f"http://127.0.0.1:{server.server_port}/door.avi", None)
        opened = opener and opener()
        assert isinstance(opened, cameras.Capture) and opened._capture.get(cv2.CAP_PROP_N_THREADS) == 1
        opened.close()
        server.shutdown()


def test_process_that_ends_while_a_camera_is_open_ends_well(camera: NetworkCamera, models: Path) -> None:
    code = "import sys, edgekit; given = edgekit.stream(*sys.argv[1:], delegate='cpu'); next(given)"
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code, models / "int8.tflite", camera.url], check=True, timeout=60)

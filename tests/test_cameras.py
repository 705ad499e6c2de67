"""Cameras that cannot be here: stand-ins for V4L2 devices and camera modules, behind the real code that opens them."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from edgekit.devices.sources import cameras, frames, live
from edgekit.devices.sources.images import open_source
from edgekit.errors import SourceError


class Hints(NamedTuple):
    size_wh: tuple[int, int] | None = None
    fps: float | None = None
    fourcc: str | None = None


class Captures:
    """Stands for ``cv2.VideoCapture``: what is opened gives ``image``, unless it is ``unplugged``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.opened: list[tuple[Any, ...]] = []
        self.settings: list[tuple[int, float]] = []
        self.unplugged, self.released = False, 0
        self.image: Any = np.full((6, 9, 3), (10, 20, 30), np.uint8)
        self.stamp_s: float | None = None
        monkeypatch.setattr(cv2, "VideoCapture", self.open)
        monkeypatch.setattr(cameras, "DEVICES", folder)
        monkeypatch.setattr(frames, "RETRY_S", 0.02)

    def open(self, *arguments: Any) -> Any:
        self.opened.append(arguments)
        return Capture(self)


class Capture:
    def __init__(self, device: Captures) -> None:
        self.device = device

    def isOpened(self) -> bool:
        return not self.device.unplugged

    def set(self, setting: int, value: float) -> None:
        self.device.settings.append((setting, value))

    def get(self, setting: int) -> float:
        if setting == cv2.CAP_PROP_POS_MSEC:
            return 1e3 * (self.device.stamp_s or time.monotonic())
        return dict(self.device.settings).get(setting, 0.0)

    def grab(self) -> bool:
        time.sleep(0.005)
        return not self.device.unplugged

    def retrieve(self, _into: Any = None) -> tuple[bool, Any]:
        return self.device.image is not None, self.device.image

    def release(self) -> None:
        self.device.released += 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Captures:
    return Captures(monkeypatch, tmp_path)


def first(spec: str, **options: Any) -> Any:
    with open_source(spec, **options) as source:
        return next(iter(source))


@pytest.mark.parametrize(
    ("spec", "device"),
    [
        ("camera:2", 2),
        ("camera:/dev/video2", "/dev/video2"),
        ("/dev/v4l/by-id/usb-046d-video-index0", "/dev/v4l/by-id/usb-046d-video-index0"),
    ],
)
def test_device_is_opened_by_v4l2_and_asked_for_what_the_profile_hints(
    captures: Captures, spec: str, device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    frame = first(spec, camera=Hints((640, 480), 15.0, "MJPG"))
    assert (frame.image_bgr == (10, 20, 30)).all()
    assert captures.opened == [(device, cv2.CAP_V4L2)] and captures.released == 1
    assert captures.settings == [
        (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG")),
        (cv2.CAP_PROP_FRAME_WIDTH, 640),
        (cv2.CAP_PROP_FRAME_HEIGHT, 480),
        (cv2.CAP_PROP_FPS, 15.0),
    ]
    assert "gives 640 x 480 at 15 a second" in caplog.text


def test_device_is_left_as_it_is_without_hints(captures: Captures) -> None:
    first("camera:0")
    first("camera:0", camera=Hints())
    assert captures.settings == []


def test_time_of_a_frame_is_what_the_driver_says(captures: Captures) -> None:
    captures.stamp_s = time.monotonic() - 0.25
    assert first("camera:0").captured_s == pytest.approx(captures.stamp_s, abs=1e-3)


def test_time_of_a_frame_on_another_clock_is_not_believed(captures: Captures) -> None:
    before_s, captures.stamp_s = time.monotonic(), time.time()
    assert before_s <= first("camera:0").captured_s <= time.monotonic()


def test_device_that_cannot_be_opened_says_why(captures: Captures, tmp_path: Path) -> None:
    captures.unplugged = True
    with pytest.raises(SourceError, match=r"camera:1 cannot be opened: there is no .*/video1; plug it in"):
        open_source("camera:1")
    (tmp_path / "video1").touch()
    with pytest.raises(SourceError, match=r"gives no pictures to OpenCV; .*no other program.* camera:csi"):
        open_source("camera:1")
    if os.geteuid():
        (tmp_path / "video1").chmod(0)
        with pytest.raises(SourceError, match="may not be read; add the user to the group video"):
            open_source("camera:1")


def test_camera_that_is_unplugged_is_regained(captures: Captures, until: Callable[..., None]) -> None:
    with open_source("camera:0") as source:
        given = iter(source)
        next(given)
        captures.unplugged = True
        until(lambda: source.lost)
        until(lambda: len(captures.opened) > 3)
        captures.unplugged = False
        until(lambda: not source.lost)
        next(given)
    assert source.gaps == 1 and source.captured == 2 + source.dropped
    assert captures.released == 2  # those that had been opened


@pytest.mark.parametrize("channels", [(), (1,), (4,)])
def test_grey_and_four_channels_become_bgr(captures: Captures, channels: tuple[int, ...]) -> None:
    captures.image = np.full((1, 1, *channels), 77, np.uint8)
    frame = first("camera:0")
    assert frame.image_bgr.shape == (1, 1, 3) and (frame.image_bgr == 77).all()


@pytest.mark.parametrize(
    ("image", "complaint"),
    [(np.zeros((6, 9), np.uint16), r"got uint16 of shape \(6, 9\)"), (None, "cannot be decoded")],
)
def test_picture_that_cannot_be_used_is_a_frame_with_an_error(
    captures: Captures, image: Any, complaint: str, until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    captures.image = image
    with open_source("camera:0", drop="none") as source:
        given = iter(source)
        read = [next(given) for _ in range(live.MAX_UNREADABLE)]
        assert all(frame.image_bgr is None and re.search(complaint, frame.error) for frame in read)
        until(lambda: len(captures.opened) == 2)  # so many are as good as none
        captures.image = np.zeros((6, 9, 3), np.uint8)
    assert "gives nothing that can be used" in caplog.text and source.captured == len(read) + source.dropped


PICAMERA2 = """
import time
import numpy as np
log, cable = [], {"loose": False, "there": True}

class Request:
    def get_metadata(self):
        return {"SensorTimestamp": time.monotonic_ns() - 250_000_000}
    def make_array(self, name):
        return np.full((6, 9, 3), (10, 20, 30), np.uint8)
    def release(self):
        log.append("release")

class Picamera2:
    sensor_resolution = 3280, 2464
    def __init__(self, camera_num=0):
        if not cable["there"]:
            raise IndexError("list index out of range")
        log.append(("open", camera_num))
    def create_video_configuration(self, **configuration):
        return configuration
    def configure(self, configuration):
        log.append(configuration)
    def start(self):
        log.append("start")
    def capture_request(self, wait=None):
        time.sleep(0.005)
        if cable["loose"]:
            raise TimeoutError
        log.append("capture")
        return Request()
    def cancel_all_and_flush(self):
        log.append("flush")
    def close(self):
        log.append("close")
"""


@pytest.fixture
def picamera2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Installs a picamera2 of this source, as apt does."""
    monkeypatch.setattr(frames, "RETRY_S", 0.02)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cameras, "DEVICE_TREE", tmp_path / "compatible")

    def install(source: str) -> Any:
        (tmp_path / "picamera2.py").write_text(source)
        monkeypatch.setitem(sys.modules, "picamera2", None)  # so that at the end it is gone again
        monkeypatch.delitem(sys.modules, "picamera2")
        return importlib.import_module("picamera2") if source == PICAMERA2 else None

    return install


def test_camera_module_of_a_raspberry_pi(picamera2: Callable[[str], Any]) -> None:
    module = picamera2(PICAMERA2)
    now_s = time.monotonic()
    frame = first("camera:csi", camera=Hints((1280, 720), 25.0, "MJPG"))
    assert (frame.image_bgr == (10, 20, 30)).all() and frame.captured_s < now_s
    assert module.log[:3] == [
        ("open", 0),
        {
            "main": {"format": "RGB888", "size": (1280, 720)},
            "raw": {"size": (1640, 1232)},  # all that the sensor sees
            "controls": {"FrameDurationLimits": (40_000, 40_000)},
        },
        "start",
    ]
    # none is kept: there are few buffers
    assert module.log.count("capture") == module.log.count("release") and module.log[-1] == "close"
    module.log.clear()
    first("camera:csi:1")
    assert module.log[:2] == [
        ("open", 1),
        {"main": {"format": "RGB888"}, "raw": {"size": (1640, 1232)}, "controls": {}},
    ]


def test_camera_module_with_a_loose_cable_is_regained(
    picamera2: Callable[[str], Any], until: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    module = picamera2(PICAMERA2)
    with open_source("camera:csi") as source:
        next(iter(source))
        module.cable["loose"] = True
        until(lambda: source.lost)
        module.log.clear()
        until(lambda: "close" in module.log)
        # as it may hang when it is closed with a request under way
        assert [step for step in module.log if step in ("flush", "close")][:2] == ["flush", "close"]
        module.cable["loose"] = False
        until(lambda: not source.lost)
    assert source.gaps == 1 and "gives frames again" in caplog.text


def test_camera_module_that_is_not_there_is_an_error(picamera2: Callable[[str], Any]) -> None:
    picamera2(PICAMERA2).cable["there"] = False
    with pytest.raises(SourceError, match=r"no camera module 0.*; check its cable; `rpicam-hello"):
        open_source("camera:csi")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("raise ImportError('No module named libcamera')", "needs picamera2 .*apt-get install python3-picamera2"),
        ("raise ValueError('numpy.dtype size changed')", "built for another NumPy .*pip install 'numpy<2'"),
    ],
)
def test_picamera2_that_cannot_be_loaded_says_how_to_mend_it(
    picamera2: Callable[[str], Any], source: str, complaint: str
) -> None:
    picamera2(source)
    with pytest.raises(SourceError, match=complaint):
        open_source("camera:csi", patient=True)  # waiting would not mend it


def test_camera_module_of_a_jetson(captures: Captures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000\0nvidia,tegra234\0")
    monkeypatch.setattr(cameras, "DEVICE_TREE", tmp_path / "compatible")
    with pytest.raises(SourceError, match="built without GStreamer; use JetPack's OpenCV"):
        open_source("camera:csi")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GStreamer:                   YES (1.20.3)\n")
    first("camera:csi:1", camera=Hints((1280, 720), 29.97))
    ((pipeline, backend),) = captures.opened
    assert backend == cv2.CAP_GSTREAMER
    assert pipeline.startswith(
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=1280, height=720, framerate=2997/100 ! "
    )

"""The cameras a live source reads from: V4L2 devices, camera modules on a ribbon cable (CSI), network streams."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2

from edgekit.devices.sources.buffers import Image
from edgekit.devices.sources.frames import public_name
from edgekit.errors import SourceError

logger = logging.getLogger(__name__)

# How long OpenCV and picamera2 wait for a frame before they give up.
READ_TIMEOUT_S = 8.0
# A driver's time stamp that is older is of another clock.
MAX_AGE_S = 5.0
DEVICES = Path("/dev")
DEVICE_TREE = Path("/proc/device-tree/compatible")

PICAMERA2 = "apt-get install python3-picamera2, and use a venv made with --system-site-packages"
JETSON_OPENCV = "use JetPack's OpenCV (python3-opencv), in a venv made with --system-site-packages"


class Hints(Protocol):
    """What a camera is asked for; None: as it is."""

    @property
    def size_wh(self) -> tuple[int, int] | None: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def fourcc(self) -> str | None: ...


class Unhinted(NamedTuple):
    size_wh: tuple[int, int] | None = None
    fps: float | None = None
    fourcc: str | None = None


class Camera(Protocol):
    """One that is open. All of it may take long, or never return."""

    def grab(self) -> float | None:
        """Waits for the next frame; when it was taken, monotonic, in s. None: there is none any more."""

    def retrieve(self, into: Image | None, /) -> Any:
        """The frame grabbed last, decoded: an array in OpenCV's channel order, in the memory of ``into`` where it fits.
        None: it could not be."""

    def close(self) -> None: ...


class Capture:
    """A camera by OpenCV. ``stamped``: its driver says when a frame was taken, as V4L2's do."""

    def __init__(self, capture: Any, stamped: bool = False) -> None:
        self._capture, self._stamped = capture, stamped

    def grab(self) -> float | None:
        if not self._capture.grab():
            return None
        return _taken_s(self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3 if self._stamped else None)

    def retrieve(self, into: Image | None, /) -> Any:
        ok, image = self._capture.retrieve(into)
        return image if ok else None

    def close(self) -> None:
        self._capture.release()


class PiCamera:
    """A camera module of a Raspberry Pi, by picamera2: OpenCV cannot open one since libcamera."""

    def __init__(self, camera: Any) -> None:
        self._camera = camera
        self._request: Any = None

    def grab(self) -> float | None:
        self._release()
        try:
            self._request = self._camera.capture_request(wait=READ_TIMEOUT_S)
        except TimeoutError:  # a loose cable
            self._camera.cancel_all_and_flush()  # else it waits for ever when it is closed
            return None
        stamp_ns = self._request.get_metadata().get("SensorTimestamp")
        return _taken_s(stamp_ns / 1e9 if stamp_ns else None)

    def retrieve(self, _into: Image | None, /) -> Any:
        image = self._request.make_array("main")
        self._release()
        return image

    def _release(self) -> None:
        if self._request:
            self._request.release()
            self._request = None

    def close(self) -> None:
        self._release()
        self._camera.close()


def _taken_s(stamp_s: float | None) -> float:
    now_s = time.monotonic()
    return stamp_s if stamp_s and 0 <= now_s - stamp_s < MAX_AGE_S else now_s


def camera_opener(spec: str, hints: Hints | None) -> Callable[[], Camera] | None:
    """What opens the camera or network stream of this name, and raises SourceError where it cannot; None: it is none.

    Raises:
        SourceError: there will never be such a camera, as its name is wrong or a library is missing.
    """
    hints = hints or Unhinted()
    kind, _, rest = spec.partition(":")
    if kind in ("rtsp", "rtsps", "http", "https") and rest.startswith("//"):
        return lambda: _open_network(spec)
    device = rest if kind == "camera" else spec
    if device.startswith("/dev/"):
        return lambda: _open_v4l2(device, Path(device), hints)
    if kind != "camera":
        return None
    if rest.isdecimal() and len(rest) <= 3:
        return lambda: _open_v4l2(int(rest), DEVICES / f"video{int(rest)}", hints)
    csi = re.fullmatch(r"csi(?::(\d{1,2}))?", rest)
    if not csi:
        raise SourceError(
            f"source {spec!r}",
            expected="camera:N with the camera's number, camera:/dev/… or camera:csi",
            mend="try camera:0",
        )
    number = int(csi[1] or 0)
    return _csi_of_jetson(number, hints) if _is_jetson() else _csi_of_pi(number, hints)


def _open_network(url: str) -> Camera:
    name = public_name(url)
    # RTSP by TCP where the camera can: by UDP, which some releases of OpenCV try first, pictures come torn.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;prefer_tcp")
    if _built_with("FFMPEG"):
        timeout_ms = int(1e3 * READ_TIMEOUT_S)
        settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
        if "OPENCV_FFMPEG_THREADS" not in os.environ:
            # FFmpeg gives H.264 a thread for each core, and each of them but one holds a picture back.
            settings += [cv2.CAP_PROP_N_THREADS, 1]
        capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, settings)
    else:  # an OpenCV made for GStreamer
        capture = cv2.VideoCapture(url)
    if not capture.isOpened():
        raise SourceError(f"source {name} cannot be opened", mend="check its address, its password and the network")
    return Capture(capture)


def _open_v4l2(device: int | str, path: Path, hints: Hints) -> Camera:
    # OpenCV's own limit is as long as it takes to be taken for hung.
    os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(round(READ_TIMEOUT_S)))
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    if not capture.isOpened():
        if not path.exists():
            problem, mend = f"there is no {path}", "plug it in; `v4l2-ctl --list-devices` lists those the system knows"
        elif not os.access(path, os.R_OK | os.W_OK):
            problem, mend = f"{path} may not be read", "add the user to the group video, or run as a service"
        else:
            problem = f"{path} gives no pictures to OpenCV"
            mend = "check that no other program holds it; a ribbon-cable camera is camera:csi"
        raise SourceError(f"source camera:{device} cannot be opened: {problem}", mend=mend)
    # In this order: sizes and rates depend on the format.
    if hints.fourcc:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*hints.fourcc))
    if hints.size_wh:
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, hints.size_wh[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, hints.size_wh[1])
    if hints.fps:
        capture.set(cv2.CAP_PROP_FPS, hints.fps)
    logger.info(
        "camera:%s gives %d x %d at %g a second",
        device,
        *(capture.get(of) for of in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS)),
    )
    return Capture(capture, stamped=True)


def _csi_of_pi(number: int, hints: Hints) -> Callable[[], Camera]:
    os.environ.setdefault("LIBCAMERA_LOG_LEVELS", "*:ERROR")  # it logs each opening by itself
    try:
        from picamera2 import Picamera2
    except ImportError as error:
        raise SourceError(f"source camera:csi needs picamera2 ({error})", mend=PICAMERA2) from error
    except ValueError as error:  # https://github.com/raspberrypi/picamera2/issues/1088
        raise SourceError(
            f"source camera:csi: picamera2 was built for another NumPy ({error})",
            mend="pip install 'numpy<2' 'opencv-python-headless<4.12'",
        ) from error

    def opened() -> Camera:
        try:
            camera = Picamera2(number)
        except (IndexError, RuntimeError) as error:
            raise SourceError(
                f"source camera:csi cannot be opened: there is no camera module {number}, or it is in use ({error})",
                mend="check its cable; `rpicam-hello --list-cameras` lists those the system knows",
            ) from error
        try:
            main: dict[str, Any] = {"format": "RGB888"}  # in memory B, G, R: libcamera names it from the other end
            if hints.size_wh:
                main["size"] = hints.size_wh
            # Small pictures may come of a mode that reads the middle of the sensor only. At half its resolution all
            # Raspberry Pi's own read the whole one: https://github.com/raspberrypi/picamera2/issues/450
            raw = {"size": tuple(side // 2 for side in camera.sensor_resolution)}
            controls = {"FrameDurationLimits": (round(1e6 / hints.fps),) * 2} if hints.fps else {}
            camera.configure(camera.create_video_configuration(main=main, raw=raw, controls=controls))
            camera.start()
        except BaseException:
            camera.close()
            raise
        return PiCamera(camera)

    return opened


def _csi_of_jetson(number: int, hints: Hints) -> Callable[[], Camera]:
    if not _built_with("GStreamer"):
        raise SourceError("source camera:csi: this OpenCV is built without GStreamer", mend=JETSON_OPENCV)
    # What is given is what the sensor's modes are matched with.
    wanted = "".join(f", {key}={value}" for key, value in zip(("width", "height"), hints.size_wh or (), strict=False))
    if hints.fps:
        rate = Fraction(hints.fps).limit_denominator(1001)
        wanted += f", framerate={rate.numerator}/{rate.denominator}"
    pipeline = (
        f"nvarguscamerasrc sensor-id={number} ! video/x-raw(memory:NVMM){wanted} ! nvvidconv ! video/x-raw, format=BGRx"
        " ! videoconvert ! video/x-raw, format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )

    def opened() -> Camera:
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        if not capture.isOpened():
            raise SourceError(
                f"source camera:csi cannot be opened: nvarguscamerasrc gives nothing of sensor {number}",
                mend="check its cable, and restart the service nvargus-daemon",
            )
        return Capture(capture)

    return opened


def _is_jetson() -> bool:
    return DEVICE_TREE.exists() and b"nvidia,tegra" in DEVICE_TREE.read_bytes()


def _built_with(name: str) -> bool:
    return bool(re.search(rf"{name}: +YES", cv2.getBuildInformation()))

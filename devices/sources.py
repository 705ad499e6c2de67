"""Where images come from: cameras, network streams, videos, images, folders of images."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from edgekit.audio import AUDIO_SUFFIXES
from edgekit.devices.frames import Frame, Source, public_name
from edgekit.errors import EdgekitError, SourceError
from edgekit.messages import FileInput, printable
from edgekit.preprocess import IMAGE_SUFFIXES, read_image_bgr

logger = logging.getLogger(__name__)

USAGE = "camera:N, rtsp://…, http://… (MJPEG), a video, an image or a folder of images"


class ImageSource(Source):
    """Image files, in the order given. One that cannot be read is a frame with an error."""

    def __init__(self, spec: str, stop: threading.Event, paths: list[Path], loop: bool) -> None:
        super().__init__(spec, stop)
        self._paths, self._loop = paths, loop

    def _frames(self) -> Iterator[Frame]:
        while True:
            readable = False
            for path in self._paths:
                try:
                    image, error = read_image_bgr(path), ""
                except EdgekitError as unreadable:
                    image, error = None, unreadable.what
                readable |= image is not None
                yield Frame(image, FileInput(printable(path.name), 0), error)
            if not readable:
                raise SourceError(
                    f"source {self.name}: no readable image", mend="give PNG or JPEG files that are whole"
                )
            if not self._loop:
                return


class VideoSource(Source):
    """A video file, every frame of it."""

    def __init__(self, spec: str, stop: threading.Event, path: Path, loop: bool) -> None:
        super().__init__(spec, stop)
        self._path, self._loop = path, loop
        self._capture = _open_capture(str(path), self.name)

    def _frames(self) -> Iterator[Frame]:
        announced = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        while True:
            number = 0
            while True:
                ok, image = self._capture.read()
                if not ok:
                    break
                yield Frame(image, FileInput(printable(self._path.name), number))
                number += 1
            if number == 0:
                raise SourceError(f"source {self.name} has no frames", mend="give a video that OpenCV can decode")
            if number < announced:
                logger.warning("%s ended after %d of %d frames: it may be cut short", self._path, number, announced)
            if not self._loop:
                return
            self._capture.release()
            self._capture = _open_capture(str(self._path), self.name)

    def close(self) -> None:
        self._capture.release()


class LiveSource(Source):
    """A camera or network stream, read in a thread of its own; the newest frame wins."""

    live = True

    def __init__(self, spec: str, stop: threading.Event, target: int | str) -> None:
        super().__init__(spec, stop)
        self._capture = _open_capture(target, self.name)
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._read, name=f"source {self.name}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        ok = True
        while ok and not self._ended:
            ok, image = self._capture.read()
            with self._changed:
                if ok and not self._ended:
                    self.captured += 1
                    self.dropped += self._newest is not None
                    self._newest = Frame(image)
                self._ended |= not ok
                self._changed.notify()
        self._capture.release()

    def __iter__(self) -> Iterator[Frame]:
        while not self.stop.is_set():
            with self._changed:
                if self._newest is None and not self._ended:
                    self._changed.wait(0.2)
                frame, self._newest = self._newest, None
                ended = self._ended
            if frame is not None:
                yield frame
            elif ended:
                raise SourceError(f"source {self.name} stopped giving frames", mend="check the camera or the stream")

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self.dropped += self._newest is not None
            self._newest = None
        self._thread.join(5)


def open_source(spec: str, *, loop: bool = False, stop: threading.Event | None = None) -> Source:
    """Opens a source by its name on the command line.

    Args:
        spec: ``camera:N``, ``rtsp://…``, ``http://…``, or the path of a video, an image or a folder of images.
        loop: start files again at their end.
        stop: ends the iteration when set.

    Raises:
        SourceError: there is no such source, or it cannot be opened.
    """
    stop = stop or threading.Event()
    # Without this OpenCV and FFmpeg print lines of their own for a file they cannot read.
    set_level: Any = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # the latter since OpenCV 5
    set_level(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    kind, _, rest = spec.partition(":")
    if kind == "camera":
        if not rest.isdecimal() or len(rest) > 3:
            raise SourceError(f"source {spec!r}", expected="camera:N with the camera's number", mend="try camera:0")
        return LiveSource(spec, stop, int(rest))
    if kind in ("rtsp", "rtsps", "http", "https") and rest.startswith("//"):
        return LiveSource(spec, stop, spec)
    path = Path(spec)
    if kind == "mic" or path.suffix.lower() in AUDIO_SUFFIXES:
        raise SourceError(
            f"source {spec} is sound, and this bundle takes images",
            expected=USAGE,
            mend="give a bundle for audio tagging",
        )
    if spec and path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise SourceError(
                f"source {spec} holds no images",
                expected=f"files ending in {' '.join(sorted(IMAGE_SUFFIXES))}",
                mend="give another folder",
            )
        return ImageSource(spec, stop, paths, loop)
    if not path.is_file():
        raise SourceError(f"source {public_name(spec)!r} does not exist", expected=USAGE, mend="check the path")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(spec, stop, [path], loop)
    return VideoSource(spec, stop, path, loop)


def _open_capture(target: int | str, name: str) -> Any:
    capture = cv2.VideoCapture(target)
    if not capture.isOpened():
        mend = "check that the camera is plugged in and free" if isinstance(target, int) else f"expected {USAGE}"
        raise SourceError(f"source {name} cannot be opened", mend=mend)
    return capture

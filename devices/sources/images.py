"""Where images come from: files, read ahead by a thread, and live sources."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from edgekit.devices.sources import frames
from edgekit.devices.sources.buffers import Buffers
from edgekit.devices.sources.cameras import Hints, camera_opener
from edgekit.devices.sources.frames import Frame, Prepared, Source, public_name
from edgekit.devices.sources.live import LiveSource
from edgekit.errors import EdgekitError, SourceError
from edgekit.messages import FileInput, printable
from edgekit.preprocess import IMAGE_SUFFIXES, read_image_bgr

logger = logging.getLogger(__name__)

USAGE = "camera:N, camera:csi, /dev/video…, rtsp://…, http://… (MJPEG), a video, an image or a folder of images"

# So many images are read ahead; each is kept as it is in memory. One is enough where decoding is quicker than
# inference.
READ_AHEAD = 1
# How long a thread that reads may take to end; one that waits for a file server is left behind.
CLOSE_S = 1.0
_NOTICE_S = 0.2


class Picture(NamedTuple):
    """An image of a file, or why there is none."""

    image_bgr: npt.NDArray[np.uint8] | None
    input: FileInput
    error: str = ""


class FileSource(Source):
    """Images of files: all of them, in order, each with the time at which it was asked for.

    A thread reads ahead, and prepares what it read for the model while it is in the cache, so that decoding the next
    ones costs no time beside an inference.
    """

    def __init__(self, spec: str, stop: threading.Event) -> None:
        super().__init__(spec, stop)
        self._ahead: queue.SimpleQueue[tuple[Picture | Exception | None, Prepared | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(READ_AHEAD)
        self._ended = False
        self._thread = threading.Thread(target=self._read_ahead, name=f"source {self.name}", daemon=True)

    def _pictures(self) -> Iterator[Picture]:
        raise AssertionError("a subclass reads")

    def _read_ahead(self) -> None:
        pictures = self._pictures()
        picture: Picture | Exception | None = None
        while self._room.acquire() and not self._ended:
            try:
                picture = next(pictures, None)
            except Exception as error:
                picture = error
            self._ahead.put((picture, self._prepared(picture)))
            if not isinstance(picture, Picture):
                return

    def _prepared(self, picture: Picture | Exception | None) -> Prepared | None:
        if not (prepare := self.prepare) or not isinstance(picture, Picture) or picture.image_bgr is None:
            return None
        began_s = time.monotonic()
        try:
            tensor = prepare(picture.image_bgr, "bgr")
        except Exception:  # which whoever takes the frame finds too
            return None
        return Prepared(tensor, prepare, time.monotonic() - began_s)

    def _frames(self) -> Iterator[Frame]:
        frames.close_at_exit.add(self)
        self._thread.start()
        while not self.stop.is_set():
            try:
                picture, prepared = self._ahead.get(timeout=_NOTICE_S)
            except queue.Empty:
                continue
            if isinstance(picture, Exception):
                raise picture
            if picture is None:
                return
            self._room.release()
            yield Frame(*picture, prepared=prepared)

    def close(self) -> None:
        self._ended = True
        self._room.release()
        if self._thread.ident:
            self._thread.join(CLOSE_S)


class ImageSource(FileSource):
    """Image files, in the order given. One that cannot be read is a frame with an error."""

    def __init__(self, spec: str, stop: threading.Event, paths: list[Path], loop: bool) -> None:
        super().__init__(spec, stop)
        self._paths, self._loop = paths, loop

    def _pictures(self) -> Iterator[Picture]:
        while True:
            readable = False
            for path in self._paths:
                try:
                    image, error = read_image_bgr(path), ""
                except EdgekitError as unreadable:
                    image, error = None, unreadable.what
                readable |= image is not None
                yield Picture(image, FileInput(printable(path.name), 0), error)
            if not readable:
                raise SourceError(
                    f"source {self.name}: no readable image", mend="give PNG or JPEG files that are whole"
                )
            if not self._loop:
                return


class VideoSource(FileSource):
    """A video file, every frame of it."""

    def __init__(self, spec: str, stop: threading.Event, path: Path, loop: bool) -> None:
        super().__init__(spec, stop)
        self._path, self._loop = path, loop
        self._capture, self._buffers = self._open(), Buffers()

    def _open(self) -> Any:
        # Absolute: FFmpeg takes 12:30.mp4, file:other.mp4 or concat:a|b for a protocol.
        capture = cv2.VideoCapture(str(self._path.absolute()))
        if not capture.isOpened():
            raise SourceError(f"source {self.name} cannot be opened", mend=f"expected {USAGE}")
        return capture

    def _pictures(self) -> Iterator[Picture]:
        announced = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        reported = False
        while True:
            number = 0
            while True:
                ok, image = self._capture.read(self._buffers.take())
                if not ok:
                    break
                yield Picture(self._buffers.lend(image), FileInput(printable(self._path.name), number))
                number += 1
            if number == 0:
                raise SourceError(f"source {self.name} has no frames", mend="give a video that OpenCV can decode")
            if number < announced and not reported:
                reported = True
                logger.warning("%s ended after %d of %d frames: it may be cut short", self._path, number, announced)
            if not self._loop:
                return
            self._capture.release()
            self._capture = self._open()

    def close(self) -> None:
        super().close()
        if not self._thread.is_alive():
            self._capture.release()


def open_source(
    spec: str,
    *,
    loop: bool = False,
    stop: threading.Event | None = None,
    drop: str = "oldest",
    patient: bool = False,
    camera: Hints | None = None,
) -> Source:
    """Opens a source by its name on the command line.

    Args:
        spec: ``camera:N``, ``camera:/dev/…`` or ``/dev/…`` (V4L2), ``camera:csi``, ``rtsp://…``, ``http://…``, or the
            path of a video, an image or a folder of images.
        loop: start files again at their end.
        stop: ends the iteration when set.
        drop: of a live source: when a frame comes and the one before still waits, drop the ``oldest``, the ``newest``,
            or ``none``: then the source waits.
        patient: wait for a live source that cannot be opened yet.
        camera: the size, rate and format that a camera is asked for.

    Raises:
        SourceError: there is no such source, or it cannot be opened.
    """
    stop = stop or threading.Event()
    # Without this OpenCV and FFmpeg print lines of their own for a file they cannot read.
    set_level: Any = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # the latter since OpenCV 5
    set_level(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    open_camera = camera_opener(spec, camera)
    if open_camera:
        return LiveSource(spec, stop, open_camera, drop, patient)
    try:
        return _open_files(spec, Path(spec), loop, stop)
    except OSError as error:
        raise SourceError(
            f"source {public_name(spec)}: {error.strerror}", mend="check the path, and who may read it"
        ) from error


def _open_files(spec: str, path: Path, loop: bool, stop: threading.Event) -> Source:
    if spec and path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
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

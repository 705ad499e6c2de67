"""A camera or network stream, for months: read in a thread of its own, lost and regained."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from edgekit.devices.sources import frames
from edgekit.devices.sources.buffers import Buffers
from edgekit.devices.sources.cameras import Camera
from edgekit.devices.sources.frames import Frame, Source
from edgekit.errors import SourceError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DROPS = ("oldest", "newest", "none")

# A call of a driver that takes longer hangs. OpenCV and picamera2 give up before, where they can.
STALL_S = 10.0
# So many threads are left to calls that hang; then no camera is opened before one of them has ended.
MAX_ABANDONED = 3
# So many frames in a row that cannot be decoded are as good as none.
MAX_UNREADABLE = 30
# A picture is black if 99 % of it is darker than this. It is looked at so often, and told after so many in a row.
BLACK_LEVEL, LOOK_S, BLACK_LOOKS = 24, 1.0, 10
# How long a thread may take to end when its source is closed; one that hangs is left behind.
CLOSE_S = 1.0
# The end of a source, and a camera that hangs, are noticed within so long.
_NOTICE_S = 0.2


class Reader:
    """A thread that reads a camera. ``entered_s``: since when it is in a call that may hang, monotonic."""

    def __init__(self, name: str, read: Callable[[Reader], None]) -> None:
        self.entered_s: float | None = None
        self.told = False  # that it hangs
        self.thread = threading.Thread(target=read, args=(self,), name=f"source {name}", daemon=True)

    def call(self, function: Callable[[], Result]) -> Result:
        self.entered_s = time.monotonic()
        try:
            return function()
        finally:
            self.entered_s = None


class LiveSource(Source):
    """Frames of a camera, as they come.

    A camera that is lost is opened again for ever; one that hangs is left to its thread and opened by another: see
    ``lost`` and ``gaps``. A frame that cannot be decoded is one with an error.

    Args:
        open_camera: opens the camera; may raise SourceError.
        drop: what happens when a frame comes and the one before still waits. ``oldest``: that one is dropped;
            ``newest``: the one that comes is; ``none``: the camera waits.
        patient: wait for a camera that cannot be opened at the start. It is opened when it is iterated over, and not
            before, as another source may have it until then.

    Raises:
        SourceError: it cannot be opened, or ``drop`` is no such word.
    """

    live = True

    def __init__(
        self, spec: str, stop: threading.Event, open_camera: Callable[[], Camera], drop: str, patient: bool
    ) -> None:
        super().__init__(spec, stop)
        if drop not in DROPS:
            raise SourceError("drop", expected=" or ".join(DROPS), got=repr(drop), mend="give one of them")
        self._open_camera, self._drop = open_camera, drop
        self._darkness = Darkness(self.name)
        self._changed = threading.Condition()
        self._buffers = Buffers()
        self._waiting: Frame | None = None
        self._persistent = patient  # from the first opening at the latest
        self._begins = False  # after a gap, until a frame from behind it was given
        self._problem: SourceError | None = None
        self._seen, self._lost_s = False, 0.0
        self._abandoned: list[Reader] = []
        self._reader: Reader | None = None  # the one in charge: any other delivers nothing
        self._asleep = patient
        if not patient:
            self._start_reader()
            try:
                self._wait_until_open()
            except BaseException:
                self.close()
                raise

    def __iter__(self) -> Iterator[Frame]:
        with self._changed:
            if self._asleep and not self.stop.is_set():
                self._start_reader()
            self._asleep = False
        while self._reader and not self.stop.is_set():
            with self._changed:
                if self._waiting is None:
                    self._changed.wait(_NOTICE_S)
                frame, self._waiting = self._waiting, None
                if frame and frame.begins:
                    self._begins = False
                self._changed.notify_all()
            if frame:
                yield frame
            else:
                self._watch()

    def close(self) -> None:
        with self._changed:
            reader, self._reader, self._asleep = self._reader, None, False
            self.dropped += self._waiting is not None
            self._waiting = None
            self._changed.notify_all()
        if reader:
            reader.thread.join(CLOSE_S)

    def _start_reader(self) -> None:
        frames.close_at_exit.add(self)
        self._reader = Reader(self.name, self._read)
        self._reader.thread.start()

    def _wait_until_open(self) -> None:
        deadline_s = time.monotonic() + STALL_S
        with self._changed:
            while not (self._persistent or self._problem or self.stop.is_set()):
                self._changed.wait(_NOTICE_S)
                if time.monotonic() > deadline_s:
                    self._problem = SourceError(
                        f"source {self.name} cannot be opened: it did not answer for {STALL_S:g} s",
                        mend="check the camera or the network",
                    )
            if self._problem:
                raise self._problem

    def _watch(self) -> None:
        """Has another thread open a camera that hangs."""
        with self._changed:
            reader = self._reader
            entered_s = reader and reader.entered_s
            if not reader or not entered_s or time.monotonic() - entered_s < STALL_S:
                return
            self._abandoned = [one for one in self._abandoned if one.thread.is_alive()]
            hopeless = len(self._abandoned) == MAX_ABANDONED
            if not hopeless:
                self._abandoned.append(reader)
                self._start_reader()
            told, reader.told = reader.told, True
        if not told:
            self._tell_lost(SourceError(f"source {self.name} has given nothing for {STALL_S:g} s"))
            if hopeless:
                logger.warning(
                    "%d threads hang that opened source %s: it is opened again when one of them ends, or by a restart",
                    MAX_ABANDONED + 1,
                    self.name,
                )

    def _read(self, reader: Reader) -> None:
        """What a reader does while it is in charge: reads the camera, and opens it again."""
        waits_s = frames.retry_waits_s()
        while self._reader is reader:
            begun_s = time.monotonic()
            try:
                self._read_camera(reader)
                return
            except SourceError as error:
                problem = error
            except Exception as error:  # libraries raise what they like
                problem = SourceError(f"source {self.name} failed ({error or type(error).__name__})")
                logger.debug("%s", problem, exc_info=True)
            with self._changed:
                if self._reader is not reader:
                    return
                if not self._persistent:
                    self._problem = problem
                    self._changed.notify_all()
                    return
            self._tell_lost(problem)
            if time.monotonic() - begun_s > frames.MAX_RETRY_S:  # it was well for long
                waits_s = frames.retry_waits_s()
            with self._changed:
                self._changed.wait_for(lambda: self._reader is not reader, next(waits_s))

    def _read_camera(self, reader: Reader) -> None:
        """Until another reader is in charge, or none.

        Raises:
            SourceError: the camera cannot be opened, or gives no more frames.
        """
        camera = reader.call(self._open_camera)
        try:
            with self._changed:
                if self._reader is reader:
                    self._persistent = True
                    self._changed.notify_all()
            unreadable = 0
            while self._reader is reader:
                taken_s = reader.call(camera.grab)
                if taken_s is None:
                    raise SourceError(f"source {self.name} gives no more frames")
                if self._drop == "newest" and self._waiting:
                    self._deliver(reader, None)  # without decoding it
                    continue
                frame = _frame(taken_s, self._retrieve(reader, camera))
                self._deliver(reader, frame)
                unreadable = unreadable + 1 if frame.error else 0
                if unreadable == MAX_UNREADABLE:
                    raise SourceError(f"source {self.name} gives nothing that can be used ({frame.error})")
        finally:
            reader.call(camera.close)
            self._buffers.give_back()

    def _retrieve(self, reader: Reader, camera: Camera) -> Any:
        image = reader.call(lambda: camera.retrieve(self._buffers.take()))
        return image if image is None else self._buffers.lend(image)

    def _deliver(self, reader: Reader, frame: Frame | None) -> None:
        """``frame`` is the next to be used, unless its reader is no longer in charge. None: it is dropped."""
        with self._changed:
            if self._reader is not reader:
                return
            self.captured += 1
            regained, self.lost = self.lost, False
            again, self._seen = self._seen, True
            if regained and again:
                self.gaps += 1
                self._begins = True
            if self._drop == "none":
                self._changed.wait_for(lambda: self._waiting is None or self._reader is not reader)
            if frame is None or self._reader is not reader:
                self.dropped += 1
            else:
                self.dropped += self._waiting is not None
                self._waiting = replace(frame, begins=True) if self._begins else frame
                self._changed.notify_all()
        if regained:
            away_s = time.monotonic() - self._lost_s
            logger.warning("source %s gives frames%s, after %.1f s", self.name, " again" if again else "", away_s)
        if frame and frame.image_bgr is not None:
            self._darkness.look(frame.image_bgr)

    def _tell_lost(self, problem: SourceError) -> None:
        with self._changed:
            told, self.lost = self.lost, True
            if not told:
                self._lost_s = time.monotonic()
        logger.log(logging.DEBUG if told else logging.WARNING, "%s; trying again until it does", problem)


class Darkness:
    """Tells when a camera gives black for long, and when that is over."""

    def __init__(self, name: str) -> None:
        self._name, self._looked_s, self._black = name, time.monotonic(), 0

    def look(self, image_bgr: npt.NDArray[np.uint8]) -> None:
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        if np.mean(image_bgr[::16, ::16] < BLACK_LEVEL) >= 0.99:
            self._black += 1
            if self._black == BLACK_LOOKS:
                logger.warning("source %s gives black pictures: is there a cap on it, or no light?", self._name)
        else:
            if self._black >= BLACK_LOOKS:
                logger.warning("source %s is no longer black", self._name)
            self._black = 0


def _frame(taken_s: float, image: Any) -> Frame:
    image_bgr, error = _as_bgr(image)
    clock_offset_s = time.time() - time.monotonic()
    return Frame(
        image_bgr,
        error=error,
        captured_at=datetime.fromtimestamp(taken_s + clock_offset_s, timezone.utc),
        captured_s=taken_s,
        clock_offset_s=clock_offset_s,
    )


def _as_bgr(image: Any) -> tuple[npt.NDArray[np.uint8] | None, str]:
    """What a camera gave, grey or with a fourth channel too, as an image of a :class:`Frame`; or what is wrong."""
    if image is None:
        return None, "the camera's picture cannot be decoded"
    image = np.asarray(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape or channels not in (1, 3, 4):
        return None, f"picture: expected uint8 of shape (height, width, 3), got {image.dtype} of shape {image.shape}"
    if channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    elif channels == 4:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
    return np.asarray(image, np.uint8), ""

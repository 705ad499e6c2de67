"""What a source gives, one after the other: frames of video, or stretches of sound."""

from __future__ import annotations

import atexit
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.messages import FileInput, printable

# How long to wait before a camera or microphone that was lost is tried again, at first and at most.
RETRY_S, MAX_RETRY_S = 0.5, 30.0


class Prepared(NamedTuple):
    """The input tensor that ``by`` made of an image ahead, in ``took_s``."""

    tensor: npt.NDArray[Any]
    by: object
    took_s: float


@dataclass(frozen=True)
class Frame:
    """An image or a stretch of sound, as captured.

    ``image_bgr`` is (height, width, 3), 8-bit, in OpenCV's channel order; ``samples`` are mono at the model's rate,
    (n,): a window, or the next hop of a stream. Where it could not be read both are None, and ``error`` says why.
    ``captured_s`` is on the monotonic clock, and ``clock_offset_s`` how far the system's clock was ahead of it then: a
    change of it tells that the clock was set.

    ``begins``: it does not follow the one before, as the source was lost between them. Of sound, ``captured_at`` is the
    end of the window and ``window_start`` its beginning. ``complete``: with it a whole window was heard; before that a
    stream only warms up.
    """

    image_bgr: npt.NDArray[np.uint8] | None = None
    input: FileInput | None = None
    error: str = ""
    captured_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    captured_s: float = field(default_factory=time.monotonic)
    clock_offset_s: float = field(default_factory=lambda: time.time() - time.monotonic())
    samples: npt.NDArray[np.float32] | None = None
    window_start: datetime | None = None
    begins: bool = False
    complete: bool = True
    prepared: Prepared | None = None


class Source:
    """Iterates over frames until its end, or until ``stop`` is set; a context manager, as it may hold a device.

    Attributes:
        name: what was asked for, without what may be secret in a URL.
        captured: how many frames it has had from a camera, or given from files: those that were read ahead, and not
            asked for, are none. Of sound, how many whole windows.
        dropped: how many of them it gave to no one, because there was another.
        gaps: how often sound was lost, or a camera lost and regained.
        lost: it gives nothing now, and is tried again.
        prepare: what makes the input tensor of an image in BGR. A source that reads ahead does that too.
    """

    live = False
    lost = False
    prepare: Callable[..., npt.NDArray[Any]] | None = None

    def __init__(self, spec: str, stop: threading.Event) -> None:
        self.name, self.stop = public_name(spec), stop
        self.captured = self.dropped = self.gaps = 0

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames():
            if self.stop.is_set():
                return
            self.captured += frame.complete
            yield frame

    def _frames(self) -> Iterator[Frame]:
        raise AssertionError("a subclass reads")

    def close(self) -> None:
        """Frees the device or file."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# To be closed at the end of the process: a thread that comes back from OpenCV when Python has ended would abort it.
close_at_exit: weakref.WeakSet[Source] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for source in list(close_at_exit):
        source.close()


def retry_waits_s() -> Iterator[float]:
    """How long to wait before each try: up to ``RETRY_S``, then twice as long each time, up to ``MAX_RETRY_S``.

    At random, so that a hundred devices do not come back to one server all at once.
    """
    wait_s = RETRY_S
    while True:
        yield wait_s * random.uniform(0.5, 1)
        wait_s = min(2 * wait_s, MAX_RETRY_S)


def is_file(spec: str) -> bool:
    """Whether a source of this name is a file or a folder, and no camera, microphone or URL."""
    return not re.match(r"(camera|mic)(:|$)|/dev/|\w+://|$", spec)


def public_name(spec: str) -> str:
    """``spec`` as UTF-8 text that may be shown to anybody.

    Of a URL only what is known to be harmless: scheme, host, port, and a path without parameters. A password may hold
    ``/``, ``#``, ``?`` and ``@``, which no parser of URLs expects, so the host is what follows the last ``@``. Where
    that could itself be part of a secret, ``…`` stands for the host.
    """
    name = printable(spec)
    url = re.fullmatch(r"((?:camera:)?[A-Za-z][\w+.-]*:/{0,2})(.*)", name, re.DOTALL)
    if not url or not (url[1].endswith("//") or "@" in name or _NETWORK.match(name)):
        return name
    before, _, address = url[2].rpartition("@")
    shown = re.match(r"((?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?)(?=[/?#;&]|$)([^?#;&]*)", address)
    if not shown or re.search("[=?]", before):  # a query may hold an @ too
        return f"{url[1]}…"
    return url[1] + shown[1] + ("" if "=" in shown[2] else shown[2])


_NETWORK = re.compile(r"(camera:)?(rtsps?|https?|rtmps?|ftps?|tcp|udp|rtp|srt|mms):", re.IGNORECASE)

"""Where sound comes from: microphones and audio files."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from edgekit.audio import Resampler, read_audio
from edgekit.devices.sources.frames import Frame, Source, public_name, retry_waits_s
from edgekit.devices.sources.microphone import Block, Microphone
from edgekit.devices.sources.windows import Cutter, SampleClock, Stretch, wall_time_s
from edgekit.errors import SourceError
from edgekit.manifest import AudioInput
from edgekit.messages import FileInput, printable

logger = logging.getLogger(__name__)

USAGE = "mic, mic:NAME or an audio file (wav, flac, mp3, ogg)"

# Sound that arrives later than by the count of its samples, by so much: some was lost.
MAX_LATE_S = 1.0
# So much of a stream waits for the model; then sound is lost.
MAX_BACKLOG_S = 10.0
# How long a thread may take to end when its source is closed; one that hangs is left behind.
CLOSE_S = 2.0


class AudioFileSource(Source):
    """An audio file: a window each hop, the last one at its end; a shorter file is one window.

    Times are as if it was played from when it was opened. For a model that streams each round of ``loop`` begins anew.

    Raises:
        SourceError: the file cannot be read, or is shorter than the window of a model that streams.
    """

    def __init__(self, spec: str, stop: threading.Event, path: Path, input: AudioInput, loop: bool) -> None:
        super().__init__(spec, stop)
        self._path, self._input, self._loop = path, input, loop
        self._pieces = read_audio(path, input.sample_rate_hz)
        self._first = next(self._pieces)  # so that what is no sound is refused before anything else begins

    def _frames(self) -> Iterator[Frame]:
        while True:
            number, begun_s = 0, datetime.now(timezone.utc).timestamp()
            for stretch in self._stretches():
                frame = _frame(stretch, begun_s, self._input, FileInput(printable(self._path.name), number))
                number += stretch.complete
                yield frame
            if not number:
                window_s = self._input.window_samples / self._input.sample_rate_hz
                raise SourceError(
                    f"source {self.name} is too short for a model that streams",
                    expected=f"at least {window_s:.2f} s",
                    mend="give a longer one",
                )
            if not self._loop:
                return
            self._pieces = read_audio(self._path, self._input.sample_rate_hz)
            self._first = next(self._pieces)

    def _stretches(self) -> Iterator[Stretch]:
        cutter = Cutter(self._input)
        yield from cutter.push(self._first)
        for piece in self._pieces:
            yield from cutter.push(piece)
        yield from cutter.finish()

    def close(self) -> None:
        with suppress(ValueError):  # a thread that hangs is reading
            self._pieces.close()


class MicrophoneSource(Source):
    """A microphone, read in a thread of its own.

    Of windows the newest wins. A stream waits for the model, up to ``MAX_BACKLOG_S``. Where sound is lost, by an
    overflow, by a device that stalls or goes away, or by a model that is too slow for its stream, there is a gap: it is
    told and counted, and what comes after it begins anew. A device that went away is opened again, for as long as it
    takes; ``patient``: so is one that is not there at the start.

    Raises:
        SourceError: there is no such microphone, or it cannot be opened.
    """

    live = True

    def __init__(
        self,
        spec: str,
        stop: threading.Event,
        name: str,
        input: AudioInput,
        patient: bool = False,
        preferred: str = "",
    ) -> None:
        super().__init__(spec, stop)
        self._asked_for, self._input = (name, preferred), input
        self._cutter = Cutter(input)
        self._changed = threading.Condition()
        hop_s = input.hop_samples / input.sample_rate_hz
        self._waiting: deque[Frame] = deque()
        self._most = max(int(MAX_BACKLOG_S / hop_s), 2) if input.streaming else 1
        self._ended = threading.Event()
        self._heard_s: float | None = None  # the end of the last sound, on the monotonic clock
        self._microphone = Microphone(name, preferred)
        if not patient:
            try:
                self._open()
            except BaseException:
                self._microphone.close()
                raise
        self._thread = threading.Thread(target=self._listen, args=(patient,), name=f"source {self.name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        while not self.stop.is_set():
            with self._changed:
                if not self._waiting:
                    self._changed.wait(0.2)
                frame = self._waiting.popleft() if self._waiting else None
            if frame:
                yield frame

    def close(self) -> None:
        self._ended.set()
        self._microphone.end()
        self._thread.join(CLOSE_S)
        with self._changed:
            self._drop_waiting()

    def _open(self) -> None:
        self._microphone.open()
        self._restart()

    def _restart(self) -> None:
        """What comes next does not follow what came before."""
        self._resampler = Resampler(self._microphone.sample_rate_hz, self._input.sample_rate_hz)
        self._clock = SampleClock(self._microphone.sample_rate_hz)
        self._cutter.restart()

    def _listen(self, closed: bool) -> None:
        block: Block | None = None
        while not self._ended.is_set():
            try:
                if closed:
                    closed = False
                    self._open()
                self._take(block or self._microphone.read())
                block = None
            except Exception as error:  # there may be no room for a process, and libraries raise what they like
                block = self._reopen(_lost(self.name, error))
        with suppress(SourceError):
            self._microphone.close()

    def _reopen(self, lost: SourceError) -> Block | None:
        """The first sound there is again; None if the source is closed."""
        lost_s = time.monotonic()
        if not self._ended.is_set():
            self.lost = True
            logger.warning("%s; opening it again until it does", lost if self._heard_s is None else lost.what)
        for wait_s in retry_waits_s():
            if self._ended.wait(wait_s):
                return None
            try:
                self._microphone.close()
                self._microphone = Microphone(*self._asked_for)
                if self._ended.is_set():  # close() may have ended the one before
                    return None
                self._open()
                block = self._microphone.read()
            except Exception as error:
                logger.debug("%s", _lost(self.name, error))
                continue
            self.lost = False
            if self._heard_s is None:
                logger.info("microphone %s is there, after %.1f s", self._microphone.name, time.monotonic() - lost_s)
            else:
                begun_s = block.arrived_s - len(block.samples) / self._microphone.sample_rate_hz
                self._tell_gap(begun_s - self._heard_s)
            return block
        return None

    def _take(self, block: Block) -> None:
        samples = len(block.samples)
        late_s = self._clock.late_s(samples, block.arrived_s)
        if block.gap or late_s > MAX_LATE_S:
            self._tell_gap(max(late_s, 0.0))
            self._restart()
        self._clock.count(samples, block.arrived_s)
        self._heard_s = self._clock.time_s()
        sound = self._resampler(block.samples.astype(np.float32) / np.float32(32_768))
        for stretch in self._cutter.push(sound):
            if not self._deliver(_frame(stretch, wall_time_s(self._clock.time_s(0.0)), self._input, None)):
                self._tell_gap(MAX_BACKLOG_S, ": it comes faster than it is dealt with")
                self._restart()
                return

    def _deliver(self, frame: Frame) -> bool:
        """False: it is lost with those of its stream that wait, for there are too many."""
        with self._changed:
            if len(self._waiting) == self._most:
                self._drop_waiting()
                if self._input.streaming:
                    return False
            self.captured += frame.complete
            self._waiting.append(frame)
            self._changed.notify()
        return True

    def _drop_waiting(self) -> None:
        self.dropped += sum(frame.complete for frame in self._waiting)
        self._waiting.clear()

    def _tell_gap(self, lost_s: float, reason: str = "") -> None:
        self.gaps += 1
        logger.warning(
            "gap in the sound of microphone %s, about %.1f s%s; it begins anew", self._microphone.name, lost_s, reason
        )


def _lost(name: str, error: Exception) -> SourceError:
    if isinstance(error, SourceError):
        return error
    return SourceError(f"source {name} failed ({error or type(error).__name__})", mend="check the device")


def open_audio_source(
    spec: str,
    input: AudioInput,
    *,
    loop: bool = False,
    stop: threading.Event | None = None,
    patient: bool = False,
    preferred: str = "",
) -> Source:
    """Opens a source of sound by its name on the command line.

    Args:
        spec: ``mic``, ``mic:NAME``, or the path of an audio file.
        input: what the model is given.
        loop: start a file again at its end.
        stop: ends the iteration when set.
        patient: wait for a microphone that cannot be opened yet.
        preferred: a part of the name of the microphone that ``mic`` is, where there is such a one.

    Raises:
        SourceError: there is no such source, or it cannot be opened.
    """
    stop = stop or threading.Event()
    kind, _, name = spec.partition(":")
    if kind == "mic":
        return MicrophoneSource(spec, stop, name, input, patient, preferred)
    path = Path(spec)
    try:
        wrong = "" if path.is_file() else "is a folder" if spec and path.is_dir() else "does not exist"
    except OSError as error:
        raise SourceError(
            f"source {public_name(spec)}: {error.strerror}", mend="check the path, and who may read it"
        ) from error
    if wrong:
        raise SourceError(f"source {public_name(spec)!r} {wrong}", expected=USAGE, mend="check the path")
    return AudioFileSource(spec, stop, path, input, loop)


def _frame(stretch: Stretch, begun_s: float, input: AudioInput, file: FileInput | None) -> Frame:
    """``begun_s`` is the time of the first sample, s since 1970."""

    def at(sample: int) -> datetime:
        return datetime.fromtimestamp(begun_s + sample / input.sample_rate_hz, timezone.utc)

    return Frame(
        samples=None if stretch.error else stretch.samples,
        error=stretch.error,
        input=file,
        captured_at=at(stretch.end),
        window_start=at(stretch.end - stretch.window_samples),
        begins=stretch.begins,
        complete=stretch.complete,
    )

"""From sound to the input tensor: the same code for calibration, verification and the device."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, SourceError
from edgekit.manifest import LogMel
from edgekit.mel import mel_filters
from edgekit.messages import printable

logger = logging.getLogger(__name__)

Samples = npt.NDArray[np.float32]

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".aiff", ".aif", ".au", ".caf", ".w64", ".opus"}


def is_sound(source: str) -> bool:
    """Whether a source of this name on the command line gives sound, and no images."""
    return source.partition(":")[0] == "mic" or ("://" not in source and Path(source).suffix.lower() in AUDIO_SUFFIXES)


# So many frames at most are worked out at once: their spectra stay in the processor's cache.
_BLOCK_FRAMES = 64
# The filters are multiplied in groups of so many, each with the part of the spectrum that they cover: most of the rest
# are zeros. And a product of so many multiplications at most OpenBLAS does on the thread that asks for it; those of its
# own that it wakes for a larger one spin afterwards, at a fifth of a core for a stream of two hops a second.
_GROUP_FILTERS, _MAX_PRODUCT = 16, 200_000
# A file is decoded in pieces of so many samples, all channels together.
_READ_SAMPLES = 1 << 17


class LogMelFrontEnd:
    """Sound -> log-mel spectrogram in dB, as :class:`edgekit.manifest.LogMel` defines it; librosa's ``melspectrogram``
    and ``power_to_db(ref=1)`` give the same.

    Called, it takes a whole stretch of sound. As a stream, :meth:`push` gives the frames that are complete, and
    :meth:`flush` those that reach past the end: together the frames of the whole, but for ``range_db``, which a stream
    cannot know.

    Args:
        front_end: the parameters.
        sample_rate_hz: of the samples.

    Raises:
        EdgekitError: the parameters do not fit each other.
    """

    def __init__(self, front_end: LogMel, sample_rate_hz: int) -> None:
        if not 0 <= front_end.low_hz < front_end.high_hz <= sample_rate_hz / 2:
            raise EdgekitError(
                "mel filters",
                expected=f"0 <= low_hz < high_hz <= {sample_rate_hz / 2:g}, half the sample rate",
                got=f"{front_end.low_hz:g} and {front_end.high_hz:g}",
                mend="convert the model again with the range it was trained with",
            )
        if not (front_end.floor > 0 and front_end.power > 0):
            raise EdgekitError(
                "log-mel",
                expected="floor and power above 0",
                got=f"{front_end.floor:g} and {front_end.power:g}",
                mend="convert the model again",
            )
        self.front_end, self.sample_rate_hz = front_end, sample_rate_hz
        fft = front_end.fft_samples
        # How far a frame reaches before the sample it is about, and from there on.
        self._before, self._after = fft // 2, fft - fft // 2
        self._window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)).astype(np.float32)
        filters = mel_filters(front_end, sample_rate_hz)
        self._groups: list[tuple[slice, slice, Samples]] = []
        for start in range(0, front_end.num_mel_bins, _GROUP_FILTERS):
            group = slice(start, min(start + _GROUP_FILTERS, front_end.num_mel_bins))
            used = np.flatnonzero(filters[:, group].any(1))
            bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
            self._groups.append((group, bins, np.ascontiguousarray(filters[bins, group])))
        widest = max(matrix.size for _, _, matrix in self._groups)
        self._block_frames = min(max(_MAX_PRODUCT // widest, 8), _BLOCK_FRAMES)
        # Of a stream: the samples that are still needed, whether its beginning has been mirrored, and where in the
        # samples the next frame begins, which is past their end where frames lie further apart than they are long.
        self._held: Samples = np.empty(0, np.float32)
        self._begun, self._skip = False, 0

    def __call__(self, samples: npt.NDArray[Any]) -> Samples:
        """Mono ``samples``, float in -1..1 or int16, shape (n,) -> levels (num_mel_bins, 1 + n // frame_hop_samples).

        Sound shorter than half an FFT is mirrored again and again.

        Raises:
            EdgekitError: there are no samples, or some are NaN or infinite, or of another shape or type.
        """
        sound = as_samples(samples)
        _check_length(sound)
        levels = self._levels(np.pad(sound, (self._before, self._after), "reflect"))
        if self.front_end.range_db is not None:
            np.maximum(levels, levels.max() - np.float32(self.front_end.range_db), out=levels)
        return levels

    def push(self, samples: npt.NDArray[Any]) -> Samples:
        """The next ``samples`` of a stream -> levels (num_mel_bins, frames) of the frames complete by now, maybe none.

        After n samples, more than half an FFT, they are ``1 + (n - fft_samples / 2) // frame_hop_samples`` in all.

        Raises:
            EdgekitError: as when called, but that there may be no samples. :meth:`reset` before going on.
        """
        self._held = np.concatenate([self._held, as_samples(samples)])
        if not self._begun:
            if len(self._held) <= self._before:  # too little to mirror
                return self._no_frames()
            self._begun = True
            self._held = np.concatenate([self._held[self._before : 0 : -1], self._held])
        spare = len(self._held) - self._skip - self.front_end.fft_samples
        if spare < 0:
            return self._no_frames()
        levels = self._levels(self._held[self._skip :])
        following = self._skip + levels.shape[1] * self.front_end.frame_hop_samples
        # What the next frame begins with, and what the end would be mirrored from.
        forgotten = max(min(following, len(self._held) - self._after - 1), 0)
        self._held, self._skip = self._held[forgotten:].copy(), following - forgotten
        return levels

    def flush(self) -> Samples:
        """The frames that reach past the end of the stream, (num_mel_bins, frames), which is mirrored there. The next
        samples begin another stream."""
        if self._begun:
            mirrored = np.concatenate([self._held, self._held[-2 : -self._after - 2 : -1]])[self._skip :]
        elif len(self._held):
            mirrored = np.pad(self._held, (self._before, self._after), "reflect")
        else:
            mirrored = self._held
        self.reset()
        return self._levels(mirrored) if len(mirrored) >= self.front_end.fft_samples else self._no_frames()

    def reset(self) -> None:
        """Forgets the stream so far: the next samples begin another."""
        self._held = np.empty(0, np.float32)
        self._begun, self._skip = False, 0

    def _no_frames(self) -> Samples:
        return np.empty((self.front_end.num_mel_bins, 0), np.float32)

    def _levels(self, sound: Samples) -> Samples:
        """dB of the frames that lie wholly within ``sound``, the first at its beginning."""
        power = self.front_end.power
        mel = self._mel_power(sound)
        # log(x ** power) as power * log(x), which does not overflow
        with np.errstate(invalid="ignore", over="ignore"):
            np.maximum(mel, np.float32(self.front_end.floor ** (1 / power)), out=mel)
            levels = np.multiply(np.log10(mel.T), np.float32(10 * power), order="C")
        return _check_finite(levels)

    def _mel_power(self, sound: Samples) -> Samples:
        """The power in each mel filter, (frames, num_mel_bins), of the frames that lie wholly within ``sound``."""
        fft, hop = self.front_end.fft_samples, self.front_end.frame_hop_samples
        frames = np.lib.stride_tricks.sliding_window_view(sound, fft)[::hop]
        mel = np.empty((len(frames), self.front_end.num_mel_bins), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(frames), self._block_frames):
                block = slice(start, start + self._block_frames)
                spectra = np.fft.rfft(frames[block] * self._window)
                power = (spectra.real**2 + spectra.imag**2).astype(np.float32, copy=False)
                for group, bins, filters in self._groups:
                    mel[block, group] = power[:, bins] @ filters
        return mel


def as_samples(samples: npt.NDArray[Any]) -> Samples:
    """Mono ``samples``, shape (n,), as float32 in -1..1; of int16, 32,768 is 1.

    Raises:
        EdgekitError: they are of another shape or type.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or (samples.dtype != np.int16 and samples.dtype.kind != "f"):
        raise EdgekitError(
            "sound",
            expected="mono samples of shape (n,), float in -1..1 or int16",
            got=f"{samples.dtype} of shape {samples.shape}",
            mend="average the channels and scale it",
        )
    if samples.dtype == np.int16:
        return samples.astype(np.float32) * np.float32(1 / 32_768)
    return samples.astype(np.float32, copy=False)


def check_sound(sound: Samples) -> Samples:
    """``sound``, for what would not be told of it by its log-mels.

    Raises:
        EdgekitError: there are no samples, or some are NaN or infinite.
    """
    _check_length(sound)
    return _check_finite(sound)


def _check_length(sound: Samples) -> None:
    if not len(sound):
        raise EdgekitError("sound", expected="at least one sample", got="none", mend="leave out empty recordings")


def _check_finite(values: Samples) -> Samples:
    if not np.isfinite(values).all():
        raise EdgekitError(
            "sound",
            expected="finite samples in -1..1",
            got="NaN, infinity or larger ones",
            mend="check what made it",
        )
    return values


class Resampler:
    """Sound with any number of channels -> mono at ``sample_rate_hz``, piece by piece.

    Raises:
        EdgekitError: it needs soxr, which is not installed.
    """

    def __init__(self, from_hz: int, sample_rate_hz: int) -> None:
        self._stream = None
        if from_hz != sample_rate_hz:
            self._stream = _import("soxr").ResampleStream(from_hz, sample_rate_hz, 1, dtype="float32")

    def __call__(self, sound: Samples, last: bool = False) -> Samples:
        """``sound`` (n, channels), float -> (m,). Some of it is held back until ``last``."""
        mono = sound[:, 0] if sound.shape[1] == 1 else sound.mean(1)
        mono = np.ascontiguousarray(mono, np.float32)
        return mono if self._stream is None else np.asarray(self._stream.resample_chunk(mono, last))


def read_audio(path: str | os.PathLike[str], sample_rate_hz: int) -> Generator[Samples, None, None]:
    """The sound in a file (wav, flac, mp3, ogg and what else libsndfile reads), mono at ``sample_rate_hz``, in pieces
    of some seconds, so that its length does not matter. The channels are averaged.

    One that is cut short gives what is there, and a warning.

    Raises:
        SourceError: the file cannot be read, is no sound, or holds none.
        EdgekitError: soundfile or soxr is not installed.
    """
    soundfile, name = _import("soundfile"), printable(Path(path).name)
    try:
        with Path(path).open("rb") as opened:
            empty = not opened.read(1)
        if empty:
            raise SourceError(f"{name} is empty", mend="give another file")
        file = soundfile.SoundFile(os.fsencode(path))
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror}", mend="check the path") from error
    except (soundfile.LibsndfileError, TypeError) as error:  # the latter for raw samples, of no known rate
        raise SourceError(f"{name} is not a sound file", mend="give a wav, flac, mp3 or ogg that is whole") from error
    with file:
        resample, damage = Resampler(file.samplerate, sample_rate_hz), ""
        read = given = 0
        frames = max(_READ_SAMPLES // file.channels, 1)
        while not damage:
            try:
                piece = file.read(frames, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                piece, damage = np.empty((0, file.channels), np.float32), str(error)
            read += len(piece)
            if len(sound := resample(piece, last=not len(piece))):
                given += len(sound)
                yield sound
            if not len(piece):
                break
        if not given:
            raise SourceError(f"{name} holds no sound", mend="give a wav, flac, mp3 or ogg that is whole")
        seconds, announced = read / file.samplerate, file.frames / file.samplerate
        # Of an mp3 of constant bitrate libsndfile guesses the length, from that of the file, tags and all. Of others it
        # corrects a length that the file does not hold, and tells so in its log alone.
        guessed = re.search(r"bitrate mode *: constant", file.extra_info)
        corrected = re.search("should be|lacks an end", file.extra_info)
        if damage or corrected or (seconds < announced - 0.1 and not guessed):
            logger.warning("%s ended after %.1f s: it may be cut short", name, seconds)


def _import(name: str) -> Any:
    """The package ``name``, of those that only sound needs."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the latter where soundfile does not find libsndfile
        raise EdgekitError(f"sound needs the package {name} ({error})", mend=f"pip install {name}") from error

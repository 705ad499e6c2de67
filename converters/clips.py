"""Sound as data: audio files and arrays of log-mel levels, and the input tensors that the device makes of them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from edgekit.audio import AUDIO_SUFFIXES, LogMelFrontEnd, read_audio
from edgekit.converters.kinds import Array, Tensors
from edgekit.errors import ConversionError, EdgekitError
from edgekit.manifest import AudioInput
from edgekit.quantization import quantize

# A tag network that saturates flips rather than drifts: so many clips tell how often.
ENOUGH = 24
# dB by which the shifted copies are louder.
_GAINS_DB = (0.0, 1.5, -1.5, 3.0, -3.0)


class Clips:
    """Windows of sound as log-mel levels in dB, each (num_mel_bins, frames, 1). See
    :class:`edgekit.converters.kinds.Kind`."""

    thing, sources = "clip", "audio files or .npy log-mels"
    enough, max_calibration, max_validation, max_of_file, noise_count = 12, 200, 500, 8, 4
    saturates = True

    def __init__(self, input: AudioInput) -> None:
        self.input = input
        self.front_end = LogMelFrontEnd(input.front_end, input.sample_rate_hz)
        # The frames of a stream are those that are complete, those of a window also the one about its end.
        frames = input.window_samples // input.front_end.frame_hop_samples + (not input.streaming)
        self.shape: tuple[int, int, int] = (input.front_end.num_mel_bins, frames, 1)

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".npy", *AUDIO_SUFFIXES})

    def read(self, path: Path, most: int) -> Iterator[Array]:
        """An audio file gives the windows in it, at most so many, evenly spaced; one shorter than a window is followed
        by silence."""
        if path.suffix.lower() == ".npy":
            try:
                x = np.load(path, allow_pickle=False)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise EdgekitError(f"{path.name} cannot be read ({error})", mend="write it with numpy.save") from error
            x = self.check(x, path.name)
            yield from (self.item(x[row]) for row in _spread(len(x), most))
            return
        for window in windows(read_audio(path, self.input.sample_rate_hz), self.input.window_samples, most):
            self.front_end.reset()
            try:
                levels = self.front_end.push(window) if self.input.streaming else self.front_end(window)
            except EdgekitError as error:
                raise EdgekitError(f"{path.name}: {error.what}", mend="remove or replace it") from error
            yield levels[..., None]

    def check(self, x: Array, where: str) -> Array:
        """Of a stream, arrays may have any number of frames."""
        mels, frames, _ = self.shape
        if x.dtype not in (np.float32, np.float64):
            raise ConversionError(
                f"{where}: x", expected="float32 log-mel levels in dB", got=str(x.dtype), mend="convert it"
            )
        given = x.shape
        if x.ndim == 4 and x.shape[1:3] == (1, mels):  # channels first, as Theano had them
            x = x[:, 0]
        if x.ndim == 2:
            x = x[None]
        if x.ndim == 3:
            x = x[..., None]
        fits = x.ndim == 4 and (x.shape[1], x.shape[3]) == (mels, 1) and 0 not in x.shape
        if not fits or (x.shape[2] != frames and not self.input.streaming):
            length = "frames" if self.input.streaming else frames
            raise ConversionError(
                f"{where}: x of {x.dtype}",
                expected=f"log-mels of shape ({mels}, {length}) or (n, {mels}, {length})",
                got=str(given),
                mend="reshape it, or give --mels and --frames that fit",
            )
        return x

    def item(self, x: Array) -> Array:
        """Of a stream, what is shorter than it needs to hear has its end before it too, as if it were played again."""
        missing = max(self.shape[1] - x.shape[1], 0)
        padded = np.pad(x, ((0, 0), (missing, 0), (0, 0)), "wrap")
        return padded[:, -self.shape[1] :].astype(np.float32)

    def suspicion(self, x: Array) -> str:
        mend = f"int8 ranges made from them fit no sound; give {self.enough} or more typical clips"
        if len(x) > 1 and all((item == x[0]).all() for item in x):
            return f"all calibration clips are the same: {mend}"
        if constant := sum(bool((item == item[:, :1]).all()) for item in x):
            which = "all" if constant == len(x) else f"{constant} of {len(x)}"
            return f"{which} calibration clips are silence, or do not change: {mend}"
        return ""

    def noise(self) -> Array:
        return np.random.default_rng(0).uniform(-60, 20, (self.noise_count, *self.shape)).astype(np.float32)

    def tensors(self, x: Array, dtype: str = "float32", scale: float = 0.0, zero_point: int = 0) -> Tensors:
        """Of a streaming model, all that it is given one after the other: (1, steps, num_mel_bins, frames, 1)."""
        for item in x:
            tensor = quantize(item, dtype, scale, zero_point) if scale else item
            yield (steps(tensor, self.input) if self.input.streaming else tensor)[None]

    def inputs(self, x: Array) -> Tensors:
        for item in x:
            yield item[None]

    def copies(self, x: Array) -> Iterator[Array]:
        """``ENOUGH`` copies or some more, rolled in time and made louder or softer."""
        if len(x) >= ENOUGH:
            return
        copies = -(-ENOUGH // len(x))
        for clip, item in enumerate(x):
            for copy in range(copies):
                shift = round((copy + (clip + 1) / (len(x) + 1)) / copies * self.shape[1])
                yield np.roll(item, shift, axis=1) + np.float32(_GAINS_DB[(clip + copy) % len(_GAINS_DB)])


def steps(x: Array, input: AudioInput) -> Array:
    """Log-mels (num_mel_bins, frames, 1) -> what a streaming model is given of them in turn, (steps, num_mel_bins,
    frames of a hop, 1)."""
    frames = input.hop_samples // input.front_end.frame_hop_samples
    count = x.shape[1] // frames
    return np.moveaxis(x[:, : count * frames].reshape(x.shape[0], count, frames, 1), 0, 1)


def windows(pieces: Iterable[Array], window_samples: int, most: int) -> Iterable[Array]:
    """At most so many windows, evenly spaced, of a sound of any length that comes in ``pieces``; one window, with
    silence after it, of one that is shorter. Its length is known at the end only: no more than twice as many windows
    are held at a time."""
    kept: list[Array] = []
    window = np.zeros(window_samples, np.float32)
    filled, number, stride = 0, 0, 1
    for piece in pieces:
        while len(piece):
            taken = min(len(piece), window_samples - filled)
            window[filled : filled + taken] = piece[:taken]
            piece, filled = piece[taken:], filled + taken
            if filled < window_samples:
                break
            if number % stride == 0:
                kept.append(window.copy())
                if len(kept) == 2 * most:
                    kept, stride = kept[::2], 2 * stride
            filled, number = 0, number + 1
    if not kept:
        window[filled:] = 0
        kept.append(window)
    return [kept[row] for row in _spread(len(kept), most)]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of ``count`` rows, evenly spaced, with as much before the first as after the last."""
    chosen = min(count, most)
    return [int((row + 0.5) * count / chosen) for row in range(chosen)]

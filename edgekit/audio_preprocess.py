"""From a window or a hop of sound to the input tensor: the same code for calibration, verification and the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.audio import LogMelFrontEnd, Samples, as_samples, check_sound
from edgekit.errors import EdgekitError
from edgekit.manifest import AudioInput
from edgekit.quantization import quantize


class WindowPreprocessor:
    """Turns windows of sound into input tensors of one type, (1, num_mel_bins, frames, 1), or where the graph itself
    has the front end, (1, window_samples).

    Args:
        input: the window and its front end.
        dtype: type of the tensor: ``float32``, ``int8``, ``uint8`` or ``int16``.
        scale, zero_point: quantization of the tensor; 0 for a tensor that is not quantized.
    """

    def __init__(self, input: AudioInput, dtype: str = "float32", scale: float = 0.0, zero_point: int = 0) -> None:
        self.input = input
        self.tensor_shape = input.tensor_shape
        self._front_end = None if input.front_end_in_graph else LogMelFrontEnd(input.front_end, input.sample_rate_hz)
        self._dtype, self._scale, self._zero_point = dtype, scale, zero_point

    def __call__(self, samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Mono ``samples``, float in -1..1 or int16, shape (n,) -> the input tensor.

        Of more than ``window_samples`` the middle is taken; to fewer, silence is added at the end.

        Raises:
            EdgekitError: there are no samples, or some are NaN or infinite, or of another shape or type.
        """
        sound = fit(as_samples(samples), self.input.window_samples)
        return self._tensor(check_sound(sound) if self._front_end is None else self._front_end(sound))

    def _tensor(self, real: Samples) -> npt.NDArray[Any]:
        tensor = quantize(real, self._dtype, self._scale, self._zero_point) if self._scale else real
        return tensor.reshape(self.tensor_shape)


class StreamPreprocessor(WindowPreprocessor):
    """Turns the hops of a stream, one after the other, into input tensors (1, num_mel_bins, frames of a hop, 1), or
    where the graph itself has the front end, (1, hop_samples).

    Attributes:
        heard_samples: since the beginning or the last :meth:`reset`.
    """

    heard_samples = 0

    def __call__(self, samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The next ``hop_samples`` -> the input tensor.

        Raises:
            EdgekitError: they are not as many, or some are NaN or infinite, or of another shape or type.
                :meth:`reset` before going on.
        """
        if len(samples) != self.input.hop_samples:
            raise EdgekitError(
                "sound",
                expected=f"{self.input.hop_samples} samples, a hop of the stream",
                got=str(len(samples)),
                mend="give one hop at a time",
            )
        self.heard_samples += len(samples)
        return self._tensor(
            check_sound(as_samples(samples)) if self._front_end is None else self._front_end.push(samples)
        )

    def reset(self) -> None:
        self.heard_samples = 0
        if self._front_end is not None:
            self._front_end.reset()


def fit(sound: Samples, window_samples: int) -> Samples:
    """The middle ``window_samples`` of ``sound``, or all of it and silence after it, as the music tagger's author did
    (keunwoochoi/music-auto_tagging-keras, ``audio_processor.py``)."""
    if 0 < len(sound) < window_samples:
        return np.pad(sound, (0, window_samples - len(sound)))
    start = max(len(sound) - window_samples, 0) // 2
    return sound[start : start + window_samples]

"""The triangular filters of a mel spectrogram, as librosa defines them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgekit.manifest import LogMel

# The mel scale of Slaney's Auditory Toolbox: 3 mel in 200 Hz, from 1 kHz on 27 mel for each factor of 6.4.
_LINEAR_HZ, _KNEE_HZ, _LOG_STEP = 200 / 3, 1000.0, np.log(6.4) / 27


def mel_filters(front_end: LogMel, sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """The triangular filters, (1 + fft_samples // 2, num_mel_bins), each from the centre of the one below it to that of
    the one above, evenly spaced in mel."""
    slaney = front_end.mel_scale == "slaney"
    low, high = (float(_mel(np.array(hz), slaney)) for hz in (front_end.low_hz, front_end.high_hz))
    corners = _hertz(np.linspace(low, high, front_end.num_mel_bins + 2), slaney)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    bins = np.fft.rfftfreq(front_end.fft_samples, 1 / sample_rate_hz)[:, None]
    filters = np.clip(np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)), 0, None)
    if front_end.mel_norm == "slaney":
        filters *= 2 / (right - left)
    return filters.astype(np.float32)


def _mel(hertz: npt.NDArray[np.float64], slaney: bool) -> npt.NDArray[np.float64]:
    if not slaney:  # that of the Hidden Markov Model Toolkit
        return np.asarray(2595 * np.log10(1 + hertz / 700))
    above = _KNEE_HZ / _LINEAR_HZ + np.log(np.maximum(hertz, _KNEE_HZ) / _KNEE_HZ) / _LOG_STEP
    return np.where(hertz < _KNEE_HZ, hertz / _LINEAR_HZ, above)


def _hertz(mel: npt.NDArray[np.float64], slaney: bool) -> npt.NDArray[np.float64]:
    if not slaney:
        return np.asarray(700 * (10 ** (mel / 2595) - 1))
    above = _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_HZ / _LINEAR_HZ))
    return np.where(mel < _KNEE_HZ / _LINEAR_HZ, mel * _LINEAR_HZ, above)

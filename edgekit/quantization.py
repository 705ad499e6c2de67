"""Between real numbers and the integers of a quantized tensor: ``real = (q - zero_point) * scale``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def quantize(real: npt.NDArray[Any], dtype: str, scale: float, zero_point: int) -> npt.NDArray[Any]:
    """``real`` -> integers of ``dtype``. Halves go up, so that steps of equal size stay of equal size (to even, as
    NumPy rounds, two neighbouring pixel values would share one integer and the next be skipped)."""
    limits = np.iinfo(dtype)
    quantized = np.floor(real / scale + zero_point + 0.5)
    return np.clip(quantized, limits.min, limits.max).astype(dtype)


def dequantize(quantized: npt.NDArray[Any], scale: float, zero_point: int) -> npt.NDArray[np.float32]:
    return (quantized.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)

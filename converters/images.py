"""Images as data: files and arrays of pixels or float tensors, and the input tensors that the device makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgekit.converters.kinds import Array, Tensors
from edgekit.errors import ConversionError
from edgekit.manifest import ImageInput
from edgekit.preprocess import IMAGE_SUFFIXES, ImagePreprocessor, read_image_bgr
from edgekit.quantization import quantize

# Neighbouring pixels of a photograph correlate by 0.9, with noise as strong as its contrast still by 0.4; those of
# noise by less than 0.03, even in 32 images of 8 x 8.
_NOISE_CORRELATION, _SAMPLE = 0.05, 32


class Images:
    """Images at the model's size: 8-bit pixels as :meth:`ImagePreprocessor.resize` gives them, or float tensors that
    are ready for the model, each (height, width, channels). See :class:`edgekit.converters.kinds.Kind`."""

    thing, sources = "image", "images"
    enough, max_calibration, max_validation, max_of_file, noise_count = 32, 500, 5000, 1, 16
    saturates = False

    def __init__(self, input: ImageInput) -> None:
        self.input = input
        self._preprocess = ImagePreprocessor(input)
        self.shape = self._preprocess.tensor_shape[1:]

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)

    def read(self, path: Path, most: int) -> Iterator[Array]:  # noqa: ARG002 a file is one image
        yield self._preprocess.resize(read_image_bgr(path), "bgr")

    def check(self, x: Array, where: str) -> Array:
        channels = self.input.channels
        if x.ndim == 3 and channels == 1:
            x = x[..., None]
        if x.dtype == np.uint8:
            fits = x.ndim == 4 and x.shape[3] in (1, 3)
            expected = "(n, height, width, 3)"
        elif x.dtype in (np.float32, np.float64):
            fits = x.shape[1:] == self.shape
            expected = f"(n, {', '.join(map(str, self.shape))}), ready for the model"
        else:
            raise ConversionError(
                f"{where}: x", expected="uint8 images or float32 input tensors", got=str(x.dtype), mend="convert it"
            )
        if not fits:
            raise ConversionError(
                f"{where}: x of {x.dtype}", expected=f"shape {expected}", got=str(x.shape), mend="reshape it"
            )
        return x

    def item(self, x: Array) -> Array:
        return self._preprocess.resize(x, "rgb") if x.dtype == np.uint8 else x.astype(np.float32)

    def suspicion(self, x: Array) -> str:
        """Noise is known by the Pearson correlation of each pixel with its neighbour to the right and below, over all
        images of a sample: a camera's pixels resemble their neighbours."""
        sample = np.asarray(x[np.linspace(0, len(x) - 1, min(_SAMPLE, len(x))).round().astype(int)], np.float64)
        mend = "int8 ranges made from them fit no camera; give 100 or more typical images"
        if (sample == sample[:, :1, :1]).all():
            return f"each calibration image is of one colour only: {mend}"
        if len(sample) > 1 and (sample == sample[0]).all():
            return f"all calibration images are the same: {mend}"
        pairs = (sample[:, :, :-1], sample[:, :, 1:]), (sample[:, :-1], sample[:, 1:])
        correlations = [
            abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs if a.size and a.std() and b.std()
        ]
        if correlations and np.mean(correlations) < _NOISE_CORRELATION:
            return f"the calibration images look like noise (no pixel resembles its neighbours): {mend}"
        return ""

    def noise(self) -> Array:
        return np.random.default_rng(0).integers(0, 256, (self.noise_count, *self.shape), np.uint8)

    def tensors(self, x: Array, dtype: str = "float32", scale: float = 0.0, zero_point: int = 0) -> Tensors:
        preprocess = ImagePreprocessor(self.input, dtype, scale, zero_point)
        for item in x:
            if item.dtype == np.uint8:
                yield preprocess(item)
            else:
                yield (quantize(item, dtype, scale, zero_point) if scale else item)[None]

    def inputs(self, x: Array) -> Tensors:
        return self.tensors(x)

    def copies(self, x: Array) -> Iterator[Array]:  # noqa: ARG002 images are judged by themselves
        return iter(())

    def ranging(self, x: Array) -> Tensors:
        """Float tensors to fix quantization ranges with."""
        if x.dtype == np.uint8:
            # The input's range is that of all pixels, not of those that happened to be seen: one black, one white.
            image = x[0].copy()
            image[0, 0], image[-1, -1] = 0, 255
            yield self._preprocess(image)
        yield from self.tensors(x)

"""From an image to the input tensor: the same code for calibration, verification and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import ImageInput
from edgekit.quantization import quantize

_INTERPOLATION = {
    "bilinear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "bicubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}

ChannelOrder = Literal["rgb", "bgr"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}


def read_image_bgr(path: Path) -> npt.NDArray[np.uint8]:
    """The image in a file, 8-bit (height, width, 3), in OpenCV's channel order and turned as its EXIF data says.

    Raises:
        EdgekitError: the file cannot be read or is no image.
    """
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, OSError):  # OpenCV raises for an empty file
        image = None
    if image is None:
        raise EdgekitError(f"{path} is not a readable image", mend="remove or replace it")
    return np.asarray(image)


class ImagePreprocessor:
    """Turns 8-bit images into input tensors of one type.

    Normalization and quantization are one look-up: a pixel has 256 values, so what each becomes is worked out once, in
    float64, and quantized input costs no detour through float.

    Args:
        input: size, resize method and normalization.
        dtype: type of the tensor: ``float32``, ``int8``, ``uint8`` or ``int16``.
        scale, zero_point: quantization of the tensor, ``real = (q - zero_point) * scale``; 0 for a tensor that is not
            quantized.
    """

    def __init__(self, input: ImageInput, dtype: str = "float32", scale: float = 0.0, zero_point: int = 0) -> None:
        for name in ("mean", "std"):
            values = getattr(input, name)
            if (
                len(values) not in (1, input.channels)
                or not np.all(np.isfinite(values))
                or (name == "std" and 0 in values)
            ):
                raise BundleError(
                    f"input {name}",
                    expected=f"1 or {input.channels} finite numbers, std not 0",
                    got=str(values),
                    mend="convert the model again with --mean and --std that fit",
                )
        self.input = input
        self._size_wh = tuple(input.size_wh)
        self._interpolation = _INTERPOLATION[input.resize]
        self.tensor_shape = (1, input.size_wh[1], input.size_wh[0], input.channels)
        pixels = np.arange(256)[:, None]
        real = (pixels - np.asarray(input.mean)) / np.asarray(input.std)  # one column for all channels, or one for each
        table = (real if dtype == "float32" else quantize(real, dtype, scale or 1.0, zero_point)).astype(dtype)
        # cv2.LUT wants (1, 256, columns); int8 goes through it as the same bytes in uint8
        self._table = np.ascontiguousarray(table)[None].view(np.uint8 if dtype == "int8" else dtype)
        # A quantized input that spans the pixels' own range is the pixel, or the pixel with its top bit flipped.
        flips = np.unique(self._table[0] ^ pixels.astype(np.uint8)) if self._table.dtype == np.uint8 else pixels
        self._flip = flips[0] if len(flips) == 1 else None
        self.dtype = dtype

    def resize(self, image: npt.NDArray[np.uint8], channel_order: ChannelOrder = "rgb") -> npt.NDArray[np.uint8]:
        """``image`` (height, width) or (height, width, 3), 8-bit -> (height, width, channels) of the model, RGB or
        grey.

        Raises:
            EdgekitError: ``image`` has another shape or type.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise EdgekitError(
                "image",
                expected="uint8 of shape (height, width, 3) or (height, width)",
                got=f"{image.dtype} of shape {image.shape}",
                mend="convert it to 8-bit RGB",
            )
        if 0 in image.shape:
            raise EdgekitError(
                "image", expected="at least one pixel", got=f"shape {image.shape}", mend="leave out empty images"
            )
        small: Any = image
        if image.shape[1::-1] != self._size_wh:
            small = cv2.resize(image, self._size_wh, interpolation=self._interpolation)
        if small.ndim == 3 and small.shape[2] == 1:
            small = small[..., 0]
        # after resizing, where there is less to convert; it gives the same bytes as before it
        if self.input.channels == 3:
            if small.ndim == 2:
                small = cv2.cvtColor(small, cv2.COLOR_GRAY2RGB)
            elif channel_order == "bgr":
                small = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
        elif small.ndim == 3:
            small = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY if channel_order == "bgr" else cv2.COLOR_RGB2GRAY)
        return small.reshape(self.tensor_shape[1:])  # type: ignore[no-any-return]

    def __call__(self, image: npt.NDArray[np.uint8], channel_order: ChannelOrder = "rgb") -> npt.NDArray[Any]:
        """``image`` -> the input tensor, shape (1, height, width, channels). Raises as :meth:`resize`."""
        small = self.resize(image, channel_order)
        tensor: npt.NDArray[Any] = cv2.LUT(small, self._table) if self._flip is None else small ^ self._flip
        return tensor.view(self.dtype).reshape(self.tensor_shape)

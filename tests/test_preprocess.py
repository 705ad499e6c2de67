from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import ImageInput
from edgekit.preprocess import ImagePreprocessor
from edgekit.quantization import dequantize, quantize

INPUT = ImageInput(size_wh=(24, 16), mean=(127.5,), std=(127.5,))
IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


def test_float_tensor_is_resized_and_normalized() -> None:
    tensor = ImagePreprocessor(INPUT)(IMAGE)
    assert (tensor.shape, tensor.dtype) == ((1, 16, 24, 3), np.float32)
    expected = (cv2.resize(IMAGE, (24, 16)).astype(np.float64) - 127.5) / 127.5
    assert np.array_equal(tensor[0], expected.astype(np.float32))


def test_each_channel_has_its_own_mean_and_std() -> None:
    input = ImageInput(size_wh=(24, 16), mean=(1, 2, 3), std=(4, 5, 6))
    pixel = np.full((16, 24, 3), (10, 20, 30), np.uint8)
    assert ImagePreprocessor(input)(pixel)[0, 0, 0] == pytest.approx([9 / 4, 18 / 5, 27 / 6])


def test_int8_tensor_of_a_symmetric_input_is_the_pixel_with_its_top_bit_flipped() -> None:
    tensor = ImagePreprocessor(INPUT, "int8", 1 / 127.5, -1)(IMAGE)
    assert np.array_equal(tensor[0], (cv2.resize(IMAGE, (24, 16)) ^ 0x80).view(np.int8))


@pytest.mark.parametrize(
    ("dtype", "scale", "zero_point"), [("int8", 0.017, 3), ("uint8", 0.01, 128), ("int16", 1e-4, 0)]
)
def test_quantized_tensor_is_the_float_one_quantized(dtype: str, scale: float, zero_point: int) -> None:
    tensor = ImagePreprocessor(INPUT, dtype, scale, zero_point)(IMAGE)
    real = ImagePreprocessor(INPUT)(IMAGE)
    assert tensor.dtype == dtype
    inside = np.abs(real) < 0.9 * scale * (np.iinfo(dtype).max - abs(zero_point))
    assert inside.any()
    assert np.abs(dequantize(tensor, scale, zero_point) - real)[inside].max() <= 0.5001 * scale
    assert np.array_equal(tensor, quantize((real.astype(np.float64)), dtype, scale, zero_point))


def test_bgr_gives_the_same_bytes_as_rgb() -> None:
    preprocess = ImagePreprocessor(INPUT)
    assert np.array_equal(preprocess(IMAGE, "rgb"), preprocess(np.ascontiguousarray(IMAGE[..., ::-1]), "bgr"))


def test_resizing_first_gives_the_same_bytes() -> None:
    """Calibration keeps resized images; the device starts from the camera's."""
    for dtype, scale in (("float32", 0.0), ("int8", 1 / 127.5)):
        preprocess = ImagePreprocessor(INPUT, dtype, scale, -1)
        assert np.array_equal(preprocess(preprocess.resize(IMAGE)), preprocess(IMAGE))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (1, 1, 3), (16, 24, 3), (16, 24)])
def test_grey_and_colour_images_fit_grey_and_colour_models(channels: Any, shape: tuple[int, ...]) -> None:
    preprocess = ImagePreprocessor(ImageInput(size_wh=(24, 16), channels=channels, mean=(0,), std=(1,)))
    tensor = preprocess(np.full(shape, 77, np.uint8))
    assert tensor.shape == (1, 16, 24, channels)
    assert np.all(tensor == 77)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)],
    ids=["float", "rgba", "1-d", "empty"],
)
def test_image_of_another_kind_is_refused(image: Any) -> None:
    with pytest.raises(EdgekitError, match=r"image: expected .* got "):
        ImagePreprocessor(INPUT)(image)


@pytest.mark.parametrize(("mean", "std"), [((1, 2), (1,)), ((0,), (0,)), ((float("nan"),), (1,)), ((), (1,))])
def test_normalization_that_does_not_fit_is_refused(mean: Any, std: Any) -> None:
    with pytest.raises(BundleError, match="input"):
        ImagePreprocessor(ImageInput(size_wh=(4, 4), mean=mean, std=std))


def test_quantize_keeps_equal_steps_equal() -> None:
    pixels = (np.arange(256) - 127.5) / 127.5
    assert set(np.diff(quantize(pixels, "int8", 1 / 127.5, -1).astype(int))) == {1}
